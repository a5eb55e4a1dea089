"""What each of several processes does for test_distributed.py, which holds the results against one process's."""

from __future__ import annotations

import contextlib
import datetime
import io
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vaefast

PATIENCE = 100.0
LATENT, PIXELS = 4, 20
# how many of the 12 samples each rank has
SHARES: dict[int, dict[str, tuple[int, ...]]] = {
    1: {"equal": (12,), "unequal": (12,), "one empty": (12,)},
    2: {"equal": (6, 6), "unequal": (9, 3), "one empty": (12, 0)},
    4: {"equal": (3, 3, 3, 3), "unequal": (6, 3, 2, 1), "one empty": (5, 0, 4, 3)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gaussian, beta a tensor": {"likelihood": "gaussian", "beta": torch.tensor(0.3)},
    "free bits a sample": {"free_bits": 0.35, "free_bits_per": "sample", "balance": 0.8},
    "free bits a dimension of the batch": {"free_bits": 0.12, "free_bits_per": "batch_dim", "balance": 0.8},
    "the same, symmetric": {"free_bits": 0.38, "free_bits_per": "batch_dim", "symmetric": True, "beta": 2.0},
    "capacity": {"capacity": 0.49, "beta": 3.0},
    "capacity a tensor": {"capacity": torch.tensor(1.17), "symmetric": True},
    "preset": {"preset": "dreamer"},
    "preset, nats a dimension": {"preset": "pytorch_vae", "beta": 0.5},
    "variance a sample": {"likelihood": vaefast.Likelihood("gaussian_optimal", per_sample=True)},
}
# of all runs of the example
SAME = ("--device", "cpu", "--batch-size", "300")


class Model(nn.Module):
    """A VAE with a trained prior, given its noise."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, 16), nn.SiLU(), nn.Linear(16, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 16), nn.SiLU(), nn.Linear(16, PIXELS))
        self.prior_mu = nn.Parameter(torch.linspace(-0.3, 0.3, LATENT))

    def forward(self, x: Tensor, eps: Tensor, options: dict[str, Any]) -> vaefast.ELBOTerms:
        mu, raw = self.encoder(x).chunk(2, dim=1)
        parameterization = "softplus" if options.get("preset") == "dreamer" else "logvar"
        z = vaefast.reparameterize(mu, raw, parameterization=parameterization, eps=eps)
        return vaefast.elbo_terms(
            self.decoder(z), x, mu, raw, self.prior_mu, parameterization=parameterization, **options
        )


def model() -> Model:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        made = Model()
        # posteriors that move with x, so that ranks' mean KLs lie apart
        made.encoder[2].weight.mul_(4)
        return made


def data(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The 12 samples and their noise."""
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(12, PIXELS, generator=generator)
    return x.to(device), torch.randn(12, LATENT, generator=generator).to(device)


def on(device: str, options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}


def wrapped(strategy: str, device: str) -> nn.Module:
    made = model().to(device)
    if strategy == "ddp":
        return DistributedDataParallel(made)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for part in (made.encoder, made.decoder, made):
        fully_shard(part, mesh=mesh)
    return made


def gradients(m: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in m.named_parameters():
        grad = p.grad
        assert grad is not None, name
        whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found[name.removeprefix("module.")] = whole.cpu().clone()  # zero_grad may write on what it is a view of
    return found


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of every all-reduce, as they are made."""
    sizes: list[int] = []
    real = dist.all_reduce

    def count(t: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(t.numel() * t.element_size())
        return real(t, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", count):
        yield sizes


def losses(rank: int, ranks: int, device: str) -> dict[str, Any]:
    """Terms and gradients of every case, and what was communicated."""
    x, eps = data(device)
    found: dict[str, Any] = {}
    models = {strategy: wrapped(strategy, device) for strategy in ("ddp", "fsdp")}
    for shares, sizes in SHARES[ranks].items():
        mine = [t.split(sizes)[rank] for t in (x, eps)]
        for strategy, m in models.items():
            for case, options in OPTIONS.items():
                m.zero_grad()
                with counted() as sent:
                    terms = m(*mine, {**on(device, options), "process_group": "world"})
                terms.loss.backward()
                logged = vaefast.distributed.global_mean(terms, "world")
                found[shares, strategy, case] = {"logged": [t.cpu() for t in logged], "gradients": gradients(m)}
                found[shares, strategy, case]["sent"] = sent
        m = models["ddp"]
        m.zero_grad()
        with counted() as sent:
            terms = m(*mine, {})
        with counted() as sent_for_logs:
            logged = vaefast.distributed.global_mean(terms, "world", batch=len(mine[0]))
        terms.loss.backward()
        found[shares, "no group"] = {
            "gradients": gradients(m), "sent": sent, "sent for logs": sent_for_logs,
            "logged": [t.cpu() for t in logged], "local": [t.detach().cpu() for t in terms],
        }  # fmt: skip
    return found


def noise(rank: int, device: str) -> dict[str, Any]:
    zeros = torch.zeros(1000, device=device)

    def draw(**kwargs: Any) -> Tensor:
        return vaefast.reparameterize(zeros, zeros, **kwargs).cpu()

    seed = vaefast.distributed.manual_seed(7)
    first = [draw(), draw(noise="torch")]
    assert vaefast.distributed.manual_seed(7) == seed
    again = [draw(), draw(noise="torch")]
    vaefast.distributed.manual_seed(8)
    return {"seed": seed, "first": first, "again": again, "other seed": draw()}


def other_ways(rank: int, ranks: int, device: str) -> dict[str, Any]:
    """By hand, as a module, compiled, in a part of the ranks."""
    x, eps = data(device)
    options = {"process_group": "world"}
    mine = [t.split(SHARES[ranks]["unequal"])[rank] for t in (x, eps)]
    m = model().to(device)
    mu, logvar = m.encoder(mine[0]).chunk(2, dim=1)
    recon = m.decoder(mu)
    args = (recon, mine[0], mu, logvar)
    expected = vaefast.elbo_loss(*args, process_group="world")
    by_hand = vaefast.reconstruction_loss(recon, mine[0]) + vaefast.gaussian_kl(mu, logvar)
    by_hand = by_hand * vaefast.distributed.loss_scale(by_hand, len(mu), dist.group.WORLD)
    with vaefast.use_backend("reference"):
        reference = vaefast.elbo_loss(*args, process_group="world")
    compiled = expected
    if ranks == 2:  # the compiler takes seconds to import
        compiled = torch.compile(vaefast.elbo_loss, fullgraph=True, backend="aot_eager")(*args, process_group="world")
    pair = dist.new_group([0, 1])
    found = {
        "expected": expected,
        "by hand": by_hand,
        "reference": reference,
        "reference module": vaefast.reference.elbo_loss(*args, **options),
        "module": vaefast.ELBOLoss(process_group="world")(*args),
        "compiled": compiled,
    }
    outside = ""
    if rank < 2:
        pair_scale = vaefast.distributed.loss_scale(expected.double(), len(mu), pair)
    else:
        pair_scale = torch.zeros(())
        with contextlib.suppress(TypeError):
            vaefast.elbo_loss(*args, process_group=pair)
            outside = "no error"
    # not nearly 1: kernels skip the scaling of a gradient by 1
    equal = [float(vaefast.distributed.loss_scale(expected, size, "world")) for size in (1, 3, 127)]
    values = {k: v.detach().cpu() for k, v in found.items()}
    return {**values, "pair": pair_scale.cpu(), "outside": outside, "equal": equal}


def everything(rank: int, ranks: int, device: str) -> dict[str, Any]:
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=60))
    try:
        return {
            "losses": losses(rank, ranks, device),
            "noise": noise(rank, device),
            "other ways": other_ways(rank, ranks, device),
        }
    finally:
        dist.destroy_process_group()


def example(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """The example under each strategy: without a stop, stopped and resumed, resumed under the other strategy."""
    from examples_by_path import load_example

    main = load_example("ddp_vae").main
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    begin, numbers = dist.init_process_group, itertools.count()

    def init_process_group(backend: str) -> None:
        # on keys of its own: in those that an earlier group left, ranks would look for each other where none is
        begin(backend, store=dist.PrefixStore(f"run {next(numbers)}", store), rank=rank, world_size=ranks)

    def run(out: str, *args: str) -> Any:
        torch.manual_seed(rank)  # what ran before must not matter
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with quiet[0], quiet[1], mock.patch.object(dist, "init_process_group", init_process_group):
            return main([*SAME, "--out", f"{folder}/{out}", *args])["history"]

    found = {}
    for strategy in ("ddp", "fsdp"):
        found[strategy, "whole"] = run(f"{strategy}-whole", "--epochs", "3", "--strategy", strategy)
        run(f"{strategy}-parts", "--epochs", "1", "--strategy", strategy)
        found[strategy, "parts"] = run(f"{strategy}-parts", "--epochs", "3", "--strategy", strategy, "--resume")
    run("other", "--epochs", "1", "--strategy", "fsdp")
    found["fsdp to ddp"] = run("other", "--epochs", "3", "--strategy", "ddp", "--resume")
    return found


def _process(rank: int, job: Callable[..., Any], ranks: int, argument: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.save(job(rank, ranks, argument), Path(folder) / f"rank{rank}.pt")


def start(job: Callable[..., Any], ranks: int, argument: str, folder: Path) -> list[dict[str, Any]]:
    """What ``job`` returns in each of the processes; an error in one, or no end to it, is an error here."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # it takes a free port, and keeps it
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with mock.patch.dict(os.environ, address):
        context = multiprocessing.start_processes(
            _process, (job, ranks, argument, str(folder)), nprocs=ranks, join=False, start_method="spawn"
        )  # fmt: skip
    assert context is not None
    end = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"{ranks} processes are not done after {PATIENCE:.0f} s"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]
