"""The product of experts by either engine, against its formula in float64 and 50 digits, and what MVTCAE and MoPoE
make of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import mpmath
import pytest
import torch
from conftest import require_native
from inputs import FLOATING, assert_within, generator, gradients
from torch import Tensor

import vaefast

M, B, D = 3, 4, 5


@pytest.fixture(autouse=True, params=["auto", "reference"])
def _engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernels, and PyTorch where they do not reach; and PyTorch alone."""
    if request.param == "auto":
        require_native()
    with vaefast.use_backend(request.param):
        yield


def experts(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (M, B, D)) -> tuple[Tensor, Tensor]:
    g = generator(0)
    return tuple((s * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype) for s in (1.0, 1.5))  # type: ignore[return-value]


def textbook(mus: Tensor, logvars: Tensor, mask: Tensor | None = None, prior: bool = True) -> tuple[Tensor, Tensor]:
    """Wu & Goodman 2018: precisions add up."""
    precision = torch.exp(-logvars)
    if mask is not None:
        precision, mus = torch.where(mask.unsqueeze(2), precision, 0.0), torch.where(mask.unsqueeze(2), mus, 0.0)
    total = precision.sum(0) + prior
    return (mus * precision).sum(0) / total, -torch.log(total)


@pytest.mark.isa
@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_values_and_gradients(dtype: torch.dtype, masked: bool, prior: bool) -> None:
    mus, logvars = (t.requires_grad_() for t in experts(dtype))
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool) if masked else None
    found = vaefast.product_of_experts(mus, logvars, mask, prior=prior)
    wide = [t.detach().double().requires_grad_() for t in (mus, logvars)]
    exact = textbook(*wide, mask, prior)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for f, t in zip(found, exact, strict=True):
        assert f.dtype == dtype
        assert_within(f, t, tolerance)
    for f, t in zip(gradients(found, (mus, logvars)), gradients(exact, wide), strict=True):
        assert f.dtype == dtype
        assert_within(f, t, 4 * tolerance, "gradient")


EXTREMES = (-80.0, -20.0, 0.0, 1e-7, 20.0, 80.0)


@pytest.mark.isa
@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
def test_extremes_in_fifty_digits(dtype: torch.dtype, tolerance: float, prior: bool) -> None:
    """|logvar| of 80, next to each other and together, whose precisions float32 does not hold."""
    columns = list(itertools.product(EXTREMES, repeat=2))
    logvars = torch.tensor(columns, dtype=torch.float64).T.to(dtype).unsqueeze(1)
    mus = torch.randn(logvars.shape, generator=generator(1), dtype=torch.float64).to(dtype)
    leaves = [mus.requires_grad_(), logvars.requires_grad_()]
    mu, logvar = vaefast.product_of_experts(mus, logvars, prior=prior)
    found = [mu.detach(), logvar.detach(), *gradients((mu, logvar), leaves)]
    ups = [
        1.5 + torch.rand((1, len(columns)), generator=generator(5 + k), dtype=torch.float64).to(dtype).double()
        for k in (0, 1)
    ]
    with mpmath.workdps(50):
        for n in range(len(columns)):
            m, v = ([mpmath.mpf(float(t[k, 0, n].detach())) for k in range(2)] for t in (mus, logvars))
            precisions = [mpmath.exp(-x) for x in v]
            total = sum(precisions) + int(prior)
            mean = sum(a * p for a, p in zip(m, precisions)) / total
            shares = [p / total for p in precisions]
            u = [mpmath.mpf(float(up[0, n])) for up in ups]
            true = [mean, -mpmath.log(total)]
            slopes = [s * u[0] for s in shares], [s * (u[1] - (a - mean) * u[0]) for s, a in zip(shares, m)]
            for f, t in zip(found[:2], true):
                assert abs(float(f[0, n]) - float(t)) <= tolerance * max(1, abs(float(t)))
            for f, each in zip(found[2:], slopes):
                for k in range(2):
                    assert abs(float(f[k, 0, n]) - float(each[k])) <= 4 * tolerance * max(1, abs(float(each[k])))


@pytest.mark.isa
def test_what_is_missing_may_be_nan() -> None:
    mus, logvars = experts()
    mask = torch.rand(M, B, generator=generator(2)) > 0.4
    expected = vaefast.product_of_experts(mus, logvars, mask)
    mus, logvars = (t.masked_fill(~mask.unsqueeze(2), torch.nan).requires_grad_() for t in (mus, logvars))
    found = vaefast.product_of_experts(mus, logvars, mask)
    for f, e in zip(found, expected):
        assert torch.equal(f, e)
    for g in gradients(found, (mus, logvars)):
        assert (g[~mask] == 0).all() and (g[mask] != 0).all()


@pytest.mark.isa
def test_no_expert_at_all() -> None:
    mus, logvars = (t.requires_grad_() for t in experts())
    nobody = torch.zeros(M, B, dtype=torch.bool)
    mu, logvar = vaefast.product_of_experts(mus, logvars, nobody)
    assert (mu == 0).all() and (logvar == 0).all()  # the prior's
    mu, logvar = vaefast.product_of_experts(mus, logvars, nobody, prior=False)
    assert (mu == 0).all() and (logvar == torch.inf).all()
    assert all((g == 0).all() for g in gradients((mu, logvar), (mus, logvars)))


def test_a_missing_expert_beside_one_of_no_precision() -> None:
    """Which leaves nothing to be known, as none at all does; what is NaN stays so, in no gradient of the missing."""
    mus = torch.ones(3, 1, 3, requires_grad=True)
    logvars = torch.tensor([[torch.inf, torch.inf, torch.nan], [0.0] * 3, [torch.inf, 1.0, torch.inf]]).unsqueeze(1)
    logvars.requires_grad_()
    mask = torch.tensor([[True], [False], [True]])
    mask = torch.stack((torch.tensor([[True], [False], [False]]), mask, mask), 2)
    for prior, rest in ((True, 0.0), (False, torch.inf)):
        mu, logvar = vaefast.product_of_experts(mus, logvars, mask, prior=prior)
        assert mu[0, 0] == 0 and logvar[0, 0] == rest
        assert mu[0, 2].isnan() and logvar[0, 2].isnan()
        for g in torch.autograd.grad((mu.sum(), logvar.sum()), (mus, logvars)):
            assert (g[1] == 0).all() and (g[:, :, 0] == 0).all() and g[0, 0, 2].isnan()
            assert g[0, 0, 1] == 0 and g[2, 0, 1] != 0


def test_one_expert_is_itself() -> None:
    mus, logvars = experts(shape=(1, B, D))
    mu, logvar = vaefast.product_of_experts(mus, logvars, prior=False)
    torch.testing.assert_close(mu, mus[0])
    torch.testing.assert_close(logvar, logvars[0])


def test_mopoe_is_products_over_subsets() -> None:
    """Sutter et al. 2021 (arXiv:2105.02470): a product for every subset, in one call."""
    mus, logvars = experts()
    subsets = torch.tensor(list(itertools.product((True, False), repeat=M))[:-1])
    mask = subsets.T.unsqueeze(2)  # [M, S, 1]
    mu, logvar = vaefast.product_of_experts(
        *(t.unsqueeze(1).expand(M, len(subsets), B, D) for t in (mus, logvars)), mask, prior=False
    )
    for s, members in enumerate(subsets):
        for f, t in zip((mu, logvar), textbook(mus[members].double(), logvars[members].double(), prior=False)):
            assert_within(f[s], t, 1e-6)


def test_mvtcae_is_the_product_of_all() -> None:
    """Hwang et al. 2021 (NeurIPS 34): q(z|x_1 ... x_M) is their product, and there are KLs from it to each."""
    mus, logvars = experts()
    mu, logvar = vaefast.product_of_experts(mus, logvars, prior=False)
    kls = vaefast.gaussian_kl(
        mu.expand(M, B, D), logvar.expand(M, B, D), mus, logvars, batch_dims=2, reduction="per_sample"
    )
    exact = torch.distributions.kl_divergence(
        *(
            torch.distributions.Normal(m.double(), torch.exp(0.5 * v.double()))
            for m, v in (textbook(mus.double(), logvars.double(), prior=False), (mus, logvars))
        )
    ).sum(2)
    assert_within(kls, exact, 2e-6)


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_gradients_of_gradients(masked: bool, prior: bool) -> None:
    mus, logvars = (t.requires_grad_() for t in experts(torch.float64, (3, 2, 2)))
    mask = torch.tensor([[True, False], [True, True], [False, True]]) if masked else None

    def f(mus: Tensor, logvars: Tensor) -> Any:
        return vaefast.product_of_experts(mus, logvars, mask, prior=prior)

    assert torch.autograd.gradcheck(f, (mus, logvars))
    assert torch.autograd.gradgradcheck(f, (mus, logvars))


def test_compiled_and_transformed() -> None:
    mus, logvars = (t.requires_grad_() for t in experts())
    mask = torch.rand(M, B, generator=generator(2)) > 0.4
    expected = vaefast.product_of_experts(mus, logvars, mask)
    found = torch.compile(vaefast.product_of_experts, fullgraph=True)(mus, logvars, mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, (mus, logvars)), gradients(expected, (mus, logvars)))
    columns = torch.func.vmap(vaefast.product_of_experts, in_dims=2, out_dims=1)(mus, logvars)
    torch.testing.assert_close(columns, vaefast.product_of_experts(mus, logvars))


def test_strided_and_empty() -> None:
    mus, logvars = experts()
    both = torch.stack((mus, logvars), dim=-1)
    torch.testing.assert_close(
        vaefast.product_of_experts(both[..., 0], both[..., 1]), vaefast.product_of_experts(mus, logvars)
    )
    assert vaefast.product_of_experts(mus[:, :0], logvars[:, :0])[0].shape == (0, D)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(3), torch.zeros(3)), "of at least one modality"),
        ((torch.zeros(0, 2, 3), torch.zeros(0, 2, 3)), "of at least one modality"),
        ((torch.zeros(3, 2, 4), torch.zeros(3, 2, 5)), "must be equal"),
        ((torch.zeros(3, 2, 4), torch.zeros(3, 2, 4), torch.zeros(3, 2)), "a bool tensor"),
        ((torch.zeros(3, 2, 4), torch.zeros(3, 2, 4), torch.zeros(2, 3, dtype=torch.bool)), r"it is \[M, B\]"),
        ((torch.zeros(3, 2, 4), torch.zeros(3, 2, 4).int()), "float"),
    ],
)
def test_refusals(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        vaefast.product_of_experts(*args)
