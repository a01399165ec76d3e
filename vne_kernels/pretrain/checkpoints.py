"""The checkpoints of a run: whole, verifiable files, and which of them to go on from.

``checkpoints/step-00001234.ckpt``: the number of optimizer steps taken. One rename makes a
checkpoint whole; the checksums that ``torch.save`` keeps of each part tell a damaged one. Nothing
but tensors, numbers and text is ever loaded.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vne_kernels.common.files import replacing
from vne_kernels.common.reading import FileError, printable, read_tensors
from vne_kernels.pretrain.config import FREE_ON_RESUME, Config, OptionError

FOLDER = "checkpoints"  # in the output folder
NAME = re.compile(r"step-(\d{8,18})\.ckpt")
#: Not the same computation in another place: where a run lies does not count.
PLACES = ("out", "recipe")


@dataclass
class Resumed:
    """Where a run goes on: the checkpoint, and why newer ones were passed over."""

    path: Path | None = None  # None: at the beginning
    step: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of its network's tensors
    passed_over: dict[Path, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.path is None:
            return "at step 0, since there is no checkpoint yet"
        return f"at step {self.step}, from {self.path.name}"

    def check_fits(self, state: Mapping[str, Any]) -> None:
        """That the checkpoint holds the tensors of the network with this ``state_dict``.

        Raises:
            OptionError: it does not, as where the images are not those the run began with.
        """
        if self.path is None:
            return
        wanted = {name: tuple(value.shape) for name, value in state.items()}
        for name in sorted(wanted.keys() | self.shapes):
            if wanted.get(name) != self.shapes.get(name):
                expected = f"{name} {wanted.get(name, 'is not there')}"
                got = f"{self.path.name}, where it is {self.shapes.get(name, 'not there')}"
                raise OptionError("resume", f"used with a checkpoint whose {expected}", got)


def files(out: Path) -> list[Path]:
    """The checkpoints of the run in ``out``, the newest first."""
    named = [path for path in (out / FOLDER).glob("step-*.ckpt") if NAME.fullmatch(path.name)]
    return sorted(named, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The optimiser steps that the name of a checkpoint tells."""
    found = NAME.fullmatch(path.name)
    assert found is not None, path
    return int(found[1])


def write(folder: Path, step: int, content: Mapping[str, Any]) -> Path:
    """Writes a checkpoint; it has its name when it is on the disk, and not before."""
    import torch

    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.ckpt"
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)
    return path


def set_aside(path: Path) -> Path:
    """Take a file that could not be used out of the checkpoints; returns its new path."""
    return path.rename(path.with_name(path.name + ".rejected"))


def keep_newest(out: Path, count: int) -> None:
    """Delete all but the ``count`` newest checkpoints of the run in ``out``."""
    for path in files(out)[count:]:
        path.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint.

    Raises:
        FileError: it is not what was written, or holds other things than tensors, numbers and text,
            which are refused: unpickling them could run any code.
        OSError: it cannot be opened.
    """
    content: Any = read_tensors(path)
    kinds = {"global_step": int, "epoch": int, "state_dict": dict, "config": dict}
    for name, kind in kinds.items():
        value = content.get(name) if isinstance(content, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise FileError(
                path, f"is no checkpoint of a run: {name} must be of type {kind.__name__}"
            )
    if content["global_step"] != step_of(path):
        raise FileError(path, f"is no checkpoint of its step but of {content['global_step']}")
    return dict(content)


def newest(config: Config) -> Resumed:
    """The newest checkpoint of the run in ``config.out`` that is whole.

    Raises:
        OptionError: there are checkpoints and none is whole, or it is of another run.
    """
    resumed = Resumed()
    # Absolute: Lightning takes a path that begins with "http" for an address.
    found = files(Path(config.out).absolute())
    for path in found:
        try:
            content = read(path)
        except (OSError, FileError) as error:
            resumed.passed_over[path] = printable(error)
            continue
        _check_same_run(path, content, config)
        resumed.path, resumed.step = path, int(content["global_step"])
        state = content["state_dict"].items()
        resumed.shapes = {name: tuple(x.shape) for name, x in state if hasattr(x, "shape")}
        return resumed
    if found:
        wanted = f"used with a folder in which a checkpoint can be read ({len(found)} tried)"
        raise OptionError("resume", wanted, "; ".join(resumed.passed_over.values()))
    return resumed


def _check_same_run(path: Path, content: Mapping[str, Any], config: Config) -> None:
    """That the checkpoint was made by the computation that ``config`` describes."""
    for name, own in dataclasses.asdict(config).items():
        if name in FREE_ON_RESUME or name in PLACES or name not in content["config"]:
            continue
        value = content["config"][name]
        if not isinstance(value, str | int | float | None) or value != own:
            option = "--" + name.replace("_", "-")
            wanted = f"used with checkpoints of a run with {option} {own}"
            raise OptionError("resume", wanted, f"{path.name} of a run with {option} {value}")
