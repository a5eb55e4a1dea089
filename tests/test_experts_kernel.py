"""The kernel of a product of experts beside its formula in float64: sizes that fill no vector and no stretch, masks of
any shape, layouts, dtypes, what is infinite, threads; and who takes which way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from inputs import FLOATING, assert_same_bits, generator
from torch import Tensor

import vaefast
from vaefast import _experts, _native
from vaefast._engine import Experts

pytestmark = pytest.mark.isa

WIDE = torch.float64


@pytest.fixture(autouse=True)
def _kernels(extension: object) -> Iterator[None]:
    with vaefast.use_backend("native"):
        yield


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Means and log variances."""
    g = generator(seed)
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for _ in range(2)]


def there(*shape: int, seed: int = 5) -> Tensor:
    return torch.rand(shape, generator=generator(seed)) > 0.4


def formula(mus: Tensor, logvars: Tensor, mask: Tensor | None, prior: bool) -> tuple[Tensor, Tensor]:
    precision = torch.exp(-logvars)
    if mask is not None:
        mask = mask.view(*mask.shape, *(1,) * (mus.dim() - mask.dim())).expand(mus.shape)
        mus, precision = mus.where(mask, 0.0), precision.where(mask, 0.0)
    total = precision.sum(0) + prior
    some = total > 0
    mean = (precision * mus).sum(0) / total.where(some, 1.0)
    return mean.where(some, 0.0), (-torch.log(total.where(some, 1.0))).where(some, math.inf)


def compare(mus: Tensor, logvars: Tensor, mask: Tensor | None = None, prior: bool = True, most: float = 1e-6) -> None:
    found = _native.eager.experts(Experts(mus, logvars, mask, prior))
    wide = [t.detach().double().requires_grad_() for t in (mus, logvars)]
    exact = formula(*wide, mask, prior)
    ups = [torch.randn(exact[0].shape, generator=generator(9), dtype=WIDE).to(f.dtype) for f in found]
    expected = torch.autograd.grad(exact, wide, [u.double() for u in ups])
    gradients = torch.autograd.grad(found, (mus, logvars), ups)
    for f, e, like in zip((*found, *gradients), (*exact, *expected), (mus, logvars) * 2, strict=True):
        assert f.dtype == like.dtype and f.shape == e.shape
        own = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(f.dtype, 0.0)
        torch.testing.assert_close(f.double(), e, rtol=4 * most + own, atol=4 * most + own)


# at one, below, at and above the lanes of a vector, and of a stretch
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 300, 1023, 1024, 1025, 2055])
@pytest.mark.parametrize("prior", [True, False])
def test_any_number_of_columns(columns: int, prior: bool) -> None:
    compare(*drawn(3, 1, columns), prior=prior)
    compare(*drawn(3, columns), mask=there(3, columns), prior=prior)
    compare(*drawn(3, 5, columns), mask=there(3, 5), prior=prior)


@pytest.mark.parametrize("experts", [1, 2, 5, 100])
@pytest.mark.parametrize("prior", [True, False])
def test_any_number_of_experts(experts: int, prior: bool) -> None:
    compare(*drawn(experts, 4, 9), prior=prior)
    compare(*drawn(experts, 4, 9), mask=there(experts, 4), prior=prior)


@pytest.mark.parametrize(
    "shape", [(3,), (1,), (1, 5), (3, 1), (3, 5, 1), (3, 1, 70), (1, 1, 1, 2), (3, 5, 70, 2), (3, 5)]
)
@pytest.mark.parametrize("prior", [True, False])
def test_masks_of_any_shape(shape: tuple[int, ...], prior: bool) -> None:
    compare(*drawn(3, 5, 70, 2), mask=there(*shape), prior=prior)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_dtypes(dtype: torch.dtype, masked: bool) -> None:
    mask = there(3, 4) if masked else None
    compare(*drawn(3, 4, 9, dtype=dtype), mask=mask, most=1e-14 if dtype == WIDE else 1e-6)


@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_that_differ(other: torch.dtype) -> None:
    mus, logvars = drawn(3, 4, 9)
    compare(mus.detach().to(other).requires_grad_(), logvars)
    compare(mus, logvars.detach().to(other).requires_grad_())


def test_layouts() -> None:
    """Views of means, of log variances, of a mask, and a gradient that is expanded."""
    mus, logvars = drawn(3, 5, 14)
    for make in (
        lambda t: t.transpose(0, 1),
        lambda t: t[:, ::2, 1:],
        lambda t: t.chunk(2, 2)[1],
        lambda t: t[:, :1].expand(3, 6, 14),
        lambda t: t.unsqueeze(1).expand(3, 4, 5, 14),
    ):
        views = make(mus), make(logvars)
        for t in views:
            t.retain_grad()
        compare(*views)
        compare(*views, mask=there(views[0].shape[1], views[0].shape[0]).t())
    mu, _ = _native.eager.experts(Experts(mus, logvars, None, True))
    (g,) = torch.autograd.grad(mu.sum(), mus)
    wide = [t.detach().double().requires_grad_() for t in (mus, logvars)]
    exact = torch.autograd.grad(formula(*wide, None, True)[0].sum(), wide[0])[0]
    torch.testing.assert_close(g.double(), exact, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("masked", [True, False])
def test_gradients_that_are_not_asked_for(wanted: tuple[bool, bool], output: int, masked: bool) -> None:
    """Of one argument alone, from one result alone."""
    leaves = [t.detach().requires_grad_(yes) for t, yes in zip(drawn(3, 4, 50), wanted)]
    mask = there(3, 4) if masked else None
    found = _native.eager.experts(Experts(*leaves, mask, True))[output]
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    exact = formula(*wide, mask, True)[output]
    up = torch.randn(4, 50, generator=generator(9))
    (leaf,), (own,) = ([t for t in each if t.requires_grad] for each in (leaves, wide))
    if not exact.requires_grad:  # a log variance has nothing of the means
        assert not torch.autograd.grad(found, leaf, up)[0].any()
        return
    (g,) = torch.autograd.grad(found, leaf, up)
    torch.testing.assert_close(g.double(), torch.autograd.grad(exact, own, up.double())[0], rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("shape", [(2, 0, 4), (2, 3, 0), (2, 0)])
@pytest.mark.parametrize("masked", [True, False])
def test_nothing(shape: tuple[int, ...], masked: bool) -> None:
    mus, logvars = drawn(*shape)
    found = _native.eager.experts(Experts(mus, logvars, there(*shape[:2]) if masked else None, True))
    for t in found:
        assert t.shape == shape[1:]
    for g in torch.autograd.grad([t.sum() for t in found], (mus, logvars)):
        assert g.shape == shape


VALUES = (math.nan, math.inf, -math.inf, 3e38, -3e38, 130.0, -130.0, 0.5)


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, WIDE], ids=str)
def test_what_is_not_finite_is_as_pytorch_has_it(dtype: torch.dtype, masked: bool, prior: bool) -> None:
    """In log variances, two of them side by side and with a missing one, and in means."""
    pairs = torch.cartesian_prod(torch.tensor(VALUES, dtype=dtype), torch.tensor(VALUES, dtype=dtype)).T
    logvars = torch.stack((pairs[0], pairs[1].flip(0) if masked else pairs[1], pairs[1]))
    mask = torch.tensor([True, False, True]) if masked else None
    for mean in (0.7, math.inf, math.nan):
        mus = torch.tensor([0.3, -0.2, mean], dtype=dtype).unsqueeze(1).expand(3, pairs.shape[1]).contiguous()
        leaves = [mus.requires_grad_(), logvars.requires_grad_()]
        found = _native.eager.experts(Experts(*leaves, mask, prior))
        there_ = None if mask is None else mask.unsqueeze(1)
        exact = _experts.Product.apply(prior, there_, *leaves)
        most = {torch.float32: 1e-6, WIDE: 1e-14}[dtype]
        for f, e in zip(found, exact):
            torch.testing.assert_close(f, e, rtol=4 * most, atol=4 * most, equal_nan=True)
        ups = [torch.full_like(f, 0.5) for f in found]
        for f, e in zip(torch.autograd.grad(found, leaves, ups), torch.autograd.grad(exact, leaves, ups)):
            torch.testing.assert_close(f, e, rtol=4 * most, atol=4 * most, equal_nan=True)


def test_any_number_of_threads(set_threads: Callable[[int], None]) -> None:
    mus, logvars = drawn(5, 60, 333)
    mask = there(5, 60)

    def run() -> list[Tensor]:
        found = []
        for m in (mask, None):
            both = _native.eager.experts(Experts(mus, logvars, m, True))
            ups = [torch.randn(60, 333, generator=generator(n)) for n in (1, 2)]
            found += [*both, *torch.autograd.grad(both, (mus, logvars), ups)]
        return found

    assert_same_bits(run, set_threads)


def test_the_kernel_is_what_runs() -> None:
    """Through the public function, with a gradient and without; and not where transforms are to see the operations."""
    mus, logvars = drawn(3, 4, 9)
    mu, logvar = vaefast.product_of_experts(mus, logvars, there(3, 4))
    for t in (mu, logvar):
        assert "ExpertsNode" in type(t.grad_fn).__name__ or "ExpertsNode" in t.grad_fn.name()
    plain = vaefast.product_of_experts(mus.detach(), logvars.detach(), there(3, 4))
    for f, t in zip(plain, (mu, logvar)):
        assert torch.equal(f, t) and not f.requires_grad
    with pytest.raises(RuntimeError, match="transform"):
        torch.func.vmap(vaefast.product_of_experts, in_dims=1)(mus, logvars)


def test_it_keeps_its_inputs_alone() -> None:
    mus, logvars = drawn(3, 4, 9)
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vaefast.product_of_experts(mus, logvars)
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in (mus, logvars))


def test_a_batch_of_gradients() -> None:
    mus, logvars = drawn(3, 2, 4)
    mu, logvar = vaefast.product_of_experts(mus, logvars, there(3, 2))
    ups = torch.randn(6, 2, 4, generator=generator(3))
    found = torch.autograd.grad(
        (mu, logvar), (mus, logvars), (ups, ups.flip(0)), is_grads_batched=True, retain_graph=True
    )
    for k in range(6):
        each = torch.autograd.grad((mu, logvar), (mus, logvars), (ups[k], ups[5 - k]), retain_graph=True)
        for f, t in zip(found, each):
            torch.testing.assert_close(f[k], t)


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_gradient_can_be_differentiated(masked: bool, prior: bool) -> None:
    mask = torch.tensor([[True, False], [True, True], [False, True]]) if masked else None
    given = drawn(3, 2, 2, dtype=WIDE)

    def both(mus: Tensor, logvars: Tensor) -> Any:
        return _native.eager.experts(Experts(mus, logvars, mask, prior))

    assert torch.autograd.gradcheck(both, given)
    assert torch.autograd.gradgradcheck(both, given)
    for k in (0, 1):  # one result alone
        assert torch.autograd.gradgradcheck(lambda *t, k=k: both(*t)[k], given)


def test_wrong_calls() -> None:
    ops, t = torch.ops.vaefast, torch.randn(3, 2, 4)
    for mus, logvars in ((t, t[:2]), (t[:0], t[:0]), (t[0, 0], t[0, 0])):
        with pytest.raises(ValueError, match="experts of shape"):
            ops.experts(mus, logvars, None, True)
    for mus, logvars in ((t.int(), t), (t, t.int())):
        with pytest.raises(TypeError, match="experts of"):
            ops.experts(mus, logvars, None, True)
    with pytest.raises(TypeError, match="by bools"):
        ops.experts(t, t, torch.ones(3, 2), True)
    for mask in (there(2, 2), there(3, 2, 4, 1), there(3)[0]):
        with pytest.raises(ValueError, match="a mask of shape"):
            ops.experts(t, t, mask, True)
    with pytest.raises(ValueError, match="the mask has"):
        ops.experts_backward(t[0], None, t, t, None, True, [1])
    with pytest.raises(ValueError, match="any incoming"):
        ops.experts_backward(None, None, t, t, None, True, [1, 1])
    with pytest.raises(ValueError, match="a gradient of shape"):
        ops.experts_backward(t, None, t, t, None, True, [1, 1])
    with torch.no_grad():
        assert ops.experts_backward(t[0], t[0], t, t, None, True, [0, 0]) == []
