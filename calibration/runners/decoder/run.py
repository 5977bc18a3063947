"""The forward pass: a prefill of prompts, decode steps of one token a sequence, the logits of a whole window.

Whatever may be decided while it runs is a method of a :class:`Rule`; that of a dense decoder decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from calibration.devices import skipping
from calibration.devices.attention import decode_attention, prefill_attention
from calibration.devices.operators import gated, rms_norm, rotary, rotary_tables
from calibration.runners.decoder.model import Attention, Decoder, Mlp, Tensor


@dataclass
class Cache:
    """Keys and values of a layer, (batch, kv_heads, room, head_dim) each, of which ``length`` positions are filled."""

    k: Tensor
    v: Tensor
    length: int


@dataclass
class State:
    """A pass under way, and what it leaves for the next."""

    decoder: Decoder
    prompt: int  # its tokens
    room: int = 0  # positions that caches have beside those of the prefill
    trace: dict[tuple[int, str], Any] | None = None  # receives what a rule decides, by (layer, what)
    position: int = 0  # of the first token of the pass; after it, of the next token
    decoding: bool = False  # whether this is a decode step
    layer: int = 0  # the layer that runs
    cos: Tensor = None  # rotary tables of the tokens that run, (tokens, head_dim)
    sin: Tensor = None
    caches: dict[int, Cache] = field(default_factory=dict)  # by layer; one without attention has none
    kept: dict[Any, Any] = field(default_factory=dict)  # what a rule remembers from one sublayer to the next

    def note(self, what: str, value: Any) -> None:
        """Leave a decision in the trace."""
        if self.trace is not None:
            self.trace[self.layer, what] = value

    def mark(self) -> tuple[int, dict[int, int]]:
        """Where the caches stand, for :meth:`rewind`."""
        return self.position, {layer: cache.length for layer, cache in self.caches.items()}

    def rewind(self, mark: tuple[int, dict[int, int]]) -> None:
        """Forget tokens decoded since the mark."""
        self.position, lengths = mark
        for layer, length in lengths.items():
            self.caches[layer].length = length

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.decoder.epsilon)

    def turned(self, heads: Tensor, norm: Tensor, *tables: Tensor) -> Tensor:
        """Query or key heads, normed where the model does, and rotated by this pass's tables or others."""
        heads = heads if norm is None else self.norm(heads, norm)
        return rotary(heads, *(tables or (self.cos, self.sin)))

    def queries(self, a: Attention, h: Tensor, *tables: Tensor) -> Tensor:
        """Query heads of normed tokens, rotated."""
        return self.turned(split_heads(a.q(h), a.heads), a.q_norm, *tables)

    def keys_values(self, a: Attention, h: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated key heads and value heads of normed tokens, put into the cache; when decoding, all that it holds."""
        k = self.turned(split_heads(a.k(h), a.kv_heads), a.k_norm)
        v = split_heads(a.v(h), a.kv_heads)
        if not self.decoding:
            batch, heads, length, head_dim = k.shape
            size = (batch, heads, length + self.room, head_dim)
            self.caches[self.layer] = Cache(k.new_empty(size), v.new_empty(size), 0)
        cache = self.caches[self.layer]
        begin, cache.length = cache.length, cache.length + k.shape[2]
        cache.k[:, :, begin : cache.length] = k
        cache.v[:, :, begin : cache.length] = v
        if self.decoding:
            return cache.k[:, :, : cache.length], cache.v[:, :, : cache.length]
        return k, v


class Rule:
    """What a pass leaves out: nothing, unless a method is overridden. What a rule remembers is in ``State.kept``."""

    family: ClassVar[str] = ""
    skips: ClassVar[bool] = False
    """Leaves out work that its data names."""

    def on_host(self, place: str) -> bool:
        """Whether the host reads on a torch device which kernels run, so that no CUDA graph can hold them."""
        return self.skips and not skipping.in_triton(place)

    def enter(self, s: State, x: Tensor) -> Tensor:
        """The residual stream on its way into a layer."""
        return x

    def attention(self, s: State, a: Attention, x: Tensor) -> Tensor:
        """The residual stream after an attention sublayer."""
        h = s.norm(x, a.norm)
        k, v = s.keys_values(a, h)
        out = joined(self.attend(s, s.queries(a, h), k, v))
        return added(x, a.o(out), a.turn)

    def attend(self, s: State, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Outputs of the heads, of the shape of ``q`` (batch, heads, tokens, d)."""
        return decode_attention(q, k, v) if s.decoding else prefill_attention(q, k, v)

    def mlp(self, s: State, m: Mlp, x: Tensor) -> Tensor:
        """The residual stream after an MLP."""
        h = s.norm(x, m.norm)
        return added(x, m.down(gated(m.gate(h), m.up(h))), m.turn)


DENSE = Rule()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads * d) -> (batch, heads, tokens, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """(batch, heads, tokens, d) -> (batch, tokens, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def added(x: Tensor, y: Tensor, turn: Tensor) -> Tensor:
    """The residual stream and a sublayer's output."""
    return x + y if turn is None else F.linear(x, turn).add_(y)


def prefill(
    decoder: Decoder, tokens: Tensor, *, room: int = 1, trace: dict[tuple[int, str], Any] | None = None
) -> tuple[Tensor, State]:
    """Logits (batch, vocab) after prompts (batch, seq), and the state to go on from, with ``room`` in its caches."""
    with torch.no_grad():
        state = State(decoder, tokens.shape[1], room, trace)
        return _logits(decoder, _through(state, tokens)[:, -1]), state


def decode(decoder: Decoder, token: Tensor, state: State) -> Tensor:
    """Logits (batch, vocab) after one more token (batch, 1) of each sequence, which goes into the state's caches."""
    with torch.no_grad():
        state.decoding = True
        return _logits(decoder, _through(state, token)[:, -1])


def window_logits(decoder: Decoder, ids: Tensor) -> Tensor:
    """Logits (n, vocab) after every token of a window (n,)."""
    with torch.no_grad():
        return _logits(decoder, _through(State(decoder, len(ids)), ids[None])[0])


def _through(s: State, tokens: Tensor) -> Tensor:
    """The residual stream after all layers."""
    decoder, rule = s.decoder, s.decoder.rule or DENSE
    x = F.embedding(tokens, decoder.embedding)
    places = torch.arange(s.position, s.position + tokens.shape[1], device=x.device)
    tables = rotary_tables(places, decoder.head_dim, x.dtype, decoder.frequencies)
    s.cos, s.sin = (table * decoder.rotary_scale for table in tables) if decoder.rotary_scale != 1.0 else tables
    for number, layer in enumerate(decoder.layers):
        s.layer = number
        x = rule.enter(s, x)
        if layer.attention is not None:
            x = rule.attention(s, layer.attention, x)
        if layer.mlp is not None:
            x = rule.mlp(s, layer.mlp, x)
    s.position += tokens.shape[1]
    return x


def _logits(decoder: Decoder, last: Tensor) -> Tensor:
    return F.linear(rms_norm(last, decoder.final_norm, decoder.epsilon), decoder.head)
