"""The PyTorch engine's own forward and backward: blocks, backward passes again, noise, what a compiler sees."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from inputs import LIKELIHOOD_CASES, assert_within, generator, nll_of, training
from torch import Tensor
from torch.nn import functional as F

import vaefast
from vaefast import _closed, reference
from vaefast.likelihoods import LIKELIHOODS


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = generator(0)
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("reduction", ["sum", "batchmean", "per_sample"])
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
def test_blocks_are_the_textbook(reduction: str, transposed: bool) -> None:
    """Sample, KL and loss of so many elements that they go through block by block, against float64."""
    rows, columns = 24, -(-2 * _closed.BLOCK // 24) + 5
    mu, logvar, recon = (t.detach() for t in leaves(*[(rows, columns)] * 3))
    if transposed:
        mu, logvar, recon = (t.t().contiguous().t() for t in (mu, logvar, recon))
    x = torch.rand(rows, columns, generator=generator(1))
    eps = torch.randn(rows, columns, generator=generator(2))
    weights = torch.linspace(1, 2, rows) if reduction == "per_sample" else torch.tensor(1.5)
    ours = [t.clone().requires_grad_() for t in (mu, logvar, recon)]
    z = reference.reparameterize(ours[0], ours[1], eps=eps)
    loss = reference.elbo_loss(ours[2], x, ours[0], ours[1], beta=0.3, reduction=reduction)
    found = torch.autograd.grad(z.sum() + (weights * loss).sum(), ours)
    m, lv, r = (t.double().requires_grad_() for t in (mu, logvar, recon))
    nll = F.binary_cross_entropy_with_logits(r, x.double(), reduction="none").sum(1)
    rows_of = nll + 0.3 * 0.5 * (m**2 + lv.exp() - 1 - lv).sum(1)
    exact = {"sum": rows_of.sum(), "batchmean": rows_of.mean(), "per_sample": rows_of}[reduction]
    expected = torch.autograd.grad((m + (lv / 2).exp() * eps.double()).sum() + (weights * exact).sum(), (m, lv, r))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed forms of few numbers, too, and theirs alone."""
    monkeypatch.setattr(_closed, "BLOCK", 1 << 12)
    for name, entry in LIKELIHOODS.items():
        monkeypatch.setitem(LIKELIHOODS, name, replace(entry, operator=None))


CLOSED = [case for case in LIKELIHOOD_CASES if LIKELIHOODS[case[0]].gradients is not None]


@pytest.mark.parametrize("broadcast", [False, True], ids=["full", "broadcast"])
@pytest.mark.parametrize(("likelihood", "count"), CLOSED)
def test_closed_forms_block_by_block(likelihood: str, count: int, broadcast: bool, small_blocks: None) -> None:
    """As many numbers as go through in blocks of rows; further parameters that are the same for all rows."""
    shape = (24, 700)
    data = training(likelihood, count, shape, shapes=[shape, *[shape[1:] if broadcast else shape] * (count - 1)])
    ours, wide = data.leaves(), data.to(torch.float64).leaves()
    rows = reference.reconstruction_loss(ours.recon, ours.target, likelihood=likelihood, reduction="per_sample")
    total = reference.reconstruction_loss(ours.recon, ours.target, likelihood=likelihood, reduction="sum")
    exact = nll_of(likelihood, wide)
    torch.testing.assert_close(rows.double(), exact.flatten(1).sum(1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(total.double(), exact.sum(), rtol=1e-6, atol=1e-5)
    found = torch.autograd.grad(total, ours.recon)
    # of a sum over rows that may cancel
    for a, e in zip(found, torch.autograd.grad(exact.sum(), wide.recon)):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("likelihood", "count"), CLOSED)
def test_elements_block_by_block(likelihood: str, count: int, small_blocks: None) -> None:
    """Values that stay elements, of as many numbers as go through in blocks."""
    data = training(likelihood, count, (24, 700))
    ours, wide = data.leaves(), data.to(torch.float64).leaves()
    found = reference.reconstruction_loss(ours.recon, ours.target, likelihood=likelihood, reduction="none")
    exact = nll_of(likelihood, wide)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-6)
    upstream = torch.linspace(-1, 1, exact.numel(), dtype=torch.float64).view(exact.shape)
    gradients = torch.autograd.grad(found, ours.recon, upstream.float())
    for a, e in zip(gradients, torch.autograd.grad(exact, wide.recon, upstream)):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("prior", ["numbers", "one", "each"])
def test_kls_element_by_element(prior: str, small_blocks: None) -> None:
    """The same of a KL, whose prior is trained: one number for all, or of each element its own."""
    mu, raw, pm, plv = leaves((24, 700), (24, 700), *[() if prior == "one" else (24, 700)] * 2)
    given = [mu, raw] if prior == "numbers" else [mu, raw, pm, plv]
    wide = [t.detach().double().requires_grad_() for t in given]
    found = reference.gaussian_kl(*given, parameterization="log_std", reduction="none")
    m, lv, n, lvp = wide[0], 2 * wide[1], *(wide[2:] or (0.0, torch.zeros((), dtype=torch.float64)))
    exact = 0.5 * (torch.exp(lv - lvp) - 1 - (lv - lvp) + (m - n) ** 2 * torch.exp(-lvp))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-6)
    for a, e in zip(torch.autograd.grad(found.sum(), given), torch.autograd.grad(exact.sum(), wide)):
        torch.testing.assert_close(a.double(), e, rtol=2e-5, atol=2e-6)


OPERATORS = [case for case in LIKELIHOOD_CASES if LIKELIHOODS[case[0]].operator is not None]


@pytest.mark.parametrize("reduction", ["none", "per_sample", "batchmean", "sum", "mean"])
@pytest.mark.parametrize(("likelihood", "count"), OPERATORS)
def test_few_numbers_by_pytorchs_operator(likelihood: str, count: int, reduction: str) -> None:
    entry, chosen = LIKELIHOODS[likelihood], vaefast.Likelihood(likelihood)
    data = training(likelihood, count, (4, 9))
    ours, wide = data.leaves(), data.to(torch.float64).leaves()
    assert entry.operator is not None and entry.operator(ours.target, *ours.recon, **chosen.options) is not None
    found = reference.reconstruction_loss(ours.recon, ours.target, likelihood=likelihood, reduction=reduction)
    each = nll_of(likelihood, wide)
    rows = each.flatten(1).sum(1)
    exact = {"none": each, "per_sample": rows, "batchmean": rows.mean(), "sum": rows.sum(), "mean": each.mean()}
    assert_within(found, exact[reduction], 2e-6)
    slopes = torch.autograd.grad(exact[reduction].sum(), wide.recon)
    for f, e in zip(torch.autograd.grad(found.sum(), ours.recon), slopes):
        assert_within(f, e, 2e-6, "gradient")


@pytest.mark.parametrize(("likelihood", "count"), OPERATORS)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -100.0, -7.0, 0.5, 1e9])
@pytest.mark.parametrize("where", ["data", "parameter"])
def test_what_operators_refuse(likelihood: str, count: int, odd: float, where: str) -> None:
    """The formula's value and gradient at what PyTorch's operator raises for, or takes for something else."""
    data = training(likelihood, count, (4, 9))
    (data.target if where == "data" else data.recon[0]).view(-1)[3] = odd
    ours, wide = data.leaves(), data.to(torch.float64).leaves()
    found = reference.reconstruction_loss(ours.recon, ours.target, likelihood=likelihood, reduction="none")
    exact = nll_of(likelihood, wide)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-6, equal_nan=True)
    for f, e in zip(torch.autograd.grad(found.sum(), ours.recon), torch.autograd.grad(exact.sum(), wide.recon)):
        torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize(("likelihood", "count"), CLOSED)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -7.0])
def test_what_is_odd_is_its_own_rows_alone(likelihood: str, count: int, odd: float, small_blocks: None) -> None:
    """One datum outside the closed forms' reach in one block: there, and in no other row, the plain formula's value."""
    data = training(likelihood, count, (24, 700))
    clean = data.leaves()
    expected = torch.autograd.grad(
        reference.reconstruction_loss(clean.recon, clean.target, likelihood=likelihood, reduction="sum"), clean.recon
    )
    data.target[5].view(-1)[3] = odd
    ours = data.leaves()
    rows = reference.reconstruction_loss(ours.recon, ours.target, likelihood=likelihood, reduction="per_sample")
    plain = nll_of(likelihood, data.to(torch.float64)).flatten(1).sum(1)
    torch.testing.assert_close(rows.double(), plain, rtol=1e-6, atol=1e-5, equal_nan=True)
    found = torch.autograd.grad(rows.sum(), ours.recon)
    others = [k for k in range(24) if k != 5]
    for a, e in zip(found, expected):
        torch.testing.assert_close(a[others], e[others], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("log_scale", [-2.0, -3.0, -5.0, -5.5])
def test_sharp_bins(log_scale: float) -> None:
    """Half a bin of up to eight scales: what e^-|c| is off by is multiplied by e^8."""
    bins, g = 17, generator(3)
    x = torch.randint(1, bins - 1, (4000,), generator=g) / (bins - 1)
    given = [torch.rand(4000, generator=g).requires_grad_(), torch.full((4000,), log_scale).requires_grad_()]
    likelihood = vaefast.Likelihood("discretized_logistic", bins=bins, low=0.0, high=1.0, floor=-7.0)
    found = reference.reconstruction_loss(given, x, likelihood=likelihood, reduction="none")
    mean, scale = (t.detach().double().requires_grad_() for t in given)
    c, k = (x.double() - mean) * torch.exp(-scale), torch.exp(-scale) / (bins - 1) / 2
    exact = F.softplus(c - k) + F.softplus(-c - k) - torch.log(-torch.expm1(-2 * k))
    assert_within(found, exact, 2e-6)
    slopes = torch.autograd.grad(exact.sum(), (mean, scale))
    for f, e in zip(torch.autograd.grad(found.sum(), given), slopes):
        assert_within(f, e, 2e-6, "gradient")


def test_a_second_backward_is_the_first() -> None:
    """What forward kept is used up by the first pass; the next computes it again, bit for bit."""
    recon, mu, logvar = leaves((6, 50), (6, 8), (6, 8))
    loss = reference.elbo_loss(recon, torch.rand(6, 50, generator=generator(1)), mu, logvar)
    first = torch.autograd.grad(loss, (recon, mu, logvar), retain_graph=True)
    copies = [t.clone() for t in first]
    again = torch.autograd.grad(loss, (recon, mu, logvar))
    for a, b, c in zip(first, copies, again):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_noise_is_torchs_unless_philox_is_asked_for(extension: object) -> None:
    zero = torch.zeros(5, 7)
    torch.manual_seed(1)
    expected = torch.randn(5, 7)
    torch.manual_seed(1)
    assert torch.equal(reference.reparameterize(zero, zero), expected)
    torch.manual_seed(1)
    kernels = vaefast.reparameterize(zero, zero)
    torch.manual_seed(1)
    torch.testing.assert_close(reference.reparameterize(zero, zero, noise="philox"), kernels, rtol=0, atol=1e-5)
    assert not torch.equal(kernels, expected)


@pytest.mark.parametrize("center", [0.0, 0.34, -0.41, 0.4, -0.45, 1.0])
@pytest.mark.parametrize("count", [1, 20, 2560])
@pytest.mark.parametrize("name", ["logvar", "std", "var"])
def test_a_kls_sum_has_its_digits_where_terms_cancel(name: str, count: int, center: float) -> None:
    """On either side of where float32's sums of e^x - 1 and of x are no longer enough."""
    logvar = center + 0.1 * torch.randn(50, count, generator=generator(1))
    raw = {"logvar": logvar, "std": torch.exp(logvar / 2), "var": torch.exp(logvar)}[name]
    for row in raw:
        wide = row.double()
        exact = {"logvar": torch.expm1(wide) - wide, "std": wide**2 - 1 - 2 * wide.log(), "var": wide - 1 - wide.log()}
        found = reference.gaussian_kl(torch.zeros(count), row, parameterization=name, reduction="sum")
        torch.testing.assert_close(found.double(), 0.5 * exact[name].sum(), rtol=1.5e-6, atol=1e-15)


@pytest.mark.parametrize("rest", [0, 1, 15, 16, 17])
@pytest.mark.parametrize("trained", [False, True], ids=["fixed", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_noise_that_is_drawn_in_blocks_is_torchs(rest: int, trained: bool, dtype: torch.dtype) -> None:
    zero = torch.zeros(2 * _closed.BLOCK + rest, dtype=dtype)
    mu, logvar = (zero.clone().requires_grad_(trained) for _ in range(2))
    torch.manual_seed(1)
    eps, after = torch.randn(zero.shape, dtype=dtype), torch.get_rng_state()
    for generated in (None, generator(1)):
        torch.manual_seed(1)
        z = reference.reparameterize(mu, logvar, generator=generated)
        assert torch.equal(z, eps)
        state = torch.get_rng_state() if generated is None else generated.get_state()
        assert torch.equal(state, after)
        if trained:
            assert torch.equal(torch.autograd.grad(z, logvar, eps)[0], 0.5 * eps * eps)


def test_a_number_for_many_is_sampled_as_many() -> None:
    """Parameters that are expanded to a block's size and beyond."""
    shape = (2, _closed.BLOCK + 3)
    mu, std = torch.tensor(2.0), torch.tensor(3.0, requires_grad=True)
    torch.manual_seed(1)
    eps = torch.randn(shape)
    for leaf in (std, std.detach()):
        torch.manual_seed(1)
        z = reference.reparameterize(mu.expand(shape), leaf.expand(shape), parameterization="std")
        torch.testing.assert_close(z, 2 + 3 * eps, rtol=1e-6, atol=1e-6)
        if leaf.requires_grad:
            torch.testing.assert_close(torch.autograd.grad(z.sum(), leaf)[0], eps.sum(), rtol=1e-4, atol=1e-3)


def test_a_compiled_step_is_few_kernels() -> None:
    """Sample, KL and loss: Inductor makes one kernel of each pass, at most three."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    recon, mu, logvar = leaves((64, 784), (64, 20), (64, 20))
    x = torch.rand(64, 784, generator=generator(1))

    def losses(recon: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        return reference.reparameterize(mu, logvar), reference.elbo_loss(recon, x, mu, logvar, beta=0.5)

    step = torch.compile(losses, fullgraph=True)

    def train() -> None:
        z, loss = step(recon, mu, logvar)
        (z.sum() + loss).backward()

    _, passes = run_and_get_code(train)
    counts = [len(re.findall(r"^cpp_fused\w* = async_compile", code, re.MULTILINE)) for code in passes]
    assert len(counts) == 2
    assert all(1 <= n <= 3 for n in counts), counts
