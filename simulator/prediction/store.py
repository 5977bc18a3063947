"""Store the parts of a sweep's table in a folder next to the file; join them and remove the folder at the end.

A part is written whole or not at all, so a killed sweep loses only the parts in progress; a rerun computes the missing
parts, and those without the stamp of their grid, index and number of rows (:func:`stamp`). The folder's manifest
identifies the grid, and a lock excludes a second sweep.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulator.errors import InputError, one_line
from simulator.files.parquet import load_pyarrow
from simulator.files.write import check_target, remove_left, replacing, write_whole
from simulator.units import format_quantity

GROUP_ROWS = 131_072  # of the finished file
DIGEST_KEY, NOTES_KEY, STAMP_KEY = b"prunesim.grid", b"prunesim.notes", b"prunesim.part"


def stamp(digest: str, index: int, rows: int) -> bytes:
    """Return what the metadata of a part hold under ``STAMP_KEY``: which part of which grid it is, and its rows.

    >>> stamp("2fd4e1c6", 3, 40_000)
    b'["2fd4e1c6", 3, 40000]'
    """
    return json.dumps([digest, index, rows]).encode()


@dataclass(frozen=True)
class TableStore:
    """Parts of one table, which becomes a Parquet file."""

    target: Path
    digest: str  # of everything that determines the content
    parts: int  # their number

    @property
    def folder(self) -> Path:
        """Folder of the parts until all are complete."""
        return self.target.with_name(self.target.name + ".parts")

    def part(self, index: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"part-{index:06d}.parquet"

    def finished(self) -> bool:
        """Return whether the table exists; raise InputError if the target is invalid or another file."""
        check_target(self.target)
        if not self.target.exists():
            return False
        _, parquet = load_pyarrow()
        try:
            found = (parquet.read_schema(self.target).metadata or {}).get(DIGEST_KEY, b"").decode()
        except (OSError, ValueError):
            found = ""
        if found != self.digest:
            what = (
                "the table of another sweep (grid, profiles or version differ)" if found else "not the table of a sweep"
            )
            raise InputError(f"{self.target}: exists and is {what}; name another file or remove it")
        return True

    @contextlib.contextmanager
    def opened(self, facts: Mapping[str, Any]) -> Iterator[set[int]]:
        """Create or reopen the folder under a lock and return the indices of its whole parts. Raises InputError if
        another sweep is writing, or the parts belong to another grid."""
        manifest, own = self.folder / "manifest.json", {"digest": self.digest, "parts": self.parts}
        with _locked(self.folder / "lock", self.target):
            if self.target.exists():  # was missing when this sweep began
                self.clear()
                self.finished()
                raise InputError(f"{self.target}: another sweep has just written it; run the same command again")
            if manifest.exists():
                try:
                    found = json.loads(manifest.read_text(encoding="utf-8"))
                except (ValueError, RecursionError):
                    found = {}
                if not isinstance(found, dict) or not own.items() <= found.items():
                    what = "parts of another sweep (grid, filter, profiles or version differ)"
                    raise InputError(f"{self.folder}: holds {what}; remove it or name another file")
            else:
                write_whole(manifest, json.dumps({**own, **facts}, indent=1, default=str).encode())
            try:
                yield self._there()
            except BaseException:
                if not self._there():
                    self.clear()  # nothing to resume
                raise

    def _there(self) -> set[int]:
        return {i for i in range(self.parts) if self.part(i).is_file() and self._is_whole(i)}

    def _is_whole(self, index: int) -> bool:
        """Return whether a file is the part of this grid and index, with all rows."""
        pyarrow, parquet = load_pyarrow()
        try:
            about = parquet.read_metadata(self.part(index))
        except (OSError, ValueError, pyarrow.ArrowException):
            return False
        return bool((about.metadata or {}).get(STAMP_KEY) == stamp(self.digest, index, about.num_rows))

    def put(self, index: int, content: bytes) -> None:
        """Write a part whole."""
        write_whole(self.part(index), content)

    def assemble(self) -> tuple[int, dict[str, list[float]]]:
        """Join all parts into one file, with few row groups in memory, and remove the folder; return the number of rows
        and the notes of the parts."""
        pyarrow, parquet = load_pyarrow()
        notes: dict[str, list[float]] = {}
        waiting: list[Any] = []
        writer: Any = None
        rows = 0
        with replacing(self.target) as name, contextlib.ExitStack() as workloads:
            for index in range(self.parts):
                table, own = self._read(index)
                for reason, at in own.items():
                    notes.setdefault(reason, []).extend(at)
                table = table.replace_schema_metadata({DIGEST_KEY: self.digest.encode()})
                if writer is None:
                    writer = parquet.ParquetWriter(name, table.schema, compression="zstd", compression_level=1)
                    workloads.enter_context(writer)
                elif table.schema != writer.schema:
                    raise self._damaged(index, "its columns differ from the previous parts")
                rows += table.num_rows
                waiting.append(table)
                if sum(t.num_rows for t in waiting) >= GROUP_ROWS or index == self.parts - 1:
                    writer.write_table(pyarrow.concat_tables(waiting), row_group_size=GROUP_ROWS)
                    waiting = []
        self.clear()
        return rows, notes

    def _read(self, index: int) -> tuple[Any, dict[str, list[float]]]:
        """Return a part's table, and the excluded sparsities by reason."""
        pyarrow, parquet = load_pyarrow()
        try:
            table = parquet.read_table(self.part(index), use_threads=False)
            notes = json.loads((table.schema.metadata or {}).get(NOTES_KEY, b"{}"))
        except (OSError, ValueError, RecursionError, pyarrow.ArrowException) as error:
            raise self._damaged(index, str(error)) from None
        if (table.schema.metadata or {}).get(STAMP_KEY) != stamp(self.digest, index, table.num_rows):
            raise self._damaged(index, f"it is not part {index} of this grid with all rows")
        lists = list(notes.values()) if isinstance(notes, dict) else [0]
        if not all(isinstance(at, list) and all(_is_fraction(x) for x in at) for at in lists):
            raise self._damaged(index, "its notes are invalid")
        return table, notes

    def _damaged(self, index: int, why: str) -> InputError:
        way = "remove it and run the same command again"
        return InputError(f"{self.part(index)}: is damaged ({one_line(why, 300)}); {way}")

    def clear(self) -> None:
        """Remove the parts, but no other files in the folder."""
        for path in [*(self.part(i) for i in range(self.parts)), self.folder / "manifest.json", self.folder / "lock"]:
            path.unlink(missing_ok=True)
        remove_left(self.folder, "*")
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


def check_room(target: Path, needed_bytes: float) -> None:
    """Raise InputError if the disk has too little free space for a table."""
    free = shutil.disk_usage(target.parent).free
    if needed_bytes > free:
        needed, left = (format_quantity(float(some), "B", 3) for some in (needed_bytes, free))
        sizes = f"expected {needed} of free disk while it is written, got {left}"
        raise InputError(f"{target}: {sizes}; free more or take a smaller grid")


@contextlib.contextmanager
def _locked(path: Path, target: Path) -> Iterator[None]:
    """Hold an exclusive lock in a folder, which is created; it is released however the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no lock: two sweeps into one file are not detected
        path.parent.mkdir(exist_ok=True)
        yield
        return
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # a sweep that ended removed the folder
            continue
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{target}: another sweep is writing it") from None
            if os.fstat(handle).st_nlink:  # 0: that sweep removed the lock, which excludes nobody then
                yield
                return
        finally:
            os.close(handle)
