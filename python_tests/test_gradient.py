"""dS/dz, dS/dweights and the gradient of the spectrum: accuracy, finiteness, gradcheck."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from statistics import mean

import pytest
import torch
from cases import (
    DEGENERATE,
    DEGENERATE_SHAPES,
    DTYPES,
    FEW_SHAPES,
    GRADIENT_FLOAT64,
    GRADIENT_OF_EIGH,
    GRADIENT_OF_EIGH_TINY,
    GRADIENT_WELL_CONDITIONED,
    LAYOUT_BASE_SHAPE,
    LAYOUTS,
    ROUNDING,
    SHAPES,
    SPECTRA,
    TABLE_SHAPE,
    WELL_CONDITIONED,
    absolute_error,
    degenerate_case,
    eigh_error,
    gaussian,
    generator,
    gradient,
    gradient_case,
    gradient_cases,
    gradient_scale,
    hessian_product,
    in_tiers,
    relative_error,
    spectrum_case,
)

from vne_kernels import reference, spectrum, vn_entropy

pytestmark = pytest.mark.every_backend

FLOATS = (torch.float64, torch.float32)
NON_FINITE = (math.nan, math.inf, -math.inf)


# ---------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------


@cache
def errors(name: str, shape: tuple[int, int], method: str, backend: str) -> list[float]:
    """Errors of every one of `gradient_cases`; cached, since several tests read them."""
    return [
        absolute_error(gradient(vn_entropy, case.z, method=method), case.exact)
        for case in gradient_cases(name, shape, backend)
    ]


def assert_no_worse_than_eigh(name: str, shape: tuple[int, int], method: str, backend: str) -> None:
    factor = GRADIENT_OF_EIGH_TINY if min(shape) <= 3 else GRADIENT_OF_EIGH
    cases = gradient_cases(name, shape, backend)
    allowed = mean(factor * case.eigh_error + case.floor for case in cases)
    assert mean(errors(name, shape, method, backend)) <= allowed


@pytest.mark.parametrize("shape", in_tiers(SHAPES))
@pytest.mark.parametrize("name", SPECTRA)
def test_float32_no_worse_than_eigh(
    name: str, shape: tuple[int, int], method: str, backend: str
) -> None:
    assert_no_worse_than_eigh(name, shape, method, backend)


@pytest.mark.parametrize("shape", in_tiers(SHAPES))
@pytest.mark.parametrize("name", WELL_CONDITIONED)
def test_float32_well_conditioned(
    name: str, shape: tuple[int, int], method: str, backend: str
) -> None:
    cases = gradient_cases(name, shape, backend)
    for case, error in zip(cases, errors(name, shape, method, backend), strict=True):
        if case.well_conditioned:
            assert error <= GRADIENT_WELL_CONDITIONED * case.exact.norm() + case.floor


@pytest.mark.parametrize("shape", DEGENERATE_SHAPES)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_float32_no_worse_than_eigh(
    name: str, shape: tuple[int, int], method: str, backend: str
) -> None:
    assert_no_worse_than_eigh(name, shape, method, backend)
    # The exact gradient is finite, so that an error is where every entry of the gradient is.
    assert all(math.isfinite(error) for error in errors(name, shape, method, backend))


@pytest.mark.parametrize("name", SPECTRA)
def test_poles_are_more_accurate_than_eigh_on_the_table(name: str, backend: str) -> None:
    cases = gradient_cases(name, TABLE_SHAPE, backend)
    of_eigh = mean(case.eigh_error for case in cases)
    assert mean(errors(name, TABLE_SHAPE, "poles", backend)) < of_eigh


@pytest.mark.parametrize("shape", in_tiers(SHAPES))
@pytest.mark.parametrize("name", SPECTRA)
def test_float64(name: str, shape: tuple[int, int], method: str) -> None:
    case = gradient_case(name, shape, torch.float64)
    error = absolute_error(gradient(vn_entropy, case.z, method=method), case.exact)
    assert error <= GRADIENT_FLOAT64 * gradient_scale(case.z)


@pytest.mark.parametrize("shape", DEGENERATE_SHAPES)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_float64(name: str, shape: tuple[int, int], method: str) -> None:
    case = gradient_case(name, shape, torch.float64)
    error = absolute_error(gradient(vn_entropy, case.z, method=method), case.exact)
    assert error <= GRADIENT_FLOAT64 * gradient_scale(case.z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", FEW_SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_half_precision_gradient_is_the_rounded_float32_gradient(
    name: str, shape: tuple[int, int], dtype: torch.dtype, method: str
) -> None:
    case = gradient_case(name, shape, dtype)
    largest = case.exact.abs().max().clamp_min(1e-6)
    scale = 2.0 ** float(10 - largest.log2().ceil())  # as GradScaler does: float16 is narrow
    grad = gradient(lambda z: scale * vn_entropy(z, method=method), case.z)
    assert grad.dtype == dtype
    in_float32 = GRADIENT_WELL_CONDITIONED * case.exact.norm() + GRADIENT_OF_EIGH * eigh_error(
        case.z.float()
    )
    allowed = in_float32 + ROUNDING[dtype] * case.exact.norm() + case.floor
    assert absolute_error(grad.double() / scale, case.exact) <= allowed


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(17, 33), (128, 65)])
def test_gradient_is_orthogonal_to_its_row(
    shape: tuple[int, int], dtype: torch.dtype, method: str
) -> None:
    z = spectrum_case("relu", shape, dtype)
    radial = (gradient(vn_entropy, z, method=method) * z).sum(dim=-1)
    allowed = 8 * torch.finfo(dtype).eps * gradient_scale(z) * z.norm(dim=-1)
    assert (radial.abs() <= allowed).all()


# ---------------------------------------------------------------------------------------------
# Degenerate rows, magnitudes, NaN
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (8, 1), (1, 300), (300, 1)])
def test_one_row_or_one_feature_has_no_gradient(
    shape: tuple[int, int], dtype: torch.dtype, method: str
) -> None:
    z = spectrum_case("iid", shape, dtype)
    assert (gradient(vn_entropy, z, method=method) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", DEGENERATE_SHAPES)
def test_a_zero_row_has_gradient_zero(
    shape: tuple[int, int], normalize: bool, dtype: torch.dtype, method: str
) -> None:
    z = spectrum_case("iid", shape, dtype)
    z[[0, shape[0] // 2]] = 0
    grad = gradient(vn_entropy, z, method=method, normalize=normalize)
    assert grad.isfinite().all()
    assert (grad[[0, shape[0] // 2]] == 0).all()
    assert (grad[1] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1000), (7, 5), (64, 64), (128, 512), (500, 20)])
def test_all_rows_equal_has_a_finite_gradient(
    shape: tuple[int, int], dtype: torch.dtype, method: str
) -> None:
    z = degenerate_case("equal_rows", shape, dtype)
    assert gradient(vn_entropy, z, method=method).isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "magnitude", "eps"),
    [
        (torch.float32, 1e30, 1e-12),
        (torch.float32, 1e-8, 1e-12),
        (torch.float32, 1e-30, 1e-12),
        (torch.float32, 1e-30, 0.0),
        (torch.float64, 1e100, 1e-12),
        (torch.float64, 1e-100, 0.0),
    ],
)
@pytest.mark.parametrize("shape", [(17, 33), (65, 64)])
def test_magnitude_of_rows(
    dtype: torch.dtype, magnitude: float, eps: float, shape: tuple[int, int], method: str
) -> None:
    z = (gaussian(*shape, generator(0)) * magnitude).to(dtype)
    exact = reference.oracle_grad(z, eps=eps)
    grad = gradient(vn_entropy, z, method=method, eps=eps).double()
    tolerance = 1e-4 if dtype == torch.float32 else GRADIENT_FLOAT64
    assert relative_error(grad / exact.abs().max(), exact / exact.abs().max()) <= tolerance


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_every_magnitude_in_one_sample(dtype: torch.dtype, method: str) -> None:
    norm = torch.logspace(-8, 20, 17, dtype=torch.float64)[:, None]
    z = (gaussian(17, 33, generator(0)) * norm).to(dtype)
    grad = gradient(vn_entropy, z, method=method).double() * norm  # each row in its own scale
    exact = reference.oracle_grad(z) * norm
    tolerance = GRADIENT_WELL_CONDITIONED if dtype == torch.float32 else GRADIENT_FLOAT64
    assert relative_error(grad, exact) <= tolerance


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_shorter_than_eps_are_not_projected(dtype: torch.dtype, method: str) -> None:
    z = spectrum_case("iid", (17, 33), dtype)
    z[::2] *= 0.01
    exact = reference.oracle_grad(z, eps=1.0)
    tolerance = GRADIENT_WELL_CONDITIONED if dtype == torch.float32 else GRADIENT_FLOAT64
    assert relative_error(gradient(vn_entropy, z, method=method, eps=1.0), exact) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("shape", [(2, 3), (17, 33), (65, 64)])
def test_nan_or_inf_stays_in_its_sample(
    shape: tuple[int, int], bad: float, dtype: torch.dtype, method: str
) -> None:
    z = spectrum_case("iid", (3, *shape), dtype)
    clean = gradient(vn_entropy, z, method=method)
    z[1, shape[0] // 2, shape[1] // 2] = bad
    s = vn_entropy(z.requires_grad_(), method=method)  # its kernel is not that of the value alone
    assert s.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(s.sum(), z)
    assert grad[1].isnan().all()
    assert torch.equal(grad[::2], clean[::2])


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_a_negative_or_nan_weight_is_nan_for_its_sample_alone(bad: float, method: str) -> None:
    z = spectrum_case("iid", (3, 17, 33), torch.float32).requires_grad_()
    weights = torch.full((3, 17), 1 / 17)
    weights[1, 4] = bad
    weights.requires_grad_()
    vn_entropy(z, weights=weights, method=method).sum().backward()
    assert z.grad[1].isnan().all()
    assert z.grad[::2].isfinite().all()
    assert weights.grad[1].isnan().all()
    assert weights.grad[::2].isfinite().all()


# ---------------------------------------------------------------------------------------------
# grad_output, layouts, weights
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_each_sample_takes_its_own_grad_output(dtype: torch.dtype, method: str) -> None:
    z = spectrum_case("iid", (2, 3, 17, 33), dtype).requires_grad_()
    grad_output = torch.tensor([[1.0, -2.0, 0.0], [0.5, 1e3, 3.0]], dtype=dtype)
    s = vn_entropy(z, method=method)
    (grad,) = torch.autograd.grad(s, z, grad_output, retain_graph=True)
    (again,) = torch.autograd.grad(s, z, grad_output)
    exact = grad_output[..., None, None] * reference.oracle_grad(z.detach())
    tolerance = GRADIENT_WELL_CONDITIONED if dtype == torch.float32 else GRADIENT_FLOAT64
    for sample in [(i, j) for i in range(2) for j in range(3)]:
        assert absolute_error(grad[sample], exact[sample]) <= tolerance * exact[sample].norm()
    assert torch.equal(grad, again)


def test_a_non_contiguous_grad_output(method: str) -> None:
    z = spectrum_case("iid", (4, 17, 33), torch.float32).requires_grad_()
    grad_output = torch.arange(8.0)[::2]
    (grad,) = torch.autograd.grad(vn_entropy(z, method=method), z, grad_output)
    exact = grad_output[:, None, None] * reference.oracle_grad(z.detach())
    assert relative_error(grad, exact) <= GRADIENT_WELL_CONDITIONED


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str, dtype: torch.dtype, method: str) -> None:
    """The gradient that reaches the base is that of the contiguous copy."""
    base = gaussian(*LAYOUT_BASE_SHAPE, generator(0)).to(dtype)

    def of_copy(base: torch.Tensor) -> torch.Tensor:
        return vn_entropy(LAYOUTS[name](base).contiguous(), method=method)

    def of_view(base: torch.Tensor) -> torch.Tensor:
        return vn_entropy(LAYOUTS[name](base), method=method)

    difference = absolute_error(gradient(of_view, base), gradient(of_copy, base))
    assert difference <= 8 * torch.finfo(dtype).eps * base.numel() * gradient_scale(base)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(17, 33), (33, 17)])
def test_weights(shape: tuple[int, int], normalize: bool, dtype: torch.dtype, method: str) -> None:
    z = (spectrum_case("iid", (2, *shape), dtype) / shape[1] ** 0.5).requires_grad_()
    p = torch.rand(shape[0], generator=generator(1), dtype=dtype)
    p[::3] = 0
    weights = (p / p.sum()).requires_grad_()
    options = {"weights": weights.detach(), "normalize": normalize}
    vn_entropy(z, method=method, weights=weights, normalize=normalize).sum().backward()
    exact_z = reference.oracle_grad(z.detach(), **options)
    exact_weights = reference.oracle_weights_grad(z.detach(), **options).sum(dim=0)
    tolerance = GRADIENT_WELL_CONDITIONED if dtype == torch.float32 else GRADIENT_FLOAT64
    assert relative_error(z.grad, exact_z) <= tolerance
    assert relative_error(weights.grad, exact_weights) <= tolerance
    assert (z.grad[:, ::3] == 0).all()
    assert (weights.grad[::3] == 0).all()


@pytest.mark.parametrize("weights_dtype", FLOATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_come_in_the_dtype_of_their_tensor(
    dtype: torch.dtype, weights_dtype: torch.dtype, method: str
) -> None:
    z = spectrum_case("iid", (17, 33), dtype).requires_grad_()
    weights = torch.full((17,), 1 / 17, dtype=weights_dtype, requires_grad=True)
    vn_entropy(z, weights=weights, method=method).backward()
    assert z.grad.dtype == dtype
    assert weights.grad.dtype == weights_dtype
    exact = reference.oracle_weights_grad(z.detach(), weights=weights.detach())
    assert relative_error(weights.grad, exact) <= GRADIENT_WELL_CONDITIONED


@pytest.mark.parametrize("weights_shape", [(17,), (1,), (1, 17), (2, 1, 17), (3, 1), (2, 3, 17)])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_of_broadcast_weights(
    weights_shape: tuple[int, ...], normalize: bool, method: str
) -> None:
    z = spectrum_case("iid", (2, 3, 17, 33), torch.float32) / 33**0.5
    weights = torch.rand(weights_shape, generator=generator(2)).div(17).requires_grad_()
    vn_entropy(z, weights=weights, normalize=normalize, method=method).sum().backward()
    if normalize and weights_shape[-1] == 1:  # a common factor, which does not matter
        assert weights.grad.abs().max() <= 1e-5 / weights.min()
        return
    options = {"weights": weights.detach(), "normalize": normalize}
    exact = reference.oracle_weights_grad(z, **options).sum_to_size(weights_shape)
    assert relative_error(weights.grad, exact) <= GRADIENT_WELL_CONDITIONED


def test_only_the_weights_may_need_a_gradient(method: str) -> None:
    z = spectrum_case("iid", (17, 33), torch.float64)
    weights = torch.full((17,), 1 / 17, dtype=torch.float64, requires_grad=True)
    vn_entropy(z, weights=weights, method=method).backward()
    exact = reference.oracle_weights_grad(z, weights=weights.detach())
    assert relative_error(weights.grad, exact) <= GRADIENT_FLOAT64


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(17, 33), (33, 17), (128, 65)])
def test_without_normalisation(shape: tuple[int, int], normalize: bool, method: str) -> None:
    for magnitude in (1e-2, 1.0, 1e2):
        z = spectrum_case("iid", shape, torch.float32) * magnitude
        grad = gradient(vn_entropy, z, method=method, normalize=normalize)
        exact = reference.oracle_grad(z, normalize=normalize)
        allowed = max(
            GRADIENT_WELL_CONDITIONED * exact.norm(),
            GRADIENT_OF_EIGH * eigh_error(z, normalize=normalize),
        )
        assert absolute_error(grad, exact) <= allowed


# ---------------------------------------------------------------------------------------------
# gradcheck, gradgradcheck
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 3, 5), (2, 5, 3)])
def test_gradcheck(
    shape: tuple[int, ...], normalize: bool, method: str, gradcheck: Callable[..., bool]
) -> None:
    z = spectrum_case("iid", shape, torch.float64).requires_grad_()
    assert gradcheck(
        partial(vn_entropy, method=method, normalize=normalize), z, check_batched_grad=True
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 5, 3)])
def test_gradcheck_of_weights(
    shape: tuple[int, ...], normalize: bool, method: str, gradcheck: Callable[..., bool]
) -> None:
    z = spectrum_case("iid", shape, torch.float64).requires_grad_()
    weights = torch.rand(shape[-2], generator=generator(1)).double().add(0.1).requires_grad_()

    def entropy(z: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return vn_entropy(z, weights=weights, method=method, normalize=normalize)

    assert gradcheck(entropy, (z, weights))


@pytest.mark.parametrize("name", ["duplicated", "rank3", "repeated"])
def test_gradcheck_of_rank_deficient_input(
    name: str, method: str, gradcheck: Callable[..., bool]
) -> None:
    """A new eigenvalue x enters as x log x of a squared step: differences are off by 1e-5."""
    z = spectrum_case(name, (6, 8), torch.float64).requires_grad_()
    assert gradcheck(partial(vn_entropy, method=method), z, atol=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 3, 5)])
def test_gradgradcheck(
    shape: tuple[int, ...], normalize: bool, method: str, gradgradcheck: Callable[..., bool]
) -> None:
    z = spectrum_case("iid", shape, torch.float64).requires_grad_()
    assert gradgradcheck(partial(vn_entropy, method=method, normalize=normalize), z)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3)])
def test_gradgradcheck_with_weights(
    shape: tuple[int, int], normalize: bool, method: str, gradgradcheck: Callable[..., bool]
) -> None:
    z = spectrum_case("iid", shape, torch.float64).requires_grad_()
    weights = torch.tensor([1.0, 4, 0.5, 3], dtype=torch.float64, requires_grad=True)

    def entropy(z: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return vn_entropy(z, weights=weights, method=method, normalize=normalize)

    assert gradgradcheck(entropy, (z, weights))


def test_gradgradcheck_of_repeated_eigenvalues(
    method: str, gradgradcheck: Callable[..., bool]
) -> None:
    """Daleckii-Krein: the divided difference of two equal eigenvalues is a derivative."""
    z = spectrum_case("repeated", (6, 8), torch.float64).requires_grad_()
    assert gradgradcheck(partial(vn_entropy, method=method), z, atol=1e-4)


@pytest.mark.parametrize("eps", [1e-12, 2.5])
@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_gradgradcheck_with_a_zero_row_and_short_rows(
    shape: tuple[int, int], eps: float, method: str, gradgradcheck: Callable[..., bool]
) -> None:
    """Where the row itself is not moved: at zero, S has no second derivative along it."""
    z = spectrum_case("iid", shape, torch.float64)
    rest = z[1:].clone().requires_grad_()
    entropy = partial(vn_entropy, method=method, eps=eps)
    pad = torch.nn.functional.pad
    assert gradgradcheck(lambda rest: entropy(pad(rest, (0, 0, 1, 0))), rest)


def test_second_derivative_is_finite_on_degenerate_input(method: str) -> None:
    for name in DEGENERATE:
        z = degenerate_case(name, (6, 8), torch.float64).requires_grad_()
        (grad,) = torch.autograd.grad(vn_entropy(z, method=method), z, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), z)
        assert second.isfinite().all(), name


def test_gradient_penalty(method: str) -> None:
    """The use of a second derivative in training: a penalty on the norm of the first."""
    z = spectrum_case("iid", (2, 17, 33), torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(vn_entropy(z, method=method).sum(), z, create_graph=True)
    (penalty_grad,) = torch.autograd.grad(grad.square().sum(), z)
    exact = z.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(vn_entropy(exact).sum(), exact, create_graph=True)
    (expected,) = torch.autograd.grad(grad.square().sum(), exact)
    assert relative_error(penalty_grad, expected) <= 1e-4


def test_third_derivative_says_so(method: str) -> None:
    z = spectrum_case("iid", (4, 6), torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(vn_entropy(z, method=method), z, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="vn_entropy"):
        second.square().sum().backward()


# ---------------------------------------------------------------------------------------------
# spectrum
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 3, 5), (1, 4), (4, 1)])
def test_gradcheck_of_spectrum(
    shape: tuple[int, ...], normalize: bool, gradcheck: Callable[..., bool]
) -> None:
    z = spectrum_case("iid", shape, torch.float64).requires_grad_()
    assert gradcheck(partial(spectrum, normalize=normalize), z)


def test_gradcheck_of_spectrum_with_weights(gradcheck: Callable[..., bool]) -> None:
    z = spectrum_case("iid", (4, 6), torch.float64).requires_grad_()
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda z, p: spectrum(z, weights=p), (z, weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*SPECTRA, *DEGENERATE])
def test_gradient_of_spectrum_is_finite(name: str, dtype: torch.dtype) -> None:
    case = spectrum_case if name in SPECTRA else degenerate_case
    z = case(name, (12, 40), dtype)
    grad = gradient(lambda z: spectrum(z).square(), z)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_entropy_of_the_spectrum_has_the_gradient_of_the_entropy(dtype: torch.dtype) -> None:
    z = spectrum_case("iid", (2, 17, 33), dtype)
    grad = gradient(lambda z: torch.special.entr(spectrum(z)).sum(dim=-1), z)
    tolerance = GRADIENT_WELL_CONDITIONED if dtype == torch.float32 else GRADIENT_FLOAT64
    assert relative_error(grad, reference.oracle_grad(z)) <= tolerance


def test_double_backward_of_spectrum_says_so() -> None:
    z = spectrum_case("iid", (4, 6), torch.float64).requires_grad_()
    with pytest.raises(NotImplementedError, match="spectrum"):
        hessian_product(spectrum(z).square().sum(), z)
