"""The public functions of posteriors, over any choice of engines; see :mod:`vaefast._functions`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _arguments, _compose, _options
from ._checks import batch, wrapped
from ._engine import Declined, Engine, Engines, Pair, Posteriors
from ._gaussian import Prior, compute_dtype, wide
from ._generators import Generators
from ._options import Composed, Parameterization, composed, spelled_out

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PosteriorFunctions:
    """Each goes the short way, where the engines have one for the call; or its arguments are checked and composed.

    The short way is decided on before it is taken: a call enters the extension once. Where that refuses it, the checks
    say why, in words for people; or it is a tensor behind the first that kernels do not see through.
    """

    def __init__(self, engines: Engines, module: str) -> None:
        self.engines = engines
        self.__module__ = module

    def __reduce__(self) -> str:
        # the name in that module: a function that is pickled or copied is found again
        return "_functions"

    def reparameterize(
        self, mu: Tensor, logvar: Tensor, *, parameterization: str | Parameterization = "logvar",
        eps: Tensor | None = None, generator: Generators = None, noise: str | None = None,
        num_samples: int | None = None, temperature: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Draws ``z = mu + std * eps``, eps ~ N(0, I), differentiably in both arguments.

        Kingma & Welling 2014 (arXiv:1312.6114), section 2.4.

        Args:
            mu: ``[B, ...]``, float16, bfloat16, float32 or float64, CPU or CUDA, any strides.
            logvar: the same shape; what it means is told by ``parameterization``.
            parameterization: ``"logvar"``, ``"log_std"``, ``"std"``, ``"var"``, ``"softplus"`` or a
                :class:`Parameterization`.
            eps: the noise to use, broadcasting to ``mu``; drawn if None.
            generator: where the seed comes from; the default generator of ``mu``'s device if None. A list has one for
                each of B samples, which is drawn as if it were alone in its batch; it is cut up for that, one kernel a
                sample.
            noise: ``"philox"`` draws from (seed, offset, element index) inside the kernel, so that only 16 bytes are
                kept for backward; ``"torch"`` draws :func:`torch.randn`'s own stream and keeps it. None is ``"philox"``
                where kernels run and ``"torch"`` where none does: there are none for the device, ``use_backend`` asked
                for the reference, a transform of ``torch.func`` or forward-mode AD is active. ``"philox"`` is then
                computed in PyTorch, the same numbers in many operations.
            num_samples: K for K independent draws in one call, whose gradients add up. What is kept for backward does
                not grow with K; ``eps`` then broadcasts to ``[K, B, ...]``.
            temperature: multiplies the standard deviation, at least 0: below 1 for samples nearer to the mean (Vahdat &
                Kautz 2020, arXiv:2007.03898, section 4).

        Returns:
            ``z``, shape and dtype of ``mu``; ``[K, B, ...]`` with ``num_samples=K``.

        Raises:
            TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name.

        Example::

            mu, logvar = encoder(x).chunk(2, dim=1)
            z = vaefast.reparameterize(mu, logvar)
        """
        dim = 0
        if num_samples is not None:
            mu, logvar, dim = *_arguments.samples(mu, logvar, num_samples), 1
        p = _options.parameterization(parameterization)
        t = temperature if temperature == 1 else _options.temperature(temperature)
        if eps is None and generator is None and p.soft_clamp is None and t == 1:
            direct = self.engines.direct(mu)
            if direct is not None and (noise is None or noise == direct.noise):
                try:
                    return direct.posterior(mu, logvar, None, None, p, "none", None, None, None, True, False)[0]
                except Declined:
                    pass
                except Exception:
                    _arguments.posterior(mu, logvar)
                    if not wrapped(logvar):
                        raise
        mu, logvar = _arguments.posterior(mu, logvar)
        eps = _arguments.noise(noise, eps, generator, mu, dim)
        mu, logvar, p = _arguments.soft(mu, logvar, p)
        if t != 1:
            return _compose.tempered(self.engines, mu, logvar, p, t, eps, generator, noise, dim)
        return _compose.sample(self.engines, mu, logvar, p, eps, generator, noise, dim)

    @functools.partial(spelled_out, kl_weight="weight")
    def gaussian_kl(
        self, mu: Tensor, logvar: Tensor, prior_mu: Prior = None, prior_logvar: Prior = None, *,
        parameterization: str | Parameterization = "logvar", reduction: str = "batchmean", balance: float | None = None,
        weight: Tensor | None = None, **options: Unpack[Composed],
    ) -> Tensor:  # fmt: skip
        """KL(q || p) in nats between diagonal Gaussians q = N(mu, std^2) and p = N(prior_mu, e^prior_logvar).

        Kingma & Welling 2014, appendix B, rearranged so that nothing cancels: with h(x) = e^x - 1 - x,
        ``KL(q || N(0, I)) = (mu^2 + h(lv)) / 2`` and ``KL(q || p) = (h(lvq - lvp) + (muq - mup)^2 e^-lvp) / 2``.
        It keeps its relative accuracy next to the prior and is never negative.

        Args:
            mu, logvar: ``[B, ...]``, the same shape; floating dtypes may differ.
            prior_mu, prior_logvar: None is 0; else a float, or a tensor that broadcasts to ``mu``. Trained if they
                require grad.
            parameterization: what ``logvar`` means; see :class:`Parameterization`.
            reduction: ``"none"`` elementwise, ``"per_sample"`` ``[B]``, ``"batchmean"`` its mean over B, ``"sum"``, or
                ``"mean"`` over every element.
            free_bits: a floor in nats, below and at which there is no gradient; 0 is off.
            free_bits_per: under what the floor is. ``"dim"``: each element, ``max(free_bits, kl[b, d])``. ``"sample"``:
                ``max(free_bits, sum_d kl[b, d])`` (Hafner et al. 2023, arXiv:2301.04104), for ``"per_sample"``,
                ``"batchmean"`` and ``"sum"``. ``"batch_dim"``: ``sum_d max(free_bits, mean_b kl[b, d])`` (Kingma et al.
                2016, arXiv:1606.04934, equation 15), for ``"batchmean"``, and B times it for ``"sum"``.
            balance: alpha in [0, 1] for ``alpha KL(sg(q) || p) + (1 - alpha) KL(q || sg(p))``, sg being detach (Hafner
                et al. 2021, arXiv:2010.02193, algorithm 2): the value is the KL, the prior's gradient is times alpha
                and the posterior's times 1 - alpha. At least one of the priors must be a tensor.
            capacity: C in nats, a float or, for a schedule that compiles once, a 0-d tensor, for ``|KL - C|`` (Burgess
                et al. 2018, arXiv:1804.03599, equation 8): of each sample's KL for ``"per_sample"``, of the batch's
                mean for ``"batchmean"``, and B times that for ``"sum"``. No gradient where KL = C. Not together with
                ``free_bits``.
            symmetric: KL(q || p) + KL(p || q) instead (Jeffreys 1946), in the dtype and with the options of the KL.
            prior_parameterization: what ``prior_logvar`` means, as ``parameterization`` says of ``logvar``; None is a
                standard deviation of 1 whatever it is. A half's is computed in float32, and counts as that.
            weight: broadcasts to the elementwise KL and multiplies it, before free bits or the capacity; a bool tensor
                is a mask, as of padded sequences. What it hides, where it is 0, may be NaN in every argument, and
                reaches neither the KL nor a gradient. ``"mean"`` and ``"batchmean"`` divide as if there were none.
            batch_dims: how many of the first dimensions are the batch: 2 for sequences ``[B, T, D]`` or samples
                ``[K, B, D]``. ``"per_sample"`` is then ``[B, T]``, ``"batchmean"`` the mean over both, and what free
                bits and the capacity call a sample is one step.
            prior: an object of :mod:`vaefast.priors`, or another with ``log_prob(z)`` of z ``[..., D]``, in the place
                of prior_mu and prior_logvar. Its KL has no closed form: it is log q(z) - log p(z) at a sample drawn for
                it, an estimate without bias that can be negative, with one value for each sample along the last
                dimension. For ``"per_sample"``, ``"batchmean"`` and ``"sum"``; not with ``balance``, ``symmetric`` or
                free bits of dimensions, and with weights of whole samples, of size 1 along the last dimension.

        Returns:
            The KL. A reduced result is float32 (float64 where an input is); ``"none"`` keeps the promoted input dtype.

        Raises:
            TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name.

        Example::

            loss = nll + 0.5 * vaefast.gaussian_kl(mu, logvar)
            kl = vaefast.gaussian_kl(mu, logvar, prior_mu, prior_logvar, free_bits=0.1, balance=0.8)
        """
        given = mu, logvar, prior_mu, prior_logvar
        p = _options.parameterization(parameterization)
        if weight is not None:
            options["kl_weight"] = weight
        plain = p.soft_clamp is None and options.get("batch_dims", 1) == 1
        direct = self.engines.direct(mu) if plain else None
        if direct is not None:
            try:
                if not options or not composed(options):
                    if balance is not None:
                        balance = _options.kl_balance(balance, prior_mu, prior_logvar)
                    return direct.posterior(*given, p, reduction, balance, None, None, False, True)[0]
                pair, o = _arguments.with_options(Pair(*given, p), reduction, balance, options)
                return _compose.kl(direct, pair, reduction, o)
            except Declined:
                pass
            except Exception:
                _arguments.kl(*given, p, reduction, balance, options)
                if not any(map(wrapped, given)):
                    raise
        pair, o = _arguments.kl(*given, p, reduction, balance, options)
        return _compose.kl(self.engines.engine(mu, beside=pair[1:4]), pair, reduction, o)

    def kl_per_dim(
        self, mu: Tensor, logvar: Tensor, prior_mu: Prior = None, prior_logvar: Prior = None, *,
        parameterization: str | Parameterization = "logvar", prior_parameterization: str | Parameterization = "logvar",
    ) -> Tensor:  # fmt: skip
        """The batch's mean of the KL of each latent dimension: which are used, and which have collapsed to the prior.

        Args:
            mu, logvar, prior_mu, prior_logvar, parameterization, prior_parameterization: as for :func:`gaussian_kl`.

        Returns:
            ``mean_b kl[b, ...]`` in nats, mu's shape without B; float32 (float64 where an input is). It sums to the
            ``"batchmean"`` KL (the terms of Kingma & Welling 2014, appendix B), and is differentiable.

        Raises:
            TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name.

        Example::

            active = vaefast.kl_per_dim(mu, logvar) > 0.01
            print(int(active.sum()), "active units")
        """
        mu = wide(batch("mu", mu))
        kl = self.gaussian_kl(
            mu, logvar, prior_mu, prior_logvar, parameterization=parameterization, reduction="none",
            prior_parameterization=prior_parameterization,
        )  # fmt: skip
        return kl.mean(0)

    @spelled_out
    def sample_with_kl(
        self, mu: Tensor, logvar: Tensor, prior_mu: Prior = None, prior_logvar: Prior = None, *,
        parameterization: str | Parameterization = "logvar", reduction: str = "batchmean", eps: Tensor | None = None,
        generator: Generators = None, noise: str | None = None, num_samples: int | None = None,
        balance: float | None = None, estimator: str = "analytic", temperature: float = 1.0,
        **options: Unpack[Composed],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """:func:`reparameterize` and :func:`gaussian_kl` in one pass over ``mu`` and ``logvar``.

        Backward regenerates the noise: what is kept is the inputs and 16 bytes.

        Args:
            mu, logvar, prior_mu, prior_logvar, parameterization, reduction: as for :func:`gaussian_kl`.
            eps, generator, noise: as for :func:`reparameterize`.
            free_bits, free_bits_per, balance, capacity, symmetric, prior_parameterization: as for :func:`gaussian_kl`.
            kl_weight: the ``weight`` of :func:`gaussian_kl`. The sample is the same with it.
            batch_dims: as for :func:`gaussian_kl`.
            prior: as for :func:`gaussian_kl`, estimated at the sample that is returned.
            num_samples: K for K draws, as for :func:`reparameterize`. The KL itself is the one that they share, in a
                pass of its own; an estimate is that of ``[K, B, ...]`` with a dimension of the batch more, so that
                ``"per_sample"`` gives ``[K, B]`` and ``"batchmean"`` the mean over the draws too.
            temperature: as for :func:`reparameterize`, of the sample alone: the KL is that of the posterior itself. It
                goes with ``estimator="analytic"``.
            estimator: ``"analytic"``, the KL itself, and where ``prior`` has none ``"mc"``. ``"mc"``: log q(z) - log
                p(z) at the sample, its estimate without bias, which can be negative (Kingma & Welling 2014, equation
                2). ``"stl"``, sticking the landing: the
                same value, but with q's mean and scale held in log q, so that the gradient goes through z alone (Roeder
                et al. 2017, arXiv:1703.09194, algorithm 2). Both keep the noise, and take several kernels.

        Returns:
            ``(z, kl)``: z of ``mu``'s shape and dtype, ``[K, B, ...]`` with ``num_samples=K``; kl in nats as reduced.

        Raises:
            TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name.

        Example::

            z, kl = vaefast.sample_with_kl(mu, logvar)
            loss = vaefast.reconstruction_loss(decoder(z), x) + kl
        """
        given = mu, logvar, prior_mu, prior_logvar
        p = _options.parameterization(parameterization)
        if options and estimator == "analytic" and options.get("prior") is not None:
            estimator = "mc"
        if num_samples is not None:
            draw: dict[str, Any] = {"eps": eps, "generator": generator, "noise": noise, "temperature": temperature}
            of = {"parameterization": p, "balance": balance, "reduction": reduction}
            return self._samples_with_kl(given, num_samples, estimator, draw, of | options)
        t = temperature if temperature == 1 else _options.temperature(temperature)
        if estimator == "analytic" and eps is None and generator is None and p.soft_clamp is None and t == 1:
            direct = self.engines.direct(mu) if options.get("batch_dims", 1) == 1 else None
            if direct is not None and (noise is None or noise == direct.noise):
                try:
                    if not options or not composed(options):
                        if balance is not None:
                            balance = _options.kl_balance(balance, prior_mu, prior_logvar)
                        z, kl = direct.posterior(*given, p, reduction, balance, None, None, True, True)
                        return z, kl
                    pair, o = _arguments.with_options(Pair(*given, p), reduction, balance, options)
                    return _compose.sample_with_kl(direct, pair, reduction, o, None, None)
                except Declined:
                    pass
                except Exception:
                    _arguments.kl(*given, p, reduction, balance, options)
                    if not any(map(wrapped, given)):
                        raise
        pair, o = _arguments.kl(*given, p, reduction, balance, options)
        _options.estimator(estimator, o, t)
        eps = _arguments.noise(noise, eps, generator, mu)
        if t != 1:
            z = _compose.tempered(self.engines, pair.mu, pair.raw, pair.p, t, eps, generator, noise)
            return z, _compose.kl(self.engines.engine(mu, beside=pair[1:4]), pair, reduction, o)
        if estimator != "analytic":
            return _compose.estimated(self.engines, pair, reduction, o, estimator, eps, generator, noise)
        if isinstance(generator, Sequence):
            return _compose.each_sample_with_kl(self.engines, pair, reduction, o, generator, noise)
        engine = self.engines.engine(mu, eps, beside=pair[1:4])
        dtype = compute_dtype(*pair[:4])
        return _compose.sample_with_kl(
            engine, pair, reduction, o, *_compose.drawn(engine, mu, dtype, eps, generator, noise)
        )

    def _samples_with_kl(
        self, given: tuple[Tensor, Tensor, Prior, Prior], number: int, estimator: str, draw: dict[str, Any], of: Any
    ) -> tuple[Tensor, Tensor]:
        """Several samples and the KL that they share, or their estimates of it."""
        mu, logvar, prior_mu, prior_logvar = given
        if estimator == "analytic":
            kl = self.gaussian_kl(mu, logvar, prior_mu, prior_logvar, weight=of.pop("kl_weight", None), **of)
            z = self.reparameterize(mu, logvar, parameterization=of["parameterization"], num_samples=number, **draw)
            return z, kl
        if isinstance(draw["generator"], Sequence):
            raise ValueError(
                "generator is a list, one for each sample, and num_samples draws several of each: their estimates take "
                "one generator, or eps="
            )
        mu, logvar = _arguments.samples(mu, logvar, number)
        of["batch_dims"] = of.get("batch_dims", 1) + 1
        return self.sample_with_kl(mu, logvar, prior_mu, prior_logvar, estimator=estimator, **draw, **of)

    def multi_tensor_gaussian_kl(
        self, mus: Sequence[Tensor], raws: Sequence[Tensor], prior_mus: Sequence[Tensor] | None = None,
        prior_raws: Sequence[Tensor] | None = None, *, parameterization: str | Parameterization = "logvar",
        prior_parameterization: str | Parameterization | None = None, reduction: str = "batchmean", batch_dims: int = 1,
    ) -> Tensor:  # fmt: skip
        """The sum of :func:`gaussian_kl` over many posteriors, such as the levels of a hierarchy, in one call.

        Args:
            mus, raws: lists of as many tensors, of any shapes; each raw has its mu's shape. All lie on one device. Any
                iterable counts as a list: ``parameters()``, a ``ParameterList``.
            prior_mus, prior_raws: None is N(0, I); else lists as long, each tensor broadcasting to its mu. Trained if
                they require grad.
            parameterization: what ``raws`` mean.
            prior_parameterization: what ``prior_raws`` mean; None is what ``raws`` do.
            reduction: ``"per_sample"``, ``"batchmean"`` (both need one batch in all) or ``"sum"``.
            batch_dims: how many of the first dimensions are the batch, as for :func:`gaussian_kl`.

        Returns:
            The KL in nats, float32 (float64 where an input is).

        Raises:
            TypeError, ValueError: lists of other lengths, or an argument of wrong type, dtype, shape or device.

        Sønderby et al. 2016 (arXiv:1602.02282), equation 3: a hierarchy's KL is the sum of its levels'.

        Example::

            kl = vaefast.multi_tensor_gaussian_kl(mus, logvars, prior_mus, prior_logvars)
            loss = nll + kl
        """
        mus, raws, prior_mus, prior_raws = map(_arguments.listed, (mus, raws, prior_mus, prior_raws))
        logvars = parameterization == "logvar" and prior_parameterization in (None, "logvar") and batch_dims == 1
        if logvars and isinstance(mus, (list, tuple)) and mus:
            direct = self.engines.direct(mus[0])
            # None is an empty list, and an empty list is an error
            if direct is not None and (prior_mus is None or prior_mus) and (prior_raws is None or prior_raws):
                p = _options.parameterization(parameterization)
                try:
                    return direct.multi(
                        mus, raws, prior_mus or (), 0.0, prior_raws or (), 0.0, p, reduction, None, False
                    )[0]  # fmt: skip
                except Declined:
                    pass
                except Exception:
                    _arguments.each_with_its_prior(mus, raws, prior_mus, prior_raws, p, None, reduction, 1)
                    if not any(map(wrapped, (*mus, *raws, *(prior_mus or ()), *(prior_raws or ())))):
                        raise
        dims = _options.batch_dims(batch_dims)
        many = _arguments.each_with_its_prior(
            mus, raws, prior_mus, prior_raws, parameterization, prior_parameterization, reduction, dims
        )
        return _compose.multi_kl(self._engine_of(many), many, reduction, dims)

    def multi_tensor_sample_with_kl(
        self, mus: Sequence[Tensor], raws: Sequence[Tensor], prior_mu: Prior = 0.0, prior_logvar: Prior = 0.0, *,
        parameterization: str | Parameterization = "logvar", prior_parameterization: str | Parameterization = "logvar",
        reduction: str = "sum", generator: torch.Generator | None = None, batch_dims: int = 1,
    ) -> tuple[list[Tensor], Tensor]:  # fmt: skip
        """:func:`sample_with_kl` of many posteriors, such as a network's weights, in one call; their KLs are added up.

        Backward regenerates the noise: what is kept is the inputs and 16 bytes for all of them.

        Args:
            mus, raws: lists of as many tensors, of any shapes; each raw has its mu's shape. All lie on one device. Any
                iterable counts as a list: ``parameters()``, a ``ParameterList``.
            prior_mu, prior_logvar: one prior for all: floats, or tensors that broadcast to every mu.
            parameterization: what ``raws`` mean.
            prior_parameterization: what ``prior_logvar`` means.
            reduction: ``"sum"``, or ``"per_sample"`` or ``"batchmean"`` where all have one batch.
            generator: where the seed comes from; the default generator of the tensors' device if None.
            batch_dims: how many of the first dimensions are the batch, as for :func:`gaussian_kl`.

        Returns:
            ``(samples, kl)``: a list of tensors like mus, and the KL in nats.

        Raises:
            TypeError, ValueError: lists of other lengths, or an argument of wrong type, dtype, shape or device.

        Blundell et al. 2015 (arXiv:1505.05424), equation 2: the complexity cost of a network is its weights' KL.

        Example::

            weights, kl = vaefast.multi_tensor_sample_with_kl(weight_mus, weight_rhos, parameterization="softplus")
            loss = F.cross_entropy(F.linear(x, *weights), labels) + kl / 60_000  # examples in the data set
        """
        dims = _options.batch_dims(batch_dims)
        many = _arguments.all_with_one_prior(
            mus, raws, prior_mu, prior_logvar, parameterization, prior_parameterization, reduction, dims
        )
        _arguments.noise(None, None, generator, many.mus[0], None)
        return _compose.multi_sample_with_kl(self._engine_of(many), many, reduction, dims, generator)

    def _engine_of(self, many: Posteriors) -> Engine:
        """The one that covers them all, which lie on one device."""
        largest = many.mus[0]
        for mu in many.mus:
            if mu.dim() > largest.dim():
                largest = mu
        beside = *many.mus, *many.raws, *many.prior_mus, *many.prior_logvars
        return self.engines.engine(largest, beside=beside)
