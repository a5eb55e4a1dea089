"""Bounds of log p(x) from several draws a sample, tighter than the ELBO, and log p(x) itself by importance sampling.

With K draws z_k of q(z|x) and their weights ``w_k = p(x|z_k) p(z_k) / q(z_k|x)``, every bound here is a function of the
``log w_k``. ``K`` is the draws' dimension, the first; ``B`` is the batch; everything is in nats.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _draws, _importance, _options
from ._checks import Real, choice, flag, floating, is_whole
from ._functions import Recon
from ._gaussian import Prior
from ._importance import ESTIMATORS
from ._options import Likelihood, LogProb, Parameterization
from ._path import scale_path
from .functional import reparameterize

__all__ = [
    "LogEvidence",
    "LogProb",
    "PIWAELosses",
    "bound_of",
    "iwae_loss",
    "log_evidence",
    "log_weights",
    "piwae_losses",
]


def log_weights(
    recon: Recon, target: Tensor, z: Tensor, mu: Tensor, logvar: Tensor, prior_mu: Prior = None,
    prior_logvar: Prior = None, *, likelihood: str | Likelihood = "bernoulli",
    parameterization: str | Parameterization = "logvar", weight: Tensor | None = None, prior: LogProb | None = None,
    prior_parameterization: str | Parameterization = "logvar", batch_dims: int = 1,
) -> Tensor:  # fmt: skip
    """The log importance weights ``log p(x|z) + log p(z) - log q(z|x)`` of K draws for each sample.

    Burda et al. 2016 (arXiv:1509.00519), equation 8. Differentiable in ``recon``, ``z``, ``mu``, ``logvar`` and the
    prior. The target is read K times and not copied; of ``[K, B, ...]`` there is the reconstruction and its gradient.

    Args:
        recon: ``[K, B, ...]``, the likelihood's parameters for each draw, as for :func:`vaefast.reconstruction_loss`.
        target: ``[B, ...]``, the data, without the draws' dimension.
        z: ``[K, B, D]``, the draws: ``vaefast.reparameterize(mu, logvar, num_samples=K)``. D may be several dimensions.
        mu, logvar: ``[B, D]``, the posterior q.
        prior_mu, prior_logvar, prior_parameterization: as for :func:`vaefast.gaussian_kl`.
        likelihood: as for :func:`vaefast.reconstruction_loss`; ``"gaussian_optimal"``, which is no density, is refused.
        parameterization: what ``logvar`` means; see :class:`vaefast.Parameterization`.
        weight: broadcasts to the elements of log p(x|z), from the right, and multiplies them; where it is 0 an element
            is not evaluated. A bool tensor is a mask.
        prior: in place of the Gaussian one, any object with ``log_prob(z)``, which gives ``[K, B]``: one of
            ``torch.distributions`` with one event dimension, or of ``vaefast.priors``.
        batch_dims: how many of mu's first dimensions are the batch: 2 for sequences ``[B, T, D]``, whose draws are
            ``[K, B, T, D]`` and whose weights ``[K, B, T]``, one for each step.

    Returns:
        ``[K, B]``, float32 (float64 where an input is).

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name.

    Example::

        z = vaefast.reparameterize(mu, logvar, num_samples=8)
        log_w = vaefast.bounds.log_weights(decoder(z), x, z, mu, logvar)
    """
    draws = _draws.checked(
        recon, target, z, mu, logvar, prior_mu, prior_logvar, likelihood=likelihood, parameterization=parameterization,
        weight=weight, prior=prior, prior_parameterization=prior_parameterization, batch_dims=batch_dims,
    )  # fmt: skip
    return draws.restored(draws.log_weights())


def bound_of(
    log_weights: Tensor, *, alpha: Real = 0.0, groups: int = 1, mix: Real = 0.0, reduction: str = "batchmean",
) -> Tensor:  # fmt: skip
    """The negative bound of log p(x) that log weights make, from wherever they come: a hierarchy's, a sequence's.

    Args:
        log_weights: ``[K, B]`` or ``[K, ...]``, of K draws, as :func:`log_weights` gives them.
        alpha, groups, mix, reduction: as for :func:`iwae_loss`.

    Returns:
        A 0-d tensor, or ``[B]`` with ``reduction="per_sample"``, in nats, of the dtype of ``log_weights``.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype or range, groups that do not divide K, or an unknown
            reduction.

    Burda et al. 2016 (arXiv:1509.00519), equation 8; the other sources are at :func:`iwae_loss`.

    Example::

        z = vaefast.reparameterize(mu, logvar, num_samples=8)
        loss = vaefast.bounds.bound_of(vaefast.bounds.log_weights(decoder(z), x, z, mu, logvar))
    """
    log_weights = floating("log_weights", log_weights)
    if log_weights.dim() == 0 or not log_weights.shape[0]:
        raise ValueError(f"log_weights must be [K, B] with at least one draw, got shape {tuple(log_weights.shape)}")
    chosen = _importance.bound(alpha, groups, mix, log_weights.shape[0])
    return _importance.reduced(chosen.loss(log_weights), reduction)


def iwae_loss(
    recon: Recon, target: Tensor, z: Tensor, mu: Tensor, logvar: Tensor, prior_mu: Prior = None,
    prior_logvar: Prior = None, *, likelihood: str | Likelihood = "bernoulli",
    parameterization: str | Parameterization = "logvar", weight: Tensor | None = None, prior: LogProb | None = None,
    prior_parameterization: str | Parameterization = "logvar", batch_dims: int = 1, estimator: str = "iwae",
    alpha: Real = 0.0, groups: int = 1, mix: Real = 0.0, reduction: str = "batchmean",
) -> Tensor:  # fmt: skip
    """The negative importance-weighted bound of log p(x), ``-log(mean_k w_k)``, from K draws for each sample.

    Burda et al. 2016 (arXiv:1509.00519), equation 8: for K = 1 the ELBO, with K it rises to log p(x).

    Args:
        recon, target, z, mu, logvar, prior_mu, prior_logvar: as for :func:`log_weights`.
        likelihood, parameterization, weight, prior, prior_parameterization, batch_dims: as for :func:`log_weights`.
        estimator: of the gradient; the value is the same. ``"iwae"``: as it comes. The other two take the score
            function out of the encoder's gradient, which then goes through ``z`` alone: q's parameters are held in
            log q. So they ask that ``z`` was drawn by ``vaefast.reparameterize`` from the same ``mu`` and ``logvar``,
            not detached, and that ``recon`` was computed from that same tensor.

            - ``"stl"`` leaves it at that (Roeder et al. 2017, arXiv:1703.09194). For one draw, or ``alpha=1``, the
              gradient has no bias; for more draws it has one (Tucker et al. 2019), and its variance goes to
              0 as q goes to the posterior.
            - ``"dreg"`` is doubly reparameterized (Tucker et al. 2019, arXiv:1810.04152): the path through
              ``z`` has the weights ``w_k^2``, or ``alpha w_k + (1 - alpha) w_k^2``, and no bias; the decoder's and the
              prior's parameters have ``w_k``. A hook on ``z`` does it, which scales all that arrives there: ``z`` has
              no other loss.
        alpha: Renyi's (Li & Turner 2016, arXiv:1602.02311), ``log(mean_k w_k^(1 - alpha)) / (1 - alpha)``: 0
            is importance-weighted, 1 the ELBO, and below 0 a bound from above, in the limit of many draws.
        groups: M, which divides K: the mean of the bounds of M groups of K / M draws (MIWAE; Rainforth et al. 2018,
            arXiv:1802.04537).
        mix: the ELBO's share beta in ``beta ELBO + (1 - beta) IWAE`` (CIWAE; the same). For PIWAE see
            :func:`vaefast.bounds.piwae_losses`.
        reduction: ``"per_sample"`` ``[B]``, ``"batchmean"`` its mean over the batch, or ``"sum"``.

    Returns:
        The negative bound, float32 (float64 where an input is).

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range, an unknown name, or a ``z``
            through which the estimator does not reach the encoder.

    Example::

        z = vaefast.reparameterize(mu, logvar, num_samples=8)
        loss = vaefast.bounds.iwae_loss(decoder(z), x, z, mu, logvar, estimator="dreg")
    """
    choice("estimator", estimator, ESTIMATORS)
    choice("reduction", reduction, _options.ELBO_REDUCTIONS)
    draws = _draws.checked(
        recon, target, z, mu, logvar, prior_mu, prior_logvar, likelihood=likelihood, parameterization=parameterization,
        weight=weight, prior=prior, prior_parameterization=prior_parameterization, batch_dims=batch_dims,
    )  # fmt: skip
    chosen = _importance.bound(alpha, groups, mix, z.shape[0])
    if chosen == _importance.Bound():
        loss, log_w = draws.bound(reduction, frozen=estimator != "iwae")
    else:
        log_w = draws.log_weights(frozen=estimator != "iwae")
        loss = _importance.reduced(chosen.loss(log_w), reduction)
    if estimator != "iwae":
        share = chosen.share_of_path(log_w.detach()) if estimator == "dreg" else None
        scale_path(estimator, z, mu, logvar, recon, None if share is None else draws.restored(share))
    return draws.restored(loss) if reduction == "per_sample" else loss


class PIWAELosses(NamedTuple):
    """The two targets of :func:`vaefast.bounds.piwae_losses`, in nats, 0-d or ``[B]``: each goes to its own parameters.

    Example::

        z = vaefast.reparameterize(*encoder(x).chunk(2, dim=1), num_samples=8)
        losses = vaefast.bounds.piwae_losses(decoder(z), x, z, mu, logvar, groups=4)
    """

    encoder: Tensor
    decoder: Tensor


def piwae_losses(
    recon: Recon, target: Tensor, z: Tensor, mu: Tensor, logvar: Tensor, prior_mu: Prior = None,
    prior_logvar: Prior = None, *, groups: int, likelihood: str | Likelihood = "bernoulli",
    parameterization: str | Parameterization = "logvar", weight: Tensor | None = None, prior: LogProb | None = None,
    prior_parameterization: str | Parameterization = "logvar", batch_dims: int = 1, alpha: Real = 0.0,
    reduction: str = "batchmean",
) -> PIWAELosses:  # fmt: skip
    """The bound of all draws for the decoder, and the mean of the groups' for the encoder, from the same weights.

    PIWAE, Rainforth et al. 2018 (arXiv:1802.04537): more draws make the decoder's gradient better, and the
    encoder's worse, whose signal falls below its noise. Each loss is to be differentiated in its own parameters::

        losses.encoder.backward(inputs=list(encoder.parameters()), retain_graph=True)
        losses.decoder.backward(inputs=list(decoder.parameters()))

    A prior that is trained goes with the decoder.

    Args:
        recon, target, z, mu, logvar, prior_mu, prior_logvar: as for :func:`log_weights`.
        likelihood, parameterization, weight, prior, prior_parameterization, batch_dims: as for :func:`log_weights`.
        groups, alpha, reduction: as for :func:`iwae_loss`; ``groups`` are the encoder's.

    Returns:
        ``PIWAELosses(encoder, decoder)``, a NamedTuple, in nats.

    Raises:
        TypeError, ValueError: as :func:`iwae_loss`.

    Example::

        mu, logvar = encoder(x).chunk(2, dim=1)
        z = vaefast.reparameterize(mu, logvar, num_samples=8)
        losses = vaefast.bounds.piwae_losses(decoder(z), x, z, mu, logvar, groups=4)
        losses.encoder.backward(inputs=list(encoder.parameters()), retain_graph=True)
        losses.decoder.backward(inputs=list(decoder.parameters()))
    """
    log_w = log_weights(
        recon, target, z, mu, logvar, prior_mu, prior_logvar, likelihood=likelihood, parameterization=parameterization,
        weight=weight, prior=prior, prior_parameterization=prior_parameterization, batch_dims=batch_dims,
    )  # fmt: skip
    return PIWAELosses(
        bound_of(log_w, alpha=alpha, groups=groups, reduction=reduction),
        bound_of(log_w, alpha=alpha, reduction=reduction),
    )


class LogEvidence(NamedTuple):
    """What :func:`vaefast.bounds.log_evidence` finds, float64 ``[B]`` each: log p(x) in nats, its standard error,
    and how many draws of the posterior itself the draws are worth.

    Example::

        found = vaefast.bounds.log_evidence(lambda x: encoder(x).chunk(2, dim=1), decoder, x, num_samples=64)
        print(found.value.mean(), found.effective_samples.min())
    """

    value: Tensor
    standard_error: Tensor
    effective_samples: Tensor


@torch.no_grad()
def log_evidence(
    encode: Callable[[Tensor], tuple[Tensor, Tensor]], decode: Callable[[Tensor], Recon], x: Tensor, *,
    num_samples: int = 5000, chunk: int | None = None, prior_mu: Prior = None, prior_logvar: Prior = None,
    likelihood: str | Likelihood = "bernoulli", parameterization: str | Parameterization = "logvar",
    weight: Tensor | None = None, prior: LogProb | None = None,
    prior_parameterization: str | Parameterization = "logvar", generator: torch.Generator | None = None,
    progress: bool | Callable[[int, int], object] = False,
) -> LogEvidence:  # fmt: skip
    """log p(x) by importance sampling, ``log(mean_k w_k)`` over many draws of q, without gradients.

    Burda et al. 2016 (arXiv:1509.00519), section 5, with 5,000 draws. Memory does not grow with their number: each
    chunk goes into three running sums in float64. The estimate is low, by about half its standard error squared, and
    rises with the number of draws; where few of them are effective, q is no good proposal and neither number is.

    Args:
        encode: x to ``(mu, logvar)``, ``[B, D]`` each; called once.
        decode: draws ``[k, B, D]`` to the likelihood's parameters ``[k, B, ...]``.
        x: ``[B, ...]``, the data.
        num_samples: how many draws for each of x.
        chunk: how many at a time; None for as many as have some four million elements of x.
        prior_mu, prior_logvar, likelihood, parameterization, weight, prior, prior_parameterization: as for
            :func:`log_weights`.
        generator: where the draws' seeds come from; the default generator of x's device if None.
        progress: True draws a bar on stderr; a function is called with the draws that are done and all of them.

    Returns:
        ``LogEvidence(value, standard_error, effective_samples)``, ``[B]`` each. The standard error is the delta
        method's, ``std(w) / (sqrt(K) mean(w))``; the effective samples are ``(sum w)^2 / sum w^2`` (Kong 1992).

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range, or an unknown name.

    Example::

        found = vaefast.bounds.log_evidence(lambda x: encoder(x).chunk(2, dim=1), decoder, x, num_samples=64)
        print(f"{found.value.mean():.1f} nats")
    """
    x = floating("x", x) if not isinstance(x, Tensor) or x.is_floating_point() else x
    for name, count in (("num_samples", num_samples), ("chunk", chunk)):
        if not is_whole(count) and not (name == "chunk" and count is None):
            raise TypeError(f"{name} must be an int, got {count!r}")
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count!r}")
    tell = _bar if progress is True else progress
    if not callable(tell):
        flag("progress", progress)
        tell = _silent
    mu, logvar = encode(x)
    step = chunk or max(1, _ELEMENTS // max(1, x.numel()))
    sums = _RunningSums()
    for done in range(0, num_samples, step):
        count = min(step, num_samples - done)
        z = reparameterize(mu, logvar, parameterization=parameterization, num_samples=count, generator=generator)
        sums.add(
            log_weights(
                decode(z), x, z, mu, logvar, prior_mu, prior_logvar, likelihood=likelihood,
                parameterization=parameterization, weight=weight, prior=prior,
                prior_parameterization=prior_parameterization,
            )
        )  # fmt: skip
        tell(done + count, num_samples)
    return sums.evidence()


# of x in a chunk of draws: 16 MB of float32 for its reconstructions
_ELEMENTS = 1 << 22


class _RunningSums:
    """Of ``w / max w`` and its square, over chunks of log weights."""

    def __init__(self) -> None:
        self.count = 0
        self.largest = self.first = self.second = torch.zeros(())

    def add(self, log_weights: Tensor) -> None:
        log_w = log_weights.cpu() if log_weights.device.type == "mps" else log_weights
        log_w = log_w.double()
        largest = log_w.amax(0)
        if self.count:
            largest = torch.maximum(largest, self.largest)
        # where all weights are 0, so are their sums
        at = torch.where(largest == -torch.inf, 0.0, largest)
        w = torch.exp(log_w - at)
        first, second = w.sum(0), w.square().sum(0)
        if self.count:
            shrunk = torch.exp(self.largest - at)
            first, second = first + self.first * shrunk, second + self.second * shrunk.square()
        self.count += len(log_w)
        self.largest, self.first, self.second = largest, first, second

    def evidence(self) -> LogEvidence:
        n, effective = self.count, self.first.square() / self.second
        # the weights' variance over the square of their mean is n / effective - 1
        error = ((n / effective - 1).clamp(min=0) / (n - 1)).sqrt()
        value = torch.where(self.largest == -torch.inf, 0.0, self.largest) + torch.log(self.first / n)
        return LogEvidence(value, error, effective)


def _silent(done: int, total: int) -> None:
    """No progress is shown."""


def _bar(done: int, total: int) -> None:
    width = 30
    filled = width * done // total
    end = "\n" if done == total else ""
    sys.stderr.write(f"\r[{'#' * filled}{'.' * (width - filled)}] {done:,} of {total:,} draws{end}")
    sys.stderr.flush()
