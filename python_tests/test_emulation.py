"""The CUDA kernels on the host, and what their emulation finds.

A kernel that lacks a barrier gives another result where the threads run in another order, so every
stage has to give the same bits in three orders.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import emulation
import numpy as np
import pytest
import torch
from cases import (
    DEFICIENT_SPECTRA,
    DEGENERATE,
    DTYPES,
    GRADIENT_FLOAT64,
    GRADIENT_WELL_CONDITIONED,
    METHODS,
    SHAPES,
    SPECTRA,
    TABLE_SHAPE,
    VALUE,
    VALUE_DEFICIENT,
    absolute_error,
    assert_value,
    degenerate_case,
    gaussian,
    generator,
    gradient_case,
    gradient_floor,
    gradient_scale,
    is_well_conditioned,
    relative_error,
    spectrum_case,
    views,
)
from torch import Tensor

from vne_kernels import reference

ORDERS = ("forward", "backward", "shuffled")
THREADS = 128  # of a block of the kernels in csrc/emulation/tests/faults.cu
INPUT = torch.arange(2 * THREADS, dtype=torch.float32)

# ---------------------------------------------------------------------------------------------
# The emulator itself
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faults() -> Any:
    return emulation.load(emulation.FAULTS)


def in_every_order(
    module: Any, name: str, *arguments: object, orders: tuple[str, ...] = ORDERS
) -> list:
    results = []
    for order in orders:
        module.set_order(order)
        results.append(getattr(module, name)(*arguments))
    module.set_order("forward")
    return results


def agree(results: list[Tensor]) -> bool:
    bits = [result.numpy().tobytes() for result in results]
    return all(each == bits[0] for each in bits)


def test_threads_that_meet_agree_in_every_order(faults: Any) -> None:
    rotated = INPUT.view(-1, THREADS).roll(-1, 1).flatten()
    for result in in_every_order(faults, "rotate", INPUT):
        np.testing.assert_array_equal(result, rotated)


@pytest.mark.parametrize("name", ["rotate_without_barrier", "add_previous_block"])
def test_a_missing_barrier_shows_in_another_order(faults: Any, name: str) -> None:
    assert not agree(in_every_order(faults, name, INPUT))


def test_shared_memory_begins_as_nan_in_every_block(faults: Any) -> None:
    assert faults.leftovers(INPUT).isnan().all()


def test_exchanges(faults: Any) -> None:
    x = INPUT[:THREADS].numpy()
    lanes = x.reshape(-1, 32)
    expected = [
        np.repeat(lanes[:, 3], 32),
        x.reshape(-1, 8)[:, np.arange(8) ^ 5].ravel(),
        np.repeat(lanes.sum(axis=1), 32),
        np.repeat(lanes.max(axis=1), 32),
        np.repeat(lanes.max(axis=1), 32),
        np.full(THREADS, x.sum()),
        np.ones(THREADS),
    ]
    for result in in_every_order(faults, "exchanges", INPUT[:THREADS]):
        np.testing.assert_array_equal(result.reshape(7, THREADS), expected)


def test_every_half(faults: Any) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    expected = halves.astype(np.float32)
    np.testing.assert_array_equal(faults.halves(torch.from_numpy(halves)), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_return", r"127 .*__syncthreads"),
        ("divergent_branch", r"32 .*__syncthreads .*96 .*__syncthreads"),
        ("divergent_shuffle", r"124 .*__shfl_sync"),
        ("partial_mask", r"__shfl_sync.*mask"),
        ("too_much_shared", r"48 KB"),
    ],
)
def test_what_a_gpu_would_not_report(faults: Any, name: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"faulty.*block 0.*{message}"):
        getattr(faults, name)(INPUT)
    np.testing.assert_array_equal(faults.rotate(INPUT)[:3], [1, 2, 3])  # and goes on


def test_launches_are_recorded(faults: Any) -> None:
    faults.clear_launches()
    faults.exchanges(INPUT[:THREADS])
    faults.halves(INPUT.half())
    faults.halves(INPUT[:0].half())  # no blocks launch nothing
    assert faults.launches() == ["exchanges", "halves"]


SANITIZED = f"""
import sys
import torch
torch.ops.load_library(sys.argv[1])
faults = torch.ops.{emulation.FAULTS}
x = torch.arange({THREADS}, dtype=torch.float32)
print(eval(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def sanitized_faults() -> Path:
    return emulation.build(emulation.FAULTS, sanitize=True)


def run_sanitized(module: Path, expression: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SANITIZED, str(module), expression],
        env=emulation.sanitizer_environment(),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("expression", ["faults.exchanges(x)", "faults.beyond_shared(x, 0.0)"])
def test_sanitizers_accept_what_is_right(sanitized_faults: Path, expression: str) -> None:
    done = run_sanitized(sanitized_faults, expression)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("faults.beyond_shared(x, 1.0)", "heap-buffer-overflow"),
        ("faults.beyond_global(x, 1.0)", "heap-buffer-overflow"),
        ("faults.misaligned(x)", "misaligned address"),
    ],
)
def test_sanitizers_find(sanitized_faults: Path, expression: str, error: str) -> None:
    done = run_sanitized(sanitized_faults, expression)
    assert done.returncode != 0
    assert error in done.stderr
    assert "faults.cu" in done.stderr


# ---------------------------------------------------------------------------------------------
# The operators
# ---------------------------------------------------------------------------------------------

EPS = 1e-12
FLOAT32, FLOAT64 = torch.float32, torch.float64


@pytest.fixture(scope="module")
def kernels() -> Any:
    return emulation.load()


def call(kernels: Any, name: str, *arguments: object) -> tuple[Tensor, ...]:
    """An operator's outputs, which are the same bits in every order of the threads.

    Under the sanitizers, which look at addresses, one order is enough: it takes minutes.
    """
    orders = ORDERS[:1] if emulation.is_sanitized() else ORDERS
    results = in_every_order(kernels, name, *arguments, orders=orders)
    outputs = [result if isinstance(result, tuple) else (result,) for result in results]
    for each in zip(*outputs, strict=True):
        assert agree(list(each))
    return outputs[0]


def assert_gradient(grad: Tensor, z: Tensor, **options: object) -> None:
    """Near the exact one, in a measure that a single draw keeps; the suite at large is stricter."""
    error = absolute_error(grad, reference.oracle_grad(z, **options))
    scale = gradient_scale(z)
    if z.dtype == FLOAT64:
        assert error <= GRADIENT_FLOAT64 * scale
    elif is_well_conditioned(z):
        exact = reference.oracle_grad(z, **options)
        assert error <= GRADIENT_WELL_CONDITIONED * exact.norm() + gradient_floor(z)
    else:
        assert error <= 0.05 * scale


def entropy_cases() -> list[tuple[str, tuple[int, int], str]]:
    """Every spectrum at every shape up to m = 33; beyond, where a thread block is busy for a while,
    each shape and each spectrum at least once a method."""
    large = itertools.cycle(SPECTRA)
    names = {shape: SPECTRA if min(shape) <= 33 else [next(large)] for shape in SHAPES}
    return [
        (name, shape, method) for shape in SHAPES for name in names[shape] for method in METHODS
    ]


@pytest.mark.parametrize(("name", "shape", "method"), entropy_cases())
def test_entropy(kernels: Any, name: str, shape: tuple[int, int], method: str) -> None:
    z = spectrum_case(name, shape, FLOAT32)
    value, grad, grad_weights = call(kernels, "vn_entropy_grad", z, None, True, method, EPS)
    tolerance = (VALUE_DEFICIENT if name in DEFICIENT_SPECTRA else VALUE)[FLOAT32]
    assert_value(value, reference.oracle(z), tolerance)
    assert_gradient(grad, z)
    assert grad_weights.shape == (0,)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5, 3), (12, 40), (40, 12), (33, 33)])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate(kernels: Any, name: str, shape: tuple[int, int], method: str) -> None:
    z = degenerate_case(name, shape, FLOAT32)
    value, grad, _ = call(kernels, "vn_entropy_grad", z, None, True, method, EPS)
    assert_value(value, reference.oracle(z), VALUE_DEFICIENT[FLOAT32])
    assert grad.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(2, 17, 33), (3, 40, 12), (2, 1, 1, 8), (2, 65, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_batches_and_weights(
    kernels: Any, dtype: torch.dtype, shape: tuple[int, ...], normalize: bool, method: str
) -> None:
    z = (spectrum_case("iid", shape, FLOAT64) / shape[-1] ** 0.5).to(dtype)
    compute = FLOAT64 if dtype == FLOAT64 else FLOAT32
    weights = torch.rand(shape[:-1], generator=generator(1), dtype=compute)
    weights[..., 2::5] = 0
    weights /= weights.sum(dim=-1, keepdim=True)
    options = {"weights": weights, "normalize": normalize, "relative": False}
    value, grad, grad_weights = call(kernels, "vn_entropy_grad", z, weights, normalize, method, EPS)
    (alone,) = call(kernels, "vn_entropy", z, weights, normalize, method, EPS)
    assert_value(value, reference.oracle(z, **options), VALUE[dtype])
    assert_value(alone, value, VALUE[dtype])
    assert grad.dtype == grad_weights.dtype == compute
    tolerance = GRADIENT_FLOAT64 if dtype == FLOAT64 else GRADIENT_WELL_CONDITIONED
    exact, exact_grad_weights = (
        oracle(z, **options) for oracle in (reference.oracle_grad, reference.oracle_weights_grad)
    )
    assert absolute_error(grad, exact) <= tolerance * exact.norm() + gradient_floor(z)
    assert relative_error(grad_weights, exact_grad_weights) <= tolerance


@pytest.mark.parametrize("method", METHODS)
def test_strided_and_badly_aligned_input(kernels: Any, method: str) -> None:
    base = torch.randn(4, 18, 36, generator=generator(0))
    for z in (
        base[1:3, 1:, ::2],
        base.mT,
        base.flatten()[1:-7].view(8, -1),
        base[:1].expand(3, -1, -1),
    ):
        assert_value(
            call(kernels, "vn_entropy", z, None, True, method, EPS)[0],
            reference.oracle(z),
            VALUE[FLOAT32],
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 8), (17, 33), (65, 64)])
def test_nan_stays_in_its_sample(kernels: Any, shape: tuple[int, int], method: str) -> None:
    z = spectrum_case("iid", (3, *shape), FLOAT32)
    z[1, shape[0] // 2, shape[1] // 2] = math.nan
    value, grad, _ = call(kernels, "vn_entropy_grad", z, None, True, method, EPS)
    assert value[1].isnan()
    assert grad[1].isnan().all()
    assert_value(value[::2], reference.oracle(z[::2]), VALUE[FLOAT32])
    assert grad[::2].isfinite().all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 17, 33), (33, 17), (128, 65)])
def test_spectrum(kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, weighted: bool) -> None:
    """The eigenvalues' sum of -l log l has the entropy's gradient, and the weights theirs."""
    z = spectrum_case("iid", shape, dtype)
    compute = FLOAT64 if dtype == FLOAT64 else FLOAT32
    weights = torch.full(shape[:-1], 1 / shape[-2], dtype=compute) if weighted else None
    (values,) = call(kernels, "spectrum", z, weights, True, EPS)
    same_values, vectors = call(kernels, "spectrum_eigh", z, weights, True, EPS)
    assert_value(torch.special.entr(values).sum(dim=-1), reference.oracle(z), VALUE[dtype])
    assert_value(same_values, values, VALUE[dtype])
    grad, grad_weights = call(
        kernels, "spectrum_backward", -values.log() - 1, z, vectors, weights, True, EPS
    )
    tolerance = GRADIENT_FLOAT64 if dtype == FLOAT64 else 4 * GRADIENT_WELL_CONDITIONED
    assert relative_error(grad, reference.oracle_grad(z)) <= tolerance
    assert grad_weights.shape == (weights.shape if weighted else (0,))


@pytest.mark.parametrize("options", ["plain", "raw", "weights"])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 17, 33), (33, 17), (130, 65)])
def test_purity(kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, options: str) -> None:
    """tr(rho^2) / tr(rho)^2 and its gradients, by torch's own in float64."""
    z = spectrum_case("relu", shape, dtype)
    normalize, weights = options != "raw", None
    if options == "weights":
        weights = torch.linspace(0, 2, shape[-2]).expand(shape[:-1]).contiguous()
        weights = weights.double() if dtype == FLOAT64 else weights
    (alone,) = call(kernels, "purity", z, weights, normalize, "auto", EPS)
    value, grad, grad_weights = call(kernels, "purity_grad", z, weights, normalize, "auto", EPS)
    leaf = z.double().requires_grad_()
    p = torch.ones(shape[:-1], dtype=FLOAT64) if weights is None else weights.double()
    p.requires_grad_()
    u = torch.nn.functional.normalize(leaf, dim=-1) if normalize else leaf
    rho = u.mT @ (p.unsqueeze(-1) * u)
    exact = rho.square().sum((-1, -2)) / rho.diagonal(dim1=-2, dim2=-1).sum(-1).square()
    exact_grad, exact_grad_weights = torch.autograd.grad(exact.sum(), (leaf, p))
    tolerance = GRADIENT_FLOAT64 if dtype == FLOAT64 else GRADIENT_WELL_CONDITIONED
    for purity in (value, alone):
        assert_value(purity, exact, VALUE[dtype])
    assert relative_error(grad, exact_grad) <= tolerance
    if weights is not None:
        present = weights > 0  # a sample of weight 0 counts as absent
        assert relative_error(grad_weights[present], exact_grad_weights[present]) <= tolerance
        assert (grad_weights[~present] == 0).all()


def test_purity_of_zeros_nan_and_one_direction(kernels: Any) -> None:
    z = spectrum_case("iid", (4, 17, 33), FLOAT32)
    z[1], z[2, 3, 4], z[3] = 0, math.nan, z[3, :1]
    value, grad, _ = call(kernels, "purity_grad", z, None, True, "auto", EPS)
    assert value[1] == 1
    assert value[2].isnan()
    assert 1 - 1e-6 <= value[3] <= 1
    assert (grad[1] == 0).all()
    assert grad[2].isnan().all()
    assert grad[::3].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, torch.float16])
@pytest.mark.parametrize("shape", [(2, 17, 33), (33, 17), (65, 128)])
def test_doe_loss(kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, method: str) -> None:
    z1, z2 = views("iid", shape, dtype)
    for name in ("doe_loss", "doe_loss_grad"):
        entropy, mean_cosine, *rest = call(kernels, name, z1, z2, method, EPS)
        assert_value(entropy, reference.oracle(z1), VALUE[dtype])
        assert_value(mean_cosine, reference.oracle_cosine(z1, z2), VALUE[dtype])
    ones = torch.ones_like(entropy)
    grads = call(kernels, "doe_loss_backward", -ones, -2.5 * ones, z1, z2, *rest)
    leaves = [z.double().requires_grad_() for z in (z1, z2)]
    exact = torch.autograd.grad(reference.oracle_doe(*leaves, 2.5).sum(), leaves)
    tolerance = GRADIENT_FLOAT64 if dtype == FLOAT64 else 4 * GRADIENT_WELL_CONDITIONED
    for grad, expected in zip(grads, exact, strict=True):
        assert relative_error(grad, expected) <= tolerance


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 17, 33), (33, 17), (4, 1), (70, 65)])
def test_stages_of_a_batch_that_is_spread_over_processes(
    kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, method: str
) -> None:
    z = spectrum_case("iid", shape, dtype)
    compute = FLOAT64 if dtype == FLOAT64 else FLOAT32
    weights = torch.full(shape[:-1], 1 / shape[-2], dtype=compute)
    (rho,) = call(kernels, "density", z, None, True, EPS)
    (weighted,) = call(kernels, "density", z, weights, True, EPS)
    torch.testing.assert_close(rho, weighted)
    (alone,) = call(kernels, "density_entropy", rho, method)
    value, grad_rho = call(kernels, "density_entropy_grad", rho, method)
    for s in (value, alone):
        assert_value(s, reference.oracle(z), VALUE_DEFICIENT[dtype])
    grad, grad_weights = call(kernels, "density_backward", grad_rho, z, weights, True, EPS)
    assert_gradient(grad, z)
    exact_grad_weights = reference.oracle_weights_grad(z, weights=weights, relative=False)
    tolerance = GRADIENT_FLOAT64 if dtype == FLOAT64 else GRADIENT_WELL_CONDITIONED
    assert absolute_error(grad_weights, exact_grad_weights) <= tolerance * (
        1 + exact_grad_weights.norm()
    )
    z2 = z.roll(1, dims=-1)
    cosine, stats = call(kernels, "cosine", z, z2, EPS)
    _, expected, _, expected_stats = call(kernels, "doe_loss_grad", z, z2, method, EPS)
    assert torch.equal(cosine, expected)
    assert torch.equal(stats, expected_stats)


def test_density_of_a_matrix_in_panels(kernels: Any) -> None:
    """m = 260: one term that already holds the identity."""
    z = spectrum_case("iid", (280, 260), FLOAT32)
    (rho,) = call(kernels, "density", z, None, True, EPS)
    value, grad_rho = kernels.density_entropy_grad(rho, "poles")
    grad, _ = kernels.density_backward(grad_rho, z, None, True, EPS)
    assert_value(value, reference.oracle(z), VALUE_DEFICIENT[FLOAT32])
    assert_gradient(grad, z)


@pytest.mark.parametrize("multiprocessors", [1, 20, 132])
@pytest.mark.parametrize("shape", [(17, 33), (3, 40, 60), (40, 12, 9)])
def test_auto_is_one_of_the_methods_on_a_gpu_of_any_size(
    kernels: Any, shape: tuple[int, ...], multiprocessors: int
) -> None:
    z = gaussian(math.prod(shape[:-1]), shape[-1], generator(0)).float().view(shape)
    kernels.set_multiprocessors(multiprocessors)
    results = [kernels.vn_entropy(z, None, True, method, EPS) for method in ("auto", *METHODS)]
    kernels.set_multiprocessors(80)
    assert any(agree([results[0], result]) for result in results[1:])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [TABLE_SHAPE, (256, 260), (300, 301)])
@pytest.mark.parametrize("name", SPECTRA)
def test_gradient_is_no_worse_than_by_an_eigendecomposition(
    kernels: Any, name: str, shape: tuple[int, int]
) -> None:
    """Measured: 0.04 to 0.6 of the error of `reference.eigh_grad`."""
    case = gradient_case(name, shape, FLOAT32)
    _, grad, _ = kernels.vn_entropy_grad(case.z, None, True, "poles", EPS)
    assert absolute_error(grad, case.exact) <= case.eigh_error


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 6000), (6000, 3), (130, 4100), (4100, 65)])
def test_a_long_sum_is_shared_out_among_blocks(
    kernels: Any, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    z = spectrum_case("iid", shape, dtype)
    value, grad, _ = call(kernels, "vn_entropy_grad", z, None, True, "auto", EPS)
    assert_value(value, reference.oracle(z), VALUE[dtype])
    assert_gradient(grad, z)


@pytest.mark.parametrize("shape", [(130, 65), (65, 130), (70, 70)])
def test_tiles_for_a_large_batch(kernels: Any, shape: tuple[int, int]) -> None:
    """One multiprocessor is full from the first tile on."""
    z = spectrum_case("relu", (2, *shape), FLOAT32)
    kernels.set_multiprocessors(1)
    value, grad, _ = call(kernels, "vn_entropy_grad", z, None, True, "eigh", EPS)
    kernels.set_multiprocessors(80)
    assert_value(value, reference.oracle(z), VALUE[FLOAT32])
    for one_grad, one_z in zip(grad, z, strict=True):
        assert_gradient(one_grad, one_z)


@pytest.mark.parametrize("magnitude", [1e-42, 1e-25, 1e25, 1e38])
@pytest.mark.parametrize("shape", [(17, 33), (33, 17)])
def test_norms_beyond_the_range_of_their_squares(
    kernels: Any, shape: tuple[int, int], magnitude: float
) -> None:
    z = spectrum_case("iid", shape, FLOAT64).div(4).mul(magnitude).clamp(-3.4e38, 3.4e38).float()
    z[3] = torch.randn(shape[1], generator=generator(0))  # one row of ordinary size among them
    value, grad, _ = call(kernels, "vn_entropy_grad", z, None, True, "poles", 0.0)
    assert_value(value, reference.oracle(z, eps=0.0), VALUE[FLOAT32])
    assert grad[3].isfinite().all()


def test_launches_of_value_and_gradient(kernels: Any) -> None:
    """What a training step queues on the GPU at the size of the paper's loss."""
    z = spectrum_case("relu", (128, 512), FLOAT32)
    kernels.clear_launches()
    kernels.vn_entropy_grad(z, None, True, "poles", EPS)
    assert len(kernels.launches()) == 3
