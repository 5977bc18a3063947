"""What is text on the page and in the report, as HTML: facts of each GPU, notes, the table, the commands. Whatever came in is escaped."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING

from simulator.explore.answer import Answer, dense_of
from simulator.figures.style import label
from simulator.hardware.library import load_hardware
from simulator.predict.words import conclusion, csv_text, setting_title
from simulator.units import percent, ratio, seconds, size
from simulator.workload import PHASES

if TYPE_CHECKING:
    from simulator.explore.commands import Command
    from simulator.predict.rows import Record

UNITS = {
    "sparsity": "1",
    "realised_sparsity": "1",
    "batch": "sequences",
    "seq": "tokens",
    "dense_s": "s",
    "pruned_s": "s",
    "speedup": "1",
    "speedup_lower": "1",
    "speedup_upper": "1",
    "flop_bound": "1",
    "byte_bound": "1",
    "roofline_bound": "1",
    "measured_bound": "1",
    "efficiency": "1",
    "limit_share": "1",
    "level": "1",
    "new_tokens": "tokens",
    "devices": "1",
    "dense_memory_bytes": "B",
    "pruned_memory_bytes": "B",
    "capacity_bytes": "B",
}
"""Units of a record's numbers; 1 is a ratio."""


def table_csv(records: Sequence[Record]) -> str:
    """The table with every field of its records, numbers in full, units in the header.

    >>> from simulator.predict.table import table
    >>> table_csv(table(["llama-3.1-8b"], ["h100"], ["depth"], [0.25]).records).splitlines()[0][:74]
    'model,hardware,family,sparsity [1],realised_sparsity [1],phase,batch [sequ'
    """
    rows = [
        {f"{key} [{UNITS[key]}]" if key in UNITS else key: value for key, value in asdict(r).items()} for r in records
    ]
    return csv_text(rows) if rows else ""


def title(answer: Answer) -> str:
    """The setting in words; empty when there is no table."""
    return escape(setting_title(answer.table.records[0])) if answer.table.records else ""


_PARTS = {
    "gemm": ("GEMMs", PHASES),
    "attention_prefill": ("prefill attention", ("prefill", "generate")),
    "attention_decode": ("decode attention", ("decode", "generate")),
    "elementwise": ("elementwise operators", PHASES),
}
"""Operators of a profile, what people call them, and the phases that have them."""


def uncalibrated_parts(hardware: str, phase: str, dtype: str) -> list[str]:
    """What a prediction rests on that was not fitted on this GPU's own measurements.

    >>> uncalibrated_parts("rtx_4090", "decode", "bf16"), uncalibrated_parts("rtx_4090", "decode", "fp32")[0]
    ([], 'GEMMs')
    """
    hw = load_hardware(hardware)
    return [
        name
        for part, (name, phases) in _PARTS.items()
        if phase in phases and hw.section(part, dtype).status != "calibrated"
    ]


def facts_html(answer: Answer) -> str:
    """Of each GPU: the dense model's time, its memory, and whether the profile is calibrated for it."""
    items = []
    for name, r in dense_of(answer.table.records).items():
        fit = f"{size(r.dense_memory_bytes)} of {size(r.capacity_bytes)}"
        fits = f"fits, {fit}" if r.dense_fits else f"does not fit, {fit}"
        lacking = uncalibrated_parts(name, r.phase, r.dtype)
        sure = f"calibrated but for {', '.join(lacking)}" if lacking else "calibrated"
        items.append(
            f"<li><b>{escape(name)}</b> dense {escape(seconds(r.dense_s))}"
            f'<span class="{"good" if r.dense_fits else "bad"}">{escape(fits)}</span>'
            f'<span class="{"bad" if "GEMMs" in lacking else "soft" if lacking else "good"}">{escape(sure)}</span></li>'
        )
    return f'<ul class="facts">{"".join(items)}</ul>'


def notes_html(answer: Answer) -> str:
    """What a person should know, one line each."""
    return (
        f'<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in answer.notes)}</ul>' if answer.notes else ""
    )


def problems_html(lines: Sequence[str]) -> str:
    """What was wrong with the address, one line each."""
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def conclusions_html(answer: Answer) -> str:
    """The sentence of each explanation."""
    return "".join(f"<p>{escape(conclusion(e))}</p>" for e in answer.details)


_HEAD = (
    ("family", ""),
    ("removed", "asked for"),
    ("realised", "after rounding"),
    ("GPU", ""),
    ("speedup", ""),
    ("90 % interval", ""),
    ("FLOP bound", ""),
    ("byte bound", ""),
    ("roofline bound", ""),
    ("time", "pruned"),
    ("limit", "what holds most of the time"),
    ("memory", "pruned, and whether it fits"),
)


def table_html(answer: Answer, detail: str, at: float) -> str:
    """The table; rows of the family and sparsity in detail are marked."""
    records = answer.table.records
    if not records:
        return f"<p>{escape(answer.refused)}</p>"
    level = f"{percent(records[0].level)} interval"
    head = "".join(
        f'<th scope="col"{" title=" + chr(34) + hint + chr(34) if hint else ""}>{escape(level if name.startswith("90") else name)}</th>'
        for name, hint in _HEAD
    )
    ordered = sorted(records, key=lambda r: list(dict.fromkeys(x.family for x in records)).index(r.family))
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(_row(r, detail, at) for r in ordered)}</tbody></table>"
    )


def _row(r: Record, detail: str, at: float) -> str:
    verdict = "gain" if r.speedup_lower > 1 else "loss" if r.speedup_upper < 1 else ""
    memory = size(r.pruned_memory_bytes) + ("" if r.pruned_fits else " (too large)")
    cells = [
        percent(r.sparsity),
        percent(r.realised_sparsity),
        r.hardware,
        ratio(r.speedup),
        f"{ratio(r.speedup_lower)} to {ratio(r.speedup_upper)}",
        ratio(r.flop_bound),
        ratio(r.byte_bound),
        ratio(r.roofline_bound),
        seconds(r.pruned_s),
        r.limit,
        memory,
    ]
    marked = ' class="detail"' if r.family == detail and r.sparsity == at else ""
    classes = {3: f' class="{verdict}"'} if verdict else {}
    body = "".join(f"<td{classes.get(i, '')}>{escape(text)}</td>" for i, text in enumerate(cells))
    return f'<tr{marked}><th scope="row">{escape(label(r.family))}</th>{body}</tr>'


def commands_html(lines: Sequence[Command], *, copy: bool = True) -> str:
    """Command lines, each with what it gives and, on the page, a button that copies it."""
    button = '<button type="button" class="copy" data-copy>Copy</button>' if copy else ""
    if not lines:
        return '<p class="hint">None while nothing can be predicted.</p>'
    return "".join(
        f'<div class="command"><span>{escape(c.gives)}</span><code tabindex="0">{_arguments(c)}</code>{button}</div>'
        for c in lines
    )


def _arguments(command: Command) -> str:
    """A command line that breaks between arguments only, where there is room."""
    return " ".join(f"<i>{escape(shlex.quote(part))}</i>" for part in ("prunesim", *command.arguments))
