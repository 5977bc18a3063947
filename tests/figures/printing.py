"""What must hold for every figure of a paper."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any
from unittest import mock

from simulator.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def texts(figure: Figure) -> list[tuple[str, Any]]:
    """Texts that are drawn in a figure, with their boxes in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    found = list[Any]()
    with mock.patch.object(Text, "draw", lambda text, _: found.append(text)):
        FigureCanvasAgg(figure).draw()
    shown = [t for t in found if t.get_visible() and t.get_text().strip()]
    return [(t.get_text(), t.get_window_extent()) for t in shown]


def check_print(figure: Figure) -> None:
    """A width of a paper's columns or the requested one, no taller than its page, and no text off
    the page or on top of another."""
    size = style.paper_size()
    width, height = size.scale * figure.get_size_inches()
    if size.width_in is None:
        assert width in (style.COLUMN_IN, style.PAGE_IN)
    else:
        assert abs(width - size.width_in) < 1e-9
    assert height <= 9.51
    found = texts(figure)
    assert len(found) > 5
    for text, box in found:
        assert min(box.x0, box.y0) >= -1, (text, box)
        assert box.x1 <= figure.bbox.width + 1, (text, box)
        assert box.y1 <= figure.bbox.height + 1, (text, box)
    for (one, a), (other, b) in itertools.combinations(found, 2):
        overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(overlap) <= 1.5, (one, other, overlap)
