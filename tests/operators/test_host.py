"""The host: a faster host is hidden by the device, a slower one sets the pace of a pass, and a pass
that waits for it takes longer."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simulator
from simulator.engines.engine import NOTHING, load_engine
from simulator.passes import Host
from simulator.uncertainty.forward import PredictedPass, forward_passes
from simulator.workload import Workload, WorkloadBatch

pytestmark = pytest.mark.quick

H100 = simulator.load_hardware("h100")
SEGMENT = np.array([0, 1, 2, 3, 4, 5])  # a group in each place of both phases


def lowered(
    engine: str, phase: str = "decode", batch: int = 1, seq: int = 256, **more: Any
) -> Workload:
    steps = 5 if phase in ("generate", "serve") else 0
    options = {"phase": phase, "batch": batch, "seq": seq, "new_tokens": steps, "engine": engine}
    return simulator.lower("llama-3.2-1b", **{**options, **more})


def passed(*workloads: Workload, hw: simulator.HardwareProfile = H100) -> PredictedPass:
    return forward_passes(WorkloadBatch.of(workloads), hw)


def host_of(
    launch: list[float], each_pass: float = 0.0, each_sequence: float = 0.0, log_sd: float = 0.5
) -> Host:
    """A host that launches groups of :data:`SEGMENT` and waits alike in both phases."""
    both = partial(np.full, (1, 2))
    times = {
        "launch": np.array([launch]),
        "layer": np.zeros(1),
        "each_pass": both(each_pass),
        "server": both(0.0),
    }
    sds = dict.fromkeys(
        ("launch_log_sd", "pass_log_sd", "sequence_log_sd", "server_log_sd"), log_sd
    )
    return Host(**times, **sds, each_sequence=both(each_sequence))


@pytest.mark.parametrize(
    ("device", "launch", "each_pass", "total", "shown"),
    [
        ([2, 10, 1], [0, 0, 0], 0, 13, 13),  # no host
        # all but nothing hidden: the device starts with the first launch
        ([2, 10, 1], [1, 3, 1], 0, 13, 13),
        # the layers wait for the launches of what precedes them
        ([2, 10, 1], [5, 3, 2], 0, 16, 11),
        ([2, 10, 1], [1, 30, 4], 0, 35, 0),  # the host sets the pace, and ends last
        ([2, 10, 9], [1, 30, 1], 0, 40, 9),  # the last kernel is long: it ends after the host
        ([2, 10, 1], [1, 3, 1], 20, 25, 0),  # the scheduler goes on after the last launch
        ([2, 10, 1], [1, 3, 1], 6, 13, 13),  # and is hidden where the device is still at work
        ([2, 10, 1], [0, 0, 0], 6, 19, 13),  # under a graph nothing hides it
    ],
)
def test_the_slower_of_host_and_device_by_hand(
    device: list[float], launch: list[float], each_pass: float, total: float, shown: float
) -> None:
    host = host_of(launch + [0.0] * 3, each_pass)
    seconds, part = host.total(np.array([device + [0.0] * 3], dtype=float), SEGMENT, 0.0)
    assert (seconds[0, 0], part[0, 0]) == (total, shown)
    # decode behaves like prefill
    if any(launch):
        seconds, part = host_of([0.0] * 3 + launch, each_pass).total(
            np.array([[0.0] * 3 + device]), SEGMENT, 0.0
        )
        assert (seconds[0, 1], part[0, 1]) == (total, shown)


SIX = st.lists(st.floats(0.0, 50.0), min_size=6, max_size=6)


@settings(max_examples=200, deadline=None)
@given(
    SIX, SIX, st.floats(0, 20), st.floats(0, 20), st.floats(-2, 2), st.floats(0, 2), st.floats(1, 3)
)
def test_bounds_of_any_host_and_that_more_time_is_never_faster(
    device: list[float],
    launch: list[float],
    each_pass: float,
    each_sequence: float,
    z: float,
    by: float,
    more: float,
) -> None:
    host, spent = host_of(launch, each_pass, each_sequence), np.array([device])
    total, shown = host.total(spent, SEGMENT, z, z)
    scale = np.exp(0.5 * z)
    for phase in (0, 1):
        at = slice(3 * phase, 3 * phase + 3)
        busy, launched = sum(device[at]), scale * sum(launch[at])
        added = scale * each_sequence
        assert total[0, phase] >= max(busy, launched + scale * each_pass) + added - 1e-9
        assert total[0, phase] <= busy + launched + scale * each_pass + added + 1e-9
        assert -1e-9 <= shown[0, phase] <= min(busy, total[0, phase]) + 1e-9
    slower, _ = host.total(spent, SEGMENT, z + by, z + by)
    assert (slower >= total - 1e-9).all()
    longer, _ = host.total(spent * more, SEGMENT, z, z)
    assert (longer >= total - 1e-9).all()
    assert (longer <= total * more + 1e-9).all()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("phase", "prefills", "decodes"),
    [("prefill", 1, 0), ("decode", 0, 1), ("generate", 1, 5), ("serve", 0, 5)],
)
def test_a_scheduler_adds_its_time_to_each_pass_and_each_sequence(
    engine: str, phase: str, prefills: int, decodes: int
) -> None:
    batch, e = 7, load_engine(engine)
    p = passed(lowered(engine, phase, batch=batch))
    assert not p.host.launch.any()
    server = e.each_request if phase == "serve" else NOTHING
    wanted = (
        (prefills + decodes) * e.each_pass.value
        + decodes * batch * e.each_sequence.value
        + server.value
    )
    assert p.host_s[0] == pytest.approx(wanted, rel=1e-12)
    assert p.total_s[0] == pytest.approx(p.device_s[0] + wanted, rel=1e-12)
    slow = p.at(1.5, -0.5)[0][0] - p.device_s[0]
    passes_s = (prefills + decodes) * e.each_pass.value * np.exp(-0.5 * e.each_pass.log_sd)
    passes_s += server.value * np.exp(-0.5 * server.log_sd)
    sequences_s = decodes * batch * e.each_sequence.value * np.exp(1.5 * e.each_sequence.log_sd)
    assert slow == pytest.approx(passes_s + sequences_s, rel=1e-9)


def test_the_host_of_a_workstation_is_slower_by_the_factor_of_its_engine() -> None:
    rtx = simulator.load_hardware("rtx_4090")
    assert (rtx.is_workstation, H100.is_workstation) == (True, False)
    for engine, factor in (("vllm", load_engine("vllm").each_pass.workstation), ("vllm@0.12", 1.0)):
        workloads = [lowered(engine, "decode", batch=batch) for batch in (1, 8, 64)]
        server, workstation = passed(*workloads), passed(*workloads, hw=rtx)
        assert (server.host_s > 0).all()
        np.testing.assert_allclose(workstation.host_s, factor * server.host_s, rtol=1e-12)
        np.testing.assert_allclose(
            workstation.total_s, workstation.device_s + workstation.host_s, rtol=1e-12
        )
    assert load_engine("vllm").each_pass.workstation > 1


def test_asynchronous_scheduling_on_a_server_is_never_slower() -> None:
    for phase in ("prefill", "decode", "generate", "serve"):
        newest, before = (
            passed(*(lowered(engine, phase, batch=batch) for batch in (1, 4, 16, 64, 256)))
            for engine in ("vllm", "vllm@0.12")
        )
        assert (newest.total_s <= before.total_s * (1 + 1e-12)).all()


@pytest.mark.parametrize("phase", ["prefill", "decode", "generate", "serve"])
def test_under_a_graph_without_a_scheduler_there_is_none(phase: str) -> None:
    for engine in ("", "reference", "compile"):
        p = passed(lowered(engine, phase, batch=3))
        assert not p.host
        assert p.host_s.tolist() == [0.0]
        np.testing.assert_allclose(p.total_s, p.device_s, rtol=1e-15)
        assert p.at(3.0, 3.0)[0] == pytest.approx(p.at(-3.0, -3.0)[0], rel=1e-15)


def test_a_cpu_launches_within_the_time_of_its_kernels_and_schedules_before() -> None:
    cpu = simulator.load_hardware("cpu")
    for engine in ("hf", "vllm"):
        p = passed(lowered(engine, "decode", batch=3, dtype="fp32"), hw=cpu)
        own = simulator.load_engine(engine)
        assert not p.host.launch.any()
        host_s = own.each_pass.value + 3 * own.each_sequence.value
        assert p.host_s == pytest.approx([host_s], rel=1e-12)
        np.testing.assert_allclose(p.total_s, p.device_s + host_s, rtol=1e-12)
    assert not passed(lowered("reference", "decode", batch=3, dtype="fp32"), hw=cpu).host


def test_halving_the_layers_halves_their_launches_and_width_leaves_them() -> None:
    dense = lowered("hf")
    half, narrow = simulator.prune(dense, "depth", 0.5), simulator.prune(dense, "width", 0.5)
    p = passed(dense, half, narrow)
    layers = p.workloads.groups.segment == 4
    assert p.host.launch[:, layers].sum(axis=1) == pytest.approx(
        p.host.launch[0, layers].sum() * np.array([1, 0.5, 1])
    )
    assert (p.host.launch[:, ~layers] == p.host.launch[0, ~layers]).all()
    assert (p.host.each_pass == p.host.each_pass[0]).all()
    assert p.host_bound.tolist() == [True] * 3
    seconds = p.total_s.tolist()
    assert seconds[2] == pytest.approx(seconds[0], rel=0.01)
    assert seconds[1] < 0.6 * seconds[0]


def test_a_pass_on_a_slower_host_is_never_faster_and_follows_the_device_less() -> None:
    for engine in ("hf", "vllm", "sglang"):
        workloads = [
            lowered(engine, "decode", batch=b, seq=s)
            for b, s in ((1, 64), (8, 512), (64, 4096), (256, 8192))
        ]
        p = passed(*workloads)
        z = np.linspace(-3, 3, 25)
        seconds, shares = p.at(z, z)
        assert (np.diff(seconds, axis=0) >= -1e-15).all()
        assert (np.diff(shares, axis=0) <= 1e-12).all()
        assert (shares >= 0.0).all()
        assert (shares <= 1.0).all()
        assert (seconds >= p.device_s * (1 - 1e-12)).all()
