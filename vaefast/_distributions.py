"""Distributions that torch.distributions lacks, for generation and for the tests."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch import distributions as D
from torch.distributions.utils import broadcast_all
from torch.nn import functional as F


class ZeroInflated(D.Distribution):
    """0 with probability sigmoid(gate_logits), else a draw from ``base``, a distribution of counts."""

    arg_constraints: ClassVar[dict[str, D.constraints.Constraint]] = {}
    support = D.constraints.nonnegative_integer

    def __init__(self, base: D.Distribution, gate_logits: Tensor) -> None:
        self.base = base
        self.gate_logits = gate_logits.expand(base.batch_shape)
        super().__init__(base.batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(-self.gate_logits) * self.base.mean

    @property
    def variance(self) -> Tensor:
        kept = torch.sigmoid(-self.gate_logits)
        return kept * (self.base.variance + (1 - kept) * self.base.mean**2)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        kept = (
            torch.rand_like(self.gate_logits.expand(self._extended_shape(torch.Size(sample_shape))))
            >= self.gate_logits.sigmoid()
        )
        return torch.where(kept, self.base.sample(torch.Size(sample_shape)), 0.0)

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = F.logsigmoid(-self.gate_logits) + self.base.log_prob(value)
        return torch.where(value == 0, torch.logaddexp(F.logsigmoid(self.gate_logits), log_prob), log_prob)


class DiscretizedLogistic(D.Distribution):
    """A logistic rounded to ``bins`` values from ``low`` to ``high``, the outer ones taking all that lies beyond."""

    arg_constraints: ClassVar[dict[str, D.constraints.Constraint]] = {}

    def __init__(self, loc: Tensor, scale: Tensor, bins: float, low: float, high: float) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        self.bins, self.low, self.width = int(bins), low, (high - low) / (bins - 1)
        super().__init__(self.loc.shape, validate_args=False)

    def cdf(self, value: Tensor) -> Tensor:
        return torch.sigmoid((value - self.loc) / self.scale)

    @property
    def mean(self) -> Tensor:
        # sum of the survival function over the edges between bins
        edges = self.low + self.width * (
            torch.arange(self.bins - 1, device=self.loc.device, dtype=self.loc.dtype) + 0.5
        )
        shape = (self.bins - 1, *[1] * self.loc.dim())
        return self.low + self.width * (1 - self.cdf(edges.view(shape))).sum(0)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        u = torch.rand_like(self.loc.expand(self._extended_shape(torch.Size(sample_shape))))
        u = u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps)
        bin_ = ((self.loc + self.scale * torch.logit(u) - self.low) / self.width).round()
        return self.low + self.width * bin_.clamp(0, self.bins - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        bin_ = ((value - self.low) / self.width).round()
        below = torch.where(bin_ <= 0, 0.0, self.cdf(value - self.width / 2))
        return torch.log(torch.where(bin_ >= self.bins - 1, 1.0, self.cdf(value + self.width / 2)) - below)
