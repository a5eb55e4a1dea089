"""Distributions that torch.distributions lacks, for generation and for the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributions as D
from torch.distributions.utils import broadcast_all
from torch.nn import functional as F

# torch.poisson counts in int64, and in a rate's rounding there is no telling the two apart
_GAUSSIAN_FROM = 2.0**48


def _poisson_draw(rate: Tensor) -> Tensor:
    """Of any rate, in float64 at least: from 2^48 on, where a Poisson is a Gaussian to 1e-7, a rounded Gaussian."""
    rate = rate.to(torch.promote_types(rate.dtype, torch.float64))
    large = rate > _GAUSSIAN_FROM
    drawn = torch.poisson(torch.where(large, 1.0, rate))
    return torch.where(large, (rate + rate.sqrt() * torch.randn_like(rate)).round(), drawn)


class Poisson(D.Poisson):
    """torch.distributions' own, of any rate, in float64 at least, which holds its counts."""

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        return _poisson_draw(self.rate.expand(self._extended_shape(torch.Size(sample_shape))))


class NegativeBinomial(D.NegativeBinomial):
    """The same: a Poisson whose rate is a Gamma."""

    @classmethod
    def of_mean(cls, mean: Tensor, theta: Tensor) -> NegativeBinomial:
        # no dispersion is a Poisson, and 0 is all at 0, to more digits than there are
        theta = theta.clamp(1e-30, 1e30)
        return cls(theta, logits=torch.log(mean / theta), validate_args=False)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        wide = torch.promote_types(self.logits.dtype, torch.float64)
        total, logits = self.total_count.to(wide).expand(shape), self.logits.to(wide).expand(shape)
        return _poisson_draw(torch._standard_gamma(total) * torch.exp(logits))


class StudentT(D.StudentT):
    """torch.distributions' own, which at infinite degrees of freedom is a Gaussian, and has no part that validates."""

    def __init__(self, df: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.df, self.loc, self.scale = broadcast_all(df, loc, scale)
        D.Distribution.__init__(self, self.df.shape, validate_args=False)

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        standard, df = torch.randn_like(self.loc.expand(shape)), self.df.clamp(max=1e30).expand(shape)
        squares = (2 * torch._standard_gamma(df / 2)).clamp(min=torch.finfo(df.dtype).tiny)
        return self.loc + self.scale * standard * torch.rsqrt(squares / df)


class ContinuousBernoulli(D.Distribution):
    """p(x) = l e^(l x) / (e^l - 1) on [0, 1] (Loaiza-Ganem & Cunningham 2019) at any logit l: that of
    torch.distributions stops at 16."""

    arg_constraints: ClassVar[dict[str, D.constraints.Constraint]] = {}
    support = D.constraints.unit_interval

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """With a = |l|, 1 / a - 1 / (e^a - 1) away from the end that l leads to; its series where those cancel."""
        l = self.logits.to(torch.promote_types(self.logits.dtype, torch.float64))  # noqa: E741
        near = l.abs() < 1e-2
        a, small = torch.where(near, 1.0, l).abs(), torch.where(near, l, 0.0)
        away = 1 / a + torch.exp(-a) / torch.expm1(-a)
        series = 0.5 + small / 12 - small**3 / 720
        return torch.where(near, series, torch.where(l > 0, 1 - away, away)).to(self.logits.dtype)

    @property
    def variance(self) -> Tensor:
        l = self.logits.to(torch.promote_types(self.logits.dtype, torch.float64))  # noqa: E741
        near = l.abs() < 1e-1
        a, small = torch.where(near, 1.0, l).abs(), torch.where(near, l, 0.0)
        far = 1 / a**2 - torch.exp(-a) / torch.expm1(-a) ** 2
        series = 1 / 12 - small**2 / 240 + small**4 / 6048
        return torch.where(near, series, far).to(self.logits.dtype)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        l = self.logits.expand(self._extended_shape(torch.Size(sample_shape)))  # noqa: E741
        u = torch.rand_like(l)
        near = l.abs() < 1e-6
        a = torch.where(near, 1.0, l).abs()
        away = torch.where(near, u, -torch.log1p(u * torch.expm1(-a)) / a).clamp(0, 1)
        return torch.where(l > 0, 1 - away, away)

    def log_prob(self, value: Tensor) -> Tensor:
        l = self.logits  # noqa: E741
        near = l.abs() < 1e-2
        far, small = torch.where(near, 1.0, l), torch.where(near, l, 0.0)
        norm = F.relu(far) + torch.log(-torch.expm1(-far.abs()) / far.abs())
        return l * value - torch.where(near, small / 2 + small**2 / 24 - small**4 / 2880, norm)


class ZeroInflated(D.Distribution):
    """0 with probability sigmoid(gate_logits), else a draw from ``base``, a distribution of counts."""

    arg_constraints: ClassVar[dict[str, D.constraints.Constraint]] = {}
    support: Any = D.constraints.nonnegative_integer

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


class ZeroOr(ZeroInflated):
    """The same of a ``base`` that has a density above 0, and none at it."""

    support: Any = D.constraints.nonnegative

    def log_prob(self, value: Tensor) -> Tensor:
        none = value == 0
        log_prob = F.logsigmoid(-self.gate_logits) + self.base.log_prob(torch.where(none, 1.0, value))
        return torch.where(none, F.logsigmoid(self.gate_logits), log_prob)


class EitherOf(D.Distribution):
    """A draw of ``first`` with probability sigmoid(logits), else one of ``second``: two of counts."""

    arg_constraints: ClassVar[dict[str, D.constraints.Constraint]] = {}
    support = D.constraints.nonnegative_integer

    def __init__(self, first: D.Distribution, second: D.Distribution, logits: Tensor) -> None:
        self.first, self.second, self.logits = first, second, logits.expand(first.batch_shape)
        super().__init__(first.batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.logits) * self.first.mean + torch.sigmoid(-self.logits) * self.second.mean

    @property
    def variance(self) -> Tensor:
        p, apart = torch.sigmoid(self.logits), self.first.mean - self.second.mean
        return p * self.first.variance + (1 - p) * (self.second.variance + p * apart**2)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        of_first = torch.rand_like(self.logits.expand(self._extended_shape(shape))) < self.logits.sigmoid()
        return torch.where(of_first, self.first.sample(shape), self.second.sample(shape))

    def log_prob(self, value: Tensor) -> Tensor:
        first = F.logsigmoid(self.logits) + self.first.log_prob(value)
        return torch.logaddexp(first, F.logsigmoid(-self.logits) + self.second.log_prob(value))


class BetaBinomial(D.Distribution):
    """How many of ``total_count`` trials succeed, where the probability is Beta(alpha, beta)."""

    arg_constraints: ClassVar[dict[str, D.constraints.Constraint]] = {}

    def __init__(self, alpha: Tensor, beta: Tensor, total_count: Tensor) -> None:
        self.alpha, self.beta, self.total_count = broadcast_all(alpha, beta, total_count)
        super().__init__(self.alpha.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.total_count * (self.alpha / (self.alpha + self.beta))

    @property
    def variance(self) -> Tensor:
        both = self.alpha + self.beta
        return self.mean * (self.beta / both) * ((both + self.total_count) / (both + 1))

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        probs = D.Beta(self.alpha, self.beta, validate_args=False).sample(torch.Size(sample_shape))
        return torch.binomial(self.total_count.expand_as(probs), probs)


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


class Classes(D.Distribution):
    """A class by its logits along ``dim``; the mean is that of the one-hot vector, the probabilities."""

    arg_constraints: ClassVar[dict[str, D.constraints.Constraint]] = {}

    def __init__(self, logits: Tensor, dim: int) -> None:
        self.logits, self.dim = logits, dim % logits.dim()
        self.base = D.Categorical(logits=logits.movedim(dim, -1), validate_args=False)
        super().__init__(self.base.batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.logits.softmax(self.dim)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        drawn: Tensor = self.base.sample(torch.Size(sample_shape))
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        found: Tensor = self.base.log_prob(value)
        return found


class DiscretizedLogisticMixture(D.Distribution):
    """Components' logits, means, log scales and, with three channels, couplings in planes along ``dim``; see
    csrc/mixture.h. An event is a pixel: a draw has its channels along ``dim``."""

    arg_constraints: ClassVar[dict[str, D.constraints.Constraint]] = {}

    def __init__(self, planes: Tensor, dim: int, channels: int, floor: float, **grid: float) -> None:
        self.dim, self.channels, self.floor, self.grid = dim % planes.dim(), channels, floor, grid
        columns = 2 if channels == 1 else 3
        self.logits, *self.rest = planes.movedim(dim, -1).unflatten(-1, (1 + channels * columns, -1)).unbind(-2)
        self.columns = columns
        super().__init__(self.logits.shape[:-1], validate_args=False)

    def _channel(self, c: int, before: list[Tensor], pick: Callable[[Tensor], Tensor]) -> DiscretizedLogistic:
        """Channel c's logistic, given those before it; ``pick`` chooses among the components."""
        mean, log_scale = map(pick, self.rest[self.columns * c : self.columns * c + 2])
        for b, x in enumerate(before):
            mean = mean + torch.tanh(pick(self.rest[3 * (c * (c - 1) // 2 + b) + 2])) * x
        return DiscretizedLogistic(mean, torch.exp(log_scale.clamp(min=self.floor)), **self.grid)

    @property
    def mean(self) -> Tensor:
        """Of one channel, exact. Of three, each component's channels follow from the means of those before them."""
        found: list[Tensor] = []
        for c in range(self.channels):
            found.append(self._channel(c, found, lambda planes: planes).mean)
        weights = self.logits.softmax(-1)
        return torch.stack([(weights * mean).sum(-1) for mean in found], self.dim)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        k = D.Categorical(logits=self.logits, validate_args=False).sample(shape).unsqueeze(-1)

        def pick(planes: Tensor) -> Tensor:
            return planes.expand(*shape, *planes.shape).gather(-1, k).squeeze(-1)

        drawn: list[Tensor] = []
        for c in range(self.channels):
            drawn.append(self._channel(c, drawn, pick).sample())
        return torch.stack(drawn, len(shape) + self.dim)
