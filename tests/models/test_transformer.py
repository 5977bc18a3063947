"""Lowering: FLOPs, parameters and bytes against counts made here, matrix by matrix."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from model_shapes import PUBLISHED, pass_flops
from shaped import layer, model_of
from tables import tables_of

from simulator.capacity import memory, weights_bytes
from simulator.codes import DTYPES, PHASES, ROLES, Kind, Part, Phase
from simulator.engines.engine import list_engines
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.models import lower as lowering
from simulator.models.library import list_models, load_model
from simulator.prediction.table import speedup
from simulator.pruning import prune
from simulator.uncertainty.intervals import workload_time
from simulator.workload import Workload, WorkloadBatch

# bare kernels: a GEMM per projection, logits of the last position
lower = partial(lowering.lower, phase="prefill", engine="")
FUSED = {"engine": "vllm"}
ALL_LOGITS = {"engine": "reference"}


def roles(w: Workload) -> list[str]:
    return [ROLES[code] for code in w.role]


def row(w: Workload, role: str) -> SimpleNamespace:
    """The first row of a role."""
    at = np.flatnonzero(w.is_role(role))[0]
    return SimpleNamespace(**{name: getattr(w, name)[at].item() for name in w.SCHEMA})


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_rows_own_exactly_the_models_parameters(name: str, phase: str) -> None:
    options = {
        "phase": phase,
        "batch": 2,
        "seq": 100,
        "new_tokens": 3 * (phase in ("generate", "serve")),
    }
    for engine in ("", *list_engines()):
        w = lower(load_model(name), **options, engine=engine, weight_dtype="bf16")
        assert w.parameters == PUBLISHED[name].parameters
        assert weights_bytes(WorkloadBatch.of([w]))[0] == 2 * PUBLISHED[name].parameters


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_flops_equal_a_count_matrix_by_matrix(name: str) -> None:
    p = PUBLISHED[name]
    windows = {"gemma-2-9b": (4096, 2), "phi-3-mini-4k": (2047, 1), "mistral-7b-v0.1": (4096, 1)}
    windows |= dict.fromkeys(("gpt-oss-20b", "gpt-oss-120b"), (128, 2))
    reach, step = windows.get(name, (0, 1))
    window = dict.fromkeys(range(0, p.layers, step), reach)
    if name in ("gemma-3-12b", "gemma-3-27b"):  # five of six layers
        window = {layer: 1024 for layer in range(p.layers) if layer % 6 != 5}
    for batch, seq, every in ((1, 5000, False), (3, 77, True)):
        expected = pass_flops(p, batch, seq, every_logit=every, window=window)
        w = lower(load_model(name), batch=batch, seq=seq, **(ALL_LOGITS if every else {}))
        assert w.flops.sum() == pytest.approx(expected, rel=1e-12)


def test_flops_against_published_figures() -> None:
    # LLM-Pruner (arXiv 2305.11627, table 3): LLaMA-7B, one sequence of 64 tokens, 424.02 G
    # multiply-adds. Its counter takes all 64 x 64 scores, not the causal half, and adds elementwise
    # work, so ours, causal, is a little lower.
    ours = lower(load_model("llama-7b"), seq=64, **ALL_LOGITS).flops.sum() / 2
    p = PUBLISHED["llama-7b"]
    full = pass_flops(p, 1, 64, causal=False, every_logit=True) / 2
    assert ours == pytest.approx(423.398e9, rel=1e-6)
    assert full == pytest.approx(424.02e9, rel=3e-4)
    assert ours < full < 424.02e9
    assert full - ours == 2 * 4096 * 32 * (64 * 64 - 64 * 65 // 2)
    # calflops (MrYxJ/calculate-flops.pytorch, its table of LLMs): llama-7b at (1, 128), 1700.06
    # GFLOP, counted likewise
    assert pass_flops(p, 1, 128, causal=False, every_logit=True) == pytest.approx(
        1700.06e9, rel=1e-4
    )


@pytest.mark.parametrize(
    "name", ["llama-2-70b", "gemma-2-9b", "opt-13b", "pythia-6.9b", "qwen2.5-0.5b"]
)
def test_flops_and_minimum_bytes_of_a_decode(name: str) -> None:
    """Weights once, cache once, activations of each GEMM in and out."""
    p, batch, seq = PUBLISHED[name], 3, 700
    w = lower(load_model(name), phase="decode", batch=batch, seq=seq)
    gemm = w.kind == Kind.GEMM
    q, kv, h, i = p.heads * p.head_dim, p.kv_heads * p.head_dim, p.hidden, p.inner
    wide = 1 if p.family in ("opt", "gpt_neox") else 2
    weights = p.layers * (h * (q + 2 * kv) + h * q + (wide + 1) * h * i) + p.vocab * h
    moved = p.layers * ((3 * h + q + 2 * kv) + (q + h) + wide * (h + i) + (i + h)) + h + p.vocab
    assert w.bytes[gemm].sum() == 2 * (weights + batch * moved)
    assert w.flops.sum() == 2 * batch * weights + 4 * batch * p.layers * q * (seq + 1)
    cache = 2 * batch * p.layers * (2 * kv * (seq + 1) + 2 * q)
    assert w.bytes[w.kind == Kind.DECODE_ATTENTION].sum() == cache


def test_rows_of_a_llama_layer_in_order() -> None:
    w = lower(load_model("llama-3.1-8b"), batch=2, seq=128)
    attention = ["attention_norm", "q", "k", "v", "rotary", "cache_write", "attention", "o"]
    mlp = ["mlp_norm", "gate", "up", "activation", "down"]
    assert roles(w) == ["embedding", *attention, *mlp, "final_norm", "lm_head"]
    inside = w.layers > 0
    assert set(zip(w.layer[inside], w.layers[inside], w.count[inside])) == {(0, 32, 32)}
    assert (w.layer[~inside] == -1).all()
    assert [Part(p).name for p in dict.fromkeys(w.part.tolist())] == [
        "EMBEDDING",
        "ATTENTION",
        "MLP",
        "HEAD",
    ]
    m, h = 256, 4096
    assert (row(w, "q").m, row(w, "q").n, row(w, "q").k) == (m, 4096, h)
    assert (row(w, "k").n, row(w, "down").k, row(w, "down").n) == (1024, 14336, h)
    assert (row(w, "lm_head").m, row(w, "lm_head").n) == (2, 128256)
    assert (row(w, "attention_norm").read_bytes, row(w, "attention_norm").write_bytes) == (
        4 * m * h,
        4 * m * h,
    )
    assert (row(w, "activation").read_bytes, row(w, "activation").write_bytes) == (
        4 * m * 14336,
        2 * m * 14336,
    )
    assert row(w, "rotary").read_bytes == row(w, "rotary").write_bytes == 2 * m * (4096 + 1024)
    assert row(w, "cache_write").read_bytes == row(w, "cache_write").write_bytes == 2 * m * 2 * 1024
    assert (row(w, "embedding").read_bytes, row(w, "embedding").params) == (2 * m * h, 128256 * h)


def test_fused_projections_do_the_same_work() -> None:
    model = load_model("llama-3.1-8b")
    split, fused = lower(model, seq=512), lower(model, seq=512, **FUSED)
    assert (row(fused, "qkv").n, row(fused, "gate_up").n) == (4096 + 2 * 1024, 2 * 14336)
    assert not fused.is_role("q", "k", "v", "gate", "up").any()
    assert fused.flops.sum() == split.flops.sum()
    # the input is read once, not three times or twice
    assert fused.bytes.sum() == split.bytes.sum() - 2 * 512 * 4096 * 32 * (2 + 1)


def test_what_is_special_to_an_architecture() -> None:
    qwen = lower(load_model("qwen3-8b"), seq=64)
    assert row(qwen, "qk_norm").params == 256
    assert row(qwen, "qk_norm").read_bytes == 2 * 64 * (32 + 8) * 128
    assert row(lower(load_model("qwen2.5-7b"), seq=64), "k").params == 512 * 3584 + 512
    gemma = lower(load_model("gemma-2-9b"), seq=64)
    assert roles(gemma).count("post_norm") == 2
    assert row(gemma, "softcap").read_bytes == 2 * 256000
    assert row(gemma, "lm_head").params == 0
    opt = lower(load_model("opt-13b"), seq=64)
    assert not {"gate", "rotary", "residual"} & set(roles(opt))
    assert row(opt, "embedding").params == (50272 + 2050) * 5120
    assert row(opt, "embedding").read_bytes == 2 * 2 * 64 * 5120
    assert row(opt, "activation").read_bytes == 2 * 64 * 20480
    neox = lower(load_model("pythia-6.9b"), seq=64)
    assert (
        row(neox, "residual").read_bytes == 2 * row(neox, "residual").write_bytes == 4 * 64 * 4096
    )
    assert row(neox, "mlp_norm").read_bytes == row(neox, "attention_norm").read_bytes / 2
    assert row(neox, "rotary").read_bytes == 2 * 64 * 2 * 32 * 32  # a quarter of each head of 128


def test_alternating_windows_of_gemma() -> None:
    model = load_model("gemma-2-9b")
    short = lower(model, seq=4096)
    assert short.is_role("attention").sum() == 1  # a window that holds all keys is none
    long = lower(model, seq=4097)
    attention = long.take(long.is_role("attention"))
    assert attention.window.tolist() == [4096, 0] * 21
    assert attention.layer.tolist() == list(range(42))
    assert attention.count.sum() == 42
    steps = lower(model, phase="generate", seq=4090, new_tokens=10)
    decodes = steps.take(steps.kind == Kind.DECODE_ATTENTION)
    assert len(decodes) == 6 + 4 * 42  # kv_len 4091 .. 4096 alike, then a row a layer
    assert decodes.count.sum() == 10 * 42


@pytest.mark.parametrize(("name", "flops"), [("llama-3.1-8b", 0.0), ("gemma-2-9b", 1e-6)])
def test_many_decodes_share_rows_and_change_nothing(
    name: str, flops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But FLOPs and bytes where a window fills up, and times a little."""
    request: dict[str, Any] = {
        "phase": "generate",
        "seq": 3000,
        "new_tokens": 4000,
        "engine": "vllm",
    }
    hw, few = load_hardware("h100"), lower(load_model(name), **request)
    families = ("depth", "kv_cache", "token")
    ratios = {f: speedup(few, prune(few, f, 0.5), hw).speedup for f in families}
    lowering._lower.cache_clear()
    monkeypatch.setattr(lowering, "DECODE_LENGTHS", 1_000_000)
    each = lower(load_model(name), **request)
    assert len(few) < 0.4 * len(each)
    assert few.count.sum() == each.count.sum()
    for column in ("flops", "bytes"):
        assert getattr(few, column).sum() == pytest.approx(
            getattr(each, column).sum(), rel=flops or 1e-12
        )
    assert memory(few, hw) == memory(each, hw)
    assert workload_time(few, hw).total_s == pytest.approx(
        workload_time(each, hw).total_s, rel=1e-4
    )
    for family in families:
        ratio = speedup(each, prune(each, family, 0.5), hw).speedup
        assert ratio == pytest.approx(ratios[family], rel=1e-4), family
    lowering._lower.cache_clear()


def test_formats_apart() -> None:
    w = lower(load_model("llama-2-7b"), seq=64, dtype="fp8", weight_dtype="int4", kv_dtype="int8")
    gemm = w.take((w.kind == Kind.GEMM) & (w.layers > 0))
    assert {DTYPES[c] for c in gemm.dtype} == {"fp8"}
    assert {DTYPES[c] for c in gemm.weight_dtype} == {"int4"}
    head, attention = w.take(w.is_role("lm_head")), w.take(w.is_role("attention"))
    assert (
        DTYPES[head.dtype[0]]
        == DTYPES[head.weight_dtype[0]]
        == DTYPES[attention.dtype[0]]
        == "bf16"
    )
    assert DTYPES[attention.weight_dtype[0]] == "int8"
    assert row(w, "cache_write").write_bytes == row(w, "cache_write").read_bytes / 2
    full = lower(load_model("llama-2-7b"), seq=64, dtype="fp32")
    assert row(full, "final_norm").read_bytes == 2 * row(w, "final_norm").read_bytes
    assert w.meta.dtype == "fp8"


WIDE = ["llama-2-70b", "llama-3.1-70b", "qwen3-32b", "gemma-2-9b", "opt-66b", "pythia-6.9b"]


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_tensor_parallel_shares_the_matrices_evenly(name: str, devices: int, phase: str) -> None:
    one, part = (
        lower(load_model(name), phase=phase, batch=2, seq=64, devices=n) for n in (1, devices)
    )
    for kind in Kind:
        assert part.flops[part.kind == kind].sum() * devices == one.flops[one.kind == kind].sum()


def test_shapes_of_llama_2_70b_on_eight() -> None:
    w = lower(load_model("llama-2-70b"), batch=4, seq=128, devices=8)
    gemm = w.take(w.kind == Kind.GEMM)
    shapes = {ROLES[r]: (int(n), int(k)) for r, n, k in zip(gemm.role, gemm.n, gemm.k, strict=True)}
    expected = {"q": (1024, 8192), "k": (128, 8192), "v": (128, 8192), "o": (8192, 1024)}
    expected |= {
        "gate": (3584, 8192),
        "up": (3584, 8192),
        "down": (8192, 3584),
        "lm_head": (4000, 8192),
    }
    assert shapes == expected
    reduce = w.take(w.is_role("all_reduce"))
    assert [Part(p) for p in reduce.part] == [Part.EMBEDDING, Part.ATTENTION, Part.MLP]
    assert reduce.count.tolist() == [1, 80, 80]
    assert (reduce.read_bytes == 512 * 8192 * 2).all()
    assert (reduce.batch == 8).all()
    names = [ROLES[c] for c in w.role]
    assert names[names.index("o") + 1] == names[names.index("down") + 1] == "all_reduce"
    gather = w.take(w.is_role("all_gather"))
    assert (gather.read_bytes.tolist(), gather.batch.tolist()) == ([4 * 32000 * 2], [8])
    norms = 8192 * (2 * 80 + 1)  # whole on each device
    assert w.parameters == (PUBLISHED["llama-2-70b"].parameters - norms) / 8 + norms
    w = lower(load_model("llama-2-70b"), phase="decode", batch=1, seq=100, devices=16)
    attention = w.take(w.is_role("attention"))
    # few key/value heads are replicated
    assert (attention.heads.tolist(), attention.kv_heads.tolist()) == ([4], [1])
    assert w.n[w.is_role("k")].tolist() == [128]


@pytest.mark.parametrize(
    ("model", "devices", "parallel", "reason"), tables_of("models/cases.yaml")["indivisible"]
)
def test_what_does_not_divide_is_refused(
    model: Any, devices: int, parallel: str, reason: str
) -> None:
    with pytest.raises(InputError, match=f"devices {devices}: .*{reason}"):
        lower(load_model(model), devices=devices, parallel=parallel)


def test_pipeline_sends_and_nothing_else() -> None:
    model = load_model("llama-2-70b")
    one, four = (
        lower(model, batch=2, seq=64),
        lower(model, batch=2, seq=64, devices=4, parallel="pipeline"),
    )
    send = four.take(four.is_role("send"))
    assert (send.count.tolist(), send.read_bytes.tolist(), send.batch.tolist()) == (
        [3],
        [128 * 8192 * 2],
        [2],
    )
    rest = four.take(~four.is_role("send"))
    assert rest.flops.tolist() == one.flops.tolist()
    assert rest.role.tolist() == one.role.tolist()
    assert (four.meta.devices, four.meta.parallel, one.meta.parallel) == (4, "pipeline", "none")
    steps = lower(
        model, phase="generate", batch=2, seq=64, new_tokens=5, devices=4, parallel="pipeline"
    )
    assert steps.count[steps.is_role("send")].tolist() == [3, 15]


names = st.sampled_from(list_models())


@settings(max_examples=40, deadline=None)
@given(
    name=names,
    batch=st.integers(1, 8),
    seq=st.integers(1, 9000),
    steps=st.integers(1, 6),
    options=st.sampled_from(
        [{}, FUSED, FUSED | {"devices": 2}, {"devices": 4, "parallel": "pipeline"}]
    ),
)
def test_generate_is_a_prefill_and_its_decodes(
    name: str, batch: int, seq: int, steps: int, options: dict[str, Any]
) -> None:
    assume(name != "smollm2-135m" or options.get("devices") != 2)  # its 9 heads do not divide
    model, options = load_model(name), {"batch": batch, **options}
    whole = lower(model, phase="generate", seq=seq, new_tokens=steps, **options)
    parts = [lower(model, phase="prefill", seq=seq, **options)]
    parts += [lower(model, phase="decode", seq=seq + t, **options) for t in range(steps)]
    assert whole.parameters == parts[0].parameters
    for phase, its in ((Phase.PREFILL, parts[:1]), (Phase.DECODE, parts[1:])):
        rows = whole.phase == phase
        for column in ("flops", "bytes", "count"):
            total = sum(getattr(p, column).sum() for p in its)
            assert getattr(whole, column)[rows].sum() == pytest.approx(total, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    windows=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    seq=st.integers(1, 15),
    steps=st.integers(1, 8),
)
def test_any_windows_against_a_count_key_by_key(windows: list[int], seq: int, steps: int) -> None:
    layers = [layer(2, 1, 16, head_dim=4, window=window) for window in windows]
    model = model_of(*layers, hidden=8, vocab=10)
    w = lower(model, phase="generate", seq=seq, new_tokens=steps)
    keys = {Phase.PREFILL: 0, Phase.DECODE: 0}
    for window in windows:
        for position in range(seq + steps):
            keys[Phase.PREFILL if position < seq else Phase.DECODE] += min(
                position + 1, window or 10**9
            )
    for phase, expected in keys.items():
        rows = w.is_role("attention") & (w.phase == phase)
        assert w.flops[rows].sum() == 4 * 2 * 4 * expected


@pytest.mark.parametrize(("options", "reason"), tables_of("models/configs.yaml")["arguments"])
def test_bad_arguments(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError) as error:
        lower(**{"model": load_model("llama-2-7b"), **options})
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
