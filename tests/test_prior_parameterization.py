"""What ``prior_logvar`` means: a prior in any parameterization is the one whose log variance it comes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import CLAMPED_AND_FLOORED, generator
from torch import Tensor

import vaefast
from vaefast import Parameterization
from vaefast.presets import PRESETS, Preset
from vaefast.reference import PARAMETERIZATIONS

EVERY = pytest.mark.parametrize(
    "p",
    [*map(Parameterization, PARAMETERIZATIONS), *CLAMPED_AND_FLOORED],
    ids=lambda p: f"{p.name}-{p.clamp}-{p.floor}",
)


def values(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (5, 3)) -> list[Tensor]:
    """mu, logvar, prior_mu, and a raw that every parameterization takes."""
    found = [torch.randn(shape, generator=generator(k), dtype=torch.float64) for k in range(4)]
    return [t.to(dtype).requires_grad_() for t in (*found[:3], found[3].exp())]


def log_variance(raw: Tensor, p: Parameterization) -> Tensor:
    """As the docstring of Parameterization defines it, by PyTorch's own."""
    if p.clamp is not None:
        raw = raw.clamp(*p.clamp)
    std = {
        "logvar": lambda: (raw / 2).exp(), "log_std": raw.exp, "std": lambda: raw, "var": raw.sqrt,
        "softplus": lambda: torch.nn.functional.softplus(raw),
    }[p.name]()  # fmt: skip
    return 2 * (std + p.floor).log()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"balance": 0.8, "reduction": "sum"},
    {"free_bits": 0.3, "reduction": "per_sample"},
    {"free_bits": 1.0, "free_bits_per": "sample", "symmetric": True},
    {"capacity": 3.0},
    {"reduction": "none", "symmetric": True, "balance": 0.3},
]


@EVERY
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_is_the_prior_of_that_log_variance(face: Any, p: Parameterization, options: dict[str, Any]) -> None:
    q = values()
    found = face.gaussian_kl(*q, prior_parameterization=p, **options)
    exact = face.gaussian_kl(*q[:3], log_variance(q[3], p), **options)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    pairs = [torch.autograd.grad(t.sum(), q, allow_unused=True) for t in (found, exact)]
    for a, e in zip(*pairs):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


CALLS: dict[str, Callable[..., Tensor]] = {
    "kl_per_dim": lambda face, q, **o: face.kl_per_dim(*q, **o),
    "sample_with_kl": lambda face, q, **o: face.sample_with_kl(*q, eps=torch.zeros(5, 3), **o)[1],
    "estimator": lambda face, q, **o: face.sample_with_kl(*q, eps=torch.ones(5, 3), estimator="mc", **o)[1],
    "elbo_loss": lambda face, q, **o: face.elbo_loss(q[0], torch.ones(5, 3), *q, **o),
    "elbo_terms": lambda face, q, **o: face.elbo_terms(q[0], torch.ones(5, 3), *q, free_bits=0.1, **o).kl,
    "multi_tensor_gaussian_kl": lambda face, q, **o: face.multi_tensor_gaussian_kl(*([t, t] for t in q), **o),
    "multi_tensor_sample_with_kl": lambda face, q, **o: face.multi_tensor_sample_with_kl(
        [q[0]] * 2, [q[1]] * 2, *q[2:], **o
    )[1],
}  # fmt: skip


@pytest.mark.parametrize("name", list(CALLS))
@pytest.mark.parametrize("p", ["std", Parameterization("softplus", floor=0.1)], ids=str)
def test_every_function_takes_it(face: Any, name: str, p: str | Parameterization) -> None:
    q = values()
    whole = Parameterization(p) if isinstance(p, str) else p
    found = CALLS[name](face, q, prior_parameterization=p)
    exact = CALLS[name](face, [*q[:3], log_variance(q[3], whole)], prior_parameterization="logvar")
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_numbers_and_none(face: Any) -> None:
    mu, logvar, *_ = values(torch.float32)
    found = face.gaussian_kl(mu, logvar, 0.5, 0.1, prior_parameterization="std")
    torch.testing.assert_close(found, face.gaussian_kl(mu, logvar, 0.5, 2 * float(torch.tensor(0.1).log())))
    standard = face.gaussian_kl(mu, logvar)
    assert torch.equal(face.gaussian_kl(mu, logvar, prior_parameterization="std"), standard)
    shared = face.multi_tensor_sample_with_kl([mu], [logvar], 0.0, 1.0, prior_parameterization="std")[1]
    torch.testing.assert_close(shared, face.gaussian_kl(mu, logvar, reduction="sum"))


def test_a_list_follows_the_posteriors_unless_it_is_told(face: Any) -> None:
    mu, _, pm, raw = values()
    follows = face.multi_tensor_gaussian_kl([mu], [raw], [pm], [raw], parameterization="var")
    told = face.multi_tensor_gaussian_kl(
        [mu], [raw], [pm], [raw.log()], parameterization="var", prior_parameterization="logvar"
    )
    torch.testing.assert_close(follows, told)


def test_log_stds_are_exact(face: Any) -> None:
    """Twice a number rounds nothing: bit for bit what is done by hand, next to the prior too."""
    mu, _, _, raw = (t.detach() for t in values(torch.float32))
    near = raw + torch.tensor([0.0, 1e-7, 1e-4])
    found = face.gaussian_kl(
        mu, near, mu, raw, parameterization="log_std", prior_parameterization="log_std", reduction="none"
    )
    by_hand = face.gaussian_kl(mu, near, mu, 2 * raw, parameterization="log_std", reduction="none")
    assert torch.equal(found, by_hand)
    assert (found[:, 0] == 0).all() and (found >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_is_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    q = [t.detach() for t in values(dtype)]
    found = vaefast.gaussian_kl(*q, prior_parameterization="std")
    exact = vaefast.gaussian_kl(*(t.double() for t in q), prior_parameterization="std")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_presets_and_modules(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dreamer's and VDVAE's priors as they have them, and a preset of one's own that says so."""
    mu, logvar, pm, raw = values(torch.float32)
    std, x = logvar.exp(), torch.ones(5, 3)
    by_hand = vaefast.elbo_loss(mu, x, mu, std, pm, 2 * raw.log(), preset="dreamer")
    given = vaefast.elbo_loss(mu, x, mu, std, pm, raw, preset="dreamer", prior_parameterization="std")
    module = vaefast.ELBOLoss(preset="dreamer", prior_parameterization="std")
    dreamer = PRESETS["dreamer"]
    own = {**{k: getattr(dreamer, k) for k in dreamer.__dataclass_fields__}, "prior_parameterization": "std"}
    monkeypatch.setitem(PRESETS, "ours", Preset(**own))
    torch.testing.assert_close(given, by_hand)
    assert torch.equal(module(mu, x, mu, std, pm, raw), given)
    assert torch.equal(vaefast.elbo_loss(mu, x, mu, std, pm, raw, preset="ours"), given)
    assert "prior_parameterization" in repr(module) and "prior_parameterization" not in repr(vaefast.ELBOLoss())


def test_it_compiles_in_one_graph(native: str) -> None:
    q = values(torch.float32)

    def step(*q: Tensor) -> Tensor:
        return vaefast.gaussian_kl(*q, parameterization="softplus", prior_parameterization="softplus", free_bits=0.1)

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*q), step(*q))


def test_double_backward(native: str) -> None:
    q = values()
    torch.autograd.gradgradcheck(lambda *q: vaefast.gaussian_kl(*q, prior_parameterization="std"), q)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prior_parameterization": "sigma"}, ValueError, "prior_parameterization must be one of .*'sigma'"),
        ({"prior_parameterization": None}, TypeError, "prior_parameterization must be a str"),
        ({"prior_logvar": torch.ones(5, 3, dtype=torch.int64)}, TypeError, "prior_logvar.*int64"),
        ({"prior_logvar": torch.ones(2)}, ValueError, r"prior_logvar.*\(2,\).*\(5, 3\)"),
        ({"prior_logvar": True}, TypeError, "prior_logvar.*bool"),
        ({"prior_logvar": torch.ones(5, 3, device="meta")}, ValueError, "prior_logvar is on meta"),
    ],
)
def test_errors(face: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    q = dict(zip(("mu", "logvar", "prior_mu", "prior_logvar"), values(torch.float32)))
    given = {**q, "prior_parameterization": "std", **change}
    for call in (face.gaussian_kl, face.sample_with_kl, lambda **o: face.elbo_loss(q["mu"], torch.ones(5, 3), **o)):
        with pytest.raises(error, match=message):
            call(**given)
