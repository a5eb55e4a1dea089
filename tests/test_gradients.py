"""Derivatives: gradcheck and gradgradcheck in float64, and every way in which autograd calls a loss.

The numbers at float32 are held in test_kl.py and test_likelihoods.py; here it is whether the graph is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import (
    CLAMPED_AND_FLOORED,
    ELBO_REDUCTIONS,
    LIKELIHOOD_CASES,
    PRIORS,
    REDUCTIONS,
    Posterior,
    generator,
    posterior,
    training,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import vaefast
from vaefast import Parameterization
from vaefast.reference import LIKELIHOODS, PARAMETERIZATIONS

WIDE = torch.float64
EPS = 0.75  # exact in every dtype
EVERY_PARAMETERIZATION = [*map(Parameterization, PARAMETERIZATIONS), *CLAMPED_AND_FLOORED]
NAMED = pytest.mark.parametrize(
    "parameterization", EVERY_PARAMETERIZATION, ids=lambda p: f"{p.name}-{p.clamp}-{p.floor}"
)
PLAIN = pytest.mark.parametrize("parameterization", list(PARAMETERIZATIONS))
CASES = pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)


def rebuilt(p: Posterior, tensors: tuple[Tensor, ...]) -> list[Any]:
    """p's arguments with its tensors replaced, in order."""
    left = list(tensors)
    return [left.pop(0) if isinstance(t, Tensor) else t for t in p.args()]


def seeded(device: str) -> torch.Generator:
    return generator(1, device)


def posterior_functions(p: Posterior, parameterization: Any, reduction: str) -> dict[str, Callable[..., Any]]:
    options = {"parameterization": parameterization}
    device = str(p.mu.device)
    return {
        "gaussian_kl": lambda *t: vaefast.gaussian_kl(*rebuilt(p, t), reduction=reduction, **options),
        "sample_with_kl": lambda *t: vaefast.sample_with_kl(
            *rebuilt(p, t), reduction=reduction, generator=seeded(device), **options
        ),
        "reparameterize": lambda mu, raw, *_: vaefast.reparameterize(mu, raw, generator=seeded(device), **options),
    }


def clear_of_edges(p: Posterior, parameterization: Parameterization) -> Posterior:
    """Finite differences must not step over a clamp's edge."""
    if parameterization.clamp is not None:
        for edge in parameterization.clamp:
            p.raw[(p.raw - edge).abs() < 0.01] += 0.05
    return p


@NAMED
@pytest.mark.parametrize("prior", PRIORS)
def test_posterior_gradcheck(native: str, parameterization: Parameterization, prior: str) -> None:
    p = clear_of_edges(posterior((3, 2, 2), parameterization, prior, WIDE, native), parameterization).leaves()
    reduction = REDUCTIONS[PRIORS.index(prior) % len(REDUCTIONS)]
    for name, f in posterior_functions(p, parameterization, reduction).items():
        inputs = p.tensors()[:2] if name == "reparameterize" else p.tensors()
        assert gradcheck(f, inputs), name


@PLAIN
@pytest.mark.parametrize("prior", ["none", "full", "broadcast"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_posterior_gradgradcheck(native: str, parameterization: str, prior: str, reduction: str) -> None:
    p = posterior((2, 2), parameterization, prior, WIDE, native).leaves()
    assert gradgradcheck(posterior_functions(p, parameterization, reduction)["sample_with_kl"], p.tensors())


@pytest.mark.parametrize("parameterization", CLAMPED_AND_FLOORED, ids=lambda p: f"{p.name}-{p.floor}")
def test_clamped_gradgradcheck(native: str, parameterization: Parameterization) -> None:
    p = clear_of_edges(posterior((3, 3), parameterization, "none", WIDE, native), parameterization).leaves()
    assert gradgradcheck(posterior_functions(p, parameterization, "batchmean")["sample_with_kl"], p.tensors())


@pytest.mark.parametrize("noise", ["eps", "torch"])
def test_gradgradcheck_with_other_noise(native: str, noise: str) -> None:
    p = posterior((2, 3), dtype=WIDE, device=native).leaves()
    options = {"eps": torch.tensor(EPS, device=native)} if noise == "eps" else {}

    def f(mu: Tensor, raw: Tensor) -> Tensor:
        more = options or {"noise": "torch", "generator": seeded(native)}
        return vaefast.reparameterize(mu, raw, **more)

    assert gradcheck(f, p.tensors())
    assert gradgradcheck(f, p.tensors())


@CASES
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_reconstruction_gradchecks(native: str, likelihood: str, count: int, reduction: str, weighted: bool) -> None:
    data = training(likelihood, count, (3, 4), WIDE).inside(likelihood).to(native).leaves()
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0], device=native) if weighted else None

    def f(*recon: Tensor) -> Tensor:
        return vaefast.reconstruction_loss(
            recon, data.target, likelihood=likelihood, reduction=reduction, weight=weight
        )

    # one reduction element by element; of the others a product with a random vector
    fast = reduction != "batchmean" or weighted
    assert gradcheck(f, data.recon, fast_mode=fast)
    assert gradgradcheck(f, data.recon, fast_mode=fast)


@CASES
@pytest.mark.parametrize("reduction", ELBO_REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (3, 1), (1, 2)], ids=str)
def test_elbo_gradchecks(native: str, likelihood: str, count: int, reduction: str, shape: tuple[int, ...]) -> None:
    shapes = [(3, 2), *[shape] * (count - 1)]
    data = training(likelihood, count, (3, 2), WIDE, shapes).inside(likelihood).to(native).leaves()
    p = posterior((3, 2), "softplus", "broadcast", WIDE, native).leaves()

    def f(*t: Tensor) -> Any:
        return vaefast.elbo_terms(
            t[:count],
            data.target,
            *t[count:],
            likelihood=likelihood,
            beta=0.3,
            reduction=reduction,
            parameterization="softplus",
        )

    inputs = (*data.recon, *p.tensors())
    fast = reduction != "batchmean" or shape != ()
    assert gradcheck(f, inputs, fast_mode=fast)
    assert gradgradcheck(lambda *t: f(*t)[0], inputs, fast_mode=fast)


# -- what clamps and floors do


@PLAIN
def test_clamp_stops_gradients_outside_edges_included(backend: str, device: str, parameterization: str) -> None:
    """The values of torch.clamp; no gradient outside nor on the edges, all of it inside; for the sample and the KL."""
    raw = torch.tensor([[0.1, 0.25, 0.5, 0.75, 0.9]], device=device)
    mu = torch.ones_like(raw)
    p = Parameterization(parameterization, clamp=(0.25, 0.75))
    clamped, free = raw.clone().requires_grad_(), raw.clamp(0.25, 0.75).requires_grad_()
    inside = torch.tensor([[False, False, True, False, False]], device=device)
    for f in (
        lambda r, q: vaefast.reparameterize(mu, r, parameterization=q, eps=mu),
        lambda r, q: vaefast.gaussian_kl(mu, r, parameterization=q, reduction="none"),
    ):
        values = f(clamped, p), f(free, parameterization)
        assert torch.equal(*values)
        a, b = (torch.autograd.grad(v.sum(), leaf)[0] for v, leaf in zip(values, (clamped, free)))
        assert torch.equal(a, b * inside)
        assert (b != 0).all()


@PLAIN
def test_floor_is_added_to_the_std(backend: str, device: str, parameterization: str) -> None:
    """And enters the KL: the floored std is the posterior's."""
    p = posterior((4, 5), parameterization, dtype=WIDE, device=device)
    floored = Parameterization(parameterization, floor=0.3)
    std = PARAMETERIZATIONS[parameterization].std(p.raw) + 0.3
    z, kl = vaefast.sample_with_kl(p.mu, p.raw, parameterization=floored, eps=torch.tensor(1.0, device=device))
    torch.testing.assert_close(z, p.mu + std, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kl, vaefast.gaussian_kl(p.mu, std, parameterization="std"), rtol=1e-12, atol=1e-12)


@PLAIN
def test_parameterizations_mean_what_they_say(backend: str, device: str, parameterization: str) -> None:
    """By name or as an object, the std is the activation's, in the sample and in the KL."""
    p = posterior((4, 5), parameterization, dtype=WIDE, device=device)
    std = {
        "logvar": lambda r: torch.exp(r / 2),
        "log_std": torch.exp,
        "std": lambda r: r,
        "var": torch.sqrt,
        "softplus": torch.nn.functional.softplus,
    }.get(parameterization, PARAMETERIZATIONS[parameterization].std)(p.raw)
    q, prior = torch.distributions.Normal(p.mu, std), torch.distributions.Normal(0.0, 1.0)
    for given in (parameterization, Parameterization(parameterization)):
        z, kl = vaefast.sample_with_kl(
            p.mu, p.raw, parameterization=given, reduction="none", eps=torch.tensor(EPS, device=device)
        )
        torch.testing.assert_close(z, p.mu + EPS * std, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(kl, torch.distributions.kl_divergence(q, prior), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("raw", [-1e4, -200.0, -60.0, 60.0, 200.0, 1e4])
def test_softplus_far_out(backend: str, device: str, raw: float) -> None:
    """Where its exponential would overflow it is the identity."""
    r = torch.full((2, 3), raw, device=device, requires_grad=True)
    z = vaefast.reparameterize(torch.zeros_like(r), r, parameterization="softplus", eps=torch.ones_like(r))
    (gradient,) = torch.autograd.grad(z.sum(), r)
    expected = max(raw, 0.0)
    assert z.tolist() == [[pytest.approx(expected, rel=1e-6, abs=1e-25)] * 3] * 2
    assert gradient.tolist() == [[pytest.approx(1.0 if raw > 0 else 0.0, abs=1e-25)] * 3] * 2


# -- the ways in which autograd is called


def whole_step(device: str) -> tuple[list[Tensor], Callable[[], vaefast.ELBOTerms]]:
    data, p = (
        training("gaussian", 2, (6, 50)).to(device).leaves(),
        posterior((6, 8), prior="broadcast", device=device).leaves(),
    )

    def terms() -> vaefast.ELBOTerms:
        return vaefast.elbo_terms(data.recon, data.target, *p.args(), likelihood="gaussian", beta=0.5)

    return [*data.recon, *p.tensors()], terms


def assert_all_close(actual: Any, expected: Any, atol: float = 1e-7) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-6, atol=atol)


def test_upstream_gradient_scales(backend: str, device: str) -> None:
    leaves, terms = whole_step(device)
    once = torch.autograd.grad(terms().loss, leaves)
    for factor in (3.0, -0.5, 0.0):
        assert_all_close(torch.autograd.grad(factor * terms().loss, leaves), [factor * g for g in once])
        given = torch.autograd.grad(terms().loss, leaves, torch.tensor(factor, device=device))
        assert_all_close(given, [factor * g for g in once])


@pytest.mark.parametrize("reduction", ["none", "per_sample"])
@CASES
def test_upstream_gradient_of_many_losses(
    backend: str, device: str, likelihood: str, count: int, reduction: str
) -> None:
    """Row by row: the gradient of a weighted sum is the weighted gradient."""
    data = training(likelihood, count, (6, 50)).to(device).leaves()
    losses = vaefast.reconstruction_loss(data.recon, data.target, likelihood=likelihood, reduction=reduction)
    rows = torch.linspace(-2, 3, 6, device=device)

    def by_rows(g: Tensor) -> Tensor:
        return rows.view(-1, *[1] * (g.dim() - 1))

    weighted = torch.autograd.grad(
        losses, data.recon, rows if reduction == "per_sample" else rows[:, None].expand(6, 50)
    )
    total = vaefast.reconstruction_loss(data.recon, data.target, likelihood=likelihood, reduction="sum")
    # a mixture's elements go by the plain formula without kernels, and their sum by the closed form: each has the bound
    apart = 3 * 4e-6 if backend == "reference" and LIKELIHOODS[likelihood].planes else 1e-7
    assert_all_close(weighted, [g * by_rows(g) for g in torch.autograd.grad(total, data.recon)], apart)


@CASES
@pytest.mark.parametrize("reduction", [r for r in REDUCTIONS if r not in ("none", "per_sample")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kept_gradients_survive_retain_graph(
    backend: str, device: str, likelihood: str, count: int, reduction: str, dtype: torch.dtype
) -> None:
    """Backward may scale what forward kept in place, but not while the graph lives: each pass is right."""
    data = training(likelihood, count, (6, 50), dtype).to(device).leaves()
    loss = vaefast.reconstruction_loss(data.recon, data.target, likelihood=likelihood, reduction=reduction)
    first = torch.autograd.grad(loss, data.recon, torch.tensor(2.0, device=device), retain_graph=True)
    copies = [g.clone() for g in first]
    again = torch.autograd.grad(loss, data.recon, torch.tensor(2.0, device=device), retain_graph=True)
    last = torch.autograd.grad(loss, data.recon, torch.tensor(4.0, device=device))
    for a, b, c, d in zip(first, copies, again, last):
        assert torch.equal(a, b)
        assert torch.equal(b, c)
        torch.testing.assert_close(d, 2 * b, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-7)


def test_adaptive_weight_of_latent_diffusion(backend: str, device: str) -> None:
    """Two autograd.grad calls for the norms, then backward through both losses, as its discriminator weight does."""
    g = generator(0)
    weight = (torch.randn(50, 20, generator=g) / 5).to(device).requires_grad_()
    x = torch.rand(6, 50, generator=g).to(device)
    z = torch.randn(6, 20, generator=g).to(device)
    recon = z @ weight.t()
    nll = vaefast.reconstruction_loss(recon, x, likelihood="laplace")
    other = -recon.mean()
    nll_grad = torch.autograd.grad(nll, weight, retain_graph=True)[0]
    other_grad = torch.autograd.grad(other, weight, retain_graph=True)[0]
    factor = (nll_grad.norm() / (other_grad.norm() + 1e-4)).detach()
    (nll + factor * other).backward()
    assert_all_close([weight.grad], [nll_grad + factor * other_grad])
    plain = z @ weight.detach().requires_grad_().t()
    exact = torch.autograd.grad((plain - x).abs().sum(1).mean(), plain)[0]
    assert_all_close([nll_grad], [exact.t() @ z])


def test_terms_differentiate_separately(backend: str, device: str) -> None:
    leaves, terms = whole_step(device)
    recon_leaves, latent_leaves = leaves[:2], leaves[2:]
    t = terms()
    loss_grads = torch.autograd.grad(t.loss, leaves, retain_graph=True)
    nll_grads = torch.autograd.grad(t.reconstruction, leaves, retain_graph=True, allow_unused=True)
    kl_grads = torch.autograd.grad(t.kl, leaves, allow_unused=True)
    assert_all_close(loss_grads[:2], nll_grads[:2])
    assert_all_close(loss_grads[2:], [0.5 * g for g in kl_grads[2:]])
    for unrelated in (*nll_grads[2:], *kl_grads[:2]):
        assert unrelated is None or (unrelated == 0).all()
    t = terms()
    mixed = torch.autograd.grad(t.loss + 2 * t.reconstruction + 3 * t.kl, leaves)
    assert_all_close(mixed[:2], [3 * g for g in loss_grads[: len(recon_leaves)]])
    assert_all_close(mixed[2:], [7 * g for g in loss_grads[-len(latent_leaves) :]])


def test_elbo_is_its_parts(backend: str, device: str) -> None:
    leaves, terms = whole_step(device)
    t = terms()
    torch.testing.assert_close(t.loss, t.reconstruction + 0.5 * t.kl)
    nll = vaefast.reconstruction_loss(
        leaves[:2], training("gaussian", 2, (6, 50)).target.to(device), likelihood="gaussian"
    )
    kl = vaefast.gaussian_kl(*leaves[2:])
    torch.testing.assert_close(t.reconstruction, nll)
    torch.testing.assert_close(t.kl, kl)
    assert_all_close(torch.autograd.grad(t.loss, leaves), torch.autograd.grad(nll + 0.5 * kl, leaves))


@pytest.mark.parametrize("prior", ["none", "full"])
@pytest.mark.parametrize("reduction", ["per_sample", "sum"])
def test_elbo_loss_is_the_loss_of_the_terms(backend: str, device: str, reduction: str, prior: str) -> None:
    """Also where its node has no other outputs."""
    data, p = (
        training("gaussian", 2, (4, 50)).to(device).leaves(),
        posterior((4, 6), prior=prior, device=device).leaves(),
    )
    leaves = [*data.recon, *p.tensors()]
    options: dict[str, Any] = {"likelihood": "gaussian", "beta": 0.5, "reduction": reduction}
    found = []
    for f in (vaefast.elbo_loss, lambda *a, **k: vaefast.elbo_terms(*a, **k).loss):
        loss = f(data.recon, data.target, *p.args(), **options)
        results = [loss.detach()]
        for upstream, retain in ((1.0, True), (3.0, False)):
            results += torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream), retain_graph=retain)
        twice = f(data.recon, data.target, *p.args(), **options).sum()
        grads = torch.autograd.grad(twice, leaves, create_graph=True)
        results += torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        found.append(results)
    for one, other in zip(*found, strict=True):
        if backend == "native":
            assert torch.equal(one, other)
        else:  # which adds up the loss alone in one go
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("which", [0, 1, (0, 1), 2, 3])
def test_gradients_of_some_inputs_only(backend: str, device: str, which: Any) -> None:
    which = which if isinstance(which, tuple) else (which,)
    p = posterior((4, 6), prior="broadcast", device=device)
    every = p.leaves()
    options = {"eps": torch.tensor(EPS, device=device)}
    z, kl = vaefast.sample_with_kl(*every.args(), **options)
    full = torch.autograd.grad(z.square().sum() + kl, every.tensors())
    some = [t.clone().requires_grad_(k in which) for k, t in enumerate(p.tensors())]
    z, kl = vaefast.sample_with_kl(*some, **options)
    (z.square().sum() + kl).backward()
    for k, t in enumerate(some):
        if k in which:
            assert torch.equal(t.grad, full[k])
        else:
            assert t.grad is None


@pytest.mark.parametrize("use", ["z", "kl"])
def test_one_output_only(backend: str, device: str, use: str) -> None:
    """The other output's absent gradient is no gradient; priors have no part in z."""
    p = posterior((4, 6), prior="full", device=device).leaves()
    z, kl = vaefast.sample_with_kl(*p.args(), eps=torch.tensor(EPS, device=device))
    grads = torch.autograd.grad(z.sum() if use == "z" else kl, p.tensors(), allow_unused=True)
    if use == "kl":
        assert_all_close(grads, torch.autograd.grad(vaefast.gaussian_kl(*p.args()), p.tensors()))
    else:
        assert torch.equal(grads[0], torch.ones_like(p.mu))
        assert all(g is None or (g == 0).all() for g in grads[2:])


def test_beta_as_a_tensor(backend: str, device: str) -> None:
    leaves, _ = whole_step(device)
    x = training("gaussian", 2, (6, 50)).target.to(device)
    beta = torch.tensor(0.5, device=device, requires_grad=True)
    t = vaefast.elbo_terms(leaves[:2], x, *leaves[2:], likelihood="gaussian", beta=beta)
    fixed = vaefast.elbo_terms(leaves[:2], x, *leaves[2:], likelihood="gaussian", beta=0.5)
    torch.testing.assert_close(t.loss, fixed.loss)
    grads = torch.autograd.grad(t.loss, [*leaves, beta])
    assert_all_close(grads[:-1], torch.autograd.grad(fixed.loss, leaves))
    torch.testing.assert_close(grads[-1], t.kl.detach())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend: str, device: str, mode: Any) -> None:
    leaves, terms = whole_step(device)
    expected = terms()
    with mode():
        t = terms()
        z, kl = vaefast.sample_with_kl(*leaves[2:4], eps=torch.tensor(EPS, device=device))
        fresh = [leaf.clone() for leaf in leaves]
        vaefast.sample_with_kl(*fresh[2:4])
    for value in (*t, z, kl):
        assert not value.requires_grad
        assert value.grad_fn is None
    assert_all_close(t, [e.detach() for e in expected])


def test_anomaly_mode(backend: str, device: str) -> None:
    leaves, terms = whole_step(device)
    expected = torch.autograd.grad(terms().loss, leaves)
    with torch.autograd.set_detect_anomaly(True):
        assert_all_close(torch.autograd.grad(terms().loss, leaves), expected)


def test_inplace_change_is_noticed(native: str) -> None:
    """What backward needs again is guarded by its version, as everywhere in PyTorch."""
    p = posterior(device=native)
    mu, raw = p.mu, p.raw.requires_grad_()
    moved = raw + 0
    kl = vaefast.gaussian_kl(mu, moved)
    moved.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.backward()


def test_hooks_and_leaf_accumulation(backend: str, device: str) -> None:
    leaves, terms = whole_step(device)
    expected = torch.autograd.grad(terms().loss, leaves)
    for leaf in leaves:
        leaf.grad = None
    terms().loss.backward()
    terms().loss.backward()
    assert_all_close([leaf.grad for leaf in leaves], [2 * e for e in expected])


def test_offloaded_activations(backend: str, device: str) -> None:
    leaves, terms = whole_step(device)
    expected = torch.autograd.grad(terms().loss, leaves)
    with torch.autograd.graph.save_on_cpu():
        loss = terms().loss
    assert_all_close(torch.autograd.grad(loss, leaves), expected)


# -- what only the reference can do


def test_target_and_weight_have_gradients(device: str) -> None:
    data = training("gaussian", 2, (3, 4), WIDE).to(device).leaves()
    target = data.target.clone().requires_grad_()
    weight = torch.rand(4, dtype=WIDE, generator=generator(2)).to(device).requires_grad_()

    def f(target: Tensor, weight: Tensor, *recon: Tensor) -> Tensor:
        return vaefast.reconstruction_loss(recon, target, likelihood="gaussian", weight=weight)

    assert gradcheck(f, (target, weight, *data.recon))
    p = posterior((3, 2), dtype=WIDE, device=device)
    assert gradcheck(
        lambda t, w, *r: vaefast.elbo_loss(r, t, p.mu, p.raw, likelihood="gaussian", weight=w),
        (target, weight, *data.recon),
    )


@CASES
def test_every_target_has_a_gradient(backend: str, device: str, likelihood: str, count: int) -> None:
    """Between whole numbers and within a bin, where the data have a slope; where they are what training meets, a
    number."""
    entry = LIKELIHOODS[likelihood]
    if entry.support == "class":
        pytest.skip("classes have no slope")
    data = training(likelihood, count, (3, 4), WIDE).inside(likelihood).to(device)

    def f(target: Tensor) -> Tensor:
        return vaefast.reconstruction_loss(data.recon, target, likelihood=likelihood, reduction="none")

    with vaefast.use_backend("auto" if backend == "native" else backend):
        target = data.target.clone().requires_grad_()
        (at_data,) = torch.autograd.grad(f(target).sum(), target)
        assert at_data.isfinite().all()
        inside = data.target.clamp(0.1, 0.9) if entry.support == "unit" else data.target + 0.25
        if entry.support == "positive":
            inside = data.target.clamp(min=0.1)
        if not entry.planes:  # of bins that are coupled, what is seen of one is a step
            assert gradcheck(f, inside.requires_grad_(), atol=1e-4)


def test_eps_has_a_gradient(device: str) -> None:
    p = posterior((3, 4), dtype=WIDE, device=device).leaves()
    eps = torch.randn(3, 4, dtype=WIDE, generator=generator(2)).to(device).requires_grad_()
    assert gradcheck(lambda m, r, e: vaefast.sample_with_kl(m, r, eps=e), (p.mu, p.raw, eps))


def test_torch_func(device: str) -> None:
    p, data = posterior((5, 6), device=device, dtype=WIDE), training("bernoulli", 1, (5, 9), WIDE).to(device)

    def loss(mu: Tensor, raw: Tensor, recon: Tensor, x: Tensor) -> Tensor:
        return vaefast.elbo_loss(recon, x, mu, raw, reduction="sum")

    args = (p.mu, p.raw, data.recon[0], data.target)
    leaves = [t.clone().requires_grad_() for t in args[:3]]
    expected = torch.autograd.grad(loss(*leaves, data.target), leaves)
    assert_all_close(torch.func.grad(loss, argnums=(0, 1, 2))(*args), expected)
    rows = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*args)
    assert_all_close(rows, expected)
    tangents = tuple(torch.ones_like(t) for t in args)
    value, tangent = torch.func.jvp(loss, args, tangents)
    torch.testing.assert_close(value, loss(*args))
    target_part = -data.recon[0].sum()  # d nll / d x = -logits
    torch.testing.assert_close(tangent, sum(e.sum() for e in expected) + target_part)
    hessian = torch.func.hessian(lambda m: vaefast.gaussian_kl(m, p.raw, reduction="sum"))(p.mu)
    torch.testing.assert_close(hessian.view(30, 30), torch.eye(30, dtype=WIDE, device=device))


def test_forward_mode(device: str) -> None:
    p = posterior((3, 4), device=device, dtype=WIDE)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(p.mu, torch.ones_like(p.mu))
        kl = torch.autograd.forward_ad.unpack_dual(vaefast.gaussian_kl(dual, p.raw, reduction="sum"))
        torch.testing.assert_close(kl.tangent, p.mu.sum())
    mu = p.mu.requires_grad_()
    kl = vaefast.gaussian_kl(mu, p.raw, reduction="sum")
    assert kl.grad_fn is not None, "after the block the kernels are back"


# -- second derivatives where inputs depend on one another


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_double_backward_of_related_inputs(native: str, likelihood: str) -> None:
    """raw, the prior and the reconstruction are computed from mu: each share must be counted once."""
    scale = torch.linspace(0.5, 2.0, 6, dtype=WIDE, device=native)
    x = torch.linspace(-1, 1, 12, dtype=WIDE, device=native).view(2, 6)

    def f(mu: Tensor) -> Tensor:
        raw = torch.sin(mu) * scale
        z, kl = vaefast.sample_with_kl(mu, raw, mu.mean(0), raw * 0.1, eps=scale)
        nll = vaefast.reconstruction_loss((z.tanh(), z * 0.1), x, likelihood=likelihood)
        return nll + kl + vaefast.elbo_loss((mu * z, raw), x, mu, mu * mu, likelihood=likelihood)

    mu = torch.randn(2, 6, dtype=WIDE, generator=generator(4)).to(native).requires_grad_()
    assert gradcheck(f, mu)
    assert gradgradcheck(f, mu)
    # gradgradcheck holds a gradient against its own derivative: that it is the gradient is told by the one kernels give
    (first,) = torch.autograd.grad(f(mu), mu)
    (differentiable,) = torch.autograd.grad(f(mu), mu, create_graph=True)
    torch.testing.assert_close(differentiable, first, rtol=1e-12, atol=1e-12)


def test_one_tensor_in_every_place(backend: str, device: str) -> None:
    t = torch.randn(3, 4, dtype=WIDE, generator=generator(0)).to(device).requires_grad_()
    assert gradcheck(lambda t: vaefast.elbo_terms((t, t), t.detach(), t, t, t, t, likelihood="gaussian"), t)
    assert gradcheck(lambda t: vaefast.sample_with_kl(t, t, t * 2, t, eps=torch.tensor(EPS, device=device)), t)


def test_gradient_penalty(backend: str, device: str) -> None:
    """create_graph through a loss, as a penalty on the gradient's norm does, in float32."""
    leaves, terms = whole_step(device)
    grads = torch.autograd.grad(terms().loss, leaves, create_graph=True)
    assert_all_close([g.detach() for g in grads], torch.autograd.grad(terms().loss, leaves))
    penalty = sum(g.square().sum() for g in grads)
    actual = torch.autograd.grad(penalty, leaves)
    with vaefast.use_backend("reference"):
        grads = torch.autograd.grad(terms().loss, leaves, create_graph=True)
        exact = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    for a, e in zip(actual, exact):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_clamped_double_backward_keeps_one_open_end(native: str) -> None:
    """A clamp with one infinite bound clamps on the other side under create_graph too."""
    p = Parameterization("logvar", clamp=(-1.0, float("inf")))
    mu = torch.zeros(1, 3, dtype=WIDE, device=native)
    raw = torch.tensor([[-2.0, -0.5, 1.0]], dtype=WIDE, device=native, requires_grad=True)
    kl = vaefast.gaussian_kl(mu, raw, parameterization=p, reduction="sum")
    (first,) = torch.autograd.grad(kl, raw, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), raw)
    inside = torch.tensor([[0.0, 1.0, 1.0]], dtype=WIDE, device=native)
    torch.testing.assert_close(first, inside * 0.5 * torch.expm1(raw))
    torch.testing.assert_close(second, inside * 0.5 * torch.exp(raw))
