"""examples/digits_vae.py runs from end to end, for every likelihood it offers. Nothing here looks at a time."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from examples_by_path import load_example

import vaefast

for needed in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed, reason=f"examples/digits_vae.py needs {needed}: pip install 'vaefast[demo]'")

PICTURES = ("reconstructions.png", "samples.png", "latent.png", "curves.png")
SHORT = ("--epochs", "2", "--batch-size", "128", "--rounds", "5")


digits_vae = load_example("digits_vae")


def numbers(value: Any) -> list[float]:
    """Every number in nested dicts and lists."""
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [float(value)] if isinstance(value, (int, float)) else []


def bounds(metrics: dict[str, Any]) -> list[dict[str, float]]:
    final = [metrics[name] for name in ("held_out", "train", "untrained", "two_latent_units")]
    return final + [epoch[part] for epoch in metrics["history"] for part in ("train", "held_out")]


@pytest.mark.parametrize("likelihood", digits_vae.LIKELIHOODS)
def test_demo(likelihood: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = digits_vae.main([*SHORT, "--likelihood", likelihood, "--out", str(tmp_path)])
    assert all(math.isfinite(number) for number in numbers(metrics))
    for bound in bounds(metrics):
        assert bound["elbo"] == pytest.approx(-(bound["reconstruction"] + bound["kl"]), rel=1e-5, abs=1e-4)
        assert bound["kl"] >= 0
    assert metrics["held_out"]["elbo"] > metrics["untrained"]["elbo"]
    assert len(metrics["history"]) == 3
    assert 0 <= metrics["active_units"] <= metrics["latent"] == 16
    for name in PICTURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    printed = capsys.readouterr().out
    assert f"active units: {metrics['active_units']} of 16" in printed
    assert f"{metrics['held_out']['elbo']:.2f}" in printed


def test_a_seed_makes_the_run(tmp_path: Path) -> None:
    def history(seed: int) -> Any:
        args = [*SHORT, "--latent", "2", "--seed", str(seed), "--out", str(tmp_path)]
        return digits_vae.main(args)["history"]

    first = history(1)
    assert history(1) == first
    assert history(2) != first


def test_beta_is_a_factor_of_training_only(tmp_path: Path) -> None:
    metrics = digits_vae.main([*SHORT, "--latent", "2", "--beta", "50", "--out", str(tmp_path)])
    plain = digits_vae.main([*SHORT, "--latent", "2", "--out", str(tmp_path)])
    assert metrics["untrained"] == plain["untrained"]
    assert metrics["held_out"]["kl"] < plain["held_out"]["kl"]


@pytest.mark.parametrize("likelihood", digits_vae.LIKELIHOODS)
def test_the_timed_losses_are_checked_against_each_other(likelihood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = digits_vae.parse(["--likelihood", likelihood])
    inputs = digits_vae.loss_inputs(digits_vae.VAE(3, likelihood), torch.rand(5, 64), args)
    assert set(digits_vae.time_losses(inputs, "auto", 5)) == {"vaefast", "eager", "reference"}
    wrong = digits_vae.eager_nll(inputs) + 1
    monkeypatch.setattr(digits_vae, "eager_nll", lambda t: wrong.detach() + 0 * sum(p.sum() for p in t.params))
    with pytest.raises(AssertionError):
        digits_vae.time_losses(inputs, "auto", 5)


def test_refusals_name_the_remedy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(vaefast, "available_backends", lambda: ("reference",))
    for args, message in (
        (["--device", "cuda"], "use --device cpu"),
        (["--backend", "native"], "no compiled kernels for cpu"),
        (["--epochs", "0"], "must be at least 1"),
        (["--likelihood", "nonesuch"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            digits_vae.main(args)
        assert message in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"sklearn\.datasets.*pip install 'vaefast\[demo\]'"):
        load_example("digits_vae")
