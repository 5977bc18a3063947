"""The device protocol's names, and the replayed device: planted values and faults."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import tables_of

from calibration.devices import Operator, open_device
from calibration.devices.replay import ReplayDevice, roofline_timings
from calibration.fit.base_profile import base_profile
from simulator.errors import InputError
from simulator.hardware.library import load_hardware

pytestmark = pytest.mark.quick

GEMM = Operator("gemm", m=128, n=1024, k=1024)

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")


def test_the_planted_device_has_the_sms_of_a_gpu() -> None:
    """A profile of one SM has no waves, so no GEMM of several tiles would agree with it."""
    hw = base_profile(open_device("replay:planted"), "bf16")
    assert (hw.sm_count, hw.architecture) == (load_hardware("h100").sm_count, "hopper")


@given(
    st.sampled_from(["gemm", "gemm_2to4", "low_rank", "gather_gemm"]),
    st.tuples(*[st.integers(1, 9999)] * 3),
    st.booleans(),
)
def test_an_operator_survives_json_and_its_key_is_its_own(
    kind: str, shape: tuple[int, int, int], cold: bool
) -> None:
    extra = {"low_rank": {"rank": 7}, "gather_gemm": {"rows": 1}}.get(kind, {})
    op = Operator(kind, **dict(zip("mnk", shape)), **extra, cold=cold)
    again = Operator.from_record(json.loads(json.dumps(vars(op))))
    assert (again, again.key) == (op, op.key)
    assert replace(op, dtype="fp16").key != op.key


@pytest.mark.parametrize(
    ("kind", "fields", "message"), tables_of("devices/mistakes.yaml")["operators"]
)
def test_an_operator_that_cannot_be_is_refused(
    kind: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Operator.from_record({"kind": kind, **fields})


def test_work_of_operators_by_hand() -> None:
    assert GEMM.flops == 2 * 128 * 1024 * 1024
    assert GEMM.bytes == 2 * (1024 * 1024 + 128 * 2048)
    assert Operator("low_rank", m=2, n=8, k=4, rank=3).flops == 2 * 2 * 3 * 12
    grouped = Operator("grouped_gemm", m=2, n=8, k=4, block=2, density=0.5, role="up")
    assert (grouped.grouped, grouped.flops, grouped.bytes) == (
        8,
        2 * 2 * 4 * 4,
        2 * (4 * 4 + 2 * (4 + 4)),
    )
    causal = Operator(
        "attention_prefill", batch=2, q_len=4, kv_len=4, heads=6, kv_heads=3, head_dim=8
    )
    assert causal.flops == 4 * 2 * 6 * 8 * (1 + 2 + 3 + 4)
    decode = Operator(
        "attention_decode", batch=2, q_len=1, kv_len=100, heads=6, kv_heads=3, head_dim=8
    )
    assert decode.bytes == 2 * (2 * 2 * 3 * 100 * 8 + 2 * 2 * 6 * 8)
    assert Operator("elementwise", role="activation", m=2, n=8).bytes == 2 * 3 * 16
    assert Operator("copy", n=1000).bytes == 2000


@needs_torch
@pytest.mark.parametrize(("name", "message"), tables_of("devices/mistakes.yaml")["names"])
def test_a_device_that_does_not_exist_is_one_line(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_device(name)
    assert "\n" not in str(caught.value)


def test_planted_times_need_no_file() -> None:
    device = open_device("replay:planted")
    assert device.prepare(GEMM).sample(1) == roofline_timings()(GEMM)
    assert "no such kernel" in device.refuses(Operator("gemm_2to4", m=16, n=64, k=64))


def test_opening_by_name_needs_torch_only_for_real_devices() -> None:
    code = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import calibration.devices
try:
    calibration.devices.open_device("cpu")
except ValueError as error:
    print(error)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert (
        done.stdout.strip()
        == "device 'cpu' needs torch, which is not installed; try: pip install torch"
    )


def test_the_same_seed_replays_the_same_samples_in_simulated_time() -> None:
    device = ReplayDevice(lambda op: 2.0, setup_s=0.5)
    device.prepare(GEMM).sample(100)
    device.rest(3.0)
    assert device.clock() == pytest.approx(203.5)
    first, again, other = (
        ReplayDevice(noise=0.1, seed=seed).prepare(GEMM).sample(1) for seed in (1, 1, 2)
    )
    assert first == again != other
