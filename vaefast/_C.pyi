"""The compiled extension's pybind11 entries, called by position: arguments as csrc/arguments.h groups them."""

from collections.abc import Sequence

from torch import Generator, Tensor

def posterior(
    mu: Tensor, raw: Tensor, prior_mu: Tensor | None, prior_mu_value: float, prior_logvar: Tensor | None,
    prior_logvar_value: float, eps: Tensor | None, seed: Tensor | None, generator: Generator | None,
    parameterization: str, lo: float, hi: float, floor: float, reduction: str, balance: float | None, sample: bool,
    kl: bool, /,
) -> list[Tensor]: ...  # fmt: skip
def packed_posterior(
    moments: Tensor, dim: int, prior: Tensor | None, prior_lo: float, prior_hi: float, seed: Tensor | None,
    generator: Generator | None, parameterization: str, lo: float, hi: float, floor: float, reduction: str,
    balance: float | None, sample: bool, kl: bool, /,
) -> list[Tensor]: ...  # fmt: skip
def multi_posterior(
    mus: Sequence[Tensor], raws: Sequence[Tensor], prior_mus: Sequence[Tensor], prior_mu: float,
    prior_logvars: Sequence[Tensor], prior_logvar: float, seed: Tensor | None, generator: Generator | None,
    parameterization: str, lo: float, hi: float, floor: float, reduction: str, balance: float | None, sample: bool,
    kl: bool, /,
) -> list[Tensor]: ...  # fmt: skip
def reconstruction(
    params: Sequence[Tensor], target: Tensor, weight: Tensor | None, likelihood: str, options: Sequence[float],
    reduction: str, overwrite_recon: bool, /,
) -> Tensor: ...  # fmt: skip
def elbo(
    params: Sequence[Tensor], target: Tensor, weight: Tensor | None, likelihood: str, options: Sequence[float],
    mu: Tensor, raw: Tensor, prior_mu: Tensor | None, prior_mu_value: float, prior_logvar: Tensor | None,
    prior_logvar_value: float, parameterization: str, lo: float, hi: float, floor: float, reduction: str,
    balance: float | None, beta: float, overwrite_recon: bool, /,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
def elbo_loss(
    params: Sequence[Tensor], target: Tensor, weight: Tensor | None, likelihood: str, options: Sequence[float],
    mu: Tensor, raw: Tensor, prior_mu: Tensor | None, prior_mu_value: float, prior_logvar: Tensor | None,
    prior_logvar_value: float, parameterization: str, lo: float, hi: float, floor: float, reduction: str,
    balance: float | None, beta: float, overwrite_recon: bool, /,
) -> Tensor: ...  # fmt: skip
def categorical(
    uniforms: Tensor | None, logits: Tensor, prior: Tensor | None, dim: int, unimix: float, reduction: str,
    balance: float | None, kl: bool, /,
) -> list[Tensor]: ...  # fmt: skip
def log_ratio(
    z: Tensor, mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_mu_value: float, prior_logvar: Tensor | None,
    prior_logvar_value: float, prior: bool, /,
) -> Tensor: ...  # fmt: skip
def bound(
    ratio: Tensor, params: Sequence[Tensor], target: Tensor, weight: Tensor | None, likelihood: str,
    options: Sequence[float], reduction: str, /,
) -> list[Tensor]: ...  # fmt: skip
def experts(mus: Tensor, logvars: Tensor, there: Tensor | None, prior: bool, /) -> list[Tensor]: ...
def marginals_forward(
    z: Tensor, mu: Tensor, slope: Tensor, constant: Tensor, columns: Sequence[Tensor], logs: Sequence[Tensor], /,
) -> Tensor: ...  # fmt: skip
def marginals_backward(
    g: Tensor, marginals: Tensor, z: Tensor, mu: Tensor, slope: Tensor, constant: Tensor, columns: Sequence[Tensor],
    logs: Sequence[Tensor], /,
) -> list[Tensor]: ...  # fmt: skip
def mixture_forward(z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None, /) -> Tensor: ...
def mixture_backward(
    g: Tensor, z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None, /,
) -> list[Tensor]: ...  # fmt: skip
def ivon_draw(
    params: Sequence[Tensor], means: Sequence[Tensor], noises: Sequence[Tensor], hess: Sequence[Tensor], ess: float,
    weight_decay: float, generator: Generator | None, /,
) -> bool: ...  # fmt: skip
def ivon_step(
    params: Sequence[Tensor], momentum: Sequence[Tensor], hess: Sequence[Tensor], gradients: Sequence[Tensor],
    products: Sequence[Tensor], ess: float, weight_decay: float, beta1: float, beta2: float, unbias: float, rate: float,
    clip_radius: float, /,
) -> bool: ...  # fmt: skip
def likelihoods() -> list[str]: ...
def parameterizations() -> list[str]: ...
def reductions() -> list[str]: ...
def kernels() -> dict[str, list[str]]: ...
def devices() -> list[str]: ...
def cpu_capability() -> str: ...
