"""Sweeps: the product of models, devices, families, sparsities, phases, batches, lengths, formats and runtimes as one table.

Use :func:`sweep` for a Parquet file of any size and :func:`sweep_columns` for arrays in memory. A grid is cut into partitions of bounded
memory; each becomes one part of the table, whichever process or machine computes it, and is written by the calling process alone. So a
sweep that is killed goes on where it was, and the table does not depend on how many workers there were.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from simulator._version import __version__
from simulator.errors import InputError
from simulator.files.parquet import load_pyarrow
from simulator.hardware.library import load_hardware
from simulator.models.library import load_model
from simulator.predict.grid import Grid, grid_facts, read_grid
from simulator.predict.rows import COLUMNS, Columns, Partition, Text, empty_columns, partition_columns, partitions
from simulator.predict.store import NOTES_KEY, Store, check_room
from simulator.predict.where import Filter, parse_filter

MOST_CONFIGURATIONS = 100_000_000
"""Largest grid unless told otherwise."""

BYTES_PER_ROW = 120.0
"""Disk a configuration takes while a table is put together: about 50 B in a part and as much again in the file, with a margin."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """A sweep as a worker needs it: small, and the same wherever it is sent."""

    grid: Grid
    where: str | None = None


@dataclass(frozen=True)
class Summary:
    """What a sweep did.

    Attributes
    ----------
    target : Path
    configurations, rows : int
        In the grid; in the table, after the filter and without what is not supported.
    resumed : int
        Partitions found done.
    partitions : int
    seconds : float
    notes : tuple of str
        What was left out, one line a reason.
    """

    target: Path
    configurations: int
    rows: int
    resumed: int
    partitions: int
    seconds: float
    notes: tuple[str, ...]


def sweep(
    grid: Grid | str | Path,
    out: str | Path,
    *,
    where: str | None = None,
    jobs: int = 1,
    scheduler: str | None = None,
    progress: Progress | None = None,
    most: int = MOST_CONFIGURATIONS,
) -> Summary:
    """Predict every combination of a grid into a Parquet file.

    Parameters
    ----------
    grid : Grid, str or Path
        A grid or the YAML file of one.
    out : str or Path
        The file. While it grows there is a folder ``OUT.parts`` beside it; the same call takes up the parts it finds there.
    where : str, optional
        Rows to keep, such as ``speedup > 1.3 and batch == 1``; see :mod:`simulator.predict.where`.
    jobs : int
        Processes on this machine, at least 1.
    scheduler : str, optional
        Address of a running Dask scheduler; its workers compute instead.
    progress : callable, optional
        Called with configurations done and in all.
    most : int
        Largest grid to accept.

    Returns
    -------
    Summary

    Raises
    ------
    InputError
        Before any work, for a bad grid, filter, target or address, and for a grid too large for the disk.
    """
    began = time.monotonic()
    chosen = grid if isinstance(grid, Grid) else read_grid(grid)
    plan = Plan(chosen, where)
    _condition(where)
    if jobs < 1:
        raise InputError(f"jobs {jobs}: expected a whole number from 1")
    if chosen.size > most:
        raise InputError(
            f"the grid has {chosen.size:,} configurations, more than {most:,} (--max); take a smaller grid"
        )
    load_pyarrow()
    pieces = list(partitions(chosen))
    store = Store(Path(out), digest(plan), len(pieces))
    if store.finished():
        store.clear()
        return Summary(
            store.target, chosen.size, _rows(store.target), len(pieces), len(pieces), time.monotonic() - began, ()
        )
    with store.opened({"version": __version__, "where": where, "grid": dict(grid_facts(chosen))}) as there:
        todo = [i for i in range(len(pieces)) if i not in there]
        check_room(store.target, BYTES_PER_ROW * chosen.size * (0.5 + 0.5 * len(todo) / len(pieces)))
        sizes = [_size(chosen, piece) for piece in pieces]
        done = sum(sizes[i] for i in there)
        if progress is not None and there:
            progress(done, chosen.size)
        for index, content in _compute(plan, todo, min(jobs, max(1, len(todo))), scheduler):
            store.put(index, content)
            done += sizes[index]
            if progress is not None:
                progress(done, chosen.size)
        rows, notes = store.assemble()
    return Summary(store.target, chosen.size, rows, len(there), len(pieces), time.monotonic() - began, _lines(notes))


def sweep_columns(grid: Grid, where: str | None = None) -> tuple[Columns, tuple[str, ...]]:
    """A grid's rows as arrays in memory, texts as object arrays; and what was left out.

    Examples
    --------
    >>> from simulator.predict.grid import FamilyChoice
    >>> grid = Grid(("llama-3.1-8b",), ("h100",), (0.25, 0.5), ("decode",), (1, 8), (2048,), families=(FamilyChoice("depth"),))
    >>> columns, notes = sweep_columns(grid, "sparsity > 0.3")
    >>> columns["batch"].tolist(), columns["realised_sparsity"].tolist(), notes
    ([1, 8], [0.5, 0.5], ())
    """
    found: list[Columns] = []
    notes: dict[str, list[float]] = {}
    for piece in partitions(grid):
        columns, why = _kept(grid, where, piece)
        found.append(columns)
        for reason, at in why.items():
            notes.setdefault(reason, []).extend(at)
    return {name: np.concatenate([_plain(columns[name]) for columns in found]) for name in COLUMNS}, _lines(notes)


def compute_part(plan: Plan, index: int) -> bytes:
    """One partition of a sweep as a Parquet file in memory; the same bytes wherever it runs."""
    grid = plan.grid
    columns, notes = _kept(grid, plan.where, _pieces(grid)[index])
    pyarrow, parquet = load_pyarrow()
    types = {str: pyarrow.string(), float: pyarrow.float64(), int: pyarrow.int64(), bool: pyarrow.bool_()}
    schema = pyarrow.schema(
        [(name, types[kind]) for name, kind in COLUMNS.items()], {NOTES_KEY: json.dumps(notes).encode()}
    )
    arrays = []
    for name, kind in COLUMNS.items():
        column = columns[name]
        if isinstance(column, Text):
            values = pyarrow.array(column.values, pyarrow.string())
            arrays.append(pyarrow.DictionaryArray.from_arrays(column.codes, values).dictionary_decode())
        else:
            arrays.append(pyarrow.array(column, types[kind], from_pandas=True))  # NaN: not known
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), sink, compression="zstd", compression_level=1)
    return bytes(sink.getvalue())


def digest(plan: Plan) -> str:
    """Digest of everything a table follows from: grid, filter, version, models and the files of the profiles."""
    sha = hashlib.sha256(
        json.dumps([__version__, plan.where, dict(grid_facts(plan.grid))], sort_keys=True, default=str).encode()
    )
    for name in plan.grid.models:
        sha.update(repr(load_model(name)).encode())
    for name in plan.grid.hardware:
        path = load_hardware(name).path
        for file in sorted(path.parent.glob(f"{path.stem}.*")) if path is not None else ():
            sha.update(file.name.encode() + b"\0" + file.read_bytes())
    return sha.hexdigest()


# -- parts ------------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _pieces(grid: Grid) -> tuple[Partition, ...]:
    return tuple(partitions(grid))


@lru_cache(maxsize=8)
def _condition(where: str | None) -> Filter | None:
    return None if where is None else parse_filter(where, COLUMNS)


def _kept(grid: Grid, where: str | None, piece: Partition) -> tuple[Columns, Mapping[str, list[float]]]:
    """Columns of a partition after the filter."""
    columns, notes = partition_columns(grid, piece)
    condition = _condition(where)
    if condition is not None:
        mask = condition.mask(lambda name: _plain(columns[name]), len(columns["speedup"]))
        columns = {name: column[mask] for name, column in columns.items()} if len(mask) else empty_columns()
    return columns, notes


def _lines(notes: Mapping[str, list[float]]) -> tuple[str, ...]:
    """One line a reason, with the sparsities it holds for; few of many."""
    out = []
    for reason, at in notes.items():
        values = [f"{s:g}" for s in sorted(set(at))]
        shown = values if len(values) <= 8 else [*values[:4], "...", values[-1]]
        out.append(f"{reason}: left out at sparsity {', '.join(shown)}")
    return tuple(out)


def _plain(column: Any) -> Any:
    return column.array if isinstance(column, Text) else column


def _size(grid: Grid, piece: Partition) -> int:
    return len(piece.shapes) * len(piece.choices) * len(grid.hardware) * len(grid.runtimes)


def _rows(path: Path) -> int:
    return int(load_pyarrow()[1].read_metadata(path).num_rows)


def _compute(plan: Plan, todo: list[int], jobs: int, scheduler: str | None) -> Iterator[tuple[int, bytes]]:
    """Parts as they come, from a cluster, from processes of this machine, or from this one."""
    if scheduler is not None:
        from simulator.predict.dask import compute_on

        yield from compute_on(scheduler, plan, todo)
    elif jobs == 1:
        for index in todo:
            yield index, compute_part(plan, index)
    else:
        # spawned: a forked child would inherit the locks of threads it does not have
        with ProcessPoolExecutor(
            jobs, mp_context=get_context("spawn"), initializer=_follow, initargs=(os.getpid(),)
        ) as pool:
            try:
                yield from windowed(lambda index: pool.submit(compute_part, plan, index), todo, 2 * jobs)
            except BrokenExecutor as error:
                raise OSError(
                    "a worker process ended before its time, perhaps for want of memory; the same command goes on"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def windowed(submit: Callable[[int], Future[bytes]], todo: Iterable[int], many: int) -> Iterator[tuple[int, bytes]]:
    """Results of tasks as they finish, never more than so many under way: their bytes are the only thing that adds up."""
    waiting = iter(todo)
    under_way: dict[Future[bytes], int] = {}
    while True:
        for index in waiting:
            under_way[submit(index)] = index
            if len(under_way) >= many:
                break
        if not under_way:
            return
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            yield under_way.pop(future), future.result()


def _follow(parent: int) -> None:
    """End this worker when the process that started it is gone, whatever killed that."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent answers it and ends this process
    threading.Thread(target=watch, daemon=True).start()
