"""Temporary files: those of killed writers are removed by the next writer; those that a process
writes stay. Texts of a CSV are no formulas, and links in an output folder are not followed."""

from __future__ import annotations

import csv
import io
import os
import stat
from pathlib import Path

import pytest

from calibration.runners.runs import check_folder
from simulator.errors import InputError
from simulator.files.csv import csv_text
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
    pipe = tmp_path / "pipe.html"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match=r"pipe.html: expected a pipe that a process reads"):
        write_whole(pipe, b"x")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"whole")
    assert os.read(reader, 9) == b"whole"
    os.close(reader)


def test_no_cell_begins_as_a_formula() -> None:
    texts = ['=HYPERLINK("x")', "+1+cmd", "-1+cmd", "@SUM(1)", "a=b", "-", ""]
    cells = list(
        csv.reader(io.StringIO(csv_text([{"text": text, "number": -1.5} for text in texts])))
    )[1:]
    assert [cell for cell, _ in cells] == [
        '\'=HYPERLINK("x")',
        "'+1+cmd",
        "'-1+cmd",
        "'@SUM(1)",
        "a=b",
        "-",
        "",
    ]
    assert {number for _, number in cells} == {"-1.5"}


def test_links_in_the_folder_of_a_run_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "elsewhere")
    assert check_folder(tmp_path) == tmp_path
    (tmp_path / "profile.yaml").symlink_to(tmp_path / "elsewhere" / "new")
    with pytest.raises(InputError, match=r"profile\.yaml: expected a file, got a link"):
        check_folder(tmp_path)
