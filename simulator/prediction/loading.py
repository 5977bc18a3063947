"""Find whether a stock engine loads a pruned model, by the features of its checkpoint: :func:`loading`; and write its
``config.json``: :func:`config_of`.

Shapes are read from the workload of the model on one device. Engines state in their YAML files which features they load
(:mod:`simulator.engines.loading`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from simulator.arrays import Array, BoolArray
from simulator.codes import Kind, Part
from simulator.engines.engine import Engine
from simulator.engines.loading import FEATURES, Loading
from simulator.errors import InputError
from simulator.models.block import Block
from simulator.models.changes import changed_keys, content_of
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.prediction.result import Result
from simulator.pruning import prune
from simulator.pruning._aligned import widths
from simulator.pruning._rows import covering, layer_count
from simulator.workload import Workload


def loading(w: Workload, engine: Engine, config: ModelConfig | None) -> tuple[bool | None, str]:
    """Return whether the stock engine loads the checkpoint of a model (None: its file does not state it), and how, or
    why not. ``config`` is the configuration of the checkpoint, or of the dense model.
    """
    present = tuple(features(w))
    how = {name: engine.loads[name].how for name in present if name in engine.loads}
    missing: dict[str, list[str]] = {}  # reason -> features
    for name in how:
        if reason := _refusal(engine.loads[name], name, w, config):
            missing.setdefault(reason, []).append(FEATURES[name])
    custom = engine.loads.get("custom_code")
    if config is not None and config.custom_code and custom is not None and (missing or config.mismatch):
        if custom.value:
            return True, custom.how
        missing.setdefault(custom.how, []).append(f"{FEATURES['custom_code']} ({config.custom_code})")
    reasons = [f"{', '.join(names)}: {reason}" for reason, names in missing.items()]
    if config is not None and config.mismatch:
        fix = "" if missing else "; write its shapes into config.json"
        reasons.insert(0, f"tensors that differ from config.json ({config.mismatch}){fix}")
    if reasons:
        return False, "; ".join(reasons)
    if unknown := [FEATURES[name] for name in present if name not in how]:
        return None, f"the file of engine {engine.name} does not state whether it loads {', '.join(unknown)}"
    special = dict.fromkeys(text for name, text in how.items() if name != "uniform")
    return True, " and ".join(special) or how["uniform"]


def features(w: Workload) -> Iterator[str]:
    """Yield the features (:data:`simulator.engines.loading.FEATURES`) of the checkpoint of a model on one device."""
    yield "uniform"
    attention, down, routed = w.is_attention, widths(w)["MLP width"], w.kind == Kind.EXPERTS
    linear, inside = w.is_role("linear"), w.layer >= 0
    hidden, plain = int(widths(w)["hidden size"].max(initial=0)), attention & (w.latent == 0) & (w.value_dim == 0)
    if (w.heads[plain] * w.head_dim[plain] != hidden).any():
        yield "heads"
    if (w.heads[plain] % np.maximum(w.kv_heads[plain], 1)).any():
        yield "groups"
    mlp = (down > 0) | routed | (linear & (w.part == Part.MLP))
    mixing = attention | (w.kind == Kind.DELTA_NET) | (linear & (w.part == Part.ATTENTION))
    if (_layers(w, mlp & inside) != _layers(w, mixing)).any():
        yield "sublayers"
    with_experts = covering(w, routed, w.experts) > 0  # their MLPs have another width
    if any(_differ(down[(down > 0) & (with_experts == some)]) for some in (False, True)):
        yield "layer_inner"
    if _differ(w.heads[attention]):
        yield "layer_heads"
    if _differ(w.kv_heads[plain]):
        yield "layer_kv_heads"
    if _differ(w.experts[routed]) or _differ(w.n[routed]):
        yield "layer_experts"
    if (w.is_role("select") & w.overhead & (w.part == Part.MLP) & with_experts).any():
        yield "expert_choice"
    if linear.any():
        yield "linear"
    if (w.stage > 0).any():
        yield "low_rank"
    if w.is_role("residual_projection").any():
        yield "residual_projections"
    if (w.is_role("router") & w.overhead).any():
        yield "routers"


def blocks(w: Workload) -> tuple[Block, ...]:
    """Return the different sublayers of a model on one device: attention, MLPs and experts, each as one block."""
    attention, down, routed = w.is_attention, widths(w)["MLP width"], w.kind == Kind.EXPERTS
    kv_heads = np.where(w.latent > 0, w.heads, w.kv_heads)
    pairs = np.unique(np.stack([w.heads, kv_heads])[:, attention], axis=1).T.tolist()
    groups = np.unique(np.stack([w.experts, w.n])[:, routed], axis=1).T.tolist()
    return (
        *(Block(heads, few, 0) for heads, few in pairs),
        *(Block(0, 0, inner) for inner in np.unique(down[down > 0]).tolist()),
        *(Block(0, 0, 0, experts=many, expert_inner=inner) for many, inner in groups),
    )


def shapes_of(dense: ModelConfig, pruned: Workload) -> ModelConfig:
    """Return a model with the layers, widths and experts of a pruned workload, equal in all layers."""
    layers, attention, routed = layer_count(pruned), pruned.is_attention, pruned.kind == Kind.EXPERTS
    found = widths(pruned)
    latent = dense.latent is not None
    usual = Block(
        heads=_largest(pruned.heads[attention], dense.heads),
        kv_heads=dense.kv_heads if latent else _largest(pruned.kv_heads[attention], dense.kv_heads),
        inner=_largest(found["MLP width"], 0) if dense.inner else 0,
        experts=_largest(pruned.experts[routed], 0),
        active=float(pruned.active[routed].max(initial=0.0)),
        expert_inner=_largest(pruned.n[routed], 0),
    )
    model = replace(
        dense,
        layers=layers,
        windows=dense.windows[:layers],
        hidden=_largest(found["hidden size"], dense.hidden),
        blocks=(),
    )
    # layers of an architecture that differ, such as first layers without experts, differ in their places only
    return model.with_usual(usual, dense.blocks[:layers])


def _largest(values: Any, default: int) -> int:
    return int(np.max(values, initial=0)) or default


def config_of(source: str, r: Result) -> dict[str, Any]:
    """Return the content of the ``config.json`` of a predicted pruned model; InputError if it has no such file."""
    dense, content = load_model(source), content_of(source)
    if not content:
        raise InputError(f"{dense.name}: has no config.json to start from; expected a name or a file")
    new = shapes_of(dense, prune(lower(dense, phase="decode", engine=""), r.prune))
    keys = changed_keys(dense, new, content)
    parallel = r.parallel if r.devices > 1 else "tensor"
    built, whole = (lower(m, phase="decode", devices=r.devices, parallel=parallel) for m in (new, dense))
    pruned = prune(whole, r.prune)
    if pruned.parameters != built.parameters or not np.isclose(pruned.flops.sum(), built.flops.sum(), rtol=1e-9):
        raise InputError(f"{r.pruning}: a config.json of {dense.architecture} cannot state its shapes")
    return {**content, **keys}


def _refusal(found: Loading, feature: str, w: Workload, config: ModelConfig | None) -> str:
    """Return why an engine does not load a feature of a model, or ""."""
    if not found.value:
        return found.how
    if config is not None and found.model_types and (kind := _kind(config)) not in found.model_types:
        only = f"only for model_type {' and '.join(found.model_types)}, " if len(found.model_types) <= 3 else ""
        return f"{only}not for {kind}"
    inner = widths(w)["MLP width"]
    if feature == "layer_inner" and (odd := inner[inner % found.multiple > 0]).size:
        return f"it describes multiples of {found.multiple}, not {int(odd[0]):,}"
    return ""


def _kind(config: ModelConfig) -> str:
    """Return the model type whose code runs a model: Mistral without windows has the tensors and operators of Llama."""
    plain_mistral = config.architecture == "mistral" and not any(config.windows)
    return "llama" if plain_mistral else config.architecture


def _layers(w: Workload, mask: Array) -> BoolArray:
    """Return which layers have at least one of the masked rows."""
    marks = np.zeros(layer_count(w) + 1, dtype=np.int64)
    np.add.at(marks, w.layer[mask], 1)
    np.add.at(marks, (w.layer + w.layers)[mask], -1)
    return np.cumsum(marks)[:-1] > 0


def _differ(values: Array) -> bool:
    return len(values) > 0 and bool((values != values[0]).any())
