"""Settings shared by every test: Hypothesis without a clock, no state leaking between tests."""

from __future__ import annotations

from collections.abc import Iterator

import backends
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=("cpu", "emulated", "cuda"),
        default="cpu",
        help="the kernels below the public functions: the CPU's, or the CUDA kernels on the host "
        "or on a GPU",
    )


_backend = pytest.StashKey[torch.library.Library]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "cpu_only(reason): about the CPU kernels, deselected for another --backend"
    )
    backend = config.getoption("--backend")
    if backend != "cpu":
        config.stash[_backend] = backends.install(backend)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--backend") != "cpu":
        cpu_only = [item for item in items if item.get_closest_marker("cpu_only")]
        config.hook.pytest_deselected(items=cpu_only)
        items[:] = [item for item in items if item not in cpu_only]


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
