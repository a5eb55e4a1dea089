"""vaefast: the ELBO, its KL and its sampling, fused. Functions read like torch.nn.functional, modules like torch.nn."""

from __future__ import annotations

import importlib
from typing import Any

from . import (
    bayesian,
    bounds,
    debug,
    diagnostics,
    discrete,
    distributed,
    likelihoods,
    presets,
    priors,
    reference,
    schedules,
)
from ._backends import available_backends, show_config, use_backend
from ._build import __version__ as __version__
from ._domains import check
from ._modalities import product_of_experts
from ._options import ELBOTerms, Likelihood, Parameterization
from .discrete import categorical_elbo_terms, categorical_kl, sample_categorical, sample_with_categorical_kl
from .disentanglement import TCTerms, aggregate_posterior_mmd, beta_tcvae_loss, total_correlation
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
    "TCTerms",
    "aggregate_posterior_mmd",
    "available_backends",
    "bayesian",
    "beta_tcvae_loss",
    "bounds",
    "categorical_elbo_terms",
    "categorical_kl",
    "check",
    "debug",
    "diagnostics",
    "discrete",
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
    "priors",
    "product_of_experts",
    "reconstruction_loss",
    "reference",
    "reparameterize",
    "sample_categorical",
    "sample_likelihood",
    "sample_with_categorical_kl",
    "sample_with_kl",
    "schedules",
    "show_config",
    "total_correlation",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # imported when asked for: few programs do, and the first registers KLs with torch
    if name in ("distributions", "integrations"):
        return importlib.import_module(f"{__name__}.{name}")
    if name == "LIKELIHOODS":
        return likelihoods.names()  # those too that were registered meanwhile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
