"""Discrete latents: categoricals by their logits, their KL, one-hot samples with gradients, and the ELBO with them."""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _arguments, _backends, _categorical, _options, presets
from ._batch import behind
from ._checks import Real, broadcasts, choice, flag, floating, is_real, is_whole, number, same_device
from ._compose import bounded, reduced_for_floors
from ._engine import Categorical
from ._functions import Recon
from ._gaussian import compute_dtype, promoted, reduced
from ._generators import explain_to_compilers
from ._options import Composed, ELBOTerms, KLOptions, Likelihood
from .functional import reconstruction_loss

__all__ = ["categorical_elbo_terms", "categorical_kl", "sample_categorical", "sample_with_categorical_kl"]


class _Asked(NamedTuple):
    """What of, and what the KL is to become: the options, and the dtype of what is not reduced."""

    of: Categorical
    options: KLOptions
    narrow: torch.dtype


def categorical_kl(
    logits: Tensor,
    prior_logits: Tensor | None = None,
    *,
    dim: int = -1,
    unimix: float = 0.0,
    reduction: str = "batchmean",
    free_bits: float = 0.0,
    free_bits_per: str = "dim",
    balance: float | None = None,
    batch_dims: int = 1,
) -> Tensor:
    """KL(q || p) in nats between categoricals q = Cat(logits) and p = Cat(prior_logits), the classes along ``dim``.

    ``sum_k q_k (log q_k - log p_k)``, computed as ``sum_k q_k h(log p_k - log q_k)`` with h(x) = e^x - 1 - x, so that
    it keeps its relative accuracy next to the prior and is never negative. Logits of -inf are classes of probability 0:
    where q has one nothing is left, where p alone has it the KL is infinite.

    Args:
        logits: ``[B, ..., K]``, or with the K classes along another ``dim``; float16, bfloat16, float32 or float64, CPU
            or CUDA, any strides. They need not be normalized. Every other dimension behind the batch is one of latents.
        prior_logits: None is the uniform prior; else a tensor that broadcasts to ``logits``, trained too.
        dim: the dimension of the classes, behind the batch.
        unimix: the share u of the uniform distribution in both, ``(1 - u) softmax(logits) + u / K``, from 0 to 1
            (Hafner et al. 2023, arXiv:2301.04104, whose u is 0.01).
        reduction: ``"none"`` the KL of each latent, ``[B, ...]`` without ``dim``; ``"per_sample"`` ``[B]``, summed over
            a sample's latents; ``"batchmean"`` its mean over B, ``"sum"``, or ``"mean"`` over every latent.
        free_bits, free_bits_per: a floor in nats, as for :func:`vaefast.gaussian_kl`, under each latent (``"dim"``),
            each sample (``"sample"``) or the batch's mean of each latent (``"batch_dim"``).
        balance: as for :func:`vaefast.gaussian_kl`: the prior's gradient is times it, the posterior's times 1 - it.
        batch_dims: how many of the first dimensions are the batch: 2 for sequences ``[B, T, latents, K]``.

    Returns:
        The KL. A reduced result is float32 (float64 where an input is); ``"none"`` keeps the promoted input dtype.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, range or device; no class along ``dim``.

    Example::

        logits, prior_logits = torch.randn(128, 32, 32), torch.randn(128, 32, 32)
        kl = vaefast.categorical_kl(logits, prior_logits, unimix=0.01, free_bits=1.0, balance=0.8)
    """
    asked = _asked(logits, prior_logits, dim, unimix, reduction, free_bits, free_bits_per, balance, batch_dims)
    return _computed(asked, None, reduction)[-1]


def sample_categorical(
    logits: Tensor,
    *,
    dim: int = -1,
    unimix: float = 0.0,
    straight_through: bool = True,
    temperature: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one-hot vectors from ``(1 - u) softmax(logits) + u / K``, with a gradient.

    Straight-through, the sample has the gradient of the probabilities (Bengio et al. 2013, arXiv:1308.3432; Hafner et
    al. 2021, arXiv:2010.02193, algorithm 1). With a temperature t it has that of the relaxation
    ``softmax((log p + g) / t)``, g being Gumbel noise (Jang et al. 2017, arXiv:1611.01144, equation 2; Maddison et al.
    2017, arXiv:1611.00712).

    Args:
        logits: ``[..., K]``, or with the K classes along another ``dim``, as for :func:`categorical_kl`. A class of
            logit -inf is never drawn, unless ``unimix`` gives it a share.
        dim: the dimension of the classes.
        unimix: as for :func:`categorical_kl`.
        straight_through: whether the sample has a gradient though it is one-hot. With a temperature, False gives the
            relaxed sample itself, which is in between the classes.
        temperature: None, or above 0: of the relaxation. One-hot samples have the same distribution at any.
        generator: where the noise comes from, on the device of ``logits``; the device's default one if None. It is
            PyTorch's own stream: one :func:`torch.rand` in float64 a vector, or with a temperature an exponential
            variate a class, those of :func:`torch.nn.functional.gumbel_softmax`.

    Returns:
        Shape and dtype of ``logits``: along ``dim`` a 1 among zeros; NaN where a logit is NaN.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, range or device; no class along ``dim``.

    Example::

        logits = torch.randn(128, 32, 32, requires_grad=True)
        z = vaefast.sample_categorical(logits, unimix=0.01)
    """
    logits = _logits(logits)
    of = Categorical(logits, None, _dim(logits, dim), _unimix(unimix))
    t, straight = _temperature(temperature), flag("straight_through", straight_through)
    _check_generator(generator, logits)
    return _sample(of, straight, t, generator)


def sample_with_categorical_kl(
    logits: Tensor,
    prior_logits: Tensor | None = None,
    *,
    dim: int = -1,
    unimix: float = 0.0,
    straight_through: bool = True,
    temperature: float | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "batchmean",
    free_bits: float = 0.0,
    free_bits_per: str = "dim",
    balance: float | None = None,
    batch_dims: int = 1,
) -> tuple[Tensor, Tensor]:
    """:func:`sample_categorical` and :func:`categorical_kl` in one pass over ``logits``: the same sample and KL.

    Args:
        logits, prior_logits, dim, unimix: as for :func:`categorical_kl`.
        straight_through, temperature, generator: as for :func:`sample_categorical`.
        reduction, free_bits, free_bits_per, balance, batch_dims: as for :func:`categorical_kl`.

    Returns:
        ``(z, kl)``: z of ``logits``' shape and dtype, kl in nats as reduced (Hafner et al. 2023, arXiv:2301.04104).

    Raises:
        TypeError, ValueError: as these two do.

    Example::

        logits, prior_logits = torch.randn(16, 50, 32, 32), torch.randn(16, 50, 32, 32)
        z, kl = vaefast.sample_with_categorical_kl(logits, prior_logits, unimix=0.01, batch_dims=2)
    """
    asked = _asked(logits, prior_logits, dim, unimix, reduction, free_bits, free_bits_per, balance, batch_dims)
    t, straight = _temperature(temperature), flag("straight_through", straight_through)
    _check_generator(generator, logits)
    if t is None and straight:
        z, kl = _computed(asked, _uniforms(asked.of, generator), reduction)
        return z, kl
    return _sample(asked.of, straight, t, generator), _computed(asked, None, reduction)[0]


@presets.filled_in
def categorical_elbo_terms(
    recon: Recon,
    target: Tensor,
    logits: Tensor,
    prior_logits: Tensor | None = None,
    *,
    likelihood: str | Likelihood = "bernoulli",
    beta: Tensor | Real = 1.0,
    dim: int = -1,
    unimix: float = 0.0,
    reduction: str = "batchmean",
    weight: Tensor | None = None,
    free_bits: float = 0.0,
    free_bits_per: str = "dim",
    balance: float | None = None,
    batch_dims: int = 1,
    preset: str | None = None,
) -> ELBOTerms:
    """The negative ELBO of a model with categorical latents, and its two terms: ``loss = reconstruction + beta * kl``.

    Args:
        recon, target, likelihood, weight: as for :func:`vaefast.reconstruction_loss`, the decoder's output for a sample
            of ``logits`` among them.
        logits, prior_logits, dim, unimix, free_bits, free_bits_per, balance: as for :func:`categorical_kl`.
        beta: the KL's factor, a float or a 0-d tensor.
        reduction: ``"per_sample"``, ``"batchmean"`` or ``"sum"``.
        batch_dims: how many of the first dimensions are the batch, in ``recon`` and in ``logits``.
        preset: a name in ``vaefast.presets.PRESETS`` whose latents are categorical, such as ``"dreamer_v3"``: what is
            not given comes from it, with its factors.

    Returns:
        :class:`vaefast.ELBOTerms` in nats (Kingma & Welling 2014, arXiv:1312.6114, equation 3).

    Raises:
        TypeError, ValueError: what these functions do not take; a preset of Gaussian latents.

    Example::

        logits = torch.randn(128, 2, 10)
        z = vaefast.sample_categorical(logits).flatten(1)
        loss, reconstruction, kl = vaefast.categorical_elbo_terms(decoder(z), x, logits)
    """
    _options.reduction_for_elbo(reduction)
    chosen = None if preset is None else presets.find(preset, "categorical")
    kl = categorical_kl(
        logits, prior_logits, dim=dim, unimix=unimix, reduction=reduction, free_bits=free_bits,
        free_bits_per=free_bits_per, balance=balance, batch_dims=batch_dims,
    )  # fmt: skip
    if chosen is not None and chosen.symlog:
        target = symlog(floating("target", target))
    first = recon if isinstance(recon, Tensor) else _arguments.listed(recon)[0]
    _arguments.elbo(floating("recon", first), logits, beta, reduction, _options.batch_dims(batch_dims))
    nll = reconstruction_loss(
        recon, target, likelihood=likelihood, reduction=reduction, weight=weight, batch_dims=batch_dims
    )
    found = ELBOTerms.of(nll, kl, number(beta) if is_real(beta) else beta)
    if chosen is None:
        return found
    return chosen.weigh(found, target, {"likelihood": likelihood, "beta": beta, "batch_dims": batch_dims})


def symlog(x: Tensor) -> Tensor:
    """``sign(x) log(1 + |x|)``, elementwise: Hafner et al. 2023 (arXiv:2301.04104), equation 9.

    Args:
        x: any shape, a floating dtype.

    Returns:
        The same shape and dtype.

    Raises:
        TypeError: x is no tensor.

    Example::

        target = vaefast.discrete.symlog(torch.tensor([-1000.0, 0.0, 3.0]))
        loss = vaefast.reconstruction_loss(torch.zeros(3), target, likelihood="gaussian")
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    return torch.sign(x) * torch.log1p(x.abs())


# -- samples


def _uniforms(of: Categorical, generator: torch.Generator | None) -> Tensor:
    """One in [0, 1) for each vector."""
    explain_to_compilers(generator)
    shape, device = of.logits.shape, of.logits.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.rand(shape[: of.dim] + shape[of.dim + 1 :], dtype=dtype, device=device, generator=generator)


def _sample(of: Categorical, straight: bool, temperature: float | None, generator: torch.Generator | None) -> Tensor:
    logits, _, dim, unimix = of
    if temperature is None:
        drawn = of if straight else of._replace(logits=logits.detach())
        return _backends.engine(logits).categorical(drawn, _uniforms(of, generator), "none", None, False)[0]
    wide = logits.to(compute_dtype(logits)).movedim(dim, -1)
    return _relaxed(wide, unimix, straight, temperature, generator).movedim(-1, dim).to(logits.dtype)


def _relaxed(
    logits: Tensor, unimix: float, straight: bool, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """With the classes last."""
    explain_to_compilers(generator)
    # as F.gumbel_softmax draws them; a variate of 0, which there is in float32, would be an infinite Gumbel
    exponential = torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_(generator=generator)
    gumbels = -exponential.clamp_(min=torch.finfo(logits.dtype).tiny).log()
    soft = _categorical.relaxed(unimix, logits, gumbels, temperature)
    if not straight:
        return soft
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())


# -- the KL


def _computed(asked: _Asked, uniforms: Tensor | None, reduction: str) -> list[Tensor]:
    """[z][kl], with the options."""
    of, o, narrow = asked
    inner = reduced_for_floors(reduction, o)
    # an engine's batch is one dimension
    own = inner if o.batch_dims == 1 or inner in ("sum", "mean") else "none"
    engine = _backends.engine(of.logits, beside=() if of.prior is None else (of.prior,))
    *sample, kl = engine.categorical(of, uniforms, own, o.balance, True)
    shape = of.logits.shape[: o.batch_dims]
    if o.batch_dims != 1 and own == "none":
        kl = reduced(kl.flatten(0, o.batch_dims - 1), inner, kl.dtype)
    kl = bounded(kl, kl, reduction, o, None)
    if reduction == "none":
        kl = kl.to(narrow)
    apart = o.batch_dims != 1 and reduction in ("none", "per_sample")
    return [*sample, kl.unflatten(0, shape) if apart else kl]


# -- arguments


def _asked(
    logits: object,
    prior_logits: object,
    dim: object,
    unimix: object,
    reduction: str,
    free_bits: float,
    free_bits_per: str,
    balance: object,
    batch_dims: int,
) -> _Asked:
    q, p = _logits(logits), prior_logits
    found, mix = _dim(q, dim), _unimix(unimix)
    choice("reduction", reduction, _options.REDUCTIONS)
    asked: Composed = {"free_bits": free_bits, "free_bits_per": free_bits_per, "batch_dims": batch_dims}
    o = _options.kl_options(reduction, balance, asked)
    if reduction in ("per_sample", "batchmean") or o.batch_dims != 1 or (o.free_bits and o.free_bits_per != "dim"):
        _arguments.batched_dims("logits", q, o.batch_dims)
        behind("dim", found, o.batch_dims)
    if balance is not None and p is None:
        raise ValueError(
            f"balance={balance!r} divides the KL's gradient between the posterior and the prior, but prior_logits is "
            "None; give a prior that is trained, or balance=None"
        )
    if p is not None:
        p = floating("prior_logits", p)
        broadcasts("prior_logits", p, "logits", q.shape)
        same_device("prior_logits", p, "logits", q.device)
        p = p if p.shape == q.shape else p.expand(q.shape)
    return _Asked(Categorical(q, p, found, mix), o, promoted(q, p))


def _logits(value: object) -> Tensor:
    logits = floating("logits", value)
    if logits.is_nested:
        raise TypeError(
            "logits is a jagged tensor; it must be a strided one, padded: see torch.nested.to_padded_tensor"
        )
    if logits.dim() == 0:
        raise ValueError("logits must be [..., K], got a 0-d tensor: the K classes lie along a dimension")
    return logits


def _dim(logits: Tensor, dim: object) -> int:
    """Counted from the front."""
    if not is_whole(dim):
        raise TypeError(f"dim must be an int, got {dim!r}")
    dim = operator.index(dim)
    if not -logits.dim() <= dim < logits.dim():
        raise ValueError(
            f"dim={dim} is no dimension of logits, whose shape is {tuple(logits.shape)}; it takes the one along which "
            "the classes lie"
        )
    if logits.shape[dim] == 0:
        raise ValueError(f"logits of shape {tuple(logits.shape)} has no class along dim={dim}; it takes at least one")
    return dim % logits.dim()


def _unimix(value: object) -> float:
    if not is_real(value):
        raise TypeError(f"unimix must be a number from 0 to 1, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"unimix must be from 0 (the softmax) to 1 (the uniform distribution), got {value!r}")
    return float(value)


def _temperature(value: object) -> float | None:
    if value is None:
        return None
    if not is_real(value):
        raise TypeError(f"temperature must be None or a number above 0, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, got {value!r}")
    return float(value)


def _check_generator(generator: object, logits: Tensor) -> None:
    if generator is not None:
        _arguments.noise(None, None, generator, logits, None)
