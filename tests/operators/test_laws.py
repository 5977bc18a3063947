"""Laws of all operators on all devices: no time beats physics, and time grows with every size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from operator_times import (
    delta_net_time,
    experts_time,
    indexer_time,
    short_conv_time,
    state_space_time,
)

import simulator
from simulator.codes import GEMM, Kind
from simulator.hardware.library import list_hardware, load_hardware
from simulator.uncertainty.forward import operator_times

pytestmark = pytest.mark.quick

# together they have every kind of operator on one device
MODELS = ("qwen3-next-80b-a3b", "deepseek-v3.2", "jamba-1.5-mini", "nemotron-nano-9b-v2")
MODELS += ("lfm2-8b-a1b", "kimi-linear-48b-a3b")


def widest(name: str) -> str:
    """The format of arithmetic that a device has kernels for."""
    return next(d for d in ("bf16", "fp16", "fp32") if d in load_hardware(name).rates)


@pytest.mark.parametrize("name", list_hardware())
def test_no_operator_is_faster_than_physics(name: str) -> None:
    """Bytes are those of the workload, whose counts other tests check by hand."""
    hw, dtype, seen = load_hardware(name), widest(name), set()
    narrow = max(hw.peak_flop_per_s(d) for d in (dtype, "fp8", "int8") if d in hw.rates)
    for model in MODELS:
        for phase, batch, seq in (("prefill", 1, 1), ("prefill", 2, 5000), ("decode", 64, 9000)):
            for skew in (0.0, 1.0):
                asked = {"phase": phase, "batch": batch, "seq": seq, "skew": skew}
                formats = {
                    "dtype": dtype,
                    "weight_dtype": dtype,
                    "kv_dtype": "int8" if skew else dtype,
                }
                w = simulator.lower(model, **asked, **formats)
                t = operator_times(w, hw, 0.99)
                assert (t.lower <= t.seconds).all()
                assert (t.seconds <= t.upper).all()
                # activations may lie in L2
                least = np.where(w.kind == GEMM, w.weight_bytes_each, w.bytes / w.count)
                rows = w.kind != Kind.ELEMENTWISE
                # indexers and latent attention may compute in the format of the cache
                cached = (w.kind == Kind.INDEXER) | (w.value_dim > 0)
                peak = np.where(cached, narrow, hw.peak_flop_per_s(dtype))
                flop_s = w.flops / w.count / (peak * hw.clock_headroom)
                floor = np.maximum(least / hw.bandwidth_bytes_per_s, flop_s)
                assert (t.lower >= floor * (1 - 1e-6))[rows].all(), (model, asked)
                seen |= set(w.kind.tolist())
    assert seen == {*map(int, Kind)} - {Kind.HOST, Kind.COLLECTIVE}


MAMBA, MAMBA2, LIGHTNING = (5120, 1, 1, 16, 0), (128, 8, 64, 128, 256), (64, 64, 128, 128, 256)
GROWS: list[tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...]]] = [
    # sizes of a step or a prompt, and those that grow one by one
    *((state_space_time, (n, 4, *MAMBA), (2, 4, 5)) for n in (4, 4096)),
    *((state_space_time, (n, 4, *MAMBA2), (2, 4, 5)) for n in (4, 4096)),
    *((state_space_time, (n, 4, *LIGHTNING), (2, 4, 5)) for n in (4, 4096)),
    *((short_conv_time, (n, 4, 4096, 4), (2,)) for n in (4, 4096)),
    *((delta_net_time, (n, 4, 32, 16, 128, 128), (2, 3, 4, 5)) for n in (4, 4096)),
    *((indexer_time, (8, n, 65536, 64, 128, 2048, 1, 128), (0, 2, 3, 4)) for n in (1, 4096)),
    *((experts_time, (n, 768, 2048, 128, 8), (0, 1, 2)) for n in (4, 4096)),
]


@pytest.mark.parametrize("name", ["h100", "cpu"])
@pytest.mark.parametrize(("timed", "sizes", "axes"), GROWS)
def test_time_grows_with_every_size(
    timed: Callable[..., Any], sizes: tuple[int, ...], axes: tuple[int, ...], name: str
) -> None:
    hw, dtype = load_hardware(name), widest(name)
    before = timed(*sizes, hw, dtype=dtype).seconds
    for i in axes:
        more = [2 * size if j == i else size for j, size in enumerate(sizes)]
        assert before < timed(*more, hw, dtype=dtype).seconds < 2.3 * before
