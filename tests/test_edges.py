"""docs/edges.md is what the code gives; and of it, what must not be left to a table."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import REDUCTIONS

import vaefast
from tools import edges


@pytest.mark.filterwarnings("ignore:likelihood .* has no kernels")
def test_the_page_is_what_the_code_gives(extension: object) -> None:
    """To the digits that are written; instruction sets differ in the last of float32's."""
    page, now = edges.PAGE.read_text().splitlines(), edges.page().splitlines()
    assert len(page) == len(now), "run `make edges`"
    for there, here in zip(page, now):
        assert there == here, "run `make edges`"


def test_no_row_stands_twice() -> None:
    for group in edges.GROUPS:
        names = [edge.what for edge in group.edges]
        assert len(names) == len(set(names)), group.title


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("raw", [math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (40, 300)], ids=str)
def test_an_infinite_log_variance_is_an_infinite_kl_in_every_reduction(
    backend: str, reduction: str, raw: float, shape: tuple[int, ...]
) -> None:
    logvar = torch.zeros(shape)
    logvar.view(-1)[1] = raw
    kl = vaefast.gaussian_kl(torch.zeros(shape), logvar, reduction=reduction)
    assert kl.max().item() == math.inf and not kl.isnan().any()


@pytest.mark.parametrize("shape", [(3,), (700, 500)], ids=str)
@pytest.mark.parametrize("parameterization", ["logvar", "log_std", "softplus"])
def test_a_sample_of_no_variance_is_the_mean(backend: str, shape: tuple[int, ...], parameterization: str) -> None:
    mu = torch.randn(shape, requires_grad=True)
    raw = torch.full(shape, -math.inf, requires_grad=True)
    for eps in (None, torch.ones(shape)):
        z = vaefast.reparameterize(mu, raw, parameterization=parameterization, eps=eps)
        assert torch.equal(z, mu)
        of_mu, of_raw = torch.autograd.grad(z.sum(), (mu, raw))
        assert (of_mu == 1).all() and (of_raw == 0).all()


def test_an_infinite_variance_has_an_infinite_gradient(backend: str) -> None:
    raw = torch.full((3,), 178.0, requires_grad=True)
    z = vaefast.reparameterize(torch.ones(3), raw, eps=torch.full((3,), 0.5))
    assert torch.equal(torch.autograd.grad(z.sum(), raw)[0], torch.full((3,), math.inf))


def test_a_prior_of_infinite_variance(backend: str) -> None:
    prior = torch.full((3,), math.inf)
    kl = vaefast.gaussian_kl(torch.ones(3), torch.zeros(3), torch.zeros(3), prior, reduction="none")
    assert torch.equal(kl, torch.full((3,), math.inf))
