"""A row of weight 0 is absent, whatever it holds: the results are those of the other rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import DTYPES, VALUE, generator, result_dtype, spectrum_case
from torch import Tensor

from vne_kernels import renyi_entropy, spectrum, vn_entropy

pytestmark = pytest.mark.every_backend

_ops = torch.ops.vne_kernels

SHAPES = ((6, 9), (21, 7))
LARGE_SHAPE = (131, 140)
"""Beyond the matrices that a block of the CUDA kernels holds in float64."""
CONTENTS = (math.nan, math.inf, 1e30)
ABSENT = 4
OTHERS = {torch.float64: 1e-10, torch.float32: 2e-5}
"""|difference| of a gradient to that without the row, over its size. Measured: 7e-15 and 4e-6."""


def sum_of_squares(z: Tensor, **options: object) -> Tensor:
    return spectrum(z, **options).square().sum(-1)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "entropy_by_eigh": partial(vn_entropy, method="eigh"),
    "entropy_by_poles": partial(vn_entropy, method="poles"),
    "spectrum": sum_of_squares,
    "entropy_as_given": partial(vn_entropy, normalize=False),
    "spectrum_as_given": partial(sum_of_squares, normalize=False),
    "renyi_2": lambda z, **options: renyi_entropy(z, 2, **options),
    "renyi_3": lambda z, **options: renyi_entropy(z, 3, **options),
}


def with_row(rows: Tensor, content: float) -> Tensor:
    """rows (n, d) with another one that holds nothing but `content` (..., n + 1, d)."""
    row = torch.full_like(rows[:1], content, dtype=torch.float64).to(rows.dtype)
    return torch.cat([rows[:ABSENT], row, rows[ABSENT:]])


def weights_of(rows: Tensor) -> Tensor:
    weights = torch.rand(len(rows), generator=generator(3), dtype=torch.float64) + 0.1
    return (weights / weights.sum()).to(result_dtype(rows.dtype))


def differentiated(
    function: Callable[..., Tensor], z: Tensor, weights: Tensor, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """The value, and its gradients in z and weights."""
    leaves = [tensor.clone().requires_grad_() for tensor in (z, weights)]
    value = function(leaves[0], weights=leaves[1], **options)
    return (value.detach(), *torch.autograd.grad(value, leaves))


def assert_same_gradient(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    dtype = result_dtype(actual.dtype)
    tolerance = max(OTHERS[dtype], 2 * torch.finfo(actual.dtype).eps)
    error = (actual.double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm()


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_results_are_those_without_the_row(
    function: Callable[..., Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    content: float,
) -> None:
    rows = spectrum_case("iid", shape, dtype)
    weights = weights_of(rows)
    expected, grad_rows, grad_weights = differentiated(function, rows, weights)
    padded = with_row(weights[:, None], 0)[:, 0]
    z = with_row(rows, content)
    value, grad_z, grad_padded = differentiated(function, z, padded)
    torch.testing.assert_close(
        value, expected, rtol=VALUE[dtype].relative, atol=VALUE[dtype].absolute
    )
    with torch.no_grad():
        alone = function(z, weights=padded)
    torch.testing.assert_close(
        alone, expected, rtol=VALUE[dtype].relative, atol=VALUE[dtype].absolute
    )
    others = torch.arange(len(z)) != ABSENT
    assert (grad_z[ABSENT] == 0).all()
    assert_same_gradient(grad_z[others], grad_rows)
    assert_same_gradient(grad_padded[others], grad_weights)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_of_a_large_matrix(function: Callable[..., Tensor], backend: str) -> None:
    if backend == "triton" and function is FUNCTIONS["entropy_by_poles"]:
        pytest.skip("the interpreter takes minutes for 50 poles of this size")
    rows = spectrum_case("iid", LARGE_SHAPE, torch.float64)
    weights = weights_of(rows)
    _, grad_rows, _ = differentiated(function, rows, weights)
    padded = with_row(weights[:, None], 0)[:, 0]
    _, grad_z, _ = differentiated(function, with_row(rows, math.nan), padded)
    assert (grad_z[ABSENT] == 0).all()
    assert_same_gradient(grad_z[torch.arange(len(grad_z)) != ABSENT], grad_rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("content", CONTENTS)
def test_gradients_of_the_operators_are_zero_there(content: float, shape: tuple[int, int]) -> None:
    rows = spectrum_case("iid", shape, torch.float32)
    z, weights = with_row(rows, content), with_row(weights_of(rows)[:, None], 0)[:, 0]
    options = (True, 1e-12)
    rho = _ops.density(z, weights, *options)
    torch.testing.assert_close(rho, _ops.density(rows, weights_of(rows), *options))
    eigenvalues, eigenvectors = _ops.spectrum_eigh(z, weights, *options)
    gradients = [
        _ops.vn_entropy_grad(z, weights, True, "auto", 1e-12)[1:],
        _ops.purity_grad(z, weights, True, "auto", 1e-12)[1:],
        _ops.spectrum_backward(eigenvalues, z, eigenvectors, weights, *options),
        _ops.density_backward(rho, z, weights, *options),
    ]
    for grad_z, grad_weights in gradients:
        assert grad_z.isfinite().all()
        assert grad_weights.isfinite().all()
        assert (grad_z[ABSENT] == 0).all()
        assert grad_weights[ABSENT] == 0


def test_a_batch_of_nothing_but_absent_rows_is_one_of_zeros() -> None:
    z, weights = torch.full((3, 4, 5), math.nan), torch.zeros(3, 4)
    assert (_ops.vn_entropy(z, weights, True, "auto", 1e-12) == 0).all()
    assert (_ops.spectrum(z, weights, True, 1e-12) == 0).all()
    assert (_ops.density(z, weights, True, 1e-12) == 0).all()


@pytest.mark.parametrize("weight", [-0.1, math.nan])
def test_a_negative_weight_or_nan_next_to_it_is_nan(weight: float) -> None:
    z, weights = torch.randn(2, 4, 5, generator=generator(0)), torch.full((2, 4), 0.25)
    weights[:, 1] = 0
    weights[0, 2] = weight
    for value in (
        _ops.vn_entropy(z, weights, True, "auto", 1e-12),
        _ops.spectrum(z, weights, True, 1e-12)[:, 0],
    ):
        assert value.isnan().tolist() == [True, False]
