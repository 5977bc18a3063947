"""Infer the layers of a model type that no table has from the modules that Transformers builds.

Products are those of the modules (:mod:`simulator.models.traced`). A module becomes a sublayer that
the table of another type reads of the same configuration, if that has the same products. Another
module becomes a list of products (:class:`simulator.models.sublayers.modules.Modules`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from simulator.codes import Part
from simulator.errors import InputError
from simulator.models.architectures import (
    ARCHITECTURES,
    Architecture,
    Reader,
    model_fields,
    refuse_unknown,
)
from simulator.models.architectures.reader import Content
from simulator.models.model import Layer, Model
from simulator.models.sublayers import Attention, Mlp, Modules, Sublayer
from simulator.models.traced import (
    Product,
    TracedModel,
    TracedPart,
    TracedProduct,
    outputs_by_inputs,
    trace,
    transformers_config,
)

_MIXES = re.compile(r"att|mixer|mamba|ssm|conv|linear|recur|temporal|delta", re.I)
_RECURS = re.compile(r"mamba|ssm|mixer|linear|recur|temporal|delta", re.I)
_LAYER_KEYS = {"per_layer_config", "block_configs"}  # that the classes of a type ignore
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
"""Keys of the experts that a token uses."""
_STATE = ("ssm_state_size", "mamba_d_state", "state_size", "linear_key_head_dim", "head_dim")
_CHANNELS = ("mamba_head_dim", "mamba_d_head", "linear_value_head_dim", "head_dim")

Products = Sequence[TracedProduct]


def inferred_model(data: Content, source: str, name: str) -> Model:
    """Return the model of a configuration whose type no table has; InputError if Transformers does
    not build it, or would ignore a key that names sizes."""
    config = transformers_config(data, source)
    text = config.get_text_config()
    inside = data.get("text_config", data)
    known = {*type(text)().to_dict(), *text.attribute_map, "head_dim"} - _LAYER_KEYS
    refuse_unknown(Reader(inside, source, known=known), Architecture(0, {}))
    return model_of(text, trace(config, source), name)


def model_of(config: Any, traced: TracedModel, name: str) -> Model:
    """Return the model of the configuration object of a decoder and its modules."""
    head = traced.head.products[0]
    many = len(traced.layers)
    types = getattr(config, "layer_types", None) or ()
    kinds = map(str, types) if len(types) == many else [""] * many
    configs = getattr(config, "per_layer_config", None) or [config] * many
    alike = cache(partial(_alike, _known_sublayers(config), head.k))
    layers = tuple(
        _Inferred(own, head.k, alike).layer(kind, part)
        for own, kind, part in zip(configs, kinds, traced.layers)
    )
    model = Model(
        name=name,
        architecture=config.model_type,
        hidden=head.k,
        vocab=head.n,
        layers=layers,
        max_positions=getattr(config, "max_position_embeddings", None) or 2048,
        tied=head.shared,
        norm=_norm_of(traced.layers, head.k),
        found=_note(f"{name}: no table has model_type {config.model_type}", layers, traced),
    )
    others = traced.parameters - model.parameters  # biases, vectors, convolutions
    return replace(model, other_parameters=others)


def _known_sublayers(config: Any) -> list[Sublayer]:
    """Return the sublayers that the tables of other types read of a configuration, those of most
    types first."""
    content = config.to_dict()
    usual = {key: content[own] for key, own in config.attribute_map.items() if own in content}
    types: Counter[Sublayer] = Counter()
    for kind, architecture in ARCHITECTURES.items():
        try:
            layers = model_fields(architecture, Reader(content | usual, kind))["layers"]
        except InputError:
            continue
        if kind != config.model_type:
            sublayers = (s for layer in layers for s in layer.windowless.sublayers)
            types.update([*dict.fromkeys(sublayers)])  # a type counts once
    rope = content.get("rope_parameters")
    share = float(rope.get("partial_rotary_factor", 1.0)) if isinstance(rope, dict) else 0.0
    return [
        replace(s, rotary=int(s.head_dim * share)) if isinstance(s, Attention) else s
        for s, _ in types.most_common()
    ]


def _alike(known: Sequence[Sublayer], hidden: int, matrices: Sequence[Product]) -> list[Sublayer]:
    """Return the known sublayers, and MLPs, with some products."""
    written = [k for n, k, _ in matrices if n == hidden]
    mlps = [Mlp(inner=written[-1], gated=gated) for gated in (True, False) if written]
    return [
        replace(s, entry=None)
        for s in (*known, *mlps)
        if outputs_by_inputs(s.products(hidden).values()) == outputs_by_inputs(matrices)
    ]


def _norm_of(layers: Sequence[TracedPart], hidden: int) -> str:
    """Return the kind of the norms between sublayers from their numbers of parameters."""
    sizes = {size for part in layers for path, size in part.norms if "." not in path}
    return "layer" if 2 * hidden in sizes else "none" if sizes == {0} else "rms"


def _note(fact: str, layers: Sequence[Layer], traced: TracedModel) -> str:
    sublayers = [sublayer for layer in layers for sublayer in layer.sublayers]
    unknown = sum(isinstance(sublayer, Modules) for sublayer in sublayers)
    products = "its products are those of the modules that Transformers builds"
    keys = "windows, heads and experts per token follow from usual keys"
    parts = [f"{fact}; {products}, and {keys}"]
    if unknown:
        kinds = "sublayers are of no known kind, and their attention or state is assumed"
        parts.append(f"{unknown} of {len(sublayers)} {kinds}")
    if outside := len(traced.rest.products):
        parts.append(f"{outside} products outside the layers are not timed")
    if traced.apart:
        parts.append(f"other parts ({', '.join(traced.apart)}) are not timed")
    return "; ".join(parts)


def _groups(products: Products) -> Iterator[tuple[str, Products]]:
    """Yield the products of each child of a layer, and of each member of a list of children."""
    groups: dict[str, list[TracedProduct]] = defaultdict(list)
    for product in products:
        groups[product.path.split(".")[0] if "." in product.path else "mlp"].append(product)
    for name, some in groups.items():
        listed = all(p.path.startswith(f"{name}.*") for p in some)
        times = min(p.count for p in some) if listed else 1
        for _ in range(times):
            yield name, [replace(p, count=p.count // times) for p in some]


@dataclass(frozen=True)
class _Inferred:
    """Makes a layer from its configuration object."""

    config: Any
    hidden: int
    alike: Callable[[tuple[Product, ...]], list[Sublayer]]  # known sublayers with some products

    def number(self, *names: str, default: int = 0) -> int:
        """Return the value of the first key that states a positive number."""
        values = (getattr(self.config, name, None) for name in names)
        return next((v for v in values if type(v) is int and v > 0), default)

    def window(self, kind: str) -> int:
        """Return the positions that a query of a layer sees; without ``layer_types`` all layers
        have the window."""
        if kind.startswith("chunked"):
            return self.number("attention_chunk_size")
        slides = kind.startswith("sliding") or not kind
        used = slides and getattr(self.config, "use_sliding_window", True)
        return self.number("sliding_window") if used else 0

    def layer(self, kind: str, part: TracedPart) -> Layer:
        """Return a layer of a ``kind`` in ``layer_types``."""
        sublayers = [
            replace(self.sublayer(kind, name, some, part), reused=all(p.shared for p in some))
            for name, some in _groups(part.products)
        ]
        sublayers.sort(key=lambda sublayer: sublayer.part)
        many = len(sublayers)
        norms = sum("." not in path for path, _ in part.norms)
        after = all("post" in path for path, _ in part.norms if "." not in path)
        both = norms >= 2 * many
        placed = [
            replace(s, norms=(i < norms and not after, both or after), joins=0 < norms <= i)
            for i, s in enumerate(sublayers)
        ]
        return Layer(tuple(placed), parallel=0 < norms < many).with_window(self.window(kind))

    def sublayer(self, kind: str, name: str, products: Products, part: TracedPart) -> Sublayer:
        """Return a known sublayer with the products of a child of a layer, the one with the nearest
        number of parameters, else its modules."""
        matrices = tuple((p.n, p.k, p.count) for p in products)
        norms = sum(size for path, size in part.norms if path.startswith(f"{name}."))
        stored = norms + sum(n * k * many for n, k, many in matrices)
        if alike := self.alike(matrices):
            return min(alike, key=lambda s: abs(s.parameters(self.hidden) - stored))
        mixes = _MIXES.search(name)
        routed = not mixes or any("expert" in p.path for p in products)
        modules = Modules(
            place=Part.MLP,
            matrices=matrices,
            width=self.hidden,
            active=float(self.number(*_ACTIVE) * routed),
        )
        return self.mixing(f"{name} {kind}", modules) if mixes else modules

    def mixing(self, name: str, modules: Modules) -> Modules:
        """Return modules with attention or a recurrence over the features that the last product
        reads."""
        modules = replace(modules, place=Part.ATTENTION)
        inner = next((k for n, k, _ in reversed(modules.matrices) if n == self.hidden), 0)
        if not inner or "conv" in name:
            return modules
        if _RECURS.search(name):
            channels = self.number(*_CHANNELS, default=64)
            state = self.number(*_STATE, default=128)
            heads = max(inner // channels, 1)
            return replace(modules, heads=heads, kv_heads=1, head_dim=channels, state=state)
        features = self.hidden // self.number("num_attention_heads", default=1)
        features = self.number("head_dim", default=features)
        heads = max(inner // features, 1)
        kv_heads = self.number("num_key_value_heads", default=heads)
        shared = kv_heads if heads % kv_heads == 0 else heads
        return replace(modules, heads=heads, kv_heads=shared, head_dim=features)
