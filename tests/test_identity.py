"""log p(x) = ELBO(q) + KL(q || p(z|x)) for every q, on the model of examples/ppca_identity.py, where all is exact."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from examples_by_path import load_example
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import vaefast

ppca = load_example("ppca_identity")


@pytest.fixture(autouse=True, params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny
    with torch.random.fork_rng(), vaefast.use_backend(request.param):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def marginal(model: ppca.PPCA) -> MultivariateNormal:
    """p(x) from its dense covariance, sharing nothing with the example's closed form."""
    dim = model.weight.shape[0]
    noise = torch.exp(model.log_noise) * torch.eye(dim, dtype=model.weight.dtype)
    return MultivariateNormal(model.bias, model.weight @ model.weight.T + noise)


def random_q(count: int, latent: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(count, latent, dtype=torch.float64), 2 * torch.randn(count, latent, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dim", "latent", "noise_std"), [(12, 4, 0.5), (3, 1, 2.0), (40, 16, 0.1), (5, 5, 1.0)])
def test_identity_holds_for_every_q(dim: int, latent: int, noise_std: float) -> None:
    model = ppca.random_ppca(dim, latent, noise_std)
    x = model.sample(500)
    q = random_q(500, latent)
    total = ppca.kl_to_posterior(model, x, *q) - ppca.negative_elbo(model, x, *q).loss
    expected = marginal(model).log_prob(x)
    # the two terms grow with e^logvar / noise and cancel down to log p(x): what is left is relative to them
    scale = ppca.kl_to_posterior(model, x, *q).abs().max().item()
    close(total, expected, 1e-10 if scale < 1e4 else 1e-14 * scale)


def test_closed_forms_against_dense_algebra() -> None:
    model = ppca.random_ppca()
    x = model.sample(50)
    close(model.log_evidence(x), marginal(model).log_prob(x))
    noise = torch.exp(model.log_noise)
    precision = torch.eye(4, dtype=x.dtype) + model.weight.T @ model.weight / noise
    mean, logvar = model.posterior(x)
    close(mean, torch.linalg.solve(precision, model.weight.T @ (x - model.bias).T / noise).T)
    close(torch.diag(logvar[0].exp()), torch.linalg.inv(precision))


def test_evidence_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    model = ppca.random_ppca()
    x = model.sample(20)
    p = marginal(model)
    expected = stats.multivariate_normal(p.loc.numpy(), p.covariance_matrix.numpy()).logpdf(x.numpy())
    close(model.log_evidence(x), torch.from_numpy(expected))


def test_both_kls_against_torch_distributions() -> None:
    model = ppca.random_ppca()
    x = model.sample(100)
    mu, logvar = random_q(100, 4)
    post_mu, post_logvar = model.posterior(x)
    q, posterior = Normal(mu, torch.exp(0.5 * logvar)), Normal(post_mu, torch.exp(0.5 * post_logvar))
    close(ppca.kl_to_posterior(model, x, mu, logvar), kl_divergence(q, posterior).sum(1))
    prior = Normal(torch.zeros_like(mu), torch.ones_like(mu))
    close(ppca.negative_elbo(model, x, mu, logvar).kl, kl_divergence(q, prior).sum(1))


def test_bound_is_tight_at_the_exact_posterior_and_only_there() -> None:
    model = ppca.random_ppca()
    x = model.sample(100)
    mu, logvar = model.posterior(x)
    evidence = marginal(model).log_prob(x)
    close(-ppca.negative_elbo(model, x, mu, logvar).loss, evidence)
    assert torch.equal(ppca.kl_to_posterior(model, x, mu, logvar), torch.zeros(100, dtype=x.dtype))
    for moved in ((mu + 0.01, logvar), (mu, logvar + 0.01), (mu, logvar - 0.01)):
        assert (-ppca.negative_elbo(model, x, *moved).loss < evidence).all()


def test_gradients_of_the_negative_elbo_are_those_of_the_kl_to_the_posterior() -> None:
    """log p(x) does not depend on q."""
    model = ppca.random_ppca()
    x = model.sample(100)
    q = [t.requires_grad_() for t in random_q(100, 4)]
    from_elbo = torch.autograd.grad(ppca.negative_elbo(model, x, *q).loss.sum(), q)
    from_kl = torch.autograd.grad(ppca.kl_to_posterior(model, x, *q).sum(), q)
    for actual, expected in zip(from_elbo, from_kl):
        close(actual, expected)


def test_model_gradients_at_the_posterior_are_those_of_the_evidence() -> None:
    """Fisher's identity: at q = p(z|x) the ELBO touches log p(x), so they have one gradient in W, b and the noise."""
    frozen = ppca.random_ppca()
    x = frozen.sample(30)
    leaves = [t.clone().requires_grad_() for t in (frozen.weight, frozen.bias, frozen.log_noise)]
    model = ppca.PPCA(*leaves)
    from_elbo = torch.autograd.grad(-ppca.negative_elbo(model, x, *frozen.posterior(x)).loss.sum(), leaves)
    from_evidence = torch.autograd.grad(marginal(model).log_prob(x).sum(), leaves)
    for actual, expected in zip(from_elbo, from_evidence):
        close(actual, expected)


@pytest.mark.parametrize(("draws", "tolerance"), [(None, 1e-6), (16, 0.1)], ids=["exact", "noise"])
def test_gradient_ascent_arrives_at_the_posterior(draws: int | None, tolerance: float) -> None:
    model = ppca.random_ppca()
    x = model.sample(8)
    mu, logvar = ppca.ascend(model, x, draws=draws)
    for actual, expected in zip((mu, logvar), model.posterior(x)):
        close(actual, expected, tolerance)
    assert (ppca.kl_to_posterior(model, x, mu, logvar) < tolerance).all()


def test_example_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = ppca.main(["--count", "4", "--steps", "20"])
    assert all(row[-1] < 1e-10 for row in rows.values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
