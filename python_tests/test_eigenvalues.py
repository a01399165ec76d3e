"""The CPU's own eigenvalue solver, also of matrices that lack rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import run_python
from torch import Tensor

from vne_kernels import spectrum

#: Multiples of a vector's width and not, in passes of one thread and of several (from 512 on).
SIDES = {torch.float64: (1, 2, 17, 33, 200, 384, 401, 613), torch.float32: (1, 33, 200, 896, 907)}
#: Times the rounding of the dtype, of a spectrum of sum one. The largest errors of all instruction
#: sets were 9.2 and 10, of repeated eigenvalues (LAPACK's: 6 and 12).
ALLOWED = {torch.float64: 16.0, torch.float32: 32.0}


def rows(kind: str, m: int, dtype: torch.dtype) -> Tensor:
    """z [m, m + 3], for the eigenvalues of z z^T over its trace."""
    generator = torch.Generator().manual_seed(m)
    z = torch.randn(m, m + 3, dtype=torch.float64, generator=generator)
    rank = {"rank 1": 1, "rank 20": 20, "rank 150": 150}.get(kind)
    if rank is not None:
        rank = min(rank, m)
        z = z[:, :rank] @ torch.randn(rank, m + 3, dtype=torch.float64, generator=generator)
    elif kind == "graded":
        z *= torch.logspace(0, -12, m, dtype=torch.float64)[:, None]
    elif kind == "blocks":
        z = torch.eye(m, m + 3, dtype=torch.float64)
        z[m // 2 :] = z[m // 2]
    return z.to(dtype)


KINDS = ("full", "rank 1", "rank 20", "rank 150", "graded", "blocks")


def error(kind: str, m: int, dtype: torch.dtype) -> float:
    """The largest one of the eigenvalues, in units of the rounding of the dtype."""
    z = rows(kind, m, dtype)
    found = spectrum(z, normalize=False)
    assert found.shape == (m,)
    assert (found.diff() <= 0).all()
    wide = z.double()
    expected = torch.linalg.svdvals(wide).square()
    expected /= expected.sum()
    difference = (found.double() / found.double().sum() - expected).abs().max()
    return float(difference) / torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(SIDES), ids=str)
def test_against_singular_values(kind: str, dtype: torch.dtype) -> None:
    for m in SIDES[dtype]:
        assert error(kind, m, dtype) <= ALLOWED[dtype], m


@pytest.mark.slow
@pytest.mark.parametrize("simd", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(simd: str) -> None:
    """Those that this processor lacks stand for the best that it has."""
    script = """
        import torch, test_eigenvalues as t
        sizes = (torch.float64, 401), (torch.float32, 907)
        print(*[t.error("full", m, dtype) / t.ALLOWED[dtype] for dtype, m in sizes])
    """
    done = run_python(script, cwd=Path(__file__).parent, VNE_KERNELS_SIMD=simd)
    assert max(map(float, done.stdout.split())) <= 1


def test_threads_change_nothing() -> None:
    z = rows("full", 613, torch.float64)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(spectrum(z))
    torch.set_num_threads(threads)
    assert torch.equal(*results)
