"""Attention in torch: causal prefill, decode over a cache, and causal attention that skips blocks.

Queries have the shape (batch, heads, positions, head_dim), the cache (batch, kv_heads, positions, head_dim). Masks and
indices depend only on the shape and are made once, so the timed functions only launch kernels. (A copy of an index from
the host would also break the capture of a CUDA graph.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Tensor = Any


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention of the last q_len of kv_len positions; ``mask`` is from :func:`causal_mask` if they differ."""
    shared = q.shape[1] != k.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    if type(mask) is torch.Tensor:
        return masked_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention with a boolean mask (..., queries, keys) that all heads share.

    The query heads of a key/value head become its query rows. The flash kernel does not support a mask with shared
    heads, and the memory-efficient kernel supports it only in new versions of torch (``can_use_flash_attention``,
    ``can_use_mem_efficient_attention`` in ATen's ``sdp_utils.cpp``); otherwise nothing would be fused.
    """
    share = q.shape[1] // k.shape[1]
    grouped = q.unflatten(1, (k.shape[1], share)).flatten(2, 3)
    rows = torch.cat([mask] * share, dim=-2)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=rows).view_as(q)


def causal_mask(q_len: int, kv_len: int, device: str) -> Tensor | None:
    """Return the mask of :func:`prefill_attention`: None for a whole prompt, else the lower-right causal mask.

    On CUDA it is a symbolic bias, which the flash kernels support; a boolean mask would select a slower kernel.
    """
    if q_len == kv_len:
        return None
    if device.startswith("cuda"):
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(q_len, kv_len)
    return torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - q_len)


def decode_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query per sequence, (batch, heads, 1, d), over a whole cache.

    The query heads of a key/value head become its query rows: no mask is needed, and the cache is read once.
    """
    batch, heads, _, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], head_dim)
    return F.scaled_dot_product_attention(grouped, k, v).reshape(batch, heads, 1, head_dim)


def with_backend(attend: Callable[[int], Tensor]) -> tuple[str, Callable[[int], Tensor]]:
    """Return the name of the first SDPA backend that runs ``attend(0)``, and ``attend`` with that backend only.

    They are tried in the order flash, cuDNN, memory-efficient, unfused. Otherwise torch chooses by version and shape.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    backends = [getattr(SDPBackend, name) for name in order if hasattr(SDPBackend, name)]
    for backend in backends:
        try:
            with warnings.catch_warnings(), sdpa_kernel(backend):
                warnings.simplefilter("ignore")  # torch warns why a backend cannot run
                attend(0)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if backend == backends[-1]:
                raise
        else:
            break

    def pinned(i: int) -> Tensor:
        with sdpa_kernel(backend):
            return attend(i)

    return backend.name.lower(), pinned


def block_layout(q_len: int, kv_len: int, block: int, density: float) -> Tensor:
    """Return the computed key blocks of each query block, booleans (query blocks, key blocks).

    They are the diagonal block and evenly spread earlier blocks: a ``density`` share of the causal blocks, rounded up.
    """
    offset = kv_len - q_len
    table = torch.zeros(-(-q_len // block), -(-kv_len // block), dtype=torch.bool)
    for row, start in enumerate(range(0, q_len, block)):
        last = (offset + min(start + block, q_len) - 1) // block
        keep = min(last + 1, max(1, math.ceil(density * (last + 1) - 1e-9)))
        table[row, [*(i * last // (keep - 1) for i in range(keep - 1)), last]] = True
    return table


def block_sparse_attention(
    table: Tensor, q_len: int, kv_len: int, block: int
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a function of (q, k, v): causal attention over the blocks of a layout, in plain torch.

    For each block of queries, it gathers the key and value blocks and attends to them densely; the gather is part of
    the work. ``kv_len - q_len`` must be a multiple of ``block``, so the diagonal falls on a block. The host reads the
    table; :func:`calibration.devices.flex.block_sparse` keeps it on the device.
    """
    if (kv_len - q_len) % block:
        got = f"kv_len - q_len = {kv_len - q_len}"
        raise ValueError(f"block-sparse attention: expected a multiple of the block {block}, got {got}")
    rows = []  # per block of queries: its span, earlier key blocks, span of its diagonal block, mask of both
    for number, kept in enumerate(table):
        last = (kv_len - q_len) // block + number
        index = kept[:last].nonzero().squeeze(1)
        queries = slice(number * block, min((number + 1) * block, q_len))
        diagonal = slice(last * block, min((last + 1) * block, kv_len))
        width, own = len(index) * block, queries.stop - queries.start
        mask = torch.ones(own, width + own, dtype=torch.bool, device=table.device)
        mask[:, width:] = mask[:, width:].tril()
        rows.append((queries, index, diagonal, mask))
    whole = kv_len // block

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocked = [t[:, :, : whole * block].unflatten(2, (whole, block)) for t in (k, v)]
        out = torch.empty_like(q)
        for queries, index, diagonal, mask in rows:
            keys, values = (t[:, :, diagonal] for t in (k, v))
            if len(index):
                first, second = (t.index_select(2, index).flatten(2, 3) for t in blocked)
                keys, values = torch.cat((first, keys), dim=2), torch.cat((second, values), dim=2)
            out[:, :, queries] = masked_attention(q[:, :, queries], keys, values, mask)
        return out

    return attend
