"""Lowering of a serve: the steady state of continuous batching has the rows of its prefills and of
its decodes."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simulator
from simulator.capacity import activation_bytes, cache_bytes, memory, weights_bytes
from simulator.codes import Kind, Phase
from simulator.models import lower as lowering
from simulator.models.library import list_models, load_model
from simulator.pruning import general_families, prune
from simulator.uncertainty.forward import forward_passes
from simulator.workload import Workload, WorkloadBatch

pytestmark = pytest.mark.quick

lower = partial(lowering.lower, phase="prefill", engine="")
FULL = [name for name in list_models() if not any(load_model(name).windows)]


def serve(
    name: str = "llama-3.1-8b", batch: int = 16, seq: int = 500, steps: int = 101, **options: Any
) -> Workload:
    return lower(load_model(name), phase="serve", batch=batch, seq=seq, new_tokens=steps, **options)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(FULL),
    batch=st.integers(1, 300),
    seq=st.integers(1, 5000),
    steps=st.integers(0, 200).map(lambda half: 2 * half + 1),
    engine=st.sampled_from(["", "hf", "reference"]),
)
def test_a_serve_is_a_prefill_of_each_and_decodes_of_all_at_mean_length(
    name: str, batch: int, seq: int, steps: int, engine: str
) -> None:
    whole = serve(name, batch, seq, steps, engine=engine)
    model = load_model(name)
    prefill = lower(model, phase="prefill", batch=1, seq=seq, engine=engine)
    middle = lower(model, phase="decode", batch=batch, seq=seq + (steps - 1) // 2, engine=engine)
    for phase, part, times in ((Phase.PREFILL, prefill, batch), (Phase.DECODE, middle, steps)):
        rows = whole.phase == phase
        for column in ("flops", "bytes", "count"):
            wanted = times * float(getattr(part, column).sum())
            assert getattr(whole, column)[rows].sum() == pytest.approx(wanted, rel=1e-12), column
    # a decode's work grows evenly with its length: the middle stands for all
    generate = lower(model, phase="generate", batch=batch, seq=seq, new_tokens=steps, engine=engine)
    rows, those = whole.phase == Phase.DECODE, generate.phase == Phase.DECODE
    for column in ("flops", "bytes"):
        assert getattr(whole, column)[rows].sum() == pytest.approx(
            getattr(generate, column)[those].sum(), rel=1e-12
        )


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-2-9b", "opt-13b", "mistral-7b-v0.1"])
@pytest.mark.parametrize(("batch", "seq", "steps"), [(1, 64, 1), (32, 2000, 301), (64, 5000, 200)])
def test_memory_is_a_generate_s_within_the_mean_length(
    name: str, batch: int, seq: int, steps: int
) -> None:
    options: dict[str, Any] = {"batch": batch, "seq": seq, "new_tokens": steps}
    here, there = (
        WorkloadBatch.of([lower(load_model(name), phase=phase, **options)])
        for phase in ("serve", "generate")
    )
    assert weights_bytes(here)[0] == pytest.approx(weights_bytes(there)[0], rel=1e-12)
    # caches are half grown on average; one prompt is computed at a time
    grown = (seq + (steps + 1) // 2) / (seq + steps)
    assert grown * cache_bytes(there)[0] <= cache_bytes(here)[0] * (1 + 1e-12)
    assert cache_bytes(here)[0] <= cache_bytes(there)[0]
    alone = WorkloadBatch.of([lower(load_model(name), phase="prefill", batch=1, seq=seq)])
    assert activation_bytes(alone)[0] <= activation_bytes(here)[0] <= activation_bytes(there)[0]


def test_rows_of_a_serve() -> None:
    w = serve(batch=16, seq=500, steps=101)
    prefill, decode = w.kind == Kind.PREFILL_ATTENTION, w.kind == Kind.DECODE_ATTENTION
    for rows, expected in ((prefill, (1, 500, 32 * 16)), (decode, (16, 551, 32 * 101))):
        assert [*zip(w.batch[rows], w.kv_len[rows], w.count[rows])] == [expected]
    assert w.m[w.is_role("q")].tolist() == [500, 16]
    assert w.m[w.is_role("lm_head")].tolist() == [1, 16]
    assert (w.meta.phase, w.meta.batch, w.meta.seq, w.meta.new_tokens) == ("serve", 16, 500, 101)
    split = serve("llama-2-70b", batch=8, devices=4)
    assert split.is_role("all_reduce").sum() == 6
    staged = serve("llama-2-70b", batch=8, steps=5, devices=4, parallel="pipeline")
    assert staged.count[staged.is_role("send")].tolist() == [3 * 8, 3 * 5]


@pytest.mark.parametrize("engine", ["", "reference"])
@pytest.mark.parametrize("family", general_families())
def test_every_family_prunes_a_serve_as_it_prunes_its_parts(family: str, engine: str) -> None:
    """The kernels are those of a pruned prefill, as often as there are prompts, and of a pruned
    decode."""
    batch, seq, steps = 5, 400, 9
    whole = prune(serve(batch=batch, seq=seq, steps=steps, engine=engine), family, 0.5)
    model = load_model("llama-3.1-8b")
    generate = lower(model, phase="generate", batch=1, seq=seq, new_tokens=1, engine=engine)
    prefill = prune(generate, family, 0.5)
    prefill = prefill.take(prefill.phase == Phase.PREFILL)
    parts = lower(model, phase="generate", batch=batch, seq=seq, new_tokens=steps, engine=engine)
    decode = prune(parts, family, 0.5)
    decode = decode.take(decode.phase == Phase.DECODE)
    longest = np.array([decode.kv_len[decode.layer == layer].max() for layer in decode.layer])
    decode = decode.take(
        (decode.kind != Kind.DECODE_ATTENTION) | (decode.kv_len == longest - steps // 2)
    )

    def kernels(w: Workload, times: float) -> dict[tuple[Any, ...], float]:
        names = (
            "kind",
            "role",
            "m",
            "n",
            "k",
            "batch",
            "q_len",
            "kv_len",
            "heads",
            "kv_heads",
            "kernel",
            "stage",
        )
        out: dict[tuple[Any, ...], float] = {}
        for i in range(len(w)):
            key = (
                *(int(getattr(w, name)[i]) for name in names),
                round(float(w.density[i]), 9),
                float(w.read_bytes[i]),
            )
            out[key] = out.get(key, 0.0) + times * float(w.count[i])
        return out

    def counts(w: Workload, phase: Phase) -> dict[tuple[Any, ...], float]:
        return kernels(w.take(w.phase == phase), 1.0)

    assert counts(whole, Phase.PREFILL) == pytest.approx(kernels(prefill, batch), rel=1e-9)
    attention = int(Kind.DECODE_ATTENTION)
    # one row of attention stands for all steps
    wanted = {
        key: count * (steps if key[0] == attention else 1)
        for key, count in kernels(decode, 1.0).items()
    }
    assert counts(whole, Phase.DECODE) == pytest.approx(wanted, rel=1e-9)


def test_a_serve_takes_the_time_of_its_parts() -> None:
    hw, batch, steps = simulator.load_hardware("h100"), 24, 65
    for engine in ("", "reference", "compile"):  # without a host between passes
        whole = forward_passes(
            WorkloadBatch.of([serve(batch=batch, seq=700, steps=steps, engine=engine)]), hw
        )
        model = load_model("llama-3.1-8b")
        prefill = simulator.workload_time(
            lower(model, phase="prefill", seq=700, engine=engine), hw
        ).total_s
        decode = simulator.workload_time(
            lower(model, phase="decode", batch=batch, seq=732, engine=engine), hw
        ).total_s
        assert whole.phase_s[0] == pytest.approx([batch * prefill, steps * decode], rel=1e-9)
        assert whole.total_s[0] == pytest.approx(batch * prefill + steps * decode, rel=1e-9)
    assert np.isfinite(memory(serve(), hw).total_bytes)
