"""The tables of evidence, and the generated pages of accuracy and of engines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from calibration.evidence.measurements import published
from calibration.evidence.published import (
    MISS,
    NOT_USED,
    HeldOut,
    compare_dense,
    compare_gemms,
    compare_serving,
    compare_speedups,
    compare_throughput,
    held_out_models,
    ratio_scores,
)
from calibration.evidence.sets import SETS, Row, means
from calibration.validation.scoring import (
    Comparison,
    ScoredRows,
    percent,
    score,
    score_of,
    table,
)
from simulator.engines.engine import FEATURES, Loading, list_engines, load_engine
from simulator.errors import InputError
from simulator.hardware.library import list_hardware, load_hardware
from simulator.hardware.profile import HELD_OUT
from simulator.operators import CONSTANTS
from simulator.prediction.requests import by_key

DOCS = Path(__file__).resolve().parents[2] / "docs" / "generated"

DATA: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
KINDS: Mapping[str, str] = DATA["kinds"]


def head(page: str) -> str:
    """Return the text of a page before its first section or table."""
    return re.split(
        r"^(?=## |\|)", (DOCS / f"{page}.md").read_text("utf-8"), maxsplit=1, flags=re.MULTILINE
    )[0]


def filled(page: str, tables: Sequence[str]) -> str:
    """Return a page with its tables replaced by new tables, in order."""
    prose = re.split(r"(?:^\|.*\n)+", (DOCS / f"{page}.md").read_text("utf-8"), flags=re.MULTILINE)
    if len(prose) != len(tables) + 1:
        raise InputError(
            f"docs/generated/{page}.md: expected {len(tables)} tables to fill, got {len(prose) - 1}"
        )
    return prose[0] + "".join(f"{new}\n{text}" for new, text in zip(tables, prose[1:], strict=True))


def accuracy_page(rows: Sequence[Row]) -> str:
    """Return ``docs/generated/accuracy.md``: shipped fits, and every set of kernels."""
    kernels = accuracy_text([r for r in rows if not SETS[r["set"]].whole])
    return f"{head('accuracy')}## Shipped fits\n\n{sections_table()}\n\n{kernels}"


def sections_table() -> str:
    """Return the held-out error, %, and rows of each shipped section: the errors of ``prunesim
    hardware show``."""
    errors: dict[tuple[str, str, str], dict[str, str]] = {}
    for name in list_hardware():
        for stack, sections in load_hardware(name).stacks.items():
            for key, s in sections.items():
                if s.status == "calibrated" and s.provenance and "mape" in s.accuracy:
                    text = f"{100 * s.accuracy['mape']:.1f} ({s.provenance.rows:,})"
                    errors.setdefault((name, *key), {})[stack or "own"] = text
    stacks = dict.fromkeys(stack for one in errors.values() for stack in one)
    keys = sorted(errors, key=lambda key: (key[0], list(CONSTANTS).index(key[1])))
    cells = [
        [*key, HELD_OUT[key[1]], *(errors[key].get(stack, "") for stack in stacks)] for key in keys
    ]
    return table(["GPU", "operator", "format", "unseen", *stacks], cells, left=range(4))


def accuracy_text(rows: Sequence[Row]) -> str:
    parts = []
    for title in dict.fromkeys(r["table"] for r in rows):
        names, columns = zip(*columns_of_table(rows, title), strict=True)
        lines = zip(*columns, strict=True)
        parts += [f"## {title.replace('_', ' ')}", table(names, lines)]
    return "\n\n".join(parts) + "\n"


def columns_of_table(rows: Sequence[Row], title: str) -> list[tuple[str, list[str]]]:
    """Return one table as (title, cells) of each column, %. A table of held-out stacks has a line
    per stack, and their means at the end."""
    lines = means(rows, title)
    held_out = list(dict.fromkeys(r["held_out"] for r in lines if r["held_out"]))
    if held_out:
        groups = [*([r] for r in lines), lines]
        columns = [("held out", [*held_out, "mean"])]
    else:
        groups = [[r] for r in lines]
        columns = [("method", [r["method"] for r in lines])]
        columns.append(("rows", [str(r["rows"] or "all") for r in lines]))
    for name, key, digits in DATA["stack_columns" if held_out else "columns"]:
        if held_out or any(key in r for r in lines):
            unit = 1.0 if key == "speedup spearman" else 100.0
            values = [np.mean([r.get(key, np.nan) for r in group]) * unit for group in groups]
            cells = ["" if np.isnan(value) else f"{value:.{digits}f}" for value in values]
            columns.append((name, cells))
    return columns


def engine_tables() -> list[str]:
    """Return the tables of ``docs/generated/engines.md`` in their order. Engine parameters were
    fitted on the sources of split "fit", by hand where rows are few, and not on those of split
    "judge"."""
    given = compare_speedups(given=True)
    found = {
        "dense": compare_dense(),
        "speedup": compare_speedups(),
        "given": given,
        "serve": compare_serving(),
    }
    throughput, held_out = compare_throughput(), held_out_models()
    sparse, narrow = compare_gemms("2:4"), compare_gemms("narrower")
    common = {kind: [c for c in rows if not c.own_code] for kind, rows in found.items()}
    judged = {kind: [c for c in rows if c.split == "judge"] for kind, rows in common.items()}
    judged["measured"] = [
        c
        for c in judged["dense"]
        if load_hardware(c.gpu).section("gemm", "bf16").status != "default"
    ]
    by_engine = [
        (kind, c.engine, c.split, c)
        for kind, some in common.items()
        if kind != "serve"
        for c in some
    ]
    compared = (*common["dense"], *common["speedup"], *throughput, *sparse, *narrow)
    reasons = [
        [c.what, c.where, percent(c.error, "+.0f"), c.reason or "not known"]
        for c in compared
        if abs(c.error) > MISS
    ]
    assumed = dict.fromkeys(
        (c.source, c.assumed)
        for c in (*found["dense"], *found["speedup"], *throughput)
        if c.assumed
    )
    left_out = [r["left_out"] for name in ("dense", "speedups", "serving") for r in published(name)]
    excluded = {**Counter(filter(None, left_out)), **NOT_USED}
    return [
        _groups(["kind"], [(kind, c) for kind in KINDS for c in judged[kind]]),
        _groups(["kind", "engine", "split"], by_engine),
        loads_table(),
        _held_out_table(held_out),
        _groups(["engine", "gpu"], [(c.engine, c.gpu, c) for c in common["serve"]]),
        _comparisons(throughput, lambda value: f"{value:,.0f}/s"),
        _comparisons(found["dense"], _seconds),
        _comparisons(common["speedup"]),
        _comparisons(common["given"]),
        _comparisons([c for c in given if c.own_code and c.split == "judge"]),
        _comparisons(sparse),
        _comparisons(narrow),
        table(["what", "where", "error", "likely reason"], reasons, left=(0, 1, 3)),
        table(["source", "assumed"], list(assumed), left=(0, 1)),
        table(["rows", "why"], [[str(n), why] for why, n in excluded.items()], left=(1,)),
    ]


def _groups(names: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> str:
    """Return the scores of comparisons, which are the last of their row, by the rest of the row."""
    groups = by_key(rows, lambda each: each[:-1])
    order = list(KINDS)
    cells = []
    for key in sorted(groups, key=lambda k: [(order.index(n) if n in order else 0, n) for n in k]):
        s = score_of([each[-1] for each in groups[key]])
        errors = percent(s["median"]), percent(s["median bias"], "+.1f")
        shares = percent(s["coverage"], ".0f"), percent(s["half-width"], ".0f")
        titles = (KINDS.get(name, name) for name in key)
        cells.append([*titles, str(len(groups[key])), *errors, *shares])
    header = [*names, "rows", "median error", "bias", "coverage", "half-width"]
    return table(header, cells, left=range(len(names)))


def loads_table() -> str:
    """Return which features of a checkpoint each stock engine loads; the benchmark's engine is no
    server."""
    engines = [engine for engine in map(load_engine, list_engines()) if engine.name != "reference"]

    def cell(found: Loading) -> str:
        few, number = ", ".join(found.model_types), len(found.model_types)
        types = few if number <= 3 else f"{number} model types"
        multiple = f"multiples of {found.multiple}" if found.multiple > 1 else ""
        return "; ".join(filter(None, (types, multiple))) or "yes" if found.value else "no"

    cells = [[text, *(cell(e.loads[name]) for e in engines)] for name, text in FEATURES.items()]
    header = ["checkpoint with", *(engine.name for engine in engines)]
    return table(header, cells, left=range(len(header)))


def _held_out_table(groups: Sequence[HeldOut]) -> str:
    cells = []
    for engine, members in by_key(groups, lambda x: x.engine).items():
        for x in members:
            error = score(ScoredRows(x.group.request_s, x.request_s))["median"]
            cells.append([engine, x.model, x.hardware, x.dtype, *_ratios([x]), percent(error)])
        dense = _ratios([x for x in members if not x.experts])
        cells.append([engine, "all dense models", "", "", *dense, ""])
    header = ["engine", "held-out model", "GPU", "format", "rows"]
    errors = ["TPOT: median error", "bias", "request: median error"]
    return table([*header, *errors], cells, left=range(4))


def _ratios(groups: Sequence[HeldOut]) -> tuple[str, str, str]:
    s = ratio_scores(groups)
    return f"{s['runs']:.0f}", percent(s["median"]), percent(s["median bias"], "+.1f")


def _comparisons(
    rows: Iterable[Comparison], text: Callable[[float], str] = lambda value: f"{value:.2f}x"
) -> str:
    cells = []
    for c in rows:
        interval = f"{text(c.lower)} to {text(c.upper)}"
        numbers = text(c.measured), text(c.predicted), interval, percent(c.error, "+.1f")
        cells.append([c.engine or "GEMMs", c.what, c.where, *numbers, c.source])
    header = ["engine", "what", "where", "measured", "predicted", "interval", "error", "source"]
    return table(header, cells, left=(0, 1, 2, 7))


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
