"""Measure a device into a run folder: the options and steps that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibration.cli.restart import restart_if_needed
from simulator.cli import render
from simulator.cli.options import opt

if TYPE_CHECKING:
    from calibration.measure.run import Outcome
    from calibration.runners.runs import MeasuredRun

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
    """Open a device, measure it into a folder with progress, and close it; ``how`` are options of ``measure``."""
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
    """Return the counts of a run on one line."""
    c = outcome.counts
    parts = [f"{c.timed + c.resumed} operators timed", f"{c.resumed} of them earlier" if c.resumed else ""]
    for name in ("noisy", "throttled", "skipped", "unsupported", "refused", "failed", "left"):
        if count := getattr(c, name):
            parts.append(f"{count} {name}")
    return f"{', '.join(filter(None, parts))} in {render.seconds(outcome.elapsed_s)}"


def outcome_row(found: MeasuredRun) -> dict[str, Any]:
    """Return the outcome of a run as plain data."""
    outcome = found.outcome
    return {
        "planned": len(found.plan.items),
        "elapsed_s": outcome.elapsed_s,
        "stopped": outcome.stopped,
        **asdict(outcome.counts),
        "problems": list(outcome.problems),
    }


def finish(outcome: Outcome, notes: Sequence[str] = (), verbose: bool = False) -> None:
    """Print why a run stopped early, ``notes`` and the problems of the run; exit with its status if it stopped."""
    stopped = () if outcome.complete else (f"stopped: {outcome.stopped}; run the command again to resume",)
    render.notes((*stopped, *notes, *outcome.problems), verbose)
    if stopped:
        raise typer.Exit(130 if outcome.stopped == "interrupted" else 1)
