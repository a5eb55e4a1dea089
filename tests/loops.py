"""A training step that calls every function, and the same in plain PyTorch: what the files test_loops_*.py share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from inputs import generator
from torch import Tensor, nn
from torch.nn import functional as F

import vaefast

LATENTS, PIXELS, CLASSES = 6, 20, 3


class Inputs(NamedTuple):
    """What a network puts out: the posterior twice, halved and packed, and three decoders' parameters."""

    mu: Tensor
    raw: Tensor
    moments: Tensor
    logits: Tensor
    mean: Tensor
    logvar: Tensor
    classes: Tensor

    def to(self, *args: object) -> Inputs:
        return Inputs(*(t.detach().to(*args) for t in self))

    def leaves(self) -> Inputs:
        return Inputs(*(t.detach().clone().requires_grad_() for t in self))


class Data(NamedTuple):
    x: Tensor
    labels: Tensor


def inputs(batch: int = 5, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
    g = generator(seed)
    sizes = [(LATENTS,), (LATENTS,), (2 * LATENTS,), (PIXELS,), (PIXELS,), (PIXELS,), (CLASSES, PIXELS)]
    return Inputs(*(torch.randn(batch, *s, generator=g).to(device, dtype) for s in sizes)).leaves()


def data(batch: int = 5, seed: int = 0, device: str = "cpu") -> Data:
    g = generator(100 + seed)
    labels = torch.randint(CLASSES, (batch, PIXELS), generator=g)
    return Data(torch.rand(batch, PIXELS, generator=g).to(device), labels.to(device))


def everything(t: Inputs, d: Data) -> tuple[Tensor, list[Tensor]]:
    """The sum of every loss, and all the samples, which are in it too."""
    z, kl = vaefast.sample_with_kl(t.mu, t.raw)
    again = vaefast.reparameterize(t.mu, t.raw)
    packed, packed_kl = vaefast.DiagonalGaussian(t.moments).sample_with_kl(reduction="batchmean")
    many, many_kl = vaefast.multi_tensor_sample_with_kl([t.mu, t.logits], [t.raw, t.logvar])
    loss = (
        kl
        + packed_kl
        + 0.1 * many_kl
        + vaefast.reconstruction_loss(t.logits, d.x)
        + vaefast.reconstruction_loss((t.mean, t.logvar), d.x, likelihood="gaussian")
        + vaefast.reconstruction_loss(t.classes, d.labels, likelihood="categorical", reduction="mean")
        + vaefast.elbo_loss(t.mean, d.x, t.mu, t.raw, likelihood="laplace", beta=0.5)
        + vaefast.multi_tensor_gaussian_kl([t.mu, t.raw], [t.raw, t.mu], reduction="sum") / len(t.mu)
    )
    samples = [z, again, packed, *many]
    wide = [s.to(torch.promote_types(s.dtype, torch.float32)) for s in samples]
    return loss + sum(s.sin().sum() for s in wide), samples


def _places(t: Inputs) -> list[tuple[Tensor, Tensor]]:
    """The mean and the log variance of each sample."""
    mean, logvar = t.moments.chunk(2, 1)
    return [(t.mu, t.raw), (t.mu, t.raw), (mean, logvar), (t.mu, t.raw), (t.logits, t.logvar)]


def noise_of(t: Inputs, samples: list[Tensor]) -> list[Tensor]:
    """In float64, what was drawn."""
    wide = Inputs(*(v.detach().double() for v in t))
    return [
        (z.detach().double() - mu) / torch.exp(0.5 * logvar) for z, (mu, logvar) in zip(samples, _places(wide))
    ]  # fmt: skip


def kl_sum(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum()


def plain(t: Inputs, d: Data, noise: list[Tensor]) -> Tensor:
    """The loss of everything(), as people write it in PyTorch."""
    batch, x = len(d.x), d.x.to(t.mu.dtype)
    samples = [mu + torch.exp(0.5 * logvar) * eps for (mu, logvar), eps in zip(_places(t), noise)]
    loss = (
        (kl_sum(t.mu, t.raw) + kl_sum(*t.moments.chunk(2, 1))) / batch
        + 0.1 * (kl_sum(t.mu, t.raw) + kl_sum(t.logits, t.logvar))
        + F.binary_cross_entropy_with_logits(t.logits, x, reduction="sum") / batch
        + F.gaussian_nll_loss(t.mean, x, t.logvar.exp(), full=True, eps=0, reduction="sum") / batch
        + F.cross_entropy(t.classes, d.labels)
        + ((t.mean - x).abs() + torch.log(torch.tensor(2.0, dtype=x.dtype))).sum() / batch
        + 0.5 * kl_sum(t.mu, t.raw) / batch
        + (kl_sum(t.mu, t.raw) + kl_sum(t.raw, t.mu)) / batch
    )
    return loss + sum(s.sin().sum() for s in samples)


def assert_right(loss: Tensor, samples: list[Tensor], grads: list[Tensor], t: Inputs, d: Data) -> None:
    """The loss and its gradients are those of the plain expressions in float64, with the noise that was drawn."""
    wide = t.to("cpu", torch.float64).leaves()
    at = Data(*(v.cpu() for v in d))
    exact = plain(wide, at, [eps.cpu() for eps in noise_of(t, samples)])
    torch.testing.assert_close(loss.detach().double().cpu(), exact.detach(), rtol=1e-5, atol=1e-5)
    for name, a, e in zip(Inputs._fields, grads, torch.autograd.grad(exact, wide)):
        torch.testing.assert_close(a.double().cpu(), e, rtol=5e-5, atol=5e-5, msg=lambda m, name=name: f"{name}: {m}")


class VAE(nn.Module):
    """A small one, whose criterion is the package's module."""

    def __init__(self, criterion: vaefast.ELBOLoss | None = None, pixels: int = PIXELS) -> None:
        super().__init__()
        self.encoder = nn.Linear(pixels, 2 * LATENTS)
        self.decoder = nn.Linear(LATENTS, pixels)
        self.criterion = criterion or vaefast.ELBOLoss()

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, 1)
        z = vaefast.reparameterize(mu, logvar)
        loss: Tensor = self.criterion(self.decoder(z), x, mu, logvar)
        return loss
