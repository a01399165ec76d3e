"""One of the processes of test_losses: a module of its own, so that spawn can import it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from cases import gaussian, generator, views
from torch import Tensor, nn

from vne_kernels import DoELoss

WORLD_SIZE = 2
BETA = 2.5


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def projector() -> nn.Linear:
    """The same weights in every process."""
    model = nn.Linear(12, 6, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(gaussian(6, 12, generator(3)))
        model.bias.copy_(gaussian(1, 6, generator(4))[0])
    return model


def batch() -> tuple[Tensor, Tensor]:
    """The whole batch, two views."""
    return views("iid", (16, 12), torch.float64)


def train_step(rank: int, port: int, folder: str) -> None:
    """Takes this process's share of the batch through DistributedDataParallel.

    Saves the loss, the loss without gathering, and the gradients after averaging.
    """
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    model = nn.parallel.DistributedDataParallel(projector())
    x1, x2 = (x.chunk(WORLD_SIZE)[rank] for x in batch())
    loss = DoELoss(beta=BETA, gather_distributed=True)(model(x1), model(x2))
    loss.backward()
    with torch.no_grad():
        local = DoELoss(beta=BETA)(model(x1), model(x2))
    grads = [parameter.grad for parameter in model.parameters()]
    torch.save((loss.detach(), local, grads), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
