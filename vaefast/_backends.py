"""Choosing between the two engines, call by call: what there is, what the user asked for, what covers the call.

This module is ``_engine.Engines``, by its functions :func:`direct` and :func:`engine`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _build, _native, _torch, _torch_direct, _torch_philox
from ._checks import choice
from ._engine import Direct, Engine
from ._functorch import tracing
from ._options import Likelihood

BACKENDS = ("auto", "native", "reference")


def _initial_backend() -> str:
    value = os.environ.get("VAEFAST_BACKEND", "auto")
    choice("the environment variable VAEFAST_BACKEND", value, BACKENDS)
    return value


_backend = _initial_backend()
_warned_of: set[str] = set()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses the back end inside a ``with`` block, for the whole process.

    Args:
        name: ``"auto"`` takes the compiled kernels wherever they cover the call; ``"native"`` demands them;
            ``"reference"`` takes pure PyTorch. The environment variable ``VAEFAST_BACKEND`` sets the default.

    Raises:
        ValueError: another name.
        RuntimeError: inside the block, when ``"native"`` is asked for and does not cover a call.

    Example::

        with vaefast.use_backend("reference"):
            expected = vaefast.elbo_loss(recon, x, mu, logvar)
    """
    global _backend
    choice("backend", name, BACKENDS)
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def available_backends() -> tuple[str, ...]:
    """The back ends that can be used here, fastest first; ``"reference"`` always is one.

    Example::

        "cpu" in vaefast.available_backends()
    """
    return (*_native.devices(), "reference")


def show_config() -> str:
    """What was built, with what, and why not CUDA if not, as text for people and bug reports.

    Example::

        print(vaefast.show_config())
    """
    b = _build.info()
    lines = [
        f"vaefast {_build.__version__}, torch {torch.__version__}",
        f"back ends: {', '.join(available_backends())} (default: {_backend})",
    ]
    capability = _native.cpu_capability()
    if capability is None:
        return "\n".join([*lines, f"no compiled extension: {_build.why_not_compiled()}"])
    lines += [
        f"cpu: built for {', '.join(b.cpu)}; this machine runs {capability}; {b.compiler}",
        f"cuda: built with {b.cuda} for {' '.join(b.cuda_archs)}; {torch.cuda.device_count()} device(s) visible"
        if b.cuda
        else f"cuda: not built: {b.why_no_cuda}",
    ]
    return "\n".join(lines)


def direct(x: object) -> Direct | None:
    if _backend != "reference" and _native.is_plain(x):
        return _native.eager
    if torch.compiler.is_compiling():
        return _native.short if _backend != "reference" and _native.is_seen_whole(x) else None
    return _torch_direct.direct if _backend != "native" and _torch_direct.takes(x) else None


def kernels() -> Any:
    """The extension, for an entry that itself says whether it covers a call; None where none is to be entered."""
    hidden = _backend == "reference" or torch.compiler.is_compiling() or tracing()
    return None if hidden else _native._C


def native_for(x: Tensor) -> bool:
    """Whether this call goes to the kernels, or would but for torch.jit.trace."""
    return engine(x).noise != _torch.noise


def engine(
    x: Tensor, *no_grad_to: Tensor | None, likelihood: Likelihood | None = None, beside: Sequence[object] = ()
) -> Engine:
    if _backend == "reference":
        return _torch
    why = _native.why_not(x, no_grad_to, beside)
    if why is None and tracing():
        return _torch_philox
    if why is None and _backend == "auto" and torch.compiler.is_exporting():
        return _torch  # whose operators every consumer of an exported program knows
    if why is None and likelihood is not None and likelihood.name not in _native.LIKELIHOODS:
        why = f"likelihood {likelihood.name!r} is written in Python alone"
        _tell_once(likelihood.name)
    if why is None:
        return _native.eager if _native.is_eager(x) else _native.traced
    if _backend == "native":
        why += f" ({_build.why_not_compiled()})" if not _native.devices() else ""
        raise RuntimeError(f"use_backend('native'): {why}; use_backend('auto') falls back to the reference")
    return _torch


def _tell_once(likelihood: str) -> None:
    if _backend != "auto" or likelihood in _warned_of or torch.compiler.is_compiling():
        return
    _warned_of.add(likelihood)
    warnings.warn(
        f"likelihood {likelihood!r} has no kernels, so that PyTorch computes it. A struct of that name in "
        "csrc/likelihoods/, and vaefast built again, bring its loss and gradient in one pass, on CPU and CUDA, in "
        "place of a kernel and a buffer for each operation (docs/extending.md).",
        stacklevel=2,
    )
