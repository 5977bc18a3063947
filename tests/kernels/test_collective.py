"""Collectives: limits of alpha-beta, bad input, and the published tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simulator.errors import InputError
from simulator.hardware.constants import COLLECTIVE_CONSTANTS as CONSTANTS
from simulator.hardware.library import load_hardware
from simulator.kernels.collective import KINDS, collective_time


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a100_sxm_80gb", "h100_sxm", "l40s"])
def test_time_grows_with_payload_from_a_floor_to_the_link(name: str, kind: str) -> None:
    hw = load_hardware(name)
    assert hw.link is not None
    payload = np.geomspace(1e2, 1e10, 60)
    t = collective_time(payload, 2, hw, kind=kind)
    assert np.all(np.diff(t.seconds) > 0)
    assert np.all(t.seconds >= t.roofline_s)
    assert np.all(t.lower >= t.roofline_s)
    assert t.limits[0] == "launch"
    assert t.limits[-1] == "link"
    share = {"all_reduce": 1.0, "send": 1.0, "all_gather": 0.5}[kind]  # of the payload each of two devices must receive
    assert t.roofline_s[-1] == pytest.approx(share * payload[-1] / hw.link.bandwidth_bytes_per_s)
    assert t.seconds[-1] == pytest.approx(t.roofline_s[-1] / CONSTANTS["e_link"].default(hw.architecture), rel=0.01)


def test_one_device_costs_nothing_and_more_cost_more() -> None:
    hw = load_hardware("h100_sxm")
    t = collective_time(1e8, [1, 2, 4, 8], hw).seconds
    assert t[0] == 0.0
    assert np.all(np.diff(t) > 0)
    assert collective_time(np.ones((3, 1)), [2, 4], hw).seconds.shape == (3, 2)


def test_bad_input_is_named() -> None:
    hw = load_hardware("h100_sxm")
    with pytest.raises(InputError, match="all_reduce"):
        collective_time(1.0, 2, hw, kind="allreduce")
    with pytest.raises(InputError, match="connects"):
        collective_time(1.0, 1000, hw)


@pytest.mark.parametrize(("gpu", "stack"), [("a100_sxm", "trtllm/1.0.0"), ("h100_sxm", "sglang/0.5.14")])
def test_all_reduce_lies_in_its_interval_in_most_of_a_table(wheel_tables: Path, gpu: str, stack: str) -> None:
    pd = pytest.importorskip("pandas")
    table, hw = (
        pd.read_parquet(wheel_tables / gpu / "comm" / stack / "custom_allreduce_perf.parquet"),
        load_hardware(gpu),
    )
    if "sglang" in stack:
        table = table[table.backend == "sglang_graph"]
    t = collective_time(table.message_size.to_numpy() * 2.0, table.num_gpus.to_numpy(), hw)
    measured = table.latency.to_numpy() * 1e-3
    assert np.mean((measured >= t.lower) & (measured <= t.upper)) > 0.75
