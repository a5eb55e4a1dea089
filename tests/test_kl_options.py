"""Every option of the KL against its paper's formula, written out here in float64: values, gradients, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from inputs import (
    CLAMPED_AND_FLOORED,
    ELBO_REDUCTIONS,
    PRIORS,
    REDUCTIONS,
    Posterior,
    assert_within,
    generator,
    gradients,
    posterior,
    std_and_logvar,
    training,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

import vaefast
from vaefast import Parameterization, _arguments, _compose
from vaefast.reference import PARAMETERIZATIONS

WIDE = torch.float64
ALPHA = 0.8
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
EVERY_PARAMETERIZATION = pytest.mark.parametrize(
    "parameterization",
    [*map(Parameterization, PARAMETERIZATIONS), *CLAMPED_AND_FLOORED],
    ids=lambda p: f"{p.name}-{p.clamp}-{p.floor}",
)


def samples_of(kl: Tensor) -> Tensor:
    return kl.flatten(1).sum(1)


def reduced(kl: Tensor, reduction: str) -> Tensor:
    """Elementwise [B, ...] or per sample [B]."""
    if reduction == "none":
        return kl
    if reduction == "mean":
        return kl.mean()
    rows = samples_of(kl) if kl.dim() > 1 else kl
    return {"per_sample": rows, "batchmean": rows.mean(), "sum": rows.sum()}[reduction]


def batch_dim(kl: Tensor, reduction: str) -> Tensor:
    loss = kl.mean(0).clamp(min=0.7).sum()
    return loss * len(kl) if reduction == "sum" else loss


def capacity(kl: Tensor, reduction: str) -> Tensor:
    if reduction == "per_sample":
        return (samples_of(kl) - 5.0).abs()
    distance = (samples_of(kl).mean() - 5.0).abs()
    return distance * len(kl) if reduction == "sum" else distance


class Option(NamedTuple):
    arguments: dict[str, Any]
    formula: Callable[[Tensor, str], Tensor]  # of the elementwise KL and the reduction
    reductions: tuple[str, ...]


OPTIONS = {
    "dim": Option({"free_bits": 0.4}, lambda kl, r: reduced(kl.clamp(min=0.4), r), REDUCTIONS),
    "sample": Option(
        {"free_bits": 5.0, "free_bits_per": "sample"},
        lambda kl, r: reduced(samples_of(kl).clamp(min=5.0), r),
        ELBO_REDUCTIONS,
    ),
    "batch_dim": Option({"free_bits": 0.7, "free_bits_per": "batch_dim"}, batch_dim, ("batchmean", "sum")),
    "capacity": Option({"capacity": 5.0}, capacity, ELBO_REDUCTIONS),
}
CASES = [(name, reduction) for name, option in OPTIONS.items() for reduction in option.reductions]


def exact_kl(parameterization: Any, mu: Tensor, raw: Tensor, pm: Any = None, plv: Any = None) -> Tensor:
    """Kingma & Welling 2014, appendix B, elementwise."""
    std, logvar = std_and_logvar(parameterization, raw)
    pm, plv = (torch.as_tensor(0.0 if t is None else t, dtype=WIDE, device=mu.device) for t in (pm, plv))
    return 0.5 * (plv - logvar - 1 + (std**2 + (mu - pm) ** 2) * torch.exp(-plv))


def widened(p: Posterior) -> Posterior:
    mu, raw, pm, plv = (t.detach().double() if isinstance(t, Tensor) else t for t in p.args())
    return Posterior(mu, raw, (pm, plv)).leaves()


def assert_same(
    ours: Callable[[Posterior], Tensor],
    exact: Callable[[Posterior], Tensor],
    p: Posterior,
    tolerance: float | None = None,
) -> None:
    """Value and gradients of one function of a posterior against another that takes it in float64."""
    p, wide = p.leaves(), widened(p)
    value, wanted = ours(p), exact(wide)
    narrow = value.dtype
    assert_within(value, wanted, tolerance or TOLERANCE[narrow], "value")
    for k, (g, e) in enumerate(zip(gradients(value, p.tensors()), gradients(wanted, wide.tensors()))):
        assert g.dtype == p.tensors()[k].dtype
        assert_within(g, e, tolerance or TOLERANCE[max(g.dtype, narrow, key=TOLERANCE.__getitem__)], f"gradient {k}")


def check(name: str, reduction: str, p: Posterior, parameterization: Any = "logvar") -> None:
    option = OPTIONS[name]
    assert_same(
        lambda p: vaefast.gaussian_kl(
            *p.args(), parameterization=parameterization, reduction=reduction, **option.arguments
        ),
        lambda p: option.formula(exact_kl(parameterization, *p.args()), reduction),
        p,
    )


@pytest.mark.parametrize(("name", "reduction"), CASES)
@pytest.mark.parametrize("prior", PRIORS)
def test_values_and_gradients(backend: str, device: str, name: str, reduction: str, prior: str) -> None:
    check(name, reduction, posterior((8, 3, 4), prior=prior, device=device))


@EVERY_PARAMETERIZATION
@pytest.mark.parametrize("name", list(OPTIONS))
def test_parameterizations(backend: str, device: str, name: str, parameterization: Parameterization) -> None:
    check(name, "batchmean", posterior((8, 12), parameterization, "full", device=device), parameterization)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_dtypes(backend: str, device: str, dtype: torch.dtype, name: str, reduction: str) -> None:
    p = posterior((8, 12), prior="broadcast", dtype=dtype, device=device)
    check(name, reduction, p)
    value = vaefast.gaussian_kl(*p.args(), reduction=reduction, **OPTIONS[name].arguments)
    assert value.dtype == (dtype if reduction == "none" or dtype == WIDE else torch.float32)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_sums_are_float32_sums(backend: str, device: str, half: torch.dtype) -> None:
    """Not of elements that were rounded to half precision first."""
    p = posterior((16, 400), prior="none", dtype=half, device=device)
    for arguments in ({"free_bits": 1e-3}, {"free_bits": 1e-3, "free_bits_per": "batch_dim"}):
        kl = vaefast.gaussian_kl(p.mu, p.raw, **arguments).item()
        exact = vaefast.gaussian_kl(p.mu.double(), p.raw.double(), **arguments).item()
        assert abs(kl / exact - 1) < 1e-6


@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_strided_views(backend: str, device: str, name: str, reduction: str) -> None:
    mu, raw = posterior((8, 2 * 6, 5), device=device).mu.chunk(2, dim=1)
    moments = posterior((8, 2 * 6, 5), device=device).mu.requires_grad_()
    views = moments.chunk(2, dim=1)
    arguments = {"reduction": reduction, **OPTIONS[name].arguments}
    packed = [t.detach().clone().requires_grad_() for t in (mu, raw)]
    plain = vaefast.gaussian_kl(*packed, **arguments)
    strided = vaefast.gaussian_kl(*views, **arguments)
    torch.testing.assert_close(strided, plain)
    torch.testing.assert_close(gradients(strided, [moments])[0], torch.cat(gradients(plain, packed), dim=1))


@pytest.mark.parametrize(("name", "reduction"), CASES)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty(backend: str, device: str, name: str, reduction: str, shape: tuple[int, ...]) -> None:
    p = posterior(shape, prior="full", device=device).leaves()
    found = vaefast.gaussian_kl(*p.args(), reduction=reduction, **OPTIONS[name].arguments)
    plain = vaefast.gaussian_kl(*p.args(), reduction=reduction)
    assert found.shape == plain.shape
    assert bool(found.isnan().any()) == bool(plain.isnan().any())
    assert [g.shape for g in gradients(found, p.tensors())] == [torch.Size(shape)] * 4


@pytest.mark.parametrize("per", ["dim", "sample", "batch_dim"])
def test_no_gradient_where_the_floor_holds(backend: str, device: str, per: str) -> None:
    """At equality neither: KL(N(1, 1) || N(0, 1)) is 1/2, and of N(2, 1) it is 2."""
    mu = torch.tensor([[0.1], [1.0], [2.0]], device=device, requires_grad=True)
    floor = (0.005 + 0.5 + 2.0) / 3 if per == "batch_dim" else 0.5
    kl = vaefast.gaussian_kl(mu, torch.zeros_like(mu), free_bits=floor, free_bits_per=per, reduction="sum")
    (grad,) = torch.autograd.grad(kl, mu)
    if per == "batch_dim":
        above = vaefast.gaussian_kl(mu, torch.zeros_like(mu), free_bits=2 * floor, free_bits_per=per, reduction="sum")
        assert above.item() == pytest.approx(3 * 2 * floor)
        assert torch.equal(torch.autograd.grad(above, mu)[0], torch.zeros_like(mu))
        return
    assert kl.item() == pytest.approx(0.5 + 0.5 + 2.0)
    assert grad.flatten().tolist() == [0.0, 0.0, 2.0]


def test_no_gradient_at_the_capacity(backend: str, device: str) -> None:
    mu = torch.ones(3, 1, device=device, requires_grad=True)
    for reduction in ELBO_REDUCTIONS:
        kl = vaefast.gaussian_kl(mu, torch.zeros_like(mu), capacity=0.5, reduction=reduction)
        assert kl.sum().item() == 0
        assert torch.equal(torch.autograd.grad(kl.sum(), mu)[0], torch.zeros_like(mu))


@pytest.mark.parametrize("arguments", [o.arguments for o in OPTIONS.values()], ids=list(OPTIONS))
def test_nan_is_not_floored(backend: str, device: str, arguments: dict[str, Any]) -> None:
    mu = torch.tensor([[math.nan, 0.0], [1.0, 2.0]], device=device)
    assert vaefast.gaussian_kl(mu, torch.zeros_like(mu), **arguments).isnan()


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("balance", [None, ALPHA])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_pass_with_a_sample(
    backend: str, device: str, name: str, balance: float | None, symmetric: bool, dtype: torch.dtype
) -> None:
    """sample_with_kl is reparameterize and gaussian_kl, with the options too."""
    p = posterior((8, 12), "softplus", "full", dtype, device).leaves()
    eps = torch.randn(8, 12, generator=generator(3)).to(device, dtype)
    q = {"parameterization": "softplus"}
    arguments = {"balance": balance, "symmetric": symmetric, **q, **OPTIONS[name].arguments}
    together = vaefast.sample_with_kl(*p.args(), eps=eps, **arguments)
    apart = [vaefast.reparameterize(p.mu, p.raw, eps=eps, **q), vaefast.gaussian_kl(*p.args(), **arguments)]
    for a, b in zip((*together, *gradients(together, p.tensors())), (*apart, *gradients(apart, p.tensors()))):
        assert a.dtype == b.dtype
        assert_within(a, b, 4 * TOLERANCE[a.dtype])  # in half precision the parts of a gradient are rounded apart


# ---- balance


def shares(p: Posterior, alpha: float) -> list[float]:
    return [1 - alpha if k < 2 else alpha for k in range(len(p.tensors()))]


@pytest.mark.isa
@EVERY_PARAMETERIZATION
@pytest.mark.parametrize("prior", ["full", "broadcast", "mu only", "logvar only"])
@pytest.mark.parametrize("alpha", [0.0, ALPHA, 1.0])
def test_balance(backend: str, device: str, parameterization: Any, prior: str, alpha: float) -> None:
    """The value of the KL; the prior's gradients times alpha, the posterior's times 1 - alpha."""
    p = posterior((4, 6), parameterization, prior, device=device).leaves()
    reduction = REDUCTIONS[PRIORS.index(prior) % len(REDUCTIONS)]
    arguments = {"parameterization": parameterization, "reduction": reduction}
    plain = vaefast.gaussian_kl(*p.args(), **arguments)
    found = vaefast.gaussian_kl(*p.args(), balance=alpha, **arguments)
    torch.testing.assert_close(found, plain, rtol=0 if backend == "native" else 1e-6, atol=0)
    for g, e, share in zip(gradients(found, p.tensors()), gradients(plain, p.tensors()), shares(p, alpha)):
        assert_within(g, share * e, 1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_balance_leaves_the_sample_alone(backend: str, device: str, dtype: torch.dtype) -> None:
    p = posterior((4, 6), prior="full", dtype=dtype, device=device).leaves()
    eps = torch.randn(4, 6, generator=generator(3)).to(device, dtype)

    def parts(*outputs: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(outputs, p.tensors(), [torch.full_like(t, 3.0) for t in outputs], allow_unused=True)
        return [torch.zeros_like(t) if g is None else g.double() for t, g in zip(p.tensors(), found)]

    z, kl = vaefast.sample_with_kl(*p.args(), eps=eps, reduction="sum")
    of_z, of_kl = parts(z), parts(vaefast.gaussian_kl(*p.args(), reduction="sum"))
    both = parts(*vaefast.sample_with_kl(*p.args(), eps=eps, reduction="sum", balance=ALPHA))
    for found, a, b, share in zip(both, of_z, of_kl, shares(p, ALPHA)):
        assert_within(found, a + share * b, 4 * TOLERANCE[dtype])
    assert kl.dtype == (dtype if dtype == WIDE else torch.float32)


@pytest.mark.parametrize("reduction", ELBO_REDUCTIONS)
@pytest.mark.parametrize("beta", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
@pytest.mark.parametrize("retain", [False, True])
def test_balance_in_the_elbo(backend: str, device: str, reduction: str, beta: Any, retain: bool) -> None:
    data, p = training("gaussian", 2).to(device).leaves(), posterior(prior="broadcast", device=device).leaves()
    beta = beta.to(device) if isinstance(beta, Tensor) else beta
    arguments = {"likelihood": "gaussian", "beta": beta, "reduction": reduction}
    inputs = [*data.recon, *p.tensors()]
    found = vaefast.elbo_loss(data.recon, data.target, *p.args(), balance=ALPHA, **arguments)
    plain = vaefast.elbo_loss(data.recon, data.target, *p.args(), **arguments)
    torch.testing.assert_close(found, plain)
    exact = gradients(plain, inputs)
    upstream = (1.5 + torch.rand(found.shape, generator=generator(5), dtype=WIDE)).to(device, found.dtype)
    for _ in range(1 + retain):
        grads = torch.autograd.grad(found, inputs, upstream, retain_graph=retain)
        for g, e, share in zip(grads, exact, [1.0] * len(data.recon) + shares(p, ALPHA)):
            assert_within(g, share * e, 2e-6)


def literal(p: Posterior, alpha: float, **arguments: Any) -> Tensor:
    """Hafner et al. 2021, algorithm 2, with detach."""
    mu, raw, pm, plv = p.args()
    stopped = [t.detach() for t in p.args()]
    return alpha * vaefast.gaussian_kl(*stopped[:2], pm, plv, **arguments) + (1 - alpha) * vaefast.gaussian_kl(
        mu, raw, *stopped[2:], **arguments
    )


@pytest.mark.parametrize("arguments", [{}, *(o.arguments for o in OPTIONS.values())], ids=["plain", *OPTIONS])
@pytest.mark.parametrize("symmetric", [False, True])
def test_balance_is_stopped_gradients(backend: str, device: str, arguments: dict[str, Any], symmetric: bool) -> None:
    """Together with the other options; those that are not linear see the same KL on both sides."""
    p = posterior((8, 12), prior="full", dtype=WIDE, device=device).leaves()
    arguments = {"symmetric": symmetric, **arguments}
    found = gradients(vaefast.gaussian_kl(*p.args(), balance=ALPHA, **arguments), p.tensors())
    for g, e in zip(found, gradients(literal(p, ALPHA, **arguments), p.tensors())):
        assert_within(g, e, 1e-12)


@pytest.mark.parametrize("reduction", ["none", "per_sample", "batchmean"])
def test_balance_differentiated_twice(backend: str, device: str, reduction: str) -> None:
    p = posterior((3, 2), prior="full", dtype=WIDE, device=device).leaves()
    seconds = []
    for kl in (
        vaefast.gaussian_kl(*p.args(), balance=ALPHA, reduction=reduction),
        literal(p, ALPHA, reduction=reduction),
    ):
        firsts = torch.autograd.grad(kl.square().sum(), p.tensors(), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in firsts), p.tensors()))
    for found, exact in zip(*seconds):
        assert_within(found, exact, 1e-11)


@pytest.mark.parametrize("sample", [False, True])
def test_balance_of_some_inputs_only(backend: str, device: str, sample: bool) -> None:
    p = posterior(prior="full", device=device)
    eps = torch.zeros((), device=device)
    for k, share in enumerate(shares(p, ALPHA)):
        grads = []
        for balance in (ALPHA, None):
            tensors = [t.clone().requires_grad_(j == k) for j, t in enumerate(p.tensors())]
            kl = vaefast.sample_with_kl(*tensors, eps=eps, balance=balance)[1]
            kl = kl if sample else vaefast.gaussian_kl(*tensors, balance=balance)
            grads += torch.autograd.grad(kl, tensors[k])
        assert_within(grads[0], share * grads[1], 1e-6)


def test_balance_in_an_elbo_differentiated_twice(backend: str, device: str) -> None:
    data, p = (
        training("gaussian", 1, dtype=WIDE).to(device),
        posterior(prior="full", dtype=WIDE, device=device).leaves(),
    )
    (recon,) = data.recon
    seconds = []
    for kl in (
        vaefast.elbo_loss(recon, data.target, *p.args(), likelihood="gaussian", beta=0.5, balance=ALPHA),
        0.5 * literal(p, ALPHA),
    ):
        firsts = torch.autograd.grad(kl, p.tensors(), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in firsts), p.tensors()))
    for found, exact in zip(*seconds):
        assert_within(found, exact, 1e-11)


# ---- the symmetric KL


def jeffreys(p: Posterior, parameterization: Any = "logvar") -> Tensor:
    """((s_q^2 + (mu_q - mu_p)^2) / s_p^2 + (s_p^2 + (mu_q - mu_p)^2) / s_q^2 - 2) / 2 (Jeffreys 1946)."""
    mu, raw, pm, plv = p.args()
    std, _ = std_and_logvar(parameterization, raw)
    pm, plv = (torch.as_tensor(0.0 if t is None else t, dtype=WIDE, device=mu.device) for t in (pm, plv))
    var, prior_var, square = std**2, torch.exp(plv), (mu - pm) ** 2
    return 0.5 * ((var + square) / prior_var + (prior_var + square) / var - 2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("prior", PRIORS)
def test_symmetric(backend: str, device: str, reduction: str, prior: str) -> None:
    assert_same(
        lambda p: vaefast.gaussian_kl(*p.args(), reduction=reduction, symmetric=True),
        lambda p: reduced(jeffreys(p), reduction),
        posterior((4, 6), prior=prior, device=device),
    )


@EVERY_PARAMETERIZATION
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_symmetric_parameterizations(backend: str, device: str, parameterization: Any, dtype: torch.dtype) -> None:
    p = posterior((4, 6), parameterization, "broadcast", dtype, device)
    tolerance = 2e-2 if dtype.itemsize == 2 else None  # gradients of two kernels, each rounded to half precision
    assert_same(
        lambda p: vaefast.gaussian_kl(*p.args(), parameterization=parameterization, symmetric=True),
        lambda p: reduced(jeffreys(p, parameterization), "batchmean"),
        p,
        tolerance,
    )
    none = vaefast.gaussian_kl(*p.args(), parameterization=parameterization, symmetric=True, reduction="none")
    assert none.dtype == dtype


def test_symmetric_next_to_the_prior(backend: str, device: str) -> None:
    """4 sinh(d / 2)^2 / 2 for equal means: every digit, and never below zero."""
    d = torch.cat([s * torch.logspace(-18, 0.5, 60) for s in (1.0, -1.0)]).to(device)
    for plv in (0.0, 0.5, -3.0):
        prior = torch.full_like(d, plv)
        raw = prior + d
        exact = 2 * torch.sinh((raw.double() - prior.double()) / 2) ** 2
        kl = vaefast.gaussian_kl(torch.ones_like(d), raw, torch.ones_like(d), prior, symmetric=True, reduction="none")
        assert (kl >= 0).all()
        torch.testing.assert_close(kl.double(), exact, rtol=4e-6, atol=1e-37)


def test_symmetric_is_symmetric(backend: str, device: str) -> None:
    p = posterior(prior="full", device=device)
    one = vaefast.gaussian_kl(*p.args(), symmetric=True)
    other = vaefast.gaussian_kl(*p.prior, p.mu, p.raw, symmetric=True)
    torch.testing.assert_close(one, other)


# ---- the KL of each dimension


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3)])
def test_kl_per_dim(backend: str, device: str, prior: str, shape: tuple[int, ...]) -> None:
    assert_same(
        lambda p: vaefast.kl_per_dim(*p.args()),
        lambda p: exact_kl("logvar", *p.args()).mean(0),
        posterior(shape, prior=prior, device=device),
    )


@EVERY_PARAMETERIZATION
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_kl_per_dim_adds_up(backend: str, device: str, parameterization: Any, dtype: torch.dtype) -> None:
    p = posterior((16, 300), parameterization, "full", dtype, device)
    each = vaefast.kl_per_dim(*p.args(), parameterization=parameterization)
    assert each.dtype == (dtype if dtype == WIDE else torch.float32)
    torch.testing.assert_close(
        each.sum(), vaefast.gaussian_kl(*p.args(), parameterization=parameterization), rtol=1e-5, atol=1e-5
    )


# ---- estimators


def by_hand(p: Posterior, eps: Tensor, parameterization: Any, estimator: str) -> tuple[Tensor, list[Tensor]]:
    """log q(z) - log p(z) from the densities, elementwise, and its gradients from calculus, elementwise too.

    With r = (z - mu_p) / s_p^2 the derivative in z of -log p(z): the whole one in mu is r and in s eps r - 1 / s (the
    score's and log q's in z cancel but for the normaliser's); through z alone, dv/dz = r - eps / s and eps dv/dz.
    """
    mu, raw, pm, plv = p.args()
    std, logvar = std_and_logvar(parameterization, raw)
    (dstd,) = torch.autograd.grad(std.sum(), raw)
    pm, plv = (torch.as_tensor(0.0 if t is None else t, dtype=WIDE, device=mu.device) for t in (pm, plv))
    z = mu + std * eps
    log_q = -0.5 * (math.log(2 * math.pi) + logvar + ((z - mu) / std) ** 2)
    log_p = -0.5 * (math.log(2 * math.pi) + plv + (z - pm) ** 2 * torch.exp(-plv))
    r = (z - pm) * torch.exp(-plv)
    if estimator == "mc":
        of_q = [r, (eps * r - 1 / std) * dstd]
    else:
        of_q = [r - eps / std, eps * (r - eps / std) * dstd]
    of_p = [-r, 0.5 * (1 - (z - pm) * r)]
    wanted = of_q + [g for g, t in zip(of_p, p.prior) if isinstance(t, Tensor)]
    return (log_q - log_p).detach(), [g.detach() for g in wanted]


def summed_to(g: Tensor, like: Tensor) -> Tensor:
    return g.expand(torch.broadcast_shapes(g.shape, like.shape)).sum_to_size(like.shape)


@EVERY_PARAMETERIZATION
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("estimator", ["mc", "stl"])
def test_estimators(backend: str, device: str, parameterization: Any, prior: str, estimator: str) -> None:
    p = posterior((4, 6), parameterization, prior, device=device).leaves()
    eps = torch.randn(4, 6, generator=generator(3)).to(device)
    arguments = {"parameterization": parameterization, "eps": eps, "estimator": estimator}
    wide = widened(p)
    value, wanted = by_hand(wide, eps.double(), parameterization, estimator)
    for reduction in REDUCTIONS:
        z, kl = vaefast.sample_with_kl(*p.args(), reduction=reduction, **arguments)
        assert_within(kl, reduced(value, reduction), 1e-5, reduction)
        torch.testing.assert_close(z, vaefast.reparameterize(p.mu, p.raw, parameterization=parameterization, eps=eps))
    grads = torch.autograd.grad(vaefast.sample_with_kl(*p.args(), reduction="sum", **arguments)[1], p.tensors())
    for k, (g, e, t) in enumerate(zip(grads, wanted, p.tensors())):
        assert_within(g, summed_to(e.expand(4, 6), t), 5e-5, f"gradient {k}")


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("estimator", ["mc", "stl"])
def test_estimators_in_every_dtype(backend: str, device: str, dtype: torch.dtype, estimator: str) -> None:
    p = posterior((4, 6), "softplus", "full", dtype, device).leaves()
    eps = torch.randn(4, 6, generator=generator(3)).to(device, dtype)
    value, wanted = by_hand(widened(p), eps.double(), "softplus", estimator)
    for reduction in ("none", "sum"):
        arguments = {"parameterization": "softplus", "eps": eps, "estimator": estimator, "reduction": reduction}
        z, kl = vaefast.sample_with_kl(*p.args(), **arguments)
        assert z.dtype == dtype
        assert kl.dtype == (dtype if reduction == "none" or dtype == WIDE else torch.float32)
        assert_within(kl, reduced(value, reduction), 2 * TOLERANCE[kl.dtype])
    for g, e in zip(torch.autograd.grad(kl, p.tensors()), wanted):
        assert g.dtype == dtype
        assert_within(g, e, 5 * TOLERANCE[dtype])


@pytest.mark.parametrize("noise", ["philox", "torch"])
@pytest.mark.parametrize("estimator", ["mc", "stl"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_estimators_draw_the_samples_own_noise(
    backend: str, device: str, noise: str, estimator: str, dtype: torch.dtype
) -> None:
    """One seed gives the sample that it gives with the analytic KL; the value is the densities' at that sample."""
    moments = posterior((6, 16), dtype=dtype, device=device).mu
    mu, raw = moments.chunk(2, dim=1)
    found = [
        vaefast.sample_with_kl(mu, raw, estimator=name, noise=noise, generator=generator(4, device), reduction="sum")
        for name in ("analytic", estimator)
    ]
    torch.testing.assert_close(found[0][0], found[1][0])
    z, std = found[1][0].double(), torch.exp(0.5 * raw.double())
    exact = (0.5 * (z**2 - ((z - mu.double()) / std) ** 2 - raw.double())).sum()
    assert_within(found[1][1], exact, 20 * TOLERANCE[dtype])


def test_mc_has_the_kl_for_its_mean(backend: str, device: str) -> None:
    draws = 100_000
    mu, raw = torch.full((draws, 1), 0.7, device=device), torch.full((draws, 1), -0.5, device=device)
    _, kl = vaefast.sample_with_kl(mu, raw, 0.2, 0.3, estimator="mc", reduction="none")
    exact = vaefast.gaussian_kl(mu[:1], raw[:1], 0.2, 0.3).item()
    assert abs(kl.mean().item() - exact) < 5 * kl.std().item() / math.sqrt(draws)


def test_stl_has_no_variance_at_the_posterior(backend: str, device: str) -> None:
    """Where q = p every sample's gradient is zero, and that of "mc" is not."""
    p = posterior((4, 6), "log_std", device=device).leaves()
    prior = (p.mu.detach().clone(), 2 * p.raw.detach())
    for estimator, still in (("stl", True), ("mc", False)):
        _, kl = vaefast.sample_with_kl(p.mu, p.raw, *prior, parameterization="log_std", estimator=estimator)
        size = max(g.abs().max().item() for g in torch.autograd.grad(kl, p.tensors()))
        assert (size < 1e-5) == still


@pytest.mark.parametrize("estimator", ["mc", "stl"])
def test_balance_of_an_estimator(backend: str, device: str, estimator: str) -> None:
    p = posterior((4, 6), prior="full", dtype=WIDE, device=device).leaves()
    eps = torch.randn(4, 6, generator=generator(3), dtype=WIDE).to(device)
    plain, found = (
        vaefast.sample_with_kl(*p.args(), eps=eps, estimator=estimator, balance=balance)[1] for balance in (None, ALPHA)
    )
    torch.testing.assert_close(found, plain)
    for g, e, share in zip(gradients(found, p.tensors()), gradients(plain, p.tensors()), shares(p, ALPHA)):
        assert_within(g, share * e, 1e-12)


@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_options_of_an_estimate(backend: str, device: str, name: str, reduction: str) -> None:
    p = posterior((8, 3, 4), prior="full", dtype=WIDE, device=device)
    eps = torch.randn(8, 3, 4, generator=generator(3), dtype=WIDE).to(device)
    each = vaefast.sample_with_kl(*p.args(), eps=eps, estimator="mc", reduction="none")[1]
    found = vaefast.sample_with_kl(*p.args(), eps=eps, estimator="mc", reduction=reduction, **OPTIONS[name].arguments)
    assert_within(found[1], OPTIONS[name].formula(each, reduction), 1e-12)


# ---- several samples


@EVERY_PARAMETERIZATION
def test_several_samples(backend: str, device: str, parameterization: Any) -> None:
    """Gradients add up over the draws: of mu dz, of raw dz eps dstd."""
    p = posterior((4, 6), parameterization, device=device).leaves()
    z = vaefast.reparameterize(p.mu, p.raw, parameterization=parameterization, num_samples=5)
    assert z.shape == (5, 4, 6)
    assert z.is_contiguous()
    wide = widened(p)
    std, _ = std_and_logvar(parameterization, wide.raw)
    (dstd,) = torch.autograd.grad(std.sum(), wide.raw)
    eps = (z.detach().double() - wide.mu) / std
    assert len(eps.round(decimals=3).unique()) > 100, "draws are independent"
    dz = torch.randn(5, 4, 6, generator=generator(4)).to(device)
    dmu, draw = torch.autograd.grad(z, p.tensors(), dz)
    assert_within(dmu, dz.double().sum(0), 1e-6)
    assert_within(draw, (dz * eps).sum(0) * dstd, 2e-5)


@pytest.mark.parametrize("noise", ["philox", "torch"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_several_samples_are_those_of_one_large_batch(
    backend: str, device: str, noise: str, dtype: torch.dtype
) -> None:
    """Also of views: elements are numbered over [K, B, ...]."""
    for mu, raw in (
        (posterior((4, 6), dtype=dtype, device=device).mu, torch.zeros(4, 6, dtype=dtype, device=device)),
        posterior((4, 12), dtype=dtype, device=device).mu.chunk(2, dim=1),
    ):
        arguments = {"noise": noise, "generator": generator(4, device)}
        z = vaefast.reparameterize(mu, raw, num_samples=3, **arguments)
        arguments = {"noise": noise, "generator": generator(4, device)}
        large = [t.expand(3, 4, 6).clone(memory_format=torch.contiguous_format) for t in (mu, raw)]
        assert z.is_contiguous()
        assert torch.equal(z, vaefast.reparameterize(*large, **arguments))


def test_several_samples_of_given_noise(backend: str, device: str) -> None:
    p = posterior((4, 6), device=device)
    eps = torch.randn(3, 1, 6, generator=generator(2)).to(device)
    z = vaefast.reparameterize(p.mu, p.raw, eps=eps, num_samples=3)
    torch.testing.assert_close(z, p.mu + torch.exp(0.5 * p.raw) * eps)
    one = vaefast.reparameterize(p.mu, p.raw, num_samples=1)
    assert one.shape == (1, 4, 6)
    empty = vaefast.reparameterize(p.mu[:0], p.raw[:0], num_samples=2)
    assert empty.shape == (2, 0, 6)


def test_several_samples_of_channels_last(backend: str, device: str) -> None:
    """The layout goes with mu's; every draw is its own, and gradients arrive where they belong."""
    mu = posterior((2, 3, 4, 5), device=device).mu.to(memory_format=torch.channels_last).requires_grad_()
    z = vaefast.reparameterize(mu, torch.zeros_like(mu), num_samples=3)
    assert len((z - mu).detach().round(decimals=3).unique()) > 300
    dz = torch.randn(z.shape, generator=generator(4)).to(device)
    assert_within(torch.autograd.grad(z, mu, dz)[0], dz.double().sum(0), 1e-6)


@pytest.mark.parametrize("options", [{}, {"free_bits": 0.4}, {"kl_weight": 0.5}, {"temperature": 0.7}], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@EVERY_PARAMETERIZATION
def test_several_samples_share_their_kl(
    backend: str, device: str, parameterization: Any, reduction: str, options: dict[str, Any]
) -> None:
    p = posterior((4, 6), parameterization, "full", device=device)
    arguments: dict[str, Any] = {"parameterization": parameterization}
    seeded = lambda: {"generator": generator(4, device), "num_samples": 5}  # noqa: E731
    options = {k: torch.full((4, 1), v, device=device) if k == "kl_weight" else v for k, v in options.items()}
    z, kl = vaefast.sample_with_kl(*p.args(), reduction=reduction, **seeded(), **arguments, **options)
    sampling = {"temperature": options.pop("temperature", 1.0)}
    assert torch.equal(z, vaefast.reparameterize(p.mu, p.raw, **seeded(), **arguments, **sampling))
    options = {k.removeprefix("kl_"): v for k, v in options.items()}
    assert torch.equal(kl, vaefast.gaussian_kl(*p.args(), reduction=reduction, **arguments, **options))


@pytest.mark.parametrize("estimator", ["mc", "stl"])
def test_estimates_of_several_samples(backend: str, device: str, estimator: str) -> None:
    """Each is torch.distributions' of its draw, and their mean nears the KL."""
    p = posterior((4, 6), prior="full", device=device)
    arguments = {"estimator": estimator, "num_samples": 4_000}
    z, found = vaefast.sample_with_kl(*p.args(), **arguments, reduction="per_sample", generator=generator(4, device))
    wide = [t.double() for t in p.tensors()]
    q, prior = (torch.distributions.Normal(m, torch.exp(0.5 * v)) for m, v in (wide[:2], wide[2:]))
    each = (q.log_prob(z.double()) - prior.log_prob(z.double())).sum(2)
    assert z.shape == (4_000, 4, 6) and found.shape == (4_000, 4)
    torch.testing.assert_close(found.double(), each, rtol=1e-4, atol=1e-3)
    exact = torch.distributions.kl_divergence(q, prior).sum(1)
    assert ((found.mean(0) - exact).abs() < 5 * found.std(0) / 4_000**0.5).all()
    whole = vaefast.sample_with_kl(*p.args(), **arguments, generator=generator(4, device))[1]
    torch.testing.assert_close(whole, found.mean())


def test_several_samples_of_generators(backend: str, device: str) -> None:
    """A list has one for each of B, as if it were alone; an estimate of several draws takes no list."""
    p = posterior((2, 6), device=device)
    seeds = lambda: [generator(k, device) for k in (1, 2)]  # noqa: E731
    z, _ = vaefast.sample_with_kl(p.mu, p.raw, num_samples=3, generator=seeds())
    assert torch.equal(z, vaefast.reparameterize(p.mu, p.raw, num_samples=3, generator=seeds()))
    with pytest.raises(ValueError, match=r"num_samples.*one generator"):
        vaefast.sample_with_kl(p.mu, p.raw, num_samples=3, generator=seeds(), estimator="mc")


# ---- derivatives in general


@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_gradcheck(backend: str, device: str, name: str, reduction: str) -> None:
    p = posterior((3, 2), "softplus", "full", WIDE, device).leaves()
    arguments = {"parameterization": "softplus", "reduction": reduction, **OPTIONS[name].arguments}
    f = lambda *t: vaefast.gaussian_kl(*t, **arguments)  # noqa: E731
    assert gradcheck(f, p.tensors())
    assert gradgradcheck(f, p.tensors())


@pytest.mark.parametrize("what", ["symmetric", "per dim", "mc", "several"])
def test_gradcheck_of_compositions(backend: str, device: str, what: str) -> None:
    p = posterior((3, 2), "softplus", "full", WIDE, device).leaves()
    q = {"parameterization": "softplus"}
    f = {
        "symmetric": lambda *t: vaefast.gaussian_kl(*t, symmetric=True, **q),
        "per dim": lambda *t: vaefast.kl_per_dim(*t, **q),
        "mc": lambda *t: vaefast.sample_with_kl(*t, estimator="mc", generator=generator(1, device), **q),
        "several": lambda mu, raw, *_: vaefast.reparameterize(
            mu, raw, num_samples=2, generator=generator(1, device), **q
        ),
    }[what]
    inputs = p.tensors()[:2] if what == "several" else p.tensors()
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


def test_torch_func(device: str) -> None:
    p = posterior((4, 6), prior="full", dtype=WIDE, device=device)
    arguments: dict[str, Any] = {"free_bits": 0.4, "balance": ALPHA}
    found = torch.func.grad(lambda *t: vaefast.gaussian_kl(*t, **arguments), argnums=(0, 1, 2, 3))(*p.args())
    q = p.leaves()
    exact = torch.autograd.grad(vaefast.gaussian_kl(*q.args(), **arguments), q.tensors())
    for g, e in zip(found, exact):
        assert_within(g, e, 1e-12)


# ---- the ELBO


@pytest.mark.parametrize(("name", "reduction"), [c for c in CASES if c[1] in ELBO_REDUCTIONS])
@pytest.mark.parametrize("beta", [2.0, torch.tensor(2.0)], ids=["float", "tensor"])
def test_elbo(backend: str, device: str, name: str, reduction: str, beta: Any) -> None:
    data, p = training("bernoulli", 1, (8, 9)).to(device).leaves(), posterior((8, 12), prior="full", device=device)
    p = p.leaves()
    beta = beta.to(device) if isinstance(beta, Tensor) else beta
    arguments = {"reduction": reduction, **OPTIONS[name].arguments}
    terms = vaefast.elbo_terms(data.recon, data.target, *p.args(), beta=beta, **arguments)
    nll = vaefast.reconstruction_loss(data.recon, data.target, reduction=reduction)
    kl = vaefast.gaussian_kl(*p.args(), **arguments)
    for found, wanted in zip(terms, (nll + beta * kl, nll, kl)):
        torch.testing.assert_close(found, wanted)
    inputs = [*data.recon, *p.tensors()]
    for g, e in zip(gradients(terms.loss, inputs), gradients(nll + beta * kl, inputs)):
        torch.testing.assert_close(g, e)
    assert torch.equal(
        vaefast.ELBOLoss(beta=beta, **arguments)(data.recon, data.target, *p.args()), terms.loss
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [{"symmetric": True}, {"balance": 0.3}], ids=str)
def test_elbo_of_the_other_options(backend: str, device: str, arguments: dict[str, Any]) -> None:
    data, p = training("bernoulli", 1).to(device), posterior(prior="full", device=device)
    terms = vaefast.elbo_terms(data.recon, data.target, *p.args(), **arguments)
    torch.testing.assert_close(terms.kl, vaefast.gaussian_kl(*p.args(), **arguments))
    module = vaefast.ELBOLoss(**arguments)
    assert torch.equal(module(data.recon, data.target, *p.args()), terms.loss)
    (option,) = arguments
    assert option in repr(module)
    assert option not in repr(vaefast.ELBOLoss())


# ---- torch.compile


def step(mu: Tensor, raw: Tensor, pm: Tensor, plv: Tensor, recon: Tensor, x: Tensor, eps: Tensor) -> list[Tensor]:
    prior = (pm, plv)
    kls = [
        vaefast.gaussian_kl(mu, raw, *prior, free_bits=0.4, balance=ALPHA),
        vaefast.gaussian_kl(mu, raw, *prior, free_bits=5.0, free_bits_per="sample", symmetric=True),
        vaefast.sample_with_kl(mu, raw, *prior, eps=eps, free_bits=0.7, free_bits_per="batch_dim")[1],
        vaefast.gaussian_kl(mu, raw, *prior, balance=ALPHA, reduction="sum"),
        vaefast.sample_with_kl(mu, raw, *prior, eps=eps, estimator="mc")[1],
        vaefast.sample_with_kl(mu, raw, *prior, eps=eps, estimator="stl", balance=ALPHA)[1],
        vaefast.kl_per_dim(mu, raw, *prior).square().sum(),
        vaefast.elbo_loss(recon, x, mu, raw, *prior, capacity=3.0, reduction="sum"),
        vaefast.elbo_loss(recon, x, mu, raw, *prior, balance=ALPHA),
        vaefast.reparameterize(mu, raw, eps=eps.expand(3, *eps.shape), num_samples=3).square().sum(),
    ]
    return [k.to(torch.float64) for k in kls]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(native: str, compiler: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    f = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    graphs = set()
    for batch in (6, 9):
        p, data = posterior((batch, 5), prior="full", device=native).leaves(), training("bernoulli", 1, (batch, 7))
        data = data.to(native).leaves()
        eps = torch.randn(batch, 5, generator=generator(3)).to(native)
        inputs = [*p.tensors(), *data.recon]
        for k, (found, exact) in enumerate(zip(*(g(*inputs, data.target, eps) for g in (f, step)))):
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5, msg=lambda m, k=k: f"output {k}: {m}")
        grads = [
            torch.autograd.grad(torch.stack(g(*inputs, data.target, eps)).square().sum(), inputs) for g in (f, step)
        ]
        for found, exact in zip(*grads):
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-2)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1, "no batch size was compiled for again"


def test_compiled_draws(native: str) -> None:
    torch._dynamo.reset()
    zero = torch.zeros(50, device=native)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(mu: Tensor, raw: Tensor) -> tuple[Tensor, ...]:
        return vaefast.reparameterize(mu, raw, num_samples=2), *vaefast.sample_with_kl(mu, raw, estimator="mc")

    several, z, _ = f(zero, zero)
    assert len(torch.cat([several.flatten(), z]).unique()) == 150
    assert (f(zero, zero)[1] != z).all()


@pytest.mark.parametrize("name", ["beta", "capacity"])
def test_a_schedule_in_a_tensor_compiles_once(native: str, name: str) -> None:
    """fullgraph refuses what would read the tensor's value on the host; an eager CUDA call must not wait for it."""
    torch._dynamo.reset()
    data, p = training("bernoulli", 1).to(native), posterior(device=native)

    def loss(value: Tensor) -> Tensor:
        return vaefast.elbo_loss(data.recon, data.target, p.mu, p.raw, reduction="sum", **{name: value})

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for value in (0.0, 0.5, 1.0, 2.0):
        torch.testing.assert_close(
            compiled(torch.tensor(value, device=native)), loss(torch.tensor(value, device=native))
        )
        torch.testing.assert_close(loss(torch.tensor(value, device=native)), loss(value))
    assert counter.frame_count == 1
    if native == "cuda":
        value = torch.tensor(0.5, device=native)
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss(value)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_schedule_keeps_the_losss_dtype(backend: str, device: str, dtype: torch.dtype) -> None:
    p = posterior(device=device)
    assert (
        vaefast.gaussian_kl(p.mu, p.raw, capacity=torch.tensor(2.0, dtype=dtype, device=device)).dtype == torch.float32
    )


# ---- the way of a call


def test_a_call_without_options_is_one_kernel(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not come near the composition."""

    def never(*_: Any) -> None:
        raise AssertionError

    for module, names in (
        (_compose, ("kl", "begin", "finish", "estimated", "elbo")),
        (_arguments, ("kl", "posterior")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, never)
    data, p = training("bernoulli", 1).to(native), posterior(prior="full", device=native)
    for balance in (None, 0.5):
        vaefast.gaussian_kl(*p.args(), balance=balance)
        vaefast.sample_with_kl(*p.args(), balance=balance)
        vaefast.elbo_loss(data.recon, data.target, *p.args(), balance=balance)


# ---- refusals

KL = ("gaussian_kl", "sample_with_kl", "elbo_terms", "elbo_loss")
nan, inf = math.nan, math.inf
BAD: list[tuple[dict[str, Any], Any, str]] = [
    ({"free_bits": -1.0}, ValueError, "free_bits.*>= 0.*-1.0"),
    ({"free_bits": nan}, ValueError, "free_bits.*nan"),
    ({"free_bits": inf}, ValueError, "free_bits.*inf"),
    ({"free_bits": "1"}, TypeError, "free_bits.*number.*'1'"),
    ({"free_bits": None}, TypeError, "free_bits.*None"),
    ({"free_bits": True}, TypeError, "free_bits.*True"),
    ({"free_bits": torch.tensor(1.0)}, TypeError, "free_bits.*tensor"),
    ({"free_bits_per": "batch"}, ValueError, "free_bits_per.*'dim', 'sample', 'batch_dim'.*'batch'"),
    ({"free_bits_per": None}, ValueError, "free_bits_per.*None"),
    (
        {"free_bits": 1.0, "free_bits_per": "batch_dim", "reduction": "per_sample"},
        ValueError,
        "free_bits_per='batch_dim'.*'per_sample'.*means over the batch.*'batchmean', 'sum'",
    ),
    ({"balance": "0.8"}, TypeError, "balance.*from 0 to 1.*'0.8'"),
    ({"balance": True}, TypeError, "balance.*True"),
    ({"balance": torch.tensor(0.8)}, TypeError, "balance.*tensor"),
    ({"balance": 1.5}, ValueError, "balance.*0.*1.*1.5"),
    ({"balance": -0.1}, ValueError, "balance.*-0.1"),
    ({"balance": nan}, ValueError, "balance.*nan"),
    ({"balance": 0.8, "prior_mu": None, "prior_logvar": None}, ValueError, "balance=0.8.*prior.*tensor"),
    ({"balance": 0.8, "prior_mu": 0.5, "prior_logvar": None}, ValueError, "balance=0.8.*prior.*tensor"),
    ({"capacity": "5"}, TypeError, "capacity.*str"),
    ({"capacity": -1.0}, ValueError, "capacity.*>= 0.*-1.0"),
    ({"capacity": inf}, ValueError, "capacity.*inf"),
    ({"capacity": torch.ones(3)}, ValueError, r"capacity.*0-d.*\(3,\)"),
    ({"capacity": torch.ones((), dtype=torch.int64)}, TypeError, "capacity.*int64"),
    ({"capacity": torch.ones((), device="meta")}, ValueError, "capacity is on meta.*mu is on cpu"),
    ({"capacity": 5.0, "free_bits": 1.0}, ValueError, "capacity and free_bits=1.0"),
    ({"symmetric": 1}, TypeError, "symmetric.*True or False.*1"),
    ({"symmetric": None}, TypeError, "symmetric.*None"),
]
SHAPELESS = ({"free_bits": 1.0, "free_bits_per": "sample"}, {"capacity": 1.0})


def arguments_of(name: str) -> dict[str, Any]:
    four = {key: torch.zeros(4, 3) for key in ("mu", "logvar", "prior_mu", "prior_logvar")}
    return {**four, "recon": torch.zeros(4, 5), "target": torch.zeros(4, 5)} if name.startswith("elbo") else four


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(case[0]) for case in BAD])
def test_bad_options(face: Any, change: dict[str, Any], error: Any, message: str) -> None:
    for name in KL:
        with pytest.raises(error, match=f"(?s){message}"):
            getattr(face, name)(**{**arguments_of(name), **change})


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(case[0]) for case in BAD])
def test_the_module_refuses_when_it_is_made(change: dict[str, Any], error: Any, message: str) -> None:
    if "prior_mu" in change or "meta" in message:
        pytest.skip("only the tensors tell")
    with pytest.raises(error, match=f"(?s){message}"):
        vaefast.ELBOLoss(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"free_bits": 1.0, "free_bits_per": "sample", "reduction": "none"}, "free_bits_per='sample'.*'none'"),
        ({"free_bits": 1.0, "free_bits_per": "sample", "reduction": "mean"}, "free_bits_per='sample'.*'mean'"),
        ({"free_bits": 1.0, "free_bits_per": "batch_dim", "reduction": "none"}, "free_bits_per='batch_dim'.*'none'"),
        ({"free_bits": 1.0, "free_bits_per": "batch_dim", "reduction": "mean"}, "free_bits_per='batch_dim'.*'mean'"),
        ({"capacity": 1.0, "reduction": "none"}, "capacity.*'none'.*whole sample"),
        ({"capacity": 1.0, "reduction": "mean"}, "capacity.*'mean'.*whole sample"),
        *(
            (
                {**change, "mu": torch.zeros(()), "logvar": torch.zeros(()), "prior_mu": 0.0, "prior_logvar": 0.0},
                "mu.*0-d",
            )
            for change in ({**option, "reduction": "sum"} for option in SHAPELESS)
        ),
    ],
)
def test_reductions_that_make_no_sense(face: Any, change: dict[str, Any], message: str) -> None:
    for name in KL[:2]:
        with pytest.raises(ValueError, match=f"(?s){message}"):
            getattr(face, name)(**{**arguments_of(name), **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"estimator": "iwae"}, ValueError, "estimator.*'analytic', 'mc', 'stl'.*'iwae'"),
        ({"estimator": None}, ValueError, "estimator.*None"),
        ({"estimator": "mc", "symmetric": True}, ValueError, "estimator='mc'.*symmetric"),
    ],
)
def test_bad_estimators(face: Any, change: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        face.sample_with_kl(**{**arguments_of("sample_with_kl"), **change})


@pytest.mark.parametrize(
    ("number", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError)]
)
def test_bad_numbers_of_samples(face: Any, number: Any, error: Any) -> None:
    with pytest.raises(error, match=f"num_samples.*{number!r}"):
        face.reparameterize(torch.zeros(4, 3), torch.zeros(4, 3), num_samples=number)
    for estimator in ("analytic", "mc"):
        with pytest.raises(error, match=f"num_samples.*{number!r}"):
            face.sample_with_kl(torch.zeros(4, 3), torch.zeros(4, 3), num_samples=number, estimator=estimator)
    with pytest.raises(TypeError, match=r"mu.*list"):
        face.reparameterize([0.0], torch.zeros(4, 3), num_samples=2)


def test_bad_batches_of_kl_per_dim(face: Any) -> None:
    with pytest.raises(ValueError, match=r"mu must be \[B, ...\].*0-d"):
        face.kl_per_dim(torch.zeros(()), torch.zeros(()))
    with pytest.raises(TypeError, match=r"mu.*int64"):
        face.kl_per_dim(torch.zeros(3, dtype=torch.int64), torch.zeros(3))
    with pytest.raises(ValueError, match=r"logvar.*mu"):
        face.kl_per_dim(torch.zeros(3, 2), torch.zeros(3))
