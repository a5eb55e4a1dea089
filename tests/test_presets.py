"""Every preset against its project's arithmetic, written out here in plain PyTorch: loss and gradients, in float64."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from inputs import Data, Posterior, generator, gradients, posterior, training
from torch import Tensor
from torch.nn import functional as F

import vaefast
from vaefast import ELBOLoss, Likelihood, Parameterization
from vaefast.presets import PRESETS, Preset

Tensors = tuple[Tensor, ...]
PAGE = Path(__file__).parents[1] / "docs" / "coming-from" / "index.md"


def kld(mu: Tensor, log_var: Tensor) -> Tensor:
    """[B] of [B, D], as pytorch/examples, pythae and PyTorch-VAE all write it."""
    return -0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp(), dim=-1)


def pytorch_examples(recon: Tensors, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """pytorch/examples: vae/main.py, loss_function."""
    return F.binary_cross_entropy(recon[0], x, reduction="sum") + kld(mu, logvar).sum()


def pythae(recon: Tensors, x: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
    """clementchadebec/benchmark_VAE: models/vae/vae_model.py, VAE.loss_function, "mse" of release 0.1.2."""
    recon_loss = 0.5 * F.mse_loss(recon[0].flatten(1), x.flatten(1), reduction="none").sum(dim=-1)
    return (recon_loss + kld(mu, log_var)).mean(dim=0)


def pytorch_vae(recon: Tensors, x: Tensor, mu: Tensor, log_var: Tensor, kld_weight: float = 0.00025) -> Tensor:
    """AntixK/PyTorch-VAE: models/vanilla_vae.py, VanillaVAE.loss_function."""
    return F.mse_loss(recon[0], x) + kld_weight * torch.mean(kld(mu, log_var), dim=0)


def diagonal_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """huggingface/diffusers: models/autoencoders/vae.py, DiagonalGaussianDistribution; CompVis's has the same."""
    logvar = torch.clamp(logvar, -30.0, 20.0)
    return 0.5 * torch.sum(torch.pow(mean, 2) + torch.exp(logvar) - 1.0 - logvar, dim=tuple(range(1, mean.dim())))


def diffusers(recon: Tensors, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """huggingface/diffusers: train_autoencoderkl.py, main, without its perceptual and adversarial terms."""
    rec_loss, kl_loss = F.mse_loss(recon[0], x, reduction="none"), diagonal_kl(mean, logvar)
    return torch.sum(rec_loss) / rec_loss.shape[0] + 1e-6 * torch.sum(kl_loss) / kl_loss.shape[0]


def latent_diffusion(recon: Tensors, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """CompVis/latent-diffusion: contperceptual.py, LPIPSWithDiscriminator.forward, without those terms."""
    nll_loss, kl_loss = torch.abs(x - recon[0]) / torch.exp(recon[1]) + recon[1], diagonal_kl(mean, logvar)
    return torch.sum(nll_loss) / nll_loss.shape[0] + 1e-6 * torch.sum(kl_loss) / kl_loss.shape[0]


def scvi(recon: Tensors, x: Tensor, qz_m: Tensor, qz_v: Tensor, eps: float = 1e-8) -> Tensor:
    """scverse/scvi-tools: module/_vae.py, VAE.loss; distributions/_negative_binomial.py, log_zinb_positive."""
    mu, theta, pi = recon
    log_theta_mu_eps = torch.log(theta + mu + eps)
    pi_theta_log = -pi + theta * (torch.log(theta + eps) - log_theta_mu_eps)
    at_zero = F.softplus(pi_theta_log) - F.softplus(-pi)
    counts = x * (torch.log(mu + eps) - log_theta_mu_eps)
    gammas = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    log_prob = torch.where(x < eps, at_zero, -F.softplus(-pi) + pi_theta_log + counts + gammas)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(qz_m, qz_v.sqrt()), normal(0.0, 1.0)).sum(dim=-1)
    return torch.mean(-log_prob.flatten(1).sum(-1) + kl)


def vdvae(recon: Tensors, x: Tensor, mu1: Tensor, logsigma1: Tensor, mu2: Tensor, logvar2: Tensor) -> Tensor:
    """openai/vdvae: vae.py, VAE.forward; vae_helpers.py, discretized_mix_logistic_loss and gaussian_analytical_kl; with
    the channels along dimension 1."""
    x, planes = x.movedim(1, -1), recon[0].movedim(1, -1)
    nr_mix = planes.shape[-1] // 10
    logit_probs, rest = planes[..., :nr_mix], planes[..., nr_mix:].reshape(*x.shape, nr_mix * 3)
    means, log_scales = rest[..., :nr_mix], torch.clamp(rest[..., nr_mix : 2 * nr_mix], min=-7.0)
    coeffs = torch.tanh(rest[..., 2 * nr_mix :])
    xs = x.unsqueeze(-1).expand(*x.shape, nr_mix)
    m2 = means[..., 1, :] + coeffs[..., 0, :] * xs[..., 0, :]
    m3 = means[..., 2, :] + coeffs[..., 1, :] * xs[..., 0, :] + coeffs[..., 2, :] * xs[..., 1, :]
    centered_x = xs - torch.stack([means[..., 0, :], m2, m3], dim=-2)
    inv_stdv = torch.exp(-log_scales)
    plus_in, min_in = inv_stdv * (centered_x + 1 / 255), inv_stdv * (centered_x - 1 / 255)
    inside = torch.log(torch.clamp(torch.sigmoid(plus_in) - torch.sigmoid(min_in), min=1e-12))
    above = torch.where(xs > 0.999, -F.softplus(min_in), inside)
    log_probs = torch.where(xs < -0.999, plus_in - F.softplus(plus_in), above)
    log_probs = torch.logsumexp(log_probs.sum(-2) + torch.log_softmax(logit_probs, -1), -1)
    logsigma2 = logvar2 / 2
    variances = (logsigma1.exp() ** 2 + (mu1 - mu2) ** 2) / (logsigma2.exp() ** 2)
    kl = -0.5 + logsigma2 - logsigma1 + 0.5 * variances
    ndims = math.prod(x.shape[1:])
    return (-log_probs.flatten(1).sum(1) / ndims + kl.flatten(1).sum(1) / ndims).mean()


def dreamer(recon: Tensors, x: Tensor, mean: Tensor, std: Tensor, prior_mean: Tensor, prior_logvar: Tensor) -> Tensor:
    """danijar/dreamerv3, first version: jaxutils.MSEDist, nets.RSSM.dyn_loss and rep_loss, loss_scales 0.5 and 0.1."""

    def kl(mean: Tensor, std: Tensor, prior_mean: Tensor, prior_logvar: Tensor) -> Tensor:
        q, p = torch.distributions.Normal(mean, std), torch.distributions.Normal(prior_mean, (prior_logvar / 2).exp())
        return torch.clamp(torch.distributions.kl_divergence(q, p).sum(-1), min=1.0)

    post, prior = (mean, std), (prior_mean, prior_logvar)
    dyn = kl(*(t.detach() for t in post), *prior)
    rep = kl(*post, *(t.detach() for t in prior))
    return (((recon[0] - x) ** 2).flatten(1).sum(1) + 0.5 * dyn + 0.1 * rep).mean()


class Case(NamedTuple):
    theirs: Callable[..., Tensor]
    data: tuple[str, int]  # a likelihood that has such data, and how many of its parameters
    parameterization: str = "logvar"
    images: bool = False  # whether the latents may be
    prior: bool = False


CASES = {
    "pytorch_examples": Case(pytorch_examples, ("bernoulli_probs", 1)),
    "pythae": Case(pythae, ("gaussian", 1)),
    "pytorch_vae": Case(pytorch_vae, ("gaussian", 1)),
    "diffusers": Case(diffusers, ("gaussian", 1), images=True),
    "latent_diffusion": Case(latent_diffusion, ("laplace", 2), images=True),
    "scvi": Case(scvi, ("zero_inflated_negative_binomial", 3), "var"),
    "vdvae": Case(vdvae, ("discretized_logistic_mixture", 1), "log_std", images=True, prior=True),
    "dreamer": Case(dreamer, ("gaussian", 1), "std", prior=True),
}
# tests/test_discrete.py has those of categorical latents
GAUSSIAN = [name for name, preset in PRESETS.items() if preset.latents == "gaussian"]
EVERY = pytest.mark.parametrize("name", GAUSSIAN)
SHAPES = [(6, 20), (4, 3, 5, 7), (1, 784)]


def inputs(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Data, Posterior]:
    case = CASES[name]
    # the one learned log variance of latent_diffusion, the one dispersion a gene of scvi
    shapes = {"latent_diffusion": [shape, ()], "scvi": [shape, shape[1:], shape]}.get(name)
    data = training(*case.data, shape, dtype, shapes=shapes)
    latent = (shape[0], 2, 3, 3) if case.images and len(shape) == 4 else (shape[0], 5)
    p = posterior(latent, case.parameterization, "full" if case.prior else "none", dtype)
    raw, (pm, plv) = p.raw, p.prior
    if name == "scvi":
        raw = raw + 1e-4
    if "diffus" in name:
        raw = 15 * raw  # beyond both ends of the clamp
    if name == "dreamer":  # every other sample is within its free nat
        near = torch.arange(shape[0])[:, None] % 2 == 0
        pm, plv = torch.where(near, p.mu + 0.1, pm), torch.where(near, 2 * raw.log(), plv)
    moved = [t if t is None else t.to(device) for t in (p.mu, raw, pm, plv)]
    return data.to(device).leaves(), Posterior(moved[0], moved[1], (moved[2], moved[3])).leaves()


def widened(data: Data, p: Posterior) -> tuple[Data, Posterior]:
    mu, raw, *prior = (t if t is None else t.detach().double() for t in p.args())
    return Data(tuple(t.detach().double() for t in data.recon), data.target.double()).leaves(), Posterior(
        mu, raw, (prior[0], prior[1])
    ).leaves()


def assert_relative(actual: Tensor, exact: Tensor, tolerance: float = 1e-6) -> None:
    """Each element, but for those in which the terms of a tensor's usual elements cancel."""
    assert actual.shape == exact.shape
    sizes = exact.detach().abs()[exact != 0]
    floor = 4 * tolerance * sizes.median().item() if len(sizes) else 0.0
    torch.testing.assert_close(actual.double(), exact.double(), rtol=tolerance, atol=floor)


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_the_projects_arithmetic(
    backend: str, device: str, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    data, p = inputs(name, shape, dtype, device)
    wide, q = widened(data, p)
    ours = vaefast.elbo_terms(data.recon, data.target, *p.args(), preset=name)
    theirs = CASES[name].theirs(wide.recon, wide.target, *q.tensors())
    assert_relative(ours.loss, theirs)
    torch.testing.assert_close(ours.loss, ours.reconstruction + PRESETS[name].beta * ours.kl)
    found = gradients(ours.loss, [*data.recon, *p.tensors()])
    exact = gradients(theirs, [*wide.recon, *q.tensors()])
    for g, e in zip(found, exact):
        assert g.dtype == dtype
        # without kernels a mixture's gradient has the bound of likelihoods
        assert_relative(g, e, 1e-6 if backend == "native" else 2e-6)


def test_cases_are_whole() -> None:
    """Every preset has a case, and the inputs reach what sets it apart."""
    assert list(CASES) == GAUSSIAN
    _, p = inputs("diffusers", SHAPES[1], torch.float64)
    assert (p.raw > 20).any() and (p.raw < -30).any()
    data, p = inputs("dreamer", SHAPES[0], torch.float64)
    kl = vaefast.gaussian_kl(*p.args(), parameterization="std", reduction="per_sample")
    assert (kl < 1).any() and (kl > 1).any()
    data, _ = inputs("vdvae", SHAPES[1], torch.float64)
    assert (data.target == -1).any() and (data.target == 1).any() and (data.target.abs() < 1).any()


# ---- what the caller gives


def pythae_bce(recon: Tensors, x: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
    """clementchadebec/benchmark_VAE: models/vae/vae_model.py, VAE.loss_function, "bce"."""
    recon_loss = F.binary_cross_entropy(recon[0].flatten(1), x.flatten(1), reduction="none").sum(dim=-1)
    return (recon_loss + kld(mu, log_var)).mean(dim=0)


def test_a_likelihood_wins_and_the_scale_of_the_presets_own_goes(backend: str, device: str) -> None:
    data, p = inputs("pytorch_examples", SHAPES[1], torch.float64, device)
    loss = vaefast.elbo_loss(data.recon, data.target, p.mu, p.raw, likelihood="bernoulli_probs", preset="pythae")
    assert_relative(loss, pythae_bce(data.recon, data.target, p.mu, p.raw))


def test_beta_wins(backend: str, device: str) -> None:
    data, p = inputs("pytorch_vae", SHAPES[0], torch.float64, device)
    for beta in (0.3, torch.tensor(0.3, dtype=torch.float64, device=device)):
        loss = vaefast.elbo_loss(data.recon, data.target, p.mu, p.raw, beta=beta, preset="pytorch_vae")
        assert_relative(loss, pytorch_vae(data.recon, data.target, p.mu, p.raw, kld_weight=0.3))


def test_the_others_win(backend: str, device: str) -> None:
    data, p = inputs("dreamer", SHAPES[0], torch.float64, device)
    given: dict[str, Any] = {
        "likelihood": "laplace",
        "parameterization": Parameterization("std", floor=0.1),
        "reduction": "per_sample",
        "beta": 2.0,
        "free_bits": 0.2,
        "balance": 0.8,
    }
    args = (data.recon, data.target, *p.args())
    found = vaefast.elbo_terms(*args, preset="dreamer", **given)
    plain = vaefast.elbo_terms(*args, free_bits_per="sample", **given)
    for a, e in zip(found, plain):
        assert torch.equal(a, e)
    for a, e in zip(gradients(found.loss, p.tensors()), gradients(plain.loss, p.tensors())):
        assert torch.equal(a, e)


GIVEN: dict[str, Any] = {
    "likelihood": "bernoulli",
    "beta": 1.0,
    "parameterization": "logvar",
    "reduction": "batchmean",
    "free_bits": 0.0,
    "free_bits_per": "dim",
    "balance": None,
}


@pytest.mark.parametrize("name", ["diffusers", "dreamer", "pytorch_examples"])
def test_what_is_given_wins_also_where_it_is_the_default(backend: str, device: str, name: str) -> None:
    """Each argument by itself, in the functions and in the module: the preset with that argument in its place."""
    data, p = inputs(name, SHAPES[0], torch.float64, device)
    args, preset = (data.recon, data.target, *p.args()), PRESETS[name]
    own = {option: getattr(preset, option) for option in GIVEN}
    for option, value in GIVEN.items():
        plain = vaefast.elbo_terms(*args, **{**own, option: value})
        scale = preset.scale if option != "likelihood" else 1.0
        beta = preset.beta if option != "beta" else value
        expected = scale * plain.reconstruction + beta * plain.kl
        assert_relative(vaefast.elbo_loss(*args, preset=name, **{option: value}), expected, 1e-12)
        assert_relative(ELBOLoss(preset=name, **{option: value})(*args), expected, 1e-12)
    everything = vaefast.elbo_loss(*args, preset=name, **GIVEN)
    torch.testing.assert_close(everything, vaefast.elbo_loss(*args))
    objects = {
        **GIVEN,
        "likelihood": Likelihood("bernoulli"),
        "beta": torch.tensor(1.0, device=device, dtype=torch.float64),
        "parameterization": Parameterization("logvar"),
    }
    torch.testing.assert_close(vaefast.elbo_loss(*args, preset=name, **objects), vaefast.elbo_loss(*args))
    by_name = dict(zip(("recon", "target", "mu", "logvar", "prior_mu", "prior_logvar"), args))
    assert torch.equal(vaefast.elbo_loss(**by_name, preset=name, **GIVEN), everything)
    module = ELBOLoss("bernoulli", 1.0, "logvar", "batchmean", preset=name)
    assert (module.likelihood, module.beta, module.reduction) == ("bernoulli", 1.0, "batchmean")
    assert vaefast.elbo_loss(*args, preset=None) == vaefast.elbo_loss(*args)


@pytest.mark.parametrize("reduction", ["per_sample", "sum"])
@pytest.mark.parametrize("name", ["pytorch_vae", "vdvae", "pythae"])
def test_reductions(backend: str, device: str, name: str, reduction: str) -> None:
    data, p = inputs(name, SHAPES[1], torch.float64, device)
    args = (data.recon, data.target, *p.args())
    found = vaefast.elbo_loss(*args, preset=name, reduction=reduction)
    mean = found.mean() if reduction == "per_sample" else found / len(data.target)
    torch.testing.assert_close(mean, vaefast.elbo_loss(*args, preset=name))


def test_a_mask_hides_from_presets_too(backend: str, device: str) -> None:
    data, p = inputs("pytorch_vae", SHAPES[0], torch.float64, device)
    mask = torch.rand(SHAPES[0], generator=generator(3)).to(device) > 0.5
    terms = vaefast.elbo_terms(data.recon, data.target, p.mu, p.raw, weight=mask, preset="pytorch_vae")
    error = torch.where(mask, (data.recon[0] - data.target) ** 2, 0.0)
    assert_relative(terms.reconstruction, error.mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EVERY
def test_half(backend: str, device: str, name: str, dtype: torch.dtype) -> None:
    data, p = inputs(name, SHAPES[0], dtype, device)
    loss = vaefast.elbo_loss(data.recon, data.target, *p.args(), preset=name)
    assert loss.dtype == torch.float32
    wide, q = widened(data, p)
    torch.testing.assert_close(
        loss.double(), vaefast.elbo_loss(wide.recon, wide.target, *q.args(), preset=name), rtol=1e-6, atol=0
    )
    assert {g.dtype for g in gradients(loss, [*data.recon, *p.tensors()])} == {dtype}


# ---- the module, the compiler, presets of one's own


@EVERY
def test_module(backend: str, device: str, name: str) -> None:
    data, p = inputs(name, SHAPES[0], torch.float32, device)
    module = ELBOLoss(preset=name)
    loss = vaefast.elbo_loss(data.recon, data.target, *p.args(), preset=name)
    for m in (module, pickle.loads(pickle.dumps(module))):
        assert torch.equal(m(data.recon, data.target, *p.args()), loss)
    assert f"preset={name!r}" in repr(module)
    assert (module.beta, module.reduction) == (PRESETS[name].beta, PRESETS[name].reduction)
    assert module.likelihood == PRESETS[name].likelihood
    assert ELBOLoss(preset=name, beta=0.3).beta == 0.3


def test_module_without_a_preset_says_nothing_of_it() -> None:
    assert "preset" not in repr(ELBOLoss())


@pytest.mark.parametrize("name", ["pytorch_vae", "dreamer"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(backend: str, device: str, name: str, dynamic: bool) -> None:
    def step(recon: Tensors, x: Tensor, *q: Any) -> Tensor:
        return vaefast.elbo_loss(recon, x, *q, preset=name)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in SHAPES[:1] + [(5, 12)] * dynamic:
        data, p = inputs(name, shape, torch.float32, device)
        results = [f(data.recon, data.target, *p.args()) for f in (step, compiled)]
        for a, e in zip(*([r, *gradients(r, [*data.recon, *p.tensors()])] for r in results)):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty(backend: str, device: str, shape: tuple[int, int]) -> None:
    data, p = training("gaussian", 1, shape).to(device).leaves(), posterior((shape[0], 3), device=device).leaves()
    args, tensors = (data.recon, data.target, p.mu, p.raw), [*data.recon, p.mu, p.raw]
    found = vaefast.elbo_loss(*args, reduction="sum", preset="pytorch_vae")
    assert_relative(found, 0.00025 * vaefast.gaussian_kl(p.mu, p.raw, reduction="sum"))
    assert [g.shape for g in gradients(found, tensors)] == [t.shape for t in tensors]


def test_a_preset_of_ones_own(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "ours", Preset("here", "laplace", beta=0.5, scale=3.0, per_dim=("kl",)))
    data, p = inputs("latent_diffusion", SHAPES[0], torch.float64, device)
    terms = vaefast.elbo_terms(data.recon, data.target, p.mu, p.raw, preset="ours")
    nll = vaefast.reconstruction_loss(data.recon, data.target, likelihood="laplace")
    kl = vaefast.gaussian_kl(p.mu, p.raw) / 20
    for found, exact in zip(terms, (3 * nll + 0.5 * kl, 3 * nll, kl)):
        torch.testing.assert_close(found, exact)


# ---- refusals and documentation

X, Z = torch.zeros(2, 4), torch.zeros(2, 3)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"preset": "keras"}, ValueError, "preset must be one of 'pytorch_examples', 'pythae', .* got 'keras'"),
    ({"preset": 3}, ValueError, "preset must be one of .* got 3"),
    ({"preset": "scvi"}, ValueError, r"recon for .* must be \(mu, theta, pi_logits\), got 1 tensors"),
    ({"preset": "dreamer"}, ValueError, "neither prior_mu nor prior_logvar is a tensor"),
    ({"preset": "pythae", "parameterization": "variance"}, ValueError, "parameterization must be one of"),
    ({"preset": "pythae", "reduction": "mean"}, ValueError, "is not an ELBO"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(backend: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    for f in (vaefast.elbo_loss, vaefast.elbo_terms):
        with pytest.raises(error, match=message):
            f(X, X, Z, Z, **options)
    with pytest.raises(error, match=message):
        ELBOLoss(**options)(X, X, Z, Z)


def test_the_module_checks_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="preset must be one of"):
        ELBOLoss(preset="keras")
    with pytest.raises(ValueError, match="capacity and free_bits"):
        ELBOLoss(preset="dreamer", capacity=3.0)


@EVERY
def test_presets_are_documented(name: str) -> None:
    assert f'`"{name}"`' in PAGE.read_text()
    repository, _, where = PRESETS[name].source.partition(": ")
    assert repository.count("/") == 1 and ".py" in where
    assert "presets.PRESETS" in vaefast.elbo_terms.__doc__
