"""Workloads of several draws a sample, and of several posteriors a sample: the importance-weighted bound and the
product of experts, as their papers' code writes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal
from torch.nn import functional as F

import vaefast
from benchmarks.workload import Draw, Workload

LOG_2PI = math.log(2 * math.pi)

# --- IWAE, without its networks; as in the many programs that follow Burda et al. 2016


def draws_inputs(draw: Draw, K: int, B: int, Z: int, X: int) -> list[Tensor]:
    mu, logvar, recon = draw.normal(B, Z), draw.normal(B, Z, std=0.5), draw.normal(K, B, X, std=2.0)
    return [mu.requires_grad_(), logvar.requires_grad_(), recon.requires_grad_(), draw.uniform(B, X)]


def iwae_eager(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    std = torch.exp(0.5 * logvar).expand(len(recon), *logvar.shape)
    z = mu + std * torch.randn_like(std)
    log_px = -F.binary_cross_entropy_with_logits(recon, x.expand_as(recon), reduction="none").sum(-1)
    log_pz = -0.5 * (z.pow(2) + LOG_2PI).sum(-1)
    log_qz = -0.5 * ((z - mu).pow(2) / logvar.exp() + logvar + LOG_2PI).sum(-1)
    log_w = log_px + log_pz - log_qz
    return z, -(torch.logsumexp(log_w, 0) - math.log(len(recon))).mean()


def iwae_distributions(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    q = Normal(mu, torch.exp(0.5 * logvar))
    z = q.rsample(recon.shape[:1])
    log_px = Bernoulli(logits=recon, validate_args=False).log_prob(x).sum(-1)
    log_w = log_px + Normal(torch.zeros_like(mu), torch.ones_like(mu)).log_prob(z).sum(-1) - q.log_prob(z).sum(-1)
    return z, -(torch.logsumexp(log_w, 0) - math.log(len(recon))).mean()


def iwae_vaefast(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    z = vaefast.reparameterize(mu, logvar, num_samples=len(recon))
    return z, vaefast.bounds.iwae_loss(recon, x, z, mu, logvar)


def draws_posterior(mu: Tensor, logvar: Tensor, *_: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(mu, torch.exp(0.5 * logvar))]


# --- a product of experts; Wu & Goodman 2018's code (mhw32/multimodal-vae-public, ProductOfExperts and prior_expert)

EPS = 1e-8


def experts_inputs(draw: Draw, M: int, B: int, Z: int) -> list[Tensor]:
    return [draw.normal(M, B, Z).requires_grad_(), draw.normal(M, B, Z).requires_grad_()]


def experts_eager(mus: Tensor, logvars: Tensor) -> tuple[Tensor, ...]:
    prior = torch.zeros_like(mus[:1])
    mu, logvar = torch.cat((prior, mus), dim=0), torch.cat((prior, logvars), dim=0)
    var = torch.exp(logvar) + EPS
    T = 1.0 / (var + EPS)
    pd_mu = torch.sum(mu * T, dim=0) / torch.sum(T, dim=0)
    pd_var = 1.0 / torch.sum(T, dim=0)
    return pd_mu, torch.log(pd_var + EPS)


def experts_vaefast(mus: Tensor, logvars: Tensor) -> tuple[Tensor, ...]:
    return vaefast.product_of_experts(mus, logvars)


REGISTERED = (
    Workload(
        name="iwae", what="50 draws a sample, their importance weights and IWAE's bound, MNIST-size",
        sizes={"K": 50, "B": 64, "Z": 50, "X": 784}, make=draws_inputs, eager=iwae_eager, vaefast=iwae_vaefast,
        distributions=iwae_distributions, posteriors=draws_posterior, reread=(0, 1),
    ),
    Workload(
        name="experts", what="the product of five modalities' Gaussians and the prior",
        sizes={"M": 5, "B": 128, "Z": 64}, make=experts_inputs, eager=experts_eager, vaefast=experts_vaefast,
    ),
)  # fmt: skip
