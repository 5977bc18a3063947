"""Temporary files: those of killed writers are removed by the next writer; those that a process writes stay."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from simulator.errors import InputError
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
    theirs = _temporary(target)
    write_whole(target, b"mine")
    remove_left(tmp_path, "*")
    assert target.read_text() == "mine"
    assert names(tmp_path) == sorted([Path(theirs.name).name, "t.csv"])
    theirs.close()
    remove_left(tmp_path, "*")
    assert names(tmp_path) == ["t.csv"]


def test_a_file_is_replaced_with_its_mode_and_through_its_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.csv", tmp_path / "link.csv"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert names(tmp_path) == ["link.csv", "real.csv"]


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    write_whole("/dev/null", b"x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(InputError, match="is a folder"):
        write_whole(tmp_path, b"x")
