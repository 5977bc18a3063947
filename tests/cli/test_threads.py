"""Threads of a CPU: an option of the commands that measure, part of a run's identity, stated where
they differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from calibration.devices import open_device
from calibration.devices.protocol import Description
from calibration.devices.replay import ReplayDevice, roofline_timings
from calibration.fit.base_profile import thread_notes
from calibration.fit.profile import fit_profile
from calibration.records.timing_table import Records, Source, write_records
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.save import save_hardware

TWO = 2


def described(threads: int) -> Description:
    return Description(
        "cpu", f"Some CPU ({threads} threads)", {"torch": "2.9", "threads": str(threads)}, 8e9, 32e6
    )


@pytest.fixture(autouse=True)
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """The devices that the commands open, with their threads; each is a planted CPU of as many
    (default: two)."""
    found: list[tuple[str, int | None]] = []

    def planted(name: str, threads: int | None = None, **_: Any) -> ReplayDevice:
        found.append((name, threads))
        times = roofline_timings(2e11 * (threads or TWO), 2e10, 3e-6)
        refused = {"gemm_2to4": "a CPU has no sparse tensor cores"}
        about = described(threads or TWO)
        return ReplayDevice(
            times, noise=0.004, description=about, setup_s=0.02, formats=("fp32",), refused=refused
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("calibration.devices.open_device", planted)
    return found


MODEL = (
    "smollm2-135m --device cpu --dtype fp32 --layers 2 --phase decode --seq 64 --family depth"
    " --sparsity 0.5"
)


@pytest.mark.usefixtures("three_folds", "undrawn")
def test_commands_that_measure_open_the_device_with_the_threads_given(
    opened: list[Any], cli: Any
) -> None:
    lines = {
        "calibrate cpu -o a --measure-only --dtype fp32 --budget 5s": 0,
        "calibrate cpu -o b --dtype fp32 --budget 20s --engine none": 1,  # too few rows for a profile
        f"upper-bound {MODEL} -o c --budget 5s": 0,
    }
    for line, status in lines.items():
        _, err = cli(f"{line} --threads 1", status)
        assert "status: Some CPU (1 threads)" in err
    assert opened == [("cpu", 1)] * 3


def test_threads_of_another_device_are_refused(cli: Any) -> None:
    for name in ("cuda", "replay:planted"):
        with pytest.raises(
            InputError, match=f"expected device cpu with a number of threads, got {name}"
        ):
            open_device(name, threads=1)  # imported before the fixture replaced it


def of_two_threads(file: str) -> None:
    """Write a profile that is fitted to GEMMs of a CPU with two threads, and its rows."""
    rng = np.random.default_rng(1)
    m, n, k = (rng.choice([64, 128, 256, 512], 60) for _ in range(3))
    text = described(TWO)
    rows = Records.from_columns(
        [Source(text.device, dict(text.stack))],
        dtype="fp32",
        m=m,
        n=n,
        k=k,
        seconds=3e-6 + 2.0 * m * n * k / 1e11,
    )
    Path("rows.parquet").write_bytes(write_records(rows))
    bare = replace(load_hardware("cpu"), sections=MappingProxyType({}), title="Some CPU")
    save_hardware(fit_profile(bare, rows).profile, file)


def test_a_profile_of_other_threads_is_stated_with_what_to_do(cli: Any) -> None:
    of_two_threads("two.yaml")
    assert thread_notes(load_hardware("two.yaml"), described(TWO).device) == []
    note = (
        "note: cpu is calibrated with 2 threads, but Some CPU (1 threads) has 1; its times do not"
        " hold there; use"
    )
    bound = f"upper-bound {MODEL} --budget 5s --hardware two.yaml"
    assert f"{note} --threads 2, or" in cli(f"{bound} -o one --threads 1")[1]
    assert "threads, but" not in cli(f"{bound} -o two --threads 2")[1]
    assert "threads, but" not in cli("validate two.yaml rows.parquet")[1]
    cli("calibrate cpu -o other --measure-only --dtype fp32 --budget 20s --threads 1")
    assert note in cli("validate two.yaml other", 1)[1]  # it holds for none of them
