"""That the executor's net is up: blocks of memory exactly as large as asked for and poisoned, a log of launches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from inputs import FLOATING, posterior, training

import vaefast

from .conftest import Launched

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 255, 257, 4095, 4097]


@pytest.mark.parametrize("dtype", [*FLOATING, torch.int64, torch.bool], ids=str)
def test_memory_ends_with_the_tensor(dtype: torch.dtype) -> None:
    """The byte before a tensor's first and the one after its last are poisoned, its own are not."""
    poisoned = ctypes.CDLL(None).__asan_address_is_poisoned
    poisoned.argtypes = [ctypes.c_void_p]
    for size in SIZES:
        t = torch.empty(size, dtype=dtype)
        first, end = t.data_ptr(), t.data_ptr() + size * t.element_size()
        assert poisoned(first - 1) and poisoned(end)
        assert not poisoned(first) and not poisoned(end - 1)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("size", [*SIZES, 1 << 20])
def test_memory_starts_as_nan(dtype: torch.dtype, size: int) -> None:
    assert torch.empty(size, dtype=dtype).isnan().all()
    assert torch.empty_like(torch.zeros(1, dtype=dtype).expand(size)).isnan().all()


def test_launches_are_logged(launches: Callable[[], list[Launched]]) -> None:
    assert launches() == []
    p = posterior((3, 5))
    vaefast.gaussian_kl(p.mu, p.raw)
    (launch,) = launches()
    assert launch.blocks == 1
    assert launch.threads % 32 == 0
    assert "vaefast::" in launch.kernel and "PosteriorForward<float" in launch.kernel


def some(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize(
    ("function", "kernels"),
    [
        (lambda: vaefast.sample_with_categorical_kl(some(6, 4, 9))[1], ["CategoricalWork"] * 2),
        (lambda: vaefast.product_of_experts(some(3, 6, 4), some(3, 6, 4))[1].sum(), ["experts_kernel"] * 2),
        (
            lambda: vaefast.bounds.log_weights(some(5, 6, 9), torch.rand(6, 9), some(5, 6, 4), some(6, 4), some(6, 4)),
            ["LogRatioWork", "log_ratio_backward"],
        ),
        (
            lambda: vaefast.total_correlation(some(60, 40), some(60, 40), some(60, 40), 1000).total_correlation,
            ["marginals_kernel", "marginals_backward"],
        ),
        # the logits, the components, the samples; and again before the components' sums and what is made of them
        (
            lambda: vaefast.priors.mixture_log_prob(some(6, 4), some(3, 4), some(3, 4), some(3)),
            ["mixture_kernel"] * 8,
        ),
    ],
    ids=["categorical", "experts", "draws", "correlation", "mixture"],
)
def test_what_is_no_elbo_is_launched(
    function: Callable[[], torch.Tensor], kernels: list[str], launches: Callable[[], list[Launched]]
) -> None:
    function().sum().backward()
    found = [launch.kernel for launch in launches()]
    for kernel in set(kernels):
        assert sum(kernel in name for name in found) == kernels.count(kernel), found


def test_a_step_is_four_launches(launches: Callable[[], list[Launched]]) -> None:
    """Sample, loss, and the backward of each."""
    p = posterior((8, 20)).leaves()
    target = training("bernoulli", 1, (8, 64)).target
    weight = torch.ones(20, 64, requires_grad=True)
    before = len(launches())
    z = vaefast.reparameterize(p.mu, p.raw)
    loss = vaefast.elbo_loss(z @ weight, target, p.mu, p.raw, likelihood="bernoulli", reduction="batchmean")
    loss.backward()
    assert p.mu.grad is not None and p.raw.grad is not None and weight.grad is not None
    assert 0 < len(launches()) - before <= 4, "\n".join(map(str, launches()))
