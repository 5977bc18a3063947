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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from calibration.evidence.published import compare_dense, compare_serving, compare_speedups
from calibration.records.store import read_store
from calibration.runners.cases import Case, cases_of, fewer_layers
from calibration.runners.compare import DTYPES, ENGINES, ComparedSpeedup, rows_of
from calibration.validation.paper import table_2
from calibration.validation.scoring import errors, percent, spearman, table
from simulator.figures.layout import fixed_ticks
from simulator.figures.measured import time_text
from simulator.figures.style import COLORS, paper_style
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
    out = []
    for file in sorted(FOLDERS[page].glob("*.jsonl")):
        dtype, threads, *_, engine = file.name.removesuffix(".jsonl").split(".")
        if dtype in DTYPES:  # other files are records of engines' calibrations
            out += _rows_of_run(file, dtype, threads, engine)
    return out


def _rows_of_run(file: Path, dtype: str, threads: str, engine: str) -> list[RecordedRow]:
    store = read_store(file)
    profile = file.with_name(f"{dtype}.{threads}.yaml")
    # its engine was calibrated on this model
    own = file.with_name(file.name.replace(f".{engine}.jsonl", ".yaml"))
    hw = load_hardware(own if own.is_file() else profile)
    plain = replace(hw, engines={})
    runs = ENGINES[engine]
    cases = dict[str, Case]()
    records = [dict(row) for row in store.rows]
    for record in records:
        config_file = file.with_name(f"{record['model']}.json")  # a model that no library has
        model = load_model(config_file if config_file.is_file() else record["model"])
        layers = re.search(r"layers=(\d+)", str(record["key"]))
        config = fewer_layers(model, int(layers[1]) if layers else None)
        settings = {name: record[name] for name in ("phase", "batch", "seq")}
        settings |= {"prune": [record["prune"]], "dtype": dtype, "engine": runs.lowered}
        if found := re.search(r"new=(\d+)", str(record["key"])):
            settings["new_tokens"] = int(found[1])
        (case,), _ = cases_of(config, settings, phases=runs.phases)
        cases[str(record["key"])] = case
    rows = rows_of(
        list(cases.values()), records, plain, device=store.header.device, dtype=dtype, engine=engine
    )
    by_case = {(r.prune, r.phase, r.batch, r.seq): r for r in rows}
    out = []
    for case in cases.values():
        compared = by_case.get((case.prune, case.phase, case.batch, case.seq))
        if compared is None:
            continue
        pair = case.dense, case.pruned
        predicted = [speedup(*pair, plain), speedup(*pair, plain, dense_s=compared.dense_s)]
        predicted += [speedup(*pair, hw)] if engine in hw.engines else []
        out.append(RecordedRow(engine, threads, compared, dict(zip(KNOWN, predicted))))
    return out


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
    """Return the errors of predictions that know something: median and rank correlation of
    speedups, share inside their interval, median half-width, and median error of dense times."""
    measured, dense = (
        np.array([getattr(r.compared, name) for r in rows]) for name in ("measured", "dense_s")
    )
    found = [r.predicted[known] for r in rows]
    value, lower, upper, dense_s = (
        np.array([getattr(s, name) for s in found])
        for name in ("speedup", "lower", "upper", "dense_s")
    )
    return {
        "median": errors(value, measured)["median"],
        "inside": float(np.mean((lower <= measured) & (measured <= upper))),
        "half_width": float(np.median(np.sqrt(upper / lower))) - 1.0,
        "spearman": spearman(value, measured),
        "dense_time": errors(dense_s, dense)["median"],
    }


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
    published = compare_speedups()
    rows = [row for page in FOLDERS for row in recorded_rows(page)]
    files = [FOLDERS["vllm"].parent / name for name in ("comparison.csv", "plans.csv")]
    decoders = [
        row
        for file in files
        for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    ]
    return {
        **{
            f"executed, {title}": [
                (r.compared.measured, r.compared.predicted)
                for r in rows
                if (r.engine == "vllm") == ours
            ]
            for title, ours in (("vLLM", True), ("Transformers", False))
        },
        "executed, our decoder and plans": [
            (float(r["measured"]), float(r["predicted"])) for r in decoders
        ],
        "published, taxonomy paper": [(c.published, c.predicted) for c in table_2()],
        "published, other": [(c.measured, c.predicted) for c in published if not c.own_code],
        "published, custom code": [(c.measured, c.predicted) for c in published if c.own_code],
    }


def overview() -> Figure:
    """Draw predicted against measured values of everything that was executed or published."""
    names = {"hf": "Transformers", "compile": "torch.compile", "vllm": "vLLM", "sglang": "SGLang"}
    names |= {"trtllm": "TensorRT-LLM", "reference": "taxonomy paper's bench"}
    panels = {"speedups of pruned models": ("speedup", measured_speedups())}
    dense = ("times of dense models", "time of a pass or request", compare_dense())
    for what, label, times in (
        dense,
        ("runs of servers", "time per output token", compare_serving()),
    ):
        engines = {
            names[key]: [(c.measured, c.predicted) for c in times if c.engine == key]
            for key in names
        }
        panels[what] = label, {name: found for name, found in engines.items() if found}
    with paper_style():
        figure = Figure(figsize=(7.2, 3.4), layout="constrained", dpi=200)
        for ax, (what, (label, groups)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            every = np.concatenate([np.array(rows) for rows in groups.values()])
            ends = np.array([every.min() / 1.15, every.max() * 1.15])
            ax.fill_between(
                ends, ends / 1.1, ends * 1.1, color="0.85", linewidth=0, label="within 10 %"
            )
            ax.plot(ends, ends, color="black", linewidth=0.6)
            for color, (name, rows) in zip(COLORS, groups.items(), strict=False):
                ax.plot(
                    *np.array(rows).T,
                    "o",
                    color=color,
                    markersize=2.2,
                    alpha=0.6,
                    markeredgewidth=0,
                    label=name,
                )
            error = 100 * np.median(np.abs(every[:, 1] / every[:, 0] - 1))
            ax.set_title(f"{len(every):,} {what}\nmedian error {error:.1f} %")
            ax.set(
                xscale="log",
                yscale="log",
                xlim=ends,
                ylim=ends,
                xlabel=f"measured {label}",
                ylabel="predicted",
            )
            ax.set_box_aspect(1)
            for axis in (ax.xaxis, ax.yaxis):
                if label == "speedup":
                    fixed_ticks(axis, [0.7, 1, 1.5, 2, 3], lambda value, _: f"{value:g}x")
                else:
                    ticks = [10.0**e for e in range(-3, 3) if ends[0] < 10.0**e < ends[1]]
                    fixed_ticks(axis, ticks, lambda seconds, _: time_text(1e6 * seconds))
            ax.legend(
                loc="upper center",
                bbox_to_anchor=(0.45, -0.2),
                fontsize=6,
                markerscale=1.5,
                frameon=False,
            )
    return figure
