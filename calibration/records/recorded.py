"""What the lines of a store mean for a fit: measured rows to :class:`~calibration.records.records.Records`.

A line with ``operator`` and ``median_s`` is a timing; its status and the drift of the anchors round it become flags. Lines without a time
(skipped, unsupported, refused, failed) are counted, by :func:`records_of` for a fit and by reason in :func:`untimed`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.devices.protocol import elementwise_bytes
from calibration.records.records import LAUNCHES, OPERATORS, PURPOSES, Flag, Records
from calibration.records.store import Content, Header, read_store
from simulator.errors import InputError, unknown
from simulator.workload import DTYPE_BYTES, DTYPES, ROLES, dtype_code

DRIFT_LIMIT = 0.02
"""Change of an anchor's time from which the records round it are flagged."""

_FLAGS: Mapping[str, Flag] = {"noisy": Flag.NOISY, "throttled": Flag.THROTTLED}
_SAME = (
    "m",
    "n",
    "k",
    "rank",
    "rows",
    "batch",
    "q_len",
    "kv_len",
    "heads",
    "kv_heads",
    "head_dim",
    "window",
    "block",
    "density",
    "dtype",
)
MOST = 2**40
"""Largest dimension of an operator that can be meant."""
_GEMM_LAUNCH = {"m": 1, "n": 64, "k": 64}  # the tiny GEMM that stands for any in a launch measurement


def load_records(path: str | Path) -> Records:
    """The timings of a store's file; see :func:`records_of`."""
    return content_records(read_store(path))


def content_records(content: Content) -> Records:
    """The timings of a store that was read, each run its own source."""
    try:
        return records_of(content.rows, content.header)
    except InputError as error:
        raise InputError(f"{content.label}: {error}" if content.label else str(error)) from None


def records_of(rows: Iterable[Mapping[str, Any]], header: Header) -> Records:
    """Measured rows as a table.

    Parameters
    ----------
    rows : iterable of mapping
        Records as the runner writes them: ``operator`` (its fields), ``median_s``, and where they are known ``lower_s``, ``upper_s``,
        ``samples_s``, ``status``, ``purpose``, ``block``, ``drifted``, ``method``, ``run``. Those without a time are left out.
    header : Header
        Of the store they are in.

    Returns
    -------
    Records
        Of several visits of an operator in one run the fastest (:class:`calibration.measure.plan.Plan`). ``NOISY`` and ``THROTTLED`` by status;
        ``DRIFT`` for rows between an anchor that had drifted and its neighbours: from the first anchor of its run, or where operators were
        visited several times from the faster quarter of them.

    Examples
    --------
    >>> row = {"operator": {"kind": "gemm", "m": 8, "n": 64, "k": 32, "dtype": "bf16"}, "median_s": 1e-6, "status": "noisy"}
    >>> r = records_of([row, {"operator": {"kind": "gemm"}, "status": "skipped"}], Header("A100"))
    >>> len(r), int(r.m[0]), Flag(int(r.flags[0])).name
    (1, 8, 'NOISY')
    """
    rows = list(rows)
    drifted = _drifted(rows)
    runs: dict[str, int] = {}
    out: list[dict[str, Any]] = []
    visited: dict[tuple[str, str], int] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("operator"), Mapping) or row.get("median_s") is None:
            continue
        try:
            run = str(row.get("run", header.run))
            timing = {**_timing(row, drifted), "source": runs.setdefault(run, len(runs))}
            first = (
                visited.setdefault((run, str(row["key"])), len(out)) if "visit" in row and "key" in row else len(out)
            )
            if first == len(out):
                out.append(timing)
            elif timing["seconds"] < out[first]["seconds"]:
                out[first] = timing
        except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
            raise InputError(f"record {number}: is no timing: {said}") from None
    return Records.from_rows(out, [header.source(run) for run in runs])


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
    return {
        **_checked(shape_of(row["operator"])),
        "seconds": seconds,
        "spread": _spread(row),
        "sample_count": len(row.get("samples_s", ())),
        "launch": _launch(row),
        "flags": flags,
        "purpose": purpose if purpose in PURPOSES else "",
    }


def _checked(shape: dict[str, Any]) -> dict[str, Any]:
    """The same columns; refused where a dimension is no whole number, or a name is unknown."""
    for name in _SAME:
        value = shape.get(name)
        if name == "dtype":
            known = value is None or (isinstance(value, str) and value in DTYPES)
            right = "one of " + ", ".join(DTYPES)
        elif name == "density":
            known, right = (
                value is None or (isinstance(value, (int, float)) and 0.0 < value <= 1.0),
                "a share above 0, up to 1",
            )
        else:
            known = value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST)
            right = f"a whole number from 0 to {MOST}"
        if not known:
            raise ValueError(f"{name} {value!r:.60}, expected {right}")
    if shape["operator"] not in OPERATORS:
        raise unknown("operator", shape["operator"], OPERATORS)
    return {name: value for name, value in shape.items() if value is not None}


def shape_of(operator: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a record from the fields of a measured operator.

    >>> shape_of({"kind": "elementwise", "role": "residual", "m": 2, "n": 8, "dtype": "bf16", "cold": False})["read_bytes"]
    64.0
    """
    kind = str(operator["kind"])
    out: dict[str, Any] = {name: operator[name] for name in _SAME if name in operator}
    cold = bool(operator.get("cold", True))
    out |= {"operator": kind, "cold": cold, "copies": 0 if cold else 1}
    role = str(operator.get("role", ""))
    if role in ROLES:
        out["role"] = role
    if kind.startswith("launch") and role == "gemm":
        out |= _GEMM_LAUNCH
    if kind == "elementwise":
        size = float(DTYPE_BYTES[dtype_code(str(operator.get("dtype", "bf16")))])
        out |= dict(
            zip(("read_bytes", "write_bytes"), elementwise_bytes(role, operator["m"], operator["n"], size), strict=True)
        )
    if kind == "copy":
        out |= {"read_bytes": float(operator["n"]), "write_bytes": float(operator["n"])}
    return out


def untimed(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many measured operators have no time, by status and reason.

    >>> untimed([{"operator": {}, "status": "skipped", "reason": "out of memory"}, {"operator": {}, "median_s": 1.0}])
    {'skipped: out of memory': 1}
    """
    out: dict[str, int] = {}
    for row in rows:
        if isinstance(row.get("operator"), Mapping) and row.get("median_s") is None:
            reason = ": ".join(str(row[name]) for name in ("status", "reason") if row.get(name))
            out[reason] = out.get(reason, 0) + 1
    return out


def _spread(row: Mapping[str, Any]) -> float:
    """Half width of the interval of the median over the median; NaN where there is none."""
    lower, upper = row.get("lower_s"), row.get("upper_s")
    return math.nan if lower is None or upper is None else (float(upper) - float(lower)) / 2.0 / float(row["median_s"])


def _launch(row: Mapping[str, Any]) -> str:
    """What a time says of the launch, from how it was taken."""
    method = str(row.get("method", ""))
    return LAUNCHES[0] if not method or method == "replayed" else "graph" if "graph" in method else "eager"
