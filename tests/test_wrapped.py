"""Tensors that are not plain: made of others (DTensors, jagged ones, wrappers), which PyTorch computes with, as it does
without an integration; and of layouts that neither covers, which an error names."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from inputs import LIKELIHOOD_CASES, assert_within, training
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributions import Independent, Normal, kl_divergence
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map

import vaefast
from vaefast.integrations import torch_distributions
from vaefast.reference import LIKELIHOODS

OFFSETS = torch.tensor([0, 2, 5])  # two samples, of two and of three rows


class Wrapper(torch.Tensor):
    """Another tensor within, of which PyTorch's own operators know; every other is refused."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace != "aten":
            raise NotImplementedError(f"{op} of {cls.__name__}")
        args, kwargs = tree_map(lambda t: t.inner if isinstance(t, Wrapper) else t, (args, kwargs or {}))
        return tree_map(lambda t: Wrapper(t) if isinstance(t, Tensor) else t, op(*args, **kwargs))


@pytest.fixture(scope="module", autouse=True)
def mesh() -> Iterator[Any]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    KINDS["sharded"] = (lambda t: distribute_tensor(t, made, [Shard(0)]), lambda t: t.full_tensor())
    KINDS["sharded by columns"] = (
        lambda t: distribute_tensor(t, made, [Shard(t.dim() - 1)]),
        lambda t: t.full_tensor(),
    )
    KINDS["replicated"] = (lambda t: distribute_tensor(t, made, [Replicate()]), lambda t: t.full_tensor())
    made = torch.distributed.init_device_mesh("cpu", (1,))
    yield made
    torch.distributed.destroy_process_group()


# from a tensor [5, 4], and back
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sharded": None,
    "sharded by columns": None,
    "replicated": None,
    "wrapper": (Wrapper, lambda t: t.inner),
    "two": (lambda t: TwoTensor(t, t.clone()), lambda t: t.a),
    "jagged": (lambda t: torch.nested.nested_tensor_from_jagged(t, OFFSETS), lambda t: t.values()),
}  # type: ignore[assignment]
EVERY = pytest.mark.parametrize("kind", list(KINDS))

x, mu, raw, pm, eps = (torch.randn(5, 4, generator=torch.Generator().manual_seed(k)) for k in range(5))
CALLS: dict[str, Callable[..., Any]] = {
    "kl": lambda w: vaefast.gaussian_kl(w(mu), w(raw), reduction="none"),
    "kl, sum": lambda w: vaefast.gaussian_kl(w(mu), w(raw), reduction="sum"),
    "kl, mean": lambda w: vaefast.gaussian_kl(w(mu), w(raw), reduction="mean"),
    "kl with a prior": lambda w: vaefast.gaussian_kl(w(mu), w(raw), w(pm), w(eps), reduction="none"),
    "kl with numbers": lambda w: vaefast.gaussian_kl(w(mu), w(raw), 0.5, -0.5, reduction="none"),
    "kl of a std": lambda w: vaefast.gaussian_kl(w(mu), w(raw), parameterization="softplus", reduction="none"),
    "kl, free bits": lambda w: vaefast.gaussian_kl(w(mu), w(raw), free_bits=0.2, reduction="sum"),
    "kl, balance": lambda w: vaefast.gaussian_kl(w(mu), w(raw), w(pm), None, balance=0.3, reduction="sum"),
    "kl, symmetric": lambda w: vaefast.gaussian_kl(w(mu), w(raw), symmetric=True, reduction="none"),
    "sample": lambda w: vaefast.reparameterize(w(mu), w(raw), eps=w(eps)),
    "sample with kl": lambda w: vaefast.sample_with_kl(w(mu), w(raw), eps=w(eps), reduction="none"),
    "nll": lambda w: vaefast.reconstruction_loss(w(mu), w(x.sigmoid()), reduction="none"),
    "nll of two": lambda w: vaefast.reconstruction_loss((w(mu), w(raw)), w(x), likelihood="gaussian", reduction="sum"),
    "nll with a number": lambda w: vaefast.reconstruction_loss((w(mu), 1), w(x), likelihood="laplace", reduction="sum"),
    "weighted nll": lambda w: vaefast.reconstruction_loss(w(mu), w(x.sigmoid()), weight=w(pm.abs()), reduction="none"),
    "elbo": lambda w: vaefast.elbo_loss(w(mu), w(x.sigmoid()), w(mu), w(raw), reduction="sum", beta=0.5),
    "elbo's terms": lambda w: tuple(vaefast.elbo_terms(w(mu), w(x.sigmoid()), w(mu), w(raw), reduction="sum")),
    "multi": lambda w: vaefast.multi_tensor_gaussian_kl([w(mu), w(pm)], [w(raw), w(eps)], reduction="sum"),
    "optimal": lambda w: vaefast.reconstruction_loss(w(mu), w(x), likelihood="gaussian_optimal", reduction="sum"),
}  # fmt: skip


def outcome(
    call: Callable[..., Any], wrap: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """The results and mu's and raw's gradients, as plain tensors."""
    leaves = {id(t): wrap(t.clone()).requires_grad_() for t in (mu, raw)}
    out = call(lambda t: leaves[id(t)] if id(t) in leaves else wrap(t))
    out = out if isinstance(out, tuple) else (out,)
    total = out[0].sum() if len(out) == 1 else out[0].sum() + out[1].sum()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [back(t) if type(t) is not Tensor else t for t in (*out, *grads) if t is not None]


@EVERY
@pytest.mark.parametrize("name", list(CALLS))
def test_what_kernels_do_not_see_through_is_pytorchs(kind: str, name: str) -> None:
    wrap, back = KINDS[kind]
    expected = outcome(CALLS[name], lambda t: t, lambda t: t)
    found = outcome(CALLS[name], wrap, back)
    assert len(found) == len(expected)
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e)


OPTIMAL = vaefast.Likelihood("gaussian_optimal", per_sample=True)
# by the reduction
REDUCED: dict[str, Callable[..., Tensor]] = {
    "kl": lambda w, r: vaefast.gaussian_kl(w(mu), w(raw), reduction=r),
    "kl with a prior": lambda w, r: vaefast.gaussian_kl(w(mu), w(raw), w(pm), w(eps), reduction=r),
    "weighted kl": lambda w, r: vaefast.gaussian_kl(w(mu), w(raw), weight=w(pm.abs()), reduction=r),
    "free bits": lambda w, r: vaefast.gaussian_kl(w(mu), w(raw), free_bits=0.2, reduction=r),
    "nll": lambda w, r: vaefast.reconstruction_loss(w(mu), w(x.sigmoid()), reduction=r),
    "masked nll": lambda w, r: vaefast.reconstruction_loss(w(mu), w(x.sigmoid()), weight=w(pm > 0), reduction=r),
    "nll of two": lambda w, r: vaefast.reconstruction_loss((w(mu), w(raw)), w(x), likelihood="gaussian", reduction=r),
    "optimal": lambda w, r: vaefast.reconstruction_loss(w(mu), w(x), likelihood=OPTIMAL, reduction=r),
    "weighted optimal": lambda w, r: vaefast.reconstruction_loss(
        w(mu), w(x), likelihood=OPTIMAL, weight=w(pm.abs()), reduction=r
    ),
    "elbo": lambda w, r: vaefast.elbo_loss(w(mu), w(x.sigmoid()), w(mu), w(raw), reduction=r),
    "module": lambda w, r: vaefast.ELBOLoss(OPTIMAL, reduction=r)(w(mu), w(x), w(mu), w(raw)),
}  # fmt: skip


@EVERY
@pytest.mark.parametrize("name", list(REDUCED))
def test_samples(kind: str, name: str) -> None:
    """Those of a jagged tensor are of several rows each."""
    wrap, back = KINDS[kind]
    call = REDUCED[name]
    rows = [[k] for k in range(5)] if kind != "jagged" else [[0, 1], [2, 3, 4]]
    each = torch.stack([call(lambda t: t[part][None], "sum") for part in rows])  # noqa: B023 (called at once)
    for reduction, expected in (("per_sample", each), ("batchmean", each.mean()), ("sum", each.sum())):
        found = call(wrap, reduction)
        torch.testing.assert_close(back(found) if type(found) is not Tensor else found, expected)


@EVERY
@pytest.mark.parametrize(("likelihood", "count"), [c for c in LIKELIHOOD_CASES if not LIKELIHOODS[c[0]].planes])
def test_likelihoods(kind: str, likelihood: str, count: int) -> None:
    wrap, back = KINDS[kind]
    data = training(likelihood, count, (5, 4))
    call = vaefast.reconstruction_loss
    found = call([wrap(p) for p in data.recon], wrap(data.target), likelihood=likelihood, reduction="none")
    assert_within(back(found), call(data.recon, data.target, likelihood=likelihood, reduction="none"), 2e-6)


@EVERY
@pytest.mark.parametrize("noise", ["philox", "torch"])
def test_draws(kind: str, noise: str) -> None:
    """PyTorch's own noise, whichever is asked for, as such tensors have it; fresh in every call."""
    wrap, back = KINDS[kind]
    loc, log_std = torch.full((5, 4), 3.0), torch.full((5, 4), -20.0)
    for draw in (
        lambda m, r: vaefast.reparameterize(m, r, noise=noise, parameterization="log_std"),
        lambda m, r: vaefast.sample_with_kl(m, r, noise=noise, parameterization="log_std", reduction="sum")[0],
        lambda m, r: vaefast.multi_tensor_sample_with_kl([m], [r], parameterization="log_std")[0][0],
        lambda m, r: vaefast.distributions.Normal(m, log_std=r).rsample(),
        lambda m, r: vaefast.distributions.Normal(m, r.exp()).sample(),
    ):
        z = draw(wrap(loc), wrap(log_std))
        assert type(z) is type(wrap(loc))
        torch.testing.assert_close(back(z), loc)
        wide = [back(draw(wrap(torch.zeros(5, 4)), wrap(torch.zeros(5, 4)))) for _ in range(100)]
        assert 0.9 < torch.stack(wide).std() < 1.1
        assert not torch.equal(wide[0], wide[1])


@EVERY
def test_one_of_many_may_be_such(kind: str) -> None:
    """A later argument alone: as the reference does it, an error among that."""
    wrap, back = KINDS[kind]
    calls: list[Callable[[], Tensor]] = [
        lambda: vaefast.gaussian_kl(mu, raw, wrap(pm), reduction="sum"),
        lambda: vaefast.gaussian_kl(mu, wrap(raw), reduction="sum"),
        lambda: vaefast.reparameterize(mu, wrap(raw), eps=eps).sum(),
        lambda: vaefast.reconstruction_loss(mu, wrap(x.sigmoid()), reduction="sum"),
        lambda: vaefast.elbo_loss(mu, x.sigmoid(), mu, wrap(raw), reduction="sum"),
        lambda: vaefast.multi_tensor_gaussian_kl([mu], [wrap(raw)], reduction="sum"),
    ]
    for call in calls:
        try:
            with vaefast.use_backend("reference"):
                expected: Any = call()
        except (RuntimeError, ValueError) as error:
            with pytest.raises(type(error)):
                call()
            continue
        found = call()
        assert type(found) is type(expected)
        torch.testing.assert_close(*(back(t) if type(t) is not Tensor else t for t in (found, expected)))


def test_the_native_back_end_says_why() -> None:
    with vaefast.use_backend("native"), pytest.raises(RuntimeError, match="a Wrapper is made of other tensors"):
        vaefast.gaussian_kl(Wrapper(mu), Wrapper(raw))


# what programs do with a Normal, of wrapped parameters
PROGRAMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "log_prob": lambda m, s, v: Normal(m, s, validate_args=False).log_prob(v),
    "validated log_prob": lambda m, s, v: Normal(m, s).log_prob(v),
    "sample": lambda m, s, v: 0 * (v + Normal(m, s, validate_args=False).sample()),
    "rsample": lambda m, s, v: 0 * (v + Normal(m, s, validate_args=False).rsample()),
    "kl": lambda m, s, v: kl_divergence(Normal(m, s, validate_args=False), Normal(v, s, validate_args=False)),
    "kl to numbers": lambda m, s, v: kl_divergence(Normal(m, s, validate_args=False), Normal(0.0, 1.0)),
    "independent": lambda m, s, v: Independent(Normal(m, s, validate_args=False), 1).log_prob(v),
    "entropy": lambda m, s, v: Normal(m, s, validate_args=False).entropy(),
    "ours": lambda m, s, v: vaefast.distributions.Normal(m, s).log_prob(v),
    "ours' kl": lambda m, s, v: kl_divergence(vaefast.distributions.Normal(m, s), Normal(v, s, validate_args=False)),
}


@EVERY
@pytest.mark.parametrize("program", list(PROGRAMS))
def test_integrations_leave_programs_working(kind: str, program: str) -> None:
    """What gave a value gives it still; what raised may."""
    wrap, back = KINDS[kind]
    leaves = [wrap(t).requires_grad_() for t in (mu, raw.exp(), x)]

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        out = PROGRAMS[program](*leaves)
        grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
        return [back(t) for t in (out, *grads) if t is not None]

    try:
        expected = run()
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        assert kind not in ("wrapper", "two")
        return
    for noise in ("philox", "torch"):
        with torch_distributions.enabled(noise=noise):
            found = run()
        assert len(found) == len(expected)
        for f, e in zip(found, expected):
            torch.testing.assert_close(f, e)


# layouts that neither covers, and what is said of them
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "coo": (lambda t: t.to_sparse(), "torch.sparse_coo", "to_dense()"),
    "csr": (lambda t: t.to_sparse_csr(), "torch.sparse_csr", "to_dense()"),
    "csc": (lambda t: t.to_sparse_csc(), "torch.sparse_csc", "to_dense()"),
    "bsr": (lambda t: t.to_sparse_bsr((1, 1)), "torch.sparse_bsr", "to_dense()"),
    "mkldnn": (lambda t: t.to_mkldnn(), "torch._mkldnn", "to_dense()"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantized", "dequantize()"),
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), "nested", "layout=torch.jagged"),
}
ARGUMENTS: dict[str, Callable[[Any, Callable[[Tensor], Tensor]], Any]] = {
    "mu": lambda face, w: face.gaussian_kl(w(mu), raw),
    "logvar": lambda face, w: face.gaussian_kl(mu, w(raw)),
    "prior_mu": lambda face, w: face.gaussian_kl(mu, raw, w(pm)),
    "prior_logvar": lambda face, w: face.sample_with_kl(mu, raw, None, w(pm)),
    "mu of a sample": lambda face, w: face.reparameterize(w(mu), raw),
    "logvar of a sample": lambda face, w: face.reparameterize(mu, w(raw)),
    "eps": lambda face, w: face.reparameterize(mu, raw, eps=w(eps)),
    "mu of free bits": lambda face, w: face.gaussian_kl(w(mu), raw, free_bits=0.1),
    "mu of a dimension": lambda face, w: face.kl_per_dim(w(mu), raw),
    "recon": lambda face, w: face.reconstruction_loss(w(mu), x.sigmoid()),
    "target": lambda face, w: face.reconstruction_loss(mu, w(x.sigmoid())),
    "weight": lambda face, w: face.reconstruction_loss(mu, x.sigmoid(), weight=w(pm)),
    "recon[0]": lambda face, w: face.reconstruction_loss((w(mu), raw), x, likelihood="gaussian"),
    "recon's logvar": lambda face, w: face.reconstruction_loss((mu, w(raw)), x, likelihood="gaussian"),
    "recon of an ELBO": lambda face, w: face.elbo_loss(w(mu), x.sigmoid(), mu, raw),
    "target of an ELBO": lambda face, w: face.elbo_loss(mu, w(x.sigmoid()), mu, raw),
    "logvar of an ELBO": lambda face, w: face.elbo_terms(mu, x.sigmoid(), mu, w(raw)),
    "mu of many": lambda face, w: face.multi_tensor_gaussian_kl([w(mu)], [raw]),
    "logvar of many": lambda face, w: face.multi_tensor_sample_with_kl([mu], [w(raw)]),
    "moments": lambda face, w: vaefast.DiagonalGaussian(w(mu)).kl(),
    "sample": lambda face, w: vaefast.DiagonalGaussian(mu).nll(w(x[:, :2])),
    "recon of a mean": lambda face, w: vaefast.likelihood_mean(w(mu)),
    "mu of a monitor": lambda face, w: vaefast.diagnostics.CollapseMonitor().update(w(mu), raw),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("argument", list(ARGUMENTS))
@pytest.mark.filterwarnings("ignore")
def test_other_layouts_are_named(face: Any, layout: str, argument: str) -> None:
    make, name, remedy = LAYOUTS[layout]
    with pytest.raises(TypeError) as caught:
        ARGUMENTS[argument](face, make)
    message = str(caught.value)
    assert len(message) < 300
    assert argument.partition(" of ")[0] in message and name in message and remedy in message


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "wrapper"])  # torch.compile takes what flattens alone
def test_compiled(kind: str) -> None:
    wrap, back = KINDS[kind]
    torch._dynamo.reset()
    compiled = torch.compile(lambda m, r: vaefast.gaussian_kl(m, r, reduction="sum"), backend="aot_eager")
    found = compiled(wrap(mu), wrap(raw))
    expected = vaefast.gaussian_kl(mu, raw, reduction="sum")
    torch.testing.assert_close(back(found) if type(found) is not Tensor else found, expected)
