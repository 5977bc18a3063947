"""Prefill and decode attention of FlashInfer and flash-attn, for engines that use them instead of torch's.

:func:`find` returns an installed library. A decode reads a paged cache whose pages are in random order, as after some
time of serving. Queries have the shape (batch, positions, heads, head_dim); keys and values are cut from one tensor of
:meth:`AttentionLibrary.cache_shape`. Signatures: docs.flashinfer.ai (``BatchDecodeWithPagedKVCacheWrapper``,
``BatchPrefillWithRaggedKVCacheWrapper``) and ``flash_attn_interface.py`` of github.com/Dao-AILab/flash-attention 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch

from calibration.devices.protocol import Operator
from simulator.errors import InputError, unknown

Tensor = Any
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of queries, keys and values

PAGES: Mapping[str, int] = MappingProxyType({"flashinfer": 16, "flash_attn": 256})
"""Library -> positions per page of a decode's cache: vLLM's default, and the smallest that flash-attn 2 supports."""
_WORKSPACE_BYTES = 128 * 2**20  # as FlashInfer recommends


@dataclass(frozen=True)
class AttentionLibrary:
    """An installed attention library; ``version`` is its name and version."""

    name: str
    module: Any
    version: str

    @property
    def page(self) -> int:
        """Positions per page of a decode's cache."""
        return PAGES[self.name]

    def describe(self, op: Operator) -> str:
        """Return the implementation as text for a record."""
        return self.version + (f", pages of {self.page} in random order" if op.kind == "attention_decode" else "")

    def cache_shape(self, op: Operator) -> tuple[int, ...]:
        """Return the shape of keys and values: of whole pages for a decode, else by sequence and position."""
        if op.kind == "attention_decode":
            return 2, op.batch * math.ceil(op.kv_len / self.page), self.page, op.kv_heads, op.head_dim
        return 2, op.batch, op.kv_len, op.kv_heads, op.head_dim

    def bind(self, op: Operator, dtype: Any, device: str) -> Attend:
        """Return the attention of an operator, with its plan or page table made."""
        make = {"flashinfer": _flashinfer, "flash_attn": _flash_attn}[self.name]
        return make(self, op, dtype, device)


def find(name: str) -> AttentionLibrary | None:
    """Return a library by name, None for "torch"; InputError if it is unknown or not installed."""
    if name == "torch":
        return None
    if name not in PAGES:
        raise unknown("attention", name, ("torch", *PAGES))
    try:
        module = import_module(name)
    except ImportError as error:
        package = name.replace("flash_attn", "flash-attn").replace("flashinfer", "flashinfer-python")
        raise InputError(f"attention {name!r}: cannot be imported ({error}); try: pip install {package}") from None
    return AttentionLibrary(name, module, f"{name} {getattr(module, '__version__', 'of unknown version')}")


def _page_table(library: AttentionLibrary, op: Operator, device: str) -> Tensor:
    """Return the pages of each sequence (batch, pages), in random order."""
    pages = op.batch * math.ceil(op.kv_len / library.page)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(op.kv_len))
    return order.to(torch.int32).view(op.batch, -1).to(device)


def _flash_attn(library: AttentionLibrary, op: Operator, dtype: Any, device: str) -> Attend:
    if op.kind == "attention_prefill":
        prefill = library.module.flash_attn_func
        return lambda q, k, v: prefill(q, k, v, causal=True)
    decode, table = library.module.flash_attn_with_kvcache, _page_table(library, op, device)
    lengths = torch.full((op.batch,), op.kv_len, dtype=torch.int32, device=device)
    return lambda q, k, v: decode(q, k, v, cache_seqlens=lengths, block_table=table, causal=True)


def _flashinfer(library: AttentionLibrary, op: Operator, dtype: Any, device: str) -> Attend:
    def ends(length: int) -> Tensor:
        """Return where each sequence begins, and where the last one ends."""
        return torch.arange(op.batch + 1, dtype=torch.int32, device=device) * length

    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    if op.kind == "attention_prefill":
        prefill = library.module.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        prefill.plan(
            ends(op.q_len), ends(op.kv_len), op.heads, op.kv_heads, op.head_dim, causal=True, q_data_type=dtype
        )
        return lambda q, k, v: prefill.run(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    decode = library.module.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=op.heads > op.kv_heads
    )
    pages = math.ceil(op.kv_len / library.page)
    table = _page_table(library, op, device).flatten()
    last = torch.full((op.batch,), op.kv_len - (pages - 1) * library.page, dtype=torch.int32, device=device)
    decode.plan(ends(pages), table, last, op.heads, op.kv_heads, op.head_dim, library.page, q_data_type=dtype)
    return lambda q, k, v: decode.run(q.flatten(0, 1), (k, v))
