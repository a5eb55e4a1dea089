"""Workloads of pairs: every sample against every component, or every sample of its batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import vaefast
from benchmarks.workload import Draw, Workload

LOG_2PI = math.log(2 * math.pi)
DATASET_SIZE = 60_000


def log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """As most VAE code has it."""
    return -0.5 * (LOG_2PI + logvar + (z - mu) ** 2 * torch.exp(-logvar))


# --- a mixture of Gaussians as a prior


def mixture_inputs(draw: Draw, B: int, K: int, D: int) -> list[Tensor]:
    shapes = ((B, D), (K, D), (K, D), (K,))
    return [draw.normal(*shape, std=std).requires_grad_() for shape, std in zip(shapes, (1.0, 1.0, 0.5, 0.5))]


def mixture_eager(z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    each = log_normal(z.unsqueeze(1), mus, logvars).sum(2)
    return (torch.logsumexp(each + torch.log_softmax(logits, 0), 1).mean(),)


def mixture_distributions(z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    components = Independent(Normal(mus, torch.exp(0.5 * logvars), validate_args=False), 1, validate_args=False)
    return (MixtureSameFamily(Categorical(logits=logits), components, validate_args=False).log_prob(z).mean(),)


def mixture_vaefast(z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    return (vaefast.priors.mixture_log_prob(z, mus, logvars, logits).mean(),)


# --- the total correlation of a batch, as beta-TCVAE's code has it


def tc_inputs(draw: Draw, B: int, D: int) -> list[Tensor]:
    mu, logvar = draw.normal(B, D), draw.normal(B, D, mean=-1.0, std=0.5)
    z = mu + torch.exp(0.5 * logvar) * draw.normal(B, D)
    return [t.requires_grad_() for t in (z, mu, logvar)]


def tc_eager(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    own, prior = log_normal(z, mu, logvar).sum(1), log_normal(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)
    pairs, offset = log_normal(z.unsqueeze(1), mu, logvar), math.log(len(z) * DATASET_SIZE)
    joint = torch.logsumexp(pairs.sum(2), 1) - offset
    marginals = (torch.logsumexp(pairs, 1) - offset).sum(1)
    return (own - joint).mean(), (joint - marginals).mean(), (marginals - prior).mean()


def tc_vaefast(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    return tuple(vaefast.total_correlation(z, mu, logvar, DATASET_SIZE))


REGISTERED = (
    Workload(
        name="mixture-prior", what="log density of a mixture of Gaussians", sizes={"B": 1024, "K": 500, "D": 64},
        make=mixture_inputs, eager=mixture_eager, vaefast=mixture_vaefast, distributions=mixture_distributions,
        reread=(0, 1, 2, 3), pairs=("B", "K", "D"),
    ),
    Workload(
        name="total-correlation", what="a batch's mutual information, total correlation and dimension-wise KL",
        sizes={"B": 1024, "D": 32}, make=tc_inputs, eager=tc_eager, vaefast=tc_vaefast, reread=(0, 1, 2),
        pairs=("B", "B", "D"),
    ),
)  # fmt: skip
