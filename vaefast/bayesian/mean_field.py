"""A posterior over the parameters of any module."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .._checks import Real, factor, flag, is_real, is_whole
from .._functions import Recon
from .._gaussian import softplus, wide
from .._options import Likelihood
from ..functional import reconstruction_loss
from ._drawing import Drawing
from ._estimators import detach
from ._prediction import Moments, Prediction, joined
from ._priors import Gaussian, Given
from ._sites import Where
from ._start import Start


class MeanField(Drawing):
    """A Gaussian posterior over the parameters of a module, which forward draws in one fused call and runs it with.

    The means are the module's own parameters, so that it stays what it is, with its names, its checkpoints and its
    modes: ``model.module(x)`` is the network at the posterior's mean. Beside each chosen parameter stands a tensor
    ``rho`` of its shape, with the standard deviation ``log(1 + e^rho)``. Blundell et al. 2015 (arXiv:1505.05424).

    Every forward draws anew, in ``eval()`` too; backward regenerates the noise, of which 16 bytes are kept. Buffers,
    such as a BatchNorm's statistics, are updated as ever; tied parameters are drawn once.

    Args:
        module: any ``nn.Module``; what its parameters hold is where the means start.
        prior: of the weights: ``(mean, std)``, numbers or tensors that broadcast to each parameter; a
            :class:`Gaussian`, which can be learned; any object with ``log_prob``, such as a ``torch.distributions``
            one, whose KL is then estimated at the draw, without bias; or a function of ``(name, parameter)`` that
            returns one of these, for a prior of each layer's own.
        init: the standard deviations at the start: a number; ``"fan_in"``, ``0.1 / sqrt(inputs of an output)``; or a
            function of ``(name, parameter)`` that returns a number or a tensor.
        where: which parameters: None is all but vectors and norms (biases and norms' scales stay deterministic, as in
            the literature); ``"all"``; patterns of names (``"head.*"``); types of modules (``nn.Linear``); a list of
            both; or a function of ``(name, parameter)``. Frozen ones (``requires_grad=False``) are never chosen.
        estimator: ``"weights"`` draws each weight once for the whole batch. ``"local"`` draws the outputs of linear and
            convolutional layers instead (Kingma et al. 2015, arXiv:1506.02557): the same distribution for one output of
            a linear layer, independent between examples, and between a convolution's places too, which a shared weight
            is not. ``"flipout"`` gives each example signs of its own on one draw (Wen et al. 2018, arXiv:1803.04386).
            Both apply to ``nn.Linear``, ``nn.Conv1d`` to ``3d`` and their transposes; other layers' weights are drawn
            as ever.
        rank: columns of a low-rank factor V of the posterior ``N(mu, diag(sigma^2) + V V^T)`` of all chosen parameters
            together; 0 is mean field. For ``estimator="weights"``.

    Shape:
        what the module's forward takes and gives; with ``num_samples=K`` a first dimension ``[K, ...]``.

    Raises:
        TypeError, ValueError: an option that is none of these, ``where`` that chooses nothing, an estimator that
            applies to no layer.

    Example::

        network = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
        model = vaefast.bayesian.MeanField(network, prior=(0.0, 0.1))
        loss = model.elbo_loss(model(x), labels, dataset_size=60_000, likelihood="categorical")
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        prior: Given = (0.0, 1.0),
        init: Start = "fan_in",
        where: Where = None,
        estimator: str = "weights",
        rank: int = 0,
    ) -> None:
        super().__init__(module, prior, init, where, estimator, rank)

    @classmethod
    def moped(cls, module: nn.Module, *, delta: Real = 0.1, std: Real = 1.0, **options: Any) -> MeanField:
        """Around a trained module: prior ``N(w, std^2)`` about its weights w, and a posterior that starts at them.

        Krishnan et al. 2020 (arXiv:1906.05323), MOPED: the posterior's standard deviations start at ``delta |w|``.

        Args:
            module: a trained one. The prior's means are a copy of its weights.
            delta: a number above 0.
            std: the prior's standard deviation, a number above 0.
            **options: of :class:`MeanField`, but for ``prior`` and ``init``.

        Raises:
            TypeError, ValueError: as :class:`MeanField`; a delta that is no number above 0.

        Example::

            model = vaefast.bayesian.MeanField.moped(encoder, delta=0.05)
            output = model(x)
        """
        if not is_real(delta) or not 0 < delta < math.inf:
            raise ValueError(f"delta must be a finite number above 0, got {delta!r}")
        return cls(
            module,
            prior=lambda name, p: Gaussian(p.detach(), std),
            init=lambda name, p: delta * p.detach().abs(),
            **options,
        )

    # ---- drawing

    def forward(
        self,
        *args: Any,
        num_samples: int | None = None,
        antithetic: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """The module's output with weights that are drawn for this call.

        Args:
            args, kwargs: the module's.
            num_samples: K for K runs, each with a draw of its own, stacked: ``[K, ...]``.
            antithetic: every second of them with the noise of the one before it, negated, for
                ``estimator="weights"``.
            generator: where the noise comes from; the default generator of the parameters' device if None.
        """
        if num_samples is None:
            draw = self._draw(generator)
            self._remember(draw.kl)
            return self._run(draw, generator, args, kwargs)
        outputs, kls = [], []
        for draw in self._draws(num_samples, flag("antithetic", antithetic), generator):
            outputs.append(self._run(draw, generator, args, kwargs))
            kls.append(draw.kl)
        self._remember(torch.stack(kls).mean(0) if self._estimated else kls[-1])
        return tree_map(lambda *each: torch.stack(each), *outputs)

    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One draw of the weights, by name: a function from the posterior, to be used as often as is wanted.

        Args:
            generator: where the noise comes from; the default generator of the parameters' device if None.

        Returns:
            The drawn parameters, each of its parameter's shape and dtype, differentiable in both of the posterior's.

        Raises:
            TypeError, ValueError: a generator that is none, or of another device.

        Example::

            model = vaefast.bayesian.MeanField(encoder)
            outputs = torch.func.functional_call(model.module, model.sample(), (x,))
        """
        weights = self._draw(generator, by_weights=True).weights
        return {site.name: w for site, w in zip(self._sites, weights) if w is not None}

    # ---- the KL and the loss

    def kl(self) -> Tensor:
        """KL(q || prior) of the chosen parameters in nats, a 0-d tensor: the sum over all of them.

        It is that of the last forward's call, which is then part of the same backward pass. Where there is none, it has
        been through a backward pass, or the parameters have changed since, it is computed from the parameters: to
        Gaussian priors the KL does not depend on the draw. To a prior with ``log_prob`` it is then estimated at a new
        one.

        Raises:
            RuntimeError: an engine that was asked for by name and does not cover the call.

        Kingma & Welling 2014, appendix B; by the matrix determinant lemma where there is a low-rank factor.

        Example::

            model = vaefast.bayesian.MeanField(encoder)
            loss = F.cross_entropy(model(x), labels) + model.kl() / 60_000
        """
        kl = self._remembered()
        if kl is not None:
            return kl
        if self._estimated:
            return self._draw(None, by_weights=True).kl
        return self._fused(range(len(self._sites)), None, sample=False)[1]

    def elbo_loss(
        self,
        output: Recon,
        target: Tensor,
        *,
        dataset_size: int,
        likelihood: str | Likelihood | Callable[[Any, Any], Tensor],
        kl_share: Tensor | Real | None = None,
        beta: Tensor | Real = 1.0,
        num_samples: int | None = None,
    ) -> Tensor:
        """The negative ELBO of a data set, per example, from a minibatch: ``mean_b nll_b + KL / dataset_size``.

        Its mean over the minibatches of an epoch is the bound, divided by ``dataset_size`` (Graves 2011; Blundell et
        al. 2015, equation 2, and section 3.4 for minibatches). The KL is :meth:`kl`'s.

        Args:
            output: what forward gave: the parameters of p(y | x, w), as ``recon`` of
                :func:`vaefast.reconstruction_loss`.
            target: ``[B, ...]``, classes ``[B]`` for ``"categorical"``.
            dataset_size: N, the examples of the whole data set.
            likelihood: as for :func:`vaefast.reconstruction_loss`; or a function of ``(output, target)`` that returns
                the mean nll of an example in nats, 0-d, such as ``F.cross_entropy``.
            kl_share: the share of the KL that this minibatch has in an epoch, ``pi`` of Blundell et al. 2015, equation
                8, from :func:`blundell_weights`; the loss is then ``mean_b nll_b + pi KL / B``. None is ``B / N``.
            beta: a factor on the KL, below 1 for a cold posterior (Wenzel et al. 2020, arXiv:2002.02405), which is no
                bound; a number or, for a schedule that compiles once, a 0-d tensor.
            num_samples: K, where the output is ``[K, B, ...]``.

        Returns:
            The loss in nats an example, a 0-d tensor.

        Raises:
            TypeError, ValueError: an argument of wrong type, dtype or shape, or an unknown likelihood.

        Example::

            model = vaefast.bayesian.MeanField(encoder, prior=(0.0, 0.1))
            loss = model.elbo_loss(model(x), labels, dataset_size=60_000, likelihood="categorical")
            loss.backward()
        """
        if not is_whole(dataset_size) or dataset_size < 1:
            raise ValueError(f"dataset_size must be an int >= 1, the examples in the data set, got {dataset_size!r}")
        share: Tensor | float = factor("beta", beta) / dataset_size
        if kl_share is not None:
            share = factor("beta", beta) * factor("kl_share", kl_share) / target.shape[0]
        if num_samples is not None:
            first = output if isinstance(output, Tensor) else output[0]
            if first.dim() < 2 or first.shape[0] != num_samples:
                raise ValueError(
                    f"num_samples={num_samples!r}, but output has shape {tuple(first.shape)}; it takes [K, B, ...], as "
                    "forward gives with num_samples=K"
                )
            output = tree_map(lambda t: _as_one_batch(t, first), output)
            target = target.expand(num_samples, *target.shape).flatten(0, 1)
        if callable(likelihood) and not isinstance(likelihood, Likelihood):
            nll = likelihood(output, target)
        else:
            nll = reconstruction_loss(output, target, likelihood=likelihood)
        return nll + share * self.kl()

    # ---- after training

    @torch.no_grad()
    def predict(
        self,
        x: Tensor | tuple[Any, ...],
        *,
        likelihood: str | Likelihood,
        num_samples: int = 32,
        chunk: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """The posterior predictive: what ``num_samples`` networks say together, and on what they disagree.

        Whichever the estimator, weights are drawn: every example is seen by the same networks. Means, variances and
        entropies are updated from draw to draw, so that memory does not grow with their number. Modules' modes stay as
        they are: call ``eval()`` before.

        Args:
            x: the module's argument ``[B, ...]``, or a tuple of several.
            likelihood: what its output means, as for :func:`vaefast.reconstruction_loss`: ``"categorical"`` logits,
                ``"gaussian"`` (mean, logvar).
            num_samples: draws of the weights, at least 1.
            chunk: how many examples go through the network at a time; None is all. The result is the same.
            generator: where the noise comes from: the same seed, the same prediction.

        Returns:
            A :class:`Prediction`, of shapes ``[B, ...]``.

        Raises:
            TypeError, ValueError: an argument of wrong type, or a likelihood without a variance.

        Example::

            model = vaefast.bayesian.MeanField(nn.Linear(784, 10)).eval()
            mean, _, _, entropy, mutual_information = model.predict(x, likelihood="categorical", num_samples=8)
        """
        if not is_whole(num_samples) or num_samples < 1:
            raise ValueError(f"num_samples must be an int >= 1, got {num_samples!r}")
        if chunk is not None and (not is_whole(chunk) or chunk < 1):
            raise ValueError(f"chunk must be None or an int >= 1, the examples at a time, got {chunk!r}")
        args = x if isinstance(x, tuple) else (x,)
        parts = [args] if chunk is None else list(zip(*(a.split(chunk) for a in args)))
        found = [Moments(likelihood) for _ in parts]
        for _ in range(num_samples):
            with self._in_place(self._draw(generator, by_weights=True), None):
                for part, moments in zip(parts, found):
                    moments.add(self.module(*part))
        return joined([moments.prediction() for moments in found])

    def mean(self) -> nn.Module:
        """A plain copy of the module, its parameters the posterior's means: the network that prediction can do without.

        Raises:
            RuntimeError: a module that ``copy.deepcopy`` does not copy.

        Example::

            plain = vaefast.bayesian.MeanField(encoder).mean()
            output = plain(x)  # of the module's shape
        """
        with torch.no_grad():
            found = deepcopy(self.module)
        detach(found)
        return found

    @torch.no_grad()
    def signal_to_noise(self) -> dict[str, Tensor]:
        """``|mu| / sigma`` of every weight, by name, each of its parameter's shape: what is large is certain.

        Raises:
            RuntimeError: as PyTorch's operators.

        Graves 2011, section 6; Blundell et al. 2015, section 5.1: weights of a low ratio can be left out.

        Example::

            ratios = vaefast.bayesian.MeanField(encoder).signal_to_noise()
            print({name: ratio.median() for name, ratio in ratios.items()})
        """
        stds = [softplus(wide(rho)) for rho in self._raw()]
        return {site.name: wide(site.parameter).abs() / std for site, std in zip(self._sites, stds)}

    @torch.no_grad()
    def prune(self, signal_to_noise: Real | None = None, *, fraction: Real | None = None) -> nn.Module:
        """:meth:`mean`, where weights of a low signal-to-noise ratio are 0.

        Graves 2011, section 6; Blundell et al. 2015, section 5.1.

        Args:
            signal_to_noise: the ratio ``|mu| / sigma`` below which they are.
            fraction: in its place, the share of all chosen weights, those of the lowest ratios, in [0, 1].

        Returns:
            A plain module like the one that is wrapped, each parameter of its own shape.

        Raises:
            TypeError, ValueError: both or neither given, or a number out of range.

        Example::

            small = vaefast.bayesian.MeanField(encoder).prune(fraction=0.5)
            zeros = sum(int((p == 0).sum()) for p in small.parameters())
        """
        if (signal_to_noise is None) == (fraction is None):
            raise ValueError("prune takes one of signal_to_noise, a ratio, and fraction, a share of the weights")
        ratios = self.signal_to_noise()
        if fraction is not None:
            if not is_real(fraction) or not 0 <= fraction <= 1:
                raise ValueError(f"fraction must be a number from 0 to 1, got {fraction!r}")
            everything = torch.cat([r.flatten() for r in ratios.values()]).sort().values
            count = round(fraction * len(everything))
            least = everything[count] if count < len(everything) else math.inf
        elif is_real(signal_to_noise) and signal_to_noise >= 0:
            least = signal_to_noise
        else:
            raise ValueError(f"signal_to_noise must be a number >= 0, got {signal_to_noise!r}")
        found = self.mean()
        parameters = dict(found.named_parameters())
        for name, ratio in ratios.items():
            parameters[name].masked_fill_(ratio < least, 0.0)
        return found

    def extra_repr(self) -> str:
        chosen = sum(site.parameter.numel() for site in self._sites)
        total = sum(p.numel() for p in self.module.parameters())
        of = len(list(self.module.parameters()))
        layers = f" ({len(self._noises)} layers)" if self._noises else ""
        return (
            f"{chosen:,} of {total:,} parameters Bayesian, in {len(self._sites)} of {of} tensors, "
            f"estimator={self.estimator!r}{layers}" + (f", rank={self.rank}" if self.rank else "")
        )


def _as_one_batch(parameter: Tensor, first: Tensor) -> Tensor:
    """``[K B, ...]`` of a likelihood's parameter in K draws, which without them broadcasts to the first one's."""
    shape = parameter.shape[1:]
    whole = parameter.reshape(len(parameter), *[1] * (first.dim() - parameter.dim()), *shape)
    return whole.expand(*first.shape[:2], *whole.shape[2:]).flatten(0, 1)


def blundell_weights(batches: int) -> list[float]:
    """``pi_i = 2^(M - i) / (2^M - 1)`` for the minibatches i = 1, ..., M of an epoch: the KL counts at its beginning.

    Blundell et al. 2015 (arXiv:1505.05424), equation 8. They sum to 1; for ``kl_share`` of
    :meth:`MeanField.elbo_loss`.

    Args:
        batches: M, at least 1.

    Returns:
        M floats; not tensors, so of no shape.

    Raises:
        ValueError: a number of batches that is no int above 0.

    Example::

        weights = vaefast.bayesian.blundell_weights(469)
        assert abs(sum(weights) - 1) < 1e-12
    """
    if not is_whole(batches) or batches < 1:
        raise ValueError(f"batches must be an int >= 1, got {batches!r}")
    return [2.0**-i / (1 - 2.0**-batches) for i in range(1, batches + 1)]
