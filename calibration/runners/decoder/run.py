"""The forward pass: a prefill of prompts, decode steps of one token per sequence, the logits of a whole window.

Decisions during a pass are methods of a :class:`Rule`; the rule of a dense decoder decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from calibration.devices import skipping
from calibration.devices.attention import decode_attention, prefill_attention
from calibration.devices.operators import gated, rms_norm, rotary, rotary_tables
from calibration.runners.decoder.model import Attention, Decoder, Layer, Mlp, Tensor


@dataclass
class LayerCache:
    """Keys and values of a layer, (batch, kv_heads, room, head_dim) each, with ``length`` filled positions."""

    k: Tensor
    v: Tensor
    length: int


@dataclass
class PassState:
    """State of a pass, kept for the next pass."""

    decoder: Decoder
    prompt: int  # tokens of the prompt
    room: int = 0  # cache positions after those of the prefill
    trace: dict[tuple[int, str], Any] | None = None  # receives the decisions of a rule, by (layer, what)
    position: int = 0  # position of the pass's first token; after the pass, of the next token
    decoding: bool = False  # whether this is a decode step
    layer: int = 0  # current layer
    cos: Tensor = None  # rotary tables of the current tokens, (tokens, head_dim)
    sin: Tensor = None
    caches: dict[int, LayerCache] = field(default_factory=dict)  # by layer; layers without attention have none
    kept: dict[Any, Any] = field(default_factory=dict)  # memory of a rule between sublayers

    def note(self, what: str, value: Any) -> None:
        """Add a decision to the trace."""
        if self.trace is not None:
            self.trace[self.layer, what] = value

    def mark(self) -> tuple[int, dict[int, int]]:
        """Return the lengths of the caches, for :meth:`rewind`."""
        return self.position, {layer: cache.length for layer, cache in self.caches.items()}

    def rewind(self, mark: tuple[int, dict[int, int]]) -> None:
        """Remove the tokens decoded after the mark."""
        self.position, lengths = mark
        for layer, length in lengths.items():
            self.caches[layer].length = length

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.decoder.epsilon)

    def turned(self, heads: Tensor, norm: Tensor, *tables: Tensor) -> Tensor:
        """Normalise query or key heads, if the model does, and rotate them by the given or this pass's tables."""
        heads = heads if norm is None else self.norm(heads, norm)
        return rotary(heads, *(tables or (self.cos, self.sin)))

    def queries(self, a: Attention, h: Tensor, *tables: Tensor) -> Tensor:
        """Return the rotated query heads of normalised tokens."""
        return self.turned(split_heads(a.q(h), a.heads), a.q_norm, *tables)

    def keys_values(self, a: Attention, h: Tensor) -> tuple[Tensor, Tensor]:
        """Add rotated key heads and value heads of normalised tokens to the cache; return them (decode: the cache)."""
        k = self.turned(split_heads(a.k(h), a.kv_heads), a.k_norm)
        v = split_heads(a.v(h), a.kv_heads)
        if not self.decoding:
            batch, heads, length, head_dim = k.shape
            size = (batch, heads, length + self.room, head_dim)
            self.caches[self.layer] = LayerCache(k.new_empty(size), v.new_empty(size), 0)
        cache = self.caches[self.layer]
        begin, cache.length = cache.length, cache.length + k.shape[2]
        cache.k[:, :, begin : cache.length] = k
        cache.v[:, :, begin : cache.length] = v
        if self.decoding:
            return cache.k[:, :, : cache.length], cache.v[:, :, : cache.length]
        return k, v


class Rule:
    """Decisions of a pass; this base class skips nothing. ``PassState.kept`` is the memory of a rule."""

    family: ClassVar[str] = ""
    skips: ClassVar[bool] = False
    """Whether data determines the skipped work."""

    def on_host(self, device: str) -> bool:
        """Whether the host selects the kernels from data, which a CUDA graph cannot hold."""
        return self.skips and not skipping.in_triton(device)

    def enter(self, s: PassState, x: Tensor) -> Tensor:
        """Return the residual stream before a layer."""
        return x

    def attention(self, s: PassState, a: Attention, x: Tensor) -> Tensor:
        """Return the residual stream after an attention sublayer."""
        h = s.norm(x, a.norm)
        k, v = s.keys_values(a, h)
        out = joined(self.attend(s, s.queries(a, h), k, v))
        return x + a.o(out)

    def attend(self, s: PassState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the outputs of the heads, in the shape of ``q`` (batch, heads, tokens, d)."""
        return decode_attention(q, k, v) if s.decoding else prefill_attention(q, k, v)

    def mlp(self, s: PassState, m: Mlp, x: Tensor) -> Tensor:
        """Return the residual stream after an MLP."""
        h = s.norm(x, m.norm)
        return x + m.down(gated(m.gate(h), m.up(h)))


DENSE = Rule()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Map (batch, tokens, heads * d) to (batch, heads, tokens, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """Map (batch, heads, tokens, d) to (batch, tokens, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def prefill(
    decoder: Decoder, tokens: Tensor, *, room: int = 1, trace: dict[tuple[int, str], Any] | None = None
) -> tuple[Tensor, PassState]:
    """Return logits (batch, vocab) after prompts (batch, seq), and the state, with ``room`` positions in its caches."""
    with torch.no_grad():
        state = PassState(decoder, tokens.shape[1], room, trace)
        return logits_after(decoder, _through(state, tokens)[:, -1]), state


def decode(decoder: Decoder, token: Tensor, state: PassState) -> Tensor:
    """Add one token (batch, 1) of each sequence to the state's caches; return the logits (batch, vocab) after it."""
    with torch.no_grad():
        state.decoding = True
        return logits_after(decoder, _through(state, token)[:, -1])


def window_logits(decoder: Decoder, ids: Tensor) -> Tensor:
    """Logits (n, vocab) after every token of a window (n,)."""
    with torch.no_grad():
        return logits_after(decoder, _through(PassState(decoder, len(ids)), ids[None])[0])


def embedded(s: PassState, tokens: Tensor) -> Tensor:
    """Return the residual stream before the first layer, and set the rotary tables of the tokens."""
    decoder = s.decoder
    x = F.embedding(tokens, decoder.embedding)
    positions = torch.arange(s.position, s.position + tokens.shape[1], device=x.device)
    tables = rotary_tables(positions, decoder.head_dim, x.dtype, decoder.frequencies)
    s.cos, s.sin = (table * decoder.rotary_scale for table in tables) if decoder.rotary_scale != 1.0 else tables
    return x


def through_layer(s: PassState, number: int, layer: Layer, x: Tensor) -> Tensor:
    """Return the residual stream after a layer, the decoder's or another in its place."""
    rule = s.decoder.rule or DENSE
    s.layer = number
    x = rule.enter(s, x)
    if layer.attention is not None:
        x = rule.attention(s, layer.attention, x)
    if layer.mlp is not None:
        x = rule.mlp(s, layer.mlp, x)
    return x


def logits_after(decoder: Decoder, last: Tensor) -> Tensor:
    """Return the logits of tokens from the residual stream after all layers."""
    return F.linear(rms_norm(last, decoder.final_norm, decoder.epsilon), decoder.head)


def _through(s: PassState, tokens: Tensor) -> Tensor:
    """Return the residual stream after all layers."""
    x = embedded(s, tokens)
    for number, layer in enumerate(s.decoder.layers):
        x = through_layer(s, number, layer, x)
    s.position += tokens.shape[1]
    return x
