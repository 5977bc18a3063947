"""The forward pass: a prefill of whole prompts, and decode steps of one token a sequence.

Sublayers without anything dynamic are here; ``routed`` has those that decide for each token what to compute.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from calibration.devices.attention import block_sparse_attention, decode_attention, prefill_attention
from calibration.devices.operators import gated, rms_norm, rotary_tables
from calibration.execute.decoder import routed, widths
from calibration.execute.decoder.model import Attention, Cache, Decoder, Mlp, State, Tensor
from simulator.errors import InputError


def prefill(
    decoder: Decoder, tokens: Tensor, *, room: int = 1, trace: dict[tuple[int, str], Any] | None = None
) -> tuple[Tensor, State]:
    """Process prompts and fill the caches.

    Parameters
    ----------
    decoder : Decoder
    tokens : integer tensor (batch, seq)
    room : int
        Tokens that will be decoded after it.
    trace : dict, optional
        Receives what dynamic families decide, by (layer, sublayer).

    Returns
    -------
    logits : tensor (batch, vocab)
        Of the last position.
    state : State
    """
    d = decoder.dynamic
    if d.family == "token" and not 0 <= d.start < max(len(decoder.layers), 1):
        raise InputError(f"token: start at layer {d.start}, but there are {len(decoder.layers)} layers")
    with torch.no_grad():
        x = F.embedding(tokens, decoder.embedding)
        seq = tokens.shape[1]
        cos, sin = rotary_tables(torch.arange(seq, device=x.device), decoder.config.head_dim, x.dtype, decoder.theta)
        state = State([], seq, np.random.default_rng(d.seed), trace)
        scores: Tensor | None = (
            None  # token: how much the last query attends to each position, one layer before tokens are dropped
        )
        for number, layer in enumerate(decoder.layers):
            if d.family == "token" and number == d.start:
                x, cos, sin = routed.drop_tokens(d.keep, x, cos, sin, scores, state, number)
            if layer.attention is None:
                state.caches.append(None)
            else:
                x, scores = _prefill_attention(decoder, number, layer.attention, x, cos, sin, state, room)
            if layer.mlp is not None:
                x = _mlp(decoder, number, layer.mlp, x, state)
        return _logits(decoder, x[:, -1]), state


def decode(decoder: Decoder, token: Tensor, state: State) -> Tensor:
    """One more token of each sequence.

    Parameters
    ----------
    decoder : Decoder
    token : integer tensor (batch, 1)
    state : State
        From :func:`prefill`; its caches take the token in.

    Returns
    -------
    logits : tensor (batch, vocab)
    """
    with torch.no_grad():
        x = F.embedding(token, decoder.embedding)
        place = torch.full((1,), state.position, device=x.device)
        cos, sin = rotary_tables(place, decoder.config.head_dim, x.dtype, decoder.theta)
        for number, layer in enumerate(decoder.layers):
            if layer.attention is not None:
                cache = state.caches[number]
                assert cache is not None
                x = _decode_attention(decoder, number, layer.attention, x, cos, sin, state, cache)
            if layer.mlp is not None:
                x = _mlp(decoder, number, layer.mlp, x, state)
        state.position += 1
        return _logits(decoder, x[:, -1])


def _logits(decoder: Decoder, last: Tensor) -> Tensor:
    return F.linear(rms_norm(last, decoder.final_norm, decoder.epsilon), decoder.head)


def _add(x: Tensor, y: Tensor, turn: Tensor | None) -> Tensor:
    return x + y if turn is None else F.linear(x, turn).add_(y)


def _prefill_attention(
    decoder: Decoder, number: int, a: Attention, x: Tensor, cos: Tensor, sin: Tensor, state: State, room: int
) -> tuple[Tensor, Tensor | None]:
    d = decoder.dynamic
    h = rms_norm(x, a.norm, decoder.epsilon)
    k, v = routed.keys_values(decoder, a, h, cos, sin)
    seq = k.shape[2]
    size = (*k.shape[:2], seq + room, k.shape[3])
    cache = Cache(k.new_empty(size), v.new_empty(size), seq)
    cache.k[:, :, :seq] = k
    cache.v[:, :, :seq] = v
    state.caches.append(cache)
    if d.family == "dynamic_depth":
        return routed.depth_prefill(decoder, number, a, x, h, k, v, cos, sin, state), None
    if d.family == "dynamic_width":
        return widths.width_prefill(decoder, number, a, x, h, k, v, cos, sin, state), None
    q = routed.queries(decoder, a, h, cos, sin)
    scores = None
    if d.family == "sparse_attention":
        layout = routed.scored_layout(q, k, d.block, d.keep)
        cache.means = routed.block_means(k, d.block)
        if state.trace is not None:
            state.trace[number, "attention"] = layout
        out = block_sparse_attention(layout, q.shape[2], k.shape[2], d.block, decoder.place)(q, k, v)
    else:
        out = prefill_attention(q, k, v)
        if d.family == "token" and number == d.start - 1:
            scores = routed.last_query_scores(q, k)
        if d.family == "kv_cache":
            routed.evict(q, k, v, cache, d.keep, d.observed, state, number)
    return _add(x, a.o(routed.joined(out)), a.turn), scores


def _decode_attention(
    decoder: Decoder, number: int, a: Attention, x: Tensor, cos: Tensor, sin: Tensor, state: State, cache: Cache
) -> Tensor:
    d = decoder.dynamic
    h = rms_norm(x, a.norm, decoder.epsilon)
    k, v = routed.keys_values(decoder, a, h, cos, sin)
    cache.k[:, :, cache.length : cache.length + 1] = k
    cache.v[:, :, cache.length : cache.length + 1] = v
    cache.length += 1
    keys, values = cache.k[:, :, : cache.length], cache.v[:, :, : cache.length]
    if d.family == "dynamic_depth":
        return routed.depth_decode(decoder, number, a, x, h, keys, values, cos, sin, state)
    if d.family == "dynamic_width":
        return widths.width_decode(decoder, number, a, x, h, keys, values, cos, sin, state)
    q = routed.queries(decoder, a, h, cos, sin)
    if d.family == "sparse_attention":
        keys, values = routed.chosen_blocks(q, keys, values, cache, d.block, d.keep, state, number)
    return _add(x, a.o(routed.joined(decode_attention(q, keys, values))), a.turn)


def _mlp(decoder: Decoder, number: int, m: Mlp, x: Tensor, state: State) -> Tensor:
    family = decoder.dynamic.family
    if family == "dynamic_depth":
        return routed.depth_mlp(decoder, number, m, x, state)
    h = rms_norm(x, m.norm, decoder.epsilon)
    if family == "dynamic_width":
        return widths.width_mlp(decoder, number, m, x, h, state)
    return _add(x, m.down(gated(m.gate(h), m.up(h))), m.turn)
