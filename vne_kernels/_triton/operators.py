"""The operators out of the stages: what serves CUDA tensors without nvcc.

`implementation` and `decomposition` bind them, as `torch.library.triton_op` does for an operator
that it defines itself: called, the kernels are launched; traced by torch.compile, the operator
dissolves into its launches, which Inductor sees, orders and allocates for; exported, it stays one
operator, so that the program does not depend on who serves it.

A function of the spectrum and its gradient are made here from its file in `functionals`. The other
operators have a function of their name. They get tensors as torch hands them over, in any layout;
the native module has checked the arguments, so that no check exists twice.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vne_kernels._core.ops import FUNCTIONALS
from vne_kernels._triton import doe_loss as doe
from vne_kernels._triton.eigh import eigh, spectral_function
from vne_kernels._triton.gradient import gradient
from vne_kernels._triton.launch import is_interpreted, tracing
from vne_kernels._triton.normalize import matrix_of, normalize_rows
from vne_kernels._triton.stages import MatrixGradient, Rows, Samples, regular_or


def operator(name: str) -> Callable[..., Any]:
    """The function of this file for an operator, or that of a function of the spectrum."""
    base = name.removesuffix("_grad")
    if base in FUNCTIONALS:
        return partial(functional_grad if name != base else functional_value, base)
    function: Callable[..., Any] = globals()[name]
    return function


def implementation(name: str) -> Callable[..., Any]:
    """The operator `name`, on tensors with data."""
    function, check = operator(name), getattr(torch.ops.vne_kernels, f"check_{name}")

    def call(*args: Any) -> Any:
        check(*args)
        # Triton launches on the current device.
        with nullcontext() if is_interpreted else torch.cuda.device_of(args[0]):
            return function(*args)

    return call


def decomposition(name: str) -> Callable[..., Any]:
    """The operator `name` as its launches, on the tensors of a trace."""
    function = operator(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with tracing():
            return function(*args, **kwargs)

    return call


# ---- arguments and results -----------------------------------------------------------------------


def flat(tensor: Tensor, keep: int) -> Tensor:
    """[batch, ...] with the last `keep` dimensions kept, contiguous."""
    batch, rest = tensor.shape[: tensor.dim() - keep], tensor.shape[tensor.dim() - keep :]
    return tensor.reshape(math.prod(batch), *rest).contiguous()


def rows_of(z: Tensor, weights: Tensor | None, normalize: bool, eps: float) -> Rows:
    """X^ on the smaller side, equation (2)."""
    return normalize_rows(samples_of(z, weights, normalize, eps))


def samples_of(z: Tensor, weights: Tensor | None, normalize: bool, eps: float) -> Samples:
    return Samples(
        flat(z, 2),
        None if weights is None else flat(weights, 1),
        normalize,
        max(eps, sys.float_info.min),  # below it 1 / eps is not finite
        z.shape[-2] <= z.shape[-1],
    )


def gradients(
    z: Tensor, weights: Tensor | None, rows: Rows, of_x: MatrixGradient
) -> tuple[Tensor, Tensor]:
    """`gradient`, of the shapes of z and weights."""
    grad_z, grad_weights = gradient(rows, of_x)
    if weights is None or grad_weights is None:
        return grad_z.reshape(z.shape), grad_z.new_empty(0)
    return grad_z.reshape(z.shape), grad_weights.reshape(weights.shape)


# ---- functions of the spectrum -------------------------------------------------------------------


def functional(name: str, *args: Any, with_grad: bool) -> tuple[Tensor, Any]:
    """What `functionals` describes, by the file of this name."""
    module = import_module(f"vne_kernels._triton.functionals.{name}")
    value, of_x = module.functional(*args, with_grad=with_grad)
    return value, of_x


def functional_value(name: str, z: Tensor, weights: Tensor | None, *options: Any) -> Tensor:
    *parameters, normalize, method, eps = options
    rows = rows_of(z, weights, normalize, eps)
    value, _ = functional(name, matrix_of(rows), rows.traces, method, *parameters, with_grad=False)
    return value.reshape(z.shape[:-2])


def functional_grad(
    name: str, z: Tensor, weights: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *parameters, normalize, method, eps = options
    rows = rows_of(z, weights, normalize, eps)
    value, of_x = functional(
        name, matrix_of(rows), rows.traces, method, *parameters, with_grad=True
    )
    return value.reshape(z.shape[:-2]), *gradients(z, weights, rows, of_x)


# ---- spectrum ------------------------------------------------------------------------------------


def spectrum_eigh(
    z: Tensor, weights: Tensor | None, normalize: bool, eps: float
) -> tuple[Tensor, Tensor]:
    rows = rows_of(z, weights, normalize, eps)
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
    """d lambda_k = v_k^T dA v_k: W = V diag(grad) V^T."""
    w = spectral_function(flat(eigenvectors, 2), flat(grad, 1))
    rows = rows_of(z, weights, normalize, eps)
    return gradients(z, weights, rows, MatrixGradient(w, 2.0))


# ---- doe_loss ------------------------------------------------------------------------------------


def doe_loss_grad(
    z1: Tensor, z2: Tensor, method: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    entropy, grad_entropy, _ = functional_grad("vn_entropy", z1, None, True, method, eps)
    mean, row_stats = cosine(z1, z2, eps)
    return entropy, mean, grad_entropy, row_stats


def doe_loss(z1: Tensor, z2: Tensor, method: str, eps: float) -> tuple[Tensor, Tensor]:
    entropy = functional_value("vn_entropy", z1, None, True, method, eps)
    return entropy, cosine(z1, z2, eps)[0]


def cosine(z1: Tensor, z2: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean, row_stats = doe.cosine_terms(flat(z1, 2), flat(z2, 2), max(eps, sys.float_info.min))
    batch = z1.shape[:-2]
    return mean.reshape(batch), row_stats.reshape(*batch, *row_stats.shape[1:])


def doe_loss_backward(
    grad_entropy: Tensor, grad_cosine: Tensor, z1: Tensor, z2: Tensor, *saved: Tensor
) -> tuple[Tensor, Tensor]:
    """saved: entropy_grad and row_stats of `doe_loss_grad`."""
    grads = flat(grad_entropy, 0), flat(grad_cosine, 0)
    grad_z1, grad_z2 = doe.cosine_gradients(*grads, *(flat(x, 2) for x in (z1, z2, *saved)))
    return grad_z1.reshape(z1.shape), grad_z2.reshape(z2.shape)


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
    """d<G, rho> = 2 <diag(p) U G, dU>: W is the symmetric part of G.

    A G that is not finite comes from the part of another process that is not.
    """
    rows = density_rows(z, weights, normalize, eps)
    g = flat(grad_rho, 2)
    finite = g.isfinite().flatten(1).all(-1)
    rows = replace(rows, traces=torch.where(finite, rows.traces, torch.nan))
    return gradients(z, weights, rows, MatrixGradient((g + g.mT) / 2, 2.0))


def unit_density(rho: Tensor) -> tuple[Tensor, Tensor]:
    """A^ and tau [batch] of the symmetric part of matrices rho [batch, m, m]."""
    wide = rho.double()
    finite = wide.isfinite().flatten(1).all(-1)
    trace = wide.diagonal(dim1=-2, dim2=-1).sum(-1)
    traces = torch.where(finite & (trace >= 0), trace, torch.nan)
    a = (wide + wide.mT) / (2 * traces)[:, None, None]
    regular = (traces > 0) & traces.isfinite()
    return torch.where(regular[:, None, None], a, 0).to(rho.dtype), traces


def density_entropy(rho: Tensor, method: str) -> Tensor:
    value, _ = functional("vn_entropy", *unit_density(flat(rho, 2)), method, with_grad=False)
    return value.reshape(rho.shape[:-2])


def density_entropy_grad(rho: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """dS/drho = factor / 2 (W + identity I) = -(log rho + I)."""
    a, traces = unit_density(flat(rho, 2))
    value, of_x = functional("vn_entropy", a, traces, method, with_grad=True)
    identity = torch.diag_embed(of_x.identity.to(a.dtype)[:, None].expand(-1, a.shape[-1]))
    grad = regular_or(traces, of_x.factor / 2 * (of_x.w + identity))
    return value.reshape(rho.shape[:-2]), grad.reshape(rho.shape)
