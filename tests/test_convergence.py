"""`make convergence` in small: every way trains, and the statistics are what they say."""

from __future__ import annotations

import pytest
import scipy.stats
import torch

from tools import convergence
from tools.convergence import WAYS, compared, from_collapse, held_out_elbo, trained


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'vaefast[demo]'")
    return convergence.digits()


@pytest.mark.parametrize("name", list(WAYS))
def test_every_way_learns(extension: object, digits: tuple[torch.Tensor, torch.Tensor], name: str) -> None:
    train, held_out = digits
    at_first = held_out_elbo(convergence.fresh(0), held_out)
    elbo, textbook = (trained(WAYS[way], 0, 4, train, held_out) for way in (name, "textbook"))
    assert elbo > at_first + 10
    assert elbo == pytest.approx(textbook, abs=0.3)


def test_a_collapsed_start(
    extension: object, digits: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels' KL has its digits; the textbook's, at first, has none."""
    monkeypatch.setattr(convergence, "STEPS", 20)
    ours, theirs = (from_collapse(WAYS[way], digits[0]) for way in ("kernels", "textbook"))
    assert 0 < ours.true[0] < 1e-8
    assert ours.told == pytest.approx(ours.true, rel=1e-5)
    assert theirs.true[0] == pytest.approx(ours.true[0], rel=1e-5)
    assert abs(theirs.told[0] - theirs.true[0]) > 0.1 * theirs.true[0]


def test_the_power_is_the_tests() -> None:
    """Differences as large as it says are found in 80% of a thousand draws."""
    rng = torch.Generator().manual_seed(0)
    base, off = torch.randn(10, generator=rng), torch.randn(10, generator=rng)
    of = compared((base + off).tolist(), base.tolist())
    expected = scipy.stats.ttest_rel((base + off).tolist(), base.tolist())
    assert of.p == pytest.approx(expected.pvalue, rel=1e-5)
    shifted = of.found + off.std().item() * torch.randn(1000, 10, generator=rng).double()
    found = (scipy.stats.ttest_1samp(shifted.numpy(), 0, axis=1).pvalue < 0.05).mean()
    assert found == pytest.approx(0.8, abs=0.04)
