"""Attention that skips blocks as one fused kernel: its masks, its one compilation, and that a failure is said."""

from __future__ import annotations

from collections.abc import Iterator
from shutil import which
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.nn.attention.flex_attention as torch_flex  # noqa: E402
from decoder_reference import layout_mask  # noqa: E402
from pretended_cuda import CPU  # noqa: E402

from calibration.devices import Operator, Unsupported, flex  # noqa: E402
from calibration.devices.attention import block_layout, decode_attention  # noqa: E402
from calibration.devices.operators import Arena, build  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
ATTENTION: dict[str, Any] = {"batch": 1, "q_len": 64, "kv_len": 64, "heads": 4, "kv_heads": 2, "head_dim": 16}


@pytest.fixture
def recompiling() -> Iterator[Any]:
    """Torch's settings of recompilation, given back; nothing compiled before or after."""
    config = torch._dynamo.config
    limit = config.recompile_limit
    torch._dynamo.reset()
    flex.compiled.cache_clear()
    with torch.no_grad():
        yield config
    config.recompile_limit = limit
    torch._dynamo.reset()
    flex.compiled.cache_clear()


def _tensors(q_len: int, kv_len: int, heads: int = 4, kv_heads: int = 2, batch: int = 2) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, q_len, 16, generator=generator)
    k, v = (torch.randn(batch, kv_heads, kv_len, 16, generator=generator) for _ in range(2))
    return q, k, v


def _dense(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _close(value: Any, reference: Any) -> None:
    torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


def _check_blocks(q_len: int, kv_len: int, block: int, density: float) -> None:
    q, k, v = _tensors(q_len, kv_len)
    table = block_layout(q_len, kv_len, block, density)
    reference = _dense(q, k, v, layout_mask(table, q_len, kv_len, block))
    _close(flex.block_sparse(table, q_len, kv_len, block)(q, k, v), reference)


def _check_places() -> None:
    q, k, v = _tensors(300, 500)
    generator = torch.Generator().manual_seed(0)
    places = torch.stack([torch.randperm(500, generator=generator)[:300].sort().values for _ in range(2)])
    places[1, 140:] = -1
    out = flex.at_positions(q, k, v, places)
    reference = _dense(q, k, v, (torch.arange(500) <= places[..., None])[:, None])
    _close(out[0], reference[0])
    _close(out[1, :, :140], reference[1, :, :140])
    assert torch.isfinite(out).all()


def _check_running() -> None:
    q, k, v = _tensors(1, 300, batch=3)
    runs = torch.tensor([[1, 0], [0, 0], [1, 1]], dtype=torch.bool)
    _close(flex.running(q, k, v, runs), decode_attention(q, k, v) * runs.repeat_interleave(2, 1)[..., None, None])


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
@pytest.mark.parametrize(("q_len", "kv_len", "block"), [(64, 64, 16), (50, 50, 16), (32, 96, 16), (200, 200, 64)])
def test_blocks_of_a_table(q_len: int, kv_len: int, block: int, density: float) -> None:
    _check_blocks(q_len, kv_len, block, density)


def test_queries_at_places_and_sequences_that_run() -> None:
    _check_places()
    _check_running()


def test_masks_are_made_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_attend", lambda q, *_, **__: q)
    q, k, v = (t.to("meta") for t in _tensors(200, 200))
    flex.block_sparse(torch.zeros(13, 13, dtype=torch.bool, device="meta"), 200, 200, 16)(q, k, v)
    flex.at_positions(q, k, v, torch.zeros(2, 200, dtype=torch.long, device="meta"))
    flex.running(q[:, :, :1], k, v, torch.zeros(2, 2, dtype=torch.bool, device="meta"))
    with pytest.raises(RuntimeError, match="meta"):  # as a read of data would have been
        k.sum().item()


@pytest.fixture
def counter() -> Any:
    """A backend that counts what is compiled; its import takes seconds."""
    from torch._dynamo.testing import CompileCounter

    return CompileCounter()


def test_one_compiled_function_serves_all_shapes(
    recompiling: Any, counter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = flex.compiled(True, counter)
    monkeypatch.setattr(torch_flex, "flex_attention", fused)
    for block in (16, 64):
        for length in range(128, 64 * 14, 64):
            _check_blocks(length, length, block, 0.5)
    assert counter.frame_count <= 4  # by block; twelve lengths each


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_tiles_divide_blocks_as_torchs_own_need_not(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's choice for a GPU; it refuses to lower a mask whose blocks its tile does not divide."""
    choices = pytest.importorskip("torch._inductor.virtualized").V.choices
    if not hasattr(choices, "get_flex_attention_fwd_configs"):
        pytest.skip("this torch keeps its tiles elsewhere")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    own = [
        size
        for width in (64, 128)
        for conf in choices.get_flex_attention_fwd_configs(width, torch.bfloat16, "cuda")
        for size in (conf.block_m, conf.block_n)
    ]
    assert any(64 % size for size in own)
    for edge in (16, 32, 48, 64, 80, 96, 128, 192, 256):
        options = flex.tile_options(edge)
        for size in (options["BLOCK_M"], options["BLOCK_N"]) if "BLOCK_M" in options else own:
            assert edge % size == 0
            assert size >= flex.LEAST


def test_blocks_that_no_tile_divides_are_refused_by_name() -> None:
    op = Operator("attention_block_sparse", "fp32", block=24, density=0.5, **ATTENTION)
    with pytest.raises(Unsupported, match="block: expected a multiple of its smallest tile, 16, got 24"):
        build(op, CPU, Arena("cpu", 1e5, 1e8))


def test_a_block_sparse_operator_is_fused_on_a_gpu_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    op = Operator("attention_block_sparse", "fp32", block=16, density=0.5, **ATTENTION)
    fused, plain = (build(op, place, Arena("cpu", 1e5, 1e8)) for place in (CPU, "cpu"))
    assert fused.how == ", one fused kernel (flex attention)"
    assert "gather" in plain.how
    _close(fused.launch(1), plain.launch(1))

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("Q and KV block size must be divisible by BLOCK_M and BLOCK_N.\nmore")

    monkeypatch.setattr(flex, "_attend", broken)
    with pytest.raises(Unsupported, match=r"did not compile: ValueError: Q and KV block size must be divisible") as got:
        build(op, CPU, Arena("cpu", 1e5, 1e8))
    assert "\n" not in str(got.value)

    def lost(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(flex, "_attend", lost)
    with pytest.raises(RuntimeError, match="CUDA error"):
        build(op, CPU, Arena("cpu", 1e5, 1e8))


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_masks_skip_what_dense_ones_hide(recompiling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, per_shape = flex.compiled(True), flex.compiled(False)

    def pick(*tensors: Any, kernel_options: Any, **options: Any) -> Any:
        return (fused if kernel_options else per_shape)(*tensors, **options)  # options are of Triton's kernel

    monkeypatch.setattr(torch_flex, "flex_attention", pick)
    for shape in ((192, 320, 64), (200, 200, 64)):
        _check_blocks(*shape, 0.5)
    _check_places()
    _check_running()
