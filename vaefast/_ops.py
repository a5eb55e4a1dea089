"""The compiled extension: loading it, choosing the back end, and calling its ops.

Eager calls go through pybind11 (``_C.f``), which is cheaper; ``torch.compile`` and tensor subclasses go through the
same op's dispatcher entry (``torch.ops.vaefast.f``).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _build, _functorch
from ._args import Likelihood, Parameterization, choice, is_real
from ._generators import explain_to_compilers
from ._philox import draw_seed

BACKENDS = ("auto", "native", "reference")
MAX_DIMS = 8  # kMaxDims in csrc/common.h
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

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
        return "the extension is not built"
    device = x.device.type
    if device != "cpu" and device != "meta" and device not in _C.devices():
        return f"there are no kernels for {device} tensors"
    if x.dim() > MAX_DIMS:
        return f"there are more than {MAX_DIMS} dimensions"
    if _functorch.transforming():
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
        why += f" ({_build.why_not_compiled()})" if _C is None else ""
        raise RuntimeError(f"use_backend('native'): {why}; use_backend('auto') falls back to the reference")
    return why is None


def attempt(entry: str, x: Any, args: Callable[[], tuple[Any, ...]]) -> Any:
    """What the extension's entry returns, or None where the long way has to be gone.

    A plain eager call (nothing traces, transforms or refuses x, its first tensor) is checked by the entry itself. Only
    where that raises are the checks in ``_args`` made, which say what is wrong for people and take longer than a small
    kernel.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) not in PLAIN_TENSORS
        or _C is None
        or _backend == "reference"
        or forward_ad._current_level >= 0
        or _functorch.depth() > 0
        or not (x.is_cpu or x.device.type in _C.devices())
    ):
        return None
    try:
        return getattr(_C, entry)(*args())
    except (TypeError, ValueError):
        return None


def torch_noise(mu: Tensor, generator: torch.Generator | None) -> Tensor:
    explain_to_compilers(generator)
    return torch.randn(mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)


def _entry(x: Tensor) -> Any:
    if torch.compiler.is_compiling() or type(x) not in PLAIN_TENSORS:
        return torch.ops.vaefast
    return _C


def split(prior: object) -> tuple[Tensor | None, float]:
    """A prior argument as (tensor, constant)."""
    if prior is None:
        return None, 0.0
    if isinstance(prior, Tensor):
        return prior, 0.0
    if not is_real(prior):
        raise TypeError(f"a prior must be None, a float or a torch.Tensor, got {type(prior).__name__}")
    return None, float(prior)


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
    balance: float | None = None,
) -> list[Tensor]:
    entry = _entry(mu)
    seed = None
    if sample and eps is None and entry is not _C:
        # identical calls of a random custom op may be merged under torch.compile; torch.randint's are not
        seed, generator = draw_seed(mu, generator), None
    result: list[Tensor] = entry.posterior(
        mu, raw, *split(prior_mu), *split(prior_logvar), eps, seed, generator,
        *p.spec, reduction, sample, kl, balance,
    )  # fmt: skip
    return result


def packed_posterior(
    moments: Tensor,
    dim: int,
    p: Parameterization,
    prior: tuple[Tensor, Parameterization] | None,
    generator: torch.Generator | None,
    reduction: str,
    *,
    sample: bool,
    kl: bool,
) -> list[Tensor]:
    entry = _entry(moments)
    seed = None
    foreign = generator is not None and generator.device.type != moments.device.type
    if sample and (entry is not _C or foreign):
        seed, generator = draw_seed(moments, generator), None
    _, lo, hi, _ = p.spec
    packed, (_, prior_lo, prior_hi, _) = (None, p.spec) if prior is None else (prior[0], prior[1].spec)
    result: list[Tensor] = entry.packed_posterior(
        moments, dim, packed, prior_lo, prior_hi, seed, generator, lo, hi, reduction, sample, kl
    )
    return result


def multi_posterior(
    mus: list[Tensor],
    raws: list[Tensor],
    prior_mus: list[Tensor],
    prior_logvars: list[Tensor],
    prior_mu: float,
    prior_logvar: float,
    generator: torch.Generator | None,
    p: Parameterization,
    reduction: str,
    *,
    sample: bool,
) -> list[Tensor]:
    entry = _entry(mus[0])
    seed = None
    if sample and entry is not _C:
        seed, generator = draw_seed(mus[0], generator), None
    result: list[Tensor] = entry.multi_posterior(
        mus, raws, prior_mus, prior_mu, prior_logvars, prior_logvar, seed, generator, *p.spec, reduction, sample, True
    )
    return result


def reconstruction(
    params: list[Tensor],
    target: Tensor,
    weight: Tensor | None,
    likelihood: Likelihood,
    reduction: str,
    overwrite_recon: bool,
) -> Tensor:
    result: Tensor = _entry(params[0]).reconstruction(
        params, target, weight, *likelihood.spec, reduction, overwrite_recon
    )
    return result


def elbo(
    params: list[Tensor],
    target: Tensor,
    weight: Tensor | None,
    likelihood: Likelihood,
    mu: Tensor,
    raw: Tensor,
    prior_mu: Tensor | float | None,
    prior_logvar: Tensor | float | None,
    p: Parameterization,
    beta: float,
    reduction: str,
    balance: float | None,
    overwrite_recon: bool,
) -> Sequence[Tensor]:
    result: Sequence[Tensor] = _entry(mu).elbo(
        params, target, weight, *likelihood.spec, mu, raw, *split(prior_mu), *split(prior_logvar),
        *p.spec, beta, reduction, balance, overwrite_recon,
    )  # fmt: skip
    return result
