"""Predict every combination of a grid, in memory or into a folder of Parquet files.

A grid is cut into pieces of bounded memory. This process, worker processes or a Dask cluster compute the pieces. Only
the calling process writes: when a piece is computed, it becomes one file of the dataset.
"""

from __future__ import annotations

import contextlib
import copyreg
import itertools
import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from simulator._version import __version__
from simulator.errors import InputError, needs_extra, one_line
from simulator.files.parquet import load_pyarrow
from simulator.files.write import check_target, one_writer, remove_left, write_whole
from simulator.hardware.library import load_hardware
from simulator.models.library import load_model
from simulator.prediction.compare import request_results
from simulator.prediction.grid import Grid, Piece, read_grid
from simulator.prediction.prunings import Excluded, exclude, excluded_lines
from simulator.prediction.result import COLUMNS, Results, plain

if TYPE_CHECKING:
    import pandas

MOST_CONFIGURATIONS = 100_000_000  # largest grid by default
NOTED = 8  # sparsities that a note lists at most
CHECK_S = 2.0  # between checks of the workers while no piece is finished
REACH_S = 10.0  # to reach a Dask scheduler
STAMP_KEY, NOTES_KEY = b"prunesim.part", b"prunesim.notes"  # metadata of a part: its stamp; sparsities by exclusion
PART_NAME = re.compile(r"part-\d{8}\.parquet")
ADDRESS = re.compile(r"(tcp://)?(\[[0-9a-f:.]+\]|[^][/:\s]+):\d+")

# loaded profiles contain read-only mappings, which pickle does not know
copyreg.pickle(MappingProxyType, lambda mapping: (_read_only, (dict(mapping),)))


def _read_only(mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(mapping)


@dataclass(frozen=True)
class Summary:
    target: Path  # folder of the parts
    configurations: int  # in the grid
    rows: int  # supported configurations
    parts: int
    resumed: int  # parts of an earlier run
    seconds: float
    notes: tuple[str, ...]  # exclusions, one line per reason


def sweep(
    grid: Grid | str | Path, out: str | Path | None = None, *, jobs: int = 1, scheduler: str | None = None
) -> pandas.DataFrame:
    """Predict every combination of a grid, and return the rows.

    Parameters
    ----------
    grid : Grid, str or path
        The grid, or the YAML file with it (:func:`simulator.prediction.grid.read_grid`).
    out : str or path, optional
        Folder for Parquet files; the same call resumes a sweep that was stopped.
    jobs : int
        Processes on this machine; used with ``out`` only.
    scheduler : str, optional
        Address of a Dask scheduler, whose workers replace the processes.

    Returns
    -------
    pandas.DataFrame
        One row per prediction, with the fields of :class:`simulator.Result` as columns; ``attrs["notes"]`` lists
        exclusions.

    Raises
    ------
    InputError
        For an invalid grid or folder, and without pandas (extra "tables").

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
        found = sweep_results(grid if isinstance(grid, Grid) else read_grid(grid))
        frame, notes = found.to_pandas(), found.notes
    else:
        done = write_sweep(grid, out, jobs=jobs, scheduler=scheduler)
        frame, notes = pandas.read_parquet(done.target), done.notes
    frame.attrs["notes"] = list(notes)
    return frame


def sweep_results(grid: Grid, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Results:
    """Return the rows of a grid, with notes on exclusions. ``progress`` is called with pieces done and their number."""
    excluded, found, todo = Excluded(), [], list(grid.pieces())
    for done, piece in enumerate(todo, start=1):
        found.append(piece_results(piece, grid.hardware, excluded))
        progress(done, len(todo))
    return Results.join(found, excluded_lines(excluded, NOTED))


def write_sweep(
    grid: Grid | str | Path,
    out: str | Path,
    *,
    jobs: int = 1,
    scheduler: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    most: int = MOST_CONFIGURATIONS,
) -> Summary:
    """Write the rows of a grid into a folder of Parquet files, one per piece; a rerun computes the missing ones.

    Parts of another grid, version or profile are replaced; a folder with other files is refused. A second sweep into
    the folder waits for the first. ``progress`` is called with configurations done and their number."""
    began, folder = time.monotonic(), Path(out)
    grid = grid if isinstance(grid, Grid) else read_grid(grid)
    size, own, hardware = grid.size, grid.digest(), grid.hardware
    if jobs < 1:
        raise InputError(f"jobs {jobs}: expected a whole number from 1")
    if size > most:
        raise InputError(f"the grid has {size:,} configurations, more than {most:,} (--max); take a smaller grid")
    _check_folder(folder)
    if scheduler is not None:  # its workers may lack the files of models and profiles
        hardware = tuple(map(load_hardware, hardware))
        grid = replace(grid, models=tuple(map(load_model, grid.models)))
    every = list(grid.pieces())
    sizes = [len(requests) * len(prunings) * len(hardware) for requests, prunings in every]
    paths = [folder / f"part-{index:08d}.parquet" for index in range(len(every))]
    folder.mkdir(exist_ok=True)
    try:
        with one_writer(folder):
            remove_left(folder, "*")
            stale = sorted(set(folder.glob("part-*")) - {path for i, path in enumerate(paths) if _read(path, own, i)})
            for path in stale:
                path.unlink()
            todo = {i: piece for i, piece in enumerate(every) if not paths[i].exists()}
            done = size - sum(sizes[i] for i in todo)
            if done:
                progress(done, size)
            with contextlib.closing(computed(todo, own, hardware, jobs, scheduler)) as contents:
                for i, content in contents:
                    write_whole(paths[i], content)
                    done += sizes[i]
                    progress(done, size)
            found = [_read(path, own, i) for i, path in enumerate(paths)]
    finally:
        with contextlib.suppress(OSError):  # not empty: there are finished parts
            folder.rmdir()
    excluded = Excluded()
    for path, part in zip(paths, found):
        if part is None:
            raise OSError(f"{path}: changed while the sweep ran; run the same command again")
        for reason, at in part[1].items():
            excluded.setdefault(reason, []).extend(at)
    replaced = f"{folder}: parts of another grid, version or profile were replaced: {len(stale)}"
    notes = (*([replaced] if stale else []), *excluded_lines(excluded, NOTED))
    rows, resumed = sum(part[0] for part in found if part), len(paths) - len(todo)
    return Summary(folder, size, rows, len(paths), resumed, time.monotonic() - began, notes)


def _check_folder(folder: Path) -> None:
    """Raise InputError for a path that is not a folder, and for a folder that holds other files than parts."""
    load_pyarrow()
    if folder.suffix == ".csv":
        raise InputError(f"{folder}: expected the name of a folder for Parquet files; pandas writes CSV from it")
    if not folder.is_dir() and check_target(folder).exists():
        raise InputError(f"{folder}: is a file, as version 0.3 wrote; expected a folder: name another or remove it")
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.name.startswith((".", "_")) and not (PART_NAME.fullmatch(path.name) and path.is_file()):
            raise InputError(f"{folder}: holds {path.name}, which is not a part of a sweep; name another folder")


def _read(path: Path, grid: str, index: int) -> tuple[int, Excluded] | None:
    """Return rows and excluded sparsities of a part of a grid (its digest); None for another or a damaged part."""
    pyarrow, parquet = load_pyarrow()
    try:
        about = parquet.read_metadata(path)
        own = about.metadata or {}
        return (about.num_rows, json.loads(own[NOTES_KEY])) if own[STAMP_KEY] == f"{grid} {index}".encode() else None
    except (OSError, ValueError, KeyError, pyarrow.ArrowException):
        return None


def piece_results(piece: Piece, hardware: Sequence[Any], excluded: Excluded) -> Results:
    """Return the rows of a piece; exclusions go to ``excluded``."""
    requests, prunings = piece

    def reject(pruning: int | None, reason: str, device: str) -> None:
        if pruning is not None:
            exclude(excluded, prunings[pruning], reason, device)

    return request_results(requests, prunings, [load_hardware(h) for h in hardware], reject)


def compute_part(hardware: Sequence[Any], piece: Piece, grid: str, index: int) -> bytes:
    """Return a piece of a grid (its digest) as a Parquet file in memory, with the same bytes in every process."""
    if (wanted := grid.split()[0]) != __version__:
        raise InputError(f"worker: expected version {wanted} of prunesim, got {__version__}")
    pyarrow, parquet = load_pyarrow()
    excluded = Excluded()
    columns = piece_results(piece, hardware, excluded).columns
    types = {str: pyarrow.string(), float: pyarrow.float64(), int: pyarrow.int64(), bool: pyarrow.bool_()}
    own = {STAMP_KEY: f"{grid} {index}".encode(), NOTES_KEY: json.dumps(excluded)}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in COLUMNS.items()], own)
    # NaN becomes null
    arrays = [pyarrow.array(plain(columns[name]), types[kind], from_pandas=True) for name, kind in COLUMNS.items()]
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_arrays(arrays, schema=schema)
    parquet.write_table(table, sink, compression="zstd", compression_level=1)
    return bytes(sink.getvalue())


def computed(
    todo: Mapping[int, Piece], grid: str, hardware: Sequence[Any], jobs: int = 1, scheduler: str | None = None
) -> Generator[tuple[int, bytes], None, None]:
    """Yield the index and the content of each part as it is finished."""
    jobs = min(jobs, len(todo))
    if not todo or (scheduler is None and jobs == 1):
        yield from ((index, compute_part(hardware, piece, grid, index)) for index, piece in todo.items())
        return
    waiting, under_way = iter(todo.items()), dict[Future[bytes], int]()
    with _processes(jobs, hardware) if scheduler is None else _dask(scheduler, hardware) as (submit, many, there, lost):
        try:
            while True:
                # few at once, so that their results fit into memory
                for index, piece in itertools.islice(waiting, many - len(under_way)):
                    under_way[submit(compute_part, there, piece, grid, index)] = index
                if not under_way:
                    return
                finished = wait(under_way, CHECK_S, FIRST_COMPLETED).done
                if not finished and lost():
                    raise BrokenExecutor("a worker was lost")
                for task in finished:
                    content = task.result()
                    yield under_way.pop(task), content
        except Exception as error:
            for task, index in under_way.items():  # finished before the failure
                if task.done() and not task.cancelled() and task.exception() is None:
                    yield index, task.result()
            if isinstance(error, InputError) or not (scheduler or isinstance(error, BrokenExecutor)):
                raise
            what = f"scheduler {scheduler}: a task failed" if scheduler else "a worker process ended early"
            why = one_line(repr(error), 200)
            raise OSError(f"{what} ({why}); finished parts are kept: run the same command again") from None


Workers = Iterator[tuple[Callable[..., Future[bytes]], int, Any, Callable[[], bool]]]
"""``submit`` of an executor, most tasks under way, the devices as an argument, whether a task may never finish."""


@contextlib.contextmanager
def _processes(jobs: int, hardware: Any) -> Workers:
    others, started = set(active_children()), set[Any]()
    # spawned: a forked child would inherit the locks of threads that it does not have
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _follow, (os.getpid(),))

    def submit(*task: Any) -> Future[bytes]:
        # a worker that starts now inherits the mask: Ctrl-C is for this process alone
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.submit(*task)
        finally:
            started.update(set(active_children()) - others)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield submit, 2 * jobs, hardware, lambda: any(worker.exitcode is not None for worker in started)
    except BaseException:
        for worker in started:
            worker.kill()
        # the pool would wait for the rest of a result that a worker was writing, as long as this end is open
        pool._result_queue._writer.close()  # type: ignore[attr-defined]
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _follow(parent: int) -> None:
    """End this worker when its parent process has ended for any reason."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _dask(address: str, hardware: Any) -> Workers:
    try:
        import distributed
    except ImportError:
        raise needs_extra("--scheduler", "distributed", "distributed") from None
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # a lost scheduler would be a traceback
    try:
        if not ADDRESS.fullmatch(address):
            raise ValueError("tcp://HOST:PORT")
        distributed.comm.resolve_address(address)  # Client takes long for an unknown host
        client: Any = distributed.Client(address, timeout=REACH_S, set_as_default=False)
    except (OSError, ValueError, distributed.TimeoutError) as error:
        reason = f"expected the address of a running Dask scheduler ({one_line(str(error), 200)})"
        raise InputError(f"--scheduler {address}: {reason}") from None
    with client:
        if not (threads := sum(client.nthreads().values())):
            raise InputError(f"--scheduler {address}: the cluster has no worker; start workers and try again")
        # every worker has the devices; tasks are cancelled when the last one with them is lost
        there = client.scatter(hardware, broadcast=True, hash=False)
        yield client.get_executor(pure=False).submit, 2 * threads, there, lambda: False
