"""Many posteriors in one call against the same ones one by one, and against torch.distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from inputs import ELBO_REDUCTIONS, FLOATING, assert_within, generator, gradients, raw_for
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils.checkpoint import checkpoint

import vaefast
from vaefast import Parameterization
from vaefast._philox import normal, take_counters
from vaefast.reference import PARAMETERIZATIONS

# one batch of 6; sizes 1, odd, below and above a vector, and of several units of work
SHAPES = ((6, 1), (6, 5), (6, 3, 4), (6, 16), (6, 1, 1, 333), (6, 4099))
PRIORS = ("none", "mus", "full", "broadcast")


def tensors(shapes: Sequence[Sequence[int]], seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    g = generator(seed)
    return [torch.randn(tuple(s), generator=g, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def lists(kind: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[list[Tensor]]:
    """mus, logvars, and as many lists of the prior as the kind has."""
    found = [tensors(SHAPES, seed, dtype, device) for seed in range(4)]
    if kind == "broadcast":
        found[2:] = [tensors([(1,) * len(s) for s in SHAPES], 5 + k, dtype, device) for k in range(2)]
    return found[: {"none": 2, "mus": 3}.get(kind, 4)]


def flat(given: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [t for each in given for t in each]


def exact_kl(given: Sequence[Sequence[Tensor]], reduction: str) -> Tensor:
    """By torch.distributions in float64."""
    total: Any = 0.0
    for k, shape in enumerate(SHAPES):
        mu, logvar, *prior = (each[k].double().expand(shape) for each in given)
        pm = prior[0] if prior else torch.zeros_like(mu)
        plv = prior[1] if len(prior) > 1 else torch.zeros_like(mu)
        kl = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(pm, (0.5 * plv).exp())).flatten(1).sum(1)
        total = total + {"per_sample": kl, "batchmean": kl.mean(), "sum": kl.sum()}[reduction]
    return total


@pytest.mark.parametrize("reduction", ELBO_REDUCTIONS)
@pytest.mark.parametrize("prior", PRIORS)
def test_kl_and_gradients_against_distributions(backend: str, device: str, prior: str, reduction: str) -> None:
    given = lists(prior, device=device)
    kl = vaefast.multi_tensor_gaussian_kl(*given, reduction=reduction)
    exact = exact_kl(given, reduction)
    assert kl.dtype == torch.float32
    assert_within(kl, exact, 2e-6)
    for got, true in zip(gradients(kl, flat(given)), gradients(exact, flat(given))):
        assert_within(got, true, 2e-5)


@pytest.mark.parametrize("dtype", FLOATING)
def test_equals_one_by_one(native: str, dtype: torch.dtype) -> None:
    given = lists("full", dtype, native)
    kl = vaefast.multi_tensor_gaussian_kl(*given)
    single = torch.stack([vaefast.gaussian_kl(*each) for each in zip(*given)]).sum()
    assert kl.dtype == single.dtype
    assert_within(kl, single, 1e-6)
    for got, true in zip(gradients(kl, flat(given)), gradients(single, flat(given))):
        assert got.dtype == dtype
        assert_within(got, true, 1e-6 if dtype in (torch.float32, torch.float64) else 1e-2)


def test_retained_graphs_and_partial_gradients(native: str) -> None:
    """Gradients that forward kept are multiplied anew each time, and only those that are asked for come."""
    given = lists("full", device=native)
    kl = vaefast.multi_tensor_gaussian_kl(*given)
    up = torch.tensor(3.0, device=native)
    first = torch.autograd.grad(kl, flat(given), up, retain_graph=True)
    some = torch.autograd.grad(kl, [given[3][2], given[0][5]], retain_graph=True)
    again = torch.autograd.grad(kl, flat(given), up)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert torch.allclose(3 * some[0], first[3 * len(SHAPES) + 2])
    assert torch.allclose(3 * some[1], first[5])
    fixed = [[t.detach() for t in each] for each in given]
    fixed[1][4].requires_grad_()
    (only,) = torch.autograd.grad(vaefast.multi_tensor_gaussian_kl(*fixed), [fixed[1][4]])
    assert torch.allclose(3 * only, first[len(SHAPES) + 4])


@pytest.mark.parametrize("name", list(PARAMETERIZATIONS))
def test_priors_take_the_parameterization_too(backend: str, device: str, name: str) -> None:
    mus, prior_mus = tensors(SHAPES, 0, device=device), tensors(SHAPES, 1, device=device)
    raws, prior_raws = ([raw_for(name, s, seed=k).to(device) for s in SHAPES] for k in (2, 3))
    kl = vaefast.multi_tensor_gaussian_kl(mus, raws, prior_mus, prior_raws, parameterization=name)
    logvars, prior_logvars = ([PARAMETERIZATIONS[name].logvar(r.double()) for r in each] for each in (raws, prior_raws))
    exact = exact_kl([mus, logvars, prior_mus, prior_logvars], "batchmean")
    assert_within(kl, exact, 2e-6)


@pytest.mark.parametrize("p", [*PARAMETERIZATIONS, Parameterization("softplus", clamp=(-1.0, 1.0), floor=0.1)])
def test_samples_are_one_stream(native: str, p: str | Parameterization) -> None:
    """Each draws its part of one Philox stream, samples differ, and gradients are the reference's of that noise."""
    mus, raws = tensors(SHAPES, 0, device=native), [raw_for(p, s).to(native).requires_grad_() for s in SHAPES]
    outputs = []
    torch.manual_seed(3)
    samples, kl = vaefast.multi_tensor_sample_with_kl(mus, raws, 0.2, -0.5, parameterization=p)
    assert [z.shape for z in samples] == [mu.shape for mu in mus]
    outputs.append(([*samples, kl], gradients([*samples, kl], mus + raws)))
    torch.manual_seed(3)
    counters = [(mu.numel() + 3) // 4 for mu in mus]
    seed, samples = take_counters(mus[0], 4 * sum(counters)), []
    for k, (mu, raw) in enumerate(zip(mus, raws)):
        eps = normal(seed + seed.new_tensor([0, sum(counters[:k])]), mu, torch.float32)
        samples.append(vaefast.reference.reparameterize(mu, raw, parameterization=p, eps=eps))
    _, kl = vaefast.reference.multi_tensor_sample_with_kl(mus, raws, 0.2, -0.5, parameterization=p)
    outputs.append(([*samples, kl], gradients([*samples, kl], mus + raws)))
    for ours, theirs in zip(*(a + b for a, b in outputs)):
        assert_within(ours, theirs, 2e-5)
    noise = [(z - mu).flatten() for z, mu in zip(outputs[0][0], mus)]
    assert not torch.equal(noise[1][:5], noise[2][:5])


def test_keeps_sixteen_bytes_for_all_noise(native: str) -> None:
    mus, raws = tensors(SHAPES, 0, device=native), tensors(SHAPES, 1, device=native)
    known = {t.data_ptr() for t in mus + raws}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vaefast.multi_tensor_sample_with_kl(mus, raws)
    assert sum(t.nbytes for t in kept if t.data_ptr() not in known) == 16


def test_unused_samples_and_a_kl_alone(native: str) -> None:
    mus, raws = tensors(SHAPES, 0, device=native), tensors(SHAPES, 1, device=native)
    samples, kl = vaefast.multi_tensor_sample_with_kl(mus, raws)
    (alone,) = torch.autograd.grad(samples[2].sum(), [mus[2]], retain_graph=True)
    assert torch.equal(alone, torch.ones_like(mus[2]))
    got = torch.autograd.grad(kl, mus)
    assert all(torch.allclose(a, b) for a, b in zip(got, mus))


def test_double_backward(native: str) -> None:
    mus, raws = (tensors([(2, 3), (5,)], k, torch.float64, native) for k in range(2))

    def f(*given: Tensor) -> Tensor:
        torch.manual_seed(0)
        samples, kl = vaefast.multi_tensor_sample_with_kl(given[:2], given[2:], 0.1, 0.3)
        return kl + sum((z**2).sum() for z in samples)

    assert torch.autograd.gradcheck(f, (*mus, *raws))
    assert torch.autograd.gradgradcheck(f, (*mus, *raws))
    assert torch.autograd.gradcheck(
        lambda *t: vaefast.multi_tensor_gaussian_kl(t[:2], t[2:], reduction="sum"), (*mus, *raws)
    )


def test_checkpointing_replays_the_noise(native: str) -> None:
    mus, raws = tensors(SHAPES, 0, device=native), tensors(SHAPES, 1, device=native)

    def f(*given: Tensor) -> Tensor:
        samples, kl = vaefast.multi_tensor_sample_with_kl(given[: len(SHAPES)], given[len(SHAPES) :])
        return kl + sum(z.exp().sum() for z in samples)

    both = []
    for through in (f, lambda *t: checkpoint(f, *t, use_reentrant=False)):
        torch.manual_seed(1)
        both.append(torch.autograd.grad(through(*mus, *raws), mus + raws))
    assert all(torch.equal(a, b) for a, b in zip(*both))


def test_strided_and_empty(native: str) -> None:
    packed = torch.randn(6, 40, device=native)
    mu, logvar = packed.chunk(2, dim=1)
    mus, logvars = [mu, mu[:, ::3], mu[:, :0], mu.t()], [logvar, logvar[:, ::3], logvar[:, :0], logvar.t()]
    kl = vaefast.multi_tensor_gaussian_kl(mus, logvars, reduction="sum")
    assert_within(kl, sum(vaefast.gaussian_kl(*each, reduction="sum") for each in zip(mus, logvars)), 1e-6)
    assert vaefast.multi_tensor_gaussian_kl(mus[2:3], logvars[2:3], reduction="sum").item() == 0.0


def test_any_number_of_threads(native: str) -> None:
    mus, raws = tensors(SHAPES, 0, device=native), tensors(SHAPES, 1, device=native)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        samples, kl = vaefast.multi_tensor_sample_with_kl(mus, raws)
        results.append([*samples, kl, *gradients(kl, mus + raws)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_compiled(native: str) -> None:
    mus, raws = tensors(SHAPES, 0, device=native), tensors(SHAPES, 1, device=native)

    def f(*given: Tensor) -> tuple[Tensor, ...]:
        samples, kl = vaefast.multi_tensor_sample_with_kl(given[: len(SHAPES)], given[len(SHAPES) :])
        other = vaefast.multi_tensor_gaussian_kl(given[: len(SHAPES)], given[len(SHAPES) :], reduction="sum")
        return *samples, kl, other

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    out = compiled(*mus, *raws)
    kl = vaefast.multi_tensor_gaussian_kl(mus, raws, reduction="sum")
    assert_within(out[-1], kl, 1e-6)
    assert_within(out[-2], kl, 1e-6)
    assert not torch.equal(out[5], compiled(*mus, *raws)[5])
    for got, true in zip(gradients(out[-1], mus + raws), gradients(kl, mus + raws)):
        assert_within(got, true, 1e-6)


ONE = torch.zeros(2, 3)
BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: vaefast.multi_tensor_gaussian_kl(ONE, [ONE]), TypeError, "mus must be a list"),
    (lambda: vaefast.multi_tensor_gaussian_kl([], []), ValueError, "mus is empty"),
    (lambda: vaefast.multi_tensor_gaussian_kl([ONE], [ONE, ONE]), ValueError, "raws has 2 tensors but mus has 1"),
    (lambda: vaefast.multi_tensor_gaussian_kl([ONE], [ONE[:1]]), ValueError, "logvar has shape"),
    (lambda: vaefast.multi_tensor_gaussian_kl([ONE], [ONE.long()]), TypeError, "logvar must be float"),
    (lambda: vaefast.multi_tensor_gaussian_kl([ONE], [ONE], []), ValueError, "prior_mus is empty"),
    (lambda: vaefast.multi_tensor_gaussian_kl([ONE], [ONE], [ONE[:, :2]]), ValueError, "does not broadcast"),
    (lambda: vaefast.multi_tensor_gaussian_kl([ONE, ONE[:1]], [ONE, ONE[:1]]), ValueError, "one batch"),
    (lambda: vaefast.multi_tensor_gaussian_kl([ONE], [ONE], reduction="mean"), ValueError, "reduction"),
    (lambda: vaefast.multi_tensor_gaussian_kl([ONE], [ONE], parameterization="sigma"), ValueError, "parameterization"),
    (lambda: vaefast.multi_tensor_sample_with_kl([ONE], [1.0]), TypeError, "logvar must be a torch.Tensor"),
    (lambda: vaefast.multi_tensor_sample_with_kl([ONE], [ONE], "one"), TypeError, "prior_mu must be"),
    (lambda: vaefast.multi_tensor_sample_with_kl([ONE], [ONE], reduction="none"), ValueError, "reduction"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(backend: str, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
