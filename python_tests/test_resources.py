"""csrc/cuda/resources.py: the output of cuobjdump."""

from __future__ import annotations

from pathlib import Path

import emulation
import pytest

pytestmark = pytest.mark.slow

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"


resources = emulation.import_module(CUDA / "resources.py")


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


def test_usage_is_read() -> None:
    """From Hopper on, cuobjdump counts what is reserved as shared memory of the kernel."""
    ampere, hopper = resources.parse(USAGE)
    assert (ampere.arch, ampere.registers, ampere.shared, ampere.local) == (86, 40, 2048, 16)
    assert (hopper.arch, hopper.registers, hopper.shared, hopper.local) == (90, 42, 2048, 0)


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
