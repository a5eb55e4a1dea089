"""Training loops that are compiled or exported: one graph, no recompiling, fresh noise in every call and every draw."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from inputs import generator
from loops import LATENTS, PIXELS, VAE, Data, Inputs, assert_right, data, everything, inputs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import vaefast


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(f: Callable[[Inputs, Data], tuple[Tensor, list[Tensor]]], t: Inputs, d: Data) -> list[Tensor]:
    """A step: the loss and gradients are right for the noise that was drawn, which is what is given back."""
    loss, samples = f(t, d)
    assert_right(loss, samples, list(torch.autograd.grad(loss, t)), t, d)
    return [s.detach().clone() for s in samples]


def assert_all_differ(samples: list[Tensor], why: str = "") -> None:
    """Of one shape and noise no two, by their standardised first rows."""
    seen = [tuple(s.flatten().tolist()) for s in samples]
    assert len(set(seen)) == len(seen), why


def test_fullgraph_of_everything_draws_anew_in_every_call(native: str) -> None:
    """Through Inductor: values, gradients, and no sample twice, neither within a graph nor from call to call."""
    f = torch.compile(everything, fullgraph=True)
    t, d = inputs(device=native), data(device=native)
    assert_all_differ([z for _ in range(3) for z in run(f, t, d)])


def test_fullgraph_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback is as compilable: nothing in it asks for what the build left."""
    monkeypatch.setattr(vaefast._native, "_C", None)
    monkeypatch.setattr(vaefast._build, "info", lambda: 1 / 0)
    f = torch.compile(everything, fullgraph=True, backend="aot_eager")
    t, d = inputs(), data()
    assert_all_differ([z for _ in range(2) for z in run(f, t, d)])


@pytest.mark.cuda
def test_mode_reduce_overhead_on_cuda() -> None:
    """Everything in Inductor's own CUDA graphs; test_cuda.py has a step's details."""
    pytest.importorskip("triton", reason="Inductor needs triton for a GPU")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; run `make gpu` on a machine with one")
    f = torch.compile(everything, fullgraph=True, mode="reduce-overhead")
    t, d = inputs(device="cuda"), data(device="cuda")
    seen: list[Tensor] = []
    offsets = []
    for _ in range(4):  # the first calls warm up and record; later ones replay
        torch.compiler.cudagraph_mark_step_begin()
        offsets.append(torch.cuda.default_generators[0].get_offset())
        seen += run(f, t, d)

    @torch.compile(mode="reduce-overhead")
    def alone(x: Tensor) -> Tensor:
        return x + torch.randint(1 << 60, (1,), device=x.device)

    words = []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        words.append(int(alone(torch.zeros(1, dtype=torch.int64, device="cuda"))))
    assert_all_differ(seen, f"the generator stood at {offsets}; torch.randint alone, compiled so, drew {words}")


def test_batch_sizes_do_not_recompile_after_the_second(native: str) -> None:
    """By dynamo's own choice, without dynamic=True: the second size makes the graph dynamic, the others take it."""
    counter = CompileCounterWithBackend("aot_eager")
    f = torch.compile(everything, fullgraph=True, backend=counter)
    compiled = []
    for batch in (5, 7, 2, 12, 33):
        run(f, inputs(batch, device=native), data(batch, device=native))
        compiled.append(counter.frame_count)
    assert compiled == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("reduction", ["batchmean", "per_sample"])
def test_batch_sizes_of_many_posteriors_do_not_recompile_after_the_second(native: str, reduction: str) -> None:
    counter = CompileCounterWithBackend("eager")

    def loss(t: Inputs) -> Tensor:
        return vaefast.multi_tensor_gaussian_kl([t.mu, t.raw], [t.raw, t.mu], reduction=reduction)

    f = torch.compile(loss, fullgraph=True, backend=counter)
    for batch in (5, 7, 2, 12):
        t = inputs(batch, device=native)
        torch.testing.assert_close(f(t), loss(t))
    assert counter.frame_count == 2


Drawing = Callable[[Tensor, Tensor], Tensor]
DRAWS: dict[str, Drawing] = {
    "reparameterize": vaefast.reparameterize,
    "sample_with_kl": lambda m, r: vaefast.sample_with_kl(m, r)[0],
    "mc": lambda m, r: vaefast.sample_with_kl(m, r, estimator="mc")[0],
    "num_samples": lambda m, r: vaefast.reparameterize(m, r, num_samples=2)[0],
    "torch noise": lambda m, r: vaefast.reparameterize(m, r, noise="torch"),
    "packed": lambda m, r: vaefast.DiagonalGaussian(torch.cat((m, r), 1)).sample(),
    "multi": lambda m, r: vaefast.multi_tensor_sample_with_kl([m], [r])[0][0],
}


@pytest.mark.parametrize("name", list(DRAWS))
def test_fresh_noise_for_each_of_several_draws_in_one_graph(native: str, name: str) -> None:
    """Identical calls, which common subexpressions would be merged of; and a seed gives the whole graph again."""
    draw = DRAWS[name]
    f = torch.compile(lambda m, r: [draw(m, r) for _ in range(3)], fullgraph=True, backend="aot_eager")
    mu, raw = (torch.zeros(4, 6, device=native, requires_grad=True) for _ in range(2))
    torch.manual_seed(1)
    first, second = f(mu, raw), f(mu, raw)
    drawn = [*first, *second]
    assert all((a != b).all() for k, a in enumerate(drawn) for b in drawn[:k])
    torch.manual_seed(1)
    again = f(mu, raw)
    assert all(torch.equal(a, b) for a, b in zip(again, first))
    for z in again:  # d z / d raw = eps / 2: each draw's backward knows its own noise
        (found,) = torch.autograd.grad(z.sum(), raw, retain_graph=True)
        torch.testing.assert_close(found, 0.5 * z.detach(), rtol=1e-6, atol=1e-7)


def test_compiled_autograd_of_a_compiled_step(native: str) -> None:
    """Forward and backward in graphs, the backward traced as a whole by compiled autograd."""
    t, d = inputs(device=native), data(device=native)

    @torch.compile(backend="aot_eager")
    def step(t: Inputs) -> tuple[Tensor, list[Tensor]]:
        loss, samples = everything(t, d)
        loss.backward()
        return loss, samples

    for _ in range(2):
        with torch._dynamo.config.patch(compiled_autograd=True):
            loss, samples = step(t)
        assert_right(loss, samples, [v.grad for v in t], t, d)
        for v in t:
            v.grad = None


class Exported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vae = VAE()

    def forward(self, x: Tensor, labels: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        moments = self.vae.encoder(x)
        mu, logvar = moments.chunk(2, 1)
        z, kl = vaefast.sample_with_kl(mu, logvar)
        again = vaefast.DiagonalGaussian(moments).sample()
        nll = vaefast.reconstruction_loss(self.vae.decoder(z), x)
        return z, again, kl + nll, vaefast.reconstruction_loss(classes, labels, likelihood="categorical"), moments


@pytest.mark.parametrize("strict", [False, True])
def test_export(native: str, strict: bool) -> None:
    """For any batch, saved and loaded: the kernels' operators are in the program, and each call draws anew."""
    module = Exported().to(native)

    def arguments(batch: int) -> tuple[Tensor, ...]:
        t, d = inputs(batch, device=native), data(batch, device=native)
        return d.x, d.labels, t.classes.detach()

    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, arguments(5), strict=strict, dynamic_shapes=({0: batch},) * 3)
    called = {str(node.target).removesuffix(".default") for node in program.graph.nodes}
    assert {"vaefast.posterior", "vaefast.packed_posterior", "vaefast.reconstruction"} <= called
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    seen: list[Tensor] = []
    for runs in (program.module(), torch.export.load(saved).module()):
        for size in (5, 3, 5):
            x, labels, classes = arguments(size)
            z, again, loss, nll, moments = runs(x, labels, classes)
            mu, logvar = moments.detach().double().chunk(2, 1)
            recon = module.vae.decoder(z).detach().double()
            exact = F.binary_cross_entropy_with_logits(recon, x.double(), reduction="sum") / size
            exact = exact - 0.5 * (1 + logvar - mu**2 - logvar.exp()).sum() / size
            torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-5, atol=1e-5)
            entropy = F.cross_entropy(classes.double(), labels, reduction="sum") / size
            torch.testing.assert_close(nll.double(), entropy, rtol=1e-5, atol=1e-5)
            seen += [z.detach(), again.detach()]
    assert_all_differ(seen)


def test_an_exported_loss_can_be_trained(native: str) -> None:
    """Gradients through the program reach the module's parameters and are those of the module itself."""
    if native == "cuda":
        pytest.skip("an exported program draws its seed by torch.randint, a kernel takes a GPU generator's counters")
    module = VAE().to(native)
    x = data(device=native).x
    runs = torch.export.export(module, (x,)).module()
    found = []
    for f in (module, runs):
        torch.manual_seed(2)
        found.append(torch.autograd.grad(f(x), list(f.parameters())))
    for a, e in zip(*found):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7)


GENERATORS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reparameterize": lambda m, g: vaefast.reparameterize(m, m, generator=g),
    "torch noise": lambda m, g: vaefast.reparameterize(m, m, generator=g, noise="torch"),
    "packed": lambda m, g: vaefast.DiagonalGaussian(m).sample(g),
    "a list": lambda m, g: vaefast.reparameterize(m, m, generator=[g] * 4),
}


@pytest.mark.parametrize("name", list(GENERATORS))
def test_generators_are_outside_graphs_and_fullgraph_says_why(native: str, name: str) -> None:
    """Dynamo traces no torch.Generator: the graph breaks there, with eager's results, and fullgraph=True raises."""
    f = GENERATORS[name]
    zero = torch.zeros(4, LATENTS, device=native)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"cannot trace a torch.Generator.*eps="):
        torch.compile(f, fullgraph=True, backend="eager")(zero, generator(1, native))

    class Module(nn.Module):
        def forward(self, m: Tensor) -> Tensor:
            return f(m, own)

    own = generator(1, native)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"cannot trace a torch.Generator.*eps="):
        torch.export.export(Module(), (zero,), strict=True)
    broken = torch.compile(f, backend="eager")
    # on a GPU what is traced behind the break draws its seed by torch.randint, and eager from the generator's counters
    again = f if native == "cpu" else broken
    assert torch.equal(broken(zero, generator(1, native)), again(zero, generator(1, native)))


def test_training_compiled_lowers_the_loss(native: str) -> None:
    """The module compiled as a whole, with an optimiser; it learns what eager would."""
    module = VAE(vaefast.ELBOLoss("gaussian", beta=torch.tensor(0.1))).to(native)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    f = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.rand(64, PIXELS, generator=generator(0)).to(native)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = f(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
