"""Define the grid of a sweep, in Python or in a YAML file.

Use :func:`read_grid` for a file, :class:`Grid` in Python. Both reject invalid input before any work starts; errors of a
file are ``file:line:column: key: reason, expected value``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from simulator._version import __version__
from simulator.engines import DEFAULT_ENGINE
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.files.fields import CheckedField, FieldType, ListField, NumberField, ObjectField, TextField, field_of
from simulator.files.yaml import Node, Problems, first_of, join, parse_yaml, read_text
from simulator.hardware.library import files_of, load_hardware, reference
from simulator.hardware.link import check as _link
from simulator.hardware.profile import HardwareProfile
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.models.lower import DECODE_LENGTHS, cached_tokens, lower
from simulator.prediction.prunings import Pruning
from simulator.prediction.scenario import (
    MAX_TOKENS,
    PARALLEL,
    Scenario,
    check_fraction,
    engines_of,
    models_of,
    once,
    profiles,
)
from simulator.pruning import FAMILIES, general_families, prune
from simulator.pruning._methods import load_method
from simulator.workload import DTYPES, PHASES

MOST_POINTS = 100_000
"""Most values of a progression; more indicate a wrong step."""

_SMALL = "llama-3.2-1b"
"""Model with which options of families are checked."""

REQUIRED: tuple[str, ...] = ("models", "hardware", "sparsities", "phases", "batches", "seqs")
AXES: tuple[str, ...] = (*(name for name in REQUIRED if name != "sparsities"), "dtypes", "engines", "devices")
"""Axes besides the prunings."""


@dataclass(frozen=True)
class Formats:
    """Number formats of a run; None: the format follows from ``dtype``."""

    dtype: str = "bf16"
    weight_dtype: str | None = None
    kv_dtype: str | None = None


@dataclass(frozen=True)
class _Axis:
    """A list or one value; repeated values are dropped."""

    kind: FieldType

    def read(self, node: Node, key: str, problems: Problems) -> tuple[Any, ...]:
        if node.kind != "list":
            found: Sequence[Any] = [self.kind.read(node, key, problems)]
        else:
            found = ListField(self.kind).read(node, key, problems)
            if not node.items:
                problems.add(node, key, "is an empty list; expected at least one value")
        return tuple(dict.fromkeys(value for value in found if value is not None))


@dataclass(frozen=True)
class _Numbers:
    """An axis of numbers: a list, one number, or ``{from, to, step}`` or ``{from, to, times}`` with both ends."""

    number: NumberField
    rule: Callable[[float], Any] = float

    def read(self, node: Node, key: str, problems: Problems) -> tuple[Any, ...]:
        if node.kind == "mapping":
            values = tuple(dict.fromkeys(self.progression(node, key, problems)))
        else:
            values = _Axis(self.number).read(node, key, problems)
        for value in values:
            try:
                self.rule(value)
            except InputError as error:
                place = next((item for item in node.items if _number_of(item) == value), node)
                problems.add(place, key, str(error))
        return values

    def progression(self, node: Node, key: str, problems: Problems) -> list[float]:
        whole, example = self.number.whole, "2" if self.number.whole else "0.1"
        by_step, by_times = NumberField(1 if whole else 1e-6, 1e9, example, whole), NumberField(1 + 1e-6, 1e9, example)
        kinds = {"from": self.number, "to": self.number, "step": by_step, "times": by_times}
        nodes = ObjectField(dict.fromkeys(("from", "to"), self.number), kinds).members(node, key, problems)

        def wrong(name: str, reason: str) -> list[float]:
            problems.add(nodes[name], join(key, name), reason)
            return []

        if "from" not in nodes or "to" not in nodes:
            return []
        if ("step" in nodes) == ("times" in nodes):
            problems.add(node, key, "expected either step or times with from and to")
            return []
        how = "step" if "step" in nodes else "times"
        start, end, by = (kinds[name].read(nodes[name], join(key, name), problems) for name in ("from", "to", how))
        if start is None or end is None or by is None:
            return []
        if end < start:
            return wrong("to", f"expected at least the start {start:g}, got {end:g}")
        if how == "times" and start <= 0:
            return wrong("from", f"expected a start above 0 to multiply, got {start:g}")
        many = (math.log(end / start) / math.log(by) if how == "times" else (end - start) / by) + 1e-9
        if many >= MOST_POINTS:
            return wrong(how, f"makes more than {MOST_POINTS} values; take a larger one")
        values = (start * by**i if how == "times" else start + i * by for i in range(int(many) + 1))
        return [round(v) if whole else round(v, 9) for v in values]


class _Family:
    """A family's name, "all", or a mapping of names to options."""

    def read(self, node: Node, key: str, problems: Problems) -> tuple[Pruning, ...]:
        if node.kind != "mapping":
            text = TextField((*FAMILIES, "all")).read(node, key, problems)
            return tuple(Pruning.of(name) for name in (general_families() if text == "all" else [text]) if name)
        found = []
        for name, (key_node, value) in node.entries.items():
            family = TextField(tuple(FAMILIES)).read(key_node, join(key, name), problems)
            if family:
                found.append(Pruning.of(family, options=self.options(value, join(key, name), family, problems)))
        return tuple(found)

    def options(self, node: Node, key: str, family: str, problems: Problems) -> dict[str, Any]:
        known = dict.fromkeys(FAMILIES[family].options, _Option())
        options = dict(sorted(ObjectField({}, known).read(node, key, problems).items()))
        if not len(problems):
            try:
                prune(lower(load_model(_SMALL), phase="generate", seq=64, new_tokens=1), family, 0.5, **options)
            except InputError as error:
                problems.add(node, key, str(error))
        return options


class _Families:
    """An axis of families."""

    def read(self, node: Node, key: str, problems: Problems) -> tuple[Pruning, ...]:
        groups = _Axis(_Family()).read(node, key, problems)
        return tuple(dict.fromkeys(choice for group in groups for choice in group))


class _Option:
    """A whole number, a number, true, false, a word, or a list of these; the family checks the value."""

    def read(self, node: Node, key: str, problems: Problems) -> Any:
        if node.kind == "list":
            return ListField(self).read(node, key, problems)
        if node.kind == "mapping":
            problems.add(node, key, "expected a value, got a mapping")
            return None
        if node.text in ("true", "false") and not node.quoted:
            return node.text == "true"
        value = math.nan if node.quoted else _number_of(node)
        if math.isnan(value):
            return TextField().read(node, key, problems)
        return int(value) if value.is_integer() and "." not in node.text and "e" not in node.text.lower() else value


class _Formats:
    """A dtype, or a mapping with a dtype and optionally the two other formats."""

    def read(self, node: Node, key: str, problems: Problems) -> Formats | None:
        dtype = TextField(DTYPES)
        if node.kind != "mapping":
            text = dtype.read(node, key, problems)
            return Formats(text) if text else None
        keys = ObjectField({"dtype": dtype}, {"weight_dtype": dtype, "kv_dtype": dtype}, Formats)
        formats: Formats | None = keys.read(node, key, problems)
        return formats


def _number_of(node: Node) -> float:
    try:
        return float(node.text)
    except ValueError:
        return math.nan


def _model(text: str) -> str:
    load_model(text)
    return text


def _method(text: str) -> str:
    load_method(text)
    return text


def _text(text: str) -> str:
    Pruning.read(text)
    return text


def _engine(text: str) -> str:
    load_engine(text)
    return text


PART_ROWS = 40_000  # configurations of a piece, about: a few megabytes of table
OPERATOR_ROWS = 120_000  # operators of a piece, about: 25 MB of columns, 100 MB during computation
REQUESTS = 64  # (batch, seq) pruned together

Piece = tuple[Scenario, tuple[Pruning, ...]]
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

    # names, paths or loaded models
    models: Annotated[tuple[str | ModelConfig, ...], _Axis(CheckedField(TextField(), _model))]
    # names, aliases, paths or loaded profiles
    hardware: Annotated[tuple[str | HardwareProfile, ...], _Axis(CheckedField(TextField(), reference))]
    sparsities: Annotated[tuple[float, ...], _Numbers(NumberField(-1e9, 1e9, "0.25"), check_fraction)]
    phases: Annotated[tuple[str, ...], _Axis(TextField(PHASES))]
    batches: Annotated[tuple[int, ...], _Numbers(NumberField(1, MAX_TOKENS, "64", whole=True))]
    # tokens (prefill) or cached positions (decode) of each sequence
    seqs: Annotated[tuple[int, ...], _Numbers(NumberField(1, MAX_TOKENS, "64", whole=True))]
    # all families if no families, methods or texts are given; methods are appended
    families: Annotated[tuple[Pruning, ...], _Families()] = ()
    dtypes: Annotated[tuple[Formats, ...], _Axis(_Formats())] = (Formats(),)
    engines: Annotated[tuple[str, ...], _Axis(CheckedField(TextField(), _engine))] = (DEFAULT_ENGINE,)  # names or paths
    devices: Annotated[tuple[int, ...], _Numbers(NumberField(1, 100_000, "2", whole=True))] = (1,)
    methods: Annotated[tuple[str, ...], _Axis(CheckedField(TextField(), _method))] = ()
    # texts of --prune and paths of plans, without an axis of sparsities
    prune: Annotated[tuple[str, ...], _Axis(CheckedField(TextField(), _text))] = ()
    # as in a scenario, for the whole grid
    parallel: Annotated[str, TextField(PARALLEL)] = "tensor"
    link: Annotated[str | None, CheckedField(TextField(), _link)] = None
    new_tokens: Annotated[int, NumberField(1, 1_000_000, "128", whole=True)] = 128
    cached_prefix: Annotated[float, NumberField(0, MAX_TOKENS, "512")] = 0.0
    token_budget: Annotated[int | None, NumberField(1, MAX_TOKENS, "8192", whole=True)] = None
    ideal: bool = False
    level: Annotated[float, NumberField(0.01, 0.999, "0.9")] = 0.9

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
        """Number of configurations."""
        return len(self.prunings) * math.prod(len(getattr(self, name)) for name in AXES)

    @cached_property
    def prunings(self) -> tuple[Pruning, ...]:
        """Every family and method at every sparsity (with a budget of tokens: once), then the texts."""
        every = (p.at(s) for p in self.families for s in ((None,) if p.budgeted else self.sparsities))
        return once((*every, *map(Pruning.read, self.prune)))

    def scenario(
        self,
        model: str | ModelConfig,
        formats: Formats,
        engine: str,
        devices: int,
        phase: str,
        shapes: tuple[tuple[int, int], ...],
    ) -> Scenario:
        """Return a scenario of the grid with some shapes."""
        return Scenario(
            model=model,
            phase=phase,
            shapes=shapes,
            new_tokens=self.new_tokens,
            cached_prefix=self.cached_prefix,
            token_budget=self.token_budget,
            engine=engine,
            dtype=formats.dtype,
            weight_dtype=formats.weight_dtype,
            kv_dtype=formats.kv_dtype,
            devices=devices,
            parallel=self.parallel,
            link=self.link,
            ideal=self.ideal,
            level=self.level,
        )

    def pieces(self) -> Iterator[Piece]:
        """Yield pieces of bounded memory in the order of the rows: by model, format, engine, devices, phase, then
        groups of requests by length and batch, then groups of families and sparsities."""
        shapes = [(b, s) for s in self.seqs for b in self.batches]
        axes = itertools.product(self.models, self.dtypes, self.engines, self.devices, self.phases)
        for model, formats, engine, devices, phase in axes:
            operators = {"generate": 60 + 2 * min(self.new_tokens, 2 * DECODE_LENGTHS), "serve": 60}.get(phase, 30)
            workloads = max(1, min(PART_ROWS // len(self.hardware), OPERATOR_ROWS // operators))
            many = min(len(shapes), REQUESTS, workloads)
            of_prunings = max(1, workloads // many)
            if of_prunings >= len(self.prunings):  # few prunings: take more requests
                many = max(1, min(len(shapes), 4 * REQUESTS, workloads // len(self.prunings)))
            for some, chosen in itertools.product(_even(shapes, many), _even(self.prunings, of_prunings)):
                yield self.scenario(model, formats, engine, devices, phase, tuple(some)), tuple(chosen)

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
        known = replace(field_of(Grid), make=None)
        if "prune" in root.entries and not {"families", "methods"} & root.entries.keys():
            required = dict(known.required)
            optional = {**known.optional, "sparsities": required.pop("sparsities")}
            known = replace(known, required=required, optional=optional)
        axes = known.read(root, "", problems)
        if not len(problems):
            grid = Grid(**{"sparsities": (), **axes})
            if set(grid.phases) == {"decode"}:
                return grid
            batch, seq = max(grid.batches), max(grid.seqs)
            if batch * seq > MAX_TOKENS:
                reason = f"batch {batch} x seq {seq}: expected at most {MAX_TOKENS} tokens in a pass"
                problems.add(root.entries["seqs"][1], "seqs", reason)
            try:
                cached_tokens(grid.cached_prefix, min(grid.seqs))
            except InputError as error:
                key = "cached_prefix"
                problems.add(root.entries[key][1], key, str(error).removeprefix(f"{key}: "))
            if not len(problems):
                return grid
    # an unknown key is reported before the missing key that it may stand for
    raise first_of(sorted(problems.lines, key=lambda line: line.endswith(": is missing")))
