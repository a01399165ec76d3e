"""The one table of inputs and tolerances that every test imports.

Inputs are made in float64 and rounded to the dtype under test; the oracle reads the rounded input,
so that an error is the operator's own. Each tolerance has the measured error next to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from vne_kernels import reference

METHODS = ("eigh", "poles")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of S for an input of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------
# Spectra: (n, d, generator) -> (n, d) float64
# ---------------------------------------------------------------------------------------------


def gaussian(n: int, d: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, d, generator=g, dtype=torch.float64)


def relu_network(n: int, d: int, g: torch.Generator) -> Tensor:
    """Features of a random two-layer ReLU network: positive, so one direction dominates."""
    hidden = (gaussian(n, 64, g) @ gaussian(64, 256, g) / 8).relu()
    return (hidden @ gaussian(256, d, g) / 16).relu() + 1e-3 * gaussian(n, d, g).abs()


def decaying(n: int, d: int, g: torch.Generator) -> Tensor:
    """Singular values from 1 to 1e-3: eigenvalues over six decades."""
    m = min(n, d)
    left = torch.linalg.qr(gaussian(n, m, g)).Q
    right = torch.linalg.qr(gaussian(d, m, g)).Q
    return (left * torch.logspace(0, -3, m, dtype=torch.float64)) @ right.mT


def duplicated(n: int, d: int, g: torch.Generator) -> Tensor:
    """Every row twice, as of two identical views; the last one once if n is odd."""
    return gaussian((n + 1) // 2, d, g).repeat(2, 1)[:n]


def rank_3(n: int, d: int, g: torch.Generator) -> Tensor:
    r = min(3, n, d)
    return gaussian(n, r, g) @ gaussian(r, d, g)


def near_collapse(n: int, d: int, g: torch.Generator) -> Tensor:
    """One direction, and noise of 1% around it."""
    return gaussian(1, d, g) + 1e-2 * gaussian(n, d, g)


def repeated_eigenvalues(n: int, d: int, g: torch.Generator) -> Tensor:
    """Two copies of one batch in orthogonal subspaces: every eigenvalue twice."""
    block = gaussian(max(n // 2, 1), max(d // 2, 1), g)
    z = torch.block_diag(block, block)[:n, :d]
    z = torch.nn.functional.pad(z, (0, d - z.shape[1], 0, n - z.shape[0]))
    return torch.where(z.any(dim=1, keepdim=True), z, z[:1])  # odd n: the first row once more


SPECTRA: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "iid": gaussian,
    "relu": relu_network,
    "decay": decaying,
    "duplicated": duplicated,
    "rank3": rank_3,
    "collapse": near_collapse,
    "repeated": repeated_eigenvalues,
}


def spectrum_case(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(..., n, d) of one spectrum: every sample of a batch is another draw."""
    *batch, n, d = shape
    g = generator(seed)
    draws = [SPECTRA[name](n, d, g) for _ in range(math.prod(batch))]
    return torch.stack(draws).reshape(shape).to(dtype)


def views(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A batch and a second view of it: the same rows under noise, of another length."""
    z1 = spectrum_case(name, shape, dtype)
    noise = torch.randn(shape, generator=generator(1), dtype=torch.float64)
    z2 = 3 * z1.double() + noise * z1.double().std()
    return z1, z2.to(dtype)


# ---------------------------------------------------------------------------------------------
# Shapes: m = min(n, d) from 1 to 300, both sides, powers of two and their neighbours
# ---------------------------------------------------------------------------------------------

SHAPES = (
    (2, 2),
    (2, 5),
    (3, 2),
    (17, 33),
    (33, 17),
    (63, 65),
    (65, 64),
    (64, 64),
    (127, 130),
    (130, 129),
    (128, 512),
    (512, 128),
    (300, 301),
)
FEW_SHAPES = ((3, 2), (17, 33), (128, 512), (65, 64))


def in_tiers(values: Iterable[object], first: Container[object] = FEW_SHAPES) -> list[object]:
    """Parameters of a test: those outside of `first` are slow, and so in the second tier."""
    return [v if v in first else pytest.param(v, marks=pytest.mark.slow) for v in values]


TABLE_SHAPE = (128, 512)
"""The shape of DESIGN's table of gradient errors."""

# ---------------------------------------------------------------------------------------------
# Degenerate inputs: (n, d, generator) -> (n, d) float64, all of them finite
# ---------------------------------------------------------------------------------------------


def equal_rows(n: int, d: int, g: torch.Generator) -> Tensor:
    return gaussian(1, d, g).repeat(n, 1)


def opposite_rows(n: int, d: int, g: torch.Generator) -> Tensor:
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(n)[:n]
    return equal_rows(n, d, g) * signs[:, None]


def zero_row(n: int, d: int, g: torch.Generator) -> Tensor:
    z = gaussian(n, d, g)
    z[n // 2] = 0
    return z


def zero_matrix(n: int, d: int, g: torch.Generator) -> Tensor:
    return torch.zeros(n, d, dtype=torch.float64)


def dead_columns(n: int, d: int, g: torch.Generator) -> Tensor:
    """Half of the features are 0 for every sample, as behind a dead ReLU."""
    z = gaussian(n, d, g)
    z[:, 1::2] = 0
    return z


def rank_8(n: int, d: int, g: torch.Generator) -> Tensor:
    r = min(8, n, d)
    return gaussian(n, r, g) @ gaussian(r, d, g)


def orthonormal_rows(n: int, d: int, g: torch.Generator) -> Tensor:
    """The maximum of S: one eigenvalue, m times; for n > d the d x d side is a multiple of I."""
    basis = torch.linalg.qr(gaussian(d, d, g)).Q
    return basis.repeat(-(-n // d), 1)[:n]


def one_hot_rows(n: int, d: int, g: torch.Generator) -> Tensor:
    """Exact zeros and ones: repeated eigenvalues without any rounding."""
    return torch.nn.functional.one_hot(torch.arange(n) % min(3, d), d).double()


DEGENERATE: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "equal_rows": equal_rows,
    "opposite_rows": opposite_rows,
    "zero_row": zero_row,
    "zero_matrix": zero_matrix,
    "dead_columns": dead_columns,
    "rank8": rank_8,
    "orthonormal": orthonormal_rows,
    "one_hot": one_hot_rows,
}
DEGENERATE_SHAPES = ((5, 3), (12, 40), (40, 12), (64, 128), (33, 33))


def degenerate_case(name: str, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return DEGENERATE[name](*shape, generator(seed)).to(dtype)


# ---------------------------------------------------------------------------------------------
# Layouts: (n, d) leaf -> a view of it that is not the plain contiguous matrix
# ---------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda base: base.mT,
    "transposed_copy": lambda base: base.mT.contiguous().mT,
    "row_slice": lambda base: base[2:-1],
    "row_step": lambda base: base[::2],
    "column_slice": lambda base: base[:, 1:-2],
    "column_step": lambda base: base[:, ::3],
    "offset": lambda base: base.flatten()[1:-11].view(-1, 12),
    "overlapping": lambda base: base.flatten().unfold(0, 12, 5),
    "expanded_rows": lambda base: base[:1].expand(6, -1),
    "expanded_columns": lambda base: base[:, :1].expand(-1, 6),
    "expanded_batch": lambda base: base.expand(3, -1, -1),
    "batch_inside": lambda base: base.view(4, 4, 12).permute(1, 0, 2),
    "features_first": lambda base: base.view(2, 8, 12).permute(2, 0, 1),
    "batch_step": lambda base: base.view(4, 4, 12)[::2],
}
LAYOUT_BASE_SHAPE = (16, 12)

# ---------------------------------------------------------------------------------------------
# Tolerances
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """|value - oracle| <= relative * |oracle| + absolute; `measured` is the worst of the table,
    torch 2.14.1 on an x86 CPU.
    """

    relative: float
    absolute: float
    measured: str


VALUE = {
    torch.float64: Tolerance(1e-12, 1e-12, "4e-15 eigh, 5e-14 poles"),
    torch.float32: Tolerance(1e-5, 1e-6, "3e-7 eigh, 2e-6 poles, relative"),
    torch.bfloat16: Tolerance(1e-5, 1e-6, "as float32: the same computation"),
    torch.float16: Tolerance(1e-5, 1e-6, "as float32: the same computation"),
}
"""S of an input of this dtype, where A has full rank."""

VALUE_DEFICIENT = {
    torch.float64: Tolerance(1e-12, 1e-12, "1e-13, absolute"),
    torch.float32: Tolerance(1e-5, 3e-5, "4e-6 eigh, 4e-6 poles, absolute"),
    torch.bfloat16: Tolerance(1e-5, 3e-5, "as float32: the same computation"),
    torch.float16: Tolerance(1e-5, 3e-5, "as float32: the same computation"),
}
"""S where the rank is deficient or the batch near collapse."""

DEFICIENT_SPECTRA = {"duplicated", "rank3", "collapse"}

GRADIENT_WELL_CONDITIONED = 2e-5
"""|error| / |g| in float32 where `is_well_conditioned`. Measured at (128, 512): 8e-6 eigh, 9e-7
poles; 1.2e-5 eigh over all shapes."""
GRADIENT_OF_EIGH = 1.5
"""Error in float32 over that of `reference.eigh_grad` on the same inputs, anywhere; mean over
`gradient_cases`. Measured: at most 1.09 eigh; at (128, 512) 0.2 to 1.2 eigh, 0.07 to 0.36 poles."""
GRADIENT_OF_EIGH_TINY = 3.0
"""The same for m <= 3, where either error is that of a few roundings. Measured: 1.8 eigh, 2.4
poles."""
AVERAGED_M = 64
"""m from which one matrix is an average over rounding by itself."""
SINGLE_DRAW = 2.0
"""Additional factor where `test_device.py` judges a smaller matrix by a single draw instead of the
mean over `gradient_cases`. Measured over 6000 random cases: at most 1.6, two rows near collapse."""
GRADIENT_FLOAT64 = 1e-10
"""|error| / `gradient_scale` in float64. Measured: 1.1e-12, near collapse."""
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
"""|error| / |g| that rounding the gradient to the input's dtype brings."""


WELL_CONDITIONED = ("iid", "relu", "repeated")


def is_well_conditioned(z: Tensor) -> bool:
    """Whether the eigenvalues of the smaller side lie within four decades of each other."""
    u = torch.nn.functional.normalize(z.double(), dim=-1)
    eig_val = torch.linalg.svdvals(u).square()
    return bool((eig_val[..., -1] > 1e-4 * eig_val[..., 0]).all())


def gradient_scale(z: Tensor) -> float:
    """Size of the terms that cancel in the projection (4): 2 p_i log(m) |u_i| / |z_i| over i.

    A gradient that is exactly 0 (orthonormal rows) is right to within rounding of this.
    """
    n, d = z.shape[-2:]
    norm = torch.linalg.vector_norm(z.double(), dim=-1)
    norm = norm[norm > 0]
    return float(2 / n * max(1.0, math.log(min(n, d))) * norm.reciprocal().norm())


def gradient_floor(z: Tensor) -> float:
    """Error that rounding in the computation's dtype cannot avoid."""
    return 4 * torch.finfo(result_dtype(z.dtype)).eps * gradient_scale(z)


# ---------------------------------------------------------------------------------------------
# Assertions
# ---------------------------------------------------------------------------------------------


def assert_value(value: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    """`value` has the oracle's shape, and every entry is within the tolerance of it."""
    assert value.shape == expected.shape
    torch.testing.assert_close(
        value.double(), expected.double(), rtol=tolerance.relative, atol=tolerance.absolute
    )


def hessian_product(value: Tensor, z: Tensor) -> None:
    """Asks for a second derivative."""
    (grad,) = torch.autograd.grad(value, z, create_graph=True)
    grad.square().sum().backward()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Frobenius norm."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def absolute_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm())


def eigh_error(z: Tensor, **options: object) -> float:
    """|error| of the yardstick: the closed form by `eigh` in the precision of z."""
    yardstick = reference.eigh_grad(z, **options)
    return absolute_error(yardstick, reference.oracle_grad(z, **options))


@dataclass(frozen=True)
class GradientCase:
    """An input, its exact gradient, and what a method may be off by."""

    z: Tensor
    exact: Tensor
    eigh_error: float
    floor: float
    well_conditioned: bool


@cache
def gradient_case(
    name: str, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> GradientCase:
    """One row of the spectra or degenerate inputs; cached, since every method is held to it."""
    make = spectrum_case if name in SPECTRA else degenerate_case
    z = make(name, shape, dtype, seed)
    return GradientCase(
        z, reference.oracle_grad(z), eigh_error(z), gradient_floor(z), is_well_conditioned(z)
    )


SEEDS = {  # up to m = 8, up to m = 64, and beyond, where a matrix averages by itself
    "cpu": (24, 24, 3),
    "cuda": (24, 24, 3),
    "emulated": (6, 6, 1),
    "triton": (6, 3, 1),
}
"""Draws. The emulation and Triton's interpreter, which take a hundred times as long, run the
sources that are drawn for in full where there is a GPU."""


def gradient_cases(name: str, shape: tuple[int, int], backend: str) -> list[GradientCase]:
    """float32 draws to average over: one may be lucky, and a bad pivot is rare."""
    m = min(shape)
    seeds = SEEDS[backend][(m > 8) + (m > 64)]
    return [gradient_case(name, shape, torch.float32, seed) for seed in range(seeds)]


def gradient(function: Callable[..., Tensor], z: Tensor, **options: object) -> Tensor:
    """d(sum of function)/dz at a copy of z."""
    leaf = z.detach().clone().requires_grad_()
    function(leaf, **options).sum().backward()
    assert leaf.grad is not None
    return leaf.grad
