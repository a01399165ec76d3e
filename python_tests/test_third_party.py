"""Agreement with implementations that nobody here wrote."""

from __future__ import annotations

import warnings
from types import ModuleType

import numpy as np
import pytest
import torch
from cases import (
    DEFICIENT_SPECTRA,
    FEW_SHAPES,
    SPECTRA,
    VALUE,
    VALUE_DEFICIENT,
    assert_value,
    gradient,
    relative_error,
    spectrum_case,
)

from vne_kernels import doe_loss, reference, spectrum, vn_entropy

TOLERANCE = 1e-11
SHAPES = [(2, 5), (17, 33), (33, 17), (64, 64), (65, 128)]
DISTINCT = ["decay", "iid", "relu"]
"""Spectra where the published forms have a gradient: full rank, no eigenvalue twice."""


def density_matrix(z: torch.Tensor) -> np.ndarray:
    u = torch.nn.functional.normalize(z, dim=1)
    return (u.mT @ u / len(u)).numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_qutip_entropy_vn(
    name: str, shape: tuple[int, int], method: str, qutip: ModuleType
) -> None:
    z = spectrum_case(name, shape, torch.float64)
    expected = qutip.entropy_vn(qutip.Qobj(density_matrix(z)))
    assert float(vn_entropy(z, method=method)) == pytest.approx(expected, abs=TOLERANCE)
    assert float(reference.oracle(z)) == pytest.approx(expected, abs=TOLERANCE)


def test_qutip_states_of_known_entropy(method: str, qutip: ModuleType) -> None:
    """Rows are kets: a pure state, a maximally mixed one, a Werner mixture of the Bell states."""
    bell = np.stack([qutip.bell_state(name).full()[:, 0].real for name in ("00", "01", "10", "11")])
    z = torch.from_numpy(bell)
    for weights in ([1, 0, 0, 0], [0.25] * 4, [0.7, 0.1, 0.1, 0.1]):
        p = torch.tensor(weights, dtype=torch.float64)
        rho = qutip.Qobj((z.mT @ (p[:, None] * z)).numpy())
        s = vn_entropy(z, weights=p, method=method)
        assert float(s) == pytest.approx(qutip.entropy_vn(rho), abs=TOLERANCE)


def test_vendi_score_with_weights(method: str, vendi: ModuleType) -> None:
    z = spectrum_case("iid", (17, 33), torch.float64)
    p = torch.linspace(1, 3, 17, dtype=torch.float64)
    p /= p.sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # scipy.sparse.csr, in the package
        expected = vendi.score_X(z.numpy(), p=p.numpy())
    s = vn_entropy(z, weights=p, method=method)
    assert float(s.exp()) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("shape", FEW_SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_official_svd_form(name: str, shape: tuple[int, int], method: str) -> None:
    z = spectrum_case(name, shape, torch.float32)
    tolerance = (VALUE_DEFICIENT if name in DEFICIENT_SPECTRA else VALUE)[torch.float32]
    assert_value(vn_entropy(z, method=method), reference.official_svd(z.double()), tolerance)


@pytest.mark.parametrize("shape", [(17, 33), (33, 17)])
@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("form", [reference.official_svd, reference.gram])
def test_autograd_of_the_published_forms(
    form: object, name: str, shape: tuple[int, int], method: str
) -> None:
    z = spectrum_case(name, shape, torch.float64)
    assert relative_error(gradient(vn_entropy, z, method=method), gradient(form, z)) <= 1e-8


@pytest.mark.parametrize("shape", [(33, 17), (128, 64)])
def test_algorithm_1(shape: tuple[int, int], method: str) -> None:
    """Where d <= n, so that no eigenvalue of its d x d matrix is zero."""
    z1, z2 = spectrum_case("iid", (2, *shape), torch.float64).unbind()
    expected = reference.algorithm1_loss(z1, z2, 2.5)
    assert_value(doe_loss(z1, z2, beta=2.5, method=method), expected, VALUE[torch.float64])
    assert_value(vn_entropy(z1, method=method), reference.algorithm1(z1), VALUE[torch.float64])
    ours = gradient(lambda z: doe_loss(z, z2, beta=2.5, method=method), z1)
    theirs = gradient(lambda z: reference.algorithm1_loss(z, z2, 2.5), z1)
    assert relative_error(ours, theirs) <= 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_numpy_eigenvalues(shape: tuple[int, int]) -> None:
    z = spectrum_case("relu", shape, torch.float64)
    expected = np.linalg.eigvalsh(density_matrix(z))[::-1][: min(shape)].copy()
    torch.testing.assert_close(spectrum(z), torch.from_numpy(expected), rtol=0, atol=1e-14)
