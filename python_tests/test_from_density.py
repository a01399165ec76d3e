"""Entropies of matrices: real and complex, of every order, against float64, mpmath and QuTiP."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import ModuleType

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from cases import (
    GRADIENT_FLOAT64,
    GRADIENT_WELL_CONDITIONED,
    SPECTRA,
    VALUE_DEFICIENT,
    assert_value,
    gaussian,
    generator,
    gradient,
    relative_error,
    spectrum_case,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming
from torch import Tensor

from vne_kernels import (
    reference,
    renyi_entropy_from_density,
    tsallis_entropy_from_density,
    vn_entropy_from_density,
)
from vne_kernels._core.matrices import eigenvalues

pytestmark = pytest.mark.cpu_only("operators that test_density.py runs on every backend")

REAL = (torch.float64, torch.float32)
COMPLEX = (torch.complex128, torch.complex64)
SHAPES = ((2, 5), (3, 2), (17, 33), (65, 64))
ORDERS = (0, 0.3, 0.999, 1, 1.001, 1.7, 2, 3, math.inf)
seeds = st.integers(0, 2**31)


def exact_density(z: Tensor) -> Tensor:
    u = torch.nn.functional.normalize(z.double(), dim=-1)
    return u.mT @ u / z.shape[-2]


def phases(d: int) -> Tensor:
    """(d,) on the unit circle: diag(phases) rho diag(phases)^H is complex, with rho's spectrum."""
    return torch.polar(torch.ones(d, dtype=torch.float64), gaussian(1, d, generator(7))[0])


def density_case(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """rho of a row of the table; of a complex dtype with phases that leave its spectrum."""
    rho = exact_density(spectrum_case(name, shape, torch.float64))
    if dtype.is_complex:
        phase = phases(shape[-1])
        rho = phase[:, None] * rho * phase.conj()
    return rho.to(dtype)


def random_density(d: int, seed: int = 0, dtype: torch.dtype = torch.complex128) -> Tensor:
    """Of full rank and trace 1."""
    x = torch.randn(d, d + 2, generator=generator(seed), dtype=dtype)
    rho = x @ x.mH
    return rho / rho.diagonal().real.sum()


def of_spectrum(function: Callable[..., object], order: float) -> Callable[[Tensor], Tensor]:
    return lambda rho: function(rho, order)


ENTROPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "vn": vn_entropy_from_density,
    "vn_of_unit_trace": lambda rho: vn_entropy_from_density(rho, normalize_trace=True),
    **{f"renyi_{q}": of_spectrum(renyi_entropy_from_density, q) for q in ORDERS},
    **{f"tsallis_{q}": of_spectrum(tsallis_entropy_from_density, q) for q in ORDERS},
}


# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
@pytest.mark.parametrize("name", SPECTRA)
def test_value(name: str, dtype: torch.dtype) -> None:
    """n < d lacks rank, so one tolerance for all. Measured: 2e-14 and 2.3e-6."""
    for shape in SHAPES:
        z = spectrum_case(name, shape, torch.float64)
        for method in ("auto", "eigh") if dtype.is_complex else ("eigh", "poles"):
            s = vn_entropy_from_density(density_case(name, shape, dtype), method=method)
            assert s.dtype == dtype.to_real()
            assert_value(s, reference.oracle(z), VALUE_DEFICIENT[s.dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    rho = density_case("iid", (2, 33, 9), dtype)
    for name, entropy in ENTROPIES.items():
        of_half, of_float32 = gradient(entropy, rho), gradient(entropy, rho.float())
        assert entropy(rho).dtype == torch.float32
        assert of_half.dtype == dtype
        torch.testing.assert_close(entropy(rho), entropy(rho.float()), rtol=1e-6, atol=1e-6)
        assert relative_error(of_half, of_float32) <= 2.0**-8 or name.endswith(("_0", "_inf"))


def mp_entropies(rho: Tensor, order: float) -> tuple[float, float]:
    """Rényi's and Tsallis' entropy in 40 digits, from the bits of a complex128 rho."""
    with mpmath.workdps(40):
        entries = [[mpmath.mpc(entry.real, entry.imag) for entry in row] for row in rho.tolist()]
        values = mpmath.eigh(mpmath.matrix(entries), eigvals_only=True)
        total = mpmath.fsum(values)
        p = [value / total for value in values]
        if order == 1:
            renyi = tsallis = -mpmath.fsum(x * mpmath.log(x) for x in p)
        elif order == math.inf:
            renyi, tsallis = -mpmath.log(max(p)), mpmath.mpf(0)
        else:
            power = mpmath.fsum(x ** mpmath.mpf(order) for x in p)
            renyi = mpmath.log(power) / (1 - mpmath.mpf(order))
            tsallis = (1 - power) / (mpmath.mpf(order) - 1)
        return float(renyi), float(tsallis)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_against_mpmath(order: float) -> None:
    """Measured: 9e-16. The trace is 3: it does not matter."""
    rho = 3 * random_density(6)
    renyi, tsallis = mp_entropies(rho, order)
    assert float(renyi_entropy_from_density(rho, order)) == pytest.approx(renyi, abs=1e-12)
    assert float(tsallis_entropy_from_density(rho, order)) == pytest.approx(tsallis, abs=1e-12)


def test_against_qutip(qutip: ModuleType) -> None:
    rho = random_density(12)
    state = qutip.Qobj(rho.numpy())
    assert float(vn_entropy_from_density(rho)) == pytest.approx(qutip.entropy_vn(state), abs=1e-12)
    bits = vn_entropy_from_density(rho, base=2)
    assert float(bits) == pytest.approx(qutip.entropy_vn(state, base=2), abs=1e-12)
    linear = qutip.entropy_linear(state)
    assert float(tsallis_entropy_from_density(rho, 2)) == pytest.approx(linear, abs=1e-12)


def test_bases_against_scipy() -> None:
    p = random_density(7).diagonal().real
    for base in (2, 10, np.float32(3), 0.5):
        expected = scipy.stats.entropy(p.numpy(), base=float(base))
        for value in (
            vn_entropy_from_density(p.diag(), base=base),
            renyi_entropy_from_density(p.diag(), 1, base=base),
        ):
            assert float(value) == pytest.approx(expected, abs=1e-12)
    of_order_3 = math.log2(float((p**3).sum())) / (1 - 3)
    bits = renyi_entropy_from_density(p.diag(), 3, base=2)
    assert float(bits) == pytest.approx(of_order_3, abs=1e-12)


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
def test_states_of_known_entropy(dtype: torch.dtype) -> None:
    """Pure, maximally mixed and of rank 3 of 12, in a basis that is not theirs."""
    unitary = torch.linalg.qr(torch.randn(12, 12, generator=generator(0), dtype=dtype)).Q
    single = dtype.to_real() == torch.float32
    for rank in (1, 3, 12):
        rho = unitary[:, :rank] @ unitary[:, :rank].mH / rank
        for entropy in (vn_entropy_from_density, *(ENTROPIES[f"renyi_{q}"] for q in ORDERS)):
            tolerance = 3e-5 if single else 1e-12
            assert float(entropy(rho)) == pytest.approx(math.log(rank), abs=tolerance)
            assert gradient(entropy, rho).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_rounding_adds_no_rank(dtype: torch.dtype) -> None:
    """Of a matrix of rank 3 in float32, float64 sees 20 eigenvalues that are not 0."""
    rho = density_case("rank3", (9, 20), dtype)
    for order in (0, 0.1):
        exact = renyi_entropy_from_density(density_case("rank3", (9, 20), torch.float64), order)
        assert_value(renyi_entropy_from_density(rho, order), exact, VALUE_DEFICIENT[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_trace(dtype: torch.dtype) -> None:
    """S(t rho) = t S(rho) - t log t, equation (10); of rho / tr(rho) at any scale."""
    rho = random_density(5, dtype=dtype)
    s = vn_entropy_from_density(rho)
    for scale in (1e-200, 0.3, 7.0, 1e200):
        of_scaled = vn_entropy_from_density(scale * rho)
        expected = scale * (s - math.log(scale))
        torch.testing.assert_close(of_scaled, expected, rtol=1e-12, atol=0)
        for name, entropy in ENTROPIES.items():
            if name != "vn":
                torch.testing.assert_close(entropy(scale * rho), entropy(rho), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
@pytest.mark.parametrize("name", ENTROPIES)
def test_zero_matrix_and_negative_trace(name: str, dtype: torch.dtype) -> None:
    rho = torch.stack([torch.zeros(4, 4), -torch.eye(4), torch.eye(4) / 4]).to(dtype)
    s, grad = ENTROPIES[name](rho), gradient(ENTROPIES[name], rho)
    assert s[0] == 0
    assert s[1].isnan()
    assert s[2].isfinite()
    assert (grad[0] == 0).all()
    assert grad[2].isfinite().all()


# ---------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
def test_gradient_is_minus_log_rho_minus_one(dtype: torch.dtype) -> None:
    """Measured: 1.5e-15 and 1.9e-7."""
    rho = density_case("iid", (2, 130, 33), dtype)
    eig_val, eig_vec = torch.linalg.eigh(rho.to(torch.complex128))
    exact = -((eig_vec * (eig_val.log() + 1).unsqueeze(-2)) @ eig_vec.mH)
    grad = gradient(vn_entropy_from_density, rho)
    assert grad.dtype == dtype
    single = dtype.to_real() == torch.float32
    assert (grad.to(torch.complex128) - exact).norm() / exact.norm() <= (
        GRADIENT_WELL_CONDITIONED if single else GRADIENT_FLOAT64
    )
    assert (grad - grad.mH).abs().max() <= (1e-4 if single else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("name", [name for name in ENTROPIES if not name.endswith("_0")])
def test_gradcheck(name: str, dtype: torch.dtype) -> None:
    rho = (2 * random_density(4, dtype=dtype)).requires_grad_()
    assert torch.autograd.gradcheck(ENTROPIES[name], (rho,), check_forward_ad=True)


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
@pytest.mark.parametrize("name", SPECTRA)
def test_gradients_are_finite_and_reach_the_rows(name: str, dtype: torch.dtype) -> None:
    """Through rho = U^H U / n the gradient is that of the rows, whatever stands for log 0.

    Measured in float64: 1.3e-11, near collapse.
    """
    z = spectrum_case(name, (17, 33), torch.float64)
    rho = density_case(name, (17, 33), dtype)
    for entropy in ENTROPIES.values():
        assert gradient(entropy, rho).isfinite().all()
    if dtype == torch.float64:
        grad = gradient(lambda x: vn_entropy_from_density(exact_density(x)), z)
        assert relative_error(grad, reference.oracle_grad(z)) <= 1e-9


SECOND_DERIVATIVES = {
    "hessian": torch.func.hessian,
    "twice reverse": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "twice forward": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "reverse of forward": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
}


def assert_differentiable_once(function: Callable[[Tensor], Tensor], rho: Tensor) -> None:
    """What is asked for beyond it is an error that names a public function."""
    names = "vn_entropy_from_density|relative_entropy"
    leaf = rho.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=names):
        grad.abs().sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(leaf, rho)
        tangent = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
        with pytest.raises(NotImplementedError, match=names):
            tangent.backward()
        with pytest.raises(NotImplementedError, match=names):
            torch.autograd.grad(function(dual), dual, create_graph=True)
    if not rho.is_complex():
        for second in SECOND_DERIVATIVES.values():
            with pytest.raises(NotImplementedError, match=names):
                second(function)(rho)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("name", ENTROPIES)
def test_differentiable_once(name: str, dtype: torch.dtype) -> None:
    if name not in ("renyi_0", "tsallis_0", "tsallis_inf"):  # these are constant
        assert_differentiable_once(ENTROPIES[name], random_density(4, dtype=dtype))


def assert_transforms(function: Callable[[Tensor], Tensor], rho: Tensor, rtol: float) -> None:
    """Of torch.func, one in another too, and forward mode, against plain reverse mode."""
    grad = gradient(function, rho)
    direction = random_density(rho.shape[-1], 8, rho.dtype)
    along = (grad.conj() * direction).real.sum()
    close = partial(torch.testing.assert_close, rtol=rtol, atol=rtol)
    value, pull_back = torch.func.vjp(function, rho)
    close(value, function(rho))
    close(pull_back(torch.ones_like(value))[0], grad)

    def tangent(x: Tensor, t: Tensor) -> Tensor:
        return torch.func.jvp(function, (x,), (t,))[1]

    close(tangent(rho, direction), along)
    batch = torch.stack([rho, rho]), torch.stack([direction, -direction])
    close(torch.func.vmap(tangent)(*batch), torch.stack([along, -along]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(rho, direction)
        close(torch.autograd.forward_ad.unpack_dual(function(dual)).tangent, along)
    if not rho.is_complex():
        for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
            close(transform(function)(rho), grad)
        close(torch.func.vmap(torch.func.grad(function))(batch[0]), torch.stack([grad, grad]))


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
@pytest.mark.parametrize("name", ENTROPIES)
def test_transforms(name: str, dtype: torch.dtype) -> None:
    """Of matrices that the operators take as well, which have no forward mode."""
    rtol = 1e-11 if dtype.to_real() == torch.float64 else GRADIENT_WELL_CONDITIONED
    for d in (5, 70) if dtype == torch.float32 and name.startswith("vn") else (5,):
        rho = (random_density(d, dtype=dtype) + torch.eye(d) / d) / 2
        if name not in ("renyi_0", "tsallis_0"):
            assert_transforms(ENTROPIES[name], rho, rtol)


# ---------------------------------------------------------------------------------------------
# Invalid input
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", REAL + COMPLEX)
def test_an_invalid_matrix_is_nan_and_the_others_are_not(dtype: torch.dtype, bad: float) -> None:
    rho = density_case("iid", (3, 9, 5), dtype)
    clean = rho.clone()
    rho[1, 2, 3] = bad
    for entropy in ENTROPIES.values():
        s, grad = entropy(rho), gradient(entropy, rho)
        assert s.isnan().tolist() == [False, True, False]
        assert torch.equal(s[::2], entropy(clean)[::2])
        assert grad.isnan().flatten(1).all(1).tolist() == [False, True, False]
        assert torch.equal(grad[::2], gradient(entropy, clean)[::2])


@pytest.mark.parametrize("name", ENTROPIES)
def test_shape_and_dtype_are_checked_always(name: str) -> None:
    entropy = ENTROPIES[name]
    for shape in ((3,), (2, 3), (0, 0)):
        with pytest.raises(ValueError, match=naming("rho", shape)):
            entropy(torch.ones(shape))
    with pytest.raises(TypeError, match=naming("rho", torch.int64)):
        entropy(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=naming("rho", "list")):
        entropy([[1.0]])


def test_methods_and_orders_are_checked() -> None:
    for method in ("poles", "svd"):  # of a complex matrix
        with pytest.raises(ValueError, match=naming(repr(method))):
            vn_entropy_from_density(random_density(2), method=method)
    with pytest.raises(ValueError, match=naming("alpha", -1)):
        renyi_entropy_from_density(torch.eye(2), -1)
    with pytest.raises(TypeError, match=naming("q", "str")):
        tsallis_entropy_from_density(torch.eye(2), "2")
    for base in (0, 1, -2, math.inf, math.nan):
        with pytest.raises(ValueError, match="base"):
            vn_entropy_from_density(torch.eye(2), base=base)
    with pytest.raises(TypeError, match="base"):
        renyi_entropy_from_density(torch.eye(2), 2, base="2")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda rho: rho.index_fill(-1, torch.tensor([0]), math.nan), "finite"),
        (lambda rho: rho.triu(), "Hermitian"),
        (lambda rho: rho - torch.eye(3), "semidefinite"),
        (lambda rho: 2 * rho, "trace"),
    ],
)
@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX, torch.bfloat16, torch.float16])
def test_check_names_what_is_wrong_and_where(
    dtype: torch.dtype, spoil: Callable[[Tensor], Tensor], named: str
) -> None:
    eye = torch.eye(3, dtype=torch.float64)
    good = (0.2 + 0.4 / 3 * eye).expand(2, 2, 3, 3)  # eigenvalues 0.733 and 0.133
    vn_entropy_from_density(good.to(dtype), check=True)
    bad = good.clone()
    bad[1, 0] = spoil(good[0, 0])
    with pytest.raises(ValueError, match=naming("rho", named, (1, 0))):
        vn_entropy_from_density(bad.to(dtype), check=True)
    if named == "trace":
        vn_entropy_from_density(bad.to(dtype), normalize_trace=True, check=True)
        renyi_entropy_from_density(bad.to(dtype), 3, check=True)
    else:
        with pytest.raises(ValueError, match=naming("rho", named)):
            tsallis_entropy_from_density(bad.to(dtype), 3, check=True)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("name", SPECTRA)
def test_check_accepts_computed_density_matrices(name: str, dtype: torch.dtype) -> None:
    z = torch.nn.functional.normalize(spectrum_case(name, (40, 300), dtype), dim=1)
    vn_entropy_from_density(z.mT @ z / 40, check=True)


# ---------------------------------------------------------------------------------------------
# Inside torch
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
def test_vmap(dtype: torch.dtype) -> None:
    """`test_quantum.py` compiles these functions, together with its own."""
    rho = density_case("iid", (3, 9, 5), dtype)
    for entropy in ENTROPIES.values():
        torch.testing.assert_close(torch.func.vmap(entropy)(rho), entropy(rho))


# ---------------------------------------------------------------------------------------------
# Identities
# ---------------------------------------------------------------------------------------------


def test_eigenvalues_are_those_of_numpy(qutip: ModuleType) -> None:
    rho = random_density(7)
    expected = torch.from_numpy(qutip.Qobj(rho.numpy()).eigenenergies()[::-1].copy())
    torch.testing.assert_close(eigenvalues(rho), expected, rtol=0, atol=1e-14)


@settings(max_examples=15)
@given(seeds, seeds, st.integers(1, 5), st.integers(1, 4))
def test_invariance_and_additivity(seed: int, other: int, d: int, e: int) -> None:
    """S(V rho V^H) = S(rho); S(rho x sigma) = S(rho) + S(sigma), of every Rényi order."""
    rho, sigma = random_density(d, seed), random_density(e, other)
    unitary = torch.linalg.qr(random_density(d, other)).Q
    for order in ORDERS:
        s = renyi_entropy_from_density(rho, order)
        rotated = renyi_entropy_from_density(unitary @ rho @ unitary.mH, order)
        torch.testing.assert_close(rotated, s, rtol=0, atol=1e-11)
        product = renyi_entropy_from_density(torch.kron(rho, sigma), order)
        expected = s + renyi_entropy_from_density(sigma, order)
        torch.testing.assert_close(product, expected, rtol=0, atol=1e-11)


@settings(max_examples=15)
@given(seeds, st.integers(1, 8))
def test_entropies_fall_with_the_order(seed: int, d: int) -> None:
    rho = random_density(d, seed)
    for entropy in (renyi_entropy_from_density, tsallis_entropy_from_density):
        s = torch.stack([entropy(rho, order) for order in ORDERS])
        assert (s.diff() <= 1e-12).all()
        assert (s >= 0).all()
