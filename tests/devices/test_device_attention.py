"""Attention that skips blocks as one fused kernel, and of vLLM and FlashInfer by fakes of their
functions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from shutil import which
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

F = torch.nn.functional

from decoder_reference import layout_mask  # noqa: E402
from fakes.interpreted import CPU  # noqa: E402
from torch.nn.attention import SDPBackend  # noqa: E402
from torch.nn.attention import flex_attention as torch_flex  # noqa: E402

from calibration.devices import Operator, Unsupported, attention  # noqa: E402
from calibration.devices.attention import (  # noqa: E402
    PAGE,
    AttentionLibrary,
    decode_attention,
    engine_library,
    in_order_of_backends,
    prefill_attention,
)
from calibration.devices.operators import Arena, build, random_tensor  # noqa: E402
from calibration.runners.decoder.families import routed_attention  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
ATTENTION: dict[str, Any] = {
    "batch": 1,
    "q_len": 64,
    "kv_len": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
}


@pytest.fixture
def recompiling() -> Iterator[Any]:
    """Torch's settings of recompilation, given back; nothing compiled before or after."""
    config = torch._dynamo.config
    limit = config.recompile_limit
    torch._dynamo.reset()
    attention.compiled.cache_clear()
    with torch.no_grad():
        yield config
    config.recompile_limit = limit
    torch._dynamo.reset()
    attention.compiled.cache_clear()


def _tensors(
    q_len: int, kv_len: int, heads: int = 4, kv_heads: int = 2, batch: int = 2
) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, q_len, 16, generator=generator)
    k, v = (torch.randn(batch, kv_heads, kv_len, 16, generator=generator) for _ in range(2))
    return q, k, v


def _reference(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Softmax attention written out, in float64."""
    repeat = q.shape[1] // k.shape[1]
    q, k, v = (
        q.double(),
        k.double().repeat_interleave(repeat, 1),
        v.double().repeat_interleave(repeat, 1),
    )
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).float()


def _close(value: Any, reference: Any) -> None:
    torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


def _check_blocks(q_len: int, kv_len: int, block: int, density: float) -> None:
    q, k, v = _tensors(q_len, kv_len)
    table = attention.block_layout(q_len, kv_len, block, density)
    reference = _reference(q, k, v, layout_mask(table, q_len, kv_len, block))
    for made in (attention.fused_block_sparse, attention.block_sparse_attention):
        _close(made(table, q_len, kv_len, block)(q, k, v), reference)


def _check_places() -> None:
    q, k, v = _tensors(300, 500)
    generator = torch.Generator().manual_seed(0)
    places = torch.stack(
        [torch.randperm(500, generator=generator)[:300].sort().values for _ in range(2)]
    )
    places[1, 140:] = -1
    out = attention.at_positions(q, k, v, places)
    reference = _reference(q, k, v, (torch.arange(500) <= places[..., None])[:, None])
    _close(out[0], reference[0])
    _close(out[1, :, :140], reference[1, :, :140])
    assert torch.isfinite(out).all()


def _check_running() -> None:
    q, k, v = _tensors(1, 300, batch=3)
    runs = torch.tensor([[1, 0], [0, 0], [1, 1]], dtype=torch.bool)
    _close(
        attention.running(q, k, v, runs),
        decode_attention(q, k, v) * runs.repeat_interleave(2, 1)[..., None, None],
    )


@pytest.mark.parametrize(("q_len", "kv_len"), [(16, 16), (5, 21), (1, 9)])
def test_prefill_attention(q_len: int, kv_len: int) -> None:
    q, k, v = _tensors(q_len, kv_len)
    mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    _close(
        prefill_attention(q, k, v, attention.causal_mask(q_len, kv_len, "cpu")),
        _reference(q, k, v, mask),
    )


def test_decode_attention() -> None:
    for heads in ((4, 2), (6, 1), (4, 4)):
        q, k, v = _tensors(1, 37, *heads)
        _close(decode_attention(q, k, v), _reference(q, k, v, torch.ones(1, 37, dtype=torch.bool)))


def test_a_mask_never_goes_with_shared_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they leave a GPU the unfused kernel alone."""
    given, seen = F.scaled_dot_product_attention, []

    def noted(
        *tensors: Any, attn_mask: Any = None, enable_gqa: bool = False, **options: Any
    ) -> Any:
        seen.append(attn_mask is not None)
        assert not (enable_gqa and attn_mask is not None)
        assert tensors[0].shape[1] == tensors[1].shape[1] or enable_gqa
        return given(*tensors, attn_mask=attn_mask, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    q, k, v = _tensors(32, 96)
    prefill_attention(q, k, v, attention.causal_mask(32, 96, "cpu"))
    attention.block_sparse_attention(attention.block_layout(32, 96, 16, 0.5), 32, 96, 16)(q, k, v)
    places = torch.arange(0, 96, 3).expand(2, 32)
    out = routed_attention(q, k, v, places)
    assert all(seen)
    monkeypatch.undo()
    mask = torch.arange(96)[None] <= places[0][:, None]
    _close(out, _reference(q, k, v, mask))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
def test_a_layout_keeps_the_share_it_was_asked_for(density: float) -> None:
    layout = attention.block_layout(4096, 4096, 64, density)
    causal = 64 * 65 / 2
    assert density * causal <= int(layout.sum()) <= density * causal + 64
    assert bool(layout.diagonal().all())
    assert not layout.triu(1).any()


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "block"),
    [(64, 64, 16), (50, 50, 16), (32, 96, 16), (64, 64, 64), (200, 200, 64)],
)
def test_blocks_of_a_table(q_len: int, kv_len: int, block: int, density: float) -> None:
    _check_blocks(q_len, kv_len, block, density)


def test_queries_at_places_and_sequences_that_run() -> None:
    _check_places()
    _check_running()


@pytest.fixture
def counter() -> Any:
    """A backend that counts what is compiled; its import takes seconds."""
    from torch._dynamo.testing import CompileCounter

    return CompileCounter()


def test_one_compiled_function_serves_all_shapes(
    recompiling: Any, counter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = attention.compiled(True, counter)
    monkeypatch.setattr(torch_flex, "flex_attention", fused)
    for block in (16, 64):
        for length in range(128, 64 * 14, 64):
            _check_blocks(length, length, block, 0.5)
    assert counter.frame_count <= 4  # by block; twelve lengths each


@pytest.mark.parametrize("edge", [16, 32, 48, 64, 80, 96])
def test_tiles_divide_blocks_as_torchs_own_need_not(edge: int) -> None:
    """Torch refuses to lower a mask whose blocks its tile does not divide."""
    options = attention.tile_options(edge)
    for size in (options["BLOCK_M"], options["BLOCK_N"]):
        assert edge % size == 0
        assert size >= attention.LEAST


def test_blocks_that_no_tile_divides_are_refused_by_name() -> None:
    op = Operator("attention_block_sparse", "fp32", block=24, density=0.5, **ATTENTION)
    with pytest.raises(
        Unsupported, match="block: expected a multiple of its smallest tile, 16, got 24"
    ):
        build(op, CPU, Arena("cpu", 1e5, 1e8))


def test_a_block_sparse_operator_is_fused_on_a_gpu_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    op = Operator("attention_block_sparse", "fp32", block=16, density=0.5, **ATTENTION)
    fused, plain = (build(op, place, Arena("cpu", 1e5, 1e8)) for place in (CPU, "cpu"))
    assert fused.how == ", one fused kernel (flex attention)"
    assert "gather" in plain.how
    _close(fused.launch(1), plain.launch(1))

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("Q and KV block size must be divisible by BLOCK_M and BLOCK_N.\nmore")

    monkeypatch.setattr(attention, "_attend", broken)
    with pytest.raises(
        Unsupported, match=r"did not compile: ValueError: Q and KV block size must be divisible"
    ) as got:
        build(op, CPU, Arena("cpu", 1e5, 1e8))
    assert "\n" not in str(got.value)

    def lost(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(attention, "_attend", lost)
    with pytest.raises(RuntimeError, match="CUDA error"):
        build(op, CPU, Arena("cpu", 1e5, 1e8))


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_masks_skip_what_dense_ones_hide(
    recompiling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, per_shape = attention.compiled(True), attention.compiled(False)

    def pick(*tensors: Any, kernel_options: Any, **options: Any) -> Any:
        # options are of Triton's kernel
        return (fused if kernel_options else per_shape)(*tensors, **options)

    monkeypatch.setattr(torch_flex, "flex_attention", pick)
    for shape in ((192, 320, 64), (200, 200, 64)):
        _check_blocks(*shape, 0.5)
    _check_places()
    _check_running()


# -- libraries

SHAPE: dict[str, int] = {"batch": 3, "heads": 4, "kv_heads": 2, "head_dim": 16}


def _causal(q: Any, k: Any, v: Any) -> Any:
    """Attention over (positions, heads, head_dim), the last queries of the keys."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    )[0].transpose(0, 1)


def _paged(cache: Any, pages: Any, length: int) -> Any:
    return cache[pages.long()].flatten(0, 1)[:length]


class Decode:
    """``flashinfer.BatchDecodeWithPagedKVCacheWrapper``, without what is not used here."""

    def __init__(
        self,
        float_workspace_buffer: Any,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        *,
        use_tensor_cores: bool = False,
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert not float_workspace_buffer.any()  # it holds counters
        assert kv_layout == "NHD"

    def plan(
        self,
        indptr: Any,
        indices: Any,
        last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        *,
        q_data_type: Any = "float16",
    ) -> None:
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
            out.append(
                _causal(one[None], *(_paged(cache, pages, length) for cache in paged_kv_cache))
            )
        return torch.cat(out)


class Prefill:
    """``flashinfer.BatchPrefillWithRaggedKVCacheWrapper``, without what is not used here."""

    def __init__(self, float_workspace_buffer: Any, kv_layout: str = "NHD") -> None:
        assert kv_layout == "NHD"

    def plan(
        self,
        qo_indptr: Any,
        kv_indptr: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        *,
        causal: bool = False,
        q_data_type: Any = "float16",
    ) -> None:
        assert causal
        assert qo_indptr.dtype == kv_indptr.dtype == torch.int32
        self.ends = qo_indptr.tolist(), kv_indptr.tolist()

    def run(self, q: Any, k: Any, v: Any) -> Any:
        rows, keys = self.ends
        cuts = [(slice(*rows[i : i + 2]), slice(*keys[i : i + 2])) for i in range(len(rows) - 1)]
        return torch.cat([_causal(q[a], k[b], v[b]) for a, b in cuts])


class VllmFlashAttention:
    """``vllm.vllm_flash_attn`` of vLLM 0.32, without the parameters that are not used here, on a
    GPU that has some releases of FlashAttention."""

    def __init__(self, *releases: int) -> None:
        self.releases = releases

    def is_fa_version_supported(self, fa_version: int) -> bool:
        return fa_version in self.releases

    def get_scheduler_metadata(
        self,
        batch_size: int,
        max_seqlen_q: int,
        max_seqlen_k: int,
        num_heads_q: int,
        num_heads_kv: int,
        headdim: int,
        cache_seqlens: Any,
        qkv_dtype: Any = torch.bfloat16,
        cu_seqlens_q: Any = None,
        page_size: int | None = None,
        causal: bool = False,
    ) -> str:
        assert len(cache_seqlens) == batch_size == len(cu_seqlens_q) - 1
        assert page_size == 16
        assert causal
        return f"schedule of {max_seqlen_q} x {max_seqlen_k}, {num_heads_q} x {headdim}"

    def flash_attn_varlen_func(
        self,
        q: Any,
        k: Any,
        v: Any,
        max_seqlen_q: int,
        cu_seqlens_q: Any,
        max_seqlen_k: int,
        seqused_k: Any = None,
        causal: bool = False,
        block_table: Any = None,
        scheduler_metadata: Any = None,
        fa_version: int = 2,
    ) -> Any:
        assert causal
        assert fa_version in self.releases
        assert (scheduler_metadata is not None) == (fa_version == 3)
        assert cu_seqlens_q.dtype == seqused_k.dtype == block_table.dtype == torch.int32
        ends = cu_seqlens_q.tolist()
        out = []
        for i, (pages, length) in enumerate(zip(block_table, seqused_k.tolist(), strict=True)):
            assert ends[i + 1] - ends[i] == max_seqlen_q
            assert length == max_seqlen_k
            keys, values = (_paged(cache, pages, length) for cache in (k, v))
            out.append(_causal(q[ends[i] : ends[i + 1]], keys, values))
        return torch.cat(out)


def install_vllm(monkeypatch: pytest.MonkeyPatch, *releases: int) -> None:
    package = SimpleNamespace(__version__="0.32.0")
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", VllmFlashAttention(*releases))


def test_vllm_runs_flash_attention_3_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert engine_library() is None
    for releases, runs in (((2, 3, 4), 3), ((2, 4), 4), ((2,), 2)):
        install_vllm(monkeypatch, *releases)
        library = engine_library()
        assert library is not None
        assert library.version == f"vllm 0.32.0, FlashAttention {runs}"
        for kind, q_len in (("attention_prefill", 40), ("attention_decode", 1)):
            op = Operator(kind, "fp32", q_len=q_len, kv_len=40, library="vllm", **SHAPE)
            q, cache = _operands(library, op)
            found = library.bind(op, torch.float32, "cpu")(q, *cache).view(q.shape)
            order = torch.randperm(9, generator=torch.Generator().manual_seed(40)).view(3, 3)
            k, v = (
                torch.stack([_paged(c, row, 40) for row in order]).transpose(1, 2) for c in cache
            )
            mask = torch.ones(q_len, 40, dtype=torch.bool).tril(40 - q_len)
            expected = prefill_attention(q.transpose(1, 2), k, v, mask)
            torch.testing.assert_close(found.transpose(1, 2), expected)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> AttentionLibrary:
    functions: dict[str, Any] = {
        "BatchDecodeWithPagedKVCacheWrapper": Decode,
        "BatchPrefillWithRaggedKVCacheWrapper": Prefill,
    }
    monkeypatch.setitem(sys.modules, "vllm", None)
    module = SimpleNamespace(__version__="9.9", **functions)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    # memory of others
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.ones(*size, **options))
    found = engine_library()
    assert found is not None
    assert found.version == "flashinfer 9.9"
    return found


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
    pages = -(-kv_len // PAGE)
    assert cache.shape[1:3] == (3 * pages, PAGE)
    found = library.bind(op, torch.float32, "cpu")(q, *cache).view(3, 4, 1, 16)
    order = torch.randperm(3 * pages, generator=torch.Generator().manual_seed(kv_len)).view(
        3, pages
    )
    k, v = (torch.stack([_paged(c, row, kv_len) for row in order]).transpose(1, 2) for c in cache)
    torch.testing.assert_close(found, decode_attention(q.transpose(1, 2), k, v))


def test_flash_attention_comes_first_on_a_gpu() -> None:
    """Torch's own order differs by version."""

    def attend(i: int) -> Any:
        return i, torch._C._get_sdp_priority_order()[:2]

    flash, cudnn = (int(SDPBackend.FLASH_ATTENTION), int(SDPBackend.CUDNN_ATTENTION))
    assert in_order_of_backends(attend)(7) == (7, [flash, cudnn])
    assert torch.backends.cuda.math_sdp_enabled()


def test_attention_on_a_gpu_says_how_it_runs() -> None:
    for kind, q_len in (("attention_prefill", 64), ("attention_decode", 1)):
        op = Operator(kind, "fp32", q_len=q_len, kv_len=64, **SHAPE)
        assert build(op, CPU, Arena("cpu", 1e5, 1e8)).how.startswith(", SDPA of torch")
        assert build(op, "cpu", Arena("cpu", 1e5, 1e8)).how == ""
