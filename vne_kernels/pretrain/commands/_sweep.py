"""What the commands that train many runs share: their options, and how they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vne_kernels.common.files import spare
from vne_kernels.common.reading import FileError
from vne_kernels.common.stopping import PREEMPTIONS, REQUEUE
from vne_kernels.pretrain import recipes
from vne_kernels.pretrain.commands import make_parser, train
from vne_kernels.pretrain.config import CONFIG, OptionError, check_bounds, resumed_config
from vne_kernels.pretrain.tables import read_rows

if TYPE_CHECKING:  # it needs the extra, which help and bad options do without
    from vne_kernels.pretrain.sweep import Run

RECIPE = "cifar10-table1a"

EPILOG = f"""\
What follows -- are options of vne-pretrain train, the same for every run; without --data and
--recipe among them the paper's protocol is taken: --recipe {RECIPE}.

Each run has a folder of its own in --out, with the files of vne-pretrain train and linear-eval.
Ctrl-C lets the running ones save what they have done; the same command then goes on, and skips what
is finished; so do SIGTERM and SIGUSR1, with exit code 75. A run that fails is reported, and tried
again next time; exit code 1.
"""


def configure(parser: argparse.ArgumentParser, out: str) -> None:
    add = parser.add_argument
    add("--out", metavar="DIR", default=out, help=f"output folder (default: {out})")
    add(
        "--jobs",
        type=int,
        metavar="N",
        default=1,
        help="runs side by side, which share the processors; their output goes to log.txt in the "
        "folder of each (default: 1, whose output is shown)",
    )
    add(
        "--overwrite",
        action="store_true",
        default=False,
        help="replace the table and its picture in --out, even if they are not a sweep's",
    )
    add(
        "train_options",
        nargs="*",
        metavar="-- OPTION",
        default=[],
        help="options of vne-pretrain train",
    )


def make_run(folder: Path, varied: Mapping[str, Any], rest: Sequence[str]) -> Run:
    """The run in ``folder``, by the options that are ``varied`` and those after ``--``.

    Raises:
        OptionError: an option is wrong, or one that the sweep decides, or the folder holds a run of
            other options.
    """
    given = vars(make_parser("train", train).parse_args(rest))
    for name in ("out", "resume", "overwrite", *varied):
        if name in given:
            raise OptionError(name, "left out after --, where the sweep decides it", given[name])
    ours = {} if given.keys() & {"data", "recipe"} else {"recipe": RECIPE}
    ours |= varied
    recipes.options(given | ours)
    if (folder / "config.json").exists():
        resumed_config(folder, given | ours)

    from vne_kernels.pretrain.sweep import Run

    options = [f"--{name.replace('_', '-')}={value}" for name, value in ours.items()]
    # linear-eval takes the images and the rest from the run itself.
    where = [f"--accelerator={given['accelerator']}"] if "accelerator" in given else []
    return Run(folder, (*options, *rest), tuple(where))


def sweep(
    given: Mapping[str, Any],
    runs: Sequence[Run],
    after_each: Callable[[], None],
    table: str,
    header: Sequence[str],
) -> int:
    """Trains and evaluates the runs; returns the exit code.

    ``after_each`` writes ``table``, whose ``header`` tells it from a file of another program, and
    its picture.
    """
    check_bounds("jobs", given["jobs"], 1, 10**4)
    out = Path(given["out"])
    ours = _has_header(out / table, header) or any((x.folder / CONFIG).exists() for x in runs)
    if not (given["overwrite"] or ours):
        try:
            spare(out, (table, Path(table).with_suffix(".png").name), "--overwrite replaces them")
        except FileError as error:
            raise OptionError("out", "a folder without foreign files", str(error)) from error

    from vne_kernels.pretrain.sweep import sweep

    outcome = sweep(out, runs, given["jobs"], after_each)
    if outcome.signum is not None:
        print("\nstopped, and nothing is lost; the same command goes on", file=sys.stderr)
        return REQUEUE if outcome.signum in PREEMPTIONS else 130
    if outcome.failed:
        names = ", ".join(run.folder.name for run in outcome.failed)
        print(f"\n{len(outcome.failed)} of {len(runs)} runs failed: {names}", file=sys.stderr)
        return 1
    return 0


def _has_header(table: Path, header: Sequence[str]) -> bool:
    try:
        return read_rows(table)[0] == list(header)
    except (OSError, FileError):
        return False
