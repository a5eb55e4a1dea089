"""What torch.jit.trace records is made of PyTorch's operators, and draws what the same call draws in eager."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

import vaefast
from vaefast.integrations import torch_distributions

pytestmark = pytest.mark.filterwarnings("ignore")

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rsample": lambda m: Normal(m, m.exp(), validate_args=False).rsample(),
    "rsample of two": lambda m: Normal(m, m.exp(), validate_args=False).rsample((2,)),
    "sample": lambda m: m * Normal(m, m.exp(), validate_args=False).sample(),
    "independent": lambda m: Independent(Normal(m, m.exp(), validate_args=False), 1).rsample(),
    "Normal": lambda m: vaefast.distributions.Normal(m, logvar=m).rsample(),
    "reparameterize": lambda m: vaefast.reparameterize(m, m),
    "torch's noise": lambda m: vaefast.reparameterize(m, m, noise="torch"),
    "of two dtypes": lambda m: vaefast.reparameterize(m, m.double()).float(),
    "sample_with_kl": lambda m: vaefast.sample_with_kl(m, m)[0],
    "many": lambda m: vaefast.multi_tensor_sample_with_kl([m, m], [m, m])[0][1],
    "moments": lambda m: vaefast.DiagonalGaussian(m).sample(),
}
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "log_prob": lambda m: Normal(m, m.exp(), validate_args=False).log_prob(2 * m),
    "kl_divergence": lambda m: kl_divergence(Normal(m, m.exp(), validate_args=False), Normal(2 * m, m.exp(), False)),
    "gaussian_kl": lambda m: vaefast.gaussian_kl(m, m),
    "free bits": lambda m: vaefast.gaussian_kl(m, m, free_bits=0.1),
    "nll": lambda m: vaefast.reconstruction_loss(m, m.sigmoid().detach()),
    "elbo": lambda m: vaefast.elbo_loss(m, m.sigmoid().detach(), m, m),
    "terms": lambda m: vaefast.elbo_terms((m, m), m.detach(), m, m, likelihood="gaussian").loss,
    "levels": lambda m: vaefast.multi_tensor_gaussian_kl([m, m], [m, m]),
    "optimal": lambda m: vaefast.reconstruction_loss(m, 2 * m.detach(), likelihood="gaussian_optimal"),
    "kl of moments": lambda m: vaefast.DiagonalGaussian(m).kl(),
}


def seeded(f: Callable[[Tensor], Tensor], m: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The value and the gradient."""
    leaf = m.clone().requires_grad_()
    torch.manual_seed(seed)
    out = f(leaf)
    return out.detach(), torch.autograd.grad(out.sum(), leaf)[0]


@pytest.mark.parametrize("name", [*DRAWS, *VALUES])
@pytest.mark.parametrize("noise", [None, "default", "philox", "torch"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_traced_is_eager(name: str, noise: str | None, backend: str) -> None:
    f, m = {**DRAWS, **VALUES}[name], torch.randn(3, 4)
    with vaefast.use_backend(backend):
        if noise is not None:
            torch_distributions.enable(None if noise == "default" else noise)
        try:
            traced = torch.jit.trace(f, (m,), check_trace=False)
            buffer = io.BytesIO()
            torch.jit.save(traced, buffer)
            buffer.seek(0)
            for graph in (traced, torch.jit.load(buffer)):
                for batch in (m, torch.randn(5, 4)):
                    for found, eager in zip(seeded(graph, batch), seeded(f, batch)):
                        torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-5)
            if name in DRAWS:
                torch.manual_seed(1)
                first, second = traced(m), traced(m)
                assert not torch.equal(first, second)  # the seed is drawn in each call
            assert "vaefast::" not in str(traced.graph)
        finally:
            torch_distributions.disable()


def test_a_trace_of_a_density_stands_its_check() -> None:
    """torch.jit.trace makes it a second time, without gradients, and compares the two."""
    m = torch.randn(3, 4, requires_grad=True)
    with torch_distributions.enabled():
        traced = torch.jit.trace(lambda x: Normal(0.0, 1.0, validate_args=False).log_prob(x * 2), (m,))
    torch.testing.assert_close(traced(m), Normal(0.0, 1.0).log_prob(m * 2))
