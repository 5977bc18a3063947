"""A profile against measurements: every predicted time beside the measured one.

Use :func:`validate` with a profile and records: it returns a :class:`Report` of arrays. :mod:`calibration.judge.scores` makes numbers of it,
:mod:`calibration.judge.report` a text, :mod:`calibration.judge.report_figures` figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit.kernels import weight_copies
from calibration.records.records import Records
from calibration.records.screening import work
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.kernels.intervals import OpTime
from simulator.workload import DTYPES, ROLES

F = NDArray[np.float64]

SIMPLE_SHARE, SIMPLE_FLOOR_S = 0.8, 3e-6
"""Share of the datasheet bandwidth and fixed time of the rule of thumb max(FLOP / peak, bytes / (0.8 bandwidth)) + 3 us."""


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
    for operator, label in sorted(
        {(str(o), str(d)) for o, d in zip(names, labels, strict=True)}, key=lambda p: (_ORDER.index(p[0]), p[1])
    ):
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
    from simulator.kernels.gemm import gemm_time
    from simulator.kernels.intervals import REGIMES

    dtype, weight = DTYPES[int(r.dtype[0])], DTYPES[int(r.weight_dtype[0])]
    kernel = 1 if operator == "gemm_2to4" else 0
    t = gemm_time(
        r.m,
        r.n,
        r.k,
        hw,
        dtype=dtype,
        weight_dtype=weight,
        kernel=kernel,
        copies=weight_copies(r),
        level=level,
        detail=True,
    )
    total = t.seconds / t.residual
    code = 3 * ((r.m > 16).astype(int) + (r.m > 256)) + (total > 2.0 * t.fixed_s) + (total > 8.0 * t.fixed_s)
    sizes = {"m": r.m, "n": r.n, "k": r.k}
    return _part(operator, label, r, hw, t, sizes, np.array(REGIMES)[code], "gemm", dtype)


def _prefill(operator: str, label: str, r: Records, hw: HardwareProfile, level: float) -> Part:
    from simulator.kernels.attention import prefill_attention_time

    dtype, cache = DTYPES[int(r.dtype[0])], DTYPES[int(r.weight_dtype[0])]
    t = prefill_attention_time(
        r.batch,
        r.q_len,
        r.kv_len,
        r.heads,
        r.kv_heads,
        r.head_dim,
        hw,
        window=r.window,
        density=r.density,
        block=r.block,
        dtype=dtype,
        kv_dtype=cache,
        level=level,
    )
    sizes = {
        "q_len": r.q_len,
        "history": r.kv_len - r.q_len,
        "batch": r.batch,
        "kv_heads": r.kv_heads,
        "group": r.heads // r.kv_heads,
        "head_dim": r.head_dim,
    }
    return _part(operator, label, r, hw, t, sizes, t.limits, "attention_prefill", dtype)


def _decode(operator: str, label: str, r: Records, hw: HardwareProfile, level: float) -> Part:
    from simulator.kernels.attention import decode_attention_time

    dtype, cache = DTYPES[int(r.dtype[0])], DTYPES[int(r.weight_dtype[0])]
    parts = []
    for cold in (
        False,
        True,
    ):  # the published tables read one cache again and again, this program's own measurements do not
        rows = r.select(r.cold == cold)
        if len(rows):
            t = decode_attention_time(
                rows.batch,
                rows.kv_len,
                rows.heads,
                rows.kv_heads,
                rows.head_dim,
                hw,
                window=rows.window,
                density=rows.density,
                dtype=dtype,
                kv_dtype=cache,
                level=level,
                cold=cold,
            )
            parts.append((rows, t))
    r = Records.concat([rows for rows, _ in parts])
    t = OpTime(
        *(
            np.concatenate([getattr(t, name) for _, t in parts])
            for name in ("seconds", "lower", "upper", "roofline_s", "bound")
        )
    )
    sizes = {
        "kv_len": r.kv_len,
        "batch": r.batch,
        "kv_heads": r.kv_heads,
        "group": r.heads // r.kv_heads,
        "head_dim": r.head_dim,
    }
    return _part(operator, label, r, hw, t, sizes, t.limits, "attention_decode", dtype)


def _elementwise(operator: str, label: str, r: Records, hw: HardwareProfile, level: float) -> Part:
    from simulator.hardware.constants import CLASSES
    from simulator.kernels.elementwise import class_code, elementwise_time

    dtype = DTYPES[int(r.dtype[0])]
    role = np.where(r.is_operator("copy") | (r.role < 0), ROLES.index("cache_write"), r.role)  # of the class of copies
    t = elementwise_time(r.read_bytes, r.write_bytes, hw, role=role, dtype=dtype)
    regime = np.array(CLASSES)[class_code(role)]
    return _part(
        operator, label, r, hw, t, {"bytes": r.read_bytes + r.write_bytes, "role": role}, regime, "elementwise", dtype
    )


def _part(
    operator: str,
    label: str,
    r: Records,
    hw: HardwareProfile,
    t: OpTime,
    sizes: Mapping[str, Any],
    regime: Any,
    section: str,
    dtype: str,
) -> Part:
    flops, weights, others = work(r)
    peak = hw.peak_flop_per_s(dtype)
    moved = (weights + others) / hw.bandwidth_bytes_per_s
    fitted = hw.section(section, dtype)
    simple = np.maximum(flops / peak, moved / SIMPLE_SHARE) + SIMPLE_FLOOR_S
    seen = (
        fitted.provenance is not None
        and fitted.provenance.rows == len(r)
        and fitted.provenance.digest == r.tidy().digest()
    )
    return Part(
        operator,
        label,
        MappingProxyType({name: np.asarray(v, dtype=np.float64) for name, v in sizes.items()}),
        r.seconds.astype(np.float64),
        t.seconds,
        t.lower,
        t.upper,
        np.maximum(flops / peak, moved),
        simple,
        np.asarray(regime, dtype=np.str_),
        t.limits,
        fitted.status,
        seen,
    )


_PREDICT: Mapping[str, Any] = MappingProxyType(
    {
        "gemm": _gemm,
        "gemm_2to4": _gemm,
        "attention_prefill": _prefill,
        "attention_block_sparse": _prefill,
        "attention_decode": _decode,
        "elementwise": _elementwise,
    }
)
_OPERATORS_OF_PART: tuple[str, ...] = (
    "gemm",
    "gemm_2to4",
    "low_rank",
    "gather_gemm",
    "attention_prefill",
    "attention_decode",
    "attention_block_sparse",
    "elementwise",
    "elementwise",
    "launch_eager",
    "launch_graph",
)
"""Part of a report by operator code: copies are judged with the elementwise operators."""
_ORDER: tuple[str, ...] = tuple(dict.fromkeys(_OPERATORS_OF_PART))
