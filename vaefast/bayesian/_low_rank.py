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
    scaled, trace = [], wide(factors[0]).new_zeros(())
    for v, rho, logvar in zip(factors, rhos, logvars):
        rows = wide(v).reshape(-1, v.shape[-1])
        scaled.append(rows / softplus(wide(rho)).reshape(-1, 1))
        inverse = torch.exp(-torch.as_tensor(logvar, dtype=rows.dtype, device=rows.device)).expand(rho.shape)
        trace = trace + (rows.square() * inverse.reshape(-1, 1)).sum()
    return (trace - log_det(scaled).to(trace.dtype)) / 2


def log_det(blocks: Sequence[Tensor]) -> Tensor:
    """log|I + A^T A| of A in blocks of rows.

    A row whose standard deviation goes to 0, as at the maximum of many a factor analysis (Heywood 1931), is so large
    that a product in A's own precision has nothing left of the others: it is computed in float64, and A of float64 is
    made triangular without a product.
    """
    one = torch.eye(blocks[0].shape[-1], dtype=torch.float64, device=blocks[0].device)
    if blocks[0].dtype == torch.float64:
        rows = torch.cat((one, *blocks))
        # from the largest row down, so that none is made from what a larger one leaves of it
        order = rows.detach().abs().amax(1).argsort(descending=True)
        triangle = torch.linalg.qr(rows[order])[1]
        found: Tensor = 2 * triangle.diagonal().abs().log().sum()
        return found
    gram = sum((a.double().T @ a.double() for a in blocks), one)
    # positive definite, its eigenvalues at least 1
    found = 2 * torch.linalg.cholesky(gram).diagonal().log().sum()
    return found
