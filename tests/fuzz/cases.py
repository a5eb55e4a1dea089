"""What a call can be: a few fields, none a tensor, so that a case is printed, made small and run again by its text."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import hypothesis.strategies as st
from inputs import ELBO_REDUCTIONS, LIKELIHOOD_CASES, PRIORS, REDUCTIONS

from vaefast.reference import LIKELIHOODS, PARAMETERIZATIONS

from .formulas import NLL

# the kernels from Python, and by way of the dispatcher, as torch.compile and tensor subclasses go; PyTorch
ENGINES = ("native", "reference", "dispatched")
POSTERIOR = (
    "reparameterize", "gaussian_kl", "sample_with_kl", "kl_per_dim", "multi_tensor_gaussian_kl",
    "multi_tensor_sample_with_kl", "packed",
)  # fmt: skip
ELBO = ("elbo_loss", "elbo_terms")
OPERATORS = (*POSTERIOR, "reconstruction_loss", *ELBO)
WITH_KL_OPTIONS = ("gaussian_kl", "sample_with_kl", *ELBO)
DTYPES = ("float32", "float64", "float16", "bfloat16")
LAYOUTS = (
    "contiguous", "misaligned", "every second", "transposed", "second chunk", "expanded rows", "expanded columns",
    "overlapping", "permuted", "padded rows",
)  # fmt: skip
# those that the oracle has a formula of its own for
WITH_FORMULAS = [(name, count) for name, count in LIKELIHOOD_CASES if name in NLL]
KINDS = ("training", "near", "extreme", "wild")
WEIGHTS = ("none", "full", "mask", "row", "scalar")
UPSTREAMS = ("random", "ones", "zeros", "large")


@dataclass(frozen=True)
class Case:
    """One call. What has a value for each tensor is a tuple that is gone through again and again."""

    op: str = "gaussian_kl"
    engine: str = "native"
    shape: tuple[int, ...] = (2, 3)
    data: tuple[int, ...] = ()  # of an ELBO's elementwise reconstruction, behind the batch
    seed: int = 0
    dtypes: tuple[str, ...] = ("float32",)
    layouts: tuple[str, ...] = ("contiguous",)
    kinds: tuple[str, ...] = ("training",)
    wanted: tuple[bool, ...] = (True,)
    upstream: str = "random"
    reduction: str = "sum"
    batch_dims: int = 1
    parameterization: str = "logvar"
    clamp: tuple[float, float] | None = None
    floor: float = 0.0
    prior: str = "none"
    prior_parameterization: str = "logvar"
    given_noise: bool = False
    num_samples: int | None = None
    free_bits: float = 0.0
    free_bits_per: str = "dim"
    balance: float | None = None
    capacity: float | None = None
    symmetric: bool = False
    kl_weight: str = "none"
    likelihood: str = "bernoulli"
    count: int = 1
    other_options: bool = False  # of the likelihood
    weight: str = "none"
    poison: bool = False  # NaN wherever a weight is 0
    beta: float = 1.0
    beta_tensor: bool = False
    overwrite: bool = False
    twice: bool = False  # backward twice through one graph
    create_graph: bool = False
    levels: int = 1
    threads: int = 1

    def __repr__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Case({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    @property
    def has_kl(self) -> bool:
        return self.op not in ("reparameterize", "reconstruction_loss")

    @property
    def has_sample(self) -> bool:
        return "sample" in self.op or self.op in ("reparameterize", "packed")

    @property
    def has_nll(self) -> bool:
        return self.op == "reconstruction_loss" or self.op in ELBO


# dimensions around vectors, warps and blocks, and how many elements a tensor has at most: few, most of the time
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 257, 1000, 4097)
MOST = (64,) * 40 + (600,) * 24 + (6000,) * 4 + (50_000,)


class Pick(Protocol):
    """Where a case's choices come from."""

    def one(self, values: Sequence[Any]) -> Any: ...

    def number(self, least: int, most: int) -> int: ...


class Random:
    """Of a number: thousands a second."""

    def __init__(self, seed: object) -> None:
        self.one, self.number = (rng := random.Random(repr(seed))).choice, rng.randint


class Drawn:
    """hypothesis's, which shrinks them."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def one(self, values: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(values))

    def number(self, least: int, most: int) -> int:
        return int(self.draw(st.integers(least, most)))


@st.composite
def cases(draw: Any) -> Case:
    return case_of(Drawn(draw))


def _shape(pick: Pick, most: int, dims: int = 6) -> tuple[int, ...]:
    found: list[int] = []
    for _ in range(pick.number(0, dims)):
        # a 0 does not make room: what is added up over it is as large as the rest
        left = most // math.prod(max(1, n) for n in found)
        found.append(pick.one([n for n in SIZES if n <= max(left, 1)]))
    return tuple(found)


def _rarely(pick: Pick, values: Sequence[Any], default: Any, one_in: int = 5) -> Any:
    return pick.one(values) if pick.number(1, one_in) == one_in else default


def case_of(pick: Pick) -> Case:
    op = pick.one(OPERATORS)
    most = pick.one(MOST)
    shape = _shape(pick, most)
    mixed = pick.number(1, 3)

    def several(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(pick.one(values) for _ in range(mixed))

    found: dict[str, Any] = {
        "op": op, "engine": pick.one(ENGINES), "seed": pick.number(0, 2**20),
        "dtypes": several(DTYPES) if pick.number(0, 1) else _rarely(pick, [(d,) for d in DTYPES], ("float32",), 2),
        "layouts": several(LAYOUTS), "kinds": several(KINDS) if pick.number(0, 1) else ("training",),
        "wanted": several((True, False)) if pick.number(0, 1) else (True,),
        "upstream": pick.one(UPSTREAMS), "threads": _rarely(pick, (2, 3, 4), 1),
        "twice": _rarely(pick, (True,), False, 7), "create_graph": _rarely(pick, (True,), False, 10),
        "poison": bool(pick.number(0, 1)), "batch_dims": _rarely(pick, (2, 3), 1),
        "reduction": pick.one(ELBO_REDUCTIONS if op in ELBO or op.startswith("multi") else REDUCTIONS),
    }  # fmt: skip
    if op in POSTERIOR or op in ELBO:
        found["parameterization"] = _rarely(pick, tuple(PARAMETERIZATIONS), "logvar", 2)
        found["clamp"] = _rarely(pick, ((0.25, 0.75), (-30.0, 20.0), (0.5, 0.5)), None)
        found["floor"] = _rarely(pick, (0.1, 1e-4, 2.0), 0.0)
    if op in WITH_KL_OPTIONS or op.startswith("multi") or op in ("kl_per_dim", "packed"):
        found["prior"] = pick.one(PRIORS)
    if op.startswith("multi"):
        found["levels"] = pick.number(1, 3)
    if op in (*WITH_KL_OPTIONS, "kl_per_dim", "multi_tensor_gaussian_kl"):
        found["prior_parameterization"] = _rarely(pick, tuple(PARAMETERIZATIONS), "logvar")
    if op in ("reparameterize", "sample_with_kl"):
        found["given_noise"] = bool(pick.number(0, 1))
    if op == "reparameterize":
        found["num_samples"] = _rarely(pick, (1, 2, 5), None)
    if op in WITH_KL_OPTIONS:
        found |= _kl_options(pick)
    if op in ELBO:
        batch = math.prod(max(1, n) for n in shape[: found["batch_dims"]])
        found["data"] = _shape(pick, most // batch, 4)
        found["beta"] = pick.one((1.0, 0.5, 0.0, 4.0))
        found["beta_tensor"] = _rarely(pick, (True,), False)
    if op == "reconstruction_loss" or op in ELBO:
        found["likelihood"], found["count"] = pick.one(WITH_FORMULAS)
        found["other_options"] = _rarely(pick, (True,), False)
        found["weight"] = _rarely(pick, WEIGHTS, "none", 2)
        found["overwrite"] = _rarely(pick, (True,), False, 7)
    return valid(Case(shape=shape, **found))


def _kl_options(pick: Pick) -> dict[str, Any]:
    found: dict[str, Any] = {
        "balance": _rarely(pick, (0.0, 0.3, 0.8, 1.0), None), "symmetric": _rarely(pick, (True,), False, 7),
        "kl_weight": _rarely(pick, WEIGHTS, "none"),
    }  # fmt: skip
    which = pick.number(0, 5)
    if which == 5:
        found["capacity"] = pick.one((0.0, 0.5, 25.0))
    elif which == 4:
        found["free_bits"] = pick.one((0.1, 0.5, 3.0))
        found["free_bits_per"] = pick.one(("dim", "sample", "batch_dim"))
    return found


def smaller(case: Case) -> Iterator[Case]:
    """Cases that are simpler in one thing."""
    for f in fields(case):
        value = getattr(case, f.name)
        if f.name in ("shape", "data"):
            tries = [value[:k] + value[k + 1 :] for k in range(len(value))]
            tries += [
                (*value[:k], less, *value[k + 1 :])
                for k, n in enumerate(value)
                for less in (1, 2, n // 2, n - 1)
                if 0 < less < n
            ]
        elif isinstance(value, tuple) and f.name != "clamp":
            tries = [value[:k] + value[k + 1 :] for k in range(len(value)) if len(value) > 1]
            tries += [
                (*value[:k], f.default[0], *value[k + 1 :]) for k in range(len(value)) if value[k] != f.default[0]
            ]
        else:
            tries = [f.default] if f.name not in ("op", "likelihood", "count", "engine") and value != f.default else []
        for other in tries:
            found = valid(replace(case, **{f.name: other}))
            if found != case:
                yield found


def smallest(case: Case, fails: Callable[[Case], bool], most: int = 400) -> Case:
    """Made smaller as long as it fails, in so many tries."""
    tried = 0
    shrunk = True
    while shrunk and tried < most:
        shrunk = False
        for other in smaller(case):
            tried += 1
            if len(repr(other)) <= len(repr(case)) and fails(other):
                case, shrunk = other, True
                break
    return case


def valid(case: Case) -> Case:
    """The nearest case whose arguments go together, by the rules of the documentation."""
    new: dict[str, Any] = {}
    op, shape, data, reduction = case.op, case.shape, case.data, case.reduction
    batched = op in (*ELBO, "kl_per_dim", "packed") or reduction in ("per_sample", "batchmean")
    batched = batched or case.capacity is not None or case.free_bits_per != "dim"
    mixture = case.has_nll and bool(LIKELIHOODS[case.likelihood].planes)
    least = case.batch_dims if case.batch_dims > 1 else 1 if batched or mixture else 0
    least += op == "packed"  # the dimension that has two halves
    shape = (*shape, *(2,) * (least - len(shape)))
    if op == "packed":
        new |= {"parameterization": "logvar", "floor": 0.0, "balance": None}
        new["prior"] = "full" if case.prior != "none" else "none"
    if op.startswith("multi") and reduction not in ELBO_REDUCTIONS:
        new["reduction"] = reduction = "sum"
    if op == "multi_tensor_gaussian_kl":
        new["prior"] = "none" if case.prior in ("float", "scalar") else case.prior
    if op == "multi_tensor_sample_with_kl":
        new["prior"] = "float" if case.prior in ("full", "broadcast", "mu only", "logvar only") else case.prior
    if case.balance is not None and case.prior in ("none", "float"):
        new["balance"] = None
    if case.free_bits and case.free_bits_per == "sample" and reduction not in ELBO_REDUCTIONS:
        new["reduction"] = reduction = "per_sample"
    if case.free_bits and case.free_bits_per == "batch_dim" and reduction not in ("batchmean", "sum"):
        new["reduction"] = reduction = "batchmean"
    if case.capacity is not None and reduction not in ELBO_REDUCTIONS:
        new["reduction"] = reduction = "per_sample"
    if not case.has_nll:
        new["poison"] = case.poison and case.kl_weight != "none"
    return replace(case, shape=shape, data=data, **new)
