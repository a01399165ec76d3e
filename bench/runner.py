"""Runs the cases of a benchmark program: options, interleaved timing, results file, resumption.

A program states its cases as instances of a frozen dataclass, whose fields are columns. It measures
one of them: a list of rows, one for each contender. `accumulator.py` is a short example.
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
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch

from vne_kernels.common.files import atomic_write

Call = Callable[[], object]
Row = dict[str, object]

RESULTS = Path(__file__).resolve().parent / "results"
ENVIRONMENT = ("commit", "torch", "cusolver", "driver", "device_name", "threads")
"""Columns in which the rows of an interrupted run and those of its resumption have to agree."""

MAX_ROUNDS = 200
MIN_SAMPLES = 3
TURN_S = 0.005  # the turn of a contender in one round: calls for about this long
MAX_CALLS_PER_TURN = 10


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
    row: Row = field(default_factory=dict)  # further columns, for the program

    def quantiles_ms(self) -> tuple[float, float, float]:
        """Returns p20, p50 and p80 of the samples; NaN if there are none."""
        samples = torch.tensor(self.samples_s or [math.nan], dtype=torch.float64) * 1e3
        p20, p50, p80 = samples.quantile(samples.new_tensor([0.2, 0.5, 0.8])).tolist()
        return p20, p50, p80

    def columns(self, prefix: str = "") -> Row:
        """Returns `samples`, `p20_ms`, `p50_ms` and `p80_ms`, each after the prefix, for a row."""
        p20, p50, p80 = (f"{value:.5g}" for value in self.quantiles_ms())
        row = {"samples": len(self.samples_s), "p20_ms": p20, "p50_ms": p50, "p80_ms": p80}
        return {prefix + name: value for name, value in row.items()}


def reason(error: Exception) -> str:
    """Returns the text of column `note` for a contender that raised."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:160]


def time_once(contender: Contender, device: torch.device) -> float:
    """Returns seconds of `call`, by the host's clock on a CPU, by events on a GPU that was idle."""
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


def time_interleaved(
    contenders: Sequence[Contender], device: torch.device, budget_s: float
) -> None:
    """Fills `samples_s` of every contender that has no error, in shuffled rounds.

    Noise of the machine hits all contenders alike: every round gives each of them one turn, in a
    new random order. The timers of torch and Triton time one function after the other, so they
    do not serve here. Each gets an equal part of `budget_s`. A contender too slow for it takes
    part in every k-th round and still gets MIN_SAMPLES calls. Where those would take more than
    the whole budget, the known time of a call (`estimate_s`) is the only sample. A turn takes
    several samples of a short call, after one that is not counted, or one of a long call.
    """
    running = []
    for contender in contenders:
        if MIN_SAMPLES * contender.estimate_s > budget_s:
            contender.samples_s.append(contender.estimate_s / contender.calls)
        elif contender.error is None:
            running.append(contender)
    each_s = budget_s / max(1, len(running))
    for contender in running:
        estimate_s = time_once(contender, device)
        if estimate_s < each_s / MIN_SAMPLES:  # the least of three: one may be interrupted
            estimate_s = min(estimate_s, *(time_once(contender, device) for _ in range(2)))
        contender.estimate_s = max(estimate_s, 1e-7)
    turn_s = sum(max(TURN_S, c.estimate_s) for c in running if c.estimate_s <= each_s)
    rounds = max(MIN_SAMPLES, min(MAX_ROUNDS, int(budget_s / max(turn_s, TURN_S))))
    turns = (max(MIN_SAMPLES, int(each_s / c.estimate_s)) for c in running)
    entrants = [(c, max(1, rounds // n)) for c, n in zip(running, turns, strict=True)]
    order = random.Random(0)
    deadline = time.perf_counter() + 2 * budget_s  # a machine much slower than its first call
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            for contender, stride in order.sample(entrants, len(entrants)):
                if index % stride != 0:
                    continue
                calls = min(MAX_CALLS_PER_TURN, max(1, int(TURN_S / contender.estimate_s)))
                times = [time_once(contender, device) for _ in range(calls + (calls > 1))]
                contender.samples_s += [seconds / contender.calls for seconds in times[-calls:]]
            if time.perf_counter() > deadline and index + 1 >= MIN_SAMPLES:
                break
    finally:
        gc.enable()


def _checked(convert: Callable[[str], Any], wanted: str) -> Callable[[str], Any]:
    """An argparse type: `convert`, with a message that says what was wanted at a ValueError."""

    def read(text: str) -> Any:
        try:
            return convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wanted {wanted}, got {text!r}") from None

    return read


def _positive(text: str, number: Callable[[str], Any] = int) -> Any:
    value = number(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def _each(one: Callable[[str], Any], text: str) -> tuple[Any, ...]:
    """Returns what `one` makes of each part between commas; a value counts once."""
    return tuple(dict.fromkeys(one(part.strip()) for part in text.split(",")))


def _pair(text: str) -> tuple[int, int]:
    n, d = text.lower().split("x")
    return _positive(n), _positive(d)


positive = _checked(_positive, "a whole number >= 1")
positives = _checked(partial(_each, _positive), "whole numbers >= 1, such as 1,8")
duration = _checked(partial(_positive, number=float), "a positive number")
pairs = _checked(partial(_each, _pair), "NxD,NxD,... such as 128x512")


def some_of(known: Sequence[str]) -> Callable[[str], Any]:
    """An argparse type: names out of `known`, separated by commas."""
    one = lambda name: known[known.index(name)]  # noqa: E731
    return _checked(partial(_each, one), f"some of {', '.join(known)}")


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
    """Returns a parser with `--out`, `--resume`, `--stop-after` and the options asked for.

    The keywords add the options of their names, which are None unless given, but `--device` is cpu.
    A program adds further options to the parser and hands it to `parse`.

    Args:
        description: the docstring of the program; `--help` prints it.
        results: name of the results file without `.csv`; `{device}` in it becomes the device's.
        seconds: the defaults of `--case-seconds` for "cpu", "cuda" and "quick".
        quick: the explanation of `--quick`.
        sizes: the type of `--sizes`, for example `pairs` or `positives`.
        dtypes, providers: the names to choose from.
        threads: the default of `--threads`.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(wanted: object, name: str, **settings: Any) -> None:
        if wanted:
            parser.add_argument(name, **settings)

    cases = "separated by commas; default: those of bench/README.md"
    add(device, "--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add(sizes, "--sizes", type=sizes, help=cases)
    add(batches, "--batches", type=positives, help=cases)
    add(dtypes, "--dtypes", type=some_of(dtypes), help=f"some of {','.join(dtypes)}")
    add(providers, "--providers", type=some_of(providers), help=f"some of {','.join(providers)}")
    add(threads, "--threads", type=positives, default=tuple(threads), help=f"default: {threads}")
    add(seconds, "--case-seconds", type=duration, help="for one case, shared by its contenders")
    add(quick, "--quick", action="store_true", help=quick)
    add(True, "--out", type=Path, help="CSV file; default: a file in bench/results")
    add(True, "--resume", action="store_true", help="continue a run from <out>.partial")
    last = "begin no further case after so many seconds"
    add(True, "--stop-after", type=duration, default=math.inf, metavar="SECONDS", help=last)
    parser.set_defaults(results=results, seconds=seconds, begin=time.monotonic())
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options, with the defaults of `device`, `out` and `case_seconds` filled in.

    A wrong value ends the program with exit status 2 and a message that names the option.
    """
    arguments = parser.parse_args(argv, argparse.Namespace(device="cpu", quick=False))
    kind, name = arguments.device, "cpu"
    if kind == "cuda":
        if not torch.cuda.is_available():
            parser.error(f"argument --device: torch {torch.__version__} sees no GPU for 'cuda'")
        name = torch.cuda.get_device_name()
    arguments.device = torch.device(kind)
    if arguments.out is None:
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        arguments.out = RESULTS / f"{arguments.results.format(device=slug)}.csv"
    if arguments.seconds is not None and arguments.case_seconds is None:
        arguments.case_seconds = arguments.seconds["quick" if arguments.quick else kind]
    return arguments


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Writes all rows under a temporary name, then renames the file: no half-written one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """Returns the rows of a results file; none if it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _unfinished(rows: Sequence[Row], where: Row, cases: Sequence[Any]) -> list[Any]:
    """Returns the cases without rows. ValueError if the rows are of another build or machine."""
    identity = asdict(cases[0]) if cases else {}
    fixed = {name: where[name] for name in ENVIRONMENT if name in where and name not in identity}
    for row in rows:
        if (found := {name: row.get(name) for name in fixed}) != fixed:
            raise ValueError(f"--resume: the rows have {found}, this run has {fixed}")
    done = {tuple(row.get(name) for name in identity) for row in rows}
    return [case for case in cases if tuple(map(str, asdict(case).values())) not in done]


def print_rows(title: object, rows: Sequence[Row], show: Sequence[str]) -> None:
    """Prints a table of these columns, aligned, below a title."""
    cells = [[*show], *([str(row.get(name, "")) for name in show] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for line in cells:
        print("  ", *(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
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

    A finished case is saved in `<out>.partial`. Ctrl-C leaves that file and the earlier results,
    and `--resume` continues with the missing cases. `--stop-after` counts from the start of the
    program; at least one case is measured, and the results file then has what there is.

    Args:
        arguments: from `parse`.
        cases: instances of a frozen dataclass, whose fields identify a case. With a field
            `threads`, torch has so many threads while the case is measured.
        measure: the rows of a case, which need not repeat its fields and the environment.
        columns: those of the CSV file, in order. A row may lack some, but has no others.
        show: those of the table on screen.
        earlier: rows that the results file starts with.
        after: called with all rows once the results file is there, which is then written again.

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
        rows = read_csv(partial) if arguments.resume else []
        todo = _unfinished(rows, where, cases)
        stopped = False
        for count, case in enumerate(todo):
            seconds = time.monotonic() - arguments.begin
            if stopped := count > 0 and seconds > arguments.stop_after:
                print(f"\nstopped after {count} of {len(todo)} cases; --resume continues")
                break
            title = " ".join(f"{name}={value}" for name, value in asdict(case).items())
            print(f"[{count + 1}/{len(todo)}, {seconds:.0f} s] {title}", file=sys.stderr)
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
