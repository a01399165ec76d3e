"""Settings shared by every test: Hypothesis without a clock, no state leaking between tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import METHODS
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def bf16_matmul() -> Iterator[None]:
    """float32 matrix products may be computed in bfloat16, where the machine can."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)
