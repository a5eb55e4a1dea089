"""Gates on the machine code of the CUDA kernels, judged without a GPU (``make test-cuda-build``).

What the kernels are compiled to for one architecture, and an installed library with all of them.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from cuda_build import gates, model, predictions, units
from cuda_build.binary import Missing, Resources, architectures, cubin_sass, resources, tool
from cuda_build.operations import DTYPES, DType, operations
from cuda_build.paths import Flow
from cuda_build.sass import Kernel
from inputs import assert_cuda_kernels

import vaefast
from vaefast import _build, _native

pytestmark = pytest.mark.cuda_build


def need_tools() -> None:
    try:
        for find in (units.nvcc, lambda: tool("cuobjdump"), lambda: tool("nvdisasm")):
            find()
    except Missing as missing:
        pytest.skip(f"{missing}; make test-cuda-build brings a CUDA torch, whose triton has all but nvcc")


@pytest.fixture(params=units.UNITS)
def unit(request: pytest.FixtureRequest) -> Path:
    """Kernels compiled for one architecture."""
    need_tools()
    return units.cubin(request.param, gates.ARCH)


@pytest.fixture
def taken(unit: Path) -> dict[str, Resources]:
    return {name: found for (name, _), found in resources(unit).items()}


@pytest.fixture
def code(unit: Path) -> dict[str, Kernel]:
    return cubin_sass(unit)


def test_no_local_memory(taken: dict[str, Resources], code: dict[str, Kernel]) -> None:
    assert not [line for name in taken for line in gates.no_local_memory(name, taken[name], code[name])]


def test_registers_and_shared_memory_stay_within_the_baseline(taken: dict[str, Resources]) -> None:
    baseline = gates.read_baseline()[f"sm_{gates.ARCH}"]
    assert not [line for name in taken for line in gates.within(name, taken[name], baseline)]


def test_loads_and_stores_of_16_bytes(code: dict[str, Kernel]) -> None:
    assert not [line for name, kernel in code.items() for line in gates.vectors(name, kernel)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_loads_are_under_way_together(dtype: DType) -> None:
    """On the plain path, all that a thread reads once round its loop, before it uses any of it."""
    need_tools()
    code = cubin_sass(units.cubin(f"plain-{dtype.name}", gates.ARCH))
    flows = {name: Flow(kernel) for name, kernel in code.items()}
    plain = [o for o in operations(cubin_sass(units.cubin("plain-float32", gates.ARCH))) if o.plain]
    assert plain
    assert not [line for o in plain for line in gates.flights(o, dtype, flows[f"float: {o.kernel_for(dtype)}"])]


def test_float_kernels_do_no_double_arithmetic_in_their_loops(code: dict[str, Kernel]) -> None:
    floats = {name: kernel for name, kernel in code.items() if name.startswith("float")}
    if not floats:
        pytest.skip("the kernels with double arithmetic; the float ones are judged apart")
    assert not [line for name, kernel in floats.items() for line in gates.no_double(name, kernel)]


def test_instructions_stay_within_the_predictions() -> None:
    need_tools()
    fresh = predictions.predictions({"H100": model.GPUS["H100"]})
    assert not list(gates.no_slower(fresh, predictions.committed()))


@pytest.fixture
def library() -> Path:
    """The installed package's extension, with CUDA."""
    need_tools()
    if "cuda" not in vaefast.available_backends():
        pytest.skip("vaefast was built without CUDA; run make test-cuda-build")
    extension = _native._C
    assert isinstance(extension, ModuleType) and extension.__file__
    return Path(extension.__file__)


def test_installed_package_has_all_it_was_built_for(library: Path) -> None:
    assert "cuda" in vaefast.show_config()
    assert_cuda_kernels()

    wanted = {int(arch.partition("+")[0].replace(".", "")) for arch in _build.info().cuda_archs}
    assert set(architectures(library)) == wanted
    found = resources(library)
    assert not [line for (name, arch), r in found.items() for line in gates.no_local_memory(f"sm_{arch} {name}", r)]
    # the units stand for the library only while they hold the same kernels
    held = set(gates.read_baseline()[f"sm_{gates.ARCH}"])
    for arch in wanted:
        assert {name for name, at in found if at == arch} == held
