"""What an engine is: the primitives that everything is composed of. There are two, compiled and in PyTorch.

Primitives take groups of checked arguments, and know of options only those that they name; the others are composed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ._gaussian import Prior
from ._options import ELBOTerms, Likelihood, Parameterization


class Pair(NamedTuple):
    """q and p, between which a KL is taken."""

    mu: Tensor
    raw: Tensor
    prior_mu: Prior
    prior_logvar: Prior
    p: Parameterization


class Reconstruction(NamedTuple):
    """What p(x|z) is asked, and whether its gradient may be written over the first parameter."""

    params: Sequence[Tensor]
    target: Tensor
    weight: Tensor | None
    likelihood: Likelihood
    overwrite: bool


class Posteriors(NamedTuple):
    """Many Pairs. The priors' lists are empty where all have the number instead, and hold log variances."""

    mus: Sequence[Tensor]
    raws: Sequence[Tensor]
    prior_mus: Sequence[Tensor]
    prior_mu: float
    prior_logvars: Sequence[Tensor]
    prior_logvar: float
    p: Parameterization


class Moments(NamedTuple):
    """mu and log variance in one tensor's halves along ``dim``, and those of the prior."""

    moments: Tensor
    dim: int
    p: Parameterization
    prior: tuple[Tensor, Parameterization] | None


class Categorical(NamedTuple):
    """Logits of q and, in one shape, of p, None where that is uniform; the classes lie along ``dim``, and the share
    ``unimix`` of both is made uniform."""

    logits: Tensor
    prior: Tensor | None
    dim: int
    unimix: float


class LogRatio(NamedTuple):
    """Draws z ``[K, B, ...]`` of q ``[B, ...]``, in one dtype, and the Gaussian that they have a density under besides,
    unless ``prior`` is False."""

    z: Tensor
    mu: Tensor
    logvar: Tensor
    prior_mu: Prior
    prior_logvar: Prior
    prior: bool


class Experts(NamedTuple):
    """Gaussians ``[M, B, ...]``, which of them there are, None for all, in a mask of their first dimensions or 1 in
    their place, and whether N(0, I) is one too."""

    mus: Tensor
    logvars: Tensor
    there: Tensor | None
    prior: bool


class Engine(Protocol):
    @property
    def noise(self) -> str:
        """The stream that it draws of itself: one of ``_options.NOISE``."""

    def sample(
        self, mu: Tensor, raw: Tensor, p: Parameterization, eps: Tensor | None, generator: torch.Generator | None, /
    ) -> Tensor: ...

    def kl(self, pair: Pair, reduction: str, balance: float | None, /) -> Tensor: ...

    def sample_with_kl(
        self,
        pair: Pair,
        reduction: str,
        balance: float | None,
        eps: Tensor | None,
        generator: torch.Generator | None,
        /,
    ) -> tuple[Tensor, Tensor]: ...

    def nll(self, of: Reconstruction, reduction: str, /) -> Tensor: ...

    def elbo(
        self, of: Reconstruction, pair: Pair, beta: float, reduction: str, balance: float | None, /
    ) -> ELBOTerms: ...

    def multi_kl(self, many: Posteriors, reduction: str, /) -> Tensor: ...

    def multi_sample_with_kl(
        self, many: Posteriors, reduction: str, generator: torch.Generator | None, /
    ) -> tuple[list[Tensor], Tensor]: ...

    def packed(
        self, of: Moments, reduction: str, generator: torch.Generator | None, with_sample: bool, with_kl: bool, /
    ) -> list[Tensor]:
        """[z][kl]"""

    def categorical(
        self, of: Categorical, uniforms: Tensor | None, reduction: str, balance: float | None, with_kl: bool, /
    ) -> list[Tensor]:
        """[z][kl]: one-hot vectors where there are uniform numbers, float64, one for each; the KL in float32, and in
        float64 where an input is."""

    def log_ratio(self, of: LogRatio, /) -> Tensor:
        """``[K, B]``: log p(z) - log q(z), without the log(2 pi) of either."""

    def bound(self, ratio: Tensor, of: Reconstruction, reduction: str, /) -> tuple[Tensor, Tensor]:
        """The negative importance-weighted bound of weights ``ratio + log p(x|z)``, reduced, and these, ``[K, B]``,
        which are not differentiated."""

    def experts(self, of: Experts, /) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the experts' product, ``[B, ...]``, in the dtypes of theirs."""


class Declined(Exception):
    """What a short way raises of a call that it is not for."""


class Direct(Engine, Protocol):
    """The short way of a plain call: an engine that checks tensors for itself, and raises TypeError or ValueError in
    words of its own, or :class:`Declined`. And its primitives without groups, which take time to make.
    """

    def posterior(
        self, mu: Tensor, raw: Tensor, prior_mu: Prior, prior_logvar: Prior, p: Parameterization, reduction: str,
        balance: float | None, eps: None, generator: None, with_sample: bool, with_kl: bool, /,
    ) -> list[Tensor]:  # fmt: skip
        """[z][kl]"""

    def parameters(
        self, recon: object, target: object, weight: object, chosen: Likelihood, /
    ) -> Sequence[Tensor] | None:
        """The likelihood's parameters as :meth:`fused_elbo` and :meth:`reconstruction` take them, if they do."""

    def reconstruction(
        self, params: Sequence[Tensor], target: Tensor, weight: Tensor | None, chosen: Likelihood, overwrite: bool,
        reduction: str, /,
    ) -> Tensor: ...  # fmt: skip

    def fused_elbo(
        self, loss_alone: bool, params: Sequence[Tensor], target: Tensor, weight: Tensor | None, chosen: Likelihood,
        overwrite: bool, mu: Tensor, raw: Tensor, prior_mu: Prior, prior_logvar: Prior, p: Parameterization,
        beta: float, reduction: str, balance: float | None, /,
    ) -> Any:  # fmt: skip
        """The loss, which alone takes less time, or the three terms."""

    def multi(
        self, mus: Sequence[Tensor], raws: Sequence[Tensor], prior_mus: Sequence[Tensor], prior_mu: float,
        prior_logvars: Sequence[Tensor], prior_logvar: float, p: Parameterization, reduction: str, generator: None,
        with_sample: bool, /,
    ) -> list[Tensor]:  # fmt: skip
        """[z ...][kl]"""


class Engines(Protocol):
    """Which engine a call goes to."""

    def direct(self, x: object, /) -> Direct | None:
        """For a plain call whose first tensor is x, if there is a short way."""

    def engine(
        self,
        x: Tensor,
        /,
        *no_grad_to: Tensor | None,
        likelihood: Likelihood | None = None,
        beside: Sequence[object] = (),
    ) -> Engine:
        """For checked arguments whose first tensor is x, with gradients to ``no_grad_to`` where they require them;
        ``beside`` are the call's other tensors."""
