"""torch.jit and ONNX: what works, and what is said of the rest.

See also test_torch_integration, for torch.export.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.onnx
from cases import gaussian, generator
from naming import naming
from torch import Tensor, nn

import vne_kernels
from vne_kernels import DoELoss, VNEntropy, vn_entropy

FUNCTIONS = [
    name
    for name in vne_kernels.__all__
    if isinstance(getattr(vne_kernels, name), types.FunctionType)
]


@pytest.fixture(autouse=True)
def _jit_is_deprecated() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.entropy = nn.Linear(4, 4), VNEntropy()

    def forward(self, x: Tensor) -> Tensor:
        return self.entropy(self.layer(x))


@pytest.mark.parametrize(
    ("name", "scripted"),
    [
        ("VNEntropy", VNEntropy()),
        ("DoELoss", DoELoss()),
        ("VNEntropy", Net()),
        *((name, getattr(vne_kernels, name)) for name in FUNCTIONS),
    ],
)
def test_script_is_refused(name: str, scripted: Callable[..., Tensor]) -> None:
    with pytest.raises(NotImplementedError, match=naming(name)):
        torch.jit.script(scripted)


@pytest.mark.parametrize("call", [VNEntropy(), vn_entropy, Net()])
def test_trace(call: Callable[[Tensor], Tensor]) -> None:
    x, other = (gaussian(8, 4, generator(seed)).float().requires_grad_() for seed in (0, 1))
    traced = torch.jit.trace(call, x)
    found, expected = traced(other), call(other)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, other)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_onnx_is_refused_by_name(needs_gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.onnx.export, which needs onnxscript, sets it while it runs torch.export."""
    x = gaussian(8, 4, generator(0)).float().requires_grad_(needs_gradient)
    torch.export.export(VNEntropy(), (x,))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(NotImplementedError, match="vne_kernels::vn_entropy"):
        torch.export.export(VNEntropy(), (x,))
