"""Attention in torch, in a fused kernel that skips blocks (flex attention), and in the libraries of
engines.

Queries have the shape (batch, heads, positions, head_dim), the cache (batch, kv_heads, positions,
head_dim). Masks and indices depend only on the shape and are made once: timed functions only launch
kernels, and copy nothing from the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F

from calibration.devices.protocol import LIBRARIES, Operator, Unsupported

Tensor = Any
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys and values to results

EDGE = 128  # default edge of the blocks that flex attention skips
LEAST = 16  # edges are multiples of the smallest tile of a tensor core
_RECOMPILES = 64  # one compilation per number format, head size, numbers of heads and block
PAGE = 16  # positions per page of a cache: vLLM's default
_RELEASES = (3, 4, 2)  # releases of FlashAttention, in the order in which vLLM prefers them
_WORKSPACE_BYTES = 128 * 2**20  # as FlashInfer recommends


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention of the last q_len of kv_len positions; ``mask`` is from :func:`causal_mask`
    if they differ."""
    shared = q.shape[1] != k.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    if type(mask) is torch.Tensor:
        return masked_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention with a boolean mask (..., queries, keys) for all heads. Query heads of a key/value
    head become query rows: fused kernels support no mask with shared heads
    (``can_use_flash_attention`` in ATen's ``sdp_utils.cpp``)."""
    share = q.shape[1] // k.shape[1]
    grouped = q.unflatten(1, (k.shape[1], share)).flatten(2, 3)
    rows = torch.cat([mask] * share, dim=-2)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=rows).view_as(q)


def causal_mask(q_len: int, kv_len: int, device: str) -> Tensor | None:
    """Return the mask of :func:`prefill_attention`: None for a whole prompt."""
    if q_len == kv_len:
        return None
    # the flash kernels support this symbolic bias, but no boolean mask
    if device.startswith("cuda"):
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(q_len, kv_len)
    return torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - q_len)


def decode_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query per sequence, (batch, heads, 1, d), over a whole cache, which is read
    once."""
    batch, heads, _, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], head_dim)
    return F.scaled_dot_product_attention(grouped, k, v).reshape(batch, heads, 1, head_dim)


_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def in_order_of_backends(attend: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """Return ``attend`` with the first SDPA backend that runs it, in one order for all versions of
    torch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = [getattr(SDPBackend, name) for name in _BACKENDS]

    def ordered(i: int) -> Tensor:
        with sdpa_kernel(backends, set_priority=True):
            return attend(i)

    return ordered


def block_layout(q_len: int, kv_len: int, block: int, density: float) -> Tensor:
    """Return which key blocks each query block sees: its diagonal block and, by the density, some
    earlier ones."""
    offset = kv_len - q_len
    table = torch.zeros(-(-q_len // block), -(-kv_len // block), dtype=torch.bool)
    for row, start in enumerate(range(0, q_len, block)):
        last = (offset + min(start + block, q_len) - 1) // block
        keep = min(last + 1, max(1, math.ceil(density * (last + 1) - 1e-9)))
        table[row, [*(i * last // (keep - 1) for i in range(keep - 1)), last]] = True
    return table


def block_sparse_attention(table: Tensor, q_len: int, kv_len: int, block: int) -> Attend:
    """Return causal attention over the blocks of a layout, in plain torch: per block of queries a
    gather of key and value blocks, and a dense attention. ``kv_len - q_len`` is a multiple of
    ``block``."""
    rows = _query_blocks(table, q_len, kv_len, block)
    whole = kv_len // block

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocked = [t[:, :, : whole * block].unflatten(2, (whole, block)) for t in (k, v)]
        out = torch.empty_like(q)
        for queries, index, diagonal, mask in rows:
            keys, values = (t[:, :, diagonal] for t in (k, v))
            if len(index):
                first, second = (t.index_select(2, index).flatten(2, 3) for t in blocked)
                keys = torch.cat((first, keys), dim=2)
                values = torch.cat((second, values), dim=2)
            out[:, :, queries] = masked_attention(q[:, :, queries], keys, values, mask)
        return out

    return attend


def _query_blocks(
    table: Tensor, q_len: int, kv_len: int, block: int
) -> list[tuple[slice, Tensor, slice, Tensor]]:
    """Return for each block of queries its span, its earlier key blocks, the span of its diagonal
    block, and the mask of both."""
    rows = []
    for number, kept in enumerate(table):
        last = (kv_len - q_len) // block + number
        index = kept[:last].nonzero().squeeze(1)
        queries = slice(number * block, min((number + 1) * block, q_len))
        diagonal = slice(last * block, min((last + 1) * block, kv_len))
        width = len(index) * block
        count = queries.stop - queries.start
        mask = torch.ones(count, width + count, dtype=torch.bool, device=table.device)
        mask[:, width:] = mask[:, width:].tril()
        rows.append((queries, index, diagonal, mask))
    return rows


@lru_cache(maxsize=2)
def compiled(dynamic: bool, backend: Any = "inductor") -> Callable[..., Tensor]:
    """Compile flex attention as a fused kernel, once for all lengths (``dynamic``) or once per
    shape."""
    from torch.nn.attention.flex_attention import flex_attention

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _RECOMPILES)
    return torch.compile(flex_attention, dynamic=dynamic, fullgraph=True, backend=backend)  # type: ignore[no-any-return]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, dynamic: bool = True, **options: Any
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    # compiled it needs Triton and a C compiler; uncompiled it computes densely with the same mask,
    # for tests of masks
    flex: Any = compiled(dynamic) if q.is_cuda else flex_attention
    return flex(
        q,
        k,
        v,
        block_mask=mask,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options or None,
    )


def tile_options(edge: int) -> dict[str, Any]:
    """Return kernel options with tiles (at most 128 wide) that divide blocks of an edge, or raise
    Unsupported."""
    if edge % LEAST:
        raise Unsupported(
            f"flex attention: block: expected a multiple of its smallest tile, {LEAST}, got {edge}"
        )
    tile = math.gcd(edge, EDGE)
    sizes = {"BLOCK_M": tile, "BLOCK_N": tile} if tile < EDGE else {}
    return {"FORCE_USE_FLEX_ATTENTION": True, **sizes}


def _mask(
    partial: tuple[Tensor, Tensor],
    full: tuple[Tensor, Tensor],
    edge: int,
    lengths: tuple[int, int],
    seen: Any,
) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    make = BlockMask.from_kv_blocks
    # blocks of a backward pass are not needed
    more = {"compute_q_blocks": False} if "compute_q_blocks" in signature(make).parameters else {}
    tables = (t.to(torch.int32).contiguous() for t in (*partial, *full))
    return make(*tables, BLOCK_SIZE=edge, mask_mod=seen, seq_lengths=lengths, **more)


def fused_block_sparse(table: Tensor, q_len: int, kv_len: int, edge: int) -> Attend:
    options = tile_options(edge)
    rows, columns = table.shape
    diagonal = (kv_len - q_len) // edge + torch.arange(rows, device=table.device)[:, None]
    number = torch.arange(columns, device=table.device)[None]
    earlier = table & (number < diagonal)
    # 0 skipped, 1 full, 2 diagonal
    kind = earlier.to(torch.int8) + 2 * (number == diagonal).to(torch.int8)

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
    """Causal attention of queries (batch, heads, chosen, d) at ascending ``positions`` (batch,
    chosen) over all keys. Results at positions of -1, which are last and have no query, are finite
    and meaningless."""
    length = k.shape[2]
    chosen = q.shape[2]
    columns = -(-length // EDGE)
    tiles = F.pad(positions, (0, -chosen % EDGE), value=-1).unflatten(1, (-1, EDGE))
    whole = (tiles[..., 0] + 1) // EDGE
    some = (tiles.amax(-1) + EDGE) // EDGE
    number = torch.arange(columns, device=q.device).expand(*whole.shape, columns)
    partial = (some - whole)[:, None], (number + whole[..., None]).clamp(max=columns - 1)[:, None]

    def seen(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return positions[b, row] >= column

    mask = _mask(partial, (whole[:, None], number[:, None]), EDGE, (chosen, length), seen)
    return _attend(q, k, v, mask, **tile_options(EDGE))


def running(q: Tensor, k: Tensor, v: Tensor, runs: Tensor) -> Tensor:
    """Attention of one query per sequence, (batch, heads, 1, d), where ``runs`` (batch, kv_heads)
    is true, else 0. Each shape is compiled: flex attention splits a cache among processors only for
    fixed sequences and heads."""
    batch, heads, _, width = q.shape
    length = k.shape[2]
    kv_heads = k.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, width)
    columns = -(-length // EDGE)
    whole = length // EDGE
    number = torch.arange(columns, device=q.device).expand(batch, kv_heads, 1, columns)
    runs_ = runs[..., None].int()

    def seen(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return runs[b, h]

    partial = (runs_ * (columns - whole), (number + whole).clamp(max=columns - 1))
    full = (runs_ * whole, number)
    mask = _mask(partial, full, EDGE, (grouped.shape[2], length), seen)
    out = _attend(grouped, k, v, mask, dynamic=False)
    return out.masked_fill(~runs[..., None, None], 0.0).view(batch, heads, 1, width)


@dataclass(frozen=True)
class AttentionLibrary:
    """Queries have the shape (batch, positions, heads, head_dim). Decode reads a paged cache with
    pages in random order, as after some time of serving. Signatures: docs.flashinfer.ai."""

    name: str
    module: Any
    version: str  # name and version

    def paged(self, op: Operator) -> bool:
        return op.kind == "attention_decode" or self.name == "vllm"

    def describe(self, op: Operator) -> str:
        pages = f", pages of {PAGE} in random order"
        return self.version + (pages if self.paged(op) else "")

    def cache_shape(self, op: Operator) -> tuple[int, ...]:
        if self.paged(op):
            pages = op.batch * math.ceil(op.kv_len / PAGE)
            return 2, pages, PAGE, op.kv_heads, op.head_dim
        return 2, op.batch, op.kv_len, op.kv_heads, op.head_dim

    def bind(self, op: Operator, dtype: Any, device: str) -> Attend:
        make = _vllm if self.name == "vllm" else _flashinfer
        return make(self.module, op, dtype, device)


def engine_library() -> AttentionLibrary | None:
    """Return the attention library of the installed engine, if there is one."""
    for name in LIBRARIES:
        with suppress(Exception):  # a package that does not work may raise any exception
            version = f"{name} {import_module(name).__version__}"
            if name == "flashinfer":
                return AttentionLibrary(name, import_module(name), version)
            module = import_module("vllm.vllm_flash_attn")
            return AttentionLibrary(name, module, f"{version}, FlashAttention {_release(module)}")
    return None


def _release(module: Any) -> int:
    """Return the release of FlashAttention that vLLM runs on this GPU."""
    return next((n for n in _RELEASES if module.is_fa_version_supported(n)), _RELEASES[-1])


def _page_table(op: Operator, device: str) -> Tensor:
    pages = op.batch * math.ceil(op.kv_len / PAGE)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(op.kv_len))
    return order.to(torch.int32).view(op.batch, -1).to(device)


def _vllm(module: Any, op: Operator, dtype: Any, device: str) -> Attend:
    """Return vLLM's call (``vllm/v1/attention/backends/flash_attn.py``), which reads prompts from
    pages too, and whose schedule all layers of a pass share."""
    lengths = torch.full((op.batch,), op.kv_len, dtype=torch.int32, device=device)
    starts = torch.arange(op.batch + 1, dtype=torch.int32, device=device) * op.q_len
    release = _release(module)
    longest: dict[str, Any] = {"max_seqlen_q": op.q_len, "max_seqlen_k": op.kv_len}
    how = {
        **longest,
        "cu_seqlens_q": starts,
        "seqused_k": lengths,
        "block_table": _page_table(op, device),
        "causal": True,
        "fa_version": release,
    }
    if release == 3:
        how["scheduler_metadata"] = module.get_scheduler_metadata(
            **longest,
            batch_size=op.batch,
            num_heads_q=op.heads,
            num_heads_kv=op.kv_heads,
            headdim=op.head_dim,
            cache_seqlens=lengths,
            qkv_dtype=dtype,
            cu_seqlens_q=starts,
            page_size=PAGE,
            causal=True,
        )
    attend = module.flash_attn_varlen_func
    return lambda q, k, v: attend(q.flatten(0, 1), k, v, **how)


def _flashinfer(module: Any, op: Operator, dtype: Any, device: str) -> Attend:
    def ends(length: int) -> Tensor:
        return torch.arange(op.batch + 1, dtype=torch.int32, device=device) * length

    heads = op.heads, op.kv_heads, op.head_dim
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)  # it holds counters
    if op.kind == "attention_prefill":
        prefill = module.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        prefill.plan(ends(op.q_len), ends(op.kv_len), *heads, causal=True, q_data_type=dtype)
        return lambda q, k, v: prefill.run(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    grouped = op.heads > op.kv_heads
    decode = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=grouped)
    pages = math.ceil(op.kv_len / PAGE)
    table = _page_table(op, device).flatten()
    last = torch.full((op.batch,), op.kv_len - (pages - 1) * PAGE, dtype=torch.int32, device=device)
    decode.plan(ends(pages), table, last, *heads, PAGE, q_data_type=dtype)
    return lambda q, k, v: decode.run(q.flatten(0, 1), (k, v))
