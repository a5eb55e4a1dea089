"""The kernel of categorical latents against formulas in float64: numbers of classes and of sites that fill no vector,
layouts, dtypes, what is infinite or NaN, and what is far apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inputs import FLOATING, REDUCTIONS, assert_same_bits, generator
from torch import Tensor

import vaefast
from vaefast import _categorical

pytestmark = pytest.mark.isa

# at one, below, at and above the lanes of a vector and of two, and more than a block holds
CLASSES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 256, 257, 1000, 2049, 5000)


@pytest.fixture(autouse=True)
def _kernels(extension: object) -> object:
    with vaefast.use_backend("native"):
        yield


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 2.0) -> list[Tensor]:
    rng = generator(seed)
    return [(scale * torch.randn(shape, generator=rng)).to(dtype).requires_grad_() for _ in range(2)]


def exactly(
    q: Tensor, p: Tensor | None, dim: int, unimix: float, uniforms: Tensor, dz: Tensor, dkl: Tensor
) -> tuple[Tensor, ...]:
    """Sample, KL of each site and the gradients in q and, if it is one, in p, all of float64 by autograd."""
    wide = [t.detach().double().movedim(dim, -1).requires_grad_() for t in (q, p) if t is not None]
    k = q.shape[dim]
    log_q, *log_p = (torch.log((1 - unimix) * torch.softmax(t, -1) + unimix / k) for t in wide)
    kl = (log_q.exp() * (log_q - (log_p[0] if log_p else -torch.tensor(float(k)).double().log()))).sum(-1)
    sums = log_q.exp().cumsum(-1)
    index = (sums <= uniforms.unsqueeze(-1) * sums[..., -1:]).sum(-1).clamp(max=k - 1)
    z = torch.nn.functional.one_hot(index, k)
    value = (log_q.exp() * dz.double().movedim(dim, -1)).sum() + (kl * dkl.double()).sum()
    grads = torch.autograd.grad(value, wide)
    return z.movedim(-1, dim), kl, *(g.movedim(-1, dim) for g in grads)


def compare(
    q: Tensor, p: Tensor | None, dim: int = -1, unimix: float = 0.01, most: float = 2e-6, seed: int = 3
) -> None:
    dim %= q.dim()
    sites = q.shape[:dim] + q.shape[dim + 1 :]
    rng = generator(seed)
    dz, dkl = torch.randn(q.shape, generator=rng).to(q.dtype), torch.randn(sites, generator=rng)
    uniforms = torch.rand(sites, dtype=torch.float64, generator=generator(4))
    options = {"dim": dim, "unimix": unimix, "reduction": "none", "batch_dims": 1}
    z, kl = vaefast.sample_with_categorical_kl(q, p, generator=generator(4), **options)  # type: ignore[arg-type]
    assert z.shape == q.shape and z.dtype == q.dtype and kl.shape == sites
    trained = [t for t in (q, p) if t is not None]
    got = torch.autograd.grad((z, kl), trained, (dz, dkl.to(kl.dtype)))
    expected_z, expected_kl, *expected = exactly(q, p, dim, unimix, uniforms, dz, dkl.to(kl.dtype))
    # a uniform number may fall between two sums that are rounded differently
    assert (z != expected_z).any(dim).float().mean() < 1e-2
    assert torch.equal(z.sum(dim), torch.ones(sites, dtype=z.dtype)) and ((z == 0) | (z == 1)).all()
    torch.testing.assert_close(kl.double(), expected_kl, rtol=10 * most, atol=most)
    for ours, other, leaf in zip(got, expected, trained):
        assert ours.dtype == leaf.dtype
        torch.testing.assert_close(ours.double(), other, rtol=10 * most, atol=most)


@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.9])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("classes", CLASSES)
def test_any_number_of_classes(classes: int, uniform: bool, unimix: float) -> None:
    q, p = drawn(5, 7, classes)
    compare(q, None if uniform else p, unimix=unimix)


@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.3])
def test_gradients_of_many_sites_to_a_few_roundings(unimix: float) -> None:
    # among them are sites of a large KL, where q's probability of a class is a hundred times p's
    q, p = drawn(4096, 32, scale=1.0)
    kl = vaefast.categorical_kl(q, p, unimix=unimix, reduction="none")
    got = torch.autograd.grad(kl.sum(), (q, p))
    zeros, ones = torch.zeros_like(q), torch.ones(4096)
    _, expected_kl, *expected = exactly(q, p, -1, unimix, ones.double() / 2, zeros, ones)
    torch.testing.assert_close(kl.double(), expected_kl, rtol=1e-6, atol=0)
    for ours, other in zip(got, expected):
        assert (ours - other).abs().max() < 8 * 2.0**-24 * other.abs().max()


@pytest.mark.parametrize("sites", [1, 2, 15, 16, 17, 31, 33, 100])
@pytest.mark.parametrize("classes", [3, 32, 100])
def test_any_number_of_sites(sites: int, classes: int) -> None:
    compare(*drawn(sites, classes))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("classes", [3, 33, 300])
def test_any_layout(dim: int, dtype: torch.dtype, classes: int) -> None:
    """Classes in the middle, and views: of every second one, of a larger tensor, of one transposed, and expanded."""
    shape = [3, 4, 5]
    shape.insert(dim, classes)
    most = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    q, p = drawn(*shape, dtype=dtype)
    compare(q, p, dim, most=most)
    strided = torch.randn(3, *(2 * n for n in shape[1:]), generator=generator(1)).to(dtype)[:, ::2, ::2, ::2]
    compare(strided.requires_grad_(), p, dim, most=most)
    turned = torch.randn(shape[::-1], generator=generator(2)).to(dtype).permute(3, 2, 1, 0)
    compare(turned.requires_grad_(), q.detach()[:1].expand(shape).requires_grad_(), dim, most=most)


def test_what_comes_down_may_be_expanded() -> None:
    q, p = drawn(6, 5, 33)
    z, kl = vaefast.sample_with_categorical_kl(q, p, unimix=0.1, reduction="none", generator=generator())
    got = torch.autograd.grad(z.sum() + kl.sum(), (q, p))
    _, total = vaefast.sample_with_categorical_kl(q, p, unimix=0.1, reduction="sum", generator=generator())
    for a, b in zip(got, torch.autograd.grad(total, (q, p))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # a sum of probabilities has no gradient


@pytest.mark.parametrize("balance", [None, 0.8])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_reduction(reduction: str, balance: float | None) -> None:
    q, p = drawn(6, 5, 4, 33)
    kl = vaefast.categorical_kl(q, p, unimix=0.1, reduction=reduction, balance=balance)
    each = _categorical.plain_balanced(0.1, balance, *(t.detach().double().requires_grad_() for t in (q, p)))
    expected = {
        "none": each, "per_sample": each.sum((1, 2)), "sum": each.sum(), "mean": each.mean(),
        "batchmean": each.sum() / 6,
    }[reduction]  # fmt: skip
    torch.testing.assert_close(kl.double(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("classes", [5, 33, 300, 3000])
@pytest.mark.parametrize("unimix", [0.0, 0.1])
def test_impossible_classes(classes: int, unimix: float) -> None:
    """Of q alone, of both, and a whole lane of others beside them."""
    q, p = (t.detach() for t in drawn(40, classes))
    q[::2, 1::3] = -torch.inf
    p[::4, 1::6] = -torch.inf
    q.requires_grad_()
    p.requires_grad_()
    z, kl = vaefast.sample_with_categorical_kl(q, p, unimix=unimix, reduction="none", generator=generator())
    share = [(1 - unimix) * torch.softmax(t.detach().double(), -1) + unimix / classes for t in (q, p)]
    expected = torch.where(share[0] == 0, 0.0, share[0] * (share[0] / share[1]).log()).sum(-1)
    torch.testing.assert_close(kl.double(), expected, rtol=5e-6, atol=1e-6)
    if unimix == 0:
        assert not z[q == -torch.inf].any()
    for g in torch.autograd.grad((z, kl), (q, p), (torch.randn(z.shape, generator=generator(1)), torch.ones(40))):
        assert g.isfinite().all()


def test_infinite_where_p_alone_has_nothing() -> None:
    q, p = torch.zeros(40, 33), torch.zeros(40, 33)
    p[3, 5] = -torch.inf
    kl = vaefast.categorical_kl(q, p, reduction="none")
    assert kl[3] == torch.inf and kl.isinf().sum() == 1
    mixed = vaefast.categorical_kl(q, p, unimix=0.1, reduction="none")
    assert mixed.isfinite().all() and mixed[3] > 0 and mixed.count_nonzero() == 1


@pytest.mark.parametrize("classes", [4, 40, 400])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_stays_in_its_site(classes: int, bad: float) -> None:
    q, p = (t.detach() for t in drawn(50, classes))
    q[7, 2], p[9, 3] = bad, bad
    q.requires_grad_()
    z, kl = vaefast.sample_with_categorical_kl(q, p, unimix=0.1, reduction="none", generator=generator())
    assert kl.isnan().nonzero().flatten().tolist() == [7, 9]
    assert z.isnan().any(-1).nonzero().flatten().tolist() == [7]
    (g,) = torch.autograd.grad((z, kl), q, (torch.ones_like(z), torch.ones_like(kl)))
    assert g.isnan().any(-1).nonzero().flatten().tolist() == [7, 9]


@pytest.mark.parametrize("unimix", [0.0, 0.05])
@pytest.mark.parametrize("classes", [6, 50, 500])
@pytest.mark.parametrize("apart", [1e-6, 1e-3, 1e-1, 10.0, 200.0])
def test_near_and_far(apart: float, classes: int, unimix: float) -> None:
    """The KL, and its gradients relative to their size, where q and p are next to each other and far apart."""
    base = torch.randn(20, classes, generator=generator(1))
    q = (base + apart * torch.randn(20, classes, generator=generator(2))).requires_grad_()
    p = base.clone().requires_grad_()
    kl = vaefast.categorical_kl(q, p, unimix=unimix, reduction="none")
    got = torch.autograd.grad(kl.sum(), (q, p))
    wide = [t.detach().double().requires_grad_() for t in (q, p)]
    exact = _categorical.plain_kl(unimix, *wide)
    torch.testing.assert_close(kl.double(), exact, rtol=1e-4 if apart < 1e-5 else 4e-6, atol=0.0)
    least = 1e-6 if apart > 1 else 0.0  # what is left of 1 - s
    for ours, other in zip(got, torch.autograd.grad(exact.sum(), wide)):
        assert (ours - other).abs().max() <= 4e-6 * other.abs().max() + least


def test_any_number_of_threads(set_threads: Callable[[int], None]) -> None:
    q, p = drawn(300, 32, 32)

    def run() -> list[Tensor]:
        z, kl = vaefast.sample_with_categorical_kl(q, p, unimix=0.01, generator=generator())
        return [z, kl, *torch.autograd.grad((z, kl), (q, p), (q.detach(), None))]

    assert_same_bits(run, set_threads)


def test_wrong_calls() -> None:
    q, rest = torch.randn(3, 4), (-1, 0.0, "none", None, True)
    op = torch.ops.vaefast.categorical
    with pytest.raises(ValueError, match="logits have shape"):
        op(None, q, q[:2], *rest)
    with pytest.raises(ValueError, match="uniforms are float64"):
        op(torch.rand(3), q, None, *rest)
    with pytest.raises(ValueError, match="no classes along dim 2"):
        op(None, q, None, 2, *rest[1:])
    with pytest.raises(ValueError, match="unimix 1"):
        op(None, q, None, -1, 1.0, *rest[2:])
    with pytest.raises(ValueError, match="no draws"):
        op(None, q, None, -1, 0.0, "per_draw", None, True)
    with pytest.raises(ValueError, match="without any incoming gradient"):
        torch.ops.vaefast.categorical_backward(None, None, q, None, -1, 0.0, 0, None, [1, 0])
    with pytest.raises(ValueError, match="mask"):
        torch.ops.vaefast.categorical_backward(q, None, q, None, -1, 0.0, 0, None, [1, 1])
