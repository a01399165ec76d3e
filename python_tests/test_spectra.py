"""Functions of a spectrum against mpmath: values and derivatives, at and around their limits."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mpf

from vne_kernels._core import ops, spectra

ORDERS = [
    0,
    1e-9,
    0.3,
    0.5,
    0.51,
    0.9,
    1 - 1e-6,
    1 - 1e-12,
    1,
    1 + 1e-9,
    1.3,
    1.4999,
    1.5,
    2,
    3,
    40,
]
SPECTRA = {
    "random": torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "decaying": torch.logspace(2, -8, 25, dtype=torch.float64),
    "flat, of rank 2": torch.tensor([1.0, 1, 0, 0], dtype=torch.float64),
    "pure": torch.tensor([3.0, 0, 0], dtype=torch.float64),
    "one": torch.tensor([0.25], dtype=torch.float64),
}
TOLERANCE = 1e-14
"""Measured: 3e-16 in value, relative to the larger of 1 and the exact; 5e-15 in gradient."""


def exact_tsallis(p: list[mpf], q: float) -> mpf:
    p = [x for x in p if x > 0]
    if q == 1:
        return -sum(x * mpmath.log(x) for x in p)
    return (1 - sum(x ** mpf(q) for x in p)) / (mpf(q) - 1)


def exact_renyi(p: list[mpf], alpha: float) -> mpf:
    p = [x for x in p if x > 0]
    if alpha == 1:
        return exact_tsallis(p, 1)
    return mpmath.log(sum(x ** mpf(alpha) for x in p)) / (1 - mpf(alpha))


EXACT = {"renyi_entropy": exact_renyi, "tsallis_entropy": exact_tsallis}


def by_operator(function: str, values: torch.Tensor, order: float) -> torch.Tensor:
    """The native operator, of rows whose eigenvalues these are."""
    rows = torch.diag(values.sqrt())
    return getattr(ops, function)(rows, None, order, False, "auto", 0.0)


def of_eigenvalues(exact: Callable[..., mpf], values: list[mpf], order: float) -> mpf:
    total = sum(values)
    return exact([value / total for value in values], order)


@pytest.fixture(autouse=True)
def digits() -> object:
    with mpmath.workdps(50):
        yield


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("function", EXACT)
def test_values(function: str, name: str) -> None:
    for order in ORDERS:
        value = getattr(spectra, function)(SPECTRA[name], order)
        exact = of_eigenvalues(EXACT[function], [mpf(x) for x in SPECTRA[name].tolist()], order)
        assert abs(float(value) - exact) <= TOLERANCE * max(1, exact), order
        native = float(by_operator(function, SPECTRA[name], order))
        assert abs(native - exact) <= TOLERANCE * max(1, exact), order


@pytest.mark.parametrize("name", ["random", "decaying"])
@pytest.mark.parametrize("function", EXACT)
def test_gradients(function: str, name: str) -> None:
    """In the logarithms of the first and the last eigenvalue, where none of them is 0."""
    values = [mpf(x) for x in SPECTRA[name].tolist()]
    for order in ORDERS:
        leaf = SPECTRA[name].clone().requires_grad_()
        getattr(spectra, function)(leaf, order).backward()
        slope = spectra.entropy_slope(SPECTRA[name], order, renyi=function == "renyi_entropy")
        rows = SPECTRA[name].clone().requires_grad_()
        by_operator(function, rows, order).backward()
        for k in (0, -1):

            def moved(x: mpf, k: int = k, order: float = order) -> mpf:
                return of_eigenvalues(EXACT[function], [*values[:k], x, *values[k:][1:]], order)

            exact = mpmath.diff(moved, values[k])
            for grad in (leaf.grad, slope, rows.grad):
                assert values[k] * abs(float(grad[k]) - exact) <= TOLERANCE, order


@pytest.mark.parametrize("function", EXACT)
def test_gradients_are_finite_where_eigenvalues_are_zero(function: str) -> None:
    for name in ("flat, of rank 2", "pure"):
        for order in (*ORDERS, math.inf):
            leaf = SPECTRA[name].clone().requires_grad_()
            getattr(spectra, function)(leaf, order).backward()
            assert leaf.grad.isfinite().all(), (name, order)


def test_infinite_order() -> None:
    values = SPECTRA["decaying"]
    largest = float(values[0] / values.sum())
    assert float(spectra.renyi_entropy(values, math.inf)) == pytest.approx(-math.log(largest))
    assert float(spectra.renyi_entropy(values, 1e7)) == pytest.approx(-math.log(largest), rel=1e-6)
    assert float(spectra.tsallis_entropy(values, math.inf)) == 0
    assert float(spectra.tsallis_entropy(values, 1e7)) == pytest.approx(0, abs=1e-6)


def test_order_zero_counts_the_rank_that_rounding_leaves() -> None:
    values = torch.tensor([1.0, 1e-3, 1e-15, 1e-17, 0], dtype=torch.float64)
    assert torch.equal(
        spectra.resolved(values), torch.tensor([1, 1e-3, 0, 0, 0], dtype=torch.float64)
    )
    near = torch.tensor([1.0, 1e-3, 2e-15, 1e-17, 0], dtype=torch.float64)
    assert float(spectra.renyi_entropy(near, 0)) == pytest.approx(math.log(3))
    assert float(spectra.tsallis_entropy(near, 0)) == pytest.approx(2)
    assert np.linalg.matrix_rank(np.diag(near.numpy()), hermitian=True) == 3


@pytest.mark.parametrize("order", [0, 0.4, 0.9, 1, 1.2, 2, 7, math.inf])
@pytest.mark.parametrize("function", EXACT)
def test_batches_with_zeros_and_nan(function: str, order: float) -> None:
    values = torch.tensor([[0.5, 0.25, 0.25], [0, 0, 0], [math.nan, 1, 0]]).requires_grad_()
    result = getattr(spectra, function)(values, order)
    alone = getattr(spectra, function)(values[0], order)
    assert torch.equal(result[0], alone)
    assert result[1] == 0
    assert math.copysign(1, result[1]) == 1  # not -0.
    assert result[2].isnan()
    (grad,) = torch.autograd.grad(result[:2].sum(), values)
    assert grad[:2].isfinite().all()
    assert (grad[1] == 0).all()


def test_rankme_of_known_singular_values() -> None:
    """As its paper writes it, in mpmath."""
    singular = [mpf(x) for x in (5.0, 2.0, 0.5, 0.0)]
    for eps in (1e-7, 0.0):
        p = [s / sum(singular) + mpf(eps) for s in singular]
        exact = mpmath.exp(-sum(x * mpmath.log(x) for x in p if x > 0))
        squares = torch.tensor([float(s) ** 2 for s in singular], dtype=torch.float64)
        leaf = squares.clone().requires_grad_()
        value = spectra.rankme(leaf, eps)
        assert float(value) == pytest.approx(float(exact), rel=1e-14)
        value.backward()
        assert leaf.grad.isfinite().all()
        torch.testing.assert_close(spectra.rankme_slope(squares, eps, None), leaf.grad)
