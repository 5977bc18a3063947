"""Records on disk during a measurement: JSON lines that survive a kill, a full disk and a second
writer. The first line is the :class:`Header`; every line ends with a CRC-32 of its other fields. An
incomplete last line is dropped and counted. A damaged, repeated or misplaced line is an error,
because no kill causes it."""

from __future__ import annotations

import json
import math
import os
import re
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from calibration.devices.protocol import LIBRARIES, Operator, elementwise_bytes
from calibration.devices.telemetry import POWER_CAP
from calibration.records.timing_table import (
    COUNTS,
    LAUNCHES,
    PURPOSES,
    Flag,
    Records,
    Row,
    Source,
    check_texts,
)
from simulator.arguments import SIZE, Range, number, shown, text, wrong
from simulator.codes import DTYPES, ROLES
from simulator.errors import InputError
from simulator.files.read import read_bounded
from simulator.files.write import check_target
from simulator.request import Name

SCHEMA_VERSION = 2  # 2: purpose "drift_check"
MARK = b'{"prunesim":"records",'
# largest file that is read; a record takes about 2 kB, so a million records
MOST_STORE_BYTES = 2_000_000_000

_CRC = re.compile(rb',"crc":"([0-9a-f]{8})"\}$')
# a record that ends inside a line: its newline was damaged
_RUN_ON = re.compile(rb'"crc":"[0-9a-f]{8}"\}.')


def encode_line(line: Mapping[str, Any]) -> bytes:
    """Return a mapping as one line with its checksum; ValueError if it is not JSON (NaN, array)."""
    body = json.dumps(dict(line), separators=(",", ":"), allow_nan=False).encode()
    return body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)


def decode_line(line: bytes) -> Row | None:
    """Return the mapping of :func:`encode_line`; None if the line is incomplete or damaged."""
    found = _CRC.search(line)
    body = line[: found.start()] + b"}" if found else b""
    if found is None or zlib.crc32(body) != int(found[1], 16):
        return None
    try:
        out = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return out if isinstance(out, dict) else None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class Header:
    """Subject of a store. Device, stack and dtype identify it; the other fields describe it."""

    device: str  # the hardware as it names itself
    # everything that changes times: framework, driver, threads
    stack: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "bf16"  # measured number format
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    started: str = field(default_factory=_now)  # ISO 8601, UTC
    # JSON-ready: name of the opened device, memory, plan, idle power (idle_w, W)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(
                f"dtype {self.dtype!r} is unknown; expected one of {', '.join(DTYPES)}"
            )

    def as_dict(self) -> Row:
        head = {"prunesim": "records", "schema": SCHEMA_VERSION, **vars(self)}
        return {**head, "stack": dict(self.stack), "extra": dict(self.extra)}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any], label: str) -> Header:
        if line.get("prunesim") != "records":
            raise InputError(f"{label}:1: not a store of records")
        if line.get("schema") != SCHEMA_VERSION:
            other = f"expected schema {SCHEMA_VERSION}, got {line.get('schema')!r:.40}"
            raise InputError(
                f"{label}:1: {other}; the records are of another version of prunesim: measure again"
            )
        names = [f.name for f in fields(cls)]
        if missing := [name for name in names if name not in line]:
            raise InputError(f"{label}:1: the header lacks {', '.join(missing)}")
        try:
            found = {name: line[name] for name in names}
            check_texts(found)
            return cls(**found)
        except InputError as error:
            raise InputError(f"{label}:1: {error}") from None

    def refuse_other(self, other: Header, label: str) -> None:
        pairs = {"device": (self.device, other.device), "dtype": (self.dtype, other.dtype)}
        for name in [*self.stack, *other.stack]:
            pairs[name] = (self.stack.get(name, "none"), other.stack.get(name, "none"))
        for name, (mine, theirs) in pairs.items():
            if mine != theirs:
                raise InputError(
                    f"{label}: holds records of {name} {mine!r}, not of {theirs!r}; use another"
                    " file"
                )

    def source(self) -> Source:
        method = str(self.extra.get("method", ""))
        return Source(self.device, dict(self.stack), method=method, date=self.started, run=self.run)


@dataclass(frozen=True)
class Content:
    header: Header
    rows: tuple[Row, ...]  # records in the order of writing, without checksums
    dropped: int = 0  # 1 if the last line was incomplete and was dropped
    end: int = 0  # bytes up to the end of the last complete line
    label: str = ""  # name of the file, for messages


STATUSES = ("ok", "noisy", "throttled", "skipped", "unsupported", "refused", "failed")
_TIME = Range(1e-15, 1e9, "times in seconds")
_TIME_OR_ZERO = Range(0.0, 1e9, "times in seconds from 0")
_POWER = Range(1e-9, 1e9, "a power in W or an energy in J above 0")


def _times(right: Range, name: str, values: Any) -> None:
    if not isinstance(values, list) or not values:
        raise wrong(name, right, values)
    for value in values:
        number(name, value, right)


def _mapping(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{name}: expected names and values, got {shown(value)}")


def _kernels(name: str, value: Any) -> None:
    _mapping(name, value)
    for kernel, seconds in value.items():
        number(f"{name}: {kernel}", seconds, _TIME_OR_ZERO)


# fields of records on which a run that resumes, or a fit, relies -> their check
_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("key", "reason", "phase", "runtime", "version", "purpose", "method"), text),
    "status": lambda name, value: Name(STATUSES).check(name, text(name, value)),
    **dict.fromkeys(("visit", "block"), partial(number, right=SIZE)),
    **dict.fromkeys(("median_s", "upper_s", "seconds", "ratio"), partial(number, right=_TIME)),
    **dict.fromkeys(("lower_s", "spent_s"), partial(number, right=_TIME_OR_ZERO)),
    "watts": partial(number, right=_POWER),
    **dict.fromkeys(("dense_j", "pruned_j"), partial(_times, _POWER)),
    **dict.fromkeys(("samples_s", "dense_s", "pruned_s"), partial(_times, _TIME)),
    **dict.fromkeys(("versions", "operator"), _mapping),
    "kernels": _kernels,
}
_MAY_BE_NULL = ("median_s", "lower_s", "upper_s")
_NEEDED = {
    "engine": ("key", "seconds", "kernels", "version"),
    "decoder": ("key", "status", "reason", "phase"),
}


def _check(row: Mapping[str, Any]) -> None:
    """Refuse a record whose fields have values that no run writes."""
    needed = _NEEDED.get(str(row.get("type")), ())
    if row.get("type") == "decoder" and row.get("status") == "ok":
        needed = (*needed, "runtime", "dense_s", "pruned_s")
    for name in needed:
        if name not in row:
            raise InputError(f"{name}: is missing")
    for name in row.keys() & _CHECKS.keys():
        if row[name] is not None or name not in _MAY_BE_NULL:
            _CHECKS[name](name, row[name])
    if len(row.get("dense_s", ())) != len(row.get("pruned_s", ())):
        raise InputError("pruned_s: expected as many times as in dense_s")
    ends = [row[name] for name in ("lower_s", "median_s", "upper_s") if row.get(name) is not None]
    if ends != sorted(ends):
        raise InputError(f"lower_s, median_s, upper_s: expected ascending times, got {ends}")


def parse(content: bytes, label: str) -> Content | None:
    """Read a store's bytes; None if the file is empty or its header is incomplete; InputError for
    other damage."""
    if not content.startswith(MARK) and not MARK.startswith(content[: len(MARK)]):
        raise InputError(f"{label}: not a store of records (its first line is not a header)")
    lines = content.rstrip(b"\n").split(b"\n") if content else []
    header: Header | None = None
    rows: list[Row] = []
    end = dropped = 0
    for line_number, line in enumerate(lines, 1):
        place = f"{label}:{line_number}"
        if not line:
            raise InputError(f"{place}: empty line between records")
        row = decode_line(line)
        if row is None:
            if line_number < len(lines) or _RUN_ON.search(
                line
            ):  # a kill damages only the last line
                raise InputError(
                    f"{place}: damaged record (its checksum is wrong); restore the file from a copy"
                )
            dropped = 1
            break
        if header is None:
            header = Header.from_dict(row, label)
        elif "prunesim" in row:
            raise InputError(
                f"{place}: second header; keep the runs in separate files: prunesim fit reads"
                " several"
            )
        elif (written := row.pop("line", None)) != line_number:
            order = "lines are missing, repeated or in another order; restore the file from a copy"
            raise InputError(f"{place}: was written as line {written!r:.40}: {order}")
        else:
            try:
                _check(row)
            except InputError as error:
                raise InputError(f"{place}: {error}; restore the file from a copy") from None
            rows.append(row)
        end += len(line) + 1
    if header is None:
        return None
    return Content(header, tuple(rows), dropped, min(end, len(content)), label)


def read_store(path: str | Path) -> Content:
    parsed = parse(read_bounded(path, MOST_STORE_BYTES), str(path))
    if parsed is None:
        raise InputError(f"{path}: holds no records")
    return parsed


class Store:
    """The only writer of a file of records; it resumes the run of an existing file. InputError if
    another process writes to the file, or if it has records of another device, software or number
    format."""

    def __init__(self, path: str | Path, header: Header) -> None:
        self.path = check_target(path)
        self._fd = _open_locked(self.path)
        try:
            size = os.fstat(self._fd).st_size
            found = parse(os.pread(self._fd, size, 0), str(self.path))
            self._end = found.end if found else 0
            if found is None:
                self._put(encode_line(header.as_dict()))
                folder = os.open(self.path.parent, os.O_RDONLY)
                os.fsync(folder)  # writes the name of a new file
                os.close(folder)
                found = Content(header, ())
            else:
                found.header.refuse_other(header, str(self.path))
                if self._end < size:  # drops an incomplete line
                    os.ftruncate(self._fd, self._end)
                if os.pread(self._fd, 1, self._end - 1) != b"\n":
                    self._put(b"\n")
        except BaseException:
            self.close()
            raise
        self.header = found.header
        self._rows = list(found.rows)

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(self._rows)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one JSON-ready record, with ``run`` and ``time``, to the disk. After an OSError
        (the disk is full) earlier records stay valid, and the store can be used again."""
        row = {"run": self.header.run, "time": _now(), **record}
        self._put(encode_line({"line": len(self._rows) + 2, **row}))
        self._rows.append(row)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, line: bytes) -> None:
        try:
            done = 0
            while done < len(line):
                done += os.pwrite(self._fd, line[done:], self._end + done)
            os.fsync(self._fd)
        except OSError as error:
            with suppress(OSError):  # if this fails too, readers drop the incomplete line
                os.ftruncate(self._fd, self._end)
                os.fsync(self._fd)
            reason = f"cannot be written: {error.strerror}; earlier records are safe"
            raise OSError(error.errno, reason, str(self.path)) from error
        self._end += len(line)


def _open_locked(path: Path) -> int:
    import fcntl  # missing on Windows, where nothing else here needs it

    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened for writing: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise InputError(
            f"{path}: another process is writing to this file; wait for it or use another file"
        ) from error
    return fd


DRIFT_LIMIT = 0.02  # change of a drift check above which the records around it are flagged
# distance from the highest clock of a run above which rows at the power limit are flagged
CLOCK_LIMIT = 0.03
# largest share of the time a process may wait for a CPU; above it, its timings are not reliable
WAIT_LIMIT = 0.05
_MOST = 2**40  # largest plausible dimension of an operator


def content_records(content: Content) -> Records:
    return records_of(content.rows, content.header, f"{content.label}: " if content.label else "")


def records_of(rows: Iterable[Mapping[str, Any]], header: Header, place: str = "") -> Records:
    """Convert rows of :mod:`calibration.measure.run` to a table with flags, without the rows that
    have no time. If an operator was visited several times, the fastest visit counts. Rows around a
    drift check that differs from the first one of the run (after several visits: from the fastest
    quarter) get ``DRIFT``."""
    timed = {
        position: row
        for position, row in enumerate(rows, 1)
        if "operator" in row and row.get("median_s") is not None
    }
    drifted = _drifted(list(timed.values()))
    # visits by operator; by number if an operator has one visit
    visits: dict[object, list[Row]] = {}
    for (position, row), slow in zip(timed.items(), _slowed(timed.values(), header), strict=True):
        try:
            timing = {**_timing(row, drifted), "line": position + 1}
            timing["flags"] |= Flag.POWER_CAPPED if slow else 0
            key = str(row["key"]) if "visit" in row and "key" in row else position
            visits.setdefault(key, []).append(timing)
        except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise InputError(f"{place}record {position}: not a timing: {_reason(error)}") from None
    timings = [_fastest(same) for same in visits.values()]
    if "idle_w" in header.extra:
        idle: Row = {"operator": "idle", "dtype": header.dtype, "weight_dtype": header.dtype}
        idle["watts"] = number(f"{place}idle_w", header.extra["idle_w"], _POWER)
        timings.append({**idle, "seconds": 1.0})
    many = 1 + max((timing.get("source", 0) for timing in timings), default=0)
    kernels = ("", *LIBRARIES)[:many]
    return Records.from_rows(timings, [replace(header.source(), kernel=k) for k in kernels])


def _slowed(rows: Collection[Mapping[str, Any]], header: Header) -> list[bool]:
    """Return which rows were timed below the highest clock because of a power limit, which only
    GPUs have."""
    if "threads" in header.stack:
        return [False] * len(rows)
    after = (row.get("after") for row in rows)
    return power_capped([reading if isinstance(reading, Mapping) else {} for reading in after])


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"


def _fastest(visits: Sequence[Row]) -> Row:
    """Return the fastest visit. Its time is known within the distance of the two fastest visits,
    because a machine that others use repeats no time more closely."""
    first, *others = sorted(visits, key=lambda one: float(one["seconds"]))
    if not others:
        return first
    again, own = others[0]["seconds"] / first["seconds"] - 1.0, first["spread"]
    watts = next((visit["watts"] for visit in reversed(visits) if visit["watts"]), 0.0)
    return {**first, "watts": watts, "spread": again if math.isnan(own) else max(own, again)}


def power_capped(readings: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return which readings under load show the power cap at a clock below the run's highest."""
    clocks = [
        clock if isinstance(clock := r.get("clock_hz"), int | float) else math.nan for r in readings
    ]
    highest = max((clock for clock in clocks if clock == clock), default=math.nan)
    return [
        isinstance(r.get("throttle"), list)
        and POWER_CAP in r["throttle"]
        and clock < (1.0 - CLOCK_LIMIT) * highest
        for r, clock in zip(readings, clocks, strict=True)
    ]


def _drifted(rows: Sequence[Mapping[str, Any]]) -> set[int]:
    """Return the numbers of the drift checks that differ."""
    checks = [row for row in rows if row.get("purpose") == "drift_check"]
    if any(row.get("visit") for row in rows):
        times = sorted(row["median_s"] for row in checks)
        limit = (1.0 + DRIFT_LIMIT) * times[len(times) // 4] if checks else math.inf
        return {row.get("block", 0) for row in checks if row["median_s"] > limit}
    return {row.get("block", 0) for row in checks if row.get("drifted")}


def _timing(row: Mapping[str, Any], drifted: Collection[int]) -> Row:
    block = row.get("block", 0)
    flags = int({"noisy": Flag.NOISY, "throttled": Flag.THROTTLED}.get(row.get("status", ""), 0))
    if block in drifted or (block + 1 in drifted and row.get("purpose") != "drift_check"):
        flags |= Flag.DRIFT
    waited = row.get("waited")
    if row.get("steady"):  # as at a power limit: the clock is that of the usual state
        flags |= Flag.POWER_CAPPED
    if isinstance(waited, (int, float)) and waited > WAIT_LIMIT:
        flags |= Flag.WAITED
    purpose, seconds = row.get("purpose", ""), row["median_s"]
    lower, upper, method = row.get("lower_s"), row.get("upper_s"), row.get("method", "")
    spread = math.nan if lower is None or upper is None else (upper - lower) / 2.0 / seconds
    launch = "graph" if method.startswith("events around a graph") else "eager"
    if not method or method.startswith("replayed"):
        launch = LAUNCHES[0]
    return {
        **shape_of(row["operator"]),
        "source": ("", *LIBRARIES).index(row["operator"].get("library", "")),
        "seconds": seconds,
        "spread": spread,
        "sample_count": len(row.get("samples_s", ())),
        "watts": row.get("watts", 0.0),
        "fused": (
            row["operator"]["kind"] in ("gather_gemm", "grouped_gemm") and "one kernel" in method
        ),
        "launch": launch,
        "flags": flags,
        "purpose": purpose if purpose in PURPOSES else "",
    }


def shape_of(operator: Mapping[str, Any]) -> Row:
    for name in COUNTS:
        value = operator.get(name, 0)
        if type(value) is not int or not 0 <= value <= _MOST:
            raise ValueError(
                f"{name}: expected a whole number from 0 to {_MOST}, got {value!r:.60}"
            )
    op = Operator.from_record(operator)
    names = {*COUNTS, "density", "cold", *(["role"] if op.role in ROLES else [])}
    shape = {name: value for name, value in vars(op).items() if name in names}
    shape |= {"operator": op.kind, "dtype": op.dtype, "copies": 0 if op.cold else 1}
    if op.kind.startswith("launch") and op.role == "gemm":
        shape |= {"m": 1, "n": 64, "k": 64}  # the tiny GEMM of a launch measurement
    if op.kind == "elementwise":
        shape["read_bytes"], shape["write_bytes"] = elementwise_bytes(
            op.role, op.m, op.n, op.element_bytes
        )
    if op.kind == "copy":
        shape["read_bytes"] = shape["write_bytes"] = float(op.n)
    return shape


def untimed(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    left = (row for row in rows if "operator" in row and row.get("median_s") is None)
    return dict(
        Counter(
            ": ".join(str(row[name]) for name in ("status", "reason") if row.get(name))
            for row in left
        )
    )
