"""ELBOLoss is elbo_loss with its options fixed, and behaves as an nn.Module; ELBOTerms is a NamedTuple."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from inputs import ELBO_REDUCTIONS, LIKELIHOOD_CASES, generator, posterior, training

import vaefast
from vaefast import ELBOLoss, ELBOTerms, Parameterization

OPTIONS: list[dict[str, Any]] = [
    {},
    {"beta": 4.0, "reduction": "sum"},
    {"beta": 0, "parameterization": "softplus", "reduction": "per_sample"},
    {"parameterization": Parameterization("logvar", clamp=(-30.0, 20.0), floor=1e-4)},
    {"beta": torch.tensor(0.5)},
    {"free_bits": 2.0, "free_bits_per": "sample", "symmetric": True},
    {"capacity": torch.tensor(2.0)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "defaults")
@pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
def test_equals_the_function(backend: str, device: str, likelihood: str, count: int, options: dict[str, Any]) -> None:
    data, p = training(likelihood, count).to(device), posterior(prior="full", device=device)
    weight = (torch.rand(4, 7, generator=generator(1)) > 0.5).to(device)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    args = (data.recon, data.target, *p.args())
    actual = ELBOLoss(likelihood, **options)(*args, weight=weight)
    assert torch.equal(actual, vaefast.elbo_loss(*args, likelihood=likelihood, weight=weight, **options))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "defaults")
def test_copies(copied: Any, options: dict[str, Any]) -> None:
    module = ELBOLoss("gaussian", **options)
    other = copied(module)
    data, p = training("gaussian", 2), posterior()
    assert torch.equal(other(data.recon, data.target, p.mu, p.raw), module(data.recon, data.target, p.mu, p.raw))
    assert repr(other) == repr(module)


def test_repr_tells_the_options() -> None:
    text = repr(ELBOLoss("laplace", beta=4.0, parameterization="softplus", reduction="sum"))
    for part in ("ELBOLoss", "'laplace'", "4.0", "'softplus'", "'sum'"):
        assert part in text


def test_is_an_nn_module() -> None:
    model = torch.nn.Sequential()
    model.add_module("loss", ELBOLoss())
    assert not list(model.parameters())
    model.load_state_dict(model.state_dict())
    assert model.half().eval().loss.training is False


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"likelihood": "normal"}, "likelihood"),
        ({"reduction": "mean"}, "reduction"),
        ({"reduction": "none"}, "reduction"),
        ({"parameterization": "sigma"}, "parameterization"),
        ({"beta": "4"}, "beta"),
    ],
)
def test_options_are_checked_when_it_is_made(options: dict[str, Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        ELBOLoss(**options)


@pytest.mark.parametrize("reduction", ELBO_REDUCTIONS)
def test_terms_are_a_named_tuple(backend: str, device: str, reduction: str) -> None:
    data, p = training("bernoulli", 1).to(device), posterior(device=device)
    terms = vaefast.elbo_terms(data.recon, data.target, p.mu, p.raw, beta=0.25, reduction=reduction)
    assert type(terms) is ELBOTerms
    assert terms._fields == ("loss", "reconstruction", "kl")
    loss, reconstruction, kl = terms
    assert loss is terms.loss
    torch.testing.assert_close(loss, reconstruction + 0.25 * kl)
    assert torch.equal(loss, vaefast.elbo_loss(data.recon, data.target, p.mu, p.raw, beta=0.25, reduction=reduction))
    assert torch.equal(pickle.loads(pickle.dumps(terms)).kl, kl)


def test_parameterization_is_a_value() -> None:
    a, b = Parameterization("logvar", clamp=(-30.0, 20.0)), Parameterization("logvar", clamp=(-30.0, 20.0))
    assert a == b
    assert hash(a) == hash(b)
    assert pickle.loads(pickle.dumps(a)) == a
    assert a != Parameterization("logvar")
    with pytest.raises(AttributeError):
        a.floor = 1.0
