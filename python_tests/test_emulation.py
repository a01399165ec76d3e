"""The CUDA kernels on the host, and what their emulation finds.

A kernel that lacks a barrier gives another result where the threads run in another order, so every
stage has to give the same bits in three orders.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import emulation
import numpy as np
import pytest

ORDERS = ("forward", "backward", "shuffled")
THREADS = 128  # of a block of the kernels in csrc/emulation/tests/faults.cu
INPUT = np.arange(2 * THREADS, dtype=np.float32)

# ---------------------------------------------------------------------------------------------
# The emulator itself
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    return emulation.load(emulation.FAULTS)


def in_every_order(module: ModuleType, name: str, *arguments: object) -> list[np.ndarray]:
    results = []
    for order in ORDERS:
        module.set_order(order)
        results.append(getattr(module, name)(*arguments))
    module.set_order("forward")
    return results


def agree(results: list[np.ndarray]) -> bool:
    return all(result.tobytes() == results[0].tobytes() for result in results)


def test_threads_that_meet_agree_in_every_order(faults: ModuleType) -> None:
    rotated = np.roll(INPUT.reshape(-1, THREADS), -1, axis=1).ravel()
    swapped = INPUT.reshape(-1, 2, 16)[:, ::-1].ravel()
    for name, expected in (("rotate", rotated), ("rotate_in_warp", swapped)):
        for result in in_every_order(faults, name, INPUT):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    "name", ["rotate_without_barrier", "rotate_in_warp_without_barrier", "add_previous_block"]
)
def test_a_missing_barrier_shows_in_another_order(faults: ModuleType, name: str) -> None:
    assert not agree(in_every_order(faults, name, INPUT))


def test_shared_memory_begins_as_nan_in_every_block(faults: ModuleType) -> None:
    assert np.isnan(faults.leftovers(INPUT)).all()


def test_exchanges(faults: ModuleType) -> None:
    x = INPUT[:THREADS]
    lanes = x.reshape(-1, 32)
    down = np.concatenate([lanes[:, 4:], lanes[:, -4:]], axis=1)
    expected = [
        np.repeat(lanes[:, 3], 32),
        x.reshape(-1, 8)[:, np.arange(8) ^ 5].ravel(),
        down.ravel(),
        np.repeat(lanes.sum(axis=1), 32),
        np.repeat(lanes.max(axis=1), 32),
        np.repeat(lanes.max(axis=1), 32),
        np.full(THREADS, x.sum()),
        np.ones(THREADS),
    ]
    for result in in_every_order(faults, "exchanges", x):
        np.testing.assert_array_equal(result.reshape(8, THREADS), expected)


def test_every_half(faults: ModuleType) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(faults.halves(halves), halves.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_return", r"1 threads have returned, 127 threads wait at __syncthreads"),
        ("divergent_branch", r"32 threads wait at __syncthreads .* 96 threads wait at __syncth"),
        ("divergent_shuffle", r"4 threads have returned, 124 threads wait at __shfl_sync"),
        ("partial_mask", r"__shfl_sync without all lanes in its mask"),
        ("too_much_shared", r"more than 48 KB of shared memory"),
    ],
)
def test_what_a_gpu_would_not_report(faults: ModuleType, name: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"kernel faulty, block \(0, 0, 0\): .*{message}"):
        getattr(faults, name)(INPUT)
    np.testing.assert_array_equal(faults.rotate(INPUT)[:3], [1, 2, 3])  # and goes on


def test_launches_are_recorded(faults: ModuleType) -> None:
    faults.clear_launches()
    faults.exchanges(INPUT[:THREADS])
    faults.halves(INPUT.astype(np.float16))
    faults.halves(np.empty(0, dtype=np.float16))  # an empty grid launches nothing
    assert faults.launches() == [
        ("exchanges", (1, 1, 1), (THREADS, 1, 1), 0),
        ("halves", (2, 1, 1), (THREADS, 1, 1), 0),
    ]


SANITIZED = f"""
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, {str(Path(__file__).parent)!r})
import emulation
faults = emulation.import_module(Path(sys.argv[1]))
x = np.arange({THREADS}, dtype=np.float32)
print(eval(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def sanitized_faults() -> Path:
    return emulation.build(emulation.FAULTS, sanitize=True)


def run_sanitized(module: Path, expression: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SANITIZED, str(module), expression],
        env=emulation.sanitizer_environment(),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("expression", ["faults.exchanges(x)", "faults.beyond_shared(x, 0.0)"])
def test_sanitizers_accept_what_is_right(sanitized_faults: Path, expression: str) -> None:
    done = run_sanitized(sanitized_faults, expression)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("faults.beyond_shared(x, 1.0)", "heap-buffer-overflow"),
        ("faults.beyond_global(x, 1.0)", "heap-buffer-overflow"),
        ("faults.misaligned(x)", "misaligned address"),
    ],
)
def test_sanitizers_find(sanitized_faults: Path, expression: str, error: str) -> None:
    done = run_sanitized(sanitized_faults, expression)
    assert done.returncode != 0
    assert error in done.stderr
    assert "faults.cu" in done.stderr
