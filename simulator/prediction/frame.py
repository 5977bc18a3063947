"""Sweep a grid into a data frame: :func:`sweep`, the command ``prunesim sweep`` in Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from simulator.errors import needs_extra
from simulator.prediction import sweep as sweeps
from simulator.prediction.grid import Grid, read_grid

if TYPE_CHECKING:
    import pandas


def sweep(
    grid: Grid | str | Path, out: str | Path | None = None, *, where: str | None = None, jobs: int = 1
) -> pandas.DataFrame:
    """Predict every combination of a grid, and return the rows.

    Parameters
    ----------
    grid : Grid, str or path
        The grid, or the YAML file with it (:func:`simulator.prediction.grid.read_grid`).
    out : str or path, optional
        Parquet file to write; the same call resumes a sweep that was stopped. Needed for more rows than fit in memory.
    where : str, optional
        Rows to keep, such as ``speedup > 1.3 and batch == 1``.
    jobs : int
        Processes on this machine; used with ``out`` only.

    Returns
    -------
    pandas.DataFrame
        One row per prediction, with the fields of :class:`simulator.Result` as columns; ``attrs["notes"]`` lists
        exclusions.

    Raises
    ------
    InputError
        For an invalid grid, filter or target, and without pandas (extra "tables").

    Examples
    --------
    >>> from simulator.prediction.grid import Grid
    >>> grid = Grid(("llama-3.1-8b",), ("h100",), (), ("decode",), (1, 8), (2048,), prune=("width mlp=0.3 heads=0.2",))
    >>> sweep(grid)["batch"].tolist()
    [1, 8]
    """
    try:
        import pandas
    except ImportError:
        raise needs_extra("a data frame", "tables", "pandas") from None
    if out is None:
        found = sweeps.sweep_results(grid if isinstance(grid, Grid) else read_grid(grid), where)
        frame, notes = found.to_pandas(), found.notes
    else:
        done = sweeps.sweep(grid, out, where=where, jobs=jobs)
        frame, notes = pandas.read_parquet(done.target), done.notes
    frame.attrs["notes"] = list(notes)
    return frame
