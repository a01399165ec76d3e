"""Fuzzes the operators, or watches their memory, at length and with figures.

    python python_tests/fuzz_operators.py --cases 10000 --out bench/results/reliability/cases.json
    python python_tests/fuzz_operators.py --cases 2000 --backend emulated
    python python_tests/fuzz_operators.py --cases 2000 --backend triton --largest 24
    python python_tests/fuzz_operators.py --memory 100000 --out bench/results/reliability/memory.csv

The first command draws random uses (`fuzz_cases.py`) and checks the result of each
(`fuzz_contract.py`). It prints a failure as the smallest case that Hypothesis finds. The next two
do the same to the CUDA kernels, emulated on the host, and to the Triton kernels in the interpreter,
which takes a hundred times as long and gets smaller cases. The last command calls value, gradient
and errors in turn, and prints how the memory of the process grows.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import linear_regression

if "triton" in [argument.rpartition("=")[2] for argument in sys.argv]:  # --backend triton
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when its kernels are defined

import backends
import hypothesis
import numpy as np
import torch
from cases import generator
from fuzz_cases import LARGEST, Case, cases
from fuzz_contract import Outcome, check
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from vne_kernels import DoELoss, VNEntropy, doe_loss, spectrum, vn_entropy

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import machine  # noqa: E402
import runner  # noqa: E402

CHUNK = 500
"""Cases that Hypothesis draws from one seed: a failure ends its chunk alone."""


# ---------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------


class Tally:
    """What was found, by kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, case: Case, outcome: Outcome) -> None:
        self.counts["cases"] += 1
        self.counts[f"{outcome.kind}s"] += 1
        self.counts["nan_samples"] += outcome.nan_samples
        self.counts["gradients"] += outcome.gradients
        self.counts["from_threads"] += case.call == "threads" and outcome.kind == "value"


def is_misread(case: Case) -> bool:
    """Whether Triton's interpreter may take entries for other numbers (Triton 3.8 does).

    Its conversion of bfloat16 to float32 is wrong for subnormal numbers.
    """
    return case.dtype == torch.bfloat16 and case.content in ("subnormal", "tiny")


def cases_for(backend: str, largest: int = LARGEST) -> SearchStrategy[Case]:
    """Cases of at most so many rows and features that a backend can be held to."""
    drawn = cases(largest)
    return drawn.filter(lambda case: not is_misread(case)) if backend == "triton" else drawn


def run_cases(
    number: int, seed: int, tally: Tally, backend: str = "cpu", largest: int = LARGEST
) -> None:
    """So many random cases; raises what the smallest failing one raises, and notes that case."""

    @hypothesis.seed(seed)
    @settings(
        max_examples=number,
        database=None,
        report_multiple_bugs=False,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases_for(backend, largest))
    def run(case: Case) -> None:
        tally.add(case, check(case))

    run()


def fuzz(number: int, seed: int, backend: str = "cpu", largest: int = LARGEST) -> dict[str, object]:
    """Figures of `number` cases; prints each failure to stderr."""
    tally, failures, start = Tally(), 0, time.perf_counter()
    for chunk, first in enumerate(range(0, number, CHUNK)):
        try:
            count = min(CHUNK, number - first)
            run_cases(count, seed * 100_000 + chunk, tally, backend, largest)
        except Exception as error:
            failures += 1
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
            print(*getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        done, seconds = tally.counts["cases"], time.perf_counter() - start
        print(f"{done} cases, {failures} failures, {seconds:.0f} s", flush=True)
    return {**tally.counts, "failures": failures, "seconds": round(seconds, 1), "seed": seed}


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------

SAMPLE_EVERY = 1000
BOUND = 2.0
"""MiB of growth over 10^5 calls. There are 20 kinds of calls: an object of 512 bytes, about what a
tensor takes, left behind by a single kind is 2.4 MiB."""


def _value_and_gradient(function: Callable[[Tensor], Tensor], *shape: int, dtype: torch.dtype
                        ) -> Callable[[], object]:  # fmt: skip
    z = torch.randn(shape, generator=generator(0)).to(dtype)

    def call() -> object:
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(function(leaf).sum(), leaf)

    return call


def _refused(call: Callable[[], object], *exceptions: type[Exception]) -> Callable[[], object]:
    def refused() -> None:
        try:
            call()
        except exceptions:
            return
        raise AssertionError("an error was to be raised")

    return refused


def _second_derivative() -> Callable[[], object]:
    z = torch.randn(4, 6, generator=generator(0), requires_grad=True)

    def call() -> object:
        (grad,) = torch.autograd.grad(vn_entropy(z), z, create_graph=True)
        return torch.autograd.grad(grad.sum(), z)

    return call


def _without_gradient(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
    z = torch.randn(3, 8, 5, generator=generator(0))

    def call() -> object:
        with torch.inference_mode():
            return function(z)

    return call


def memory_calls() -> list[Callable[[], object]]:
    """What is called in turn: every operator, dtype and method, and every way to fail."""
    single, double, half = torch.float32, torch.float64, torch.bfloat16
    z, bad = torch.randn(4, 6, generator=generator(0)), torch.full((4, 6), math.nan)
    weights = torch.full((8,), 1 / 8, requires_grad=True)
    entropy, loss, gradient = VNEntropy(), DoELoss(), _value_and_gradient
    raw = torch.ops.vne_kernels
    return [
        gradient(entropy, 16, 32, dtype=single),
        gradient(entropy, 3, 12, 7, dtype=half),
        gradient(lambda z: vn_entropy(z, method="eigh"), 9, 20, dtype=single),
        gradient(lambda z: vn_entropy(z, method="poles"), 6, 4, dtype=double),
        gradient(lambda z: vn_entropy(z, weights=weights), 8, 5, dtype=single),
        gradient(spectrum, 7, 11, dtype=double),
        gradient(lambda z: loss(z, z.detach()), 16, 32, dtype=single),
        gradient(lambda z: doe_loss(z, z), 2, 5, 9, dtype=half),
        gradient(torch.vmap(vn_entropy), 3, 5, 6, dtype=single),
        gradient(lambda z: vn_entropy(z.mT), 40, 64, dtype=single),
        _second_derivative(),
        _without_gradient(entropy),
        _without_gradient(spectrum),
        lambda: vn_entropy(bad),
        _refused(lambda: vn_entropy(z[:0]), ValueError),
        _refused(lambda: vn_entropy(z.int()), TypeError),
        _refused(lambda: vn_entropy(z, weights=weights), ValueError),
        _refused(lambda: doe_loss(z, z[:, :3]), ValueError),
        _refused(lambda: raw.vn_entropy(z, None, True, "svd", 1e-12), RuntimeError),
        _refused(lambda: raw.spectrum(z, weights.detach(), True, 1e-12), RuntimeError),
    ]


def resident_mib() -> float:
    """Without pages of mapped files, which the system takes back as it likes."""
    resident, of_files = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - of_files) * os.sysconf("SC_PAGE_SIZE") / 2**20


Sample = dict[str, float]


def watch_memory(number: int, *, every: int = SAMPLE_EVERY, progress: bool = True) -> list[Sample]:
    """Resident memory and Python objects after each `every` of `number` calls."""
    rows: list[Sample] = []
    calls = itertools.cycle(memory_calls())
    start = time.perf_counter()
    for done in range(1, number + 1):
        next(calls)()
        if done % every == 0:
            gc.collect()
            seconds = time.perf_counter() - start
            rows.append(
                {
                    "calls": done,
                    "seconds": round(seconds, 2),
                    "rss_mib": round(resident_mib(), 3),
                    "objects": len(gc.get_objects()),
                }
            )
            if progress and done % (10 * every) == 0:
                print(f"{done} calls, {rows[-1]['rss_mib']} MiB, {seconds:.0f} s", flush=True)
    return rows


def growth(rows: Sequence[Sample], column: str = "rss_mib") -> float:
    """The slope of a straight line after the first fifth of the calls, per 100,000 calls."""
    later = [row for row in rows if row["calls"] > 0.2 * rows[-1]["calls"]]
    return 1e5 * linear_regression([r["calls"] for r in later], [r[column] for r in later]).slope


# ---------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------


def _environment() -> dict[str, object]:
    """The columns of every results file that mean something here."""
    found = machine.environment(torch.device("cpu"))
    shown = ("date", "commit", "torch", "device", "device_name")
    return {**{name: found[name] for name in shown}, "threads": torch.get_num_threads()}


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _run_cases(number: int, seed: int, backend: str, largest: int, out: Path | None) -> int:
    installed = None if backend == "cpu" else backends.install(backend)  # noqa: F841
    with np.errstate(all="ignore"):  # Triton's interpreter is NumPy
        found = fuzz(number, seed, backend, largest)
    figures = {**_environment(), "backend": backend, "largest": largest, **found}
    print(json.dumps(figures, indent=2))
    if out is not None:
        _write_json(out, figures)
    return int(bool(figures["failures"]))


def _run_memory(number: int, out: Path | None) -> int:
    environment = _environment()
    rows = [{**environment, **row} for row in watch_memory(number)]
    if out is not None:
        runner.write_csv(out, list(rows[0]), rows)
    slope, objects = growth(rows), growth(rows, "objects")
    verdict = "flat" if slope <= BOUND else "it grows"
    print(f"{slope:+.3f} MiB and {objects:+.1f} objects per 10^5 calls (bound: {BOUND}): {verdict}")
    return int(slope > BOUND)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fuzz_operators.py", description="Random uses of the operators, or their memory."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cases", type=runner.positive, metavar="N", help="random cases to check")
    what.add_argument(
        "--memory", type=runner.positive, metavar="N", help="calls, at least 5,000, to watch"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the cases; default 0")
    parser.add_argument(
        "--backend",
        choices=("cpu", "emulated", "triton"),
        default="cpu",
        help="the kernels that the cases are for; default cpu",
    )
    parser.add_argument(
        "--largest",
        type=runner.positive,
        default=LARGEST,
        metavar="N",
        help=f"rows and features that a case has at most; default {LARGEST}",
    )
    parser.add_argument("--out", type=Path, help="results file: JSON of cases, CSV of memory")
    given_options = parser.parse_args(argv)
    if given_options.memory is not None and given_options.memory < 5 * SAMPLE_EVERY:
        parser.error(f"argument --memory: must be at least 5000, got {given_options.memory}")
    warnings.simplefilter("ignore")  # of torch about itself
    if given_options.memory is not None:
        return _run_memory(given_options.memory, given_options.out)
    return _run_cases(
        given_options.cases,
        given_options.seed,
        given_options.backend,
        given_options.largest,
        given_options.out,
    )


if __name__ == "__main__":
    sys.exit(main())
