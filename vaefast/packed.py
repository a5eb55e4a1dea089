"""A diagonal Gaussian in one tensor, as an autoencoder's encoder returns it: mean and log variance side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _arguments, _backends, _compose, _options
from ._checks import choice, flag, like, same_device, same_shape
from ._engine import Moments
from ._gaussian import clamped, compute_dtype, reduced, wide
from ._generators import Generators, each_its_own
from ._options import REDUCTIONS, Parameterization
from .functional import reconstruction_loss

_DIFFUSERS = Parameterization("logvar", clamp=(-30.0, 20.0))


class DiagonalGaussian:
    """q = N(mean, e^logvar) from one tensor of moments: the ``DiagonalGaussianDistribution`` of diffusers, fused.

    ``mean, logvar = moments.chunk(2, dim)``, and logvar is clamped, with no gradient outside and on the edges. Samples
    and KLs are one pass over ``moments``, which with 16 bytes is all that is kept for backward; backward writes one
    gradient laid out like ``moments``. Nothing is copied to chunk them or to put the halves' gradients together.

    Args:
        moments: ``[B, 2C, ...]``, float16, bfloat16, float32 or float64, CPU or CUDA, any strides.
        dim: the dimension whose first half is the mean and whose second is the log variance.
        clamp: ``(lo, hi)`` for the log variance, or None.
        deterministic: a point mass at the mean: ``std``, ``var``, ``kl`` and ``nll`` are 0 and samples the mean.

    Attributes:
        parameters: ``moments``.
        mean: ``[B, C, ...]``, dtype of ``moments``, a view. These four are differentiable, by PyTorch's operators.
        logvar: as mean, clamped; as the next two, computed each time.
        std: as mean.
        var: as mean.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype or range, or an odd size along ``dim``.

    Kingma & Welling 2014 (arXiv:1312.6114); Rombach et al. 2022 (arXiv:2112.10752), whose code clamps like this.

    Example::

        posterior = vaefast.DiagonalGaussian(encoder(x))
        z, kl = posterior.sample_with_kl()
    """

    def __init__(
        self,
        moments: Tensor,
        dim: int = 1,
        clamp: tuple[float, float] | None = (-30.0, 20.0),
        *,
        deterministic: bool = False,
    ) -> None:
        self.parameters, self.dim = _arguments.packed(moments, dim)
        self.deterministic = flag("deterministic", deterministic)
        default = clamp == _DIFFUSERS.clamp
        self._parameterization = _DIFFUSERS if default else Parameterization("logvar", clamp=clamp)

    @property
    def mean(self) -> Tensor:
        return self.parameters.narrow(self.dim, 0, self.parameters.shape[self.dim] // 2)

    @property
    def logvar(self) -> Tensor:
        half = self.parameters.shape[self.dim] // 2
        return clamped(self.parameters.narrow(self.dim, half, half), *self._parameterization.spec[1:3])

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def sample(self, generator: Generators = None) -> Tensor:
        """Draws ``z = mean + std * eps``, eps ~ N(0, I), differentiably.

        Args:
            generator: where the seed comes from, on any device; the default generator of the moments' device if None.
                A list has one for each of B samples, which is drawn as if it were alone in its batch.

        Returns:
            ``[B, C, ...]``, dtype of ``moments``.

        Raises:
            TypeError, ValueError: a generator that is none; a list of another length than the batch.

        Example::

            z = vaefast.DiagonalGaussian(encoder(x)).sample()
            x_again = decoder(z)
        """
        if self.deterministic:
            return self.mean
        return self._posterior(None, generator, "none", sample=True, kl=False)[0]

    def mode(self) -> Tensor:
        """The mean, ``[B, C, ...]``, as a view of ``moments``.

        Example::

            z = vaefast.DiagonalGaussian(encoder(x)).mode()
            x_again = decoder(z)
        """
        return self.mean

    def kl(
        self, other: DiagonalGaussian | None = None, *, reduction: str = "per_sample", batch_dims: int = 1
    ) -> Tensor:
        """KL(q || other) in nats, without cancellation as in :func:`vaefast.gaussian_kl`.

        Args:
            other: None is N(0, I); else a Gaussian of the same shape and ``dim``, trained too. Its own clamp holds for
                its log variance: where it has one, that half is clamped in a tensor of its own during the call.
            reduction: as for :func:`vaefast.gaussian_kl`; ``"per_sample"``, ``[B]``, sums over all but dimension 0.
            batch_dims: how many of the first dimensions are the batch, as for :func:`vaefast.gaussian_kl`; ``dim`` lies
                behind them.

        Returns:
            The KL: float32 when reduced (float64 where an input is), 0 where this Gaussian is deterministic.

        Raises:
            TypeError, ValueError: ``other`` is something else, or of another shape, dim or device; it is deterministic,
                so that the KL is infinite; an unknown reduction.

        Kingma & Welling 2014, appendix B: ``(mean^2 + var - 1 - logvar) / 2`` summed, for N(0, I).

        Example::

            kl = vaefast.DiagonalGaussian(moments).kl().mean()
            between = vaefast.DiagonalGaussian(moments).kl(vaefast.DiagonalGaussian(prior_moments))
        """
        choice("reduction", reduction, REDUCTIONS)
        if other is not None:
            self._check_prior(other)
        dims = self._batch_dims(batch_dims)
        if self.deterministic:
            return self._zero(reduction, dims)
        return self._posterior(other, None, reduction, dims, sample=False, kl=True)[0]

    def sample_with_kl(
        self,
        other: DiagonalGaussian | None = None,
        *,
        generator: Generators = None,
        reduction: str = "per_sample",
        batch_dims: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`sample` and :meth:`kl` in one pass over ``moments``, and one backward.

        Args:
            other, reduction, batch_dims: as for :meth:`kl`.
            generator: as for :meth:`sample`.

        Returns:
            ``(z, kl)``: ``[B, C, ...]`` in the dtype of ``moments``, and the KL in nats as reduced.

        Raises:
            TypeError, ValueError: as :meth:`sample` and :meth:`kl`.

        Example::

            z, kl = vaefast.DiagonalGaussian(encoder(x)).sample_with_kl()
            loss = ((decoder(z) - x) ** 2).sum() / len(x) + 1e-6 * kl.mean()
        """
        choice("reduction", reduction, REDUCTIONS)
        if other is not None:
            self._check_prior(other)
        dims = self._batch_dims(batch_dims)
        if self.deterministic:
            return self.mean, self._zero(reduction, dims)
        z, kl = self._posterior(other, generator, reduction, dims, sample=True, kl=True)
        return z, kl

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """-log q(sample) in nats, by :func:`vaefast.reconstruction_loss`.

        Args:
            sample: ``[B, C, ...]``, the shape of ``mean``.
            dims: what to sum over; all but dimension 0 if None, which for images is diffusers' ``[1, 2, 3]``.

        Returns:
            ``(log 2 pi + logvar + (sample - mean)^2 / var) / 2``, summed: float32 (float64 where an input is); 0 where
            this Gaussian is deterministic. Its gradient reaches ``moments`` through views of them, by PyTorch's own
            operators.

        Raises:
            TypeError, ValueError: ``sample`` is not a floating tensor of the mean's shape and device.

        Example::

            posterior = vaefast.DiagonalGaussian(moments)
            log_density = -posterior.nll(posterior.sample())
        """
        mean = self.mean
        sample = like("sample", sample, "mean", mean)
        if self.deterministic:
            return self._zero("per_sample") if dims is None else wide(self._zero("none")).sum(tuple(dims))
        if dims is None:
            return reconstruction_loss((mean, self.logvar), sample, likelihood="gaussian", reduction="per_sample")
        # elements that are yet to be added up come in float32
        recon = wide(mean), self.logvar
        return reconstruction_loss(recon, sample, likelihood="gaussian", reduction="none").sum(tuple(dims))

    def _posterior(
        self,
        other: DiagonalGaussian | None,
        generator: Generators,
        reduction: str,
        batch_dims: int = 1,
        *,
        sample: bool,
        kl: bool,
    ) -> list[Tensor]:
        if generator is not None:
            _arguments.generators(generator, self.parameters, None if self.dim == 0 else 0)
        prior = None if other is None else (other.parameters, other._parameterization)
        of = Moments(self.parameters, self.dim, self._parameterization, prior)
        engine = _backends.engine(self.parameters, beside=() if other is None else (other.parameters,))
        if isinstance(generator, Sequence):

            def draw(moments: Tensor, own: torch.Generator | None) -> Tensor:
                return engine.packed(of._replace(moments=moments, prior=None), "none", own, True, False)[0]

            z = each_its_own(draw, (self.parameters,), generator)
            return [z, *(_compose.packed(engine, of, reduction, batch_dims, None, False, True) if kl else ())]
        return _compose.packed(engine, of, reduction, batch_dims, generator, sample, kl)

    def _check_prior(self, other: object) -> None:
        if not isinstance(other, DiagonalGaussian):
            raise TypeError(f"other must be None or a DiagonalGaussian, got {type(other).__name__}")
        if other.deterministic:
            raise ValueError("other is deterministic: its variance is 0 and the KL infinite; make it without the flag")
        if other.dim != self.dim:
            raise ValueError(f"other is packed along dim={other.dim} but this one along {self.dim}; they must be equal")
        same_shape("other.parameters", other.parameters, "parameters", self.parameters.shape)
        same_device("other.parameters", other.parameters, "parameters", self.parameters.device)

    def _batch_dims(self, value: object) -> int:
        dims = _options.batch_dims(value)
        if dims != 1:
            _arguments.batched_dims("moments", self.parameters, dims)
        return dims

    def _zero(self, reduction: str, batch_dims: int = 1) -> Tensor:
        mean = self.mean
        zero = torch.zeros_like(mean, dtype=compute_dtype(mean))
        if reduction == "per_sample":
            return zero.flatten(batch_dims).sum(-1) if zero.dim() > batch_dims else zero
        return reduced(zero, reduction, mean.dtype)
