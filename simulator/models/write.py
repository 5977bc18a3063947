"""Write the shapes of a pruned model to a ``config.json``.

Use :func:`config_content` for the content and :func:`write_config` for a folder that
:func:`simulator.load_model` reads. :mod:`simulator.models.architectures` describes the keys.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simulator.errors import InputError
from simulator.files.read import parse_bounded, read_bounded
from simulator.files.write import write_whole
from simulator.models.architectures import ARCHITECTURES, EXPERT_KEYS, Reader
from simulator.models.library import FOLDER, MAX_FILE_BYTES, from_hf_config, list_models, load_model
from simulator.models.model import Layer, Model
from simulator.models.sublayers import Attention, DeltaNet, Experts, LatentAttention, Linear, Mlp
from simulator.models.sublayers.base import Sublayer

NONE: Mapping[str, Any] = MappingProxyType({})
_DECI = "nemotron-nas"
# architectures that compute the same as DeciLM
_DECI_SOURCES = ("llama", "mistral", "ministral", _DECI)

_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "hidden": ("hidden_size", "word_embed_proj_dim"),
        "heads": ("num_attention_heads",),
        "kv_heads": ("num_key_value_heads",),
        "head_dim": ("head_dim",),
        "inner": ("intermediate_size", "ffn_dim", "intermediate_size_mlp"),
        "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
        "active": ("num_experts_per_tok",),
        "expert_inner": ("moe_intermediate_size", "intermediate_size"),
        "shared_inner": ("shared_expert_intermediate_size", "intermediate_size"),
        "shared_experts": ("n_shared_experts",),
        "value_heads": ("linear_num_value_heads",),
        "key_heads": ("linear_num_key_heads",),
    }
)
"""Size of a model -> keys that can state it, in some architectures."""

_NUMBERED = ("mlp_only_layers", "moe_layers")
"""Keys that list numbers of layers."""


def config_content(content: Mapping[str, Any], dense: Model, pruned: Model) -> dict[str, Any]:
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
    for candidate in _candidates(content, dense, pruned):
        if states(candidate, pruned):
            return candidate
    raise _unstated(dense)


def plain_content(content: Mapping[str, Any], dense: Model, pruned: Model) -> dict[str, Any]:
    """Return the content of :func:`config_content` in the usual keys alone; InputError if these
    cannot state the shapes."""
    numbers = _numbers(dense, pruned)
    for candidate in _plain(content, dense, pruned, numbers) if numbers is not None else ():
        if states(candidate, pruned):
            return candidate
    raise _unstated(dense)


def _unstated(dense: Model) -> InputError:
    return InputError(
        f"{dense.name}: a config.json of {dense.architecture} cannot state these shapes"
    )


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


def _candidates(
    content: Mapping[str, Any], dense: Model, pruned: Model
) -> Iterator[dict[str, Any]]:
    numbers = _numbers(dense, pruned)
    if numbers is not None:
        yield from _plain(content, dense, pruned, numbers)
        if len(numbers) < len(dense.layers):
            fewer = dense.with_layers((dense.layers[number] for number in numbers), numbers)
            content, dense = plain_content(content, dense, fewer), fewer
    yield from _by_layer(content, dense, pruned)


def _plain(
    content: Mapping[str, Any], dense: Model, pruned: Model, numbers: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    keys = _fewer_layers(content, dense, numbers) | _changed_keys(content, dense, pruned)
    odd = pruned.heads and pruned.hidden % pruned.heads
    if pruned.architecture == "llama" and odd and _inside(content) is content:
        # LlamaConfig of Transformers from 5.5 refuses such heads; Mistral without windows computes
        # the same
        keys |= {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": None,
        }
    yield _with(content, keys)
    yield _with(content, keys | _kinds_of_layers(content, pruned))


def _numbers(dense: Model, pruned: Model) -> tuple[int, ...] | None:
    """Return the layers of the dense model that remain; None if they are unknown."""
    many = len(dense.layers)
    numbers = pruned.numbers or tuple(range(len(pruned.layers)))
    known = len(numbers) == len(pruned.layers) and all(0 <= n < many for n in numbers)
    return numbers if known else None


def _inside(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the keys of the decoder, which multimodal models nest."""
    text = content.get("text_config")
    return text if isinstance(text, Mapping) else content


def _known_keys(content: Mapping[str, Any], architecture: str) -> set[str]:
    """Return the keys that an architecture reads, and those in a content."""
    read = Reader(_inside(content), "config.json")
    ARCHITECTURES[architecture].model(read)
    return read.known | {*_inside(content)}


def _with(content: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(content.get("text_config"), Mapping) and keys:
        return {**content, "text_config": {**content["text_config"], **keys}}
    return {**content, **keys}


def _fewer_layers(
    content: Mapping[str, Any], dense: Model, numbers: tuple[int, ...]
) -> dict[str, Any]:
    """Return the keys that state fewer layers: their number, lists by layer, and the number of
    first layers without experts."""
    many = len(dense.layers)
    if numbers == tuple(range(many)):
        return {}
    keys: dict[str, Any] = {"num_hidden_layers": len(numbers)}
    for key, value in _inside(content).items():
        if key in _NUMBERED and isinstance(value, list):
            keys[key] = [i for i, number in enumerate(numbers) if number in value]
        elif isinstance(value, list) and len(value) == many:
            keys[key] = [value[number] for number in numbers]
        elif key == "first_k_dense_replace":
            keys[key] = sum(number < value for number in numbers)
        elif key == "per_layer_config" and value:
            overrides = {int(number): override for number, override in value.items()}
            keys[key] = {str(i): overrides[n] for i, n in enumerate(numbers) if n in overrides}
    return keys


def _changed_keys(content: Mapping[str, Any], dense: Model, pruned: Model) -> dict[str, Any]:
    """Return the usual keys of sizes that differ between the dense model and the pruned one."""
    inside, before, after = _inside(content), _sizes(dense), _sizes(pruned)
    known, keys = _known_keys(content, dense.architecture), dict[str, Any]()
    for name, value in after.items():
        for key in known.intersection(_KEYS[name]):
            stated = inside.get(key, before.get(name)) == before.get(name)
            if value != before.get(name) and stated:
                keys[key] = value
    divided = ("hidden", "heads")
    if "head_dim" in known & {*after} and any(before.get(n) != after[n] for n in divided):
        keys["head_dim"] = after["head_dim"]  # else readers compute it from the other two keys
    return keys


def _sizes(model: Model) -> dict[str, int]:
    """Return the sizes of a model by the names of :data:`_KEYS`, of each kind of sublayer those of
    one."""
    sizes = {"hidden": model.hidden}
    for sublayer in {type(s): s for layer in model.layers for s in layer.sublayers}.values():
        sizes |= _sublayer_sizes(sublayer)
    return {name: size for name, size in sizes.items() if size}


def _sublayer_sizes(sublayer: Sublayer) -> dict[str, int]:
    if isinstance(sublayer, Attention | LatentAttention):
        features = {"head_dim": sublayer.head_dim} if isinstance(sublayer, Attention) else {}
        return {"heads": sublayer.heads, "kv_heads": sublayer.kv_heads, **features}
    if isinstance(sublayer, DeltaNet):
        return {"value_heads": sublayer.heads, "key_heads": sublayer.kv_heads}
    if isinstance(sublayer, Mlp):
        return {"inner": sublayer.inner}
    if isinstance(sublayer, Experts):
        shared, rest = divmod(sublayer.shared_inner, sublayer.inner)
        whole = sublayer.active == int(sublayer.active)
        return {
            "experts": sublayer.experts,
            "active": int(sublayer.active) if whole else 0,
            "expert_inner": sublayer.inner,
            "shared_inner": sublayer.shared_inner,
            "shared_experts": 0 if rest else shared,
        }
    return {}


def _kinds_of_layers(content: Mapping[str, Any], pruned: Model) -> dict[str, Any]:
    """Return keys that list the kinds of layers, for layers that follow no rule."""
    known = _known_keys(content, pruned.architecture)
    lists: dict[str, list[Any]] = {
        "layer_types": [_layer_type(layer, pruned.architecture) for layer in pruned.layers],
        "no_rope_layers": [int(_rotates(layer)) for layer in pruned.layers],
    }
    stated = {key for key, value in _inside(content).items() if value}
    return {key: names for key, names in lists.items() if key in known - stated}


def _layer_type(layer: Layer, architecture: str) -> str:
    if isinstance(layer.of("attention"), DeltaNet):
        return "linear_attention"
    windowed = "chunked_attention" if architecture == "llama4_text" else "sliding_attention"
    return windowed if layer.window else "full_attention"


def _rotates(layer: Layer) -> bool:
    attention = layer.of("attention")
    return not isinstance(attention, Attention) or attention.rotary > 0


def _by_layer(content: Mapping[str, Any], dense: Model, pruned: Model) -> Iterator[dict[str, Any]]:
    """Yield contents that state each layer; ``dense`` has as many layers as the pruned model."""
    if len(dense.layers) != len(pruned.layers):
        return
    grouped = [s for s in _attentions(pruned) if isinstance(s, Attention)]
    heads = {attention.heads for attention in grouped}
    if len(heads) == 1:
        keys = _changed_keys(content, dense, pruned)
        keys = {k: v for k, v in keys.items() if k in ("num_attention_heads", "head_dim")}
        yield from _block_configs(_with(content, keys), _with_heads(dense, heads.pop()), pruned)
    yield _per_layer_config(content, dense, pruned)


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


def _block_configs(
    content: Mapping[str, Any], dense: Model, pruned: Model
) -> Iterator[dict[str, Any]]:
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
        keys: dict[str, Any] = {"num_key_value_heads": None, "intermediate_size": None}
        keys |= {"max_position_embeddings": dense.max_positions}  # defaults differ
        names = {"model_type": _DECI, "architectures": ["DeciLMForCausalLM"]}
        yield {**content, **names, **keys, "block_configs": deci}
    yield {**content, "block_configs": configs}


def _per_layer_config(content: Mapping[str, Any], dense: Model, pruned: Model) -> dict[str, Any]:
    """Return a content whose ``per_layer_config`` overrides the keys of layers that differ."""
    overrides = {}
    for i, (old, new) in enumerate(zip(dense.layers, pruned.layers)):
        if old == new:
            continue
        skipped = [part for part in ("attention", "mlp") if old.has(part) and not new.has(part)]
        alone = replace(dense, layers=(old,)), replace(pruned, layers=(new,))
        keys = _changed_keys(content, *alone)
        overrides[str(i)] = keys | ({"skip": skipped} if skipped else {})
    return _with(content, {"per_layer_config": overrides})


def block_config(layer: Layer, dense: Layer) -> dict[str, Any]:
    """Return a layer in the keys of ModelOpt; InputError for a layer that they cannot state."""
    attention, mlp = layer.of("attention"), layer.of("mlp")
    return {
        "attention": _attention_config(attention, dense.of("attention")),
        "ffn": _mlp_config(mlp, dense.of("mlp")),
    }


def _attention_config(attention: Sublayer | None, dense: Sublayer | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "no_op": attention is None,
        "replace_with_linear": isinstance(attention, Linear),
    }
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


def _mlp_config(mlp: Sublayer | None, dense: Sublayer | None) -> dict[str, Any]:
    config: dict[str, Any] = {"no_op": mlp is None, "replace_with_linear": isinstance(mlp, Linear)}
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
        inner = dense.inner if isinstance(dense, Mlp | Experts) else 1
        config["intermediate_size"] = inner
    return config


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


def states(content: Mapping[str, Any], model: Model) -> bool:
    """Return whether a content has all shapes of a model. Its name may differ, and the format of
    its weights, which a changed content keeps."""
    try:
        read = from_hf_config(content)
    except InputError:
        return False
    first, second = (
        replace(_stated(compact(one)), name="", architecture="", weight_dtype="")
        for one in (read, model)
    )
    return first == second


def _stated(model: Model) -> Model:
    """Return a model without what follows from its dense model."""
    return model.each_layer(
        lambda layer: layer.each(lambda s: replace(s, trained=0) if isinstance(s, Experts) else s)
    )


def content_of(
    source: str | os.PathLike[str] | Mapping[str, Any] | Model,
    model: Model | None = None,
) -> Mapping[str, Any]:
    """Return the content of the ``config.json`` of a model source, which is loaded as ``model``. A
    named model has the published keys that change its shapes or its results; a model that was made
    in Python has no content."""
    model = model or load_model(source)
    if isinstance(source, Mapping):
        return source
    if model.name in list_models() and load_model(model.name) is model:
        content = json.loads((FOLDER / f"{model.name}.json").read_text(encoding="utf-8"))
        return {key: value for key, value in content.items() if not key.startswith("_")}
    if isinstance(source, Model):
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
