"""Predict published measurements under their conditions: dense times in engines, speedups, serving runs, GEMM ratios.

The measured values ship as ``calibration/measurements/``; each row has its source, whether engines are fitted or
evaluated on it, and the assumptions where the source is silent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from calibration.evidence.scoring import Comparison
from calibration.measurements import published
from simulator.capacity import memory
from simulator.codes import Kernel
from simulator.engines.engine import load_engine
from simulator.engines.generations import split
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.operators.gemm import Options
from simulator.prediction.quality import parse_options
from simulator.prediction.scenario import dense_seconds
from simulator.prediction.table import speedups
from simulator.pruning import prune
from simulator.uncertainty.forward import ratio_half
from simulator.uncertainty.intervals import workload_time
from simulator.uncertainty.operators import gemm_predicted
from simulator.units import parse_fraction
from simulator.workload import Workload

MISS = 0.10
"""Relative error from which the likely reason is printed."""
NO_VERSION: Mapping[str, str] = {"vllm": "v1"}
"""Generation assumed for serving runs whose version the source does not state."""
NOT_USED: Mapping[str, int] = {
    "GPU or batch not stated (LLM-Pruner, ShortGPT, FP8 2:4 in vLLM)": 11,
    "share of the attention computed not stated (MInference, A-Shape, InfLLM)": 51,
    "another batch for the pruned model, so no ratio at equal conditions (SliceGPT Table 11)": 2,
    "GPU without a profile (Quadro RTX 6000, RTX 5090 kernels)": 27,
    "not a language model (SAM)": 2,
}
"""Published end-to-end speedups that do not ship, by reason."""
_SCALE = {"s": 1.0, "ms": 1e-3, "s/batch": 1.0}


def compare_dense() -> list[Comparison]:
    """Return published times of dense models in their engines, s, per pass or per request."""
    return [_dense(row) for row in published("dense") if not row["left_out"]]


def compare_speedups(given: bool = False) -> list[Comparison]:
    """Return published speedups of pruned models in their engines, predicted under the same conditions; with ``given``,
    only of whole models, predicted from the measured dense time."""
    rows = [r for r in published("speedups") if not r["left_out"] and not (given and r["scope"] == "projections")]
    return [_speedup(r, given) for r in rows]


def compare_serving(engine: str = "", experts: bool = True) -> list[Comparison]:
    """Return measured times per output token of serving runs, s, of one engine or of all, with or without models with
    routed experts; runs whose caches do not fit are excluded."""
    rows = [r for r in published("serving") if not r["left_out"] and engine in ("", r["engine"])]
    rows = [r for r in rows if experts or not load_model(r["model"]).experts]
    return [c for c in map(_served, rows) if c is not None]


def compare_gemms(what: str = "2:4") -> list[Comparison]:
    """Return published ratios of a dense GEMM's time to the time of its "2:4" or its "narrower" version."""
    return [_gemm_ratio(row) for row in published("gemm_ratios") if row["what"] == what]


def _comparison(row: Mapping[str, str], what: str, where: str, *values: Any) -> Comparison:
    """Return a comparison with the facts of a published row; ``values``: measured, predicted, lower, upper."""
    about: dict[str, Any] = {name: row.get(name, "") for name in ("source", "assumed", "reason")}
    about |= {"engine": split(row["engine"])[0] if "engine" in row else "", "gpu": row["hardware"]}
    about |= {"split": row.get("split") or "fit", "own_code": row.get("own_code") == "true"}
    return Comparison(what, where, *values, **about)


def _workload(row: Mapping[str, str], engine: str, **others: Any) -> Workload:
    defaults = {"batch": 1, "seq": 1, "new_tokens": 0, "devices": 1}
    others |= {name: int(row[name] or value) for name, value in defaults.items()}
    others |= {"dtype": row.get("dtype") or "bf16", "weight_dtype": row.get("weight_dtype") or None}
    return lower(load_model(row["model"]), phase=row["phase"], engine=engine, **others)


def _where(row: Mapping[str, str], scope: str = "") -> str:
    new = f" + {row['new_tokens']}" if row["new_tokens"] not in ("", "0") else ""
    devices = f" x {row['devices']}" if row["devices"] not in ("", "1") else ""
    return f"{row['gpu']}{devices}, {scope or row['phase']}, batch {row['batch']}, seq {row['seq']}{new}"


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


def _speedup(row: Mapping[str, str], given: bool) -> Comparison:
    part, removed = row["scope"] == "projections", row["sparsity"]
    dense = _workload(row, "" if part else row["engine"])
    pruned = _pruned(row, dense)
    if part:  # without the operators that pruning adds
        dense, pruned = (
            w.take(w.is_role("q", "k", "v", "o", "gate", "up", "down") & (w.layer >= 0) & ~w.overhead)
            for w in (dense, pruned)
        )
    before, after, m = float(row["dense"]), float(row["pruned"]), dense.meta
    tokens, dense_s = row["unit"].startswith("tokens"), None
    if given and tokens:
        dense_s = dense_seconds(before, m.phase, m.batch, m.seq, m.new_tokens)
    elif given:
        dense_s = before * _SCALE[row["unit"]]
    (s,) = speedups(dense, [pruned], load_hardware(row["hardware"]), dense_s=dense_s)
    percent = removed if "=" in removed else f"{100 * float(removed):.3g} %"
    first = f" from layer {int(row['first_layer'])}" if row["first_layer"] else ""
    where = _where(row, "projections of a layer" if part else row["phase"])
    ratio = after / before if tokens else before / after
    what = f"{row['method']}, {row['model']}, {percent}{first}"
    return _comparison(row, what, where, ratio, s.speedup, s.lower, s.upper)


def _pruned(row: Mapping[str, str], dense: Workload) -> Workload:
    """Return the pruned model: one fraction, or fractions by part ("q=0.1,down=0.5"), of all layers or of some."""
    pairs = [pair.rpartition("=") for pair in row["sparsity"].split(",")]
    kinds = {part: parse_fraction(value) for part, _, value in pairs}
    removed: Any = kinds
    if row["first_layer"]:
        first, last = int(row["first_layer"]), int(row["last_layer"] or dense.meta.layers - 1)
        removed = {k: [s if first <= i <= last else 0.0 for i in range(dense.meta.layers)] for k, s in kinds.items()}
    return prune(dense, row["family"], removed.get("", removed), **dict(parse_options(row["options"], row["family"])))


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
    weight, hw, engine = row["weight_dtype"], load_hardware(row["hardware"]), load_engine(row["engine"])
    limit, version = engine.limit(hw.memory_bytes, hw.name), row["version"] or NO_VERSION.get(row["engine"], "")
    w = _workload(
        {**row, "phase": "serve", "batch": row["concurrency"], "dtype": "fp8" if weight == "fp8_block" else weight},
        f"{row['engine']}@{version}" if version and engine.generations else row["engine"],
        parallel=row["parallel"],
        token_budget=None if limit is None else limit.tokens,
        kv_dtype=row["kv_dtype"] or None,
    )
    return (w, hw) if memory(w, hw, share=1.0).fits else None


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
    return _comparison(row, shape, where, measured, ratio, ratio / width, ratio * width)
