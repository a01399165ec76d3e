"""``vne-pretrain recipes``."""

from __future__ import annotations

import argparse
from typing import Any

from vne_kernels.common.reading import printable

DESCRIPTION = """\
List the protocols that --recipe knows, or print one: a small TOML file that can be copied, changed
and given to --recipe by its path.
"""
EPILOG = ""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this recipe's file")


def start(given: dict[str, Any]) -> int:
    from vne_kernels.pretrain import recipes

    if given.get("name"):
        print(*map(printable, recipes.text(given["name"]).splitlines()), sep="\n")
        return 0
    for name in recipes.names():
        content = recipes.read(name)
        print(f"{name:<16} {content['description']}")
        print(f"{'':<16} {content['source']}")
    return 0
