"""Under an integration a program that raised for bad input raises as it did, and nothing that worked raises with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, LogNormal, MixtureSameFamily, Normal, kl_divergence

from vaefast import integrations
from vaefast.integrations import torch_distributions

m, s, v = torch.zeros(3, 4), torch.ones(3, 4), torch.full((3, 4), 0.5)


def off(scale: Any, loc: Any = m) -> Normal:
    return Normal(loc, scale, validate_args=False)


def changed(**attributes: Any) -> Normal:
    d = off(s)
    vars(d).update(attributes)
    return d


PROGRAMS: dict[str, Callable[[], Any]] = {
    # what is refused
    "a negative scale": lambda: Normal(m, -s, True),
    "a scale of 0": lambda: Normal(m, 0 * s, True),
    "a NaN loc": lambda: Normal(m * math.nan, s, True),
    "shapes that do not broadcast": lambda: Normal(m, torch.ones(5)),
    "a NaN value": lambda: Normal(m, s, True).log_prob(v * math.nan),
    "a value of another shape": lambda: Normal(m, s, True).log_prob(torch.zeros(5)),
    "a value of another shape, unasked": lambda: off(s).log_prob(torch.zeros(5)),
    "a value that is none": lambda: Normal(m, s, True).log_prob("0"),
    "no value": lambda: off(s).log_prob(None),
    "a list as value": lambda: off(s).log_prob([0.5] * 4),
    "a draw of a negative scale": lambda: off(-s).sample(),
    "a draw of a scale with a NaN": lambda: off(torch.where(torch.eye(3, 4) > 0, math.nan, s)).sample((2,)),
    "draws of a negative shape": lambda: off(s).sample((-1,)),
    "draws of no shape": lambda: off(s).rsample("2"),
    "draws of a float shape": lambda: off(s).rsample((2.5,)),
    "KL of other shapes": lambda: kl_divergence(off(s), off(torch.ones(5), torch.zeros(5))),
    "KL of other devices": lambda: kl_divergence(off(s), off(s.to("meta"), m.to("meta"))),
    "a value on another device": lambda: off(s).log_prob(v.to("meta")),
    "KL to no distribution": lambda: kl_divergence(off(s), 3),
    "a sparse value": lambda: off(s).log_prob(v.to_sparse()),
    "a complex value": lambda: off(s).log_prob(v.to(torch.complex64)),
    "an independent's value": lambda: Independent(Normal(m, s, True), 1).log_prob(torch.zeros(3, 5)),
    "a log-normal's value": lambda: LogNormal(m, s, True).log_prob(-v),
    # what works
    "a draw of a scale of 0": lambda: off(0 * s).sample(),
    "a differentiable draw of a negative scale": lambda: off(-s).rsample() * 0,
    "a value of integers": lambda: Normal(m, s, True).log_prob(torch.ones(3, 4, dtype=torch.int64)),
    "a number as value": lambda: off(s).log_prob(0.5),
    "a number of numpy": lambda: off(s).log_prob(np.float64(0.5)),
    "an array of numpy": lambda: off(s).log_prob(np.zeros(4)),
    "a value of bools": lambda: off(s).log_prob(v > 0),
    "a value of float64": lambda: off(s).log_prob(v.double()),
    "a half": lambda: off(s.half(), m.half()).log_prob(v.half()),
    "numbers alone": lambda: Normal(0.0, 1.0).log_prob(v),
    "integers": lambda: off(s.long(), m.long()).log_prob(v),
    "no elements": lambda: off(s[:0], m[:0]).log_prob(v[:0]),
    "draws of no elements": lambda: off(s[:0], m[:0]).sample((0,)),
    "draws by a list": lambda: off(s).rsample([2, 3]) * 0,
    "draws by an array's ints": lambda: off(s).rsample((np.int64(2),)) * 0,
    "many dimensions": lambda: off(torch.ones(1, 1, 1, 1, 1, 1, 1, 1, 1, 2)).log_prob(torch.zeros(2)),
    "a value of many dimensions": lambda: off(s).log_prob(torch.zeros(1, 1, 1, 1, 1, 1, 1, 3, 4)),
    "an expanded one": lambda: off(torch.ones(4), torch.zeros(4)).expand((3, 4)).log_prob(v),
    "a KL of two dtypes": lambda: kl_divergence(off(s), off(s.double(), m.double())),
    "a KL that broadcasts": lambda: kl_divergence(off(torch.ones(4), torch.zeros(4)), off(torch.ones(3, 1))),
    "a KL of numbers": lambda: kl_divergence(Normal(0.0, 1.0), Normal(1.0, 2.0)),
    "a KL of a scale of 0": lambda: kl_divergence(off(0 * s), off(s)),
    "a scale of another shape, set": lambda: changed(scale=torch.ones(2, 3, 4)).log_prob(v),
    "a KL of one": lambda: kl_divergence(changed(scale=torch.ones(2, 3, 4)), off(s)),
    "a KL to one": lambda: kl_divergence(off(s), changed(loc=torch.ones(2, 3, 4))),
    "a loc of another shape, set": lambda: changed(loc=torch.ones(2, 3, 4)).log_prob(v),
    "a draw of one": lambda: 0 * changed(scale=torch.ones(4)).rsample(),
    "a number as scale, set": lambda: changed(scale=2.0).log_prob(v),
    "a mixture": lambda: MixtureSameFamily(Categorical(torch.ones(3, 4)), off(s)).log_prob(torch.zeros(3)),
    "a log-normal": lambda: LogNormal(m, s, True).log_prob(v),
    "on meta": lambda: off(s.to("meta"), m.to("meta")).sample().shape,
    "deterministic algorithms": lambda: deterministic(lambda: off(s).log_prob(v)),
    "inference mode": lambda: torch.inference_mode()(lambda: off(s).log_prob(v))(),
    "vmap": lambda: torch.vmap(lambda a, b: off(b, a).log_prob(a + 1))(m, s),
    "a gradient to a value": lambda: torch.autograd.functional.jacobian(off(s).log_prob, v),
    "second derivatives": lambda: torch.autograd.functional.hessian(lambda x: off(s).log_prob(x).sum(), v),
    "an inherited method": lambda: off(s).cdf(v),
}  # fmt: skip


def deterministic(f: Callable[[], Tensor]) -> Tensor:
    torch.use_deterministic_algorithms(True)
    try:
        return f()
    finally:
        torch.use_deterministic_algorithms(False)


def outcome(program: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    try:
        return program()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("noise", ["philox", "torch"])
@pytest.mark.parametrize("name", list(PROGRAMS))
@pytest.mark.filterwarnings("ignore")
def test_programs_of_torch(name: str, noise: str) -> None:
    expected = outcome(PROGRAMS[name])
    with torch_distributions.enabled(noise=noise):
        found = outcome(PROGRAMS[name])
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, type):
        assert found is expected
    elif "draw" not in name or noise == "torch":
        torch.testing.assert_close(found, expected, equal_nan=True)


x4 = torch.randn(2, 8, 3, 3)
other = torch.randn(2, 8, 3, 3)


class Duck:
    """What diffusers' KL asks of another."""

    mean, logvar, var, deterministic = m[0, 0], m[0, 0], s[0, 0], False


POSTERIORS: dict[str, Callable[[Any], Any]] = {
    "odd channels": lambda c: c(torch.zeros(2, 3, 3, 3)).kl(),
    "no tensor": lambda c: c("moments"),
    "a vector": lambda c: c(torch.zeros(4)),
    "KL of a matrix": lambda c: c(torch.zeros(2, 8)).kl(),
    "KL of three dimensions": lambda c: c(torch.zeros(2, 8, 3)).kl(),
    "KL to another shape": lambda c: c(x4).kl(c(torch.zeros(5, 8, 3, 3))),
    "KL that broadcasts": lambda c: c(x4).kl(c(other[:1])),
    "KL to no posterior": lambda c: c(x4).kl(3),
    "KL to a duck": lambda c: c(x4).kl(Duck()),
    "KL to a deterministic one": lambda c: c(x4).kl(c(other, deterministic=True)),
    "KL of a deterministic one": lambda c: c(x4, deterministic=True).kl(c(other)),
    "KL to another dtype": lambda c: c(x4).kl(c(other.double())),
    "nll of another shape": lambda c: c(x4).nll(torch.zeros(5, 4, 3, 3)),
    "nll that broadcasts": lambda c: c(x4).nll(torch.zeros(1, 4, 3, 3)),
    "nll of a number": lambda c: c(x4).nll(0.5),
    "nll of integers": lambda c: c(x4).nll(torch.ones(2, 4, 3, 3, dtype=torch.int64)),
    "nll of no tensor": lambda c: c(x4).nll("x"),
    "nll of another device": lambda c: c(x4).nll(torch.zeros(2, 4, 3, 3, device="meta")),
    "nll over one dim": lambda c: c(x4).nll(x4[:, :4], dims=1),
    "nll over all": lambda c: c(x4).nll(x4[:, :4], dims=None),
    "nll over no such dim": lambda c: c(x4).nll(x4[:, :4], dims=[7]),
    "nll over a dim twice": lambda c: c(x4).nll(x4[:, :4], dims=[1, 1]),
    "nll over negative dims": lambda c: c(x4).nll(x4[:, :4], dims=(-1, -2)),
    "nll of float64": lambda c: c(x4).nll(x4[:, :4].double()),
    "a draw by a list": lambda c: c(x4).sample([torch.Generator().manual_seed(k) for k in range(2)]),
    "a draw by a short list": lambda c: c(x4).sample([torch.Generator()]),
    "a draw by no generator": lambda c: c(x4).sample("g"),
    "a deterministic draw": lambda c: c(x4, deterministic=True).sample(),
    "integers": lambda c: c(torch.ones(2, 8, 3, 3, dtype=torch.int64)).mean,
    "no elements": lambda c: c(torch.zeros(0, 8, 3, 3)).kl(),
}


@pytest.mark.pypi
@pytest.mark.parametrize("noise", ["philox", "torch"])
@pytest.mark.parametrize("name", list(POSTERIORS))
def test_programs_of_diffusers(name: str, noise: str) -> None:
    vae = pytest.importorskip(
        "diffusers.models.autoencoders.vae", reason="diffusers is not installed; `make test-pypi` installs it"
    )
    expected = outcome(lambda: POSTERIORS[name](vae.DiagonalGaussianDistribution))
    with integrations.diffusers.enabled(noise=noise):
        found = outcome(lambda: POSTERIORS[name](vae.DiagonalGaussianDistribution))
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, type):
        assert found is expected
    elif "a draw" not in name or noise == "torch":
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5, equal_nan=True)


k, mu, theta = torch.tensor([0.0, 1.0, 7.0]), torch.tensor([0.5, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0])
COUNTS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda d: d.log_nb_positive(k, mu, theta),
    "shapes": lambda d: d.log_nb_positive(k, mu, torch.ones(2)),
    "an eps in a tensor": lambda d: d.log_nb_positive(k, mu, theta, eps=torch.tensor(1e-8)),
    "another eps": lambda d: d.log_nb_positive(k, mu, theta, eps=np.float64(1e-6)),
    "counts as integers": lambda d: d.log_nb_positive(k.long(), mu, theta),
    "theta that broadcasts": lambda d: d.log_nb_positive(k.expand(2, 3), mu.expand(2, 3), theta),
    "no tensor": lambda d: d.log_nb_positive(1.0, mu, theta),
    "zero-inflated": lambda d: d.log_zinb_positive(k, mu, theta, mu),
    "zero-inflated shapes": lambda d: d.log_zinb_positive(k, mu, theta, torch.ones(2)),
    "a negative dispersion": lambda d: d.NegativeBinomial(mu=mu, theta=-theta, validate_args=True),
    "a count below 0": lambda d: d.NegativeBinomial(mu=mu, theta=theta, validate_args=True).log_prob(-k - 1),
}


@pytest.mark.pypi
@pytest.mark.parametrize("name", list(COUNTS))
@pytest.mark.filterwarnings("ignore")
def test_programs_of_scvi(name: str) -> None:
    counts = pytest.importorskip(
        "scvi.distributions._negative_binomial", reason="scvi-tools is not installed; `make test-pypi` installs it"
    )
    expected = outcome(lambda: COUNTS[name](counts))
    with integrations.scvi.enabled():
        found = outcome(lambda: COUNTS[name](counts))
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, type):
        assert found is expected
    elif isinstance(expected, Tensor) and name != "a count below 0":  # of which scvi-tools warns, and which is NaN here
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
