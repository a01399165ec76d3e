"""Accuracy of the kernels of a GPU without a GPU.

    python python_tests/emulated_accuracy.py [--backend triton] [--draws 20]

emulation.py runs CUDA's sources on the CPU, Triton's interpreter its kernels.

First the spectra of the tests, then random matrices of low rank. Each line: error of S, and the
error of dS/dz over that of a float32 eigendecomposition (`reference.eigh_grad`), by eigh and by
the poles: median, worst, and how many draws are above 1.5.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable

if "triton" in [argument.rpartition("=")[2] for argument in sys.argv]:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when its kernels are defined

import backends
import cases
import torch
from pivoting import low_rank, summary
from torch import Tensor

from vne_kernels import reference

SPECTRA_SHAPES = ((64, 64), (128, 512), (512, 128), (300, 301))
LOW_RANK_SHAPES = ((17, 33), (33, 17), (33, 33), (64, 128), (512, 17), (300, 301), (301, 300))
RANKS = (1, 3, 8)


def errors(z: Tensor, method: str) -> tuple[float, float]:
    """|error| of S, and |error| of dS/dz over that of `reference.eigh_grad`."""
    value, grad, _ = torch.ops.vne_kernels.vn_entropy_grad(z, None, True, method, 1e-12)
    of_value = abs(float(value) - float(reference.oracle(z)))
    return of_value, cases.absolute_error(grad, reference.oracle_grad(z)) / cases.eigh_error(z)


def report(label: str, draws: Iterable[Tensor]) -> None:
    cells, inputs = [], list(draws)
    for method in cases.METHODS:
        value, ratio = torch.tensor([errors(z, method) for z in inputs]).T
        cells.append(f"{method}: S {value.max():7.1e}  gradient {summary(ratio)}")
    print(f"{label:>26}", *cells, sep="   ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=("emulated", "triton"), default="emulated")
    parser.add_argument("--draws", type=int, default=20)
    arguments = parser.parse_args()
    installed = backends.install(arguments.backend)
    for name in cases.SPECTRA:
        for n, d in SPECTRA_SHAPES:
            draws = (cases.spectrum_case(name, (n, d), torch.float32, seed) for seed in range(3))
            report(f"{name} {n} x {d}", draws)
    generator = torch.Generator().manual_seed(0)
    for n, d in LOW_RANK_SHAPES:
        for rank in RANKS:
            count = arguments.draws if min(n, d) <= 64 else max(1, arguments.draws // 4)
            report(f"rank {rank} {n} x {d}", low_rank(count, n, d, rank, generator))
    del installed  # until here the operators are the backend's


if __name__ == "__main__":
    main()
