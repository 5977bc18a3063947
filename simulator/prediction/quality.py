"""Read quality tables from CSV and check them; one row is the measured quality of one pruned model.

Columns are the fields of :class:`QualityRow` (options and note are optional; the family can also be
a published method or a method file, relative to the table) and the optional
``relative_loss``, which is checked against the two values. Numbers are comparable only on one axis:
the same metric under the same protocol, hence with the same dense value.

A CSV with the columns ``results,family,sparsity`` lists a model per row, one of family ``dense``.
``results`` is a file that ``lm_eval --output_path`` of EleutherAI's lm-evaluation-harness writes,
or its folder. Every metric that the dense and the pruned model share becomes a row, and so does the
mean of ``acc`` over their tasks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from simulator.errors import InputError, one_line, unknown
from simulator.files.csv import CsvTable, csv_text, read_csv
from simulator.files.read import parse_bounded, read_bounded
from simulator.prediction.requests import by_key
from simulator.pruning import FAMILIES
from simulator.pruning._family import SUFFIXES
from simulator.pruning._methods import METHODS, Method
from simulator.pruning._steps import read_steps

FOLDER = Path(__file__).with_name("published")
_TEXTS = ("method", "family", "model", "metric", "protocol", "source")
_VALUES = ("method", "family", "model", "sparsity", "metric", "higher_is_better", "dense", "pruned")
REQUIRED: tuple[str, ...] = (*_VALUES, "protocol", "source")
COLUMNS: tuple[str, ...] = (*_VALUES, "relative_loss", "protocol", "source", "options", "note")
LOSS_TOLERANCE = 5e-4  # tolerance of a stated loss, absolute or relative: tables print few digits
_TRUTH = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


@dataclass(frozen=True, order=True)
class Axis:
    """One metric under one protocol, whose values are comparable."""

    metric: str
    protocol: str

    def __str__(self) -> str:
        return f"{self.metric} [{self.protocol}]"


@dataclass(frozen=True)
class QualityRow:
    method: str
    family: str
    model: str
    sparsity: float  # as the source counts it
    metric: str
    higher_is_better: bool
    dense: float  # value of the metric
    pruned: float
    protocol: str  # how it was measured: data, length, calibration, fine-tuning
    source: str  # source of the row
    # options of the family; in a file name=value, separated by semicolons
    options: tuple[tuple[str, Any], ...] = ()
    note: str = ""

    @property
    def relative_loss(self) -> float:
        """Drop of the metric (rise of a perplexity) relative to the dense model; below 0 if quality
        improved."""
        drop = self.dense - self.pruned if self.higher_is_better else self.pruned - self.dense
        return drop / self.dense

    @property
    def axis(self) -> Axis:
        return Axis(self.metric, self.protocol)


@dataclass(frozen=True)
class QualityTable:
    rows: tuple[QualityRow, ...]
    name: str = "quality table"  # for messages
    metric: str = ""  # default metric, if any

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(sorted({r.model for r in self.rows}))

    def of_model(self, model: str) -> QualityTable:
        """Return the rows of one model (case is ignored); raise :class:`InputError` if there are
        none."""
        rows = tuple(r for r in self.rows if r.model.lower() == model.lower())
        if not rows:
            raise InputError(f"{self.name}: {unknown('model', model, self.models)}")
        return replace(self, rows=rows)

    def axes(self) -> tuple[Axis, ...]:
        """Return the axes of the rows: those with most families first, then most rows."""
        on = by_key(self.rows, lambda r: r.axis)
        return tuple(sorted(on, key=lambda a: (-len({r.family for r in on[a]}), -len(on[a]), a)))

    def on_axis(self, axis: Axis) -> QualityTable:
        return replace(self, rows=tuple(r for r in self.rows if r.axis == axis))


def choose_axis(
    table: QualityTable, metric: str = "", protocol: str = "", *, strict: bool = False
) -> Axis:
    """Return the axis of a metric and a protocol, given by name or part of it; empty text matches
    all. A table's default metric takes precedence. Of several axes the one with most families and
    rows is returned; with ``strict`` this is an InputError."""
    axes, metric = table.axes(), metric if metric or protocol else table.metric
    fitting = [
        a
        for a in axes
        if metric.lower() in a.metric.lower() and protocol.lower() in a.protocol.lower()
    ]
    exact = [a for a in fitting if metric.lower() == a.metric.lower()]
    if metric and exact:
        fitting = exact
    listed = "; ".join(map(str, fitting or axes))
    if not fitting:
        requested = " and ".join(
            f"{k} {text!r}" for k, text in (("metric", metric), ("protocol", protocol)) if text
        )
        raise InputError(f"{table.name}: no rows with {requested}; there are: {listed}")
    if strict and len(fitting) > 1:
        raise InputError(
            f"{table.name}: mixed metrics or protocols; choose one with --metric and --protocol:"
            f" {listed}"
        )
    return fitting[0]


def list_quality() -> tuple[str, ...]:
    return tuple(sorted(p.stem for p in FOLDER.glob("*.csv")))


def load_quality(name_or_path: str | Path | None = None) -> QualityTable:
    """Load a shipped table by name, a CSV file by path, or all shipped tables, rows measured by
    this project first."""
    if name_or_path is None:
        tables = [
            load_quality(name)
            for name in sorted(list_quality(), key=lambda name: name == "published")
        ]
        return QualityTable(tuple(r for t in tables for r in t.rows), "shipped quality tables")
    name = str(name_or_path)
    shipped = FOLDER / f"{name}.csv"
    path = shipped if shipped.is_file() and "/" not in name else Path(name_or_path)
    if not path.exists():
        if not path.suffix:
            raise unknown("quality table", name, list_quality())
        known = ", ".join(list_quality())
        raise InputError(f"{path}: no such file; expected a quality table (CSV), or one of {known}")
    return read_quality(read_bounded(path), str(path), path.parent)


def read_quality(
    text: bytes | str, name: str = "quality table", folder: Path = Path()
) -> QualityTable:
    """Return the table of the text of a CSV file in a folder; errors are one line ``file:line:
    column: reason``."""
    table = read_csv(text, name)
    if "results" in table.header:
        table = expanded(read_csv(text, name, LISTED), folder)
    else:
        table = read_csv(text, name, REQUIRED)
    rows = table.each(partial(_row, folder))
    _check_together(rows, table.lines, name)
    default = next((r.metric for r in rows if r.metric.startswith(MEAN)), "")
    return QualityTable(tuple(rows), name, default)


def _row(folder: Path, cells: Mapping[str, str]) -> QualityRow:
    for column in _TEXTS:
        if not cells[column]:
            raise InputError(f"{column}: is empty")
    family = cells["family"]
    if family.endswith(SUFFIXES):
        family = str(folder / family)
        Method.read(family)
    elif family not in FAMILIES and family not in METHODS:
        raise InputError(f"family: {unknown('family', family, [*FAMILIES, *METHODS], FAMILIES)}")
    sparsity, dense, pruned = (number_of(cells, c) for c in ("sparsity", "dense", "pruned"))
    if not 0.0 <= sparsity < 1.0:
        hint = f"; for {sparsity:g} % write {sparsity / 100:g}" if 1.0 < sparsity < 100.0 else ""
        raise InputError(f"sparsity: expected a fraction in [0, 1), got {cells['sparsity']}{hint}")
    if dense <= 0.0:
        raise InputError(f"dense: expected a number above 0, got {cells['dense']}")
    if pruned < 0.0:
        raise InputError(f"pruned: expected a number from 0 up, got {cells['pruned']}")
    higher = _TRUTH.get(cells["higher_is_better"].lower())
    if higher is None:
        raise InputError(
            f"higher_is_better: expected true or false, got {cells['higher_is_better']!r}"
        )
    row = QualityRow(
        **{column: cells[column] for column in _TEXTS} | {"family": family},
        sparsity=sparsity,
        higher_is_better=higher,
        dense=dense,
        pruned=pruned,
        options=parse_options(cells.get("options", ""), family),
        note=cells.get("note", ""),
    )
    if not math.isfinite(row.relative_loss):
        raise InputError(
            f"dense: {cells['dense']} is too small for a ratio with pruned {cells['pruned']}"
        )
    if cells.get("relative_loss"):
        written, loss = number_of(cells, "relative_loss"), row.relative_loss
        if abs(written - loss) > LOSS_TOLERANCE * max(1.0, abs(loss)):
            raise InputError(
                f"relative_loss: expected {loss:.4f} (from dense and pruned), got {written:g}"
            )
    return row


def number_of(cells: Mapping[str, str], column: str) -> float:
    try:
        value = float(cells[column])
    except ValueError:
        raise InputError(
            f"{column}: expected a number, got {one_line(cells[column], 40)!r}"
        ) from None
    if not abs(value) < 1e300:  # a sum of two would be infinite
        raise InputError(f"{column}: expected a finite number, got {one_line(cells[column], 40)}")
    return value


def parse_options(text: str, family: str) -> tuple[tuple[str, Any], ...]:
    """Return the options of a family from ``name=value`` texts separated by semicolons."""
    parts = [part.strip() for part in text.split(";") if part.strip()]
    if not parts:
        return ()
    try:
        step, *more = read_steps(f"{family} 0.5 {' '.join(parts)}")
    except InputError as error:
        raise InputError(f"options: {error}") from None
    if more or step.layers is not None:
        raise InputError(f"options: expected options of {family} for all layers, got {text!r}")
    return step.options


def _check_together(rows: Sequence[QualityRow], lines: Sequence[int], name: str) -> None:
    """Check that rows on one axis share the direction and the dense value, and that none occurs
    twice."""
    first: dict[tuple[Any, ...], tuple[QualityRow, int]] = {}
    for row, line in zip(rows, lines):
        like, earlier = first.setdefault((row.metric,), (row, line))
        if like.higher_is_better != row.higher_is_better:
            other = f"line {earlier} has {str(like.higher_is_better).lower()} for {row.metric!r}"
            raise InputError(f"{name}:{line}: higher_is_better: mixed metric: {other}")
        like, earlier = first.setdefault((row.model, row.axis), (row, line))
        if not math.isclose(like.dense, row.dense, rel_tol=1e-6):
            both = (
                f"{row.dense:g} here, {like.dense:g} in line {earlier} for {row.model}, {row.axis}"
            )
            raise InputError(f"{name}:{line}: dense: mixed metric or protocol: {both}")
        _, earlier = first.setdefault(
            (row.method, row.family, row.model, row.sparsity, row.axis, row.options), (row, line)
        )
        if earlier != line:
            twice = (
                f"is a second value for {row.method} at sparsity {row.sparsity:g} (line {earlier})"
            )
            raise InputError(f"{name}:{line}: {twice}")


def table_text(rows: Iterable[QualityRow]) -> str:
    out = []
    for r in rows:
        text = {name: f"{getattr(r, name):.10g}" for name in ("sparsity", "dense", "pruned")}
        text |= {
            "relative_loss": f"{r.relative_loss:.6f}",
            "higher_is_better": str(r.higher_is_better).lower(),
        }
        text["options"] = ";".join(
            f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in r.options
        )
        out.append({**vars(r), **text})
    return csv_text(out, COLUMNS)


LISTED, MEAN = ("results", "family", "sparsity"), "mean acc of "
_NOT_METRICS, _MOST_BYTES = ("sample_len", "sample_count", "bypass"), 64_000_000


class Value(NamedTuple):
    value: float
    higher_is_better: bool
    protocol: str
    task: str = ""


def expanded(listed: CsvTable, folder: Path) -> CsvTable:
    """Return the rows of a quality table, given the CSV that lists results, and its folder."""
    families = listed.column("family")
    if (count := families.count("dense")) != 1:
        raise InputError(f"{listed.label}: expected one row of family dense, got {count}")
    models = listed.each(lambda cells: read_results(folder, cells["results"]))
    read = iter(models)
    of_line = listed.each(
        lambda cells: list(_rows(cells, models[families.index("dense")], next(read)))
    )
    rows = [
        (line, row)
        for line, some in zip(listed.lines, of_line)
        for row in some
        if row["family"] != "dense"
    ]
    if not rows:
        raise InputError(
            f"{listed.label}: expected a row for a pruned model, with a metric above 0"
        )
    texts = [[*map(one_line, row.values())] for _, row in rows]
    return CsvTable(listed.label, tuple(rows[0][1]), texts, [line for line, _ in rows])


def read_results(folder: Path, name: str) -> tuple[str, dict[str, Value]]:
    """Return model and metrics of a results file, or of a folder of files of one model; the last by
    name counts."""
    path, values, models, parts = folder / name, dict[str, Value](), dict[str, None](), set[str]()
    inside = (
        [*path.glob("results_*.json"), *path.glob("*/results_*.json")]
        if os.path.isdir(path)
        else [path]
    )
    for file in sorted(inside, key=lambda file: file.name):
        content = _mapping(
            parse_bounded(read_bounded(file, _MOST_BYTES), f"results: {file}", _MOST_BYTES)
        )
        values |= _values(content)
        models[str(content.get("model_name") or file.parent.name)] = None
        for some in _mapping(content.get("group_subtasks")).values():
            parts.update(map(str, some) if isinstance(some, list) else ())
    if not name or len(models) != 1 or not values:
        raise InputError(
            f"results {name!r}: expected metrics of one model, got {len(values)} of {[*models]}"
        )
    whole = {v.task: v.value for v in values.values() if v.task and v.task not in parts}
    if len(whole) > 1:
        protocol = f"lm-evaluation-harness: {', '.join(sorted(whole))}"
        values[f"{MEAN}{len(whole)} tasks"] = Value(
            sum(whole.values()) / len(whole), True, protocol
        )
    return next(iter(models)), values


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _values(content: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    """Yield the finite metrics of a file; standard errors and counts are not metrics."""
    shots, versions, better = (
        _mapping(content.get(name)) for name in ("n-shot", "versions", "higher_is_better")
    )
    limit = _mapping(content.get("config")).get("limit")
    for task, metrics in _mapping(content.get("results")).items():
        stated = {
            "{}-shot": shots.get(task),
            "task version {}": versions.get(task),
            "limited to {} samples": limit,
        }
        texts = [text.format(value) for text, value in stated.items() if value is not None]
        protocol = ", ".join(["lm-evaluation-harness", *texts])
        for key, value in _mapping(metrics).items():
            name, _, chosen = key.partition(",")  # the filter of the answers
            number = type(value) in (int, float) and abs(value) < 1e300
            if number and name not in _NOT_METRICS and not name.endswith("_stderr"):
                shown = f"{task} {name}" + (f" ({chosen})" if chosen not in ("", "none") else "")
                higher = _mapping(better.get(task)).get(name, _rises(name)) is True
                yield shown, Value(float(value), higher, protocol, task * (shown == f"{task} acc"))


def _rises(name: str) -> bool:
    """Return whether a higher value of a metric is better, which older versions do not state."""
    return not any(part in name for part in ("perplexity", "bits_per_byte", "loss"))


def _rows(
    cells: Mapping[str, str],
    dense: tuple[str, dict[str, Value]],
    pruned: tuple[str, dict[str, Value]],
) -> Any:
    if not (both := {key: (dense[1][key], pruned[1][key]) for key in dense[1] if key in pruned[1]}):
        raise InputError(f"results: {cells['results']}: shares no metric with the dense model")
    about = {
        "model": dense[0].rstrip("/").rpartition("/")[2].lower(),
        "source": f"lm-evaluation-harness: {pruned[0]}",
    }
    about |= {name: cells.get(name, "") for name in ("family", "sparsity", "options")}
    about["method"] = cells.get("method") or cells["family"]
    for key, (a, b) in both.items():
        if a.protocol != b.protocol and not key.startswith(MEAN):
            raise InputError(
                f"results: {key}: measured differently: dense: {a.protocol}; pruned: {b.protocol}"
            )
        # the mean of other tasks is not a row
        if a.protocol == b.protocol and a.value > 0.0 and b.value >= 0.0:
            values = {
                "metric": key,
                "higher_is_better": str(a.higher_is_better),
                "protocol": a.protocol,
            }
            yield about | values | {"dense": repr(a.value), "pruned": repr(b.value)}
