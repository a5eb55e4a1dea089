"""The draws against their distributions, and against each other; and the words of noise that calls take, counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.special
import scipy.stats
import torch
from torch import Tensor

import vaefast

CHUNK = 1_000_000  # normals of a call, and of an Anderson-Darling statistic
SIGMAS = (4.0, 5.0, 6.0)
Normals = Callable[[int], Tensor]


class Check(NamedTuple):
    """A statistic, what it should be, and how probable one at least as far from that is."""

    name: str
    found: str
    p: float


def normals(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The next call's."""
    zero = torch.zeros(1, dtype=dtype).expand(n)
    return vaefast.reparameterize(zero, zero, noise="philox")


def anderson_darling(x: np.ndarray) -> float:
    """A^2 of x against N(0, 1); Anderson & Darling 1954, equation 3."""
    n, z = len(x), np.sort(x).astype(np.float64)
    odd = 2 * np.arange(1, n + 1) - 1
    return float(-n - (odd * (scipy.special.log_ndtr(z) + scipy.special.log_ndtr(-z[::-1]))).sum() / n)


def anderson_darling_p(a: float) -> float:
    """That A^2 of many is at least that; Marsaglia & Marsaglia 2004 (J. Stat. Software 9(2)), ADinf, to 2e-6."""
    if a < 2:
        inner = 2.00012 + (0.247105 - (0.0649821 - (0.0347962 - (0.011672 - 0.00168691 * a) * a) * a) * a) * a
        return 1 - math.exp(-1.2337141 / a) / math.sqrt(a) * inner
    inner = 2.30695 - (0.43424 - (0.082433 - (0.008056 - 0.0003146 * a) * a) * a) * a
    return -math.expm1(-math.exp(1.0776 - inner * a))


def two_sided(z: float) -> float:
    return float(2 * scipy.stats.norm.sf(abs(z)))


def poisson_p(found: int, expected: float) -> float:
    """Twice the smaller tail."""
    law = scipy.stats.poisson(expected)
    return float(min(1.0, 2 * min(law.cdf(found), law.sf(found - 1))))


def normality(draws: int, draw: Normals = normals) -> Iterator[Check]:
    """Of so many draws, chunk by chunk: Anderson-Darling of each, and the p of all together; moments; tails."""
    n = max(1, draws // CHUNK)
    size = min(CHUNK, draws)
    p, powers, tails = [], np.zeros(4), dict.fromkeys((s * sign for s in SIGMAS for sign in (1, -1)), 0)
    for _ in range(n):
        x = draw(size).numpy()
        p.append(anderson_darling_p(anderson_darling(x)))
        wide, square = x.astype(np.float64), np.square(x, dtype=np.float64)
        powers += wide.sum(), square.sum(), (square * wide).sum(), (square * square).sum()
        far = wide[np.abs(wide) > min(SIGMAS)]
        for sigma in tails:
            tails[sigma] += int((far > sigma).sum() if sigma > 0 else (far < sigma).sum())
    total = n * size
    if n > 1:
        together = scipy.stats.kstest(p, "uniform").pvalue
        yield Check(f"Anderson-Darling, {n:,} of {size:,}: their p are uniform", f"least p {min(p):.2g}", together)
    else:
        yield Check(f"Anderson-Darling of {size:,}", f"p {p[0]:.2g}", p[0])
    # of N(0, 1)'s k-th power: the mean, and the variance
    for k, (power, mean, variance) in enumerate(zip(powers, (0, 1, 0, 3), (1, 2, 15, 96)), 1):
        z = (power / total - mean) / math.sqrt(variance / total)
        yield Check(f"mean of x^{k}", f"{power / total:.6f}, should be {mean}", two_sided(z))
    for sigma, found in tails.items():
        expected = total * scipy.stats.norm.sf(abs(sigma))
        side = f"above {sigma:g}" if sigma > 0 else f"below {sigma:g}"
        yield Check(side, f"{found:,}, should be {expected:,.1f}", poisson_p(found, expected))


# ---- independence: pairs of draws that must have nothing in common


def of_seed(seed: int, n: int) -> Tensor:
    torch.manual_seed(seed)
    return normals(n)


def of_rank(rank: int, n: int) -> Tensor:
    vaefast.distributed.manual_seed(1, rank)
    return normals(n)


def members(n: int) -> list[Tensor]:
    """Of one list, in one call."""
    zeros = [torch.zeros(n) for _ in range(2)]
    return list(vaefast.multi_tensor_sample_with_kl(zeros, zeros)[0])


def own_generators(first: int, n: int) -> list[Tensor]:
    zero = torch.zeros(2, n)
    generators = [torch.Generator().manual_seed(seed) for seed in (first, first + 1)]
    return list(vaefast.reparameterize(zero, zero, generator=generators, noise="philox"))


def several(n: int) -> list[Tensor]:
    """Of one posterior, in one call."""
    zero = torch.zeros(1, n)
    return list(vaefast.reparameterize(zero, zero, num_samples=2, noise="philox").flatten(1))


PAIRS: dict[str, Callable[[int, int], list[Tensor]]] = {
    "calls that follow each other": lambda k, n: [normals(n), normals(n)],
    "seeds k and k + 1": lambda k, n: [of_seed(k, n), of_seed(k + 1, n)],
    "ranks k and k + 1 of one seed": lambda k, n: [of_rank(k, n), of_rank(k + 1, n)],
    "members of a list": lambda k, n: members(n),
    "samples of one call": lambda k, n: several(n),
    "generators of seeds that follow each other": lambda k, n: own_generators(2 * k, n),
    "a draw and itself moved on by k + 1": lambda k, n: [(x := normals(n + k + 1))[:n], x[k + 1 :]],
}


def correlation(a: Tensor, b: Tensor) -> list[float]:
    """Standard scores of the means of a b and of (a^2 - 1) (b^2 - 1), of independent normals."""
    a, b = a.double(), b.double()
    found = (a * b).mean().item(), ((a**2 - 1) * (b**2 - 1)).mean().item()
    return [found[0] * len(a) ** 0.5, found[1] / 2 * len(a) ** 0.5]


def independence(pairs: int, n: int) -> Iterator[Check]:
    """So many pairs of n draws of each kind; the p is that of the greatest of all scores."""
    for seed, (name, draw) in enumerate(PAIRS.items()):
        torch.manual_seed(1000 + seed)
        scores = [z for k in range(pairs) for z in correlation(*draw(k, n))]
        worst = max(scores, key=abs)
        p = -math.expm1(len(scores) * math.log1p(-two_sided(worst)))
        yield Check(name, f"the greatest of {len(scores)} scores is {worst:.2f}", p)


# ---- classes


def classes(draws: int) -> Iterator[Check]:
    """Chi-square of 32 classes, straight-through and of the relaxation, whose greatest is a class of Gumbel noise."""
    logits = torch.linspace(-3.0, 3.0, 32)
    expected = torch.softmax(logits.double(), 0).numpy()
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "sample_categorical": vaefast.sample_categorical,
        "sample_categorical, unimix 0.5": lambda x: vaefast.sample_categorical(x, unimix=0.5),
        "the relaxation's greatest, temperature 0.5": lambda x: vaefast.sample_categorical(
            x, temperature=0.5, straight_through=False
        ),
    }
    for name, draw in ways.items():
        counts, done = np.zeros(32), 0
        law = 0.5 * expected + 0.5 / 32 if "unimix" in name else expected
        while done < draws:
            n = min(200_000, draws - done)
            counts += np.bincount(draw(logits.expand(n, 32)).argmax(-1).numpy(), minlength=32)
            done += n
        found = scipy.stats.chisquare(counts, law * draws)
        yield Check(f"{name}, {draws:,} draws", f"chi-square {found.statistic:.1f} of 31", float(found.pvalue))


# ---- which words a call takes


class Taken(NamedTuple):
    """So many counters of a key, from ``first`` on."""

    key: int
    first: int
    counters: int


def words_of(call: Callable[[], Tensor]) -> list[Taken]:
    """What a sample keeps for backward says which words it took: a key and a counter for each, of 4 elements."""
    kept: list[tuple[int, int]] = []

    def pack(t: Tensor) -> Tensor:
        if t.dtype == torch.int64 and t.numel() == 2:
            kept.append(tuple(t.tolist()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        numel = call().numel()
    return [Taken(key, first, (numel + 3) // 4) for key, first in kept]


def overlaps(taken: list[Taken]) -> int:
    """How many stretches of words begin within another of their key."""
    found, end, key = 0, 0, None
    for each in sorted(taken):
        found += each.key == key and each.first < end
        end = max(end, each.first + each.counters) if each.key == key else each.first + each.counters
        key = each.key
    return found


def counted(calls: int) -> Iterator[Check]:
    """Of so many calls of every kind, on three generators: no word is any two calls' own."""
    mu = torch.zeros(3, 5, requires_grad=True)
    draws: list[Callable[[torch.Generator | None], Tensor]] = [
        lambda g: vaefast.reparameterize(mu, mu, generator=g, noise="philox"),
        lambda g: vaefast.sample_with_kl(mu, mu, generator=g, noise="philox")[0],
        lambda g: vaefast.reparameterize(mu, mu, generator=g, num_samples=3, noise="philox"),
    ]
    generators = [None, *(torch.Generator().manual_seed(seed) for seed in (1, 2))]
    torch.manual_seed(0)
    taken = [
        words
        for k in range(calls)
        for words in words_of(lambda k=k: draws[k % 3](generators[k // 3 % 3]))  # type: ignore[misc]
    ]
    assert len(taken) == calls, "a call did not say what it took"
    again = overlaps(taken)
    yield Check(f"words taken twice in {calls:,} calls", f"{again}", float(again == 0))
