"""Pure-PyTorch versions of the public functions: the fallback, and the path for what the kernels do not cover (double
backward, torch.func, forward-mode AD). With the two registries that a likelihood and a parameterization join."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import _torch, _torch_direct
from ._engine import Direct, Engine
from ._functions import Functions
from ._gaussian import PARAMETERIZATIONS
from ._options import ELBOTerms, Likelihood
from .likelihoods import COMPOSED, DOMAINS, LIKELIHOODS, LikelihoodEntry

__all__ = [
    "COMPOSED",
    "DOMAINS",
    "LIKELIHOODS",
    "PARAMETERIZATIONS",
    "ELBOTerms",
    "LikelihoodEntry",
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


class _PyTorch:
    def direct(self, x: object) -> Direct | None:
        return _torch_direct.direct if _torch_direct.takes(x) else None

    def engine(
        self, x: Tensor, *no_grad_to: Tensor | None, likelihood: Likelihood | None = None, beside: Sequence[object] = ()
    ) -> Engine:
        return _torch


_functions = Functions(_PyTorch(), __name__)

reparameterize, gaussian_kl, kl_per_dim = _functions.reparameterize, _functions.gaussian_kl, _functions.kl_per_dim
sample_with_kl, reconstruction_loss = _functions.sample_with_kl, _functions.reconstruction_loss
multi_tensor_gaussian_kl = _functions.multi_tensor_gaussian_kl
multi_tensor_sample_with_kl = _functions.multi_tensor_sample_with_kl
elbo_terms, elbo_loss = _functions.elbo_terms, _functions.elbo_loss
