"""A case's arguments, and its call: outputs and the gradients that are wanted, by the arguments' names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from inputs import generator
from torch import Tensor

import vaefast
from vaefast import Likelihood, Parameterization, _backends, _generators, _native, _philox
from vaefast.reference import LIKELIHOODS

from .cases import Case
from .values import Values

RAW_DOMAINS = {"logvar": "real", "log_std": "log", "std": "positive", "var": "positive", "softplus": "rho"}
OTHER_OPTIONS: dict[str, dict[str, Any]] = {
    "gaussian": {"constant": False},
    "laplace": {"constant": False},
    "poisson": {"constant": False},
    "negative_binomial": {"constant": False, "eps": 1e-3},
    "zero_inflated_negative_binomial": {"constant": False, "eps": 1e-3},
    "negative_binomial_mixture": {"constant": False, "eps": 1e-3},
    "discretized_logistic": {"bins": 17, "low": 0.0, "high": 1.0, "floor": -5.0},
    "discretized_logistic_mixture": {"channels": 1, "bins": 32},
}
# whose data may be trained, too
DATA_WITH_GRADIENT = (
    "gaussian", "laplace", "student_t", "log_normal", "gamma", "zero_inflated_log_normal", "zero_inflated_gamma",
)  # fmt: skip


@dataclass
class Arguments:
    """``tensors`` is every argument by name; ``levels`` says which lists of a multi-tensor call it stands in."""

    case: Case
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    wanted: list[str] = field(default_factory=list)
    likelihood: Likelihood | None = None

    def get(self, name: str) -> Any:
        return self.tensors.get(name, self.numbers.get(name))

    def of_level(self, name: str, level: int) -> Any:
        shared = self.case.op == "multi_tensor_sample_with_kl" and name.startswith("prior")
        return self.get(name if level == 0 or shared else f"{name}@{level}")


def level_shape(case: Case, level: int) -> tuple[int, ...]:
    shape = case.shape
    return (*shape[:-1], shape[-1] + level) if len(shape) > max(1, case.batch_dims) else shape


def data_shape(case: Case) -> tuple[int, ...]:
    """Of the elementwise reconstruction: an ELBO's has the latents' batch."""
    if case.op == "reconstruction_loss":
        return case.shape
    return (*case.shape[: case.batch_dims], *case.data)


def weight_of(values: Values, name: str, kind: str, shape: tuple[int, ...]) -> Tensor | None:
    if kind == "none":
        return None
    g = values.generator(name)
    own = {"row": (*shape[:1], *(1,) * (len(shape) - 1)), "scalar": ()}.get(kind, shape)
    drawn = torch.rand(own, generator=g, dtype=torch.float64)
    on = torch.rand(own, generator=g) < 0.7
    if kind == "mask":
        return values.laid_out(name, on)
    return values.laid_out(name, torch.where(on, 3 * drawn - 0.5, 0.0).to(values.dtype(name)))


def arguments(case: Case) -> Arguments:
    values, found = Values(case), Arguments(case)
    if case.op != "reconstruction_loss":
        for level in range(case.levels):
            _posterior(found, values, level)
        weight = weight_of(values, "kl_weight", case.kl_weight, case.shape)
        if weight is not None:
            found.tensors["kl_weight"] = weight
            if case.poison:
                _poison(found, weight == 0, ("mu", "raw", "prior_mu", "prior_logvar"), case.shape)
    if case.has_nll:
        _reconstruction(found, values)
    if case.given_noise:
        shape = case.shape if case.num_samples is None else (case.num_samples, *case.shape)
        normal = torch.randn(shape, generator=values.generator("eps"), dtype=torch.float64)
        found.tensors["eps"] = values.laid_out("eps", normal.to(values.dtype("eps")))
    if case.op == "packed":
        _pack(found, values)
    _want(found, values)
    return found


def _posterior(found: Arguments, values: Values, level: int) -> None:
    case, shape = found.case, level_shape(found.case, level)
    at = f"@{level}" if level else ""
    found.tensors[f"mu{at}"] = values.tensor(f"mu{at}", "real", shape)
    found.tensors[f"raw{at}"] = values.tensor(f"raw{at}", RAW_DOMAINS[case.parameterization], shape)
    domain = RAW_DOMAINS[case.prior_parameterization]
    shared = case.op == "multi_tensor_sample_with_kl"
    if case.prior == "float":
        found.numbers |= {"prior_mu": 0.5, "prior_logvar": 0.75}
    some = tuple(1 if k % 2 == 0 else n for k, n in enumerate(shape))
    of_mu, of_logvar = {
        "full": (shape, shape), "broadcast": (some, shape[1:]), "scalar": ((), ()), "mu only": (shape, None),
        "logvar only": (None, shape),
    }.get(case.prior, (None, None))  # fmt: skip
    if shared:
        of_mu = of_logvar = () if case.prior == "scalar" else None
        at = ""
    if of_mu is not None:
        found.tensors[f"prior_mu{at}"] = values.tensor(f"prior_mu{at}", "real", of_mu)
    if of_logvar is not None:
        found.tensors[f"prior_logvar{at}"] = values.tensor(f"prior_logvar{at}", domain, of_logvar)


def _reconstruction(found: Arguments, values: Values) -> None:
    case, shape = found.case, data_shape(found.case)
    entry = LIKELIHOODS[case.likelihood]
    options = OTHER_OPTIONS.get(case.likelihood, {}) if case.other_options else {}
    dim = case.batch_dims
    if entry.planes:
        options = {**options, "dim": dim}
    chosen = found.likelihood = Likelihood(case.likelihood, **options)
    first, target = shape, shape
    if entry.planes:
        channels = int(chosen.options.get("channels", 0))
        first = (*shape[:dim], 3 * entry.planes[channels], *shape[dim:])
        target = (*shape[:dim], channels, *shape[dim:]) if channels else shape
    for k, domain in list(enumerate(entry.domains))[: case.count]:
        own = first if k == 0 else (first, first[1:], ())[(case.seed + k) % 3]
        found.tensors[f"recon{k}"] = values.tensor(f"recon{k}", domain, own)
    found.tensors["target"] = _target(found, values, entry.support, target)
    weight = weight_of(values, "weight", case.weight, shape)
    if weight is not None:
        found.tensors["weight"] = weight
        if case.poison:
            hidden = (weight == 0).expand(shape)
            _poison(found, hidden.unsqueeze(dim) if entry.planes else hidden, ("recon0",), first)
            over = hidden.unsqueeze(dim) if len(target) > len(shape) else hidden
            _poison(found, over, ("target",), target)


def _target(found: Arguments, values: Values, support: str, shape: tuple[int, ...]) -> Tensor:
    g, kind = values.generator("target"), values.turn("target", found.case.kinds)
    uniform = torch.rand(shape, generator=g, dtype=torch.float64)
    if support == "unit":
        x = (3 * uniform - 1).clamp(0, 1)
    elif support == "real":
        x = found.tensors["recon0"].double() + torch.randn(shape, generator=g, dtype=torch.float64)
    elif support == "positive":
        x = torch.exp(4 * uniform - 2)
    elif support == "at least 0":
        x = torch.where(uniform < 0.3, 0.0, torch.exp(4 * uniform - 2))
    elif support == "count":
        x = torch.exp(6 * uniform - 1).floor()
    elif support == "class":
        x = (3 * uniform).floor()
    elif support == "some of total":
        total = found.tensors[f"recon{found.case.count - 1}"].double().nan_to_num(3.0, 3.0, 3.0)
        x = (uniform * (total + 1)).floor().minimum(total)
    else:
        assert found.likelihood is not None
        o = found.likelihood.options
        x = o["low"] + (uniform * o["bins"]).floor() * (o["high"] - o["low"]) / (o["bins"] - 1)
    if kind == "wild":
        pool = torch.tensor(
            [0.0, 1.0, 1e-30, 1e4, 1e6, 1e38, math.inf, -math.inf, math.nan, -1.0, 0.5], dtype=torch.float64
        )
        picked = pool[torch.randint(len(pool), shape, generator=g)]
        x = torch.where(torch.rand(shape, generator=g) < 0.1, picked, x)
    dtype = values.dtype("target")
    return values.laid_out("target", x.to(dtype))


def _poison(found: Arguments, hidden: Tensor, names: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Not where memory or values are shared with what is not hidden."""
    for name in names:
        x = found.tensors.get(name)
        if x is not None and x.shape == torch.Size(shape):
            found.tensors[name] = torch.where(hidden, math.nan, x.double()).to(x.dtype)


def _pack(found: Arguments, values: Values) -> None:
    dim = found.case.batch_dims
    tensors = found.tensors
    for name, mean, raw in (("moments", "mu", "raw"), ("prior_moments", "prior_mu", "prior_logvar")):
        if mean in tensors:
            dtype = tensors[mean].dtype
            both = torch.cat((tensors.pop(mean), tensors.pop(raw).to(dtype)), dim)
            tensors[name] = values.laid_out(mean, both)


def _want(found: Arguments, values: Values) -> None:
    case = found.case
    for name in list(found.tensors):
        base = {"moments": "mu", "prior_moments": "prior_mu"}.get(name, name)
        if base in ("weight", "kl_weight"):
            continue
        if base in ("target", "eps") and (len(case.wanted) < 2 or case.likelihood not in DATA_WITH_GRADIENT):
            continue
        if values.turn(base, case.wanted):
            found.tensors[name] = found.tensors[name].detach().requires_grad_()
            found.wanted.append(name)


# ---- the call


@contextlib.contextmanager
def engine(name: str) -> Iterator[None]:
    """``dispatched`` is the way of torch.compile and of tensor subclasses: by the dispatcher's operators."""
    if name != "dispatched":
        with vaefast.use_backend("reference" if name == "reference" else "auto"):
            yield
        return
    kept = _backends.direct, _native.is_eager
    _backends.direct, _native.is_eager = lambda x: None, lambda x: False  # type: ignore[assignment]
    try:
        with vaefast.use_backend("auto"):
            yield
    finally:
        _backends.direct, _native.is_eager = kept


def kl_options(case: Case, given: Arguments, weight: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, default in (
        ("free_bits", 0.0),
        ("free_bits_per", "dim"),
        ("balance", None),
        ("symmetric", False),
        ("capacity", None),
    ):
        if getattr(case, name) != default:
            found[name] = getattr(case, name)
    if case.capacity is not None and case.seed % 2:
        found["capacity"] = torch.tensor(case.capacity)
    if case.prior_parameterization != "logvar":
        found["prior_parameterization"] = case.prior_parameterization
    if "kl_weight" in given.tensors:
        found[weight] = given.tensors["kl_weight"]
    return found


def call(given: Arguments) -> dict[str, Tensor]:
    """The outputs by name."""
    case, get = given.case, given.get
    p: dict[str, Any] = {"parameterization": case.parameterization}
    if case.clamp is not None or case.floor:
        p["parameterization"] = Parameterization(case.parameterization, case.clamp, case.floor)
    r = {"reduction": case.reduction}
    b = {"batch_dims": case.batch_dims} if case.batch_dims != 1 else {}
    q = get("mu"), get("raw")
    prior = get("prior_mu"), get("prior_logvar")
    of_prior = {"prior_parameterization": case.prior_parameterization}
    if case.op == "reparameterize":
        return {"z": vaefast.reparameterize(*q, **p, eps=get("eps"), num_samples=case.num_samples)}
    if case.op == "gaussian_kl":
        return {"kl": vaefast.gaussian_kl(*q, *prior, **p, **r, **b, **kl_options(case, given, "weight"))}
    if case.op == "sample_with_kl":
        options = kl_options(case, given, "kl_weight")
        z, kl = vaefast.sample_with_kl(*q, *prior, **p, **r, **b, eps=get("eps"), **options)
        return {"z": z, "kl": kl}
    if case.op == "kl_per_dim":
        return {"kl": vaefast.kl_per_dim(*q, *prior, **p, **of_prior)}
    if case.op.startswith("multi"):
        return _multi(given, p, {**r, **b, **of_prior})
    if case.op == "packed":
        own = vaefast.DiagonalGaussian(get("moments"), case.batch_dims, case.clamp)
        other = get("prior_moments")
        other = None if other is None else vaefast.DiagonalGaussian(other, case.batch_dims, case.clamp)
        z, kl = own.sample_with_kl(other, **r, **b)
        return {"z": z, "kl": kl}
    recon = tuple(get(f"recon{k}") for k in range(case.count))
    if case.overwrite:
        recon = (recon[0] * 1, *recon[1:])
    of: dict[str, Any] = {"likelihood": given.likelihood, "weight": get("weight"), "overwrite_recon": case.overwrite}
    if case.op == "reconstruction_loss":
        return {"nll": vaefast.reconstruction_loss(recon, get("target"), **of, **r, **b)}
    beta = torch.tensor(case.beta) if case.beta_tensor else case.beta
    options = {**of, **p, **r, **b, **kl_options(case, given, "kl_weight"), "beta": beta}
    if case.op == "elbo_loss":
        return {"loss": vaefast.elbo_loss(recon, get("target"), *q, *prior, **options)}
    terms = vaefast.elbo_terms(recon, get("target"), *q, *prior, **options)
    return {"loss": terms.loss, "nll": terms.reconstruction, "kl": terms.kl}


def _multi(given: Arguments, p: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    case = given.case
    lists = [
        [given.of_level(name, k) for k in range(case.levels)] for name in ("mu", "raw", "prior_mu", "prior_logvar")
    ]
    if case.op == "multi_tensor_gaussian_kl":
        priors = [None if ts[0] is None else ts for ts in lists[2:]]
        return {"kl": vaefast.multi_tensor_gaussian_kl(*lists[:2], *priors, **p, **options)}
    prior = [0.0 if x is None else x for x in (given.get("prior_mu"), given.get("prior_logvar"))]
    samples, kl = vaefast.multi_tensor_sample_with_kl(*lists[:2], *prior, **p, **options)
    return {**{f"z{f'@{k}' if k else ''}": z for k, z in enumerate(samples)}, "kl": kl}


def noises(given: Arguments) -> list[Tensor]:
    """What the call draws from the seed that it begins with."""
    case = given.case
    torch.default_generator.manual_seed(case.seed)
    if "eps" in given.tensors:
        return [given.tensors["eps"].detach()]
    torchs = case.engine == "reference"
    if case.op.startswith("multi"):
        mus = [given.of_level("mu", k).detach() for k in range(case.levels)]
        if torchs:
            return _generators.torch_noises(mus, None)
        priors = given.get("prior_mu"), given.get("prior_logvar")
        dtypes = [wide(mu, given.of_level("raw", k), *priors) for k, mu in enumerate(mus)]
        return _philox.philox_noises(mus, dtypes, None)
    mu = given.get("mu") if case.op != "packed" else given.get("moments").chunk(2, case.batch_dims)[0]
    mu = mu.detach()
    beside = [given.get(name) for name in ("raw", "prior_mu", "prior_logvar", "prior_moments")]
    if case.op == "reparameterize":
        beside = beside[:1]
    if case.num_samples is not None:
        mu = mu.expand(case.num_samples, *mu.shape)
    return [_generators.torch_noise(mu, None) if torchs else _philox.philox_noise(mu, wide(mu, *beside), None)]


def wide(*tensors: object) -> torch.dtype:
    """What all of them are computed in."""
    some = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if some else torch.float32


def upstream(case: Case, name: str, out: Tensor) -> Tensor:
    g = generator(case.seed + len(name))
    found = torch.randn(out.shape, generator=g, dtype=torch.float64)
    if case.upstream == "ones":
        found = torch.ones_like(found)
    elif case.upstream == "zeros":
        found = found * 0
    elif case.upstream == "large":
        found = found * 1e4
    return found.to(out.dtype)


@dataclass
class Found:
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    # of a second backward through the same graph, which may come by another way, rounded otherwise
    again: dict[str, Tensor]


def run(given: Arguments) -> Found:
    case = given.case
    threads = torch.get_num_threads()
    if threads != case.threads:
        torch.set_num_threads(case.threads)
    try:
        with engine(case.engine):
            torch.default_generator.manual_seed(case.seed)
            outputs = call(given)
            backward: list[dict[str, Tensor]] = []
            reached = {name: out for name, out in outputs.items() if out.requires_grad}
            if given.wanted and reached:
                backward = _backward(given, reached)
        once, again = (backward[0], backward[-1]) if backward else ({}, {})
        return Found({name: out.detach() for name, out in outputs.items()}, once, again)
    finally:
        if threads != case.threads:
            torch.set_num_threads(threads)


def _backward(given: Arguments, outputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    case = given.case
    up = [upstream(case, name, out) for name, out in outputs.items()]
    leaves = [given.tensors[name] for name in given.wanted]
    graph = case.create_graph and not case.overwrite
    results = []
    for again in range(2 if case.twice else 1):
        keep = case.twice and again == 0
        found = torch.autograd.grad(
            list(outputs.values()), leaves, up, retain_graph=keep or graph, create_graph=graph, materialize_grads=True
        )
        results.append(dict(zip(given.wanted, (g.detach().clone() for g in found))))
    return results
