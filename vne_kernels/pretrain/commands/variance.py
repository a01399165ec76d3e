"""``vne-pretrain variance``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vne_kernels.pretrain.commands import _sweep

DESCRIPTION = """\
How steady the estimate of information is that each of three losses maximises, step by step (the
paper's Figures 2 and 4): InfoNCE's mutual information for simclr, its self-information for
shannon-doe, the von Neumann entropy for vn-doe. Three runs of one protocol.

  vne-pretrain variance -- --recipe cifar10-table1a --epochs 25
"""

EPILOG = f"""\
{_sweep.EPILOG}
written to the output folder again whenever a run is finished:
  variance.csv   a row per loss and epoch: mean, standard deviation, least and greatest of the
                 information (bits) and of the loss over its steps; step_std: the standard
                 deviation without the trend, from the straight line that fits the epoch best
  variance.png   both at every step and in the mean of each epoch
"""

LOSSES = ("simclr", "shannon-doe", "vn-doe")


def configure(parser: argparse.ArgumentParser) -> None:
    _sweep.configure(parser, "runs/variance")


def start(given: dict[str, Any]) -> int:
    out = Path(given["out"])
    rest = given["train_options"]
    runs = [_sweep.make_run(out / loss, {"loss": loss}, rest) for loss in LOSSES]

    from vne_kernels.pretrain import variance as analysis

    def write() -> None:
        finished = [run.folder for run in runs if run.finished]
        analysis.write(finished, out)

    code = _sweep.sweep(given, runs, write, "variance.csv", analysis.HEADER)
    finished = [run.folder for run in runs if run.finished]
    if finished:
        print(analysis.summary([analysis.read(run) for run in finished]))
        print(f"wrote variance.csv and variance.png in {out}")
    return code
