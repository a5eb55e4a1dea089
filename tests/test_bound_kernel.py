"""The kernels of several draws a sample, log density ratios and the importance-weighted bound, against formulas in
float64: sizes that fill no vector, layouts, dtypes, gradients, what is infinite, threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from inputs import FLOATING, assert_same_bits, generator
from torch import Tensor

import vaefast
from vaefast import _native
from vaefast._engine import LogRatio, Reconstruction
from vaefast.likelihoods import LIKELIHOODS

pytestmark = pytest.mark.isa

WIDE = torch.float64


@pytest.fixture(autouse=True)
def _kernels(extension: object) -> Iterator[None]:
    with vaefast.use_backend("native"):
        yield


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=generator(seed))).to(dtype).requires_grad_()


def ratio_of(z: Tensor, mu: Tensor, logvar: Tensor, pm: Any, plv: Any, prior: bool = True) -> Tensor:
    """The formula, without the constants."""
    q = (z - mu) ** 2 * torch.exp(-logvar) + logvar
    plv = torch.as_tensor(0.0 if plv is None else plv, dtype=z.dtype)
    p = (z - (0.0 if pm is None else pm)) ** 2 * torch.exp(-plv) + plv
    return 0.5 * (q - p if prior else q).flatten(2).sum(2)


def leaf(t: Any) -> Any:
    return t.detach().double().requires_grad_() if isinstance(t, Tensor) else t


def close(found: Tensor, exact: Tensor, most: float) -> None:
    largest = exact.abs().max().item() if exact.numel() else 0.0
    assert found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=most, atol=most * max(1.0, largest))


def digits(dtype: torch.dtype, most: float) -> float:
    """How near a gradient of the dtype is."""
    return {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: max(most, 2e-6)}.get(dtype, most)


def compare_ratio(z: Tensor, mu: Tensor, logvar: Tensor, pm: Any = None, plv: Any = None, prior: bool = True,
                  most: float = 2e-6) -> None:  # fmt: skip
    ratio = _native.eager.log_ratio(LogRatio(z, mu, logvar, pm, plv, prior))
    wide = [leaf(t) for t in (z, mu, logvar, pm, plv)]
    exact = ratio_of(*wide, prior)
    assert ratio.dtype == (WIDE if WIDE in {t.dtype for t in (z, mu, logvar)} else torch.float32)
    close(ratio, exact, most)
    g = torch.randn(exact.shape, generator=generator(9))
    trained = [t for t in (z, mu, logvar, pm, plv) if isinstance(t, Tensor)]
    expected = torch.autograd.grad(exact, [t for t in wide if isinstance(t, Tensor)], g.double())
    for f, t, like in zip(torch.autograd.grad(ratio, trained, g.to(ratio.dtype)), expected, trained, strict=True):
        assert f.dtype == like.dtype
        close(f, t, digits(like.dtype, most))


# at one, below, at and above the lanes of a vector, and of a stretch of latents and of draws
@pytest.mark.parametrize("latents", [1, 2, 7, 8, 9, 15, 16, 17, 50, 255, 256, 257, 300, 1000])
@pytest.mark.parametrize("prior", [True, False])
def test_any_number_of_latents(latents: int, prior: bool) -> None:
    compare_ratio(drawn(5, 3, latents, seed=0), drawn(3, latents, seed=1), drawn(3, latents, seed=2), prior=prior)


@pytest.mark.parametrize("draws", [1, 2, 63, 64, 65, 255, 256, 257, 600])
@pytest.mark.parametrize("samples", [1, 5])
def test_any_number_of_draws(draws: int, samples: int) -> None:
    prior = [drawn(samples, 9, seed=n) for n in (3, 4)]
    compare_ratio(drawn(draws, samples, 9, seed=0), *(drawn(samples, 9, seed=n) for n in (1, 2)), *prior)


PRIORS: dict[str, tuple[Any, Any]] = {
    "standard": (None, None),
    "numbers": (0.5, -0.7),
    "mean": (drawn(4, 10, seed=5), 1.0),
    "logvar": (None, drawn(10, seed=6)),
    "broadcast": (drawn(1, 10, seed=5), drawn(4, 1, seed=6)),
}


@pytest.mark.parametrize("prior", list(PRIORS))
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_priors_and_dtypes(prior: str, dtype: torch.dtype) -> None:
    pm, plv = (leaf(t).to(dtype).detach().requires_grad_() if isinstance(t, Tensor) else t for t in PRIORS[prior])
    given = (drawn(6, 4, 10, seed=0, dtype=dtype), *(drawn(4, 10, seed=n, dtype=dtype) for n in (1, 2)))
    compare_ratio(*given, pm, plv, most=1e-13 if dtype == WIDE else 2e-6)


def test_dtypes_that_differ() -> None:
    z, mu, logvar = drawn(6, 4, 10, seed=0), drawn(4, 10, seed=1, dtype=torch.bfloat16), drawn(4, 10, seed=2)
    compare_ratio(z, mu, logvar)
    compare_ratio(z, mu, logvar.detach().double().requires_grad_(), drawn(4, 10, seed=3))


def test_layouts() -> None:
    """Views, more dimensions of latents, and a gradient that is expanded."""
    z = drawn(3, 12, 14, 5, seed=0).transpose(0, 3)[:, ::2, ::3]
    mu, logvar = drawn(14, 24, seed=1).t()[::4, ::3], drawn(5, seed=2).expand(6, 5)
    for t in (z, mu, logvar):
        t.retain_grad()
    compare_ratio(z, mu[:, :, None].expand(6, 5, 3), logvar[:, :, None].expand(6, 5, 3))
    z, mu = drawn(5, 4, 3, seed=0), drawn(4, 3, seed=1)
    (g,) = torch.autograd.grad(_native.eager.log_ratio(LogRatio(z, mu, mu.detach(), None, None, True)).sum(), mu)
    wide = leaf(mu)
    (exact,) = torch.autograd.grad(ratio_of(leaf(z), wide, wide.detach(), None, None).sum(), wide)
    close(g, exact, 2e-6)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing(shape: tuple[int, ...]) -> None:
    z, mu = drawn(*shape, seed=0), drawn(*shape[1:], seed=1)
    ratio = _native.eager.log_ratio(LogRatio(z, mu, mu, None, None, True))
    assert ratio.shape == shape[:2] and not ratio.any()
    for g, t in zip(torch.autograd.grad(ratio.sum(), (z, mu)), (z, mu)):
        assert g.shape == t.shape and not g.any()


def test_variances_that_vanish() -> None:
    """Of q: nothing at the mean, all beside it; and large ones of both."""
    mu = torch.tensor([[0.0, 0.0, 1.0, 2.0]])
    logvar = torch.tensor([[-200.0, -200.0, 170.0, -170.0]])
    z = torch.tensor([[[0.0, 1.0, 3.0, 2.0]]]).requires_grad_()
    each = [
        _native.eager.log_ratio(LogRatio(z[..., d : d + 1], mu[:, d : d + 1], logvar[:, d : d + 1], None, None, False))
        for d in range(4)
    ]
    assert [float(e.detach()) for e in each] == [-100.0, math.inf, 85.0, -85.0]


def bound_of(log_weights: Tensor, reduction: str) -> Tensor:
    losses = math.log(len(log_weights)) - torch.logsumexp(log_weights, 0)
    return {"per_sample": losses, "batchmean": losses.sum() / len(losses), "sum": losses.sum()}[reduction]


def compare_bound(ratio: Tensor, params: list[Tensor], target: Tensor, likelihood: str = "bernoulli",
                  reduction: str = "batchmean", weight: Tensor | None = None, most: float = 2e-6) -> None:  # fmt: skip
    of = Reconstruction(params, target.expand(len(ratio), *target.shape), weight, vaefast.Likelihood(likelihood), False)
    loss, log_w = _native.eager.bound(ratio, of, reduction)
    assert not log_w.requires_grad and log_w.dtype == loss.dtype
    wides = [leaf(t) for t in (ratio, *params)]
    nll = LIKELIHOODS[likelihood].nll(target.double(), *wides[1:], **LIKELIHOODS[likelihood].options)
    nll = nll if weight is None else weight.double() * nll
    exact_w = wides[0] - nll.flatten(2).sum(2)
    exact = bound_of(exact_w, reduction)
    close(log_w, exact_w.detach(), most)
    close(loss, exact, most)
    g = torch.randn(exact.shape, generator=generator(9))
    expected = torch.autograd.grad(exact, wides, g.double())
    for f, t, like in zip(torch.autograd.grad(loss, (ratio, *params), g.to(loss.dtype), retain_graph=True), expected,
                          (ratio, *params), strict=True):  # fmt: skip
        assert f.dtype == like.dtype
        close(f, t, digits(like.dtype, most))
    # once more, into the kept gradients themselves
    for f, t, like in zip(torch.autograd.grad(loss, (ratio, *params), g.to(loss.dtype)), expected, (ratio, *params)):
        close(f, t, digits(like.dtype, most))


@pytest.mark.parametrize("reduction", ["per_sample", "batchmean", "sum"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (2, 40, 33), (50, 2, 784), (3, 1, 5000), (7, 64, 2)])
def test_any_shape(shape: tuple[int, int, int], reduction: str) -> None:
    k, b, x = shape
    recon, target = drawn(k, b, x, seed=0, scale=2.0), torch.rand(b, x, generator=generator(1))
    compare_bound(drawn(k, b, seed=2), [recon], target, reduction=reduction)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("of_ratio", [torch.float32, WIDE], ids=str)
def test_dtypes(dtype: torch.dtype, of_ratio: torch.dtype) -> None:
    recon, target = drawn(4, 6, 19, seed=0, dtype=dtype), torch.rand(6, 19, generator=generator(1)).to(dtype)
    compare_bound(drawn(4, 6, seed=2, dtype=of_ratio), [recon], target, most=1e-13 if dtype == WIDE else 2e-6)


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.float16])
def test_parameters_that_are_broadcast_and_weights(target_dtype: torch.dtype) -> None:
    mean, target = drawn(4, 6, 19, seed=0), torch.rand(6, 19, generator=generator(1)).to(target_dtype)
    weight = torch.rand(6, 19, generator=generator(3))
    for logvar in (drawn(4, 6, 19, seed=1), drawn(19, seed=1), drawn(1, seed=1)):
        compare_bound(drawn(4, 6, seed=2), [mean, logvar], target, "gaussian", weight=weight)


def test_a_recon_that_is_a_view() -> None:
    target = torch.rand(6, 19, generator=generator(1))
    for recon in (drawn(19, 6, 4, seed=0).permute(2, 1, 0), drawn(4, 6, 38, seed=0)[..., ::2]):
        recon.retain_grad()
        compare_bound(drawn(4, 6, seed=2), [recon], target)


@pytest.mark.parametrize("samples", [0, 3])
def test_no_samples_and_no_elements(samples: int) -> None:
    recon, ratio = drawn(4, samples, 0, seed=0), drawn(4, samples, seed=1)
    target = torch.empty(samples, 0)
    of = Reconstruction([recon], target.expand(4, samples, 0), None, vaefast.Likelihood("bernoulli"), False)
    for reduction in ("per_sample", "batchmean", "sum"):
        loss, _ = _native.eager.bound(ratio, of, reduction)
        wide = leaf(ratio)
        exact = bound_of(wide, reduction)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6, equal_nan=True)
        (g,) = torch.autograd.grad(loss.sum(), ratio)
        torch.testing.assert_close(g.double(), torch.autograd.grad(exact.sum(), wide)[0], rtol=1e-6, atol=1e-6)


def test_weights_that_no_exponential_holds() -> None:
    """Log weights around -5000, one draw that has all, and impossible ones."""
    recon, target = drawn(4, 3, 9, seed=0), torch.rand(3, 9, generator=generator(1))
    far = torch.tensor([[-5000.0], [-5003.0], [3000.0], [3000.0]]).expand(4, 3).clone()
    far[:, 1] = torch.tensor([0.0, -math.inf, 1.0, -math.inf])
    far[:, 2] = -5000.0
    compare_bound(far.requires_grad_(), [recon], target, reduction="per_sample")
    of = Reconstruction([recon], target.expand(4, 3, 9), None, vaefast.Likelihood("bernoulli"), False)
    loss, log_w = _native.eager.bound(torch.full((4, 3), -math.inf), of, "per_sample")
    assert (loss == math.inf).all() and (log_w == -math.inf).all()
    loss, _ = _native.eager.bound(torch.full((4, 3), math.nan), of, "per_sample")
    assert loss.isnan().all()


def test_any_number_of_threads(set_threads: Callable[[int], None]) -> None:
    z, mu, logvar = drawn(40, 30, 50, seed=0), drawn(30, 50, seed=1), drawn(30, 50, seed=2)
    recon, x = drawn(40, 30, 784, seed=3), torch.rand(30, 784, generator=generator(4))

    def run() -> list[Tensor]:
        found = []
        for n in (30, 3):
            given = z[:, :n], mu[:n], logvar[:n]
            loss = vaefast.bounds.iwae_loss(recon[:, :n], x[:n], *given)
            found += [loss, *torch.autograd.grad(loss, (z, mu, logvar, recon))]
        return found

    assert_same_bits(run, set_threads)


def test_the_gradient_can_be_differentiated() -> None:
    z, mu, logvar = (drawn(*s, seed=n, dtype=WIDE) for n, s in enumerate([(3, 2, 4), (2, 4), (2, 4)]))
    pm, plv, recon = (drawn(*s, seed=n, dtype=WIDE) for n, s in enumerate([(4,), (2, 4), (3, 2, 5)], 5))
    x = torch.rand(2, 5, generator=generator(8), dtype=WIDE)

    def loss(*given: Tensor) -> Tensor:
        *latents, recon = given
        return vaefast.bounds.iwae_loss(recon, x, *latents, reduction="per_sample")

    given = (z, mu, logvar, pm, plv, recon)
    assert torch.autograd.gradcheck(loss, given)
    assert torch.autograd.gradgradcheck(loss, given)


def test_a_batch_of_gradients() -> None:
    ratio, recon, x = drawn(3, 4, seed=0), drawn(3, 4, 5, seed=1), torch.rand(4, 5, generator=generator(2))
    of = Reconstruction([recon], x.expand(3, 4, 5), None, vaefast.Likelihood("bernoulli"), False)
    loss, _ = _native.eager.bound(ratio, of, "per_sample")
    found = torch.autograd.grad(loss, (ratio, recon), torch.eye(4), is_grads_batched=True, retain_graph=True)
    for k in range(4):
        for f, t in zip(found, torch.autograd.grad(loss, (ratio, recon), torch.eye(4)[k], retain_graph=True)):
            torch.testing.assert_close(f[k], t)


def test_wrong_calls() -> None:
    ops, z, q = torch.ops.vaefast, torch.randn(3, 2, 4), torch.randn(2, 4)
    with pytest.raises(ValueError, match="draws of shape"):
        ops.log_ratio(z, q[:1], q, None, 0.0, None, 0.0, True)
    with pytest.raises(ValueError, match="not asked for"):
        ops.log_ratio(z, q, q, q, 0.0, None, 0.0, False)
    with pytest.raises(ValueError, match="mask"):
        ops.log_ratio_backward(torch.randn(3, 2), z, q, q, None, 0.0, None, 0.0, True, [1, 1, 1, 1, 0])
    with pytest.raises(ValueError, match="a gradient of shape"):
        ops.log_ratio_backward(torch.randn(2), z, q, q, None, 0.0, None, 0.0, True, [1, 1, 1, 0, 0])
    recon = torch.randn(3, 2, 5)
    with pytest.raises(ValueError, match="ratios of shape"):
        ops.bound(torch.randn(3), [recon], recon, None, "bernoulli", [], "sum")
    with pytest.raises(ValueError, match="reduced to"):
        ops.bound(torch.randn(3, 2), [recon], recon, None, "bernoulli", [], "none")
    with pytest.raises(ValueError, match="float32 or float64"):
        ops.bound(torch.randn(3, 2).half(), [recon], recon, None, "bernoulli", [], "sum")
    with pytest.raises(ValueError, match="mask"):
        ops.bound_forward(torch.randn(3, 2), [recon], recon, None, "bernoulli", [], 3, [1])
    with pytest.raises(ValueError, match="keeps no such"):
        ops.bound_forward(torch.randn(3, 2), [recon.half()], recon, None, "bernoulli", [], 3, [1, 1])
