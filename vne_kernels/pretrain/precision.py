"""Whether bf16 autocast makes this machine faster: asked of the hardware, or measured."""

from __future__ import annotations

import time

import torch
from torch import nn

BATCH = 32
ROUNDS = 2
#: bf16 must win by this much: it costs digits.
GAIN = 1.15


def choose(encoder: nn.Module, image_size: int, device: str) -> str:
    """'bf16-mixed' where it is the faster, else '32-true'; takes a second or two on a CPU."""
    if device == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        bf16 = _seconds(encoder, image_size, False) > GAIN * _seconds(encoder, image_size, True)
    else:
        bf16 = False
    return "bf16-mixed" if bf16 else "32-true"


def _seconds(encoder: nn.Module, image_size: int, bf16: bool) -> float:
    """The best of a few forward and backward passes after one to warm up."""
    images = torch.zeros(BATCH, 3, image_size, image_size).contiguous(
        memory_format=torch.channels_last
    )
    parameters = list(encoder.parameters())
    best = float("inf")
    for round_ in range(ROUNDS + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = encoder(images).float().square().mean()
        torch.autograd.grad(value, parameters)
        if round_ > 0:
            best = min(best, time.perf_counter() - start)
    return best
