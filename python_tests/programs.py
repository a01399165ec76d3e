"""Runs Python code in a separate process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path


def run_python(
    script: str,
    *arguments: object,
    options: Sequence[str] = (),
    cwd: Path | None = None,
    without: Sequence[str] = (),
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """What the script prints; its failure is one of the test, and so is a hang.

    `options` are Python's, `variables` join the environment, those named in `without` leave it.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in without}
    command = [sys.executable, *options, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=inherited | variables, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done
