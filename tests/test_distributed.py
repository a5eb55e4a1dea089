"""Several processes against one with the whole batch: gradients, logs, noise, checkpoints; and what is communicated."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from examples_by_path import EXAMPLES, load_example
from ranks import LATENT, OPTIONS, SAME, SHARES, data, everything, example, gradients, model, start
from torch import distributed as dist

import vaefast

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")

TOLERANCE = 1e-6
Results = list[dict[str, Any]]


@pytest.fixture(
    scope="module",
    params=[("cpu", 2), ("cpu", 4), pytest.param(("cuda", 2), marks=pytest.mark.cuda)],
    ids=["2-gloo", "4-gloo", "2-nccl"],
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    device, ranks = request.param
    if device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"NCCL takes a GPU a rank: {ranks} are needed")
    return start(everything, ranks, device, tmp_path_factory.mktemp("ranks"))


def alone(case: str) -> tuple[vaefast.ELBOTerms, dict[str, torch.Tensor]]:
    """One process with all samples."""
    m = model()
    terms = m(*data(), OPTIONS[case])
    terms.loss.backward()
    return terms, gradients(m)


def errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert found.keys() == exact.keys()
    return max(float((found[name] - exact[name]).abs().max()) for name in exact)


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("shares", SHARES[1])
def test_gradients_and_logs_are_those_of_one_process(results: Results, shares: str, strategy: str, case: str) -> None:
    terms, exact = alone(case)
    assert max(float(g.abs().max()) for g in exact.values()) > 1e-2
    for rank in results:
        found = rank["losses"][shares, strategy, case]
        assert errors(found["gradients"], exact) <= TOLERANCE
        for logged, expected in zip(found["logged"], terms):
            torch.testing.assert_close(logged, expected.detach(), rtol=1e-6, atol=1e-6)
        assert found["logged"] == results[0]["losses"][shares, strategy, case]["logged"]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", [name for name, o in OPTIONS.items() if "capacity" in o or "batch_dim" in o.values()])
def test_the_cases_bend_where_ranks_and_all_disagree(case: str, ranks: int) -> None:
    """Else the cases above would pass with local means too."""
    m, (x, _), options = model(), data(), OPTIONS[case]
    mu, logvar = m.encoder(x).chunk(2, dim=1)
    symmetric = options.get("symmetric", False)
    kl = vaefast.gaussian_kl(mu, logvar, m.prior_mu, reduction="none", symmetric=symmetric)

    def above(part: torch.Tensor) -> list[bool]:
        means = part.mean(0).sum(0, keepdim=True) if "capacity" in options else part.mean(0)
        return (means > options.get("capacity", options.get("free_bits"))).tolist()

    assert any(above(part) != above(kl) for part in kl.split(SHARES[ranks]["unequal"]))


def test_without_a_group_unequal_batches_are_wrong_and_nothing_is_sent(results: Results) -> None:
    _, exact = alone("plain")
    for rank in results:
        assert errors(rank["losses"]["equal", "no group"]["gradients"], exact) <= TOLERANCE
        assert errors(rank["losses"]["unequal", "no group"]["gradients"], exact) > 1e-3
        for shares in SHARES[1]:
            assert rank["losses"][shares, "no group"]["sent"] == []


def test_logs_of_local_means_are_weighed(results: Results) -> None:
    terms, _ = alone("plain")
    for rank in results:
        for shares in SHARES[1]:
            found = rank["losses"][shares, "no group"]
            assert found["sent for logs"] == [8 * 4]
            for logged, expected in zip(found["logged"], terms):
                torch.testing.assert_close(logged, expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", OPTIONS)
def test_eight_bytes_are_sent_whatever_the_ranks(results: Results, case: str) -> None:
    more = [4 * LATENT] if "batch_dim" in OPTIONS[case].values() else [4] if "capacity" in OPTIONS[case] else []
    for rank in results:
        for shares in SHARES[1]:
            assert rank["losses"][shares, "ddp", case]["sent"] == [8, *more]


def test_equal_batches_have_the_factor_one(results: Results) -> None:
    assert all(rank["other ways"]["equal"] == [1, 1, 1] for rank in results)


def test_other_ways_to_the_same_loss(results: Results) -> None:
    for rank, result in enumerate(results):
        found = result["other ways"]
        for way in ("by hand", "reference", "reference module", "module", "compiled"):
            torch.testing.assert_close(found[way], found["expected"], rtol=1e-6, atol=1e-6, msg=way)
        if rank < 2:
            mine, other = (SHARES[len(results)]["unequal"][r] for r in (rank, 1 - rank))
            assert found["pair"].dtype == torch.float64
            assert float(found["pair"]) == pytest.approx(2 * mine / (mine + other), rel=1e-15)
        else:
            assert found["outside"] == ""


def test_noise_is_of_each_rank_and_repeats(results: Results) -> None:
    drawn = [rank["noise"] for rank in results]
    for rank in drawn:
        assert all(map(torch.equal, rank["first"], rank["again"]))
        assert not torch.equal(rank["first"][0], rank["other seed"])
    base = drawn[0]["seed"]
    assert [rank["seed"] - base for rank in drawn] == list(range(len(drawn)))
    for kind in range(2):
        noise = torch.stack([rank["first"][kind] for rank in drawn])
        correlation = torch.corrcoef(noise) - torch.eye(len(drawn))
        assert correlation.abs().max() < 4 / math.sqrt(noise.shape[1])


def test_seeds_of_runs_and_ranks_stay_apart() -> None:
    with torch.random.fork_rng():
        # the CPU's generator looks at 32 bits
        seeds = {vaefast.distributed.manual_seed(s, rank=r) % 2**32 for s in range(50) for r in (0, 1, 2, 999)}
        assert len(seeds) == 200
        assert torch.initial_seed() == vaefast.distributed.manual_seed(49, rank=999)
        # for good: checkpoints and papers go by it
        assert vaefast.distributed.manual_seed(0) == vaefast.distributed.manual_seed(0, rank=0) == SEED_OF_0


SEED_OF_0 = 2134449642134070867


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    for needed in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(needed, reason=f"the examples need {needed}: pip install 'vaefast[demo]'")
    folder = tmp_path_factory.mktemp("example")
    return start(example, 2, str(folder), folder), folder


def test_a_resumed_run_is_one_that_never_stopped(runs: tuple[Results, Path]) -> None:
    for rank in runs[0]:
        for strategy in ("ddp", "fsdp"):
            whole = rank[strategy, "whole"]
            assert len(whole) == 3
            assert rank[strategy, "parts"] == whole
            assert rank[strategy, "whole"] == runs[0][0][strategy, "whole"]
            assert whole[-1]["held_out"]["elbo"] > whole[0]["held_out"]["elbo"]


def test_strategies_train_alike_and_load_each_others_checkpoints(runs: tuple[Results, Path]) -> None:
    def bounds(history: Any) -> torch.Tensor:
        return torch.tensor([list(epoch[part].values()) for epoch in history for part in ("train", "held_out")])

    rank = runs[0][0]
    torch.testing.assert_close(bounds(rank["fsdp", "whole"]), bounds(rank["ddp", "whole"]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bounds(rank["fsdp to ddp"]), bounds(rank["ddp", "whole"]), rtol=1e-4, atol=1e-4)


def test_torchrun(runs: tuple[Results, Path]) -> None:
    """As one types it, and going on where the run above ended."""
    out = runs[1] / "ddp-whole"
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(EXAMPLES / "ddp_vae.py"), *SAME, "--epochs", "4", "--out", str(out), "--resume"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["ranks"], metrics["epochs"], len(metrics["history"])) == (2, 4, 4)
    assert metrics["history"][:3] == runs[0][0]["ddp", "whole"]
    assert f"{metrics['history'][-1]['held_out']['elbo']:.2f}" in done.stdout


def test_one_process_needs_no_torchrun_but_checkpoints_of_its_own(
    runs: tuple[Results, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    main = load_example("ddp_vae").main
    with pytest.raises(SystemExit, match="is of 2 ranks and these are 1"):
        main([*SAME, "--epochs", "4", "--out", str(runs[1] / "ddp-parts"), "--resume"])
    with pytest.raises(SystemExit, match="there is no checkpoint"):
        main([*SAME, "--out", str(tmp_path), "--resume"])
    history = main([*SAME, "--epochs", "1", "--out", str(tmp_path)])["history"]
    # other noise on other shares: alike, and no more
    assert history[0]["held_out"] == pytest.approx(runs[0][0]["ddp", "whole"][0]["held_out"], rel=0.05, abs=0.05)


def arguments() -> tuple[torch.Tensor, ...]:
    x, eps = data()
    return x, x, eps, eps


@pytest.mark.parametrize("face", [vaefast, vaefast.reference], ids=["vaefast", "reference"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "init_process_group"),
        ({"process_group": "all"}, ValueError, "'world'"),
        ({"process_group": 3}, TypeError, "ProcessGroup"),
        ({"reduction": "sum"}, ValueError, "do not depend on what other ranks have"),
        ({"reduction": "per_sample"}, ValueError, "do not depend on what other ranks have"),
        ({"reduction": "mean"}, ValueError, "not an ELBO"),
        ({"preset": "pytorch_examples"}, ValueError, "reduction='sum'"),
        ({"likelihood": "gaussian_optimal"}, ValueError, "per_sample=True"),
        ({"likelihood": "normal"}, ValueError, "likelihood"),
        ({"free_bits": -1.0}, ValueError, "free_bits"),
        ({"capacity": 1.0, "free_bits": 1.0}, ValueError, "capacity and free_bits"),
    ],
    ids=str,
)
def test_errors(face: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        face.elbo_terms(*arguments(), **{"process_group": "world", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "sum"}, "do not depend"),
        ({"preset": "pytorch_examples"}, "reduction='sum'"),
        ({"process_group": "all"}, "'world'"),
        ({"likelihood": "gaussian_optimal"}, "per_sample=True"),
    ],
    ids=str,
)
def test_the_module_refuses_when_it_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vaefast.ELBOLoss(**{"process_group": "world", **options})
    assert "process_group='world'" in repr(vaefast.ELBOLoss(process_group="world"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: d.loss_scale(torch.zeros(()), 3, None), TypeError, "process_group"),
        (lambda d: d.loss_scale(torch.zeros(()), 3, "world"), ValueError, "init_process_group"),
        (lambda d: d.global_mean(torch.zeros(()), None), TypeError, "process_group"),
        (lambda d: d.manual_seed("0"), TypeError, "seed"),
        (lambda d: d.manual_seed(0, rank=1.0), TypeError, "rank"),
        (lambda d: d.manual_seed(0, rank=-1), ValueError, "rank"),
    ],
)
def test_errors_of_the_helpers(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(vaefast.distributed)


def test_errors_of_the_helpers_in_a_group() -> None:
    """A group of this process alone: a mean over it is the value."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for group in ("world", dist.group.WORLD):
            assert vaefast.distributed.loss_scale(torch.zeros(()), 3, group) == 1
            assert vaefast.distributed.global_mean(torch.tensor(2.5), group) == 2.5
            assert vaefast.distributed.global_mean(torch.tensor(2.5), group, batch=3) == 2.5
            assert torch.equal(
                vaefast.elbo_loss(*arguments(), process_group=group), vaefast.elbo_loss(*arguments())
            )  # fmt: skip
        with pytest.raises(ValueError, match="0-d"):
            vaefast.distributed.global_mean(torch.zeros(3), "world")
        for wrong, error in ((-1, ValueError), (2.0, TypeError), (True, TypeError)):
            with pytest.raises(error, match="batch"):
                vaefast.distributed.loss_scale(torch.zeros(()), wrong, "world")
    finally:
        dist.destroy_process_group()


def test_importing_vaefast_imports_no_more_of_torch_distributed() -> None:
    code = """if True:
        import sys, torch
        before = set(sys.modules)
        import vaefast
        print([name for name in set(sys.modules) - before if name.startswith("torch.distributed")])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
