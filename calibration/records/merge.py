"""Stores of several machines joined into one: :func:`merge`."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.records.jsonl import encode_line
from calibration.records.store import Content, Header, open_locked, read_store
from simulator.errors import InputError
from simulator.files.write import check_target, write_whole


def merge(stores: Sequence[str | Path], out: str | Path) -> Content:
    """Join stores of one device type and software, for instance of several machines of a cluster, into a new one.

    Parameters
    ----------
    stores : sequence of path
        Files to join; a cut last line is dropped as in :func:`read_store`.
    out : str or Path
        File to write, whole. It may not be one of the stores, nor be open in another process.

    Returns
    -------
    Content
        What was written. ``dropped`` counts cut lines of all stores. A record that is there twice (same run, operator, purpose and anchor
        number) is kept once.

    Raises
    ------
    InputError
        When device, software or number format differ, or nothing was given.
    """
    if not stores:
        raise InputError("nothing to merge: expected at least one store")
    target = check_target(out)
    if any(Path(path).exists() and target.exists() and os.path.samefile(path, target) for path in stores):
        raise InputError(f"{target}: is itself one of the stores to merge; write to another file")
    contents = [read_store(path) for path in stores]
    first = contents[0].header
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    runs: list[str] = []
    for path, content in zip(stores, contents):
        content.header.refuse_other(first, str(path))
        for row in content.rows:
            run = str(row.get("run", content.header.run))
            runs += [run] if run not in runs else []
            rows.setdefault(_identity(row, run), {**row, "run": run})
    name = first.run if len(runs) < 2 else f"{zlib.crc32(json.dumps(sorted(runs)).encode()):08x}"
    extra = {**first.extra, "runs": runs or [first.run]}
    header = Header(first.device, first.stack, first.dtype, name, min(c.header.started for c in contents), extra)
    try:
        written = b"".join(encode_line(line) for line in (header.as_dict(), *rows.values()))
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
