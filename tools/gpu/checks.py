"""What a GPU's results are held against: float64, the CPU's noise, and themselves.

A check gives errors in units of what is allowed, by what was looked at: above 1 is wrong, infinite where a number meets
NaN or a shape another.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import sanitize  # noqa: E402
import torch  # noqa: E402
from inputs import draws, posterior, training  # noqa: E402
from torch import Tensor  # noqa: E402

import vaefast  # noqa: E402
from benchmarks.providers import captured  # noqa: E402
from vaefast import reference  # noqa: E402

Errors = dict[str, float]
Check = Callable[[str], Errors]

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 0.0}
HUGE = (1 << 25) + 12  # elements, beyond which units grow (kMaxUnits in csrc/cuda/kernel.cuh)


def arithmetic(dtype: torch.dtype, length: float = 1.0) -> float:
    """What the arithmetic for a dtype may be off by, relative above 1, absolute below; in a sum of so many terms."""
    return (1e-13 if dtype == torch.float64 else 2e-6) * math.sqrt(max(1.0, length))


def recovered(dtype: torch.dtype) -> float:
    """The same where noise takes part that is known from the sample that it went into alone."""
    return max(1e-10 if dtype == torch.float64 else 1e-4, 30 * ROUNDING[dtype])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def error(got: Tensor, exact: Tensor, tolerance: float, roundings: int) -> float:
    """The largest, in units of the tolerance and so many roundings to the dtype of what was got. The tolerance is
    relative, but below 1, or the largest value where that is less, it is what it is there."""
    if got.shape != exact.shape:
        return math.inf
    e = exact.detach()
    if not e.numel():
        return 0.0
    g = got.detach().to(e.device, torch.float64)
    floor = e.abs().nan_to_num(0).amax().clamp(max=1)
    smallest = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    allowed = tolerance * e.abs().clamp(min=floor) + roundings * (ROUNDING[got.dtype] * e.abs() + smallest)
    same = (g == e) | (g.isnan() & e.isnan())
    off = torch.where(same, torch.zeros_like(e), (g - e).abs() / allowed).nan_to_num(math.inf, math.inf)
    return off.max().item()


def errors(got: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float, roundings: int = 3) -> float:
    if len(got) != len(exact):
        return math.inf
    return max((error(g, e, tolerance, roundings) for g, e in zip(got, exact)), default=0.0)


def mapped(x: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor in it replaced."""
    if isinstance(x, (tuple, list)):
        return type(x)(mapped(y, f) for y in x)
    return f(x) if isinstance(x, Tensor) else x


class Wide:
    """The counterparts in float64 on the CPU, one for each tensor, and leaves where those are."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, t: Tensor) -> Tensor:
        if id(t) not in self._known:
            wide = t.detach().cpu()
            exact = wide.double() if wide.is_floating_point() or wide.dtype == torch.bool else wide
            self._known[id(t)] = t, exact.requires_grad_(t.requires_grad)
        return self._known[id(t)][1]


def single(case: sanitize.Case) -> Check:
    """Outputs and gradients of one call."""

    def check(device: str) -> Errors:
        call, wide = sanitize.call_of(case, device), Wide()
        outputs = call()
        upstream = [torch.full_like(o, case.pick((1.0, 1.5))) for o in outputs]
        got = torch.autograd.grad(outputs, call.leaves, upstream)
        options = {key: mapped(value, wide) for key, value in call.options.items()}
        exact = replace(call, args=mapped(call.args, wide), options=options)
        tolerance = noisy = arithmetic(case.dtype)
        if call.function in ("reparameterize", "sample_with_kl") and "eps" not in options:
            mu, raw = (t.detach() for t in exact.args[:2])
            std = reference.PARAMETERIZATIONS[options["parameterization"]].std(raw)
            options["eps"] = (wide(outputs[0]).detach() - mu) / std
            noisy = recovered(case.dtype)
        wanted = exact(reference)
        leaves = [wide(t) for t in call.leaves]
        gradients = torch.autograd.grad(wanted, leaves, [wide(u) for u in upstream], allow_unused=True)
        zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients)]
        count = max(t.numel() for t in leaves)
        off = 0.0
        for allowed, roundings, results, truth in ((tolerance, 1, outputs, wanted), (2 * noisy, 3, got, zeros)):
            for g, e in zip(results, truth):
                summed = math.sqrt(max(1.0, count / max(1, g.numel())))
                off = max(off, error(g, e, allowed * summed, roundings))
        return {"": off}

    return check


def same_noise(device: str) -> Errors:
    """The CPU's, whatever the seed and the counter's words hold."""
    seeds = ((0, 0), (-1, 7), (12345, 2**32 - 2), (2**63 - 1, 2**62))
    return {
        name_of(dtype): max(
            (draws(seed, shape, dtype) - draws(seed, shape, dtype, device).cpu()).abs().max().item() / allowed
            for seed in seeds
            for shape in ((5,), (4097,), (1001, 100))
        )
        for dtype, allowed in ((torch.float32, 1e-5), (torch.float64, 1e-13))
    }


def lists(device: str) -> Errors:
    """Many posteriors in one call, more than a launch takes (kListed in csrc/cuda/list.cuh) among them."""
    found: Errors = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        many = 131 if dtype == torch.float32 else 9
        kinds = {"packs": [4 * n for n in range(1, many + 1)], "odd": list(range(1, 12)), "one": [4]}
        for kind, sizes in kinds.items():
            label = f"{len(sizes)} {kind}, {name_of(dtype)}"
            found |= {f"{label}, {what}": off for what, off in of_list(sizes, dtype, device).items()}
    return found


def of_list(sizes: Sequence[int], dtype: torch.dtype, device: str) -> Errors:
    parts = [posterior((32, n), prior="full", dtype=dtype, device=device, seed=n).leaves() for n in sizes]
    mus, raws = [p.mu for p in parts], [p.raw for p in parts]
    prior_mus, prior_logvars = (list(column) for column in zip(*(p.prior for p in parts)))
    every = [*mus, *raws, *prior_mus, *prior_logvars]
    wide = [t.detach().double().cpu().requires_grad_() for t in every]
    n = len(sizes)
    wide_mus, wide_raws = wide[:n], wide[n : 2 * n]
    tolerance = arithmetic(dtype)
    summed = arithmetic(dtype, sum(sizes))

    kl = vaefast.multi_tensor_gaussian_kl(mus, raws, prior_mus, prior_logvars, reduction="per_sample")
    got = torch.autograd.grad(kl.sum() * 1.5, every)
    quads = zip(wide_mus, wide_raws, wide[2 * n : 3 * n], wide[3 * n :])
    exact = torch.stack([reference.gaussian_kl(*quad, reduction="per_sample") for quad in quads]).sum(0)
    wanted = torch.autograd.grad(exact.sum() * 1.5, wide)
    found = {"kl": error(kl, exact, summed, 1), "gradients of kl": errors(got, wanted, 2 * tolerance)}

    zs, kl = vaefast.multi_tensor_sample_with_kl(mus, raws, 0.25, -0.5, reduction="per_sample")
    got = torch.autograd.grad([*zs, kl], [*mus, *raws], [*(torch.full_like(z, 0.5) for z in zs), kl * 0 + 1.5])
    noise = [((z.detach().double().cpu() - m) / torch.exp(r / 2)).detach() for z, m, r in zip(zs, wide_mus, wide_raws)]
    again = [reference.reparameterize(m, r, eps=e) for m, r, e in zip(wide_mus, wide_raws, noise)]
    beside = [reference.gaussian_kl(m, r, 0.25, -0.5, reduction="per_sample") for m, r in zip(wide_mus, wide_raws)]
    total = 0.5 * torch.stack([z.sum() for z in again]).sum() + 1.5 * torch.stack(beside).sum()
    wanted = torch.autograd.grad(total, wide[: 2 * n])
    found["kl beside samples"] = error(kl, torch.stack(beside).sum(0), summed, 1)
    found["gradients of samples"] = errors(got, wanted, recovered(dtype))
    eps = torch.cat([e.flatten() for e in noise])
    found["mean of noise"] = abs(eps.mean().item()) * eps.numel() ** 0.5 / 6
    return found


def packed(device: str) -> Errors:
    """Mean and log variance as the halves of one tensor, whose gradient is one tensor."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((4, 8, 16, 16), (3, 6, 5, 7)):
            moments = torch.randn(shape, device=device).to(dtype).requires_grad_()
            z, kl = vaefast.DiagonalGaussian(moments).sample_with_kl(reduction="batchmean")
            got = torch.autograd.grad(z.sum() + 1.5 * kl, moments)
            wide = moments.detach().double().cpu().requires_grad_()
            mean, logvar = wide.chunk(2, 1)
            eps = ((z.detach().double().cpu() - mean) / torch.exp(logvar / 2)).detach()
            exact_z, exact_kl = reference.sample_with_kl(mean, logvar, eps=eps, reduction="batchmean")
            wanted = torch.autograd.grad(exact_z.sum() + 1.5 * exact_kl, wide)
            tolerance = recovered(dtype)
            off = max(error(kl, exact_kl, tolerance, 1), errors(got, wanted, tolerance))
            found[f"{'x'.join(map(str, shape))}, {name_of(dtype)}"] = off
    return found


def same_bits(device: str) -> Errors:
    """A sum has the same bits every time; one that a block left its counter at would differ from the second on."""
    found = {}
    for rows, cols in ((1, 2_000_000), (3, 300_000), (3000, 70), (128, 784)):
        p = posterior((rows, cols), device=device)

        def kl(p: Any = p) -> Tensor:
            return vaefast.gaussian_kl(p.mu, p.raw, reduction="per_sample")

        first = kl()
        differ = any(not torch.equal(first, kl()) for _ in range(200 if device == "cuda" else 3))
        exact = reference.gaussian_kl(p.mu.double().cpu(), p.raw.double().cpu(), reduction="per_sample")
        found[f"{rows} x {cols}"] = math.inf if differ else error(first, exact, arithmetic(torch.float32, cols), 1)
    return found


def huge(device: str) -> Errors:
    """More elements than units of the usual length; against float64 on the same device."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        n = HUGE if device == "cuda" else 1 << 16
        mu, raw, x = torch.randn(n, device=device), torch.randn(n, device=device), torch.rand(n, device=device)
        leaves = [t.to(dtype).requires_grad_() for t in (mu, raw)]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        kl, exact = vaefast.gaussian_kl(*leaves, reduction="mean"), reference.gaussian_kl(*wide, reduction="mean")
        got, wanted = torch.autograd.grad(kl * n, leaves), torch.autograd.grad(exact * n, wide)
        off = max(error(kl, exact, arithmetic(dtype), 1), errors(got, wanted, 2 * arithmetic(dtype)))
        found[f"kl, {name_of(dtype)}"] = off
        target = x.to(dtype)
        loss = vaefast.reconstruction_loss(leaves[0], target, reduction="mean")
        exact = reference.reconstruction_loss(wide[0], target.double(), reduction="mean")
        got, wanted = torch.autograd.grad(loss * n, leaves[:1]), torch.autograd.grad(exact * n, wide[:1])
        off = max(error(loss, exact, arithmetic(dtype), 1), errors(got, wanted, 2 * arithmetic(dtype)))
        found[f"bernoulli, {name_of(dtype)}"] = off
    return found


def graph(device: str) -> Errors:
    """A whole step, captured once and replayed: noise that is new and known to backward, losses that are right. On the
    CPU, which has no graphs, the step done again."""
    data, latents = training("bernoulli", 1, (128, 784)), posterior((128, 20), device=device).leaves()
    mu, raw, recon = latents.mu, latents.raw, data.recon[0].to(device).requires_grad_()
    target = data.target.to(device)

    def step() -> tuple[Tensor, ...]:
        z, loss = vaefast.reparameterize(mu, raw), vaefast.elbo_loss(recon, target, mu, raw)
        return (z, loss, *torch.autograd.grad(loss * 1.5 + z.square().sum(), (mu, raw, recon)))

    replay, results = step, tuple[Tensor, ...]()
    if device == "cuda":
        whole, results = captured(step)
    seen: list[Tensor] = []
    off = 0.0
    for _ in range(3):
        if results:
            whole.replay()
            z, loss, *got = (t.detach().clone() for t in results)
        else:
            z, loss, *got = replay()
        wide = [t.detach().double().cpu().requires_grad_() for t in (mu, raw, recon)]
        eps = ((z.detach().double().cpu() - wide[0]) / torch.exp(wide[1] / 2)).detach()
        again = reference.reparameterize(wide[0], wide[1], eps=eps)
        exact = reference.elbo_loss(wide[2], target.double().cpu(), wide[0], wide[1])
        wanted = torch.autograd.grad(exact * 1.5 + again.square().sum(), wide)
        off = max(off, error(loss, exact, 2e-5, 1), errors(got, wanted, 1e-4))
        off = math.inf if any(torch.equal(z, other) for other in seen) else off
        seen.append(z)
    return {"": off}


def beside(function: Callable[..., Any], arguments: Sequence[Tensor], device: str, length: float = 1.0) -> float:
    """What a function that draws nothing is off by, values and gradients, of what PyTorch makes of it in float64; its
    sums have so many terms."""
    leaves = [t.detach().to(device).requires_grad_() for t in arguments]
    wide = [t.detach().double().requires_grad_() for t in arguments]

    def found(leaves: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        result = function(*leaves)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        return outputs, torch.autograd.grad(outputs, leaves, [torch.full_like(o, 1.5) for o in outputs])

    outputs, got = found(leaves)
    with vaefast.use_backend("reference"):
        exact, wanted = found(wide)
    tolerance = arithmetic(arguments[0].dtype, length)
    return max(errors(outputs, exact, tolerance, 1), errors(got, wanted, 4 * tolerance))


def categorical(device: str) -> Errors:
    """KLs, and one-hot samples as often as their classes are probable, within six standard errors."""
    found = {}
    for classes, dim, dtype in (
        (32, -1, torch.float32),
        (255, -1, torch.bfloat16),
        (3000, -1, torch.float32),
        (10, 1, torch.float64),
    ):
        shape = (7, classes, 6) if dim == 1 else (7, 6, classes)
        q, p = (2 * torch.randn(shape, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (0, 1))

        def kl(q: Tensor, p: Tensor, dim: int = dim) -> Tensor:
            return vaefast.categorical_kl(q, p, dim=dim, unimix=0.01, reduction="none")

        label = f"{classes} classes, {name_of(dtype)}"
        found[label] = beside(kl, (q, p), device, classes)
        draws = 20_000
        logits = q.flatten()[:30].to(device).expand(draws, -1)
        z, _ = vaefast.sample_with_categorical_kl(logits, None)
        chances = torch.softmax(logits[0].double().cpu(), 0)
        counts, spread = z.double().sum(0).cpu(), (draws * chances * (1 - chances)).sqrt()
        off = ((counts - draws * chances).abs() / (6 * spread + 1)).max().item()
        found[f"{label}, draws"] = off if ((z == 0) | (z == 1)).all() and (z.sum(1) == 1).all() else math.inf
    return found


def several_draws(device: str) -> Errors:
    """Log importance weights under N(0, I) and under a prior of tensors."""
    found = {}
    for shape in ((5, 4, 20), (600, 3, 7), (2, 3, 1000)):
        for dtype in (torch.float32, torch.float64):
            z, mu, logvar, prior_mu, prior_logvar = (
                torch.randn(shape[i > 0 :], generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(5)
            )
            recon, x = torch.randn(*shape[:2], 9, dtype=dtype), torch.rand(shape[1], 9, dtype=dtype)

            def weights(recon: Tensor, *given: Tensor, x: Tensor = x) -> Tensor:
                return vaefast.bounds.log_weights(recon, x.to(recon), *given)

            label = f"{'x'.join(map(str, shape))}, {name_of(dtype)}"
            found[label] = beside(weights, (recon, z, mu, logvar), device, shape[2] * 9)
            found[f"{label}, prior"] = beside(
                weights, (recon, z, mu, logvar, prior_mu, prior_logvar), device, shape[2] * 9
            )
    return found


def experts(device: str) -> Errors:
    found = {}
    mask = torch.rand((5, 33), generator=torch.Generator().manual_seed(2)) > 0.4
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given = [torch.randn((5, 33, 20), generator=torch.Generator().manual_seed(n)).to(dtype) for n in (0, 1)]
        for prior in (True, False):

            def product(mus: Tensor, logvars: Tensor, prior: bool = prior) -> tuple[Tensor, Tensor]:
                there = mask.to(mus.device) if prior else None
                return vaefast.product_of_experts(mus, logvars, there, prior=prior)

            found[f"{'with' if prior else 'without'} prior, {name_of(dtype)}"] = beside(product, given, device, 5)
    return found


def correlation(device: str) -> Errors:
    """The terms of the KL of a batch that a block does and does not hold."""
    found = {}
    for batch, latents in ((60, 5), (700, 3)):
        for dtype in (torch.float32, torch.float64):
            given = [torch.randn((batch, latents), generator=torch.Generator().manual_seed(n)) for n in range(3)]
            for estimator in ("mws", "mss"):

                def terms(*given: Tensor, estimator: str = estimator) -> tuple[Tensor, ...]:
                    z, mu, logvar = given
                    return tuple(vaefast.total_correlation(z, mu, logvar, 50_000, estimator=estimator))

                off = beside(terms, [t.to(dtype) for t in given], device, batch * latents)
                found[f"{batch} x {latents}, {estimator}, {name_of(dtype)}"] = off
    return found


def mixture(device: str) -> Errors:
    """A prior of many components, by kernels and, of more, by matrix products."""
    found = {}
    for shape in ((33, 17, 5), (128, 500, 16), (300, 500, 40)):
        for dtype in (torch.float32, torch.float64):
            given = [
                torch.randn(size, generator=torch.Generator().manual_seed(n)).to(dtype)
                for n, size in enumerate((shape[::2], shape[1:], shape[1:], shape[1:2]))
            ]
            off = beside(vaefast.priors.mixture_log_prob, given, device, shape[0])
            found[f"{'x'.join(map(str, shape))}, {name_of(dtype)}"] = off
    return found


WHOLE: dict[str, Check] = {
    "noise": same_noise,
    "graph": graph,
    "lists": lists,
    "packed": packed,
    "bits": same_bits,
    "huge": huge,
    "categorical": categorical,
    "several draws": several_draws,
    "experts": experts,
    "correlation": correlation,
    "mixture": mixture,
}


def checks(every: int = 1) -> Iterator[tuple[str, Check]]:
    """All by name: the first layout of every kernel, then what is not a single call, then the other layouts. Of the
    single calls only every so manyth."""
    cases = list(sanitize.cases())
    first = len(cases) // len(sanitize.LAYOUTS)
    singles = [
        (f"{case.what} {case.count}, {name_of(case.dtype)}, {case.layout}, {case.shape}", single(case))
        for case in cases
    ]
    yield from singles[:first:every]
    yield from WHOLE.items()
    yield from singles[first::every]
