"""A VAE on many processes, with DDP or FSDP
=========================================

The digits' VAE under torchrun: one ELBO, noise of each rank's own, checkpoints that resume::

    torchrun --nproc-per-node 2 examples/ddp_vae.py                      gloo on CPUs, NCCL where torch sees GPUs
    torchrun --nproc-per-node 2 examples/ddp_vae.py --strategy fsdp
    torchrun --nproc-per-node 2 examples/ddp_vae.py --epochs 60 --resume     goes on to epoch 60, as if never stopped
    python examples/ddp_vae.py                                           one process, for comparison

A batch is dealt out sample by sample, none twice and none left out, so that ranks' shares differ in size; with
``process_group="world"`` the gradient is that of one process with the whole batch all the same. What else is special to
many processes: weights from one seed; noise from ``vaefast.distributed.manual_seed``, whose state on each rank is in
the checkpoint; ``model(x)``, since DDP and FSDP work in hooks of forward; bounds that are averaged over the ranks once
an epoch.

Written to ``--out``: checkpoint-* (torch.distributed.checkpoint, which either strategy can load) and metrics.json.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed.checkpoint as dcp
from common import HIDDEN, PIXELS, Bound, tqdm
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vaefast


class VAE(nn.Module):
    """An encoder and a decoder of two hidden layers under a Bernoulli likelihood."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.encoder = common.mlp(PIXELS, HIDDEN, HIDDEN, 2 * latent)
        self.decoder = common.mlp(latent, HIDDEN, HIDDEN, PIXELS)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> vaefast.ELBOTerms:
        """The negative ELBO in nats; its mean over the ranks is that over their images ``[B, 64]``."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = vaefast.reparameterize(mu, logvar, generator=generator)
        return vaefast.elbo_terms(self.decoder(z), x, mu, logvar, process_group="world")


def distribute(model: VAE, strategy: str, device: torch.device) -> nn.Module:
    if strategy == "ddp":
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (model.encoder, model.decoder, model):
        fully_shard(part, mesh=mesh)
    return model


@dataclass
class Training:
    """Everything that a step depends on and changes: what a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    history: list[dict[str, Any]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        # a rank's noise goes on from its generator's state, so each has an entry of its own; the history is text, as
        # entries of lists would be looked for one by one, and loading has no list yet
        noise = {f"noise.{dist.get_rank()}": noise_state(self.device)}
        return {"model": model, "optimizer": optimizer, "history": json.dumps(self.history), **noise}

    def save(self, out: Path) -> None:
        ranks = {"ranks": dist.get_world_size()}
        dcp.save({**self.state(), **ranks}, checkpoint_id=out / f"checkpoint-{len(self.history):05d}")

    def load(self, out: Path) -> None:
        """From the newest checkpoint that is whole: its metadata is written last."""
        whole = sorted(path.parent for path in out.glob("checkpoint-*/.metadata"))
        if not whole:
            raise SystemExit(f"--resume: there is no checkpoint in {out}")
        saved = {"ranks": 0}
        dcp.load(saved, checkpoint_id=whole[-1])
        if saved["ranks"] != dist.get_world_size():
            raise SystemExit(
                f"--resume: {whole[-1]} is of {saved['ranks']} ranks and these are {dist.get_world_size()}; their "
                "noise and their shares of a batch would be others, so it could not go on as if never stopped"
            )
        state = self.state()
        dcp.load(state, checkpoint_id=whole[-1])
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.history = json.loads(state["history"])
        set_noise_state(state[f"noise.{dist.get_rank()}"], self.device)


def noise_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_noise_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def share(rows: Tensor) -> Tensor:
    """This rank's: every Nth, without padding. The last batch of an epoch may leave a rank with none."""
    return rows[dist.get_rank() :: dist.get_world_size()]


def train_epoch(t: Training, x: Tensor, args: argparse.Namespace) -> Bound:
    # the order is the same on all ranks, and is told by the epoch alone, so that no checkpoint need hold it
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1_000_003 * args.seed + len(t.history)))
    total = torch.zeros(3, device=x.device)
    for rows in order.split(args.batch_size):
        t.optimizer.zero_grad()
        terms = t.model(x[share(rows).to(x.device)])
        terms.loss.backward()
        t.optimizer.step()
        total += len(rows) / len(x) * torch.stack(terms).detach()
    return global_bound(total)


@torch.no_grad()
def evaluate(t: Training, x: Tensor) -> Bound:
    generator = torch.Generator(x.device).manual_seed(dist.get_rank())  # of its own: training's noise is left alone
    return global_bound(torch.stack(t.model(share(x), generator)))


def global_bound(local: Tensor) -> Bound:
    terms = vaefast.distributed.global_mean(vaefast.ELBOTerms(*local.unbind()), "world")
    return Bound(-terms.loss.item(), terms.reconstruction.item(), terms.kl.item())


@contextmanager
def processes(args: argparse.Namespace) -> Iterator[torch.device]:
    """The process group that torchrun's variables tell of, or one of this process alone; yields the rank's device."""
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **({} if "RANK" in os.environ else alone))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def run(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    digits = common.read_digits(device)
    torch.manual_seed(args.seed)  # FSDP keeps a part of each rank's weights: they must be the same
    model = distribute(VAE(args.latent).to(device), args.strategy, device)
    t = Training(model, torch.optim.Adam(model.parameters(), lr=args.lr), device)
    vaefast.distributed.manual_seed(args.seed)
    if args.resume:
        t.load(args.out)
    first = dist.get_rank() == 0
    with tqdm(range(len(t.history), args.epochs), desc=args.strategy, unit="epoch", disable=not first) as progress:
        for _ in progress:
            train = train_epoch(t, digits.train, args)
            held_out = evaluate(t, digits.held_out)
            t.history.append({"train": asdict(train), "held_out": asdict(held_out)})
            progress.set_postfix_str(f"held-out ELBO {held_out.elbo:.2f} nats")
            if len(t.history) % args.save_every == 0 or len(t.history) == args.epochs:
                t.save(args.out)
    metrics = {"strategy": args.strategy, "ranks": dist.get_world_size(), "device": args.device, "seed": args.seed}
    metrics |= {"epochs": len(t.history), "history": t.history}
    if first and t.history:
        common.print_bounds({f"{part} digits, epoch {len(t.history)}": bound for part, bound in t.history[-1].items()})
        (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"\nmetrics.json and checkpoints are in {args.out}")
    return metrics


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = common.parser("Trains a VAE of digits on as many processes as torchrun starts.", "out/ddp", 30)
    made.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp", help="replicas, or sharded parameters")
    made.add_argument("--latent", type=common.positive, default=16, help="latent units")
    made.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    made.add_argument("--save-every", type=common.positive, default=10, help="epochs between checkpoints")
    return common.parse(made, argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, on every rank; returns what metrics.json holds."""
    args = parse(argv)
    with common.settings(args), processes(args) as device:
        return run(args, device)


if __name__ == "__main__":
    main()
