"""Write the shapes of a pruned model to a ``config.json``.

Use :func:`changed_keys` for the keys that change, :func:`config_of` for a model whose layers
differ, and :func:`write_config` for a folder that :func:`simulator.load_model` reads.
:mod:`simulator.models.architectures` describes ``block_configs``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simulator.errors import InputError
from simulator.files.read import parse_bounded, read_bounded
from simulator.files.write import write_whole
from simulator.models.architectures import ARCHITECTURES, EXPERT_KEYS
from simulator.models.config import Block, ModelConfig
from simulator.models.library import FOLDER, MAX_FILE_BYTES, from_hf_config, list_models, load_model

NONE: Mapping[str, Any] = MappingProxyType({})
_DECI = "nemotron-nas"
# architectures that compute the same as DeciLM
_DECI_SOURCES = ("llama", "mistral", "ministral", _DECI)


def changed_keys(
    model: ModelConfig, new: ModelConfig, content: Mapping[str, Any] = NONE
) -> dict[str, Any]:
    """Return the keys that change ``content``, the ``config.json`` of a model, into that of
    ``new``. InputError if the architecture cannot state the shapes of ``new``."""
    kind, text = ARCHITECTURES[model.architecture], content.get("text_config")
    inside = text if isinstance(text, Mapping) else content
    names = {"layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads"}
    names |= {"kv_heads": "num_key_value_heads"} if kind.grouped else {}
    names["inner"] = kind.inner
    keys = {
        key: getattr(new, name)
        for name, key in names.items()
        if getattr(new, name) != getattr(model, name)
    }
    if kind.grouped and (new.hidden, new.heads) != (model.hidden, model.heads):
        keys["head_dim"] = new.head_dim  # else readers compute it from the other two keys
    if model.architecture == "llama" and new.hidden % new.heads and inside is content:
        # LlamaConfig of Transformers from 5.5 refuses such heads; Mistral without windows computes
        # the same
        keys |= {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": None,
        }
    if new.hidden != model.hidden and "word_embed_proj_dim" in inside:
        keys["word_embed_proj_dim"] = new.hidden
    types = inside.get("layer_types")
    if new.layers != model.layers and isinstance(types, list):
        keys["layer_types"] = types[: new.layers]
    if inside is not content and keys:
        keys = {"text_config": {**inside, **keys}}
    if (
        content
        and replace(
            from_hf_config({**content, **keys}), name=new.name, architecture=new.architecture
        )
        != new
    ):
        raise InputError(f"{model.name}: its config.json cannot state {', '.join(keys)} together")
    return keys


def block_config(block: Block, dense: Block) -> dict[str, Any]:
    """Return a layer in the keys of ModelOpt; InputError for a layer that they cannot state."""
    if block.heads not in (0, dense.heads):
        raise InputError(
            f"block_configs: expected {dense.heads} query heads in each layer, got {block.heads}"
        )
    if block.delta or block.ranks or block.shortcuts or block.out:
        wrong = "delta nets" if block.delta else "factors" if block.ranks else "other hidden sizes"
        raise InputError(f"block_configs: expected layers of attention and MLP, got {wrong}")
    if block.active != int(block.active):
        raise InputError(
            f"block_configs: expected a whole number of active experts, got {block.active:g}"
        )
    sublayers: dict[str, dict[str, Any]] = {}
    for name, key, here in (
        ("attention", "attention", block.heads),
        ("mlp", "ffn", block.inner or block.experts),
    ):
        linear = name in block.linear
        sublayers[key] = {"no_op": not (here or linear), "replace_with_linear": linear}
    attention, mlp = sublayers["attention"], sublayers["ffn"]
    # ModelOpt requires sizes of linear sublayers, too, and ignores them
    if not attention["no_op"]:
        attention["num_key_value_heads"] = block.kv_heads or dense.kv_heads or 1
    if block.experts:
        moe = {key: int(getattr(block, name)) for name, key in EXPERT_KEYS.items()}
        mlp["moe"] = {**moe, "shared_expert_intermediate_dim": block.inner}
    elif not mlp["no_op"]:
        mlp["intermediate_size"] = block.inner or dense.inner or dense.expert_inner or 1
    return sublayers


def _deci_config(config: Mapping[str, Any], heads: int, hidden: int, window: int) -> dict[str, Any]:
    """Return a layer in the keys of DeciLM, given its object in the keys of ModelOpt."""
    attention, mlp = dict(config["attention"]), dict(config["ffn"])
    groups, inner = attention.pop("num_key_value_heads", 0), mlp.pop("intermediate_size", 0)
    if not (attention["no_op"] or attention["replace_with_linear"]):
        attention["n_heads_in_group"] = heads // groups
    if window:
        attention["window_length"] = window
    if not (mlp["no_op"] or mlp["replace_with_linear"]):
        mlp["ffn_mult"] = 3 * inner / (2 * hidden)
    return {"attention": attention, "ffn": mlp}


def config_of(
    dense_content: Mapping[str, Any], dense: ModelConfig, pruned: ModelConfig
) -> dict[str, Any]:
    """Return the content of a ``config.json`` with ``block_configs``, for a model whose layers
    differ.

    The keys are those of DeciLM, which vLLM loads, if the dense model is a Llama and they can state
    all widths: multiples of 256 and unchanged query heads. Otherwise they are those of ModelOpt in
    the dense model's architecture. If all layers are equal and complete, the content needs no
    ``block_configs`` and has none. ``dense_content`` is the dense model's ``config.json``
    (:func:`content_of`). Raises InputError if no content states these shapes."""
    if not dense_content:
        raise InputError(
            f"{dense.name}: has no config.json; expected a named model, a folder or a file"
        )
    if pruned.layers != dense.layers:
        raise InputError(
            f"{pruned.name}: expected {dense.layers} layers, as {dense.name}, got {pruned.layers}"
        )
    if len(set(pruned.layout)) == 1 and not dense.blocks:
        with contextlib.suppress(InputError):  # if the usual keys cannot state the layer
            equal = dense.with_usual(pruned.layout[0], ())
            plain = {**dense_content, **changed_keys(dense, equal, dense_content)}
            if _states(plain, pruned):
                return {key: value for key, value in plain.items() if key != "_name_or_path"}
    stated = dense
    if (
        len(heads := {block.heads for block in pruned.layout} - {0}) == 1
        and dense.heads not in heads
    ):
        (n,) = heads
        stated = dense.each_block(
            lambda b: replace(b, heads=n, kv_heads=math.gcd(b.kv_heads, n)) if b.heads else b
        )
    if dense.latent is not None:
        raise InputError(f"{dense.name}: block_configs: latent attention is not supported")
    olds = (replace(old, heads=old.heads or stated.heads) for old in stated.layout)
    configs = [block_config(block, old) for block, old in zip(pruned.layout, olds)]
    content = {key: value for key, value in dense_content.items() if key != "_name_or_path"}
    if dense.architecture in _DECI_SOURCES and stated.heads == dense.heads:
        sizes = zip(configs, pruned.windows if dense.architecture == _DECI else (0,) * dense.layers)
        deci = [_deci_config(config, dense.heads, dense.hidden, window) for config, window in sizes]
        # a reader that knows no block_configs must fail instead of loading a dense model
        widths: dict[str, Any] = {"num_key_value_heads": None, "intermediate_size": None}
        widths |= {"max_position_embeddings": dense.max_positions}  # defaults differ
        names = {"model_type": _DECI, "architectures": ["DeciLMForCausalLM"]}
        found = {**content, **names, **widths, "block_configs": deci}
        if _states(found, pruned):
            return found
    found = {**content, **changed_keys(dense, stated, dense_content), "block_configs": configs}
    if not _states(found, pruned):
        raise InputError(
            f"{dense.name}: a config.json of {dense.architecture} cannot state the widths of its"
            " layers"
        )
    return found


def _states(content: Mapping[str, Any], model: ModelConfig) -> bool:
    """Return whether content has all shapes of a model; name and usual layer may differ."""
    try:
        read = from_hf_config(content)
    except InputError:
        return False
    named = replace(
        read.with_usual(model.usual, read.layout), name=model.name, architecture=model.architecture
    )
    return named == replace(model, blocks=model.layout)


def content_of(
    source: str | os.PathLike[str] | Mapping[str, Any] | ModelConfig,
    model: ModelConfig | None = None,
) -> Mapping[str, Any]:
    """Return the content of the ``config.json`` of a model source, which is loaded as ``model``. A
    named model has only its shape keys; a model that was made in Python has no content."""
    model = model or load_model(source)
    if isinstance(source, Mapping):
        return source
    if model.name in list_models() and load_model(model.name) is model:
        content = json.loads((FOLDER / f"{model.name}.json").read_text(encoding="utf-8"))
        return {key: value for key, value in content.items() if not key.startswith("_")}
    if isinstance(source, ModelConfig):
        return NONE
    file = Path(source).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():  # a pipe cannot be read twice
        return NONE
    content = parse_bounded(read_bounded(file, MAX_FILE_BYTES), str(file), MAX_FILE_BYTES)
    return content if isinstance(content, dict) else NONE


def write_config(folder: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write a ``config.json`` into a folder, which is created; never replace a file with different
    content."""
    file = Path(folder).expanduser() / "config.json"
    try:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    except (ValueError, RecursionError):
        raise InputError(
            f"{file}: not written: the content has numbers or levels that JSON cannot hold"
        ) from None
    if os.path.lexists(file):
        if read_bounded(file, MAX_FILE_BYTES) != text.encode():
            raise InputError(f"{file}: exists with different content; choose another folder")
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{file.parent}: cannot be used ({error.strerror or error}); expected a folder"
        ) from None
    write_whole(file, text.encode())
    return file
