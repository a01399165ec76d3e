"""The von Neumann entropy in plain PyTorch: what people write today, and what is correct.

Imports torch alone, so that it can be read, copied and run anywhere. No other
Python file has the formula: the tests take their oracle from here, the benchmarks their baselines.

* The baselines ``algorithm1``, ``official_svd`` and ``gram`` are as their sources have them,
  faults included: they are NaN or raise where their sources do.
* ``oracle``, ``oracle_grad``, ``oracle_weights_grad`` and ``oracle_doe`` are in float64 and right
  on every input; ``eigh_grad`` is the same closed form in the precision of its input.

Equation numbers are those of csrc/README.md:

(1) u_i = z_i / max(|z_i|, eps), rho = U^T diag(p) U, S = -sum_k l_k log l_k, with 0 log 0 = 0
(2) rho (d x d) and A = diag(sqrt p) U U^T diag(sqrt p) (n x n) share their non-zero eigenvalues
(3) dS/dU = -2 diag(p) U (log rho + I) = -2 diag(sqrt p) (log A + I) diag(sqrt p) U
(4) dS/dz_i = (g_i - (g_i . u_i) u_i) / |z_i|, where g = dS/dU
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "algorithm1",
    "algorithm1_loss",
    "eigh_grad",
    "gram",
    "official_svd",
    "oracle",
    "oracle_cosine",
    "oracle_doe",
    "oracle_grad",
    "oracle_weights_grad",
]


# ---- what people write today ---------------------------------------------------------------------


def algorithm1(z: Tensor) -> Tensor:
    """Entropy of one sample as the paper's Algorithm 1 computes it (its ``Loss_1``, negated).

    Source: "Formulating A Non-contrastive Loss As A Difference Of Entropies Using A Von Neumann
    Entropy Bound", Algorithm 1. ``symeig`` has left torch; ``eigvalsh`` replaces it. Always works
    on the d x d side. A computed eigenvalue that is not positive makes the result NaN.

    Args:
        z: (n, d), float32 or float64.

    Returns:
        (), S in nats, in the dtype of z.
    """
    n = z.shape[0]
    u = F.normalize(z, dim=1)
    eig_val = torch.linalg.eigvalsh(torch.matmul(u.T, u) / n)[-n:]
    loss_1: Tensor = (eig_val * torch.log(eig_val)).sum()
    return -loss_1


def algorithm1_loss(z1: Tensor, z2: Tensor, beta: float) -> Tensor:
    """The whole loss of the paper's Algorithm 1: -S(U_1) - beta * mean cosine similarity.

    Args:
        z1, z2: (n, d), float32 or float64, the projections of the two views.
        beta: coefficient of the cosine term.

    Returns:
        (), the loss, in the dtype of z1.
    """
    u1, u2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    loss_2 = -F.cosine_similarity(u1, u2).mean()
    return -algorithm1(z1) + beta * loss_2


def official_svd(z: Tensor) -> Tensor:
    """Entropy of one sample by singular values, as ``get_vne`` of the VNE paper's code does it.

    Source: https://github.com/jaeill/CVPR23-VNE, ``vne/__init__.py``, the second form, which that
    repository calls equivalent and faster when n < d. Raises on NaN; half precision is refused.

    Args:
        z: (n, d), float32 or float64.

    Returns:
        (), S in nats, in the dtype of z.
    """
    u = F.normalize(z, dim=1)
    sing_val = torch.svd(u / z.shape[0] ** 0.5)[1]
    eig_val = sing_val**2
    return -(eig_val * torch.log(eig_val)).nansum()


def gram(z: Tensor, *, eigvalsh: Callable[[Tensor], Tensor] = torch.linalg.eigvalsh) -> Tensor:
    """Entropy by ``eigvalsh`` of the smaller of Gram matrix and covariance: the fair baseline.

    What a careful user writes in five lines: equation (2), batched. The ``nansum`` hides
    eigenvalues that round below zero (and a NaN in the input); their gradient stays NaN.

    Args:
        z: (..., n, d), float32 or float64.
        eigvalsh: what gives the eigenvalues, (..., m, m) -> (..., m); another one takes the same
            place in the benchmarks.

    Returns:
        (...), S in nats, in the dtype of z.
    """
    n, d = z.shape[-2:]
    u = F.normalize(z, dim=-1)
    a = (u @ u.mT if n <= d else u.mT @ u) / n
    eig_val = eigvalsh(a)
    entropy: Tensor = -(eig_val * torch.log(eig_val)).nansum(dim=-1)
    return entropy


# ---- what is correct -----------------------------------------------------------------------------


def oracle(
    z: Tensor,
    *,
    normalize: bool = True,
    weights: Tensor | None = None,
    eps: float = 1e-12,
    relative: bool | None = None,
) -> Tensor:
    """S in float64 by equations (1) and (2), with 0 log 0 = 0.

    A sample of the batch that holds a NaN or an infinity, or has a negative weight, is NaN; the
    other samples are not touched by it. Differentiable where A has full rank; see `oracle_grad`.

    Args:
        z: (..., n, d), any floating dtype.
        normalize: divide the rows by their norms; otherwise rho = Z^T diag(p) Z.
        weights: w, broadcastable to (..., n); 1/n each if None. A row of weight 0 is absent,
            whatever it holds.
        eps: lower bound of a row's norm, as in ``torch.nn.functional.normalize``.
        relative: p is w over its sum; otherwise p is w, as the operators have it. Default: as
            ``normalize``.

    Returns:
        (...), S in nats, float64.
    """
    sample = _Sample.of(z.double(), normalize, weights, eps, relative)
    eig_val = torch.linalg.eigvalsh(sample.a).clamp_min(0.0)
    return torch.where(sample.valid, torch.special.entr(eig_val).sum(dim=-1), torch.nan)


def oracle_grad(z: Tensor, **options: Any) -> Tensor:
    """dS/dz in float64: `eigh_grad` of z in float64.

    Args: as `oracle`.

    Returns:
        (..., n, d), float64: of each sample's own S, as for a grad_output of ones.
    """
    return eigh_grad(z.double(), **options)


def eigh_grad(z: Tensor, **options: Any) -> Tensor:
    """dS/dz in the precision of z, in closed form by equations (3) and (4) on the smaller side.

    It has the accuracy of a careful backward of ``eigh``. Half precisions are computed in float32.
    Finite on every finite input, whatever the rank. A row of norm <= eps is divided by a constant,
    so (4) does not project it; a zero row, and a row of weight 0, has the gradient 0. A sample of
    the batch that holds a NaN or an infinity, or has a negative weight, is NaN throughout.

    Args: as `oracle`.

    Returns:
        (..., n, d), in the dtype of z.
    """
    compute = z.double() if z.dtype == torch.float64 else z.float()
    return _gradients(compute, **options)[0].to(z.dtype)


def oracle_weights_grad(z: Tensor, **options: Any) -> Tensor:
    """dS/dw in float64, from dS/dp_i = -u_i^T (log rho + I) u_i; 0 for a sample of weight 0.

    Args: as `oracle`.

    Returns:
        (..., n), float64; a caller whose weights were broadcast sums over the broadcast axes.
    """
    return _gradients(z.double(), **options)[1]


def oracle_cosine(z1: Tensor, z2: Tensor, *, eps: float = 1e-12) -> Tensor:
    """Mean over i of cos(z1_i, z2_i) in float64, the rows normalized as in equation (1).

    Args:
        z1, z2: (..., n, d), any floating dtype.

    Returns:
        (...), float64, differentiable.
    """
    u1, _ = _rows(z1.double(), True, eps)
    u2, _ = _rows(z2.double(), True, eps)
    return (u1 * u2).sum(dim=-1).mean(dim=-1)


def oracle_doe(z1: Tensor, z2: Tensor, beta: float, *, eps: float = 1e-12) -> Tensor:
    """Difference of entropies, -S(z1) - beta * mean_i cos(z1_i, z2_i), in float64.

    Args:
        z1, z2: (..., n, d), any floating dtype.
        beta: coefficient of the cosine term.

    Returns:
        (...), float64.
    """
    return -oracle(z1, eps=eps) - beta * oracle_cosine(z1, z2, eps=eps)


# ---- the steps, in the precision of their arguments ----------------------------------------------


def _rows(z: Tensor, normalize: bool, eps: float) -> tuple[Tensor, Tensor]:
    """U of equation (1), (..., n, d), and the norms of the rows of z, (..., n, 1)."""
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return (z / norm.clamp_min(eps) if normalize else z), norm


class _Sample(NamedTuple):
    """What value and gradients are computed from."""

    p: Tensor  # (..., n)
    total: Tensor  # (..., 1), that the weights are divided by
    u: Tensor  # (..., n, d), 0 in the rows of weight 0
    norm: Tensor  # (..., n, 1), of the rows of z
    a: Tensor  # A of equation (2), (..., n, n), if n <= d, otherwise rho, (..., d, d)
    valid: Tensor  # (...), finite and without a negative weight; otherwise a is the identity
    relative: bool  # whether p is the weights over their sum

    @classmethod
    def of(
        cls, z: Tensor, normalize: bool, weights: Tensor | None, eps: float, relative: bool | None
    ) -> _Sample:
        n, d = z.shape[-2:]
        p = (z.new_tensor(1.0 / n) if weights is None else weights.to(z)).expand(z.shape[:-1])
        total = p.sum(dim=-1, keepdim=True)
        relative = normalize if relative is None else relative
        total = torch.where((total > 0) & relative, total, 1.0)
        p = p / total
        u, norm = _rows(torch.where((p == 0).unsqueeze(-1), 0.0, z), normalize, eps)
        if n <= d:
            v = p.sqrt().unsqueeze(-1) * u
            a = v @ v.mT
        else:
            a = u.mT @ (p.unsqueeze(-1) * u)
        valid = a.isfinite().all(dim=-1).all(dim=-1) & (p >= 0).all(dim=-1)
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        # LAPACK raises on a NaN.
        a = torch.where(valid[..., None, None], a, eye)
        return cls(p, total, u, norm, a, valid, relative)


def _gradients(
    z: Tensor,
    *,
    normalize: bool = True,
    weights: Tensor | None = None,
    eps: float = 1e-12,
    relative: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """dS/dz, (..., n, d), and dS/dw, (..., n).

    Eigenvalues are raised to machine epsilon times the largest: U has no component along the
    directions where they are 0, so there any finite logarithm gives the same gradient.
    """
    sample = _Sample.of(z, normalize, weights, eps, relative)
    p, u, norm, a = sample.p, sample.u, sample.norm, sample.a
    eig_val, eig_vec = torch.linalg.eigh(a)
    info = torch.finfo(a.dtype)
    floor = (info.eps * eig_val[..., -1:]).clamp_min(info.tiny)
    log_a = (eig_vec * torch.maximum(eig_val, floor).log().unsqueeze(-2)) @ eig_vec.mT
    if a.shape[-1] == z.shape[-2]:  # log rho U = diag(1 / sqrt p) log A diag(sqrt p) U
        root_p = p.sqrt().unsqueeze(-1)
        log_rho_u = (log_a @ (root_p * u)) / root_p
    else:
        log_rho_u = u @ log_a

    grad_p = -((log_rho_u + u) * u).sum(dim=-1)
    if sample.relative:  # p = w / total
        mean = torch.where(p == 0, 0.0, p * grad_p).sum(-1, keepdim=True)
        grad_p = (grad_p - mean) / sample.total
    grad_p = torch.where(p == 0, 0.0, grad_p)

    g_log = -2 * p.unsqueeze(-1) * log_rho_u
    grad = g_log - 2 * p.unsqueeze(-1) * u  # the "+ I" of (3)
    if normalize:
        # "+ I" is radial: left out of the projected rows, where it would only add rounding.
        radial = (g_log * u).sum(dim=-1, keepdim=True) * u
        grad = torch.where(norm > eps, (g_log - radial) / norm, grad / eps)
    grad = torch.where((norm == 0) | (p == 0).unsqueeze(-1), 0.0, grad)

    valid = sample.valid.unsqueeze(-1)
    return (
        torch.where(valid.unsqueeze(-1), grad, torch.nan),
        torch.where(valid, grad_p, torch.nan),
    )
