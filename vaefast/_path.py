"""The path from a bound through its draws to the encoder: that there is one, and what its gradient is multiplied by."""

from __future__ import annotations

import torch
from torch import Tensor

from ._functorch import unseen
from ._torch import trained


class Scaled:
    """A hook on draws ``[K, *batch, ...]``, whose gradient it multiplies."""

    def __init__(self, share: Tensor) -> None:
        self.share = share

    def __call__(self, gradient: Tensor) -> Tensor:
        share = self.share.to(gradient.dtype)
        return gradient * share.view(*share.shape, *(1,) * (gradient.dim() - share.dim()))


def scale_path(estimator: str, z: Tensor, mu: Tensor, logvar: Tensor, recon: object, share: Tensor | None) -> None:
    """Has z's gradient multiplied by the share, if there is one; raises where the encoder would not be reached."""
    if not torch.is_grad_enabled():
        return
    if not z.requires_grad:
        if trained(mu, logvar):
            raise ValueError(
                f"estimator={estimator!r} reaches the encoder through z alone, but z does not require grad; draw it by "
                "reparameterize(mu, logvar, num_samples=K) and do not detach it"
            )
        return
    if share is None:
        return
    if unseen(z):
        if any(isinstance(hook, Scaled) for hook in (z._backward_hooks or {}).values()):
            raise ValueError(
                f"z has a loss with estimator={estimator!r} already, and a second one would scale its gradient twice; "
                "draw another z, or compute what is not trained under torch.no_grad()"
            )
        params = [recon] if isinstance(recon, Tensor) else list(recon)  # type: ignore[call-overload]
        if not any(comes_from(p, z) for p in params if isinstance(p, Tensor)):
            raise ValueError(
                f"estimator={estimator!r} scales the gradient that arrives at z, but recon was not computed from this "
                "tensor: recon = decode(z), and the same z in the call, not a view or a copy of it"
            )
    z.register_hook(Scaled(share))


def comes_from(x: Tensor, z: Tensor) -> bool:
    """Whether x's graph has z in it."""
    if x is z:
        return True
    left, seen = [x.grad_fn], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if node is z.grad_fn or getattr(node, "variable", None) is z:
            return True
        seen.add(node)
        left += [next_node for next_node, _ in node.next_functions]
    return False
