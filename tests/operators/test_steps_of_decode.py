"""Decode attention without sudden steps: one more key costs at most one more block, and never saves time."""

from __future__ import annotations

import numpy as np
import pytest
from operator_times import decode_time

from simulator.hardware.library import load_hardware


@pytest.mark.parametrize("name", ["rtx_4090", "l40s@sglang", "l40s", "rtx_3090", "h100@trtllm"])
def test_no_step_where_a_kernel_begins_to_split_the_cache(name: str) -> None:
    keys, batch = np.arange(256, 2048), np.array([[1], [2], [4], [8], [16], [64]])
    for heads, kv_heads in ((32, 8), (32, 32), (8, 1)):
        seconds = decode_time(batch, keys, heads, kv_heads, 128, load_hardware(name)).seconds
        ratio = seconds[:, 1:] / seconds[:, :-1]
        assert ratio.max() < 1.15
        assert ratio.min() > 0.97
