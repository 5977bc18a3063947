"""A profile against measurements: every predicted time beside the measured one.

Use :func:`validate` with a profile and records: it returns a :class:`Report` of arrays. :mod:`calibration.judge.scores`
makes numbers of it, :mod:`calibration.judge.report` a text, :mod:`calibration.judge.report_figures` figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit.core import weight_copies
from calibration.records.screening import work
from calibration.records.table import OPERATORS, Records
from simulator.errors import InputError
from simulator.hardware.constants import CLASSES
from simulator.hardware.profile import HardwareProfile
from simulator.kernels.attention import decode_attention_time, prefill_attention_time
from simulator.kernels.elementwise import class_code, elementwise_time
from simulator.kernels.gemm import gemm_time
from simulator.kernels.intervals import REGIMES, OpTime
from simulator.workload import DTYPES, ROLES

F = NDArray[np.float64]

SIMPLE_SHARE, SIMPLE_FLOOR_S = 0.8, 3e-6
"""Share of the datasheet bandwidth and fixed time of the rule of thumb max(FLOP / peak, bytes / (0.8 bandwidth)) + 3
us."""


@dataclass(frozen=True, eq=False)
class Part:
    """One operator in one number format ("int8_wo": int8 weights under 16-bit activations), a row a measurement."""

    operator: str
    dtype: str
    sizes: Mapping[str, F]  # dimensions that errors are shown against and that pairs may differ in
    measured_s: F
    predicted_s: F
    lower_s: F
    upper_s: F
    roofline_s: F  # max(FLOP / peak, bytes / bandwidth)
    simple_s: F  # the same with 0.8 of the bandwidth, plus 3 us
    regime: NDArray[np.str_]  # of the interval
    status: str = "default"  # of the profile's section: "calibrated", "borrowed" or "default"
    seen: bool = False  # whether that was fitted on these very rows

    def __len__(self) -> int:
        return len(self.measured_s)

    @property
    def name(self) -> str:
        """Operator and format, as headings and files name the part."""
        return f"{self.operator} {self.dtype}"

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
    """Predict every record, of one number format (as :meth:`Records.labels` names it) or of all, and compare.

    Rows without a time that can be one, or that are no operator of the model or of the device, are counted in
    ``skipped``. InputError, with the reasons, when no row can be predicted.
    """
    skipped: dict[str, int] = {}
    timed = np.isfinite(records.seconds) & (records.seconds > 0)
    if count := int((~timed).sum()):
        skipped["the time is no positive number"] = count
    records = records.select(timed)
    parts = []
    # copies are judged with the elementwise operators
    operators = np.where(records.is_operator("copy"), OPERATORS.index("elementwise"), records.operator)
    labels = records.labels().astype(str)
    for code, label in sorted(set(zip(operators.tolist(), labels.tolist(), strict=True))):
        rows, operator = records.select((operators == code) & (labels == label)), OPERATORS[code]
        if dtype is not None and label != dtype:
            continue
        if operator not in _PREDICT:
            skipped[f"{operator} is no single operator of the model"] = len(rows)
        elif DTYPES[int(rows.dtype[0])] not in hw.rates:
            skipped[f"{hw.name} has no {DTYPES[int(rows.dtype[0])]} arithmetic"] = len(rows)
        else:
            parts.append(_part(operator, label, rows, hw, level))
    if not parts:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in skipped.items())
        raise InputError(f"nothing to validate{f': {reasons}' if reasons else ''}{f' in {dtype}' if dtype else ''}")
    device = ", ".join(dict.fromkeys(s.device for s in records.sources if s.device)) or "unknown"
    software = ", ".join(dict.fromkeys(s.software for s in records.sources if s.software)) or "unknown"
    held_out = {f"{o} {d}": dict(s.accuracy) for (o, d), s in hw.sections.items() if s.accuracy}
    return Report(hw.name, device, software, level, tuple(parts), MappingProxyType(skipped), MappingProxyType(held_out))


def _part(operator: str, label: str, r: Records, hw: HardwareProfile, level: float) -> Part:
    """Rows of one operator and format beside their prediction and two rooflines."""
    section, predict = _PREDICT[operator]
    if operator == "attention_decode":
        r = r.select(np.argsort(r.cold, kind="stable"))  # its model takes warm and cold caches one after the other
    dtype, weight = DTYPES[int(r.dtype[0])], DTYPES[int(r.weight_dtype[0])]
    time, sizes, regime = predict(r, hw, {"dtype": dtype, "weight_dtype": weight, "level": level})
    flops, weights, others = work(r)
    compute, moved = flops / hw.peak_flop_per_s(dtype), (weights + others) / hw.bandwidth_bytes_per_s
    fitted = hw.section(section, dtype)
    origin = fitted.provenance
    return Part(
        operator,
        label,
        MappingProxyType({name: np.asarray(v, dtype=np.float64) for name, v in sizes.items()}),
        r.seconds.astype(np.float64),
        time.seconds,
        time.lower,
        time.upper,
        np.maximum(compute, moved),
        np.maximum(compute, moved / SIMPLE_SHARE) + SIMPLE_FLOOR_S,
        np.asarray(regime, dtype=np.str_),
        fitted.status,
        origin is not None and origin.rows == len(r) and origin.digest == r.tidy().digest(),
    )


Predicted = tuple[OpTime, Mapping[str, Any], Any]
"""Times, sizes and regimes of the rows of an operator."""


def joined(times: Sequence[OpTime]) -> OpTime:
    """Times of several calls, one after the other."""
    return OpTime(**{f.name: np.concatenate([getattr(t, f.name) for t in times]) for f in fields(OpTime)})


def _gemm(r: Records, hw: HardwareProfile, options: Mapping[str, Any]) -> Predicted:
    kernel = 1 if r.is_operator("gemm_2to4")[0] else 0
    t = gemm_time(r.m, r.n, r.k, hw, kernel=kernel, copies=weight_copies(r), detail=True, **options)
    total = t.seconds / t.residual
    code = 3 * ((r.m > 16).astype(int) + (r.m > 256)) + (total > 2.0 * t.fixed_s) + (total > 8.0 * t.fixed_s)
    return t, {"m": r.m, "n": r.n, "k": r.k}, np.array(REGIMES)[code]


def _attention(r: Records, hw: HardwareProfile, options: Mapping[str, Any]) -> Predicted:
    common = {"dtype": options["dtype"], "kv_dtype": options["weight_dtype"], "level": options["level"]}

    def call(time: Callable[..., OpTime], lengths: Sequence[str], x: Records, **more: Any) -> OpTime:
        shape = [getattr(x, name) for name in ("batch", *lengths, "heads", "kv_heads", "head_dim")]
        return time(*shape, hw, window=x.window, density=x.density, **common, **more)

    if r.is_operator("attention_decode")[0]:
        # the published tables read one cache again and again, this program's own measurements do not
        groups = [(cold, r.select(r.cold == cold)) for cold in (False, True)]
        t = joined([call(decode_attention_time, ["kv_len"], rows, cold=c) for c, rows in groups if len(rows)])
        sizes = {"kv_len": r.kv_len}
    else:
        t = call(prefill_attention_time, ["q_len", "kv_len"], r, block=r.block)
        sizes = {"q_len": r.q_len, "history": r.kv_len - r.q_len}
    sizes |= {"batch": r.batch, "kv_heads": r.kv_heads, "group": r.heads // r.kv_heads, "head_dim": r.head_dim}
    return t, sizes, t.limits


def _elementwise(r: Records, hw: HardwareProfile, options: Mapping[str, Any]) -> Predicted:
    # a copy is of the class of copies
    role = np.where(r.is_operator("copy") | (r.role < 0), ROLES.index("cache_write"), r.role)
    t = elementwise_time(r.read_bytes, r.write_bytes, hw, role=role, dtype=options["dtype"])
    return t, {"bytes": r.read_bytes + r.write_bytes, "role": role}, np.array(CLASSES)[class_code(role)]


_PREDICT: Mapping[str, tuple[str, Callable[..., Predicted]]] = {
    "gemm": ("gemm", _gemm),
    "gemm_2to4": ("gemm", _gemm),
    "attention_prefill": ("attention_prefill", _attention),
    "attention_block_sparse": ("attention_prefill", _attention),
    "attention_decode": ("attention_decode", _attention),
    "elementwise": ("elementwise", _elementwise),
}
"""Section of the profile and prediction of each operator of a record."""
