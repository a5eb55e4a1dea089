"""torch.nn modules around the functions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _arguments, _domains, _options, distributed, presets
from ._checks import Real, factor, flag, is_whole
from ._options import Composed, Likelihood, Parameterization, spelled_out
from .functional import Prior, Recon, elbo_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


class ELBOLoss(nn.Module):
    """:func:`vaefast.elbo_loss` as a module; the options are fixed when it is made, and checked then.

    A beta or a capacity in a tensor goes to the device with the module, and keeps its dtype and, by way of the meta
    device too, its number; one that was made on the meta device has none, and is NaN where ``to_empty`` brings it.

    Args:
        likelihood, parameterization, reduction: as for :func:`vaefast.elbo_terms`.
        beta: as for :func:`vaefast.elbo_terms`; or a module that gives it, such as a
            :class:`vaefast.schedules.BetaSchedule`, which is then part of this one.
        free_bits, free_bits_per, balance, capacity, symmetric, prior_parameterization: the KL's options, as for
            :func:`vaefast.gaussian_kl`.
        kl_weight: its ``weight``, unless the call gives one.
        batch_dims: as for :func:`vaefast.elbo_terms`.
        prior: as for :func:`vaefast.elbo_terms`; a module is then part of this one, and trained with it.
        preset: as for :func:`vaefast.elbo_terms`; the attributes are what it comes to.
        process_group: as for :func:`vaefast.elbo_terms`; ``"world"`` can be copied and pickled, a group cannot.
        overwrite_recon: as for :func:`vaefast.reconstruction_loss`.
        check: how many of the first calls are held against the likelihood's domain by :func:`vaefast.check`, which
            waits for the device; none under ``torch.compile``.

    Shape:
        as for :func:`vaefast.elbo_loss`; the result is in nats.

    Raises:
        TypeError, ValueError: an option or an argument that :func:`vaefast.elbo_terms` does not take.

    Example::

        criterion = vaefast.ELBOLoss(likelihood="gaussian", beta=4.0)
        loss = criterion((mean, log_var_x), x, mu, logvar)
    """

    @presets.filled_in
    @spelled_out
    def __init__(
        self, likelihood: str | Likelihood = "bernoulli", beta: Tensor | Real | nn.Module = 1.0,
        parameterization: str | Parameterization = "logvar", reduction: str = "batchmean", *,
        balance: float | None = None, preset: str | None = None, process_group: ProcessGroup | str | None = None,
        overwrite_recon: bool = False, check: int = 0, **options: Unpack[Composed],
    ) -> None:  # fmt: skip
        super().__init__()
        _options.reduction_for_elbo(reduction)
        chosen = _options.likelihood(likelihood)
        if process_group is not None:
            distributed.check(process_group, reduction, chosen)
        self.preset, self.process_group = preset, process_group
        self.likelihood, self.reduction = likelihood, reduction
        self.overwrite_recon = flag("overwrite_recon", overwrite_recon)
        if not is_whole(check) or check < 0:
            raise ValueError(f"check must be an int >= 0, how many of the first batches are checked, got {check!r}")
        self.unchecked = operator.index(check)
        self.beta = beta if isinstance(beta, nn.Module) else factor("beta", beta)
        self._numbers: dict[str, Tensor] = {}  # of factors that are on the meta device, where a tensor has none
        self.parameterization = _options.parameterization(parameterization)
        self.kl_options = _options.kl_options(reduction, balance, options)
        prior: object = self.kl_options.prior
        if isinstance(prior, nn.Module):
            self.prior = prior

    def forward(
        self, recon: Recon, target: Tensor, mu: Tensor, logvar: Tensor, prior_mu: Prior = None,
        prior_logvar: Prior = None, *, weight: Tensor | None = None, kl_weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        options = self.kl_options._asdict()
        if kl_weight is not None:
            options["kl_weight"] = kl_weight
        recon = _arguments.listed(recon)  # which are read twice
        if self.unchecked and not torch.compiler.is_compiling():
            _domains.check(recon, target, self.likelihood, weight=weight)
            self.unchecked -= 1
        return elbo_loss(
            recon,
            target,
            mu,
            logvar,
            prior_mu,
            prior_logvar,
            likelihood=self.likelihood,
            beta=self.beta() if isinstance(self.beta, nn.Module) else self.beta,
            parameterization=self.parameterization,
            reduction=self.reduction,
            weight=weight,
            **options,
            preset=self.preset,
            process_group=self.process_group,
            overwrite_recon=self.overwrite_recon,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ELBOLoss:
        """What ``to``, ``cuda`` and ``half`` go by: a beta or a capacity in a tensor follows to the device."""
        super()._apply(fn, recurse)
        if not isinstance(self.beta, (nn.Parameter, nn.Module)):
            self.beta = self._followed("beta", self.beta, fn)
        moved = {name: self._followed(name, getattr(self.kl_options, name), fn) for name in ("capacity", "kl_weight")}
        self.kl_options = self.kl_options._replace(**moved)
        return self

    def _followed(self, name: str, value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
        """The factor on the device that fn moves tensors to, in its own dtype: as a half, 1e-6 would lose digits."""
        if not isinstance(value, Tensor):
            return value
        device = fn(value).device
        if device == value.device:
            return value
        if device.type == "meta":
            self._numbers[name] = value
        elif value.is_meta:
            value = self._numbers.pop(name, torch.full_like(value, math.nan, device=device))
        return value.to(device)

    def extra_repr(self) -> str:
        return (
            ("" if self.preset is None else f"preset={self.preset!r}, ")
            + ("" if self.process_group is None else f"process_group={self.process_group!r}, ")
            + f"likelihood={self.likelihood!r}, "
            + ("" if isinstance(self.beta, nn.Module) else f"beta={self.beta!r}, ")
            + f"parameterization={self.parameterization!r}, reduction={self.reduction!r}"
            + (", overwrite_recon=True" if self.overwrite_recon else "")
            + (f", check={self.unchecked}" if self.unchecked else "")
            + "".join(f", {name}={value!r}" for name, value in self.kl_options.changed().items())
        )
