"""Read results of EleutherAI's lm-evaluation-harness as a quality table (:mod:`simulator.prediction.quality`).

:func:`expanded` reads a CSV with the columns ``results,family,sparsity`` and a model per row, one of family ``dense``.
``results`` is a file that ``lm_eval --output_path`` writes, or its folder. Every metric that the dense and the pruned
model share becomes a row, and so does the mean of ``acc`` over their tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from simulator.errors import InputError, one_line
from simulator.files.csv import CsvTable
from simulator.files.json import parse_bounded
from simulator.files.read import read_bounded

LISTED, MEAN = ("results", "family", "sparsity"), "mean acc of "
_NOT_METRICS, _MOST_BYTES = ("sample_len", "sample_count", "bypass"), 64_000_000


class Value(NamedTuple):
    """A value and how it was measured; ``task`` is the task of an accuracy."""

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
    found = listed.each(lambda cells: list(_rows(cells, models[families.index("dense")], next(read))))
    rows = [(line, row) for line, some in zip(listed.lines, found) for row in some if row["family"] != "dense"]
    if not rows:
        raise InputError(f"{listed.label}: expected a row for a pruned model, with a metric above 0")
    texts = [[*map(one_line, row.values())] for _, row in rows]
    return CsvTable(listed.label, tuple(rows[0][1]), texts, [line for line, _ in rows])


def read_results(folder: Path, name: str) -> tuple[str, dict[str, Value]]:
    """Return model and metrics of a results file, or of a folder of files of one model, newest last by their names."""
    path, values, models, parts = folder / name, dict[str, Value](), dict[str, None](), set[str]()
    inside = [*path.glob("results_*.json"), *path.glob("*/results_*.json")] if path.is_dir() else [path]
    for file in sorted(inside, key=lambda file: file.name):
        content = _mapping(parse_bounded(read_bounded(file, _MOST_BYTES), f"results: {file}", _MOST_BYTES))
        values |= _values(content)
        models[str(content.get("model_name") or file.parent.name)] = None
        for some in _mapping(content.get("group_subtasks")).values():
            parts.update(map(str, some) if isinstance(some, list) else ())
    if not name or len(models) != 1 or not values:
        raise InputError(f"results {name!r}: expected metrics of one model, got {len(values)} of {[*models]}")
    whole = {v.task: v.value for v in values.values() if v.task and v.task not in parts}
    if len(whole) > 1:
        protocol = f"lm-evaluation-harness: {', '.join(sorted(whole))}"
        values[f"{MEAN}{len(whole)} tasks"] = Value(sum(whole.values()) / len(whole), True, protocol)
    return next(iter(models)), values


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _values(content: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    """Yield the finite metrics of a file; standard errors and counts are not metrics."""
    shots, versions, better = (_mapping(content.get(name)) for name in ("n-shot", "versions", "higher_is_better"))
    for task, found in _mapping(content.get("results")).items():
        stated = {"{}-shot": shots.get(task), "task version {}": versions.get(task)}
        stated["limited to {} samples"] = _mapping(content.get("config")).get("limit")
        texts = ["lm-evaluation-harness", *(text.format(v) for text, v in stated.items() if v is not None)]
        for key, value in _mapping(found).items():
            name, _, chosen = key.partition(",")  # the filter of the answers
            number = type(value) in (int, float) and abs(value) < 1e300
            if number and name not in _NOT_METRICS and not name.endswith("_stderr"):
                shown = f"{task} {name}" + (f" ({chosen})" if chosen not in ("", "none") else "")
                # older versions do not state the direction: lower perplexities and bits are better
                lower = any(part in name for part in ("perplexity", "bits_per_byte", "loss"))
                higher = _mapping(better.get(task)).get(name, not lower) is True
                yield shown, Value(float(value), higher, ", ".join(texts), task * (shown == f"{task} acc"))


def _rows(cells: Mapping[str, str], dense: tuple[str, dict[str, Value]], pruned: tuple[str, dict[str, Value]]) -> Any:
    """Yield the cells for each metric that both models have."""
    if not (both := {key: (dense[1][key], pruned[1][key]) for key in dense[1] if key in pruned[1]}):
        raise InputError(f"results: {cells['results']}: shares no metric with the dense model")
    about = {"model": dense[0].rstrip("/").rpartition("/")[2].lower(), "source": f"lm-evaluation-harness: {pruned[0]}"}
    about |= {name: cells.get(name, "") for name in ("family", "sparsity", "options")}
    about["method"] = cells.get("method") or cells["family"]
    for key, (a, b) in both.items():
        if a.protocol != b.protocol and not key.startswith(MEAN):
            raise InputError(f"results: {key}: measured differently: dense: {a.protocol}; pruned: {b.protocol}")
        if a.protocol == b.protocol and a.value > 0.0 and b.value >= 0.0:  # a mean of other tasks is no row
            values = {"metric": key, "higher_is_better": str(a.higher_is_better), "protocol": a.protocol}
            yield about | values | {"dense": repr(a.value), "pruned": repr(b.value)}
