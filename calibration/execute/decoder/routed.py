"""Sublayers that decide while running: tokens gathered and scattered under a router, groups of heads and channels chosen for each token,
blocks of keys skipped, tokens dropped, the cache cut.

Every choice is really made from the data and really saves its work; nothing is computed and then masked, except inside the blocks of
queries of :func:`routed_attention`. In a decode step of dynamic depth the number of tokens that run is drawn (binomial, from the
decoder's seed) and the router says which, because random weights have no threshold that means a given share.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from calibration.devices.attention import decode_attention
from calibration.devices.operators import gated, rms_norm, rotary
from calibration.execute.decoder.families import whole_share
from calibration.execute.decoder.model import Attention, Cache, Decoder, Mlp, State, Tensor

_ROWS = 128  # queries attended together: what lies after the last of them is not computed


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads * d) -> (batch, heads, tokens, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """(batch, heads, tokens, d) -> (batch, tokens, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def normed(decoder: Decoder, heads: Tensor, norms: tuple[Tensor, Tensor] | None, which: int) -> Tensor:
    """Query (0) or key (1) heads with the norm that some models put on them."""
    return heads if norms is None else rms_norm(heads, norms[which], decoder.epsilon)


def queries(decoder: Decoder, a: Attention, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Query heads of normed tokens, rotated."""
    return rotary(normed(decoder, split_heads(a.q(h), a.heads), a.qk_norms, 0), cos, sin)


def keys_values(decoder: Decoder, a: Attention, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Key heads, rotated, and value heads of normed tokens."""
    k = normed(decoder, split_heads(a.k(h), a.kv_heads), a.qk_norms, 1)
    return rotary(k, cos, sin), split_heads(a.v(h), a.kv_heads)


def routed_attention(q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
    """Causal attention of some queries, (batch, heads, chosen, d) at ascending ``places`` (batch, chosen), over all keys.

    Queries go in blocks of 128; each block sees the keys up to its last query, masked where they lie after a query.
    """
    out = torch.empty_like(q)
    for start in range(0, q.shape[2], _ROWS):
        some = places[:, start : start + _ROWS]
        seen = int(some[:, -1].max()) + 1
        mask = torch.arange(seen, device=q.device)[None, None, :] <= some[:, :, None]
        out[:, :, start : start + _ROWS] = F.scaled_dot_product_attention(
            q[:, :, start : start + _ROWS],
            k[:, :, :seen],
            v[:, :, :seen],
            attn_mask=mask[:, None],
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return out


def note(state: State, number: int, what: str, value: Any) -> None:
    if state.trace is not None:
        state.trace[number, what] = value


# -- dynamic depth ----------------------------------------------------------------------------------------------------------------


def _router_scores(x: Tensor, router: Tensor | None) -> Tensor:
    """How much each token wants to be computed: the difference of the router's two outputs, (batch, tokens)."""
    assert router is not None
    votes = F.linear(x, router).float()
    return votes[..., 1] - votes[..., 0]


def _capacity(decoder: Decoder, scores: Tensor) -> Tensor:
    """Places of the tokens that run, ascending, (batch, chosen): a fixed share of each sequence."""
    many = max(whole_share(decoder.dynamic.keep, scores.shape[1]), 1)
    return scores.topk(many, dim=1).indices.sort(dim=1).values


def _drawn(decoder: Decoder, scores: Tensor, state: State) -> Tensor:
    """Numbers of the sequences that run in a decode step, ascending: as many as a binomial draw says."""
    many = int(state.rng.binomial(scores.shape[0], decoder.dynamic.keep))
    return scores[:, 0].topk(many).indices.sort().values


def _flat(places: Tensor, tokens: int) -> Tensor:
    """Places within sequences as row numbers of the flattened batch."""
    return (places + torch.arange(places.shape[0], device=places.device)[:, None] * tokens).flatten()


def depth_prefill(
    decoder: Decoder,
    number: int,
    a: Attention,
    x: Tensor,
    h: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    state: State,
) -> Tensor:
    """Attention of the chosen tokens; the others pass by. Keys and values are all there."""
    places = _capacity(decoder, _router_scores(x, a.router))
    note(state, number, "attention", places)
    rows = _flat(places, x.shape[1])
    some = h.flatten(0, 1).index_select(0, rows).view(x.shape[0], -1, x.shape[2])
    q = queries(decoder, a, some, cos[places].unsqueeze(1), sin[places].unsqueeze(1))
    y = a.o(joined(routed_attention(q, k, v, places)))
    return _scattered(x, rows, y.flatten(0, 1), a.turn)


def depth_decode(
    decoder: Decoder,
    number: int,
    a: Attention,
    x: Tensor,
    h: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    state: State,
) -> Tensor:
    """Attention of the sequences drawn, each over its own cache, which is not copied for it."""
    rows = _drawn(decoder, _router_scores(x, a.router), state)
    note(state, number, "attention", rows)
    if not len(rows):
        return x if a.turn is None else F.linear(x, a.turn)
    if len(rows) == len(x):
        q = queries(decoder, a, h, cos, sin)
        out = decode_attention(q, keys, values)
    else:
        q = queries(decoder, a, h.index_select(0, rows), cos, sin)
        out = torch.cat(
            [decode_attention(q[i : i + 1], keys[b : b + 1], values[b : b + 1]) for i, b in enumerate(rows.tolist())]
        )
    return _scattered(x, rows, a.o(joined(out)).flatten(0, 1), a.turn)


def depth_mlp(decoder: Decoder, number: int, m: Mlp, x: Tensor, state: State) -> Tensor:
    """The MLP of the chosen tokens, prefill or decode."""
    scores = _router_scores(x, m.router)
    if x.shape[1] == 1:
        rows = _drawn(decoder, scores, state)
        note(state, number, "mlp", rows)
    else:
        places = _capacity(decoder, scores)
        note(state, number, "mlp", places)
        rows = _flat(places, x.shape[1])
    if not len(rows):
        return x if m.turn is None else F.linear(x, m.turn)
    h = rms_norm(x.flatten(0, 1).index_select(0, rows), m.norm, decoder.epsilon)
    return _scattered(x, rows, m.down(gated(m.gate(h), m.up(h))), m.turn)


def _scattered(x: Tensor, rows: Tensor, y: Tensor, turn: Tensor | None) -> Tensor:
    """Outputs of some tokens added back in their places; x may be overwritten."""
    x = x if turn is None else F.linear(x, turn)
    x.view(-1, x.shape[-1]).index_add_(0, rows, y)
    return x


# -- sparse attention -------------------------------------------------------------------------------------------------------------


def block_means(x: Tensor, block: int) -> Tensor:
    """Mean of each whole block of positions, (batch, heads, blocks, d)."""
    whole = x.shape[2] // block
    return x[:, :, : whole * block].unflatten(2, (whole, block)).mean(3)


def scored_layout(q: Tensor, k: Tensor, block: int, keep: float) -> list[list[int]]:
    """Key blocks for each block of queries: its own, and of the earlier ones those whose mean key fits the mean query best.

    One layout for all heads and sequences. As many blocks as ``attention.block_layout`` keeps.
    """
    mean_q = block_means(q, block).float().mean((0, 1))
    mean_k = block_means(k, block).float().mean((0, 1))
    scores = mean_q @ mean_k.t()
    layout = []
    for row in range(-(-q.shape[2] // block)):
        count = min(row + 1, max(1, math.ceil(keep * (row + 1) - 1e-9)))
        earlier = scores[min(row, len(scores) - 1), :row] if len(scores) else scores.new_zeros(0)
        layout.append([*sorted(earlier.topk(count - 1).indices.tolist()), row])
    return layout


def chosen_blocks(
    q: Tensor, keys: Tensor, values: Tensor, cache: Cache, block: int, keep: float, state: State, number: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of a share of the prompt's blocks and of all newer positions; blocks that fit a KV head's queries best."""
    assert cache.means is not None
    means = cache.means
    batch, kv_heads, blocks, head_dim = means.shape
    if not blocks:
        return keys, values
    many = max(1, whole_share(keep, blocks))
    pooled = q.view(batch, kv_heads, -1, head_dim).mean(2)
    index = (means @ pooled.unsqueeze(-1)).squeeze(-1).topk(many, dim=-1).indices.sort(dim=-1).values
    note(state, number, "attention", index)
    wide = index[..., None, None].expand(batch, kv_heads, many, block, head_dim)
    edge = blocks * block
    picked = [t[:, :, :edge].unflatten(2, (blocks, block)).gather(2, wide).flatten(2, 3) for t in (keys, values)]
    return torch.cat((picked[0], keys[:, :, edge:]), 2), torch.cat((picked[1], values[:, :, edge:]), 2)


# -- fewer tokens, smaller caches -------------------------------------------------------------------------------------------------


def last_query_scores(q: Tensor, k: Tensor) -> Tensor:
    """How much the last query attends to each position, summed over heads: (batch, positions)."""
    grouped = q[:, :, -1].unflatten(1, (k.shape[1], -1))
    scores = (grouped @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    return scores.softmax(-1).sum((1, 2))


def drop_tokens(
    keep: float, x: Tensor, cos: Tensor, sin: Tensor, scores: Tensor | None, state: State, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that go on, with their rotary tables: those attended to most (evenly spread ones without scores), and always the last."""
    batch, seq, hidden = x.shape
    many = max(whole_share(keep, seq), 1)
    if scores is None:
        places = torch.linspace(seq - 1, 0, many, device=x.device).round().long().flip(0).expand(batch, many)
    else:
        scores[:, -1] = torch.inf
        places = scores.topk(many, dim=1).indices.sort(dim=1).values
    note(state, number, "token", places)
    x = x.gather(1, places[..., None].expand(batch, many, hidden))
    return x, cos[places].unsqueeze(1), sin[places].unsqueeze(1)


def evict(q: Tensor, k: Tensor, v: Tensor, cache: Cache, keep: float, observed: int, state: State, number: int) -> None:
    """Cut the cache to the positions that the last ``observed`` queries attend to most, for each sequence and KV head."""
    seq = k.shape[2]
    some = min(observed, seq)
    many = max(whole_share(keep, seq), 1)
    grouped = q[:, :, -some:].unflatten(1, (k.shape[1], -1))  # batch, groups, heads of a group, queries, d
    scores = (grouped @ k.transpose(-1, -2).unsqueeze(2)).float() / math.sqrt(q.shape[-1])
    seen = torch.ones(some, seq, dtype=torch.bool, device=q.device).tril(seq - some)
    weights = scores.masked_fill_(~seen, -torch.inf).softmax(-1).sum((2, 3))
    places = weights.topk(many, dim=-1).indices.sort(dim=-1).values
    note(state, number, "cache", places)
    wide = places[..., None].expand(*places.shape, k.shape[3])
    cache.k[:, :, :many] = k.gather(2, wide)
    cache.v[:, :, :many] = v.gather(2, wide)
    cache.length = many
