"""A likelihood that is an entry in Python alone: every function takes it, in PyTorch, and one warning says so."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributions as D

import vaefast
from vaefast import _backends, _options
from vaefast.likelihoods import LIKELIHOODS, LikelihoodEntry

ENTRY = LikelihoodEntry(
    ("log_rate",),
    1,
    "positive",
    "x e^r - s r",
    lambda x, log_rate, shift: x * torch.exp(log_rate) - shift * log_rate,
    lambda log_rate, shift: D.Exponential(torch.exp(log_rate)),
    domains=("log",),
    options={"shift": 1.0},
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIKELIHOODS, "exponential", ENTRY)
    monkeypatch.setattr(_options, "_LIKELIHOODS", dict(_options._LIKELIHOODS))
    monkeypatch.setattr(_backends, "_warned_of", set())
    torch._dynamo.reset()


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r = torch.randn(5, 7, requires_grad=True)
    mu, logvar = (torch.randn(5, 3, requires_grad=True) for _ in range(2))
    return r, torch.rand(5, 7) * 3, mu, logvar


def exact(r: Tensor, x: Tensor) -> Tensor:
    return -D.Exponential(torch.exp(r)).log_prob(x).sum(1).mean()


def test_every_function_takes_it_and_one_warning_is_given(extension: object) -> None:
    r, x, mu, logvar = data()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        nll = vaefast.reconstruction_loss(r, x, likelihood="exponential")
        terms = vaefast.elbo_terms(r, x, mu, logvar, likelihood="exponential", beta=0.5, free_bits=0.1)
        loss = vaefast.elbo_loss(r, x, mu, logvar, likelihood="exponential")
        module = vaefast.ELBOLoss("exponential")(r, x, mu, logvar)
    (message,) = [str(w.message) for w in told]
    assert re.search(r"'exponential' has no kernels.*csrc/likelihoods/.*built again", message)
    kl = vaefast.gaussian_kl(mu, logvar)
    assert "PosteriorNode" in kl.grad_fn.name(), "the KL stays the kernels'"
    torch.testing.assert_close(nll, exact(r, x))
    torch.testing.assert_close(terms.reconstruction, exact(r, x))
    torch.testing.assert_close(loss, exact(r, x) + kl)
    assert torch.equal(loss, module)
    for found, expected in zip(torch.autograd.grad(loss, (r, mu)), torch.autograd.grad(exact(r, x) + kl, (r, mu))):
        torch.testing.assert_close(found, expected)
    assert vaefast.sample_likelihood(r.detach(), "exponential").shape == r.shape
    torch.testing.assert_close(vaefast.likelihood_mean(r, "exponential"), torch.exp(-r))


def test_its_options_and_masks(extension: object) -> None:
    r, x, *_ = data()
    x[0] = torch.nan
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[0] = False
    shifted = vaefast.Likelihood("exponential", shift=2.0)
    with pytest.warns(UserWarning, match="no kernels"):
        found = vaefast.reconstruction_loss(r, x, likelihood=shifted, weight=mask, reduction="sum")
    torch.testing.assert_close(found, (x * r.exp() - 2 * r)[1:].sum())
    with pytest.raises(TypeError, match="no option 'scale'; it takes shift"):
        vaefast.Likelihood("exponential", scale=1.0)


def test_it_compiles(extension: object) -> None:
    r, x, mu, logvar = data()

    def step(r: Tensor) -> Tensor:
        return vaefast.elbo_loss(r, x, mu, logvar, likelihood="exponential")

    with pytest.warns(UserWarning, match="no kernels"):
        eager = step(r)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(r), eager)


def test_native_refuses_it_and_the_reference_says_nothing(extension: object) -> None:
    r, x, mu, logvar = data()
    with vaefast.use_backend("native"), pytest.raises(RuntimeError, match=r"'exponential' is written in Python alone"):
        vaefast.reconstruction_loss(r, x, likelihood="exponential")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = vaefast.reference.elbo_loss(r, x, mu, logvar, likelihood="exponential")
        with vaefast.use_backend("reference"):
            assert torch.equal(vaefast.elbo_loss(r, x, mu, logvar, likelihood="exponential"), expected)


def test_where_nothing_is_compiled_there_is_nothing_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vaefast._native, "_C", None)
    r, x, *_ = data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(vaefast.reconstruction_loss(r, x, likelihood="exponential"), exact(r, x))


def test_it_joins_the_public_list(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "exponential" in vaefast.LIKELIHOODS
    bad: Any = "gamma?"
    with pytest.raises(ValueError, match=r"likelihood must be one of .*'exponential'"):
        vaefast.reconstruction_loss(*data()[:2], likelihood=bad)
