"""The PyTorch engine with the kernels' noise: for ``torch.jit.trace`` of calls that go to kernels in eager, so that the
trace draws the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _torch
from ._engine import Moments, Pair, Posteriors
from ._gaussian import Prior, compute_dtype
from ._options import Parameterization
from ._philox import philox_noise, philox_noises, take_counters
from ._torch import bound, categorical, elbo, experts, kl, log_ratio, multi_kl, nll

__all__ = [
    "bound",
    "categorical",
    "elbo",
    "experts",
    "kl",
    "log_ratio",
    "multi_kl",
    "multi_sample_with_kl",
    "nll",
    "noise",
    "packed",
    "sample",
    "sample_with_kl",
]

noise = "philox"


def sample(
    mu: Tensor, raw: Tensor, p: Parameterization, eps: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    if eps is None:
        eps = philox_noise(mu, compute_dtype(mu, raw), generator)
    return _torch.sample(mu, raw, p, eps, None)


def sample_with_kl(
    pair: Pair, reduction: str, balance: float | None, eps: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    if eps is None:
        eps = philox_noise(pair.mu, compute_dtype(*pair[:4]), generator)
    return _torch.sample_with_kl(pair, reduction, balance, eps, None)


def multi_sample_with_kl(
    many: Posteriors, reduction: str, generator: torch.Generator | None
) -> tuple[list[Tensor], Tensor]:
    nothing: Sequence[Prior] = [None] * len(many.mus)
    each = zip(many.mus, many.raws, many.prior_mus or nothing, many.prior_logvars or nothing)
    dtypes = [compute_dtype(*tensors) for tensors in each]
    return _torch.samples(many, philox_noises(many.mus, dtypes, generator)), multi_kl(many, reduction)


def packed(
    of: Moments, reduction: str, generator: torch.Generator | None, with_sample: bool, with_kl: bool
) -> list[Tensor]:
    mu = of.moments.chunk(2, of.dim)[0]
    seed = take_counters(mu, mu.numel(), generator) if with_sample else None
    return _torch.packed(of, reduction, None, with_sample, with_kl, seed)
