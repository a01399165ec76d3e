"""What each CUDA kernel takes of a multiprocessor, read from the built module. No GPU is needed.

    python csrc/cuda/resources.py             registers, shared and local memory of each kernel
    python csrc/cuda/resources.py --check     fail if a kernel uses local memory

The module is that of the installed vne_kernels unless MODULE names another. Needs cuobjdump: from
triton, which comes with torch, or from PATH; names are readable where c++filt is there.

Local memory is memory of the GPU. A kernel has it where an array is indexed at run time, or where
registers did not suffice: what ptxas -v reports as spilled is part of the stack. cuobjdump calls it
STACK, and LOCAL in objects of older compilers.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RESERVED = 1024
"""Bytes of shared memory that CUDA takes for itself in each block, compute capability 8 and up."""


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: int
    registers: int  # of a thread
    shared: int  # bytes of a block, static
    local: int  # bytes of a thread


# ---- the module's contents ---------------------------------------------------------------------


def find_module() -> Path:
    spec = importlib.util.find_spec("vne_kernels")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    modules = sorted(folder.glob("_C_cuda*.abi3.so"))
    if len(modules) != 1:
        sys.exit(f"{folder} has {len(modules)} CUDA modules; name the one to read")
    return modules[0]


def run(*command: str | Path, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def dump(option: str, file: str | Path) -> str:
    """The output of cuobjdump. Triton's is as new as the compilers that come with torch."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin if triton and triton.origin else "").parent
    with_triton = str(folder / "backends/nvidia/bin/cuobjdump")
    if not (cuobjdump := shutil.which(with_triton) or shutil.which("cuobjdump")):
        sys.exit("cuobjdump was found neither in triton nor in PATH")
    return run(cuobjdump, option, file)


def short_name(demangled: str) -> str:
    """`kernel<T>` of `void vne::(anonymous namespace)::kernel<vne::T>(float*)`."""
    name = re.sub(r"\(anonymous namespace\)::|\bvne::", "", demangled)
    name = re.sub(r"\([\w ]+\)(?=\d)", "", name)  # the types of template arguments: (Method)1
    return name.partition("(")[0].removeprefix("void ").strip()


def usages(printed: str) -> Iterator[tuple[str, int, int, int]]:
    """Name, registers, shared and local memory of each function in the output of -res-usage."""
    pattern = r"Function (.+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, *numbers in re.findall(pattern, printed):
        registers, stack, shared, local = map(int, numbers)
        yield name, registers, shared, stack + local


def accesses_in_loops(code: str) -> int:
    """Counts accesses to local memory between a branch back and its target, in output of -sass.

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


def parse(printed: str) -> list[Kernel]:
    """The kernels in the output of -res-usage: a part for each architecture and source file."""
    kernels = []
    for part in re.split(r"^Fatbin elf code:$", printed, flags=re.M)[1:]:
        arch = int(re.findall(r"^arch = sm_(\d+)", part, re.M)[0])
        for name, registers, shared, local in usages(part):
            static = max(0, shared - RESERVED) if arch >= 90 else shared  # RESERVED is counted
            kernels.append(Kernel(short_name(name), arch, registers, static, local))
    return kernels


def read_kernels(module: Path) -> list[Kernel]:
    printed = dump("-res-usage", module)
    if demangle := shutil.which("c++filt") or shutil.which("cu++filt"):
        printed = run(demangle, text=printed)
    return sorted(parse(printed), key=lambda kernel: (kernel.name, kernel.arch))


# ---- what is printed ---------------------------------------------------------------------------


def print_usage(kernels: list[Kernel]) -> None:
    print("registers  shared  local   arch  kernel")
    for k in kernels:
        print(f"{k.registers:9} {k.shared:7} {k.local:6}  sm_{k.arch:<3} {k.name}")


def check(kernels: list[Kernel]) -> None:
    spilling = [kernel for kernel in kernels if kernel.local]
    for kernel in spilling:
        print(f"{kernel.name} on sm_{kernel.arch}: {kernel.local} bytes of local memory")
    if spilling or not kernels:
        sys.exit(f"{len(spilling)} of {len(kernels)} kernels use local memory")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("module", nargs="?", type=Path, metavar="MODULE")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    kernels = read_kernels(arguments.module or find_module())
    if arguments.check:
        check(kernels)
    else:
        print_usage(kernels)


if __name__ == "__main__":
    main()
