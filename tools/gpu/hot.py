"""The hottest kernels once each, for ncu, which looks between cudaProfilerStart and -Stop; on a CPU they just run."""

from __future__ import annotations

import argparse

import torch

from benchmarks import kernels
from tools.gpu.plan import HOT


def main() -> None:
    p = argparse.ArgumentParser(prog="tools.gpu.hot", description="the hottest kernels, once each")
    p.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    p.add_argument("--elements", type=int, default=1 << 25, metavar="N")
    args = p.parse_args()
    device = torch.device(args.device)
    known = {kernel.name: kernel for kernel in kernels.kernels()}
    with torch.no_grad():
        for name in HOT:
            call = known[name].call(*kernels.inputs_of(known[name], args.elements, device, torch.float32))
            call()
            if args.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            call()
            if args.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            print(f"hot: {name}", flush=True)


if __name__ == "__main__":
    main()
