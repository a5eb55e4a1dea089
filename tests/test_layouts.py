"""Any shape and any strides: views, transposes, channels last, broadcasts, empty, odd sizes, many dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import (
    ELBO_REDUCTIONS,
    LIKELIHOOD_CASES,
    REDUCTIONS,
    assert_within,
    generator,
    gradients,
    posterior,
    prior_for,
    sensitivity,
    training,
)
from torch import Tensor

import vaefast

Layout = Callable[[Tensor], Tensor]


def as_strided_with_gaps(t: Tensor) -> Tensor:
    """Rows padded to odd lengths, a storage offset, nothing aligned."""
    padded = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan"), dtype=t.dtype, device=t.device).flatten()[
        3:
    ]
    strides, step = [2], 2 * t.shape[-1] + 3
    for n in reversed(t.shape[1:-1]):
        strides.insert(0, step)
        step *= n
    view = padded.as_strided(t.shape, [step, *strides], 3)
    return view.copy_(t)


def on_channels(f: Layout) -> Layout:
    """Only 4-d tensors have a channels-last form."""
    return lambda t: f(t) if t.dim() == 4 else t


# each returns the same values lying elsewhere
LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda t: t.contiguous(),
    "chunk": lambda t: torch.cat((t, t + 1), 1).chunk(2, 1)[0],
    "second chunk": lambda t: torch.cat((t + 1, t), 1).chunk(2, 1)[1],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "channels last": on_channels(lambda t: t.contiguous(memory_format=torch.channels_last)),
    "channels last chunk": on_channels(
        lambda t: torch.cat((t, t + 1), 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[0]
    ),
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "gaps": as_strided_with_gaps,
    "offset": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape),
    "stacked": lambda t: torch.stack((t, t + 1), -1)[..., 0],
}


def check_posterior(inputs: list[Tensor], priors: list[Any], reduction: str, device: str) -> None:
    """Native on views against the reference in float64 on plain copies: z, KL, every gradient."""
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in [*inputs, *priors]]
    wide = [t.detach().double().cpu().contiguous().requires_grad_() if isinstance(t, Tensor) else t for t in leaves]
    eps = torch.tensor(0.7, device=device)
    z, kl = vaefast.sample_with_kl(*leaves, reduction=reduction, eps=eps)
    exact_z, exact_kl = vaefast.reference.sample_with_kl(*wide, reduction=reduction, eps=eps.double().cpu())
    assert z.stride() == torch.empty_like(inputs[0]).stride()
    assert_within(z, exact_z, 1e-6, "z")
    assert_within(kl, exact_kl, 2e-6, "kl")
    numbers = [t for t in leaves if isinstance(t, Tensor)]
    exact = gradients([exact_z, exact_kl], [t for t in wide if isinstance(t, Tensor)])
    for leaf, a, e in zip(numbers, gradients([z, kl], numbers), exact):
        assert a.shape == leaf.shape
        # where a prior broadcasts, its gradient sums as many terms as numel says
        assert_within(a, e, 2e-6 * max(1, (z.numel() // max(1, leaf.numel())) ** 0.5), "gradient")


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("other", ["contiguous", "chunk", "transposed", "gaps"])
@pytest.mark.parametrize("shape", [(6, 10), (4, 6, 10), (2, 4, 6, 10), (3, 2, 2, 5, 7)], ids=str)
def test_views(native: str, layout: str, other: str, shape: tuple[int, ...]) -> None:
    """mu and raw lie each in a way of its own."""
    p = posterior(shape, device=native)
    for reduction in ("none", "per_sample", "batchmean"):
        check_posterior([LAYOUTS[layout](p.mu), LAYOUTS[other](p.raw)], [None, None], reduction, native)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
@pytest.mark.parametrize("shape", [(6, 10), (2, 4, 6, 10)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reconstruction_views(
    native: str, layout: str, likelihood: str, count: int, shape: tuple[int, ...], reduction: str
) -> None:
    """The first parameter in one layout, the target and weight in others."""
    data = training(likelihood, count, shape)
    weight = torch.rand(shape, generator=generator(1)) * (torch.rand(shape, generator=generator(2)) > 0.2)
    recon = [LAYOUTS[layout](p.to(native)).detach().requires_grad_() for p in data.recon]
    wide = [p.double().requires_grad_() for p in data.recon]
    target = LAYOUTS["transposed"](data.target.to(native))
    mask = LAYOUTS["gaps"](weight.to(native))
    options: dict[str, Any] = {"likelihood": likelihood, "reduction": reduction}
    actual = vaefast.reconstruction_loss(recon, target, weight=mask, **options)
    exact = vaefast.reference.reconstruction_loss(wide, data.target.double(), weight=weight.double(), **options)
    assert_within(actual, exact, 2e-6)
    for a, e in zip(gradients(actual, recon), gradients(exact, wide)):
        assert_within(a, e, 2e-6)


def test_chunk_gives_its_gradient_back(native: str) -> None:
    """moments.chunk(2, 1), the normal case: z is contiguous and the gradient of the moments is whole."""
    moments = torch.randn(8, 64, generator=generator(0)).to(native).requires_grad_()
    z, kl = vaefast.sample_with_kl(*moments.chunk(2, 1), eps=torch.tensor(0.7, device=native))
    assert z.is_contiguous()
    (z.square().sum() + kl).backward()
    wide = moments.detach().double().cpu().requires_grad_()
    z, kl = vaefast.reference.sample_with_kl(*wide.chunk(2, 1), eps=torch.tensor(0.7))
    (z.square().sum() + kl).backward()
    assert_within(moments.grad, wide.grad, 2e-6)


@pytest.mark.parametrize("dims", list(itertools.product([0, 1], repeat=3)), ids=str)
@pytest.mark.parametrize("reduction", ["none", "per_sample", "batchmean"])
def test_expanded_inputs(native: str, dims: tuple[int, ...], reduction: str) -> None:
    """Stride 0, where autograd hands over an expanded tensor itself."""
    shape = tuple(1 if d else n for d, n in zip(dims, (4, 3, 5)))
    p = posterior(shape, device=native)
    check_posterior([p.mu.expand(4, 3, 5), p.raw.expand(4, 3, 5)], [None, None], reduction, native)


def test_expanded_leaves_sum_their_gradients(backend: str, device: str) -> None:
    raw = torch.zeros(1, 5, device=device, requires_grad=True)
    mu = torch.ones(4, 5, device=device)
    vaefast.gaussian_kl(mu, (raw + 1).expand(4, 5), reduction="sum").backward()
    assert_within(raw.grad, torch.full((1, 5), 4 * 0.5 * (2.718281828459045 - 1), dtype=torch.float64), 1e-6)


def test_overlapping_windows(native: str) -> None:
    """as_strided windows that share memory are read like any other tensor."""
    base = torch.randn(40, generator=generator(0)).to(native)
    mu, raw = base.as_strided((5, 8), (3, 1)), base.as_strided((5, 8), (1, 2), 4)
    check_posterior([mu, raw], [None, None], "batchmean", native)


def test_conjugate_and_negative_views(backend: str, device: str) -> None:
    """The imaginary part of a conjugate is a view with a lazy minus sign."""
    lazy = torch.complex(torch.ones(3, 4), torch.randn(3, 4, generator=generator(0))).to(device).conj().imag
    assert lazy.is_neg()
    plain = lazy.resolve_neg().clone()
    assert torch.equal(vaefast.gaussian_kl(plain, lazy), vaefast.gaussian_kl(plain, plain))
    assert torch.equal(vaefast.reconstruction_loss(lazy, plain * 0), vaefast.reconstruction_loss(plain, plain * 0))


SIZES = [1, 3, 5, 7, 15, 17, 31, 33, 63, 65, 1023, 1025, 8191, 8193]


@pytest.mark.isa
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 3])
def test_odd_sizes(native: str, size: int, rows: int) -> None:
    """Around the vectors, tiles and units into which kernels cut their work."""
    p = posterior((rows, size), prior="full", device=native)
    for reduction in ("none", "per_sample", "batchmean"):
        check_posterior([p.mu, p.raw], [None, None], reduction, native)
        check_posterior([p.mu.t().contiguous().t(), p.raw], list(p.prior), reduction, native)
    for name, count in LIKELIHOOD_CASES:
        data = training(name, count, (rows, size)).to(native)
        leaf, wide = data.leaves(), data.to("cpu").to(torch.float64).leaves()
        actual = vaefast.reconstruction_loss(leaf.recon, leaf.target, likelihood=name, reduction="per_sample")
        exact = vaefast.reference.reconstruction_loss(wide.recon, wide.target, likelihood=name, reduction="per_sample")
        assert_within(actual, exact, 2e-6)
        slack: list[Tensor | float] = [0.0] * count
        # where a small concentration's 1 / a meets a datum as far above its mean, they cancel, as a mixture's nlls do
        if name in ("gamma", "zero_inflated_gamma", "zero_inflated_log_normal", "negative_binomial_mixture"):
            slack = [16 * moved for moved in sensitivity(name, data.to("cpu"))[1:]]
        for a, e, s in zip(gradients(actual, leaf.recon), gradients(exact, wide.recon), slack):
            assert_within(a, e, 2e-6, slack=s)


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_read_or_written_outside(native: str, size: int) -> None:
    """Views in the middle of NaNs: a neighbour that was read would show, one that was written as well."""
    buffers = [torch.full((3, size + 64), float("nan"), device=native) for _ in range(3)]
    mu, raw, x = (b[:, 32 : 32 + size] for b in buffers)
    for t, seed in ((mu, 1), (raw, 2), (x, 3)):
        t.copy_(torch.rand(3, size, generator=generator(seed)))
    check_posterior([mu, raw], [raw, mu], "per_sample", native)
    assert vaefast.reconstruction_loss((mu, raw), x, likelihood="gaussian").isfinite()
    for b in buffers:
        assert b[:, :32].isnan().all()
        assert b[:, 32 + size :].isnan().all()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(backend: str, device: str, shape: tuple[int, ...], reduction: str) -> None:
    """A sum over nothing is 0 and a mean over nothing NaN, as in PyTorch; gradients are empty."""
    mu, raw = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(2))
    z, kl = vaefast.sample_with_kl(mu, raw, reduction=reduction)
    nll = vaefast.reconstruction_loss(
        (mu, raw), torch.zeros(shape, device=device), likelihood="gaussian", reduction=reduction
    )
    assert z.shape == shape
    for value in (kl, nll):
        if reduction == "none":
            assert value.shape == shape
        elif reduction == "per_sample":
            assert torch.equal(value, torch.zeros(shape[0], device=device))
        else:
            nan = reduction == "mean" or (reduction == "batchmean" and shape[0] == 0)
            assert value.shape == ()
            assert value.isnan() if nan else value == 0
        grads = torch.autograd.grad(value.sum() + z.sum(), (mu, raw), allow_unused=True, retain_graph=True)
        assert all(g is None or g.shape == shape for g in grads)


@pytest.mark.parametrize("reduction", ELBO_REDUCTIONS)
def test_empty_elbo(backend: str, device: str, reduction: str) -> None:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, requires_grad=True)

    terms = vaefast.elbo_terms(
        zeros(0, 7), torch.zeros(0, 7, device=device), zeros(0, 3), zeros(0, 3), reduction=reduction
    )
    for t in terms:
        assert t.shape == ((0,) if reduction == "per_sample" else ())
    no_latents = vaefast.elbo_terms(
        zeros(2, 7), torch.zeros(2, 7, device=device), zeros(2, 0), zeros(2, 0), reduction=reduction
    )
    assert torch.equal(no_latents.loss, no_latents.reconstruction)
    assert (no_latents.kl == 0).all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_zero_dimensional(native: str, reduction: str) -> None:
    p = posterior((), device=native)
    check_posterior([p.mu, p.raw], [0.5, 0.25], reduction, native)
    data = training("gaussian", 2, ()).to(native)
    leaf, wide = data.leaves(), data.to("cpu").to(torch.float64).leaves()
    options: dict[str, Any] = {"likelihood": "gaussian", "reduction": reduction}
    actual = vaefast.reconstruction_loss(leaf.recon, leaf.target, **options)
    exact = vaefast.reference.reconstruction_loss(wide.recon, wide.target, **options)
    assert_within(actual, exact, 2e-6)
    for a, e in zip(gradients(actual, leaf.recon), gradients(exact, wide.recon)):
        assert_within(a, e, 2e-6)


@pytest.mark.parametrize("prior", ["none", "float", "full", "broadcast", "scalar"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5), (2, 1, 3, 1, 2)], ids=str)
def test_priors_broadcast(native: str, prior: str, reduction: str, shape: tuple[int, ...]) -> None:
    p = posterior(shape, device=native)
    check_posterior([p.mu, p.raw], list(prior_for(prior, shape, device=native)), reduction, native)


@pytest.mark.parametrize("reversed_dims", [False, True])
@pytest.mark.parametrize("dims", [8, 9, 12])
def test_many_dimensions(backend: str, device: str, dims: int, reversed_dims: bool) -> None:
    """More dimensions than kernels walk, and none that merge: the fallback takes what they do not."""
    with vaefast.use_backend("auto" if backend == "native" else backend):
        p = posterior((2,) * dims, device=device)
        raw = p.raw.permute(*reversed(range(dims))) if reversed_dims else p.raw
        for reduction in ("none", "per_sample", "sum"):
            check_posterior([p.mu, raw], [None, None], reduction, device)
        recon = raw.detach().requires_grad_()
        loss = vaefast.reconstruction_loss(recon, p.mu, likelihood="gaussian")
        (gradient,) = torch.autograd.grad(loss, recon)
        assert_within(gradient, (raw.double() - p.mu.double()) / 2, 2e-6)
        loss = vaefast.elbo_loss(recon, p.mu, p.mu, raw, likelihood="gaussian")
        assert loss.isfinite()


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Layout], tuple[int, ...], str, bool]:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=6)))
    layouts = []
    for _ in range(2):
        order = draw(st.permutations(range(len(shape))))
        steps = draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
        offset = draw(st.integers(0, 3))
        layouts.append(lambda t, order=order, steps=steps, offset=offset: strided(t, order, steps, offset))
    small = tuple(draw(st.sampled_from([1, n])) for n in shape)[draw(st.integers(0, len(shape))) :]
    return shape, layouts, small, draw(st.sampled_from(REDUCTIONS)), draw(st.booleans())


def strided(t: Tensor, order: list[int], steps: list[int], offset: int) -> Tensor:
    """t's values in memory laid out by order, with gaps of steps, from offset."""
    inverse = [order.index(d) for d in range(t.dim())]
    sizes = [t.shape[d] * steps[d] for d in order]
    room = torch.full((offset + torch.Size(sizes).numel(),), float("nan"), dtype=t.dtype)[offset:].view(sizes)
    view = room.permute(inverse)[tuple(slice(None, None, s) for s in steps)]
    return view.copy_(t)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(views())
def test_random_views(extension: object, case: tuple[Any, ...]) -> None:
    shape, layouts, small, reduction, with_prior = case
    p = posterior(shape)
    mu, raw = (layout(t) for layout, t in zip(layouts, (p.mu, p.raw)))
    prior = [torch.randn(small, generator=generator(k)) if with_prior else None for k in (3, 4)]
    with vaefast.use_backend("native"):
        check_posterior([mu, raw], prior, reduction, "cpu")
        options: dict[str, Any] = {"likelihood": "gaussian", "reduction": reduction, "weight": prior[0]}
        second = torch.zeros(small).requires_grad_()
        leaf = raw.detach().requires_grad_()
        actual = vaefast.reconstruction_loss((leaf, second), mu, **options)
    wide = [leaf.detach().double().requires_grad_(), second.detach().double().requires_grad_()]
    exact = vaefast.reference.reconstruction_loss(wide, mu.double(), **options)
    assert_within(actual, exact, 5e-6)
    for w, a, e in zip(wide, gradients(actual, (leaf, second)), gradients(exact, wide)):
        assert_within(a, e, 5e-6 * max(1, (leaf.numel() // w.numel()) ** 0.5))
