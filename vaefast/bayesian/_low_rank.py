"""A posterior N(mu, D + V V^T) over all chosen parameters together, D diagonal and V of few columns.

A draw is ``mu + sqrt(D) eps + V c`` with c ~ N(0, I); the determinant is ``|D| |I + V^T D^-1 V|`` (the matrix
determinant lemma), so that its KL is the diagonal's with two terms more. Tomczak et al. 2020 (Efficient low rank
Gaussian variational inference for neural networks) have it for each layer; one V for all correlates layers too, at the
same cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._gaussian import softplus, wide

# of the standard deviations, what the factors' columns start with together
SHARE = 0.1


def start(rho: Tensor, rank: int) -> Tensor:
    """Small and not 0, where the KL's gradient would be 0: ``[..., rank]``."""
    found: Tensor = (
        SHARE * rank**-0.5 * softplus(rho.detach()).unsqueeze(-1) * rho.new_empty(*rho.shape, rank).normal_()
    )
    return found


def displaced(weights: Sequence[Tensor], factors: Sequence[Tensor], c: Tensor) -> list[Tensor]:
    return [w + v @ c.to(v.dtype) for w, v in zip(weights, factors)]


def extra_kl(factors: Sequence[Tensor], rhos: Sequence[Tensor], logvars: Sequence[Tensor | float]) -> Tensor:
    """KL(N(mu, D + V V^T) || p) - KL(N(mu, D) || p), where p is diagonal with the variances P:
    ``(tr(P^-1 V V^T) - log|I + V^T D^-1 V|) / 2``."""
    rank = factors[0].shape[-1]
    first = wide(factors[0])
    gram = torch.eye(rank, dtype=first.dtype, device=first.device)
    trace = first.new_zeros(())
    for v, rho, logvar in zip(factors, rhos, logvars):
        rows = wide(v).reshape(-1, rank)
        scaled = rows / softplus(wide(rho)).reshape(-1, 1)
        gram = gram + scaled.T @ scaled
        inverse = torch.exp(-torch.as_tensor(logvar, dtype=rows.dtype, device=rows.device)).expand(rho.shape)
        trace = trace + (rows.square() * inverse.reshape(-1, 1)).sum()
    # which is positive definite, its eigenvalues at least 1
    logdet: Tensor = 2 * torch.linalg.cholesky(gram).diagonal().log().sum()
    return (trace - logdet) / 2
