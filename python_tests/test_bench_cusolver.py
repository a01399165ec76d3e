"""bench/cusolver.py against a library with cuSOLVER's own declarations that works on the host."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

TESTS = Path(__file__).resolve().parent


def include_folders() -> list[Path]:
    """Where the wheels of torch, or a toolkit, have NVIDIA's headers."""
    spec = find_spec("nvidia")
    roots = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    folders = [folder for root in roots for folder in sorted(root.glob("*/include"))]
    folders.append(Path("/usr/local/cuda/include"))
    return [folder for folder in folders if folder.is_dir()]


HEADERS = include_folders()
needs_header = pytest.mark.skipif(
    not any((folder / "cusolverDn.h").is_file() for folder in HEADERS) or not shutil.which("g++"),
    reason="cusolverDn.h, which a CUDA build of torch brings along, or g++ is not there",
)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("cusolver") / "fake.so"
    include = [f"-I{folder}" for folder in HEADERS]
    source = TESTS / "fake_cusolver.cpp"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", *include, "-o", library, source]
    subprocess.run(list(map(str, command)), check=True, timeout=120)
    return ctypes.CDLL(str(library))


@pytest.fixture
def cusolver(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TESTS.parent / "bench"))
    import cusolver

    return cusolver


@pytest.fixture
def faked(cusolver: ModuleType, fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(cusolver, "library", lambda: fake)
    cusolver._handles.cache_clear()
    yield cusolver
    cusolver._handles.cache_clear()


@needs_header
@pytest.mark.parametrize("routine", ["syevjBatched", "XsyevBatched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 5), (3, 4, 4), (2, 3, 6, 6)])
def test_eigenvalues_and_their_gradient(
    faked: ModuleType, routine: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    a = (x @ x.mT).requires_grad_()
    weights = torch.arange(1.0, shape[-1] + 1, dtype=dtype)
    before = a.detach().clone()
    results = []
    for eigvalsh in (faked.eigvalsh(routine), torch.linalg.eigvalsh):
        with torch.no_grad():
            values = eigvalsh(a)
        (grad,) = torch.autograd.grad((eigvalsh(a) * weights).sum(), a)
        results.append((values, grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(a, before)


@needs_header
def test_an_error_of_the_library_is_an_error_here(faked: ModuleType) -> None:
    assert faked.version() == "11.7.2"
    assert faked.why_not("XsyevBatched") is None
    with pytest.raises(RuntimeError, match="cusolverDnCreate failed: cusolverStatus_t 7"):
        faked._check(7, "cusolverDnCreate")
    with pytest.raises(ValueError, match="routine must be one of syevjBatched, XsyevBatched"):
        faked.eigvalsh("geev")


def test_without_cuda_the_reason_is_given(
    cusolver: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    cusolver.library.cache_clear()
    assert cusolver.version() == "-"
    assert "a build without CUDA" in cusolver.why_not("XsyevBatched")
    cusolver.library.cache_clear()
