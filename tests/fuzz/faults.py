"""Faults as people make them, planted in Python's entries, that the fuzzer must find."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vaefast import _gaussian, _native


@contextlib.contextmanager
def a_sign_in_a_gradient() -> Iterator[None]:
    """The prior's mean is pulled away from the posterior's, in PyTorch's engine."""
    sound = _gaussian.kl_with_gradients

    def broken(*args: Any) -> Any:
        value, gradients = sound(*args)
        if len(gradients) > 2:
            gradients[2] = (gradients[2][0], -gradients[2][1])
        return value, gradients

    with mock.patch.object(_gaussian, "kl_with_gradients", broken):
        yield


@contextlib.contextmanager
def an_unmasked_tail() -> Iterator[None]:
    """The last element counts whatever the mask says, as where a vector's tail loads its mask apart."""
    sound = _native.Compiled.reconstruction

    def broken(self: Any, params: Any, target: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
        if weight is not None and weight.numel() > 1:
            last = torch.arange(weight.numel()).view(weight.shape) == weight.numel() - 1
            weight = torch.where(last, torch.ones_like(weight), weight)
        return sound(self, params, target, weight, *rest)

    with mock.patch.object(_native.Compiled, "reconstruction", broken):
        yield


@contextlib.contextmanager
def a_counter_used_twice() -> Iterator[None]:
    """Elements 4 to 7 get the noise of the four before them."""
    sound = _native.Compiled.posterior

    def broken(self: Any, mu: Tensor, raw: Tensor, *rest: Any) -> list[Tensor]:
        *_, eps, _, with_sample, _ = rest
        found = sound(self, mu, raw, *rest)
        if with_sample and eps is None and mu.numel() >= 8:
            with torch.no_grad():
                flat = found[0].reshape(-1)
                flat[4:8] = flat[:4] - mu.reshape(-1)[:4] + mu.reshape(-1)[4:8]
                found[0].copy_(flat.view(found[0].shape))
        return found

    with mock.patch.object(_native.Compiled, "posterior", broken):
        yield


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "a sign in a gradient": a_sign_in_a_gradient,
    "an unmasked tail": an_unmasked_tail,
    "a counter used twice": a_counter_used_twice,
}
