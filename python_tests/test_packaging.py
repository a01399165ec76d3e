"""Audit of what is built and shipped: ABI, sources, archives, the README's code, setup.py."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from programs import run_python

import vne_kernels
from vne_kernels._core import load as _load

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(vne_kernels.__file__).parent
MODULES = sorted(PACKAGE.glob("_C*.so"))
README_SNIPPETS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S
)


# ---- the built modules -------------------------------------------------------------------------


def test_module_names_say_abi3() -> None:
    names = [module.name for module in MODULES]
    assert "_C.abi3.so" in names
    assert all(re.fullmatch(r"_C(_cuda\d+)?\.abi3\.so", name) for name in names)


def test_wheel_tag_is_cp310_abi3() -> None:
    wheel = importlib.metadata.distribution("vne_kernels").read_text("WHEEL")
    assert wheel is not None
    assert re.search(r"^Tag: (\d\.editable-)?cp310-abi3-", wheel, re.M)


def output_of(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_only_stable_symbols_are_used(module: Path) -> None:
    """What is undefined comes from a versioned system library or from libtorch's C shim."""
    listing = output_of("nm", "-D", "--undefined-only", module)
    kinds_and_names = [line.split() for line in listing.splitlines()]
    unversioned = [name for kind, name in kinds_and_names if kind == "U" and "@" not in name]
    assert unversioned, "libtorch's symbols carry no version, so some must be here"
    assert [n for n in unversioned if not re.match(r"(aoti_torch_|torch_)\w+$", n)] == []
    assert [n for _, n in kinds_and_names if re.search(r"^_?Py|_ZN?K?(2at|3c10|5torch)", n)] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_no_path_of_the_build_machine(module: Path) -> None:
    dynamic = output_of("readelf", "-d", module)
    assert "libtorch_cpu.so" in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


# ---- loading -----------------------------------------------------------------------------------


def test_module_that_is_not_there_or_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="pip install"):
        _load._load_cpu(tmp_path)
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"torch >= 2\.10"):
        _load._load_cpu(tmp_path)


@pytest.mark.parametrize(
    ("built", "torch_cuda", "reason"),
    [
        ("_C_cuda13.abi3.so", None, torch.__version__),
        (None, "13.0", "VNE_KERNELS_CUDA"),
        ("_C_cuda12.abi3.so", "13.0", "_C_cuda12.abi3.so"),
        ("_C_cuda13.abi3.so", "13.0", "_C_cuda13.abi3.so"),
    ],
)
def test_cuda_module_not_usable_says_why(
    tmp_path: Path, built: str | None, torch_cuda: str | None, reason: str
) -> None:
    if built is not None:
        (tmp_path / built).write_bytes(b"not a library")
    assert reason in (_load._load_cuda(tmp_path, torch_cuda) or "")


def test_cuda_module_is_loaded_exactly_where_it_fits() -> None:
    major = (torch.version.cuda or "none").split(".")[0]
    if (PACKAGE / f"_C_cuda{major}.abi3.so").exists():
        info = torch.ops.vne_kernels.cuda_build_info()
        assert re.fullmatch(rf"CUDA {major}\.[\d.]+, sm: [\w -]+", info)
        assert _load.cuda_reason is None
    else:
        assert not hasattr(torch.ops.vne_kernels, "cuda_build_info")
        assert _load.cuda_reason is not None


# ---- what is shipped ---------------------------------------------------------------------------


def test_version_is_one() -> None:
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert declared is not None
    versions = {declared[1], vne_kernels.__version__}
    assert versions == {importlib.metadata.version("vne_kernels")}


def test_licence_and_type_marker_are_installed() -> None:
    distribution = importlib.metadata.distribution("vne_kernels")
    assert distribution.metadata["License-Expression"] == "MIT"
    licence = distribution.read_text("licenses/LICENSE")
    assert licence == (ROOT / "LICENSE").read_text()
    assert (PACKAGE / "py.typed").exists()


def test_readme_snippets_run(tmp_path: Path) -> None:
    """One after the other, as a reader types them."""
    assert len(README_SNIPPETS) > 3
    run_python("\n".join(README_SNIPPETS), cwd=tmp_path)


# ---- setup.py ----------------------------------------------------------------------------------


def run_setup(source: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """setup.py of `source` with only the `variables` that steer it."""
    steering = r"VNE_KERNELS_.*|TORCH_CUDA_ARCH_LIST|MAX_JOBS|CXX|CUDA.*|PYTHONPATH"
    kept = {key: value for key, value in os.environ.items() if not re.fullmatch(steering, key)}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=source,
        env={**kept, **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the source tree, in a path with spaces, without what was built in it."""
    copy = tmp_path / "a copy"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    for folder in ("csrc", "vne_kernels", "python_tests", "bench"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=unwanted)
    for file in ROOT.iterdir():
        if file.is_file() and file.suffix != ".so":
            shutil.copy2(file, copy)
    return copy


def test_sdist_is_complete(source: Path) -> None:
    result = run_setup(source, "sdist", PATH="")
    assert result.returncode == 0, result.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {
        path.relative_to(source).as_posix()
        for folder in ("csrc", "vne_kernels", "python_tests", "bench")
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    build_files = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"}
    assert wanted | build_files <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


def fake_torch(folder: Path, version: str, cuda: str | None) -> str:
    """A PYTHONPATH on which torch is this version (setup.py reads it without importing torch)."""
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").touch()
    (folder / "torch/version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
    return str(folder)


def fake_tools(folder: Path, scripts: Mapping[str, str]) -> str:
    """A PATH with these shell scripts first."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("vne_kernels: ")
    return line


def test_setup_without_torch_or_with_an_old_one(source: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    assert "torch" in last_line(run_setup(source, "build_ext", PYTHONPATH=str(tmp_path)))
    (tmp_path / "sitecustomize.py").unlink()
    path = fake_torch(tmp_path, "2.9.1+cu128", "12.8")
    assert "2.9.1+cu128" in last_line(run_setup(source, "build_ext", PYTHONPATH=path))


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"PATH": ""}, "compiler"),
        ({"CXX": "no-such-compiler -O2"}, "no-such-compiler"),
        ({"VNE_KERNELS_CUDA": "yes"}, "VNE_KERNELS_CUDA"),
    ],
)
def test_setup_names_what_is_wrong(source: Path, variables: dict[str, str], named: str) -> None:
    result = run_setup(source, "build_ext", **{"VNE_KERNELS_CUDA": "0", **variables})
    assert named in last_line(result)


@pytest.mark.parametrize(("cuda", "named"), [(None, "VNE_KERNELS_CUDA=1"), ("99.1", "99")])
def test_setup_with_cuda_asked_for_but_missing(
    source: Path, tmp_path: Path, cuda: str | None, named: str
) -> None:
    result = run_setup(
        source,
        "build_ext",
        VNE_KERNELS_CUDA="1",
        PYTHONPATH=fake_torch(tmp_path, "2.14.1", cuda),
        PATH=fake_tools(tmp_path, {"nvcc": "echo Cuda compilation tools, release 13.0, V13.0.88"}),
    )
    assert named in last_line(result)


@pytest.mark.parametrize(
    ("arch_list", "architectures"),
    [
        ("", "75-real;80-real;86-real;89-real;90-real;90-virtual"),
        ("8.6;9.0a+PTX", "86-real;90a-real;90a-virtual"),
        ("8.0 12.0", "80-real;120-real"),
        ("Ampere", None),
    ],
)
def test_cuda_architectures(
    source: Path, tmp_path: Path, arch_list: str, architectures: str | None
) -> None:
    """The nvcc here knows up to 9.0; cmake says what it was asked for and fails."""
    nvcc = "echo release 99.0; for a in 70 75 80 86 87 89 90; do echo compute_$a; done"
    result = run_setup(
        source,
        "build_ext",
        TORCH_CUDA_ARCH_LIST=arch_list,
        PYTHONPATH=fake_torch(tmp_path, "2.14.1", "99.1"),
        PATH=fake_tools(tmp_path, {"nvcc": nvcc, "cmake": "exit 1", "ninja": "exit 1"}),
        CUDACXX=str(tmp_path / "nvcc"),
    )
    line = last_line(result)
    if architectures is None:
        assert "TORCH_CUDA_ARCH_LIST" in line
        assert "Ampere" in line
    else:
        assert f"-DCMAKE_CUDA_ARCHITECTURES={architectures}'" in line
