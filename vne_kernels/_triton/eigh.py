"""The eigendecomposition, by torch, and functions of a matrix by it.

`torch.linalg.eigh` waits for the GPU to look for an error: this way cannot be captured in a CUDA
graph. A sample without a finite A^ has zeros there (normalize.py), on which every library
converges.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from vne_kernels._triton.gradient import product
from vne_kernels._triton.stages import MatrixFunction, with_unit_trace


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [batch, m], ascending, and eigenvectors [batch, m, m] as columns.

    On the host, in the interpreter, MKL does not converge, or gives NaN, for some float32 matrices
    of low rank that have rows of zeros.
    """
    if a.device.type != "cpu" or a.dtype == torch.float64:
        return tuple(torch.linalg.eigh(a))
    with suppress(RuntimeError):  # torch.linalg.LinAlgError is one
        values, vectors = torch.linalg.eigh(a)
        if vectors.isfinite().all():
            return values, vectors
    values, vectors = torch.linalg.eigh(a.double())
    return values.to(a.dtype), vectors.to(a.dtype)


def spectral_function(vectors: Tensor, values: Tensor) -> Tensor:
    """V diag(f) V^T of V [batch, m, m] with eigenvectors as columns and f [batch, m]."""
    return product(vectors * values.unsqueeze(-2), vectors.mT)


def log_by_eigh(a: Tensor) -> MatrixFunction:
    """log A^ + log(m) I of matrices [batch, m, m] of trace one but for rounding.

    The smallest eigenvalue that is told from the rounding of the largest stands for all below: any
    finite logarithm gives the same gradient there.
    """
    a = with_unit_trace(a)
    values, vectors = eigh(a)
    info = torch.finfo(a.dtype)
    least = (info.eps * values[:, -1:]).clamp_min(info.tiny)
    w = spectral_function(vectors, (a.shape[-1] * torch.maximum(values, least)).log())
    # Of A^ itself: sum_k lambda_k log lambda_k has the rounding of every eigenvalue to first order.
    inner = (a.double() * w).sum((-2, -1)).unsqueeze(-1)
    return MatrixFunction(w.unsqueeze(1), inner, None)
