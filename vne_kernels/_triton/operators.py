"""The operators out of the stages: what serves CUDA tensors without nvcc.

`implementation` and `decomposition` bind them, as `torch.library.triton_op` does for an operator
that it defines itself: called, the kernels are launched; traced by torch.compile, the operator
dissolves into its launches, which Inductor sees, orders and allocates for; exported, it stays one
operator, so that the program does not depend on who serves it.

A function of the spectrum and its gradient are made here from its file in `functionals`. The other
operators have a function of their name below. Each takes the arguments of the operator's schema,
with one batch dimension and contiguous, and returns its outputs with one batch dimension, or None
where a gradient has no input. The native module has checked the arguments, in one place for all.
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

from vne_kernels._core.ops import FUNCTIONALS, OPERATORS
from vne_kernels._triton.doe_loss import cosine_gradients, cosine_terms
from vne_kernels._triton.eigh import eigh, spectral_function
from vne_kernels._triton.gradient import gradient
from vne_kernels._triton.launch import is_interpreted, launch_traced, launching_by
from vne_kernels._triton.normalize import matrix_of, normalize_rows
from vne_kernels._triton.stages import MatrixGradient, Rows, Samples, regular_or

# ---- what torch calls ----------------------------------------------------------------------------


def implementation(name: str) -> Callable[..., Any]:
    """The operator `name`, on tensors with data."""
    call_batch, check = operator(name), getattr(torch.ops.vne_kernels, f"check_{name}")

    def call(*args: Any) -> Any:
        check(*args)
        # Triton launches on the current device.
        with nullcontext() if is_interpreted else torch.cuda.device_of(args[0]):
            return call_batch(*args)

    return call


def decomposition(name: str) -> Callable[..., Any]:
    """The operator `name` as its launches, on the tensors of a trace."""
    call_batch = operator(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with launching_by(launch_traced):
            return call_batch(*args, **kwargs)

    return call


def operator(name: str) -> Callable[..., Any]:
    """The operator `name` on tensors in any layout, with any batch dimensions."""
    base = name.removesuffix("_grad")
    if base in FUNCTIONALS:
        function: Callable[..., Any] = partial(functional, base, name != base)
    else:
        function = globals()[name]
    sample = OPERATORS[name].sample

    def call(*args: Any) -> Any:
        batch = args[sample].shape[:-2]
        count = math.prod(batch)
        outputs = function(
            *(
                arg.reshape(count, *arg.shape[len(batch) :]).contiguous()
                if isinstance(arg, Tensor)
                else arg
                for arg in args
            )
        )
        if isinstance(outputs, Tensor):
            return outputs.reshape(batch + outputs.shape[1:])
        return tuple(
            outputs[0].new_empty(0) if out is None else out.reshape(batch + out.shape[1:])
            for out in outputs
        )

    return call


# ---- functions of the spectrum -------------------------------------------------------------------


def rows_of(
    z: Tensor, weights: Tensor | None, normalize: bool, eps: float, d_side: bool = False
) -> Rows:
    """X^ on the smaller side, equation (2), or on the d side."""
    gram_side = not d_side and z.shape[1] <= z.shape[2]
    return normalize_rows(Samples(z, weights, normalize, least_norm(eps), gram_side))


def least_norm(eps: float) -> float:
    """Below the smallest normal number 1 / eps is not finite."""
    return max(eps, sys.float_info.min)


def functional(name: str, with_grad: bool, z: Tensor, weights: Tensor | None, *options: Any) -> Any:
    """The value and, with_grad, the gradients of the function in the file of this name."""
    *parameters, normalize, method, eps = options
    rows = rows_of(z, weights, normalize, eps)
    value, of_x = function_of(name)(
        matrix_of(rows), rows.traces, method, *parameters, with_grad=with_grad
    )
    return (value, *gradient(rows, of_x)) if with_grad else value


def function_of(name: str) -> Callable[..., tuple[Tensor, Any]]:
    function: Callable[..., tuple[Tensor, Any]]
    function = import_module(f"vne_kernels._triton.functionals.{name}").functional
    return function


# ---- spectrum ------------------------------------------------------------------------------------


def spectrum_eigh(
    z: Tensor, weights: Tensor | None, normalize: bool, eps: float
) -> tuple[Tensor, Tensor]:
    rows = rows_of(z, weights, normalize, eps)
    values, vectors = eigh(matrix_of(rows))
    values = (rows.traces[:, None] * values.flip(-1).clamp_min(0)).to(values.dtype)
    vectors = vectors.flip(-1).contiguous()  # torch's lie column by column
    return regular_or(rows.traces, values), regular_or(rows.traces, vectors)


def spectrum(z: Tensor, weights: Tensor | None, normalize: bool, eps: float) -> Tensor:
    return spectrum_eigh(z, weights, normalize, eps)[0]


def spectrum_backward(
    grad: Tensor, z: Tensor, eigenvectors: Tensor, *options: Any
) -> tuple[Tensor, Tensor | None]:
    """d lambda_k = v_k^T dA v_k: W = V diag(grad) V^T."""
    w = spectral_function(eigenvectors, grad)
    return gradient(rows_of(z, *options), MatrixGradient(w, 2.0))


# ---- doe_loss ------------------------------------------------------------------------------------


def doe_loss_grad(
    z1: Tensor, z2: Tensor, method: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    entropy, entropy_grad, _ = functional("vn_entropy", True, z1, None, True, method, eps)
    mean, row_stats = cosine(z1, z2, eps)
    return entropy, mean, entropy_grad, row_stats


def doe_loss(z1: Tensor, z2: Tensor, method: str, eps: float) -> tuple[Tensor, Tensor]:
    entropy = functional("vn_entropy", False, z1, None, True, method, eps)
    return entropy, cosine(z1, z2, eps)[0]


def cosine(z1: Tensor, z2: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return cosine_terms(z1, z2, least_norm(eps))


doe_loss_backward = cosine_gradients


# ---- density -------------------------------------------------------------------------------------
# Equation (12): parts of a batch have the d side in common, whatever their n.


def density(z: Tensor, weights: Tensor | None, normalize: bool, eps: float) -> Tensor:
    rows = rows_of(z, weights, normalize, eps, d_side=True)
    a = matrix_of(rows)
    return regular_or(rows.traces, (rows.traces[:, None, None] * a).to(a.dtype))


def density_backward(
    grad_rho: Tensor, z: Tensor, weights: Tensor | None, normalize: bool, eps: float
) -> tuple[Tensor, Tensor | None]:
    """d<G, rho> = 2 <diag(p) U G, dU>: W is the symmetric part of G.

    A G that is not finite comes from the part of another process that is not.
    """
    rows = rows_of(z, weights, normalize, eps, d_side=True)
    finite = grad_rho.isfinite().flatten(1).all(-1)
    rows = replace(rows, traces=torch.where(finite, rows.traces, torch.nan))
    return gradient(rows, MatrixGradient((grad_rho + grad_rho.mT) / 2, 2.0))


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
    return function_of("vn_entropy")(*unit_density(rho), method, with_grad=False)[0]


def density_entropy_grad(rho: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """dS/drho = factor / 2 (W + identity I) = -(log rho + I)."""
    a, traces = unit_density(rho)
    entropy, of_x = function_of("vn_entropy")(a, traces, method, with_grad=True)
    identity = torch.diag_embed(of_x.identity.to(a.dtype)[:, None].expand(-1, a.shape[-1]))
    return entropy, regular_or(traces, of_x.factor / 2 * (of_x.w + identity))
