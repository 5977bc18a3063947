"""Read results files of EleutherAI's lm-evaluation-harness as a quality table (:mod:`simulator.prediction.quality`).

Use :func:`expanded` with a CSV of the columns ``results``, ``family``, ``sparsity`` and optionally ``method`` and
``options``. Each row is one model. ``results`` is the file ``results_*.json`` that ``lm_eval --output_path`` writes, or
the folder with it, relative to the CSV. One row has the family ``dense``; the others name the family that pruned their
model and the fraction removed::

    results,family,sparsity,method
    out/llama-3.1-8b,dense,0,
    out/width-25,width,0.25,LLM-Pruner
    out/depth-25,depth,0.25,ShortGPT

Every metric that the dense and the pruned model share becomes a row, and so does the mean of ``acc`` over their tasks,
the default metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from simulator.errors import InputError, one_line
from simulator.files.csv import CsvTable
from simulator.files.json import parse_json
from simulator.files.read import read_bounded

LISTED: tuple[str, ...] = ("results", "family", "sparsity")
"""Columns that a list of results files must have."""

COLUMNS: tuple[str, ...] = (
    *("method", "family", "model", "sparsity", "metric", "higher_is_better", "dense", "pruned"),
    *("protocol", "source", "options"),
)
"""Columns of the rows returned."""

DENSE = "dense"
MEAN = "mean acc of "
"""Start of the name of the mean accuracy."""

NOT_METRICS = ("sample_len", "sample_count", "bypass")
"""Numbers among the metrics that do not measure quality."""

MOST_RESULT_BYTES = 64_000_000
MOST_VALUE = 1e300  # larger ones, infinity and NaN are not values


class Metric(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str
    filter: str  # of the answers; "none" for most tasks

    def __str__(self) -> str:
        return f"{self.task} {self.metric}" + ("" if self.unfiltered else f" ({self.filter})")

    @property
    def unfiltered(self) -> bool:
        return self.filter in ("", "none")

    @property
    def is_accuracy(self) -> bool:
        return self.metric == "acc" and self.unfiltered


@dataclass(frozen=True)
class Value:
    """A value and how it was measured."""

    value: float
    higher_is_better: bool
    protocol: str


@dataclass(frozen=True)
class ModelValues:
    """Values of one model."""

    model: str
    values: Mapping[Metric, Value]
    tasks: tuple[str, ...]  # tasks that are not part of a group

    def accuracies(self) -> dict[Metric, Value]:
        """Return the accuracies of whole tasks, above 0."""
        return {key: v for key, v in self.values.items() if key.is_accuracy and key.task in self.tasks and v.value > 0}


def expanded(listed: CsvTable, folder: Path) -> CsvTable:
    """Return the rows of a quality table, given the CSV that lists results files, and its folder.

    Raises
    ------
    InputError
        If there is not exactly one dense model, a file cannot be read, or two models were measured differently.
    """
    count = listed.column("family").count(DENSE)
    if count != 1:
        raise InputError(f"{listed.label}: expected one row of family {DENSE}, got {count}")
    models = listed.each(lambda cells: read_results(folder, cells["results"]))
    dense = models[listed.column("family").index(DENSE)]
    read = iter(models)

    def rows_of(cells: Mapping[str, str]) -> list[list[str]]:
        pruned = next(read)
        return [] if pruned is dense else list(_rows(cells, dense, pruned))

    found = listed.each(rows_of)
    lines = [line for line, some in zip(listed.lines, found) for _ in some]
    rows = [[one_line(cell) for cell in row] for some in found for row in some]
    if not rows:
        raise InputError(f"{listed.label}: expected a row for a pruned model")
    return CsvTable(listed.label, COLUMNS, rows, lines)


def read_results(folder: Path, name: str) -> ModelValues:
    """Return the values in a results file, or the newest of each task in a folder with results files of one model."""
    path = folder / name
    if not name:
        raise InputError("results: is empty")
    files = [path]
    if path.is_dir():
        # lm_eval writes into a folder named after the model; file names contain the time
        inside = [*path.glob("results_*.json"), *path.glob("*/results_*.json")]
        files = sorted(inside, key=lambda file: file.name, reverse=True)
        if not files:
            raise InputError(f"results: {path}: has no file results_*.json")
    values: dict[Metric, Value] = {}
    models, tasks, parts = dict[str, None](), dict[str, None](), set[str]()
    for file in files:
        content = _content(file)
        models[str(content.get("model_name") or file.parent.name)] = None
        for key, value in _values(content):
            values.setdefault(key, value)
            tasks[key.task] = None
        groups = content.get("group_subtasks")
        parts |= {str(task) for some in _mapping(groups).values() if isinstance(some, list) for task in some}
    if len(models) > 1:
        raise InputError(f"results: {path}: has results of several models: {', '.join(models)}; name a folder of one")
    if not values:
        raise InputError(f"results: {path}: no metric of lm-evaluation-harness found under 'results'")
    return ModelValues(next(iter(models)), values, tuple(task for task in tasks if task not in parts))


def _content(file: Path) -> Mapping[str, Any]:
    try:
        content = parse_json(read_bounded(file, MOST_RESULT_BYTES), str(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise InputError(f"results: {error}") from None
        raise InputError(f"results: {file}: cannot be read as JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise InputError(f"results: {file}: expected the key 'results', as lm-evaluation-harness writes it")
    return content


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _values(content: Mapping[str, Any]) -> Iterator[tuple[Metric, Value]]:
    """Yield the finite metrics of a file; standard errors and counts are not metrics."""
    shots, versions, better = (_mapping(content.get(name)) for name in ("n-shot", "versions", "higher_is_better"))
    limit = _mapping(content.get("config")).get("limit")
    for task, found in content["results"].items():
        stated = [f"{shots[task]}-shot"] if task in shots else []
        stated += [f"task version {versions[task]}"] if task in versions else []
        stated += [f"limited to {limit} samples"] if limit is not None else []
        protocol = ", ".join(["lm-evaluation-harness", *stated])
        for key, value in _mapping(found).items():
            name, _, chosen = key.partition(",")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MOST_VALUE:
                continue
            if name in NOT_METRICS or name.endswith("_stderr"):
                continue
            # older versions do not state the direction: lower perplexities and bits are better
            lower = any(part in name for part in ("perplexity", "bits_per_byte", "loss"))
            higher = _mapping(better.get(task)).get(name, not lower)
            yield Metric(task, name, chosen), Value(float(value), higher is True, protocol)


def _rows(cells: Mapping[str, str], dense: ModelValues, pruned: ModelValues) -> Iterator[list[str]]:
    """Yield the cells for each metric that both models have, then for the mean accuracy."""
    shared = [key for key in dense.values if key in pruned.values]
    if not shared:
        raise InputError(f"results: {cells['results']}: shares no metric with the dense model")
    model = dense.model.rstrip("/").rpartition("/")[2].lower()
    first = [cells.get("method") or cells["family"], cells["family"], model, cells["sparsity"]]
    last = [f"lm-evaluation-harness: {pruned.model}", cells.get("options", "")]
    for key in shared:
        before, after = dense.values[key], pruned.values[key]
        if before.protocol != after.protocol:
            mixed = f"dense: {before.protocol}; pruned: {after.protocol}"
            raise InputError(f"results: {cells['results']}: {key}: measured differently: {mixed}")
        if before.value > 0.0 and after.value >= 0.0:
            values = [str(before.higher_is_better), repr(before.value), repr(after.value), before.protocol]
            yield [*first, str(key), *values, *last]
    ours, theirs = dense.accuracies(), pruned.accuracies()
    if len(ours) > 1 and ours.keys() <= theirs.keys():
        means = [sum(found[key].value for key in ours) / len(ours) for found in (ours, theirs)]
        tasks = "lm-evaluation-harness: " + ", ".join(sorted(key.task for key in ours))
        yield [*first, f"{MEAN}{len(ours)} tasks", "true", *map(repr, means), tasks, *last]
