"""Convert the lines of a store to :class:`~calibration.records.timing_table.Records`.

A line with ``operator`` and ``median_s`` is a timing; its status and the drift checks around it become flags. Lines
without a time (skipped, unsupported, refused, failed) are excluded; :func:`untimed` counts them by reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from calibration.devices.protocol import elementwise_bytes
from calibration.devices.telemetry import POWER_CAP
from calibration.records.store import Content, Header
from calibration.records.timing_table import COUNTS, LAUNCHES, OPERATORS, PURPOSES, Flag, Records
from simulator.errors import InputError, unknown
from simulator.workload import DTYPE_BYTES, DTYPES, ROLES, dtype_code

DRIFT_LIMIT = 0.02  # change of a drift check above which the records around it are flagged
CLOCK_LIMIT = 0.03  # distance from the highest clock of a run above which rows at the power limit are flagged
WAIT_LIMIT = 0.05  # largest share of the time a process may wait for a CPU; above it, its timings are not reliable
_MOST = 2**40  # largest plausible dimension of an operator
_FLAGS: Mapping[str, Flag] = {"noisy": Flag.NOISY, "throttled": Flag.THROTTLED}
_GEMM_LAUNCH = {"m": 1, "n": 64, "k": 64}  # the tiny GEMM of a launch measurement


def content_records(content: Content) -> Records:
    """Return the timings of a store; each run is a source."""
    try:
        return records_of(content.rows, content.header)
    except InputError as error:
        raise InputError(f"{content.label}: {error}" if content.label else str(error)) from None


def records_of(rows: Iterable[Mapping[str, Any]], header: Header) -> Records:
    """Convert rows of :mod:`calibration.measure.run` to a table; ``header`` is the header of their store.

    The fastest of several visits counts (:class:`calibration.measure.plan.MeasurementPlan`). The status gives ``NOISY``
    and ``THROTTLED``, the share of waiting ``WAITED``. Rows around a drift check that differs get ``DRIFT``. Its
    reference is the first drift check of the run, or the fastest quarter of them if operators were visited several
    times. Rows that :func:`power_capped` finds get ``POWER_CAPPED``.
    """
    rows = list(rows)
    drifted = _drifted(rows)
    capped = _capped(rows)
    runs: dict[str, int] = {}
    timings: list[dict[str, Any]] = []
    visited: dict[tuple[str, str], int] = {}  # run and operator -> index of its timing
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("operator"), Mapping) or row.get("median_s") is None:
            continue
        try:
            run = str(row.get("run", header.run))
            timing = {**_timing(row, drifted), "source": runs.setdefault(run, len(runs)), "line": number + 1}
            timing["flags"] |= Flag.POWER_CAPPED if number in capped else 0
            index = len(timings)
            if "visit" in row and "key" in row:
                index = visited.setdefault((run, str(row["key"])), index)
            if index == len(timings):
                timings.append(timing)
            elif timing["seconds"] < timings[index]["seconds"]:
                timings[index] = timing
        except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
            raise InputError(f"record {number}: not a timing: {reason}") from None
    return Records.from_rows(timings, [header.source(run) for run in runs])


def power_capped(readings: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return which readings of one run, taken under load, show the power cap at a clock below the run's highest.

    A run at the power limit throughout is not flagged: its clocks are those of the device under load.

    >>> power_capped([{"clock_hz": 1.4e9, "throttle": ["sw_power_cap"]}, {"clock_hz": 1.98e9, "throttle": []}])
    [True, False]
    """
    clocks = [clock if isinstance(clock := r.get("clock_hz"), int | float) else math.nan for r in readings]
    highest = max((clock for clock in clocks if clock == clock), default=math.nan)
    return [
        isinstance(r.get("throttle"), list) and POWER_CAP in r["throttle"] and clock < (1.0 - CLOCK_LIMIT) * highest
        for r, clock in zip(readings, clocks, strict=True)
    ]


def _capped(rows: Sequence[Mapping[str, Any]]) -> set[int]:
    """Return the numbers (from 1) of the rows that the power cap slowed down, run by run."""
    runs: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 1):
        if row.get("median_s") is not None and isinstance(row.get("after"), Mapping):
            runs.setdefault(str(row.get("run", "")), []).append(number)
    return {
        number
        for numbers in runs.values()
        for number, slow in zip(numbers, power_capped([rows[i - 1]["after"] for i in numbers]), strict=True)
        if slow
    }


def _drifted(rows: Sequence[Mapping[str, Any]]) -> set[tuple[str, int]]:
    """Return the blocks whose drift check differs, by run."""
    visited = {str(row.get("run", "")) for row in rows if row.get("visit")}
    checks: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("purpose") == "drift_check" and isinstance(row.get("median_s"), float):
            checks.setdefault(str(row.get("run", "")), []).append(row)
    out = set()
    for run, found in checks.items():
        times = sorted(row["median_s"] for row in found)
        limit = (1.0 + DRIFT_LIMIT) * times[len(times) // 4]
        out |= {_block(row) for row in found if (row["median_s"] > limit if run in visited else row.get("drifted"))}
    return out


def _block(row: Mapping[str, Any]) -> tuple[str, int]:
    """Return the run and the block (between two drift checks) of a row."""
    block = row.get("block", 0)
    return str(row.get("run", "")), block if isinstance(block, int) else 0


def _timing(row: Mapping[str, Any], drifted: Collection[tuple[str, int]]) -> dict[str, Any]:
    """Return the columns of one measured row, except its source."""
    run, block = _block(row)
    flags = int(_FLAGS.get(str(row.get("status", "")), 0))
    if (run, block) in drifted or ((run, block + 1) in drifted and row.get("purpose") != "drift_check"):
        flags |= Flag.DRIFT
    waited = row.get("waited")
    if isinstance(waited, (int, float)) and waited > WAIT_LIMIT:
        flags |= Flag.WAITED
    purpose, seconds = str(row.get("purpose", "")), float(row["median_s"])
    if not 0.0 < seconds < math.inf:
        raise ValueError(f"median_s: expected a time above zero, got {seconds!r}")
    lower, upper, method = row.get("lower_s"), row.get("upper_s"), str(row.get("method", ""))
    spread = math.nan
    if lower is not None and upper is not None:
        spread = (float(upper) - float(lower)) / 2.0 / seconds
    return {
        **shape_of(row["operator"]),
        "seconds": seconds,
        "spread": spread,
        "sample_count": len(row.get("samples_s", ())),
        "fused": row["operator"]["kind"] in ("gather_gemm", "grouped_gemm") and "one kernel" in method,
        "launch": _launch_of(method),
        "flags": flags,
        "purpose": purpose if purpose in PURPOSES else "",
    }


def _launch_of(method: str) -> str:
    """Return how launches count in a time, by the method's beginning: the names of kernels may follow."""
    if method in ("", "replayed"):
        return LAUNCHES[0]
    return "graph" if method.startswith("events around a graph") else "eager"


def shape_of(operator: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a measured operator; ValueError if a dimension is not a whole number or a name is
    unknown."""
    kind, role, cold = str(operator["kind"]), str(operator.get("role", "")), bool(operator.get("cold", True))
    shape: dict[str, Any] = {name: operator[name] for name in (*COUNTS, "density", "dtype") if name in operator}
    shape |= {"operator": kind, "cold": cold, "copies": 0 if cold else 1}
    if role in ROLES:
        shape["role"] = role
    if kind.startswith("launch") and role == "gemm":
        shape |= _GEMM_LAUNCH
    if kind == "elementwise":
        size = float(DTYPE_BYTES[dtype_code(str(operator.get("dtype", "bf16")))])
        shape["read_bytes"], shape["write_bytes"] = elementwise_bytes(role, operator["m"], operator["n"], size)
    if kind == "copy":
        shape["read_bytes"] = shape["write_bytes"] = float(operator["n"])
    shape = {name: value for name, value in shape.items() if value is not None}
    for name, value in shape.items():
        if name == "dtype":
            known, right = isinstance(value, str) and value in DTYPES, "one of " + ", ".join(DTYPES)
        elif name == "density":
            known, right = isinstance(value, (int, float)) and 0.0 < value <= 1.0, "a share above 0, up to 1"
        elif name in COUNTS:
            known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST
            right = f"a whole number from 0 to {_MOST}"
        else:
            continue
        if not known:
            raise ValueError(f"{name}: expected {right}, got {value!r:.60}")
    if kind not in OPERATORS:
        raise unknown("operator", kind, OPERATORS)
    return shape


def untimed(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Count the operators without a time, by status and reason."""
    left = (row for row in rows if isinstance(row.get("operator"), Mapping) and row.get("median_s") is None)
    return dict(Counter(": ".join(str(row[name]) for name in ("status", "reason") if row.get(name)) for row in left))
