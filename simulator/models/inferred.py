"""Infer the layers of a model type that no table has from the modules that Transformers builds.

Products are those of the modules (:mod:`simulator.models.traced`). A module becomes attention, a
delta net, an MLP or routed experts if the usual keys of a configuration give the same products;
another module becomes a list of products (:class:`simulator.models.sublayers.modules.Modules`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product as combined
from typing import Any

from simulator.codes import Part
from simulator.models.architectures import Architecture, Reader, refuse_unknown
from simulator.models.architectures.reader import Content
from simulator.models.model import Layer, Model
from simulator.models.sublayers import (
    Attention,
    DeltaNet,
    Experts,
    LatentAttention,
    Mlp,
    Modules,
    ShortConv,
    Sublayer,
)
from simulator.models.traced import (
    TracedModel,
    TracedPart,
    TracedProduct,
    outputs_by_inputs,
    trace,
    transformers_config,
)

_MIXES = re.compile(r"att|mixer|mamba|ssm|conv|linear|recur|temporal|delta", re.I)
_RECURS = re.compile(r"mamba|ssm|mixer|linear|recur|temporal|delta", re.I)
_INSIDE_MLP = re.compile(r"\b(up|down|gate_up|fc\d?)(_proj)?$")
_QUERY_NORM = re.compile(r"\b(q|k|query|key)_?(layer)?norm")
_LAYER_KEYS = {"per_layer_config", "block_configs"}  # keys that the classes of a type ignore
_ACTIVE = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "moe_k",
    "moe_num_active_experts",
)
"""Keys of the experts that a token uses."""
_STATE = ("ssm_state_size", "mamba_d_state", "state_size", "linear_key_head_dim", "head_dim")
_CHANNELS = ("mamba_head_dim", "mamba_d_head", "linear_value_head_dim", "head_dim")

Products = Sequence[TracedProduct]


@dataclass(frozen=True)
class _Keys:
    """The usual keys of a layer in a configuration object."""

    config: Any = field(hash=False)
    hidden: int
    kind: str  # kind of the layer in ``layer_types``

    def number(self, *names: str, default: int = 0) -> int:
        values = (getattr(self.config, name, None) for name in names)
        return next((v for v in values if type(v) is int and v > 0), default)

    @property
    def heads(self) -> int:
        return self.number("num_attention_heads", default=1)

    @property
    def head_dim(self) -> int:
        return self.number("head_dim", default=self.hidden // self.heads)

    @property
    def window(self) -> int:
        """Positions that a query sees; without ``layer_types`` all layers have the window."""
        if self.kind.startswith("chunked"):
            return self.number("attention_chunk_size")
        slides = self.kind.startswith("sliding") or not self.kind
        used = slides and getattr(self.config, "use_sliding_window", True)
        return self.number("sliding_window") if used else 0

    @property
    def rotary(self) -> float:
        """Rotated share of a head."""
        rope = getattr(self.config, "rope_parameters", None)
        return float(rope.get("partial_rotary_factor", 1.0)) if isinstance(rope, dict) else 0.0


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
    layer_of = cache(_layer)
    keys = _keys_of_layers(config, head.k, len(traced.layers))
    layers = tuple(map(layer_of, keys, traced.layers))
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


def _keys_of_layers(config: Any, hidden: int, layers: int) -> Iterator[_Keys]:
    """Yield the keys of each layer, which Transformers may state for single layers."""
    types = getattr(config, "layer_types", None) or ()
    single = getattr(config, "per_layer_config", None) or ()
    for number in range(layers):
        own = single[number] if number < len(single) else config
        yield _Keys(own, hidden, str(types[number]) if len(types) == layers else "")


def _layer(keys: _Keys, part: TracedPart) -> Layer:
    sublayers = [
        replace(_sublayer(keys, name, some, part), reused=all(p.shared for p in some))
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
    return Layer(tuple(placed), parallel=0 < norms < many)


def _groups(products: Products) -> Iterator[tuple[str, Products]]:
    """Yield the products of each child of a layer, of each member of a list of children, and of an
    indexer."""
    groups: dict[str, list[TracedProduct]] = defaultdict(list)
    for product in products:
        name = product.path.split(".")[0] if "." in product.path else "mlp"
        groups["indexer" if "indexer" in product.path else name].append(product)
    for name, some in groups.items():
        listed = all(p.path.startswith(f"{name}.*") for p in some)
        times = min(p.count for p in some) if listed else 1
        for _ in range(times):
            yield name, [replace(p, count=p.count // times) for p in some]


def _sublayer(keys: _Keys, name: str, products: Products, part: TracedPart) -> Sublayer:
    wanted = outputs_by_inputs((p.n, p.k, p.count) for p in products)
    norms = {path: size for path, size in part.norms if path.startswith(f"{name}.")}
    for candidate in _candidates(keys, name, products, norms):
        if outputs_by_inputs(candidate.products(keys.hidden).values()) == wanted:
            return candidate
    mixes = _MIXES.search(name) or "indexer" in name
    routed = not mixes or any("expert" in p.path for p in products)
    modules = Modules(
        place=Part.MLP,
        matrices=tuple((p.n, p.k, p.count) for p in products),
        width=keys.hidden,
        active=float(keys.number(*_ACTIVE) * routed),
    )
    return _mixing(keys, name, modules) if mixes else modules


def _mixing(keys: _Keys, name: str, modules: Modules) -> Modules:
    """Return modules with attention or a recurrence over the features that the last product
    reads."""
    modules = replace(modules, place=Part.ATTENTION)
    inner = next((k for n, k, _ in reversed(modules.matrices) if n == keys.hidden), 0)
    if not inner or "conv" in name:
        return modules
    if _RECURS.search(f"{name} {keys.kind}"):
        channels = keys.number(*_CHANNELS, default=64)
        state = keys.number(*_STATE, default=128)
        heads = max(inner // channels, 1)
        return replace(modules, heads=heads, kv_heads=1, head_dim=channels, state=state)
    heads = max(inner // keys.head_dim, 1)
    kv_heads = keys.number("num_key_value_heads", default=heads)
    shared = kv_heads if heads % kv_heads == 0 else heads
    return replace(modules, heads=heads, kv_heads=shared, head_dim=keys.head_dim)


def _candidates(
    keys: _Keys, name: str, products: Products, norms: dict[str, int]
) -> Iterator[Sublayer]:
    """Yield sublayers whose sizes follow from the shapes of products and from usual keys."""
    stacked = [p for p in products if p.count > 1]
    written = [p for p in stacked or products if p.n == keys.hidden]
    if not written:
        return
    inner = written[-1].k
    if stacked:
        yield from _experts(keys, products, written[-1])
    elif "conv" in name:
        yield ShortConv(conv=keys.number("conv_L_cache", "conv_kernel", default=4))
    elif _MIXES.search(name) and not any(_INSIDE_MLP.search(p.path) for p in products):
        yield from _attentions(keys, products, inner, norms)
    else:
        for gated in (True, False):
            yield Mlp(inner=inner, gated=gated, inner_norm=inner in norms.values())


def _experts(keys: _Keys, products: Products, down: TracedProduct) -> Iterator[Sublayer]:
    written = [p.k for p in products if p.count == 1 and p.n == keys.hidden]
    for gated, gate in combined((True, False), (False, True)):
        yield Experts(
            experts=down.count,
            active=float(min(keys.number(*_ACTIVE, default=1), down.count)),
            inner=down.k,
            gated=gated,
            shared_inner=written[-1] if written else 0,
            shared_gate=gate,
        )


def _grouped(
    keys: _Keys, products: Products, inner: int, norms: dict[str, int]
) -> Iterator[Attention]:
    """Yield attention with ``inner`` features of all heads; its key/value heads follow from the
    products that read the residual stream."""
    read = sum(p.n for p in products if p.k == keys.hidden) - keys.hidden * (inner == keys.hidden)
    sized = {size for path, size in norms.items() if _QUERY_NORM.search(path)}
    layouts = (inner // keys.head_dim, keys.head_dim), (keys.heads, inner // keys.heads)
    for (heads, features), gate in combined(layouts, (False, True)):
        kv_heads = (read - (1 + gate) * heads * features) // (2 * features or 1)
        if kv_heads > 0 and heads % kv_heads == 0:
            yield Attention(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=features,
                rotary=int(features * keys.rotary),
                window=keys.window,
                norm=_norm(sized, features),
                output_norm=any(s and not _QUERY_NORM.search(p) for p, s in norms.items()),
                gate=gate,
            )


def _attentions(
    keys: _Keys, products: Products, inner: int, norms: dict[str, int]
) -> Iterator[Sublayer]:
    stated = keys.number("num_key_value_heads")
    yield from sorted(_grouped(keys, products, inner, norms), key=lambda a: a.kv_heads != stated)
    if rank := keys.number("kv_lora_rank"):
        yield LatentAttention(
            heads=keys.heads,
            query_rank=keys.number("q_lora_rank"),
            rank=rank,
            rotary=keys.number("qk_rope_head_dim"),
            plain=keys.number("qk_nope_head_dim"),
            value=keys.number("v_head_dim"),
            topk=keys.number("index_topk"),
        )
    if heads := keys.number("linear_num_value_heads"):
        yield DeltaNet(
            heads=heads,
            kv_heads=keys.number("linear_num_key_heads", default=heads),
            key=keys.number("linear_key_head_dim", default=128),
            value=keys.number("linear_value_head_dim", default=128),
            conv=keys.number("linear_conv_kernel_dim", default=4),
        )


def _norm(sizes: set[int], features: int) -> str:
    """Return the kind of the norms of queries and keys from their numbers of parameters."""
    if not any(sizes):
        return "unit" if sizes else ""
    return "head" if sizes <= {features} else "width"
