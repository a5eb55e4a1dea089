"""Bad input raises TypeError or ValueError that names the argument, before any kernel runs, whatever the back end.

The operators below are for code that has checked its arguments; called directly with malformed ones they raise too.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import require_native
from inputs import FLOATING, LIKELIHOOD_CASES, REDUCTIONS, generator, training
from torch import Tensor

import vaefast
from vaefast import Parameterization
from vaefast.reference import LIKELIHOODS, PARAMETERIZATIONS

GOOD: dict[str, dict[str, Any]] = {
    "posterior": {"mu": torch.zeros(4, 3), "logvar": torch.zeros(4, 3)},
    "reconstruction": {"recon": torch.zeros(4, 5), "target": torch.zeros(4, 5)},
}
GOOD["elbo"] = {**GOOD["reconstruction"], **GOOD["posterior"]}
KIND = {
    "reparameterize": "posterior",
    "gaussian_kl": "posterior",
    "sample_with_kl": "posterior",
    "reconstruction_loss": "reconstruction",
    "elbo_terms": "elbo",
    "elbo_loss": "elbo",
}
TAKES = {
    "posterior": [*list(KIND)[:3], "elbo_terms", "elbo_loss"],
    "kl": ["gaussian_kl", "sample_with_kl", "elbo_terms", "elbo_loss"],
    "sample": ["reparameterize", "sample_with_kl"],
    "reconstruction": ["reconstruction_loss", "elbo_terms", "elbo_loss"],
    "reduction": ["gaussian_kl", "sample_with_kl", "reconstruction_loss"],
    "elbo": ["elbo_terms", "elbo_loss"],
}
meta = torch.zeros(4, 3, device="meta")
meta5 = torch.zeros(4, 5, device="meta")
INTEGERS = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]
pair = torch.zeros(4, 5), torch.zeros(4, 5)

# which functions, what is changed, the error, and what its message must tell
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    *(("posterior", {"mu": torch.zeros(4, 3, dtype=d)}, TypeError, f"mu.*{str(d)[6:]}") for d in INTEGERS),
    *(("posterior", {"logvar": torch.zeros(4, 3, dtype=d)}, TypeError, f"logvar.*{str(d)[6:]}") for d in INTEGERS),
    *(("kl", {"prior_mu": torch.zeros(4, 3, dtype=d)}, TypeError, f"prior_mu.*{str(d)[6:]}") for d in INTEGERS),
    *(("sample", {"eps": torch.zeros(4, 3, dtype=d)}, TypeError, f"eps.*{str(d)[6:]}") for d in INTEGERS),
    *(("reconstruction", {"recon": torch.zeros(4, 5, dtype=d)}, TypeError, f"recon.*{str(d)[6:]}") for d in INTEGERS),
    *(("reconstruction", {"target": torch.zeros(4, 5, dtype=d)}, TypeError, f"target.*{str(d)[6:]}") for d in INTEGERS),
    *(
        ("reconstruction", {"weight": torch.zeros(4, 5, dtype=d)}, TypeError, f"weight.*{str(d)[6:]}")
        for d in INTEGERS
        if d != torch.bool
    ),
    ("posterior", {"mu": [[0.0] * 3] * 4}, TypeError, "mu.*list"),
    ("posterior", {"mu": None}, TypeError, "mu.*NoneType"),
    ("posterior", {"logvar": 0.0}, TypeError, "logvar.*float"),
    ("posterior", {"logvar": torch.zeros(3)}, ValueError, r"logvar.*\(3,\).*mu.*\(4, 3\)"),
    ("posterior", {"logvar": torch.zeros(4, 1)}, ValueError, r"logvar.*\(4, 1\).*mu.*\(4, 3\)"),
    ("posterior", {"logvar": torch.zeros(3, 4)}, ValueError, r"logvar.*\(3, 4\)"),
    ("posterior", {"logvar": meta}, ValueError, "logvar is on meta.*mu is on cpu"),
    ("posterior", {"parameterization": "sigma"}, ValueError, "parameterization.*'logvar'.*'sigma'"),
    ("posterior", {"parameterization": None}, (TypeError, ValueError), "parameterization"),
    ("posterior", {"parameterization": 3}, (TypeError, ValueError), "parameterization"),
    ("kl", {"prior_mu": "0"}, TypeError, "prior_mu.*str"),
    ("kl", {"prior_mu": True}, TypeError, "prior_mu.*bool"),
    ("kl", {"prior_logvar": [0.0]}, TypeError, "prior_logvar.*list"),
    ("kl", {"prior_mu": torch.zeros(2)}, ValueError, r"prior_mu.*\(2,\).*\(4, 3\)"),
    ("kl", {"prior_mu": torch.zeros(1, 4, 3)}, ValueError, r"prior_mu.*\(1, 4, 3\).*\(4, 3\)"),
    ("kl", {"prior_logvar": torch.zeros(3, 3)}, ValueError, r"prior_logvar.*\(3, 3\).*\(4, 3\)"),
    ("kl", {"prior_logvar": meta}, ValueError, "prior_logvar is on meta"),
    ("sample", {"eps": 0.5}, TypeError, "eps.*float"),
    ("sample", {"eps": torch.zeros(2)}, ValueError, r"eps.*\(2,\).*\(4, 3\)"),
    ("sample", {"eps": torch.zeros(2, 4, 3)}, ValueError, r"eps.*\(2, 4, 3\)"),
    ("sample", {"eps": meta}, ValueError, "eps is on meta"),
    ("sample", {"eps": torch.zeros(4, 3), "generator": torch.Generator()}, ValueError, "eps and generator"),
    ("sample", {"generator": 0}, TypeError, "generator.*int"),
    ("sample", {"mu": meta, "logvar": meta, "generator": torch.Generator()}, ValueError, "generator is on cpu"),
    ("sample", {"noise": "sobol"}, ValueError, "noise.*'philox', 'torch'.*'sobol'"),
    ("reduction", {"reduction": "avg"}, ValueError, "reduction.*'batchmean'.*'avg'"),
    ("reduction", {"reduction": None}, ValueError, "reduction.*None"),
    ("elbo", {"reduction": "mean"}, ValueError, "reduction='mean'.*sizes.*'batchmean'"),
    ("elbo", {"reduction": "none"}, ValueError, "reduction='none'.*'batchmean'"),
    ("elbo", {"reduction": "avg"}, ValueError, "reduction.*'avg'"),
    ("elbo", {"beta": "1"}, TypeError, "beta.*str"),
    ("elbo", {"beta": None}, TypeError, "beta.*NoneType"),
    ("elbo", {"beta": torch.ones(4)}, ValueError, r"beta.*\(4,\)"),
    ("elbo", {"beta": torch.ones((), dtype=torch.int64)}, TypeError, "beta.*int64"),
    ("elbo", {"beta": torch.ones((), device="meta")}, ValueError, "beta is on meta"),
    ("elbo", {"recon": torch.zeros(3, 5), "target": torch.zeros(3, 5)}, ValueError, "recon.*batch of 3.*mu.*4"),
    ("elbo", {"mu": torch.zeros(()), "logvar": torch.zeros(())}, ValueError, "mu is a 0-d"),
    ("elbo", {"mu": meta, "logvar": meta}, ValueError, "mu is on meta.*recon is on cpu"),
    ("reconstruction", {"likelihood": "poisson?"}, ValueError, "likelihood.*'bernoulli'.*'poisson[?]'"),
    ("reconstruction", {"likelihood": None}, TypeError, "likelihood.*NoneType"),
    ("reconstruction", {"likelihood": ["bernoulli"]}, (TypeError, ValueError), "likelihood"),
    ("reconstruction", {"recon": 0.5}, TypeError, "recon.*float"),
    ("reconstruction", {"recon": ()}, ValueError, "recon.*got 0"),
    ("reconstruction", {"recon": (*pair, pair[0]), "likelihood": "gaussian"}, ValueError, "recon.*mean.*logvar.*got 3"),
    ("reconstruction", {"recon": pair}, ValueError, "recon.*logits.*got 2"),
    ("reconstruction", {"recon": (pair[0], "0"), "likelihood": "gaussian"}, TypeError, "logvar.*str"),
    ("reconstruction", {"recon": (pair[0], None), "likelihood": "gaussian"}, TypeError, "logvar.*NoneType"),
    ("reconstruction", {"recon": (pair[0], torch.zeros(4)), "likelihood": "gaussian"}, ValueError, r"logvar.*\(4,\)"),
    ("reconstruction", {"recon": (pair[0], pair[0].int()), "likelihood": "laplace"}, TypeError, "log_scale.*int32"),
    ("reconstruction", {"recon": (torch.zeros(5), pair[0]), "likelihood": "gaussian"}, ValueError, "logvar|target"),
    ("reconstruction", {"recon": (pair[0], meta5), "likelihood": "gaussian"}, ValueError, "logvar is on meta"),
    ("reconstruction", {"recon": meta5}, ValueError, "target is on cpu.*recon is on meta"),
    ("reconstruction", {"target": meta5}, ValueError, "target is on meta"),
    ("reconstruction", {"target": None}, TypeError, "target.*NoneType"),
    ("reconstruction", {"target": torch.zeros(5)}, ValueError, r"target.*\(5,\).*recon.*\(4, 5\)"),
    ("reconstruction", {"target": torch.zeros(4, 1)}, ValueError, r"target.*\(4, 1\)"),
    ("reconstruction", {"target": torch.zeros(5, 4)}, ValueError, r"target.*\(5, 4\)"),
    ("reconstruction", {"weight": 1.0}, TypeError, "weight.*float"),
    ("reconstruction", {"weight": torch.ones(4)}, ValueError, r"weight.*\(4,\).*\(4, 5\)"),
    ("reconstruction", {"weight": torch.ones(2, 4, 5)}, ValueError, r"weight.*\(2, 4, 5\)"),
    ("reconstruction", {"weight": torch.ones(4, dtype=torch.bool)}, ValueError, r"weight.*\(4,\)"),
    ("reconstruction", {"weight": meta5}, ValueError, "weight is on meta"),
]
CASES = [(name, *case[1:]) for case in BAD for name in TAKES[case[0]]]
IDS = [f"{name}-{'-'.join(change)}-{k}" for k, (name, change, *_) in enumerate(CASES)]


@pytest.mark.parametrize(("name", "change", "error", "message"), CASES, ids=IDS)
def test_bad_arguments(face: Any, name: str, change: dict[str, Any], error: Any, message: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(error, match=f"(?s){message}"):
        getattr(face, name)(**{**GOOD[KIND[name]], **change})
    assert torch.equal(torch.get_rng_state(), state), "a refused call draws no seed"


@pytest.mark.parametrize("name", list(KIND))
def test_good_arguments(face: Any, name: str) -> None:
    """What the cases above change is otherwise right."""
    out = getattr(face, name)(**GOOD[KIND[name]])
    assert all(t.isfinite().all() for t in ([out] if isinstance(out, Tensor) else out))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("name", list(KIND))
def test_every_floating_dtype(face: Any, name: str, dtype: torch.dtype) -> None:
    getattr(face, name)(**{k: t.to(dtype) for k, t in GOOD[KIND[name]].items()})


@pytest.mark.parametrize("reduction", ["per_sample", "batchmean"])
@pytest.mark.parametrize("name", TAKES["reduction"])
def test_no_batch(face: Any, name: str, reduction: str) -> None:
    arguments = {k: torch.zeros(()) for k in GOOD[KIND[name]]}
    with pytest.raises(ValueError, match=f"reduction='{reduction}'.*batch.*0-d"):
        getattr(face, name)(**arguments, reduction=reduction)
    getattr(face, name)(**arguments, reduction="sum")


@pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_parameter_counts(face: Any, likelihood: str, count: int, reduction: str) -> None:
    """Every likelihood takes required to all of its parameters, and refuses one more or one fewer."""
    entry, data = LIKELIHOODS[likelihood], training(likelihood, count)
    options = {"likelihood": likelihood, "reduction": reduction}
    face.reconstruction_loss(data.recon, data.target, **options)
    for wrong in (entry.required - 1, len(entry.params) + 1):
        with pytest.raises(ValueError, match=f"recon.*{entry.params[0]}.*got {wrong}"):
            face.reconstruction_loss((data.recon[0],) * wrong, data.target, **options)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"name": "sigma"}, "parameterization.*'sigma'"),
        ({"name": None}, "parameterization"),
        ({"clamp": (1.0, -1.0)}, "clamp"),
        ({"clamp": (math.nan, 1.0)}, "clamp"),
        ({"clamp": (0.0, math.nan)}, "clamp"),
        ({"clamp": (0.0,)}, "clamp"),
        ({"clamp": (0.0, 1.0, 2.0)}, "clamp"),
        ({"clamp": 3.0}, "clamp"),
        ({"clamp": ("a", "b")}, "clamp"),
        ({"clamp": (None, 1.0)}, "clamp"),
        ({"floor": -0.1}, "floor"),
        ({"floor": math.nan}, "floor"),
        ({"floor": math.inf}, "floor"),
        ({"floor": "0.1"}, "floor"),
        ({"floor": None}, "floor"),
    ],
)
def test_bad_parameterizations(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        Parameterization(**arguments)


@pytest.mark.parametrize("name", list(PARAMETERIZATIONS))
def test_good_parameterizations(name: str) -> None:
    for arguments in ({"clamp": (-1, 1)}, {"clamp": [-math.inf, 2.0]}, {"clamp": (1.0, 1.0)}, {"floor": 0}):
        p = Parameterization(name, **arguments)
        z = vaefast.reparameterize(torch.ones(3), torch.ones(3), parameterization=p)
        assert z.shape == (3,)


@pytest.mark.cuda
@pytest.mark.parametrize("name", TAKES["sample"])
def test_generator_of_another_device(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; run `make gpu` on a machine with one")
    f = getattr(vaefast, name)
    with pytest.raises(ValueError, match=r"generator is on cuda.*mu is on cpu"):
        f(**GOOD["posterior"], generator=generator(0, "cuda"))
    with pytest.raises(ValueError, match=r"generator is on cpu.*mu is on cuda"):
        f(**{k: t.cuda() for k, t in GOOD["posterior"].items()}, generator=generator(0))


def test_nan_and_inf_flow_through(backend: str, device: str) -> None:
    """Data is not checked: what is not a number stays where it was."""
    for bad in (math.nan, math.inf, -math.inf):
        mu = torch.zeros(2, 5, device=device)
        mu[0, 1] = bad
        zero = torch.zeros_like(mu)
        for value in (
            vaefast.reparameterize(mu, zero),
            vaefast.gaussian_kl(mu, zero, reduction="none"),
            vaefast.reconstruction_loss(zero, mu, likelihood="gaussian", reduction="none"),
        ):
            assert (~value.isfinite()).nonzero().tolist() == [[0, 1]]


# -- the operators, called directly. In a process of its own each: a crash must not take the others along.

PRELUDE = """
import math, sys, torch, vaefast
sys.path.insert(0, "tests")
from inputs import with_numbers
ops, inf = torch.ops.vaefast, math.inf
mu, raw, x, rec = torch.zeros(6, 20), torch.zeros(6, 20), torch.rand(6, 50), torch.zeros(6, 50)
P, A, seed, one = (mu, raw, None, 0.0, None, 0.0), ("logvar", -inf, inf, 0.0), torch.tensor([5, 0]), torch.tensor(1.0)
def below(name, *arguments):
    return getattr(ops, name)(*with_numbers(name, arguments))
def post(mu=mu, raw=raw, pm=None, plv=None, eps=None, seed=seed, A=A, reduction="sum", sample=True, kl=True):
    return ops.posterior(mu, raw, pm, 0.0, plv, 0.0, eps, seed, None, *A, reduction, None, sample, kl)
def back(dz=mu, dkl=one, p=P, eps=None, seed=seed, A=A, reduction="batchmean", mask=(True, True, False, False)):
    return below("posterior_backward", dz, dkl, *p, eps, seed, *A, reduction, None, list(mask))
m = torch.zeros(6, 4, 5)
def pack(m=m, dim=1, prior=None, clamp=(-1.0, 1.0), seed=seed, reduction="sum"):
    return ops.packed_posterior(m, dim, prior, *clamp, seed, None, *A, reduction, None, True, True)
def pack_back(dz=m[:, 2:], dkl=one, m=m, dim=1, prior=None, seed=seed, reduction="sum", mask=(True, False)):
    return below("packed_backward", dz, dkl, m, dim, prior, -1.0, 1.0, seed, *A, reduction, None, list(mask))
def recon(params=(rec,), target=x, weight=None, name="bernoulli", reduction="sum", options=()):
    return ops.reconstruction(list(params), target, weight, name, list(options), reduction, False)
def recon_back(up=one, params=(rec,), target=x, weight=None, name="bernoulli", reduction="sum", mask=(True,)):
    return below("reconstruction_backward", up, list(params), target, weight, name, [], reduction, list(mask))
def elbo(params=(rec,), target=x, p=P, beta=1.0, reduction="sum", mask=None):
    recon = list(params), target, None, "bernoulli", []
    if mask is None:
        return ops.elbo(*recon, *p, *A, reduction, None, beta, False)
    return below("elbo_forward", *recon, *p, *A, reduction, None, beta, list(mask), [])
def elbo_back(kept=(), dnll=one, dkl=one, params=(rec,), mask=(True,), post_mask=(True, True, False, False)):
    recon = list(params), x, None, "bernoulli", []
    masks = list(mask), list(post_mask)
    return below("elbo_backward_", list(kept), dnll, dkl, 1.0, *recon, *P, *A, "sum", None, *masks)
"""
MALFORMED = [
    "post(raw=raw[:3])",
    "post(raw=raw.to('meta'))",
    "post(pm=raw[:3])",
    "post(plv=torch.zeros(1, 6, 20))",
    "post(eps=raw[:3], seed=None)",
    "post(eps=torch.zeros(2, 6, 20), seed=None)",
    "post(mu=mu.long())",
    "post(raw=raw.long())",
    "post(eps=mu.long(), seed=None)",
    "post(mu=mu.to(torch.complex64))",
    "post(seed=seed[:1])",
    "post(seed=seed[:0])",
    "post(seed=torch.zeros(3, dtype=torch.int64))",
    "post(seed=seed.float())",
    "post(seed=seed.int())",
    "post(seed=seed.to('meta'))",
    "post(seed=torch.zeros(4, dtype=torch.int64)[::2])",
    "post(A=('sigma', -inf, inf, 0.0))",
    "post(reduction='avg')",
    "post(mu=mu[0, 0], raw=raw[0, 0], reduction='per_sample')",
    "post(mu=mu[0, 0], raw=raw[0, 0], reduction='batchmean')",
    "back(A=(5, -inf, inf, 0.0))",
    "back(A=(-1, -inf, inf, 0.0))",
    "back(reduction=5)",
    "back(reduction=6)",
    "back(reduction=-1)",
    "back(mask=(True,))",
    "back(mask=(True, True, True, True))",
    "back(mask=(False, False, False, True))",
    "back(dz=None, dkl=None)",
    "back(seed=None)",
    "back(dz=mu[:3])",
    "back(dz=torch.zeros(2, 6, 20))",
    "back(dz=mu.to('meta'))",
    "back(dz=mu.long())",
    "back(dkl=torch.zeros(20), reduction='per_sample')",
    "back(dkl=torch.zeros(6, 19), reduction='none')",
    "back(p=(mu, raw[:2], None, 0.0, None, 0.0))",
    "back(p=(mu[0, 0], raw[0, 0], None, 0.0, None, 0.0), dz=None)",
    "pack(dim=3)",
    "pack(dim=-1)",
    "pack(dim=2)",
    "pack(m=m[0, 0, 0], dim=0)",
    "pack(m=m.long())",
    "pack(prior=m[:3])",
    "pack(prior=m[:, :2])",
    "pack(prior=m.long())",
    "pack(prior=m.to('meta'))",
    "pack(seed=seed[:1])",
    "pack(reduction='avg')",
    "pack_back(mask=(True,))",
    "pack_back(mask=(True, True))",
    "pack_back(dz=None, dkl=None)",
    "pack_back(dz=m)",
    "pack_back(dz=m[:3, 2:])",
    "pack_back(dim=2)",
    "pack_back(seed=None)",
    "pack_back(prior=m[:3], mask=(True, True))",
    "pack_back(dkl=torch.zeros(5), reduction='per_sample')",
    "recon(params=())",
    "recon(params=(rec, rec))",
    "recon(params=(rec,) * 5, name='gaussian')",
    "recon(params=(rec, rec[:3]), name='gaussian')",
    "recon(params=(rec[0], rec), target=x[0], name='gaussian')",
    "recon(params=(rec.to('meta'),))",
    "recon(params=(rec.long(),))",
    "recon(target=x[:3])",
    "recon(target=x.long())",
    "recon(weight=x[:, :3])",
    "recon(weight=x.long())",
    "recon(name='poisson?')",
    "recon(reduction='avg')",
    "recon(params=(rec[0, 0],), target=x[0, 0], reduction='per_sample')",
    "below('reconstruction_forward', [rec], x, None, 'bernoulli', [], 'sum', [True] * 9)",
    "recon_back(name=1000)",
    "recon_back(name=-1)",
    "recon_back(reduction=1000)",
    "recon_back(params=(), mask=())",
    "recon_back(mask=(True,) * 9)",
    "recon_back(up=torch.zeros(7))",
    "recon_back(up=torch.zeros(6, 50, 2))",
    "recon_back(up=one.to('meta'))",
    "recon_back(params=(rec, rec))",
    "elbo(reduction='none')",
    "elbo(reduction='none', mask=(True,))",
    "elbo(params=(mu,), target=mu, reduction='none')",
    "elbo(params=(rec[:3],), target=x[:3], reduction='per_sample')",
    "elbo(params=(rec[:3],), target=x[:3], reduction='per_sample', mask=(True,))",
    "elbo(params=(rec[0, 0],), target=x[0, 0], reduction='per_sample')",
    "elbo(p=(mu[0, 0], raw[0, 0], None, 0.0, None, 0.0), reduction='per_sample')",
    "elbo(p=(mu, raw[:3], None, 0.0, None, 0.0))",
    "elbo(params=(), mask=())",
    "elbo(mask=(True,) * 9)",
    "elbo_back(kept=[torch.zeros(6, 50)], dnll=torch.zeros(7))",
    "elbo_back(kept=[torch.zeros(2, 3)], dnll=torch.zeros(6))",
    "elbo_back(params=(), mask=())",
    "elbo_back(mask=(True,) * 9)",
    "elbo_back(post_mask=(True,) * 3)",
    "elbo_back(post_mask=(True,) * 4)",
    "elbo_back(dkl=torch.zeros(7))",
    "elbo_back(dkl=one.to('meta'))",
    "ops.scale_([torch.zeros(3)], torch.zeros(4))",
    "ops.scale_([torch.zeros(3)], torch.zeros(2, 3))",
    "ops.scale_([torch.zeros(3)], torch.zeros((), device='meta'))",
    "ops.scale_([torch.zeros(3, dtype=torch.long)], one)",
]
RUN = """
import contextlib, sys
for line in sys.stdin.read().splitlines():
    face, code = line.split(maxsplit=1)
    print("CALL", line, flush=True)
    try:
        with torch._C._AutoDispatchBelowAutograd() if face == "below" else contextlib.nullcontext():
            eval(code)
    except (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError) as e:
        print("RAISED", type(e).__name__, flush=True)
    else:
        print("RETURNED", flush=True)
"""


def outcomes(calls: list[str]) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    run = subprocess.run(
        [sys.executable, "-c", PRELUDE + RUN],
        input="\n".join(calls),
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    return [line for line in run.stdout.splitlines() if line.startswith(("CALL", "RAISED", "RETURNED"))], run


@pytest.fixture(scope="module")
def malformed() -> dict[str, list[str]]:
    """Each malformed call, through autograd and below it, that crashed or returned; after a crash the rest go on."""
    require_native()
    found: dict[str, list[str]] = {"crashed": [], "returned": []}
    left = [f"{face} {call}" for call in MALFORMED for face in ("autograd", "below")]
    while left:
        lines, run = outcomes(left)
        assert lines, run.stderr
        found["returned"] += [call[5:] for call, result in zip(lines[::2], lines[1::2]) if result == "RETURNED"]
        if len(lines) % 2:
            found["crashed"].append(f"{lines[-1][5:]}: exit code {run.returncode}")
        left = left[(len(lines) + 1) // 2 :]
    return found


@pytest.mark.parametrize("outcome", ["crashed", "returned"])
def test_malformed_operator_calls_raise(malformed: dict[str, list[str]], outcome: str) -> None:
    assert not malformed[outcome], f"{outcome}:\n" + "\n".join(malformed[outcome])


@pytest.mark.parametrize(
    "call",
    [
        lambda p: vaefast._native._C.posterior(
            *p, None, torch.tensor([1]), None, "logvar", -1.0, 1.0, 0.0, "sum", None, True, True
        ),
        lambda p: vaefast._native._C.posterior(*p, None, None, None, "sigma", -1.0, 1.0, 0.0, "sum", None, True, True),
        lambda p: vaefast._native._C.reconstruction([p[0]], p[0][:2], None, "bernoulli", "sum"),
        lambda p: vaefast._native._C.reconstruction([], p[0], None, "bernoulli", "sum"),
        lambda p: vaefast._native._C.reconstruction([None], p[0], None, "bernoulli", "sum"),
    ],
)
def test_malformed_extension_calls_raise(extension: Any, call: Any) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        call((torch.zeros(6, 20), torch.zeros(6, 20), None, 0.0, None, 0.0))
