"""Pictures that commands draw and write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["new_figure", "save_figure"]


def new_figure(width: float, height: float) -> Any:
    """A figure, in inches, that belongs to no window system.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        from ..plots.style import MISSING

        raise ImportError(MISSING) from e
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure in the format of the name's suffix: the old file or the whole new one.

    Raises:
        OSError: the folder does not exist or cannot be written to.
    """
    from ..files import new_file, unwritten

    with unwritten(path), new_file(path) as new:
        figure.savefig(new, dpi=dpi, format=path.suffix[1:])
