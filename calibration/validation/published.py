"""Compare predictions with published measurements whose conditions are known: dense times in engines, speedups of
pruned models, serving runs and GEMM ratios.

Use :func:`compare_dense`, :func:`compare_speedups`, :func:`compare_serving` and :func:`compare_gemms`;
:mod:`calibration.validation.engines` summarises them. The measured values ship as ``calibration/measurements/``; each
row has its source, whether engines are fitted or evaluated on it, and the assumptions where the source is silent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from calibration.measurements import published
from simulator.capacity import memory
from simulator.cost.gemm_shapes import Options
from simulator.engines.engine import load_engine
from simulator.engines.generations import split
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.prediction.quality import parse_options
from simulator.prediction.scenario import dense_seconds
from simulator.prediction.table import speedups
from simulator.pruning import prune
from simulator.uncertainty.forward import ratio_half
from simulator.uncertainty.intervals import workload_time
from simulator.uncertainty.operators import gemm_predicted
from simulator.units import parse_fraction
from simulator.workload import Kernel, Workload

MISS = 0.10
"""Relative error from which the likely reason is printed."""

NO_VERSION: Mapping[str, str] = {"vllm": "v1"}
"""Generation assumed for serving runs whose version the source does not state."""

_SCALE = {"s": 1.0, "ms": 1e-3, "s/batch": 1.0}


def _sparsity(text: str) -> float | dict[str, float]:
    """Parse one fraction, or fractions by part: ``q=0.1,down=0.5``."""
    if "=" not in text:
        return parse_fraction(text)
    return {part: parse_fraction(value) for part, _, value in (pair.partition("=") for pair in text.split(","))}


@dataclass(frozen=True)
class Comparison:
    """One published value, a ratio of times or seconds, and its prediction."""

    what: str  # method, model and fraction
    where: str  # GPU, phase, batch and length
    measured: float
    predicted: float
    lower: float
    upper: float
    source: str
    assumed: str = ""  # conditions that the source does not state
    reason: str = ""  # likely reason of a large error
    engine: str = ""
    gpu: str = ""  # name of its profile
    split: str = ""  # "fit": engine parameters were fitted on this source; "judge": they were not
    own_code: bool = False  # the pruned model needed custom modelling code

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1.0

    @property
    def inside(self) -> bool:
        """Whether the measured value lies in the predicted interval."""
        return self.lower <= self.measured <= self.upper

    @property
    def half_width(self) -> float:
        """Relative half-width of the interval."""
        return float(np.sqrt(self.upper / self.lower)) - 1.0


def median_error(rows: Sequence[Comparison]) -> float:
    """Return the median absolute relative error."""
    return round(median(abs(r.error) for r in rows), 12)


def compare_dense() -> list[Comparison]:
    """Return published times of dense models in their engines, s, per pass or per request."""
    return [_dense(row) for row in published("dense") if not row["left_out"]]


def compare_speedups(given: bool = False) -> list[Comparison]:
    """Return published speedups of pruned models in their engines, predicted under the same conditions; with ``given``,
    the prediction uses the measured dense time of rows of a whole model."""
    return [_speedup(row, given) for row in published("speedups") if not row["left_out"]]


def compare_serving(engine: str = "", experts: bool = True) -> list[Comparison]:
    """Return measured times per output token of serving runs, s, of one engine or of all, with or without models with
    routed experts; runs whose caches do not fit are excluded."""
    rows = [r for r in published("serving") if not r["left_out"] and engine in ("", r["engine"])]
    rows = [r for r in rows if experts or not load_model(r["model"]).experts]
    return [c for c in map(_served, rows) if c is not None]


def _comparison(
    row: Mapping[str, str], what: str, where: str, measured: float, predicted: float, lower: float, upper: float
) -> Comparison:
    """Return a comparison with the facts of a published row."""
    return Comparison(
        what=what,
        where=where,
        measured=measured,
        predicted=predicted,
        lower=lower,
        upper=upper,
        source=row["source"],
        assumed=row["assumed"],
        reason=row.get("reason", ""),
        engine=split(row["engine"])[0],
        gpu=row["hardware"],
        split=row.get("split") or "fit",
        own_code=row.get("own_code") == "true",
    )


def _workload(row: Mapping[str, str], engine: str) -> Workload:
    return lower(
        load_model(row["model"]),
        phase=row["phase"],
        batch=int(row["batch"]),
        seq=int(row["seq"]),
        new_tokens=int(row["new_tokens"] or 0),
        devices=int(row["devices"] or 1),
        engine=engine,
        dtype=row.get("dtype") or "bf16",
        weight_dtype=row.get("weight_dtype") or None,
    )


def _dense(row: Mapping[str, str]) -> Comparison:
    w = _workload(row, row["engine"])
    # FlashAttention-2 is what the vLLM tables ran
    stack = "vllm" if "FlashAttention-2" in row["framework"] else ""
    time, m = workload_time(w, load_hardware(row["hardware"], stack)), w.meta
    measured = float(row["value"])
    if row["metric"] == "tokens_per_s":
        measured = dense_seconds(measured, m.phase, m.batch, m.seq, m.new_tokens)
    elif row["metric"] == "all_tokens_per_s":
        measured = m.batch * (m.seq + m.new_tokens) / measured
    what = f"{row['model']}, {row['framework']}"
    return _comparison(row, what, _where(row), measured, time.total_s, time.total_lower_s, time.total_upper_s)


def _where(row: Mapping[str, str], scope: str = "") -> str:
    new = f" + {row['new_tokens']}" if row["new_tokens"] not in ("", "0") else ""
    devices = f" x {row['devices']}" if row["devices"] not in ("", "1") else ""
    return f"{row['gpu']}{devices}, {scope or row['phase']}, batch {row['batch']}, seq {row['seq']}{new}"


def _speedup(row: Mapping[str, str], given: bool) -> Comparison:
    hw, part = load_hardware(row["hardware"]), row["scope"] == "projections"
    dense = _workload(row, "" if part else row["engine"])
    fraction, layers = _sparsity(row["sparsity"]), dense.meta.layers
    removed: Any = fraction
    if row["first_layer"]:
        first, last = int(row["first_layer"]), int(row["last_layer"] or layers - 1)
        kinds = fraction if isinstance(fraction, Mapping) else {"": fraction}
        by_layer = {kind: [s if first <= i <= last else 0.0 for i in range(layers)] for kind, s in kinds.items()}
        removed = by_layer.get("", by_layer)
    pruned = prune(dense, row["family"], removed, **dict(parse_options(row["options"], row["family"])))
    scope = row["phase"]
    if part:
        dense, pruned, scope = _projections(dense), _projections(pruned), "projections of a layer"
    before, after, m = float(row["dense"]), float(row["pruned"]), dense.meta
    tokens = row["unit"].startswith("tokens")
    dense_s = None
    if given and not part and tokens:
        dense_s = dense_seconds(before, m.phase, m.batch, m.seq, m.new_tokens)
    elif given and not part:
        dense_s = before * _SCALE[row["unit"]]
    (predicted,) = speedups(dense, [pruned], hw, dense_s=dense_s)
    percent = row["sparsity"] if "=" in row["sparsity"] else f"{100 * float(row['sparsity']):.3g} %"
    what = f"{row['method']}, {row['model']}, {percent}{f' from layer {first}' if row['first_layer'] else ''}"
    ratio = after / before if tokens else before / after
    return _comparison(row, what, _where(row, scope), ratio, predicted.speedup, predicted.lower, predicted.upper)


def _projections(w: Workload) -> Workload:
    """Return only the projections of the layers, without the operators that pruning adds."""
    return w.take(w.is_role("q", "k", "v", "o", "gate", "up", "down") & (w.layer >= 0) & ~w.overhead)


def _served(row: Mapping[str, str]) -> Comparison | None:
    served = serving_workload(row)
    if served is None:
        return None
    w, hw = served
    (s,) = speedups(w, [w], hw)
    assert s.dense_tpot_s is not None
    assert s.dense_tpot_lower is not None
    assert s.dense_tpot_upper is not None
    gpu = row["hardware"].partition("_")[0].upper()
    where = _where({**row, "batch": row["concurrency"], "gpu": gpu}, "serve")
    what = f"{row['model']}, {row['weight_dtype']}, {row['engine']} {row['version']}".rstrip()
    return _comparison(row, what, where, float(row["tpot_s"]), s.dense_tpot_s, s.dense_tpot_lower, s.dense_tpot_upper)


def serving_workload(row: Mapping[str, str]) -> tuple[Workload, HardwareProfile] | None:
    """Return workload and hardware of a row of the serving table; None where its caches do not fit."""
    weight, hw = row["weight_dtype"], load_hardware(row["hardware"])
    limit = load_engine(row["engine"]).limit(hw.memory_bytes, hw.name)
    w = lower(
        load_model(row["model"]),
        phase="serve",
        batch=int(row["concurrency"]),
        devices=int(row["devices"]),
        parallel=row["parallel"],
        seq=int(row["seq"]),
        new_tokens=int(row["new_tokens"]),
        token_budget=None if limit is None else limit.tokens,
        dtype="fp8" if weight == "fp8_block" else weight,
        weight_dtype=weight,
        kv_dtype=row["kv_dtype"] or None,
        engine=_as_of(row["engine"], row["version"]),
    )
    return (w, hw) if memory(w, hw, share=1.0).fits else None


def _as_of(engine: str, version: str) -> str:
    """Return an engine in the generation of a version, or in the one assumed for runs without a version."""
    version = version or NO_VERSION.get(engine, "")
    return f"{engine}@{version}" if version and load_engine(engine).generations else engine


def compare_gemms(what: str = "2:4") -> list[Comparison]:
    """Return published ratios of a dense GEMM's time to the time of its "2:4" or its "narrower" version."""
    return [_gemm_ratio(row) for row in published("gemm_ratios") if row["what"] == what]


def _gemm_ratio(row: Mapping[str, str]) -> Comparison:
    hw = load_hardware(row["hardware"])
    m, n, k, pruned_n, pruned_k = (np.array([int(row[name])]) for name in ("m", "n", "k", "pruned_n", "pruned_k"))
    kernel, density = (Kernel.SPARSE24, 0.5) if row["what"] == "2:4" else (Kernel.DENSE, 1.0)
    # these benchmarks repeat one GEMM, so its weights may stay in the L2 cache
    options = Options(row["dtype"], cold=False)
    dense, ((_, dense_error),) = gemm_predicted(m, n, k, hw, options)
    pruned_options = replace(options, kernel=np.array([kernel]), density=density)
    pruned, ((_, pruned_error),) = gemm_predicted(m, pruned_n, pruned_k, hw, pruned_options)
    ratio = float(dense.seconds[0] / pruned.seconds[0])
    width = float(np.exp(ratio_half(dense_error, pruned_error))[0])
    shape = f"{row['m']}x{row['n']}x{row['k']}"
    if row["what"] != "2:4":
        shape += f" to {row['m']}x{row['pruned_n']}x{row['pruned_k']}"
    if row["gemms"] != "1":
        shape += f", {row['gemms']} GEMMs"
    measured = float(row["dense_us"]) / float(row["pruned_us"])
    where = f"{row['gpu']}, {row['dtype']}"
    ends = ratio / width, ratio * width
    return Comparison(shape, where, measured, ratio, *ends, row["source"], reason=row["reason"])
