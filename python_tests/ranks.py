"""Runs a function in several processes of one gloo group, started from a server that has torch."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120.0  # a process that waits longer for another ends with an error


@cache
def _context() -> ForkServerContext:
    """Processes forked from one that has imported what they need: seconds each are saved."""
    context = multiprocessing.get_context("forkserver")
    # Installed modules alone: before Python 3.13 the server does not know the tests' own path.
    context.set_forkserver_preload(["pytest", "torch._dynamo", "vne_kernels.pretrain.model"])
    return context


def _process(
    function: Callable[..., Any], rank: int, world: int, folder: str, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=SECONDS),
    )
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    except BaseException:
        (Path(folder) / f"{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def run(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` gives on each of ``world`` processes, in their order.

    It must be a module's own function, and give what torch.save keeps without pickling code.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _context().Process(target=_process, args=(function, rank, world, folder, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(2 * SECONDS)
            if process.is_alive():
                process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.txt"))]
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world, "\n".join([f"exit codes {codes}", *errors])
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]
