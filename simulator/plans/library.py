"""Libraries: the variants of each layer of a model, and values that were measured of them, such as
scores.

:func:`read_library` reads a CSV with the columns ``layer`` (``3``, ``0-7``, ``all``), ``attention``
and ``mlp`` (texts of :mod:`simulator.plans.variants`; a missing column or an empty cell is the
dense sublayer) and any columns of numbers: scores, times and sizes. Without columns of variants, a
row is the removal of its layer (``layer,score``). Layers without rows stay dense. A column
``results`` names results files of lm-evaluation-harness. Texts in ``protocol`` and ``source`` are
ignored. The first variant of every layer is the dense one.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from simulator.arrays import FloatArray, IndexArray
from simulator.display import few, runs
from simulator.errors import InputError, unknown
from simulator.files.csv import CsvTable, read_csv
from simulator.files.read import read_bounded
from simulator.models.library import load_model
from simulator.models.model import Layer, Model
from simulator.plans.variants import SUBLAYERS, generated, joined, text_of, variant
from simulator.prediction.quality import number_of, read_results
from simulator.pruning import listed_layers
from simulator.pruning._steps import layer_numbers

MOST_BYTES = 20_000_000  # size of a library: 96 layers with 64 variants take 0.5 MB


@dataclass(frozen=True)
class Entry:
    """A row of a library: a variant of a layer with its values, and its place in the file."""

    place: str
    layer: int
    variant: Layer
    values: Mapping[str, float]


# libraries that ship; a .md file next to each states its protocol
EXAMPLES = Path(__file__).with_name("examples")
MOST_VARIANTS = 4096  # variants of one layer

ZERO_METRICS: tuple[str, ...] = (
    "kl",
    "mse",
    "cosine",
    "distance",
    "delta",
    "loss_increase",
    "score",
    "importance",
)
"""Parts of names of scores that are 0 for the dense model, so that its row may be missing."""

_TIMES = r"times?|ns|us|ms|s|sec|seconds"
_SIZES = (
    r"memory|bytes|params?|parameters|flops|macs|num|number|count|size|kib|mib|gib|kb|mb|gb|heads"
    r"|width"
)
NO_SCORE = re.compile(
    rf"runtime|latency|^times?[ _]|memory|^(num|number|count)[ _]|(^|[ _./-])({_TIMES}|{_SIZES})$",
    re.IGNORECASE,
)
"""Names of columns that hold times, sizes, memory or counts."""

_NAMES = ("layer", *SUBLAYERS, "results", "protocol", "source")


@dataclass(frozen=True, eq=False)
class Library:
    model: Model
    layers: tuple[tuple[Layer, ...], ...]  # variants of each layer; the first is the dense layer
    # by layer and variant; NaN: unknown
    values: Mapping[str, tuple[FloatArray, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what was assumed when the library was read
    source: str = ""  # its file, in messages

    def __len__(self) -> int:
        return sum(map(len, self.layers))

    def texts(self, layer: int) -> list[tuple[str, str]]:
        dense = self.model.layers[layer]
        return [
            (text_of("attention", one, dense), text_of("mlp", one, dense))
            for one in self.layers[layer]
        ]

    @cached_property
    def owner(self) -> IndexArray:
        """The layer of each variant (V,); those of a layer are next to each other."""
        return np.repeat(np.arange(len(self.layers)), [len(own) for own in self.layers])

    def chosen(self, choice: IndexArray) -> tuple[Layer, ...]:
        """Return the layers of a plan, given the index (L,) of the variant of each."""
        every = list(itertools.chain(*self.layers))
        return tuple(every[v] for v in choice.tolist())

    def take(self, keep: Sequence[Sequence[int]]) -> Library:
        """Return the library with some variants of each layer, by their indices."""
        layers = tuple(tuple(own[i] for i in some) for own, some in zip(self.layers, keep))
        values = {
            name: tuple(own[list(k)] for own, k in zip(column, keep))
            for name, column in self.values.items()
        }
        return replace(self, layers=layers, values=values)


def read_library(source: str | Path, model: Model) -> Library:
    """Return the library of a file, or of a name that ships (smollm2-135m)."""
    path = Path(source).expanduser()
    if os.path.isfile(shipped := EXAMPLES / f"{source}.csv") and not os.path.exists(path):
        path = shipped
        if load_model(str(source)).layers != model.layers:
            raise InputError(f"scores: expected those of {model.name}, got those of {source}")
    table = read_csv(read_bounded(path, MOST_BYTES), str(path), ("layer",))
    found = library_of(_rows(table, model, path.parent), model, str(path))
    note = f"{path}: without a column attention or mlp, a row is the removal of its layer"
    if {*SUBLAYERS}.intersection(table.header):
        return found
    return replace(found, notes=(note, *found.notes))


def generated_library(model: Model, devices: int = 1) -> Library:
    """Return all combinations of the usual variants of both sublayers; the dense layer is first."""
    layers = []
    for dense in model.layers:
        attentions, mlps = (generated(name, dense, devices) for name in SUBLAYERS)
        layers.append(
            tuple(dict.fromkeys(itertools.starmap(joined, itertools.product(attentions, mlps))))
        )
    return Library(model, tuple(layers))


def metric_of(library: Library, metric: str) -> tuple[str, tuple[FloatArray, ...]]:
    """Return the name and the values of a library's scores: those of ``metric``, or "" for the only
    column that can be. Times, sizes, memory and counts are never scores. InputError if several
    columns could be, or a value is missing."""
    where = f"{library.source}: " if library.source else ""
    known = [name for name in library.values if not NO_SCORE.search(name)]
    if not known:
        others = f"only times, sizes or counts: {few(library.values)}"
        got = others if library.values else "none"
        raise InputError(f"{where}expected a column of scores such as kl_div, got {got}")
    if not metric and len(known) > 1:
        raise InputError(
            f"{where}metric: expected one of {few(known)}, got none; choose it with --metric"
        )
    name = metric or known[0]
    if name in library.values and name not in known:
        wanted = f"expected a score such as {known[0]}, got a time, size or count"
        raise InputError(f"{where}metric {name}: {wanted}")
    if name not in known:
        raise InputError(f"{where}{unknown('metric', name, known)}")
    for layer, column in enumerate(library.values[name]):
        if (wrong := np.flatnonzero(~np.isfinite(column))).size:
            attention, mlp = library.texts(layer)[int(wrong[0])]
            dense = (
                "; if it is 0 for the dense model, call the column score"
                if attention == mlp == "dense"
                else ""
            )
            raise InputError(
                f"{where}{name}: layer {layer} has no value for attention {attention}, mlp"
                f" {mlp}{dense}"
            )
    return name, library.values[name]


def library_of(entries: Iterable[Entry], model: Model, label: str) -> Library:
    """Return the library of rows; the dense variant of a layer is added where it may be missing."""
    found: list[dict[Layer, Entry]] = [{} for _ in model.layers]
    names: dict[str, None] = {}
    for entry in entries:
        dense = model.layers[entry.layer]
        first = found[entry.layer].setdefault(entry.variant, entry)
        if first is not entry:
            texts = [f"{name} {text_of(name, entry.variant, dense)}" for name in SUBLAYERS]
            twice = f"layer {entry.layer} has {', '.join(texts)} twice, first at {first.place}"
            raise InputError(f"{entry.place}: {twice}; keep one")
        if len(found[entry.layer]) > MOST_VARIANTS:
            raise InputError(
                f"{entry.place}: layer {entry.layer}: expected at most {MOST_VARIANTS} variants"
            )
        names |= dict.fromkeys(entry.values)
    missing = [i for i, some in enumerate(found) if not some]
    layers, added = [], []
    for i, some in enumerate(found):
        dense = model.layers[i]
        if some and dense not in some:
            added.append(i)
        layers.append(tuple(dict.fromkeys([dense, *some])))
    values = {}
    for name in names:
        zero = any(part in name.lower() for part in ZERO_METRICS)
        if added and len(added) + len(missing) < len(model.layers) and not zero:
            raise InputError(
                f"{label}: column {name}: layer {added[0]} has no row of its dense variant; add it"
            )
        default = 0.0 if zero else math.nan
        values[name] = tuple(
            np.array(
                [
                    some[b].values.get(name, math.nan) if b in some else default if some else 0.0
                    for b in own
                ]
            )
            for some, own in zip(found, layers)
        )
    notes = (
        [f"{label}: the dense variant has no row; its score is taken as 0"]
        if added and names
        else []
    )
    notes += [f"{label}: layers {runs(missing)} have no row; they stay dense"] if missing else []
    return Library(model, tuple(layers), values, tuple(notes), label)


def _rows(table: CsvTable, model: Model, folder: Path) -> Iterator[Entry]:
    # pandas writes row numbers without a name
    numbers = [name for name in table.header if name and name not in _NAMES]
    for place, cells in table.records():
        try:
            values = {name: number_of(cells, name) for name in numbers if cells[name]}
            if cells.get("results"):
                _, found = read_results(folder, cells["results"])
                # a loss is a rise
                values |= {
                    key: v.value * (-1.0 if v.higher_is_better else 1.0) for key, v in found.items()
                }
            for layer in _layers(cells["layer"], len(model.layers)):
                dense = model.layers[layer]
                yield Entry(place, layer, joined(*_variants(cells, dense)), values)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None


def _variants(cells: Mapping[str, str], dense: Layer) -> Iterator[Layer]:
    """Yield the variants of attention and MLP of a row."""
    default = "dense" if {*SUBLAYERS}.intersection(cells) else "none"
    for name in SUBLAYERS:
        yield variant(name, cells.get(name, default), dense)


def _layers(text: str, many: int) -> tuple[int, ...]:
    """Return the layers of a text such as ``3``, ``0-7`` or ``all`` of a model of ``many``."""
    if text.lower() == "all":
        return tuple(range(many))
    return tuple(listed_layers(layer_numbers(text), many).tolist())


def combined(library: Library) -> Library:
    """Return the library with variants of both sublayers of a layer, where it has them of either
    alone. The value of both together is the sum of both changes: scores of single replacements are
    added here as they are over layers. Layers that have a row with both changed stay as they
    are."""
    layers, values = [], {name: list[FloatArray]() for name in library.values}
    for layer, own in enumerate(library.layers):
        pairs = _pairs(library.texts(layer))
        layers.append(tuple(joined(own[i], own[j]) if i != j else own[i] for i, j in pairs))
        first, second = np.array(pairs, dtype=np.intp).T
        for name, column in library.values.items():
            both = column[layer][first] + column[layer][second] - column[layer][0]
            values[name].append(np.where(first == second, column[layer][first], both))
    return replace(
        library,
        layers=tuple(layers),
        values={name: tuple(column) for name, column in values.items()},
    )


def _pairs(texts: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """Return the variants of a layer, and those of its attention with those of its MLP, as indices
    of the two that make each."""
    pairs = [(i, i) for i in range(len(texts))]
    if all("dense" in text for text in texts):
        attentions, mlps = (
            [i for i, text in enumerate(texts) if text[part] != "dense"] for part in (0, 1)
        )
        pairs += itertools.product(attentions, mlps)
    return pairs
