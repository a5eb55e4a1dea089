"""Posteriors over modules in real programs: compiled, in half precision, checkpointed, copied, averaged, distributed;
and what becomes of them after training."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import NETWORKS, first
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributions import Categorical, Normal
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import vaefast
from vaefast.bayesian import MeanField, Prediction

ESTIMATORS = ("weights", "local", "flipout")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 4), torch.randint(0, 3, (8,))


def loss_of(model: Any, x: Tensor, y: Tensor, output: Any = None) -> Tensor:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    output = model(x) if output is None else output
    return inner.elbo_loss(output, y, dataset_size=100, likelihood="categorical")


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


# ---- compilers, precision, memory


@pytest.mark.parametrize(
    ("chosen", "what", "estimator"),
    [
        ("auto", "module", "weights"), ("auto", "module", "local"), ("auto", "step", "flipout"),
        ("reference", "step", "weights"),
    ],
)  # fmt: skip
def test_compiles_in_one_graph(chosen: str, what: str, estimator: str) -> None:
    torch._dynamo.reset()
    model, (x, y) = MeanField(mlp(), estimator=estimator), data()
    compiled: Any = torch.compile(model if what == "module" else loss_of, backend="aot_eager", fullgraph=True)

    def loss() -> Tensor:
        return loss_of(model, x, y, compiled(x)) if what == "module" else compiled(model, x, y)

    with vaefast.use_backend(chosen):
        for _ in range(2):
            torch.manual_seed(1)
            found = loss()
            found.backward()
            graph = gradients(model)
        torch.manual_seed(1)
        again = loss()
        other = loss()
    assert torch.equal(found, again) and not torch.equal(found, other)
    assert all(g.isfinite().all() for g in graph)
    # that of the graph, and that of the parameters
    torch.testing.assert_close(model.kl(), MeanField(model.module, init=lambda n, p: _std(model, n)).kl())


def _std(model: MeanField, name: str) -> Tensor:
    return F.softplus(model.rho.get_parameter(name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_half_precision(estimator: str, dtype: torch.dtype) -> None:
    model, (x, y) = MeanField(mlp(), estimator=estimator), data()
    with torch.autocast("cpu", dtype):
        output = model(x)
        loss = loss_of(model, x, y, output)
    assert output.dtype == dtype and loss.dtype == torch.float32
    loss.backward()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model))
    half = MeanField(nn.Linear(4, 3), estimator=estimator).to(dtype)
    output = half(x.to(dtype))
    assert output.dtype == dtype
    loss_of(half, x, y, output).backward()
    assert half.rho.weight.grad.dtype == dtype


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_checkpointing_draws_the_same_again(estimator: str, reentrant: bool) -> None:
    model, (x, y) = MeanField(mlp(), estimator=estimator), data()
    x.requires_grad_()
    found = []
    for output in (lambda: model(x), lambda: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        loss_of(model, x, y, output()).backward()
        found.append(gradients(model))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)
    model.kl().backward()  # what was run again left nothing of its graph
    assert type(model.module[0].weight) is nn.Parameter


def test_a_draw_keeps_no_noise(native: str) -> None:
    """For backward: the layer's input, the weights that were drawn, and the posterior's own two tensors."""
    model = MeanField(nn.Linear(300, 200, bias=False))
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(2, 300)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model(x)
    size = 4 * 300 * 200
    own = {p.data_ptr() for p in model.parameters()}
    assert sum(bytes for at, bytes in kept.items() if at not in own) <= size + x.nbytes + 64
    output.sum().backward()


def test_under_torch_func() -> None:
    model, (x, _) = MeanField(NETWORKS["Linear"].make()), data()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters)
    assert all(found[name].abs().sum() > 0 for name in ("module.weight", "rho.weight"))


# ---- copies and checkpoints


@pytest.mark.parametrize("name", ["LSTM", "tied", "ResNet", "weight norm"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_after_a_forward(name: str, how: str) -> None:
    make, args, where, linear = NETWORKS[name]
    options = {"where": where, "estimator": "local" if linear else "weights"}
    model, given = MeanField(make(), **options).eval(), args()
    model(*given)
    if how == "deepcopy":
        if name == "weight norm":
            pytest.skip("PyTorch copies no module with parametrizations whose weight was computed")
        other = copy.deepcopy(model)
    elif how == "pickle":
        if name == "weight norm":
            pytest.skip("PyTorch pickles no parametrizations")
        other = pickle.loads(pickle.dumps(model))
    else:
        other = MeanField(make(), **options).eval()
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
    torch.manual_seed(1)
    one = first(model(*given))
    torch.manual_seed(1)
    torch.testing.assert_close(first(other(*given)), one, rtol=0, atol=0)
    before = [p.clone() for p in model.parameters()]
    first(other(*given)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    assert not torch.equal(other.kl(), model.kl())


def test_the_state_is_a_networks_and_the_scales() -> None:
    network = mlp()
    model = MeanField(network)
    assert set(model.state_dict()) == {f"module.{k}" for k in network.state_dict()} | {"rho.0.weight", "rho.3.weight"}


def test_an_average_of_parameters() -> None:
    model, (x, y) = MeanField(mlp()), data()
    averaged = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    loss_of(model, x, y).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    expected = [(a + b) / 2 for a, b in zip(averaged.module.parameters(), model.parameters())]
    averaged.update_parameters(model)
    for p, e in zip(averaged.module.parameters(), expected):
        torch.testing.assert_close(p, e)
    averaged(x)
    averaged.module.kl().backward()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_trains(optimizer: type[torch.optim.Optimizer]) -> None:
    model, x = MeanField(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))), torch.randn(64, 4)
    y = x[:, :3].argmax(1)
    step = optimizer(model.parameters(), lr=0.05 if optimizer is torch.optim.SGD else 0.01)
    losses = []
    for _ in range(60):
        step.zero_grad()
        losses.append(model.elbo_loss(model(x), y, dataset_size=10_000, likelihood="categorical"))
        losses[-1].backward()
        step.step()
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_repr_tells_what_is_bayesian() -> None:
    text = repr(MeanField(mlp(), estimator="local", prior=(0.0, 0.1)))
    for part in ("42 of 63 parameters Bayesian, in 2 of 6 tensors", "'local' (2 layers)", "mean=0.0, std=0.1"):
        assert part in text
    assert "rank=3" in repr(MeanField(mlp(), rank=3))


# ---- many processes


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ddp(one_process: None, estimator: str, unused: bool) -> None:
    model, (x, y) = MeanField(mlp(), estimator=estimator), data()
    parallel = DistributedDataParallel(model, find_unused_parameters=unused)
    for _ in range(2):
        torch.manual_seed(1)
        loss_of(parallel, x, y).backward()
        found = gradients(model)
    torch.manual_seed(1)
    loss_of(model, x, y).backward()
    for one, other in zip(found, gradients(model)):
        torch.testing.assert_close(one, other)


def test_fsdp2(one_process: None) -> None:
    """Of the whole model as one unit: its parameters are gathered before its forward draws them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, (x, y) = MeanField(mlp()), data()
    expected = copy.deepcopy(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    for each in (model, expected):
        torch.manual_seed(1)
        loss_of(each, x, y).backward()
    for p, q in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad)


def test_kl_of_shards(one_process: None) -> None:
    """Each rank's part, of which nothing is gathered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial

    model = MeanField(mlp())
    expected = copy.deepcopy(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    kl = model.kl()
    assert isinstance(kl, DTensor) and isinstance(kl.placements[0], Partial)
    kl.full_tensor().backward()
    expected.kl().backward()
    torch.testing.assert_close(kl.full_tensor(), expected.kl())
    for p, q in zip(model.parameters(), expected.parameters()):
        if q.grad is not None:
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)


# ---- after training


@pytest.mark.parametrize("chunk", [None, 3, 100])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_predictions_of_classes(estimator: str, chunk: int | None) -> None:
    """Against torch.distributions, of the same networks all at once."""
    model, (x, _) = MeanField(mlp(), estimator=estimator, init=0.5).eval(), data()
    found = model.predict(
        x, likelihood="categorical", num_samples=7, chunk=chunk, generator=torch.Generator().manual_seed(3)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        each = torch.stack([functional_call(model.module, model.sample(generator), (x,)) for _ in range(7)]).softmax(2)
    p = each.mean(0)
    entropy = Categorical(probs=p).entropy()
    aleatoric, epistemic = (each * (1 - each)).mean(0), each.var(0, correction=0)
    information = entropy - Categorical(probs=each).entropy().mean(0)
    for one, other in zip(found, Prediction(p, aleatoric, epistemic, entropy, information)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert (found.mutual_information > 0).all() and not found.mean.requires_grad
    torch.testing.assert_close(found.aleatoric + found.epistemic, p * (1 - p))


def test_predictions_of_numbers() -> None:
    """The law of total variance, of a network with a log variance of its own."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mean, logvar = self.layer(x).chunk(2, 1)
            return mean, logvar

    model, (x, _) = MeanField(Both(), init=0.5), data()
    found = model.predict((x,), likelihood="gaussian", num_samples=5, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        pairs = [functional_call(model.module, model.sample(generator), (x,)) for _ in range(5)]
    q = Normal(*(torch.stack(t) for t in zip(*((mean, (0.5 * logvar).exp()) for mean, logvar in pairs))))
    torch.testing.assert_close(found.mean, q.mean.mean(0))
    torch.testing.assert_close(found.aleatoric, q.variance.mean(0))
    torch.testing.assert_close(found.epistemic, q.mean.var(0, correction=0), rtol=1e-4, atol=1e-6)
    assert found.entropy is None and found.mutual_information is None


def test_predictions_of_bits() -> None:
    model, (x, _) = MeanField(nn.Linear(4, 2), init=0.5), data()
    found = model.predict(x, likelihood="bernoulli", num_samples=9)
    p = found.mean
    torch.testing.assert_close(found.entropy, torch.distributions.Bernoulli(p).entropy())
    torch.testing.assert_close(found.aleatoric + found.epistemic, p * (1 - p))
    assert (found.mutual_information >= 0).all()
    certain = MeanField(nn.Linear(4, 2), init=1e-6).predict(x, likelihood="bernoulli", num_samples=9)
    assert certain.mutual_information.max() < 1e-5 and certain.epistemic.max() < 1e-9


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_mean_is_a_plain_module(estimator: str) -> None:
    model, (x, _) = MeanField(mlp(), estimator=estimator).eval(), data()
    model(x)
    plain = model.mean()
    assert type(plain) is nn.Sequential
    assert torch.equal(plain(x), plain(x)) and torch.equal(plain(x), model.module(x))
    assert not [hook for m in plain.modules() for hook in m._forward_hooks]
    plain[0].weight.data.zero_()
    assert model.module[0].weight.abs().sum() > 0


def test_pruning() -> None:
    """Of ratios that are known: |mu| from 1 to 12 at a sigma of 1."""
    model = MeanField(nn.Linear(4, 3), init=1.0)
    signs = torch.tensor([1.0, -1.0]).repeat(6).view(3, 4)
    with torch.no_grad():
        model.module.weight.copy_(signs * torch.arange(1.0, 13.0).view(3, 4))
    torch.testing.assert_close(model.signal_to_noise()["weight"], torch.arange(1.0, 13.0).view(3, 4))
    for options, zeros in (
        ({"signal_to_noise": 4.5}, 4), ({"fraction": 0.5}, 6), ({"fraction": 0}, 0), ({"fraction": 1}, 12)
    ):  # fmt: skip
        pruned = model.prune(**options)
        assert (pruned.weight == 0).sum() == zeros and (pruned.weight[pruned.weight != 0].abs() > zeros).all()
        assert torch.equal(pruned.bias, model.module.bias)
    assert (model.module.weight != 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.prune(), "prune takes one of"),
        (lambda m, x: m.prune(1.0, fraction=0.5), "prune takes one of"),
        (lambda m, x: m.prune(fraction=2.0), "fraction must be"),
        (lambda m, x: m.prune(-1.0), "signal_to_noise must be"),
        (lambda m, x: m.predict(x, likelihood="categorical", num_samples=0), "num_samples must be"),
        (lambda m, x: m.predict(x, likelihood="categorical", chunk=0), "chunk must be"),
        (lambda m, x: m.predict(x, likelihood="gaussian_optimal"), "takes its variance from data"),
        (lambda m, x: m.predict(x, likelihood="bernouli"), "likelihood must be one of"),
    ],
)
def test_what_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(MeanField(mlp()).eval(), torch.randn(2, 4))
