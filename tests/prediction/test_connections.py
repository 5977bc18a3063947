"""The connection of devices decides the time of a pass and its interval; a note names an assumed
connection."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from simulator import load_hardware, lower, predict, table
from simulator.errors import InputError
from simulator.hardware.profile import Fitted, HardwareProfile, Section
from simulator.prediction.notes import assumed_link
from simulator.prediction.result import Result
from simulator.prediction.sweep import read_grid, sweep_results

pytestmark = pytest.mark.quick


def dense(
    hardware: str | HardwareProfile, devices: int, link: str | None = None, phase: str = "prefill"
) -> Result:
    return predict("llama-3.1-70b", "depth 0.25", hardware, phase=phase, devices=devices, link=link)


def width(r: Result) -> float:
    return r.dense_upper / r.dense_lower


def test_a_link_changes_the_time_of_a_pass_and_its_interval() -> None:
    pair = {
        link: dense("a100_pcie_80gb", 2, link) for link in ("bridge", "pcie", "pcie-host", None)
    }
    assert pair["bridge"].dense_s < 0.8 * pair["pcie"].dense_s < 0.8 * pair["pcie-host"].dense_s
    assert pair[None].dense_s == pair["pcie"].dense_s
    assert width(pair["bridge"]) < width(pair["pcie"]) < width(pair[None])
    assert pair[None].dense_lower < pair["bridge"].dense_s
    assert pair["pcie-host"].dense_s < pair[None].dense_upper


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_an_assumed_pcie_link_of_four_devices_is_uncertain_and_nvswitch_is_not(phase: str) -> None:
    pcie, nvswitch = dense("h100_pcie", 4, phase=phase), dense("h100_sxm", 4, phase=phase)
    assert width(pcie) > 1.02 * width(dense("h100_pcie", 4, "pcie", phase))
    assert phase == "decode" or width(pcie) > 2.0 * width(nvswitch)
    host = dense("h100_pcie", 4, "pcie-host", phase)
    bridged = dense("h100_pcie", 4, "bridge", phase)
    assert pcie.dense_lower < bridged.dense_s < pcie.dense_upper
    assert pcie.dense_lower < host.dense_s < pcie.dense_upper


def test_a_note_names_an_assumed_link_where_it_matters() -> None:
    def notes(hardware: str, devices: int, link: str | None = None, batch: int = 8) -> list[str]:
        found = table(
            "llama-3.1-8b",
            hardware,
            "depth",
            0.25,
            batch=[batch, 2 * batch],
            devices=devices,
            link=link,
        )
        return [note for note in found.notes if "are assumed to have" in note]

    (one,) = notes("rtx_4090", 4)
    assert "pcie4 through host memory (no peer access)" in one
    assert one.endswith("use --link pcie")
    assert not notes("rtx_4090", 4, "pcie-host")
    assert not notes("rtx_4090", 1)
    # collectives take little of it
    w = lower("llama-3.1-8b", phase="decode", devices=2, engine="hf")
    assert not assumed_link(load_hardware("a100"), w)


def test_collectives_of_one_s_own_need_no_note_and_are_certain() -> None:
    hw = load_hardware("rtx_4090")
    measured = Section({"e_link": Fitted(0.5)}, status="calibrated")
    own = replace(hw, sections={**hw.sections, ("collective", "*"): measured})
    w = lower("llama-3.1-8b", batch=8, devices=4)
    assert (bool(assumed_link(hw, w)), assumed_link(own, w)) == (True, "")
    assert own.own_link


def test_a_grid_has_a_link(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    axes = (
        "models: llama-3.1-8b\nhardware: a6000\nsparsities: 0.25\nphases: prefill\nbatches:"
        " 8\nseqs: 2048\n"
    )
    times = {}
    for link in ("bridge", "pcie-host"):
        path.write_text(f"{axes}families: depth\ndevices: 2\nlink: {link}\n")
        times[link] = float(sweep_results(read_grid(path)).columns["dense_s"][0])
    assert times["bridge"] < 0.9 * times["pcie-host"]
    path.write_text(f"{axes}link: nvswich\n")
    with pytest.raises(InputError, match=r"grid.yaml:7:7: link: .*did you mean nvswitch"):
        read_grid(path)
