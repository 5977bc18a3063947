"""Temporary files: those of killed writers are removed by the next writer; those that a process writes stay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from simulator.files.write import _temporary, remove_left, write_whole

pytestmark = pytest.mark.quick

pytest.importorskip("fcntl")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_temporary_files_of_killed_writers_are_removed_by_the_next(tmp_path: Path) -> None:
    for name in (".t.csv.k1lled.tmp", ".other.csv.k1lled.tmp", ".t.csv"):
        (tmp_path / name).write_text("half of it")
    write_whole(tmp_path / "t.csv", b"whole")
    assert names(tmp_path) == [".other.csv.k1lled.tmp", ".t.csv", "t.csv"]


def test_a_file_that_another_process_writes_stays(tmp_path: Path) -> None:
    target = tmp_path / "t.csv"
    handle, theirs = _temporary(target)
    write_whole(target, b"mine")
    remove_left(tmp_path, "*")
    assert target.read_text() == "mine"
    assert names(tmp_path) == sorted([Path(theirs).name, "t.csv"])
    os.close(handle)
    remove_left(tmp_path, "*")
    assert names(tmp_path) == ["t.csv"]
