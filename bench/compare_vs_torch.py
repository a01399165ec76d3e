"""The von Neumann entropy here against what people write in torch: time, memory, error.

    python bench/compare_vs_torch.py                  # the whole table, to bench/results/cpu.csv
    python bench/compare_vs_torch.py --quick          # two sizes, about a minute
    python bench/compare_vs_torch.py --device cuda    # the same on a GPU, replayed graphs besides

One row of the CSV per provider, mode, size, batch, dtype, number of threads, way of launching and
state of the cache; README.md beside this file states the protocol and every column. `plot.py`
draws the pictures from the CSV alone.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, product
from pathlib import Path

import arguments as options
import capturable
import floor
import harness
import machine
import memory
import torch
from torch import Tensor

try:
    import providers
    from providers import BASELINE, Entropy, Provider, Result, evaluate

    from vne_kernels import reference
except ImportError as error:
    print(f"compare_vs_torch: {error}; install the package first: pip install .", file=sys.stderr)
    sys.exit(2)

SIZES = (
    (32, 128),
    (64, 256),
    (64, 512),
    (128, 256),
    (128, 512),
    (256, 512),
    (512, 512),
    (512, 2048),
    (1024, 2048),
)
BATCHES = (1, 8)
CUDA_M = (128, 32, 64, 256, 512, 1024, 2048)  # the size of the goals first
CUDA_SIZES = tuple((m, 4 * m) for m in CUDA_M)
CUDA_BATCHES = (1, 2, 8, 64)
DEFAULT_SECONDS = {"cpu": 10.0, "cuda": 2.0}
QUICK_SIZES = ((32, 128), (128, 512))
MODES = ("forward", "forward+backward")
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64)}
DTYPES |= {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16)}
CHECKED = 8  # samples of a batch whose errors are looked at: float64 takes long

COLUMNS = (
    *("date", "commit", "torch", "cuda", "cusolver", "driver", "device", "device_name"),
    *("clocks", "threads", "provider", "batching", "mode", "launch", "l2", "dtype"),
    *("n", "d", "m", "batch", "samples", "calls", "p20_ms", "p50_ms", "p80_ms"),
    *("speedup_vs_gram", "floor_ms", "floor_share", "launches", "peak_mib"),
    *("value_rel_error", "grad_rel_error", "note"),
)

Row = dict[str, object]


# ---------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------


CASE = ("n", "d", "batch", "dtype", "threads", "mode")  # columns a case is recognised by


@dataclass(frozen=True)
class Case:
    n: int
    d: int
    batch: int
    dtype: str
    threads: int
    mode: str

    def __str__(self) -> str:
        size = f"n={self.n} d={self.d} batch={self.batch}"
        return f"{size} {self.dtype} {self.mode} threads={self.threads}"

    @property
    def gradient(self) -> bool:
        return self.mode == "forward+backward"

    def columns(self) -> Row:
        return {name: getattr(self, name) for name in CASE}


@dataclass(frozen=True)
class Variant:
    """How the calls of a provider are launched, and where they find their input."""

    launch: str  # eager | graph
    l2: str  # hot | cold


VARIANTS = {
    "cpu": (Variant("eager", "hot"),),
    "cuda": tuple(Variant(*v) for v in product(("eager", "graph"), ("hot", "cold"))),
}


@dataclass(frozen=True)
class Problem:
    """The one input of all providers, and the float64 answers of its first samples."""

    z: Tensor  # (n, d) for batch 1, otherwise (batch, n, d)
    value: Tensor
    grad: Tensor

    def copies(self, count: int) -> list[Tensor]:
        return [self.z.detach().clone().requires_grad_() for _ in range(count)]


def make_problem(n: int, d: int, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Independent normal entries from a fixed seed: the features at the start of a training."""
    generator = torch.Generator().manual_seed(n * 1_000_003 + d * 101 + batch)
    shape = (n, d) if batch == 1 else (batch, n, d)
    z = torch.randn(shape, generator=generator).to(dtype)
    checked = z if batch == 1 else z[: CHECKED if min(n, d) <= 512 else 1]
    value, grad = reference.oracle(checked), reference.oracle_grad(checked)
    return Problem(z.to(device).requires_grad_(), value, grad)


def _relative_error(got: Tensor, want: Tensor, dims: tuple[int, ...]) -> float:
    """Largest over the samples looked at of |got - want| / |want|; NaN where got is not finite."""
    got = got.detach()[: len(want)] if want.ndim == got.ndim > len(dims) else got.detach()
    difference = torch.linalg.vector_norm(got.double().cpu() - want, dim=dims)
    return float((difference / torch.linalg.vector_norm(want, dim=dims)).max())


def errors_of(result: Result, problem: Problem) -> tuple[float, float]:
    """Of the value and of the gradient."""
    value, grad = result
    value_error = _relative_error(value.unsqueeze(-1), problem.value.unsqueeze(-1), (-1,))
    if grad is None:
        return value_error, math.nan
    return value_error, _relative_error(grad, problem.grad, (-2, -1))


@dataclass
class Measured:
    """One provider in one variant: what is timed, and what was seen beforehand."""

    provider: Provider
    variant: Variant
    contender: harness.Contender
    value_error: float = math.nan
    grad_error: float = math.nan
    call_s: float = math.nan  # of one call, a first idea

    def note(self, gradient: bool) -> str:
        if self.contender.error is not None:
            return self.contender.error
        errors = (self.value_error, self.grad_error) if gradient else (self.value_error,)
        return "" if all(map(math.isfinite, errors)) else "the result is not finite"


def _nothing() -> None:
    pass


@dataclass
class Bench:
    """A device, what it can do, and what was learned of the providers so far."""

    device: torch.device
    providers: tuple[Provider, ...]
    variants: tuple[Variant, ...]
    case_seconds: float
    call_seconds: float
    refused: capturable.Refused = field(default_factory=dict)  # what no CUDA graph holds
    seconds_per_sample: dict[tuple[str, Case], float] = field(default_factory=dict)

    # ---- one provider ------------------------------------------------------------------------

    def measure(self, case: Case, problem: Problem) -> list[Measured]:
        """All providers of one case, timed together."""
        measured = [m for p in self.providers for m in self._prepare(p, case, problem)]
        harness.time_interleaved([m.contender for m in measured], self.device, self.case_seconds)
        return measured

    def _prepare(self, provider: Provider, case: Case, problem: Problem) -> Iterator[Measured]:
        """Every variant, run and checked once; what is timed next is warm."""
        if provider.compiled and not provider.batched and case.batch > 1:
            return  # the loop would be unrolled into one program: minutes of compilation
        eager = self._eager(provider, case, problem)
        yield eager
        if eager.contender.error is None and not self._too_slow(eager.call_s):
            for variant in self.variants[1:]:
                yield self._variant(variant, eager, case, problem)

    def _too_slow(self, seconds: float) -> bool:
        return harness.MIN_SAMPLES * seconds > self.case_seconds

    def _eager(self, provider: Provider, case: Case, problem: Problem) -> Measured:
        """First call: errors against float64. Second: peak memory. Third: a first time."""
        contender = harness.Contender(provider.name, _nothing, self.preference(provider))
        measured = Measured(provider, Variant("eager", "hot"), contender)
        known = (provider.name, replace(case, batch=1))
        expected = self.seconds_per_sample.get(known, math.nan) * case.batch
        if expected > self.call_seconds:
            contender.error = f"not run: about {expected:.0f} s a call by a smaller batch"
            return measured
        try:
            entropy = provider.entropy(DTYPES[case.dtype])
            contender.call = lambda: evaluate(entropy, problem.z, case.gradient)
            contender.prepare()
            result = evaluate(entropy, problem.z, case.gradient)
            measured.value_error, measured.grad_error = errors_of(result, problem)
            del result
            contender.peak_bytes = memory.peak_bytes(contender.call, self.device)
            measured.call_s = harness.time_once(contender, self.device)
            if self._too_slow(measured.call_s):  # once more: it may have been interrupted
                measured.call_s = min(measured.call_s, harness.time_once(contender, self.device))
            if self._too_slow(measured.call_s):
                contender.estimate_s = measured.call_s  # the only sample
        except Exception as error:  # a provider that cannot do the case is a result, no accident
            contender.error = harness.reason(error)
        self.seconds_per_sample[known] = measured.call_s / case.batch
        return measured

    def preference(self, provider: Provider) -> harness.Call:
        """Untimed, before each call: the library behind torch.linalg."""
        if self.device.type != "cuda":
            return _nothing
        return lambda: torch.backends.cuda.preferred_linalg_library(provider.linalg)

    # ---- its other variants ------------------------------------------------------------------

    def _variant(self, variant: Variant, eager: Measured, case: Case, problem: Problem) -> Measured:
        """The same call on inputs that the cache has lost, or replayed from a graph, or both."""
        provider = eager.provider
        contender = harness.Contender(provider.name, _nothing, eager.contender.prepare)
        measured = replace(eager, variant=variant, contender=contender)
        refused = self.refused.get((provider.name, min(case.n, case.d), case.batch > 1))
        if variant.launch == "graph" and refused is not None:
            contender.error = refused
            return measured
        try:
            entropy = provider.entropy(DTYPES[case.dtype])
            inputs = problem.copies(1)  # what the eager call left on its own input stays there
            if variant.l2 == "cold":
                held = problem.z.numel() * problem.z.element_size()
                inputs = problem.copies(1 + math.ceil(2 * machine.l2_bytes(self.device) / held))
            if variant.launch == "graph":
                self._graph(measured, entropy, inputs, case, problem)
            else:
                turns = cycle(inputs)
                contender.call = lambda: evaluate(entropy, next(turns), case.gradient)
        except Exception as error:
            contender.error = harness.reason(error)
        return measured

    def _graph(
        self, measured: Measured, entropy: Entropy, inputs: list[Tensor], case: Case,
        problem: Problem,
    ) -> None:  # fmt: skip
        """One graph of a call on each input. A short one is replayed several times a sample."""
        contender = measured.contender
        last: list[Result] = []

        def calls() -> None:
            for z in inputs:
                s, grad = evaluate(entropy, z, case.gradient)
                last[:] = [(s.detach(), grad)]

        if self._too_slow(len(inputs) * measured.call_s):
            contender.error = f"not run: {len(inputs)} inputs that L2 cannot hold take too long"
            return
        contender.prepare()
        replay = machine.capture(calls, self.device)
        for tensor in last[0]:
            if tensor is not None:
                tensor.fill_(math.nan)  # so that what is checked was written by the replay
        replay()
        measured.value_error, measured.grad_error = errors_of(last[0], problem)
        short = max(1, int(harness.TURN_S / measured.call_s))
        repeats = min(short, harness.MAX_CALLS_PER_TURN) if len(inputs) == 1 else 1
        contender.calls = repeats * len(inputs)
        contender.call = lambda: [replay() for _ in range(repeats)]


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


def _baseline_ms(medians: dict[tuple[str, Variant], float], variant: Variant) -> float:
    """Of BASELINE in the same variant; launched eagerly where no graph holds it."""
    choices = (variant, Variant("eager", variant.l2), Variant("eager", "hot"))
    found = (medians.get((BASELINE, choice), math.nan) for choice in choices)
    return next((ms for ms in found if math.isfinite(ms)), math.nan)


def rows_of(
    case: Case, measured: Sequence[Measured], ceilings: floor.Ceilings, on_gpu: bool
) -> list[Row]:
    dtype = DTYPES[case.dtype]
    floor_ms = math.nan
    if dtype != torch.float64:  # the ceilings are those of float32 arithmetic
        floor_ms = 1e3 * floor.floor_s(
            ceilings,
            case.n,
            case.d,
            case.batch,
            dtype.itemsize,
            gradient=case.gradient,
            on_gpu=on_gpu,
        )
    quantiles = [m.contender.quantiles_ms() for m in measured]
    medians = {(m.provider.name, m.variant): q[1] for m, q in zip(measured, quantiles, strict=True)}
    rows: list[Row] = []
    for m, (p20, p50, p80) in zip(measured, quantiles, strict=True):
        rows.append(
            {
                **case.columns(),
                "m": min(case.n, case.d),
                "provider": m.provider.name,
                "batching": "batched" if m.provider.batched else "looped",
                "launch": m.variant.launch,
                "l2": m.variant.l2,
                "samples": len(m.contender.samples_s),
                "calls": m.contender.calls,
                "p20_ms": f"{p20:.5g}",
                "p50_ms": f"{p50:.5g}",
                "p80_ms": f"{p80:.5g}",
                "speedup_vs_gram": f"{_baseline_ms(medians, m.variant) / p50:.4g}",
                "floor_ms": f"{floor_ms:.4g}",
                "floor_share": f"{floor_ms / p50:.3g}",
                "launches": "",
                "peak_mib": f"{m.contender.peak_bytes / 2**20:.4g}",
                "value_rel_error": f"{m.value_error:.2e}",
                "grad_rel_error": f"{m.grad_error:.2e}" if case.gradient else "",
                "note": m.note(case.gradient),
            }
        )
    return rows


def count_launches(bench: Bench, rows: Sequence[Row]) -> None:
    """Fills the column of a GPU's rows. After all the timing: a profiler that has once been at work
    slows down every launch of the process. Compiled providers would be compiled once more; they,
    and calls of a second, are left out."""
    counted: dict[tuple[object, ...], str] = {}
    known = {provider.name: provider for provider in bench.providers}
    for row in rows:
        provider = known[str(row["provider"])]
        key = (provider.name, *(str(row[name]) for name in CASE))
        if key not in counted and not provider.compiled and float(str(row["p50_ms"])) < 1e3:
            n, d, batch = (int(str(row[name])) for name in ("n", "d", "batch"))
            shape = (n, d) if batch == 1 else (batch, n, d)
            dtype = DTYPES[str(row["dtype"])]
            z = torch.randn(shape, dtype=dtype, device=bench.device, requires_grad=True)
            entropy, gradient = provider.entropy(dtype), row["mode"] == MODES[1]
            bench.preference(provider)()
            evaluate(entropy, z, gradient)
            count = machine.launches(partial(evaluate, entropy, z, gradient), bench.device)
            counted[key] = "" if math.isnan(count) else f"{count:.0f}"
        row["launches"] = counted.get(key, "")


# ---------------------------------------------------------------------------------------------
# Screen
# ---------------------------------------------------------------------------------------------


def print_case(case: Case, rows: Sequence[Row]) -> None:
    print(f"\n{case}, floor {rows[0]['floor_ms']} ms")
    print(
        f"  {'provider':<19}{'launch':<7}{'L2':<5}{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}"
        f"{'vs gram':>11}{'peak MiB':>10}{'value err':>11}{'grad err':>11}  note"
    )
    for row in rows:
        print(
            f"  {row['provider']:<19}{row['launch']:<7}{row['l2']:<5}{row['p20_ms']:>10}"
            f"{row['p50_ms']:>10}{row['p80_ms']:>10}{row['speedup_vs_gram']:>10}x"
            f"{row['peak_mib']:>10}{row['value_rel_error']:>11}{row['grad_rel_error'] or '-':>11}"
            f"  {row['note']}"
        )
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text.lower()):
        raise argparse.ArgumentTypeError(f"wanted NxD,NxD,... such as 128x512, got {text!r}")
    pairs = (part.split("x") for part in text.lower().split(","))
    return tuple((int(n), int(d)) for n, d in pairs)


def _dtypes(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"wanted some of {', '.join(DTYPES)}, got {name!r}")
    return names


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare_vs_torch.py",
        description="Time, memory and error of vn_entropy against what people write in torch.",
        allow_abbrev=False,
    )
    default_threads = tuple(t for t in (1, 2) if t <= (os.cpu_count() or 1))
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=options.positives, default=default_threads, help="such as 1,2; CPU only")
    add("--sizes", type=_sizes, help="NxD,NxD,...; default: those of README.md")
    add("--batches", type=options.positives, help="such as 1,8; default: those of README.md")
    add("--dtypes", type=_dtypes, help="such as float32,bfloat16; default: those of README.md")
    add("--case-seconds", type=options.duration, help="time for one case, shared by its providers")
    add(
        "--call-seconds", type=options.duration, default=60.0, help="longer calls are not made (60)"
    )
    add("--quick", action="store_true", help="two sizes, no batch of samples, unless given")
    add("--out", type=Path, help="CSV file; default: bench/results/<device>.csv")
    add("--resume", action="store_true", help="go on from <out>.partial")
    add(
        "--stop-after",
        type=options.duration,
        default=math.inf,
        help="begin no case after so many seconds",
    )
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
            parser.error(f"no CUDA device: torch {torch.__version__} ({built}) sees none")
        arguments.threads = (torch.get_num_threads(),)
    if arguments.quick:
        arguments.sizes = arguments.sizes or QUICK_SIZES
        arguments.batches = arguments.batches or (1,)
    if arguments.case_seconds is None:
        arguments.case_seconds = 1.0 if arguments.quick else DEFAULT_SECONDS[arguments.device]
    if arguments.out is None:
        arguments.out = harness.results_file(torch.device(arguments.device))
    return arguments


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """Everything combined with everything if anything is named, otherwise README.md's table."""
    if arguments.device == "cpu" or arguments.sizes or arguments.batches or arguments.dtypes:
        blocks = [
            (
                arguments.sizes or (SIZES if arguments.device == "cpu" else CUDA_SIZES),
                arguments.batches or (BATCHES if arguments.device == "cpu" else CUDA_BATCHES),
                arguments.dtypes or ("float32",),
                MODES,
            )
        ]
    else:
        squares_and_tall = tuple(size for m in CUDA_M for size in ((m, m), (4 * m, m)))
        blocks = [
            (CUDA_SIZES, CUDA_BATCHES, ("float32",), MODES),
            (squares_and_tall, (1, 8), ("float32",), MODES),
            (CUDA_SIZES, (1, 64), ("bfloat16",), MODES[1:]),
        ]
    return [
        Case(n, d, batch, dtype, threads, mode)
        for sizes, batches, dtypes, modes in blocks
        for (n, d), batch, dtype, threads, mode in product(
            sizes, batches, dtypes, arguments.threads, modes
        )
    ]


class Ceilings:
    """Those of each number of threads, measured when first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known: dict[int, floor.Ceilings] = {}

    def of(self, threads: int) -> floor.Ceilings:
        if threads not in self.known:
            torch.set_num_threads(threads)
            self.known[threads] = floor.measure(self.device)
            print(f"threads {threads}: {self.known[threads]}")
        return self.known[threads]


def make_bench(arguments: argparse.Namespace, cases: Sequence[Case]) -> Bench:
    device = torch.device(arguments.device)
    found = providers.available(device)
    for provider in providers.PROVIDERS:
        if provider not in found:
            print(f"without {provider.name}: {provider.why_not(device)}")
    refused: capturable.Refused = {}
    if device.type == "cuda":
        sizes = sorted({min(case.n, case.d) for case in cases})
        refused = capturable.refused(capturable.trials([p.name for p in found], sizes))
    return Bench(
        device,
        found,
        VARIANTS[device.type],
        arguments.case_seconds,
        arguments.call_seconds,
        refused,
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Measure every case, print it, and keep what is done in a .partial file until the end."""
    begin = time.monotonic()
    device = torch.device(arguments.device)
    where: Row = {**harness.environment(device)}
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    so_far = arguments.out.with_name(arguments.out.name + ".partial")
    rows = harness.finished_before(so_far, where) if arguments.resume else []
    done = {tuple(str(row[name]) for name in CASE) for row in rows}
    cases = cases_of(arguments)
    todo = [c for c in cases if tuple(str(v) for v in c.columns().values()) not in done]
    bench, ceilings = make_bench(arguments, todo), Ceilings(device)
    progress = harness.Progress(len(todo))
    problem: tuple[tuple[object, ...], Problem] | None = None
    for case in todo:
        if time.monotonic() - begin > arguments.stop_after:
            print(f"\nstopped after {progress.done} of {len(todo)} cases; --resume goes on")
            break
        key = (case.n, case.d, case.batch, case.dtype)
        if problem is None or problem[0] != key:
            problem = None  # its memory first
            problem = key, make_problem(case.n, case.d, case.batch, DTYPES[case.dtype], device)
        progress.start(case)
        torch.set_num_threads(case.threads)
        of_device = ceilings.of(case.threads)
        on_gpu = device.type == "cuda"
        measured = rows_of(case, bench.measure(case, problem[1]), of_device, on_gpu)
        progress.stop()
        print_case(case, measured)
        clocks = machine.clocks(device)
        rows += [{**where, "clocks": clocks, **row} for row in measured]
        harness.write_csv(so_far, COLUMNS, rows)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of the graphs' own pools too
    if device.type == "cuda":
        count_launches(bench, rows)
    if rows:
        harness.write_csv(arguments.out, COLUMNS, rows)
    if progress.done == len(todo):
        so_far.unlink(missing_ok=True)
    return rows


def draw(path: Path) -> None:
    """The pictures of a results file; without matplotlib the figures are there nevertheless."""
    try:
        import plot
    except ImportError as error:
        print(f"no pictures: {error}; pip install matplotlib, then python bench/plot.py {path}")
        return
    for picture in plot.draw(path):
        print(picture)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        rows = run(arguments)
    except KeyboardInterrupt:
        print(
            f"\nstopped; finished cases are in {arguments.out}.partial, --resume goes on",
            file=sys.stderr,
        )
        return 130
    except ValueError as error:
        print(f"compare_vs_torch: {error}", file=sys.stderr)
        return 2
    if rows:
        print(f"\n{arguments.out}")
        draw(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
