"""Turn the rows of :func:`calibration.validation.accuracy.run_protocol` into tables: means over seeds, titles, cells.

Use :func:`titles` and :func:`columns_of_table`; :func:`means` for the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calibration.validation import stacks
from calibration.validation.protocol import Row

# fmt: off
SCORE_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("MAPE", "mape", 2), ("median", "median", 2), ("p95", "p95", 1), ("bias", "bias", 2), ("m<=16", "mape m<=16", 1),
    ("17-256", "mape m<=256", 1), (">256", "mape m>256", 1), ("over 10 us", "mape over 10us", 2),
    ("speedup median", "speedup median", 2), ("speedup p95", "speedup p95", 1), ("Spearman", "speedup spearman", 3),
    ("coverage", "coverage", 1), ("lowest", "lowest coverage", 1), ("width", "width", 1),
    ("ratios in", "ratio coverage", 1), ("ratio width", "ratio width", 1),
)
STACK_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("MAPE", "mape", 2), ("p95", "p95", 1), ("in", "coverage", 1), ("width", "width", 0),
    ("ratio p95", "speedup p95", 1), ("ratio in", "ratio coverage", 1), ("ratio width", "ratio width", 0),
)
# fmt: on
"""Columns of a table, and of a table of held-out stacks: title, score, digits. Columns without a value are omitted."""


def titles(rows: Sequence[Row]) -> list[str]:
    """Return the titles of the tables, in the order of the run."""
    return list(dict.fromkeys(str(r["table"]) for r in rows))


def means(rows: Sequence[Row], table: str) -> list[Row]:
    """Return the rows of one table, averaged over seeds."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for r in rows:
        if r["table"] == table:
            groups.setdefault((r.get("held_out", ""), r["method"], r["rows"]), []).append(r)
    out = []
    for (held_out, method, size), group in groups.items():
        names = [n for n, v in group[0].items() if isinstance(v, float) and all(n in r for r in group)]
        mean = {n: float(np.mean([r[n] for r in group])) for n in names}
        out.append({"held_out": held_out, "method": method, "rows": size, "seeds": len(group), **mean})
    return sorted(out, key=lambda r: (r["held_out"], 0 if r["method"] == "as shipped" else r["rows"] or 10**9))


def columns_of_table(rows: Sequence[Row], table: str) -> list[tuple[str, list[str]]]:
    """Return one table as (title, cells) of each column; cells are means over seeds."""
    lines = means(rows, table)
    if any(r["held_out"] for r in lines):
        return _columns_of_stacks(lines)
    columns = [("method", [str(r["method"]) for r in lines]), ("rows", [str(r["rows"] or "all") for r in lines])]
    for title, score, digits in SCORE_COLUMNS:
        if any(score in r for r in lines):
            columns.append((title, [_cell(r, score, digits) for r in lines]))
    return columns


def _columns_of_stacks(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """Return a table of one line per held-out stack and number of its rows, and their means at the end: scores of the
    local update (0 rows: as shipped), and the MAPE of the simpler alternatives."""
    scores = {(r["held_out"], r["method"], r["rows"]): r for r in rows}
    names = list(dict.fromkeys(r["held_out"] for r in rows))
    sizes = sorted({r["rows"] for r in rows})
    lines = [(name, size, [name]) for name in names for size in sizes] + [("mean", size, names) for size in sizes]

    def cells(method: str, score: str, digits: int) -> list[str]:
        out = []
        for _, size, members in lines:
            key = "as shipped" if not size and method == "posterior" else method
            group = [scores.get((member, key, size), {}) for member in members]
            mean = {score: np.mean([r[score] for r in group])} if all(score in r for r in group) else {}
            out.append(_cell(mean, score, digits))
        return out

    columns = [("held out", [name for name, *_ in lines]), ("rows", [str(size) for _, size, _ in lines])]
    columns += [(title, cells("posterior", score, digits)) for title, score, digits in STACK_COLUMNS]
    alternatives = [(name, cells(name, "mape", 2)) for name in stacks.ALTERNATIVES]
    return columns + [(name, values) for name, values in alternatives if any(values)]


def _cell(row: Mapping[str, Any], score: str, digits: int) -> str:
    value = row.get(score, np.nan)
    return "" if value != value else f"{value:.{digits}f}"
