"""What every integration does: replace, remember, restore."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple

from torch.distributions import kl

from .._checks import choice
from .._options import NOISE

_ABSENT = object()


class Coverage(NamedTuple):
    """The names of what an integration fuses, and of what looks like it and stays the library's."""

    fused: tuple[str, ...]
    left: tuple[str, ...] = ()


class Integration:
    """Replacements that hold while someone asks for them.

    ``install(undo, noise)`` makes them and leaves on the stack ``undo`` how to restore what was there. The user is one
    of those who ask; another integration that rests on this one is another, so that neither takes it from the other.
    """

    def __init__(self, install: Callable[[ExitStack, str | None], None], coverage: Callable[[], Coverage]) -> None:
        self._install, self._coverage = install, coverage
        self._undo = ExitStack()
        self._held: dict[str, str | None] = {}  # who asks, and for which noise; the last is heard
        self.noise: object = _ABSENT  # while nothing is replaced

    def hold(self, who: str, noise: str | None) -> None:
        if noise is not None:
            choice("noise", noise, NOISE)
        before = dict(self._held)
        self._held.pop(who, None)
        self._held[who] = noise
        try:
            self._settle()
        except BaseException:
            self._held = before
            raise

    def release(self, who: str) -> None:
        self._held.pop(who, None)
        self._settle()

    def _settle(self) -> None:
        asked = [*self._held.values()]
        wanted = asked[-1] if asked else _ABSENT
        if wanted == self.noise:
            return
        # also for another noise: the replacements hold it as a constant, which torch.compile traces
        self._undo.close()
        self.noise = _ABSENT
        if not asked:
            return
        with ExitStack() as undo:
            self._install(undo, asked[-1])
            self._undo = undo.pop_all()
        self.noise = wanted

    def enable(self, noise: str | None = None) -> Coverage:
        """Takes the fused path from here on, for the whole process; again, it changes the noise alone.

        Args:
            noise: ``"philox"``, drawn in the kernel from the default generator's seed; ``"torch"``, the numbers that
                the library would have drawn; or None, which is Philox but in torch.distributions' draws of fewer than
                32,768 numbers on a CPU: those are the library's own, since a kernel gains nothing there.

        Returns:
            ``Coverage(fused, left)``: the names of what is fused, and of what looks like it and stays the library's.

        Raises:
            ImportError: the library is not installed.
            ValueError: another noise.

        Example::

            vaefast.integrations.torch_distributions.enable()
            z = torch.distributions.Normal(mu, std).rsample()
        """
        self.hold("", noise)
        return self._coverage()

    def disable(self) -> None:
        """Restores exactly what was there before :meth:`enable`, if anything was replaced.

        Example::

            vaefast.integrations.torch_distributions.enable()
            vaefast.integrations.torch_distributions.disable()
        """
        self.release("")

    @contextmanager
    def enabled(self, noise: str | None = None) -> Iterator[Coverage]:
        """:meth:`enable` inside a ``with`` block; afterwards it is as before, on or off.

        Args:
            noise: as for :meth:`enable`.

        Raises:
            ImportError, ValueError: as :meth:`enable`.

        Example::

            with vaefast.integrations.torch_distributions.enabled():
                z = torch.distributions.Normal(mu, std).rsample()
        """
        on, before = "" in self._held, self._held.get("")
        covered = self.enable(noise)
        try:
            yield covered
        finally:
            self.hold("", before) if on else self.disable()


def library(module: str, package: str) -> Any:
    """An optional module; where its package is missing, the error says how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(
            f"{module} is not installed, and vaefast's integration replaces parts of it; pip install {package}"
        ) from error


def replace(undo: ExitStack, owner: Any, name: str, value: object) -> None:
    """An attribute of a class or module, that it has or inherits."""
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    undo.callback(delattr, owner, name) if before is _ABSENT else undo.callback(setattr, owner, name, before)


def replace_kl(undo: ExitStack, pairs: Iterable[tuple[type, type]], function: Callable[..., Any]) -> None:
    for pair in pairs:
        before = kl._KL_REGISTRY.get(pair)
        _set_kl(pair, function)
        undo.callback(_set_kl, pair, before)


def _set_kl(pair: tuple[type, type], function: Callable[..., Any] | None) -> None:
    if function is None:
        del kl._KL_REGISTRY[pair]
    else:
        kl._KL_REGISTRY[pair] = function
    # what torch found for pairs of types is found again, and not forgotten: torch.compile cannot trace the search
    for known in {*kl._KL_MEMOIZE, pair}:
        kl._KL_MEMOIZE[known] = kl._dispatch_kl(*known)


def replace_imported(undo: ExitStack, package: str, old: object, new: object) -> None:
    """A function wherever the package's modules have imported it, those among them that come while it is replaced."""
    _swap(package, old, new)
    undo.callback(_swap, package, new, old)


def _swap(package: str, old: object, new: object) -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package and isinstance(module, ModuleType):
            for key in [key for key, value in vars(module).items() if value is old]:
                setattr(module, key, new)
