"""Well-known models by name: shape keys of their Hugging Face ``config.json``, with the repository in ``_source``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

from simulator.errors import InputError, unknown
from simulator.models.config import ModelConfig
from simulator.models.huggingface import from_hf_config, read_config

FOLDER = resources.files(__package__)


def _key(name: str) -> str:
    """Names that differ in case, ``-``, ``_``, ``.`` or spaces are the same name."""
    return re.sub(r"[-_. ]+", "", name).lower()


def _content(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


@lru_cache(maxsize=1)
def _aliases() -> Mapping[str, str]:
    out: dict[str, str] = {}
    for name in list_models():
        content = _content(name)
        for other in (name, content["_source"].rsplit("/", 1)[-1], *content.get("_aliases", ())):
            out[_key(other)] = name
    return out


@lru_cache(maxsize=128)
def _shipped(name: str) -> ModelConfig:
    return from_hf_config(_content(name), f"{name}.json", name)


@lru_cache(maxsize=1)
def list_models() -> tuple[str, ...]:
    """Names of the shipped models, sorted.

    >>> "llama-3.1-8b" in list_models()
    True
    """
    return tuple(sorted(file.name.removesuffix(".json") for file in FOLDER.iterdir() if file.name.endswith(".json")))


def load_model(source: str | os.PathLike[str] | Mapping[str, Any] | ModelConfig) -> ModelConfig:
    """A model by name, or from a Hugging Face ``config.json``, a folder with one, or its parsed content, whichever
    ``source`` is.

    Names are those of :func:`list_models` (case, ``-``, ``_``, ``.`` and spaces do not matter), and Hugging Face ids.
    InputError for an unknown name, with the closest, or a configuration that no decoder can have.

    >>> load_model("meta-llama/Llama-3.1-8B").parameters
    8030261248
    """
    if isinstance(source, ModelConfig):
        return source
    if isinstance(source, Mapping):
        return from_hf_config(source)
    if not isinstance(source, str):
        if not isinstance(source, os.PathLike):
            raise InputError(f"model: expected a name, a path or a configuration, got {type(source).__name__}")
        return read_config(source)
    if "\0" in source or not source.strip():
        raise InputError(f"model {source!r} is not a name or a path; known names: {', '.join(list_models())}")
    name = _aliases().get(_key(source.rsplit("/", 1)[-1]))
    explicit = source.startswith((".", "/", "~")) or source.endswith((".json", "/", os.sep))
    if name is not None and not explicit:
        return _shipped(name)
    if explicit or os.path.exists(source):
        return read_config(source)
    raise unknown("model", source, list_models())
