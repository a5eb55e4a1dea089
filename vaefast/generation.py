"""From a likelihood's parameters to data: what a decoder's output looks like, and draws of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributions as D

from . import _arguments, _options
from ._functions import Recon
from ._functorch import tracing
from ._options import Likelihood
from .likelihoods import COMPOSED, entry_of


def _distribution(recon: Recon, likelihood: str | Likelihood) -> tuple[D.Distribution, torch.dtype]:
    """p(x | recon), in float32 at least, and the dtype of what comes of it."""
    chosen = _options.likelihood(likelihood)
    entry = entry_of(chosen.name)
    params = _arguments.parameters(recon, chosen.name, entry)
    dtype = params[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    return entry.distribution(*(p.to(wide).expand_as(params[0]) for p in params), **chosen.options), dtype


def likelihood_mean(recon: Recon, likelihood: str | Likelihood = "bernoulli") -> Tensor:
    """The mean of p(x | recon): the picture that a decoder's output stands for.

    Args:
        recon, likelihood: as for :func:`vaefast.reconstruction_loss`.

    Returns:
        ``[B, ...]``, the first parameter's shape and dtype; not finite where the likelihood has no mean (Student's t
        with df <= 1). Of ``"categorical"`` the classes' probabilities, the mean of a one-hot vector. Of
        ``"discretized_logistic_mixture"`` the target's shape; a later channel follows, in each component, from the
        means of those before it.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name.

    Example::

        logits = decoder(torch.randn(16, 20))
        images = vaefast.likelihood_mean(logits)
    """
    p, dtype = _distribution(recon, likelihood)
    return p.mean.to(dtype)


@torch.no_grad()
def sample_likelihood(recon: Recon, likelihood: str | Likelihood = "bernoulli") -> Tensor:
    """A draw from p(x | recon), by PyTorch's default generator.

    Args:
        recon, likelihood: as for :func:`vaefast.reconstruction_loss`.

    Returns:
        ``[B, ...]``, the first parameter's shape and dtype, or of a mixture the target's; without a gradient. Classes
        are int64. Where a draw is larger than that dtype holds, as a count above 65504 is for float16, all come in the
        next dtype that does; in a graph (``torch.compile``, ``torch.export``, ``torch.jit.trace``), which cannot ask,
        what has no bound comes in float32 at least. Data above 0 are no less than the dtype's least normal number.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name; a count beyond
            float64.

    Example::

        mu, theta, pi_logits = counts_decoder(torch.randn(16, 20))
        counts = vaefast.sample_likelihood((mu, theta, pi_logits), "zero_inflated_negative_binomial")
    """
    if _options.likelihood(likelihood).name in COMPOSED:
        raise ValueError(
            f"{likelihood!r} takes its variance from data, so it has no draws; use 'gaussian' with a logvar"
        )
    p, dtype = _distribution(recon, likelihood)
    drawn = p.sample()
    return _narrowed(drawn, dtype, _options.likelihood(likelihood).name) if drawn.is_floating_point() else drawn


# supports within which a draw is no larger than what it was drawn by
_BOUNDED = ("unit", "bins", "some of total")


def _narrowed(drawn: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """In ``dtype``, or the next one that holds every draw; nothing becomes what it cannot be."""
    support = entry_of(name).support
    if support in _BOUNDED:
        return drawn.to(dtype)
    if torch.compiler.is_compiling() or tracing():
        # whose dtypes cannot go by what is drawn
        found = drawn.to(torch.promote_types(dtype, torch.float32))
    else:
        found = _wide_enough(drawn, dtype, name)
    return found.clamp(min=torch.finfo(found.dtype).smallest_normal) if support == "positive" else found


def _wide_enough(drawn: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if entry_of(name).support == "count" and drawn.isinf().any():
        raise ValueError(f"a draw of {name!r} is beyond what float64 holds; recon's rate or mean must be below 1e308")
    found = drawn.to(dtype)
    for wider in (torch.float32, torch.float64):
        if not (found.isinf() & drawn.isfinite()).any():
            break
        found = drawn.to(torch.promote_types(dtype, wider))
    return found
