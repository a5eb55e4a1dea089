"""Importance weights and the bounds made of them, against the papers' formulas in float64 and torch.distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from inputs import (
    FLOATING,
    LIKELIHOOD_CASES,
    PRIORS,
    Data,
    assert_within,
    generator,
    gradients,
    posterior,
    prior_for,
    std_and_logvar,
    training,
)
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import vaefast
from vaefast import bounds
from vaefast.reference import LIKELIHOODS, PARAMETERIZATIONS

K, B, D = 5, 4, 3


def model(
    likelihood: str = "bernoulli",
    count: int = 1,
    dtype: torch.dtype = torch.float32,
    parameterization: Any = "logvar",
    prior: str = "none",
    draws: int = K,
) -> tuple[Data, Tensor, Tensor, Tensor, tuple[Any, Any]]:
    """K draws of B samples: the likelihood's parameters and data, z, q, and a prior."""
    one = training(likelihood, count, (B, 7))
    recon = tuple(torch.stack([training(likelihood, count, (B, 7), seed=s).recon[p] for s in range(draws)])
                  for p in range(count))  # fmt: skip
    q = posterior((B, D), parameterization, prior)
    std, _ = std_and_logvar(parameterization, q.raw)
    z = q.mu + std * torch.randn(draws, B, D, generator=generator(3), dtype=torch.float64)
    data = Data(recon, one.target).to(dtype)
    return data, z.to(dtype), q.mu.to(dtype), q.raw.to(dtype), q.prior


def textbook(data: Data, z: Tensor, mu: Tensor, raw: Tensor, prior: tuple[Any, Any], *, likelihood: str,
             parameterization: Any = "logvar", weight: Tensor | None = None) -> Tensor:  # fmt: skip
    """Burda et al. 2016, equation 8, term by term."""
    entry = LIKELIHOODS[likelihood]
    options = {**entry.options}
    if "dim" in options:
        options["dim"] = 2
    x = data.target.expand(len(z), *data.target.shape)
    nll = entry.nll(x, *data.recon, **options).reshape(len(z), *x.shape[1:2], -1) if weight is None else None
    if nll is None:
        nll = (weight * entry.nll(x, *data.recon, **options)).flatten(2)
    std, _ = std_and_logvar(parameterization, raw)
    pm, plv = (torch.as_tensor(0.0 if p is None else p, dtype=torch.float64) for p in prior)
    log_q = Normal(mu, std).log_prob(z).flatten(2).sum(2)
    log_p = Normal(pm, torch.exp(0.5 * plv)).log_prob(z).flatten(2).sum(2)
    return -nll.sum(2) + log_p - log_q


def of_dim_two(likelihood: str) -> Any:
    """The likelihood, with a mixture's planes behind draws and batch."""
    entry = LIKELIHOODS[likelihood]
    return vaefast.Likelihood(likelihood, dim=2) if "dim" in entry.options else likelihood


def in_float64(data: Data, *tensors: Any) -> tuple[Any, ...]:
    """Leaves of float64 with the same numbers."""
    wide = [t.detach().double().requires_grad_() if isinstance(t, Tensor) else t for t in tensors]
    return data.to(torch.float64).leaves(), *wide


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
def test_log_weights_of_every_likelihood(likelihood: str, count: int, dtype: torch.dtype, backend: str) -> None:
    data, z, mu, raw, _ = model(likelihood, count, dtype)
    leaves = data.leaves()
    z, mu, raw = (t.requires_grad_() for t in (z, mu, raw))
    recon = leaves.recon if count > 1 else leaves.recon[0]
    log_w = bounds.log_weights(recon, leaves.target, z, mu, raw, likelihood=of_dim_two(likelihood))
    assert log_w.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide, *qs = in_float64(data, z, mu, raw)
    exact = textbook(wide, *qs, (None, None), likelihood=likelihood)
    tolerance = 1e-12 if dtype == torch.float64 else 4e-6
    assert_within(log_w, exact, tolerance, "log w", slack=tolerance * 20)
    found, true = gradients(log_w, (*leaves.recon, z, mu, raw)), gradients(exact, (*wide.recon, *qs))
    narrow = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 10 * tolerance)
    for f, t in zip(found, true, strict=True):
        assert f.dtype == dtype
        largest = t[t.isfinite()].abs().max()
        assert_within(f, t, narrow, "gradient", slack=narrow * largest)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(
    "parameterization", [*PARAMETERIZATIONS, vaefast.Parameterization("softplus", (-1.0, 1.0), 0.1)]
)
def test_log_weights_of_every_posterior_and_prior(parameterization: Any, prior: str, backend: str) -> None:
    data, z, mu, raw, of_prior = model(dtype=torch.float64, parameterization=parameterization)
    of_prior = prior_for(prior, (B, D), torch.float64)
    wide, z, mu, raw, *given = in_float64(data, z, mu, raw, *of_prior)
    trained = [*wide.recon, z, mu, raw, *(t for t in given if isinstance(t, Tensor))]
    exact = textbook(wide, z, mu, raw, tuple(given), likelihood="bernoulli", parameterization=parameterization)
    log_w = bounds.log_weights(wide.recon[0], wide.target, z, mu, raw, *given, parameterization=parameterization)
    assert_within(log_w, exact, 1e-12, "log w")
    for f, t in zip(gradients(log_w, trained), gradients(exact, trained), strict=True):
        assert_within(f, t, 1e-12, "gradient")


def test_large_draws_go_block_by_block(backend: str) -> None:
    """Beyond what fits in a cache, with a prior of its own."""
    shape = (70, 40, 210)
    z = torch.randn(shape, generator=generator(1)).requires_grad_()
    mu, logvar, pm, plv = (torch.randn(40, 210, generator=generator(2 + n)).requires_grad_() for n in range(4))
    recon, x = torch.randn(*shape, generator=generator(7)).requires_grad_(), torch.rand(40, 210)
    data, trained = Data((recon,), x), (recon, z, mu, logvar, pm, plv)
    log_w = bounds.log_weights(recon, x, z, mu, logvar, pm, plv)
    wide, *wides = in_float64(data, z, mu, logvar, pm, plv)
    exact = textbook(wide, *wides[:3], tuple(wides[3:]), likelihood="bernoulli")
    assert_within(log_w, exact, 2e-6, "log w", slack=2e-6 * exact.abs().max())
    for f, t in zip(gradients(log_w, trained), gradients(exact, (*wide.recon, *wides)), strict=True):
        assert_within(f, t, 2e-6, "gradient", slack=2e-6 * t.abs().max())


def test_the_target_is_not_copied(backend: str) -> None:
    """A target whose draws would not fit: 4,096 draws of it are 2 GB."""
    x = torch.rand(2, 64, generator=generator(0))
    seen: list[Tensor] = []
    recon = torch.randn(64, 2, 64).requires_grad_()
    z, mu = torch.randn(64, 2, D), torch.zeros(2, D)

    def pack(t: Tensor) -> Tensor:
        seen.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        bounds.log_weights(recon, x, z, mu, torch.zeros(2, D))
    targets = [
        t for t in seen if t.shape[-2:] == x.shape and t.untyped_storage().nbytes() == x.untyped_storage().nbytes()
    ]
    assert targets and all(t.data_ptr() == x.data_ptr() for t in targets)


def test_a_mask_hides_what_is_under_it(backend: str) -> None:
    data, z, mu, raw, _ = model(dtype=torch.float64)
    weight = torch.rand(B, 7, generator=generator(4), dtype=torch.float64) - 0.4
    for w in (weight.clamp(min=0), weight > 0):
        recon, x = data.recon[0].clone(), data.target.clone()
        x[w == 0] = torch.nan
        recon[:, w == 0] = torch.nan
        leaf = recon.requires_grad_()
        log_w = bounds.log_weights(leaf, x, z, mu, raw, weight=w)
        exact = textbook(data.to(torch.float64), z, mu, raw, (None, None), likelihood="bernoulli", weight=w.double())
        assert_within(log_w, exact, 1e-12)
        (found,) = gradients(log_w, (leaf,))
        assert found.isfinite().all() and (found[:, w == 0] == 0).all() and (found[:, w != 0] != 0).all()
    # and a weight for each draw
    each = torch.rand(K, B, 7, generator=generator(5), dtype=torch.float64)
    exact = textbook(data.to(torch.float64), z, mu, raw, (None, None), likelihood="bernoulli", weight=each)
    assert_within(bounds.log_weights(data.recon[0], data.target, z, mu, raw, weight=each), exact, 1e-12)


MIXTURE = MixtureSameFamily(
    Categorical(torch.tensor([0.2, 0.8])),
    Independent(Normal(torch.tensor([[-1.0] * D, [2.0] * D]), torch.ones(2, D)), 1),
)


@pytest.mark.parametrize(
    "prior", [Independent(Normal(torch.zeros(D), 2 * torch.ones(D)), 1), MIXTURE,
              Independent(Normal(torch.zeros(B, D), torch.ones(B, D)), 1)], ids=["normal", "mixture", "own"],
)  # fmt: skip
def test_priors_that_have_a_log_prob(prior: Any, backend: str) -> None:
    data, z, mu, raw, _ = model()
    z = z.requires_grad_()
    log_w = bounds.log_weights(data.recon[0], data.target, z, mu, raw, prior=prior)
    standard = bounds.log_weights(data.recon[0], data.target, z, mu, raw)
    expected = standard + prior.log_prob(z) - Normal(0.0, 1.0).log_prob(z).sum(2)
    torch.testing.assert_close(log_w, expected, rtol=1e-5, atol=1e-5)
    for f, t in zip(gradients(log_w, (z,)), gradients(expected, (z,)), strict=True):
        torch.testing.assert_close(f, t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(("likelihood", "count"), [("bernoulli", 1), ("gaussian", 2), ("categorical", 1)])
def test_several_batch_dimensions(likelihood: str, count: int, prior: str, backend: str) -> None:
    """[K, B, T, ...] is [K, B T, ...] with the batch's dimensions."""
    data, z, mu, raw, _ = model(likelihood, count, torch.float64)
    pm, plv = prior_for(prior, (2, 2, D), torch.float64)
    flat = [p.expand(2, 2, D).reshape(4, D) if isinstance(p, Tensor) else p for p in (pm, plv)]
    weight = torch.rand(2, 2, 7, generator=generator(5), dtype=torch.float64)
    chosen = LIKELIHOODS[likelihood]
    apart = vaefast.Likelihood(likelihood, dim=3) if "dim" in chosen.options else likelihood
    expected = bounds.iwae_loss(data.recon, data.target, z, mu, raw, *flat, likelihood=of_dim_two(likelihood),
                                weight=weight.flatten(0, 1), reduction="per_sample")  # fmt: skip
    recon = tuple(p.unflatten(1, (2, 2)) for p in data.recon)
    split = [t.unflatten(d, (2, 2)) for d, t in ((0, data.target), (1, z), (0, mu), (0, raw))]
    common: dict[str, Any] = {"likelihood": apart, "weight": weight, "batch_dims": 2}
    found = bounds.iwae_loss(recon, *split, pm, plv, **common, reduction="per_sample")
    torch.testing.assert_close(found, expected.view(2, 2))
    torch.testing.assert_close(bounds.iwae_loss(recon, *split, pm, plv, **common), expected.mean())
    assert bounds.log_weights(recon, *split, pm, plv, **common).shape == (K, 2, 2)


# -- the bounds


def iwae(w: Tensor) -> Tensor:
    return torch.log(w.mean(0))


def elbo(w: Tensor) -> Tensor:
    return torch.log(w).mean(0)


def renyi(alpha: float) -> Callable[[Tensor], Tensor]:
    """Li & Turner 2016 (arXiv:1602.02311)."""
    return lambda w: torch.log((w ** (1 - alpha)).mean(0)) / (1 - alpha)


def miwae(w: Tensor) -> Tensor:
    """Rainforth et al. 2018, of three groups of two."""
    return torch.stack([iwae(w[2 * m : 2 * m + 2]) for m in range(3)]).mean(0)


BOUNDS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "iwae": ({}, iwae),
    "elbo": ({"alpha": 1}, elbo),
    "elbo by mix": ({"mix": 1}, elbo),
    "renyi 0.3": ({"alpha": 0.3}, renyi(0.3)),
    "renyi 2": ({"alpha": 2.0}, renyi(2.0)),
    "renyi -1": ({"alpha": -1.0}, renyi(-1.0)),
    "miwae": ({"groups": 3}, miwae),
    "ciwae": ({"mix": 0.3}, lambda w: 0.3 * elbo(w) + 0.7 * iwae(w)),
    "groups of one": ({"groups": 6}, elbo),
    "all": (
        {"groups": 3, "mix": 0.25, "alpha": 0.5},
        lambda w: 0.25 * elbo(w) + 0.75 * torch.stack([renyi(0.5)(w[2 * m : 2 * m + 2]) for m in range(3)]).mean(0),
    ),
}


@pytest.mark.parametrize("reduction", ["per_sample", "batchmean", "sum"])
@pytest.mark.parametrize("name", list(BOUNDS))
def test_bounds_are_their_papers(name: str, reduction: str, backend: str) -> None:
    options, formula = BOUNDS[name]
    data, z, mu, raw, _ = model(dtype=torch.float64, draws=6)
    wide, z, mu, raw = in_float64(data, z, mu, raw)
    trained = (*wide.recon, z, mu, raw)
    exact = -formula(torch.exp(textbook(wide, z, mu, raw, (None, None), likelihood="bernoulli")))
    exact = exact if reduction == "per_sample" else exact.mean() if reduction == "batchmean" else exact.sum()
    loss = bounds.iwae_loss(wide.recon[0], wide.target, z, mu, raw, reduction=reduction, **options)
    assert_within(loss, exact, 1e-12)
    for f, t in zip(gradients(loss, trained), gradients(exact, trained), strict=True):
        assert_within(f, t, 1e-11)


def test_bounds_of_weights_that_no_exponential_holds() -> None:
    log_w = 3 * torch.randn(6, B, generator=generator(0)) - 5000
    for options, formula in BOUNDS.values():
        found = bounds.bound_of(log_w, **options, reduction="per_sample")
        exact = -(formula(torch.exp(log_w.double() + 5000)) - 5000)
        assert_within(found, exact, 3e-7)
    for log_w in (torch.full((3, 2), -torch.inf), torch.tensor([[-torch.inf], [0.0], [-2.0]])):
        torch.testing.assert_close(
            bounds.bound_of(log_w, reduction="per_sample"), -(torch.logsumexp(log_w, 0) - math.log(3))
        )


@pytest.mark.parametrize("alpha", [1 - 1e-3, 1 - 1e-6, 1 + 1e-6, 1 - 1e-9])
def test_an_alpha_next_to_one_keeps_its_digits(alpha: float) -> None:
    """Towards the ELBO: mean + (1 - alpha) var / 2, where the textbook's logarithm of 1 divides by nothing."""
    log_w = torch.randn(64, B, generator=generator(0)) - 90
    wide = log_w.double()
    near = wide.mean(0) + (1 - alpha) / 2 * wide.var(0, correction=0)
    found = bounds.bound_of(log_w, alpha=alpha, reduction="per_sample")
    assert_within(found, -near, 1e-6, slack=1e-4 * abs(1 - alpha))


# -- the estimators


class Conjugate:
    """x ~ N(W z, I), z ~ N(0, I), in float64, and an encoder off its posterior."""

    def __init__(self, samples: int = 1) -> None:
        g = generator(11)
        self.W = 0.8 * torch.randn(4, 2, generator=g, dtype=torch.float64)
        self.x = torch.randn(samples, 4, generator=g, dtype=torch.float64)
        precision = torch.eye(2, dtype=torch.float64) + self.W.T @ self.W
        self.posterior_mean = torch.linalg.solve(precision, self.W.T @ self.x.T).T
        self.posterior_logvar = -torch.log(torch.diagonal(precision)).expand(samples, 2)

    def encoder(self, off: float, wider: float = 0.3) -> list[Tensor]:
        return [(self.posterior_mean + off).requires_grad_(), (self.posterior_logvar + wider).requires_grad_()]

    def sampled(self, q: Sequence[Tensor], draws: int, times: int, W: Tensor | None = None, **options: Any) -> Any:
        """The gradient in q's two, and in W, of each of ``times`` losses of their own draws."""
        mu, logvar = (t.expand(times, *t.shape[1:]).detach().requires_grad_() for t in q)
        W = self.W.expand(times, 4, 2).detach().requires_grad_() if W is None else W
        z = vaefast.reparameterize(mu, logvar, num_samples=draws)
        recon = torch.einsum("bxd,kbd->kbx", W, z)
        x = self.x.expand(times, 4)
        loss = bounds.iwae_loss(recon, x, z, mu, logvar, likelihood="gaussian", reduction="sum", **options)
        return torch.autograd.grad(loss, (mu, logvar, W))


ON_ALPHAS = [{}, {"alpha": 0.5}, {"alpha": 1.0}, {"mix": 0.4}, {"groups": 2}, {"groups": 2, "mix": 0.3, "alpha": -0.5}]


@pytest.mark.parametrize("options", ON_ALPHAS, ids=str)
def test_dreg_has_no_bias(options: dict[str, Any]) -> None:
    """Against the reparameterized estimator, which is the bound's own gradient, within 3 standard errors; and so the
    decoder's, which are the same number by number."""
    conjugate, times = Conjugate(), 30_000
    q = conjugate.encoder(0.3)
    torch.manual_seed(1)
    dreg = conjugate.sampled(q, 4, times, estimator="dreg", **options)
    torch.manual_seed(2)
    plain = conjugate.sampled(q, 4, times, **options)
    for ours, own in zip(dreg[:2], plain[:2]):
        difference = ours.mean(0) - own.mean(0)
        error = (ours.var(0) / times + own.var(0) / times).sqrt()
        assert (difference.abs() < 3 * error).all(), difference / error
    torch.manual_seed(1)
    torch.testing.assert_close(dreg[2], conjugate.sampled(q, 4, times, **options)[2])


def test_dreg_is_the_papers_equation() -> None:
    """Tucker et al. 2019, written with each draw's own gradient: w_k^2 d log w_k / dz dz / dphi."""
    conjugate = Conjugate()
    mu, logvar = conjugate.encoder(0.3)
    eps = torch.randn(5, 1, 2, generator=generator(2), dtype=torch.float64)
    z = vaefast.reparameterize(mu.expand(5, 1, 2), logvar.expand(5, 1, 2), eps=eps)
    loss = bounds.iwae_loss(z @ conjugate.W.T, conjugate.x, z, mu, logvar, likelihood="gaussian", estimator="dreg")
    found = torch.autograd.grad(loss, (mu, logvar))
    std = torch.exp(0.5 * logvar).detach()
    leaf = (mu.detach() + std * eps).requires_grad_()
    log_w = (
        Normal(leaf @ conjugate.W.T, 1.0).log_prob(conjugate.x).sum(2)
        + Normal(0.0, 1.0).log_prob(leaf).sum(2)
        - Normal(mu.detach(), std).log_prob(leaf).sum(2)
    )
    (slope,) = torch.autograd.grad(log_w.sum(), leaf)
    squares = torch.softmax(log_w.detach(), 0).square().unsqueeze(2)
    torch.testing.assert_close(found[0], -(squares * slope).sum(0))
    torch.testing.assert_close(found[1], -(squares * slope * eps * std / 2).sum(0))


@pytest.mark.parametrize(("draws", "alpha"), [(1, 0.0), (4, 1.0)])
def test_stl_has_no_bias_where_it_has_none(draws: int, alpha: float) -> None:
    conjugate, times = Conjugate(), 60_000
    mu, logvar = q = conjugate.encoder(0.3)
    stl = conjugate.sampled(q, draws, times, estimator="stl", alpha=alpha)
    # the ELBO's gradient in closed form: its reconstruction's mean and the KL
    squares = (conjugate.x - mu @ conjugate.W.T).square().sum() + (conjugate.W.square() * logvar.exp()).sum()
    exact = torch.autograd.grad(0.5 * squares + vaefast.gaussian_kl(mu, logvar, reduction="sum"), (mu, logvar))
    for found, true in zip(stl, exact):
        assert ((found.mean(0) - true[0]).abs() < 3 * (found.var(0) / times).sqrt()).all()


def test_stl_of_several_draws_has_the_bias_that_is_documented() -> None:
    conjugate, times = Conjugate(), 60_000
    q = conjugate.encoder(0.3)
    stl, plain = (conjugate.sampled(q, 4, times, estimator=e)[0] for e in ("stl", "iwae"))
    error = (stl.var(0) / times + plain.var(0) / times).sqrt()
    assert ((stl.mean(0) - plain.mean(0)).abs() > 10 * error).any()


@pytest.mark.parametrize("draws", [2, 16])
def test_path_estimators_vary_less(draws: int) -> None:
    conjugate = Conjugate()
    q = conjugate.encoder(0.1, 0.6)
    variances = {e: conjugate.sampled(q, draws, 4000, estimator=e)[0].var(0).sum() for e in bounds.ESTIMATORS}
    assert variances["dreg"] < 0.5 * variances["iwae"]
    assert variances["stl"] < 0.8 * variances["iwae"]


def signal_to_noise(estimator: str, draws: int) -> float:
    found = Conjugate().sampled(Conjugate().encoder(0.1, 0.6), draws, 5000, estimator=estimator)[0]
    return float((found.mean(0).abs() / found.std(0)).mean())


def test_the_signal_to_noise_falls_with_draws_but_not_that_of_dreg() -> None:
    """Rainforth et al. 2018, theorem 1: as 1 / sqrt(K) for the encoder; Tucker et al. 2019: as sqrt(K). q is wider than
    the posterior, so that the weights have a variance."""
    few, many = signal_to_noise("iwae", 2), signal_to_noise("iwae", 32)
    assert many < 0.5 * few
    few, many = signal_to_noise("dreg", 2), signal_to_noise("dreg", 32)
    assert many > 2 * few


@pytest.mark.parametrize("estimator", bounds.ESTIMATORS)
def test_values_do_not_depend_on_the_estimator(estimator: str) -> None:
    data, z, mu, raw, _ = model()
    torch.testing.assert_close(
        bounds.iwae_loss(data.recon[0], data.target, z, mu, raw, estimator=estimator),
        bounds.iwae_loss(data.recon[0], data.target, z, mu, raw),
    )


def test_a_path_that_does_not_lead_to_the_encoder_is_refused() -> None:
    decoder = torch.nn.Linear(D, 7)
    mu, logvar = torch.zeros(B, D, requires_grad=True), torch.zeros(B, D, requires_grad=True)
    x, z = torch.rand(B, 7), vaefast.reparameterize(mu, logvar, num_samples=K)
    recon = decoder(z)
    for estimator in ("stl", "dreg"):
        with pytest.raises(ValueError, match="do not detach it"):
            bounds.iwae_loss(decoder(z.detach()), x, z.detach(), mu, logvar, estimator=estimator)
    with pytest.raises(ValueError, match="was not computed from this tensor"):
        bounds.iwae_loss(recon, x, z.view_as(z), mu, logvar, estimator="dreg")
    with torch.no_grad():
        bounds.iwae_loss(recon, x, z, mu, logvar, estimator="dreg")
    bounds.iwae_loss(recon, x, z, mu, logvar, estimator="dreg")
    with pytest.raises(ValueError, match="scale its gradient twice"):
        bounds.iwae_loss(recon, x, z, mu, logvar, estimator="dreg")


def test_dreg_through_a_decoder_of_flattened_draws() -> None:
    """What decoders do with draws is behind z, and so is a retained graph."""
    decoder = torch.nn.Sequential(torch.nn.Linear(D, 5), torch.nn.Tanh(), torch.nn.Linear(5, 7)).double()
    data, _, mu, raw, _ = model(dtype=torch.float64)
    mu, raw = mu.requires_grad_(), raw.requires_grad_()
    found = []
    for flat in (True, False):
        torch.manual_seed(0)
        z = vaefast.reparameterize(mu, raw, num_samples=K)
        recon = decoder(z.flatten(0, 1)).view(K, B, 7) if flat else decoder(z)
        loss = bounds.iwae_loss(recon, data.target, z, mu, raw, estimator="dreg")
        trained = (mu, raw, *decoder.parameters())
        found += [torch.autograd.grad(loss, trained, retain_graph=True), torch.autograd.grad(loss, trained)]
    for again in found[1:]:
        torch.testing.assert_close(found[0], again)


def test_piwae_is_two_bounds() -> None:
    data, z, mu, raw, _ = model(draws=6)
    args = data.recon[0], data.target, z, mu, raw
    losses = bounds.piwae_losses(*args, groups=3)
    torch.testing.assert_close(losses.encoder, bounds.iwae_loss(*args, groups=3))
    torch.testing.assert_close(losses.decoder, bounds.iwae_loss(*args))


def test_one_draw_at_alpha_one_is_the_elbo_at_a_sample() -> None:
    data, z, mu, raw, _ = model(draws=1)
    nll = vaefast.reconstruction_loss(data.recon[0][0], data.target)
    kl = vaefast.sample_with_kl(mu, raw, eps=(z[0] - mu) * torch.exp(-0.5 * raw), estimator="mc")[1]
    for alpha in (0.0, 1.0, 3.0):
        loss = bounds.iwae_loss(data.recon[0], data.target, z, mu, raw, alpha=alpha)
        torch.testing.assert_close(loss, nll + kl)


@pytest.mark.parametrize(("likelihood", "count"), [("bernoulli", 1), ("gaussian", 2)])
def test_gradients_of_gradients(likelihood: str, count: int, backend: str) -> None:
    data, z, mu, raw, _ = model(likelihood, count, torch.float64, draws=3)
    pm, plv = prior_for("full", (B, D), torch.float64)
    wide, *trained = in_float64(Data(tuple(p[..., :2] for p in data.recon), data.target[:, :2]), z, mu, raw, pm, plv)

    def loss(z: Tensor, mu: Tensor, raw: Tensor, pm: Tensor, plv: Tensor, *recon: Tensor) -> Tensor:
        return bounds.iwae_loss(recon, wide.target, z, mu, raw, pm, plv, likelihood=likelihood)

    assert torch.autograd.gradcheck(loss, (*trained, *wide.recon), fast_mode=True)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(loss, (*trained, *wide.recon), fast_mode=True)
    first = torch.autograd.grad(loss(*trained, *wide.recon), trained, create_graph=True)
    torch.autograd.grad(sum(t.square().sum() for t in first), trained)


@pytest.mark.parametrize(
    "options", [{}, {"estimator": "stl"}, {"estimator": "dreg"}, {"alpha": 0.5, "groups": 5}], ids=str
)
def test_compiled_whole(options: dict[str, Any], backend: str) -> None:
    decoder = torch.nn.Linear(D, 7)

    def step(mu: Tensor, logvar: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        z = vaefast.reparameterize(mu.expand(K, B, D), logvar.expand(K, B, D), eps=eps)
        return bounds.iwae_loss(decoder(z), x, z, mu, logvar, **options)

    mu, logvar = (torch.randn(B, D, generator=generator(n)).requires_grad_() for n in range(2))
    x, eps = torch.rand(B, 7), torch.randn(K, B, D)
    results = []
    # the whole of it once; what is traced of the others is what is compiled
    by = "inductor" if options.get("estimator") == "dreg" and backend == "native" else "aot_eager"
    for f in (step, torch.compile(step, fullgraph=True, backend=by)):
        loss = f(mu, logvar, x, eps)
        results.append((loss, *torch.autograd.grad(loss, (mu, logvar, *decoder.parameters()))))
    torch.testing.assert_close(results[1], results[0])


def test_under_torch_func() -> None:
    data, z, mu, raw, _ = model(dtype=torch.float64)

    def loss(mu: Tensor) -> Tensor:
        return bounds.iwae_loss(data.recon[0], data.target, z, mu, raw)

    expected = torch.autograd.functional.jacobian(loss, mu)
    torch.testing.assert_close(torch.func.grad(loss)(mu), expected)
    torch.testing.assert_close(torch.func.jvp(loss, (mu,), (torch.ones_like(mu),))[1], expected.sum())


def test_batched_gradients() -> None:
    data, z, mu, raw, _ = model(dtype=torch.float64)
    mu = mu.requires_grad_()
    log_w = bounds.log_weights(data.recon[0], data.target, z, mu, raw)[:, 0]
    rows = torch.autograd.grad(log_w, mu, torch.eye(K, dtype=torch.float64), is_grads_batched=True, retain_graph=True)[
        0
    ]
    for k in range(K):
        torch.testing.assert_close(rows[k], torch.autograd.grad(log_w[k], mu, retain_graph=True)[0])


@pytest.mark.parametrize("batch", [0, 1])
def test_small_and_empty_batches(batch: int, backend: str) -> None:
    recon, z = torch.randn(K, batch, 7, requires_grad=True), torch.randn(K, batch, D)
    mu, x = torch.zeros(batch, D, requires_grad=True), torch.rand(batch, 7)
    loss = bounds.iwae_loss(recon, x, z, mu, torch.zeros(batch, D), reduction="sum")
    loss.backward()
    assert loss.isfinite() and recon.grad is not None and mu.grad is not None and mu.grad.shape == mu.shape


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "z": (lambda a: {**a, "z": a["z"][0]}, "num_samples=K"),
    "no draws": (lambda a: {**a, "z": a["z"][:0], "recon": a["recon"][:0]}, "at least one"),
    "target with draws": (lambda a: {**a, "target": a["recon"]}, "without the draws"),
    "recon": (lambda a: {**a, "recon": a["recon"][0]}, "the draws and the batch"),
    "other draws": (lambda a: {**a, "recon": a["recon"][:2]}, "the draws and the batch"),
    "optimal": (lambda a: {**a, "likelihood": "gaussian_optimal"}, "no density"),
    "two priors": (lambda a: {**a, "prior": MIXTURE, "prior_mu": 0.0}, "pass one prior"),
    "no log_prob": (lambda a: {**a, "prior": 3}, "log_prob"),
    "elementwise prior": (lambda a: {**a, "prior": Normal(0.0, 1.0)}, "Independent"),
    "estimator": (lambda a: {**a, "estimator": "mc"}, "'iwae', 'stl', 'dreg'"),
    "reduction": (lambda a: {**a, "reduction": "mean"}, "batchmean"),
    "internal reduction": (lambda a: {**a, "reduction": "per_draw"}, "batchmean"),
    "alpha": (lambda a: {**a, "alpha": math.inf}, "finite"),
    "alpha's type": (lambda a: {**a, "alpha": "1"}, "a number"),
    "groups": (lambda a: {**a, "groups": 2}, "equal parts"),
    "mix": (lambda a: {**a, "mix": 1.5}, "from 0"),
    "logvar": (lambda a: {**a, "logvar": a["logvar"][:1]}, "must be equal"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals(name: str, backend: str) -> None:
    change, message = REFUSED[name]
    args: dict[str, Any] = {
        "recon": torch.zeros(K, B, 7), "target": torch.zeros(B, 7), "z": torch.zeros(K, B, D),
        "mu": torch.zeros(B, D), "logvar": torch.zeros(B, D),
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        bounds.iwae_loss(**change(args))


def test_the_engines_reduction_is_no_ones_else(backend: str) -> None:
    recon, x = torch.zeros(K, B, 7), torch.zeros(K, B, 7)
    for call in (
        lambda: vaefast.reconstruction_loss(recon, x, reduction="per_draw"),
        lambda: vaefast.gaussian_kl(recon, x, reduction="per_draw"),
        lambda: vaefast.elbo_loss(recon, x, recon, x, reduction="per_draw"),
        lambda: vaefast.sample_with_kl(recon, x, reduction="per_draw"),
    ):
        with pytest.raises(ValueError, match="reduction"):
            call()


def test_weights_that_are_almost_nothing() -> None:
    """Softmaxes of log weights that are far apart are subnormal, and so would be what they multiply: each such number
    takes as long as some hundred others. The kept gradients count them as 0, and nothing else changes."""
    recon = torch.randn(5, 4, 70, generator=generator(), requires_grad=True)
    target = torch.rand(4, 70, generator=generator(1))
    z, still = torch.zeros(5, 4, 3), torch.zeros(4, 3)
    log_w = vaefast.bounds.log_weights(recon, target, z, still, still)
    upstream = torch.exp(-torch.linspace(0, 110, 20, dtype=torch.float64)).float().view(5, 4)
    (got,) = torch.autograd.grad(log_w, recon, upstream)
    exact = upstream.double().unsqueeze(2) * (target - torch.sigmoid(recon.detach().double()))
    least = torch.finfo(torch.float32).tiny
    assert ((0 < upstream) & (upstream < least)).any()
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=2 * least)
    assert torch.tensor(least).mul(0.5) > 0
