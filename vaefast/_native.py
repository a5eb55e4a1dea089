"""The compiled engine: loading the extension, what it covers, and the order of its arguments, which stands here alone.

Its primitives are those of ``_engine.Engine``. Eager calls go through pybind11 (``_C.f``), which is cheaper;
``torch.compile`` and tensor subclasses go through the same operator's dispatcher entry (``torch.ops.vaefast.f``).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import _build, _functorch, _mixtures, _pairwise, _torch
from ._best_variance import SQUARES
from ._checks import is_bool, is_real, wrapped
from ._engine import Categorical, Declined, Experts, LogRatio, Moments, Pair, Posteriors, Reconstruction
from ._gaussian import Prior, as_tensor, constant
from ._options import ELBO_REDUCTIONS, PER_DRAW, REDUCTIONS, ELBOTerms, Likelihood, Parameterization
from ._philox import draw_seed
from ._torch import trained
from .likelihoods import LIKELIHOODS as REGISTRY

MAX_DIMS = 8  # kMaxDims in csrc/problems.h

_C: Any = None
# what has a struct in csrc/likelihoods/
LIKELIHOODS: frozenset[str] = frozenset()
# types of devices that there are kernels for, known before anything is traced: Dynamo traces no call of the extension
DEVICES: tuple[str, ...] = ()
# and by kernel, for what is no ELBO
KERNELS: dict[str, list[str]] = {}


def _load() -> None:
    global _C, LIKELIHOODS, DEVICES, KERNELS
    if not _build.compiled():
        return
    extension = _build.extension()
    _C, LIKELIHOODS, DEVICES = extension, frozenset(extension.likelihoods()), tuple(extension.devices())
    KERNELS = extension.kernels()
    _pairwise.kernels = _mixtures.kernels = extension
    _pairwise.devices, _mixtures.devices = KERNELS["marginals"], KERNELS["mixture"]
    from . import _batched, _double_backward  # noqa: F401  (registers the differentiable backward ops)

    _batched.register()

    if torch.version.cuda is not None and not _build.info().cuda:
        warnings.warn(
            f"vaefast was built for the CPU only ({_build.info().why_no_cuda}); CUDA tensors take the slower "
            "pure-PyTorch reference. vaefast.show_config() tells more.",
            stacklevel=4,
        )


_load()


def devices() -> tuple[str, ...]:
    return () if _C is None else DEVICES


def has(kernel: str, x: Tensor) -> bool:
    return x.device.type in KERNELS[kernel]


def cpu_capability() -> str | None:
    return None if _C is None else str(_C.cpu_capability())


def why_not(x: Tensor, no_grad_to: Sequence[object], beside: Sequence[object]) -> str | None:
    """Why the kernels do not cover a call whose first tensor is x, or None."""
    if _C is None:
        return "the extension is not built"
    if not x.is_cpu and x.device.type != "meta" and x.device.type not in DEVICES:
        return f"there are no kernels for {x.device.type} tensors"
    for t in (x, *no_grad_to, *beside):
        if wrapped(t):
            return f"a {type(t).__name__} is made of other tensors, which kernels do not see through"
    if x.dim() > MAX_DIMS:
        return f"there are more than {MAX_DIMS} dimensions"
    if _functorch.transforming():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    for t in no_grad_to:
        if trained(t):
            return "eps, target and weight have gradients in the reference only"
    return None


def is_eager(x: object) -> TypeGuard[Tensor]:
    """Whether x is a tensor that nothing traces or wraps."""
    return not torch.compiler.is_compiling() and (type(x) is Tensor or type(x) is Parameter)


def is_plain(x: object) -> bool:
    """Whether a call whose first tensor is x may come with no checks before: kernels cover it, as far as x can tell."""
    return (
        _C is not None
        and not torch.compiler.is_compiling()
        and (type(x) is Tensor or type(x) is Parameter)
        and forward_ad._current_level < 0
        and _functorch.depth() == 0
        and torch._C._get_tracing_state() is None
        and (x.is_cpu or x.device.type in DEVICES)
        and x.dim() <= MAX_DIMS
    )


def is_seen_whole(x: object) -> bool:
    """Whether a call whose first tensor is x may be traced straight into an operator, as far as x can tell."""
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.dim() > 0
        and not torch.compiler.is_exporting()
        and why_not(x, (), ()) is None
    )


def alike(x: object, like: Tensor) -> bool:
    return (
        isinstance(x, Tensor)
        and not wrapped(x)
        and x.is_floating_point()
        and x.shape == like.shape
        and x.device == like.device
    )


def pair_is_alike(mu: Tensor, raw: object, prior_mu: object, prior_logvar: object) -> bool:
    return (
        alike(raw, mu)
        and (prior_mu is None or type(prior_mu) is float or alike(prior_mu, mu))
        and (prior_logvar is None or type(prior_logvar) is float or alike(prior_logvar, mu))
    )


def split(prior: object) -> tuple[Tensor | None, float]:
    """A prior as the entries take it: a tensor, or a constant."""
    if prior is None or isinstance(prior, Tensor):
        return prior, 0.0
    if not is_real(prior):
        raise TypeError(f"a prior must be None, a float or a torch.Tensor, got {type(prior).__name__}")
    return None, float(prior)


# a uniform share below it is lost beside the softmax, which the kernels' formulas are not made for
LEAST_UNIMIX = 1e-20

# both, of N(0, I)
STANDARD = (None, 0.0, None, 0.0)


class Compiled:
    """``_engine.Engine`` and ``_engine.Direct``, by the extension's entries: pybind11's, or the dispatcher's."""

    noise = "philox"

    def __init__(self, entries: Any, *, traced: bool) -> None:
        self.entries, self.traced = entries, traced

    def posterior(
        self, mu: Tensor, raw: Tensor, prior_mu: Prior, prior_logvar: Prior, p: Parameterization, reduction: str,
        balance: float | None, eps: Tensor | None, generator: torch.Generator | None, with_sample: bool, with_kl: bool,
    ) -> list[Tensor]:  # fmt: skip
        seed = None
        if self.traced and with_sample and eps is None:
            # identical calls of a random custom op may be merged under torch.compile; torch.randint's are not
            seed, generator = draw_seed(mu, generator), None
        prior = STANDARD if prior_mu is None and prior_logvar is None else (*split(prior_mu), *split(prior_logvar))
        result: list[Tensor] = self.entries.posterior(
            mu, raw, *prior, eps, seed, generator, *p.spec, reduction, balance, with_sample, with_kl
        )  # fmt: skip
        return result

    def sample(
        self, mu: Tensor, raw: Tensor, p: Parameterization, eps: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        return self.posterior(mu, raw, None, None, p, "none", None, eps, generator, True, False)[0]

    def kl(self, pair: Pair, reduction: str, balance: float | None) -> Tensor:
        return self.posterior(*pair, reduction, balance, None, None, False, True)[0]

    def sample_with_kl(
        self, pair: Pair, reduction: str, balance: float | None, eps: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        z, kl = self.posterior(*pair, reduction, balance, eps, generator, True, True)
        return z, kl

    def parameters(self, recon: object, target: object, weight: object, chosen: Likelihood) -> Sequence[Tensor] | None:
        if (
            chosen.name not in LIKELIHOODS
            or not isinstance(target, Tensor)
            or (target.requires_grad and torch.is_grad_enabled())
            or (weight is not None and trained(weight))
        ):
            return None
        if isinstance(recon, Tensor):
            return (recon,) if recon.dim() <= MAX_DIMS else None
        if not isinstance(recon, (tuple, list)) or not recon:
            return None
        first = recon[0]
        if not isinstance(first, Tensor) or first.dim() > MAX_DIMS:
            return None
        for value in recon:
            if not isinstance(value, Tensor):
                dtype, device = first.dtype, first.device
                return [
                    torch.scalar_tensor(float(p), dtype=dtype, device=device) if is_real(p) else p for p in recon
                ]  # fmt: skip
        return recon

    def reconstruction(
        self, params: Sequence[Tensor], target: Tensor, weight: Tensor | None, chosen: Likelihood, overwrite: bool,
        reduction: str,
    ) -> Tensor:  # fmt: skip
        result: Tensor = self.entries.reconstruction(params, target, weight, *chosen.spec, reduction, overwrite)
        return result

    def nll(self, of: Reconstruction, reduction: str) -> Tensor:
        return self.reconstruction(*of, reduction)

    def fused_elbo(
        self, loss_alone: bool, params: Sequence[Tensor], target: Tensor, weight: Tensor | None, chosen: Likelihood,
        overwrite: bool, mu: Tensor, raw: Tensor, prior_mu: Prior, prior_logvar: Prior, p: Parameterization,
        beta: float, reduction: str, balance: float | None,
    ) -> Any:  # fmt: skip
        alone = loss_alone and not self.traced  # what is traced drops by itself what nothing reads
        entry = self.entries.elbo_loss if alone else self.entries.elbo
        prior = STANDARD if prior_mu is None and prior_logvar is None else (*split(prior_mu), *split(prior_logvar))
        found = entry(
            params, target, weight, *chosen.spec, mu, raw, *prior, *p.spec, reduction, balance, beta, overwrite
        )  # fmt: skip
        return found[0] if loss_alone and not alone else found

    def elbo(self, of: Reconstruction, pair: Pair, beta: float, reduction: str, balance: float | None) -> ELBOTerms:
        return ELBOTerms(*self.fused_elbo(False, *of, *pair, beta, reduction, balance))

    def multi(
        self, mus: Sequence[Tensor], raws: Sequence[Tensor], prior_mus: Sequence[Tensor], prior_mu: float,
        prior_logvars: Sequence[Tensor], prior_logvar: float, p: Parameterization, reduction: str,
        generator: torch.Generator | None, with_sample: bool,
    ) -> list[Tensor]:  # fmt: skip
        seed = None
        if self.traced and with_sample:
            seed, generator = draw_seed(mus[0], generator), None
        result: list[Tensor] = self.entries.multi_posterior(
            mus, raws, prior_mus, prior_mu, prior_logvars, prior_logvar, seed, generator,
            *p.spec, reduction, None, with_sample, True,
        )  # fmt: skip
        return result

    def multi_kl(self, many: Posteriors, reduction: str) -> Tensor:
        return self.multi(*many, reduction, None, False)[0]

    def multi_sample_with_kl(
        self, many: Posteriors, reduction: str, generator: torch.Generator | None
    ) -> tuple[list[Tensor], Tensor]:
        *samples, kl = self.multi(*many, reduction, generator, True)
        return samples, kl

    def packed(
        self, of: Moments, reduction: str, generator: torch.Generator | None, with_sample: bool, with_kl: bool
    ) -> list[Tensor]:
        moments, dim, p, given = of
        foreign = generator is not None and generator.device.type != moments.device.type
        seed = None
        if with_sample and (self.traced or foreign):
            seed, generator = draw_seed(moments, generator), None
        prior, prior_p = (None, p) if given is None else given
        _, prior_lo, prior_hi, _ = prior_p.spec
        result: list[Tensor] = self.entries.packed_posterior(
            moments, dim, prior, prior_lo, prior_hi, seed, generator, *p.spec, reduction, None, with_sample, with_kl
        )
        return result

    def categorical(
        self, of: Categorical, uniforms: Tensor | None, reduction: str, balance: float | None, with_kl: bool
    ) -> list[Tensor]:
        if not has("categorical", of.logits) or not (of.unimix == 0 or LEAST_UNIMIX <= of.unimix < 1):
            return _torch.categorical(of, uniforms, reduction, balance, with_kl)
        result: list[Tensor] = self.entries.categorical(uniforms, *of, reduction, balance, with_kl)
        return result

    def log_ratio(self, of: LogRatio) -> Tensor:
        z, mu, logvar, pm, plv, prior = of
        if not has("log_ratio", z):
            return _torch.log_ratio_by(self._half_squares, of)
        ratio: Tensor = self.entries.log_ratio(z, mu, logvar, *split(pm), *split(plv), prior)
        return ratio

    def _half_squares(self, apart: Tensor, logvar: Prior) -> Tensor:
        """-log N(apart; 0, e^logvar) without its constant. The difference's gradients come by PyTorch."""
        scaled = isinstance(logvar, Tensor) or logvar
        params = (apart, as_tensor(logvar, apart)) if scaled else (apart,)
        zero = constant(0.0, apart).expand(apart.shape)
        return self.reconstruction(params, zero, None, SQUARES, False, "none")

    def bound(self, ratio: Tensor, of: Reconstruction, reduction: str) -> tuple[Tensor, Tensor]:
        if not has("bound", ratio):
            return _torch.bound_of(ratio - self.nll(of, PER_DRAW), reduction)
        params, target, weight, chosen, _ = of
        loss, log_weights = self.entries.bound(ratio, params, target, weight, *chosen.spec, reduction)
        return loss, log_weights

    def experts(self, of: Experts) -> tuple[Tensor, Tensor]:
        if not has("experts", of.mus):
            return _torch.experts(of)
        mu, logvar = self.entries.experts(*of)
        return mu, logvar


def _decline(*_: object) -> Any:
    raise Declined


_declines: Any = staticmethod(_decline)


class Short(Compiled):
    """``_engine.Direct`` while torch.compile traces, for tensors that are alike: a compiled function's guards look, in
    every call, at each object that Python looked at on the way to the operator."""

    def posterior(self, *given: Any, **_: Any) -> list[Tensor]:
        mu, raw, prior_mu, prior_logvar, _p, reduction, *_rest = given
        if not pair_is_alike(mu, raw, prior_mu, prior_logvar) or reduction not in REDUCTIONS:
            raise Declined
        return super().posterior(*given)

    def parameters(self, recon: object, target: object, weight: object, chosen: Likelihood) -> Sequence[Tensor] | None:
        params = recon if isinstance(recon, (tuple, list)) else (recon,)
        if weight is not None or chosen.name not in LIKELIHOODS or not isinstance(target, Tensor):
            return None
        entry = REGISTRY[chosen.name]
        if entry.planes or not entry.required <= len(params) <= len(entry.params) or not is_seen_whole(target):
            return None
        if target.requires_grad or not all(alike(t, target) for t in params):
            return None
        return params

    def reconstruction(self, *given: Any, **_: Any) -> Tensor:
        *_rest, overwrite, reduction = given
        if reduction not in REDUCTIONS or not is_bool(overwrite):
            raise Declined
        return super().reconstruction(*given)

    def fused_elbo(self, *given: Any, **_: Any) -> Any:
        _alone, _params, target, _weight, _chosen, overwrite, mu, raw, prior_mu, prior_logvar, *_rest = given
        reduction = given[-2]
        if (
            not pair_is_alike(mu, raw, prior_mu, prior_logvar)
            or mu.device != target.device
            or reduction not in ELBO_REDUCTIONS
            or (reduction != "sum" and mu.shape[0] != target.shape[0])
            or not is_bool(overwrite)
        ):
            raise Declined
        return super().fused_elbo(*given)

    # what options are made of, and lists
    sample = kl = sample_with_kl = nll = elbo = _declines
    multi = multi_kl = multi_sample_with_kl = packed = categorical = log_ratio = bound = experts = _declines


eager, traced = Compiled(_C, traced=False), Compiled(torch.ops.vaefast, traced=True)
short = Short(torch.ops.vaefast, traced=True)
