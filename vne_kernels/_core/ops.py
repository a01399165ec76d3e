"""The operators as torch sees them: fake kernels, autograd formulas and vmap rules, a block each.

Schemas are in csrc/ops/, kernels in csrc/<backend>/. The operators take every argument and
validate little: `vne_kernels.functional` is the public face.
Equation numbers: csrc/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vne_kernels._core import spectra
from vne_kernels._core.exporters import refuse_onnx

_NAMESPACE = "vne_kernels"
_ops = torch.ops.vne_kernels

_OPERATORS = (
    "vn_entropy",
    "vn_entropy_grad",
    "vn_entropy_hvp",
    "spectrum",
    "spectrum_eigh",
    "spectrum_backward",
    "purity",
    "purity_grad",
    "doe_loss",
    "doe_loss_grad",
    "doe_loss_backward",
    "cosine",
    "density",
    "density_backward",
    "density_entropy",
    "density_entropy_grad",
)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results: float64 for float64, float32 for float32 and the half precisions."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_float64(x: Tensor) -> Tensor:
    """x in float64, or complex128, on the host where its device has none."""
    on_device = x.cpu() if x.device.type == "mps" else x
    return on_device.to(torch.complex128 if x.is_complex() else torch.float64)


_BY_TORCH = (
    "where eigenvalues differ, torch.linalg.eigvalsh(x @ x.mT) of the rows x = "
    "torch.nn.functional.normalize(z, dim=-1) / n**0.5 has further derivatives"
)

ONCE = {
    "vn_entropy_hvp": (
        "vn_entropy, get_vne, doe_loss, effective_rank, and renyi_entropy, tsallis_entropy and "
        f"vendi_score of order 1 are differentiable twice; {_BY_TORCH}"
    ),
    "spectrum": (
        "spectrum, rankme, and renyi_entropy, tsallis_entropy and vendi_score of other orders than "
        f"1 and 2 are differentiable once; {_BY_TORCH}"
    ),
    "purity": (
        "renyi_entropy, tsallis_entropy and vendi_score of order 2, and participation_ratio, are "
        "differentiable once; (x @ x.mT).square().sum() of the rows x = "
        "torch.nn.functional.normalize(z, dim=-1) / n**0.5 is tr(rho^2) with further derivatives"
    ),
    "doe_loss": (
        "doe_loss is differentiable once; -vn_entropy(z1) - beta * "
        "torch.nn.functional.cosine_similarity(z1, z2, dim=-1).mean(-1) is the same loss, and "
        "differentiable twice"
    ),
    "density_entropy": (
        "an entropy of a density matrix, and vn_entropy of a batch that is spread over processes, "
        "are differentiable once; vn_entropy(z) of representations is differentiable twice"
    ),
}
"""What is said where a derivative is asked for that is not offered: the functions that a user may
have called to come there, and a way round."""


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def fake(*args: Any) -> Any:
            refuse_onnx(name)
            return function(*args)

        registered: Callable[..., Any] = torch.library.register_fake(f"{_NAMESPACE}::{name}", fake)
        return registered

    return register


def _result(like: Tensor, *sizes: int | torch.SymInt) -> Tensor:
    return like.new_empty(sizes, dtype=compute_dtype(like.dtype))


def _smaller(z: Tensor) -> Any:
    return torch.sym_min(z.shape[-2], z.shape[-1])


def _weights_grad(z: Tensor, weights: Tensor | None) -> Tensor:
    return _result(z, 0) if weights is None else _result(z, *z.shape[:-1])


def scaled(grad: Tensor, unit_grad: Tensor, like: Tensor) -> Tensor:
    """grad (...) times unit_grad (..., *rest), in the dtype of like."""
    trailing = (1,) * (unit_grad.dim() - grad.dim())
    return (grad.reshape(*grad.shape, *trailing) * unit_grad).to(like.dtype)


# ---- vn_entropy ----------------------------------------------------------------------------------


@_fake("vn_entropy")
def _(z: Tensor, weights: Tensor | None, normalize: bool, method: str, eps: float) -> Tensor:
    return _result(z, *z.shape[:-2])


def _vn_entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, weights, *ctx.options = inputs
    ctx.save_for_backward(z, weights)


def _vn_entropy_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The public function takes vn_entropy_grad where a gradient is expected: this is for others.
    z, weights = ctx.saved_tensors
    _, unit_grad, weights_grad = _ops.vn_entropy_grad(z, weights, *ctx.options)
    of_weights = None if weights is None else scaled(grad, weights_grad, weights)
    return scaled(grad, unit_grad, z), of_weights, None, None, None


torch.library.register_autograd(
    "vne_kernels::vn_entropy", _vn_entropy_backward, setup_context=_vn_entropy_setup
)


# ---- vn_entropy_grad -----------------------------------------------------------------------------
# The gradient is a multiple of grad_output, so the forward computes it at once and the backward is
# one scaling. The unit gradient is an output like S: autograd links its uses in the backward to
# this node, and a gradient that arrives at it is the second order, a Hessian-vector product. That
# is computed by an eigendecomposition whatever the method of the first order was.


@_fake("vn_entropy_grad")
def _(
    z: Tensor, weights: Tensor | None, normalize: bool, method: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _result(z, *z.shape[:-2]), _result(z, *z.shape), _weights_grad(z, weights)


def _vn_entropy_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, weights, ctx.normalize, _, ctx.eps = inputs
    _, unit_grad, weights_grad = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, weights, unit_grad, weights_grad)


def _vn_entropy_grad_backward(
    ctx: Any, grad: Tensor | None, grad_unit_grad: Tensor | None, grad_weights_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    z, weights, unit_grad, weights_grad = ctx.saved_tensors
    of_z = of_weights = None
    if grad is not None:
        of_z = scaled(grad, unit_grad, z)
        of_weights = None if weights is None else scaled(grad, weights_grad, weights)
    if weights is None:
        grad_weights_grad = None  # of (0,)
    if grad_unit_grad is not None or grad_weights_grad is not None:
        direction = torch.zeros_like(unit_grad) if grad_unit_grad is None else grad_unit_grad
        hvp_z, hvp_weights = _ops.vn_entropy_hvp(
            z, direction, weights, grad_weights_grad, ctx.normalize, ctx.eps
        )
        of_z = hvp_z.to(z.dtype) if of_z is None else of_z + hvp_z.to(z.dtype)
        if weights is not None:
            of_weights = hvp_weights if of_weights is None else of_weights + hvp_weights
    return of_z, of_weights, None, None, None


torch.library.register_autograd(
    "vne_kernels::vn_entropy_grad",
    _vn_entropy_grad_backward,
    setup_context=_vn_entropy_grad_setup,
)


# ---- vn_entropy_hvp ------------------------------------------------------------------------------


@_fake("vn_entropy_hvp")
def _(
    z: Tensor,
    direction_z: Tensor,
    weights: Tensor | None,
    direction_weights: Tensor | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _result(z, *z.shape), _weights_grad(z, weights)


class RowsAlong(NamedTuple):
    """The rows x_i = sqrt(p_i) u_i and their derivatives along a direction, in float64."""

    u: Tensor  # (..., n, d)
    du: Tensor  # (..., n, d)
    root: Tensor  # (..., n, 1), sqrt(p_i)
    d_root: Tensor  # (..., n, 1)
    inverse: Tensor  # (..., n, 1), of the norm that a row is divided by
    d_inverse: Tensor  # (..., n, 1)
    on_sphere: Tensor  # (..., n, 1), whether u_i moves on the unit sphere
    absent: Tensor  # (..., n, 1), zero rows and those of weight 0: their derivatives are 0

    @property
    def x(self) -> Tensor:
        return self.root * self.u

    @property
    def dx(self) -> Tensor:
        return self.root * self.du + self.d_root * self.u


def rows_along(
    z: Tensor,
    direction_z: Tensor,
    weights: Tensor | None,
    direction_weights: Tensor | None,
    normalize: bool,
    eps: float,
) -> RowsAlong:
    """What second derivatives and forward mode need of the rows: (1), differentiated."""
    z, dz = to_float64(z), to_float64(direction_z)
    p = z.new_full(z.shape[:-1], 1 / z.shape[-2]) if weights is None else to_float64(weights)
    p = p.unsqueeze(-1)
    z = torch.where(p == 0, 0, z)  # absent, whatever it holds
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
    return RowsAlong(u, du, root, d_root, inverse, -inverse.square() * along, on_sphere, absent)


def _vn_entropy_hvp(
    z: Tensor,
    direction_z: Tensor,
    weights: Tensor | None,
    direction_weights: Tensor | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Equation (9): the derivative of dS/dz and dS/dp, finite at repeated eigenvalues.

    In plain torch and float64, for any device: second derivatives are rare, and clarity is worth
    more. LAPACK's float32 eigenvectors of some matrices of rank one are NaN.
    """
    device, dtype = z.device, compute_dtype(z.dtype)
    rows = rows_along(z, direction_z, weights, direction_weights, normalize, eps)
    n, d = z.shape[-2:]
    x, dx = rows.x, rows.dx
    if n > d:  # work on the smaller side, equation (2)
        x, dx = x.mT, dx.mT
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
    if n > d:
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
    product = torch.where(finite, torch.where(rows.absent, 0, product), torch.nan)
    of_z = product.to(device, dtype).contiguous()
    if weights is None:
        return of_z, of_z.new_empty(0)
    # dS/dp_i = g_i . u_i / (2 sqrt(p_i)), (11)
    root = torch.where(rows.absent, 1, rows.root)
    product = (d_inner - inner * rows.d_root / root) / (2 * root)
    product = torch.where(finite, torch.where(rows.absent, 0, product), torch.nan)
    return of_z, product.squeeze(-1).to(device, dtype).contiguous()


torch.library.impl("vne_kernels::vn_entropy_hvp", "CompositeExplicitAutograd")(_vn_entropy_hvp)


# ---- spectrum ------------------------------------------------------------------------------------


@_fake("spectrum")
def _(z: Tensor, weights: Tensor | None, normalize: bool, eps: float) -> Tensor:
    return _result(z, *z.shape[:-2], _smaller(z))


def _spectrum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, weights, *ctx.options = inputs
    ctx.save_for_backward(z, weights)


def _spectrum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, weights = ctx.saved_tensors
    _, eigenvectors = _ops.spectrum_eigh(z, weights, *ctx.options)
    of_z, of_weights = _ops.spectrum_backward(grad, z, eigenvectors, weights, *ctx.options)
    return of_z.to(z.dtype), None if weights is None else of_weights, None, None


torch.library.register_autograd(
    "vne_kernels::spectrum", _spectrum_backward, setup_context=_spectrum_setup
)


@_fake("spectrum_eigh")
def _(z: Tensor, weights: Tensor | None, normalize: bool, eps: float) -> tuple[Tensor, Tensor]:
    m = _smaller(z)
    return _result(z, *z.shape[:-2], m), _result(z, *z.shape[:-2], m, m)


def _spectrum_eigh_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, weights, *ctx.options = inputs
    ctx.save_for_backward(z, weights, output[1])
    # Eigenvectors have no gradient where eigenvalues meet, and none is offered.
    ctx.mark_non_differentiable(output[1])


def _spectrum_eigh_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    z, weights, eigenvectors = ctx.saved_tensors
    of_z, of_weights = _ops.spectrum_backward(grad, z, eigenvectors, weights, *ctx.options)
    return of_z.to(z.dtype), None if weights is None else of_weights, None, None


torch.library.register_autograd(
    "vne_kernels::spectrum_eigh", _spectrum_eigh_backward, setup_context=_spectrum_eigh_setup
)


@_fake("spectrum_backward")
def _(
    grad: Tensor,
    z: Tensor,
    eigenvectors: Tensor,
    weights: Tensor | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _result(z, *z.shape), _weights_grad(z, weights)


# ---- purity --------------------------------------------------------------------------------------


@_fake("purity")
def _(z: Tensor, weights: Tensor | None, normalize: bool, method: str, eps: float) -> Tensor:
    return _result(z, *z.shape[:-2])


def _purity_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, weights, *ctx.options = inputs
    ctx.save_for_backward(z, weights)


def _purity_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, weights = ctx.saved_tensors
    _, unit_grad, weights_grad = _ops.purity_grad(z, weights, *ctx.options)
    of_weights = None if weights is None else scaled(grad, weights_grad, weights)
    return scaled(grad, unit_grad, z), of_weights, None, None, None


torch.library.register_autograd(
    "vne_kernels::purity", _purity_backward, setup_context=_purity_setup
)


@_fake("purity_grad")
def _(
    z: Tensor, weights: Tensor | None, normalize: bool, method: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _result(z, *z.shape[:-2]), _result(z, *z.shape), _weights_grad(z, weights)


def _purity_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, weights, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, weights, *output[1:])


def _purity_grad_backward(
    ctx: Any, grad: Tensor | None, *grads_of_gradients: Tensor | None
) -> tuple[Tensor | None, ...]:
    # The gradients are outputs, so that what a second derivative asks of them arrives here.
    if any(of_gradient is not None for of_gradient in grads_of_gradients):
        raise NotImplementedError(ONCE["purity"])
    z, weights, unit_grad, weights_grad = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, None
    of_weights = None if weights is None else scaled(grad, weights_grad, weights)
    return scaled(grad, unit_grad, z), of_weights, None, None, None


torch.library.register_autograd(
    "vne_kernels::purity_grad", _purity_grad_backward, setup_context=_purity_grad_setup
)


# ---- doe_loss ------------------------------------------------------------------------------------


@_fake("doe_loss")
def _(z1: Tensor, z2: Tensor, method: str, eps: float) -> tuple[Tensor, Tensor]:
    return _result(z1, *z1.shape[:-2]), _result(z1, *z1.shape[:-2])


def _doe_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z1, z2, *ctx.options = inputs
    ctx.save_for_backward(z1, z2)


def _doe_gradients(
    grad_entropy: Tensor,
    grad_cosine: Tensor,
    z1: Tensor,
    z2: Tensor,
    entropy_grad: Tensor,
    row_stats: Tensor,
) -> tuple[Tensor | None, ...]:
    of_z1, of_z2 = _ops.doe_loss_backward(
        grad_entropy, grad_cosine, z1, z2, entropy_grad, row_stats
    )
    return of_z1.to(z1.dtype), of_z2.to(z2.dtype), None, None


def _doe_loss_backward(
    ctx: Any, grad_entropy: Tensor, grad_cosine: Tensor
) -> tuple[Tensor | None, ...]:
    z1, z2 = ctx.saved_tensors
    _, _, entropy_grad, row_stats = _ops.doe_loss_grad(z1, z2, *ctx.options)
    return _doe_gradients(grad_entropy, grad_cosine, z1, z2, entropy_grad, row_stats)


torch.library.register_autograd(
    "vne_kernels::doe_loss", _doe_loss_backward, setup_context=_doe_loss_setup
)


@_fake("doe_loss_grad")
def _(z1: Tensor, z2: Tensor, method: str, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, (n, _) = z1.shape[:-2], z1.shape[-2:]
    return (
        _result(z1, *batch),
        _result(z1, *batch),
        _result(z1, *z1.shape),
        _result(z1, *batch, 4, n),
    )


def _doe_loss_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z1, z2, *_ = inputs
    _, _, entropy_grad, row_stats = output
    ctx.mark_non_differentiable(entropy_grad, row_stats)
    ctx.save_for_backward(z1, z2, entropy_grad, row_stats)


def _doe_loss_grad_backward(
    ctx: Any, grad_entropy: Tensor, grad_cosine: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    z1, z2, entropy_grad, row_stats = ctx.saved_tensors
    return _doe_gradients(grad_entropy, grad_cosine, z1, z2, entropy_grad, row_stats)


torch.library.register_autograd(
    "vne_kernels::doe_loss_grad", _doe_loss_grad_backward, setup_context=_doe_loss_grad_setup
)


@_fake("doe_loss_backward")
def _(
    grad_entropy: Tensor,
    grad_cosine: Tensor,
    z1: Tensor,
    z2: Tensor,
    entropy_grad: Tensor,
    row_stats: Tensor,
) -> tuple[Tensor, Tensor]:
    return _result(z1, *z1.shape), _result(z2, *z2.shape)


# ---- cosine --------------------------------------------------------------------------------------


@_fake("cosine")
def _(z1: Tensor, z2: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    batch, (n, _) = z1.shape[:-2], z1.shape[-2:]
    return _result(z1, *batch), _result(z1, *batch, 4, n)


# ---- density -------------------------------------------------------------------------------------
# rho is a sum over rows, and so a sum over processes: equation (12).


@_fake("density")
def _(z: Tensor, weights: Tensor | None, normalize: bool, eps: float) -> Tensor:
    *batch, _, d = z.shape
    return _result(z, *batch, d, d)


def _density_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, weights, *ctx.options = inputs
    ctx.save_for_backward(z, weights)


def _density_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, weights = ctx.saved_tensors
    of_z, of_weights = _ops.density_backward(grad, z, weights, *ctx.options)
    return of_z.to(z.dtype), None if weights is None else of_weights, None, None


torch.library.register_autograd(
    "vne_kernels::density", _density_backward, setup_context=_density_setup
)


@_fake("density_backward")
def _(
    grad_rho: Tensor, z: Tensor, weights: Tensor | None, normalize: bool, eps: float
) -> tuple[Tensor, Tensor]:
    return _result(z, *z.shape), _weights_grad(z, weights)


# ---- density_entropy -----------------------------------------------------------------------------


@_fake("density_entropy")
def _(rho: Tensor, method: str) -> Tensor:
    return _result(rho, *rho.shape[:-2])


def _density_entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rho, ctx.method = inputs
    ctx.save_for_backward(rho)


def _density_entropy_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (rho,) = ctx.saved_tensors
    _, unit_grad = _ops.density_entropy_grad(rho, ctx.method)
    return scaled(grad, unit_grad, rho), None


torch.library.register_autograd(
    "vne_kernels::density_entropy", _density_entropy_backward, setup_context=_density_entropy_setup
)


@_fake("density_entropy_grad")
def _(rho: Tensor, method: str) -> tuple[Tensor, Tensor]:
    return _result(rho, *rho.shape[:-2]), _result(rho, *rho.shape)


def _density_entropy_grad_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _density_entropy_grad_backward(
    ctx: Any, grad: Tensor | None, grad_unit_grad: Tensor | None
) -> tuple[Tensor | None, None]:
    # The unit gradient is an output, so that what a second derivative asks of it arrives here.
    if grad_unit_grad is not None:
        raise NotImplementedError(ONCE["density_entropy"])
    (unit_grad,) = ctx.saved_tensors
    return None if grad is None else scaled(grad, unit_grad, unit_grad), None


torch.library.register_autograd(
    "vne_kernels::density_entropy_grad",
    _density_entropy_grad_backward,
    setup_context=_density_entropy_grad_setup,
)


# ---- no derivative -------------------------------------------------------------------------------


def register_without_derivative(name: str, reason: str) -> None:
    """A gradient of this operator is an error that says why, not a silent zero."""

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(reason)

    torch.library.register_autograd(f"{_NAMESPACE}::{name}", backward)


register_without_derivative("vn_entropy_hvp", ONCE["vn_entropy_hvp"])
register_without_derivative("spectrum_backward", ONCE["spectrum"])
register_without_derivative("doe_loss_backward", ONCE["doe_loss"])
register_without_derivative("density_backward", ONCE["density_entropy"])
register_without_derivative("cosine", ONCE["doe_loss"])


# ---- vmap ----------------------------------------------------------------------------------------
# Every operator takes leading batch dimensions: a mapped dimension becomes the first of them.


def register_vmap(name: str) -> None:
    """The rule of an operator all of whose tensors take leading batch dimensions."""
    operator = getattr(_ops, name)

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        batched = [
            arg
            if not isinstance(arg, Tensor)
            else arg.unsqueeze(0).expand(info.batch_size, *arg.shape)
            if dim is None
            else arg.movedim(dim, 0)
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        result = operator(*batched)
        if isinstance(result, Tensor):
            return result, 0
        # Without weights their gradient is (0,), which has no batch.
        dims = tuple(None if out.shape == (0,) else 0 for out in result)
        return tuple(result), dims

    torch.library.register_vmap(f"{_NAMESPACE}::{name}", rule)


for _name in _OPERATORS:
    register_vmap(_name)


# ---- the pole table ------------------------------------------------------------------------------

POLE_TABLE: dict[torch.dtype, list[list[float]]] = {
    dtype: _ops.pole_table(torch.empty(0, dtype=dtype)).tolist()
    for dtype in (torch.float32, torch.float64)
}
"""(c0, 0) and then (t, w) of each pole of equation (6), by the dtype of the computation."""


# ---- devices without kernels ---------------------------------------------------------------------
# The matrix is small and LAPACK is quick: a copy to the host is right everywhere.


def on_host(name: str) -> Callable[..., Any]:
    """The operator of this name for tensors of any device, by the CPU kernels."""
    operator = getattr(_ops, name)

    def call(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        result = operator(*(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args))
        if isinstance(result, Tensor):
            return result.to(device)
        return tuple(out.to(device) for out in result)

    return call


OPERATORS_WITH_KERNELS = tuple(name for name in _OPERATORS if name != "vn_entropy_hvp")
"""The others are plain torch, and run anywhere."""

for _name in OPERATORS_WITH_KERNELS:
    for _device_key in ("MPS", "XPU"):  # for CUDA: backends.py
        torch.library.impl(f"{_NAMESPACE}::{_name}", _device_key)(on_host(_name))
