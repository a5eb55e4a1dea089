"""Local reparameterization and Flipout: the distribution that the papers say, the same gradient on average, and less of
its variance; several samples in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import NETWORKS
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from vaefast.bayesian import MeanField, _estimators

LAYERS = [name for name in NETWORKS if name.startswith(("Linear", "Conv"))]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 3))


def spread_of(model: MeanField) -> dict[str, Tensor]:
    return {name: F.softplus(rho.detach()) for name, rho in model.rho.named_parameters()}


@pytest.mark.parametrize("name", LAYERS)
def test_local_draws_outputs_of_the_right_variance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kingma et al. 2015, equation 6: of an output that is linear in the weights, by its Jacobian in each of them."""
    make, args, where, _ = NETWORKS[name]
    model, given = MeanField(make().double(), where=where, estimator="local", init=0.3), args()
    x = given[0].double()
    seen: list[Tensor] = []

    def variance_of(mean: Tensor, variance: Tensor, **_: Any) -> Tensor:
        seen.append(mean)
        return variance

    monkeypatch.setattr(_estimators, "reparameterize", variance_of)
    found = model(x)
    means = {name: p.detach() for name, p in model.module.named_parameters() if name in spread_of(model)}
    torch.testing.assert_close(seen[0], model.module(x))
    jacobians = jacrev(lambda weights: functional_call(model.module, weights, (x,)))(means)
    expected = sum(
        (jacobians[name].square() * std.square()).flatten(found.dim()).sum(-1) for name, std in spread_of(model).items()
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "Conv2d"])  # that one has groups
def test_flipout_gives_each_example_signs_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wen et al. 2018, equation 3: the layer of an example b is one whose perturbation is times r_b s_b^T."""
    make, args, where, _ = NETWORKS[name]
    model, given = MeanField(make().double(), where=where, estimator="flipout", init=0.3), args()
    x = given[0].double()
    signs: list[Tensor] = []
    of_class = _estimators.Flipout.signs

    def kept(self: Any, x: Tensor, spatial: int) -> Tensor:
        signs.append(of_class(self, x, spatial))
        return signs[-1]

    monkeypatch.setattr(_estimators.Flipout, "signs", kept)
    torch.manual_seed(2)
    found = model(x)
    torch.manual_seed(2)
    drawn = model.sample()
    s, r = signs
    assert set(s.unique().tolist()) <= {-1.0, 1.0}
    means = dict(model.module.named_parameters())
    batched = x.dim() > 1
    for b in range(len(x) if batched else 1):
        s_b, r_b = (each[b].flatten() if batched else each.flatten() for each in (s, r))
        own = {}
        for parameter, w in drawn.items():
            outer = r_b if w.dim() == 1 else r_b[:, None] * s_b if "Transpose" not in name else s_b[:, None] * r_b
            shape = [*outer.shape, *[1] * (w.dim() - outer.dim())]
            own[parameter] = means[parameter] + (w - means[parameter]) * outer.view(shape)
        example = x[b : b + 1] if batched else x
        expected = functional_call(model.module, own, (example,))
        torch.testing.assert_close(found[b : b + 1] if batched else found, expected)


def many_gradients(estimator: str, draws: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The mean and the variance, over draws, of the loss's gradient in every parameter."""
    torch.manual_seed(0)
    model = MeanField(mlp(), estimator=estimator, init=0.1)
    x = torch.randn(256, 8)
    y = x[:, :3].argmax(1)  # examples whose gradients have something in common, which one draw moves together
    parameters = list(model.parameters())
    found = []
    for _ in range(draws):
        output = model(x, **options)
        loss = model.elbo_loss(
            output, y, dataset_size=256, likelihood="categorical", num_samples=options.get("num_samples")
        )
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    stacked = torch.stack(found)
    return stacked.mean(0), stacked.var(0)


def test_estimators_have_one_gradient_and_less_variance() -> None:
    draws = 300
    mean, variance = many_gradients("weights", draws)
    for estimator in ("local", "flipout"):
        other, less = many_gradients(estimator, draws)
        error = ((variance + less) / draws).sqrt()
        apart = (mean - other).abs() > 3 * error + 1e-7
        assert apart.double().mean() < 0.01  # of a Gaussian's draws 0.27% are
        assert less.sum() < 0.15 * variance.sum(), estimator


def test_antithetic_draws_have_less_variance() -> None:
    mean, variance = many_gradients("weights", 300, num_samples=2)
    other, less = many_gradients("weights", 300, num_samples=2, antithetic=True)
    error = ((variance + less) / 300).sqrt()
    assert ((mean - other).abs() > 3 * error + 1e-7).double().mean() < 0.01
    assert less.sum() < 0.4 * variance.sum()


@pytest.mark.parametrize("estimator", ["weights", "local", "flipout"])
def test_several_samples(estimator: str) -> None:
    model, x = MeanField(mlp(), estimator=estimator), torch.randn(5, 8)
    torch.manual_seed(4)
    expected = torch.stack([model(x) for _ in range(3)])
    torch.manual_seed(4)
    found = model(x, num_samples=3)
    assert torch.equal(found, expected)
    (found.sum() + model.kl()).backward()
    assert all(p.grad is not None for p in model.parameters())
    rnn = MeanField(nn.LSTM(8, 4))
    output, (h, c) = rnn(x[None], num_samples=2)
    assert output.shape == (2, 1, 5, 4) and h.shape == c.shape == (2, 1, 5, 4)


def test_antithetic_pairs_have_opposite_noise() -> None:
    model, x = MeanField(nn.Linear(8, 3), prior=torch.distributions.Normal(0.0, 1.0)), torch.randn(5, 8)
    pair = model(x, num_samples=4, antithetic=True)
    torch.testing.assert_close(pair[0] + pair[1], 2 * model.module(x))
    torch.testing.assert_close(pair[2] + pair[3], 2 * model.module(x))
    assert not torch.allclose(pair[0], pair[2])
    with pytest.raises(ValueError, match="antithetic=True goes with"):
        MeanField(mlp(), estimator="local")(x, num_samples=2, antithetic=True)


@pytest.mark.parametrize("estimator", ["weights", "local", "flipout"])
def test_a_generator_is_the_noise(estimator: str) -> None:
    model, x = MeanField(mlp(), estimator=estimator), torch.randn(5, 8)
    one, other, again = (model(x, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_no_input_no_noise_and_no_nan() -> None:
    model = MeanField(nn.Linear(8, 3), estimator="local")
    x = torch.zeros(2, 8, requires_grad=True)
    output = model(x)
    torch.testing.assert_close(output, model.module(x))
    output.sum().backward()
    assert x.grad.isfinite().all() and model.rho.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_local_variances_neither_underflow_nor_overflow(dtype: torch.dtype) -> None:
    model = MeanField(nn.Linear(8, 3), estimator="local", init=1e-4).to(dtype)
    for size in (1e-3, 1e3):
        x = torch.full((4000, 8), size, dtype=dtype)
        with torch.no_grad():
            noise = (model(x).double() - model.module(x).double()).std(0)
            # rho = -9.2 has 3 digits in bfloat16
            expected = (F.softplus(model.rho.weight.double()).square().sum(1)).sqrt() * x[0, 0].double()
            rounding = model.module(x).abs().max().double() * torch.finfo(dtype).eps
        assert ((noise - expected).abs() < 0.1 * expected + rounding).all()


def test_layers_whose_weights_are_elsewhere_too_are_drawn() -> None:
    """A tied matrix is one draw; an attention's projection is used without its layer's forward."""
    tied = MeanField(NETWORKS["tied"].make(), estimator="local")
    assert "(1 layers)" in repr(tied)
    block = MeanField(NETWORKS["transformer block"].make(), estimator="flipout")
    assert "(2 layers)" in repr(block)
    assert [type(hook) for m in block.mean().modules() for hook in m._forward_hooks.values()] == []


def test_arguments_by_name() -> None:
    layer = nn.ConvTranspose1d(2, 3, 3, stride=2)
    for estimator in ("local", "flipout"):
        model = MeanField(layer, estimator=estimator)
        assert model(input=torch.randn(2, 2, 5), output_size=[12]).shape == (2, 3, 12)
