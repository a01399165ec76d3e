"""The von Neumann entropy here against what people write in torch: time, memory, error.

    python bench/compare_vs_torch.py            # the whole table, to bench/results/cpu.csv and PNG
    python bench/compare_vs_torch.py --quick    # two sizes, about a minute

One row of the CSV per provider, mode, size, batch and number of threads; README.md beside this
file states the protocol and every column. `plot.py` draws the pictures from the CSV alone.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import memory
import plot
import torch
from torch import Tensor

try:
    import vne_kernels
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
QUICK_SIZES = ((32, 128), (128, 512))
MODES = ("forward", "forward+backward")
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64)}
DTYPES |= {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16)}
BASELINE = "gram"

COLUMNS = (
    *("date", "commit", "torch", "cuda", "driver", "device", "device_name", "threads"),
    *("provider", "batching", "mode", "dtype", "n", "d", "m", "batch"),
    *("samples", "p20_ms", "p50_ms", "p80_ms", "speedup_vs_gram", "peak_mib"),
    *("value_rel_error", "grad_rel_error", "note"),
)

Entropy = Callable[[Tensor], Tensor]  # (..., n, d) -> (...)
Row = dict[str, object]


# ---------------------------------------------------------------------------------------------
# Providers
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """`build` gives a fresh callable for each case, so that a compiled one is compiled for it."""

    name: str
    build: Callable[[], Entropy]
    batched: bool  # takes (batch, n, d) at once; otherwise looped over, as its users do

    def entropy(self) -> Entropy:
        one = self.build()
        if self.batched:
            return one
        return lambda z: one(z) if z.ndim == 2 else torch.stack([one(sample) for sample in z])


def _compiled_gram() -> Entropy:
    from torch._inductor import config

    torch.compiler.reset()
    # Part of the key of the compiler's cache: code generated for another number is not reused.
    config.cpp.threads = torch.get_num_threads()
    compiled: Entropy = torch.compile(reference.gram, fullgraph=True, dynamic=False)
    return compiled


def _ours(method: str) -> Entropy:
    return lambda z: vne_kernels.vn_entropy(z, method=method)


PROVIDERS = (
    Provider("algorithm1", lambda: reference.algorithm1, batched=False),
    Provider("svd", lambda: reference.official_svd, batched=False),
    Provider(BASELINE, lambda: reference.gram, batched=True),
    Provider("gram+compile", _compiled_gram, batched=True),
    Provider("ours", lambda: _ours("auto"), batched=True),
    Provider("ours-eigh", lambda: _ours("eigh"), batched=True),
    Provider("ours-poles", lambda: _ours("poles"), batched=True),
)


# ---------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    n: int
    d: int
    batch: int
    threads: int
    mode: str

    def __str__(self) -> str:
        size = f"n={self.n} d={self.d} batch={self.batch}"
        return f"{size} {self.mode} threads={self.threads}"


@dataclass(frozen=True)
class Problem:
    """The one input of all providers, and the float64 answers."""

    z: Tensor  # (n, d) for batch 1, otherwise (batch, n, d)
    value: Tensor
    grad: Tensor


def make_problem(n: int, d: int, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Independent normal entries from a fixed seed: the features at the start of a training."""
    generator = torch.Generator().manual_seed(n * 1_000_003 + d * 101 + batch)
    shape = (n, d) if batch == 1 else (batch, n, d)
    z = torch.randn(shape, generator=generator).to(dtype)
    value, grad = reference.oracle(z), reference.oracle_grad(z)
    return Problem(z.to(device).requires_grad_(), value, grad)


def _relative_error(got: Tensor, want: Tensor, dims: tuple[int, ...]) -> float:
    """Largest over the batch of |got - want| / |want|; NaN where got is not finite."""
    difference = torch.linalg.vector_norm(got.detach().double().cpu() - want, dim=dims)
    return float((difference / torch.linalg.vector_norm(want, dim=dims)).max())


def _contender(provider: Provider, problem: Problem, mode: str) -> harness.Contender:
    z, entropy = problem.z, provider.entropy()

    def clear() -> None:
        z.grad = None

    def forward() -> Tensor:
        with torch.no_grad():
            return entropy(z)

    def forward_backward() -> Tensor:
        s = entropy(z)
        s.sum().backward()
        return s

    call = forward if mode == "forward" else forward_backward
    return harness.Contender(provider.name, call, clear)


def _check_and_warm_up(
    provider: Provider, problem: Problem, mode: str, device: torch.device
) -> tuple[harness.Contender, float, float]:
    """First call: errors against float64. Second: peak memory. Both warm up what is timed next."""
    contender = harness.Contender(provider.name, lambda: None, lambda: None)
    value_error = grad_error = math.nan
    try:
        contender = _contender(provider, problem, mode)
        contender.prepare()
        value = contender.call()
        assert isinstance(value, Tensor)
        value_error = _relative_error(value.unsqueeze(-1), problem.value.unsqueeze(-1), (-1,))
        if problem.z.grad is not None:
            grad_error = _relative_error(problem.z.grad, problem.grad, (-2, -1))
        contender.prepare()
        contender.peak_bytes = memory.peak_bytes(contender.call, device)
    except Exception as error:  # a provider that cannot do the case is a result, not an accident
        reason = (str(error).strip().splitlines() or [""])[0]
        contender.error = f"{type(error).__name__}: {reason}"[:160]
    return contender, value_error, grad_error


def _note(contender: harness.Contender, errors: Sequence[float]) -> str:
    if contender.error is not None:
        return contender.error
    return "" if all(math.isfinite(e) for e in errors) else "the result is not finite"


def measure_case(case: Case, problem: Problem, device: torch.device, budget_s: float) -> list[Row]:
    """All providers of one case, timed together."""
    measured = [_check_and_warm_up(p, problem, case.mode, device) for p in PROVIDERS]
    contenders = [contender for contender, _, _ in measured]
    harness.time_interleaved(contenders, device, budget_s)
    quantiles = {c.name: c.quantiles_ms() for c in contenders}
    rows: list[Row] = []
    for provider, (contender, value_error, grad_error) in zip(PROVIDERS, measured, strict=True):
        p20, p50, p80 = quantiles[provider.name]
        has_grad = case.mode == "forward+backward"
        errors = (value_error, grad_error) if has_grad else (value_error,)
        rows.append(
            {
                "threads": case.threads,
                "provider": provider.name,
                "batching": "batched" if provider.batched else "looped",
                "mode": case.mode,
                "n": case.n,
                "d": case.d,
                "m": min(case.n, case.d),
                "batch": case.batch,
                "samples": len(contender.samples_s),
                "p20_ms": f"{p20:.5g}",
                "p50_ms": f"{p50:.5g}",
                "p80_ms": f"{p80:.5g}",
                "speedup_vs_gram": f"{quantiles[BASELINE][1] / p50:.4g}",
                "peak_mib": f"{contender.peak_bytes / 2**20:.4g}",
                "value_rel_error": f"{value_error:.2e}",
                "grad_rel_error": f"{grad_error:.2e}" if has_grad else "",
                "note": _note(contender, errors),
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------
# Screen
# ---------------------------------------------------------------------------------------------


def print_case(case: Case, rows: Sequence[Row]) -> None:
    print(f"\n{case}")
    print(
        f"  {'provider':<13}{'batching':<9}{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}"
        f"{'vs gram':>11}{'peak MiB':>10}{'value err':>11}{'grad err':>11}  note"
    )
    for row in rows:
        print(
            f"  {row['provider']:<13}{row['batching']:<9}{row['p20_ms']:>10}{row['p50_ms']:>10}"
            f"{row['p80_ms']:>10}{row['speedup_vs_gram']:>10}x{row['peak_mib']:>10}"
            f"{row['value_rel_error']:>11}{row['grad_rel_error'] or '-':>11}  {row['note']}"
        )
    sys.stdout.flush()


class Progress:
    """A line on stderr, rewritten in place on a terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.begin = total, 0, time.monotonic()

    def start(self, case: Case) -> None:
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


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted positive whole numbers, got {text!r}")
    return int(text)


def _positives(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_positive(part) for part in text.split(",")))


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text.lower()):
        raise argparse.ArgumentTypeError(f"wanted NxD,NxD,... such as 128x512, got {text!r}")
    pairs = (part.split("x") for part in text.lower().split(","))
    return tuple((int(n), int(d)) for n, d in pairs)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError(f"wanted a positive number of seconds, got {text!r}")
    return seconds


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare_vs_torch.py",
        description="Time, memory and error of vn_entropy against what people write in torch.",
        allow_abbrev=False,
    )
    default_threads = tuple(t for t in (1, 2) if t <= (os.cpu_count() or 1))
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=_positives, default=default_threads, help="such as 1,2; CPU only")
    add("--sizes", type=_sizes, help="NxD,NxD,...; default: the nine of README.md")
    add("--batches", type=_positives, default=BATCHES, help="default: 1,8")
    add("--dtype", choices=DTYPES, default="float32")
    add("--case-seconds", type=_seconds, help="time for one case, shared by its providers")
    add("--quick", action="store_true", help="two sizes, 1 s a case, unless given")
    add("--out", type=Path, help="CSV file; default: bench/results/<device>.csv")
    arguments = parser.parse_args(argv)
    if arguments.sizes is None:
        arguments.sizes = QUICK_SIZES if arguments.quick else SIZES
    if arguments.case_seconds is None:
        arguments.case_seconds = 1.0 if arguments.quick else 10.0
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
            parser.error(f"no CUDA device: torch {torch.__version__} ({built}) sees none")
        arguments.threads = (torch.get_num_threads(),)
    if arguments.out is None:
        name = "cpu"
        if arguments.device == "cuda":
            name = harness.slug(torch.cuda.get_device_name())
        arguments.out = Path(__file__).resolve().parent / "results" / f"{name}.csv"
    return arguments


def run(arguments: argparse.Namespace) -> list[Row]:
    """Measure every case, print it, and keep what is done in a .partial file until the end."""
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    where: Row = {**harness.environment(device), "dtype": arguments.dtype}
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    partial.unlink(missing_ok=True)
    counts = (arguments.sizes, arguments.batches, arguments.threads, MODES)
    progress = Progress(math.prod(len(c) for c in counts))
    rows: list[Row] = []
    for n, d in arguments.sizes:
        for batch in arguments.batches:
            problem = make_problem(n, d, batch, dtype, device)
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                for mode in MODES:
                    case = Case(n, d, batch, threads, mode)
                    progress.start(case)
                    measured = measure_case(case, problem, device, arguments.case_seconds)
                    progress.stop()
                    print_case(case, measured)
                    rows += [{**where, **row} for row in measured]
                    harness.write_csv(partial, COLUMNS, rows)
    os.replace(partial, arguments.out)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.device == "cpu":
        memory.restart_with_counter()
    try:
        run(arguments)
    except KeyboardInterrupt:
        print(f"\nstopped; any finished case is in {arguments.out}.partial", file=sys.stderr)
        return 130
    print(f"\n{arguments.out}")
    for picture in plot.draw(arguments.out):
        print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
