"""A typed program of a user of the installed package, which CI checks and runs outside the
repository.

``mypy --strict`` must see an error at each ``type: ignore``, because it reports unused ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import simulator
from calibration.records.timing_table import Records


def gains(hw: simulator.HardwareProfile, families: list[str]) -> dict[str, float]:
    dense: simulator.Workload = simulator.lower(
        simulator.load_model("llama-3.1-8b"), phase="decode", batch=1, seq=2048
    )
    out: dict[str, float] = {}
    for name in families:
        result: simulator.Result = simulator.speedup(
            dense, simulator.prune(dense, name, sparsity=0.5), hw
        )
        out[name] = result.speedup
    return out


def times(m: NDArray[np.int64], hw: simulator.HardwareProfile) -> NDArray[np.floating]:
    return simulator.gemm_time(m, 4096, 4096, hw).seconds


def mistakes(result: simulator.Speedup) -> None:  # type: ignore[name-defined]
    simulator.load_hardware(3)  # type: ignore[arg-type]
    simulator.lod_hardware(3)  # type: ignore[attr-defined]
    print(simulator.predict("llama-3.1-8b", "depth 0.25", "h100").sped)  # type: ignore[attr-defined]


if __name__ == "__main__":
    profile = simulator.load_hardware("h100")
    print(gains(profile, ["depth", "width"]), times(np.arange(1, 4), profile), Records.__name__)
