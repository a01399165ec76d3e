"""Settings shared by every test: tiers, processes, missing packages, backends."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

if "triton" in [argument.rpartition("=")[2] for argument in sys.argv]:  # --backend triton
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when its kernels are defined
if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side share the cores
    cores, processes = os.cpu_count() or 1, int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))

import backends
import emulation
import pytest
import torch
from cases import METHODS, SPECTRA
from hypothesis import HealthCheck, settings

for profile, draws in (("few", 10), ("many", 40)):
    settings.register_profile(
        profile,
        deadline=None,
        max_examples=draws,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )

TESTS = Path(__file__).resolve().parent
NO_SKIP = "VNE_KERNELS_NO_SKIP"  # set where every package has to be there, as in CI


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


def _is_first_tier(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "not slow"


_backend = pytest.StashKey[object]()


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "cpu_only(reason): about the CPU kernels, deselected for another --backend",
        "device_only(reason): about a real device, deselected for --backend emulated and triton",
        "every_backend: of the table that CI runs by every --backend",
        "sanitize: launches every kernel once, small enough for compute-sanitizer",
        "slow: the second tier, which `pytest` leaves out and `pytest -m slow` runs",
    ):
        config.addinivalue_line("markers", marker)
    settings.load_profile("few" if _is_first_tier(config) else "many")
    backend = config.getoption("--backend")
    if backend != "cpu":
        config.stash[_backend] = backends.install(backend)


# ---------------------------------------------------------------------------------------------
# Packages that are missing
# ---------------------------------------------------------------------------------------------


def _missing_package(error: BaseException | None) -> str | None:
    """The installed package that an import has failed for, if that is the reason."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            name = error.name.partition(".")[0]
            return None if name == "vne_kernels" or (TESTS / f"{name}.py").exists() else name
        error = error.__cause__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skips a file that imports a package which is not installed, and names the package."""
    report = yield
    error = report.call.excinfo.value if report.call and report.call.excinfo else None
    package = _missing_package(error)
    if report.failed and package is not None and NO_SKIP not in os.environ:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: needs {package}")
    return report


def _package(name: str) -> ModuleType:
    if NO_SKIP in os.environ:
        return importlib.import_module(name)
    return pytest.importorskip(name)


@pytest.fixture(scope="session")
def needs() -> Callable[[str], ModuleType]:
    """Imports a package by name, or skips the test."""
    return _package


@pytest.fixture(scope="session")
def qutip() -> ModuleType:
    return _package("qutip")


@pytest.fixture(scope="session")
def pennylane() -> ModuleType:
    return _package("pennylane")


@pytest.fixture(scope="session")
def vendi() -> ModuleType:
    """The package vendi-score."""
    return _package("vendi_score.vendi")


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    return _package("timm")


THIRD_PARTY = {"qutip", "pennylane", "vendi", "timm"}
"""Fixtures whose tests compare with other packages: they are slow to install and to import."""


# ---------------------------------------------------------------------------------------------
# Which tests run, and where
# ---------------------------------------------------------------------------------------------


def _takes_the_interpreter_long(item: pytest.Item) -> bool:
    """Which tests of the table Triton's interpreter leaves out.

    The gradient's table is whole in float32. Half precision differs in how rows are read, and poles
    in float64, of which there are 50, are seconds each: these have one spectrum where m is large,
    and so has float32 where it is largest. From A on, density matrices and losses launch what
    vn_entropy does. Absent rows of all contents are read alike.
    """
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


STRIDES = {"emulated": 5, "triton": 13, "sanitized": 13}
"""Kernels that run a hundred times slower have one case in so many of every test in the first tier.
The strides are primes, so that these cases differ in all their parameters."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    backend = config.getoption("--backend")
    on_host = ("cpu_only", "device_only")
    unwanted = {"cpu": (), "cuda": ("cpu_only",), "emulated": on_host, "triton": on_host}[backend]
    hidden, stride = (), 1
    if _is_first_tier(config):
        kernels = "sanitized" if emulation.is_sanitized() else backend
        hidden, stride = ("slow",), STRIDES.get(kernels, 1)
    places: Counter[tuple[Path, str]] = Counter()

    def is_wanted(item: pytest.Item) -> bool:
        if backend == "triton" and _takes_the_interpreter_long(item):
            return False
        if any(item.get_closest_marker(name) for name in (*unwanted, *hidden)):
            return False
        place = places[item.path, item.originalname]
        places[item.path, item.originalname] += 1
        return place % stride == 0

    wanted = [item for item in items if is_wanted(item)]
    if deselected := list(set(items).difference(wanted)):
        config.hook.pytest_deselected(items=deselected)
        items[:] = wanted
    for item in items:
        has_many_draws = hasattr(item.obj, "hypothesis") and not _is_first_tier(config)
        if has_many_draws or THIRD_PARTY & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "name" in params and "shape" in params:  # these share the float64 answers
            item.add_marker(pytest.mark.xdist_group(f"{params['name']} {params['shape']}"))


@pytest.fixture(scope="session", autouse=True)
def _outside_of_the_clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that tests start import the installed package, wherever pytest was started.

    Python puts its working folder first on the path of ``-c`` and ``-m``: in the clone that is the
    source folder. PYTHONSAFEPATH would hide the modules in a script's own folder from it, too.
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
