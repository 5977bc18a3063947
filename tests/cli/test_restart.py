"""The program starts itself again after a failed capture or a lost device, a few times, and never
another program."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest

from calibration.cli.calibrate import MOST_RESTARTS, RESTARTS, restart_if_needed
from calibration.measure.run import Counts, Outcome

pytestmark = pytest.mark.quick

SPOILED = Outcome(Counts(), 1.0, "capture failed: gemm: not capturable", ())
ARGUMENTS = ["calibrate", "cuda", "-o", "RUN"]


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines that would have replaced this process."""
    found: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: found.append(arguments))
    monkeypatch.setattr(sys, "argv", ["/usr/bin/prunesim", *ARGUMENTS])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "/usr/bin/prunesim", *ARGUMENTS])
    monkeypatch.setenv(RESTARTS, "0")
    return found


def test_a_spoiled_process_is_replaced_by_the_same_command_a_few_times(
    executed: list[list[str]],
) -> None:
    notes: list[str] = []
    for _ in range(MOST_RESTARTS + 2):
        restart_if_needed(SPOILED, notes.append)
    assert executed == [[sys.executable, "/usr/bin/prunesim", *ARGUMENTS]] * MOST_RESTARTS
    assert (
        notes == ["capture failed: gemm: not capturable; resuming in a new process"] * MOST_RESTARTS
    )


@pytest.mark.parametrize("program", ["/usr/bin/pytest", "", "notebook.py"])
def test_another_program_is_not_restarted(
    executed: list[list[str]], program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    restart_if_needed(SPOILED, lambda text: None)
    assert executed == []


def test_other_ends_of_a_run_are_final(
    executed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/lib/simulator/cli/__main__.py"])
    for stopped in ("", "budget", "interrupted"):
        restart_if_needed(replace(SPOILED, stopped=stopped), lambda text: None)
    assert executed == []
    restart_if_needed(SPOILED, lambda text: None)
    restart_if_needed(
        replace(SPOILED, stopped="device lost: CUDA error: an illegal memory access"),
        lambda text: None,
    )
    assert len(executed) == 2
