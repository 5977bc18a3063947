"""Inputs by the thousand, each near a good one: refused in one printable line or used without harm.

Never a traceback, a hang, or a touch of anything outside the folder they lie in. The inner loop tries 100 inputs a
format, ``-m slow`` 150 others, or as many as ``PRUNESIM_FUZZ`` says. An input is named by its file, seed and number:
``make(random.Random("config.json 1 57"))`` makes it again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
from pathlib import Path

import pytest
from guard import Guard, check_line, in_time, refusal
from targets import TARGETS, Target, command_line

from simulator.cli import run

MANY = int(os.environ.get("PRUNESIM_FUZZ", "150"))
BY_THE_THOUSAND = pytest.param(1, MANY, marks=pytest.mark.slow, id="by_the_thousand")
PLACE = re.compile(r".*?:\d+:\d+: ")


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in the folder of the test."""
    monkeypatch.chdir(tmp_path)


def attack(target: Target, folder: Path, seed: int, count: int) -> int:
    """Try inputs; returns how many were read."""
    path, read = folder / target.file, 0
    with Guard(folder) as guard:
        for number in range(count):
            path.unlink(missing_ok=True)  # some file systems write a file that is cut and written again at once
            path.write_bytes(target.make(random.Random(f"{target.file} {seed} {number}")))
            try:
                message, _ = refusal(lambda: target.read(path), target.file if target.names_file else "")
                assert not message or not target.positions or PLACE.match(message), message
                guard.check()
            except BaseException as error:
                raise AssertionError(f"{target.file} {seed} {number}: {type(error).__name__}: {error}") from error
            read += not message
    return read


@pytest.mark.parametrize(("seed", "count"), [(0, 100), BY_THE_THOUSAND])
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.file)
def test_inputs_near_good_ones(target: Target, seed: int, count: int, tmp_path: Path) -> None:
    read = attack(target, tmp_path, seed, count)
    assert count // 100 <= read <= 29 * count // 30  # the mutator is neither blunt nor idle


def test_the_guard_hears_what_is_touched_outside(tmp_path: Path) -> None:
    for touch in ((tmp_path / "b").touch, (tmp_path / "b").unlink, Path("/etc/passwd").read_bytes):
        with pytest.raises(AssertionError, match=r"write|os\.remove|read"), Guard(tmp_path / "a"):
            touch()


def check_command(words: list[str]) -> int:
    """Status of a command line, given its time: done, or refused in one line."""
    out, err = io.StringIO(), io.StringIO()
    with in_time(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(words)
    said = [line for line in err.getvalue().splitlines() if not line.startswith(("note: ", "status: "))]
    assert status in (0, 2), (words, said)
    assert not [line for line in said if "Traceback" in line or "program error" in line], (words, said)
    if status == 2 and words[:2] != ["hardware", "check"]:  # that one lists every fault on standard output
        assert len(said) == 1, (words, said)
        check_line(said[0])
    if status == 0 and "--json" in words:
        json.loads(out.getvalue(), parse_constant=_no_number)
    return status


def _no_number(name: str) -> float:
    raise AssertionError(f"{name} in JSON")


@pytest.mark.parametrize(("seed", "count"), [(2, 12), pytest.param(3, MANY // 10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", [t for t in TARGETS if t.commands], ids=lambda t: t.file)
def test_commands_on_inputs_near_good_ones(target: Target, seed: int, count: int, tmp_path: Path) -> None:
    path = tmp_path / target.file
    with Guard(tmp_path):
        for number in range(count):
            path.write_bytes(target.make(random.Random(f"{target.file} {seed} {number}")))
            words = {"{}": str(path), "{text}": path.read_bytes().decode("utf-8", "surrogateescape")}
            for command in target.commands:
                check_command([words.get(word, word) for word in command.split()])
    assert {p.name for p in tmp_path.iterdir()} <= {target.file, "out.parquet", "out.jsonl"}


@pytest.mark.parametrize(("seed", "count"), [(0, 60), pytest.param(1, MANY, marks=pytest.mark.slow)])
def test_command_lines_near_good_ones(seed: int, count: int, tmp_path: Path) -> None:
    with Guard(tmp_path, (Path("/etc/passwd"), Path("/dev/zero"))):  # the person at the terminal may name any file
        statuses = [check_command(command_line(random.Random(f"line {seed} {number}"))) for number in range(count)]
    assert not list(tmp_path.iterdir())
    assert statuses.count(0) > count // 100
