"""What each CUDA kernel takes of a multiprocessor, read from the built module. No GPU is needed.

    python csrc/cuda/resources.py             registers, shared and local memory of each kernel
    python csrc/cuda/resources.py --check     fail if a kernel uses local memory (see COLD)
    python csrc/cuda/resources.py --table     occupancy on three GPUs, as a Markdown table

The module is that of the installed vne_kernels unless MODULE names another. Needs cuobjdump, which
is looked for where setup.py looks for nvcc and in triton, which comes with torch; names are
readable where c++filt is there.

Local memory is memory of the GPU. A kernel has it where an array is indexed at run time, or where
registers did not suffice: what ptxas -v reports as spilled is part of the stack. cuobjdump calls it
STACK, and LOCAL in objects of older compilers.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COLD: tuple[str, ...] = ("finish_rows<float, bfloat16>",)
"""Kernels that may use local memory as their time is small: names as printed, * for any part.

This one keeps 8 bytes, on sm_120 alone, as measure_rows once did around the call of a
double-precision division, once a row; its machine code was not looked at.
"""

RESERVED = 1024
"""Bytes of shared memory that CUDA takes for itself in each block, compute capability 8 and up."""


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: int
    threads: int  # of one multiprocessor, as are the others
    blocks: int
    shared: int
    registers: int = 65536


GPUS = (
    Gpu("RTX 3090", 86, threads=1536, blocks=16, shared=100 * 1024),
    Gpu("RTX 4090", 89, threads=1536, blocks=24, shared=100 * 1024),
    Gpu("H200", 90, threads=2048, blocks=32, shared=228 * 1024),
)


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: int
    registers: int  # of a thread
    shared: int  # bytes of a block, static
    local: int  # bytes of a thread
    threads: int  # of a block, as __launch_bounds__ says; 0 where it says nothing


def occupancy(gpu: Gpu, threads: int, registers: int, shared: int) -> tuple[int, str]:
    """Blocks that one multiprocessor holds at a time, and what allows no more.

    The rules of CUDA's cuda_occupancy.h: registers come in 256 a warp from four equal partitions,
    shared memory in 128 bytes a block.
    """
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256
    fits = of_warp * -(-warps // 4) * 4 <= gpu.registers
    of_block = -(-(shared + RESERVED) // 128) * 128
    limits = {
        "threads": gpu.threads // 32 // warps,
        "blocks": gpu.blocks,
        "registers": gpu.registers // 4 // of_warp * 4 // warps if fits else 0,
        "shared memory": gpu.shared // of_block,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


# ---- the module's contents ---------------------------------------------------------------------


def candidates() -> Iterator[Path]:
    if compiler := os.environ.get("CUDACXX"):
        yield Path(shutil.which(compiler) or compiler).parent / "cuobjdump"
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home) / "bin/cuobjdump"
    if found := shutil.which("cuobjdump"):
        yield Path(found)
    yield Path("/usr/local/cuda/bin/cuobjdump")
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        yield Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"


def find_cuobjdump() -> Path:
    for path in candidates():
        if path.exists():
            return path
    sys.exit("cuobjdump was not found in CUDACXX, CUDA_HOME, PATH, /usr/local/cuda, triton")


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


def short_name(demangled: str) -> str:
    """`kernel<T>` of `void vne::(anonymous namespace)::kernel<vne::T>(float*)`."""
    name = re.sub(r"\(anonymous namespace\)::|\bvne::", "", demangled)
    name = re.sub(r"\([\w ]+\)(?=\d)", "", name)  # the types of template arguments: (Method)1
    return name.partition("(")[0].removeprefix("void ").strip()


def by_arch(dump: str) -> Iterator[tuple[int, str]]:
    """The parts of cuobjdump's output, one for each architecture and source file."""
    parts = re.split(r"^Fatbin elf code:$", dump, flags=re.M)[1:]
    for part in parts:
        if found := re.search(r"^arch = sm_(\d+)", part, re.M):
            yield int(found[1]), part


def block_sizes(dump: str) -> dict[tuple[int, str], int]:
    """Threads of a block by architecture and mangled name."""
    sizes = {}
    for arch, part in by_arch(dump):
        for section in re.split(r"^\.nv\.info\.", part, flags=re.M)[1:]:
            bounds = re.search(r"EIATTR_MAX_THREADS\s+Format:.*\s+Value:((?: *\t*0x\w+)+)", section)
            if bounds:
                x, y, z = (int(value, 16) for value in bounds[1].split())
                sizes[arch, section.split(maxsplit=1)[0]] = x * y * z
    return sizes


def usages(printed: str) -> Iterator[tuple[str, int, int, int]]:
    """Name, registers, shared and local memory of each function in the output of -res-usage."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
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


def parse(printed: str, sizes: dict[tuple[int, str], int]) -> list[Kernel]:
    kernels = []
    for arch, part in by_arch(printed):
        for name, registers, shared, local in usages(part):
            static = max(0, shared - RESERVED) if arch >= 90 else shared  # RESERVED is counted
            kernels.append(Kernel(name, arch, registers, static, local, sizes.get((arch, name), 0)))
    return kernels


def read_kernels(module: Path) -> list[Kernel]:
    cuobjdump = find_cuobjdump()
    kernels = parse(
        run(cuobjdump, "-res-usage", module), block_sizes(run(cuobjdump, "-elf", module))
    )
    mangled = sorted({kernel.name for kernel in kernels})
    names = dict(zip(mangled, mangled, strict=True))
    if demangle := shutil.which("c++filt") or shutil.which("cu++filt"):
        readable = run(demangle, text="\n".join(mangled)).splitlines()
        names = {old: short_name(new) for old, new in zip(mangled, readable, strict=True)}
    kernels = [Kernel(**{**vars(kernel), "name": names[kernel.name]}) for kernel in kernels]
    return sorted(kernels, key=lambda kernel: (kernel.name, kernel.arch))


# ---- what is printed ---------------------------------------------------------------------------


def print_usage(kernels: list[Kernel]) -> None:
    print("registers  shared  local  threads   arch  kernel")
    for k in kernels:
        threads = k.threads or "-"
        print(f"{k.registers:9} {k.shared:7} {k.local:6} {threads:>8}  sm_{k.arch:<3} {k.name}")


def print_table(kernels: list[Kernel]) -> None:
    print("| kernel | GPU | threads | registers | shared | blocks | warps | limited by |")
    print("|---|---|---|---|---|---|---|---|")
    for kernel in kernels:
        for gpu in GPUS:
            if gpu.arch != kernel.arch or not kernel.threads:
                continue
            blocks, limit = occupancy(gpu, kernel.threads, kernel.registers, kernel.shared)
            warps, all_warps = blocks * -(-kernel.threads // 32), gpu.threads // 32
            print(
                f"| `{kernel.name}` | {gpu.name} | {kernel.threads} | {kernel.registers} "
                f"| {kernel.shared} | {blocks} | {warps} of {all_warps} | {limit} |"
            )


def check(kernels: list[Kernel]) -> None:
    hot = [k for k in kernels if not any(fnmatch.fnmatchcase(k.name, cold) for cold in COLD)]
    spilling = [kernel for kernel in hot if kernel.local]
    for kernel in spilling:
        print(f"{kernel.name} on sm_{kernel.arch}: {kernel.local} bytes of local memory")
    if spilling or not hot:
        sys.exit(f"{len(spilling)} of {len(hot)} kernels use local memory")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("module", nargs="?", type=Path, metavar="MODULE")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    kernels = read_kernels(arguments.module or find_module())
    if arguments.check:
        check(kernels)
    elif arguments.table:
        print_table(kernels)
    else:
        print_usage(kernels)


if __name__ == "__main__":
    main()
