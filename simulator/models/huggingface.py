"""Shapes from a Hugging Face ``config.json``, checked key by key.

Use :func:`from_hf_config` with the parsed content, :func:`read_config` with a file or folder;
:func:`simulator.load_model` takes either, or the name of a shipped model. Only JSON is read: no code of a model's
repository is looked at, let alone run. Keys that ``transformers`` fills in when a file omits them take the default of
its configuration class for that architecture (:mod:`simulator.models.architectures`); the shapes themselves must be in
the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from simulator.errors import InputError, one_line
from simulator.files.read import read_bounded
from simulator.models.architectures import ARCHITECTURES, NESTED
from simulator.models.config import ModelConfig
from simulator.models.keys import Reader, shown

MAX_FILE_BYTES = 1_000_000
"""Largest configuration file that is read; real ones have a few kilobytes."""

MAX_NAME = 80
"""Longest name of a model; the middle of a longer one is left out."""


def from_hf_config(data: Mapping[str, Any], source: str = "config", name: str = "") -> ModelConfig:
    """Shapes from the content of a Hugging Face ``config.json``; keys that are not about shapes are ignored.

    ``source`` is what errors call it (a path, usually), ``name`` that of a model without a ``_name_or_path``.

    >>> tiny = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    ...     "num_attention_heads": 2, "vocab_size": 10}
    >>> from_hf_config(tiny).parameters
    824
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{source}: expected a JSON object (a config.json), got {type(data).__name__} {shown(data)}")
    read = Reader(data, source)
    kind, known = data.get("model_type"), f"expected one of {', '.join(sorted({*ARCHITECTURES, *NESTED}))}"
    if kind is None:
        raise read.fail("model_type", f"missing; {known}")
    if not isinstance(kind, str) or kind not in {*ARCHITECTURES, *NESTED}:
        raise read.fail("model_type", f"architecture {shown(kind)} is not supported; {known}")
    own = data.get("_name_or_path")
    if isinstance(own, str) and own.strip("/."):
        name = own.rstrip("/").rsplit("/", 1)[-1]
    name = one_line(name.replace("/", "_"), MAX_NAME).strip(" .") or kind  # it goes into tables, titles and reports
    key, decoder = NESTED.get(kind, ("", kind))
    return ModelConfig(name=name, architecture=kind, **ARCHITECTURES[decoder].values(read.part(key) if key else read))


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def parse_config(text: str, source: str) -> Any:
    """The content of a ``config.json`` from its text, not checked yet; errors name the source, the line and the column.

    >>> parse_config('{"hidden_size": 8}', "config.json")
    {'hidden_size': 8}
    """
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        where, why = f"{source}:{error.lineno}:{error.colno}", error.msg
    except (ValueError, RecursionError) as error:
        where, why = source, shown(str(error))
    raise InputError(f"{where}: is not JSON ({why}); expected a config.json")


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Shapes from a ``config.json``, or from the folder that holds one: there what its ``*.safetensors`` hold, by their
    headers, goes before what the file says."""
    file = Path(path)
    try:
        file = file.expanduser()
        whole = file.is_dir()
        if whole:
            if not (file / "config.json").is_file():
                right = "expected a Hugging Face model folder"
                if (file / "adapter_config.json").is_file():
                    right = "it holds a PEFT adapter: merge it into its base model first"
                raise InputError(f"{file}: the folder has no config.json; {right}")
            file = file / "config.json"
        if not file.exists():
            raise InputError(f"{file}: no such file; expected a config.json or a folder with one")
        text = read_bounded(file, MAX_FILE_BYTES).decode("utf-8-sig")
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of a user who does not exist
        said = getattr(error, "strerror", None) or error
        raise InputError(f"{file}: cannot be read ({said}); expected a config.json or a folder with one") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: is not UTF-8 text; expected a config.json") from None
    model = from_file(parse_config(text, str(file)), file)
    return _as_stored(model, file.parent) if whole else model


def _as_stored(model: ModelConfig, folder: Path) -> ModelConfig:
    from simulator.models.checkpoint import from_tensors  # late: a model by name needs none of it
    from simulator.models.headers import read_headers, refuse_pickles

    if tensors := read_headers(folder):
        return from_tensors(model, tensors, folder)
    refuse_pickles(folder)
    return model


def from_file(data: Any, file: PurePath) -> ModelConfig:
    """Shapes from the parsed content of a file; a model without a name of its own is called after file or folder."""
    return from_hf_config(data, str(file), file.parent.name if file.name == "config.json" else file.stem)
