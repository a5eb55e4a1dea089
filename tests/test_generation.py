"""Means and draws of every likelihood of the registry."""

from __future__ import annotations

import pytest
import torch
from inputs import FLOATING, LIKELIHOOD_CASES, generator, planes_shape, training
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
