"""Discrete latents: the KL, the samples and their gradients against 50 digits, torch.distributions and DreamerV3."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import mpmath
import pytest
import torch
from inputs import FLOATING, REDUCTIONS, generator
from mpmath import mp, mpf
from torch import Tensor
from torch import distributions as D
from torch.nn import functional as F

import vaefast
from vaefast import _categorical
from vaefast.discrete import symlog

mp.dps = 50

UNIMIX = (0.0, 0.01, 0.3, 1.0)


def mixed_logits(logits: Tensor, unimix: float, dim: int = -1) -> Tensor:
    """DreamerV3's, from its code: rssm.py, RSSM._dist and embodied's Categorical (and OneHot)."""
    if not unimix:
        return logits
    probs = torch.softmax(logits, dim)
    return torch.log((1 - unimix) * probs + unimix / probs.shape[dim])


def theirs(logits: Tensor, unimix: float = 0.0) -> D.OneHotCategoricalStraightThrough:
    return D.OneHotCategoricalStraightThrough(logits=mixed_logits(logits, unimix), validate_args=False)


def kl_of_theirs(q: Tensor, p: Tensor | None, unimix: float) -> Tensor:
    """Of each latent, classes last."""
    return D.kl_divergence(theirs(q, unimix), theirs(torch.zeros_like(q) if p is None else p, unimix))


def exact(q: list[float], p: list[float] | None, unimix: float) -> mpf:
    def probs(logits: list[float]) -> list[mpf]:
        weights = [mpmath.exp(mpf(x)) for x in logits]
        return [(1 - mpf(unimix)) * w / sum(weights) + mpf(unimix) / len(weights) for w in weights]

    a, b = probs(q), probs([0.0] * len(q) if p is None else p)
    return mpmath.fsum(x * (mpmath.log(x) - mpmath.log(y)) for x, y in zip(a, b))


def leaves(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 2.0) -> list[Tensor]:
    rng = generator(seed)
    return [(scale * torch.randn(shape, generator=rng, dtype=dtype)).requires_grad_() for _ in range(2)]


@pytest.fixture(params=["kernels", "closed", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels where there are any, PyTorch's closed form, and what compilers and transforms see."""
    if request.param == "plain":
        monkeypatch.setattr(_categorical, "unseen", lambda *tensors: False)
    with nullcontext() if request.param == "kernels" else vaefast.use_backend("reference"):
        yield str(request.param)


# -- the KL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unimix", UNIMIX[:3])
@pytest.mark.parametrize("apart", [1e-12, 1e-6, 1e-4, 1e-2, 1.0, 30.0, 150.0])
@pytest.mark.parametrize("uniform", [False, True])
def test_the_kl_in_fifty_digits(dtype: torch.dtype, unimix: float, apart: float, uniform: bool) -> None:
    """Next to the prior as far from it; the logits' own size is as large as the rounding of theirs allows."""
    base = torch.zeros(6, 5, dtype=dtype) if uniform else torch.randn(6, 5, generator=generator(1), dtype=dtype)
    p = base * min(1.0, 1e3 * apart)  # where what is far apart can be told
    q = p + apart * torch.randn(6, 5, generator=generator(2), dtype=dtype)
    got = vaefast.categorical_kl(q, None if uniform else p, unimix=unimix, reduction="none")
    bound = 2e-6 if dtype == torch.float32 else 1e-13
    for value, *rows in zip(got.tolist(), q.tolist(), p.tolist()):
        expected = exact(rows[0], None if uniform else rows[1], unimix)
        assert abs(value - expected) <= bound * expected, (value, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unimix", [0.0, 0.01])
@pytest.mark.parametrize("common", [1.0, -200.0, 4000.0])
def test_what_logits_have_in_common_costs_no_digits(way: str, dtype: torch.dtype, unimix: float, common: float) -> None:
    q = torch.randn(40, 5, generator=generator(1), dtype=dtype)
    p = q + 0.01 * torch.randn(40, 5, generator=generator(2), dtype=dtype) + common
    got = vaefast.categorical_kl(q, p, unimix=unimix, reduction="none")
    bound = 2000 * torch.finfo(dtype).eps  # logits of 4 are no nearer to each other than their rounding, of 0.01
    for value, *rows in zip(got.tolist(), q.tolist(), p.tolist()):
        expected = exact(*rows, unimix)
        assert abs(value - expected) <= bound * expected, (value, expected)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("unimix", UNIMIX)
def test_the_kl_is_never_negative(way: str, dtype: torch.dtype, unimix: float) -> None:
    q, other = (t.detach() for t in leaves(200, 7, dtype=torch.float32))
    for p in (q, q + 3.0, q * (1 + 1e-6), q + 1e-6 * other, other):
        kl = vaefast.categorical_kl(q.to(dtype), p.to(dtype), unimix=unimix, reduction="none")
        assert kl.min() >= 0
    assert vaefast.categorical_kl(q, q, unimix=unimix).item() == 0


@pytest.mark.parametrize("unimix", UNIMIX)
@pytest.mark.parametrize("classes", [1, 2, 3, 32, 1000])
@pytest.mark.parametrize("uniform", [False, True])
def test_the_kl_of_torch_distributions(way: str, unimix: float, classes: int, uniform: bool) -> None:
    q, p = leaves(6, 3, classes)
    prior = None if uniform else p
    got = vaefast.categorical_kl(q, prior, unimix=unimix, reduction="none")
    expected = kl_of_theirs(q, prior, unimix)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    weights = torch.randn(expected.shape, generator=generator(5), dtype=torch.float64)
    trained = [q] if uniform else [q, p]
    for ours, other in zip(torch.autograd.grad(got, trained, weights), torch.autograd.grad(expected, trained, weights)):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 3, -1, -2])
def test_the_classes_lie_along_any_dimension(way: str, dim: int) -> None:
    q, p = leaves(3, 4, 5, 6)
    got = vaefast.categorical_kl(q, p, dim=dim, unimix=0.01, reduction="none")
    torch.testing.assert_close(got, kl_of_theirs(q.movedim(dim, -1), p.movedim(dim, -1), 0.01))
    z, kl = vaefast.sample_with_categorical_kl(q, p, dim=dim, unimix=0.01, reduction="none", generator=generator())
    assert z.shape == q.shape and torch.equal(z.sum(dim), torch.ones_like(kl))
    torch.testing.assert_close(kl, got)
    expected = vaefast.sample_categorical(q.movedim(dim, -1), unimix=0.01, generator=generator())
    assert torch.equal(z.movedim(dim, -1), expected)


def test_a_prior_that_broadcasts_gathers_its_gradient(way: str) -> None:
    q = leaves(4, 3, 5)[0]
    p = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(vaefast.categorical_kl(q, p, unimix=0.1), p)
    (expected,) = torch.autograd.grad(kl_of_theirs(q, p.expand(4, 3, 5), 0.1).sum(-1).mean(), p)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("free_bits_per", ["dim", "sample", "batch_dim"])
@pytest.mark.parametrize("free_bits", [0.0, 1.3])
@pytest.mark.parametrize("batch_dims", [1, 2])
def test_the_options(way: str, reduction: str, free_bits_per: str, free_bits: float, batch_dims: int) -> None:
    q, p = leaves(3, 4, 5, 6, scale=1.5)
    options = {"free_bits": free_bits, "free_bits_per": free_bits_per, "batch_dims": batch_dims}
    refused = free_bits and reduction in {"sample": ("none", "mean"), "batch_dim": ("none", "mean", "per_sample")}.get(
        free_bits_per, ()
    )
    if refused:
        with pytest.raises(ValueError, match="free_bits_per"):
            vaefast.categorical_kl(q, p, reduction=reduction, **options)
        return
    got = vaefast.categorical_kl(q, p, reduction=reduction, balance=0.7, **options)
    each = kl_of_theirs(q, p, 0.0).flatten(0, batch_dims - 1)
    batch, size = q.shape[:batch_dims], each.shape[0]
    if free_bits_per == "batch_dim" and free_bits:
        expected = each.mean(0).clamp(min=free_bits).sum() * (size if reduction == "sum" else 1)
    else:
        if free_bits and free_bits_per == "dim":
            each = each.clamp(min=free_bits)
        samples = each.flatten(1).sum(1)
        if free_bits and free_bits_per == "sample":
            samples = samples.clamp(min=free_bits)
        expected = {
            "none": each.unflatten(0, batch), "per_sample": samples.unflatten(0, batch), "batchmean": samples.mean(),
            "sum": samples.sum(), "mean": each.mean(),
        }[reduction]  # fmt: skip
    torch.testing.assert_close(got, expected)
    for leaf, share in ((q, 0.3), (p, 0.7)):
        ours = torch.autograd.grad(got.sum(), leaf, retain_graph=True)[0]
        other = torch.autograd.grad(expected.sum(), leaf, retain_graph=True)[0]
        torch.testing.assert_close(ours, share * other)


def dreamer_v3(recon: Tensor, x: Tensor, post: Tensor, prior: Tensor, squash: Callable[[Tensor], Tensor]) -> Tensor:
    """danijar/dreamerv3: rssm.py, RSSM.loss: dyn = sg(post).kl(prior), rep = post.kl(sg(prior)), each max(free, .);
    configs.yaml: unimix 0.01, free_nats 1.0, loss_scales dyn 1.0 and rep 0.1; outs.MSE of the decoder, summed."""

    def kl(q: Tensor, p: Tensor) -> Tensor:
        a, b = (torch.softmax(t, -1) * 0.99 + 0.01 / t.shape[-1] for t in (q, p))
        return (a * (a.log() - b.log())).sum((-1, -2))

    dyn = torch.clamp(kl(post.detach(), prior), min=1.0)
    rep = torch.clamp(kl(post, prior.detach()), min=1.0)
    rec = ((recon - squash(x)) ** 2).sum(-1)
    return (rec + 1.0 * dyn + 0.1 * rep).mean()


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("preset", ["dreamer_v3", "dreamer_v3_vectors"])
def test_dreamer_v3(preset: str, scale: float) -> None:
    """Some of the steps' KLs are below the free nat."""
    post, prior = leaves(4, 6, 8, 16, scale=scale)
    recon, x = leaves(4, 6, 10, seed=3, scale=5.0)
    terms = vaefast.categorical_elbo_terms(recon, x.detach(), post, prior, preset=preset)
    expected = dreamer_v3(recon, x.detach(), post, prior, symlog if preset.endswith("vectors") else lambda x: x)
    torch.testing.assert_close(terms.loss, expected)
    trained = [recon, post, prior]
    for got, other in zip(torch.autograd.grad(terms.loss, trained), torch.autograd.grad(expected, trained)):
        torch.testing.assert_close(got, other)


def test_a_preset_goes_with_its_latents() -> None:
    x, q = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5, 6)  # [B, T, ...]
    with pytest.raises(ValueError, match="categorical_elbo_terms"):
        vaefast.elbo_loss(x, x, x, x, preset="dreamer_v3")
    with pytest.raises(ValueError, match="gaussian latents"):
        vaefast.categorical_elbo_terms(x, x, q, preset="dreamer")
    given = vaefast.categorical_elbo_terms(x, x, q, q, preset="dreamer_v3", free_bits=0.0)
    assert given.kl.item() == 0


def test_the_elbo_of_its_terms() -> None:
    q, p = leaves(5, 2, 6)
    recon, x = leaves(5, 9, seed=1)
    terms = vaefast.categorical_elbo_terms(recon, x.detach(), q, p, likelihood="gaussian", beta=torch.tensor(0.5))
    kl = vaefast.categorical_kl(q, p)
    nll = vaefast.reconstruction_loss(recon, x.detach(), likelihood="gaussian")
    torch.testing.assert_close(terms.loss, nll + 0.5 * kl)
    with pytest.raises(ValueError, match="batch of 5"):
        vaefast.categorical_elbo_terms(recon, x.detach(), q[:4])


# -- samples


@pytest.mark.parametrize("unimix", UNIMIX[:3])
@pytest.mark.parametrize("shape", [(4, 3, 5), (300, 32, 32)])
def test_straight_through_is_theirs(way: str, unimix: float, shape: tuple[int, ...]) -> None:
    """With the same noise, whole tensors and those that are cut into blocks, the gradient of both of its outputs."""
    q, p = leaves(*shape)
    upstream = torch.randn(shape, generator=generator(9), dtype=torch.float64)
    z, kl = vaefast.sample_with_categorical_kl(q, p, unimix=unimix, generator=generator())
    assert torch.equal(z, vaefast.sample_categorical(q, unimix=unimix, generator=generator()))
    assert torch.equal(z.sum(-1), torch.ones(shape[:-1], dtype=torch.float64)) and ((z == 0) | (z == 1)).all()
    # one uniform a vector, by the inverse of the distribution function
    uniforms = torch.rand(shape[:-1], dtype=torch.float64, generator=generator())
    probs = theirs(q, unimix).probs
    assert torch.equal(z.argmax(-1), (probs.cumsum(-1) <= uniforms.unsqueeze(-1)).sum(-1))
    # OneHotCategoricalStraightThrough.rsample
    expected = z.detach() + probs - probs.detach(), kl_of_theirs(q, p, unimix).sum(-1).mean()
    for got, other in zip(
        torch.autograd.grad((z, kl), (q, p), (upstream, None)), torch.autograd.grad(expected, (q, p), (upstream, None))
    ):
        torch.testing.assert_close(got, other, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_gumbel_softmax_is_theirs(hard: bool, temperature: float) -> None:
    q = leaves(50, 7, dtype=torch.float32)[0]
    torch.manual_seed(3)
    got = vaefast.sample_categorical(q, temperature=temperature, straight_through=hard)
    torch.manual_seed(3)
    expected = F.gumbel_softmax(q, tau=temperature, hard=hard)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    if hard:
        assert ((got == 0) | (got == 1)).all()
    upstream = torch.randn(q.shape, generator=generator(4))
    (ours,), (other,) = torch.autograd.grad(got, q, upstream), torch.autograd.grad(expected, q, upstream)
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_the_relaxation_of_a_mixed_distribution() -> None:
    q = leaves(50, 7)[0]
    got = vaefast.sample_categorical(q, temperature=0.7, straight_through=False, unimix=0.2, generator=generator())
    gumbels = -torch.empty_like(q).exponential_(generator=generator()).log()
    torch.testing.assert_close(got, torch.softmax((mixed_logits(q, 0.2) + gumbels) / 0.7, -1))


def chi_squared(counts: Tensor, probs: Tensor) -> tuple[float, int]:
    """Over the classes of which five are expected at least."""
    expected = probs * counts.sum()
    seen = expected >= 5
    return float(((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum()), int(seen.sum()) - 1


# ten million take minutes
DRAWS = int(float(os.environ.get("VAEFAST_TEST_DRAWS", "2e5")))


@pytest.mark.parametrize("temperature", [None, 0.5])
@pytest.mark.parametrize("unimix", [0.0, 0.3])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_draws_have_their_probabilities(classes: int, unimix: float, temperature: float | None) -> None:
    logits = 2 * torch.randn(classes, generator=generator(classes))
    counts = torch.zeros(classes)
    chunk = max(1, int(3e6) // classes)
    rng = generator(11)
    draws = left = DRAWS // (10 if classes == 1000 else 1)
    while left > 0:
        rows = min(chunk, left)
        counts += vaefast.sample_categorical(
            logits.expand(rows, classes), unimix=unimix, temperature=temperature, generator=rng
        ).sum(0)
        left -= rows
    assert counts.sum() == draws
    statistic, degrees = chi_squared(counts.double(), theirs(logits.double(), unimix).probs)
    # 5 deviations above its mean
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_what_has_no_probability_is_never_drawn(way: str, temperature: float | None) -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]).expand(20_000, 5)
    drawn = vaefast.sample_categorical(logits, temperature=temperature, generator=generator()).sum(0)
    assert drawn[[0, 2, 4]].eq(0).all() and drawn[[1, 3]].gt(1000).all()
    if temperature is None:
        mix = vaefast.sample_categorical(logits, unimix=0.5, generator=generator()).sum(0)
        assert mix.gt(1000).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_uniform_numbers(dtype: torch.dtype) -> None:
    """Neither the least nor the largest of them draws a class that there is not, or that has no probability."""
    p = torch.softmax(torch.tensor([[-torch.inf, *torch.linspace(-30, 3, 60).tolist(), -torch.inf]], dtype=dtype), -1)
    for scale in (1.0, 1.0 - 2.0**-20, 0.7, 1.3):
        for u in (0.0, 1.0 - 2.0**-53):
            index = _categorical.drawn(p * scale, torch.full((1,), u, dtype=torch.float64)).argmax().item()
            assert index == (1 if u == 0 else 60)


def test_minus_infinity_in_the_kl(way: str) -> None:
    inf = torch.inf
    q = torch.tensor([[0.0, 1.0, -inf], [0.0, 1.0, -inf], [0.3, 1.0, -inf]], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([[0.0, 0.5, 2.0], [0.0, -inf, 2.0], [0.0, 1.0, -inf]], dtype=torch.float64, requires_grad=True)
    kl = vaefast.categorical_kl(q, p, reduction="none")
    torch.testing.assert_close(kl, D.kl_divergence(D.Categorical(logits=q), D.Categorical(logits=p)))
    assert kl[1] == inf
    shown = torch.tensor([True, False, True])
    for got, other in zip(
        torch.autograd.grad(vaefast.categorical_kl(q[shown], p[shown]), (q, p)),
        torch.autograd.grad(vaefast.categorical_kl(q[shown], p[shown], unimix=1e-13), (q, p)),
    ):
        torch.testing.assert_close(got, other, rtol=1e-6, atol=1e-10)
        assert got.isfinite().all()


def test_a_nan_stays_one(way: str) -> None:
    q = torch.zeros(3, 4)
    q[1, 2] = torch.nan
    z, kl = vaefast.sample_with_categorical_kl(q, torch.zeros(3, 4), reduction="none")
    assert kl.isnan().tolist() == [False, True, False]
    assert z.isnan().any(-1).tolist() == [False, True, False]


def test_samples_go_by_the_generator() -> None:
    q = leaves(40, 5, dtype=torch.float32)[0]
    first = vaefast.sample_categorical(q, generator=generator(1))
    assert torch.equal(first, vaefast.sample_categorical(q, generator=generator(1)))
    assert not torch.equal(first, vaefast.sample_categorical(q, generator=generator(2)))
    torch.manual_seed(1)
    assert torch.equal(first, vaefast.sample_categorical(q))
    no_gradient = vaefast.sample_categorical(q, straight_through=False, generator=generator(1))
    assert torch.equal(no_gradient, first) and not no_gradient.requires_grad


# -- dtypes, autograd, compilers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(way: str, dtype: torch.dtype) -> None:
    q, p = (t.detach().to(dtype).requires_grad_() for t in leaves(20, 4, 8, dtype=torch.float32))
    z, kl = vaefast.sample_with_categorical_kl(q, p, unimix=0.01, generator=generator())
    assert z.dtype == dtype and kl.dtype == torch.float32
    assert vaefast.categorical_kl(q, p, reduction="none").dtype == dtype
    upstream = torch.randn(q.shape, generator=generator(2)).to(dtype)
    got = torch.autograd.grad((z, kl), (q, p), (upstream, None))
    wide = [t.detach().double().requires_grad_() for t in (q, p)]
    z64, kl64 = vaefast.sample_with_categorical_kl(*wide, unimix=0.01, generator=generator())
    expected = torch.autograd.grad((z64, kl64), wide, (upstream.double(), None))
    torch.testing.assert_close(kl, kl64.float(), rtol=1e-6, atol=0)
    for ours, exactly in zip(got, expected):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, exactly.to(dtype))
    other = vaefast.categorical_kl(q, p.double(), reduction="none")
    assert other.dtype == torch.float64


@pytest.mark.parametrize("unimix", [0.0, 0.05])
@pytest.mark.parametrize("uniform", [False, True])
def test_derivatives_of_both_orders(way: str, unimix: float, uniform: bool) -> None:
    inputs = leaves(3, 4, scale=1.0)[: 1 if uniform else 2]

    def kl(*rows: Tensor) -> Tensor:
        return vaefast.categorical_kl(*rows, unimix=unimix, reduction="none")

    assert torch.autograd.gradcheck(kl, inputs)
    assert torch.autograd.gradgradcheck(kl, inputs)

    def through(q: Tensor) -> Tensor:
        """A function of the probabilities alone, in the sample's gradient."""
        z = vaefast.sample_categorical(q, unimix=unimix, generator=generator())
        (g,) = torch.autograd.grad((z * torch.arange(4.0)).sum(), q, create_graph=True)
        return g

    q = inputs[0]
    probs = theirs(q, unimix).probs
    (expected,) = torch.autograd.grad((probs * torch.arange(4.0)).sum(), q, create_graph=True)
    for ours, other in zip(
        torch.autograd.grad(through(q).square().sum(), q), torch.autograd.grad(expected.square().sum(), q)
    ):
        torch.testing.assert_close(ours, other)


def test_one_logits_tensor_on_both_sides(way: str) -> None:
    q = leaves(3, 4)[0]
    kl = vaefast.categorical_kl(q, q * 2)
    (got,) = torch.autograd.grad(kl, q, create_graph=True)
    (expected,) = torch.autograd.grad(kl_of_theirs(q, q * 2, 0.0).mean(), q, create_graph=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(g.square().sum(), q)[0] for g in (got, expected)))


def test_backward_twice(way: str) -> None:
    q, p = leaves(3, 4)
    z, kl = vaefast.sample_with_categorical_kl(q, p, generator=generator())
    loss = kl + (z * torch.arange(4.0)).sum()
    first = torch.autograd.grad(loss, (q, p), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (q, p))):
        assert torch.equal(a, b)


def test_transforms() -> None:
    q, p = (t.detach() for t in leaves(5, 3, 4))
    each = torch.func.vmap(lambda a, b: vaefast.categorical_kl(a, b, reduction="sum"))(q, p)
    torch.testing.assert_close(each, vaefast.categorical_kl(q, p, reduction="per_sample"))
    got = torch.func.grad(lambda a: vaefast.categorical_kl(a, p))(q)
    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(vaefast.categorical_kl(leaf, p), leaf)[0])
    drawn = torch.func.vmap(lambda a: vaefast.sample_categorical(a), randomness="different")(q)
    assert torch.equal(drawn.sum(-1), torch.ones(5, 3, dtype=torch.float64))


def test_one_graph() -> None:
    """What torch.compile makes of a step, with the noise of its own stream."""
    q, p = leaves(6, 4, 8, dtype=torch.float32)

    def step(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, kl = vaefast.sample_with_categorical_kl(q, p, unimix=0.01, free_bits=0.5, balance=0.8)
        soft = vaefast.sample_categorical(q, temperature=0.5)
        return z, kl, soft

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (z, kl, soft), (_, expected, _) = compiled(q, p), step(q, p)
    torch.testing.assert_close(kl, expected)
    assert torch.equal(z.sum(-1), torch.ones(6, 4))
    torch.testing.assert_close(soft.sum(-1), torch.ones(6, 4))
    for got, other in zip(torch.autograd.grad(kl, (q, p)), torch.autograd.grad(expected, (q, p))):
        torch.testing.assert_close(got, other)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (5, 4), (4,)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, requires_grad=True)
    z, kl = vaefast.sample_with_categorical_kl(q, reduction="sum")
    assert z.shape == shape and kl.shape == ()
    (z.sum() + kl).backward()
    assert q.grad is not None and q.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3).long()}, "logits must be float16"),
        ({"logits": torch.tensor(0.0)}, "0-d tensor"),
        ({"logits": torch.zeros(2, 0)}, "no class along dim=-1"),
        ({"prior_logits": torch.zeros(2, 4)}, "prior_logits of shape"),
        ({"prior_logits": 0.0}, "prior_logits must be a torch.Tensor"),
        ({"dim": 5}, "dim=5 is no dimension"),
        ({"dim": 0}, "dim is 0, which is one of the batch"),
        ({"dim": 1.0}, "dim must be an int"),
        ({"unimix": 1.5}, "unimix must be from 0"),
        ({"unimix": "a"}, "unimix must be a number"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"temperature": True}, "temperature must be None or a number"),
        ({"straight_through": 1}, "straight_through must be True or False"),
        ({"generator": 3}, "generator must be a torch.Generator"),
        ({"reduction": "median"}, "reduction must be one of"),
        ({"free_bits": -1.0}, "free_bits must be a finite number"),
        ({"balance": 2.0, "prior_logits": torch.zeros(3)}, "balance must be from 0"),
        ({"balance": 0.5}, "prior_logits is None"),
        ({"batch_dims": 3}, "batch_dims=3, but logits"),
        ({"batch_dims": 0}, "batch_dims must be at least 1"),
    ],
)
def test_what_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 3), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        vaefast.sample_with_categorical_kl(**arguments)  # type: ignore[arg-type]
