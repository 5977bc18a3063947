"""``prunesim sweep``: write a grid of predictions to a Parquet file."""

from __future__ import annotations

import os
from typing import Annotated

from simulator.cli import options, render
from simulator.cli.options import arg, opt

# fmt: off
Grid = Annotated[str, arg("GRID.yaml", "Axes: models, hardware, families, sparsities, phases, batches, seqs, ...")]
Output = Annotated[str, opt("--output -o", "FILE", "Parquet file; FILE.parts has finished parts during the sweep.")]
Where = Annotated[str | None, opt("--where", "TEXT", "Rows to keep, such as 'speedup > 1.3 and batch == 1'.")]
Jobs = Annotated[int | None, opt("--jobs", "N", "Processes on this machine. Default: one per core.")]
Most = Annotated[int, opt("--max", "N", "Largest number of configurations to accept.")]
# fmt: on


def command(
    grid: Grid,
    output: Output,
    where: Where = None,
    jobs: Jobs = None,
    most: Most = 100_000_000,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Predict every combination of a grid.

    Run the command again to resume a sweep that was stopped or killed. Prints the number of rows of the table.
    """
    from simulator.prediction.sweep import sweep

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = cores if jobs is None else jobs
    with render.progress("predicting") as report:
        done = sweep(grid, output, where=where, jobs=jobs, progress=report, most=most)
    row = {
        "file": str(done.target),
        "configurations": done.configurations,
        "rows": done.rows,
        "partitions": done.partitions,
        "resumed_partitions": done.resumed,
        "seconds": done.seconds,
        "notes": list(done.notes),
    }
    if render.Output(json).write([row]):
        again = f", {done.resumed} of {done.partitions} parts from an earlier run" if done.resumed else ""
        counts = f"{done.rows:,} rows of {done.configurations:,} configurations"
        print(f"{done.target}: {counts} in {render.seconds(done.seconds)}{again}")
        render.notes(done.notes, verbose)
