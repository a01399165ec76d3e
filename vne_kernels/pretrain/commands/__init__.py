"""The commands of ``vne-pretrain``, a module each, imported when it is called.

A command module has ``DESCRIPTION`` and ``EPILOG`` for its help, ``configure(parser)`` for its
options and ``start(given)``, which runs it with the options that were given and returns the exit
code. The modules above this folder do the work of a command; heavy imports happen in ``start``, so
that help and bad options answer at once and without the extra.
"""

from __future__ import annotations

import argparse
from types import ModuleType

PROGRAM = "vne-pretrain"
DEFAULT = "train"

#: name -> what it does; its module has '_' for '-'
COMMANDS = {
    "train": "pretrain an encoder (what bare options do)",
    "recipes": "list the named protocols, or show one",
    "linear-eval": "the paper's linear probe on the encoder of a run",
    "knn": "k nearest neighbours on the encoder of a run",
    "export": "write the encoder for torchvision, timm or detectron2",
    "variance": "information estimates of three losses during training (Figures 2 and 4)",
    "batch-size": "accuracy against batch size, for losses, epochs and seeds (Figure 3, Table 1a)",
    "report": "write a run's report.html again",
}


def make_parser(name: str | None, command: ModuleType) -> argparse.ArgumentParser:
    """The parser of one command; of the default one, with a list of all, where none is named."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM if name is None else f"{PROGRAM} {name}",
        description=command.DESCRIPTION,
        epilog="\n".join(filter(None, [command.EPILOG, None if name else _list_of_commands()])),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Options that are not given are absent from the namespace.
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    command.configure(parser)
    return parser


def _list_of_commands() -> str:
    lines = [f"  {name:<14} {what}" for name, what in COMMANDS.items()]
    return "\n".join(["commands (vne-pretrain COMMAND --help tells more):", *lines])
