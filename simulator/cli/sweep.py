"""``prunesim sweep``: write a grid of predictions to a folder of Parquet files."""

from __future__ import annotations

import os
from typing import Annotated

from simulator.cli import options, render
from simulator.cli.options import arg, opt
from simulator.errors import InputError


# fmt: off
def command(
    grid: Annotated[str, arg("GRID.yaml", "Axes: models, hardware, families, sparsities, phases, batches, seqs, ...")],
    output: Annotated[str, opt("--output -o", "FOLDER", "Folder for Parquet files: one dataset.")],
    jobs: Annotated[int | None, opt("--jobs", "N", "Processes on this machine. Default: one per core.")] = None,
    scheduler: Annotated[str | None, opt(
        "--scheduler", "ADDRESS", "Compute on the workers of a Dask scheduler.")] = None,
    most: Annotated[int, opt("--max", "N", "Largest number of configurations to accept.")] = 100_000_000,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    # fmt: on
    """Predict every combination of a grid.

    Run the command again to resume a sweep that was stopped or killed. Prints the number of rows of the dataset.
    """
    from simulator.prediction.sweep import write_sweep

    if scheduler is not None and jobs is not None:
        raise InputError("--jobs and --scheduler: expected one of them")
    if jobs is None:
        jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with render.progress("predicting") as report:
        done = write_sweep(grid, output, jobs=jobs, scheduler=scheduler, progress=report, most=most)
    row = {
        "folder": str(done.target),
        "configurations": done.configurations,
        "rows": done.rows,
        "parts": done.parts,
        "resumed_parts": done.resumed,
        "seconds": done.seconds,
        "notes": list(done.notes),
    }
    if render.Output(json).write([row]):
        again = f", {done.resumed} of {done.parts} parts from an earlier run" if done.resumed else ""
        counts = f"{done.rows:,} rows of {done.configurations:,} configurations"
        print(f"{done.target}: {counts} in {render.seconds(done.seconds)}{again}")
        render.notes(done.notes, verbose)
