"""``vne-pretrain knn``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vne_kernels.pretrain.commands import _frozen
from vne_kernels.pretrain.protocol import KNNProtocol, Setting

DESCRIPTION = """\
Classify the test images by their nearest training images in the feature space of a run's frozen
encoder; each of these votes for its class with the weight exp(cosine similarity / temperature)
(Wu et al. 2018). Nothing is trained.
"""

EPILOG = """\
written to RUN:
  knn.json     accuracy (0 to 1), settings, data, versions
"""


def configure(parser: argparse.ArgumentParser) -> None:
    _frozen.configure(parser)
    parser.add_argument(
        "--neighbours",
        type=int,
        metavar="K",
        help=f"all training images where there are fewer (default: {KNNProtocol.neighbours})",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help=f"default: {KNNProtocol.temperature:g}"
    )


def start(given: dict[str, Any]) -> int:
    run = Path(given["run"])
    protocol, setting = _frozen.pick(KNNProtocol, given), _frozen.pick(Setting, given)

    from vne_kernels.pretrain import knn

    result = knn.evaluate(run, protocol, setting)
    print(
        f"{result['neighbours']} nearest neighbours, {setting.encoder} encoder: "
        f"{100 * result['accuracy']:.2f} %"
    )
    print(f"wrote {setting.file_stem('knn')}.json in {run}")
    return 0
