"""Libraries: the variants of each layer of a model, and values that were measured of them, such as
scores.

:func:`read_library` reads files of these formats, told apart by their content. The first variant of
every layer is the dense one.

- CSV with the columns ``layer`` (``3``, ``0-7``, ``all``), ``attention`` and ``mlp`` (texts of
  :mod:`simulator.plans.variants`; a missing column or an empty cell is the dense sublayer) and any
  columns of numbers: scores and times. ``kv_heads`` and ``ffn_intermediate_size`` are accepted
  instead of ``attention`` and ``mlp``; 0 is none. Without columns of variants, a row is the removal
  of its layer (``layer,score``). Layers without rows stay dense. A column ``results`` names results
  files of lm-evaluation-harness. Texts in ``protocol`` and ``source`` are ignored.
- YAML with lists of choices, of all layers (``mlp: [dense, 7168, none]``) and of some
  (``layers: {0-1: {mlp: [dense]}}``).
- What NVIDIA's architecture searches measured: Puzzle's ``block_library.json`` (arXiv 2411.19146),
  an object ``layer_0``, ``layer_1``, ... of variants with ``stats`` and ``metrics``; and the folder
  of ModelOpt's Puzzletron with its validations of single replacements, ``*solution*.json``, and
  ``teacher.json``, the scores of the dense model. Lower scores are better: an accuracy ``x``
  becomes ``one_minus_x``.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from simulator.arguments import shown
from simulator.arrays import FloatArray
from simulator.display import runs
from simulator.errors import InputError, one_line, unknown
from simulator.files.csv import CsvTable, read_csv
from simulator.files.read import parse_bounded, read_bounded
from simulator.files.yaml import Node, Problems, first_of, parse_yaml
from simulator.models.architectures import Reader, read_block
from simulator.models.library import load_model
from simulator.models.model import Layer, Model
from simulator.models.sublayers import DeltaNet, Experts, LatentAttention
from simulator.models.sublayers.base import Sublayer
from simulator.plans.variants import SUBLAYERS, generated, joined, text_of, variant
from simulator.units import percent

MOST_BYTES = 20_000_000  # size of a library: 96 layers with 64 variants take 3 MB as JSON
# a folder has a file per variant, with all layers and the scores of all samples
MOST_FILES = 10_000
MOST_FOLDER_BYTES = 2_000_000_000
# the only cost of Puzzle that is read: a search compares its plan with one by these times
RUNTIME = "runtime_ms"

_LAYER = re.compile(r"layer_(\d{1,5})", re.ASCII)
_TEACHER = "teacher.json"
_DERIVED = "one_minus_"


@dataclass(frozen=True)
class Entry:
    """A row of a library, whatever its format: a variant of a layer with its values, and its place
    in the file."""

    place: str
    layer: int
    variant: Layer
    values: Mapping[str, float]


def read_puzzle(content: bytes, label: str, model: Model) -> Iterator[Entry]:
    """Yield the variants in Puzzle's library with scores and times; names round widths, so the
    sizes count."""
    root = parse_bounded(content, label, MOST_BYTES)
    names = {} if not isinstance(root, Mapping) else {name: _LAYER.fullmatch(name) for name in root}
    if not names or None in names.values():
        wanted = (
            "Puzzle's block_library.json (layer_0, layer_1, ...), or the folder of Puzzletron's"
            " validations"
        )
        raise InputError(f"{label}: expected {wanted}")
    _check(model, label)
    for name, found in names.items():
        own, layer = _object(root[name], label, f"{name}."), int(found[1]) if found else 0
        if layer >= len(model.layers):
            raise InputError(f"{label}: {name}: expected layer_0 to layer_{len(model.layers) - 1}")
        dense = model.layers[layer]
        attention, mlp = dense.of("attention"), dense.of("mlp")
        if isinstance(mlp, Experts):
            raise InputError(
                f"{label}: {name}: expected a layer with an MLP, but {model.name} has experts in it"
            )
        for key in own.data:
            of = _object(own.data[key], label, f"{name}.{one_line(key, 120)}.")
            stats, metrics = of.part("stats"), of.part("metrics")
            groups = stats.integer("num_kv_heads", low=0, high=_size(attention, "kv_heads"))
            inner = stats.integer("ffn_intermediate_size", low=0, high=_size(mlp, "inner"))
            if groups and _size(attention, "heads") % groups:
                heads = _size(attention, "heads")
                raise stats.fail(
                    "num_kv_heads", f"expected a divisor of {heads} query heads, got {groups}"
                )
            changed = dense.with_part("attention", _sized(attention, kv_heads=groups))
            changed = changed.with_part("mlp", _sized(mlp, inner=inner))
            times = {} if stats.data.get(RUNTIME) is None else {RUNTIME: _reading(stats, RUNTIME)}
            scores = _scores((name, _reading(metrics, name)) for name in metrics.data)
            yield Entry(_place(of), layer, changed, times | scores)


def _size(sublayer: Sublayer | None, name: str) -> int:
    return int(getattr(sublayer, name, 0))


def _sized(sublayer: Sublayer | None, **sizes: int) -> Sublayer | None:
    """Return a sublayer with other sizes; None for a size of 0, or without a sublayer."""
    if sublayer is None or not all(sizes.values()):
        return None
    changes: dict[str, Any] = dict(sizes)
    return replace(sublayer, **changes)


def read_validations(folder: Path, model: Model) -> list[Entry]:
    """Return the variants in a folder of Puzzletron's validations of single replacements. The dense
    layers have the scores in ``teacher.json``; distances from the dense model are 0 for them."""
    found, left = [], MOST_FOLDER_BYTES
    names = _names(folder)
    _check(model, str(folder))
    for name in names:
        content = read_bounded(folder / name, MOST_BYTES)
        left -= len(content)
        if left < 0:
            raise InputError(
                f"{folder}: expected files of at most {MOST_FOLDER_BYTES / 1e9:g} GB together"
            )
        of = _object(parse_bounded(content, str(folder / name), MOST_BYTES), str(folder / name), "")
        if name != _TEACHER:
            found.append(_validation(of, model))
    if names[-1] == _TEACHER:
        scores = dict.fromkeys((name for entry in found for name in entry.values), 0.0)
        teacher = {name: 0.0 for name in scores if not name.startswith(_DERIVED)} | _averages(of)
        measured = {entry.layer for entry in found if entry.variant == model.layers[entry.layer]}
        rest = (layer for layer in range(len(model.layers)) if layer not in measured)
        found += [Entry(_place(of), layer, model.layers[layer], teacher) for layer in rest]
    return found


def _names(folder: Path) -> list[str]:
    """Return the sorted names of the validations in a folder; the file of the teacher is the
    last."""
    names: list[str] = []
    try:
        with os.scandir(folder) as listed:
            for at, file in enumerate(listed):
                if at >= 10 * MOST_FILES or len(names) > MOST_FILES:
                    raise InputError(
                        f"{folder}: expected a folder of at most {MOST_FILES:,} validations"
                    )
                if file.name == _TEACHER or (
                    "solution" in file.name and file.name.endswith(".json")
                ):
                    names.append(file.name)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be read ({error.strerror or error}); expected a folder"
        ) from None
    if not names or names == [_TEACHER]:
        hint = "the folder single_sequence_replacement_solutions--validation of Puzzletron"
        raise InputError(f"{folder}: has no files *solution*.json; expected {hint}")
    return sorted(names, key=lambda name: (name == _TEACHER, name))


def _validation(of: Reader, model: Model) -> Entry:
    """Return the replacement that a validation measured: of a block, or of a sequence of one
    layer."""
    solution, values = of.part("puzzle_solution"), _averages(of)
    if "single_block_replacement" in solution.data:
        one = solution.part("single_block_replacement")
        key, index, config = "block_idx", one.data.get("block_idx"), one.part("block_config")
    else:
        one = solution.part("single_sequence_replacement")
        key = "parent_layer_indices"
        layers = one.value(
            key, None, "a list of one layer", lambda v: isinstance(v, list) and len(v) == 1
        )
        (config,) = one.parts("child_block_configs", 1)
        key, index = f"{key}[0]", layers[0]
    last = len(model.layers) - 1
    layer = Reader({key: index}, one.source, one.place).integer(key, low=0, high=last)
    dense = model.layers[layer]
    replaced = read_block(config, dense, None, model.hidden)
    for part in SUBLAYERS:
        before, after = (one.of(part) for one in (dense, replaced))
        for name in ("kv_heads", "inner", "experts", "shared_inner"):
            if type(after) is type(before) and _size(after, name) > _size(before, name):
                raise InputError(
                    f"{_place(config)}: {name}: expected at most {_size(before, name)}, got"
                    f" {_size(after, name)}"
                )
    return Entry(_place(one), layer, replaced, values)


def _averages(of: Reader) -> dict[str, float]:
    parts = {
        name: of.part(name)
        for name, value in of.data.items()
        if isinstance(value, Mapping) and "avg" in value
    }
    return _scores((name, _reading(part, "avg")) for name, part in parts.items())


def _check(model: Model, label: str) -> None:
    attentions = (layer.of("attention") for layer in model.layers)
    if any(isinstance(attention, LatentAttention | DeltaNet) for attention in attentions):
        raise InputError(
            f"{label}: expected a model with key/value heads in all layers, got {model.name}"
        )


def _object(value: Any, label: str, place: str) -> Reader:
    if not isinstance(value, Mapping):
        where = f"{place.rstrip('.')}: " if place else ""
        raise InputError(f"{label}: {where}expected an object, got {shown(value)}")
    return Reader(value, label, place)


def _place(of: Reader) -> str:
    return f"{of.source}: {of.place}".rstrip(".: ")


def _reading(of: Reader, key: str) -> float:
    value = of.data.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        raise of.fail(one_line(key, 80), f"expected a finite number, got {shown(value)}")
    return float(value)


def _scores(numbers: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return scores whose lower values are better; scores that the file derives are derived
    again."""
    found = {}
    for name, value in numbers:
        if not name.startswith(_DERIVED):
            accuracy = "accuracy" in name
            found[_DERIVED + name if accuracy else one_line(name, 80)] = (
                1.0 - value if accuracy else value
            )
    return found


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

TIME = re.compile(
    r"runtime|latency|^times?[ _]|(^|[ _./-])(times?|ns|us|ms|s|sec|seconds)$", re.IGNORECASE
)
_SIZES = (
    r"memory|bytes|params?|parameters|flops|macs|num|number|count|size|kib|mib|gib|kb|mb|gb|heads"
    r"|width"
)
SIZE = re.compile(rf"memory|^(num|number|count)[ _]|(^|[ _./-])({_SIZES})$", re.IGNORECASE)
"""Names of columns that hold times; sizes, memory or counts."""

_ALIASES: Mapping[str, str] = {"kv_heads": "attention", "ffn_intermediate_size": "mlp"}
_VARIANTS = {*SUBLAYERS, *_ALIASES}  # columns of variants
_NAMES = ("layer", *_VARIANTS, "results", "protocol", "source")


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

    def take(self, keep: Sequence[Sequence[int]]) -> Library:
        """Return the library with some variants of each layer, by their indices."""
        layers = tuple(tuple(own[i] for i in some) for own, some in zip(self.layers, keep))
        values = {
            name: tuple(own[list(k)] for own, k in zip(column, keep))
            for name, column in self.values.items()
        }
        return replace(self, layers=layers, values=values)

    @property
    def times(self) -> tuple[FloatArray, ...] | None:
        """The sum of the library's own times by layer and variant, if it has times."""
        columns = [column for name, column in self.values.items() if TIME.search(name)]
        if not columns or not all(np.isfinite(own).all() for column in columns for own in column):
            return None
        return tuple(np.sum(own, axis=0) for own in zip(*columns))


def read_library(source: str | Path, model: Model) -> Library:
    """Return the library of a file, of a folder of Puzzletron's validations, or of a name that
    ships (smollm2-135m)."""
    path = Path(source).expanduser()
    if os.path.isfile(shipped := EXAMPLES / f"{source}.csv") and not os.path.exists(path):
        path = shipped
        if load_model(str(source)).layers != model.layers:
            raise InputError(f"scores: expected those of {model.name}, got those of {source}")
    if os.path.isdir(path):  # Path.is_dir raises OSError for names that are too long
        return library_of(read_validations(path, model), model, str(path))
    content = read_bounded(path, MOST_BYTES)
    if content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"[", b"{"):
        return library_of(read_puzzle(content, str(path), model), model, str(path))
    if path.suffix in (".yaml", ".yml"):
        return _choices(content, str(path), model)
    table = read_csv(content, str(path), ("layer",))
    found = library_of(_rows(table, model, path.parent), model, str(path))
    note = f"{path}: without a column attention or mlp, a row is the removal of its layer"
    return found if _VARIANTS & {*table.header} else replace(found, notes=(note, *found.notes))


def generated_library(model: Model, devices: int = 1) -> Library:
    return Library(model, tuple(_product(dense, {}, devices) for dense in model.layers))


def without_layer(dense: Layer) -> Layer:
    return dense.without("attention").without("mlp")


def importance(model: Model) -> Library:
    """Return the library of whole layers of a model, with published losses of depth pruning as
    score. The shipped tables have the loss of a model by the fraction of its layers that was
    removed (ShortGPT, SLEB, LaCo), not by layer. So these scores decide how many layers go. These
    papers remove deep layers first, except the last."""
    from simulator.prediction.quality import QualityRow, load_quality

    found: dict[tuple[str, str, str], dict[float, QualityRow]] = {}
    for row in load_quality("published").rows:
        own = row.family == "depth" and row.model.lower() == model.name.lower()
        if own and row.sparsity > 0.0 and not row.options:
            found.setdefault((row.method, row.metric, row.protocol), {})[row.sparsity] = row
    if not found:
        way = "give a file of scores, or measure them with prunesim quality --per-layer"
        raise InputError(f"scores: no published loss of depth pruning for {model.name}; {way}")
    best = max(
        found.values(), key=lambda rows: (len(rows), "accuracy" in next(iter(rows.values())).metric)
    )
    rows, many = [best[sparsity] for sparsity in sorted(best)], len(model.layers)
    removed = [0.0, *(row.sparsity * many for row in rows)]
    losses = [0.0, *(row.relative_loss for row in rows)]
    slope = np.diff(losses) / np.diff(removed)
    at = np.clip(np.searchsorted(removed[1:], np.arange(many) + 0.5), 0, len(slope) - 1)
    each = np.maximum.accumulate(np.maximum(slope[at], 0.0))  # the next layer never costs less
    each *= 1.0 + 1e-6 * np.arange(many)  # so that the order decides between equal ones
    values = {layer: float(each[i]) for i, layer in enumerate([*range(many - 2, -1, -1), many - 1])}
    layers = tuple((dense, without_layer(dense)) for dense in model.layers)
    scores = tuple(np.array([0.0, values[i]]) for i in range(many))
    first = rows[0]
    note = (
        f"scores: published losses of {first.method} on {first.model} ({first.metric},"
        f" {first.source}) by number of removed layers, extrapolated beyond"
        f" {percent(rows[-1].sparsity)}; deep layers go first, except the last"
    )
    return Library(model, layers, {"relative loss": scores}, (note,))


def _product(
    dense: Layer, given: Mapping[str, Sequence[Layer]], devices: int = 1
) -> tuple[Layer, ...]:
    """Return all combinations of the given, else the usual, variants of both sublayers; the dense
    one first."""
    variants = [given.get(name) or tuple(generated(name, dense, devices)) for name in SUBLAYERS]
    return tuple(dict.fromkeys([dense, *(joined(a, m) for a, m in itertools.product(*variants))]))


def metric_of(library: Library, metric: str) -> tuple[str, tuple[FloatArray, ...]]:
    """Return the name and the values of a library's scores: those of ``metric``, or "" for the only
    column that can be. Times, sizes, memory and counts are never scores. InputError if several
    columns could be, or a value is missing."""
    where = f"{library.source}: " if library.source else ""
    known = [name for name in library.values if not TIME.search(name) and not SIZE.search(name)]
    if not library.values:
        raise InputError(
            f"{where or 'scores: '}the library has no scores; expected a column of numbers such as"
            " kl_div"
        )
    if not known:
        names = _listed_names(library.values)
        raise InputError(
            f"{where}expected a column of scores, got only times, sizes or counts: {names}"
        )
    if not metric and len(known) > 1:
        raise InputError(
            f"{where}metric: expected one of {_listed_names(known)}, got none; choose it with"
            " --metric"
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


def _listed_names(names: Iterable[str]) -> str:
    *first, last = list(names)[:8]
    return f"{', '.join(first)} or {last}" if first else last


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
    header = set(table.header)
    for alias, name in _ALIASES.items():
        if alias in header and name in header:
            raise InputError(
                f"{table.label}:1: columns {name} and {alias} state the same; keep one"
            )
    # pandas writes row numbers without a name
    numbers = [name for name in table.header if name and name not in _NAMES]
    for place, cells in table.records():
        try:
            values = {name: _number(name, cells[name]) for name in numbers if cells[name]}
            if cells.get("results"):
                from simulator.prediction.quality import read_results

                _, found = read_results(folder, cells["results"])
                # a loss is a rise
                values |= {
                    key: v.value * (-1.0 if v.higher_is_better else 1.0) for key, v in found.items()
                }
            for layer in _layers(cells["layer"], len(model.layers)):
                dense = model.layers[layer]
                stated = _variant(cells, dense) if _VARIANTS & header else without_layer(dense)
                yield Entry(place, layer, stated, values)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None


def _variant(cells: Mapping[str, str], dense: Layer) -> Layer:
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
    if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in ends) or int(
        ends[0]
    ) > int(ends[1]):
        raise InputError(
            f"layer: expected a number, a range such as 0-7, or all, got {one_line(text, 40)!r}"
        )
    if int(ends[1]) >= many:
        raise InputError(f"layer: expected numbers from 0 to {many - 1}, got {ends[1]}")
    return range(int(ends[0]), int(ends[1]) + 1)


def _choices(content: bytes, label: str, model: Model) -> Library:
    """Return the library of a YAML file of choices, without values."""
    problems = Problems(label)
    try:
        root = parse_yaml(content.decode("utf-8-sig"), problems)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{label}: is not UTF-8 text (byte {error.start}); expected YAML"
        ) from None
    if root is None or root.kind != "mapping":
        if not len(problems):
            problems.add(root, "file", "expected the keys attention, mlp or layers")
        raise InputError(problems.lines[0])
    common = {dense: _lists(root, dense, problems, "") for dense in dict.fromkeys(model.layers)}
    own = [dict(common[dense]) for dense in model.layers]
    layers = root.entries.get("layers")
    taken: set[int] = set()
    if layers is not None and layers[1].kind != "mapping":
        problems.add(
            layers[1],
            "layers",
            f"expected lists of variants by layers such as 0-1, got {layers[1]}",
        )
    for text, (key, value) in layers[1].entries.items() if layers is not None else ():
        try:
            some = [i for part in text.split(",") for i in _layers(part.strip(), len(model.layers))]
            if again := taken.intersection(some):
                raise InputError(f"layer {min(again)} is listed twice")
        except InputError as error:
            problems.add(key, f"layers.{text}", str(error))
            continue
        taken.update(some)
        for i in some:
            own[i] |= _lists(value, model.layers[i], problems, f"layers.{text}.")
    if len(problems):
        raise first_of(problems.lines)
    every = (
        Entry(label, i, one, {})
        for i, given in enumerate(own)
        for one in _product(model.layers[i], given)
    )
    return library_of(every, model, label)


def _lists(
    node: Node, dense: Layer, problems: Problems, where: str
) -> dict[str, tuple[Layer, ...]]:
    """Return the variants of a layer by sublayer that a mapping lists."""
    keys, found = (*SUBLAYERS, "layers") if not where else SUBLAYERS, {}
    if node.kind != "mapping":
        problems.add(node, where.rstrip("."), f"expected lists of variants by sublayer, got {node}")
        return {}
    for name, (key, value) in node.entries.items():
        if name not in keys:
            problems.add(key, where + name, str(unknown("key", name, keys)))
        elif name in SUBLAYERS:
            if value.kind != "list" or not 0 < len(value.items) <= MOST_VARIANTS:
                expected = f"expected a list of 1 to {MOST_VARIANTS} variants"
                problems.add(value, where + name, f"{expected}, got {len(value.items) or value}")
                continue
            found[name] = tuple(
                dict.fromkeys(_listed(value.items, name, dense, problems, where + name))
            )
    return found


def _listed(
    items: Iterable[Node], name: str, dense: Layer, problems: Problems, where: str
) -> Iterator[Layer]:
    for i, item in enumerate(items):
        try:
            if item.kind != "scalar":
                raise InputError(f"expected a text such as none, got {item}")
            yield variant(name, item.text, dense)
        except InputError as error:
            problems.add(item, f"{where}.{i}", str(error))


def groups_of(text: str | int | None, layers: int) -> tuple[tuple[int, ...], ...]:
    """Return groups of layers that share one variant: of a number of consecutive layers, or as
    listed; others alone."""
    if text is None:
        return tuple((i,) for i in range(layers))
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise InputError(
            f"groups: expected a number of layers, or ranges such as 0-3,4-7, got {shown(text)}"
        )
    words = str(text).strip()
    if isinstance(text, int) or (words.isascii() and words.isdigit()):
        # Python refuses to read numbers of thousands of digits
        size = int(words) if len(words) < 10 else 0
        if not 1 <= size <= layers:
            raise InputError(
                f"groups: expected 1 to {layers} layers in a group, got {one_line(words, 40)}"
            )
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
        single = {text: i for i, text in enumerate(texts)}
        pairs += [
            (single[a, "dense"], single["dense", m])
            for (a, _), (_, m) in itertools.product(texts, texts)
            if "dense" not in (a, m) and (a, "dense") in single and ("dense", m) in single
        ]
    return list(dict.fromkeys(pairs))
