"""``prunesim sweep``: a grid of predictions into a Parquet file."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from simulator.cli import options, render

Grid = Annotated[
    str,
    typer.Argument(
        metavar="GRID.yaml", help="Axes: models, hardware, families, sparsities, phases, batches, seqs, ..."
    ),
]
Output = Annotated[
    str, typer.Option("--output", "-o", metavar="FILE", help="Parquet file; FILE.parts holds it while it grows.")
]
Where = Annotated[
    str | None, typer.Option("--where", metavar="TEXT", help="Rows to keep, as 'speedup > 1.3 and batch == 1'.")
]
Jobs = Annotated[
    int | None, typer.Option("--jobs", metavar="N", help="Processes on this machine; one a core if left out.")
]
Scheduler = Annotated[
    str | None, typer.Option("--scheduler", metavar="ADDRESS", help="Compute on a running Dask cluster.")
]
Most = Annotated[int, typer.Option("--max", metavar="N", help="Largest number of configurations to accept.")]


def command(
    grid: Grid,
    output: Output,
    where: Where = None,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
    most: Most = 100_000_000,
    json: options.Json = False,
) -> None:
    """Predict every combination of a grid.

    A sweep that was stopped or killed goes on with the same command. Prints how many rows the table has.
    """
    from simulator.predict.sweep import sweep

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with render.progress("predicting") as report:
        done = sweep(
            grid,
            output,
            where=where,
            jobs=cores if jobs is None else jobs,
            scheduler=scheduler,
            progress=report,
            most=most,
        )
    if json:
        print(
            render.json_lines(
                [
                    {
                        "file": str(done.target),
                        "configurations": done.configurations,
                        "rows": done.rows,
                        "partitions": done.partitions,
                        "resumed_partitions": done.resumed,
                        "seconds": done.seconds,
                        "notes": list(done.notes),
                    }
                ]
            )
        )
        return
    again = f", {done.resumed} of {done.partitions} parts found done" if done.resumed else ""
    print(
        f"{done.target}: {done.rows:,} rows of {done.configurations:,} configurations in {render.seconds(done.seconds)}{again}"
    )
    for line in done.notes:
        render.note(line)
