"""What the loss of a batch spread over processes costs: time, bytes, memory, and a model of it.

    python bench/scaling.py                # 1 to 4 gloo processes: results/scaling.csv and .json
    python bench/scaling.py --fit-only     # the model anew, from the results file alone

Every process has n rows of d features and computes `doe_loss(..., group=...)` with its gradient, by
either route (vne_kernels/distributed.py). The same call is timed with its collectives replaced by
copies of what they gave, in all processes at once: what is left is the time of the transport. The
model, fitted to all rows:

    time = crowding * (computing + latency * messages + bytes / bandwidth)

crowding is how many processes share a core, messages and bytes are those of ring algorithms: per
process 2 (P - 1) messages and 2 (P - 1) / P of the tensor for an all-reduce, P - 1 of each for an
all-gather. It is also fitted without the largest number of processes, which it then has to tell.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import memory
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vne_kernels import distributed, doe_loss
from vne_kernels.common.files import replacing, write_json

RESULTS = Path(__file__).resolve().parent / "results"
ROUTES = ("reduce", "gather")
PROCESSES = (1, 2, 3, 4)
ROWS = (32, 128)
FEATURES = (128, 256, 512)
PREDICTED = (8, 16, 32, 64, 128, 256, 512, 1024)
BETA = 10.0
WARM_UP = 3
KEYS = ("processes", "route", "n", "d")
COLUMNS = (
    "date",
    "commit",
    "torch",
    "device_name",
    "cores",
    *KEYS,
    "samples",
    "time_p20_ms",
    "time_p50_ms",
    "time_p80_ms",
    "computing_p50_ms",
    "computing_of_many_p50_ms",
    "messages",
    "ring_bytes",
    "loopback_bytes",
    "peak_mib",
)
#: What DistributedDataParallel reduces in a step anyway: ResNet-50 without its classifier, and the
#: paper's projector for ImageNet (2048 - 2048 - 2048 - 512, two batch norms), in float32.
ENCODER_PARAMETERS = 23_508_032
PROJECTOR_PARAMETERS = 2 * (2048 * 2048 + 2048 + 2 * 2048) + 2048 * 512 + 512

Row = dict[str, Any]


# ---- one process -------------------------------------------------------------------------------


class Traffic:
    """What the collectives of a call send by ring algorithms: messages, bytes of this process."""

    def __init__(self, world: int) -> None:
        self.world, self.messages, self.bytes = world, 0, 0.0

    def add(self, x: Tensor, passes: int, share: float) -> None:
        self.messages += passes * (self.world - 1)
        self.bytes += passes * share * x.numel() * x.element_size()


@contextlib.contextmanager
def replaced(**functions: Callable[..., Tensor]) -> Iterator[None]:
    """Other functions in the place of those of vne_kernels.distributed."""
    before = {name: getattr(distributed, name) for name in functions}
    for name, function in functions.items():
        setattr(distributed, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(distributed, name, function)


class Replay:
    """What the collectives of one call gave, given again in its later ones without transport."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.results: list[Tensor] = []
        ended = distributed._ended

        def recorded(begun: Tensor) -> Tensor:
            self.results.append(ended(begun).clone())
            return self.results[-1]

        with replaced(_ended=recorded):
            call()
        self.next = itertools.cycle(self.results)

    def ended(self, begun: Tensor) -> Tensor:
        return next(self.next).clone()

    def of_many(self, d: int) -> Replay:
        """The sum of the reduce route as if there were 4 d rows: of few, its matrix lacks rank.

        It is the first that a call waits for, (d + 1, d): the rows' own matrices and their number.
        """
        z = torch.randn(4 * d, d, generator=torch.Generator().manual_seed(0))
        total = torch.ops.vne_kernels.density(z, z.new_ones(4 * d), True, 1e-12)
        self.results[0] = torch.cat([total, z.new_full((1, d), 4.0 * d)])
        self.next = itertools.cycle(self.results)
        return self


def without_transport(replay: Replay) -> contextlib.AbstractContextManager[None]:
    """Every collective a copy of what it gave: the work of a process, alone."""
    return replaced(
        _sum_begun=lambda x, name: x.contiguous(),
        _gather_begun=lambda x, name, world: x.contiguous(),
        _ended=replay.ended,
    )


def watched(traffic: Traffic) -> contextlib.AbstractContextManager[None]:
    """Counts what goes out on its way."""
    sums, gathers = distributed._sum_begun, distributed._gather_begun

    def summed(x: Tensor, name: str) -> Tensor:
        traffic.add(x, 2, (traffic.world - 1) / traffic.world)
        return sums(x, name)

    def gathered(x: Tensor, name: str, world: int) -> Tensor:
        traffic.add(x, 1, traffic.world - 1)
        return gathers(x, name, world)

    return replaced(_sum_begun=summed, _gather_begun=gathered)


def loopback_bytes() -> int:
    """Sent by all processes of this network namespace over the loopback device so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def make_call(n: int, d: int) -> Callable[[], object]:
    g = torch.Generator().manual_seed(dist.get_rank())
    z1 = torch.randn(n, d, generator=g, requires_grad=True)
    z2 = (z1.detach() + 0.3 * torch.randn(n, d, generator=g)).requires_grad_()

    def call() -> object:
        loss = doe_loss(z1, z2, beta=BETA, group=dist.group.WORLD, max_rows=n)
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, (z1, z2))

    return call


def samples(call: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each call, of the slowest process: they begin together."""
    for _ in range(WARM_UP):
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


def measure(route: str, n: int, d: int, seconds: float) -> Row:
    world = dist.get_world_size()
    call = make_call(n, d)
    with replaced(takes_gather=lambda rows, features: route == "gather"):
        with without_transport(Replay(call)):
            computing = samples(call, seconds)
        of_many = []
        if world == 1 and route == "reduce":
            with without_transport(Replay(call).of_many(d)):
                of_many = samples(call, seconds)
        times = samples(call, seconds)
        traffic = Traffic(world)
        with watched(traffic):
            call()
        dist.barrier()
        count, before = 20, loopback_bytes()
        for _ in range(count):
            call()
        dist.barrier()
        moved = (loopback_bytes() - before) / count / world
        peak = memory.peak_bytes(call, torch.device("cpu"))
        dist.barrier()
    p20, p50, p80 = np.percentile(times, [20, 50, 80])
    return {
        "processes": world,
        "route": route,
        "n": n,
        "d": d,
        "samples": len(times),
        "time_p20_ms": f"{p20:.5g}",
        "time_p50_ms": f"{p50:.5g}",
        "time_p80_ms": f"{p80:.5g}",
        "computing_p50_ms": f"{statistics.median(computing):.5g}",
        "computing_of_many_p50_ms": f"{statistics.median(of_many):.5g}" if of_many else "",
        "messages": traffic.messages,
        "ring_bytes": f"{traffic.bytes:.0f}",
        "loopback_bytes": f"{moved:.0f}",
        "peak_mib": "" if math.isnan(peak) else f"{peak / 2**20:.4g}",
    }


def _process(rank: int, world: int, folder: str, cases: Sequence[Any], seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    with _one_process_counts_as_several(world):
        for number, case in enumerate(cases):
            row = measure(*case, seconds)
            if rank == 0:
                write_json(Path(folder) / f"{number}.json", row)
    dist.destroy_process_group()


@contextlib.contextmanager
def _one_process_counts_as_several(world: int) -> Iterator[None]:
    """A group of one would take the plain loss: then there were nothing to compare with."""
    if world > 1:
        yield
        return
    with replaced(process_group=lambda group: group):
        yield


def run(world: int, cases: Sequence[tuple[str, int, int]], seconds: float) -> list[Row]:
    """A row of each case, on ``world`` processes forked from this one."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_process, args=(rank, world, folder, cases, seconds))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"a process of {world} failed; see above")
        files = [Path(folder) / f"{number}.json" for number in range(len(cases))]
        return [json.loads(path.read_text()) for path in files]


# ---- the model ---------------------------------------------------------------------------------


def crowding(row: Row) -> float:
    """Processes to a core; computing_p50_ms was measured under it already."""
    return max(1.0, float(row["processes"]) / float(row["cores"]))


def fit(rows: Sequence[Row]) -> dict[str, float]:
    """Latency of a message and time of a byte, in ms, from relative errors, neither below 0."""
    several = [row for row in rows if int(row["processes"]) > 1]
    scale = np.array([crowding(row) / float(row["time_p50_ms"]) for row in several])
    columns = np.array([[float(row["messages"]), float(row["ring_bytes"])] for row in several])
    wanted = np.array(
        [1 - float(row["computing_p50_ms"]) / float(row["time_p50_ms"]) for row in several]
    )
    matrix = columns * scale[:, None]
    best = min(
        (_least_squares(matrix, wanted, used) for used in ([0, 1], [0], [1])),
        key=lambda found: (found.min() < 0, float(np.square(matrix @ found - wanted).sum())),
    )
    return {"message_ms": float(best[0]), "byte_ms": float(best[1])}


def _least_squares(matrix: Any, wanted: Any, used: list[int]) -> Any:
    found = np.zeros(matrix.shape[1])
    found[used] = np.linalg.lstsq(matrix[:, used], wanted, rcond=None)[0]
    return found


def modelled(row: Row, model: dict[str, float]) -> float:
    """Milliseconds."""
    transport = model["message_ms"] * float(row["messages"]) + model["byte_ms"] * float(
        row["ring_bytes"]
    )
    return float(row["computing_p50_ms"]) + crowding(row) * transport


def errors(rows: Sequence[Row], model: dict[str, float]) -> list[float]:
    """Of each row with several processes, relative."""
    return [
        modelled(row, model) / float(row["time_p50_ms"]) - 1
        for row in rows
        if int(row["processes"]) > 1
    ]


def predicted(rows: Sequence[Row], model: dict[str, float], n: int, d: int) -> list[Row]:
    """The loss on 8 to 1,024 devices that are each like one core here, by the route it takes."""
    found = []
    (computing,) = (
        float(row["computing_of_many_p50_ms"])
        for row in rows
        if (row["route"], int(row["processes"]), int(row["n"]), int(row["d"]))
        == ("reduce", 1, n, d)
    )
    for world in PREDICTED:
        if distributed.takes_gather(world * n, d):
            continue  # what a process computes then depends on how many there are
        sent = reduce_traffic(world, d)
        row = {
            "processes": world,
            "cores": world,
            "computing_p50_ms": computing,
            "messages": sent.messages,
            "ring_bytes": sent.bytes,
        }
        gradients = 4 * (ENCODER_PARAMETERS + PROJECTOR_PARAMETERS) * 2 * (world - 1) / world
        found.append(
            {
                "processes": world,
                "n": n,
                "d": d,
                "bytes": round(sent.bytes),
                "share_of_ddp_bytes": sent.bytes / gradients,
                "computing_ms": computing,
                "model_ms": modelled(row, model),
            }
        )
    return found


def reduce_traffic(world: int, d: int) -> Traffic:
    """Of the loss by the reduce route: matrix and row counts, cosine and pairs; two gradients."""
    traffic = Traffic(world)
    for numbers in ((d + 1) * d, 2, 2):
        traffic.add(torch.empty(numbers, device="meta"), 2, (world - 1) / world)
    return traffic


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The fit, its errors, and what it tells."""
    model = fit(rows)
    all_errors = [abs(error) for error in errors(rows, model)]
    most = max(int(row["processes"]) for row in rows)
    fewer = [row for row in rows if int(row["processes"]) < most]
    told = [
        abs(error) for error in errors([r for r in rows if int(r["processes"]) == most], fit(fewer))
    ]
    sizes = sorted({(int(row["n"]), int(row["d"])) for row in rows})
    return {
        "model": model,
        "error_median": statistics.median(all_errors),
        "error_max": max(all_errors),
        "held_out_processes": most,
        "held_out_error_median": statistics.median(told),
        "held_out_error_max": max(told),
        "ddp_parameters": ENCODER_PARAMETERS + PROJECTOR_PARAMETERS,
        "predicted": list(
            itertools.chain.from_iterable(predicted(rows, model, n, d) for n, d in sizes)
        ),
    }


# ---- command line ------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scaling.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--processes", type=int, nargs="+", default=list(PROCESSES), metavar="P")
    add("--rows", type=int, nargs="+", default=list(ROWS), metavar="N", help="of each process")
    add("--features", type=int, nargs="+", default=list(FEATURES), metavar="D")
    add("--seconds", type=float, default=3.0, help="of each of the two timings of a case")
    add("--fit-only", action="store_true", help="the model anew, from the file of --out")
    add("--out", type=Path, default=RESULTS / "scaling.csv", help="the .json lies beside it")
    arguments = parser.parse_args(argv)
    for name in ("processes", "rows", "features"):
        if min(getattr(arguments, name)) < 1:
            parser.error(
                f"argument --{name}: must be integers >= 1, got {getattr(arguments, name)}"
            )
    if not arguments.fit_only and (1 not in arguments.processes or len(arguments.processes) < 3):
        got = arguments.processes
        parser.error(f"argument --processes: must be 1 and at least two more, got {got}")
    return arguments


def measured(arguments: argparse.Namespace) -> list[Row]:
    cases = list(itertools.product(ROUTES, arguments.rows, arguments.features))
    described = harness.environment(torch.device("cpu"))
    kept = {name: described[name] for name in COLUMNS if name in described}
    rows: list[Row] = []
    for world in sorted(set(arguments.processes)):
        print(f"{world} processes, {len(cases)} cases", file=sys.stderr, flush=True)
        cores = len(os.sched_getaffinity(0))
        rows += [kept | {"cores": cores} | row for row in run(world, cases, arguments.seconds)]
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.fit_only:
        with arguments.out.open(newline="", encoding="utf-8") as file:
            rows: list[Row] = list(csv.DictReader(file))
    else:
        rows = measured(arguments)
        with replacing(arguments.out) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    found = summary(rows)
    write_json(arguments.out.with_suffix(".json"), found)
    print(
        f"model: {1e3 * found['model']['message_ms']:.3g} us a message, "
        f"{1e9 * found['model']['byte_ms']:.3g} us a MB; error median "
        f"{100 * found['error_median']:.1f} %, largest {100 * found['error_max']:.1f} %; of "
        f"{found['held_out_processes']} processes told from fewer: "
        f"{100 * found['held_out_error_median']:.1f} %, {100 * found['held_out_error_max']:.1f} %"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
