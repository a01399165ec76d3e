"""The backward of an operator, derived from its schema and from that of another operator.

In schemas these names have a meaning:

    grad_x, product_x   an output, the gradient, or a product with the Hessian, in the input x: of
                        the shape of x, or (0,) where x is None
    grad...             an input of a backward operator: the gradients of the outputs, in order
    direction_x         an input of a second derivative: the direction in the input x
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vne_kernels._core.transforms import scaled

Gradients = Callable[[list[Any], tuple[Any, ...], list[Any]], list[Tensor | None]]
"""Of the values (*inputs, *outputs), the incoming gradients and the dtypes of the inputs, which are
None where an input is no tensor: the gradients of the inputs."""


class Derivative(NamedTuple):
    needs: Sequence[int]  #: places of the values that the backward reads, which are saved
    gradients: Gradients
    differentiable: int | None  #: outputs with a gradient; None: all, one that is missing is None
    units: Sequence[tuple[int, int]] = ()  #: places of inputs and of their gradients among outputs


class Operator:
    """An operator of ``torch.ops.vne_kernels``, as its schema describes it."""

    def __init__(self, name: str, once: str, has_kernels: bool) -> None:
        self.name, self.once, self.has_kernels = name, once, has_kernels
        self.call = getattr(torch.ops.vne_kernels, name).default
        self.arguments: list[str] = [x.name for x in self.call._schema.arguments]
        self.outputs: list[str] = [x.name for x in self.call._schema.returns]
        types = [str(x.type) for x in self.call._schema.arguments]
        self.tensors = [i for i, x in enumerate(types) if x in ("Tensor", "Optional[Tensor]")]
        #: the place of the argument whose sizes and dtype the outputs follow: z, or a matrix
        self.sample = next(
            i for i, x in enumerate(self.arguments) if x in ("z", "z1", "rho", "like")
        )
        self.derivative: Derivative | None = None

    def compute(self, *args: Any) -> Any:
        """The outputs without a derivative: `call` below the layer of autograd.

        That layer, which torch.library makes in Python, costs as much as a small sample.
        """
        with torch._C._AutoDispatchBelowAutograd():
            return self.call(*args)

    def input_of(self, output: str) -> int | None:
        """The place of the input x of an output grad_x or product_x."""
        _, _, x = output.partition("_")
        return self.arguments.index(x) if x in self.arguments else None


def by_unit_gradients(op: Operator, second: Operator | None) -> Derivative:
    """Of an operator with the outputs (value, grad_x, ...): its forward has found the gradient.

    The gradients are outputs like the value: autograd links their uses in a backward to this node,
    and a gradient that arrives at one of them is the second order.
    """
    count = len(op.arguments)
    places = [op.arguments.index(output.removeprefix("grad_")) for output in op.outputs[1:]]
    outputs = range(count + 1, count + len(op.outputs))
    unit_gradients = list(zip(places, outputs, strict=True))
    product = None if second is None else hessian_product(op, second, second.call)

    def gradients(values: list[Any], grads: tuple[Any, ...], dtypes: list[Any]) -> Any:
        result: list[Tensor | None] = [None] * count
        if grads[0] is not None:
            for place, i in unit_gradients:
                if dtypes[place] is not None:
                    result[place] = _in_dtype(scaled(grads[0], values[i]), dtypes[place])
        for grad in grads[1:]:
            if grad is not None:
                break
        else:
            return result
        if product is None:
            raise NotImplementedError(op.once)
        for place, part in zip(places, product(values, grads[1:]), strict=True):
            if dtypes[place] is not None:
                first, part = result[place], _in_dtype(part, dtypes[place])
                result[place] = part if first is None else first + part
        return result

    needs = outputs if second is None else [*range(count), *outputs]
    return Derivative(needs, gradients, None, unit_gradients)


def by_operator(op: Operator, backward: Operator) -> Derivative:
    """By the operator `backward`, which takes inputs and outputs of `op` by their names."""
    names = [*op.arguments, *op.outputs]
    sources = [None if x.startswith("grad") else names.index(x) for x in backward.arguments]
    places = [op.arguments.index(output.removeprefix("grad_")) for output in backward.outputs]

    def gradients(values: list[Any], grads: tuple[Any, ...], dtypes: list[Any]) -> Any:
        result: list[Tensor | None] = [None] * len(op.arguments)
        incoming = iter(grads)
        args = [next(incoming) if i is None else values[i] for i in sources]
        for place, grad in zip(places, backward.call(*args), strict=True):
            if dtypes[place] is not None:
                result[place] = _in_dtype(grad, dtypes[place])
        return result

    return Derivative([i for i in sources if i is not None], gradients, sources.count(None))


def by_twin(op: Operator, twin: Operator) -> Derivative:
    """By the operator `twin`, which computes the same and what its backward needs besides.

    The package calls the twin where a gradient is expected: this is for others.
    """
    count, derivative = len(op.arguments), twin.derivative
    assert derivative is not None

    def gradients(values: list[Any], grads: tuple[Any, ...], dtypes: list[Any]) -> Any:
        inputs = values[:count]
        return derivative.gradients([*inputs, *twin.call(*inputs)], grads, dtypes)

    return Derivative(range(count), gradients, len(op.outputs))


def hessian_product(
    op: Operator, second: Operator, call: Callable[..., Any]
) -> Callable[[list[Any], tuple[Any, ...]], Any]:
    """The Hessian of `op` times directions in its inputs, by `call` with the schema of `second`.

    The Hessian is symmetric: the product is that of the backward and of forward mode.
    """

    def product(values: list[Any], directions: tuple[Any, ...]) -> Any:
        given = dict(zip(op.arguments, values, strict=False))
        for output, direction in zip(op.outputs[1:], directions, strict=False):
            x = output.removeprefix("grad_")
            given[f"direction_{x}"] = None if given[x] is None else direction
        if given["direction_z"] is None:
            given["direction_z"] = torch.zeros_like(given["z"])
        return call(*(given[x] for x in second.arguments))

    return product


def _in_dtype(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad if grad.dtype == dtype else grad.to(dtype)


def autograd_of(
    op: Operator, derivative: Derivative
) -> tuple[Callable[..., Any], Callable[..., None]]:
    """Backward and setup_context, as ``torch.library.register_autograd`` takes them."""
    needs, gradients, count, _ = derivative
    inputs_end, size = len(op.arguments), len(op.arguments) + len(op.outputs)
    options = [i for i in needs if i < inputs_end and i not in op.tensors]
    tensors = [i for i in needs if i not in options]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        if count is None:
            ctx.set_materialize_grads(False)
        elif count < len(outputs):
            ctx.mark_non_differentiable(*outputs[count:])
        values = (*inputs, *outputs)
        ctx.save_for_backward(*[values[i] for i in tensors])
        ctx.options = [values[i] for i in options]
        ctx.dtypes = [None] * inputs_end
        for i in op.tensors:
            if inputs[i] is not None:
                ctx.dtypes[i] = inputs[i].dtype

    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        values: list[Any] = [None] * size
        for i, tensor in zip(tensors, ctx.saved_tensors, strict=True):
            values[i] = tensor
        for i, option in zip(options, ctx.options, strict=True):
            values[i] = option
        return tuple(gradients(values, grads, ctx.dtypes))

    return backward, setup_context


def eager_node(op: Operator, results: int) -> Callable[..., tuple[Tensor, ...]]:
    """The leading `results` outputs of an operator, with its derivative, for eager mode.

    The same as `op.call` in half of the time: a node of autograd for these outputs alone, without
    the layers of torch.library. A backward that is itself to be differentiated calls the operator
    again, whose derivative has a derivative.
    """
    assert op.derivative is not None
    needs, gradients, count, units = op.derivative
    inputs_end, size = len(op.arguments), len(op.arguments) + len(op.outputs)
    saved = [*op.tensors, *(i for i in needs if i >= inputs_end)]
    missing = (None,) * ((len(op.outputs) if count is None else count) - results)
    options = [i for i in range(inputs_end) if i not in op.tensors]
    # In the usual case, as short as can be: the places of an input and its gradient among `saved`.
    is_short = len(units) > 0 and results == 1
    pairs = [(place, saved.index(place), saved.index(i)) for place, i in units]

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            outputs: tuple[Tensor, ...] = op.compute(*inputs)
            values = *inputs, *outputs
            ctx.save_for_backward(*[values[i] for i in saved])
            ctx.options = [inputs[i] for i in options]
            ctx.set_materialize_grads(count is not None)
            return outputs[:results]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            tensors, is_last = ctx.saved_tensors, not torch.is_grad_enabled()
            if is_short and is_last and grads[0] is not None:
                result: list[Tensor | None] = [None] * inputs_end
                for place, x, unit_gradient in pairs:
                    if tensors[x] is not None:
                        grad = scaled(grads[0], tensors[unit_gradient])
                        result[place] = _in_dtype(grad, tensors[x].dtype)
                return tuple(result)
            values: list[Any] = [None] * size
            for i, value in zip((*saved, *options), (*tensors, *ctx.options), strict=True):
                values[i] = value
            if not is_last:
                values[inputs_end:] = op.call(*values[:inputs_end])
            dtypes = [x.dtype if isinstance(x, Tensor) else None for x in values[:inputs_end]]
            return tuple(gradients(values, grads + missing, dtypes))

    apply: Callable[..., tuple[Tensor, ...]] = Node.apply
    return apply
