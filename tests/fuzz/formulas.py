"""The mathematics in float64, from the papers and PyTorch's own functions; none of it is vaefast's.

Where a textbook's form loses digits even in float64, :func:`exact` has the value in 50 digits, and its derivatives by
differences of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import exact as digits
import mpmath
import torch
from mpmath import mp, mpf
from torch import Tensor

from vaefast.reference import LIKELIHOODS

Formula = Callable[..., Tensor]


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


# ---- the Gaussian

STD: dict[str, Formula] = {
    "logvar": lambda r: torch.exp(r / 2),
    "log_std": torch.exp,
    "std": lambda r: r * 1.0,
    "var": torch.sqrt,
    "softplus": softplus,
}
LOGVAR: dict[str, Formula] = {
    "logvar": lambda r: r * 1.0,
    "log_std": lambda r: 2 * r,
    "std": lambda r: 2 * torch.log(r),
    "var": torch.log,
    # log(log(1 + e^r)) = r + log(log(1 + e^r) / e^r), the second of which is 0 far down
    "softplus": lambda r: 2 * torch.where(r < -37, r, torch.log(softplus(r.clamp(min=-37)))),
}


def clamped(raw: Tensor, clamp: tuple[float, float] | None) -> Tensor:
    """No gradient outside and on the edges."""
    if clamp is None:
        return raw
    lo, hi = clamp
    return torch.where(raw <= lo, lo, torch.where(raw >= hi, hi, raw))


def std(name: str, raw: Tensor, clamp: tuple[float, float] | None, floor: float) -> Tensor:
    return STD[name](clamped(raw, clamp)) + floor


def logvar(name: str, raw: Tensor, clamp: tuple[float, float] | None, floor: float) -> Tensor:
    return 2 * torch.log(std(name, raw, clamp, floor)) if floor else LOGVAR[name](clamped(raw, clamp))


def h(x: Tensor) -> Tensor:
    """e^x - 1 - x, by its Taylor series within a hundredth of 0; the difference keeps 13 digits further out."""
    near = x.abs() < 0.01
    far = torch.where(near, 1.0, x)  # of which nothing is left beside an infinite e^x
    found = torch.expm1(far) - far.clamp(max=1e30)
    if not near.any():
        return found
    c = torch.where(near, x, 0.0)
    series = 1 + c / 7
    for n in range(6, 2, -1):
        series = 1 + c / n * series
    return torch.where(near, c * c / 2 * series, found)


def kl_and_slopes(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """With the derivatives in the mean, whose negative is the prior mean's, and both log variances."""
    d, distance = mu - prior_mu, logvar - prior_logvar
    inverse = torch.exp(-prior_logvar / 2)
    scaled = torch.where(d == 0, d, d * inverse)
    square, ratio = scaled**2, torch.expm1(distance)
    in_mean = torch.where(d == 0, d, scaled * inverse)
    return (h(distance) + square) / 2, (in_mean, ratio / 2), -(ratio + square) / 2


# ---- the likelihoods


def _bernoulli_probs(x: Tensor, p: Tensor) -> Tensor:
    """Not F.binary_cross_entropy, whose backward has the 1e-12 below rounded to float32."""
    inside = (x >= 0) & (x <= 1) & (p >= 0) & (p <= 1)
    x, p = torch.where(inside, x, 0.5), torch.where(inside, p, 0.5)
    at = p.detach()
    nll = -(x * torch.log(at).clamp(min=-100) + (1 - x) * torch.log1p(-at).clamp(min=-100))
    return torch.where(inside, nll + (p - at) * (at - x) / (at * (1 - at)).clamp(min=1e-12), math.nan)


def _continuous_bernoulli(x: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    near = l.abs() < 0.1
    c, far = torch.where(near, l, 0.0), torch.where(near, 1.0, l)
    series = c / 2 + c**2 / 24 - c**4 / 2880 + c**6 / 181440 - c**8 / 9676800
    log_norm = far.clamp(min=0) + torch.log(-torch.expm1(-far.abs())) - torch.log(far.abs())
    nll = torch.where(near, series, log_norm) - l * x
    return torch.where((x >= 0) & (x <= 1), nll, math.nan)


def _gaussian(x: Tensor, mean: Tensor, lv: Tensor | None = None, *, constant: float) -> Tensor:
    lv = torch.zeros_like(mean) if lv is None else lv
    return (constant * math.log(2 * math.pi) + lv + ((x - mean) * torch.exp(-lv / 2)) ** 2) / 2


def _laplace(x: Tensor, loc: Tensor, ls: Tensor | None = None, *, constant: float) -> Tensor:
    ls = torch.zeros_like(loc) if ls is None else ls
    return constant * math.log(2) + ls + (x - loc).abs() * torch.exp(-ls)


def _student_t(x: Tensor, loc: Tensor, ls: Tensor, df: Tensor) -> Tensor:
    # log Gamma(z + 1/2) - log Gamma(z), of large z by Stirling's series, as two large numbers leave no digits
    z, large = (df / 2).clamp(max=100.0), (df / 2).clamp(min=100.0)
    series = torch.log(large) / 2 - 1 / (8 * large) + 1 / (192 * large**3) - 1 / (640 * large**5)
    ratio = torch.where(df > 200, series, torch.lgamma(z + 0.5) - torch.lgamma(z))
    norm = ratio - torch.log(df * math.pi) / 2 - ls
    return (df + 1) / 2 * torch.log1p(((x - loc) * torch.exp(-ls)) ** 2 / df) - norm


def _log_normal(x: Tensor, loc: Tensor, ls: Tensor) -> Tensor:
    return ((torch.log(x) - loc) * torch.exp(-ls)) ** 2 / 2 + math.log(2 * math.pi) / 2 + ls + torch.log(x)


def _gamma(x: Tensor, log_mean: Tensor, a: Tensor) -> Tensor:
    rate = a * torch.exp(-log_mean)
    return torch.lgamma(a) - a * (torch.log(a) - log_mean) - torch.xlogy(a - 1, x) + x * rate


def _poisson(x: Tensor, log_rate: Tensor, constant: float) -> Tensor:
    nll = torch.exp(log_rate) - x * log_rate + constant * torch.lgamma(x + 1)
    return torch.where(x >= 0, nll, math.nan)


def _negative_binomial(x: Tensor, mu: Tensor, t: Tensor, constant: float, eps: float) -> Tensor:
    m = mu + eps
    norm = torch.lgamma(t) - torch.lgamma(x + t) + constant * torch.lgamma(x + 1)
    nll = norm + t * torch.log1p(m / t) - torch.xlogy(x, m / (t + m))
    return torch.where(x >= 0, nll, math.nan)


def _zero_inflated(x: Tensor, mu: Tensor, t: Tensor, pi: Tensor, constant: float, eps: float) -> Tensor:
    nb = -_negative_binomial(x, mu, t, constant, eps)
    # each branch on inputs of its own, so that no gradient of the other is infinity times 0
    at_zero = torch.logaddexp(pi, torch.where(x == 0, nb, 0.0))
    return softplus(pi) - torch.where(x == 0, at_zero, nb)


def _negative_binomial_mixture(
    x: Tensor, mu1: Tensor, mu2: Tensor, t: Tensor, logit: Tensor, constant: float, eps: float
) -> Tensor:
    first, second = (_negative_binomial(x, mu, t, constant, eps) for mu in (mu1, mu2))
    return -torch.logaddexp(-softplus(-logit) - first, -softplus(logit) - second)


def _zero_or(density: Formula) -> Formula:
    """A mass at 0 beside a density above it, which there is none of below."""

    def nll(x: Tensor, *params: Tensor) -> Tensor:
        *own, pi = params
        # at 0 the density is not asked, nor below
        shown = density(torch.where(x > 0, x, 1.0), *own)
        return torch.where(x == 0, softplus(-pi), torch.where(x > 0, softplus(pi) + shown, math.nan))

    return nll


def _beta_binomial(x: Tensor, a: Tensor, b: Tensor, n: Tensor) -> Tensor:
    def log_beta(p: Tensor, q: Tensor) -> Tensor:
        return torch.lgamma(p) + torch.lgamma(q) - torch.lgamma(p + q)

    nll = log_beta(a, b) - log_beta(x + a, n - x + b) + torch.log(n + 1) + log_beta(x + 1, n - x + 1)
    return torch.where((x >= 0) & (x <= n), nll, math.nan)


def _discretized_logistic(
    x: Tensor, mean: Tensor, ls: Tensor, bins: float, low: float, high: float, floor: float
) -> Tensor:
    half = (high - low) / (bins - 1) / 2
    scale = torch.exp(torch.where(ls <= floor, floor, ls))
    a, b = (x - mean - half) / scale, (x - mean + half) / scale
    inner = softplus(a) + softplus(-b) - torch.log(-torch.expm1(-2 * half / scale))
    return torch.where(x < low + half / 2, softplus(-b), torch.where(x > high - half / 2, softplus(a), inner))


def _categorical(x: Tensor, logits: Tensor, dim: float) -> Tensor:
    """Along dim 1, as all mixtures here."""
    K = logits.shape[1]
    known = (x >= 0) & (x < K) & (x == x.floor())
    index = torch.where(known, x, 0.0).long().unsqueeze(1)
    apart = logits - _most(logits)
    picked = apart.gather(1, index).squeeze(1)
    return torch.where(known, _logsumexp(apart) - picked, math.nan)


def _logsumexp(x: Tensor) -> Tensor:
    most = _most(x)
    return (torch.exp(x - most).sum(1, keepdim=True).log() + most).squeeze(1)


def _most(x: Tensor) -> Tensor:
    """Along dim 1 what is to be subtracted before exponentials: torch.logsumexp's gradient is off where its value has
    no digits left for the logarithm."""
    most = x.detach().amax(1, keepdim=True) if x.shape[1] else x.detach().sum(1, keepdim=True)
    return torch.where(most.isfinite(), most, 0.0)


def _mixture(x: Tensor, planes: Tensor, channels: float, dim: float, **grid: float) -> Tensor:
    C, columns = int(channels), 2 if channels == 1 else 3
    groups = planes.unflatten(1, (1 + C * columns, -1)).unbind(1)
    logits, joint = groups[0], groups[0]
    coupling = {(1, 0): 3, (2, 0): 6, (2, 1): 9}
    for c in range(C):
        mean, ls = groups[1 + columns * c], groups[2 + columns * c]
        for b in range(c):
            mean = mean + torch.tanh(groups[coupling[c, b]]) * x[:, b : b + 1]
        joint = joint - _discretized_logistic(x[:, c : c + 1], mean, ls, **grid)
    return _logsumexp(logits) - _logsumexp(joint)


NLL: dict[str, Formula] = {
    "bernoulli": lambda x, logits: softplus(logits) - logits * x,
    "bernoulli_probs": _bernoulli_probs,
    "continuous_bernoulli": _continuous_bernoulli,
    "gaussian": _gaussian,
    "laplace": _laplace,
    "student_t": _student_t,
    "log_normal": _log_normal,
    "gamma": _gamma,
    "zero_inflated_log_normal": _zero_or(_log_normal),
    "zero_inflated_gamma": _zero_or(_gamma),
    "poisson": _poisson,
    "negative_binomial": _negative_binomial,
    "zero_inflated_negative_binomial": _zero_inflated,
    "negative_binomial_mixture": _negative_binomial_mixture,
    "beta_binomial": _beta_binomial,
    "discretized_logistic": _discretized_logistic,
    "categorical": _categorical,
    "discretized_logistic_mixture": _mixture,
}

# ---- in 50 digits


def _gaussian_digits(x: mpf, mean: mpf, lv: mpf | int = 0, *, constant: float) -> mpf:
    return (constant * mpmath.log(2 * mp.pi) + lv + (x - mean) ** 2 * mpmath.exp(-lv)) / 2


def _laplace_digits(x: mpf, loc: mpf, ls: mpf | int = 0, *, constant: float) -> mpf:
    return constant * mpmath.log(2) + ls + abs(x - loc) * mpmath.exp(-ls)


DIGITS: dict[str, Callable[..., mpf]] = {
    **digits.NLL,
    "bernoulli": lambda x, logit: mpmath.log1p(mpmath.exp(logit)) - logit * x,
    "gaussian": _gaussian_digits,
    "laplace": _laplace_digits,
}
# whose gradient is not the formula's where that is clamped
VALUE_ALONE = ("bernoulli_probs",)


def inside(likelihood: str, x: Sequence[float], params: Sequence[float]) -> bool:
    """Whether the data and the parameters are the likelihood's, which formulas in digits do not ask."""
    if likelihood == "student_t" and params[2] > 1e30:  # a Gaussian, from there on
        return False
    support = LIKELIHOODS[likelihood].support
    if likelihood == "bernoulli" or support in ("real", "bins"):
        return True
    if support == "class":
        return x[0] in range(len(params))
    most = {"unit": 1.0, "some of total": params[-1]}.get(support, math.inf)
    return (x[0] > 0 if support == "positive" else x[0] >= 0) and x[0] <= most


def exact(
    likelihood: str, x: Sequence[float], params: Sequence[float], options: dict[str, float]
) -> tuple[float, list[float]] | None:
    """The nll of one site and its derivatives in its parameters; None where the formula does not take the numbers. x
    and params are a mixture's along ``dim``."""
    if not inside(likelihood, x, params):
        return None
    xs, ps = list(map(mpf, x)), list(map(mpf, params))
    if likelihood in digits.MIXTURES:
        without = {k: v for k, v in options.items() if k != "dim"}

        def f(*p: mpf) -> mpf:
            return digits.MIXTURES[likelihood](xs, list(p), **without)
    else:

        def f(*p: mpf) -> mpf:
            return DIGITS[likelihood](xs[0], *p, **options)

    def in_float64(value: mpf) -> float:
        if mpmath.im(value) != 0 or not mpmath.isfinite(value):
            raise ValueError(f"{value} is no real number")
        return float(mpmath.re(value))

    try:
        with mp.workdps(60):
            value = in_float64(f(*ps))
        if likelihood in VALUE_ALONE:
            return value, []
        # a difference of two values has none of the digits that they have in common
        with mp.workdps(60 + 2 * int(math.log10(max(1.0, abs(value))))):
            ones = [tuple(int(k == j) for j in range(len(ps))) for k in range(len(ps))]
            return value, [in_float64(mpmath.diff(f, tuple(ps), one)) for one in ones]
    except (ValueError, ZeroDivisionError, OverflowError, TypeError):
        return None
