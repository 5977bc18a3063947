"""Values of the names that expressions of a method use: sizes of the model, of the request and of a
row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from simulator.arrays import Array, FloatArray
from simulator.codes import DTYPE_BYTES, Part
from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.models.model import Model
from simulator.pruning.described.description import LayerRange
from simulator.pruning.dynamic import rows as _rows
from simulator.pruning.dynamic.rows import covering, layer_count, stream_bytes
from simulator.workload import Workload

# name in an expression -> names of sizes of a sublayer, the first that it has
_OF_LAYER: Mapping[str, tuple[str, ...]] = {
    "inner": ("expert width", "inner width"),
    "heads": ("heads",),
    "kv_heads": ("KV heads",),
    "experts": ("experts",),
    "top_k": ("active experts",),
}
_OF_MODEL = ("hidden", "vocab", "layers", "head_dim", "attention_share", "mlp_share")


def model_sizes(model: Model, names: Iterable[str]) -> dict[str, float | FloatArray]:
    """Return the sizes of a model that expressions name; a size that differs between layers is an
    array (L,)."""
    found: dict[str, float | FloatArray] = {}
    for name in names:
        if name in _OF_LAYER:
            found[name] = _by_layer(model, name)
        elif name in ("attention_share", "mlp_share"):
            found[name] = _share_of_weights(model, name.removesuffix("_share"))
        elif name == "layers":
            found[name] = float(len(model.layers))
        elif name == "layer":
            found[name] = np.arange(len(model.layers), dtype=np.float64)
        elif name == "head_dim":
            found[name] = _head_dim(model)
        elif name in _OF_MODEL:
            found[name] = float(getattr(model, name))
    return found


def _by_layer(model: Model, name: str) -> float | FloatArray:
    sizes = np.zeros(len(model.layers))
    for at, layer in enumerate(model.layers):
        of_layer = {n: size for sublayer in layer.sublayers for n, size in sublayer.sizes().items()}
        sizes[at] = next((of_layer[n] for n in _OF_LAYER[name] if n in of_layer), 0.0)
    if not sizes.any():
        raise InputError(f"{name}: {model.name} has no {_OF_LAYER[name][-1]}")
    return float(sizes[0]) if (sizes == sizes[0]).all() else sizes


def _share_of_weights(model: Model, part: str) -> float:
    sums = {key: float(counts.sum()) for key, counts in model.weight_counts.items()}
    inside = (count for (kind, _), count in sums.items() if (kind == "mlp") == (part == "mlp"))
    return sum(inside) / sum(sums.values())


def _head_dim(model: Model) -> float:
    for sublayer in (s for layer in model.layers for s in layer.sublayers):
        if size := getattr(sublayer, "head_dim", 0):
            return float(size)
    raise InputError(f"head_dim: {model.name} has no heads")


def row_sizes(
    w: Workload, at: Array, names: Iterable[str], s: float | FloatArray
) -> dict[str, float | Array]:
    """Return the values of names for some rows of a workload; ``s`` is the sparsity of the method,
    or that of each layer."""
    wanted, layer = set(names), np.maximum(w.layer[at], 0)
    if w.meta.config is None and (unknown := wanted & {*_OF_LAYER, *_OF_MODEL}):
        raise InputError(f"{min(unknown)}: expected a workload of simulator.lower; got rows")
    found: dict[str, Any] = {}
    if w.meta.config is not None:
        found = dict(model_sizes(w.meta.config, wanted))
    table = {"s": s, **found, "layer": _numbers(w)}
    found = {n: v[layer] if np.ndim(v) else v for n, v in table.items()}
    # the head comes after the last layer
    if np.ndim(s):
        found["s"] = np.where(w.part[at] == Part.HEAD, np.asarray(s)[-1], found["s"])
    attends = w.is_attention
    found["seq"] = float(w.meta.seq)
    found["devices"] = 1.0 if w.meta.parallel == "pipeline" else float(w.meta.devices)
    found["batch"] = np.where(attends[at], w.batch[at], w.meta.batch)
    rows: dict[str, Callable[[], Array]] = {
        "tokens": lambda: tokens_of(w),
        "keys": lambda: np.where(attends, w.kv_len, covering(w, attends, w.kv_len)),
        "visible": lambda: np.where(attends, w.keys_seen, covering(w, attends, w.keys_seen)),
        "bytes": lambda: stream_bytes(w, np.arange(len(w))),
        "weight_bytes": lambda: DTYPE_BYTES[w.weight_dtype],
    }
    found |= {name: np.asarray(rows[name]()[at], dtype=np.float64) for name in wanted & rows.keys()}
    return found


def tokens_of(w: Workload) -> Array:
    """Return the tokens that each row computes, of all sequences."""
    return np.where(w.is_attention, w.batch * w.q_len, _rows.tokens_of(w))


def in_layers(w: Workload, layers: LayerRange) -> Array:
    """Return a mask of the rows in layers of the dense model."""
    numbers, dense = _numbers(w), layer_count(w)
    if w.meta.request is not None and w.meta.config is not None:
        dense = len(load_model(w.meta.request.model).layers)
    inside = np.isin(numbers, layers.numbers(dense))
    mask: Array = (w.layer >= 0) & inside[np.maximum(w.layer, 0)]
    return mask


def _numbers(w: Workload) -> FloatArray:
    """Return the number in the dense model of each layer (L,)."""
    if w.meta.config is None:
        return np.arange(float(layer_count(w)))
    return np.array(w.meta.config.layer_numbers, dtype=np.float64)
