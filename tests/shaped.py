"""Models and layers of given sizes for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from simulator.codes import Part
from simulator.models.model import Layer, Model
from simulator.models.sublayers import Attention, DeltaNet, Experts, LatentAttention, Linear, Mlp
from simulator.models.sublayers.base import Sublayer


def layer(
    heads: int = 0,
    kv_heads: int = 0,
    inner: int = 0,
    head_dim: int = 128,
    *,
    linear: tuple[str, ...] = (),
    experts: dict[str, Any] | None = None,
    rotary: int | None = None,
    window: int = 0,
    attention: dict[str, Any] | None = None,
    mlp: dict[str, Any] | None = None,
    parallel: bool = False,
) -> Layer:
    """A layer of grouped-query attention and an MLP or experts; a size of 0 leaves it out."""
    sublayers: list[Sublayer] = []
    if heads:
        turned = head_dim if rotary is None else rotary
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "rotary": turned}
        sublayers.append(Attention(**sizes, window=window, **(attention or {})))
    if "attention" in linear:
        sublayers.append(Linear(replaces=Part.ATTENTION))
    if experts:
        sublayers.append(Experts(**experts))
    elif inner:
        sublayers.append(Mlp(inner=inner, **(mlp or {})))
    if "mlp" in linear:
        sublayers.append(Linear(replaces=Part.MLP))
    return Layer(tuple(sublayers), parallel)


def model_of(*layers: Layer, hidden: int = 64, vocab: int = 100, **fields: Any) -> Model:
    fields = {"name": "tiny", "architecture": "llama", "max_positions": 4096, **fields}
    return Model(hidden=hidden, vocab=vocab, layers=layers, **fields)


def resized(model: Model, **sizes: Any) -> Model:
    """The model with other sizes in every layer: heads, kv_heads, head_dim, inner, experts, active,
    expert_inner, or fields of its sublayers; ``layers`` is a number of layers, and other names are
    fields of the model."""
    many = sizes.pop("layers", None)
    fields = {name: sizes.pop(name) for name in [*sizes] if name in Model.__dataclass_fields__}
    if many is not None:
        model = model.with_layers(model.layers[:many])
    return replace(each_sublayer(model, lambda s: _resized(s, sizes)), **fields)


def _resized(sublayer: Sublayer, sizes: dict[str, Any]) -> Sublayer:
    names = dict(sizes)
    if isinstance(sublayer, Experts):
        names = {
            {"inner": "shared_inner", "expert_inner": "inner"}.get(n, n): v
            for n, v in names.items()
        }
    known = {n: v for n, v in names.items() if n in type(sublayer).__dataclass_fields__}
    return replace(sublayer, **known)


def each_sublayer(model: Model, change: Callable[[Sublayer], Sublayer]) -> Model:
    return model.each_layer(lambda one: one.each(change))


def changed(model: Model, change: Callable[[int, Layer], Layer], **fields: Any) -> Model:
    """The model with its layers changed by number."""
    layers = tuple(change(i, one) for i, one in enumerate(model.layers))
    return replace(model, layers=layers, **fields)


def cut(one: Layer, part: str, **sizes: Any) -> Layer:
    """The layer with other fields of its attention or MLP."""
    return one.with_part(part, replace(sublayer_of(one, part), **sizes))


def sublayer_of(one: Layer, part: str) -> Any:
    sublayer = one.of(part)
    assert sublayer is not None
    return sublayer


class Sizes(NamedTuple):
    """Sizes of a layer that tests compute by hand."""

    heads: int = 0
    kv_heads: int = 0
    inner: int = 0  # width of an MLP, or of the shared experts
    experts: int = 0
    active: float = 0
    expert_inner: int = 0
    linear: tuple[str, ...] = ()  # parts that one product replaces
    rotary: bool = True  # without attention, too
    delta: bool = False


def sizes_of(one: Layer) -> Sizes:
    attention, mlp = one.of("attention"), one.of("mlp")
    sizes: dict[str, Any] = {
        "linear": tuple(p for p in ("attention", "mlp") if isinstance(one.of(p), Linear)),
        "delta": isinstance(attention, DeltaNet),
        "rotary": not isinstance(attention, Attention) or attention.rotary > 0,
    }
    if isinstance(attention, Attention | LatentAttention | DeltaNet):
        sizes |= {"heads": attention.heads, "kv_heads": attention.kv_heads}
    if isinstance(mlp, Mlp):
        sizes["inner"] = mlp.inner
    if isinstance(mlp, Experts):
        sizes |= {"inner": mlp.shared_inner, "expert_inner": mlp.inner}
        sizes |= {"experts": mlp.experts, "active": mlp.active}
    return Sizes(**sizes)


def value_of(model: Model, path: str) -> Any:
    """A field of a model, of the attention or MLP of its last layer ("mlp.gated"), of the attention of
    each layer ("each.rotary"), or the ``sizes`` of each layer."""
    part, _, name = path.rpartition(".")
    if part == "each":
        return tuple(getattr(sublayer_of(one, "attention"), name) for one in model.layers)
    if path == "sizes":
        return tuple(map(sizes_of, model.layers))
    return getattr(sublayer_of(model.layers[-1], part) if part else model, name)


__all__ = [
    "Attention",
    "DeltaNet",
    "Experts",
    "LatentAttention",
    "Layer",
    "Linear",
    "Mlp",
    "Model",
    "Sizes",
    "changed",
    "cut",
    "each_sublayer",
    "layer",
    "model_of",
    "resized",
    "sizes_of",
    "sublayer_of",
    "value_of",
]
