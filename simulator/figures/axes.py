"""Parts that figures share: logarithmic axes with round numbers that people read, and one legend below the panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MANTISSAS: tuple[tuple[float, ...], ...] = (
    (1, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 9, 9.5),
    (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 8, 9),
    (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 7, 8, 9),
    (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8),
    (1, 1.5, 2, 3, 5, 7),
    (1, 2, 5),
    (1, 3),
    (1,),
)


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two values on a logarithmic axis, as many as there is room for.

    >>> log_ticks(0.8, 2.1, 5)
    [0.8, 1.0, 1.25, 1.5, 2.0]
    >>> log_ticks(0.9, 350.0, 4)
    [1.0, 10.0, 100.0]
    """
    ticks: list[float] = []
    for mantissas in _MANTISSAS:
        every = sorted({float(f"{m}e{power}") for power in range(-9, 19) for m in mantissas})
        ticks = [t for t in every if low <= t <= high]
        if len(ticks) <= most:
            break
    return ticks


def log_axis(axis: Any, low: float, high: float, most: int) -> None:
    """Round numbers as plain text on an x or y axis that is already logarithmic; no minor ticks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(log_ticks(low, high, most)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def in_a_row(panels: int) -> int:
    """How many panels to set side by side: at most three, rows as full as can be.

    >>> [in_a_row(n) for n in (1, 2, 3, 4, 5, 6)]
    [1, 2, 3, 2, 3, 3]
    """
    return 2 if panels == 4 else min(panels, 3)


def legend_below(figure: Figure, handles: Sequence[Any], columns: int, bottom_in: float, middle: float = 0.5) -> None:
    """One legend for the whole figure, its lower edge some inches above the figure's."""
    figure.legend(
        handles=list(handles),
        loc="lower center",
        ncol=columns,
        bbox_to_anchor=(middle, bottom_in / figure.get_figheight()),
        borderaxespad=0,
    )
