"""Active units and collapse reports against the formulas in float64, over batches, shapes and dtypes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from inputs import generator
from torch import Tensor

import vaefast
from vaefast import Parameterization
from vaefast.diagnostics import CollapseMonitor, CollapseReport, active_units, collapse_report

SHAPES = [(50, 6), (40, 3, 4, 5), (30,)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def latents(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Posteriors of which every other unit has collapsed."""
    mu, logvar = (torch.randn(shape, generator=generator(seed), dtype=torch.float64) for seed in (1, 2))
    if len(shape) > 1:
        mu[:, ::2] *= 1e-3
        logvar[:, ::2] *= 1e-3
    return mu.to(device, dtype), (logvar - 1).to(device, dtype)


def assert_report(report: CollapseReport, mu: Tensor, logvar: Tensor, pm: Any = 0.0, plv: Any = 0.0) -> None:
    """The definitions, on all samples at once, z being measured from its prior."""
    mu, logvar = mu.double(), logvar.double()
    pm, plv = (torch.as_tensor(prior, dtype=torch.float64, device=mu.device) for prior in (pm, plv))
    # Kingma & Welling 2014, appendix B, as it stands there
    kl = 0.5 * (plv - logvar + (logvar - plv).exp() + (mu - pm) ** 2 / plv.exp() - 1)
    mu, logvar = (mu - pm) / plv.exp().sqrt(), logvar - plv
    aggregate = logvar.exp().mean(0) + (mu**2).mean(0) - mu.mean(0) ** 2
    for actual, expected in (
        (report.kl, kl.mean(0)),
        (report.activity, mu.var(0)),
        (report.mean, mu.mean(0)),
        (report.std, aggregate.sqrt()),
    ):
        assert actual.dtype == torch.float64
        assert actual.shape == mu.shape[1:]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert report.samples == len(mu)
    assert torch.equal(report.active, mu.var(0) > report.threshold)
    assert report.number_active == int((mu.var(0) > report.threshold).sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_report(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    mu, logvar = latents(shape, dtype, device)
    assert_report(collapse_report(mu, logvar), mu, logvar)
    assert torch.equal(active_units(mu), mu.double().var(0) > 0.01)


def test_float64_is_kept() -> None:
    mu, logvar = latents((50, 6))
    report = collapse_report(mu, logvar)
    torch.testing.assert_close(report.activity, mu.var(0), rtol=1e-13, atol=0.0)
    torch.testing.assert_close(
        report.kl, vaefast.gaussian_kl(mu, logvar, reduction="none").mean(0), rtol=1e-13, atol=0.0
    )


@pytest.mark.parametrize("prior", [(0.5, -1.0), (torch.randn(6), torch.randn(6)), (torch.randn(50, 6), None)])
def test_report_of_a_prior(prior: tuple[Any, Any]) -> None:
    mu, logvar = latents((50, 6))
    pm, plv = prior
    assert_report(collapse_report(mu, logvar, pm, plv), mu, logvar, pm, 0.0 if plv is None else plv)


def test_what_only_follows_its_prior_is_not_active() -> None:
    """A collapsed level of a hierarchy: its posterior is the prior, and that moves with the levels above."""
    pm, plv = latents((50, 6))
    report = collapse_report(pm, plv, pm, plv)
    assert active_units(pm).sum() == 3
    assert report.number_active == 0
    assert not report.mean.any()
    assert torch.equal(report.std, torch.ones(6, dtype=torch.float64))


def test_report_of_a_parameterization() -> None:
    mu, logvar = latents((50, 6))
    assert_report(collapse_report(mu, (0.5 * logvar).exp(), parameterization="std"), mu, logvar)
    floored = Parameterization("std", floor=0.1)
    assert_report(collapse_report(mu, (0.5 * logvar).exp() - 0.1, parameterization=floored), mu, logvar)


def test_posteriors_at_the_prior_have_collapsed() -> None:
    zero = torch.zeros(10, 4)
    report = collapse_report(zero, zero)
    assert report.number_active == 0
    assert not report.kl.any()
    assert torch.equal(report.std, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [0, 17, 0, 1, 32, 0], [49, 1]], ids=str)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_batches_are_as_good_as_all_at_once(sizes: list[int], shift: float, device: str) -> None:
    mu, logvar = latents((50, 2, 3), device=device)
    mu = mu + shift
    monitor = CollapseMonitor()
    for part_mu, part_logvar in zip(mu.split(sizes), logvar.split(sizes)):
        monitor.update(part_mu, part_logvar)
    report = monitor.report()
    # so far from 0 a GPU's own variance, of what has collapsed, keeps fewer digits than its difference from that
    torch.testing.assert_close(report.activity, mu.var(0), rtol=1e-9, atol=0.0 if device == "cpu" else 1e-14)
    torch.testing.assert_close(report.mean, mu.mean(0), rtol=1e-13, atol=1e-15)
    whole = collapse_report(mu, logvar)
    torch.testing.assert_close(report.kl, whole.kl, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(report.std, whole.std, rtol=1e-9, atol=0.0)
    assert report.samples == 50


def test_a_report_stays_when_more_is_seen() -> None:
    mu, logvar = latents((50, 6))
    monitor = CollapseMonitor(threshold=0.5)
    monitor.update(mu[:20], logvar[:20])
    first = monitor.report()
    monitor.update(mu[20:], logvar[20:])
    assert first.threshold == 0.5
    assert_report(first, mu[:20], logvar[:20])
    assert_report(monitor.report(), mu, logvar)
    monitor.reset()
    monitor.update(*latents((9, 2)))
    assert monitor.report().kl.shape == (2,)


def test_nothing_is_kept_for_backward() -> None:
    mu, logvar = (t.requires_grad_() for t in latents((50, 6)))
    report = collapse_report(mu, logvar)
    assert not any(t.requires_grad for t in (report.kl, report.activity, report.mean, report.std))
    assert not active_units(mu).requires_grad


def test_a_channel_can_be_a_unit() -> None:
    """As the module's docstring says."""
    mu, logvar = (t.movedim(1, -1).flatten(0, 2) for t in latents((40, 3, 4, 5)))
    assert collapse_report(mu, logvar).active.tolist() == [False, True, False]


@pytest.mark.parametrize("count", [0, 1])
def test_a_variance_needs_two_samples(count: int) -> None:
    mu, logvar = latents((count, 6))
    message = f"needs at least 2, got {count}"
    with pytest.raises(ValueError, match=message):
        active_units(mu)
    with pytest.raises(ValueError, match=message):
        collapse_report(mu, logvar)
    with pytest.raises(ValueError, match="needs at least 2, got 0"):
        CollapseMonitor().report()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda mu, lv: active_units(mu.long()), "mu must be float16"),
        (lambda mu, lv: active_units([0.0]), "mu must be a torch.Tensor"),
        (lambda mu, lv: active_units(mu[0, 0]), "mu must be .*0-d"),
        (lambda mu, lv: active_units(mu, "low"), "threshold must be a number"),
        (lambda mu, lv: active_units(mu, -1), "threshold must be finite and at least 0, got -1"),
        (lambda mu, lv: collapse_report(mu, lv[:, 1:]), "logvar has shape"),
        (lambda mu, lv: collapse_report(mu, lv, torch.zeros(5)), "prior_mu of shape"),
        (lambda mu, lv: collapse_report(mu, lv, parameterization="sigma"), "parameterization must be one of"),
        (lambda mu, lv: collapse_report(mu[0, 0], lv[0, 0]), "0-d"),
        (lambda mu, lv: CollapseMonitor(float("nan")), "threshold must be finite"),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(*latents((50, 6)))


def test_other_shapes_need_another_monitor() -> None:
    monitor = CollapseMonitor()
    monitor.update(*latents((50, 6)))
    with pytest.raises(ValueError, match=r"shape \(7,\) but those before had \(6,\).*reset"):
        monitor.update(*latents((50, 7)))
    assert_report(monitor.report(), *latents((50, 6)))


def test_str_tells_the_units() -> None:
    mu, logvar = latents((40, 3, 4, 5))
    report = collapse_report(mu, logvar)
    lines = str(report).splitlines()
    assert lines[0].startswith("20 of 60 units active")
    assert f"{report.kl.sum():.2f} nats" in lines[1]
    assert "mean of 40" in lines[1]
    best = tuple(int(i) for i in lines[3].split()[0].split(","))
    assert report.kl[best] == report.kl.max()
    assert lines[3].split()[1:] == [
        f"{report.kl[best]:.4f}",
        f"{report.activity[best]:.4f}",
        f"{report.mean[best]:.3f}",
        f"{report.std[best]:.3f}",
    ]
    assert len(lines) == 24
    assert lines[-1].endswith("and 40 with less KL")
    assert "not active" in str(collapse_report(*latents((50, 6))))
    assert str(collapse_report(*latents((30,)))).splitlines()[3].split()[0] == "0"


@pytest.mark.parametrize("shape", [*SHAPES, (4, 0)], ids=str)
def test_plot(shape: tuple[int, ...], tmp_path: Any) -> None:
    pytest.importorskip("matplotlib", reason="plot() needs matplotlib: pip install 'vaefast[demo]'")
    from matplotlib.figure import Figure

    report = collapse_report(*latents(shape))
    axes = Figure().subplots()
    assert report.plot(axes) is axes
    assert f"{report.number_active} of {report.kl.numel()} units active" in axes.get_title()
    drawn = {patch.get_label(): torch.tensor(patch.get_data().values) for patch in axes.patches}
    heights = sum(drawn.values(), torch.zeros_like(report.kl.flatten()))
    torch.testing.assert_close(heights, report.kl.flatten().sort(descending=True).values)
    for label, number in (("active", report.number_active), ("not active", int((~report.active).sum()))):
        assert int((drawn.get(label, torch.zeros(1)) > 0).sum()) == number
    axes.figure.savefig(tmp_path / "plot.png")


def test_plot_without_matplotlib_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'vaefast\[demo\]'"):
        collapse_report(*latents((50, 6))).plot()


def test_importing_vaefast_imports_no_matplotlib() -> None:
    code = "import sys, vaefast; print(vaefast.diagnostics.__name__, 'matplotlib' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["vaefast.diagnostics", "False"]
