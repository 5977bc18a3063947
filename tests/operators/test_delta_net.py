"""Gated delta nets: work and bytes counted by hand, and measured rows of an H20."""

from __future__ import annotations

import numpy as np
import pytest
from operator_times import delta_net_time, of_delta_net

from simulator.codes import Kind
from simulator.hardware.library import load_hardware
from simulator.models.lower import lower
from simulator.prediction.table import speedup
from simulator.pruning import prune
from simulator.uncertainty.intervals import workload_time
from simulator.workload import Workload

pytestmark = pytest.mark.quick

# Qwen3-Next: value heads, key heads, features of a key and of a value head
QWEN = (32, 16, 128, 128)
CHANNELS = 2 * 16 * 128 + 32 * 128

# alibaba/InferSim@f2293da (Apache-2.0), bench_data/gdn of an H20: sequences and us of convolution
# and recurrence of a decode step; tokens and us of a prompt, convolution and five kernels. Its rows
# with 64 value heads repeat those with 32 to the microsecond, and would need more than the
# bandwidth of the device.
STEP = {1: 82, 16: 80, 32: 81, 64: 147, 128: 275, 256: 532, 512: 1050, 1024: 2073}
PROMPT = {4096: 65 + 45 + 86 + 79 + 188 + 129}
CALL_S = 85e-6
"""Up to 32 sequences a call takes 80 us whatever they are: the call itself, not its kernels."""


def delta_net_of(phase: str, batch: int, seq: int) -> Workload:
    w = lower("qwen3-next-80b-a3b", phase=phase, batch=batch, seq=seq)
    return w.take(w.kind == Kind.DELTA_NET)


def test_work_and_bytes_by_hand() -> None:
    state, tail = 32 * 128 * 128 * 4, 3 * CHANNELS * 2
    step, prompt = delta_net_of("decode", 8, 1000), delta_net_of("prefill", 2, 1000)
    assert step.count.sum() == prompt.count.sum() == 36
    for w, tokens, batch, times in ((step, 8, 8, 2), (prompt, 2000, 2, 1)):
        assert w.flops.sum() == 36 * 3 * 2 * tokens * 32 * 128 * 128
        moved = 2 * tokens * (CHANNELS + 32 * 128)
        assert w.bytes.sum() == 36 * (moved + times * batch * (state + tail))
        assert w.each(lambda operator, rows: operator.state_bytes(rows)).tolist() == [
            batch * (state + tail)
        ] * len(w)


def test_narrow_states_and_no_convolution_save_time_and_a_prompt_is_linear() -> None:
    hw = load_hardware("h100")
    for sizes in ((4, 4, *QWEN), (4096, 4, *QWEN)):  # a step, a prompt
        before = delta_net_time(*sizes, hw).seconds
        assert delta_net_time(*sizes, hw, state_dtype="bf16").seconds < before
        assert delta_net_time(*sizes, hw, conv=0).seconds < before
    long = delta_net_time(np.array([2**16, 2**17]), 1, *QWEN, hw).seconds
    assert long[1] / long[0] == pytest.approx(2.0, rel=0.01)


def test_measured_rows_of_an_h20() -> None:
    """The bandwidth of states is fitted on the steps: above the time of a call the median error is
    5 %, that of the prompt 13 %, and all rows lie in their interval."""
    tokens = np.array([*STEP, *PROMPT])
    batch, measured = np.array([*STEP, 1]), np.array([*STEP.values(), *PROMPT.values()]) * 1e-6
    t = delta_net_time(tokens, batch, *QWEN, load_hardware("h20"))
    kernels = measured > CALL_S
    assert kernels.sum() == 6
    error = np.abs(t.seconds / measured - 1.0)[kernels]
    assert np.median(error) < 0.06
    assert error.max() < 0.14
    assert ((t.lower <= measured) & (measured <= t.upper))[kernels].all()
    assert (t.seconds < measured)[~kernels].all()  # a call takes longer than its kernels
    # the repeated rows
    assert (of_delta_net(1024, 1024, 64, 16, 128, 128, load_hardware("h20")).floor > 2073e-6).all()


def test_a_whole_model_is_timed_and_pruned_in_every_phase() -> None:
    hw = load_hardware("h100")
    for phase in ("prefill", "decode", "generate", "serve"):
        steps = 8 * (phase in ("generate", "serve"))
        dense = lower(
            "qwen3-next-80b-a3b",
            phase=phase,
            batch=2,
            seq=512,
            new_tokens=steps,
            engine="vllm",
        )
        t = workload_time(dense, hw)
        assert 0.0 < t.total_lower_s < t.total_s < t.total_upper_s
        assert 1.0 < speedup(dense, prune(dense, "depth", 0.5), hw).speedup < 2.2
