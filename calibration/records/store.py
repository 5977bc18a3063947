"""Records on disk while a device is measured: append-only, one JSON line each, safe against a kill, a full disk and a second writer.

:class:`Store` is opened by the one process that measures; :func:`read_store` reads a file at any time; ``store_merge`` joins the files of
several machines. The first line is the :class:`Header`; every line ends with a checksum of what is before it:

    {"prunesim":"records","schema":1,"device":"...","stack":{...},"dtype":"bf16","run":"...",...,"crc":"89abcdef"}
    {"type":"measurement","key":"gemm bf16 ...",...,"run":"...","time":"...","crc":"01234567"}

A line is on the disk (``fsync``) before :meth:`Store.append` returns. A last line that was cut short is dropped and counted; a damaged line
anywhere else is refused, because then more than a kill has happened to the file. What the lines mean for a fit is in ``recorded``.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from calibration.records.jsonl import decode_line, encode_line
from calibration.records.records import SCHEMA_VERSION, Source
from simulator.errors import InputError
from simulator.files.read import read_bounded
from simulator.files.write import check_target
from simulator.workload import DTYPES

MARK = b'{"prunesim":"records",'
MOST_STORE_BYTES = 2_000_000_000
"""Largest store that is read: a record with its samples takes some 2 kB, so a million of them."""
_RUN_ON = re.compile(rb'"crc":"[0-9a-f]{8}"\}.')  # a record that ends inside a line: its newline was damaged

_HEADER_TEXTS = tuple((name, str, "text") for name in ("device", "dtype", "run", "started"))


@dataclass(frozen=True)
class Header:
    """What a store holds records of. Device, stack and dtype identify it; the rest describes.

    Attributes
    ----------
    device : str
        The hardware as it names itself.
    stack : mapping of str to str
        Everything that changes timings: framework, driver, CUDA, threads.
    dtype : str
        Number format that is measured.
    run : str
        Name of the run; a new one is drawn where none is given.
    started : str
        ISO 8601, UTC.
    extra : mapping
        JSON-ready, for whoever wrote it (the name the device was opened by, its memory, the plan).
    """

    device: str
    stack: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "bf16"
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    started: str = field(default_factory=lambda: _now())
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown; expected one of {', '.join(DTYPES)}")

    def as_dict(self) -> dict[str, Any]:
        """The first line of a store."""
        return {
            "prunesim": "records",
            "schema": SCHEMA_VERSION,
            "device": self.device,
            "stack": dict(self.stack),
            "dtype": self.dtype,
            "run": self.run,
            "started": self.started,
            "extra": dict(self.extra),
        }

    @classmethod
    def from_dict(cls, line: Mapping[str, Any], label: str) -> Header:
        """The inverse, checked; ``label`` names the file in messages."""
        if line.get("prunesim") != "records":
            raise InputError(f"{label}:1: is no store of records")
        if line.get("schema") != SCHEMA_VERSION:
            raise InputError(
                f"{label}:1: schema {line.get('schema')!r:.40}; this version reads schema {SCHEMA_VERSION}"
            )
        names = ("device", "stack", "dtype", "run", "started", "extra")
        if missing := [name for name in names if name not in line]:
            raise InputError(f"{label}:1: the header lacks {', '.join(missing)}")
        for name, kind, right in (
            ("stack", Mapping, "names and versions"),
            ("extra", Mapping, "names and values"),
            *_HEADER_TEXTS,
        ):
            if not isinstance(line[name], kind):
                raise InputError(f"{label}:1: {name}: expected {right}, got {line[name]!r:.60}")
        if bad := [name for name, version in line["stack"].items() if not isinstance(version, str)]:
            raise InputError(f"{label}:1: stack.{bad[0]}: expected text, got {line['stack'][bad[0]]!r:.60}")
        if line["dtype"] not in DTYPES:
            raise InputError(f"{label}:1: dtype {line['dtype']!r:.60}: expected one of {', '.join(DTYPES)}")
        return cls(**{name: line[name] for name in names})

    def refuse_other(self, other: Header, label: str) -> None:
        """Raise unless both name the same device, software and number format."""
        pairs = {"device": (self.device, other.device), "dtype": (self.dtype, other.dtype)}
        for name in [*self.stack, *(n for n in other.stack if n not in self.stack)]:
            pairs[name] = (self.stack.get(name, "none"), other.stack.get(name, "none"))
        for name, (mine, theirs) in pairs.items():
            if mine != theirs:
                raise InputError(f"{label}: holds records of {name} {mine!r}, not of {theirs!r}; use another file")

    def source(self, run: str = "") -> Source:
        """The source of its records."""
        return Source(
            self.device,
            dict(self.stack),
            method=str(self.extra.get("method", "")),
            date=self.started,
            run=run or self.run,
        )


@dataclass(frozen=True)
class Content:
    """What a store's file holds.

    Attributes
    ----------
    header : Header
    rows : tuple of dict
        The records in the order they were written, without their checksums.
    dropped : int
        1 when the last line had been cut short and was dropped, else 0.
    end : int
        Bytes up to the end of the last good line.
    label : str
        Name of the file, for messages.
    """

    header: Header
    rows: tuple[dict[str, Any], ...]
    dropped: int = 0
    end: int = 0
    label: str = ""


def parse(content: bytes, label: str) -> Content | None:
    """Read a store's bytes.

    Parameters
    ----------
    content : bytes
        All of the file.
    label : str
        Its name, for messages.

    Returns
    -------
    Content or None
        None when nothing was ever acknowledged: the file is empty or its header was cut short.

    Raises
    ------
    InputError
        When the file is something else, of another schema, or damaged before its last line.
    """
    if not content.startswith(MARK) and not MARK.startswith(content[: len(MARK)]):
        raise InputError(f"{label}: is no store of records (its first line does not say so)")
    lines = content.split(b"\n")
    rows: list[dict[str, Any]] = []
    end = 0
    dropped = 0
    last = max((i for i, line in enumerate(lines) if line), default=0)
    for number, line in enumerate(lines):
        if not line:
            if number < last:
                raise InputError(f"{label}:{number + 1}: an empty line among records")
            break
        row = decode_line(line)
        if row is None:
            if number < last or _RUN_ON.search(line):  # more than the line in flight would be lost
                raise InputError(
                    f"{label}:{number + 1}: damaged record (its checksum is wrong); restore the file from a copy"
                )
            dropped = 1
            break
        rows.append(row)
        end += len(line) + 1
    if not rows:
        return None
    return Content(Header.from_dict(rows[0], label), tuple(rows[1:]), dropped, min(end, len(content)), label)


def read_store(path: str | Path) -> Content:
    """Read a store, also while another process writes to it.

    Raises
    ------
    InputError
        When there is no such file, it is empty, or see :func:`parse`.
    """
    content = read_bounded(path, MOST_STORE_BYTES)
    parsed = parse(content, str(path))
    if parsed is None:
        raise InputError(f"{path}: holds no records")
    return parsed


class Store:
    """The one writer of a file of records. Opening an existing file resumes it.

    Parameters
    ----------
    path : str or Path
        File to create or to go on with; its folder must exist.
    header : Header
        What will be measured. An existing file must name the same device, software and number format; its run goes on.

    Raises
    ------
    InputError
        When another process writes to the file, it holds something else, or it cannot be written.

    Examples
    --------
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
            if found is None:
                self._end = 0
                self._put(encode_line(header.as_dict()))
                _sync_folder(self.path.parent)
                found = Content(header, ())
            else:
                found.header.refuse_other(header, str(self.path))
                self._end = found.end
                self._mend(size)
        except BaseException:
            os.close(self._fd)
            raise
        self.header = found.header
        self.dropped = found.dropped
        self._rows = list(found.rows)

    @property
    def rows(self) -> tuple[dict[str, Any], ...]:
        """All records in the file, earlier runs' first."""
        return tuple(self._rows)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; when this returns, it is on the disk.

        Parameters
        ----------
        record : mapping
            JSON-ready. ``run`` and ``time`` are added where it does not say.

        Raises
        ------
        InputError
            When the disk is full or the file cannot be written: the records before are untouched, and the store may be used again.
        ValueError
            When the record is no JSON, or of another number format.
        """
        self._refuse_dtype(record)
        row = {"run": self.header.run, "time": _now(), **record}
        self._put(encode_line(row))
        self._rows.append(row)

    def close(self) -> None:
        """Give the file and its lock back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse_dtype(self, record: Mapping[str, Any]) -> None:
        """Number formats are not mixed in a file; what moves bytes or launches nothing has none."""
        operator = record.get("operator")
        if not isinstance(operator, Mapping) or str(operator.get("kind", "")).startswith(("copy", "launch")):
            return
        if operator.get("dtype", self.header.dtype) != self.header.dtype:
            raise InputError(
                f"{self.path}: holds records of dtype {self.header.dtype!r}, not of {operator['dtype']!r}; use another file"
            )

    def _put(self, line: bytes) -> None:
        """Write and sync one line at the end, or leave the file as it was."""
        try:
            done = 0
            while done < len(line):
                done += _write(self._fd, line[done:], self._end + done)
            _sync(self._fd)
        except OSError as error:
            try:
                os.ftruncate(self._fd, self._end)
                _sync(self._fd)
            except OSError:
                pass  # the half line has no checksum: whoever reads the file drops it
            raise InputError(
                f"{self.path}: cannot be written: {error.strerror}; the records before this one are safe"
            ) from error
        self._end += len(line)

    def _mend(self, size: int) -> None:
        """Cut off a line that was cut short, and end the last good one where only its newline is missing."""
        try:
            if self._end < size:
                os.ftruncate(self._fd, self._end)
            if os.pread(self._fd, 1, self._end - 1) != b"\n":
                _write(self._fd, b"\n", self._end)
                self._end += 1
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


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
