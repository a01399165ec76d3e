"""Other kernels in the place of the CPU's, so that one suite serves them all (`--backend`).

Tests call the public functions on CPU tensors. Here the operators below them are given another CPU
implementation: the CUDA kernels, emulated or on a GPU, or the Triton kernels in Triton's
interpreter. On a GPU the variable VNE_KERNELS_BACKEND says whether CUDA or Triton serves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import emulation
import pytest
import torch
from torch import Tensor

import vne_kernels
from vne_kernels.backends import names_with_kernels


def _map_tensors(function: Callable[[Any], Any], values: Any) -> Any:
    if isinstance(values, tuple):
        return tuple(_map_tensors(function, value) for value in values)
    return function(values) if isinstance(values, Tensor) else values


def emulated(name: str) -> Callable[..., Any]:
    """An operator on CPU tensors, by the emulated CUDA kernels."""
    return getattr(emulation.load(), name)


def copy_as_it_lies(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy with the same strides at the same offset, where `Tensor.to` would tidy up both."""
    memory = tensor.untyped_storage().to(device=device)
    empty = torch.empty(0, dtype=tensor.dtype, device=device)
    return empty.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


def on_cuda(name: str) -> Callable[..., Any]:
    """An operator on CPU tensors, by way of the GPU."""
    operator = getattr(torch.ops.vne_kernels, name)
    to_gpu = partial(copy_as_it_lies, device=torch.device("cuda"))

    def call(*args: Any) -> Any:
        return _map_tensors(Tensor.cpu, operator(*_map_tensors(to_gpu, args)))

    return call


def install(backend: str) -> object:
    """Replaces the CPU kernels of the operators for as long as the result lives."""
    if backend == "triton":
        if not vne_kernels.backends.is_interpreted():
            raise pytest.UsageError("--backend triton: Triton was imported before conftest.py")
        return vne_kernels.use_backend("triton")
    if backend == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--backend cuda: torch.cuda.is_available() finds no usable GPU")
    implement = {"emulated": emulated, "cuda": on_cuda}[backend]
    library = torch.library.Library("vne_kernels", "IMPL")
    for name in names_with_kernels():
        library.impl(name, implement(name), "CPU")
    return library
