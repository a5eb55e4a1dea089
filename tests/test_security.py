"""What SECURITY.md says: which variables are read, that no file's code is run, and that no value of a tensor leads out
of its memory, which `make asan` runs too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import sanitize
import torch
from torch import Tensor

import vaefast

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "vaefast").rglob("*.py"))
# what could run a file's code, start a program, or speak to another machine
MODULES = {
    "pickle", "dill", "marshal", "shelve", "subprocess", "multiprocessing", "socket", "urllib", "http", "requests",
    "ctypes", "cffi", "code", "runpy",
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "load", "system", "popen"}


def called(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_run_or_fetched(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not MODULES & set(imported(tree))
    # torch.compile and a method of that name compile a module that the caller has
    bare = {name for name in called(tree) if name.split(".")[-1] in CALLS and name.partition(".")[0] != "self"}
    assert not bare


def test_such_calls_are_found() -> None:
    tree = ast.parse("import os, torch\nfrom pickle import loads\ntorch.load(f)\nos.system('true')\neval('1')")
    assert set(imported(tree)) & MODULES == {"pickle"}
    assert set(called(tree)) == {"torch.load", "os.system", "eval"}


def test_one_variable_is_read() -> None:
    """And by Python, which checks it; test_backends.py has what it says of another value."""
    reads = {p.name: re.findall(r"os\.environ\S*|getenv\S*", p.read_text()) for p in SOURCES}
    assert {name: found for name, found in reads.items() if found} == {
        "_backends.py": ['os.environ.get("VAEFAST_BACKEND",']
    }
    compiled = [p for p in (ROOT / "csrc").rglob("*.*") if "getenv" in p.read_text()]
    assert not compiled


# ---- hostile tensors

SOUP = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, -1.0, 1e30, 2**31, 0.5, 0.0, -(2.0**63))


def poison(t: Tensor, seed: int) -> None:
    """Any of SOUP everywhere, in place."""
    which = torch.randint(len(SOUP), t.shape, generator=torch.Generator().manual_seed(seed))
    most = torch.finfo(t.dtype).max
    values = torch.tensor(SOUP, dtype=torch.float64)
    finite = torch.where(values.isfinite(), values.clamp(-most, most), values).to(t.dtype)
    t.copy_(finite[which])


@pytest.mark.filterwarnings("ignore:likelihood .* has no kernels")
@pytest.mark.parametrize("case", list(sanitize.cases())[::5], ids=str)
def test_no_value_leads_out_of_memory(extension: object, case: sanitize.Case) -> None:
    """Whatever the tensors hold, a call gives tensors of the shapes that it should."""
    call = sanitize.call_of(case, "cpu")
    with vaefast.use_backend("native"):
        shapes = [t.shape for t in call()]
        for k, t in enumerate([*call.leaves, *(t for t in call.args if isinstance(t, Tensor))]):
            poison(t.detach(), seed=case.turn + k)
        outputs = call()
        assert [t.shape for t in outputs] == shapes
        gradients = torch.autograd.grad(outputs, call.leaves, [torch.ones_like(o) for o in outputs])
        assert [g.shape for g in gradients] == [leaf.shape for leaf in call.leaves]


def test_operators_refuse_what_their_callers_would_not_give(extension: object) -> None:
    """torch.ops.vaefast is below the checks of the functions, and has its own."""
    ops, zero = torch.ops.vaefast, torch.zeros(3, 4)
    posterior = (None, 0.0, None, 0.0, None)
    rest = (None, "logvar", -1.0, 1.0, 0.0, "none", None, True, False)
    for mu, raw, seed in (
        (zero, zero[:2], torch.zeros(2, dtype=torch.int64)),
        (zero, zero, torch.zeros(1, dtype=torch.int64)),
        (zero, zero, torch.zeros(2)),
        (zero, zero, torch.zeros(2, 2, dtype=torch.int64)[:, 0]),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            ops.posterior(mu, raw, *posterior, seed, *rest)
    marginals = [torch.zeros(3, 5) for _ in range(4)]
    for wrong in (torch.zeros(3, 4), torch.zeros(5, 3).t(), torch.zeros(3, 5, dtype=torch.float64)):
        for k in range(1, 4):
            with pytest.raises((ValueError, RuntimeError)):
                ops.marginals_forward(*(wrong if i == k else t for i, t in enumerate(marginals)), [], [])
