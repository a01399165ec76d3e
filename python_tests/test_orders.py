"""Rényi's and Tsallis' entropies of representations: value and gradient over the whole table."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import (
    DEGENERATE,
    DTYPES,
    FEW_SHAPES,
    ROUNDING,
    SHAPES,
    SPECTRA,
    VALUE_DEFICIENT,
    Tolerance,
    absolute_error,
    assert_value,
    degenerate_case,
    generator,
    gradient,
    gradient_scale,
    in_tiers,
    is_well_conditioned,
    relative_error,
    result_dtype,
    spectrum_case,
)
from hypothesis import given
from hypothesis import strategies as st
from naming import naming
from torch import Tensor

from vne_kernels import linear_entropy, renyi_entropy, tsallis_entropy, vendi_score, vn_entropy
from vne_kernels._core import ops

FLOAT64, FLOAT32 = torch.float64, torch.float32
ORDERS = (0, 0.3, 0.9, 1, 1.2, 2, 3, 4, 5.5, math.inf)
FUNCTIONS = {"renyi": renyi_entropy, "tsallis": tsallis_entropy}

BELOW_ONE = Tolerance(1e-9, 1e-9, "7e-11, order 0.3 near collapse")
"""float64: what rounding the largest eigenvalue does to the smallest, counts here."""


def value_tolerance(dtype: torch.dtype, order: float) -> Tolerance:
    """In float32 that of a deficient rank, whatever the rank. Measured: 3e-6."""
    return BELOW_ONE if dtype == FLOAT64 and order < 1 else VALUE_DEFICIENT[dtype]


def probabilities(z: Tensor, *, normalize: bool = True, weights: Tensor | None = None) -> Tensor:
    """From singular values, by another route than the package's: no Gram matrix, no eigenvalues."""
    z = z.double()
    u = torch.nn.functional.normalize(z, dim=-1) if normalize else z
    if weights is not None:
        u = weights.double().sqrt().unsqueeze(-1) * u
    eig_val = torch.linalg.svdvals(u).square()
    m = eig_val.shape[-1]
    seen = eig_val >= m * torch.finfo(FLOAT64).eps * eig_val[..., :1]
    eig_val = torch.where(seen, eig_val, 0)
    return eig_val / eig_val.sum(-1, keepdim=True)


def exact_renyi(p: Tensor, order: float) -> Tensor:
    if order == math.inf:
        return -p[..., 0].log()
    if order == 1:
        return torch.where(p > 0, -p * torch.where(p > 0, p, 1).log(), 0).sum(-1)
    return powers(p, order).log() / (1 - order)


def exact_tsallis(p: Tensor, order: float) -> Tensor:
    if order == math.inf:
        return 0 * p.sum(-1)
    return exact_renyi(p, 1) if order == 1 else (1 - powers(p, order)) / (order - 1)


def powers(p: Tensor, order: float) -> Tensor:
    return torch.where(p > 0, torch.where(p > 0, p, 1) ** order, 0).sum(-1)


EXACT = {"renyi": exact_renyi, "tsallis": exact_tsallis}


@pytest.mark.parametrize("shape", in_tiers(SHAPES))
@pytest.mark.parametrize("name", SPECTRA)
def test_value(name: str, shape: tuple[int, int]) -> None:
    for dtype in DTYPES if shape in FEW_SHAPES else (FLOAT64, FLOAT32):
        z = spectrum_case(name, shape, dtype)
        p = probabilities(z)
        for kind, function in FUNCTIONS.items():
            for order in ORDERS:
                value = function(z, order)
                assert value.dtype == result_dtype(dtype)
                assert_value(value, EXACT[kind](p, order), value_tolerance(dtype, order))


@pytest.mark.parametrize("name", DEGENERATE)
def test_value_of_degenerate_inputs(name: str) -> None:
    for dtype in (FLOAT64, FLOAT32):
        for shape in ((12, 40), (40, 12)):
            z = degenerate_case(name, shape, dtype)
            for kind, function in FUNCTIONS.items():
                for order in ORDERS:
                    leaf = z.clone().requires_grad_()
                    value = function(leaf, order)
                    value.backward()
                    assert leaf.grad.isfinite().all()
                    assert value >= 0
                    expected = torch.zeros(())
                    if name != "zero_matrix":
                        expected = EXACT[kind](probabilities(z), order)
                    assert_value(value.detach(), expected, value_tolerance(dtype, order))


@pytest.mark.parametrize("options", ["plain", "raw", "weights"])
@pytest.mark.parametrize("shape", FEW_SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_gradient(name: str, shape: tuple[int, int], options: str) -> None:
    weights = torch.rand(shape[:1], generator=generator(1), dtype=FLOAT64)
    keywords = {"plain": {}, "raw": {"normalize": False}, "weights": {"weights": weights}}[options]
    for dtype in (FLOAT64, FLOAT32):
        z = spectrum_case(name, shape, dtype)
        leaf = z.double().requires_grad_()
        p = probabilities(leaf, **keywords)
        for kind, function in FUNCTIONS.items():
            for order in ORDERS:
                actual = gradient(lambda x: function(x, order, **keywords), z)  # noqa: B023
                (exact,) = torch.autograd.grad(EXACT[kind](p, order), leaf, retain_graph=True)
                error, scale = absolute_error(actual, exact), exact.norm() + gradient_scale(z)
                if name != "repeated" or order != math.inf:  # the largest twice: no gradient
                    assert error <= gradient_tolerance(z, order) * scale, (kind, order)


def gradient_tolerance(z: Tensor, order: float) -> float:
    """Of the error over the sizes of gradient and terms. Measured, in the order of the returns:
    5e-12 and 3e-8 (order 0.3, near collapse); 4e-8; 3e-6 and 8e-5.
    """
    if z.dtype == FLOAT64:
        return 1e-10 if order >= 0.9 else 1e-7
    if order not in (1, 2) and order < 2:
        return 1e-6  # computed in float64
    return 2e-5 if is_well_conditioned(z) else 5e-4


def test_gradcheck() -> None:
    z = spectrum_case("relu", (2, 5, 4), FLOAT64).requires_grad_()
    p = torch.rand(2, 5, generator=generator(0), dtype=FLOAT64).requires_grad_()
    for normalize in (True, False):
        for order in (0.4, 1, 1.2, 2, 3):
            for function in FUNCTIONS.values():

                def entropy(z: Tensor, p: Tensor, order=order, function=function, n=normalize):
                    return function(z, order, weights=p, normalize=n)

                assert torch.autograd.gradcheck(entropy, (z, p), atol=1e-7)


def test_halves_get_a_gradient_of_their_own_dtype() -> None:
    for dtype, rounding in ROUNDING.items():
        z = spectrum_case("iid", (17, 33), dtype)
        for order in (0.5, 1, 2, 3):
            grad = gradient(lambda x: renyi_entropy(x, order), z)  # noqa: B023
            assert grad.dtype == dtype
            exact = gradient(lambda x: exact_renyi(probabilities(x), order), z.double())  # noqa: B023
            assert relative_error(grad, exact) <= rounding


@pytest.mark.parametrize("name", [*SPECTRA, *DEGENERATE])
def test_linear_entropy(name: str) -> None:
    """Value and gradient, with weights, against 1 - tr(rho^2) of the reference's spectrum."""
    make = spectrum_case if name in SPECTRA else degenerate_case
    for dtype in (FLOAT64, FLOAT32):
        z = make(name, (17, 33), dtype)
        for weights in (None, torch.linspace(0, 1, 17, dtype=FLOAT64)):
            value = linear_entropy(z, weights=weights)
            assert value.dtype == result_dtype(dtype)
            if name == "zero_matrix":
                assert value == 0
                continue
            leaf = z.double().clone().requires_grad_()
            expected = 1 - probabilities(leaf, weights=weights).square().sum()
            assert_value(value, expected.detach(), VALUE_DEFICIENT[dtype])
            if name != "zero_row":  # the gradient of a norm of 0 is NaN in plain torch
                (exact,) = torch.autograd.grad(expected, leaf)
                actual = gradient(partial(linear_entropy, weights=weights), z)
                scale = exact.norm() + gradient_scale(z)
                assert absolute_error(actual, exact) <= gradient_tolerance(z, 2) * scale
    with pytest.raises(ValueError, match=naming("z", (3,))):
        linear_entropy(torch.ones(3))


@pytest.mark.parametrize("options", ["plain", "raw", "weights"])
@pytest.mark.parametrize("name", [*SPECTRA, *DEGENERATE])
def test_native_kernels_agree_with_those_of_other_devices(name: str, options: str) -> None:
    """Values and gradients of the operators; RankMe's parameter is what is added."""
    for shape in ((12, 20), (20, 12)):
        make = spectrum_case if name in SPECTRA else degenerate_case
        z = torch.stack([make(name, shape, FLOAT64), spectrum_case("iid", shape, FLOAT64)])
        p = torch.linspace(0, 1, shape[0], dtype=FLOAT64).expand(z.shape[:-1])
        weights = p / p.sum(-1, keepdim=True) if options == "weights" else None
        for function in ops.BY_EIGENVALUES:
            for parameter in (1e-7,) if function == "rankme" else (0, 0.6, 1, 1.7, 2, 3, 4, 5.5):
                given = (z, weights, parameter, options == "plain", "auto", 0.0)
                value = ops.OPERATORS[function].call(*given)
                native = value, *ops.OPERATORS[f"{function}_grad"].call(*given)
                (alone,) = ops.by_eigenvalues(function, *given, with_grad=False)
                plain = alone, *ops.by_eigenvalues(function, *given, with_grad=True)
                for x, y in zip(native, plain, strict=True):
                    assert absolute_error(x, y) <= 1e-7 * (1 + y.norm()), (function, parameter)


# ---- limits, properties --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECTRA)
def test_orders_are_continuous(name: str) -> None:
    """At 1 and 2, where another way of computing begins, and towards 0 and infinity."""
    z = spectrum_case(name, (33, 17), FLOAT64)
    for function in FUNCTIONS.values():
        for order in (1.0, 2.0, 0.5, 1.5):
            middle = function(z, order)
            for near in (order - 1e-9, order + 1e-9):
                torch.testing.assert_close(function(z, near), middle, rtol=0, atol=1e-7)
        torch.testing.assert_close(function(z, 1e-10), function(z, 0), rtol=0, atol=1e-7)
        torch.testing.assert_close(function(z, 1e9), function(z, math.inf), rtol=0, atol=1e-7)


def test_order_one_is_von_neumann_order_zero_the_rank() -> None:
    z = spectrum_case("rank3", (4, 33, 17), FLOAT64)
    torch.testing.assert_close(renyi_entropy(z, 1), vn_entropy(z), rtol=0, atol=1e-15)
    torch.testing.assert_close(tsallis_entropy(z, 1), vn_entropy(z), rtol=0, atol=1e-15)
    assert torch.equal(renyi_entropy(z, 0).exp().round(), torch.linalg.matrix_rank(z).double())
    assert torch.equal(tsallis_entropy(z, 0).round() + 1, torch.linalg.matrix_rank(z).double())


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 2**20),
    name=st.sampled_from(sorted(SPECTRA)),
    normalize=st.booleans(),
    low=st.floats(0, 6),
    high=st.floats(0, 6) | st.just(math.inf),
)
def test_properties(
    shape: tuple[int, int], seed: int, name: str, normalize: bool, low: float, high: float
) -> None:
    """Falls with the order, within [0, log m]; rows in any order, rotated, of any common factor."""
    n, d = shape
    low, high = sorted((low, high))
    z = spectrum_case(name, shape, FLOAT64, seed)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator(seed), dtype=FLOAT64)).Q
    same = 7e3 * (z @ rotation)[torch.randperm(n, generator=generator(seed))]
    at_low, at_high = (renyi_entropy(z, order, normalize=normalize) for order in (low, high))
    assert -1e-12 <= at_high <= at_low + 1e-9 <= math.log(min(n, d)) + 2e-9
    tolerance = 1e-5 if low < 1 else 1e-9  # of an eigenvalue that is 0 in one and not in the other
    moved = renyi_entropy(same, low, normalize=normalize)
    torch.testing.assert_close(moved, at_low, rtol=0, atol=tolerance)


# ---- what every input gives ----------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 0.5, 1, 1.3, 2, 3, math.inf])
def test_nan_stays_in_its_sample_and_zero_rows_are_absent(order: float) -> None:
    for function in FUNCTIONS.values():
        for normalize in (True, False):
            z = spectrum_case("iid", (4, 9, 6), FLOAT32)
            z[1, 3, 2], z[2, 0, 0], z[3, 5:] = math.nan, math.inf, 0
            z.requires_grad_()
            value = function(z, order, normalize=normalize)
            assert value.isnan().tolist() == [False, True, True, False]
            torch.testing.assert_close(
                value[3], function(z[3, :5], order, normalize=normalize), rtol=1e-5, atol=1e-6
            )
            (grad,) = torch.autograd.grad(value.sum(), z)
            assert grad[::3].isfinite().all()
            if order not in (0, math.inf):
                assert grad[1].isnan().all()


def test_weights_count_up_to_a_factor() -> None:
    z = spectrum_case("relu", (9, 6), FLOAT64)
    p = torch.linspace(0, 1, 9, dtype=FLOAT64)
    twice = torch.cat([z, z[4:5]])
    ones = torch.ones(9, dtype=FLOAT64)
    ones[4] = 2
    for order in (0.5, 1, 2, 3):
        torch.testing.assert_close(
            renyi_entropy(z, order, weights=p), renyi_entropy(z, order, weights=1e3 * p)
        )
        torch.testing.assert_close(
            renyi_entropy(twice, order), renyi_entropy(z, order, weights=ones)
        )
        assert renyi_entropy(z, order, weights=-p).isnan()


def test_lengths_of_rows_beyond_the_range_of_their_squares() -> None:
    """Rows that are not normalized, in float32 and float64."""
    for dtype, factor in ((FLOAT32, 1e-25), (FLOAT32, 1e25), (FLOAT64, 1e-100), (FLOAT64, 1e100)):
        z = spectrum_case("iid", (9, 6), dtype)
        for order in (0.5, 1, 2, 3):
            expected = renyi_entropy(z, order, normalize=False)
            scaled = renyi_entropy((z.double() * factor).to(dtype), order, normalize=False)
            torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("order", [-1, math.nan, "2", True, None])
def test_orders_that_are_none(order: object) -> None:
    error = ValueError if order in (-1, math.nan) else TypeError
    z = torch.ones(3, 2)
    for function, name in ((renyi_entropy, "alpha"), (tsallis_entropy, "q"), (vendi_score, "q")):
        with pytest.raises(error, match=naming(name)):
            function(z, order)


# ---- torch ---------------------------------------------------------------------------------------


def test_compile_and_vmap() -> None:
    def loss(z: Tensor) -> Tensor:
        orders = [renyi_entropy(z, order) + tsallis_entropy(z, order) for order in (0.5, 1, 2, 3)]
        return torch.stack(orders).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    z = spectrum_case("relu", (6, 9), FLOAT64)
    torch.testing.assert_close(compiled(z), loss(z))
    assert relative_error(gradient(compiled, z), gradient(loss, z)) <= 1e-12
    batch = spectrum_case("relu", (3, 6, 9), FLOAT64)
    torch.testing.assert_close(torch.vmap(loss)(batch), torch.stack([loss(x) for x in batch]))


def test_a_second_derivative_is_an_error_where_there_is_none() -> None:
    z = spectrum_case("iid", (5, 4), FLOAT64).requires_grad_()
    for order in (0.5, 2, 3):
        (grad,) = torch.autograd.grad(renyi_entropy(z, order), z, create_graph=True)
        with pytest.raises(NotImplementedError, match="renyi_entropy"):
            torch.autograd.grad(grad.square().sum(), z)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("order", [0, 0.5, 1, 2, 3, math.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_rows_of_any_scale_are_as_rows_scaled(
    order: float, normalize: bool, dtype: torch.dtype
) -> None:
    z = spectrum_case("iid", (12, 7), dtype)
    expected = renyi_entropy(z, order, normalize=normalize)
    gradient_expected = gradient(lambda z: renyi_entropy(z, order, normalize=normalize), z)
    for exponent in (-100, -40, 40, 100):  # 1e-30 to 1e30; powers of 2 round nothing
        factor = 2.0**exponent
        found = renyi_entropy(factor * z, order, normalize=normalize)
        torch.testing.assert_close(
            found, expected, rtol=1e-5 if dtype == FLOAT32 else 1e-12, atol=0
        )
        found = gradient(lambda z: renyi_entropy(z, order, normalize=normalize), factor * z)
        torch.testing.assert_close(factor * found, gradient_expected, rtol=1e-4, atol=1e-6)


def test_rows_of_different_scales_count_alike() -> None:
    z = spectrum_case("iid", (12, 7), FLOAT32)
    scales = torch.logspace(-30, 30, 12)[:, None]
    for order in (0.5, 1, 2, 3):
        torch.testing.assert_close(
            renyi_entropy(scales * z, order), renyi_entropy(z, order), rtol=1e-5, atol=0
        )


def test_the_base_of_the_logarithm() -> None:
    z = spectrum_case("iid", (12, 7), FLOAT64)
    for base in (2, 10.0, 0.5):
        assert vn_entropy(z, base=base) == pytest.approx(vn_entropy(z).item() / math.log(base))
        for order in (0.5, 1, 2, math.inf):
            found = renyi_entropy(z, order, base=base)
            assert found == pytest.approx(renyi_entropy(z, order).item() / math.log(base))
    assert vn_entropy(torch.eye(4), base=2) == 2
