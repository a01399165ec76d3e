"""S = -tr(A log A), from W = log A^ + log(m) I: equations (10), and (3) of its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vne_kernels._triton.blocked import log_by_blocked_poles
from vne_kernels._triton.eigh import log_by_eigh
from vne_kernels._triton.launch import block_of, ceil_div, launch, new
from vne_kernels._triton.normalize import is_regular
from vne_kernels._triton.poles import LARGEST, in_waves, log_by_poles
from vne_kernels._triton.policy import method_for
from vne_kernels._triton.stages import MatrixFunction, MatrixGradient


@triton.jit
def write_entropy(
    inner,  # [batch, parts]: their sum is <A^, sum of terms>
    traces,  # [batch]
    entropy,  # [batch] <- S
    identity,  # [batch] <- 1 + log(tau / m), what W lacks of log A + I; or None
    parts,
    m,
    CONSTANT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # log m - <A^, W>, where <A^, I> is one
    sample = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(inner + sample * parts + at, mask=at < parts, other=0.0)
    one = tl.full([1], 1.0, tl.float64)
    log_m = tl.log(one * m)
    value = -tl.sum(sums, axis=0)
    if CONSTANT is None:
        value += log_m
    else:
        value -= tl.full([1], CONSTANT, tl.float64)
    value = tl.minimum(tl.maximum(value, 0.0), log_m)

    # of A = tau A^; a trace that is one but for rounding is one
    trace = one * tl.load(traces + sample)
    tolerance = 9.5367431640625e-07
    if entropy.dtype.element_ty == tl.float64:
        tolerance = 1.7763568394002505e-15
    is_one = tl.abs(trace - 1) <= tolerance
    result = tl.where(is_one, value, trace * (value - tl.log(trace)))
    result = tl.where(is_regular(trace), result, tl.where(trace == 0, 0.0, float("nan")))
    tl.store(entropy + sample + tl.arange(0, 1), result.to(entropy.dtype.element_ty))
    if identity is not None:
        tl.store(identity + sample + tl.arange(0, 1), 1 + tl.log(trace / m))


@triton.jit
def sum_terms(
    terms,  # [batch, COUNT, m, m]
    w,  # [batch, m, m] <- sum of terms + (CONSTANT + log m) I
    m,
    CONSTANT: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    programs = tl.cdiv(m * m, BLOCK)  # of a sample
    sample = (tl.program_id(0) // programs).to(tl.int64)
    at = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    inside = at < m * m
    total = tl.zeros([BLOCK], w.dtype.element_ty)
    for k in range(COUNT):
        total += tl.load(terms + (sample * COUNT + k) * m * m + at, mask=inside, other=0.0)
    identity = tl.full([1], CONSTANT, tl.float64)
    identity += tl.log(tl.full([1], 1.0, tl.float64) * m)
    total += tl.where(at // m == at % m, identity.to(w.dtype.element_ty), 0.0)
    tl.store(w + sample * m * m + at, total, mask=inside)


def logarithm(a: Tensor, method: str) -> MatrixFunction:
    """log A^ + log(m) I by the method."""
    m = a.shape[-1]
    if method_for(method, m, a.dtype) == "eigh":
        return log_by_eigh(a)
    return in_waves(log_by_poles if m <= LARGEST else log_by_blocked_poles, a)


def sum_of_terms(w: MatrixFunction) -> Tensor:
    """W [batch, m, m]."""
    batch, count, m, _ = w.terms.shape
    if w.constant is None:
        return w.terms[:, 0]
    result = new(w.terms, batch, m, m, dtype=w.terms.dtype)
    block = block_of(m * m, 512, 512)
    constants = {"CONSTANT": w.constant, "COUNT": count, "BLOCK": block}
    launch(sum_terms, batch * ceil_div(m * m, block), (w.terms, result), (m,), **constants)
    return result


def functional(
    a: Tensor, traces: Tensor, method: str, *, with_grad: bool
) -> tuple[Tensor, MatrixGradient | None]:
    w = logarithm(a, method)
    batch, parts = w.inner.shape
    entropy = new(a, batch, dtype=a.dtype)
    identity = new(a, batch, dtype=torch.float64) if with_grad else None
    constants = {"CONSTANT": w.constant, "BLOCK": 128}
    tensors = w.inner, traces, entropy, identity
    launch(write_entropy, batch, tensors, (parts, a.shape[-1]), **constants)
    if not with_grad:
        return entropy, None
    return entropy, MatrixGradient(sum_of_terms(w), factor=-2.0, identity=identity)
