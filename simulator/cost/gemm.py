"""GEMM cost: the analytical model meets a profile (constants, residual, alignment, measured shapes).

Use :func:`estimates` for the cost of shapes, chunk by chunk, and :func:`~simulator.uncertainty.operators.gemm_steps`
for the same time built up effect by effect. The analytical form is :mod:`simulator.cost.gemm_model`. Its residual is a
grid over log2 of m, n, k. Shapes that a profile has measured (:mod:`simulator.cost.measured_shapes`) take the measured
time. No prediction beats the datasheet at the highest clock.

Symbols
-------
m, n, k : tokens, output features, input features of y[m, n] = x[m, k] w[k, n]
t0 : fixed time of a kernel, s
e_tc, e_d : shares of the datasheet rate and of the datasheet bandwidth that kernels reach
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import instance
from simulator.arrays import Array, FloatArray
from simulator.cost.base import Calls, Estimate, Machine, bottleneck, octaves_outside_fit
from simulator.cost.gemm_kernel import GemmKernel, gemm_kernel
from simulator.cost.gemm_model import Analytical, ReadyModel, analytical_time, cube, ready_model
from simulator.cost.gemm_shapes import Options, chunks, read_shapes
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.workload import Kernel, Kind

TILES: tuple[tuple[int, int], ...] = ((128, 256), (128, 128), (64, 128))
"""Tiles of which stacks may choose any: how full the last wave is depends on the choice."""

_COMPUTE, _MEMORY, _L2, _LATENCY, _LAUNCH = map(bottleneck, ("compute", "memory", "l2", "latency", "launch"))


@dataclass(frozen=True)
class Products(Calls):
    """GEMMs y[m, n] = x[m, k] w[k, n] of one machine, as a fit takes them: dense and aligned, in float64."""

    machine: Machine
    m: FloatArray
    n: FloatArray
    k: FloatArray
    copies: FloatArray  # weights that each benchmark used in turn, inf for cold ones

    @property
    def operator(self) -> str:
        return "gemm"

    def estimate(self, c: Mapping[str, Any]) -> Estimate:
        """Return the cost, microseconds."""
        kernel = GemmKernel(ready_model(self.machine, c), None, None, None, None, 0.0, 0.0, 1.0, 1.0, 0.0, ())
        given = {"m": self.m, "n": self.n, "k": self.k}
        return estimate(kernel, given if self._cold else {**given, "copies": self.copies})

    def seconds(self, c: Mapping[str, Any]) -> FloatArray:
        """Return the analytical time alone, s."""
        copies = None if self._cold else self.copies
        return 1e-6 * analytical_time(self.m, self.n, self.k, ready_model(self.machine, c), copies).total_us

    def seconds_of(self, many: Sequence[Mapping[str, float]]) -> FloatArray:
        """Return the analytical time with each of several sets of constants, (sets, rows): in one go, which for few
        rows takes hardly longer than one set."""
        sets, rows = len(many), len(self.m)
        columns = {name: np.array([c[name] for c in many]) for name in many[0]}
        varied = {name: column for name, column in columns.items() if np.ptp(column)}
        model = ready_model(self.machine, {**many[0], **varied}).for_each(rows)
        m, n, k, copies = (np.tile(a, sets) for a in (self.m, self.n, self.k, self.copies))
        return 1e-6 * analytical_time(m, n, k, model, None if self._cold else copies).total_us.reshape(sets, rows)

    @property
    def _cold(self) -> bool:
        return bool(np.isinf(self.copies).all())


def estimates(
    m: Any, n: Any, k: Any, hw: HardwareProfile, options: Options, *, steps: bool = False
) -> tuple[tuple[int, ...], Iterator[tuple[Any, Estimate]]]:
    """Return the shape of the broadcast arguments, and the cost of GEMMs in chunks: flat rows and their estimate.

    ``steps`` also fills the estimate's ``details`` with what the model chose and with its steps.
    """
    instance("hw", hw, HardwareProfile, "load_hardware")
    codes, given = read_shapes(m, n, k, options)
    flat = {name: np.ascontiguousarray(a).reshape(-1) for name, a in given.items()}

    def parts() -> Iterator[tuple[Any, Estimate]]:
        for code, rows, precision in chunks(codes, flat["m"], flat["n"], flat["k"]):
            kind = Kernel(code)
            if kind == Kernel.SPMV and flat["m"][rows].max(initial=1.0) > 1.0:
                raise InputError(f"an SpMV kernel multiplies one token, got m = {flat['m'][rows].max():g}")
            # zeros without structure run as a dense product
            kind = Kernel.DENSE if kind == Kernel.UNSTRUCTURED else kind
            kernel = gemm_kernel(hw, options.dtype, options.weight_dtype, kind, options.searched)
            yield rows, estimate(kernel, {name: a[rows] for name, a in flat.items()}, precision, steps)

    return codes.shape, parts()


def estimate(
    kernel: GemmKernel, given: Mapping[str, Array], precision: Any = np.float64, steps: bool = False
) -> Estimate:
    """Return the cost of GEMMs of one kernel from arrays m, n, k, and copies and block where they have any; in us."""
    model, machine = kernel.model, kernel.model.machine
    m, n, k = (given[name].astype(precision) for name in "mnk")
    copies = np.minimum(given["copies"], 1e15).astype(precision) if "copies" in given else None  # inf: cold
    byte_us, flop_us = 1e6 / machine.bandwidth_bytes_per_s, 1e6 / machine.peak_flop_per_s
    compute = n * k * m * (2.0 * flop_us)
    moved = n * k * (machine.weight_bytes * byte_us) + (n + k) * m * (machine.element_bytes * byte_us)
    rows = np.ceil(m * (1.0 / kernel.pad_m)) * kernel.pad_m
    halvings: Array | float = alignment_halvings(n, k, machine.element_bytes)
    if not np.any(halvings) or not (kernel.align_step or kernel.align_load):
        halvings = 0.0  # a number multiplies the tables of tiles, an array every shape by every tile
    step_scale: Array | float = 1.0 + kernel.align_step * halvings**0.5
    if kernel.group and "block" in given:
        features = np.where(given["block"] > 0, given["block"], np.inf)
        step_scale = step_scale * (1.0 + (kernel.group / features) ** 1.5).astype(precision)
    load_scale = kernel.load_scale * (1.0 + kernel.align_load * halvings)
    a = analytical_time(rows, n, k, model, copies, step_scale, load_scale)
    position = np.log2(rows), np.log2(n), np.log2(k)
    coordinates, factor = np.stack(position, axis=1), np.float32(1.0)
    if kernel.residual is not None:
        log_factor = kernel.residual(position)
        if kernel.row_residual is not None:
            log_factor = log_factor + kernel.row_residual(rows)
        factor = np.exp(log_factor)
    # single precision must not round below the physics
    floor = np.maximum(compute * (1.0 / machine.headroom), a.dram_bytes * byte_us) * (1.0 + 5e-7)
    loadings, idle = _loadings(a, model, rows, n, k, step_scale, load_scale)
    loadings |= {name: np.float32(1.0) for name in kernel.unfitted}
    if "serial" not in kernel.assumed:
        loadings.pop("serial", None)
    parts = [loadings[part] for part in ("compute", "memory") if part in kernel.assumed]
    if parts:
        loadings["sparse24 default"] = sum(parts)
    if "generic" in kernel.unfitted:  # every GPU draws much the same share of its DRAM's bandwidth
        loadings["generic"] = 1.0 - (loadings["memory"] - loadings["l2"])
    time, bottlenecks = a.total_us * factor, _bottleneck(a, model, k)
    if kernel.dense is not None:  # weights in fewer bits save memory time, not arithmetic
        dense = estimate(kernel.dense, given, precision)
        least = dense.time * dense.loadings["compute"]
        time, bottlenecks = np.maximum(time, least), np.where(least > time, dense.bottleneck, bottlenecks)
    out = Estimate(
        operator="gemm",
        kind=int(Kind.GEMM),
        time=time,
        floor=floor,
        roofline=np.maximum(compute, moved),
        bottleneck=bottlenecks,
        loadings=loadings,
        coordinates=coordinates,
        position=position,
        section=kernel.section,
        noise={"idle": idle},
        outside=octaves_outside_fit(coordinates, kernel.section),
        measured=None if kernel.shapes is None or copies is not None else kernel.shapes.at(*(given[x] for x in "mnk")),
        unit_s=1e-6,
    )
    return replace(out, details=_details(kernel, out, a, factor, *(given[x] for x in "mnk"))) if steps else out


def _loadings(
    a: Analytical, model: ReadyModel, m: Array, n: Array, k: Array, step_scale: Any, load_scale: Any
) -> tuple[dict[str, Any], Any]:
    """Return the loadings of the error factors, and the share of the time in which SMs of the last wave idle.

    The fixed time is one part; arithmetic is another, of which the latency of a step, L2's feed and idle SMs take
    shares; memory is the third, of which L2 takes a share.
    """
    c = a.compute3
    launch = model.t0_us / a.total_us
    memory = cube(a.memory_us)
    work = (1.0 - launch) / (c + memory)
    compute, memory = c * work, memory * work
    dram_us = 1e6 / (model.machine.bandwidth_bytes_per_s * model.constants["e_d"])
    dram = a.dram_bytes + (load_scale - 1.0) * (n * k * model.machine.weight_bytes)
    hit = memory * np.clip(1.0 - dram * dram_us / a.memory_us, 0.0, 1.0)
    loadings: dict[str, Any] = {"launch": launch, "compute": compute, "memory": memory, "l2": hit}
    idle: Array | float = 0.0
    if not model.machine.packs:
        waits = (1.0 - (model.flop_us / model.step_us) ** 4)[:, 0][a.tile]
        latency = compute * waits
        if not model.machine.persistent:
            feed = model.feed_us[:, 0][a.tile] * a.tiles * np.ceil(k * (1.0 / model.step_elements))
            feed = np.minimum(cube(feed) / c, 1.0)
            loadings["feed"] = compute * feed
            latency = latency * (1.0 - feed)
        if model.machine.serial:
            serial = a.serial3 / c
            loadings["serial"] = compute * serial
            latency = latency * (1.0 - serial)
        loadings["latency"] = latency
        for tile_m, tile_n in TILES:
            waves = np.ceil(m * (1.0 / tile_m)) * np.ceil(n * (1.0 / tile_n)) * (1.0 / model.machine.sm_count)
            loadings[f"idle {tile_m}x{tile_n}"] = compute * _idle(waves)
        idle = compute * _idle(a.tiles * (1.0 / model.machine.sm_count))
    if np.ndim(step_scale):
        loadings["alignment"] = np.sqrt(np.log(step_scale))  # known to a factor: the smaller, the less certain
    return loadings, idle


def _idle(waves: Array) -> Array:
    """Return the log of whole waves over waves, 0 where there is at most one."""
    return np.asarray(np.where(waves > 1.0, np.log(np.ceil(waves) / waves), 0.0))


def _bottleneck(a: Analytical, model: ReadyModel, k: Array) -> NDArray[np.int8]:
    """Return the largest part of each shape; a main loop may wait for its step's latency or for L2's feed."""
    waits = np.where(model.step_us > 1.5 * model.flop_us, _LATENCY, _COMPUTE).astype(np.int8)
    out: NDArray[np.int8] = waits[a.tile, 0]
    if not model.machine.persistent:
        feed = model.feed_us[a.tile, 0] * a.tiles * k * (1.0 / model.step_elements)
        out[cube(feed) > 0.5 * a.compute3] = _L2
    if model.machine.serial:
        out[2.0 * a.serial3 > a.compute3] = _LATENCY
    out[cube(a.memory_us) > a.compute3] = _MEMORY
    out[a.total_us < 2.0 * model.t0_us] = _LAUNCH
    return out


def _details(
    kernel: GemmKernel, e: Estimate, a: Analytical, factor: Any, m: Array, n: Array, k: Array
) -> dict[str, Array]:
    """Return what the model chose, and the times of the steps between the roofline and the kernel, s."""
    model, machine, one = kernel.model, kernel.model.machine, np.ones(len(m))
    tile_m, tile_n, split = model.tile_m[a.tile, 0] * one, model.tile_n[a.tile, 0] * one, a.split * one
    fixed_s = model.t0_us * 1e-6 * one
    halvings = alignment_halvings(n, k, machine.element_bytes)
    weight_s = machine.weight_bytes * n * k / machine.bandwidth_bytes_per_s
    memory = weight_s + machine.element_bytes * m * (n + k) / machine.bandwidth_bytes_per_s
    tiles = np.ceil(m / tile_m) * np.ceil(n / tile_n)
    padded = 2.0 * tiles * tile_m * tile_n * k / machine.peak_flop_per_s
    blocks = tiles * split / machine.sm_count
    idle = np.where(blocks > 1.0, 1.0 if machine.persistent else np.ceil(blocks) / blocks, 1.0 / blocks)
    slower = padded * idle * (1.0 + kernel.align_step * halvings**0.5)
    return {
        "tile_m": tile_m,
        "tile_n": tile_n,
        "split_k": split,
        "waves": a.tiles * one * a.split / machine.sm_count,
        "compute_s": np.cbrt(a.compute3) * one * 1e-6,
        "memory_s": a.memory_us * one * 1e-6,
        "fixed_s": fixed_s,
        "residual": factor * one,
        "tile": np.maximum(padded, memory),
        "wave": np.maximum(padded * idle, memory),
        "alignment": np.maximum(slower, memory + weight_s * ((1.0 + kernel.align_load * halvings) - 1.0)),
    }


def alignment_halvings(n: Array, k: Array, element_bytes: float) -> Array:
    """Return how often the alignment of a row of n or k elements falls short of 16 bytes by a factor of two; else 0.

    Formats of 8 bits and fewer have no kernels for less: 1 wherever they are off.
    """
    kind = np.int32 if n.dtype == np.float32 else np.int64
    low = n.astype(kind) | k.astype(kind)
    whole = aligned_elements(element_bytes).bit_length() - 1
    sizes = 2 ** np.arange(1 if element_bytes >= 2.0 else whole, whole + 1)
    return sum(((low & (size - 1)) != 0 for size in sizes.tolist()), np.zeros(n.shape, dtype=n.dtype))


def aligned_elements(element_bytes: float) -> int:
    """Return the elements in 16 bytes, as a power of two: kernels are fastest for rows of a multiple of them."""
    return int(2 ** round(math.log2(16 / element_bytes)))
