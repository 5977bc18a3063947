"""Predictions in words: numbers with their units, titles of settings, the sentence of an explanation, rows as CSV.

What the command line, the page and the report show to people is worded here, once. Nothing here computes a prediction.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulator.scenarios import Explanation, Record

LOSS = 0.985
"""A step that takes more than this factor off is worth a word."""


# -- numbers ----------------------------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    """A time for people, three significant digits.

    >>> seconds(0.0123456), seconds(3e-6), seconds(41.2)
    ('12.3 ms', '3.00 us', '41.2 s')
    """
    return _prefixed(value, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)))


def size(value: float) -> str:
    """An amount of memory for people, binary prefixes as memory is built.

    >>> size(80 * 2**30), size(50 * 2**20), size(16.06e9)
    ('80.0 GiB', '50.0 MiB', '15.0 GiB')
    """
    return _prefixed(value, (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0)))


def rate(value: float, unit: str) -> str:
    """Something a second for people, decimal prefixes.

    >>> rate(3.35e12, "B/s"), rate(989.4e12, "FLOP/s")
    ('3.35 TB/s', '989 TFLOP/s')
    """
    return _prefixed(value, (("P" + unit, 1e15), ("T" + unit, 1e12), ("G" + unit, 1e9), ("M" + unit, 1e6), (unit, 1.0)))


def ratio(value: float) -> str:
    """A speedup or bound.

    >>> ratio(1.234), ratio(12.34), ratio(float("inf"))
    ('1.23', '12.3', 'inf')
    """
    return f"{value:.2f}" if value < 10 or not math.isfinite(value) else f"{value:.3g}"


def percent(value: float) -> str:
    """A fraction in percent, at most one decimal.

    >>> percent(0.25), percent(0.1234)
    ('25 %', '12.3 %')
    """
    text = f"{100 * value:.1f}"
    return f"{text.removesuffix('.0')} %"


def _prefixed(value: float, units: Sequence[tuple[str, float]]) -> str:
    if not math.isfinite(value):
        return str(value)
    name, scale = next(((n, s) for n, s in units if abs(value) >= 0.9995 * s), units[-1])
    scaled = value / scale
    digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
    return f"{scaled:.{digits}f} {name}"


# -- sentences --------------------------------------------------------------------------------------------------------------------


def setting_title(r: Record) -> str:
    """What a group of records is a prediction of."""
    new = f" + {r.new_tokens} new" if r.phase == "generate" else ""
    spread = f", {r.devices} devices ({r.parallel})" if r.devices > 1 else ""
    formats = r.dtype if r.weight_dtype == r.kv_dtype == r.dtype else f"{r.dtype}, weights {r.weight_dtype}, cache {r.kv_dtype}"
    ideal = ", pruning overheads left out" if r.ideal else ""
    return f"{r.model}, {r.phase}, batch {r.batch}, seq {r.seq}{new}, {formats}, {r.runtime}{spread}{ideal}"


def uncalibrated(records: Sequence[Record]) -> tuple[str, ...]:
    """The note on devices whose prediction rests on something that was not fitted there; none where all are calibrated."""
    names = list(dict.fromkeys(r.hardware for r in records if not r.calibrated))
    return (f"{', '.join(names)}: not calibrated for everything this needs; the intervals are wide for it",) if names else ()


def conclusion(e: Explanation) -> str:
    """One plain sentence: what is promised, what is predicted, and what took the most."""
    r, losses = e.record, sorted((s for s in e.steps[1:] if s.factor < LOSS), key=lambda s: s.factor)
    gains = [s for s in e.steps[1:] if s.factor > 1 / LOSS and s.name != "rounding"]
    verdict = f"predicted {r.speedup:.2f}x ({r.speedup_lower:.2f}-{r.speedup_upper:.2f})"
    text = f"{r.family} at {percent(r.sparsity)} promises {e.steps[0].speedup:.2f}x, {verdict} on {r.hardware}, held by {r.limit}"
    if losses:
        text += ": lost to " + _and([f"{s.name} (x{s.factor:.2f})" for s in losses[:3]])
    elif r.speedup > 1:
        text += ": nearly all of it is granted"
    if gains:
        text += f"{';' if losses else ','} helped by " + _and([f"{s.name} (x{s.factor:.2f})" for s in gains[:2]])
    if r.speedup_upper < 1:
        text += "; the pruned model is slower"
    elif r.speedup_lower <= 1 and r.sparsity > 0:
        text += "; whether it is faster at all is within the interval"
    return text + "."


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# -- rows -------------------------------------------------------------------------------------------------------------------------


def finite(value: Any) -> Any:
    """A value for JSON: numbers that are not finite become null.

    >>> finite(float("nan")) is None, finite(1.5), finite("x")
    (True, 1.5, 'x')
    """
    return None if isinstance(value, float) and not math.isfinite(value) else value


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A CSV table with a header, numbers in full; what is missing or not finite is empty.

    >>> csv_text([{"a": 0.1, "b": None}])
    'a,b\\n0.1,\\n'
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow(["" if finite(v) is None else repr(v) if isinstance(v, float) else v for v in row.values()])
    return out.getvalue()
