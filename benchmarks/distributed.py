"""What ``process_group=`` costs a training step, and what is sent: the measurement behind docs/distributed.md.

    torchrun --nproc-per-node 2 -m benchmarks.distributed

A VAE of 784 pixels under DDP, with and without ``process_group="world"``, in turn; the time is the median over rounds
of the slowest rank's. What is sent is counted by torch's profiler in one step: every collective, with its elements.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import vaefast

PIXELS, HIDDEN, LATENT = 784, 400, 20


class VAE(nn.Module):
    """The networks of a small VAE."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))

    def forward(self, x: Tensor, process_group: str | None) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = vaefast.reparameterize(mu, logvar)
        return vaefast.elbo_loss(self.decoder(z), x, mu, logvar, process_group=process_group)


def collectives(step: Callable[[], None]) -> Counter[tuple[str, int]]:
    """(name, elements) of what one step sends."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        step()
    sent: Counter[tuple[str, int]] = Counter()
    for event in seen.events():
        if event.name.startswith(("gloo:", "nccl:")):
            elements = sum(torch.Size(shape).numel() for shape in event.input_shapes)
            sent[event.name, elements] += 1
    return sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128, help="images of a rank")
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    model = DistributedDataParallel(VAE().to(device))
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.rand(args.batch_size, PIXELS, device=device)

    def step(process_group: str | None) -> None:
        optimizer.zero_grad()
        model(x, process_group).backward()
        optimizer.step()

    def timed(process_group: str | None) -> float:
        dist.barrier()
        start = time.perf_counter()
        step(process_group)
        if cuda:
            torch.cuda.synchronize()
        took = torch.tensor(time.perf_counter() - start, device=device)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        return took.item()

    choices = (None, "world")
    for _ in range(10):
        for choice in choices:
            timed(choice)
    rounds = [[timed(choice) for choice in choices] for _ in range(args.rounds)]
    sent = {choice: collectives(lambda choice=choice: step(choice)) for choice in choices}
    if dist.get_rank() == 0:
        without, with_group = (1e3 * statistics.median(column) for column in zip(*rounds))
        more = 1e3 * statistics.median(b - a for a, b in rounds)
        print(
            f"{dist.get_world_size()} ranks: {without:.2f} ms without, {with_group:.2f} ms with, {more:+.2f} ms a round"
        )
        for choice, counts in sent.items():
            print(f"  process_group={choice!r}: {dict(counts)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
