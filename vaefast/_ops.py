"""The compiled extension: loading it, choosing the back end, and calling its ops.

Eager calls go through pybind11 (``_C.f``), which is cheaper; ``torch.compile`` and tensor subclasses go through the
same op's dispatcher entry (``torch.ops.vaefast.f``).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _build
from ._args import Parameterization, choice
from ._philox import draw_seed

BACKENDS = ("auto", "native", "reference")
MAX_DIMS = 8  # kMaxDims in csrc/common.h

_C: Any = None


def _load() -> None:
    global _C
    if not _build.compiled():
        return
    _build.refuse_other_torch()
    from . import _C as extension

    _C = extension
    from . import _double_backward  # noqa: F401  (registers the differentiable backward ops)

    if torch.version.cuda is not None and not _build.info().cuda:
        warnings.warn(
            f"vaefast was built for the CPU only ({_build.info().why_no_cuda}); CUDA tensors take the slower "
            "pure-PyTorch reference. vaefast.show_config() tells more.",
            stacklevel=4,
        )


_load()


def _initial_backend() -> str:
    value = os.environ.get("VAEFAST_BACKEND", "auto")
    choice("the environment variable VAEFAST_BACKEND", value, BACKENDS)
    return value


_backend = _initial_backend()


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
    return (*(_C.devices() if _C is not None else ()), "reference")


def _uncovered(x: Tensor, no_grad_to: Sequence[Tensor | None]) -> str | None:
    """Why the kernels do not cover a call, or None."""
    if _C is None:
        return f"the extension is not built ({_build.why_not_compiled()})"
    device = x.device.type
    if device != "cpu" and device != "meta" and device not in _C.devices():
        return f"there are no kernels for {device} tensors"
    if x.dim() > MAX_DIMS:
        return f"there are more than {MAX_DIMS} dimensions"
    if torch._C._functorch.get_dynamic_layer_stack_depth() > 0:
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    for t in no_grad_to:
        if t is not None and t.requires_grad:
            return "eps, target and weight have gradients in the reference only"
    return None


def native_for(x: Tensor, no_grad_to: Sequence[Tensor | None] = ()) -> bool:
    """Whether this call goes to the kernels."""
    if _backend == "reference":
        return False
    why = _uncovered(x, no_grad_to)
    if why is not None and _backend == "native":
        raise RuntimeError(f"use_backend('native'): {why}; use_backend('auto') falls back to the reference")
    return why is None


def torch_noise(mu: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)


def _entry(x: Tensor) -> Any:
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return torch.ops.vaefast
    return _C


def _split(prior: Tensor | float | None) -> tuple[Tensor | None, float]:
    """A prior argument as (tensor, constant)."""
    if isinstance(prior, Tensor):
        return prior, 0.0
    return None, 0.0 if prior is None else prior


def posterior(
    mu: Tensor,
    raw: Tensor,
    prior_mu: Tensor | float | None,
    prior_logvar: Tensor | float | None,
    eps: Tensor | None,
    generator: torch.Generator | None,
    p: Parameterization,
    reduction: str,
    *,
    sample: bool,
    kl: bool,
) -> list[Tensor]:
    entry = _entry(mu)
    seed = None
    if sample and eps is None and entry is not _C:
        # identical calls of a random custom op may be merged under torch.compile; torch.randint's are not
        seed, generator = draw_seed(mu, generator), None
    result: list[Tensor] = entry.posterior(
        mu, raw, *_split(prior_mu), *_split(prior_logvar), eps, seed, generator,
        p.name, *p.bounds, p.floor, reduction, sample, kl,
    )  # fmt: skip
    return result


def reconstruction(
    params: list[Tensor], target: Tensor, weight: Tensor | None, likelihood: str, reduction: str
) -> Tensor:
    result: Tensor = _entry(params[0]).reconstruction(params, target, weight, likelihood, reduction)
    return result


def elbo(
    params: list[Tensor],
    target: Tensor,
    weight: Tensor | None,
    likelihood: str,
    mu: Tensor,
    raw: Tensor,
    prior_mu: Tensor | float | None,
    prior_logvar: Tensor | float | None,
    p: Parameterization,
    beta: float,
    reduction: str,
) -> Sequence[Tensor]:
    result: Sequence[Tensor] = _entry(mu).elbo(
        params, target, weight, likelihood, mu, raw, *_split(prior_mu), *_split(prior_logvar),
        p.name, *p.bounds, p.floor, beta, reduction,
    )  # fmt: skip
    return result
