"""Scores that count the directions which representations use.

Each is exp of an entropy of the family (13), or of its like, so that k orthogonal directions used
alike count as k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vne_kernels._core import checks, ops, spectra
from vne_kernels._core.dtypes import compute_dtype
from vne_kernels._core.rows import relative
from vne_kernels.functional.families import EPS, RENYI, Matrices, entropy, samples


def effective_rank(z: Tensor, *, normalize: bool = True, weights: Tensor | None = None) -> Tensor:
    """Effective rank exp(S) of representations: the number of directions in use.

    S is von Neumann's entropy of rho over its trace. Roy and Vetterli's effective rank takes the
    singular values in place of the eigenvalues: see `rankme`.

    Args:
        z: (..., n, d), n samples of d features; float16, bfloat16, float32 or float64.
        normalize, weights: as for `vne_kernels.renyi_entropy`.

    Returns:
        (...), from 1 to min(n, d); differentiable; otherwise as `vne_kernels.renyi_entropy`.

    Raises:
        ValueError, TypeError: as `vne_kernels.renyi_entropy`.

    Example:
        >>> effective_rank(torch.eye(4))
        tensor(4.)
    """
    return entropy(samples(z, normalize, weights, 1), 1, RENYI).exp()


def vendi_score(
    z_or_kernel: Tensor,
    q: float = 1,
    *,
    is_kernel: bool = False,
    normalize: bool = True,
    weights: Tensor | None = None,
) -> Tensor:
    """Vendi score of order q: exp of the Rényi entropy of the samples' similarities, (13).

    The effective number of distinct samples under a kernel k with k(x, x) = 1: of samples z, their
    cosine similarity; otherwise any, given as the matrix K of k(x_i, x_j).

    Args:
        z_or_kernel: (..., n, d), n samples of d features; with ``is_kernel`` (..., n, n), K, real
            or complex. Of a K that is not positive semidefinite, such as similarities of strings,
            eigenvalues below 0 count as 0, and the others are divided by their own sum.
        q: the order, at least 0, ``math.inf`` too. Small orders count rare samples, large ones
            common samples only.
        is_kernel: whether K is given. A square z could not be told from it.
        normalize: divide each row of z by its norm, or K_ij by sqrt(K_ii K_jj), which is no change
            where K_ii = 1.
        weights: the probability of each sample, as for `vne_kernels.renyi_entropy`.

    Returns:
        (...), from 1 to n; differentiable; otherwise as `vne_kernels.renyi_entropy`, of a K as
        `vne_kernels.renyi_entropy_from_density`.

    Raises:
        ValueError: with ``is_kernel``, z_or_kernel is not (..., n, n); otherwise as
            `vne_kernels.renyi_entropy`, naming q.
        TypeError: as `vne_kernels.renyi_entropy`.

    Source: Friedman and Dieng, "The Vendi Score", TMLR 2023; orders: Pasarkar and Dieng, "Cousins
    of the Vendi Score", AISTATS 2024. Where a row is zero the package ``vendi-score`` counts it in
    n, here it is absent.

    Example:
        >>> vendi_score(torch.eye(4), q=2)
        tensor(4.)
        >>> vendi_score(torch.ones(3, 3), is_kernel=True)  # three times the same
        tensor(1.)
    """
    q = checks.order("q", q)
    if not is_kernel:
        return entropy(samples(z_or_kernel, normalize, weights, q), q, RENYI).exp()
    checks.matrices("z_or_kernel", z_or_kernel)
    checks.normalize(normalize)
    scale = _scale_of_kernel(z_or_kernel, normalize, checks.weights(weights, z_or_kernel.real))
    return entropy(Matrices(z_or_kernel, scale), q, RENYI).exp()


def _scale_of_kernel(kernel: Tensor, normalize: bool, weights: Tensor | None) -> Tensor | None:
    """s (..., n) of diag(s) K diag(s), s_i^2 = p_i / K_ii or p_i.

    A sample of K_ii = 0 or p_i = 0 is absent, with s_i = 0.
    """
    p = relative(weights)
    if not normalize:
        return None if p is None else spectra.unless_zero(torch.sqrt, p)
    diagonal = kernel.diagonal(dim1=-2, dim2=-1).real.to(compute_dtype(kernel.dtype))
    if p is not None:  # whatever an absent sample holds
        diagonal = torch.where(p == 0, 0, diagonal)
    scale = spectra.unless_zero(torch.rsqrt, diagonal)
    return scale if p is None else scale * spectra.unless_zero(torch.sqrt, p)


def rankme(z: Tensor, *, eps: float = 1e-7, weights: Tensor | None = None) -> Tensor:
    """RankMe: exp of the entropy of the singular values, equation (14) of csrc/README.md.

    exp(-sum_k p_k log p_k), p_k = s_k / sum_j s_j + eps, with s_k the min(n, d) singular values of
    z, whose rows are not normalized. A guide to the quality of pretrained embeddings.

    Args:
        z: (..., n, d), n embeddings of d features; float16, bfloat16, float32 or float64.
        eps: added to the probabilities, as its paper does; not negative.
        weights: as for `vne_kernels.renyi_entropy`: s_k are then the singular values of the rows
            sqrt(w_i) z_i. A sample of weight 0 is absent, and does not count in n.

    Returns:
        (...), from 1 to min(n, d), but for eps; float64 for float64 input, otherwise float32.
        Computed in float64 from Z^T Z or Z Z^T, so that singular values below 1.5e-8 sqrt(m) times
        the largest, m = min(n, d), count as 0. Differentiable once; a singular value of 0 has the
        gradient 0. NaN for a sample that holds a NaN or an infinity.

    Raises:
        ValueError: z is not (..., n, d) with n, d >= 1; eps is negative or not finite; weights do
            not broadcast to (..., n).
        TypeError: z or weights is not a dense tensor of one of these dtypes; eps is not a number.

    Source: Garrido, Balestriero, Najman and LeCun, "RankMe: Assessing the Downstream Performance of
    Pretrained Self-Supervised Representations by Their Rank", ICML 2023.

    Example:
        >>> rankme(torch.eye(4))
        tensor(4.0000)
    """
    checks.samples("z", z)
    eps = checks.eps(eps)
    return ops.rankme(z, relative(checks.weights(weights, z)), eps, False, "auto", EPS)


def participation_ratio(
    z: Tensor, *, normalize: bool = True, weights: Tensor | None = None
) -> Tensor:
    """Participation ratio (sum_k l_k)^2 / sum_k l_k^2 of the eigenvalues of rho.

    exp of the Rényi entropy of order 2: the Vendi score of order 2. No eigenvalue is computed. In
    neuroscience it is that of the covariance: give centered z, and ``normalize=False``.

    Args:
        z: (..., n, d), as for `vne_kernels.renyi_entropy`.
        normalize, weights: as for `vne_kernels.renyi_entropy`.

    Returns:
        (...), from 1 to min(n, d); differentiable; otherwise as `vne_kernels.renyi_entropy`.

    Raises:
        ValueError, TypeError: as `vne_kernels.renyi_entropy`.

    Source: Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement", 2017.

    Example:
        >>> participation_ratio(torch.eye(4))
        tensor(4.)
    """
    return entropy(samples(z, normalize, weights, 2), 2, RENYI).exp()
