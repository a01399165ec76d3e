"""With what a run was made: versions, commit, device. Kept as ``environment.json``."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import vne_kernels
from vne_kernels.common.reading import FileError, read_json

LIBRARIES = ("lightning", "lightly", "torchvision", "numpy", "scikit-learn", "pillow")


def describe(device: torch.device) -> dict[str, Any]:
    """What a reader needs to repeat a run."""
    return {
        "vne_kernels": vne_kernels.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        **{name: _version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "driver": _driver() if device.type == "cuda" else None,
        "command": shlex.join(["vne-pretrain", *sys.argv[1:]]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def resumed(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """What ``path`` says of a run's begin, with ``now`` in its list of resumptions."""
    try:
        begin = read_json(path, dict[str, Any])
    except (OSError, FileError):
        return now
    earlier = begin.get("resumed", [])
    return begin | {"resumed": [*(earlier if isinstance(earlier, list) else []), now]}


def commit() -> str | None:
    """The commit the package was built from, as setup.py wrote it down; None: no checkout.

    Ends in "+" where the working tree had changes.
    """
    recorded = files("vne_kernels").joinpath("_commit.txt")
    return recorded.read_text(encoding="utf-8").strip() or None if recorded.is_file() else None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None
