"""Steps with a token budget: prompts that share a pass, chunks of long prompts, and prefixes in the
cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simulator
from simulator.capacity import activation_bytes, cache_bytes, weights_bytes
from simulator.codes import Kind, Phase
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.models.lower import lower
from simulator.pruning import general_families, prune
from simulator.request import SETTINGS
from simulator.workload import Workload, WorkloadBatch

pytestmark = pytest.mark.quick
MODEL = "llama-3.2-1b"


def passes(w: Workload) -> list[tuple[int, float]]:
    """Tokens and executions of each kind of prefill pass."""
    rows = w.is_role("embedding") & (w.phase == Phase.PREFILL)
    return list(zip(w.m[rows].tolist(), w.count[rows].tolist()))


def attention(w: Workload) -> list[tuple[int, int, int, float]]:
    rows = w.kind == Kind.PREFILL_ATTENTION
    columns = (w.batch[rows], w.q_len[rows], w.kv_len[rows], w.count[rows] / w.layers[rows])
    return list(zip(*(column.tolist() for column in columns)))


def serve(batch: int, seq: int, steps: int, engine: str = "vllm", **options: Any) -> Workload:
    return lower(
        MODEL, phase="serve", batch=batch, seq=seq, new_tokens=steps, engine=engine, **options
    )


def test_prompts_that_arrive_with_a_step_share_a_pass() -> None:
    # 2,048 requests of 128 new tokens: 16 prompts per decode step
    # decodes leave room for 12 of 16
    assert passes(serve(2048, 512, 128)) == [(12 * 512, 2048 / 12)]
    assert passes(serve(512, 1024, 128, token_budget=10**6)) == [(4 * 1024, 128.0)]
    assert passes(serve(64, 2048, 1024)) == [(2048, 64.0)]  # fewer than one arrives: one
    assert passes(serve(64, 128, 1024)) == [(1024, 8.0)]  # short prompts of neighbouring steps
    assert passes(serve(3, 128, 1024)) == [(3 * 128, 1.0)]  # no more than there are
    assert passes(serve(64, 1024, 1024, "sglang")) == [(8192, 8.0)]  # waiting prompts first
    assert passes(serve(64, 128, 4, "reference")) == [(128, 64.0)]  # not a server


def test_a_longer_prompt_runs_in_chunks_that_attend_to_the_earlier_ones() -> None:
    w = lower(MODEL, phase="prefill", batch=2, seq=20_000)
    assert passes(w) == [(8192, 4.0), (20_000 - 2 * 8192, 2.0)]
    assert attention(w) == [(1, 8192, 8192, 2.0), (1, 8192, 16384, 2.0), (1, 3616, 20_000, 2.0)]
    # TensorRT-LLM has no chunks by default
    assert passes(lower(MODEL, phase="prefill", seq=20_000, engine="trtllm")) == [(20_000, 1.0)]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 40),
    seq=st.integers(1, 9000),
    budget=st.integers(64, 9000),
    cached=st.floats(0.0, 0.99),
)
def test_chunks_compute_what_one_pass_computes(
    batch: int, seq: int, budget: int, cached: float
) -> None:
    whole = lower(
        MODEL, phase="prefill", batch=batch, seq=seq, cached_prefix=cached, token_budget=2**31 - 1
    )
    parts = lower(
        MODEL, phase="prefill", batch=batch, seq=seq, cached_prefix=cached, token_budget=budget
    )
    layers = whole.layer >= 0, parts.layer >= 0
    assert whole.flops[layers[0]].sum() == pytest.approx(parts.flops[layers[1]].sum(), rel=1e-12)
    assert whole.parameters == pytest.approx(parts.parameters, rel=1e-12)
    many = batch * (seq - int(cached * seq))
    assert sum(tokens * times for tokens, times in passes(parts)) == pytest.approx(many)
    assert max(tokens for tokens, _ in passes(parts)) <= max(budget, 1)
    ours, theirs = (WorkloadBatch.of([w]) for w in (parts, whole))
    assert cache_bytes(ours)[0] == pytest.approx(cache_bytes(theirs)[0])
    assert weights_bytes(ours)[0] == pytest.approx(weights_bytes(theirs)[0])
    assert activation_bytes(ours)[0] <= activation_bytes(theirs)[0] * (1 + 1e-12)


@pytest.mark.parametrize("family", general_families())
def test_every_family_prunes_chunks_as_it_prunes_a_prompt(family: str) -> None:
    options: dict[str, Any] = {"batch": 4, "seq": 1024, "engine": "reference"}
    alone = prune(lower(MODEL, phase="generate", new_tokens=2, **options), family, 0.5)
    chunks = prune(
        lower(MODEL, phase="generate", new_tokens=2, token_budget=2048, **options), family, 0.5
    )
    assert passes(chunks) == [(2048, 2.0)]
    rows = [w.phase == Phase.PREFILL for w in (alone, chunks)]
    gemms = [(w.kind == Kind.GEMM) & (w.layer >= 0) & at for w, at in zip((alone, chunks), rows)]
    pairs = [w.is_attention & at for w, at in zip((alone, chunks), rows)]
    for some in (gemms, pairs):
        ours, theirs = (float(w.flops[at].sum()) for w, at in zip((alone, chunks), some))
        assert ours == pytest.approx(theirs, rel=2e-3)
    assert alone.parameters == pytest.approx(chunks.parameters, rel=1e-9)


def test_a_cached_prefix_in_percent_is_a_share() -> None:
    parse = SETTINGS["cached_prefix"].accepts.parse
    assert [parse(text) for text in ("0.5", "99.9 %", "0%", "1", "2k")] == [
        0.5,
        0.999,
        0.0,
        1.0,
        2048.0,
    ]
    for text in ("100%", "200 %"):
        with pytest.raises(InputError, match="expected a share of the prompt below 100 %"):
            parse(text)


def test_a_cached_prefix_is_read_but_not_computed() -> None:
    w = lower(MODEL, phase="prefill", seq=2048, cached_prefix=512)
    assert attention(w) == [(1, 1536, 2048, 1.0)]
    assert passes(w) == [(1536, 1.0)]
    assert passes(lower(MODEL, phase="prefill", seq=2048, cached_prefix=0.25)) == passes(w)
    decode = lower(MODEL, phase="decode", seq=2048, cached_prefix=512)
    assert passes(decode) == passes(lower(MODEL, phase="decode", seq=2048))
    serve: dict[str, Any] = {"phase": "serve", "batch": 16, "seq": 4096}
    (r,) = simulator.table(MODEL, "h100", "depth", 0.25, **serve, cached_prefix=0.75)
    (other,) = simulator.table(MODEL, "h100", "depth", 0.25, **serve)
    assert r.dense_s < other.dense_s
    assert r.dense_ttft_s is not None
    assert other.dense_ttft_s is not None
    server = load_engine("vllm").each_request.value
    assert r.dense_ttft_s - server < 0.5 * (other.dense_ttft_s - server)


@pytest.mark.parametrize("prefix", [-1, 2048, 1.5, 5000, float("nan")])
def test_a_prefix_that_leaves_nothing_to_compute_is_refused(prefix: Any) -> None:
    with pytest.raises(InputError, match=r"cached_prefix: expected"):
        lower(MODEL, phase="prefill", seq=2048, cached_prefix=prefix)


def test_the_budget_follows_the_gpu() -> None:
    found = simulator.table(
        "llama-3.1-8b", ["a100", "h100"], "depth", 0.25, phase="prefill", batch=4
    )
    own = [
        simulator.load_engine("vllm").limit(hw.memory_bytes, hw.name)
        for hw in hardware("a100", "h100")
    ]
    assert [limit.tokens for limit in own if limit] == [2048, 8192]
    for r, hw, limit in zip(found, hardware("a100", "h100"), own):
        assert limit is not None
        dense = lower(
            "llama-3.1-8b",
            phase="prefill",
            batch=4,
            seq=2048,
            engine="vllm",
            token_budget=limit.tokens,
        )
        assert r.dense_s == pytest.approx(simulator.workload_time(dense, hw).total_s)
    assert [r.hardware for r in found] == [hw.label for hw in hardware("a100", "h100")]


def hardware(*names: str) -> list[Any]:
    return [simulator.load_hardware(name) for name in names]


def test_a_server_leaves_memory_to_others(tmp_path: Path) -> None:
    text = Path(simulator.__file__).parent.joinpath("engines", "vllm.yaml").read_text()
    largest = []
    for share in (0.5, 0.9, 1.0):
        path = tmp_path / f"{share}.yaml"
        lines = [line for line in text.splitlines() if not line.startswith("memory:")]
        path.write_text("\n".join([*lines, f"memory: {{value: {share}, source: serving}}\n"]))
        (r,) = simulator.table(
            "llama-3.1-8b",
            "h100",
            "depth",
            0.25,
            phase="serve",
            batch=8,
            seq=4096,
            engine=str(path),
        )
        largest.append(r.dense_largest_batch)
        assert r.capacity_bytes == share * hardware("h100")[0].memory_bytes
        (decode,) = simulator.table(
            "llama-3.1-8b", "h100", "depth", 0.25, batch=8, seq=4096, engine=str(path)
        )
        assert decode.capacity_bytes == r.capacity_bytes
    sequence = 2 * 32 * 8 * 128 * 2 * (4096 + 64)  # bytes of keys and values
    expected = 0.1 * hardware("h100")[0].memory_bytes / sequence
    assert largest[2] - largest[1] == pytest.approx(expected, abs=1)
    assert largest[1] - largest[0] == pytest.approx(4 * expected, abs=1)


def test_a_shared_prefix_is_stored_once() -> None:
    prunings = ["depth 0.5", "kv_cache 0.5"]
    alone, shared = (
        simulator.table(
            "llama-3.1-8b",
            "h100",
            prune=prunings,
            phase="serve",
            batch=8,
            seq=4096,
            cached_prefix=n,
        )
        for n in (0, 2048)
    )
    assert [r.cached_prefix for r in shared] == [2048, 2048]
    own = (4096 + 64 - 2048) / (4096 + 64)
    assert shared[0].dense_largest_batch == pytest.approx(
        alone[0].dense_largest_batch / own, rel=0.02
    )
    # a cache with evicted positions is not shared
    assert shared[1].pruned_largest_batch == pytest.approx(alone[1].pruned_largest_batch, rel=0.02)
    held = [serve(n, 4096, 128, cached_prefix=2048) for n in (8, 9)]
    eight, nine = (float(cache_bytes(WorkloadBatch.of([w]))[0]) for w in held)
    # keys and values of 8 heads in 16 layers
    assert eight - 8 * (nine - eight) == 2048 * 2 * 2 * 8 * 64 * 16
