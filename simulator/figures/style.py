"""Define the style of figures: a style sheet, widths of a two-column paper, and the look of each pruning family.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), which colour-blind readers can distinguish. There
are more families than colours, so marker and fill identify a family too: static families have filled markers and solid
lines, dynamic families hollow markers and dashed lines; the static and dynamic form of an idea share a colour.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

STYLE_FILE = Path(__file__).with_name("paper.mplstyle")

COLUMN_IN = 3.35
"""Width of one column, inches."""

PAGE_IN = 7.0
"""Width of both columns, inches."""

# fmt: off
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
# fmt: on
GREY, INK, PALE_INK = "#8A8A8A", "#444444", "#5A5A5A"


@dataclass(frozen=True)
class Style:
    """Look of one family."""

    color: str
    marker: str
    line: str = "-"
    hollow: bool = False
    label: str = ""

    def marks(self, **other: Any) -> dict[str, Any]:
        """Return keyword arguments of a line with markers."""
        face = "white" if self.hollow else self.color
        marks = {"color": self.color, "marker": self.marker, "linestyle": self.line}
        return marks | {"markerfacecolor": face, "markeredgecolor": self.color} | other


STYLES: MappingProxyType[str, Style] = MappingProxyType(
    {
        "depth": Style(BLUE, "o", label="Depth"),
        "width": Style(VERMILLION, "s", label="Width"),
        "width_cross": Style(ORANGE, "D", label="Width, cross-layer"),
        "semi_structured": Style(GREEN, "^", label="2:4"),
        "low_rank": Style(PURPLE, "P", label="Low rank"),
        "unstructured": Style(GREY, "X", ":", label="Unstructured"),
        "dynamic_depth": Style(BLUE, "o", "--", True, label="Dynamic depth"),
        "dynamic_width": Style(VERMILLION, "s", "--", True, label="Dynamic width"),
        "sparse_attention": Style(GREEN, "v", "--", True, label="Sparse attention"),
        "token": Style(BLACK, "d", "--", True, label="Token"),
        "kv_cache": Style(SKY, "h", "-", label="KV cache"),
        "experts": Style(PURPLE, "*", "-.", label="Experts"),
    }
)
"""Style of each family, in the order of legends: static ones first."""

DENSE = Style(BLACK, "o", "--", True, label="dense")
"""Style of the dense model where it has a curve."""

COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
_OTHERS = tuple(map(Style, COLORS, "osD^vPX"))


def style_of(name: str, index: int = 0) -> Style:
    """Return the style of a family, or, for any other name, the style at an index of a cycle."""
    return STYLES.get(name, _OTHERS[index % len(_OTHERS)])


def label(name: str) -> str:
    """Return the title of a family, or of several joined by "+"; another name is returned unchanged."""
    parts = name.split("+")
    if not all(part in STYLES for part in parts):
        return name
    first, *others = (STYLES[part].label for part in parts)
    return " + ".join([first, *(other[:1].lower() + other[1:] for other in others)])


def in_order(names: Any) -> list[str]:
    """Return names without repeats: families in the order of legends, then the other names in the given order."""
    once = list(dict.fromkeys(names))
    known = list(STYLES)
    return sorted(once, key=lambda name: known.index(name) if name in STYLES else len(known))


@contextlib.contextmanager
def paper_style() -> Iterator[None]:
    """Make figures that are drawn and saved inside use the style sheet only, whatever the user's settings are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcParams.update(matplotlib.rcParamsDefault)
        matplotlib.rcParams.update(matplotlib.rc_params_from_file(STYLE_FILE, use_default_template=False))
        yield
