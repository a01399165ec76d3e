"""What the tests ask of a message: that it names things, in whatever words."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest


def naming(*things: object) -> str:
    """A pattern, for `match` of `pytest.raises`, of messages that name all of these."""
    return "(?s)" + "".join(rf"(?=.*(?<!\w){re.escape(str(x))}(?!\w))" for x in things)


def exit_code(program: Callable[[list[str]], object], arguments: list[str]) -> object:
    """What the program returns, or ends with where argparse ends it."""
    try:
        return program(arguments)
    except SystemExit as stop:
        return stop.code


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a program ended with; argparse writes its usage before it."""
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors.strip().splitlines()[-1]
