"""``kill -9`` at random moments, again and again: nothing acknowledged is lost or doubled, what
goes on ends as a run that nobody killed, and no temporary file stays.

``PRUNESIM_KILLS=30 pytest -m slow tests/cli/test_kills.py -s`` for thirty kills of each command.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from grids import GRID

from calibration.records.store import decode_line, read_store
from simulator.hardware.library import load_hardware

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")]

KILLS = int(os.environ.get("PRUNESIM_KILLS", "2"))
IN_A_ROW = 5
"""Kills before a run may end."""

ROOT = Path(__file__).resolve().parents[2]


def started(folder: Path, line: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "simulator.cli", *line.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        words, cwd=folder, env=environment, stdout=quiet, stderr=subprocess.PIPE, text=True
    )


def finished(folder: Path, line: str, *statuses: int) -> float:
    """How long the whole run takes, s; it ends with one of the statuses (default: 0)."""
    began = time.monotonic()
    with started(folder, line) as process:
        _, said = process.communicate(timeout=170)
    assert process.returncode in (statuses or (0,)), said
    return time.monotonic() - began


def killed(folder: Path, line: str, after_s: float) -> bool:
    """Whether a run was still under way when it was killed."""
    with started(folder, line) as process:
        time.sleep(after_s)
        process.kill()
        process.communicate()
    return process.returncode == -9


def temporary(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_kills_of_a_sweep(tmp_path: Path) -> None:
    """With workers; after a part, and on a cluster: tests/prediction/test_sweep.py."""
    pytest.importorskip("pyarrow")
    (tmp_path / "grid.yaml").write_text(GRID)
    line, out = "sweep grid.yaml -o out --jobs 2", tmp_path / "out"
    took_s = finished(tmp_path, line)
    clean = {path.name: path.read_bytes() for path in out.iterdir()}
    rng, many, left_behind = random.Random(2), 0, 0
    while many < -(-KILLS // 2):
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(min(IN_A_ROW, KILLS)):
            many += killed(tmp_path, line, rng.uniform(0.3, took_s))
            left_behind += len(temporary(tmp_path))
        assert all(path.read_bytes() == clean[path.name] for path in out.glob("part-*.parquet"))
        finished(tmp_path, line)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == clean
    print(f"sweep: {many} killed, {left_behind} temporary files left by kills, none at the end")


def test_kills_of_a_calibration(tmp_path: Path) -> None:
    line = "calibrate replay:planted --budget 20s -o {}"
    # 1: so short a run ends in a verdict against it
    took_s = finished(tmp_path, line.format("clean"), 0, 1)
    clean = keys(tmp_path / "clean")
    rng, many, left_behind, records = random.Random(3), 0, 0, 0
    for round_ in range(KILLS):
        if many >= KILLS:
            break
        folder, acknowledged = tmp_path / f"run{round_}", b""
        for _ in range(min(IN_A_ROW, KILLS)):
            many += killed(tmp_path, line.format(folder.name), rng.uniform(0.3, took_s))
            left_behind += len(temporary(tmp_path))
            acknowledged = still_there(folder, acknowledged)
        finished(tmp_path, line.format(folder.name), 0, 1)
        still_there(folder, acknowledged)
        # spare operators, which fill the budget, depend on the time that kills took
        found = keys(folder)
        assert max(found.values()) == 1
        assert {*list(clean)[: len(clean) // 2]} <= {*found}
        assert len(found) >= 0.9 * len(clean)
        assert not temporary(tmp_path)
        assert load_hardware(folder / "profile.yaml").section("gemm", "bf16").status == "calibrated"
        assert names(folder) == names(tmp_path / "clean")
        records += acknowledged.count(b"\n")
    print(f"calibrate: {many} killed, {left_behind} temporary files left by kills, none at the end")
    print(
        f"{records} records acknowledged before the last kill of each folder: all kept, none"
        " doubled"
    )


def still_there(folder: Path, before: bytes) -> bytes:
    """The whole lines of the records, which begin with those that were there before."""
    path = folder / "records.jsonl"
    now = path.read_bytes() if path.exists() else b""
    now = now[: now.rfind(b"\n") + 1]
    assert now.startswith(before)
    assert all(decode_line(text) for text in now.splitlines())
    return now


def keys(folder: Path) -> Counter[tuple[str, str]]:
    """Operators that were measured, by purpose, and how often; drift checks, which every run
    repeats, excluded."""
    rows = read_store(folder / "records.jsonl").rows
    return Counter(
        (row["key"], row["purpose"])
        for row in rows
        if row["purpose"] not in ("drift_check", "sustained")
    )


def names(folder: Path) -> set[str]:
    """Files, without the digest in the name of the arrays."""
    return {
        ".".join(part for part in path.name.split(".") if len(part) != 12)
        for path in folder.iterdir()
    }
