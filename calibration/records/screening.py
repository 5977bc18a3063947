"""Check rows: refuse them by reason, check physical limits, join repeats, keep one method; add
exact shapes to profiles."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from calibration.devices.protocol import LIBRARIES
from calibration.records.timing_table import OPERATORS, PURPOSES, Flag, Records
from simulator.arrays import Array
from simulator.codes import DTYPE_BYTES, DTYPES, ROLES
from simulator.hardware.profile import HardwareProfile
from simulator.operators.attention import attention_pairs
from simulator.operators.gemm import EXACT_NAMES

LATENT = ("mla_prefill", "mla_decode")
DISAGREE = 1.10  # ratio of the largest and smallest time of one shape above which its rows conflict
LIBRARY_ROWS = 20  # rows of an engine's attention library that a fit needs
ROUNDING = 1.02  # datasheet rates have three digits, and clocks are rounded to the megahertz
# most bytes per clock that an SM reads from L2 (A100: 5120 for 108 SMs; NVIDIA, "A100 Tensor Core
# GPU Architecture")
L2_BYTES_PER_CLOCK = 64.0
# assumed standard deviation of a repeated measurement: smaller drift is not flagged
UNKNOWN_REPEAT = 0.02
_Z90, _Z95 = 1.6449, 1.9600

# reason -> numbers of the refused rows (1 is the first row of data)
Refusals = dict[str, list[int]]


def refusal_lines(refusals: Refusals) -> list[str]:
    out = []
    for reason, rows in refusals.items():
        some, plural = (
            ", ".join([*map(str, rows[:3]), *["..."] * (len(rows) > 3)]),
            "s" * (len(rows) > 1),
        )
        out.append(f"{len(rows)} row{plural}: {reason} (row{plural} {some})")
    return out


class Screen:
    """Rows of a file during its check; a row is refused once, for its first reason."""

    def __init__(self, size: int) -> None:
        self.kept: Array = np.ones(size, dtype=np.bool_)
        self.refusals: Refusals = {}

    def refuse(self, bad: Array, reason: str) -> None:
        bad = np.broadcast_to(bad, self.kept.shape) & self.kept
        if bad.any():
            self.kept = self.kept & ~bad
            rows = (np.flatnonzero(bad) + 1).tolist()
            self.refusals[reason] = sorted(self.refusals.get(reason, []) + rows)

    def refuse_kept(self, bad: Array, reason: str) -> None:
        """Refuse the rows of a mask over the rows that are kept so far."""
        full = np.zeros_like(self.kept)
        full[np.flatnonzero(self.kept)[bad]] = True
        self.refuse(full, reason)


def rotated_copies(weight_bytes: Array, l2_bytes: float) -> Array:
    return np.clip(np.ceil(l2_bytes / np.asarray(weight_bytes, dtype=np.float64)), 1, 6).astype(
        np.int32
    )


def work(records: Records) -> tuple[Array, Array, Array]:
    """Return FLOPs, weight (or cache) bytes and activation bytes of one execution of each row.
    Attention counts the pairs within its mask and window, 2:4 the computed half, a grouped product
    one token's groups."""
    r = records
    kinds = [
        r.is_operator("gemm", "gemm_2to4", "gather_gemm", "grouped_gemm"),
        r.is_operator("low_rank"),
        r.is_operator("attention_prefill", "attention_decode", "attention_block_sparse", *LATENT),
        r.is_operator("experts"),
    ]
    each = [_product_work(r), _low_rank_work(r), _attention_work(r), _expert_work(r)]
    flops, weights, activations = zip(*each)
    return (
        np.select(kinds, flops, 0.0),
        np.select(kinds, weights, 0.0),
        np.select(kinds, activations, r.read_bytes + r.write_bytes),
    )


def _product_work(r: Records) -> tuple[Array, Array, Array]:
    weights = r.n.astype(np.float64) * r.k
    tokens = np.where(r.is_operator("gather_gemm"), r.rows, r.m).astype(np.float64)
    kept = np.where(
        r.is_operator("gemm_2to4"), 0.5, np.where(r.is_operator("grouped_gemm"), r.density, 1.0)
    )
    return (
        2 * tokens * weights * kept,
        weights * DTYPE_BYTES[r.weight_dtype] * kept,
        tokens * (r.n + r.k) * DTYPE_BYTES[r.dtype],
    )


def _low_rank_work(r: Records) -> tuple[Array, Array, Array]:
    m, features = r.m.astype(np.float64), (r.n + r.k).astype(np.float64)
    return (
        2 * m * r.rank * features,
        r.rank * features * DTYPE_BYTES[r.weight_dtype],
        m * features * DTYPE_BYTES[r.dtype],
    )


def _attention_work(r: Records) -> tuple[Array, Array, Array]:
    pairs = attention_pairs(r.q_len, r.kv_len, r.window) * r.density
    # features of a key and its value
    width = np.where(r.is_operator(*LATENT), r.n, r.head_dim) + r.head_dim
    heads = r.batch * r.heads * width.astype(np.float64)
    seen = np.where(r.window > 0, np.minimum(r.kv_len, r.q_len + r.window - 1), r.kv_len)
    stored = np.where(r.is_operator("mla_decode"), r.head_dim, width)
    cache = r.batch * r.kv_heads * stored * (seen * r.density) * DTYPE_BYTES[r.weight_dtype]
    return 2 * heads * pairs, cache, heads * r.q_len * DTYPE_BYTES[r.dtype]


def _expert_work(r: Records) -> tuple[Array, Array, Array]:
    m, alone = r.m.astype(np.float64), [r.role == ROLES.index(name) for name in ("gate_up", "down")]
    expert = np.select(alone, [2.0, 1.0], 3.0) * r.n * r.k  # gate and up, down, or all
    # minimum for a power law
    touched = np.where(r.skew != 0, r.active, np.minimum(m * r.active, r.experts))
    return (
        2 * m * r.active * expert,
        touched * expert * DTYPE_BYTES[r.weight_dtype],
        2 * m * r.k * DTYPE_BYTES[r.dtype],
    )


def peaks(records: Records, hw: HardwareProfile) -> Array:
    """Return the datasheet FLOP/s of each row's number format (2:4: computed FLOPs); infinite where
    there is none."""
    dense, sparse = np.full(len(DTYPES), np.inf), np.full(len(DTYPES), np.inf)
    latent = records.is_operator(*LATENT)  # may compute in the format of the cache
    for code in np.unique(np.append(records.dtype, records.weight_dtype)).tolist():
        if rate := hw.rates.get(DTYPES[code]):
            dense[code] = rate.flop_per_s
            sparse[code] = dense[code] * max(rate.sparse_factor / 2, 0.5)
    peak, cache = dense[records.dtype], dense[records.weight_dtype]
    peak = np.where(latent & np.isfinite(cache), np.maximum(peak, cache), peak)
    return np.where(records.is_operator("gemm_2to4"), sparse[records.dtype], peak)


def compute_bound(records: Records, hw: HardwareProfile) -> Array:
    flops, weights, others = work(records)
    return np.asarray(flops / peaks(records, hw) > (weights + others) / hw.bandwidth_bytes_per_s)


def least_seconds(records: Records, hw: HardwareProfile) -> tuple[Array, Array]:
    """Return the limits of each time, s: FLOPs at the highest clock; bytes with a full L2."""
    flops, weights, others = work(records)
    compute = flops / (peaks(records, hw) * hw.clock_headroom)
    l2 = float(hw.l2_bytes)
    share = np.where(
        records.copies > 0, l2 / np.maximum(records.copies, 1), np.where(records.cold, 0.0, l2)
    )
    memory = (
        np.maximum(np.maximum(weights + others - l2, weights - share), 0.0)
        / hw.bandwidth_bytes_per_s
    )
    feed = (weights + others) / (L2_BYTES_PER_CLOCK * hw.sm_count * hw.max_clock_hz)
    # even if the switch reduces, a device receives or sends all of the payload except its own part
    passed = records.n * (1.0 - 1.0 / np.maximum(records.batch, 1))
    rate = hw.link.bandwidth_bytes_per_s if hw.link else np.inf
    link = np.where(records.is_operator("collective"), passed / rate, 0.0)
    return compute, np.maximum(np.maximum(memory, feed), link)


def too_fast(records: Records, hw: HardwareProfile) -> tuple[Array, Array]:
    """Return masks of the rows below the two limits of :func:`least_seconds` by more than
    rounding."""
    compute, memory = least_seconds(records, hw)
    return records.seconds * ROUNDING < compute, records.seconds * ROUNDING < memory


def join_repeats(records: Records) -> tuple[Records, int, int]:
    """Return the median time of each shape and source, and the number of joined rows and of
    conflicts."""
    timing = ("seconds", "spread", "sample_count", "watts", "flags", "launch", "purpose", "line")
    rows_of = defaultdict(list)
    for row, shape in enumerate(
        records.groups(*(name for name in records.SCHEMA if name not in timing)).tolist()
    ):
        rows_of[shape].append(row)
    seconds, flags, conflicts = records.seconds.copy(), records.flags.copy(), 0
    for rows in rows_of.values():
        if len(rows) > 1:
            times, first = seconds[rows], rows[0]
            seconds[first] = np.median(times)
            flags[first] = np.bitwise_or.reduce(flags[rows])
            if times.max() > DISAGREE * times.min():
                flags[first] |= Flag.CONFLICT
                conflicts += 1
    kept = np.array([rows[0] for rows in rows_of.values()], dtype=np.int64)
    return (
        records.replace(seconds=seconds, flags=flags).select(kept),
        len(records) - len(kept),
        conflicts,
    )


def one_method(records: Records) -> tuple[Records, tuple[str, ...]]:
    """Return the rows without those whose CUDA protocol differs from most rows of their operator
    and format, with notes: times of protocols differ by 8 to 12 % for short kernels. Imported
    tables are not changed."""
    r, notes = _one_library(records), list[str]()
    kept = np.ones(len(r), dtype=bool)
    protocol = np.array([s.stack.get("protocol", "none") for s in r.sources], object)[r.source]
    measured = np.array([bool(source.run) for source in r.sources], dtype=bool)[r.source] & r.timed
    kinds = np.stack([r.operator, r.dtype], axis=1)
    for operator, dtype in np.unique(kinds[measured], axis=0).tolist():
        rows = np.flatnonzero(measured & (kinds == (operator, dtype)).all(axis=1))
        counts = Counter(protocol[rows].tolist())
        # if equal, the newest protocol
        best = max(counts, key=lambda name: (counts[name], name != "none", name))
        kept[rows[protocol[rows] != best]] = False
        kind = f"{OPERATORS[operator]} {DTYPES[dtype]}"
        most = f"the other {counts.pop(best)} by protocol {best}; measure them again"
        notes += [
            f"{count} {kind} rows excluded: timed by protocol {other}, {most}"
            for other, count in sorted(counts.items())
        ]
    return r.select(kept), tuple(notes)


def _one_library(records: Records) -> Records:
    """Return the rows with one attention library per operator and format: the engine's, if it has
    enough rows for a fit."""
    r, kept = records, np.ones(len(records), dtype=bool)
    run = np.array([s.run != "" for s in r.sources], dtype=bool)[r.source]
    engine = np.array([s.kernel in LIBRARIES for s in r.sources], dtype=bool)[r.source]
    kinds = np.stack([r.operator, r.dtype], axis=1)
    for kind in np.unique(kinds[run & engine], axis=0):
        rows = run & (kinds == kind).all(axis=1)
        kept[rows & (engine != ((rows & engine).sum() >= LIBRARY_ROWS))] = False
    return r.select(kept)


def repeatability(records: Records) -> float:
    """Return the standard deviation of the log time of a repeated measurement, from three or more
    drift checks."""
    checks = records.select((records.purpose == PURPOSES.index("drift_check")) & records.timed)
    group, times = checks.groups(), np.log(checks.seconds)
    same_shape = [times[group == g] for g in np.unique(group)]
    deviations = [
        d for logs in same_shape if len(logs) >= 3 for d in np.abs(logs - np.median(logs))
    ]
    # the median absolute deviation, which one burst of load does not change
    return float(1.4826 * np.median(deviations)) if deviations else UNKNOWN_REPEAT


def exact_arrays(records: Records, dtype: str) -> dict[str, Array]:
    """Return measured cold dense GEMMs of one number format, without throttled rows, as arrays of a
    section. A shape that was measured several times has the median, and an interval that contains
    its times."""
    r, code = records, DTYPES.index(dtype)
    cold_gemm = (
        r.is_operator("gemm")
        & (r.dtype == code)
        & (r.weight_dtype == code)
        & r.cold
        & (r.copies == 0)
    )
    exact = r.purpose == PURPOSES.index("exact")
    rows = r.select(cold_gemm & exact & r.timed & ((r.flags & Flag.THROTTLED) == 0))
    if not len(rows):
        return {}
    again, group = repeatability(records), rows.groups("n", "k", "m")
    shapes = [rows.select(group == g) for g in range(int(group.max()) + 1)]
    values = [(x.m[0], x.n[0], x.k[0], np.median(x.seconds), _half(x, again)) for x in shapes]
    return dict(zip(EXACT_NAMES, map(np.array, zip(*values, strict=True)), strict=True))


def _half(shape: Records, again: float) -> float:
    """Return the half-width of the interval of the log time of one shape."""
    # an unknown or infinite interval counts as the limit of drift
    spreads = np.where(np.isfinite(shape.spread), shape.spread, _Z95 * UNKNOWN_REPEAT)
    between = 0.5 * float(np.log(shape.seconds.max() / shape.seconds.min()))
    return max(_Z90 * math.hypot(float(np.median(spreads)) / _Z95, again), between)


def with_exact(profile: HardwareProfile, records: Records) -> HardwareProfile:
    sections = dict(profile.sections)
    for (operator, dtype), section in profile.sections.items():
        fitted = operator == "gemm" and section.status == "calibrated" and dtype in DTYPES
        if fitted and (arrays := _allowed(exact_arrays(records, dtype), profile, dtype)):
            sections["gemm", dtype] = replace(
                section, arrays=MappingProxyType({**section.arrays, **arrays})
            )
    return (
        replace(profile, sections=MappingProxyType(sections))
        if sections != profile.sections
        else profile
    )


def without_exact(profile: HardwareProfile) -> HardwareProfile:
    sections = dict(profile.sections)
    for key, section in sections.items():
        if "exact_m" in section.arrays:
            others = {
                name: values for name, values in section.arrays.items() if name not in EXACT_NAMES
            }
            sections[key] = replace(section, arrays=MappingProxyType(others))
    return replace(profile, sections=MappingProxyType(sections))


def _allowed(arrays: dict[str, Array], profile: HardwareProfile, dtype: str) -> dict[str, Array]:
    """Exclude times below the datasheet's arithmetic limit at the highest clock, because they are
    invalid."""
    if not arrays or dtype not in profile.rates:
        return {}
    flops = 2.0 * arrays["exact_m"] * arrays["exact_n"] * arrays["exact_k"]
    good = arrays["exact_s"] >= flops / (
        profile.peak_flop_per_s(dtype) * max(1.0, profile.clock_headroom)
    )
    return {name: values[good] for name, values in arrays.items()} if good.any() else {}
