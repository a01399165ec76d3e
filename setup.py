"""Hands the native build over to CMake (CMakeLists.txt describes it).

Environment variables:

VNE_KERNELS_CUDA      auto (default): build the CUDA module `_C_cuda<major>` if the torch that is
                      built against is a CUDA build and an nvcc of its CUDA major is found.
                      1: the same, but an error where it cannot be built. 0: never.
                      nvcc is looked for in CUDACXX, CUDA_HOME, PATH and /usr/local/cuda.
                      No GPU is needed.
TORCH_CUDA_ARCH_LIST  GPU architectures as torch's own extensions take them, e.g. "8.6;9.0+PTX".
                      Default: 7.5, 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0 as far as the nvcc knows
                      them, and PTX of the last.
MAX_JOBS              number of parallel compiler processes (default: ninja's choice).
CXX, CXXFLAGS, ...    as CMake takes them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


def fail(sentence: str) -> NoReturn:
    sys.stdout.flush()
    sys.exit(f"vne_kernels: {sentence}")


def find_torch() -> tuple[Path, str | None]:
    """Folder of the installed torch and its CUDA version, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail(
            "torch is not installed in the environment that builds; run `pip install torch` "
            "first, or install without --no-build-isolation."
        )
    folder = Path(spec.origin).parent
    version = runpy.run_path(str(folder / "version.py"))
    if tuple(int(x) for x in re.findall(r"\d+", version["__version__"])[:2]) < (2, 10):
        fail(
            f"torch {version['__version__']} is too old to build against; "
            "run `pip install --upgrade 'torch>=2.10'`."
        )
    return folder, version["cuda"]


def find_compiler() -> None:
    """CMake finds the compiler itself, but says that there is none in twenty lines."""
    if named := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(named[0]) is None:
            fail(f"the C++ compiler named in CXX, {named[0]}, was not found; correct or unset CXX.")
    elif not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        fail(
            "no C++ compiler was found (looked for c++, g++, clang++ in PATH); install one, "
            "e.g. `apt install g++`, or name it in CXX."
        )


def find_tool(name: str) -> str:
    """cmake or ninja: pip's package of the running Python before the system's."""
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    tool = shutil.which(name, path=path)
    if tool is None:
        fail(f"{name} is missing; `pip install {name}`, or install without --no-build-isolation.")
    return tool


def nvcc_candidates() -> Iterator[str]:
    yield os.environ.get("CUDACXX", "")
    if home := os.environ.get("CUDA_HOME"):
        yield f"{home}/bin/nvcc"
    yield shutil.which("nvcc") or ""
    yield "/usr/local/cuda/bin/nvcc"


def find_nvcc(cuda: str | None) -> tuple[str | None, str]:
    """The first nvcc of torch's CUDA major, or None and what is missing."""
    if cuda is None:
        return None, "the torch that is built against is not a CUDA build"
    major, found = cuda.split(".")[0], []
    for nvcc in dict.fromkeys(filter(shutil.which, nvcc_candidates())):
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.\d+", output)
        if release and release[1] == major:
            return nvcc, ""
        found.append(f"{nvcc} is {release[0] if release else 'of unknown release'}")
    return None, (
        f"no nvcc of torch's CUDA major, {major}, was found in CUDACXX, CUDA_HOME, PATH "
        f"and /usr/local/cuda ({', '.join(found) or 'none of any release'})"
    )


def what_to_build() -> tuple[Path, str | None, str, str]:
    """torch's folder, nvcc where the CUDA module is built, its CUDA major, a note for the log."""
    torch, cuda = find_torch()
    choice = os.environ.get("VNE_KERNELS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        fail(f"VNE_KERNELS_CUDA must be auto, 0 or 1, got {choice!r}.")
    if choice == "0":
        return torch, None, "", ""
    nvcc, missing = find_nvcc(cuda)
    if nvcc is None and choice == "1":
        fail(f"VNE_KERNELS_CUDA=1, but {missing}.")
    note = "" if nvcc else f"building without the CUDA module: {missing}."
    return torch, nvcc, (cuda or "").split(".")[0], note


def cuda_architectures(nvcc: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or the default, as CMAKE_CUDA_ARCHITECTURES."""
    wanted = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,"))
    if wanted == [""]:
        output = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        known = set(re.findall(r"compute_(\w+)", output))
        wanted = [a for a in DEFAULT_ARCHITECTURES if a.replace(".", "") in known]
        wanted[-1] += "+PTX"
    result = []
    for item in wanted:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if match is None:
            fail(f"TORCH_CUDA_ARCH_LIST must be like '8.6;9.0+PTX', got {item!r}.")
        name = match[1] + match[2]
        result += [f"{name}-real"] + ([f"{name}-virtual"] if match[3] else [])
    return ";".join(result)


class FreshBuild(build):
    """Without what an earlier build left in the build folder: setuptools would pack it."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildPython(build_py):
    """Leaves the commit that was built, for the records of runs, in ``vne_kernels/_commit.txt``."""

    def run(self) -> None:
        super().run()
        commit = git("rev-parse", "HEAD") if (ROOT / ".git").exists() else ""
        if commit and not self.editable_mode:
            changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
            target = Path(self.build_lib) / "vne_kernels" / "_commit.txt"
            target.write_text(f"{commit}{changed}\n", encoding="utf-8")


def git(*arguments: str) -> str:
    """What git says of this checkout; empty without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class CMakeBuild(build_ext):
    """Configures and builds once, then puts each module where setuptools expects it."""

    def finalize_options(self) -> None:
        modules, self.problem = ["_C"], None
        try:
            self.torch, self.nvcc, cuda_major, self.note = what_to_build()
            modules += [f"_C_cuda{cuda_major}"] if self.nvcc else []
        except SystemExit as problem:  # raised in run: sdist comes here too and needs no torch
            self.problem = problem
        self.distribution.ext_modules = [
            Extension(f"vne_kernels.{module}", [], py_limited_api=True) for module in modules
        ]
        super().finalize_options()

    def run(self) -> None:
        if self.problem is not None:
            raise self.problem
        if self.note:
            print(f"vne_kernels: {self.note}")
        if self.inplace:  # an earlier build may have left a CUDA module that this one does not make
            for stale in (ROOT / "vne_kernels").glob("_C*.abi3.so"):
                stale.unlink()
        super().run()

    def build_extensions(self) -> None:
        find_compiler()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        build_folder = Path(self.build_temp).resolve()
        # Configured anew every time: a cache may name tools of a build environment that is gone.
        (build_folder / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DVNE_TORCH={self.torch}",
            f"-DVNE_CUDA={'ON' if self.nvcc else 'OFF'}",
        ]
        if self.nvcc is not None:
            configure += [
                f"-DCMAKE_CUDA_COMPILER={self.nvcc}",
                f"-DCMAKE_CUDA_ARCHITECTURES={cuda_architectures(self.nvcc)}",
            ]
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        for command in (
            [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build_folder), *configure],
            [cmake, "--build", str(build_folder), *jobs],
        ):
            if subprocess.run(command).returncode != 0:
                fail(
                    f"`{shlex.join(command)}` failed; its output above says why"
                    + (" (VNE_KERNELS_CUDA=0 builds without CUDA)." if self.nvcc else ".")
                )
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(build_folder / target.name, target)


if int(setuptools.__version__.split(".")[0]) < 77:
    fail(
        f"setuptools {setuptools.__version__} is too old; run `pip install --upgrade setuptools`, "
        "or install without --no-build-isolation."
    )

setup(
    ext_modules=[Extension("vne_kernels._C", [], py_limited_api=True)],
    cmdclass={"build": FreshBuild, "build_py": BuildPython, "build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
