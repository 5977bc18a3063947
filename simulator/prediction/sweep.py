"""Define the grid of a sweep (:class:`Grid`, in YAML :func:`read_grid`), and predict every
combination, in memory or into a folder of Parquet files.

A grid is cut into pieces of bounded memory. This process or worker processes compute the pieces.
Only the calling process writes: when a piece is computed, it becomes one file of the dataset.
"""

from __future__ import annotations

import contextlib
import copyreg
import hashlib
import itertools
import json
import math
import re
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as ready_of
from multiprocessing.process import BaseProcess
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

from simulator._version import __version__
from simulator.arguments import shown
from simulator.engines.engine import load_engine
from simulator.errors import InputError, needs_extra, one_line
from simulator.files.fields import (
    BAD,
    Checked,
    Flag,
    Inline,
    Keyed,
    Keys,
    MapOf,
    Number,
    Scalar,
    Text,
    TreeReader,
    read,
)
from simulator.files.read import load_pyarrow
from simulator.files.write import check_target, one_writer, remove_left, write_whole
from simulator.files.yaml import Node, Problems, first_of, parse_yaml, read_text
from simulator.hardware.library import files_of, load_hardware, reference
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.lower import DECODE_LENGTHS, cached_tokens, lower
from simulator.models.model import Model
from simulator.prediction.batch import OPERATOR_ROWS
from simulator.prediction.compare import request_results
from simulator.prediction.prunings import (
    Excluded,
    Pruning,
    exclude,
    excluded_lines,
    named_apart,
)
from simulator.prediction.requests import engines_of, models_of, once, profiles
from simulator.prediction.result import COLUMNS, Columns, Results
from simulator.prediction.tariff import NO_TARIFF, PRICES, Tariff, energy_of
from simulator.pruning import FAMILIES, check_fraction, general_families, prune
from simulator.pruning._family import SUFFIXES
from simulator.pruning._methods import Method, load_method
from simulator.request import MAX_TOKENS, SETTINGS, Request, Whole
from simulator.units import parse_value

if TYPE_CHECKING:
    import pandas

T = TypeVar("T")
S = TypeVar("S")

MOST_POINTS = 100_000  # values of a progression; more indicate a wrong step
_SMALL = "llama-3.2-1b"  # model with which options of families are checked

REQUIRED: tuple[str, ...] = ("models", "hardware", "sparsities", "phases", "batches", "seqs")
AXES: tuple[str, ...] = (
    *(name for name in REQUIRED if name != "sparsities"),
    "dtypes",
    "engines",
    "devices",
)
"""Axes besides the prunings."""
_OWN = (
    "engine",
    "phase",
    "batch",
    "seq",
    "dtype",
    "weight_dtype",
    "kv_dtype",
    "devices",
    "dense_s",
)
WHOLE = tuple(name for name in SETTINGS if name not in _OWN)  # settings of the whole grid


@dataclass(frozen=True)
class Formats:
    """Number formats of a run; None: that of the checkpoint, or it follows from ``dtype``."""

    dtype: Annotated[str | None, SETTINGS["dtype"]] = None
    weight_dtype: Annotated[str | None, SETTINGS["weight_dtype"]] = None
    kv_dtype: Annotated[str | None, SETTINGS["kv_dtype"]] = None


class _Axis(Scalar):
    """A list or one value; repeated values are dropped."""

    def __init__(self, item: Scalar, flat: Callable[[list[Any]], Iterable[Any]] = list) -> None:
        self.item, self.flat = item, flat

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        if node.kind == "list" and not node.items:
            return reader.wrong(node, path, "is an empty list; expected at least one value")
        listed = [(one, (*path, i)) for i, one in enumerate(node.items)] or [(node, path)]
        found = [self.item.read(one, at, reader) for one, at in listed]
        return BAD if BAD in found else once(self.flat(found))


@dataclass(frozen=True)
class _Progression(Generic[T, S]):
    start: T = field(metadata={"key": "from"})
    to: T
    step: S | None = None
    times: Annotated[float | None, Number(1 + 1e-6, 1e9, "2")] = None


class _Numbers(_Axis):
    """An axis of numbers: a list, one number, or ``{from, to, step}`` or ``{from, to, times}`` with
    both ends."""

    def __init__(self, number: Number, rule: Callable[[Any], Any] = lambda value: value) -> None:
        step = Number(
            1 if number.whole else 1e-6, 1e9, "2" if number.whole else "0.1", number.whole
        )
        self.whole, self.progression = (
            number.whole,
            _Progression[Annotated[float, number], Annotated[float, step]],
        )
        super().__init__(Checked(number, rule))

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        if node.kind != "mapping":
            return super().read(node, path, reader)
        found = reader.read(self.progression, node, path)
        if found is BAD:
            return BAD
        start, end, by = found.start, found.to, found.step or found.times or 0.0

        def wrong(reason: str, *keys: str) -> Any:
            return reader.wrong(node.at(*keys), (*path, *keys), reason)

        if (found.step is None) == (found.times is None):
            return wrong("expected either step or times with from and to")
        if end < start:
            return wrong(f"expected at least the start {start:g}, got {end:g}", "to")
        if found.times and start <= 0:
            return wrong(f"expected a start above 0 to multiply, got {start:g}", "from")
        many = (math.log(end / start) / math.log(by) if found.times else (end - start) / by) + 1e-9
        if many >= MOST_POINTS:
            reason = f"makes more than {MOST_POINTS} values; take a larger one"
            return wrong(reason, "times" if found.times else "step")
        values = (start * by**i if found.times else start + i * by for i in range(int(many) + 1))
        nodes = (
            Node("scalar", node.line, node.column, f"{round(v) if self.whole else round(v, 9)!r}")
            for v in values
        )
        return super().read(Node("list", items=tuple(nodes)), path, reader)


class _Family(Scalar):
    """A family's name, "all", or a mapping of names to options."""

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        if node.kind != "mapping":
            name = Text((*FAMILIES, "all")).read(node, path, reader)
            names = general_families() if name == "all" else () if name is BAD else (name,)
            return tuple(map(Pruning.of, names)) if names else BAD
        found = [
            self.choice(key, value, (*path, key.text), reader)
            for key, value in node.entries.values()
        ]
        return BAD if BAD in found else tuple(found)

    def choice(self, key: Node, node: Node, path: Keyed, reader: TreeReader) -> Any:
        family = Text(tuple(FAMILIES)).read(key, path, reader)
        if family is BAD:
            return BAD
        chosen = MapOf(Annotated[Any, _Option()], Keys("option", FAMILIES[family].options)).read(
            node, path, reader
        )
        if chosen is BAD:
            return BAD
        options = dict(sorted(chosen.items()))
        try:
            prune(
                lower(load_model(_SMALL), phase="generate", seq=64, new_tokens=1),
                family,
                0.5,
                **options,
            )
        except InputError as error:
            return reader.wrong(node, path, str(error))
        return Pruning.of(family, options=options)


class _Option(Scalar):
    """A whole number, a number, true, false, a word, or a list of these; the family checks the
    value."""

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        if node.kind == "list":
            return reader.read(tuple[Annotated[Any, self], ...], node, path)
        return super().read(node, path, reader)

    def value(self, node: Node) -> Any:
        if node.kind == "mapping":
            raise ValueError("expected a value, got a mapping")
        value = node.text if node.quoted else parse_value(node.text)
        return Text().value(node) if isinstance(value, str) else value


class _Format(Scalar):
    """A dtype, or a mapping with a dtype and optionally the two other formats."""

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        if node.kind == "mapping":
            return reader.read(Formats, node, path)
        dtype = SETTINGS["dtype"].read(node, path, reader)
        return BAD if dtype is BAD else Formats(dtype)


def _numbers(setting: str) -> _Numbers:
    """Return the axis of a setting that is a whole number."""
    accepts = SETTINGS[setting].accepts
    assert isinstance(accepts, Whole)
    return _Numbers(accepts.number)


def _loads(load: Callable[[str], Any]) -> Checked:
    """Return a text that a function loads without an error."""
    return Checked(Text(), lambda text: (load(text), text)[1])


Sparsities = Annotated[tuple[float, ...], _Numbers(Number(-1e9, 1e9, "0.25"), check_fraction)]
PART_ROWS = 40_000  # configurations of a piece, about: a few megabytes of table
REQUESTS = 64  # (batch, seq) pruned together

# requests and their prunings, which are timed together, and what energy costs, if it is requested
Piece = tuple[list[Request], tuple[Pruning, ...], Tariff | None]


def _even(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Split values into runs of equal length, at most ``size``."""
    each = -(-len(values) // -(-len(values) // size))
    return [values[i : i + each] for i in range(0, len(values), each)]


@dataclass(frozen=True)
class Grid:
    """Axes of a sweep, which predicts every combination, and options of the whole sweep. The
    annotations are the schema of the file.

    >>> devices = ("h100_sxm", "a100")
    >>> grid = Grid(("llama-3.1-8b",), devices, (0.25, 0.5), ("decode",), (1, 8), (2048,))
    >>> grid.size == 2 * 2 * 2 * len(general_families())
    True
    """

    # names, paths, or loaded ones
    models: Annotated[tuple[str | Model, ...], _Axis(_loads(load_model))]
    hardware: Annotated[tuple[str | HardwareProfile, ...], _Axis(Checked(Text(), reference))]
    sparsities: Sparsities
    phases: Annotated[tuple[str, ...], _Axis(SETTINGS["phase"])]
    batches: Annotated[tuple[int, ...], _numbers("batch")]
    # tokens (prefill) or cached positions (decode) per sequence
    seqs: Annotated[tuple[int, ...], _numbers("seq")]
    # all families if no families, methods or texts are given; methods are appended
    families: Annotated[tuple[Pruning, ...], _Axis(_Family(), itertools.chain.from_iterable)] = ()
    dtypes: Annotated[tuple[Formats, ...], _Axis(_Format())] = (Formats(),)
    engines: Annotated[tuple[str, ...], _Axis(_loads(load_engine))] = (Request.engine,)  # or paths
    devices: Annotated[tuple[int, ...], _numbers("devices")] = (1,)
    methods: Annotated[tuple[str | Method, ...], _Axis(_loads(load_method))] = ()
    # texts of --prune, paths of plans and methods, without an axis of sparsities
    prune: Annotated[tuple[str | Method, ...], _Axis(_loads(Pruning.read))] = ()
    # settings of the whole grid
    request: Annotated[Request, Inline(WHOLE)] = field(default_factory=Request)
    energy: Flag = False  # whether rows have the fields of Energy, which any price implies
    tariff: Annotated[Tariff, Inline(tuple(PRICES))] = NO_TARIFF

    def __post_init__(self) -> None:
        families = self.families or (
            () if self.methods or self.prune else map(Pruning.of, general_families())
        )
        object.__setattr__(self, "families", once((*families, *map(Pruning.of, self.methods))))
        for name in AXES:
            if not getattr(self, name):
                raise InputError(f"{name}: expected at least one value")
        if not self.prunings:
            raise InputError("sparsities: expected at least one value")
        # each rejects two with one name
        profiles(self.hardware)
        models_of(self.models)
        engines_of(self.engines)

    @property
    def size(self) -> int:
        return len(self.prunings) * math.prod(len(getattr(self, name)) for name in AXES)

    @cached_property
    def prunings(self) -> tuple[Pruning, ...]:
        """Every family and method at every sparsity (with a budget of tokens: once), then the
        texts."""
        every = (
            p.at(s)
            for p in self.families
            for s in ((None,) if p.sets_sparsity else self.sparsities)
        )
        return named_apart(once((*every, *map(Pruning.read, self.prune))))

    def pieces(self) -> Iterator[Piece]:
        """Yield pieces of bounded memory in the order of the rows: by model, format, engine,
        devices, phase, then groups of requests by length and batch, then groups of families and
        sparsities."""
        shapes = [(b, s) for s in self.seqs for b in self.batches]
        axes = itertools.product(self.models, self.dtypes, self.engines, self.devices, self.phases)
        for model, formats, engine, devices, phase in axes:
            one = replace(
                self.request,
                model=model,
                phase=phase,
                engine=engine,
                devices=devices,
                **vars(formats),
            )
            many, of_prunings = self._piece_size(phase, len(shapes))
            for some, chosen in itertools.product(
                _even(shapes, many), _even(self.prunings, of_prunings)
            ):
                requests = [replace(one, batch=b, seq=s) for b, s in some]
                yield requests, tuple(chosen), self.priced

    @property
    def priced(self) -> Tariff | None:
        """What energy costs, if energy is requested."""
        return self.tariff if self.energy or self.tariff != NO_TARIFF else None

    def _piece_size(self, phase: str, shapes: int) -> tuple[int, int]:
        """Return the numbers of requests, of ``shapes``, and of prunings in a piece."""
        decodes = min(self.request.new_tokens, 2 * DECODE_LENGTHS)
        operators = {"generate": 60 + 2 * decodes, "serve": 60}.get(phase, 30)
        workloads = max(1, min(PART_ROWS // len(self.hardware), OPERATOR_ROWS // operators))
        many = min(shapes, REQUESTS, workloads)
        of_prunings = max(1, workloads // many)
        if of_prunings >= len(self.prunings):  # few prunings: take more requests
            many = max(1, min(shapes, 4 * REQUESTS, workloads // len(self.prunings)))
        return many, of_prunings

    def digest(self) -> str:
        """Return the version and a digest of all that determines the rows, also of files of
        profiles and engines."""
        names = [f.name for f in fields(self) if f.name not in ("families", "methods", "prune")]
        facts = [*(getattr(self, name) for name in names), self.prunings]
        facts += [method.description for p in self.prunings for method in p.described]
        sha = hashlib.sha256(repr(facts).encode())
        for model in self.models:
            sha.update(json.dumps(load_model(model).to_dict()).encode())
        for device in self.hardware:
            for file in files_of(load_hardware(device)):
                sha.update(file.name.encode() + b"\0" + file.read_bytes())
        for engine in self.engines:
            if (path := load_engine(engine).path) is not None:
                sha.update(path.read_bytes())
        return f"{__version__} {sha.hexdigest()}"


@dataclass(frozen=True, kw_only=True)
class _Pruned(Grid):
    """A grid of texts alone, which needs no sparsities."""

    sparsities: Sparsities = ()


def read_grid(source: str | Path | Mapping[str, Any]) -> Grid:
    """Read a grid from a YAML file, or from a mapping with its content; raise InputError for its
    first problem as ``file:line:column: key: reason``. An axis is a list, one value, or for
    numbers ``{from: 0.1, to: 0.9, step: 0.1}`` or ``{from: 1, to: 64, times: 2}``. A family is a
    name, ``all``, or a mapping ``{width: {align: 64}}``; ``methods`` are names of published
    methods or method files, and ``prune`` texts such as ``width mlp=0.3 + depth 0.25`` or paths
    of plans, with or without families (without, no sparsities are needed); both name files
    relative to the grid's folder. A dtype is a name or ``{dtype: bf16, weight_dtype: int4,
    kv_dtype: fp8}``."""
    path, problems = (
        (Path("grid"), Problems("grid"))
        if isinstance(source, Mapping)
        else (Path(source), Problems(str(source)))
    )
    text = _content(source) if isinstance(source, Mapping) else read_text(path, problems)
    root = None if text is None else parse_yaml(text, problems)
    if root is None and not len(problems):
        problems.add(None, "file", f"is empty; expected the axes {', '.join(REQUIRED)}")
    if root is not None and not len(problems):
        pruned = "prune" in root.entries and not {"families", "methods"} & root.entries.keys()
        near = {
            name: (key, _beside(node, path.parent))
            for name, (key, node) in root.entries.items()
            if name in ("methods", "prune")
        }
        root = root._replace(entries={**root.entries, **near})
        grid = read(_Pruned if pruned else Grid, root, problems)
        if grid and set(grid.phases) != {"decode"}:
            batch, seq = max(grid.batches), max(grid.seqs)
            if batch * seq > MAX_TOKENS:
                reason = (
                    f"batch {batch} x seq {seq}: expected at most {MAX_TOKENS} tokens in a pass"
                )
                problems.add(root.at("seqs"), "seqs", reason)
            try:
                cached_tokens(replace(grid.request, phase="prefill", seq=min(grid.seqs)))
            except InputError as error:
                key = "cached_prefix"
                problems.add(root.at(key), key, str(error).removeprefix(f"{key}: "))
        if grid and not len(problems):
            return grid
    # an unknown key is reported before the missing key that it may stand for
    raise first_of(sorted(problems.lines, key=lambda line: line.endswith(": is missing")))


def _content(grid: Mapping[str, Any]) -> str:
    try:
        return json.dumps(grid, default=str)
    except (TypeError, ValueError, RecursionError):
        expected = "expected a mapping of texts, numbers and lists"
        raise InputError(f"grid: {expected}, got {shown(grid)}") from None


def _beside(node: Node, folder: Path) -> Node:
    """Return texts of prunings whose files are relative to a folder."""
    steps = [(step, step.partition(" ")[0]) for step in node.text.split(" + ")]
    texts = [
        str(folder / step) if step.endswith(SUFFIXES) or first.endswith(SUFFIXES) else step
        for step, first in steps
    ]
    items = tuple(_beside(item, folder) for item in node.items)
    return node._replace(text=" + ".join(texts), items=items)


MOST_CONFIGURATIONS = 100_000_000  # largest grid by default
NOTED = 8  # sparsities that a note lists at most
# metadata of a part: its stamp; sparsities by exclusion
STAMP_KEY, NOTES_KEY = b"prunesim.part", b"prunesim.notes"
PART_NAME = re.compile(r"part-\d{8}\.parquet")

# loaded profiles contain read-only mappings, which pickle does not know
copyreg.pickle(MappingProxyType, lambda mapping: (_read_only, (dict(mapping),)))


def _read_only(mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(mapping)


@dataclass(frozen=True)
class Summary:
    folder: str  # folder of the parts
    configurations: int  # in the grid
    rows: int  # supported configurations
    parts: int
    resumed_parts: int  # parts of an earlier run
    seconds: float
    notes: tuple[str, ...]  # exclusions, one line per reason


def sweep(
    grid: Grid | str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    *,
    jobs: int = 1,
) -> pandas.DataFrame:
    """Predict every combination of a grid, and return the rows.

    Parameters
    ----------
    grid : Grid, str, path or mapping
        The grid, its YAML file, or a mapping with the keys of the file
        (:func:`simulator.prediction.sweep.read_grid`).
    out : str or path, optional
        Folder for Parquet files; the same call resumes a sweep that was stopped.
    jobs : int
        Processes on this machine; used with ``out`` only.

    Returns
    -------
    pandas.DataFrame
        One row per prediction, with the fields of :class:`simulator.Result` as columns;
        ``attrs["notes"]`` lists exclusions.

    Raises
    ------
    InputError
        For an invalid grid or folder, and without pandas (extra "tables").

    Examples
    --------
    >>> from simulator.prediction.sweep import Grid
    >>> prune = ("width mlp=0.3 heads=0.2",)
    >>> grid = Grid(("llama-3.1-8b",), ("h100",), (), ("decode",), (1, 8), (2048,), prune=prune)
    >>> sweep(grid)["batch"].tolist()
    [1, 8]
    """
    try:
        import pandas
    except ImportError:
        raise needs_extra("a data frame", "tables", "pandas") from None
    if out is None:
        grid = grid if isinstance(grid, Grid) else read_grid(grid)
        results = sweep_results(grid)
        frame, notes = results.to_pandas(), results.notes
        frame = frame.assign(**_energy(results.columns, grid.priced))
    else:
        done = write_sweep(grid, out, jobs=jobs)
        frame, notes = pandas.read_parquet(done.folder), done.notes
    frame.attrs["notes"] = list(notes)
    return frame


def sweep_results(grid: Grid) -> Results:
    """Return the rows of a grid, with notes on exclusions."""
    excluded = Excluded()
    parts = [piece_results(piece, grid.hardware, excluded) for piece in grid.pieces()]
    return Results.join(parts, excluded_lines(excluded, NOTED))


def write_sweep(
    grid: Grid | str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    most: int = MOST_CONFIGURATIONS,
) -> Summary:
    """Write the rows of a grid into a folder of Parquet files, one per piece; a rerun computes the
    missing ones. Parts of another grid, version or profile are replaced; a folder with other files
    is refused. A second sweep into the folder waits for the first. ``progress`` is called with
    configurations done and their number."""
    began, folder = time.monotonic(), Path(out)
    grid = grid if isinstance(grid, Grid) else read_grid(grid)
    size, digest, hardware = grid.size, grid.digest(), grid.hardware
    if jobs < 1:
        raise InputError(f"jobs {jobs}: expected a whole number from 1")
    if size > most:
        raise InputError(
            f"the grid has {size:,} configurations, more than {most:,} (--max); take a smaller grid"
        )
    _check_folder(folder)
    for method in (method for pruning in grid.prunings for method in pruning.described):
        if method.function is not None:
            expected = "expected a method of a file or a mapping, or a sweep without a folder"
            raise InputError(f"{method.name}: {expected}, as a function cannot be compared later")
    every = list(grid.pieces())
    sizes = [len(requests) * len(prunings) * len(hardware) for requests, prunings, _ in every]
    paths = [folder / f"part-{index:08d}.parquet" for index in range(len(every))]
    folder.mkdir(exist_ok=True)
    try:
        with one_writer(folder):
            remove_left(folder, "*")
            stale = sorted(
                set(folder.glob("part-*"))
                - {path for i, path in enumerate(paths) if _read(path, digest, i)}
            )
            for path in stale:
                path.unlink()
            todo = {i: piece for i, piece in enumerate(every) if not paths[i].exists()}
            done = size - sum(sizes[i] for i in todo)
            if done:
                progress(done, size)
            with contextlib.closing(computed(todo, digest, hardware, jobs)) as contents:
                for i, content in contents:
                    write_whole(paths[i], content)
                    done += sizes[i]
                    progress(done, size)
            checked = [_read(path, digest, i) for i, path in enumerate(paths)]
    finally:
        with contextlib.suppress(OSError):  # not empty: there are finished parts
            folder.rmdir()
    excluded = Excluded()
    for path, part in zip(paths, checked):
        if part is None:
            raise OSError(f"{path}: changed while the sweep ran; run the same command again")
        for reason, sparsities in part[1].items():
            excluded.setdefault(reason, []).extend(sparsities)
    replaced = f"{folder}: parts of another grid, version or profile were replaced: {len(stale)}"
    notes = (*([replaced] if stale else []), *excluded_lines(excluded, NOTED))
    rows, resumed = sum(part[0] for part in checked if part), len(paths) - len(todo)
    return Summary(str(folder), size, rows, len(paths), resumed, time.monotonic() - began, notes)


def _check_folder(folder: Path) -> None:
    """Raise InputError for a path that is not a folder, and for a folder that holds other files
    than parts."""
    load_pyarrow()
    if folder.suffix == ".csv":
        raise InputError(
            f"{folder}: expected the name of a folder for Parquet files; pandas writes CSV from it"
        )
    if not folder.is_dir() and check_target(folder).exists():
        raise InputError(f"{folder}: is a file; expected a folder: name another or remove it")
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.name.startswith((".", "_")) and not (
            PART_NAME.fullmatch(path.name) and path.is_file()
        ):
            raise InputError(
                f"{folder}: holds {path.name}, which is not a part of a sweep; name another folder"
            )


def _read(path: Path, grid: str, index: int) -> tuple[int, Excluded] | None:
    """Return rows and excluded sparsities of a part of a grid (its digest); None for another or a
    damaged part."""
    pyarrow, parquet = load_pyarrow()
    try:
        about = parquet.read_metadata(path)
        metadata = about.metadata or {}
        return (
            (about.num_rows, json.loads(metadata[NOTES_KEY]))
            if metadata[STAMP_KEY] == f"{grid} {index}".encode()
            else None
        )
    except (OSError, ValueError, KeyError, pyarrow.ArrowException):
        return None


def piece_results(piece: Piece, hardware: Sequence[Any], excluded: Excluded) -> Results:
    """Return the rows of a piece; exclusions go to ``excluded``."""
    requests, prunings, _ = piece

    def reject(pruning: int | None, reason: str, device: str) -> None:
        if pruning is not None:
            exclude(excluded, prunings[pruning], reason, device)

    return request_results(requests, prunings, [load_hardware(h) for h in hardware], reject)


def _energy(columns: Columns, tariff: Tariff | None) -> dict[str, Any]:
    """Return the columns of energy, if it is requested."""
    return {} if tariff is None else energy_of(columns, tariff)


def compute_part(hardware: Sequence[Any], piece: Piece, grid: str, index: int) -> bytes:
    """Return a piece of a grid (its digest) as a Parquet file in memory, with the same bytes in
    every process."""
    pyarrow, parquet = load_pyarrow()
    excluded = Excluded()
    columns = piece_results(piece, hardware, excluded).columns
    energy = _energy(columns, piece[-1])
    columns, kinds = {**columns, **energy}, {**COLUMNS, **dict.fromkeys(energy, float)}
    types = {str: "string", float: "float64", int: "int64", bool: "bool"}
    metadata = {STAMP_KEY: f"{grid} {index}".encode(), NOTES_KEY: json.dumps(excluded)}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in kinds.items()], metadata)
    # NaN becomes null
    arrays = [
        pyarrow.array(columns[name], types[kind], from_pandas=True) for name, kind in kinds.items()
    ]
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_arrays(arrays, schema=schema)
    parquet.write_table(table, sink, compression="zstd", compression_level=1)
    return bytes(sink.getvalue())


def computed(
    todo: Mapping[int, Piece],
    grid: str,
    hardware: Sequence[Any],
    jobs: int = 1,
) -> Generator[tuple[int, bytes], None, None]:
    """Yield the index and the content of each part as it is finished."""
    jobs = min(jobs, len(todo))
    if jobs > 1:
        yield from _on_processes(todo, grid, hardware, jobs)
    else:
        for index, piece in todo.items():
            yield index, compute_part(hardware, piece, grid, index)


def _lost(what: str, error: Exception) -> OSError:
    why = one_line(repr(error), 200)
    return OSError(f"{what} ({why}); finished parts are kept: run the same command again")


def _on_processes(
    todo: Mapping[int, Piece], grid: str, hardware: Sequence[Any], jobs: int
) -> Generator[tuple[int, bytes], None, None]:
    # spawned: a forked child would inherit the locks of threads that it does not have
    context = get_context("spawn")
    waiting, workers = iter(todo.items()), dict[Connection, BaseProcess]()
    # workers inherit the mask: Ctrl-C is for this process alone
    ensure_running()  # the start of this process of multiprocessing would change the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for task in itertools.islice(waiting, jobs):
            here, there = context.Pipe()
            workers[here] = context.Process(target=_work, args=(there, hardware, grid), daemon=True)
            workers[here].start()
            there.close()  # so that a worker's end closes the connection
            here.send(task)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        busy = list(workers)
        while busy:
            some: list[Any] = ready_of(busy)
            for ready in some:
                try:
                    index, content = ready.recv()
                    if (task_left := next(waiting, None)) is not None:
                        ready.send(task_left)
                    else:
                        busy.remove(ready)
                except (EOFError, OSError) as error:
                    raise _lost("a worker process ended early", error) from None
                if isinstance(content, Exception):
                    raise content
                yield index, content
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for here, worker in workers.items():
            if worker.pid is not None:
                worker.kill()
                worker.join()
            here.close()


def _work(there: Connection, hardware: Sequence[Any], grid: str) -> None:
    """Compute parts in a worker until the other end of the connection closes, as it does when the
    calling process ends for any reason."""
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            index, piece = there.recv()
            content: bytes | Exception
            try:
                content = compute_part(hardware, piece, grid, index)
            except Exception as error:
                content = error
            there.send((index, content))
