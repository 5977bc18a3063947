"""Write names next to points where they cover neither another name nor a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from simulator.arrays import BoolArray, FloatArray
from simulator.figures.style import BLACK, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKER_PT = 2.6
"""Half the size of a marker that names keep clear, points."""

GAP_PT = 2.0
"""Horizontal room between two names, points."""

LONG = 22
"""Characters of a joint name from which its parts are written below each other."""

_DISTANCES_PT = (3.5, 8.0, 14.0, 20.0, 27.0, 35.0, 44.0, 54.0, 65.0, 80.0, 100.0, 125.0)
_DIRECTIONS = (
    *((1.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 1.0), (1.0, -1.0), (-1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)),
    *((1.0, -0.4), (-1.0, -0.4), (1.0, 0.4), (-1.0, 0.4), (0.4, -1.0), (-0.4, -1.0), (0.4, 1.0), (-0.4, 1.0)),
)


def write_labels(
    ax: Axes,
    x: ArrayLike,
    y: ArrayLike,
    texts: Sequence[str],
    clear_of: Sequence[tuple[ArrayLike, ArrayLike]] = (),
    *,
    reach_pt: float = 125.0,
    color: str = BLACK,
) -> list[str]:
    """Write a name next to each point, as near as there is room, at most ``reach_pt`` typographic points away, with a
    line to the point if it is far; return the names for which there is no room.

    Points whose markers overlap have a joint name, the highest first. Names do not cover the texts that the axes have.
    The layout of the figure must be final.

    ``clear_of`` holds points (x, y) of further things that names must not cover: other markers, lines, areas.
    """
    figure: Any = ax.figure
    scale, to_data = figure.dpi / 72.0, ax.transData.inverted()  # pixels per point
    places = ax.transData.transform(np.stack([np.asarray(x, float), np.asarray(y, float)], axis=1))
    others = [ax.transData.transform(np.stack([np.asarray(v, float) for v in p], axis=1)) for p in clear_of]
    taken = _boxes(np.concatenate([places, *others]), MARKER_PT * scale)
    style: dict[str, Any] = {"fontsize": 6, "color": color, "zorder": 6, "in_layout": False}
    style |= {"ha": "center", "va": "center"}
    names = np.reshape([text.get_window_extent().extents for text in ax.texts], (-1, 4))
    inside, missing = ax.get_window_extent().extents, list[str]()
    for group in _together(places, 2 * MARKER_PT * scale):
        own_names = list(dict.fromkeys(texts[i] for i in group))
        text = (", " if sum(map(len, own_names)) < LONG else "\n").join(own_names)
        point = places[group].mean(axis=0)
        x0, y0 = to_data.transform(point).tolist()
        label = ax.text(x0, y0, text, **style)
        extent = label.get_window_extent()
        label.remove()
        size = np.array([extent.width + GAP_PT * scale, extent.height])
        for center, far, strict in _candidates(point, size, scale, reach_pt):
            own = np.concatenate([center - 0.5 * size, center + 0.5 * size])
            line = np.linspace(point, center, 24) if far else np.zeros((0, 2))
            line = line[~_overlaps(_boxes(line, 0.0), own)]
            along = _boxes(line, 0.0)
            within = (own[:2] >= inside[:2]).all() and (own[2:] <= inside[2:]).all()
            clash = _overlaps(np.concatenate([taken, names]), own).any()
            crosses = strict and any(_overlaps(along, name).any() for name in names)
            if within and not clash and not crosses:
                names, taken = np.concatenate([names, own[None]]), np.concatenate([taken, along])
                x0, y0 = to_data.transform(center).tolist()
                ax.text(x0, y0, text, **style)
                if far:
                    ax.plot(*to_data.transform(line[[0, -1]]).T, color=GREY, linewidth=0.4, zorder=3.5)
                break
        else:
            missing.append(text)
    return missing


def _boxes(centers: FloatArray, half: float) -> FloatArray:
    """Return squares around points as rows x0, y0, x1, y1."""
    return np.concatenate([centers - half, centers + half], axis=1)


def _overlaps(boxes: FloatArray, box: FloatArray) -> BoolArray:
    return np.asarray((boxes[:, :2] < box[2:]).all(axis=1) & (boxes[:, 2:] > box[:2]).all(axis=1))


def _together(places: FloatArray, distance: float) -> list[list[int]]:
    """Return groups of points, each within a distance of the first of its group, from the top down."""
    groups: list[list[int]] = []
    for i in np.argsort(-places[:, 1], kind="stable").tolist():
        for group in groups:
            if np.hypot(*(places[i] - places[group[0]])) < distance:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def _candidates(
    point: FloatArray, size: FloatArray, scale: float, reach_pt: float
) -> Iterator[tuple[FloatArray, bool, bool]]:
    """Yield centres of a text around a point, the nearest first, whether it needs a line to the point, and whether the
    line must not cross names: at first it must not."""
    for strict in (True, False):
        for distance in (d for d in _DISTANCES_PT if d <= reach_pt):
            for direction in np.array(_DIRECTIONS):
                away = direction * distance * scale / np.hypot(*direction)
                yield point + away + 0.5 * np.sign(direction) * size, distance > _DISTANCES_PT[0], strict
