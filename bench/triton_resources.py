"""What each Triton kernel takes of a multiprocessor, compiled for five GPUs. No GPU is needed.

    python bench/triton_resources.py             registers, shared and local memory of each kernel
    python bench/triton_resources.py --check     fail if a kernel spills
    python bench/triton_resources.py --out F     the same figures as CSV

Operators are traced on fake CUDA tensors of the shapes below, and every launch is compiled for the
architectures of ARCHITECTURES with the types, constants and divisibilities that it has there, as
Triton would at the first call. A kernel uses local memory, which is memory of the GPU, where
registers did not suffice; spills are the instructions within loops that use it. Seconds are those
of this machine, of one process, with an empty cache; only --check takes what is compiled already.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import product
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

ARCHITECTURES = (80, 86, 89, 90, 120)

SHAPES = ((24, 512), (64, 128), (128, 512), (512, 128), (300, 301), (4096, 256))
"""(n, d): every size of matrix that a program sweeps, both sides, a panel, a depth in parts."""


@dataclass(frozen=True)
class Launch:
    """A kernel and all that its code depends on."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments known to be divisible by 16
    warps: int

    @property
    def name(self) -> str:
        """The kernel with the constants that distinguish it from others of its kind."""
        named = [
            f"{name}={value}"
            for name, value in self.constants
            if name.isupper() and isinstance(value, int) and not isinstance(value, bool)
        ]
        pointers = [kind[1:] for _, kind in self.signature if kind in ("*fp16", "*bf16", "*fp64")]
        return f"{self.kernel.__name__}({', '.join([*sorted(set(pointers)), *named])})"


@dataclass(frozen=True)
class Usage:
    kernel: str
    arch: int
    warps: int
    registers: int  # of a thread
    shared: int  # bytes of a program
    local: int  # bytes of a thread
    spills: int  # instructions within loops that read or write them
    seconds: float  # to compile


POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}


def record(kernel: Any, *args: Any, **options: Any) -> Iterator[Launch]:
    """The launches that Triton makes of the arguments, one for each number of warps it tries."""
    if isinstance(kernel, Autotuner):
        for config in kernel.configs:
            yield from record(kernel.fn, *args, num_warps=config.num_warps, **options)
        return
    warps = options.pop("num_warps", 4)
    parameters = {parameter.name: parameter for parameter in kernel.params}
    given = dict(zip(parameters, args, strict=False)) | options
    signature, constants, aligned = {}, {}, []
    for index, (name, parameter) in enumerate(parameters.items()):
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned.append(index)
        elif parameter.is_constexpr or value is None or value == 1:
            signature[name] = "constexpr"
            constants[name] = value
        else:
            assert isinstance(value, int)
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(index)
    yield Launch(kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), warps)


@contextmanager
def recording() -> Iterator[dict[Launch, None]]:
    """What is launched within it, on fake tensors; nothing runs."""
    found: dict[Launch, None] = {}

    def keep(kernel: Any, _grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found.update(dict.fromkeys(record(kernel, *args, **options)))

    with FakeTensorMode(), launching_by(keep):
        yield found


def launches(dtypes: tuple[torch.dtype, ...]) -> list[Launch]:
    """All kernels that the operators launch for SHAPES."""
    with recording() as found:
        for dtype in dtypes:
            for n, d in SHAPES:
                z = torch.empty(n, d, dtype=dtype, device="cuda")
                operators.vn_entropy_grad(z, None, True, "poles", 1e-12)
            z = torch.empty(*SHAPES[2], dtype=dtype, device="cuda")
            p = torch.empty(z.shape[0], dtype=operators.samples_of(z, None, True, 0).dtype)
            operators.vn_entropy_grad(z, p.to("cuda"), False, "eigh", 1e-12)
            loss = operators.doe_loss_grad(z, z, "poles", 1e-12)
            operators.doe_loss_backward(loss[0], loss[1], z, z, *loss[2:])
    return list(found)


def compile_for(arch: int, launch: Launch) -> Usage:
    aligned = {(index,): [["tt.divisibility", 16]] for index in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), aligned)
    begin = time.perf_counter()
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": launch.warps}
    )
    seconds = time.perf_counter() - begin
    cubin = compiled.asm["cubin"]
    printed = cuobjdump(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed)
    assert found, printed
    registers, stack, local = map(int, found.groups())
    spills = spills_of(cuobjdump(cubin, "-sass")) if stack + local else 0
    shared = compiled.metadata.shared
    usage = (registers, shared, stack + local, spills)
    return Usage(launch.name, arch, launch.warps, *usage, seconds)


def cuobjdump(cubin: bytes, option: str) -> str:
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def spills_of(code: str) -> int:
    """Accesses to local memory within loops, that is between a branch back and its target.

    What is written before a loop and read after it costs next to nothing: a call saves registers
    that way, and so does the assembler in order to have more programs at a time.
    """
    instructions = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)
    ]
    assert instructions, code
    loops = [
        (int(to[1], 16), address)
        for address, text in instructions
        if (to := re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)) and int(to[1], 16) < address
    ]
    return sum(
        any(first <= address <= last for first, last in loops)
        for address, text in instructions
        if re.search(r"\b(LDL|STL)\b", text)
    )


def measure(architectures: list[int], dtypes: tuple[torch.dtype, ...]) -> list[Usage]:
    found: list[Usage] = []
    print("registers  shared  local  spills  warps   arch  seconds  kernel")
    for launch, arch in product(launches(dtypes), architectures):
        usage = compile_for(arch, launch)
        found.append(usage)
        print(
            f"{usage.registers:9} {usage.shared:7} {usage.local:6} {usage.spills:7} {usage.warps:6}"
            f"  sm_{usage.arch:<3} {usage.seconds:8.2f}  {usage.kernel}",
            flush=True,
        )
    of_first = seconds_of_first_call(architectures[0])
    print(f"the first vn_entropy_grad of {SHAPES[2]} compiles for {of_first:.1f} s on one core")
    return found


def seconds_of_first_call(arch: int) -> float:
    """Of value and gradient at (128, 512): all that is compiled before the first result."""
    with recording() as found:
        z = torch.empty(*SHAPES[2], device="cuda")
        operators.vn_entropy_grad(z, None, True, "poles", 1e-12)
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    return sum(compile_for(arch, launch).seconds for launch in found)


def check(found: list[Usage]) -> None:
    """Ends the program with an error if a kernel spills, or if there is none."""
    spilling = [usage for usage in found if usage.spills]
    for usage in spilling:
        where = f"{usage.kernel} of {usage.warps} warps on sm_{usage.arch}"
        print(f"{where}: {usage.spills} accesses to local memory within loops")
    if spilling or not found:
        sys.exit(f"{len(spilling)} of {len(found)} kernels spill")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--float64", action="store_true", help="and half precisions, besides")
    parser.add_argument("--out", type=Path, metavar="F")
    arguments = parser.parse_args()
    dtypes = (torch.float32,)
    if arguments.float64:
        dtypes += (torch.float64, torch.float16, torch.bfloat16)
    with tempfile.TemporaryDirectory() as empty:
        if not arguments.check:
            os.environ["TRITON_CACHE_DIR"] = empty
        found = measure(arguments.arch, dtypes)
    if arguments.out:
        from runner import write_csv  # tests load this file without its folder in the path

        rows = [asdict(usage) | {"seconds": f"{usage.seconds:.2f}"} for usage in found]
        columns = ["triton", *(field.name for field in fields(Usage))]
        write_csv(arguments.out, columns, [{"triton": triton.__version__, **row} for row in rows])
    if arguments.check:
        check(found)


if __name__ == "__main__":
    main()
