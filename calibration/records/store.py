"""Records on disk while a device is measured: JSON lines that outlive a kill, a full disk and a second writer.

:class:`Store` is opened by the one process that measures; :func:`read_store` reads a file at any time; :func:`merge`
joins the files of several machines. The first line is the :class:`Header`; every line ends with a CRC-32 of what is
before it:

    {"prunesim":"records","schema":1,"device":"...","stack":{...},"dtype":"bf16","run":"...",...,"crc":"89abcdef"}
    {"line":2,"run":"...","time":"...","key":"gemm bf16 ...",...,"crc":"01234567"}

A line is on the disk (``fsync``) before :meth:`Store.append` returns. A last line that was cut short is dropped and
counted; any other line that is damaged, doubled, not at its number, or a second header is refused, because then more
than a kill has happened to the file. What
the lines mean for a fit is in ``lines``.
"""

from __future__ import annotations

import json
import os
import re
import uuid
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from calibration.records.table import SCHEMA_VERSION, Source
from simulator.errors import InputError
from simulator.files.read import read_bounded
from simulator.files.write import check_target, write_whole
from simulator.workload import DTYPES

MARK = b'{"prunesim":"records",'
MOST_STORE_BYTES = 2_000_000_000  # that are read: a record with its samples takes some 2 kB, so a million of them

_CRC = re.compile(rb',"crc":"([0-9a-f]{8})"\}$')
_RUN_ON = re.compile(rb'"crc":"[0-9a-f]{8}"\}.')  # a record that ends inside a line: its newline was damaged


def encode_line(line: Mapping[str, Any]) -> bytes:
    """A mapping as one line with its checksum; ValueError when it is no JSON (a NaN, an array) or names ``crc`` itself.

    >>> encode_line({"a": 1})
    b'{"a":1,"crc":"561bacaf"}\\n'
    """
    if "crc" in line or not line:
        raise ValueError("a record needs at least one field, and none of the name 'crc'")
    body = json.dumps(dict(line), separators=(",", ":"), allow_nan=False).encode()
    return body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)


def _numbered(row: Mapping[str, Any], before: int) -> bytes:
    """The line of a record that follows the header and some others."""
    return encode_line({"line": before + 2, **row})


def decode_line(line: bytes) -> dict[str, Any] | None:
    """The inverse of :func:`encode_line`; None when the line is cut or damaged."""
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
    """What a store holds records of. Device, stack and dtype identify it; the rest describes."""

    device: str  # the hardware as it names itself
    stack: Mapping[str, str] = field(default_factory=dict)  # all that changes timings: framework, driver, CUDA, threads
    dtype: str = "bf16"  # number format that is measured
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    started: str = field(default_factory=_now)  # ISO 8601, UTC
    extra: Mapping[str, Any] = field(default_factory=dict)  # JSON-ready: name the device was opened by, memory, plan

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown; expected one of {', '.join(DTYPES)}")

    def as_dict(self) -> dict[str, Any]:
        """The first line of a store."""
        head = {"prunesim": "records", "schema": SCHEMA_VERSION, **vars(self)}
        return {**head, "stack": dict(self.stack), "extra": dict(self.extra)}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any], label: str) -> Header:
        """The inverse, checked; ``label`` names the file in messages."""
        if line.get("prunesim") != "records":
            raise InputError(f"{label}:1: is no store of records")
        if line.get("schema") != SCHEMA_VERSION:
            this = f"this version reads schema {SCHEMA_VERSION}"
            raise InputError(f"{label}:1: schema {line.get('schema')!r:.40}; {this}")
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
        """Raise unless both name the same device, software and number format."""
        pairs = {"device": (self.device, other.device), "dtype": (self.dtype, other.dtype)}
        for name in [*self.stack, *other.stack]:
            pairs[name] = (self.stack.get(name, "none"), other.stack.get(name, "none"))
        for name, (mine, theirs) in pairs.items():
            if mine != theirs:
                raise InputError(f"{label}: holds records of {name} {mine!r}, not of {theirs!r}; use another file")

    def source(self, run: str = "") -> Source:
        """The source of its records."""
        method = str(self.extra.get("method", ""))
        return Source(self.device, dict(self.stack), method=method, date=self.started, run=run or self.run)


@dataclass(frozen=True)
class Content:
    """What a store's file holds."""

    header: Header
    rows: tuple[dict[str, Any], ...]  # the records in the order they were written, without their checksums
    dropped: int = 0  # 1 when the last line had been cut short and was dropped
    end: int = 0  # bytes up to the end of the last good line
    label: str = ""  # name of the file, for messages


def parse(content: bytes, label: str) -> Content | None:
    """Read a store's bytes; None when nothing was ever acknowledged: the file is empty or its header was cut short.

    InputError when the file is something else, of another schema, damaged before its last line, or when its lines are
    not those that were written, in their order.
    """
    if not content.startswith(MARK) and not MARK.startswith(content[: len(MARK)]):
        raise InputError(f"{label}: is no store of records (its first line does not say so)")
    lines = content.split(b"\n")
    last = max((i for i, line in enumerate(lines) if line), default=-1)
    rows: list[dict[str, Any]] = []
    places: dict[bytes, int] = {}
    end = dropped = 0
    for number, line in enumerate(lines[: last + 1]):
        if not line:
            raise InputError(f"{label}:{number + 1}: an empty line among records")
        row = decode_line(line)
        if row is None:
            if number < last or _RUN_ON.search(line):  # more than the line in flight would be lost
                damage = "damaged record (its checksum is wrong); restore the file from a copy"
                raise InputError(f"{label}:{number + 1}: {damage}")
            dropped = 1
            break
        if fault := _misplaced(row, number + 1, places.setdefault(line, number + 1)):
            raise InputError(f"{label}:{number + 1}: {fault}")
        rows.append(row)
        end += len(line) + 1
    if not rows:
        return None
    return Content(Header.from_dict(rows[0], label), tuple(rows[1:]), dropped, min(end, len(content)), label)


def _misplaced(row: dict[str, Any], line: int, first: int) -> str:
    """What is wrong with the place of a line, or ""; takes its number out. ``first`` is where it was met first."""
    own = row.pop("line", None)
    if line > 1 and "prunesim" in row:
        return "a second header: the files of several runs are joined by prunesim measure --merge"
    if line != first:
        return f"line {first} once more; remove it, or restore the file from a copy"
    if line > 1 and own != line:
        return f"was written as line {own!r:.40}: lines are missing or in another order; restore the file from a copy"
    return ""


def read_store(path: str | Path) -> Content:
    """Read a store, also while another process writes to it; InputError as of :func:`parse`, or where it is empty."""
    parsed = parse(read_bounded(path, MOST_STORE_BYTES), str(path))
    if parsed is None:
        raise InputError(f"{path}: holds no records")
    return parsed


class Store:
    """The one writer of a file of records. Opening an existing file resumes it: its header stays, and its run goes on.

    InputError when another process writes to the file, it holds something else or records of another device, software
    or number format than the header names, or it cannot be written.

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
        """All records in the file, earlier runs' first."""
        return tuple(self._rows)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one JSON-ready record, with ``run`` and ``time``; when this returns, it is on the disk.

        InputError when it is of another number format, the disk is full or the file cannot be written: the records
        before are untouched then, and the store may be used again. ValueError when the record is no JSON.
        """
        operator, mine = record.get("operator"), self.header.dtype
        if isinstance(operator, Mapping) and not str(operator.get("kind", "")).startswith(("copy", "launch")):
            theirs = operator.get("dtype", mine)  # a copy or a launch has none
            if theirs != mine:
                raise InputError(f"{self.path}: holds records of dtype {mine!r}, not of {theirs!r}; use another file")
        row = {"run": self.header.run, "time": _now(), **record}
        self._put(_numbered(row, len(self._rows)))
        self._rows.append(row)

    def close(self) -> None:
        """Give the file and its lock back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, line: bytes) -> None:
        """Write and sync one line at the end, or leave the file as it was."""
        try:
            done = 0
            while done < len(line):
                done += _write(self._fd, line[done:], self._end + done)
            _sync(self._fd)
        except OSError as error:
            with suppress(OSError):  # else the half line has no checksum: whoever reads the file drops it
                os.ftruncate(self._fd, self._end)
                _sync(self._fd)
            safe = "the records before this one are safe"
            raise InputError(f"{self.path}: cannot be written: {error.strerror}; {safe}") from error
        self._end += len(line)

    def _mend(self, size: int) -> None:
        """Cut off a line that was cut short, and end the last good one where only its newline is missing."""
        try:
            if self._end < size:
                os.ftruncate(self._fd, self._end)
            if os.pread(self._fd, 1, self._end - 1) != b"\n":
                self._end += _write(self._fd, b"\n", self._end)
            _sync(self._fd)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from error


def open_locked(path: Path) -> int:
    """A file descriptor that holds the file's lock; refuses at once when another process has it."""
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
    """One write; a name of its own so that a test can fill the disk."""
    return os.pwrite(fd, data, offset)


def _sync(fd: int) -> None:
    """``os.fsync``; here so that a test can let it fail."""
    os.fsync(fd)


def _sync_folder(folder: Path) -> None:
    """Make a new file's name last."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def merge(stores: Sequence[str | Path], out: str | Path) -> Content:
    """Join stores of one device type and software, for instance of several machines of a cluster, into a new one.

    A record that is there twice (same run, operator, purpose and anchor number) is kept once; ``dropped`` counts cut
    last lines of all stores. InputError when device, software or number format differ, nothing was given, or ``out`` is
    one of the stores or open in another process.
    """
    if not stores:
        raise InputError("nothing to merge: expected at least one store")
    target = check_target(out)
    if any(Path(path).exists() and target.exists() and os.path.samefile(path, target) for path in stores):
        raise InputError(f"{target}: is itself one of the stores to merge; write to another file")
    contents = [read_store(path) for path in stores]
    first = contents[0].header
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    runs: dict[str, None] = {}
    for path, content in zip(stores, contents):
        content.header.refuse_other(first, str(path))
        for row in content.rows:
            run = str(row.get("run", content.header.run))
            runs[run] = None
            rows.setdefault(_identity(row, run), {**row, "run": run})
    name = first.run if len(runs) < 2 else f"{zlib.crc32(json.dumps(sorted(runs)).encode()):08x}"
    extra = {**first.extra, "runs": [*runs] or [first.run]}
    header = Header(first.device, first.stack, first.dtype, name, min(c.header.started for c in contents), extra)
    try:
        lines = (_numbered(row, before) for before, row in enumerate(rows.values()))
        written = b"".join([encode_line(header.as_dict()), *lines])
    except ValueError as error:  # a number that is none, which this program never writes
        raise InputError(f"{' '.join(map(str, stores))}: cannot be merged: {error}") from None
    if target.exists():
        os.close(open_locked(target))
    try:
        write_whole(target, written)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}") from error
    return Content(header, tuple(rows.values()), sum(c.dropped for c in contents), len(written))


def _identity(row: Mapping[str, Any], run: str) -> tuple[str, ...]:
    """What makes two lines one record: run, operator, purpose, and for anchors their number."""
    key = row.get("key")
    if key is None:  # no operator named: equal content
        return run, json.dumps(dict(row), sort_keys=True)
    purpose = str(row.get("purpose", ""))
    return run, str(key), purpose, str(row.get("block", "")) if purpose == "anchor" else ""
