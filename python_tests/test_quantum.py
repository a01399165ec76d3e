"""Partial traces, conditional entropy, mutual information and relative entropy of states."""

from __future__ import annotations

import math
from functools import partial
from types import ModuleType

import mpmath
import numpy as np
import pytest
import torch
from cases import (
    GRADIENT_WELL_CONDITIONED,
    VALUE_DEFICIENT,
    assert_value,
    generator,
    gradient,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming
from test_from_density import (
    COMPLEX,
    REAL,
    SPECTRA,
    assert_differentiable_once,
    assert_transforms,
    density_case,
    random_density,
)
from torch import Tensor

from vne_kernels import (
    conditional_entropy,
    mutual_information,
    partial_trace,
    relative_entropy,
    renyi_entropy_from_density,
    vn_entropy_from_density,
)
from vne_kernels._core import matrices, ops
from vne_kernels._core.dtypes import compute_dtype
from vne_kernels.functional import quantum

pytestmark = pytest.mark.cpu_only("operators that test_density.py runs on every backend")

DIMS = (2, 3, 2)
OF_PAIR = (conditional_entropy, mutual_information)
EXACT = 1e-12
seeds = st.integers(0, 2**31)


def pure(amplitudes: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    ket = torch.tensor(amplitudes, dtype=dtype)
    ket = ket / torch.linalg.vector_norm(ket)
    return torch.outer(ket, ket.conj())


def low_rank(d: int, rank: int, seed: int, dtype: torch.dtype = torch.complex128) -> Tensor:
    """A density matrix of this rank."""
    x = torch.randn(d, rank, generator=generator(seed), dtype=dtype)
    rho = x @ x.mH
    return rho / rho.diagonal().real.sum()


# ---------------------------------------------------------------------------------------------
# Partial trace
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 2, (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_partial_trace_against_qutip(keep: int | tuple[int, ...], qutip: ModuleType) -> None:
    rho = random_density(12)
    expected = qutip.Qobj(rho.numpy(), dims=[list(DIMS)] * 2).ptrace(keep).full()
    part = partial_trace(rho, DIMS, keep)
    torch.testing.assert_close(part, torch.from_numpy(expected), rtol=0, atol=1e-15)
    batch = torch.stack([torch.stack([rho, 2 * rho])] * 3)
    parts = partial_trace(batch, list(DIMS), keep)
    assert parts.shape == (3, 2, *part.shape)
    torch.testing.assert_close(parts[2, 1], 2 * part)


def test_partial_trace_of_a_product() -> None:
    parts = [random_density(d, seed) for seed, d in enumerate(DIMS)]
    whole = torch.kron(torch.kron(parts[0], parts[1]), parts[2])
    for keep, part in enumerate(parts):
        torch.testing.assert_close(partial_trace(whole, DIMS, keep), part)
    integers = np.array(DIMS), np.array([2, 0])
    torch.testing.assert_close(
        partial_trace(whole, list(integers[0]), np.int64(1)), partial_trace(whole, DIMS, 1)
    )
    pair = torch.kron(parts[0], parts[2])
    torch.testing.assert_close(partial_trace(whole, list(integers[0]), list(integers[1])), pair)
    torch.testing.assert_close(partial_trace(whole, DIMS, (2, 0)), pair)  # in the order of dims


def test_partial_trace_keeps_the_dtype_and_has_a_gradient() -> None:
    for dtype in (torch.bfloat16, torch.float16, *REAL, *COMPLEX):
        assert partial_trace(torch.eye(6).to(dtype), (2, 3), 1).dtype == dtype
    rho = random_density(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda rho: partial_trace(rho, (2, 3), 1), (rho,))


@pytest.mark.parametrize(
    ("error", "dims", "keep"),
    [
        *((ValueError, dims, 0) for dims in ((2, 2), (-2, -3), ())),
        *((TypeError, dims, 0) for dims in ((2.0, 3), 6, (True, 6))),
        *((ValueError, (2, 3), keep) for keep in (2, -1, (0, 0), ())),
        (TypeError, (2, 3), 0.5),
    ],
)
def test_partial_trace_checks_its_arguments(
    error: type[Exception], dims: object, keep: object
) -> None:
    named = ("dims", dims) if keep == 0 else ("keep", keep)
    with pytest.raises(error, match=naming(*named)):
        partial_trace(torch.eye(6), dims, keep)


# ---------------------------------------------------------------------------------------------
# Conditional entropy and mutual information
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, *REAL, *COMPLEX])
def test_bell_state_and_its_like(dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype not in (torch.float64, torch.complex128) else EXACT
    bell, product = pure([1, 0, 0, 1]).round(decimals=8), pure([1, 0, 0, 0])
    mixed, correlated = torch.eye(4) / 4, torch.diag(torch.tensor([0.5, 0, 0, 0.5]))
    states = torch.stack([bell, product, mixed.double(), correlated.double()]).to(dtype)
    log2 = math.log(2)
    expected = torch.tensor([[-1, 0, 1, 0], [2, 0, 0, 1]], dtype=torch.float64) * log2
    for function, values in zip(OF_PAIR, expected, strict=True):
        s = function(states, (2, 2))
        assert s.dtype == (torch.float64 if tolerance == EXACT else torch.float32)
        torch.testing.assert_close(s.double(), values, rtol=0, atol=tolerance)
        bits = function(states, (2, 2), base=2)  # -1, 0, 1, 0 and 2, 0, 0, 1
        torch.testing.assert_close(bits.double(), values / log2, rtol=0, atol=2 * tolerance)
        assert gradient(lambda rho, f=function: f(rho, (2, 2)), states).isfinite().all()


@pytest.mark.parametrize("seed", range(3))
def test_against_qutip_and_pennylane(seed: int, qutip: ModuleType, pennylane: ModuleType) -> None:
    for rho in (random_density(4, seed), low_rank(4, 2, seed)):
        state, array = qutip.Qobj(rho.numpy(), dims=[[2, 2]] * 2), rho.numpy()
        s, conditional = vn_entropy_from_density(rho), conditional_entropy(rho, (2, 2))
        mutual = mutual_information(rho, (2, 2))
        assert float(conditional) == pytest.approx(qutip.entropy_conditional(state, 1), abs=1e-11)
        assert float(mutual) == pytest.approx(qutip.entropy_mutual(state, 0, 1), abs=1e-11)
        assert float(s) == pytest.approx(float(pennylane.math.vn_entropy(array, [0, 1])), abs=1e-11)
        theirs = float(pennylane.math.mutual_info(array, [0], [1]))
        assert float(mutual) == pytest.approx(theirs, abs=1e-11)
        theirs = float(pennylane.math.mutual_info(array, [0], [1], base=2))
        bits = mutual_information(rho, (2, 2), base=2)
        assert float(bits) == pytest.approx(theirs, abs=1e-11)


def test_subsystems_of_other_sizes(qutip: ModuleType) -> None:
    """A, B and C of 2, 3 and 2: S(A|BC), and I(AB;C)."""
    rho = random_density(12)
    state = qutip.Qobj(rho.numpy(), dims=[list(DIMS)] * 2)
    conditional, mutual = conditional_entropy(rho, (2, 6)), mutual_information(rho, (6, 2))
    assert float(conditional) == pytest.approx(qutip.entropy_conditional(state, [1, 2]), abs=1e-11)
    assert float(mutual) == pytest.approx(qutip.entropy_mutual(state, [0, 1], 2), abs=1e-11)


@pytest.mark.parametrize("function", OF_PAIR)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradcheck_of_pairs(function: object, dtype: torch.dtype) -> None:
    rho = random_density(6, dtype=dtype).requires_grad_()
    of_pair = partial(function, dims=(2, 3))
    assert torch.autograd.gradcheck(of_pair, (rho,), check_forward_ad=True)
    assert_transforms(of_pair, rho.detach(), 1e-11)
    assert_differentiable_once(of_pair, rho.detach())


@pytest.mark.parametrize("function", OF_PAIR)
def test_pairs_check_their_arguments(function: object) -> None:
    for rho, dims, options, named in (
        (torch.eye(6), (2, 3, 1), {}, ("dims", (2, 3, 1))),
        (torch.eye(6), (2, 2), {}, ("dims", (2, 2), (6, 6))),
        (torch.ones(2, 3), (1, 3), {}, ("rho_ab", (2, 3))),
        (torch.eye(6), (2, 3), {"check": True}, ("rho_ab", "trace", 5)),
        (random_density(6), (2, 3), {"method": "poles"}, ("'poles'",)),
    ):
        with pytest.raises(ValueError, match=naming(*named)):
            function(rho, dims, **options)
    by_poles = function(random_density(6, dtype=torch.float64), (2, 3), method="poles")
    by_eigh = function(random_density(6, dtype=torch.float64), (2, 3), method="eigh")
    torch.testing.assert_close(by_poles, by_eigh, rtol=0, atol=EXACT)


# ---------------------------------------------------------------------------------------------
# Relative entropy
# ---------------------------------------------------------------------------------------------


def mp_relative_entropy(rho: Tensor, sigma: Tensor) -> float:
    with mpmath.workdps(40):
        logs, matrices = [], []
        for state in (rho, sigma):
            rows = [[mpmath.mpc(entry.real, entry.imag) for entry in row] for row in state.tolist()]
            matrices.append(mpmath.matrix(rows))
            values, vectors = mpmath.eigh(matrices[-1])
            logs.append(vectors * mpmath.diag([mpmath.log(x) for x in values]) * vectors.H)
        product = matrices[0] * (logs[0] - logs[1])
        return float(mpmath.fsum(product[i, i].real for i in range(len(rho))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_relative_entropy_against_mpmath_qutip_and_pennylane(
    dtype: torch.dtype, qutip: ModuleType, pennylane: ModuleType
) -> None:
    """Measured: 1.8e-15 to mpmath."""
    rho, sigma = random_density(4, 0, dtype), random_density(4, 1, dtype)
    value = float(relative_entropy(rho, sigma))
    assert value == pytest.approx(mp_relative_entropy(rho, sigma), abs=EXACT)
    states = [qutip.Qobj(state.numpy()) for state in (rho, sigma)]
    assert value == pytest.approx(qutip.entropy_relative(*states), abs=1e-11)
    theirs = float(pennylane.math.relative_entropy(rho.numpy(), sigma.numpy()))
    assert value == pytest.approx(theirs, abs=1e-11)
    bits = float(relative_entropy(rho, sigma, base=2))
    assert bits == pytest.approx(qutip.entropy_relative(*states, base=2), abs=1e-11)


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
@pytest.mark.parametrize("name", SPECTRA)
def test_relative_entropy_to_the_mixed_state(name: str, dtype: torch.dtype) -> None:
    """S(rho || I/d) = log d - S(rho), and S(rho || rho) = 0, where rho lacks rank too.

    Measured: 4e-14 and 2.8e-6.
    """
    for shape in ((2, 5), (33, 17), (17, 33), (65, 64)):
        rho, d = density_case(name, shape, dtype), shape[1]
        eye = torch.eye(d, dtype=dtype)
        s = vn_entropy_from_density(density_case(name, shape, torch.float64))
        tolerance = VALUE_DEFICIENT[dtype.to_real()]
        assert_value(relative_entropy(rho, eye / d), math.log(d) - s, tolerance)
        assert_value(relative_entropy(rho, rho), torch.zeros_like(s), tolerance)
        to_mixed = gradient(lambda x, m=eye / d: relative_entropy(x, m), rho)
        assert to_mixed.isfinite().all()
        assert gradient(lambda x, r=rho: relative_entropy(r, x), rho).isfinite().all()


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
def test_infinite_where_the_support_is_left(dtype: torch.dtype) -> None:
    """By 1e-4 of the trace, among states of rank 1 to 32 of 64; within it equal to the part."""
    x = torch.randn(64, 32, generator=generator(0), dtype=dtype)
    for rank in (1, 3, 32):
        basis = torch.linalg.qr(x[:, :rank]).Q
        inner = [random_density(rank, seed, dtype) for seed in (0, 1)]
        rho, sigma = (basis @ part @ basis.mH for part in inner)
        tolerance = VALUE_DEFICIENT[dtype.to_real()]
        assert_value(relative_entropy(rho, sigma), relative_entropy(*inner), tolerance)
        eye = torch.eye(64, dtype=dtype)
        outside = (1 - 1e-4) * rho + 1e-4 * eye / 64
        assert relative_entropy(outside, sigma) == math.inf
        assert relative_entropy(rho, outside).isfinite()
        for grad in (
            gradient(lambda r, s=sigma: relative_entropy(r, s), rho),
            gradient(lambda s, r=rho: relative_entropy(r, s), sigma),
            gradient(lambda r, s=sigma: relative_entropy(r, s), outside),
        ):
            assert grad.isfinite().all()
            assert (grad - grad.mH).abs().max() <= 1e-4 * grad.abs().max()


def test_relative_entropy_of_zeros_and_pure_states() -> None:
    zero, up, down = torch.zeros(2, 2), pure([1, 0]), pure([0, 1])
    assert relative_entropy(up, down) == math.inf
    assert relative_entropy(up, up) == 0
    assert relative_entropy(up, zero.double()) == math.inf
    for state in (zero, up, torch.eye(4) / 4):
        value = relative_entropy(state, state)
        assert value == 0
        assert math.copysign(1, float(value)) == 1  # not -0.
    assert relative_entropy(-up, down).isnan()
    assert relative_entropy(up, -down).isnan()
    for argument in (zero, up):
        assert gradient(lambda x, a=argument: relative_entropy(a, x), argument).isfinite().all()


def test_gradient_within_the_support_of_sigma() -> None:
    """Where sigma lacks rank, the gradient is that of the part where both are."""
    basis = torch.linalg.qr(torch.randn(7, 3, generator=generator(0), dtype=torch.complex128)).Q
    rho, sigma = random_density(3, 0), random_density(3, 1)
    whole = basis @ rho @ basis.mH, basis @ sigma @ basis.mH
    of_sigma = gradient(lambda s: relative_entropy(whole[0], s), whole[1])
    part = gradient(lambda s: relative_entropy(rho, s), sigma)
    assert (of_sigma - basis @ part @ basis.mH).norm() <= 1e-11 * part.norm()
    of_rho = basis.mH @ gradient(lambda r: relative_entropy(r, whole[1]), whole[0]) @ basis
    assert (of_rho - gradient(lambda r: relative_entropy(r, sigma), rho)).norm() <= 1e-11


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradcheck_of_relative_entropy(dtype: torch.dtype) -> None:
    """Also where eigenvalues of sigma are equal, and where one of a batch is shared."""
    rho = torch.stack([random_density(4, seed, dtype) for seed in (0, 1)]).requires_grad_()
    repeated = torch.diag(torch.tensor([0.3, 0.3, 0.2, 0.2])).to(dtype)
    for sigma in (random_density(4, 2, dtype), repeated):
        states = rho, sigma.requires_grad_()
        assert torch.autograd.gradcheck(relative_entropy, states, check_forward_ad=True)


def test_dtypes_meet_in_the_wider_one() -> None:
    rho, sigma = density_case("iid", (9, 5), torch.bfloat16), random_density(5)
    value = relative_entropy(rho, sigma)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, relative_entropy(rho.to(torch.complex128), sigma))
    grad = gradient(lambda rho: relative_entropy(rho, sigma), rho)
    assert grad.dtype == torch.bfloat16
    exact = gradient(lambda rho: relative_entropy(rho, sigma), rho.double())
    assert relative_error(grad, exact) <= 2.0**-8
    assert relative_entropy(rho, rho).dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", REAL + COMPLEX)
def test_an_invalid_state_is_nan_and_the_others_are_not(dtype: torch.dtype, bad: float) -> None:
    rho = torch.stack([random_density(6, seed, dtype) for seed in range(3)])
    sigma = random_density(6, 9, dtype)
    clean = rho.clone()
    rho[1, 2, 3] = bad
    for function in (
        lambda x: relative_entropy(x, sigma),
        lambda x: relative_entropy(sigma, x),
        lambda x: conditional_entropy(x, (2, 3)),
        lambda x: mutual_information(x, (2, 3)),
    ):
        s, grad = function(rho), gradient(function, rho)
        assert s.isnan().tolist() == [False, True, False]
        assert torch.equal(s[::2], function(clean)[::2])
        assert grad.isnan().flatten(1).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("exponent", [-120, -80, 80, 120])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_states_of_outsize_traces(dtype: torch.dtype, exponent: int) -> None:
    """Of rho of trace 1, S(c rho) = c (S(rho) - log c), and S(c rho||c sigma) = c S(rho||sigma)."""
    rho, sigma = (random_density(6, seed, dtype) for seed in range(2))
    c = 10.0**exponent
    entropies = (
        (vn_entropy_from_density, 1),
        (partial(mutual_information, dims=(2, 3)), 1),  # S(A) + S(B) - S(AB)
        (partial(conditional_entropy, dims=(2, 3)), 0),  # S(AB) - S(B)
    )
    for function, count in entropies:
        expected = c * (function(rho) - count * math.log(c))
        for outsize in (c * rho, (c * rho).requires_grad_()):  # the latter by eigenvectors
            torch.testing.assert_close(function(outsize).detach(), expected, rtol=1e-12, atol=0)
            value = relative_entropy(outsize, c * sigma).detach()
            torch.testing.assert_close(value, c * relative_entropy(rho, sigma), rtol=1e-12, atol=0)


def test_relative_entropy_checks_its_arguments() -> None:
    good = torch.eye(2) / 2
    for error, rho, sigma, named in (
        (ValueError, good, torch.eye(3), ((2, 2), (3, 3))),
        (ValueError, good.expand(2, 2, 2), good.expand(3, 2, 2), ((2, 2, 2), (3, 2, 2))),
        (ValueError, good, torch.ones(2), ("sigma", (2,))),
        (ValueError, good, good.to("meta"), ("cpu", "meta")),
        (TypeError, good.long(), good, ("rho", torch.int64)),
    ):
        with pytest.raises(error, match=naming(*named)):
            relative_entropy(rho, sigma)
    with pytest.raises(ValueError, match=naming("sigma", "trace")):
        relative_entropy(good, 2 * good, check=True)


# ---------------------------------------------------------------------------------------------
# Inside torch
# ---------------------------------------------------------------------------------------------


def test_opcheck_of_complex_states() -> None:
    """Real ones: `test_torch_integration.py`."""
    states = torch.stack([random_density(6, seed) for seed in range(4)]).unflatten(0, (2, 2))
    for name, arguments in (
        ("relative_entropy", states.unbind()),
        ("matrix_entropy", (states, None, "renyi", 0.7)),
        ("matrix_entropy", (states, states[..., 0].abs(), "renyi", 0.7)),
        ("parts_entropy", (states, 2, 3, 1.0, 2.0, 3.0)),
    ):
        for operator in (name, f"{name}_grad"):
            torch.library.opcheck(getattr(torch.ops.vne_kernels, operator).default, arguments)


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX, torch.float16, torch.bfloat16])
def test_native_kernels_agree_with_those_of_other_devices(dtype: torch.dtype) -> None:
    """In every dtype, with negative eigenvalues, of an outsize and a tiny trace, and with a NaN."""
    wide = torch.promote_types(dtype, torch.float64)
    rho = torch.stack([random_density(6, seed, wide) for seed in range(6)])
    rho[1] -= 0.1 * torch.eye(6)
    rho[2] = torch.diag(torch.tensor([0.5, 0.5, 0, 0, 0, 0]))
    rho[3] *= 1e-5 if dtype == torch.float16 else 1e-30
    rho[4] *= 10
    rho[5, 0, 1] = math.nan
    states = rho.to(dtype).unflatten(0, (2, 3))
    with_others = states, states.flip(1)
    if dtype in (torch.complex64, torch.complex128):
        with_others = states.conj(), states.flip(1).conj()
    scale = torch.rand(2, 3, 6, generator=generator(6), dtype=torch.float64)
    scale = scale.index_fill(-1, torch.tensor(4), 0).to(compute_dtype(dtype))
    cases = [("relative_entropy", with_others, quantum._in_torch)]
    for kind in ("as given", "renyi", "tsallis"):
        for order in (0, 0.6, 1, 2, math.inf):
            for s in (None, scale):
                given = (with_others[0], s, kind, order)
                cases.append(("matrix_entropy", given, matrices._entropy))
    for factors in ((1.0, 0.0, -1.0), (-0.5, 1.0, 2.0)):
        arguments = (with_others[0], 2, 3, *factors)
        cases.append(("parts_entropy", arguments, matrices._parts_entropy))
    tolerance = 1e-6 if torch.finfo(dtype).eps > 1e-10 else 1e-12
    for name, arguments, plain in cases:
        value = ops.OPERATORS[name].call(*arguments)
        native = value, *ops.OPERATORS[f"{name}_grad"].call(*arguments)
        expected = *plain(*arguments, with_grad=False), *plain(*arguments, with_grad=True)
        assert native[0].isnan().sum() == 1 + (name == "relative_entropy")
        for x, y in zip(native, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_compile_and_vmap() -> None:
    """With a conjugate view, which an operator may not see as such."""
    rho, sigma = random_density(4, 0), random_density(4, 1)

    def loss(rho: Tensor) -> Tensor:
        pair = conditional_entropy(rho.real, (2, 2))
        s = vn_entropy_from_density(rho, normalize_trace=True)
        return relative_entropy(rho.conj(), sigma) + pair + s + renyi_entropy_from_density(rho, 2)

    leaf = rho.clone().requires_grad_()
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf)
    value.backward()
    torch.testing.assert_close(value.detach(), loss(rho))
    torch.testing.assert_close(leaf.grad, gradient(loss, rho))
    batch = torch.stack([rho, sigma])
    torch.testing.assert_close(torch.func.vmap(loss)(batch), torch.stack([loss(rho), loss(sigma)]))


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
def test_transforms_of_relative_entropy(dtype: torch.dtype) -> None:
    """Both states constant, and both of one matrix."""
    other = random_density(3, 1, dtype)
    for function in (
        lambda x: relative_entropy(x, other),
        lambda x: relative_entropy(other, x),
        lambda x: relative_entropy(x, (x + other) / 2),
    ):
        rtol = 1e-11 if dtype.to_real() == torch.float64 else GRADIENT_WELL_CONDITIONED
        assert_transforms(function, random_density(3, 0, dtype), rtol)
        assert_differentiable_once(function, random_density(3, 0, dtype))


# ---------------------------------------------------------------------------------------------
# Inequalities
# ---------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(seeds, st.integers(1, 12), st.sampled_from([torch.float64, torch.complex128]))
def test_inequalities(seed: int, rank: int, dtype: torch.dtype) -> None:
    """Klein's; I as a relative entropy; monotonicity; Araki and Lieb's; strong subadditivity."""
    rho = low_rank(12, rank, seed, dtype)
    sigma = low_rank(12, 14, seed + 1, dtype)
    a, bc = partial_trace(rho, DIMS, 0), partial_trace(rho, DIMS, (1, 2))
    mutual = mutual_information(rho, (2, 6))
    product = relative_entropy(rho, torch.kron(a, bc))
    torch.testing.assert_close(product, mutual, rtol=0, atol=1e-10)
    whole = relative_entropy(rho, sigma)
    parts = relative_entropy(bc, partial_trace(sigma, DIMS, (1, 2)))
    assert whole >= parts - EXACT
    assert parts >= -EXACT
    s_a, s_bc = vn_entropy_from_density(a), vn_entropy_from_density(bc)
    s_abc = vn_entropy_from_density(rho)
    assert (s_a - s_bc).abs() - EXACT <= s_abc <= s_a + s_bc + EXACT
    of_ab = conditional_entropy(partial_trace(rho, DIMS, (0, 1)), (2, 3))
    assert conditional_entropy(rho, (2, 6)) <= of_ab + EXACT  # S(A|BC) <= S(A|B)
