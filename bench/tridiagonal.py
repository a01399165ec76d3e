"""Would a tridiagonalisation beat the poles on a CPU?

    python bench/tridiagonal.py

A = Q T Q^T with T tridiagonal, log A = Q log(T) Q^T: the poles of T cost m² each, so that 16
sweeps of m³ become one reduction of 4/3 m³ and two multiplications by Q of 2 m³ each. Timed here
are LAPACK's reduction (sytrd) and multiplications (ormqr) alone on one thread, log T for nothing,
against the whole of `vn_entropy(method="poles")` on z (m, m), normalisation and Gram matrix
included: a lower bound of the one against the other's all. Ratios above 1: the idea could win.

On one thread both are measured; on two the poles are, and the multiplications taken for half their
time; 16 threads are a model: poles and multiplications in a sixteenth of theirs. The reduction is
a chain of matrix-vector products on a matrix that fits in a core's cache: more threads do not
shorten it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import harness
import numpy as np
import scipy.linalg
import threadpoolctl
import torch

import vne_kernels

SIZES = (32, 64, 128, 192, 256, 384, 512)
Array = np.ndarray


def reduce(a: Array) -> tuple[Array, Array, Array, Array]:
    """Reflectors, the diagonal of T, the one beside it, and the reflectors' scales."""
    reflectors, diagonal, beside, tau, info = scipy.linalg.lapack.ssytrd(a, lower=1)
    assert info == 0
    return reflectors, diagonal, beside, tau


def back(reflectors: Array, tau: Array, f: Array) -> Array:
    """Q f Q^T for symmetric f; the first row and column of Q are those of the identity."""
    v = reflectors[1:, :-1]
    length = 64 * len(f)
    for _ in range(2):  # (Q (Q f)^T) = Q f^T Q^T
        product, _, info = scipy.linalg.lapack.sormqr("L", "N", v, tau, f[1:], length)
        assert info == 0
        f = np.concatenate([f[:1], product]).T
    return f


def check(a: Array) -> None:
    """The route gives log A, if T's logarithm is at hand."""
    reflectors, diagonal, beside, tau = reduce(a)
    values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, beside)
    log_t = ((vectors * np.log(values)) @ vectors.T).astype(np.float32)
    values, vectors = np.linalg.eigh(a.astype(np.float64))
    log_a = (vectors * np.log(values)) @ vectors.T
    error = np.linalg.norm(back(reflectors, tau, log_t) - log_a) / np.linalg.norm(log_a)
    if error > 1e-2:
        raise AssertionError(f"m = {len(a)}: log A is off by {error:.1e}")


def milliseconds(call: Callable[[], object], threads: int) -> float:
    torch.set_num_threads(threads)
    contender = harness.Contender("", call, lambda: None)
    harness.time_interleaved([contender], torch.device("cpu"), 1.0)
    return contender.quantiles_ms()[1]


def main() -> None:
    print("    m  sytrd  ormqr |  poles, 1 thread     2 | ratio, 1 thread     2    16 (model)")
    with threadpoolctl.threadpool_limits(1, "blas"):
        for m in SIZES:
            z = torch.randn(m, m, generator=torch.Generator().manual_seed(m))
            u = torch.nn.functional.normalize(z, dim=1)
            a = np.asfortranarray((u @ u.T / m).numpy() + np.eye(m, dtype=np.float32) / m)
            check(a)
            reflectors, _, _, tau = reduce(a)
            first = milliseconds(partial(reduce, a), 1)
            second = milliseconds(partial(back, reflectors, tau, a), 1)
            poles = [
                milliseconds(partial(vne_kernels.vn_entropy, z, method="poles"), threads)
                for threads in (1, 2)
            ]
            times = (first + second, first + second / 2, first + second / 16)
            ratios = [p / t for p, t in zip((*poles, poles[0] / 16), times, strict=True)]
            print(
                f"{m:>5}{first:>7.3f}{second:>7.3f} |{poles[0]:>17.3f}{poles[1]:>6.3f}"
                f" |{ratios[0]:>16.2f}{ratios[1]:>6.2f}{ratios[2]:>6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
