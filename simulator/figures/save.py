"""Figures as files: :func:`save_figure` writes PDF, SVG or PNG whole, with the same bytes for the same figure."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from simulator.errors import InputError
from simulator.figures.style import paper_style
from simulator.files.write import check_target, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES: tuple[str, ...] = (".pdf", ".svg", ".png")
"""Kinds of file that a figure is written as."""

# nothing that changes from run to run
_METADATA = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {}}


def check_figure(path: str | Path) -> Path:
    """A path that a figure can be written to, as far as can be told beforehand.

    InputError for a suffix other than those of :data:`SUFFIXES`, a folder, or a folder that does not exist.

    >>> check_figure("speedup.jpg")
    Traceback (most recent call last):
    simulator.errors.InputError: speedup.jpg: expected a name that ends in .pdf, .svg or .png
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: expected a name that ends in .pdf, .svg or .png")
    return check_target(path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as its suffix says; see :func:`check_figure` for what is refused."""
    target = check_figure(path)
    suffix = target.suffix.lower()
    out = io.BytesIO()
    with paper_style():
        figure.savefig(out, format=suffix[1:], metadata=_METADATA[suffix])
    write_whole(target, _of_few_colors(out.getvalue()) if suffix == ".png" else out.getvalue())


def _of_few_colors(png: bytes) -> bytes:
    """The same picture with a palette: a third of the bytes."""
    from PIL import Image

    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        few = picture.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        few.save(out, "png", dpi=picture.info["dpi"])
    return out.getvalue()
