"""What a workload is: a computation, the sizes and inputs of it, and several ways to do it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]


class Draw:
    """Random inputs: the same numbers on every device and in every run, repeated where there are more than BLOCK."""

    BLOCK = 1 << 24

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return self._repeated(shape, lambda n: torch.empty(n).normal_(mean, std, generator=self.generator))

    def uniform(self, *shape: int) -> Tensor:
        return self._repeated(shape, lambda n: torch.rand(n, generator=self.generator))

    def _repeated(self, shape: tuple[int, ...], draw: Callable[[int], Tensor]) -> Tensor:
        n = math.prod(shape)
        if self.device.type == "meta":
            return torch.empty(shape, device="meta")
        block = draw(min(n, self.BLOCK)).to(self.device)
        return (block if n <= self.BLOCK else block.repeat(-(-n // self.BLOCK))[:n]).view(shape)


@dataclass(frozen=True)
class Workload:
    """One thing to compute, in several ways.

    Args:
        name: as shown and filtered by.
        what: one line for readers.
        sizes: the sizes that ``make`` takes; tests and sweeps scale each of them.
        make: inputs from a :class:`Draw` and the sizes; those that are trained require grad.
        eager: PyTorch as people write it.
        vaefast: the same through vaefast.
        distributions: the same through torch.distributions, where that is simple.
        posteriors: from the inputs, (mean, std) of every sample; the first outputs are those samples, in that order.
            The eager implementation draws their noise by ``torch.randn_like``. None where nothing is sampled.
        reread: inputs that backward has to read again, because it needs a gradient that only comes later; for the bytes
            that any implementation has to move.
        pairs: names of sizes: the textbook makes a float32 tensor of all of them, which can be far beyond its inputs.
        optimizer: the inputs but the first, which is data, are a model's parameters, and a step ends with Adam's.
        modes: of the harness's; the first is run where none is asked for that it has.
    """

    name: str
    what: str
    sizes: Mapping[str, int]
    make: Callable[..., list[Tensor]]
    eager: Function
    vaefast: Function
    distributions: Function | None = None
    posteriors: Callable[..., list[tuple[Tensor, Tensor]]] | None = None
    reread: tuple[int, ...] = ()
    pairs: tuple[str, ...] = ()
    optimizer: bool = False
    modes: tuple[str, ...] = ("fb", "f")

    def scaled(self, *factors: float) -> dict[str, int]:
        """The sizes, each times its factor, or all times the only one, and at least 1."""
        factors = factors if len(factors) > 1 else factors * len(self.sizes)
        return {name: max(1, round(size * f)) for (name, size), f in zip(self.sizes.items(), factors)}

    def _shapes(self, *factors: float) -> list[Tensor]:
        """The inputs at those sizes, without their data; a model's parameters, which have one size, left out."""
        tensors = self.make(Draw(torch.device("meta")), **self.scaled(*factors))
        return [t for t in tensors if not (self.optimizer and t.requires_grad)]

    def elements(self, *factors: float) -> int:
        """Of the largest input."""
        return max(t.numel() for t in self._shapes(*factors))

    def footprint(self, *factors: float) -> int:
        """Bytes of the inputs and of their gradients."""
        return sum(t.numel() * t.element_size() * (1 + t.requires_grad) for t in self._shapes(*factors))

    def memory(self, *factors: float) -> int:
        """The footprint, and what the textbook's tensor of pairs and its gradient take."""
        sizes = self.scaled(*factors)
        pairs = 8 * math.prod(sizes[name] for name in self.pairs) if self.pairs else 0
        return self.footprint(*factors) + pairs

    @staticmethod
    def largest(count: Callable[[float], int], limit: int) -> float:
        """The largest factor for all sizes, to a millionth, whose ``elements`` or ``footprint`` is within the limit; or
        the smallest that matters."""
        low, high = 1e-12, 1.0
        while count(high) <= limit:
            high *= 2
        while high / low > 1 + 1e-6:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if count(middle) <= limit else (low, middle)
        return low
