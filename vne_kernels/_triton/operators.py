"""The operators of csrc/ops/ out of the stages: what serves CUDA tensors without nvcc.

They get tensors as torch hands them over, in any layout, and their arguments have been checked:
register.py asks the native module to, so that no check stands twice.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import torch
from torch import Tensor

from vne_kernels._triton import doe_loss as doe
from vne_kernels._triton.blocked import log_by_blocked_poles
from vne_kernels._triton.eigh import eigh, log_by_eigh, spectral_function
from vne_kernels._triton.gradient import entropy_of, gradient, summed
from vne_kernels._triton.normalize import matrix_of, normalize_rows
from vne_kernels._triton.poles import LARGEST, log_by_poles
from vne_kernels._triton.stages import MatrixFunction, Rows, Samples

LARGEST_POLES = 1024
"""The largest m that poles serve here; beyond it every method is "eigh", torch.linalg.eigh."""

LIMITS = (
    f"m > {LARGEST_POLES} and float64 under method='auto', spectra and second derivatives go by "
    "torch.linalg.eigh, which waits for the GPU"
)
"""What the kernels leave to torch, as `available_backends` says it."""


# ---- arguments and results -----------------------------------------------------------------------


def flat(tensor: Tensor, keep: int) -> Tensor:
    """[batch, ...] with the last `keep` dimensions kept, contiguous."""
    batch, rest = tensor.shape[: tensor.dim() - keep], tensor.shape[tensor.dim() - keep :]
    return tensor.reshape(math.prod(batch), *rest).contiguous()


def samples_of(z: Tensor, weights: Tensor | None, normalize: bool, eps: float) -> Samples:
    """On the smaller side, equation (2)."""
    return Samples(
        flat(z, 2),
        None if weights is None else flat(weights, 1),
        normalize,
        max(eps, sys.float_info.min),  # below it 1 / eps is not finite
        z.shape[-2] <= z.shape[-1],
    )


def regular_or(traces: Tensor, x: Tensor, of_zeros: float = 0.0) -> Tensor:
    """x [batch, ...] where a sample is regular; `of_zeros` if all its rows are zero, else NaN."""
    traces = traces.reshape(-1, *(1,) * (x.dim() - 1))
    regular = (traces > 0) & traces.isfinite()
    irregular = torch.where(traces == 0, of_zeros, torch.nan).to(x.dtype)
    return torch.where(regular, x, irregular)


def shaped_gradients(
    z: Tensor, weights: Tensor | None, gradients: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor]:
    of_z, of_weights = gradients
    if weights is None or of_weights is None:
        return of_z.reshape(z.shape), of_z.new_empty(0)
    return of_z.reshape(z.shape), of_weights.reshape(weights.shape)


# ---- S -------------------------------------------------------------------------------------------


def log_of(a: Tensor, method: str) -> MatrixFunction:
    """log A^ + log(m) I by the method. "auto" takes poles for float32: an eigensolver takes
    milliseconds on a GPU, and of float64 there are 50 poles, at 1/64 of the rate on RTX cards.
    """
    m = a.shape[-1]
    if method == "auto":
        method = "eigh" if a.dtype == torch.float64 else "poles"
    if method == "eigh" or m > LARGEST_POLES:
        return log_by_eigh(a)
    return log_by_poles(a) if m <= LARGEST else log_by_blocked_poles(a)


def entropy_and_rows(samples: Samples, method: str) -> tuple[Tensor, Rows, MatrixFunction]:
    """S [batch], and what its gradient is made of."""
    rows = normalize_rows(samples)
    w = log_of(matrix_of(rows), method)
    return entropy_of(w, rows.traces), rows, w


def entropy_gradients(rows: Rows, w: MatrixFunction) -> tuple[Tensor, Tensor | None]:
    """(3): dS/dX = -2 (log A + I) X."""
    return gradient(rows, summed(w), -2.0, of_entropy=True)


def vn_entropy(
    z: Tensor, weights: Tensor | None, normalize: bool, method: str, eps: float
) -> Tensor:
    entropy, _, _ = entropy_and_rows(samples_of(z, weights, normalize, eps), method)
    return entropy.reshape(z.shape[:-2])


def vn_entropy_grad(
    z: Tensor, weights: Tensor | None, normalize: bool, method: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    entropy, rows, w = entropy_and_rows(samples_of(z, weights, normalize, eps), method)
    gradients = shaped_gradients(z, weights, entropy_gradients(rows, w))
    return entropy.reshape(z.shape[:-2]), *gradients


# ---- spectrum ------------------------------------------------------------------------------------


def spectrum_eigh(
    z: Tensor, weights: Tensor | None, normalize: bool, eps: float
) -> tuple[Tensor, Tensor]:
    rows = normalize_rows(samples_of(z, weights, normalize, eps))
    values, vectors = eigh(matrix_of(rows))
    values = (rows.traces[:, None] * values.flip(-1).clamp_min(0)).to(values.dtype)
    vectors = vectors.flip(-1).contiguous()  # torch's lie column by column
    m = values.shape[-1]
    return (
        regular_or(rows.traces, values).reshape(*z.shape[:-2], m),
        regular_or(rows.traces, vectors).reshape(*z.shape[:-2], m, m),
    )


def spectrum(z: Tensor, weights: Tensor | None, normalize: bool, eps: float) -> Tensor:
    return spectrum_eigh(z, weights, normalize, eps)[0]


def spectrum_backward(
    grad: Tensor,
    z: Tensor,
    eigenvectors: Tensor,
    weights: Tensor | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """d lambda_k = v_k^T dA v_k, so W = V diag(grad) V^T takes the place of -(log A + I)."""
    rows = normalize_rows(samples_of(z, weights, normalize, eps))
    w = spectral_function(flat(eigenvectors, 2), flat(grad, 1))
    return shaped_gradients(z, weights, gradient(rows, w, 2.0))


# ---- purity --------------------------------------------------------------------------------------


def purity_and_rows(samples: Samples) -> tuple[Tensor, Tensor, Rows]:
    """tr(A^2) / tau^2 [batch] in float64, A^ and the rows."""
    rows = normalize_rows(samples)
    a = matrix_of(rows)
    return torch.linalg.vector_norm(a.double(), dim=(1, 2)).square(), a, rows


def finished_purity(purity: Tensor, rows: Rows) -> Tensor:
    """Within [1/m, 1], which rounding may have left. A sample of zeros is taken for a pure state,
    as its entropy is 0."""
    clamped = purity.clamp(1 / rows.samples.m, 1).to(rows.samples.dtype)
    return regular_or(rows.traces, clamped, of_zeros=1.0)


def purity(z: Tensor, weights: Tensor | None, normalize: bool, method: str, eps: float) -> Tensor:
    value, _, rows = purity_and_rows(samples_of(z, weights, normalize, eps))
    return finished_purity(value, rows).reshape(z.shape[:-2])


def purity_grad(
    z: Tensor, weights: Tensor | None, normalize: bool, method: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A^ - P I over tau takes the place of the logarithm: the trace moves with X."""
    value, a, rows = purity_and_rows(samples_of(z, weights, normalize, eps))
    centred = a.double() - torch.diag_embed(value[:, None].expand(-1, a.shape[-1]))
    w = (centred / rows.traces[:, None, None]).to(a.dtype)
    gradients = shaped_gradients(z, weights, gradient(rows, w, 4.0))
    return finished_purity(value, rows).reshape(z.shape[:-2]), *gradients


# ---- doe_loss ------------------------------------------------------------------------------------


def doe_loss_grad(
    z1: Tensor, z2: Tensor, method: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    samples = samples_of(z1, None, True, eps)
    entropy, rows, w = entropy_and_rows(samples, method)
    entropy_grad, _ = entropy_gradients(rows, w)
    mean, row_stats = doe.cosine_terms(samples.z, flat(z2, 2), samples.eps)
    batch = z1.shape[:-2]
    return (
        entropy.reshape(batch),
        mean.reshape(batch),
        entropy_grad.reshape(z1.shape),
        row_stats.reshape(*batch, *row_stats.shape[1:]),
    )


def doe_loss(z1: Tensor, z2: Tensor, method: str, eps: float) -> tuple[Tensor, Tensor]:
    return vn_entropy(z1, None, True, method, eps), cosine(z1, z2, eps)[0]


def cosine(z1: Tensor, z2: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean, row_stats = doe.cosine_terms(flat(z1, 2), flat(z2, 2), max(eps, sys.float_info.min))
    batch = z1.shape[:-2]
    return mean.reshape(batch), row_stats.reshape(*batch, *row_stats.shape[1:])


def doe_loss_backward(
    grad_entropy: Tensor,
    grad_cosine: Tensor,
    z1: Tensor,
    z2: Tensor,
    entropy_grad: Tensor,
    row_stats: Tensor,
) -> tuple[Tensor, Tensor]:
    of_z1, of_z2 = doe.cosine_gradients(
        flat(grad_entropy, 0),
        flat(grad_cosine, 0),
        flat(z1, 2),
        flat(z2, 2),
        flat(entropy_grad, 2),
        flat(row_stats, 2),
    )
    return of_z1.reshape(z1.shape), of_z2.reshape(z2.shape)


# ---- density -------------------------------------------------------------------------------------
# Equation (12): parts of a batch have the d side in common, whatever their n.


def density_rows(z: Tensor, weights: Tensor | None, normalize: bool, eps: float) -> Rows:
    return normalize_rows(replace(samples_of(z, weights, normalize, eps), gram_side=False))


def density(z: Tensor, weights: Tensor | None, normalize: bool, eps: float) -> Tensor:
    rows = density_rows(z, weights, normalize, eps)
    a = matrix_of(rows)
    rho = (rows.traces[:, None, None] * a).to(a.dtype)
    return regular_or(rows.traces, rho).reshape(*z.shape[:-2], *rho.shape[1:])


def density_backward(
    grad_rho: Tensor, z: Tensor, weights: Tensor | None, normalize: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """d<G, rho> = 2 <diag(p) U G, dU>: the symmetric part of G takes the place of log A in (3).

    A G that is not finite comes from the part of another process that is not.
    """
    rows = density_rows(z, weights, normalize, eps)
    g = flat(grad_rho, 2)
    finite = g.isfinite().flatten(1).all(-1)
    rows = replace(rows, traces=torch.where(finite, rows.traces, torch.nan))
    return shaped_gradients(z, weights, gradient(rows, (g + g.mT) / 2, 2.0))


def density_log(rho: Tensor, method: str) -> tuple[Tensor, MatrixFunction]:
    """tau [batch] and log A^ + log(m) I of the symmetric part of matrices rho [batch, m, m]."""
    wide = rho.double()
    finite = wide.isfinite().flatten(1).all(-1)
    trace = wide.diagonal(dim1=-2, dim2=-1).sum(-1)
    traces = torch.where(finite & (trace >= 0), trace, torch.nan)
    a = (wide + wide.mT) / (2 * traces)[:, None, None]
    regular = (traces > 0) & traces.isfinite()
    a = torch.where(regular[:, None, None], a, 0).to(rho.dtype)
    return traces, log_of(a, method)


def density_entropy(rho: Tensor, method: str) -> Tensor:
    traces, w = density_log(flat(rho, 2), method)
    return entropy_of(w, traces).reshape(rho.shape[:-2])


def density_entropy_grad(rho: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """dS/drho = -(log rho + I)."""
    traces, w = density_log(flat(rho, 2), method)
    m = rho.shape[-1]
    identity = (1 + (traces / m).log()).to(rho.dtype)
    grad = -summed(w) - torch.diag_embed(identity[:, None].expand(-1, m))
    entropy = entropy_of(w, traces).reshape(rho.shape[:-2])
    return entropy, regular_or(traces, grad).reshape(rho.shape)
