"""Inputs for every likelihood and parameterization in the registries: a new entry is tested with no edit here. And
what several files assert."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import vaefast
from vaefast import Parameterization
from vaefast.likelihoods import SUPPORTS
from vaefast.reference import DOMAINS, LIKELIHOODS, PARAMETERIZATIONS

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("none", "per_sample", "batchmean", "sum", "mean")
ELBO_REDUCTIONS = ("per_sample", "batchmean", "sum")

# every likelihood with every number of parameters that it takes
LIKELIHOOD_CASES = [
    (name, count) for name, entry in LIKELIHOODS.items() for count in range(entry.required, len(entry.params) + 1)
]

CLAMPED_AND_FLOORED = [
    Parameterization(name, clamp=(0.25, 0.75), floor=floor) for name in PARAMETERIZATIONS for floor in (0.0, 0.1)
]


def generator(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


@dataclass
class Data:
    """What a likelihood takes."""

    recon: tuple[Tensor, ...]
    target: Tensor

    def to(self, *args: object) -> Data:
        return Data(tuple(p.to(*args) for p in self.recon), self.target.to(*args))

    def leaves(self) -> Data:
        return Data(tuple(p.detach().clone().requires_grad_() for p in self.recon), self.target)

    def inside(self, likelihood: str) -> Data:
        """Without counts that meet their total, on whose other side there is no finite difference."""
        domains = LIKELIHOODS[likelihood].domains
        if "total" not in domains:
            return self
        total = self.recon[domains.index("total")].detach()
        return Data(self.recon, self.target.minimum(total - 1))


def planes_shape(likelihood: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Of a mixture's parameter, where the elementwise loss is to have this shape: three components along dim 1."""
    entry = LIKELIHOODS[likelihood]
    return (*shape[:1], 3 * entry.planes[int(entry.options.get("channels", 0))], *shape[1:])


def over_planes(likelihood: str, t: Tensor, like: Tensor) -> Tensor:
    """t, which has the elementwise loss's dimensions, so that it broadcasts to a parameter or a target."""
    return t.unsqueeze(1) if LIKELIHOODS[likelihood].planes and like.dim() > t.dim() else t


def targets(likelihood: str, recon: Sequence[Tensor], seed: int = 0) -> Tensor:
    """Data in the likelihood's support: on [0, 1] soft values and both ends, on R at a distance that training meets."""
    first, entry = recon[0], LIKELIHOODS[likelihood]
    uniform = torch.rand(first.shape, generator=generator(seed + 1), dtype=torch.float64)
    if entry.support == "unit":
        ends = torch.where(uniform < 0.2, 0.0, torch.where(uniform > 0.8, 1.0, uniform))
        return ends.to(first.dtype)
    if entry.support == "real":
        noise = torch.randn(first.shape, generator=generator(seed + 2), dtype=torch.float64)
        return (first.double() + noise).to(first.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        drawn = entry.distribution(*(p.double() for p in recon), **entry.options).sample()
    if entry.support in ("positive", "at least 0"):  # where float16 ends, too
        zero = drawn == 0 if entry.support == "at least 0" else torch.zeros_like(drawn, dtype=torch.bool)
        drawn = drawn.clamp(torch.finfo(first.dtype).tiny, torch.finfo(first.dtype).max).masked_fill(zero, 0.0)
    return drawn.to(first.dtype)


def nll_of(likelihood: str, data: Data) -> Tensor:
    """The registry's formula, elementwise; in float64 an oracle."""
    entry = LIKELIHOODS[likelihood]
    return entry.nll(data.target, *data.recon, **entry.options)


def training(
    likelihood: str,
    count: int,
    shape: Sequence[int] = (4, 7),
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[Sequence[int] | None] | None = None,
    seed: int = 0,
) -> Data:
    """Parameters as a network gives them at first; shapes[k], where given, is that of parameter k."""
    g = generator(seed)
    if LIKELIHOODS[likelihood].planes:
        shape, shapes = planes_shape(likelihood, shape), None
    shapes = shapes or [None] * count
    normal = [torch.randn(tuple(shape if s is None else s), generator=g, dtype=torch.float64) for s in shapes]
    domains = LIKELIHOODS[likelihood].domains
    scales = {"real": 2.0, "planes": 0.5}
    recon = [DOMAINS[d](scales.get(d, 1.0) * p).to(dtype) for d, p in zip(domains, normal)]
    return Data(tuple(recon), targets(likelihood, [torch.as_tensor(p).expand(tuple(shape)) for p in recon], seed))


def extreme(likelihood: str, count: int, dtype: torch.dtype = torch.float32, most: int = 2500) -> Data:
    """Combinations of the extremes of the parameters' domains and of the data's support, ``most`` of them: real
    parameters 0 to +-1e4, logs of scales and rates -30 to 30, positive ones 1e-6 to 1e6, counts to 1e6."""
    entry = LIKELIHOODS[likelihood]
    data = SUPPORTS.get(entry.support, ())
    if entry.planes:
        values = torch.tensor(DOMAINS["planes"].extremes, dtype=dtype)
        recon = values[torch.randint(len(values), planes_shape(likelihood, (300,)), generator=generator(7))]
        x = targets(likelihood, [torch.zeros_like(recon)])
        xs = torch.tensor(data or (0.0,), dtype=dtype)
        ends = xs[torch.randint(len(xs), x.shape, generator=generator(8))]
        return Data((recon,), ends if data else x)
    grids = [
        [x * (2.0 if name.endswith("var") else 1.0) for x in DOMAINS[domain].extremes]
        for name, domain in zip(entry.params[:count], entry.domains)
    ]
    grid = torch.tensor(list(itertools.product(*grids, data or (0.0,))), dtype=torch.float64)
    if len(grid) > most:
        grid = grid[torch.randperm(len(grid), generator=generator(7))[:most]]
    *recon, x = (column.contiguous() for column in grid.to(dtype).unbind(1))
    return Data(tuple(recon), x if data else targets(likelihood, recon))


def raw_for(
    parameterization: str | Parameterization,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensor:
    """A raw second argument whose log variance is about N(0, 1): drawn from 512 solved by bisection."""
    name = parameterization.name if isinstance(parameterization, Parameterization) else parameterization
    g = generator(seed + 10)
    wanted = torch.randn(512, generator=g, dtype=torch.float64)
    lo, hi = torch.full_like(wanted, 1e-12 if _needs_positive(name) else -40.0), torch.full_like(wanted, 40.0)
    for _ in range(60):
        middle = 0.5 * (lo + hi)
        below = PARAMETERIZATIONS[name].logvar(middle) < wanted
        lo, hi = torch.where(below, middle, lo), torch.where(below, hi, middle)
    return lo[torch.randint(512, tuple(shape), generator=g)].to(dtype)


def _needs_positive(name: str) -> bool:
    return bool(PARAMETERIZATIONS[name].logvar(torch.tensor(-1.0)).isnan())


@dataclass
class Posterior:
    """mu, the raw scale and the prior, with the parameterization that goes with them."""

    mu: Tensor
    raw: Tensor
    prior: tuple[Tensor | float | None, Tensor | float | None]

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.mu, self.raw, *self.prior) if isinstance(t, Tensor)]

    def leaves(self) -> Posterior:
        mu, raw, pm, plv = (
            t.detach().clone().requires_grad_() if isinstance(t, Tensor) else t
            for t in (self.mu, self.raw, *self.prior)
        )
        return Posterior(mu, raw, (pm, plv))

    def args(self) -> tuple[object, ...]:
        return (self.mu, self.raw, *self.prior)


PRIORS = ("none", "float", "full", "broadcast", "scalar", "mu only", "logvar only")


def prior_for(kind: str, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple:
    def tensor(shape: Sequence[int], seed: int) -> Tensor:
        return torch.randn(tuple(shape), generator=generator(seed), dtype=torch.float64).to(device, dtype)

    # every second dimension broadcasts, the first among them
    some = [1 if k % 2 == 0 else n for k, n in enumerate(shape)]
    return {
        "none": (None, None),
        "float": (0.5, -0.25),
        "full": (tensor(shape, 21), tensor(shape, 22)),
        "broadcast": (tensor(some, 21), tensor(shape[1:], 22)),
        "scalar": (tensor((), 21), tensor((), 22)),
        "mu only": (tensor(shape, 21), None),
        "logvar only": (None, tensor(shape, 22)),
    }[kind]


def posterior(
    shape: Sequence[int] = (4, 6),
    parameterization: str | Parameterization = "logvar",
    prior: str = "none",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Posterior:
    mu = torch.randn(tuple(shape), generator=generator(seed), dtype=torch.float64).to(device, dtype)
    raw = raw_for(parameterization, shape, dtype, seed).to(device)
    return Posterior(mu, raw, prior_for(prior, shape, dtype, device))


def bound(exact: Tensor, tolerance: float) -> Tensor:
    """The contract's elementwise bound: relative above 1, absolute below."""
    return tolerance * exact.abs().clamp(min=1.0)


def sensitivity(likelihood: str, data: Data) -> list[Tensor]:
    """How far float64's nll and gradients move where every input does by a rounding of float32: what no float32 result
    can be better than. It matters where a sharp component meets its data, a hundredth of a scale off or less."""

    def results(d: Data) -> list[Tensor]:
        leaf = d.leaves()
        nll = nll_of(likelihood, leaf)
        return [nll.detach(), *torch.autograd.grad(nll.sum(), leaf.recon)]

    wide, whole = data.to(torch.float64), LIKELIHOODS[likelihood].support == "class"
    at = results(wide)
    found = [torch.zeros_like(r) for r in at]
    for seed in range(8):
        g = generator(seed)
        moved = [
            t * (1 + 2**-23 * (2 * torch.rand(t.shape, generator=g, dtype=t.dtype) - 1))
            for t in (*wide.recon, wide.target)
        ]
        near = results(Data(tuple(moved[:-1]), wide.target if whole else moved[-1]))
        found = [torch.maximum(f, (a - b).abs()) for f, a, b in zip(found, near, at)]
    return found


def assert_within(actual: Tensor, exact: Tensor, tolerance: float, what: str = "", slack: Tensor | float = 0.0) -> None:
    """|actual - exact| <= tolerance * max(1, |exact|) + slack, in float64; the same infinities and NaNs."""
    a, e = actual.detach().double().cpu(), exact.detach().double().cpu()
    assert a.shape == e.shape, f"{what}: {tuple(a.shape)} is not {tuple(e.shape)}"
    same = (a == e) | (a.isnan() & e.isnan())
    wrong = ~(same | ((a - e).abs() <= bound(e, tolerance) + slack))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        message = f"{what}: {int(wrong.sum())} of {a.numel()} wrong, first at {at}: {a[at]!r}, exact {e[at]!r}"
        raise AssertionError(message)


def assert_same_bits(run: Callable[[], Sequence[Tensor]], set_threads: Callable[[int], None]) -> None:
    """By one, two and three threads."""
    every = []
    for count in (1, 2, 3):
        set_threads(count)
        every.append(run())
    for other in every[1:]:
        for a, b in zip(every[0], other, strict=True):
            assert torch.equal(a, b)


def gradients(outputs: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 5) -> list[Tensor]:
    """Gradients of sum(u * output) with fixed random u, so that an upstream gradient is never 1 everywhere."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    upstream = [
        (1.5 + torch.rand(o.shape, generator=generator(seed + k), dtype=torch.float64)).to(o.device, o.dtype)
        for k, o in enumerate(outputs)
    ]
    return list(torch.autograd.grad(outputs, inputs, upstream, allow_unused=True))


def std_and_logvar(parameterization: str | Parameterization, raw: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, from the registry and the definition alone: activation(clamp(raw)) + floor."""
    p = parameterization if isinstance(parameterization, Parameterization) else Parameterization(parameterization)
    raw = raw.double()
    if p.clamp is not None:
        raw = raw.clamp(*p.clamp)
    std = PARAMETERIZATIONS[p.name].std(raw) + p.floor
    return std, 2 * std.log()


def textbook_kl(mu: Tensor, logvar: Tensor, prior_mu: object = None, prior_logvar: object = None) -> Tensor:
    """Kingma & Welling 2014, appendix B, as everyone writes it."""
    pm = torch.as_tensor(0.0 if prior_mu is None else prior_mu, dtype=mu.dtype, device=mu.device)
    plv = torch.as_tensor(0.0 if prior_logvar is None else prior_logvar, dtype=mu.dtype, device=mu.device)
    return -0.5 * (1 + logvar - plv - ((mu - pm) ** 2 + logvar.exp()) / plv.exp())


def draws(seed: Sequence[int], shape: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """The kernels' own noise for two seed words: z at mu = 0, std = 1."""
    return draws_around(seed, torch.zeros(*shape, dtype=dtype, device=device))


def draws_around(seed: Sequence[int], zero: Tensor) -> Tensor:
    """That of a tensor of zeros, however it lies."""
    words = torch.tensor(seed, dtype=torch.int64, device=zero.device)
    out = torch.ops.vaefast.posterior(
        zero, zero, None, 0.0, None, 0.0, None, words, None, "logvar", -math.inf, math.inf, 0.0, "none", None,
        True, False,
    )  # fmt: skip
    return out[0]


NUMBERED = {
    "parameterization": list(PARAMETERIZATIONS),
    "reduction": list(REDUCTIONS),
}


def with_numbers(operator: str, arguments: Sequence[object]) -> tuple[object, ...]:
    """Arguments with the names that operators below autograd have numbers for, which are easier to read, replaced."""
    schema = getattr(torch.ops.vaefast, operator).default._schema.arguments
    numbered = [NUMBERED[a.name] if a.name in NUMBERED and str(a.type) == "int" else None for a in schema]
    return tuple(
        names.index(x) if names and isinstance(x, str) else x for names, x in zip(numbered, arguments, strict=True)
    )


def assert_cuda_kernels() -> None:
    """Every operator has its kernel for CUDA, or is made of such."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vaefast::")]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert names
    for name in names:
        composed = any(has(name, f"Composite{kind}Autograd") for kind in ("Explicit", "Implicit"))
        assert has(name, "CUDA") or composed, name


def assert_checkpointing_replays(mu: Tensor, raw: Tensor, use_reentrant: bool) -> None:
    """A sample under activation checkpointing has the value and the gradients, bit for bit, of one without."""

    def f(mu: Tensor, raw: Tensor) -> Tensor:
        return vaefast.reparameterize(mu, raw).exp().sum()

    results = []
    for run in (f, lambda *a: checkpoint(f, *a, use_reentrant=use_reentrant)):
        torch.manual_seed(4)
        value = run(mu, raw)
        mu.grad = raw.grad = None
        value.backward()
        results.append((value, mu.grad, raw.grad))
    for plain, replayed in zip(*results):
        assert torch.equal(plain, replayed)
