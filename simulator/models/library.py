"""Find models by name: each file has the shape keys of a Hugging Face ``config.json``, and its ``_source``."""

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
_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)  # a Hugging Face id, owner/name

_VARIANT = re.compile(
    r"[-_](?:instruct|chat|it|hf|base|dynamic|block|static|awq|nvfp4|fp4|fp8|bf16|quantized|gptq(?:-int[48])?|w\d+a\d+)$",
    re.IGNORECASE,
)
"""Ending of a Hugging Face id that states the tuning or the number format, not the shapes."""


def _key(name: str) -> str:
    """Return a name without case, ``-``, ``_``, ``.`` and spaces, which do not matter."""
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
    """Return the names of the shipped models.

    Returns
    -------
    tuple of str
        Names that :func:`simulator.load_model` accepts, sorted.

    Examples
    --------
    >>> "llama-3.1-8b" in list_models()
    True
    """
    return tuple(sorted(file.name.removesuffix(".json") for file in FOLDER.iterdir() if file.name.endswith(".json")))


def model_title(name: str) -> str:
    """Return the publisher's name of a shipped model; another name is returned unchanged."""
    if name not in list_models():
        return name
    published: str = _content(name)["_source"].rsplit("/", 1)[-1]
    return published.removesuffix("-hf")


def shipped_model(name: str) -> ModelConfig | None:
    """Return the shipped model of a name or Hugging Face id, also of a tuned or quantised version; None for a path or
    an unknown name. No other file is read."""
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        return None
    last = name.rsplit("/", 1)[-1]
    while last:
        if (found := _aliases().get(_key(last))) is not None:
            return _shipped(found)
        shorter = _VARIANT.sub("", last)
        last = shorter if shorter != last else ""
    return None


def load_model(source: str | os.PathLike[str] | Mapping[str, Any] | ModelConfig) -> ModelConfig:
    """Load the shapes of a model; no weight is read.

    Parameters
    ----------
    source : str, path-like, mapping or ModelConfig
        Name of a shipped model or its Hugging Face id (case, ``-``, ``_``, ``.`` and spaces do not matter), path of a
        ``config.json``, folder with a ``config.json`` (shapes are then read from the headers of its ``*.safetensors``),
        or parsed content of a ``config.json``. A loaded model is accepted too.

    Returns
    -------
    ModelConfig
        Shapes of the model.

    Raises
    ------
    InputError
        If the name is unknown (the error lists the closest names), or the configuration or checkpoint is invalid.

    Examples
    --------
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
        raise InputError(f"model: expected a name or a path, got {source!r}; known names: {', '.join(list_models())}")
    name = _aliases().get(_key(source.rsplit("/", 1)[-1]))
    explicit = source.startswith((".", "/", "~")) or source.endswith((".json", "/", os.sep))
    if name is not None and not explicit:
        return _shipped(name)
    if explicit or os.path.exists(source):
        return read_config(source)
    command = f"curl -L https://huggingface.co/{source}/resolve/main/config.json -o config.json"
    way = f"For another Hugging Face model, get its config.json and pass that path: {command} (gated: with a token)."
    raise unknown("model", source, list_models(), way=way if _ID.fullmatch(source) else "")
