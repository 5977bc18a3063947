"""Recorded runs of Transformers compared with predictions, and the first picture of the README.

``python -m calibration.runners.recorded`` makes ``docs/generated/transformers.md`` and ``docs/measured.png`` again.
A folder has one file of records per run of ``prunesim compare`` (``DTYPE.THREADS.MODEL.ENGINE.jsonl``, with raw samples
and versions) and the profile that was calibrated on the same machine (``DTYPE.THREADS.yaml``).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from calibration.evidence.pages import DOCS, filled
from calibration.evidence.paper import table_2
from calibration.evidence.published import compare_dense, compare_serving, compare_speedups
from calibration.evidence.scoring import table
from calibration.records.store import read_store
from calibration.runners.cases import Case, cases_of, fewer_layers
from calibration.runners.compare import ENGINES, ComparedSpeedup, rows_of, summary
from simulator.figures.layout import fixed_ticks
from simulator.figures.measured import time_text
from simulator.figures.style import COLORS, paper_style, save_figure
from simulator.files.write import write_whole
from simulator.hardware.library import load_hardware
from simulator.models.library import load_model
from simulator.prediction.table import speedup
from simulator.units import percent, ratio

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "cpu" / "transformers"
Groups = Mapping[str, list[tuple[float, float]]]  # measured and predicted values by legend entry


@dataclass(frozen=True)
class RecordedRow:
    engine: str
    threads: str
    compared: ComparedSpeedup
    given: float  # predicted from the measured dense time
    given_lower: float
    given_upper: float

    @property
    def given_inside(self) -> bool:
        return self.given_lower <= self.compared.measured <= self.given_upper

    @property
    def half_width(self) -> float:
        return float(np.sqrt(self.compared.predicted_upper / self.compared.predicted_lower) - 1.0)


def recorded_rows() -> list[RecordedRow]:
    out = []
    for file in sorted(FOLDER.glob("*.jsonl")):
        dtype, threads, *_, engine = file.name.removesuffix(".jsonl").split(".")
        out += _rows_of_run(file, dtype, threads, engine)
    return out


def _rows_of_run(file: Path, dtype: str, threads: str, engine: str) -> list[RecordedRow]:
    store, hw = read_store(file), load_hardware(file.with_name(f"{dtype}.{threads}.yaml"))
    runs, cases, records = ENGINES[engine], dict[str, Case](), [dict(row) for row in store.rows]
    for record in records:
        layers = re.search(r"layers=(\d+)", str(record["key"]))
        config = fewer_layers(load_model(record["model"]), int(layers[1]) if layers else None)
        settings = {name: record[name] for name in ("phase", "batch", "seq")} | {"prune": [record["prune"]]}
        settings |= {"dtype": dtype, "engine": runs.lowered}
        (case,), _ = cases_of(config, settings, phases=runs.phases)
        cases[str(record["key"])] = case
    rows = rows_of(list(cases.values()), records, hw, device=store.header.device, dtype=dtype, engine=engine)
    by_case = {(r.prune, r.phase, r.batch, r.seq): r for r in rows}
    out = []
    for case in cases.values():
        compared = by_case.get((case.prune, case.phase, case.batch, case.seq))
        if compared is not None:
            s = speedup(case.dense, case.pruned, hw, dense_s=compared.dense_s)
            out.append(RecordedRow(engine, threads, compared, s.speedup, s.lower, s.upper))
    return out


def tables(rows: Sequence[RecordedRow]) -> list[str]:
    """Return the tables of the page: scores by model, engine and phase, family and run, and the worst ten rows."""
    by: Mapping[str, Callable[[RecordedRow], str]] = {
        "model": lambda r: r.compared.model,
        "engine and phase": lambda r: f"{r.engine}, {r.compared.phase}",
        "family": lambda r: r.compared.family,
        "run": lambda r: f"{r.engine}, {r.compared.dtype}, {_threads(r.threads)}, batch {r.compared.batch}",
    }
    worst = sorted(rows, key=lambda r: -abs(np.log1p(r.compared.error)))[:10]
    return [*(_summary(name, rows, key) for name, key in by.items()), _worst(worst)]


def _threads(number: str) -> str:
    return "one thread" if number == "1" else f"{number} threads"


def _summary(title: str, rows: Sequence[RecordedRow], key: Callable[[RecordedRow], str]) -> str:
    groups: dict[str, list[RecordedRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    header = ["speedups", "median error", "in their interval", "half-width", "Spearman"]
    header += ["given the dense time: error", "in their interval", "dense times: error"]
    lines = []
    for name, some in [*groups.items(), ("all", list(rows))]:
        s = scores(some)
        first = [percent(s[key]) for key in ("median", "inside", "half_width")]
        last = [percent(s[key]) for key in ("given", "given_inside", "dense_time")]
        lines.append([name, str(len(some)), *first, f"{s['spearman']:.3f}", *last])
    return table([title, *header], lines)


def scores(rows: Sequence[RecordedRow]) -> dict[str, float]:
    return {
        **summary([r.compared for r in rows]),
        "half_width": float(np.median([r.half_width for r in rows])),
        "given": float(np.median([abs(r.given / r.compared.measured - 1.0) for r in rows])),
        "given_inside": float(np.mean([r.given_inside for r in rows])),
    }


def _worst(rows: Sequence[RecordedRow]) -> str:
    header = ["pruning", "run", "measured", "predicted", "interval", "given the dense time"]
    cells = []
    for r in rows:
        c = r.compared
        run = f"{c.model}, {r.engine}, {c.phase}, batch {c.batch}, {c.dtype}, {_threads(r.threads)}"
        interval = f"{ratio(c.predicted_lower)}-{ratio(c.predicted_upper)}"
        cells.append(
            [c.pruning, run, f"{ratio(c.measured)}x", f"{ratio(c.predicted)}x", interval, f"{ratio(r.given)}x"]
        )
    return table(header, cells, left=(0, 1))


def measured_speedups() -> Groups:
    published = compare_speedups()
    files = [FOLDER.parent / "comparison.csv", FOLDER.parent / "plans.csv"]
    decoders = [row for file in files for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines())]
    return {
        "executed, Transformers": [(r.compared.measured, r.compared.predicted) for r in recorded_rows()],
        "executed, our decoder and plans": [(float(r["measured"]), float(r["predicted"])) for r in decoders],
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
    for what, label, times in (dense, ("runs of servers", "time per output token", compare_serving())):
        engines = {names[key]: [(c.measured, c.predicted) for c in times if c.engine == key] for key in names}
        panels[what] = label, {name: found for name, found in engines.items() if found}
    with paper_style():
        figure = Figure(figsize=(7.2, 3.4), layout="constrained", dpi=200)
        for ax, (what, (label, groups)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            every = np.concatenate([np.array(rows) for rows in groups.values()])
            ends = np.array([every.min() / 1.15, every.max() * 1.15])
            ax.fill_between(ends, ends / 1.1, ends * 1.1, color="0.85", linewidth=0, label="within 10 %")
            ax.plot(ends, ends, color="black", linewidth=0.6)
            for color, (name, rows) in zip(COLORS, groups.items(), strict=False):
                ax.plot(*np.array(rows).T, "o", color=color, markersize=2.2, alpha=0.6, markeredgewidth=0, label=name)
            error = 100 * np.median(np.abs(every[:, 1] / every[:, 0] - 1))
            ax.set_title(f"{len(every):,} {what}\nmedian error {error:.1f} %")
            ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel=f"measured {label}", ylabel="predicted")
            ax.set_box_aspect(1)
            for axis in (ax.xaxis, ax.yaxis):
                if label == "speedup":
                    fixed_ticks(axis, [0.7, 1, 1.5, 2, 3], lambda value, _: f"{value:g}x")
                else:
                    ticks = [10.0**e for e in range(-3, 3) if ends[0] < 10.0**e < ends[1]]
                    fixed_ticks(axis, ticks, lambda seconds, _: time_text(1e6 * seconds))
            ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), fontsize=6, markerscale=1.5, frameon=False)
    return figure


if __name__ == "__main__":
    write_whole(DOCS / "transformers.md", filled("transformers", tables(recorded_rows())).encode())
    save_figure(overview(), DOCS.parent / "measured.png")
