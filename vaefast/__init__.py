"""vaefast: the ELBO, its KL and its sampling, fused. Functions read like torch.nn.functional, modules like torch.nn."""

from __future__ import annotations

from . import reference
from ._args import Parameterization
from ._build import show_config
from ._ops import available_backends, use_backend
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
from .modules import ELBOLoss
from .reference import ELBOTerms

__version__ = "0.1.0"

LIKELIHOODS: tuple[str, ...] = tuple(reference.LIKELIHOODS)

__all__ = [
    "ELBOLoss",
    "ELBOTerms",
    "LIKELIHOODS",
    "Parameterization",
    "available_backends",
    "elbo_loss",
    "elbo_terms",
    "gaussian_kl",
    "kl_per_dim",
    "multi_tensor_gaussian_kl",
    "multi_tensor_sample_with_kl",
    "reconstruction_loss",
    "reference",
    "reparameterize",
    "sample_with_kl",
    "show_config",
    "use_backend",
]
