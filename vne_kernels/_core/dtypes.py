"""The dtypes of results and of what is computed in double precision."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results: float64 for float64 and complex128, otherwise float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def to_float64(x: Tensor) -> Tensor:
    """x in float64, or complex128, on the host where its device has none."""
    on_device = x.cpu() if x.device.type == "mps" else x
    return on_device.to(torch.complex128 if x.is_complex() else torch.float64)
