"""Scores against the packages and formulas that people use today, to 1e-6 in float64."""

from __future__ import annotations

import math
import warnings
from types import ModuleType

import numpy as np
import pytest
import torch
from cases import (
    DEGENERATE,
    FEW_SHAPES,
    SPECTRA,
    absolute_error,
    degenerate_case,
    generator,
    gradient,
    gradient_scale,
    spectrum_case,
)
from naming import naming
from torch import Tensor

from vne_kernels import (
    effective_rank,
    participation_ratio,
    rankme,
    renyi_entropy,
    vendi_score,
    vn_entropy,
)

FLOAT64, FLOAT32 = torch.float64, torch.float32
AGREEMENT = 1e-6
"""Relative, in float64. Measured: 5e-13 of the Vendi score, 1e-12 of RankMe."""
AGREEMENT_BELOW_ONE = 1e-5
"""Of order 1/2, for which the package counts zeros as the 1e-17 that rounding makes of them:
it says 1.0000029, where all are equal."""
ALL_INPUTS = [*SPECTRA, *(name for name in DEGENERATE if not name.startswith("zero"))]


def inputs(name: str, shape: tuple[int, int], dtype: torch.dtype = FLOAT64) -> Tensor:
    make = spectrum_case if name in SPECTRA else degenerate_case
    return make(name, shape, dtype)


@pytest.fixture(autouse=True)
def quiet() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # scipy.sparse.csr, in vendi-score
        yield


@pytest.mark.parametrize("shape", FEW_SHAPES)
@pytest.mark.parametrize("name", ALL_INPUTS)
def test_vendi_score(name: str, shape: tuple[int, int], vendi: ModuleType) -> None:
    z = inputs(name, shape)
    u = torch.nn.functional.normalize(z, dim=1)
    for q in (0.5, 1, 2, 3, math.inf):
        theirs = "inf" if q == math.inf else q
        expected = vendi.score_dual(z.numpy(), q=theirs)
        agreement = AGREEMENT if q >= 1 else AGREEMENT_BELOW_ONE
        assert float(vendi_score(z, q)) == pytest.approx(expected, rel=agreement)
        if q > 0.5:  # the package's zeros are as many as samples there
            of_kernel = vendi.score_K((u @ u.mT).numpy(), q=theirs)
            ours = vendi_score(u @ u.mT, q, is_kernel=True)
            assert float(ours) == pytest.approx(of_kernel, rel=AGREEMENT)
    assert float(effective_rank(z)) == pytest.approx(vendi.score_X(z.numpy()), rel=AGREEMENT)
    raw = vendi.score_dual((z / z.norm() * len(z) ** 0.5).numpy(), normalize=False)
    assert float(effective_rank(z, normalize=False)) == pytest.approx(raw, rel=AGREEMENT)


def test_vendi_score_of_weighted_samples_and_of_kernels(vendi: ModuleType) -> None:
    z = spectrum_case("relu", (17, 33), FLOAT64)
    p = torch.rand(17, generator=generator(0), dtype=FLOAT64)
    p[3] = 0
    p /= p.sum()
    kernel = torch.exp(-torch.cdist(z, z).square() / z.var())
    for q in (1, 2, 0.5):
        expected = vendi.score_K(kernel.numpy(), q=q, p=p.numpy())
        ours = vendi_score(kernel, q, is_kernel=True, weights=p)
        assert float(ours) == pytest.approx(expected, rel=AGREEMENT)
        again = vendi_score(7 * kernel, q, is_kernel=True, weights=3 * p)
        assert float(again) == pytest.approx(expected, rel=AGREEMENT)
    scaled = torch.linspace(1, 2, 17, dtype=FLOAT64)[:, None] * kernel
    scaled = torch.linspace(1, 2, 17, dtype=FLOAT64) * scaled
    expected = vendi.score_K(scaled.numpy(), normalize=True)
    assert float(vendi_score(scaled, is_kernel=True)) == pytest.approx(expected, rel=AGREEMENT)
    as_given = vendi.score_K((scaled / scaled.trace() * 17).numpy())
    ours = vendi_score(scaled, is_kernel=True, normalize=False)
    assert float(ours) == pytest.approx(as_given, rel=AGREEMENT)


def test_vendi_score_of_a_complex_kernel() -> None:
    """Fidelity amplitudes of quantum states: as of their real and imaginary parts side by side."""
    z = torch.randn(6, 4, generator=generator(0), dtype=torch.complex128)
    z = z / z.norm(dim=1, keepdim=True)
    kernel = z @ z.mH
    values = torch.linalg.eigvalsh(kernel / 6).clamp_min(0)
    for q in (1, 3):
        ours = vendi_score(kernel, q, is_kernel=True)
        entropy = torch.special.entr(values).sum() if q == 1 else (values**q).sum().log() / (1 - q)
        torch.testing.assert_close(ours, entropy.exp())


def test_gradients_reach_kernel_and_weights() -> None:
    z = spectrum_case("relu", (5, 8), FLOAT64)
    kernel = (z @ z.mT).requires_grad_()
    p = torch.rand(5, generator=generator(0), dtype=FLOAT64).requires_grad_()
    for normalize in (True, False):
        for q in (0.5, 1, 2, 3):

            def score(k: Tensor, p: Tensor, q: float = q, normalize: bool = normalize) -> Tensor:
                return vendi_score(
                    (k + k.mT) / 2, q, is_kernel=True, weights=p, normalize=normalize
                )

            assert torch.autograd.gradcheck(score, (kernel, p))
    with torch.no_grad():
        p[2] = kernel[1, 1] = kernel[1, :] = kernel[:, 1] = 0
    vendi_score(kernel, is_kernel=True, weights=p).backward()
    assert kernel.grad.isfinite().all()
    assert p.grad.isfinite().all()


@pytest.mark.parametrize("name", [*SPECTRA, *DEGENERATE])
def test_scores_are_exp_of_entropies(name: str) -> None:
    """Equality, of all dtypes and zero rows too; a zero row counts in vendi-score, and not here."""
    z = inputs(name, (17, 33), FLOAT32)
    torch.testing.assert_close(effective_rank(z), renyi_entropy(z, 1).exp())
    torch.testing.assert_close(vendi_score(z, 3), renyi_entropy(z, 3).exp())
    torch.testing.assert_close(participation_ratio(z), vendi_score(z, 2))
    if not name.startswith("zero"):
        torch.testing.assert_close(effective_rank(z), vn_entropy(z).exp())


def test_a_zero_row_is_no_sample() -> None:
    z = degenerate_case("zero_row", (12, 40), FLOAT64)
    present = z[z.any(dim=1)]
    assert len(present) == 11
    for score in (effective_rank, vendi_score, participation_ratio):
        torch.testing.assert_close(score(z), score(present))
    kernel = z @ z.mT
    torch.testing.assert_close(vendi_score(kernel, is_kernel=True), vendi_score(present))


@pytest.mark.parametrize("shape", FEW_SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_participation_ratio(name: str, shape: tuple[int, int]) -> None:
    """Of the covariance, as in neuroscience: by NumPy's eigenvalues."""
    z = spectrum_case(name, shape, FLOAT64)
    centred = z - z.mean(dim=0)
    eig_val = np.linalg.eigvalsh(np.cov(z.numpy(), rowvar=False).reshape(shape[1], shape[1]))
    expected = eig_val.sum() ** 2 / (eig_val**2).sum()
    ours = participation_ratio(centred, normalize=False)
    assert float(ours) == pytest.approx(expected, rel=1e-12)
    assert float(participation_ratio(centred.float(), normalize=False)) == pytest.approx(
        expected, rel=1e-5
    )


def published_rankme(z: Tensor, eps: float = 1e-7) -> Tensor:
    """As its paper's equation (1) is written everywhere."""
    s = torch.linalg.svdvals(z)
    p = s / torch.linalg.vector_norm(s, 1) + eps
    return torch.exp(-torch.sum(p * torch.log(p)))


@pytest.mark.parametrize("shape", FEW_SHAPES)
@pytest.mark.parametrize("name", [*SPECTRA, *DEGENERATE])
def test_rankme(name: str, shape: tuple[int, int]) -> None:
    z = inputs(name, shape)
    if name == "zero_matrix":
        assert float(rankme(z)) == pytest.approx(1, abs=1e-3)
        assert (gradient(rankme, z) == 0).all()
        return
    expected = published_rankme(z)
    assert float(rankme(z)) == pytest.approx(float(expected), rel=AGREEMENT)
    rounded = inputs(name, shape, FLOAT32)
    assert rankme(rounded).dtype == FLOAT32
    of_rounded = float(published_rankme(rounded.double()))
    assert float(rankme(rounded)) == pytest.approx(of_rounded, rel=3e-6)
    assert gradient(rankme, z).isfinite().all()


@pytest.mark.parametrize("shape", FEW_SHAPES)
@pytest.mark.parametrize("name", ["iid", "relu", "decay", "collapse"])
def test_gradient_of_rankme(name: str, shape: tuple[int, int]) -> None:
    """Where no singular value is 0. Measured: 1e-8, near collapse."""
    z = spectrum_case(name, shape, FLOAT64)
    exact = gradient(published_rankme, z)
    assert absolute_error(gradient(rankme, z), exact) <= 1e-7 * exact.norm()


@pytest.mark.parametrize(
    ("score", "options"),
    [
        (effective_rank, {}),
        (effective_rank, {"normalize": False}),
        (participation_ratio, {}),
        (vendi_score, {"q": 0.5}),
    ],
)
def test_gradients_of_scores(score: object, options: dict[str, object]) -> None:
    """The chain rule through exp, of the entropies that test_orders.py holds to the table."""
    z = spectrum_case("relu", (17, 33), FLOAT64)
    order = {effective_rank: 1, participation_ratio: 2, vendi_score: 0.5}[score]
    normalize = options.get("normalize", True)
    exact = gradient(lambda x: renyi_entropy(x, order, normalize=normalize), z)
    exact = exact * score(z, **options)
    error = absolute_error(gradient(lambda x: score(x, **options), z), exact)
    assert error <= 1e-12 * gradient_scale(z)


def test_batches() -> None:
    z = spectrum_case("relu", (2, 3, 9, 12), FLOAT32)
    for score in (effective_rank, participation_ratio, rankme, vendi_score):
        expected = torch.stack([score(x) for x in z.flatten(0, 1)]).view(2, 3)
        torch.testing.assert_close(score(z), expected)
    kernels = z.double() @ z.double().mT
    torch.testing.assert_close(vendi_score(kernels, is_kernel=True), vendi_score(z.double()))
    z[0, 1, 2, 3] = math.nan
    for score in (effective_rank, participation_ratio, rankme, vendi_score):
        assert score(z).isnan().sum() == 1


@pytest.mark.parametrize(
    ("kernel", "options", "error", "named"),
    [
        (torch.ones(3, 2), {}, ValueError, ("z_or_kernel", (3, 2))),
        (torch.ones(3, 3), {"weights": torch.ones(4)}, ValueError, ("weights", (3,), (4,))),
        (torch.ones(3, 3), {"normalize": 1}, TypeError, ("normalize", "int")),
        (torch.ones(3, 3, dtype=torch.int32), {}, TypeError, (torch.int32,)),
    ],
)
def test_errors(kernel: Tensor, options: dict, error: type[Exception], named: tuple) -> None:
    with pytest.raises(error, match=naming(*named)):
        vendi_score(kernel, is_kernel=True, **options)
    with pytest.raises(ValueError, match=naming("eps")):
        rankme(torch.ones(3, 3), eps=-1)
