"""The aggregate posterior q(z) = E_x q(z|x): how much it knows of x, how far its latents hang together, and how far
they are from the prior; the loss that weighs these apart; and a distance to the prior that no density is needed for.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import _backends, _options, _pairwise
from ._arguments import posterior
from ._checks import Real, batch, choice, factor, flag, is_real, is_whole, like
from ._compose import log_density
from ._gaussian import compute_dtype, logvar_of
from ._options import Likelihood, LogProb, Parameterization
from .functional import Recon, reconstruction_loss

if TYPE_CHECKING:
    from ._pairwise import Weights

ESTIMATORS = ("mws", "mss")


class TCTerms(NamedTuple):
    """The KL's three parts, in nats, 0-d each; their sum is the estimate of KL(q || p) at the sample. Chen et al.
    2018 (arXiv:1802.04942), equation 2.

    ``mutual_information`` of x and z under q; ``total_correlation``, KL(q(z) || prod_d q(z_d)); and ``dimension_kl``,
    KL(prod_d q(z_d) || p(z)), in which the prior comes in.

    Example::

        mi, tc, dimension_kl = vaefast.total_correlation(z, mu, logvar, 60_000)
    """

    mutual_information: Tensor
    total_correlation: Tensor
    dimension_kl: Tensor


def total_correlation(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int,
    *,
    estimator: str = "mws",
    parameterization: str | Parameterization = "logvar",
    prior: LogProb | None = None,
    published_weights: bool = False,
) -> TCTerms:
    """The KL to the prior as mutual information, total correlation and dimension-wise KL, estimated on a batch.

    Chen et al. 2018 (arXiv:1802.04942), equation 2. The densities of q(z) and of each q(z_d) are sums over the batch's
    B posteriors: ``log q(z_i) = log sum_j W_ij q(z_i | x_j)``. No ``[B, B, D]`` tensor is made, forward or backward.

    Args:
        z: ``[B, D]``, the samples of the batch's posteriors; or ``[B, ...]``, where every element is a latent.
        mu, logvar: the same shape, the posteriors.
        dataset_size: N, the data of which this batch was drawn.
        estimator: ``"mws"``, minibatch-weighted sampling, ``W_ij = 1 / (N B)`` (equation 3), which is biased: q(z) is
            too small, by a factor between B and N. ``"mss"``, minibatch-stratified sampling (appendix C.2), whose sum
            is without bias: W is 1 / N for the own posterior, i = j, (N - B + 1) / (N (B - 1)) for one other, and
            1 / (B - 1) for the rest. It needs 2 <= B <= N.
        parameterization: what ``logvar`` means; see :class:`vaefast.Parameterization`.
        prior: an object of :mod:`vaefast.priors`, or another with ``log_prob(z)``; None is N(0, I).
        published_weights: of ``"mss"``, those of the published code, for numbers that are to be compared with it. It
            writes the first two kinds of weights into the first two columns, where the diagonals are meant.

    Returns:
        ``TCTerms(mutual_information, total_correlation, dimension_kl)``, means over the batch, in nats, 0-d; float32,
        and float64 where an input is. Differentiable in z, mu, logvar and the prior.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device, an unknown name, or a dataset_size
            that the estimator does not take.

    Example::

        z = vaefast.reparameterize(mu, logvar)
        mi, tc, dimension_kl = vaefast.total_correlation(z, mu, logvar, 60_000)
    """
    z = batch("z", z)
    mu, logvar = posterior(like("mu", mu, "z", z), logvar)
    weights = _weights(z, dataset_size, estimator, flag("published_weights", published_weights))
    spec = _options.parameterization(parameterization).spec
    if prior is not None:
        prior = _options.density(prior)
    dtype = compute_dtype(z, mu, logvar)
    raw = logvar.to(dtype) if logvar.dtype != dtype else logvar
    lv, rows = logvar_of(raw, spec), (z.shape[0], -1)
    if z.dim() != 2:
        z, mu, lv = (t.reshape(rows) for t in (z, mu, lv))
    # against a prior that comes apart, what is left of large terms: in float64
    of = dtype if prior is None else torch.float64
    mi, tc, last = _pairwise.terms_of(z, mu, lv, weights, _backends.native_for(z), prior is None, of)
    if prior is None:
        return TCTerms(mi, tc, last)
    last = last - log_density(prior, z.to(dtype)).double().mean()
    return TCTerms(mi.to(dtype), tc.to(dtype), last.to(dtype))


def _weights(z: Tensor, dataset_size: int, estimator: str, published: bool) -> Weights:
    choice("estimator", estimator, ESTIMATORS)
    if not is_whole(dataset_size):
        raise TypeError(f"dataset_size must be an int, the number of data, got {dataset_size!r}")
    n, b = operator.index(dataset_size), z.shape[0]
    if b < 1:
        raise ValueError(f"z has shape {tuple(z.shape)}; it takes at least one sample")
    if n < 1:
        raise ValueError(f"dataset_size must be at least 1, got {n}")
    if estimator == "mws":
        return _pairwise.minibatch(b, n)
    if b < 2:
        raise ValueError("estimator='mss' weighs a sample against the others of its batch, but z has one; use 'mws'")
    if n < b:
        raise ValueError(
            f"dataset_size={n} is less than the batch of {b}, which estimator='mss' takes for drawn of it without "
            "repetition; give the number of data, or use 'mws'"
        )
    return _pairwise.stratified(b, n, published, z.device)


def beta_tcvae_loss(
    recon: Recon,
    target: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int,
    *,
    likelihood: str | Likelihood = "bernoulli",
    alpha: Tensor | Real = 1.0,
    beta: Tensor | Real = 6.0,
    gamma: Tensor | Real = 1.0,
    weight: Tensor | None = None,
    estimator: str = "mws",
    parameterization: str | Parameterization = "logvar",
    prior: LogProb | None = None,
    published_weights: bool = False,
) -> Tensor:
    """The loss of a beta-TCVAE: ``nll + alpha MI + beta TC + gamma dimension-wise KL``, a mean over the batch, in nats.

    Chen et al. 2018 (arXiv:1802.04942), equation 4, whose alpha and gamma are 1. With beta 1 too it is the negative
    ELBO with the KL estimated at z.

    Args:
        recon, target, likelihood, weight: as for :func:`vaefast.reconstruction_loss`; ``[B, ...]``.
        z, mu, logvar, dataset_size, estimator, parameterization, prior, published_weights: as for
            :func:`total_correlation`; z is what was decoded.
        alpha, beta, gamma: floats or 0-d tensors.

    Returns:
        0-d; float32, and float64 where an input is.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name.

    Example::

        z = vaefast.reparameterize(mu, logvar)
        loss = vaefast.beta_tcvae_loss(decoder(z), x, z, mu, logvar, 60_000, beta=6.0)
    """
    alpha, beta, gamma = factor("alpha", alpha), factor("beta", beta), factor("gamma", gamma)
    terms = total_correlation(
        z, mu, logvar, dataset_size, estimator=estimator, parameterization=parameterization, prior=prior,
        published_weights=published_weights,
    )  # fmt: skip
    first = recon if isinstance(recon, Tensor) else next(iter(recon), None)
    if isinstance(first, Tensor) and first.shape[:1] != z.shape[:1]:
        raise ValueError(f"recon has a batch of {tuple(first.shape[:1])} but z has {z.shape[0]}; they must be equal")
    nll = reconstruction_loss(recon, target, likelihood=likelihood, weight=weight)
    return nll + alpha * terms[0] + beta * terms[1] + gamma * terms[2]


KERNELS = ("gaussian", "inverse_multiquadric")


def aggregate_posterior_mmd(
    z: Tensor, prior_samples: Tensor | None = None, *, kernel: str = "gaussian", bandwidth: Real | None = None
) -> Tensor:
    """How far the aggregate posterior q(z) is from the prior: the squared maximum mean discrepancy, without bias.

    InfoVAE's and a Wasserstein autoencoder's penalty: Zhao et al. 2017 (arXiv:1706.02262), section 3.2; Tolstikhin et
    al. 2018 (arXiv:1711.01558). By Gretton et al. 2012, lemma 6, with x and x' of q(z), y and y' of the prior, it is
    ``E k(x, x') - 2 E k(x, y) + E k(y, y')``, each over pairs of different draws. For the Gaussian kernel and N(0, I)
    the last two have closed forms (Henze & Zirkler 1990): nothing is drawn of the prior, and its noise is not in the
    estimate.

    Args:
        z: ``[B, D]``, a draw of each of the batch's posteriors, at least two; or ``[B, ...]``, where every element is a
            latent.
        prior_samples: ``[M, D]``, draws of the prior, at least two; None is N(0, I), for ``kernel="gaussian"``.
        kernel: ``"gaussian"``, ``exp(-|x - y|^2 / (2 s^2))``, or ``"inverse_multiquadric"``, ``2 s^2 / (2 s^2 +
            |x - y|^2)``, whose tails are heavier.
        bandwidth: s, above 0; None is ``sqrt(D)``, at which the kernel of two draws of N(0, I) is about
            ``e^-1``. InfoVAE's authors take ``D / sqrt(2)``.

    Returns:
        0-d, of no unit, 0 in the mean where q(z) is the prior, and so sometimes below; float32, and float64 where an
        input is. Computed in float64, in matrices of ``[B, B]`` and ``[B, M]``.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device, too few draws, or an unknown kernel.

    Example::

        z = vaefast.reparameterize(mu, logvar)
        loss = vaefast.elbo_loss(decoder(z), x, mu, logvar) + 100 * vaefast.aggregate_posterior_mmd(z)
    """
    z = batch("z", z)
    choice("kernel", kernel, KERNELS)
    if bandwidth is not None and (not is_real(bandwidth) or not 0 < bandwidth < math.inf):
        raise ValueError(f"bandwidth must be None or a finite number above 0, got {bandwidth!r}")
    samples = None if prior_samples is None else batch("prior_samples", prior_samples)
    for name, draws in (("z", z), ("prior_samples", samples)):
        if draws is not None and (draws.shape[0] < 2 or not draws[0].numel()):
            raise ValueError(f"{name} must have at least two draws of a latent, got shape {tuple(draws.shape)}")
    dtype = compute_dtype(z) if samples is None else compute_dtype(z, samples)
    x = z.reshape(len(z), -1).double()
    dims = x.shape[1]
    of_width = 2.0 * (dims if bandwidth is None else float(bandwidth) ** 2)
    if samples is None:
        if kernel != "gaussian":
            raise ValueError(f"kernel={kernel!r} has no closed form beside N(0, I); give prior_samples, [M, D]")
        # of one draw of N(0, I) beside x, and of two
        beside = (of_width / (of_width + 2)) ** (dims / 2) * torch.exp(-x.square().sum(1) / (of_width + 2)).mean()
        of_two: Tensor | float = (of_width / (of_width + 4)) ** (dims / 2)
    else:
        y = _as_drawn(samples, z)
        beside, of_two = _kernel(x, y, kernel, of_width).mean(), _apart(y, kernel, of_width)
    found: Tensor = (_apart(x, kernel, of_width) - 2 * beside + of_two).to(dtype)
    return found


def _as_drawn(samples: Tensor, z: Tensor) -> Tensor:
    if samples.device != z.device or samples.shape[1:] != z.shape[1:]:
        raise ValueError(
            f"prior_samples of shape {tuple(samples.shape)} on {samples.device} do not go with z of shape "
            f"{tuple(z.shape)} on {z.device}; they are [M, D] where z is [B, D]"
        )
    return samples.reshape(len(samples), -1).double()


def _kernel(x: Tensor, y: Tensor, kernel: str, of_width: float) -> Tensor:
    """``[B, M]``; 2 s^2 is ``of_width``."""
    square = (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T).clamp(min=0.0)
    return torch.exp(-square / of_width) if kernel == "gaussian" else of_width / (of_width + square)


def _apart(x: Tensor, kernel: str, of_width: float) -> Tensor:
    """The kernel's mean over pairs of different draws."""
    each = _kernel(x, x, kernel, of_width)
    return (each.sum() - each.diagonal().sum()) / (len(x) * (len(x) - 1))
