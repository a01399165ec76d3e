"""What the stages hand to each other, in the order they run:

    normalize.py   z -> X^, and A^ = X^ X^^T of the smaller side
    poles.py       A^ -> the terms whose sum is log A^: m <= 128, one program each
    blocked.py     the same in panels, beyond
    eigh.py        A^ -> eigenvalues and eigenvectors, by torch, and functions of A^ by them
    functionals/   A^ -> a function of the spectrum, and W of its gradient: a file each
    gradient.py    W X^ -> gradients in z and in the weights
    doe_loss.py    the cosine term of the difference of entropies

X^ = X / sqrt(tau), tau = tr A, so that A = tau A^ and log A = log A^ + log(tau) I. Every stage
works on a whole batch, and nothing is read back to the host: what depends on the data (a sample
that is not finite, a trace of zero) is decided on the device. Equation numbers: csrc/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vne_kernels._core.dtypes import compute_dtype


@dataclass(frozen=True)
class Samples:
    """A batch z (batch, n, d), contiguous, and how it is to be read."""

    z: Tensor
    weights: Tensor | None  # [batch, n], contiguous
    normalize: bool
    eps: float
    gram_side: bool  # A is n x n; otherwise d x d

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.z.dtype)

    @property
    def m(self) -> int:
        return self.z.shape[1] if self.gram_side else self.z.shape[2]


@dataclass(frozen=True)
class Rows:
    """What is remembered of the rows once they are measured."""

    samples: Samples
    x: Tensor  # X^ [batch, n, d], of trace one; zeros if the sample is not regular
    inverse_norms: Tensor  # [batch, n] float64: u_i over z_i
    projected: Tensor  # [batch, n] int8: whether u_i moves on the sphere, equation (4)
    traces: Tensor  # [batch] float64: tau; 0 if all rows are, not finite if an entry is not


@dataclass(frozen=True)
class MatrixFunction:
    """W = log A^ + log(m) I of each sample: the sum of terms, and where there is a constant
    (constant + log m) I besides.

    log A of a flat spectrum is -log m I: in W that is 0, and little is left to cancel.
    """

    terms: Tensor  # [batch, count, m, m]
    inner: Tensor  # [batch, parts] float64: their sum is <A^, sum of terms>
    constant: float | None


def with_unit_trace(a: Tensor) -> Tensor:
    """A^ [batch, m, m] over its trace, which rounding has moved: r(1) = 0 is to hold where all
    there is is one eigenvalue. Zeros stay zeros."""
    trace = a.diagonal(dim1=-2, dim2=-1).sum(-1)
    return a / torch.where(trace > 0, trace, 1)[:, None, None]


@dataclass(frozen=True)
class MatrixGradient:
    """The gradient of a function of the spectrum, dF/dX = factor (W + identity I) X."""

    w: Tensor  # [batch, m, m]
    factor: float
    identity: Tensor | None = None  # [batch] float64; None: 0


def regular_or(traces: Tensor, x: Tensor, of_zeros: float = 0.0) -> Tensor:
    """x [batch, ...] where a sample is regular; `of_zeros` if all its rows are zero, else NaN."""
    traces = traces.reshape(-1, *(1,) * (x.dim() - 1))
    regular = (traces > 0) & traces.isfinite()
    irregular = torch.where(traces == 0, of_zeros, torch.nan).to(x.dtype)
    return torch.where(regular, x, irregular)
