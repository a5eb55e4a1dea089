"""Several batch dimensions: each function gives what it gives for the batch flattened by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import training
from torch import Tensor

import vaefast
from vaefast.reference import LIKELIHOODS

B, T, D = 4, 5, 6
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "time first in memory": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "chunk": lambda t: torch.cat((t, t), -1).chunk(2, -1)[1],
}
PRIORS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": (),
    "full": ((B, T, D), (B, T, D)),
    "each step": ((T, D), (T, 1)),
    "each sequence": ((B, 1, D), (B, 1, 1)),
    "each dimension": ((D,), ()),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"free_bits": 0.3},
    {"free_bits": 2.0, "free_bits_per": "sample"},
    {"free_bits": 0.3, "free_bits_per": "batch_dim", "reduction": "sum"},
    {"capacity": 3.0},
    {"symmetric": True},
    {"prior_parameterization": "log_std"},
    {"weight": torch.arange(T).view(T, 1) < 3},
    {"weight": torch.linspace(0, 1, B).view(B, 1, 1), "free_bits": 1.0, "free_bits_per": "sample"},
]


def leaf(*shape: int, seed: int = 0, layout: str = "contiguous") -> Tensor:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return LAYOUTS[layout](t).detach().requires_grad_() if len(shape) == 3 else t.requires_grad_()


def by_hand(x: Any) -> Any:
    """[B, T, ...], or what broadcasts to three dimensions, as [B T, ...]."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        return x
    x = x if x.dim() > 2 else x[None]
    return x.expand(B, T, *x.shape[2:]).reshape(B * T, *x.shape[2:])


def restored(x: Tensor, reduction: str) -> Tensor:
    return x.unflatten(0, (B, T)) if reduction in ("none", "per_sample") else x


def assert_same(got: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-6)
    assert got.shape == expected.shape
    factors = torch.randn(got.shape, generator=torch.Generator().manual_seed(9), dtype=got.dtype)
    gradients = [torch.autograd.grad(x, inputs, factors, retain_graph=True) for x in (got, expected)]
    for a, e in zip(*gradients):
        torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o) or "plain")
@pytest.mark.parametrize("prior", list(PRIORS))
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("reduction", ["none", "per_sample", "batchmean", "sum", "mean"])
def test_kl(backend: str, reduction: str, layout: str, prior: str, options: dict[str, Any]) -> None:
    options = {"reduction": reduction, **options}
    if reduction in ("none", "mean") and ("capacity" in options or options.get("free_bits_per") == "sample"):
        pytest.skip("an option of whole samples, for sums of them")
    inputs = [leaf(B, T, D, seed=k, layout=layout) for k in range(2)]
    inputs += [leaf(*shape, seed=k + 2) for k, shape in enumerate(PRIORS[prior])]
    got = vaefast.gaussian_kl(*inputs, batch_dims=2, **options)
    flat = {name: by_hand(value) for name, value in options.items()}
    expected = vaefast.gaussian_kl(*map(by_hand, inputs), **flat)
    assert_same(got, restored(expected, options["reduction"]), inputs)


@pytest.mark.parametrize("estimator", ["analytic", "mc", "stl"])
@pytest.mark.parametrize("reduction", ["none", "per_sample", "batchmean"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_sample_with_kl(backend: str, layout: str, reduction: str, estimator: str) -> None:
    """The sample is the one that there is without, and the KL that of the flattened batch."""
    inputs = [leaf(B, T, D, seed=k, layout=layout) for k in range(2)]
    eps = torch.randn(B, T, D)
    z, kl = vaefast.sample_with_kl(*inputs, eps=eps, batch_dims=2, reduction=reduction, estimator=estimator)
    flat = vaefast.sample_with_kl(*map(by_hand, inputs), eps=by_hand(eps), reduction=reduction, estimator=estimator)
    assert_same(z, flat[0].unflatten(0, (B, T)), inputs)
    assert_same(kl, restored(flat[1], reduction), inputs)
    torch.manual_seed(3)
    drawn = vaefast.sample_with_kl(*inputs, batch_dims=2, reduction=reduction, estimator=estimator)[0]
    torch.manual_seed(3)
    if layout in ("contiguous", "time first in memory"):
        plain = vaefast.sample_with_kl(*inputs, estimator=estimator)[0]
        torch.testing.assert_close(drawn, plain, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["none", "per_sample", "batchmean", "sum", "mean"])
@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_reconstruction(backend: str, name: str, reduction: str) -> None:
    entry = LIKELIHOODS[name]
    data = training(name, len(entry.params), (B * T, 6))
    recon, x = data.recon, data.target
    recon = [p.detach().unflatten(0, (B, T)).requires_grad_() for p in recon]
    x = x.unflatten(0, (B, T))
    chosen, flat = vaefast.Likelihood(name), vaefast.Likelihood(name)
    if "dim" in entry.options:
        chosen = vaefast.Likelihood(name, dim=2)
    weight = torch.linspace(0, 2, B).view(B, 1, *[1] * (recon[0].dim() - 2 - bool(entry.planes)))
    given: dict[str, Any] = {"reduction": reduction}
    got = vaefast.reconstruction_loss(tuple(recon), x, likelihood=chosen, weight=weight, batch_dims=2, **given)
    full = weight.expand(B, T, *weight.shape[2:]).flatten(0, 1)
    hand = tuple(p.flatten(0, 1) for p in recon)
    expected = vaefast.reconstruction_loss(hand, x.flatten(0, 1), likelihood=flat, weight=full, **given)
    assert_same(got, restored(expected, reduction), recon)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": torch.tensor(0.5)},
        {"free_bits": 1.0, "free_bits_per": "sample", "balance": 0.8},
        {"likelihood": vaefast.Likelihood("gaussian_optimal", per_sample=True)},
        {"preset": "dreamer"},
        {"preset": "pytorch_vae"},
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["per_sample", "batchmean", "sum"])
def test_elbo(backend: str, reduction: str, options: dict[str, Any]) -> None:
    options = {"likelihood": "gaussian", **options, "reduction": reduction}
    positive = options.get("preset") == "dreamer"
    inputs = [leaf(B, T, D, seed=k) for k in range(4)]
    recon, x = leaf(B, T, 3, 7, seed=5), torch.randn(B, T, 3, 7)
    mu, raw, pm, praw = (t.detach().exp().requires_grad_() if positive and k % 2 else t for k, t in enumerate(inputs))
    given = (recon, x, mu, raw, pm, praw)
    got = vaefast.elbo_terms(*given, batch_dims=2, **options)
    expected = vaefast.elbo_terms(*(t.flatten(0, 1) for t in given), **options)
    for a, e in zip(got, expected):
        torch.testing.assert_close(a, restored(e, reduction), rtol=2e-6, atol=1e-6)
    leaves = [recon, mu, raw, pm, praw]
    assert_same(got.loss, restored(expected.loss, reduction), leaves)
    if "preset" not in options:
        criterion = vaefast.ELBOLoss(batch_dims=2, **options)
        torch.testing.assert_close(criterion(*given), got.loss)


def test_dreamers_steps_have_their_own_free_bits(backend: str) -> None:
    """60 steps whose KLs are under the floor are 60 floors' mean, not one floor under their sum."""
    mu, std = torch.full((3, 20, 8), 0.01), torch.ones(3, 20, 8)
    recon = torch.zeros(3, 20, 5)
    prior = torch.zeros(3, 20, 8).requires_grad_(), torch.ones(3, 20, 8)
    terms = vaefast.elbo_terms(
        recon, recon, mu, std, *prior, preset="dreamer", prior_parameterization="std", batch_dims=2
    )
    assert terms.kl.item() == pytest.approx(1.0)


@pytest.mark.parametrize("reduction", ["per_sample", "batchmean", "sum"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_multi_tensor(backend: str, layout: str, reduction: str) -> None:
    mus, raws, pms, plvs = ([leaf(B, T, d, seed=d + k, layout=layout) for d in (3, 6)] for k in range(4))
    inputs = [*mus, *raws, *pms, *plvs]
    got = vaefast.multi_tensor_gaussian_kl(mus, raws, pms, plvs, reduction=reduction, batch_dims=2)
    flat = ([t.flatten(0, 1) for t in list_] for list_ in (mus, raws, pms, plvs))
    expected = vaefast.multi_tensor_gaussian_kl(*flat, reduction=reduction)
    assert_same(got, restored(expected, reduction), inputs)
    samples, kl = vaefast.multi_tensor_sample_with_kl(mus, raws, reduction=reduction, batch_dims=2)
    assert [z.shape for z in samples] == [mu.shape for mu in mus]
    plain = vaefast.multi_tensor_gaussian_kl(mus, raws, reduction=reduction, batch_dims=2)
    torch.testing.assert_close(kl, plain)


@pytest.mark.parametrize("reduction", ["none", "per_sample", "batchmean", "sum", "mean"])
def test_packed(backend: str, reduction: str) -> None:
    moments, other = (leaf(B, T, 2 * D, seed=k) for k in range(2))
    q, p = (vaefast.DiagonalGaussian(t, dim=-1) for t in (moments, other))
    hand = [vaefast.DiagonalGaussian(t.flatten(0, 1), dim=-1) for t in (moments, other)]
    got = q.kl(p, reduction=reduction, batch_dims=2)
    assert_same(got, restored(hand[0].kl(hand[1], reduction=reduction), reduction), [moments, other])
    z, kl = q.sample_with_kl(reduction=reduction, batch_dims=2)
    assert z.shape == (B, T, D)
    torch.testing.assert_close(kl, q.kl(reduction=reduction, batch_dims=2))
    point = vaefast.DiagonalGaussian(moments, dim=-1, deterministic=True)
    assert point.kl(reduction=reduction, batch_dims=2).shape == kl.shape


# the dimensions in an order of memory, of which the first two are the batch
ORDERS = list(itertools.permutations(range(3)))


def ordered(order: tuple[int, ...], last: int = D, seed: int = 0) -> Tensor:
    shape = (B, T, last)
    t = torch.randn([shape[d] for d in order], generator=torch.Generator().manual_seed(seed))
    return t.permute([order.index(d) for d in range(3)])


def drawn(f: Callable[[], Any]) -> Any:
    torch.manual_seed(3)
    return f()


def alone(mu: Tensor, raw: Tensor, moments: Tensor, **prior: Any) -> list[Tensor]:
    z, _ = vaefast.sample_with_kl(mu, raw, **prior)
    return [z, vaefast.DiagonalGaussian(moments, dim=-1).sample()]


def in_batches(mu: Tensor, raw: Tensor, moments: Tensor, **prior: Any) -> list[Tensor]:
    z, _ = vaefast.sample_with_kl(mu, raw, **prior, batch_dims=2)
    return [z, vaefast.DiagonalGaussian(moments, dim=-1).sample_with_kl(batch_dims=2)[0]]


@pytest.mark.parametrize("prior", [{}, {"prior_mu": torch.zeros((), dtype=torch.float64)}], ids=["", "wide"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_noise_of_a_sample_is_that_of_its_memory(
    native: str, order: tuple[int, ...], prior: dict[str, Any]
) -> None:
    """Whatever dimensions are the batch, and however those of the batch lie among the others."""
    inputs = ordered(order), ordered(order, seed=1), ordered(order, 2 * D, seed=2)
    expected, got = (drawn(lambda f=f: f(*inputs, **prior)) for f in (alone, in_batches))
    torch.testing.assert_close(got, expected)


def test_and_so_it_is_compiled(native: str) -> None:
    inputs = ordered((0, 2, 1)), ordered((0, 2, 1), seed=1), ordered((0, 2, 1), 2 * D, seed=2)
    compiled = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (alone, in_batches))
    expected, got = (drawn(lambda f=f: f(*inputs)) for f in compiled)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("orders", list(itertools.combinations(ORDERS, 2)), ids=str)
def test_the_noise_of_several_is_that_of_their_memory(native: str, orders: tuple[tuple[int, ...], ...]) -> None:
    mus, raws = ([ordered(order, d, seed=k) for d, order in zip((3, 6), orders)] for k in (1, 2))
    expected, _ = drawn(lambda: vaefast.multi_tensor_sample_with_kl(mus, raws))
    for reduction in ("per_sample", "batchmean"):
        options = {"reduction": reduction, "batch_dims": 2}
        got, kl = drawn(lambda options=options: vaefast.multi_tensor_sample_with_kl(mus, raws, **options))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(kl, vaefast.multi_tensor_gaussian_kl(mus, raws, **options))


def test_three_dimensions_and_all(backend: str) -> None:
    mu, logvar = (torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(k)) for k in range(2))
    each = vaefast.gaussian_kl(mu, logvar, reduction="none")
    for dims in (1, 2, 3, 4):
        found = vaefast.gaussian_kl(mu, logvar, reduction="per_sample", batch_dims=dims)
        assert found.shape == mu.shape[:dims]
        torch.testing.assert_close(found.sum(), each.sum())


def test_empty_batches(backend: str) -> None:
    mu = torch.zeros(3, 0, 4)
    assert vaefast.gaussian_kl(mu, mu, reduction="per_sample", batch_dims=2).shape == (3, 0)
    assert vaefast.gaussian_kl(mu, mu, reduction="sum", batch_dims=2) == 0


def test_compiles_in_one_graph() -> None:
    mu, logvar = leaf(B, T, D), leaf(B, T, D, seed=1)

    def f(mu: Tensor, logvar: Tensor) -> Tensor:
        return vaefast.gaussian_kl(mu, logvar, free_bits=1.0, free_bits_per="sample", batch_dims=2)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(mu, logvar), f(mu, logvar))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda t: vaefast.gaussian_kl(t, t, batch_dims=0), ValueError, "batch_dims must be at least 1.*0"),
        (lambda t: vaefast.gaussian_kl(t, t, batch_dims=True), TypeError, "batch_dims must be an int, got True"),
        (lambda t: vaefast.gaussian_kl(t, t, batch_dims=4), ValueError, r"batch_dims=4, but mu of shape \(4, 5, 6\)"),
        (lambda t: vaefast.gaussian_kl(t, t[:, :2], batch_dims=2), ValueError, r"logvar has shape \(4, 2, 6\)"),
        (lambda t: vaefast.reconstruction_loss(t, t, batch_dims=4), ValueError, "batch_dims=4, but recon"),
        (
            lambda t: vaefast.elbo_loss(t, t.sigmoid(), t[:, :2], t[:, :2], batch_dims=2),
            ValueError,
            r"recon has a batch of \(4, 5\) but mu has \(4, 2\) \(batch_dims=2\)",
        ),
        (
            lambda t: vaefast.reconstruction_loss(t, t[:, 0], likelihood="categorical", batch_dims=2),
            ValueError,
            "dim of .*categorical.* is 1, which is one of the batch",
        ),
        (
            lambda t: vaefast.multi_tensor_gaussian_kl([t, t[:, :2]], [t, t[:, :2]], batch_dims=2),
            ValueError,
            r"one batch \(batch_dims=2\).*\(4, 5\) and \(4, 2\)",
        ),
        (lambda t: vaefast.DiagonalGaussian(t, dim=2).kl(batch_dims=3), ValueError, "dim is 2"),
    ],
)
def test_errors(backend: str, call: Callable[[Tensor], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(torch.zeros(B, T, D))
