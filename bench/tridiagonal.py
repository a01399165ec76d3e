"""Would a tridiagonalisation beat the poles on a CPU?

    python bench/tridiagonal.py [--threads 1,2]

A = Q T Q^T with T tridiagonal, log A = Q log(T) Q^T: the poles of T cost m² each, so that 16
sweeps of m³ become one reduction of 4/3 m³ and two multiplications by Q of 2 m³ each. Timed here
are LAPACK's reduction (sytrd) and multiplications (ormqr) alone, log T for nothing, against the
whole of `vn_entropy(method="poles")` on z (m, m), normalisation and Gram matrix included: a lower
bound of the one against the other's all. Above 1 the idea could win.

By a model, 16 threads: half of the reduction's work is matrix-vector products one after another,
which a second thread hardly helps (the table shows by how much); the poles are shared out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import arguments as options
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


def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    contenders = [harness.Contender(name, call, lambda: None) for name, call in calls.items()]
    harness.time_interleaved(contenders, torch.device("cpu"), 3.0)
    return {c.name: c.quantiles_ms()[1] for c in contenders}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=options.positives, default=(1, 2))
    print(f"{'threads':>7}{'m':>6}{'sytrd ms':>10}{'2 ormqr ms':>12}{'poles ms':>10}{'ratio':>8}")
    for threads in parser.parse_args().threads:
        torch.set_num_threads(threads)
        for m in SIZES:
            z = torch.randn(m, m, generator=torch.Generator().manual_seed(m))
            u = torch.nn.functional.normalize(z, dim=1)
            a = np.asfortranarray((u @ u.T / m).numpy() + np.eye(m, dtype=np.float32) / m)
            f = np.asfortranarray(a.copy())
            with threadpoolctl.threadpool_limits(threads, "blas"):
                check(a)
                reflectors, _, _, tau = reduce(a)
                torch.set_num_threads(threads)  # the limit above has set torch's as well
                times = milliseconds(
                    {
                        "sytrd": lambda a=a: reduce(a),
                        "ormqr": lambda r=reflectors, t=tau, f=f: back(r, t, f),
                        "poles": lambda z=z: vne_kernels.vn_entropy(z, method="poles"),
                    }
                )
            ratio = times["poles"] / math.fsum((times["sytrd"], times["ormqr"]))
            print(
                f"{threads:>7}{m:>6}{times['sytrd']:>10.3f}{times['ormqr']:>12.3f}"
                f"{times['poles']:>10.3f}{ratio:>8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
