"""The command line of ``vne-pretrain``: which command, and how it ends.

Exit codes: 0 done, 1 a fault ended a run, a part of the program is not installed or a part of a
sweep failed, 2 a bad option, 3 a loss that is not finite, 75 preempted (SIGTERM, SIGUSR1): the same
command goes on, 130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from vne_kernels.common.extras import needed_by
from vne_kernels.common.reading import FileError, printable
from vne_kernels.common.terminal import reason, show_any_text
from vne_kernels.pretrain.commands import COMMANDS, DEFAULT, make_parser
from vne_kernels.pretrain.config import OptionError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    show_any_text()
    rest = list(sys.argv[1:] if arguments is None else arguments)
    name = rest.pop(0) if rest and rest[0] in COMMANDS else None
    command = _module(name or DEFAULT)
    parser = make_parser(name, command)
    given = vars(parser.parse_args(rest))
    try:
        with needed_by("this program", "pretrain"):
            code: int = command.start(given)
            return code
    except OptionError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except (FileError, ModuleNotFoundError) as error:
        print(f"{parser.prog}: error: {printable(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (why := reason(error)) is None:
            raise
        print(f"\n{parser.prog}: error: {why}", file=sys.stderr)
        return 1


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"vne_kernels.pretrain.commands.{name.replace('-', '_')}")
