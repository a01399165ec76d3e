"""log det(I + scale rho): value and gradient against torch's determinant in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import (
    DEGENERATE,
    DEGENERATE_SHAPES,
    FEW_SHAPES,
    GRADIENT_FLOAT64,
    GRADIENT_WELL_CONDITIONED,
    ROUNDING,
    SHAPES,
    SPECTRA,
    VALUE,
    Tolerance,
    absolute_error,
    assert_value,
    degenerate_case,
    generator,
    gradient,
    gradient_scale,
    hessian_product,
    in_tiers,
    relative_error,
    spectrum_case,
)
from naming import naming
from torch import Tensor

from vne_kernels import logdet

pytestmark = pytest.mark.every_backend

FLOATS = (torch.float64, torch.float32)
SCALES = (1e-3, 1.0, 300.0)


def oracle(
    z: Tensor, scale: float, *, normalize: bool = True, weights: Tensor | None = None
) -> Tensor:
    """By torch's LU factorization of the n x n matrix, in float64."""
    z = z.double()
    u = torch.nn.functional.normalize(z, dim=-1) if normalize else z
    p = torch.full(z.shape[:-1], 1 / z.shape[-2], dtype=z.dtype)
    if weights is not None:
        p = weights.double() / (weights.double().sum(-1, keepdim=True) if normalize else 1)
    x = p.sqrt().unsqueeze(-1) * u
    eye = torch.eye(z.shape[-2], dtype=z.dtype)
    return torch.linalg.slogdet(eye + scale * x @ x.mT).logabsdet


def value_tolerance(z: Tensor, scale: float, backend: str) -> Tolerance:
    """That of an entropy. The CUDA kernels take eigenvalues, the largest of which is off by a few
    of its roundings. Measured: 4.2 roundings, near collapse at scale 300."""
    tolerance = VALUE[z.dtype]
    if backend not in ("emulated", "cuda"):
        return tolerance
    absolute = min(8, *z.shape[-2:]) * scale * torch.finfo(z.dtype).eps
    return Tolerance(tolerance.relative, tolerance.absolute + absolute, tolerance.measured)


def condition(z: Tensor, scale: float, **keywords: object) -> float:
    """At most that of I + scale A: 1 + scale tr(A)."""
    # log det(I + t A) = t tr(A) + O(t^2)
    return 1 + scale * float(oracle(z, 1e-7, **keywords)) / 1e-7


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", in_tiers(SHAPES))
@pytest.mark.parametrize("name", SPECTRA)
def test_value(
    name: str, shape: tuple[int, int], dtype: torch.dtype, scale: float, backend: str
) -> None:
    z = spectrum_case(name, shape, dtype)
    value = logdet(z, scale)
    assert value.dtype == dtype
    tolerance = value_tolerance(z, scale, backend)
    assert_value(value, oracle(z, scale), tolerance)
    leaf = z.clone().requires_grad_()
    assert_value(logdet(leaf, scale).detach(), oracle(z, scale), tolerance)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", DEGENERATE_SHAPES)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate(name: str, shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    z = degenerate_case(name, shape, dtype)
    for scale in SCALES:
        assert_value(logdet(z, scale), oracle(z, scale), value_tolerance(z, scale, backend))
        assert gradient(lambda x: logdet(x, scale), z).isfinite().all()  # noqa: B023


@pytest.mark.parametrize("options", ["plain", "raw", "weights"])
@pytest.mark.parametrize("shape", FEW_SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_gradient(name: str, shape: tuple[int, int], options: str) -> None:
    weights = torch.rand(shape[:1], generator=generator(1), dtype=torch.float64)
    keywords = {"plain": {}, "raw": {"normalize": False}, "weights": {"weights": weights}}[options]
    for dtype, tolerance in zip(FLOATS, (GRADIENT_FLOAT64, GRADIENT_WELL_CONDITIONED), strict=True):
        z = spectrum_case(name, shape, dtype)
        for scale in SCALES:
            grad = gradient(lambda x: logdet(x, scale, **keywords), z)  # noqa: B023
            exact = gradient(lambda x: oracle(x, scale, **keywords), z.double())  # noqa: B023
            # The terms that cancel in the projection are at most 2 scale p_i |u_i| / |z_i|.
            size = exact.norm() + min(scale, 2 * len(z)) * gradient_scale(z)
            # Rounding A moves the inverse by the condition of I + scale A. Measured: 0.04 of it on
            # the CPU, 0.4 by the eigenvectors of the CUDA kernels.
            rounding = 2 * torch.finfo(dtype).eps * condition(z, scale, **keywords)
            assert absolute_error(grad, exact) <= (tolerance + rounding) * size


def test_gradcheck() -> None:
    z = spectrum_case("relu", (2, 5, 4), torch.float64).requires_grad_()
    p = torch.rand(2, 5, generator=generator(0), dtype=torch.float64).requires_grad_()
    for normalize in (True, False):

        def value(z: Tensor, p: Tensor, n: bool = normalize) -> Tensor:
            return logdet(z, 2.5, weights=p, normalize=n)

        assert torch.autograd.gradcheck(value, (z, p), atol=1e-7)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_halves(dtype: torch.dtype) -> None:
    z = spectrum_case("iid", (17, 33), dtype)
    value, grad = logdet(z, 3.0), gradient(lambda x: logdet(x, 3.0), z)
    assert (value.dtype, grad.dtype) == (torch.float32, dtype)
    assert_value(value, oracle(z, 3.0), VALUE[dtype])
    exact = gradient(lambda x: oracle(x, 3.0), z.double())
    assert relative_error(grad, exact) <= ROUNDING[dtype]


def test_a_nan_stays_in_its_sample_and_zeros_give_zero() -> None:
    z = spectrum_case("iid", (4, 17, 33), torch.float32)
    z[1], z[2, 3, 4] = 0, math.nan
    value = logdet(z, 2.0)
    grad = gradient(lambda x: logdet(x, 2.0), z)
    assert value[1] == 0
    assert (grad[1] == 0).all()
    assert value[2].isnan()
    assert grad[2].isnan().all()
    assert_value(value[::3], oracle(z[::3], 2.0), VALUE[torch.float32])
    assert grad[::3].isfinite().all()


def test_an_absent_row_may_hold_anything() -> None:
    z = spectrum_case("iid", (9, 5), torch.float64)
    weights = torch.ones(9)
    z[4], weights[4] = math.nan, 0
    rest = z[[0, 1, 2, 3, 5, 6, 7, 8]]
    exact = Tolerance(1e-12, 1e-12, "4e-16")
    assert_value(logdet(z, 2.0, weights=weights), oracle(rest, 2.0), exact)


def test_flat_spectrum_is_the_largest() -> None:
    """m log(1 + scale / m), and no batch of unit rows exceeds it."""
    for shape in ((12, 40), (40, 12)):
        bound = 12 * math.log1p(5 / 12)
        flat = degenerate_case("orthonormal", (12, 40), torch.float64)
        assert float(logdet(flat, 5.0)) == pytest.approx(bound, rel=1e-12)
        for name in SPECTRA:
            assert float(logdet(spectrum_case(name, shape, torch.float64), 5.0)) <= bound + 1e-12


def test_derivatives_of_torch_func_and_the_refusal_of_a_second() -> None:
    z = spectrum_case("iid", (6, 4), torch.float64)
    direction = torch.randn(6, 4, generator=generator(2), dtype=torch.float64)
    grad = gradient(lambda x: logdet(x, 2.0), z)
    assert_close: Callable[..., None] = torch.testing.assert_close
    assert_close(torch.func.grad(lambda x: logdet(x, 2.0))(z), grad)
    _, along = torch.func.jvp(lambda x: logdet(x, 2.0), (z,), (direction,))
    assert_close(along, (grad * direction).sum())
    leaf = z.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=naming("logdet")):
        hessian_product(logdet(leaf, 2.0), leaf)


@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan])
def test_scale_must_be_positive_and_finite(scale: float) -> None:
    with pytest.raises(ValueError, match=naming("scale", scale)):
        logdet(torch.eye(3), scale)


def test_bad_arguments_are_named() -> None:
    for error, name, keywords in (
        (TypeError, "scale", {"scale": "1"}),
        (TypeError, "normalize", {"normalize": 1}),
        (ValueError, "weights", {"weights": torch.ones(2)}),
    ):
        with pytest.raises(error, match=naming(name)):
            logdet(torch.eye(3), **keywords)
