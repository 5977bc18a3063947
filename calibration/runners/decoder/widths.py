"""Dynamic width: groups of heads and of MLP channels chosen for each token, and nothing but them computed.

On a GPU with Triton kernels skip tiles of tokens sorted by the groups they use, and attention goes over the queries of
each group of heads; which those are stays on the device. Plain torch has no kernel that skips tiles, so elsewhere this
is what frameworks without one do. The (token, group) pairs of a sublayer are sorted by group once; their rows are
gathered, multiplied group by group (one grouped GEMM where torch has it, else a loop into one output), and the partial
outputs of each token summed by one operator. A single token needs no pairs: neighbouring groups are one slice of the
stacked weights, read in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from calibration.devices import flex, skipping
from calibration.devices.attention import decode_attention
from calibration.devices.operators import gated
from calibration.runners.decoder.model import Attention, Blocks, Mlp, Sublayer, Tensor
from calibration.runners.decoder.routed import routed_attention
from calibration.runners.decoder.run import Rule, State, added, joined, split_heads


def group_counts(keep: float, groups: int, first: int, tokens: int) -> NDArray[np.int64]:
    """Groups each token uses: the two whole numbers around ``keep * groups`` in turn, so that the mean is exact.

    ``first`` is where in the turn the tokens begin; layers and positions begin at others. A share below one group
    leaves some tokens none.

    >>> group_counts(0.5, 3, 0, 4).tolist(), group_counts(0.5, 3, 1, 2).tolist(), group_counts(0.25, 32, 5, 2).tolist()
    ([1, 2, 1, 2], [2, 1], [8, 8])
    """
    edges = np.floor(keep * groups * np.arange(first, first + tokens + 1, dtype=np.float64) + 1e-6)
    return np.diff(edges).astype(np.int64)


@dataclass(frozen=True)
class Pairs:
    """The (token, group) pairs of a sublayer, sorted by group and then by token."""

    cells: Tensor  # (pairs,): group * tokens + token of each
    running: Tensor  # (groups * tokens,): pairs up to each cell, itself included
    place: Tensor  # (pairs,): where the pairs of the first token lie in that order, then those of the second, and so on
    starts: Tensor  # (tokens,): where those of each token begin in ``place``
    tokens: int

    @property
    def rows(self) -> Tensor:
        """Token of each pair."""
        return self.cells.remainder(self.tokens)

    @property
    def groups(self) -> Tensor:
        """Group of each pair."""
        return self.cells.div(self.tokens, rounding_mode="floor")

    @property
    def ends(self) -> Tensor:
        """Pairs up to the end of each group, int32 (groups,)."""
        return self.running[self.tokens - 1 :: self.tokens].int()

    def spans(self, sequences: int = 1) -> list[tuple[int, int, int]]:
        """Number, begin and end of each group's pairs, by sequence, where there are some; waits for the device."""
        step = self.tokens // sequences
        bounds = [0, *self.running[step - 1 :: step].tolist()]
        return [(number, start, stop) for number, (start, stop) in enumerate(pairwise(bounds)) if stop > start]

    def summed(self, parts: Tensor) -> Tensor:
        """Sum of each token's partial outputs: (pairs, hidden) -> (tokens, hidden)."""
        return F.embedding_bag(self.place, parts, self.starts, mode="sum")


def pairs_of(index: Tensor, counts: NDArray[np.int64], groups: int) -> Pairs:
    """Pairs of tokens with the first ``counts`` of their groups ``index``.

    >>> p = pairs_of(torch.tensor([[2, 0], [0, 1]]), np.array([2, 1]), 3)
    >>> p.rows.tolist(), p.ends.tolist(), p.place.tolist(), p.starts.tolist()
    ([0, 1, 0], [2, 2, 3], [2, 0, 1], [0, 2])
    """
    tokens, most = index.shape
    cells = (index * tokens + torch.arange(tokens, device=index.device)[:, None]).flatten()
    if (counts == most).all():
        starts = torch.arange(0, tokens * most, most, device=index.device)
    else:  # the numbers are known here, so the device need not be asked
        used = np.flatnonzero(np.arange(most) < counts[:, None])
        cells = cells.index_select(0, torch.from_numpy(used).to(index.device))
        starts = torch.from_numpy(np.cumsum(counts) - counts).to(index.device)
    running = torch.zeros(groups * tokens, dtype=torch.long, device=index.device).index_fill_(0, cells, 1).cumsum(0)
    place = running.index_select(0, cells).sub_(1)
    return Pairs(torch.empty_like(cells).scatter_(0, place, cells), running, place, starts, tokens)


@lru_cache(maxsize=16)
def _has_grouped(dtype: Any, place: str) -> bool:
    """Whether this torch multiplies by groups in this format on this device."""
    function = getattr(F, "grouped_mm", None)
    if function is None:
        return False
    x, weight = torch.zeros(16, 16, dtype=dtype, device=place), torch.zeros(1, 16, 16, dtype=dtype, device=place)
    try:
        function(x, weight, offs=torch.full((1,), 16, dtype=torch.int32, device=place))
    except (RuntimeError, NotImplementedError):
        return False
    return True


def products(x: Tensor, weights: Tensor, pairs: Pairs) -> Tensor:
    """Rows (pairs, k), sorted by group, each by its group's weight of (groups, k, n): (pairs, n)."""
    whole = all(size * x.element_size() % 16 == 0 for size in weights.shape[1:])  # rows of whole 16 bytes
    if whole and _has_grouped(x.dtype, str(x.device)):
        return F.grouped_mm(x, weights, offs=pairs.ends)
    out = x.new_empty(len(x), weights.shape[2])
    for group, start, stop in pairs.spans():
        torch.mm(x[start:stop], weights[group], out=out[start:stop])
    return out


def _spans(groups: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as spans of neighbours.

    >>> _spans([0, 1, 4])
    [(0, 2), (4, 5)]
    """
    begins = [g for i, g in enumerate(groups) if i == 0 or groups[i - 1] != g - 1]
    ends = [g + 1 for i, g in enumerate(groups) if i + 1 == len(groups) or groups[i + 1] != g + 1]
    return list(zip(begins, ends, strict=True))


def _sliced(x: Tensor, weight: Tensor, spans: Sequence[tuple[int, int]], rows: int) -> Tensor:
    """A vector by the spans of a weight's groups, ``rows`` rows each, which are read in place."""
    parts = [torch.mv(weight[rows * start : rows * stop], x) for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _returned(features: Tensor, index: Tensor, blocks: Blocks) -> Tensor:
    """Features (groups, width) by their rows of the transposed weight, summed: (1, hidden); rows are read in place."""
    channels = index[:, None] * blocks.width + torch.arange(blocks.width, device=index.device)
    return F.embedding_bag(channels, blocks.outer, mode="sum", per_sample_weights=features).sum(0, keepdim=True)


@dataclass(frozen=True)
class GroupRouting(Rule):
    """Dynamic width: a router says which groups of heads and of MLP channels each token uses; k and v are dense."""

    family: ClassVar[str] = "dynamic_width"
    skips: ClassVar[bool] = True
    keep: float
    channel_groups: int = 32
    seed: int = 0

    def attention(self, s: State, a: Attention, x: Tensor) -> Tensor:
        h = s.norm(x, a.norm)
        keys, values = s.keys_values(a, h)
        index, counts = self._choice(s, "attention", a, x)
        if not counts.any():
            y = torch.zeros_like(x)
        elif skipping.in_triton(s.decoder.place):
            y = _heads_in_tiles(s, a, h, keys, values, self._mask(s, index, counts, a.kv_heads))
        elif len(index) == 1:
            y = _heads_of_one(s, a, h, keys, values, index[0, : counts[0]].sort().values)
        else:
            y = _heads(s, a, h, keys, values, pairs_of(index, counts, a.kv_heads))
        return added(x, y.view_as(x), a.turn)

    def mlp(self, s: State, m: Mlp, x: Tensor) -> Tensor:
        h, blocks = s.norm(x, m.norm), m.blocks
        assert blocks is not None
        index, counts = self._choice(s, "mlp", m, x)
        if not counts.any():
            y = torch.zeros_like(x)
        elif skipping.in_triton(s.decoder.place):
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
            y = _channels(h.flatten(0, 1), blocks, pairs_of(index, counts, blocks.groups))
        return added(x, y.view_as(x), m.turn)

    def _choice(self, s: State, what: str, sublayer: Sublayer, x: Tensor) -> tuple[Tensor, NDArray[np.int64]]:
        """Groups that each token wants most, best first, as many as any token uses; and how many each uses."""
        groups, (batch, tokens) = len(sublayer.router), x.shape[:2]
        counts = group_counts(self.keep, groups, self._turn(s), batch * tokens)
        index = F.linear(x.flatten(0, 1), sublayer.router).topk(int(counts.max()), dim=-1).indices
        if s.trace is not None:
            s.note(what, self._mask(s, index, counts, groups).view(batch, tokens, groups))
        return index, counts

    def _turn(self, s: State) -> int:
        """Where in the turn of :func:`group_counts` the tokens of a pass begin."""
        return s.layer + max(s.position, s.prompt)

    def _mask(self, s: State, index: Tensor, counts: NDArray[np.int64], groups: int) -> Tensor:
        """Groups that each token uses, (tokens, groups) of booleans."""
        first, (tokens, most), place = self._turn(s), index.shape, index.device
        mask = torch.zeros(tokens, groups, dtype=torch.bool, device=place)
        if (counts == most).all():
            return mask.scatter_(1, index, True)
        # the counts again, made on the device: a copy from the host could not be captured
        turn = torch.arange(first, first + tokens + 1, dtype=torch.float64, device=place)
        used = torch.arange(most, device=place) < torch.floor(self.keep * groups * turn + 1e-6).diff()[:, None]
        return mask.scatter_(1, index, used)


def _heads_in_tiles(s: State, a: Attention, h: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Query, attention and output of the KV groups that a mask (tokens, groups) says of each token."""
    kernels, blocks, (batch, tokens) = skipping.kernels(), a.blocks, h.shape[:2]
    assert blocks is not None
    tiles = kernels.tiles_of(mask)
    q = kernels.grouped_columns(h.flatten(0, 1), blocks.inner, tiles, a.q.bias)
    q = s.turned(split_heads(q.view(batch, tokens, -1), a.heads), a.q_norm)
    out = flex.running(q, keys, values, mask) if s.decoding else _chosen_attention(q, keys, values, mask)
    return kernels.grouped_features(joined(out).flatten(0, 1), blocks.outer, tiles)


def _chosen_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Causal attention of the queries (batch, heads, tokens, d) whose KV group a mask (batch * tokens, kv_heads) names,
    brought together by group; 0 of others."""
    batch, heads, tokens, _ = q.shape
    groups = mask.shape[1]
    chosen = mask.view(batch, tokens, groups).transpose(1, 2).flatten(0, 1)  # (batch * groups, tokens)
    order = chosen.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
    there = torch.arange(tokens, device=q.device) < chosen.sum(1, keepdim=True)
    grouped = q.reshape(batch * groups, heads // groups, tokens, -1)
    wide = order[:, None, :, None].expand_as(grouped)
    k, v = (t.flatten(0, 1).unsqueeze(1) for t in (keys, values))
    out = flex.placed(grouped.gather(2, wide), k, v, order.where(there, -1))
    return torch.zeros_like(grouped).scatter_(2, wide, out.masked_fill(~there[:, None, :, None], 0.0)).view_as(q)


def _heads_of_one(s: State, a: Attention, h: Tensor, keys: Tensor, values: Tensor, chosen: Tensor) -> Tensor:
    """Query, attention and output of the KV groups chosen, for one token."""
    blocks, spans, share = a.blocks, _spans(chosen.tolist()), a.heads // a.kv_heads
    assert blocks is not None
    q = _sliced(h.flatten(), blocks.inner, spans, blocks.width)
    if a.q.bias is not None:
        q = q + a.q.bias.view(a.kv_heads, -1).index_select(0, chosen).flatten()
    q = s.turned(q.view(1, len(chosen) * share, 1, -1), a.q_norm)
    some = q.split([(stop - start) * share for start, stop in spans], 1)
    outs = [decode_attention(q, keys[:, i:j], values[:, i:j]) for q, (i, j) in zip(some, spans, strict=True)]
    return _returned(torch.cat(outs, 1).view(len(chosen), -1), chosen, blocks)


def _heads(s: State, a: Attention, h: Tensor, keys: Tensor, values: Tensor, pairs: Pairs) -> Tensor:
    """The same of each KV group for the tokens that chose it; a group's weights are read once for all of them."""
    blocks, rows, (batch, tokens) = a.blocks, pairs.rows, h.shape[:2]
    assert blocks is not None
    inner = blocks.inner.view(a.kv_heads, blocks.width, -1).transpose(1, 2)
    q = products(h.flatten(0, 1).index_select(0, rows), inner, pairs)
    if a.q.bias is not None:
        q = q + a.q.bias.view(a.kv_heads, -1).index_select(0, pairs.groups)
    q = q.unflatten(-1, (a.heads // a.kv_heads, -1))  # (pairs, heads of a group, d)
    if s.decoding:
        out = _pair_attention(s.turned(q, a.q_norm), keys, values, pairs)
    else:
        places = rows.remainder(tokens)
        q = s.turned(q, a.q_norm, s.cos[places].unsqueeze(1), s.sin[places].unsqueeze(1))
        out = torch.empty_like(q)
        for number, start, stop in pairs.spans(batch):
            group, b = divmod(number, batch)
            some, k, v = q[start:stop].transpose(0, 1)[None], keys[b, group][None, None], values[b, group][None, None]
            out[start:stop] = routed_attention(some, k, v, places[None, start:stop])[0].transpose(0, 1)
    return pairs.summed(products(out.flatten(1), blocks.outer.view(a.kv_heads, blocks.width, -1), pairs))


def _pair_attention(q: Tensor, keys: Tensor, values: Tensor, pairs: Pairs) -> Tensor:
    """Attention of each pair's query heads, (pairs, heads of a group, d), over its sequence's cache of its group: a
    launch a pair, since a cache would have to be copied for one."""
    out = torch.empty_like(q)
    for i, (g, b) in enumerate(zip(pairs.groups.tolist(), pairs.rows.tolist(), strict=True)):
        k, v = keys[b, g][None, None], values[b, g][None, None]
        out[i] = F.scaled_dot_product_attention(q[i][None, None], k, v)[0, 0]
    return out


def _channels(h: Tensor, blocks: Blocks, pairs: Pairs) -> Tensor:
    """Each group of channels for the tokens (tokens, hidden) that chose it."""
    inner = blocks.inner.view(blocks.groups, 2 * blocks.width, -1).transpose(1, 2)
    features = gated(*products(h.index_select(0, pairs.rows), inner, pairs).chunk(2, 1))
    return pairs.summed(products(features, blocks.outer.view(blocks.groups, blocks.width, -1), pairs))
