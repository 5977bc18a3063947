"""GEMMs whose times are the model's, with planted factors and noise; golden files."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from calibration.records.timing_table import Records, Source
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.uncertainty.operators import gemm_time

GOLDEN = Path(__file__).parent / "golden"
SOURCE = Source("planted GPU", {"planted": "1"}, method="planted", origin="test", date="2026-01-01")


def bare(name: str = "h100_sxm") -> HardwareProfile:
    """Return a profile with the datasheet alone: tests do not depend on the fit of a table."""
    return replace(load_hardware(name), sections=MappingProxyType({}), path=None)


HW = bare()


def gemms(factor: float = 1.0, noise: float = 0.0, rows: int = 300, seed: int = 0) -> Records:
    """GEMMs whose times are the model's, times a factor and log-normal noise."""
    rng = np.random.default_rng(seed)
    m = rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048], rows)
    n, k = rng.choice([512, 1024, 2048, 4096, 8192], (2, rows))
    seconds = gemm_time(m, n, k, HW).seconds * factor * np.exp(noise * rng.standard_normal(rows))
    return Records.from_columns([SOURCE], m=m, n=n, k=k, seconds=seconds)


def golden_records() -> tuple[HardwareProfile, Records]:
    """A small fixed case: 60 GEMMs with a planted pattern of errors, no random numbers."""
    hw = replace(bare(), name="planted", title="planted GPU")
    sizes = [1, 16, 256, 4096, 8192], [1024, 4096, 8192], [1024, 2048, 4096, 16384]
    m, n, k = (a.ravel() for a in np.meshgrid(*sizes, indexing="ij"))
    wave = 1.0 + 0.06 * np.sin(np.arange(len(m)))
    return hw, Records.from_columns(
        [SOURCE], m=m, n=n, k=k, seconds=gemm_time(m, n, k, hw).seconds * wave
    )


def check_golden(name: str, text: str) -> None:
    """Compare with a golden file; ``PRUNESIM_GOLDEN=write`` in the environment writes it anew."""
    path = GOLDEN / name
    if os.environ.get("PRUNESIM_GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
