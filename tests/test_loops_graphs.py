"""Training loops that operate on the graph: checkpointing, double backward, torch.func, saved tensors, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import LIKELIHOOD_CASES, generator, nll_of, textbook_kl, training
from loops import Inputs, assert_right, data, everything, inputs, kl_sum, noise_of, plain
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import vaefast

WIDE = torch.float64
Results = tuple[Tensor, list[Tensor]]


def loss_and_gradients(run: Callable[..., Results], t: Inputs, d: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    torch.manual_seed(3)
    loss, samples = run(t, d)
    return loss.detach(), samples, list(torch.autograd.grad(loss, t))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_reentrant_and_not_has_identical_noise(backend: str, device: str, use_reentrant: bool) -> None:
    """Backward computes the step again, and draws again: bit for bit as without checkpointing."""
    t, d = inputs(device=device), data(device=device)
    drawn: list[list[Tensor]] = []

    def step(*values: Tensor) -> tuple[Tensor, ...]:
        loss, samples = everything(Inputs(*values), d)
        drawn.append([s.detach() for s in samples])
        return loss, *samples

    def checkpointed(t: Inputs, _: Any) -> Results:
        loss, *samples = checkpoint(step, *t, use_reentrant=use_reentrant)
        return loss, samples

    expected = loss_and_gradients(everything, t, d)
    torch.manual_seed(3)
    # to the end, so that the second list of samples is whole
    with set_checkpoint_early_stop(False):
        loss, _ = checkpointed(t, d)
    # a loop goes on drawing before its backward; and reentrant checkpointing knows backward() alone
    vaefast.reparameterize(t.mu, t.raw)
    loss.backward()
    assert len(drawn) == 2, "the step was computed again"
    assert all(torch.equal(a, b) for a, b in zip(*drawn))
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(a.grad, e) for a, e in zip(t, expected[2]))


def test_retain_graph_gives_the_same_gradients_again(backend: str, device: str) -> None:
    t, d = inputs(device=device), data(device=device)
    loss, samples = everything(t, d)
    first = torch.autograd.grad(loss, t, retain_graph=True)
    copies = [g.clone() for g in first]
    thrice = torch.autograd.grad(3 * loss, t, retain_graph=True)
    again = torch.autograd.grad(loss, t)
    for a, b, c, e in zip(first, copies, thrice, again):
        assert torch.equal(a, b), "a later pass wrote into what an earlier one had given"
        assert torch.equal(e, b)
        torch.testing.assert_close(c, 3 * b, rtol=1e-6, atol=1e-6)
    assert_right(loss, samples, list(first), t, d)


def test_create_graph_and_double_backward(backend: str, device: str) -> None:
    """A penalty on the gradient of everything, against PyTorch's double backward of the plain expressions."""
    t, d = inputs(device=device, dtype=WIDE), data(device=device)
    d = d._replace(x=d.x.double())

    def penalty(loss: Tensor, at: Inputs) -> list[Tensor]:
        grads = torch.autograd.grad(loss, at, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), at))

    loss, samples = everything(t, d)
    exact_at = t.leaves()
    exact = penalty(plain(exact_at, d, noise_of(t, samples)), exact_at)
    for a, e in zip(penalty(loss, t), exact):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


def test_gradient_penalty_through_an_elbo(backend: str, device: str) -> None:
    """On the loss's gradient in the data's encoding: the penalty trains the encoder through its own gradient."""
    g = generator(0)
    w, x, eps = (torch.randn(*s, generator=g, dtype=WIDE).to(device) for s in ((8, 12), (5, 8), (5, 6)))
    recon_w = torch.randn(6, 8, generator=g, dtype=WIDE).to(device)
    w.requires_grad_()

    def trained(elbo: Callable[..., Tensor]) -> Tensor:
        at = x.clone().requires_grad_()
        mu, logvar = torch.tanh(at @ w).chunk(2, 1)
        (slope,) = torch.autograd.grad(elbo(mu, logvar), at, create_graph=True)
        return torch.autograd.grad((slope.norm(dim=1) - 1).square().mean(), w)[0]

    def ours(mu: Tensor, logvar: Tensor) -> Tensor:
        z, _ = vaefast.sample_with_kl(mu, logvar, eps=eps)
        return vaefast.elbo_loss(z @ recon_w, x, mu, logvar, likelihood="gaussian", beta=0.5)

    def theirs(mu: Tensor, logvar: Tensor) -> Tensor:
        z = mu + torch.exp(0.5 * logvar) * eps
        return (0.5 * ((z @ recon_w - x) ** 2).sum() + 0.5 * kl_sum(mu, logvar)) / 5

    torch.testing.assert_close(trained(ours), trained(theirs), rtol=1e-9, atol=1e-9)


# -- torch.func, which goes to the reference by itself


def flat_loss(t: Inputs, d: Any, eps: list[Tensor]) -> Tensor:
    """Every loss that draws nothing, and samples of given noise."""
    z, kl = vaefast.sample_with_kl(t.mu, t.raw, eps=eps[0])
    return (
        kl
        + vaefast.reparameterize(t.mu, t.raw, eps=eps[1]).sin().sum()
        + vaefast.DiagonalGaussian(t.moments).kl(reduction="batchmean")
        + vaefast.reconstruction_loss(t.logits, d.x)
        + vaefast.reconstruction_loss(t.classes, d.labels, likelihood="categorical", reduction="mean")
        + vaefast.elbo_loss((t.mean, t.logvar), d.x, t.mu, t.raw, likelihood="gaussian", beta=0.5)
        + vaefast.multi_tensor_gaussian_kl([t.mu, t.raw], [t.raw, t.mu])
        + z.sin().sum()
    )


@pytest.fixture
def case(device: str) -> tuple[Callable[[Inputs], Tensor], Inputs]:
    t, d = inputs(device=device, dtype=WIDE), data(device=device)
    eps = [torch.randn(5, 6, dtype=WIDE, generator=generator(k)).to(device) for k in range(2)]
    return lambda at: flat_loss(at, d, eps), t


def test_func_grad(case: Any) -> None:
    """The transform's gradients are those of the kernels."""
    f, t = case
    for a, e in zip(grad(f)(t.to(WIDE)), torch.autograd.grad(f(t), t)):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


def test_func_jvp(case: Any) -> None:
    """Along a direction, against the slope of finite differences."""
    f, t = case
    at = t.to(WIDE)
    along = Inputs(*(torch.randn(v.shape, dtype=WIDE, generator=generator(9)).to(v.device) for v in at))
    value, slope = jvp(f, (at,), (along,))
    torch.testing.assert_close(value, f(at), rtol=1e-12, atol=1e-12)
    step = 1e-6
    there, back = (f(Inputs(*(v + s * w for v, w in zip(at, along)))) for s in (step, -step))
    torch.testing.assert_close(slope, (there - back) / (2 * step), rtol=1e-6, atol=1e-6)


def test_func_hessian(device: str) -> None:
    """Of the ELBO: that of the textbook's expressions."""
    g = generator(0)
    mu, raw, recon, x = (torch.randn(3, 4, generator=g, dtype=WIDE).to(device) for _ in range(4))

    def plain_elbo(mu: Tensor, raw: Tensor, recon: Tensor) -> Tensor:
        return (torch.log1p(recon.exp()) - recon * x).sum() + textbook_kl(mu, raw).sum()

    def ours(mu: Tensor, raw: Tensor, recon: Tensor) -> Tensor:
        return vaefast.elbo_loss(recon, x, mu, raw, reduction="sum")

    for a, e in zip(*(hessian(f, argnums=(0, 1, 2))(mu, raw, recon) for f in (ours, plain_elbo))):
        for block, exact in zip(a, e):
            torch.testing.assert_close(block, exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
def test_per_sample_gradients(device: str, likelihood: str, count: int) -> None:
    """vmap over grad, as differential privacy clips them: a sample's is that of its own loss, for every likelihood."""
    d = training(likelihood, count, (4, 7), WIDE).to(device).leaves()

    def loss(recon: tuple[Tensor, ...], x: Tensor) -> Tensor:
        one = tuple(p.unsqueeze(0) for p in recon)
        return vaefast.reconstruction_loss(one, x.unsqueeze(0), likelihood=likelihood, reduction="sum")

    found = vmap(grad(loss))(tuple(p.detach() for p in d.recon), d.target)
    exact = torch.autograd.grad(nll_of(likelihood, d).sum(), d.recon)
    for a, e in zip(found, exact):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


def test_per_sample_gradients_with_integer_classes(device: str) -> None:
    logits = torch.randn(4, 5, 7, dtype=WIDE, generator=generator(0)).to(device)
    labels = torch.randint(5, (4, 7), generator=generator(1)).to(device)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return vaefast.reconstruction_loss(logits[None], labels[None], likelihood="categorical", reduction="sum")

    exact = torch.softmax(logits, 1) - torch.nn.functional.one_hot(labels, 5).transpose(1, 2)
    torch.testing.assert_close(vmap(grad(loss))(logits, labels), exact, rtol=1e-9, atol=1e-10)


def zeros(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(shape), torch.zeros(shape)


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


# each with a batch of four, the samples along the dimension that is told
DRAWS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {
    "reparameterize": (vaefast.reparameterize, zeros(4, 3, 5), 0),
    "sample_with_kl": (lambda m, r: vaefast.sample_with_kl(m, r)[0], zeros(4, 3, 5), 0),
    "along another dimension": (vaefast.reparameterize, zeros(3, 4, 5), 1),
    "along the last of channels last": (vaefast.reparameterize, tuple(map(last, zeros(3, 2, 5, 4))), 3),
    "num_samples": (lambda m, r: vaefast.reparameterize(m, r, num_samples=3), zeros(4, 3, 5), 0),
    "torch noise": (lambda m, r: vaefast.reparameterize(m, r, noise="torch"), zeros(4, 3, 5), 0),
    "mc": (lambda m, r: vaefast.sample_with_kl(m, r, estimator="mc")[0], zeros(4, 3, 5), 0),
    "packed": (lambda m: vaefast.DiagonalGaussian(m, dim=0).sample(), (torch.zeros(4, 6, 5),), 0),
    "multi": (lambda m, r: torch.stack(vaefast.multi_tensor_sample_with_kl([m, m], [r, r])[0]), zeros(4, 3, 5), 0),
    "a generator": (lambda m, r: vaefast.reparameterize(m, r, generator=generator(1, m.device.type)), zeros(4, 3), 0),
}


@pytest.mark.parametrize("name", list(DRAWS))
@pytest.mark.parametrize("randomness", ["different", "same", "error"])
def test_vmap_honours_randomness(device: str, name: str, randomness: str) -> None:
    draw, args, dim = DRAWS[name]
    args = tuple(t.to(device) for t in args)
    mapped = vmap(draw, in_dims=dim, randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness error mode"):
            mapped(*args)
        return
    z = mapped(*args)
    assert z.shape[0] == 4
    if randomness == "same":
        assert all(torch.equal(row, z[0]) for row in z)
    else:
        assert all((a != b).all() for k, a in enumerate(z) for b in z[:k])
    assert z[0].flatten().unique().numel() == z[0].numel(), "elements of a sample are different draws"


def test_vmap_over_a_graph_that_samples(device: str) -> None:
    """Per-sample gradients of a whole step: each sample's noise is in its own gradient."""
    mu, raw = (torch.randn(4, 6, generator=generator(k), dtype=WIDE).to(device) for k in range(2))

    def loss(mu: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        z = vaefast.reparameterize(mu, raw)
        return z.square().sum() + vaefast.gaussian_kl(mu, raw, reduction="sum"), z

    (dmu, draw), z = vmap(grad(loss, argnums=(0, 1), has_aux=True), randomness="different")(mu, raw)
    torch.testing.assert_close(dmu, 2 * z + mu, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(draw, z * (z - mu) + 0.5 * torch.expm1(raw), rtol=1e-9, atol=1e-9)


# -- what backward keeps


def test_saved_tensors_hooks(backend: str, device: str) -> None:
    """Each tensor that is kept goes through the hooks: here it comes back as another, equal one."""
    t, d = inputs(device=device), data(device=device)
    expected = loss_and_gradients(everything, t, d)
    count = [0, 0]

    def pack(kept: Tensor) -> Tensor:
        count[0] += 1
        return kept.detach().clone()

    def unpack(packed: Tensor) -> Tensor:
        count[1] += 1
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found = loss_and_gradients(everything, t, d)
    assert count[0] > 0 and count[1] > 0
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, e) for a, e in zip(found[2], expected[2]))


@pytest.mark.parametrize("pin_memory", [False, pytest.param(True, marks=pytest.mark.cuda)])
def test_offloading_to_the_cpu(backend: str, device: str, pin_memory: bool) -> None:
    t, d = inputs(device=device), data(device=device)
    expected = loss_and_gradients(everything, t, d)
    if pin_memory and not torch.cuda.is_available():
        pytest.skip("pinned memory needs a CUDA device; run `make gpu` on a machine with one")
    with torch.autograd.graph.save_on_cpu(pin_memory=pin_memory):
        found = loss_and_gradients(everything, t, d)
    assert all(torch.equal(a, e) for a, e in zip(found[2], expected[2]))


def test_anomaly_mode_finds_the_nan(backend: str, device: str) -> None:
    """It changes no gradient, and where one is NaN it names the node."""
    t, d = inputs(device=device), data(device=device)
    expected = loss_and_gradients(everything, t, d)
    with torch.autograd.set_detect_anomaly(True):
        found = loss_and_gradients(everything, t, d)
        assert all(torch.equal(a, e) for a, e in zip(found[2], expected[2]))
        for f in (
            lambda t: vaefast.gaussian_kl(t.mu, t.raw),
            lambda t: vaefast.reparameterize(t.mu, t.raw).sum(),
            lambda t: vaefast.reconstruction_loss(t.logits, d.x),
            lambda t: vaefast.elbo_loss(t.logits, d.x, t.mu, t.raw),
        ):
            bad = Inputs(*(torch.full_like(v, float("nan")) for v in t)).leaves()
            with (
                pytest.warns(UserWarning, match="Error detected in"),
                pytest.raises(RuntimeError, match="returned nan values"),
            ):
                f(bad).backward()


@pytest.mark.parametrize("draw", ["sample_with_kl", "reparameterize", "DiagonalGaussian", "multi_tensor"])
def test_hooks_on_z(backend: str, device: str, draw: str) -> None:
    """A hook sees z's gradient before the node does, and what it returns is what goes on; the KL's part stays."""
    mu, raw = (torch.randn(4, 6, generator=generator(k)).to(device).requires_grad_() for k in range(2))
    kl = torch.zeros((), device=device)
    if draw == "sample_with_kl":
        z, kl = vaefast.sample_with_kl(mu, raw, reduction="sum")
    elif draw == "reparameterize":
        z = vaefast.reparameterize(mu, raw)
    elif draw == "DiagonalGaussian":
        z, kl = vaefast.DiagonalGaussian(torch.cat((mu, raw), 1)).sample_with_kl(reduction="sum")
    else:
        (z,), kl = vaefast.multi_tensor_sample_with_kl([mu], [raw])
    seen: list[Tensor] = []

    def clip(g: Tensor) -> Tensor:
        seen.append(g.clone())
        return g.clamp(-0.5, 0.5)

    z.register_hook(clip)
    z.retain_grad()
    after: list[Tensor] = []
    raw.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.clone()))
    upstream = torch.randn(4, 6, generator=generator(5)).to(device)
    ((z * upstream).sum() + kl).backward()
    clipped, eps = upstream.clamp(-0.5, 0.5), (z - mu).detach()
    of_kl = (mu.detach(), 0.5 * torch.expm1(raw.detach())) if draw != "reparameterize" else (0.0, 0.0)
    assert torch.equal(seen[0], upstream)
    assert torch.equal(z.grad, clipped)
    torch.testing.assert_close(mu.grad, clipped + of_kl[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(raw.grad, 0.5 * clipped * eps + of_kl[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(after[0], raw.grad)
