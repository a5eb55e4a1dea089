"""A slice of the fuzzer's cases, the same in every run; what it found before; and faults that it must find."""

from __future__ import annotations

import time

import hypothesis
import pytest
import torch
from torch import Tensor

import vaefast

from .cases import Case, Random, case_of, cases, smallest
from .check import Wrong, check
from .faults import FAULTS


def few(first: int, count: int) -> None:
    for k in range(count):
        case = case_of(Random((first, k)))
        try:
            check(case)
        except Exception as error:
            error.add_note(f"case: {case!r}")
            raise


@pytest.mark.parametrize("seed", range(3))
def test_a_slice(extension: object, seed: int) -> None:
    few(seed, 150)


@pytest.mark.isa
def test_a_slice_of_each_instruction_set(extension: object) -> None:
    few(10, 150)


@hypothesis.settings(
    max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(cases())
def test_what_hypothesis_draws(extension: object, case: Case) -> None:
    check(case)


# each failed when it was found
FOUND = [
    # a sum beyond float32 raised RuntimeError, where it is infinite
    Case(engine="reference", shape=(16,), seed=1048576, kinds=("extreme",), prior="logvar only"),
    Case(op="elbo_loss", engine="reference", shape=(3,), seed=475235, kinds=("extreme",), likelihood="beta_binomial",
         count=3),
    # log variances of a half's scales were computed in the half, and float32's in float32 beside float64
    Case(op="multi_tensor_gaussian_kl", shape=(40,), dtypes=("bfloat16", "float32"), prior="full",
         prior_parameterization="softplus", levels=2),
    Case(shape=(40,), dtypes=("float64", "float32", "float32"), prior="full", prior_parameterization="var"),
    Case(shape=(40,), dtypes=("float64", "bfloat16"), prior="full", prior_parameterization="std", free_bits=0.5),
    # the noise was another with batch_dims where mu is expanded; and PyTorch's, of a half, with options of the KL
    Case(op="sample_with_kl", shape=(2, 2, 2), layouts=("expanded rows",), batch_dims=3, seed=3),
    Case(op="multi_tensor_sample_with_kl", shape=(64,), layouts=("expanded rows",), batch_dims=1, levels=2),
    Case(op="sample_with_kl", engine="reference", shape=(65,), dtypes=("float16",), free_bits=0.1),
    Case(op="sample_with_kl", engine="reference", shape=(5,), dtypes=("bfloat16",), free_bits=0.1),
    # a float64 prior makes the kernel's noise float64's, which a backward that is differentiated did not know
    Case(op="sample_with_kl", shape=(40,), dtypes=("float32", "float32", "float64"), prior="mu only",
         create_graph=True),
    Case(op="packed", shape=(40, 2), dtypes=("float32", "float32", "float64"), prior="full", create_graph=True),
    Case(op="multi_tensor_sample_with_kl", shape=(8,), dtypes=("float32", "float32", "float64"), prior="scalar",
         create_graph=True, levels=2),
    # the gradient of a prior's softplus was infinite on its way to a number
    Case(engine="reference", shape=(13,), seed=868556, kinds=("extreme",), parameterization="log_std",
         prior="logvar only", prior_parameterization="softplus"),
    Case(shape=(13,), seed=868556, kinds=("extreme",), parameterization="log_std", prior="logvar only",
         prior_parameterization="softplus"),
    # the noise was another with batch_dims where their dimensions and the others' lie in turns
    Case(op="sample_with_kl", shape=(4, 4, 2, 5), seed=258976, layouts=("permuted",), batch_dims=2),
    Case(op="multi_tensor_sample_with_kl", shape=(4, 3, 2, 5), seed=1, layouts=("permuted",), batch_dims=2,
         reduction="batchmean", levels=2),
    Case(op="packed", shape=(4, 3, 2, 5), seed=4, layouts=("permuted",), batch_dims=2),
    Case(op="packed", shape=(4, 4, 2, 3), layouts=("overlapping",), batch_dims=2),
    Case(op="multi_tensor_sample_with_kl", shape=(2, 2, 2), seed=987067, layouts=("permuted",),
         reduction="per_sample", batch_dims=3, levels=3),
    # the shares of a mixture of negative binomials without log x! came of the nlls' rounding
    Case(op="reconstruction_loss", shape=(7, 2), seed=589290, likelihood="negative_binomial_mixture", count=4,
         other_options=True),
    # a continuous Bernoulli of float64 had float32's digits where it is nearly even
    Case(op="elbo_terms", engine="dispatched", shape=(9,), data=(65,), seed=349833, dtypes=("float64",),
         kinds=("near",), likelihood="continuous_bernoulli"),
]  # fmt: skip

# what was the oracle's fault: data outside the domain in 50 digits; a digamma of what is next to 0, in float64; 1e-12
# in float32; gradients of one backward and another, each right and rounded by itself; a count between 0 and 1; a mean
# that is infinite in the bound of a scale's gradient; infinity less infinity; halves beyond their range
# before they are added up
FOUND += [
    Case(op="elbo_terms", engine="reference", shape=(249,), kinds=("wild",), reduction="per_sample",
         likelihood="continuous_bernoulli"),
    Case(op="reconstruction_loss", engine="dispatched", shape=(33, 8, 8, 1), seed=370690, dtypes=("float32", "float32"),
         layouts=("contiguous", "transposed"), kinds=("wild", "extreme"), upstream="ones", reduction="mean",
         likelihood="beta_binomial", count=3, poison=True),
    Case(op="elbo_terms", engine="reference", shape=(1, 2, 2), data=(8, 4), seed=752693, kinds=("extreme",),
         dtypes=("float64", "float64", "bfloat16"), upstream="ones", likelihood="bernoulli_probs"),
    Case(op="elbo_loss", shape=(1,), data=(1, 1), seed=556419, layouts=("padded rows", "transposed", "transposed"),
         kinds=("training", "wild", "extreme"), wanted=(True, False, True), parameterization="log_std",
         clamp=(0.5, 0.5), prior="mu only", balance=0.8, poison=True, beta=4.0, twice=True),
    Case(op="elbo_loss", shape=(2,), data=(32,), seed=64018, kinds=("extreme", "wild"), upstream="large",
         parameterization="log_std", prior="scalar", likelihood="poisson", weight="row", beta=0.0),
    Case(op="multi_tensor_gaussian_kl", shape=(3,), seed=604271, kinds=("wild", "near"), floor=0.0001),
    Case(op="sample_with_kl", shape=(8, 4, 2), seed=234601, kinds=("training", "wild"), upstream="zeros",
         reduction="batchmean", batch_dims=3, prior="broadcast", prior_parameterization="std", given_noise=True,
         free_bits=0.1, free_bits_per="batch_dim", balance=0.0, kl_weight="full"),
    Case(op="elbo_terms", engine="dispatched", shape=(7, 16, 2, 2), seed=370454, dtypes=("float16",),
         layouts=("every second",), upstream="large", reduction="batchmean", parameterization="std", prior="broadcast",
         symmetric=True, likelihood="log_normal", count=2, beta=0.5),
]  # fmt: skip


@pytest.mark.parametrize("case", FOUND, ids=repr)
def test_what_was_found(extension: object, case: Case) -> None:
    check(case)


def test_a_trace_draws_what_the_kernels_do_beside_a_float64_prior(extension: object) -> None:
    moments, prior = torch.randn(4, 6), torch.randn(4, 6, dtype=torch.float64)
    mus = [torch.randn(4, 6), torch.randn(4, 3)]

    def packed(moments: Tensor, prior: Tensor) -> Tensor:
        return vaefast.DiagonalGaussian(moments).sample_with_kl(vaefast.DiagonalGaussian(prior))[0]

    def several(first: Tensor, second: Tensor) -> Tensor:
        prior = torch.zeros((), dtype=torch.float64)
        return torch.cat(vaefast.multi_tensor_sample_with_kl([first, second], [first, second], prior)[0], 1)

    for f, inputs in ((packed, (moments, prior)), (several, mus)):
        traced = torch.jit.trace(f, tuple(inputs), check_trace=False)
        results = []
        for call in (f, traced):
            torch.manual_seed(3)
            results.append(call(*inputs))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [-2000.0, -1e5, 1e5, 1e39])
def test_a_prior_that_is_any_number(backend: str, value: float) -> None:
    mu = torch.ones(2, 3, requires_grad=True)
    kl = vaefast.gaussian_kl(mu, torch.zeros(2, 3), 0.5, value, reduction="none")
    exact = 0.5 * (value - 1) if 0 < value < 1e38 else float("inf")
    assert torch.equal(kl.detach(), torch.full_like(mu, exact))
    (gradient,) = torch.autograd.grad(kl.sum(), mu)
    assert (gradient == (float("inf") if value < 0 else 0)).all()


def test_an_infinite_factor_is_an_infinite_loss(backend: str) -> None:
    mu, recon = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    loss = vaefast.elbo_loss(recon, torch.ones(2, 3), mu, torch.zeros(2, 3), beta=1e39)
    assert loss.item() == float("inf")
    of_mu, of_recon = torch.autograd.grad(loss, (mu, recon))
    assert (of_mu == float("inf")).all() and of_recon.isfinite().all()


def found_by(most: float) -> Case | None:
    """The first case that fails, in so many seconds."""
    end, k = time.monotonic() + most, 0
    while time.monotonic() < end:
        case = case_of(Random(("faults", k)))
        try:
            check(case)
        except Wrong:
            return case
        k += 1
    return None


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_planted_fault_is_found(extension: object, fault: str) -> None:
    with FAULTS[fault]():
        case = found_by(300.0)
        assert case is not None, "nothing was found in 5 minutes"

        def fails(other: Case) -> bool:
            try:
                check(other)
            except Wrong:
                return True
            except Exception:
                return False
            return False

        small = smallest(case, fails, most=25)
        assert len(repr(small)) <= len(repr(case))
    check(small)  # without the fault it is right


def test_equal_noise_shows_by_itself(extension: object) -> None:
    """Independence, without another implementation: no number comes twice, and neighbours do not move together."""

    def noise() -> Tensor:
        torch.manual_seed(5)
        return torch.stack([vaefast.reparameterize(torch.zeros(8), torch.zeros(8)) for _ in range(2000)])

    def dependent(z: Tensor) -> bool:
        correlation = (z[:, :4] * z[:, 4:]).mean(0).abs().max().item()
        return correlation > 6 / 2000**0.5 or z.unique().numel() < 0.999 * z.numel()

    assert not dependent(noise())
    with FAULTS["a counter used twice"]():
        assert dependent(noise())
