"""A posterior over any module's parameters: its draws, its KL, its gradients, its priors, against torch's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import NETWORKS, Tied, first
from torch import Tensor, nn
from torch.distributions import Distribution, Laplace, LowRankMultivariateNormal, Normal, kl_divergence
from torch.func import functional_call
from torch.nn import functional as F

import vaefast
from vaefast.bayesian import Gaussian, MeanField, _low_rank, blundell_weights

ESTIMATORS = ("weights", "local", "flipout")


def mlp(*, width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def posteriors(model: MeanField) -> dict[str, Normal]:
    """Of each chosen parameter, in float64."""
    means = dict(model.module.named_parameters())
    return {name: Normal(means[name].double(), F.softplus(rho.double())) for name, rho in model.rho.named_parameters()}


def kl_to(model: MeanField, prior: Callable[[str], Distribution]) -> Tensor:
    return sum((kl_divergence(q, prior(name)).sum() for name, q in posteriors(model).items()), torch.zeros(()))


def gradients(model: MeanField) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# ---- every kind of module


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_module(backend: str, name: str, estimator: str) -> None:
    """Forward, backward, and the KL of each parameter's posterior; an estimator that does not apply says so."""
    make, args, where, linear = NETWORKS[name]
    options = {"where": where, "estimator": estimator, "prior": (0.1, 0.3)}
    if estimator != "weights" and not linear:
        with pytest.raises(ValueError, match=f"estimator='{estimator}' applies to Linear, Conv1d"):
            MeanField(make(), **options)
        return
    model, given = MeanField(make(), **options), args()
    output = first(model(*given))
    assert output.shape == first(model.module(*given)).shape
    assert not torch.equal(output, first(model(*given)))
    kl = model.kl()
    torch.testing.assert_close(kl.double(), kl_to(model, lambda _: Normal(0.1, 0.3)), rtol=1e-6, atol=0)
    (first(model(*given)).square().sum() + model.kl()).backward()
    for p in model.parameters():
        assert p.grad is not None and p.grad.isfinite().all()
    assert all(rho.grad.abs().sum() > 0 for rho in model.rho.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_forward_is_the_module_with_a_sample(backend: str, name: str) -> None:
    make, args, where, _ = NETWORKS[name]
    model, given = MeanField(make(), where=where).eval(), args()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    torch.manual_seed(3)
    output = model(*given)
    torch.manual_seed(3)
    expected = functional_call(model.module, model.sample(), given)
    assert torch.equal(first(output), first(expected))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.parametrize("rank", [0, 2])
def test_gradients_are_the_textbooks(rank: int) -> None:
    """With the noise that was drawn, recovered from the weights, and PyTorch's autograd through mu + sigma eps."""
    model = MeanField(mlp().double(), prior=(0.0, 0.5), init=0.3, where="all", rank=rank)
    x, y = torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    torch.manual_seed(5)
    weights = {name: w.detach() for name, w in model.sample().items()}
    torch.manual_seed(5)
    model.elbo_loss(model(x), y, dataset_size=50, likelihood="categorical").backward()
    found = gradients(model)
    means, factors = dict(model.module.named_parameters()), dict(model.factor.named_parameters()) if rank else {}
    q, rows, c = posteriors(model), None, None
    around = weights
    if rank:
        # without the factors the same seed draws mu + sigma eps, and the rest is V c
        other = copy.deepcopy(model)
        for v in other.factor.parameters():
            v.data.zero_()
        torch.manual_seed(5)
        around = {name: w.detach() for name, w in other.sample().items()}
        rows = torch.cat([factors[name].reshape(-1, rank) for name in weights])
        rest = torch.cat([(weights[name] - around[name]).flatten() for name in weights])
        c = torch.linalg.lstsq(rows.detach(), rest[:, None]).solution[:, 0]
    drawn = {}
    for name, w in around.items():
        drawn[name] = means[name] + q[name].stddev * ((w - means[name]) / q[name].stddev).detach()
        if c is not None:
            drawn[name] = drawn[name] + factors[name] @ c
    if rows is None:
        kl = kl_to(model, lambda _: Normal(torch.zeros((), dtype=torch.float64), 0.5))
    else:
        flat = LowRankMultivariateNormal(
            torch.cat([means[name].flatten() for name in weights]),
            rows,
            torch.cat([q[name].variance.flatten() for name in weights]),
        )
        zero = torch.zeros(flat.event_shape, dtype=torch.float64)
        kl = kl_divergence(flat, torch.distributions.MultivariateNormal(zero, 0.25 * torch.eye(len(zero)).double()))
    module = copy.deepcopy(model.module)
    (F.cross_entropy(functional_call(module, drawn, (x,)), y) + kl / 50).backward()
    expected = gradients(model)
    assert len(expected) == len(list(model.parameters()))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


def test_tied_parameters_are_drawn_once() -> None:
    model = MeanField(Tied())
    assert sorted(model.sample()) == ["embedding.weight", "middle.weight"]
    seen: list[Tensor] = []
    for layer in (model.module.embedding, model.module.head):
        layer.register_forward_pre_hook(lambda layer, args: seen.append(layer.weight))
    model(torch.zeros(2, 3, dtype=torch.long))
    assert seen[0] is seen[1] and seen[0] is not model.module.head.weight
    assert model.module.head.weight is model.module.embedding.weight


def test_buffers_are_updated_and_modes_are_kept() -> None:
    model = MeanField(mlp())
    before = model.module[1].running_mean.clone()
    model(torch.randn(8, 4))
    assert not torch.equal(model.module[1].running_mean, before)
    model.eval()
    before = model.module[1].running_mean.clone()
    x = torch.randn(8, 4)
    assert not torch.equal(model(x), model(x))  # drawn all the same
    assert torch.equal(model.module[1].running_mean, before)


# ---- which parameters


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (None, ["0.weight", "3.weight"]),
        ("all", ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]),
        ("3.*", ["3.weight", "3.bias"]),
        (["*.bias", "0.weight"], ["0.weight", "0.bias", "1.bias", "3.bias"]),
        (nn.Linear, ["0.weight", "3.weight"]),
        ([nn.BatchNorm1d, "3.weight"], ["1.weight", "1.bias", "3.weight"]),
        (lambda name, p: p.numel() == 3, ["3.bias"]),
    ],
)
def test_where(where: Any, names: list[str]) -> None:
    assert list(MeanField(mlp(), where=where).sample()) == names


def test_frozen_parameters_stay_deterministic() -> None:
    network = mlp()
    network[0].weight.requires_grad_(False)
    model = MeanField(network, where="all")
    assert "0.weight" not in model.sample()
    output = model(torch.randn(8, 4))
    output.sum().backward()
    assert network[0].weight.grad is None


# ---- the KL of a call


def test_the_kl_of_a_call_is_the_kl_of_the_parameters() -> None:
    model, x = MeanField(mlp(), prior=(0.0, 0.2)), torch.randn(8, 4)
    expected = kl_to(model, lambda _: Normal(0.0, 0.2))

    def right() -> None:
        torch.testing.assert_close(model.kl().double(), expected, rtol=1e-6, atol=0)

    right()  # before any forward
    model.kl().backward()
    reference = gradients(model)
    model(x)
    assert model.kl() is model.kl()  # that of the call
    right()
    model.kl().backward()
    right()
    model.kl().backward()  # which the graph of the call is no longer there for
    twice = gradients(model)
    for name, gradient in reference.items():
        torch.testing.assert_close(twice[name], 2 * gradient)
    model(x).sum().backward()
    model.kl().backward()
    gradients(model)
    with torch.no_grad():
        model(x)
    assert model.kl().requires_grad
    model(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    expected = kl_to(model, lambda _: Normal(0.0, 0.2))
    right()
    model(x)
    model.double()
    assert model.kl().dtype == torch.float64


def test_gradients_of_several_forwards_add_up() -> None:
    model, x, y = MeanField(mlp()).eval(), torch.randn(8, 4), torch.randint(0, 3, (8,))
    torch.manual_seed(1)
    loss = sum(
        model.elbo_loss(model(x), y, dataset_size=9, likelihood="categorical", kl_share=share) for share in (0.25, 0.75)
    )
    loss.backward()
    together = gradients(model)
    torch.manual_seed(1)
    for share in (0.25, 0.75):
        model.elbo_loss(model(x), y, dataset_size=9, likelihood="categorical", kl_share=share).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(together[name], gradient)


# ---- the loss


@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("likelihood", ["categorical", F.cross_entropy])
def test_minibatches_add_up_to_the_data_set(likelihood: Any, num_samples: int | None) -> None:
    model, x, y = MeanField(mlp()).eval(), torch.randn(12, 4), torch.randint(0, 3, (12,))
    with torch.no_grad():
        torch.manual_seed(0)
        draws = [functional_call(model.module, model.sample(), (x,)) for _ in range(num_samples or 1)]
        nll = sum(F.cross_entropy(logits, y, reduction="sum") for logits in draws) / len(draws)
        expected = (nll + model.kl()) / 12
        for size, shares in ((12, None), (4, None), (4, blundell_weights(3))):
            losses = []
            for i, (a, b) in enumerate(zip(x.split(size), y.split(size))):
                torch.manual_seed(0)
                losses.append(
                    len(a)
                    * model.elbo_loss(
                        model(a, num_samples=num_samples),
                        b,
                        dataset_size=12,
                        likelihood=likelihood,
                        num_samples=num_samples,
                        kl_share=None if shares is None else shares[i],
                    )
                )
            torch.testing.assert_close(sum(losses) / 12, expected)


def test_regression_and_a_tempered_kl() -> None:
    model, x, y = MeanField(nn.Linear(4, 2)), torch.randn(6, 4), torch.randn(6, 2)
    output = model(x)
    logvar = torch.zeros(2)
    for beta in (0.0, 0.5, torch.tensor(2.0)):
        loss = model.elbo_loss((output, logvar), y, dataset_size=30, likelihood="gaussian", beta=beta)
        nll = -Normal(output, 1.0).log_prob(y).sum(1).mean()
        torch.testing.assert_close(loss, nll + beta * model.kl() / 30)


@pytest.mark.parametrize("shape", [(), (2,), (1, 2), (6, 2)])
def test_several_draws_of_parameters_that_broadcast(shape: tuple[int, ...]) -> None:
    """A variance may be one for all, for each output, or for each example and output."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.logvar = nn.Linear(4, 2), nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.logvar

    model, x, y = MeanField(Both(), where=nn.Linear), torch.randn(6, 4), torch.randn(6, 2)
    output = model(x, num_samples=3)
    loss = model.elbo_loss(output, y, dataset_size=30, likelihood="gaussian", num_samples=3)
    logvar = model.module.logvar
    nll = -Normal(output[0], (0.5 * logvar).exp()).log_prob(y).sum(2).mean()
    torch.testing.assert_close(loss, nll + model.kl() / 30)


def test_blundells_weights() -> None:
    for batches in (1, 2, 7, 469, 5000):
        found = blundell_weights(batches)
        assert len(found) == batches and math.isclose(sum(found), 1, rel_tol=1e-12)
        expected = [2 ** (batches - i) / (2**batches - 1) for i in range(1, batches + 1)]
        assert found == pytest.approx(expected, rel=1e-14)


# ---- priors and starts


def per_layer(name: str, p: nn.Parameter) -> tuple[float, float]:
    return 0.0, p[0].numel() ** -0.5


def test_a_prior_for_each_layer() -> None:
    model = MeanField(mlp(), prior=per_layer)
    model(torch.randn(8, 4))
    sizes = {name: Normal(*per_layer(name, p)) for name, p in model.module.named_parameters() if p.dim() > 1}
    torch.testing.assert_close(model.kl().double(), kl_to(model, sizes.__getitem__), rtol=1e-6, atol=0)


def test_priors_of_tensors() -> None:
    scale = torch.rand(6, 1) + 0.1
    model = MeanField(nn.Linear(4, 6), prior=(torch.randn(4), scale))
    model(torch.randn(8, 4))
    mean = model.priors[0].mean
    torch.testing.assert_close(model.kl().double(), kl_to(model, lambda _: Normal(mean, scale)), rtol=1e-6, atol=0)
    assert "priors.0.mean" in model.state_dict()


def test_moped_starts_from_a_trained_network() -> None:
    network = mlp()
    with torch.no_grad():
        network[0].weight[0, 0] = 0.0
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    model = MeanField.moped(network, delta=0.2, std=0.7)
    for name, q in posteriors(model).items():
        torch.testing.assert_close(q.mean, weights[name].double())
        torch.testing.assert_close(q.stddev, (0.2 * weights[name].double().abs()).clamp(min=1e-8), rtol=1e-5, atol=0)
    with torch.no_grad():
        network[0].weight.add_(1.0)
    torch.testing.assert_close(model.kl().double(), kl_to(model, lambda n: Normal(weights[n], 0.7)), rtol=1e-5, atol=0)
    model(torch.randn(8, 4)).sum().backward()


@pytest.mark.parametrize("shared", [True, False])
def test_a_learned_prior_goes_to_where_the_kl_is_least(shared: bool) -> None:
    """At the best std the prior's variance is the mean of mu^2 + sigma^2."""
    prior: Any = Gaussian(0.0, 0.5, learned=True) if shared else lambda name, p: Gaussian(0.0, 0.5, learned=True)
    model = MeanField(mlp().double(), prior=prior)
    assert len(model.priors) == (1 if shared else 2)
    optimizer = torch.optim.LBFGS(model.priors.parameters(), line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        kl = model.kl()
        kl.backward()
        return kl

    for _ in range(3):
        optimizer.step(closure)
    moments = [(q.mean**2 + q.variance).flatten() for q in posteriors(model).values()]
    groups = [torch.cat(moments)] if shared else moments
    for prior, group in zip(model.priors, groups):
        torch.testing.assert_close(prior.logvar.exp().double(), group.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_prior_with_log_prob_is_estimated_without_bias(rank: int) -> None:
    """Of a Gaussian, whose KL is known; so is its gradient."""
    prior = Normal(torch.tensor(0.1), 0.4)
    model = MeanField(nn.Linear(4, 3), prior=prior, init=0.2, rank=rank)
    known = MeanField(model.module, prior=(0.1, 0.4), init=0.2, rank=rank)
    if rank:
        known.factor = model.factor
        known._factors = model._factors
    estimates = []
    model(torch.randn(2, 4), num_samples=3)
    with torch.no_grad():
        for _ in range(1500):
            model(torch.zeros(1, 4))
            estimates.append(model.kl())
    found = torch.stack(estimates)
    assert abs(found.mean() - known.kl()) < 4 * found.std() / len(found) ** 0.5
    laplace = MeanField(nn.Linear(4, 3), prior=Laplace(0.0, 0.1), estimator="flipout")
    (laplace(torch.randn(2, 4)).sum() + laplace.kl()).backward()
    assert laplace.rho.weight.grad.isfinite().all()
    with pytest.raises(ValueError, match="draws no weights"):
        MeanField(nn.Linear(4, 3), prior=Laplace(0.0, 0.1), estimator="local")


@pytest.mark.parametrize(("init", "std"), [("fan_in", 0.05), (0.3, 0.3), (1e-6, 1e-6), (lambda n, p: 20.0, 20.0)])
def test_starts(init: Any, std: float) -> None:
    model = MeanField(nn.Linear(4, 3), init=init)
    torch.testing.assert_close(posteriors(model)["weight"].stddev, torch.full((3, 4), std).double(), rtol=1e-5, atol=0)


# ---- beyond mean field


def test_low_rank_is_torchs_low_rank_gaussian() -> None:
    model = MeanField(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double(), prior=(0.1, 0.5), init=0.3, rank=2)
    with torch.no_grad():
        for v in model.factor.parameters():
            v.normal_(std=0.5)
    q = posteriors(model)
    flat = LowRankMultivariateNormal(
        torch.cat([each.mean.flatten() for each in q.values()]),
        torch.cat([v.reshape(-1, 2) for v in model.factor.parameters()]),
        torch.cat([each.variance.flatten() for each in q.values()]),
    )
    n = flat.event_shape[0]
    mean = torch.full((n,), 0.1, dtype=torch.float64)
    prior = torch.distributions.MultivariateNormal(mean, 0.25 * torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(model.kl(), kl_divergence(flat, prior), rtol=1e-12, atol=0)
    model(torch.randn(2, 3).double())
    torch.testing.assert_close(model.kl(), kl_divergence(flat, prior), rtol=1e-12, atol=0)
    with torch.no_grad():
        draws = torch.stack([torch.cat([w.flatten() for w in model.sample().values()]) for _ in range(2500)])
    covariance = flat.covariance_matrix
    scale = covariance.diagonal().sqrt()
    # a sample covariance's standard error: sqrt((c_ij^2 + c_ii c_jj) / N)
    error = ((covariance**2 + scale[:, None] ** 2 * scale**2) / len(draws)).sqrt()
    assert ((draws.T.cov() - covariance).abs() < 4.5 * error).all()
    assert ((draws.mean(0) - flat.loc).abs() < 4.5 * scale / len(draws) ** 0.5).all()


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prior": 1.0}, TypeError, "prior must be"),
        ({"prior": (0.0, 0.0)}, ValueError, "std must be a finite number above 0"),
        ({"prior": (0.0, 1.0, 2.0)}, ValueError, r"\(mean, std\), got 3"),
        ({"prior": ("0", 1.0)}, TypeError, "mean must be"),
        ({"prior": (torch.zeros(5), 1.0)}, ValueError, "does not broadcast"),
        ({"prior": lambda name, p: None}, TypeError, "a prior must be"),
        ({"init": "xavier"}, ValueError, "init must be"),
        ({"init": -1.0}, ValueError, "above 0"),
        ({"init": lambda name, p: torch.ones(7)}, ValueError, "does not broadcast"),
        ({"where": "nothing.*"}, ValueError, "chooses none"),
        ({"where": [3]}, TypeError, "where must be"),
        ({"estimator": "dropout"}, ValueError, "estimator must be one of"),
        ({"rank": -1}, ValueError, "rank must be"),
        ({"rank": 1, "estimator": "local"}, ValueError, "rank=1 goes with"),
    ],
)
def test_what_cannot_be_made_says_why(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MeanField(mlp(), **options)


def test_other_refusals() -> None:
    with pytest.raises(TypeError, match="module must be"):
        MeanField(torch.relu)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lazy parameter"):
        MeanField(nn.LazyLinear(3))
    model, x, y = MeanField(mlp()), torch.randn(8, 4), torch.randint(0, 3, (8,))
    output = model(x)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="dataset_size must be"):
            model.elbo_loss(output, y, dataset_size=wrong, likelihood="categorical")
    with pytest.raises(ValueError, match="num_samples must be"):
        model(x, num_samples=0)
    for output, samples in ((model(x), 2), (model(x, num_samples=2), 3), (torch.zeros(2), 2)):
        with pytest.raises(ValueError, match=r"it takes \[K, B, ...\]"):
            model.elbo_loss(output, y, dataset_size=9, likelihood="categorical", num_samples=samples)
    with pytest.raises(TypeError, match="generator must be"):
        model(x, generator=3)
    with pytest.raises(ValueError, match="batches must be"):
        blundell_weights(0)
    with pytest.raises(ValueError, match="delta must be"):
        MeanField.moped(mlp(), delta=0.0)
    assert vaefast.bayesian.MeanField is MeanField


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_a_low_rank_kl_where_a_scale_is_nearly_zero(dtype: torch.dtype, tolerance: float) -> None:
    """Of 50 digits, by the determinant of the capacitance: a product in the dtype itself would have nothing left of the
    smaller rows."""
    mpmath = pytest.importorskip("mpmath", reason="needs mpmath: pip install 'vaefast[test]'")
    rows = torch.randn(12, 3, dtype=dtype)
    scales = torch.linspace(1.0, 2.0, 12, dtype=dtype)
    scales[0] = 1e-4 if dtype == torch.float32 else 1e-9
    found = _low_rank.log_det([(rows / scales[:, None])[:5], (rows / scales[:, None])[5:]])
    with mpmath.workdps(50):
        exact = [[mpmath.mpf(v) for v in row] for row in (rows / scales[:, None]).tolist()]
        gram = mpmath.matrix(3, 3)
        for i in range(3):
            for j in range(3):
                gram[i, j] = (i == j) + mpmath.fsum(row[i] * row[j] for row in exact)
        expected = float(mpmath.log(mpmath.det(gram)))
    assert found.item() == pytest.approx(expected, rel=tolerance)
