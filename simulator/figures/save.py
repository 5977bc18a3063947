"""Figures of a paper: arrays and labels in, a matplotlib figure out, one call to save it.

Use :func:`speedup_figure` for speedup against sparsity, :func:`waterfall_figure` for where a speedup was lost, :func:`roofline_figure`
for GEMMs on the roofline, :func:`save_figure` to write PDF, SVG or PNG. The same arrays give the same bytes.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from simulator.errors import InputError
from simulator.figures.roofline import Roof, roofline_figure
from simulator.figures.speedup import speedup_figure
from simulator.figures.style import paper_style
from simulator.figures.waterfall import Steps, waterfall_figure
from simulator.files.write import check_target, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "SUFFIXES",
    "Roof",
    "Steps",
    "check_figure",
    "roofline_figure",
    "save_figure",
    "speedup_figure",
    "waterfall_figure",
]

SUFFIXES: tuple[str, ...] = (".pdf", ".svg", ".png")
"""Kinds of file that a figure is written as."""

# nothing that changes from run to run
_METADATA = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {}}


def check_figure(path: str | Path) -> Path:
    """A path that a figure can be written to, as far as can be told beforehand.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    Path

    Raises
    ------
    InputError
        For a suffix other than those of :data:`SUFFIXES`, a folder, or a folder that does not exist.

    Examples
    --------
    >>> check_figure("speedup.jpg")
    Traceback (most recent call last):
    simulator.errors.InputError: speedup.jpg: expected a name that ends in .pdf, .svg or .png
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: expected a name that ends in .pdf, .svg or .png")
    return check_target(path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as its suffix says, whole, with the same bytes for the same figure.

    Parameters
    ----------
    figure : Figure
    path : str or Path
        Ends in one of :data:`SUFFIXES`.

    Raises
    ------
    InputError
        See :func:`check_figure`.
    OSError
        When the file cannot be written.
    """
    target = check_figure(path)
    suffix = target.suffix.lower()
    out = io.BytesIO()
    with paper_style():
        figure.savefig(out, format=suffix[1:], metadata=_METADATA[suffix])
    write_whole(target, out.getvalue())
