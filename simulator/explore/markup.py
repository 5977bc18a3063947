"""Format the texts of the page and the report as HTML: facts per GPU, notes, table, commands. All input is escaped.

Use :func:`texts` for all texts, :func:`table_csv` for the table as a file.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from simulator.engines.engine import load_engine
from simulator.explore.commands import Command, commands
from simulator.explore.predictions import Candidate, Predictions, curves, predictions, services
from simulator.explore.state import EXISTING, State
from simulator.figures.paper import BATCHES
from simulator.figures.style import label
from simulator.files.csv import csv_text
from simulator.prediction.breakeven import break_even
from simulator.prediction.compare import PARTS
from simulator.prediction.explain import conclusion
from simulator.prediction.scenario import batch_name
from simulator.prediction.service import sentences
from simulator.pruning import FAMILIES
from simulator.units import percent, ratio, seconds, seconds_between, size

if TYPE_CHECKING:
    from simulator.prediction.result import Result

# fmt: off
UNITS = {
    **dict.fromkeys((
        "sparsity", "realised_sparsity", "speedup", "speedup_lower", "speedup_upper", "flop_bound", "byte_bound",
        "roofline_bound", "measured_bound", "efficiency", "bottleneck_share", "uncalibrated_share", "level", "devices",
    ), "1"),
    **dict.fromkeys(("dense_memory_bytes", "pruned_memory_bytes", "capacity_bytes"), "B"),
    "batch": "sequences", "seq": "tokens", "new_tokens": "tokens", "cached_prefix": "tokens",
    **dict.fromkeys(("dense_s", "dense_lower", "dense_upper", "pruned_s", "pruned_lower", "pruned_upper"), "s"),
    **{f"{t}_{end}": "s" for t in ("ttft", "tpot", "dense_ttft", "dense_tpot") for end in ("s", "lower", "upper")},
    **dict.fromkeys(("tokens_per_s", "dense_tokens_per_s"), "1/s"),
    **dict.fromkeys(("dense_largest_batch", "pruned_largest_batch"), "sequences"),
}
"""Units of a result's numbers; 1 is a ratio."""

_HEAD = {
    "pruning": "", "removed": "requested", "realised": "after rounding", "GPU": "", "speedup": "", "interval": "",
    "FLOP bound": "", "byte bound": "", "roofline bound": "", "time": "pruned",
    "bottleneck": "largest share of the pruned model's time", "memory": "pruned, and whether it fits",
}
"""Columns of the table and their hover texts."""
# fmt: on


def texts(state: State) -> dict[str, str]:
    """Return all texts as HTML, by the element that shows them."""
    found, at = predictions(state), percent(state.at)
    pruned = state.load_pruned() if state.explained == EXISTING else None
    detail = escape(pruned.name if pruned is not None else label(state.explained))
    both = f"{detail} at {at}" if state.explained in FAMILIES else detail
    over = {"seq": "sequence"}.get(state.over, batch_name(state.phase))
    bands = f"Bands: {percent(state.scenario.level)} interval."
    elsewhere = " The measured dense time is not used here." if state.scenario.dense_s is not None else ""
    results, notes = found.table, _items(map(escape, found.notes), "notes") if found.notes else ""
    return {
        "title": escape(results[0].scenario) if results else "",
        "facts": facts_html(found, state),
        "notes": notes,
        "pinned": pinned_html(state),
        "table": table_html(found, state.explained, state.at),
        "commands": commands_html(commands(state, found)),
        "about-speedup": "Points are at the requested sparsity; hover for the realised sparsity. "
        f"{bands} Black: bounds of {detail}.",
        "h-over": f"Speedup over {over}",
        "about-over": f"{_break_even(state)}Families at {at}, prunings as written. {bands} "
        f"Pale points: the dense model exceeds the memory.{elsewhere}",
        "about-latency": f"{_about_latency(state, both)} {bands}{elsewhere}",
        "about-roofline": f"GEMMs of the layers, dense (hollow) and with {both} (filled), on the datasheet roofline.",
        "about-waterfall": paragraphs(_conclusions(found)),
        "about-crossover": f"Fastest of the selected families at {at}, {state.phase}. "
        f"Equal sparsity is not equal quality.{elsewhere}",
    }


def paragraphs(lines: Iterable[str]) -> str:
    """Return one paragraph per line."""
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _break_even(state: State) -> str:
    """Return from which batch or length the pruning in detail pays, a paragraph per GPU."""
    own = [c.result for c in curves(state, state.over).candidates if c.key == state.explained]
    return paragraphs(b.sentence for b in break_even(own))


def _about_latency(state: State, both: str) -> str:
    """Return what the points of throughput over latency are; of a serve after the conclusion on each service."""
    if state.phase != "serve":
        batches = f"{BATCHES[0]} to {BATCHES[-1]} that fits in memory"
        return f"Dense and {both}, a point per batch from {batches}; the large one has {state.batch}."
    found = services(state).found
    lines = [
        f"{service.points[0].hardware}: {line}" if len(found) > 1 else line
        for service in found
        for line in sentences(service)
    ]
    ring = ", a ring around the most within the limits" if state.ttft_ms or state.tpot_ms else ""
    text = (
        f"Dense and {both}, points up to the most that fit in memory; the large one has {state.batch} requests{ring}."
    )
    return f"{paragraphs(lines)}{text}"


def _items(lines: Iterable[str], name: str) -> str:
    return f'<ul class="{name}">{"".join(f"<li>{line}</li>" for line in lines)}</ul>'


def table_csv(results: Sequence[Result]) -> str:
    """Return the table as CSV: every field of its results, numbers in full, units in the header.

    >>> from simulator.prediction.table import table
    >>> table_csv(table(["llama-3.1-8b"], ["h100"], ["depth"], [0.25]).rows).splitlines()[0][:74]
    'model,hardware,engine,family,sparsity [1],realised_sparsity [1],phase,batc'
    """
    names = {key: f"{key} [{unit}]" for key, unit in UNITS.items()}
    rows = [{names.get(key, key): value for key, value in r.to_dict().items()} for r in results]
    return csv_text(rows) if rows else ""


def facts_html(found: Predictions, state: State) -> str:
    """Return the dense time, memory, calibration and other gains of each GPU, and the engine's title."""
    if not found.table:
        return ""
    dense: dict[str, Result] = {}
    for r in found.table:
        dense.setdefault(r.hardware, r)
    pruned = {e.result.hardware: Candidate(state.explained, e.result) for e in found.details}
    facts = (_fact(r, pruned.get(name)) for name, r in dense.items())
    return _items(facts, "facts") + f'<p class="engine">{escape(load_engine(state.engine).title)}.</p>'


def _fact(r: Result, pruned: Candidate | None) -> str:
    lacking = [] if r.calibrated else [PARTS[name] for name in r.uncalibrated.split("+")]
    fits = f"{'fits' if r.dense_fits else 'does not fit'}, {size(r.dense_memory_bytes)} of {size(r.capacity_bytes)}"
    status = f"calibrated except {', '.join(lacking)}" if lacking else "calibrated"
    look = "bad" if "GEMMs" in lacking else "soft" if lacking else "good"
    return (
        f"<b>{escape(r.hardware)}</b> dense {escape(seconds_between(r.dense_s, r.dense_lower, r.dense_upper))}"
        f'<span class="{"good" if r.dense_fits else "bad"}">{escape(fits)}</span>'
        f'<span class="{look}">{escape(status)}</span><span class="gains">{escape(_gains(r, pruned))}</span>'
    )


def _gains(r: Result, pruned: Candidate | None) -> str:
    """Return throughput, latencies and largest batch of the dense and the pruned model."""
    if pruned is None:
        of_dense = _serving(r, r.dense_tokens_per_s, r.dense_ttft_s, r.dense_tpot_s, r.dense_largest_batch)
        return f"dense: {', '.join(f'{name} {text}' for name, text in of_dense.items())}"
    parts = ", ".join(f"{name} {text}" for name, text in _served(pruned.result).items())
    return f"dense → {pruned.title} at {percent(pruned.result.sparsity)}: {parts}"


def _served(r: Result) -> dict[str, str]:
    """Return numbers of the dense and the pruned model as they are served, by name."""
    pruned = _serving(r, r.tokens_per_s, r.ttft_s, r.tpot_s, r.pruned_largest_batch)
    dense = _serving(r, r.dense_tokens_per_s, r.dense_ttft_s, r.dense_tpot_s, r.dense_largest_batch)
    return {name: f"{text} → {pruned[name]}" for name, text in dense.items()}


def _serving(r: Result, rate: float | None, ttft: float | None, tpot: float | None, batch: int) -> dict[str, str]:
    """Return numbers of a served model by name; latencies only if a request has both, else they are the time itself."""
    out = {}
    if rate is not None:
        each = rate / r.devices
        out["tokens/s per GPU"] = f"{each:,.0f}" if each >= 100 else f"{each:.1f}"
    if ttft is not None and tpot is not None:
        out |= {"TTFT": seconds(ttft), "TPOT": seconds(tpot)}
    return out | {f"largest {batch_name(r.phase)}": f"{batch:,}"}


def _conclusions(found: Predictions) -> Iterable[str]:
    """Return one sentence per waterfall, with the engine if there are two."""
    if not found.versus:
        return map(conclusion, found.details)
    return (f"{e.result.engine}: {conclusion(e)}" for e in (*found.details, *found.versus))


def table_html(found: Predictions, detail: str, at: float) -> str:
    """Return the table; rows of the family and sparsity in detail are marked."""
    if not found.table:
        return f"<p>{escape(found.problem)}</p>"
    level = f"{percent(found.table[0].level)} interval"
    head = ""
    for name, hint in _HEAD.items():
        title = f' title="{hint}"' if hint else ""
        head += f'<th scope="col"{title}>{level if name == "interval" else name}</th>'
    keys = list(dict.fromkeys(key for key, _ in found.candidates))
    body = "".join(_row(c, detail, at) for c in sorted(found.candidates, key=lambda c: keys.index(c.key)))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _row(candidate: Candidate, detail: str, at: float) -> str:
    key, r = candidate
    look = ' class="gain"' if r.speedup_lower > 1 else ' class="loss"' if r.speedup_upper < 1 else ""
    memory = size(r.pruned_memory_bytes) + ("" if r.pruned_fits else " (too large)")
    interval = f"{ratio(r.speedup_lower)} to {ratio(r.speedup_upper)}"
    before = [percent(r.sparsity), percent(r.realised_sparsity), r.hardware]
    after = [interval, *map(ratio, (r.flop_bound, r.byte_bound, r.roofline_bound)), seconds(r.pruned_s)]
    after += [r.bottleneck, memory]
    cells = ["".join(f"<td>{escape(text)}</td>" for text in part) for part in (before, after)]
    speedup = f"<td{look}>{ratio(r.speedup)}</td>"
    marked = ' class="detail"' if key == detail and (key not in FAMILIES or r.sparsity == at) else ""
    return f'<tr{marked}><th scope="row">{escape(candidate.title)}</th>{speedup.join(cells)}</tr>'


def pinned_html(state: State) -> str:
    """Return the pruning in detail of the pinned state, A, next to that of the current one, B; "" without a pin. Rows
    that differ are marked."""
    if state.pin is None:
        return ""
    columns: list[tuple[str, dict[str, str]]] = []
    for side, one in (("A, pinned", state.pin), ("B, shown", state)):
        found = predictions(one)
        facts = [_compared(e.result) for e in found.details]
        missing = found.problem or next(iter(found.notes), "nothing to predict")
        columns += [(side, some) for some in facts or [{"pruning": missing}]]
    body, names = "", dict.fromkeys(name for _, facts in columns for name in facts)
    for name in names:
        cells = [facts.get(name, "") for _, facts in columns]
        marked = ' class="detail"' if len(set(cells)) > 1 else ""
        body += f'<tr{marked}><th scope="row">{name}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
    head = "".join(f'<th scope="col">{side}</th>' for side, _ in columns)
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return (
        '<div class="head"><h2 id="h-pinned">Two settings side by side</h2>'
        '<button type="button" data-pin="remove">Remove A</button></div>'
        f'<div class="table" tabindex="0" role="region" aria-labelledby="h-pinned">{table}</div>'
    )


def _compared(r: Result) -> dict[str, str]:
    """Return the numbers of a result by name."""
    large = "" if r.pruned_fits else " (too large)"
    return {
        "model": r.model,
        "GPU": f"{r.devices} x {r.hardware}" if r.devices > 1 else r.hardware,
        "engine": r.engine,
        "request": f"{r.phase}, {batch_name(r.phase)} {r.batch}, seq {r.seq}",
        "format": r.dtype if r.weight_dtype == r.dtype else f"{r.dtype}, weights {r.weight_dtype}",
        "pruning": r.pruning,
        "dense time": seconds_between(r.dense_s, r.dense_lower, r.dense_upper),
        "pruned time": seconds_between(r.pruned_s, r.pruned_lower, r.pruned_upper),
        "speedup": f"{ratio(r.speedup)} ({ratio(r.speedup_lower)} to {ratio(r.speedup_upper)})",
        "memory": f"{size(r.dense_memory_bytes)} → {size(r.pruned_memory_bytes)}{large}",
        **_served(r),
    }


def commands_html(lines: Sequence[Command], *, copy: bool = True) -> str:
    """Return command lines that break between arguments only, with their names and, on the page, a copy button."""
    if not lines:
        return '<p class="hint">No commands, because there are no predictions.</p>'
    button = '<button type="button" class="copy" data-copy>Copy</button>' if copy else ""
    out = []
    for c in lines:
        code = " ".join(f"<i>{escape(shlex.quote(part))}</i>" for part in ("prunesim", *c.arguments))
        text = f'<span>{escape(c.gives)}</span><code tabindex="0">{code}</code>'
        out.append(f'<div class="command">{text}{button}</div>')
    return "".join(out)
