"""Write the shapes of a pruned model to a ``config.json``.

Use :func:`config_content` for the content and :func:`write_config` for a folder that
:func:`simulator.load_model` reads. :mod:`simulator.models.architectures` describes the keys.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from simulator.errors import InputError
from simulator.files.read import read_bounded
from simulator.files.write import write_whole
from simulator.models.architectures import ARCHITECTURES, EXPERT_KEYS, Reader, model_fields
from simulator.models.architectures.reader import ConfigFields, Content
from simulator.models.library import (
    MAX_FILE_BYTES,
    from_hf_config,
    list_models,
    load_model,
    published_keys,
    read_content,
)
from simulator.models.model import Layer, Model
from simulator.models.quantization import without_formats
from simulator.models.sublayers import (
    Attention,
    DeltaNet,
    Experts,
    LightningAttention,
    Linear,
    Mamba,
    Mamba2,
    Mlp,
    ShortConv,
)
from simulator.models.sublayers.base import Sublayer
from simulator.models.tables import read_names

NONE: Content = {}
_DECI = "nemotron-nas"
# architectures that compute the same as DeciLM
_DECI_SOURCES = ("llama", "mistral", "ministral", _DECI)

_TABLE = read_names("sizes")
_KEYS: Mapping[str, Mapping[str, Sequence[str]]] = _TABLE["sizes"]
"""Kind of sublayer -> its sizes -> keys that can state them, by their usual names."""

_SIZES: Mapping[str, Callable[[Any, int], float]] = {
    "expand": lambda one, hidden: (one.channels if isinstance(one, Mamba) else one.inner) / hidden,
    "shared_experts": lambda experts, hidden: experts.shared_inner / experts.inner,
}
"""Sizes that are no fields of a sublayer, given the sublayer and the hidden size."""

_NUMBERED: Mapping[str, int] = _TABLE["numbered"]
"""Keys that list numbers of layers -> number of the first layer."""

_OBJECTS: Sequence[str] = _TABLE["objects"]
"""Keys of objects with sizes."""

_FIRST: Sequence[str] = _TABLE["first"]
"""Keys of the number of first layers of one kind."""


def config_content(content: Content, dense: Model, pruned: Model) -> ConfigFields:
    """Return the content of the ``config.json`` of a pruned model, given that of the dense model.

    The usual keys state a model of equal layers. Layers that differ are stated as
    ``block_configs``: in the keys of DeciLM, which vLLM loads, if the dense model is a Llama, else
    in those of ModelOpt; or else as ``per_layer_config`` of Transformers. InputError if no content
    states the shapes."""
    if not content:
        raise InputError(
            f"{dense.name}: has no config.json; expected a named model, a folder or a file"
        )
    content = {key: value for key, value in content.items() if key != "_name_or_path"}
    pruned = compact(pruned)
    if reason := _not_stated(pruned):
        raise InputError(f"{pruned.name}: a config.json does not state {reason}")
    return _stating(_candidates(content, dense, pruned), dense, pruned)


def plain_content(content: Content, dense: Model, pruned: Model) -> ConfigFields:
    """Return the content of :func:`config_content` in the usual keys alone; InputError if these
    cannot state the shapes."""
    numbers = _numbers(dense, pruned)
    config = _Config(content, dense.architecture)
    candidates = () if numbers is None else _plain(config, dense, pruned, numbers)
    return _stating(candidates, dense, pruned)


def _stating(candidates: Iterable[ConfigFields], dense: Model, pruned: Model) -> ConfigFields:
    """Return the first content that states the shapes of the pruned model."""
    if (found := next((one for one in candidates if states(one, pruned)), None)) is None:
        wrong = f"a config.json of {dense.architecture} cannot state these shapes"
        raise InputError(f"{dense.name}: {wrong}")
    return found


def compact(model: Model) -> Model:
    """Return a model without layers that have no sublayers."""
    if all(layer.sublayers for layer in model.layers):
        return model
    kept = [i for i, layer in enumerate(model.layers) if layer.sublayers]
    numbers = [model.layer_numbers[i] for i in kept]
    return model.with_layers((model.layers[i] for i in kept), numbers)


def _not_stated(model: Model) -> str:
    """Return which feature of a model no configuration states, or ""."""
    for layer in dict.fromkeys(model.layers):
        for sublayer in layer.sublayers:
            for _, form in sublayer.forms:
                return "low-rank factors" if form.rank is not None else "zeros in weights"
            if sublayer.rotates or (isinstance(sublayer, Mlp) and sublayer.out):
                return "residual projections"
            if isinstance(sublayer, Experts) and sublayer.choices:
                return "merged experts or a number of experts per token"
    return ""


@dataclass(frozen=True)
class _Config:
    """The content of a config.json. The decoder's keys are read and changed by their usual names; a
    key of an object is "object.key"."""

    content: Content
    architecture: str

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise InputError(f"no table has the keys of model_type {self.architecture}")

    @cached_property
    def keys(self) -> Content:
        """Stated keys of the decoder."""
        inside = _inside(self.content)
        nested = {
            f"{key}.{name}": value
            for key in _OBJECTS
            if isinstance(inside.get(key), Mapping)
            for name, value in inside[key].items()
        }
        return {**inside, **nested}

    @cached_property
    def known(self) -> set[str]:
        """Keys that the architecture reads, and those that are stated."""
        read = Reader(_inside(self.content), "config.json")
        model_fields(ARCHITECTURES[self.architecture], read)
        return read.known | {*self.keys}

    def name(self, key: str) -> str:
        """Return the name of a key in this content."""
        return Reader(self.keys, "", names_of=ARCHITECTURES[self.architecture].keys).key(key)

    def get(self, key: str) -> Any:
        return self.keys.get(self.name(key))

    def knows(self, key: str) -> bool:
        return self.name(key) in self.known

    def with_keys(self, keys: Content) -> ConfigFields:
        """Return the content with other values of some keys."""
        inside = dict(_inside(self.content))
        for key, value in keys.items():
            part, _, name = self.name(key).rpartition(".")
            inside |= {part: {**inside[part], name: value}} if part else {name: value}
        if isinstance(self.content.get("text_config"), Mapping):
            return {**self.content, "text_config": inside}
        return inside


def _inside(content: Content) -> Content:
    """Return the keys of the decoder, which multimodal models nest."""
    text = content.get("text_config")
    return text if isinstance(text, Mapping) else content


def _candidates(content: Content, dense: Model, pruned: Model) -> Iterator[ConfigFields]:
    numbers = _numbers(dense, pruned)
    if numbers is not None:
        yield from _plain(_Config(content, dense.architecture), dense, pruned, numbers)
        if len(numbers) < len(dense.layers):
            fewer = dense.with_layers((dense.layers[number] for number in numbers), numbers)
            content = plain_content(content, dense, fewer)
            dense = fewer
    yield from _by_layer(_Config(content, dense.architecture), dense, pruned)


def _plain(
    config: _Config, dense: Model, pruned: Model, numbers: tuple[int, ...]
) -> Iterator[ConfigFields]:
    fewer = config.with_keys(_fewer_layers(config, len(dense.layers), numbers))
    remaining = dense.with_layers(dense.layers[number] for number in numbers)
    for stated in (fewer, *_literal(_Config(fewer, dense.architecture), remaining)):
        base = _Config(stated, dense.architecture)
        keys = _changed_keys(base, remaining, pruned)
        odd = pruned.heads and pruned.hidden % pruned.heads
        if pruned.architecture == "llama" and odd and base.content is _inside(base.content):
            # LlamaConfig of Transformers from 5.5 refuses such heads; Mistral without windows
            # computes the same
            keys |= {
                "model_type": "mistral",
                "architectures": ["MistralForCausalLM"],
                "sliding_window": None,
            }
        yield base.with_keys(keys)
        yield base.with_keys(keys | _kinds_of_layers(config, pruned))


def _numbers(dense: Model, pruned: Model) -> tuple[int, ...] | None:
    """Return the layers of the dense model that remain; None if they are unknown."""
    many = len(dense.layers)
    numbers = pruned.numbers or tuple(range(len(pruned.layers)))
    known = len(numbers) == len(pruned.layers) and all(0 <= n < many for n in numbers)
    return numbers if known else None


def _literal(config: _Config, model: Model) -> Iterator[ConfigFields]:
    """Yield a content that states the width of MLPs which LFM2 computes from another width."""
    adjusts = "block_auto_adjust_ff_dim"
    widths = {"intermediate_size", "block_ff_dim"}
    if config.knows(adjusts):
        stated = {key: model.inner for key in widths if key in config.keys}
        yield config.with_keys({adjusts: False, **stated})


def _fewer_layers(config: _Config, many: int, numbers: tuple[int, ...]) -> ConfigFields:
    """Return the keys that state fewer layers: their number, lists and texts by layer, and numbers
    of first or last layers of one kind."""
    if numbers == tuple(range(many)):
        return {}
    keys: ConfigFields = {}
    first = {config.name(key) for key in _FIRST}
    for key, value in config.keys.items():
        least = _NUMBERED.get(key.rpartition(".")[2])
        if least is not None and isinstance(value, list):
            keys[key] = [i for i, number in enumerate(numbers, least) if number + least in value]
        elif isinstance(value, list) and (len(value) == many or key == "compress_ratios"):
            # further entries are those of layers that predict further tokens
            keys[key] = [*(value[number] for number in numbers), *value[many:]]
        elif isinstance(value, str) and len(value) == many and key.endswith("pattern"):
            keys[key] = "".join(value[number] for number in numbers)
        elif value is None:
            continue
        elif key == config.name("num_hidden_layers"):
            keys[key] = len(numbers)
        elif key in first:
            keys[key] = dense = sum(number < value for number in numbers)
            if dense != value and config.knows("mlp_layer_types"):  # some classes read this alone
                keys["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (len(numbers) - dense)
        elif key == "moe_layer_end_index" and value >= 0:
            keys[key] = sum(number <= value for number in numbers) - 1
        elif key == "num_kv_shared_layers":
            keys[key] = sum(number >= many - value for number in numbers)
        elif key == "per_layer_config" and value:
            overrides = {int(number): override for number, override in value.items()}
            keys[key] = {str(i): overrides[n] for i, n in enumerate(numbers) if n in overrides}
    return keys


# number of a layer, one of its sizes in the dense model, and in the pruned model
_Change = tuple[int, float, float]


def _changed_keys(config: _Config, dense: Model, pruned: Model) -> ConfigFields:
    """Return the keys of sizes that differ, given a pruned model with as many layers. A key that is
    not stated is added if no stated key has the size."""
    keys = dict[str, Any]()
    for names, changes in _size_changes(dense, pruned).items():
        stated = [key for key in names if config.get(key) is not None]
        others = [key for key in names if key not in stated and config.knows(key)]
        for alternatives in (stated, others):
            values = {key: _changed(config.get(key), changes) for key in alternatives}
            changed = {key: value for key, value in values.items() if value is not None}
            keys |= changed
            if changed:
                break
    features = {a.head_dim for a in _attentions(pruned) if isinstance(a, Attention)}
    resized = (dense.hidden, dense.heads) != (pruned.hidden, pruned.heads)
    if resized and len(features) == 1 and config.knows("head_dim"):
        # else readers compute it from the other two sizes
        keys.setdefault("head_dim", features.pop())
    return keys


def _size_changes(dense: Model, pruned: Model) -> dict[tuple[str, ...], list[_Change]]:
    """Return the sizes of both models by the keys that can state them."""
    hidden = (0, dense.hidden, pruned.hidden)
    changes: dict[tuple[str, ...], list[_Change]] = {
        ("hidden_size", "word_embed_proj_dim"): [hidden]
    }
    for i, layers in enumerate(zip(dense.layers, pruned.layers)):
        for old, new in _pairs(*layers):
            for name, keys in _keys_of(old).items():
                sizes = _size(old, name, dense.hidden), _size(new, name, pruned.hidden)
                changes.setdefault(tuple(keys), []).append((i, *sizes))
    return changes


def _pairs(old: Layer, new: Layer) -> Iterator[tuple[Sublayer, Sublayer]]:
    """Yield the sublayers of a layer that remain, before and after pruning."""
    rest = list(new.sublayers)
    for sublayer in old.sublayers:
        same = next((s for s in rest if type(s) is type(sublayer)), None)
        if same is not None:
            rest.remove(same)
            yield sublayer, same


def _keys_of(sublayer: Sublayer) -> Mapping[str, Sequence[str]]:
    kinds = (kind.__name__ for kind in type(sublayer).__mro__)
    return next((_KEYS[kind] for kind in kinds if kind in _KEYS), {})


def _size(sublayer: Sublayer, name: str, hidden: int) -> float:
    size = _SIZES[name](sublayer, hidden) if name in _SIZES else getattr(sublayer, name)
    return float(size)


def _changed(stated: Any, changes: Sequence[_Change]) -> Any:
    """Return the value that a key has after pruning: a number, or a list by layer. None if the
    value stays, or if it would state several sizes."""
    if isinstance(stated, list):
        sizes = {i: after for i, before, after in changes if stated[i : i + 1] == [before]}
        values = [int(sizes[i]) if i in sizes else value for i, value in enumerate(stated)]
        return values if values != stated else None
    pairs = {(before, after) for _, before, after in changes if stated in (None, before)}
    afters = {after for _, after in pairs}
    if len(afters) != 1 or all(before == after for before, after in pairs):
        return None
    (size,) = afters
    return int(size) if size == int(size) else None


def _kinds_of_layers(config: _Config, pruned: Model) -> ConfigFields:
    """Return keys that list the kinds of layers, for layers that follow no rule."""
    lists: dict[str, list[Any]] = {
        "layer_types": [_layer_type(layer, pruned.architecture) for layer in pruned.layers],
        "mlp_layer_types": [_mlp_type(layer) for layer in pruned.layers],
        "no_rope_layers": [int(_rotates(layer)) for layer in pruned.layers],
    }
    return {key: names for key, names in lists.items() if config.knows(key) and not config.get(key)}


def _layer_type(layer: Layer, architecture: str) -> str:
    mixer = layer.of("attention")
    if isinstance(mixer, ShortConv):
        return "conv"
    if isinstance(mixer, DeltaNet | LightningAttention | Mamba | Mamba2):
        return "linear_attention"
    windowed = "chunked_attention" if architecture == "llama4_text" else "sliding_attention"
    return windowed if layer.window else "full_attention"


def _mlp_type(layer: Layer) -> str:
    return "sparse" if isinstance(layer.of("mlp"), Experts) else "dense"


def _rotates(layer: Layer) -> bool:
    attention = layer.of("attention")
    return not isinstance(attention, Attention) or attention.rotary > 0


def _by_layer(config: _Config, dense: Model, pruned: Model) -> Iterator[ConfigFields]:
    """Yield contents that state each layer; ``dense`` has as many layers as the pruned model."""
    if len(dense.layers) != len(pruned.layers):
        return
    grouped = [s for s in _attentions(pruned) if isinstance(s, Attention)]
    heads = {attention.heads for attention in grouped}
    if len(heads) == 1:
        keys = _changed_keys(config, dense, pruned)
        keys = {k: v for k, v in keys.items() if k in ("num_attention_heads", "head_dim")}
        content = config.with_keys(keys)
        yield from _block_configs(content, _with_heads(dense, heads.pop()), pruned)
    yield _per_layer_config(config, dense, pruned)


def _attentions(model: Model) -> Iterator[Sublayer]:
    for layer in model.layers:
        if attention := layer.of("attention"):
            yield attention


def _with_heads(model: Model, heads: int) -> Model:
    return model.each_layer(
        lambda layer: layer.each(
            lambda s: replace(s, heads=heads) if isinstance(s, Attention) else s
        )
    )


def _block_configs(content: Content, dense: Model, pruned: Model) -> Iterator[ConfigFields]:
    try:
        configs = [block_config(new, old) for new, old in zip(pruned.layers, dense.layers)]
    except InputError:
        return
    if dense.architecture in _DECI_SOURCES and pruned.hidden == dense.hidden:
        heads = _inside(content)["num_attention_heads"]
        windows = pruned.windows if dense.architecture == _DECI else (0,) * len(pruned.layers)
        deci = [
            _deci_config(config, heads, dense.hidden, window)
            for config, window in zip(configs, windows)
        ]
        # a reader that knows no block_configs must fail instead of loading a dense model
        keys: ConfigFields = {"num_key_value_heads": None, "intermediate_size": None}
        keys |= {"max_position_embeddings": dense.max_positions}  # defaults differ
        names = {"model_type": _DECI, "architectures": ["DeciLMForCausalLM"]}
        yield {**content, **names, **keys, "block_configs": deci}
    yield {**content, "block_configs": configs}


def _per_layer_config(config: _Config, dense: Model, pruned: Model) -> ConfigFields:
    """Return a content whose ``per_layer_config`` overrides the keys of layers that differ."""
    overrides = {}
    for i, (old, new) in enumerate(zip(dense.layers, pruned.layers)):
        if old == new:
            continue
        skipped = [part for part in ("attention", "mlp") if old.has(part) and not new.has(part)]
        alone = replace(dense, layers=(old,)), replace(pruned, layers=(new,))
        keys = {config.name(k): v for k, v in _changed_keys(config, *alone).items()}
        overrides[str(i)] = keys | ({"skip": skipped} if skipped else {})
    return config.with_keys({"per_layer_config": overrides})


def block_config(layer: Layer, dense: Layer) -> ConfigFields:
    """Return a layer in the keys of ModelOpt; InputError for a layer that they cannot state."""
    attention = _attention_config(layer.of("attention"), dense.of("attention"))
    return {"attention": attention, "ffn": _mlp_config(layer.of("mlp"), dense.of("mlp"))}


def _switches(sublayer: Sublayer | None) -> ConfigFields:
    return {"no_op": sublayer is None, "replace_with_linear": isinstance(sublayer, Linear)}


def _attention_config(attention: Sublayer | None, dense: Sublayer | None) -> ConfigFields:
    config = _switches(attention)
    if isinstance(attention, Attention):
        if isinstance(dense, Attention) and attention.heads != dense.heads:
            raise InputError(
                f"block_configs: expected {dense.heads} query heads in each layer, got"
                f" {attention.heads}"
            )
        config["num_key_value_heads"] = attention.kv_heads
    elif isinstance(attention, Linear):  # ModelOpt requires sizes of linear sublayers, too
        config["num_key_value_heads"] = dense.kv_heads if isinstance(dense, Attention) else 1
    elif attention is not None:
        raise InputError("block_configs: expected layers of grouped attention and MLPs")
    return config


def _mlp_config(mlp: Sublayer | None, dense: Sublayer | None) -> ConfigFields:
    config = _switches(mlp)
    if isinstance(mlp, Experts):
        if mlp.active != int(mlp.active):
            raise InputError(
                f"block_configs: expected a whole number of active experts, got {mlp.active:g}"
            )
        moe = {key: int(getattr(mlp, name)) for name, key in EXPERT_KEYS.items()}
        config["moe"] = {**moe, "shared_expert_intermediate_dim": mlp.shared_inner}
    elif isinstance(mlp, Mlp):
        config["intermediate_size"] = mlp.inner
    elif isinstance(mlp, Linear):
        config["intermediate_size"] = dense.inner if isinstance(dense, Mlp | Experts) else 1
    return config


def _deci_config(config: Content, heads: int, hidden: int, window: int) -> ConfigFields:
    """Return a layer in the keys of DeciLM, given its object in the keys of ModelOpt."""
    attention = dict(config["attention"])
    mlp = dict(config["ffn"])
    groups = attention.pop("num_key_value_heads", 0)
    inner = mlp.pop("intermediate_size", 0)
    if not (attention["no_op"] or attention["replace_with_linear"]):
        attention["n_heads_in_group"] = heads // groups
    if window:
        attention["window_length"] = window
    if not (mlp["no_op"] or mlp["replace_with_linear"]):
        mlp["ffn_mult"] = 3 * inner / (2 * hidden)
    return {"attention": attention, "ffn": mlp}


def states(content: Content, model: Model) -> bool:
    """Return whether a content has all shapes of a model. Its name may differ, and the format of
    its weights, which a changed content keeps."""
    try:
        read = from_hf_config(content)
    except InputError:
        return False
    first, second = (
        replace(without_formats(_stated(compact(one))), name="", architecture="")
        for one in (read, model)
    )
    return first == second


def _stated(model: Model) -> Model:
    """Return a model without what follows from its dense model."""
    return model.each_layer(
        lambda layer: layer.each(lambda s: replace(s, trained=0) if isinstance(s, Experts) else s)
    )


def content_of(
    source: str | os.PathLike[str] | Content | Model,
    model: Model | None = None,
) -> Content:
    """Return the content of the ``config.json`` of a model source, which is loaded as ``model``. A
    named model has the published keys that change its shapes or its results; a model that was made
    in Python has no content."""
    model = model or load_model(source)
    if isinstance(source, Mapping):
        return source
    if model.name in list_models() and load_model(model.name) is model:
        keys = published_keys(model.name)
        return {key: value for key, value in keys.items() if not key.startswith("_")}
    if isinstance(source, Model):
        return NONE
    file = Path(source).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():  # a pipe cannot be read twice
        return NONE
    content = read_content(file)
    return content if isinstance(content, dict) else NONE


def write_config(folder: str | os.PathLike[str], content: Content) -> Path:
    """Write a ``config.json`` into a folder, which is created; never replace a file with different
    content."""
    file = Path(folder).expanduser() / "config.json"
    try:
        # Transformers writes infinity as a limit of Mamba's time steps, and nowhere else
        others = {key: value for key, value in content.items() if key != "time_step_limit"}
        json.dumps(others, allow_nan=False)
        text = json.dumps(content, indent=2) + "\n"
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
