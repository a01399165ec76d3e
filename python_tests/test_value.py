"""S and the spectrum against the float64 oracle, on every row of the table of inputs."""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    DEFICIENT_SPECTRA,
    DEGENERATE,
    DEGENERATE_SHAPES,
    DTYPES,
    FEW_SHAPES,
    LAYOUT_BASE_SHAPE,
    LAYOUTS,
    SHAPES,
    SPECTRA,
    VALUE,
    VALUE_DEFICIENT,
    assert_value,
    degenerate_case,
    gaussian,
    generator,
    in_tiers,
    result_dtype,
    spectrum_case,
)
from torch import Tensor

from vne_kernels import reference, spectrum, vn_entropy

pytestmark = pytest.mark.every_backend

NON_FINITE = (math.nan, math.inf, -math.inf)
FLOATS = (torch.float64, torch.float32)


def value_tolerance(spectrum_name: str, dtype: torch.dtype):
    return (VALUE_DEFICIENT if spectrum_name in DEFICIENT_SPECTRA else VALUE)[dtype]


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", in_tiers(SHAPES))
@pytest.mark.parametrize("name", SPECTRA)
def test_spectra(name: str, shape: tuple[int, int], dtype: torch.dtype, method: str) -> None:
    z = spectrum_case(name, shape, dtype)
    s = vn_entropy(z, method=method)
    assert s.dtype == dtype
    assert_value(s, reference.oracle(z), value_tolerance(name, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", FEW_SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_half_precision_is_computed_in_float32_from_the_rounded_input(
    name: str, shape: tuple[int, int], dtype: torch.dtype, method: str
) -> None:
    z = spectrum_case(name, shape, dtype)
    s = vn_entropy(z, method=method)
    assert s.dtype == torch.float32
    assert_value(s, reference.oracle(z), value_tolerance(name, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", DEGENERATE_SHAPES)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate(name: str, shape: tuple[int, int], dtype: torch.dtype, method: str) -> None:
    z = degenerate_case(name, shape, dtype)
    s = vn_entropy(z, method=method)
    assert s >= 0
    assert_value(s, reference.oracle(z), VALUE_DEFICIENT[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", in_tiers([(17, 33), (33, 17), (64, 128), (128, 64)], [(17, 33)]))
@pytest.mark.parametrize("rank", [1, 2, 3, 8, 16])
def test_many_rank_deficient_draws(
    rank: int, shape: tuple[int, int], dtype: torch.dtype, method: str
) -> None:
    """A pivot that is all rounding is rare: one draw does not meet it."""
    g = generator(rank)
    n, d = shape
    z = (gaussian(25 * n, rank, g).view(25, n, rank) @ gaussian(rank, d, g)).to(dtype)
    assert_value(vn_entropy(z, method=method), reference.oracle(z), VALUE_DEFICIENT[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        *((2, 1000), (7, 5), (500, 20)),
        *in_tiers([(64, 64), (128, 512), (300, 300)], first=()),
    ],
)
def test_all_rows_equal_is_zero_and_never_negative(
    shape: tuple[int, int], dtype: torch.dtype, method: str
) -> None:
    for seed in range(5):
        s = vn_entropy(degenerate_case("equal_rows", shape, dtype, seed), method=method)
        assert 0 <= s <= 2e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (8, 1), (1, 300), (300, 1)])
def test_one_row_or_one_feature_is_zero(
    shape: tuple[int, int], dtype: torch.dtype, method: str
) -> None:
    z = spectrum_case("iid", shape, dtype)
    assert 0 <= vn_entropy(z, method=method) <= VALUE[dtype].absolute


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(16, 64), (128, 512), (32, 32), (300, 300)])
def test_orthonormal_rows_reach_log_of_the_rank(
    shape: tuple[int, int], dtype: torch.dtype, method: str
) -> None:
    s = vn_entropy(degenerate_case("orthonormal", shape, dtype), method=method)
    assert_value(s.double(), torch.tensor(math.log(min(shape))).double(), VALUE[torch.float32])


# ---------------------------------------------------------------------------------------------
# Magnitudes of rows, and eps
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "magnitude", "eps"),
    [
        (torch.float32, 1e30, 1e-12),
        (torch.float32, 1e18, 1e-12),
        (torch.float32, 1e-8, 1e-12),
        (torch.float32, 1e-30, 1e-12),  # below eps: the rows are divided by eps and S is near 0
        (torch.float32, 1e-30, 0.0),
        (torch.float32, 1e-30, 1e-38),
        (torch.bfloat16, 1e30, 1e-12),
        (torch.bfloat16, 1e-30, 0.0),
        (torch.float16, 3e3, 1e-12),
        (torch.float16, 1e-3, 1e-12),
        (torch.float64, 1e100, 1e-12),
        (torch.float64, 1e-100, 0.0),
    ],
)
@pytest.mark.parametrize("shape", [(17, 33), (65, 64)])
def test_magnitude_of_rows(
    dtype: torch.dtype, magnitude: float, eps: float, shape: tuple[int, int], method: str
) -> None:
    z = (gaussian(*shape, generator(0)) * magnitude).to(dtype)
    s = vn_entropy(z, method=method, eps=eps)
    assert_value(s, reference.oracle(z, eps=eps), VALUE[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_every_magnitude_in_one_sample(dtype: torch.dtype, method: str) -> None:
    scale = torch.logspace(-11, 25, 17, dtype=torch.float64)
    z = (gaussian(17, 33, generator(0)) * scale[:, None]).to(dtype)
    assert_value(vn_entropy(z, method=method), reference.oracle(z), VALUE[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_shorter_than_eps_are_divided_by_eps(dtype: torch.dtype, method: str) -> None:
    z = spectrum_case("iid", (17, 33), dtype)
    z[::2] *= 0.01
    s = vn_entropy(z, method=method, eps=1.0)
    assert_value(s, reference.oracle(z, eps=1.0), VALUE[dtype])


# ---------------------------------------------------------------------------------------------
# Weights, and rho without normalisation
# ---------------------------------------------------------------------------------------------


def weights_case(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """p that sums to 1 ("uneven"), holds zeros ("zeros"), or sums to 0.3 ("partial")."""
    p = torch.rand(shape, generator=generator(7), dtype=torch.float64) + 0.1
    if kind == "zeros":
        p[..., ::3] = 0
    p = p / p.sum(dim=-1, keepdim=True)
    return (p * 0.3 if kind == "partial" else p).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["uneven", "zeros", "partial"])
@pytest.mark.parametrize("shape", [(2, 2), (17, 33), (33, 17), (128, 65)])
def test_weights(
    shape: tuple[int, int], kind: str, normalize: bool, dtype: torch.dtype, method: str
) -> None:
    z = spectrum_case("iid", shape, dtype)
    z = z / (1 if normalize else shape[1] ** 0.5)
    options = {"weights": weights_case(kind, shape[:1], dtype), "normalize": normalize}
    s = vn_entropy(z, method=method, **options)
    assert_value(s, reference.oracle(z, **options), VALUE[dtype])


@pytest.mark.parametrize("weights_shape", [(17,), (1,), (1, 17), (2, 1, 17), (3, 1), (2, 3, 17)])
def test_weights_broadcast_over_the_batch(weights_shape: tuple[int, ...], method: str) -> None:
    z = spectrum_case("iid", (2, 3, 17, 33), torch.float32)
    weights = weights_case("uneven", weights_shape, torch.float32) / 17
    s = vn_entropy(z, method=method, weights=weights)
    assert_value(s, reference.oracle(z, weights=weights), VALUE[torch.float32])


@pytest.mark.parametrize("weights_dtype", FLOATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_may_have_another_precision(
    dtype: torch.dtype, weights_dtype: torch.dtype, method: str
) -> None:
    z = spectrum_case("iid", (17, 33), dtype)
    weights = weights_case("uneven", (17,), weights_dtype)
    s = vn_entropy(z, method=method, weights=weights)
    assert s.dtype == result_dtype(dtype)
    assert_value(s, reference.oracle(z, weights=weights), VALUE[dtype])


def test_a_sample_of_weight_zero_counts_as_absent(method: str) -> None:
    z = spectrum_case("iid", (17, 33), torch.float64)
    weights = weights_case("zeros", (17,), torch.float64)
    present = weights > 0
    s = vn_entropy(z[present], weights=weights[present], method=method)
    assert_value(vn_entropy(z, weights=weights, method=method), s, VALUE[torch.float64])


def test_all_weights_zero_is_zero(method: str) -> None:
    z = spectrum_case("iid", (17, 33), torch.float32)
    assert vn_entropy(z, weights=torch.zeros(17), method=method) == 0


@pytest.mark.parametrize("bad", [-1.0, -1e-6, math.nan, math.inf])
def test_a_negative_or_non_finite_weight_is_nan_for_its_sample_alone(
    bad: float, method: str
) -> None:
    z = spectrum_case("iid", (3, 17, 33), torch.float32)
    weights = torch.full((3, 17), 1 / 17)
    weights[1, 4] = bad
    s = vn_entropy(z, weights=weights, method=method)
    assert s[1].isnan()
    assert_value(s[::2], reference.oracle(z[::2]), VALUE[torch.float32])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (17, 33), (65, 64)])
def test_without_normalisation(
    shape: tuple[int, int], magnitude: float, dtype: torch.dtype, method: str
) -> None:
    z = spectrum_case("iid", shape, dtype) * magnitude
    s = vn_entropy(z, normalize=False, method=method)
    assert_value(s, reference.oracle(z, normalize=False), VALUE[dtype])


# ---------------------------------------------------------------------------------------------
# Batches, NaN and Inf, layouts
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(1,), (5,), (2, 3), (2, 1, 2)])
def test_a_batch_is_its_samples(batch: tuple[int, ...], dtype: torch.dtype, method: str) -> None:
    z = spectrum_case("iid", (*batch, 17, 33), dtype)
    s = vn_entropy(z, method=method)
    assert s.shape == batch
    assert_value(s, reference.oracle(z), VALUE[dtype])


@pytest.mark.parametrize("batch", [(0,), (0, 3), (3, 0)])
def test_an_empty_batch_is_empty(batch: tuple[int, ...], method: str) -> None:
    z = torch.empty(*batch, 4, 6, requires_grad=True)
    s = vn_entropy(z, method=method)
    assert s.shape == batch
    assert s.dtype == torch.float32
    s.sum().backward()
    assert z.grad.shape == z.shape
    assert spectrum(torch.empty(*batch, 4, 6)).shape == (*batch, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (2, 3), (17, 33), (65, 64)])
def test_nan_or_inf_stays_in_its_sample(
    shape: tuple[int, int], bad: float, dtype: torch.dtype, method: str
) -> None:
    z = spectrum_case("iid", (3, *shape), dtype)
    z[1, shape[0] // 2, shape[1] // 2] = bad
    s = vn_entropy(z, method=method)
    assert s[1].isnan()
    assert_value(s[::2], reference.oracle(z[::2]), VALUE[dtype])


@pytest.mark.parametrize("bad", NON_FINITE)
def test_nan_or_inf_in_a_single_sample_is_nan_and_no_error(bad: float, method: str) -> None:
    for normalize in (True, False):
        z = spectrum_case("iid", (128, 64), torch.float32)
        z[5, 5] = bad
        assert vn_entropy(z, method=method, normalize=normalize).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str, dtype: torch.dtype, method: str) -> None:
    view = LAYOUTS[name](gaussian(*LAYOUT_BASE_SHAPE, generator(0)).to(dtype))
    before = view.clone()
    s = vn_entropy(view, method=method)
    assert_value(s, vn_entropy(view.contiguous(), method=method), VALUE[dtype])
    assert_value(s, reference.oracle(view), VALUE_DEFICIENT[dtype])
    assert torch.equal(view, before)


def test_layout_of_weights(method: str) -> None:
    z = spectrum_case("iid", (4, 16, 12), torch.float32)
    p = weights_case("uneven", (4, 16), torch.float32)
    for weights in (p.mT.contiguous().mT, p.repeat(1, 2)[:, ::2] / 2, p[:1].expand(4, 16)):
        s = vn_entropy(z, weights=weights, method=method)
        assert_value(s, reference.oracle(z, weights=weights), VALUE[torch.float32])


def test_the_same_call_gives_the_same_bits(method: str) -> None:
    z = spectrum_case("relu", (4, 128, 256), torch.float32)
    first = vn_entropy(z, method=method)
    assert all(torch.equal(first, vn_entropy(z, method=method)) for _ in range(5))


# ---------------------------------------------------------------------------------------------
# spectrum
# ---------------------------------------------------------------------------------------------

EIGENVALUE_TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
}
"""Absolute, for a density matrix of trace 1; a few roundings of the largest eigenvalue."""


def eigenvalues(z: Tensor, *, normalize: bool = True, weights: Tensor | None = None) -> Tensor:
    """Squared singular values of diag(sqrt p) U, in float64."""
    z = z.double()
    u = torch.nn.functional.normalize(z, dim=-1) if normalize else z
    p = torch.ones(z.shape[:-1]).double() / z.shape[-2] if weights is None else weights.double()
    p = p / p.sum(-1, keepdim=True) if normalize else p
    return torch.linalg.svdvals(p.sqrt().unsqueeze(-1) * u).square()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (8, 1), *FEW_SHAPES])
@pytest.mark.parametrize("name", SPECTRA)
def test_spectrum(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    z = spectrum_case(name, (2, *shape), dtype)
    eig_val = spectrum(z)
    assert eig_val.dtype == result_dtype(dtype)
    assert eig_val.shape == (2, min(shape))
    assert (eig_val >= 0).all()
    assert (eig_val.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(
        eig_val.double(), eigenvalues(z), rtol=0, atol=EIGENVALUE_TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(17, 33), (33, 17)])
def test_spectrum_with_weights(shape: tuple[int, int], normalize: bool, dtype: torch.dtype) -> None:
    z = spectrum_case("iid", (2, *shape), dtype) / shape[1] ** 0.5
    weights = weights_case("zeros", shape[:1], dtype)
    eig_val = spectrum(z, weights=weights, normalize=normalize)
    expected = eigenvalues(z, weights=weights, normalize=normalize)
    torch.testing.assert_close(eig_val.double(), expected, rtol=0, atol=EIGENVALUE_TOLERANCE[dtype])


@pytest.mark.parametrize("name", DEGENERATE)
def test_spectrum_of_degenerate_input(name: str) -> None:
    z = degenerate_case(name, (12, 40), torch.float32)
    eig_val = spectrum(z)
    assert (eig_val >= 0).all()
    torch.testing.assert_close(
        eig_val.double(), eigenvalues(z), rtol=0, atol=EIGENVALUE_TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("bad", NON_FINITE)
def test_spectrum_keeps_nan_in_its_sample(bad: float) -> None:
    z = spectrum_case("iid", (3, 17, 33), torch.float32)
    z[1, 4, 5] = bad
    eig_val = spectrum(z)
    assert eig_val[1].isnan().all()
    assert eig_val[::2].isfinite().all()
