"""Imports that an extra of the package brings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed_by(what: str, extra: str) -> Iterator[None]:
    """Within it, a module that is not installed is an error that says what to install.

    Args:
        what: what needs the imports, such as "vne_kernels.metrics".
        extra: the extra of this package that brings them, such as "metrics".

    Raises:
        ModuleNotFoundError: an import within it has failed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or str(error)).split(".")[0]
        raise ModuleNotFoundError(
            f"{module} is not installed; {what} needs: pip install 'vne_kernels[{extra}]'",
            name=error.name,
        ) from error
