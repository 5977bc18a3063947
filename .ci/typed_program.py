"""Somebody else's program with the installed package: ``mypy --strict`` must see its types and the
mistake below."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import simulator
from calibration.records.timing_table import Records
from simulator.errors import InputError


def gains(hardware: str, families: list[str]) -> dict[str, float]:
    hw: simulator.HardwareProfile = simulator.load_hardware(hardware)
    dense: simulator.Workload = simulator.lower(
        simulator.load_model("llama-3.1-8b"), phase="decode", batch=1, seq=2048
    )
    out: dict[str, float] = {}
    for name in families:
        result: simulator.Speedup = simulator.speedup(
            dense, simulator.prune(dense, name, sparsity=0.5), hw
        )
        out[name] = result.speedup
    return out


def times(m: NDArray[np.int64], hw: simulator.HardwareProfile) -> NDArray[np.floating]:
    return simulator.gemm_time(m, 4096, 4096, hw).seconds


def mistake() -> None:
    simulator.load_hardware(3)  # type: ignore[arg-type]  # without the package's types this line would need no excuse


if __name__ == "__main__":
    try:
        print(
            gains("h100", ["depth", "width"]),
            times(np.arange(1, 4), simulator.load_hardware(Path("h100.yaml"))),
            Records.__name__,
        )
    except InputError as error:
        print(error)
