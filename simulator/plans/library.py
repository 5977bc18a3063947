"""Libraries: the variants of each layer of a model, and values that were measured of them, such as scores.

Use :func:`read_library` for a file, :func:`generated_library` for the usual variants. Formats are chosen by content:

- CSV with the columns ``layer`` (``3``, ``0-7``, ``all``), ``attention`` and ``mlp`` (texts of
  :mod:`simulator.plans.variants`; a missing column or an empty cell is the dense sublayer) and any columns of numbers:
  scores and times. ``kv_heads`` and ``ffn_intermediate_size`` are accepted instead of ``attention`` and ``mlp``; 0 is
  none. A column ``results`` names results files of lm-evaluation-harness, one per row. Texts in columns ``protocol``
  and ``source`` are ignored.
- YAML with lists of choices, for all layers and for some::

    attention: [dense, kv=4, none]
    mlp: [dense, 7168, none]
    layers:
      0-1: {mlp: [dense]}

- JSON of Puzzle and of ModelOpt's Puzzletron (:mod:`simulator.plans.puzzletron`).

In a library the first variant of every layer is the dense one.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from simulator.arguments import shown
from simulator.arrays import FloatArray
from simulator.errors import InputError, one_line, unknown
from simulator.files.csv import CsvTable, read_csv
from simulator.files.read import read_bounded
from simulator.files.yaml import Node, Problems, first_of, parse_yaml
from simulator.models.block import Block
from simulator.models.config import ModelConfig
from simulator.models.difference import runs
from simulator.plans.entries import MOST_BYTES, Entry
from simulator.plans.variants import SUBLAYERS, generated, joined, text_of, variant

EXAMPLES = Path(__file__).with_name("examples")
"""Libraries that ship, by name; a .md file next to each states how it was measured."""

MOST_VARIANTS = 4096
"""Largest number of variants of one layer."""

ZERO_METRICS: tuple[str, ...] = ("kl", "mse", "cosine", "distance", "delta", "loss_increase", "score")
"""Parts of names of scores that are 0 for the dense model, so that its row may be missing."""

_ALIASES: Mapping[str, str] = {"kv_heads": "attention", "ffn_intermediate_size": "mlp"}
_NAMES = ("layer", *SUBLAYERS, *_ALIASES, "results", "protocol", "source")


@dataclass(frozen=True, eq=False)
class Library:
    """Variants of the layers of a model, and values of each variant.

    Parameters
    ----------
    model : ModelConfig
        The dense model.
    layers : tuple of tuple of Block
        Variants of each layer; the first is the dense layer.
    values : mapping of str to tuple of array
        Columns by name: one array per layer, with one value per variant. NaN: unknown.
    notes : tuple of str
        What was assumed when the library was read.
    source : str
        Its file, in messages; "": made by a program.
    """

    model: ModelConfig
    layers: tuple[tuple[Block, ...], ...]
    values: Mapping[str, tuple[FloatArray, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    source: str = ""

    def __len__(self) -> int:
        return sum(map(len, self.layers))

    def texts(self, layer: int) -> list[tuple[str, str]]:
        """Return the texts of attention and MLP of each variant of a layer."""
        dense = self.model.layout[layer]
        return [(text_of("attention", b, dense), text_of("mlp", b, dense)) for b in self.layers[layer]]

    def take(self, keep: Sequence[Sequence[int]]) -> Library:
        """Return the library with some variants of each layer, by their indices."""
        layers = tuple(tuple(own[i] for i in some) for own, some in zip(self.layers, keep))
        values = {
            name: tuple(own[list(some)] for own, some in zip(column, keep)) for name, column in self.values.items()
        }
        return replace(self, layers=layers, values=values)


def read_library(source: str | Path, model: ModelConfig) -> Library:
    """Return the library of a file, or of a folder of Puzzletron; the format follows from the content.

    Parameters
    ----------
    source : str or Path
        CSV, YAML or JSON file, or the folder of Puzzletron's single-block validations; or the name of a library that
        ships (``smollm2-135m``).
    model : ModelConfig
        The dense model.

    Returns
    -------
    Library
        Variants of each layer, and their values.

    Raises
    ------
    InputError
        One line that names the place: a variant that does not fit the model, a layer without variants or with one
        twice, a value that is not a number, unknown keys, or a file that is too large.
    """
    path = Path(source).expanduser()
    if os.path.isfile(shipped := EXAMPLES / f"{source}.csv") and not os.path.exists(path):
        path = shipped
    if os.path.isdir(path):  # those of pathlib raise OSError for names that are too long
        from simulator.plans.puzzletron import read_folder

        return library_of(read_folder(path, model), model, str(path))
    content = read_bounded(path, MOST_BYTES)
    start = content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if start in (b"[", b"{"):
        from simulator.plans.puzzletron import read_json

        return library_of(read_json(content, str(path), model), model, str(path))
    if path.suffix in (".yaml", ".yml"):
        return _choices(content, str(path), model)
    return library_of(_rows(read_csv(content, str(path), ("layer",)), model, path.parent), model, str(path))


def generated_library(model: ModelConfig, devices: int = 1) -> Library:
    """Return the usual variants of each layer (:func:`simulator.plans.variants.generated`).

    >>> from simulator.models.library import load_model
    >>> len(generated_library(load_model("llama-3.1-8b")).layers[0])
    45
    """
    return Library(model, tuple(_product(model, dense, {}, devices) for dense in model.layout))


def _product(
    model: ModelConfig, dense: Block, given: Mapping[str, Sequence[Block]], devices: int = 1
) -> tuple[Block, ...]:
    """Return all combinations of the given, else the usual, variants of both sublayers; the dense one first."""
    own = [given.get(name) or tuple(generated(name, model, dense, devices)) for name in SUBLAYERS]
    return tuple(dict.fromkeys([dense, *(joined(a, m) for a, m in itertools.product(*own))]))


# -- rows --------------------------------------------------------------------------------------------------------------


def library_of(entries: Iterable[Entry], model: ModelConfig, label: str) -> Library:
    """Return the library of rows; the dense variant of a layer is added where it may be missing."""
    found: list[dict[Block, Entry]] = [{} for _ in range(model.layers)]
    names: dict[str, None] = {}
    for entry in entries:
        dense = model.layout[entry.layer]
        first = found[entry.layer].setdefault(entry.block, entry)
        if first is not entry:
            texts = [f"{name} {text_of(name, entry.block, dense)}" for name in SUBLAYERS]
            twice = f"layer {entry.layer} has {', '.join(texts)} twice, first at {first.place}"
            raise InputError(f"{entry.place}: {twice}; keep one")
        if len(found[entry.layer]) > MOST_VARIANTS:
            raise InputError(f"{entry.place}: layer {entry.layer}: expected at most {MOST_VARIANTS} variants")
        names |= dict.fromkeys(entry.values)
    if missing := [i for i, some in enumerate(found) if not some]:
        have = model.layers - len(missing)
        raise InputError(
            f"{label}: expected variants of all {model.layers} layers of {model.name}, got {have}; "
            f"layers {runs(missing)} have none"
        )
    layers, added = [], []
    for i, some in enumerate(found):
        dense = model.layout[i]
        if dense not in some:
            added.append(i)
        layers.append(tuple(dict.fromkeys([dense, *some])))
    values = {}
    for name in names:
        zero = any(part in name.lower() for part in ZERO_METRICS)
        if added and len(added) < model.layers and not zero:
            raise InputError(f"{label}: column {name}: layer {added[0]} has no row of its dense variant; add it")
        default = 0.0 if zero else math.nan
        values[name] = tuple(
            np.array([some[b].values.get(name, math.nan) if b in some else default for b in own])
            for some, own in zip(found, layers)
        )
    notes = (f"{label}: the dense variant has no row; its score is taken as 0",) if added and names else ()
    return Library(model, tuple(layers), values, notes, label)


def _rows(table: CsvTable, model: ModelConfig, folder: Path) -> Iterator[Entry]:
    """Yield the entries of a CSV."""
    header = set(table.header)
    for alias, name in _ALIASES.items():
        if alias in header and name in header:
            raise InputError(f"{table.label}:1: columns {name} and {alias} state the same; keep one")
    if not header & {*SUBLAYERS, *_ALIASES}:
        raise InputError(f"{table.label}:1: expected a column attention or mlp with the variants")
    numbers = [name for name in table.header if name and name not in _NAMES]  # pandas writes row numbers without a name
    for place, cells in table.records():
        try:
            values = {name: _number(name, cells[name]) for name in numbers if cells[name]}
            if cells.get("results"):
                values |= _harness(folder, cells["results"])
            for layer in _layers(cells["layer"], model.layers):
                block = _block(cells, model, layer)
                yield Entry(place, layer, block, values)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None


def _block(cells: Mapping[str, str], model: ModelConfig, layer: int) -> Block:
    dense = model.layout[layer]
    texts = {name: cells.get(name, "") for name in SUBLAYERS}
    if "kv_heads" in cells:
        texts["attention"] = f"kv={cells['kv_heads']}" if cells["kv_heads"] else ""
    if "ffn_intermediate_size" in cells:
        texts["mlp"] = cells["ffn_intermediate_size"]
    return joined(*(variant(name, texts[name], dense) for name in SUBLAYERS))


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{name}: expected a number, got {one_line(text, 40)!r}") from None
    if not abs(value) < 1e300:
        raise InputError(f"{name}: expected a finite number, got {one_line(text, 40)}")
    return value


def _layers(text: str, many: int) -> range:
    first, _, last = text.partition("-")
    if text.strip().lower() == "all":
        return range(many)
    ends = [part.strip() for part in (first, last or first)]
    if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in ends) or int(ends[0]) > int(ends[1]):
        raise InputError(f"layer: expected a number, a range such as 0-7, or all, got {one_line(text, 40)!r}")
    if int(ends[1]) >= many:
        raise InputError(f"layer: expected numbers from 0 to {many - 1}, got {ends[1]}")
    return range(int(ends[0]), int(ends[1]) + 1)


def _harness(folder: Path, name: str) -> dict[str, float]:
    """Return the metrics in results of lm-evaluation-harness; a loss is a rise."""
    from simulator.prediction.harness import read_results

    _, found = read_results(folder, name)
    return {key: v.value * (-1.0 if v.higher_is_better else 1.0) for key, v in found.items()}


# -- choices -----------------------------------------------------------------------------------------------------------


def _choices(content: bytes, label: str, model: ModelConfig) -> Library:
    """Return the library of a YAML file of choices, without values."""
    problems = Problems(label)
    try:
        root = parse_yaml(content.decode("utf-8-sig"), problems)
    except UnicodeDecodeError as error:
        raise InputError(f"{label}: is not UTF-8 text (byte {error.start}); expected YAML") from None
    if root is None or root.kind != "mapping":
        if not len(problems):
            problems.add(root, "file", "expected the keys attention, mlp or layers")
        raise InputError(problems.lines[0])
    own: list[dict[str, tuple[Block, ...]]] = [_lists(root, model, i, problems, "") for i in range(model.layers)]
    layers = root.entries.get("layers")
    taken: set[int] = set()
    if layers is not None:
        if layers[1].kind != "mapping":
            problems.add(layers[1], "layers", f"expected lists of variants by layers such as 0-1, got {layers[1]}")
        for text, (key, value) in layers[1].entries.items():
            try:
                some = [i for part in text.split(",") for i in _layers(part.strip(), model.layers)]
            except InputError as error:
                problems.add(key, f"layers.{text}", str(error))
                continue
            if again := taken.intersection(some):
                problems.add(key, f"layers.{text}", f"layer {min(again)} is listed twice")
            taken.update(some)
            for i in some:
                own[i] |= _lists(value, model, i, problems, f"layers.{text}.")
    if len(problems):
        raise first_of(problems.lines)
    layout = tuple(_product(model, dense, given) for dense, given in zip(model.layout, own))
    for i, variants in enumerate(layout):
        if len(variants) > MOST_VARIANTS:
            raise InputError(f"{label}: layer {i}: expected at most {MOST_VARIANTS} variants, got {len(variants)}")
    return Library(model, layout, source=label)


def _lists(node: Node, model: ModelConfig, layer: int, problems: Problems, where: str) -> dict[str, tuple[Block, ...]]:
    """Return the variants of a layer by sublayer that a mapping lists; each problem is noted once, at layer 0."""
    keys, found = (*SUBLAYERS, "layers") if not where else SUBLAYERS, {}
    if node.kind != "mapping":
        problems.add(node, where.rstrip("."), f"expected lists of variants by sublayer, got {node}")
        return {}
    for name, (key, value) in node.entries.items():
        if name not in keys:
            problems.add(key, where + name, str(unknown("key", name, keys)))
        elif name in SUBLAYERS:
            if value.kind != "list" or not value.items:
                problems.add(value, where + name, f"expected a list of variants, got {value}")
            found[name] = tuple(_listed(value.items, name, model.layout[layer], problems, where + name))
    return found


def _listed(items: Iterable[Node], name: str, dense: Block, problems: Problems, where: str) -> Iterator[Block]:
    for i, item in enumerate(items):
        try:
            if item.kind != "scalar":
                raise InputError(f"expected a text such as none, got {item}")
            yield variant(name, item.text, dense)
        except InputError as error:
            problems.add(item, f"{where}.{i}", str(error))


def groups_of(text: str | int | None, layers: int) -> tuple[tuple[int, ...], ...]:
    """Return groups of layers that share one variant: of a number of consecutive layers, or as listed; others alone.

    >>> groups_of(2, 5), groups_of("0-1,3-4", 5)
    (((0, 1), (2, 3), (4,)), ((0, 1), (2,), (3, 4)))
    """
    if text is None:
        return tuple((i,) for i in range(layers))
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise InputError(f"groups: expected a number of layers, or ranges such as 0-3,4-7, got {shown(text)}")
    words = str(text).strip()
    if isinstance(text, int) or (words.isascii() and words.isdigit()):
        size = int(words) if len(words) < 10 else 0  # Python refuses to read numbers of thousands of digits
        if not 1 <= size <= layers:
            raise InputError(f"groups: expected 1 to {layers} layers in a group, got {one_line(words, 40)}")
        return tuple(tuple(range(i, min(i + size, layers))) for i in range(0, layers, size))
    found: dict[int, tuple[int, ...]] = {}
    for part in words.split(","):
        try:
            group = tuple(_layers(part.strip(), layers))
        except InputError as error:
            raise InputError(f"groups: {error}") from None
        for i in group:
            if found.setdefault(i, group) is not group:
                raise InputError(f"groups: layer {i} is in two groups; expected one")
    return tuple(dict.fromkeys(found.get(i, (i,)) for i in range(layers)))


def combined(library: Library) -> Library:
    """Return the library with variants of both sublayers of a layer, where it has them of either alone.

    The value of both together is the sum of both changes: scores of single replacements are added here as they are over
    layers. Layers that have a row with both changed stay as they are.
    """
    layers, values = [], {name: list[FloatArray]() for name in library.values}
    for layer, own in enumerate(library.layers):
        texts = library.texts(layer)
        single = {text: i for i, text in enumerate(texts)}
        pairs = [(i, i) for i in range(len(own))]
        if not any("dense" not in text for text in texts):
            pairs += [
                (single[a, "dense"], single["dense", m])
                for (a, _), (_, m) in itertools.product(texts, texts)
                if "dense" not in (a, m) and (a, "dense") in single and ("dense", m) in single
            ]
            pairs = list(dict.fromkeys(pairs))
        layers.append(tuple(joined(own[i], own[j]) if i != j else own[i] for i, j in pairs))
        first, second = np.array(pairs, dtype=np.intp).T
        for name, column in library.values.items():
            both = column[layer][first] + column[layer][second] - column[layer][0]
            values[name].append(np.where(first == second, column[layer][first], both))
    return replace(library, layers=tuple(layers), values={name: tuple(column) for name, column in values.items()})


def check_values(library: Library, name: str) -> tuple[FloatArray, ...]:
    """Return a column of a library; InputError if it is missing or unknown for a variant."""
    where = f"{library.source}: " if library.source else ""
    if name not in library.values:
        if library.values:
            raise InputError(f"{where}{unknown('score', name, library.values)}")
        raise InputError(f"{where or 'scores: '}the library has no scores; expected a column of numbers such as kl_div")
    for layer, column in enumerate(library.values[name]):
        if (wrong := np.flatnonzero(~np.isfinite(column))).size:
            attention, mlp = library.texts(layer)[int(wrong[0])]
            raise InputError(f"{where}{name}: layer {layer} has no value for attention {attention}, mlp {mlp}")
    return library.values[name]
