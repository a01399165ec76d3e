"""The native kernels beyond the public functions: every instruction set, any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import (
    GRADIENT_WELL_CONDITIONED,
    SPECTRA,
    absolute_error,
    gaussian,
    generator,
    gradient,
    gradient_scale,
    relative_error,
    spectrum_case,
)
from programs import run_python
from torch import Tensor

from vne_kernels import doe_loss, reference, spectrum, vn_entropy

# Sizes around every tile and panel: rows of 4, 6, 8, columns of 8, 16, 32, panels of 16, 32
# and 64; below and above 8, where a matrix is reduced to a tridiagonal one first.
SHAPES = ((3, 5), (7, 12), (8, 12), (16, 40), (17, 33), (31, 95), (64, 64), (97, 50), (129, 260))


def exact_spectrum(z: Tensor, *, normalize: bool = True) -> Tensor:
    """From singular values: no Gram matrix, no eigenvalue solver."""
    z = z.double()
    u = torch.nn.functional.normalize(z, dim=-1) if normalize else z
    return torch.linalg.svdvals(u).square() / z.shape[-2]


ERRORS = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_kernels import SHAPES, worst_errors
value, grad = worst_errors()
print(value, grad)
"""


def worst_errors() -> tuple[float, float]:
    """Largest relative errors of S, or of eigenvalues, and of the gradient of S, float32, over
    shapes and methods."""
    values, grads = [], []
    for n, d in SHAPES:
        z = gaussian(n, d, generator(0)).float()
        values.append(relative_error(spectrum(z), exact_spectrum(z)))
        for method in ("eigh", "poles"):
            values.append(relative_error(vn_entropy(z, method=method), reference.oracle(z)))
            grad = gradient(vn_entropy, z, method=method)
            grads.append(relative_error(grad, reference.oracle_grad(z)))
    return max(map(float, values)), max(map(float, grads))


@pytest.mark.cpu_only("instruction sets of the CPU")
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(level: str) -> None:
    """A processor without the level runs the best it has: then this repeats another case."""
    done = run_python(ERRORS, Path(__file__).parent, VNE_KERNELS_SIMD=level)
    value, grad = map(float, done.stdout.split())
    assert value <= 1e-5
    assert grad <= 2e-4  # (64, 64) is not well conditioned


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("shape", [(128, 512), (3, 40, 90), (1500, 100)])
def test_threads_do_not_change_a_bit(shape: tuple[int, ...]) -> None:
    z = torch.randn(*shape, generator=generator(1))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        value = vn_entropy(z, method="poles")
        grad = gradient(vn_entropy, z, method="poles")
        results.append((value, grad, spectrum(z), spectrum(z.double())))
    for others in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(others, results[0], strict=True))


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(8, 30, 70), (20, 30), (200, 400), (520, 560)])
def test_auto_is_one_of_the_methods(shape: tuple[int, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    z = torch.randn(*shape, generator=generator(2))
    auto = gradient(vn_entropy, z)
    both = [gradient(vn_entropy, z, method=method) for method in ("eigh", "poles")]
    assert any(torch.equal(auto, grad) for grad in both)


@pytest.mark.slow
@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("method", ["eigh", "auto"])
def test_large_samples_of_a_batch_on_several_threads(method: str) -> None:
    """From m = 768 on MKL's syevd is wrong if it is called from within a parallel region."""
    torch.set_num_threads(2)
    z = torch.randn(3, 768, 800, generator=generator(4))
    exact, exact_grad = reference.oracle(z), reference.oracle_grad(z)
    assert relative_error(vn_entropy(z, method=method), exact) <= 1e-5
    assert relative_error(gradient(vn_entropy, z, method=method), exact_grad) <= 2e-4
    entropy = torch.special.entr(spectrum(z)).sum(dim=-1)
    assert relative_error(entropy, exact) <= 1e-5
    assert relative_error(-doe_loss(z, z, beta=0.0), exact) <= 1e-5


def reduced_cases() -> list[Tensor]:
    """Matrices that are nearly, or wholly, tridiagonal, diagonal or in blocks: reflectors of 0."""
    g = generator(5)
    blocks = [torch.randn(9, 40, generator=g) for _ in range(4)]
    return [
        torch.eye(40),
        torch.cat([torch.eye(24), torch.eye(24)]),
        torch.block_diag(*blocks),
        torch.eye(33) + 0.1 * torch.diag(torch.ones(32), 1),
        torch.eye(33) + 1e-7 * torch.randn(33, 33, generator=g),
        torch.logspace(0, -3, 48).sqrt()[:, None] * torch.randn(48, 200, generator=g),
    ]


@pytest.mark.parametrize("index", range(6))
def test_reduction_of_what_is_reduced_already(index: int) -> None:
    z = reduced_cases()[index]
    assert relative_error(vn_entropy(z, method="poles"), reference.oracle(z)) <= 1e-5
    exact = reference.oracle_grad(z)
    error = absolute_error(gradient(vn_entropy, z, method="poles"), exact)
    assert error <= GRADIENT_WELL_CONDITIONED * gradient_scale(z)


# Panels of 8 and 16 steps, vectors of 2 to 16 numbers, 2 x 2 blocks and what is left over.
SIDES = (*range(1, 20), 31, 33, 63, 64, 65, 96, 97, 128, 130, 257, 300)
EIGENVALUES = {torch.float64: 40, torch.float32: 24}
"""|error| over eps and the size of all. Measured: 16, and 17 of a single row and its squares."""


@pytest.mark.cpu_only("LAPACK's are the GPU library's affair")
@pytest.mark.parametrize("name", [*SPECTRA, "graded", "diagonal", "flat", "zeros"])
def test_eigenvalues(name: str) -> None:
    """Without eigenvectors, which is a solver of the package's own."""
    for m in SIDES:
        z = side_case(name, m)
        for dtype, bound in EIGENVALUES.items():
            rounded = z.to(dtype)
            exact = exact_spectrum(rounded, normalize=False)
            error = absolute_error(spectrum(rounded, normalize=False), exact)
            worst = bound * torch.finfo(dtype).eps * float(exact.norm())
            assert error <= worst, (m, dtype)


def side_case(name: str, m: int) -> Tensor:
    if name == "graded":  # down to what the squares of float32 cannot hold
        return spectrum_case("iid", (m, m + 3), torch.float64) * torch.logspace(0, -20, m)[:, None]
    if name == "diagonal":
        return torch.diag(torch.linspace(1, 3, m, dtype=torch.float64).flip(0))
    if name == "flat":
        return torch.linalg.qr(spectrum_case("iid", (m, m), torch.float64)).Q
    if name == "zeros":
        return torch.nn.functional.pad(torch.ones(1, m, dtype=torch.float64), (0, 0, 0, m - 1))
    return spectrum_case(name, (m, m + 3), torch.float64)


def test_eigenvalues_beyond_the_caches(backend: str) -> None:
    """m = 800: T of the value alone comes from panels."""
    z = spectrum_case("relu", (800, 830), torch.float32)
    assert relative_error(vn_entropy(z), reference.oracle(z)) <= 1e-5
    # Measured: 1.4e-7 by the CPU's solver; 1.8e-6 by LAPACK's ssyevd, cuSOLVER's algorithm.
    allowed = 1e-6 if backend == "cpu" else 5e-6
    assert relative_error(spectrum(z), exact_spectrum(z)) <= allowed


def test_sizes_beyond_a_tile_of_everything() -> None:
    """Large enough that every loop of the products and sweeps runs several times over."""
    z = torch.randn(700, 1100, generator=generator(3))
    exact, exact_grad = reference.oracle(z), reference.oracle_grad(z)
    for method in ("eigh", "poles"):
        assert relative_error(vn_entropy(z, method=method), exact) <= 1e-5
        assert relative_error(gradient(vn_entropy, z, method=method), exact_grad) <= 2e-5
    assert relative_error(spectrum(z).sum(), torch.ones(())) <= 1e-5
    assert relative_error(-doe_loss(z, z, beta=0.0), exact) <= 1e-5
