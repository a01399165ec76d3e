"""doe_loss and the modules: value, gradient, components."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import (
    DEFICIENT_SPECTRA,
    DEGENERATE,
    DTYPES,
    FEW_SHAPES,
    GRADIENT_FLOAT64,
    GRADIENT_WELL_CONDITIONED,
    LAYOUT_BASE_SHAPE,
    LAYOUTS,
    ROUNDING,
    SPECTRA,
    VALUE,
    VALUE_DEFICIENT,
    absolute_error,
    assert_value,
    degenerate_case,
    gaussian,
    generator,
    gradient,
    hessian_product,
    relative_error,
    result_dtype,
    spectrum_case,
    views,
)
from torch import Tensor, nn

from vne_kernels import DoELoss, VNEntropy, doe_loss, reference, vn_entropy

pytestmark = pytest.mark.every_backend

FLOATS = (torch.float64, torch.float32)
BETA = 2.5


def composition(z1: Tensor, z2: Tensor, beta: float, method: str) -> Tensor:
    """The loss as a user would compose it from `vn_entropy` and torch."""
    cosine = (nn.functional.normalize(z1, dim=-1) * nn.functional.normalize(z2, dim=-1)).sum(-1)
    return -vn_entropy(z1, method=method) - beta * cosine.mean(-1)


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), leaves)


# ---------------------------------------------------------------------------------------------
# Value
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (8, 1), *FEW_SHAPES])
@pytest.mark.parametrize("name", SPECTRA)
def test_value(name: str, shape: tuple[int, int], dtype: torch.dtype, method: str) -> None:
    z1, z2 = views(name, shape, dtype)
    loss, entropy, cosine = doe_loss(z1, z2, beta=BETA, method=method, return_components=True)
    tolerance = (VALUE_DEFICIENT if name in DEFICIENT_SPECTRA else VALUE)[dtype]
    assert loss.dtype == entropy.dtype == cosine.dtype == result_dtype(dtype)
    assert_value(loss, reference.oracle_doe(z1, z2, BETA), tolerance)
    assert_value(entropy, reference.oracle(z1), tolerance)
    assert_value(cosine, reference.oracle_cosine(z1, z2), VALUE[dtype])
    assert torch.equal(loss, doe_loss(z1, z2, beta=BETA, method=method))


def test_defaults() -> None:
    z1, z2 = views("iid", (17, 33), torch.float32)
    loss = doe_loss(z1, z2)
    assert loss.shape == ()
    assert_value(loss, reference.oracle_doe(z1, z2, 1.0), VALUE[torch.float32])
    assert torch.equal(DoELoss()(z1, z2), loss)
    assert torch.equal(VNEntropy()(z1), vn_entropy(z1))


def test_two_equal_views_have_cosine_one(method: str) -> None:
    z, _ = views("relu", (17, 33), torch.float64)
    components = doe_loss(z, z, method=method, return_components=True)
    assert float(components.cosine) == pytest.approx(1, abs=1e-14)
    opposite = doe_loss(z, -z, method=method, return_components=True)
    assert float(opposite.cosine) == pytest.approx(-1, abs=1e-14)


def test_the_entropy_is_of_the_first_view_alone(method: str) -> None:
    z1, z2 = views("iid", (17, 33), torch.float64)
    entropy = doe_loss(z1, z2, method=method, return_components=True).entropy
    assert_value(entropy, reference.oracle(z1), VALUE[torch.float64])
    assert abs(entropy - reference.oracle(z2)) > 1e-3


@pytest.mark.parametrize("batch", [(3,), (2, 3), (0,)])
def test_batches(batch: tuple[int, ...], method: str) -> None:
    if 0 in batch:
        z1, z2 = torch.empty(2, *batch, 17, 33).unbind()
    else:
        z1, z2 = views("iid", (*batch, 17, 33), torch.float32)
    components = doe_loss(z1, z2, beta=BETA, method=method, return_components=True)
    assert all(component.shape == batch for component in components)
    assert_value(components.loss, reference.oracle_doe(z1, z2, BETA), VALUE[torch.float32])


@pytest.mark.parametrize("magnitude", [1e-8, 1e18, 1e30])
def test_magnitude_of_rows(magnitude: float, method: str) -> None:
    z1, z2 = (magnitude * z for z in views("iid", (17, 33), torch.float32))
    loss = doe_loss(z1, z2, beta=BETA, method=method)
    assert_value(loss, reference.oracle_doe(z1, z2, BETA), VALUE[torch.float32])


# ---------------------------------------------------------------------------------------------
# Gradient
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 5), (17, 33), (33, 17), (128, 512)])
@pytest.mark.parametrize("name", ["iid", "relu", "repeated"])
def test_fused_gradient_is_that_of_the_composition(
    name: str, shape: tuple[int, int], dtype: torch.dtype, method: str
) -> None:
    z1, z2 = (z.requires_grad_() for z in views(name, shape, dtype))
    fused = gradients(doe_loss(z1, z2, beta=BETA, method=method), z1, z2)
    composed = gradients(composition(z1.double(), z2.double(), BETA, "eigh"), z1, z2)
    tolerance = GRADIENT_WELL_CONDITIONED if dtype == torch.float32 else GRADIENT_FLOAT64
    for grad, expected in zip(fused, composed, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, expected) <= tolerance


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 3, 5), (1, 4)])
def test_gradcheck_of_every_component(
    shape: tuple[int, ...], method: str, gradcheck: Callable[..., bool]
) -> None:
    z1, z2 = (z.requires_grad_() for z in views("iid", shape, torch.float64))

    def components(z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
        return tuple(doe_loss(z1, z2, beta=BETA, method=method, return_components=True))

    assert gradcheck(components, (z1, z2))


def test_a_component_alone_has_its_own_gradient(method: str) -> None:
    z1, z2 = (z.requires_grad_() for z in views("iid", (2, 17, 33), torch.float64))
    components = doe_loss(z1, z2, beta=BETA, method=method, return_components=True)
    of_entropy = torch.autograd.grad(
        components.entropy.sum(), (z1, z2), retain_graph=True, materialize_grads=True
    )
    of_cosine = gradients(components.cosine, z1, z2)
    expected = gradients(reference.oracle_cosine(z1, z2), z1, z2)
    assert relative_error(of_entropy[0], reference.oracle_grad(z1.detach())) <= GRADIENT_FLOAT64
    assert (of_entropy[1] == 0).all()
    assert relative_error(of_cosine[0], expected[0]) <= GRADIENT_FLOAT64
    assert relative_error(of_cosine[1], expected[1]) <= GRADIENT_FLOAT64


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_one_view_may_need_no_gradient(needs: tuple[bool, bool], method: str) -> None:
    """As with a stop-gradient or a momentum encoder."""
    both = [z.requires_grad_() for z in views("iid", (17, 33), torch.float64)]
    expected = gradients(doe_loss(*both, beta=BETA, method=method), *both)
    one = [z.detach().requires_grad_(need) for z, need in zip(both, needs, strict=True)]
    doe_loss(*one, beta=BETA, method=method).backward()
    for z, need, grad in zip(one, needs, expected, strict=True):
        assert z.grad is None if not need else relative_error(z.grad, grad) <= GRADIENT_FLOAT64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients(dtype: torch.dtype, method: str) -> None:
    z1, z2 = (z.requires_grad_() for z in views("iid", (17, 33), dtype))
    halves = gradients(64 * doe_loss(z1, z2, beta=BETA, method=method), z1, z2)
    exact = gradients(64 * composition(z1.double(), z2.double(), BETA, "eigh"), z1, z2)
    for grad, expected in zip(halves, exact, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, expected) <= ROUNDING[dtype] + GRADIENT_WELL_CONDITIONED


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_row_has_gradient_zero(dtype: torch.dtype, method: str) -> None:
    z1, z2 = views("iid", (17, 33), dtype)
    z1[3] = 0
    z2[5] = 0
    z1.requires_grad_()
    z2.requires_grad_()
    loss = doe_loss(z1, z2, beta=BETA, method=method)
    assert_value(loss, reference.oracle_doe(z1.detach(), z2.detach(), BETA), VALUE[dtype])
    of_z1, of_z2 = gradients(loss, z1, z2)
    assert (of_z1[3] == 0).all()
    assert (of_z2[5] == 0).all()
    assert of_z1.isfinite().all()
    assert of_z2.isfinite().all()
    assert (of_z1[5] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_input_has_a_finite_gradient(name: str, dtype: torch.dtype, method: str) -> None:
    z1 = degenerate_case(name, (12, 40), dtype).requires_grad_()
    z2 = degenerate_case(name, (12, 40), dtype, seed=1).requires_grad_()
    loss = doe_loss(z1, z2, beta=BETA, method=method)
    tolerance = VALUE_DEFICIENT[dtype]
    assert_value(loss, reference.oracle_doe(z1.detach(), z2.detach(), BETA), tolerance)
    assert all(grad.isfinite().all() for grad in gradients(loss, z1, z2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_or_inf_stays_in_its_sample(bad: float, method: str) -> None:
    for view in range(2):
        pair = views("iid", (3, 17, 33), torch.float32)
        pair[view][1, 4, 5] = bad
        z1, z2 = (z.requires_grad_() for z in pair)
        components = doe_loss(z1, z2, beta=BETA, method=method, return_components=True)
        grads = gradients(components.loss, z1, z2)
        assert components.loss[1].isnan()
        assert components.cosine[1].isnan()
        assert components.entropy[1].isnan() == (view == 0)
        assert components.loss[::2].isfinite().all()
        assert grads[view][1].isnan().any()
        assert all(grad[::2].isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str, method: str) -> None:
    z1, z2 = gaussian(32, 12, generator(0)).view(2, *LAYOUT_BASE_SHAPE).unbind()
    expected = doe_loss(
        LAYOUTS[name](z1).contiguous(), LAYOUTS[name](z2).contiguous(), method=method
    )

    def loss(z2: Tensor) -> Tensor:
        return doe_loss(LAYOUTS[name](z1), LAYOUTS[name](z2), method=method)

    def loss_of_copy(z2: Tensor) -> Tensor:
        return doe_loss(LAYOUTS[name](z1), LAYOUTS[name](z2).contiguous(), method=method)

    assert_value(loss(z2), expected, VALUE[torch.float64])
    assert absolute_error(gradient(loss, z2), gradient(loss_of_copy, z2)) <= 1e-13


def test_double_backward_says_so(method: str) -> None:
    z1, z2 = (z.requires_grad_() for z in views("iid", (4, 6), torch.float64))
    with pytest.raises(NotImplementedError, match="doe_loss"):
        hessian_product(doe_loss(z1, z2, method=method), z1)


# ---------------------------------------------------------------------------------------------
# Modules
# ---------------------------------------------------------------------------------------------


def test_vn_entropy_module_passes_its_options(method: str) -> None:
    z = spectrum_case("iid", (17, 33), torch.float64)
    module = VNEntropy(normalize=False, method=method)
    expected = reference.oracle(z, normalize=False)
    assert_value(module(z), expected, VALUE[torch.float64])
    short = VNEntropy(method=method, eps=10.0)(z)
    assert_value(short, reference.oracle(z, eps=10.0), VALUE[torch.float64])


def test_beta_follows_a_schedule(method: str) -> None:
    z1, z2 = views("iid", (17, 33), torch.float64)
    module = DoELoss(method=method)
    for beta in (1.0, 4.5, 10.0):
        module.beta = beta
        expected = reference.oracle_doe(z1, z2, beta)
        assert_value(module(z1, z2), expected, VALUE[torch.float64])


def test_modules_have_no_parameters() -> None:
    for module in (VNEntropy(), DoELoss()):
        assert list(module.parameters()) == []
        assert module.state_dict() == {}


def test_training_raises_entropy_and_cosine(method: str) -> None:
    """The loss does what it is for: rows spread out, and stay with their second view."""
    torch.manual_seed(0)
    base = spectrum_case("relu", (32, 16), torch.float32)
    projector = nn.Linear(16, 16)
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.5)
    history = []
    for _ in range(20):
        z1, z2 = (projector(base + 0.05 * torch.randn_like(base)) for _ in range(2))
        components = doe_loss(z1, z2, method=method, return_components=True)
        optimizer.zero_grad()
        components.loss.backward()
        optimizer.step()
        history.append(float(components.loss.detach()))
    assert history[-1] < history[0] - 0.2
