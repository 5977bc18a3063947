"""Read shapes from a Hugging Face ``config.json`` and check them key by key.

Use :func:`from_hf_config` with parsed content, :func:`read_config` with a file or folder; :func:`simulator.load_model`
accepts both, and names of shipped models. Only JSON is read: code of a model's repository is never run. Missing keys
have the defaults of the configuration classes of ``transformers`` (:mod:`simulator.models.architectures`); the shapes
themselves must be in the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from simulator.arguments import shown
from simulator.errors import InputError, one_line
from simulator.files.json import parse_json
from simulator.files.read import read_bounded
from simulator.models.architectures import ARCHITECTURES, FLAT, NESTED
from simulator.models.config import ModelConfig
from simulator.models.difference import sparsity_note
from simulator.models.keys import Reader

MAX_FILE_BYTES = 1_000_000  # largest configuration file that is read; usual files have a few kilobytes
SHARED = ("tie_word_embeddings", "quantization_config", "compression_config", "block_configs")
"""Keys at the top of a file that also hold for its ``text_config``."""

MAX_NAME = 80  # longest name of a model; the middle of a longer name is omitted


def from_hf_config(data: Mapping[str, Any], source: str = "config", name: str = "") -> ModelConfig:
    """Return the shapes in the content of a Hugging Face ``config.json``; other keys are ignored.

    Of a model with further parts (vision) these are the shapes of its text decoder, the object ``text_config``.
    ``source`` names the content in errors, usually a path. ``name`` is used for a model without a ``_name_or_path``."""
    if not isinstance(data, Mapping):
        raise InputError(f"{source}: expected a JSON object (a config.json), got {type(data).__name__} {shown(data)}")
    kind, read = _decoder(Reader(data, source))
    own = data.get("_name_or_path")
    if isinstance(own, str) and own.strip("/."):
        name = own.rstrip("/").rsplit("/", 1)[-1]
    name = one_line(name.replace("/", "_"), MAX_NAME).strip(" .") or kind  # for tables and file names
    notes = (
        [f"{name}: only the text decoder is timed, not the other parts (vision)"] if kind != data["model_type"] else []
    )
    if declared := _declared(read):
        notes.append(f"{name}: {sparsity_note(declared)}")
    values = ARCHITECTURES[kind].values(read)
    code = _custom_code(data.get("auto_map"))
    found = "; ".join(notes)
    return ModelConfig(name=name, architecture=kind, declared=declared, found=found, custom_code=code, **values)


def _declared(read: Reader) -> str:
    """Return the sparsity that compressed-tensors declares: "2:4", "unstructured" or none."""
    for key in ("quantization_config", "compression_config"):
        inside = read.data.get(key)
        sparsity = inside.get("sparsity_config") if isinstance(inside, Mapping) else None
        if isinstance(sparsity, Mapping) and sparsity.get("sparsity_structure"):
            return "2:4" if sparsity["sparsity_structure"] == "2:4" else "unstructured"
    return ""


def _decoder(read: Reader) -> tuple[str, Reader]:
    """Return the architecture of the decoder and its keys."""
    kind, known = read.data.get("model_type"), f"expected one of {', '.join(sorted({*ARCHITECTURES, *NESTED}))}"
    if kind is None:
        raise read.fail("model_type", f"missing; {known}")
    text = read.data.get("text_config")
    if isinstance(kind, str) and kind in ARCHITECTURES:
        return kind, read
    if isinstance(kind, str) and kind in FLAT and text is None:
        return NESTED[kind], read
    own = text.get("model_type") if isinstance(text, Mapping) else None
    decoder = (
        own if isinstance(own, str) and own in ARCHITECTURES else NESTED.get(kind) if isinstance(kind, str) else None
    )
    if decoder is None:
        raise read.fail("model_type", f"architecture {shown(kind)} is not supported; {known}")
    shared = {key: read.data[key] for key in SHARED if key in read.data}
    return decoder, Reader({**shared, **read.part("text_config").data}, read.source, f"{read.place}text_config.")


def _custom_code(auto_map: Any) -> str:
    """Return the class of modelling code in the repository of a model, from its ``auto_map``; "" without any."""
    found = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, Mapping) else None
    return one_line(found, MAX_NAME) if isinstance(found, str) else ""


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def parse_config(text: str, source: str) -> Any:
    """Parse the text of a ``config.json``; errors name the source, the line and the column."""
    try:
        return parse_json(text, source, _no_constant)
    except InputError:
        raise
    except json.JSONDecodeError as error:
        where, why = f"{source}:{error.lineno}:{error.colno}", error.msg
    except (ValueError, RecursionError) as error:
        where, why = source, shown(str(error))
    raise InputError(f"{where}: is not JSON ({why}); expected a config.json")


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Return the shapes in a ``config.json``, or of a checkpoint folder.

    In a folder, the headers of its ``*.safetensors`` take precedence over the ``config.json``."""
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
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{file}: cannot be read ({reason}); expected a config.json or a folder with one") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: is not UTF-8 text; expected a config.json") from None
    model = from_file(parse_config(text, str(file)), file)
    return _as_stored(model, file.parent) if whole else model


def _as_stored(model: ModelConfig, folder: Path) -> ModelConfig:
    from simulator.models.checkpoint import from_tensors  # late: shipped models need no checkpoint
    from simulator.models.headers import read_headers, refuse_pickles

    if tensors := read_headers(folder):
        return from_tensors(model, tensors, folder)
    refuse_pickles(folder)
    return model


def from_file(data: Any, file: PurePath) -> ModelConfig:
    """Return the shapes in a file's parsed content; a model without a name is named after the file or its folder."""
    return from_hf_config(data, str(file), file.parent.name if file.name == "config.json" else file.stem)
