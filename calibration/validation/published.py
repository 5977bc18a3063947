"""Predicted against published: dense times in engines, speedups of really pruned models, serving runs and GEMM ratios
that papers and projects measured, where conditions are known.

Use :func:`compare_dense`, :func:`compare_speedups`, :func:`compare_serving` and :func:`compare_gemms`;
:mod:`calibration.validation.engines` sums them up. The measured values ship as ``calibration/measurements/``, each row
with its source, whether engines are fitted or judged on it, and what it leaves open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from calibration.measurements import published
from simulator.cli.options import sparsity
from simulator.cost.gemm_shapes import Options
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.predict.quality import parse_options
from simulator.predict.scenario import dense_seconds
from simulator.predict.speedup import speedups
from simulator.pruning import prune
from simulator.uncertainty.forward import ratio_half
from simulator.uncertainty.intervals import workload_time
from simulator.uncertainty.operators import gemm_predicted
from simulator.workload import Kernel, Workload
from simulator.workload_batch import memory

MISS = 0.10
"""A relative error beyond this is a miss, and its likely reason is printed."""

_SCALE = {"s": 1.0, "ms": 1e-3, "s/batch": 1.0}


@dataclass(frozen=True)
class Comparison:
    """One published value, a ratio of times or seconds, beside the prediction of it."""

    what: str  # method, model and fraction
    where: str  # GPU, phase, batch and length
    measured: float
    predicted: float
    lower: float
    upper: float
    source: str
    assumed: str = ""  # what the source leaves open
    reason: str = ""  # the likely one of a miss
    engine: str = ""
    gpu: str = ""  # name of its profile
    split: str = ""  # "fit": parameters of the engine were fitted on its source; "judge": not
    own_code: bool = False  # the pruned model ran in other modelling code than the dense one

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1.0

    @property
    def inside(self) -> bool:
        """Whether the measured value lies in the predicted interval."""
        return self.lower <= self.measured <= self.upper

    @property
    def half(self) -> float:
        """Half-width of the interval, relative."""
        return float(np.sqrt(self.upper / self.lower)) - 1.0


def median_error(rows: Sequence[Comparison]) -> float:
    """Median absolute relative error."""
    return round(median(abs(r.error) for r in rows), 12)


def compare_dense() -> list[Comparison]:
    """Published times of dense models in their engines, s, of a pass or a whole request."""
    return [_dense(row) for row in published("dense") if not row["left_out"]]


def compare_speedups(given: bool = False) -> list[Comparison]:
    """Published speedups of pruned models in their engines, predicted under the same conditions; ``given`` their
    measured dense time, where the row is of a whole model."""
    return [_speedup(row, given) for row in published("speedups") if not row["left_out"]]


def compare_serving(engine: str = "") -> list[Comparison]:
    """Measured times per output token of serving runs, s, of one engine or of all; those whose caches do not fit are
    left out."""
    rows = [r for r in published("serving") if not r["left_out"] and engine in ("", r["engine"])]
    return [c for c in map(_served, rows) if c is not None]


def _workload(row: Mapping[str, str], engine: str) -> Workload:
    call: dict[str, Any] = {name: int(row[name] or 0) for name in ("batch", "seq", "new_tokens")}
    call |= {"phase": row["phase"], "devices": int(row["devices"] or 1), "engine": engine}
    call |= {"dtype": row.get("dtype") or "bf16", "weight_dtype": row.get("weight_dtype") or None}
    return lower(load_model(row["model"]), **call)


def _dense(row: Mapping[str, str]) -> Comparison:
    w = _workload(row, row["engine"])
    # FlashAttention-2 is what the vLLM tables ran
    stack = "vllm" if "FlashAttention-2" in row["framework"] else ""
    found, m = workload_time(w, load_hardware(row["hardware"], stack)), w.meta
    value = float(row["value"])
    if row["metric"] == "tokens_per_s":
        value = dense_seconds(value, m.phase, m.batch, m.seq, m.new_tokens)
    elif row["metric"] == "all_tokens_per_s":
        value = m.batch * (m.seq + m.new_tokens) / value
    what = f"{row['model']}, {row['framework']}"
    ends = value, found.total_s, found.total_lower_s, found.total_upper_s
    return Comparison(what, _where(row), *ends, **_about(row))


def _where(row: Mapping[str, str], scope: str = "") -> str:
    new = f" + {row['new_tokens']}" if row["new_tokens"] not in ("", "0") else ""
    devices = f" x {row['devices']}" if row["devices"] not in ("", "1") else ""
    return f"{row['gpu']}{devices}, {scope or row['phase']}, batch {row['batch']}, seq {row['seq']}{new}"


def _about(row: Mapping[str, str]) -> dict[str, Any]:
    names = ("source", "assumed", "reason", "engine", "split")
    own = row.get("own_code") == "true"
    return {**{name: row[name] for name in names}, "gpu": row["hardware"], "own_code": own}


def _speedup(row: Mapping[str, str], given: bool) -> Comparison:
    hw, part = load_hardware(row["hardware"]), row["scope"] == "projections"
    dense = _workload(row, "" if part else row["engine"])
    fraction, layers = sparsity("sparsity", row["sparsity"]), dense.meta.layers
    asked: Any = fraction
    if row["first_layer"]:
        first, last = int(row["first_layer"]), int(row["last_layer"] or layers - 1)
        kinds = fraction if isinstance(fraction, Mapping) else {"": fraction}
        by_layer = {kind: [s if first <= i <= last else 0.0 for i in range(layers)] for kind, s in kinds.items()}
        asked = by_layer.get("", by_layer)
    pruned = prune(dense, row["family"], asked, **dict(parse_options(row["options"], row["family"])))
    scope = row["phase"]
    if part:
        dense, pruned, scope = _projections(dense), _projections(pruned), "projections of a layer"
    before, after, m = float(row["dense"]), float(row["pruned"]), dense.meta
    tokens = row["unit"].startswith("tokens")
    dense_s = None
    if given and not part:
        dense_s = (
            dense_seconds(before, m.phase, m.batch, m.seq, m.new_tokens) if tokens else before * _SCALE[row["unit"]]
        )
    (found,) = speedups(dense, [pruned], hw, dense_s=dense_s)
    what = f"{row['method']}, {row['model']}, {_fraction(row)}{f' from layer {first}' if row['first_layer'] else ''}"
    ratio = after / before if tokens else before / after
    return Comparison(what, _where(row, scope), ratio, found.speedup, found.lower, found.upper, **_about(row))


def _fraction(row: Mapping[str, str]) -> str:
    return row["sparsity"] if "=" in row["sparsity"] else f"{100 * float(row['sparsity']):.3g} %"


def _projections(w: Workload) -> Workload:
    """Only the projections of the layers, without what pruning adds."""
    return w.take(w.is_role("q", "k", "v", "o", "gate", "up", "down") & (w.layer >= 0) & ~w.overhead)


def _served(row: Mapping[str, str]) -> Comparison | None:
    found = serving_workload(row)
    if found is None:
        return None
    w, hw = found
    (s,) = speedups(w, [w], hw)
    assert s.dense_tpot_s is not None
    low, high = s.dense_lower / s.dense_s, s.dense_upper / s.dense_s
    gpu = row["hardware"].partition("_")[0].upper()
    about = {**row, "batch": row["concurrency"], "phase": "serve", "gpu": gpu, "split": "fit", "reason": ""}
    what = f"{row['model']}, {row['weight_dtype']}, {row['engine']} {row['version']}".rstrip()
    ends = float(row["tpot_s"]), s.dense_tpot_s, s.dense_tpot_s * low, s.dense_tpot_s * high
    return Comparison(what, _where(about, "serve"), *ends, **_about(about))


def serving_workload(row: Mapping[str, str]) -> tuple[Workload, HardwareProfile] | None:
    """What a row of the serving table ran; None where its caches do not fit."""
    weight = row["weight_dtype"]
    dtype = "fp8" if weight == "fp8_block" else weight
    asked: dict[str, Any] = {"phase": "serve", "batch": int(row["concurrency"]), "devices": int(row["devices"])}
    asked |= {"seq": int(row["seq"]), "new_tokens": int(row["new_tokens"]), "dtype": dtype, "weight_dtype": weight}
    asked |= {"kv_dtype": row["kv_dtype"] or None, "engine": row["engine"]}
    w, hw = lower(load_model(row["model"]), **asked), load_hardware(row["hardware"])
    return (w, hw) if memory(w, hw).fits else None


def compare_gemms(what: str = "2:4") -> list[Comparison]:
    """Published ratios of a dense GEMM's time to that of its "2:4" or its "narrower" version, predicted."""
    return [_gemm_ratio(row) for row in published("gemm_ratios") if row["what"] == what]


def _gemm_ratio(row: Mapping[str, str]) -> Comparison:
    hw = load_hardware(row["hardware"])
    m, n, k, few_n, few_k = (np.array([int(row[name])]) for name in ("m", "n", "k", "pruned_n", "pruned_k"))
    kernel, density = (Kernel.SPARSE24, 0.5) if row["what"] == "2:4" else (Kernel.DENSE, 1.0)
    # these benchmarks time one GEMM again and again, so its weights may stay in the L2 cache
    options = Options(row["dtype"], cold=False)
    dense, ((_, dense_error),) = gemm_predicted(m, n, k, hw, options)
    pruned_options = replace(options, kernel=np.array([kernel]), density=density)
    pruned, ((_, pruned_error),) = gemm_predicted(m, few_n, few_k, hw, pruned_options)
    ratio = float(dense.seconds[0] / pruned.seconds[0])
    width = float(np.exp(ratio_half(dense_error, pruned_error))[0])
    shape = f"{row['m']}x{row['n']}x{row['k']}"
    if row["what"] != "2:4":
        shape += f" to {row['m']}x{row['pruned_n']}x{row['pruned_k']}"
    if row["gemms"] != "1":
        shape += f", {row['gemms']} GEMMs"
    measured = float(row["dense_us"]) / float(row["pruned_us"])
    where = f"{row['gpu']}, {row['dtype']}"
    bounds = (ratio / width, ratio * width)
    return Comparison(shape, where, measured, ratio, *bounds, row["source"], reason=row["reason"])
