"""Predictions in words: titles of settings, the sentence of an explanation, rows as CSV; for the command line, the page
and the report."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simulator.units import finite, percent, seconds

if TYPE_CHECKING:
    from simulator.predict.rows import Record
    from simulator.predict.table import Explanation

LOSS = 0.985
"""A step that takes more than this factor off is worth a word."""


def markdown_text(text: str) -> str:
    """Text as Markdown and HTML show it, on one line: what either would take for markup becomes an entity.

    >>> markdown_text("<b> a|b *c*")
    '&#60;b&#62; a&#124;b &#42;c&#42;'
    """
    return re.sub(r"[\\`*\[\]<>&|]", lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


def setting_title(r: Record) -> str:
    """What a group of records is a prediction of."""
    from simulator.predict.settings import batch_name  # late, as below: a program's help needs none of it

    new = f" + {r.new_tokens} new" if r.new_tokens else ""
    spread = f", {r.devices} devices ({r.parallel})" if r.devices > 1 else ""
    plain = r.weight_dtype == r.kv_dtype == r.dtype
    formats = r.dtype if plain else f"{r.dtype}, weights {r.weight_dtype}, cache {r.kv_dtype}"
    ideal = ", pruning overheads left out" if r.ideal else ""
    return (
        f"{r.model}, {r.phase}, {batch_name(r.phase)} {r.batch}, seq {r.seq}{new}, {formats}, {r.engine}{spread}{ideal}"
    )


def uncalibrated(records: Sequence[Any]) -> tuple[str, ...]:
    """The note on devices whose prediction rests on something that was not fitted there, if there are any."""
    names = ", ".join(dict.fromkeys(r.hardware for r in records if not r.calibrated))
    return (f"{names}: not calibrated for everything this needs; the intervals are wide for it",) if names else ()


def host_rules(e: Explanation) -> str:
    """What to know first where the host sets the pace, else ""."""
    if not e.layer_s:
        return ""
    from simulator.engines.engine import load_engine

    engine = load_engine(e.dense.meta.engine)
    text = (
        f"{engine.title}: the host spends {seconds(e.layer_s)} a layer, and while that is more than the device needs, "
    )
    text += "narrower layers change nothing: fewer layers or a CUDA graph do"
    narrower = {"width", "width_cross", "low_rank"} & set(e.record.family.split("+"))
    if narrower and engine.own_code.source:
        text += f" (and modelling code of a pruned model's own has lost up to x{engine.own_code.value:g} beside)"
    return f"{text}. "


def conclusion(e: Explanation) -> str:
    """One plain sentence: what is promised, what is predicted, and what took the most."""
    r, losses = e.record, sorted((s for s in e.steps[1:] if s.factor < LOSS), key=lambda s: s.factor)
    gains = [s for s in e.steps[1:] if s.factor > 1 / LOSS and s.name != "rounding"]
    verdict = f"predicted {r.speedup:.2f}x ({r.speedup_lower:.2f}-{r.speedup_upper:.2f})"
    what = f"{r.pruned} ({r.family})" if r.pruned else r.method or r.family
    promise = f"{what} at {percent(r.sparsity)} promises {e.steps[0].speedup:.2f}x"
    text = f"{host_rules(e)}{promise}, {verdict} on {r.hardware} in {r.engine}, {r.bottleneck}-bound"
    if losses:
        text += ": lost to " + _and([f"{s.name} (x{s.factor:.2f})" for s in losses[:3]])
    elif r.speedup > 1:
        text += ": nearly all of it is granted"
    if gains:
        text += f"{';' if losses else ','} helped by " + _and([f"{s.name} (x{s.factor:.2f})" for s in gains[:2]])
    if e.reason:
        text += f"; {e.reason}"
    if r.speedup_upper < 1:
        text += "; the pruned model is slower"
    elif r.speedup_lower <= 1 and r.sparsity > 0:
        text += "; whether it is faster at all is within the interval"
    return text + "."


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Iterable[str] = ()) -> str:
    """A CSV table with a header (the columns, else the names of the first row), numbers in full; what is missing or not
    finite is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = tuple(columns or rows[0])
    writer.writerow(names)
    for values in ([row[name] for name in names] for row in rows):
        writer.writerow(["" if finite(v) is None else repr(v) if isinstance(v, float) else v for v in values])
    return out.getvalue()
