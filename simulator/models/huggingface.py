"""Shapes from a Hugging Face ``config.json``, checked key by key.

Use :func:`from_hf_config` with the parsed content, :func:`read_config` with a file or folder; :func:`simulator.load_model` takes
either, or the name of a shipped model. Only JSON is read: no code of a model's repository is looked at, let alone run. Keys that
``transformers`` fills in when a file omits them take the default of its configuration class for that architecture; the shapes
themselves must be in the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

from simulator.errors import InputError, one_line
from simulator.files.read import read_bounded
from simulator.models.config import ModelConfig

MAX_FILE_BYTES = 1_000_000
"""Largest configuration file that is read; real ones have a few kilobytes."""

MAX_VALUE = 10_000_000
"""Largest width, head count, vocabulary or layer count taken at face value (guards products against overflow)."""

MAX_LAYERS = 10_000
"""Largest number of decoder layers; per-layer tables grow with it."""


MAX_NAME = 80
"""Longest name of a model; the middle of a longer one is left out."""


# -- reading one key -------------------------------------------------------------------------------------------------------------


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


@dataclass(frozen=True)
class _Reader:
    """Keys of one configuration, with errors that name the source and the key."""

    data: Mapping[str, Any]
    source: str

    def fail(self, key: str, reason: str) -> InputError:
        return InputError(f"{self.source}: {key}: {reason}")

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_VALUE) -> int:
        """An integer; null and absent take the default, and are an error where there is none."""
        value = self.data.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, f"missing; expected an integer from {low} to {high}")
            value = default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or value != int(value):
            raise self.fail(key, f"expected an integer from {low} to {high}, got {_show(value)}")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, f"expected true or false, got {_show(value)}")
        return value

    def share(self, key: str, default: float) -> float:
        """A number from 0 to 1."""
        value = self.data.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise self.fail(key, f"expected a number from 0 to 1, got {_show(value)}")
        return float(value)

    def capped(self, key: str, default: bool) -> bool:
        """Whether a soft cap is set: null means none, absent takes the default."""
        if key not in self.data:
            return default
        value = self.data[key]
        if value is None:
            return False
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < float("inf")):
            raise self.fail(key, f"expected a positive number or null, got {_show(value)}")
        return True


def _shapes(read: _Reader, kv_default: int | None, head_dim_default: int | None) -> dict[str, Any]:
    """Keys whose names are the same in all architectures but OPT and GPT-NeoX."""
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    absent = "num_key_value_heads" not in read.data  # an explicit null means as many as query heads
    kv_heads = read.integer("num_key_value_heads", kv_default if absent and kv_default is not None else heads)
    return {
        "hidden": hidden,
        "layers": read.integer("num_hidden_layers", high=MAX_LAYERS),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": _head_dim(read, hidden, heads, head_dim_default),
        "inner": read.integer("intermediate_size"),
        "vocab": read.integer("vocab_size"),
    }


def _head_dim(read: _Reader, hidden: int, heads: int, default: int | None = None) -> int:
    if read.data.get("head_dim") is None and default is None:
        if hidden % heads:
            raise read.fail(
                "num_attention_heads", f"expected a divisor of hidden_size {hidden} (no head_dim is given), got {heads}"
            )
        return hidden // heads
    return read.integer("head_dim", default)


def _windows(read: _Reader, layers: int, window: int, windowed: Callable[[int], bool]) -> tuple[int, ...]:
    """Window of each layer: from ``layer_types`` where the file lists them, else by the architecture's rule."""
    types = read.data.get("layer_types")
    if types is None:
        return tuple(window if windowed(layer) else 0 for layer in range(layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
        raise read.fail("layer_types", f"expected a list of {layers} of {' or '.join(known)}, got {_show(types)}")
    if "sliding_attention" in types and not window:
        raise read.fail("sliding_window", "missing; expected an integer, as layer_types names sliding_attention")
    return tuple(window if t == "sliding_attention" else 0 for t in types)


def _window(read: _Reader, default: int = 0) -> int:
    """``sliding_window``: null means none, absent takes the default."""
    if "sliding_window" in read.data and read.data["sliding_window"] is None:
        return 0
    return read.integer("sliding_window", default, low=0)


# -- one function an architecture: defaults are those of the configuration classes in transformers 4.57 -----------------------


def _llama(read: _Reader) -> dict[str, Any]:
    out = _shapes(read, None, None)
    bias = read.flag("attention_bias", False)
    return out | {
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": read.flag("mlp_bias", False),
        "tied": read.flag("tie_word_embeddings", False),
        "max_positions": read.integer("max_position_embeddings", 2048),
    }


def _mistral(read: _Reader) -> dict[str, Any]:
    out = _shapes(read, 8, None)
    return out | {
        "windows": _windows(read, out["layers"], _window(read, 4096), lambda _: True),
        "tied": read.flag("tie_word_embeddings", False),
        "max_positions": read.integer("max_position_embeddings", 131072),
    }


def _qwen(read: _Reader, head_dim: int | None, **extra: Any) -> dict[str, Any]:
    out = _shapes(read, 32, head_dim)
    window = _window(read, 4096) if read.flag("use_sliding_window", False) else 0
    first = read.integer("max_window_layers", 28, low=0)
    return out | {
        "windows": _windows(read, out["layers"], window, lambda layer: layer >= first),
        "tied": read.flag("tie_word_embeddings", False),
        "max_positions": read.integer("max_position_embeddings", 32768),
        **extra,
    }


def _qwen2(read: _Reader) -> dict[str, Any]:
    return _qwen(read, None, qkv_bias=True)


def _qwen3(read: _Reader) -> dict[str, Any]:
    bias = read.flag("attention_bias", False)
    return _qwen(read, 128, qk_norm=True, qkv_bias=bias, o_bias=bias)


def _gemma(read: _Reader) -> dict[str, Any]:
    out = _shapes(read, 16, 256)
    bias = read.flag("attention_bias", False)
    return out | {
        "qkv_bias": bias,
        "o_bias": bias,
        "tied": read.flag("tie_word_embeddings", True),
        "max_positions": read.integer("max_position_embeddings", 8192),
    }


def _gemma2(read: _Reader) -> dict[str, Any]:
    plain = _Reader({"num_key_value_heads": 4, **read.data}, read.source)
    out = _gemma(plain)
    return out | {
        "windows": _windows(read, out["layers"], _window(read, 4096), lambda layer: layer % 2 == 0),
        "post_norms": True,
        "attention_softcap": read.capped("attn_logit_softcapping", True),
        "logit_softcap": read.capped("final_logit_softcapping", True),
    }


def _phi3(read: _Reader) -> dict[str, Any]:
    out = _shapes(read, None, None)
    return out | {
        "rotary_dim": int(out["head_dim"] * read.share("partial_rotary_factor", 1.0)),
        "windows": _windows(read, out["layers"], _window(read), lambda _: True),
        "tied": read.flag("tie_word_embeddings", False),
        "max_positions": read.integer("max_position_embeddings", 4096),
    }


def _opt(read: _Reader) -> dict[str, Any]:
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    if read.integer("word_embed_proj_dim", hidden) != hidden:
        raise read.fail(
            "word_embed_proj_dim",
            f"expected hidden_size {hidden} (projected embeddings, as in OPT-350M, are not supported)",
        )
    if hidden % heads:
        raise read.fail("num_attention_heads", f"expected a divisor of hidden_size {hidden}, got {heads}")
    positions, bias = read.integer("max_position_embeddings", 2048), read.flag("enable_bias", True)
    return {
        "hidden": hidden,
        "layers": read.integer("num_hidden_layers", high=MAX_LAYERS),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": hidden // heads,
        "inner": read.integer("ffn_dim"),
        "vocab": read.integer("vocab_size"),
        "max_positions": positions,
        "learned_positions": positions + 2,  # OPT's table starts with two rows of padding
        "gated": False,
        "tied": read.flag("tie_word_embeddings", True),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bias,
        "norm": "layer" if read.flag("layer_norm_elementwise_affine", True) else "none",
        "final_norm": read.flag("do_layer_norm_before", True) and not read.flag("_remove_final_layer_norm", False),
        "rotary_dim": 0,
    }


def _gpt_neox(read: _Reader) -> dict[str, Any]:
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    if hidden % heads:
        raise read.fail("num_attention_heads", f"expected a divisor of hidden_size {hidden}, got {heads}")
    bias = read.flag("attention_bias", True)
    return {
        "hidden": hidden,
        "layers": read.integer("num_hidden_layers", high=MAX_LAYERS),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": hidden // heads,
        "inner": read.integer("intermediate_size"),
        "vocab": read.integer("vocab_size"),
        "max_positions": read.integer("max_position_embeddings", 2048),
        "gated": False,
        "tied": read.flag("tie_word_embeddings", False),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": True,
        "norm": "layer",
        "rotary_dim": int(hidden // heads * read.share("rotary_pct", 0.25)),
        "parallel_residual": read.flag("use_parallel_residual", True),
    }


ARCHITECTURES: Mapping[str, Callable[[_Reader], dict[str, Any]]] = MappingProxyType(
    {
        "llama": _llama,
        "mistral": _mistral,
        "qwen2": _qwen2,
        "qwen3": _qwen3,
        "gemma": _gemma,
        "gemma2": _gemma2,
        "phi3": _phi3,
        "opt": _opt,
        "gpt_neox": _gpt_neox,
    }
)
"""Supported values of ``model_type`` and the reader of each."""


def from_hf_config(data: Mapping[str, Any], source: str = "config", name: str = "") -> ModelConfig:
    """Shapes from the content of a Hugging Face ``config.json``.

    Parameters
    ----------
    data : mapping
        The parsed file. Keys that are not about shapes are ignored.
    source : str
        What errors call the configuration (a path, usually).
    name : str
        Name of the model; by default the tail of ``_name_or_path``, else the architecture.

    Raises
    ------
    InputError
        One line that names the source, the key and what is right.

    Examples
    --------
    >>> tiny = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    ...         "num_attention_heads": 2, "vocab_size": 10}
    >>> from_hf_config(tiny).parameters
    824
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{source}: expected a JSON object (a config.json), got {type(data).__name__} {_show(data)}")
    read = _Reader(data, source)
    kind = data.get("model_type")
    if kind is None:
        raise read.fail("model_type", f"missing; expected one of {', '.join(sorted(ARCHITECTURES))}")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise read.fail(
            "model_type",
            f"architecture {_show(kind)} is not supported; expected one of {', '.join(sorted(ARCHITECTURES))}",
        )
    if not name:
        given = data.get("_name_or_path")
        name = given.rstrip("/").rsplit("/", 1)[-1] if isinstance(given, str) and given.strip("/") else kind
    name = one_line(name.replace("/", "_"), MAX_NAME).strip(" .") or kind  # it goes into tables, titles and reports
    values = ARCHITECTURES[kind](read)
    if values["heads"] % values["kv_heads"]:
        raise read.fail(
            "num_key_value_heads",
            f"expected a divisor of num_attention_heads {values['heads']}, got {values['kv_heads']}",
        )
    values.setdefault("windows", (0,) * values["layers"])
    values.setdefault("rotary_dim", values["head_dim"])
    return ModelConfig(name=name, architecture=kind, **values)


# -- files -------------------------------------------------------------------------------------------------------------


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
        raise InputError(
            f"{source}:{error.lineno}:{error.colno}: is not JSON ({error.msg}); expected a config.json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: is not JSON ({_show(str(error))}); expected a config.json") from None


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Shapes from a ``config.json`` or from the folder that holds one."""
    file = Path(path)
    try:
        file = file.expanduser()
        if file.is_dir():
            if not (file / "config.json").is_file():
                raise InputError(f"{file}: the folder has no config.json; expected a Hugging Face model folder")
            file = file / "config.json"
        if not file.exists():
            raise InputError(f"{file}: no such file; expected a config.json or a folder with one")
        text = read_bounded(file, MAX_FILE_BYTES).decode("utf-8-sig")
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of a user who does not exist
        said = getattr(error, "strerror", None) or error
        raise InputError(f"{file}: cannot be read ({said}); expected a config.json or a folder with one") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: is not UTF-8 text; expected a config.json") from None
    return from_file(parse_config(text, str(file)), file)


def from_file(data: Any, file: PurePath) -> ModelConfig:
    """Shapes from the parsed content of a file; a model without a name of its own is called after the file or its folder."""
    named = file.parent.name if file.name == "config.json" else file.stem
    own = isinstance(data, Mapping) and isinstance(data.get("_name_or_path"), str) and data["_name_or_path"].strip("/.")
    return from_hf_config(data, str(file), "" if own else named)
