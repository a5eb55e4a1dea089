"""overwrite_recon: the gradient in the reconstruction's own memory. It is the same gradient, costs no buffer, and stops
whoever would read what is gone; where it cannot be done nothing is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import LIKELIHOOD_CASES, Data, posterior, training
from test_memory import SMALL, Work
from torch import Tensor

import vaefast
from vaefast.reference import LIKELIHOODS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(4, 7), (3, 1), (33, 64), (0, 5)]


def can(likelihood: str, dtype: torch.dtype) -> bool:
    """Not where backward recomputes, nor where a mixture's components have parameters beside their logit."""
    return dtype != torch.float16 and all(planes == 1 for planes in LIKELIHOODS[likelihood].planes.values())


class Decoded:
    """A decoder's results: what the loss may write over, made of leaves, and what the loss then gives these."""

    def __init__(self, data: Data, decode: Callable[[Tensor], Tensor] = lambda h: h * 1.0) -> None:
        self.leaves = data.leaves().recon
        self.recon = tuple(decode(h) for h in self.leaves)
        self.before = [r.detach().clone() for r in self.recon]

    def untouched(self) -> list[bool]:
        return [torch.equal(r, b) for r, b in zip(self.recon, self.before)]

    def gradients(self, loss: Tensor, **options: Any) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.leaves, **options))


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "per_sample", "batchmean"])
def test_the_gradient_is_the_same_and_stands_in_recon(
    native: str, likelihood: str, count: int, dtype: torch.dtype, reduction: str
) -> None:
    for shape in SHAPES:
        data = training(likelihood, count, shape, dtype).to(native)
        weight = torch.rand(shape, device=native) * (torch.rand(shape, device=native) > 0.3)
        found = []
        for overwrite in (False, True):
            d = Decoded(data)
            loss = vaefast.reconstruction_loss(
                d.recon, data.target, likelihood=likelihood, reduction=reduction, weight=weight,
                overwrite_recon=overwrite,
            )  # fmt: skip
            places = {r.data_ptr() for r in d.recon if r.numel()}
            written = overwrite and can(likelihood, dtype) and reduction != "none"
            assert all(d.untouched()) is (not written or not places)
            upstream = torch.full_like(loss, 3.0)
            grads = list(torch.autograd.grad(loss, d.recon, upstream, retain_graph=True))
            grads += torch.autograd.grad(loss, d.recon, upstream)
            last = {g.data_ptr() for g in grads[count:] if g.numel()}
            assert (last == places) is (written or not places)
            found.append([loss.detach(), *grads])
        assert_same(found[1], found[0])


@pytest.mark.parametrize("reduction", ["per_sample", "batchmean", "sum"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.5}, {"free_bits": 0.3}, {"preset": "pytorch_vae"}], ids=str)
def test_elbo(native: str, options: dict[str, Any], reduction: str) -> None:
    data = training("gaussian", 1, (5, 9)).to(native)
    found = []
    for overwrite in (False, True):
        d, p = Decoded(data), posterior((5, 3), device=native).leaves()
        criterion = vaefast.ELBOLoss("gaussian", reduction=reduction, overwrite_recon=overwrite, **options)
        loss = criterion(d.recon, data.target, p.mu, p.raw)
        assert all(d.untouched()) is not overwrite
        grads = torch.autograd.grad(loss, [*d.leaves, p.mu, p.raw], torch.full_like(loss, 1.5))
        found.append([loss.detach(), *grads])
    assert_same(found[1], found[0])
    assert "overwrite_recon=True" in repr(criterion)


def test_terms_apart(native: str) -> None:
    """Each of an ELBO's outputs can have its own gradient."""
    data = training("bernoulli", 1, (5, 9)).to(native)
    found = []
    for overwrite in (False, True):
        d, p = Decoded(data), posterior((5, 3), device=native).leaves()
        terms = vaefast.elbo_terms(d.recon, data.target, p.mu, p.raw, overwrite_recon=overwrite)
        upstream = [torch.tensor(u, device=native) for u in (0.5, 2.0, -1.0)]
        found.append(list(torch.autograd.grad(terms, [*d.leaves, p.mu, p.raw], upstream)))
    assert_same(found[1], found[0])


def halves(h: Tensor) -> tuple[Tensor, ...]:
    return (h * 1.0).chunk(2, 1)


def interleaved(h: Tensor) -> tuple[Tensor, ...]:
    whole = h * 1.0
    return whole[:, ::2], whole[:, 1::2]


def overlapping(h: Tensor) -> tuple[Tensor, ...]:
    whole = h * 1.0
    return whole[:, :6], whole[:, 1:7]


def twice(h: Tensor) -> tuple[Tensor, ...]:
    whole = (h * 1.0)[:, :6]
    return whole, whole


def expanded(h: Tensor) -> tuple[Tensor, ...]:
    whole = h * 1.0
    return whole[:, :1].expand(-1, 6), whole[:, 6:]


def windows(h: Tensor) -> tuple[Tensor, ...]:
    """Views whose own elements overlap."""
    whole = h * 1.0
    return whole.as_strided((2, 6), (3, 1)), whole.as_strided((2, 6), (3, 1), 24)


@pytest.mark.parametrize(
    ("split", "written"),
    [
        (halves, True),
        (interleaved, True),
        (overlapping, False),
        (twice, False),
        (expanded, False),
        (windows, False),
    ],
)
def test_parameters_that_share_memory(
    native: str, split: Callable[[Tensor], tuple[Tensor, ...]], written: bool
) -> None:
    """Parts of one result are written over where they are told to be apart."""
    h = torch.randn(4, 12, device=native)
    found = []
    for overwrite in (False, True):
        leaf = h.clone().requires_grad_()
        recon = split(leaf)
        before = [r.detach().clone() for r in recon]
        target = torch.full(recon[0].shape, 0.25, device=native)
        loss = vaefast.reconstruction_loss(recon, target, likelihood="gaussian", overwrite_recon=overwrite)
        changed = not all(torch.equal(r, b) for r, b in zip(recon, before))
        assert changed is (overwrite and written)
        found.append(list(torch.autograd.grad(loss, leaf)))
    assert_same(found[1], found[0])


def test_some_parameters(native: str) -> None:
    """A trained scale for all pixels, or one without gradient, stays; the mean is written over."""
    for logvar in (torch.zeros(1, requires_grad=True), torch.zeros(4, 7), torch.zeros(4, 1, requires_grad=True) * 1.0):
        data = training("gaussian", 1, (4, 7)).to(native)
        found = []
        for overwrite in (False, True):
            d, scale = Decoded(data), logvar.to(native)
            loss = vaefast.reconstruction_loss(
                (*d.recon, scale), data.target, likelihood="gaussian", overwrite_recon=overwrite
            )
            assert d.untouched() == [not overwrite]
            assert not scale.any()
            wanted = [*d.leaves, scale] if scale.requires_grad else d.leaves
            found.append(list(torch.autograd.grad(loss, wanted)))
        assert_same(found[1], found[0])


@pytest.mark.parametrize("likelihood", [name for name in LIKELIHOODS if LIKELIHOODS[name].required == 1])
def test_what_is_left_alone(native: str, likelihood: str) -> None:
    data = training(likelihood, 1, (4, 7)).to(native)
    options: dict[str, Any] = {"likelihood": likelihood, "overwrite_recon": True}

    leaf = data.leaves().recon[0]
    kept = leaf.detach().clone()
    vaefast.reconstruction_loss(leaf, data.target, **options).backward()
    vaefast.reconstruction_loss(leaf.view(leaf.shape), data.target, **options).backward()
    assert torch.equal(leaf, kept)  # a leaf is the user's, and so is a view of it

    d = Decoded(data)
    with torch.no_grad():
        vaefast.reconstruction_loss(d.recon, data.target, **options)
    vaefast.reconstruction_loss([r.detach() for r in d.recon], data.target, **options)
    assert all(d.untouched())  # nothing to write

    same = d.recon[0].detach()
    if not LIKELIHOODS[likelihood].planes:
        vaefast.reconstruction_loss(d.recon, same, **options)
        vaefast.reconstruction_loss(d.recon, data.target, weight=same, **options)
        vaefast.elbo_loss(d.recon, data.target, same, torch.zeros_like(same), **options)
        assert all(d.untouched())  # another argument's memory

    with vaefast.use_backend("reference"):
        vaefast.reconstruction_loss(d.recon, data.target, **options)
    assert all(d.untouched())


def test_torch_compile_stays_functional(native: str) -> None:
    data = training("bernoulli", 1, (4, 7)).to(native)

    def loss(h: Tensor, overwrite: bool) -> Tensor:
        return vaefast.reconstruction_loss(h * 1.0, data.target, overwrite_recon=overwrite)

    found = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = data.leaves().recon[0]
        found.append(list(torch.autograd.grad(f(leaf, True), leaf)))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("decode", [torch.sigmoid, torch.exp, torch.tanh], ids=["sigmoid", "exp", "tanh"])
def test_a_decoder_that_keeps_its_result_is_told(native: str, decode: Callable[[Tensor], Tensor]) -> None:
    data = training("gaussian", 1, (4, 7)).to(native)
    d = Decoded(data, decode)
    loss = vaefast.reconstruction_loss(d.recon, data.target, likelihood="gaussian", overwrite_recon=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        d.gradients(loss)


def test_who_changes_the_gradient_is_told(native: str) -> None:
    data = training("bernoulli", 1, (4, 7)).to(native)
    d = Decoded(data)
    loss = vaefast.reconstruction_loss(d.recon, data.target, overwrite_recon=True)
    d.recon[0].detach().clamp_(-1e-3, 1e-3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        d.gradients(loss)


def test_a_second_loss_over_the_same_recon_is_told(native: str) -> None:
    data = training("bernoulli", 1, (4, 7)).to(native)
    d = Decoded(data)
    losses = [vaefast.reconstruction_loss(d.recon, data.target, overwrite_recon=True) for _ in range(2)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        d.gradients(losses[0] + losses[1])


def test_a_loss_before_it_is_right(native: str) -> None:
    """Gradients of recon add up, whether or not they lie in its memory."""
    data = training("bernoulli", 1, (4, 7)).to(native)
    found = []
    for overwrite in (False, True):
        d = Decoded(data)
        other = (d.recon[0] * 0.5).sum()
        loss = vaefast.reconstruction_loss(d.recon, data.target, overwrite_recon=overwrite)
        found.append(d.gradients(loss + other))
    assert_same(found[1], found[0])


def test_no_second_derivative(native: str) -> None:
    data = training("bernoulli", 1, (4, 7), torch.float64).to(native)
    d, p = Decoded(data), posterior((4, 3), dtype=torch.float64, device=native).leaves()
    for loss in (
        vaefast.reconstruction_loss(d.recon, data.target, overwrite_recon=True),
        vaefast.elbo_loss([h * 1.0 for h in d.leaves], data.target, p.mu, p.raw, overwrite_recon=True),
    ):
        with pytest.raises(RuntimeError, match="pass overwrite_recon=False"):
            d.gradients(loss, create_graph=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(native: str, use_reentrant: bool) -> None:
    """A checkpoint around decoder and loss makes recon anew."""
    data = training("bernoulli", 1, (4, 7)).to(native)
    found = []
    for overwrite in (False, True):
        leaf = data.leaves().recon[0]

        def f(h: Tensor, overwrite: bool = overwrite) -> Tensor:
            return vaefast.reconstruction_loss(h * 1.0, data.target, overwrite_recon=overwrite)

        loss = torch.utils.checkpoint.checkpoint(f, leaf, use_reentrant=use_reentrant)
        found.append(list(torch.autograd.grad(loss, leaf)) if not use_reentrant else backward(loss, leaf))
    assert_same(found[1], found[0])


def backward(loss: Tensor, leaf: Tensor) -> list[Tensor]:
    loss.backward()
    assert leaf.grad is not None
    return [leaf.grad]


def test_a_checkpoint_around_the_loss_alone_is_told(native: str) -> None:
    data = training("bernoulli", 1, (4, 7)).to(native)
    d = Decoded(data)

    def f(recon: Tensor) -> Tensor:
        return vaefast.reconstruction_loss(recon, data.target, overwrite_recon=True)

    loss = torch.utils.checkpoint.checkpoint(f, d.recon[0], use_reentrant=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        d.gradients(loss)


def test_a_step_allocates_no_gradient(extension: object) -> None:
    layer, x = torch.nn.Linear(16, 4096), torch.rand(64, 4096)
    h, size = torch.randn(64, 16), 64 * 4096 * 4

    def step(overwrite: bool) -> Callable[[], Any]:
        def run() -> Any:
            loss = vaefast.reconstruction_loss(layer(h), x, overwrite_recon=overwrite)
            return torch.autograd.grad(loss, layer.weight)

        return run

    weights = 16 * 4096 * 4
    assert Work(step(True)).allocated <= size + weights + SMALL
    assert Work(step(False)).allocated >= 2 * size + weights


def test_it_is_a_bool(face: Any) -> None:
    x = torch.zeros(2, 3)
    for f in (
        lambda: face.reconstruction_loss(x, x, overwrite_recon="yes"),
        lambda: face.elbo_loss(x, x, x, x, overwrite_recon="yes"),
        lambda: vaefast.ELBOLoss(overwrite_recon="yes"),
    ):
        with pytest.raises(TypeError, match="overwrite_recon must be True or False, got 'yes'"):
            f()
