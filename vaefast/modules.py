"""torch.nn modules around the functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import _options, distributed, presets
from ._checks import Real, factor, flag
from ._options import Composed, Likelihood, Parameterization, spelled_out
from .functional import Prior, Recon, elbo_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


class ELBOLoss(nn.Module):
    """:func:`vaefast.elbo_loss` as a module; the options are fixed when it is made, and checked then.

    Args:
        likelihood, beta, parameterization, reduction: as for :func:`vaefast.elbo_terms`.
        free_bits, free_bits_per, balance, capacity, symmetric, prior_parameterization: the KL's options, as for
            :func:`vaefast.gaussian_kl`.
        kl_weight: its ``weight``, unless the call gives one.
        preset: as for :func:`vaefast.elbo_terms`; the attributes are what it comes to.
        process_group: as for :func:`vaefast.elbo_terms`; ``"world"`` can be copied and pickled, a group cannot.
        overwrite_recon: as for :func:`vaefast.reconstruction_loss`.

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
        self,
        likelihood: str | Likelihood = "bernoulli",
        beta: Tensor | Real = 1.0,
        parameterization: str | Parameterization = "logvar",
        reduction: str = "batchmean",
        *,
        balance: float | None = None,
        preset: str | None = None,
        process_group: ProcessGroup | str | None = None,
        overwrite_recon: bool = False,
        **options: Unpack[Composed],
    ) -> None:
        super().__init__()
        _options.reduction_for_elbo(reduction)
        chosen = _options.likelihood(likelihood)
        if process_group is not None:
            distributed.check(process_group, reduction, chosen)
        self.preset, self.process_group = preset, process_group
        self.likelihood, self.reduction = likelihood, reduction
        self.overwrite_recon = flag("overwrite_recon", overwrite_recon)
        self.beta = factor("beta", beta)
        self.parameterization = _options.parameterization(parameterization)
        self.kl_options = _options.kl_options(reduction, balance, options)

    def forward(
        self,
        recon: Recon,
        target: Tensor,
        mu: Tensor,
        logvar: Tensor,
        prior_mu: Prior = None,
        prior_logvar: Prior = None,
        *,
        weight: Tensor | None = None,
        kl_weight: Tensor | None = None,
    ) -> Tensor:
        options = self.kl_options._asdict()
        if kl_weight is not None:
            options["kl_weight"] = kl_weight
        return elbo_loss(
            recon,
            target,
            mu,
            logvar,
            prior_mu,
            prior_logvar,
            likelihood=self.likelihood,
            beta=self.beta,
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
        if not isinstance(self.beta, nn.Parameter):
            self.beta = _followed(self.beta, fn)
        moved = {name: _followed(getattr(self.kl_options, name), fn) for name in ("capacity", "kl_weight")}
        self.kl_options = self.kl_options._replace(**moved)
        return self

    def extra_repr(self) -> str:
        return (
            ("" if self.preset is None else f"preset={self.preset!r}, ")
            + ("" if self.process_group is None else f"process_group={self.process_group!r}, ")
            + f"likelihood={self.likelihood!r}, beta={self.beta!r}, "
            f"parameterization={self.parameterization!r}, reduction={self.reduction!r}"
            + (", overwrite_recon=True" if self.overwrite_recon else "")
            + "".join(f", {name}={value!r}" for name, value in self.kl_options.changed().items())
        )


def _followed(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The factor on the device that fn moves tensors to, in its own dtype: as a half, 1e-6 would lose its digits."""
    if not isinstance(value, Tensor):
        return value
    moved = fn(value)
    if moved.device == value.device:
        return value
    return moved.to(value.dtype) if value.is_meta else value.to(moved.device)
