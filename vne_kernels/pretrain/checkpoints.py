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
from typing import TYPE_CHECKING, Any

from vne_kernels.common.files import atomic_write
from vne_kernels.common.reading import FileError, printable, read_tensors
from vne_kernels.pretrain.config import FREE_ON_RESUME, Config, OptionError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

FOLDER = "checkpoints"  # in the output folder
NAME = re.compile(r"step-(\d{8,18})\.ckpt")
#: Not the same computation in another place: where a run lies does not count.
PLACES = ("out", "recipe")


@dataclass
class Resumed:
    """Where a run goes on: the checkpoint, and why newer ones were passed over."""

    path: Path | None = None  # None: at the beginning
    step: int = 0
    form: Any = None  # of its content
    passed_over: dict[Path, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.path is None:
            return "at step 0, since there is no checkpoint yet"
        return f"at step {self.step}, from {self.path.name}"

    def check_fits(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        loop: Mapping[str, Any],
    ) -> None:
        """Checks that the checkpoint is one of such a network, optimizer and schedule.

        ``loop``: the state of Lightning's loop, before it begins.

        Raises:
            OptionError: it is not, as where the images are not those the run began with.
        """
        if self.path is None:
            return
        found = self.form.get("loops")
        loops = found if isinstance(found, dict) else {}
        parts = {
            "state_dict": (form(module.state_dict()), self.form["state_dict"]),
            "optimizer_states": ([form_of(optimizer)], self.form.get("optimizer_states")),
            "lr_schedulers": ([form(schedule.state_dict())], self.form.get("lr_schedulers")),
            "loops.fit_loop": (form(loop), loops.get("fit_loop")),
        }
        for name, (ours, theirs) in parts.items():
            if what := difference(ours, theirs, name):
                wanted = "used with a checkpoint of this network"
                raise OptionError("resume", wanted, f"{self.path.name}, whose {what}")


#: What an optimizer keeps and a run does not change: these are compared as numbers.
CONSTANTS = ("momentum", "dampening", "weight_decay", "params")


def form(content: Any) -> Any:
    """The keys, types and shapes of what a checkpoint holds, without its numbers."""
    if isinstance(content, Mapping):
        return {
            key: value if key in CONSTANTS and _is_numbers(value) else form(value)
            for key, value in content.items()
        }
    if isinstance(content, list | tuple):
        return [form(value) for value in content]
    if (shape := getattr(content, "shape", None)) is not None:
        return f"{content.dtype} {tuple(shape)}"
    # Of flags that were not given, torch's optimizers hold None.
    return "flag" if isinstance(content, bool | None) else type(content).__name__


def _is_numbers(content: Any) -> bool:
    if isinstance(content, list):
        return all(isinstance(value, int) for value in content)
    return isinstance(content, int | float)


def form_of(optimizer: Optimizer) -> Any:
    """The form of an SGD's state once it has taken a step."""
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: {"momentum_buffer": form(p)} for i, p in enumerate(parameters)}
    return {"state": state, "param_groups": form(groups)}


def difference(ours: Any, theirs: Any, place: str) -> str | None:
    """The first place at which two forms differ; None where there is none.

    Before the first step there is no momentum; and one torch knows flags that another does not.
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if not theirs and place.endswith(".state"):
            return None
        for key in sorted(ours.keys() | theirs.keys(), key=str):
            if key not in ours or key not in theirs:
                if (ours | theirs)[key] == "flag":
                    continue
                return f"{place} {'holds' if key in theirs else 'lacks'} {key}"
            if found := difference(ours[key], theirs[key], f"{place}.{key}"):
                return found
        return None
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        parts = zip(ours, theirs, strict=True)
        each = (difference(a, b, f"{place}.{i}") for i, (a, b) in enumerate(parts))
        return next(filter(None, each), None)
    return None if ours == theirs else f"{place} is {theirs}, where {ours} is needed"


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
    with atomic_write(path) as temporary, temporary.open("wb") as file:
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
        resumed.form = form(content)
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
