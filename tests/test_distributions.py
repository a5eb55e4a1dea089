"""vaefast.distributions.Normal against torch.distributions.Normal, whose place it takes."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import FLOATING, assert_within, generator, gradients
from torch import Tensor
from torch import distributions as D
from torch.distributions import kl_divergence
from torch.func import grad, vmap

import vaefast
from vaefast.distributions import Normal

GIVEN = ("scale", "logvar", "log_std")
STD: dict[str, Callable[[Tensor], Tensor]] = {
    "scale": lambda raw: raw,
    "logvar": lambda raw: torch.exp(0.5 * raw),
    "log_std": torch.exp,
}


def tensor(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(device, dtype)


def pair(
    given: str, shape: tuple[int, ...] = (4, 6), seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Normal, D.Normal, list[Tensor]]:
    """Ours, torch's of the same leaves in float64, and the leaves."""
    loc, raw = tensor(shape, seed, dtype, device), tensor(shape, seed + 1, dtype, device)
    leaves = [loc.requires_grad_(), (raw.exp() if given == "scale" else raw).requires_grad_()]
    theirs = D.Normal(leaves[0].double(), STD[given](leaves[1].double()))
    return Normal(leaves[0], **{given: leaves[1]}), theirs, leaves


def assert_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor], tolerance: float = 1e-13) -> None:
    """Values, and gradients that are None for the same leaves. Graphs stay, as torch's share what makes their scale."""
    assert_within(ours, theirs, tolerance)
    upstream = tensor(tuple(ours.shape), 5, ours.dtype, ours.device.type)
    found = [torch.autograd.grad(out, leaves, upstream, retain_graph=True, allow_unused=True) for out in (ours, theirs)]
    for g, e in zip(*found):
        assert (g is None) == (e is None)
        if g is not None:
            assert_within(g, e, tolerance)


@pytest.mark.parametrize("given", GIVEN)
def test_moments_entropy_cdf(given: str, device: str) -> None:
    ours, theirs, leaves = pair(given, device=device)
    assert isinstance(ours, D.Normal) and ours.has_rsample and ours.support is D.constraints.real
    assert ours.batch_shape == theirs.batch_shape and ours.event_shape == ()
    for name in ("mean", "mode", "stddev", "variance", "scale"):
        assert_within(getattr(ours, name), getattr(theirs, name), 1e-13)
    assert_within(ours.log_std, theirs.scale.log(), 1e-13)
    assert_within(ours.logvar, 2 * theirs.scale.log(), 1e-13)
    assert getattr(ours, given) is ours.__dict__[given]
    x = tensor((4, 6), 7, device=device)
    assert_same(ours.entropy(), theirs.entropy(), leaves)
    assert_same(ours.cdf(x), theirs.cdf(x), leaves)
    assert_same(ours.icdf(x.sigmoid()), theirs.icdf(x.sigmoid()), leaves)


VALUES = [(4, 6), (5, 4, 6), (2, 5, 4, 6), (6,), (4, 1), (), (3, 1, 6)]


@pytest.mark.parametrize("trained", ["parameters", "both", "value", "loc and value", "scale and value"])
@pytest.mark.parametrize("shape", VALUES)
@pytest.mark.parametrize("given", GIVEN)
def test_log_prob(backend: str, device: str, given: str, shape: tuple[int, ...], trained: str) -> None:
    """Sample dimensions in front, values that broadcast, and a gradient in whatever is trained."""
    _, _, (loc, raw) = pair(given, device=device)
    x = tensor(shape, 9, device=device)
    if trained != "parameters":
        x.requires_grad_()
    loc.requires_grad_("value" not in trained or "loc" in trained)
    raw.requires_grad_("value" not in trained or "scale" in trained)
    leaves = [t for t in (loc, raw, x) if t.requires_grad]
    ours = Normal(loc, **{given: raw})
    theirs = D.Normal(loc, STD[given](raw))
    assert_same(ours.log_prob(x), theirs.log_prob(x), leaves)


def test_log_prob_of_other_values() -> None:
    """What the kernels do not take goes to torch: numbers, whole numbers; and a shape that does not fit says so."""
    ours, theirs, _ = pair("scale")
    theirs = D.Normal(theirs.loc, theirs.scale, validate_args=False)
    assert_within(ours.log_prob(0.5), theirs.log_prob(0.5), 0)  # type: ignore[arg-type]
    assert_within(ours.log_prob(torch.tensor(2)), theirs.log_prob(torch.tensor(2)), 0)
    whole = Normal(torch.tensor(1), torch.tensor(2))
    assert_within(whole.log_prob(torch.tensor(2.0)), D.Normal(1, 2).log_prob(torch.tensor(2.0)), 1e-6)
    with pytest.raises(RuntimeError, match="size"):
        ours.log_prob(torch.zeros(5))


@pytest.mark.parametrize("given", GIVEN)
def test_gradcheck(backend: str, given: str) -> None:
    _, _, (loc, raw) = pair(given, (3, 2))
    x = tensor((2, 3, 2), 9).requires_grad_()

    def f(loc: Tensor, raw: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        q = Normal(loc, **{given: raw})
        return q.rsample((2,)), q.log_prob(x), kl_divergence(q, Normal(x, logvar=0.3)), q.entropy()

    assert torch.autograd.gradcheck(f, (loc, raw, x))
    assert torch.autograd.gradgradcheck(f, (loc, raw, x))


KINDS: dict[str, Callable[..., D.Normal]] = {
    "torch": lambda loc, std: D.Normal(loc, std),
    "scale": lambda loc, std: Normal(loc, std),
    "logvar": lambda loc, std: Normal(loc, logvar=2 * std.log()),
    "log_std": lambda loc, std: Normal(loc, log_std=std.log()),
}
SHAPES = [((4, 6), (4, 6)), ((4, 6), (6,)), ((6,), (4, 6)), ((4, 1), (1, 6)), ((), (3,)), ((3,), ()), ((), ())]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(("p", "q"), [k for k in itertools.product(KINDS, KINDS) if k != ("torch", "torch")])
def test_kl(backend: str, device: str, p: str, q: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    leaves = [tensor(shape, k, device=device) for k, shape in enumerate([shapes[0]] * 2 + [shapes[1]] * 2)]
    leaves = [(t.exp() if k % 2 else t).requires_grad_() for k, t in enumerate(leaves)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an ambiguous pair of types warns
        ours = kl_divergence(KINDS[p](*leaves[:2]), KINDS[q](*leaves[2:]))
    theirs = kl_divergence(D.Normal(*leaves[:2]), D.Normal(*leaves[2:]))
    assert_same(ours, theirs, leaves, 1e-12)


def test_kl_does_not_cancel(backend: str) -> None:
    mu = torch.tensor([1e-5])
    kl = kl_divergence(Normal(mu, logvar=torch.zeros(1)), D.Normal(0.0, 1.0))
    assert abs(kl.item() / 5e-11 - 1) < 1e-6


def test_kl_to_other_families() -> None:
    ours, theirs, _ = pair("logvar")
    for other in (D.Laplace(0.0, 1.0), D.Uniform(-100.0, 100.0), D.Gumbel(0.0, 1.0)):
        assert_within(kl_divergence(ours, other), kl_divergence(theirs, other), 1e-12)
    assert_within(kl_divergence(D.Laplace(0.0, 1.0), ours), kl_divergence(D.Laplace(0.0, 1.0), theirs), 1e-12)


@pytest.mark.parametrize("given", GIVEN)
def test_samples_are_reparameterizes(backend: str, device: str, given: str) -> None:
    ours, _, leaves = pair(given, dtype=torch.float32, device=device)
    names = {"scale": "std", "logvar": "logvar", "log_std": "log_std"}
    for shape in ((), (5,), (2, 3)):
        torch.manual_seed(1)
        z = ours.rsample(shape)
        torch.manual_seed(1)
        full = [leaf.expand(*shape, 4, 6) for leaf in leaves]
        expected = vaefast.reparameterize(*full, parameterization=names[given])
        assert torch.equal(z, expected) and z.shape == (*shape, 4, 6)
        for g, e in zip(gradients(z, leaves), gradients(expected, leaves)):
            assert torch.equal(g, e)
        torch.manual_seed(1)
        drawn = ours.sample(shape)
        assert torch.equal(drawn, z) and not drawn.requires_grad
    assert not torch.equal(ours.rsample(), ours.rsample())
    assert ours.rsample([2]).shape == (2, 4, 6)


def test_samples_have_the_distribution(backend: str) -> None:
    z = Normal(3.0, log_std=-1.0).sample((200_000,))
    assert abs(z.mean().item() - 3.0) < 0.004 and abs(z.std().item() - 0.36788) < 0.003


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("dtype", FLOATING)
def test_dtypes(backend: str, device: str, dtype: torch.dtype, given: str) -> None:
    """Results have the dtypes of torch's, and a half's errors are no more than twice what torch makes in it."""
    ours, exact, leaves = pair(given, (64, 8), dtype=dtype, device=device)
    plain = D.Normal(leaves[0], STD[given](leaves[1]))
    other, exact_other, more = pair("scale", (64, 8), 4, dtype, device)
    for value_dtype in (dtype, torch.float32):
        x = tensor((64, 8), 9, value_dtype, device).requires_grad_()
        cases = [
            (ours.rsample(), plain.rsample(), None),
            (ours.entropy(), plain.entropy(), exact.entropy()),
            (ours.log_prob(x.detach()), plain.log_prob(x.detach()), exact.log_prob(x.double())),
            (ours.log_prob(x), plain.log_prob(x), exact.log_prob(x.double())),
            (kl_divergence(ours, other), kl_divergence(plain, D.Normal(*more)), kl_divergence(exact, exact_other)),
        ]
        for got, theirs, true in cases:
            assert got.dtype == theirs.dtype and got.shape == theirs.shape
            if true is not None:
                error, allowed = ((t.double() - true).abs().max().item() for t in (got, theirs))
                assert error <= 2 * allowed + 2e-6 * true.abs().max().item()


def test_mixed_dtypes() -> None:
    """As torch promotes: 0-d tensors do not make others wider."""
    half = torch.zeros(3, dtype=torch.bfloat16)
    for loc, scale in ((half, torch.ones(3)), (torch.zeros(3), half + 1), (torch.zeros(3), torch.ones(3).double())):
        ours, theirs = Normal(loc, scale), D.Normal(loc, scale)
        assert ours.rsample().dtype == theirs.rsample().dtype
        x = torch.tensor(0.3, dtype=torch.float64)
        assert ours.log_prob(x).dtype == theirs.log_prob(x).dtype
        wide = D.Normal(x, 1.0)
        assert kl_divergence(ours, wide).dtype == kl_divergence(theirs, wide).dtype


def test_numbers() -> None:
    for ours, theirs in ((Normal(0, 2), D.Normal(0, 2)), (Normal(0.0, log_std=0.0), D.Normal(0.0, 1.0))):
        assert ours.batch_shape == () and ours.rsample().shape == () and ours.sample((3,)).shape == (3,)
        assert ours.rsample().dtype == torch.get_default_dtype()
        assert_within(ours.log_prob(torch.tensor(0.7)), theirs.log_prob(torch.tensor(0.7)), 1e-6)
    assert Normal(torch.zeros(3, dtype=torch.float64), logvar=0.0).scale.dtype == torch.float64
    assert Normal(0.0, logvar=torch.zeros(2, 1)).batch_shape == (2, 1)
    assert Normal(torch.zeros(0, 3), logvar=0.0).rsample().shape == (0, 3)


def test_one_scale_exactly() -> None:
    for scales in ({}, {"scale": 1.0, "logvar": 0.0}, {"logvar": 0.0, "log_std": 0.0}):
        with pytest.raises(TypeError, match="exactly one of scale, logvar= and log_std="):
            Normal(0.0, **scales)
    with pytest.raises(ValueError, match="must all be instances of"):
        Normal("0", 1.0)  # type: ignore[arg-type]


def test_nothing_is_validated_unless_asked(backend: str) -> None:
    """A check would wait for the device: NaN and a negative scale pass as numbers do."""
    nan = torch.full((3,), torch.nan)
    q = Normal(nan, torch.full((3,), -1.0))
    assert q.rsample().isnan().all() and q.log_prob(nan).isnan().all()
    assert kl_divergence(q, D.Normal(0.0, 1.0)).isnan().all() and q.entropy().isnan().all()
    for scales in ({"scale": -1.0}, {"logvar": torch.nan}, {"log_std": torch.nan}):
        with pytest.raises(ValueError, match="constraint"):
            Normal(0.0, **scales, validate_args=True)
    checked = Normal(0.0, logvar=0.0, validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        checked.expand((3,)).log_prob(nan)


@pytest.mark.parametrize("given", GIVEN)
def test_expand_and_independent(given: str) -> None:
    ours, theirs, leaves = pair(given, (4, 1))
    wide, expected = ours.expand((3, 4, 6)), theirs.expand((3, 4, 6))
    assert type(wide) is Normal and wide.batch_shape == (3, 4, 6) and wide.rsample((2,)).shape == (2, 3, 4, 6)
    assert wide.loc.data_ptr() == ours.loc.data_ptr()
    x = tensor((3, 4, 6), 9)
    assert_same(wide.log_prob(x), expected.log_prob(x), leaves)
    events, expected_events = D.Independent(wide, 2), D.Independent(expected, 2)
    assert events.batch_shape == (3,) and events.event_shape == (4, 6)
    unit = D.Independent(D.Normal(torch.zeros(4, 6).double(), torch.ones(4, 6).double()), 2)
    for other in (unit, D.Independent(Normal(torch.zeros(4, 6).double(), logvar=0.0), 2)):
        assert_same(kl_divergence(events, other), kl_divergence(expected_events, unit), leaves)
    assert_same(events.log_prob(x), expected_events.log_prob(x), leaves)
    assert_same(events.entropy(), expected_events.entropy(), leaves)
    assert events.expand((5, 3)).rsample().shape == (5, 3, 4, 6)
    assert wide.to_event(1).event_shape == (6,) and wide.to_event().event_shape == (3, 4, 6)


def test_transforms_and_mixtures() -> None:
    ours, theirs, leaves = pair("logvar")
    x = tensor((4, 6), 9).exp()
    transformed = D.TransformedDistribution(ours, [D.ExpTransform()])
    log_normal = D.LogNormal(theirs.loc, theirs.scale)
    assert_same(transformed.log_prob(x), log_normal.log_prob(x), leaves)
    assert transformed.rsample((2,)).shape == (2, 4, 6) and (transformed.rsample() > 0).all()
    assert_same(kl_divergence(transformed, transformed.expand((4, 6))), torch.zeros_like(x) * sum(leaves), leaves)
    logits = D.Categorical(logits=tensor((4, 6), 8))
    mixtures = [D.MixtureSameFamily(logits, d) for d in (ours, theirs)]
    assert_same(mixtures[0].log_prob(x[:, 0]), mixtures[1].log_prob(x[:, 0]), leaves)
    assert mixtures[0].sample((2,)).shape == (2, 4)


def test_pickle_and_deepcopy() -> None:
    for given, again in itertools.product(GIVEN, (copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q)))):
        q, _, leaves = pair(given)
        twin = again(q)
        assert type(twin) is Normal and repr(twin) == repr(
            q
        ) == f"Normal(loc: {leaves[0].shape}, {given}: (4, 6))".replace("(4, 6)", str(leaves[1].shape))
        assert torch.equal(twin.scale, q.scale) and torch.equal(twin.log_prob(q.mean), q.log_prob(q.mean))


def test_outlives_a_step(backend: str) -> None:
    """Like torch's, made once of parameters, it follows them and can be differentiated at every step."""
    loc, logvar = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    prior, q = Normal(loc, logvar=logvar), Normal(torch.ones(3), 2.0)
    optimizer = torch.optim.SGD([loc, logvar], lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = kl_divergence(q, prior).sum() + prior.scale.sum() + prior.entropy().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert torch.equal(prior.scale, torch.exp(0.5 * logvar))


def test_torch_func_and_tracing() -> None:
    loc, logvar, x = (tensor((4, 6), k) for k in range(3))

    def loss(loc: Tensor, logvar: Tensor, x: Tensor) -> Tensor:
        q = Normal(loc, logvar=logvar)
        return kl_divergence(q, Normal(0.0, 1.0)).sum() - q.log_prob(x).sum()

    per_sample = vmap(grad(loss, argnums=(0, 1, 2)))(loc, logvar, x)
    leaves = [t.clone().requires_grad_() for t in (loc, logvar, x)]
    for g, e in zip(per_sample, torch.autograd.grad(loss(*leaves), leaves)):
        assert_within(g, e, 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated
        traced = torch.jit.trace(lambda m: Normal(m, logvar=m).rsample(), loc, check_trace=False)
    assert not torch.equal(traced(loc), traced(loc))


def test_compiled(native: str) -> None:
    torch._dynamo.reset()

    def f(loc: Tensor, raw: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        q, p = Normal(loc, logvar=raw), D.Normal(torch.zeros_like(loc), torch.ones_like(loc), validate_args=False)
        return q.rsample((2,)), q.log_prob(x), kl_divergence(q, p), q.entropy(), q.scale

    inputs = [tensor((4, 6), k, torch.float32, native).requires_grad_() for k in range(3)]
    out, true = torch.compile(f, fullgraph=True, backend="aot_eager")(*inputs), f(*inputs)
    assert out[0].shape == (2, 4, 6) and not torch.equal(out[0][0], out[0][1])
    for a, e in zip(out[1:], true[1:]):
        assert_within(a, e, 2e-6)
    for a, e in zip(gradients(out[1:], inputs), gradients(true[1:], inputs)):
        assert_within(a, e, 2e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("given", GIVEN)
def test_a_compiled_density_is_operators_that_fuse(given: str, native: str) -> None:
    targets: list[str] = []

    def backend(module: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module

    _, theirs, (loc, raw) = pair(given)
    value = tensor((4, 6), 5)
    compiled = torch.compile(lambda m, r, x: Normal(m, **{given: r}).log_prob(x), fullgraph=True, backend=backend)
    found = compiled(loc, raw, value)
    assert targets and not any("vaefast" in target for target in targets)
    torch.testing.assert_close(found, theirs.log_prob(value))
    for ours, other in zip(gradients(found, (loc, raw)), gradients(theirs.log_prob(value), (loc, raw))):
        torch.testing.assert_close(ours, other)


def test_what_backward_keeps(native: str) -> None:
    """Samples: neither noise nor a scale of the sample's size; K samples no more than one."""
    kept: list[int] = []
    q = Normal(torch.zeros(64, 64, device=native, requires_grad=True), logvar=torch.zeros(64, 64, device=native))

    def note(t: Tensor) -> Any:
        kept.append(t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        q.rsample((8,))
    assert kept and max(kept) <= 64 * 64 * 4


def test_is_imported_when_asked_for() -> None:
    check = """
import sys, torch, vaefast
from torch.distributions.kl import _KL_REGISTRY
before = len(_KL_REGISTRY)
assert not {"vaefast.distributions", "vaefast.integrations"} & set(sys.modules)
vaefast.distributions.Normal, vaefast.integrations.pyro.enable
assert len(_KL_REGISTRY) == before + 3
assert not {"pyro", "scvi", "diffusers"} & set(sys.modules)
try:
    vaefast.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    subprocess.run([sys.executable, "-c", check], check=True)
