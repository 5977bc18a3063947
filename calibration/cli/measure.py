"""Measure a device into a run folder: the options and steps that several commands share."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.cli import render
from simulator.cli.options import opt
from simulator.errors import InputError

if TYPE_CHECKING:
    from calibration.measure.run import Outcome
    from calibration.runners.compare import ComparedCases
    from calibration.runners.runs import MeasuredRun

RESTARTS, MOST_RESTARTS = "PRUNESIM_RESTARTS", 3  # environment variable with the number of restarts so far, its limit
_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}

Folder = Annotated[str, opt("--output -o", "RUN", "Folder of the run; a run in an existing folder resumes.")]
Budget = Annotated[str, opt("--budget", "TIME", "Time for the measurement: 2min, 90s, 1h.")]
Dtype = Annotated[str, opt("--dtype", "NAME", "Number format of the run.")]
Hardware = Annotated[
    str, opt("--hardware", "NAME", "Profile with the datasheet. Default: found by the device's name, or measured.")
]
Threads = Annotated[
    int | None, opt("--threads", "N", "Threads of a CPU. Default: OMP_NUM_THREADS, else the CPUs of this process.")
]
Seed = Annotated[int, opt("--seed", "N", "Seed of the choice and order of the shapes.")]


def measured(
    device: str, output: str, measure: Callable[..., MeasuredRun], threads: int | None = None, **how: Any
) -> MeasuredRun:
    """Measure a device into a folder with progress; ``how`` are options of ``measure``."""
    from calibration.devices import open_device
    from calibration.runners.runs import check_folder

    check_folder(output)
    opened = open_device(device, threads=threads)
    try:
        with render.progress("measuring") as report:
            found = measure(output, opened, progress=report, note=render.status, **how)
    finally:
        opened.close()
    restart_if_needed(found.outcome, render.status)
    return found


def describe(outcome: Outcome) -> str:
    c = outcome.counts
    parts = [f"{c.timed + c.resumed} operators timed", f"{c.resumed} of them earlier" if c.resumed else ""]
    for name in ("noisy", "throttled", "skipped", "unsupported", "refused", "failed", "left"):
        if count := getattr(c, name):
            parts.append(f"{count} {name}")
    return f"{', '.join(filter(None, parts))} in {render.seconds(outcome.elapsed_s)}"


def outcome_row(found: MeasuredRun) -> dict[str, Any]:
    outcome = found.outcome
    row = {"planned": len(found.plan.items), "elapsed_s": outcome.elapsed_s, "stopped": outcome.stopped}
    return {**row, **asdict(outcome.counts), "problems": list(outcome.problems)}


def finish(outcome: Outcome, notes: Sequence[str] = (), verbose: bool = False) -> None:
    """Print why a run stopped early, ``notes`` and the problems of the run; exit with its status if it stopped."""
    stopped = () if outcome.complete else (f"stopped: {outcome.stopped}; run the command again to resume",)
    render.notes((*stopped, *notes, *outcome.problems), verbose)
    if stopped:
        raise typer.Exit(130 if outcome.stopped == "interrupted" else 1)


def restart_if_needed(outcome: Outcome | ComparedCases, note: Callable[[str], None]) -> None:
    """Restart this program if a run needs a new process (a failed capture of a CUDA graph spoils its process), which
    resumes from the records. Another program, such as a notebook, is not restarted."""
    script, done = Path(sys.argv[0]), os.environ.get(RESTARTS, "0")
    ours = script.stem == "prunesim" or script.parts[-3:] == ("simulator", "cli", "__main__.py")
    count = int(done) if done.isdecimal() else MOST_RESTARTS
    if not outcome.needs_new_process or count >= MOST_RESTARTS or not ours:
        return
    note(f"{outcome.stopped}; resuming in a new process")
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[RESTARTS] = str(count + 1)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def seconds(option: str, text: str) -> float:
    """Return the seconds of a time such as "2min", "90s" or "0.5h"; a number without unit is in seconds."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text.lower())
    if match is None or (match[2] or "s") not in _SECONDS:
        raise InputError(f"{option}: expected a time such as 2min, 90s or 1h, got {text!r}")
    value = float(match[1]) * _SECONDS[match[2] or "s"]
    if value <= 0.0:
        raise InputError(f"{option}: expected a time above zero, such as 2min, got {text!r}")
    return value
