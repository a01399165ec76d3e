"""``vne-pretrain batch-size``."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from vne_kernels.pretrain.commands import _sweep
from vne_kernels.pretrain.config import LOSSES

DESCRIPTION = """\
Accuracy of the linear evaluation against batch size (the paper's Figure 3 and Table 1a): a run for
every loss, batch size, number of epochs and seed. The peak learning rate grows with the batch size.

  vne-pretrain batch-size --batch-sizes 16 128 --epochs 25 -- --recipe cifar10-table1a
"""

EPILOG = f"""\
{_sweep.EPILOG}
written to the output folder again whenever a run is finished:
  batch_size.csv   a row per run; accuracies 0 to 1: linear_accuracy of linear-eval, knn of the knn
                   command (called for a run's folder) or of the run's own evaluation, the online
                   ones of the last epoch; nan where not measured
  batch_size.png   its picture, with the paper's numbers where it has the same images
"""

VARIED = ("loss", "batch_size", "epochs", "seed")


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--losses",
        nargs="+",
        choices=LOSSES,
        metavar="LOSS",
        default=["vn-doe"],
        help=f"of {', '.join(LOSSES)} (default: vn-doe)",
    )
    for option, default, what in (
        ("--batch-sizes", [8, 16, 32, 64, 128], "images in a step"),
        ("--epochs", [25, 50, 100], "of training, each a run of its own"),
        ("--seeds", [0], "of weights, order and views"),
    ):
        shown = " ".join(map(str, default))
        help_text = f"{what} (default: {shown})"
        add(option, nargs="+", type=int, metavar="N", default=default, help=help_text)
    _sweep.configure(parser, "runs/batch-size")


def start(given: dict[str, Any]) -> int:
    out = Path(given["out"])
    # Seeds outermost, long runs last: what is there early is already a whole picture.
    grid = itertools.product(
        *(dict.fromkeys(given[name]) for name in ("seeds", "epochs", "batch_sizes", "losses"))
    )
    runs = []
    for seed, epochs, batch_size, loss in grid:
        folder = out / f"{loss}-batch{batch_size}-epochs{epochs}-seed{seed}"
        varied = {"loss": loss, "batch_size": batch_size, "epochs": epochs, "seed": seed}
        runs.append(_sweep.make_run(folder, varied, given["train_options"]))

    from vne_kernels.pretrain import batch_size as analysis

    def write() -> None:
        rows = [analysis.Row.of_run(run.folder) for run in runs if run.finished]
        analysis.write(rows, out / "batch_size.csv")

    code = _sweep.sweep(given, runs, write, "batch_size.csv", analysis.Row._fields)
    if (out / "batch_size.csv").exists():
        print(f"wrote batch_size.csv and batch_size.png in {out}")
    return code
