"""The CPU kernels for ARM: cross-compiled, run by qemu, and held against this machine's kernels, which every other test
holds (`make test-arm`)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest
import torch
from arm.run import ARM, DTYPES, HOST, Problem
from inputs import CLAMPED_AND_FLOORED, LIKELIHOOD_CASES, Data, bound, extreme, posterior, sensitivity, training
from torch import Tensor

import vaefast
from vaefast import Likelihood, Parameterization
from vaefast.reference import LIKELIHOODS, PARAMETERIZATIONS

pytestmark = pytest.mark.arm

NAMES, POSTERIORS = tuple(LIKELIHOODS), tuple(PARAMETERIZATIONS)
# how far two roundings of one algorithm may be apart, beside what a rounding of the inputs moves
TOLERANCE = {torch.float32: 2e-6, torch.float64: 4e-15, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# elements beyond whole vectors, and beyond a tile; and one
COLUMNS = (1037, 3, 1)

Key = tuple[object, ...]


def reconstruction(name: str, data: Data) -> Problem:
    entry, likelihood = LIKELIHOODS[name], Likelihood(name)
    options = [*likelihood.spec[1], *[0.0] * (6 - len(likelihood.spec[1]))]
    planes, channels = 1, 0
    recon, target = data.recon, data.target
    if entry.planes:
        channels = int(likelihood.options.get("channels", 0))
        planes = recon[0].shape[1]
    inputs = (*recon, target.to(recon[0].dtype))
    sites = (target.shape[0], target.shape[-1])
    return Problem(
        False, [vaefast._native._C.likelihoods().index(name), len(recon), planes, channels], options, [], inputs,
        [sites, *(p.shape for p in recon)],
    )  # fmt: skip


def of_posterior(p: Parameterization, cols: int, prior: str, dtype: torch.dtype) -> Problem:
    q = posterior((2, cols), p, prior, dtype)
    given = [t for t in q.prior if isinstance(t, Tensor)]
    name, lo, hi, floor = p.spec
    wholes = [POSTERIORS.index(name), int(p.clamp is not None), int(floor > 0), int(bool(given))]
    dz = torch.randn((2, cols), generator=torch.Generator().manual_seed(3)).to(dtype)
    inputs = [t.expand(2, cols).contiguous() for t in (q.mu, q.raw, *given, dz)]
    return Problem(True, wholes, [lo, hi, floor], [-12345, 7], inputs, [(2, cols)] * (4 + len(given)))


def extremes(name: str, count: int) -> Data:
    data, dim = extreme(name, count), -1 if LIKELIHOODS[name].planes else 0
    return Data(tuple(t.unsqueeze(dim) for t in data.recon), data.target.unsqueeze(dim))


def problems() -> Iterator[tuple[Key, Problem]]:
    for dtype in DTYPES:
        for name, count in LIKELIHOOD_CASES:
            for cols in COLUMNS:
                data = training(name, count, (2, cols), dtype)
                yield (name, count, dtype, cols), reconstruction(name, data)
        for p in [*map(Parameterization, POSTERIORS), *CLAMPED_AND_FLOORED]:
            for prior in ("none", "full"):
                for cols in COLUMNS:
                    yield (p, prior, dtype, cols), of_posterior(p, cols, prior, dtype)
    for name, count in LIKELIHOOD_CASES:
        yield (name, count, "extreme"), reconstruction(name, extremes(name, count))


PROBLEMS = dict(problems())


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> dict[Key, tuple[list[Tensor], list[Tensor]]]:
    folder = tmp_path_factory.mktemp("arm")
    both = zip(*(target.solve(list(PROBLEMS.values()), folder) for target in (ARM, HOST)))
    return dict(zip(PROBLEMS, both))


@pytest.mark.parametrize("key", PROBLEMS, ids=lambda key: "-".join(map(str, key)))
def test_same_results(solved: dict[Key, tuple[list[Tensor], list[Tensor]]], key: Key) -> None:
    dtype = PROBLEMS[key].inputs[0].dtype
    slack: list[Tensor | float] = [0.0] * len(PROBLEMS[key].outputs)
    if key[-1] == "extreme":
        moved = sensitivity(*key[:1], extremes(*key[:2]))
        # what test_likelihoods leaves to sharp likelihoods
        slack = [4 * t.view(shape).nan_to_num(0.0) for t, shape in zip(moved, PROBLEMS[key].outputs)]
    for n, (found, expected, more) in enumerate(zip(*solved[key], [0.0, *slack])):
        same = torch.isfinite(found) == torch.isfinite(expected)
        assert bool(same.all()), f"result {n}"
        finite = torch.isfinite(expected)
        off = (found.double() - expected.double()).abs()[finite]
        most = (bound(expected.double(), TOLERANCE[dtype]) + more)[finite]
        assert bool((off <= most).all()), f"result {n} is {float((off / most).max()):.3g} times its bound off"


@pytest.mark.parametrize("unit", ["run_posterior_float", "run_binary", "run_counts", "run_real", "run_discrete"])
def test_loops_have_vectors(unit: str) -> None:
    """More operations on vectors of floats than on single ones."""
    (path,) = (path for path in ARM.objects() if path.name.startswith(unit))
    command = ["aarch64-linux-gnu-objdump", "-d", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    operations = "fmul|fmla|fmls|fadd|fsub|fdiv|fmadd|fmsub|fnmadd|fnmsub"
    vectors = len(re.findall(rf"\t(?:{operations})\tv\d+\.[24][sd]", listing))
    single = len(re.findall(rf"\t(?:{operations})\t[sd]\d+", listing))
    assert vectors > 500
    assert vectors > 4 * single, f"{single} operations of single numbers beside {vectors} of vectors"
