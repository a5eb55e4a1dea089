"""Every kernel on small tensors that end where their buffers end, for compute-sanitizer to watch; not a pytest file.

``PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python tests/sanitize.py``. Values are the tests' business; here
each case only has to give finite ones. Layouts come first, so that a run cut short has seen every kernel.
"""

from __future__ import annotations

import argparse
import itertools
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


def outputs_and_leaves(case: Case, device: str) -> tuple[list[Tensor], list[Tensor]]:
    kind, _, likelihood = case.what.partition(" ")
    parameterization = case.pick(list(PARAMETERIZATIONS))
    p = posterior(case.shape, parameterization, case.pick(("none", "full", "broadcast", "float")), case.dtype, device)
    latents = [trained(t, case, device) for t in (p.mu, p.raw)]
    prior = [t.requires_grad_() if isinstance(t, Tensor) else t for t in p.prior]
    options: dict[str, Any] = {"parameterization": parameterization}
    if kind == "reparameterize":
        return [vaefast.reparameterize(*latents, **options)], latents
    if kind == "gaussian_kl":
        kl = vaefast.gaussian_kl(*latents, *prior, reduction=case.pick(REDUCTIONS), **options)
        return [kl], [*latents, *(t for t in prior if isinstance(t, Tensor))]
    if kind in ("sample_with_kl", "given"):
        options |= {"eps": trained(p.mu, case, device).detach()} if kind == "given" else {}
        return list(vaefast.sample_with_kl(*latents, reduction=case.pick(REDUCTIONS), **options)), latents
    data = training(likelihood, case.count, case.shape, case.dtype)
    recon = [trained(t, case, device) for t in data.recon]
    target = LAYOUTS[case.layout](data.target.to(device))
    weights = torch.rand(case.shape, generator=generator(3)).to(device, case.dtype)
    weight = case.pick((None, weights > 0.3, weights))
    options |= {"likelihood": likelihood, "weight": weight}
    if kind == "elbo":
        reduction = case.pick(ELBO_REDUCTIONS)
        return [vaefast.elbo_loss(recon, target, *latents, *prior, beta=0.5, reduction=reduction, **options)], [
            *recon,
            *latents,
        ]
    del options["parameterization"]
    return [vaefast.reconstruction_loss(recon, target, reduction=case.pick(REDUCTIONS), **options)], recon


def run(case: Case, device: str) -> None:
    """Forward and backward, then forward without gradients."""
    outputs, leaves = outputs_and_leaves(case, device)
    # 1 is not multiplied by, so only every second case scales by it
    upstream = [torch.full_like(o, case.pick((1.0, 1.5))) for o in outputs]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    with torch.no_grad():
        outputs += outputs_and_leaves(case, device)[0]
    if not all(t.isfinite().all() for t in (*outputs, *gradients)):
        raise ArithmeticError("a result is not finite")


class PastTheEnd:
    """A tensor's memory, said to be longer than it is."""

    def __init__(self, t: Tensor, extra: int) -> None:
        shape, data = (t.numel() + extra,), (t.data_ptr(), False)
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "<f4", "data": data, "version": 2}


def read_past_the_end() -> None:
    """What the sanitizer must report, or its silence means nothing."""
    short = torch.zeros(1000, device="cuda")
    long = torch.as_tensor(PastTheEnd(short, 1024), device="cuda")
    vaefast.gaussian_kl(long, long, reduction="sum")
    torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a case fails or the time was not enough for all."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--seconds", type=float, default=600.0, help="begin no case later than this")
    p.add_argument("--past-the-end", action="store_true", help="plant an error: read beyond a buffer")
    args = p.parse_args(argv)
    end = time.monotonic() + args.seconds
    if args.past_the_end:
        read_past_the_end()
        return 0
    every = list(cases())
    with vaefast.use_backend("native"):
        for done, case in enumerate(every):
            if time.monotonic() > end:
                print(f"only {done} of {len(every)} cases ran in {args.seconds:.0f} s")
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
