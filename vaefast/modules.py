"""torch.nn modules around the functions."""

from __future__ import annotations

from torch import Tensor, nn

from . import _args
from ._args import KLOptions, Likelihood, Parameterization, Real
from .functional import Prior, Recon, elbo_loss


class ELBOLoss(nn.Module):
    """:func:`vaefast.elbo_loss` as a module; the options are fixed when it is made, and checked then.

    Args:
        likelihood, beta, parameterization, reduction: as for :func:`vaefast.elbo_terms`.
        free_bits, free_bits_per, balance, capacity, symmetric: the KL's options, as for :func:`vaefast.gaussian_kl`.

    Shape:
        as for :func:`vaefast.elbo_loss`; the result is in nats.

    Raises:
        TypeError, ValueError: an option or an argument that :func:`vaefast.elbo_terms` does not take.

    Example::

        criterion = vaefast.ELBOLoss(likelihood="gaussian", beta=4.0)
        loss = criterion((mean, log_var_x), x, mu, logvar)
    """

    def __init__(
        self,
        likelihood: str | Likelihood = "bernoulli",
        beta: Tensor | Real = 1.0,
        parameterization: str | Parameterization = "logvar",
        reduction: str = "batchmean",
        *,
        free_bits: float = 0.0,
        free_bits_per: str = "dim",
        balance: float | None = None,
        capacity: Tensor | Real | None = None,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        _args.reduction_for_elbo(reduction)
        self.likelihood = likelihood
        _args.likelihood(likelihood)
        self.beta = _args.factor("beta", beta)
        self.parameterization = _args.parameterization(parameterization)
        self.reduction = reduction
        self.kl_options = _args.kl_options(reduction, free_bits, free_bits_per, balance, capacity, symmetric)

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
    ) -> Tensor:
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
            **self.kl_options._asdict(),
        )

    def extra_repr(self) -> str:
        return (
            f"likelihood={self.likelihood!r}, beta={self.beta!r}, "
            f"parameterization={self.parameterization!r}, reduction={self.reduction!r}"
            + "".join(
                f", {name}={value!r}"
                for name, value in self.kl_options._asdict().items()
                if value != KLOptions._field_defaults[name]
            )
        )
