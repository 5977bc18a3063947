"""Define the grid of a sweep, in Python (:class:`Grid`) or in a YAML file (:func:`read_grid`)."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from simulator._version import __version__
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.files.fields import BAD, Checked, Inline, Keyed, Keys, MapOf, Number, Scalar, Text, TreeReader, read
from simulator.files.yaml import Node, Problems, first_of, parse_yaml, read_text
from simulator.hardware.library import files_of, load_hardware, reference
from simulator.hardware.profile import HardwareProfile
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.models.lower import DECODE_LENGTHS, cached_tokens, lower
from simulator.prediction.prunings import Pruning
from simulator.prediction.requests import engines_of, models_of, once, profiles
from simulator.pruning import FAMILIES, check_fraction, general_families, prune
from simulator.pruning._methods import load_method
from simulator.request import MAX_TOKENS, SETTINGS, Request, Whole
from simulator.units import parse_value

T = TypeVar("T")
S = TypeVar("S")

_RANGE = re.compile(r"([\d.]+):([\d.]+)(?::([\d.]+))?")  # of the command line
MOST_POINTS = 100_000  # values of a progression; more indicate a wrong step
_SMALL = "llama-3.2-1b"  # model with which options of families are checked

REQUIRED: tuple[str, ...] = ("models", "hardware", "sparsities", "phases", "batches", "seqs")
AXES: tuple[str, ...] = (*(name for name in REQUIRED if name != "sparsities"), "dtypes", "engines", "devices")
"""Axes besides the prunings."""
_OWN = ("engine", "phase", "batch", "seq", "dtype", "weight_dtype", "kv_dtype", "devices", "dense_s")
WHOLE = tuple(name for name in SETTINGS if name not in _OWN)
"""Settings of the whole grid."""


@dataclass(frozen=True)
class Formats:
    """Number formats of a run; None: the format follows from ``dtype``."""

    dtype: Annotated[str, SETTINGS["dtype"]] = "bf16"
    weight_dtype: Annotated[str | None, SETTINGS["weight_dtype"]] = None
    kv_dtype: Annotated[str | None, SETTINGS["kv_dtype"]] = None


class _Axis(Scalar):
    """A list or one value; repeated values are dropped."""

    def __init__(self, item: Scalar) -> None:
        self.item = item

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        if node.kind == "list" and not node.items:
            return reader.wrong(node, path, "is an empty list; expected at least one value")
        listed = [(one, (*path, i)) for i, one in enumerate(node.items)] or [(node, path)]
        found = [self.item.read(one, at, reader) for one, at in listed]
        return BAD if BAD in found else once(self.flat(found))

    def flat(self, found: list[Any]) -> Iterable[Any]:
        return found


@dataclass(frozen=True)
class _Progression(Generic[T, S]):
    """Numbers from a start to an end, both included."""

    start: T = field(metadata={"key": "from"})
    to: T
    step: S | None = None
    times: Annotated[float | None, Number(1 + 1e-6, 1e9, "2")] = None


class _Numbers(_Axis):
    """An axis of numbers: a list, one number, or ``{from, to, step}`` or ``{from, to, times}`` with both ends."""

    def __init__(self, number: Number, rule: Callable[[float], Any] = float) -> None:
        step = Number(1 if number.whole else 1e-6, 1e9, "2" if number.whole else "0.1", number.whole)
        self.whole, self.progression = number.whole, _Progression[Annotated[float, number], Annotated[float, step]]
        super().__init__(Checked(number, lambda value: (rule(value), value)[1]))

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        for i, one in enumerate(node.items or (node,)):
            if one.kind == "scalar" and (ends := _RANGE.fullmatch(one.text)):
                by = f"step: {ends[3]}" if ends[3] else "times: 2"
                hint = f"{{from: {ends[1]}, to: {ends[2]}, {by}}}"
                return reader.wrong(one, (*path, i) if node.items else path, f"expected {hint}, got {one}")
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
        nodes = (Node("scalar", node.line, node.column, f"{round(v) if self.whole else round(v, 9)!r}") for v in values)
        return super().read(Node("list", items=tuple(nodes)), path, reader)


class _Families(_Axis):
    """An axis of families, whose "all" are several."""

    def flat(self, found: list[Any]) -> Iterable[Any]:
        return itertools.chain(*found)


class _Family(Scalar):
    """A family's name, "all", or a mapping of names to options."""

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        if node.kind != "mapping":
            name = Text((*FAMILIES, "all")).read(node, path, reader)
            names = general_families() if name == "all" else () if name is BAD else (name,)
            return tuple(map(Pruning.of, names)) if names else BAD
        found = [self.choice(key, value, (*path, key.text), reader) for key, value in node.entries.values()]
        return BAD if BAD in found else tuple(found)

    def choice(self, key: Node, node: Node, path: Keyed, reader: TreeReader) -> Any:
        family = Text(tuple(FAMILIES)).read(key, path, reader)
        if family is BAD:
            return BAD
        given = MapOf(Annotated[Any, _Option()], Keys("option", FAMILIES[family].options)).read(node, path, reader)
        if given is BAD:
            return BAD
        options = dict(sorted(given.items()))
        try:
            prune(lower(load_model(_SMALL), phase="generate", seq=64, new_tokens=1), family, 0.5, **options)
        except InputError as error:
            return reader.wrong(node, path, str(error))
        return Pruning.of(family, options=options)


class _Option(Scalar):
    """A whole number, a number, true, false, a word, or a list of these; the family checks the value."""

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


PART_ROWS = 40_000  # configurations of a piece, about: a few megabytes of table
OPERATOR_ROWS = 120_000  # operators of a piece, about: 25 MB of columns, 100 MB during computation
REQUESTS = 64  # (batch, seq) pruned together

Piece = tuple[list[Request], tuple[Pruning, ...]]
"""Requests and their prunings, which are timed together."""


def _even(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Split values into runs of equal length, at most ``size``."""
    each = -(-len(values) // -(-len(values) // size))
    return [values[i : i + each] for i in range(0, len(values), each)]


@dataclass(frozen=True)
class Grid:
    """Axes of a sweep, which predicts every combination, and options of the whole sweep. The annotations are the schema
    of the file.

    >>> grid = Grid(("llama-3.1-8b",), ("h100_sxm", "a100"), (0.25, 0.5), ("decode",), (1, 8), (2048,))
    >>> grid.size == 2 * 2 * 2 * len(general_families())
    True
    """

    # names, paths, or loaded ones
    models: Annotated[tuple[str | ModelConfig, ...], _Axis(_loads(load_model))]
    hardware: Annotated[tuple[str | HardwareProfile, ...], _Axis(Checked(Text(), reference))]
    sparsities: Annotated[tuple[float, ...], _Numbers(Number(-1e9, 1e9, "0.25"), check_fraction)]
    phases: Annotated[tuple[str, ...], _Axis(SETTINGS["phase"])]
    batches: Annotated[tuple[int, ...], _numbers("batch")]
    seqs: Annotated[tuple[int, ...], _numbers("seq")]  # tokens (prefill) or cached positions (decode) per sequence
    # all families if no families, methods or texts are given; methods are appended
    families: Annotated[tuple[Pruning, ...], _Families(_Family())] = ()
    dtypes: Annotated[tuple[Formats, ...], _Axis(_Format())] = (Formats(),)
    engines: Annotated[tuple[str, ...], _Axis(_loads(load_engine))] = (Request.engine,)  # or paths
    devices: Annotated[tuple[int, ...], _numbers("devices")] = (1,)
    methods: Annotated[tuple[str, ...], _Axis(_loads(load_method))] = ()
    # texts of --prune and paths of plans, without an axis of sparsities
    prune: Annotated[tuple[str, ...], _Axis(_loads(Pruning.read))] = ()
    request: Annotated[Request, Inline(WHOLE)] = field(default_factory=Request)  # settings of the whole grid

    def __post_init__(self) -> None:
        families = self.families or (() if self.methods or self.prune else map(Pruning.of, general_families()))
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
        """Every family and method at every sparsity (with a budget of tokens: once), then the texts."""
        every = (p.at(s) for p in self.families for s in ((None,) if p.budgeted else self.sparsities))
        return once((*every, *map(Pruning.read, self.prune)))

    def pieces(self) -> Iterator[Piece]:
        """Yield pieces of bounded memory in the order of the rows: by model, format, engine, devices, phase, then
        groups of requests by length and batch, then groups of families and sparsities."""
        shapes = [(b, s) for s in self.seqs for b in self.batches]
        axes = itertools.product(self.models, self.dtypes, self.engines, self.devices, self.phases)
        for model, formats, engine, devices, phase in axes:
            own = {"model": model, "phase": phase, "engine": engine, "devices": devices, **vars(formats)}
            operators = {"generate": 60 + 2 * min(self.request.new_tokens, 2 * DECODE_LENGTHS), "serve": 60}.get(
                phase, 30
            )
            workloads = max(1, min(PART_ROWS // len(self.hardware), OPERATOR_ROWS // operators))
            many = min(len(shapes), REQUESTS, workloads)
            of_prunings = max(1, workloads // many)
            if of_prunings >= len(self.prunings):  # few prunings: take more requests
                many = max(1, min(len(shapes), 4 * REQUESTS, workloads // len(self.prunings)))
            for some, chosen in itertools.product(_even(shapes, many), _even(self.prunings, of_prunings)):
                yield [replace(self.request, **own, batch=b, seq=s) for b, s in some], tuple(chosen)

    def digest(self) -> str:
        """Return the version and a digest of all that determines the rows, also of files of profiles and engines."""
        sha = hashlib.sha256(json.dumps(self.facts(), sort_keys=True, default=str).encode())
        for model in self.models:
            sha.update(json.dumps(load_model(model).to_dict()).encode())
        for device in self.hardware:
            for file in files_of(load_hardware(device)):
                sha.update(file.name.encode() + b"\0" + file.read_bytes())
        for engine in self.engines:
            if (path := load_engine(engine).path) is not None:
                sha.update(path.read_bytes())
        return f"{__version__} {sha.hexdigest()}"

    def facts(self) -> dict[str, Any]:
        """Return the axes as plain values, for the digest."""
        formats = [list(vars(f).values()) for f in self.dtypes]
        facts = {f.name: getattr(self, f.name) for f in fields(self)}
        families, texts = [[p.family, p.label] for p in self.families], [p.prune for p in self.prunings if p.text]
        steps = [list(map(str, p.steps)) for p in self.prunings if p.text]  # of a plan: its content
        return {**facts, "families": families, "prune": [texts, steps], "dtypes": formats}


@dataclass(frozen=True, kw_only=True)
class _Pruned(Grid):
    """A grid of texts alone, which needs no sparsities."""

    sparsities: Annotated[tuple[float, ...], _Numbers(Number(-1e9, 1e9, "0.25"), check_fraction)] = ()


def read_grid(path: str | Path) -> Grid:
    """Read a grid from a YAML file; raise InputError for its first problem as ``file:line:column: key: reason``.

    An axis is a list, one value, or for numbers ``{from: 0.1, to: 0.9, step: 0.1}`` or ``{from: 1, to: 64, times: 2}``.
    A family is a name, ``all``, or a mapping ``{width: {align: 64}}``; ``methods`` are names of published methods, and
    ``prune`` texts such as ``width mlp=0.3 + depth 0.25`` or paths of plans, with or without families (without, no
    sparsities are needed); a dtype is a name or ``{dtype: bf16, weight_dtype: int4, kv_dtype: fp8}``.
    """
    problems = Problems(str(path))
    text = read_text(Path(path), problems)
    root = None if text is None else parse_yaml(text, problems)
    if root is None and not len(problems):
        problems.add(None, "file", f"is empty; expected the axes {', '.join(REQUIRED)}")
    if root is not None and not len(problems):
        pruned = "prune" in root.entries and not {"families", "methods"} & root.entries.keys()
        grid = read(_Pruned if pruned else Grid, root, problems)
        if grid and set(grid.phases) != {"decode"}:
            batch, seq = max(grid.batches), max(grid.seqs)
            if batch * seq > MAX_TOKENS:
                reason = f"batch {batch} x seq {seq}: expected at most {MAX_TOKENS} tokens in a pass"
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
