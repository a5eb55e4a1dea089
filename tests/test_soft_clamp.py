"""``Parameterization(soft_clamp=)`` and ``temperature=`` against plain formulas, by every function that takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import FLOATING, generator
from torch import Tensor

import vaefast
from vaefast import Parameterization
from vaefast.reference import PARAMETERIZATIONS

C = 5.0
SOFT = Parameterization("log_std", soft_clamp=C)


def clamped(x: Tensor) -> Tensor:
    """NVAE's soft_clamp5: distributions.py, x.div(5.).tanh_().mul(5.)."""
    return C * torch.tanh(x / C)


def given(name: str = "log_std", dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    """mu, raw and the prior's two, of which the first and the third reach beyond the clamp."""
    rng = generator(3)
    mu, raw, pm, praw = (4 * torch.randn(6, 7, generator=rng, dtype=torch.float64) for _ in range(4))
    if name in ("std", "var"):
        raw, praw = raw.abs() + 0.1, praw.abs() + 0.1
    return [t.to(device=device, dtype=dtype).requires_grad_() for t in (mu, raw, pm, praw)]


def assert_same(ours: Any, theirs: Any, leaves: list[Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs)
    upstream = [torch.randn(t.shape, generator=generator(7), dtype=t.dtype) for t in theirs]
    for got, other in zip(
        torch.autograd.grad(ours, leaves, upstream, retain_graph=True, allow_unused=True),
        torch.autograd.grad(theirs, leaves, upstream, retain_graph=True, allow_unused=True),
    ):
        torch.testing.assert_close(got, other)


@pytest.mark.parametrize("name", list(PARAMETERIZATIONS))
@pytest.mark.parametrize("extra", [{}, {"floor": 0.1}, {"clamp": (0.3, 2.0)}])
def test_of_each_parameterization(backend: str, device: str, name: str, extra: dict[str, Any]) -> None:
    mu, raw, *_ = leaves = given(name, device=device)[:2]
    p, plain = Parameterization(name, soft_clamp=C, **extra), Parameterization(name, **extra)
    eps = torch.randn(6, 7, generator=generator(1), dtype=torch.float64).to(device)
    soft = clamped(mu), clamped(raw)
    assert_same(
        [
            *vaefast.sample_with_kl(mu, raw, parameterization=p, eps=eps),
            vaefast.kl_per_dim(mu, raw, parameterization=p),
        ],
        [
            *vaefast.sample_with_kl(*soft, parameterization=plain, eps=eps),
            vaefast.kl_per_dim(*soft, parameterization=plain),
        ],
        leaves,
    )
    z = vaefast.reparameterize(mu, raw, parameterization=p, generator=generator(5, device))
    expected = vaefast.reparameterize(*soft, parameterization=plain, generator=generator(5, device))
    assert_same([z], [expected], leaves)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"free_bits": 2.0},
    {"balance": 0.7},
    {"symmetric": True},
    {"capacity": 3.0},
    {"batch_dims": 2, "reduction": "per_sample"},
    {"reduction": "none"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_between_two_that_are_clamped(backend: str, device: str, options: dict[str, Any]) -> None:
    """NVAE's cells: posterior and prior both, by log standard deviations; distributions.py, Normal.kl."""
    leaves = given(device=device)
    plain = {"parameterization": "log_std", "prior_parameterization": "log_std", **options}
    ours = vaefast.gaussian_kl(*leaves, **{**plain, "parameterization": SOFT, "prior_parameterization": SOFT})
    assert_same([ours], [vaefast.gaussian_kl(*map(clamped, leaves), **plain)], leaves)
    if not options:
        mu, log_sigma, prior_mu, prior_log_sigma = map(clamped, leaves)
        term1, term2 = (mu - prior_mu) / prior_log_sigma.exp(), log_sigma.exp() / prior_log_sigma.exp()
        kl = 0.5 * (term1 * term1 + term2 * term2) - 0.5 - torch.log(term2)
        torch.testing.assert_close(ours, kl.sum(1).mean())
    posterior_alone = vaefast.gaussian_kl(*leaves, **{**plain, "parameterization": SOFT})
    soft = [*map(clamped, leaves[:2]), *leaves[2:]]
    assert_same([posterior_alone], [vaefast.gaussian_kl(*soft, **plain)], leaves)


@pytest.mark.parametrize("estimator", ["mc", "stl"])
def test_estimators(backend: str, device: str, estimator: str) -> None:
    leaves = given(device=device)[:2]
    eps = torch.randn(6, 7, generator=generator(1), dtype=torch.float64).to(device)
    ours = vaefast.sample_with_kl(*leaves, parameterization=SOFT, eps=eps, estimator=estimator)
    theirs = vaefast.sample_with_kl(*map(clamped, leaves), parameterization="log_std", eps=eps, estimator=estimator)
    assert_same(list(ours), list(theirs), leaves)


def test_the_elbo(backend: str, device: str) -> None:
    mu, raw, *_ = leaves = given(device=device)[:2]
    recon = torch.randn(6, 9, dtype=torch.float64, device=device, requires_grad=True)
    x = torch.rand(6, 9, dtype=torch.float64, device=device)
    soft = clamped(mu), clamped(raw)
    expected = vaefast.elbo_terms(recon, x, *soft, parameterization="log_std", beta=0.5)
    assert_same(list(vaefast.elbo_terms(recon, x, mu, raw, parameterization=SOFT, beta=0.5)), list(expected), leaves)
    module = vaefast.ELBOLoss(parameterization=SOFT, beta=0.5)
    for loss in (module(recon, x, mu, raw), vaefast.elbo_loss(recon, x, mu, raw, parameterization=SOFT, beta=0.5)):
        assert_same([loss], [expected.loss], leaves)
    report = vaefast.diagnostics.collapse_report(mu, raw, parameterization=SOFT)
    torch.testing.assert_close(report.kl, vaefast.diagnostics.collapse_report(*soft, parameterization="log_std").kl)


def test_many_in_one_call(backend: str, device: str) -> None:
    leaves = given(device=device)
    lists = [[t[:, :3], t[:, 3:]] for t in leaves]
    soft = [[clamped(t) for t in ts] for ts in lists]
    ours = vaefast.multi_tensor_gaussian_kl(*lists, parameterization=SOFT)
    assert_same([ours], [vaefast.multi_tensor_gaussian_kl(*soft, parameterization="log_std")], leaves)
    samples, kl = vaefast.multi_tensor_sample_with_kl(
        *lists[:2], 8.0, -6.0, parameterization=SOFT, prior_parameterization=SOFT, generator=generator(2, device)
    )
    bound = [float(clamped(torch.tensor(v, dtype=torch.float64))) for v in (8.0, -6.0)]
    expected, other = vaefast.multi_tensor_sample_with_kl(
        *soft[:2], *bound, parameterization="log_std", prior_parameterization="log_std", generator=generator(2, device)
    )
    assert_same([*samples, kl], [*expected, other], leaves[:2])


def test_what_a_weight_hides(backend: str, device: str) -> None:
    """A NaN, which a soft clamp's slope would hand on."""
    mask = torch.rand(6, 7, generator=generator(8)).to(device) > 0.4
    leaves = given(device=device)
    spoiled = [torch.where(mask, t, torch.nan).detach().requires_grad_() for t in leaves]
    options: dict[str, Any] = {"parameterization": SOFT, "prior_parameterization": SOFT, "weight": mask}
    ours, theirs = (vaefast.gaussian_kl(*ts, **options) for ts in (spoiled, leaves))
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, spoiled), torch.autograd.grad(theirs, leaves)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", FLOATING)
def test_dtypes(backend: str, device: str, dtype: torch.dtype) -> None:
    mu, raw = given(dtype=dtype, device=device)[:2]
    z, kl = vaefast.sample_with_kl(mu, raw, parameterization=SOFT, reduction="none", temperature=0.7)
    assert z.dtype == kl.dtype == dtype
    wide = vaefast.gaussian_kl(*(clamped(t.double()) for t in (mu, raw)), parameterization="log_std", reduction="none")
    rtol = {torch.float16: 4e-2, torch.bfloat16: 3e-1}.get(dtype, 1e-4)  # e^(2 raw) multiplies the rounding of raw
    torch.testing.assert_close(kl.double(), wide, rtol=rtol, atol=rtol)


def test_one_graph(backend: str, device: str) -> None:
    leaves = given(dtype=torch.float32, device=device)

    def step(*leaves: Tensor) -> Tensor:
        z = vaefast.reparameterize(*leaves[:2], parameterization=SOFT, temperature=0.5)
        return vaefast.gaussian_kl(*leaves, parameterization=SOFT, prior_parameterization=SOFT) + 0 * z.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same([compiled(*leaves)], [step(*leaves)], leaves)


# -- temperature


@pytest.mark.parametrize("noise", [None, "philox", "torch"])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_temperature_multiplies_the_std(
    backend: str, device: str, temperature: float, noise: str | None, dtype: torch.dtype
) -> None:
    mu, raw, *_ = leaves = [(0.3 * t).detach().requires_grad_() for t in given(dtype=dtype, device=device)[:2]]
    options: dict[str, Any] = {"parameterization": "log_std", "noise": noise}
    z = vaefast.reparameterize(mu, raw, temperature=temperature, generator=generator(4, device), **options)
    # the noise that the draw at temperature 1 has
    zero = torch.zeros_like(mu)
    eps = vaefast.reparameterize(zero.to(dtype), zero, generator=generator(4, device), noise=noise)
    expected = mu + temperature * raw.exp() * eps
    assert z.dtype == dtype
    tolerance = {"rtol": 5e-3, "atol": 5e-3} if dtype == torch.float16 else {}
    torch.testing.assert_close(z, expected, **tolerance)
    for a, b in zip(torch.autograd.grad(z.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)):
        torch.testing.assert_close(a, b, **tolerance)
    again, kl = vaefast.sample_with_kl(mu, raw, temperature=temperature, generator=generator(4, device), **options)
    assert torch.equal(again, z)
    torch.testing.assert_close(kl, vaefast.gaussian_kl(mu, raw, parameterization="log_std"))


def test_temperature_with_many_samples_and_generators(backend: str, device: str) -> None:
    mu, raw = given(device=device)[:2]
    eps = torch.randn(3, 6, 7, generator=generator(1), dtype=torch.float64).to(device)
    got = vaefast.reparameterize(mu, raw, eps=eps, num_samples=3, temperature=0.5)
    torch.testing.assert_close(got, mu + 0.5 * torch.exp(raw / 2) * eps)
    each = [generator(k, device) for k in range(6)]
    one = vaefast.reparameterize(mu, raw, generator=each, temperature=0.5)
    whole = vaefast.reparameterize(mu, raw, generator=[generator(k, device) for k in range(6)])
    torch.testing.assert_close(one, mu + 0.5 * (whole - mu))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Parameterization(soft_clamp=0.0), "soft_clamp must be a finite number above 0"),
        (lambda: Parameterization(soft_clamp=float("inf")), "soft_clamp must be a finite number above 0"),
        (lambda: Parameterization(soft_clamp="5"), "soft_clamp must be None or a number"),  # type: ignore[arg-type]
        (lambda: vaefast.reparameterize(*given()[:2], temperature=-1.0), "temperature must be a finite number >= 0"),
        (lambda: vaefast.reparameterize(*given()[:2], temperature="a"), "temperature must be a number"),  # type: ignore[arg-type]
        (lambda: vaefast.sample_with_kl(*given()[:2], temperature=0.5, estimator="mc"), "use 'analytic'"),
    ],
)
def test_what_is_refused(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_parameterization_is_what_it_was() -> None:
    assert Parameterization("std", floor=0.1) == Parameterization("std", None, 0.1)
    assert Parameterization(soft_clamp=5).hard == Parameterization() != Parameterization(soft_clamp=5)
