"""The table of operators: counting, expanding, merging, and refusing columns that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.codes import Kernel, Kind
from simulator.operators.attention import attention_pairs
from simulator.workload import Workload

pytestmark = pytest.mark.quick


def _pairs(q: int, kv: int, window: int) -> int:
    return sum(min(kv - q + i + 1, window or kv) for i in range(q))


@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 80))
def test_pairs_equal_a_count_by_hand(q: int, before: int, window: int) -> None:
    kv = q + before
    assert float(attention_pairs(np.array(q), np.array(kv), np.array(window))) == _pairs(q, kv, window)


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
            {"role": "residual", "kind": Kind.ELEMENTWISE, "read_bytes": 10, "write_bytes": 5, "count": 4},
        ]
    )
    each, head = 2 * 3 * 8 * 16, 4 * 2 * 6 * 8
    assert w.flops.tolist() == [2 * each, 0.5 * each, 0.25 * each, 10 * head, 9 * head, 0]
    dense = 2 * (8 * 16 + 3 * 16 + 3 * 8)
    two_four = 8 * 16 * (1 + 1 / 8) + 2 * (3 * 16 + 3 * 8)  # half the values, and 2 bits for each of them
    scattered = 8 * 16 * (0.5 + 1 / 8) + 2 * (3 * 16 + 3 * 8)  # a quarter of the values, and a bit a position
    prefill = 2 * (2 * 2 * 2 * 4 * 8 + 2 * 2 * 6 * 4 * 8)
    decode = 2 * (2 * 2 * 2 * 9 * 8 + 2 * 2 * 6 * 1 * 8)
    assert w.bytes.tolist() == [2 * dense, two_four, scattered, prefill, decode, 60]
