"""The CUDA kernels on the host: builds the emulation of csrc/emulation and loads it.

By hand, `python python_tests/emulation.py [--sanitize]` builds it and prints where it is, and
`python python_tests/emulation.py --sanitize pytest ...` runs a command under the sanitizers.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
KERNELS, FAULTS = "vne_emulation", "vne_emulation_faults"


_SANITIZE = "VNE_EMULATION_SANITIZE"  # set where load() has to take the sanitized module


def _run(*command: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    # cmake and ninja are there where pip installed them, whether or not that is in the PATH.
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    program = shutil.which(command[0], path=environment["PATH"]) or command[0]
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


@cache
def build(target: str = KERNELS, *, sanitize: bool = False) -> Path:
    """The module, up to date with csrc. A folder per compiler and Python is below build/, so
    that only what was changed is compiled again.
    """
    torch_folder = str(Path(torch.__file__).parent)
    key = "\n".join([_run(_compiler(), "--version"), sys.prefix, torch_folder])
    flavour = "sanitized" if sanitize else "fast"
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    folder = ROOT / "build" / "emulation" / f"{flavour}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until closed: two test runs may want to build at once
        _run(
            *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            *("-DVNE_EMULATION=ON", f"-DVNE_SANITIZE={'ON' if sanitize else 'OFF'}"),
            *(f"-DVNE_TORCH={torch_folder}", f"-DCMAKE_CXX_COMPILER={_compiler()}"),
        )
        _run("cmake", "--build", str(folder), "--target", target)
    return folder / f"{target}.abi3.so"


def is_sanitized() -> bool:
    """Whether load() gives operators under the sanitizers."""
    return _SANITIZE in os.environ


def import_module(path: Path) -> ModuleType:
    """A script, without its folder in the path where modules are looked for."""
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@cache
def load(target: str = KERNELS) -> Any:
    """The operators of the module, below torch.ops."""
    torch.ops.load_library(build(target, sanitize=is_sanitized()))
    return getattr(torch.ops, target)


def sanitizer_environment() -> Mapping[str, str]:
    """What a Python that loads a sanitized module has to be started with.

    AddressSanitizer must come first, and with it the C++ library, whose exceptions it watches.
    """
    libraries = [
        _run(_compiler(), f"-print-file-name={name}") for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        _SANITIZE: "1",
        "LD_PRELOAD": " ".join(str(Path(library).resolve()) for library in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little when it ends
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sanitize", action="store_true", help="Address- and UBSanitizer")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="to run under the sanitizers")
    options = parser.parse_args()
    for target in (KERNELS, FAULTS):
        print(build(target, sanitize=options.sanitize), flush=True)
    if options.command:
        if not options.sanitize:
            parser.error("a command is for --sanitize")
        os.execvpe(options.command[0], options.command, sanitizer_environment())
