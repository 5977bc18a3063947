"""Dynamic width: groups of heads and of MLP channels chosen for each token, and nothing but them computed.

Plain torch has no kernel that skips tiles, so this is what frameworks without one do. The (token, group) pairs of a sublayer are sorted by
group once; their rows are gathered, multiplied group by group (one grouped GEMM where torch has it, else a loop into one output), and the
partial outputs of each token summed by one operator. A single token on a CPU needs no pairs: neighbouring groups are one slice of the
stacked weights, read in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from calibration.devices.attention import decode_attention
from calibration.devices.operators import gated, rotary
from calibration.execute.decoder.model import Attention, Blocks, Decoder, Mlp, State, Tensor
from calibration.execute.decoder.routed import normed, note, routed_attention


def group_counts(keep: float, groups: int, first: int, tokens: int) -> NDArray[np.int64]:
    """How many groups each token uses: the two whole numbers around ``keep * groups`` in turn, so that the mean is exact.

    ``first`` is where in the turn the tokens begin; layers and positions begin at others. A share below one group leaves some tokens none.

    >>> group_counts(0.5, 3, 0, 4).tolist(), group_counts(0.5, 3, 1, 2).tolist(), group_counts(0.25, 32, 5, 2).tolist()
    ([1, 2, 1, 2], [2, 1], [8, 8])
    """
    edges = np.floor(keep * groups * np.arange(first, first + tokens + 1, dtype=np.float64) + 1e-6)
    return np.diff(edges).astype(np.int64)


@dataclass(frozen=True)
class Pairs:
    """The (token, group) pairs of a sublayer, sorted by group and then by token.

    Attributes
    ----------
    cells : integer tensor (pairs,)
        ``group * tokens + token`` of each.
    running : integer tensor (groups * tokens,)
        Pairs up to each cell, itself included.
    place : integer tensor (pairs,)
        Where the pairs of the first token lie in that order, then those of the second, and so on.
    starts : integer tensor (tokens,)
        Where those of each token begin in ``place``.
    tokens, groups : int
    """

    cells: Tensor
    running: Tensor
    place: Tensor
    starts: Tensor
    tokens: int
    groups: int

    @property
    def rows(self) -> Tensor:
        """Token of each pair."""
        return self.cells.remainder(self.tokens)

    @property
    def ends(self) -> Tensor:
        """Pairs up to the end of each group, int32 (groups,)."""
        return self.running[self.tokens - 1 :: self.tokens].int()

    def bounds(self, sequences: int = 1) -> list[int]:
        """Where each group's pairs, sequence by sequence, begin, and the end of the last; waits for the device."""
        step = self.tokens // sequences
        return [0, *self.running[step - 1 :: step].tolist()]

    def summed(self, parts: Tensor) -> Tensor:
        """Sum of each token's partial outputs: (pairs, hidden) -> (tokens, hidden)."""
        return F.embedding_bag(self.place, parts, self.starts, mode="sum")


def chosen_groups(x: Tensor, router: Tensor, counts: NDArray[np.int64]) -> Tensor:
    """Groups that each token wants most, best first: (tokens, as many as the greediest token uses)."""
    return F.linear(x.flatten(0, 1), router).topk(int(counts.max()), dim=-1).indices


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
    return Pairs(torch.empty_like(cells).scatter_(0, place, cells), running, place, starts, tokens, groups)


def _note(
    state: State, number: int, what: str, x: Tensor, index: Tensor, counts: NDArray[np.int64], groups: int
) -> None:
    """Record the choice as booleans (batch, tokens, groups)."""
    if state.trace is not None:
        used = torch.from_numpy(np.arange(index.shape[1]) < counts[:, None]).to(index.device)
        table = torch.zeros(len(index), groups, dtype=torch.bool, device=index.device).scatter_(1, index, used)
        note(state, number, what, table.view(*x.shape[:2], groups))


def _choice(
    decoder: Decoder, number: int, what: str, router: Tensor | None, x: Tensor, state: State
) -> tuple[Tensor, NDArray[np.int64]]:
    """Each token's groups and how many of them it uses."""
    assert router is not None
    counts = group_counts(decoder.dynamic.keep, len(router), number + state.position, x.shape[0] * x.shape[1])
    index = chosen_groups(x, router, counts)
    _note(state, number, what, x, index, counts, len(router))
    return index, counts


# -- products ---------------------------------------------------------------------------------------------------------------------


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
    whole = all(
        size * x.element_size() % 16 == 0 for size in weights.shape[1:]
    )  # grouped GEMMs take rows of whole 16 bytes
    if whole and _has_grouped(x.dtype, str(x.device)):
        return F.grouped_mm(x, weights, offs=pairs.ends)
    out = x.new_empty(len(x), weights.shape[2])
    for group, (start, stop) in enumerate(pairwise(pairs.bounds())):
        if stop > start:
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
    """Features (groups, width) of some groups by their rows of the transposed weight, summed: (1, hidden); rows are read in place."""
    channels = index[:, None] * blocks.width + torch.arange(blocks.width, device=index.device)
    return F.embedding_bag(channels, blocks.outer, mode="sum", per_sample_weights=features).sum(0, keepdim=True)


def _alone(x: Tensor, blocks: Blocks) -> bool:
    """Whether it is a single token on a CPU, whose groups are slices; a GPU would have to be asked which."""
    return x.shape[0] * x.shape[1] == 1 and x.device.type == "cpu" and blocks.width > 0


def _added(x: Tensor, y: Tensor, turn: Tensor | None) -> Tensor:
    return (x if turn is None else F.linear(x, turn)) + y.view_as(x)


# -- sublayers --------------------------------------------------------------------------------------------------------------------


def width_prefill(
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
    """Query, attention and output of each KV group for the tokens that chose it; keys and values dense."""
    index, counts = _choice(decoder, number, "attention", a.router, x, state)
    if not counts.any():
        return _added(x, torch.zeros_like(x), a.turn)
    pairs, (batch, seq) = pairs_of(index, counts, a.kv_heads), x.shape[:2]
    rows = pairs.rows
    places = rows.remainder(seq)
    q = _queries(
        decoder, a, h.flatten(0, 1).index_select(0, rows), pairs, cos[places].unsqueeze(1), sin[places].unsqueeze(1)
    )
    out = torch.empty_like(q)
    for number_of, (start, stop) in enumerate(pairwise(pairs.bounds(batch))):
        if stop > start:
            group, b = divmod(number_of, batch)
            some, here = q[start:stop].transpose(0, 1)[None], places[None, start:stop]
            out[start:stop] = routed_attention(some, k[b, group][None, None], v[b, group][None, None], here)[
                0
            ].transpose(0, 1)
    assert a.blocks is not None
    parts = products(out.flatten(1), a.blocks.outer.view(a.kv_heads, a.blocks.width, -1), pairs)
    return _added(x, pairs.summed(parts), a.turn)


def _queries(decoder: Decoder, a: Attention, h: Tensor, pairs: Pairs, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated query heads of pairs: (pairs, heads of a group, d)."""
    blocks = a.blocks
    assert blocks is not None
    q = products(h, blocks.inner.view(a.kv_heads, blocks.width, -1).transpose(1, 2), pairs)
    if a.q.bias is not None:
        q = q + a.q.bias.view(a.kv_heads, -1).index_select(0, pairs.cells.div(pairs.tokens, rounding_mode="floor"))
    return rotary(normed(decoder, q.unflatten(-1, (a.heads // a.kv_heads, -1)), a.qk_norms, 0), cos, sin)


def width_decode(
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
    """The same for one token a sequence: a group's weights are read once for all sequences that chose it."""
    index, counts = _choice(decoder, number, "attention", a.router, x, state)
    blocks = a.blocks
    assert blocks is not None
    if not counts.any():
        return _added(x, torch.zeros_like(x), a.turn)
    if not _alone(x, blocks):
        pairs = pairs_of(index, counts, a.kv_heads)
        q = _queries(decoder, a, h.flatten(0, 1).index_select(0, pairs.rows), pairs, cos, sin)
        out = pair_attention(q, keys, values, pairs, copied=x.is_cuda)
        return _added(
            x, pairs.summed(products(out.flatten(1), blocks.outer.view(a.kv_heads, blocks.width, -1), pairs)), a.turn
        )
    chosen = index[0, : counts[0]].sort().values
    spans = _spans(chosen.tolist())
    q = _sliced(h.flatten(), blocks.inner, spans, blocks.width)
    if a.q.bias is not None:
        q = q + a.q.bias.view(a.kv_heads, -1).index_select(0, chosen).flatten()
    q = q.view(1, len(chosen) * (a.heads // a.kv_heads), 1, -1)
    q = rotary(normed(decoder, q, a.qk_norms, 0), cos, sin).split(
        [(stop - start) * a.heads // a.kv_heads for start, stop in spans], 1
    )
    outs = [decode_attention(some, keys[:, i:j], values[:, i:j]) for some, (i, j) in zip(q, spans, strict=True)]
    return _added(x, _returned(torch.cat(outs, 1).view(len(chosen), -1), chosen, blocks), a.turn)


def pair_attention(q: Tensor, keys: Tensor, values: Tensor, pairs: Pairs, copied: bool) -> Tensor:
    """Attention of each pair's query heads, (pairs, heads of a group, d), over its sequence's cache of its group.

    ``copied``: one kernel over a copy of the caches used, which pays where launches cost more than copies; else one launch a pair.
    """
    group, b = pairs.cells.div(pairs.tokens, rounding_mode="floor"), pairs.rows
    if copied:
        some = (t.flatten(0, 1).index_select(0, b * keys.shape[1] + group).unsqueeze(1) for t in (keys, values))
        return F.scaled_dot_product_attention(q.unsqueeze(1), *some).squeeze(1)
    out = torch.empty_like(q)
    for i, (g, s) in enumerate(zip(group.tolist(), b.tolist(), strict=True)):
        out[i] = F.scaled_dot_product_attention(q[i][None, None], keys[s, g][None, None], values[s, g][None, None])[
            0, 0
        ]
    return out


def width_mlp(decoder: Decoder, number: int, m: Mlp, x: Tensor, h: Tensor, state: State) -> Tensor:
    """Each group of channels for the tokens that chose it."""
    index, counts = _choice(decoder, number, "mlp", m.router, x, state)
    blocks = m.blocks
    assert blocks is not None
    if not counts.any():
        return _added(x, torch.zeros_like(x), m.turn)
    if _alone(x, blocks):
        chosen = index[0, : counts[0]].sort().values
        both = _sliced(h.flatten(), blocks.inner, _spans(chosen.tolist()), 2 * blocks.width).view(len(chosen), 2, -1)
        return _added(x, _returned(gated(both[:, 0], both[:, 1]), chosen, blocks), m.turn)
    pairs = pairs_of(index, counts, blocks.groups)
    some = h.flatten(0, 1).index_select(0, pairs.rows)
    if blocks.width:
        both = products(some, blocks.inner.view(blocks.groups, 2 * blocks.width, -1).transpose(1, 2), pairs)
        parts = products(gated(*both.chunk(2, 1)), blocks.outer.view(blocks.groups, blocks.width, -1), pairs)
    else:
        parts = torch.empty_like(some)
        for group, (start, stop) in enumerate(pairwise(pairs.bounds())):
            if stop > start:
                inner, outer = blocks.of(group)
                torch.mm(gated(*F.linear(some[start:stop], inner).chunk(2, 1)), outer, out=parts[start:stop])
    return _added(x, pairs.summed(parts), m.turn)
