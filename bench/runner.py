"""Runs the cases of a benchmark program: options, interleaved timing, results file, resumption.

A program states its cases, measures one of them and names its columns. The rest is here:

    @dataclass(frozen=True)
    class Case:  # its fields are columns; together they identify a case
        threads: int
        d: int

    def measure(case: Case) -> list[runner.Row]:  # one row per contender
        contenders = [runner.Contender(name, call) for name, call in calls_of(case)]
        runner.time_interleaved(contenders, arguments.device, arguments.case_seconds)
        return [{"provider": c.name, **c.columns()} for c in contenders]

    parser = runner.make_parser(__doc__, "name", seconds={"cpu": 10}, threads=(1, 2))
    arguments = runner.parse(parser, argv)
    sys.exit(runner.run_cases(arguments, cases, measure, COLUMNS, ("provider", "p50_ms")))
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import random
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import machine
import torch

from vne_kernels.common.files import replacing

Call = Callable[[], object]
Row = dict[str, object]

RESULTS = Path(__file__).resolve().parent / "results"
ENVIRONMENT = ("commit", "torch", "cusolver", "driver", "device_name", "threads")
"""Columns in which the rows of an interrupted run and those of its resumption have to agree."""

MAX_ROUNDS = 200
MIN_SAMPLES = 3
TURN_S = 0.005  # the turn of a contender in one round: calls for about this long
MAX_CALLS_PER_TURN = 10


# ---------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------


def nothing() -> None:
    """The preparation of a contender that needs none."""


@dataclass
class Contender:
    """One call of a case that is timed together with the others of the case."""

    name: str
    call: Call  # the timed work
    prepare: Call = nothing  # runs before each call, untimed
    calls: int = 1  # how often `call` does the work: a sample is the mean
    error: str | None = None  # why it is not timed
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

    def columns(self, prefix: str = "") -> Row:
        """`samples`, `p20_ms`, `p50_ms` and `p80_ms`, each after the prefix, as a row has them."""
        quantiles = zip(("p20_ms", "p50_ms", "p80_ms"), self.quantiles_ms(), strict=True)
        times: Row = {f"{prefix}{name}": f"{value:.5g}" for name, value in quantiles}
        return {f"{prefix}samples": len(self.samples_s), **times}


def reason(error: Exception) -> str:
    """The text of column `note` for a contender that raised."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:160]


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
    """Takes several samples of a short call, after one that is not counted, or one of a long."""
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


def time_interleaved(
    contenders: Sequence[Contender], device: torch.device, budget_s: float, seed: int = 0
) -> None:
    """Fills `samples_s` of every contender that has no error, in shuffled rounds.

    Noise of the machine hits all contenders alike: every round gives each of them one turn, in a
    new random order. The timers of torch and Triton time one function after the other, so they
    do not serve here. `budget_s` is shared equally. A contender too slow for its share takes
    part in every k-th round and still gets MIN_SAMPLES calls. Where those would take more than
    the whole budget, the known time of a call (`estimate_s`) is the only sample.
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
    turns = [max(MIN_SAMPLES, int(share_s / contender.estimate_s)) for contender in running]
    entrants = [(c, max(1, rounds // n)) for c, n in zip(running, turns, strict=True)]
    order = random.Random(seed)
    deadline = time.perf_counter() + 2 * budget_s  # a machine much slower than its first call
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            for contender, stride in order.sample(entrants, len(entrants)):
                if index % stride == 0:
                    _turn(contender, device)
            if time.perf_counter() > deadline and index + 1 >= MIN_SAMPLES:
                break
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """A whole number >= 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted positive whole numbers, got {text!r}")
    return int(text)


def positives(text: str) -> tuple[int, ...]:
    """Whole numbers >= 1, separated by commas; each counts once."""
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))


def duration(text: str) -> float:
    """A positive number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError(f"wanted a positive number, got {text!r}")
    return seconds


def pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Sizes (n, d), written NxD and separated by commas."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text.lower()):
        raise argparse.ArgumentTypeError(f"wanted NxD,NxD,... such as 128x512, got {text!r}")
    split = (part.split("x") for part in text.lower().split(","))
    return tuple((int(n), int(d)) for n, d in split)


def some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Names out of `known`, separated by commas; each counts once."""

    def names(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"wanted some of {', '.join(known)}, got {name!r}")
        return found

    return names


def _device(text: str) -> torch.device:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"wanted cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise argparse.ArgumentTypeError(f"torch {torch.__version__} ({built}) sees no CUDA device")
    return torch.device(text)


def make_parser(
    description: str | None,
    results: str,
    *,
    seconds: Mapping[str, float] | None = None,
    device: bool = False,
    quick: str = "",
    sizes: Callable[[str], object] | None = None,
    batches: bool = False,
    dtypes: Sequence[str] = (),
    providers: Sequence[str] = (),
    threads: Sequence[int] = (),
) -> argparse.ArgumentParser:
    """A parser with `--out`, `--resume`, `--stop-after` and those options that are asked for.

    A program adds its own options to it and hands it to `parse`.

    Args:
        description: the docstring of the program; `--help` prints it.
        results: name of the results file without `.csv`; `{device}` in it becomes the device's.
        seconds: adds `--case-seconds`; its defaults for "cpu", "cuda" and "quick".
        device: adds `--device`, a torch.device: cpu unless given.
        quick: adds `--quick`, with this explanation.
        sizes: adds `--sizes`, of this type, for example `pairs` or `positives`; None unless given.
        batches: adds `--batches`, a tuple of integers; None unless given.
        dtypes: adds `--dtypes`, a tuple of some of these names; None unless given.
        providers: adds `--providers`, likewise.
        threads: adds `--threads`, a tuple of integers; these unless given.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(results=results, seconds=seconds, begin=time.monotonic())
    add = parser.add_argument
    if device:
        add("--device", type=_device, default="cpu", help="cpu or cuda; default: cpu")
    else:
        parser.set_defaults(device=torch.device("cpu"))
    if sizes is not None:
        add("--sizes", type=sizes, help="separated by commas; default: those of bench/README.md")
    if batches:
        add("--batches", type=positives, help="such as 1,8; default: those of bench/README.md")
    if dtypes:
        add("--dtypes", type=some_of(dtypes), help=f"some of {','.join(dtypes)}")
    if providers:
        add("--providers", type=some_of(providers), help=f"some of {','.join(providers)}")
    if threads:
        default = ",".join(map(str, threads))
        add("--threads", type=positives, default=tuple(threads), help=f"default: {default}")
    if seconds is not None:
        add("--case-seconds", type=duration, help="time for one case, shared by its contenders")
    if quick:
        add("--quick", action="store_true", help=quick)
    add("--out", type=Path, help="CSV file; default: a file in bench/results")
    add("--resume", action="store_true", help="continue an interrupted run from <out>.partial")
    help_stop = "begin no further case after so many seconds"
    add("--stop-after", type=duration, default=math.inf, metavar="SECONDS", help=help_stop)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with the defaults of `out` and `case_seconds` filled in.

    A wrong value ends the program with exit status 2 and a message that names the option.
    """
    arguments = parser.parse_args(argv)
    if arguments.out is None:
        arguments.out = results_file(arguments.device, arguments.results)
    if arguments.seconds is not None and arguments.case_seconds is None:
        kind = "quick" if getattr(arguments, "quick", False) else arguments.device.type
        arguments.case_seconds = arguments.seconds[kind]
    return arguments


def results_file(device: torch.device, results: str) -> Path:
    """bench/results/<results>.csv; `{device}` in it becomes cpu or the name of the GPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return RESULTS / f"{results.format(device=machine.slug(name))}.csv"


# ---------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Writes all rows under a temporary name, then renames the file: no half-written one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """The rows of a results file; none if it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _finished_before(
    partial: Path | None, where: Row, cases: Sequence[Any]
) -> tuple[list[Row], list[Any]]:
    """The rows of an interrupted run, and the cases it lacks.

    ValueError if the rows are of another build or machine.
    """
    rows = read_csv(partial) if partial is not None else []
    identity = [f.name for f in fields(cases[0])] if cases else []
    for row in rows:
        for column in ENVIRONMENT:
            if column in where and column not in identity and row.get(column) != where[column]:
                raise ValueError(
                    f"{partial} has {column} {row.get(column)!r}, this run has {where[column]!r}: "
                    "delete it, or run without --resume"
                )
    done = {tuple(row.get(name) for name in identity) for row in rows}
    return rows, [c for c in cases if tuple(str(getattr(c, n)) for n in identity) not in done]


def print_rows(title: object, rows: Sequence[Row], show: Sequence[str]) -> None:
    """Prints a table of these columns, aligned, below a title."""
    cells = [[*show], *([str(row.get(name, "")) for name in show] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for line in cells:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  " + "  ".join(padded).rstrip())
    sys.stdout.flush()


def run_cases(
    arguments: argparse.Namespace,
    cases: Sequence[Any],
    measure: Callable[[Any], Sequence[Row]],
    columns: Sequence[str],
    show: Sequence[str],
    *,
    earlier: Sequence[Row] = (),
    after: Callable[[list[Row]], object] | None = None,
) -> int:
    """Measures all cases, prints their rows, writes `arguments.out`; returns the exit status.

    A finished case is kept in `<out>.partial`. Ctrl-C leaves that file and the earlier results,
    and `--resume` continues with the missing cases. `--stop-after` counts from the start of the
    program; at least one case is measured, and the results file then has what there is.

    Args:
        arguments: from `parse`.
        cases: instances of a frozen dataclass, whose fields are columns that identify a case. With
            a field `threads`, torch has so many threads while the case is measured.
        measure: the rows of a case. It need not repeat the fields of the case, nor
            where the row comes from (date, commit, torch, device, clocks, threads and so on).
        columns: those of the CSV file, in order. A row may lack some, but has no others.
        show: those of the table on screen.
        earlier: rows that the results file starts with.
        after: called with all measured rows once the results file is there. It may change the rows,
            and the file is then written again.

    Returns:
        0; 130 after Ctrl-C; 2 after a ValueError or ArithmeticError, whose message goes to stderr.
    """
    device, out = arguments.device, arguments.out
    partial = out.with_name(out.name + ".partial")
    threads = torch.get_num_threads()
    try:
        where: Row = {**machine.environment(device), "threads": str(threads)}
        where = {name: value for name, value in where.items() if name in columns}
        print(", ".join(f"{name} {value}" for name, value in where.items()))
        rows, todo = _finished_before(partial if arguments.resume else None, where, cases)
        begin, stopped = time.monotonic(), False
        for count, case in enumerate(todo):
            now = time.monotonic()
            stopped = count > 0 and now - arguments.begin > arguments.stop_after
            if stopped:
                print(f"\nstopped after {count} of {len(todo)} cases; --resume continues")
                break
            title = " ".join(f"{name}={value}" for name, value in asdict(case).items())
            left = (now - begin) / max(count, 1) * (len(todo) - count)
            estimate = f" (about {left:.0f} s left)" if count else ""
            print(f"[{count + 1}/{len(todo)}] {title}{estimate}", file=sys.stderr, flush=True)
            torch.set_num_threads(getattr(case, "threads", threads))
            measured = measure(case)
            if "clocks" in where:
                where["clocks"] = machine.clocks(device)
            found = [{**where, **asdict(case), **row} for row in measured]
            rows += found
            write_csv(partial, columns, rows)
            print_rows(title, found, show)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # of the graphs' own pools too
        write_csv(out, columns, [*earlier, *rows])
        if not stopped:
            partial.unlink(missing_ok=True)
        if after is not None:
            after(rows)
            write_csv(out, columns, [*earlier, *rows])
    except KeyboardInterrupt:
        print(f"\nstopped; --resume continues from {partial}, if it exists", file=sys.stderr)
        return 130
    except (ValueError, ArithmeticError) as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    print(f"\n{out}")
    return 0
