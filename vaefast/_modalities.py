"""The Gaussian that several modalities agree on: its arguments, checked, and the engine that computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends
from ._checks import dense, flag, floating, like, same_device
from ._engine import Experts


def product_of_experts(
    mus: Tensor, logvars: Tensor, mask: Tensor | None = None, *, prior: bool = True
) -> tuple[Tensor, Tensor]:
    """The Gaussian that M modalities agree on, the product of their densities: precisions add up.

    Wu & Goodman 2018 (arXiv:1802.05335): ``1 / var = 1 + sum_m 1 / var_m`` and ``mu = var sum_m mu_m /
    var_m``. Computed from log variances, of any size, with no precision formed; nothing is added to a variance.

    Args:
        mus, logvars: ``[M, B, D]``, each modality's mean and log variance; D may be several dimensions.
        mask: ``[M, B]``, bool: which modalities there are; None for all. What a missing one holds, NaN too, reaches
            neither result nor gradient. It has the first dimensions of ``mus``, or 1 in their place: ``[M, S, 1]`` goes
            with ``[M, S, B, D]``, as for S subsets.
        prior: whether N(0, I) is an expert too.

    Returns:
        ``(mu, logvar)``, ``[B, D]`` each, in the dtypes of ``mus`` and ``logvars``. Where no expert is left, which
        takes ``prior=False``, the mean is 0 and the log variance infinite.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device.

    Example::

        mus, logvars = torch.randn(3, 128, 20), torch.randn(3, 128, 20)  # of three modalities
        mu, logvar = vaefast.product_of_experts(mus, logvars, mask=torch.rand(3, 128) > 0.5)
    """
    mus = floating("mus", mus)
    logvars = like("logvars", logvars, "mus", mus)
    if mus.dim() < 2 or not mus.shape[0]:
        raise ValueError(f"mus must be [M, B, ...] of at least one modality, got shape {tuple(mus.shape)}")
    if mask is not None:
        _check(mask, mus)
    of = Experts(mus, logvars, mask, flag("prior", prior))
    return _backends.engine(mus, beside=(logvars, mask)).experts(of)


def _check(mask: Tensor, mus: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = str(mask.dtype)[6:] if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be None or a bool tensor, True where a modality is there, got {got}")
    dense("mask", mask)
    dims = mask.dim()
    if dims > mus.dim() or any(a != b and a != 1 for a, b in zip(mask.shape, mus.shape)) or not dims:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not go with the first dimensions of mus, whose shape is "
            f"{tuple(mus.shape)}; it is [M, B]"
        )
    same_device("mask", mask, "mus", mus.device)
