"""Which backends there are, and a device that has no kernels of its own."""

from __future__ import annotations

import re

import pytest
import torch
from programs import run_python

import vne_kernels
from vne_kernels import available_backends, doe_loss, spectrum, vn_entropy
from vne_kernels._core import load as _load


def test_backends_are_usable_or_say_why_not() -> None:
    backends = available_backends()
    assert {"cpu", "cuda"} <= set(backends)
    assert backends["cpu"] is None
    for reason in backends.values():
        assert reason is None or (isinstance(reason, str) and len(reason.split()) >= 3)


def test_cuda_is_usable_where_kernels_meet_a_gpu() -> None:
    usable = _load.cuda_reason is None and torch.cuda.is_available()
    assert (available_backends()["cuda"] is None) == usable


def test_kernels_without_a_gpu_give_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "cuda_reason", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no usable GPU" in (available_backends()["cuda"] or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert available_backends()["cuda"] is None


def test_the_answer_is_the_callers_own() -> None:
    available_backends()["cpu"] = "changed"
    assert available_backends()["cpu"] is None


def test_public_names() -> None:
    names = {"vn_entropy", "spectrum", "doe_loss", "VNEntropy", "DoELoss", "available_backends"}
    assert names <= set(vne_kernels.__all__)
    assert all(hasattr(vne_kernels, name) for name in vne_kernels.__all__)


@pytest.mark.parametrize(
    ("function", "shape"),
    [(vn_entropy, (3,)), (spectrum, (3, 5)), (lambda z: doe_loss(z, z), (3,))],
)
def test_meta_tensors_have_shapes_and_dtypes(function: object, shape: tuple[int, ...]) -> None:
    for dtype, result in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        out = function(torch.empty(3, 5, 7, dtype=dtype, device="meta"))
        assert out.device.type == "meta"
        assert out.shape == shape
        assert out.dtype == result


@pytest.mark.parametrize("device_key", ["CPU", "CUDA", "MPS", "XPU", "Meta"])
@pytest.mark.parametrize("name", ["vn_entropy", "vn_entropy_grad", "spectrum", "doe_loss"])
def test_every_device_has_a_kernel_its_own_or_the_hosts(name: str, device_key: str) -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"vne_kernels::{name}", device_key)


@pytest.mark.parametrize("name", ["vn_entropy_grad", "spectrum_eigh", "doe_loss_backward"])
def test_cuda_kernels_are_native_exactly_where_their_module_is_loaded(name: str) -> None:
    kernels = torch._C._dispatch_dump(f"vne_kernels::{name}")
    (source,) = re.findall(r"^CUDA: registered at (\S+):\d+", kernels, re.M)
    assert ("csrc/cuda/" in source) == (_load.cuda_reason is None)


def test_importing_is_quiet_and_does_not_initialise_cuda() -> None:
    script = """
        import torch, vne_kernels
        assert not torch.cuda.is_initialized()
        assert not torch.distributed.is_initialized()
        vne_kernels.available_backends()
    """
    done = run_python(script, options=["-W", "error"])
    assert done.stdout == done.stderr == ""
