"""The examples that train run from end to end, with every likelihood they offer. Nothing here looks at a time."""

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
    pytest.importorskip(needed, reason=f"the examples need {needed}: pip install 'vaefast[demo]'")

SHORT = ("--epochs", "2", "--batch-size", "128")
DEMO = (*SHORT, "--rounds", "5")
COUNTS = ("poisson", "negative_binomial", "zero_inflated_negative_binomial")

digits_vae = load_example("digits_vae")


def numbers(value: Any) -> list[float]:
    """Every number in nested dicts and lists."""
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [float(value)] if isinstance(value, (int, float)) else []


def assert_files(out: Path, metrics: dict[str, Any], pictures: str) -> None:
    assert {path.name for path in out.iterdir()} == {*(f"{name}.png" for name in pictures.split()), "metrics.json"}
    for picture in out.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert all(math.isfinite(number) for number in numbers(metrics))


def assert_bound(bound: dict[str, float]) -> None:
    assert bound["elbo"] == pytest.approx(-(bound["reconstruction"] + bound["kl"]), rel=1e-5, abs=1e-4)
    assert bound["kl"] >= 0


def bounds(metrics: dict[str, Any]) -> list[dict[str, float]]:
    final = [metrics[name] for name in ("held_out", "train", "untrained", "two_latent_units")]
    return final + [epoch[part] for epoch in metrics["history"] for part in ("train", "held_out")]


@pytest.mark.parametrize("likelihood", digits_vae.LIKELIHOODS)
def test_demo(likelihood: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = digits_vae.main([*DEMO, "--likelihood", likelihood, "--out", str(tmp_path)])
    for bound in bounds(metrics):
        assert_bound(bound)
    assert metrics["held_out"]["elbo"] > metrics["untrained"]["elbo"]
    assert len(metrics["history"]) == 3
    assert 0 <= metrics["active_units"] <= metrics["latent"] == 16
    assert_files(tmp_path, metrics, "reconstructions samples latent curves")
    printed = capsys.readouterr().out
    assert f"active units: {metrics['active_units']} of 16" in printed
    assert f"{metrics['held_out']['elbo']:.2f}" in printed


def test_a_seed_makes_the_run(tmp_path: Path) -> None:
    def history(seed: int) -> Any:
        args = [*DEMO, "--latent", "2", "--seed", str(seed), "--out", str(tmp_path)]
        return digits_vae.main(args)["history"]

    first = history(1)
    assert history(1) == first
    assert history(2) != first


def test_beta_is_a_factor_of_training_only(tmp_path: Path) -> None:
    metrics = digits_vae.main([*DEMO, "--latent", "2", "--beta", "50", "--out", str(tmp_path)])
    plain = digits_vae.main([*DEMO, "--latent", "2", "--out", str(tmp_path)])
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
    monkeypatch.delitem(sys.modules, "common")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"sklearn\.datasets.*pip install 'vaefast\[demo\]'"):
        load_example("digits_vae")


def test_hierarchical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = load_example("hierarchical_vae").main([*SHORT, "--warmup", "1", "--out", str(tmp_path)])
    assert_files(tmp_path, metrics, "reconstructions samples levels collapse")
    for name in ("held_out", "train", "untrained"):
        assert_bound(metrics[name])
    assert metrics["held_out"]["elbo"] > metrics["untrained"]["elbo"]
    assert [level["latents"] for level in metrics["levels"]] == [4, 8, 16]
    assert "level 3, held-out digits" in capsys.readouterr().out


def test_a_hierarchy_pays_its_levels_and_no_free_bits() -> None:
    model = load_example("hierarchical_vae").HierarchicalVAE()
    x = torch.rand(6, 64)

    def seeded(f: Any) -> Any:
        torch.manual_seed(1)
        return f()

    terms = seeded(lambda: model.terms(x))
    _, levels = seeded(lambda: model.infer(x))
    torch.testing.assert_close(terms.kl, sum(vaefast.gaussian_kl(*level) for level in levels))
    half = torch.tensor(0.5)
    torch.testing.assert_close(
        seeded(lambda: model.training_loss(x, half, 0.0)), terms.reconstruction + half * terms.kl
    )
    torch.testing.assert_close(seeded(lambda: model.training_loss(x, half, 100.0)), terms.reconstruction + half * 300)


def test_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = load_example("counts_vae").main([*SHORT, "--out", str(tmp_path)])
    assert_files(tmp_path, metrics, "reconstructions samples counts kl")
    assert tuple(metrics["held_out"]) == COUNTS
    printed = capsys.readouterr().out
    for bound in metrics["held_out"].values():
        assert_bound(bound)
        assert f"{bound['elbo']:.2f}" in printed


@pytest.mark.parametrize("likelihood", COUNTS)
def test_counts_of_a_model(likelihood: str) -> None:
    model = load_example("counts_vae").CountsVAE(3, likelihood)
    x = torch.randint(0, 17, (5, 64)).float()
    counts = torch.arange(400)
    torch.manual_seed(1)
    shares = model.probabilities(x, counts)
    torch.manual_seed(1)
    mean = model.mean(vaefast.reparameterize(*model.encode(x)), x.sum(1, keepdim=True))
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0), rtol=1e-3, atol=0.0)
    torch.testing.assert_close((shares * counts).sum(), mean.mean(), rtol=1e-3, atol=0.0)


def test_discretized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = load_example("discretized_vae").main([*SHORT, "--out", str(tmp_path)])
    assert_files(tmp_path, metrics, "reconstructions samples scale curve")
    bits, printed = metrics["bits_per_dimension"], capsys.readouterr().out
    for name, part in (("held-out", "held_out"), ("train", "train")):
        assert_bound(metrics[part])
        assert bits[name] == pytest.approx(-metrics[part]["elbo"] / 64 / math.log(2))
        assert f"{bits[name]:.3f}" in printed
    assert 0 < bits["a histogram for each pixel"] < bits["17 equal bins"] == math.log2(17)


def test_importance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*SHORT, "--samples", "600", "--gradients", "500", "--out", str(tmp_path)]
    metrics = load_example("importance_vae").main(args)
    assert (tmp_path / "bounds.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for found in metrics["trained"].values():
        curve = list(found["bounds"].values())
        assert curve == sorted(curve) and curve[-1] < found["log_evidence"] + 4 * found["standard_error"]
        assert f"{found['log_evidence']:.2f}" in printed
    snr = metrics["signal_to_noise"]
    ours = snr["doubly reparameterized"]
    assert snr["IWAE"][128] < 0.7 * snr["IWAE"][1] and ours[128] > 2 * ours[1]


def test_priors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--epochs", "1", "--batch-size", "256", "--samples", "40", "--components", "5")
    metrics = load_example("priors_vae").main([*few, "--out", str(tmp_path)])
    assert_files(tmp_path, metrics, "priors traversals")
    printed = capsys.readouterr().out
    for name in ("N(0, I)", "mixture", "VampPrior"):
        found = metrics["priors"][name]
        assert f"{found['log_evidence']:.2f}" in printed and found["log_evidence"] > found["elbo"]
    assert metrics["priors"]["N(0, I)"]["gain"] == 0 and set(metrics["parts"]) == {"VAE", "beta-TCVAE"}


def test_the_evidence_of_a_model_that_ignores_its_latents() -> None:
    """There the ELBO is tight at q = p, and any number of samples of any posterior tells it."""
    example = load_example("priors_vae")
    model = example.VAE(2, "mixture", 3, torch.zeros(3, 64))
    with torch.no_grad():
        model.decoder[-1].weight.zero_()
    x = torch.randint(0, 17, (6, 64)) / 8 - 1.0
    expected = -vaefast.reconstruction_loss(
        model.decode(torch.zeros(6, 2)), x, likelihood=example.LIKELIHOOD, reduction="per_sample"
    )
    torch.manual_seed(0)
    torch.testing.assert_close(example.log_evidence(model, x, 4000), expected.detach(), rtol=0.0, atol=0.2)


@pytest.mark.parametrize("temperature", [(), ("--temperature", "0.7")])
def test_discrete(temperature: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = load_example("discrete_vae")
    metrics = example.main([*SHORT, "--latents", "4", "--classes", "5", *temperature, "--out", str(tmp_path)])
    assert_files(tmp_path, metrics, "reconstructions samples classes usage")
    for name in ("held_out", "train"):
        assert_bound(metrics[name])
        assert metrics[name]["kl"] <= metrics["most_kl"] == pytest.approx(4 * math.log(5))
    assert metrics["history"][-1] > metrics["history"][0]
    assert "active latents" in capsys.readouterr().out


def test_discretized_numbers_are_all_there_is() -> None:
    example = load_example("discretized_vae")
    numbers = (torch.arange(17.0) / 8 - 1).unsqueeze(1).expand(17, 64)
    recon = tuple(t.expand(17, 64) for t in example.DiscretizedVAE(3).decode(torch.randn(1, 3)))
    nll = vaefast.reconstruction_loss(recon, numbers, likelihood=example.LIKELIHOOD, reduction="none")
    torch.testing.assert_close(torch.exp(-nll).sum(0), torch.ones(64))


def test_bayesian_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = load_example("bayesian_digits").main(["--epochs", "20", "--draws", "8", "--out", str(tmp_path)])
    assert_files(tmp_path, metrics, "reliability")
    assert list(metrics["held_out"]) == ["plain", "5 networks", "posterior", "cold posterior"]
    printed = capsys.readouterr().out
    for found in metrics["held_out"].values():
        assert found["accuracy"] > 0.8 and found["unknown_auroc"] > 0.7
        assert f"{found['noisy_nll']:.3f}" in printed


def test_calibration_and_ranks_of_known_predictions() -> None:
    example = load_example("bayesian_digits")
    p = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.75, 0.25], [0.75, 0.25], [0.05, 0.95]])
    assert example.calibration_error(p, torch.tensor([0, 0, 0, 1, 1])) == pytest.approx(0.01)
    share, confidence, accuracy = example.reliability(p, torch.tensor([0, 0, 1, 1, 0]))
    assert share[[7, 9]].tolist() == pytest.approx([0.8, 0.2]) and accuracy[[7, 9]].tolist() == [0.5, 0.0]
    assert confidence[[7, 9]].tolist() == pytest.approx([0.75, 0.95])
    assert example.area_under_roc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])) == 0.875


def test_bayesian_linear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The identity for every q; the best mean-field q, and what it leaves; a low-rank one leaves nothing."""
    metrics = load_example("bayesian_linear").main(["--steps", "300", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert_files(tmp_path, metrics, "posterior")
    for name, q in metrics["q"].items():
        assert abs(q["difference"]) < 1e-10, name
        assert f"{q['elbo']:.6f}" in printed
    gaps = {name: q["gap"] for name, q in metrics["q"].items()}
    assert gaps["mean field"] == pytest.approx(metrics["least_gap"], abs=1e-9)
    assert metrics["least_gap"] < gaps["minibatches"] < 0.1 * gaps["untrained"]
    assert gaps["mean field"] > gaps["rank 1"] > gaps["rank 2"] > gaps["rank 9"]
    assert gaps["rank 9"] < 1e-5


def test_the_best_mean_field_posterior_is_the_known_one() -> None:
    example = load_example("bayesian_linear")
    data = example.read()
    model = example.model_of(data)
    example.climb(model, data, 4)
    torch.testing.assert_close(model.module.weight[0], data.posterior.mean, rtol=0, atol=1e-7)
    expected = data.posterior.precision_matrix.diagonal().reciprocal()
    torch.testing.assert_close(example.covariance(model).diagonal(), expected, rtol=1e-5, atol=0)


def test_bayesian_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = load_example("bayesian_regression").main(["--epochs", "300", "--out", str(tmp_path)])
    assert_files(tmp_path, metrics, "error_bars")
    found = metrics["patients"]["posterior"]
    assert found["rmse"] < 0.9 and found["coverage_error"] < 0.15
    assert f"{found['nll']:.3f}" in capsys.readouterr().out
    assert metrics["epistemic"]["outside"] > metrics["epistemic"]["within the data"]


def test_coverage_of_draws_is_what_it_is_to_be() -> None:
    example = load_example("bayesian_regression")
    q = torch.distributions.Normal(torch.tensor(1.0), torch.tensor(2.0))
    covered = example.coverage(q, q.icdf(torch.linspace(0.0005, 0.9995, 1000)))
    assert covered == pytest.approx(list(example.SHARES), abs=2e-3)
