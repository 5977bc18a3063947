"""Display returned objects: as plain values, as a data frame, and in three lines at a prompt.

A class derives from :class:`Displayed` and describes itself in ``_title``; its fields define the
rest. A dataclass must be declared with ``repr=False``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from simulator.errors import needs_extra
from simulator.units import finite

if TYPE_CHECKING:
    import pandas

MOST_LETTERS = 320
"""Largest length of a ``repr``, three lines of a terminal."""


class Displayed:
    def _title(self) -> str:
        raise NotImplementedError

    def _columns(self) -> Mapping[str, Any]:
        """Return the columns of the data frame: here one row of the fields."""
        return {name: [value] for name, value in self.to_dict().items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain Python values: numbers in SI units, arrays as lists, None for
        NaN and infinity."""
        return dict(as_plain(self))

    def to_pandas(self) -> pandas.DataFrame:
        """Return a ``pandas.DataFrame`` with numbers in SI units: one row, or one row per entry of
        a table. Raises InputError if pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise needs_extra("a data frame", "tables", "pandas") from None
        return pandas.DataFrame(dict(self._columns()))

    def __repr__(self) -> str:
        text = f"<{type(self).__name__}: {self._title()}>"
        return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 4]}...>"


def as_plain(value: Any) -> Any:
    """Return a value as nested dictionaries, lists, finite numbers and texts; NaN and infinity
    become None. A dataclass becomes a dictionary of its fields with ``repr``."""
    # NumPy values have tolist; NumPy is not imported here, since simple commands do not need it
    if hasattr(value, "tolist") or isinstance(value, str | int | float | None):
        return finite(value)
    if is_dataclass(value):
        return {f.name: as_plain(getattr(value, f.name)) for f in fields(value) if f.repr}
    if isinstance(value, Mapping):
        return {str(name): as_plain(v) for name, v in value.items()}
    return [as_plain(v) for v in value] if isinstance(value, Iterable) else str(value)


def by_column(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def with_and(parts: Sequence[str]) -> str:
    """Return texts as a list in a sentence: "a, b and c"."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def few(names: Iterable[str], most: int = 4) -> str:
    """Return the first few distinct names as text, with the number of further names."""
    known = list(dict.fromkeys(names))
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(islice(known, most)) + more


def markdown_text(text: str) -> str:
    """Return a text on one line for Markdown, with entities for markup characters."""
    return re.sub(r"[\\`*\[\]<>&|]", lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


def consecutive(numbers: Iterable[int]) -> list[str]:
    """Return sorted numbers as texts; consecutive numbers become a range such as "2-5"."""
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        first, *_, last = [n for _, n in run] * 2
        parts.append(str(first) if first == last else f"{first}-{last}")
    return parts


def runs(numbers: Iterable[int]) -> str:
    """Return the text of :func:`consecutive`, with at most eight entries."""
    parts = consecutive(numbers)
    return ", ".join(parts[:8]) + (f" and {len(parts) - 8} more runs" if len(parts) > 8 else "")


_PERCENTAGE = re.compile(r"\d+(?:\.\d+)? %")


def one_percentage(lines: Iterable[str]) -> list[str]:
    """Return notes, of which those that differ only in percentages are one note with ranges."""
    alike: dict[str, list[str]] = {}
    for line in lines:
        alike.setdefault(_PERCENTAGE.sub("%", line), []).append(line)
    return [_with_ranges(some) if len(some) > 1 else some[0] for some in alike.values()]


def _with_ranges(lines: Sequence[str]) -> str:
    ranges = iter(zip(*map(_PERCENTAGE.findall, lines)))

    def between(_: re.Match[str]) -> str:
        shown = sorted(next(ranges), key=lambda text: float(text[:-2]))
        return shown[0] if shown[0] == shown[-1] else f"{shown[0][:-2]} to {shown[-1]}"

    return _PERCENTAGE.sub(between, lines[0])
