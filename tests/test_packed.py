"""DiagonalGaussian: mean and log variance in one tensor, against torch.distributions, against the plain functions on
its halves, and against the class of diffusers that it stands for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import FLOATING, REDUCTIONS, assert_within, generator, gradients
from test_memory import SMALL, Work, kept_bytes
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vaefast
from vaefast import DiagonalGaussian, Parameterization, _gaussian
from vaefast._philox import normal, take_counters

CLAMP = (-1.0, 1.0)  # some of a standard normal's values lie outside
SHAPE = (3, 8, 5, 6)


def moments_of(
    shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(device, dtype).requires_grad_()


def assert_same(a: Tensor | None, e: Tensor | None, tolerance: float) -> None:
    """Gradients, which are None where an input has no part."""
    assert (a is None) == (e is None)
    if a is not None and e is not None:
        assert_within(a, e, tolerance)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape),
    "batch of one row": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("dim", [1, -1, 0, 2, -4])
@pytest.mark.parametrize("clamp", [CLAMP, (-30.0, 20.0), None])
def test_against_distributions(backend: str, device: str, dim: int, clamp: tuple[float, float] | None) -> None:
    """In float64: attributes, KLs and densities, and their gradients where nothing is clamped."""
    moments, other = (moments_of((4, 8, 6, 6), torch.float64, device, seed) for seed in (0, 1))
    q, p = (DiagonalGaussian(m, dim=dim, clamp=clamp) for m in (moments, other))

    def exact(m: Tensor) -> Normal:
        mean, raw = m.chunk(2, dim)
        return Normal(mean, torch.exp(0.5 * (raw if clamp is None else raw.clamp(*clamp))))

    mean, std = exact(moments).mean, exact(moments).stddev
    for got, true in ((q.mean, mean), (q.logvar, 2 * std.log()), (q.std, std), (q.var, std**2)):
        assert_within(got, true, 1e-14)
    assert q.parameters is moments and torch.equal(q.mode(), mean)

    x = torch.randn(mean.shape, generator=generator(3), dtype=torch.float64).to(device)
    unit = Normal(torch.zeros_like(x), torch.ones_like(x))
    pairs: list[tuple[Tensor, Tensor]] = [
        (q.kl(), kl_divergence(exact(moments), unit)),
        (q.kl(p), kl_divergence(exact(moments), exact(other))),
        (q.nll(x), -exact(moments).log_prob(x)),
    ]
    for got, elementwise in pairs:
        true = elementwise.flatten(1).sum(1)
        assert got.shape == mean.shape[:1] and got.dtype == torch.float64
        assert_within(got, true, 1e-12)
        for a, e in zip(gradients(got, [moments, other]), gradients(true, [moments, other])):
            assert_same(a, e, 1e-12)
    for dims in ([1, 2, 3], [1], [-1, 0]):
        assert_within(q.nll(x, dims), pairs[2][1].sum(dims), 1e-12)
    assert_within(q.kl(reduction="none"), pairs[0][1], 1e-12)
    assert_within(q.kl(p, reduction="none"), pairs[1][1], 1e-12)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", FLOATING)
def test_equals_the_plain_functions_on_its_halves(native: str, dtype: torch.dtype, layout: str) -> None:
    """Bit for bit, values and gradients, with the same seed; the gradient lies as moments do."""
    moments, other = (LAYOUTS[layout](moments_of(SHAPE, dtype, native, k).detach()).requires_grad_() for k in (0, 1))
    clamped, tight = Parameterization(clamp=CLAMP), Parameterization(clamp=(-0.5, 0.5))
    q, p = DiagonalGaussian(moments, clamp=clamped.clamp), DiagonalGaussian(other, clamp=tight.clamp)

    def prior() -> tuple[Tensor, Tensor]:
        mean, raw = other.chunk(2, 1)
        return mean, _gaussian.clamped(raw, -0.5, 0.5)

    def plain(f: Callable[..., Any], **options: Any) -> Any:
        return f(*moments.chunk(2, 1), **options, parameterization=clamped)

    def plain_with_prior(f: Callable[..., Any], **options: Any) -> Any:
        return f(*moments.chunk(2, 1), *prior(), **options, parameterization=clamped)

    cases: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
        (q.sample, lambda: plain(vaefast.reparameterize)),
        (q.kl, lambda: plain(vaefast.gaussian_kl, reduction="per_sample")),
        (q.sample_with_kl, lambda: plain(vaefast.sample_with_kl, reduction="per_sample")),
        (lambda: q.kl(p), lambda: plain_with_prior(vaefast.gaussian_kl, reduction="per_sample")),
        (
            lambda: q.sample_with_kl(p, reduction="mean"),
            lambda: plain_with_prior(vaefast.sample_with_kl, reduction="mean"),
        ),
    ]
    for ours, theirs in cases:
        results = []
        for f in (ours, theirs):
            torch.manual_seed(7)
            out = f()
            out = [out] if isinstance(out, Tensor) else list(out)
            results.append((out, gradients(out, [moments, other])))
        for a, b in zip(*(r[0] for r in results)):
            assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
        for a, b in zip(*(r[1] for r in results)):
            assert (a is None) == (b is None)
            if a is not None:
                assert torch.equal(a, b) and a.dtype == dtype
                assert a.stride() == torch.empty_like(moments).stride()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_prior", [False, True])
def test_every_reduction(native: str, reduction: str, with_prior: bool) -> None:
    """The kernels against the reference on plain halves with the same Philox noise, for every reduction."""
    moments, other = moments_of(device=native), moments_of(device=native, seed=1)
    q, p = DiagonalGaussian(moments, clamp=CLAMP), DiagonalGaussian(other, clamp=(-0.5, 2.0)) if with_prior else None
    torch.manual_seed(2)
    z, kl = q.sample_with_kl(p, reduction=reduction)
    assert_within(kl, q.kl(p, reduction=reduction), 1e-6)
    found = [[z, kl, *(g for g in gradients([z, kl], [moments, other]) if g is not None)]]
    mu, raw = moments.chunk(2, 1)
    prior_mu, prior_raw = other.chunk(2, 1) if with_prior else (None, None)
    if prior_raw is not None:
        prior_raw = _gaussian.clamped(prior_raw, -0.5, 2.0)
    torch.manual_seed(2)
    z, kl = vaefast.reference.sample_with_kl(
        mu, raw, prior_mu, prior_raw, parameterization=Parameterization("logvar", clamp=CLAMP),
        reduction=reduction, eps=normal(take_counters(mu, mu.numel()), mu, torch.float32),
    )  # fmt: skip
    found.append([z, kl, *(g for g in gradients([z, kl], [moments, other]) if g is not None)])
    assert len(found[0]) == len(found[1]) == 3 + with_prior
    for a, b in zip(*found):
        assert_within(a, b, 2e-5)


def test_no_gradient_outside_the_clamp_or_on_its_edges(backend: str, device: str) -> None:
    raw = torch.tensor([-31.0, -30.0, -29.0, 0.0, 19.0, 20.0, 21.0, math.inf], device=device)
    moments = torch.cat((torch.ones_like(raw), raw)).view(1, 16).requires_grad_()
    other = moments.detach().clone().requires_grad_()
    inside = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0], dtype=torch.bool, device=device)
    q, p = DiagonalGaussian(moments), DiagonalGaussian(other)
    (dq,) = gradients(q.kl(), [moments])
    assert torch.equal(dq[0, 8:] != 0, inside & (raw != 0))  # at 0 the KL has its minimum
    base = DiagonalGaussian((moments.detach() * 0).requires_grad_())
    (dp,) = gradients(base.kl(p), [other])
    assert torch.equal(dp[0, 8:] != 0, inside)
    for value in (q.sample().sum(), q.logvar.sum(), q.std.sum(), q.nll(torch.zeros(1, 8, device=device)).sum()):
        assert not gradients(value, [moments])[0][0, 8:][~inside].any()


def test_deterministic_is_a_point_mass(backend: str, device: str) -> None:
    moments = moments_of(device=device)
    q = DiagonalGaussian(moments, deterministic=True)
    assert torch.equal(q.sample(), q.mean) and torch.equal(q.mode(), q.mean)
    assert not q.std.any() and not q.var.any() and q.std.shape == q.mean.shape
    z, kl = q.sample_with_kl()
    assert torch.equal(z, q.mean) and torch.equal(kl, torch.zeros(3, device=device))
    assert torch.equal(q.kl(), kl) and torch.equal(q.nll(z), kl) and q.nll(z, [1, 2, 3]).shape == (3,)
    assert q.kl(reduction="batchmean").item() == 0.0 and q.kl(reduction="none").shape == q.mean.shape
    (g,) = torch.autograd.grad(z.sum(), moments)
    assert torch.equal(g, torch.cat((torch.ones_like(z), torch.zeros_like(z)), 1))


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (4, 0, 3), (2, 4, 0), (2, 2), (6,)])
def test_empty_and_small(backend: str, device: str, shape: tuple[int, ...]) -> None:
    moments = moments_of(shape, device=device)
    dim = min(1, len(shape) - 1)
    z, kl = DiagonalGaussian(moments, dim=dim).sample_with_kl()
    (mu, raw) = moments.chunk(2, dim) if moments.shape[dim] else (moments, moments)
    assert z.shape == mu.shape
    assert_within(kl, vaefast.gaussian_kl(mu, raw, reduction="per_sample"), 1e-6)
    (g,) = torch.autograd.grad(z.sum() + kl.sum(), moments)
    assert g.shape == moments.shape and g.isfinite().all()


def test_seeds_and_generators(backend: str, device: str) -> None:
    q = DiagonalGaussian(moments_of(device=device))
    torch.manual_seed(5)
    first = q.sample()
    assert not torch.equal(first, q.sample())
    torch.manual_seed(5)
    assert torch.equal(first, q.sample())
    own = [q.sample(generator=generator(3, device)) for _ in range(2)]
    assert torch.equal(*own) and not torch.equal(own[0], first)
    z, _ = q.sample_with_kl(generator=generator(3, device))
    assert torch.equal(z, own[0])


def test_a_generator_of_another_device(native: str) -> None:
    """As diffusers' pipelines pass one: a seed from the CPU, for moments that need not be there."""
    z = DiagonalGaussian(torch.zeros(2, 4, 3, device="meta")).sample(generator=generator(3))
    assert z.shape == (2, 2, 3) and z.is_meta
    moments = moments_of(device=native)
    z = DiagonalGaussian(moments).sample(generator=generator(3))
    expected = DiagonalGaussian(moments.cpu()).sample(generator=generator(3))
    assert_within(z, expected, 1e-5)


def test_partial_and_repeated_backward(native: str) -> None:
    """Only what is asked for is computed; a retained graph gives the same again; no_grad makes none."""
    moments, other = moments_of(device=native), moments_of(device=native, seed=1)
    q, p = DiagonalGaussian(moments), DiagonalGaussian(other)
    z, kl = q.sample_with_kl(p)
    loss = (z**2).sum() + kl.sum()
    first = torch.autograd.grad(loss, [moments, other], retain_graph=True)
    again = torch.autograd.grad(loss, [moments, other], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert torch.equal(torch.autograd.grad(loss, other, retain_graph=True)[0], first[1])
    (of_z,) = torch.autograd.grad(z.sum(), moments, retain_graph=True)
    assert torch.equal(of_z[:, :4], torch.ones_like(z))
    assert not torch.autograd.grad(z.sum(), other, retain_graph=True)[0].any()
    (of_kl,) = torch.autograd.grad(kl.sum(), moments)
    assert torch.equal(of_kl, torch.autograd.grad(q.kl(p).sum(), moments)[0])
    with torch.no_grad():
        assert not q.sample().requires_grad and not q.kl(p).requires_grad
    fixed = DiagonalGaussian(moments.detach())
    (only,) = torch.autograd.grad(fixed.kl(p).sum(), other)
    assert torch.equal(only, torch.autograd.grad(q.kl(p).sum(), other)[0])


def test_gradcheck(native: str) -> None:
    moments, other = (moments_of((2, 4, 3), torch.float64, native, k) for k in (0, 1))

    x = torch.randn(2, 2, 3, generator=generator(2), dtype=torch.float64).to(native)

    def f(moments: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        q, p = DiagonalGaussian(moments, clamp=(-1.0, 2.0)), DiagonalGaussian(other, clamp=(-2.0, 1.0))
        torch.manual_seed(0)
        z, kl = q.sample_with_kl(p)
        return z, kl, q.kl(), q.nll(x)

    assert torch.autograd.gradcheck(f, (moments, other))
    assert torch.autograd.gradgradcheck(f, (moments, other))


def test_torch_func_and_checkpointing(device: str) -> None:
    moments = moments_of(device=device)
    per_sample = vmap(grad(lambda m: DiagonalGaussian(m, dim=0).kl(reduction="sum")))(moments)
    (expected,) = torch.autograd.grad(DiagonalGaussian(moments).kl().sum(), moments)
    assert_within(per_sample, expected, 1e-5)

    def f(m: Tensor) -> Tensor:
        z, kl = DiagonalGaussian(m).sample_with_kl()
        return z.exp().sum() + kl.sum()

    both = []
    for run in (f, lambda m: checkpoint(f, m, use_reentrant=False)):
        torch.manual_seed(1)
        both.append(torch.autograd.grad(run(moments), moments)[0])
    assert torch.equal(*both)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(native: str, compiler: str) -> None:
    torch._dynamo.reset()

    def f(moments: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        q, p = DiagonalGaussian(moments, clamp=(-1.0, 1.0)), DiagonalGaussian(other)
        z, kl = q.sample_with_kl()
        return z, q.sample(), kl, q.kl(p), q.nll(z.detach(), [1, 2, 3]), q.std

    compiled = torch.compile(f, fullgraph=True, backend=compiler)
    moments, other = moments_of(device=native), moments_of(device=native, seed=1)
    out = compiled(moments, other)
    assert not torch.equal(out[0], out[1])
    q, p = DiagonalGaussian(moments, clamp=(-1.0, 1.0)), DiagonalGaussian(other)
    true = [q.kl(), q.kl(p), q.nll(out[0].detach()), q.std]
    for a, e in zip(out[2:], true):
        assert_within(a, e, 2e-6)
    for a, e in zip(gradients(out[2:], [moments, other]), gradients(true, [moments, other])):
        assert_within(a, e, 2e-5)
    torch._dynamo.reset()


class Dispatched(TorchDispatchMode):
    """Names of the operators below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_operator_forward_one_backward_and_no_copy(extension: object, layout: str, dtype: torch.dtype) -> None:
    """No chunk, no concatenation, no copy: forward allocates z, backward one gradient; moments and 16 bytes stay."""
    moments = LAYOUTS[layout](moments_of((16, 8, 32, 32), dtype).detach()).requires_grad_()
    q = DiagonalGaussian(moments)
    upstream = torch.ones(16, 4, 32, 32, dtype=dtype), torch.ones(16)
    with vaefast.use_backend("native"):
        with Dispatched() as seen:
            z, kl = q.sample_with_kl()
        assert seen.names == ["vaefast::packed_forward"]
        with Dispatched() as seen:
            (g,) = torch.autograd.grad((z, kl), moments, upstream, retain_graph=True)
        assert [name for name in seen.names if name != "aten::detach"] == ["vaefast::packed_backward"]
    assert g.stride() == moments.stride()
    size = moments.numel() * moments.element_size()
    forward = Work(q.sample_with_kl)
    assert not forward.copies()
    assert size // 2 <= forward.allocated <= size // 2 + SMALL
    backward = Work(lambda: torch.autograd.grad(forward.result, moments, upstream, retain_graph=True))
    assert not backward.copies()
    assert size <= backward.allocated <= size + SMALL
    assert kept_bytes(q.sample_with_kl, [moments]) == 16
    other = moments.detach().clone().requires_grad_()
    assert kept_bytes(lambda: q.sample_with_kl(DiagonalGaussian(other)), [moments, other]) == 16


@pytest.mark.parametrize("clamp", [None, (-30.0, 20.0)])
def test_a_prior_is_packed_too(extension: object, clamp: tuple[float, float] | None) -> None:
    """Its gradient is one tensor; a clamp costs its log variance and a mask, which are not kept."""
    moments, other = moments_of((16, 8, 32, 32)), moments_of((16, 8, 32, 32), seed=1)
    q, p = DiagonalGaussian(moments), DiagonalGaussian(other, clamp=clamp)
    size = moments.numel() * moments.element_size()
    kl = Work(lambda: q.kl(p))
    backward = Work(lambda: torch.autograd.grad(kl.result, [moments, other], torch.ones(16), retain_graph=True))
    for work, floor in ((kl, 0), (backward, 2 * size)):
        assert clamp is not None or not work.copies()
        assert floor <= work.allocated <= floor + SMALL + (0 if clamp is None else size)


M = torch.zeros(2, 4, 3)
Q = DiagonalGaussian(M)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: DiagonalGaussian([1.0]), TypeError, "moments must be a torch.Tensor, got list"),
    (lambda: DiagonalGaussian(M.long()), TypeError, r"moments must be float.* got int64; convert it with"),
    (lambda: DiagonalGaussian(M, dim=3), ValueError, r"dim=3 is no dimension of moments, whose shape is \(2, 4, 3\)"),
    (lambda: DiagonalGaussian(M, dim=-4), ValueError, "dim=-4 is no dimension"),
    (lambda: DiagonalGaussian(M[0, 0, 0], dim=0), ValueError, "dim=0 is no dimension"),
    (lambda: DiagonalGaussian(M, dim=2), ValueError, "has 3 entries along dim=2; it takes an even number"),
    (lambda: DiagonalGaussian(M, dim=1.0), TypeError, "dim must be an int, got 1.0"),
    (lambda: DiagonalGaussian(M, True), TypeError, "dim must be an int, got True; deterministic goes by name"),
    (lambda: DiagonalGaussian(M, deterministic=1), TypeError, "deterministic must be True or False, got 1"),
    (lambda: DiagonalGaussian(M, clamp=(1.0, -1.0)), ValueError, "clamp must be .* with lo <= hi"),
    (lambda: DiagonalGaussian(M, clamp=3.0), TypeError, "clamp must be None or two numbers"),
    (lambda: Q.sample(generator=3), TypeError, "generator must be a torch.Generator, got int"),
    (lambda: Q.kl(M), TypeError, "other must be None or a DiagonalGaussian, got Tensor"),
    (lambda: Q.kl(DiagonalGaussian(M[:1])), ValueError, "other.parameters has shape"),
    (
        lambda: Q.kl(DiagonalGaussian(torch.zeros(2, 4, 4), dim=2)),
        ValueError,
        "packed along dim=2 but this one",
    ),
    (lambda: Q.kl(DiagonalGaussian(M, deterministic=True)), ValueError, "other is deterministic"),
    (lambda: Q.kl(reduction="all"), ValueError, "reduction must be one of"),
    (lambda: Q.sample_with_kl(reduction="all"), ValueError, "reduction must be one of"),
    (lambda: Q.nll(1.0), TypeError, "sample must be a torch.Tensor"),
    (lambda: Q.nll(M), ValueError, r"sample has shape \(2, 4, 3\) but mean has \(2, 2, 3\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(backend: str, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.pypi
@pytest.mark.parametrize("deterministic", [False, True])
def test_stands_for_diffusers_own(backend: str, device: str, deterministic: bool) -> None:
    """In float64, over log variances on both sides of the clamp: attributes, KLs, densities, their gradients."""
    reason = "diffusers is not installed; `make test-pypi` installs it and runs this"
    theirs = pytest.importorskip("diffusers.models.autoencoders.vae", reason=reason).DiagonalGaussianDistribution
    moments, other = (moments_of(SHAPE, torch.float64, device, k).detach() for k in (0, 1))
    moments[:, 4:] *= 20
    moments.requires_grad_(), other.requires_grad_()
    q, expected = (cls(moments, deterministic=deterministic) for cls in (DiagonalGaussian, theirs))
    for name in ("parameters", "mean", "logvar", "std", "var", "deterministic"):
        a, e = getattr(q, name), getattr(expected, name)
        assert torch.allclose(a, e, rtol=1e-12) if isinstance(e, Tensor) else a == e
    assert torch.equal(q.mode(), expected.mode())
    assert q.sample(generator=generator(0)).shape == expected.sample(generator=generator(0)).shape
    own = [generator(k) for k in range(len(moments))]  # one a sample, as pipelines pass them
    assert q.sample(generator=own).shape == expected.sample(generator=own).shape
    x = expected.mode().detach() + 0.5
    calls: list[Callable[[Any, Any], Tensor]] = [
        lambda q, p: q.kl(),
        lambda q, p: q.kl(p),
        lambda q, p: q.kl(other=p),
        lambda q, p: q.nll(x),
        lambda q, p: q.nll(x, dims=[1, 2]),
    ]
    for call in calls:
        a, e = (call(cls(moments, deterministic=deterministic), cls(other)) for cls in (DiagonalGaussian, theirs))
        assert torch.allclose(a, e.to(a), rtol=1e-9)
        if not deterministic:
            for g, true in zip(gradients(a, [moments, other]), gradients(e, [moments, other])):
                assert g is true is None or torch.allclose(g, true, rtol=1e-9)


@pytest.mark.parametrize("name", ["sample", "mode", "kl", "sample_with_kl", "nll"])
def test_methods_are_documented(name: str) -> None:
    method = getattr(DiagonalGaussian, name)
    words = ["Example::"] if name == "mode" else ["Args:", "Returns:", "Raises:", "Example::"]
    assert all(word in method.__doc__ for word in words + list(inspect.signature(method).parameters)[1:])
