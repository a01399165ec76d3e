"""Identities of the von Neumann entropy, on inputs that Hypothesis draws.

Entries are drawn from a few integers as often as from a Gaussian: integers bring zero rows, equal
rows, dead columns and exactly repeated eigenvalues. All in float64, so that an identity is exact.
"""

from __future__ import annotations

import math

import torch
from cases import METHODS, absolute_error, gaussian, generator, gradient, gradient_scale
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vne_kernels import doe_loss, reference, spectrum, vn_entropy

TOLERANCE = 1e-11
"""Absolute, in float64, for entropies up to log 12."""

methods = st.sampled_from(METHODS)
seeds = st.integers(0, 2**31)


@st.composite
def matrices(draw: st.DrawFn, max_rows: int = 12, max_features: int = 12) -> Tensor:
    n, d = draw(st.integers(1, max_rows)), draw(st.integers(1, max_features))
    g = generator(draw(seeds))
    if draw(st.booleans()):
        return gaussian(n, d, g)
    return torch.randint(-draw(st.integers(1, 3)), 3, (n, d), generator=g).double()


@st.composite
def integer_weights(draw: st.DrawFn, n: int) -> Tensor:
    counts = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    counts[draw(st.integers(0, n - 1))] += 1
    return torch.tensor(counts)


def orthogonal(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(d, d, generator(seed))).Q


def assert_equal(value: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)


@given(matrices(), methods)
def test_matches_the_oracle(z: Tensor, method: str) -> None:
    assert_equal(vn_entropy(z, method=method), reference.oracle(z))


@given(matrices(), methods)
def test_gradient_matches_the_oracle(z: Tensor, method: str) -> None:
    grad = gradient(vn_entropy, z, method=method)
    assert absolute_error(grad, reference.oracle_grad(z)) <= 1e-9 * (gradient_scale(z) + 1)


@given(matrices(), methods)
def test_between_zero_and_log_of_the_smaller_side(z: Tensor, method: str) -> None:
    s = vn_entropy(z[z.abs().sum(dim=1) > 0], method=method) if z.any() else torch.tensor(0.0)
    assert 0 <= s <= math.log(min(z.shape)) + TOLERANCE


@given(matrices(), methods, seeds)
def test_order_of_rows(z: Tensor, method: str, seed: int) -> None:
    order = torch.randperm(len(z), generator=generator(seed))
    assert_equal(vn_entropy(z[order], method=method), vn_entropy(z, method=method))


@given(matrices(), methods, seeds)
def test_signs_of_rows(z: Tensor, method: str, seed: int) -> None:
    signs = torch.randint(0, 2, (len(z), 1), generator=generator(seed)) * 2 - 1
    assert_equal(vn_entropy(signs * z, method=method), vn_entropy(z, method=method))


@given(matrices(), methods, seeds)
def test_rotation_of_features(z: Tensor, method: str, seed: int) -> None:
    rotation = orthogonal(z.shape[1], seed)
    assert_equal(vn_entropy(z @ rotation, method=method), vn_entropy(z, method=method))


@given(matrices(), methods, seeds)
def test_the_gradient_rotates_with_the_features(z: Tensor, method: str, seed: int) -> None:
    rotation = orthogonal(z.shape[1], seed)
    of_rotated = gradient(vn_entropy, z @ rotation, method=method)
    rotated = gradient(vn_entropy, z, method=method) @ rotation
    assert absolute_error(of_rotated, rotated) <= 1e-7 * (gradient_scale(z) + 1)


@given(matrices(), methods, seeds)
def test_positive_scale_of_rows(z: Tensor, method: str, seed: int) -> None:
    scale = 10 ** (6 * torch.rand(len(z), 1, generator=generator(seed)).double() - 3)
    assert_equal(vn_entropy(scale * z, method=method), vn_entropy(z, method=method))


@given(matrices(), methods, st.integers(2, 4))
def test_duplicating_the_batch(z: Tensor, method: str, times: int) -> None:
    assert_equal(vn_entropy(z.repeat(times, 1), method=method), vn_entropy(z, method=method))


@given(matrices(), methods, st.integers(1, 9))
def test_features_that_are_zero(z: Tensor, method: str, count: int) -> None:
    padded = torch.nn.functional.pad(z, (0, count))
    assert_equal(vn_entropy(padded, method=method), vn_entropy(z, method=method))


@given(st.lists(matrices(6, 6), min_size=2, max_size=3), methods)
def test_mixture_of_orthogonal_blocks(blocks: list[Tensor], method: str) -> None:
    """S of an orthogonal mixture is the Shannon entropy of its shares plus the mean S."""
    blocks = [torch.where(block.any(dim=1, keepdim=True), block, 1.0) for block in blocks]
    n = sum(len(block) for block in blocks)
    share = torch.tensor([len(block) / n for block in blocks], dtype=torch.float64)
    each = torch.stack([vn_entropy(block, method=method) for block in blocks])
    expected = torch.special.entr(share).sum() + (share * each).sum()
    assert_equal(vn_entropy(torch.block_diag(*blocks), method=method), expected)


@given(matrices(), seeds, methods)
def test_mixing_does_not_lower_the_entropy(z: Tensor, seed: int, method: str) -> None:
    other = gaussian(*z.shape, generator(seed))
    mean = (vn_entropy(z, method=method) + vn_entropy(other, method=method)) / 2
    assert vn_entropy(torch.cat([z, other]), method=method) >= mean - TOLERANCE


@given(st.data(), matrices(8, 8), methods, st.booleans())
def test_integer_weights_are_repeated_rows(
    data: st.DataObject, z: Tensor, method: str, normalize: bool
) -> None:
    counts = data.draw(integer_weights(len(z)))
    weights = counts.double() / counts.sum()
    weighted = vn_entropy(z, weights=weights, method=method, normalize=normalize)
    repeated = vn_entropy(z.repeat_interleave(counts, dim=0), method=method, normalize=normalize)
    assert_equal(weighted, repeated, TOLERANCE * (1 + float(z.square().sum())))


@given(st.data(), matrices(8, 8), methods)
def test_gradient_of_integer_weights_is_that_of_repeated_rows(
    data: st.DataObject, z: Tensor, method: str
) -> None:
    counts = data.draw(integer_weights(len(z)))
    weights = counts.double() / counts.sum()
    weighted = gradient(lambda z: vn_entropy(z, weights=weights, method=method), z)
    repeated = gradient(lambda z: vn_entropy(z.repeat_interleave(counts, dim=0), method=method), z)
    assert absolute_error(weighted, repeated) <= 1e-8 * len(z) * (gradient_scale(z) + 1)


@given(matrices(8, 8), methods)
def test_weights_are_squared_lengths(z: Tensor, method: str) -> None:
    """Z^T diag(p) Z is (sqrt(p) Z)^T (sqrt(p) Z)."""
    p = torch.rand(len(z), generator=generator(0), dtype=torch.float64)
    weighted = vn_entropy(z, weights=p, method=method, normalize=False)
    scaled = p.sqrt()[:, None] * z
    ones = torch.ones_like(p)
    unweighted = vn_entropy(scaled, weights=ones, method=method, normalize=False)
    assert_equal(weighted, unweighted, TOLERANCE * (1 + float(z.square().sum())))


@given(matrices(), methods)
def test_transposing_keeps_the_spectrum(z: Tensor, method: str) -> None:
    """Z^T Z and Z Z^T share their non-zero eigenvalues: the two sides agree."""
    z = z / (1 + z.norm())
    n, d = z.shape
    options = {"method": method, "normalize": False}
    rows = vn_entropy(z, weights=torch.ones(n, dtype=torch.float64), **options)
    columns = vn_entropy(z.mT, weights=torch.ones(d, dtype=torch.float64), **options)
    assert_equal(rows, columns)


@given(matrices(), methods, st.floats(0.1, 10))
def test_scaling_rho_without_normalisation(z: Tensor, method: str, scale: float) -> None:
    """S(c rho) = c S(rho) - c log(c) tr(rho)."""
    trace = z.square().sum() / len(z)
    s = vn_entropy(z, method=method, normalize=False)
    scaled = vn_entropy(z * scale**0.5, method=method, normalize=False)
    expected = scale * s - scale * math.log(scale) * trace
    assert_equal(scaled, expected, 1e-9 * (1 + float(trace)))


@given(matrices())
def test_spectrum_sums_to_the_share_of_rows_that_are_not_zero(z: Tensor) -> None:
    eig_val = spectrum(z)
    assert (eig_val >= 0).all()
    assert (eig_val.diff() <= 0).all()
    assert_equal(eig_val.sum(), z.any(dim=1).double().mean())


@given(matrices(), methods)
def test_entropy_is_that_of_the_spectrum(z: Tensor, method: str) -> None:
    assert_equal(vn_entropy(z, method=method), torch.special.entr(spectrum(z)).sum())


@given(matrices(), methods, seeds, st.floats(-10, 10))
def test_loss_is_linear_in_beta(z: Tensor, method: str, seed: int, beta: float) -> None:
    z2 = gaussian(*z.shape, generator(seed))
    loss, entropy, cosine = doe_loss(z, z2, beta=beta, method=method, return_components=True)
    assert_equal(loss, -entropy - beta * cosine)
    assert_equal(entropy, vn_entropy(z, method=method))
    assert abs(cosine) <= 1 + TOLERANCE
