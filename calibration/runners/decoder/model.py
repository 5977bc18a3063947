"""Weights of a Llama-style decoder, dense or pruned, as frozen data, and its forward pass.

The decoder has an RMS norm before each sublayer, rotary positions, a gated MLP and grouped-query
attention (Llama, Mistral, Qwen2, Qwen3, SmolLM2, Phi-3). A :class:`Rule` decides which work a pass
skips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from calibration.devices import operators as skipping
from calibration.devices.attention import decode_attention, prefill_attention
from calibration.devices.operators import (
    TORCH_DTYPE,
    gated,
    linear,
    rms_norm,
    rotary,
    rotary_tables,
)
from simulator.errors import InputError
from simulator.models.model import Model
from simulator.models.sublayers import Attention as GroupedAttention
from simulator.models.sublayers import DeltaNet, Experts, LatentAttention, Linear
from simulator.models.sublayers import Mlp as GatedMlp

Tensor = Any
_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Projection:
    """A weight (n, k), dense or sparse, or several weights in sequence, and a bias."""

    factors: tuple[Tensor, ...]
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        for weight in self.factors[:-1]:
            x = linear(x, weight)
        return linear(x, self.factors[-1], self.bias)

    def of_rows(self, x: Tensor, index: Tensor, count: Tensor, add_to: Tensor = None) -> Tensor:
        """Apply the projection to the rows of x (tokens, k) that the first ``count`` (on the
        device) of ``index`` name. Other rows are undefined in the result, or unchanged in
        ``add_to``."""
        if type(self.factors[-1]) not in _PLAIN:  # sparse weights have no kernel that skips rows
            y = self(x)
            rest = torch.arange(len(index), device=x.device) >= count
            return (
                y
                if add_to is None
                else add_to.index_add_(0, index, y[index].masked_fill(rest[:, None], 0.0))
            )
        for weight in self.factors[:-1]:
            x = skipping.kernels().gather_gemm(x, weight, index, count)
        last = self.factors[-1]
        added = add_to is not None
        return skipping.kernels().gather_gemm(
            x, last, index, count, self.bias, out=add_to, add=added
        )

    @property
    def weight(self) -> Tensor:
        if len(self.factors) != 1 or type(self.factors[0]) not in _PLAIN:
            raise InputError(
                "decoder: the projection is factorised or sparse already; prune in another order"
            )
        return self.factors[0]

    def rows(self, index: Tensor) -> Projection:
        bias = None if self.bias is None else self.bias.index_select(0, index)
        return Projection((self.weight.index_select(0, index).contiguous(),), bias)

    def columns(self, index: Tensor) -> Projection:
        return Projection((self.weight.index_select(1, index).contiguous(),), self.bias)


@dataclass(frozen=True)
class Blocks:
    """A copy of a sublayer's weights, ordered by groups of equal width: a token uses neighbouring
    rows."""

    # (rows, hidden): rows that compute a group's features (MLP: gate, then up), by group
    inner: Tensor
    outer: Tensor  # (features, hidden): transposed weight from the features to the hidden state
    groups: int

    @property
    def width(self) -> int:
        return len(self.outer) // self.groups

    def weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.inner.chunk(self.groups), self.outer.chunk(self.groups), strict=True)


@dataclass(frozen=True)
class Sublayer:
    # projections: the last one writes the hidden state, the others read it
    roles: ClassVar[tuple[str, ...]] = ()
    norm: Tensor
    router: Tensor = None  # for dynamic depth and width
    # for dynamic width: q and o by KV group, or the MLP by groups of channels
    blocks: Blocks | None = None


@dataclass(frozen=True, kw_only=True)
class Attention(Sublayer):
    roles: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o")
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    heads: int
    kv_heads: int
    q_norm: Tensor = None
    k_norm: Tensor = None


@dataclass(frozen=True, kw_only=True)
class Mlp(Sublayer):
    roles: ClassVar[tuple[str, ...]] = ("gate", "up", "down")
    gate: Projection
    up: Projection
    down: Projection

    def channels(self, index: Tensor) -> Mlp:
        return replace(
            self, gate=self.gate.rows(index), up=self.up.rows(index), down=self.down.columns(index)
        )


@dataclass(frozen=True)
class Layer:
    attention: Attention | None
    mlp: Mlp | None


@dataclass(frozen=True)
class Decoder:
    name: str
    dtype: str
    device: str
    head_dim: int
    embedding: Tensor  # (vocabulary, hidden)
    final_norm: Tensor
    head: Tensor  # (vocabulary, hidden)
    layers: tuple[Layer, ...]
    epsilon: float = 1e-5
    frequencies: Tensor | None = None  # (head_dim / 2,) of the rotary positions; None: Llama's
    rotary_scale: float = 1.0
    rule: Rule | None = None  # decides which work a pass skips

    @property
    def hidden(self) -> int:
        return int(self.embedding.shape[1])

    def projections(self) -> Iterator[tuple[int, str, Projection]]:
        for number, layer in enumerate(self.layers):
            for sublayer in (layer.attention, layer.mlp):
                for role in sublayer.roles if sublayer is not None else ():
                    yield number, role, getattr(sublayer, role)

    def changed(self, change: Callable[[int, Any], Any]) -> Decoder:
        """Apply a function of layer and sublayer to every sublayer."""
        layers = []
        for number, layer in enumerate(self.layers):
            parts: list[Any] = [
                part and change(number, part) for part in (layer.attention, layer.mlp)
            ]
            layers.append(Layer(*parts))
        return replace(self, layers=tuple(layers))


def check_model(config: Model) -> None:
    """Raise InputError with all reasons why this decoder cannot run a model."""
    layers = tuple(dict.fromkeys(config.layers))
    sublayers = tuple(dict.fromkeys(s for layer in layers for s in layer.sublayers))
    grouped = [s for s in sublayers if isinstance(s, GroupedAttention)]
    mlps = [s for s in sublayers if isinstance(s, GatedMlp)]
    reasons = {
        "it has routed experts": any(isinstance(s, Experts) for s in sublayers),
        "its attention is latent": any(isinstance(s, LatentAttention) for s in sublayers),
        "a linear product replaces a sublayer": any(isinstance(s, Linear) for s in sublayers),
        "it has gated delta nets": any(isinstance(s, DeltaNet) for s in sublayers),
        "its MLP is not gated": not all(s.gated for s in mlps),
        f"its norms are {config.norm!r}, not RMS norms": config.norm != "rms",
        "it has no rotary positions over whole heads": bool(config.learned_positions)
        or not all(s.rotary == s.head_dim for s in grouped),
        "attention and MLP run in parallel": any(layer.parallel for layer in layers),
        "it has norms after its sublayers": config.post_norms,
        "it soft-caps its logits": config.logit_softcap or any(s.softcap for s in grouped),
        "some layers attend to a window": any(config.windows),
        "its attention has a gate": any(s.gate for s in grouped),
        "its queries and keys have norms without weights": any(s.norm == "unit" for s in grouped),
        "its projections are factors": any(
            form.rank is not None for s in sublayers for _, form in s.forms
        )
        or any(s.rotates for s in sublayers),
        "its output projections have biases": any(s.o_bias for s in grouped)
        or any(s.bias or s.down_bias for s in mlps),
    }
    if found := [reason for reason, true in reasons.items() if true]:
        raise InputError(f"decoder: {config.name} is not a Llama-style model: {'; '.join(found)}")


def random_decoder(
    config: Model, *, dtype: str = "bf16", device: str = "cpu", seed: int = 0
) -> Decoder:
    """Return a decoder with random weights that keep activations near one."""
    check_model(config)
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def weight(rows: int, columns: int) -> Tensor:
        return (normal(rows, columns) / math.sqrt(columns)).to(TORCH_DTYPE[dtype])

    def near(value: float, size: int) -> Tensor:
        return (value + 0.1 * normal(size)).to(TORCH_DTYPE[dtype])

    def product(rows: int, columns: int, biased: bool = False) -> Projection:
        return Projection((weight(rows, columns),), near(0.0, rows) if biased else None)

    # the order of these lines determines the random weights
    h, d, layers = config.hidden, config.head_dim, list[Layer]()
    for layer in config.layers:
        attention = mlp = None
        if isinstance(a := layer.of("attention"), GroupedAttention):
            attention = Attention(
                q_norm=near(1.0, d) if a.norm else None,
                k_norm=near(1.0, d) if a.norm else None,
                norm=near(1.0, h),
                q=product(a.heads * d, h, a.qkv_bias),
                k=product(a.kv_heads * d, h, a.qkv_bias),
                v=product(a.kv_heads * d, h, a.qkv_bias),
                o=product(h, a.heads * d),
                heads=a.heads,
                kv_heads=a.kv_heads,
            )
        if isinstance(m := layer.of("mlp"), GatedMlp):
            mlp = Mlp(
                norm=near(1.0, h),
                gate=product(m.inner, h),
                up=product(m.inner, h),
                down=product(h, m.inner),
            )
        layers.append(Layer(attention, mlp))
    embedding = normal(config.vocab, h).to(TORCH_DTYPE[dtype])
    return Decoder(
        name=config.name,
        dtype=dtype,
        device=device,
        head_dim=d,
        embedding=embedding,
        head=embedding if config.tied else weight(config.vocab, h),
        final_norm=near(1.0, h),
        layers=tuple(layers),
    )


def from_weights(
    name: str,
    weights: Mapping[str, Tensor],
    *,
    head_dim: int,
    dtype: str = "fp32",
    device: str = "cpu",
    **constants: Any,
) -> Decoder:
    """Return a decoder with the weights of a Hugging Face checkpoint, whose shapes determine heads
    and widths. A layer without the norm of a sublayer lacks the sublayer. ``constants`` are further
    fields of :class:`Decoder`."""

    def get(key: str) -> Tensor:
        if key not in weights:
            raise InputError(f"decoder: the checkpoint of {name} has no weight {key!r}")
        return weights[key].to(device=device, dtype=TORCH_DTYPE[dtype])

    def maybe(key: str) -> Tensor | None:
        return get(key) if key in weights else None

    def projections(at: str, roles: tuple[str, ...]) -> dict[str, Any]:
        keys = {role: f"{at}.{role}_proj" for role in roles}
        return {
            role: Projection((get(f"{key}.weight"),), maybe(f"{key}.bias"))
            for role, key in keys.items()
        }

    made = []
    numbers = [int(key.split(".")[2]) for key in weights if key.startswith("model.layers.")]
    for at in (f"model.layers.{number}" for number in range(max(numbers, default=-1) + 1)):
        attention = mlp = None
        if (norm := maybe(f"{at}.input_layernorm.weight")) is not None:
            own = {"norm": norm, **projections(f"{at}.self_attn", Attention.roles)}
            own |= {f"{role}_norm": maybe(f"{at}.self_attn.{role}_norm.weight") for role in "qk"}
            heads, kv_heads = (len(own[role].weight) // head_dim for role in "qk")
            attention = Attention(heads=heads, kv_heads=kv_heads, **own)
        if (norm := maybe(f"{at}.post_attention_layernorm.weight")) is not None:
            mlp = Mlp(norm=norm, **projections(f"{at}.mlp", Mlp.roles))
        made.append(Layer(attention, mlp))
    embedding, head = get("model.embed_tokens.weight"), maybe("lm_head.weight")
    return Decoder(
        name=name,
        dtype=dtype,
        device=device,
        head_dim=head_dim,
        embedding=embedding,
        final_norm=get("model.norm.weight"),
        head=embedding if head is None else head,
        layers=tuple(made),
        **constants,
    )


@dataclass
class LayerCache:
    k: Tensor  # (batch, kv_heads, room, head_dim)
    v: Tensor
    length: int  # filled positions


@dataclass
class PassState:
    decoder: Decoder
    prompt: int  # tokens of the prompt
    room: int = 0  # cache positions after the prompt
    # position of the first token of the pass; after the pass, position of the next token
    position: int = 0
    decoding: bool = False  # whether this is a decode step
    layer: int = 0  # current layer
    cos: Tensor = None  # rotary tables of the current tokens, (tokens, head_dim)
    sin: Tensor = None
    fused: Any = None  # on a GPU: module of fused kernels, as calibrations time them
    angles: tuple[Tensor, ...] = ()  # for its rotation: cos and sin repeated for every sequence
    caches: dict[int, LayerCache] = field(default_factory=dict)  # by layer
    kept: dict[Any, Any] = field(default_factory=dict)  # memory of a rule between sublayers

    def mark(self) -> tuple[int, dict[int, int]]:
        return self.position, {layer: cache.length for layer, cache in self.caches.items()}

    def rewind(self, mark: tuple[int, dict[int, int]]) -> None:
        self.position, lengths = mark
        for layer, length in lengths.items():
            self.caches[layer].length = length

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.decoder.epsilon)

    def turned(self, heads: Tensor, norm: Tensor, *tables: Tensor) -> Tensor:
        """Normalise heads if there is a norm, and rotate them by the given tables or those of the
        pass."""
        heads = heads if norm is None else self.norm(heads, norm)
        of_token = heads.transpose(1, 2)  # as a projection has written it
        if (
            self.fused
            and not tables
            and of_token.is_contiguous()
            and len(heads) * heads.shape[2] == len(self.angles[0])
        ):
            return (
                self.fused.rotary(of_token.flatten(0, 1), *self.angles)
                .view_as(of_token)
                .transpose(1, 2)
            )
        return rotary(heads, *(tables or (self.cos, self.sin)))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.fused.gated(gate, up) if self.fused else gated(gate, up)

    def queries(self, a: Attention, h: Tensor, *tables: Tensor) -> Tensor:
        return self.turned(split_heads(a.q(h), a.heads), a.q_norm, *tables)

    def keys_values(self, a: Attention, h: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values of tokens to the cache; return them (decode: the whole cache)."""
        k = self.turned(split_heads(a.k(h), a.kv_heads), a.k_norm)
        v = split_heads(a.v(h), a.kv_heads)
        if not self.decoding:
            batch, heads, length, head_dim = k.shape
            size = (batch, heads, length + self.room, head_dim)
            self.caches[self.layer] = LayerCache(k.new_empty(size), v.new_empty(size), 0)
        cache = self.caches[self.layer]
        begin = cache.length
        cache.length = cache.length + k.shape[2]
        cache.k[:, :, begin : cache.length] = k
        cache.v[:, :, begin : cache.length] = v
        if self.decoding:
            return cache.k[:, :, : cache.length], cache.v[:, :, : cache.length]
        return k, v


class Rule:
    """Decisions of a pass. This base class skips nothing."""

    family: ClassVar[str] = ""
    skips: ClassVar[bool] = False  # whether data determines which work is skipped

    def on_host(self, device: str) -> bool:
        """Whether the host selects kernels by data; a CUDA graph cannot hold such a pass."""
        return self.skips and not skipping.in_triton(device)

    def enter(self, s: PassState, x: Tensor) -> Tensor:
        return x

    def attention(self, s: PassState, a: Attention, x: Tensor) -> Tensor:
        h = s.norm(x, a.norm)
        k, v = s.keys_values(a, h)
        out = joined(self.attend(s, s.queries(a, h), k, v))
        return x + a.o(out)

    def attend(self, s: PassState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the outputs of the heads, in the shape of ``q`` (batch, heads, tokens, d)."""
        return decode_attention(q, k, v) if s.decoding else prefill_attention(q, k, v)

    def mlp(self, s: PassState, m: Mlp, x: Tensor) -> Tensor:
        h = s.norm(x, m.norm)
        return x + m.down(s.gated(m.gate(h), m.up(h)))


DENSE = Rule()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Map (batch, tokens, heads * d) to (batch, heads, tokens, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def prefill(decoder: Decoder, tokens: Tensor, room: int = 1) -> tuple[Tensor, PassState]:
    """Return logits (batch, vocab) after prompts (batch, seq), and the state with ``room`` free
    positions per cache."""
    with torch.no_grad():
        state = PassState(decoder, tokens.shape[1], room)
        return logits_after(decoder, _through(state, tokens)[:, -1]), state


def decode(decoder: Decoder, token: Tensor, state: PassState) -> Tensor:
    """Add one token per sequence (batch, 1) to the caches; return the logits (batch, vocab) after
    the token."""
    with torch.no_grad():
        state.decoding = True
        return logits_after(decoder, _through(state, token)[:, -1])


def window_logits(decoder: Decoder, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return logits_after(decoder, _through(PassState(decoder, len(ids)), ids[None])[0])


def embedded(s: PassState, tokens: Tensor) -> Tensor:
    """Return the residual stream before the first layer, and set the rotary tables of the
    tokens."""
    decoder = s.decoder
    x = F.embedding(tokens, decoder.embedding)
    positions = torch.arange(s.position, s.position + tokens.shape[1], device=x.device)
    tables = rotary_tables(positions, decoder.head_dim, x.dtype, decoder.frequencies)
    s.cos, s.sin = (
        (table * decoder.rotary_scale for table in tables)
        if decoder.rotary_scale != 1.0
        else tables
    )
    if skipping.in_triton(decoder.device):
        s.fused, s.angles = (
            skipping.kernels(),
            tuple(table.repeat(len(tokens), 1) for table in (s.cos, s.sin)),
        )
    return x


def through_layer(s: PassState, number: int, layer: Layer, x: Tensor) -> Tensor:
    """Return the residual stream after a layer, which may replace the decoder's layer of this
    number."""
    rule = s.decoder.rule or DENSE
    s.layer = number
    x = rule.enter(s, x)
    if layer.attention is not None:
        x = rule.attention(s, layer.attention, x)
    if layer.mlp is not None:
        x = rule.mlp(s, layer.mlp, x)
    return x


def logits_after(decoder: Decoder, last: Tensor) -> Tensor:
    return F.linear(rms_norm(last, decoder.final_norm, decoder.epsilon), decoder.head)


def _through(s: PassState, tokens: Tensor) -> Tensor:
    x = embedded(s, tokens)
    for number, layer in enumerate(s.decoder.layers):
        x = through_layer(s, number, layer, x)
    s.position += tokens.shape[1]
    return x
