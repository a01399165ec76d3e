"""The native kernels beyond the public functions: every instruction set, any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from cases import (
    GRADIENT_WELL_CONDITIONED,
    absolute_error,
    gaussian,
    generator,
    gradient,
    gradient_scale,
    relative_error,
)
from torch import Tensor

from vne_kernels import doe_loss, reference, spectrum, vn_entropy

# Sizes around every tile and panel: rows of 4, 6, 8, columns of 8, 16, 32, panels of 16, 32
# and 64; below and above 8, where a matrix is reduced to a tridiagonal one first.
SHAPES = ((3, 5), (7, 12), (8, 12), (16, 40), (17, 33), (31, 95), (64, 64), (97, 50), (129, 260))

ERRORS = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_kernels import SHAPES, worst_errors
value, grad = worst_errors()
print(value, grad)
"""


def worst_errors() -> tuple[float, float]:
    """Largest relative errors of S and of its gradient, float32, over shapes and methods."""
    values, grads = [], []
    for n, d in SHAPES:
        z = gaussian(n, d, generator(0)).float()
        for method in ("eigh", "poles"):
            values.append(relative_error(vn_entropy(z, method=method), reference.oracle(z)))
            grad = gradient(vn_entropy, z, method=method)
            grads.append(relative_error(grad, reference.oracle_grad(z)))
    return max(map(float, values)), max(map(float, grads))


@pytest.mark.cpu_only("instruction sets of the CPU")
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(level: str) -> None:
    """A processor without the level runs the best it has: then this repeats another case."""
    done = subprocess.run(
        [sys.executable, "-c", ERRORS, os.path.dirname(__file__)],
        env={**os.environ, "VNE_KERNELS_SIMD": level},
        capture_output=True,
        text=True,
        check=True,
    )
    value, grad = map(float, done.stdout.split())
    assert value <= 1e-5
    assert grad <= 2e-4  # (64, 64) is not well conditioned


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("shape", [(128, 512), (3, 40, 90), (300, 100)])
def test_threads_do_not_change_a_bit(shape: tuple[int, ...]) -> None:
    z = torch.randn(*shape, generator=generator(1))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        value = vn_entropy(z, method="poles")
        results.append((value, gradient(vn_entropy, z, method="poles")))
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(8, 30, 70), (20, 30), (200, 400), (520, 560)])
def test_auto_is_one_of_the_methods(shape: tuple[int, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    z = torch.randn(*shape, generator=generator(2))
    auto = gradient(vn_entropy, z)
    both = [gradient(vn_entropy, z, method=method) for method in ("eigh", "poles")]
    assert any(torch.equal(auto, grad) for grad in both)


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


def test_sizes_beyond_a_tile_of_everything() -> None:
    """Large enough that every loop of the products and sweeps runs several times over."""
    z = torch.randn(700, 1100, generator=generator(3))
    exact, exact_grad = reference.oracle(z), reference.oracle_grad(z)
    for method in ("eigh", "poles"):
        assert relative_error(vn_entropy(z, method=method), exact) <= 1e-5
        assert relative_error(gradient(vn_entropy, z, method=method), exact_grad) <= 2e-5
    assert relative_error(spectrum(z).sum(), torch.ones(())) <= 1e-5
    assert relative_error(-doe_loss(z, z, beta=0.0), exact) <= 1e-5
