"""Recorded runs of Transformers compared with predictions: the tables of ``docs/generated/transformers.md``.

A folder has one file of records per run of ``prunesim compare`` (``DTYPE.THREADS.MODEL.ENGINE.jsonl``, raw samples and
versions included) and the profile that was calibrated on the same machine (``DTYPE.THREADS.yaml``).
:func:`recorded_rows` predicts every case again; ``python -m calibration.runners.recorded`` makes the page again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.evidence.pages import DOCS, filled
from calibration.evidence.scoring import table
from calibration.records.store import read_store
from calibration.runners.cases import Case, cases_of, fewer_layers
from calibration.runners.compare import ENGINES, ComparedSpeedup, rows_of, summary
from simulator.files.write import write_whole
from simulator.hardware.library import load_hardware
from simulator.models.library import load_model
from simulator.prediction.table import speedup
from simulator.units import percent, ratio

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "cpu" / "transformers"
"""The runs of docs/generated/transformers.md."""


@dataclass(frozen=True)
class RecordedRow:
    """A measured speedup next to its prediction, also with the measured dense time given."""

    engine: str
    threads: str
    compared: ComparedSpeedup
    given: float
    given_lower: float
    given_upper: float

    @property
    def given_inside(self) -> bool:
        return self.given_lower <= self.compared.measured <= self.given_upper

    @property
    def half_width(self) -> float:
        """Half of the logarithmic width of the predicted interval, as a share."""
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


def tables(rows: Sequence[RecordedRow] = ()) -> list[str]:
    """Return the tables of the page: by model, by engine and phase, by family, by run, and the ten largest errors."""
    found = list(rows) or recorded_rows()
    by: Mapping[str, Callable[[RecordedRow], str]] = {
        "model": lambda r: r.compared.model,
        "engine and phase": lambda r: f"{r.engine}, {r.compared.phase}",
        "family": lambda r: r.compared.family,
        "run": lambda r: f"{r.engine}, {r.compared.dtype}, {_threads(r.threads)}, batch {r.compared.batch}",
    }
    worst = sorted(found, key=lambda r: -abs(np.log1p(r.compared.error)))[:10]
    return [*(_summary(name, found, key) for name, key in by.items()), _worst(worst)]


def _threads(number: str) -> str:
    return "one thread" if number == "1" else f"{number} threads"


def _summary(title: str, rows: Sequence[RecordedRow], key: Callable[[RecordedRow], str]) -> str:
    """Return one line per group of rows, and one of all rows."""
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
    """Return the agreement of some rows: medians of errors and half-widths, coverage and Spearman's correlation."""
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


if __name__ == "__main__":
    write_whole(DOCS / "transformers.md", filled("transformers", tables()).encode())
