"""What a mask hides adds 0 and gets gradient 0, whatever it holds: every likelihood and reduction, single elements,
whole samples, the whole batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from inputs import LIKELIHOOD_CASES, REDUCTIONS, Data, assert_within, over_planes, posterior, training
from torch import Tensor

from vaefast import Likelihood
from vaefast.reference import COMPOSED, LIKELIHOODS

B, D = 4, 6
# which elements count
MASKS: dict[str, Tensor] = {
    "some elements": torch.rand(B, D, generator=torch.Generator().manual_seed(1)) < 0.6,
    "a sample": torch.tensor([True, False, True, True])[:, None],
    "all samples but one": torch.tensor([False, False, True, False])[:, None],
    "a column": torch.arange(D) != 2,
    "the first": torch.arange(B * D).view(B, D) > 0,
    "the whole batch": torch.zeros(B, D, dtype=torch.bool),
    "the whole batch, as one": torch.zeros((), dtype=torch.bool),
}
CASES: list[tuple[str | Likelihood, int]] = [
    *LIKELIHOOD_CASES,
    *((name, 1) for name in COMPOSED),
    (Likelihood("gaussian_optimal", per_sample=True), 1),
    (Likelihood("gaussian_optimal", floor=0.0), 1),
    (Likelihood("gaussian_optimal", per_sample=True, floor=0.0), 1),
    (Likelihood("gaussian_optimal", per_sample=True, floor=10.0), 1),
]


def name_of(likelihood: str | Likelihood) -> str:
    return likelihood if isinstance(likelihood, str) else likelihood.name


def data_of(likelihood: str | Likelihood, count: int) -> Data:
    name = name_of(likelihood)
    return training("gaussian" if name in COMPOSED else name, count, (B, D))


def hidden(likelihood: str, mask: Tensor, t: Tensor) -> Tensor:
    """The mask of the elementwise loss, in the shape of a parameter or of the target."""
    on = mask.expand(B, D)
    return (over_planes(likelihood, on, t) if likelihood in LIKELIHOODS else on).expand(t.shape)


def spoilt(data: Data, likelihood: str, mask: Tensor, junk: float) -> Data:
    recon = [torch.where(hidden(likelihood, mask, p), p, junk).requires_grad_() for p in data.recon]
    return Data(tuple(recon), torch.where(hidden(likelihood, mask, data.target), data.target, junk))


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize(("likelihood", "count"), CASES, ids=str)
@pytest.mark.parametrize(("junk", "weights"), [(math.nan, False), (math.inf, True)], ids=["mask", "weights"])
def test_what_is_hidden_plays_no_part(
    face: Any, likelihood: str | Likelihood, count: int, mask: str, junk: float, weights: bool
) -> None:
    name, on = name_of(likelihood), MASKS[mask]
    clean = data_of(likelihood, count)
    bad = spoilt(clean, name, on, junk)
    weight = on * 1.5 if weights else on
    for reduction in REDUCTIONS:
        if name in COMPOSED and reduction == "none":
            continue
        found = face.reconstruction_loss(
            bad.recon, bad.target, likelihood=likelihood, reduction=reduction, weight=weight
        )
        grads = torch.autograd.grad(found.sum(), bad.recon)
        seen = clean.leaves()
        exact = oracle(likelihood, seen, on, 1.5 if weights else 1.0, reduction)
        assert_within(found, exact, 1e-5, reduction)
        wanted = torch.autograd.grad(exact.sum(), seen.recon, allow_unused=True) if exact.requires_grad else [None] * 9
        for g, w, p in zip(grads, wanted, bad.recon):
            off = ~hidden(name, on, p)
            assert (g[off] == 0).all(), reduction
            w = torch.zeros_like(p) if w is None else w
            scale = w.abs().max().clamp(min=1.0).item()
            assert_within(g[~off], w[~off], 2e-5 * scale, reduction)


def oracle(likelihood: str | Likelihood, data: Data, on: Tensor, w: float, reduction: str) -> Tensor:
    """In float64, of what is seen alone, by loops over samples."""
    name, on = name_of(likelihood), on.expand(B, D)
    recon, x = [p.double() for p in data.recon], data.target.double()
    if name not in COMPOSED:
        entry = LIKELIHOODS[name]
        elements = torch.where(on, w * entry.nll(x, *recon, **entry.options), 0.0)
        rows = elements.flatten(1).sum(1)
    else:
        options = likelihood.options if isinstance(likelihood, Likelihood) else COMPOSED[name].options
        squares = [(x[b] - recon[0][b])[on[b]] ** 2 for b in range(B)]
        everything = torch.cat(squares)

        def of(own: Tensor, shared: Tensor) -> Tensor:
            if not len(own):
                return torch.zeros((), dtype=torch.float64)
            s = shared.mean().clamp(min=options["floor"])
            return w * ((own / s).sum() + len(own) * torch.log(2 * math.pi * s)) / 2

        rows = torch.stack([of(own, own if options["per_sample"] else everything) for own in squares])
        elements = rows
    return {
        "none": lambda: elements,
        "per_sample": lambda: rows,
        "batchmean": lambda: rows.mean(),
        "sum": lambda: rows.sum(),
        "mean": lambda: rows.sum() / on.numel(),
    }[reduction]()


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize(("likelihood", "count"), CASES, ids=str)
@pytest.mark.parametrize("call", ["elbo_loss", "elbo_terms"])
def test_in_the_elbo(face: Any, likelihood: str | Likelihood, count: int, mask: str, call: str) -> None:
    name, on = name_of(likelihood), MASKS[mask]
    bad, q = spoilt(data_of(likelihood, count), name, on, math.nan), posterior((B, 3)).leaves()
    for reduction in ("per_sample", "batchmean", "sum"):
        options: dict[str, Any] = {"likelihood": likelihood, "weight": on, "reduction": reduction}
        for extra in ({}, {"free_bits": 0.1}):
            out = getattr(face, call)(bad.recon, bad.target, q.mu, q.raw, **options, **extra)
            loss = out if isinstance(out, Tensor) else out.loss
            nll = face.reconstruction_loss(bad.recon, bad.target, **options)
            kl = face.gaussian_kl(q.mu, q.raw, reduction=reduction, **extra)
            torch.testing.assert_close(loss, nll + kl, rtol=1e-5, atol=1e-5)
            for g, p in zip(torch.autograd.grad(loss.sum(), bad.recon), bad.recon):
                assert g.isfinite().all() and (g[~hidden(name, on, p)] == 0).all()


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(face: Any, mask: str, dtype: torch.dtype) -> None:
    for likelihood, count in CASES:
        data = spoilt(data_of(likelihood, count).to(dtype), name_of(likelihood), MASKS[mask], math.nan)
        options: dict[str, Any] = {"likelihood": likelihood, "weight": MASKS[mask]}
        nll = face.reconstruction_loss(data.recon, data.target, reduction="batchmean", **options)
        assert nll.isfinite(), likelihood
        for g, p in zip(torch.autograd.grad(nll, data.recon), data.recon):
            assert (g[~hidden(name_of(likelihood), MASKS[mask], p)] == 0).all(), likelihood


@pytest.mark.parametrize(("likelihood", "count"), [c for c in CASES if c[0] not in LIKELIHOODS or c[1] == 1], ids=str)
def test_second_derivatives(face: Any, likelihood: str | Likelihood, count: int) -> None:
    name, on = name_of(likelihood), MASKS["a sample"]
    bad = spoilt(data_of(likelihood, count).to(torch.float64), name, on, math.nan)
    nll = face.reconstruction_loss(bad.recon, bad.target, likelihood=likelihood, weight=on)
    grads = torch.autograd.grad(nll, bad.recon, create_graph=True)
    for g, p in zip(torch.autograd.grad(sum(g.square().sum() for g in grads), bad.recon, allow_unused=True), bad.recon):
        assert g is None or (g[~hidden(name, on, p)] == 0).all()
