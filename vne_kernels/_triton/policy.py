"""Which method serves a matrix here, and what Triton's kernels leave to torch."""

from __future__ import annotations

import torch

LARGEST_POLES = 1024
"""The largest m that poles serve; beyond it every method is "eigh", torch.linalg.eigh."""

LIMITS = (
    f"m > {LARGEST_POLES} and float64 under method='auto', spectra and second derivatives go by "
    "torch.linalg.eigh, which waits for the GPU"
)
"""What the kernels leave to torch, as `available_backends` says it."""


def method_for(method: str, m: int, dtype: torch.dtype) -> str:
    """ "eigh" or "poles", for matrices (..., m, m) and what was asked for.

    "auto" takes poles for float32: an eigensolver takes milliseconds on a GPU. Of float64 there are
    50 poles, at 1/64 of the rate on RTX cards.
    """
    if m > LARGEST_POLES or (method == "auto" and dtype == torch.float64):
        return "eigh"
    return "poles" if method == "auto" else method
