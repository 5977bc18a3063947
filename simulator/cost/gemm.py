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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import instance
from simulator.arrays import Array, FloatArray
from simulator.cost.base import ELEMENT_BYTES, Calls, Estimate, Machine, bottleneck, element_bytes, octaves_outside_fit
from simulator.cost.gemm_model import (
    WGMMA_ROWS,
    Analytical,
    ReadyModel,
    analytical_time,
    cube,
    ready_model,
    weight_only_constants,
)
from simulator.cost.gemm_shapes import PRECISION, Options, chunks, read_shapes
from simulator.cost.measured_shapes import MeasuredShapes, measured_shapes
from simulator.cost.residual_grid import ResidualGrid, RowResidual
from simulator.errors import InputError
from simulator.hardware.constants import GEMM_CONSTANTS as CONSTANTS
from simulator.hardware.formats import LABELS, label_of
from simulator.hardware.profile import HardwareProfile, Section, unfitted
from simulator.workload import Kernel, Kind

CLOCKED: Mapping[str, float] = MappingProxyType(
    {"ampere": 0.78e12, "ada": 1.03e12, "hopper": 1.41e12, "blackwell": 0.78e12, "blackwell_sm100": 2.25e12}
)
"""FLOP per joule (16-bit datasheet rate over power limit) of the GPUs that the defaults of ``e_tc`` come from: A100,
L40S, H100, RTX PRO 6000, B200 (SXM). A GPU with fewer keeps a higher clock: see :func:`clocked`."""
UNLIMITED = 0.9
"""Share of the datasheet rate where power limits no clock: an H20 reaches 0.93 in fp8 (InferSim), and less in the
16-bit steps of SGLang, which are 6 % longer than with 0.81 and 16 % longer than with 1; the RTX 4090 reaches 1.02."""

EDGE = 1e-4
"""Steps before the last node at which a coordinate of the residual stops."""

GROUPS = {Kernel.GROUPS_N: 20.0, Kernel.GROUPS_K: 52.0}
"""Features per group at which skipping groups costs as much as computing them: a main loop takes 1 + (features /
group)^1.5 of its time. From kernels of the taxonomy's authors at 4096^3 on an RTX 5090, where groups of 128 outputs are
7 % slower than whole tokens, groups of 32 inputs three times as slow (EIT-NLP/LLM-Pruning, DynamicPruningKernels)."""
GROUPS_STEP = 0.9
"""e_tc of those kernels over that of dense ones (same source)."""

SPARSE24_PARTS: Mapping[str, str] = {
    "sparse_step": "compute",
    "sparse_load": "memory",
    "sparse_time": "launch",
    "sparse_tau": "serial",
}
"""Constants that 2:4 kernels alone have -> the part of the time that each changes."""

TILES: tuple[tuple[int, int], ...] = ((128, 256), (128, 128), (64, 128))
"""Tiles of which stacks may choose any: how full the last wave is depends on the choice."""

_COMPUTE, _MEMORY, _L2, _LATENCY, _LAUNCH = map(bottleneck, ("compute", "memory", "l2", "latency", "launch"))


@dataclass(frozen=True)
class GemmKernel:
    """What a profile says about GEMMs of one number format, weight format and kernel, as numbers."""

    model: ReadyModel
    section: Section | None
    residual: ResidualGrid | None
    row_residual: RowResidual | None
    shapes: MeasuredShapes | None  # measured with cold weights, used instead of the model
    align_step: float
    align_load: float
    load_scale: float
    pad_m: float
    group: float  # features, of GROUPS; 0 where no groups are skipped
    unfitted: tuple[str, ...]  # error factors of what no fit has seen
    dense: GemmKernel | None = None  # of weights alone in fewer bits: the kernel without them, which computes the same
    assumed: tuple[str, ...] = ()  # parts of a 2:4 kernel's time of which no table of its architecture tells


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

    @property
    def _cold(self) -> bool:
        return bool(np.isinf(self.copies).all())


@lru_cache(maxsize=128)
def gemm_kernel(
    hw: HardwareProfile, dtype: str, weight_dtype: str | None, kernel: Kernel, searched: bool = True
) -> GemmKernel:
    """Return the kernel of a profile; InputError for a number format that the device lacks or that is unknown.

    ``searched`` is that of :class:`~simulator.cost.gemm_shapes.Options`.
    """
    rate, weight = hw.rate(dtype), weight_dtype or dtype
    element, weight_bytes, peak = ELEMENT_BYTES[dtype], element_bytes(weight, "weight dtype"), rate.flop_per_s
    label = label_of(dtype, weight)
    own = label == dtype or (("gemm", label) in hw.sections and dtype in LABELS.get(label, ()))
    section = hw.section("gemm", label if own else dtype)
    c = {name: float(section[name]) for name in CONSTANTS}
    if section.status == "default":
        c["e_tc"] = clocked(c["e_tc"] * (1.0 if element >= 2.0 else c["narrow_step"]), hw)
    load_scale, pad_m, serial = 1.0, 1.0, False
    assumed: tuple[str, ...] = ()
    factors = [*unfitted("gemm", section, hw.architecture)]
    weight_only = ELEMENT_BYTES[weight] < element
    compressed = kernel == Kernel.SPARSE24 and not weight_only
    if kernel == Kernel.SPARSE24:
        if rate.sparse_factor <= 1.0:
            raise InputError(f"{hw.name} has no 2:4 sparse tensor cores for {dtype}")
        known, assumed = sparse24_constants(section, hw.architecture)
        c |= known
        peak *= rate.sparse_factor
        c["e_tc"] *= c["sparse_step"]
        # half the values and two bits of index for each; of the two operands L2 feeds, one is the compressed weight
        weight_bytes = 0.5 * weight_bytes + 0.125
        if compressed:
            pad_m, serial = 8.0, not searched
            c["t0"] += c["sparse_time"]
            load_scale /= c["sparse_load"]
        else:  # as the dense kernel of the format (Sparse-Marlin): a step waits for the bytes of its weights
            assumed = tuple(part for part in assumed if part == "compute")
            c["tau"] *= weight_bytes / ELEMENT_BYTES[weight]
        c["b_l2"] *= 2.0 * ELEMENT_BYTES[weight] / (ELEMENT_BYTES[weight] + weight_bytes)
        factors.append("sparse24")
    elif kernel == Kernel.BLOCK_SPARSE or kernel in GROUPS:
        c["e_tc"] *= GROUPS_STEP if kernel in GROUPS else c["block_step"]
        factors.append("blocks")
    elif kernel == Kernel.SPMV:
        factors.append("spmv")
    if weight_only and not own:
        c |= weight_only_constants(c, ELEMENT_BYTES[weight] / element)
        factors.append("quantised")
    hopper_default = section.status == "default" and hw.architecture == "hopper"
    machine = replace(
        Machine.of(hw, dtype),
        peak_flop_per_s=peak,
        weight_bytes=weight_bytes,
        least_rows=WGMMA_ROWS if hopper_default and not weight_only else 1.0,
        ragged=kernel in GROUPS,
        serial=serial,
    )
    residual = ResidualGrid.from_arrays(section.arrays)
    if residual is not None:
        residual = replace(residual, values=residual.values.astype(PRECISION), inset=EDGE)
    # measured shapes of another format or device say nothing exact here: a fallback section has none
    plain = kernel == Kernel.DENSE and own and section.status == "calibrated"
    return GemmKernel(
        model=ready_model(machine, c, PRECISION),
        section=section,
        residual=residual,
        row_residual=RowResidual.from_arrays(section.arrays),
        shapes=measured_shapes(section.arrays) if plain else None,
        align_step=c["align_step" if element >= 2.0 else "align_step_8bit"],
        align_load=c["align_load"],
        load_scale=load_scale,
        pad_m=pad_m,
        group=GROUPS.get(kernel, 0.0),
        unfitted=tuple(factors),
        dense=gemm_kernel(hw, dtype, None, kernel) if weight_only and kernel == Kernel.DENSE else None,
        assumed=assumed,
    )


def clocked(e_tc: float, hw: HardwareProfile) -> float:
    """Return the default share of the datasheet rate on a device that may need less power for it, or more.

    Under a power limit the clock falls as the square root of the power per FLOP: the L40S and the RTX 4090 (0.62 and
    1.02 of rates that need 1.03 and 0.37 TFLOP/J) differ by a power of 0.48. Without a limit kernels reach
    :data:`UNLIMITED` of the rate.

    >>> from simulator.hardware.library import load_hardware
    >>> [round(clocked(0.8, load_hardware(name)), 2) for name in ("h100_sxm", "h100_pcie", "h20")]
    [0.8, 0.65, 0.9]
    """
    rates = [hw.rates[name].flop_per_s for name in ("bf16", "fp16") if name in hw.rates]
    if hw.architecture not in CLOCKED or not rates:
        return e_tc
    return min(e_tc * math.sqrt(CLOCKED[hw.architecture] * hw.power_w / rates[0]), max(e_tc, UNLIMITED))


def sparse24_constants(section: Section, architecture: str) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return the constants of 2:4 kernels, and the parts of the time of which no table of the architecture tells.

    A constant that no fit moved is the default of the device's own architecture, which may differ from that of an
    inherited section.
    """
    values, assumed = {}, []
    for name, part in SPARSE24_PARTS.items():
        constant, own = CONSTANTS[name], section.constants[name]
        values[name] = constant.default(architecture) if own.status == "default" else own.value
        if own.status == "default" and architecture not in constant.defaults:
            assumed.append(part)
    return values, tuple(assumed)


def with_section(hw: HardwareProfile, dtype: str, section: Section) -> HardwareProfile:
    """Return a profile with another GEMM section of a number format."""
    return replace(hw, sections={**hw.sections, ("gemm", dtype): section})


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
    """Return the elements in 16 bytes, as a power of two: kernels are fastest for rows of a multiple of them.

    >>> aligned_elements(2.0), aligned_elements(1.0), aligned_elements(0.5625)
    (8, 16, 32)
    """
    return int(2 ** round(math.log2(16 / element_bytes)))
