"""What draws of the weights say about data together: means, variances and entropies, one draw at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _arguments, _options
from .._functions import Recon
from .._gaussian import wide
from .._options import Likelihood
from ..likelihoods import COMPOSED, entry_of


class Prediction(NamedTuple):
    """What :meth:`vaefast.bayesian.MeanField.predict` tells of each example.

    With p(y | x, w) of one draw w of the weights, the law of total variance, and the entropy's:
    ``Var[y] = E_w[Var[y | w]] + Var_w[E[y | w]]`` and ``H[y] = E_w[H[y | w]] + I[y; w]`` (Depeweg et al. 2018,
    arXiv:1710.07283, equations 4 and 7; BALD, Houlsby et al. 2011, arXiv:1112.5745, equation 2).

    Shape:
        ``mean``, ``aleatoric`` and ``epistemic`` have that of the likelihood's mean, ``[B, ...]``; ``entropy`` and
        ``mutual_information`` lack the classes: ``[B, ...]``, in nats.

    Attributes:
        mean: the mean of y; of ``"categorical"`` the classes' probabilities, of ``"bernoulli"`` that of 1.
        aleatoric: the variance that would be left if the weights were known.
        epistemic: the variance of the mean over the weights.
        entropy: of the mean's distribution, for ``"categorical"`` and ``"bernoulli"``; else None.
        mutual_information: what of it the weights' being known would take away; else None.

    Example::

        model = vaefast.bayesian.MeanField(nn.Linear(784, 10))
        prediction = model.predict(x, num_samples=8, likelihood="categorical")
    """

    mean: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    entropy: Tensor | None
    mutual_information: Tensor | None


class Moments:
    """The sums over draws, of the outputs of some examples."""

    def __init__(self, likelihood: str | Likelihood) -> None:
        self.likelihood = _options.likelihood(likelihood)
        if self.likelihood.name in COMPOSED:
            raise ValueError(
                f"{self.likelihood.name!r} takes its variance from data, so it predicts none; use 'gaussian' with a "
                "logvar"
            )
        self.count = 0
        self.mean = self.squares = self.variance = torch.zeros(())
        self.entropy: Tensor | None = None

    def add(self, recon: Recon) -> None:
        """One draw's parameters of p(y | x, w). Welford 1962: the squares are of differences from the mean."""
        mean, variance, entropy = self._of_one(recon)
        self.count += 1
        if self.count == 1:
            self.mean, self.squares, self.variance = mean, torch.zeros_like(mean), variance
            self.entropy = entropy
            return
        difference = mean - self.mean
        self.mean = self.mean + difference / self.count
        self.squares = self.squares + difference * (mean - self.mean)
        self.variance = self.variance + (variance - self.variance) / self.count
        if entropy is not None and self.entropy is not None:
            self.entropy = self.entropy + (entropy - self.entropy) / self.count

    def _of_one(self, recon: Recon) -> tuple[Tensor, Tensor, Tensor | None]:
        name, options = self.likelihood.name, self.likelihood.options
        entry = entry_of(name)
        params = _arguments.parameters(recon, name, entry)
        first = wide(params[0])
        if name == "categorical":
            dim = int(options["dim"])
            log_p = first.log_softmax(dim)
            p = log_p.exp()
            return p, p * (1 - p), -(p * log_p).sum(dim)
        of = entry.distribution(first, *(wide(p).expand_as(first) for p in params[1:]), **options)
        return of.mean, of.variance, of.entropy() if name == "bernoulli" else None

    def prediction(self) -> Prediction:
        entropy = information = None
        if self.entropy is not None:
            p = self.mean
            if self.likelihood.name == "categorical":
                entropy = -torch.special.xlogy(p, p).sum(int(self.likelihood.options["dim"]))
            else:
                entropy = -(torch.special.xlogy(p, p) + torch.special.xlog1py(1 - p, -p))
            # not negative but for rounding
            information = (entropy - self.entropy).clamp(min=0)
        return Prediction(self.mean, self.variance, self.squares / self.count, entropy, information)


def joined(parts: Sequence[Prediction]) -> Prediction:
    """Of several chunks of examples."""
    if len(parts) == 1:
        return parts[0]
    columns: list[Any] = [None if column[0] is None else torch.cat(column) for column in zip(*parts)]
    return Prediction(*columns)
