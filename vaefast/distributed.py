"""The ELBO over many processes: the mean over the global batch, its logging, and noise of each rank's own.

DDP and FSDP average gradients over the ranks. With B samples in all, of which this rank has b, and N ranks,

    mean over ranks of (b N / B) * (the rank's mean)  =  the mean over all B samples,

so a rank's loss times ``b N / B`` has the gradient of one process with the whole batch, whatever b is on each. That
factor is all that ``process_group=`` is: one all-reduce of 8 bytes, which is not differentiated and waits for no
device. Ranks with equal batches have the factor 1 and need no ``process_group=`` at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from . import _args, _kl_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .reference import ELBOTerms

__all__ = ["global_mean", "loss_scale", "manual_seed"]

Value = TypeVar("Value", Tensor, "ELBOTerms")


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
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
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
    _size(batch)
    total = torch.full((), batch, dtype=torch.float64, device=loss.device)
    dist.all_reduce(total, group=group)
    return (batch * dist.get_world_size(group) / total).to(loss.dtype)


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
        if _args.floating("value", t).dim() != 0:
            raise ValueError(f"value must be 0-d, a mean over the batch, got shape {tuple(t.shape)}")
    sums = torch.stack([t.detach().double() for t in given])
    if batch is not None:
        _size(batch)
        counts = torch.full((1,), batch, dtype=torch.float64, device=sums.device)
        sums = torch.cat((sums * batch if batch else torch.zeros_like(sums), counts))
    dist.all_reduce(sums, group=group)
    means = sums / dist.get_world_size(group) if batch is None else sums[:-1] / sums[-1]
    found = [mean.to(t.dtype) for mean, t in zip(means.unbind(), given)]
    return found[0] if isinstance(value, Tensor) else type(value)(*found)


def check(process_group: object, reduction: str, likelihood: object) -> None:
    """What can be said against ``process_group=`` without communicating."""
    if process_group is None:
        return
    if isinstance(process_group, str):
        _args.choice("process_group", process_group, ("world",))
    elif not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be None, 'world' or a torch.distributed.ProcessGroup that this rank is in, "
            f"got {process_group!r}"
        )
    if reduction != "batchmean":
        raise ValueError(
            f"process_group does not go with reduction={reduction!r}: it makes 'batchmean' the mean over the global "
            "batch; sums and samples' own losses do not depend on what other ranks have. Use reduction='batchmean'"
        )
    chosen = _args.likelihood(likelihood)
    if chosen.name == "gaussian_optimal" and not chosen.options["per_sample"]:
        raise ValueError(
            "process_group does not go with 'gaussian_optimal', whose variance is that of the local batch, so that "
            "ranks would fit different models. Use Likelihood('gaussian_optimal', per_sample=True), or 'gaussian' with "
            "a trained log variance"
        )


def elbo_terms(
    plain: Callable[..., ELBOTerms],
    plain_kl: Callable[..., Tensor],
    process_group: ProcessGroup | str,
    recon: object,
    target: Tensor,
    *posterior: Any,
    reduction: str,
    likelihood: object,
    beta: Tensor | float,
    weight: Tensor | None,
    parameterization: Any,
    overwrite_recon: bool,
    **options: Any,
) -> ELBOTerms:
    """:func:`vaefast.elbo_terms` whose mean over the ranks is that of the global batch; ``plain`` and ``plain_kl`` are
    it and :func:`vaefast.gaussian_kl` without a group, of the path that calls.

    Two options bend the batch's mean: ``max(floor, m)`` of each dimension and ``|m - C|``. On which side of the bend
    the global m lies is all that other ranks have to say, so m is communicated and not differentiated.
    """
    _args.reduction_for_elbo(reduction)
    check(process_group, reduction, likelihood)
    names = _args.KLOptions._fields
    pair, o = _kl_options.checked(*posterior, parameterization, reduction, *(options[name] for name in names))
    per_dim = o.free_bits > 0 and o.free_bits_per == "batch_dim"
    inner = {**o._asdict(), "capacity": None, **({"free_bits": 0.0} if per_dim else {})}
    batch = pair.mu.shape[0]
    terms = plain(
        recon, target, *pair[:4], likelihood=likelihood, beta=beta, weight=weight, parameterization=pair.p,
        # the mean of no samples is NaN, their sum is 0
        reduction=reduction if batch else "sum", overwrite_recon=overwrite_recon, **inner,
    )  # fmt: skip
    scale = loss_scale(terms.loss, batch, process_group)
    # the loss apart: what is made of the two terms would take the backward pass out of its one kernel
    loss, nll, kl = (t * scale for t in terms)
    if per_dim:
        mu = _kl_options.wide(pair.mu)
        each = plain_kl(
            mu, *pair[1:4], parameterization=pair.p, reduction="none", balance=o.balance, symmetric=o.symmetric
        )  # fmt: skip
        means = each.sum(0) * (scale / max(1, batch))
        kl = torch.where(_mean(means, process_group) <= o.free_bits, o.free_bits, means).sum().to(kl.dtype)
    elif o.capacity is not None:
        capacity = o.capacity.to(kl.dtype) if isinstance(o.capacity, Tensor) else o.capacity
        kl = (_mean(kl, process_group) - capacity).sign().detach() * (kl - capacity)
    else:
        return terms._replace(loss=loss, reconstruction=nll, kl=kl)
    return terms._replace(loss=nll + beta * kl, reconstruction=nll, kl=kl)


def _mean(t: Tensor, process_group: ProcessGroup | str) -> Tensor:
    group = _group(process_group)
    total = t.detach().clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


def _group(process_group: ProcessGroup | str) -> ProcessGroup:
    check(process_group, "batchmean", "bernoulli")
    if process_group is None:
        raise TypeError("process_group must be 'world' or a torch.distributed.ProcessGroup, got None")
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


def _size(batch: object) -> None:
    if not isinstance(batch, (int, torch.SymInt)) or isinstance(batch, bool):
        raise TypeError(f"batch must be an int, this rank's number of samples, got {batch!r}")
    if batch < 0:
        raise ValueError(f"batch must be at least 0, got {batch}")
