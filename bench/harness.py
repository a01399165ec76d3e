"""Interleaved timing, the description of the machine, the CSV file, the line of progress.

Nothing here knows what is measured: `compare_vs_torch.py` and `training_step.py` bring that.
"""

from __future__ import annotations

import csv
import gc
import math
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import cusolver
import machine
import torch

Call = Callable[[], object]

MAX_ROUNDS = 200
MIN_SAMPLES = 3
TURN_S = 0.005  # a provider's turn in one round: calls for about this long
MAX_CALLS_PER_TURN = 10


@dataclass
class Contender:
    """One provider in one case: what to run, and what became of it."""

    name: str
    call: Call  # the timed work
    prepare: Call  # untimed, before each call
    calls: int = 1  # how often `call` does the work: a sample is the mean
    error: str | None = None
    estimate_s: float = math.nan  # of the whole `call`, if known beforehand
    peak_bytes: float = math.nan
    samples_s: list[float] = field(default_factory=list)

    def quantiles_ms(self) -> tuple[float, float, float]:
        """p20, p50 and p80 of the samples; NaN if there are none."""
        if not self.samples_s:
            return math.nan, math.nan, math.nan
        samples = torch.tensor(self.samples_s, dtype=torch.float64) * 1e3
        p20, p50, p80 = samples.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
        return p20.item(), p50.item(), p80.item()


def reason(error: Exception) -> str:
    """What became of one that cannot do a case: a result too, for the column `note`."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:160]


# ---------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------


def time_once(contender: Contender, device: torch.device) -> float:
    """Seconds of `call`: the host's clock on a CPU, events on a GPU that was idle before."""
    contender.prepare()
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        contender.call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) * 1e-3
    begin = time.perf_counter()
    contender.call()
    return time.perf_counter() - begin


def _turn(contender: Contender, device: torch.device) -> None:
    """One provider's turn: several short calls, the first of them not counted, or one long one."""
    calls = min(MAX_CALLS_PER_TURN, max(1, int(TURN_S / contender.estimate_s)))
    if calls > 1:
        time_once(contender, device)
    for _ in range(calls):
        contender.samples_s.append(time_once(contender, device) / contender.calls)


def _estimate(contender: Contender, device: torch.device, share_s: float) -> float:
    """Seconds of `call`: the least of three, so that one interruption does not decide."""
    estimate_s = time_once(contender, device)
    if estimate_s < share_s / MIN_SAMPLES:
        estimate_s = min(estimate_s, *(time_once(contender, device) for _ in range(2)))
    return max(estimate_s, 1e-7)


def _stride(contender: Contender, rounds: int, share_s: float) -> int:
    """A contender takes part in every stride-th round, so that slow ones are spread evenly."""
    turns = max(MIN_SAMPLES, int(share_s / contender.estimate_s))
    return max(1, rounds // turns)


@contextmanager
def _no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_interleaved(
    contenders: Sequence[Contender], device: torch.device, budget_s: float, seed: int = 0
) -> None:
    """Fill `samples_s` of every contender that has no error, in shuffled rounds.

    The machine's noise falls on all alike: every round gives each contender one turn, in an order
    drawn anew. `budget_s` is shared equally; one too slow for its share still gets MIN_SAMPLES
    calls. Where those would take more than the whole budget, the call whose time is known already
    (`estimate_s`) is the only sample.
    """
    running = []
    for contender in contenders:
        if MIN_SAMPLES * contender.estimate_s > budget_s:
            contender.samples_s.append(contender.estimate_s / contender.calls)
        elif contender.error is None:
            running.append(contender)
    if not running:
        return
    share_s = budget_s / len(running)
    for contender in running:
        contender.estimate_s = _estimate(contender, device, share_s)
    turn_s = sum(max(TURN_S, c.estimate_s) for c in running if c.estimate_s <= share_s)
    rounds = max(MIN_SAMPLES, min(MAX_ROUNDS, int(budget_s / max(turn_s, TURN_S))))
    strides = {c.name: _stride(c, rounds, share_s) for c in running}
    order = random.Random(seed)
    deadline = time.perf_counter() + 2 * budget_s  # a machine much slower than its first call
    with _no_gc():
        for index in range(rounds):
            for contender in order.sample(running, len(running)):
                if index % strides[contender.name] == 0:
                    _turn(contender, device)
            if time.perf_counter() > deadline and index + 1 >= MIN_SAMPLES:
                break


# ---------------------------------------------------------------------------------------------
# Where and what
# ---------------------------------------------------------------------------------------------


def commit() -> str:
    """The commit of this repository, with a + if tracked sources differ from it; '-' without."""
    head = machine.output_of("git", "rev-parse", "--short=10", "HEAD")
    if not head:
        return "-"
    changed = machine.output_of(
        "git", "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)bench/results"
    )
    return head + ("+" if changed else "")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return " ".join(found.group(1).split())
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, str]:
    """The columns that say where a row comes from."""
    on_gpu = device.type == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "-",
        "cusolver": cusolver.version(),
        "driver": machine.driver(device),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "clocks": machine.clocks(device),
    }


def results_file(device: torch.device, suffix: str = "") -> Path:
    """bench/results/<device><suffix>.csv."""
    name = slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"
    return Path(__file__).resolve().parent / "results" / f"{name}{suffix}.csv"


def slug(name: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---------------------------------------------------------------------------------------------
# CSV
# ---------------------------------------------------------------------------------------------


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, object]]) -> None:
    """Write all rows under a temporary name beside `path`, then rename: no half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def finished_before(partial: Path, where: Mapping[str, object]) -> list[dict[str, object]]:
    """The rows of an interrupted run; ValueError if they are of another build or machine."""
    if not partial.is_file():
        return []
    with partial.open(newline="") as file:
        rows: list[dict[str, object]] = list(csv.DictReader(file))
    for row in rows:
        for column in ("commit", "torch", "cusolver", "driver", "device_name"):
            if column in where and row.get(column) != where[column]:
                raise ValueError(
                    f"{partial} has {column} {row.get(column)!r}, this run has {where[column]!r}: "
                    "delete it, or run without --resume"
                )
    return rows


# ---------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------


class Progress:
    """A line on stderr, rewritten in place on a terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.begin = total, 0, time.monotonic()

    def start(self, case: object) -> None:
        elapsed = time.monotonic() - self.begin
        left = elapsed / self.done * (self.total - self.done) if self.done else math.nan
        estimate = f", about {left:.0f} s left" if self.done else ""
        line = f"[{self.done + 1}/{self.total}] {case} ({elapsed:.0f} s{estimate})"
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def stop(self) -> None:
        self.done += 1
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
