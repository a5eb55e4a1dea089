"""Mixtures: where their planes lie, how many channels a target has, which classes there are. What holds for every
likelihood is tested with the others, at dimension 1 and the default number of channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from exact import nll as exact_nll
from inputs import FLOATING, Data, assert_within, generator, gradients, posterior
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

import vaefast
from vaefast import Likelihood
from vaefast.reference import LIKELIHOODS

# the sites' shape without their planes; the last has more sites than a tile
SITES = [(2,), (5, 7), (2, 3, 5), (3, 150)]
DIMS = pytest.mark.parametrize("dim", [1, -1])


def place(t: Tensor, dim: int) -> Tensor:
    """A tensor whose planes come last, with them at dim and that layout in memory."""
    return t.movedim(-1, dim).contiguous()


def mixture(
    channels: int, sites: Sequence[int], dim: int, components: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[Likelihood, Data]:
    likelihood = Likelihood("discretized_logistic_mixture", channels=channels, dim=dim)
    planes = components * LIKELIHOODS[likelihood.name].planes[channels]
    g = generator(channels)
    recon = 0.5 * torch.randn(*sites, planes, generator=g, dtype=torch.float64)
    x = torch.randint(256, (*sites, channels), generator=g, dtype=torch.float64) / 127.5 - 1
    return likelihood, Data((place(recon.to(dtype), dim),), place(x.to(dtype), dim))


def classes(sites: Sequence[int], K: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Likelihood, Data]:
    g = generator(K)
    logits = 3 * torch.randn(*sites, K, generator=g, dtype=torch.float64)
    return Likelihood("categorical", dim=dim), Data(
        (place(logits.to(dtype), dim),), torch.randint(K, tuple(sites), generator=g)
    )


def check(likelihood: Likelihood, data: Data, exact: Data, tolerance: float, exact_loss: Tensor | None = None) -> None:
    """Every reduction, and the gradients, against float64."""
    for reduction in ("none", "per_sample", "batchmean", "sum", "mean"):
        ours, wide = data.leaves(), exact.leaves()
        actual = vaefast.reconstruction_loss(ours.recon, ours.target, likelihood=likelihood, reduction=reduction)
        wanted = vaefast.reference.reconstruction_loss(
            wide.recon, wide.target, likelihood=likelihood, reduction=reduction
        )
        assert_within(actual, wanted, tolerance, reduction)
        for a, e in zip(gradients(actual, ours.recon), gradients(wanted, wide.recon)):
            assert_within(a, e, tolerance, f"gradient of {reduction}")


@pytest.mark.isa
@DIMS
@pytest.mark.parametrize("sites", SITES, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_and_dimensions(backend: str, device: str, channels: int, sites: tuple[int, ...], dim: int) -> None:
    likelihood, data = mixture(channels, sites, dim)
    check(likelihood, data.to(device), data.to(torch.float64), 2e-6)
    few = Data((data.recon[0][:2],), data.target[:2])
    exact = exact_nll(likelihood.name, few.target.double(), few.recon, channels=channels, dim=dim)
    assert_within(
        vaefast.reconstruction_loss(few.recon, few.target, likelihood=likelihood, reduction="none"), exact, 2e-6
    )


@pytest.mark.isa
@DIMS
@pytest.mark.parametrize("K", [1, 2, 10, 31, 33, 257])
@pytest.mark.parametrize("sites", SITES, ids=str)
def test_cross_entropy(backend: str, device: str, sites: tuple[int, ...], K: int, dim: int) -> None:
    """The same as PyTorch's, whose classes lie along dimension 1."""
    likelihood, data = classes(sites, K, dim)
    logits, x = data.recon[0].to(device).requires_grad_(), data.target.to(device)
    actual = vaefast.reconstruction_loss(logits, x, likelihood=likelihood, reduction="none")
    wide = data.recon[0].double().movedim(dim, 1).requires_grad_()
    exact = F.cross_entropy(wide, data.target, reduction="none")
    assert_within(actual, exact, 2e-6)
    (a,), (e,) = gradients(actual, [logits]), gradients(exact, [wide])
    assert_within(a, e.movedim(1, dim), 2e-6)


@DIMS
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("channels", [0, 1, 3])
@pytest.mark.parametrize("layout", ["dense", "every second", "transposed"])
def test_layouts_and_dtypes(native: str, channels: int, dtype: torch.dtype, dim: int, layout: str) -> None:
    make = mixture(channels, (3, 4, 11), dim, dtype=dtype) if channels else classes((3, 4, 11), 9, dim, dtype)
    likelihood, data = make
    lay = {
        "dense": lambda t: t,
        "every second": lambda t: torch.stack((t, t), -1)[..., 1],
        "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    }[layout]
    given = Data(tuple(lay(p.to(native)) for p in data.recon), lay(data.target.to(native)))
    ours = Data(tuple(p.detach().requires_grad_() for p in given.recon), given.target)
    wide = data.to(torch.float64).leaves()
    actual = vaefast.reconstruction_loss(ours.recon, ours.target, likelihood=likelihood, reduction="per_sample")
    wanted = vaefast.reference.reconstruction_loss(
        wide.recon, wide.target, likelihood=likelihood, reduction="per_sample"
    )
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert_within(actual, wanted, tolerance)
    (a,), (e,) = gradients(actual, ours.recon), gradients(wanted, wide.recon)
    assert a.dtype == dtype
    # kept, and once more after the incoming gradient, it is rounded to its dtype
    rounding = 0.0 if dtype in (torch.float32, torch.float64) else 1.01 * torch.finfo(dtype).eps * e.abs().max().item()
    assert_within(a, e, tolerance, slack=rounding)


@DIMS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool, torch.float32, torch.float64])
def test_classes_of_any_dtype(backend: str, device: str, dtype: torch.dtype, dim: int) -> None:
    likelihood, data = classes((4, 5), 2, dim)
    data = data.to(device)
    expected = vaefast.reconstruction_loss(data.recon, data.target, likelihood=likelihood)
    p = posterior((4, 3), device=device)
    x = data.target.to(dtype)
    nll = vaefast.reconstruction_loss(data.recon, x, likelihood=likelihood)
    terms = vaefast.elbo_terms(data.recon, x, p.mu, p.raw, likelihood=likelihood)
    for found in (nll, terms.reconstruction):
        torch.testing.assert_close(found, expected, check_dtype=False)


@pytest.mark.isa
@DIMS
@pytest.mark.parametrize("bad", [-1.0, 5.0, 1e30, 0.5, math.nan, math.inf])
def test_what_is_no_class(backend: str, device: str, bad: float, dim: int) -> None:
    """Its nll and its gradients are NaN; those of its neighbours are not."""
    likelihood, data = classes((3, 4), 5, dim)
    x = data.target.float()
    x[1, 2] = bad
    logits = data.recon[0].to(device).requires_grad_()
    nll = vaefast.reconstruction_loss(logits, x.to(device), likelihood=likelihood, reduction="none")
    (gradient,) = torch.autograd.grad(nll.sum(), logits)
    wrong = torch.zeros(3, 4, dtype=torch.bool)
    wrong[1, 2] = True
    assert torch.equal(nll.isnan().cpu(), wrong)
    assert torch.equal(gradient.isnan().cpu(), wrong.unsqueeze(dim).expand_as(gradient))


@DIMS
def test_classes_that_are_ruled_out(backend: str, device: str, dim: int) -> None:
    """A logit of -inf, as a mask of classes has it, counts for nothing."""
    likelihood, data = classes((3, 4), 6, dim)
    x = data.target.clamp(max=2).to(device)
    logits = data.recon[0].to(device)
    some, none = logits.split(3, dim)
    masked = torch.cat((some, torch.full_like(none, -math.inf)), dim).requires_grad_()
    few = some.clone().requires_grad_()
    losses = [vaefast.reconstruction_loss(t, x, likelihood=likelihood) for t in (masked, few)]
    torch.testing.assert_close(*losses)
    (a,), (e,) = (torch.autograd.grad(loss, [t]) for loss, t in zip(losses, (masked, few)))
    kept, zero = a.split(3, dim)
    torch.testing.assert_close(kept, e)
    assert (zero == 0).all()


def test_pixels_add_up_to_one(backend: str, device: str) -> None:
    """The probabilities of all the values that a pixel can have."""
    grid = torch.linspace(-1, 1, 17, dtype=torch.float64)
    for channels in (1, 3):
        x = torch.cartesian_prod(*[grid] * channels).view(1, -1, channels).to(device)
        recon = torch.randn(4 * LIKELIHOODS["discretized_logistic_mixture"].planes[channels], generator=generator(1))
        planes = recon.to(device, torch.float64).expand(1, x.shape[1], -1).contiguous()
        likelihood = Likelihood("discretized_logistic_mixture", bins=17, channels=channels, dim=-1)
        nll = vaefast.reconstruction_loss(planes, x, likelihood=likelihood, reduction="none")
        assert torch.exp(-nll).sum().item() == pytest.approx(1.0, abs=1e-12)


@DIMS
def test_second_derivatives(native: str, dim: int) -> None:
    for likelihood, data in (mixture(1, (2, 2), dim, 2, torch.float64), classes((2, 2), 3, dim, torch.float64)):

        def f(recon: Tensor) -> Tensor:
            return vaefast.reconstruction_loss(recon, data.target, likelihood=likelihood)  # noqa: B023

        leaf = data.recon[0].requires_grad_()
        assert gradcheck(f, [leaf])
        assert torch.autograd.gradgradcheck(f, [leaf])


@DIMS
@pytest.mark.parametrize("channels", [0, 1, 3])
def test_draws(channels: int, dim: int) -> None:
    """In the target's shape, with a loss; a mean where one-hot vectors and pictures have it."""
    likelihood, data = mixture(channels, (3, 4, 5), dim) if channels else classes((3, 4, 5), 6, dim)
    x = vaefast.sample_likelihood(data.recon[0], likelihood)
    assert x.shape == data.target.shape
    assert vaefast.reconstruction_loss(data.recon[0], x, likelihood=likelihood).isfinite()
    mean = vaefast.likelihood_mean(data.recon[0], likelihood)
    assert mean.shape == (data.target.shape if channels else data.recon[0].shape)
    if not channels:
        torch.testing.assert_close(mean.sum(dim), torch.ones(3, 4, 5))


@pytest.mark.parametrize("name", ["categorical", "discretized_logistic_mixture"])
def test_errors(backend: str, device: str, name: str) -> None:
    recon = torch.zeros(2, 30, 4, device=device)
    channels = 0 if name == "categorical" else 3
    x = torch.zeros((2, 3, 4) if channels else (2, 4), device=device)

    def loss(recon: Tensor, x: Tensor, **options: float) -> Tensor:
        return vaefast.reconstruction_loss(recon, x, likelihood=Likelihood(name, **options))

    assert loss(recon, x).isfinite()
    with pytest.raises(ValueError, match=r"dim=3 of likelihood.*dimension of recon.*\(2, 30, 4\)"):
        loss(recon, x, dim=3)
    with pytest.raises(ValueError, match=r"dim=-3 of likelihood"):
        loss(recon, x, dim=-3)
    with pytest.raises(ValueError, match=r"dim must be a whole number and not 0.*got 0"):
        loss(recon, x, dim=0)
    with pytest.raises(ValueError, match=r"target has shape \(2, 30, 4\).*takes \(2, (3, )?4\)"):
        loss(recon, torch.zeros(2, 30, 4, device=device))
    with pytest.raises(ValueError, match=r"has 0 planes along dim=1"):
        loss(recon[:, :0], x)
    with pytest.raises(ValueError, match=r"weight of shape \(2, 3, 4\) does not broadcast to recon's sites"):
        vaefast.reconstruction_loss(recon, x, likelihood=name, weight=torch.ones(2, 3, 4, device=device))
    if channels:
        with pytest.raises(ValueError, match=r"31 planes along dim=1.*multiple of 10"):
            loss(torch.zeros(2, 31, 4, device=device), x)
        with pytest.raises(ValueError, match=r"target has shape \(2, 3, 4\).*channels=1.*takes \(2, 1, 4\)"):
            loss(recon, x, channels=1)
        with pytest.raises(ValueError, match=r"channels must be 1 or 3.*2"):
            loss(recon, x, channels=2)
        with pytest.raises(TypeError, match=r"target must be float16.*int64"):
            loss(recon, x.long())
