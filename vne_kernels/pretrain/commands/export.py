"""``vne-pretrain export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vne_kernels.pretrain.protocol import FORMATS

DESCRIPTION = """\
Write the encoder of a run for another program, and next to it a .json with its backbone, its stem,
the mean and deviation its input is normalised by, and the lines that load it.
"""

EPILOG = """\
formats:
  torchvision   a state dict (.pth) for torchvision.models.resnetNN, without the classifier
  timm          the same for timm.create_model("resnetNN", num_classes=0)
  detectron2    a pickle (.pkl) for MODEL.WEIGHTS, as MoCo's convert-pretrain-to-detectron2.py makes

An encoder for tiny images (--stem 3x3) has another first convolution and no pooling after it; the
lines that load it replace both. detectron2 has no such stem.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="output folder of vne-pretrain train")
    add("--format", choices=FORMATS, required=True)
    add("--to", metavar="FILE", help="default: encoder_FORMAT.pth (detectron2: .pkl) in RUN")
    add("--overwrite", action="store_true", help="replace FILE and its .json, whatever they are")


def start(given: dict[str, Any]) -> int:
    from vne_kernels.pretrain import export

    run = Path(given["run"])
    to = Path(given["to"]) if "to" in given else None
    written = export.write(run, given["format"], to, overwrite="overwrite" in given)
    folder = Path(given["to"]).parent if "to" in given else run
    name = written["file"]
    print(f"wrote {name} and {Path(name).with_suffix('.json')} in {folder}; to load it:")
    print("\n".join(f"  {line}" for line in written["load"]))
    return 0
