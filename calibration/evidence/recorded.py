"""Recorded runs of vLLM and Transformers compared with predictions (``docs/generated/vllm.md``,
``transformers.md`` and ``hybrids.md``), and the first picture of the README
(``docs/measured.png``).

A folder has one file of records per run of ``prunesim compare``
(``DTYPE.THREADS.MODEL.ENGINE.jsonl``, with raw samples and versions), the profile that was
calibrated on the same machine (``DTYPE.THREADS.yaml``; with engines that were calibrated on a
model: ``DTYPE.THREADS.MODEL.yaml``), records of engines' calibrations, and config.json files of
models that no library has.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calibration.evidence.published import compare_dense, compare_serving, compare_speedups
from calibration.records.store import read_store
from calibration.runners.cases import Case, cases_of, fewer_layers
from calibration.runners.compare import DTYPES, ENGINES, ComparedSpeedup, rows_of, summary
from calibration.validation.paper import table_2
from calibration.validation.scoring import Comparison, percent, table
from simulator.figures.layout import fixed_ticks
from simulator.figures.measured import time_text
from simulator.figures.style import COLORS, Look, paper_style
from simulator.hardware.library import load_hardware
from simulator.models.library import load_model
from simulator.prediction.requests import by_key
from simulator.prediction.result import Result
from simulator.prediction.table import speedup
from simulator.units import ratio

FOLDERS = {
    name: Path(__file__).resolve().parents[2] / "docs" / "cpu" / name
    for name in ("transformers", "hybrids", "vllm")
}
"""Page -> its recorded runs."""

KNOWN = ("nothing", "the dense time", "the calibrated engine")
"""What predictions of a page know of the machine's engine."""

Groups = Mapping[str, list[tuple[float, float]]]  # measured and predicted values by legend entry


@dataclass(frozen=True)
class RecordedRow:
    engine: str
    threads: str
    compared: ComparedSpeedup
    predicted: Mapping[str, Result]  # by what they know

    @property
    def run(self) -> str:
        c = self.compared
        return f"{self.engine}, {c.dtype}, {_threads(self.threads)}, batch {c.batch}"


def recorded_rows(page: str) -> list[RecordedRow]:
    out: list[RecordedRow] = []
    for file in sorted(FOLDERS[page].glob("*.jsonl")):
        dtype, threads, *_, engine = file.name.removesuffix(".jsonl").split(".")
        if dtype in DTYPES:  # other files are records of engines' calibrations
            out += _rows_of_run(file, dtype, threads, engine)
    return out


def _rows_of_run(file: Path, dtype: str, threads: str, engine: str) -> Iterator[RecordedRow]:
    store = read_store(file)
    # its engine was calibrated on this model
    own = file.with_name(file.name.replace(f".{engine}.jsonl", ".yaml"))
    hw = load_hardware(own if own.is_file() else file.with_name(f"{dtype}.{threads}.yaml"))
    plain = replace(hw, engines={})
    about: dict[str, Any] = {"device": store.header.device, "dtype": dtype, "engine": engine}
    for record in {str(row["key"]): row for row in store.rows}.values():
        case = _case_of(record, file.parent, engine)
        for compared in rows_of([case], [record], plain, **about):
            pair = case.dense, case.pruned
            predicted = [speedup(*pair, plain), speedup(*pair, plain, dense_s=compared.dense_s)]
            predicted += [speedup(*pair, hw)] if engine in hw.engines else []
            yield RecordedRow(engine, threads, compared, dict(zip(KNOWN, predicted)))


def _case_of(record: Mapping[str, Any], folder: Path, engine: str) -> Case:
    """Return the case of a record, whose key has the numbers of layers and of new tokens."""
    config_file = folder / f"{record['model']}.json"  # a model that no library has
    model = load_model(config_file if config_file.is_file() else record["model"])
    numbers = {name: int(value) for name, value in re.findall(r"(layers|new)=(\d+)", record["key"])}
    settings = {name: record[name] for name in ("phase", "batch", "seq", "dtype")}
    settings |= {"prune": [record["prune"]], "engine": ENGINES[engine].lowered}
    if "new" in numbers:
        settings["new_tokens"] = numbers["new"]
    config = fewer_layers(model, numbers.get("layers"))
    (case,), _ = cases_of(config, settings, phases=ENGINES[engine].phases)
    return case


def page_tables(page: str) -> list[str]:
    return tables(recorded_rows(page))


def tables(rows: Sequence[RecordedRow]) -> list[str]:
    """Return the tables of a page: scores by model, engine and phase, family and run, and the worst
    ten rows."""
    by: Mapping[str, Callable[[RecordedRow], str]] = {
        "model": lambda r: f"{r.engine}, {r.compared.model}",
        "engine and phase": lambda r: f"{r.engine}, {r.compared.phase}",
        "family": lambda r: f"{r.engine}, {r.compared.family}",
        "run": lambda r: r.run,
    }
    return [*(_summary(name, rows, key) for name, key in by.items()), _worst(rows)]


def _threads(number: str) -> str:
    return "one thread" if number == "1" else f"{number} threads"


def known_of(rows: Sequence[RecordedRow]) -> list[str]:
    return [name for name in KNOWN if all(name in r.predicted for r in rows)]


def _summary(title: str, rows: Sequence[RecordedRow], key: Callable[[RecordedRow], str]) -> str:
    cells = []
    for name, some in [*sorted(by_key(rows, key).items()), ("all", list(rows))]:
        for known in known_of(some):
            s = scores(some, known)
            first = known == KNOWN[0]
            shares = map(percent, (s["median"], s["inside"], s["half_width"]))
            dense = "" if known == KNOWN[1] else percent(s["dense_time"])
            label = [name, str(len(some))] if first else ["", ""]
            cells.append([*label, known, *shares, f"{s['spearman']:.3f}", dense])
    header = [title, "speedups", "knowing", "median error", "in their interval", "half-width"]
    return table([*header, "Spearman", "error of dense times"], cells, left=(0, 2))


def scores(rows: Sequence[RecordedRow], known: str = KNOWN[0]) -> dict[str, float]:
    """Return the errors of predictions that know something, as those of a comparison, and the
    median half-width of their intervals."""
    found = [r.predicted[known] for r in rows]
    compared = [
        replace(
            r.compared,
            predicted=s.speedup,
            predicted_lower=s.lower,
            predicted_upper=s.upper,
            predicted_dense_s=s.dense_s,
        )
        for r, s in zip(rows, found, strict=True)
    ]
    half_widths = [math.sqrt(s.upper / s.lower) - 1.0 for s in found]
    return {**summary(compared), "half_width": float(np.median(half_widths))}


def _worst(rows: Sequence[RecordedRow]) -> str:
    known = known_of(rows)
    worst = sorted(
        rows, key=lambda r: -abs(math.log(r.predicted[known[-1]].speedup / r.compared.measured))
    )[:10]
    cells = []
    for r in worst:
        c = r.compared
        found = [r.predicted[name] for name in known]
        values = [f"{ratio(s.speedup)}x ({ratio(s.lower)}-{ratio(s.upper)})" for s in found]
        cells.append(
            [c.pruning, f"{c.model}, {c.phase}, {r.run}", f"{ratio(c.measured)}x", *values]
        )
    return table(
        ["pruning", "run", "measured", *(f"knowing {name}" for name in known)], cells, left=(0, 1)
    )


def measured_speedups() -> Groups:
    rows = [row for page in FOLDERS for row in recorded_rows(page)]
    files = [FOLDERS["vllm"].parent / name for name in ("comparison.csv", "plans.csv")]
    ours = [row for file in files for row in csv.DictReader(file.read_text("utf-8").splitlines())]
    titles = ("executed, vLLM", "executed, Transformers")
    groups: dict[str, list[tuple[float, float]]] = {title: [] for title in titles}
    for r in rows:
        groups[titles[r.engine != "vllm"]].append((r.compared.measured, r.compared.predicted))
    groups["executed, our decoder and plans"] = [
        (float(r["measured"]), float(r["predicted"])) for r in ours
    ]
    groups["published, taxonomy paper"] = [(c.published, c.predicted) for c in table_2()]
    for c in sorted(compare_speedups(), key=lambda c: c.own_code):
        name = "published, custom code" if c.own_code else "published, other"
        groups.setdefault(name, []).append((c.measured, c.predicted))
    return groups


def overview() -> Figure:
    """Draw predicted against measured values of everything that was executed or published."""
    with paper_style():
        figure = Figure(figsize=(7.2, 3.4), layout="constrained", dpi=200)
        first, second, third = figure.subplots(1, 3)
        _panel(first, "speedups of pruned models", "speedup", measured_speedups())
        dense, served = _by_engine(compare_dense()), _by_engine(compare_serving())
        _panel(second, "times of dense models", "time of a pass or request", dense)
        _panel(third, "runs of servers", "time per output token", served)
    return figure


def _by_engine(rows: Sequence[Comparison]) -> Groups:
    names = {"hf": "Transformers", "compile": "torch.compile", "vllm": "vLLM", "sglang": "SGLang"}
    names |= {"trtllm": "TensorRT-LLM", "reference": "taxonomy paper's bench"}
    groups = {
        title: [(c.measured, c.predicted) for c in rows if c.engine == engine]
        for engine, title in names.items()
    }
    return {title: pairs for title, pairs in groups.items() if pairs}


def _panel(ax: Axes, what: str, label: str, groups: Groups) -> None:
    every = np.concatenate([np.array(rows) for rows in groups.values()])
    ends = np.array([every.min() / 1.15, every.max() * 1.15])
    ax.fill_between(ends, ends / 1.1, ends * 1.1, color="0.85", linewidth=0, label="within 10 %")
    ax.plot(ends, ends, color="black", linewidth=0.6)
    dots: Look = {"markersize": 2.2, "alpha": 0.6, "markeredgewidth": 0}
    for color, (name, rows) in zip(COLORS, groups.items(), strict=False):
        ax.plot(*np.array(rows).T, "o", color=color, label=name, **dots)
    error = 100 * np.median(np.abs(every[:, 1] / every[:, 0] - 1))
    ax.set_title(f"{len(every):,} {what}\nmedian error {error:.1f} %")
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends, box_aspect=1)
    ax.set(xlabel=f"measured {label}", ylabel="predicted")
    speedups = label == "speedup"
    ticks = [0.7, 1, 1.5, 2, 3] if speedups else 10.0 ** np.arange(-3, 3)
    for axis in (ax.xaxis, ax.yaxis):
        fixed_ticks(
            axis,
            [tick for tick in ticks if ends[0] < tick < ends[1]],
            lambda value, _: f"{value:g}x" if speedups else time_text(1e6 * value),
        )
    place: Look = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.2)}
    ax.legend(fontsize=6, markerscale=1.5, frameon=False, **place)
