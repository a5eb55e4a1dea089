"""Every likelihood of the registry against float64: values, gradients, weights and masks, reductions, broadcasting.

The bound of the contract is 2e-6 * max(1, |exact|) elementwise in float32, for values and gradients.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import scipy.stats
import torch
from exact import nll as exact_nll
from inputs import (
    LIKELIHOOD_CASES,
    REDUCTIONS,
    Data,
    assert_within,
    extreme,
    generator,
    gradients,
    nll_of,
    over_planes,
    sensitivity,
    targets,
    training,
)
from torch import Tensor
from torch.nn import functional as F

import vaefast
from vaefast.reference import DOMAINS, LIKELIHOODS

CASES = pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
KINDS = pytest.mark.parametrize("kind", ["training", "extreme"])
BOUND = 2e-6


def data_of(kind: str, likelihood: str, count: int) -> Data:
    # 50 digits take their time
    shape = (8, 65) if LIKELIHOODS[likelihood].planes else (64, 130)
    return extreme(likelihood, count) if kind == "extreme" else training(likelihood, count, shape)


def reduced(elementwise: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return elementwise
    if reduction in ("sum", "mean"):
        return getattr(elementwise, reduction)()
    rows = elementwise.flatten(1).sum(1)
    return rows if reduction == "per_sample" else rows.mean()


def slack_of(kind: str, likelihood: str, data: Data, device: str) -> list[Tensor | float]:
    """Beside the bound, for the nll and each gradient. A mixture's extremes have components so sharp that a rounding of
    a mean moves the nll: no more than four such roundings. A gamma's concentration's gradient may move as far as its
    inputs' rounding moves it where logarithms are CUDA's, which are an ulp off; so may those of what is made of gammas
    and of negative binomials' differences."""
    if (likelihood == "gamma" and device == "cuda") or likelihood == "zero_inflated_gamma":
        return [*sensitivity(likelihood, data)]
    if likelihood == "negative_binomial_mixture":
        return [0.0, *(8 * s for s in sensitivity(likelihood, data)[1:])]
    if kind != "extreme" or not LIKELIHOODS[likelihood].planes:
        return [0.0] * (1 + len(data.recon))
    return [4 * s for s in sensitivity(likelihood, data)]


def loss(data: Data, likelihood: str, **options: Any) -> Tensor:
    return vaefast.reconstruction_loss(data.recon, data.target, likelihood=likelihood, **options)


@pytest.mark.isa
@CASES
@KINDS
def test_values_against_distributions(backend: str, device: str, kind: str, likelihood: str, count: int) -> None:
    data = data_of(kind, likelihood, count)
    wide = data.to(torch.float64)
    exact = exact_nll(likelihood, wide.target, wide.recon)
    assert exact.isfinite().all()
    slack = slack_of(kind, likelihood, data, device)[0]
    assert_within(loss(data.to(device), likelihood, reduction="none"), exact, BOUND, "nll", slack)


@pytest.mark.isa
@CASES
@KINDS
def test_gradients_against_float64(backend: str, device: str, kind: str, likelihood: str, count: int) -> None:
    data = data_of(kind, likelihood, count)
    ours, wide = data.to(device).leaves(), data.to(torch.float64).leaves()
    actual = torch.autograd.grad(loss(ours, likelihood, reduction="sum"), ours.recon)
    exact = torch.autograd.grad(nll_of(likelihood, wide).sum(), wide.recon)
    slack = slack_of(kind, likelihood, data, device)[1:]
    for name, a, e, s in zip(LIKELIHOODS[likelihood].params, actual, exact, slack):
        assert_within(a, e, BOUND, f"d {name}", s)


@pytest.mark.isa
@CASES
@KINDS
def test_float64(native: str, kind: str, likelihood: str, count: int) -> None:
    data = data_of(kind, likelihood, count).to(torch.float64)
    exact = exact_nll(likelihood, data.target, data.recon)
    actual = loss(data.to(native), likelihood, reduction="none")
    assert actual.dtype == torch.float64
    assert_within(actual, exact, 1e-14, "nll")


@pytest.mark.isa
def test_continuous_bernoulli_beside_its_series(backend: str, device: str) -> None:
    """In float64, from where its normalizer is a series to where that is none."""
    logits = torch.logspace(-9, -2, 71, dtype=torch.float64)
    logits = torch.cat((logits, -logits))
    data = Data((logits,), torch.full_like(logits, 0.3))
    exact = exact_nll("continuous_bernoulli", data.target, data.recon)
    actual = loss(data.to(device), "continuous_bernoulli", reduction="none")
    assert_within(actual, exact, 1e-15, "nll")


def test_gaussian_against_scipy(backend: str, device: str) -> None:
    data = training("gaussian", 2)
    mean, logvar = (p.double().numpy() for p in data.recon)
    exact = -scipy.stats.norm.logpdf(data.target.double().numpy(), mean, torch.from_numpy(logvar / 2).exp().numpy())
    assert_within(loss(data.to(device), "gaussian", reduction="none"), torch.from_numpy(exact), BOUND)


def test_laplace_against_scipy(backend: str, device: str) -> None:
    data = training("laplace", 2)
    loc, log_scale = (p.double().numpy() for p in data.recon)
    exact = -scipy.stats.laplace.logpdf(data.target.double().numpy(), loc, torch.from_numpy(log_scale).exp().numpy())
    assert_within(loss(data.to(device), "laplace", reduction="none"), torch.from_numpy(exact), BOUND)


@pytest.mark.parametrize(
    ("likelihood", "constant"),
    [("bernoulli", math.log(2)), ("gaussian", 0.5 * math.log(2 * math.pi)), ("laplace", math.log(2))],
)
def test_normalising_constants(backend: str, device: str, likelihood: str, constant: float) -> None:
    """At parameters 0 and x = 0 the constant is all there is."""
    zero = torch.zeros(1, 3, device=device)
    for recon in (zero, (zero, zero))[: len(LIKELIHOODS[likelihood].params)]:
        nll = vaefast.reconstruction_loss(recon, zero, likelihood=likelihood, reduction="none")
        assert_within(nll, torch.full((1, 3), constant, dtype=torch.float64), 1e-7)


@CASES
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions(backend: str, device: str, likelihood: str, count: int, reduction: str, weighted: bool) -> None:
    """'mean' divides by the number of elements, weighted or not; 'batchmean' by the batch."""
    data = training(likelihood, count, (5, 3, 11))
    weight = torch.rand(5, 3, 11, generator=generator(9)) if weighted else None
    ours, wide = data.to(device).leaves(), data.to(torch.float64).leaves()
    actual = loss(ours, likelihood, reduction=reduction, weight=None if weight is None else weight.to(device))
    elementwise = nll_of(likelihood, wide)
    exact = reduced(elementwise if weight is None else elementwise * weight.double(), reduction)
    assert actual.dtype == torch.float32
    assert_within(actual, exact, BOUND, reduction)
    for a, e in zip(gradients(actual, ours.recon), gradients(exact, wide.recon)):
        assert_within(a, e, BOUND, f"gradient of {reduction}")


@CASES
def test_one_dimensional_batch(backend: str, device: str, likelihood: str, count: int) -> None:
    data = training(likelihood, count, (6,)).to(device)
    rows = loss(data, likelihood, reduction="per_sample")
    assert torch.equal(rows, loss(data, likelihood, reduction="none"))
    assert_within(loss(data, likelihood), rows.double().mean(), BOUND)


@CASES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mask", ["bool", "zeros"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_elements_reach_nothing(
    backend: str, device: str, likelihood: str, count: int, bad: float, mask: str, reduction: str
) -> None:
    """What a masked-out element holds, in the parameters or the data, is in neither the loss nor a gradient."""
    data = training(likelihood, count, (6, 37))
    on = torch.rand(6, 37, generator=generator(3)) > 0.3

    def masked(value: float) -> Data:
        recon, target = (
            [t.where(over_planes(likelihood, on, t), torch.tensor(value)) for t in each]
            for each in (data.recon, (data.target,))
        )
        return Data(tuple(recon), target[0])

    clean, dirty = masked(0.5), masked(bad)
    weight = (on if mask == "bool" else on.float()).to(device)
    found = []
    for d in (clean, dirty):
        leaf = d.to(device).leaves()
        value = loss(leaf, likelihood, reduction=reduction, weight=weight)
        found.append([value, *gradients(value, leaf.recon)])
        for gradient in found[-1][1:]:
            off = ~over_planes(likelihood, on, gradient).to(device)
            assert (gradient[off.expand_as(gradient)] == 0).all()
    for c, d in zip(*found):
        assert d.isfinite().all()
        assert torch.equal(c, d)


@CASES
def test_where_the_weight_is_not_zero_nan_flows(backend: str, device: str, likelihood: str, count: int) -> None:
    data = training(likelihood, count, (3, 5)).to(device)
    data.target[1, 2] = math.nan
    rows = loss(data, likelihood, reduction="per_sample", weight=torch.ones(3, 5, device=device))
    assert rows.isnan().tolist() == [False, True, False]


@CASES
@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 1), (1, 7), (4, 7)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64, torch.float16])
def test_weights_broadcast(
    backend: str, device: str, likelihood: str, count: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    data = training(likelihood, count, (4, 7))
    uniform = torch.rand(shape, generator=generator(4))
    weight = uniform > 0.4 if dtype == torch.bool else (uniform * (uniform > 0.3)).to(dtype)
    ours, wide = data.to(device).leaves(), data.to(torch.float64).leaves()
    actual = loss(ours, likelihood, reduction="batchmean", weight=weight.to(device))
    exact = (nll_of(likelihood, wide) * weight.double()).flatten(1).sum(1).mean()
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within(actual, exact, BOUND)
    for a, e in zip(gradients(actual, ours.recon), gradients(exact, wide.recon)):
        assert_within(a, e, BOUND)


@CASES
def test_all_ones_is_no_weight(backend: str, device: str, likelihood: str, count: int) -> None:
    data = training(likelihood, count).to(device)
    ones = torch.ones(4, 7, device=device)
    assert torch.equal(loss(data, likelihood, weight=ones), loss(data, likelihood))
    assert torch.equal(loss(data, likelihood, weight=ones.bool()), loss(data, likelihood))
    assert loss(data, likelihood, weight=0 * ones).item() == 0


WITH_SCALE = [(name, count) for name, count in LIKELIHOOD_CASES if count > 1]


@pytest.mark.parametrize(("likelihood", "count"), WITH_SCALE)
@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1), (1, 3, 1, 1), (1, 3, 4, 5), (2, 1, 1, 1), (2, 3, 4, 5), (5,)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_further_parameters_broadcast(
    backend: str, device: str, likelihood: str, count: int, shape: tuple[int, ...], reduction: str
) -> None:
    """A scale for everything, per channel, per sample or per element; its gradient has its shape."""
    data = training(likelihood, count, (2, 3, 4, 5), shapes=[(2, 3, 4, 5), *[shape] * (count - 1)])
    ours, wide = data.to(device).leaves(), data.to(torch.float64).leaves()
    actual = loss(ours, likelihood, reduction=reduction)
    exact = reduced(nll_of(likelihood, wide), reduction)
    assert_within(actual, exact, BOUND, "nll")
    for p, a, e in zip(ours.recon, gradients(actual, ours.recon), gradients(exact, wide.recon)):
        assert a.shape == p.shape
        assert a.dtype == p.dtype
        # a sum over 2 * 3 * 4 * 5 terms whose magnitudes are around 1 and may cancel
        assert_within(a, e, 20 * BOUND)


@pytest.mark.parametrize(("likelihood", "count"), WITH_SCALE)
@pytest.mark.parametrize("value", [0, -1.5])
def test_further_parameters_as_numbers(backend: str, device: str, likelihood: str, count: int, value: float) -> None:
    data = training(likelihood, count).to(device)
    domains = LIKELIHOODS[likelihood].domains[1:count]
    numbers = [float(DOMAINS[domain](torch.tensor(float(value)))) for domain in domains]
    first = data.recon[0]
    drawn = targets(likelihood, [first.cpu(), *(torch.full(first.shape, number) for number in numbers)])
    data = Data(data.recon, drawn.to(device))
    as_number = vaefast.reconstruction_loss((first, *numbers), data.target, likelihood=likelihood)
    tensors = [torch.tensor(float(number), device=device) for number in numbers]
    as_tensor = vaefast.reconstruction_loss((first, *tensors), data.target, likelihood=likelihood)
    assert torch.equal(as_number, as_tensor)


WITHOUT_SCALE = [(name, count) for name, count in WITH_SCALE if LIKELIHOODS[name].required == 1]


@pytest.mark.parametrize(("likelihood", "count"), WITHOUT_SCALE)
def test_unit_scale_is_the_default(backend: str, device: str, likelihood: str, count: int) -> None:
    data = training(likelihood, 1).to(device)
    given = vaefast.reconstruction_loss((*data.recon, *[0.0] * (count - 1)), data.target, likelihood=likelihood)
    assert_within(given, loss(data, likelihood).double(), 1e-6)


@CASES
def test_gradient_of_some_parameters_only(backend: str, device: str, likelihood: str, count: int) -> None:
    data = training(likelihood, count).to(device)
    full = data.leaves()
    everything = torch.autograd.grad(loss(full, likelihood), full.recon)
    for k in range(count):
        recon = [p.clone().requires_grad_(k == j) for j, p in enumerate(data.recon)]
        value = vaefast.reconstruction_loss(recon, data.target, likelihood=likelihood)
        value.backward()
        assert torch.equal(recon[k].grad, everything[k])
        assert all(p.grad is None for j, p in enumerate(recon) if j != k)


@CASES
def test_a_list_is_a_tuple(backend: str, device: str, likelihood: str, count: int) -> None:
    data = training(likelihood, count).to(device)
    given = vaefast.reconstruction_loss(list(data.recon), data.target, likelihood=likelihood)
    assert torch.equal(given, loss(data, likelihood))
    if count == 1:
        alone = vaefast.reconstruction_loss(data.recon[0], data.target, likelihood=likelihood)
        assert torch.equal(alone, given)


def test_inputs_are_left_alone(backend: str, device: str) -> None:
    for likelihood, count in LIKELIHOOD_CASES:
        data = training(likelihood, count).to(device)
        before = [t.clone() for t in (*data.recon, data.target)]
        leaf = data.leaves()
        loss(leaf, likelihood).backward()
        assert all(torch.equal(a, b) for a, b in zip((*leaf.recon, leaf.target), before))


def test_bernoulli_probs_is_binary_cross_entropy(backend: str, device: str) -> None:
    """PyTorch's own, its clamps and its gradient at probabilities 0 and 1 among them."""
    data = extreme("bernoulli_probs", 1).to(device)
    ours, theirs = data.leaves(), data.leaves()
    actual = loss(ours, "bernoulli_probs", reduction="none")
    expected = F.binary_cross_entropy(theirs.recon[0], theirs.target, reduction="none")
    assert_within(actual, expected.double(), BOUND)
    (a,), (e,) = gradients(actual, ours.recon), gradients(expected, theirs.recon)
    assert_within(a, e.double(), BOUND)


@pytest.mark.parametrize("name", ["poisson", "negative_binomial", "zero_inflated_negative_binomial"])
@pytest.mark.parametrize("constant", [True, False])
def test_counts_with_and_without_their_constant(backend: str, device: str, name: str, constant: bool) -> None:
    data = training(name, len(LIKELIHOODS[name].params), (16, 33))
    chosen = vaefast.Likelihood(name, constant=constant)
    exact = exact_nll(name, data.target, data.recon, constant=constant)
    nll = vaefast.reconstruction_loss(
        data.to(device).recon, data.target.to(device), likelihood=chosen, reduction="none"
    )
    assert_within(nll, exact, BOUND)


@pytest.mark.parametrize("name", ["poisson", "negative_binomial", "zero_inflated_negative_binomial"])
def test_what_is_no_count(backend: str, device: str, name: str) -> None:
    """Between whole numbers the gamma function goes on; below 0 there is none."""
    data = training(name, len(LIKELIHOODS[name].params), (4, 5)).to(device)
    between = Data(data.recon, data.target + 0.3)
    if name != "zero_inflated_negative_binomial":
        assert_within(loss(between, name, reduction="none"), exact_nll(name, between.target, between.recon), BOUND)
    assert loss(Data(data.recon, data.target - 20.5), name, reduction="none").isnan().all()
    tiny = Data(data.recon, torch.full_like(data.target, 1e-3))
    assert_within(loss(tiny, name, reduction="none"), exact_nll(name, tiny.target, tiny.recon), BOUND)


@pytest.mark.parametrize(("bins", "low", "high"), [(2, 0.0, 1.0), (17, 0.0, 16.0), (256, -1.0, 1.0), (1000, -3.0, 2.0)])
def test_bins_add_up_to_one(backend: str, device: str, bins: int, low: float, high: float) -> None:
    grid = torch.linspace(low, high, bins, dtype=torch.float64, device=device).float()
    mean, log_scale = torch.randn(2, 50, 1, generator=generator(2)).to(device).unbind()
    chosen = vaefast.Likelihood("discretized_logistic", bins=bins, low=low, high=high)
    recon = (mean.expand(50, bins).contiguous(), log_scale)
    nll = vaefast.reconstruction_loss(recon, grid.expand(50, bins), likelihood=chosen, reduction="none")
    assert_within(torch.exp(-nll.double()).sum(1), torch.ones(50, dtype=torch.float64), 1e-5)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"likelihood.*'bernoulli'.*'zinb'"):
        vaefast.Likelihood("zinb")
    with pytest.raises(TypeError, match=r"'poisson' has no option 'bins'.*constant"):
        vaefast.Likelihood("poisson", bins=3)
    with pytest.raises(TypeError, match=r"'bernoulli' has no option 'bins'.*none"):
        vaefast.Likelihood("bernoulli", bins=3)
    with pytest.raises(ValueError, match=r"bins.*at least 2.*1"):
        vaefast.Likelihood("discretized_logistic", bins=1)
    with pytest.raises(ValueError, match=r"low must be below high"):
        vaefast.Likelihood("discretized_logistic", low=1.0)
    with pytest.raises(ValueError, match=r"floor.*finite.*nan"):
        vaefast.Likelihood("discretized_logistic", floor=math.nan)
    with pytest.raises(ValueError, match=r"eps.*'a'"):
        vaefast.Likelihood("negative_binomial", eps="a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"likelihood must be a str or a vaefast.Likelihood, got int"):
        vaefast.reconstruction_loss(torch.zeros(2, 3), torch.zeros(2, 3), likelihood=3)  # type: ignore[arg-type]


def test_a_likelihood_is_a_value() -> None:
    one = vaefast.Likelihood("discretized_logistic", bins=17)
    assert one == copy.deepcopy(one) == pickle.loads(pickle.dumps(one))
    assert one != vaefast.Likelihood("discretized_logistic")
    assert len({one, vaefast.Likelihood("discretized_logistic", bins=17)}) == 1
    assert repr(one) == "Likelihood('discretized_logistic', bins=17, low=-1.0, high=1.0, floor=-7.0)"


@pytest.mark.parametrize("count", [1e2, 1e4, 1e6])
def test_a_rate_that_meets_its_count(backend: str, device: str, count: float) -> None:
    """Within five standard deviations, where e^l - x l + log x! is 10 made of terms of 10^7. The gradient e^l - x is
    held to 2e-9 of the count besides."""
    log_rate = (torch.linspace(-5, 5, 2001, dtype=torch.float64) / count**0.5 + math.log(count)).float()
    ours = Data((log_rate,), torch.full_like(log_rate, count)).to(device).leaves()
    nll = loss(ours, "poisson", reduction="none")
    sample = slice(None, None, 50)
    exact = exact_nll("poisson", ours.target[sample].cpu(), (log_rate[sample],))
    assert_within(nll[sample], exact, BOUND)
    (gradient,) = torch.autograd.grad(nll.sum(), ours.recon)
    expected = torch.exp(log_rate.double()) - count
    error = (gradient.double().cpu() - expected).abs()
    assert (error <= BOUND * expected.abs().clamp(min=1) + 2e-9 * count).all()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_continuous_bernoulli_that_is_nearly_even(backend: str, device: str, dtype: torch.dtype) -> None:
    logits = torch.logspace(-12, -1, 67, dtype=torch.float64)
    logits = torch.cat((logits, -logits)).to(dtype)
    target = torch.linspace(0, 1, len(logits), dtype=dtype)
    leaf = logits.to(device).requires_grad_()
    nll = vaefast.reconstruction_loss(leaf, target.to(device), likelihood="continuous_bernoulli", reduction="none")
    bound = {torch.float32: 2e-6, torch.float64: 1e-14}[dtype]
    assert_within(nll, exact_nll("continuous_bernoulli", target, (logits,)), bound)
    (gradient,) = torch.autograd.grad(nll.sum(), leaf)
    wide = logits.double()
    mean = 0.5 + wide / 12 - wide**3 / 720 + wide**5 / 30240 - wide**7 / 1209600
    assert_within(gradient, mean - target.double(), {torch.float32: 2e-6, torch.float64: 2e-12}[dtype])


@pytest.mark.isa
@pytest.mark.parametrize("count", [1e2, 1e4, 1e6, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_beside_a_large_count(backend: str, device: str, count: float, dtype: torch.dtype) -> None:
    """Without log x! there are e^l and x l alone, which here are small beside x log x: each is rounded once."""
    log_rate = (torch.linspace(-3, 3, 401, dtype=torch.float64) / count).to(dtype)
    chosen = vaefast.Likelihood("poisson", constant=False)
    target = torch.full_like(log_rate, count)
    nll = vaefast.reconstruction_loss(log_rate.to(device), target.to(device), likelihood=chosen, reduction="none")
    sample = slice(None, None, 8)
    exact = exact_nll("poisson", target[sample], (log_rate[sample],), constant=False)
    assert_within(nll[sample], exact, {torch.float32: 2e-6, torch.float64: 1e-14}[dtype])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_class_that_there_is_not_is_nan(backend: str, device: str, reduction: str) -> None:
    """Its loss, and all of its gradient; the other sites' gradients are their own."""
    logits = torch.randn(4, 5, generator=generator(0)).to(device).requires_grad_()
    target = torch.tensor([0.0, 5.0, 2.0, -1.0], device=device)
    loss = vaefast.reconstruction_loss(logits, target, likelihood="categorical", reduction=reduction)
    assert loss.isnan().tolist() == ([False, True, False, True] if loss.dim() else True)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isnan().all(1).tolist() == [False, True, False, True]
    assert gradient[::2].isfinite().all()
