"""A slice of ``make battery``, with fixed seeds: what the long run looks at, and that it sees what is wrong."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
import scipy.stats
import torch
from test_noise import python_philox
from torch import Tensor

import vaefast
from tools.randomness import battery, draws
from tools.randomness.draws import Check, Taken

# of some hundred checks, one in a thousand runs would have one below; the seeds are fixed
LEAST = 1e-5


@pytest.fixture(autouse=True)
def _kernels(extension: object) -> Iterator[None]:
    with vaefast.use_backend("native"):
        yield


def assert_fine(checks: list[Check]) -> None:
    assert checks
    for check in checks:
        assert check.p > LEAST, check


def test_normals() -> None:
    torch.manual_seed(1)
    assert_fine(list(draws.normality(5_000_000)))


def test_float64_normals() -> None:
    torch.manual_seed(2)
    assert_fine(list(draws.normality(1_000_000, lambda n: draws.normals(n, torch.float64))))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: 1.01 * x,
        lambda x: x + 0.01,
        lambda x: x.clamp(-4, 4),
        lambda x: torch.where(x > 2, 2 + 1.05 * (x - 2), x),
    ],
    ids=["wide", "moved", "no tails", "long tail"],
)
def test_what_is_not_normal_is_found(wrong: object) -> None:
    torch.manual_seed(1)
    checks = list(draws.normality(5_000_000, lambda n: wrong(draws.normals(n))))  # type: ignore[operator]
    assert min(check.p for check in checks) < 1e-6


def test_anderson_darling_is_the_published_one() -> None:
    """The limit's 5% and 1% points (Marsaglia & Marsaglia 2004), and scipy's statistic of a fitted normal."""
    assert draws.anderson_darling_p(2.492) == pytest.approx(0.05, abs=1e-4)
    assert draws.anderson_darling_p(3.8781) == pytest.approx(0.01, abs=1e-4)
    x = np.random.default_rng(0).normal(size=1000)
    fitted = (x - x.mean()) / x.std(ddof=1)
    expected = scipy.stats.goodness_of_fit(
        scipy.stats.norm, fitted, known_params={"loc": 0, "scale": 1}, statistic="ad", n_mc_samples=1
    ).statistic
    assert draws.anderson_darling(fitted) == pytest.approx(expected, rel=1e-9)


def test_independence() -> None:
    assert_fine(list(draws.independence(2, 200_000)))


@pytest.mark.parametrize("share", [0.02, -0.02])
def test_what_depends_is_found(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    def related(k: int, n: int) -> list[Tensor]:
        a, b = draws.normals(n), draws.normals(n)
        return [a, share * a + (1 - share**2) ** 0.5 * b]

    monkeypatch.setattr(draws, "PAIRS", {"related": related})
    assert next(draws.independence(1, 200_000)).p < 1e-6


def test_classes() -> None:
    torch.manual_seed(3)
    assert_fine(list(draws.classes(400_000)))


def test_no_word_is_taken_twice() -> None:
    assert_fine(list(draws.counted(3000)))


def test_what_is_taken_twice_is_found() -> None:
    def replayed() -> Tensor:
        torch.manual_seed(7)
        mu = torch.zeros(9, requires_grad=True)
        return vaefast.reparameterize(mu, mu)

    taken = draws.words_of(replayed)
    assert taken[0].counters == 3
    assert draws.overlaps(taken + draws.words_of(replayed)) == 1
    assert draws.overlaps([Taken(1, 0, 4), Taken(1, 4, 4), Taken(2, 0, 4)]) == 0
    assert draws.overlaps([Taken(1, 0, 9), Taken(1, 2, 1), Taken(1, 8, 4), Taken(2, 0, 4)]) == 2


@pytest.mark.parametrize(("mode", "key_of"), [("counters", lambda n: 9), ("calls", lambda n: 9 + n // 4)])
def test_the_stream_is_philox(mode: str, key_of: object) -> None:
    command = [str(battery.compiled()), mode, "9", *(["4"] if mode == "calls" else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        words = np.frombuffer(run.stdout.read(4 * 4 * 64), dtype="<u4")
        run.kill()
    for n in range(64):
        counter = n if mode == "counters" else n % 4
        assert words[4 * n : 4 * n + 4].tolist() == python_philox(counter, 0, key_of(n))  # type: ignore[operator]


PRACTRAND = """rng=RNG_stdin32, seed=unknown
length= 1 gibibyte (2^30 bytes), time= 40.4 seconds
  no anomalies in 194 test result(s)

length= 2 gibibytes (2^31 bytes), time= 80.0 seconds
  Test Name                         Raw       Processed     Evaluation
  [Low1/32]FPF-14+6/32:cross        R=  -2.7  p =1-2.6e-4   unusual
  BCFN(2+0,13-0,T)                  R= +99.1  p =  3.1e-50   FAIL !!!
  ...and 203 test result(s) without anomalies
"""
DIEHARDER = """   diehard_birthdays|   0|       100|     100|0.62364523|  PASSED
      diehard_operm5|   0|   1000000|     100|0.00012345|   WEAK
  diehard_rank_32x32|   0|     40000|     100|0.00000000|  FAILED
"""


def test_what_the_batteries_say() -> None:
    verdict = battery.of_practrand(PRACTRAND, "a stream")
    assert verdict.amount == "2 gibibytes (2^31 bytes)" and verdict.results == 203
    assert len(verdict.anomalies) == 2 and verdict.failed == 1
    clean = battery.of_practrand(PRACTRAND.partition("\n\n")[0], "a stream")
    assert (clean.amount, clean.results, clean.anomalies) == ("1 gibibyte (2^30 bytes)", 194, [])
    verdict = battery.of_dieharder(DIEHARDER, "a stream")
    assert (verdict.results, len(verdict.anomalies), verdict.failed) == (3, 2, 1)
