"""The looks of this package's pictures, and how they are written."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vne_kernels.common.files import atomic_write
from vne_kernels.common.reading import printable

INK, MUTED, ACCENT = "#1f4e79", "#9db7d1", "#c0504d"
DPI = 150


def literal(text: str) -> str:
    """``text`` for a picture as it is: no sign of it is mathematics, and none begins a line."""
    return printable(text, 120).replace("$", r"\$")


def tidy(axes: Axes) -> None:
    """A faint grid, and no frame where there is no axis."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> Path:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=DPI)
    return path
