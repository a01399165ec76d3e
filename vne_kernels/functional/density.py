"""Von Neumann entropy of matrices: for those who have a density matrix, not its samples.

The entropies of other orders stand in `families`, those of composite systems in `quantum`.
"""

from __future__ import annotations

from torch import Tensor

from vne_kernels._core import checks, matrices, spectra


def vn_entropy_from_density(
    rho: Tensor,
    *,
    method: str = "auto",
    normalize_trace: bool = False,
    check: bool = False,
    base: float | None = None,
) -> Tensor:
    """Von Neumann entropy -tr(rho log rho) of density matrices: equation (15).

    Args:
        rho: (..., d, d), symmetric or Hermitian; float16, bfloat16, float32, float64, complex64 or
            complex128. Leading dimensions are a batch. Its Hermitian part counts. Eigenvalues below
            0 count as 0, however large: S is the sum of -l log l over those above 0.
        method: "eigh", by the eigenvalues in float64, whatever the dtype; "poles", by the logarithm
            as a sum of inverses where the whole batch is found positive definite, which the host
            waits for, and by the eigenvalues elsewhere; "auto", as "eigh". Of a complex rho "auto"
            and "eigh" alone.
        normalize_trace: S of the positive part of rho over its own trace, the sum of the
            eigenvalues above 0. Otherwise of rho as given: -sum(l log l) whatever its trace, which
            is 1 of a density matrix.
        check: refuse what is no density matrix. It looks at the numbers, which the host waits for.
        base: the base of the logarithm, positive and not 1: 2 for bits. Default: e, nats.

    Returns:
        (...), float64 for float64 and complex128, otherwise float32. NaN for a matrix with a NaN or
        an infinity, or a negative trace; the other matrices of the batch are not touched by it.
        Differentiable once, in reverse and forward mode: the gradient -(log rho + I) is Hermitian,
        finite where rho lacks rank, and 0 in the directions of eigenvalues below 0.

    Raises:
        ValueError: rho is not (..., d, d) with d >= 1; method is unknown, or "poles" with a complex
            rho; base is not positive and finite, or 1; with ``check``, rho is not finite, not
            Hermitian, has an eigenvalue below 0 by more than eps^(3/4) of its largest entry, or
            (unless ``normalize_trace``) not the trace 1 within eps^(1/2), eps that of its dtype.
        TypeError: rho is not a dense tensor of one of these dtypes; base is not a number.
        NotImplementedError: a second derivative is asked for, in eager mode.

    Source: von Neumann, "Mathematische Grundlagen der Quantenmechanik", 1932.

    Example:
        >>> vn_entropy_from_density(torch.eye(4) / 4)  # log 4
        tensor(1.3863)
        >>> vn_entropy_from_density(torch.eye(4) / 4, base=2)
        tensor(2.)
    """
    checks.density("rho", rho, check, unit_trace=not normalize_trace)
    checks.matrix_method(method, rho)
    log_base = checks.base(base)
    return spectra.in_base(matrices.vn_entropy(rho, method, normalize_trace), log_base)
