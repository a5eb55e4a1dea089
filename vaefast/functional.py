"""The public functions: check the arguments, choose the back end, call it.

Everything is in nats. ``B`` is the batch, dimension 0; ``[B, ...]`` is any shape that starts with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _args, _kl_options, _ops, _optimal, distributed, presets, reference
from ._args import Likelihood, Parameterization, Real
from ._generators import Generators, each_its_own
from ._kl_options import Pair
from .reference import ELBOTerms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Recon = Tensor | Sequence[Tensor]
Prior = Tensor | float | int | None


def _posterior(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Prior,
    prior_logvar: Prior,
    parameterization: str | Parameterization,
    reduction: str,
    balance: float | None = None,
    *,
    sample: bool,
    kl: bool,
) -> list[Tensor] | None:
    """The kernels' outputs for a plain call, noise from the default generator."""
    found: list[Tensor] | None = _ops.attempt(
        "posterior", mu,
        lambda: (
            mu, logvar, *_ops.split(prior_mu), *_ops.split(prior_logvar), None, None, None,
            *_args.parameterization(parameterization).spec, reduction, sample, kl,
            balance if balance is None else _args.kl_balance(balance, prior_mu, prior_logvar),
        ),
    )  # fmt: skip
    return found


def _plain_kl(pair: Pair, reduction: str, balance: float | None) -> Tensor:
    if not _ops.native_for(pair.mu):
        return reference.plain_kl(pair, reduction, balance)
    mu, raw, pm, plv, p = pair
    return _ops.posterior(mu, raw, pm, plv, None, None, p, reduction, sample=False, kl=True, balance=balance)[0]


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    parameterization: str | Parameterization = "logvar",
    eps: Tensor | None = None,
    generator: Generators = None,
    noise: str = "philox",
    num_samples: int | None = None,
) -> Tensor:
    """Draws ``z = mu + std * eps``, eps ~ N(0, I), differentiably in both arguments.

    Kingma & Welling 2014 (arXiv:1312.6114), section 2.4.

    Args:
        mu: ``[B, ...]``, float16, bfloat16, float32 or float64, CPU or CUDA, any strides.
        logvar: the same shape; what it means is told by ``parameterization``.
        parameterization: ``"logvar"``, ``"log_std"``, ``"std"``, ``"var"``, ``"softplus"`` or a
            :class:`Parameterization`.
        eps: the noise to use, broadcasting to ``mu``; drawn if None.
        generator: where the seed comes from; the default generator of ``mu``'s device if None. A list has one for each
            of B samples, which is drawn as if it were alone in its batch; it is cut up for that, one kernel a sample.
        noise: ``"philox"`` draws from (seed, offset, element index) inside the kernel, so that only 16 bytes are kept
            for backward; ``"torch"`` draws :func:`torch.randn`'s own stream and keeps it.
        num_samples: K for K independent draws in one call, whose gradients add up. What is kept for backward does not
            grow with K; ``eps`` then broadcasts to ``[K, B, ...]``.

    Returns:
        ``z``, shape and dtype of ``mu``; ``[K, B, ...]`` with ``num_samples=K``.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name.

    Example::

        mu, logvar = encoder(x).chunk(2, dim=1)
        z = vaefast.reparameterize(mu, logvar)
    """
    if num_samples is not None:
        mu, logvar = _args.samples(*_args.posterior(mu, logvar), num_samples)
    if eps is None and generator is None and noise == "philox":
        out = _posterior(mu, logvar, None, None, parameterization, "none", sample=True, kl=False)
        if out is not None:
            return out[0]
    mu, logvar = _args.posterior(mu, logvar)
    p = _args.parameterization(parameterization)
    dim = 0 if num_samples is None else 1
    eps = _args.noise(noise, eps, generator, mu, dim)
    if isinstance(generator, Sequence):

        def draw(mu: Tensor, logvar: Tensor, own: torch.Generator | None) -> Tensor:
            return reparameterize(mu, logvar, parameterization=p, generator=own, noise=noise)

        return each_its_own(draw, (mu, logvar), generator, dim)
    if not _ops.native_for(mu, no_grad_to=(eps,)):
        return reference.reparameterize(mu, logvar, parameterization=p, eps=eps, generator=generator, noise=noise)
    eps = _ops.torch_noise(mu, generator) if eps is None and noise == "torch" else eps
    return _ops.posterior(mu, logvar, None, None, eps, generator, p, "none", sample=True, kl=False)[0]


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Prior = None,
    prior_logvar: Prior = None,
    *,
    parameterization: str | Parameterization = "logvar",
    reduction: str = "batchmean",
    free_bits: float = 0.0,
    free_bits_per: str = "dim",
    balance: float | None = None,
    capacity: Tensor | Real | None = None,
    symmetric: bool = False,
) -> Tensor:
    """KL(q || p) in nats between diagonal Gaussians q = N(mu, std^2) and p = N(prior_mu, e^prior_logvar).

    Kingma & Welling 2014, appendix B, rearranged so that nothing cancels: with h(x) = e^x - 1 - x,
    ``KL(q || N(0, I)) = (mu^2 + h(lv)) / 2`` and ``KL(q || p) = (h(lvq - lvp) + (muq - mup)^2 e^-lvp) / 2``.
    It keeps its relative accuracy next to the prior and is never negative.

    Args:
        mu, logvar: ``[B, ...]``, the same shape; floating dtypes may differ.
        prior_mu, prior_logvar: None is 0; else a float, or a tensor that broadcasts to ``mu``. Trained if they require
            grad. ``prior_logvar`` is a log variance whatever the parameterization.
        parameterization: what ``logvar`` means; see :class:`Parameterization`.
        reduction: ``"none"`` elementwise, ``"per_sample"`` ``[B]``, ``"batchmean"`` its mean over B, ``"sum"``, or
            ``"mean"`` over every element.
        free_bits: a floor in nats, below and at which there is no gradient; 0 is off.
        free_bits_per: under what the floor is. ``"dim"``: each element, ``max(free_bits, kl[b, d])``. ``"sample"``:
            ``max(free_bits, sum_d kl[b, d])`` (Hafner et al. 2023, arXiv:2301.04104), for ``"per_sample"``,
            ``"batchmean"`` and ``"sum"``. ``"batch_dim"``: ``sum_d max(free_bits, mean_b kl[b, d])`` (Kingma et al.
            2016, arXiv:1606.04934, equation 15), for ``"batchmean"``, and B times it for ``"sum"``.
        balance: alpha in [0, 1] for ``alpha KL(sg(q) || p) + (1 - alpha) KL(q || sg(p))``, sg being detach (Hafner et
            al. 2021, arXiv:2010.02193, algorithm 2): the value is the KL, the prior's gradient is times alpha and the
            posterior's times 1 - alpha. At least one of the priors must be a tensor.
        capacity: C in nats, a float or, for a schedule that compiles once, a 0-d tensor, for ``|KL - C|`` (Burgess et
            al. 2018, arXiv:1804.03599, equation 8): of each sample's KL for ``"per_sample"``, of the batch's mean for
            ``"batchmean"``, and B times that for ``"sum"``. No gradient where KL = C. Not together with ``free_bits``.
        symmetric: KL(q || p) + KL(p || q) instead (Jeffreys 1946), in the dtype and with the options of the KL.

    Returns:
        The KL. A reduced result is float32 (float64 where an input is); ``"none"`` keeps the promoted input dtype.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name.

    Example::

        loss = nll + 0.5 * vaefast.gaussian_kl(mu, logvar)
        kl = vaefast.gaussian_kl(mu, logvar, prior_mu, prior_logvar, free_bits=0.1, balance=0.8)
    """
    if free_bits == 0.0 and free_bits_per == "dim" and capacity is None and symmetric is False:
        out = _posterior(
            mu, logvar, prior_mu, prior_logvar, parameterization, reduction, balance, sample=False, kl=True
        )
        if out is not None:
            return out[0]
    pair, options = _kl_options.checked(
        mu, logvar, prior_mu, prior_logvar, parameterization, reduction,
        free_bits, free_bits_per, balance, capacity, symmetric,
    )  # fmt: skip
    return _kl_options.kl(_plain_kl, pair, reduction, options)


def kl_per_dim(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Prior = None,
    prior_logvar: Prior = None,
    *,
    parameterization: str | Parameterization = "logvar",
) -> Tensor:
    """The batch's mean of the KL of each latent dimension: which are used, and which have collapsed to the prior.

    Args:
        mu, logvar, prior_mu, prior_logvar, parameterization: as for :func:`gaussian_kl`.

    Returns:
        ``mean_b kl[b, ...]`` in nats, mu's shape without B; float32 (float64 where an input is). It sums to the
        ``"batchmean"`` KL (the terms of Kingma & Welling 2014, appendix B), and is differentiable.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name.

    Example::

        active = vaefast.kl_per_dim(mu, logvar) > 0.01
        print(int(active.sum()), "active units")
    """
    mu = _kl_options.wide(_args.batch("mu", mu))
    kl = gaussian_kl(mu, logvar, prior_mu, prior_logvar, parameterization=parameterization, reduction="none")
    return kl.mean(0)


def sample_with_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Prior = None,
    prior_logvar: Prior = None,
    *,
    parameterization: str | Parameterization = "logvar",
    reduction: str = "batchmean",
    eps: Tensor | None = None,
    generator: Generators = None,
    noise: str = "philox",
    free_bits: float = 0.0,
    free_bits_per: str = "dim",
    balance: float | None = None,
    capacity: Tensor | Real | None = None,
    symmetric: bool = False,
    estimator: str = "analytic",
) -> tuple[Tensor, Tensor]:
    """:func:`reparameterize` and :func:`gaussian_kl` in one pass over ``mu`` and ``logvar``.

    Backward regenerates the noise: what is kept is the inputs and 16 bytes.

    Args:
        mu, logvar, prior_mu, prior_logvar, parameterization, reduction: as for :func:`gaussian_kl`.
        eps, generator, noise: as for :func:`reparameterize`.
        free_bits, free_bits_per, balance, capacity, symmetric: as for :func:`gaussian_kl`.
        estimator: ``"analytic"``, the KL itself. ``"mc"``: log q(z) - log p(z) at the sample, its estimate without
            bias, which can be negative (Kingma & Welling 2014, equation 2). ``"stl"``, sticking the landing: the same
            value, but with q's mean and scale held in log q, so that the gradient goes through z alone (Roeder et al.
            2017, arXiv:1703.09194, algorithm 2). Both keep the noise, and take several kernels.

    Returns:
        ``(z, kl)``: z of ``mu``'s shape and dtype, kl in nats as reduced.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name.

    Example::

        z, kl = vaefast.sample_with_kl(mu, logvar)
        loss = vaefast.reconstruction_loss(decoder(z), x) + kl
    """
    plain = free_bits == 0.0 and free_bits_per == "dim" and capacity is None and symmetric is False
    if plain and estimator == "analytic" and eps is None and generator is None and noise == "philox":
        out = _posterior(mu, logvar, prior_mu, prior_logvar, parameterization, reduction, balance, sample=True, kl=True)
        if out is not None:
            return out[0], out[1]
    pair, options = _kl_options.checked(
        mu, logvar, prior_mu, prior_logvar, parameterization, reduction,
        free_bits, free_bits_per, balance, capacity, symmetric,
    )  # fmt: skip
    _args.estimator(estimator, options)
    eps = _args.noise(noise, eps, generator, mu)
    if estimator != "analytic":
        return _kl_options.estimated(reparameterize, pair, reduction, options, estimator, eps, generator, noise)
    if isinstance(generator, Sequence):
        z = _kl_options.sampled(reparameterize, pair, None, generator, noise)
        return z, _kl_options.kl(_plain_kl, pair, reduction, options)
    if not _ops.native_for(mu, no_grad_to=(eps,)):
        return reference.sample_with_kl(
            mu, logvar, pair.prior_mu, pair.prior_logvar,
            parameterization=pair.p, reduction=reduction, eps=eps, generator=generator, noise=noise,
            **options._asdict(),
        )  # fmt: skip
    eps = _ops.torch_noise(mu, generator) if eps is None and noise == "torch" else eps
    (wide, raw, pm, plv, p), inner = _kl_options.begin(pair, reduction, options)
    z, kl = _ops.posterior(
        wide, raw, pm, plv, eps, generator, p, inner, sample=True, kl=True, balance=options.balance
    )  # fmt: skip
    return z.to(mu.dtype), _kl_options.finish(kl, _plain_kl, pair, reduction, options)


def multi_tensor_gaussian_kl(
    mus: Sequence[Tensor],
    raws: Sequence[Tensor],
    prior_mus: Sequence[Tensor] | None = None,
    prior_raws: Sequence[Tensor] | None = None,
    *,
    parameterization: str | Parameterization = "logvar",
    reduction: str = "batchmean",
) -> Tensor:
    """The sum of :func:`gaussian_kl` over many posteriors, such as the levels of a hierarchy, in one call.

    Args:
        mus, raws: lists of as many tensors, of any shapes; each raw has its mu's shape. All lie on one device.
        prior_mus, prior_raws: None is N(0, I); else lists as long, each tensor broadcasting to its mu. Trained if they
            require grad.
        parameterization: what ``raws``, and likewise ``prior_raws``, mean.
        reduction: ``"per_sample"``, ``"batchmean"`` (both need one batch in all) or ``"sum"``.

    Returns:
        The KL in nats, float32 (float64 where an input is).

    Raises:
        TypeError, ValueError: lists of other lengths, or an argument of wrong type, dtype, shape or device.

    Sønderby et al. 2016 (arXiv:1602.02282), equation 3: a hierarchy's KL is the sum of its levels'.

    Example::

        kl = vaefast.multi_tensor_gaussian_kl(mus, logvars, prior_mus, prior_logvars)
        loss = nll + kl
    """
    lists = all(given is None or (isinstance(given, (list, tuple)) and given) for given in (prior_mus, prior_raws))
    kl = None
    if lists and parameterization == "logvar" and isinstance(mus, (list, tuple)) and mus:
        kl = _ops.attempt(
            "multi_posterior", mus[0],
            lambda: (
                mus, raws, prior_mus or (), 0.0, prior_raws or (), 0.0, None, None,
                *_args.parameterization(parameterization).spec, reduction, False, True,
            ),
        )  # fmt: skip
    if kl is not None:
        found: Tensor = kl[0]
        return found
    mus, raws = _args.posteriors(mus, raws)
    p = _args.parameterization(parameterization)
    pms = _args.priors("prior_mus", prior_mus, mus)
    plvs = reference.logvars_of(_args.priors("prior_raws", prior_raws, mus), p)
    _args.same_batches(mus, reduction)
    if not all(map(_ops.native_for, mus)):
        return reference.multi_tensor_gaussian_kl(
            mus, raws, prior_mus, prior_raws, parameterization=p, reduction=reduction
        )
    return _ops.multi_posterior(mus, raws, pms, plvs, 0.0, 0.0, None, p, reduction, sample=False)[0]


def multi_tensor_sample_with_kl(
    mus: Sequence[Tensor],
    raws: Sequence[Tensor],
    prior_mu: Prior = 0.0,
    prior_logvar: Prior = 0.0,
    *,
    parameterization: str | Parameterization = "logvar",
    reduction: str = "sum",
    generator: torch.Generator | None = None,
) -> tuple[list[Tensor], Tensor]:
    """:func:`sample_with_kl` of many posteriors, such as a network's weights, in one call; their KLs are added up.

    Backward regenerates the noise: what is kept is the inputs and 16 bytes for all of them.

    Args:
        mus, raws: lists of as many tensors, of any shapes; each raw has its mu's shape. All lie on one device.
        prior_mu, prior_logvar: one prior for all: floats, or tensors that broadcast to every mu.
        parameterization: what ``raws`` mean.
        reduction: ``"sum"``, or ``"per_sample"`` or ``"batchmean"`` where all have one batch.
        generator: where the seed comes from; the default generator of the tensors' device if None.

    Returns:
        ``(samples, kl)``: a list of tensors like mus, and the KL in nats.

    Raises:
        TypeError, ValueError: lists of other lengths, or an argument of wrong type, dtype, shape or device.

    Blundell et al. 2015 (arXiv:1505.05424), equation 2: the complexity cost of a network is its weights' KL.

    Example::

        weights, kl = vaefast.multi_tensor_sample_with_kl(mus, rhos, parameterization="softplus")
        loss = nll(weights, batch) + kl / batches
    """
    mus, raws = _args.posteriors(mus, raws)
    p = _args.parameterization(parameterization)
    pm, plv = prior_mu, prior_logvar
    for mu in mus:
        pm, plv = _args.prior("prior_mu", prior_mu, mu), _args.prior("prior_logvar", prior_logvar, mu)
    _args.same_batches(mus, reduction)
    _args.noise("philox", None, generator, mus[0], None)
    if not all(map(_ops.native_for, mus)):
        return reference.multi_tensor_sample_with_kl(
            mus, raws, pm, plv, parameterization=p, reduction=reduction, generator=generator
        )
    pms, plvs = ([prior] * len(mus) if isinstance(prior, Tensor) else [] for prior in (pm, plv))
    number, log_number = (0.0 if prior is None or isinstance(prior, Tensor) else prior for prior in (pm, plv))
    *samples, kl = _ops.multi_posterior(
        mus, raws, pms, plvs, number, log_number, generator, p, reduction, sample=True
    )  # fmt: skip
    return samples, kl


def reconstruction_loss(
    recon: Recon,
    target: Tensor,
    *,
    likelihood: str | Likelihood = "bernoulli",
    reduction: str = "batchmean",
    weight: Tensor | None = None,
    overwrite_recon: bool = False,
) -> Tensor:
    """The negative log-likelihood -log p(target | recon) in nats, loss and gradient in one pass.

    Args:
        recon: the likelihood's parameters, a tensor or a tuple. The first is ``[B, ...]``; the others broadcast to it.

            - ``"bernoulli"`` logits; ``"bernoulli_probs"`` probabilities (``F.binary_cross_entropy``'s clamps);
              ``"continuous_bernoulli"`` logits (Loaiza-Ganem & Cunningham 2019, equation 6).
            - ``"gaussian"`` mean or (mean, logvar); ``"laplace"`` loc or (loc, log_scale); a scale that is not given
              is 1. ``"student_t"`` (loc, log_scale, df). ``"gaussian_optimal"`` mean, at the variance that fits the
              data best (Rybkin et al. 2021, equation 4).
            - ``"poisson"`` log_rate; ``"negative_binomial"`` (mu, theta), mean and inverse dispersion;
              ``"zero_inflated_negative_binomial"`` (mu, theta, pi_logits) (Lopez et al. 2018, as scvi-tools has
              them). A negative count gives NaN; one that is not whole goes through the gamma function.
            - ``"discretized_logistic"`` (mean, log_scale) of data on a grid, -1 to 1 in 256 steps unless
              :class:`Likelihood` says else (Salimans et al. 2017, equation 2).
            - Mixtures, whose recon is one tensor of planes along dimension 1, or another ``dim`` of
              :class:`Likelihood`: ``"categorical"`` logits ``[B, K, ...]`` with the classes ``[B, ...]`` as target,
              whole numbers of any dtype (NaN for one that there is not). ``"discretized_logistic_mixture"``
              ``[B, K (1 + 9), ...]`` with target ``[B, 3, ...]``, laid out as in PixelCNN++ and VDVAE: K logits, then
              for each channel K means, K log scales and K couplings to the channels before it; with ``channels=1``
              ``[B, K (1 + 2), ...]`` and ``[B, 1, ...]`` (Salimans et al. 2017, section 2.2). Their loss has an
              element for each pixel, ``[B, ...]``.

            Normalising constants (log 2 pi, log x!) are included.
        target: the data, the first parameter's shape but for mixtures; any floating dtype, and for classes any.
        likelihood: one of ``vaefast.LIKELIHOODS``, or a :class:`Likelihood` where its options are to be others.
        reduction: as for :func:`gaussian_kl`; ``"mean"`` divides by the number of elements, weighted or not.
        weight: broadcasts to the elementwise loss and multiplies it. Where it is 0 the element is not evaluated, so a
            NaN there reaches neither loss nor gradient. A bool tensor is a mask.
        overwrite_recon: permission to write the gradient over ``recon``, which saves a buffer of its size and the time
            to make it. Nothing may read ``recon`` after the call, a second call of this function neither. What autograd
            was to read of it, such as the result that a sigmoid keeps, raises in backward, by ``recon``'s version
            counter; so does ``create_graph``. Not made use of under torch.compile, by the reference, where no gradient
            is kept (float16, ``reduction="none"``), for leaves and their views, for a parameter that is broadcast or
            shares memory with another argument, and for mixtures of logistics.

    Returns:
        The nll: float32 when reduced (float64 where an input is); ``"none"`` keeps the promoted dtype.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name.

    Example::

        nll = vaefast.reconstruction_loss(logits, x)
        nll = vaefast.reconstruction_loss((mean, logvar), x, likelihood="gaussian")
    """
    if isinstance(target, Tensor) and not target.is_floating_point():
        target = _args.indices(target, likelihood)
    chosen = _args.likelihood(likelihood)
    if chosen.name not in reference.COMPOSED:
        given = recon if isinstance(recon, (tuple, list)) else (recon,)
        nll: Tensor | None = _ops.attempt(
            "reconstruction",
            given[0] if given else None,
            lambda: (given, target, weight, *chosen.spec, reduction, overwrite_recon),
        )
        if nll is not None:
            return nll
    params, target, weight = _args.reconstruction(recon, target, weight, chosen, reference.entry_of(chosen))
    _args.flag("overwrite_recon", overwrite_recon)
    if chosen.name in reference.COMPOSED:
        return _optimal.gaussian_optimal(reconstruction_loss, params, target, weight, reduction, chosen)
    _args.choice("reduction", reduction, _args.REDUCTIONS)
    _args.batched("recon", params[0], reduction)
    if not _ops.native_for(params[0], no_grad_to=(target, weight)):
        return reference.reconstruction_loss(
            tuple(params), target, likelihood=chosen, reduction=reduction, weight=weight
        )
    return _ops.reconstruction(params, target, weight, chosen, reduction, overwrite_recon)


def _elbo(
    entry: str,
    recon: Recon,
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Prior,
    prior_logvar: Prior,
    likelihood: str | Likelihood,
    beta: Tensor | Real,
    parameterization: str | Parameterization,
    reduction: str,
    weight: Tensor | None,
    balance: float | None,
    overwrite_recon: bool,
) -> Any:
    """What the kernels' entry returns for a plain call: the terms, or the loss alone, which takes less time."""
    chosen = _args.likelihood(likelihood)
    if type(beta) not in (float, int) or chosen.name in reference.COMPOSED:
        return None
    given = recon if isinstance(recon, (tuple, list)) else (recon,)
    if isinstance(target, Tensor) and not target.is_floating_point():
        target = _args.indices(target, chosen)
    return _ops.attempt(
        entry, mu,
        lambda: (
            given, target, weight, *chosen.spec,
            mu, logvar, *_ops.split(prior_mu), *_ops.split(prior_logvar),
            *_args.parameterization(parameterization).spec, beta, reduction,
            balance if balance is None else _args.kl_balance(balance, prior_mu, prior_logvar), overwrite_recon,
        ),
    )  # fmt: skip


def elbo_terms(
    recon: Recon,
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Prior = None,
    prior_logvar: Prior = None,
    *,
    likelihood: str | Likelihood = "bernoulli",
    beta: Tensor | Real = 1.0,
    parameterization: str | Parameterization = "logvar",
    reduction: str = "batchmean",
    weight: Tensor | None = None,
    free_bits: float = 0.0,
    free_bits_per: str = "dim",
    balance: float | None = None,
    capacity: Tensor | Real | None = None,
    symmetric: bool = False,
    preset: str | None = None,
    process_group: ProcessGroup | str | None = None,
    overwrite_recon: bool = False,
) -> ELBOTerms:
    """The negative ELBO and its two terms: ``loss = -E_q[log p(x|z)] + beta * KL(q || p)``, each differentiable.

    Kingma & Welling 2014, equation 3 with one sample; beta as in Higgins et al. 2017.

    Args:
        recon, target, likelihood, weight, overwrite_recon: as for :func:`reconstruction_loss`.
        mu, logvar, prior_mu, prior_logvar, parameterization: as for :func:`gaussian_kl`.
        beta: the KL's factor, a float or, for a schedule that compiles once, a 0-d tensor.
        reduction: ``"per_sample"``, ``"batchmean"`` or ``"sum"``. ``"mean"`` is refused: a mean over elements would
            weigh the two terms by their sizes.
        free_bits, free_bits_per, balance, capacity, symmetric: the KL's options, as for :func:`gaussian_kl`; ``kl`` is
            the term with them. With ``capacity``, beta is the gamma of Burgess et al. 2018.
        preset: None, or a name in ``vaefast.presets.PRESETS``: the convention of another project, its arguments and
            its factors on the terms. An argument that differs from its default here wins over the preset's. To let a
            default win, write it so that it differs: ``Likelihood("bernoulli")``, ``Parameterization("logvar")``, a
            0-d tensor for ``beta``.
        process_group: None, or the ranks over which DDP or FSDP averages gradients: a
            ``torch.distributed.ProcessGroup``, or ``"world"``. ``"batchmean"``, the one reduction that it takes, is
            then ``N / B`` times the sum over this rank's samples, with N ranks and B samples on all of them: its mean
            over the ranks, and so the gradients', is that of one process with the whole batch, also where local batches
            differ or are empty. Every rank must make the call: it takes one all-reduce of 8 bytes. ``capacity`` and
            ``free_bits_per="batch_dim"`` go by means over the global batch, which takes one more, of that many numbers.
            See :mod:`vaefast.distributed`.

    Returns:
        ``ELBOTerms(loss, reconstruction, kl)``, a NamedTuple, in nats.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device, or an unknown name.

    Example::

        terms = vaefast.elbo_terms(decoder(z), x, mu, logvar)
        terms.loss.backward(); print(terms.kl.item())
    """
    if preset is not None:
        return presets.elbo_terms(
            elbo_terms, preset, recon, target, mu, logvar, prior_mu, prior_logvar, weight=weight,
            likelihood=likelihood, beta=beta, parameterization=parameterization, reduction=reduction,
            free_bits=free_bits, free_bits_per=free_bits_per, balance=balance, capacity=capacity, symmetric=symmetric,
            process_group=process_group, overwrite_recon=overwrite_recon,
        )  # fmt: skip
    if process_group is not None:
        return distributed.elbo_terms(
            elbo_terms, gaussian_kl, process_group, recon, target, mu, logvar, prior_mu, prior_logvar, weight=weight,
            likelihood=likelihood, beta=beta, parameterization=parameterization, reduction=reduction,
            free_bits=free_bits, free_bits_per=free_bits_per, balance=balance, capacity=capacity, symmetric=symmetric,
            overwrite_recon=overwrite_recon,
        )  # fmt: skip
    plain = free_bits == 0.0 and free_bits_per == "dim" and capacity is None and symmetric is False
    if plain:
        found = _elbo(
            "elbo", recon, target, mu, logvar, prior_mu, prior_logvar, likelihood, beta, parameterization, reduction,
            weight, balance, overwrite_recon,
        )  # fmt: skip
        if found is not None:
            return ELBOTerms(*found)
    _args.reduction_for_elbo(reduction)
    chosen = _args.likelihood(likelihood)
    if isinstance(target, Tensor) and not target.is_floating_point():
        target = _args.indices(target, chosen)
    params, target, weight = _args.reconstruction(recon, target, weight, chosen, reference.entry_of(chosen))
    _args.flag("overwrite_recon", overwrite_recon)
    pair, options = _kl_options.checked(
        mu, logvar, prior_mu, prior_logvar, parameterization, reduction,
        free_bits, free_bits_per, balance, capacity, symmetric,
    )  # fmt: skip
    _args.elbo_batch(params[0], mu, reduction)
    beta = _args.factor("beta", beta, mu)
    mu, logvar, pm, plv, p = pair
    if not _ops.native_for(mu, no_grad_to=(target, weight)):
        return reference.elbo_terms(
            tuple(params), target, mu, logvar, pm, plv,
            likelihood=chosen, beta=beta, parameterization=p, reduction=reduction, weight=weight,
            **options._asdict(),
        )  # fmt: skip
    if not plain or isinstance(beta, Tensor) or chosen.name in reference.COMPOSED:
        nll = reconstruction_loss(
            params, target, likelihood=chosen, reduction=reduction, weight=weight, overwrite_recon=overwrite_recon
        )
        kl = _kl_options.kl(_plain_kl, pair, reduction, options)
        return ELBOTerms(nll + beta * kl, nll, kl)
    terms = _ops.elbo(
        params, target, weight, chosen, mu, logvar, pm, plv, p, beta, reduction, options.balance, overwrite_recon
    )
    return ELBOTerms(*terms)


def elbo_loss(
    recon: Recon,
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Prior = None,
    prior_logvar: Prior = None,
    *,
    likelihood: str | Likelihood = "bernoulli",
    beta: Tensor | Real = 1.0,
    parameterization: str | Parameterization = "logvar",
    reduction: str = "batchmean",
    weight: Tensor | None = None,
    free_bits: float = 0.0,
    free_bits_per: str = "dim",
    balance: float | None = None,
    capacity: Tensor | Real | None = None,
    symmetric: bool = False,
    preset: str | None = None,
    process_group: ProcessGroup | str | None = None,
    overwrite_recon: bool = False,
) -> Tensor:
    """The negative ELBO in nats, to be minimised: :func:`elbo_terms` without the parts.

    Example::

        loss = vaefast.elbo_loss(decoder(z), x, mu, logvar)
        loss.backward()

    Arguments, shapes, dtypes and errors are those of :func:`elbo_terms`.
    """
    plain = free_bits == 0.0 and free_bits_per == "dim" and capacity is None and symmetric is False
    if plain and preset is None and process_group is None:
        found: Tensor | None = _elbo(
            "elbo_loss", recon, target, mu, logvar, prior_mu, prior_logvar, likelihood, beta, parameterization,
            reduction, weight, balance, overwrite_recon,
        )  # fmt: skip
        if found is not None:
            return found
    return elbo_terms(
        recon, target, mu, logvar, prior_mu, prior_logvar,
        likelihood=likelihood, beta=beta, parameterization=parameterization, reduction=reduction, weight=weight,
        free_bits=free_bits, free_bits_per=free_bits_per, balance=balance, capacity=capacity, symmetric=symmetric,
        preset=preset, process_group=process_group, overwrite_recon=overwrite_recon,
    ).loss  # fmt: skip
