"""log p(x) by importance sampling, against the closed form of probabilistic PCA."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from inputs import assert_within, generator
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

import vaefast
from vaefast.bounds import LogEvidence, bound_of, log_evidence, log_weights

X, Z, B = 6, 2, 8
G = generator(3)
W, BIAS = 0.7 * torch.randn(X, Z, generator=G), torch.randn(X, generator=G)
NOISE = 0.5  # the variance of x given z
DATA = torch.randn(B, X, generator=G)
PRECISION = torch.eye(Z) + W.T @ W / NOISE


def exact(prior_mu: float = 0.0) -> Tensor:
    covariance = (W @ W.T + NOISE * torch.eye(X)).double()
    return MultivariateNormal((BIAS + W.sum(1) * prior_mu).double(), covariance).log_prob(DATA.double())


def encode(x: Tensor, widened: float = 0.3) -> tuple[Tensor, Tensor]:
    """The posterior's mean, and more than its width."""
    mean = torch.linalg.solve(PRECISION, W.T @ (x - BIAS).T / NOISE).T
    return mean, (widened - torch.log(torch.diagonal(PRECISION))).expand(len(x), Z)


def decode(z: Tensor) -> tuple[Tensor, Tensor]:
    return z @ W.T + BIAS, torch.tensor(math.log(NOISE))


def evidence(**options: Any) -> LogEvidence:
    return log_evidence(encode, decode, DATA, likelihood="gaussian", **options)


def test_it_is_the_closed_form_within_its_standard_error(backend: str) -> None:
    found = evidence(num_samples=20_000, generator=generator(1))
    assert all(t.dtype == torch.float64 and t.shape == (B,) for t in found)
    assert (found.standard_error < 0.02).all()
    assert ((found.value - exact()).abs() < 4 * found.standard_error).all()
    assert (found.effective_samples > 1000).all() and (found.effective_samples < 20_000).all()


def test_the_standard_error_is_that_of_many_runs() -> None:
    runs = [evidence(num_samples=200) for _ in range(300)]
    spread = torch.stack([r.value for r in runs]).std(0)
    told = torch.stack([r.standard_error for r in runs]).square().mean(0).sqrt()
    torch.testing.assert_close(told, spread, rtol=0.25, atol=0.0)


def test_more_draws_raise_it() -> None:
    """In expectation (Burda et al. 2016, theorem 1), from the ELBO up to log p(x)."""
    means = [torch.stack([evidence(num_samples=k).value for _ in range(400)]).mean() for k in (1, 2, 8, 64)]
    assert means == sorted(means) and means[-1] < exact().mean() + 0.01


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunks_only_share_the_work(chunk: int) -> None:
    """The running sums of any chunks are those of all draws at once, whatever their weights' size."""
    log_w = 30 * torch.randn(64, B, generator=generator(4)) - 2000
    log_w[:9, 0] = -torch.inf
    sums = vaefast.bounds._RunningSums()
    for part in log_w.split(chunk):
        sums.add(part)
    found = sums.evidence()
    wide = log_w.double()
    torch.testing.assert_close(found.value, torch.logsumexp(wide, 0) - math.log(64))
    w = torch.exp(wide - wide.amax(0))
    torch.testing.assert_close(found.effective_samples, w.sum(0) ** 2 / (w**2).sum(0))
    torch.testing.assert_close(found.standard_error, w.std(0) / w.mean(0) / 8)


def test_it_is_the_bound_of_the_same_draws() -> None:
    found = evidence(num_samples=50, chunk=50, generator=generator(5))
    mu, logvar = encode(DATA)
    z = vaefast.reparameterize(mu, logvar, num_samples=50, generator=generator(5))
    log_w = log_weights(decode(z), DATA, z, mu, logvar, likelihood="gaussian")
    torch.testing.assert_close(found.value.float(), -bound_of(log_w, reduction="per_sample"))


def test_decoders_see_a_chunk_at_a_time_and_progress_is_told() -> None:
    seen: list[torch.Size] = []
    told: list[tuple[int, int]] = []

    def watched(z: Tensor) -> tuple[Tensor, Tensor]:
        assert not torch.is_grad_enabled()
        seen.append(z.shape)
        return decode(z)

    log_evidence(encode, watched, DATA, likelihood="gaussian", num_samples=25, chunk=10,
                 progress=lambda done, total: told.append((done, total)))  # fmt: skip
    assert seen == [(10, B, Z), (10, B, Z), (5, B, Z)]
    assert told == [(10, 25), (20, 25), (25, 25)]


def test_a_bar_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    evidence(num_samples=30, chunk=10, progress=True)
    out, err = capsys.readouterr()
    assert not out and err.count("\r") == 3 and err.endswith("] 30 of 30 draws\n")
    evidence(num_samples=30)
    assert capsys.readouterr() == ("", "")


def test_priors() -> None:
    """A shifted one, by either way of giving it."""
    common: dict[str, Any] = {"num_samples": 20_000, "generator": generator(1)}
    by_number = evidence(prior_mu=0.5, **common)
    common["generator"] = generator(1)
    by_object = evidence(prior=Independent(Normal(torch.full((Z,), 0.5), torch.ones(Z)), 1), **common)
    assert_within(by_object.value, by_number.value, 1e-5)
    assert ((by_number.value - exact(0.5)).abs() < 5 * by_number.standard_error).all()


def test_whole_numbers_are_data_too() -> None:
    logits = torch.randn(5, generator=generator(0))
    x, q = torch.tensor([0, 4, 2]), (torch.zeros(3, Z), torch.zeros(3, Z))
    likelihood = vaefast.Likelihood("categorical", dim=2)
    found = log_evidence(lambda x: q, lambda z: logits.expand(len(z), 3, 5), x, likelihood=likelihood, num_samples=4)
    assert_within(found.value, torch.log_softmax(logits, 0)[[0, 4, 2]], 1e-6)
    assert (found.effective_samples - 4).abs().max() < 1e-9


def test_one_draw_has_no_standard_error() -> None:
    found = evidence(num_samples=1)
    assert found.standard_error.isnan().all() and (found.effective_samples == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"num_samples": 2.5}, "num_samples must be an int"),
        ({"chunk": -1}, "chunk must be at least 1"),
        ({"progress": "yes"}, "progress must be True or False"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        evidence(**options)
