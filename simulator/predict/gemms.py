"""Single matrix products as records: time, interval, rate, limit, and the steps from the roofline to the time.

Use :func:`gemm_table` for every combination of sizes and devices, :func:`gemm_points` for the GEMMs of a workload on a
roofline; :func:`simulator.gemm_time` is the array function beneath.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.cost.gemm_shapes import Options
from simulator.predict.settings import once, one_of, profiles, whole_number
from simulator.uncertainty.forward import forward_passes
from simulator.uncertainty.operators import STEPS, gemm_predicted
from simulator.workload import DTYPES, ROLES, Kernel, Kind, Workload, dtype_code
from simulator.workload_batch import WorkloadBatch

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile


@dataclass(frozen=True)
class GemmPoints:
    """GEMM shapes of a workload on a roofline."""

    role: tuple[str, ...]
    intensity: NDArray[np.float64]  # FLOP/byte
    achieved_flop_per_s: NDArray[np.float64]  # useful FLOPs over predicted time
    share: NDArray[np.float64]  # of the GEMM time


@dataclass(frozen=True)
class GemmRecord:
    """One product y[M,N] = x[M,K] w[K,N] on one device."""

    m: int
    n: int
    k: int
    hardware: str
    dtype: str
    weight_dtype: str
    semi_structured: bool  # 2:4 weights on sparse tensor cores
    cold: bool  # weights come from memory, not from the L2 cache
    seconds: float
    lower_s: float
    upper_s: float
    roofline_s: float
    bottleneck: str
    flop_per_s: float  # FLOPs that are not multiplications by zero, over the time
    peak_flop_per_s: float  # dense datasheet rate
    clock_headroom: float  # highest clock over that of the datasheet's rate
    bandwidth_bytes_per_s: float
    intensity: float  # FLOP/byte
    ladder_s: Mapping[str, float]  # time with each effect and all before it


def gemm_table(
    m: Sequence[int],
    n: Sequence[int],
    k: Sequence[int],
    hardware: Sequence[str | HardwareProfile],
    *,
    dtype: str = "bf16",
    weight_dtype: str | None = None,
    semi_structured: bool = False,
    cold: bool = True,
    level: float = 0.9,
) -> tuple[GemmRecord, ...]:
    """Every combination of tokens, output and input features on every device.

    >>> (r,) = gemm_table([2048], [4096], [4096], ["h100"])
    >>> r.roofline_s < r.seconds < r.upper_s
    True
    """
    for name, values in (("M", m), ("N", n), ("K", k)):
        for value in values:
            whole_number(name, value)
    weight, kernel = weight_dtype or dtype, Kernel.SPARSE24 if semi_structured else Kernel.DENSE
    for given in (dtype, weight):
        one_of("dtype", given, DTYPES)
    shapes = np.array(once(itertools.product(m, n, k)), dtype=np.int64)
    columns: dict[str, Any] = dict(zip("mnk", shapes.T), kernel=kernel, density=0.5 if semi_structured else 1.0)
    columns |= {"dtype": dtype_code(dtype), "weight_dtype": dtype_code(weight)}
    rows = Workload.from_columns(role=["q"] * len(shapes), **columns)
    out: list[GemmRecord] = []
    for hw in profiles(hardware):
        time, _ = gemm_predicted(
            rows.m, rows.n, rows.k, hw, Options(dtype, weight, rows.kernel, cold), level, detail=True
        )
        ladder = {step: time.details[step] for step in STEPS}
        about: dict[str, Any] = {"hardware": hw.label, "dtype": dtype, "weight_dtype": weight, "cold": cold}
        about |= {"semi_structured": semi_structured, "peak_flop_per_s": hw.peak_flop_per_s(dtype)}
        about |= {"bandwidth_bytes_per_s": hw.bandwidth_bytes_per_s, "clock_headroom": hw.clock_headroom}
        columns = {"seconds": time.seconds, "lower_s": time.lower, "upper_s": time.upper, "roofline_s": time.roofline_s}
        columns |= {"flop_per_s": rows.flops / time.seconds, "intensity": rows.flops / rows.bytes}
        for i, size in enumerate(shapes.tolist()):
            row: dict[str, Any] = {name: float(column[i]) for name, column in columns.items()}
            row.update(zip("mnk", size), **about, bottleneck=str(time.bottlenecks[i]))
            out.append(GemmRecord(**row, ladder_s={step: float(column[i]) for step, column in ladder.items()}))
    return tuple(out)


def gemm_points(workload: Workload, hw: HardwareProfile) -> GemmPoints:
    """GEMMs of a workload as points of a roofline; those that pruning adds (routers) are left out.

    >>> from simulator import load_hardware, load_model, lower
    >>> points = gemm_points(lower(load_model("llama-3.1-8b"), phase="decode"), load_hardware("h100"))
    >>> bool((points.intensity < 2).all()), round(float(points.share.sum()), 9)
    (True, 1.0)
    """
    rows = np.flatnonzero((workload.kind == Kind.GEMM) & (workload.count > 0) & ~workload.overhead)
    chosen = workload.take(rows)
    p = forward_passes(WorkloadBatch.of([chosen]), hw)
    flops, roles = p.workloads.flops, tuple(ROLES[code] for code in chosen.role)
    return GemmPoints(roles, flops / p.workloads.bytes, flops / p.row_s, p.share)
