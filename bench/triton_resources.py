"""What each Triton kernel takes of a multiprocessor, compiled for five GPUs. No GPU is needed.

    python bench/triton_resources.py             registers, shared and local memory of each kernel
    python bench/triton_resources.py --check     fail if a kernel spills
    python bench/triton_resources.py --out F     the same figures as CSV

Operators are traced on fake CUDA tensors of the shapes below. Triton compiles every launch for the
architectures, as it would do at the first call on such a GPU. A kernel uses local memory, which is
memory of the GPU, where registers did not suffice. Spills are the instructions within loops that
use it. Seconds are those of this machine, of one process, with an empty cache; only --check uses
what is compiled already.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)  # it would leave nothing to compile

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, MockTensor

from vne_kernels._core.dtypes import compute_dtype
from vne_kernels._triton.launch import launching_by
from vne_kernels._triton.operators import operator

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "csrc" / "cuda"))

import resources
import runner

ARCHITECTURES = (80, 86, 89, 90, 120)
#: (n, d): every size of matrix that a program sweeps, both sides, a panel, a depth in parts.
SHAPES = ((24, 512), (64, 128), (128, 512), (512, 128), (300, 301), (4096, 256))
COLUMNS = (
    *("triton", "kernel", "arch", "warps"),
    *("registers", "shared", "local", "spills", "seconds"),  # registers, local: of a thread
)
POINTERS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}  # not of all


@dataclass(frozen=True)
class Launch:
    """A kernel and its arguments by name; of a tensor its dtype."""

    kernel: JITFunction
    arguments: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """The kernel with the constants that distinguish it from others of its kind."""
        pointers = {POINTERS[value] for _, value in self.arguments if value in POINTERS}
        constants = [f"{k}={v}" for k, v in self.arguments if k.isupper() and type(v) is int]
        return f"{self.kernel.__name__}({', '.join([*sorted(pointers), *constants])})"


def record(kernel: Any, *args: Any, **options: Any) -> Iterator[Launch]:
    """The launches that Triton makes of the arguments, one for each number of warps it tries."""
    if isinstance(kernel, Autotuner):
        for config in kernel.configs:
            yield from record(kernel.fn, *args, num_warps=config.num_warps, **options)
        return
    given = dict(zip(kernel.arg_names, args, strict=False)) | {"num_warps": 4} | options
    dtypes = {name: v.dtype for name, v in given.items() if isinstance(v, torch.Tensor)}
    yield Launch(kernel, tuple((given | dtypes).items()))


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """What a call launches on fake tensors; nothing runs."""
    found: dict[Launch, None] = {}

    def keep(kernel: Any, _grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found.update(dict.fromkeys(record(kernel, *args, **options)))

    with FakeTensorMode(), launching_by(keep):
        call()
    return list(found)


def value_and_gradient(n: int, d: int, dtype: torch.dtype) -> None:
    z = torch.empty(n, d, dtype=dtype, device="cuda")
    operator("vn_entropy_grad")(z, None, True, "poles", 1e-12)


def launches(dtypes: Sequence[torch.dtype]) -> list[Launch]:
    """All kernels that the operators launch for SHAPES."""

    def call() -> None:
        for dtype in dtypes:
            for n, d in SHAPES:
                value_and_gradient(n, d, dtype)
            z = torch.empty(*SHAPES[2], dtype=dtype, device="cuda")
            p = torch.empty(z.shape[0], dtype=compute_dtype(dtype), device="cuda")
            operator("vn_entropy_grad")(z, p, False, "eigh", 1e-12)
            loss = operator("doe_loss_grad")(z, z, "poles", 1e-12)
            operator("doe_loss_backward")(loss[0], loss[1], z, z, *loss[2:])

    return launches_of(call)


def compile_for(arch: int, launch: Launch) -> tuple[str, runner.Row]:
    """Compiles a launch; its hash, and its use of a multiprocessor by the machine code."""
    gpu = SimpleNamespace(
        get_current_device=lambda: arch,  # Triton keeps kernels apart by device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    arguments = {name: MockTensor.wrap_dtype(value) for name, value in launch.arguments}
    begin = time.perf_counter()
    with patch.object(triton.runtime.driver, "_active", gpu):
        compiled = launch.kernel.warmup(grid=(1,), **arguments)
    seconds = time.perf_counter() - begin
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        ((_, registers, _, local),) = resources.usages(resources.dump("-res-usage", file.name))
        code = resources.dump("-sass", file.name) if local else ""
    spills = resources.accesses_in_loops(code) if local else 0
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    used = (registers, shared, local, spills, f"{seconds:.2f}")
    row = (triton.__version__, launch.name, arch, warps, *used)
    return compiled.hash, dict(zip(COLUMNS, row, strict=True))


def check(found: Sequence[runner.Row]) -> None:
    """Ends the program with an error if a kernel spills, or if there is none."""
    spilling = [row for row in found if row["spills"]]
    if spilling or not found:
        runner.print_rows("accesses to local memory within loops", spilling, COLUMNS[1:])
        sys.exit(f"{len(spilling)} of {len(found)} kernels spill")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="names of torch's")
    parser.add_argument("--out", type=Path, metavar="F")
    arguments = parser.parse_args()
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    first = launches_of(lambda: value_and_gradient(128, 512, dtypes[0]))
    found, of_first = {}, set()
    with tempfile.TemporaryDirectory() as empty:
        if not arguments.check:
            os.environ["TRITON_CACHE_DIR"] = empty
        for launch in launches(dtypes):
            compiled = dict(compile_for(arch, launch) for arch in arguments.arch)
            new = {key: row for key, row in compiled.items() if key not in found}
            if new:  # other arguments may lead to the same code
                runner.print_rows(launch.name, list(new.values()), COLUMNS[2:])
            found |= new
            of_first |= {next(iter(compiled))} if launch in first else set()
    rows = list(found.values())
    if arguments.out:
        runner.write_csv(arguments.out, COLUMNS, rows)
    if arguments.check:
        check(rows)
    else:
        seconds = sum(float(found[key]["seconds"]) for key in of_first)
        print(f"\nthe first vn_entropy_grad of (128, 512) compiles for {seconds:.1f} s on one core")


if __name__ == "__main__":
    main()
