"""Workloads of what takes the place of torch.distributions' Normal, as its integration has it and as
``vaefast.distributions`` does, and of the posterior's other parameterizations."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence, register_kl

import vaefast
from benchmarks.workload import Draw, Function, Workload
from vaefast import _normal
from vaefast.integrations.torch_distributions import replace_methods


class Integrated(Normal):
    """torch's, with what the integration puts in the place of its methods: not torch's own class, which eager is."""


with ExitStack() as undo:
    replace_methods(undo, Integrated, None)
    undo.pop_all()
register_kl(Integrated, Integrated)(_normal.kl)


def scaled_inputs(draw: Draw, B: int, D: int) -> list[Tensor]:
    return [draw.normal(B, D).requires_grad_(), (draw.uniform(B, D) + 0.2).requires_grad_()]


def untrained(draw: Draw, B: int, D: int) -> list[Tensor]:
    return [t.detach() for t in scaled_inputs(draw, B, D)]


def two_scaled(draw: Draw, B: int, D: int) -> list[Tensor]:
    return scaled_inputs(draw, B, D) + scaled_inputs(draw, B, D)


def valued(draw: Draw, B: int, D: int) -> list[Tensor]:
    return [*scaled_inputs(draw, B, D), draw.normal(B, D)]


def rsampled(cls: type[Normal]) -> Function:
    return lambda mu, std: (cls(mu, std).rsample(),)


def sampled(cls: type[Normal]) -> Function:
    return lambda mu, std: (cls(mu, std).sample(),)


def density(cls: type[Normal]) -> Function:
    return lambda mu, std, x: (cls(mu, std).log_prob(x),)


def divergence(cls: type[Normal]) -> Function:
    return lambda mu, std, prior_mu, prior_std: (kl_divergence(cls(mu, std), cls(prior_mu, prior_std)),)


def posterior(mu: Tensor, std: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(mu, std)]


# --- by a log variance or a log standard deviation: torch's class has the scale alone


def logged(draw: Draw, B: int, D: int) -> list[Tensor]:
    return [draw.normal(B, D).requires_grad_(), draw.normal(B, D, std=0.3).requires_grad_(), draw.normal(B, D)]


def by_scale(half: float) -> Function:
    def eager(mu: Tensor, log: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        q = Normal(mu, torch.exp(half * log))
        return q.rsample(), q.log_prob(x), kl_divergence(q, Normal(torch.zeros_like(mu), torch.ones_like(mu)))

    return eager


def by_logarithm(name: str) -> Function:
    def ours(mu: Tensor, log: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        q = vaefast.distributions.Normal(mu, **{name: log})
        return q.rsample(), q.log_prob(x), kl_divergence(q, Normal(torch.zeros_like(mu), torch.ones_like(mu)))

    return ours


# --- a sample and its KL, by what a network may give in the log variance's place


def of_std(mu: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    z = mu + std * torch.randn_like(std)
    return z, 0.5 * torch.sum(mu.pow(2) + std.pow(2) - 1 - 2 * torch.log(std))


def of_var(mu: Tensor, var: Tensor) -> tuple[Tensor, ...]:
    z = mu + torch.sqrt(var) * torch.randn_like(var)
    return z, 0.5 * torch.sum(mu.pow(2) + var - 1 - torch.log(var))


def of_log_std(mu: Tensor, log_std: Tensor) -> tuple[Tensor, ...]:
    std = torch.exp(log_std)
    z = mu + std * torch.randn_like(std)
    return z, 0.5 * torch.sum(mu.pow(2) + std.pow(2) - 1 - 2 * log_std)


def given_as(name: str) -> Function:
    def ours(mu: Tensor, raw: Tensor) -> tuple[Tensor, ...]:
        z = vaefast.reparameterize(mu, raw, parameterization=name)
        return z, vaefast.gaussian_kl(mu, raw, parameterization=name, reduction="sum")

    return ours


def parameterized(name: str, eager: Function) -> Workload:
    def inputs(draw: Draw, B: int, Z: int) -> list[Tensor]:
        if name == "log_std":
            return [draw.normal(B, Z).requires_grad_(), draw.normal(B, Z, std=0.3).requires_grad_()]
        return scaled_inputs(draw, B, Z)

    std = {"std": lambda r: r, "var": torch.sqrt, "log_std": torch.exp}[name]
    return Workload(
        name=f"sample-{name.replace('_', '-')}", what=f"sample and KL of a posterior given by its {name}",
        sizes={"B": 128, "Z": 512}, make=inputs, eager=eager, vaefast=given_as(name),
        posteriors=lambda mu, raw: [(mu, std(raw))], reread=(0, 1),
    )  # fmt: skip


SIZES = {"B": 512, "D": 1000}
REGISTERED = (
    Workload(
        name="dist-rsample", what="torch.distributions' Normal.rsample, integrated", sizes=SIZES, make=scaled_inputs,
        eager=rsampled(Normal), vaefast=rsampled(Integrated), posteriors=posterior,
    ),
    Workload(
        name="dist-sample", what="its sample", sizes=SIZES, make=untrained, eager=sampled(Normal),
        vaefast=sampled(Integrated), posteriors=posterior, modes=("f",),
    ),
    Workload(
        name="dist-log-prob", what="its log_prob", sizes=SIZES, make=valued, eager=density(Normal),
        vaefast=density(Integrated), reread=(0, 1, 2),
    ),
    Workload(
        name="dist-kl", what="the KL between two of them", sizes=SIZES, make=two_scaled, eager=divergence(Normal),
        vaefast=divergence(Integrated), reread=(0, 1, 2, 3),
    ),
    *(
        Workload(
            name=f"dist-{name.replace('_', '-')}", what=f"distributions.Normal({name}=): rsample, log_prob, KL",
            sizes=SIZES, make=logged, eager=by_scale(half), vaefast=by_logarithm(name),
            posteriors=lambda mu, log, x, half=half: [(mu, torch.exp(half * log))], reread=(0, 1, 2),
        )
        for name, half in (("logvar", 0.5), ("log_std", 1.0))
    ),
    parameterized("log_std", of_log_std),
    parameterized("std", of_std),
    parameterized("var", of_var),
)  # fmt: skip
