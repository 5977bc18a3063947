"""Write the shapes of a pruned model to a ``config.json``: the keys that change, and the file.

Use :func:`changed_keys` for the keys, :func:`write_config` for a folder that :func:`simulator.load_model` reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simulator.errors import InputError
from simulator.files.read import read_bounded
from simulator.files.write import write_whole
from simulator.models.architectures import ARCHITECTURES
from simulator.models.config import ModelConfig
from simulator.models.huggingface import MAX_FILE_BYTES, from_hf_config, parse_config
from simulator.models.library import FOLDER, list_models, load_model

NONE: Mapping[str, Any] = MappingProxyType({})


def free_heads(model: ModelConfig) -> bool:
    """Return whether a configuration has a head width, so heads and hidden size can change independently."""
    return ARCHITECTURES[model.architecture].grouped


def changed_keys(model: ModelConfig, new: ModelConfig, content: Mapping[str, Any] = NONE) -> dict[str, Any]:
    """Return the keys that change a model's ``config.json`` into that of ``new``, with fewer layers, heads or features.

    ``content`` is the content of the model's ``config.json``. Raises InputError if the content with these keys is not
    the model ``new``: some architectures cannot state all shapes.

    >>> from dataclasses import replace
    >>> model = load_model("opt-13b")
    >>> changed_keys(model, replace(model, layers=30, windows=model.windows[:30], inner=16384))
    {'num_hidden_layers': 30, 'ffn_dim': 16384}
    """
    kind, text = ARCHITECTURES[model.architecture], content.get("text_config")
    inside = text if isinstance(text, Mapping) else content
    names = {"layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads"}
    names |= {"kv_heads": "num_key_value_heads"} if kind.grouped else {}
    names["inner"] = kind.inner
    keys = {key: getattr(new, name) for name, key in names.items() if getattr(new, name) != getattr(model, name)}
    if kind.grouped and (new.hidden, new.heads) != (model.hidden, model.heads):
        keys["head_dim"] = new.head_dim  # else readers compute it from the other two keys
    if new.hidden != model.hidden and "word_embed_proj_dim" in inside:
        keys["word_embed_proj_dim"] = new.hidden
    types = inside.get("layer_types")
    if new.layers != model.layers and isinstance(types, list):
        keys["layer_types"] = types[: new.layers]
    if inside is not content and keys:
        keys = {"text_config": {**inside, **keys}}
    if content and replace(from_hf_config({**content, **keys}), name=new.name) != new:
        raise InputError(f"{model.name}: its config.json cannot state {', '.join(keys)} together")
    return keys


def content_of(
    source: str | os.PathLike[str] | Mapping[str, Any] | ModelConfig, model: ModelConfig | None = None
) -> Mapping[str, Any]:
    """Return the content of the ``config.json`` of a model source, as :func:`simulator.load_model` accepts it.

    A named model has only its shape keys, a model made in Python has no content. ``model`` is the loaded source, if
    known.

    >>> content_of("opt-13b")["ffn_dim"]
    20480
    """
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
    content = parse_config(read_bounded(file, MAX_FILE_BYTES).decode("utf-8-sig"), str(file))
    return content if isinstance(content, dict) else NONE


def write_config(folder: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write a ``config.json`` into a folder, which is created; never replace a file with different content."""
    file = Path(folder).expanduser() / "config.json"
    try:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    except (ValueError, RecursionError):
        raise InputError(f"{file}: not written: the content has numbers or levels that JSON cannot hold") from None
    if os.path.lexists(file):
        if read_bounded(file, MAX_FILE_BYTES) != text.encode():
            raise InputError(f"{file}: exists with different content; choose another folder")
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{file.parent}: cannot be used ({error.strerror or error}); expected a folder") from None
    write_whole(file, text.encode())
    return file
