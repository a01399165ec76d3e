"""The operators under torch.func and in forward mode.

An operator that is registered with ``torch.library.register_autograd`` has reverse mode alone:
``torch.func.grad`` does not see through it, and a tangent of forward mode is lost in silence. An
``autograd.Function`` with ``setup_context`` and ``jvp`` has both, but torch.compile refuses it. So
the public functions take the operators themselves, unless `is_transformed` says that one of these
is at work.

Each function here comes in steps: its backward and its ``jvp`` call the next step, which is such a
function too, so that transforms may be nested. The last step raises `NotImplementedError`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vne_kernels._core.ops import ONCE, compute_dtype, rows_along, scaled

__all__ = [
    "entropy",
    "in_forward_mode",
    "is_transformed",
    "last_step",
    "once",
    "purity",
    "refuse",
    "spectrum",
    "with_gradient",
]

_ops = torch.ops.vne_kernels


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func is at work, or one of the tensors has a tangent.

    While torch.compile traces, the answer is no. A tangent there raises an error, with which dynamo
    leaves the call to the eager function; with ``fullgraph=True`` it is the user's.
    """
    if torch.compiler.is_compiling():
        if any(x is not None and _unpacked(x).tangent is not None for x in tensors):
            raise NotImplementedError(
                "torch.compile(fullgraph=True) has no forward mode through vne_kernels; leave "
                "fullgraph out, or the transform outside of what is compiled"
            )
        return False
    if torch._C._are_functorch_transforms_active():  # what autograd.Function.apply itself asks
        return True
    return any(x is not None and _unpacked(x).tangent is not None for x in tensors)


def _unpacked(x: Tensor) -> forward_ad.UnpackedDualTensor:
    unpacked: forward_ad.UnpackedDualTensor = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    return unpacked


def refuse(reason: str, *tensors: Tensor | None) -> None:
    """An error where a transform is at work that is not offered."""
    if is_transformed(*tensors):
        raise NotImplementedError(reason)


def in_forward_mode(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """A ``jvp`` of the saved tensors and the tangents, differentiable in forward mode itself.

    torch calls ``jvp`` with forward mode switched off, and the tangents of an outer ``jvp`` are
    lost in silence. Here it is on, and what was saved comes without its tangents of this level.
    """

    @functools.wraps(jvp)
    def nested(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [None if x is None else _unpacked(x).primal for x in ctx.saved_tensors]
            return jvp(ctx, saved, *tangents)

    return nested


class _Function(torch.autograd.Function):
    """Its inputs are kept for both modes."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [x if isinstance(x, Tensor) else None for x in inputs]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    @staticmethod
    def inputs(ctx: Any, saved: Sequence[Tensor | None]) -> list[Any]:
        return [other if x is None else x for x, other in zip(saved, ctx.others, strict=True)]


class _LastStep(torch.autograd.Function):
    """A function without derivatives: `NotImplementedError` in place of a silent zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., Any], reason: str, *inputs: Any) -> Any:
        return function(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.reason = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(ctx.reason)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(ctx.reason)


def last_step(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """function, of tensors and other arguments, with an error that says `reason` for a derivative.

    Args:
        function: to a tensor or a tuple of tensors; its operators need no derivative.
    """
    return functools.partial(_LastStep.apply, function, reason)


def once(reason: str, tensor: Tensor, *of: Tensor) -> Tensor:
    """tensor, which was computed of the tensors `of` and has no derivative in them: an error."""
    result: Tensor = _LastStep.apply(_first, reason, tensor, *of)
    return result


def _first(tensor: Tensor, *_: Tensor) -> Tensor:
    return tensor.clone()


def _inner(gradient: Tensor, tangent: Tensor | None, batch_dims: int) -> Tensor | int:
    """The sum of gradient times tangent over all dimensions but those of the batch."""
    if tangent is None:
        return 0
    product = gradient.conj() * tangent.to(gradient.dtype)
    real = product.real if product.is_complex() else product
    return real.sum(tuple(range(batch_dims, gradient.dim())))


def with_gradient(
    value: Callable[..., Tensor], gradient: Callable[..., tuple[Tensor, ...]], count: int
) -> Callable[..., Tensor]:
    """A function of ``count`` tensors, the last of which may be None, and of other arguments.

    Args:
        value: their value, (...).
        gradient: its gradient in each of the tensors, (..., *rest): another step.
    """

    class Value(_Function):
        @staticmethod
        def forward(*inputs: Any) -> Tensor:
            return value(*inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            inputs = _Function.inputs(ctx, ctx.saved_tensors)
            gradients = gradient(*inputs)
            of_tensors = [
                None if x is None else scaled(grads[0], unit_grad, x)
                for x, unit_grad in zip(inputs[:count], gradients, strict=True)
            ]
            return *of_tensors, *[None] * (len(inputs) - count)

        @staticmethod
        @in_forward_mode
        def jvp(ctx: Any, saved: list[Tensor | None], *tangents: Any) -> Any:
            gradients = gradient(*_Function.inputs(ctx, saved))
            batch_dims = gradients[0].dim() - 2
            return sum(
                _inner(unit_grad, tangent, batch_dims)
                for unit_grad, tangent in zip(gradients, tangents, strict=False)
            )

    apply: Callable[..., Tensor] = Value.apply
    return apply


# ---- vn_entropy: value, gradient, Hessian --------------------------------------------------------

_hessian_product = last_step(_ops.vn_entropy_hvp, ONCE["vn_entropy_hvp"])


class _EntropyGradient(_Function):
    """dS/dz, and dS/dweights, (0,) without weights; the Hessian is symmetric and serves both."""

    @staticmethod
    def forward(
        z: Tensor, weights: Tensor | None, normalize: bool, method: str, eps: float
    ) -> tuple[Tensor, Tensor]:
        _, of_z, of_weights = _ops.vn_entropy_grad(z, weights, normalize, method, eps)
        return of_z, of_weights

    @staticmethod
    def _product(
        ctx: Any,
        saved: Sequence[Tensor | None],
        of_z: Tensor | None,
        of_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        z, weights, normalize, _, eps = _Function.inputs(ctx, saved)
        direction = torch.zeros_like(z) if of_z is None else of_z
        if weights is None:
            of_weights = None
        product: tuple[Tensor, Tensor] = _hessian_product(
            z, direction.to(compute_dtype(z.dtype)), weights, of_weights, normalize, eps
        )
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z, weights = ctx.saved_tensors[:2]
        of_z, of_weights = _EntropyGradient._product(ctx, ctx.saved_tensors, *grads)
        return of_z.to(z.dtype), None if weights is None else of_weights, None, None, None

    @staticmethod
    @in_forward_mode
    def jvp(ctx: Any, saved: list[Tensor | None], *tangents: Any) -> Any:
        return _EntropyGradient._product(ctx, saved, *tangents[:2])


entropy = with_gradient(_ops.vn_entropy, _EntropyGradient.apply, 2)
"""vn_entropy(z, weights, normalize, method, eps)."""


# ---- purity --------------------------------------------------------------------------------------


def _purity_gradient(*inputs: Any) -> tuple[Tensor, Tensor]:
    _, of_z, of_weights = _ops.purity_grad(*inputs)
    return of_z, of_weights


purity = with_gradient(_ops.purity, last_step(_purity_gradient, ONCE["purity"]), 2)
"""purity(z, weights, normalize, method, eps)."""


# ---- spectrum ------------------------------------------------------------------------------------


def _spectrum_along(
    z: Tensor,
    direction_z: Tensor,
    eigenvectors: Tensor,
    weights: Tensor | None,
    direction_weights: Tensor | None,
    normalize: bool,
    eps: float,
) -> Tensor:
    """d lambda_k = v_k^T dA v_k = 2 (V^T X)_k . (V^T dX)_k, on the smaller side."""
    rows = rows_along(z, direction_z, weights, direction_weights, normalize, eps)
    x, dx = rows.x, rows.dx
    if z.shape[-2] > z.shape[-1]:
        x, dx = x.mT, dx.mT
    v = eigenvectors.to(x.device, x.dtype).mT
    return (2 * ((v @ x) * (v @ dx)).sum(-1)).to(z.device, eigenvectors.dtype)


_eigenvalues_along = last_step(_spectrum_along, ONCE["spectrum"])
_eigenvalues_backward = last_step(_ops.spectrum_backward, ONCE["spectrum"])


class _Spectrum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor, weights: Tensor | None, normalize: bool, eps: float
    ) -> tuple[Tensor, Tensor]:
        eigenvalues, eigenvectors = _ops.spectrum_eigh(z, weights, normalize, eps)
        return eigenvalues, eigenvectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        z, weights, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(z, weights, output[1])
        ctx.save_for_forward(z, weights, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z, weights, eigenvectors = ctx.saved_tensors
        of_z, of_weights = _eigenvalues_backward(grads[0], z, eigenvectors, weights, *ctx.options)
        return of_z.to(z.dtype), None if weights is None else of_weights, None, None

    @staticmethod
    @in_forward_mode
    def jvp(ctx: Any, saved: list[Tensor], *tangents: Any) -> Any:
        z, weights, eigenvectors = saved
        direction = torch.zeros_like(z) if tangents[0] is None else tangents[0]
        along = _eigenvalues_along(z, direction, eigenvectors, weights, tangents[1], *ctx.options)
        return along, None


def spectrum(z: Tensor, weights: Tensor | None, normalize: bool, eps: float) -> Tensor:
    """Eigenvalues of rho, (..., m), descending."""
    eigenvalues: Tensor = _Spectrum.apply(z, weights, normalize, eps)[0]
    return eigenvalues
