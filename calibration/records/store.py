"""Records on disk during a measurement: JSON lines that survive a kill, a full disk and a second writer.

The measuring process opens a :class:`Store`; :func:`read_store` reads its file at any time. The first line is the
:class:`Header`; every line ends with a CRC-32 of its other fields:

    {"prunesim":"records","schema":2,"device":"...","stack":{...},"dtype":"bf16","run":"...",...,"crc":"89abcdef"}
    {"line":2,"run":"...","time":"...","key":"gemm bf16 ...",...,"crc":"01234567"}

:meth:`Store.append` returns after the line is on the disk (``fsync``). An incomplete last line is dropped and counted.
A damaged, repeated or misplaced line, or a second header, is an error, because a kill alone does not cause it.
``stored_timings`` converts the lines to a table.
"""

from __future__ import annotations

import json
import os
import re
import uuid
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from calibration.records.timing_table import Source
from simulator.errors import InputError
from simulator.files.read import read_bounded
from simulator.files.write import check_target
from simulator.workload import DTYPES

SCHEMA_VERSION = 2  # 2: purpose "drift_check"
MARK = b'{"prunesim":"records",'
MOST_STORE_BYTES = 2_000_000_000  # largest file that is read; a record takes about 2 kB, so a million records

_CRC = re.compile(rb',"crc":"([0-9a-f]{8})"\}$')
_RUN_ON = re.compile(rb'"crc":"[0-9a-f]{8}"\}.')  # a record that ends inside a line: its newline was damaged


def encode_line(line: Mapping[str, Any]) -> bytes:
    """Return a mapping as one line with its checksum; ValueError if it is not JSON (NaN, array) or has a ``crc``.

    >>> encode_line({"a": 1})
    b'{"a":1,"crc":"561bacaf"}\\n'
    """
    if "crc" in line or not line:
        raise ValueError("a record needs at least one field, and no field named 'crc'")
    body = json.dumps(dict(line), separators=(",", ":"), allow_nan=False).encode()
    return body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)


def _numbered(row: Mapping[str, Any], before: int) -> bytes:
    """Return the line of a record after the header and ``before`` other records."""
    return encode_line({"line": before + 2, **row})


def decode_line(line: bytes) -> dict[str, Any] | None:
    """Return the mapping of :func:`encode_line`; None if the line is incomplete or damaged."""
    found = _CRC.search(line)
    body = line[: found.start()] + b"}" if found else b""
    if found is None or zlib.crc32(body) != int(found[1], 16):
        return None
    try:
        out = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return out if isinstance(out, dict) else None


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class Header:
    """Subject of a store. Device, stack and dtype identify it; the other fields describe it."""

    device: str  # the hardware as it names itself
    stack: Mapping[str, str] = field(default_factory=dict)  # everything that changes times: framework, driver, threads
    dtype: str = "bf16"  # measured number format
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    started: str = field(default_factory=_now)  # ISO 8601, UTC
    extra: Mapping[str, Any] = field(default_factory=dict)  # JSON-ready: name of the opened device, memory, plan

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown; expected one of {', '.join(DTYPES)}")

    def as_dict(self) -> dict[str, Any]:
        """Return the first line of a store."""
        head = {"prunesim": "records", "schema": SCHEMA_VERSION, **vars(self)}
        return {**head, "stack": dict(self.stack), "extra": dict(self.extra)}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any], label: str) -> Header:
        """Return the checked header of a first line; ``label`` names the file in messages."""
        if line.get("prunesim") != "records":
            raise InputError(f"{label}:1: not a store of records")
        if line.get("schema") != SCHEMA_VERSION:
            other = f"expected schema {SCHEMA_VERSION}, got {line.get('schema')!r:.40}"
            raise InputError(f"{label}:1: {other}; the records are of another version of prunesim: measure again")
        names = [f.name for f in fields(cls)]
        if missing := [name for name in names if name not in line]:
            raise InputError(f"{label}:1: the header lacks {', '.join(missing)}")
        mappings = {"stack": "names and versions", "extra": "names and values"}
        for name in (*mappings, "device", "dtype", "run", "started"):
            if not isinstance(line[name], Mapping if name in mappings else str):
                right = mappings.get(name, "text")
                raise InputError(f"{label}:1: {name}: expected {right}, got {line[name]!r:.60}")
        for name, version in line["stack"].items():
            if not isinstance(version, str):
                raise InputError(f"{label}:1: stack.{name}: expected text, got {version!r:.60}")
        if line["dtype"] not in DTYPES:
            raise InputError(f"{label}:1: dtype {line['dtype']!r:.60}: expected one of {', '.join(DTYPES)}")
        return cls(**{name: line[name] for name in names})

    def refuse_other(self, other: Header, label: str) -> None:
        """Raise InputError unless both headers have the same device, software and number format."""
        pairs = {"device": (self.device, other.device), "dtype": (self.dtype, other.dtype)}
        for name in [*self.stack, *other.stack]:
            pairs[name] = (self.stack.get(name, "none"), other.stack.get(name, "none"))
        for name, (mine, theirs) in pairs.items():
            if mine != theirs:
                raise InputError(f"{label}: holds records of {name} {mine!r}, not of {theirs!r}; use another file")

    def source(self, run: str = "") -> Source:
        """Return the source of the records of a run (default: the header's)."""
        method = str(self.extra.get("method", ""))
        return Source(self.device, dict(self.stack), method=method, date=self.started, run=run or self.run)


@dataclass(frozen=True)
class Content:
    """Content of a store's file."""

    header: Header
    rows: tuple[dict[str, Any], ...]  # records in the order of writing, without checksums
    dropped: int = 0  # 1 if the last line was incomplete and was dropped
    end: int = 0  # bytes up to the end of the last complete line
    label: str = ""  # name of the file, for messages


def parse(content: bytes, label: str) -> Content | None:
    """Read a store's bytes; None if the file is empty or its header is incomplete.

    InputError: the file is not a store, has another schema, is damaged before its last line, or its lines are not in
    the order of writing.
    """
    if not content.startswith(MARK) and not MARK.startswith(content[: len(MARK)]):
        raise InputError(f"{label}: not a store of records (its first line is not a header)")
    lines = content.split(b"\n")
    last = max((i for i, line in enumerate(lines) if line), default=-1)
    header: Header | None = None
    rows: list[dict[str, Any]] = []
    numbers: dict[bytes, int] = {}  # line -> the number of its first occurrence
    end = dropped = 0
    for number, line in enumerate(lines[: last + 1]):
        if not line:
            raise InputError(f"{label}:{number + 1}: empty line between records")
        row = decode_line(line)
        if row is None:
            if number < last or _RUN_ON.search(line):  # a kill damages only the last line
                damage = "damaged record (its checksum is wrong); restore the file from a copy"
                raise InputError(f"{label}:{number + 1}: {damage}")
            dropped = 1
            break
        if header is None:
            header = Header.from_dict(row, label)
        elif fault := _misplaced(row, number + 1, numbers.setdefault(line, number + 1)):
            raise InputError(f"{label}:{number + 1}: {fault}")
        else:
            rows.append(row)
        end += len(line) + 1
    if header is None:
        return None
    return Content(header, tuple(rows), dropped, min(end, len(content)), label)


def _misplaced(row: dict[str, Any], line: int, first: int) -> str:
    """Return the fault of a line's position, or "", and remove its number; ``first`` is its first occurrence."""
    own = row.pop("line", None)
    if "prunesim" in row:
        return "second header; keep the runs in separate files: prunesim fit reads several"
    if line != first:
        return f"repeats line {first}; remove it, or restore the file from a copy"
    if own != line:
        return f"was written as line {own!r:.40}: lines are missing or in another order; restore the file from a copy"
    return ""


def read_store(path: str | Path) -> Content:
    """Read a store, also while another process writes to it; InputError as in :func:`parse`, or if it is empty."""
    parsed = parse(read_bounded(path, MOST_STORE_BYTES), str(path))
    if parsed is None:
        raise InputError(f"{path}: holds no records")
    return parsed


class Store:
    """The only writer of a file of records. Opening an existing file resumes its run under its header.

    InputError: another process writes to the file, it is not a store, or it holds records of another device, software
    or number format than the header. OSError: it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Store(Path(folder) / "records.jsonl", Header("A100", {"driver": "580"})) as store:
    ...         store.append({"key": "gemm", "median_s": 1e-6})
    ...     [row["key"] for row in read_store(Path(folder) / "records.jsonl").rows]
    ['gemm']
    """

    def __init__(self, path: str | Path, header: Header) -> None:
        self.path = check_target(path)
        self._fd = open_locked(self.path)
        try:
            size = os.fstat(self._fd).st_size
            found = parse(os.pread(self._fd, size, 0), str(self.path))
            self._end = found.end if found else 0
            if found is None:
                self._put(encode_line(header.as_dict()))
                _sync_folder(self.path.parent)
                found = Content(header, ())
            else:
                found.header.refuse_other(header, str(self.path))
                self._mend(size)
        except BaseException:
            self.close()
            raise
        self.header = found.header
        self._rows = list(found.rows)

    @property
    def rows(self) -> tuple[dict[str, Any], ...]:
        """All records in the file, those of earlier runs first."""
        return tuple(self._rows)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one JSON-ready record, with ``run`` and ``time``, to the disk.

        InputError: the record has another number format. OSError: the disk is full or the file cannot be written;
        earlier records stay valid, and the store can be used again. ValueError: the record is not JSON.
        """
        operator, mine = record.get("operator"), self.header.dtype
        if isinstance(operator, Mapping) and not str(operator.get("kind", "")).startswith(("copy", "launch")):
            theirs = operator.get("dtype", mine)  # copies and launches have none
            if theirs != mine:
                raise InputError(f"{self.path}: holds records of dtype {mine!r}, not of {theirs!r}; use another file")
        row = {"run": self.header.run, "time": _now(), **record}
        self._put(_numbered(row, len(self._rows)))
        self._rows.append(row)

    def close(self) -> None:
        """Close the file and release its lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, line: bytes) -> None:
        """Write and sync one line at the end; leave the file unchanged after an error."""
        try:
            done = 0
            while done < len(line):
                done += _write(self._fd, line[done:], self._end + done)
            _sync(self._fd)
        except OSError as error:
            with suppress(OSError):  # if this fails too, readers drop the incomplete line
                os.ftruncate(self._fd, self._end)
                _sync(self._fd)
            raise self._unwritten(error, "; earlier records are safe") from error
        self._end += len(line)

    def _mend(self, size: int) -> None:
        """Remove an incomplete last line, or add the newline if only that is missing."""
        try:
            if self._end < size:
                os.ftruncate(self._fd, self._end)
            if os.pread(self._fd, 1, self._end - 1) != b"\n":
                self._end += _write(self._fd, b"\n", self._end)
            _sync(self._fd)
        except OSError as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError, more: str = "") -> OSError:
        return OSError(error.errno, f"cannot be written: {error.strerror}{more}", str(self.path))


def open_locked(path: Path) -> int:
    """Open a file and lock it; InputError at once if another process holds the lock."""
    import fcntl  # missing on Windows, where nothing else here needs it

    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened for writing: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise InputError(f"{path}: another process is writing to this file; wait for it or use another file") from error
    return fd


def _write(fd: int, data: bytes, offset: int) -> int:
    """``os.pwrite``; a function here so that a test can fill the disk."""
    return os.pwrite(fd, data, offset)


def _sync(fd: int) -> None:
    """``os.fsync``; a function here so that a test can make it fail."""
    os.fsync(fd)


def _sync_folder(folder: Path) -> None:
    """Write the name of a new file to the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
