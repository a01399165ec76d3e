"""Given matrices with eigenvalues below 0, which count as 0: value and gradient, on every backend.

The oracle is NumPy's eigenvalues in float64 of the matrix as it is rounded to its dtype, and
autograd through the formula of those above 0.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from cases import (
    GRADIENT_FLOAT64,
    GRADIENT_WELL_CONDITIONED,
    ROUNDING,
    VALUE,
    VALUE_DEFICIENT,
    assert_value,
    generator,
    gradient,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vne_kernels import (
    DensityAccumulator,
    conditional_entropy,
    mutual_information,
    relative_entropy,
    renyi_entropy_from_density,
    tsallis_entropy_from_density,
    vendi_score,
    vn_entropy_from_density,
)
from vne_kernels._core import spectra
from vne_kernels._core.dtypes import compute_dtype

pytestmark = pytest.mark.every_backend

ALL_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
SHARES = (1e-9, 1e-6, 1e-3, 0.05)
"""Of the eigenvalues below 0, to the sum of the others."""

OfMatrix = Callable[[Tensor], Tensor]


def entropy(values: Tensor) -> Tensor:
    return -(values * values.log()).sum()


def over_sum(values: Tensor) -> Tensor:
    return values / values.sum()


def renyi(values: Tensor, alpha: float) -> Tensor:
    p = over_sum(values)
    return -p.max().log() if alpha == math.inf else (p**alpha).sum().log() / (1 - alpha)


ORDERS = (0.5, 2, 3, math.inf)
FUNCTIONS: dict[str, tuple[OfMatrix, OfMatrix]] = {
    "auto": (vn_entropy_from_density, entropy),
    "eigh": (partial(vn_entropy_from_density, method="eigh"), entropy),
    "unit trace": (
        partial(vn_entropy_from_density, normalize_trace=True),
        lambda values: entropy(over_sum(values)),
    ),
    "bits": (
        partial(vn_entropy_from_density, base=2),
        lambda values: entropy(values) / math.log(2),
    ),
    **{
        f"Renyi {alpha}": (
            partial(renyi_entropy_from_density, alpha=alpha),
            partial(renyi, alpha=alpha),
        )
        for alpha in ORDERS
    },
    "Renyi 1": (
        partial(renyi_entropy_from_density, alpha=1),
        lambda values: entropy(over_sum(values)),
    ),
    "Tsallis 2": (
        partial(tsallis_entropy_from_density, q=2),
        lambda values: 1 - over_sum(values).square().sum(),
    ),
    "Vendi 1": (
        partial(vendi_score, is_kernel=True, normalize=False),
        lambda values: entropy(over_sum(values)).exp(),
    ),
    "Vendi 2": (
        partial(vendi_score, q=2, is_kernel=True, normalize=False),
        lambda values: 1 / over_sum(values).square().sum(),
    ),
}
"""Of a matrix, and the same of its eigenvalues above 0."""
BY_POLES = (partial(vn_entropy_from_density, method="poles"), entropy)


def functions(dtype: torch.dtype) -> dict[str, tuple[OfMatrix, OfMatrix]]:
    return FUNCTIONS if dtype.is_complex else FUNCTIONS | {"poles": BY_POLES}


def with_spectrum(values: Tensor, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix of these eigenvalues, in random directions, rounded to dtype."""
    d = len(values)
    exact = torch.complex128 if dtype.is_complex else torch.float64
    v = torch.linalg.qr(torch.randn(d, d, generator=generator(seed), dtype=exact)).Q
    matrix = (v * values) @ v.mH
    return ((matrix + matrix.mH) / 2).to(dtype)


def not_positive(d: int, share: float, seed: int, dtype: torch.dtype) -> Tensor:
    """A quarter of its eigenvalues are below 0; the trace is about 1."""
    values = 0.2 + torch.rand(d, generator=generator(seed), dtype=torch.float64)
    negative = torch.arange(d) < math.ceil(d / 4) if d > 1 else torch.zeros(1, dtype=torch.bool)
    factor = torch.where(negative, -share / values[negative].sum(), 1 / values[~negative].sum())
    return with_spectrum(factor * values, seed, dtype)


def positive_eigenvalues(matrix: Tensor, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Those above `floor` times the largest (k,), and their vectors (d, k), by NumPy in float64."""
    wide = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64).numpy()
    values, vectors = np.linalg.eigh((wide + wide.conj().T) / 2)
    above = values > floor * values.max()
    return torch.from_numpy(values[above]), torch.from_numpy(vectors[:, above])


def exact(of_values: OfMatrix, matrix: Tensor, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """The value, and the gradient V diag(df/dl) V^H, 0 where l is not above 0."""
    values, v = positive_eigenvalues(matrix, floor)
    values.requires_grad_()
    value = of_values(values)
    (slope,) = torch.autograd.grad(value, values)
    return value.detach(), (v * slope) @ v.mH


def assert_exact(function: OfMatrix, of_values: OfMatrix, batch: Tensor, name: str) -> None:
    dtype = batch.dtype
    # Orders below 1 count what the dtype of the result resolves.
    rounding = batch.shape[-1] * torch.finfo(compute_dtype(batch.dtype)).eps
    floor = rounding if name == "Renyi 0.5" else 0.0
    expected = [exact(of_values, matrix, floor) for matrix in batch]
    s = function(batch)
    assert s.dtype == compute_dtype(batch.dtype)
    tolerances = (
        VALUE_DEFICIENT if name == "poles" else VALUE
    )  # rounding leaves some barely positive
    assert_value(s, torch.stack([value for value, _ in expected]), tolerances[dtype.to_real()])
    allowed = GRADIENT_FLOAT64 if dtype.to_real() == torch.float64 else GRADIENT_WELL_CONDITIONED
    allowed = 2 * ROUNDING[dtype] if dtype in ROUNDING else allowed
    for grad, (_, wanted) in zip(gradient(function, batch), expected, strict=True):
        error = (grad.to(wanted.dtype) - wanted).norm()
        # Of Rényi's and Vendi's: a sum of terms that cancel where all eigenvalues are alike.
        assert error <= allowed * max(float(wanted.norm()), 1.0), (name, float(error))


# ---------------------------------------------------------------------------------------------
# The property
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@settings(max_examples=12)
@given(st.integers(1, 40), st.sampled_from(SHARES), st.integers(0, 2**31))
@example(200, 1e-3, 0)
def test_negative_eigenvalues_count_as_0(
    dtype: torch.dtype, d: int, share: float, seed: int
) -> None:
    """Measured: 2e-15 and 1.2e-6; gradients 1e-13 and 3e-7, in bfloat16 2.8e-3."""
    batch = torch.stack([not_positive(d, share, seed + k, dtype) for k in range(2)])
    for name, (function, of_values) in functions(dtype).items():
        assert_exact(function, of_values, batch, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [20, pytest.param(450, marks=pytest.mark.cpu_only("slow"))])
def test_positive_matrices_that_the_operators_take(d: int, dtype: torch.dtype) -> None:
    """By method="poles"; a batch with others as well."""
    values = over_sum(0.1 + torch.rand(d, generator=generator(d), dtype=torch.float64))
    batch = torch.stack([with_spectrum(values, seed, dtype) for seed in range(2)])
    for name, (function, of_values) in functions(dtype).items():
        assert_exact(function, of_values, batch, name)
    mixed = torch.stack([batch[0], not_positive(d, 0.05, 1, dtype)])
    for name in ("auto", "poles", "Renyi 2"):
        assert_exact(*functions(dtype)[name], mixed, name)


@pytest.mark.cpu_only("which way is taken")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_invalid_matrix_leaves_the_way_of_the_others(bad: float) -> None:
    values = over_sum(torch.linspace(0.1, 1, 70, dtype=torch.float64))
    clean = torch.stack([with_spectrum(values, seed, torch.float32) for seed in range(3)])
    batch = clean.clone()
    batch[1, 2, 3] = bad
    for name in ("auto", "poles", "unit trace", "Renyi 2", "Vendi 1"):
        function, _ = functions(torch.float32)[name]
        s, grad = function(batch), gradient(function, batch)
        assert s.isnan().tolist() == [False, True, False]
        assert grad.isnan().flatten(1).all(1).tolist() == [False, True, False]
        assert torch.equal(s[::2], function(clean)[::2])
        assert torch.equal(grad[::2], gradient(function, clean)[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_eigenvalue_passes_through_0(dtype: torch.dtype, backend: str) -> None:
    """A batch from 1e-3 below to 1e-3 above, through what the dtype does not resolve."""
    others = torch.linspace(0.1, 1, 71, dtype=torch.float64)
    steps = [0.0, *(10.0**-k for k in range(3, 18)), *(-(10.0**-k) for k in range(3, 18))]
    steps = steps if backend == "cpu" else steps[::5]  # the others take seconds for each
    batch = torch.stack(
        [with_spectrum(torch.cat([torch.tensor([s]).double(), over_sum(others)]), 3) for s in steps]
    ).to(dtype)
    for name in ("auto", "poles", "eigh", "unit trace", "Renyi 2", "Vendi 1"):
        function, of_values = functions(dtype)[name]
        for matrix in batch:
            expected, _ = exact(of_values, matrix)
            assert_value(function(matrix), expected, VALUE[dtype])
            assert gradient(function, matrix).isfinite().all()


@pytest.mark.parametrize("method", ["auto", "eigh", "poles"])
def test_a_matrix_without_a_positive_part(method: str) -> None:
    """The trace below 0 is NaN, of that matrix alone; at 0 the positive part counts."""
    batch = torch.stack([-torch.eye(3), torch.diag(torch.tensor([1.0, -1.0, 0.0])), torch.eye(3)])
    batch[2] /= 3
    for normalize_trace in (False, True):
        function = partial(vn_entropy_from_density, method=method, normalize_trace=normalize_trace)
        s, grad = function(batch), gradient(function, batch)
        assert s[0].isnan()
        assert grad[0].isnan().all()
        assert s[1] == 0
        assert float(s[2]) == pytest.approx(math.log(3), rel=1e-6)
        assert grad[1:].isfinite().all()


# ---------------------------------------------------------------------------------------------
# Parts of a system, and relative entropy
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@settings(max_examples=10)
@given(st.sampled_from(SHARES), st.integers(0, 2**31))
def test_pairs(dtype: torch.dtype, share: float, seed: int) -> None:
    """Each of the three states counts by its own positive part."""
    rho = not_positive(6, share, seed, dtype)
    parts = rho.reshape(2, 3, 2, 3)
    whole, a, b = (
        exact(entropy, part)[0]
        for part in (rho, torch.einsum("ikjk->ij", parts), torch.einsum("kikj->ij", parts))
    )
    for method in ("auto", "eigh") if dtype.is_complex else ("auto", "eigh", "poles"):
        options = {"dims": [np.int64(2), np.int32(3)], "method": method}
        tolerance = VALUE[dtype.to_real()]
        assert_value(conditional_entropy(rho, **options), whole - b, tolerance)
        assert_value(mutual_information(rho, **options), a + b - whole, tolerance)
        bits = mutual_information(rho, base=2, **options)
        assert_value(bits, (a + b - whole) / math.log(2), tolerance)


def exact_relative_entropy(rho: Tensor, sigma: Tensor) -> Tensor:
    """Of the positive parts, where that of sigma has the support of that of rho."""
    (lam, v), (mu, w) = positive_eigenvalues(rho), positive_eigenvalues(sigma)
    weights = ((w.mH @ v).abs().square() * lam).sum(1)
    return -entropy(lam) - (weights * mu.log()).sum()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@settings(max_examples=12)
@given(st.integers(2, 40), st.sampled_from(SHARES), st.integers(0, 2**31))
def test_relative_entropy(dtype: torch.dtype, d: int, share: float, seed: int) -> None:
    """rho with eigenvalues below 0, sigma of full rank; then sigma where rho's support is left."""
    rho = not_positive(d, share, seed, dtype)
    values = over_sum(0.2 + torch.rand(d, generator=generator(seed + 1), dtype=torch.float64))
    sigma = with_spectrum(values, seed + 1, dtype)
    expected = exact_relative_entropy(rho, sigma)
    assert_value(relative_entropy(rho, sigma), expected, VALUE[dtype.to_real()])
    assert_value(relative_entropy(rho, sigma, base=2) * math.log(2), expected, VALUE[torch.float32])
    for part in (gradient(lambda x: relative_entropy(x, sigma), rho), rho):
        assert part.isfinite().all()
    assert relative_entropy(sigma, rho) == math.inf or share < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradient_of_relative_entropy(dtype: torch.dtype) -> None:
    """By differences, where no eigenvalue is near 0, and within the support of sigma."""
    values = torch.tensor([-0.03, -0.01, 0.1, 0.24, 0.3, 0.4], dtype=torch.float64)
    rho = with_spectrum(values, 0, dtype).requires_grad_()
    sigma = with_spectrum(over_sum(values.abs()), 1, dtype).requires_grad_()
    assert torch.autograd.gradcheck(relative_entropy, (rho, sigma), check_forward_ad=True)
    basis = torch.linalg.qr(torch.randn(6, 4, generator=generator(2), dtype=dtype)).Q
    inner = [with_spectrum(over_sum(values[2:]), seed, dtype) for seed in (3, 4)]
    outside = torch.eye(6, dtype=dtype) - basis @ basis.mH
    rho, sigma = (basis @ part @ basis.mH - 0.01 * outside for part in inner)
    torch.testing.assert_close(relative_entropy(rho, sigma), relative_entropy(*inner))
    for place in range(2):

        def of_whole(x: Tensor, place: int = place) -> Tensor:
            return relative_entropy(x, sigma) if place == 0 else relative_entropy(rho, x)

        def of_part(x: Tensor, place: int = place) -> Tensor:
            return relative_entropy(x, inner[1]) if place == 0 else relative_entropy(inner[0], x)

        whole, part = gradient(of_whole, (rho, sigma)[place]), gradient(of_part, inner[place])
        assert ((basis.mH @ whole @ basis) - part).norm() <= GRADIENT_FLOAT64 * part.norm()
        assert (outside @ whole @ outside).norm() <= GRADIENT_FLOAT64 * part.norm()


# ---------------------------------------------------------------------------------------------
# What was wrong, each number with its right value
# ---------------------------------------------------------------------------------------------


def every_route(kernel: Tensor) -> dict[str, Tensor]:
    """Scores of order 1 of a kernel whose diagonal is 1."""
    score = partial(vendi_score, is_kernel=True)
    unit = partial(vn_entropy_from_density, normalize_trace=True)
    return {
        "score": score(kernel),
        "as given": score(kernel, normalize=False),
        "near 1": score(kernel, 1.000001),
        "float32": score(kernel.float()),
        "complex64": score(kernel.to(torch.complex64)),
        "complex128": score(kernel.to(torch.complex128)),
        "Renyi": renyi_entropy_from_density(kernel, 1).exp(),
        **{
            f"{method} of {x.dtype}": unit(x, method=method).exp()
            for method in ("auto", "eigh", "poles")
            for x in (kernel, kernel.float())
        },
    }


def assert_every_route(kernel: Tensor, number: float) -> Tensor:
    """All give the effective number, which is this; returns the eigenvalues above 0."""
    values, _ = positive_eigenvalues(kernel)
    expected = float(entropy(over_sum(values)).exp())
    assert expected == pytest.approx(number, abs=1e-4)
    for name, score in every_route(kernel).items():
        assert float(score) == pytest.approx(expected, rel=1e-5), name
    return values


def test_cosine_kernel_rounded_to_two_decimals() -> None:
    """As read from a CSV file."""
    z = torch.randn(200, 16, generator=generator(0), dtype=torch.float64)
    u = torch.nn.functional.normalize(z, dim=1)
    kernel = (u @ u.mT).round(decimals=2)
    values = assert_every_route(kernel, 17.0496)
    for q in (2, 3):
        ours = vendi_score(kernel, q, is_kernel=True)
        assert float(ours) == pytest.approx(float(renyi(values, q).exp()), rel=1e-12)


def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def test_kernel_of_edit_distances() -> None:
    draw = random.Random(0)
    strings = ["".join(draw.choices("acgt", k=10)) for _ in range(100)]
    kernel = torch.tensor(
        [[1 - edit_distance(a, b) / 10 for b in strings] for a in strings], dtype=torch.float64
    )
    assert_every_route(kernel, 23.6464)


def test_state_of_a_tomography() -> None:
    values = torch.tensor([-0.0135, 0.03, 0.04, 0.9435], dtype=torch.float64)
    expected = float(torch.special.entr(values[1:]).sum())
    for dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        rho = with_spectrum(values, 1).to(dtype)
        tolerance = 1e-12 if dtype.to_real() == torch.float64 else 1e-6
        assert float(vn_entropy_from_density(rho)) == pytest.approx(expected, abs=tolerance)
    real = with_spectrum(values, 1)
    for function in (conditional_entropy, mutual_information):
        of_real = function(real, (2, 2))
        torch.testing.assert_close(of_real, function(real.to(torch.complex128), (2, 2)))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("n", [10, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_and_scores_of_an_accumulator_agree(
    dtype: torch.dtype, n: int, double: bool
) -> None:
    z = torch.randn(n, 64, generator=generator(0), dtype=torch.float64).to(dtype)
    sums = DensityAccumulator(np.int64(64), double=double).update(z)
    entropies = sums.entropy(), sums.scores()["entropy"]
    assert float(entropies[0]) == pytest.approx(float(entropies[1]), abs=1e-12)
    assert float(sums.entropy(base=2)) == pytest.approx(float(entropies[0]) / math.log(2))
    assert float(entropies[0]) == pytest.approx(
        float(spectra.vn_entropy(sums.eigenvalues())), abs=1e-12
    )
