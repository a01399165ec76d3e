"""Collectives over the processes of a group: torch's functional ones, which can be compiled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vne_kernels._core.checks import DTYPES


def all_reduce_async(x: Tensor, group_name: str) -> Tensor:
    """The sum over the processes of a tensor of the same shape on all, after `wait`."""
    pending: Tensor = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group_name)
    return pending


def all_gather_async(x: Tensor, group_name: str, world: int) -> Tensor:
    """The tensors of all, of the same shape, behind each other along dimension 0, after `wait`."""
    gather = torch.ops._c10d_functional.all_gather_into_tensor
    pending: Tensor = gather(x.contiguous(), world, group_name)
    return pending


def wait(pending: Tensor) -> Tensor:
    result: Tensor = torch.ops._c10d_functional.wait_tensor(pending)
    return result


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    return wait(all_reduce_async(x, group_name))


def exchange_sizes(z: Tensor, weighted: bool, group_name: str, world: int) -> list[int]:
    """The rows of every process, after a check that their tensors go together.

    The check stops every process, where a collective of other sizes would hang.
    """
    own = [z.shape[-2], z.shape[-1], z.shape[:-2].numel(), DTYPES.index(z.dtype), int(weighted)]
    mine = torch.tensor([own], device=z.device)
    gathered = wait(all_gather_async(mine, group_name, world)).tolist()
    for rank, theirs in enumerate(gathered):
        if theirs[1:] != own[1:]:
            raise ValueError(
                "z must have the same d, batch and dtype, and weights or none, on every process, "
                f"got {_format(own)} here and {_format(theirs)} on process {rank} of the group"
            )
    sizes = [theirs[0] for theirs in gathered]
    if sum(sizes) == 0:
        raise ValueError(f"z must be (..., n, d) with n >= 1 on some process, got {tuple(z.shape)}")
    return sizes


def _format(stats: Sequence[int]) -> str:
    n, d, batch, dtype, weighted = stats
    weights = "with weights" if weighted else "without weights"
    return f"n = {n}, d = {d}, a batch of {batch}, {DTYPES[dtype]} {weights}"
