"""The entropy of a batch that is spread over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        ctx.rows = z.shape[-2]
        return torch.cat(parts, dim=-2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every process computes the same loss of the whole batch, so each holds the same gradient
        # of it; their sum counts it world_size times, which the average of
        # DistributedDataParallel over the processes takes back.
        (grad,) = grads
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may still hold it
        dist.all_reduce(grad)
        return grad.narrow(-2, dist.get_rank() * ctx.rows, ctx.rows)


def gather(z: Tensor) -> Tensor:
    """The rows of z of all processes, in the order of their ranks, with a gradient.

    The gradient is right for a loss that every process computes from the gathered rows and that is
    averaged over processes as DistributedDataParallel does.

    Args:
        z: (..., n, d), of the same shape on every process.

    Returns:
        (..., n * world_size, d); z itself without torch.distributed or with one process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return z
    gathered: Tensor = _Gather.apply(z)
    return gathered
