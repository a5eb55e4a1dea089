"""Workloads in JAX, as people write them there: ``jit`` over forward and backward, a key folded in for each call. Where
it is installed (the extra ``jax``), on the CPU."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.workloads import PRIOR_STD, Function, Workload

if TYPE_CHECKING:
    from benchmarks.harness import Case

INSTALLED = importlib.util.find_spec("jax") is not None


@functools.cache
def library() -> Any:
    """JAX, whose import starts threads."""
    import jax

    return jax


def sample(key: Any, mu: Any, std: Any) -> Any:
    return mu + std * library().random.normal(key, mu.shape)


def kl(mu: Any, logvar: Any) -> Any:
    jnp = library().numpy
    return -0.5 * jnp.sum(1 + logvar - mu**2 - jnp.exp(logvar))


def vae_bce(key: Any, mu: Any, logvar: Any, recon: Any, x: Any) -> tuple[Any, ...]:
    jnp, softplus = library().numpy, library().nn.softplus
    z = sample(key, mu, jnp.exp(0.5 * logvar))
    return z, jnp.sum(softplus(recon) - recon * x) + kl(mu, logvar)


def sample_kl(key: Any, mu: Any, logvar: Any) -> tuple[Any, ...]:
    return sample(key, mu, library().numpy.exp(0.5 * logvar)), kl(mu, logvar)


def bnn(key: Any, mu: Any, rho: Any) -> tuple[Any, ...]:
    jnp, sigma = library().numpy, library().nn.softplus(rho)
    each = math.log(PRIOR_STD) - jnp.log(sigma) + (sigma**2 + mu**2) / (2 * PRIOR_STD**2) - 0.5
    return sample(key, mu, sigma), jnp.sum(each)


# by the workload: of a key and the inputs its outputs
FORMULAS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "small-vae-bce": vae_bce,
    "image-vae-bce": vae_bce,
    "highres-vae-bce": vae_bce,
    "sample-kl": sample_kl,
    "bnn": bnn,
}

_calls = itertools.count()


def array(t: Tensor) -> Any:
    return library().numpy.asarray(t.detach().numpy())


def tensor(a: Any) -> Tensor:
    return torch.from_numpy(np.array(a))


def keyed(formula: Callable[..., tuple[Any, ...]], call: Any, *inputs: Any) -> tuple[Any, ...]:
    random = library().random
    return formula(random.fold_in(random.key(0), call), *inputs)


class Through(torch.autograd.Function):
    """A formula as a node of PyTorch's: to be checked, and not to be timed."""

    @staticmethod
    def forward(ctx: Any, formula: Callable[..., tuple[Any, ...]], *inputs: Tensor) -> Any:
        compiled = library().jit(functools.partial(keyed, formula))
        call = np.uint32(next(_calls))
        outputs, ctx.pull = library().vjp(functools.partial(compiled, call), *map(array, inputs))
        return tuple(map(tensor, outputs))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return None, *map(tensor, ctx.pull(tuple(map(array, upstream))))


def function(workload: Workload) -> Function | None:
    formula = FORMULAS.get(workload.name)
    if not INSTALLED or formula is None:
        return None
    return lambda *inputs: Through.apply(formula, *inputs)


def step(case: Case) -> Callable[[], Any]:
    """What is timed: arrays of JAX in and out, and nothing of PyTorch."""
    jax = library()
    formula = functools.partial(keyed, FORMULAS[case.workload.name])
    inputs = [array(t) for t in case.inputs]
    if case.mode == "f":
        forward = jax.jit(formula)
        return lambda: jax.block_until_ready(forward(np.uint32(next(_calls)), *inputs))
    trained = [t.requires_grad for t in case.inputs]
    leaves = [a for a, yes in zip(inputs, trained) if yes]
    others = [a for a, yes in zip(inputs, trained) if not yes]
    upstream = tuple(array(g) for g in case.upstream if g is not None)

    @jax.jit
    def both(call: Any, leaves: list[Any], others: list[Any], upstream: tuple[Any, ...]) -> Any:
        def of(leaves: list[Any]) -> tuple[Any, ...]:
            own, rest = iter(leaves), iter(others)
            return formula(call, *(next(own if yes else rest) for yes in trained))

        outputs, pull = jax.vjp(of, leaves)
        return outputs, pull(upstream)

    return lambda: jax.block_until_ready(both(np.uint32(next(_calls)), leaves, others, upstream))
