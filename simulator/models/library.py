"""Load a model by its name, or from a Hugging Face ``config.json`` or folder.

Use :func:`from_hf_config` with parsed content, :func:`read_config` with a file or folder, and
:func:`simulator.load_model` with any of these or a name. Only JSON is read: code of a model's
repository is never run. Missing keys have the defaults of the configuration classes of
``transformers``; the shapes themselves must be in the file. The file of a shipped model has the
published keys of its ``config.json``, and its ``_source``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from simulator.arguments import shown
from simulator.engines.engine import sparsity_note
from simulator.errors import InputError, one_line, unknown
from simulator.files.read import parse_bounded, read_bounded
from simulator.models.architectures import (
    ARCHITECTURES,
    FLAT,
    NESTED,
    REFUSED,
    Reader,
    model_fields,
    refuse_unknown,
)
from simulator.models.architectures.reader import ConfigFields, Content
from simulator.models.model import Model
from simulator.models.quantization import with_formats

FOLDER = resources.files(__package__)
# largest configuration file that is read; usual files have a few kilobytes
MAX_FILE_BYTES = 1_000_000
MAX_NAME = 80  # longest name of a model; the middle of a longer name is omitted
_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)  # a Hugging Face id, owner/name

# ending of a Hugging Face id that states the tuning or the number format, not the shapes
_VARIANT = re.compile(
    r"[-_](?:instruct|chat|it|hf|base|dynamic|block|static|awq|nvfp4|fp4|fp8|bf16|quantized|gptq(?:-int[48])?|w\d+a\d+)$",
    re.IGNORECASE,
)
# objects with number formats; the second is the older name of compressed-tensors
_QUANTISED = ("quantization_config", "compression_config")
# keys at the top of a file that also hold for its text_config
_SHARED = ("tie_word_embeddings", *_QUANTISED, "block_configs")


def from_hf_config(data: Content, source: str = "config", name: str = "") -> Model:
    """Return the shapes in the content of a Hugging Face ``config.json``, of multimodal models
    those of the decoder.

    ``source`` names the content in errors. ``name`` is used for a model without a
    ``_name_or_path``."""
    if not isinstance(data, Mapping):
        raise InputError(
            f"{source}: expected a JSON object (a config.json), got {type(data).__name__}"
            f" {shown(data)}"
        )
    read = Reader(data, source)
    decoder = decoder_of(read)
    kind, read = decoder or (_unlisted(read), read)
    own = data.get("_name_or_path")
    if isinstance(own, str) and own.strip("/."):
        name = own.rstrip("/").rsplit("/", 1)[-1]
    # for tables and file names
    name = one_line(name.replace("/", "_"), MAX_NAME).strip(" .") or kind
    notes = []
    if decoder is None:
        from simulator.models.inferred import inferred_model  # late: known types do not need it

        return inferred_model(data, source, name)
    if kind != data.get("model_type") or "vision_config" in data:
        notes.append(f"{name}: only the text decoder is timed, not the other parts (vision)")
    if declared := _declared(read):
        notes.append(f"{name}: {sparsity_note(declared)}")
    auto_map = data.get("auto_map")
    code = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, Mapping) else None
    fields = model_fields(ARCHITECTURES[kind], read)
    stored = [key for key in _QUANTISED if read.raw(key)]
    refuse_unknown(read, ARCHITECTURES[kind])
    model = Model(
        name=name,
        architecture=kind,
        declared=declared,
        found="; ".join(notes),
        custom_code=one_line(code, MAX_NAME) if isinstance(code, str) else "",
        **fields,
    )
    return with_formats(model, read.part(stored[0])) if stored else model


def _declared(read: Reader) -> str:
    """Return the sparsity that compressed-tensors declares: "2:4", "unstructured" or none."""
    for key in _QUANTISED:
        inside = read.data.get(key)
        sparsity = inside.get("sparsity_config") if isinstance(inside, Mapping) else None
        if isinstance(sparsity, Mapping) and sparsity.get("sparsity_structure"):
            return "2:4" if sparsity["sparsity_structure"] == "2:4" else "unstructured"
    return ""


def decoder_of(read: Reader) -> tuple[str, Reader] | None:
    """Return the type of the decoder and its keys; None if no table has the type."""
    kind = read.data.get("model_type")
    text = read.data.get("text_config")
    named = kind if isinstance(kind, str) else ""
    if named in ARCHITECTURES:
        return named, read
    if named in FLAT and text is None:
        return NESTED[named], read
    own = text.get("model_type") if isinstance(text, Mapping) else None
    decoder = own if isinstance(own, str) and own in ARCHITECTURES else NESTED.get(named)
    if decoder is None:
        return None
    shared = {key: read.data[key] for key in _SHARED if key in read.data}
    return decoder, Reader(
        {**shared, **read.part("text_config").data}, read.source, f"{read.place}text_config."
    )


def _unlisted(read: Reader) -> str:
    """Return a type that no table has; InputError if it is not read at all."""
    kind = read.data.get("model_type")
    if isinstance(kind, str) and kind not in REFUSED:
        return kind
    known = f"expected one of {', '.join(sorted({*ARCHITECTURES, *NESTED}))}"
    if kind is None:
        raise read.fail("model_type", f"missing; {known}")
    reason = f" ({REFUSED[kind]})" if isinstance(kind, str) else ""
    raise read.fail("model_type", f"architecture {shown(kind)} is not supported{reason}; {known}")


def read_config(path: str | os.PathLike[str]) -> Model:
    """Return the shapes in a ``config.json``, or in a folder, where headers of ``*.safetensors``
    take precedence."""
    file = Path(os.path.expanduser(path))
    try:
        whole = file.is_dir()
        if whole:
            if not (file / "config.json").is_file():
                right = "expected a Hugging Face model folder"
                if (file / "adapter_config.json").is_file():
                    right = "it holds a PEFT adapter: merge it into its base model first"
                raise InputError(f"{file}: the folder has no config.json; {right}")
            file = file / "config.json"
        if not file.exists():
            raise InputError(
                f"{file}: no such file or folder; expected a config.json or a folder with one"
            )
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror or error}); expected a config.json"
        ) from None
    content = read_content(file)
    model = from_hf_config(
        content, str(file), file.parent.name if file.name == "config.json" else file.stem
    )
    if whole:
        # late: shipped models need no checkpoint
        from simulator.models.checkpoint import from_tensors, read_headers

        beside = file.with_name("hf_quant_config.json")
        if beside.is_file() and not any(content.get(key) for key in _QUANTISED):
            model = with_formats(model, _object(beside))
        if tensors := read_headers(file.parent):
            return from_tensors(model, tensors, file.parent)
    return model


def read_content(file: Path) -> Any:
    """Return the content of a ``config.json``."""
    return parse_bounded(read_bounded(file, MAX_FILE_BYTES), str(file), MAX_FILE_BYTES)


def _object(file: Path) -> Reader:
    content = read_content(file)
    if not isinstance(content, Mapping):
        raise InputError(f"{file}: expected a JSON object, got {shown(content)}")
    return Reader(content, str(file))


def _key(name: str) -> str:
    """Return a name without case, ``-``, ``_``, ``.`` and spaces, which do not matter."""
    return re.sub(r"[-_. ]+", "", name).lower()


def published_keys(name: str) -> ConfigFields:
    """Return the content of the file of a shipped model."""
    content: ConfigFields = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


@lru_cache(maxsize=1)
def _aliases() -> Mapping[str, str]:
    out: dict[str, str] = {}
    for name in list_models():
        content = published_keys(name)
        for other in (name, content["_source"].rsplit("/", 1)[-1], *content.get("_aliases", ())):
            out[_key(other)] = name
    return out


@lru_cache(maxsize=128)
def _shipped(name: str) -> Model:
    return from_hf_config(published_keys(name), f"{name}.json", name)


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
    return tuple(
        sorted(
            file.name.removesuffix(".json")
            for file in FOLDER.iterdir()
            if file.name.endswith(".json")
        )
    )


def model_title(name: str) -> str:
    """Return the publisher's name of a shipped model; another name is returned unchanged."""
    if name not in list_models():
        return name
    published: str = published_keys(name)["_source"].rsplit("/", 1)[-1]
    return published.removesuffix("-hf")


def shipped_model(name: str) -> Model | None:
    """Return the shipped model of a name or Hugging Face id, also of a tuned or quantised version,
    else None."""
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        return None
    last = name.rsplit("/", 1)[-1]
    while last:
        if (found := _aliases().get(_key(last))) is not None:
            return _shipped(found)
        shorter = _VARIANT.sub("", last)
        last = shorter if shorter != last else ""
    return None


def load_model(source: str | os.PathLike[str] | Content | Model) -> Model:
    """Load the shapes of a model; no weight is read.

    Parameters
    ----------
    source : str, path-like, mapping or Model
        Name of a shipped model or its Hugging Face id (case, ``-``, ``_``, ``.`` and spaces do not
        matter), path of a ``config.json``, folder with a ``config.json`` (shapes are then read from
        the headers of its ``*.safetensors``), or parsed content of a ``config.json``. A loaded
        model is accepted too.

    Returns
    -------
    Model
        Shapes of the model.

    Raises
    ------
    InputError
        If the name is unknown (the error lists the closest names), or the configuration or
        checkpoint is invalid.

    Examples
    --------
    >>> load_model("meta-llama/Llama-3.1-8B").parameters
    8030261248
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, Mapping):
        return from_hf_config(source)
    if not isinstance(source, str):
        if not isinstance(source, os.PathLike):
            raise InputError(
                f"model: expected a name, a path or a configuration, got {type(source).__name__}"
            )
        return read_config(source)
    if "\0" in source or not source.strip():
        raise InputError(
            f"model: expected a name or a path, got {source!r}; known names:"
            f" {', '.join(list_models())}"
        )
    name = _aliases().get(_key(source.rsplit("/", 1)[-1]))
    explicit = source.startswith((".", "/", "~")) or source.endswith((".json", "/", os.sep))
    if name is not None and not explicit:
        return _shipped(name)
    identifies = _ID.fullmatch(source) is not None
    if explicit or os.path.exists(source) or ("/" in source and not identifies):
        return read_config(source)
    way = "No folder or file has this path."
    if identifies:
        command = f"curl -L https://huggingface.co/{source}/resolve/main/config.json -o config.json"
        way += f" For another Hugging Face model, get its config.json and pass that path: {command}"
        way += " (gated: with a token)."
    raise unknown("model", source, list_models(), way=way)
