"""Write the content of a request as one HTML file without scripts, which loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simulator._version import __version__
from simulator.explore.content import Drawing, PageContent, cell

MOST_BYTES = 1_000_000
"""Size of a report; figures that exceed it are omitted with a note."""

MOST_ROWS = 500
"""Rows of the table."""


def report_html(found: PageContent, commands: Sequence[str]) -> str:
    """Return the report; ``commands`` reproduce its numbers."""
    notes = list(found.notes)
    if (more := len(found.rows) - MOST_ROWS) > 0:
        notes.append(f"table: the first {MOST_ROWS} rows; prunesim speedup --csv FILE writes {more:,} more")
    page = _rendered(found, commands, (), notes)
    drawings: list[Drawing] = []
    left = MOST_BYTES - len(page.encode()) - 2_000 * len(found.drawings)
    for drawing in found.drawings:
        if len(drawing.svg.encode()) < left:
            drawings.append(drawing)
            left -= len(drawing.svg.encode())
        else:
            notes.append(f"figure {drawing.title}: omitted, too large; request fewer predictions, or use --figure FILE")
    return _rendered(found, commands, drawings, notes)


def _rendered(found: PageContent, commands: Sequence[str], drawings: Sequence[Drawing], notes: Sequence[str]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    columns = {name: values[:MOST_ROWS] for name, values in found.table.items()}
    return environment.get_template("report.html").render(
        found=found,
        commands=commands,
        drawings=drawings,
        notes=notes,
        columns=columns,
        rows=list(zip(*columns.values())),
        cell=cell,
        version=__version__,
    )
