"""Random numbers in training loops: seeds, forks, generators, also one a sample, their states, determinism, graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from inputs import FLOATING, assert_within, generator, posterior
from loops import assert_right, data, everything, inputs
from test_cuda import Replayed, rng_state, set_rng_state
from test_memory import kept_bytes
from torch import Tensor

import vaefast

B = 4
SHAPE = (B, 3, 5)
Draw = Callable[..., Tensor]

# each from a mean and a log variance of [B, ...]
DRAWS: dict[str, Draw] = {
    "reparameterize": vaefast.reparameterize,
    "sample_with_kl": lambda m, r, **o: vaefast.sample_with_kl(m, r, **o)[0],
    "mc": lambda m, r, **o: vaefast.sample_with_kl(m, r, estimator="mc", **o)[0],
    "num_samples": lambda m, r, **o: vaefast.reparameterize(m, r, num_samples=3, **o).transpose(0, 1),
    "torch noise": lambda m, r, **o: vaefast.reparameterize(m, r, noise="torch", **o),
    "packed": lambda m, r, **o: vaefast.DiagonalGaussian(torch.cat((m, r), 1), clamp=None).sample(**o),
    "packed with its KL": lambda m, r, **o: vaefast.DiagonalGaussian(torch.cat((m, r), 1)).sample_with_kl(
        **o, reduction="sum"
    )[0],
}
BOTH = {**DRAWS, "multi": lambda m, r, **o: vaefast.multi_tensor_sample_with_kl([m, r], [r, m], **o)[0][1]}


@pytest.fixture(params=list(BOTH))
def draw(request: pytest.FixtureRequest) -> Draw:
    return BOTH[request.param]


@pytest.fixture(params=list(DRAWS))
def each(request: pytest.FixtureRequest) -> Draw:
    """What takes a list of generators."""
    return DRAWS[request.param]


@pytest.fixture
def at(device: str) -> list[Tensor]:
    p = posterior(SHAPE, device=device)
    return [p.mu, p.raw]


def test_manual_seed(backend: str, at: list[Tensor], draw: Draw) -> None:
    torch.manual_seed(1)
    first, second = draw(*at), draw(*at)
    torch.manual_seed(1)
    assert torch.equal(draw(*at), first) and torch.equal(draw(*at), second)
    torch.manual_seed(2)
    other = draw(*at)
    assert all((a != b).all() for a, b in ((first, second), (first, other)))


def test_fork_rng(backend: str, device: str, at: list[Tensor], draw: Draw) -> None:
    """What is drawn inside leaves no trace outside."""
    torch.manual_seed(1)
    state, first = rng_state(device), draw(*at)
    set_rng_state(device, state)
    with torch.random.fork_rng():
        assert torch.equal(draw(*at), first)
        draw(*at)
    assert torch.equal(draw(*at), first)


def test_explicit_generators(backend: str, device: str, at: list[Tensor], draw: Draw) -> None:
    """They advance, call by call; the default one does not."""
    g, default = generator(3, device), rng_state(device)
    first, second = draw(*at, generator=g), draw(*at, generator=g)
    assert (first != second).all()
    assert torch.equal(rng_state(device), default)
    assert torch.equal(draw(*at, generator=generator(3, device)), first)
    torch.manual_seed(3)
    assert torch.equal(draw(*at), first), "a generator of one's own is the default one with its seed"


def test_generator_state_is_saved_and_restored(backend: str, device: str, at: list[Tensor], draw: Draw) -> None:
    """As checkpoints do, of the default generator and of one's own."""
    g = generator(3, device)
    draw(*at, generator=g), draw(*at)
    own, default = g.get_state(), rng_state(device)
    expected = draw(*at, generator=g), draw(*at)
    g.set_state(own), set_rng_state(device, default)
    assert torch.equal(draw(*at, generator=g), expected[0]) and torch.equal(draw(*at), expected[1])
    other = torch.Generator(device)
    other.set_state(own)
    assert torch.equal(draw(*at, generator=other), expected[0])


# -- a list of generators, one a sample


def generators(device: str, count: int = B) -> list[torch.Generator]:
    return [generator(10 + k, device) for k in range(count)]


def test_a_list_of_generators_draws_each_sample_alone(backend: str, device: str, at: list[Tensor], each: Draw) -> None:
    """Bit for bit as its generator would for a batch of one; and each generator advances."""
    mine, default = generators(device), rng_state(device)
    first, second = each(*at, generator=mine), each(*at, generator=tuple(mine))
    alone = generators(device)
    for z in (first, second):
        one = torch.cat([each(*(t[k : k + 1] for t in at), generator=g) for k, g in enumerate(alone)])
        assert torch.equal(z, one)
    assert torch.equal(rng_state(device), default)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(mine, alone))
    # a sample does not depend on its neighbours
    assert torch.equal(each(*(t[1:3] for t in at), generator=generators(device)[1:3]), first[1:3])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "chunk": lambda t: torch.cat((t, t), 1).chunk(2, 1)[0],
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("wide_prior", [False, True])
def test_a_list_of_generators_and_any_tensor(
    backend: str, device: str, layout: str, dtype: torch.dtype, wide_prior: bool
) -> None:
    """Values and gradients, in any layout and dtype; a float64 prior makes the noise one of 53 bits for both."""
    p = posterior((B, 4, 3, 5), dtype=dtype, device=device)
    leaves = [LAYOUTS[layout](t).requires_grad_() for t in (p.mu, p.raw)]
    prior = torch.zeros(5, dtype=torch.float64 if wide_prior else dtype, device=device)
    z, kl = vaefast.sample_with_kl(*leaves, prior, generator=generators(device), reduction="per_sample")
    ones = [
        vaefast.sample_with_kl(*(t[k : k + 1] for t in leaves), prior, generator=g, reduction="per_sample")
        for k, g in enumerate(generators(device))
    ]
    assert torch.equal(z, torch.cat([one[0] for one in ones]))
    torch.testing.assert_close(kl, torch.cat([one[1] for one in ones]), rtol=1e-6, atol=0)
    found = torch.autograd.grad(z.float().sin().sum() + kl.sum(), leaves)
    exact = torch.autograd.grad(sum(z.float().sin().sum() + kl.sum() for z, kl in ones), leaves)
    slack = 4 * torch.finfo(dtype).eps
    for a, e in zip(found, exact):
        torch.testing.assert_close(a, e, rtol=slack, atol=slack)


def test_a_list_of_generators_keeps_sixteen_bytes_a_sample(extension: Any) -> None:
    p = posterior((B, 1000)).leaves()
    for f in (vaefast.reparameterize, vaefast.sample_with_kl):
        assert kept_bytes(lambda f=f: f(p.mu, p.raw, generator=generators("cpu")), [p.mu, p.raw]) == 16 * B


def test_a_list_of_generators_for_an_empty_batch(backend: str, device: str) -> None:
    empty = torch.zeros(0, 6, device=device, requires_grad=True)
    for z in (
        vaefast.reparameterize(empty, empty, generator=[]),
        vaefast.DiagonalGaussian(empty).sample([]).repeat(1, 2),
    ):
        assert z.shape == (0, 6)
        assert torch.autograd.grad(z.sum(), empty)[0].shape == (0, 6)


def test_lists_of_the_cpus_generators_for_any_device(backend: str, device: str) -> None:
    """As diffusers' pipelines pass them: an image has the same noise wherever it is made."""
    moments = torch.randn(B, 8, 3, generator=generator(0))
    z = vaefast.DiagonalGaussian(moments.to(device)).sample(generators("cpu"))
    assert_within(z, vaefast.DiagonalGaussian(moments).sample(generators("cpu")), 1e-5)


Q = vaefast.DiagonalGaussian(torch.zeros(B, 6))
X = torch.zeros(B, 6)
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: vaefast.reparameterize(X, X, generator=generators("cpu", 3)), ValueError, "list of 3.*4 samples"),
    (lambda: vaefast.reparameterize(X, X, generator=[]), ValueError, "list of 0.*4 samples"),
    (lambda: vaefast.sample_with_kl(X, X, generator=generators("cpu", 5)), ValueError, "list of 5.*4 samples"),
    (lambda: Q.sample(generators("cpu", 1)), ValueError, "list of 1.*4 samples.*one torch.Generator for all"),
    (lambda: Q.sample_with_kl(generator=generators("cpu", 9)), ValueError, "list of 9"),
    (lambda: vaefast.reparameterize(X, X, generator=[0] * B), TypeError, r"generator\[0\].*got int"),
    (lambda: vaefast.reparameterize(X, X, generator=range(B)), TypeError, "generator must be.*got range.*a list"),
    (lambda: vaefast.reparameterize(X, X, generator=generators("cpu"), eps=X), ValueError, "eps and generator"),
    (lambda: vaefast.reparameterize(X[0, 0], X[0, 0], generator=[]), ValueError, "batch dimension"),
    (
        lambda: vaefast.reparameterize(X, X, generator=generators("cpu", 3), num_samples=3),
        ValueError,
        "list of 3.*4 samples",
    ),
    (lambda: vaefast.DiagonalGaussian(X[0], dim=0).sample(generators("cpu", 6)), TypeError, "one torch.Generator"),
    (lambda: vaefast.multi_tensor_sample_with_kl([X], [X], generator=generators("cpu")), TypeError, "one torch.Gen"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_lists_of_generators(extension: Any, call: Callable[[], Any], error: Any, message: str) -> None:
    state = torch.get_rng_state()
    for name in ("native", "reference"):
        with vaefast.use_backend(name), pytest.raises(error, match=message):
            call()
    assert torch.equal(torch.get_rng_state(), state)


# -- determinism and graphs


@pytest.fixture
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
def test_use_deterministic_algorithms(backend: str, device: str) -> None:
    """Nothing raises for want of a deterministic kernel, uninitialised memory is in no result, and bits repeat."""
    t, d = inputs(33, device=device), data(33, device=device)

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        loss, samples = everything(t, d)
        grads = list(torch.autograd.grad(loss, t))
        assert_right(loss, samples, grads, t, d)
        return [loss, *samples, *grads]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


def test_cuda_graphs_draw_anew_at_each_replay(native: str) -> None:
    """Everything in one torch.cuda.graph, backward too; test_cuda.py has each function and the graphed callables."""
    t, d = inputs(device=native), data(device=native)

    def step() -> tuple[Tensor, ...]:
        loss, samples = everything(t, d)
        return (loss, *samples, *torch.autograd.grad(loss, t))

    replay = Replayed(step, native)
    seen: list[Tensor] = []
    for _ in range(3):
        loss, *rest = replay()
        samples, grads = rest[: -len(t)], rest[-len(t) :]
        assert_right(loss, samples, grads, t, d)
        assert not any(torch.equal(a, b) for a in samples for b in seen)
        assert len({tuple(s.flatten().tolist()) for s in samples}) == len(samples)
        seen += samples
