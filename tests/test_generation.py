"""Means and draws of every likelihood of the registry."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from inputs import FLOATING, LIKELIHOOD_CASES, extreme, generator, planes_shape, training
from mpmath import mpf
from torch.nn import functional as F

import vaefast
from vaefast.reference import DOMAINS, LIKELIHOODS

CASES = pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
DRAWS = 20_000


def params(likelihood: str, count: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """A few settings, [1, ...], whose draws have moments: df is above 2."""
    if LIKELIHOODS[likelihood].planes:
        return [0.5 * torch.randn(planes_shape(likelihood, (1, 6)), generator=generator(3)).to(dtype)]
    numbers = 0.5 * torch.randn(count, 1, 6, generator=generator(3), dtype=torch.float64)
    found = [DOMAINS[d](x) for d, x in zip(LIKELIHOODS[likelihood].domains, numbers)]
    return [(3.0 + x if name == "df" else x).to(dtype) for name, x in zip(LIKELIHOODS[likelihood].params, found)]


@CASES
@pytest.mark.parametrize("dtype", FLOATING)
def test_draws_have_the_mean(likelihood: str, count: int, dtype: torch.dtype) -> None:
    recon = params(likelihood, count, dtype)
    if likelihood == "discretized_logistic_mixture":
        recon[0][:, 9::9] = recon[0][:, 10::9] = recon[0][:, 11::9] = 0  # the means of coupled channels are no means
    mean = vaefast.likelihood_mean(tuple(recon), likelihood)
    assert mean.dtype == dtype
    torch.manual_seed(5)
    draws = vaefast.sample_likelihood(tuple(p.expand(DRAWS, *p.shape[1:]) for p in recon), likelihood)
    if LIKELIHOODS[likelihood].support == "class":
        assert draws.dtype == torch.int64
        draws = F.one_hot(draws, mean.shape[1]).movedim(-1, 1)
    else:
        assert draws.dtype == dtype
    assert draws.shape == (DRAWS, *mean.shape[1:])
    draws = draws.double()
    error = draws.std(0) / DRAWS**0.5
    # 5 standard errors, and what the dtype rounds away
    wanted = mean[0].double()
    assert ((draws.mean(0) - wanted).abs() <= 5 * error + 4 * torch.finfo(dtype).eps * (1 + wanted.abs())).all()


@CASES
def test_draws_are_likely(likelihood: str, count: int) -> None:
    """At the parameters that draws come from, the nll's mean gradient is 0."""
    recon = tuple(p.expand(DRAWS, *p.shape[1:]).clone().requires_grad_() for p in params(likelihood, count))
    torch.manual_seed(6)
    x = vaefast.sample_likelihood(recon, likelihood)
    vaefast.reconstruction_loss(recon, x, likelihood=likelihood, reduction="sum").backward()
    # what there can be reaches to a total, so that the score there need not vanish
    for p in (p for p, domain in zip(recon, LIKELIHOODS[likelihood].domains) if domain != "total"):
        score = p.grad
        assert (score.mean(0).abs() <= 6 * score.std(0) / DRAWS**0.5 + 1e-9).all()


def test_draws_follow_the_seed() -> None:
    recon = training("zero_inflated_negative_binomial", 3).recon
    torch.manual_seed(1)
    first = vaefast.sample_likelihood(recon, "zero_inflated_negative_binomial")
    torch.manual_seed(1)
    assert torch.equal(first, vaefast.sample_likelihood(recon, "zero_inflated_negative_binomial"))


def test_parameters_broadcast_and_numbers_are_taken() -> None:
    mean = torch.zeros(5, 3)
    assert vaefast.sample_likelihood((mean, -1.0), "gaussian").shape == (5, 3)
    assert vaefast.likelihood_mean((mean.exp(), torch.ones(3)), "negative_binomial").tolist() == [[1.0] * 3] * 5


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"recon for 'negative_binomial' must be \(mu, theta\), got 1"):
        vaefast.likelihood_mean(torch.ones(3), "negative_binomial")
    with pytest.raises(ValueError, match=r"likelihood.*'zinb'"):
        vaefast.sample_likelihood(torch.ones(3), "zinb")
    with pytest.raises(TypeError, match=r"recon must be float16.*int64"):
        vaefast.sample_likelihood(torch.ones(3, dtype=torch.int64))


def domain_data(likelihood: str, count: int) -> tuple[torch.Tensor, ...]:
    """The first extremes' parameters, and those of the data that training meets."""
    if LIKELIHOODS[likelihood].planes:
        return extreme(likelihood, count).recon
    return tuple(
        torch.cat([a, b.flatten()]) for a, b in zip(extreme(likelihood, count).recon, training(likelihood, count).recon)
    )


@CASES
@pytest.mark.parametrize("dtype", FLOATING)
def test_draws_are_possible_over_the_domain(likelihood: str, count: int, dtype: torch.dtype) -> None:
    """None negative where there is nothing below 0, none between whole numbers, none infinite, and each with a loss."""
    recon = tuple(
        p.to(dtype).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max) for p in domain_data(likelihood, count)
    )
    if "positive" in LIKELIHOODS[likelihood].domains:
        recon = tuple(
            p.clamp(min=1e-6) if d == "positive" else p for p, d in zip(recon, LIKELIHOODS[likelihood].domains)
        )
    support = LIKELIHOODS[likelihood].support
    x = vaefast.sample_likelihood(recon, likelihood)
    assert not x.isnan().any()
    wide = x.double()
    if support in ("count", "some of total"):
        assert (wide >= 0).all() and (wide == wide.round()).all() and wide.isfinite().all()
    if support == "unit":
        assert (wide >= 0).all() and (wide <= 1).all()
    if support == "positive":
        assert (wide > 0).all()
    if support == "at least 0":
        assert (wide >= 0).all() and (wide == 0).any() and (wide > 0).any()
    with vaefast.use_backend("reference"):
        nll = vaefast.reconstruction_loss(
            tuple(p.double() for p in recon),
            wide if x.is_floating_point() else x,
            likelihood=likelihood,
            reduction="none",
        )
    assert not nll[~wide.isinf().view(nll.shape) if wide.shape == nll.shape else ...].isnan().any()


@pytest.mark.parametrize("log_rate", [-1e4, -30.0, 10.0, 30.0, 44.0, 80.0, 88.7, 300.0, 700.0])
@pytest.mark.parametrize("dtype", FLOATING)
def test_counts_of_any_rate(log_rate: float, dtype: torch.dtype) -> None:
    """Whole, not negative, finite, and five standard deviations from their mean at most."""
    rates = torch.full((1000,), log_rate, dtype=dtype)
    mean = rates.double().exp()
    for likelihood, recon, variance in (
        ("poisson", rates, mean),
        ("negative_binomial", (mean, torch.full_like(mean, 1e3)), mean + mean**2 / 1e3),
    ):
        x = vaefast.sample_likelihood(recon, likelihood).double()
        assert x.isfinite().all() and (x >= 0).all() and (x == x.round()).all()
        assert ((x - mean).abs() <= 6 * variance.sqrt() + 2 * torch.finfo(dtype).eps * mean + 1).all()


# recon, and what it is a limit of, which has the same distribution
DISTRIBUTIONS: list[tuple[str, tuple[float, ...], str, tuple[float, ...]]] = [
    ("negative_binomial", (5.0, math.inf), "poisson", (math.log(5.0),)),
    ("negative_binomial", (5.0, 6e4), "poisson", (math.log(5.0),)),
    ("negative_binomial", (5.0, 0.0), "poisson", (-math.inf,)),
    ("zero_inflated_negative_binomial", (5.0, math.inf, -math.inf), "poisson", (math.log(5.0),)),
    ("zero_inflated_negative_binomial", (5.0, 2.0, math.inf), "poisson", (-math.inf,)),
    ("zero_inflated_negative_binomial", (5.0, 2.0, -math.inf), "negative_binomial", (5.0, 2.0)),
    ("student_t", (1.0, 0.5, math.inf), "gaussian", (1.0, 1.0)),
    ("poisson", (-math.inf,), "negative_binomial", (0.0, 1.0)),
    ("continuous_bernoulli", (math.inf,), "bernoulli", (math.inf,)),
    ("continuous_bernoulli", (-math.inf,), "bernoulli", (-math.inf,)),
    ("gaussian", (1.0, -math.inf), "laplace", (1.0, -math.inf)),
]


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("likelihood", "recon", "other", "of_other"), DISTRIBUTIONS, ids=str)
def test_draws_and_means_at_a_limit(
    likelihood: str, recon: tuple[float, ...], other: str, of_other: tuple[float, ...], dtype: torch.dtype
) -> None:
    """As docs/limits.md has their losses."""
    torch.manual_seed(0)
    draws, others = (
        vaefast.sample_likelihood(tuple(torch.full((DRAWS,), p, dtype=dtype) for p in params), name).double()
        for name, params in ((likelihood, recon), (other, of_other))
    )
    error = 6 * (draws.std() + others.std()) / DRAWS**0.5 + 4 * torch.finfo(dtype).eps
    assert (draws.mean() - others.mean()).abs() <= error
    assert (draws.std() - others.std()).abs() <= 2 * error
    if (likelihood, recon[1:]) != ("negative_binomial", (0.0,)):  # whose mean stays mu, of ever fewer and larger counts
        mean = vaefast.likelihood_mean(tuple(torch.full((1,), p, dtype=dtype) for p in recon), likelihood)
        torch.testing.assert_close(mean.double().item(), others.mean().item(), rtol=0.02, atol=error.item())


def test_a_count_beyond_float64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"draw of 'poisson' is beyond what float64 holds.*1e308"):
        vaefast.sample_likelihood(torch.tensor([1e4]), "poisson")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_of_a_continuous_bernoulli(dtype: torch.dtype) -> None:
    """1 / (1 - e^-l) - 1 / l and its derivative in 50 digits, near 0 and as far as the logits go; draws have it."""
    ends = [sign * x for x in (1e-30, 1e-8, 1e-3, 0.0099, 0.0101, 0.5, 15.0, 17.0, 104.0, 1e4) for sign in (1, -1)]
    logits = torch.tensor(ends, dtype=dtype).requires_grad_()
    mean = vaefast.likelihood_mean(logits, "continuous_bernoulli")
    (slope,) = torch.autograd.grad(mean.sum(), logits)
    with mpmath.workdps(120):
        for at, m, s in zip(map(mpf, logits.tolist()), mean.tolist(), slope.tolist()):
            exact = 1 / -mpmath.expm1(-at) - 1 / at
            exact_slope = 1 / at**2 - mpmath.exp(-at) / mpmath.expm1(-at) ** 2
            assert abs(m - exact) <= max(4 * torch.finfo(dtype).eps, 1e-12) * exact
            assert abs(s - exact_slope) <= max(4 * torch.finfo(dtype).eps, 1e-7) * exact_slope
    draws = vaefast.sample_likelihood(logits.detach().expand(DRAWS, -1), "continuous_bernoulli").double()
    error = 6 * draws.std(0) / DRAWS**0.5 + torch.finfo(dtype).eps
    assert ((draws.mean(0) - mean.detach().double()).abs() <= error).all()


@CASES
def test_the_mean_is_that_of_the_nlls_distribution(likelihood: str, count: int) -> None:
    """Also at the ends of the domain: no clamp stands there. Of a dispersion below 0.1 a few draws make the mean."""
    if LIKELIHOODS[likelihood].planes or likelihood == "student_t":
        pytest.skip("no mean, or three coupled channels: test_draws_have_the_mean has one")
    domains = LIKELIHOODS[likelihood].domains
    keep = torch.randperm(len(domain_data(likelihood, count)[0]), generator=generator(1))[:60]
    recon = tuple(
        p[keep].double().clamp(min=0.1) if domain == "positive" else p[keep].double()
        for p, domain in zip(domain_data(likelihood, count), domains)
    )
    mean = vaefast.likelihood_mean(recon, likelihood)
    draws = vaefast.sample_likelihood(tuple(p.expand(4000, -1) for p in recon), likelihood).double()
    error = draws.std(0) / 4000**0.5
    close = (draws.mean(0) - mean).abs() <= 8 * error + 5e-3
    # of a tail as long as a log-normal's no number of draws shows the mean, nor of what is rarer than they are many
    heavy = (error > 0.2 * mean.abs()) | ~mean.isfinite() | (draws == 0).all(0)
    assert (close | heavy).all() and close.any()
