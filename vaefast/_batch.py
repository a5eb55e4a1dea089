"""Several batch dimensions as one: what ``batch_dims`` comes to, before anything is computed and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._engine import Moments, Pair, Posteriors, Reconstruction
from ._options import ELBOTerms, KLOptions, Likelihood


class Batch:
    """The first ``dims`` dimensions of x, and of all that goes with it, taken together in the order in which they lie
    in x's memory: views, where the others lie alike. A sample of PyTorch's ``noise`` goes by their own order."""

    def __init__(self, x: Tensor, dims: int, noise: str = "philox") -> None:
        self.dims, self.shape, self.noise = dims, x.shape[:dims], noise
        strides = x.stride()
        self.order: list[int] = []
        for d in range(dims):
            # by hand, for Dynamo does not trace sorted() over symbolic strides; and as PyTorch orders what it makes
            # like x: what is expanded comes before nothing and behind nothing
            self.order.append(d)
            place = d
            for k in range(d - 1, -1, -1):
                before = strides[self.order[k]]
                if noise != "philox" or before > strides[d] > 0:
                    break
                if 0 < before < strides[d]:
                    self.order[place], self.order[k] = self.order[k], d
                    place = k

    def reorders(self, x: Tensor) -> bool:
        """Whether a sample of what :meth:`flat` makes of x lies in another order of memory than one of x, and so would
        have other noise."""
        in_order = x.is_contiguous() and self.order == list(range(self.dims))
        if self.noise != "philox" or in_order:
            return False
        like = torch.empty_strided(x.shape, x.stride(), device="meta")
        there = self.restored(torch.empty_like(self.flat(like, like))).stride()
        return any(n > 1 and a != b for n, a, b in zip(x.shape, torch.empty_like(like).stride(), there))

    def flat(self, x: Any, like: Tensor) -> Any:
        """x, which if it is a tensor broadcasts to ``like``, whose batch this is."""
        if not isinstance(x, Tensor):
            return x
        own = x.dim() - (like.dim() - self.dims)  # batch dimensions that x has
        if own <= 0:
            return x
        if all(size == 1 for size in x.shape[:own]):
            return x.reshape(1, *x.shape[own:])
        full = x.expand(*self.shape, *x.shape[own:])
        return full.permute(*self.order, *range(self.dims, full.dim())).flatten(0, self.dims - 1)

    def restored(self, x: Tensor, reduction: str = "none") -> Tensor:
        """A result with the batch's own dimensions, where the reduction has left it one."""
        if reduction not in ("none", "per_sample"):
            return x
        apart: Tensor = torch.unflatten(x, 0, [self.shape[d] for d in self.order])
        back = [self.order.index(d) for d in range(self.dims)]
        return apart.permute(*back, *range(self.dims, apart.dim()))

    def terms(self, found: ELBOTerms, reduction: str) -> ELBOTerms:
        return ELBOTerms(*(self.restored(term, reduction) for term in found))

    def pair(self, of: Pair) -> Pair:
        mu, raw, pm, plv, p = of
        return Pair(self.flat(mu, mu), self.flat(raw, mu), self.flat(pm, mu), self.flat(plv, mu), p)

    def options(self, o: KLOptions, mu: Tensor) -> KLOptions:
        return o._replace(batch_dims=1, kl_weight=self.flat(o.kl_weight, mu))

    def reconstruction(self, of: Reconstruction) -> Reconstruction:
        first, weight, likelihood = of.params[0], of.weight, of.likelihood
        if "dim" in likelihood.options:
            likelihood, dim = self._mixture(likelihood, first)
            # a weight is of sites, which lack that dimension
            sites = first.select(dim, 0) if first.shape[dim] else first.sum(dim)
            weight = self.flat(weight, sites)
        else:
            weight = self.flat(weight, first)
        target = self.flat(of.target, of.target)
        return Reconstruction([self.flat(p, first) for p in of.params], target, weight, likelihood, of.overwrite)

    def posteriors(self, many: Posteriors) -> Posteriors:
        mus, raws, pms, pm, plvs, plv, p = many

        def each(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [self.flat(t, mu) for t, mu in zip(tensors, mus)]

        return Posteriors(each(mus), each(raws), each(pms), pm, each(plvs), plv, p)

    def moments(self, of: Moments) -> Moments:
        moments, dim, p, given = of
        behind("dim", dim, self.dims)
        prior = None if given is None else (self.flat(given[0], moments), given[1])
        return Moments(self.flat(moments, moments), dim - self.dims + 1, p, prior)

    def _mixture(self, likelihood: Likelihood, first: Tensor) -> tuple[Likelihood, int]:
        dim = int(likelihood.options["dim"]) % first.dim()
        behind(f"dim of {likelihood!r}", dim, self.dims)
        shifted = Likelihood(likelihood.name, **{**likelihood.options, "dim": dim - self.dims + 1})
        return shifted, dim


def behind(name: str, dim: int, batch_dims: int) -> None:
    if dim < batch_dims:
        raise ValueError(
            f"{name} is {dim}, which is one of the batch (batch_dims={batch_dims}); it takes a dimension behind them, "
            "which may be counted from the end"
        )
