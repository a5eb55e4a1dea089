"""Priors that are no one Gaussian, for ``prior=`` of :func:`vaefast.sample_with_kl`, :func:`vaefast.elbo_loss` and
others.

A prior is anything with ``log_prob(z)``, in nats: z ``[..., D]`` to ``[...]``, such as a ``torch.distributions`` object
whose event is a sample. Its KL has no closed form, and is estimated at a sample of the posterior.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _backends, _closed, _mixtures, _options
from ._checks import batch, floating, is_real, is_whole, like, number, same_device
from ._closed import Room, Term, Values
from ._functorch import unseen
from ._gaussian import compute_dtype, logvar_of, reduced, softplus
from ._nodes import NONE, Loss
from ._options import Parameterization

__all__ = ["GaussianMixturePrior", "ScaleMixture", "VampPrior", "mixture_log_prob"]

LOG_2PI = _mixtures.LOG_2PI


def mixture_log_prob(z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None = None) -> Tensor:
    """log p(z) in nats under a mixture of K diagonal Gaussians, ``log sum_k pi_k N(z; mus[k], e^logvars[k])``.

    Bishop 2006, Pattern Recognition and Machine Learning, equation 9.7. No ``[B, K, D]`` tensor is made. Kernels
    take the differences z - mu one by one, in float64, where B K D is up to 2 million or a tensor is float64. All
    else is matrix products, forward and backward. Of float32 they are in float64, whose rounding is not seen while
    ``sum_d z_d^2 e^-logvar``, with z from the means' mean, is at most 1e8; beyond, differences are taken in blocks that
    stay in the cache.

    Args:
        z: ``[B, D]``, or with other dimensions in front, ``[..., D]``. float16, bfloat16, float32 or float64.
        mus, logvars: ``[K, D]``.
        logits: ``[K]``, the components' log weights up to a constant; -inf is no weight. None is equal weights.

    Returns:
        ``[B]``, or ``[...]``: float32, and float64 where an input is. Differentiable in all arguments.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device.

    Example::

        mus, logvars = torch.randn(10, 20, requires_grad=True), torch.zeros(10, 20)
        log_p = vaefast.priors.mixture_log_prob(z, mus, logvars)
    """
    z, mus = floating("z", z), floating("mus", mus)
    if mus.dim() != 2 or not len(mus):
        raise ValueError(f"mus must be [K, D] with at least one component, got shape {tuple(mus.shape)}")
    logvars = like("logvars", logvars, "mus", mus)
    if logits is not None and floating("logits", logits).shape != mus.shape[:1]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; mus of {tuple(mus.shape)} takes {(len(mus),)}")
    for name, x in (("mus", mus), ("logits", logits)):
        if x is not None:
            same_device(name, x, "z", z.device)
    _last("z", z, mus.shape[1])
    rows = z if z.dim() == 2 else z.reshape(-1, z.shape[-1])
    found = _mixtures.log_prob(rows, mus, logvars, logits, _backends.native_for(rows))
    return found if z.dim() == 2 else found.view(z.shape[:-1])


def _last(name: str, z: Tensor, d: int | None = None) -> None:
    if z.dim() == 0 or (d is not None and z.shape[-1] != d):
        takes = "[..., D]" if d is None else f"[..., {d}], as the components have {d} dimensions"
        raise ValueError(f"{name} has shape {tuple(z.shape)}; it must be {takes}")


def _draw(
    mus: Tensor, logvars: Tensor, logits: Tensor | None, count: object, generator: torch.Generator | None
) -> Tensor:
    """So many samples ``[n, D]``, without gradient."""
    n = _whole("num_samples", count)
    with torch.no_grad():
        weights = torch.ones(len(mus), device=mus.device) if logits is None else torch.softmax(logits.float(), 0)
        k = torch.multinomial(weights, n, replacement=True, generator=generator)
        eps = torch.randn(n, mus.shape[1], dtype=mus.dtype, device=mus.device, generator=generator)
        return torch.addcmul(mus[k], torch.exp(0.5 * logvars[k]).to(mus.dtype), eps)


def _whole(name: str, value: Any) -> int:
    if not is_whole(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return operator.index(value)


class GaussianMixturePrior(nn.Module):
    """A mixture of diagonal Gaussians whose means, log variances and weights are trained with the model.

    The MoG prior of Tomczak & Welling 2018 (arXiv:1705.07120), section 3, with weights. The means start apart, as draws
    of N(0, I); the log variances and the logits at 0.

    Args:
        components: K, how many.
        dim: D, the latents.

    Shape:
        z ``[..., D]`` to ``log_prob(z)`` ``[...]``, in nats.

    Raises:
        TypeError, ValueError: a number that is no int, or less than 1.

    Example::

        prior = vaefast.priors.GaussianMixturePrior(10, 20)
        z, kl = vaefast.sample_with_kl(mu, logvar, prior=prior)
    """

    def __init__(self, components: int, dim: int) -> None:
        super().__init__()
        shape = _whole("components", components), _whole("dim", dim)
        self.mus = nn.Parameter(torch.randn(shape))
        self.logvars = nn.Parameter(torch.zeros(shape))
        self.logits = nn.Parameter(torch.zeros(shape[0]))

    def log_prob(self, z: Tensor) -> Tensor:
        """:func:`mixture_log_prob` of z ``[..., D]``, in nats."""
        return mixture_log_prob(z, self.mus, self.logvars, self.logits)

    def forward(self, z: Tensor) -> Tensor:
        return self.log_prob(z)

    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """So many draws of the prior, ``[num_samples, D]``, without gradient."""
        return _draw(self.mus, self.logvars, self.logits, num_samples, generator)

    def extra_repr(self) -> str:
        return f"components={self.mus.shape[0]}, dim={self.mus.shape[1]}"


class VampPrior(nn.Module):
    """The variational mixture of posteriors: ``p(z) = 1/K sum_k q(z | u_k)``, with pseudo-inputs u that are trained.

    Tomczak & Welling 2018 (arXiv:1705.07120), equation 9. The encoder is the model's own, and trained through the prior
    too; it stays the model's: its parameters are not among the prior's.

    Args:
        pseudo_inputs: ``[K, ...]``, what the encoder takes; a copy is the parameter. Data are a good start.
        encode: the model's encoder, ``encode(u)`` giving ``(mu, logvar)``, each ``[K, D]``. What bounds the
            pseudo-inputs, the paper's hardtanh to [0, 1], belongs into it: ``lambda u: encode(u.clamp(0, 1))``.
        parameterization: what the second means; see :class:`vaefast.Parameterization`.

    Shape:
        z ``[..., D]`` to ``log_prob(z)`` ``[...]``, in nats.

    Raises:
        TypeError, ValueError: pseudo-inputs that are no floating tensor of at least one, an encoder that is not
            callable or does not give two such tensors.

    Example::

        prior = vaefast.priors.VampPrior(x[:50], lambda u: encoder(u).chunk(2, dim=1))
        z, kl = vaefast.sample_with_kl(mu, logvar, prior=prior)
    """

    def __init__(
        self,
        pseudo_inputs: Tensor,
        encode: Callable[[Tensor], Sequence[Tensor]],
        *,
        parameterization: str | Parameterization = "logvar",
    ) -> None:
        super().__init__()
        inputs = batch("pseudo_inputs", pseudo_inputs)
        if not len(inputs):
            raise ValueError(f"pseudo_inputs has shape {tuple(inputs.shape)}; it takes at least one, [K, ...]")
        if not callable(encode):
            raise TypeError(f"encode must be callable, giving (mu, logvar), got {type(encode).__name__}")
        self.pseudo_inputs = nn.Parameter(inputs.detach().clone())
        self.parameterization = _options.parameterization(parameterization)
        self._encode = (encode,)  # in a tuple, or a module would be registered twice

    def components(self) -> tuple[Tensor, Tensor]:
        """Means and log variances ``[K, D]`` of the mixture."""
        found = self._encode[0](self.pseudo_inputs)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise TypeError(f"encode must give (mu, logvar), two tensors [K, D], got {type(found).__name__}")
        mus = floating("encode's mu", found[0])
        raw = like("encode's logvar", found[1], "encode's mu", mus)
        if mus.dim() != 2 or len(mus) != len(self.pseudo_inputs):
            raise ValueError(
                f"encode's mu has shape {tuple(mus.shape)}; of {len(self.pseudo_inputs)} pseudo-inputs it must be "
                f"[{len(self.pseudo_inputs)}, D]"
            )
        return mus, logvar_of(raw.to(compute_dtype(raw)), self.parameterization.spec)

    def log_prob(self, z: Tensor) -> Tensor:
        """:func:`mixture_log_prob` of z ``[..., D]``, in nats; one call of the encoder."""
        return mixture_log_prob(z, *self.components())

    def forward(self, z: Tensor) -> Tensor:
        return self.log_prob(z)

    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """So many draws of the prior, ``[num_samples, D]``, without gradient."""
        with torch.no_grad():
            mus, logvars = self.components()
        return _draw(mus, logvars, None, num_samples, generator)

    def extra_repr(self) -> str:
        return f"pseudo_inputs={tuple(self.pseudo_inputs.shape)}, parameterization={self.parameterization!r}"


class ScaleMixture:
    """A prior of weights: each element alike from ``pi N(0, sigma1^2) + (1 - pi) N(0, sigma2^2)``.

    Blundell et al. 2015 (arXiv:1505.05424), equation 7. Elementwise, block by block, with the gradient in the same
    pass.

    Args:
        sigma1, sigma2: the two standard deviations, above 0.
        pi: the first one's weight, from 0 to 1.

    Shape:
        z ``[..., D]`` to ``log_prob(z)`` ``[...]``, in nats; any tensor to ``total(w)``, the sum over all elements.

    Raises:
        TypeError, ValueError: a number outside its domain; a z that is no floating tensor.

    Example::

        prior = vaefast.priors.ScaleMixture(1.0, 0.1, 0.25)
        log_p = prior.total(torch.randn(100, 784, requires_grad=True))
    """

    def __init__(self, sigma1: float, sigma2: float, pi: float = 0.5) -> None:
        for name, value in (("sigma1", sigma1), ("sigma2", sigma2), ("pi", pi)):
            if not is_real(value):
                raise TypeError(f"{name} must be a number, got {value!r}")
        self.sigma1, self.sigma2, self.pi = map(float, map(number, (sigma1, sigma2, pi)))
        for name, value in (("sigma1", self.sigma1), ("sigma2", self.sigma2)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a standard deviation above 0, got {value!r}")
        if not 0 <= self.pi <= 1:
            raise ValueError(f"pi must be from 0 to 1, the weight of the first Gaussian, got {pi!r}")

    def __repr__(self) -> str:
        return f"ScaleMixture({self.sigma1!r}, {self.sigma2!r}, {self.pi!r})"

    def log_prob(self, z: Tensor) -> Tensor:
        """The log density in nats of z ``[..., D]``, the sum over its last dimension."""
        _last("z", floating("z", z))
        # rows by their number, which of empty ones cannot be told
        return self._summed(z.reshape(math.prod(z.shape[:-1]), z.shape[-1]), "per_sample").view(z.shape[:-1])

    def total(self, w: Tensor) -> Tensor:
        """The log density in nats of all elements together, 0-d."""
        return self._summed(floating("w", w), "sum")

    def _summed(self, w: Tensor, reduction: str) -> Tensor:
        w, terms = w.to(compute_dtype(w)), self._terms()
        if not w.numel() or not unseen(w):
            return _scale_mixture(terms, reduction, w)
        compute = functools.partial(_with_gradient, terms, reduction)
        if torch.is_grad_enabled() and w.requires_grad:
            found: Tensor = Loss.apply(compute, functools.partial(_scale_mixture, terms, reduction), w)
            return found
        return compute(NONE, w)[0]

    def _terms(self) -> Terms:
        (narrow, weight), (broad, rest) = sorted(((self.sigma1, self.pi), (self.sigma2, 1 - self.pi)))
        return _log_height(narrow, weight), narrow**-2, _log_height(broad, rest), broad**-2


# of the narrower Gaussian and of the broader one: log(weight N(0; 0, sigma^2)) and sigma^-2
Terms = tuple[float, float, float, float]


def _log_height(sigma: float, weight: float) -> float:
    return (math.log(weight) if weight else -math.inf) - math.log(sigma) - 0.5 * LOG_2PI


def _elementwise(terms: Terms, squares: Tensor) -> tuple[Tensor, Tensor | None]:
    """log p, and the logit of the narrower Gaussian's share in it; None where there is one Gaussian alone."""
    narrow, of_narrow, broad, of_broad = terms
    if narrow == -math.inf or broad == -math.inf:
        height, precision = (broad, of_broad) if narrow == -math.inf else (narrow, of_narrow)
        return height - 0.5 * precision * squares, None
    logit = (narrow - broad) - 0.5 * (of_narrow - of_broad) * squares
    # not logaddexp, whose second derivative overflows
    return softplus(logit).add(squares, alpha=-0.5 * of_broad) + broad, logit


def _scale_mixture(terms: Terms, reduction: str, w: Tensor) -> Tensor:
    """In operations that autograd, transforms and compilers follow."""
    return reduced(_elementwise(terms, w * w)[0], reduction, w.dtype)


def _with_gradient(terms: Terms, reduction: str, wanted: Sequence[bool], w: Tensor) -> Term:
    narrow, of_narrow, _, of_broad = terms

    def formula(tensors: Sequence[Tensor], wanted: Sequence[bool], total: bool, room: Room) -> Values:
        x = tensors[0]
        squares = x * x
        values, logit = _elementwise(terms, squares)
        if not wanted[0]:
            return values, 1.0, 0.0, [None]
        if logit is None:
            return values, 1.0, 0.0, [(x, -(of_broad if narrow == -math.inf else of_narrow))]
        return values, 1.0, 0.0, [(logit.sigmoid_().mul_(of_narrow - of_broad).add_(of_broad).mul_(x), -1.0)]

    return _closed.term(formula, (w,), wanted[:1], reduction, w.dim())
