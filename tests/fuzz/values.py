"""A case's tensors: values from training's range, next to the prior, at the ends and beyond, lying in memory anyhow."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vaefast.reference import DOMAINS

from .cases import Case

# what comes in where least expected
WILD = (0.0, -0.0, 1e-45, 1e-38, -1e-38, 1e38, -1e38, math.inf, -math.inf, math.nan, 1e4, -1e4, 1.0, -1.0, 88.0, -104.0)
# where it is at least 0
WILD_POSITIVE = (1e-38, 1e-30, 1e-12, 1e38, math.inf, math.nan, 1e6, 1.0, 1e15)
# the order in which a case's tuples go through its tensors
NAMES = (
    "mu", "raw", "prior_mu", "prior_logvar", "eps", "target", "recon0", "recon1", "recon2", "weight", "kl_weight",
    "recon3",
)  # fmt: skip

TRAINING: dict[str, Callable[[Tensor], Tensor]] = {
    "real": lambda n: 2 * n,
    "log": lambda n: n,
    "positive": torch.exp,
    "unit": lambda n: torch.sigmoid(2 * n),
    "total": lambda n: torch.exp(n).ceil() + 3,
    "planes": lambda n: 0.5 * n,
    "rho": lambda n: 3 * n,
}
EXTREMES = {
    **{name: domain.extremes for name, domain in DOMAINS.items()},
    "rho": (-200.0, -104.0, -45.0, -39.0, -1.0, 0.0, 1e-8, 20.0, 41.0, 200.0),
}
NEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "positive": torch.exp,
    "unit": lambda small: 0.5 + 0.4 * small.clamp(-1, 1),
    "total": lambda small: 3 + torch.zeros_like(small),
}


class Values:
    """Draws the tensors of a case, each from a generator of its own."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def turn(self, name: str, of: tuple[object, ...]) -> object:
        return of[NAMES.index(name.partition("@")[0]) % len(of)]

    def generator(self, name: str) -> torch.Generator:
        number = NAMES.index(name.partition("@")[0]) + 31 * int(name.partition("@")[2] or 0)
        return torch.Generator().manual_seed(self.case.seed * 1009 + number)

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, str(self.turn(name, self.case.dtypes)))  # type: ignore[no-any-return]

    def numbers(self, name: str, domain: str, shape: tuple[int, ...]) -> Tensor:
        """In float64."""
        g, kind = self.generator(name), self.turn(name, self.case.kinds)
        normal = torch.randn(shape, generator=g, dtype=torch.float64)
        if kind == "near":
            small = normal * 10 ** (-15 * torch.rand((), generator=g, dtype=torch.float64))
            return NEAR.get(domain, lambda x: x)(small)
        found = TRAINING[domain](normal)
        if kind == "training":
            return found
        wild = WILD_POSITIVE if domain in ("positive", "total") else WILD
        pool = torch.tensor(EXTREMES[domain] if kind == "extreme" else wild, dtype=torch.float64)
        picked = pool[torch.randint(len(pool), shape, generator=g)]
        share = 1.0 if kind == "extreme" else float(torch.rand((), generator=g)) ** 3
        return torch.where(torch.rand(shape, generator=g) < share, picked, found)

    def tensor(self, name: str, domain: str, shape: tuple[int, ...]) -> Tensor:
        return self.laid_out(name, self.numbers(name, domain, shape).to(self.dtype(name)))

    def laid_out(self, name: str, x: Tensor) -> Tensor:
        """The same values, but where the layout repeats some, elsewhere in memory."""
        return LAID_OUT[str(self.turn(name, self.case.layouts))](x, self.generator(name))


def _permuted(x: Tensor, g: torch.Generator) -> Tensor:
    order = torch.randperm(x.dim(), generator=g).tolist()
    return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])


def _overlapping(x: Tensor, _: torch.Generator) -> Tensor:
    if not x.numel():
        return x
    length = sum(n - 1 for n in x.shape) + 1
    return x.flatten()[:length].clone().as_strided(x.shape, [1] * x.dim())


def _padded(x: Tensor, _: torch.Generator) -> Tensor:
    return torch.nn.functional.pad(x, (0, 3), value=math.nan)[..., : x.shape[-1]] if x.dim() else x


LAID_OUT: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "contiguous": lambda x, g: x,
    "misaligned": lambda x, g: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "every second": lambda x, g: x.repeat_interleave(2, -1)[..., 1::2] if x.dim() else x,
    "transposed": lambda x, g: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x,
    "second chunk": lambda x, g: torch.cat((x, x), -1).chunk(2, -1)[1] if x.dim() and x.shape[-1] else x,
    "expanded rows": lambda x, g: x[:1].expand(x.shape) if x.dim() and x.numel() else x,
    "expanded columns": lambda x, g: x[..., :1].expand(x.shape) if x.dim() and x.numel() else x,
    "overlapping": _overlapping,
    "permuted": _permuted,
    "padded rows": _padded,
}
