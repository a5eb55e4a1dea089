"""What the documentation takes for granted, and its blocks of Python: of the pages, the README, and the docstrings."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import vaefast

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# a comment before a block says which package it needs beside vaefast's own, or that it is a part of a program
MARK = r"(?:<!-- (?P<mark>[^>]*?) -->\n+)?"
BLOCK = re.compile(rf"^{MARK}```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
EXAMPLE = re.compile(r"^( *)Example::\n\n((?:\1 +.*\n|\n)+)", re.MULTILINE)


class Block(NamedTuple):
    """``needs`` is a module that is not vaefast's to bring; ``part`` is no program by itself, and why."""

    page: str
    line: int
    code: str
    needs: str
    part: str


def blocks_of(page: Path) -> list[Block]:
    text, found = page.read_text(), []
    for m in BLOCK.finditer(text):
        mark, name = m["mark"] or "", str(page.relative_to(ROOT))
        line = text.count("\n", 0, m.start("code")) + 1
        needs, part = (
            mark.removeprefix(f"{word}: ") if mark.startswith(f"{word}: ") else "" for word in ("needs", "part")
        )
        found.append(Block(name, line, m["code"], needs, part))
    return found


def example_of(docstring: str) -> str:
    """The code below ``Example::``; nothing where there is none."""
    found = EXAMPLE.search(docstring + "\n")
    return textwrap.dedent(found[2]).strip() if found else ""


def names() -> dict[str, Any]:
    """What stands for the reader's own program: 128 pictures of 784 numbers in [0, 1], 20 latents, networks, a loader.

    Names are those of the docstrings; each call makes them anew.
    """
    torch.manual_seed(0)
    x, labels = torch.rand(128, 784), torch.randint(0, 10, (128,))
    encoder, decoder = nn.Linear(784, 2 * 20), nn.Linear(20, 784)
    with torch.no_grad():
        encoder.weight.mul_(0.1)
    mu, logvar = (t.detach().requires_grad_() for t in encoder(x).chunk(2, dim=1))
    z = mu.detach() + torch.randn_like(mu)
    logits = decoder(z).detach().requires_grad_()
    images = x.clone()
    images.view(-1)[3 : 3 + 784] = 200.0
    prior = nn.ParameterList([torch.zeros(20), torch.zeros(20)])
    found: dict[str, Any] = {
        "torch": torch, "nn": nn, "F": F, "vaefast": vaefast, "labels": labels, "x": x, "encoder": encoder,
        "decoder": decoder, "mu": mu, "logvar": logvar, "raw": logvar, "z": z, "logits": logits, "recon": logits,
        "std": torch.exp(0.5 * logvar.detach()), "images": images,
        "mean": torch.sigmoid(logits).detach().requires_grad_(),
        "probabilities": torch.sigmoid(logits).detach().requires_grad_(),
        "log_var_x": torch.zeros((), requires_grad=True), "log_scale": torch.zeros((), requires_grad=True),
        "prior_mu": prior[0], "prior_logvar": prior[1], "prior": prior,
        "nll": F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x),
        "optimizer": torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3),
        "loader": x.split(32), "held_out": torch.rand(64, 784).split(32), "step": 100, "seed": 0,
        "moments": torch.randn(2, 8, 4, 4, requires_grad=True), "prior_moments": torch.randn(2, 8, 4, 4),
        "mus": [torch.randn(128, d, requires_grad=True) for d in (4, 8)],
        "logvars": [torch.randn(128, d, requires_grad=True) for d in (4, 8)],
        "prior_mus": [torch.zeros(d, requires_grad=True) for d in (4, 8)],
        "prior_logvars": [torch.zeros(d, requires_grad=True) for d in (4, 8)],
        "weight_mus": [(0.01 * torch.randn(s)).requires_grad_() for s in ((10, 784), (10,))],
        "weight_rhos": [torch.full(s, -5.0, requires_grad=True) for s in ((10, 784), (10,))],
        "log_joint": torch.zeros(128), "kls": [torch.ones(()), torch.ones(())],
        "counts_decoder": lambda z: (torch.ones(len(z), 50), torch.ones(50), torch.zeros(len(z), 50)),
        "VAE": lambda: nn.Linear(784, 784),
    }  # fmt: skip
    return found


def run(code: str, namespace: dict[str, Any], where: str) -> None:
    exec(compile(code, where, "exec"), namespace)
