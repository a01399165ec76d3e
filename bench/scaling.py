"""What the loss of a batch spread over processes costs: time, bytes, memory, and a model of it.

    python bench/scaling.py                # 1 to 4 gloo processes: results/scaling.csv and .json
    python bench/scaling.py --fit-only     # fits the model again, from the results file alone

Every process has n rows of d features and computes `doe_loss(..., group=...)` with its gradient, by
either route (vne_kernels/distributed.py). The same call is timed with its collectives replaced by
copies of their results, in all processes at once: the difference is the time of the transport. The
model, fitted to all rows:

    time = crowding * (computing + latency * messages + bytes / bandwidth)

Crowding is the number of processes per core; messages and bytes are those of ring algorithms: per
process 2 (P - 1) messages and 2 (P - 1) / P of the tensor for an all-reduce, P - 1 of each for an
all-gather. The model is also fitted without the largest number of processes, to predict it.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import machine
import numpy as np
import pandas as pd
import runner
import torch
import torch.distributed as dist
from torch import Tensor

from vne_kernels import distributed, doe_loss
from vne_kernels._core import collectives
from vne_kernels.common.files import write_json

SIZES = tuple(itertools.product((32, 128), (128, 256, 512)))  # rows of each process, features
COLUMNS = (
    *("date", "commit", "torch", "device_name", "cores", "processes", "route", "n", "d"),
    *("samples", "time_p20_ms", "time_p50_ms", "time_p80_ms"),
    *("computing_p50_ms", "computing_of_many_p50_ms"),
    *("messages", "ring_bytes", "loopback_bytes", "peak_mib"),
)
SHOWN = ("time_p50_ms", "computing_p50_ms", "ring_bytes", "loopback_bytes", "peak_mib")
#: Of ResNet-50 and the paper's projector for ImageNet: what DistributedDataParallel reduces anyway.
DDP_PARAMETERS = 32_958_016


@dataclass(frozen=True)
class Case:
    processes: int
    route: str
    n: int
    d: int


def many_rows(results: Sequence[Tensor], d: int) -> list[Tensor]:
    """The results of the reduce route as if there were 4 d rows: of few, its matrix lacks rank.

    The first result that a call waits for is (d + 1, d): the rows' own matrices and their number.
    """
    z = torch.randn(4 * d, d, generator=torch.Generator().manual_seed(0))
    total = torch.ops.vne_kernels.density(z, z.new_ones(4 * d), True, 1e-12)
    return [torch.cat([total, z.new_full((1, d), 4.0 * d)]), *results[1:]]


def samples(call: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each call, of the slowest process: they begin together."""
    for _ in range(3):
        call()
    found: list[float] = []
    enough = torch.zeros(1)
    begin = time.perf_counter()
    while not enough.item():
        dist.barrier()
        start = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start))
        enough[0] = float(time.perf_counter() - begin > seconds and len(found) >= 5)
        dist.all_reduce(enough, dist.ReduceOp.MAX)  # all stop at the same call
    slowest = torch.tensor(found)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.tolist()


def computing_ms(call: Callable[[], object], results: Sequence[Tensor], seconds: float) -> str:
    """The median where every collective is a copy of its result: the work of this process."""
    following = itertools.cycle(results)
    with patch.multiple(
        collectives,
        all_reduce_async=lambda x, name: x.contiguous(),
        all_gather_async=lambda x, name, world: x.contiguous(),
        wait=lambda pending: next(following).clone(),
    ):
        return f"{statistics.median(samples(call, seconds)):.5g}"


def loopback_bytes() -> int:
    """Sent by all processes of this network namespace over the loopback device so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.split()[0] == "lo:")


def measured_here(case: Case, seconds: float) -> runner.Row:
    """The row of a case, in one of its processes."""
    g = torch.Generator().manual_seed(dist.get_rank())
    z1 = torch.randn(case.n, case.d, generator=g, requires_grad=True)
    z2 = (z1.detach() + 0.3 * torch.randn(case.n, case.d, generator=g)).requires_grad_()

    def call() -> object:
        loss = doe_loss(z1, z2, beta=10.0, group=dist.group.WORLD, max_rows=case.n)
        return torch.autograd.grad(loss, (z1, z2))

    results: list[Tensor] = []  # of the collectives of one call
    wait = collectives.wait

    def recorded(pending: Tensor) -> Tensor:
        results.append(wait(pending).clone())
        return results[-1]

    with patch.multiple(collectives, wait=recorded):
        call()
    row: runner.Row = {"computing_p50_ms": computing_ms(call, results, seconds)}
    if case.processes == 1 and case.route == "reduce":
        many = many_rows(results, case.d)
        row["computing_of_many_p50_ms"] = computing_ms(call, many, seconds)
    times = samples(call, seconds)
    dist.barrier()
    before = loopback_bytes()
    for _ in range(20):
        call()
    dist.barrier()
    moved = (loopback_bytes() - before) / 20 / case.processes
    peak = machine.peak_bytes(call, torch.device("cpu"))
    dist.barrier()
    messages, sent = traffic(case.route, case.processes, case.n, case.d)
    quantiles = zip((20, 50, 80), np.percentile(times, [20, 50, 80]), strict=True)
    return row | {
        "cores": len(os.sched_getaffinity(0)),
        "samples": len(times),
        **{f"time_p{p}_ms": f"{ms:.5g}" for p, ms in quantiles},
        "messages": messages,
        "ring_bytes": f"{sent:.0f}",
        "loopback_bytes": f"{moved:.0f}",
        "peak_mib": "" if math.isnan(peak) else f"{peak / 2**20:.4g}",
    }


def one_process(rank: int, folder: str, case: Case, seconds: float) -> runner.Row:
    torch.set_num_threads(1)
    store, world = f"file://{folder}/store", case.processes
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    route: dict[str, Callable[..., Any]] = {"takes_gather": lambda *_: case.route == "gather"}
    if world == 1:  # a group of one would take the plain loss: there were nothing to compare with
        route["process_group"] = lambda group: group
    try:
        with patch.multiple(distributed, **route):
            return measured_here(case, seconds)
    finally:
        dist.destroy_process_group()  # if this process fails, the others fail too


def measure(case: Case, seconds: float) -> list[runner.Row]:
    """Forks the processes of a case; the row of the first of them."""
    pool = ProcessPoolExecutor(case.processes, multiprocessing.get_context("fork"))
    with tempfile.TemporaryDirectory() as folder, pool:
        ranks = range(case.processes)
        begun = [pool.submit(one_process, rank, folder, case, seconds) for rank in ranks]
        return [future.result() for future in begun][:1]


def traffic(route: str, world: int, n: int, d: int) -> tuple[int, float]:
    """Messages and bytes of one process for a loss with its gradient, by ring algorithms.

    "reduce" sums the matrix and the row counts, "gather" gathers rows and which of them count; both
    sum the cosine and the number of pairs, and two numbers for the gradient.
    """
    summed = 4 + ((d + 1) * d if route == "reduce" else 0)
    gathered = 0 if route == "reduce" else n * (d + 1)
    return 6 * (world - 1), 4 * (world - 1) * (2 * summed / world + gathered)


def modelled(rows: Any, model: dict[str, float]) -> Any:
    """Milliseconds of a row, or of all rows of a data frame."""
    crowding = np.maximum(1, rows["processes"] / rows["cores"])  # of computing, it was measured
    transport = model["message_ms"] * rows["messages"] + model["byte_ms"] * rows["ring_bytes"]
    return rows["computing_p50_ms"] + crowding * transport


def fit(rows: pd.DataFrame) -> dict[str, float]:
    """Latency of a message and time of a byte, in ms, from relative errors, neither below 0."""
    rows = rows[rows.processes > 1]
    relative = np.maximum(1, rows.processes / rows.cores) / rows.time_p50_ms
    matrix = rows[["messages", "ring_bytes"]].mul(relative, axis=0).to_numpy()
    wanted = (1 - rows.computing_p50_ms / rows.time_p50_ms).to_numpy()
    found = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
    if found.min() < 0:  # the other one alone
        found = np.linalg.lstsq(matrix * (found > 0), wanted, rcond=None)[0].clip(min=0)
    return {"message_ms": float(found[0]), "byte_ms": float(found[1])}


def errors(rows: pd.DataFrame, model: dict[str, float], prefix: str) -> dict[str, float]:
    """How far the model is from the times of several processes."""
    rows = rows[rows.processes > 1]
    found = (modelled(rows, model) / rows.time_p50_ms - 1).abs()
    return {f"{prefix}error_{what}": float(getattr(found, what)()) for what in ("median", "max")}


def predicted(n: int, d: int, computing: float, model: dict[str, float]) -> list[runner.Row]:
    """The loss on 8 to 1,024 devices that are each like one core here, by the route it takes."""
    found = []
    for world in (8, 16, 32, 64, 128, 256, 512, 1024):
        messages, sent = traffic("reduce", world, n, d)
        if distributed.takes_gather(world * n, d):
            continue  # what a process computes then depends on how many there are
        row = {"processes": world, "cores": world, "messages": messages, "ring_bytes": sent}
        line = {"processes": world, "n": n, "d": d, "bytes": round(sent)}
        line["share_of_ddp_bytes"] = sent / (8 * DDP_PARAMETERS * (world - 1) / world)
        line["computing_ms"] = computing
        line["model_ms"] = float(modelled(row | {"computing_p50_ms": computing}, model))
        found.append(line)
    return found


def summary(rows: pd.DataFrame) -> dict[str, Any]:
    """The fit, its errors, and its predictions."""
    model, most = fit(rows), int(rows.processes.max())
    fewer, alone = rows[rows.processes < most], rows[rows.computing_of_many_p50_ms.notna()]
    sizes = zip(alone.n.tolist(), alone.d.tolist(), alone.computing_of_many_p50_ms, strict=True)
    return {
        "model": model,
        **errors(rows, model, ""),
        "held_out_processes": most,
        **errors(rows[rows.processes == most], fit(fewer), "held_out_"),
        "ddp_parameters": DDP_PARAMETERS,
        "predicted": [line for size in sizes for line in predicted(*size, model)],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = runner.make_parser(__doc__, "scaling", sizes=runner.pairs)
    add = parser.add_argument
    add("--processes", type=runner.positive, nargs="+", default=(1, 2, 3, 4), metavar="P")
    timings = "of each of the timings of a case; default: 3"
    add("--seconds", type=runner.duration, default=3.0, dest="timing_s", help=timings)
    add("--fit-only", action="store_true", help="fit the model again, from the file of --out")
    arguments = runner.parse(parser, argv)
    cases = [
        Case(processes, route, n, d)
        for processes in sorted(set(arguments.processes))
        for route, (n, d) in itertools.product(("reduce", "gather"), arguments.sizes or SIZES)
    ]
    timed = partial(measure, seconds=arguments.timing_s)
    status = 0 if arguments.fit_only else runner.run_cases(arguments, cases, timed, COLUMNS, SHOWN)
    if status:
        return status
    rows = pd.read_csv(arguments.out)
    if rows[rows.processes > 1].processes.nunique() < 2:
        print("no model: it needs two numbers of processes above 1")
        return 0
    found = summary(rows)
    write_json(arguments.out.with_suffix(".json"), found)
    print({name: value for name, value in found.items() if name != "predicted"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
