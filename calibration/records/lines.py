"""What the lines of a store mean: measured rows to :class:`~calibration.records.table.Records`.

A line with ``operator`` and ``median_s`` is a timing; its status and the drift of the anchors round it become flags.
Lines without a time (skipped, unsupported, refused, failed) are left out of the table and counted by reason in
:func:`untimed`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from calibration.devices.protocol import elementwise_bytes
from calibration.records.store import Content, Header
from calibration.records.table import COUNTS, LAUNCHES, OPERATORS, PURPOSES, Flag, Records
from simulator.errors import InputError, unknown
from simulator.workload import DTYPE_BYTES, DTYPES, ROLES, dtype_code

DRIFT_LIMIT = 0.02  # change of an anchor's time from which the records round it are flagged
_MOST = 2**40  # largest dimension of an operator that can be meant
_FLAGS: Mapping[str, Flag] = {"noisy": Flag.NOISY, "throttled": Flag.THROTTLED}
_GEMM_LAUNCH = {"m": 1, "n": 64, "k": 64}  # the tiny GEMM that stands for any in a launch measurement


def content_records(content: Content) -> Records:
    """The timings of a store that was read, each run its own source."""
    try:
        return records_of(content.rows, content.header)
    except InputError as error:
        raise InputError(f"{content.label}: {error}" if content.label else str(error)) from None


def records_of(rows: Iterable[Mapping[str, Any]], header: Header) -> Records:
    """Measured rows, as :mod:`calibration.measure.run` writes them, as a table; ``header`` is that of their store.

    Of several visits of an operator in one run the fastest counts (:class:`calibration.measure.plan.Plan`). ``NOISY``
    and ``THROTTLED`` are by status; ``DRIFT`` is for rows between an anchor that had drifted and its neighbours: from
    the first anchor of its run, or where operators were visited several times from the faster quarter of them.
    """
    rows = list(rows)
    drifted = _drifted(rows)
    runs: dict[str, int] = {}
    timings: list[dict[str, Any]] = []
    visited: dict[tuple[str, str], int] = {}  # run and operator -> its place among the timings
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("operator"), Mapping) or row.get("median_s") is None:
            continue
        try:
            run = str(row.get("run", header.run))
            timing = {**_timing(row, drifted), "source": runs.setdefault(run, len(runs))}
            place = len(timings)
            if "visit" in row and "key" in row:
                place = visited.setdefault((run, str(row["key"])), place)
            if place == len(timings):
                timings.append(timing)
            elif timing["seconds"] < timings[place]["seconds"]:
                timings[place] = timing
        except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
            raise InputError(f"record {number}: is no timing: {said}") from None
    return Records.from_rows(timings, [header.source(run) for run in runs])


def _drifted(rows: Sequence[Mapping[str, Any]]) -> set[tuple[str, int]]:
    """Blocks whose anchor had drifted, by run."""
    visited = {str(row.get("run", "")) for row in rows if row.get("visit")}
    anchors: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("purpose") == "anchor" and isinstance(row.get("median_s"), float):
            anchors.setdefault(str(row.get("run", "")), []).append(row)
    out = set()
    for run, found in anchors.items():
        times = sorted(row["median_s"] for row in found)
        limit = (1.0 + DRIFT_LIMIT) * times[len(times) // 4]
        out |= {_block(row) for row in found if (row["median_s"] > limit if run in visited else row.get("drifted"))}
    return out


def _block(row: Mapping[str, Any]) -> tuple[str, int]:
    """The run and the block of anchors a row is in."""
    block = row.get("block", 0)
    return str(row.get("run", "")), block if isinstance(block, int) else 0


def _timing(row: Mapping[str, Any], drifted: Collection[tuple[str, int]]) -> dict[str, Any]:
    """Columns of one measured row, but its source."""
    run, block = _block(row)
    flags = int(_FLAGS.get(str(row.get("status", "")), 0))
    if (run, block) in drifted or ((run, block + 1) in drifted and row.get("purpose") != "anchor"):
        flags |= Flag.DRIFT
    purpose, seconds = str(row.get("purpose", "")), float(row["median_s"])
    if not 0.0 < seconds < math.inf:
        raise ValueError(f"median_s {seconds!r}, expected a time above zero")
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
        "launch": "graph" if "graph" in method else "eager" if method not in ("", "replayed") else LAUNCHES[0],
        "flags": flags,
        "purpose": purpose if purpose in PURPOSES else "",
    }


def shape_of(operator: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a record from the fields of a measured operator; refused where a dimension is no whole number, or a
    name is unknown."""
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
            raise ValueError(f"{name} {value!r:.60}, expected {right}")
    if kind not in OPERATORS:
        raise unknown("operator", kind, OPERATORS)
    return shape


def untimed(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many measured operators have no time, by status and reason."""
    left = (row for row in rows if isinstance(row.get("operator"), Mapping) and row.get("median_s") is None)
    return dict(Counter(": ".join(str(row[name]) for name in ("status", "reason") if row.get(name)) for row in left))
