"""The von Neumann entropy here against what people write in torch: time, memory, error.

    python bench/compare_vs_torch.py                  # the whole table, to bench/results/cpu.csv
    python bench/compare_vs_torch.py --quick          # two sizes, about a minute
    python bench/compare_vs_torch.py --device cuda    # the same on a GPU, also as CUDA graphs
    python bench/compare_vs_torch.py --providers gram,ours --sizes 128x512 --batches 1,8

One row of the CSV per provider, mode, size, batch, dtype, number of threads, way of launching and
state of the cache. bench/README.md states the protocol and every column.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, product

import capturable
import floor
import machine
import runner
import torch
from providers import BASELINE, PROVIDERS, Provider, Result, evaluate
from torch import Tensor

from vne_kernels import reference

SIZES = (
    *((32, 128), (64, 256), (64, 512), (128, 256), (128, 512)),
    *((256, 512), (512, 512), (512, 2048), (1024, 2048)),
)
BATCHES = (1, 8)
CUDA_M = (128, 32, 64, 256, 512, 1024, 2048)  # the size of the goals first
CUDA_SIZES = tuple((m, 4 * m) for m in CUDA_M)
CUDA_BATCHES = (1, 2, 8, 64)
SECONDS = {"cpu": 10.0, "cuda": 2.0, "quick": 1.0}
QUICK_SIZES = ((32, 128), (128, 512))
MODES = ("forward", "forward+backward")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
Evaluate = Callable[[Tensor], Result]
CHECKED = 8  # samples of a batch whose errors are computed: float64 takes long
TRIAL_SECONDS = 90.0  # for all trials of graph capture
NO_GRAPH = "no CUDA graph: torch.linalg.eigh waits for the host"

COLUMNS = (
    *("date", "commit", "torch", "cuda", "cusolver", "driver", "device", "device_name"),
    *("clocks", "threads", "provider", "batching", "mode", "launch", "l2", "dtype"),
    *("n", "d", "m", "batch", "samples", "calls", "p20_ms", "p50_ms", "p80_ms"),
    *("speedup_vs_gram", "floor_ms", "floor_share", "launches", "peak_mib"),
    *("value_rel_error", "grad_rel_error", "note"),
)
SHOW = ("provider", "launch", "l2", "p20_ms", "p50_ms", "p80_ms", "speedup_vs_gram", *COLUMNS[-4:])

# ---- cases -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    n: int
    d: int
    batch: int
    dtype: str
    threads: int
    mode: str

    @property
    def m(self) -> int:
        return min(self.n, self.d)

    @property
    def gradient(self) -> bool:
        return self.mode == "forward+backward"


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """Everything combined with everything if anything is named, otherwise README.md's table."""
    on_cpu = arguments.device.type == "cpu"
    sizes, batches, dtypes = arguments.sizes, arguments.batches, arguments.dtypes
    default = (SIZES, BATCHES) if on_cpu else (CUDA_SIZES, CUDA_BATCHES)
    blocks = [(sizes or default[0], batches or default[1], dtypes or ("float32",), MODES)]
    if not (on_cpu or sizes or batches or dtypes):
        squares_and_tall = tuple(size for m in CUDA_M for size in ((m, m), (4 * m, m)))
        blocks.append((squares_and_tall, (1, 8), ("float32",), MODES))
        blocks.append((CUDA_SIZES, (1, 64), ("bfloat16",), MODES[1:]))
    return [
        Case(n, d, batch, dtype, threads, mode)
        for block in blocks
        for (n, d), batch, dtype, threads, mode in product(*block[:3], arguments.threads, block[3])
    ]


# ---- input and errors --------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The one input of all providers, and the float64 results of its first samples."""

    z: Tensor  # (n, d) for batch 1, otherwise (batch, n, d)
    value: Tensor
    grad: Tensor

    def errors(self, result: Result) -> tuple[float, float]:
        """Relative errors of the value and of the gradient; NaN where they are not finite."""
        value, grad = result
        value_error = _relative_error(value.unsqueeze(-1), self.value.unsqueeze(-1), (-1,))
        return value_error, math.nan if grad is None else _relative_error(grad, self.grad, (-2, -1))


@functools.lru_cache(maxsize=1)
def make_problem(n: int, d: int, batch: int, dtype: str, device: torch.device) -> Problem:
    """Independent normal entries from a fixed seed: the features at the start of a training."""
    generator = torch.Generator().manual_seed(n * 1_000_003 + d * 101 + batch)
    shape = (n, d) if batch == 1 else (batch, n, d)
    z = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    checked = z if batch == 1 else z[: CHECKED if min(n, d) <= 512 else 1]
    value, grad = reference.oracle(checked), reference.oracle_grad(checked)
    return Problem(z.to(device).requires_grad_(), value, grad)


def _relative_error(got: Tensor, want: Tensor, dims: tuple[int, ...]) -> float:
    """Largest |got - want| / |want| over the samples that `want` has."""
    got = got.detach()[: len(want)] if want.ndim == got.ndim > len(dims) else got.detach()
    difference = torch.linalg.vector_norm(got.double().cpu() - want, dim=dims)
    return float((difference / torch.linalg.vector_norm(want, dim=dims)).max())


# ---- one case ----------------------------------------------------------------------------------


@dataclass
class Entry(runner.Contender):
    """A provider in one variant: how its calls are launched, and where they find their input."""

    batching: str = "batched"
    launch: str = "eager"  # or graph
    l2: str = "hot"  # or cold
    value_error: float = math.nan
    grad_error: float = math.nan

    def row(self, gradient: bool) -> runner.Row:
        errors = (self.value_error, self.grad_error) if gradient else (self.value_error,)
        finite = all(map(math.isfinite, errors))
        return {
            "provider": self.name,
            "batching": self.batching,
            "launch": self.launch,
            "l2": self.l2,
            "calls": self.calls,
            **self.columns(),
            "peak_mib": f"{self.peak_bytes / 2**20:.4g}",
            "value_rel_error": f"{self.value_error:.2e}",
            "grad_rel_error": f"{self.grad_error:.2e}" if gradient else "",
            "note": self.error or ("" if finite else "the result is not finite"),
        }


@functools.cache
def ceilings_of(device: torch.device, threads: int) -> floor.Ceilings:
    """Those of the device with so many threads, which is what torch has at the moment."""
    found = floor.measure(device)
    print(f"threads {threads}: {found}")
    return found


class Bench:
    """Measures one case after the other and remembers what it learned of the providers."""

    def __init__(self, arguments: argparse.Namespace, cases: Sequence[Case]) -> None:
        self.arguments, self.cases = arguments, cases
        self.device: torch.device = arguments.device
        on_gpu = self.device.type == "cuda"
        self.variants = list(product(("eager", "graph"), ("hot", "cold")) if on_gpu else ())[1:]
        self.seconds_per_sample: dict[tuple[str, Case], float] = {}
        self.providers: list[Provider] = []
        for provider in PROVIDERS:
            if arguments.providers is None or provider.name in arguments.providers:
                reason = provider.why_not(self.device)
                if reason is None:
                    self.providers.append(provider)
                else:
                    print(f"without {provider.name}: {reason}")

    @functools.cached_property
    def refused(self) -> dict[capturable.Trial, str]:
        """What no CUDA graph can hold, with the reason."""
        sizes = dict.fromkeys((case.m, case.batch > 1) for case in self.cases)
        trials = [(p.name, *size) for size in sizes for p in self.providers if p.capturable]
        return capturable.refused(trials, min(TRIAL_SECONDS, self.arguments.stop_after / 3))

    def measure(self, case: Case) -> list[runner.Row]:
        """All providers of one case, timed together."""
        ceilings = ceilings_of(self.device, case.threads)
        problem = make_problem(case.n, case.d, case.batch, case.dtype, self.device)
        entries = [entry for p in self.providers for entry in self.prepare(p, case, problem)]
        runner.time_interleaved(entries, self.device, self.arguments.case_seconds)
        return rows_of(case, entries, ceilings, on_gpu=self.device.type == "cuda")

    def too_slow(self, seconds: float) -> bool:
        """Whether three calls of so many seconds do not fit into the time for a case."""
        return runner.MIN_SAMPLES * seconds > self.arguments.case_seconds

    def prepare(self, provider: Provider, case: Case, problem: Problem) -> list[Entry]:
        """Runs and checks every variant once, so that what is timed next is warm."""
        if provider.compiled and not provider.batched and case.batch > 1:
            return []  # the loop would be unrolled into one program: minutes of compilation
        batching = "batched" if provider.batched else "looped"
        eager = Entry(provider.name, runner.nothing, batching=batching)
        if self.device.type == "cuda":
            eager.prepare = provider.prepare
        known = (provider.name, replace(case, batch=1))
        expected = self.seconds_per_sample.get(known, math.nan) * case.batch
        if expected > self.arguments.call_seconds:
            eager.error = f"not run: about {expected:.0f} s a call by a smaller batch"
            return [eager]
        try:
            entropy = provider.entropy(DTYPES[case.dtype])
            call = partial(evaluate, entropy, case.gradient)
            self._eager(eager, call, problem)
        except Exception as error:  # a provider that cannot do the case is a result
            eager.error = runner.reason(error)
            return [eager]
        self.seconds_per_sample[known] = eager.estimate_s / case.batch
        entries = [eager]
        for launch, l2 in () if self.too_slow(eager.estimate_s) else self.variants:
            one = replace(eager, launch=launch, l2=l2, estimate_s=math.nan, samples_s=[])
            if launch == "graph":
                trial = (provider.name, case.m, case.batch > 1)
                one.error = self.refused.get(trial) if provider.capturable else NO_GRAPH
            if one.error is None:
                try:
                    self._variant(one, call, eager.estimate_s, problem)
                except Exception as error:
                    one.error = runner.reason(error)
            entries.append(one)
        return entries

    def _eager(self, entry: Entry, call: Evaluate, problem: Problem) -> None:
        """First call: errors against float64. Second: peak memory. Third: a first time."""
        entry.call = partial(call, problem.z)
        entry.prepare()
        entry.value_error, entry.grad_error = problem.errors(call(problem.z))
        entry.peak_bytes = machine.peak_bytes(entry.call, self.device)
        entry.estimate_s = runner.time_once(entry, self.device)
        if self.too_slow(entry.estimate_s):  # once more: it may have been interrupted
            entry.estimate_s = min(entry.estimate_s, runner.time_once(entry, self.device))

    def _variant(self, entry: Entry, call: Evaluate, call_s: float, problem: Problem) -> None:
        """The same call on inputs that L2 has lost, or replayed from a CUDA graph, or both."""
        held = problem.z.numel() * problem.z.element_size()
        cold = math.ceil(2 * machine.l2_bytes(self.device) / held)
        copies = 1 + (cold if entry.l2 == "cold" else 0)
        if entry.launch == "graph" and self.too_slow(copies * call_s):
            entry.error = f"not run: {copies} inputs that L2 cannot hold take too long"
            return
        inputs = [problem.z.detach().clone().requires_grad_() for _ in range(copies)]
        if entry.launch == "eager":
            turns = cycle(inputs)
            entry.call = lambda: call(next(turns))
            return
        last: list[Result] = []

        def calls() -> None:
            for z in inputs:
                s, grad = call(z)
                last[:] = [(s.detach(), grad)]

        entry.prepare()
        replay = machine.capture(calls, self.device)
        for tensor in last[0]:
            if tensor is not None:
                tensor.fill_(math.nan)  # so that what is checked was written by the replay
        replay()
        entry.value_error, entry.grad_error = problem.errors(last[0])
        short = min(max(1, int(runner.TURN_S / call_s)), runner.MAX_CALLS_PER_TURN)
        repeats = short if copies == 1 else 1
        entry.calls = repeats * copies
        entry.call = lambda: [replay() for _ in range(repeats)]

    def count_launches(self, rows: Sequence[runner.Row]) -> None:
        """Fills the column of ours on a GPU.

        It runs after all timing, with the results on disk: a profiler takes long, and slows down
        every later launch of the process.
        """
        ours = {provider.name: provider for provider in self.providers if provider.ours}

        @functools.cache
        def count(name: str, shape: tuple[int, ...], dtype: str, mode: str) -> str:
            z = torch.randn(shape, dtype=DTYPES[dtype], device=self.device, requires_grad=True)
            call = partial(evaluate, ours[name].entropy(z.dtype), mode == MODES[1], z)
            ours[name].prepare()
            call()
            found = machine.launches(call, self.device)
            return "" if math.isnan(found) else f"{found:.0f}"

        for row in rows if self.device.type == "cuda" else ():
            if row["provider"] in ours and not row["note"]:
                batch, n, d = (int(str(row[name])) for name in ("batch", "n", "d"))
                shape = (n, d) if batch == 1 else (batch, n, d)
                name, dtype, mode = (str(row[name]) for name in ("provider", "dtype", "mode"))
                row["launches"] = count(name, shape, dtype, mode)


def rows_of(
    case: Case, entries: Sequence[Entry], ceilings: floor.Ceilings, *, on_gpu: bool
) -> list[runner.Row]:
    """The rows with what needs all of them, the ratio to BASELINE, and the floor."""
    medians = {(e.name, e.launch, e.l2): e.quantiles_ms()[1] for e in entries}
    dtype, floor_ms = DTYPES[case.dtype], math.nan
    if dtype != torch.float64:  # the ceilings are those of float32 arithmetic
        shape = (case.n, case.d, case.batch, dtype.itemsize)
        floor_ms = 1e3 * floor.floor_s(ceilings, *shape, gradient=case.gradient, on_gpu=on_gpu)
    rows: list[runner.Row] = []
    for (_, launch, l2), p50, entry in zip(medians, medians.values(), entries, strict=True):
        # of BASELINE in the same variant; launched eagerly where no graph holds it
        variants = ((launch, l2), ("eager", l2), ("eager", "hot"))
        gram = (medians.get((BASELINE, *variant), math.nan) for variant in variants)
        derived = {
            "m": case.m,
            "speedup_vs_gram": f"{next(filter(math.isfinite, gram), math.nan) / p50:.4g}",
            "floor_ms": f"{floor_ms:.4g}",
            "floor_share": f"{floor_ms / p50:.3g}",
        }
        rows.append(entry.row(case.gradient) | derived)
    return rows


# ---- command line ------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = runner.make_parser(
        __doc__,
        "{device}",
        seconds=SECONDS,
        device=True,
        quick="two sizes, no batch of samples, unless given",
        sizes=runner.pairs,
        batches=True,
        dtypes=tuple(DTYPES),
        providers=[provider.name for provider in PROVIDERS],
        threads=tuple(t for t in (1, 2) if t <= (os.cpu_count() or 1)),
    )
    help_call = "longer calls are not made (60)"
    parser.add_argument("--call-seconds", type=runner.duration, default=60.0, help=help_call)
    arguments = runner.parse(parser, argv)
    if arguments.device.type == "cuda":
        arguments.threads = (torch.get_num_threads(),)
    if arguments.quick:
        arguments.sizes = arguments.sizes or QUICK_SIZES
        arguments.batches = arguments.batches or (1,)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    cases = cases_of(arguments)
    bench = Bench(arguments, cases)
    if not bench.providers:
        print("compare_vs_torch: --providers: none of them runs on this device", file=sys.stderr)
        return 2
    after = bench.count_launches
    return runner.run_cases(arguments, cases, bench.measure, COLUMNS, SHOW, after=after)


if __name__ == "__main__":
    sys.exit(main())
