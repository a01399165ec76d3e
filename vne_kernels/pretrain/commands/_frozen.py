"""What the commands that judge a frozen encoder have in common."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, TypeVar

from vne_kernels.pretrain.protocol import ENCODERS

Protocol = TypeVar("Protocol")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add RUN and the options of a ``Setting``."""
    add = parser.add_argument
    add("run", metavar="RUN", help="output folder of vne-pretrain train")
    add(
        "--encoder",
        choices=ENCODERS,
        help="trained (default), or as it was before; then the files' names end in _untrained",
    )
    add("--data", metavar="WHAT", help="as of train (default: the run's; it may have moved)")
    add("--download-dir", metavar="DIR", help="for cifar10 and cifar100 (default: the run's)")
    add("--workers", type=int, metavar="N", help="processes that load images (default: the run's)")
    add("--accelerator", metavar="NAME", help="Lightning's: auto (default), cpu, gpu, mps, ...")


def pick(kind: type[Protocol], given: dict[str, Any]) -> Protocol:
    """The dataclass ``kind`` with those of its fields that were given."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: given[name] for name in names if name in given})
