"""nan_guard: the first tensor that was not finite, found on the device and told with its call."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import LIKELIHOOD_CASES, training
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vaefast
from vaefast import _backends
from vaefast.debug import Finding, NanGuard, nan_guard

NAN, INF = float("nan"), float("inf")


def leaf(value: float | None = None, shape: tuple[int, ...] = (4, 3), at: int = 5) -> Tensor:
    x = 0.1 * torch.randn(shape)
    if value is not None:
        x.view(-1)[at] = value
    return x.requires_grad_()


def found(call: Callable[[], Any]) -> Finding | None:
    with nan_guard(on_exit="ignore") as guard:
        call()
    first = guard.first()
    assert guard.report() == ("" if first is None else str(first))
    return first


def expect(call: Callable[[], Any], function: str, role: str, name: str, kind: str) -> None:
    first = found(call)
    assert first is not None
    assert (first.function, first.role, first.name, first.kind) == (function, role, name, kind)
    assert first.where.startswith(f"{__file__}:")


x = torch.rand(4, 5)

CALLS: dict[str, tuple[Callable[[], Any], tuple[str, str, str, str]]] = {
    "mu": (lambda: vaefast.gaussian_kl(leaf(NAN), leaf()), ("gaussian_kl", "argument", "mu", "NaN")),
    "logvar": (
        lambda: vaefast.reparameterize(leaf(), leaf(-INF)),
        ("reparameterize", "argument", "logvar", "infinity"),
    ),
    "prior": (
        lambda: vaefast.sample_with_kl(leaf(), leaf(), leaf(), leaf(NAN)),
        ("sample_with_kl", "argument", "prior_logvar", "NaN"),
    ),
    "eps": (
        lambda: vaefast.reparameterize(leaf(), leaf(), eps=leaf(NAN).detach()),
        ("reparameterize", "argument", "eps", "NaN"),
    ),
    "recon": (
        lambda: vaefast.elbo_loss(leaf(NAN, (4, 5)), x, leaf(), leaf()),
        ("elbo_loss", "argument", "recon", "NaN"),
    ),
    "a parameter": (
        lambda: vaefast.reconstruction_loss((leaf(shape=(4, 5)), leaf(INF, (5,), 0)), x, likelihood="laplace"),
        ("reconstruction_loss", "argument", "recon's log_scale", "infinity"),
    ),
    "target": (
        lambda: vaefast.elbo_terms(leaf(shape=(4, 5)), x / 0, leaf(), leaf(), free_bits=0.1),
        ("elbo_terms", "argument", "target", "infinity"),
    ),
    "a module": (
        lambda: vaefast.ELBOLoss()(leaf(NAN, (4, 5)), x, leaf(), leaf()),
        ("ELBOLoss.forward", "argument", "recon", "NaN"),
    ),
    "a list": (
        lambda: vaefast.multi_tensor_gaussian_kl([leaf(), leaf()], [leaf(), leaf(NAN)]),
        ("multi_tensor_gaussian_kl", "argument", "logvars[1]", "NaN"),
    ),
    "weights": (
        lambda: vaefast.multi_tensor_sample_with_kl([leaf(), leaf(NAN)], [leaf(), leaf()]),
        ("multi_tensor_sample_with_kl", "argument", "mus[1]", "NaN"),
    ),
    "moments": (
        lambda: vaefast.DiagonalGaussian(leaf(NAN, (2, 4))).kl(),
        ("DiagonalGaussian.kl", "argument", "moments", "NaN"),
    ),
    "a sample": (
        lambda: vaefast.reparameterize(leaf(), leaf() + 200),
        ("reparameterize", "result", "z", "infinity"),
    ),
    "a KL": (lambda: vaefast.gaussian_kl(leaf(), leaf() + 100), ("gaussian_kl", "result", "kl", "infinity")),
    "the KL beside a sample": (
        lambda: vaefast.sample_with_kl(leaf() + 1e30, leaf()),
        ("sample_with_kl", "result", "kl", "infinity"),
    ),
    "a loss": (
        lambda: vaefast.elbo_loss(leaf(shape=(4, 5)), x, leaf(), leaf() + 100),
        ("elbo_loss", "result", "loss", "infinity"),
    ),
    "data outside the domain": (
        lambda: vaefast.reconstruction_loss(leaf(shape=(4, 5)).sigmoid(), x + 1, likelihood="bernoulli_probs"),
        ("reconstruction_loss", "result", "nll", "NaN"),
    ),
    "a gradient": (
        lambda: (vaefast.gaussian_kl(leaf(), leaf()) * NAN).backward(),
        ("gaussian_kl", "gradient", "kl", "NaN"),
    ),
    "the reference": (
        lambda: vaefast.reference.gaussian_kl(leaf(NAN), leaf()),
        ("gaussian_kl", "argument", "mu", "NaN"),
    ),
}


@pytest.mark.parametrize("case", list(CALLS))
def test_the_first_is_named(backend: str, case: str) -> None:
    call, expected = CALLS[case]
    expect(call, *expected)


def test_a_gradient_of_an_argument(backend: str) -> None:
    mu, raw = leaf() + 100, leaf()
    with nan_guard(on_exit="ignore") as guard:
        kl = vaefast.gaussian_kl(mu, raw, reduction="none")
        kl.backward(torch.full((4, 3), 3e38))
    first = guard.first()
    assert first is not None
    assert (first.role, first.name, first.kind) == ("gradient", "mu", "infinity")
    assert "GradScaler" in guard.report()


def test_it_raises_at_the_end(backend: str) -> None:
    def calls(then: Callable[[], Any] = list, **options: str) -> None:
        with nan_guard(**options):
            vaefast.gaussian_kl(leaf(), leaf())
            vaefast.gaussian_kl(leaf(NAN), leaf())
            vaefast.gaussian_kl(leaf(), leaf(NAN))  # later
            then()

    with pytest.raises(FloatingPointError, match=r"gaussian_kl at .*test_debug.py:\d+, call 2: argument mu has NaN"):
        calls()
    with pytest.raises(ZeroDivisionError):  # which ended the block first
        calls(lambda: 1 / 0)
    calls(on_exit="ignore")
    with pytest.raises(ValueError, match="on_exit"), nan_guard(on_exit="never"):
        pass


@pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
def test_finite_calls_pass(backend: str, likelihood: str, count: int) -> None:
    data = training(likelihood, count).leaves()
    with nan_guard():
        loss = vaefast.elbo_loss(data.recon, data.target, leaf(), leaf(), likelihood=likelihood)
        loss.backward()
        assert loss.isfinite()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "categorical", "discretized_logistic_mixture"])
def test_what_a_weight_hides_is_not_looked_at(backend: str, likelihood: str) -> None:
    count = 2 if likelihood == "gaussian" else 1
    data = training(likelihood, count, (4, 7))
    weight = torch.ones(4, 7)
    weight[1] = 0
    for poisoned in (*data.recon, data.target):
        poisoned[1] = NAN
    recon = tuple(p.requires_grad_() for p in data.recon)
    for w in (weight, weight != 0, weight[:, :1]):
        with nan_guard():
            vaefast.reconstruction_loss(recon, data.target, likelihood=likelihood, weight=w).backward()
    weight[1] = 1
    first = found(lambda: vaefast.reconstruction_loss(recon, data.target, likelihood=likelihood, weight=weight))
    assert first is not None and first.kind == "NaN"
    with nan_guard():
        hidden = torch.ones(4, 3)
        hidden[1] = 0
        mu = leaf()
        mu.data[1] = NAN
        vaefast.gaussian_kl(mu, leaf(), weight=hidden).backward()


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(f))
        return f(*args, **(kwargs or {}))


def test_nothing_waits_before_it_is_asked(extension: object) -> None:
    guard = NanGuard()
    with Waits() as waits:
        for k in range(3):
            guard._look(
                torch.tensor([1.0, NAN if k else 1.0]), torch.tensor([True, False]), k, ("f", "here", "result", "z")
            )
        assert not waits.found
        assert guard.first() == Finding("f", "here", 1, "result", "z", "NaN")
        assert waits.found


def test_nothing_stays(backend: str) -> None:
    before = _backends.direct, _backends.engine, vaefast.reference._functions.engines.direct(x)
    weight = leaf()
    with nan_guard():
        for _ in range(3):
            vaefast.gaussian_kl(weight, leaf()).backward()
        hooks = len(weight._backward_hooks or ())
        assert hooks == 1  # not one a call
    assert not weight._backward_hooks
    assert (_backends.direct, _backends.engine, vaefast.reference._functions.engines.direct(x)) == before
    with nan_guard(on_exit="ignore") as guard:
        late = vaefast.gaussian_kl(weight, leaf())
    (late * NAN).backward()  # the guard has ended
    assert guard.first() is None


def test_memory_does_not_grow_with_graphs(backend: str) -> None:
    with nan_guard() as guard:
        for _ in range(50):
            vaefast.elbo_loss(leaf(shape=(4, 5)), x, leaf() * 1, leaf() * 1).backward()
        gc.collect()
        assert len(guard._sites) < 20


@pytest.mark.parametrize("inner", ["gaussian_kl", "none"])
def test_guards_nest(backend: str, inner: str) -> None:
    with nan_guard(on_exit="ignore") as outer:
        with nan_guard(on_exit="ignore") as guard:
            if inner == "gaussian_kl":
                vaefast.gaussian_kl(leaf(NAN), leaf())
        vaefast.gaussian_kl(leaf(NAN), leaf())
    assert (guard.first() is None) == (inner == "none")
    assert outer.first() is not None


def test_compiled_calls_run_unseen(extension: object) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda mu, raw: vaefast.gaussian_kl(mu, raw), backend="eager", fullgraph=True)
    with nan_guard() as guard:
        assert compiled(leaf(NAN), leaf()).isnan()
        assert guard.report() == ""


def test_transforms_run_unseen(backend: str) -> None:
    with vaefast.use_backend("auto"), nan_guard() as guard:
        kl = torch.func.vmap(lambda m, r: vaefast.gaussian_kl(m, r, reduction="sum"))(leaf(NAN), leaf())
        assert kl.isnan().sum() == 1
        assert guard.report() == ""


def test_results_are_the_same(backend: str) -> None:
    def everything() -> list[Tensor]:
        torch.manual_seed(0)
        mu, raw = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
        z, kl = vaefast.sample_with_kl(mu, raw)
        loss = vaefast.elbo_loss(torch.cat((z, z), 1), torch.full((4, 6), 0.5), mu, raw)
        return [z, kl, loss, *torch.autograd.grad(z.sum() + kl + loss, (mu, raw))]

    plain = everything()
    with nan_guard():
        guarded = everything()
    assert all(map(torch.equal, plain, guarded))


@pytest.mark.cuda
def test_on_a_gpu_nothing_waits(device: str) -> None:
    if device == "cpu":
        pytest.skip("a GPU's question")
    mu, raw = (torch.randn(64, 8, device=device, requires_grad=True) for _ in range(2))
    bad = raw.detach().clone()
    bad[3, 3] = NAN
    with nan_guard(on_exit="ignore") as guard:
        vaefast.gaussian_kl(mu, raw).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            vaefast.gaussian_kl(mu, bad).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    first = guard.first()
    assert first is not None and (first.name, first.call) == ("logvar", 2)


def test_missing_experts_are_not_looked_at(backend: str) -> None:
    mus, logvars = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    mask = torch.tensor([[True, False, True, True]] * 3)
    mus[:, 1], logvars[:, 1] = torch.nan, torch.inf
    with nan_guard():
        vaefast.product_of_experts(mus, logvars, mask)
    with nan_guard(on_exit="ignore") as guard:
        vaefast.product_of_experts(mus, logvars)
    found = guard.first()
    assert found is not None and (found.function, found.role, found.name) == ("product_of_experts", "argument", "mus")
