"""``python -m tools.edges``: writes docs/edges.md, what each function gives at its edges, beside PyTorch's expression.

Values and gradients come from the calls themselves, in float32 on the CPU, with kernels and without; where the two ways
differ both stand there. ``tests/test_edges.py`` holds the page against the code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributions as D
from torch.nn import functional as F

import vaefast

PAGE = Path(__file__).resolve().parents[1] / "docs" / "edges.md"
INF, NAN = math.inf, math.nan

HEAD = """# Edges

What the functions give where arguments are infinite, NaN, too large, too small or not there, and beside it what
PyTorch's own expression gives, both in float32: the value, and the gradients of what is listed. `make edges` writes
this page from the calls themselves, and `tests/test_edges.py` holds it against them. Kernels and the PyTorch engine
agree but where a cell has two answers, the kernels' first. [Limits](limits.md) says which of these are kept to on
purpose.
"""

Call = Callable[..., Tensor]


class Edge(NamedTuple):
    """A call at numbers, each a tensor of its own that gets a gradient; ``theirs`` is None where PyTorch has none."""

    what: str
    at: tuple[float, ...]
    ours: Call
    theirs: Call | None


class Group(NamedTuple):
    title: str
    text: str
    edges: Sequence[Edge]


def textbook_kl(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor | float = 0.0, prior_logvar: Tensor | float = 0.0
) -> Tensor:
    plv = torch.as_tensor(prior_logvar)
    return -0.5 * (1 + logvar - plv - ((mu - prior_mu) ** 2 + logvar.exp()) / plv.exp())


def kl_of(parameterization: str) -> Call:
    return lambda mu, raw: vaefast.gaussian_kl(mu, raw, parameterization=parameterization, reduction="sum")


def torch_kl_of_std(mu: Tensor, std: Tensor) -> Tensor:
    normal = D.Normal(mu, std, validate_args=False)
    return D.kl_divergence(normal, D.Normal(torch.zeros(()), torch.ones(())))


def to_prior(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    return vaefast.gaussian_kl(mu, logvar, prior_mu, prior_logvar, reduction="sum")


def sample(mu: Tensor, logvar: Tensor) -> Tensor:
    return vaefast.reparameterize(mu, logvar, eps=torch.tensor(0.5))


def textbook_sample(mu: Tensor, logvar: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * logvar) * 0.5


def nll_of(likelihood: str, x: float, **options: float) -> Call:
    chosen = vaefast.Likelihood(likelihood, **options)
    return lambda *recon: vaefast.reconstruction_loss(recon, torch.tensor(float(x)), likelihood=chosen, reduction="sum")


def categorical(x: int) -> tuple[Call, Call]:
    def ours(*logits: Tensor) -> Tensor:
        recon = torch.stack(logits).unsqueeze(0)
        return vaefast.reconstruction_loss(recon, torch.tensor([float(x)]), likelihood="categorical", reduction="sum")

    def theirs(*logits: Tensor) -> Tensor:
        return F.cross_entropy(torch.stack(logits).unsqueeze(0), torch.tensor([x]), reduction="sum")

    return ours, theirs


def bce(x: float) -> Call:
    return lambda logits: F.binary_cross_entropy_with_logits(logits, torch.tensor(float(x)))


def bce_of_probs(x: float) -> Call:
    return lambda probs: F.binary_cross_entropy(probs, torch.tensor(float(x)))


def normal(x: float) -> Call:
    return lambda mean, logvar: (
        -D.Normal(mean, torch.exp(0.5 * logvar), validate_args=False).log_prob(torch.tensor(float(x)))
    )


def laplace(x: float) -> Call:
    return lambda loc, log_scale: -D.Laplace(loc, log_scale.exp(), validate_args=False).log_prob(torch.tensor(float(x)))


def student_t(x: float) -> Call:
    def nll(loc: Tensor, log_scale: Tensor, df: Tensor) -> Tensor:
        found: Tensor = D.StudentT(df, loc, log_scale.exp(), validate_args=False).log_prob(torch.tensor(float(x)))
        return -found

    return nll


def poisson(x: float) -> Call:
    return lambda log_rate: -D.Poisson(log_rate.exp(), validate_args=False).log_prob(torch.tensor(float(x)))


def negative_binomial(x: float) -> Call:
    def nll(mu: Tensor, theta: Tensor) -> Tensor:
        counts = D.NegativeBinomial(theta, logits=mu.log() - theta.log(), validate_args=False)
        found: Tensor = counts.log_prob(torch.tensor(float(x)))
        return -found

    return nll


def gamma(x: float) -> Call:
    def nll(log_mean: Tensor, a: Tensor) -> Tensor:
        found: Tensor = D.Gamma(a, a * torch.exp(-log_mean), validate_args=False).log_prob(torch.tensor(float(x)))
        return -found

    return nll


def log_normal(x: float) -> Call:
    return lambda loc, log_scale: (
        -D.LogNormal(loc, log_scale.exp(), validate_args=False).log_prob(torch.tensor(float(x)))
    )


def continuous_bernoulli(x: float) -> Call:
    return lambda logits: -D.ContinuousBernoulli(logits=logits, validate_args=False).log_prob(torch.tensor(float(x)))


def edges_of(name: str, theirs: Callable[[float], Call] | None, *rows: tuple[float, ...]) -> list[Edge]:
    """Each row is the parameters and, last, the datum."""
    return [
        Edge(f"`{name}` {told(at)}, data {shown(x)}", tuple(at), nll_of(name, x), None if theirs is None else theirs(x))
        for *at, x in rows
    ]


def shown(x: float) -> str:
    if math.isnan(x):
        return "NaN"
    return ("-" if x < 0 else "") + "inf" if math.isinf(x) else f"{x + 0.0:.4g}"


def told(numbers: Sequence[float]) -> str:
    return ", ".join(shown(x) for x in numbers)


def weighted(logits: Tensor) -> Tensor:
    both = torch.stack((logits, torch.ones(())))
    return vaefast.reconstruction_loss(both, torch.ones(2), weight=torch.tensor([0.0, 1.0]), reduction="sum")


def weighted_torch(logits: Tensor) -> Tensor:
    both = torch.stack((logits, torch.ones(())))
    return F.binary_cross_entropy_with_logits(both, torch.ones(2), weight=torch.tensor([0.0, 1.0]), reduction="sum")


def hidden_kl(mu: Tensor) -> Tensor:
    both = torch.stack((mu, torch.ones(())))
    return vaefast.gaussian_kl(both, torch.zeros(2), weight=torch.tensor([0.0, 1.0]), reduction="sum")


def hidden_kl_torch(mu: Tensor) -> Tensor:
    both = torch.stack((mu, torch.ones(())))
    return (textbook_kl(both, torch.zeros(2)) * torch.tensor([0.0, 1.0])).sum()


def empty(shape: tuple[int, int], reduction: str) -> tuple[Call, Call]:
    def ours(scale: Tensor) -> Tensor:
        recon = scale.expand(shape)
        return vaefast.reconstruction_loss(recon, torch.zeros(shape), likelihood="gaussian", reduction=reduction).sum()

    def theirs(scale: Tensor) -> Tensor:
        elements = 0.5 * (math.log(2 * math.pi) + scale.expand(shape) ** 2)
        if reduction in ("sum", "mean"):
            return elements.sum() if reduction == "sum" else elements.mean()
        rows = elements.sum(1)
        return rows.sum() if reduction == "per_sample" else rows.mean()

    return ours, theirs


def free_bits(mu: Tensor) -> Tensor:
    return vaefast.gaussian_kl(mu.view(1, 1), torch.zeros(1, 1), free_bits=0.5, reduction="sum")


def free_bits_torch(mu: Tensor) -> Tensor:
    return textbook_kl(mu, torch.zeros(())).clamp(min=0.5)


GROUPS = [
    Group(
        "The KL",
        "mu and the raw scale, against N(0, I). PyTorch: `-0.5 * (1 + logvar - mu**2 - logvar.exp())`; for a standard "
        "deviation `torch.distributions.kl_divergence`.",
        [
            *(
                Edge(f"`logvar` {told(at)}", at, kl_of("logvar"), textbook_kl)
                for at in (
                    (0.0, 1e-5),
                    (1e-20, 1e-10),
                    (0.0, 88.0),
                    (0.0, 89.0),
                    (0.0, INF),
                    (0.0, -INF),
                    (0.0, -1000.0),
                    (1e20, 0.0),
                    (INF, 0.0),
                    (-INF, INF),
                    (NAN, 0.0),
                    (0.0, NAN),
                )
            ),
            *(
                Edge(f"`std` {told(at)}", at, kl_of("std"), torch_kl_of_std)
                for at in (
                    (0.0, 0.0),
                    (0.0, 1e-30),
                    (0.0, 1e20),
                    (0.0, INF),
                    (0.0, -1.0),
                )
            ),
            *(
                Edge(f"`softplus` {told(at)}", at, kl_of("softplus"), lambda mu, r: torch_kl_of_std(mu, F.softplus(r)))
                for at in ((0.0, -30.0), (0.0, -200.0), (0.0, -INF))
            ),
            *(
                Edge(f"`logvar` {told(at)} to a prior", at, to_prior, textbook_kl)
                for at in (
                    (1.0, 0.0, 1.0, -200.0),
                    (2.0, 0.0, 1.0, -80.0),
                    (1.0, -200.0, 1.0, -200.0),
                    (1.0, 0.0, 1.0, 200.0),
                    (1.0, 0.0, INF, 0.0),
                    (1.0, 0.0, 1.0, INF),
                    (1.0, 0.0, 1.0, -INF),
                )
            ),
            Edge("`free_bits=0.5`, mu 1, where the KL is the floor", (1.0,), free_bits, free_bits_torch),
            Edge("`free_bits=0.5`, mu NaN", (NAN,), free_bits, free_bits_torch),
        ],
    ),
    Group(
        "Samples",
        "mu and logvar, at a noise of 0.5. PyTorch: `mu + torch.exp(0.5 * logvar) * eps`.",
        [
            Edge(f"{told(at)}", at, sample, textbook_sample)
            for at in (
                (1.0, -INF),
                (1.0, -300.0),
                (1.0, 176.0),
                (1.0, 178.0),
                (1.0, INF),
                (INF, -INF),
                (NAN, 0.0),
                (1.0, NAN),
            )
        ],
    ),
    Group(
        "Likelihoods",
        "The parameters, and the datum. PyTorch: `F.binary_cross_entropy_with_logits`, `F.binary_cross_entropy`, "
        "`F.cross_entropy`, and minus the `log_prob` of `torch.distributions`.",
        [
            *edges_of("bernoulli", bce, (INF, 1), (INF, 0), (-INF, 0), (1e38, 0.5), (NAN, 0), (0, NAN), (0, INF)),
            *edges_of(
                "bernoulli_probs", bce_of_probs, (0, 0), (0, 1), (1, 1), (1e-30, 1), (1.5, 1), (0.5, 2), (NAN, 1)
            ),
            *edges_of("continuous_bernoulli", continuous_bernoulli, (0, 0.3), (1e-4, 0.3), (INF, 1), (-1e4, 0), (0, 2)),
            *edges_of(
                "gaussian",
                normal,
                (1, -INF, 1),
                (1, -INF, 0),
                (1, -200, 1),
                (1, 200, 0),
                (1, INF, 0),
                (1e20, 0, 0),
                (INF, 0, 0),
                (0, 0, INF),
                (0, NAN, 0),
            ),
            *edges_of("laplace", laplace, (1, 0, 1), (1, -INF, 1), (1, -INF, 0), (1, INF, 0), (INF, 0, 0)),
            *edges_of(
                "student_t",
                student_t,
                (1, 0, 1e-6, 3),
                (1, 0, 1e8, 3),
                (1, 0, INF, 3),
                (1, -200, 2, 3),
                (0, 0, 2, 1e30),
            ),
            *edges_of("log_normal", log_normal, (0, 0, 0), (0, 0, -1), (0, -200, 1), (0, 0, INF)),
            *edges_of("gamma", gamma, (0, 2, 0), (0, 1, 0), (0, 0.5, 0), (0, 1e8, 1), (0, 0, 1), (100, 2, 1)),
            *edges_of("poisson", poisson, (-INF, 0), (-INF, 2), (INF, 2), (0, 1e8), (0, -1), (0, 0.5)),
            *edges_of(
                "negative_binomial",
                negative_binomial,
                (5, 0, 0),
                (5, 0, 3),
                (5, 1e-30, 3),
                (5, 1e10, 3),
                (5, INF, 3),
                (0, 2, 0),
                (0, 2, 3),
                (5, 2, -1),
            ),
            *edges_of(
                "zero_inflated_negative_binomial", None, (5, 2, -INF, 3), (5, 2, INF, 0), (5, 2, INF, 3), (0, 2, 0, 0)
            ),
            *edges_of("beta_binomial", None, (1, 1, 5, 6), (1e-6, 1e-6, 5, 2), (1e8, 1e8, 5, 2), (0, 1, 5, 0)),
            *edges_of("discretized_logistic", None, (0, -INF, 0), (0, -7, 1), (50, -7, 0), (0, 30, 0), (INF, 0, 0)),
            *(
                Edge(f"`categorical` {told(at)}, data {x}", at, *categorical(x))
                for at, x in (
                    ((0.0, -INF), 0),
                    ((0.0, -INF), 1),
                    ((-INF, -INF), 0),
                    ((INF, 0.0), 0),
                    ((1e38, -1e38), 1),
                    ((0.0, 1.0), 2),
                    ((NAN, 0.0), 0),
                )
            ),
        ],
    ),
    Group(
        "What a weight of 0 hides",
        "NaN under a weight of 0, beside an element that counts. PyTorch: the elements times the weight.",
        [
            Edge("`bernoulli`, logits NaN", (NAN,), weighted, weighted_torch),
            Edge("`bernoulli`, logits inf", (INF,), weighted, weighted_torch),
            Edge("the KL, mu NaN", (NAN,), hidden_kl, hidden_kl_torch),
        ],
    ),
    Group(
        "Reductions of nothing",
        'Of shape [B, D], and the gradient in a number that is broadcast to it. `"per_sample"` is added up here.',
        [
            Edge(f'{list(shape)}, `"{reduction}"`', (1.0,), *empty(shape, reduction))
            for shape in ((0, 3), (2, 0))
            for reduction in ("sum", "mean", "batchmean", "per_sample")
        ],
    ),
]


def answer(call: Call | None, at: Sequence[float]) -> tuple[str, str]:
    """The value and the gradients, or the error's type."""
    if call is None:
        return "", ""
    leaves = [torch.tensor(float(x), requires_grad=True) for x in at]
    try:
        value = call(*leaves)
        gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    except Exception as error:
        return type(error).__name__, ""
    return shown(value.item()), told([g.item() for g in gradients])


def both(edge: Edge) -> list[str]:
    """Of the kernels and, where it is another, of the PyTorch engine."""
    found = []
    for backend in ("auto", "reference"):
        with vaefast.use_backend(backend):
            found.append(answer(edge.ours, edge.at))
    kernels, engine = found
    return [a if a == b else f"{a}; {b}" for a, b in zip(kernels, engine)]


def page() -> str:
    parts = [HEAD]
    for group in GROUPS:
        rows = [f"| {edge.what} | {' | '.join([*both(edge), *answer(edge.theirs, edge.at)])} |" for edge in group.edges]
        head = "| at | value | gradient | PyTorch's value | PyTorch's gradient |\n|---|---|---|---|---|\n"
        parts.append(f"## {group.title}\n\n{group.text}\n\n{head}" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def main() -> None:
    PAGE.write_text(page())
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
