"""Inputs by the thousand, each near a good one: refused in one printable line or used without harm, never a traceback, a hang, or a touch
of anything outside the folder they lie in.

The inner loop tries 300 inputs a format, ``-m slow`` 2,000 others;
``PRUNESIM_FUZZ=20000 python -m pytest tests/fuzz -m slow -s -k by_the_thousand``
takes some minutes and prints how many a second. An input is named by its format, seed and number: ``make(random.Random("config 1 57"))``
makes it again.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from guard import LIMIT_S, Guard, check_line, refusal
from near_lines import command_line
from targets import TARGETS, Target

from calibration.cli import run

MANY = int(os.environ.get("PRUNESIM_FUZZ", "2000"))
PLACE = re.compile(r".*?:\d+:\d+: ")


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in the folder of the test; nothing waits for the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def attack(target: Target, folder: Path, seed: int, count: int) -> int:
    """Try inputs; returns how many were read."""
    pytest.importorskip("pyarrow")
    (folder / "t.parquet.parts").mkdir()
    path, read = folder / target.file, 0
    with Guard(folder) as guard:
        for number in range(count):
            path.unlink(
                missing_ok=True
            )  # some file systems write a file that is cut and written again to the disk at once
            path.write_bytes(target.make(random.Random(f"{target.name} {seed} {number}")))
            try:
                message, _ = refusal(lambda: target.read(path), target.file if target.names_file else "")
                assert not message or not target.positions or PLACE.match(message), message
                guard.check()
            except BaseException as error:
                raise AssertionError(f"{target.name} {seed} {number}: {type(error).__name__}: {error}") from error
            read += not message
    return read


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_inputs_near_good_ones(target: Target, tmp_path: Path) -> None:
    read = attack(target, tmp_path, 0, 300)
    assert 3 <= read <= 290  # the mutator is neither blunt nor idle


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_inputs_near_good_ones_by_the_thousand(target: Target, tmp_path: Path) -> None:
    began = time.monotonic()
    read = attack(target, tmp_path, 1, MANY)
    took = time.monotonic() - began
    print(f"\n{target.name}: {MANY} inputs, {read} read, {MANY / took:.0f}/s, {took:.1f} s")
    assert read >= MANY // 100


def ended(words: list[str]) -> tuple[int, str]:
    """Status and standard error of a command line, given its time."""
    out, err = io.StringIO(), io.StringIO()
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run(words)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    assert "Traceback" not in err.getvalue()
    assert "program error" not in err.getvalue(), (words, err.getvalue())
    return status, err.getvalue()


def check_end(words: list[str], status: int, err: str) -> None:
    """Done, or refused in one line."""
    assert status in (0, 2), (words, err)
    if status == 2 and words[:2] != ["hardware", "check"]:  # that one lists every fault on standard output
        said = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert len(said) == 1, (words, err)
        check_line(said[0])


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", [t for t in TARGETS if t.commands], ids=lambda t: t.name)
def test_commands_on_inputs_near_good_ones(target: Target, count: int, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / target.file
    with Guard(tmp_path):
        for number in range(count):
            path.write_bytes(target.make(random.Random(f"{target.name} 2 {number}")))
            for words in target.commands:
                filled = [str(path) if word == "{}" else word for word in words]
                check_end(filled, *ended(filled))
    assert {p.name for p in tmp_path.iterdir()} <= {target.file, "out.parquet", "out.jsonl"}


@pytest.mark.parametrize("count", [60, pytest.param(2_000, marks=pytest.mark.slow)])
def test_command_lines_near_good_ones(count: int, tmp_path: Path) -> None:
    done = 0
    with Guard(tmp_path, (Path("/etc/passwd"), Path("/dev/zero"))):  # the person at the terminal may name any file
        for number in range(count):
            words = command_line(random.Random(f"line 0 {number}"))
            status, err = ended(words)
            check_end(words, status, err)
            done += status == 0
    assert not list(tmp_path.iterdir())
    assert done > count // 100
