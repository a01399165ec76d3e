"""``vne-pretrain report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Write report.html into a run's folder: accuracies, plots, events, configuration and versions in one
file that needs no other and no network, and can be printed. vne-pretrain train writes it at its
end; write it again after linear-eval or knn, or to look at a run that still trains or was stopped.
"""

EPILOG = ""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="output folder of vne-pretrain train")


def start(given: dict[str, Any]) -> int:
    from vne_kernels.pretrain import report

    print(f"wrote {report.write(Path(given['run']))}")
    return 0
