"""Draw the crossover map of a state: the fastest family at each batch and sequence, one panel per GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simulator.explore.layout import (
    INK,
    QUIET,
    SOFT,
    Chart,
    Dict,
    PanelGrid,
    faded,
    key,
    legend_px,
    listed,
    marker_of,
    message,
    on_axes,
    scatter,
)
from simulator.explore.predictions import MapCell, predictions, winners
from simulator.explore.state import State
from simulator.figures.crossover import NO_GAIN, TOO_LARGE, UNCERTAIN, opacity
from simulator.figures.layout import short
from simulator.figures.style import in_order, label, style_of
from simulator.figures.titles import device_title
from simulator.prediction.scenario import batch_name, once

_DASH: Dict = {"symbol": "line-ew-open", "color": SOFT}
_BLANK: Dict = {"symbol": "square-open", "size": 10, "color": SOFT}


def map_chart(state: State, most: int) -> Chart:
    """Draw the map of a state."""
    cells, problem = winners(state)
    return crossover_chart(cells, state, most) if cells else message(predictions(state).problem or problem)


def crossover_chart(cells: Sequence[MapCell], state: State, most: int) -> Chart:
    """Draw the fastest family of each batch and sequence, with its speedup; a frame marks the cell of the state's batch
    and sequence if the map has it."""
    gpus, names = once(c.best.hardware for c in cells), in_order(c.winner for c in cells)
    batches, lengths = sorted({c.best.batch for c in cells}), sorted({c.best.seq for c in cells})
    keys = _keys(cells, names)
    frame = PanelGrid(
        list(map(device_title, gpus)),
        most,
        23 * len(lengths),
        bottom=legend_px([name for name, _ in keys], len(gpus), most),
    )
    data, shapes = [], []
    for panel, gpu in enumerate(gpus):
        own = [(batches.index(c.best.batch), lengths.index(c.best.seq), c) for c in cells if c.best.hardware == gpu]
        size = (len(batches), len(lengths))
        data += _cells(own, size, names, panel, 9 if most == 1 or len(gpus) > 1 else 10)
        if state.batch in batches and state.seq in lengths:
            i, j = batches.index(state.batch), lengths.index(state.seq)
            box = {"x0": i - 0.48, "x1": i + 0.48, "y0": j - 0.47, "y1": j + 0.47}
            refs = {f"{axis[0]}ref": name for axis, name in on_axes(panel).items()}
            shapes.append({"type": "rect", **refs, **box, "line": {"color": INK, "width": 2}})
    data += [key(name, marker, 1000 + i) for i, (name, marker) in enumerate(keys)]
    x, y = (
        [{"range": [-0.5, len(texts) - 0.5], "showgrid": False, **listed(range(len(texts)), texts)}] * len(gpus)
        for texts in ([str(b) for b in batches], [short(n) for n in lengths])
    )
    return frame.chart(data, x, y, batch_name(state.phase), "sequence", shapes=shapes)


def _cells(
    own: Sequence[tuple[int, int, MapCell]], size: tuple[int, int], names: list[str], panel: int, font: int
) -> list[Dict]:
    """Return cells coloured by winner (pale if uncertain), with its marker and speedup; a cell is blank if the dense
    model exceeds the memory."""
    code: list[list[Any]] = [[None] * size[0] for _ in range(size[1])]
    hover: list[list[str]] = [[""] * size[0] for _ in range(size[1])]
    for i, j, c in own:
        hover[j][i] = _hover(c)
        if c.best.dense_fits:
            code[j][i] = 2.0 * names.index(c.winner) + c.certain
    colors = [_shade(name, certain) for name in names for certain in (False, True)]
    steps = [[(k + end) / len(colors), color] for k, color in enumerate(colors) for end in (0, 1)]
    cells: Dict = {"type": "heatmap", "z": code, "colorscale": steps, "zmin": -0.5, "zmax": len(colors) - 0.5}
    cells |= {"showscale": False, "xgap": 1, "ygap": 1, "text": hover, "hovertemplate": "%{text}<extra></extra>"}
    out = [{**cells, **on_axes(panel)}]
    style: Dict = {"textposition": "middle right", "textfont": {"size": font, "color": INK}, **QUIET}
    for name in names:
        won = [(i - 0.36, j, f"{c.best.speedup:.2f}") for i, j, c in own if c.winner == name and c.best.dense_fits]
        x, y, text = zip(*won) if won else [()] * 3
        marker = marker_of(style_of(name), font - 4) if name else {**_DASH, "size": 6}
        out.append(scatter(panel, "markers+text", x, y, text=list(text), marker=marker, **style))
    return out


def _shade(name: str, certain: bool) -> str:
    """Return the colour of a cell, light enough for its number to be readable."""
    return faded(style_of(name).color, opacity(name, certain)) if name else "rgba(231,234,238,1)"


def _hover(c: MapCell) -> str:
    r, overlap = c.best, "" if c.certain else "<br>winner uncertain: the interval of its ratio to the next includes 1"
    memory = "" if r.dense_fits else "<br>the dense model exceeds the memory"
    return (
        f"<b>{label(c.winner) if c.winner else NO_GAIN}</b>, {batch_name(r.phase)} {r.batch}, sequence {r.seq}<br>"
        f"{r.speedup:.3f} ({r.speedup_lower:.3f} to {r.speedup_upper:.3f}){overlap}{memory}"
    )


def _keys(cells: Sequence[MapCell], names: list[str]) -> list[tuple[str, Dict]]:
    """Return names and markers of the legend."""
    entries = [(label(name), marker_of(style_of(name))) for name in names if name]
    if "" in names:
        entries.append((NO_GAIN, {**_DASH, "size": 9}))
    if not all(c.certain for c in cells if c.best.dense_fits):
        entries.append((UNCERTAIN, {"symbol": "square", "size": 11, "color": "#d9dee5"}))
    if not all(c.best.dense_fits for c in cells):
        entries.append((TOO_LARGE, _BLANK))
    return entries
