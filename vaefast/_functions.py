"""The public functions, once for any choice of engines: ``vaefast`` binds them to the choice of ``_backends``,
``vaefast.reference`` to the PyTorch engine.

Everything is in nats. ``B`` is the batch, dimension 0; ``[B, ...]`` is any shape that starts with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from . import _arguments, _compose, _options, distributed, presets
from ._checks import Real, batched, choice, is_real, number, wrapped
from ._engine import Declined, Pair, Reconstruction
from ._gaussian import Prior
from ._options import Composed, ELBOTerms, KLOptions, Likelihood, Parameterization, composed, spelled_out
from ._posterior_functions import PosteriorFunctions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

Recon = Tensor | Sequence[Tensor]
Self = TypeVar("Self")
P = ParamSpec("P")
R = TypeVar("R")


def _with_arguments_of(
    stated: Callable[Concatenate[Self, bool, P], object],
) -> Callable[[Callable[..., R]], Callable[Concatenate[Self, P], R]]:
    """For a method that hands its arguments on to ``stated``, whose first it gives itself."""
    parameters = list(inspect.signature(stated).parameters.values())
    signature = inspect.Signature([parameters[0], *parameters[2:]])

    def decorate(f: Callable[..., R]) -> Callable[Concatenate[Self, P], R]:
        f.__signature__ = signature  # type: ignore[attr-defined]
        return f

    return decorate


class Functions(PosteriorFunctions):
    """All of them: besides those of posteriors, the reconstruction's and the ELBO's."""

    def reconstruction_loss(
        self, recon: Recon, target: Tensor, *, likelihood: str | Likelihood = "bernoulli", reduction: str = "batchmean",
        weight: Tensor | None = None, overwrite_recon: bool = False, batch_dims: int = 1,
    ) -> Tensor:  # fmt: skip
        """The negative log-likelihood -log p(target | recon) in nats, loss and gradient in one pass.

        Args:
            recon: the likelihood's parameters, a tensor or a tuple. The first is ``[B, ...]``; the others broadcast to
                it.

                - ``"bernoulli"`` logits; ``"bernoulli_probs"`` probabilities (``F.binary_cross_entropy``'s clamps);
                  ``"continuous_bernoulli"`` logits (Loaiza-Ganem & Cunningham 2019, equation 6).
                - ``"gaussian"`` mean or (mean, logvar); ``"laplace"`` loc or (loc, log_scale); a scale that is not
                  given is 1. ``"student_t"`` (loc, log_scale, df). ``"gaussian_optimal"`` mean, at the variance that
                  fits the data best (Rybkin et al. 2021, equation 4).
                - ``"log_normal"`` (loc, log_scale) of log x, for data above 0.
                - ``"gamma"`` (log_mean, concentration), for data above 0: shape a > 0 and rate a e^-log_mean.
                - ``"poisson"`` log_rate; ``"negative_binomial"`` (mu, theta), mean and inverse dispersion;
                  ``"zero_inflated_negative_binomial"`` (mu, theta, pi_logits) (Lopez et al. 2018, as scvi-tools has
                  them); ``"negative_binomial_mixture"`` (mu1, mu2, theta1, mixture_logits), of the first with
                  probability sigmoid(mixture_logits) (totalVI's); ``"beta_binomial"`` (alpha, beta, total_count),
                  scipy's ``betabinom(n, a, b)`` and scvi-tools' alpha and beta. A negative count gives
                  NaN; one that is not whole goes through the gamma function.
                - ``"zero_inflated_log_normal"`` (loc, log_scale, pi_logits) and ``"zero_inflated_gamma"`` (log_mean,
                  concentration, pi_logits): 0 with probability sigmoid(pi_logits), else these.
                - Data outside [0, 1] give NaN under ``"bernoulli_probs"`` and ``"continuous_bernoulli"``, as what they
                  replace refuses them; :func:`vaefast.check` names what lies outside a domain.
                - ``"discretized_logistic"`` (mean, log_scale) of data on a grid, -1 to 1 in 256 steps unless
                  :class:`Likelihood` says else (Salimans et al. 2017, equation 2).
                - Mixtures, whose recon is one tensor of planes along dimension 1, or another ``dim`` of
                  :class:`Likelihood`: ``"categorical"`` logits ``[B, K, ...]`` with the classes ``[B, ...]`` as target,
                  whole numbers of any dtype (NaN for one that there is not). ``"discretized_logistic_mixture"``
                  ``[B, K (1 + 9), ...]`` with target ``[B, 3, ...]``, laid out as in PixelCNN++ and VDVAE: K logits,
                  then for each channel K means, K log scales and K couplings to the channels before it; with
                  ``channels=1`` ``[B, K (1 + 2), ...]`` and ``[B, 1, ...]`` (Salimans et al. 2017, section 2.2). Their
                  loss has an element for each pixel, ``[B, ...]``.

                Normalising constants (log 2 pi, log x!) are included.
            target: the data, the first parameter's shape but for mixtures; any floating dtype, and for classes any.
            likelihood: one of ``vaefast.LIKELIHOODS``, or a :class:`Likelihood` where its options are to be others.
            reduction: as for :func:`gaussian_kl`; ``"mean"`` divides by the number of elements, weighted or not.
            weight: broadcasts to the elementwise loss and multiplies it. Where it is 0 the element is not evaluated, so
                a NaN there reaches neither loss nor gradient. A bool tensor is a mask.
            overwrite_recon: permission to write the gradient over ``recon``, which saves a buffer of its size and the
                time to make it. Nothing may read ``recon`` after the call, a second call of this function neither. What
                autograd was to read of it, such as the result that a sigmoid keeps, raises in backward, by ``recon``'s
                version counter; so does ``create_graph``. Not made use of under torch.compile, by the reference, where
                no gradient is kept (float16, ``reduction="none"``), for leaves and their views, for a parameter that is
                broadcast or shares memory with another argument, and for mixtures of logistics.
            batch_dims: how many of the first dimensions are the batch, as for :func:`gaussian_kl`; a mixture's ``dim``
                lies behind them.

        Returns:
            The nll: float32 when reduced (float64 where an input is); ``"none"`` keeps the promoted dtype.

        Raises:
            TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name.

        Example::

            nll = vaefast.reconstruction_loss(logits, x)
            nll = vaefast.reconstruction_loss((mean, log_var_x), x, likelihood="gaussian")
        """
        chosen = _options.likelihood(likelihood)
        if isinstance(target, Tensor) and not target.is_floating_point():
            target = _arguments.indices(target, chosen)
        if not isinstance(recon, (Tensor, tuple, list)):
            recon = _arguments.listed(recon)
        first = recon[0] if isinstance(recon, (tuple, list)) and recon else recon
        direct = self.engines.direct(first) if batch_dims == 1 and reduction != _options.PER_DRAW else None
        params = None if direct is None else direct.parameters(recon, target, weight, chosen)
        if direct is not None and params is not None:
            try:
                return direct.reconstruction(params, target, weight, chosen, overwrite_recon, reduction)
            except Declined:
                pass
            except Exception:
                self._reconstruction(recon, target, weight, chosen, overwrite_recon, reduction)
                if not any(map(wrapped, (*params, target, weight))):
                    raise
        of = self._reconstruction(recon, target, weight, chosen, overwrite_recon, reduction)
        dims = _options.batch_dims(batch_dims)
        if dims != 1:
            _arguments.batched_dims("recon", of.params[0], dims)
        return _compose.nll(_compose.engine_of(self.engines, of), of, reduction, dims)

    def _reconstruction(
        self, recon: Recon, target: Tensor, weight: Tensor | None, chosen: Likelihood, overwrite: bool, reduction: str
    ) -> Reconstruction:
        of = _arguments.reconstruction(recon, target, weight, chosen, overwrite)
        choice("reduction", reduction, _options.REDUCTIONS)
        batched("recon", of.params[0], reduction)
        return of

    @spelled_out
    def _elbo(
        self, loss_alone: bool, recon: Recon, target: Tensor, mu: Tensor, logvar: Tensor, prior_mu: Prior = None,
        prior_logvar: Prior = None, *, likelihood: str | Likelihood = "bernoulli", beta: Tensor | Real = 1.0,
        parameterization: str | Parameterization = "logvar", reduction: str = "batchmean", weight: Tensor | None = None,
        balance: float | None = None, preset: str | None = None, process_group: ProcessGroup | str | None = None,
        overwrite_recon: bool = False, **options: Unpack[Composed],
    ) -> Any:  # fmt: skip
        """The loss or, if it is not to be alone, perhaps the three terms."""
        chosen = _options.likelihood(likelihood)
        if isinstance(target, Tensor) and not target.is_floating_point():
            target = _arguments.indices(target, chosen)
        if not isinstance(recon, (Tensor, tuple, list)):
            recon = _arguments.listed(recon)
        if type(beta) is not float and not isinstance(beta, Tensor) and is_real(beta):
            beta = number(beta)
        tensors = recon, target, mu, logvar, prior_mu, prior_logvar
        p = _options.parameterization(parameterization)
        plain = process_group is None and p.soft_clamp is None and options.get("batch_dims", 1) == 1
        direct = self.engines.direct(mu) if plain else None
        params = None if direct is None else direct.parameters(recon, target, weight, chosen)
        if direct is not None and params is not None:
            try:
                if (type(beta) is float or type(beta) is int) and not (options and composed(options)):
                    if balance is not None:
                        balance = _options.kl_balance(balance, prior_mu, prior_logvar)
                    return direct.fused_elbo(
                        loss_alone, params, target, weight, chosen, overwrite_recon,
                        mu, logvar, prior_mu, prior_logvar, p, beta, reduction, balance,
                    )  # fmt: skip
                of = Reconstruction(params, target, weight, chosen, overwrite_recon)
                pair = Pair(mu, logvar, prior_mu, prior_logvar, p)
                factor = _arguments.elbo(params[0], mu, beta, reduction)
                pair, o = _arguments.with_options(pair, reduction, balance, options)
                terms = _compose.elbo_of_terms(direct, direct, of, pair, factor, reduction, o)
                return terms.loss if loss_alone else terms
            except Declined:
                pass
            except Exception:
                self._groups(*tensors, chosen, beta, p, reduction, weight, balance, overwrite_recon, options)
                if not any(map(wrapped, (*params, weight, *tensors))):
                    raise
        if process_group is not None:
            _options.reduction_for_elbo(reduction)
            distributed.check(process_group, reduction, chosen)
        of, pair, factor, o = self._groups(
            *tensors, chosen, beta, p, reduction, weight, balance, overwrite_recon, options
        )  # fmt: skip
        mean = None if process_group is None else distributed.GlobalMean(process_group, mu, o.batch_dims)
        terms = _compose.elbo(self.engines, of, pair, factor, reduction, o, mean)
        return terms.loss if loss_alone else terms

    def _groups(
        self, recon: Recon, target: Tensor, mu: Tensor, logvar: Tensor, prior_mu: Prior, prior_logvar: Prior,
        chosen: Likelihood, beta: Tensor | Real, parameterization: str | Parameterization, reduction: str,
        weight: Tensor | None, balance: float | None, overwrite: bool, options: Composed,
    ) -> tuple[Reconstruction, Pair, Tensor | float, KLOptions]:  # fmt: skip
        of = _arguments.reconstruction(recon, target, weight, chosen, overwrite)
        pair, o = _arguments.kl(mu, logvar, prior_mu, prior_logvar, parameterization, reduction, balance, options)
        return of, pair, _arguments.elbo(of.params[0], pair.mu, beta, reduction, o.batch_dims), o

    @_with_arguments_of(_elbo)
    def elbo_terms(self, *args: Any, **options: Any) -> ELBOTerms:
        """The negative ELBO and its two terms: ``loss = -E_q[log p(x|z)] + beta * KL(q || p)``, each differentiable.

        Kingma & Welling 2014, equation 3 with one sample; beta as in Higgins et al. 2017.

        Args:
            recon, target, likelihood, weight, overwrite_recon: as for :func:`reconstruction_loss`.
            mu, logvar, prior_mu, prior_logvar, parameterization: as for :func:`gaussian_kl`.
            beta: the KL's factor, a float or, for a schedule that compiles once, a 0-d tensor.
            reduction: ``"per_sample"``, ``"batchmean"`` or ``"sum"``. ``"mean"`` is refused: a mean over elements would
                weigh the two terms by their sizes.
            free_bits, free_bits_per, balance, capacity, symmetric, prior_parameterization: the KL's options, as for
                :func:`gaussian_kl`; ``kl`` is the term with them. With ``capacity``, beta is the gamma of Burgess et
                al. 2018.
            kl_weight: the ``weight`` of :func:`gaussian_kl`.
            batch_dims: as for :func:`gaussian_kl`, of the data too: ``[B, T, ...]`` goes with latents ``[B, T, D]``.
            prior: as for :func:`gaussian_kl`, at a sample drawn for the KL. At the sample that was decoded it is
                ``sample_with_kl``'s, to be added to :func:`reconstruction_loss`.
            preset: None, or a name in ``vaefast.presets.PRESETS``: the convention of another project, its arguments and
                its factors on the terms. An argument that is given wins over the preset's, also where it is the default
                here: ``beta=1.0``.
            process_group: None, or the ranks over which DDP or FSDP averages gradients: a
                ``torch.distributed.ProcessGroup``, or ``"world"``. ``"batchmean"``, the one reduction that it takes, is
                then ``N / B`` times the sum over this rank's samples, with N ranks and B samples on all of them: its
                mean over the ranks, and so the gradients', is that of one process with the whole batch, also where
                local batches differ or are empty. Every rank must make the call: it takes one all-reduce of 8 bytes.
                ``capacity`` and ``free_bits_per="batch_dim"`` go by means over the global batch, which takes one more,
                of that many numbers. See :mod:`vaefast.distributed`.

        Returns:
            ``ELBOTerms(loss, reconstruction, kl)``, a NamedTuple, in nats.

        Raises:
            TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name.

        Example::

            terms = vaefast.elbo_terms(decoder(z), x, mu, logvar)
            terms.loss.backward(); print(terms.kl.item())
        """
        if options.get("preset") is not None:
            return self._preset(args, options)
        return ELBOTerms(*self._elbo(False, *args, **options))

    @_with_arguments_of(_elbo)
    def elbo_loss(self, *args: Any, **options: Any) -> Tensor:
        """The negative ELBO in nats, to be minimised: :func:`elbo_terms` without the parts.

        Example::

            loss = vaefast.elbo_loss(decoder(z), x, mu, logvar)
            loss.backward()

        Arguments, shapes, dtypes and errors are those of :func:`elbo_terms`.
        """
        if options.get("preset") is not None:
            return self._preset(args, options).loss
        loss: Tensor = self._elbo(True, *args, **options)
        return loss

    def _preset(self, args: Sequence[Any], options: dict[str, Any]) -> ELBOTerms:
        preset = presets.find(options["preset"])
        filled = preset.filled({name: value for name, value in options.items() if name != "preset"})
        terms = self.elbo_terms(*args, **filled)
        return preset.weigh(terms, args[1] if len(args) > 1 else filled["target"], filled)
