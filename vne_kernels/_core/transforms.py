"""Which derivative is asked for, and functions that have those of torch.func and forward mode.

An operator that is registered with ``torch.library.register_autograd`` has reverse mode alone:
``torch.func.grad`` does not see through it, and a tangent of forward mode is lost in silence. An
``autograd.Function`` with ``setup_context`` and ``jvp`` has both, but torch.compile refuses it. So
the package calls the operators themselves, unless `is_transformed` says that one of these is at
work.

Each derivative of a `step` is a step too, so that transforms may be nested. The last one raises
`NotImplementedError`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# ---- what is asked for ---------------------------------------------------------------------------


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of what is computed from these tensors.

    While torch.jit.trace traces, the answer is no: it records the graph without gradients.
    """
    for x in tensors:
        if x is not None and x.requires_grad:
            is_tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            return torch.is_grad_enabled() and not is_tracing
    return False


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
    if forward_ad._current_level < 0:  # outside of forward mode
        return False
    return any(x is not None and _unpacked(x).tangent is not None for x in tensors)


def _unpacked(x: Tensor) -> forward_ad.UnpackedDualTensor:
    unpacked: forward_ad.UnpackedDualTensor = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    return unpacked


def refuse(reason: str, *tensors: Tensor | None) -> None:
    """Raises `NotImplementedError` where a transform is at work."""
    if is_transformed(*tensors):
        raise NotImplementedError(reason)


# ---- steps ---------------------------------------------------------------------------------------


def step(
    forward: Callable[..., Any],
    backward: Callable[[list[Any], tuple[Any, ...]], Sequence[Tensor | None]],
    along: Callable[[list[Any], tuple[Any, ...]], Any],
    *,
    differentiable: int | None = None,
) -> Callable[..., Any]:
    """A function of tensors and other arguments, with a derivative in both modes.

    Args:
        forward: the function; of a tensor or a tuple.
        backward: the gradients of its leading arguments, from all arguments and the incoming
            gradients. Those of arguments that are None are ignored.
        along: the tangent of the outputs, from all arguments and their tangents.
        differentiable: how many of the outputs have a derivative. The others follow the arguments
            in the first argument of ``backward`` and ``along``. Default: all outputs.
    """

    def merged(ctx: Any, tensors: Sequence[Tensor | None]) -> list[Any]:
        return [other if x is None else x for x, other in zip(tensors, ctx.others, strict=True)]

    class Step(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return forward(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            constants = () if differentiable is None else output[differentiable:]
            if constants:
                ctx.mark_non_differentiable(*constants)
            ctx.count, ctx.constants = len(inputs), len(constants)
            values = *inputs, *constants
            tensors = [x if isinstance(x, Tensor) else None for x in values]
            ctx.others = [None if isinstance(x, Tensor) else x for x in values]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            values = merged(ctx, ctx.saved_tensors)
            gradients = [
                None if x is None or grad is None else grad.to(x.dtype)
                for x, grad in zip(values, backward(values, grads), strict=False)
            ]
            return *gradients, *[None] * (ctx.count - len(gradients))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            # torch calls this with forward mode off, and would lose the tangents of an outer jvp in
            # silence. Here it is on, and what was saved comes without its tangents of this level.
            with forward_ad._set_fwd_grad_enabled(True):
                tensors = [None if x is None else _unpacked(x).primal for x in ctx.saved_tensors]
                tangent = along(merged(ctx, tensors), tangents)
            return (tangent, *[None] * ctx.constants) if ctx.constants else tangent

    apply: Callable[..., Any] = Step.apply
    return apply


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


def once(reason: str, tensor: Tensor, *inputs: Tensor) -> Tensor:
    """tensor, which was computed from `inputs` and has no derivative in them: an error."""
    result: Tensor = _LastStep.apply(_first, reason, tensor, *inputs)
    return result


def _first(tensor: Tensor, *_: Tensor) -> Tensor:
    return tensor.clone()


def scaled(grad: Tensor, unit_grad: Tensor) -> Tensor:
    """grad (...) times unit_grad (..., *rest)."""
    if grad.dim() == 0:
        return grad * unit_grad
    return grad.reshape(*grad.shape, *(1,) * (unit_grad.dim() - grad.dim())) * unit_grad


def _inner(gradient: Tensor, tangent: Tensor | None, batch_dims: int) -> Tensor | int:
    """The sum of gradient times tangent over all dimensions but those of the batch."""
    if tangent is None:
        return 0
    product = gradient.conj() * tangent.to(gradient.dtype)
    real = product.real if product.is_complex() else product
    return real.sum(tuple(range(batch_dims, gradient.dim())))


def with_gradient(
    value: Callable[..., Tensor], gradient: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., Tensor]:
    """The step of a function of leading tensors, the last of which may be None, and of others.

    Args:
        value: the function, (...).
        gradient: its gradient in each of the tensors, (..., *rest): another step.
    """

    def backward(inputs: list[Any], grads: tuple[Any, ...]) -> list[Tensor | None]:
        return [
            None if x is None else scaled(grads[0], unit_grad)
            for x, unit_grad in zip(inputs, gradient(*inputs), strict=False)
        ]

    def along(inputs: list[Any], tangents: tuple[Any, ...]) -> Any:
        gradients = gradient(*inputs)
        batch_dims = gradients[0].dim() - 2
        return sum(
            _inner(unit_grad, tangent, batch_dims)
            for unit_grad, tangent in zip(gradients, tangents, strict=False)
        )

    return step(value, backward, along)
