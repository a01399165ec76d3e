"""The checkpoints of a run: whole, verifiable files, and which of them to go on from.

``checkpoints/step-00001234-0123456789abcdef.ckpt``: the optimiser steps taken, and the first digits
of the SHA-256 of the file. The name comes last, so that one rename makes a checkpoint whole, and
tells its checksum without a second file. Nothing but tensors, numbers and text is ever loaded.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from vne_kernels.common.files import first_sentence, publish, temporary_name
from vne_kernels.pretrain.config import FREE_ON_RESUME, Config, OptionError

FOLDER = "checkpoints"  # in the output folder
EARLIER = "last.ckpt"  # in the output folder: the one checkpoint of earlier runs
NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.ckpt")
CHUNK = 1 << 20
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
    # Two of one step are those of a run that went on from before it: the later file counts.
    named.sort(key=lambda path: (step_of(path), path.stat().st_mtime_ns), reverse=True)
    return named + [path for path in [out / EARLIER] if path.is_file()]


def step_of(path: Path) -> int:
    """The optimiser steps that the name of a checkpoint tells."""
    found = NAME.fullmatch(path.name)
    assert found is not None, path
    return int(found[1])


def write(folder: Path, step: int, content: Mapping[str, Any]) -> Path:
    """Write a checkpoint; it has its name when it is on the disk, and not before."""
    import torch

    folder.mkdir(exist_ok=True)
    temporary = temporary_name(folder / f"step-{step:08d}.ckpt")
    try:
        with temporary.open("wb") as file:
            writer = _HashedWriter(file)
            torch.save(content, cast(IO[bytes], writer))
        path = folder / f"step-{step:08d}-{writer.digest()}.ckpt"
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


class _HashedWriter:
    """A file that knows the checksum of what it was given, whatever the disk makes of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def digest(self) -> str:
        return self.hash.hexdigest()[:16]


def set_aside(path: Path) -> Path:
    """Take a file that could not be used out of the checkpoints; returns its new path."""
    return path.rename(path.with_name(path.name + ".rejected"))


def keep_newest(out: Path, count: int) -> None:
    """Delete all but the ``count`` newest checkpoints of the run in ``out``."""
    for path in files(out)[count:]:
        path.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint.

    Raises:
        ValueError: it is not what was written, or holds other things than tensors, numbers and
            text, which are refused: unpickling them could run any code.
    """
    import torch

    try:
        if (named := NAME.fullmatch(path.name)) and _digest(path) != named[2]:
            raise ValueError(f"{path.name}: its checksum is not the one in its name")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        int(content["global_step"]), content["state_dict"]  # they are there
    except pickle.UnpicklingError as error:
        reason = first_sentence(error)
        raise ValueError(f"{path.name}: refused, not a checkpoint's content ({reason})") from error
    except ValueError:
        raise
    except Exception as error:  # whatever the first wrong byte leads torch's reader to
        raise ValueError(f"{path.name}: cannot be read ({first_sentence(error)})") from error
    return content


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def newest(config: Config) -> Resumed:
    """The newest checkpoint of the run in ``config.out`` that is whole.

    Raises:
        OptionError: there are checkpoints and none is whole, or it is of another run.
    """
    resumed = Resumed()
    found = files(Path(config.out))
    for path in found:
        try:
            content = read(path)
        except ValueError as error:
            resumed.passed_over[path] = str(error)
            continue
        _check_same_run(path, content, config)
        resumed.path, resumed.step = path, int(content["global_step"])
        resumed.shapes = {name: tuple(x.shape) for name, x in content["state_dict"].items()}
        return resumed
    if found:
        wanted = f"used with a folder in which a checkpoint can be read ({len(found)} tried)"
        raise OptionError("resume", wanted, "; ".join(resumed.passed_over.values()))
    return resumed


def _check_same_run(path: Path, content: Mapping[str, Any], config: Config) -> None:
    """That the checkpoint was made by the computation that ``config`` describes."""
    told: dict[str, Any] = content.get("config", {})
    for name, value in told.items():
        if name in FREE_ON_RESUME or name in PLACES or not hasattr(config, name):
            continue
        if value != getattr(config, name):
            option = "--" + name.replace("_", "-")
            wanted = f"used with checkpoints of a run with {option} {getattr(config, name)}"
            raise OptionError("resume", wanted, f"{path.name} of a run with {option} {value}")
