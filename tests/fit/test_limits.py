"""A profile that a fit writes can be read again, whatever the times were."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.devices.protocol import Description
from calibration.devices.replay import ReplayDevice, roofline_timings
from calibration.fit.base_profile import base_profile
from calibration.fit.profile import within_ranges
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import ANY_DTYPE, Fitted, HardwareProfile, Provenance, Section
from simulator.hardware.save import save_hardware
from simulator.operators import CONSTANTS

ODD = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-40, 1e40)
ORIGIN = Provenance("x", "0" * 64, "unknown", "x", "x", "x", 30)


def with_values(values: dict[str, float], **more: Any) -> HardwareProfile:
    """A profile with a section of each operator whose constants, of these names, have these
    values."""
    hw = load_hardware("h100")
    sections = {
        (operator, "*" if operator in ANY_DTYPE else "bf16"): Section(
            {name: Fitted(values.get(name, c.default("hopper")), 0.1) for name, c in known.items()},
            provenance=ORIGIN,
            status="calibrated",
            **more,
        )
        for operator, known in CONSTANTS.items()
    }
    return replace(hw, name="odd", aliases=(), path=None).calibrated(sections)


@pytest.mark.parametrize("value", ODD)
def test_every_constant_outside_its_range_is_set_to_its_end_and_stated(
    value: float, tmp_path: Path
) -> None:
    names = {name for known in CONSTANTS.values() for name in known}
    kept, notes = within_ranges(with_values(dict.fromkeys(names, value)))
    save_hardware(kept, tmp_path / "odd.yaml")
    loaded = load_hardware(tmp_path / "odd.yaml")
    changed = 0
    for (operator, dtype), section in loaded.sections.items():
        for name, known in CONSTANTS[operator].items():
            end = min(max(value, known.low), known.high)
            assert section[name] == (end if math.isfinite(value) else known.default("hopper"))
            changed += section[name] != value
        assert any(
            note.startswith(operator) and "outside the range" in note for note in notes
        ) == any(not known.low <= value <= known.high for known in CONSTANTS[operator].values()), (
            operator,
            dtype,
        )
    assert changed


@pytest.mark.quick
@settings(max_examples=25, deadline=None)
@given(
    st.floats(),
    st.floats(),
    st.floats(),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
def test_scales_errors_and_arrays_too(
    scale: float, error: float, std_error: float, log: float
) -> None:
    arrays = {"values": np.full((1, 1, 1), log), "start": np.zeros(3), "step": np.ones(3)}
    hw = with_values({}, section_scale=scale, accuracy={"mape": error})
    gemm = replace(hw.sections["gemm", "bf16"], arrays=arrays)
    gemm = replace(gemm, constants={**gemm.constants, "t0": Fitted(3e-6, std_error)})
    kept, _ = within_ranges(replace(hw, sections={**hw.sections, ("gemm", "bf16"): gemm}))
    section = kept.sections["gemm", "bf16"]
    assert 0.01 <= section.section_scale <= 10.0
    assert all(abs(v) <= 1e9 for v in section.accuracy.values())
    assert np.abs(section.arrays["values"]).max() <= 5.0
    assert (
        section.constants["t0"].std_error is None
        or 0.0 <= section.constants["t0"].std_error <= 1e30
    )


PLANTED = Description("replay", "planted device", {"replay": "1"}, 8e9, 5e7)


@pytest.mark.quick
@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_measured_facts_are_within_the_ranges_of_a_profile(factor: float, tmp_path: Path) -> None:
    plain = roofline_timings()
    hw = base_profile(ReplayDevice(lambda op: factor * plain(op), description=PLANTED), "fp32")
    save_hardware(replace(hw, sections=MappingProxyType({})), tmp_path / "p.yaml")
    assert load_hardware(tmp_path / "p.yaml").name == hw.name
