"""vaefast: the ELBO, its KL and its sampling, fused. Functions read like torch.nn.functional, modules like torch.nn."""

from __future__ import annotations

import importlib
from typing import Any

from . import debug, diagnostics, distributed, likelihoods, presets, reference, schedules
from ._backends import available_backends, show_config, use_backend
from ._build import __version__ as __version__
from ._domains import check
from ._options import ELBOTerms, Likelihood, Parameterization
from .functional import (
    elbo_loss,
    elbo_terms,
    gaussian_kl,
    kl_per_dim,
    multi_tensor_gaussian_kl,
    multi_tensor_sample_with_kl,
    reconstruction_loss,
    reparameterize,
    sample_with_kl,
)
from .generation import likelihood_mean, sample_likelihood
from .modules import ELBOLoss
from .packed import DiagonalGaussian

LIKELIHOODS: tuple[str, ...]

__all__ = [
    "DiagonalGaussian",
    "ELBOLoss",
    "ELBOTerms",
    "LIKELIHOODS",
    "Likelihood",
    "Parameterization",
    "available_backends",
    "check",
    "debug",
    "diagnostics",
    "distributed",
    "elbo_loss",
    "elbo_terms",
    "gaussian_kl",
    "kl_per_dim",
    "likelihood_mean",
    "likelihoods",
    "multi_tensor_gaussian_kl",
    "multi_tensor_sample_with_kl",
    "presets",
    "reconstruction_loss",
    "reference",
    "reparameterize",
    "sample_likelihood",
    "sample_with_kl",
    "schedules",
    "show_config",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # imported when asked for: few programs do, and the first registers KLs with torch
    if name in ("distributions", "integrations"):
        return importlib.import_module(f"{__name__}.{name}")
    if name == "LIKELIHOODS":
        return likelihoods.names()  # those too that were registered meanwhile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
