"""What each Triton kernel takes of a multiprocessor, compiled for five GPUs. No GPU is needed.

    python bench/triton_resources.py             registers, shared and local memory of each kernel
    python bench/triton_resources.py --check     fail if a kernel spills
    python bench/triton_resources.py --out F     the same figures as CSV

Operators are traced on fake CUDA tensors of the shapes below. Every launch is compiled for the
architectures with the types, constants and divisibilities that it has there, as Triton would do at
the first call. A kernel uses local memory, which is memory of the GPU, where registers did not
suffice. Spills are the instructions within loops that use it. Seconds are those of this machine, of
one process, with an empty cache; only --check uses what is compiled already.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # it would leave nothing to compile

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

from vne_kernels.triton import operators
from vne_kernels.triton.launch import launching_by

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "csrc" / "cuda"))

import resources
import runner

ARCHITECTURES = (80, 86, 89, 90, 120)
#: (n, d): every size of matrix that a program sweeps, both sides, a panel, a depth in parts.
SHAPES = ((24, 512), (64, 128), (128, 512), (512, 128), (300, 301), (4096, 256))
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
COLUMNS = (
    *("triton", "kernel", "arch", "warps"),
    *("registers", "shared", "local", "spills", "seconds"),  # registers, local: of a thread
)
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}


@dataclass(frozen=True)
class Launch:
    """A kernel and all that its code depends on; equal where the code is."""

    key: str
    warps: int
    source: ASTSource = field(compare=False)

    @property
    def name(self) -> str:
        """The kernel with the constants that distinguish it from others of its kind."""
        kinds = {kind[1:] for kind in self.source.signature.values() if kind[:1] == "*"}
        constants = {self.source.fn.arg_names[i]: v for (i,), v in self.source.constants.items()}
        named = [f"{k}={v}" for k, v in constants.items() if k.isupper() and type(v) is int]
        others = sorted(kinds & {"fp16", "bf16", "fp64"})
        return f"{self.source.fn.__name__}({', '.join([*others, *named])})"


def record(kernel: Any, *args: Any, **options: Any) -> Iterator[Launch]:
    """The launches that Triton makes of the arguments, one for each number of warps it tries."""
    if isinstance(kernel, Autotuner):
        for config in kernel.configs:
            yield from record(kernel.fn, *args, num_warps=config.num_warps, **options)
        return
    warps = options.pop("num_warps", 4)
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constants, divisible = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if isinstance(value, torch.Tensor):
            kind, aligned = POINTERS[value.dtype], True
        elif parameter.is_constexpr or value is None or value == 1:
            kind, aligned = "constexpr", False
            constants[parameter.name] = value
        else:
            kind, aligned = "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
        signature[parameter.name] = kind
        if aligned:
            divisible[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, divisible)
    yield Launch(source.hash(), warps, source)


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
    operators.vn_entropy_grad(z, None, True, "poles", 1e-12)


def launches(dtypes: Sequence[torch.dtype]) -> list[Launch]:
    """All kernels that the operators launch for SHAPES."""

    def call() -> None:
        for dtype in dtypes:
            for n, d in SHAPES:
                value_and_gradient(n, d, dtype)
            z = torch.empty(*SHAPES[2], dtype=dtype, device="cuda")
            p = torch.empty(z.shape[0], dtype=operators.samples_of(z, None, True, 0).dtype)
            operators.vn_entropy_grad(z, p.to("cuda"), False, "eigh", 1e-12)
            loss = operators.doe_loss_grad(z, z, "poles", 1e-12)
            operators.doe_loss_backward(loss[0], loss[1], z, z, *loss[2:])

    return launches_of(call)


def compile_for(arch: int, launch: Launch) -> runner.Row:
    """Compiles a launch and reads its use of a multiprocessor from the machine code."""
    target, options = GPUTarget("cuda", arch, 32), {"num_warps": launch.warps}
    begin = time.perf_counter()
    compiled = triton.compile(launch.source, target=target, options=options)
    seconds = time.perf_counter() - begin
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        ((_, registers, _, local),) = resources.usages(
            resources.run(CUOBJDUMP, "-res-usage", file.name)
        )
        code = resources.run(CUOBJDUMP, "-sass", file.name) if local else ""
    spills = resources.accesses_in_loops(code) if local else 0
    used = (registers, compiled.metadata.shared, local, spills, f"{seconds:.2f}")
    row = (triton.__version__, launch.name, arch, launch.warps, *used)
    return dict(zip(COLUMNS, row, strict=True))


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
    found, seconds = [], 0.0
    with tempfile.TemporaryDirectory() as empty:
        if not arguments.check:
            os.environ["TRITON_CACHE_DIR"] = empty
        for launch in launches(dtypes):
            rows = [compile_for(arch, launch) for arch in arguments.arch]
            runner.print_rows(launch.name, rows, COLUMNS[2:])
            found += rows
            seconds += float(rows[0]["seconds"]) if launch in first else 0
    if arguments.out:
        runner.write_csv(arguments.out, COLUMNS, found)
    if arguments.check:
        check(found)
    else:
        print(f"\nthe first vn_entropy_grad of (128, 512) compiles for {seconds:.1f} s on one core")


if __name__ == "__main__":
    main()
