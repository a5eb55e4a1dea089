"""Traces and exports, for a model that runs elsewhere: of PyTorch's operators alone, they give what eager gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import LIKELIHOOD_CASES, training
from torch import Tensor, nn

import vaefast
from vaefast import Likelihood
from vaefast.reference import LIKELIHOODS

B, D, X = 4, 3, 6
INPUTS: dict[str, Tensor] = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(k))
    for k, (name, shape) in enumerate({"mu": (B, D), "logvar": (B, D), "recon": (B, X), "x": (B, X)}.items())
}
INPUTS["x"] = INPUTS["x"].sigmoid()


class Calls(nn.Module):
    """A module of one call, in arguments of which nothing is random."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> Any:
        return self.call(mu, logvar, recon, x)


class OfAny(Calls):
    def forward(self, *args: Tensor) -> Any:
        return self.call(*args)


FIXED: dict[str, Callable[..., Any]] = {
    "gaussian_kl": lambda mu, lv, r, x: vaefast.gaussian_kl(mu, lv),
    "gaussian_kl with options": lambda mu, lv, r, x: vaefast.gaussian_kl(mu, lv, lv, mu, free_bits=0.1, balance=0.8),
    "kl_per_dim": lambda mu, lv, r, x: vaefast.kl_per_dim(mu, lv),
    "reparameterize, eps": lambda mu, lv, r, x: vaefast.reparameterize(mu, lv, eps=mu),
    "sample_with_kl, eps": lambda mu, lv, r, x: vaefast.sample_with_kl(mu, lv, eps=mu),
    "reconstruction_loss": lambda mu, lv, r, x: vaefast.reconstruction_loss(r, x),
    "reconstruction_loss, two": lambda mu, lv, r, x: vaefast.reconstruction_loss((r, x), x, likelihood="gaussian"),
    "elbo_loss": lambda mu, lv, r, x: vaefast.elbo_loss(r, x, mu, lv),
    "elbo_terms": lambda mu, lv, r, x: tuple(vaefast.elbo_terms(r, x, mu, lv, reduction="per_sample")),
    "multi_tensor_gaussian_kl": lambda mu, lv, r, x: vaefast.multi_tensor_gaussian_kl([mu, r], [lv, x]),
    "DiagonalGaussian.kl": lambda mu, lv, r, x: vaefast.DiagonalGaussian(torch.cat((mu, lv), 1)).kl(),
}
CRITERION = vaefast.ELBOLoss()
FIXED["ELBOLoss"] = lambda mu, lv, r, x: CRITERION(r, x, mu, lv)
RANDOM: dict[str, Callable[..., Any]] = {
    "reparameterize": lambda mu, lv, r, x: vaefast.reparameterize(mu, lv),
    "reparameterize, torch": lambda mu, lv, r, x: vaefast.reparameterize(mu, lv, noise="torch"),
    "reparameterize, philox": lambda mu, lv, r, x: vaefast.reparameterize(mu, lv, noise="philox"),
    "reparameterize, many": lambda mu, lv, r, x: vaefast.reparameterize(mu, lv, num_samples=3),
    "sample_with_kl": lambda mu, lv, r, x: vaefast.sample_with_kl(mu, lv),
    "sample_with_kl, estimated": lambda mu, lv, r, x: vaefast.sample_with_kl(mu, lv, estimator="stl"),
    "multi_tensor_sample_with_kl": lambda mu, lv, r, x: vaefast.multi_tensor_sample_with_kl([mu, r], [lv, x])[0],
    "DiagonalGaussian.sample": lambda mu, lv, r, x: vaefast.DiagonalGaussian(torch.cat((mu, lv), 1)).sample(),
    "Normal.rsample": lambda mu, lv, r, x: vaefast.distributions.Normal(mu, logvar=lv).rsample(),
    "sample_likelihood": lambda mu, lv, r, x: vaefast.sample_likelihood((r, x), "gaussian"),
}
EVERY = pytest.mark.parametrize("name", [*FIXED, *RANDOM])


def assert_same(found: Any, expected: Any) -> None:
    pairs = zip(found, expected, strict=True) if isinstance(expected, (tuple, list)) else [(found, expected)]
    for f, e in pairs:
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)


def foreign(program: torch.export.ExportedProgram) -> set[str]:
    """Operators that are not PyTorch's own."""
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    return {str(t) for t in targets if isinstance(t, torch._ops.OpOverload) and t.namespace not in ("aten", "prims")}


@EVERY
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exports_hold_pytorchs_operators(name: str, strict: bool) -> None:
    module = Calls({**FIXED, **RANDOM}[name])
    program = torch.export.export(module, tuple(INPUTS.values()), strict=strict)
    assert not foreign(program)
    decomposed = program.run_decompositions()
    assert not foreign(decomposed)
    if name in FIXED:
        for runs in (program, decomposed):
            assert_same(runs.module()(*INPUTS.values()), module(*INPUTS.values()))
    else:
        z = decomposed.module()(*INPUTS.values())
        again = decomposed.module()(*INPUTS.values())
        assert not torch.equal(*(t[0] if isinstance(t, (tuple, list)) else t for t in (z, again)))


GRAPHS: dict[str, Callable[[Callable[..., Any], tuple[Tensor, ...]], Callable[..., Any]]] = {
    "export": lambda f, args: torch.export.export(OfAny(f), args).module(),
    "compile": lambda f, args: torch.compile(f, backend="aot_eager", fullgraph=True),
    "trace": lambda f, args: torch.jit.trace(f, args, check_trace=False),
}


@pytest.mark.parametrize("graph", list(GRAPHS))
@pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
def test_likelihoods(likelihood: str, count: int, graph: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are eager's, and so are a trace's draws; where a dtype may be too narrow, those of a graph are wide."""
    torch._dynamo.reset()
    # torch's default, until Dynamo changes it for the process
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    data = training(likelihood, count, (B, X))

    def loss(*args: Tensor) -> Tensor:
        return vaefast.reconstruction_loss(args[:-1], args[-1], likelihood=Likelihood(likelihood))

    def draw(*recon: Tensor) -> Tensor:
        return vaefast.sample_likelihood(recon, likelihood)

    args = (*data.recon, data.target.float())
    assert_same(GRAPHS[graph](loss, args)(*args), loss(*args))
    halves = tuple(p.half() for p in data.recon)
    run = GRAPHS[graph](draw, halves)
    torch.manual_seed(0)
    found = run(*halves)
    torch.manual_seed(0)
    eager = draw(*halves)
    bounded = LIKELIHOODS[likelihood].support in ("unit", "bins", "some of total", "class")
    assert found.dtype == (eager.dtype if bounded else torch.float32)
    assert found.shape == eager.shape and not found.isnan().any()
    if graph == "trace":
        torch.testing.assert_close(found.to(eager.dtype), eager)


@EVERY
def test_exports_of_any_batch(name: str) -> None:
    module = Calls({**FIXED, **RANDOM}[name])
    batch = torch.export.Dim("batch", min=2)
    dims = {key: {0: batch} for key in INPUTS}
    program = torch.export.export(module, tuple(INPUTS.values()), dynamic_shapes=dims)
    larger = [torch.cat([t] * 5) for t in INPUTS.values()]
    found, eager = program.module()(*larger), module(*larger)
    if name in FIXED:
        assert_same(found, eager)
    else:
        for f, e in zip(*(x if isinstance(x, (tuple, list)) else [x] for x in (found, eager)), strict=True):
            assert f.shape == e.shape


@EVERY
def test_jit_traces(name: str) -> None:
    module = Calls({**FIXED, **RANDOM}[name])
    traced = torch.jit.trace(module, tuple(INPUTS.values()), check_trace=name in FIXED)
    if name in FIXED:
        assert_same(traced(*INPUTS.values()), module(*INPUTS.values()))
        leaf = INPUTS["mu"].clone().requires_grad_()
        rest = list(INPUTS.values())[1:]
        found, expected = (f(leaf, *rest) for f in (traced, module))
        sums = [sum(t.sum() for t in x) if isinstance(x, (tuple, list)) else x.sum() for x in (found, expected)]
        if sums[1].requires_grad:
            assert_same(*(torch.autograd.grad(s, leaf)[0] for s in sums))


def test_native_keeps_the_operators(extension: object) -> None:
    """Whoever exports for a process that has vaefast, and says so."""
    with vaefast.use_backend("native"):
        program = torch.export.export(Calls(FIXED["elbo_loss"]), tuple(INPUTS.values()))
    assert foreign(program) == {"vaefast.elbo.default"}


@pytest.mark.pypi
@pytest.mark.parametrize("name", [name for name in {**FIXED, **RANDOM} if "philox" not in name])
def test_onnx(name: str) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; `make test-pypi` installs it")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; `make test-pypi` installs it")
    module = Calls({**FIXED, **RANDOM}[name])
    program = torch.onnx.export(module, tuple(INPUTS.values()), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    found = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), INPUTS.values())})
    expected = module(*INPUTS.values())
    flat = list(expected) if isinstance(expected, (tuple, list)) else [expected]
    for f, e in zip(found, flat, strict=True):
        assert f.shape == tuple(e.shape)
        if name in FIXED:
            torch.testing.assert_close(torch.as_tensor(f), e, rtol=1e-5, atol=1e-6)


@pytest.mark.pypi
def test_tensorboard_draws_the_graph(tmp_path: Any) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed; `make test-pypi` installs it")
    from torch.utils.tensorboard import SummaryWriter

    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(X, 2 * D), nn.Linear(D, X)

        def forward(self, x: Tensor) -> Tensor:
            mu, logvar = self.encoder(x).chunk(2, 1)
            z, kl = vaefast.sample_with_kl(mu, logvar)
            return vaefast.reconstruction_loss(self.decoder(z), x) + kl

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(VAE(), INPUTS["x"])


@pytest.mark.pypi
def test_ahead_of_time(tmp_path: Any) -> None:
    """AOTInductor packages a model, sampling and all."""
    program = torch.export.export(Calls(FIXED["elbo_loss"]), tuple(INPUTS.values()))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert_same(torch._inductor.aoti_load_package(package)(*INPUTS.values()), FIXED["elbo_loss"](*INPUTS.values()))
