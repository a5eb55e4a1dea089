"""Every kernel against the reference in float64: each op forward and backward, over dtypes, sizes and layouts.

The cases are no full product. What is not a test's subject is drawn, from a fixed seed, for each of its cases.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from inputs import (
    CLAMPED_AND_FLOORED,
    ELBO_REDUCTIONS,
    FLOATING,
    LIKELIHOOD_CASES,
    PRIORS,
    REDUCTIONS,
    generator,
    over_planes,
    posterior,
    training,
)
from torch import Tensor

import vaefast
from vaefast import Likelihood, reference
from vaefast._philox import philox_noises
from vaefast.reference import LIKELIHOODS, PARAMETERIZATIONS

Layout = Callable[[Tensor], Tensor]

# around a vector, a warp, a block and a block's share of work; several blocks
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 12293)
# rows that share blocks, rows that have one each, none, and empty ones
ROWS = ((7, 5), (300, 3), (257, 33), (3, 1025), (5, 512), (2, 513), (2, 0), (0, 3), (2, 3, 4), (1, 4097))
SHAPES = (*((n,) for n in SIZES), *ROWS)
SMALL = ((5,), (7, 5), (3, 33), (2, 3, 4), (2, 513))
# rows that take several blocks each: few, whose partial sums a block adds up, in float64 with several of its warps;
# more rows, for a thread or a warp each
LONG_ROWS = ((1, 9001), (3, 4099), (2, 33000), (11, 4099), (9, 16400))

# what comes in; with two, the second is the target's or the raw scale's
MIXED = ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float64))
DTYPES = (*((t, t) for t in FLOATING), *MIXED)
ARITHMETIC = {torch.float32: 2e-6, torch.float64: 1e-13}
# Box-Muller's, at its longest radius
NOISE = {torch.float32: 1e-5, torch.float64: 1e-13}
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 0.0}


def offset(by: int) -> Layout:
    return lambda t: torch.cat((t.new_zeros(by), t.flatten()))[by:].view(t.shape)


def chunk(which: int) -> Layout:
    return lambda t: torch.cat((t, t), -1).chunk(2, -1)[which]


# the same values, lying elsewhere; but for the expanded ones, which repeat the first
LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda t: t,
    "offset 1": offset(1),
    "offset 2": offset(2),
    "offset 3": offset(3),
    "chunk 0": chunk(0),
    "chunk 1": chunk(1),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "rows transposed": lambda t: t.transpose(0, -2).contiguous().transpose(0, -2) if t.dim() > 1 else t,
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded rows": lambda t: t[:1].expand(t.shape),
    "expanded columns": lambda t: t[..., :1].expand(t.shape) if t.numel() else t,
    "expanded rows and columns": lambda t: t[:1][..., :1].expand(t.shape) if t.numel() else t,
}
# not those that only three dimensions tell from others
DRAWN = [name for name in LAYOUTS if name not in ("rows transposed", "expanded rows and columns")]
WEIGHTS = ("none", "full", "columns", "mask")


@pytest.fixture(autouse=True)
def _nothing_else_computes() -> Iterator[None]:
    with vaefast.use_backend("native"):
        yield


def drawn(cases: Iterable[tuple[Any, ...]], *lists: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Each case with one of each list behind it."""
    source = random.Random(0)
    return [(*case, *(source.choice(values) for values in lists)) for case in cases]


def spread(inputs: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """f of every tensor."""
    if isinstance(inputs, (tuple, list)):
        return [spread(x, f) for x in inputs]
    return f(inputs) if isinstance(inputs, Tensor) else inputs


def tensors(inputs: Any) -> list[Tensor]:
    if isinstance(inputs, (tuple, list)):
        return [t for x in inputs for t in tensors(x)]
    return [inputs] if isinstance(inputs, Tensor) else []


def assert_right(
    what: str, actual: Tensor, exact: Tensor, tolerance: float, roundings: int = 1, slack: Tensor | float = 0.0
) -> None:
    """|actual - exact| <= tolerance * max(1, |exact|) + slack and a narrower dtype's rounding; infinities and NaNs
    alike."""
    assert actual.shape == exact.shape, f"{what} has shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    a, e = actual.detach().double(), exact.detach()
    if actual.dtype != torch.float64:
        # it may have been computed by a part of the work in which nothing is wide
        tolerance = max(tolerance, ARITHMETIC[torch.float32])
    bound = tolerance * e.abs().clamp(min=1) + roundings * ROUNDING[actual.dtype] * e.abs() + slack
    wrong = ~((a == e) | (a.isnan() & e.isnan()) | ((a - e).abs() <= bound))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        message = f"{what}: {int(wrong.sum())} of {a.numel()} wrong, first at {at}: {a[at]!r}, exact {e[at]!r}"
        raise AssertionError(message)


def rounded_otherwise(inputs: Any, seed: int) -> Any:
    """Every tensor moved by up to a rounding of float32."""

    def near(t: Tensor) -> Tensor:
        by = 2 * torch.rand(t.shape, generator=generator(seed), dtype=torch.float64) - 1
        return (t.detach() * (1 + 2**-23 * by)).requires_grad_()

    return spread(inputs, near)


def check(function: Callable[..., Any], inputs: Sequence[Any], target: Tensor | None = None, **options: Any) -> None:
    """function on the kernels against the reference in float64: results, then the gradients of all inputs, for upstream
    gradients that are not 1. The target, if any, comes second. noise=True: the sample's noise is drawn, else given."""
    noise = options.pop("noise", None)
    weight = options.get("weight")
    leaves = spread(list(inputs), lambda t: t.detach().requires_grad_())
    wides = spread(list(inputs), lambda t: t.detach().double().contiguous().requires_grad_())
    arguments, wide_arguments, wide_options = [*leaves], [*wides], {**options}
    if target is not None:
        arguments.insert(1, target)
        wide_arguments.insert(1, target.double())
        wide_options["weight"] = None if weight is None else weight.double()
    everything = [*tensors(arguments), *tensors(weight)]
    arithmetic = torch.float64 if any(t.dtype == torch.float64 for t in everything) else torch.float32
    tolerance = ARITHMETIC[arithmetic]
    lead = tensors(leaves)[0]
    if noise is not None:
        if noise:
            torch.manual_seed(1)
            zero = torch.zeros_like(lead, dtype=arithmetic)
            eps = reference.reparameterize(zero, zero, noise="philox")
            tolerance += NOISE[arithmetic]
        else:
            eps = options["eps"] = torch.randn(lead.shape, generator=generator(9)).to(lead.dtype)
        wide_options["eps"] = eps.double()
    torch.manual_seed(1)
    ours, exact = (
        function(*arguments, **options),
        getattr(reference, function.__name__)(*wide_arguments, **wide_options),
    )
    ours, exact = ([x] if isinstance(x, Tensor) else list(x) for x in (ours, exact))

    def summed(to: Tensor) -> float:
        """By how much the errors of as many terms as one number of ``to`` adds up outgrow one term's."""
        return max(1.0, lead.numel() / max(1, to.numel())) ** 0.5

    for k, (a, e) in enumerate(zip(ours, exact)):
        assert_right(f"result {k}", a, e, tolerance * summed(a))
    upstream = [(1.5 + torch.rand(o.shape, generator=generator(5 + k))).to(o.dtype) for k, o in enumerate(ours)]
    got = torch.autograd.grad(ours, tensors(leaves), upstream, allow_unused=True)
    wide_upstream = [u.double() for u in upstream]
    wanted = torch.autograd.grad(exact, tensors(wides), wide_upstream, allow_unused=True)
    slack: list[Tensor | float] = [0.0] * len(wanted)
    sharp = "log_normal", "gamma", "zero_inflated_log_normal", "zero_inflated_gamma", "negative_binomial_mixture"
    if options.get("likelihood") in sharp and arithmetic == torch.float32:
        # log x less the mean, and 1 / a less x's share, are small differences of what is large: by how much they move
        # where inputs do by a rounding
        for seed in range(4):
            near = rounded_otherwise(wide_arguments, seed)
            out = getattr(reference, function.__name__)(*near, **wide_options)
            moved = torch.autograd.grad(tensors(out), tensors([near[0], *near[2:]]), wide_upstream, allow_unused=True)
            pairs = zip(slack, moved, wanted)
            slack = [
                s if m is None or e is None else torch.maximum(torch.as_tensor(s), 4 * (m - e).abs().nan_to_num(0.0))
                for s, m, e in pairs
            ]
    for k, (x, a, e) in enumerate(zip(tensors(leaves), got, wanted)):
        assert (a is None) == (e is None)
        if a is None or e is None:
            continue
        assert a.dtype == x.dtype
        # where an input broadcasts its gradient is a sum; a kept one is rounded when it is kept and when it is scaled
        assert_right(f"gradient {k}", a, e, tolerance * summed(x), 2, slack[k])


def posterior_of(
    shape: Sequence[int], parameterization: Any, prior: str, dtypes: Sequence[torch.dtype], layouts: Sequence[str]
) -> list[Any]:
    """mu, raw and the prior's two; each layout serves one half of them."""
    p = posterior(shape, parameterization, prior, torch.float64)
    mu, raw = p.mu.to(dtypes[0]), p.raw.to(dtypes[1])
    pm, plv = (x.to(dtypes[1]) if isinstance(x, Tensor) else x for x in p.prior)
    if prior == "full":
        pm, plv = LAYOUTS[layouts[1]](pm), LAYOUTS[layouts[0]](plv)
    return [LAYOUTS[layouts[0]](mu), LAYOUTS[layouts[1]](raw), pm, plv]


def check_posterior(inputs: list[Any], parameterization: Any, reduction: str, noise: bool) -> None:
    options: dict[str, Any] = {"parameterization": parameterization}
    check(vaefast.reparameterize, inputs[:2], **options, noise=noise)
    check(vaefast.gaussian_kl, inputs, **options, reduction=reduction)
    check(vaefast.sample_with_kl, inputs, **options, reduction=reduction, noise=noise)


def reconstruction_of(
    likelihood: str,
    count: int,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    layouts: Sequence[str],
    weight: str,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """recon, target and weight. Where the weight is a mask, what it masks is NaN."""
    data = training(likelihood, count, shape, torch.float64)
    g = generator(3)
    on = torch.rand(tuple(shape), generator=g) > 0.25
    weights = {
        "none": None,
        "full": torch.rand(tuple(shape), generator=g, dtype=torch.float64).to(dtypes[1]) * on,
        "columns": torch.rand(shape[-1], generator=g, dtype=torch.float64).to(dtypes[1]),
        "mask": on,
    }
    recon = [LAYOUTS[layouts[k % 2]](p.to(dtypes[0])) for k, p in enumerate(data.recon)]
    if weight == "mask":
        recon[0] = torch.where(over_planes(likelihood, on, recon[0]), recon[0], float("nan"))
    return recon, LAYOUTS[layouts[1]](data.target.to(dtypes[1])), weights[weight]


@pytest.mark.parametrize(
    "case",
    drawn(product(SHAPES, DTYPES), list(PARAMETERIZATIONS), PRIORS, DRAWN, DRAWN, REDUCTIONS, (0, 1)),
    ids=str,
)
def test_posterior(case: tuple[Any, ...]) -> None:
    shape, dtypes, parameterization, prior, *layouts, reduction, noise = case
    check_posterior(
        posterior_of(shape, parameterization, prior, dtypes, layouts), parameterization, reduction, bool(noise)
    )


@pytest.mark.parametrize(
    "case",
    drawn(product((*PARAMETERIZATIONS, *CLAMPED_AND_FLOORED), FLOATING), SMALL, PRIORS, DRAWN, REDUCTIONS, (0, 1)),
    ids=str,
)
def test_parameterizations(case: tuple[Any, ...]) -> None:
    parameterization, dtype, shape, prior, layout, reduction, noise = case
    inputs = posterior_of(shape, parameterization, prior, (dtype, dtype), (layout, "contiguous"))
    check_posterior(inputs, parameterization, reduction, bool(noise))


@pytest.mark.parametrize(
    "case",
    drawn(product(LIKELIHOOD_CASES, SHAPES), DTYPES, REDUCTIONS, DRAWN, DRAWN, WEIGHTS)
    + [
        (case, shape, dtypes, reduction, *rest)
        for case, dtypes, reduction, shape, *rest in drawn(
            product(LIKELIHOOD_CASES, DTYPES, REDUCTIONS), SMALL, DRAWN, DRAWN, WEIGHTS
        )
    ],
    ids=str,
)
def test_reconstruction(case: tuple[Any, ...]) -> None:
    (likelihood, count), shape, dtypes, reduction, *layouts, weight = case
    recon, target, weights = reconstruction_of(likelihood, count, shape, dtypes, layouts, weight)
    check(vaefast.reconstruction_loss, [recon], target, likelihood=likelihood, reduction=reduction, weight=weights)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", [case for case in LIKELIHOOD_CASES if case[1] > 1], ids=str)
@pytest.mark.parametrize("shape", [(), (33,), (1, 33), (3, 1)], ids=str)
def test_parameters_broadcast(case: tuple[str, int], shape: tuple[int, ...], reduction: str) -> None:
    """All but the first parameter may be smaller."""
    likelihood, count = case
    data = training(likelihood, count, (3, 33), shapes=[(3, 33), *[shape] * (count - 1)])
    check(vaefast.reconstruction_loss, [list(data.recon)], data.target, likelihood=likelihood, reduction=reduction)


ELBO_SHAPES = (
    ((4, 7), (4, 3)),
    ((3, 4099), (3, 20)),
    ((33, 5), (33, 130)),
    ((1, 12293), (1, 4097)),
    ((300, 3), (300, 2)),
    ((2, 0), (2, 3)),
    ((2, 5), (2, 0)),
    ((0, 5), (0, 3)),
)


@pytest.mark.parametrize("function", [vaefast.elbo_loss, vaefast.elbo_terms])
@pytest.mark.parametrize(
    "case",
    drawn(
        product(LIKELIHOOD_CASES, ELBO_REDUCTIONS, DTYPES),
        ELBO_SHAPES,
        FLOATING,
        list(PARAMETERIZATIONS),
        PRIORS,
        DRAWN,
        DRAWN,
        WEIGHTS,
        (1.0, 0.25),
    ),
    ids=str,
)
def test_elbo(function: Callable[..., Any], case: tuple[Any, ...]) -> None:
    (likelihood, count), reduction, dtypes, shapes, dtype, parameterization, prior, *layouts, weight, beta = case
    recon, target, weights = reconstruction_of(likelihood, count, shapes[0], dtypes, layouts, weight)
    latent = posterior_of(shapes[1], parameterization, prior, (dtype, dtype), layouts)

    options = {"likelihood": likelihood, "parameterization": parameterization, "reduction": reduction, "beta": beta}
    check(function, [recon, *latent], target, weight=weights, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", LONG_ROWS, ids=str)
def test_sums_of_long_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Each row's sum is put together from several warps of several blocks."""
    for reduction in ("per_sample", "batchmean"):
        latent = posterior_of(shape, "logvar", "none", (dtype,) * 2, ("contiguous",) * 2)[:2]
        check(vaefast.gaussian_kl, latent, reduction=reduction)
        recon, target, _ = reconstruction_of("gaussian", 2, shape, (dtype,) * 2, ("contiguous",) * 2, "none")
        check(vaefast.reconstruction_loss, [recon], target, likelihood="gaussian", reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_units_of_a_long_sum_in_16_bits(dtype: torch.dtype, launches: Callable[[], list[Any]]) -> None:
    """Twice as long as others, where a row is long enough for all of a GPU's multiprocessors."""
    n = (1 << 21) + 8200
    mu, raw = posterior_of((n,), "logvar", "none", (dtype,) * 2, ("contiguous",) * 2)[:2]
    kl, z = vaefast.gaussian_kl(mu, raw, reduction="sum"), vaefast.reparameterize(mu, raw)
    assert z.isfinite().all()
    assert_right("result", kl, reference.gaussian_kl(mu.double(), raw.double(), reduction="sum"), ARITHMETIC[kl.dtype])
    assert [launch.blocks for launch in launches()] == [-(-n // 8192), -(-n // 4096)]


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_sums_row_after_row(dtype: torch.dtype) -> None:
    """The last block's warps share a row's partial sums, then the next row's. Few orders let a warp get a row ahead of
    the first, so there are many launches."""
    mu, raw = posterior_of((2, 33000), "logvar", "none", (dtype,) * 2, ("contiguous",) * 2)[:2]
    exact = reference.gaussian_kl(mu, raw, reduction="per_sample")
    for _ in range(24):
        assert_right("result", vaefast.gaussian_kl(mu, raw, reduction="per_sample"), exact, ARITHMETIC[dtype])


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_boundaries(size: int, dtype: torch.dtype) -> None:
    """Plain contiguous tensors, whose memory ends with their last element, and starts as NaN."""
    inputs = posterior_of((size,), "logvar", "full", (dtype,) * 2, ("contiguous",) * 2)
    check(vaefast.sample_with_kl, inputs, reduction="none", noise=True)
    recon, target, weight = reconstruction_of("gaussian", 2, (size,), (dtype,) * 2, ("contiguous",) * 2, "full")
    check(vaefast.reconstruction_loss, [recon], target, weight=weight, likelihood="gaussian", reduction="none")


# Around a line of 16 bytes, a warp's lines, and a block's two rounds of them; the last rows take several blocks.
PLAIN_ROWS = (
    *((2, n) for n in (8, 16, 248, 256, 264, 504, 512, 520, 1016, 2040, 2048, 2056, 4088, 4096, 4104, 6152, 8200)),
    (16,), (1032,), (4104,), (65544,), (300, 16), (40, 520),
)  # fmt: skip
PLAIN_DTYPES = [dtype for dtype in FLOATING if dtype != torch.float64]


def only(launches: Callable[[], list[Any]], before: int, kernel: str) -> None:
    """What was launched since then has all run that kernel's work."""
    names = [launch.kernel for launch in launches()[before:]]
    assert names and all(kernel in name for name in names), names


@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "chunk 1"])
@pytest.mark.parametrize("shape", PLAIN_ROWS, ids=str)
def test_plain_posterior(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, launches: Callable[[], list[Any]]
) -> None:
    parameterization = list(PARAMETERIZATIONS)[sum(shape) // 8 % len(PARAMETERIZATIONS)]
    inputs = posterior_of(shape, parameterization, "none", (dtype,) * 2, (layout,) * 2)[:2]
    options = {"parameterization": parameterization}
    mu, raw = (t.detach().requires_grad_() for t in inputs)
    for reduction in ("sum", "per_sample") if len(shape) > 1 else ("batchmean",):
        check(vaefast.sample_with_kl, inputs, **options, reduction=reduction, noise=True)
        check(vaefast.gaussian_kl, inputs, **options, reduction=reduction)
        before = len(launches())
        vaefast.sample_with_kl(mu, raw, **options, reduction=reduction)
        vaefast.gaussian_kl(mu, raw, **options, reduction=reduction)
        only(launches, before, "PlainForward<")
    check(vaefast.reparameterize, inputs, **options, noise=True)
    before = len(launches())
    z, kl = vaefast.sample_with_kl(mu, raw, **options, reduction="sum")
    torch.autograd.grad((z, kl), (mu, raw), (torch.ones_like(z), torch.ones_like(kl)))
    only(launches, before, "Plain")


@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", drawn([case for case in LIKELIHOOD_CASES if "planes" not in LIKELIHOODS[case[0]].domains], PLAIN_ROWS)
    + drawn(product([("bernoulli", 1), ("gaussian", 2)]), PLAIN_ROWS), ids=str
)  # fmt: skip
def test_plain_reconstruction(case: tuple[Any, ...], dtype: torch.dtype, launches: Callable[[], list[Any]]) -> None:
    """With a KL and alone: the loss and its gradients, also those that float16 leaves to backward."""
    likelihood, count, shape = case if len(case) == 3 else (*case[0], case[1])
    recon, target, _ = reconstruction_of(likelihood, count, shape, (dtype,) * 2, ("contiguous",) * 2, "none")
    latent = posterior_of((*shape[:-1], 16), "logvar", "none", (dtype,) * 2, ("contiguous",) * 2)[:2]
    for reduction in ("sum", "per_sample") if len(shape) > 1 else ("sum",):
        check(vaefast.reconstruction_loss, [recon], target, likelihood=likelihood, reduction=reduction)
        check(vaefast.elbo_loss, [recon, *latent], target, likelihood=likelihood, reduction=reduction)
    leaves = [t.detach().requires_grad_() for t in (*recon, *latent)]
    before = len(launches())
    loss = vaefast.elbo_loss(leaves[:-2], target, *leaves[-2:], likelihood=likelihood, reduction="sum")
    only(launches, before, "PlainReconstruction<")
    torch.autograd.grad(loss, leaves)
    if dtype == torch.float16:
        only(launches, before, "PlainReconstruction<")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shapes", [((1027, 8), (1027, 4)), ((1300, 3), (1300, 1)), ((1030, 0), (1030, 4))], ids=str)
def test_many_rows(shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, launches: Callable[[], list[Any]]) -> None:
    """More rows than a block finishes have a launch of their own for it, and only they."""
    recon, target, _ = reconstruction_of("gaussian", 1, shapes[0], (dtype,) * 2, ("contiguous",) * 2, "none")
    latent = posterior_of(shapes[1], "logvar", "none", (dtype,) * 2, ("contiguous",) * 2)[:2]
    check(vaefast.elbo_loss, [recon, *latent], target, likelihood="gaussian", reduction="per_sample")
    check_lists(vaefast.multi_tensor_gaussian_kl, [[latent[0]] * 3, [latent[1]] * 3], reduction="per_sample")
    for rows, count in ((shapes[0][0], 2), (1024, 1)):
        before = len(launches())
        given = [t[:rows] for t in (*recon, target, *latent)]
        vaefast.elbo_loss(given[0], *given[1:], likelihood="gaussian", reduction="per_sample")
        assert len(launches()[before:]) == count


def test_many_long_rows() -> None:
    """Each has several partial sums."""
    mu = torch.linspace(-2, 2, 1025 * 4100).view(1025, 4100)
    raw = torch.zeros(1).expand(mu.shape)
    kl = vaefast.gaussian_kl(mu, raw, reduction="per_sample")
    assert_right("result", kl, 0.5 * mu.double().square().sum(1), ARITHMETIC[torch.float32] * 4100**0.5)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS[:2])
@pytest.mark.parametrize("classes", [1, 2, 3, 8, 10, 16, 17, 32, 33, 64, 255, 256, 300, 1024, 1500, 9000])
@pytest.mark.parametrize("dim", [1, -1])
def test_classes(dim: int, classes: int, weight: str, dtype: torch.dtype) -> None:
    """Next to each other or in planes; as many as a thread, a warp and a block hold at once, and more; sites around
    what a warp and a block take at once; one class that is none."""
    for sites in ((1,), (33,), (0, 5), (2, 9), (3, 4, 6), (2, 140)) if classes < 255 else ((1,), (2, 9)):
        shape = (*sites, classes) if dim == -1 else (sites[0], classes, *sites[1:])
        g = generator(classes)
        logits = (3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
        target = torch.randint(classes, sites, generator=g).to(dtype)
        target = target.clamp(max=256) if dtype == torch.bfloat16 else target
        target.view(-1)[-1:] = -1
        weights = None if weight == "none" else (torch.rand(sites, generator=g) * 2).floor().to(dtype)
        for reduction in ("none", "per_sample", "sum"):
            options: dict[str, Any] = {"likelihood": Likelihood("categorical", dim=dim), "reduction": reduction}
            check(vaefast.reconstruction_loss, [logits], target, weight=weights, **options)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_classes(layout: str, dtype: torch.dtype) -> None:
    """Sites may share their logits, or have them anywhere: those of several move together only where they lie so."""
    for sites, classes, dim in product(((2, 8), (3, 4, 6)), (3, 10, 33), (1, -1)):
        shape = (*sites, classes) if dim == -1 else (sites[0], classes, *sites[1:])
        g = generator(classes)
        logits = LAYOUTS[layout]((3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype))
        target = torch.randint(classes, sites, generator=g).to(dtype)
        for x in (target, LAYOUTS[layout](target)):
            likelihood = Likelihood("categorical", dim=dim)
            check(vaefast.reconstruction_loss, [logits], x, likelihood=likelihood, reduction="none")


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """Views of every kind: what can be moved as a whole pack is, and only that."""
    for shape in ((64,), (3, 32), (5, 7), (2, 3, 8)):
        for layouts in ((layout, layout), (layout, "contiguous"), ("contiguous", layout)):
            inputs = posterior_of(shape, "softplus", "full", (dtype,) * 2, layouts)
            check(vaefast.sample_with_kl, inputs, parameterization="softplus", reduction="none", noise=True)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(1, 30000), (3, 9001), (40, 33)], ids=str)
def test_same_bits_in_any_order(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Blocks, warps and threads run in another order every time; the sums are the same to the last bit."""
    latent = posterior_of(shape, "logvar", "none", (dtype,) * 2, ("contiguous",) * 2)[:2]
    recon, target, _ = reconstruction_of("gaussian", 2, shape, (dtype,) * 2, ("contiguous",) * 2, "none")
    for reduction in ("per_sample", "sum"):
        first, *others = (
            torch.stack(vaefast.elbo_terms(recon, target, *latent, likelihood="gaussian", reduction=reduction))
            for _ in range(5)
        )
        assert first.isfinite().all()
        for other in others:
            assert torch.equal(other, first), f"the {reduction} differs from run to run: {(other - first).tolist()}"


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every other"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 5), (3, 4099)], ids=str)
def test_kept_gradients(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """Scaled by the upstream gradient, left alone where it is 1, and right again when asked for twice."""
    recon, target, _ = reconstruction_of("gaussian", 2, shape, (dtype,) * 2, (layout, layout), "none")
    leaves = [t.detach().requires_grad_() for t in recon]
    wides = [t.detach().double().requires_grad_() for t in recon]
    loss = vaefast.reconstruction_loss(leaves, target, likelihood="gaussian", reduction="sum")
    exact = reference.reconstruction_loss(wides, target.double(), likelihood="gaussian", reduction="sum")
    wanted = torch.autograd.grad(exact, wides)
    tolerance = ARITHMETIC[torch.float64 if dtype == torch.float64 else torch.float32]
    for factor in (1.0, -3.0, 1.0, 0.5):
        upstream = torch.full_like(loss, factor)
        for a, e in zip(torch.autograd.grad(loss, leaves, upstream, retain_graph=factor != 0.5), wanted):
            assert_right(f"gradient times {factor}", a, factor * e, 3 * tolerance, roundings=2)


# by kinds: whole packs (also of half precision), single elements, views, none; more than one launch has room for
LISTS: dict[str, tuple[tuple[tuple[int, ...], str, torch.dtype], ...]] = {
    "one kind": tuple(((6, n), "contiguous", torch.float32) for n in (4, 8, 400, 1028, 16, 2500)),
    "odd sizes": tuple(((3, n), "contiguous", torch.float32) for n in (1, 7, 33, 4, 1025)),
    "none at first": (((4, 0), "contiguous", torch.float32), *[((4, n), "contiguous", torch.float32) for n in (8, 3)]),
    "none at all": (((4, 0), "contiguous", torch.float32),) * 2,
    "long": tuple(((2, 4 + 4 * (n % 3)), "contiguous", torch.float32) for n in range(300)),
    "mixed": tuple(
        ((5, n), layout, dtype)
        for n, layout, dtype in product(
            (8, 5), ("contiguous", "transposed", "offset 1"), (torch.float32, torch.bfloat16)
        )
    ),
    "one wide": (((5, 8), "contiguous", torch.float64), ((5, 12), "contiguous", torch.float32)),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists(name: str) -> None:
    """Each list against the reference in float64, and its samples against the reference's noise."""
    every = [posterior_of(shape, "logvar", "full", (dtype,) * 2, (layout,) * 2) for shape, layout, dtype in LISTS[name]]
    mus, raws, pms, plvs = (list(each) for each in zip(*(e[:4] for e in every)))
    for reduction in ("sum", "per_sample", "batchmean"):
        check_lists(vaefast.multi_tensor_gaussian_kl, [mus, raws, pms, plvs], reduction=reduction)
        check_lists(vaefast.multi_tensor_gaussian_kl, [mus, raws], reduction=reduction)
    check_lists(vaefast.multi_tensor_sample_with_kl, [mus, raws])


def check_lists(function: Callable[..., Any], lists: list[list[Tensor]], **options: Any) -> None:
    leaves = spread(lists, lambda t: t.detach().requires_grad_())
    wides = spread(lists, lambda t: t.detach().double().contiguous().requires_grad_())
    arithmetic = torch.float64 if any(t.dtype == torch.float64 for t in tensors(lists)) else torch.float32
    tolerance = ARITHMETIC[arithmetic]
    torch.manual_seed(2)
    ours = tensors(function(*leaves, **options))
    if function is vaefast.multi_tensor_sample_with_kl:
        tolerance += NOISE[arithmetic]
        torch.manual_seed(2)
        zeros = spread(lists[0], lambda t: torch.zeros_like(t, dtype=arithmetic))
        noise = philox_noises(zeros, [arithmetic] * len(zeros), None)
        exact = [m + (0.5 * r).exp() * e.double() for m, r, e in zip(*wides, noise)]
        exact.append(sum(reference.gaussian_kl(m, r, reduction="sum") for m, r in zip(*wides)))
    else:
        exact = tensors(getattr(reference, function.__name__)(*wides, **options))
    upstream = [(1.5 + torch.rand(o.shape, generator=generator(5 + k))).to(o.dtype) for k, o in enumerate(ours)]
    terms = max(1, sum(t.numel() for t in lists[0])) ** 0.5
    for k, (a, e) in enumerate(zip(ours, exact)):
        assert_right(f"result {k}", a, e, tolerance * (terms if a.dim() < 2 else 1))
    got = torch.autograd.grad(ours, tensors(leaves), upstream)
    wanted = torch.autograd.grad(exact, tensors(wides), [u.double() for u in upstream])
    for k, (a, e) in enumerate(zip(got, wanted)):
        assert_right(f"gradient {k}", a, e, tolerance, roundings=2)


@pytest.mark.parametrize(("name", "count"), [("one kind", 1), ("none at all", 1), ("odd sizes", 2), ("long", 3)])
def test_a_list_is_one_launch(name: str, count: int, launches: Callable[[], list[Any]]) -> None:
    """Forward and backward; one for each kind of tensors, and for every 128 of them."""
    every = [posterior_of(shape, "logvar", "none", (dtype,) * 2, (layout,) * 2) for shape, layout, dtype in LISTS[name]]
    mus, raws = ([e[k].detach().requires_grad_() for e in every] for k in range(2))
    torch.autograd.grad(vaefast.multi_tensor_gaussian_kl(mus, raws, reduction="sum"), mus + raws)
    names = [launch.kernel for launch in launches()]
    assert all("list_kernel" in name for name in names), names
    assert len(names) == (2 * count if name != "none at all" else 1), names
