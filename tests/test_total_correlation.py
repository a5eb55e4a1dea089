"""Total correlation against the formulas in float64, its weights against all batches of a small data set."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import require_native
from test_priors import peak
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Independent, Normal

import vaefast
from vaefast import _pairwise
from vaefast.disentanglement import ESTIMATORS

WIDE = torch.float64
N = 1000


def drawn(seed: int, b: int, d: int, dtype: torch.dtype = torch.float32, std: float = 0.7) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    mu, logvar = torch.randn(b, d, generator=g), torch.randn(b, d, generator=g) * 0.5 + 2 * math.log(std)
    z = mu + torch.exp(0.5 * logvar) * torch.randn(b, d, generator=g)
    return [t.to(dtype) for t in (z, mu, logvar)]


def log_weights(b: int, n: int, estimator: str, published: bool) -> Tensor:
    """As the paper has them, or as the published code writes them."""
    if estimator == "mws":
        return torch.full((b, b), -math.log(n * b), dtype=WIDE)
    m = b - 1
    w = torch.full((b, b), 1 / m, dtype=WIDE)
    other = (n - m) / (n * m)
    if published:
        w.view(-1)[:: m + 1] = 1 / n
        w.view(-1)[1 :: m + 1] = other
        w[m - 1, 0] = other
    else:
        for i in range(b):
            w[i, i], w[i, (i + 1) % b] = 1 / n, other
    return w.log()


def dense(z: Tensor, mu: Tensor, logvar: Tensor, n: int, estimator: str, published: bool = False) -> list[Tensor]:
    """Mutual information, total correlation, dimension-wise KL, from a [B, B, D] tensor."""
    b = len(z)
    q = Normal(mu, torch.exp(0.5 * logvar), validate_args=False)
    each, w = q.log_prob(z.unsqueeze(1)), log_weights(b, n, estimator, published)
    joint = torch.logsumexp(each.sum(2) + w, 1)
    marginals = torch.logsumexp(each + w.unsqueeze(2), 1).sum(1)
    own, prior = q.log_prob(z).sum(1), Normal(0.0, 1.0).log_prob(z).sum(1)
    return [(own - joint).mean(), (joint - marginals).mean(), (marginals - prior).mean()]


def with_gradients(f: Callable[..., Any], arguments: list[Tensor]) -> list[Tensor]:
    """The three terms, and the gradients of a sum that tells them apart."""
    leaves = [t.detach().clone().requires_grad_() for t in arguments]
    terms = f(*leaves)
    total = terms[0] + 3 * terms[1] - 2 * terms[2]
    return [*(t.detach() for t in terms), *torch.autograd.grad(total, leaves)]


def assert_same(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for n, (a, b) in enumerate(zip(found, expected)):
        error = (a.double() - b).abs() / b.abs().clamp(min=1)
        assert float(error.max()) <= bound, (n, float(error.max()))


@pytest.fixture(params=["few", "kernels", "blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the size: all pairs at once, by kernels, or block by block in PyTorch."""
    monkeypatch.setattr(_pairwise, "FEW", 1 << 30 if request.param == "few" else 0)
    if request.param == "kernels":
        require_native()
    with vaefast.use_backend("native" if request.param == "kernels" else "reference"):
        yield


EVERY = [("mws", False), ("mss", False), ("mss", True)]


@pytest.mark.parametrize(("estimator", "published"), EVERY)
@pytest.mark.parametrize("size", [(2, 1), (3, 5), (16, 10), (67, 3), (130, 33), (300, 9)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (WIDE, 1e-12)])
def test_terms_and_gradients(
    size: tuple[int, int], estimator: str, published: bool, dtype: torch.dtype, bound: float, way: None
) -> None:
    arguments = drawn(1, *size, dtype)

    def ours(*leaves: Tensor) -> vaefast.TCTerms:
        return vaefast.total_correlation(*leaves, N, estimator=estimator, published_weights=published)

    found = with_gradients(ours, arguments)
    wide = [t.double() for t in arguments]
    expected = with_gradients(lambda *x: dense(*x, N, estimator, published), wide)
    assert_same(found, expected, bound)
    assert found[0].dtype == dtype


@pytest.mark.isa
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("size", [(16, 10), (130, 33)], ids=str)
def test_on_a_device(size: tuple[int, int], estimator: str, device: str) -> None:
    arguments = drawn(1, *size)
    found = with_gradients(
        lambda *x: vaefast.total_correlation(*x, N, estimator=estimator), [t.to(device) for t in arguments]
    )
    expected = with_gradients(lambda *x: dense(*x, N, estimator), [t.double() for t in arguments])
    assert_same([t.cpu() for t in found], expected, 1e-5)


def ways() -> list[tuple[str, list[Tensor]]]:
    z, mu, logvar = drawn(2, 48, 6)
    return [
        ("one sample", drawn(2, 1, 6)),
        ("narrow", drawn(3, 48, 6, std=1e-3)),
        ("very narrow", drawn(3, 48, 6, std=1e-6)),
        ("wide", drawn(3, 48, 6, std=1e4)),
        ("far from the origin", [z + 100, mu + 100, logvar]),
        ("far from each other", [100 * z, 100 * mu, logvar + 2 * math.log(100)]),
        ("far from its posterior", [z + 20, mu, logvar]),
        ("collapsed", [z, 0 * mu, 0 * logvar]),
        ("many latents", drawn(5, 20, 700)),
    ]


@pytest.mark.parametrize("case", ways(), ids=lambda case: case[0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_extremes(case: tuple[str, list[Tensor]], estimator: str, way: None) -> None:
    """Each gradient is held to 1e-5 of the largest of its kind, or of 1."""
    name, arguments = case
    if name == "one sample" and estimator == "mss":
        return
    found = with_gradients(lambda *x: vaefast.total_correlation(*x, N, estimator=estimator), arguments)
    expected = with_gradients(lambda *x: dense(*x, N, estimator), [t.double() for t in arguments])
    for a, b in zip(found, expected):
        assert float((a.double() - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize(("published", "unbiased"), [(False, True), (True, False)])
def test_stratified_weights_are_without_bias(published: bool, unbiased: bool) -> None:
    """Over all batches of three of five data, the sum for a sample of the first is its density under all five."""
    n, b = 5, 3
    density = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=WIDE)  # q(z | x_j) at one z
    weights = _pairwise.stratified(b, n, published, torch.device("cpu")).matrix(torch.zeros(b, 1, dtype=WIDE)).exp()
    for place in range(b):
        sums = []
        for others in itertools.permutations(range(1, n), b - 1):
            rows = [*others[:place], 0, *others[place:]]
            sums.append(weights[place] @ density[rows])
        assert math.isclose(torch.stack(sums).mean(), density.mean(), rel_tol=1e-12) == unbiased or place == 0


@pytest.mark.parametrize("b", [2, 3, 7])
@pytest.mark.parametrize(("estimator", "published"), EVERY)
def test_weights(b: int, estimator: str, published: bool) -> None:
    """All of them, of the published code too, bit by bit of its strides."""
    like = torch.zeros(b, 1, dtype=WIDE)
    found = _pairwise.minibatch(b, N) if estimator == "mws" else _pairwise.stratified(b, N, published, like.device)
    torch.testing.assert_close(found.matrix(like), log_weights(b, N, estimator, published), rtol=1e-14, atol=0.0)


def test_the_three_are_the_kl_at_the_sample() -> None:
    z, mu, logvar = drawn(6, 40, 5)
    q, prior = Normal(mu, torch.exp(0.5 * logvar)), Independent(Normal(0.3 * torch.ones(5), 2.0), 1)
    expected = (q.log_prob(z).sum(1) - prior.log_prob(z)).mean()
    found = vaefast.total_correlation(z, mu, logvar, N, prior=prior)
    torch.testing.assert_close(sum(found), expected)
    mixture = vaefast.priors.GaussianMixturePrior(3, 5)
    vaefast.total_correlation(z, mu, logvar, N, prior=mixture).dimension_kl.backward()
    assert mixture.mus.grad is not None and mixture.mus.grad.abs().sum() > 0


def test_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = drawn(7, 60, 8)
    monkeypatch.setattr(_pairwise, "FEW", 0)
    whole = with_gradients(lambda *x: vaefast.total_correlation(*x, N, estimator="mss"), arguments)
    monkeypatch.setattr(_pairwise, "BLOCK", 500)
    monkeypatch.setattr("vaefast._mixtures.BLOCK", 500)
    monkeypatch.setattr("vaefast._mixtures.KEPT", 0)
    with vaefast.use_backend("reference"):
        again = with_gradients(lambda *x: vaefast.total_correlation(*x, N, estimator="mss"), arguments)
    assert_same(again, [t.double() for t in whole], 1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(estimator: str, way: None) -> None:
    leaves = [t.requires_grad_() for t in drawn(8, 6, 3, WIDE)]

    def terms(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(vaefast.total_correlation(*x, N, estimator=estimator))

    assert gradcheck(terms, leaves, check_batched_grad=True) and gradgradcheck(terms, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, way: None) -> None:
    arguments = drawn(9, 50, 6, dtype)
    found = with_gradients(lambda *x: vaefast.total_correlation(*x, N), arguments)
    assert found[0].dtype == torch.float32 and all(t.dtype == dtype for t in found[3:])
    expected = with_gradients(lambda *x: dense(*x, N, "mws"), [t.double() for t in arguments])
    assert_same(found[:3], expected[:3], 1e-5)
    assert_same(found[3:], expected[3:], 2 * torch.finfo(dtype).eps)


def test_shapes_parameterizations_and_strides(way: None) -> None:
    z, mu, logvar = drawn(10, 12, 6)
    expected = vaefast.total_correlation(z, mu, logvar, N)
    shaped = [t.view(12, 2, 3) for t in (z, mu, logvar)]
    strided = [t.t().contiguous().t() for t in (z, mu, logvar)]
    for given in (shaped, strided):
        torch.testing.assert_close(tuple(vaefast.total_correlation(*given, N)), tuple(expected))
    as_std = vaefast.total_correlation(z, mu, torch.exp(0.5 * logvar), N, parameterization="std")
    torch.testing.assert_close(tuple(as_std), tuple(expected))


def test_only_what_is_trained_has_gradients() -> None:
    z, mu, logvar = drawn(11, 12, 6)
    mu.requires_grad_()
    (grad,) = torch.autograd.grad(vaefast.total_correlation(z, mu, logvar, N).total_correlation, mu)
    leaves = [t.detach().clone().requires_grad_() for t in (z, mu, logvar)]
    assert torch.equal(grad, torch.autograd.grad(vaefast.total_correlation(*leaves, N).total_correlation, leaves)[1])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiled_transformed_and_exported(estimator: str) -> None:
    arguments = drawn(12, 20, 4)

    def ours(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(vaefast.total_correlation(*x, N, estimator=estimator))

    expected = with_gradients(ours, arguments)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(with_gradients(compiled, arguments), [t.double() for t in expected], 1e-6)
    jacobian = torch.func.jacrev(lambda z: ours(z, *arguments[1:])[1])(arguments[0])
    own = arguments[0].clone().requires_grad_()
    torch.testing.assert_close(jacobian, torch.autograd.grad(ours(own, *arguments[1:])[1], own)[0])
    columns, logs = ([], []) if estimator == "mws" else _pairwise.stratified(20, N, False, own.device)[1:]
    leaves = [t.requires_grad_() for t in arguments]
    torch.library.opcheck(
        torch.ops.vaefast.aggregate_posterior.default, (*leaves, True, -3.0, list(columns), list(logs))
    )


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2, 3), 9), {}, ValueError, "mu has shape"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 2), 9), {}, ValueError, "logvar has shape"),
        ((torch.zeros(()), torch.zeros(()), torch.zeros(()), 9), {}, ValueError, r"z must be \[B, ...\]"),
        ((*[torch.zeros(0, 3)] * 3, 9), {}, ValueError, "at least one sample"),
        ((*[torch.zeros(2, 3)] * 3, 9.5), {}, TypeError, "dataset_size must be an int"),
        ((*[torch.zeros(2, 3)] * 3, 0), {}, ValueError, "dataset_size must be at least 1"),
        ((*[torch.zeros(2, 3)] * 3, 1), {"estimator": "mss"}, ValueError, "less than the batch of 2"),
        ((*[torch.zeros(1, 3)] * 3, 9), {"estimator": "mss"}, ValueError, "z has one; use 'mws'"),
        ((*[torch.zeros(2, 3)] * 3, 9), {"estimator": "nonesuch"}, ValueError, "estimator must be one of"),
        ((*[torch.zeros(2, 3)] * 3, 9), {"published_weights": 1}, TypeError, "published_weights must be True"),
        ((*[torch.zeros(2, 3)] * 3, 9), {"prior": 0.0}, TypeError, "prior must have a method log_prob"),
        ((*[torch.zeros(2, 3).long()] * 3, 9), {}, TypeError, "z must be float16"),
    ],
)
def test_refusals(arguments: Any, options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        vaefast.total_correlation(*arguments, **options)


def test_beta_tcvae_loss() -> None:
    z, mu, logvar = (t.requires_grad_() for t in drawn(13, 10, 4))
    recon, x = torch.randn(10, 20, requires_grad=True), torch.rand(10, 20)
    nll = vaefast.reconstruction_loss(recon, x)
    mi, tc, dimension_kl = vaefast.total_correlation(z, mu, logvar, N, estimator="mss")
    beta = torch.tensor(6.0)
    found = vaefast.beta_tcvae_loss(recon, x, z, mu, logvar, N, alpha=2.0, beta=beta, gamma=0.5, estimator="mss")
    torch.testing.assert_close(found, nll + 2 * mi + 6 * tc + 0.5 * dimension_kl)
    found.backward()
    assert all(t.grad is not None for t in (recon,))
    whole = vaefast.beta_tcvae_loss(recon, x, z, mu, logvar, N, beta=1.0)
    kl = (Normal(mu, torch.exp(0.5 * logvar)).log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(1).mean()
    torch.testing.assert_close(whole, nll + kl)
    with pytest.raises(ValueError, match="recon has a batch of"):
        vaefast.beta_tcvae_loss(recon[:5], x[:5], z, mu, logvar, N)
    with pytest.raises(TypeError, match="beta must be a float"):
        vaefast.beta_tcvae_loss(recon, x, z, mu, logvar, N, beta="6")  # type: ignore[arg-type]


def test_memory() -> None:
    """At B 1,024, D 64 under 24 MB, where one [B, B, D] tensor takes 268 MB; it grows with B alone."""
    arguments = drawn(14, 1024, 64)
    leaves = [t.requires_grad_() for t in arguments]

    def step() -> None:
        sum(vaefast.total_correlation(*leaves, N)).backward()  # type: ignore[union-attr]

    step()
    for t in leaves:
        t.grad = None
    assert peak(step) < 24e6


@pytest.mark.isa
def test_threads_leave_every_bit() -> None:
    """What kernels add up, they add up in an order of their own."""
    require_native()
    given = _pairwise.Marginals(*drawn(15, 700, 5), _pairwise.stratified(700, N, False, torch.device("cpu")), True)
    assert given.kernels is not None
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            marginals = given.forward()
            found.append([marginals, *given.backward(marginals, torch.ones(700))])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_kernels_refuse_what_they_do_not_take() -> None:
    require_native()
    x = torch.zeros(3, 4)
    for wrong in (torch.zeros(3, 5), torch.zeros(4, 3).t(), x.double(), x.int()):
        with pytest.raises(ValueError, match="marginals take contiguous tensors"):
            torch.ops.vaefast.marginals_forward(x, wrong, x, x, [], [])
    with pytest.raises(ValueError, match="no columns or two"):
        torch.ops.vaefast.marginals_forward(x, x, x, x, [x[0]], [x[0]])
    assert torch.ops.vaefast.marginals_forward(x[:0], x[:0], x[:0], x[:0], [], []).shape == (0, 4)
    meta = [t.to("meta") for t in (x, x, x, x)]
    assert [t.shape for t in torch.ops.vaefast.marginals_backward(x[0], x, *meta, [], [])] == [(3, 4)] * 3
