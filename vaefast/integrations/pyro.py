"""Pyro's ``Normal``: sampling, densities, and the KLs of ``TraceMeanField_ELBO``, fused, under ``to_event`` and plates.

``pyro.distributions.Normal`` alone is changed, not torch's, from which it inherits. ``Normal`` here is
:class:`vaefast.distributions.Normal` with Pyro's own methods, for programs that give ``logvar=`` or ``log_std=``
without enabling anything.

Kingma & Welling 2014 (arXiv:1312.6114), section 2.4 and appendix B.

Example::

    vaefast.integrations.pyro.enable()
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), loss=TraceMeanField_ELBO())
    svi.step(x)
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch.distributions import Normal as TorchNormal

from .. import _normal
from ._integration import Coverage, Integration, library, replace_kl
from .torch_distributions import replace_methods

__all__ = ["disable", "enable", "enabled"]


def _install(undo: ExitStack, noise: str | None) -> None:
    normal = library("pyro.distributions", "pyro-ppl").Normal
    replace_methods(undo, normal, noise)
    replace_kl(undo, [(normal, normal), (normal, TorchNormal), (TorchNormal, normal)], _normal.kl)


integration = Integration(_install, lambda: Coverage(("Normal",)))
enable, disable, enabled = integration.enable, integration.disable, integration.enabled


def __getattr__(name: str) -> Any:
    if name != "Normal":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ..distributions import Normal

    mixin = library("pyro.distributions", "pyro-ppl").torch_distribution.TorchDistributionMixin
    made = type(mixin)(
        name, (Normal, mixin), {"__module__": __name__, "__doc__": Normal.__doc__, "to_event": mixin.to_event}
    )
    globals()[name] = made
    return made
