"""Predict the product of models, devices, families, sparsities, phases, batches, lengths, formats and engines.

Use :func:`sweep` for a Parquet file of any size and :func:`sweep_results` for rows in memory. A grid is cut into pieces
of bounded memory. Any process can compute a piece; only the calling process writes it, as one part of the table. A
killed sweep therefore resumes, and the table does not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from simulator._version import __version__
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.files.parquet import load_pyarrow
from simulator.hardware.library import files_of, load_hardware
from simulator.models.library import load_model
from simulator.models.lower import DECODE_LENGTHS
from simulator.prediction.compare import scenario_results
from simulator.prediction.grid import Grid, read_grid
from simulator.prediction.labels import Labels, plain
from simulator.prediction.prunings import Excluded, Pruning, exclude, excluded_lines
from simulator.prediction.result import COLUMNS, Results
from simulator.prediction.scenario import Scenario
from simulator.prediction.store import NOTES_KEY, STAMP_KEY, TableStore, check_room, stamp
from simulator.prediction.where import Filter, parse_filter
from simulator.prediction.workers import compute_parts

T = TypeVar("T")

MOST_CONFIGURATIONS = 100_000_000  # largest grid by default
PART_ROWS = 40_000  # configurations of a piece, about: a few megabytes of table
OPERATOR_ROWS = 120_000  # operators of a piece, about: 25 MB of columns, 100 MB during computation
REQUESTS = 64  # (batch, seq) pruned together
NOTED = 8  # sparsities that a note lists at most

BYTES_PER_ROW = 120.0  # disk while parts are joined: about 50 B in a part, 50 B in the file, and a margin


@dataclass(frozen=True)
class Summary:
    """Outcome of a sweep."""

    target: Path
    configurations: int  # in the grid
    rows: int  # in the table: supported, and selected by the filter
    resumed: int  # partitions of an earlier run
    partitions: int
    seconds: float
    notes: tuple[str, ...]  # exclusions, one line per reason


def sweep(
    grid: Grid | str | Path,
    out: str | Path,
    *,
    where: str | None = None,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
    most: int = MOST_CONFIGURATIONS,
) -> Summary:
    """Predict every combination of a grid, or of the grid in a YAML file, into a Parquet file.

    The folder ``OUT.parts`` next to the file holds finished parts; the same call resumes from these parts. Raises
    InputError before any work for an invalid grid, filter or target, or a grid too large for the disk.

    Parameters
    ----------
    where : str, optional
        Rows to keep, such as ``speedup > 1.3 and batch == 1``; see :mod:`simulator.prediction.where`.
    jobs : int
        Processes on this machine.
    progress : callable, optional
        Called with configurations done and their number.
    most : int
        Largest number of configurations to accept.
    """
    began = time.monotonic()
    grid = grid if isinstance(grid, Grid) else read_grid(grid)
    report = progress or (lambda done, of: None)
    _condition(where)
    if jobs < 1:
        raise InputError(f"jobs {jobs}: expected a whole number from 1")
    if grid.size > most:
        raise InputError(f"the grid has {grid.size:,} configurations, more than {most:,} (--max); take a smaller grid")
    _, parquet = load_pyarrow()
    sizes = [len(one.shapes) * len(prunings) * len(grid.hardware) for one, prunings in pieces(grid)]
    store = TableStore(Path(out), digest(grid, where), len(sizes))
    excluded = Excluded()
    if store.finished():
        store.clear()
        resumed, rows = len(sizes), int(parquet.read_metadata(store.target).num_rows)
    else:
        with store.opened({"version": __version__, "where": where, "grid": grid.facts()}) as there:
            todo, resumed = [i for i in range(len(sizes)) if i not in there], len(there)
            check_room(store.target, BYTES_PER_ROW * grid.size * (0.5 + 0.5 * len(todo) / len(sizes)))
            done = sum(sizes[i] for i in there)
            if there:
                report(done, grid.size)
            for index, content in compute_parts(partial(compute_part, grid, where, store.digest), todo, jobs):
                store.put(index, content)
                done += sizes[index]
                report(done, grid.size)
            rows, excluded = store.assemble()
    seconds = time.monotonic() - began
    return Summary(store.target, grid.size, rows, resumed, len(sizes), seconds, excluded_lines(excluded, NOTED))


def sweep_results(
    grid: Grid, where: str | None = None, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Results:
    """Return the rows of a grid, with notes on exclusions. ``progress`` is called with pieces done and their number.

    >>> grid = Grid(("llama-3.1-8b",), ("h100",), (0.5,), ("decode",), (1, 8), (2048,), engines=("trtllm",))
    >>> found = sweep_results(grid, "family == 'depth'")
    >>> found.columns["batch"].tolist(), found.columns["realised_sparsity"].tolist(), found.notes
    ([1, 8], [0.5, 0.5], ())
    """
    excluded, found, todo = Excluded(), [], list(pieces(grid))
    for done, piece in enumerate(todo, start=1):
        found.append(piece_results(grid, piece, excluded, where))
        progress(done, len(todo))
    return Results.join(found, excluded_lines(excluded, NOTED))


def compute_part(grid: Grid, where: str | None, digest: str, index: int) -> bytes:
    """Return one piece of a sweep as a Parquet file in memory, with the same bytes in every process. ``digest`` is the
    grid's (:func:`digest`)."""
    pyarrow, parquet = load_pyarrow()
    excluded = Excluded()
    results = piece_results(grid, _cached_pieces(grid)[index], excluded, where)
    columns = results.columns
    types = {str: pyarrow.string(), float: pyarrow.float64(), int: pyarrow.int64(), bool: pyarrow.bool_()}

    def array(name: str, kind: type) -> Any:
        column = columns[name]
        if isinstance(column, Labels):
            texts = pyarrow.array(column.texts, pyarrow.string())
            return pyarrow.DictionaryArray.from_arrays(column.codes, texts).dictionary_decode()
        return pyarrow.array(column, types[kind], from_pandas=True)  # NaN becomes null

    schema = pyarrow.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
    own = {NOTES_KEY: json.dumps(excluded).encode(), STAMP_KEY: stamp(digest, index, len(results))}
    schema = schema.with_metadata(own)
    table = pyarrow.Table.from_arrays([array(name, kind) for name, kind in COLUMNS.items()], schema=schema)
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink, compression="zstd", compression_level=1)
    return bytes(sink.getvalue())


Piece = tuple[Scenario, tuple[Pruning, ...]]
"""Requests of a scenario and their prunings, timed together."""


def pieces(grid: Grid) -> Iterator[Piece]:
    """Yield the pieces of a grid in the order of the table: by model, format, engine, devices, phase, then groups of
    requests by length and batch, then groups of families and sparsities."""
    shapes = [(b, s) for s in grid.seqs for b in grid.batches]
    prunings = grid.prunings
    axes = itertools.product(grid.models, grid.dtypes, grid.engines, grid.devices, grid.phases)
    for model, formats, engine, devices, phase in axes:
        operators = {"generate": 60 + 2 * min(grid.new_tokens, 2 * DECODE_LENGTHS), "serve": 60}.get(phase, 30)
        workloads = max(1, min(PART_ROWS // len(grid.hardware), OPERATOR_ROWS // operators))
        many = min(len(shapes), REQUESTS, workloads)
        of_prunings = max(1, workloads // many)
        if of_prunings >= len(prunings):  # few prunings: take more requests
            many = max(1, min(len(shapes), 4 * REQUESTS, workloads // len(prunings)))
        for some, chosen in itertools.product(_even(shapes, many), _even(prunings, of_prunings)):
            yield grid.scenario(model, formats, engine, devices, phase, tuple(some)), tuple(chosen)


def _even(values: Sequence[T], size: int) -> list[Sequence[T]]:
    """Split values into runs of equal length, at most ``size``."""
    each = -(-len(values) // -(-len(values) // size))
    return [values[i : i + each] for i in range(0, len(values), each)]


def piece_results(grid: Grid, piece: Piece, excluded: Excluded, where: str | None = None) -> Results:
    """Return the rows of a piece that a filter keeps; exclusions go to ``excluded``."""
    scenario, prunings = piece

    def reject(pruning: int | None, reason: str, device: str) -> None:
        if pruning is not None:
            exclude(excluded, prunings[pruning], reason, device)

    results = scenario_results(scenario, prunings, [load_hardware(h) for h in grid.hardware], reject)
    condition = _condition(where)
    if condition is None:
        return results
    return results.take(condition(lambda name: plain(results.columns[name]), len(results)))


def digest(grid: Grid, where: str | None = None) -> str:
    """Return a digest of all that determines a table: grid, filter, version, models, and files of profiles and
    engines."""
    facts = json.dumps([__version__, where, grid.facts()], sort_keys=True, default=str)
    sha = hashlib.sha256(facts.encode())
    for name in grid.models:
        sha.update(json.dumps(load_model(name).to_dict()).encode())
    for device in grid.hardware:
        for file in files_of(load_hardware(device)):
            sha.update(file.name.encode() + b"\0" + file.read_bytes())
    for name in grid.engines:
        if (path := load_engine(name).path) is not None:
            sha.update(path.read_bytes())
    return sha.hexdigest()


@lru_cache(maxsize=4)
def _cached_pieces(grid: Grid) -> tuple[Piece, ...]:
    return tuple(pieces(grid))


@lru_cache(maxsize=8)
def _condition(where: str | None) -> Filter | None:
    return None if where is None else parse_filter(where, COLUMNS)
