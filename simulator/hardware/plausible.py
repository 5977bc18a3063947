"""Compare facts of a datasheet with the range of their architecture (``chips.yaml``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from simulator.units import rate

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

_NARROW: Mapping[str, float] = {
    **{"tf32": 0.5, "fp16": 1.0, "bf16": 1.0},
    **dict.fromkeys(("fp8", "fp8_block", "int8"), 2.0),
}
"""Rate of a format over that of fp16."""

LEAST, MOST = 0.03, 1.05
"""Shares of a chip's rate between which rates are plausible: the least is that of int8 on a B300,
and datasheets round up."""


def _chips() -> Any:
    return yaml.safe_load(Path(__file__).with_name("chips.yaml").read_text(encoding="utf-8"))


def implausible(hw: HardwareProfile) -> Iterator[str]:
    """Yield a warning on each rate and on a bandwidth outside the range of the architecture."""
    chips = _chips().get(hw.architecture)
    if chips is None:
        return
    clock = max(hw.boost_clock_hz, hw.max_clock_hz)
    per_clock = hw.sm_count * clock
    fp32 = hw.rates["fp32"].flop_per_s if "fp32" in hw.rates else 0.0
    chip = min(chips, key=lambda one: abs(one["fp32"] - fp32 / per_clock))
    low, high = (1e12 * end for end in chip["bandwidth"])
    if not low <= hw.bandwidth_bytes_per_s <= high:
        got = rate(hw.bandwidth_bytes_per_s, "B/s")
        yield (
            f"datasheet.bandwidth: expected {rate(low, 'B/s')} to {rate(high, 'B/s')} for"
            f" {hw.architecture}, got {got}"
        )
    for name, one in hw.rates.items():
        tensor = chip["fp16"] * _NARROW.get(name, chip["four_bits"])
        most = per_clock * (chip["fp32"] if name == "fp32" else tensor)
        if LEAST * most <= one.flop_per_s <= MOST * most:
            continue
        twice = 1.7 < one.flop_per_s / most < 2.1
        sparse = "; check that it is not the rate with 2:4 sparsity" if twice else ""
        yield (
            f"datasheet.rates.{name}: expected {rate(LEAST * most, 'FLOP/s')} to"
            f" {rate(most, 'FLOP/s')} for {hw.architecture} with {hw.sm_count} multiprocessors at"
            f" {clock / 1e9:.4g} GHz, got {rate(one.flop_per_s, 'FLOP/s')}{sparse}"
        )
