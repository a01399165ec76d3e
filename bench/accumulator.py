"""The accumulator: its rate beside that of the plain float32 product, and its memory.

    python bench/accumulator.py            # both, to bench/results/accumulator.csv: some minutes
    python bench/accumulator.py --resume   # go on with the cases that are missing

Rate: 8,192 rows of d features are given to `DensityAccumulator.update`, in one chunk and in chunks
of 32, and to `torch.mm(x.T, x)`, the product that any sum of z z^T costs at least if both halves of
it are computed. All are timed interleaved. The accumulator's work is normalisation, product and the
sum in float64; its flops are counted as 2 n d^2 too.

Memory: a process of its own repeats one chunk until the rows are through; its peak resident size
is VmHWM of Linux. Making the chunk is not timed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import arguments as options
import harness
import machine
import torch

try:
    from vne_kernels import DensityAccumulator
except ImportError as error:
    print(f"accumulator: {error}; install the package first", file=sys.stderr)
    sys.exit(2)

FEATURES = (128, 256, 512, 1024, 2048)
CHUNKS = (8192, 32)
THREADS = (1, 2)
MEMORY_FEATURES = (256, 1024)
MEMORY_ROWS = (100_000, 1_000_000, 10_000_000)
CASE_SECONDS = 10.0
SGEMM = "sgemm"
UPDATE = "update"
QUANTILES = ("p20_ms", "p50_ms", "p80_ms")
CPU = torch.device("cpu")

COLUMNS = (
    *("date", "commit", "torch", "cuda", "cusolver", "driver"),
    *("device", "device_name", "clocks", "threads"),
    *("measure", "provider", "d", "chunk", "rows"),
    *("samples", *QUANTILES),
    *("rows_per_s", "gflops", "sgemm_share"),
    *("before_mib", "peak_mib"),
)

Row = dict[str, object]


@dataclass(frozen=True)
class Case:
    """What is measured together."""

    measure: str  # "rate" or "memory"
    threads: int
    d: int
    rows: int

    def __str__(self) -> str:
        return f"{self.measure} threads={self.threads} d={self.d} rows={self.rows}"


# ---------------------------------------------------------------------------------------------
# Rate
# ---------------------------------------------------------------------------------------------


def _rate(case: Case, chunks: Sequence[int], seconds: float) -> list[Row]:
    x = torch.randn(case.rows, case.d, generator=torch.Generator().manual_seed(case.d))
    product = torch.empty(case.d, case.d)

    def update(chunk: int) -> harness.Call:
        sums = DensityAccumulator(case.d)
        parts = x.split(chunk)

        def call() -> None:
            for part in parts:
                sums.update(part)

        return call

    def contender(name: str, call: harness.Call) -> harness.Contender:
        return harness.Contender(name, call, lambda: None)

    sgemm = contender(SGEMM, lambda: torch.mm(x.T, x, out=product))
    updates = {chunk: contender(f"{UPDATE} {chunk}", update(chunk)) for chunk in chunks}
    harness.time_interleaved([sgemm, *updates.values()], CPU, seconds)
    rows = [_timed(case, SGEMM, case.rows, sgemm, sgemm)]
    return rows + [_timed(case, UPDATE, chunk, one, sgemm) for chunk, one in updates.items()]


def _timed(
    case: Case, provider: str, chunk: int, one: harness.Contender, sgemm: harness.Contender
) -> Row:
    p20, p50, p80 = one.quantiles_ms()
    return {
        "provider": provider,
        "chunk": chunk,
        "samples": len(one.samples_s),
        **{name: f"{x:.5g}" for name, x in zip(QUANTILES, (p20, p50, p80), strict=True)},
        **_rates(case, p50 / 1e3),
        "sgemm_share": f"{sgemm.quantiles_ms()[1] / p50:.4g}",
    }


def _rates(case: Case, seconds: float) -> Row:
    return {
        "rows_per_s": f"{case.rows / seconds:.4g}",
        "gflops": f"{2e-9 * case.rows * case.d**2 / seconds:.4g}",
    }


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


def _resident_mib(what: str) -> float:
    """VmRSS or VmHWM, its peak, of this process."""
    found = re.search(rf"^{what}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {what}")
    return int(found[1]) / 1024


def repeat_chunk(d: int, rows: int, chunk: int, threads: int) -> None:
    """The process that is measured: prints seconds, MiB before the accumulator, and at the peak."""
    torch.set_num_threads(threads)
    x = torch.randn(chunk, d, generator=torch.Generator().manual_seed(d))
    before = _resident_mib("VmRSS")
    sums = DensityAccumulator(d)
    begin = time.perf_counter()
    for done in range(0, rows, chunk):
        sums.update(x[: rows - done])
    entropy = float(sums.entropy())
    seconds = time.perf_counter() - begin
    if sums.rows != rows or not entropy > 0:
        raise ArithmeticError(f"{sums.rows} of {rows} rows, entropy {entropy}")
    print(seconds, before, _resident_mib("VmHWM"))


def _memory(case: Case, chunk: int) -> list[Row]:
    settings = (case.d, case.rows, chunk, case.threads)
    command = [sys.executable, __file__, "--repeat-chunk", *map(str, settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ArithmeticError(f"{case}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    seconds, before, peak = map(float, done.stdout.split())
    row = {"provider": UPDATE, "chunk": chunk, "samples": 1, **_rates(case, seconds)}
    return [row | {"before_mib": f"{before:.1f}", "peak_mib": f"{peak:.1f}"}]


# ---------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------


def print_case(case: Case, rows: Sequence[Row]) -> None:
    print(f"\n{case}")
    for row in rows:
        line = f"  {row['provider']:<7} chunk {row['chunk']:>5}  {row['gflops']:>6} GFLOP/s"
        if "sgemm_share" in row:
            line += f"  {float(str(row['sgemm_share'])):7.1%} of sgemm"
        else:
            line += f"  {row['before_mib']:>8} MiB before, {row['peak_mib']} MiB at the peak"
        print(line, flush=True)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="accumulator.py",
        description="Rate of the accumulator beside sgemm, and its memory.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--features", type=options.positives, default=FEATURES, help="of the rate")
    add("--chunks", type=options.positives, default=CHUNKS, help="rows of an update")
    add("--threads", type=options.positives, default=THREADS)
    add("--rate-rows", type=options.positive, default=max(CHUNKS), help="rows of one timed call")
    add("--memory-features", type=options.positives, default=MEMORY_FEATURES)
    add("--memory-rows", type=options.positives, default=MEMORY_ROWS)
    add("--case-seconds", type=options.duration, default=CASE_SECONDS, help="of the rate")
    add("--resume", action="store_true", help="go on from <out>.partial")
    add("--out", type=Path, default=harness.results_file(CPU).with_name("accumulator.csv"))
    add("--repeat-chunk", type=options.positive, nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """Rates, then memory on the largest number of threads."""
    rates = [
        Case("rate", threads, d, arguments.rate_rows)
        for threads in arguments.threads
        for d in arguments.features
    ]
    threads = max(arguments.threads)
    return rates + [
        Case("memory", threads, d, rows)
        for d in arguments.memory_features
        for rows in arguments.memory_rows
    ]


def run(arguments: argparse.Namespace) -> list[Row]:
    """Measure every case, print it, and keep what is done in a .partial file until the end."""
    where = harness.environment(CPU)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    so_far = arguments.out.with_name(arguments.out.name + ".partial")
    rows = harness.finished_before(so_far, where) if arguments.resume else []
    done = {tuple(str(row[name]) for name in asdict(Case("", 0, 0, 0))) for row in rows}
    cases = [
        case for case in cases_of(arguments) if tuple(map(str, asdict(case).values())) not in done
    ]
    progress = harness.Progress(len(cases))
    for case in cases:
        progress.start(case)
        torch.set_num_threads(case.threads)
        if case.measure == "rate":
            measured = _rate(case, arguments.chunks, arguments.case_seconds)
        else:
            measured = _memory(case, max(arguments.chunks))
        progress.stop()
        print_case(case, measured)
        here = {**where, "clocks": machine.clocks(CPU), **asdict(case)}
        rows += [{**here, **row} for row in measured]
        harness.write_csv(so_far, COLUMNS, rows)
    os.replace(so_far, arguments.out)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.repeat_chunk:
        repeat_chunk(*arguments.repeat_chunk)
        return 0
    try:
        run(arguments)
    except KeyboardInterrupt:
        print(f"\nstopped; finished cases are in {arguments.out}.partial, --resume goes on")
        return 130
    except (ArithmeticError, ValueError) as error:
        print(f"accumulator: {error}", file=sys.stderr)
        return 2
    print(f"\n{arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
