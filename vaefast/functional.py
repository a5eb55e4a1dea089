"""The public functions: those of :mod:`vaefast._functions`, by the kernels where they cover the call."""

from __future__ import annotations

from . import _backends
from ._functions import Functions, Recon
from ._gaussian import Prior

__all__ = [
    "Prior",
    "Recon",
    "elbo_loss",
    "elbo_terms",
    "gaussian_kl",
    "kl_per_dim",
    "multi_tensor_gaussian_kl",
    "multi_tensor_sample_with_kl",
    "reconstruction_loss",
    "reparameterize",
    "sample_with_kl",
]

_functions = Functions(_backends, __name__)

reparameterize = _functions.reparameterize
gaussian_kl = _functions.gaussian_kl
kl_per_dim = _functions.kl_per_dim
sample_with_kl = _functions.sample_with_kl
multi_tensor_gaussian_kl = _functions.multi_tensor_gaussian_kl
multi_tensor_sample_with_kl = _functions.multi_tensor_sample_with_kl
reconstruction_loss = _functions.reconstruction_loss
elbo_terms = _functions.elbo_terms
elbo_loss = _functions.elbo_loss
