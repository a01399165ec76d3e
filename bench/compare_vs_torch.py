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
from typing import NamedTuple

import machine
import runner
import torch
from providers import BASELINE, PROVIDERS, Provider, Result, evaluate
from runner import Contender
from torch import Tensor

from vne_kernels import reference

SIZES = "32x128,64x256,64x512,128x256,128x512,256x512,512x512,512x2048,1024x2048"
BATCHES = (1, 8)
CUDA_M = (128, 32, 64, 256, 512, 1024, 2048)  # the size of the goals first
CUDA_SIZES = tuple((m, 4 * m) for m in CUDA_M)
CUDA_BATCHES = (1, 2, 8, 64)
SECONDS = {"cpu": 10.0, "cuda": 2.0, "quick": 1.0}
QUICK_SIZES = ((32, 128), (128, 512))
MODES = ("forward", "forward+backward")
GRADIENT = MODES[1]
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
Evaluate = Callable[[Tensor], Result]
CHECKED = 8  # samples of a batch whose errors are computed: float64 takes long

COLUMNS = (
    *("date", "commit", "torch", "cuda", "cusolver", "driver", "device", "device_name"),
    *("clocks", "threads", "provider", "batching", "mode", "launch", "l2", "dtype"),
    *("n", "d", "m", "batch", "samples", "calls", "p20_ms", "p50_ms", "p80_ms"),
    *("speedup_vs_gram", "floor_ms", "floor_share", "launches", "peak_mib"),
    *("value_rel_error", "grad_rel_error", "note"),
)
SHOW = ("provider", "launch", "l2", "p20_ms", "p50_ms", "p80_ms", "speedup_vs_gram", *COLUMNS[-4:])


@dataclass(frozen=True)
class Case:
    n: int
    d: int
    batch: int
    dtype: str
    threads: int
    mode: str


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """Everything combined with everything if anything is named, otherwise README.md's table."""
    on_cpu = arguments.device.type == "cpu"
    sizes, batches, dtypes = arguments.sizes, arguments.batches, arguments.dtypes
    default = (runner.pairs(SIZES), BATCHES) if on_cpu else (CUDA_SIZES, CUDA_BATCHES)
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


class Problem(NamedTuple):
    """The one input of all providers, and the float64 results of its first samples."""

    z: Tensor  # (n, d) for batch 1, otherwise (batch, n, d)
    value: Tensor  # (samples, 1)
    grad: Tensor  # (samples, n d)

    def errors(self, value: Tensor, grad: Tensor | None) -> runner.Row:
        """Returns the columns of a result's relative errors, and a note if it is not finite."""
        errors = {"value_rel_error": relative_error(value, self.value)}
        if grad is not None:
            errors["grad_rel_error"] = relative_error(grad, self.grad)
        finite = all(map(math.isfinite, errors.values()))
        row: runner.Row = {"note": "" if finite else "the result is not finite"}
        return row | {name: f"{error:.2e}" for name, error in errors.items()}


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest |got - want| / |want| over the samples of which `want` has a row."""
    got = got.detach().double().cpu().reshape(-1, want.shape[1])[: len(want)]
    return float(((got - want).norm(dim=1) / want.norm(dim=1)).max())


@functools.lru_cache(maxsize=1)
def make_problem(n: int, d: int, batch: int, dtype: str, device: torch.device) -> Problem:
    """Independent normal entries from a fixed seed: the features at the start of a training."""
    generator = torch.Generator().manual_seed(n * 1_000_003 + d * 101 + batch)
    z = torch.randn((batch, n, d), generator=generator).to(DTYPES[dtype])
    checked = z[: CHECKED if min(n, d) <= 512 else 1]
    value, grad = reference.oracle(checked), reference.oracle_grad(checked)
    z = (z[0] if batch == 1 else z).to(device).requires_grad_()
    return Problem(z, value.unsqueeze(1), grad.flatten(1))


def floor_of(case: Case, device: torch.device) -> float:
    """Returns the least milliseconds of a case; NaN in float64. bench/README.md has the formula."""
    dtype, gradient = DTYPES[case.dtype], case.mode == GRADIENT
    if dtype == torch.float64:
        return math.nan
    bytes_per_s, flop_per_s = machine.rates(device, case.threads)
    m, k = min(case.n, case.d), max(case.n, case.d)
    moved = m * k * dtype.itemsize * (1 + gradient)
    log_a = 16 if device.type == "cuda" else 4 / 3 + 2 * gradient
    work = m * m * k * (1 + 2 * gradient) + log_a * m**3
    return 1e3 * case.batch * max(moved / bytes_per_s, work / flop_per_s)


class Bench:
    """Measures one case after the other and remembers what it learned of the providers."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, arguments.device
        variants = [("eager", "cold"), ("graph", "hot"), ("graph", "cold")]
        self.variants = variants if self.device.type == "cuda" else []
        self.seconds_per_sample: dict[tuple[str, Case], float] = {}
        self.no_capture: str | None = None  # after a failure none is tried: it may cost the device
        self.providers: list[Provider] = []
        for provider in PROVIDERS:
            if provider.name in (arguments.providers or (provider.name,)):
                if reason := provider.why_not(self.device):
                    print(f"without {provider.name}: {reason}")
                else:
                    self.providers.append(provider)

    def measure(self, case: Case) -> list[runner.Row]:
        """Returns the rows of one case, whose providers are timed together."""
        if not self.providers:
            raise ValueError("--providers: none of them runs on this device")
        problem = make_problem(case.n, case.d, case.batch, case.dtype, self.device)
        variants = [one for p in self.providers for one in self.prepare(p, case, problem)]
        runner.time_interleaved(variants, self.device, self.arguments.case_seconds)
        floor_ms = floor_of(case, self.device)
        eager = [v for v in variants if (v.name, v.row["launch"]) == (BASELINE, "eager")]
        gram_ms = {v.row["l2"]: v.quantiles_ms()[1] for v in eager if v.samples_s}
        rows = []
        for one in variants:
            p50 = one.quantiles_ms()[1]
            gram = gram_ms.get(one.row["l2"], gram_ms.get("hot", math.nan))
            row = one.row | one.columns()
            row |= {"provider": one.name, "m": min(case.n, case.d), "calls": one.calls}
            row |= {"speedup_vs_gram": f"{gram / p50:.4g}", "floor_ms": f"{floor_ms:.4g}"}
            peak_mib = f"{one.peak_bytes / 2**20:.4g}"
            row |= {"floor_share": f"{floor_ms / p50:.3g}", "peak_mib": peak_mib}
            rows.append(row | {"note": one.error or row["note"]})
        return rows

    def too_slow(self, seconds: float) -> bool:
        """Whether three calls of so many seconds do not fit into the time for a case."""
        return runner.MIN_SAMPLES * seconds > self.arguments.case_seconds

    def prepare(self, provider: Provider, case: Case, problem: Problem) -> list[Contender]:
        """Runs and checks every variant once, so that what is timed next is warm."""
        if provider.compiled and not provider.batched and case.batch > 1:
            return []  # the loop would be unrolled into one program: minutes of compilation
        gradient, dtype = case.mode == GRADIENT, DTYPES[case.dtype]
        eager = Contender(provider.name, runner.nothing)
        eager.row = {"batching": "batched" if provider.batched else "looped", "note": ""}
        eager.row |= {"launch": "eager", "l2": "hot", "value_rel_error": math.nan}
        eager.row["grad_rel_error"] = math.nan if gradient else ""
        known = (provider.name, replace(case, batch=1))
        expected = self.seconds_per_sample.get(known, math.nan) * case.batch
        if expected > self.arguments.call_seconds:
            eager.error = f"not run: about {expected:.0f} s a call by a smaller batch"
            return [eager]
        try:
            call = partial(evaluate, provider.entropy(dtype), gradient)
            self._eager(eager, call, problem)
        except Exception as error:  # a provider that cannot do the case is a result
            eager.error = runner.reason(error)
            return [eager]
        self.seconds_per_sample[known] = eager.estimate_s / case.batch
        variants = [eager]
        for launch, l2 in () if self.too_slow(eager.estimate_s) else self.variants:
            one = replace(eager, estimate_s=math.nan, samples_s=[])
            one.row = {**eager.row, "launch": launch, "l2": l2}
            if launch == "graph":
                one.error = provider.not_captured(dtype, min(case.n, case.d)) or self.no_capture
            if one.error is None:
                try:
                    self._variant(one, call, eager.estimate_s, problem)
                except Exception as error:
                    one.error = runner.reason(error)
                    if launch == "graph":
                        self.no_capture = f"not captured: {provider.name} failed before"
            variants.append(one)
        return variants

    def _eager(self, one: Contender, call: Evaluate, problem: Problem) -> None:
        """First call: errors against float64. Second: peak memory. Third: a first time."""
        one.call = partial(call, problem.z)
        one.row |= problem.errors(*call(problem.z))
        one.peak_bytes = machine.peak_bytes(one.call, self.device)
        one.estimate_s = runner.time_once(one, self.device)
        if self.too_slow(one.estimate_s):  # once more: it may have been interrupted
            one.estimate_s = min(one.estimate_s, runner.time_once(one, self.device))

    def _variant(self, one: Contender, call: Evaluate, call_s: float, problem: Problem) -> None:
        """The same call on inputs that L2 has lost, or replayed from a CUDA graph, or both."""
        held = problem.z.numel() * problem.z.element_size()
        cold = math.ceil(2 * machine.l2_bytes(self.device) / held)
        copies = 1 + (cold if one.row["l2"] == "cold" else 0)
        if one.row["launch"] == "graph" and self.too_slow(copies * call_s):
            one.error = f"not run: {copies} inputs that L2 cannot hold take too long"
            return
        inputs = [problem.z.detach().clone().requires_grad_() for _ in range(copies)]
        if one.row["launch"] == "eager":
            turns = cycle(inputs)
            one.call = lambda: call(next(turns))
            return
        last: list[Result] = []

        def calls() -> None:
            for z in inputs:
                s, grad = call(z)
                last[:] = [(s.detach(), grad)]

        replay = machine.capture(calls, self.device)
        for tensor in filter(torch.is_tensor, last[0]):
            tensor.fill_(math.nan)  # so that what is checked was written by the replay
        replay()
        one.row |= problem.errors(*last[0])
        short = min(max(1, int(runner.TURN_S / call_s)), runner.MAX_CALLS_PER_TURN)
        repeats = short if copies == 1 else 1
        one.calls = repeats * copies
        one.call = lambda: [replay() for _ in range(repeats)]

    def count_launches(self, rows: Sequence[runner.Row]) -> None:
        """Fills the column of ours on a GPU, after all timing: a profiler slows later launches."""
        ours = {p.name: p for p in self.providers if p.method and self.variants}

        @functools.cache
        def count(name: str, batch: str, n: str, d: str, dtype: str, mode: str) -> str:
            shape = (int(n), int(d)) if batch == "1" else (int(batch), int(n), int(d))
            z = torch.randn(shape, dtype=DTYPES[dtype], device=self.device, requires_grad=True)
            call = partial(evaluate, ours[name].entropy(z.dtype), mode == GRADIENT, z)
            call()
            return str(machine.launches(call, self.device) or "")

        for row in rows:
            if row["provider"] in ours and not row["note"]:
                key = ("provider", "batch", "n", "d", "dtype", "mode")
                row["launches"] = count(*(str(row[name]) for name in key))


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
    parser.add_argument("--call-seconds", type=runner.duration, default=60.0, help="longest call")
    arguments = runner.parse(parser, argv)
    if arguments.device.type == "cuda":
        arguments.threads = (torch.get_num_threads(),)
    if arguments.quick:
        arguments.sizes = arguments.sizes or QUICK_SIZES
        arguments.batches = arguments.batches or (1,)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    cases, bench = cases_of(arguments), Bench(arguments)
    after = bench.count_launches
    return runner.run_cases(arguments, cases, bench.measure, COLUMNS, SHOW, after=after)


if __name__ == "__main__":
    sys.exit(main())
