"""Imports go down only: the layers are data here, and CONTRIBUTING.md shows them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vaefast"

# from the ground up; a module imports of those below its own layer, and of none beside it
LAYERS: list[tuple[str, ...]] = [
    ("_build", "_checks", "_distributions", "_functorch", "_limits", "_supports"),
    ("_generators",),
    ("_gaussian", "_philox"),
    ("_closed", "_counts", "_mixtures"),
    ("_closed_counts",),
    ("_densities",),
    ("_categorical", "_pairwise", "likelihoods"),
    ("_options",),
    ("_engine",),
    ("_batch", "_best_variance"),
    ("_arguments", "distributed", "presets"),
    ("_compose", "_domains", "_importance", "_plain"),
    ("_nodes",),
    ("_experts",),
    ("_torch",),
    ("_path", "_torch_direct", "_torch_philox"),
    ("_batched", "_double_backward"),
    ("_native",),
    ("_backends", "_posterior_functions"),
    ("_functions",),
    ("functional", "reference"),
    (
        "_draws",
        "_modalities",
        "_normal",
        "debug",
        "diagnostics",
        "discrete",
        "disentanglement",
        "generation",
        "modules",
        "packed",
    ),
    ("bounds", "priors", "schedules", "bayesian._priors", "bayesian._sites"),
    ("bayesian._estimators", "bayesian._low_rank", "bayesian._prediction", "bayesian._start"),
    ("bayesian._drawing",),
    ("bayesian.ivon", "bayesian.mean_field"),
    ("bayesian",),
    ("distributions", "integrations._integration"),
    ("integrations.torch_distributions", "integrations.diffusers"),
    ("integrations.pyro", "integrations.scvi"),
    ("integrations",),
    ("__init__",),
]
# what the build makes, and who alone looks at it
BUILT = {"_C": "_native", "_build_info": "_build"}
COMPILED = {"_native", "_double_backward", "_backends", "functional", "_C"}
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in PACKAGE.rglob("*.py") if path.stem not in BUILT}


def imports(name: str) -> set[str]:
    """The package's modules that a module imports, wherever in it: at its head, within functions, for types alone."""
    found: set[str] = set()
    package = (
        name.split(".")[:-1] if FILES[name].stem != "__init__" else [p for p in name.split(".") if p != "__init__"]
    )
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            assert not [a.name for a in node.names if a.name.partition(".")[0] == "vaefast"], "imports are relative"
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        start = ".".join(filter(None, base))
        for alias in node.names:
            whole = ".".join(filter(None, (start, alias.name)))
            found.add(whole if whole in FILES or whole in BUILT else start)
    return found - {name}


IMPORTS = {name: imports(name) for name in FILES}


def below(name: str) -> set[str]:
    """All that comes with a module."""
    reached, left = set(), [name]
    while left:
        for each in IMPORTS.get(left.pop(), ()):
            if each not in reached:
                reached.add(each)
                left.append(each)
    return reached


def test_every_module_has_a_layer() -> None:
    assert sorted(FILES) == sorted(HEIGHT)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_down(name: str) -> None:
    for other in IMPORTS[name]:
        if other in BUILT:
            assert BUILT[other] == name, f"{name} looks at {other}, which is {BUILT[other]}'s"
        else:
            assert HEIGHT[other] < HEIGHT[name], f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("name", ["reference", "_torch", "_functions", "_compose"])
def test_nothing_of_the_compiled_engine_comes_with_it(name: str) -> None:
    assert not below(name) & COMPILED


def test_the_imports_were_found() -> None:
    """The reader of imports sees through each way of writing them."""
    assert {"_native", "_torch", "_build"} <= IMPORTS["_backends"]
    assert {"_batched", "_double_backward"} <= IMPORTS["_native"]  # within a function
    assert {"_normal", "functional", "integrations.torch_distributions"} <= IMPORTS["integrations.scvi"]
    assert "_native" in below("functional")


def test_no_file_is_long() -> None:
    lengths = {name: path.read_text().count("\n") for name, path in FILES.items()}
    assert max(lengths.values()) < 500, lengths
    assert lengths["reference"] < 60


CSRC = ROOT / "csrc"
# the compiled core, from the ground up; a folder's own files may include each other, in no circle
COMPILED_LAYERS = [
    ("problems.h", "registry.h", "cpu/vec.h", "cpu/vec_exp.h"),
    (
        "vmath.h",
        "special.h",
        "weight.h",
        "philox.h",
        "likelihoods.h",
        "likelihoods/",
        "mixture.h",
        "posterior.h",
        "log_ratio.h",
        "categorical.h",
        "marginals.h",
        "experts.h",
        "ivon.h",
    ),
    ("device.h", "cpu/", "cuda/"),
    ("faces.h", "arguments.h"),
    ("operators/",),
    ("autograd/",),
    ("ops.cpp",),
]


def included(name: str) -> set[str]:
    """The files of csrc/ that one of them includes."""
    path = CSRC / name
    named = re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)
    beside = [(path.parent / n).resolve() for n in named]
    found = [b if b.exists() else CSRC / n for b, n in zip(beside, named)]
    return {f.resolve().relative_to(CSRC.resolve()).as_posix() for f in found if f.exists()}


SOURCES = sorted(p.relative_to(CSRC).as_posix() for p in CSRC.rglob("*.*"))


def height(source: str) -> int:
    named = [h for h, layer in enumerate(COMPILED_LAYERS) if source in layer]
    within = [h for h, layer in enumerate(COMPILED_LAYERS) if f"{source.rpartition('/')[0]}/" in layer]
    (found,) = named or within
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_includes_go_down(source: str) -> None:
    for other in included(source):
        assert height(other) <= height(source), f"{source} includes {other}"


def test_includes_make_no_circle() -> None:
    assert any(included(source) for source in SOURCES)
    done: set[str] = set()
    while len(done) < len(SOURCES):
        free = {name for name in SOURCES if name not in done and included(name) <= done}
        assert free, {name: sorted(included(name) - done) for name in SOURCES if name not in done}
        done |= free


def test_the_layers_are_documented() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert not [
        name for name in HEIGHT if f"`{name}`" not in text and not name.startswith(("integrations", "bayesian.", "__"))
    ]
