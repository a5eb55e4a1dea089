"""torch.library.opcheck on every operator, and torch.compile(fullgraph=True): values, gradients, fresh noise.

Compiling is slow, so most functions are traced with the aot_eager back end, which takes the same operators through the
same functionalisation and partitioning, and few go through Inductor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from inputs import LIKELIHOOD_CASES, generator, posterior, training, with_numbers
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch._functorch.aot_autograd import make_boxed_func
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import vaefast
from vaefast import Likelihood, _torch
from vaefast.reference import PARAMETERIZATIONS

Arguments = tuple[Any, ...]
INF = math.inf
NOT = [False, False]
PLAIN = ("logvar", -INF, INF, 0.0)
CLAMPED = ("softplus", -1.0, 2.0, 0.1)


def latents(grad: bool, prior: str = "none") -> Arguments:
    p = posterior((6, 20), prior=prior)
    p = p.leaves() if grad else p
    pm, plv = (t if isinstance(t, Tensor) else None for t in p.prior)
    values = [t if isinstance(t, float) else 0.0 for t in p.prior]
    return p.mu, p.raw, pm, values[0], plv, values[1]


def data(name: str, count: int, grad: bool, weighted: bool = False) -> Arguments:
    d = training(name, count, (6, 50))
    d = d.leaves() if grad else d
    return (
        list(d.recon),
        d.target,
        torch.rand(50, generator=generator(1)) > 0.3 if weighted else None,
        *Likelihood(name).spec,
    )


def moments(grad: bool = False) -> Tensor:
    return torch.randn(6, 4, 12, requires_grad=grad)


def several(grad: bool = False) -> list[Tensor]:
    return [torch.randn(6, 20, requires_grad=grad), torch.randn(6, 3, 7, requires_grad=grad)]


def seed() -> Tensor:
    return torch.tensor([5, 0])


Samples = dict[str, Callable[[], list[Arguments]]]
SAMPLES: Samples = {
    "posterior": lambda: [
        (*latents(True), None, seed(), None, *PLAIN, "batchmean", None, True, True),
        (*latents(True, "broadcast"), None, seed(), None, *CLAMPED, "per_sample", None, True, True),
        (*latents(True, "float"), torch.randn(6, 20), None, None, *PLAIN, "none", None, True, True),
        (*latents(False), None, seed(), None, *PLAIN, "none", None, True, False),
        (*latents(True, "full"), None, None, None, *PLAIN, "sum", None, False, True),
        (*latents(True, "full"), None, seed(), None, *PLAIN, "batchmean", 0.8, True, True),
    ],
    "posterior_forward": lambda: [
        (*latents(False), None, seed(), None, *PLAIN, "batchmean", None, True, True),
        (*latents(False, "broadcast"), None, seed(), None, *CLAMPED, "per_sample", None, True, True),
    ],
    "posterior_backward": lambda: [
        (
            torch.randn(6, 20),
            torch.tensor(1.0),
            *latents(False),
            None,
            seed(),
            *PLAIN,
            "batchmean",
            None,
            [True, True, False, False],
        ),
        (
            torch.randn(6, 20),
            torch.randn(6),
            *latents(False, "full"),
            None,
            seed(),
            *CLAMPED,
            "per_sample",
            None,
            [True] * 4,
        ),
        (None, torch.randn(6), *latents(False, "full"), None, None, *PLAIN, "per_sample", 0.8, [True] * 4),
        (None, torch.randn(6, 20), *latents(False), None, None, *PLAIN, "none", None, [True, False, *NOT]),
    ],
    "packed_posterior": lambda: [
        (moments(True), 1, None, -INF, INF, seed(), None, "logvar", -1.0, 1.0, 0.0, "per_sample", None, True, True),
        (moments(True), 1, moments(True), -0.5, 0.5, None, None, *PLAIN, "batchmean", None, False, True),
    ],
    "packed_forward": lambda: [
        (moments(), 2, moments(), -0.5, 0.5, seed(), None, "logvar", -1.0, 1.0, 0.0, "none", None, True, True),
    ],
    "packed_backward": lambda: [
        (
            torch.randn(6, 4, 6),
            None,
            moments(),
            2,
            None,
            -INF,
            INF,
            seed(),
            "logvar",
            -1.0,
            1.0,
            0.0,
            "none",
            None,
            [True, False],
        ),
        (
            None,
            torch.randn(6),
            moments(),
            1,
            moments(),
            -0.5,
            0.5,
            None,
            "logvar",
            -1.0,
            1.0,
            0.0,
            "per_sample",
            None,
            [True, True],
        ),
    ],
    "reconstruction": lambda: [
        (*data(name, count, True, weighted), reduction, False)
        for name, count in LIKELIHOOD_CASES
        for weighted, reduction in ((False, "batchmean"), (True, "none"))
    ],
    "reconstruction_forward": lambda: [
        (*data(name, count, False), "per_sample", [True] * count) for name, count in LIKELIHOOD_CASES
    ],
    "reconstruction_backward": lambda: [
        (torch.tensor(2.0), *data(name, count, False), "batchmean", [True] * count) for name, count in LIKELIHOOD_CASES
    ],
    "elbo": lambda: [
        (*data("gaussian", 2, True, True), *latents(True, "broadcast"), *CLAMPED, "batchmean", None, 0.5, False),
        (*data("gaussian", 2, True), *latents(True, "broadcast"), *PLAIN, "sum", 0.8, 0.5, False),
        (*data("bernoulli", 1, True), *latents(True), *PLAIN, "per_sample", None, 1.0, False),
    ],
    "elbo_forward": lambda: [
        (*data("gaussian", 2, False), *latents(False, "full"), *PLAIN, "sum", None, 0.5, [True, False], []),
        (*data("gaussian", 2, False), *latents(False, "full"), *PLAIN, "sum", 0.8, 0.5, [True, True], [True] * 4),
    ],
    "elbo_backward_": lambda: [
        (
            kept,
            torch.tensor(2.0),
            torch.tensor(3.0),
            0.5,
            *data("gaussian", 2, False),
            *latents(False, "full"),
            *PLAIN,
            "sum",
            None,
            [True, False],
            [True] * 4,
        )
        for kept in ([torch.randn(6, 50)], [])
    ],
    "multi_posterior": lambda: [
        ([*several(True)], [*several(True)], [], 0.0, [], 0.5, seed(), None, *PLAIN, "sum", None, True, True),
        (
            [*several(True)],
            [*several(True)],
            [*several(True)],
            0.0,
            [*several(True)],
            0.0,
            None,
            None,
            *PLAIN,
            "batchmean",
            None,
            False,
            True,
        ),
    ],
    "multi_forward": lambda: [
        (
            [*several()],
            [*several()],
            [],
            0.0,
            [*several()],
            0.0,
            seed(),
            None,
            *CLAMPED,
            "per_sample",
            None,
            True,
            True,
            [],
        ),
        (
            [*several()],
            [*several()],
            [],
            0.0,
            [],
            0.0,
            None,
            None,
            *PLAIN,
            "sum",
            None,
            False,
            True,
            [True, True, *NOT] * 2,
        ),
    ],
    "multi_backward": lambda: [
        (
            [*several()],
            torch.tensor(2.0),
            [*several()],
            [*several()],
            [],
            0.0,
            [],
            0.0,
            seed(),
            *PLAIN,
            "sum",
            None,
            [True, True, *NOT] * 2,
        ),
        (
            [],
            torch.randn(6),
            [*several()],
            [*several()],
            [*several()],
            0.0,
            [*several()],
            0.0,
            None,
            *PLAIN,
            "per_sample",
            None,
            [True] * 8,
        ),
    ],
    "scale_": lambda: [([torch.randn(3, 4)], torch.tensor(2.0)), ([torch.randn(3, 4)] * 2, torch.randn(3))],
    "categorical": lambda: [
        (torch.rand(6, 4).double(), classes(True), classes(True), 1, 0.01, "none", 0.8, True),
        (torch.rand(6, 4).double(), classes(True), None, -2, 0.0, "none", None, False),
        (None, classes(True), classes(), 1, 0.0, "batchmean", None, True),
    ],
    "categorical_forward": lambda: [
        (torch.rand(6, 4).double(), classes(), classes(), 1, 0.01, "per_sample", None, True),
        (None, classes(), None, 1, 0.01, "none", None, True),
    ],
    "categorical_backward": lambda: [
        (classes(), torch.randn(6, 4), classes(), classes(), 1, 0.01, "none", 0.3, [True, True]),
        (classes(), None, classes(), classes(), 1, 0.0, "none", None, [True, True]),
        (None, torch.tensor(2.0), classes(), None, 1, 0.0, "sum", None, [True, False]),
    ],
    "log_ratio": lambda: [
        (draws(True), moments_of_q(True), moments_of_q(True), None, 0.5, moments_of_q(True), 0.0, True),
        (draws(True).double(), moments_of_q(True), moments_of_q(), None, 0.0, None, 0.0, False),
    ],
    "log_ratio_forward": lambda: [(draws(), moments_of_q(), moments_of_q(), torch.randn(3), 0.0, None, 0.0, True)],
    "log_ratio_backward": lambda: [
        (
            torch.randn(4, 5),
            draws(),
            moments_of_q(),
            moments_of_q(),
            torch.randn(3),
            0.0,
            moments_of_q(),
            0.0,
            True,
            [True] * 5,
        ),
        (
            torch.randn(4, 5),
            draws(),
            moments_of_q(),
            moments_of_q(),
            None,
            0.0,
            None,
            0.0,
            False,
            [False, True, True, *NOT],
        ),
    ],
    "bound": lambda: [
        (ratio, [draws(True), *more], torch.rand(4, 5, 3), None, "gaussian", [1.0], reduction)
        for ratio in (torch.randn(4, 5, requires_grad=True), torch.randn(4, 5).double())
        for more in ([], [draws(True)], [torch.randn(3, requires_grad=True)])
        for reduction in ("batchmean", "per_sample")
    ],
    "bound_forward": lambda: [
        (torch.randn(4, 5), [draws()], torch.rand(4, 5, 3), torch.rand(3), "bernoulli", [], "sum", [True, True]),
        (torch.randn(4, 5), [draws()], torch.rand(4, 5, 3), None, "bernoulli", [], "sum", NOT),
    ],
    "experts": lambda: [
        (draws(True), draws(True), there, prior)
        for there in (None, torch.rand(4, 5) > 0.3, torch.rand(4, 1, 3) > 0.3)
        for prior in (True, False)
    ],
    "experts_forward": lambda: [
        (draws(), draws().double(), torch.rand(4, 5) > 0.3, True),
        (draws(), draws(), None, True),
    ],
    "experts_backward": lambda: [
        (torch.randn(5, 3), torch.randn(5, 3), draws(), draws().double(), torch.rand(4, 5) > 0.3, True, [True, True]),
        (None, torch.randn(5, 3), draws(), draws(), None, False, [False, True]),
        (torch.randn(5, 3), None, draws(), draws(), None, True, [True, False]),
    ],
    "marginals_forward": lambda: [(*four(), [], []), (*four(), columns(), [torch.randn(5)] * 2)],
    "marginals_backward": lambda: [
        (torch.randn(5), torch.randn(3, 5), *four(), [], []),
        (torch.randn(5), torch.randn(3, 5), *four(), columns(), [torch.randn(5)] * 2),
    ],
    # those of Python's own
    "mixture_log_prob": lambda: [
        (torch.randn(5, 3), torch.randn(4, 3), torch.randn(4, 3), torch.randn(4), True),
        (torch.randn(5, 3), torch.randn(4, 3).double(), torch.randn(4, 3), None, False),
    ],
    "mixture_log_prob_backward": lambda: [
        (torch.randn(5, 3), torch.randn(4, 3), torch.randn(4, 3), logits, native, torch.randn(5))
        for logits in (torch.randn(4), None)
        for native in (True, False)
    ],
    "aggregate_posterior": lambda: [
        (*three(), True, -2.0, [], []),
        (*three(), False, -2.0, [t.long() for t in columns()], [torch.randn(5).double()] * 2),
    ],
    "aggregate_posterior_backward": lambda: [
        (*three(), True, -2.0, [], [], torch.randn(3, 5), *(torch.randn(5).double() for _ in range(3)))
    ],
}


def classes(grad: bool = False) -> Tensor:
    return torch.randn(6, 5, 4, requires_grad=grad)


def draws(grad: bool = False) -> Tensor:
    return torch.randn(4, 5, 3, requires_grad=grad)


def moments_of_q(grad: bool = False) -> Tensor:
    return torch.randn(5, 3, requires_grad=grad)


def four() -> list[torch.Tensor]:
    """z, mu, slope and constant of marginals."""
    return [torch.randn(3, 5) for _ in range(4)]


def three() -> list[torch.Tensor]:
    """z, mu and log variance."""
    return [torch.randn(5, 3) for _ in range(3)]


def columns() -> list[torch.Tensor]:
    return [torch.arange(5.0), torch.arange(5.0).roll(1)]


def registered() -> set[str]:
    """But for the private ones, which stand for compositions of PyTorch's own."""
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("vaefast::")}
    return {name for name in names if not name.startswith("_")}


def test_every_operator_has_samples() -> None:
    assert set(SAMPLES) == registered()


# torch cannot make an operator functional that both writes to a list and returns one; a traced backward takes others
EAGER_ONLY = {"elbo_backward_": ("test_schema", "test_autograd_registration", "test_faketensor")}
EVERY_CHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", list(SAMPLES))
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.vaefast, name).default
    for arguments in SAMPLES[name]():
        report = opcheck(op, with_numbers(name, arguments), test_utils=EAGER_ONLY.get(name, EVERY_CHECK))
        assert set(report.values()) == {"SUCCESS"}


@pytest.fixture(autouse=True)
def _native_in_fresh_dynamo(extension: object) -> Iterator[None]:
    """Under "native" a trace that took the reference, which compiles just as well, raises."""
    torch._dynamo.reset()
    with vaefast.use_backend("native"):
        yield
    torch._dynamo.reset()


def compiled(f: Callable[..., Any], backend: Any = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def assert_same(actual: Any, expected: Any, tolerance: float = 2e-6) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def step(mu: Tensor, raw: Tensor, recon: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Everything at once, with two draws whose operators have equal arguments."""
    z, kl = vaefast.sample_with_kl(mu, raw)
    again = vaefast.sample_with_kl(mu, raw)[0]
    terms = vaefast.elbo_terms(recon, x, mu, raw, beta=2.0)
    nll = vaefast.reconstruction_loss(recon, x, weight=x > 0.2, reduction="mean")
    return terms.loss + kl + nll + (z - again).square().sum(), z, again


def reference_step(mu: Tensor, raw: Tensor, recon: Tensor, x: Tensor, z: Tensor, again: Tensor) -> Tensor:
    """The same given the samples that were drawn."""
    with torch.no_grad():
        eps, eps_again = ((s - mu) / torch.exp(raw / 2) for s in (z, again))
    z, kl = vaefast.reference.sample_with_kl(mu, raw, eps=eps)
    again = vaefast.reference.reparameterize(mu, raw, eps=eps_again)
    terms = vaefast.reference.elbo_terms(recon, x, mu, raw, beta=2.0)
    nll = vaefast.reference.reconstruction_loss(recon, x, weight=x > 0.2, reduction="mean")
    return terms.loss + kl + nll + (z - again).square().sum()


def step_inputs(batch: int = 6) -> tuple[list[Tensor], Tensor]:
    p, d = posterior((batch, 20)).leaves(), training("bernoulli", 1, (batch, 50)).leaves()
    return [p.mu, p.raw, *d.recon], d.target


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_whole_step(backend: str) -> None:
    """Values and gradients; two draws in one graph are not merged; each call draws anew."""
    f = compiled(step, backend)
    leaves, x = step_inputs()
    seen = []
    for _ in range(2):
        loss, z, again = f(*leaves, x)
        assert (z - again).abs().min() > 0
        exact = reference_step(*leaves, x, z, again)
        torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-5)
        assert_same(torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, leaves), 2e-5)
        seen.append(z.detach())
    assert (seen[0] - seen[1]).abs().min() > 0


def test_the_graph_holds_the_operators() -> None:
    """In the default mode too: nothing silently falls back to the reference's dozens of kernels."""
    recorded = EagerAndRecordGraphs()
    leaves, x = step_inputs()
    with vaefast.use_backend("auto"):
        compiled(step, recorded)(*leaves, x)
    called = {str(node.target) for graph in recorded.graphs for node in graph.graph.nodes if node.op == "call_function"}
    assert {f"vaefast.{name}" for name in ("posterior", "reconstruction", "elbo")} <= {
        name.removesuffix(".default") for name in called
    }
    assert not any("exp" in name for name in called)


@pytest.mark.parametrize(("latents", "operators"), [((4, 20), 0), ((4, 5000), 1)])
def test_backward_of_few_latents_has_no_operator(latents: tuple[int, int], operators: int) -> None:
    """The gradients of few are written by forward; those of many, another time their memory, are not kept."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    p, d = posterior(latents).leaves(), training("bernoulli", 1, (4, 50)).leaves()

    def loss() -> Tensor:
        return vaefast.elbo_loss(d.recon[0], d.target, p.mu, p.raw, beta=0.5)

    inputs = p.mu, p.raw, d.recon[0]
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    found = torch.autograd.grad(3 * torch.compile(loss, fullgraph=True, backend=backend)(), inputs)
    for g, expected in zip(found, torch.autograd.grad(3 * loss(), inputs)):
        torch.testing.assert_close(g, expected)
    backward = [str(node.target) for node in graphs[1].graph.nodes if node.op == "call_function"]
    assert sum(target.startswith("vaefast.") for target in backward) == operators, backward


def test_few_objects_are_looked_at_in_each_call() -> None:
    """Each object that Python looked at while it traced costs a compiled function time, call by call."""

    def step(mu: Tensor, raw: Tensor, recon: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return vaefast.reparameterize(mu, raw), vaefast.elbo_loss(recon, target, mu, raw)

    p, d = posterior((6, 20)).leaves(), training("bernoulli", 1, (6, 50)).leaves()
    torch.compile(step, fullgraph=True, backend="aot_eager")(p.mu, p.raw, d.recon[0], d.target)
    (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(step)
    lines = str(entry.guard_manager).splitlines()
    assert len(lines) < 350, f"{len(lines)} lines of guards"


def test_draws_without_gradients_differ() -> None:
    f = compiled(lambda mu, raw: (vaefast.reparameterize(mu, raw), vaefast.reparameterize(mu, raw)))
    zero = torch.zeros(50)
    with torch.no_grad():
        first, second = f(zero, zero)
        third, _ = f(zero, zero)
    for a, b in ((first, second), (first, third)):
        assert (a != b).all()


def test_manual_seed_reaches_compiled_draws() -> None:
    f = compiled(vaefast.reparameterize)
    zero = torch.zeros(50)
    samples = []
    for value in (1, 1, 2):
        torch.manual_seed(value)
        samples.append(f(zero, zero))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    torch.manual_seed(1)
    assert torch.equal(vaefast.reparameterize(zero, zero), samples[0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_dynamic_shapes(backend: str) -> None:
    """What was traced for one batch size serves the others."""
    counter = CompileCounterWithBackend(backend)
    f = compiled(step, counter, dynamic=True)
    graphs = []
    for batch in (6, 9, 33):
        leaves, x = step_inputs(batch)
        loss, z, again = f(*leaves, x)
        graphs.append(counter.frame_count)
        exact = reference_step(*leaves, x, z, again)
        torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-5)
        assert_same(torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, leaves), 2e-5)
    assert len(set(graphs)) == 1, "no batch size was compiled for again"


@pytest.mark.parametrize("reduction", ["none", "per_sample", "sum"])
@pytest.mark.parametrize("prior", ["float", "broadcast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options(reduction: str, prior: str, dtype: torch.dtype) -> None:
    """Compiled and eager run one kernel, so that results are equal or a rounding of the same."""
    p = posterior((6, 20), "softplus", prior, dtype).leaves()
    d = training("gaussian", 2, (6, 50), dtype, shapes=[None, (50,)]).leaves()
    weight = torch.rand(6, 1, generator=generator(1))
    eps = torch.randn(6, 20, generator=generator(2))

    def f(weight: Tensor, eps: Tensor) -> list[Tensor]:
        options: dict[str, Any] = {"parameterization": vaefast.Parameterization("softplus", clamp=(-1, 2), floor=0.1)}
        z, kl = vaefast.sample_with_kl(*p.args(), reduction=reduction, eps=eps, **options)
        nll = vaefast.reconstruction_loss(d.recon, d.target, likelihood="gaussian", reduction=reduction, weight=weight)
        return [z, kl, nll]

    found = []
    leaves = [*p.tensors(), *d.recon]
    for g in (f, compiled(f)):
        out = g(weight, eps)
        found.append([*out, *torch.autograd.grad(sum(t.float().square().sum() for t in out), leaves)])
    assert_same(found[1], found[0], 1e-5 if dtype == torch.float32 else 2e-2)


def test_compiled_loss_differentiated_twice() -> None:
    """retain_graph and upstream gradients: what forward kept is not overwritten."""
    d = training("laplace", 2, (6, 50)).leaves()
    f = compiled(lambda a, b, x: vaefast.reconstruction_loss((a, b), x, likelihood="laplace"))
    loss = f(*d.recon, d.target)
    once = torch.autograd.grad(loss, d.recon, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, d.recon, retain_graph=True)
    again = torch.autograd.grad(loss, d.recon)
    assert_same(again, once)
    assert_same(thrice, [3 * g for g in once])


@pytest.mark.parametrize("parameterization", list(PARAMETERIZATIONS))
def test_compiled_checkpointing_replays_the_noise(parameterization: str) -> None:
    """Backward draws again inside the graph; d z / d raw tells with which noise."""

    def f(mu: Tensor, raw: Tensor) -> Tensor:
        return checkpoint(
            lambda m, r: vaefast.reparameterize(m, r, parameterization=parameterization).exp().log(),
            mu,
            raw,
            use_reentrant=False,
        )

    p = posterior((4, 50), parameterization, dtype=torch.float64).leaves()
    z = compiled(f)(p.mu, p.raw)
    _, gradient = torch.autograd.grad(z.sum(), (p.mu, p.raw))
    raw = p.raw.detach().requires_grad_()
    std = PARAMETERIZATIONS[parameterization].std(raw)
    (dstd,) = torch.autograd.grad(std.sum(), raw)
    torch.testing.assert_close(gradient, ((z - p.mu) / std * dstd).detach(), rtol=1e-7, atol=1e-9)


def test_module_and_torch_noise() -> None:
    criterion = vaefast.ELBOLoss("gaussian", beta=0.5)
    d, p = training("gaussian", 1, (6, 50)), posterior((6, 20))

    def f(recon: Tensor, x: Tensor, mu: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        return criterion(recon, x, mu, raw), vaefast.reparameterize(mu, raw, noise="torch")

    loss, z = compiled(f)(*d.recon, d.target, p.mu, p.raw)
    torch.testing.assert_close(loss, criterion(d.recon, d.target, p.mu, p.raw))
    assert z.isfinite().all()


def test_meta_and_fake_tensors() -> None:
    """Shapes, strides and dtypes without data, as export and sharding planners ask for."""
    with torch.device("meta"):
        moments = torch.empty(4, 6, 8, 8).to(memory_format=torch.channels_last)
        z, kl = vaefast.sample_with_kl(*moments.chunk(2, 1), reduction="per_sample")
        nll = vaefast.reconstruction_loss(torch.empty(4, 7, dtype=torch.bfloat16), torch.empty(4, 7))
    assert z.is_meta
    assert z.shape == (4, 3, 8, 8)
    assert (
        z.stride()
        == torch.empty_like(torch.empty(4, 6, 8, 8).to(memory_format=torch.channels_last).chunk(2, 1)[0]).stride()
    )
    assert kl.shape == (4,)
    assert nll.shape == ()
    assert nll.dtype == torch.float32


def test_compiled_calls_run_kernels_only(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference gives the same numbers, so only its absence shows that nothing went there, backward included."""
    mu, raw, recon = (torch.randn(4, 6, device=native, requires_grad=True) for _ in range(3))

    def step(mu: Tensor, raw: Tensor, recon: Tensor) -> Tensor:
        z, kl = vaefast.sample_with_kl(mu, raw)
        return vaefast.elbo_loss(recon, torch.ones_like(recon), mu, raw) + kl + z.square().sum()

    for name in ("kl", "nll", "sample", "sample_with_kl", "elbo"):
        monkeypatch.setattr(_torch, name, lambda *_, **__: pytest.fail("the reference was called"))
    for f in (step, torch.compile(step, fullgraph=True)):
        f(mu, raw, recon).backward()


def test_compiled_autograd_of_an_eager_loss() -> None:
    """The graph is eager's, its backward is traced: nothing there may be eager's alone."""
    d, p = training("bernoulli", 1, (6, 50)).leaves(), posterior((6, 20)).leaves()
    leaves = [*d.recon, p.mu, p.raw]

    def loss() -> Tensor:
        return vaefast.elbo_loss(d.recon, d.target, p.mu, p.raw, beta=0.5)

    expected = torch.autograd.grad(loss(), leaves)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss().backward()
    assert_same([t.grad for t in leaves], expected)
