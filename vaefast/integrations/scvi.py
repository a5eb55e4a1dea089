"""scvi-tools: ``log_nb_positive``, ``log_zinb_positive`` and ``log_mixture_nb``, with them the count distributions'
``log_prob``, fused, and by :mod:`vaefast.integrations.torch_distributions` its models' normals.

scvi-tools adds its ``eps`` to the dispersion too, within a logarithm, which moves a value by about ``eps`` = 1e-8.
A negative count, against which it warns, gives NaN here. Other ``log_fn`` and ``lgamma_fn`` than PyTorch's (JAX's,
MPS's), counts with a gradient and mixtures of two dispersions stay scvi-tools'.

Lopez et al. 2018 (scVI), supplementary.

Example::

    vaefast.integrations.scvi.enable()
    model = scvi.model.SCVI(adata)
    model.train()
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _normal
from .._checks import is_real
from .._options import Likelihood
from ..functional import reconstruction_loss
from . import torch_distributions
from ._integration import Coverage, Integration, library, replace_imported

__all__ = ["disable", "enable", "enabled"]


def _log_prob(name: str, eps: float, x: Tensor, mu: Tensor, *more: Tensor) -> Tensor:
    mu, x = torch.broadcast_tensors(mu, x, *more)[:2]
    likelihood = name if eps == 1e-8 else Likelihood(name, eps=eps)
    return -reconstruction_loss((mu, *more), x, likelihood=likelihood, reduction="none")


def _covered(eps: object, log_fn: object, lgamma_fn: object, x: Tensor, *params: Tensor) -> bool:
    return (
        is_real(eps)
        and math.isfinite(eps)
        and log_fn is torch.log
        and lgamma_fn is torch.lgamma
        and _normal.usable(x, *params)
        and not x.requires_grad
        and _backends.native_for(x)
    )


def _install(undo: ExitStack, noise: str | None) -> None:
    module = library("scvi.distributions._negative_binomial", "scvi-tools")
    nb: Callable[..., Tensor] = module.log_nb_positive
    zinb: Callable[..., Tensor] = module.log_zinb_positive
    mixture: Callable[..., Tensor] = module.log_mixture_nb

    def log_nb_positive(
        x: Any,
        mu: Any,
        theta: Any,
        eps: float = 1e-8,
        log_fn: Callable[..., Any] = torch.log,
        lgamma_fn: Callable[..., Any] = torch.lgamma,
    ) -> Any:
        if _covered(eps, log_fn, lgamma_fn, x, mu, theta):
            return _log_prob("negative_binomial", eps, x, mu, theta)
        return nb(x, mu, theta, eps, log_fn, lgamma_fn)

    def log_zinb_positive(
        x: Tensor,
        mu: Tensor,
        theta: Tensor,
        pi: Tensor,
        eps: float = 1e-8,
        log_fn: Callable[..., Any] = torch.log,
        lgamma_fn: Callable[..., Any] = torch.lgamma,
    ) -> Tensor:
        if _covered(eps, log_fn, lgamma_fn, x, mu, theta, pi):
            theta = theta.view(1, -1) if theta.dim() == 1 else theta  # as theirs, also where the rest has one dimension
            return _log_prob("zero_inflated_negative_binomial", eps, x, mu, theta, pi)
        return zinb(x, mu, theta, pi, eps, log_fn, lgamma_fn)

    def log_mixture_nb(
        x: Tensor,
        mu_1: Tensor,
        mu_2: Tensor,
        theta_1: Tensor,
        theta_2: Tensor | None,
        pi_logits: Tensor,
        eps: float = 1e-8,
        log_fn: Callable[..., Any] = torch.log,
        lgamma_fn: Callable[..., Any] = torch.lgamma,
    ) -> Tensor:
        if theta_2 is None and _covered(eps, log_fn, lgamma_fn, x, mu_1, mu_2, theta_1, pi_logits):
            return _log_prob("negative_binomial_mixture", eps, x, mu_1, mu_2, theta_1, pi_logits)
        return mixture(x, mu_1, mu_2, theta_1, theta_2, pi_logits, eps, log_fn, lgamma_fn)

    for theirs, ours in ((nb, log_nb_positive), (zinb, log_zinb_positive), (mixture, log_mixture_nb)):
        replace_imported(undo, "scvi", theirs, ours)
    torch_distributions.integration.hold("scvi", noise)
    undo.callback(torch_distributions.integration.release, "scvi")


integration = Integration(
    _install, lambda: Coverage(("log_nb_positive", "log_zinb_positive", "log_mixture_nb", "Normal"))
)
enable, disable, enabled = integration.enable, integration.disable, integration.enabled
