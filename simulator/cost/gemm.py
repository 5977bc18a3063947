"""GEMM cost: arrays of shapes and a profile in, times with intervals out.

Use :func:`gemm_time` for times, :func:`gemm_steps` for the same time built up effect by effect. The analytic form
(:mod:`simulator.cost.gemm_model`) is multiplied by a fitted residual (:mod:`simulator.cost.residual_grid`); shapes a
profile has measured (:mod:`simulator.cost.measured_shapes`) take its place; no prediction beats the datasheet at the
highest clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import flag, instance
from simulator.arrays import Array
from simulator.cost.gemm_model import (
    ELEMENT_BYTES,
    WGMMA_ROWS,
    Core,
    CoreTime,
    Machine,
    core_time,
    cube,
    machine_core,
    quantised,
)
from simulator.cost.gemm_shapes import PRECISION, Options, chunks, read_shapes
from simulator.cost.measured_shapes import Exact, exact_of
from simulator.cost.residual_grid import Residual, between_measured, residual_of
from simulator.errors import InputError
from simulator.hardware.constants import GEMM_CONSTANTS as CONSTANTS
from simulator.hardware.formats import LABELS, label_of
from simulator.hardware.profile import HardwareProfile, unfitted
from simulator.uncertainty.error_model import (
    BOTTLENECKS,
    COVERAGE_FACTOR,
    OperatorTimes,
    Posterior,
    Spread,
    Uncertainty,
    level_scale,
    posterior_of,
    with_intervals,
)
from simulator.uncertainty.gemm import uncertainty_of
from simulator.workload import Kernel, Kind

Columns = dict[str, NDArray[Any]]

DENSE, SPARSE24, UNSTRUCTURED, BLOCK_SPARSE, GROUPS_N, GROUPS_K, SPMV = (int(kernel) for kernel in Kernel)

GROUPS = {GROUPS_N: 20.0, GROUPS_K: 52.0}
"""Features of a group at which skipping groups costs as much as it computes: a main loop takes 1 + (features /
group)^1.5 of its time. From kernels of the taxonomy's authors at 4096^3 on an RTX 5090, where groups of 128 outputs are
7 % slower than whole tokens, groups of 32 inputs three times as slow (EIT-NLP/LLM-Pruning, DynamicPruningKernels)."""
GROUPS_STEP = 0.9
"""e_tc of those kernels over that of dense ones (the same)."""

_COMPUTE, _MEMORY, _L2, _LATENCY, _LAUNCH = map(BOTTLENECKS.index, ("compute", "memory", "l2", "latency", "launch"))


@dataclass(frozen=True, repr=False)
class GemmTime(OperatorTimes):
    """Times of GEMMs; the fields of :class:`OperatorTimes`, and with ``detail`` what the model chose (else empty
    arrays)."""

    measured: NDArray[np.bool_]  # kept with the profile for this very shape, not predicted
    tile_m: Array  # output tile of a block
    tile_n: Array
    split_k: Array  # blocks that share one tile's k
    waves: Array  # output tiles (times split_k) over SMs
    compute_s: Array  # main loop of the analytic form, before the residual
    memory_s: Array  # memory system, likewise
    fixed_s: Array  # fixed time, likewise
    residual: Array  # factor of the fitted residual


@dataclass(frozen=True)
class GemmKernel:
    """What a profile says about GEMMs of one dtype, weight format and kernel, as numbers."""

    core: Core
    residual: Residual | None
    exact: Exact | None  # shapes measured with cold weights, used in place of the model
    align_step: float
    align_load: float
    load_scale: float
    pad_m: float
    group: float  # features, of GROUPS; 0 where no groups are skipped
    spread: Spread  # factors on the prior of its errors
    unknown: tuple[str, ...]  # columns of errors of what no fit has seen
    measured: tuple[Array, Array] | None  # smallest and largest log2 of m, n, k the fit has seen
    posterior: Posterior | None


@lru_cache(maxsize=128)
def gemm_kernel(hw: HardwareProfile, dtype: str, weight_dtype: str | None, kernel: int) -> GemmKernel:
    """The kernel of a profile; InputError for a dtype the device lacks or a weight format that is none."""
    rate, weight = hw.rate(dtype), weight_dtype or dtype
    if weight not in ELEMENT_BYTES:
        raise InputError(f"weight dtype {weight!r} is unknown; expected one of {', '.join(ELEMENT_BYTES)}")
    label = label_of(dtype, weight)
    own = label == dtype or (("gemm", label) in hw.sections and dtype in LABELS.get(label, ()))
    section = hw.section("gemm", label if own else dtype)
    c = {name: float(section[name]) for name in CONSTANTS}
    element, weight_bytes, peak = ELEMENT_BYTES[dtype], ELEMENT_BYTES[weight], rate.flop_per_s
    if section.status == "default" and element < 2.0:
        c["e_tc"], c["t0"] = c["e_tc_8bit"], c["t0_8bit"]
    load_scale, pad_m = 1.0, 1.0
    unknown = [*unfitted("gemm", section, hw.architecture)]
    if kernel == SPARSE24:
        if rate.sparse_factor <= 1.0:
            raise InputError(f"{hw.name} has no 2:4 sparse tensor cores for {dtype}")
        peak *= rate.sparse_factor
        c["e_tc"] *= c["sparse_step"]
        c["t0"] += c["sparse_time"]
        load_scale /= c["sparse_load"]
        # half the values and two bits of index for each; of the two operands L2 feeds, one is the compressed weight
        weight_bytes = 0.5 * weight_bytes + 0.125
        c["b_l2"] *= 2.0 * ELEMENT_BYTES[weight] / (ELEMENT_BYTES[weight] + weight_bytes)
        pad_m = 8.0
        unknown.append("sparse24")
    elif kernel == BLOCK_SPARSE or kernel in GROUPS:
        c["e_tc"] *= GROUPS_STEP if kernel in GROUPS else c["block_step"]
        unknown.append("blocks")
    elif kernel == SPMV:
        unknown.append("spmv")
    if ELEMENT_BYTES[weight] < element and not own:
        c |= quantised(c, ELEMENT_BYTES[weight] / element)
        unknown.append("quantised")
    least_rows = WGMMA_ROWS if section.status == "default" and hw.architecture == "hopper" else 1.0
    machine = replace(Machine.of(hw, dtype), peak_flop_per_s=peak, weight_bytes=weight_bytes, least_rows=least_rows)
    machine = replace(machine, ragged=kernel in GROUPS)
    core = machine_core(machine, c, PRECISION)
    residual = residual_of(section.arrays, PRECISION)
    if residual is not None:
        residual = between_measured(residual, section.arrays["measured_m"])
    # what was measured of another format or device says nothing exact here: no exact shapes of a borrowed section
    plain = kernel == DENSE and own and section.status == "calibrated"
    exact, align = (
        exact_of(section.arrays) if plain else None,
        (c["align_step" if element >= 2.0 else "align_step_8bit"], c["align_load"]),
    )
    measured = None
    if "measured" in section.arrays:
        low, high = np.asarray(section.arrays["measured"], dtype=PRECISION)
        measured = low, high
    spread, posterior = hw.spread(section), posterior_of(hw)
    scales = *align, load_scale, pad_m, GROUPS.get(kernel, 0.0)
    return GemmKernel(core, residual, exact, *scales, spread, tuple(unknown), measured, posterior)


def with_section(hw: HardwareProfile, dtype: str, section: Any) -> HardwareProfile:
    """A profile whose GEMM section of a dtype is another."""
    return replace(hw, sections={**hw.sections, ("gemm", dtype): section})


def gemm_time(
    m: Any,
    n: Any,
    k: Any,
    hw: HardwareProfile,
    *,
    dtype: str = "bf16",
    weight_dtype: str | None = None,
    kernel: Any = DENSE,
    density: Any = 1.0,
    block: Any = 0,
    cold: bool = True,
    copies: Any = None,
    level: float = 0.9,
    detail: bool = False,
    uncertainty: bool = False,
) -> GemmTime:
    """Time of y[m, n] = x[m, k] w[k, n]; arrays broadcast.

    Parameters
    ----------
    m, n, k : int or array
        Tokens, output features, input features; at least 1.
    hw : HardwareProfile
        The device.
    dtype, weight_dtype : str
        Of activations and arithmetic; of stored weights (default: the same), narrower: a weight-only quantised kernel.
    kernel : int or array
        0 dense, 1 2:4 sparse, 2 zeros without structure (timed as dense); 3 tiles of tokens, 4 groups of outputs, 5 of
        inputs skipped (m, n, k count those computed); 6 zeros without structure stored away (m of 1 only).
    density : float or array
        Share of weights that are not zero; only the last kernel gains by it beyond its format.
    block : int or array
        Features of the groups that are skipped, 0: wide ones (:data:`GROUPS`).
    cold : bool
        Weights come from DRAM, as in a decoder; False: they are as warm as L2 allows.
    copies : int or array, optional
        Weights used in turn, as benchmarks rotate them: their footprint says how warm they are. Overrides ``cold``;
        ``inf``: cold ones.
    level, detail, uncertainty : float, bool, bool
        Of the interval, in (0, 1); whether to fill the detail fields, and ``uncertainty``, too.

    Raises
    ------
    InputError
        For a dtype the device lacks, what is no whole number from 1 up, or a level outside (0, 1).

    Examples
    --------
    >>> from simulator.hardware.library import load_hardware
    >>> t = gemm_time([1, 2048], 4096, 4096, load_hardware("a100"))
    >>> t.bottlenecks.tolist(), bool((t.lower < t.seconds).all())
    (['memory', 'compute'], True)
    """
    path = Options(dtype, weight_dtype, kernel, cold, copies, level, flag("uncertainty", uncertainty), density, block)
    found = _columns(m, n, k, hw, path, flag("detail", detail))
    unsure = Uncertainty.from_columns(found, int(Kind.GEMM)) if uncertainty else None
    columns = {f.name: found.get(f.name, np.zeros(0)) for f in fields(GemmTime) if f.name != "uncertainty"}
    return GemmTime(**columns, uncertainty=unsure)


def gemm_steps(m: Any, n: Any, k: Any, hw: HardwareProfile, **options: Any) -> Mapping[str, Array]:
    """The time of GEMMs built up effect by effect, s; options are those of :func:`gemm_time`.

    "roofline" is max(FLOP / peak, bytes / bandwidth); "tile": with the chosen tile's padding; "wave": and idle SMs of
    the last wave; "alignment": and n or k off 16 bytes; "kernel": all but the fixed time; "launch": all of it.
    """
    found = _columns(m, n, k, hw, Options(**options), detail=True)
    between = {name: found[name] for name in ("tile", "wave", "alignment", "kernel")}
    return {"roofline": found["roofline_s"], **between, "launch": found["seconds"]}


def _columns(m: Any, n: Any, k: Any, hw: HardwareProfile, path: Options, detail: bool) -> Columns:
    """Columns of shapes, kernel by kernel, in chunks so that their intermediate arrays stay in the cache."""
    instance("hw", hw, HardwareProfile, "load_hardware")
    codes, given = read_shapes(m, n, k, path)
    shape, given = codes.shape, {name: np.ascontiguousarray(a).reshape(-1) for name, a in given.items()}
    m, n, k = (given[name] for name in "mnk")
    out: Columns = {}
    for code, rows, precision in chunks(codes, m, n, k):
        if code == SPMV and m[rows].max(initial=1.0) > 1.0:
            raise InputError(f"an SpMV kernel multiplies one token, got m = {m[rows].max():g}")
        kernel = gemm_kernel(hw, path.dtype, path.weight_dtype, DENSE if code == UNSTRUCTURED else code)
        some = {name: a[rows] for name, a in given.items()}
        for name, values in _timed(kernel, path, detail, precision, **some).items():
            if name not in out:
                out[name] = np.zeros((len(m), *values.shape[1:]), dtype=values.dtype)
            out[name][rows] = values
    return {name: values.reshape((*shape, *values.shape[1:])) for name, values in out.items()}


def _timed(
    kernel: GemmKernel, path: Options, detail: bool, precision: Any, m: Array, n: Array, k: Array, **more: Array
) -> Columns:
    """Columns of :class:`GemmTime` for shapes of one kernel, ``more`` their copies and blocks where they have any; with
    ``detail`` also the rungs of the ladder."""
    core, machine, shapes = kernel.core, kernel.core.machine, (m, n, k)
    m, n, k = (a.astype(precision) for a in shapes)
    used = np.minimum(more["copies"], 1e15).astype(precision) if "copies" in more else None
    byte_us, flop_us = 1e6 / machine.bandwidth_bytes_per_s, 1e6 / machine.peak_flop_per_s
    compute = n * k * m * (2.0 * flop_us)
    moved = n * k * (machine.weight_bytes * byte_us) + (n + k) * m * (machine.element_bytes * byte_us)
    rows = np.ceil(m * (1.0 / kernel.pad_m)) * kernel.pad_m
    halvings: Array | float = alignment_halvings(n, k, machine.element_bytes)
    if not np.any(halvings):
        halvings = 0.0  # a number multiplies the tables of tiles, an array every shape by every tile
    step_scale = 1.0 + kernel.align_step * halvings
    if kernel.group and "block" in more:
        features = np.where(more["block"] > 0, more["block"], np.inf)
        step_scale = step_scale * (1.0 + (kernel.group / features) ** 1.5).astype(precision)
    load_scale = kernel.load_scale * (1.0 + kernel.align_load * halvings)
    parts = core_time(rows, n, k, core, used, step_scale, load_scale)
    factor: Array | float = 1.0
    if kernel.residual is not None:
        factor = np.exp(kernel.residual.at(rows, n, k, parts, core))
    # single precision must not round below the physics
    floor = np.maximum(compute * (1.0 / machine.headroom), parts.dram_bytes * byte_us) * (1.0 + 5e-7)
    unsure = uncertainty_of(
        core, rows, n, k, parts, step_scale, load_scale, kernel.spread, kernel.unknown, kernel.measured
    )
    us, lower, upper = with_intervals(parts.total_us * factor, floor, unsure, path.level, kernel.posterior)
    times = {"seconds": us, "lower": lower, "upper": upper, "roofline_s": np.maximum(compute, moved)}
    out: Columns = {name: 1e-6 * values.astype(np.float64) for name, values in times.items()}
    out |= {"bound": _bound(parts, core, k), "measured": np.zeros(len(m), dtype=np.bool_)}
    if path.uncertainty:
        out |= unsure.columns()
    if kernel.exact is not None and used is None:
        hit, seconds, log_half = kernel.exact.at(*shapes)
        width = np.exp(log_half[hit] * level_scale(path.level))
        out["measured"], seconds = hit, seconds[hit]
        out["seconds"][hit], out["lower"][hit], out["upper"][hit] = seconds, seconds / width, seconds * width
        if path.uncertainty:
            # measured alone: in a pass its surroundings still tell, as a local error
            out["shared"][hit], out["own"][hit] = 0.0, (log_half[hit] / COVERAGE_FACTOR) ** 2
    if not detail:
        return out
    one = np.ones(len(m))
    out |= {"tile_m": core.tile_m[parts.tile, 0] * one, "tile_n": core.tile_n[parts.tile, 0] * one}
    out |= {"split_k": parts.split * one, "waves": parts.tiles * one * parts.split / machine.sm_count}
    out |= {"compute_s": np.cbrt(parts.compute3) * one * 1e-6, "memory_s": parts.memory_us * one * 1e-6}
    out |= {"fixed_s": core.t0_us * 1e-6 * one, "residual": factor * one}
    return out | _steps(kernel, out, *shapes)


def _steps(kernel: GemmKernel, t: Columns, m: Array, n: Array, k: Array) -> Columns:
    """What :func:`gemm_steps` has between the roofline and the time, which ``t`` tells."""
    machine = kernel.core.machine
    halvings = alignment_halvings(n, k, machine.element_bytes)
    weight_s = machine.weight_bytes * n * k / machine.bandwidth_bytes_per_s
    memory = weight_s + machine.element_bytes * m * (n + k) / machine.bandwidth_bytes_per_s
    tiles = np.ceil(m / t["tile_m"]) * np.ceil(n / t["tile_n"])
    padded = 2.0 * tiles * t["tile_m"] * t["tile_n"] * k / machine.peak_flop_per_s
    blocks = tiles * t["split_k"] / machine.sm_count
    idle = np.where(blocks > 1.0, 1.0 if machine.persistent else np.ceil(blocks) / blocks, 1.0 / blocks)
    slower = padded * idle * (1.0 + kernel.align_step * halvings)
    return {
        "tile": np.maximum(padded, memory),
        "wave": np.maximum(padded * idle, memory),
        "alignment": np.maximum(slower, memory + weight_s * ((1.0 + kernel.align_load * halvings) - 1.0)),
        "kernel": t["seconds"] - np.minimum(t["fixed_s"] * t["residual"], t["seconds"]),
    }


def _bound(parts: CoreTime, core: Core, k: Array) -> NDArray[np.int8]:
    """What holds each shape: its largest part; a main loop may wait for its step's latency or for L2's feed."""
    waits = np.where(core.step_us > 1.5 * core.flop_us, _LATENCY, _COMPUTE).astype(np.int8)
    bound: NDArray[np.int8] = waits[parts.tile, 0]
    if not core.machine.persistent:
        feed = core.feed_us[parts.tile, 0] * parts.tiles * k * (1.0 / core.step_elements)
        bound[cube(feed) > 0.5 * parts.compute3] = _L2
    bound[cube(parts.memory_us) > parts.compute3] = _MEMORY
    bound[parts.total_us < 2.0 * core.t0_us] = _LAUNCH
    return bound


def alignment_halvings(n: Array, k: Array, element_bytes: float) -> Array:
    """Times the alignment of a row of n or k elements falls short of 16 bytes by a factor of two; else 0. Formats of 8
    bits and fewer have no kernels for less: 1 wherever they are off."""
    kind = np.int32 if n.dtype == np.float32 else np.int64
    low = n.astype(kind) | k.astype(kind)
    whole = round(math.log2(16 / element_bytes))
    sizes = 2 ** np.arange(1 if element_bytes >= 2.0 else whole, whole + 1)
    return sum(((low & (size - 1)) != 0 for size in sizes.tolist()), np.zeros(n.shape, dtype=n.dtype))
