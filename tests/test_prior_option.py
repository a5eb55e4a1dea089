"""``prior=``, where the KL's options are: the KL to any density, estimated at a sample. Against its formula."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import vaefast
from vaefast.priors import GaussianMixturePrior, ScaleMixture, VampPrior

D = 5


def moments(*shape: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(shape, generator=g).requires_grad_(),
        (0.5 * torch.randn(shape, generator=g) - 0.5).requires_grad_(),
    )


def mixture() -> GaussianMixturePrior:
    torch.manual_seed(5)
    return GaussianMixturePrior(4, D)


def log_ratio(z: Tensor, mu: Tensor, logvar: Tensor, prior: Any) -> Tensor:
    """log q(z) - log p(z), one for each sample along the last dimension."""
    return Normal(mu, torch.exp(0.5 * logvar), validate_args=False).log_prob(z).sum(-1) - prior.log_prob(z)  # type: ignore[no-any-return]


def reduced(kl: Tensor, reduction: str, batch_dims: int = 1) -> Tensor:
    rows = kl.flatten(batch_dims).sum(-1) if kl.dim() > batch_dims else kl
    return {"per_sample": rows, "batchmean": rows.mean(), "sum": rows.sum()}[reduction]


def same_gradients(found: Tensor, expected: Tensor, leaves: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(found.shape)
    each = (torch.autograd.grad(x, leaves, upstream, retain_graph=True) for x in (found, expected))
    for a, b in zip(*each):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["per_sample", "batchmean", "sum"])
@pytest.mark.parametrize(("shape", "batch_dims"), [((7, D), 1), ((3, 4, D), 1), ((3, 4, D), 2)])
def test_the_sample_and_its_log_ratio(reduction: str, shape: tuple[int, ...], batch_dims: int, backend: str) -> None:
    mu, logvar, prior = *moments(*shape), mixture()
    options: dict[str, Any] = {"prior": prior, "reduction": reduction, "batch_dims": batch_dims}
    z, kl = vaefast.sample_with_kl(mu, logvar, **options, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(z, vaefast.reparameterize(mu, logvar, generator=torch.Generator().manual_seed(3)))
    expected = reduced(log_ratio(z, mu, logvar, prior), reduction, batch_dims)
    same_gradients(kl, expected, [mu, logvar, *prior.parameters()])
    # gaussian_kl draws for itself what reparameterize would
    if batch_dims == 1:
        torch.manual_seed(7)
        found = vaefast.gaussian_kl(mu, logvar, **options)
        torch.manual_seed(7)
        z = vaefast.reparameterize(mu, logvar)
        same_gradients(found, reduced(log_ratio(z, mu, logvar, prior), reduction), [mu, logvar, *prior.parameters()])


def test_a_gaussian_one_is_the_mc_estimator(backend: str) -> None:
    """Of a torch.distributions object, with both estimators."""
    mu, logvar = moments(6, D)
    eps = torch.randn(6, D)
    prior = Independent(Normal(torch.full((D,), 0.3), math.exp(0.1)), 1)
    for estimator in ("mc", "stl"):
        z, kl = vaefast.sample_with_kl(mu, logvar, prior=prior, estimator=estimator, eps=eps, reduction="per_sample")
        other = vaefast.sample_with_kl(mu, logvar, 0.3, 0.2, estimator=estimator, eps=eps, reduction="per_sample")
        assert torch.equal(z, other[0])
        same_gradients(kl, other[1], [mu, logvar])
    default = vaefast.sample_with_kl(mu, logvar, prior=prior, eps=eps, reduction="per_sample")[1]
    torch.testing.assert_close(default, kl)


def test_it_is_the_kl_in_the_mean() -> None:
    mu, logvar = (t.detach().expand(20000, D) for t in moments(1, D))
    prior = Independent(Normal(torch.zeros(D), torch.ones(D)), 1)
    torch.manual_seed(0)
    expected = vaefast.gaussian_kl(mu[:1], logvar[:1])
    torch.testing.assert_close(vaefast.gaussian_kl(mu, logvar, prior=prior), expected, rtol=0.03, atol=0.0)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian_optimal"])
def test_elbo(likelihood: str, backend: str) -> None:
    mu, logvar, prior = *moments(6, D), mixture()
    recon, x = torch.randn(6, 8, requires_grad=True), torch.rand(6, 8)
    given: Any = recon, x, mu, logvar
    torch.manual_seed(9)
    terms = vaefast.elbo_terms(*given, likelihood=likelihood, beta=0.5, prior=prior)
    torch.manual_seed(9)
    kl = vaefast.gaussian_kl(mu, logvar, prior=prior)
    nll = vaefast.reconstruction_loss(recon, x, likelihood=likelihood)
    torch.testing.assert_close(tuple(terms), (nll + 0.5 * kl, nll, kl))
    criterion = vaefast.ELBOLoss(likelihood, 0.5, prior=prior)
    torch.manual_seed(9)
    loss = criterion(*given)
    torch.testing.assert_close(loss, terms.loss)
    loss.backward()
    assert {name for name, _ in criterion.named_parameters()} == {"prior.mus", "prior.logvars", "prior.logits"}
    assert all(p.grad is not None for p in criterion.parameters())
    twin = copy.deepcopy(criterion)
    assert twin.kl_options.prior is twin.prior and twin.prior is not prior
    assert "prior=" in repr(criterion)


def test_with_the_other_options(backend: str) -> None:
    mu, logvar, prior = *moments(8, D), mixture()
    eps = torch.randn(8, D)

    def ours(**options: Any) -> Tensor:
        return vaefast.sample_with_kl(mu, logvar, prior=prior, eps=eps, **options)[1]

    z = mu + torch.exp(0.5 * logvar) * eps
    each, leaves = log_ratio(z, mu, logvar, prior), [mu, logvar, prior.mus]
    same_gradients(ours(free_bits=2.0, free_bits_per="sample"), each.clamp(min=2.0).mean(), leaves)
    same_gradients(ours(capacity=3.0, reduction="sum"), (each.sum() - 24).abs(), leaves)
    weight = torch.rand(8, 1)
    same_gradients(ours(kl_weight=weight), (each * weight[:, 0]).mean(), leaves)
    same_gradients(ours(kl_weight=torch.tensor(0.5)), 0.5 * each.mean(), leaves)


def test_a_mask_hides(backend: str) -> None:
    """Padding of a sequence, NaN too, reaches neither the KL nor a gradient."""
    mu, logvar, prior = *moments(3, 4, D), mixture()
    mask = torch.rand(3, 4, 1) > 0.4
    mask[0, 0] = True
    with torch.no_grad():
        mu.masked_fill_(~mask, math.nan)
    eps = torch.randn(3, 4, D)
    options: dict[str, Any] = {"prior": prior, "batch_dims": 2, "reduction": "per_sample", "eps": eps}
    kl = vaefast.sample_with_kl(mu, logvar, kl_weight=mask, **options)[1]
    expected = log_ratio(mu + torch.exp(0.5 * logvar) * eps, mu.nan_to_num(), logvar, prior)
    assert not kl[~mask[..., 0]].any()
    torch.testing.assert_close(kl[mask[..., 0]], expected[mask[..., 0]])
    kl.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (mu, logvar, prior.mus))


def test_every_prior_and_half_precision() -> None:
    encoder = nn.Linear(9, 2 * D)
    vamp = VampPrior(torch.rand(3, 9), lambda u: encoder(u).chunk(2, 1))
    mu, logvar = moments(6, D)
    for prior in (mixture(), vamp, ScaleMixture(1.0, 0.1, 0.3)):
        z, kl = vaefast.sample_with_kl(mu, logvar, prior=prior)
        torch.testing.assert_close(kl, log_ratio(z, mu, logvar, prior).mean())
        half = vaefast.sample_with_kl(mu.bfloat16(), logvar.bfloat16(), prior=prior)
        assert half[0].dtype == torch.bfloat16 and half[1].dtype == torch.float32


@pytest.mark.parametrize("backend_name", ["auto", "reference"])
def test_compiled(backend_name: str) -> None:
    mu, logvar, prior = *moments(6, D), mixture()
    recon, x = torch.randn(6, 8, requires_grad=True), torch.rand(6, 8)
    eps = torch.randn(6, D)
    torch.compiler.reset()
    with vaefast.use_backend(backend_name):

        def step(mu: Tensor, logvar: Tensor, recon: Tensor) -> tuple[Tensor, Tensor]:
            kl = vaefast.sample_with_kl(mu, logvar, prior=prior, eps=eps)[1]
            return kl, vaefast.elbo_loss(recon, x, mu, logvar, prior=prior)

        expected = vaefast.sample_with_kl(mu, logvar, prior=prior, eps=eps)[1]
        kl, loss = torch.compile(step, fullgraph=True, backend="aot_eager")(mu, logvar, recon)
    same_gradients(kl, expected, [mu, logvar, prior.mus])
    loss.backward()
    assert loss.isfinite() and recon.grad is not None


class Wrong:
    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * z * z


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"prior": 0.0}, TypeError, "prior must have a method log_prob"),
        ({"prior": mixture(), "prior_mu": 0.0}, ValueError, "prior and prior_mu were both given"),
        ({"prior": mixture(), "prior_logvar": torch.zeros(())}, ValueError, "prior and prior_logvar were both"),
        ({"prior": mixture(), "reduction": "none"}, ValueError, "prior does not go with reduction='none'"),
        ({"prior": mixture(), "reduction": "mean"}, ValueError, "prior does not go with reduction='mean'"),
        ({"prior": mixture(), "balance": 0.5}, ValueError, "prior does not go with balance=0.5"),
        ({"prior": mixture(), "symmetric": True}, ValueError, "prior does not go with symmetric=True"),
        ({"prior": mixture(), "free_bits": 0.5}, ValueError, "prior does not go with free_bits_per='dim'"),
        ({"prior": mixture(), "batch_dims": 2}, ValueError, "none behind the batch"),
        ({"prior": GaussianMixturePrior(3, D + 1)}, ValueError, "as the components have 6 dimensions"),
        ({"prior": Wrong()}, ValueError, r"prior.log_prob gave a tensor of shape \(6, 5\)"),
        ({"prior": mixture(), "kl_weight": torch.ones(6, D)}, ValueError, "must have size 1 there"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], words: str, backend: str) -> None:
    mu, logvar = moments(6, D)
    with pytest.raises(error, match=words):
        vaefast.sample_with_kl(mu, logvar, **options)
    if "reduction" in options:
        return
    with pytest.raises(error, match=words):
        vaefast.elbo_loss(torch.zeros(6, 8), torch.zeros(6, 8), mu, logvar, **options)
