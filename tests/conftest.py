"""What the tests share: the device, the back end, the extension that must be there, a fixed random state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import vaefast
from vaefast import _native, reference


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "isa: run again for every instruction set that was built (test_isa.py)")


# minutes each; what begins last is waited for
LONG = ("simt", "gpu_tools", "isa", "export", "distributed", "compile", "benchmarks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [f"test_{name}" for name in LONG]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a module draws while it is imported is the same in every run, too."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


def seed(number: int) -> None:
    """As ``torch.manual_seed`` does, which for every kind of device that there is not notes down who called."""
    torch.manual_seed(number) if torch.cuda.is_available() else torch.default_generator.manual_seed(number)


def require_native(device: str = "cpu") -> None:
    """Fails where the kernels are missing: a suite that skips them would pass without having tested anything."""
    if device in vaefast.available_backends():
        return
    if os.environ.get("VAEFAST_TEST_PURE_PYTHON") == "1":
        pytest.skip("no compiled extension, and VAEFAST_TEST_PURE_PYTHON=1 says that there need be none")
    pytest.fail(
        f"there are no {device} kernels; build them (`make build`), or set VAEFAST_TEST_PURE_PYTHON=1 to test without\n"
        + vaefast.show_config()
    )


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; run `make gpu` on a machine with one")
    return str(request.param)


@pytest.fixture
def native(device: str) -> Iterator[str]:
    """The kernels of the device or failure: nothing falls back unnoticed."""
    require_native(device)
    with vaefast.use_backend("native"):
        yield device


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    if request.param == "native":
        require_native(device)
    with vaefast.use_backend(request.param):
        yield str(request.param)


@pytest.fixture
def extension() -> object:
    require_native()
    return _native._C


@pytest.fixture(params=["native", "reference", "reference module"])
def face(request: pytest.FixtureRequest, extension: object) -> Iterator[ModuleType]:
    """Where a function is called: vaefast under either back end, or the reference itself."""
    if request.param == "reference module":
        yield reference
        return
    with vaefast.use_backend(request.param):
        yield vaefast


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng():
        seed(0)
        yield


@pytest.fixture
def set_threads() -> Iterator[object]:
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)
