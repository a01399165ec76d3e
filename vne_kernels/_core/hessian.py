"""Derivatives along a direction: of the gradient of S, equation (9), and of the eigenvalues.

They are plain torch in float64, for any device: second derivatives and forward mode are rare, and
clarity is worth more. LAPACK's float32 eigenvectors of some matrices of rank one are NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vne_kernels._core import spectra
from vne_kernels._core.dtypes import compute_dtype, to_float64


class _Rows(NamedTuple):
    """The rows x_i = sqrt(p_i) u_i and their derivatives along a direction, in float64."""

    u: Tensor  # (..., n, d)
    du: Tensor  # (..., n, d)
    root: Tensor  # (..., n, 1), sqrt(p_i)
    d_root: Tensor  # (..., n, 1)
    inverse: Tensor  # (..., n, 1), of the norm that a row is divided by
    d_inverse: Tensor  # (..., n, 1)
    on_sphere: Tensor  # (..., n, 1), whether u_i moves on the unit sphere
    absent: Tensor  # (..., n, 1), zero rows and those of weight 0: their derivatives are 0

    def on_smaller_side(self) -> tuple[Tensor, Tensor]:
        """X and dX, transposed where n > d, so that X X^T is the smaller matrix: equation (2)."""
        x, dx = self.root * self.u, self.root * self.du + self.d_root * self.u
        return (x.mT, dx.mT) if x.shape[-2] > x.shape[-1] else (x, dx)


def _rows_along(
    z: Tensor,
    direction_z: Tensor,
    weights: Tensor | None,
    direction_weights: Tensor | None,
    normalize: bool,
    eps: float,
) -> _Rows:
    """Equation (1), differentiated."""
    z, dz = to_float64(z), to_float64(direction_z)
    p = z.new_full(z.shape[:-1], 1 / z.shape[-2]) if weights is None else to_float64(weights)
    p = p.unsqueeze(-1)
    z = torch.where(p == 0, 0, z)  # an absent row may hold anything
    root = p.sqrt()
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    absent = (norm == 0) | (p == 0)
    d_root = torch.zeros_like(root)
    if direction_weights is not None:
        half = to_float64(direction_weights).unsqueeze(-1) / 2
        d_root = torch.where(absent, 0, half / torch.where(absent, 1, root))
    eps = max(eps, torch.finfo(torch.float64).tiny)  # its inverse must be finite
    on_sphere = (norm > eps) if normalize else torch.zeros_like(absent)
    inverse = 1 / norm.clamp_min(eps) if normalize else torch.ones_like(norm)
    u = z * inverse
    # du = inverse (dz - (u.dz) u) on the sphere; the norm of a shorter row counts as a constant.
    along = torch.where(on_sphere, (u * dz).sum(-1, keepdim=True), 0)
    du = torch.where(absent, 0, inverse * (dz - along * u))
    return _Rows(u, du, root, d_root, inverse, -inverse.square() * along, on_sphere, absent)


def hessian_product(
    z: Tensor,
    direction_z: Tensor,
    weights: Tensor | None,
    direction_weights: Tensor | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The derivative of dS/dz and of dS/dp along a direction, finite at repeated eigenvalues.

    Args:
        z, direction_z: (..., n, d).
        weights, direction_weights: (..., n); None: 1/n each, and 0.

    Returns:
        (..., n, d), and (..., n), or (0,) without weights; the dtype of results.
    """
    device, dtype = z.device, compute_dtype(z.dtype)
    rows = _rows_along(z, direction_z, weights, direction_weights, normalize, eps)
    x, dx = rows.on_smaller_side()
    a = x @ x.mT
    da = dx @ x.mT
    da = da + da.mT
    finite = a.isfinite().all(-1).all(-1)[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    lam, v = torch.linalg.eigh(torch.where(finite, a, eye))
    floor = torch.finfo(dtype).eps * lam[..., -1:]  # as the first derivative has it
    lam = torch.maximum(lam, floor.clamp_min(torch.finfo(a.dtype).tiny))
    log_a = (v * lam.log().unsqueeze(-2)) @ v.mT
    dlog_a = v @ (spectra.divided_differences_of_log(lam) * (v.mT @ da @ v)) @ v.mT

    g = -2 * (log_a @ x + x)  # dS/dX, (3)
    dg = -2 * (dlog_a @ x + log_a @ dx + dx)
    if z.shape[-2] > z.shape[-1]:
        g, dg = g.mT, dg.mT
    u, du = rows.u, rows.du
    inner = (g * u).sum(-1, keepdim=True)
    d_inner = (dg * u + g * du).sum(-1, keepdim=True)
    radial, d_radial = (torch.where(rows.on_sphere, part, 0) for part in (inner, d_inner))
    tangent = g - radial * u
    product = rows.root * (
        rows.d_inverse * tangent + rows.inverse * (dg - d_radial * u - radial * du)
    )
    product = product + rows.d_root * rows.inverse * tangent

    def finished(product: Tensor) -> Tensor:
        product = torch.where(finite, torch.where(rows.absent, 0, product), torch.nan)
        return product.to(device, dtype)

    product_z = finished(product).contiguous()
    if weights is None:
        return product_z, product_z.new_empty(0)
    # dS/dp_i = g_i . u_i / (2 sqrt(p_i)), (11)
    root = torch.where(rows.absent, 1, rows.root)
    product_weights = finished((d_inner - inner * rows.d_root / root) / (2 * root))
    return product_z, product_weights.squeeze(-1).contiguous()


def eigenvalues_along(
    z: Tensor,
    direction_z: Tensor,
    weights: Tensor | None,
    direction_weights: Tensor | None,
    eigenvectors: Tensor,
    normalize: bool,
    eps: float,
) -> Tensor:
    """d lambda_k = v_k^T dA v_k = 2 (V^T X)_k . (V^T dX)_k, (..., m), on the smaller side."""
    rows = _rows_along(z, direction_z, weights, direction_weights, normalize, eps)
    x, dx = rows.on_smaller_side()
    v = eigenvectors.to(x.device, x.dtype).mT
    return (2 * ((v @ x) * (v @ dx)).sum(-1)).to(z.device, eigenvectors.dtype)
