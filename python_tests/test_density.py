"""The stages of an entropy that is spread over processes: rho, its entropy, their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import mean

import pytest
import torch
from cases import (
    DEGENERATE,
    DTYPES,
    GRADIENT_FLOAT64,
    GRADIENT_OF_EIGH,
    GRADIENT_OF_EIGH_TINY,
    GRADIENT_WELL_CONDITIONED,
    LAYOUT_BASE_SHAPE,
    LAYOUTS,
    ROUNDING,
    SPECTRA,
    VALUE,
    VALUE_DEFICIENT,
    GradientCase,
    absolute_error,
    assert_value,
    degenerate_case,
    gaussian,
    generator,
    gradient,
    gradient_case,
    gradient_scale,
    hessian_product,
    relative_error,
    result_dtype,
    spectrum_case,
    views,
)
from naming import naming
from torch import Tensor

from vne_kernels import reference

pytestmark = pytest.mark.every_backend

ops = torch.ops.vne_kernels
EPS = 1e-12
FLOATS = (torch.float64, torch.float32)
NON_FINITE = (math.nan, math.inf, -math.inf)

ON_THE_CPU = pytest.mark.cpu_only("the emulation is slow")
SHAPES = (
    (2, 5),
    (3, 2),
    (17, 33),
    (33, 17),
    pytest.param((63, 65), marks=[ON_THE_CPU, pytest.mark.slow]),
    pytest.param((130, 64), marks=ON_THE_CPU),
    pytest.param((40, 200), marks=[ON_THE_CPU, pytest.mark.slow]),
)
"""n < d, where rho lacks rank, and n > d."""

DENSITY = {
    torch.float64: 2e-15,
    torch.float32: 2.5e-7,
    torch.bfloat16: 2.5e-7,
    torch.float16: 2.5e-7,
}
"""Absolute, of an entry of a density matrix of trace 1. Measured: 3.4e-16 and 5.7e-8."""


def entropy(
    z: Tensor,
    *,
    method: str = "auto",
    weights: Tensor | None = None,
    normalize: bool = True,
    eps: float = EPS,
) -> Tensor:
    """S by the stages, as the only process would compute it."""
    rho = ops.density(z, weights, normalize, eps)
    return ops.density_entropy_grad(rho, method)[0]


def exact_density(z: Tensor, *, weights: Tensor | None = None, normalize: bool = True) -> Tensor:
    z = z.double()
    u = torch.nn.functional.normalize(z, dim=-1, eps=EPS) if normalize else z
    p = 1 / z.shape[-2] if weights is None else weights.double().unsqueeze(-1)
    return u.mT @ (p * u)


def weights_of_a_part(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Every third sample absent, and a sum of about a quarter."""
    p = torch.rand(shape, generator=generator(1), dtype=torch.float64) / (2 * shape[-1])
    p[..., ::3] = 0
    return p.to(dtype)


def positive_definite(m: int, seed: int = 0) -> Tensor:
    """(m, m) float64, of trace 1."""
    return exact_density(gaussian(2 * m, m, generator(seed)))


# ---------------------------------------------------------------------------------------------
# density
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 7), (7, 1), (2, 3, 6, 9)])
@pytest.mark.parametrize("name", SPECTRA)
def test_density(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z = spectrum_case(name, shape, dtype)
    rho = ops.density(z, None, True, EPS)
    assert rho.dtype == dtype
    assert rho.is_contiguous()
    assert torch.equal(rho, rho.mT)
    torch.testing.assert_close(rho.double(), exact_density(z), rtol=0, atol=DENSITY[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_density_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z = spectrum_case("relu", (2, 17, 33), dtype)
    rho = ops.density(z, None, True, EPS)
    assert rho.dtype == torch.float32
    torch.testing.assert_close(rho.double(), exact_density(z), rtol=0, atol=DENSITY[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(2, 17, 33), (2, 33, 17)])
def test_density_with_weights_and_without_normalisation(
    shape: tuple[int, ...], weighted: bool, normalize: bool, dtype: torch.dtype
) -> None:
    z = spectrum_case("iid", shape, dtype)
    weights = weights_of_a_part(shape[:-1], dtype) if weighted else None
    exact = exact_density(z, weights=weights, normalize=normalize)
    error = (ops.density(z, weights, normalize, EPS) - exact).abs().max()
    assert error <= DENSITY[dtype] * exact.diagonal(dim1=-2, dim2=-1).sum(dim=-1).max()


@pytest.mark.parametrize("name", LAYOUTS)
def test_density_of_a_layout_is_that_of_the_copy(name: str) -> None:
    z = LAYOUTS[name](gaussian(*LAYOUT_BASE_SHAPE, generator(0)).float())
    rho = ops.density(z, None, True, EPS)
    torch.testing.assert_close(rho, ops.density(z.contiguous(), None, True, EPS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e-8, 1e30])
def test_density_of_rows_of_any_length(magnitude: float) -> None:
    z = (gaussian(9, 6, generator(0)) * magnitude).float()
    z[4] = gaussian(1, 6, generator(1))[0]
    u = z.double() / z.double().norm(dim=-1, keepdim=True)
    rho = ops.density(z, None, True, 0.0)
    torch.testing.assert_close(rho.double(), u.mT @ u / 9, rtol=0, atol=DENSITY[torch.float32])


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_density_of_zero_rows(shape: tuple[int, int]) -> None:
    assert (ops.density(torch.zeros(2, *shape), None, True, EPS) == 0).all()
    z = degenerate_case("zero_row", shape, torch.float32)
    rho = ops.density(z, None, True, EPS)
    torch.testing.assert_close(rho.double(), exact_density(z), rtol=0, atol=DENSITY[torch.float32])
    absent = torch.zeros(shape[0])
    assert (ops.density(z, absent, True, EPS) == 0).all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("shape", [(4, 6), (17, 9)])
def test_an_invalid_sample_is_nan_throughout(
    shape: tuple[int, int], bad: float, normalize: bool
) -> None:
    z = spectrum_case("iid", (3, *shape), torch.float32)
    clean = ops.density(z, None, normalize, EPS)
    z[1, 2, 3] = bad
    rho = ops.density(z, None, normalize, EPS)
    assert rho[1].isnan().all()
    assert torch.equal(rho[::2], clean[::2])


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_an_invalid_weight_makes_its_sample_nan(bad: float) -> None:
    z = spectrum_case("iid", (3, 4, 6), torch.float32)
    weights = torch.full((3, 4), 0.25)
    weights[1, 2] = bad
    rho = ops.density(z, weights, True, EPS)
    grad_z, grad_weights = ops.density_backward(rho[:1].expand(3, -1, -1), z, weights, True, EPS)
    for result in (rho, grad_z, grad_weights):
        assert result[1].isnan().all()
        assert result[::2].isfinite().all()


# ---------------------------------------------------------------------------------------------
# density_entropy: the value
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_value(name: str, shape: tuple[int, int], dtype: torch.dtype, method: str) -> None:
    z = spectrum_case(name, shape, dtype)
    rho = ops.density(z, None, True, EPS)
    for s in (ops.density_entropy(rho, method), ops.density_entropy_grad(rho, method)[0]):
        assert s.dtype == dtype
        assert_value(s, reference.oracle(z), VALUE_DEFICIENT[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(5, 3), (12, 40), (40, 12)])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_value(
    name: str, shape: tuple[int, int], dtype: torch.dtype, method: str
) -> None:
    z = degenerate_case(name, shape, dtype)
    rho = ops.density(z, None, True, EPS)
    for s in (ops.density_entropy(rho, method), ops.density_entropy_grad(rho, method)[0]):
        assert s >= 0
        assert_value(s, reference.oracle(z), VALUE_DEFICIENT[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("trace", [1e-20, 0.3, 7.0, 1e20])
def test_any_trace(trace: float, dtype: torch.dtype, method: str) -> None:
    """S(t rho) = t S(rho) - t log t, equation (10); the gradient is -(log rho + I) of t rho."""
    rho = positive_definite(9)
    one, log_rho = reference_entropy(rho)
    scaled = (trace * rho).to(dtype)
    s, grad = ops.density_entropy_grad(scaled, method)
    tolerance = 1e-5 if dtype == torch.float32 else GRADIENT_FLOAT64
    expected = trace * (float(one) - math.log(trace))
    allowed = tolerance * trace * max(1.0, abs(math.log(trace)))  # of the terms, which may cancel
    assert abs(float(s) - expected) <= allowed
    exact = -(log_rho + (math.log(trace) + 1) * torch.eye(9, dtype=torch.float64))
    assert relative_error(grad, exact) <= tolerance
    assert abs(float(ops.density_entropy(scaled, method)) - expected) <= allowed


def reference_entropy(rho: Tensor) -> tuple[Tensor, Tensor]:
    """S and log rho in float64, of a rho of full rank."""
    eig_val, eig_vec = torch.linalg.eigh(rho.double())
    return torch.special.entr(eig_val).sum(), (eig_vec * eig_val.log()) @ eig_vec.mT


@pytest.mark.parametrize("dtype", FLOATS)
def test_eigenvalues_that_rounding_made_negative(dtype: torch.dtype, method: str) -> None:
    rho = exact_density(spectrum_case("rank3", (12, 20), torch.float64))
    noise = torch.finfo(dtype).eps * gaussian(20, 20, generator(3)) / 20
    s, grad = ops.density_entropy_grad((rho + noise + noise.mT).to(dtype), method)
    exact = torch.special.entr(torch.linalg.eigvalsh(rho).clamp_min(0)).sum()
    assert_value(s, exact, VALUE_DEFICIENT[dtype])
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_matrix(dtype: torch.dtype, method: str) -> None:
    rho = torch.zeros(2, 5, 5, dtype=dtype)
    rho[1] = positive_definite(5)
    s, grad = ops.density_entropy_grad(rho, method)
    assert s[0] == 0
    assert (grad[0] == 0).all()
    assert_value(s[1], reference_entropy(rho[1])[0], VALUE[dtype])
    assert_value(ops.density_entropy(rho, method), s, VALUE[dtype])


@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("place", [(0, 0), (2, 5), (5, 2), (6, 6)])
def test_a_matrix_that_is_not_finite_is_nan_alone(
    place: tuple[int, int], bad: float, method: str
) -> None:
    rho = torch.stack([positive_definite(7, seed) for seed in range(3)]).float()
    clean, clean_grad = ops.density_entropy_grad(rho, method)
    rho[1][place] = bad
    s, grad = ops.density_entropy_grad(rho, method)
    assert s[1].isnan()
    assert grad[1].isnan().all()
    assert torch.equal(s[::2], clean[::2])
    assert torch.equal(grad[::2], clean_grad[::2])
    assert ops.density_entropy(rho, method).isnan().tolist() == [False, True, False]


def test_a_negative_trace_is_nan(method: str) -> None:
    s, grad = ops.density_entropy_grad(-torch.eye(3), method)
    assert s.isnan()
    assert grad.isnan().all()
    assert ops.density_entropy(-torch.eye(3), method).isnan()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_symmetric_part_counts(dtype: torch.dtype, method: str) -> None:
    rho = positive_definite(9).to(dtype)
    skew = 0.1 * gaussian(9, 9, generator(5)).to(dtype)
    skew = skew - skew.mT
    s, grad = ops.density_entropy_grad(rho + skew, method)
    exact, log_rho = reference_entropy(rho)
    assert_value(s, exact, VALUE[dtype])
    tolerance = 1e-5 if dtype == torch.float32 else GRADIENT_FLOAT64
    assert relative_error(grad, -log_rho - torch.eye(9, dtype=torch.float64)) <= tolerance


@pytest.mark.parametrize("method", ["auto", "poles", "eigh"])
def test_a_batch_is_its_matrices(method: str) -> None:
    rho = torch.stack([positive_definite(9, seed) for seed in range(6)]).float().view(2, 3, 9, 9)
    s, grad = ops.density_entropy_grad(rho, method)
    assert s.shape == (2, 3)
    assert grad.shape == rho.shape
    for i, j in ((0, 0), (1, 2)):
        one, one_grad = ops.density_entropy_grad(rho[i, j], method)
        torch.testing.assert_close(s[i, j], one)
        torch.testing.assert_close(grad[i, j], one_grad)
    strided = rho.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    assert not strided.is_contiguous()
    assert_value(ops.density_entropy(strided, method), s, VALUE[torch.float32])


# ---------------------------------------------------------------------------------------------
# The gradient in the rows
# ---------------------------------------------------------------------------------------------


def yardstick(
    z: Tensor,
    *,
    weights: Tensor | None = None,
    normalize: bool = True,
    relative: bool | None = None,
) -> float:
    """|error| of the closed form by an `eigh` of rho in the precision of z.

    Absent samples make the d side the smaller one, which the reference takes.
    """
    n, d = z.shape[-2:]
    padded = torch.nn.functional.pad(z, (0, 0, 0, d))
    given = z.new_full(z.shape[:-1], 1 / n) if weights is None else weights
    padded_weights = torch.nn.functional.pad(given, (0, d))
    options = {"weights": padded_weights, "normalize": normalize, "relative": relative}
    difference = reference.eigh_grad(padded, **options) - reference.oracle_grad(padded, **options)
    return float(difference.norm())


def assert_gradient(grad: Tensor, z: Tensor, **options: object) -> None:
    exact = reference.oracle_grad(z, **options)
    allowed = GRADIENT_FLOAT64 * exact.norm()
    if z.dtype == torch.float32:
        of_eigh = GRADIENT_OF_EIGH * yardstick(z, **options)
        allowed = max(GRADIENT_WELL_CONDITIONED * exact.norm(), of_eigh)
    assert absolute_error(grad, exact) <= allowed


def gradient_cases(name: str, shape: tuple[int, int]) -> list[GradientCase]:
    """Draws to average over; each large matrix is an average over rounding by itself."""
    seeds = 6 if max(shape) <= 40 else 1
    return [gradient_case(name, shape, torch.float32, seed) for seed in range(seeds)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*SPECTRA, *DEGENERATE])
def test_float32_no_worse_than_eigh(name: str, shape: tuple[int, int], method: str) -> None:
    """Measured, of `yardstick`: at most 1.3 eigh, 0.8 poles; 1.5 and 1.3 where m <= 3."""
    cases = gradient_cases(name, shape)
    factor = GRADIENT_OF_EIGH_TINY if min(shape) <= 3 else GRADIENT_OF_EIGH
    allowed = mean(factor * yardstick(case.z) + case.floor for case in cases)
    grads = [gradient(entropy, case.z, method=method) for case in cases]
    assert all(grad.isfinite().all() for grad in grads)
    errors = [absolute_error(grad, case.exact) for grad, case in zip(grads, cases, strict=True)]
    assert mean(errors) <= allowed


@pytest.mark.parametrize("shape", [(33, 17), pytest.param((300, 64), marks=ON_THE_CPU)])
@pytest.mark.parametrize("name", ["iid", "relu"])
def test_float32_well_conditioned(name: str, shape: tuple[int, int], method: str) -> None:
    cases = [case for case in gradient_cases(name, shape) if case.well_conditioned]
    assert cases
    for case in cases:
        error = absolute_error(gradient(entropy, case.z, method=method), case.exact)
        assert error <= GRADIENT_WELL_CONDITIONED * case.exact.norm() + case.floor


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*SPECTRA, *DEGENERATE])
def test_float64(name: str, shape: tuple[int, int], method: str) -> None:
    case = gradient_case(name, shape, torch.float64)
    error = absolute_error(gradient(entropy, case.z, method=method), case.exact)
    assert error <= GRADIENT_FLOAT64 * max(gradient_scale(case.z), 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(17, 33), (33, 17)])
def test_half_precision(shape: tuple[int, int], dtype: torch.dtype, method: str) -> None:
    case = gradient_case("relu", shape, dtype)
    grad = gradient(lambda z: 64 * entropy(z, method=method), case.z)
    assert grad.dtype == dtype
    assert relative_error(grad / 64, case.exact) <= 2 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(2, 17, 33), (2, 33, 17)])
def test_weights(shape: tuple[int, ...], normalize: bool, dtype: torch.dtype, method: str) -> None:
    z = (spectrum_case("iid", shape, dtype) / shape[-1] ** 0.5).requires_grad_()
    weights = weights_of_a_part(shape[:-1], dtype).requires_grad_()
    options = {"weights": weights.detach(), "normalize": normalize}
    s = entropy(z, method=method, weights=weights, normalize=normalize)
    exact = reference.oracle(z.detach(), relative=False, **options)
    assert_value(s.detach(), exact, VALUE_DEFICIENT[dtype])
    s.sum().backward()
    assert_gradient(z.grad, z.detach(), relative=False, **options)
    exact = reference.oracle_weights_grad(z.detach(), relative=False, **options)
    tolerance = GRADIENT_WELL_CONDITIONED if dtype == torch.float32 else GRADIENT_FLOAT64
    assert relative_error(weights.grad, exact) <= tolerance
    assert (z.grad[..., ::3, :] == 0).all()
    assert (weights.grad[..., ::3] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", [(12, 5), (9, 1, 7), (30, 0, 3)])
@pytest.mark.parametrize("d", [11, 40])
def test_parts_add_up(d: int, sizes: tuple[int, ...], dtype: torch.dtype, method: str) -> None:
    """What the processes of a group compute: rho by an all-reduce, then each its own gradient."""
    n = sum(sizes)
    z = spectrum_case("iid", (n, d), dtype)
    parts = [part for part in z.split(list(sizes)) if len(part)]
    weights = [torch.full((len(part),), 1 / n, dtype=dtype) for part in parts]
    rhos = [ops.density(part, p, True, EPS) for part, p in zip(parts, weights, strict=True)]
    s, grad_rho = ops.density_entropy_grad(torch.stack(rhos).sum(dim=0), method)
    assert_value(s, reference.oracle(z), VALUE_DEFICIENT[dtype])
    grads = [
        ops.density_backward(grad_rho, part, p, True, EPS)[0]
        for part, p in zip(parts, weights, strict=True)
    ]
    assert_gradient(torch.cat(grads), z)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_shorter_than_eps_are_not_projected(dtype: torch.dtype, method: str) -> None:
    z = spectrum_case("iid", (33, 17), dtype)
    z[::2] *= 0.01
    exact = reference.oracle_grad(z, eps=1.0)
    tolerance = GRADIENT_WELL_CONDITIONED if dtype == torch.float32 else GRADIENT_FLOAT64
    assert relative_error(gradient(entropy, z, method=method, eps=1.0), exact) <= tolerance


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_zero_row_has_gradient_zero(shape: tuple[int, int], method: str) -> None:
    z = spectrum_case("iid", shape, torch.float32)
    z[[0, 3]] = 0
    grad = gradient(entropy, z, method=method)
    assert (grad[[0, 3]] == 0).all()
    assert (grad[1] != 0).any()


def test_a_part_of_zero_rows_has_gradient_zero() -> None:
    grad_z, grad_weights = ops.density_backward(
        torch.eye(5).expand(2, 5, 5), torch.zeros(2, 3, 5), torch.ones(2, 3), True, EPS
    )
    assert (grad_z == 0).all()
    assert (grad_weights == 0).all()


@pytest.mark.parametrize("shape", [(4, 1), (1, 4)])
def test_one_feature_or_one_row(shape: tuple[int, int], method: str) -> None:
    z = spectrum_case("iid", shape, torch.float32)
    assert abs(float(entropy(z, method=method))) <= 2e-5
    grad = gradient(entropy, z, method=method)
    assert grad.norm() <= 1e-5
    if shape[1] == 1:
        assert (grad == 0).all()


@pytest.mark.parametrize("bad", NON_FINITE)
def test_a_gradient_of_rho_that_is_not_finite_is_nan_for_its_sample(bad: float) -> None:
    """The part of another process was not finite: no row here has a gradient, be it zero."""
    z = spectrum_case("iid", (3, 4, 6), torch.float32)
    z[:, 1] = 0
    weights = torch.full((3, 4), 0.25)
    grad_rho = gaussian(18, 6, generator(1)).float().view(3, 6, 6)
    clean = ops.density_backward(grad_rho, z, weights, True, EPS)
    grad_rho[1, 4, 2] = bad
    for result, before in zip(
        ops.density_backward(grad_rho, z, weights, True, EPS), clean, strict=True
    ):
        assert result[1].isnan().all()
        assert torch.equal(result[::2], before[::2])


def test_the_backward_takes_any_gradient_of_rho() -> None:
    """The symmetric part of it counts, however it lies in memory."""
    z = spectrum_case("iid", (2, 5, 4), torch.float64).requires_grad_()
    g = gaussian(8, 4, generator(2)).view(2, 4, 4)
    exact = torch.autograd.grad((g * exact_density(z)).sum(), z)[0]
    for layout in (g, g.mT, g.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        (grad,) = torch.autograd.grad(ops.density(z, None, True, EPS), z, layout)
        assert relative_error(grad, exact) <= GRADIENT_FLOAT64
    (of_trace,) = torch.autograd.grad(
        ops.density(z, None, False, EPS).diagonal(dim1=-2, dim2=-1).sum(), z
    )
    assert relative_error(of_trace, 2 / 5 * z.detach()) <= GRADIENT_FLOAT64


# ---------------------------------------------------------------------------------------------
# gradcheck, once differentiable
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 3, 4)])
def test_gradcheck_of_density(
    shape: tuple[int, ...], normalize: bool, gradcheck: Callable[..., bool]
) -> None:
    z = spectrum_case("iid", shape, torch.float64).requires_grad_()
    weights = torch.rand(shape[:-1], generator=generator(1)).double().add(0.1).requires_grad_()
    density = partial(ops.density, normalize=normalize, eps=EPS)
    assert gradcheck(lambda z: density(z, None), z, check_batched_grad=True)
    assert gradcheck(density, (z, weights))


def value_of_density_entropy_grad(rho: Tensor, method: str) -> Tensor:
    return ops.density_entropy_grad(rho, method)[0]


@pytest.mark.parametrize("operator", [ops.density_entropy, value_of_density_entropy_grad])
def test_gradcheck_of_density_entropy(
    operator: Callable[..., Tensor], method: str, gradcheck: Callable[..., bool]
) -> None:
    """Entry by entry: differences of a matrix that is not symmetric, of any trace."""
    rho = torch.stack([positive_definite(4, seed) for seed in range(2)]) * 0.7
    rho.requires_grad_()
    assert gradcheck(partial(operator, method=method), rho, check_batched_grad=True)


@ON_THE_CPU
@pytest.mark.parametrize("shape", [(5, 3), (2, 6, 4)])
def test_gradcheck_of_the_stages(
    shape: tuple[int, ...], method: str, gradcheck: Callable[..., bool]
) -> None:
    z = spectrum_case("iid", shape, torch.float64).requires_grad_()
    assert gradcheck(partial(entropy, method=method), z)


@pytest.mark.parametrize(
    "function",
    [
        lambda rho: ops.density(rho, None, True, EPS).square().sum(),
        lambda rho: ops.density_entropy(rho, "auto"),
        lambda rho: value_of_density_entropy_grad(rho, "auto"),
        lambda rho: ops.density_entropy_grad(rho, "auto")[1].square().sum(),
    ],
)
def test_a_second_derivative_says_so(function: Callable[[Tensor], Tensor]) -> None:
    rho = positive_definite(4).requires_grad_()
    with pytest.raises(NotImplementedError, match="vn_entropy"):
        hessian_product(function(rho), rho)


# ---------------------------------------------------------------------------------------------
# Inside torch
# ---------------------------------------------------------------------------------------------


def test_empty_batch(method: str) -> None:
    z = torch.zeros(0, 4, 6, requires_grad=True)
    weights = torch.zeros(0, 4, requires_grad=True)
    rho = ops.density(z, weights, True, EPS)
    assert rho.shape == (0, 6, 6)
    assert ops.density_entropy(rho, method).shape == (0,)
    s, _ = ops.density_entropy_grad(rho, method)
    s.sum().backward()
    assert z.grad.shape == z.shape
    assert weights.grad.shape == weights.shape
    assert [part.shape for part in ops.cosine(z.detach(), z.detach(), EPS)] == [(0,), (0, 4, 4)]


def test_vmap(method: str) -> None:
    z = spectrum_case("iid", (3, 6, 4), torch.float64)
    assert_value(
        torch.vmap(partial(entropy, method=method))(z), reference.oracle(z), VALUE[z.dtype]
    )
    weights = weights_of_a_part((3, 6), torch.float64)
    mapped = torch.vmap(lambda p: ops.density(z[0], p, True, EPS))(weights)
    assert relative_error(mapped, exact_density(z[:1].expand(3, -1, -1), weights=weights)) <= 1e-14


@pytest.mark.cpu_only("about torch, not about kernels")
def test_compile_without_a_graph_break(method: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        partial(entropy, method=method), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for shape in ((6, 9), (9, 6)):
        z = spectrum_case("iid", shape, torch.float64)
        assert_value(compiled(z), reference.oracle(z), VALUE_DEFICIENT[z.dtype])
        assert relative_error(gradient(compiled, z), reference.oracle_grad(z)) <= GRADIENT_FLOAT64


@pytest.mark.parametrize(
    ("call", "named"),
    [
        *(
            (partial(ops.density_entropy, rho, "auto"), "rho")
            for rho in (torch.zeros(3, 4), torch.zeros(3), torch.zeros(0, 0), torch.eye(3).half())
        ),
        (lambda: ops.density_entropy_grad(torch.eye(3), "svd"), "'svd'"),
        *(
            (partial(ops.density_backward, rho, torch.ones(3, 4), None, True, EPS), "grad_rho")
            for rho in (torch.eye(3), torch.eye(4).double())
        ),
    ],
)
def test_misuse_of_the_raw_operators(call: Callable[[], Tensor], named: str) -> None:
    with pytest.raises(RuntimeError, match=naming(named)):
        call()


# ---------------------------------------------------------------------------------------------
# cosine
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 17, 33), (33, 17)])
def test_cosine_is_that_of_doe_loss(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z1, z2 = views("iid", shape, dtype)
    z1[..., 0, :] = 0
    z2[..., 1, :] *= 1e-3  # shorter than eps: not projected
    cosine, row_stats = ops.cosine(z1, z2, 0.1)
    _, expected, _, expected_stats = ops.doe_loss_grad(z1, z2, "eigh", 0.1)
    assert cosine.dtype == row_stats.dtype == result_dtype(dtype)
    assert torch.equal(cosine, expected)
    assert torch.equal(row_stats, expected_stats)
    assert_value(cosine, reference.oracle_cosine(z1, z2, eps=0.1), VALUE[dtype])


def test_cosine_keeps_nan_in_its_sample() -> None:
    z1, z2 = views("iid", (3, 5, 4), torch.float32)
    z2[1, 2, 3] = math.nan
    cosine, row_stats = ops.cosine(z1, z2, EPS)
    assert cosine.isnan().tolist() == [False, True, False]
    assert row_stats[1].isnan().all()
    assert row_stats[::2].isfinite().all()


def test_cosine_has_no_derivative_of_its_own() -> None:
    z1, z2 = views("iid", (5, 4), torch.float64)
    cosine, _ = ops.cosine(z1.requires_grad_(), z2, EPS)
    with pytest.raises(NotImplementedError, match="doe_loss"):
        cosine.backward()
