"""Read what NVIDIA's architecture searches measured per variant of a layer, as rows of a library.

- Puzzle (arXiv 2411.19146): ``block_library.json``, an object ``layer_0``, ``layer_1``, ... of variants with ``stats``
  and ``metrics``.
- ModelOpt's Puzzletron: the folder of its validations of single replacements, ``*solution*.json`` with
  ``teacher.json``, the scores of the dense model.

Lower scores are better: an accuracy ``x`` becomes ``one_minus_x``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simulator.arguments import shown
from simulator.errors import InputError, one_line
from simulator.files.read import parse_bounded, read_bounded
from simulator.models.architectures import Reader, read_block
from simulator.models.config import Block, ModelConfig
from simulator.plans.variants import without

MOST_BYTES = 20_000_000  # of a library: 96 layers with 64 variants take 3 MB as JSON
MOST_FILES = 10_000  # of a folder: a file per variant, each with all layers and the scores of all samples
MOST_FOLDER_BYTES = 2_000_000_000
RUNTIME = "runtime_ms"  # the only cost of Puzzle that is read: a search compares its plan with one by these times

_LAYER = re.compile(r"layer_(\d{1,5})", re.ASCII)
_TEACHER = "teacher.json"
_DERIVED = "one_minus_"


@dataclass(frozen=True)
class Entry:
    """A row of a library, whatever its format: a variant of a layer with its values, and its place in the file."""

    place: str
    layer: int
    block: Block
    values: Mapping[str, float]


def read_puzzle(content: bytes, label: str, model: ModelConfig) -> Iterator[Entry]:
    """Yield the variants in Puzzle's library with scores and times; names round widths, so the sizes count."""
    root = parse_bounded(content, label, MOST_BYTES)
    names = {} if not isinstance(root, Mapping) else {name: _LAYER.fullmatch(name) for name in root}
    if not names or None in names.values():
        wanted = "Puzzle's block_library.json (layer_0, layer_1, ...), or the folder of Puzzletron's validations"
        raise InputError(f"{label}: expected {wanted}")
    _check(model, label)
    for name, found in names.items():
        own, layer = _object(root[name], label, f"{name}."), int(found[1]) if found else 0
        if layer >= model.layers:
            raise InputError(f"{label}: {name}: expected layer_0 to layer_{model.layers - 1}")
        dense = model.layout[layer]
        if dense.experts:
            raise InputError(f"{label}: {name}: expected a layer with an MLP, but {model.name} has experts in it")
        for key in own.data:
            of = _object(own.data[key], label, f"{name}.{one_line(key, 120)}.")
            stats, metrics = of.part("stats"), of.part("metrics")
            groups = stats.integer("num_kv_heads", low=0, high=dense.kv_heads)
            inner = stats.integer("ffn_intermediate_size", low=0, high=dense.inner)
            if groups and dense.heads % groups:
                raise stats.fail("num_kv_heads", f"expected a divisor of {dense.heads} query heads, got {groups}")
            block = replace(dense, kv_heads=groups) if groups else without("attention", dense)
            block = replace(block, inner=inner) if inner else without("mlp", block)
            times = {} if stats.data.get(RUNTIME) is None else {RUNTIME: _number(stats, RUNTIME)}
            scores = _scores((name, _number(metrics, name)) for name in metrics.data)
            yield Entry(_place(of), layer, block, times | scores)


def read_validations(folder: Path, model: ModelConfig) -> list[Entry]:
    """Return the variants in a folder of Puzzletron's validations of single replacements.

    The dense layers have the scores in ``teacher.json``; distances from the dense model are 0 for them.
    """
    found, left = [], MOST_FOLDER_BYTES
    names = _names(folder)
    _check(model, str(folder))
    for name in names:
        content = read_bounded(folder / name, MOST_BYTES)
        left -= len(content)
        if left < 0:
            raise InputError(f"{folder}: expected files of at most {MOST_FOLDER_BYTES / 1e9:g} GB together")
        of = _object(parse_bounded(content, str(folder / name), MOST_BYTES), str(folder / name), "")
        if name != _TEACHER:
            found.append(_validation(of, model))
    if names[-1] == _TEACHER:
        scores = dict.fromkeys((name for entry in found for name in entry.values), 0.0)
        teacher = {name: 0.0 for name in scores if not name.startswith(_DERIVED)} | _averages(of)
        measured = {entry.layer for entry in found if entry.block == model.layout[entry.layer]}
        rest = (layer for layer in range(model.layers) if layer not in measured)
        found += [Entry(_place(of), layer, model.layout[layer], teacher) for layer in rest]
    return found


def _names(folder: Path) -> list[str]:
    """Return the sorted names of the validations in a folder; that of the teacher is the last."""
    names: list[str] = []
    try:
        with os.scandir(folder) as listed:
            for at, file in enumerate(listed):
                if at >= 10 * MOST_FILES or len(names) > MOST_FILES:
                    raise InputError(f"{folder}: expected a folder of at most {MOST_FILES:,} validations")
                if file.name == _TEACHER or ("solution" in file.name and file.name.endswith(".json")):
                    names.append(file.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror or error}); expected a folder") from None
    if not names or names == [_TEACHER]:
        hint = "the folder single_sequence_replacement_solutions--validation of Puzzletron"
        raise InputError(f"{folder}: has no files *solution*.json; expected {hint}")
    return sorted(names, key=lambda name: (name == _TEACHER, name))


def _validation(of: Reader, model: ModelConfig) -> Entry:
    """Return the replacement that a validation measured: of a block, or of a sequence of one layer."""
    solution, values = of.part("puzzle_solution"), _averages(of)
    if "single_block_replacement" in solution.data:
        one = solution.part("single_block_replacement")
        key, index, config = "block_idx", one.data.get("block_idx"), one.part("block_config")
    else:
        one = solution.part("single_sequence_replacement")
        key = "parent_layer_indices"
        layers = one.value(key, None, "a list of one layer", lambda v: isinstance(v, list) and len(v) == 1)
        (config,) = one.parts("child_block_configs", 1)
        key, index = f"{key}[0]", layers[0]
    layer = Reader({key: index}, one.source, one.place).integer(key, low=0, high=model.layers - 1)
    dense = model.layout[layer]
    block = read_block(config, dense, model.hidden)
    for name in ("kv_heads", "inner", "experts", "expert_inner"):
        if getattr(block, name) > (most := getattr(dense, name)):
            raise InputError(f"{_place(config)}: {name}: expected at most {most}, got {getattr(block, name)}")
    return Entry(_place(one), layer, block, values)


def _averages(of: Reader) -> dict[str, float]:
    """Return the scores of a validation: the averages of its metrics over samples."""
    parts = {name: of.part(name) for name, value in of.data.items() if isinstance(value, Mapping) and "avg" in value}
    return _scores((name, _number(part, "avg")) for name, part in parts.items())


def _check(model: ModelConfig, label: str) -> None:
    if model.latent is not None or model.delta is not None:
        raise InputError(f"{label}: expected a model with key/value heads in all layers, got {model.name}")


def _object(value: Any, label: str, place: str) -> Reader:
    if not isinstance(value, Mapping):
        where = f"{place.rstrip('.')}: " if place else ""
        raise InputError(f"{label}: {where}expected an object, got {shown(value)}")
    return Reader(value, label, place)


def _place(of: Reader) -> str:
    return f"{of.source}: {of.place}".rstrip(".: ")


def _number(of: Reader, key: str) -> float:
    value = of.data.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        raise of.fail(one_line(key, 80), f"expected a finite number, got {shown(value)}")
    return float(value)


def _scores(numbers: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return scores of which lower ones are better; those that are derived in the file are derived again."""
    found = {}
    for name, value in numbers:
        if not name.startswith(_DERIVED):
            accuracy = "accuracy" in name
            found[_DERIVED + name if accuracy else one_line(name, 80)] = 1.0 - value if accuracy else value
    return found
