"""Workloads: FLOPs, bytes and memory against sums made here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_shapes import PUBLISHED

from simulator import capacity
from simulator.capacity import RESERVE_BYTES, memory
from simulator.codes import Kernel, Kind, Part
from simulator.hardware.library import load_hardware
from simulator.models import lower as lowering
from simulator.workload import Workload, WorkloadBatch

pytestmark = pytest.mark.quick

lower = partial(lowering.lower, phase="prefill", engine="")
GPU = replace(load_hardware("h100"), memory_bytes=80e9)


def _of_one(count: Callable[[WorkloadBatch], Any]) -> Callable[[Workload], float]:
    return lambda w: float(count(WorkloadBatch.of([w]))[0])


counts = (capacity.weights_bytes, capacity.cache_bytes, capacity.activation_bytes)
weights_bytes, cache_bytes, activation_bytes = (_of_one(count) for count in counts)


@pytest.mark.parametrize(("dtype", "size"), [("int8", 1.0), ("fp8", 1.0), ("int4", 0.5)])
def test_quantised_weights_leave_embedding_head_and_norms(dtype: str, size: float) -> None:
    p = PUBLISHED["llama-3.1-8b"]
    w = lower("llama-3.1-8b", seq=32, weight_dtype=dtype)
    norms = p.hidden * (2 * p.layers + 1)
    inside = p.parameters - 2 * p.vocab * p.hidden - norms
    assert weights_bytes(w) == inside * size + 2 * (p.parameters - inside)


@pytest.mark.parametrize(
    ("phase", "length"), [("prefill", 300), ("decode", 301), ("generate", 305)]
)
def test_cache(phase: str, length: int) -> None:
    p = PUBLISHED["llama-2-70b"]
    options: dict[str, Any] = {
        "phase": phase,
        "batch": 3,
        "seq": 300,
        "new_tokens": 5 * (phase == "generate"),
    }
    each = 2 * 3 * p.layers * p.kv_heads * p.head_dim * length
    assert cache_bytes(lower("llama-2-70b", **options)) == 2 * each
    assert cache_bytes(lower("llama-2-70b", **options, kv_dtype="fp8")) == each


def test_llama_2_70b_does_not_fit_one_gpu_of_80_gb_but_half_of_it_does() -> None:
    dense = lower("llama-2-70b", phase="decode", seq=2048)
    got = memory(dense, GPU)
    assert not got.fits
    assert got.devices_needed == 2
    needed = (
        2 * 68_976_648_192
        + 2 * 2 * 80 * 8 * 128 * 2049
        + 2 * (2 * 8192 + 3 * 28672)
        + RESERVE_BYTES
    )
    assert got.total_bytes == needed
    assert (
        got.verdict
        == f"does not fit: needs {needed / 2**30:.1f} GiB, 74.5 GiB available (1.7x); fits on 2"
        " devices"
    )
    wide = dense.expand()
    half = memory(wide.take((wide.layer < 0) | (wide.layer % 2 == 0)), GPU)
    assert half.fits
    assert half.verdict.startswith("fits: 66.0 GiB of 74.5 GiB")
    assert half.cache_bytes == got.cache_bytes / 2
    assert memory(lower("llama-2-70b", phase="decode", seq=2048, devices=2), GPU).fits


def test_weights_with_two_of_four() -> None:
    row = {"role": "up", "part": Part.MLP, "m": 1, "n": 64, "k": 32, "count": 2}
    row |= {"kernel": Kernel.SPARSE24, "density": 0.5}
    # half the values at two bytes, and two bits of index for each of them
    expected = 2 * (64 * 32 // 2 * 2 + 64 * 32 // 2 * 2 / 8)
    assert weights_bytes(Workload.from_rows([row | {"params": 64 * 32 / 2}])) == expected
    bias = row | {"params": 64 * 32 / 2 + 64}
    assert weights_bytes(Workload.from_rows([bias])) == expected + 2 * 64 * 2
    scattered = row | {"kernel": Kernel.UNSTRUCTURED, "params": 64 * 32 / 2}
    assert weights_bytes(Workload.from_rows([scattered])) == 2 * 64 * 32 * 2


def test_tensor_parallel_memory() -> None:
    p = PUBLISHED["llama-2-70b"]
    w = lower("llama-2-70b", phase="decode", batch=8, seq=999, devices=8)
    norms = p.hidden * (2 * p.layers + 1)
    assert weights_bytes(w) == 2 * ((p.parameters - norms) / 8 + norms)
    assert cache_bytes(w) == 2 * 2 * 8 * 80 * 1 * 128 * 1000
    assert "GiB each" in memory(w, GPU).verdict


def test_pipeline_memory_is_the_fullest_stage() -> None:
    p = PUBLISHED["llama-2-70b"]
    w = lower("llama-2-70b", phase="decode", seq=999, devices=3, parallel="pipeline")
    table = p.vocab * p.hidden
    layer = (p.parameters - 2 * table - p.hidden) / 80
    assert weights_bytes(w) == pytest.approx(2 * (27 * layer + table + p.hidden), rel=1e-12)
    assert cache_bytes(w) == pytest.approx(2 * 2 * 27 * 8 * 128 * 1000, rel=1e-12)
    pruned = w.take(w.layers == 0), w.take(w.layers > 0).replace(layers=40, count=40.0)
    assert weights_bytes(Workload.concat(pruned)) == pytest.approx(
        2 * (14 * layer + table + p.hidden), rel=1e-12
    )
    tied = lower("llama-3.2-1b", phase="decode", seq=9, devices=2, parallel="pipeline")
    q = PUBLISHED["llama-3.2-1b"]
    body = q.parameters - q.vocab * q.hidden - q.hidden
    # the last stage has its own copy of the table
    assert weights_bytes(tied) == 2 * (body / 2 + q.vocab * q.hidden + q.hidden)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(PUBLISHED)), st.integers(1, 32), st.integers(1, 5000), st.integers(1, 8)
)
def test_memory_grows_with_batch_and_length(name: str, batch: int, seq: int, steps: int) -> None:
    def of(**options: int) -> tuple[float, float, float]:
        w = lower(
            name,
            phase="generate",
            **{"batch": batch, "seq": seq, "new_tokens": steps, **options},
        )
        got = memory(w, GPU)
        assert (
            got.total_bytes
            == got.weights_bytes + got.cache_bytes + got.activation_bytes + got.reserve_bytes
        )
        assert got.fits == (got.total_bytes <= 80e9)
        assert cache_bytes(w.expand()) == pytest.approx(got.cache_bytes, rel=1e-12)
        return got.weights_bytes, got.cache_bytes, got.activation_bytes

    base, wider, longer = of(), of(batch=batch + 1), of(new_tokens=steps + 1)
    assert base[0] == wider[0] == longer[0]
    assert wider[1:] == pytest.approx([x * (batch + 1) / batch for x in base[1:]], rel=1e-12)
    assert longer[1] >= base[1]


def test_flops_and_bytes_of_each_kind() -> None:
    gemm = {"role": "q", "m": 3, "n": 8, "k": 16}
    attention = {"role": "attention", "batch": 2, "heads": 6, "kv_heads": 2, "head_dim": 8}
    w = Workload.from_rows(
        [
            gemm | {"count": 2},
            gemm | {"kernel": Kernel.SPARSE24, "density": 0.5},
            gemm | {"kernel": Kernel.UNSTRUCTURED, "density": 0.25},
            attention | {"kind": Kind.PREFILL_ATTENTION, "q_len": 4, "kv_len": 4},
            attention | {"kind": Kind.DECODE_ATTENTION, "q_len": 1, "kv_len": 9},
            {
                "role": "residual",
                "kind": Kind.ELEMENTWISE,
                "read_bytes": 10,
                "write_bytes": 5,
                "count": 4,
            },
        ]
    )
    each, head = 2 * 3 * 8 * 16, 4 * 2 * 6 * 8
    assert w.flops.tolist() == [2 * each, 0.5 * each, 0.25 * each, 10 * head, 9 * head, 0]
    dense = 2 * (8 * 16 + 3 * 16 + 3 * 8)
    # half the values, and 2 bits for each of them
    two_four = 8 * 16 * (1 + 1 / 8) + 2 * (3 * 16 + 3 * 8)
    # a quarter of the values, and a bit a position
    scattered = 8 * 16 * (0.5 + 1 / 8) + 2 * (3 * 16 + 3 * 8)
    prefill = 2 * (2 * 2 * 2 * 4 * 8 + 2 * 2 * 6 * 4 * 8)
    decode = 2 * (2 * 2 * 2 * 9 * 8 + 2 * 2 * 6 * 1 * 8)
    assert w.bytes.tolist() == [2 * dense, two_four, scattered, prefill, decode, 60]


def test_a_batch_of_workloads_has_sums_by_workload() -> None:
    one = Workload.from_rows(
        [{"role": "q", "m": 2, "n": 8, "k": 4}, {"role": "k", "m": 2, "n": 4, "k": 4}]
    )
    batch = WorkloadBatch.of([one, one.take(np.array([0]))])
    assert batch.total(np.array([1.0, 2.0, 5.0])).tolist() == [3.0, 5.0]
