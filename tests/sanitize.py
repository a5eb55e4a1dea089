"""Every kernel on small tensors that end where their buffers end, for compute-sanitizer to watch; not a pytest file.

``PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python tests/sanitize.py``. Values are the tests' business; here
each case only has to give finite ones. Layouts come first, so that a run cut short has seen every kernel.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from inputs import ELBO_REDUCTIONS, FLOATING, LIKELIHOOD_CASES, REDUCTIONS, generator, posterior, training
from torch import Tensor

import vaefast
from vaefast.reference import PARAMETERIZATIONS

Layout = Callable[[Tensor], Tensor]
# the same values lying elsewhere, each in a buffer that ends with them
LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda t: t.clone(),
    "misaligned": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape),
    "every second": lambda t: torch.stack((t, t), -1).flatten()[1:].as_strided(t.shape, [2 * s for s in t.stride()]),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "second chunk": lambda t: torch.cat((t, t), -1).chunk(2, -1)[1],
}
# one element; short rows, many and few; long rows, split over blocks and not a multiple of anything; four dimensions
SHAPES = ((1,), (300, 7), (5, 33), (3, 4101), (2, 3, 5, 8))


@dataclass(frozen=True)
class Case:
    """What is called, on which tensors."""

    what: str
    count: int  # of the likelihood's parameters
    dtype: torch.dtype
    layout: str
    shape: tuple[int, ...]
    turn: int  # picks the options

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.turn % len(options)]


def cases() -> Iterator[Case]:
    whats = [(name, 0) for name in ("reparameterize", "gaussian_kl", "sample_with_kl", "given noise")]
    whats += [(f"{f} {name}", count) for f in ("reconstruction", "elbo") for name, count in LIKELIHOOD_CASES]
    products = itertools.product(enumerate(LAYOUTS), enumerate(FLOATING), enumerate(whats))
    for (i, layout), (j, dtype), (k, (what, count)) in products:
        # by its index alone a case would meet the same options in every layout and dtype
        yield Case(what, count, dtype, layout, SHAPES[(i + 2 * j + k) % len(SHAPES)], turn=2 * i + j + k)


def trained(t: Tensor, case: Case, device: str) -> Tensor:
    return LAYOUTS[case.layout](t.to(device)).detach().requires_grad_()


@dataclass(frozen=True)
class Call:
    """A function of vaefast, or of vaefast.reference, what it is given, and the tensors whose gradients are wanted."""

    function: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    leaves: list[Tensor]

    def __call__(self, module: Any = vaefast) -> list[Tensor]:
        found = getattr(module, self.function)(*self.args, **self.options)
        return [found] if isinstance(found, Tensor) else list(found)


def call_of(case: Case, device: str) -> Call:
    kind, _, likelihood = case.what.partition(" ")
    parameterization = case.pick(list(PARAMETERIZATIONS))
    p = posterior(case.shape, parameterization, case.pick(("none", "full", "broadcast", "float")), case.dtype, device)
    latents = [trained(t, case, device) for t in (p.mu, p.raw)]
    prior = [t.requires_grad_() if isinstance(t, Tensor) else t for t in p.prior]
    learned = [*latents, *(t for t in prior if isinstance(t, Tensor))]
    options: dict[str, Any] = {"parameterization": parameterization}
    if kind == "reparameterize":
        return Call(kind, (*latents,), options, latents)
    if kind == "gaussian_kl":
        options["reduction"] = case.pick(REDUCTIONS)
        return Call(kind, (*latents, *prior), options, learned)
    if kind in ("sample_with_kl", "given"):
        options |= {"eps": trained(p.mu, case, device).detach()} if kind == "given" else {}
        options["reduction"] = case.pick(REDUCTIONS)
        return Call("sample_with_kl", (*latents,), options, latents)
    data = training(likelihood, case.count, case.shape, case.dtype)
    recon = [trained(t, case, device) for t in data.recon]
    target = LAYOUTS[case.layout](data.target.to(device))
    weights = torch.rand(case.shape, generator=generator(3)).to(device, case.dtype)
    weight = case.pick((None, weights > 0.3, weights))
    options |= {"likelihood": likelihood, "weight": weight}
    if kind == "elbo":
        options |= {"beta": 0.5, "reduction": case.pick(ELBO_REDUCTIONS)}
        return Call("elbo_loss", (recon, target, *latents, *prior), options, [*recon, *learned])
    del options["parameterization"]
    return Call("reconstruction_loss", (recon, target), options | {"reduction": case.pick(REDUCTIONS)}, recon)


def run(case: Case, device: str) -> None:
    """Forward and backward, then forward without gradients."""
    call = call_of(case, device)
    outputs = call()
    # 1 is not multiplied by, so only every second case scales by it
    upstream = [torch.full_like(o, case.pick((1.0, 1.5))) for o in outputs]
    gradients = torch.autograd.grad(outputs, call.leaves, upstream)
    with torch.no_grad():
        outputs += call_of(case, device)()
    if not all(t.isfinite().all() for t in (*outputs, *gradients)):
        raise ArithmeticError("a result is not finite")


class PastTheEnd:
    """A tensor's memory, said to be longer than it is."""

    def __init__(self, t: Tensor, extra: int) -> None:
        shape, data = (t.numel() + extra,), (t.data_ptr(), False)
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "<f4", "data": data, "version": 2}


def read_past_the_end(device: str) -> None:
    """What the sanitizer must report, or its silence means nothing. On a CPU, which has no sanitizer, the end is that
    of a part of a buffer, so that reading on does no harm."""
    if device == "cuda":
        short = torch.zeros(1000, device=device)
        long = torch.as_tensor(PastTheEnd(short, 1024), device=device)
    else:
        long = torch.zeros(2024)[:1000].as_strided((2024,), (1,))
    kl = vaefast.gaussian_kl(long, long, reduction="sum")
    print(f"read past the end: {kl.item()}")


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a case fails or the time was not enough for all."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--until", type=float, default=math.inf, metavar="TIME", help="begin no case later (time.time())")
    p.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth case")
    p.add_argument("--past-the-end", action="store_true", help="plant an error: read beyond a buffer")
    args = p.parse_args(argv)
    if args.past_the_end:
        read_past_the_end(args.device)
        return 0
    every = list(cases())[:: args.every]
    with vaefast.use_backend("native"):
        for done, case in enumerate(every):
            if time.time() > args.until:
                print(f"only {done} of {len(every)} cases ran before their time was up")
                return 1
            try:
                run(case, args.device)
            except Exception as error:
                print(f"{case}: {type(error).__name__}: {error}")
                return 1
    print(f"{len(every)} cases ran")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
