"""Settings shared by every test: Hypothesis without a clock, no state leaking between tests."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial

if "triton" in [argument.rpartition("=")[2] for argument in sys.argv]:  # --backend triton
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when its kernels are defined

import backends
import pytest
import torch
from cases import METHODS, SPECTRA
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not found or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"wanted I/N with 1 <= I <= N, got {text!r}")
    return int(found[1]), int(found[2])


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a positive whole number, got {text!r}")
    return int(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=("cpu", "emulated", "triton", "cuda"),
        default="cpu",
        help="the kernels below the public functions: the CPU's, the CUDA kernels on the host, the "
        "Triton kernels in its interpreter, or those of a GPU",
    )
    parser.addoption(
        "--random-shapes",
        type=_count,
        default=60,
        metavar="N",
        help="random cases of test_device.py against float64",
    )
    parser.addoption(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="the I-th of N parts of the selected tests, for N processes side by side",
    )


_backend = pytest.StashKey[object]()


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "cpu_only(reason): about the CPU kernels, deselected for another --backend",
        "device_only(reason): about a real device, deselected for --backend emulated and triton",
        "sanitize: launches every kernel once, small enough for compute-sanitizer",
        "together: the tests of this file share what they cost, and stay in one --shard",
    ):
        config.addinivalue_line("markers", marker)
    backend = config.getoption("--backend")
    if backend != "cpu":
        config.stash[_backend] = backends.install(backend)


def _part(item: pytest.Item, parts: int) -> int:
    """Which part a test is in: one for all of a spectrum and shape, as they share float64 answers.

    By a hash of text, so that every process finds the same.
    """
    callspec = getattr(item, "callspec", None)
    params = callspec.params if callspec else {}
    key = item.nodeid
    if "name" in params and "shape" in params:
        key = f"{params['name']} {params['shape']}"
    elif item.get_closest_marker("together"):
        key = item.path.name
    return zlib.crc32(key.encode()) % parts


def _takes_the_interpreter_long(item: pytest.Item) -> bool:
    """The gradient's table is whole in float32. Half precision differs in how rows are read, and
    poles in float64, of which there are 50, are seconds each: these have one spectrum where m is
    large, and so has float32 where it is largest. From A on, density matrices and losses launch
    what vn_entropy does; absent rows of all contents are read alike."""
    callspec = getattr(item, "callspec", None)
    params = callspec.params if callspec else {}
    if len(params.get("shape", ())) < 2:
        return False
    m, name, of_poles = (
        min(params["shape"][-2:]),
        params.get("name"),
        params.get("method") == "poles",
    )
    dtype = torch.float64 if "float64" in item.name else params.get("dtype", torch.float32)
    if item.path.name == "test_absent_rows.py":
        return dtype in (torch.bfloat16, torch.float16) or not math.isnan(
            params.get("content", math.nan)
        )
    if item.path.name in ("test_density.py", "test_losses.py") and name in SPECTRA:
        return name not in ("iid", "rank3", "collapse") or (
            m > 16 and dtype in (torch.bfloat16, torch.float16)
        )
    if dtype == torch.float32:
        if item.path.name == "test_gradient.py":
            return m > 200 and name in SPECTRA and name not in ("iid", "rank3", "collapse")
        return of_poles and m > 200 and name != "collapse"
    if dtype == torch.float64:
        return of_poles and (m > 200 or (m > 60 and name != "collapse"))
    return m > 16 and name != "collapse"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backend, shard = config.getoption("--backend"), config.getoption("--shard")
    on_host = ("cpu_only", "device_only")
    unwanted = {"cpu": (), "cuda": ("cpu_only",), "emulated": on_host, "triton": on_host}[backend]

    def is_wanted(item: pytest.Item) -> bool:
        mine = shard is None or _part(item, shard[1]) == shard[0] - 1
        if backend == "triton" and _takes_the_interpreter_long(item):
            return False
        return mine and not any(item.get_closest_marker(name) for name in unwanted)

    deselected = [item for item in items if not is_wanted(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if is_wanted(item)]


@pytest.fixture(scope="session", autouse=True)
def _outside_of_the_clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that tests start import the installed package, wherever pytest was started.

    Python puts its working folder first on the path of ``-c`` and ``-m``: in the clone that is the
    source folder. PYTHONSAFEPATH would keep scripts from the modules beside them, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("working_folder"))
        yield


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Whose kernels are below the public functions: see `--backend`."""
    return request.config.getoption("--backend")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where tests of a real device put their tensors."""
    return torch.device("cuda" if request.config.getoption("--backend") == "cuda" else "cpu")


@pytest.fixture(scope="session")
def gradcheck(backend: str) -> Callable[..., bool]:
    """torch's; in Triton's interpreter along a random direction, not entry by entry."""
    return partial(torch.autograd.gradcheck, fast_mode=backend == "triton")


@pytest.fixture(scope="session")
def gradgradcheck(backend: str) -> Callable[..., bool]:
    """As `gradcheck`, of the second derivative."""
    return partial(torch.autograd.gradgradcheck, fast_mode=backend == "triton")


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """Reports without pictures, which take half the time of a small run: test_report.py and
    test_pretrain.py look at them."""
    from vne_kernels.pretrain import plots  # it needs the extra, and other tests do not

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_all", lambda *_: [])
        yield


@pytest.fixture
def bf16_matmul() -> Iterator[None]:
    """float32 matrix products may be computed in bfloat16, where the machine can."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)
