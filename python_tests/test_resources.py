"""csrc/cuda/resources.py: occupancy, by hand and by NVIDIA's header; the output of cuobjdump."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import emulation
import pytest
import torch

pytestmark = pytest.mark.slow

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"


resources = emulation.import_module(CUDA / "resources.py")
RTX_3090, RTX_4090, H200 = resources.GPUS


@pytest.mark.parametrize(
    ("gpu", "threads", "registers", "shared", "expected"),
    [
        (RTX_3090, 256, 32, 0, (6, "threads")),
        (RTX_3090, 256, 128, 2048, (2, "registers")),
        (RTX_3090, 32, 32, 0, (16, "blocks")),
        (RTX_4090, 32, 32, 0, (24, "blocks")),
        (RTX_4090, 64, 40, 48 * 1024, (2, "shared memory")),
        (H200, 256, 119, 1024, (2, "registers")),
        (H200, 1024, 65, 0, (0, "registers")),
    ],
)
def test_occupancy_by_hand(
    gpu: object, threads: int, registers: int, shared: int, expected: tuple[int, str]
) -> None:
    assert resources.occupancy(gpu, threads, registers, shared) == expected


HARNESS = """
#include <climits>
#include <cstddef>
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  const int gpus[3][4] = {{8, 6, 1536, 100}, {8, 9, 1536, 100}, {9, 0, 2048, 228}};
  for (int gpu = 0; gpu < 3; ++gpu)
    for (int threads = 32; threads <= 1024; threads += 32)
      for (int registers = 16; registers <= 255; registers += 7)
        for (int shared = 0; shared <= 48 * 1024; shared += 5000) {
          cudaOccDeviceProp device{};
          device.computeMajor = gpus[gpu][0];
          device.computeMinor = gpus[gpu][1];
          device.maxThreadsPerBlock = 1024;
          device.maxThreadsPerMultiprocessor = gpus[gpu][2];
          device.regsPerBlock = device.regsPerMultiprocessor = 65536;
          device.warpSize = 32;
          device.sharedMemPerBlock = 48 * 1024;
          device.sharedMemPerMultiprocessor = gpus[gpu][3] * 1024;
          device.numSms = 1;
          device.sharedMemPerBlockOptin = (gpus[gpu][3] - 1) * 1024;
          device.reservedSharedMemPerBlock = 1024;
          cudaOccFuncAttributes kernel{};
          kernel.maxThreadsPerBlock = INT_MAX;
          kernel.numRegs = registers;
          kernel.sharedSizeBytes = shared;
          kernel.numBlockBarriers = 1;
          cudaOccDeviceState state{};
          state.cacheConfig = CACHE_PREFER_NONE;
          state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
          cudaOccResult result{};
          const int error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel,
                                                                    &state, threads, 0);
          std::printf("%d %d %d %d %d\\n", gpu, threads, registers, shared,
                      error ? -1 : result.activeBlocksPerMultiprocessor);
        }
}
"""


def occupancy_header() -> Path | None:
    """The folder of NVIDIA's header: in a package that comes with a CUDA torch, or a toolkit."""
    packages = (Path(torch.__file__).parents[1] / "nvidia").glob("*/include")
    toolkits = Path("/usr/local").glob("cuda*/include")
    found = (folder for folder in [*packages, *toolkits] if (folder / "cuda_occupancy.h").exists())
    return next(found, None)


def test_occupancy_against_nvidias_header(tmp_path: Path) -> None:
    folder, compiler = occupancy_header(), shutil.which("g++")
    if folder is None or compiler is None:
        pytest.skip("needs g++ and cuda_occupancy.h")
    (tmp_path / "occupancy.cpp").write_text(HARNESS)
    program = tmp_path / "occupancy"
    subprocess.run(
        [compiler, "-w", f"-I{folder}", str(tmp_path / "occupancy.cpp"), "-o", str(program)],
        check=True,
    )
    lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    assert lines
    for line in lines.splitlines():
        gpu, threads, registers, shared, blocks = map(int, line.split())
        ours, _ = resources.occupancy(resources.GPUS[gpu], threads, registers, shared)
        assert ours == blocks, line


USAGE = """
Fatbin elf code:
================
arch = sm_86
Resource usage:
 Function _ZN3vne1kE:
  REG:40 STACK:16 SHARED:2048 LOCAL:0 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_90

Fatbin elf code:
================
arch = sm_90
Resource usage:
 Function _ZN3vne1kE:
  REG:42 STACK:0 SHARED:3072 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ELF = """
Fatbin elf code:
================
arch = sm_90
.nv.info._ZN3vne1kE
\t<0x1>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x100 0x1 0x1\x20
"""


def test_usage_is_read() -> None:
    """From Hopper on, cuobjdump counts what is reserved as shared memory of the kernel."""
    ampere, hopper = resources.parse(USAGE, resources.block_sizes(ELF))
    assert (ampere.arch, ampere.registers, ampere.shared, ampere.local) == (86, 40, 2048, 16)
    assert (hopper.arch, hopper.registers, hopper.shared, hopper.local) == (90, 42, 2048, 0)
    assert (ampere.threads, hopper.threads) == (0, 256)


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("vne::(anonymous namespace)::many(float*, int)", "many"),
        ("void vne::(anonymous namespace)::hot<double, (int)256>(double*)", "hot<double, 256>"),
    ],
)
def test_names_are_short(demangled: str, short: str) -> None:
    assert resources.short_name(demangled) == short


@pytest.mark.parametrize(
    ("inside", "spills"),
    [("IADD3 R1, R1, 0x1", 0), ("LDL.LU R0, [R1+0x4]", 1), ("STL [R1], R2", 1), ("LDG.E R0", 0)],
)
def test_a_spill_is_found_within_loops_alone(inside: str, spills: int) -> None:
    code = ["STL [R1], R11", inside, "@!P4 BRA 0x0010", "LDL R11, [R1]", "@P0 BRA 0x0060", "EXIT"]
    lines = [f"  /*{16 * i:04x}*/   {text} ;  /* 0x000fe2 */" for i, text in enumerate(code)]
    assert resources.accesses_in_loops("\n".join(lines)) == spills
