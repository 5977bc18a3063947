"""The crossover map: a panel a GPU, the fastest family of each batch and sequence, with its speedup."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.explore.chart import INK, SOFT, WIDE, Chart, Frame, axes_of, axis_names, faded, key, legend_px, marker_of
from simulator.figures.crossover import PALE, SURE, short
from simulator.figures.style import BLACK, in_order, label, look

if TYPE_CHECKING:
    from simulator.explore.answer import Cells

NONE = "none gains"


def crossover_chart(cells: Cells, batch: int, seq: int, *, most: int = WIDE) -> Chart:
    """Draw the winners; the cell of the state's own batch and sequence is framed where the map has it."""
    gpus = list(dict.fromkeys(cells.gpu.tolist()))
    batches, lengths = (sorted({int(v) for v in column}) for column in (cells.batch, cells.seq))
    names = in_order(cells.winner.tolist())
    keys = _entries(cells, names)
    frame = Frame.of(gpus, most, 23 * len(lengths), bottom=legend_px([name for name, _ in keys], len(gpus), most))
    axes = axes_of(frame, _listed([str(b) for b in batches]), _listed([short(n) for n in lengths]), "batch", "sequence")
    data: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    for panel, gpu in enumerate(gpus):
        own = np.flatnonzero(cells.gpu == gpu)
        data += _panel(cells, own, batches, lengths, names, panel, 9 if most == 1 or len(gpus) > 1 else 10)
        if batch in batches and seq in lengths:
            x, y = axis_names(panel)
            i, j = batches.index(batch), lengths.index(seq)
            shapes.append(
                {
                    "type": "rect",
                    "xref": x,
                    "yref": y,
                    "x0": i - 0.48,
                    "x1": i + 0.48,
                    "y0": j - 0.47,
                    "y1": j + 0.47,
                    "line": {"color": INK, "width": 2},
                }
            )
    data += [key(name, marker, 1000 + i) for i, (name, marker) in enumerate(keys)]
    return {"data": data, "layout": frame.layout(axes, shapes=shapes)}


def _listed(names: list[str]) -> dict[str, Any]:
    """An axis of cells with a name each."""
    at = list(range(len(names)))
    return {
        "range": [-0.5, len(names) - 0.5],
        "tickmode": "array",
        "tickvals": at,
        "ticktext": names,
        "showgrid": False,
    }


def _panel(
    cells: Cells, own: NDArray[np.intp], batches: list[int], lengths: list[int], names: list[str], panel: int, font: int
) -> list[dict[str, Any]]:
    """Cells coloured by their winner, pale where it is not certain; on them its marker and speedup, and a corner where memory is short."""
    where = dict(zip(("xaxis", "yaxis"), axis_names(panel)))
    at_x = np.searchsorted(batches, cells.batch[own])
    at_y = np.searchsorted(lengths, cells.seq[own])
    code = np.full((len(lengths), len(batches)), np.nan)
    told = np.full(code.shape, "", dtype=object)
    code[at_y, at_x] = [2 * names.index(w) + bool(s) for w, s in zip(cells.winner[own], cells.sure[own])]
    for i, x, y in zip(own, at_x, at_y):
        told[y, x] = _told(cells, int(i))
    colors = [_shade(name, sure) for name in names for sure in (False, True)]
    steps = (
        [(k / len(colors), c) for k, c in enumerate(colors)],
        [((k + 1) / len(colors), c) for k, c in enumerate(colors)],
    )
    scale = [list(stop) for pair in zip(*steps) for stop in pair]
    out: list[dict[str, Any]] = [
        {
            "type": "heatmap",
            "z": [[None if np.isnan(v) else float(v) for v in row] for row in code],
            "colorscale": scale,
            "zmin": -0.5,
            "zmax": len(colors) - 0.5,
            "showscale": False,
            "xgap": 1,
            "ygap": 1,
            "text": told.tolist(),
            "hovertemplate": "%{text}<extra></extra>",
            **where,
        }
    ]
    for name in names:
        chosen = cells.winner[own] == name
        text = [f"{v:.2f}" for v in cells.speedup[own][chosen]]
        mark = marker_of(name, font - 4) if name else {"symbol": "line-ew-open", "size": 6, "color": SOFT}
        out.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": (at_x[chosen] - 0.36).tolist(),
                "y": at_y[chosen].tolist(),
                "text": text,
                "textposition": "middle right",
                "textfont": {"size": font, "color": INK},
                "marker": mark,
                "hoverinfo": "skip",
                "showlegend": False,
                **where,
            }
        )
    too_large = ~cells.fits[own]
    if too_large.any():
        out.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": (at_x[too_large] + 0.40).tolist(),
                "y": (at_y[too_large] + 0.34).tolist(),
                "marker": _CORNER,
                "hoverinfo": "skip",
                "showlegend": False,
                **where,
            }
        )
    return out


_CORNER = {"symbol": "triangle-ne", "size": 5, "color": SOFT}


def _shade(name: str, sure: bool) -> str:
    """Colour of a cell, thin enough for its number to be read."""
    if not name:
        return "rgba(231,234,238,1)"
    color = look(name).color
    return faded(color, (SURE if sure else PALE) * (0.6 if color == BLACK else 1.0))


def _told(cells: Cells, i: int) -> str:
    name = label(cells.winner[i]) if cells.winner[i] else NONE
    certain = "" if cells.sure[i] else "<br>intervals overlap: not certain"
    memory = "" if cells.fits[i] else "<br>the dense model exceeds the memory"
    return (
        f"<b>{name}</b>, batch {cells.batch[i]}, sequence {cells.seq[i]}<br>{cells.speedup[i]:.3f} "
        f"({cells.lower[i]:.3f} to {cells.upper[i]:.3f}){certain}{memory}"
    )


def _entries(cells: Cells, names: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Names and markers of the legend."""
    entries: list[tuple[str, dict[str, Any]]] = [(label(name), marker_of(name, 8)) for name in names if name]
    if "" in names:
        entries.append((NONE, {"symbol": "line-ew-open", "size": 9, "color": SOFT}))
    if not cells.sure.all():
        entries.append(("pale: intervals overlap", {"symbol": "square", "size": 11, "color": "#d9dee5"}))
    if not cells.fits.all():
        entries.append(("dense exceeds memory", {**_CORNER, "size": 8}))
    return entries
