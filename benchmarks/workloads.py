"""The workloads: what is computed, on what sizes, in PyTorch as people write it and in vaefast.

A new workload is one entry in WORKLOADS. Every implementation takes the same inputs and returns the same outputs in the
same order, the samples first; the harness does the rest. The truth it checks against is the eager implementation
in float64, with the noise that the checked implementation drew (recovered from its sample; see ``posteriors``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, OneHotCategoricalStraightThrough, kl_divergence
from torch.nn import functional as F

import vaefast
from benchmarks import bounds, likelihoods, normals, pairwise
from benchmarks.workload import Draw, Function, Workload

LOG_2PI = math.log(2 * math.pi)
# of DreamerV3's latents, and the uniform share in them
CLASSES, UNIMIX = 32, 0.01


# --- PyTorch as people write it: the helpers of most VAE code


def sample(mu: Tensor, logvar: Tensor) -> Tensor:
    std = torch.exp(0.5 * logvar)
    eps = torch.randn_like(std)
    return mu + eps * std


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def q_of(mu: Tensor, logvar: Tensor) -> Normal:
    return Normal(mu, torch.exp(0.5 * logvar))


def standard_normal(like: Tensor) -> Normal:
    return Normal(torch.zeros_like(like), torch.ones_like(like))


def posterior(mu: Tensor, logvar: Tensor, *_: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(mu, torch.exp(0.5 * logvar))]


# --- sampling and the loss of a VAE, without its networks


def vae_inputs(draw: Draw, B: int, Z: int, X: int) -> list[Tensor]:
    mu, logvar, recon = draw.normal(B, Z), draw.normal(B, Z, std=0.5), draw.normal(B, X, std=2.0)
    return [mu.requires_grad_(), logvar.requires_grad_(), recon.requires_grad_(), draw.uniform(B, X)]


def bce_kl(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(recon, x, reduction="sum") + kl(mu, logvar)


def elbo(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return vaefast.elbo_loss(recon, x, mu, logvar, reduction="sum")


def bce_eager(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return sample(mu, logvar), bce_kl(recon, x, mu, logvar)


def bce_distributions(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    q = q_of(mu, logvar)
    z = q.rsample()
    nll = -Bernoulli(logits=recon, validate_args=False).log_prob(x).sum()  # x is grey, not binary
    return z, nll + kl_divergence(q, standard_normal(mu)).sum()


def bce_vaefast(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return vaefast.reparameterize(mu, logvar), elbo(recon, x, mu, logvar)


def decoded_inputs(draw: Draw, B: int, Z: int, X: int) -> list[Tensor]:
    """A decoder's last layer in place of the reconstruction: what it adds a trained bias to."""
    mu, logvar, hidden, x = vae_inputs(draw, B, Z, X)
    return [mu, logvar, draw.normal(B, 1).requires_grad_(), hidden.detach(), x]


def decoded_eager(mu: Tensor, logvar: Tensor, bias: Tensor, hidden: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return bce_eager(mu, logvar, hidden + bias, x)


def decoded_vaefast(mu: Tensor, logvar: Tensor, bias: Tensor, hidden: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    recon = hidden + bias
    return vaefast.reparameterize(mu, logvar), vaefast.elbo_loss(
        recon, x, mu, logvar, reduction="sum", overwrite_recon=True
    )


def gaussian_eager(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    z = sample(mu, logvar)
    nll = 0.5 * (F.mse_loss(recon, x, reduction="sum") + LOG_2PI * x.numel())
    return z, nll + kl(mu, logvar)


def gaussian_distributions(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    q = q_of(mu, logvar)
    z = q.rsample()
    return z, -Normal(recon, 1.0).log_prob(x).sum() + kl_divergence(q, standard_normal(mu)).sum()


def gaussian_vaefast(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    z = vaefast.reparameterize(mu, logvar)
    return z, vaefast.elbo_loss(recon, x, mu, logvar, likelihood="gaussian", reduction="sum")


def vae_bce(name: str, what: str, B: int, Z: int, X: int) -> Workload:
    return Workload(
        name=name, what=what, sizes={"B": B, "Z": Z, "X": X}, make=vae_inputs, eager=bce_eager, vaefast=bce_vaefast,
        distributions=bce_distributions, posteriors=posterior, reread=(0, 1),
    )  # fmt: skip


# --- sampling and KL alone


def moments(draw: Draw, B: int, Z: int) -> list[Tensor]:
    return [draw.normal(B, Z).requires_grad_(), draw.normal(B, Z, std=0.5).requires_grad_()]


def sample_kl_eager(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    return sample(mu, logvar), kl(mu, logvar)


def sample_kl_distributions(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    q = q_of(mu, logvar)
    return q.rsample(), kl_divergence(q, standard_normal(mu)).sum()


def sample_kl_vaefast(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    return vaefast.sample_with_kl(mu, logvar, reduction="sum")


# --- standard normal numbers. vaefast has no call that only draws: its reads two tensors, multiplies and adds besides,
# which eager need not, and which is left to count against it


def normal_inputs(draw: Draw, N: int) -> list[Tensor]:
    """Nothing to read: the generator alone."""
    return [torch.zeros((), device=draw.device).expand(N), torch.ones((), device=draw.device).expand(N)]


def normal_eager(mu: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    return (torch.randn_like(mu),)


def normal_vaefast(mu: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    return (vaefast.reparameterize(mu, std, parameterization="std"),)


def normal_posterior(mu: Tensor, std: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(mu, std)]


# --- a latent diffusion autoencoder's posterior: one tensor of moments, its two halves interleaved by sample

CHANNELS = 8
DIFFUSERS = vaefast.Parameterization("logvar", clamp=(-30.0, 20.0))


def latent_inputs(draw: Draw, B: int, H: int, W: int) -> list[Tensor]:
    return [draw.normal(B, CHANNELS, H, W).requires_grad_()]


def latent_eager(moments: Tensor) -> tuple[Tensor, ...]:
    mean, logvar = torch.chunk(moments, 2, dim=1)
    logvar = torch.clamp(logvar, -30.0, 20.0)
    std, var = torch.exp(0.5 * logvar), torch.exp(logvar)
    z = mean + std * torch.randn_like(std)
    per_sample = 0.5 * torch.sum(torch.pow(mean, 2) + var - 1.0 - logvar, dim=[1, 2, 3])
    return z, torch.sum(per_sample) / per_sample.shape[0]


def latent_distributions(moments: Tensor) -> tuple[Tensor, ...]:
    mean, logvar = torch.chunk(moments, 2, dim=1)
    q = q_of(mean, torch.clamp(logvar, -30.0, 20.0))
    return q.rsample(), kl_divergence(q, standard_normal(mean)).sum(dim=[1, 2, 3]).mean()


def latent_vaefast(moments: Tensor) -> tuple[Tensor, ...]:
    mean, logvar = moments.chunk(2, dim=1)
    return vaefast.sample_with_kl(mean, logvar, parameterization=DIFFUSERS)


def packed_vaefast(moments: Tensor) -> tuple[Tensor, ...]:
    return vaefast.DiagonalGaussian(moments).sample_with_kl(reduction="batchmean")


def latent_posterior(moments: Tensor) -> list[tuple[Tensor, Tensor]]:
    mean, logvar = torch.chunk(moments, 2, dim=1)
    return posterior(mean, logvar.clamp(-30.0, 20.0))


# --- a Bayesian neural network's weights: mean-field, std = softplus(rho), prior N(0, 0.1^2)

PRIOR_STD = 0.1


def bnn_inputs(draw: Draw, weights: int) -> list[Tensor]:
    return [draw.normal(weights, std=0.1).requires_grad_(), draw.normal(weights, mean=-3.0, std=0.1).requires_grad_()]


def bnn_eager(mu: Tensor, rho: Tensor) -> tuple[Tensor, ...]:
    sigma = torch.log1p(torch.exp(rho))
    weight = mu + sigma * torch.randn_like(sigma)
    kl = math.log(PRIOR_STD) - torch.log(sigma) + (sigma**2 + mu**2) / (2 * PRIOR_STD**2) - 0.5
    return weight, kl.sum()


def bnn_distributions(mu: Tensor, rho: Tensor) -> tuple[Tensor, ...]:
    q = Normal(mu, F.softplus(rho))
    return q.rsample(), kl_divergence(q, Normal(torch.zeros_like(mu), torch.full_like(mu, PRIOR_STD))).sum()


def bnn_vaefast(mu: Tensor, rho: Tensor) -> tuple[Tensor, ...]:
    return vaefast.sample_with_kl(mu, rho, 0.0, 2 * math.log(PRIOR_STD), parameterization="softplus", reduction="sum")


def bnn_posterior(mu: Tensor, rho: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(mu, F.softplus(rho))]


# --- a hierarchical VAE's KLs: one between two learned Gaussians a layer

LAYERS = 40


def hierarchy_inputs(draw: Draw, B: int, D: int) -> list[Tensor]:
    """mu, logvar, prior mu, prior logvar of each layer in turn."""
    return [draw.normal(B, D, std=(1.0, 0.5)[i % 2]).requires_grad_() for i in range(4 * LAYERS)]


def layers(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    return [tensors[i : i + 4] for i in range(0, len(tensors), 4)]


def two_gaussians(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    ratio = (logvar.exp() + (mu - prior_mu) ** 2) / prior_logvar.exp()
    return 0.5 * torch.sum(prior_logvar - logvar + ratio - 1)


def hierarchy_eager(*tensors: Tensor) -> tuple[Tensor, ...]:
    return (torch.stack([two_gaussians(*layer) for layer in layers(tensors)]).sum(),)


def hierarchy_distributions(*tensors: Tensor) -> tuple[Tensor, ...]:
    kls = [kl_divergence(q_of(a, b), q_of(c, d)).sum() for a, b, c, d in layers(tensors)]
    return (torch.stack(kls).sum(),)


def hierarchy_vaefast(*tensors: Tensor) -> tuple[Tensor, ...]:
    lists = (tensors[k::4] for k in range(4))
    return (vaefast.multi_tensor_gaussian_kl(*lists, reduction="sum"),)


# --- discrete latents, as DreamerV3 has them


def latents_inputs(draw: Draw, B: int, L: int) -> list[Tensor]:
    """Logits of the posterior and of the prior."""
    q, p = draw.normal(B, L, CLASSES), draw.normal(B, L, CLASSES)
    return [q.requires_grad_(), p.requires_grad_()]


def mixed(logits: Tensor) -> Tensor:
    probs = torch.softmax(logits, -1) * (1 - UNIMIX) + UNIMIX / logits.shape[-1]
    return torch.log(probs)


def latents_eager(q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    """The distributions' arithmetic, and of the sample its gradient: what it is beside its value, which is random."""
    posterior, prior = (OneHotCategoricalStraightThrough(logits=mixed(t), validate_args=False) for t in (q, p))
    z = posterior.rsample()
    return z - z.detach(), kl_divergence(posterior, prior).sum()


def latents_vaefast(q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    z, kl = vaefast.sample_with_categorical_kl(q, p, unimix=UNIMIX, reduction="sum")
    return z - z.detach(), kl


# --- a training step of a small VAE: its networks, the loss, backward, Adam

PIXELS, HIDDEN, LATENT = 784, 400, 20


def train_inputs(draw: Draw, B: int) -> list[Tensor]:
    shapes = [(HIDDEN, PIXELS), (2 * LATENT, HIDDEN), (HIDDEN, LATENT), (PIXELS, HIDDEN)]
    weights = [draw.normal(n, m, std=m**-0.5).requires_grad_() for n, m in shapes]
    biases = [torch.zeros(n, device=draw.device, requires_grad=True) for n, _ in shapes]
    return [draw.uniform(B, PIXELS), *[t for pair in zip(weights, biases) for t in pair]]


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, w1, b1)), w2, b2)


def encoder(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    mu, logvar = mlp(x, *weights[:4]).chunk(2, dim=1)
    return mu, logvar


def decoder(z: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return mlp(z, *weights[4:])


# what a step does beside its networks: the sample, and the loss
TRAINED: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "eager": (sample, bce_kl),
    "vaefast": (vaefast.reparameterize, elbo),
}


def trained(provider: str) -> Function:
    draw, loss = TRAINED[provider]

    def step(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        mu, logvar = encoder(x, weights)
        z = draw(mu, logvar)
        return z.detach(), loss(decoder(z, weights), x, mu, logvar)

    return step


def train_posterior(x: Tensor, *weights: Tensor) -> list[tuple[Tensor, Tensor]]:
    return posterior(*encoder(x, weights))


REGISTERED = (
    vae_bce("small-vae-bce", "sample, BCE and KL of an MNIST-size VAE", B=128, Z=20, X=784),
    Workload(
        name="small-vae-gaussian", what="sample, squared error and KL of an MNIST-size VAE",
        sizes={"B": 128, "Z": 20, "X": 784}, make=vae_inputs, eager=gaussian_eager, vaefast=gaussian_vaefast,
        distributions=gaussian_distributions, posteriors=posterior, reread=(0, 1),
    ),
    vae_bce("image-vae-bce", "sample, BCE and KL of a 64x64 RGB VAE", B=128, Z=256, X=12288),
    vae_bce("highres-vae-bce", "sample, BCE and KL of a 512x512 RGB VAE", B=16, Z=16384, X=786432),
    Workload(
        name="highres-vae-overwrite", what="the same where a decoder adds a bias last, and overwrite_recon is allowed",
        sizes={"B": 16, "Z": 16384, "X": 786432}, make=decoded_inputs, eager=decoded_eager, vaefast=decoded_vaefast,
        posteriors=posterior, reread=(0, 1),
    ),
    Workload(
        name="sample-kl", what="sample and KL against N(0, I)", sizes={"B": 1024, "Z": 8192}, make=moments,
        eager=sample_kl_eager, vaefast=sample_kl_vaefast, distributions=sample_kl_distributions,
        posteriors=posterior, reread=(0, 1),
    ),
    Workload(
        name="normal", what="standard normal numbers", sizes={"N": 10_000_000}, make=normal_inputs,
        eager=normal_eager, vaefast=normal_vaefast, posteriors=normal_posterior, modes=("f",),
    ),
    Workload(
        name="latent-diffusion", what="an image autoencoder's moments, chunked and clamped: sample and KL",
        sizes={"B": 16, "H": 64, "W": 64}, make=latent_inputs, eager=latent_eager, vaefast=latent_vaefast,
        distributions=latent_distributions, posteriors=latent_posterior, reread=(0,),
    ),
    Workload(
        name="latent-diffusion-packed", what="the same through DiagonalGaussian: one gradient for both halves",
        sizes={"B": 16, "H": 64, "W": 64}, make=latent_inputs, eager=latent_eager, vaefast=packed_vaefast,
        distributions=latent_distributions, posteriors=latent_posterior, reread=(0,),
    ),
    Workload(
        name="bnn", what="mean-field weights, softplus std: sample and KL against N(0, 0.1^2)",
        sizes={"weights": 25_000_000}, make=bnn_inputs, eager=bnn_eager, vaefast=bnn_vaefast,
        distributions=bnn_distributions, posteriors=bnn_posterior, reread=(0, 1),
    ),
    Workload(
        name="hierarchy", what=f"{LAYERS} KLs between two Gaussians", sizes={"B": 32, "D": 256}, make=hierarchy_inputs,
        eager=hierarchy_eager, vaefast=hierarchy_vaefast, distributions=hierarchy_distributions,
    ),
    Workload(
        name="discrete-latents", what="DreamerV3's categorical latents: a straight-through sample and the KL",
        sizes={"B": 1024, "L": 32}, make=latents_inputs, eager=latents_eager, vaefast=latents_vaefast,
    ),
    Workload(
        name="train-step", what=f"a whole training step of a {PIXELS}-{HIDDEN}-{LATENT} VAE with Adam",
        sizes={"B": 128}, make=train_inputs, eager=trained("eager"), vaefast=trained("vaefast"),
        posteriors=train_posterior, optimizer=True, modes=("fb",),
    ),
    *bounds.REGISTERED,
    *likelihoods.REGISTERED,
    *normals.REGISTERED,
    *pairwise.REGISTERED,
)  # fmt: skip
WORKLOADS: dict[str, Workload] = {w.name: w for w in REGISTERED}
