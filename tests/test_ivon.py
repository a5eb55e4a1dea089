"""IVON against its paper's algorithm, step by step in float64, and against a posterior that is known."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vaefast
from vaefast._philox import philox_noises
from vaefast.bayesian import IVON

BACKENDS = ("auto", "reference")


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    return network, torch.randn(16, 4, dtype=dtype), torch.randint(0, 3, (16,))


def papers_step(state: dict[str, Any], draws: list[tuple[Tensor, Tensor]], o: dict[str, Any]) -> None:
    """Algorithm 1 of Shen et al. 2024, of one tensor; ``draws`` are (theta, gradient)."""
    m, h, delta = state["m"], state["h"], o["weight_decay"]
    variance = 1 / (o["ess"] * (h + delta))
    g_hat = sum(g for _, g in draws) / len(draws)
    h_hat = sum(g * (theta - m) / variance for theta, g in draws) / len(draws)
    state["t"] += 1
    state["g"] = o["beta1"] * state["g"] + (1 - o["beta1"]) * g_hat
    b = 1 - o["beta2"]
    state["h"] = o["beta2"] * h + b * h_hat + 0.5 * b**2 * (h - h_hat) ** 2 / (h + delta)
    mean_g = state["g"] / (1 - o["beta1"] ** state["t"])
    rate = o["lr"] * (o["hess_init"] + delta if o["rescale_lr"] else 1)
    direction = (mean_g + delta * m) / (state["h"] + delta)
    state["m"] = m - rate * direction.clamp(-o["clip_radius"], o["clip_radius"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("options", [{}, {"rescale_lr": False, "clip_radius": 0.01}, {"beta1": 0.5, "hess_init": 0.1}])
def test_every_step_is_the_papers(options: dict[str, Any], draws: int, backend: str) -> None:
    with vaefast.use_backend(backend):
        take_the_papers_steps(options, draws)


def take_the_papers_steps(options: dict[str, Any], draws: int) -> None:
    network, x, y = problem()
    given = {"lr": 0.2, "ess": 50.0, "beta2": 0.95, "weight_decay": 1e-2, **options}
    optimizer = IVON(network.parameters(), **given)
    o = optimizer.defaults
    params = list(network.parameters())
    states = [{"m": p.detach().clone(), "h": torch.full_like(p, o["hess_init"]), "g": 0.0, "t": 0} for p in params]
    for _ in range(6):
        seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in params]
        for _ in range(draws):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                F.cross_entropy(network(x), y).backward()
                for p, each in zip(params, seen):
                    each.append((p.detach().clone(), p.grad.clone()))
            for p, state in zip(params, states):
                assert torch.equal(p, state["m"])
        optimizer.step()
        for p, state, each in zip(params, states, seen):
            papers_step(state, each, o)
            torch.testing.assert_close(p.detach(), state["m"], rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(optimizer.state[p]["hess"], state["h"], rtol=1e-10, atol=1e-13)
            with torch.no_grad():
                p.copy_(state["m"])  # so that rounding does not add up


SIZES = (1, 3, 7, 8, 9, 17, 1023, 1024, 1025, 5000)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
def test_kernels_give_what_operators_give(
    dtype: torch.dtype, threads: int, set_threads: Any, extension: object
) -> None:
    """Of weights that end anywhere in a vector."""
    set_threads(threads)
    torch.manual_seed(2)
    start = [torch.randn(n, dtype=dtype) for n in SIZES]
    gradients = [torch.randn(n, dtype=dtype) for n in SIZES]
    found = []
    for backend in BACKENDS:
        params = [nn.Parameter(t.clone()) for t in start]
        optimizer = IVON(params, lr=0.3, ess=20.0, beta1=0.7, beta2=0.9, weight_decay=0.05, clip_radius=2.0)
        for _ in range(3):
            for p, g in zip(params, gradients):
                state = optimizer.state[p]
                state["draws"], state["gradient"], state["product"] = 1, g.clone(), g * g.roll(1) * 0.1
            with vaefast.use_backend(backend):
                optimizer.step()
        found.append([t for p in params for t in (p.detach(), *optimizer.state[p].values())])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=1e-6)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_draw_philox(dtype: torch.dtype, extension: object) -> None:
    torch.manual_seed(3)
    params = [nn.Parameter(torch.randn(n, dtype=dtype)) for n in SIZES]
    means = [p.detach().clone() for p in params]
    optimizer = IVON(params, lr=0.3, ess=20.0, weight_decay=0.05, hess_init=0.4)
    generators = [torch.Generator().manual_seed(8) for _ in range(2)]
    eps = philox_noises(means, [dtype] * len(means), generators[0])
    with optimizer.sampled_params(generator=generators[1]):
        for p, mean, e in zip(params, means, eps):
            exact = mean.double() + (20.0 * 0.45) ** -0.5 * e.double()
            torch.testing.assert_close(p.detach().double(), exact, rtol=0.0, atol=8 * torch.finfo(dtype).eps)
    for p, mean in zip(params, means):
        assert torch.equal(p, mean)


def as_slice(t: Tensor) -> nn.Parameter:
    room = torch.zeros(t.shape[0], 2 * t.shape[1], *t.shape[2:])
    room[:, : t.shape[1]] = t
    return nn.Parameter(room[:, : t.shape[1]])


LAYOUTS: dict[str, Callable[[Tensor], nn.Parameter]] = {
    "channels last": lambda t: nn.Parameter(t.to(memory_format=torch.channels_last)),
    "transposed": lambda t: nn.Parameter(t.transpose(0, 1).contiguous().transpose(0, 1)),
    "slice": as_slice,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_any_layout(layout: str) -> None:
    """What lies otherwise in memory steps as what is contiguous."""
    torch.manual_seed(4)
    start, gradient, product = (torch.randn(4, 6, 3, 3) for _ in range(3))
    found = []
    for make in (LAYOUTS[layout], lambda t: nn.Parameter(t.clone())):
        p = make(start)
        optimizer = IVON([p], lr=0.1, ess=10.0, beta2=0.9)
        for _ in range(2):
            own = [torch.empty_like(optimizer.state[p]["hess"]).copy_(t) for t in (gradient, product)]
            optimizer.state[p] |= {"draws": 1, "gradient": own[0], "product": own[1]}
            optimizer.step()
        found.append(p.detach().clone())
        with optimizer.sampled_params():
            assert (p != found[-1]).all()
        assert torch.equal(p, found[-1])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_layout(backend: str) -> None:
    torch.manual_seed(5)
    start, gradient = torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3)
    found = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        p = nn.Parameter(start.clone())
        optimizer = IVON([p], lr=0.1, ess=10.0, beta2=0.9)
        with vaefast.use_backend(backend):
            for _ in range(2):
                with optimizer.sampled_params(train=True, generator=torch.Generator().manual_seed(1)):
                    p.grad = gradient.contiguous(memory_format=memory_format)
                optimizer.step()
        found.append(p.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_learns_that_its_weights_were_written(backend: str) -> None:
    p = nn.Parameter(torch.ones(5))
    optimizer = IVON([p], lr=0.1, ess=10.0)
    loss = (p * p).sum()
    with vaefast.use_backend(backend), optimizer.sampled_params(), pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_draws_have_the_posteriors_scale() -> None:
    p = nn.Parameter(torch.full((200_000,), 3.0))
    optimizer = IVON([p], lr=0.1, ess=40.0, hess_init=0.5, weight_decay=0.1)
    with optimizer.sampled_params():
        z = (p.detach() - 3.0) * (40.0 * 0.6) ** 0.5
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.02 and (p == 3.0).all()
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    found = []
    for generator in generators:
        with optimizer.sampled_params(generator=generator):
            found.append(p.detach().clone())
    assert torch.equal(*found)


def test_arrives_at_a_known_posterior() -> None:
    """Linear regression: the best mean-field q has the exact mean, and the precisions on the exact one's diagonal."""
    torch.manual_seed(1)
    n, noise, prior = 200, 0.5, 4.0
    x = torch.randn(n, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5])
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + noise * torch.randn(n, dtype=torch.float64)
    precision = x.T @ x / noise**2 + prior * torch.eye(3)
    mean = torch.linalg.solve(precision, x.T @ y / noise**2)
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = IVON([w], lr=0.1, ess=n, beta2=0.995, weight_decay=prior / n, hess_init=1.0)
    average = torch.zeros(3, dtype=torch.float64)
    for step in range(3000):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            (0.5 * ((x @ w - y) / noise).square().mean()).backward()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 3000)
        optimizer.step()
        if step >= 1000:
            average += (optimizer.state[w]["hess"] * n + prior) / 2000
    torch.testing.assert_close(w.detach(), mean, rtol=0.0, atol=0.15 * precision.diagonal().rsqrt().max().item())
    torch.testing.assert_close(average, precision.diagonal(), rtol=0.1, atol=0.0)


def test_states_are_saved_between_draws() -> None:
    network, x, y = problem()
    other, _, _ = problem()

    def draw(optimizer: IVON, network: nn.Module, seed: int) -> None:
        with optimizer.sampled_params(train=True, generator=torch.Generator().manual_seed(seed)):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()

    options = {"lr": 0.1, "ess": 20.0, "beta2": 0.9}
    one = IVON(network.parameters(), **options)
    draw(one, network, 1)
    one.step()
    draw(one, network, 2)
    file = io.BytesIO()
    torch.save((network.state_dict(), one.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    two = IVON(other.parameters(), **{**options, "lr": 7.0})
    other.load_state_dict(weights)
    two.load_state_dict(state)
    for optimizer, each in ((one, network), (two, other)):
        draw(optimizer, each, 3)
        optimizer.step()
    for p, q in zip(network.parameters(), other.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_wide_states(dtype: torch.dtype) -> None:
    network, x, y = problem(dtype)
    optimizer = IVON(network.parameters(), lr=0.1, ess=100.0)
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            F.cross_entropy(network(x).float(), y).backward()
        optimizer.step()
    for p in network.parameters():
        assert p.dtype == dtype and optimizer.state[p]["hess"].dtype == torch.float32 and p.isfinite().all()


def test_groups_schedules_and_unused_parameters() -> None:
    network, x, y = problem()
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = IVON(
        [{"params": network[0].parameters(), "weight_decay": 0.1}, {"params": [*network[2].parameters(), unused]}],
        lr=0.1,
        ess=10.0,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def closure() -> Tensor:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), y)
            loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    schedule.step()
    assert optimizer.param_groups[0]["lr"] < 0.1
    assert (unused < 1).all()  # towards its prior


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be"),
        ({"ess": -1.0}, "ess must be"),
        ({"beta2": 1.0}, "beta2 must be"),
        ({"weight_decay": 0.0}, "weight_decay must be"),
        ({"hess_init": 0.0}, "hess_init must be"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IVON([nn.Parameter(torch.zeros(2))], **{"lr": 0.1, "ess": 10.0, **options})


def test_what_is_refused_leaves_the_mean() -> None:
    network, x, _ = problem()
    optimizer = IVON(network.parameters(), lr=0.1, ess=10.0)
    before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(RuntimeError, match="without a gradient"), optimizer.sampled_params(train=True):
        network(x)
    with pytest.raises(RuntimeError, match="needs a draw"):
        optimizer.step()
    with pytest.raises(KeyError), optimizer.sampled_params():
        raise KeyError
    assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before))
    with pytest.raises(TypeError, match="parameters must be"):
        IVON([torch.zeros(2, dtype=torch.long)], lr=0.1, ess=10.0)
    sparse = nn.Embedding(3, 2, sparse=True)
    optimizer = IVON(sparse.parameters(), lr=0.1, ess=10.0)
    with pytest.raises(RuntimeError, match="no sparse gradients"), optimizer.sampled_params(train=True):
        sparse(torch.tensor([0])).sum().backward()


def test_lists_of_other_lengths_are_refused(extension: Any) -> None:
    one, numbers = [torch.ones(2)], (10.0, 0.1, 0.9, 0.9, 1.0, 0.1, math.inf)
    with pytest.raises(ValueError, match="0 tensors beside 1 parameters"):
        extension.ivon_step(one, one, one, [], one, *numbers)
    with pytest.raises(ValueError, match="2 tensors beside 1 parameters"):
        extension.ivon_draw(one, one, one * 2, one, 10.0, 0.1, None)
