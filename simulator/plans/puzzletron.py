"""Read libraries of NVIDIA's architecture searches: Puzzle (arXiv 2411.19146) and ModelOpt's Puzzletron.

Use :func:`read_json` for one file, :func:`read_folder` for a folder of validations. The files are recognised by their
content:

- ``block_library.json`` of Puzzle: an object ``layer_0``, ``layer_1``, ... of variants with ``stats`` and ``metrics``.
- ``replacement_library.json``, ``subblock_library.json``, ``block_library.json`` and
  ``single_sequence_replacement_solutions.json`` of Puzzletron: lists of rows, without scores.
- ``replacement_metrics_and_stats.json`` of Puzzletron: an object of replacements with ``metrics``.
- A folder of validations of single replacements, ``*solution*.json`` and ``teacher.json``, or one such file.

Lower scores are better: an accuracy ``x`` becomes ``one_minus_x``.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simulator.arguments import shown
from simulator.errors import InputError, one_line
from simulator.files.json import parse_bounded
from simulator.files.read import read_bounded
from simulator.models.block import Block
from simulator.models.block_configs import read_attention, read_block, read_mlp
from simulator.models.config import ModelConfig
from simulator.models.keys import Reader
from simulator.plans.entries import MOST_BYTES, Entry
from simulator.plans.variants import joined, without

MOST_FILES = 10_000
MOST_FOLDER_BYTES = 2_000_000_000
"""Largest folder of validations: a file per variant, each with all layers and the scores of all samples."""

STATS: tuple[str, ...] = (
    *("runtime_ms", "prefill_runtime_ms", "decode_runtime_ms"),
    *("num_params", "active_params", "memory_mib", "kv_cache_memory_mib"),
)
"""Costs of a variant that become values, next to its scores."""

_LAYER = re.compile(r"layer_(\d{1,5})", re.ASCII)
_TEACHER = "teacher.json"
_DERIVED = "one_minus_"


@dataclass(frozen=True)
class Replacement:
    """A variant of a layer in a file of Puzzletron, and the files with its weights."""

    entry: Entry
    weight_paths: tuple[str, ...] = ()


def read_json(content: bytes, label: str, model: ModelConfig) -> Iterable[Entry]:
    """Return the variants in a JSON file of Puzzle or Puzzletron.

    Parameters
    ----------
    content : bytes
        Content of the file.
    label : str
        Name of the file in errors.
    model : ModelConfig
        Dense model.

    Returns
    -------
    iterable of Entry
        Variants with their values: scores, and costs of :data:`STATS`.

    Raises
    ------
    InputError
        One line with the file and the place: unknown or missing keys, sizes that do not fit the model, values that are
        not finite numbers, or a replacement of several layers.

    Examples
    --------
    >>> from simulator.models.library import load_model
    >>> row = b'{"stats": {"num_kv_heads": 4, "ffn_intermediate_size": 0}, "metrics": {"kl_div": 0.5}}'
    >>> (found,) = read_json(b'{"layer_3": {"own": ' + row + b"}}", "own.json", load_model("llama-3.1-8b"))
    >>> found.layer, found.block.kv_heads, found.values
    (3, 4, {'kl_div': 0.5})
    """
    root = parse_bounded(content, label, MOST_BYTES)
    return [found.entry for found in _replacements(root, label, model)]


def read_weight_paths(path: Path, model: ModelConfig) -> dict[tuple[int, Block], tuple[str, ...]]:
    """Return the files with the weights of each variant, which Puzzletron needs to build a chosen plan.

    Parameters
    ----------
    path : Path
        File ``replacement_library.json`` or ``replacement_metrics_and_stats.json``.
    model : ModelConfig
        Dense model.

    Returns
    -------
    dict
        Paths by layer and shapes.

    Raises
    ------
    InputError
        As :func:`read_json`.

    Examples
    --------
    >>> from simulator.models.library import load_model
    >>> read_weight_paths(Path("replacement_library.json"), load_model("llama-3.1-8b"))
    Traceback (most recent call last):
    simulator.errors.InputError: replacement_library.json: cannot be read: No such file or directory
    """
    root = parse_bounded(read_bounded(path, MOST_BYTES), str(path), MOST_BYTES)
    return {
        (found.entry.layer, found.entry.block): found.weight_paths for found in _replacements(root, str(path), model)
    }


def _replacements(root: Any, label: str, model: ModelConfig) -> Iterator[Replacement]:
    if model.latent is not None or model.delta is not None:
        raise InputError(f"{label}: expected a model with key/value heads in all layers, got {model.name}")
    if isinstance(root, list):
        yield from _rows((_object(row, label, f"[{i}].") for i, row in enumerate(root)), model)
        return
    of = _object(root, label, "")
    if "puzzle_solution" in of.data:
        yield _validation(of, model)
        return
    for key in of.data:
        inside = _object(of.data[key], label, f"{one_line(key, 80)}.")
        if found := _LAYER.fullmatch(key):
            yield from _puzzle(inside, model, int(found[1]))
        elif "metrics" in inside.data:
            yield _gathered(inside, model)
        else:
            raise of.fail(one_line(key, 80), "expected layer_0, layer_1, ..., or an object with metrics")


def _object(value: Any, label: str, place: str) -> Reader:
    """Return a reader of an object; NaN, by which pandas states missing cells, is null."""
    if not isinstance(value, Mapping):
        where = f"{place.rstrip('.')}: " if place else ""
        raise InputError(f"{label}: {where}expected an object, got {shown(value)}")
    return Reader({k: None if isinstance(v, float) and v != v else v for k, v in value.items()}, label, place)


def _place(of: Reader) -> str:
    return f"{of.source}: {of.place}".rstrip(".: ")


def _layer(of: Reader, key: str, model: ModelConfig) -> int:
    return of.integer(key, low=0, high=model.layers - 1)


def _parent(of: Reader, model: ModelConfig) -> int:
    """Return the one layer that a replacement replaces."""
    key, found = "parent_layer_indices", of.data.get("parent_layer_indices")
    if not isinstance(found, list):
        raise of.fail(key, f"expected a list of one layer, got {shown(found)}" if found else "missing; expected a list")
    if len(found) != 1:
        raise of.fail(key, f"expected one layer, got {len(found)}; replacements of several layers are not supported")
    return _layer(Reader({f"{key}[0]": found[0]}, of.source, of.place), f"{key}[0]", model)


def _block(of: Reader, model: ModelConfig, layer: int) -> Block:
    return _within(of, read_block(of, model.layout[layer], model.hidden), model.layout[layer])


def _within(of: Reader, block: Block, dense: Block) -> Block:
    """Return a layer that is not larger than the dense one; else raise InputError."""
    names = {"kv_heads": "key/value heads", "inner": "MLP width", "experts": "experts", "expert_inner": "expert width"}
    for name, words in names.items():
        if getattr(block, name) > (most := getattr(dense, name)):
            where = _place(of)
            raise InputError(f"{where}: expected at most the dense layer's {words} {most}, got {getattr(block, name)}")
    return block


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


def _values(of: Reader) -> dict[str, float]:
    """Return the scores and costs of a variant."""
    metrics = of.part("metrics")
    stats = of.part("stats") if of.data.get("stats") is not None else Reader({}, of.source)
    costs = {name: _number(stats, name) for name in STATS if stats.data.get(name) is not None}
    return costs | _scores((name, _number(metrics, name)) for name in metrics.data)


# -- Puzzle ------------------------------------------------------------------------------------------------------------


def _puzzle(of: Reader, model: ModelConfig, layer: int) -> Iterator[Replacement]:
    """Yield the variants of a layer in Puzzle's library; their names round widths, so the sizes count."""
    if layer >= model.layers:
        raise InputError(f"{_place(of)}: expected layer_0 to layer_{model.layers - 1}")
    dense = model.layout[layer]
    if dense.experts:
        raise InputError(f"{_place(of)}: expected a layer with an MLP, but layer {layer} of {model.name} has experts")
    for name in of.data:
        own = _object(of.data[name], of.source, f"{of.place}{one_line(name, 120)}.")
        stats = own.part("stats")
        groups = stats.integer("num_kv_heads", low=0, high=dense.kv_heads)
        inner = stats.integer("ffn_intermediate_size", low=0, high=dense.inner)
        if groups and dense.heads % groups:
            raise stats.fail("num_kv_heads", f"expected a divisor of {dense.heads} query heads, got {groups}")
        block = replace(dense, kv_heads=groups) if groups else without("attention", dense)
        block = replace(block, inner=inner) if inner else without("mlp", block)
        yield Replacement(Entry(_place(own), layer, block, _values(own)))


# -- Puzzletron --------------------------------------------------------------------------------------------------------


def _rows(rows: Iterable[Reader], model: ModelConfig) -> Iterator[Replacement]:
    """Yield the variants in a list: replacements, or blocks and subblocks."""
    subblocks = []
    for of in rows:
        if "single_sequence_replacement" in of.data:
            yield _replacement(of.part("single_sequence_replacement"), model)
        elif "layer_replacement" in of.data or "child_block_configs" in of.data:
            yield _replacement(of.part("layer_replacement") if "layer_replacement" in of.data else of, model)
        elif "block_idx" in of.data:
            subblocks.append(of)
        else:
            raise InputError(f"{_place(of)}: expected child_block_configs or block_idx, got {shown(list(of.data))}")
    yield from map(Replacement, _subblocks(subblocks, model))


def _replacement(of: Reader, model: ModelConfig, values: Mapping[str, float] | None = None) -> Replacement:
    layer, children = _parent(of, model), of.data.get("child_block_configs")
    if not isinstance(children, list) or len(children) != 1:
        wrong = f"expected a list of one layer, got {shown(children)}"
        raise of.fail("child_block_configs", wrong if children is not None else "missing; expected a list of one layer")
    child = _object(children[0], of.source, f"{of.place}child_block_configs[0].")
    return Replacement(Entry(_place(of), layer, _block(child, model, layer), values or {}), _paths(of))


def _paths(of: Reader) -> tuple[str, ...]:
    def right(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(path, str) for path in value)

    return tuple(of.value("weight_paths", [], "a list of paths", right))


def _gathered(of: Reader, model: ModelConfig) -> Replacement:
    layer = _parent(of, model) if "parent_layer_indices" in of.data else _layer(of, "block_idx", model)
    paths = _paths(of.part("layer_replacement")) if of.data.get("layer_replacement") is not None else ()
    block = _block(of.part("block_config"), model, layer)
    return Replacement(Entry(_place(of), layer, block, _values(of)), paths)


def _subblocks(rows: Iterable[Reader], model: ModelConfig) -> Iterator[Entry]:
    """Yield whole blocks, then the products of single attentions and MLPs of a layer that are no such block."""
    kinds = ("block", "attention", "ffn")
    found: dict[str, list[dict[Block, Entry]]] = {kind: [{} for _ in range(model.layers)] for kind in kinds}
    for of in rows:
        layer = _layer(of, "block_idx", model)
        dense = model.layout[layer]
        given = [kind for kind in kinds if of.data.get(f"{kind}_config") is not None]
        if not given:
            raise InputError(f"{_place(of)}: expected attention_config, ffn_config or block_config")
        if "block" in given:
            kind, block = "block", _block(of.part("block_config"), model, layer)
        else:
            kind, block = given[0] if len(given) == 1 else "block", dense
            if "attention" in given:
                block = read_attention(of.part("attention_config"), block)
            if "ffn" in given:
                block = read_mlp(of.part("ffn_config"), block, model.hidden)
            block = _within(of, block, dense)
        entry = Entry(_place(of), layer, block, {})
        if (first := found[kind][layer].setdefault(block, entry)) is not entry:
            raise InputError(f"{entry.place}: layer {layer} has the {kind} twice, first at {first.place}; keep one")
    for blocks, attentions, mlps in zip(*found.values()):
        yield from blocks.values()
        for attention, mlp in itertools.product(attentions.values(), mlps.values()):
            if (block := joined(attention.block, mlp.block)) not in blocks:
                yield replace(attention, block=block)


# -- validations -------------------------------------------------------------------------------------------------------


def read_folder(path: Path, model: ModelConfig) -> Iterable[Entry]:
    """Return the variants in a folder of Puzzletron's validations of single replacements.

    The dense layers have the scores in ``teacher.json``; distances from the dense model are 0 for them.

    Parameters
    ----------
    path : Path
        Folder with ``*solution*.json`` and ``teacher.json``.
    model : ModelConfig
        Dense model.

    Returns
    -------
    iterable of Entry
        Variants with their scores.

    Raises
    ------
    InputError
        One line with the file and the place, as :func:`read_json`; or a folder without such files, or with too many.

    Examples
    --------
    >>> from simulator.models.library import load_model
    >>> read_folder(Path("nowhere"), load_model("llama-3.1-8b"))
    Traceback (most recent call last):
    simulator.errors.InputError: nowhere: cannot be read (No such file or directory); expected a folder
    """
    found, left = [], MOST_FOLDER_BYTES
    names = _names(path)
    for name in names:
        content = read_bounded(path / name, MOST_BYTES)
        left -= len(content)
        if left < 0:
            raise InputError(f"{path}: expected files of at most {MOST_FOLDER_BYTES / 1e9:g} GB together")
        of = _object(parse_bounded(content, str(path / name), MOST_BYTES), str(path / name), "")
        if name != _TEACHER:
            found.append(_validation(of, model).entry)
    if names[-1] == _TEACHER:
        scores = dict.fromkeys((name for entry in found for name in entry.values), 0.0)
        teacher = {name: 0.0 for name in scores if not name.startswith(_DERIVED)} | _averages(of)
        measured = {entry.layer for entry in found if entry.block == model.layout[entry.layer]}
        rest = (layer for layer in range(model.layers) if layer not in measured)
        found += [Entry(_place(of), layer, model.layout[layer], teacher) for layer in rest]
    return found


def _names(path: Path) -> list[str]:
    """Return the sorted names of the validations in a folder; that of the teacher is the last."""
    names: list[str] = []
    try:
        with os.scandir(path) as listed:
            for at, file in enumerate(listed):
                if at >= 10 * MOST_FILES or len(names) > MOST_FILES:
                    raise InputError(f"{path}: expected a folder of at most {MOST_FILES:,} validations")
                if file.name == _TEACHER or ("solution" in file.name and file.name.endswith(".json")):
                    names.append(file.name)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); expected a folder") from None
    if not names or names == [_TEACHER]:
        hint = "the folder single_sequence_replacement_solutions--validation of Puzzletron"
        raise InputError(f"{path}: has no files *solution*.json; expected {hint}")
    return sorted(names, key=lambda name: (name == _TEACHER, name))


def _validation(of: Reader, model: ModelConfig) -> Replacement:
    """Return the replacement that a validation measured."""
    solution, values = of.part("puzzle_solution"), _averages(of)
    if "single_block_replacement" in solution.data:
        one = solution.part("single_block_replacement")
        layer = _layer(one, "block_idx", model)
        return Replacement(Entry(_place(one), layer, _block(one.part("block_config"), model, layer), values))
    return _replacement(solution.part("single_sequence_replacement"), model, values)


def _averages(of: Reader) -> dict[str, float]:
    """Return the scores of a validation: the averages of its metrics over samples."""
    parts = {name: of.part(name) for name, value in of.data.items() if isinstance(value, Mapping) and "avg" in value}
    return _scores((name, _number(part, "avg")) for name, part in parts.items())
