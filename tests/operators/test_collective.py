"""Collectives: limits of alpha-beta, bad input, the fit recovering planted constants, and the
published tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from operator_times import collective_time

from calibration.evidence.build_profiles import datasheet
from calibration.fit.operators import CollectiveFit
from calibration.fit.profile import fit_profile
from calibration.fit.section import fit_section
from calibration.records.timing_table import Records, Source
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.save import save_hardware
from simulator.operators.base import Link
from simulator.operators.collective import COLLECTIVE_CONSTANTS as CONSTANTS
from simulator.operators.collective import COLLECTIVES, Messages

pytestmark = pytest.mark.quick

PAYLOAD = np.geomspace(1e2, 1e10, 120)


def bare(name: str) -> HardwareProfile:
    return datasheet(name)


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("kind", COLLECTIVES)
@pytest.mark.parametrize("name", ["a100_sxm_80gb", "h100_sxm", "l40s"])
def test_time_grows_with_payload_from_a_floor_to_the_link(
    name: str, kind: str, devices: int
) -> None:
    hw = bare(name)
    t = collective_time(PAYLOAD, devices, hw, kind=kind)
    assert np.all(np.diff(t.seconds) > 0)
    assert np.all(t.seconds >= t.roofline_s)
    assert np.all(t.lower >= t.roofline_s)
    assert np.all(t.upper > t.seconds)
    assert t.bottlenecks[0] == "launch"
    assert t.bottlenecks[-1] == "link"
    # share of the payload that each device must receive; the switch of the H100 adds up, so an
    # all-reduce passes once
    part = (devices - 1) / devices
    reduced = 1.0 if name == "h100_sxm" else 2 * part
    share = {"all_reduce": reduced, "send": 1.0}.get(kind, part)
    assert t.roofline_s[-1] == pytest.approx(share * PAYLOAD[-1] / hw.link.bandwidth_bytes_per_s)
    wire = {"all_reduce": 2 * part, "send": 1.0}.get(kind, part) * PAYLOAD[-1]
    e_link, sharing = (CONSTANTS[name].default(hw.link.defaults) for name in ("e_link", "sharing"))
    slower = e_link * (2 / devices) ** sharing
    assert t.seconds[-1] == pytest.approx(wire / hw.link.bandwidth_bytes_per_s / slower, rel=0.05)


def test_one_device_costs_nothing_and_more_cost_more() -> None:
    hw = bare("h100_sxm")
    t = collective_time(1e8, [1, 2, 4, 8], hw)
    assert t.seconds[0] == t.lower[0] == t.upper[0] == 0.0
    assert np.all(np.diff(t.seconds) > 0)
    assert collective_time(np.ones((3, 1)), [2, 4], hw).seconds.shape == (3, 2)


def test_bad_input_is_named() -> None:
    hw = bare("h100_sxm")
    with pytest.raises(InputError, match="all_reduce"):
        collective_time(1.0, 2, hw, kind="allreduce")
    with pytest.raises(InputError, match="connects"):
        collective_time(1.0, 1000, hw)
    alone = replace(hw, link=None)
    with pytest.raises(InputError, match="no link"):
        collective_time(1.0, 2, alone)
    assert collective_time(1.0, 1, alone).seconds == 0.0


def test_an_engine_s_own_all_reduce_is_used_where_it_is_faster_and_allowed() -> None:
    sizes = np.geomspace(1e3, 1e9, 50)
    calls = Messages(
        np.zeros(50, dtype=np.intp), sizes, np.full(50, 8.0), Link("nvlink4", 450e9, 1e-6, 8)
    )
    default = {name: constant.default("nvlink") for name, constant in CONSTANTS.items()}
    with_own, without = (calls.seconds({**default, "own_devices": n}) for n in (8.0, 4.0))
    assert np.all(with_own <= without)
    assert with_own[0] < 0.5 * without[0]
    large = sizes > default["own_bytes"]
    np.testing.assert_array_equal(with_own[large], without[large])


def test_more_devices_than_a_pair_fall_to_pcie_over_bridges() -> None:
    hw = bare("a100_pcie_80gb")
    bridged, pcie, nvswitch = hw.over("bridge"), hw.over("pcie"), bare("a100_sxm_80gb")
    pair = collective_time(PAYLOAD, 2, bridged).seconds
    np.testing.assert_allclose(
        pair[PAYLOAD > 1e6], collective_time(PAYLOAD, 2, nvswitch).seconds[PAYLOAD > 1e6]
    )
    assert collective_time(1e8, 2, pcie).seconds > 8 * collective_time(1e8, 2, bridged).seconds
    across = collective_time(1e8, [2, 4], bridged).seconds
    assert across[0] == collective_time(1e8, 2, bridged).seconds
    # a ring crosses PCIe once per pair, so pairs share less of an uplink than four devices without
    # bridges
    assert (
        collective_time(1e8, 4, nvswitch).seconds * 5
        < across[1]
        < collective_time(1e8, 4, pcie).seconds
    )
    assert across[1] == collective_time(1e8, 4, bridged).seconds
    assert collective_time(1e8, 4, bridged).roofline_s == pytest.approx(1.5e8 / 32e9)


def test_without_peer_access_there_is_no_engine_s_all_reduce_and_less_bandwidth() -> None:
    hw = bare("l40s")
    peers, host, slot = (
        collective_time([1e4, 1e9], 2, hw.over(name)).seconds
        for name in ("pcie", "pcie-host", "pcie4x8")
    )
    assert np.all(host > 1.2 * peers)
    assert host[0] > 1.8 * peers[0]
    assert slot[1] == pytest.approx(2.0 * peers[1], rel=0.01)


def test_a_ring_between_peers_is_more_certain_than_one_through_host_memory() -> None:
    hw, fitted = bare("l40s"), load_hardware("l40s")
    peers, host = (collective_time(1e8, [2, 8], hw.over(name)) for name in ("pcie", "pcie-host"))
    half = [np.sqrt(t.upper / t.lower) - 1.0 for t in (peers, host)]
    assert np.all(half[0] < 1.1)
    assert half[1][1] > 5.0 * half[0][1]
    # every stack's fit has the peers' rate, though two were timed on a host without peer access
    for stack in ("sglang", "trtllm", "vllm"):
        eight = collective_time(1e8, 8, fitted.on(stack)).seconds
        assert peers.lower[1] < eight < peers.upper[1]


def test_a_mesh_has_one_link_to_each_other_device() -> None:
    hw = bare("mi300x")
    rooflines = collective_time(1e9, [2, 8], hw).roofline_s
    assert rooflines[0] == pytest.approx(1e9 / (hw.link.bandwidth_bytes_per_s / 7))
    assert rooflines[1] == pytest.approx(1.75e9 / hw.link.bandwidth_bytes_per_s)


@pytest.mark.parametrize(
    ("name", "link", "said"),
    [
        ("l40s", "bridge", "l40s has no such connection; expected one of pcie, pcie-host"),
        ("a100_pcie_80gb", "nvswitch", "expected one of pcie, bridge, pcie-host"),
        ("h100_sxm", "bridge", "expected one of nvswitch, pcie, pcie-host"),
        ("h100_sxm", "nvswich", "did you mean nvswitch"),
        ("h100_sxm", "pcie7", "link 'pcie7' is unknown"),
    ],
)
def test_a_connection_that_a_gpu_does_not_have_is_named(name: str, link: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        bare(name).over(link)


TRUTH = {
    **{name: constant.default("nvlink") for name, constant in CONSTANTS.items()},
    **{
        "t0_s": 4e-6,
        "hop_s": 7e-7,
        "e_link": 0.8,
        "pipe_s": 3e-5,
        "own_t0_s": 2.5e-6,
        "own_e": 0.7,
    },
    **{"own_step_s": 1e-5, "own_bytes": 2.0**23},
}


def planted(noise: float) -> CollectiveFit:
    rng = np.random.default_rng(7)
    code, size, devices = (
        a.ravel() for a in np.meshgrid(np.arange(4), 2.0 ** np.arange(9, 30), [2.0, 4.0, 8.0])
    )
    calls = Messages(code, size, devices, Link("nvlink4", 450e9, 1e-6, 8))
    return CollectiveFit(calls, calls.seconds(TRUTH) * np.exp(noise * rng.normal(size=code.size)))


def test_fit_recovers_planted_constants() -> None:
    fit = fit_section(planted(0.01))
    for name in ("t0_s", "hop_s", "e_link", "pipe_s", "own_t0_s", "own_e", "own_step_s"):
        constant = fit.section.constants[name]
        assert abs(constant.value - TRUTH[name]) < 4 * constant.std_error
        assert constant.std_error < 0.1 * constant.value
    assert (fit.section["own_devices"], fit.section["own_bytes"]) == (8.0, 2.0**23)
    assert fit.section.constants["sharing"].status == "fixed"
    assert fit.section.accuracy["mape"] < 0.02


def test_a_fit_skips_what_no_link_can_do() -> None:
    messages = planted(0.0)
    seconds = messages.seconds.copy()
    seconds[:2], seconds[-1] = np.nan, 1e-9
    assert fit_section(replace(messages, seconds=seconds)).rows == len(seconds) - 3


def test_records_make_a_section_that_is_saved_and_used(tmp_path: Path) -> None:
    measured, hw = planted(0.0), bare("h100_sxm")
    m, seconds = measured.calls, measured.seconds
    rows = Records.from_columns(
        [Source("H100", {"NCCL": "2"}, kernel="mine")],
        operator="collective",
        role=np.array(COLLECTIVES)[m.code],
        n=m.payload.astype(np.int64),
        batch=m.devices.astype(np.int64),
        seconds=seconds,
        launch="graph",
    )
    fitted = fit_profile(hw, rows).profile
    assert set(fitted.sections) == {("collective", "*")}
    path = tmp_path / "h100_sxm.yaml"
    save_hardware(fitted, path)
    again = load_hardware(path)
    for kind in ("all_reduce", "all_to_all"):
        of_kind = m.code == COLLECTIVES.index(kind)
        t = collective_time(m.payload[of_kind], m.devices[of_kind], again, kind=kind)
        np.testing.assert_allclose(t.seconds, seconds[of_kind], rtol=0.02)


def test_more_bytes_never_take_less_time_whatever_the_noise() -> None:
    hw = bare("h100_sxm")
    fitted = hw.calibrated({("collective", "*"): fit_section(planted(0.15)).section})
    for kind in COLLECTIVES:
        for devices in (2, 4, 8):
            t = collective_time(np.geomspace(256, 1e10, 2000), devices, fitted, kind=kind).seconds
            assert np.all(t >= np.maximum.accumulate(t) * (1 - 1e-5))
