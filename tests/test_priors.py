"""Priors that are no Gaussian, against torch.distributions and against formulas of 50 digits or in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import vaefast
from vaefast import _mixtures, priors

WIDE = torch.float64
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None]


def drawn(seed: int, b: int, k: int, d: int, logits: bool = True, dtype: torch.dtype = torch.float32) -> Arguments:
    g = torch.Generator().manual_seed(seed)
    z, mus = torch.randn(b, d, generator=g), torch.randn(k, d, generator=g)
    logvars = 0.5 * torch.randn(k, d, generator=g)
    weights = torch.randn(k, generator=g) if logits else None
    return tuple(None if t is None else t.to(dtype) for t in (z, mus, logvars, weights))  # type: ignore[return-value]


def of_torch(z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None = None) -> Tensor:
    logits = torch.zeros_like(mus[:, 0]) if logits is None else logits
    components = Independent(Normal(mus, torch.exp(0.5 * logvars), validate_args=False), 1, validate_args=False)
    mixture = MixtureSameFamily(Categorical(logits=logits, validate_args=False), components, validate_args=False)
    return mixture.log_prob(z)


def with_gradients(f: Callable[..., Tensor], arguments: Arguments, upstream: Tensor) -> list[Tensor]:
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in arguments]
    value = f(*leaves)
    return [value.detach(), *torch.autograd.grad(value, [t for t in leaves if t is not None], upstream.to(value.dtype))]


def assert_same(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for name, a, b in zip(("value", "z", "mus", "logvars", "logits"), found, expected):
        error = (a.double() - b).abs() / b.abs().clamp(min=1)
        assert float(error.max()) <= bound, (name, float(error.max()))


@pytest.fixture(params=["kernels", "few", "many"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size: by kernels, all differences at once, or products."""
    if request.param == "kernels":
        if _mixtures.kernels is None:
            pytest.skip("the extension is not built; make build")
        monkeypatch.setattr(_mixtures, "MANY", 1 << 62)
        return
    monkeypatch.setattr(_mixtures, "kernels", None)
    monkeypatch.setattr(_mixtures, "FEW", 1 << 30 if request.param == "few" else 0)


SIZES = [(1, 1, 1), (1, 5, 3), (7, 1, 4), (33, 17, 5), (64, 100, 16), (200, 300, 40), (3, 2, 1500)]


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (WIDE, 1e-13)])
def test_values_and_gradients(
    size: tuple[int, int, int], logits: bool, dtype: torch.dtype, bound: float, device: str, way: None
) -> None:
    arguments = drawn(1, *size, logits, dtype)
    arguments = tuple(None if t is None else t.to(device) for t in arguments)  # type: ignore[assignment]
    upstream = torch.randn(size[0], generator=torch.Generator().manual_seed(2)).to(device)
    found = with_gradients(priors.mixture_log_prob, arguments, upstream)
    wide = tuple(None if t is None else t.double() for t in arguments)
    assert_same(found, with_gradients(of_torch, wide, upstream), bound)  # type: ignore[arg-type]
    assert found[0].dtype == dtype


def ways() -> list[tuple[str, Arguments]]:
    """What goes by products, and what is too far, too narrow or too little for them."""
    z, mus, logvars, logits = drawn(3, 96, 40, 12)
    assert logits is not None
    far, out = mus.clone(), logits.clone()
    far[3:20] += 1e3
    out[5:30] = -math.inf
    return [
        ("plain", (z, mus, logvars, logits)),
        ("far components", (z, far, logvars, logits)),
        ("no weight", (z, mus, logvars, out)),
        ("one weight", (z, mus, logvars, torch.full_like(logits, -math.inf).index_fill(0, torch.tensor(7), 2.0))),
        ("far from the origin", (z + 1e4, mus + 1e4, logvars, logits)),
        ("far from all", (z + 1e4, mus, logvars, logits)),
        ("narrow", (z, mus, logvars - 20, logits)),
        ("on narrow components", (mus.repeat(3, 1)[:96] + 1e-3 * z, mus, logvars - 14, logits)),
        ("very narrow", (mus.repeat(3, 1)[:96], mus, logvars - 60, logits)),
        ("wide", (z, mus, logvars + 60, logits)),
        ("one in many", (z[:1], mus, logvars, logits)),
    ]


@pytest.mark.parametrize("case", ways(), ids=lambda case: case[0])
def test_extremes(case: tuple[str, Arguments], way: None) -> None:
    """Each gradient is held to 1e-6 of the largest of its kind, or of 1."""
    _, arguments = case
    upstream = torch.randn(len(arguments[0]), generator=torch.Generator().manual_seed(5))
    found = with_gradients(priors.mixture_log_prob, arguments, upstream)
    wide = tuple(None if t is None else t.double() for t in arguments)
    expected = with_gradients(of_torch, wide, upstream)  # type: ignore[arg-type]
    for a, b in zip(found, expected):
        assert float((a.double() - b).abs().max()) <= 1e-6 * max(1.0, float(b.abs().max()))
    assert_same(found[:1], expected[:1], 1e-6)


def test_the_bound_of_the_products_is_where_float32_ends() -> None:
    """Just within the bound, values and gradients are right; beyond it differences are taken."""
    for narrower, products in ((0.0, True), (5.0, True), (11.0, True), (14.0, False)):
        z, mus, logvars, logits = drawn(9, 200, 50, 16)
        arguments = (mus.repeat(4, 1) + 1e-3 * z, mus, logvars.clamp(-0.5, 0.5) - narrower, logits)
        assert _mixtures.Density(*arguments).products == products
        found = with_gradients(priors.mixture_log_prob, arguments, torch.ones(200))
        expected = with_gradients(of_torch, tuple(t.double() for t in arguments if t is not None), torch.ones(200))  # type: ignore[arg-type]
        for a, b in zip(found, expected):
            assert float((a.double() - b).abs().max()) <= 1e-6 * max(1.0, float(b.abs().max()))


def test_against_fifty_digits() -> None:
    z, mus, logvars, logits = drawn(4, 2, 3, 4, dtype=WIDE)
    assert logits is not None
    with mpmath.workdps(50):
        weights = [mpmath.exp(v) for v in logits.tolist()]
        for row, found in zip(z.tolist(), priors.mixture_log_prob(z, mus, logvars, logits).tolist()):
            total = mpmath.mpf(0)
            for weight, mu, lv in zip(weights, mus.tolist(), logvars.tolist()):
                density = weight / sum(weights)
                for x, m, v in zip(row, mu, lv):
                    density *= mpmath.exp(-((mpmath.mpf(x) - m) ** 2) / (2 * mpmath.exp(v)))
                    density /= mpmath.sqrt(2 * mpmath.pi * mpmath.exp(v))
                total += density
            assert abs(found - mpmath.log(total)) < 1e-14 * abs(mpmath.log(total))


def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, upstream = drawn(6, 150, 40, 8), torch.randn(150)
    monkeypatch.setattr(_mixtures, "kernels", None)
    monkeypatch.setattr(_mixtures, "FEW", 0)
    whole = with_gradients(priors.mixture_log_prob, arguments, upstream)
    monkeypatch.setattr(_mixtures, "BLOCK", 1000)
    monkeypatch.setattr(_mixtures, "KEPT", 1000)
    assert_same(with_gradients(priors.mixture_log_prob, arguments, upstream), [t.double() for t in whole], 1e-6)
    monkeypatch.setattr(_mixtures, "LARGEST", 0.0)
    monkeypatch.setattr(_mixtures, "DIFFERENCES", 100)
    assert_same(with_gradients(priors.mixture_log_prob, arguments, upstream), [t.double() for t in whole], 1e-6)


def test_more_shares_than_are_kept(extension: Any) -> None:
    """On a GPU the samples go some at a time (kShares in csrc/cuda/run_latents.cuh)."""
    arguments, upstream = drawn(9, 180, 3000, 2), torch.randn(180)
    assert _mixtures.kernels_for(True, *arguments) is _mixtures.kernels
    found = with_gradients(priors.mixture_log_prob, arguments, upstream)
    wide = tuple(None if t is None else t.double() for t in arguments)
    assert_same(found, with_gradients(of_torch, wide, upstream), 1e-6)  # type: ignore[arg-type]


def test_each_gradient_alone(way: None) -> None:
    arguments, upstream = drawn(7, 150, 40, 8), torch.ones(150)
    every = with_gradients(priors.mixture_log_prob, arguments, upstream)
    for n in range(4):
        leaves: list[Any] = [t.clone().requires_grad_(n == k) for k, t in enumerate(arguments) if t is not None]
        priors.mixture_log_prob(*leaves).sum().backward()
        assert torch.equal(leaves[n].grad, every[n + 1])


@pytest.mark.parametrize("size", [(3, 4, 2), (40, 30, 8)], ids=str)
def test_gradcheck(size: tuple[int, int, int], way: None) -> None:
    arguments = [t.requires_grad_() for t in drawn(8, *size, dtype=WIDE) if t is not None]
    assert gradcheck(priors.mixture_log_prob, arguments, fast_mode=True)
    assert gradcheck(priors.mixture_log_prob, arguments, check_batched_grad=size[0] < 10, fast_mode=size[0] > 10)
    assert gradgradcheck(priors.mixture_log_prob, arguments, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, way: None) -> None:
    arguments, upstream = drawn(8, 100, 30, 8, dtype=dtype), torch.ones(100)
    found = with_gradients(priors.mixture_log_prob, arguments, upstream)
    assert found[0].dtype == torch.float32 and all(g.dtype == dtype for g in found[1:])
    wide = tuple(None if t is None else t.double() for t in arguments)
    assert_same(found, with_gradients(of_torch, wide, upstream), 2 * torch.finfo(dtype).eps)  # type: ignore[arg-type]
    assert_same(found[:1], with_gradients(of_torch, wide, upstream)[:1], 1e-6)  # type: ignore[arg-type]


def test_leading_dimensions_strides_and_empty_batches(way: None) -> None:
    z, mus, logvars, logits = drawn(9, 60, 7, 4)
    expected = priors.mixture_log_prob(z, mus, logvars, logits)
    assert torch.equal(priors.mixture_log_prob(z.view(3, 4, 5, 4), mus, logvars, logits), expected.view(3, 4, 5))
    assert torch.equal(priors.mixture_log_prob(z[0], mus, logvars, logits), expected[0])
    strided = z.t().contiguous().t(), mus.t().contiguous().t()
    torch.testing.assert_close(priors.mixture_log_prob(*strided, logvars, logits), expected)
    leaves = [t.clone().requires_grad_() for t in (z[:0], mus, logvars)]
    found = priors.mixture_log_prob(*leaves)
    assert found.shape == (0,)
    found.sum().backward()
    assert all(t.grad is not None and not t.grad.any() for t in leaves)


def test_not_finite_flows_through(way: None) -> None:
    z, mus, logvars, logits = drawn(10, 100, 20, 8)
    z[3, 2], z[4, 2] = math.nan, math.inf
    found = priors.mixture_log_prob(z, mus, logvars, logits)
    assert found[3].isnan() and found[4] == -math.inf and found.isfinite().sum() == 98


@pytest.mark.parametrize("size", [(4, 3, 2), (70, 50, 8)], ids=str)
def test_compiled_traced_and_transformed(size: tuple[int, int, int]) -> None:
    arguments, upstream = drawn(11, *size), torch.ones(size[0])
    expected = with_gradients(priors.mixture_log_prob, arguments, upstream)
    torch.compiler.reset()
    compiled = torch.compile(priors.mixture_log_prob, fullgraph=True, backend="aot_eager")
    assert_same(with_gradients(compiled, arguments, upstream), [t.double() for t in expected], 1e-6)
    unweighed = torch.compile(lambda *a: priors.mixture_log_prob(*a).sum(), fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in arguments[:3] if t is not None]
    unweighed(*leaves).backward()
    assert all(t.grad is not None for t in leaves)
    z, *rest = arguments
    rows = torch.vmap(lambda row: priors.mixture_log_prob(row.unsqueeze(0), *rest)[0])(z)
    torch.testing.assert_close(rows, expected[0])
    torch.testing.assert_close(torch.func.jacrev(lambda x: priors.mixture_log_prob(x, *rest).sum())(z), expected[1])
    exported = torch.export.export(_Module(arguments), (z,)).module()
    torch.testing.assert_close(exported(z), expected[0])


class _Module(nn.Module):
    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.rest = arguments[1:]

    def forward(self, z: Tensor) -> Tensor:
        return priors.mixture_log_prob(z, *self.rest)


def test_the_compilers_operators() -> None:
    z, mus, logvars, logits = (t.requires_grad_() for t in drawn(12, 6, 3, 2) if t is not None)
    for given in ((z, mus, logvars, logits, True), (z, mus, logvars, None, True), (z, mus, logvars, logits, False)):
        torch.library.opcheck(torch.ops.vaefast.mixture_log_prob.default, given)


def test_kernels_whatever_the_threads(extension: Any, set_threads: Callable[[int], None]) -> None:
    """Bit by bit: chunks are by the sizes alone. 700 samples are five, each of a block and a part of one."""
    arguments, g = drawn(14, 700, 30, 5), torch.randn(700)
    found = []
    for threads in (1, 2, 5):
        set_threads(threads)
        found.append([extension.mixture_forward(*arguments), *extension.mixture_backward(g, *arguments)])
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], each))


def test_kernels_refuse(extension: Any) -> None:
    z, mus, logvars, logits = drawn(15, 6, 3, 2)
    for wrong in (z[:, :1], z[0], z.new_empty(6, 0)):
        with pytest.raises(ValueError, match="a mixture takes z"):
            extension.mixture_forward(wrong, mus, logvars, logits)
    with pytest.raises(ValueError, match="a mixture takes z"):
        extension.mixture_forward(z, mus[:0], logvars[:0], None)
    with pytest.raises(ValueError, match="a mixture takes z"):
        extension.mixture_backward(z[:, 0], z, mus, logvars[:2], logits)
    with pytest.raises(ValueError, match="of 3 components has as many logits"):
        extension.mixture_forward(z, mus, logvars, z[0])
    with pytest.raises(TypeError, match="a mixture of Int"):
        extension.mixture_forward(z.int(), mus, logvars, logits)
    with pytest.raises(ValueError, match="tensors on meta and cpu"):
        extension.mixture_forward(z, mus.to("meta"), logvars, logits)
    with pytest.raises(ValueError, match=r"a gradient of shape \[5\] for 6 densities"):
        extension.mixture_backward(z[:5, 0], z, mus, logvars, logits)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(2, 3), torch.zeros(4, 2), torch.zeros(4, 2)), ValueError, r"z has shape \(2, 3\).*2 dimensions"),
        ((torch.zeros(()), torch.zeros(4, 2), torch.zeros(4, 2)), ValueError, "z has shape"),
        ((torch.zeros(2, 2), torch.zeros(2), torch.zeros(2)), ValueError, r"mus must be \[K, D\]"),
        ((torch.zeros(2, 2), torch.zeros(0, 2), torch.zeros(0, 2)), ValueError, "at least one component"),
        ((torch.zeros(2, 2), torch.zeros(4, 2), torch.zeros(3, 2)), ValueError, "logvars has shape"),
        ((torch.zeros(2, 2), torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(3)), ValueError, "logits has shape"),
        ((torch.zeros(2, 2).int(), torch.zeros(4, 2), torch.zeros(4, 2)), TypeError, "z must be float16"),
        ((torch.zeros(2, 2), [0.0], torch.zeros(4, 2)), TypeError, "mus must be a torch.Tensor"),
        ((torch.zeros(2, 2), *[torch.zeros(4, 2, device="meta")] * 2), ValueError, "mus is on meta but z is on cpu"),
    ],
)
def test_refusals(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        priors.mixture_log_prob(*arguments)


def test_memory() -> None:
    """At B 1,024, K 500, D 64 under 10 MB lie between the call and backward, and above them, at any time."""
    leaves = [t.requires_grad_() for t in drawn(13, 1024, 500, 64) if t is not None]
    priors.mixture_log_prob(*leaves).sum().backward()
    for t in leaves:
        t.grad = None
    assert peak(lambda: priors.mixture_log_prob(*leaves).sum().backward()) < 10e6


def peak(f: Callable[[], object]) -> int:
    """The most that lay in tensors at once, beyond what lay there before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        f()
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


# -- the modules


def test_gaussian_mixture_prior() -> None:
    torch.manual_seed(0)
    prior = priors.GaussianMixturePrior(5, 3)
    with torch.no_grad():
        prior.logvars.normal_(), prior.logits.normal_()
    z = torch.randn(4, 2, 3)
    expected = of_torch(z, prior.mus, prior.logvars, prior.logits)
    torch.testing.assert_close(prior(z), expected)
    assert {name for name, _ in prior.named_parameters()} == {"mus", "logvars", "logits"}
    draws = prior.sample(20000, generator=torch.Generator().manual_seed(1))
    weights = torch.softmax(prior.logits, 0).unsqueeze(1)
    mean = (weights * prior.mus).sum(0)
    variance = (weights * (prior.logvars.exp() + prior.mus**2)).sum(0) - mean**2
    torch.testing.assert_close(draws.mean(0), mean, atol=0.06, rtol=0.0)
    torch.testing.assert_close(draws.var(0), variance, atol=0.0, rtol=0.1)
    assert not draws.requires_grad
    for wrong, error in (((0, 3), ValueError), ((2.5, 3), TypeError)):
        with pytest.raises(error, match="components must be"):
            priors.GaussianMixturePrior(*wrong)  # type: ignore[arg-type]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, raw = self.net(x).chunk(2, 1)
        return mu, raw


def test_vamp_prior() -> None:
    torch.manual_seed(0)
    encode, u, z = Encoder(), torch.rand(7, 6), torch.randn(5, 4)
    for name in ("logvar", "log_std"):
        prior = priors.VampPrior(u, encode, parameterization=name)
        assert [n for n, _ in prior.named_parameters()] == ["pseudo_inputs"]
        mus, raw = encode(prior.pseudo_inputs)
        torch.testing.assert_close(prior(z), of_torch(z, mus, raw if name == "logvar" else 2 * raw))
        prior(z).sum().backward()
        grad = prior.pseudo_inputs.grad
        assert grad is not None and grad.abs().sum() > 0 and encode.net.weight.grad is not None
    assert prior.sample(9).shape == (9, 4)
    model = nn.ModuleDict({"encode": encode, "prior": prior})
    twin = copy.deepcopy(model)
    assert twin["prior"]._encode[0] is twin["encode"], "a copy goes by its own encoder"
    assert set(model.state_dict()) == {"encode.net.weight", "encode.net.bias", "prior.pseudo_inputs"}


@pytest.mark.parametrize(
    ("encode", "error", "words"),
    [
        (lambda u: u, TypeError, "two tensors"),
        (lambda u: (u, u[:, :1]), ValueError, "encode's logvar has shape"),
        (lambda u: (u[:1], u[:1]), ValueError, r"it must be \[7, D\]"),
        (3, TypeError, "encode must be callable"),
    ],
)
def test_vamp_prior_refusals(encode: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        priors.VampPrior(torch.rand(7, 6), encode)(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="at least one"):
        priors.VampPrior(torch.rand(0, 6), Encoder())


def blundell(w: Tensor, sigma1: float, sigma2: float, pi: float) -> Tensor:
    """Equation 7, its logarithm."""
    parts = [math.log(p) + Normal(0.0, s).log_prob(w) for p, s in ((pi, sigma1), (1 - pi, sigma2)) if p]
    return torch.logsumexp(torch.stack(parts), 0)


@pytest.mark.parametrize(
    "given", [(1.0, 0.0025, 0.25), (0.1, 3.0, 0.5), (1.0, 1.0, 0.3), (1.0, 0.1, 1.0), (1.0, 0.1, 0.0)]
)
@pytest.mark.parametrize("shape", [(5,), (30, 7), (700, 500)])
def test_scale_mixture(given: tuple[float, float, float], shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    prior = priors.ScaleMixture(*given)
    wide = w.detach().double().requires_grad_()
    expected = blundell(wide, *given)
    for found, of in ((prior.total(w), expected.sum()), (prior.log_prob(w), expected.sum(-1))):
        torch.testing.assert_close(found.double(), of, rtol=1e-6, atol=1e-5)
        upstream = torch.randn(found.shape)
        (grad,) = torch.autograd.grad(found, w, upstream)
        torch.testing.assert_close(
            grad.double(), *torch.autograd.grad(of, wide, upstream.double(), retain_graph=True), rtol=2e-6, atol=1e-6
        )


def test_scale_mixture_in_every_way() -> None:
    prior = priors.ScaleMixture(1.0, 0.05, 0.25)
    w = torch.randn(6, 3, dtype=WIDE, requires_grad=True)
    assert gradcheck(prior.log_prob, w) and gradgradcheck(prior.total, w)
    z = torch.randn(2, 4, 3)
    assert prior.log_prob(z).shape == (2, 4) and prior.log_prob(z[:0]).shape == (0, 4)
    assert prior.log_prob(z[..., :0]).shape == (2, 4) and prior.total(z.half()).dtype == torch.float32
    compiled = torch.compile(prior.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), prior.log_prob(z))
    assert prior.total(torch.tensor([1e10, -1e15])).isfinite()
    for wrong, error in (
        ((0.0, 1.0), ValueError),
        ((1.0, math.inf), ValueError),
        ((1.0, 1.0, 1.5), ValueError),
        (("a", 1.0), TypeError),
    ):
        with pytest.raises(error):
            priors.ScaleMixture(*wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"w must be a torch\.Tensor"):
        prior.total([1.0])  # type: ignore[arg-type]
    assert repr(prior) == "ScaleMixture(1.0, 0.05, 0.25)"
    assert vaefast.priors.ScaleMixture is priors.ScaleMixture
