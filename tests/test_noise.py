"""The noise: Philox4x32-10 by its published vectors, its distribution over 10^7 draws, where its seed comes from."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from inputs import assert_checkpointing_replays, draws, generator, posterior
from torch import Tensor

import vaefast
from vaefast._philox import normal, philox4x32
from vaefast.reference import PARAMETERIZATIONS

# Random123, kat_vectors: counter, key, result
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = [
    (0, 0),
    (1, 0),
    (-1, 0),
    (2**63 - 1, 1),
    (-(2**63), 7),
    (0x299F31D0A4093822, 0),
    (12345, 2**32 - 2),
    (12345, 2**32),
    (-987654321, 2**62 - 3),
    (5, 2**62 + 12345),
]
# float32's rounding of u, 2 pi t and their functions, times the longest radius, 6.7; float64's likewise
AGREEMENT = {torch.float32: 1e-5, torch.float64: 1e-13}
DTYPES = pytest.mark.parametrize("dtype", list(AGREEMENT), ids=["float32", "float64"])


def hex_words(text: str) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), PUBLISHED, ids=["zeros", "ones", "pi"])
def test_published_vectors(counter: str, key: str, result: str) -> None:
    assert tuple(philox4x32(hex_words(counter), hex_words(key))) == hex_words(result)


def python_philox(counter: int, stream: int, key: int) -> list[int]:
    """In plain integers, so that the tensor version's int64 wrapping is tested too."""
    c, k = [counter & 0xFFFFFFFF, counter >> 32, stream, 0], [key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_first_draw_by_hand(native: str) -> None:
    """Counter, key, uniforms and Box-Muller written out: element i reads word i % 4 of counter offset + i / 4."""
    seed, offset = 0x123456789ABCDEF0, 2**33 + 5
    z = draws((seed, offset), (8,), device=native).tolist()
    for group in range(2):
        words = python_philox(offset + group, 0, seed)
        for pair in range(2):
            u, t = (words[2 * pair] + 1) * 2.0**-32, words[2 * pair + 1] * 2.0**-32
            radius = math.sqrt(-2 * math.log(u))
            for k, wave in enumerate((math.cos, math.sin)):
                assert z[4 * group + 2 * pair + k] == pytest.approx(radius * wave(2 * math.pi * t), abs=1e-5)


@pytest.mark.isa
@DTYPES
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (63,), (65,), (3, 1367), (17, 1023)], ids=str)
def test_kernels_agree_with_the_reference(
    native: str, dtype: torch.dtype, seed: tuple[int, int], shape: tuple[int, ...]
) -> None:
    expected = normal(torch.tensor(seed), torch.empty(shape), dtype)
    torch.testing.assert_close(draws(seed, shape, dtype, native).cpu(), expected, rtol=0, atol=AGREEMENT[dtype])


def test_halves_get_the_same_noise_rounded(native: str) -> None:
    for half in (torch.float16, torch.bfloat16):
        assert torch.equal(draws((3, 4), (999,), half, native), draws((3, 4), (999,), torch.float32, native).to(half))


@pytest.fixture(scope="module")
def ten_million() -> Tensor:
    with vaefast.use_backend("auto"), torch.random.fork_rng():
        torch.manual_seed(20240229)
        zero = torch.zeros(10_000, 1000)
        return vaefast.reparameterize(zero, zero).flatten()


def test_moments(ten_million: Tensor) -> None:
    """Within 5 standard errors of N(0, 1)'s."""
    x, n = ten_million.double(), ten_million.numel()
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 16, 64, 1000, 1024, 8192])
def test_lag_correlations(ten_million: Tensor, lag: int) -> None:
    x = ten_million
    limit = 5 / x.numel() ** 0.5
    assert abs((x[:-lag] * x[lag:]).double().mean()) < limit
    # neighbours from one pair share a radius: their squares must be independent all the same
    assert abs(((x[:-lag] ** 2 - 1) * (x[lag:] ** 2 - 1)).double().mean()) < 2 * limit


def test_kolmogorov_smirnov(ten_million: Tensor) -> None:
    assert scipy.stats.kstest(ten_million.double().numpy(), "norm", method="asymp").pvalue > 1e-3


def test_quarters_are_alike(ten_million: Tensor) -> None:
    """Each of a counter's four normals is N(0, 1) by itself."""
    for k in range(4):
        assert scipy.stats.kstest(ten_million[k::4][:500_000].double().numpy(), "norm", method="asymp").pvalue > 1e-3


def test_tails(ten_million: Tensor) -> None:
    """As many beyond 4 and 5 sigma as there should be, on both sides."""
    for sigma, sign in ((4.0, 1), (4.0, -1), (4.5, 1), (4.5, -1)):
        expected = ten_million.numel() * scipy.stats.norm.sf(sigma)
        assert abs((sign * ten_million > sigma).sum().item() - expected) < 5 * expected**0.5
    assert 5 < ten_million.abs().max().item() <= math.sqrt(2 * 32 * math.log(2)) + 1e-4


def test_uniforms_keep_32_bits(native: str) -> None:
    """A seed whose first word is 45: float32 draws the tail of 46 * 2^-32, beyond 6 sigma."""
    word, seed = 45, 19781057
    assert python_philox(0, 0, seed)[0] == word
    z = draws((seed, 0), (2,), device=native).double()
    assert z.norm().item() == pytest.approx(math.sqrt(-2 * math.log((word + 1) * 2.0**-32)), rel=1e-6)
    assert z.norm() > 6


Draw = Callable[..., Tensor]
SHAPE = (5, 37)


def draw_plain(**options: object) -> Tensor:
    zero = torch.zeros(SHAPE)
    return vaefast.reparameterize(zero, zero, **options)


def draw_with_kl(**options: object) -> Tensor:
    zero = torch.zeros(SHAPE)
    return vaefast.sample_with_kl(zero, zero, **options)[0]


DRAWS = pytest.mark.parametrize("draw", [draw_plain, draw_with_kl])


@pytest.fixture(params=["native", "reference"])
def either(request: pytest.FixtureRequest, extension: object) -> object:
    with vaefast.use_backend(request.param):
        yield request.param


@DRAWS
def test_manual_seed_and_fork_rng(either: str, draw: Draw) -> None:
    torch.manual_seed(7)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    with torch.random.fork_rng():
        assert torch.equal(draw(), first)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    torch.manual_seed(8)
    assert not torch.equal(draw(), first)


@DRAWS
def test_state_can_be_saved_and_restored(either: str, draw: Draw) -> None:
    state = torch.get_rng_state()
    first = draw()
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    assert torch.equal(draw(), first)


@DRAWS
def test_generator(either: str, draw: Draw) -> None:
    """It gives the noise and advances; the default generator stays where it was."""
    g = torch.Generator().manual_seed(3)
    state, default = g.get_state(), torch.get_rng_state()
    first, second = draw(generator=g), draw(generator=g)
    assert not torch.equal(first, second)
    assert not torch.equal(g.get_state(), state)
    assert torch.equal(torch.get_rng_state(), default)
    g.set_state(state)
    assert torch.equal(draw(generator=g), first)
    torch.manual_seed(3)
    assert torch.equal(draw(), first)


@DRAWS
def test_both_back_ends_draw_the_same(extension: object, draw: Draw) -> None:
    """Call by call, and they leave the generator in one state, so that either can take over from the other."""
    found = {}
    for name in ("native", "reference"):
        torch.manual_seed(11)
        with vaefast.use_backend(name):
            found[name] = [draw(noise="philox") for _ in range(3)], torch.get_rng_state()
    for a, b in zip(found["native"][0], found["reference"][0]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert torch.equal(found["native"][1], found["reference"][1])


def test_both_functions_draw_the_same(either: str) -> None:
    torch.manual_seed(2)
    first = draw_plain()
    torch.manual_seed(2)
    assert torch.equal(draw_with_kl(), first)


@DRAWS
def test_torch_noise_is_randn(either: str, draw: Draw) -> None:
    torch.manual_seed(5)
    expected = torch.randn(SHAPE)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(draw(noise="torch"), expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(draw(noise="torch", generator=generator(5)), expected)


@DRAWS
def test_own_noise(either: str, draw: Draw) -> None:
    state = torch.get_rng_state()
    for shape in (SHAPE, (37,), (5, 1), ()):
        eps = torch.randn(shape, generator=generator(1))
        for noise in ("philox", "torch"):
            assert torch.equal(draw(eps=eps, noise=noise), eps.expand(SHAPE))
    assert torch.equal(torch.get_rng_state(), state)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "chunk": lambda t: torch.cat((t, t), 1).chunk(2, 1)[0],
    "channels last chunk": lambda t: torch.cat((t, t), 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[1],
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every second": lambda t: t.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@DTYPES
def test_elements_count_in_memory_order(either: str, layout: str, dtype: torch.dtype) -> None:
    """z's k-th element in memory gets the k-th normal, however the inputs lie; z lies as torch.empty_like would."""
    zero = LAYOUTS[layout](torch.zeros(3, 6, 5, 7, dtype=dtype))
    torch.manual_seed(1)
    z = vaefast.reparameterize(zero, zero, noise="philox")
    torch.manual_seed(1)
    flat = vaefast.reparameterize(*(torch.zeros(630, dtype=dtype) for _ in range(2)), noise="philox")
    assert z.stride() == torch.empty_like(zero).stride()
    torch.testing.assert_close(z.as_strided((630,), (1,)), flat, rtol=0, atol=0 if either == "native" else 1e-5)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("parameterization", list(PARAMETERIZATIONS))
@pytest.mark.parametrize("noise", ["philox", "torch"])
def test_backward_uses_the_noise_of_forward(either: str, layout: str, parameterization: str, noise: str) -> None:
    """d z / d raw = eps * d std / d raw with the eps that (z - mu) / std tells."""
    p = posterior((4, 6, 5, 17), parameterization, dtype=torch.float64)
    mu, raw = (LAYOUTS[layout](t).requires_grad_() for t in (p.mu, p.raw))
    for draw in (vaefast.reparameterize, lambda *a, **k: vaefast.sample_with_kl(*a, **k)[0]):
        z = draw(mu, raw, parameterization=parameterization, noise=noise)
        dmu, draw_ = torch.autograd.grad(z.sum(), (mu, raw))
        fresh = raw.detach().requires_grad_()
        std = PARAMETERIZATIONS[parameterization].std(fresh)
        (dstd,) = torch.autograd.grad(std.sum(), fresh)
        assert torch.equal(dmu, torch.ones_like(dmu))
        torch.testing.assert_close(draw_, ((z - mu) / std * dstd).detach(), rtol=1e-9, atol=1e-12)


def test_checkpointing_replays_the_noise(either: str) -> None:
    p = posterior().leaves()
    assert_checkpointing_replays(p.mu, p.raw, use_reentrant=False)


def test_every_call_differs(either: str) -> None:
    torch.manual_seed(0)
    seen = np.array([draw_plain()[0, 0].item() for _ in range(200)])
    assert np.unique(seen).size == 200
    assert abs(seen.mean()) < 5 / 200**0.5
