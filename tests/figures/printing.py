"""What must hold for every figure of a paper."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from simulator.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def texts(figure: Figure) -> list[tuple[str, Any]]:
    """Visible texts of a figure with their boxes in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    found = []
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and _shown(figure, text):
            found.append((text.get_text(), text.get_window_extent(renderer)))
    return found


def _shown(figure: Figure, text: Any) -> bool:
    """Return whether a text is drawn: tick labels outside the axes' limits or switched off are
    not."""
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            for tick in [*axis.majorTicks, *axis.minorTicks]:
                if text is tick.label1:
                    low, high = sorted(axis.get_view_interval())
                    return bool(
                        tick.label1.get_visible()
                        and low <= tick.get_loc() <= high
                        and tick in axis._update_ticks()
                    )
                if text is tick.label2:
                    return bool(tick.label2.get_visible())
    return True


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
