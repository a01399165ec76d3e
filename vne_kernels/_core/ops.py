"""The operators as torch sees them: a registry and, at the end of the file, the declarations.

A declaration makes all that torch needs of an operator: the fake kernel, autograd in reverse mode
(derivatives.py), torch.func and forward mode (transforms.py), the vmap rule, and an entry in
`OPERATORS`. From these entries backends.py makes the fallback to the host, the Triton kernels and
the rule of torch.compile. Names and order of arguments are read from the schema.

Schemas and checks are in csrc/, kernels in csrc/<backend>/. The operators take every argument and
validate little: `vne_kernels.functional` is the public face. Equation numbers: csrc/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vne_kernels._core import hessian, spectra
from vne_kernels._core.cosine import mean_cosine
from vne_kernels._core.derivatives import (
    Derivative,
    Operator,
    autograd_of,
    by_operator,
    by_twin,
    by_unit_gradients,
    eager_node,
    hessian_product,
)
from vne_kernels._core.dtypes import compute_dtype, to_float64
from vne_kernels._core.exporters import refuse_onnx
from vne_kernels._core.transforms import is_transformed, last_step, step, wants_grad, with_gradient

OPERATORS: dict[str, Operator] = {}
"""All operators that have been declared, by name."""

FUNCTIONALS: list[str] = []
"""The functions of the spectrum, NAME(z, weights, <parameters,> normalize, method, eps), each with
its twin NAME_grad."""


# ---- the registry --------------------------------------------------------------------------------


def operator(
    name: str,
    *sizes: str,
    derivative: Callable[[Operator], Derivative] | None = None,
    once: str = "",
    kernel: Callable[..., Any] | None = None,
    fake: Callable[..., Any] | None = None,
) -> Operator:
    """Declares an operator, whose schema is defined.

    Args:
        sizes: of each output that is no gradient, the sizes after the batch, such as "m m" for
            (..., m, m); m is the smaller one of n and d. Default: none.
        derivative: one of the ways of derivatives.py. Default: an error.
        once: what the error says where a derivative is not offered: the functions that a user may
            have called, and a way round.
        kernel: the operator in plain torch, for the devices without native kernels of it.
        fake: its fake kernel, where names and sizes do not say it.
    """
    op = OPERATORS[name] = Operator(name, once, has_kernels=kernel is None)
    qualified = f"vne_kernels::{name}"
    torch.library.register_fake(qualified, fake or _fake_kernel(op, sizes))
    torch.library.register_vmap(qualified, _vmap_rule(op))
    if kernel is not None:
        torch.library.impl(qualified, "CompositeExplicitAutograd")(kernel)
    if derivative is None:
        torch.library.register_autograd(qualified, partial(_refuse, once))
    else:
        op.derivative = derivative(op)
        backward, setup_context = autograd_of(op, op.derivative)
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    return op


def functional(
    name: str,
    *,
    once: str = "",
    second_order: Operator | None = None,
    kernel: Callable[..., Any] | None = None,
    **options: Any,
) -> Callable[..., Tensor]:
    """Declares a function of leading tensors, (...), by the operators NAME and NAME_grad.

    The latter has the outputs (value, grad_x, ...). It may stand alone.

    Args:
        once: what the error says where a second derivative is asked for.
        second_order: the operator of the second derivative, where there is one.
        kernel: both in plain torch, as `operator` takes them: the outputs of NAME_grad, of which
            the first suffices with ``with_grad=False``.
        options: of NAME_grad, as `operator` takes them.

    Returns:
        The function of checked arguments, differentiable in every mode: see `entry`.
    """
    way = partial(by_unit_gradients, second=second_order)
    with_grad = None if kernel is None else partial(kernel, with_grad=True)
    options |= {"derivative": way, "once": once, "kernel": with_grad}
    gradient = value = operator(f"{name}_grad", **options)
    if hasattr(torch.ops.vne_kernels, name):
        first = None if kernel is None else lambda *args: kernel(*args, with_grad=False)[0]
        value = operator(name, derivative=partial(by_twin, twin=gradient), kernel=first)
    if gradient.arguments[:2] == ["z", "weights"]:
        FUNCTIONALS.append(name)

    def unit_gradients(*args: Any) -> tuple[Tensor, ...]:
        return tuple(gradient.call(*args)[1:])

    if second_order is None:
        gradient_step = last_step(unit_gradients, once)
    else:
        last = last_step(second_order.call, second_order.once)
        product = hessian_product(gradient, second_order, last)
        gradient_step = step(unit_gradients, product, product)
    transformed = with_gradient(_first_output(value), gradient_step)
    return entry(value, gradient, transformed, tensors=len(gradient.outputs) - 1)


def entry(
    value: Operator,
    twin: Operator,
    transformed: Callable[..., Any],
    *,
    tensors: int,
    results: int = 1,
) -> Callable[..., Any]:
    """The leading outputs of an operator, by the way that the asked derivative needs.

    Args:
        value: the operator where no derivative is asked for.
        twin: the same where autograd wants a gradient.
        transformed: a step, for torch.func and forward mode.
        tensors: how many of the arguments, the leading ones, are tensors.
        results: how many outputs: a tensor for one, otherwise a tuple.
    """
    node = eager_node(twin, results)

    def leading(outputs: Any) -> Any:
        if isinstance(outputs, Tensor):
            return outputs
        return outputs[0] if results == 1 else tuple(outputs[:results])

    def call(*args: Any) -> Any:
        asked = args[:tensors]
        if is_transformed(*asked):
            return transformed(*args)
        with_grad = wants_grad(*asked)
        if torch.compiler.is_compiling():
            return leading((twin if with_grad else value).call(*args))
        return leading(node(*args) if with_grad else value.compute(*args))

    return call


def _first_output(op: Operator) -> Callable[..., Tensor]:
    call: Callable[..., Any] = op.call
    return call if len(op.outputs) == 1 else lambda *args: call(*args)[0]


def _refuse(reason: str, ctx: Any, *grads: Tensor) -> Any:
    raise NotImplementedError(reason)


def _fake_kernel(op: Operator, sizes: Sequence[str]) -> Callable[..., Any]:
    places = [op.input_of(output) for output in op.outputs]

    def side(z: Tensor, letter: str) -> Any:
        if letter == "m":
            return torch.sym_min(*z.shape[-2:])
        return z.shape["nd".index(letter) - 2] if letter in "nd" else int(letter)

    def fake(*args: Any) -> Any:
        refuse_onnx(op.name)
        z, declared, result = args[op.sample], iter(sizes), []
        for place in places:
            dtype = compute_dtype(z.dtype)
            if place is None:
                shape = [*z.shape[:-2], *(side(z, x) for x in next(declared, "").split())]
            else:
                x = args[place]
                shape = [0] if x is None else x.shape
                dtype = x.dtype if x is not None and x.is_complex() else dtype
            result.append(z.new_empty(shape, dtype=dtype))
        return result[0] if len(result) == 1 else tuple(result)

    return fake


def _vmap_rule(op: Operator) -> Callable[..., Any]:
    """Every operator takes leading batch dimensions: a mapped one becomes the first of them."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        batched = [
            arg
            if not isinstance(arg, Tensor)
            else arg.unsqueeze(0).expand(info.batch_size, *arg.shape)
            if dim is None
            else arg.movedim(dim, 0)
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        result = op.call(*batched)
        if isinstance(result, Tensor):
            return result, 0
        # Without weights their gradient is (0,), which has no batch.
        return tuple(result), tuple(None if out.shape == (0,) else 0 for out in result)

    return rule


# ---- functions of the spectrum -------------------------------------------------------------------

_BY_TORCH = (
    "where eigenvalues differ, torch.linalg.eigvalsh(x @ x.mT) of the rows x = "
    "torch.nn.functional.normalize(z, dim=-1) / n**0.5 has further derivatives"
)

torch.library.define(
    "vne_kernels::vn_entropy_hvp",
    "(Tensor z, Tensor direction_z, Tensor? weights, Tensor? direction_weights, bool normalize, "
    "float eps) -> (Tensor product_z, Tensor product_weights)",
)
vn_entropy = functional(
    "vn_entropy",
    second_order=operator(
        "vn_entropy_hvp",
        kernel=hessian.hessian_product,
        once="vn_entropy, get_vne, doe_loss, effective_rank, and renyi_entropy, tsallis_entropy "
        f"and vendi_score of order 1 are differentiable twice; {_BY_TORCH}",
    ),
)
"""S (...) of (z, weights, normalize, method, eps)."""

purity = functional(
    "purity",
    once="renyi_entropy, tsallis_entropy and vendi_score of order 2, linear_entropy and "
    "participation_ratio are differentiable once; (x @ x.mT).square().sum() of the rows x = "
    "torch.nn.functional.normalize(z, dim=-1) / n**0.5 is tr(rho^2) with further derivatives",
)
"""tr(rho^2) / tr(rho)^2 (...) of (z, weights, normalize, method, eps)."""


# ---- eigenvalues ---------------------------------------------------------------------------------
# Eigenvectors have no gradient where eigenvalues meet, and none is offered.

_SPECTRUM_ONCE = (
    "spectrum, rankme, and renyi_entropy, tsallis_entropy and vendi_score of other orders than 1 "
    f"and 2 are differentiable once; {_BY_TORCH}"
)
_spectrum_backward = operator("spectrum_backward", once=_SPECTRUM_ONCE)
_spectrum_eigh = operator(
    "spectrum_eigh", "m", "m m", derivative=partial(by_operator, backward=_spectrum_backward)
)
_spectrum = operator("spectrum", "m", derivative=partial(by_twin, twin=_spectrum_eigh))

_eigenvalues_along = last_step(hessian.eigenvalues_along, _spectrum_backward.once)
_eigenvalues_backward = last_step(_spectrum_backward.call, _spectrum_backward.once)


def _spectrum_gradients(values: list[Any], grads: tuple[Any, ...]) -> Any:
    z, weights, normalize, eps, eigenvectors = values
    return _eigenvalues_backward(grads[0], z, eigenvectors, weights, normalize, eps)


def _spectrum_tangent(values: list[Any], tangents: tuple[Any, ...]) -> Any:
    z, weights, normalize, eps, eigenvectors = values
    direction = torch.zeros_like(z) if tangents[0] is None else tangents[0]
    return _eigenvalues_along(z, direction, weights, tangents[1], eigenvectors, normalize, eps)


_spectrum_step = step(_spectrum_eigh.call, _spectrum_gradients, _spectrum_tangent, differentiable=1)
spectrum: Callable[..., Tensor] = entry(
    _spectrum, _spectrum_eigh, lambda *args: _spectrum_step(*args)[0], tensors=2
)
"""Eigenvalues of rho (..., m), descending, of (z, weights, normalize, eps)."""


def _rankme_of(values: Tensor, p: Tensor | None, added: float) -> tuple[Tensor, Tensor]:
    count = None if p is None else (p != 0).sum(-1)
    return spectra.rankme(values, added, count), spectra.rankme_slope(values, added, count)


BY_EIGENVALUES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "renyi_entropy": lambda values, _, order: (
        spectra.renyi_entropy(values, order),
        spectra.entropy_slope(values, order, renyi=True),
    ),
    "tsallis_entropy": lambda values, _, order: (
        spectra.tsallis_entropy(values, order),
        spectra.entropy_slope(values, order, renyi=False),
    ),
    "rankme": _rankme_of,
}
"""Functions of the spectrum with native kernels on the CPU alone: (eigenvalues, weights, parameter)
-> the value and its slope in each eigenvalue."""


def by_eigenvalues(
    name: str,
    z: Tensor,
    weights: Tensor | None,
    parameter: float,
    normalize: bool,
    _: str,
    eps: float,
    *,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    """The operator NAME_grad of one of these on any device: value, grad_z and grad_weights."""
    dtype = compute_dtype(z.dtype)
    wide, p = to_float64(z), None if weights is None else to_float64(weights)
    if not with_grad:
        values = _spectrum.call(wide, p, normalize, eps)
        alone = BY_EIGENVALUES[name](values, p, parameter)[0]
        return (alone.to(z.device, dtype),)
    values, vectors = _spectrum_eigh.call(wide, p, normalize, eps)
    value, slope = BY_EIGENVALUES[name](values, p, parameter)
    gradients = _spectrum_backward.call(slope, wide, vectors, p, normalize, eps)
    value, grad_z, grad_weights = (x.to(z.device, dtype) for x in (value, *gradients))
    return value, grad_z, grad_weights


renyi_entropy, tsallis_entropy, rankme = (
    functional(name, once=_SPECTRUM_ONCE, kernel=partial(by_eigenvalues, name))
    for name in BY_EIGENVALUES
)
"""Each (...) of (z, weights, order, normalize, method, eps), of rho over its trace, in nats. In the
place of the order `rankme` has what is added to the probabilities."""


# ---- difference of entropies ---------------------------------------------------------------------

_DOE_ONCE = (
    "doe_loss is differentiable once; -vn_entropy(z1) - beta * "
    "torch.nn.functional.cosine_similarity(z1, z2, dim=-1).mean(-1) is the same loss, and "
    "differentiable twice"
)
_doe_loss_backward = operator("doe_loss_backward", once=_DOE_ONCE)
_doe_loss_grad = operator(
    "doe_loss_grad",
    *("", "", "n d", "4 n"),
    derivative=partial(by_operator, backward=_doe_loss_backward),
)
_doe_loss = operator("doe_loss", derivative=partial(by_twin, twin=_doe_loss_grad))
operator("cosine", "", "4 n", once=_DOE_ONCE)


def weighted_doe_terms(
    z1: Tensor, z2: Tensor, p: Tensor | None, method: str, eps: float
) -> tuple[Tensor, Tensor]:
    """As `doe_terms`, with p (..., n) the weights of the pairs, not fused."""
    return vn_entropy(z1, p, True, method, eps), mean_cosine(z1, z2, p, eps)


doe_terms = entry(
    _doe_loss,
    _doe_loss_grad,
    lambda z1, z2, *options: weighted_doe_terms(z1, z2, None, *options),
    tensors=2,
    results=2,
)
"""(S of z1, mean cosine), each (...), of (z1, z2, method, eps)."""


# ---- density matrices ----------------------------------------------------------------------------
# rho is a sum over rows, and so a sum over processes: equation (12).

DENSITY_ONCE = (
    "an entropy of a density matrix, and vn_entropy of a batch that is spread over processes, "
    "are differentiable once; vn_entropy(z) of representations is differentiable twice"
)
_density_backward = operator("density_backward", once=DENSITY_ONCE)
operator("density", "d d", derivative=partial(by_operator, backward=_density_backward))
density_entropy = functional("density_entropy", once=DENSITY_ONCE)
"""S (...) of a positive definite rho, by (rho, method)."""


# ---- the pole table ------------------------------------------------------------------------------

POLE_TABLE: dict[torch.dtype, list[list[float]]] = {
    dtype: torch.ops.vne_kernels.pole_table(torch.empty(0, dtype=dtype)).tolist()
    for dtype in (torch.float32, torch.float64)
}
"""(c0, 0) and then (t, w) of each pole of equation (6), by the dtype of the computation."""
