"""The accumulator: its rate next to that of the plain float32 product, and its memory.

    python bench/accumulator.py            # both, to bench/results/accumulator.csv: some minutes

Rate: rows are given to `DensityAccumulator.update` in chunks (`--batches`), and to
`torch.mm(x.T, x)`, interleaved. Memory: a new process repeats one chunk until all rows are through.
bench/README.md says what counts.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import runner
import torch
from runner import Contender, Row

from vne_kernels import DensityAccumulator

FEATURES = (128, 256, 512, 1024, 2048)
CHUNKS = (8192, 32)
MEMORY_SIZES = tuple((n, d) for d in (256, 1024) for n in (100_000, 1_000_000, 10_000_000))
COLUMNS = (
    *("date", "commit", "torch", "cuda", "cusolver", "driver"),
    *("device", "device_name", "clocks", "threads"),
    *("measure", "provider", "d", "chunk", "rows"),
    *("samples", "p20_ms", "p50_ms", "p80_ms"),
    *("rows_per_s", "gflops", "sgemm_share"),
    *("before_mib", "peak_mib"),
)
SHOWN = ("provider", "chunk", "p50_ms", "gflops", "sgemm_share", "before_mib", "peak_mib")


@dataclass(frozen=True)
class Case:
    measure: str  # "rate" or "memory"
    threads: int
    d: int
    rows: int


def row_of(case: Case, provider: str, chunk: int, seconds: float) -> Row:
    rows_per_s = case.rows / seconds
    rates = {"rows_per_s": f"{rows_per_s:.4g}", "gflops": f"{2e-9 * rows_per_s * case.d**2:.4g}"}
    return {"provider": provider, "chunk": chunk, **rates}


def measure_rate(case: Case, chunks: Sequence[int], seconds: float) -> list[Row]:
    x = torch.randn(case.rows, case.d, generator=torch.Generator().manual_seed(case.d))
    sums, out = DensityAccumulator(case.d), torch.empty(case.d, case.d)

    def update(parts: Sequence[torch.Tensor]) -> None:
        for part in parts:
            sums.update(part)

    updates = [Contender("update", partial(update, x.split(chunk))) for chunk in chunks]
    contenders = [Contender("sgemm", partial(torch.mm, x.T, x, out=out)), *updates]
    runner.time_interleaved(contenders, torch.device("cpu"), seconds)
    sgemm_ms, rows = contenders[0].quantiles_ms()[1], []
    for chunk, contender in zip((case.rows, *chunks), contenders, strict=True):
        p50_ms = contender.quantiles_ms()[1]
        share = {**contender.columns(), "sgemm_share": f"{sgemm_ms / p50_ms:.4g}"}
        rows.append(row_of(case, contender.name, chunk, p50_ms / 1e3) | share)
    return rows


def resident_mib(what: str) -> str:
    """VmRSS or VmHWM, its peak, of this process."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return f"{int(status[what].split()[0]) / 1024:.1f}"


def stream(case: Case, chunk: int) -> list[Row]:
    """The row of a process that measures its own memory."""
    torch.set_num_threads(case.threads)
    x = torch.randn(chunk, case.d, generator=torch.Generator().manual_seed(case.d))
    memory = {"before_mib": resident_mib("VmRSS")}
    sums = DensityAccumulator(case.d)
    begin = time.perf_counter()
    for done in range(0, case.rows, chunk):
        sums.update(x[: case.rows - done])
    entropy = float(sums.entropy())
    seconds = time.perf_counter() - begin
    if sums.rows != case.rows or not entropy > 0:
        raise ArithmeticError(f"{sums.rows} of {case.rows} rows, entropy {entropy}")
    memory["peak_mib"] = resident_mib("VmHWM")
    return [row_of(case, "update", chunk, seconds) | {"samples": 1, **memory}]


def main(argv: Sequence[str] | None = None) -> int:
    options = {"seconds": {"cpu": 10.0}, "batches": True, "threads": (1, 2)}
    parser = runner.make_parser(__doc__, "accumulator", sizes=runner.positives, **options)
    add = parser.add_argument
    add("--rate-rows", type=runner.positive, default=max(CHUNKS), help="rows of one timed call")
    add("--memory-sizes", type=runner.pairs, default=MEMORY_SIZES, help="ROWSxFEATURES,...")
    arguments = runner.parse(parser, argv)
    chunks, features = arguments.batches or CHUNKS, arguments.sizes or FEATURES
    sizes = product(arguments.threads, features)
    cases = [Case("rate", threads, d, arguments.rate_rows) for threads, d in sizes]
    cases += [Case("memory", max(arguments.threads), d, n) for n, d in arguments.memory_sizes]

    def measure(case: Case) -> list[Row]:
        if case.measure == "rate":
            return measure_rate(case, chunks, arguments.case_seconds)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(stream, case, max(chunks)).result()

    return runner.run_cases(arguments, cases, measure, COLUMNS, SHOWN)


if __name__ == "__main__":
    sys.exit(main())
