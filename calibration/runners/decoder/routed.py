"""Rules that skip work: routed tokens, skipped blocks of keys, dropped tokens, shortened caches. (``widths`` has groups
of heads and channels per token.)

The data determines every choice. Nothing is computed and then masked, except within the blocks of queries of
:func:`routed_attention`. In a decode step of dynamic depth, the number of active tokens is drawn (binomial) and the
router ranks them, because random weights have no threshold for a given share.

On a GPU with Triton everything stays on the device: kernels read the choices there, and shapes do not depend on data,
so CUDA graphs can hold prefill and decode. On other devices the host reads the choices and launches the remaining work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from calibration.devices import attention, skipping
from calibration.devices.attention import block_sparse_attention, decode_attention, masked_attention
from calibration.devices.operators import gated
from calibration.runners.decoder.model import Attention, Mlp, Tensor
from calibration.runners.decoder.run import LayerCache, PassState, Rule, joined, split_heads
from simulator.errors import InputError

_ROWS = 128  # queries per block; keys after the last query of a block are not computed


def at_least_one(share: float, of: int) -> int:
    """Return a share of ``of``, rounded as in the simulator's families, without NumPy: decode steps are short."""
    return max(math.floor(share * of + 0.5), 1)


def best(scores: Tensor, many: int) -> Tensor:
    """Return the indices of the largest scores along the last axis, ascending."""
    return scores.topk(many, dim=-1).indices.sort(dim=-1).values


def routed_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Causal attention of queries (batch, heads, chosen, d) at ascending ``positions`` (batch, chosen) over all keys.

    Each block of 128 queries sees the keys up to its last query; a mask hides the keys after each query.
    """
    out = torch.empty_like(q)
    for start in range(0, q.shape[2], _ROWS):
        block = slice(start, start + _ROWS)
        some = positions[:, block]
        seen = int(some[:, -1].max()) + 1
        mask = torch.arange(seen, device=q.device)[None, None, :] <= some[:, :, None]
        out[:, :, block] = masked_attention(q[:, :, block], k[:, :, :seen], v[:, :, :seen], mask[:, None])
    return out


def shared_scores(q: Tensor, k: Tensor) -> Tensor:
    """Return scores of queries (batch, heads, queries, d) as (batch, kv_heads, heads of each, queries, keys)."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = grouped.flatten(2, 3) @ k.transpose(-1, -2)
    return scores.float().div_(math.sqrt(q.shape[-1])).unflatten(2, grouped.shape[2:4])


@dataclass(frozen=True)
class TokenRouting(Rule):
    """Dynamic depth: a router of two outputs selects the tokens that compute each sublayer, except k and v."""

    family: ClassVar[str] = "dynamic_depth"
    skips: ClassVar[bool] = True
    keep: float
    seed: int = 0

    def attention(self, s: PassState, a: Attention, x: Tensor) -> Tensor:
        h = s.norm(x, a.norm)
        k, v = s.keys_values(a, h)
        if self._in_place(s):
            index, count, runs = self._drawn(s, "attention", a.router, x)
            q = s.turned(split_heads(a.q.of_rows(h[:, 0], index, count)[:, None], a.heads), a.q_norm)
            out = attention.running(q, k, v, runs[:, None].expand(-1, a.kv_heads))
            return a.o.of_rows(joined(out)[:, 0], index, count, x[:, 0])[:, None]
        rows, positions = self._chosen(s, "attention", a.router, x)
        if not len(rows):
            return x
        if not s.decoding:
            some = h.flatten(0, 1).index_select(0, rows).view(len(x), -1, x.shape[2])
            q = s.queries(a, some, s.cos[positions].unsqueeze(1), s.sin[positions].unsqueeze(1))
            out = (attention.at_positions if skipping.in_triton(s.decoder.device) else routed_attention)(
                q, k, v, positions
            )
        elif len(rows) == len(x):
            out = decode_attention(s.queries(a, h), k, v)
        else:  # each sequence reads its cache in place, without a copy
            q = s.queries(a, h.index_select(0, rows))
            one = [decode_attention(q[i : i + 1], k[b : b + 1], v[b : b + 1]) for i, b in enumerate(rows.tolist())]
            out = torch.cat(one)
        return _scattered(x, rows, a.o(joined(out)).flatten(0, 1))

    def mlp(self, s: PassState, m: Mlp, x: Tensor) -> Tensor:
        if self._in_place(s):
            index, count, _ = self._drawn(s, "mlp", m.router, x)
            h = s.norm(x[:, 0], m.norm)
            inner = gated(m.gate.of_rows(h, index, count), m.up.of_rows(h, index, count))

            return m.down.of_rows(inner, index, count, x[:, 0])[:, None]
        rows, _ = self._chosen(s, "mlp", m.router, x)
        if not len(rows):
            return x
        h = s.norm(x.flatten(0, 1).index_select(0, rows), m.norm)
        return _scattered(x, rows, m.down(gated(m.gate(h), m.up(h))))

    def _in_place(self, s: PassState) -> bool:
        """Whether kernels skip rows in place, so their number is not a shape."""
        return s.decoding and skipping.in_triton(s.decoder.device)

    def _drawn(self, s: PassState, what: str, router: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sequences of a decode step, active ones first; the number of active ones, drawn; their mask."""
        index = _votes(x[:, 0], router).argsort(descending=True)
        count = (torch.rand(len(x), device=x.device) < self.keep).sum(dtype=torch.int32)
        first = torch.arange(len(x), device=x.device) < count
        runs = torch.zeros_like(first).scatter_(0, index, first)
        s.note(what, runs)
        return index, count, runs

    def _chosen(self, s: PassState, what: str, router: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return active rows of the flattened batch (prompt: a fixed share) and their positions (batch, chosen)."""
        scores = _votes(x, router)
        if s.decoding:
            if "generator" not in s.kept:
                s.kept["generator"] = np.random.default_rng(self.seed)
            positions = rows = best(scores[:, 0], int(s.kept["generator"].binomial(len(x), self.keep)))
        else:
            positions = best(scores, at_least_one(self.keep, x.shape[1]))
            rows = (positions + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]).flatten()
        s.note(what, positions)
        return rows, positions


def _votes(x: Tensor, router: Tensor) -> Tensor:
    """Return the score of each token from a router of two outputs."""
    votes = F.linear(x, router).float()
    return votes[..., 1] - votes[..., 0]


def _scattered(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    """Add the outputs of some tokens to x, in place."""
    x.view(-1, x.shape[-1]).index_add_(0, rows, y)
    return x


@dataclass(frozen=True)
class BlockAttention(Rule):
    """Sparse attention over the key blocks whose mean key fits a block of queries, or a decoded query, best."""

    family: ClassVar[str] = "sparse_attention"
    skips: ClassVar[bool] = True
    keep: float
    block: int = 64

    def attend(self, s: PassState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if s.decoding:
            return decode_attention(q, *self._chosen(s, q, k, v))
        table, q_len = self._table(q, k), q.shape[2]
        s.kept["means", s.layer] = block_means(k, self.block)
        s.note("attention", table)
        by_blocks = attention.fused_block_sparse if skipping.in_triton(s.decoder.device) else block_sparse_attention
        return by_blocks(table, q_len, k.shape[2], self.block)(q, k, v)

    def _table(self, q: Tensor, k: Tensor) -> Tensor:
        """Return which blocks of keys each block of queries sees, for all heads and sequences.

        The diagonal block is included; :func:`calibration.devices.attention.block_layout` keeps as many blocks.
        """
        mean_q, mean_k = (block_means(x, self.block).float().mean((0, 1)) for x in (q, k))
        scores, rows = mean_q @ mean_k.t(), -(-q.shape[2] // self.block)
        whole = len(scores)
        number = torch.arange(rows, device=q.device)
        if rows > whole:  # an incomplete last block uses the scores of the block before it
            scores = F.pad(scores[number.clamp(max=whole - 1)], (0, 1)) if whole else scores.new_zeros(1, 1)
        earlier = number < number[:, None]
        many = torch.ceil(self.keep * (number + 1.0).double() - 1e-9).clamp(min=1) - 1
        rank = scores.masked_fill(~earlier, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
        return (earlier & (rank < many[:, None])) | (number == number[:, None])

    def _chosen(self, s: PassState, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a share of the prompt's blocks, per KV head, and of all newer positions."""
        means = s.kept["means", s.layer]
        batch, kv_heads, blocks, head_dim = means.shape
        if not blocks:
            return keys, values
        pooled = q.view(batch, kv_heads, -1, head_dim).mean(2)
        index = best((means @ pooled.unsqueeze(-1)).squeeze(-1), at_least_one(self.keep, blocks))
        s.note("attention", index)
        wide, edge = index[..., None, None].expand(*index.shape, self.block, head_dim), blocks * self.block

        def picked(t: Tensor) -> Tensor:
            some = t[:, :, :edge].unflatten(2, (blocks, -1)).gather(2, wide).flatten(2, 3)
            return torch.cat((some, t[:, :, edge:]), 2)

        return picked(keys), picked(values)


def block_means(x: Tensor, block: int) -> Tensor:
    """Return the mean of each whole block of positions, (batch, heads, blocks, d)."""
    whole = x.shape[2] // block
    return x[:, :, : whole * block].unflatten(2, (whole, block)).mean(3)


@dataclass(frozen=True)
class TokenDropping(Rule):
    """Token pruning: from layer ``start`` on, keep the prompt tokens with most attention of the last token.

    At layer 0 the kept tokens are evenly spread.
    """

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
            raise InputError(f"token: start: expected a layer from 0 to {len(s.decoder.layers) - 1}, got {self.start}")
        if s.decoding or s.layer != self.start:
            return x
        batch, seq, hidden = x.shape
        many = at_least_one(self.keep, seq)
        if "scores" in s.kept:
            scores = s.kept["scores"]
            scores[:, -1] = torch.inf
            positions = best(scores, many)
        else:
            positions = torch.linspace(seq - 1, 0, many, device=x.device).round().long().flip(0).expand(batch, many)
        s.note("token", positions)
        s.cos, s.sin = s.cos[positions].unsqueeze(1), s.sin[positions].unsqueeze(1)
        return x.gather(1, positions[..., None].expand(batch, many, hidden))


@dataclass(frozen=True)
class CacheCut(Rule):
    """KV cache: keep the positions with most attention of the prompt's last ``observed`` queries, per KV head."""

    family: ClassVar[str] = "kv_cache"
    keep: float
    observed: int = 32

    def attend(self, s: PassState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().attend(s, q, k, v)
        if not s.decoding:
            self.cut(s, s.caches[s.layer], q, k, v)
        return out

    def cut(self, s: PassState, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> None:
        seq = k.shape[2]
        some, many = min(self.observed, seq), at_least_one(self.keep, seq)
        seen = torch.ones(some, seq, dtype=torch.bool, device=q.device).tril(seq - some)
        scores = shared_scores(q[:, :, -some:], k).masked_fill_(~seen, -torch.inf)
        positions = best(scores.softmax(-1).sum((2, 3)), many)
        s.note("cache", positions)
        wide = positions[..., None].expand(*positions.shape, k.shape[3])
        cache.k[:, :, :many] = k.gather(2, wide)
        cache.v[:, :, :many] = v.gather(2, wide)
        cache.length = many
