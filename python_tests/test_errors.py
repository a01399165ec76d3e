"""What is refused, with which exception, and that its message says what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from naming import naming
from torch import Tensor

from vne_kernels import (
    DoELoss,
    VNEntropy,
    doe_loss,
    renyi_entropy,
    spectrum,
    vendi_score,
    vn_entropy,
)

pytestmark = pytest.mark.every_backend

TAKES_Z: dict[str, Callable[[Tensor], Tensor]] = {
    "vn_entropy": vn_entropy,
    "spectrum": spectrum,
    "doe_loss": lambda z: doe_loss(z, z),
    "VNEntropy": VNEntropy(),
    "DoELoss": lambda z: DoELoss()(z, z),
}


@pytest.fixture(params=TAKES_Z)
def takes_z(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    return TAKES_Z[request.param]


@pytest.mark.parametrize("shape", [(), (5,), (0, 128), (128, 0), (0, 0), (3, 0, 4), (3, 4, 0)])
def test_no_rows_no_features_or_too_few_dimensions(
    takes_z: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=naming(shape)):
        takes_z(torch.zeros(shape))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128]
)
def test_a_dtype_that_is_not_floating(
    takes_z: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    with pytest.raises(TypeError, match=naming(dtype)):
        takes_z(torch.ones(4, 6, dtype=dtype))


@pytest.mark.parametrize("not_a_tensor", [None, [[1.0, 2.0]], 3.0, "z"])
def test_not_a_tensor(takes_z: Callable[[Tensor], Tensor], not_a_tensor: object) -> None:
    with pytest.raises(TypeError, match=r"tensor|Tensor"):
        takes_z(not_a_tensor)


def test_a_numpy_array() -> None:
    with pytest.raises(TypeError, match="ndarray"):
        vn_entropy(torch.ones(4, 6).numpy())


@pytest.mark.parametrize("method", ["svd", "", "EIGH", None])
@pytest.mark.parametrize(
    "call",
    [
        lambda z, method: vn_entropy(z, method=method),
        lambda z, method: doe_loss(z, z, method=method),
        lambda z, method: VNEntropy(method=method)(z),
        lambda z, method: DoELoss(method=method)(z, z),
    ],
    ids=["vn_entropy", "doe_loss", "VNEntropy", "DoELoss"],
)
def test_unknown_method(call: Callable[..., Tensor], method: str) -> None:
    with pytest.raises(ValueError, match=naming("method", repr(method))):
        call(torch.ones(4, 6), method)


@pytest.mark.parametrize("eps", [-1e-12, -1.0, math.nan, math.inf, "1e-12", None, 1j])
@pytest.mark.parametrize(
    "call",
    [lambda z, eps: vn_entropy(z, eps=eps), lambda z, eps: VNEntropy(eps=eps)(z)],
    ids=["vn_entropy", "VNEntropy"],
)
def test_eps_negative_or_not_finite_or_no_number(call: Callable[..., Tensor], eps: object) -> None:
    with pytest.raises(ValueError if isinstance(eps, float) else TypeError, match=naming("eps")):
        call(torch.ones(4, 6), eps)


@pytest.mark.parametrize("normalize", ["no", None, 1])
@pytest.mark.parametrize(
    "call",
    [
        lambda z, normalize: vn_entropy(z, normalize=normalize),
        lambda z, normalize: spectrum(z, normalize=normalize),
        lambda z, normalize: VNEntropy(normalize=normalize),
    ],
)
def test_normalize_that_is_not_a_bool(call: Callable[..., Tensor], normalize: object) -> None:
    with pytest.raises(TypeError, match=naming("normalize", type(normalize).__name__)):
        call(torch.ones(4, 6), normalize)


@pytest.mark.parametrize(
    ("sparse", "what"),
    [
        (torch.ones(4, 6).to_sparse(), "torch.sparse_coo"),
        (torch.ones(4, 6).to_mkldnn(), "torch._mkldnn"),
        (torch.nested.nested_tensor([torch.ones(4, 6)]), "nested"),
    ],
    ids=["sparse", "mkldnn", "nested"],
)
def test_a_tensor_that_is_not_dense(
    takes_z: Callable[[Tensor], Tensor], sparse: Tensor, what: str
) -> None:
    with pytest.raises(TypeError, match=naming(what)):
        takes_z(sparse)


@pytest.mark.parametrize(
    "weights",
    [torch.ones(4).to_sparse(), torch.ones(4, dtype=torch.complex64), [0.25] * 4],
    ids=["sparse", "complex", "list"],
)
@pytest.mark.parametrize("function", [vn_entropy, spectrum])
def test_weights_of_another_type(function: Callable[..., Tensor], weights: object) -> None:
    with pytest.raises(TypeError, match=naming("weights")):
        function(torch.ones(4, 6), weights=weights)


@pytest.mark.parametrize("function", [vn_entropy, spectrum])
@pytest.mark.parametrize("shape", [(5,), (6,), (2, 3), (4, 6), (3, 4), (2, 2, 4), (1, 2, 4), (0,)])
def test_weights_that_do_not_broadcast(
    function: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=naming("weights", (2, 4), shape)):
        function(torch.ones(2, 4, 6), weights=torch.ones(shape))


@pytest.mark.parametrize(
    ("shape1", "shape2"),
    [
        ((4, 6), (5, 6)),
        ((4, 6), (4, 7)),
        ((2, 4, 6), (4, 6)),
        ((2, 4, 6), (1, 4, 6)),
        ((1, 6), (4, 6)),
    ],
)
@pytest.mark.parametrize("loss", [doe_loss, DoELoss()])
def test_views_of_two_shapes(
    loss: Callable[..., Tensor], shape1: tuple[int, ...], shape2: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=naming(shape1, shape2)):
        loss(torch.ones(shape1), torch.ones(shape2))


@pytest.mark.parametrize("loss", [doe_loss, DoELoss()])
def test_views_of_two_dtypes_or_devices(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError, match=naming("torch.float32", "torch.float64")):
        loss(torch.ones(4, 6), torch.ones(4, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=naming("cpu", "meta")):
        loss(torch.ones(4, 6), torch.ones(4, 6, device="meta"))


def test_an_error_in_the_second_view_names_it() -> None:
    with pytest.raises(TypeError, match=naming("z2", "torch.int64")):
        doe_loss(torch.ones(4, 6), torch.ones(4, 6, dtype=torch.int64))


@pytest.mark.parametrize("function", [vn_entropy, spectrum])
def test_options_are_keywords(function: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError):
        function(torch.ones(4, 6), False)


@pytest.mark.parametrize("base", [0, 1, -2, math.inf, math.nan, np.float64(1), True, "2", 2j])
@pytest.mark.parametrize(
    "function", [vn_entropy, partial(renyi_entropy, alpha=3), lambda z, base: VNEntropy(base=base)]
)
def test_a_base_that_is_none(function: Callable[..., object], base: object) -> None:
    expected = TypeError if isinstance(base, bool | str | complex) else ValueError
    with pytest.raises(expected, match=naming("base")):
        function(torch.ones(4, 6), base=base)


@pytest.mark.parametrize("beta", ["10", None, True, torch.ones(2), 1j])
@pytest.mark.parametrize(
    "loss", [lambda beta: DoELoss(beta), partial(doe_loss, *[torch.eye(4)] * 2)]
)
def test_a_beta_that_is_no_number(loss: Callable[..., object], beta: object) -> None:
    with pytest.raises(TypeError, match=naming("beta")):
        loss(beta=beta)


def test_numbers_of_numpy_are_numbers() -> None:
    z = torch.eye(4)
    assert vendi_score(z, np.int64(2)) == vendi_score(z, 2)
    assert renyi_entropy(z, np.float32(0.5)) == renyi_entropy(z, 0.5)
    assert vn_entropy(z, eps=np.float64(1e-3), base=np.int8(2)) == 2
    assert DoELoss(np.float64(2), max_rows=np.int32(4))(z, z) == DoELoss(2)(z, z)
