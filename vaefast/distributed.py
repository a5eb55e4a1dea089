"""The ELBO over many processes: the mean over the global batch, its logging, and noise of each rank's own.

DDP and FSDP average gradients over the ranks. With B samples in all, of which this rank has b, and N ranks,

    mean over ranks of (b N / B) * (the rank's mean)  =  the mean over all B samples,

so a rank's loss times ``b N / B`` has the gradient of one process with the whole batch, whatever b is on each. That
factor is all that ``process_group=`` is: one all-reduce of 8 bytes, which is not differentiated and waits for no
device. Ranks with equal batches have the factor 1 and need no ``process_group=`` at all.
"""

from __future__ import annotations

import hashlib
import math
import operator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ._checks import choice, floating, is_whole
from ._options import ELBOTerms, Likelihood

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["global_mean", "loss_scale", "manual_seed"]

Value = TypeVar("Value", Tensor, ELBOTerms)


def manual_seed(seed: int, rank: int | None = None) -> int:
    """``torch.manual_seed``, but another stream of noise on each rank from one seed.

    The rank's seed is ``hash(seed) + rank``: ranks of a run never share one, and neighbouring seeds have nothing in
    common, as ``seed + rank`` would (rank 1 of seed 0 is rank 0 of seed 1). The hash has 62 bits and is the same on
    every machine. Noise goes by the default generator, as ever: its state on each rank is what a checkpoint must hold.

    Weights are another matter: FSDP takes each rank's own, so make them under the same ``torch.manual_seed(seed)``
    everywhere, and call this afterwards. Ranks that share samples, as in tensor parallelism, must share noise too: give
    them one ``rank``.

    Args:
        seed: the run's, the same on every rank.
        rank: a number of its own for each rank, at least 0; None is that in the default process group, 0 without one.

    Returns:
        The seed that the generators of this process, CPU and CUDA, now have.

    Raises:
        TypeError, ValueError: a seed or a rank that is no int; a rank below 0.

    Example::

        torch.manual_seed(seed)
        model = VAE()
        vaefast.distributed.manual_seed(seed)
    """
    if rank is None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    for name, value in (("seed", seed), ("rank", rank)):
        if not is_whole(value):
            raise TypeError(f"{name} must be an int, got {value!r}")
    seed, rank = operator.index(seed), operator.index(rank)
    if rank < 0:
        raise ValueError(f"rank must be at least 0, got {rank}")
    digest = hashlib.sha256(f"vaefast {seed}".encode()).digest()
    # the CPU's generator looks at the low 32 bits alone: there too a sum keeps ranks apart, as a hash of both might not
    mine = (int.from_bytes(digest[:8], "little") >> 2) + rank
    torch.manual_seed(mine)
    return mine


def loss_scale(loss: Tensor, batch: int, process_group: ProcessGroup | str) -> Tensor:
    """``b N / B``: times this, a rank's mean over its own b samples averages over N ranks to the mean over all B.

    For losses that are put together by hand, of several levels or of terms that are not vaefast's: one communication
    for the whole of it. :func:`vaefast.elbo_loss` does this itself with ``process_group=``.

    Args:
        loss: whose dtype and device the factor is to have; its value plays no part.
        batch: b, this rank's samples in the step; 0 gives 0 (give such a rank a loss of 0, not the mean of nothing).
        process_group: over whose ranks gradients are averaged; ``"world"`` is the default group.

    Returns:
        A 0-d tensor without gradient, from one all-reduce of one float64 (exact to 2^53 samples).

    Raises:
        TypeError, ValueError: no process group, or one that this rank is not in; a batch that is no int, or below 0.

    Example::

        loss = sum(kls) + nll
        loss = loss * vaefast.distributed.loss_scale(loss, len(x), "world")
    """
    group = _group(process_group)
    return _scale(_size(batch), loss, group).to(loss.dtype)


def global_mean(value: Value, process_group: ProcessGroup | str, *, batch: int | None = None) -> Value:
    """The mean over the global batch, for logging, from each rank's loss or :class:`vaefast.ELBOTerms`.

    Args:
        value: this rank's 0-d tensor, or several in ``ELBOTerms``, in nats.
        process_group: as for :func:`loss_scale`.
        batch: None for what ``elbo_loss`` or ``elbo_terms`` returned with ``process_group=``, whose mean over the ranks
            is wanted. Else how many samples ``value`` is the mean of; on a rank with 0 it is not looked at.

    Returns:
        The same on every rank, without gradient, like ``value``; from one all-reduce of a float64 for each tensor (and
        one for ``batch``). Nothing waits for the device until ``.item()`` does.

    Raises:
        TypeError, ValueError: no process group, or one that this rank is not in; a tensor that is not 0-d.

    Example::

        terms = vaefast.elbo_terms(decoder(z), x, mu, logvar, process_group="world")
        elbo = -vaefast.distributed.global_mean(terms.loss, "world")
    """
    group = _group(process_group)
    given: tuple[Tensor, ...] = (value,) if isinstance(value, Tensor) else tuple(value)
    for t in given:
        if floating("value", t).dim() != 0:
            raise ValueError(f"value must be 0-d, a mean over the batch, got shape {tuple(t.shape)}")
    sums = torch.stack([t.detach().double() for t in given])
    if batch is not None:
        batch = _size(batch)
        counts = torch.full((1,), batch, dtype=torch.float64, device=sums.device)
        sums = torch.cat((sums * batch if batch else torch.zeros_like(sums), counts))
    dist.all_reduce(sums, group=group)
    means = sums / dist.get_world_size(group) if batch is None else sums[:-1] / sums[-1]
    found = [mean.to(t.dtype) for mean, t in zip(means.unbind(), given)]
    return found[0] if isinstance(value, Tensor) else type(value)(*found)


def _scale(batch: int, like: Tensor, group: ProcessGroup) -> Tensor:
    total = torch.full((), batch, dtype=torch.float64, device=like.device)
    dist.all_reduce(total, group=group)
    return batch * dist.get_world_size(group) / total


def check(process_group: object, reduction: str, chosen: Likelihood) -> None:
    """What can be said against ``process_group=`` without communicating."""
    _check_group(process_group)
    if reduction != "batchmean":
        raise ValueError(
            f"process_group does not go with reduction={reduction!r}: it makes 'batchmean' the mean over the global "
            "batch; sums and samples' own losses do not depend on what other ranks have. Use reduction='batchmean'"
        )
    if chosen.name == "gaussian_optimal" and not chosen.options["per_sample"]:
        raise ValueError(
            "process_group does not go with 'gaussian_optimal', whose variance is that of the local batch, so that "
            "ranks would fit different models. Use Likelihood('gaussian_optimal', per_sample=True), or 'gaussian' with "
            "a trained log variance"
        )


def _check_group(process_group: object) -> None:
    if isinstance(process_group, str):
        choice("process_group", process_group, ("world",))
    elif not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be None, 'world' or a torch.distributed.ProcessGroup that this rank is in, "
            f"got {process_group!r}"
        )


class GlobalMean:
    """The mean over the global batch, as ``_compose.Mean``: what this rank has averages over the ranks to it.

    Two options bend the batch's mean m: ``max(floor, m)`` of each dimension and ``|m - C|``. On which side of the bend
    the global m lies is all that other ranks have to say, so m is communicated and not differentiated.
    """

    def __init__(self, process_group: ProcessGroup | str, mu: Tensor, batch_dims: int = 1) -> None:
        self.group = _group(process_group)
        self.scale = _scale(math.prod(mu.shape[:batch_dims]), mu, self.group)

    def reduction(self, batch: int) -> str:
        # the mean of no samples is NaN, their sum is 0
        return "batchmean" if batch else "sum"

    def share(self, term: Tensor) -> Tensor:
        return term * self.scale.to(term.dtype)

    def floored(self, sums: Tensor, floor: float, batch: int, reduction: str) -> Tensor:
        means = self.share(sums) / max(1, batch)
        return torch.where(self._over_ranks(means) <= floor, floor, means).sum()

    def distance(self, share: Tensor, capacity: Tensor | float, batch: int, reduction: str) -> Tensor:
        return (self._over_ranks(share) - capacity).sign() * (share - capacity)

    def _over_ranks(self, t: Tensor) -> Tensor:
        total = t.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total / dist.get_world_size(self.group)


def _group(process_group: ProcessGroup | str) -> ProcessGroup:
    _check_group(process_group)
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"process_group={process_group!r} needs a process group; call torch.distributed.init_process_group() "
            "first, in each process that torchrun starts"
        )
    if not isinstance(process_group, str):
        return process_group
    world = dist.group.WORLD
    assert world is not None  # as it is initialized
    return world


def _size(batch: object) -> int:
    if not isinstance(batch, torch.SymInt) and not is_whole(batch):
        raise TypeError(f"batch must be an int, this rank's number of samples, got {batch!r}")
    if batch < 0:
        raise ValueError(f"batch must be at least 0, got {batch}")
    size: int = batch if isinstance(batch, torch.SymInt) else operator.index(batch)  # type: ignore[assignment]
    return size
