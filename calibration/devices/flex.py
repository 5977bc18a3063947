"""Attention that skips blocks of keys, as one fused kernel: torch's flex attention under a mask made on the device.

Three masks: blocks of a table (:func:`block_sparse`), queries at chosen places (:func:`placed`), sequences that run in
a decode step (:func:`running`). Their tables are computed by operators of fixed shapes, so that nothing waits for the
host and a CUDA graph can hold mask and attention. On CUDA one compiled function serves all shapes. Elsewhere flex
attention computes densely under the same mask, which serves to check the masks, not to time them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from typing import Any

import torch

from calibration.devices.protocol import Unsupported

Tensor = Any

EDGE = 128
"""Edge of the blocks that are skipped as wholes where the caller names none."""
LEAST = 16
"""Edges are multiples of this, the least a tensor core takes."""
_RECOMPILES = 64  # number formats, head sizes, blocks, ratios of heads: each is compiled once


@lru_cache(maxsize=2)
def compiled(dynamic: bool, backend: Any = "inductor") -> Callable[..., Tensor]:
    """Flex attention as a fused kernel, compiled once for all shapes (``dynamic``) or once a shape.

    ``fullgraph``: past its limit of recompilations (8) torch would go on with the unfused function and only log it;
    this raises instead, and the limit is one that is not met.
    """
    from torch.nn.attention.flex_attention import flex_attention

    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), _RECOMPILES))
    return torch.compile(flex_attention, dynamic=dynamic, fullgraph=True, backend=backend)  # type: ignore[no-any-return]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, dynamic: bool = True, **options: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    flex: Any = compiled(dynamic) if q.is_cuda else flex_attention
    return flex(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options or None)


def tile_options(edge: int) -> dict[str, Any]:
    """Kernel options whose tiles divide blocks of an edge: its own tiles are up to 128 wide. Unsupported: none does.

    >>> tile_options(128), tile_options(48)["BLOCK_N"]
    ({'FORCE_USE_FLEX_ATTENTION': True}, 16)
    """
    if edge % LEAST:
        raise Unsupported(f"flex attention: blocks of edge {edge} are no multiple of its smallest tile, {LEAST}")
    tile = math.gcd(edge, EDGE)
    sizes = {"BLOCK_M": tile, "BLOCK_N": tile} if tile < EDGE else {}
    return {"FORCE_USE_FLEX_ATTENTION": True, **sizes}


def _mask(
    partial: tuple[Tensor, Tensor], full: tuple[Tensor, Tensor], edge: int, lengths: tuple[int, int], seen: Any
) -> Any:
    """A block mask from numbers and indices of the blocks seen in part, to which ``seen`` applies, and as wholes."""
    from torch.nn.attention.flex_attention import BlockMask

    make = BlockMask.from_kv_blocks
    more = {"compute_q_blocks": False} if "compute_q_blocks" in signature(make).parameters else {}  # of a backward pass
    tables = (t.to(torch.int32).contiguous() for t in (*partial, *full))
    return make(*tables, BLOCK_SIZE=edge, mask_mod=seen, seq_lengths=lengths, **more)


def block_sparse(table: Tensor, q_len: int, kv_len: int, edge: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of (q, k, v): causal attention over the blocks of a table (query blocks, key blocks) of booleans.

    ``kv_len - q_len`` is a multiple of ``edge`` and each block of queries has its diagonal one; what the table says of
    later ones is not read.
    """
    options = tile_options(edge)
    rows, columns = table.shape
    diagonal = (kv_len - q_len) // edge + torch.arange(rows, device=table.device)[:, None]
    number = torch.arange(columns, device=table.device)[None]
    earlier = table & (number < diagonal)
    kind = earlier.to(torch.int8) + 2 * (number == diagonal).to(torch.int8)  # 0 left out, 1 whole, 2 the diagonal

    def seen(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        what = kind[row // edge, column // edge]
        return (what == 1) | ((what == 2) & (column % edge <= row % edge))

    ones = torch.ones(rows, dtype=torch.int32, device=table.device)
    ranked = earlier.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
    partial, full = (ones, diagonal.expand(rows, columns)), (earlier.sum(1), ranked)
    one, all_ = ((many[None, None], which[None, None]) for many, which in (partial, full))
    mask = _mask(one, all_, edge, (q_len, kv_len), seen)
    return lambda q, k, v: _attend(q, k, v, mask, **options)


def placed(q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
    """Causal attention of queries (batch, heads, chosen, d) at ascending ``places`` (batch, chosen) over all keys.

    Places of -1, at the end, are of no query: what comes out for them is finite and means nothing.
    """
    length, chosen = k.shape[2], q.shape[2]
    columns = -(-length // EDGE)
    tiles = torch.nn.functional.pad(places, (0, -chosen % EDGE), value=-1).unflatten(1, (-1, EDGE))
    whole, some = (tiles[..., 0] + 1) // EDGE, (tiles.amax(-1) + EDGE) // EDGE
    number = torch.arange(columns, device=q.device).expand(*whole.shape, columns)
    partial = (some - whole)[:, None], (number + whole[..., None]).clamp(max=columns - 1)[:, None]

    def seen(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return places[b, row] >= column

    mask = _mask(partial, (whole[:, None], number[:, None]), EDGE, (chosen, length), seen)
    return _attend(q, k, v, mask, **tile_options(EDGE))


def running(q: Tensor, k: Tensor, v: Tensor, runs: Tensor) -> Tensor:
    """Attention of one query a sequence, (batch, heads, 1, d), where ``runs`` (batch, kv_heads) says so, and 0 else.

    The cache of what does not run is not read. Compiled once a shape: only for fixed numbers of sequences and heads
    does flex attention divide a cache among the processors.
    """
    batch, heads, _, width = q.shape
    length, kv_heads = k.shape[2], k.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, width)
    columns, whole = -(-length // EDGE), length // EDGE
    number = torch.arange(columns, device=q.device).expand(batch, kv_heads, 1, columns)
    runs_ = runs[..., None].int()

    def seen(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return runs[b, h]

    partial, full = (runs_ * (columns - whole), (number + whole).clamp(max=columns - 1)), (runs_ * whole, number)
    mask = _mask(partial, full, EDGE, (grouped.shape[2], length), seen)
    out = _attend(grouped, k, v, mask, dynamic=False)
    return out.masked_fill(~runs[..., None, None], 0.0).view(batch, heads, 1, width)
