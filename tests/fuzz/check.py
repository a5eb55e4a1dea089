"""A case's call held against the oracle."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vaefast.reference import LIKELIHOODS

from . import formulas, oracle
from .calls import Arguments, Found, arguments, data_shape, level_shape, noises, run, upstream, wide
from .cases import Case
from .oracle import Near, Reduced, Terms

# sites whose textbook's formula is in doubt are computed in 50 digits, so many of them; fewer of a mixture, whose time
# grows with the square of its planes. Of fewer than the second number it is not asked which are in doubt
MOST_DIGITS, FEW = 1000, 300


class Wrong(AssertionError):
    """A result that no right implementation gives."""


class Expected:
    """The outputs and gradients of a case, given what dtype each is stored in."""

    def __init__(self, given: Arguments) -> None:
        self.given, self.case = given, given.case
        self.outputs: dict[str, tuple[Near, Reduced | None]] = {}
        # terms that reach leaves: the output's name, the terms, how its upstream gradients become their factors, and
        # the leaves' names
        self.paths: list[tuple[str, Terms, Reduced | None, dict[str, str]]] = []
        case = self.case
        self.kl_dtype = wide(
            *(given.get(n) for n in ("mu", "raw", "prior_mu", "prior_logvar", "moments", "prior_moments"))
        )
        self.nll: Terms | None = None
        if case.has_sample:
            self._samples()
        if case.has_kl:
            self._kl()
        if case.has_nll:
            self._nll()

    # -- what the terms are of

    def _posterior(self, level: int) -> tuple[list[Tensor], list[str]]:
        """mu, raw, prior mean and prior raw, expanded; and their names."""
        case, get = self.case, self.given.of_level
        shape = level_shape(case, level)
        if case.op == "packed":
            dim = case.batch_dims
            halves = list(self.given.get("moments").detach().double().chunk(2, dim))
            prior = self.given.get("prior_moments")
            halves += (
                [*prior.detach().double().chunk(2, dim)] if prior is not None else [torch.zeros(shape).double()] * 2
            )
            return halves, ["mu", "raw", "prior_mu", "prior_logvar"]
        found, names = [], []
        for name in ("mu", "raw", "prior_mu", "prior_logvar"):
            x = get(name, level)
            full = torch.zeros((), dtype=torch.float64) if x is None else torch.as_tensor(x).detach().double()
            if x is None and name == "prior_logvar" and case.prior_parameterization in ("std", "var"):
                full = torch.zeros_like(full)  # of None it is a standard deviation of 1, whatever is meant by raw
            found.append(full.expand(shape))
            shared = case.op == "multi_tensor_sample_with_kl" and name.startswith("prior")
            names.append(name if not level or shared else f"{name}@{level}")
        return found, names

    def _samples(self) -> None:
        for level, eps in enumerate(noises(self.given)):
            (mu, raw, *_), names = self._posterior(level)
            shape = mu.shape if self.case.num_samples is None else (self.case.num_samples, *mu.shape)
            drawn = "eps" not in self.given.tensors
            dtype = (
                self.kl_dtype if self.case.op != "reparameterize" else wide(self.given.get("mu"), self.given.get("raw"))
            )
            if self.case.op.startswith("multi"):
                own = (self.given.of_level(n, level) for n in ("mu", "raw", "prior_mu", "prior_logvar"))
                dtype = wide(*own)
            if self.case.engine == "reference":  # which does not draw with the prior beside it
                dtype = wide(mu_of(self.given, level), raw_of(self.given, level))
            if not drawn:
                dtype = wide(eps, *(self.given.get(n) for n in ("mu", "raw")))
            terms = oracle.sample_terms(
                self.case, mu.expand(shape), raw.expand(shape), eps.double().expand(shape), dtype, drawn
            )
            name = f"z@{level}" if level else "z"
            self.outputs[name] = terms.value, None
            self.paths.append((name, terms, None, {"mu": names[0], "raw": names[1], "eps": "eps"}))

    def _kl(self) -> None:
        case = self.case
        total: Near | None = None
        for level in range(case.levels):
            (mu, raw, pm, plv), names = self._posterior(level)
            weight = self.given.get("kl_weight")
            if weight is not None:
                weight = weight.detach().double().expand(mu.shape)
                on = weight != 0
                mu, raw, pm = (torch.where(on, t, other) for t, other in ((mu, 0.0), (raw, 1.0), (pm, 0.0)))
                plv = torch.where(on, plv, 1.0 if "prior_logvar" in self.given.tensors else 0.0)
            dtype = self.kl_dtype
            if case.op == "multi_tensor_gaussian_kl":
                dtype = wide(*(self.given.of_level(n, level) for n in ("mu", "raw", "prior_mu", "prior_logvar")))
            terms = oracle.kl_terms(case, (mu, raw), (pm, plv), dtype, False)
            nodes = [terms]
            value = terms.value
            if case.symmetric:
                nodes.append(oracle.kl_terms(case, (mu, raw), (pm, plv), dtype, True))
                value = value + nodes[1].value
            if case.op == "kl_per_dim":
                found = self._per_dim(value)
            elif case.free_bits or case.capacity is not None:
                found = oracle.bent(case, value, weight, oracle.TOLERANCE[dtype])
            else:
                found = oracle.plain(value, weight, case.reduction, case.batch_dims)
            out = found.out
            if case.reduction == "none" and weight is not None:  # which meets what is stored already
                most = torch.finfo(self.dtype_of("kl")).max
                out = out.wider(loose=lambda at=value.value, most=most: at.abs() > 0.99 * most)
            total = out if total is None else total + out
            for node in nodes:
                if case.balance is not None:
                    shares = {n: case.balance if n.startswith("prior") else 1 - case.balance for n in node.partials}
                    node = Terms(node.value, {n: self._share(g, shares[n], dtype) for n, g in node.partials.items()})
                own = dict(zip(("mu", "raw", "prior_mu", "prior_logvar"), names))
                self.paths.append(("kl", node, found, own))
        assert total is not None
        self.outputs["kl"] = total, None

    def _share(self, gradient: Near, share: float, dtype: torch.dtype) -> Near:
        """0 of an infinite one is NaN, in the formula too."""
        return (gradient * share).wider(loose=lambda: gradient.value.abs() > 0.99 * torch.finfo(dtype).max)

    def _per_dim(self, value: Near) -> Reduced:
        shape = value.value.shape

        def factor(up: Tensor) -> tuple[Tensor, None]:
            return (up / max(1, shape[0])).expand(shape), None

        return Reduced(value.over(lambda t: t.mean(0)), factor)

    def _recon(self) -> list[str]:
        return [f"recon{k}" for k in range(self.case.count)]

    def nll_inputs(self) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Of one shape, in float64, a mixture's planes along dim 1, and 1 in the place of what a weight hides."""
        case, given = self.case, self.given
        params = [given.get(name).detach().double() for name in self._recon()]
        x, weight = given.get("target").detach().double(), given.get("weight")
        shape, planes = data_shape(case), bool(LIKELIHOODS[case.likelihood].planes)
        if planes:  # along dim 1, behind one batch dimension
            x, params = self._merged(x), [self._merged(params[0])]
            shape = (params[0].shape[0], *params[0].shape[2:])
        else:
            params = [p.expand(x.shape) for p in params]
        if weight is not None:
            weight = weight.detach().double().expand(data_shape(case)).reshape(shape)
            on = weight != 0
            params = [torch.where(on.unsqueeze(1) if planes else on, p, 1.0) for p in params]
            x = torch.where(on.unsqueeze(1) if x.dim() > on.dim() else on, x, 1.0)
        return x, params, weight

    def _merged(self, x: Tensor) -> Tensor:
        return x.flatten(0, self.case.batch_dims - 1) if self.case.batch_dims > 1 else x

    def _nll(self) -> None:
        case, given = self.case, self.given
        assert given.likelihood is not None
        x, params, weight = self.nll_inputs()
        tensors = [given.get(n) for n in (*self._recon(), "target", "weight")]
        self.nll_dtype = wide(*tensors)
        terms = self.nll = oracle.nll_terms(case, x, params, given.likelihood.options, self.nll_dtype)
        self._nll_out(terms, weight)

    def _nll_out(self, terms: Terms, weight: Tensor | None) -> None:
        case = self.case
        shape = data_shape(case)
        value = terms.value.over(lambda t: t.reshape(shape))
        w = None if weight is None else weight.reshape(shape)
        found = oracle.plain(value, w, case.reduction, case.batch_dims)
        self.outputs["nll"] = found.out, None
        names = {name: name for name in ("target", *self._recon())}
        self.paths = [path for path in self.paths if path[0] != "nll"]
        self.paths.append(("nll", terms, found, names))

    # -- doubts

    def doubt(self, sites: Tensor, first: Tensor) -> bool:
        """Computes the sites in 50 digits, some first; whether that changed anything."""
        assert self.nll is not None and self.given.likelihood is not None
        x, params, weight = self.nll_inputs()
        terms, case = self.nll, self.case
        entry = LIKELIHOODS[case.likelihood]
        planes = bool(entry.planes)
        tolerance, least = oracle.TOLERANCE[self.nll_dtype], torch.finfo(self.nll_dtype).tiny ** 0.5
        changed = False
        most = min(MOST_DIGITS, max(1, 3000 // params[0].shape[1] ** 2)) if planes else MOST_DIGITS
        for index in ((sites & first).nonzero().tolist() + (sites & ~first).nonzero().tolist())[:most]:
            at = tuple(index)
            along = (at[0], slice(None), *at[1:]) if planes else at
            own = x[along].reshape(-1).tolist() if x.dim() > sites.dim() else [x[at].item()]
            numbers = params[0][along].tolist() if planes else [p[at].item() for p in params]
            small = any(0 < n < least and d == "positive" for n, d in zip(numbers, entry.domains))
            if small or not all(map(_finite, (*own, *numbers))):
                continue
            found = formulas.exact(case.likelihood, own, numbers, self.given.likelihood.options)
            if found is None:
                continue
            value, slopes = found
            changed = True
            _set(terms.value, at, value, tolerance)
            for k, slope in enumerate(slopes):
                if planes:
                    _set(terms.partials["recon0"], (at[0], k, *at[1:]), slope, tolerance)
                else:
                    _set(terms.partials[f"recon{k}"], at, slope, tolerance)
        if changed:
            self._nll_out(terms, weight)
        return changed

    def widen(self) -> None:
        """By what a rounding of each input does: no result in that dtype can be nearer."""
        assert self.nll is not None and self.given.likelihood is not None
        x, params, weight = self.nll_inputs()
        step = {torch.float32: 2.0**-23, torch.float64: 2.0**-49}[self.nll_dtype]
        whole = LIKELIHOODS[self.case.likelihood].support in ("class", "count", "some of total")
        f = functools.partial(formulas.NLL[self.case.likelihood], **self.given.likelihood.options)

        def at(inputs: Sequence[Tensor]) -> list[Tensor]:
            leaves = [t.detach().clone().requires_grad_() for t in inputs]
            value = f(*leaves)
            return [value.detach(), *torch.autograd.grad(value.sum(), leaves, materialize_grads=True)]

        here = at((x, *params))
        nears = [self.nll.value, *self.nll.partials.values()]
        for seed in range(8):
            g = torch.Generator().manual_seed(seed)
            moved = [t * (1 + step * (2 * torch.rand(t.shape, generator=g, dtype=t.dtype) - 1)) for t in (x, *params)]
            if whole:
                moved[0] = x
            for near, a, b in zip(nears, at(moved), here):
                near.bound.copy_(torch.maximum(near.bound, 4 * (a - b).abs().nan_to_num(0.0, 0.0, 0.0)))
        self._nll_out(self.nll, weight)

    # -- the results

    def output(self, name: str, dtype: torch.dtype) -> Near:
        if name == "loss":
            nll, kl = self.outputs["nll"][0], self.outputs["kl"][0]
            found = nll + kl * self.case.beta
            beta = abs(self.case.beta)
            return found.wider(lambda: 2.0**-22 * (nll.value.abs() + beta * kl.value.abs())).rounded(dtype)
        return self.outputs[name][0].rounded(dtype)

    def dtype_of(self, name: str) -> torch.dtype:
        """As the documentation has it: a sample's is mu's, elements' the promoted one, a sum's at least float32."""
        case, get = self.case, self.given.get
        if name.startswith("z"):
            return self.given.of_level("mu", int(name[2:] or 0)).dtype if case.op != "packed" else get("moments").dtype  # type: ignore[no-any-return]
        of_nll = [get(n) for n in (*self._recon(), "target")]
        of_kl = [
            self.given.of_level(n, k) for k in range(case.levels) for n in ("mu", "raw", "prior_mu", "prior_logvar")
        ]
        of_kl += [get("moments"), get("prior_moments")]
        if name == "nll" and case.reduction == "none":
            return promoted(of_nll)
        if name == "kl" and case.op != "kl_per_dim" and case.reduction == "none":
            raw = get("prior_logvar")
            if raw is not None and case.prior_parameterization != "logvar":
                of_kl.append(torch.empty(0, dtype=wide(*of_kl)))
            return promoted(of_kl)
        # an ELBO's terms come in one dtype
        return wide(*of_kl, *of_nll, get("weight") if case.has_nll else None)

    def gradients(self, found: Found) -> dict[str, Near]:
        case = self.case
        # an output's upstream gradient, in which that of the loss is its terms' as well
        ups: dict[str, Tensor] = {}
        for name, out in found.outputs.items():
            up = upstream(case, name, out).double()
            for to, by in (("nll", 1.0), ("kl", case.beta)) if name == "loss" else ((name, 1.0),):
                ups[to] = ups[to] + by * up if to in ups else by * up
        sums: dict[str, Near] = {}
        for output, terms, reduction, names in self.paths:
            up = ups[output]
            kept = up.abs().max() if up.numel() else up.sum()
            factor: Tensor
            jumps: Tensor | None
            factor, jumps = up, None
            if reduction is not None:
                factor, jumps = reduction.factor(up)
            for own, name in names.items():
                leaf = {"mu": "moments", "raw": "moments", "prior_mu": "prior_moments", "prior_logvar": "prior_moments"}
                holder = leaf.get(name, name) if case.op == "packed" else name
                if holder not in self.given.wanted:
                    continue
                sums[name] = self._add(
                    sums.get(name), name, self.given.tensors[holder], terms.partials[own], factor, jumps, kept
                )
        if case.op == "packed":
            return self._packed(sums)
        return sums

    def _add(
        self, so_far: Near | None, name: str, leaf: Tensor, partial: Near, factor: Tensor, jumps: Tensor | None,
        up: Tensor,
    ) -> Near:  # fmt: skip
        case, planes = self.case, False
        if name.startswith("recon") or name == "target":
            planes = bool(LIKELIHOODS[case.likelihood].planes)
            if planes:
                flat = (partial.value.shape[0], *partial.value.shape[2:])
                factor = factor.reshape(flat)
                if partial.value.dim() > factor.dim():
                    factor = factor.unsqueeze(1)
        shape = None if planes or case.op == "packed" else self.given.tensors[name].shape
        most = torch.finfo(leaf.dtype).max
        each = found = partial * factor
        # a gradient may be kept before it meets its factor, or what comes down of that, and what is subnormal or too
        # large then be lost; and in float16 a weight times what comes down be subnormal or too large
        lost = 2.0**-24 if leaf.dtype == torch.float16 and "kl_weight" in self.given.tensors else 0.0
        high = most if lost else float("inf")
        subnormal = 2.0**-125 if leaf.dtype != torch.float64 else 0.0
        found = found.wider(
            lambda: lost * partial.value.abs() + subnormal * factor.abs().maximum(up),
            lambda: (torch.maximum(each.value.abs(), partial.value.abs()) > 0.99 * most) | (factor.abs() > 0.99 * high),
            lambda: False if jumps is None else jumps,
        )
        if shape is not None and found.value.shape != shape:
            # what is expanded before a kernel sees it, in PyTorch, is added up from gradients of its own dtype
            expanded = case.num_samples or case.batch_dims != 1 or "kl_weight" in self.given.tensors
            step, least = oracle.ROUNDING[leaf.dtype if expanded else torch.float32]
            # PyTorch, which sums what was broadcast, may add up rows one after the other
            step = max(step, 2.0**-25 * partial.value.numel() / max(1, leaf.numel()))
            least = least * partial.value.numel() / max(1, leaf.numel()) if leaf.dtype == torch.float16 else 0.0

            def size() -> Tensor:
                return each.value.abs().sum_to_size(shape)

            found = found.over(lambda t: t.sum_to_size(shape))
            found = found.wider(lambda: step * size() + least, lambda: size() > 0.99 * most)
        elif name in self.given.tensors:
            found = found.over(lambda t: t.reshape(self.given.tensors[name].shape))
        if found.value.shape == leaf.shape:  # a sum of nothing may have its factor, which is infinite, afterwards
            nothing = not partial.value.numel()
            found = found.wider(loose=lambda: ~(leaf.detach().abs() <= oracle.HUGE) | nothing)
        found = found.rounded(leaf.dtype)  # by each node, before they add up, in any order
        if so_far is None:
            return found
        parts = so_far.value.abs() + found.value.abs()
        return (so_far + found).rounded(leaf.dtype).wider(loose=lambda: parts > 0.49 * most)

    def _packed(self, sums: dict[str, Near]) -> dict[str, Near]:
        found = {}
        for name, halves in (("moments", ("mu", "raw")), ("prior_moments", ("prior_mu", "prior_logvar"))):
            if name in self.given.wanted:
                found[name] = oracle.joined([sums[h] for h in halves], self.case.batch_dims)
        return found


def mu_of(given: Arguments, level: int) -> object:
    return given.of_level("mu", level) if given.case.op != "packed" else given.get("moments")


def raw_of(given: Arguments, level: int) -> object:
    return given.of_level("raw", level)


def promoted(tensors: Sequence[object]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors if isinstance(t, Tensor)))


def _finite(x: float) -> bool:
    return x == x and abs(x) != float("inf")


def _set(near: Near, at: tuple[int, ...], value: float, tolerance: float) -> None:
    bound = tolerance * max(1.0, abs(value))
    near.value[at], near.bound[at], near.free[at] = value, max(bound, near.bound[at].item()), False


# ---- the verdict

# what results are called, behind an argument's name
GRADIENT, AGAIN = "'s gradient", " once more"


def wrong(actual: Tensor, near: Near) -> Tensor:
    a, e = actual.double(), near.value
    good = (a == e) | ((a - e).abs() <= near.relative * e.abs())
    if good.all():
        return ~good
    most = torch.finfo(actual.dtype).max
    good = (a == e) | (a.isnan() & e.isnan()) | ((a - e).abs() <= near.bound) | near.free
    good = good | (near.loose & ~a.isfinite())
    # an infinity that is none in float64, and sums on whose way there is one
    over = (e.abs() + near.bound) * 1.01 >= most
    return ~(good | (over & ~a.isfinite()))


def verdicts(given: Arguments, found: Found, expected: Expected) -> dict[str, Tensor]:
    results = {}
    for name, out in found.outputs.items():
        near = expected.output(name, out.dtype)
        dtype = expected.dtype_of(name)
        if out.dtype != dtype:
            raise Wrong(f"{name} is {out.dtype}, not {dtype}")
        if out.shape != near.value.shape:
            raise Wrong(f"{name} has shape {tuple(out.shape)}, not {tuple(near.value.shape)}")
        results[name] = wrong(out, near)
    for name, near in expected.gradients(found).items():
        leaf = given.tensors[name]
        for gradients, which in ((found.gradients, ""), (found.again, AGAIN))[: 1 + given.case.twice]:
            gradient = gradients.get(name)
            if gradient is None:
                gradient = torch.zeros_like(leaf)
            if gradient.shape != leaf.shape or gradient.dtype != leaf.dtype:
                raise Wrong(f"{name}'s gradient is {tuple(gradient.shape)} {gradient.dtype}, not as {name} is")
            results[f"{name}{GRADIENT}{which}"] = wrong(gradient, near)
    return {name: bad for name, bad in results.items() if bad.any()}


def check(case: Case) -> None:
    """Raises Wrong where a result is, and AssertionError where a call changed what it was not to."""
    given = arguments(case)
    kept = {name: t.detach().clone() for name, t in given.tensors.items()}
    found = run(given)
    for name, t in given.tensors.items():
        assert torch.equal(t.detach().nan_to_num(1.5), kept[name].nan_to_num(1.5)), f"the call wrote to {name}"
    expected = Expected(given)
    bad = verdicts(given, found, expected)
    if bad and expected.nll is not None:
        sites = doubtful(given, expected)
        if expected.doubt(sites, reached(given, bad, sites)):
            bad = verdicts(given, found, expected)
        if bad:
            expected.widen()
            bad = verdicts(given, found, expected)
    if bad:
        raise Wrong("; ".join(explained(name, mask, given, found, expected) for name, mask in bad.items()))


def doubtful(given: Arguments, expected: Expected) -> Tensor:
    """The sites at which elementwise values or gradients are not the textbook's."""
    assert expected.nll is not None
    terms, params = expected.nll, expected._recon()
    sites = torch.ones_like(terms.value.loose)
    if sites.sum() <= FEW:
        return sites
    alone = replace(
        given.case, op="reconstruction_loss", shape=data_shape(given.case), reduction="none", overwrite=False,
        upstream="ones", twice=False,
    )  # fmt: skip
    full = {name: given.tensors[name].detach() for name in params}
    full = {name: t.expand(full["recon0"].shape).contiguous().requires_grad_() for name, t in full.items()}
    found = run(Arguments(alone, {**given.tensors, **full}, given.numbers, params, given.likelihood))
    weight = expected.nll_inputs()[2]
    w = torch.ones(sites.shape, dtype=torch.float64) if weight is None else weight
    right = _beside(found.outputs["nll"], terms.value * w)
    for name in params:
        near = terms.partials[name]
        planes = near.value.dim() > w.dim()
        each = _beside(found.gradients[name], near * (w.unsqueeze(1) if planes else w))
        right = right & (each.all(1) if planes else each)
    return ~right


def reached(given: Arguments, bad: dict[str, Tensor], sites: Tensor) -> Tensor:
    """Of the sites those that what is wrong comes from, where it is a value or a gradient of one, and no mixture's."""
    found = torch.zeros_like(sites)
    if not LIKELIHOODS[given.case.likelihood].planes:
        for name, mask in bad.items():
            leaf, gradient, _ = name.partition(GRADIENT)
            if (gradient and leaf.startswith("recon")) or (name == "nll" and given.case.reduction == "none"):
                found = found | mask
    return found


def _beside(found: Tensor, near: Near) -> Tensor:
    found = found.double().reshape(near.value.shape)
    return ((found - near.value).abs() <= 0.2 * near.bound) | near.free


def explained(name: str, mask: Tensor, given: Arguments, found: Found, expected: Expected) -> str:
    at = tuple(mask.nonzero()[0].tolist())
    leaf, _, which = name.partition(GRADIENT)
    if leaf != name:
        near = expected.gradients(found)[leaf]
        gradient = (found.again if which else found.gradients).get(leaf)
        actual = torch.zeros_like(given.tensors[leaf]) if gradient is None else gradient
    else:
        near, actual = expected.output(name, found.outputs[name].dtype), found.outputs[name]
    return (
        f"{name}{list(at)} is {actual[at].item()!r}, not {near.value[at].item()!r} to {near.bound[at].item():.2g} "
        f"({int(mask.sum())} of {mask.numel()} wrong)"
    )
