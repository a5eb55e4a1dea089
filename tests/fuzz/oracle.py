"""What a case must give: outputs and gradients in float64, and how far a right result may be from each.

First come elementwise values, their derivatives and the bounds of both; options, weights and reductions are then
written out from the documentation, and take the bounds along. A number is *loose* where an input is infinite or so
large or small that its square may leave float32: there a result is right, to a ten thousandth, or not finite. It is
*free* where an input is NaN, where the derivative jumps, and beyond what the documentation promises of a likelihood.

Most results are within the least that any bound allows, a multiple of the number itself. So bounds, and what is loose
or free, are computed once they are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vaefast.reference import LIKELIHOODS

from . import formulas
from .cases import Case

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
# a rounding or two, and the least number beside 0
ROUNDING = {
    torch.float16: (2.0**-10, 2.0**-24), torch.bfloat16: (2.0**-7, 2.0**-126), torch.float32: (2.0**-22, 2.0**-125),
    torch.float64: (2.0**-50, 2.0**-1021),
}  # fmt: skip
NOISE = {torch.float32: 1e-5, torch.float64: 1e-12}
HUGE, TINY, EXPONENT = 1e15, 1e-30, 80.0


Rest = tuple[Tensor, Tensor, Tensor]


class Near:
    """Numbers in float64, and how near a result must be: ``relative`` of each number is the least of the bounds, which
    ``rest`` computes, with where the numbers are loose and where they are free."""

    def __init__(self, value: Tensor, relative: float, rest: Callable[[], Rest]) -> None:
        self.value, self.relative, self._of_rest = value, relative, rest

    @functools.cached_property
    def rest(self) -> Rest:
        return self._of_rest()

    @property
    def bound(self) -> Tensor:
        return self.rest[0]

    @property
    def loose(self) -> Tensor:
        return self.rest[1]

    @property
    def free(self) -> Tensor:
        return self.rest[2]

    def over(self, linear: Callable[[Tensor], Tensor]) -> Near:
        """Through a map that adds numbers up or copies them, as it does of bounds."""

        def some(mask: Tensor) -> Tensor:
            return linear(mask.double()) > 0

        return Near(linear(self.value), self.relative, lambda: (linear(self.bound), some(self.loose), some(self.free)))

    def __mul__(self, by: Tensor | float) -> Near:
        by = torch.as_tensor(by, dtype=torch.float64)
        value = times(by, self.value)

        def rest() -> Rest:
            return times(by.abs(), self.bound), self.loose.expand(value.shape), self.free.expand(value.shape)

        return Near(value, self.relative, rest)

    def __add__(self, other: Near) -> Near:
        def rest() -> Rest:
            return self.bound + other.bound, self.loose | other.loose, self.free | other.free

        return Near(self.value + other.value, min(self.relative, other.relative), rest)

    def rounded(self, dtype: torch.dtype) -> Near:
        """Stored in a dtype."""
        step, least = ROUNDING[dtype]
        found = self.wider(lambda: step * self.value.abs() + least)
        found.relative += step
        return found

    def wider(
        self,
        bound: Callable[[], Tensor | float] = lambda: 0.0,
        loose: Callable[[], Tensor | bool] = lambda: False,
        free: Callable[[], Tensor | bool] = lambda: False,
    ) -> Near:
        """The bounds with this added, and what is loose or free with that."""
        return Near(self.value, self.relative, lambda: (self.bound + bound(), self.loose | loose(), self.free | free()))


def near(value: Tensor, relative: float, rest: Callable[[], Rest]) -> Near:
    """What is not finite is loose; what is loose and finite is right to a ten thousandth."""
    value, shape = value.detach(), value.shape

    def of_rest() -> Rest:
        bound, loose, free = rest()
        loose = (loose | ~value.isfinite() | ~bound.isfinite()).expand(shape)
        bound = bound.detach().nan_to_num(0.0, 0.0, 0.0)
        least = 1e-4 * value.abs().nan_to_num(0.0, 0.0, 0.0) + TINY
        return torch.where(loose, bound.maximum(least), bound), loose, free.expand(shape)

    return Near(value, relative, of_rest)


def joined(parts: Sequence[Near], dim: int) -> Near:
    def rest() -> Rest:
        bound, loose, free = (torch.cat(each, dim) for each in zip(*(part.rest for part in parts)))
        return bound, loose, free

    return Near(torch.cat([part.value for part in parts], dim), min(part.relative for part in parts), rest)


def times(a: Tensor, b: Tensor) -> Tensor:
    """0 where a is, beside infinity too."""
    return torch.where(a == 0, 0.0, a * b)


def beyond(*tensors: Tensor) -> Tensor:
    return torch.stack([~(t.abs() <= HUGE) for t in torch.broadcast_tensors(*tensors)]).any(0)


def undefined(*tensors: Tensor) -> Tensor:
    return torch.stack([t.isnan() for t in torch.broadcast_tensors(*tensors)]).any(0)


@dataclass
class Terms:
    """Elementwise values and, by the inputs' names, derivatives: of the values' shape, but for a mixture's planes."""

    value: Near
    partials: dict[str, Near]


# ---- elementwise terms; inputs are float64, of one shape


def kl_terms(
    case: Case, q: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor], dtype: torch.dtype, reverse: bool
) -> Terms:
    """Of KL(q || p), or of KL(p || q)."""
    own = case.op == "packed" and case.prior != "none"  # which has the posterior's clamp
    of_prior = case.prior_parameterization if case.prior not in ("none", "mu only") else "logvar"
    computed = case.parameterization != "logvar" or case.floor > 0, of_prior != "logvar"
    # of a standard deviation that is computed, which is rounded itself
    through_std = (case.parameterization == "softplus" or case.floor > 0) + (of_prior == "softplus")
    lv, slope = logvar_and_slope(case.parameterization, q[1], case.clamp, case.floor)
    lvp, slope_p = logvar_and_slope(of_prior, p[1], case.clamp if own else None, 0.0)
    pair = ((q[0], lv), (p[0], lvp))
    (m, a), (n, b) = pair[::-1] if reverse else pair
    value, of_first, of_scale = formulas.kl_and_slopes(m, a, n, b)
    of_mean, of_prior_mean = (-of_first[0], of_first[0]) if reverse else (of_first[0], -of_first[0])
    of_lv, of_lvp = (of_scale, of_first[1]) if reverse else (of_first[1], of_scale)
    tolerance = TOLERANCE[dtype]
    least = 16 * ROUNDING[dtype][1]

    @functools.cache
    def parts() -> tuple[Tensor, ...]:
        apart = (a - b).abs().clamp(min=1.0)
        relative = tolerance * torch.where(apart.isinf(), 1.0, apart)
        # a log variance that is computed is rounded, and its distance from the other is known no better
        step = ROUNDING[dtype][0]
        of_lv, of_lvp = (x.abs().nan_to_num(0.0, 0.0) * c for x, c in zip((lv, lvp), computed))
        off = step * (of_lv + of_lvp + through_std)
        small, mass = torch.expm1(a - b).abs(), torch.exp(a - b)
        square = ((q[0] - p[0]) * torch.exp(-b / 2)) ** 2
        bound = relative * value.abs() + times(off, small + square) + times(off**2, mass)
        in_ratio = relative * small + times(off, mass)
        in_scale = in_ratio + relative * square + times(off, square)  # of what the means' distance is measured by
        in_mean = (relative + off) * of_mean.abs()
        inputs = torch.stack((q[0], q[1], p[0], p[1]))
        loose = ~(inputs.abs() <= HUGE).all(0) | (lv.abs() > EXPONENT) | (lvp.abs() > EXPONENT)
        loose = loose | ((lv - lvp).abs() > EXPONENT - 20)
        return bound, in_mean, in_ratio, in_scale, loose, inputs.isnan().any(0)

    def of_value() -> Rest:
        bound, *_, loose, free = parts()
        return bound + least, loose & ~free, torch.zeros_like(free)

    def rest_of(name: str, partial: Tensor) -> Callable[[], Rest]:
        def rest() -> Rest:
            _, in_mean, in_ratio, in_scale, loose, free = parts()
            if name.endswith("mu"):
                size = in_mean
            elif name == "raw":
                size = (in_scale if reverse else in_ratio) * slope.abs()
            else:
                size = (in_ratio if reverse else in_scale) * slope_p.abs()
            # of a slope that underflows a result has nothing, however large what it is multiplied by
            own = {"raw": slope, "prior_logvar": slope_p}.get(name, torch.ones(()))
            gone = (own != 0) & (own.abs() < torch.finfo(dtype).tiny)
            return size + least, loose, free | partial.isnan() | gone

        return rest

    partials = {
        "mu": of_mean, "raw": times(slope, of_lv), "prior_mu": of_prior_mean, "prior_logvar": times(slope_p, of_lvp)
    }  # fmt: skip
    return Terms(
        near(value, tolerance, of_value),
        {name: near(g, tolerance, rest_of(name, g)) for name, g in partials.items()},
    )


def logvar_and_slope(name: str, raw: Tensor, clamp: tuple[float, float] | None, floor: float) -> tuple[Tensor, Tensor]:
    if name == "logvar" and clamp is None and not floor:
        return raw, torch.ones((), dtype=torch.float64)
    leaf = raw.detach().clone().requires_grad_()
    found = formulas.logvar(name, leaf, clamp, floor)
    return found.detach(), torch.autograd.grad(found.sum(), leaf, materialize_grads=True)[0]


def sample_terms(case: Case, mu: Tensor, raw: Tensor, eps: Tensor, dtype: torch.dtype, drawn: bool) -> Terms:
    leaf = raw.detach().clone().requires_grad_()
    std = formulas.std(case.parameterization, leaf, case.clamp, case.floor)
    (slope,) = torch.autograd.grad(std.sum(), leaf)
    std = std.detach()
    noise = NOISE[dtype] if drawn else 0.0
    tolerance, least = TOLERANCE[dtype], 16 * ROUNDING[dtype][1]
    z = mu + std * eps

    @functools.cache
    def masks() -> tuple[Tensor, Tensor]:
        loose = beyond(mu, raw, eps, std) | ((std < TINY) & (std > 0)) | (slope > HUGE)
        return loose, undefined(mu, raw, eps)

    def of_value() -> Rest:
        loose, free = masks()
        bound = tolerance * (mu.abs() + (std * eps).abs()) + noise * std + least
        return bound, loose & ~free, torch.zeros_like(free)

    def of_raw() -> Rest:
        return (tolerance * eps.abs() + noise) * slope.abs() + least, *masks()

    def of_eps() -> Rest:
        return tolerance * std.expand(z.shape) + least, *masks()

    def of_mu() -> Rest:
        loose, free = masks()
        return torch.zeros_like(z), loose & False, free

    return Terms(
        near(z, tolerance, of_value),
        {
            "mu": near(torch.ones_like(z), 0.0, of_mu),
            "raw": near(eps * slope, tolerance, of_raw),
            "eps": near(std.expand(z.shape), tolerance, of_eps),
        },
    )


def nll_terms(case: Case, x: Tensor, params: list[Tensor], options: dict[str, float], dtype: torch.dtype) -> Terms:
    """Of the textbook's formula, wherever float64 is enough for it."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *params)]
    with torch.enable_grad():
        value = formulas.NLL[case.likelihood](*leaves, **options)
    gradients = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
    value = value.detach()
    tolerance, least = TOLERANCE[dtype], 16 * ROUNDING[dtype][1]

    @functools.cache
    def masks() -> tuple[Tensor, ...]:
        return nll_masks(case, x, params, value, dtype)

    def as_planes(mask: Tensor, like: Tensor) -> Tensor:
        return mask.unsqueeze(1) if like.dim() > mask.dim() else mask

    def of_value() -> Rest:
        loose, free, infinite, _ = masks()
        bound = tolerance * value.abs().clamp(min=1.0) + beyond_value(case, x, params, options, dtype)
        return bound, loose & ~free, infinite & ~free

    def rest_of(g: Tensor, at: Tensor) -> Callable[[], Rest]:
        def rest() -> Rest:
            loose, _, _, outside = masks()
            bound = tolerance * g.abs().clamp(min=1.0)
            # a mixture's shares are exponentials of log densities, as exact as those are small
            if "mixture" in case.likelihood:
                bound = bound * as_planes(value.abs().clamp(min=1.0), g)
            bound = bound + least + beyond_slope(case, at, dtype)
            return bound, as_planes(loose, g), as_planes(outside, g) | g.isnan()

        return rest

    names = ("target", *(f"recon{k}" for k in range(len(params))))
    return Terms(
        near(value, tolerance, of_value),
        {name: near(g, tolerance, rest_of(g, at)) for name, g, at in zip(names, gradients, (x, *params))},
    )


def nll_masks(
    case: Case, x: Tensor, params: list[Tensor], value: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sites that are loose; those with a NaN; whose value is free; and whose gradients are."""
    loose = beyond_domain(case, x, params)
    # a limit, if there is one, is docs/limits.md's to tell
    infinite = sites(case, [t.isinf() for t in (x, *params)]) & value.isnan()
    free = sites(case, [t.isnan() for t in (x, *params)])
    outside = value.isnan() | free
    if LIKELIHOODS[case.likelihood].support in ("count", "some of total"):  # of log-gammas that large nothing is left
        large = sites(case, [~(t.abs() <= 1e9) for t in (x, *params)])
        if "total" in LIKELIHOODS[case.likelihood].domains:
            large = large | (params[LIKELIHOODS[case.likelihood].domains.index("total")] < 1) | (x > 0) & (x < 1e-6)
        outside, infinite = outside | large, infinite | large
        # and its gradients, next to a pole that they lack at 0, are no whole number's
        outside = outside | sites(
            case, [(x > 0) & (x < 1e-6), *(torch.zeros_like(p, dtype=torch.bool) for p in params)]
        )
    # beyond what is promised, where the square is no normal number there may be few digits of which a gradient is made
    domains, least_root = LIKELIHOODS[case.likelihood].domains, torch.finfo(dtype).tiny ** 0.5
    tiny = [(p != 0) & (p.abs() < least_root) & (d == "positive") for p, d in zip(params, domains)]
    outside = outside | sites(case, [x != x, *tiny])
    # 0 is no positive number's; what limit there is is docs/limits.md's to tell
    none = sites(case, [x != x, *((p == 0) & (d == "positive") for p, d in zip(params, domains))])
    if LIKELIHOODS[case.likelihood].planes:
        none = none | sites(case, [x.abs() > HUGE, *(p.abs() > HUGE for p in params)])
    outside, infinite = outside | none, infinite | none
    if case.likelihood == "student_t":  # from there on it is a Gaussian, however far its tails
        gaussian = sites(case, [x != x, params[2] > 1e30])
        outside, infinite = outside | gaussian, infinite | gaussian
    if "floor" in LIKELIHOODS[case.likelihood].options:
        # a scale whose inverse leaves float32 is no number's to be held to
        scales = params[1:] if case.likelihood == "discretized_logistic" else params
        far = sites(case, [x != x, *(p.abs() > EXPONENT / 2 for p in scales)])
        outside, infinite = outside | far, infinite | far
    return loose, free, infinite, outside


def beyond_value(
    case: Case, x: Tensor, params: list[Tensor], options: dict[str, float], dtype: torch.dtype
) -> Tensor | float:
    """What may be added to the bound on a value: e^r and r x of a Poisson cancel, and are each rounded; so do the terms
    of a count without log x!, which are as large as that; and the PyTorch engine's log-gammas in float64."""
    found: Tensor
    if case.likelihood == "poisson":
        found = ROUNDING[dtype][0] * (torch.exp(params[0]) + (params[0] * x).abs())
    elif not options.get("constant", 1.0) and LIKELIHOODS[case.likelihood].support == "count":
        found = ROUNDING[dtype][0] * torch.lgamma(x.abs() + 1)
    elif case.likelihood == "beta_binomial" and case.engine == "reference" and dtype == torch.float64:
        total = params[0] + params[1] + params[2]
        found = 4 * 2.0**-53 * torch.lgamma(total.abs() + 1)  # as many as that large are added up
    else:
        return 0.0
    return found.nan_to_num(0.0, 0.0, 0.0)


def beyond_slope(case: Case, at: Tensor, dtype: torch.dtype) -> Tensor | float:
    """And on one of its gradient: the digammas of what is next to 0, which cancel in float64, the PyTorch engine's and
    those here; and those of a gamma's concentration beyond what is promised, beside data over their mean."""
    if case.likelihood == "gamma":
        return torch.where(at.abs() < 1e-9, TOLERANCE[dtype] / at.abs(), 0.0).nan_to_num(0.0, 0.0, 0.0)
    whole = LIKELIHOODS[case.likelihood].support in ("count", "some of total")
    if not whole:
        return 0.0
    return (ROUNDING[torch.float64][0] / at.abs()).nan_to_num(0.0, 0.0, 0.0)


def sites(case: Case, masks: list[Tensor]) -> Tensor:
    """Where any of the masks is, of which a mixture's have planes."""
    if LIKELIHOODS[case.likelihood].planes:
        least = min(mask.dim() for mask in masks)
        least -= "channels" in LIKELIHOODS[case.likelihood].options  # whose data have planes, too
        masks = [mask.any(1) if mask.dim() > least else mask for mask in masks]
    return torch.stack(torch.broadcast_tensors(*masks)).any(0)


def beyond_domain(case: Case, x: Tensor, params: list[Tensor]) -> Tensor:
    """Where an argument is larger, or a scale or a rate smaller, than what the documentation promises."""
    domains = LIKELIHOODS[case.likelihood].domains
    found = []
    for p, domain in zip(params, domains):
        far = ~(p.abs() <= HUGE)
        if domain == "log":
            far = far | (p.abs() > EXPONENT / 2)
        elif domain in ("positive", "total"):
            far = far | ~((p >= 1e-9) & (p <= 1e9))
        elif domain == "planes":
            far = far | (p.abs() > 1e4)
        found.append(far)
    if LIKELIHOODS[case.likelihood].support in ("count", "some of total"):
        found.append(~(x.abs() <= 1e9) | (x > 0) & (x < 1e-6))
    elif LIKELIHOODS[case.likelihood].support in ("positive", "at least 0"):
        zero = (x == 0) & (LIKELIHOODS[case.likelihood].support == "at least 0")
        found.append(~((x >= TINY) & (x <= HUGE) | zero))
    else:
        found.append(~(x.abs() <= HUGE))
    return sites(case, found)


# ---- options and reductions


def reduced(x: Tensor, reduction: str, batch_dims: int) -> Tensor:
    if reduction == "none":
        return x
    if reduction in ("sum", "mean"):
        return x.sum() if reduction == "sum" else x.mean()
    rows = x.flatten(batch_dims).sum(-1) if x.dim() > batch_dims else x
    return rows if reduction == "per_sample" else rows.mean()


@dataclass
class Reduced:
    """An output, and of upstream gradients the elementwise terms' factors, with where those may jump, if they do."""

    out: Near
    factor: Callable[[Tensor], tuple[Tensor, Tensor | None]]


def plain(value: Near, weight: Tensor | None, reduction: str, batch_dims: int) -> Reduced:
    weighted = value if weight is None else value * weight
    count = {"mean": weighted.value.numel(), "batchmean": _rows(weighted.value, batch_dims)}.get(reduction, 1)

    def factor(upstream: Tensor) -> tuple[Tensor, None]:
        found = upstream / max(1, count)
        if reduction != "none":
            found = _spread(found, weighted.value, batch_dims)
        return (found if weight is None else found * weight), None

    return Reduced(weighted.over(lambda t: reduced(t, reduction, batch_dims)), factor)


def bent(case: Case, value: Near, weight: Tensor | None, tolerance: float) -> Reduced:
    """The KL's free bits or capacity."""
    bd, reduction, floor = case.batch_dims, case.reduction, case.free_bits
    weighted = value if weight is None else value * weight
    leaf = weighted.value.detach().clone().requires_grad_()
    size = weighted.bound
    if case.capacity is not None:
        C = case.capacity
        at = reduced(leaf, "per_sample" if reduction == "per_sample" else "batchmean", bd)
        margin = reduced(size, "per_sample" if reduction == "per_sample" else "batchmean", bd)
        unsure = ~((at - C).abs() > margin + 1e-6 * C)
        out = (at - C).abs()
        if reduction == "sum":  # of an empty batch, whose mean is none, 0
            out = out * _rows(leaf, bd) if _rows(leaf, bd) else leaf.sum()
        doubt = weighted.loose.any() if unsure.dim() == 0 else _some(weighted.loose, bd)
        spread = _spread(unsure.detach() | doubt, leaf, bd)
    elif case.free_bits_per == "dim":
        # an elementwise KL may be rounded to what it is stored in before it meets the floor
        stored = max(ROUNDING[getattr(torch, name)][0] for name in case.dtypes) if reduction == "none" else 0.0
        unsure = ~((leaf - floor).abs() > size + (1e-6 + stored) * floor)
        out = reduced(torch.where(leaf <= floor, floor, leaf), reduction, bd)
        spread = unsure.detach() | weighted.loose
    elif case.free_bits_per == "sample":
        rows, margin = reduced(leaf, "per_sample", bd), reduced(size, "per_sample", bd)
        unsure = ~((rows - floor).abs() > margin + 1e-6 * floor)
        rows = torch.where(rows <= floor, floor, rows)
        out = rows if reduction == "per_sample" else rows.sum() if reduction == "sum" else rows.mean()
        spread = _spread(unsure.detach() | _some(weighted.loose, bd), leaf, bd)
    else:
        batch = _rows(leaf, bd)
        sums = (leaf.flatten(0, bd - 1) if bd > 1 else leaf).sum(0)
        margin = (size.flatten(0, bd - 1) if bd > 1 else size).sum(0)
        unsure = ~((sums - floor * batch).abs() > margin + 1e-6 * floor * batch)
        total = torch.where(sums <= floor * batch, floor * batch, sums).sum()
        out = total if reduction == "sum" else total / batch if batch else total * torch.nan
        columns = (weighted.loose.flatten(0, bd - 1) if bd > 1 else weighted.loose).any(0)
        spread = (unsure.detach() | columns).expand(leaf.shape)

    def factor(upstream: Tensor) -> tuple[Tensor, Tensor]:
        (found,) = torch.autograd.grad(out, leaf, upstream, retain_graph=True, materialize_grads=True)
        return (found if weight is None else found * weight), spread

    sizes = weighted.over(lambda t: reduced(t, reduction, bd))
    found = out.detach()
    return Reduced(Near(found, tolerance, lambda: (sizes.bound + tolerance * found.abs(), *sizes.rest[1:])), factor)


def _some(mask: Tensor, batch_dims: int) -> Tensor:
    """Of each sample, whether anything is."""
    return reduced(mask.double(), "per_sample", batch_dims) > 0


def _rows(x: Tensor, batch_dims: int) -> int:
    rows = 1
    for n in x.shape[:batch_dims]:
        rows *= n
    return rows


def _spread(mask: Tensor, like: Tensor, batch_dims: int) -> Tensor:
    """Of rows, or of all, to the elements."""
    if mask.dim() == 0:
        return mask.expand(like.shape)
    return mask.reshape(*mask.shape, *(1,) * (like.dim() - batch_dims)).expand(like.shape)
