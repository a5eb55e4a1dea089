"""Unchanged programs of torch.distributions, Pyro, diffusers and scvi-tools, with and without the integration.

With ``noise="torch"`` both draw the same numbers, so that losses can be compared step by step. The packages are
optional: `make test-pypi` installs them and runs what is marked so.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from inputs import assert_within, generator
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Cauchy,
    Independent,
    LogNormal,
    MixtureSameFamily,
    Normal,
    kl,
    kl_divergence,
)

import vaefast
from vaefast import _normal, integrations

ALL = [getattr(integrations, name) for name in integrations.__all__]
METHODS = ("rsample", "sample", "log_prob")


def state() -> tuple[Any, ...]:
    return {**vars(Normal)}, dict(kl._KL_REGISTRY), {**vars(MixtureSameFamily)}


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    before = state()
    yield
    for module in ALL:
        module.disable()
    assert {**vars(Normal)} == before[0]
    assert kl._KL_REGISTRY[Normal, Normal] is before[1][Normal, Normal]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of vaefast's functions was called: that the fused path is taken at all."""
    found: dict[str, int] = {}

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            found[name] = found.get(name, 0) + 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, count)

    for name in ("reparameterize", "gaussian_kl", "reconstruction_loss"):
        counted(vaefast._normal, name)
    for method in ("sample", "kl", "nll"):
        counted(vaefast.DiagonalGaussian, method)
    counted(sys.modules["vaefast.integrations.scvi"], "reconstruction_loss")
    counted(sys.modules["vaefast.integrations.diffusers"], "reparameterize")
    return found


def optional(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed; `make test-pypi` installs it and runs this")


class VAE(nn.Module):
    """As textbooks have it, with torch.distributions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, 8), nn.Linear(4, 12)

    def loss(self, x: Tensor) -> Tensor:
        loc, scale = self.encoder(x).chunk(2, 1)
        q, prior = Normal(loc, nn.functional.softplus(scale)), Normal(0.0, 1.0)
        z = q.rsample()
        likelihood = Independent(Normal(self.decoder(z), torch.tensor(0.5)), 1)
        return (kl_divergence(q, prior).sum(1) - likelihood.log_prob(x)).mean()


def train() -> list[float]:
    torch.manual_seed(0)
    model, x = VAE(), torch.randn(64, 12, generator=generator(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model.loss(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_torch_program(extension: object, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_normal, "FEW_TRAINED", 0)  # few densities would be torch's own
    monkeypatch.setattr(_normal, "FEW", 0)
    plain = train()
    assert not calls
    with integrations.torch_distributions.enabled(noise="torch"):
        fused = train()
    assert calls == {"reparameterize": 20, "gaussian_kl": 20, "reconstruction_loss": 20}
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=0)
    with integrations.torch_distributions.enabled("philox"):
        philox = train()
        with torch.inference_mode():
            assert Normal(0.0, 1.0).expand((3,)).sample((2,)).shape == (2, 3)
    assert philox != fused
    assert abs(sum(philox) / sum(plain) - 1) < 0.05  # other noise
    assert train() == plain


def test_samples_and_what_is_built_of_normals(extension: object) -> None:
    loc, scale = (torch.randn(5, 3, generator=generator(k)).exp().requires_grad_() for k in (0, 1))

    def everything() -> list[Tensor]:
        torch.manual_seed(2)
        q, x = Normal(loc, scale), torch.full((2, 5, 3), 0.7)
        out = [q.rsample((4,)), q.sample((2,)), q.log_prob(x), LogNormal(loc, scale).log_prob(x)]
        out += [kl_divergence(q, Normal(torch.zeros(3), scale[0])), q.expand((2, 5, 3)).rsample(), q.entropy()]
        return [*out, Normal(0.0, 1.0).rsample(), LogNormal(loc, scale).rsample()]

    plain = everything()
    with integrations.torch_distributions.enabled(noise="torch"):
        fused = everything()
    assert fused[0].shape == (4, 5, 3)
    for a, e in zip(fused, plain):
        assert a.dtype == e.dtype and a.requires_grad == e.requires_grad
        assert_within(a, e, 2e-6)
    for a, e in zip(
        *(torch.autograd.grad([o.sum() for o in out if o.requires_grad], [loc, scale]) for out in (fused, plain))
    ):
        assert_within(a, e, 1e-5)


def test_what_the_kernels_do_not_cover_is_torchs(extension: object, calls: dict[str, int]) -> None:
    x = torch.randn(4, 3, generator=generator(0))
    whole = Normal(torch.tensor(1), torch.tensor(2))
    expected = whole.log_prob(x), kl_divergence(whole, whole), Normal(x, 1.0).log_prob(torch.tensor(2))
    integrations.torch_distributions.enable()
    found = whole.log_prob(x), kl_divergence(whole, whole), Normal(x, 1.0).log_prob(torch.tensor(2))
    for a, e in zip(found, expected):
        assert torch.equal(a, e)
    per_row = torch.func.vmap(lambda m: kl_divergence(Normal(m, 1.0, False), Normal(0.0, 1.0)).sum())(x)
    assert_within(per_row, (0.5 * x**2).sum(1), 1e-6)
    assert Normal(x.view(1, 1, 1, 1, 1, 1, 4, 3, 1), 1.0).rsample().shape[-3:] == (4, 3, 1)  # nine dimensions
    with vaefast.use_backend("reference"):
        Normal(x, 1.0).rsample()
    assert not calls
    with pytest.raises(ValueError, match="within the support"):
        Normal(x, 1.0, validate_args=True).log_prob(x / 0 * 0)


def test_compiled_program(extension: object) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = VAE(), torch.randn(64, 12, generator=generator(0))
    Normal.set_default_validate_args(False)
    try:
        with integrations.torch_distributions.enabled():
            values = torch.stack([torch.compile(model.loss, fullgraph=True, backend="aot_eager")(x) for _ in range(2)])
        torch.testing.assert_close(values.mean(), model.loss(x), rtol=0.1, atol=0)
        assert values[0] != values[1]
    finally:
        Normal.set_default_validate_args(__debug__)
        torch._dynamo.reset()


@pytest.mark.parametrize("shape", [(), (5,), (127, 256), (128, 256), (3, 20000)], ids=str)
@pytest.mark.parametrize("sample_shape", [(), (2,), [3, 1]], ids=str)
def test_few_draws_are_the_librarys_own(
    extension: object, shape: tuple[int, ...], sample_shape: Sequence[int], calls: dict[str, int]
) -> None:
    """Numbers, gradients and operators; from a size on, and where Philox is asked for, the kernels draw."""
    loc, scale = torch.randn(shape, requires_grad=True), torch.rand(shape).add(0.5).requires_grad_()

    def draws() -> list[Tensor]:
        torch.manual_seed(3)
        q = Normal(loc, scale)
        z = q.rsample(sample_shape)
        return [z.detach(), q.sample(sample_shape), *torch.autograd.grad(z.sum(), (loc, scale))]

    plain = draws()
    few = plain[0].numel() < integrations.torch_distributions.FEW
    with integrations.torch_distributions.enabled():
        found = draws()
    assert all(torch.equal(a, e) for a, e in zip(found, plain)) == few
    assert calls.get("reparameterize", 0) == (0 if few else 2)
    with integrations.torch_distributions.enabled("philox"):
        draws()
    assert calls["reparameterize"] == (2 if few else 4)


@pytest.mark.parametrize("count", [1, _normal.FEW_TRAINED - 1, _normal.FEW_TRAINED, _normal.FEW])
@pytest.mark.parametrize("trained", [True, False])
def test_few_densities_are_the_librarys_own(
    extension: object, count: int, trained: bool, calls: dict[str, int]
) -> None:
    loc, scale = (torch.rand(count, generator=generator(k)).add(0.5).requires_grad_(trained) for k in (0, 1))
    x = torch.randn(count, generator=generator(2))
    expected = Normal(loc, scale).log_prob(x)
    with integrations.torch_distributions.enabled():
        found = Normal(loc, scale).log_prob(x)
    few = count < (_normal.FEW_TRAINED if trained else _normal.FEW)
    assert calls.get("reconstruction_loss", 0) == (0 if few else 1)
    assert torch.equal(found, expected) or not few
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("prior_shape", [(), (3,), (1, 3), (2, 4, 3)], ids=str)
def test_kls_next_to_the_prior_do_not_cancel(extension: object, prior_shape: tuple[int, ...]) -> None:
    """torch's formula leaves noise of 1e-7 there. Whatever the prior broadcasts to."""
    scale = torch.full((4, 3), 1.0 + 2.0**-20).requires_grad_()
    mu = torch.full((4, 3), 2.0**-12).requires_grad_()
    with integrations.torch_distributions.enabled():
        found = kl_divergence(Normal(mu, scale), Normal(torch.zeros(prior_shape), torch.ones(prior_shape)))
    u = scale.detach().double() - 1
    exact = (u * u + 2 * (u - torch.log1p(u)) + mu.detach().double() ** 2) / 2
    torch.testing.assert_close(found.double(), exact.expand(found.shape), rtol=1e-6, atol=0)
    dmu, dscale = torch.autograd.grad(found.sum(), (mu, scale))
    times = found.numel() / 12
    torch.testing.assert_close(dmu.double(), times * mu.detach().double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(dscale.double(), times * (u + u / (1 + u)), rtol=1e-6, atol=0)


def mixture(dtype: torch.dtype, K: int = 60, D: int = 8, *batch: int) -> tuple[MixtureSameFamily, list[Tensor]]:
    leaves = [torch.randn(*batch, *shape, generator=generator(k)) for k, shape in enumerate([(K,), (K, D), (K, D)])]
    logits, loc, log_scale = (t.to(dtype).requires_grad_() for t in leaves)
    each = Independent(Normal(loc, torch.exp(0.3 * log_scale)), 1)
    return MixtureSameFamily(Categorical(logits=logits), each), [logits, loc, log_scale]


@pytest.fixture
def densities(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of calls of a mixture's density."""
    own, count = integrations.torch_distributions.mixture_log_prob, [0]

    def counted(*args: Tensor) -> Tensor:
        count[0] += 1
        return own(*args)

    monkeypatch.setattr(integrations.torch_distributions, "mixture_log_prob", counted)
    return count


@pytest.mark.parametrize("shape", [(400, 8), (3, 100, 8), (2, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixtures(densities: list[int], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape, generator=generator(9))
    found, expected = [], []
    for into, kind in ((found, dtype), (expected, torch.float64)):
        d, leaves = mixture(kind)
        z = value.to(kind).requires_grad_()
        with integrations.torch_distributions.enabled() if into is found else nullcontext():
            log_p = d.log_prob(z)
        weights = torch.linspace(-1, 1, log_p.numel(), dtype=kind).view(log_p.shape)
        into += [log_p, *torch.autograd.grad((weights * log_p).sum(), [z, *leaves])]
    kernels = "cpu" in vaefast.available_backends()
    assert densities == [int(kernels or value.numel() > 1000)] and found[0].dtype == dtype
    for a, e in zip(found, expected):
        assert_within(a, e, 1e-5 if dtype == torch.float32 else 1e-10)


def test_mixtures_that_are_torchs(densities: list[int]) -> None:
    """One mixture for each sample, half precision, components that are no normals, a wrong size; few values without
    kernels."""
    z = torch.randn(400, 8, generator=generator(9))
    spread = Independent(Cauchy(torch.zeros(60, 8), torch.ones(60, 8)), 1)
    others = [
        (mixture(torch.float32, 60, 8, 400)[0], z),
        (mixture(torch.bfloat16)[0], z.bfloat16()),
        (mixture(torch.float64)[0], z),
        (MixtureSameFamily(Categorical(logits=torch.zeros(60)), spread), z),
    ]
    plain, few = [d.log_prob(value) for d, value in others], mixture(torch.float32)[0].log_prob(z[:2])
    with integrations.torch_distributions.enabled():
        for (d, value), expected in zip(others, plain):
            torch.testing.assert_close(d.log_prob(value), expected)
        with vaefast.use_backend("reference"):
            torch.testing.assert_close(mixture(torch.float32)[0].log_prob(z[:2]), few)
        with pytest.raises(ValueError, match="support"):
            mixture(torch.float32)[0].log_prob(torch.full((400, 8), math.nan))
        with pytest.raises(ValueError, match="event_shape"):
            mixture(torch.float32)[0].log_prob(z[:, :7])
    assert densities == [0]


def test_on_and_off(extension: object) -> None:
    module, before = integrations.torch_distributions, state()
    module.disable()
    assert state() == before
    module.enable()
    module.enable()
    on = state()
    assert on != before and all(on[0][name] is not before[0][name] for name in METHODS)
    with module.enabled(noise="torch"):
        assert module.integration.noise == "torch"
    assert state() != before and module.integration.noise is None
    module.disable()
    assert state() == before
    with pytest.raises(ZeroDivisionError), module.enabled():
        1 / 0  # noqa: B018
    assert state() == before
    with pytest.raises(ValueError, match="noise must be one of"):
        module.enable(noise="white")
    assert state() == before


def test_held_by_two(extension: object) -> None:
    """What another integration rests on stays as long as it does, whatever the order."""
    held, before = integrations.torch_distributions.integration, state()
    for order in (("a", "b"), ("b", "a")):
        held.hold("a", "philox")
        held.hold("b", "torch")
        assert held.noise == "torch"
        held.release(order[0])
        assert state() != before
        held.release(order[1])
        assert state() == before


@pytest.mark.parametrize(
    ("module", "package", "pip"),
    [("pyro", "pyro", "pyro-ppl"), ("diffusers", "diffusers", "diffusers"), ("scvi", "scvi", "scvi-tools")],
)
def test_a_missing_package_is_named(module: str, package: str, pip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state()
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)

    class Nowhere:
        @staticmethod
        def find_spec(name: str, *args: object) -> None:
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=package)

    monkeypatch.setattr(sys, "meta_path", [Nowhere, *sys.meta_path])
    with pytest.raises(ImportError, match=f"pip install {pip}"):
        getattr(integrations, module).enable()
    with pytest.raises(ImportError, match=f"pip install {pip}"), getattr(integrations, module).enabled():
        pass
    assert state() == before


@pytest.mark.pypi
class TestPyro:
    def losses(self, elbo: str, normal: Any = None, **scale: Any) -> list[float]:
        """A Pyro VAE, as in its tutorial."""
        pyro = optional("pyro")
        dist, normal = pyro.distributions, normal or pyro.distributions.Normal
        torch.manual_seed(0)
        pyro.clear_param_store()
        encoder, decoder, x = (
            nn.Linear(12, 8),
            nn.Linear(4, 12),
            (torch.rand(32, 12, generator=generator(0)) > 0.5) * 1.0,
        )

        def model(x: Tensor) -> None:
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 4), x.new_ones(len(x), 4)).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)
                pyro.sample("y", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            pyro.module("encoder", encoder)
            loc, log_std = encoder(x).chunk(2, 1)
            with pyro.plate("data", len(x)):
                pyro.sample(
                    "z", normal(loc, **{k: f(log_std) for k, f in (scale or {"scale": torch.exp}).items()}).to_event(1)
                )

        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=getattr(pyro.infer, elbo)())
        return [svi.step(x) / len(x) for _ in range(10)]

    @pytest.mark.parametrize("elbo", ["Trace_ELBO", "TraceMeanField_ELBO", "TraceGraph_ELBO"])
    def test_vae(self, extension: object, calls: dict[str, int], elbo: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_normal, "FEW", 0)  # few densities would be torch's own
        plain = self.losses(elbo)
        assert not calls
        with integrations.pyro.enabled(noise="torch"):
            fused = self.losses(elbo)
        assert calls["reparameterize"] >= 10 and calls["reconstruction_loss"] >= 10
        assert ("gaussian_kl" in calls) == (elbo == "TraceMeanField_ELBO")
        torch.testing.assert_close(fused, plain, rtol=2e-5, atol=0)
        with integrations.pyro.enabled():
            assert abs(sum(self.losses(elbo)) / sum(plain) - 1) < 0.1  # other noise
        assert self.losses(elbo) == plain

    def test_off_is_off(self) -> None:
        normal = optional("pyro").distributions.Normal
        before = dict(vars(normal)), state()
        with integrations.pyro.enabled():
            assert set(METHODS) <= set(vars(normal)) and vars(Normal) == before[1][0]
            assert issubclass(normal, Normal)
        assert (dict(vars(normal)), state()) == before

    def test_without_ambiguity(self, extension: object) -> None:
        dist = optional("pyro").distributions
        kinds = [dist.Normal, Normal, vaefast.distributions.Normal, integrations.pyro.Normal]
        loc, scale = torch.randn(3, generator=generator(0)), torch.tensor(0.5)
        expected = kl_divergence(Normal(loc, scale), Normal(0.0, 1.0))
        for on in (False, True):
            if on:
                integrations.pyro.enable()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                for p, q in itertools.product(kinds, kinds):
                    assert_within(kl_divergence(p(loc, scale), q(torch.tensor(0.0), 1.0)), expected, 1e-6)

    @pytest.mark.parametrize("elbo", ["Trace_ELBO", "TraceMeanField_ELBO"])
    @pytest.mark.parametrize("which", ["distributions", "integrations.pyro"])
    def test_our_normal_in_a_guide(self, extension: object, calls: dict[str, int], elbo: str, which: str) -> None:
        """One import changed: vaefast's Normal, by to_event, with no integration on."""
        optional("pyro")
        normal = vaefast.distributions.Normal if which == "distributions" else integrations.pyro.Normal
        ours = self.losses(elbo, normal, log_std=lambda log_std: log_std)
        assert abs(sum(ours) / sum(self.losses(elbo)) - 1) < 0.1  # other noise
        assert calls["reparameterize"] == 10

    def test_our_normal_is_pyros_too(self, extension: object) -> None:
        pyro = optional("pyro")
        made = integrations.pyro.Normal
        q = made(torch.zeros(3), logvar=torch.zeros(3))
        assert isinstance(q, pyro.distributions.TorchDistribution.__mro__[2]) and isinstance(q, Normal)
        assert q().shape == (3,) and q.expand_by((2,)).batch_shape == (2, 3) and type(q.expand((4, 3))) is made
        assert q.mask(torch.tensor([True, False, True])).log_prob(torch.zeros(3))[1] == 0
        assert q.to_event(1).event_dim == 1 and q.to_event(0) is q
        assert type(pickle.loads(pickle.dumps(q))) is made
        z = pyro.sample("z", q)
        assert q.log_prob(z).shape == (3,) and q.score_parts(z).log_prob.shape == (3,)

    def test_off_in_any_order(self, extension: object) -> None:
        normal = optional("pyro").distributions.Normal
        before = dict(vars(normal)), state()
        modules = integrations.pyro, integrations.torch_distributions
        for on, off in itertools.product(itertools.permutations(modules), repeat=2):
            for module in on:
                module.enable()
            assert normal(0.0, 1.0).rsample().shape == ()
            for module in off:
                module.disable()
            assert (dict(vars(normal)), state()) == before


@pytest.mark.pypi
class TestDiffusers:
    @pytest.fixture
    def autoencoder(self) -> Any:
        torch.manual_seed(1)
        return optional("diffusers").AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip

    @staticmethod
    def losses(autoencoder: Any) -> list[float]:
        model, x = copy.deepcopy(autoencoder), torch.randn(2, 3, 16, 16, generator=generator(0))
        torch.manual_seed(2)
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
        for _ in range(4):
            optimizer.zero_grad()
            posterior = model.encode(x).latent_dist
            decoded = model.decode(posterior.sample()).sample
            loss = (
                ((decoded - x) ** 2).mean()
                + 1e-2 * posterior.kl().mean()
                + 1e-3 * posterior.nll(posterior.mode()).mean()
            )
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return [*losses, model(x, sample_posterior=True, generator=generator(4)).sample.sum().item()]

    def test_autoencoder(self, extension: object, calls: dict[str, int], autoencoder: Any) -> None:
        plain = self.losses(autoencoder)
        assert not calls
        with integrations.diffusers.enabled(noise="torch"):
            fused = self.losses(autoencoder)
        assert calls["reparameterize"] == 5 and calls["kl"] == 4 and calls["nll"] == 4
        torch.testing.assert_close(fused, plain, rtol=2e-5, atol=1e-4)
        with integrations.diffusers.enabled():
            torch.testing.assert_close(self.losses(autoencoder)[:4], plain[:4], rtol=0.1, atol=0)  # other noise
        assert calls["sample"] == 5
        assert self.losses(autoencoder) == plain

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("shape", [(2, 8, 4, 6), (2, 8, 3, 4, 6)])
    def test_the_class_alone(self, extension: object, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Images and videos, over which its KL sums three dimensions too; with a bfloat16's rounding."""
        cls = optional("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution
        moments, other = (torch.randn(shape, generator=generator(k)).to(dtype).requires_grad_() for k in (0, 1))
        x = torch.randn(shape[0], 4, *shape[2:], generator=generator(3)).to(dtype)

        def everything() -> list[Tensor]:
            torch.manual_seed(4)
            q, p = cls(moments), cls(other)
            out = [q.mean, q.logvar, q.std, q.var, q.mode(), q.sample(), q.sample(generator(5)), q.kl(), q.kl(p)]
            out += [q.nll(x), q.nll(x, [1]), q.sample([generator(k) for k in range(shape[0])])]
            point = cls(moments, deterministic=True)
            return [*out, point.sample(), point.std, point.kl(), point.nll(x)]

        plain = everything()
        with integrations.diffusers.enabled(noise="torch"):
            fused = everything()
            assert type(cls(moments)).__mro__[1] is cls and isinstance(cls(moments), cls)
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
        assert [o.requires_grad for o in fused] == [o.requires_grad for o in plain]
        grads = [
            [torch.autograd.grad(o.sum(), moments, retain_graph=True)[0] for o in out if o.requires_grad]
            for out in (fused, plain)
        ]
        for a, e in [*zip(fused, plain), *zip(*grads)]:
            assert a.shape == e.shape and a.dtype == e.dtype
            assert_within(a, e, tolerance)

    def test_compiled_ones_stay_theirs(self, extension: object, calls: dict[str, int]) -> None:
        cls = optional("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution
        moments = torch.randn(2, 8, 4, 6, generator=generator(0))
        torch._dynamo.reset()
        with integrations.diffusers.enabled():
            compiled = torch.compile(lambda m: cls(m).kl(), fullgraph=True, backend="aot_eager")(moments)
            assert not calls
            assert_within(compiled, cls(moments).kl(), 1e-6)
        torch._dynamo.reset()

    def test_off_is_off_and_what_was_made_stays(self, extension: object) -> None:
        cls = optional("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution
        before, moments = dict(vars(cls)), torch.randn(2, 8, 4, 6, generator=generator(0))
        old = cls(moments)
        with integrations.diffusers.enabled():
            assert type(old) is cls and type(cls(moments)) is not cls
            new = cls(moments)
            assert_within(new.kl(old), old.kl(new), 1e-5)
        assert dict(vars(cls)) == before and type(cls(moments)) is cls
        assert_within(new.kl(), old.kl(), 1e-5)
        assert new.sample().shape == new.std.shape == old.std.shape
        for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new)), copy.copy(new)):
            assert type(twin) is cls and torch.equal(twin.mean, old.mean)
        saved = io.BytesIO()
        torch.save(new, saved)


@pytest.mark.pypi
class TestScvi:
    @pytest.fixture(scope="class")
    def adata(self) -> Any:
        anndata = optional("anndata")
        counts = torch.poisson(2 * torch.rand(128, 20, generator=generator(0)), generator=generator(1)).numpy()
        return anndata.AnnData(counts)

    @staticmethod
    def losses(adata: Any, gene_likelihood: str) -> list[float]:
        scvi = optional("scvi")
        adata = adata.copy()
        scvi.settings.seed = 0
        scvi.model.SCVI.setup_anndata(adata)
        model = scvi.model.SCVI(adata, n_hidden=16, n_latent=3, gene_likelihood=gene_likelihood)
        model.train(
            max_epochs=3, batch_size=64, accelerator="cpu", devices=1, train_size=1.0, enable_progress_bar=False,
            logger=False, enable_checkpointing=False,
        )  # fmt: skip
        batch = next(iter(model._make_data_loader(adata, batch_size=64)))
        torch.manual_seed(3)
        losses = [model.module(batch)[-1].loss.item() for _ in range(3)]
        return [*losses, float(model.get_reconstruction_error()["reconstruction_loss"])]

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("gene_likelihood", ["zinb", "nb"])
    def test_scvi(self, extension: object, calls: dict[str, int], adata: Any, gene_likelihood: str) -> None:
        plain = self.losses(adata, gene_likelihood)
        assert not calls
        with integrations.scvi.enabled(noise="torch"):
            fused = self.losses(adata, gene_likelihood)
        assert min(calls[name] for name in ("reconstruction_loss", "gaussian_kl", "reparameterize")) >= 6
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=0)
        with integrations.scvi.enabled():
            torch.testing.assert_close(self.losses(adata, gene_likelihood), plain, rtol=0.1, atol=0)  # other noise
        assert self.losses(adata, gene_likelihood) == plain

    def test_mixture_prior(self, extension: object, densities: list[int]) -> None:
        """scvi-tools' own, of which 30 draws a cell are asked for the density."""
        torch.manual_seed(0)
        prior = optional("scvi.module.base").MogPrior(50, 10)
        leaves = [torch.randn(64, 10, requires_grad=True), torch.rand(64, 10).add(0.1).requires_grad_()]
        found = []
        for context in (nullcontext(), integrations.scvi.enabled(noise="torch")):
            torch.manual_seed(1)
            with context:
                kl = prior.kl(Normal(*leaves))
            found.append([kl, *torch.autograd.grad(kl.sum(), [*leaves, *prior.parameters()])])
        assert densities == [1]
        for a, e in zip(*found):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)

    def functions(self) -> Callable[[], list[Any]]:
        optional("scvi")

        def find() -> list[Any]:
            return [
                getattr(sys.modules[module], name)
                for module in ("scvi.distributions", "scvi.distributions._negative_binomial")
                for name in ("log_nb_positive", "log_zinb_positive", "log_mixture_nb")
                if hasattr(sys.modules[module], name)
            ]

        return find

    def test_functions(self, extension: object, calls: dict[str, int]) -> None:
        """Broadcast dispersions and samples in front; what is not covered is theirs."""
        find = self.functions()
        before, torchs = find(), state()
        module = sys.modules["scvi.distributions._negative_binomial"]
        nb, zinb, mixture = module.log_nb_positive, module.log_zinb_positive, module.log_mixture_nb
        x = torch.poisson(torch.full((5, 4), 3.0), generator=generator(0)).double()
        mu, theta, pi = (
            torch.randn(shape, generator=generator(k)).double() for k, shape in enumerate([(2, 5, 4), (4,), (5, 4)])
        )
        leaves = [mu.exp().requires_grad_(), theta.exp().requires_grad_(), pi.requires_grad_()]
        with integrations.scvi.enabled():
            assert find() != before
            for fused, theirs, params in (
                (module.log_nb_positive, nb, leaves[:2]),
                (module.log_zinb_positive, zinb, leaves),
            ):
                for eps in (1e-8, 1e-6):
                    a, e = fused(x, *params, eps=eps), theirs(x, *params, eps=eps)
                    assert_within(a, e, 10 * eps)
                    for g, h in zip(*(torch.autograd.grad(out.sum(), params) for out in (a, e))):
                        assert_within(g, h, 100 * eps)
            assert calls == {"reconstruction_loss": 4}
            assert torch.equal(module.log_nb_positive(x.long(), *leaves[:2]), nb(x.long(), *leaves[:2]))
            lgamma = lambda t: torch.lgamma(t)  # noqa: E731
            assert torch.equal(module.log_nb_positive(x, *leaves[:2], lgamma_fn=lgamma), nb(x, *leaves[:2]))
            assert calls == {"reconstruction_loss": 4}
        assert find() == before and state() == torchs

        others = [torch.rand(2, 5, 4, generator=generator(7)).double().requires_grad_(), *leaves[1:]]
        with integrations.scvi.enabled():
            first, second, dispersion, logit = leaves[0], *others
            given = x, first, second, dispersion
            a, e = module.log_mixture_nb(*given, None, logit), mixture(*given, None, logit)
            assert_within(a, e, 1e-7)
            for g, h in zip(*(torch.autograd.grad(out.sum(), [first, *others]) for out in (a, e))):
                assert_within(g, h, 1e-6)
            assert calls == {"reconstruction_loss": 5}
            two = module.log_mixture_nb(*given, dispersion + 1, logit)
            assert torch.equal(two, mixture(*given, dispersion + 1, logit))

    def test_off_in_any_order(self, extension: object) -> None:
        find = self.functions()
        before = find(), state()
        modules = integrations.scvi, integrations.torch_distributions
        for on, off in itertools.product(itertools.permutations(modules), repeat=2):
            for module in on:
                module.enable()
            off[0].disable()
            assert state() != before[1]
            off[1].disable()
            assert (find(), state()) == before
