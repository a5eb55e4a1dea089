"""The KL's weight, against the textbook's elementwise KL in float64 times it; what a mask hides may be NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import textbook_kl
from torch import Tensor

import vaefast

SHAPE = (6, 5, 4)
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "per_sample": lambda x: x.flatten(1).sum(1),
    "batchmean": lambda x: x.flatten(1).sum(1).mean(),
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(),
}
WEIGHTS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "mask of steps": lambda g: torch.rand(6, 5, 1, generator=g) > 0.4,
    "mask of elements": lambda g: torch.rand(SHAPE, generator=g) > 0.5,
    "whole samples hidden": lambda g: (torch.arange(6) % 2 == 0).view(6, 1, 1),
    "all hidden": lambda g: torch.zeros(SHAPE, dtype=torch.bool),
    "factors": lambda g: torch.rand(SHAPE, generator=g) * 2,
    "factors with zeros": lambda g: (torch.rand(4, generator=g) - 0.5).clamp(0),
}


def values(prior: bool, weight: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    hidden = (weight == 0).expand(SHAPE)
    found = [torch.randn(SHAPE, generator=g).to(dtype) for _ in range(4 if prior else 2)]
    return [torch.where(hidden, torch.nan, t).requires_grad_() for t in found]


def expected(inputs: list[Tensor], weight: Tensor, reduction: str) -> tuple[Tensor, list[Tensor]]:
    hidden = (weight == 0).expand(SHAPE)
    exact = [torch.where(hidden, 0.0, t.detach().double()).requires_grad_() for t in inputs]
    kl = REDUCTIONS[reduction](textbook_kl(*exact) * weight.double())
    return kl, list(torch.autograd.grad(kl.sum(), exact))


@pytest.mark.parametrize("reduction", list(REDUCTIONS))
@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_kl_is_the_weighted_textbook(backend: str, name: str, prior: bool, reduction: str) -> None:
    weight = WEIGHTS[name](torch.Generator().manual_seed(1))
    inputs = values(prior, weight)
    kl = vaefast.gaussian_kl(*inputs, weight=weight, reduction=reduction)
    exact, gradients = expected(inputs, weight, reduction)
    torch.testing.assert_close(kl.double(), exact, rtol=2e-6, atol=1e-6)
    for got, e in zip(torch.autograd.grad(kl.sum(), inputs), gradients):
        torch.testing.assert_close(got.double(), e, rtol=2e-6, atol=1e-6)


PARAMETERIZED = ["logvar", "log_std", "std", "var", "softplus", vaefast.Parameterization("std", clamp=(0.1, 2.0))]


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("of_prior", PARAMETERIZED, ids=str)
@pytest.mark.parametrize("parameterization", PARAMETERIZED, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_hidden_has_any_parameterization(
    backend: str, parameterization: Any, of_prior: Any, junk: float, symmetric: bool
) -> None:
    """Value and gradients are those of any other number there."""
    g = torch.Generator().manual_seed(1)
    weight = WEIGHTS["mask of elements"](g)
    shown = [torch.rand(SHAPE, generator=g) + 0.2 for _ in range(4)]
    found = []
    for hide in (junk, 0.5):
        inputs = [torch.where(weight, t, hide).requires_grad_() for t in shown]
        kl = vaefast.gaussian_kl(
            *inputs, weight=weight, symmetric=symmetric,
            parameterization=parameterization, prior_parameterization=of_prior,
        )  # fmt: skip
        found.append([kl, *torch.autograd.grad(kl, inputs)])
    for f, e in zip(*found):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize(
    "options",
    [
        {"free_bits": 0.3},
        {"free_bits": 2.0, "free_bits_per": "sample"},
        {"free_bits": 0.2, "free_bits_per": "batch_dim"},
        {"capacity": 5.0},
        {"symmetric": True},
        {"balance": 0.8},
        {"prior_parameterization": "log_std"},
    ],
    ids=str,
)
def test_options_go_by_the_weighted_kl(backend: str, options: dict[str, Any]) -> None:
    """As if what is hidden had another KL of 0: at q = p."""
    weight = WEIGHTS["mask of steps"](torch.Generator().manual_seed(1))
    inputs = values(True, weight)
    same = [torch.where(weight, t.detach(), 0.0).requires_grad_() for t in inputs]
    kl = vaefast.gaussian_kl(*inputs, weight=weight, **options)
    other = vaefast.gaussian_kl(*same, **options)
    torch.testing.assert_close(kl, other)
    for got, e in zip(torch.autograd.grad(kl, inputs), torch.autograd.grad(other, same)):
        torch.testing.assert_close(got, torch.where(weight, e, 0.0))


@pytest.mark.parametrize("estimator", ["analytic", "mc", "stl"])
def test_samples_are_those_without(backend: str, estimator: str) -> None:
    weight = WEIGHTS["mask of elements"](torch.Generator().manual_seed(1))
    inputs = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(k)).requires_grad_() for k in range(2)]

    def run(**options: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        return vaefast.sample_with_kl(*inputs, estimator=estimator, reduction="none", **options)

    (z, kl), (plain, each) = run(kl_weight=weight), run()
    torch.testing.assert_close(z, plain, rtol=0, atol=0)
    torch.testing.assert_close(kl, torch.where(weight, each, 0.0))


@pytest.mark.parametrize("estimator", ["analytic", "mc", "stl"])
def test_what_is_hidden_reaches_no_estimate(backend: str, estimator: str) -> None:
    weight = WEIGHTS["mask of steps"](torch.Generator().manual_seed(1))
    inputs = values(True, weight)
    _, kl = vaefast.sample_with_kl(*inputs, estimator=estimator, kl_weight=weight)
    assert kl.isfinite()
    for grad in torch.autograd.grad(kl, inputs):
        assert grad.isfinite().all()
        assert not grad[(~weight).expand(SHAPE)].any()


@pytest.mark.parametrize("beta", [1.0, torch.tensor(0.5)], ids=["float", "tensor"])
def test_elbo_of_padded_sequences(backend: str, beta: float | Tensor) -> None:
    """Both terms of a padded batch are those of its steps alone."""
    mask = WEIGHTS["mask of steps"](torch.Generator().manual_seed(1))
    mu, logvar = values(False, mask)
    recon, x = (torch.where(mask, torch.rand(6, 5, 7), torch.nan) for _ in range(2))
    recon.requires_grad_()
    terms = vaefast.elbo_terms(recon, x, mu, logvar, beta=beta, weight=mask, kl_weight=mask, likelihood="gaussian")
    steps = mask[..., 0]
    bare = [t.detach()[steps] for t in (recon, x, mu, logvar)]
    other = vaefast.elbo_terms(*bare, beta=beta, likelihood="gaussian", reduction="sum")
    for got, e in zip(terms, other):
        torch.testing.assert_close(got, e / 6)
    criterion = vaefast.ELBOLoss(likelihood="gaussian", beta=beta)
    torch.testing.assert_close(criterion(recon, x, mu, logvar, weight=mask, kl_weight=mask), terms.loss)
    assert all(g.isfinite().all() for g in torch.autograd.grad(terms.loss, (recon, mu, logvar)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS["factors"](torch.Generator().manual_seed(1))
    inputs = values(False, weight, dtype)
    exact, _ = expected(inputs, weight, "batchmean")
    kl = vaefast.gaussian_kl(*inputs, weight=weight)
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(kl.double(), exact, rtol=2e-6, atol=0)
    assert vaefast.gaussian_kl(*inputs, weight=weight, reduction="none").dtype == dtype


def test_compiles_in_one_graph() -> None:
    weight = WEIGHTS["mask of steps"](torch.Generator().manual_seed(1))
    inputs = values(False, weight)

    def f(mu: Tensor, logvar: Tensor, weight: Tensor) -> Tensor:
        return vaefast.gaussian_kl(mu, logvar, weight=weight)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, weight), f(*inputs, weight))


def test_a_weight_that_is_trained_has_its_gradient(backend: str) -> None:
    mu, logvar = torch.randn(6, 4), torch.randn(6, 4)
    weight = torch.rand(4, requires_grad=True)
    (grad,) = torch.autograd.grad(vaefast.gaussian_kl(mu, logvar, weight=weight, reduction="sum"), weight)
    torch.testing.assert_close(grad, textbook_kl(mu, logvar).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (torch.ones(3), ValueError, r"the KL's weight of shape \(3,\).*mu's shape \(6, 5, 4\)"),
        (torch.ones(4, dtype=torch.int64), TypeError, "the KL's weight must be float16.*int64"),
        (torch.ones(4, device="meta"), ValueError, "the KL's weight is on meta"),
        ("mask", TypeError, "the KL's weight must be a torch.Tensor, got str"),
    ],
    ids=["shape", "dtype", "device", "type"],
)
def test_errors(backend: str, weight: Any, error: type[Exception], words: str) -> None:
    inputs = torch.zeros(SHAPE), torch.zeros(SHAPE)
    with pytest.raises(error, match=words):
        vaefast.gaussian_kl(*inputs, weight=weight)
    with pytest.raises(error, match=words):
        vaefast.sample_with_kl(*inputs, kl_weight=weight)
    with pytest.raises(error, match=words):
        vaefast.elbo_loss(*inputs, *inputs, kl_weight=weight)
