"""A profile against measurements: every predicted time beside the measured one, and what that says of the profile's accuracy.

Use :func:`validate` with a profile and records: it returns a :class:`Report` of arrays. :func:`errors`, :func:`by_size`, :func:`speedups` and
:func:`coverage` are its numbers, :func:`summary` all of them as plain data; ``report`` writes them down and ``report_figures`` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.profile_fit import weight_copies
from calibration.records import Records
from calibration.screening import work
from simulator.errors import InputError
from simulator.hardware import HardwareProfile
from simulator.optime import OpTime
from simulator.workload import DTYPES, ROLES

F = NDArray[np.float64]

M_RANGES: tuple[tuple[str, float, float], ...] = (("m <= 16", 0.0, 16.0), ("m 17-256", 16.0, 256.0), ("m > 256", 256.0, np.inf))
SIMPLE_SHARE, SIMPLE_FLOOR_S = 0.8, 3e-6
"""Share of the datasheet bandwidth and fixed time of the rule of thumb max(FLOP / peak, bytes / (0.8 bandwidth)) + 3 us."""
PAIRS = 200_000


@dataclass(frozen=True, eq=False)
class Part:
    """One operator in one number format: arrays of one length, a row a measurement.

    Attributes
    ----------
    operator, dtype : str
        As profiles name them; ``int8_wo`` is int8 weights under 16-bit activations.
    sizes : mapping of str to array
        Dimensions that errors are shown against and that pairs may differ in.
    measured_s, predicted_s, lower_s, upper_s : arrays, s
    roofline_s, simple_s : arrays, s
        max(FLOP / peak, bytes / bandwidth), and the same with 0.8 of the bandwidth plus 3 us.
    regime : array of str
        Of the interval.
    limit : array of str
        What the prediction says holds the time.
    status : str
        "calibrated", "borrowed" or "default": what the profile has for this operator.
    seen : bool
        Whether the section was fitted on these very rows.
    """

    operator: str
    dtype: str
    sizes: Mapping[str, F]
    measured_s: F
    predicted_s: F
    lower_s: F
    upper_s: F
    roofline_s: F
    simple_s: F
    regime: NDArray[np.str_]
    limit: NDArray[np.str_]
    status: str = "default"
    seen: bool = False

    def __len__(self) -> int:
        return len(self.measured_s)

    @property
    def error(self) -> F:
        """Predicted over measured time, less 1."""
        return self.predicted_s / self.measured_s - 1.0


@dataclass(frozen=True)
class Report:
    """A validation: the profile, its parts, and the rows no part took with the reason."""

    hardware: str
    device: str
    software: str
    level: float
    parts: tuple[Part, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)
    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def validate(hw: HardwareProfile, records: Records, *, dtype: str | None = None, level: float = 0.9) -> Report:
    """Predict every record and compare.

    Parameters
    ----------
    hw : HardwareProfile
    records : Records
        Rows with a time that can be one; the others are counted in ``skipped``.
    dtype : str, optional
        Number format to judge, as :meth:`Records.labels` names them; all by default.
    level : float
        Level of the intervals.

    Returns
    -------
    Report

    Raises
    ------
    InputError
        When no row can be predicted; with the reasons.
    """
    skipped: dict[str, int] = {}
    timed = np.isfinite(records.seconds) & (records.seconds > 0)
    if count := int((~timed).sum()):
        skipped["the time is no positive number"] = count
    records = records.select(timed)
    labels = records.labels().astype(str) if len(records) else np.zeros(0, dtype=np.str_)
    names = np.array(_OPERATORS_OF_PART)[records.operator] if len(records) else labels
    parts = []
    for operator, label in sorted({(str(o), str(d)) for o, d in zip(names, labels, strict=True)}, key=lambda p: (_ORDER.index(p[0]), p[1])):
        rows = records.select((names == operator) & (labels == label))
        if dtype is not None and label != dtype:
            continue
        if operator not in _PREDICT:
            skipped[f"{operator} is no single operator of the model"] = len(rows)
        elif DTYPES[int(rows.dtype[0])] not in hw.rates:
            skipped[f"{hw.name} has no {DTYPES[int(rows.dtype[0])]} arithmetic"] = len(rows)
        else:
            parts.append(_PREDICT[operator](operator, label, rows, hw, level))
    if not parts:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in skipped.items())
        raise InputError(f"nothing to validate{f': {reasons}' if reasons else ''}{f' in {dtype}' if dtype else ''}")
    device = ", ".join(dict.fromkeys(s.device for s in records.sources if s.device)) or "unknown"
    software = ", ".join(dict.fromkeys(s.software for s in records.sources if s.software)) or "unknown"
    held_out = {f"{o} {d}": dict(s.accuracy) for (o, d), s in hw.sections.items() if s.accuracy}
    return Report(hw.name, device, software, level, tuple(parts), MappingProxyType(skipped), MappingProxyType(held_out))


# -- predictions by operator ------------------------------------------------------------------------------------------------------


def _gemm(operator: str, label: str, r: Records, hw: HardwareProfile, level: float) -> Part:
    from simulator.gemm import gemm_time
    from simulator.intervals import REGIMES

    dtype, weight = DTYPES[int(r.dtype[0])], DTYPES[int(r.weight_dtype[0])]
    kernel = 1 if operator == "gemm_2to4" else 0
    t = gemm_time(r.m, r.n, r.k, hw, dtype=dtype, weight_dtype=weight, kernel=kernel, copies=weight_copies(r), level=level, detail=True)
    total = t.seconds / t.residual
    code = 3 * ((r.m > 16).astype(int) + (r.m > 256)) + (total > 2.0 * t.fixed_s) + (total > 8.0 * t.fixed_s)
    sizes = {"m": r.m, "n": r.n, "k": r.k}
    return _part(operator, label, r, hw, t, sizes, np.array(REGIMES)[code], "gemm", dtype)


def _prefill(operator: str, label: str, r: Records, hw: HardwareProfile, level: float) -> Part:
    from simulator.attention import prefill_attention_time

    dtype, cache = DTYPES[int(r.dtype[0])], DTYPES[int(r.weight_dtype[0])]
    t = prefill_attention_time(
        r.batch, r.q_len, r.kv_len, r.heads, r.kv_heads, r.head_dim, hw, window=r.window, density=r.density, block=r.block, dtype=dtype,
        kv_dtype=cache, level=level,
    )  # fmt: skip
    sizes = {"q_len": r.q_len, "history": r.kv_len - r.q_len, "batch": r.batch, "kv_heads": r.kv_heads, "group": r.heads // r.kv_heads, "head_dim": r.head_dim}
    return _part(operator, label, r, hw, t, sizes, t.limits, "attention_prefill", dtype)


def _decode(operator: str, label: str, r: Records, hw: HardwareProfile, level: float) -> Part:
    from simulator.attention import decode_attention_time

    dtype, cache = DTYPES[int(r.dtype[0])], DTYPES[int(r.weight_dtype[0])]
    parts = []
    for cold in (False, True):  # the published tables read one cache again and again, this program's own measurements do not
        rows = r.select(r.cold == cold)
        if len(rows):
            t = decode_attention_time(
                rows.batch, rows.kv_len, rows.heads, rows.kv_heads, rows.head_dim, hw, window=rows.window, density=rows.density, dtype=dtype,
                kv_dtype=cache, level=level, cold=cold,
            )  # fmt: skip
            parts.append((rows, t))
    r = Records.concat([rows for rows, _ in parts])
    t = OpTime(*(np.concatenate([getattr(t, name) for _, t in parts]) for name in ("seconds", "lower", "upper", "roofline_s", "bound")))
    sizes = {"kv_len": r.kv_len, "batch": r.batch, "kv_heads": r.kv_heads, "group": r.heads // r.kv_heads, "head_dim": r.head_dim}
    return _part(operator, label, r, hw, t, sizes, t.limits, "attention_decode", dtype)


def _elementwise(operator: str, label: str, r: Records, hw: HardwareProfile, level: float) -> Part:
    from simulator.elementwise import CLASSES, class_code, elementwise_time

    dtype = DTYPES[int(r.dtype[0])]
    role = np.where(r.role >= 0, r.role, ROLES.index("scatter" if "scatter" in ROLES else "residual"))
    role = np.where(r.is_operator("copy") | (r.role < 0), ROLES.index("cache_write"), role)  # of the class of copies
    t = elementwise_time(r.read_bytes, r.write_bytes, hw, role=role, dtype=dtype)
    regime = np.array(CLASSES)[class_code(role)]
    return _part(operator, label, r, hw, t, {"bytes": r.read_bytes + r.write_bytes, "role": role}, regime, "elementwise", dtype)


def _part(
    operator: str, label: str, r: Records, hw: HardwareProfile, t: OpTime, sizes: Mapping[str, Any], regime: Any, section: str, dtype: str
) -> Part:
    flops, weights, others = work(r)
    peak = hw.peak_flop_per_s(dtype)
    moved = (weights + others) / hw.bandwidth_bytes_per_s
    fitted = hw.section(section, dtype)
    simple = np.maximum(flops / peak, moved / SIMPLE_SHARE) + SIMPLE_FLOOR_S
    seen = fitted.provenance is not None and fitted.provenance.rows == len(r) and fitted.provenance.digest == r.tidy().digest()
    return Part(
        operator, label, MappingProxyType({name: np.asarray(v, dtype=np.float64) for name, v in sizes.items()}), r.seconds.astype(np.float64),
        t.seconds, t.lower, t.upper, np.maximum(flops / peak, moved), simple, np.asarray(regime, dtype=np.str_), t.limits, fitted.status, seen,
    )  # fmt: skip


_PREDICT: Mapping[str, Any] = MappingProxyType(
    {
        "gemm": _gemm, "gemm_2to4": _gemm, "attention_prefill": _prefill, "attention_block_sparse": _prefill, "attention_decode": _decode,
        "elementwise": _elementwise,
    }
)  # fmt: skip
_OPERATORS_OF_PART: tuple[str, ...] = (
    "gemm", "gemm_2to4", "low_rank", "gather_gemm", "attention_prefill", "attention_decode", "attention_block_sparse", "elementwise",
    "elementwise", "launch_eager", "launch_graph",
)  # fmt: skip
"""Part of a report by operator code: copies are judged with the elementwise operators."""
_ORDER: tuple[str, ...] = tuple(dict.fromkeys(_OPERATORS_OF_PART))


# -- numbers ----------------------------------------------------------------------------------------------------------------------


def errors(predicted_s: F, measured_s: F) -> dict[str, float]:
    """Accuracy of times, as fractions.

    Returns
    -------
    dict
        "mape", "median" and "p95" of the absolute relative error, and its signed mean "bias".

    Examples
    --------
    >>> errors(np.array([1.1, 0.9]), np.array([1.0, 1.0]))["mape"].__round__(3)
    0.1
    """
    e = predicted_s / measured_s - 1.0
    a = np.abs(e)
    return {"mape": float(a.mean()), "median": float(np.median(a)), "p95": float(np.quantile(a, 0.95)), "bias": float(e.mean())}


def by_size(part: Part, name: str, bins: int = 12) -> list[dict[str, float]]:
    """Errors over one dimension, in at most ``bins`` ranges that hold equal numbers of distinct sizes.

    Returns
    -------
    list of dict
        "low", "high" (of the sizes), "rows", and the values of :func:`errors`.
    """
    values = np.unique(part.sizes[name])
    out = []
    for chunk in np.array_split(values, min(bins, len(values))):
        rows = (part.sizes[name] >= chunk[0]) & (part.sizes[name] <= chunk[-1])
        out.append({"low": float(chunk[0]), "high": float(chunk[-1]), "rows": int(rows.sum()), **errors(part.predicted_s[rows], part.measured_s[rows])})
    return out


def pairs(sizes: Mapping[str, F], limit: int = PAIRS, low: float = 0.25, seed: int = 0) -> NDArray[np.intp]:
    """Pairs (smaller, larger) of rows that differ in exactly one size, by a ratio in [``low``, 1); at most ``limit``, drawn by chance.

    >>> pairs({"m": np.array([1.0, 2.0, 8.0]), "n": np.array([4.0, 4.0, 4.0])}).tolist()
    [[0, 1], [1, 2]]
    """
    names = list(sizes)
    out = []
    for axis in names:
        others = np.stack([sizes[o] for o in names if o != axis] or [np.zeros(len(sizes[axis]))], axis=1)
        key = np.unique(others, axis=0, return_inverse=True)[1].reshape(-1)
        order = np.lexsort((sizes[axis], key))
        key, size = key[order], sizes[axis][order]
        for gap in range(1, len(key)):
            same = key[gap:] == key[:-gap]
            if not same.any():
                break
            ratio = size[:-gap] / np.where(size[gap:] > 0, size[gap:], 1.0)
            at = np.flatnonzero(same & (ratio >= low) & (ratio < 1.0))
            out.append(np.stack([order[at], order[at + gap]], axis=1))
    found = np.concatenate(out) if out else np.zeros((0, 2), dtype=np.intp)
    if len(found) > limit:
        found = found[np.sort(np.random.default_rng(seed).choice(len(found), limit, replace=False))]
    return found


def speedups(part: Part, limit: int = PAIRS) -> dict[str, float]:
    """Accuracy of ratios of two times, over pairs of rows that differ in one size only by a ratio in [0.25, 1).

    Returns
    -------
    dict
        "pairs" and, where there are any, "median" and "p95" of the absolute relative error of the speedup, and "spearman" of predicted
        against measured speedup.
    """
    sizes = {name: v for name, v in part.sizes.items() if name != "role"}
    at = pairs(sizes, limit)
    if not len(at):
        return {"pairs": 0}
    from scipy.stats import spearmanr

    predicted = part.predicted_s[at[:, 1]] / part.predicted_s[at[:, 0]]
    measured = part.measured_s[at[:, 1]] / part.measured_s[at[:, 0]]
    e = np.abs(predicted / measured - 1.0)
    rank = float(spearmanr(predicted, measured).statistic) if len(at) > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0 else float("nan")
    return {"pairs": len(at), "median": float(np.median(e)), "p95": float(np.quantile(e, 0.95)), "spearman": rank}


def coverage(part: Part) -> list[dict[str, Any]]:
    """Share of the measured times inside their interval and its geometric half width, in all and by regime.

    Returns
    -------
    list of dict
        "regime" ("all" first), "rows", "coverage", "width" (a factor less 1).
    """
    inside = (part.measured_s >= part.lower_s) & (part.measured_s <= part.upper_s)
    half = 0.5 * np.log(part.upper_s / part.lower_s)
    out = []
    for name in ["all", *sorted(set(part.regime.tolist()))]:
        rows = np.ones(len(part), dtype=bool) if name == "all" else part.regime == name
        out.append({"regime": name, "rows": int(rows.sum()), "coverage": float(inside[rows].mean()), "width": float(np.expm1(half[rows].mean()))})
    return out


def part_summary(part: Part) -> dict[str, Any]:
    """Every number of one part as plain data."""
    out: dict[str, Any] = {
        "operator": part.operator, "dtype": part.dtype, "rows": len(part), "status": part.status, "fitted_on_these_rows": part.seen,
        "errors": errors(part.predicted_s, part.measured_s),
        "roofline": errors(part.roofline_s, part.measured_s), "simple": errors(part.simple_s, part.measured_s),
        "speedup": speedups(part), "coverage": coverage(part),
    }  # fmt: skip
    if "m" in part.sizes:
        m = part.sizes["m"]
        masks = {name: (m > low) & (m <= high) for name, low, high in M_RANGES}
        out["by_m"] = {name: {"rows": int(rows.sum()), **errors(part.predicted_s[rows], part.measured_s[rows])} for name, rows in masks.items() if rows.any()}
    out["by_size"] = {name: by_size(part, name) for name in part.sizes if name != "role"}
    return out


def summary(report: Report) -> dict[str, Any]:
    """A report as plain data: what ``prunesim validate --json`` prints."""
    return {
        "hardware": report.hardware, "measured_on": report.device, "software": report.software, "level": report.level,
        "held_out_when_fitted": {name: dict(values) for name, values in report.accuracy.items()},
        "skipped": dict(report.skipped), "parts": [part_summary(part) for part in report.parts],
    }  # fmt: skip


