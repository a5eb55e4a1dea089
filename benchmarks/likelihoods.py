"""Workloads of single likelihoods: the loss as the projects that train with it write it, against one kernel."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Poisson, StudentT
from torch.nn import functional as F

import vaefast
from benchmarks.workload import Draw, Workload

Likelihood = str | vaefast.Likelihood
Nll = Callable[..., Tensor]

# --- counts: scvi-tools' formulas (scvi/distributions/_negative_binomial.py), a dispersion for each gene

EPS = 1e-8


def negative_binomial(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    log_theta_mu = torch.log(theta + mu + EPS)
    return -(
        theta * (torch.log(theta + EPS) - log_theta_mu)
        + x * (torch.log(mu + EPS) - log_theta_mu)
        + torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
    )


def zero_inflated(x: Tensor, mu: Tensor, theta: Tensor, pi: Tensor) -> Tensor:
    softplus_pi, log_theta_mu = F.softplus(-pi), torch.log(theta + mu + EPS)
    pi_theta_log = -pi + theta * (torch.log(theta + EPS) - log_theta_mu)
    zero = (x < EPS).type(torch.float32) * (F.softplus(pi_theta_log) - softplus_pi)
    more = -softplus_pi + pi_theta_log + x * (torch.log(mu + EPS) - log_theta_mu)
    gammas = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return -(zero + (x > EPS).type(torch.float32) * (more + gammas))


def counts(draw: Draw, B: int, G: int) -> Tensor:
    """Mostly zeros, as genes are."""
    return (-4.0 * torch.log(draw.uniform(B, G)) - 3.0).clamp(min=0.0).floor()


def zinb_inputs(draw: Draw, B: int, G: int) -> list[Tensor]:
    mu, theta = draw.normal(B, G).exp(), draw.normal(G).exp()
    return [counts(draw, B, G), *(t.requires_grad_() for t in (mu, theta, draw.normal(B, G)))]


def nb_inputs(draw: Draw, B: int, G: int) -> list[Tensor]:
    return zinb_inputs(draw, B, G)[:3]


def poisson_inputs(draw: Draw, B: int, G: int) -> list[Tensor]:
    return [counts(draw, B, G), draw.normal(B, G).requires_grad_()]


def poisson(x: Tensor, log_rate: Tensor) -> Tensor:
    return -Poisson(log_rate.exp(), validate_args=False).log_prob(x)


# --- pictures


def logits_inputs(draw: Draw, B: int, X: int) -> list[Tensor]:
    return [draw.uniform(B, X), draw.normal(B, X, std=2.0).requires_grad_()]


def probs_inputs(draw: Draw, B: int, X: int) -> list[Tensor]:
    return [draw.uniform(B, X), draw.uniform(B, X).mul(0.98).add(0.01).requires_grad_()]


def student_inputs(draw: Draw, B: int, X: int) -> list[Tensor]:
    loc, log_scale = draw.normal(B, X), draw.normal(X, std=0.3)
    df = draw.normal(X).exp().add(2.0)
    return [draw.normal(B, X), *(t.requires_grad_() for t in (loc, log_scale, df))]


def grey_inputs(draw: Draw, B: int, X: int) -> list[Tensor]:
    """As a trained decoder gives them: far from the data, and with wide scales, PixelCNN++'s own digits are few."""
    x = draw.uniform(B, X).mul(255).round().div(127.5).sub(1)
    mean, log_scale = x + draw.normal(B, X, std=0.08), draw.normal(B, X, mean=-2.0, std=0.1)
    return [x, mean.requires_grad_(), log_scale.requires_grad_()]


def probabilities(x: Tensor, p: Tensor) -> Tensor:
    return F.binary_cross_entropy(p, x, reduction="none")


def continuous(x: Tensor, logits: Tensor) -> Tensor:
    """Loaiza-Ganem & Cunningham's code, but for the series around 1/2: from 0.499 to 0.501, as in torch.distributions,
    it leaves float32 gradients that are wrong in the third digit."""
    p = torch.sigmoid(logits)
    near = (p > 0.45) & (p < 0.55)
    cut = torch.where(near, 0.45, p)
    log_norm = torch.log((torch.log1p(-cut) - torch.log(cut)).abs()) - torch.log((1 - 2 * cut).abs())
    series = math.log(2.0) + 4 / 3 * (p - 0.5) ** 2 + 104 / 45 * (p - 0.5) ** 4
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none") - torch.where(near, series, log_norm)


def student(x: Tensor, loc: Tensor, log_scale: Tensor, df: Tensor) -> Tensor:
    return -StudentT(df, loc, log_scale.exp(), validate_args=False).log_prob(x)


def discretized(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """PixelCNN++ (pixel_cnn_pp/nn.py, discretized_mix_logistic_loss), one component."""
    log_scales = torch.clamp(log_scales, min=-7.0)
    centered, inv_stdv = x - means, torch.exp(-log_scales)
    plus_in, min_in = inv_stdv * (centered + 1.0 / 255.0), inv_stdv * (centered - 1.0 / 255.0)
    cdf_delta = torch.sigmoid(plus_in) - torch.sigmoid(min_in)
    mid_in = inv_stdv * centered
    log_pdf_mid = mid_in - log_scales - 2.0 * F.softplus(mid_in)
    inner = torch.where(cdf_delta > 1e-5, torch.log(cdf_delta.clamp(min=1e-12)), log_pdf_mid - math.log(127.5))
    low, high = plus_in - F.softplus(plus_in), -F.softplus(min_in)
    return -torch.where(x < -0.999, low, torch.where(x > 0.999, high, inner))


def optimal_inputs(draw: Draw, B: int, X: int) -> list[Tensor]:
    return [draw.normal(B, X), draw.normal(B, X).requires_grad_()]


def optimal(x: Tensor, mean: Tensor) -> Tensor:
    """sigma-VAE (orybkin/sigma-vae-pytorch, model.py), its optimal sigma."""
    log_sigma = ((x - mean) ** 2).mean().sqrt().log()
    return 0.5 * torch.pow((x - mean) / log_sigma.exp(), 2) + log_sigma + 0.5 * math.log(2 * math.pi)


# --- mixtures, channels in dimension 1


def class_inputs(draw: Draw, B: int, K: int, X: int) -> list[Tensor]:
    return [draw.uniform(B, X).mul(K).floor(), draw.normal(B, K, X, std=2.0).requires_grad_()]


def cross_entropy(x: Tensor, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, x.long(), reduction="none")


def mixture_inputs(draw: Draw, B: int, K: int, X: int) -> list[Tensor]:
    x = draw.uniform(B, 3, X).mul(255).round().div(127.5).sub(1)
    return [x, draw.normal(B, 10 * K, X, std=0.5).requires_grad_()]


def mixture(x: Tensor, planes: Tensor) -> Tensor:
    """VDVAE (vae_helpers.py, discretized_mix_logistic_loss), which PixelCNN++'s became."""
    x, planes = x.movedim(1, -1), planes.movedim(1, -1)
    nr_mix = planes.shape[-1] // 10
    rest = planes[..., nr_mix:].reshape(*x.shape, nr_mix * 3)
    means, log_scales = rest[..., :nr_mix], torch.clamp(rest[..., nr_mix : 2 * nr_mix], min=-7.0)
    coeffs = torch.tanh(rest[..., 2 * nr_mix :])
    x = x.unsqueeze(-1).expand(*x.shape, nr_mix)
    m2 = means[..., 1, :] + coeffs[..., 0, :] * x[..., 0, :]
    m3 = means[..., 2, :] + coeffs[..., 1, :] * x[..., 0, :] + coeffs[..., 2, :] * x[..., 1, :]
    nll = discretized(x, torch.stack([means[..., 0, :], m2, m3], dim=-2), log_scales)
    return -torch.logsumexp(torch.log_softmax(planes[..., :nr_mix], dim=-1) - nll.sum(-2), -1)


def one(name: Likelihood, what: str, make: Callable[..., list[Tensor]], nll: Nll, row: str, **sizes: int) -> Workload:
    def fused(x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        return (vaefast.reconstruction_loss(params, x, likelihood=name, reduction="sum"),)

    return Workload(
        name=row, what=what, sizes=sizes, make=make,
        eager=lambda x, *params: (nll(x, *params).sum(),), vaefast=fused,
    )  # fmt: skip


GENES = {"B": 128, "G": 20_000}
IMAGE = {"B": 128, "X": 12_288}
REGISTERED = (
    one("zero_inflated_negative_binomial", "ZINB of 20,000 genes", zinb_inputs, zero_inflated, "zinb", **GENES),
    one("negative_binomial", "negative binomial of 20,000 genes", nb_inputs, negative_binomial, "nb", **GENES),
    one("poisson", "Poisson of 20,000 genes", poisson_inputs, poisson, "poisson", **GENES),
    one("bernoulli_probs", "BCE of probabilities", probs_inputs, probabilities, "bce-probs", **IMAGE),
    one("continuous_bernoulli", "continuous Bernoulli", logits_inputs, continuous, "continuous-bernoulli", **IMAGE),
    one("student_t", "Student's t, scale and df a pixel", student_inputs, student, "student-t", **IMAGE),
    one("discretized_logistic", "256 bins of a logistic", grey_inputs, discretized, "discretized-logistic", **IMAGE),
    one("gaussian_optimal", "a Gaussian at its best variance", optimal_inputs, optimal, "gaussian-optimal", **IMAGE),
    one("categorical", "256 shades a pixel", class_inputs, cross_entropy, "categorical", B=16, K=256, X=1024),
    one(
        "discretized_logistic_mixture",
        "ten mixed logistics of 32x32x3",
        mixture_inputs,
        mixture,
        "logistic-mixture",
        B=16,
        K=10,
        X=1024,
    ),
)
