"""Shapes from a Hugging Face ``config.json``, checked key by key.

Use :func:`from_hf_config` with the parsed content, :func:`read_config` with a file or folder;
:func:`simulator.load_model` takes either, or the name of a shipped model. Only JSON is read: no code of a model's
repository is looked at, let alone run. Keys that ``transformers`` fills in when a file omits them take the default of
its configuration class for that architecture; the shapes themselves must be in the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

from simulator.errors import InputError, one_line
from simulator.files.read import read_bounded
from simulator.models.checkpoint import check_tensors
from simulator.models.config import ModelConfig
from simulator.models.headers import read_headers

MAX_FILE_BYTES = 1_000_000
"""Largest configuration file that is read; real ones have a few kilobytes."""

MAX_VALUE = 10_000_000
"""Largest width, head count, vocabulary or layer count taken at face value (guards products against overflow)."""

MAX_LAYERS = 10_000
"""Largest number of decoder layers; per-layer tables grow with it."""

MAX_NAME = 80
"""Longest name of a model; the middle of a longer one is left out."""


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class _Reader:
    """Keys of one configuration, with errors that name the source and the key."""

    data: Mapping[str, Any]
    source: str

    def fail(self, key: str, reason: str) -> InputError:
        return InputError(f"{self.source}: {key}: {reason}")

    def value(self, key: str, default: Any, expected: str, right: Callable[[Any], bool]) -> Any:
        """A value that must be right; null and absent take the default, and are an error where there is none."""
        value = self.data.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(key, f"missing; expected {expected}")
        if not right(value):
            raise self.fail(key, f"expected {expected}, got {_show(value)}")
        return value

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_VALUE) -> int:
        right = lambda x: _is_number(x) and low <= x <= high and x == int(x)  # noqa: E731
        return int(self.value(key, default, f"an integer from {low} to {high}", right))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.value(key, default, "true or false", lambda x: isinstance(x, bool)))

    def share(self, key: str, default: float) -> float:
        return float(self.value(key, default, "a number from 0 to 1", lambda x: _is_number(x) and 0 <= x <= 1))

    def capped(self, key: str) -> bool:
        """Whether a soft cap is set: null means none, absent that there is one."""
        self.value(key, 1.0, "a positive number or null", lambda x: _is_number(x) and 0 < x < float("inf"))
        return self.data.get(key, 1.0) is not None

    def windows(self, layers: int, default: int, windowed: Callable[[int], bool], used: bool = True) -> tuple[int, ...]:
        """Window of each layer: from ``layer_types`` where the file lists them, else by the architecture's rule.

        A ``sliding_window`` of null means none, absent the default; it is not looked at where it is not ``used``.
        """
        null = "sliding_window" in self.data and self.data["sliding_window"] is None
        window = 0 if null or not used else self.integer("sliding_window", default, low=0)
        types = self.data.get("layer_types")
        if types is None:
            return tuple(window if windowed(layer) else 0 for layer in range(layers))
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
            raise self.fail("layer_types", f"expected a list of {layers} of {' or '.join(known)}, got {_show(types)}")
        if "sliding_attention" in types and not window:
            raise self.fail("sliding_window", "missing; expected an integer, as layer_types names sliding_attention")
        return tuple(window if t == "sliding_attention" else 0 for t in types)


# -- architectures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Architecture:
    """Keys of one architecture and their defaults, those of its configuration class in transformers 4.57."""

    positions: int  # max_position_embeddings
    flags: Mapping[str, tuple[str, bool]]  # field -> key and default
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields that are the same in all its models
    kv_heads: int | None = None  # num_key_value_heads where absent; None: as many as query heads, as null means
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    grouped: bool = True  # has the keys of the two lines above
    inner: str = "intermediate_size"
    window: int | None = None  # sliding_window; None: no such key
    windowed: Callable[[int], bool] = lambda layer: True  # layers with a window
    rotary: tuple[str, float] | None = None  # key and default of the share of each head that is rotated; None: all
    more: Callable[[_Reader, dict[str, Any]], dict[str, Any]] = lambda read, values: {}  # what no table says


def _qwen(read: _Reader, values: dict[str, Any]) -> dict[str, Any]:
    used, first = read.flag("use_sliding_window", False), read.integer("max_window_layers", 28, low=0)
    return {"windows": read.windows(values["layers"], 4096, lambda layer: layer >= first, used)}


def _gemma2(read: _Reader, values: dict[str, Any]) -> dict[str, Any]:
    caps = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    return {name: read.capped(key) for name, key in caps.items()}


def _opt(read: _Reader, values: dict[str, Any]) -> dict[str, Any]:
    hidden = values["hidden"]
    if read.integer("word_embed_proj_dim", hidden) != hidden:
        projected = "projected embeddings, as in OPT-350M, are not supported"
        raise read.fail("word_embed_proj_dim", f"expected hidden_size {hidden} ({projected})")
    return {
        "learned_positions": values["max_positions"] + 2,  # OPT's table starts with two rows of padding
        "norm": "layer" if read.flag("layer_norm_elementwise_affine", True) else "none",
        "final_norm": values["final_norm"] and not read.flag("_remove_final_layer_norm", False),
    }


_TIED, _UNTIED = {"tied": ("tie_word_embeddings", True)}, {"tied": ("tie_word_embeddings", False)}
_BIAS = {"qkv_bias": ("attention_bias", False), "o_bias": ("attention_bias", False)}

# fmt: off
ARCHITECTURES: Mapping[str, _Architecture] = MappingProxyType({
    "llama": _Architecture(2048, {**_BIAS, **_UNTIED, "mlp_bias": ("mlp_bias", False)}),
    "mistral": _Architecture(131072, _UNTIED, kv_heads=8, window=4096),
    "qwen2": _Architecture(32768, _UNTIED, {"qkv_bias": True}, kv_heads=32, more=_qwen),
    "qwen3": _Architecture(32768, {**_BIAS, **_UNTIED}, {"qk_norm": True}, kv_heads=32, head_dim=128, more=_qwen),
    "gemma": _Architecture(8192, {**_BIAS, **_TIED}, kv_heads=16, head_dim=256),
    "gemma2": _Architecture(8192, {**_BIAS, **_TIED}, {"post_norms": True}, kv_heads=4, head_dim=256,
                            window=4096, windowed=lambda layer: layer % 2 == 0, more=_gemma2),
    "phi3": _Architecture(4096, _UNTIED, window=0, rotary=("partial_rotary_factor", 1.0)),
    "opt": _Architecture(
        2048,
        {**dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), ("enable_bias", True)), **_TIED,
         "final_norm": ("do_layer_norm_before", True)},
        {"gated": False, "rotary_dim": 0}, grouped=False, inner="ffn_dim", more=_opt),
    "gpt_neox": _Architecture(
        2048,
        {**dict.fromkeys(("qkv_bias", "o_bias"), ("attention_bias", True)), **_UNTIED,
         "parallel_residual": ("use_parallel_residual", True)},
        {"gated": False, "mlp_bias": True, "norm": "layer"}, grouped=False, rotary=("rotary_pct", 0.25)),
})
# fmt: on
"""Supported values of ``model_type``."""


def _values(read: _Reader, kind: _Architecture) -> dict[str, Any]:
    """Fields of :class:`ModelConfig` from the keys of an architecture."""
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    kv_heads, head_dim = heads, kind.head_dim
    if kind.grouped:
        absent = kind.kv_heads if "num_key_value_heads" not in read.data else None
        kv_heads = read.integer("num_key_value_heads", absent or heads)
    if head_dim is None and (not kind.grouped or read.data.get("head_dim") is None):
        if hidden % heads:
            given = " (no head_dim is given)" if kind.grouped else ""
            raise read.fail("num_attention_heads", f"expected a divisor of hidden_size {hidden}{given}, got {heads}")
        head_dim = hidden // heads
    else:
        head_dim = read.integer("head_dim", head_dim)
    layers = read.integer("num_hidden_layers", high=MAX_LAYERS)
    inner, vocab = read.integer(kind.inner), read.integer("vocab_size")
    widths = {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "inner": inner}
    values = {
        **widths,
        "layers": layers,
        "vocab": vocab,
        "rotary_dim": int(head_dim * read.share(*kind.rotary)) if kind.rotary else head_dim,
        "windows": (0,) * layers if kind.window is None else read.windows(layers, kind.window, kind.windowed),
        **{name: read.flag(key, default) for name, (key, default) in kind.flags.items()},
        "max_positions": read.integer("max_position_embeddings", kind.positions),
        **kind.fixed,
    }
    values |= kind.more(read, values)
    if heads % kv_heads:
        raise read.fail("num_key_value_heads", f"expected a divisor of num_attention_heads {heads}, got {kv_heads}")
    return values


def from_hf_config(data: Mapping[str, Any], source: str = "config", name: str = "") -> ModelConfig:
    """Shapes from the content of a Hugging Face ``config.json``; keys that are not about shapes are ignored.

    ``source`` is what errors call it (a path, usually), ``name`` that of a model without a ``_name_or_path``.

    >>> tiny = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    ...     "num_attention_heads": 2, "vocab_size": 10}
    >>> from_hf_config(tiny).parameters
    824
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{source}: expected a JSON object (a config.json), got {type(data).__name__} {_show(data)}")
    read = _Reader(data, source)
    kind, known = data.get("model_type"), f"expected one of {', '.join(sorted(ARCHITECTURES))}"
    if kind is None:
        raise read.fail("model_type", f"missing; {known}")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise read.fail("model_type", f"architecture {_show(kind)} is not supported; {known}")
    own = data.get("_name_or_path")
    if isinstance(own, str) and own.strip("/."):
        name = own.rstrip("/").rsplit("/", 1)[-1]
    name = one_line(name.replace("/", "_"), MAX_NAME).strip(" .") or kind  # it goes into tables, titles and reports
    return ModelConfig(name=name, architecture=kind, **_values(read, ARCHITECTURES[kind]))


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
        where, why = source, _show(str(error))
    raise InputError(f"{where}: is not JSON ({why}); expected a config.json")


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Shapes from a ``config.json`` or from the folder that holds one; refused where the headers of the folder's
    ``*.safetensors`` say that its layers are of other shapes."""
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
    if whole:
        check_tensors(model, read_headers(file.parent), file.parent)
    return model


def from_file(data: Any, file: PurePath) -> ModelConfig:
    """Shapes from the parsed content of a file; a model without a name of its own is called after file or folder."""
    return from_hf_config(data, str(file), file.parent.name if file.name == "config.json" else file.stem)
