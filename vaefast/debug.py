"""Where NaN begins: a guard that looks at what goes into vaefast's calls and comes out of them, on the device."""

from __future__ import annotations

import os
import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backends, reference
from ._checks import choice
from ._functorch import unseen
from ._options import Likelihood
from .likelihoods import entry_of

__all__ = ["Finding", "NanGuard", "nan_guard"]

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
# what a number is told by; no count of what was looked at comes near
_NEVER = 2**62
# the arguments of an engine's functions as users call them, by position; groups have names of their own
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "sample": ("mu", "raw", "", "eps"),
    "posterior": ("mu", "raw", "prior_mu", "prior_logvar", "", "", "", "eps"),
    "sample_with_kl": ("", "", "", "eps"),
    "reconstruction": ("params", "target", "weight", "likelihood"),
    "fused_elbo": (
        "", "params", "target", "weight", "likelihood", "", "mu", "raw", "prior_mu", "prior_logvar", "", "beta",
    ),
    "multi": ("mus", "raws", "prior_mus", "", "prior_logvars"),
}  # fmt: skip
_NAMES = {"raw": "logvar", "raws": "logvars"}
_OUTPUTS: dict[str, str] = {
    "sample": "z", "kl": "kl", "multi_kl": "kl", "nll": "nll", "reconstruction": "nll", "fused_elbo": "loss",
}  # fmt: skip


# function, where, role, name
Site = tuple[str, str, str, str]


class Finding(NamedTuple):
    """The first tensor that was not finite: of which call, where that stands, what of it, and what it held.

    ``role`` is ``"argument"``, ``"result"`` or ``"gradient"``; ``kind`` is ``"NaN"`` or ``"infinity"``; ``call`` counts
    from 1 what the guard saw; an ELBO with options of the KL counts as two, its terms.

    Example::

        with vaefast.debug.nan_guard(on_exit="ignore") as guard:
            z = vaefast.reparameterize(mu, logvar)
        print(guard.first() or "all finite")
    """

    function: str
    where: str
    call: int
    role: str
    name: str
    kind: str

    def __str__(self) -> str:
        what = f"the {self.role} of {self.name}" if self.role == "gradient" else f"{self.role} {self.name}"
        return f"{self.function} at {self.where}, call {self.call}: {what} has {self.kind}. {self._remedy()}"

    def _remedy(self) -> str:
        if self.role == "argument":
            if self.name in ("target", "weight"):
                return "It is the data's: vaefast.check names the element; weight= hides what is missing."
            return (
                "It came so from the network, before this call: look at its input, lower the learning rate, or clip "
                "gradients by torch.nn.utils.clip_grad_norm_."
            )
        if self.role == "result":
            return (
                "What went in was finite: a scale is too large or too small for it, so clamp it, as "
                "parameterization=vaefast.Parameterization('logvar', clamp=(-30.0, 20.0)) does; or data lie outside "
                "the likelihood's domain, which vaefast.check names."
            )
        return (
            "All that the guard saw before was finite: clamp logvar, lower the learning rate, or clip gradients. Under "
            "float16, GradScaler's first steps overflow like this and are skipped."
        )


class NanGuard:
    """What :func:`vaefast.debug.nan_guard` gives; its questions wait for the device, and nothing else does.

    Example::

        with vaefast.debug.nan_guard(on_exit="ignore") as guard:
            loss = vaefast.elbo_loss(decoder(z), x, mu, logvar)
        print(guard.report())
    """

    def __init__(self) -> None:
        # of each look, in their order, the site and the call
        self._seen, self._calls_of = array("q"), array("q")
        self._sites: dict[Site, int] = {}
        self._first: dict[torch.device, Tensor] = {}
        self._lock = threading.Lock()
        self._open, self._calls = True, 0
        self._of_leaves: dict[int, Any] = {}

    def first(self) -> Finding | None:
        """The first tensor that was not finite, or None. Waits for the devices.

        Example::

            with vaefast.debug.nan_guard() as guard:
                vaefast.elbo_loss(decoder(z), x, mu, logvar).backward()
                assert guard.first() is None
        """
        looks = [int(found.item()) for found in self._first.values()]
        least = min(looks, default=_NEVER)
        if least >= _NEVER:
            return None
        look, infinite = divmod(least, 2)
        function, where, role, name = list(self._sites)[self._seen[look]]
        return Finding(function, where, self._calls_of[look], role, name, "infinity" if infinite else "NaN")

    def report(self) -> str:
        """:meth:`first` in words, with what to do; empty while all is finite. Waits for the devices.

        Example::

            with vaefast.debug.nan_guard() as guard:
                vaefast.elbo_loss(decoder(z), x, mu, logvar).backward()
                print(guard.report())
        """
        found = self.first()
        return "" if found is None else str(found)

    # -- looking

    def _look(self, x: Tensor, hidden: Tensor | None, call: int, site: Site) -> None:
        """One reduction of x and a few operations of one number; nothing waits for them."""
        with torch.no_grad():
            if hidden is not None:
                x = x.masked_fill(hidden, 0.0)
            if not x.numel():
                return
            least, most = torch.aminmax(x)
            with self._lock:
                look = len(self._seen)
                self._seen.append(self._sites.setdefault(site, len(self._sites)))
                self._calls_of.append(call)
                first = self._first.get(x.device)
                if first is None:
                    with torch.inference_mode(False):
                        first = torch.full((), _NEVER, dtype=torch.int64, device=x.device)
                    self._first[x.device] = first
            infinite = torch.where(torch.isinf(least) | torch.isinf(most), 2 * look + 1, _NEVER)
            torch.minimum(first, torch.where(torch.isnan(most), 2 * look, infinite), out=first)

    def _watch(self, method: str, f: Callable[..., Any], args: Sequence[Any]) -> Any:
        function, where = _caller(sys._getframe(2))
        with self._lock:
            self._calls += 1
            call = self._calls
        for name, x, hidden in _named(method, args):
            if _plain(x):
                self._look(x, hidden, call, (function, where, "argument", name))
                self._hook(x, call, (function, where, "gradient", name))
        result = f(*args)
        for name, x in _results(method, args, result):
            if _plain(x):
                self._look(x, None, call, (function, where, "result", name))
                self._hook(x, call, (function, where, "gradient", name))
        return result

    def _hook(self, x: Tensor, call: int, site: Site) -> None:
        """What x's gradient is, when there is one; a leaf, which outlives its graphs, tells of its last call."""
        if not x.requires_grad or not torch.is_grad_enabled():
            return

        def look(gradient: Tensor) -> None:
            if self._open and _plain(gradient):
                self._look(gradient, None, call, site)

        hook = x.register_hook(look)
        if x.is_leaf:
            before = self._of_leaves.get(id(x))
            if before is not None:
                before.remove()
            self._of_leaves[id(x)] = hook

    def _close(self) -> None:
        self._open = False
        for hook in self._of_leaves.values():
            hook.remove()
        self._of_leaves.clear()


def _plain(x: Tensor) -> bool:
    return bool(unseen(x)) and not x.is_meta and x.layout is torch.strided and not bool(x.is_nested)


class _Watched:
    """An engine whose primitives are looked at."""

    def __init__(self, engine: Any, guard: NanGuard) -> None:
        self._engine, self._guard = engine, guard

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)
        if name in ("noise", "parameters"):
            return found
        return lambda *args: self._guard._watch(name, found, args)


def _caller(frame: FrameType | None) -> tuple[str, str]:
    """The function of vaefast that was called, and the line that calls it."""
    name = "vaefast"
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        code = frame.f_code
        owner = frame.f_locals.get("self")
        inner = owner is None or type(owner).__name__ in ("Functions", "_Watched", "NanGuard")
        name = code.co_name if inner else f"{type(owner).__name__}.{code.co_name}"
        frame = frame.f_back
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE) and _within_torch(frame):
            frame = frame.f_back  # a module's call goes through torch
    if frame is None:
        return name, "an unknown place"
    return name, f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _within_torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("torch.nn.modules.")


def _named(method: str, args: Sequence[Any]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """The tensors of a primitive's arguments by the public names, each with where a weight hides it."""
    given: dict[str, Any] = {}
    for name, value in zip(_ARGUMENTS.get(method, ("",) * len(args)), args):
        if hasattr(value, "_fields"):  # a group's
            given |= dict(zip(value._fields, value))
        elif name:
            given[name] = value
    likelihood = given.pop("likelihood", None)
    params, weight, there = given.pop("params", ()), given.get("weight"), given.pop("there", None)
    entry = entry_of(likelihood.name) if isinstance(likelihood, Likelihood) else None
    for k, x in enumerate(params):
        if isinstance(x, Tensor):
            name = "recon" if len(params) == 1 or entry is None else f"recon's {entry.params[k]}"
            yield name, x, _hidden(x, weight, likelihood, params[0])
    for name, value in given.items():
        name = _NAMES.get(name, name)
        several = isinstance(value, (list, tuple))
        for k, x in enumerate(value if several else [value]):
            if isinstance(x, Tensor) and x.is_floating_point():
                hidden = _hidden(x, weight, likelihood, params[0]) if name == "target" else None
                if there is not None:  # of experts
                    hidden = ~there.view(*there.shape, *(1,) * (x.dim() - there.dim()))
                yield f"{name}[{k}]" if several else name, x, hidden


def _hidden(x: Tensor, weight: Tensor | None, likelihood: Likelihood, first: Tensor) -> Tensor | None:
    """Where a weight of 0 hides x; of a parameter that is broadcast, nowhere."""
    if weight is None:
        return None
    hidden, dims = weight == 0, x.dim()
    if "dim" in likelihood.options and dims == first.dim():  # a weight lacks the dimension of the planes
        behind = dims - 1 - int(likelihood.options["dim"]) % dims
        if hidden.dim() > behind:
            hidden = hidden.unsqueeze(hidden.dim() - behind)
    if hidden.dim() > dims or any(n not in (1, m) for n, m in zip(hidden.shape[::-1], x.shape[::-1])):
        return None
    return hidden


def _results(method: str, args: Sequence[Any], result: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(result, Tensor):
        yield _OUTPUTS.get(method, "result"), result
        return
    flat: list[Any] = [x for part in result for x in (part if isinstance(part, (list, tuple)) else [part])]
    names: Sequence[str] = getattr(result, "_fields", ())
    if method == "experts":
        names = ("mu", "logvar")
    if method == "fused_elbo" and len(flat) == 3:
        names = ("loss", "reconstruction", "kl")
    for k, x in enumerate(flat):
        last = k == len(flat) - 1
        kl_last = method in ("sample_with_kl", "multi", "multi_sample_with_kl") or (
            method in ("posterior", "packed") and bool(args[-1])
        )
        name = names[k] if names else "kl" if last and kl_last else "z" if len(flat) <= 2 else f"z[{k}]"
        yield name, x


@contextmanager
def nan_guard(*, on_exit: str = "raise") -> Iterator[NanGuard]:
    """Inside the ``with`` block, notes which call of vaefast first has NaN or infinity in an argument, a result or a
    gradient.

    Each tensor costs one more reduction and a few tiny kernels, and nothing waits for them: the answer is kept in 8
    bytes on the device, until :meth:`NanGuard.report` asks or the block ends. What a weight of 0 hides is not looked
    at. Outside the block nothing is changed: calls take the way that they always take.

    It works in eager mode, on a CPU and on a GPU, with kernels and without. Inside a function that ``torch.compile``
    compiled, under a transform of ``torch.func`` and in tensors that are made of others (DTensor) it sees nothing.

    Args:
        on_exit: ``"raise"`` raises when the block ends, ``"ignore"`` leaves it at :meth:`NanGuard.report`. Where the
            block ends by another exception, that one goes on.

    Raises:
        FloatingPointError: at the block's end, if something was not finite; its text is :meth:`NanGuard.report`'s.
        ValueError: another ``on_exit``.

    Example::

        with vaefast.debug.nan_guard() as guard:
            loss = vaefast.elbo_loss(decoder(z), x, mu, logvar)
            loss.backward()
    """
    choice("on_exit", on_exit, ("raise", "ignore"))
    guard = NanGuard()
    # where every call asks for its engine: the short way's too, and those of vaefast.reference
    places: list[Any] = [_backends, reference._functions.engines]
    before = [(place, name, getattr(place, name)) for place in places for name in ("direct", "engine")]
    kept: dict[int, _Watched] = {}  # one for each engine: callers ask whether two are the same

    def watched(choose: Callable[..., Any]) -> Callable[..., Any]:
        def chosen(*args: Any, **options: Any) -> Any:
            engine = choose(*args, **options)
            if engine is None or torch.compiler.is_compiling():
                return engine
            return kept.setdefault(id(engine), _Watched(engine, guard))

        return chosen

    for place, name, choose in before:
        setattr(place, name, watched(choose))
    try:
        yield guard
    finally:
        for place, name, choose in before:
            setattr(place, name, choose)
        guard._close()
    if on_exit == "raise":
        found = guard.first()
        if found is not None:
            raise FloatingPointError(str(found))
