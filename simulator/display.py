"""Display returned objects: as plain values, as a data frame, in a notebook, and in three lines at a prompt.

A class derives from :class:`Displayed` and describes itself in ``_title``; its fields define the rest. A dataclass must
be declared with ``repr=False``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from html import escape
from itertools import islice
from typing import TYPE_CHECKING, Any

from simulator.errors import needs_extra
from simulator.units import finite, rate, seconds, size

if TYPE_CHECKING:
    import pandas

MOST_ROWS = 20
"""Rows of a long table in a notebook; a data frame has all rows."""

MOST_LETTERS = 320
"""Largest length of a ``repr``, three lines of a terminal."""

GAIN, LOSS, WHOLE, NEUTRAL = "#009E73", "#D55E00", "#3B8FD0", "#8C8C8C"
"""Colours of bars, distinct for colour-blind readers, on white and on black."""

_WIDTH, _HEIGHT = 220, 14  # pixels of a bar

_UNITS: Mapping[str, Callable[[float], str]] = {
    "flop_per_s": partial(rate, unit="FLOP/s"),
    "bytes_per_s": partial(rate, unit="B/s"),
    "_per_s": "{:,.4g}".format,
    "_hz": partial(rate, unit="Hz"),
    "bytes": size,
    "_s|seconds": seconds,
}
"""End of a name, or of its part before a dot -> format of the value; the first match is used."""


class Displayed:
    """Base class of returned objects.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, repr=False)
    ... class Pass(Displayed):
    ...     name: str
    ...     total_s: float
    ...     def _title(self) -> str:
    ...         return f"{self.name} takes {seconds(self.total_s)}"
    >>> Pass("prefill", 0.0123)
    <Pass: prefill takes 12.3 ms>
    >>> Pass("prefill", 0.0123).to_dict()
    {'name': 'prefill', 'total_s': 0.0123}
    >>> Pass("<b>", 0.0123)._repr_html_()
    '<div><b>&lt;b&gt; takes 12.3 ms</b><table><tr><th>name<td>&lt;b&gt;<tr><th>total_s<td>12.3 ms</table></div>'
    """

    def _title(self) -> str:
        """Return a description in one line."""
        raise NotImplementedError

    def _columns(self) -> Mapping[str, Any]:
        """Return the columns of the data frame: by default one row of the fields."""
        return {name: [value] for name, value in self.to_dict().items()}

    def _html(self) -> str:
        """Return the HTML below the title: names and values of one row, or a table of several rows."""
        columns = self._columns()
        if all(len(column) == 1 for column in columns.values()):
            return facts_html({name: column[0] for name, column in columns.items()})
        return table_html(columns)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain Python values: numbers in SI units, arrays as lists, None for NaN and infinity."""
        return dict(as_plain(self))

    def to_pandas(self) -> pandas.DataFrame:
        """Return a ``pandas.DataFrame`` with numbers in SI units: one row, or one row per entry of a table.

        Raises InputError if pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise needs_extra("a data frame", "tables", "pandas") from None
        return pandas.DataFrame(dict(self._columns()))

    def _repr_html_(self) -> str:
        return f"<div><b>{escape(self._title())}</b>{self._html()}</div>"

    def __repr__(self) -> str:
        text = f"<{type(self).__name__}: {self._title()}>"
        return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 4]}...>"


def as_plain(value: Any) -> Any:
    """Return a value as nested dictionaries, lists, finite numbers and texts; NaN and infinity become None.

    A dataclass becomes a dictionary of its fields with ``repr``.

    >>> from pathlib import PurePosixPath
    >>> as_plain({"sizes": (1, 2), "file": PurePosixPath("a"), "share": float("nan")})
    {'sizes': [1, 2], 'file': 'a', 'share': None}
    """
    # NumPy values have tolist; NumPy is not imported here, since simple commands do not need it
    if hasattr(value, "tolist") or isinstance(value, str | int | float | None):
        return finite(value)
    if is_dataclass(value):
        return {f.name: as_plain(getattr(value, f.name)) for f in fields(value) if f.repr}
    if isinstance(value, Mapping):
        return {str(name): as_plain(v) for name, v in value.items()}
    return [as_plain(v) for v in value] if isinstance(value, Iterable) else str(value)


def by_column(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return rows as columns of all their names; missing values are None.

    >>> by_column([{"a": 1}, {"a": 2, "b": 3}])
    {'a': [1, 2], 'b': [None, 3]}
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def cell(name: str, value: Any) -> str:
    """Return a value as text, by the unit at the end of its name.

    >>> cell("dense_s", 0.0123), cell("total_bytes", 2**30), cell("peak_flop_per_s.bf16", 9.9e14), cell("ttft_s", None)
    ('12.3 ms', '1.00 GiB', '990 TFLOP/s', '')
    """
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        plain = str if isinstance(value, int) else "{:.4g}".format
        return next((text for unit, text in _UNITS.items() if re.search(rf"({unit})(\.|$)", name)), plain)(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell(str(key), v)}".strip() for key, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(cell(name, v) for v in value)
    return str(value)


def with_and(parts: Sequence[str]) -> str:
    """Return names as a list in a sentence.

    >>> with_and(["launch"]), with_and(["launch", "host time", "alignment"])
    ('launch', 'launch, host time and alignment')
    """
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def facts_html(facts: Mapping[str, Any]) -> str:
    """Return names and values as HTML, without empty values."""
    shown = {name: cell(name, as_plain(value)) for name, value in facts.items()}
    rows = (f"<tr><th>{escape(name)}<td>{escape(text)}" for name, text in shown.items() if text)
    return f"<table>{''.join(rows)}</table>"


def table_html(columns: Mapping[str, Any], most: int = MOST_ROWS) -> str:
    """Return columns of equal length as an HTML table of the first rows, with the number of further rows.

    >>> table_html({"m": [1, 8], "time_s": [1e-6, 2e-6]}, most=1)
    '<table><tr><th>m<th>time_s<tr><td>1<td>1.00&nbsp;us</table><i>and 1 more row</i>'
    """
    many = max(map(len, columns.values()), default=0)
    head = "".join(f"<th>{escape(name)}" for name in columns)
    first = {name: as_plain(column[:most]) for name, column in columns.items()}
    rows = ("".join(f"<td>{_unbroken(cell(name, v))}" for name, v in zip(first, row)) for row in zip(*first.values()))
    left = f"<i>and {many - most:,} more row{'s' * (many - most > 1)}</i>" if many > most else ""
    return f"<table><tr>{head}{''.join(f'<tr>{row}' for row in rows)}</table>{left}"


def _unbroken(text: str) -> str:
    """Return a cell on one line, for wide tables."""
    return escape(text).replace(" ", "&nbsp;")


def items_html(lines: Iterable[str]) -> str:
    """Return lines as an HTML list, or ""."""
    items = "".join(f"<li>{escape(line)}" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def bars_html(steps: Sequence[tuple[str, float]], interval: tuple[float, float] | None = None) -> str:
    """Return a waterfall of speedups as HTML: first and last bar start at 1, the others connect consecutive values.

    Parameters
    ----------
    steps : sequence of (name, speedup)
        The nominal speedup, and the speedup after each step.
    interval : (lower, upper), optional
        Interval of the last speedup.

    >>> page = bars_html([("nominal", 1.33), ("bytes", 1.2)], (1.1, 1.3))
    >>> page.count("<svg"), "<td>x0.902" in page, "predicted<td><td>1.20 (1.10-1.30)" in page
    (3, True, True)
    """
    names, values = [name for name, _ in steps], [value for _, value in steps]
    ends = [1.0, *values, *(interval or ())]
    low, wide = min(ends), max(max(ends) - min(ends), 1e-9)

    def x(value: float) -> float:
        return float(1.0 + (_WIDTH - 2.0) * (value - low) / wide)

    def bar(before: float, after: float, color: str, whisker: tuple[float, float] | None = None) -> str:
        left, right = sorted((x(before), x(after)))
        drawn = f'<rect x="{left:.1f}" y="2" width="{max(right - left, 1.0):.1f}" height="10" fill="{color}"/>'
        drawn += f'<path d="M{x(1.0):.1f} 0V14" stroke="{NEUTRAL}"/>'  # mark at 1
        if whisker:
            a, b = map(x, whisker)
            drawn += f'<path d="M{a:.1f} 7H{b:.1f}M{a:.1f} 4V10M{b:.1f} 4V10" stroke="currentColor"/>'
        return f'<svg width="{_WIDTH}" height="{_HEIGHT}" aria-hidden="true">{drawn}</svg>'

    rows = [(names[0], "", f"{values[0]:.2f}", bar(1.0, values[0], NEUTRAL))]
    for name, before, after in zip(names[1:], values, values[1:]):
        color = NEUTRAL if abs(after / before - 1.0) < 5e-4 else GAIN if after > before else LOSS
        rows.append((name, f"x{after / before:.3f}", f"{after:.2f}", bar(before, after, color)))
    ends_text = f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else ""
    rows.append(("predicted", "", f"{values[-1]:.2f}{ends_text}", bar(1.0, values[-1], WHOLE, interval)))
    cells = (f"<tr><th>{escape(name)}<td>{factor}<td>{value}<td>{drawn}" for name, factor, value, drawn in rows)
    return f"<table><tr><th>step<th>factor<th>speedup<th>{''.join(cells)}</table>"


def few(names: Iterable[str], most: int = 4) -> str:
    """Return the first few distinct names as text, with the number of further names.

    >>> few("abcabc", 2), few("ab")
    ('a, b and 1 more', 'a, b')
    """
    known = list(dict.fromkeys(names))
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(islice(known, most)) + more


def markdown_text(text: str) -> str:
    """Return a text on one line for Markdown and HTML, with entities for markup characters.

    >>> markdown_text("<b> a|b *c*")
    '&#60;b&#62; a&#124;b &#42;c&#42;'
    """
    return re.sub(r"[\\`*\[\]<>&|]", lambda found: f"&#{ord(found[0])};", " ".join(text.split()))
