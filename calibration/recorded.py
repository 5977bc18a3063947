"""What the lines of a store mean for a fit: measured rows to :class:`~calibration.records.Records`.

A line with ``operator`` and ``median_s`` is a timing; its status and the drift of the anchors round it become flags. Lines without a time
(skipped, unsupported, refused, failed) are counted, by :func:`records_of` for a fit and by reason in :func:`untimed`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from calibration.records import LAUNCHES, PURPOSES, Flag, Records
from calibration.store import Content, Header, read_store
from simulator.workload import DTYPE_BYTES, ROLES, dtype_code

_FLAGS: Mapping[str, Flag] = {"noisy": Flag.NOISY, "throttled": Flag.THROTTLED}
_SAME = ("m", "n", "k", "rank", "rows", "batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim", "window", "block", "density", "dtype")
_READS: Mapping[str, float] = {"activation": 2.0, "residual": 2.0}  # operands read a feature; one elsewhere
_GEMM_LAUNCH = {"m": 1, "n": 64, "k": 64}  # the tiny GEMM that stands for any in a launch measurement


def load_records(path: str | Path) -> Records:
    """The timings of a store's file; see :func:`records_of`."""
    return content_records(read_store(path))


def content_records(content: Content) -> Records:
    """The timings of a store that was read, each run its own source."""
    return records_of(content.rows, content.header)


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
        ``NOISY`` and ``THROTTLED`` by status; ``DRIFT`` for rows between an anchor that had drifted and its neighbours.

    Examples
    --------
    >>> row = {"operator": {"kind": "gemm", "m": 8, "n": 64, "k": 32, "dtype": "bf16"}, "median_s": 1e-6, "status": "noisy"}
    >>> r = records_of([row, {"operator": {"kind": "gemm"}, "status": "skipped"}], Header("A100"))
    >>> len(r), int(r.m[0]), Flag(int(r.flags[0])).name
    (1, 8, 'NOISY')
    """
    rows = list(rows)
    drifted = {(str(row.get("run", "")), int(row.get("block", 0))) for row in rows if row.get("drifted")}
    runs: dict[str, int] = {}
    out = []
    for row in rows:
        if not isinstance(row.get("operator"), Mapping) or row.get("median_s") is None:
            continue
        run = str(row.get("run", header.run))
        block = (str(row.get("run", "")), int(row.get("block", 0)))
        flags = int(_FLAGS.get(str(row.get("status", "")), 0))
        if block in drifted or ((block[0], block[1] + 1) in drifted and row.get("purpose") != "anchor"):
            flags |= Flag.DRIFT
        purpose = str(row.get("purpose", ""))
        out.append(
            {
                **shape_of(row["operator"]),
                "seconds": float(row["median_s"]),
                "spread": _spread(row),
                "sample_count": len(row.get("samples_s", ())),
                "launch": _launch(row),
                "flags": flags,
                "purpose": purpose if purpose in PURPOSES else "",
                "source": runs.setdefault(run, len(runs)),
            }
        )
    return Records.from_rows(out, [header.source(run) for run in runs])


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
        moved = float(DTYPE_BYTES[dtype_code(str(operator.get("dtype", "bf16")))]) * operator["m"] * operator["n"]
        out |= {"read_bytes": moved * _READS.get(role, 1.0), "write_bytes": moved}
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
