"""ELBO + KL = evidence, to the last digit
=======================================

``log p(x) = ELBO(q) + KL(q || p(z|x))`` for any q, on a model where every term has a closed form.

Probabilistic PCA (Tipping & Bishop 1999): z ~ N(0, I), x | z ~ N(W z + b, sigma^2 I). The columns of W are orthogonal
here, so that the exact posterior p(z|x) is a diagonal Gaussian and q can reach it. The evidence is known on paper; both
KLs and the likelihood go through vaefast. Shown: the identity for random q, the bound tight at the exact posterior, and
gradient ascent on the ELBO arriving there, with exact expectations and with reparameterised noise.

The expectation under q is exact: the Gaussian nll is quadratic in z, and the mean of a quadratic over the 2 L sigma
points mu +- sqrt(L) std e_i (Uhlmann 1995), passed as ``eps=``, is its mean under N(mu, std^2).

::

    python examples/ppca_identity.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import vaefast


@dataclass(frozen=True)
class PPCA:
    """x | z ~ N(W z + b, e^log_noise I), z ~ N(0, I). W is ``[D, L]`` with orthogonal columns."""

    weight: Tensor
    bias: Tensor
    log_noise: Tensor

    def sample(self, count: int) -> Tensor:
        """``[count, D]`` draws of x."""
        z = torch.randn(count, self.weight.shape[1], dtype=self.weight.dtype)
        mean = self.decode(z)
        return mean + torch.exp(0.5 * self.log_noise) * torch.randn_like(mean)

    def decode(self, z: Tensor) -> Tensor:
        """The mean of x given z."""
        return z @ self.weight.T + self.bias

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance ``[N, L]`` of the exact p(z|x)."""
        noise = torch.exp(self.log_noise)
        precision = self._gram() + noise
        mean = (x - self.bias) @ self.weight / precision
        return mean, torch.log(noise / precision).expand_as(mean)

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) = log N(x; b, W W^T + sigma^2 I), ``[N]``, by the determinant and inversion lemmas."""
        dim, latent = self.weight.shape
        precision = self._gram() + torch.exp(self.log_noise)
        centred = x - self.bias
        log_det = (dim - latent) * self.log_noise + precision.log().sum()
        explained = ((centred @ self.weight) ** 2 / precision).sum(1)
        distance = ((centred**2).sum(1) - explained) * torch.exp(-self.log_noise)
        return -0.5 * (dim * math.log(2 * math.pi) + log_det + distance)

    def _gram(self) -> Tensor:
        """The diagonal of W^T W, which is all of it."""
        return (self.weight**2).sum(0)


def random_ppca(dim: int = 12, latent: int = 4, noise_std: float = 0.5, dtype: torch.dtype = torch.float64) -> PPCA:
    """A random model: orthonormal columns scaled by 2, ..., 0.5."""
    basis, _ = torch.linalg.qr(torch.randn(dim, latent, dtype=dtype))
    scales = torch.linspace(2.0, 0.5, latent, dtype=dtype)
    return PPCA(basis * scales, torch.randn(dim, dtype=dtype), torch.tensor(2 * math.log(noise_std), dtype=dtype))


def sigma_points(latent: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[2 L, L]`` noise whose mean of any quadratic is that of N(0, I)."""
    points = math.sqrt(latent) * torch.eye(latent, dtype=dtype)
    return torch.cat((points, -points))


def negative_elbo(model: PPCA, x: Tensor, mu: Tensor, logvar: Tensor, draws: int | None = None) -> vaefast.ELBOTerms:
    """The negative ELBO of q = N(mu, e^logvar) and its terms, each ``[N]``: exact, or from ``draws`` samples a row."""
    count, latent = mu.shape
    eps = sigma_points(latent, mu.dtype) if draws is None else None
    points = 2 * latent if draws is None else draws
    wide = (count, points, latent)
    z = vaefast.reparameterize(mu[:, None].expand(wide), logvar[:, None].expand(wide), eps=eps)
    recon = model.decode(z)
    return vaefast.elbo_terms(
        (recon, model.log_noise),
        x[:, None].expand_as(recon),
        mu,
        logvar,
        likelihood="gaussian",
        reduction="per_sample",
        weight=torch.tensor(1 / points, dtype=mu.dtype),
    )


def kl_to_posterior(model: PPCA, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(q || p(z|x)), ``[N]``."""
    return vaefast.gaussian_kl(mu, logvar, *model.posterior(x), reduction="per_sample")


def ascend(
    model: PPCA, x: Tensor, draws: int | None = None, steps: int = 500, rate: float = 0.1
) -> tuple[Tensor, Tensor]:
    """q after gradient ascent on the ELBO from the prior, the step size falling to 0 along a cosine."""
    mu = torch.zeros(len(x), model.weight.shape[1], dtype=x.dtype, requires_grad=True)
    logvar = torch.zeros_like(mu, requires_grad=True)
    optimizer = torch.optim.SGD([mu, logvar], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        negative_elbo(model, x, mu, logvar, draws).loss.sum().backward()
        optimizer.step()
        schedule.step()
    return mu.detach(), logvar.detach()


def identity_row(model: PPCA, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[float, ...]:
    """reconstruction, KL to the prior, ELBO, KL to the posterior, their sum, log p(x), the difference; means over x."""
    terms = negative_elbo(model, x, mu, logvar)
    gap, evidence = kl_to_posterior(model, x, mu, logvar), model.log_evidence(x)
    total = gap - terms.loss
    columns = (terms.reconstruction, terms.kl, -terms.loss, gap, total, evidence)
    return (*(column.mean().item() for column in columns), (total - evidence).abs().max().item())


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[float, ...]]:
    """Prints the table and returns its rows by name."""
    parser = argparse.ArgumentParser(description="log p(x) = ELBO + KL(q || p(z|x)) on probabilistic PCA, in nats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=32, help="number of x")
    parser.add_argument("--steps", type=int, default=500, help="steps of gradient ascent")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    model = random_ppca()
    x = model.sample(args.count)
    exact = model.posterior(x)
    candidates = {f"random q {i}": (torch.randn_like(exact[0]), torch.randn_like(exact[0])) for i in range(1, 5)}
    candidates["exact posterior"] = exact
    candidates["ascent, sigma points"] = ascend(model, x, steps=args.steps)
    candidates["ascent, 16 draws"] = ascend(model, x, draws=16, steps=args.steps)
    rows = {name: identity_row(model, x, *q) for name, q in candidates.items()}
    heads = ("-E_q log p(x|z)", "KL(q||prior)", "ELBO", "KL(q||p(z|x))", "ELBO + KL", "log p(x)", "difference")
    print(f"{'nats, mean of ' + str(args.count) + ' x':22}" + "".join(f"{head:>17}" for head in heads))
    for name, row in rows.items():
        print(f"{name:22}" + "".join(f"{value:17.8f}" for value in row[:-1]) + f"{row[-1]:17.1e}")
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small only wait for a second thread
    main()
