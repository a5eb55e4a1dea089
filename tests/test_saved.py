"""What changes between forward and backward: where PyTorch's own expression lets a tensor change, so do these; what
backward does read raises, as it does in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vaefast
from vaefast.integrations import torch_distributions

SHAPE = (3, 4)


def leaf(seed: int) -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)).add(0.5).requires_grad_()


def draw(parameterization: str | vaefast.Parameterization) -> Callable[..., Tensor]:
    def f(mu: Tensor, raw: Tensor) -> Tensor:
        torch.manual_seed(2)
        return vaefast.reparameterize(mu, raw, parameterization=parameterization)

    return f


def packed(moments: Tensor) -> Tensor:
    return vaefast.DiagonalGaussian(moments).kl(reduction="sum")


def density(loc: Tensor, scale: Tensor, value: Tensor) -> Tensor:
    with torch_distributions.enabled():
        return torch.distributions.Normal(loc, scale).log_prob(value)


# a function, how many tensors it takes, and which of them backward does not read
CASES: dict[str, tuple[Callable[..., Tensor], int, set[int]]] = {
    "sample by logvar": (draw("logvar"), 2, {0}),
    "sample by softplus": (draw("softplus"), 2, {0}),
    "sample by std": (draw("std"), 2, {0, 1}),
    "sample by std, with a floor": (draw(vaefast.Parameterization("std", floor=0.1)), 2, {0, 1}),
    "sample by std, clamped": (draw(vaefast.Parameterization("std", clamp=(0.1, 1.0))), 2, {0}),
    "kl": (vaefast.gaussian_kl, 2, set()),
    "kl to a prior": (vaefast.gaussian_kl, 4, set()),
    "sample with kl": (lambda *q: vaefast.sample_with_kl(*q)[1], 2, set()),
    "packed": (packed, 1, set()),
    "log_prob": (density, 3, {0, 2}),
}
PAIRS = [(name, k) for name, (_, count, _) in CASES.items() for k in range(count)]


@pytest.mark.parametrize(("name", "k"), PAIRS)
def test_what_backward_reads_is_saved_and_no_more(extension: object, name: str, k: int) -> None:
    f, count, unread = CASES[name]
    inputs = [leaf(seed) for seed in range(count)]
    expected = torch.autograd.grad(f(*inputs).sum(), inputs)
    loss = f(*inputs).sum()
    with torch.no_grad():
        inputs[k].add_(1.0)
    if k in unread:
        for got, e in zip(torch.autograd.grad(loss, inputs), expected):
            torch.testing.assert_close(got, e, rtol=0, atol=0)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("trained", ["loc", "value", "both"])
def test_a_density_reads_the_difference_alone(extension: object, trained: str) -> None:
    """As PyTorch's expression does: what it was given may change."""
    loc, scale, value = leaf(0), leaf(1), leaf(2)
    if trained != "both":
        (value if trained == "loc" else loc).requires_grad_(False)
    at = [t for t in (loc, scale, value) if t.requires_grad]
    expected = torch.autograd.grad(torch.distributions.Normal(loc, scale).log_prob(value).sum(), at)
    found = density(loc, scale, value).sum()
    with torch.no_grad():
        loc.add_(1.0)
        value.mul_(2.0)
    for got, e in zip(torch.autograd.grad(found, at), expected):
        torch.testing.assert_close(got, e)


def test_an_optimizer_steps_on_the_mean_between(extension: object) -> None:
    mu, rho = leaf(0), leaf(1)
    w = vaefast.reparameterize(mu, rho, parameterization="softplus")
    torch.optim.SGD([mu], lr=0.1).zero_grad()
    mu.grad = torch.ones_like(mu)
    torch.optim.SGD([mu], lr=0.1).step()
    mu.grad = None
    w.sum().backward()
    torch.testing.assert_close(mu.grad, torch.ones_like(mu))


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_second_derivative_is_of_what_was_there(extension: object, create_graph: bool) -> None:
    mu, raw = leaf(0), leaf(1)
    z = draw("logvar")(mu, raw)
    with torch.no_grad():
        mu.add_(1.0)
    (grad,) = torch.autograd.grad(z.square().sum() - z.square().sum().detach(), raw, create_graph=create_graph)
    assert grad.isfinite().all()
