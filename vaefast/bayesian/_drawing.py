"""The posterior's tensors beside a module's own, their draw in one call, and the module run with it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _arguments, _backends, _compose
from .._checks import choice, is_whole
from .._engine import Posteriors
from .._gaussian import softplus, wide
from .._options import PLAIN
from . import _low_rank
from ._estimators import ESTIMATORS, LAYERS, Noise, attach
from ._priors import Gaussian, Given, column, priors_of
from ._sites import Site, Where, in_place_of, sites
from ._start import Start, raw_std

SOFTPLUS = PLAIN["softplus"]
LOG_2PI = math.log(2 * math.pi)
# by way of which a KL to a prior is reached that has no closed form
REFERENCE = 0.0, 0.0


class Draw(NamedTuple):
    """The chosen parameters, each drawn, or None where the layer runs at its mean and ``spreads`` makes the noise."""

    weights: list[Tensor | None]
    spreads: list[tuple[Tensor, Tensor | None]]
    kl: Tensor


class Drawing(nn.Module):
    """What :class:`MeanField` does at each call."""

    def __init__(self, module: nn.Module, prior: Given, init: Start, where: Where, estimator: str, rank: int) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        choice("estimator", estimator, tuple(ESTIMATORS))
        if not is_whole(rank) or rank < 0:
            raise ValueError(f"rank must be an int >= 0, the columns of the low-rank factor, got {rank!r}")
        self.estimator, self.rank = estimator, int(rank)
        self.module = module
        self._sites = sites(module, where)
        names, parameters = [s.name for s in self._sites], [s.parameter for s in self._sites]
        self._priors = priors_of(prior, names, parameters)
        self.priors = nn.ModuleList(dict.fromkeys(p for p in self._priors if isinstance(p, nn.Module)))
        self._estimated = [i for i, p in enumerate(self._priors) if not isinstance(p, Gaussian)]
        self.rho, self._rhos = _beside(self._sites, [raw_std(init, name, p) for name, p in zip(names, parameters)])
        if self.rank and self.estimator != "weights":
            raise ValueError(f"rank={rank} goes with estimator='weights' alone, got {estimator!r}")
        self._noises = self._attached()
        if self.rank:
            starts = [_low_rank.start(rho, self.rank) for rho in self._raw()]
            self.factor, self._factors = _beside(self._sites, starts)
        self._last: tuple[Tensor, int] | None = None

    def _attached(self) -> list[Noise]:
        kind = ESTIMATORS[self.estimator]
        if kind is None:
            return []
        found = attach(kind, self.module, self._sites)
        if not found:
            kinds = ", ".join(layer.__name__ for layer in LAYERS)
            raise ValueError(
                f"estimator={self.estimator!r} applies to {kinds}, whose weight has a posterior and is not tied or "
                "reparametrized, and the module has none; use 'weights'"
            )
        covered = {i for noise in found for i in (noise.weight, noise.bias)}
        if self.estimator == "local" and covered.intersection(self._estimated):
            raise ValueError(
                "estimator='local' draws no weights, at which the KL to a prior with log_prob is estimated; use "
                "'flipout' or 'weights', or a Gaussian prior"
            )
        return found

    def _raw(self) -> list[Tensor]:
        return [module._parameters[leaf] for module, leaf in self._rhos]  # type: ignore[misc]

    def _draws(self, count: object, antithetic: bool, generator: torch.Generator | None) -> Iterator[Draw]:
        if not is_whole(count) or count < 1:
            raise ValueError(f"num_samples must be None or an int >= 1, got {count!r}")
        if antithetic and self._noises:
            raise ValueError(f"antithetic=True goes with estimator='weights' alone, got {self.estimator!r}")
        before = None
        for _ in range(count):
            if antithetic and before is not None:
                yield self._mirrored(before)
                before = None
            else:
                before = self._draw(generator)
                yield before

    def _mirrored(self, draw: Draw) -> Draw:
        weights: list[Tensor | None] = [
            None if w is None else 2 * site.parameter - w for site, w in zip(self._sites, draw.weights)
        ]
        return draw._replace(weights=weights, kl=draw.kl - self._towards(draw.weights) + self._towards(weights))

    def _draw(self, generator: torch.Generator | None, by_weights: bool = False) -> Draw:
        everything = range(len(self._sites))
        noises = [] if by_weights else self._noises
        covered = {i for noise in noises for i in (noise.weight, noise.bias) if i >= 0}
        if self.estimator != "local":
            weights, kl = self._fused(everything, generator, sample=True)
        elif not noises or len(covered) < len(everything):
            drawn = [i for i in everything if i not in covered]
            of_drawn, kl = self._fused(drawn, generator, sample=True)
            weights = [None] * len(everything)
            for i, w in zip(drawn, of_drawn):
                weights[i] = w
            if covered:
                kl = kl + self._fused(sorted(covered), None, sample=False)[1]
        else:
            weights, kl = self._fused(everything, None, sample=False)
        kl = kl + self._towards(weights) if self._estimated else kl
        if not noises:
            return Draw(weights, [], kl)
        spread = self._perturbations(weights) if self.estimator == "flipout" else self._stds(covered)
        spreads = [(spread[n.weight], spread[n.bias] if n.bias >= 0 else None) for n in noises]
        return Draw([None if i in covered else w for i, w in enumerate(weights)], spreads, kl)

    def _perturbations(self, weights: Sequence[Tensor | None]) -> dict[int, Tensor]:
        return {i: w - self._sites[i].parameter for i, w in enumerate(weights) if w is not None}

    def _stds(self, which: set[int]) -> dict[int, Tensor]:
        raw = self._raw()
        return {i: softplus(wide(raw[i])) for i in which}

    def _fused(
        self, which: Sequence[int], generator: torch.Generator | None, *, sample: bool
    ) -> tuple[list[Tensor | None], Tensor]:
        """Those parameters, if they are to be drawn, and their KL to their Gaussian priors, in one call."""
        raw = self._raw()
        mus, rhos = [self._sites[i].parameter for i in which], [raw[i] for i in which]
        moments = self._moments(which)
        means, logvars = (column(values, mus) for values in zip(*moments))
        many = Posteriors(mus, rhos, *means, *logvars, SOFTPLUS)
        if generator is not None:
            _arguments.noise(None, None, generator, mus[0], None)
        of_most_dims = mus[0]
        for mu in mus:
            of_most_dims = mu if mu.dim() > of_most_dims.dim() else of_most_dims
        engine = _backends.engine(of_most_dims, beside=(*mus, *rhos, *means[0], *logvars[0]))
        if not sample:
            kl = _compose.multi_kl(engine, many, "sum", 1)
            weights: list[Tensor | None] = [None] * len(mus)
        else:
            drawn, kl = _compose.multi_sample_with_kl(engine, many, "sum", 1, generator)
            weights = [*drawn]
        self._forget_behind(kl)
        if self.rank:
            factors: list[Any] = [module._parameters[leaf] for module, leaf in self._factors]
            kl = kl + _low_rank.extra_kl(factors, rhos, [logvar for _, logvar in moments])
            if sample:
                c = torch.randn(self.rank, generator=generator, dtype=kl.dtype, device=kl.device)
                weights = [*_low_rank.displaced(drawn, factors, c)]
        return weights, kl

    def _moments(self, which: Sequence[int]) -> list[tuple[Tensor | float, Tensor | float]]:
        found: list[tuple[Tensor | float, Tensor | float]] = []
        for i in which:
            prior = self._priors[i]
            found.append((prior.mean, prior.logvar) if isinstance(prior, Gaussian) else REFERENCE)
        return found

    def _towards(self, weights: Sequence[Tensor | None]) -> Tensor:
        """log N(w; 0, I) - log p(w), whose mean the KL to those priors is larger than that to N(0, I)."""
        total = torch.zeros((), device=self._sites[0].parameter.device)
        for i in self._estimated:
            w = weights[i]
            assert w is not None
            w = wide(w)
            total = total - 0.5 * (w.square() + LOG_2PI).sum() - self._priors[i].log_prob(w).sum()
        return total

    @contextmanager
    def _in_place(self, draw: Draw, generator: torch.Generator | None) -> Iterator[None]:
        places, values = [], []
        for site, w in zip(self._sites, draw.weights):
            if w is not None:
                places += site.places
                values += [w] * len(site.places)
        try:
            for noise, spread in zip(self._noises, draw.spreads):
                noise.spread, noise.generator = spread, generator
            with in_place_of(places, values):
                yield
        finally:
            for noise in self._noises:
                noise.spread = noise.generator = None

    def _run(self, draw: Draw, generator: torch.Generator | None, args: Any, kwargs: Any) -> Any:
        with self._in_place(draw, generator):
            return self.module(*args, **kwargs)

    # ---- the KL that belongs to the last call

    def _remembered(self) -> Tensor | None:
        if self._last is not None:
            kl, versions = self._last
            if torch.compiler.is_compiling():
                return kl
            lacks_gradient = torch.is_grad_enabled() and not kl.requires_grad and self._trained()
            if versions == self._versions() and not lacks_gradient:
                return kl
        return None

    def _posteriors(self) -> Iterator[Tensor]:
        for site in self._sites:
            yield site.parameter
        yield from self.rho.parameters()
        yield from self.priors.parameters()
        if self.rank:
            yield from self.factor.parameters()

    def _trained(self) -> bool:
        return any(p.requires_grad for p in self._posteriors())

    def _versions(self) -> int:
        return sum(0 if p.is_inference() else p._version for p in self._posteriors())

    def _remember(self, kl: Tensor) -> None:
        if torch.compiler.is_compiling():
            self._last = kl, 0
        # what checkpointing runs again in backward is no forward of the user's
        elif torch._C._current_graph_task_id() == -1:
            self._last = kl, self._versions()

    def _forget_behind(self, kl: Tensor) -> None:
        """After a backward pass through its node, which frees what it keeps, the KL is computed anew."""
        if torch.compiler.is_compiling() or kl.grad_fn is None:
            return
        of = weakref.ref(self)

        def forget(gradients: object) -> None:
            mine = of()
            if mine is not None:
                mine._last = None

        kl.grad_fn.register_prehook(forget)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Drawing:
        self._last = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which have no part in the last call's graph."""
        return {**self.__dict__, "_last": None}


class Beside(nn.Module):
    """Tensors that are printed with their number alone: what they belong to is printed already."""

    def __repr__(self) -> str:
        return f"{len(list(self.parameters()))} tensors"


def _beside(sites: Sequence[Site], values: Sequence[Tensor]) -> tuple[nn.Module, list[tuple[nn.Module, str]]]:
    """A tree of modules with a parameter for each site, under the site's own name; and where they stand."""
    root = Beside()
    found: list[tuple[nn.Module, str]] = []
    for site, value in zip(sites, values):
        *path, leaf = site.name.split(".")
        at: nn.Module = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]  # type: ignore[assignment]
        at.register_parameter(leaf, nn.Parameter(value))
        found.append((at, leaf))
    return root, found
