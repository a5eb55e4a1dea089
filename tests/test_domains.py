"""Data and parameters outside a likelihood's domain: no loss where the function that is replaced refuses them, and
named by ``vaefast.check``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import LIKELIHOOD_CASES, Data, posterior, training
from torch import Tensor
from torch import distributions as D
from torch.nn import functional as F

import vaefast
from vaefast import Likelihood
from vaefast.reference import LIKELIHOODS

# what torch has in the place of a likelihood, which refuses some data
REPLACED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bernoulli_probs": lambda p, x: F.binary_cross_entropy(p, x, reduction="none"),
    "continuous_bernoulli": lambda p, x: -D.ContinuousBernoulli(logits=p, validate_args=True).log_prob(x),
    "poisson": lambda p, x: -D.Poisson(p.exp(), validate_args=True).log_prob(x),
    "categorical": lambda p, x: F.cross_entropy(p, x.long(), reduction="none"),
}
DATA = {
    "bernoulli_probs": [200.0, -1.0, 1.0 + 2**-7, -(2**-10), math.inf, -math.inf, math.nan, 0.0, 1.0, 0.5, 2**-20],
    "continuous_bernoulli": [200.0, -1.0, 1.0 + 2**-7, -(2**-10), math.inf, math.nan, 0.0, 1.0, 0.5],
    "poisson": [-1.0, -200.0, -math.inf, math.nan, 0.0, 1.0, 7.0],
    "categorical": [-1.0, 3.0, 200.0, 0.0, 1.0, 2.0],
}
PARAMETERS = {"bernoulli_probs": [-1e-3, 1.0 + 2**-7, 200.0, -math.inf, math.nan, 0.0, 1.0, 0.25]}


def refused(likelihood: str, p: Tensor, x: Tensor) -> bool:
    try:
        return bool(REPLACED[likelihood](p, x).isnan().any())
    except (ValueError, RuntimeError, IndexError):
        return True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 40])
@pytest.mark.parametrize("likelihood", list(REPLACED))
def test_what_is_refused_is_no_loss(face: Any, likelihood: str, size: int, dtype: torch.dtype) -> None:
    """NaN, in value and gradient, there alone; what is not refused has a number."""
    for value in DATA[likelihood]:
        x = torch.zeros(2, size, dtype=dtype)
        x[1, size - 1] = value
        p = torch.full((2, size) if likelihood != "categorical" else (2, 3, size), 0.25, dtype=dtype).requires_grad_()
        one = p.detach()[:1, ..., :1].float(), x[1:, -1:].float()
        nll = face.reconstruction_loss(p, x, likelihood=likelihood, reduction="none")
        (gradient,) = torch.autograd.grad(nll.sum(), p)
        bad = torch.zeros(2, size, dtype=torch.bool)
        bad[1, size - 1] = refused(likelihood, *one)
        assert torch.equal(nll.isnan(), bad), value
        if not math.isinf(value):
            assert torch.equal(
                gradient.isnan(), bad if likelihood != "categorical" else bad.unsqueeze(1).expand(p.shape)
            )
        for reduction in ("sum", "mean", "batchmean"):
            found = face.reconstruction_loss(p, x, likelihood=likelihood, reduction=reduction)
            assert found.isnan() == bad.any(), (value, reduction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_refused_probabilities(face: Any, dtype: torch.dtype) -> None:
    for value in PARAMETERS["bernoulli_probs"]:
        for x in (0.0, 0.5, 1.0):
            p, target = torch.full((3,), value, dtype=dtype), torch.full((3,), x, dtype=dtype)
            nll = face.reconstruction_loss(p, target, likelihood="bernoulli_probs", reduction="none")
            assert bool(nll.isnan().all()) == refused("bernoulli_probs", p.float(), target.float()), (value, x)


def test_the_presets_that_go_by_it(face: Any) -> None:
    """The programs that they stand for call F.binary_cross_entropy."""
    recon, x, q = torch.full((2, 3), 0.5), torch.full((2, 3), 200.0), posterior((2, 3))
    assert face.elbo_loss(recon, x, q.mu, q.raw, preset="pytorch_examples").isnan()


# of each place, values that are not in it
OUTSIDE: dict[str, list[float]] = {
    "unit": [200.0, -1.0, 1.01, math.nan, math.inf],
    "real": [math.nan, math.inf, -math.inf],
    "planes": [math.nan, -math.inf],
    "log": [math.nan, math.inf],
    "positive": [-1.0, math.nan, math.inf],
    "at least 0": [-1.0, math.nan, math.inf],
    "count": [-1.0, 0.5, math.nan, math.inf],
    "total": [-1.0, 0.5, math.nan],
    "some of total": [-1.0, 0.5, 1e9, math.nan],
    "bins": [-1.5, 1.02, 0.5 / 255, math.nan],
    "class": [-1.0, 0.5, 7.0, math.nan],
}
SHAPE = (2, 5)


def spoilt(data: Data, which: int, at: tuple[int, ...], value: float) -> Data:
    tensors = [t.clone() for t in (*data.recon, data.target.to(data.recon[0].dtype))]
    tensors[which][at] = value
    return Data(tuple(tensors[:-1]), tensors[-1])


def places(likelihood: str, count: int) -> list[tuple[int, str]]:
    entry = LIKELIHOODS[likelihood]
    return [*enumerate(entry.domains[:count]), (count, entry.support)]


@pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_that_is_nan_has_no_gradient(
    backend: str, device: str, likelihood: str, count: int, dtype: torch.dtype
) -> None:
    """Of data outside the domain: NaN in every parameter, as in the loss, so that no step is taken on a part of it."""
    data, entry = training(likelihood, count, SHAPE, dtype), LIKELIHOODS[likelihood]
    for value in filter(math.isfinite, OUTSIDE.get(entry.support, [])):
        at = tuple(size - 1 for size in data.target.shape)
        leaf = spoilt(data, count, at, value).to(device).leaves()
        nll = vaefast.reconstruction_loss(leaf.recon, leaf.target, likelihood=likelihood, reduction="none")
        gradients = torch.autograd.grad(nll.sum(), leaf.recon)
        if entry.planes or entry.support == "class":
            found = [g[-1, :, -1] if g.dim() == 3 else g[-1, :] for g in gradients]
            assert bool(nll.isnan().any()) == any(bool(g.isnan().any()) for g in found)
            continue
        for g in gradients:
            assert torch.equal(g[at].isnan(), nll[at].isnan()), (value, nll[at], gradients)


@pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_check_passes_what_training_meets(likelihood: str, count: int, dtype: torch.dtype) -> None:
    data = training(likelihood, count, SHAPE)
    if LIKELIHOODS[likelihood].support not in ("some of total",):
        data = Data(tuple(p.to(dtype) for p in data.recon), data.target.to(dtype))
    vaefast.check(data.recon, data.target, likelihood)
    vaefast.check(list(data.recon), data.target, Likelihood(likelihood))


@pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
def test_check_names_what_is_outside(likelihood: str, count: int) -> None:
    """The argument, its index, its value, the domain, and how many."""
    data = training(likelihood, count, SHAPE)
    for which, place in places(likelihood, count):
        for value in OUTSIDE.get(place, [math.nan]):
            shape = data.target.shape if which == count else data.recon[which].shape
            at = tuple(size - 1 for size in shape)
            bad = spoilt(data, which, at, value)
            name = "target" if which == count else "recon"
            with pytest.raises(ValueError, match=name) as caught:
                vaefast.check(bad.recon, bad.target, likelihood)
            message = str(caught.value)
            assert message.startswith(name) and repr(list(at)) in message and repr(likelihood) in message, message
            shown = (bad.target if which == count else bad.recon[which])[at].item()
            assert repr(shown) in message and "must be in" in message and "1 such" in message, message
            if which < count and count > 1:
                assert LIKELIHOODS[likelihood].params[which] in message


@pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
def test_what_is_hidden_is_not_asked(likelihood: str, count: int) -> None:
    data = training(likelihood, count, SHAPE)
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[1] = False
    tensors = [t.clone() for t in (*data.recon, data.target.float())]
    for t in tensors:
        t[1] = math.nan
    vaefast.check(tensors[:-1], tensors[-1], likelihood, weight=mask)
    vaefast.check(tensors[:-1], tensors[-1], likelihood, weight=mask * 0.5)
    with pytest.raises(ValueError, match="nan"):
        vaefast.check(tensors[:-1], tensors[-1], likelihood, weight=~mask)


def test_check_of_parameters_that_broadcast() -> None:
    x, mean = torch.zeros(3, 4), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"recon's logvar\[2\] is inf; .* There are 3 such"):
        vaefast.check((mean, torch.tensor([0.0, 0.0, math.inf, 0.0])), x, "gaussian")
    with pytest.raises(ValueError, match=r"recon's logvar is nan; .* There are 12 such"):
        vaefast.check((mean, math.nan), x, "gaussian")
    with pytest.raises(ValueError, match=r"recon's mu\[1, 0\] is -1\.0"):
        vaefast.check((torch.tensor([[1.0], [-1.0]]), torch.ones(1, 1)), torch.ones(2, 1), "negative_binomial")
    vaefast.check((torch.zeros(2, 1), torch.ones(1, 1)), torch.ones(2, 1), "negative_binomial")  # eps is added


def test_check_takes_what_the_loss_takes() -> None:
    vaefast.check(torch.zeros(2, 3), torch.tensor([0, 2]), "categorical")
    with pytest.raises(ValueError, match=r"target\[1\] is 3.0; .* the classes 0 to 2"):
        vaefast.check(torch.zeros(2, 3), torch.tensor([0, 3]), "categorical")
    with pytest.raises(ValueError, match="target has shape"):
        vaefast.check(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="likelihood must be one of"):
        vaefast.check(torch.zeros(2, 3), torch.zeros(2, 3), "bernouli")
    vaefast.check(torch.zeros(0, 3), torch.zeros(0, 3))
    vaefast.check(torch.zeros(2, 3, device="meta"), torch.zeros(2, 3, device="meta"))
    with pytest.raises(ValueError, match=r"target\[0, 0\] is 200\.0; the data of 'gaussian_optimal'|finite"):
        vaefast.check(torch.zeros(1, 1), torch.full((1, 1), math.inf), "gaussian_optimal")


@pytest.mark.parametrize("options", [{}, {"preset": "pytorch_examples"}], ids=str)
def test_the_first_batches_of_a_loss(options: dict[str, Any]) -> None:
    criterion = vaefast.ELBOLoss(**({"likelihood": "bernoulli_probs"} | options), check=2)
    recon, x, q = torch.full((2, 3), 0.5), torch.rand(2, 3), posterior((2, 3))
    bad = x.clone()
    bad[1, 2] = 200.0
    with pytest.raises(ValueError, match=r"target\[1, 2\] is 200\.0; .* in \[0, 1\]"):
        criterion(recon, bad, q.mu, q.raw)
    assert "check=2" in repr(criterion)
    for _ in range(2):
        assert criterion(recon, x, q.mu, q.raw).isfinite()
    assert criterion(recon, bad, q.mu, q.raw).isnan()
    assert "check" not in repr(criterion)
    with pytest.raises(ValueError, match="check must be an int"):
        vaefast.ELBOLoss(check=-1)
    with pytest.raises(ValueError, match="check must be an int"):
        vaefast.ELBOLoss(check="all")


def test_a_compiled_loss_does_not_ask() -> None:
    criterion = vaefast.ELBOLoss(check=2)
    recon, q = torch.zeros(2, 3), posterior((2, 3))
    torch._dynamo.reset()
    compiled = torch.compile(criterion, backend="eager", fullgraph=True)
    assert compiled(recon, torch.rand(2, 3), q.mu, q.raw).isfinite()
