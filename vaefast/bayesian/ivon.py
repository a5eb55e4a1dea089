"""IVON, the variational Adam: a mean-field posterior whose scales are what the optimizer keeps anyway."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import _backends
from .._checks import FLOATING, Real, flag, is_real
from .._gaussian import wide


class IVON(torch.optim.Optimizer):
    """Improved variational online Newton: Adam's cost, and a posterior N(m, 1 / (ess (h + weight_decay))) for it.

    Shen et al. 2024 (arXiv:2402.17641), algorithm 1. Of each step, with theta = m + sigma eps, its gradient g' and
    ``h' = g' (theta - m) / sigma^2``::

        g = beta1 g + (1 - beta1) g'
        h = beta2 h + (1 - beta2) h' + (1 - beta2)^2 (h - h')^2 / (2 (h + delta))
        m = m - lr (g / (1 - beta1^t) + delta m) / (h + delta)

    h estimates the loss's second derivatives; h + delta stays above 0. The loss is a mean nll, without a KL and without
    weight decay: the prior N(0, 1 / (ess delta)) is in the step. Parameters hold the mean m, but within
    :meth:`sampled_params` a draw.

    Args:
        params: tensors of floating dtype, or groups of them with options of their own.
        lr: the step size.
        ess: the effective sample size lambda: the number of examples of the data set; less tempers the posterior.
        beta1: of the gradient's average.
        beta2: of h's, close to 1.
        weight_decay: delta, the prior's precision divided by ess; above 0.
        hess_init: where h starts; small ones start from a wide posterior.
        clip_radius: the largest absolute value of a step divided by lr; infinite is none.
        rescale_lr: whether lr is times ``hess_init + delta``, as in the authors' code, so that the first steps are
            those of SGD with lr.

    Shape:
        parameters of any shape; for each there are g and h of its shape, in float32 at least.

    Raises:
        TypeError, ValueError: an option out of its range, or parameters of no floating dtype.

    Example::

        network = nn.Linear(784, 10)
        ivon = vaefast.bayesian.IVON(network.parameters(), lr=0.1, ess=60_000)
        with ivon.sampled_params(train=True):
            ivon.zero_grad()
            F.cross_entropy(network(x), labels).backward()
        ivon.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Real,
        ess: Real,
        *,
        beta1: Real = 0.9,
        beta2: Real = 0.99999,
        weight_decay: Real = 1e-4,
        hess_init: Real = 1.0,
        clip_radius: Real = math.inf,
        rescale_lr: bool = True,
    ) -> None:
        defaults = {
            "lr": lr, "ess": ess, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay,
            "hess_init": hess_init, "clip_radius": clip_radius, "rescale_lr": flag("rescale_lr", rescale_lr), "step": 0,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`torch.optim.Optimizer.add_param_group`; options are checked, and each parameter's state is made."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "ess", "weight_decay", "hess_init", "clip_radius"):
            if not is_real(group[name]) or not group[name] > 0:
                raise ValueError(f"{name} must be a number above 0, got {group[name]!r}")
        for name in ("beta1", "beta2"):
            if not is_real(group[name]) or not 0 <= group[name] < 1:
                raise ValueError(f"{name} must be a number from 0 to below 1, got {group[name]!r}")
        for p in group["params"]:
            if p.dtype not in FLOATING:
                raise TypeError(f"parameters must be float16, bfloat16, float32 or float64, got {p.dtype}")
            dtype = torch.promote_types(p.dtype, torch.float32)
            self.state[p] = {
                "momentum": torch.zeros_like(p, dtype=dtype, requires_grad=False),
                "hess": torch.full_like(p, group["hess_init"], dtype=dtype, requires_grad=False),
            }

    def _draw(self, group: dict[str, Any], generator: torch.Generator | None) -> tuple[list[Tensor], ...]:
        """The parameters, which are a draw now; what they were; and the difference."""
        params = group["params"]
        hess = [self.state[p]["hess"] for p in params]
        means, noises = [torch.empty_like(p) for p in params], [torch.empty_like(h) for h in hess]
        kernels = _backends.kernels()
        numbers = group["ess"], group["weight_decay"]
        if kernels is not None and kernels.ivon_draw(params, means, noises, hess, *numbers, generator):
            return params, means, noises
        torch._foreach_copy_(means, params)
        variance = torch._foreach_add(hess, group["weight_decay"])
        torch._foreach_mul_(variance, group["ess"])
        torch._foreach_rsqrt_(variance)
        for noise in noises:
            noise.normal_(generator=generator)
        torch._foreach_mul_(noises, variance)
        torch._foreach_copy_(params, torch._foreach_add([wide(m) for m in means], noises))
        return params, means, noises

    @contextmanager
    def sampled_params(self, train: bool = False, generator: torch.Generator | None = None) -> Iterator[None]:
        """Within the ``with`` block the parameters are a draw from the posterior; behind it they are its mean again.

        The tensors stay the same, each of its own shape, and are written to in place.

        Args:
            train: whether the gradients that are there at the end of the block are this draw's: forward and backward
                lie within it. Several blocks before a step are averaged.
            generator: where the noise comes from; the default generator of each parameter's device if None. Ranks that
                average gradients must draw the same.

        Raises:
            RuntimeError: no parameter has a gradient at the end of a block for training, or one is sparse.

        Example::

            network = nn.Linear(784, 10)
            ivon = vaefast.bayesian.IVON(network.parameters(), lr=0.1, ess=60_000)
            with torch.no_grad(), ivon.sampled_params():
                logits = network(x)  # of one network from the posterior
        """
        with torch.no_grad():
            drawn = [self._draw(group, generator) for group in self.param_groups]
        params, means, noises = (list(itertools.chain(*lists)) for lists in zip(*drawn))
        try:
            yield
            if train:
                self._collect(params, noises)
        finally:
            with torch.no_grad():
                torch._foreach_copy_(params, means)

    @torch.no_grad()
    def _collect(self, params: Sequence[Tensor], noises: Sequence[Tensor]) -> None:
        """This draw's gradient, and that times its noise, into the means over a step's draws."""
        if all(p.grad is None for p in params):
            raise RuntimeError(
                "sampled_params(train=True) ended without a gradient; call backward() within its block, and "
                "zero_grad() before that"
            )
        for p, noise in zip(params, noises):
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError("IVON takes no sparse gradients; make the embedding with sparse=False")
            state = self.state[p]
            # as the noise lies in memory, whatever the gradient's order
            gradient = torch.zeros_like(noise) if p.grad is None else torch.empty_like(noise).copy_(p.grad)
            # draws are counted by parameter: a state_dict between two draws of a step brings them back
            state["draws"] = state.get("draws", 0) + 1
            for name, value in (("product", noise.mul_(gradient)), ("gradient", gradient)):
                state[name] = value if name not in state else state[name].lerp_(value, 1 / state["draws"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of m, g and h, each of its parameter's shape, from the draws since the last one.

        Args:
            closure: None, or a function that draws, by :meth:`sampled_params`, computes the gradients and returns the
                loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: there was no draw.

        Example::

            network = nn.Linear(784, 10)
            ivon = vaefast.bayesian.IVON(network.parameters(), lr=0.1, ess=60_000)
            with ivon.sampled_params(train=True):
                F.cross_entropy(network(x), labels).backward()
            ivon.step()
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        params = group["params"]
        states = [self.state[p] for p in params]
        if not all("draws" in state for state in states):
            raise RuntimeError("step() needs a draw before it: a backward pass within sampled_params(train=True)")
        group["step"] += 1
        beta1, beta2, delta = group["beta1"], group["beta2"], group["weight_decay"]
        rate = group["lr"] * (group["hess_init"] + delta if group["rescale_lr"] else 1.0)
        numbers = group["ess"], delta, beta1, beta2, 1 / (1 - beta1 ** group["step"]), rate, group["clip_radius"]
        momentum, hess, gradient, product = (
            [state[name] for state in states] for name in ("momentum", "hess", "gradient", "product")
        )
        kernels = _backends.kernels()
        if kernels is None or not kernels.ivon_step(params, momentum, hess, gradient, product, *numbers):
            _step(params, momentum, hess, gradient, product, *numbers)
        for state in states:
            for name in ("draws", "gradient", "product"):
                del state[name]


def _step(
    params: list[Tensor],
    momentum: list[Tensor],
    hess: list[Tensor],
    gradient: list[Tensor],
    product: list[Tensor],
    ess: float,
    delta: float,
    beta1: float,
    beta2: float,
    unbias: float,
    rate: float,
    clip_radius: float,
) -> None:
    """``csrc/ivon.h`` in PyTorch's operators."""
    torch._foreach_lerp_(momentum, gradient, 1 - beta1)
    # h' = g' (theta - m) / sigma^2, and 1 / sigma^2 is ess (h + delta)
    curved = torch._foreach_add(hess, delta)
    torch._foreach_mul_(product, curved)
    torch._foreach_mul_(product, ess)
    apart = torch._foreach_sub(product, hess)
    torch._foreach_add_(hess, apart, alpha=1 - beta2)
    square = torch._foreach_mul(apart, apart)
    torch._foreach_div_(square, curved)
    torch._foreach_add_(hess, square, alpha=0.5 * (1 - beta2) ** 2)

    means = [wide(p) for p in params]
    step = torch._foreach_mul(momentum, unbias)
    torch._foreach_add_(step, means, alpha=delta)
    torch._foreach_div_(step, torch._foreach_add(hess, delta))
    if math.isfinite(clip_radius):
        torch._foreach_clamp_max_(step, clip_radius)
        torch._foreach_clamp_min_(step, -clip_radius)
    torch._foreach_copy_(params, torch._foreach_sub(means, step, alpha=rate))
