"""Attention in torch: causal prefill, decode over a cache, and causal attention with blocks really skipped.

Shapes are (batch, heads, positions, head_dim) for queries and (batch, kv_heads, positions, head_dim) for the cache.
Masks and indices depend on the shape alone and are made once, so that the functions that are timed launch kernels and
nothing else (copying an index from the host would also break a CUDA graph capture).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Tensor = Any


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention of the last q_len of kv_len positions, by ``mask`` of :func:`causal_mask` where those differ."""
    shared = q.shape[1] != k.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared)


def causal_mask(q_len: int, kv_len: int, place: str) -> Tensor | None:
    """The mask of :func:`prefill_attention`: none for a whole prompt, else the lower-right causal one.

    On CUDA it is the symbolic bias, which the flash kernels take; a mask of booleans would send them to a slower one.
    """
    if q_len == kv_len:
        return None
    if place.startswith("cuda"):
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(q_len, kv_len)
    return torch.ones(q_len, kv_len, dtype=torch.bool, device=place).tril(kv_len - q_len)


def decode_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query a sequence, (batch, heads, 1, d), over a whole cache.

    The query heads that share a key/value head become its query rows: exact, since no mask is needed, and the cache is
    read once.
    """
    batch, heads, _, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], head_dim)
    return F.scaled_dot_product_attention(grouped, k, v).reshape(batch, heads, 1, head_dim)


def block_layout(q_len: int, kv_len: int, block: int, density: float) -> list[list[int]]:
    """Key blocks computed for each block of queries: its diagonal one, and evenly spread earlier ones, together a
    ``density`` share of the causal ones, rounded up.

    >>> block_layout(8, 8, 2, 0.5)
    [[0], [1], [0, 2], [0, 3]]
    """
    offset = kv_len - q_len
    rows = []
    for start in range(0, q_len, block):
        last = (offset + min(start + block, q_len) - 1) // block
        keep = min(last + 1, max(1, math.ceil(density * (last + 1) - 1e-9)))
        rows.append([*(i * last // (keep - 1) for i in range(keep - 1)), last])
    return rows


def layout_mask(layout: Sequence[Sequence[int]], q_len: int, kv_len: int, block: int) -> Tensor:
    """The boolean mask (q_len, kv_len) a layout stands for: what a dense reference must apply for the same result."""
    mask = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for row, blocks in enumerate(layout):
        for column in blocks:
            mask[row * block : (row + 1) * block, column * block : (column + 1) * block] = True
    return mask & torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)


def block_sparse_attention(
    layout: Sequence[Sequence[int]], q_len: int, kv_len: int, block: int, place: str
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of (q, k, v) that computes causal attention over the blocks of ``layout`` only.

    For each block of queries its key and value blocks are gathered and attended densely; gathering is part of the work.
    ``kv_len - q_len`` must be a multiple of ``block``, so that the diagonal falls on a block.
    """
    if (kv_len - q_len) % block:
        off = f"kv_len - q_len = {kv_len - q_len} is no multiple of the block {block}"
        raise ValueError(f"block-sparse attention: {off}")
    rows = []  # of each block of queries: its span, its earlier key blocks, its diagonal's span, and the mask over both
    for number, blocks in enumerate(layout):
        earlier, last = list(blocks[:-1]), blocks[-1]
        queries = slice(number * block, min((number + 1) * block, q_len))
        diagonal = slice(last * block, min((last + 1) * block, kv_len))
        width = len(earlier) * block
        mask = torch.ones(queries.stop - queries.start, width + diagonal.stop - diagonal.start, dtype=torch.bool)
        mask[:, width:] = mask[:, width:].tril()
        index = torch.tensor(earlier, device=place) if earlier else None
        rows.append((queries, index, diagonal, mask.to(place)))
    whole = kv_len // block

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared = q.shape[1] != k.shape[1]
        blocked = [t[:, :, : whole * block].unflatten(2, (whole, block)) for t in (k, v)]
        out = torch.empty_like(q)
        for queries, index, diagonal, mask in rows:
            keys, values = (t[:, :, diagonal] for t in (k, v))
            if index is not None:
                first, second = (t.index_select(2, index).flatten(2, 3) for t in blocked)
                keys, values = torch.cat((first, keys), dim=2), torch.cat((second, values), dim=2)
            tensors = q[:, :, queries], keys, values
            out[:, :, queries] = F.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=shared)
        return out

    return attend


def flex_block_sparse_attention(
    layout: Sequence[Sequence[int]], q_len: int, kv_len: int, block: int, place: str, compiled: bool = True
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same as one fused kernel, through torch's flex attention: blocks outside the layout are never loaded.

    Compiling takes seconds a shape. Uncompiled it computes densely under the mask, which serves to check the layout,
    not to time it.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    counts = torch.tensor([len(blocks) for blocks in layout], dtype=torch.int32, device=place)
    padded = [[*blocks, *(b for b in range(-(-kv_len // block)) if b not in blocks)] for blocks in layout]
    index = torch.tensor(padded, dtype=torch.int32, device=place)
    offset = kv_len - q_len
    kept: Tensor = None if compiled else layout_mask(layout, q_len, kv_len, block).to(place)

    def causal(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return row + offset >= column

    def masked(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return kept[row, column]

    sizes: dict[str, Any] = {"BLOCK_SIZE": block, "seq_lengths": (q_len, kv_len)}
    mask_mod = causal if compiled else masked
    mask = BlockMask.from_kv_blocks(counts[None, None], index[None, None], mask_mod=mask_mod, **sizes)
    function = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    return lambda q, k, v: function(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
