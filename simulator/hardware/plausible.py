"""Compare facts of a datasheet with the range of their architecture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from simulator.units import rate

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile


@dataclass(frozen=True)
class Chip:
    """Dense FLOP of a multiprocessor per clock, and bandwidths in TB/s, of the GPUs of a chip
    family."""

    fp32: int
    fp16: int  # of tensor cores; GeForce cards have half of it
    bandwidth: tuple[float, float]
    four_bits: int = 4  # rate of 4 bits over that of 16 bits


CHIPS: Mapping[str, tuple[Chip, ...]] = MappingProxyType(
    {
        "volta": (Chip(128, 1024, (0.65, 1.2)),),
        "turing": (Chip(128, 1024, (0.12, 0.7)),),
        "ampere": (Chip(128, 2048, (0.9, 2.1)), Chip(256, 1024, (0.09, 1.05))),
        "ada": (Chip(256, 1024, (0.19, 1.1)),),
        "hopper": (Chip(256, 4096, (1.9, 5.0)),),
        "blackwell": (Chip(256, 1024, (0.25, 1.9)),),
        "blackwell_sm100": (Chip(256, 8192, (7.0, 8.5), 6),),
        "cdna3": (Chip(256, 2048, (3.9, 6.1)),),
        "cdna4": (Chip(256, 4096, (7.0, 8.5)),),
    }
)
"""Chips of each architecture, from the vendors' whitepapers and the datasheets of the slowest and
the fastest memory that cards with them have. A100 and A30 differ from other Ampere GPUs."""

_NARROW: Mapping[str, float] = MappingProxyType(
    {"tf32": 0.5, "fp16": 1.0, "bf16": 1.0, "fp8": 2.0, "fp8_block": 2.0, "int8": 2.0}
)
"""Rate of a format over that of fp16."""

LEAST, MOST = 0.03, 1.05
"""Shares of a chip's rate between which rates are plausible: the least is that of int8 on a B300,
and datasheets round up."""


def implausible(hw: HardwareProfile) -> Iterator[str]:
    """Yield a warning on each rate and on a bandwidth outside the range of the architecture."""
    clock = max(hw.boost_clock_hz, hw.max_clock_hz)
    per_clock = hw.sm_count * clock
    fp32 = hw.rates["fp32"].flop_per_s if "fp32" in hw.rates else 0.0
    chips = CHIPS.get(hw.architecture, ())
    if not chips:
        return
    chip = min(chips, key=lambda one: abs(one.fp32 - fp32 / per_clock))
    low, high = (1e12 * end for end in chip.bandwidth)
    if not low <= hw.bandwidth_bytes_per_s <= high:
        got = rate(hw.bandwidth_bytes_per_s, "B/s")
        yield (
            f"datasheet.bandwidth: expected {rate(low, 'B/s')} to {rate(high, 'B/s')} for"
            f" {hw.architecture}, got {got}"
        )
    for name, one in hw.rates.items():
        tensor = chip.fp16 * _NARROW.get(name, float(chip.four_bits))
        most = per_clock * (chip.fp32 if name == "fp32" else tensor)
        if LEAST * most <= one.flop_per_s <= MOST * most:
            continue
        twice = 1.7 < one.flop_per_s / most < 2.1
        sparse = "; check that it is not the rate with 2:4 sparsity" if twice else ""
        yield (
            f"datasheet.rates.{name}: expected {rate(LEAST * most, 'FLOP/s')} to"
            f" {rate(most, 'FLOP/s')} for {hw.architecture} with {hw.sm_count} multiprocessors at"
            f" {clock / 1e9:.4g} GHz, got {rate(one.flop_per_s, 'FLOP/s')}{sparse}"
        )
