"""Libraries: the variants of each layer of a model, and values that were measured of them, such as scores.

:func:`read_library` reads files of these formats, told apart by their content. The first variant of every layer is the
dense one.

- CSV with the columns ``layer`` (``3``, ``0-7``, ``all``), ``attention`` and ``mlp`` (texts of
  :mod:`simulator.plans.variants`; a missing column or an empty cell is the dense sublayer) and any columns of numbers:
  scores and times. ``kv_heads`` and ``ffn_intermediate_size`` are accepted instead of ``attention`` and ``mlp``; 0 is
  none. A column ``results`` names results files of lm-evaluation-harness. Texts in ``protocol`` and ``source`` are
  ignored.
- YAML with lists of choices, of all layers (``mlp: [dense, 7168, none]``) and of some
  (``layers: {0-1: {mlp: [dense]}}``).
- Puzzle's ``block_library.json``, and the folder of Puzzletron's validations (:mod:`simulator.plans.puzzle`).
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from simulator.arguments import shown
from simulator.arrays import FloatArray
from simulator.display import runs
from simulator.errors import InputError, one_line, unknown
from simulator.files.csv import CsvTable, read_csv
from simulator.files.read import read_bounded
from simulator.files.yaml import Node, Problems, first_of, parse_yaml
from simulator.models.config import Block, ModelConfig
from simulator.models.library import load_model
from simulator.plans.puzzle import MOST_BYTES, Entry, read_puzzle, read_validations
from simulator.plans.variants import SUBLAYERS, generated, joined, text_of, variant, without
from simulator.units import percent

EXAMPLES = Path(__file__).with_name("examples")  # libraries that ship; a .md file next to each states its protocol
MOST_VARIANTS = 4096  # of one layer

ZERO_METRICS: tuple[str, ...] = ("kl", "mse", "cosine", "distance", "delta", "loss_increase", "score")
"""Parts of names of scores that are 0 for the dense model, so that its row may be missing."""

TIME = re.compile(r"runtime|latency|^times?[ _]|(^|[ _./-])(times?|ns|us|ms|s|sec|seconds)$", re.IGNORECASE)
_SIZES = r"memory|bytes|params?|parameters|flops|macs|num|number|count|size|kib|mib|gib|kb|mb|gb|heads|width"
SIZE = re.compile(rf"memory|^(num|number|count)[ _]|(^|[ _./-])({_SIZES})$", re.IGNORECASE)
"""Names of columns that hold times; sizes, memory or counts."""

_ALIASES: Mapping[str, str] = {"kv_heads": "attention", "ffn_intermediate_size": "mlp"}
_NAMES = ("layer", *SUBLAYERS, *_ALIASES, "results", "protocol", "source")


@dataclass(frozen=True, eq=False)
class Library:
    """Variants of the layers of a model, and values of each variant."""

    model: ModelConfig
    layers: tuple[tuple[Block, ...], ...]  # variants of each layer; the first is the dense layer
    values: Mapping[str, tuple[FloatArray, ...]] = field(default_factory=dict)  # by layer and variant; NaN: unknown
    notes: tuple[str, ...] = ()  # what was assumed when the library was read
    source: str = ""  # its file, in messages

    def __len__(self) -> int:
        return sum(map(len, self.layers))

    def texts(self, layer: int) -> list[tuple[str, str]]:
        """Return the texts of attention and MLP of each variant of a layer."""
        dense = self.model.layout[layer]
        return [(text_of("attention", b, dense), text_of("mlp", b, dense)) for b in self.layers[layer]]

    def take(self, keep: Sequence[Sequence[int]]) -> Library:
        """Return the library with some variants of each layer, by their indices."""
        layers = tuple(tuple(own[i] for i in some) for own, some in zip(self.layers, keep))
        values = {name: tuple(own[list(k)] for own, k in zip(column, keep)) for name, column in self.values.items()}
        return replace(self, layers=layers, values=values)

    @property
    def times(self) -> tuple[FloatArray, ...] | None:
        """The sum of the library's own times by layer and variant, if it has times."""
        columns = [column for name, column in self.values.items() if TIME.search(name)]
        if not columns or not all(np.isfinite(own).all() for column in columns for own in column):
            return None
        return tuple(np.sum(own, axis=0) for own in zip(*columns))


def read_library(source: str | Path, model: ModelConfig) -> Library:
    """Return the library of a file, of a folder of Puzzletron's validations, or of a name that ships (smollm2-135m)."""
    path = Path(source).expanduser()
    if os.path.isfile(shipped := EXAMPLES / f"{source}.csv") and not os.path.exists(path):
        path = shipped
        if load_model(str(source)).layout != model.layout:
            raise InputError(f"scores: expected those of {model.name}, got those of {source}")
    if os.path.isdir(path):  # those of pathlib raise OSError for names that are too long
        return library_of(read_validations(path, model), model, str(path))
    content = read_bounded(path, MOST_BYTES)
    if content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"[", b"{"):
        return library_of(read_puzzle(content, str(path), model), model, str(path))
    if path.suffix in (".yaml", ".yml"):
        return _choices(content, str(path), model)
    return library_of(_rows(read_csv(content, str(path), ("layer",)), model, path.parent), model, str(path))


def generated_library(model: ModelConfig, devices: int = 1) -> Library:
    """Return the usual variants of each layer (:func:`simulator.plans.variants.generated`)."""
    return Library(model, tuple(_product(model, dense, {}, devices) for dense in model.layout))


def importance(model: ModelConfig) -> Library:
    """Return the library of whole layers of a model, with published losses of depth pruning as score.

    The shipped tables have the loss of a model by the fraction of its layers that was removed (ShortGPT, SLEB, LaCo),
    not by layer. So these scores decide how many layers go. These papers remove deep layers first, except the last.
    """
    from simulator.prediction.quality import QualityRow, load_quality

    found: dict[tuple[str, str, str], dict[float, QualityRow]] = {}
    for row in load_quality("published").rows:
        own = row.family == "depth" and row.model.lower() == model.name.lower()
        if own and row.sparsity > 0.0 and not row.options:
            found.setdefault((row.method, row.metric, row.protocol), {})[row.sparsity] = row
    if not found:
        way = "give a file of scores, or measure them with prunesim quality --per-layer"
        raise InputError(f"scores: no published loss of depth pruning for {model.name}; {way}")
    best = max(found.values(), key=lambda rows: (len(rows), "accuracy" in next(iter(rows.values())).metric))
    rows, many = [best[sparsity] for sparsity in sorted(best)], model.layers
    removed = [0.0, *(row.sparsity * many for row in rows)]
    losses = [0.0, *(row.relative_loss for row in rows)]
    slope = np.diff(losses) / np.diff(removed)
    at = np.clip(np.searchsorted(removed[1:], np.arange(many) + 0.5), 0, len(slope) - 1)
    each = np.maximum.accumulate(np.maximum(slope[at], 0.0))  # the next layer never costs less
    each *= 1.0 + 1e-6 * np.arange(many)  # so that the order decides between equal ones
    values = {layer: float(each[i]) for i, layer in enumerate([*range(many - 2, -1, -1), many - 1])}
    layers = tuple((dense, without("attention", without("mlp", dense))) for dense in model.layout)
    scores = tuple(np.array([0.0, values[i]]) for i in range(many))
    first = rows[0]
    note = (
        f"scores: published losses of {first.method} on {first.model} ({first.metric}, {first.source}) by number of "
        f"removed layers, extrapolated beyond {percent(rows[-1].sparsity)}; deep layers go first, except the last"
    )
    return Library(model, layers, {"relative loss": scores}, (note,))


def _product(
    model: ModelConfig, dense: Block, given: Mapping[str, Sequence[Block]], devices: int = 1
) -> tuple[Block, ...]:
    """Return all combinations of the given, else the usual, variants of both sublayers; the dense one first."""
    own = [given.get(name) or tuple(generated(name, model, dense, devices)) for name in SUBLAYERS]
    return tuple(dict.fromkeys([dense, *(joined(a, m) for a, m in itertools.product(*own))]))


def metric_of(library: Library, metric: str) -> tuple[str, tuple[FloatArray, ...]]:
    """Return the name and the values of a library's scores: those of ``metric``, or "" for the only column that can be.

    Times, sizes, memory and counts are never scores. InputError if several columns could be, or a value is missing.
    """
    where = f"{library.source}: " if library.source else ""
    known = [name for name in library.values if not TIME.search(name) and not SIZE.search(name)]
    if not library.values:
        raise InputError(f"{where or 'scores: '}the library has no scores; expected a column of numbers such as kl_div")
    if not known:
        names = _listed_names(library.values)
        raise InputError(f"{where}expected a column of scores, got only times, sizes or counts: {names}")
    if not metric and len(known) > 1:
        raise InputError(f"{where}metric: expected one of {_listed_names(known)}, got none; choose it with --metric")
    name = metric or known[0]
    if name in library.values and name not in known:
        wanted = f"expected a score such as {known[0]}, got a time, size or count"
        raise InputError(f"{where}metric {name}: {wanted}")
    if name not in known:
        raise InputError(f"{where}{unknown('metric', name, known)}")
    for layer, column in enumerate(library.values[name]):
        if (wrong := np.flatnonzero(~np.isfinite(column))).size:
            attention, mlp = library.texts(layer)[int(wrong[0])]
            raise InputError(f"{where}{name}: layer {layer} has no value for attention {attention}, mlp {mlp}")
    return name, library.values[name]


def _listed_names(names: Iterable[str], most: int = 8) -> str:
    *first, last = list(names)[:most]
    return f"{', '.join(first)} or {last}" if first else last


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
        wanted = f"expected variants of all {model.layers} layers of {model.name}, got {have}"
        raise InputError(f"{label}: {wanted}; layers {runs(missing)} have none")
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
                yield Entry(place, layer, _block(cells, model, layer), values)
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
    from simulator.prediction.quality import read_results

    _, found = read_results(folder, name)
    return {key: v.value * (-1.0 if v.higher_is_better else 1.0) for key, v in found.items()}


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
    if layers is not None and layers[1].kind != "mapping":
        problems.add(layers[1], "layers", f"expected lists of variants by layers such as 0-1, got {layers[1]}")
    for text, (key, value) in layers[1].entries.items() if layers is not None else ():
        try:
            some = [i for part in text.split(",") for i in _layers(part.strip(), model.layers)]
            if again := taken.intersection(some):
                raise InputError(f"layer {min(again)} is listed twice")
        except InputError as error:
            problems.add(key, f"layers.{text}", str(error))
            continue
        taken.update(some)
        for i in some:
            own[i] |= _lists(value, model, i, problems, f"layers.{text}.")
    if len(problems):
        raise first_of(problems.lines)
    every = (Entry(label, i, b, {}) for i, given in enumerate(own) for b in _product(model, model.layout[i], given))
    return library_of(every, model, label)


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
    """Return groups of layers that share one variant: of a number of consecutive layers, or as listed; others alone."""
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
