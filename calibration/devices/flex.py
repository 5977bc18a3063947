"""Attention that skips blocks of keys, as one fused kernel: torch's flex attention with masks made on the device.

There are three masks: blocks of a table (:func:`block_sparse`), queries at some positions (:func:`at_positions`), and
active sequences of a decode step (:func:`running`). Operators of fixed shapes compute their tables, so nothing waits
for the host and a CUDA graph can hold mask and attention. On CUDA one compiled kernel serves all lengths; it needs
Triton and a C compiler (:func:`calibration.devices.skipping.triton_needs`). On other devices flex attention computes
densely with the same mask, to check the masks.
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
"""Default edge of skipped blocks."""
LEAST = 16
"""Edges are multiples of this, the smallest tile of a tensor core."""
_RECOMPILES = 64  # one compilation per number format, head size, numbers of heads and block


@lru_cache(maxsize=2)
def compiled(dynamic: bool, backend: Any = "inductor") -> Callable[..., Tensor]:
    """Compile flex attention as a fused kernel, once for all lengths (``dynamic``) or once per shape.

    Beyond its limit of recompilations (8), torch would silently use the unfused function. ``fullgraph`` raises an error
    instead, and the limit is set higher.
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
    """Return kernel options with tiles (at most 128 wide) that divide blocks of an edge; Unsupported if none do."""
    if edge % LEAST:
        raise Unsupported(f"flex attention: block: expected a multiple of its smallest tile, {LEAST}, got {edge}")
    tile = math.gcd(edge, EDGE)
    sizes = {"BLOCK_M": tile, "BLOCK_N": tile} if tile < EDGE else {}
    return {"FORCE_USE_FLEX_ATTENTION": True, **sizes}


def _mask(
    partial: tuple[Tensor, Tensor], full: tuple[Tensor, Tensor], edge: int, lengths: tuple[int, int], seen: Any
) -> Any:
    """Return a block mask from counts and indices of partial blocks, to which ``seen`` applies, and of full blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    make = BlockMask.from_kv_blocks
    # blocks of a backward pass are not needed
    more = {"compute_q_blocks": False} if "compute_q_blocks" in signature(make).parameters else {}
    tables = (t.to(torch.int32).contiguous() for t in (*partial, *full))
    return make(*tables, BLOCK_SIZE=edge, mask_mod=seen, seq_lengths=lengths, **more)


def block_sparse(table: Tensor, q_len: int, kv_len: int, edge: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a function of (q, k, v): causal attention over the blocks of a boolean table (query blocks, key blocks).

    ``kv_len - q_len`` is a multiple of ``edge``. Every block of queries includes its diagonal block; later blocks of
    the table are not read.
    """
    options = tile_options(edge)
    rows, columns = table.shape
    diagonal = (kv_len - q_len) // edge + torch.arange(rows, device=table.device)[:, None]
    number = torch.arange(columns, device=table.device)[None]
    earlier = table & (number < diagonal)
    kind = earlier.to(torch.int8) + 2 * (number == diagonal).to(torch.int8)  # 0 skipped, 1 full, 2 diagonal

    def seen(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        block = kind[row // edge, column // edge]
        return (block == 1) | ((block == 2) & (column % edge <= row % edge))

    ones = torch.ones(rows, dtype=torch.int32, device=table.device)
    ranked = earlier.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
    partial = ones[None, None], diagonal.expand(rows, columns)[None, None]
    full = earlier.sum(1)[None, None], ranked[None, None]
    mask = _mask(partial, full, edge, (q_len, kv_len), seen)
    return lambda q, k, v: _attend(q, k, v, mask, **options)


def at_positions(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Causal attention of queries (batch, heads, chosen, d) at ascending ``positions`` (batch, chosen) over all keys.

    Positions of -1, at the end, have no query: their results are finite and meaningless.
    """
    length, chosen = k.shape[2], q.shape[2]
    columns = -(-length // EDGE)
    tiles = torch.nn.functional.pad(positions, (0, -chosen % EDGE), value=-1).unflatten(1, (-1, EDGE))
    whole, some = (tiles[..., 0] + 1) // EDGE, (tiles.amax(-1) + EDGE) // EDGE
    number = torch.arange(columns, device=q.device).expand(*whole.shape, columns)
    partial = (some - whole)[:, None], (number + whole[..., None]).clamp(max=columns - 1)[:, None]

    def seen(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return positions[b, row] >= column

    mask = _mask(partial, (whole[:, None], number[:, None]), EDGE, (chosen, length), seen)
    return _attend(q, k, v, mask, **tile_options(EDGE))


def running(q: Tensor, k: Tensor, v: Tensor, runs: Tensor) -> Tensor:
    """Attention of one query per sequence, (batch, heads, 1, d), where ``runs`` (batch, kv_heads) is true, else 0.

    The caches of the others are not read. It is compiled once per shape, because flex attention splits a cache among
    processors only for fixed numbers of sequences and heads.
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
