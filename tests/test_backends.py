"""Choosing the back end: the context manager, the environment variables, what is told about the build."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import LIKELIHOOD_CASES, assert_cuda_kernels, posterior, training

import vaefast
from vaefast import _backends, _build, _native

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True
    )


def output(code: str, **env: str) -> str:
    run = python(code, **env)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def native_ran() -> bool:
    """Whether a call goes to the kernels now: their autograd node tells."""
    mu = torch.zeros(2, 3, requires_grad=True)
    return "PosteriorNode" in vaefast.gaussian_kl(mu, mu).grad_fn.name()


@pytest.fixture(autouse=True)
def _default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_backend", "auto")


def test_each_backend_is_taken(extension: Any) -> None:
    for name, native in (("auto", True), ("native", True), ("reference", False)):
        with vaefast.use_backend(name):
            assert native_ran() is native
    assert native_ran()


def test_nesting_and_restoring(extension: Any) -> None:
    with vaefast.use_backend("reference"):
        with vaefast.use_backend("native"):
            assert native_ran()
            with vaefast.use_backend("auto"):
                assert native_ran()
        assert not native_ran()
    assert native_ran()


def test_restored_after_an_exception(extension: Any) -> None:
    with pytest.raises(ZeroDivisionError), vaefast.use_backend("reference"):
        raise ZeroDivisionError
    assert native_ran()
    with vaefast.use_backend("reference"):
        with pytest.raises(ValueError, match="backend"), vaefast.use_backend("fast"):
            pass
        assert not native_ran()


def test_it_is_for_the_whole_process(extension: Any) -> None:
    found = []
    with vaefast.use_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(native_ran()))
        thread.start()
        thread.join()
    assert found == [False]


def test_unknown_name_tells_the_known() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'native', 'reference'; got 'cuda'"):
        with vaefast.use_backend("cuda"):
            pass


UNCOVERED: dict[str, Any] = {
    "target": lambda mu, g: vaefast.reconstruction_loss(mu, g),
    "weight": lambda mu, g: vaefast.reconstruction_loss(mu, mu.detach(), weight=g),
    "eps": lambda mu, g: vaefast.reparameterize(mu, mu, eps=g),
    "torch.func": lambda mu, g: torch.func.grad(lambda m: vaefast.gaussian_kl(m, mu.detach()))(mu.detach()),
}


@pytest.mark.parametrize("case", list(UNCOVERED))
def test_native_refuses_what_it_does_not_cover(extension: Any, case: str) -> None:
    mu, g = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    with vaefast.use_backend("native"), pytest.raises(RuntimeError, match=r"use_backend\('native'\).*'auto'"):
        UNCOVERED[case](mu, g)
    for fallback in ("auto", "reference"):
        with vaefast.use_backend(fallback):
            assert UNCOVERED[case](mu, g).isfinite().all()


def test_native_without_an_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_C", None)
    mu = torch.zeros(2, 3)
    assert vaefast.available_backends() == ("reference",)
    assert "no compiled extension" in vaefast.show_config()
    assert vaefast.gaussian_kl(mu, mu).item() == 0
    with vaefast.use_backend("native"), pytest.raises(RuntimeError, match="not built"):
        vaefast.gaussian_kl(mu, mu)


def test_available_backends(extension: Any) -> None:
    names = vaefast.available_backends()
    assert names[-1] == "reference"
    assert "cpu" in names
    assert set(names) <= {"cuda", "cpu", "reference"}


@pytest.mark.parametrize("name", ["auto", "native", "reference"])
def test_environment_sets_the_default(extension: Any, name: str) -> None:
    code = "import vaefast; print(vaefast._backends._backend); print(vaefast.show_config())"
    told = output(code, VAEFAST_BACKEND=name)
    assert told.splitlines()[0] == name
    assert f"default: {name}" in told


def test_bad_environment_is_told() -> None:
    run = python("import vaefast", VAEFAST_BACKEND="gpu")
    assert run.returncode != 0
    assert "ValueError" in run.stderr
    for part in ("VAEFAST_BACKEND", "'auto'", "'native'", "'reference'", "'gpu'"):
        assert part in run.stderr


def test_show_config(extension: Any) -> None:
    text = vaefast.show_config()
    for part in (vaefast.__version__, torch.__version__, *_build.info().cpu, *vaefast.available_backends(), "cuda"):
        assert part in text


@pytest.mark.parametrize(("capability", "told"), [("default", "DEFAULT"), ("avx2", "AVX2"), ("avx512", "AVX512")])
def test_instruction_set_is_torchs(extension: Any, capability: str, told: str) -> None:
    code = "import torch, vaefast; print(torch.backends.cpu.get_cpu_capability()); print(vaefast.show_config())"
    first, *rest = output(code, ATEN_CPU_CAPABILITY=capability).splitlines()
    assert f"this machine runs {first}" in "\n".join(rest)
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        assert first == told


def test_importing_draws_no_random_numbers() -> None:
    code = (
        "import torch; torch.manual_seed(0); s = torch.get_rng_state(); import vaefast; "
        "print(torch.equal(s, torch.get_rng_state()))"
    )
    assert output(code) == "True"


def test_back_ends_agree(extension: Any) -> None:
    """One ELBO for every likelihood, one answer."""
    p = posterior(prior="broadcast")
    for likelihood, count in LIKELIHOOD_CASES:
        data = training(likelihood, count)
        found = []
        for name in ("native", "reference"):
            with vaefast.use_backend(name):
                found.append(vaefast.elbo_terms(data.recon, data.target, *p.args(), likelihood=likelihood))
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("wide", ["recon", "mu", "weight", "prior"])
@pytest.mark.parametrize("reduction", ["per_sample", "batchmean", "sum"])
def test_back_ends_agree_on_dtypes(extension: Any, wide: str, reduction: str) -> None:
    """Float64 in one of the two terms: the results come in the same dtypes, whoever computes them."""
    data, p = training("bernoulli", 1), posterior(prior="full")
    recon, mu, weight, prior = data.recon[0], p.mu, torch.rand(7), p.prior[0]
    found = []
    for name in ("native", "reference"):
        with vaefast.use_backend(name):
            terms = vaefast.elbo_terms(
                recon.double() if wide == "recon" else recon,
                data.target,
                mu.double() if wide == "mu" else mu,
                p.raw,
                prior.double() if wide == "prior" else prior,
                reduction=reduction,
                weight=weight.double() if wide == "weight" else weight,
            )
            found.append([t.dtype for t in terms])
            assert terms.loss.dtype == torch.float64
    assert found[0] == found[1]


def test_every_operator_has_a_cuda_kernel() -> None:
    if "cuda" not in vaefast.available_backends():
        pytest.skip("vaefast was built without CUDA; build it where nvcc and a CUDA torch are (no GPU is needed)")
    assert_cuda_kernels()
