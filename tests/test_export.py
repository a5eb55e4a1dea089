"""Traces and exports, for a model that runs elsewhere: of PyTorch's operators alone, they give what eager gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vaefast

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
    "sample_with_kl": lambda mu, lv, r, x: vaefast.sample_with_kl(mu, lv),
    "multi_tensor_sample_with_kl": lambda mu, lv, r, x: vaefast.multi_tensor_sample_with_kl([mu, r], [lv, x])[0],
    "DiagonalGaussian.sample": lambda mu, lv, r, x: vaefast.DiagonalGaussian(torch.cat((mu, lv), 1)).sample(),
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
@EVERY
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
