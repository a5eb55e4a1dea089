"""Numbers of other types than Python's, wherever a number is taken; and all that counts as a list of tensors."""

from __future__ import annotations

import fractions
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vaefast
from vaefast import Likelihood, Parameterization
from vaefast.diagnostics import CollapseMonitor, active_units
from vaefast.schedules import BetaSchedule, CyclicalSchedule, LinearSchedule, SigmoidSchedule


class Real:
    """Nothing but ``__float__``, as a framework's scalar."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        return float(self.value)


class Whole:
    """Nothing but ``__index__``."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return int(self.value)


REALS: list[Callable[[float], Any]] = [
    np.float16, np.float32, np.float64, np.longdouble, np.array, Decimal, fractions.Fraction, Real,
]  # fmt: skip
WHOLES: list[Callable[[int], Any]] = [np.int8, np.int64, np.uint16, np.array, Whole]
NONE: list[Any] = [True, np.True_, "1", 1j, np.complex64(1), np.array([1.0, 2.0]), [1.0], object()]

mu, logvar = torch.randn(4, 6), torch.randn(4, 6)
recon, x = torch.randn(4, 9), torch.rand(4, 9)
gaussian = Likelihood("gaussian")

# every argument that is a number, at a value that float16 has too
REAL_ARGUMENTS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "beta": (lambda v: vaefast.elbo_loss(recon, x, mu, logvar, beta=v), 0.5),
    "beta of ELBOLoss": (lambda v: vaefast.ELBOLoss(beta=v)(recon, x, mu, logvar), 0.5),
    "beta with a preset": (lambda v: vaefast.elbo_loss(recon.sigmoid(), x, mu, logvar, beta=v, preset="pythae"), 0.5),
    "beta with a factor besides": (lambda v: vaefast.elbo_loss(recon, x, mu, logvar, beta=v, preset="diffusers"), 0.5),
    "beta over elements": (lambda v: vaefast.ELBOLoss(preset="pytorch_vae", beta=v)(recon, x, mu, logvar), 0.5),
    "prior_mu": (lambda v: vaefast.gaussian_kl(mu, logvar, v), 0.5),
    "prior_logvar": (lambda v: vaefast.sample_with_kl(mu, logvar, 0, v)[1], -0.5),
    "a prior of many": (lambda v: vaefast.multi_tensor_sample_with_kl([mu], [logvar], v, v)[1], 0.5),
    "prior_logvar of another": (
        lambda v: vaefast.gaussian_kl(mu, logvar, 0.0, v, prior_parameterization="std"), 0.5),
    "free_bits": (lambda v: vaefast.gaussian_kl(mu, logvar, free_bits=v), 0.25),
    "capacity": (lambda v: vaefast.gaussian_kl(mu, logvar, capacity=v), 3.5),
    "balance": (lambda v: vaefast.gaussian_kl(mu, logvar, torch.zeros(6), balance=v), 0.75),
    "floor": (lambda v: vaefast.gaussian_kl(mu, logvar, parameterization=Parameterization(floor=v)), 0.125),
    "clamp": (lambda v: vaefast.gaussian_kl(mu, logvar, parameterization=Parameterization(clamp=(v, 2))), -0.5),
    "a parameter": (lambda v: vaefast.reconstruction_loss((recon, v), x, likelihood="laplace"), 0.5),
    "eps of a likelihood": (lambda v: str(Likelihood("negative_binomial", eps=v)), 0.5),
    "low of a likelihood": (
        lambda v: vaefast.reconstruction_loss(
            (recon, recon), x, likelihood=Likelihood("discretized_logistic", low=v)), -0.5),
    "a generated parameter": (lambda v: vaefast.likelihood_mean((recon.exp(), v), "negative_binomial"), 0.5),
    "threshold": (lambda v: active_units(mu, v), 0.5),
    "threshold of a monitor": (lambda v: CollapseMonitor(v).threshold, 0.5),
    "step": (lambda v: LinearSchedule(10)(v), 2.5),
    "steps": (lambda v: repr(LinearSchedule(v, start=v, delay=v)), 2.5),
    "ratio": (lambda v: repr(CyclicalSchedule(10, ratio=v, stop=v)), 0.5),
    "midpoint": (lambda v: repr(SigmoidSchedule(v, midpoint=v, steepness=v)), 0.5),
    "a schedule's result": (lambda v: BetaSchedule(lambda step: v)().item(), 0.5),
    "loc and scale": (lambda v: vaefast.distributions.Normal(v, v).log_prob(v), 0.5),
}  # fmt: skip

WHOLE_ARGUMENTS: dict[str, tuple[Callable[[Any], Any], int]] = {
    **{name: (call, 1) for name, (call, value) in REAL_ARGUMENTS.items() if value >= 0},
    "num_samples": (lambda v: vaefast.reparameterize(mu, logvar, num_samples=v).shape, 3),
    "dim": (lambda v: vaefast.DiagonalGaussian(mu, dim=v).mean.shape, 1),
    "bins": (lambda v: str(Likelihood("discretized_logistic", bins=v)), 17),
    "dim of a mixture": (
        lambda v: vaefast.reconstruction_loss(recon, x[:, 0].long(), likelihood=Likelihood("categorical", dim=v)), 1),
    "seed": (lambda v: vaefast.distributed.manual_seed(v, v), 17),
    "cycles": (lambda v: repr(CyclicalSchedule(10, cycles=v)), 3),
    "a step of BetaSchedule": (lambda v: repr(BetaSchedule(LinearSchedule(10), v)), 4),
    "where to": (lambda v: BetaSchedule(LinearSchedule(10)).seek(v), 4),
}  # fmt: skip


def outcome(call: Callable[[Any], Any], value: Any) -> Any:
    torch.manual_seed(0)
    return call(value)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("engines", ["auto", "reference"])
@pytest.mark.parametrize("kind", REALS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", list(REAL_ARGUMENTS))
def test_a_number_of_any_type_is_the_float(engines: str, name: str, kind: Callable[[float], Any]) -> None:
    call, value = REAL_ARGUMENTS[name]
    with vaefast.use_backend(engines):
        assert_same(outcome(call, kind(value)), outcome(call, value))


@pytest.mark.parametrize("kind", WHOLES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", list(WHOLE_ARGUMENTS))
def test_a_whole_number_of_any_type_is_the_int(name: str, kind: Callable[[int], Any]) -> None:
    call, value = WHOLE_ARGUMENTS[name]
    assert_same(outcome(call, kind(value)), outcome(call, value))


@pytest.mark.parametrize("value", NONE, ids=lambda value: "object" if type(value) is object else repr(value))
@pytest.mark.parametrize("name", sorted({*REAL_ARGUMENTS, *WHOLE_ARGUMENTS} - {"a schedule's result"}))
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    call = {**WHOLE_ARGUMENTS, **REAL_ARGUMENTS}[name][0]
    if "of a likelihood" in name and isinstance(value, (bool, np.bool_)):
        return  # an option may be a flag
    if name in ("loc and scale", "dim of a mixture", "bins") and isinstance(value, (bool, np.bool_, list, complex)):
        return  # torch.distributions' own; and an option is asked for its value alone
    with pytest.raises((TypeError, ValueError)):
        call(value)


@pytest.mark.parametrize("flag", [np.True_, np.False_])
def test_flags_of_numpy(face: Any, flag: Any) -> None:
    assert Likelihood("gaussian", constant=flag) == Likelihood("gaussian", constant=bool(flag))
    for call in (
        lambda v: face.gaussian_kl(mu, logvar, symmetric=v),
        lambda v: face.reconstruction_loss(recon.clone(), x, overwrite_recon=v),
        lambda v: face.elbo_loss(recon.clone(), x, mu, logvar, overwrite_recon=v),
        lambda v: vaefast.ELBOLoss(overwrite_recon=v)(recon.clone(), x, mu, logvar),
        lambda v: vaefast.DiagonalGaussian(mu, deterministic=v).std,
    ):
        # a flag that is no bool goes the general way, which may round the last bit otherwise
        torch.testing.assert_close(call(flag), call(bool(flag)), rtol=1e-6, atol=0)


LISTS: dict[str, Callable[[list[torch.Tensor]], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda ts: (t for t in ts),
    "ParameterList": lambda ts: nn.ParameterList([nn.Parameter(t) for t in ts]),
    "parameters()": lambda ts: nn.ParameterList([nn.Parameter(t) for t in ts]).parameters(),
    "map": lambda ts: map(torch.clone, ts),
    "dict's values": lambda ts: dict(enumerate(ts)).values(),
}


@pytest.mark.parametrize("kind", list(LISTS))
@pytest.mark.parametrize("parameterization", ["logvar", "log_std"])
def test_lists_of_tensors(face: Any, kind: str, parameterization: str) -> None:
    made = LISTS[kind]
    mus, raws = [torch.randn(4, 6), torch.randn(4, 3)], [torch.randn(4, 6), torch.randn(4, 3)]
    p = {"parameterization": parameterization}
    for call in (
        lambda m: face.multi_tensor_gaussian_kl(m(mus), m(raws), **p),
        lambda m: face.multi_tensor_gaussian_kl(m(mus), m(raws), m(raws), m(mus), **p),
        lambda m: face.multi_tensor_sample_with_kl(m(mus), m(raws), **p)[1],
        lambda m: face.reconstruction_loss(m([recon, recon]), x, likelihood="gaussian"),
        lambda m: face.elbo_loss(m([recon, recon]), x, mu, logvar, likelihood="laplace"),
        lambda m: face.elbo_loss(m([recon, recon]), x, mu, logvar, likelihood="laplace", preset="latent_diffusion"),
        lambda m: vaefast.ELBOLoss("gaussian")(m([recon, recon]), x, mu, logvar),
        lambda m: vaefast.ELBOLoss("gaussian", check=1)(m([recon, recon]), x, mu, logvar),
        lambda m: vaefast.likelihood_mean(m([recon, recon]), "gaussian"),
        lambda m: vaefast.sample_likelihood(m([recon]), "gaussian").shape,
    ):
        torch.testing.assert_close(outcome(call, made), outcome(call, list), rtol=0, atol=0)


@pytest.mark.parametrize(
    "values", [torch.zeros(2, 3), "ab", None, 3, {"a": mu}, nn.Linear(2, 2)], ids=lambda v: str(type(v).__name__)
)
def test_what_is_no_list_of_tensors_is_refused(face: Any, values: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="mus"):
        face.multi_tensor_gaussian_kl(values, [logvar])
    with pytest.raises((TypeError, ValueError), match="raws"):
        face.multi_tensor_gaussian_kl([mu], values)
    with pytest.raises(ValueError, match="mus is empty"):
        face.multi_tensor_gaussian_kl(iter(()), [logvar])
