"""Prune a decoder by any family: change its weights, or set the rule of its passes.

Widths, ranks and counts are rounded as in ``simulator.pruning``, so shapes equal the predicted
shapes. Static families remove the smallest weights, which does not affect the time. The rules of
dynamic families skip work, which depends on data: tokens, groups of heads and channels per token,
blocks of keys, cache positions. Work is skipped, not masked, except inside the blocks of
:func:`routed_attention`. On a GPU with Triton, kernels read the choices on the device, and shapes
do not depend on data, so CUDA graphs can hold prefill and decode. On other devices the host reads
the choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from calibration.devices import attention
from calibration.devices import operators as skipping
from calibration.devices.attention import block_sparse_attention, decode_attention, masked_attention
from calibration.devices.operators import gated, sparse_weight
from calibration.devices.protocol import Unsupported
from calibration.runners.decoder.model import (
    Attention,
    Blocks,
    Decoder,
    Layer,
    Mlp,
    PassState,
    Projection,
    Rule,
    Sublayer,
    Tensor,
    joined,
    split_heads,
)
from simulator.arrays import FloatArray
from simulator.errors import InputError
from simulator.models.sublayers import base as sizes
from simulator.pruning import FAMILIES, listed_layers
from simulator.pruning._family import GROUPS, SUBLAYERS, rounded

# default multiple to which widths and ranks are rounded up, as in the simulator's families
ALIGN = 16
_ROWS = 128  # queries per block of :func:`routed_attention`


def at_least_one(share: float, of: int) -> int:
    """Return a share of ``of``, rounded as in the simulator's families, without the time of a NumPy
    call."""
    return max(math.floor(share * of + 0.5), 1)


def best(scores: Tensor, many: int) -> Tensor:
    return scores.topk(many, dim=-1).indices.sort(dim=-1).values


def routed_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Causal attention of queries (batch, heads, chosen, d) at ascending ``positions`` (batch,
    chosen) over all keys. Keys after the last query of a block of 128 are not computed; a mask
    hides the other keys after each query."""
    out = torch.empty_like(q)
    for start in range(0, q.shape[2], _ROWS):
        block = slice(start, start + _ROWS)
        some = positions[:, block]
        seen = int(some[:, -1].max()) + 1
        mask = torch.arange(seen, device=q.device)[None, None, :] <= some[:, :, None]
        out[:, :, block] = masked_attention(
            q[:, :, block], k[:, :, :seen], v[:, :, :seen], mask[:, None]
        )
    return out


def shared_scores(q: Tensor, k: Tensor) -> Tensor:
    """Return scores of queries (batch, heads, queries, d) as (batch, kv_heads, heads per KV head,
    queries, keys)."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = grouped.flatten(2, 3) @ k.transpose(-1, -2)
    return scores.float().div_(math.sqrt(q.shape[-1])).unflatten(2, grouped.shape[2:4])


@dataclass(frozen=True)
class TokenRouting(Rule):
    """Dynamic depth: a router of two outputs selects the tokens that compute each sublayer; k and v
    are dense. Decode steps draw the number of active tokens, because random routers have no
    threshold for a share."""

    family: ClassVar[str] = "dynamic_depth"
    skips: ClassVar[bool] = True
    keep: float
    seed: int = 0

    def attention(self, s: PassState, a: Attention, x: Tensor) -> Tensor:
        h = s.norm(x, a.norm)
        k, v = s.keys_values(a, h)
        if self._in_place(s):
            index, count, runs = self._drawn(a.router, x)
            q = s.turned(
                split_heads(a.q.of_rows(h[:, 0], index, count)[:, None], a.heads), a.q_norm
            )
            out = attention.running(q, k, v, runs[:, None].expand(-1, a.kv_heads))
            return a.o.of_rows(joined(out)[:, 0], index, count, x[:, 0])[:, None]
        rows, positions = self._chosen(s, a.router, x)
        if not len(rows):
            return x
        if not s.decoding:
            some = h.flatten(0, 1).index_select(0, rows).view(len(x), -1, x.shape[2])
            q = s.queries(a, some, s.cos[positions].unsqueeze(1), s.sin[positions].unsqueeze(1))
            attend = (
                attention.at_positions if skipping.in_triton(s.decoder.device) else routed_attention
            )
            out = attend(q, k, v, positions)
        elif len(rows) == len(x):
            out = decode_attention(s.queries(a, h), k, v)
        else:  # each sequence reads its cache in place
            q = s.queries(a, h.index_select(0, rows))
            one = [
                decode_attention(q[i : i + 1], k[b : b + 1], v[b : b + 1])
                for i, b in enumerate(rows.tolist())
            ]
            out = torch.cat(one)
        return scattered(x, rows, a.o(joined(out)).flatten(0, 1))

    def mlp(self, s: PassState, m: Mlp, x: Tensor) -> Tensor:
        if self._in_place(s):
            index, count, _ = self._drawn(m.router, x)
            h = s.norm(x[:, 0], m.norm)
            inner = s.gated(m.gate.of_rows(h, index, count), m.up.of_rows(h, index, count))
            return m.down.of_rows(inner, index, count, x[:, 0])[:, None]
        rows, _ = self._chosen(s, m.router, x)
        if not len(rows):
            return x
        h = s.norm(x.flatten(0, 1).index_select(0, rows), m.norm)
        return scattered(x, rows, m.down(s.gated(m.gate(h), m.up(h))))

    def _in_place(self, s: PassState) -> bool:
        """Whether kernels skip rows, so the number of active rows is not a shape."""
        return s.decoding and skipping.in_triton(s.decoder.device)

    def _drawn(self, router: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sequences of a decode step, active ones first; the drawn number of active
        ones; their mask."""
        index = _votes(x[:, 0], router).argsort(descending=True)
        count = (torch.rand(len(x), device=x.device) < self.keep).sum(dtype=torch.int32)
        first = torch.arange(len(x), device=x.device) < count
        return index, count, torch.zeros_like(first).scatter_(0, index, first)

    def _chosen(self, s: PassState, router: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the active rows of the flattened batch (of prompts a fixed share), and their
        positions."""
        scores = _votes(x, router)
        if s.decoding:
            if "generator" not in s.kept:
                s.kept["generator"] = np.random.default_rng(self.seed)
            positions = rows = best(
                scores[:, 0], int(s.kept["generator"].binomial(len(x), self.keep))
            )
        else:
            positions = best(scores, at_least_one(self.keep, x.shape[1]))
            rows = (
                positions + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
            ).flatten()
        return rows, positions


def _votes(x: Tensor, router: Tensor) -> Tensor:
    votes = F.linear(x, router).float()
    return votes[..., 1] - votes[..., 0]


def scattered(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    x.view(-1, x.shape[-1]).index_add_(0, rows, y)
    return x


@dataclass(frozen=True)
class BlockAttention(Rule):
    """Sparse attention over the blocks of keys whose mean key scores best for a block of queries or
    a decoded query."""

    family: ClassVar[str] = "sparse_attention"
    skips: ClassVar[bool] = True
    keep: float
    block: int = 64

    def attend(self, s: PassState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if s.decoding:
            return decode_attention(q, *self._chosen(s, q, k, v))
        table, q_len = self._table(q, k), q.shape[2]
        s.kept["means", s.layer] = block_means(k, self.block)
        by_blocks = (
            attention.fused_block_sparse
            if skipping.in_triton(s.decoder.device)
            else block_sparse_attention
        )
        return by_blocks(table, q_len, k.shape[2], self.block)(q, k, v)

    def _table(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the mask of the blocks of keys that each block of queries sees, for all heads and
        sequences."""
        mean_q, mean_k = (block_means(x, self.block).float().mean((0, 1)) for x in (q, k))
        scores, rows = mean_q @ mean_k.t(), -(-q.shape[2] // self.block)
        whole = len(scores)
        number = torch.arange(rows, device=q.device)
        if rows > whole:  # an incomplete last block uses the scores of the block before it
            scores = (
                F.pad(scores[number.clamp(max=whole - 1)], (0, 1))
                if whole
                else scores.new_zeros(1, 1)
            )
        earlier = number < number[:, None]
        many = torch.ceil(self.keep * (number + 1.0).double() - 1e-9).clamp(min=1) - 1
        rank = (
            scores.masked_fill(~earlier, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
        )
        return (earlier & (rank < many[:, None])) | (number == number[:, None])

    def _chosen(
        self, s: PassState, q: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values of a share of the prompt's blocks, by KV head, and of all later
        positions."""
        means = s.kept["means", s.layer]
        batch, kv_heads, blocks, head_dim = means.shape
        if not blocks:
            return keys, values
        pooled = q.view(batch, kv_heads, -1, head_dim).mean(2)
        index = best((means @ pooled.unsqueeze(-1)).squeeze(-1), at_least_one(self.keep, blocks))
        wide, edge = (
            index[..., None, None].expand(*index.shape, self.block, head_dim),
            blocks * self.block,
        )

        def picked(t: Tensor) -> Tensor:
            some = t[:, :, :edge].unflatten(2, (blocks, -1)).gather(2, wide).flatten(2, 3)
            return torch.cat((some, t[:, :, edge:]), 2)

        return picked(keys), picked(values)


def block_means(x: Tensor, block: int) -> Tensor:
    whole = x.shape[2] // block
    return x[:, :, : whole * block].unflatten(2, (whole, block)).mean(3)


@dataclass(frozen=True)
class TokenDropping(Rule):
    """From layer ``start`` on, keep prompt tokens with most attention of the last token (layer 0:
    evenly spread)."""

    family: ClassVar[str] = "token"
    keep: float
    start: int = 2

    def attend(self, s: PassState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().attend(s, q, k, v)
        if not s.decoding and s.layer == self.start - 1:
            s.kept["scores"] = shared_scores(q[:, :, -1:], k).softmax(-1).sum((1, 2, 3))
        return out

    def enter(self, s: PassState, x: Tensor) -> Tensor:
        if not 0 <= self.start < len(s.decoder.layers):
            raise InputError(
                f"token: start: expected a layer from 0 to {len(s.decoder.layers) - 1}, got"
                f" {self.start}"
            )
        if s.decoding or s.layer != self.start:
            return x
        batch, seq, hidden = x.shape
        many = at_least_one(self.keep, seq)
        if "scores" in s.kept:
            scores = s.kept["scores"]
            scores[:, -1] = torch.inf
            positions = best(scores, many)
        else:
            positions = (
                torch.linspace(seq - 1, 0, many, device=x.device)
                .round()
                .long()
                .flip(0)
                .expand(batch, many)
            )
        s.cos, s.sin = s.cos[positions].unsqueeze(1), s.sin[positions].unsqueeze(1)
        return x.gather(1, positions[..., None].expand(batch, many, hidden))


@dataclass(frozen=True)
class CacheCut(Rule):
    """KV cache: keep the positions with most attention of the prompt's last ``observed`` queries,
    by KV head."""

    family: ClassVar[str] = "kv_cache"
    keep: float
    observed: int = 32

    def attend(self, s: PassState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().attend(s, q, k, v)
        if s.decoding:
            return out
        seq, cache = k.shape[2], s.caches[s.layer]
        some, many = min(self.observed, seq), at_least_one(self.keep, seq)
        seen = torch.ones(some, seq, dtype=torch.bool, device=q.device).tril(seq - some)
        scores = shared_scores(q[:, :, -some:], k).masked_fill_(~seen, -torch.inf)
        positions = best(scores.softmax(-1).sum((2, 3)), many)
        wide = positions[..., None].expand(*positions.shape, k.shape[3])
        cache.k[:, :, :many] = k.gather(2, wide)
        cache.v[:, :, :many] = v.gather(2, wide)
        cache.length = many
        return out


def group_counts(keep: float, groups: int, first: int, tokens: int) -> NDArray[np.int64]:
    """Return the number of groups of each token: the whole numbers around ``keep * groups`` in a
    cycle that has exactly this mean. ``first`` is the place of the first token in the cycle."""
    edges = np.floor(keep * groups * np.arange(first, first + tokens + 1, dtype=np.float64) + 1e-6)
    return np.diff(edges).astype(np.int64)


def _spans(groups: Sequence[int]) -> list[tuple[int, int]]:
    """Return spans [begin, end) of neighbours among ascending numbers."""
    begins = [g for i, g in enumerate(groups) if i == 0 or groups[i - 1] != g - 1]
    ends = [g + 1 for i, g in enumerate(groups) if i + 1 == len(groups) or groups[i + 1] != g + 1]
    return list(zip(begins, ends, strict=True))


def _sliced(x: Tensor, weight: Tensor, spans: Sequence[tuple[int, int]], rows: int) -> Tensor:
    """Multiply a vector by spans of a weight's groups of ``rows`` rows, which are read in place."""
    parts = [torch.mv(weight[rows * start : rows * stop], x) for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _returned(features: Tensor, index: Tensor, blocks: Blocks) -> Tensor:
    """Multiply features (groups, width) by their rows of the transposed weight; return (1,
    hidden)."""
    channels = index[:, None] * blocks.width + torch.arange(blocks.width, device=index.device)
    return F.embedding_bag(channels, blocks.outer, mode="sum", per_sample_weights=features).sum(
        0, keepdim=True
    )


@dataclass(frozen=True)
class GroupRouting(Rule):
    """Dynamic width: a router selects the groups of heads and of MLP channels of each token; k and
    v are dense.

    On a GPU with Triton, kernels skip tiles of tokens that are sorted by group. On other devices a
    loop over the groups gathers the tokens of each group, multiplies them and adds the results
    (kernel "looped" of the simulator's family). A single token needs no loop: neighbouring groups
    are one slice of the stacked weights.
    """

    family: ClassVar[str] = "dynamic_width"
    skips: ClassVar[bool] = True
    keep: float
    channel_groups: int = 32
    seed: int = 0

    def attention(self, s: PassState, a: Attention, x: Tensor) -> Tensor:
        h = s.norm(x, a.norm)
        keys, values = s.keys_values(a, h)
        index, counts = self._choice(s, a, x)
        if not counts.any():
            y = torch.zeros_like(x)
        elif skipping.in_triton(s.decoder.device):
            y = _heads_in_tiles(s, a, h, keys, values, self._mask(s, index, counts, a.kv_heads))
        elif len(index) == 1:
            y = _heads_of_one(s, a, h, keys, values, index[0, : counts[0]].sort().values)
        else:
            y = _heads(s, a, h, keys, values, self._mask(s, index, counts, a.kv_heads))
        return x + y.view_as(x)

    def mlp(self, s: PassState, m: Mlp, x: Tensor) -> Tensor:
        h, blocks = s.norm(x, m.norm), m.blocks
        assert blocks is not None
        index, counts = self._choice(s, m, x)
        if not counts.any():
            y = torch.zeros_like(x)
        elif skipping.in_triton(s.decoder.device):
            kernels = skipping.kernels()
            tiles = kernels.tiles_of(self._mask(s, index, counts, blocks.groups))
            inner = kernels.grouped_columns(h.flatten(0, 1), blocks.inner, tiles, gated=True)
            y = kernels.grouped_features(inner, blocks.outer, tiles)
        elif len(index) == 1:
            chosen = index[0, : counts[0]].sort().values
            both = _sliced(h.flatten(), blocks.inner, _spans(chosen.tolist()), 2 * blocks.width)
            gate, up = both.view(len(chosen), 2, -1).unbind(1)
            y = _returned(gated(gate, up), chosen, blocks)
        else:
            y = _channels(h.flatten(0, 1), blocks, self._mask(s, index, counts, blocks.groups))
        return x + y.view_as(x)

    def _choice(
        self, s: PassState, sublayer: Sublayer, x: Tensor
    ) -> tuple[Tensor, NDArray[np.int64]]:
        """Return the best groups of each token, as many as any token uses, and the number that each
        token uses."""
        counts = group_counts(
            self.keep, len(sublayer.router), self._turn(s), x.shape[0] * x.shape[1]
        )
        index = F.linear(x.flatten(0, 1), sublayer.router).topk(int(counts.max()), dim=-1).indices
        return index, counts

    def _turn(self, s: PassState) -> int:
        return s.layer + max(s.position, s.prompt)

    def _mask(self, s: PassState, index: Tensor, counts: NDArray[np.int64], groups: int) -> Tensor:
        first, (tokens, most), device = self._turn(s), index.shape, index.device
        mask = torch.zeros(tokens, groups, dtype=torch.bool, device=device)
        if (counts == most).all():
            return mask.scatter_(1, index, True)
        # the counts are computed again on the device, because a graph cannot capture a copy from
        # the host
        turn = torch.arange(first, first + tokens + 1, dtype=torch.float64, device=device)
        used = (
            torch.arange(most, device=device)
            < torch.floor(self.keep * groups * turn + 1e-6).diff()[:, None]
        )
        return mask.scatter_(1, index, used)


def _heads_in_tiles(
    s: PassState, a: Attention, h: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> Tensor:
    kernels, blocks, (batch, tokens) = skipping.kernels(), a.blocks, h.shape[:2]
    assert blocks is not None
    tiles = kernels.tiles_of(mask)
    q = kernels.grouped_columns(h.flatten(0, 1), blocks.inner, tiles, a.q.bias)
    q = s.turned(split_heads(q.view(batch, tokens, -1), a.heads), a.q_norm)
    out = (
        attention.running(q, keys, values, mask)
        if s.decoding
        else _chosen_attention(q, keys, values, mask)
    )
    return kernels.grouped_features(joined(out).flatten(0, 1), blocks.outer, tiles)


def _chosen_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Causal attention of the queries in a mask (batch * tokens, kv_heads), gathered by group;
    other queries give 0."""
    batch, heads, tokens, _ = q.shape
    groups = mask.shape[1]
    # (batch * groups, tokens)
    chosen = mask.view(batch, tokens, groups).transpose(1, 2).flatten(0, 1)
    order = chosen.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
    there = torch.arange(tokens, device=q.device) < chosen.sum(1, keepdim=True)
    grouped = q.reshape(batch * groups, heads // groups, tokens, -1)
    wide = order[:, None, :, None].expand_as(grouped)
    k, v = (t.flatten(0, 1).unsqueeze(1) for t in (keys, values))
    out = attention.at_positions(grouped.gather(2, wide), k, v, order.where(there, -1))
    return (
        torch.zeros_like(grouped)
        .scatter_(2, wide, out.masked_fill(~there[:, None, :, None], 0.0))
        .view_as(q)
    )


def _heads_of_one(
    s: PassState, a: Attention, h: Tensor, keys: Tensor, values: Tensor, chosen: Tensor
) -> Tensor:
    blocks, spans, share = a.blocks, _spans(chosen.tolist()), a.heads // a.kv_heads
    assert blocks is not None
    q = _sliced(h.flatten(), blocks.inner, spans, blocks.width)
    if a.q.bias is not None:
        q = q + a.q.bias.view(a.kv_heads, -1).index_select(0, chosen).flatten()
    q = s.turned(q.view(1, len(chosen) * share, 1, -1), a.q_norm)
    some = q.split([(stop - start) * share for start, stop in spans], 1)
    outs = [
        decode_attention(q, keys[:, i:j], values[:, i:j])
        for q, (i, j) in zip(some, spans, strict=True)
    ]
    return _returned(torch.cat(outs, 1).view(len(chosen), -1), chosen, blocks)


def _heads(
    s: PassState, a: Attention, h: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> Tensor:
    """Compute queries, attention and output of each KV group for the tokens in a mask (batch *
    tokens, kv_heads)."""
    blocks, (batch, tokens) = a.blocks, h.shape[:2]
    assert blocks is not None
    h = h.flatten(0, 1)
    y = torch.zeros_like(h)
    for group, (inner, outer) in enumerate(blocks.weights()):
        rows = mask[:, group].nonzero().squeeze(1)
        q = h.index_select(0, rows) @ inner.t()
        if a.q.bias is not None:
            q = q + a.q.bias.view(a.kv_heads, -1)[group]
        q = q.unflatten(-1, (a.heads // a.kv_heads, -1))  # (rows, heads of a group, d)
        # one launch per sequence, because a single launch would need a copy of the caches
        if s.decoding:
            q = s.turned(q, a.q_norm)
            caches = [
                (keys[b, group][None, None], values[b, group][None, None]) for b in rows.tolist()
            ]
            parts = [
                decode_attention(q[i][None, :, None], k, v)[0, :, 0][None]
                for i, (k, v) in enumerate(caches)
            ]
        else:
            positions = rows.remainder(tokens)
            q = s.turned(q, a.q_norm, s.cos[positions].unsqueeze(1), s.sin[positions].unsqueeze(1))
            counts = mask[:, group].view(batch, tokens).sum(1).tolist()
            sequences = zip(
                q.split(counts),
                positions.split(counts),
                keys[:, group],
                values[:, group],
                strict=True,
            )
            parts = [
                routed_attention(
                    some.transpose(0, 1)[None], k[None, None], v[None, None], at[None]
                )[0].transpose(0, 1)
                for some, at, k, v in sequences
                if len(some)
            ]
        if parts:
            y.index_add_(0, rows, torch.cat(parts).flatten(1) @ outer)
    return y


def _channels(h: Tensor, blocks: Blocks, mask: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    for group, (inner, outer) in enumerate(blocks.weights()):
        rows = mask[:, group].nonzero().squeeze(1)
        gate, up = (h.index_select(0, rows) @ inner.t()).chunk(2, 1)
        y.index_add_(0, rows, gated(gate, up) @ outer)
    return y


# Families that decide during a pass
DYNAMIC: Mapping[str, Callable[..., Rule]] = {
    rule.family: rule
    for rule in (TokenRouting, GroupRouting, BlockAttention, TokenDropping, CacheCut)
}


@dataclass(frozen=True)
class Removed:
    # part (attention, mlp, heads) or projection (q, down) -> fraction of every layer
    table: Mapping[str, FloatArray]
    # whether parts were named; else attention and mlp have the same fractions
    by_part: bool = False
    layers: tuple[int, ...] | None = None  # candidates for the removal of whole layers; None: all

    def of(self, layer: int, *names: str) -> float:
        return next((float(self.table[name][layer]) for name in names if name in self.table), 0.0)

    def of_projection(self, layer: int, role: str) -> float:
        groups = [name for name in ("qkv", *SUBLAYERS) if role in GROUPS[name]]
        return self.of(layer, role, *groups)


def prune_decoder(
    decoder: Decoder,
    family: str,
    sparsity: Any = None,
    *,
    layers: Sequence[int] | None = None,
    **options: Any,
) -> Decoder:
    """Prune a decoder by a family, with the arguments of :func:`simulator.prune` or fields of the
    family's rule."""
    options = different(family, options)
    if sparsity is None and layers is None:
        sparsity = FAMILIES[family].default
    removed = _removed(family, sparsity, layers, len(decoder.layers))
    if not any(fractions.any() for fractions in removed.table.values()):
        return decoder
    with torch.no_grad():
        if family in STATIC:
            return STATIC[family](decoder, removed, **options)
        return _routed(decoder, DYNAMIC[family](1.0 - sparsity, **options))


def different(family: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options without those that a family lacks here and that have the simulator's
    defaults."""
    own, usual = signature({**STATIC, **DYNAMIC}[family]).parameters, FAMILIES[family].options
    dropped = {
        name for name, value in usual.items() if name not in own and options.get(name) == value
    }
    dropped |= {"kernel"} if family in DYNAMIC else set()
    return {name: value for name, value in options.items() if name not in dropped}


def _removed(family: str, sparsity: Any, layers: Sequence[int] | None, many: int) -> Removed:
    """Return the fractions of all layers; ``layers`` are pruned, or a fraction of these layers is
    removed."""
    by_part, listed = (
        isinstance(sparsity, Mapping),
        None if layers is None else listed_layers(layers, many),
    )
    from_list = FAMILIES[family].layers == "some"
    if sparsity is None and from_list and listed is not None:
        return Removed(dict.fromkeys(SUBLAYERS, np.ones(many)), layers=tuple(listed.tolist()))
    table = {}
    for name, fractions in (sparsity if by_part else dict.fromkeys(SUBLAYERS, sparsity)).items():
        table[name] = np.broadcast_to(np.asarray(fractions, dtype=np.float64), many).copy()
        if listed is not None and not from_list:
            table[name][~np.isin(np.arange(many), listed)] = 0.0
    return Removed(
        table, by_part, tuple(listed.tolist()) if from_list and listed is not None else None
    )


def depth(
    decoder: Decoder, removed: Removed, *, unit: str = "layer", early_exit: bool = False
) -> Decoder:
    """Remove layers or sublayers: the deepest ones, except the last one unless tokens exit
    early."""
    kinds = (
        [("attention", "mlp")]
        if unit == "layer" and not removed.by_part
        else [("attention",), ("mlp",)]
    )
    layers = list(decoder.layers)
    for kind in kinds if unit in ("layer", "both") else [(unit,)]:
        fraction = max(removed.of(0, part) for part in kind)
        there = [
            i
            for i, layer in enumerate(layers)
            if any(getattr(layer, part) is not None for part in kind)
        ]
        some = there if removed.layers is None else [i for i in there if i in removed.layers]
        count = rounded(fraction, len(some))
        spared = not early_exit and 0 < count < len(some) and some[-1] == there[-1]
        for i in some[len(some) - spared - count : len(some) - spared]:
            layers[i] = replace(layers[i], **dict.fromkeys(kind))
    stays = [layer.attention is not None or layer.mlp is not None for layer in layers]
    rule = decoder.rule
    if isinstance(rule, TokenDropping):
        rule = replace(rule, start=sum(stays[: rule.start]))
    return replace(
        decoder, layers=tuple(layer for layer, there in zip(layers, stays) if there), rule=rule
    )


def width(
    decoder: Decoder, removed: Removed, *, align: int = ALIGN, inner: int | None = None
) -> Decoder:
    """Remove heads, MLP channels and hidden features. ``inner`` is the width of all MLPs that are
    pruned."""

    def change(number: int, part: Any) -> Any:
        size = getattr(part, part.roles[-1]).weight.float().pow(2).sum(0)
        if isinstance(part, Mlp):
            share = removed.of(number, "mlp")
            if not share:
                return part
            return part.channels(
                best(size, sizes.aligned(len(size), share, align) if inner is None else inner)
            )
        shares = [removed.of(number, name) for name in ("attention", "heads", "kv")]
        return _fewer_heads(part, decoder.head_dim, size, *shares) if any(shares) else part

    narrower = decoder.changed(change)
    hidden = removed.of(0, "hidden")
    return _fewer_features(narrower, hidden, align) if hidden else narrower


def _fewer_heads(
    a: Attention, head_dim: int, size: Tensor, both: float, alone: float, kv: float
) -> Attention:
    """Remove shares of KV groups, of query heads alone, and of KV heads alone; ``size`` is the size
    of each feature."""

    def left(many: int, share: float) -> int:
        return max(rounded(1.0 - share, many), 1) if share else many

    ratio, groups = a.heads // a.kv_heads, left(a.kv_heads, both)
    heads = left(ratio * groups, alone)
    kv_heads = left(groups, kv)
    if heads % kv_heads:
        raise InputError(
            f"{heads} query heads on {kv_heads} KV heads: expected a multiple of {kv_heads}"
        )
    by_head = size.view(a.kv_heads, ratio, -1).sum(2)
    kept = best(by_head.sum(1), groups)
    number = kept[:, None] * ratio + torch.arange(ratio, device=kept.device)
    if kv_heads == groups:  # each group loses the same number of query heads and keeps its KV head
        queries = number.gather(1, best(by_head[kept], heads // groups)).flatten()
        keys = kept
    else:
        queries = number.flatten()[best(by_head[kept].flatten(), heads)]
        keys = kept[best(by_head[kept].sum(1), kv_heads)]
    q, k = (
        (which[:, None] * head_dim + torch.arange(head_dim, device=which.device)).flatten()
        for which in (queries, keys)
    )
    return replace(
        a,
        q=a.q.rows(q),
        k=a.k.rows(k),
        v=a.v.rows(k),
        o=a.o.columns(q),
        heads=heads,
        kv_heads=kv_heads,
    )


def width_cross(decoder: Decoder, removed: Removed, *, align: int = ALIGN) -> Decoder:
    """Reduce the hidden size. Norms have the scale that they would have with removed features of
    zero."""
    return _fewer_features(decoder, removed.of(0, "mlp"), align)


def _fewer_features(decoder: Decoder, sparsity: float, align: int) -> Decoder:
    before = decoder.hidden
    kept = sizes.aligned(before, sparsity, align)
    index = best(decoder.embedding.float().pow(2).sum(0), kept)
    # the mean square over fewer features is larger by the square of this
    scale = math.sqrt(before / kept)

    def change(number: int, part: Any) -> Any:
        *readers, writer = part.roles
        sliced = {role: getattr(part, role).columns(index) for role in readers}
        sliced[writer] = getattr(part, writer).rows(index)
        return replace(part, norm=part.norm.index_select(0, index) * scale, **sliced)

    embedding = decoder.embedding.index_select(1, index).contiguous()
    return replace(
        decoder.changed(change),
        embedding=embedding,
        head=(
            embedding
            if decoder.head is decoder.embedding
            else decoder.head.index_select(1, index).contiguous()
        ),
        final_norm=decoder.final_norm.index_select(0, index) * scale,
        epsilon=decoder.epsilon * before / kept,
    )


def low_rank(decoder: Decoder, removed: Removed, *, align: int = ALIGN) -> Decoder:
    """Replace each W by (W Q)(Q^T), Q an orthonormal basis of a sample of W's row space (randomised
    range finder)."""
    # on the device: an 8B model needs two billion numbers
    generator = torch.Generator(device=decoder.device).manual_seed(0)

    def factorise(p: Projection, sparsity: float) -> Projection:
        weight = p.weight.float()
        n, k = weight.shape
        # two factors have the rest of the parameters
        exact = math.floor((1.0 - sparsity) * n * k / (n + k) + 1e-9)
        rank = min(max(math.ceil(exact / align), 1) * align, n, k)
        basis = torch.linalg.qr(
            weight.t() @ torch.randn(n, rank, generator=generator, device=decoder.device)
        ).Q
        return Projection(
            tuple(f.to(p.weight.dtype).contiguous() for f in (basis.t(), weight @ basis)), p.bias
        )

    return _each_pruned(decoder, removed, factorise)


def semi_structured(decoder: Decoder, removed: Removed) -> Decoder:
    """Make projections 2:4 sparse; Unsupported on a device without sparse tensor cores."""
    if not decoder.device.startswith("cuda"):
        raise Unsupported(
            f"semi_structured (2:4) needs sparse tensor cores; device {decoder.device!r} has none"
        )
    algorithms: dict[tuple[int, int], Any] = {}  # one search per shape of weights

    def pack(p: Projection, sparsity: float) -> Projection:
        found = algorithms.setdefault(tuple(p.weight.shape), {})
        return Projection((sparse_weight(two_of_four(p.weight), found),), p.bias)

    return _each_pruned(decoder, removed, pack)


def unstructured(decoder: Decoder, removed: Removed) -> Decoder:
    """Set the smallest weights of projections to zero; dense kernels compute all weights."""

    def zero(p: Projection, sparsity: float) -> Projection:
        flat = p.weight.flatten()
        small = flat.abs().float().topk(rounded(sparsity, len(flat)), largest=False).indices
        return Projection((flat.scatter(0, small, 0.0).view_as(p.weight),), p.bias)

    return _each_pruned(decoder, removed, zero)


def two_of_four(weight: Tensor) -> Tensor:
    if weight.shape[1] % 4:
        raise InputError(
            f"semi_structured: input features: expected a multiple of 4, got {weight.shape[1]}"
        )
    fours = weight.abs().view(len(weight), -1, 4)
    keep = torch.zeros_like(fours, dtype=torch.bool).scatter_(
        -1, fours.topk(2, dim=-1).indices, True
    )
    return weight.where(keep.view_as(weight), 0.0)


def each_projection(
    decoder: Decoder, change: Callable[[int, str, Projection], Projection]
) -> Decoder:
    """Apply a function of layer, role and projection to every projection."""
    return decoder.changed(
        lambda i, part: replace(
            part, **{role: change(i, role, getattr(part, role)) for role in part.roles}
        )
    )


def _each_pruned(
    decoder: Decoder, removed: Removed, change: Callable[[Projection, float], Projection]
) -> Decoder:
    def changed(number: int, role: str, p: Projection) -> Projection:
        sparsity = removed.of_projection(number, role)
        return change(p, sparsity) if sparsity else p

    return each_projection(decoder, changed)


# Families that change the weights
STATIC: Mapping[str, Callable[..., Decoder]] = {
    function.__name__: function
    for function in (depth, width, width_cross, semi_structured, low_rank, unstructured)
}


def _routed(decoder: Decoder, rule: Any) -> Decoder:
    """Set the rule of a decoder, with random routers if the rule needs routers."""

    def router(outputs: int, generator: torch.Generator) -> Tensor:
        weight = torch.randn(outputs, decoder.hidden, generator=generator) / math.sqrt(
            decoder.hidden
        )
        return weight.to(device=decoder.device, dtype=decoder.embedding.dtype)

    def routed(layer: Layer) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(rule.seed)
        for part in (layer.attention, layer.mlp):
            if part is None or isinstance(rule, TokenRouting):
                yield part and replace(part, router=router(2, generator))
                continue
            if isinstance(part, Attention):  # by KV group; the rows of q are already in this order
                blocks = Blocks(part.q.weight, part.o.weight.t().contiguous(), part.kv_heads)
            else:
                blocks = _channel_blocks(part, rule.channel_groups)
            yield replace(part, router=router(blocks.groups, generator), blocks=blocks)

    if isinstance(rule, TokenRouting | GroupRouting):
        decoder = replace(decoder, layers=tuple(Layer(*routed(layer)) for layer in decoder.layers))
    return replace(decoder, rule=rule)


def _channel_blocks(m: Mlp, groups: int) -> Blocks:
    """Return gate, up and down weights in at most ``groups`` groups of channels; zeros fill the
    last group."""
    channels = m.down.weight.shape[1]
    width = -(-channels // groups)
    groups = -(-channels // width)
    gate, up, outer = (
        F.pad(weight, (0, 0, 0, groups * width - channels)).view(groups, width, -1)
        for weight in (m.gate.weight, m.up.weight, m.down.weight.t())
    )
    return Blocks(
        torch.cat((gate, up), 1).flatten(0, 1).contiguous(),
        outer.flatten(0, 1).contiguous(),
        groups,
    )
