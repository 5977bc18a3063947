"""Predict single GEMMs: time, interval, rate, bottleneck, and the steps from the roofline to the
time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.codes import ROLES, Kernel, Kind, dtype_code, label_of
from simulator.hardware.profile import HardwareProfile
from simulator.operators.gemm import Options
from simulator.prediction.requests import once, profiles
from simulator.request import SETTINGS
from simulator.uncertainty.forward import forward_passes
from simulator.uncertainty.operators import STEPS, gemm_predicted
from simulator.workload import Workload, WorkloadBatch


@dataclass(frozen=True)
class GemmPoints:
    role: tuple[str, ...]
    intensity: NDArray[np.float64]  # FLOP/byte
    achieved_flop_per_s: NDArray[np.float64]  # useful FLOPs over predicted time


@dataclass(frozen=True)
class GemmRecord:
    m: int
    n: int
    k: int
    hardware: str
    dtype: str
    weight_dtype: str
    # software stack whose kernels were fitted; "" for the user's own calibration, and if none were
    stack: str
    # "calibrated", "inherited" (from another stack or GPU), or "default" (nothing was fitted)
    status: str
    semi_structured: bool  # 2:4 weights on sparse tensor cores
    cold: bool  # weights come from memory, not from the L2 cache
    seconds: float
    lower_s: float
    upper_s: float
    roofline_s: float
    bottleneck: str
    flop_per_s: float  # FLOPs without multiplications by zero, over the time
    peak_flop_per_s: float  # dense datasheet rate
    clock_headroom: float  # highest clock over the clock of the datasheet rate
    bandwidth_bytes_per_s: float
    intensity: float  # FLOP/byte
    steps_s: Mapping[str, float]  # time with each effect and all previous ones


def gemm_table(
    m: Sequence[int],
    n: Sequence[int],
    k: Sequence[int],
    hardware: Sequence[str | HardwareProfile],
    *,
    dtype: str = "bf16",
    weight_dtype: str | None = None,
    semi_structured: bool = False,
    warm: bool = False,
) -> tuple[GemmRecord, ...]:
    for name, values in (("M", m), ("N", n), ("K", k)):
        for value in values:
            SETTINGS["batch"].check(value, name)
    weight = weight_dtype or dtype
    for each in (dtype, weight):
        SETTINGS["dtype"].check(each)
    sizes = np.array(once(itertools.product(m, n, k)), dtype=np.int64)
    rows = Workload.from_columns(
        role=["q"] * len(sizes),
        m=sizes[:, 0],
        n=sizes[:, 1],
        k=sizes[:, 2],
        kernel=Kernel.SPARSE24 if semi_structured else Kernel.DENSE,
        density=0.5 if semi_structured else 1.0,
        dtype=dtype_code(dtype),
        weight_dtype=dtype_code(weight),
    )
    options = Options(dtype, weight, rows.kernel, copies=1 if warm else None)
    return tuple(record for hw in profiles(hardware) for record in _records(rows, hw, options))


def _records(rows: Workload, hw: HardwareProfile, options: Options) -> Iterator[GemmRecord]:
    time, _ = gemm_predicted(rows.m, rows.n, rows.k, hw, options, detail=True)
    dtype, weight = options.dtype, options.weight_dtype or options.dtype
    section = hw.section("gemm", label_of(dtype, weight))
    columns = {
        "m": rows.m,
        "n": rows.n,
        "k": rows.k,
        "seconds": time.seconds,
        "lower_s": time.lower,
        "upper_s": time.upper,
        "roofline_s": time.roofline_s,
        "bottleneck": time.bottlenecks,
        "flop_per_s": rows.flops / time.seconds,
        "intensity": rows.flops / rows.bytes,
    }
    for i in range(len(rows)):
        yield GemmRecord(
            hardware=hw.label,
            dtype=dtype,
            weight_dtype=weight,
            stack=section.stack,
            status=section.status,
            semi_structured=bool(rows.kernel[i] == Kernel.SPARSE24),
            cold=options.copies is None,
            peak_flop_per_s=hw.peak_flop_per_s(dtype),
            clock_headroom=hw.clock_headroom,
            bandwidth_bytes_per_s=hw.bandwidth_bytes_per_s,
            steps_s={name: time.details[name][i].item() for name in STEPS},
            **{name: column[i].item() for name, column in columns.items()},
        )


def gemm_points(workload: Workload, hw: HardwareProfile) -> GemmPoints:
    """Return the GEMMs and the products of experts of a workload as points of a roofline, without
    those that pruning adds (routers)."""
    rows = np.flatnonzero(
        np.isin(workload.kind, (Kind.GEMM, Kind.EXPERTS))
        & (workload.count > 0)
        & ~workload.overhead
    )
    if not len(rows):  # no layer is left
        return GemmPoints((), np.empty(0), np.empty(0))
    chosen = workload.take(rows)
    p = forward_passes(WorkloadBatch.of([chosen]), hw)
    flops, roles = p.workloads.flops, tuple(ROLES[code] for code in chosen.role)
    return GemmPoints(roles, flops / p.workloads.bytes, flops / p.row_s)
