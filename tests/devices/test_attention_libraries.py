"""Attention of FlashInfer and flash-attn, by fakes of their public functions that compute in plain torch."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from calibration.devices.attention import decode_attention, prefill_attention, with_backend  # noqa: E402
from calibration.devices.attention_libraries import find  # noqa: E402
from calibration.devices.cuda import open_named  # noqa: E402
from calibration.devices.operators import Arena, build, random_tensor  # noqa: E402
from calibration.devices.protocol import Operator  # noqa: E402
from simulator.errors import InputError  # noqa: E402

pytestmark = pytest.mark.quick

SHAPE: dict[str, int] = {"batch": 3, "heads": 4, "kv_heads": 2, "head_dim": 16}


def _causal(q: Any, k: Any, v: Any) -> Any:
    """Attention over (positions, heads, head_dim), the last queries of the keys."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def _paged(cache: Any, pages: Any, length: int) -> Any:
    return cache[pages.long()].flatten(0, 1)[:length]


class Decode:
    """``flashinfer.BatchDecodeWithPagedKVCacheWrapper``, without what is not used here."""

    def __init__(
        self, float_workspace_buffer: Any, kv_layout: str = "NHD", use_cuda_graph: bool = False, *,
        use_tensor_cores: bool = False,
    ) -> None:  # fmt: skip
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"

    def plan(
        self, indptr: Any, indices: Any, last_page_len: Any, num_qo_heads: int, num_kv_heads: int, head_dim: int,
        page_size: int, pos_encoding_mode: str = "NONE", *, q_data_type: Any = "float16",
    ) -> None:  # fmt: skip
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        self.planned = indptr.tolist(), indices, last_page_len.tolist(), page_size
        self.sizes = num_qo_heads, num_kv_heads, head_dim

    def run(self, q: Any, paged_kv_cache: tuple[Any, Any]) -> Any:
        indptr, indices, last, page = self.planned
        assert q.shape[1:] == (self.sizes[0], self.sizes[2])
        out = []
        for i, one in enumerate(q):
            pages = indices[indptr[i] : indptr[i + 1]]
            length = (len(pages) - 1) * page + last[i]
            out.append(_causal(one[None], *(_paged(cache, pages, length) for cache in paged_kv_cache)))
        return torch.cat(out)


class Prefill:
    """``flashinfer.BatchPrefillWithRaggedKVCacheWrapper``, without what is not used here."""

    def __init__(self, float_workspace_buffer: Any, kv_layout: str = "NHD") -> None:
        assert kv_layout == "NHD"

    def plan(
        self, qo_indptr: Any, kv_indptr: Any, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int,
        head_dim_vo: int | None = None, *, causal: bool = False, q_data_type: Any = "float16",
    ) -> None:  # fmt: skip
        assert causal
        assert qo_indptr.dtype == kv_indptr.dtype == torch.int32
        self.ends = qo_indptr.tolist(), kv_indptr.tolist()

    def run(self, q: Any, k: Any, v: Any) -> Any:
        rows, keys = self.ends
        cuts = [(slice(*rows[i : i + 2]), slice(*keys[i : i + 2])) for i in range(len(rows) - 1)]
        return torch.cat([_causal(q[a], k[b], v[b]) for a, b in cuts])


def flash_attn_func(q: Any, k: Any, v: Any, dropout_p: float = 0.0, *, causal: bool = False) -> Any:
    """``flash_attn.flash_attn_func``: (batch, positions, heads, head_dim), lower-right causal."""
    assert causal
    return torch.stack([_causal(*one) for one in zip(q, k, v, strict=True)])


def flash_attn_with_kvcache(
    q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, *, cache_seqlens: Any = None,
    block_table: Any = None, causal: bool = False,
) -> Any:  # fmt: skip
    """``flash_attn.flash_attn_with_kvcache`` with a paged cache (pages, positions, heads, head_dim)."""
    assert k_cache.shape[1] % 256 == 0
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    keys, values = (
        [_paged(c, pages, n) for pages, n in zip(block_table, cache_seqlens.tolist(), strict=True)]
        for c in (k_cache, v_cache)
    )
    return torch.stack([_causal(*one) for one in zip(q, keys, values, strict=True)])


@pytest.fixture(params=["flashinfer", "flash_attn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    infer = {"BatchDecodeWithPagedKVCacheWrapper": Decode, "BatchPrefillWithRaggedKVCacheWrapper": Prefill}
    flash = {"flash_attn_func": flash_attn_func, "flash_attn_with_kvcache": flash_attn_with_kvcache}
    functions: dict[str, Any] = infer if request.param == "flashinfer" else flash
    monkeypatch.setitem(sys.modules, request.param, SimpleNamespace(__version__="9.9", **functions))
    return find(request.param)


def _operands(library: Any, op: Operator) -> tuple[Any, Any]:
    q = random_tensor((op.batch, op.q_len, op.heads, op.head_dim), "fp32", "cpu", 1)
    return q, random_tensor(library.cache_shape(op), "fp32", "cpu", 2)


@pytest.mark.parametrize("q_len", [48, 20])
def test_prefill_is_causal_attention(library: Any, q_len: int) -> None:
    op = Operator("attention_prefill", "fp32", q_len=q_len, kv_len=48, **SHAPE)
    q, cache = _operands(library, op)
    found = library.bind(op, torch.float32, "cpu")(q, *cache).view(q.shape)
    mask = torch.ones(q_len, 48, dtype=torch.bool).tril(48 - q_len)
    torch.testing.assert_close(
        found.transpose(1, 2), prefill_attention(*(t.transpose(1, 2) for t in (q, *cache)), mask)
    )


@pytest.mark.parametrize("kv_len", [5, 256, 300])
def test_decode_reads_each_sequence_from_its_pages(library: Any, kv_len: int) -> None:
    op = Operator("attention_decode", "fp32", q_len=1, kv_len=kv_len, **SHAPE)
    q, cache = _operands(library, op)
    pages = -(-kv_len // library.page)
    assert cache.shape[1:3] == (3 * pages, library.page)
    found = library.bind(op, torch.float32, "cpu")(q, *cache).view(3, 4, 1, 16)
    order = torch.randperm(3 * pages, generator=torch.Generator().manual_seed(kv_len)).view(3, pages)
    k, v = (torch.stack([_paged(c, row, kv_len) for row in order]).transpose(1, 2) for c in cache)
    torch.testing.assert_close(found, decode_attention(q.transpose(1, 2), k, v))


def test_a_library_that_is_unknown_or_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("torch") is None
    with pytest.raises(InputError, match="attention 'xformers' is unknown; Known: flash_attn, flashinfer, torch"):
        find("xformers")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(InputError, match=r"cannot be imported .*; try: pip install flash-attn"):
        find("flash_attn")
    with pytest.raises(InputError, match="then :flashinfer or :flash_attn for their attention, got 'cuda:0:triton'"):
        open_named("0:triton")


def test_the_first_backend_that_runs_is_pinned() -> None:
    def attend(i: int) -> Any:
        order = torch.backends.cuda
        tried.append((order.flash_sdp_enabled(), order.mem_efficient_sdp_enabled(), order.math_sdp_enabled()))
        if order.flash_sdp_enabled() or order.cudnn_sdp_enabled():
            raise RuntimeError("No available kernel. Aborting execution.")
        return i

    tried: list[Any] = []
    name, launch = with_backend(attend)
    assert (name, launch(7)) == ("efficient_attention", 7)
    assert tried[-1] == tried[-2] == (False, True, False)  # the others are off in each launch
    assert torch.backends.cuda.flash_sdp_enabled()  # and on again behind it

    def broken(i: int) -> Any:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        with_backend(broken)


def test_attention_on_a_gpu_names_its_backend() -> None:
    from pretended_cuda import CPU

    for kind, q_len in (("attention_prefill", 64), ("attention_decode", 1)):
        op = Operator(kind, "fp32", q_len=q_len, kv_len=64, **SHAPE)
        assert build(op, CPU, Arena("cpu", 1e5, 1e8)).how.startswith(", SDPA backend ")
        assert build(op, "cpu", Arena("cpu", 1e5, 1e8)).how == ""
