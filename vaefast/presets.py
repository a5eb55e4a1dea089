"""Other projects' conventions: the negative ELBO as each writes it, in arguments and factors.

``PRESETS`` has them by name, for whoever compares with one of these projects or moves from it; an entry of your own is
a preset too.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from ._checks import choice, is_real, number
from ._options import ELBOTerms, Likelihood, Parameterization

__all__ = ["PRESETS", "Preset"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Preset:
    """A project's negative ELBO: ``a * reconstruction + beta * b * KL``, a and b being 1 unless told here.

    Args:
        source: the project's repository, file and function.
        likelihood, parameterization, reduction, beta, free_bits, free_bits_per, balance, prior_parameterization: as for
            :func:`vaefast.elbo_terms`, with its defaults.
        unimix, batch_dims: as for :func:`vaefast.categorical_elbo_terms`.
        latents: ``"gaussian"``, for :func:`vaefast.elbo_terms` and its kin, or ``"categorical"``, for
            :func:`vaefast.categorical_elbo_terms`.
        symlog: of categorical latents, whether the target is squashed by :func:`vaefast.discrete.symlog`.
        scale: the reconstruction's factor under ``likelihood``; under another that the caller gives it is 1.
        per_dim: of ``"reconstruction"`` and ``"kl"``, the terms that are divided by the number of elements of a sample
            of ``target``; all their nats are then nats a dimension.

    Raises:
        ValueError, TypeError: by the call that uses it, for what :func:`vaefast.elbo_terms` does not take.

    Example::

        vaefast.presets.PRESETS["ours"] = vaefast.presets.Preset("our paper, equation 3", "gaussian", beta=0.5)
        loss = vaefast.elbo_loss(recon, x, mu, logvar, preset="ours")
    """

    source: str
    likelihood: str | Likelihood = "bernoulli"
    parameterization: str | Parameterization = "logvar"
    reduction: str = "batchmean"
    beta: float = 1.0
    free_bits: float = 0.0
    free_bits_per: str = "dim"
    balance: float | None = None
    scale: float = 1.0
    per_dim: tuple[str, ...] = ()
    prior_parameterization: str | Parameterization = "logvar"
    unimix: float = 0.0
    batch_dims: int = 1
    latents: str = "gaussian"
    symlog: bool = False

    def filled(self, given: dict[str, Any]) -> dict[str, Any]:
        """What the caller gave, and of what he did not the preset's own, where they are not the function's defaults."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _OPTIONS}
        return {**{name: value for name, value in own.items() if value != _OPTIONS[name]}, **given}

    def weigh(self, terms: ELBOTerms, target: Tensor, options: dict[str, Any]) -> ELBOTerms:
        """The terms of the filled options with the preset's factors, and their sum."""
        scale = self.scale if options.get("likelihood", _OPTIONS["likelihood"]) == self.likelihood else 1.0
        if scale == 1.0 and not self.per_dim:
            return terms
        size = max(1, math.prod(target.shape[options.get("batch_dims", 1) :]))
        nll = terms.reconstruction * float(scale / size if "reconstruction" in self.per_dim else scale)
        kl = terms.kl / size if "kl" in self.per_dim else terms.kl
        beta = options.get("beta", self.beta)
        return ELBOTerms(nll + (number(beta) if is_real(beta) else beta) * kl, nll, kl)


_NOT_OPTIONS = ("source", "scale", "per_dim", "latents", "symlog")
_OPTIONS = {f.name: f.default for f in fields(Preset) if f.name not in _NOT_OPTIONS}


# which functions are for a preset's latents
_TAKES = {"gaussian": "elbo_terms, elbo_loss and ELBOLoss", "categorical": "categorical_elbo_terms"}


def find(name: object, latents: str = "gaussian") -> Preset:
    choice("preset", name, tuple(PRESETS))
    found = PRESETS[str(name)]
    if found.latents != latents:
        raise ValueError(
            f"preset {name!r} is of {found.latents} latents, and goes with vaefast's {_TAKES[found.latents]}"
        )
    return found


def filled_in(f: Callable[P, R]) -> Callable[P, R]:
    """Where ``f``'s argument ``preset`` is one, what the caller did not give comes from it."""
    signature = inspect.signature(f)
    latents = "categorical" if "logits" in signature.parameters else "gaussian"

    @functools.wraps(f)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        name = kwargs.get("preset")
        if name is None:
            return f(*args, **kwargs)
        named: Callable[..., R] = f
        return named(**find(name, latents).filled(signature.bind(*args, **kwargs).arguments))

    return call


# the squared and the absolute error, whose scale of 2 undoes the half of the Gaussian's
_SQUARED, _ABSOLUTE = Likelihood("gaussian", constant=False), Likelihood("laplace", constant=False)
_CLAMPED = Parameterization("logvar", clamp=(-30.0, 20.0))
_DYNAMICS, _REPRESENTATION = 0.5, 0.1

# its dynamics loss weighs 1 and its representation loss 0.1, each of the KL clipped at a free nat
_DREAMER_V3 = Preset(
    "danijar/dreamerv3: rssm.py, RSSM.loss and RSSM._dist; configs.yaml, unimix, free_nats, loss_scales (v2)",
    _SQUARED,
    beta=1.0 + _REPRESENTATION,
    free_bits=1.0,
    free_bits_per="sample",
    balance=1.0 / (1.0 + _REPRESENTATION),
    scale=2.0,
    unimix=0.01,
    batch_dims=2,
    latents="categorical",
)

PRESETS: dict[str, Preset] = {
    "pytorch_examples": Preset(
        "pytorch/examples: vae/main.py, loss_function",
        "bernoulli_probs",
        reduction="sum",
    ),
    "pythae": Preset(
        "clementchadebec/benchmark_VAE: src/pythae/models/vae/vae_model.py, VAE.loss_function (0.1.2)",
        _SQUARED,
    ),
    "pytorch_vae": Preset(
        "AntixK/PyTorch-VAE: models/vanilla_vae.py, VanillaVAE.loss_function; configs/vae.yaml, kld_weight",
        _SQUARED,
        beta=0.00025,
        scale=2.0,
        per_dim=("reconstruction",),
    ),
    "diffusers": Preset(
        "huggingface/diffusers: models/autoencoders/vae.py, DiagonalGaussianDistribution; "
        "examples/research_projects/autoencoderkl/train_autoencoderkl.py, --rec_loss l2, --kl_scale",
        _SQUARED,
        _CLAMPED,
        beta=1e-6,
        scale=2.0,
    ),
    "latent_diffusion": Preset(
        "CompVis/latent-diffusion: ldm/modules/losses/contperceptual.py, LPIPSWithDiscriminator.forward; "
        "configs/autoencoder, kl_weight",
        _ABSOLUTE,
        _CLAMPED,
        beta=1e-6,
    ),
    "scvi": Preset(
        "scverse/scvi-tools: src/scvi/module/_vae.py, VAE.loss; src/scvi/nn/_base_components.py, Encoder.forward",
        "zero_inflated_negative_binomial",
        "var",
    ),
    "vdvae": Preset(
        "openai/vdvae: vae.py, VAE.forward; vae_helpers.py, discretized_mix_logistic_loss, gaussian_analytical_kl",
        "discretized_logistic_mixture",
        "log_std",
        per_dim=("reconstruction", "kl"),
    ),
    "dreamer": Preset(
        "danijar/dreamerv3: agent.py, WorldModel.loss; nets.py, RSSM.dyn_loss and rep_loss (first version, with the "
        "Gaussian latents that are not its default: see dreamer_v3)",
        _SQUARED,
        "std",
        beta=_DYNAMICS + _REPRESENTATION,
        free_bits=1.0,
        free_bits_per="sample",
        balance=_DYNAMICS / (_DYNAMICS + _REPRESENTATION),
        scale=2.0,
    ),
    "dreamer_v3": _DREAMER_V3,
    "dreamer_v3_vectors": replace(_DREAMER_V3, symlog=True),
}
