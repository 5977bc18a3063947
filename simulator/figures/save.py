"""Write figures to files: PDF, SVG or PNG, whole, with the same bytes for the same figure."""

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
"""File types of figures."""

# no dates: the bytes must not change between runs
_METADATA = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {}}


def check_figure(path: str | Path) -> Path:
    """Return a path to which a figure can be written, as far as a check can show.

    InputError for a suffix other than those of :data:`SUFFIXES`, a folder, or a folder that does not exist.

    >>> check_figure("speedup.jpg")
    Traceback (most recent call last):
    simulator.errors.InputError: speedup.jpg: expected a name that ends in .pdf, .svg or .png
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: expected a name that ends in .pdf, .svg or .png")
    return check_target(path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of its suffix; InputError as in :func:`check_figure`."""
    target = check_figure(path)
    suffix = target.suffix.lower()
    out = io.BytesIO()
    with paper_style():
        figure.savefig(out, format=suffix[1:], metadata=_METADATA[suffix])
    write_whole(target, _of_few_colors(out.getvalue()) if suffix == ".png" else out.getvalue())


def svg_text(figure: Figure) -> str:
    """Return a figure, whose layout is final, as an SVG element for a page."""
    out = io.StringIO()
    with paper_style():
        figure.set_layout_engine(None)  # else Matplotlib draws it once more
        figure.savefig(out, format="svg", metadata=_METADATA[".svg"])
    text = out.getvalue()
    return text[text.index("<svg") :]


def _of_few_colors(png: bytes) -> bytes:
    """Return the same picture with a palette: a third of the bytes."""
    from PIL import Image

    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        few = picture.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        few.save(out, "png", dpi=picture.info["dpi"])
    return out.getvalue()
