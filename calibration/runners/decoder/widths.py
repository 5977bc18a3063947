"""Dynamic width: each token uses some groups of heads and of MLP channels, and only these are computed.

On a GPU with Triton, kernels skip tiles of tokens that are sorted by their groups, and attention runs over the queries
of each group of heads; the choices stay on the device. On other devices, a loop over the groups gathers the tokens of
each group, multiplies them and adds the results, as the kernel "looped" of the simulator's family. A single token needs
no loop: neighbouring groups are one slice of the stacked weights, read in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from calibration.devices import attention, skipping
from calibration.devices.attention import decode_attention
from calibration.devices.operators import gated
from calibration.runners.decoder.model import Attention, Blocks, Mlp, Sublayer, Tensor
from calibration.runners.decoder.routed import routed_attention
from calibration.runners.decoder.run import PassState, Rule, joined, split_heads


def group_counts(keep: float, groups: int, first: int, tokens: int) -> NDArray[np.int64]:
    """Return the number of groups per token: the two whole numbers around ``keep * groups`` in an exact cycle.

    ``first`` is the start of the tokens in the cycle, which differs by layer and position. With a share below one
    group, some tokens use none.
    """
    edges = np.floor(keep * groups * np.arange(first, first + tokens + 1, dtype=np.float64) + 1e-6)
    return np.diff(edges).astype(np.int64)


def _spans(groups: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending numbers as spans of neighbours."""
    begins = [g for i, g in enumerate(groups) if i == 0 or groups[i - 1] != g - 1]
    ends = [g + 1 for i, g in enumerate(groups) if i + 1 == len(groups) or groups[i + 1] != g + 1]
    return list(zip(begins, ends, strict=True))


def _sliced(x: Tensor, weight: Tensor, spans: Sequence[tuple[int, int]], rows: int) -> Tensor:
    """Multiply a vector by spans of a weight's groups, ``rows`` rows each, read in place."""
    parts = [torch.mv(weight[rows * start : rows * stop], x) for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _returned(features: Tensor, index: Tensor, blocks: Blocks) -> Tensor:
    """Multiply features (groups, width) by their rows of the transposed weight, read in place; return (1, hidden)."""
    channels = index[:, None] * blocks.width + torch.arange(blocks.width, device=index.device)
    return F.embedding_bag(channels, blocks.outer, mode="sum", per_sample_weights=features).sum(0, keepdim=True)


@dataclass(frozen=True)
class GroupRouting(Rule):
    """Dynamic width: a router selects the groups of heads and of MLP channels of each token; k and v are dense."""

    family: ClassVar[str] = "dynamic_width"
    skips: ClassVar[bool] = True
    keep: float
    channel_groups: int = 32
    seed: int = 0

    def attention(self, s: PassState, a: Attention, x: Tensor) -> Tensor:
        h = s.norm(x, a.norm)
        keys, values = s.keys_values(a, h)
        index, counts = self._choice(s, "attention", a, x)
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
        index, counts = self._choice(s, "mlp", m, x)
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

    def _choice(self, s: PassState, what: str, sublayer: Sublayer, x: Tensor) -> tuple[Tensor, NDArray[np.int64]]:
        """Return the groups of each token, best first, as many as any token uses, and the number that each uses."""
        groups, (batch, tokens) = len(sublayer.router), x.shape[:2]
        counts = group_counts(self.keep, groups, self._turn(s), batch * tokens)
        index = F.linear(x.flatten(0, 1), sublayer.router).topk(int(counts.max()), dim=-1).indices
        if s.trace is not None:
            s.note(what, self._mask(s, index, counts, groups).view(batch, tokens, groups))
        return index, counts

    def _turn(self, s: PassState) -> int:
        """Return the start of a pass's tokens in the cycle of :func:`group_counts`."""
        return s.layer + max(s.position, s.prompt)

    def _mask(self, s: PassState, index: Tensor, counts: NDArray[np.int64], groups: int) -> Tensor:
        """Return the groups that each token uses, booleans (tokens, groups)."""
        first, (tokens, most), device = self._turn(s), index.shape, index.device
        mask = torch.zeros(tokens, groups, dtype=torch.bool, device=device)
        if (counts == most).all():
            return mask.scatter_(1, index, True)
        # recompute the counts on the device, because a graph cannot capture a copy from the host
        turn = torch.arange(first, first + tokens + 1, dtype=torch.float64, device=device)
        used = torch.arange(most, device=device) < torch.floor(self.keep * groups * turn + 1e-6).diff()[:, None]
        return mask.scatter_(1, index, used)


def _heads_in_tiles(s: PassState, a: Attention, h: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Compute query, attention and output of the KV groups in a mask (tokens, groups)."""
    kernels, blocks, (batch, tokens) = skipping.kernels(), a.blocks, h.shape[:2]
    assert blocks is not None
    tiles = kernels.tiles_of(mask)
    q = kernels.grouped_columns(h.flatten(0, 1), blocks.inner, tiles, a.q.bias)
    q = s.turned(split_heads(q.view(batch, tokens, -1), a.heads), a.q_norm)
    out = attention.running(q, keys, values, mask) if s.decoding else _chosen_attention(q, keys, values, mask)
    return kernels.grouped_features(joined(out).flatten(0, 1), blocks.outer, tiles)


def _chosen_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Causal attention of the queries (batch, heads, tokens, d) in a mask (batch * tokens, kv_heads), gathered by
    group; 0 for other queries."""
    batch, heads, tokens, _ = q.shape
    groups = mask.shape[1]
    chosen = mask.view(batch, tokens, groups).transpose(1, 2).flatten(0, 1)  # (batch * groups, tokens)
    order = chosen.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
    there = torch.arange(tokens, device=q.device) < chosen.sum(1, keepdim=True)
    grouped = q.reshape(batch * groups, heads // groups, tokens, -1)
    wide = order[:, None, :, None].expand_as(grouped)
    k, v = (t.flatten(0, 1).unsqueeze(1) for t in (keys, values))
    out = attention.at_positions(grouped.gather(2, wide), k, v, order.where(there, -1))
    return torch.zeros_like(grouped).scatter_(2, wide, out.masked_fill(~there[:, None, :, None], 0.0)).view_as(q)


def _heads_of_one(s: PassState, a: Attention, h: Tensor, keys: Tensor, values: Tensor, chosen: Tensor) -> Tensor:
    """Compute query, attention and output of the chosen KV groups, for one token."""
    blocks, spans, share = a.blocks, _spans(chosen.tolist()), a.heads // a.kv_heads
    assert blocks is not None
    q = _sliced(h.flatten(), blocks.inner, spans, blocks.width)
    if a.q.bias is not None:
        q = q + a.q.bias.view(a.kv_heads, -1).index_select(0, chosen).flatten()
    q = s.turned(q.view(1, len(chosen) * share, 1, -1), a.q_norm)
    some = q.split([(stop - start) * share for start, stop in spans], 1)
    outs = [decode_attention(q, keys[:, i:j], values[:, i:j]) for q, (i, j) in zip(some, spans, strict=True)]
    return _returned(torch.cat(outs, 1).view(len(chosen), -1), chosen, blocks)


def _heads(s: PassState, a: Attention, h: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Compute query, attention and output of each KV group for the tokens of a mask (batch * tokens, kv_heads)."""
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
        if s.decoding:  # one launch per sequence, since a single launch would need a copy of the caches
            q = s.turned(q, a.q_norm)
            caches = [(keys[b, group][None, None], values[b, group][None, None]) for b in rows.tolist()]
            parts = [decode_attention(q[i][None, :, None], k, v)[0, :, 0][None] for i, (k, v) in enumerate(caches)]
        else:
            positions = rows.remainder(tokens)
            q = s.turned(q, a.q_norm, s.cos[positions].unsqueeze(1), s.sin[positions].unsqueeze(1))
            counts = mask[:, group].view(batch, tokens).sum(1).tolist()
            sequences = zip(q.split(counts), positions.split(counts), keys[:, group], values[:, group], strict=True)
            parts = [
                routed_attention(some.transpose(0, 1)[None], k[None, None], v[None, None], at[None])[0].transpose(0, 1)
                for some, at, k, v in sequences
                if len(some)
            ]
        if parts:
            y.index_add_(0, rows, torch.cat(parts).flatten(1) @ outer)
    return y


def _channels(h: Tensor, blocks: Blocks, mask: Tensor) -> Tensor:
    """Compute each group of channels for the tokens (tokens, hidden) of a mask (tokens, groups)."""
    y = torch.zeros_like(h)
    for group, (inner, outer) in enumerate(blocks.weights()):
        rows = mask[:, group].nonzero().squeeze(1)
        gate, up = (h.index_select(0, rows) @ inner.t()).chunk(2, 1)
        y.index_add_(0, rows, gated(gate, up) @ outer)
    return y
