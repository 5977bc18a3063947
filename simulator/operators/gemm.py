"""GEMM: y[m, n] = x[m, k] w[k, n], timed by the analytical model
(:mod:`simulator.operators.gemm_model`) of a profile.

A kernel that skips work, reads narrower weights or has 2:4 weights is the dense kernel with changed
constants. A GPU without a fit has the constants of its architecture (:func:`clocked`). The residual
is a grid over log2 of m, n, k. A measured time of the same shape replaces the prediction. No
prediction exceeds the datasheet at the highest clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import COUNT, SHARE, SIZE, Range, text
from simulator.arrays import Array, CodeArray, FloatArray, array, plain, together
from simulator.codes import DTYPE_BYTES, LABELS, Kernel, Kind, label_of
from simulator.columns import encode
from simulator.errors import InputError
from simulator.operators.base import (
    BOTTLENECKS,
    ELEMENT_BYTES,
    Calls,
    Device,
    Estimate,
    Estimates,
    FittedValues,
    Formats,
    Machine,
    MeasuredOperators,
    Operator,
    ResidualGrid,
    RowResidual,
    Rows,
    RowValues,
    Values,
    element_bytes,
    octaves_outside,
    read_constants,
    unfitted,
)
from simulator.operators.gemm_model import (
    WGMMA_ROWS,
    Analytical,
    ReadyModel,
    analytical_time,
    cube,
    quantisation,
    quantises,
    ready_model,
    weight_only_constants,
    wide_waves,
)

_CONSTANTS, _ERRORS = read_constants("gemm")
GEMM_CONSTANTS = _CONSTANTS["gemm"]

EXACT_BITS = {"exact_m": 22, "exact_n": 21, "exact_k": 21}
"""Bits of m, n and k in the 64-bit key of a measured shape; the largest number of these bits stands
for all larger dimensions, which are never found."""

EXACT_NAMES = (*EXACT_BITS, "exact_s", "exact_log_half")
"""Arrays of measured shapes, of equal length; a profile has all of them or none."""


@dataclass(frozen=True)
class MeasuredShapes:
    key: NDArray[np.uint64]  # m, n and k in one number, ascending
    seconds: FloatArray
    log_half: FloatArray  # log half-width of the 90 % interval

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> MeasuredShapes | None:
        """Return the measured shapes of a section, None without any. ``exact_s`` are seconds of the
        dense kernel with cold weights. ``calibration.records.screening`` makes the arrays from
        records."""
        if not len(arrays.get("exact_m", ())):
            return None
        m, n, k, seconds, log_half = (
            np.asarray(arrays[name], dtype=np.float64) for name in EXACT_NAMES
        )
        key, first = np.unique(_key(m, n, k), return_index=True)
        return cls(key, seconds[first], log_half[first])

    def at(self, m: Array, n: Array, k: Array) -> MeasuredOperators:
        key = _key(m, n, k)
        row = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
        hit = np.asarray(self.key[row] == key)
        return MeasuredOperators(hit, self.seconds[row[hit]], self.log_half[row[hit]])


def _key(*sizes: Array) -> NDArray[np.uint64]:
    """Return m, n and k in one number."""
    key = np.zeros(len(sizes[0]), dtype=np.uint64)
    for size, bits in zip(sizes, EXACT_BITS.values(), strict=True):
        key = (key << np.uint64(bits)) | np.minimum(size, 2.0**bits - 1.0).astype(np.uint64)
    return key


_SPMV = int(Kernel.SPMV)

PRECISION = np.float32
"""Precision of predictions; fits have float64. Their results differ by at most 1e-6."""

CHUNK = 4096
"""Shapes per call: few enough for the second-level cache, many enough to hide the cost of calls."""

EXACT = 2.0**24
MOST_PRODUCT = 1e16
"""Largest size, and largest product of sizes, of a shape in :data:`PRECISION`. Above, whole numbers
are rounded or the cube of a slow device's microseconds overflows, so such shapes are timed in
float64."""

# alignment is computed in 32 bits
_WIDTH = Range(1.0, 2.0**31 - 1.0, "whole numbers from 1 to 2147483647", whole=True)
_COPIES = Range(1.0, math.inf, "whole numbers from 1 up", whole=True)  # inf: always cold
KERNELS = tuple(kernel.name.lower() for kernel in Kernel)
"""Names of kernels; the index is the code."""
_CODE = Range(0.0, len(KERNELS) - 1.0, "names of kernels, or their codes", whole=True)


@dataclass(frozen=True)
class Options:
    dtype: str = "bf16"
    weight_dtype: str | None = None
    kernel: Any = "dense"
    copies: Any = None
    density: Any = 1.0
    block: Any = 0
    searched: bool = True  # as in Formats


def read_shapes(m: Any, n: Any, k: Any, path: Options) -> tuple[CodeArray, dict[str, Array]]:
    """Return kernel codes, and m, n, k, with copies and block if given, of one shape; InputError
    for bad arguments."""
    text("dtype", path.dtype)
    if path.weight_dtype is not None:
        text("weight_dtype", path.weight_dtype)
    codes = _kernel_codes(path.kernel)
    given = {"m": array("m", m, COUNT), "n": array("n", n, _WIDTH), "k": array("k", k, _WIDTH)}
    given["n"] = _stored(given["n"], codes, path)
    if path.copies is not None:
        given["copies"] = array("copies", path.copies, _COPIES)
    if np.any(block := array("block", path.block, SIZE)):
        given["block"] = block
    codes, *same = together(kernel=codes, **given)
    return codes, dict(zip(given, same))


def _kernel_codes(kernel: Any) -> CodeArray:
    given = plain(kernel)
    names = given.dtype.kind in "UO"
    codes = (
        encode("kernel", given, {"kernel": KERNELS}) if names else array("kernel", kernel, _CODE)
    )
    return codes.astype(np.int8)


def _stored(n: Any, codes: Array, path: Options) -> Any:
    """Return n; for SpMV kernels, n of the dense product with equal weight bytes, a multiple of
    eight."""
    density = array("density", path.density, SHARE)
    if not np.count_nonzero(codes == _SPMV):
        return n
    codes, rows, density = together(kernel=codes, n=n, density=density)
    value = ELEMENT_BYTES[path.weight_dtype or path.dtype]
    return np.where(
        codes == _SPMV, np.ceil(rows * spmv_bytes(density, value) / (8.0 * value)) * 8.0, rows
    )


def chunks(codes: CodeArray, m: Array, n: Array, k: Array) -> Iterator[tuple[int, Any, Any]]:
    """Yield a kernel code, some of the flat rows that run it, and their precision."""
    large = (np.maximum(m, np.maximum(n, k)) > EXACT) | (m * n * k > MOST_PRODUCT)
    if not np.count_nonzero(codes) and not np.count_nonzero(large):
        for start in range(0, max(codes.size, 1), CHUNK):
            yield int(Kernel.DENSE), slice(start, start + CHUNK), PRECISION
        return
    for code in np.unique(codes).tolist():
        for precision, mask in ((PRECISION, ~large), (np.float64, large)):
            rows = np.flatnonzero((codes.reshape(-1) == code) & mask)
            for start in range(0, len(rows), CHUNK):
                yield code, rows[start : start + CHUNK], precision


def spmv_bytes(density: Any, value_bytes: Any) -> Array:
    """Return the stored bytes per weight, zeros included, of a kernel for scattered zeros. Each
    value has four bits for its distance to the previous value; after 16 empty places a zero is
    stored. This gives 1 / (1 - zeros^16) stored values per nonzero value (MACKO,
    github.com/vlejd/macko_spmv)."""
    kept = np.clip(np.asarray(density, dtype=np.float64), 1e-6, 1.0)
    return np.asarray(kept / (1.0 - (1.0 - kept) ** 16) * (value_bytes + 0.5))


CLOCKED: Values = {
    "ampere": 0.78e12,
    "ada": 1.03e12,
    "hopper": 1.41e12,
    "blackwell": 0.78e12,
    "blackwell_sm100": 2.25e12,
}
"""FLOP per joule (16-bit datasheet rate over power limit) of the GPUs from which the defaults of
``e_tc`` come: A100, L40S, H100, RTX PRO 6000, B200 (SXM). GPUs with fewer keep a higher clock
(:func:`clocked`)."""
UNLIMITED = 0.9
"""Share of the datasheet rate if power does not limit the clock. An H20 reaches 0.93 in fp8
(InferSim) and less in the 16-bit steps of SGLang, which take 6 % longer than with 0.81 and 16 %
longer than with 1; the RTX 4090 reaches 1.02."""

DRAM_SHARE = 0.907
"""Share of the datasheet bandwidth if only DRAM limits it: fit of the RTX 4090, whose 128 SMs need
7.9 GB/s each."""
STREAMED: Values = {"ampere": 2.039e12 / 108}
"""Bandwidth per SM, B/s, of the GPU from which the default of ``e_d`` comes (A100), where it limits
the share. With it, the share is 0.81 on an RTX 3090, whose steps of llama.cpp in fp16 reach 0.80
with everything between the GEMMs (XiongjieDai/GPU-Benchmarks-on-LLM-Inference)."""

EDGE = 1e-4
"""Steps before the last node at which a coordinate of the residual stops."""

GROUPS = {Kernel.GROUPS_N: 20.0, Kernel.GROUPS_K: 52.0}
"""Size G of groups at which the main loop takes twice the time of wide groups; groups of size g
take 1 + (G / g)^1.5. Source: kernels of the taxonomy's authors at 4096^3 on an RTX 5090, where
groups of 128 outputs are 7 % slower than whole tokens, and groups of 32 inputs three times as slow
(EIT-NLP/LLM-Pruning, DynamicPruningKernels)."""
GROUPS_STEP = 0.9
"""e_tc of kernels that skip groups over that of dense kernels (same source)."""

SPARSE24_PARTS: Mapping[str, str] = {
    "sparse_step": "compute",
    "sparse_load": "memory",
    "sparse_time": "launch",
    "sparse_tau": "serial",
}
"""Constant of 2:4 kernels -> the part of the time that it changes."""


FEW_TOKENS_SEARCHED = ("hopper",)
"""Architectures with measured times of the fastest 2:4 plan for few tokens (torchao's CUTLASS
kernels in fp8). On others, the tables of few tokens have the default plan, which takes 1.05 to 1.4
times the dense time."""


class GemmKernel(NamedTuple):
    """Model of GEMMs of one number format, weight format and kernel on a profile."""

    model: ReadyModel
    section: FittedValues | None = None
    residual: ResidualGrid | None = None
    row_residual: RowResidual | None = None
    shapes: MeasuredShapes | None = None  # measured with cold weights, used instead of the model
    align_step: float = 0.0
    align_load: float = 0.0
    load_scale: float = 1.0
    pad_m: float = 1.0
    group: float = 0.0  # features, of GROUPS; 0 where no groups are skipped
    unfitted: tuple[str, ...] = ()  # error factors of kernels without a fit
    # for weight-only formats: the dense kernel that computes the same product
    dense: GemmKernel | None = None
    # parts of a 2:4 kernel's time that no table of this architecture covers
    assumed: tuple[str, ...] = ()


@lru_cache(maxsize=128)
def gemm_kernel(
    hw: Device, dtype: str, weight_dtype: str | None, kernel: Kernel, searched: bool = True
) -> GemmKernel:
    """Return the kernel of a profile; InputError for a number format that the device lacks or that
    is unknown."""
    rate = hw.rate(dtype)
    weight = weight_dtype or dtype
    element = ELEMENT_BYTES[dtype]
    weight_bytes = element_bytes(weight, "weight dtype")
    peak = rate.flop_per_s
    label = label_of(dtype, weight)
    own = label == dtype or (
        dtype in LABELS.get(label, ()) and hw.section("gemm", label).status != "default"
    )
    section = hw.section("gemm", label if own else dtype)
    c = {name: float(section[name]) for name in GEMM_CONSTANTS}
    if section.status == "default":
        c["e_tc"] = clocked(c["e_tc"] * (1.0 if element >= 2.0 else c["narrow_step"]), hw)
        c["e_d"] = streamed(c["e_d"], hw)
    load_scale = 1.0
    pad_m = 1.0
    serial = False
    assumed: tuple[str, ...] = ()
    factors = [*unfitted(section, GEMM_CONSTANTS, hw.architecture)]
    weight_only = ELEMENT_BYTES[weight] < element
    compressed = kernel == Kernel.SPARSE24 and not weight_only
    if kernel == Kernel.SPARSE24:
        if rate.sparse_factor <= 1.0:
            raise InputError(f"{hw.name} has no 2:4 sparse tensor cores for {dtype}")
        known, assumed = sparse24_constants(section, hw.architecture)
        c |= known
        peak *= rate.sparse_factor
        c["e_tc"] *= c["sparse_step"]
        # half the values, each with two bits of index; L2 feeds the compressed weights and the
        # activations
        weight_bytes = 0.5 * weight_bytes + 0.125
        if compressed:
            pad_m = 8.0
            serial = not searched
            c["t0"] += c["sparse_time"]
            load_scale /= c["sparse_load"]
            if searched and hw.architecture not in FEW_TOKENS_SEARCHED:
                assumed = (*assumed, "searched")
        # like the dense weight-only kernel (Sparse-Marlin): a step waits for the bytes of its
        # weights
        else:
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
    striped = weight_only and not own and hw.architecture != "cpu"
    rows = WGMMA_ROWS if element == 1.0 else hw.tall_tiles[0] if hw.tall_tiles else 1.0
    hopper_default = section.status == "default" and hw.architecture == "hopper"
    machine = replace(
        Machine.of(hw, dtype),
        peak_flop_per_s=peak,
        weight_bytes=weight_bytes,
        least_rows=rows if hopper_default and not weight_only else 1.0,
        ragged=kernel in GROUPS,
        serial=serial,
        striped=striped,
    )
    residual = ResidualGrid.from_arrays(section.arrays)
    if residual is not None:
        residual = replace(residual, values=residual.values.astype(PRECISION), inset=EDGE)
    # a fallback section has measured shapes of another format or device, which do not count
    plain = kernel == Kernel.DENSE and own and section.status == "calibrated"
    return GemmKernel(
        model=ready_model(machine, c, PRECISION),
        section=section,
        residual=residual,
        row_residual=RowResidual.from_arrays(section.arrays),
        shapes=MeasuredShapes.of(section.arrays) if plain else None,
        align_step=c["align_step" if element >= 2.0 else "align_step_8bit"],
        align_load=c["align_load"],
        load_scale=load_scale,
        pad_m=pad_m,
        group=GROUPS.get(kernel, 0.0),
        unfitted=tuple(factors),
        dense=(
            gemm_kernel(hw, dtype, None, kernel) if weight_only and kernel == Kernel.DENSE else None
        ),
        assumed=assumed,
    )


def streamed(e_d: float, hw: Device) -> float:
    """Return the default share of the datasheet bandwidth. The loads that the SMs of the A100 have
    in flight limit its share; GPUs whose SMs share less bandwidth come closer to
    :data:`DRAM_SHARE`."""
    if hw.architecture not in STREAMED:
        return e_d
    waits = (1.0 / e_d - 1.0 / DRAM_SHARE) * hw.bandwidth_bytes_per_s / hw.sm_count
    return 1.0 / (1.0 / DRAM_SHARE + max(waits, 0.0) / STREAMED[hw.architecture])


def clocked(e_tc: float, hw: Device) -> float:
    """Return the default share of the datasheet rate for the power limit of a device. Under a
    limit, the clock falls as the square root of the power per FLOP: the L40S and the RTX 4090 (0.62
    and 1.02 of rates that need 1.03 and 0.37 TFLOP/J) differ by a power of 0.48. Without a limit,
    kernels reach :data:`UNLIMITED` of the rate."""
    rates = [hw.rates[name].flop_per_s for name in ("bf16", "fp16") if name in hw.rates]
    if hw.architecture not in CLOCKED or not rates:
        return e_tc
    return min(
        e_tc * math.sqrt(CLOCKED[hw.architecture] * hw.power_w / rates[0]), max(e_tc, UNLIMITED)
    )


def sparse24_constants(
    section: FittedValues, architecture: str
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return the constants of 2:4 kernels, and the parts of the time that no table of the
    architecture covers. Defaults are those of the device's architecture, which may differ from the
    architecture of an inherited section."""
    values = {}
    assumed = []
    for name, part in SPARSE24_PARTS.items():
        constant = GEMM_CONSTANTS[name]
        own = section.constants[name]
        values[name] = constant.default(architecture) if own.status == "default" else own.value
        if own.status == "default" and architecture not in constant.defaults:
            assumed.append(part)
    return values, tuple(assumed)


TILES: tuple[tuple[int, int], ...] = ((128, 256), (128, 128), (64, 128))
"""Tiles among which stacks may choose; the number of idle SMs in the last wave depends on the
choice."""

_IDLE = [f"idle {tile_m}x{tile_n}" for tile_m, tile_n in TILES]
_COMPUTE, _MEMORY, _L2, _LATENCY, _LAUNCH = map(
    BOTTLENECKS.index, ("compute", "memory", "l2", "latency", "launch")
)


@dataclass(frozen=True)
class Products(Calls):
    """Dense, aligned GEMMs y[m, n] = x[m, k] w[k, n] of one machine, for fits in float64."""

    operator = "gemm"
    machine: Machine
    m: FloatArray
    n: FloatArray
    k: FloatArray
    copies: FloatArray  # weights that a benchmark uses in turn; inf: cold

    def estimate(self, c: RowValues) -> Estimate:
        kernel = GemmKernel(ready_model(self.machine, c))
        given = {"m": self.m, "n": self.n, "k": self.k}
        return estimate(kernel, given if self._cold else {**given, "copies": self.copies})

    def seconds(self, c: RowValues) -> FloatArray:
        copies = None if self._cold else self.copies
        return (
            1e-6
            * analytical_time(self.m, self.n, self.k, ready_model(self.machine, c), copies).total_us
        )

    def seconds_of(self, many: Sequence[Values]) -> FloatArray:
        """Return the analytical time (sets, rows) with several sets of constants; few rows take
        little longer than one set."""
        sets = len(many)
        rows = len(self.m)
        columns = {name: np.array([c[name] for c in many]) for name in many[0]}
        varied = {name: column for name, column in columns.items() if np.ptp(column)}
        model = ready_model(self.machine, {**many[0], **varied}).for_each(rows)
        m, n, k, copies = (np.tile(a, sets) for a in (self.m, self.n, self.k, self.copies))
        return 1e-6 * analytical_time(
            m, n, k, model, None if self._cold else copies
        ).total_us.reshape(sets, rows)

    @property
    def _cold(self) -> bool:
        return bool(np.isinf(self.copies).all())


def estimates(
    m: Any, n: Any, k: Any, hw: Device, options: Options, *, steps: bool = False
) -> tuple[tuple[int, ...], Estimates]:
    """Return the shape of the broadcast arguments, and the cost of GEMMs in chunks: flat rows and
    their estimate. ``steps`` fills ``details`` of the estimate."""
    codes, given = read_shapes(m, n, k, options)
    flat = {name: np.ascontiguousarray(a).reshape(-1) for name, a in given.items()}
    return codes.shape, _estimates(codes, flat, hw, options, steps)


def _estimates(
    codes: CodeArray,
    flat: Mapping[str, Array],
    hw: Device,
    options: Options,
    steps: bool = False,
) -> Estimates:
    for code, rows, precision in chunks(codes, flat["m"], flat["n"], flat["k"]):
        kind = Kernel(code)
        if code == _SPMV and flat["m"][rows].max(initial=1.0) > 1.0:
            raise InputError(
                f"an SpMV kernel multiplies one token, got m = {flat['m'][rows].max():g}"
            )
        # scattered zeros run as a dense product
        kind = Kernel.DENSE if kind == Kernel.UNSTRUCTURED else kind
        kernel = gemm_kernel(hw, options.dtype, options.weight_dtype, kind, options.searched)
        yield rows, estimate(kernel, {name: a[rows] for name, a in flat.items()}, precision, steps)


def estimate(
    kernel: GemmKernel, given: Mapping[str, Array], precision: Any = np.float64, steps: bool = False
) -> Estimate:
    """Return the cost of GEMMs of one kernel, us, from arrays m, n, k, and copies and block if
    given."""
    model = kernel.model
    machine = kernel.model.machine
    m, n, k = (given[name].astype(precision) for name in "mnk")
    # inf: cold
    copies = np.minimum(given["copies"], 1e15).astype(precision) if "copies" in given else None
    byte_us = 1e6 / machine.bandwidth_bytes_per_s
    flop_us = 1e6 / machine.peak_flop_per_s
    compute = n * k * m * (2.0 * flop_us)
    moved = n * k * (machine.weight_bytes * byte_us) + (n + k) * m * (
        machine.element_bytes * byte_us
    )
    rows = np.ceil(m * (1.0 / kernel.pad_m)) * kernel.pad_m
    halvings: Array | float = 0.0  # a number saves a product of all shapes and tiles
    if kernel.align_step or kernel.align_load:
        off = alignment_halvings(n, k, machine.element_bytes)
        halvings = off if np.count_nonzero(off) else 0.0
    step_scale: Array | float = 1.0 + kernel.align_step * halvings**0.5
    if kernel.group and "block" in given:
        features = np.where(given["block"] > 0, given["block"], np.inf)
        step_scale = step_scale * (1.0 + (kernel.group / features) ** 1.5).astype(precision)
    load_scale = kernel.load_scale * (1.0 + kernel.align_load * halvings)
    a = analytical_time(rows, n, k, model, copies, step_scale, load_scale)
    position = np.log2(rows), np.log2(n), np.log2(k)
    coordinates = np.array(position).T
    factor = np.float32(1.0)
    if kernel.residual is not None:
        log_factor = kernel.residual(position)
        if kernel.row_residual is not None:
            log_factor = log_factor + kernel.row_residual(rows)
        factor = np.exp(log_factor)
    # single precision must not round below the physics
    floor = np.maximum(compute * (1.0 / machine.headroom), a.dram_bytes * byte_us) * (1.0 + 5e-7)
    loadings, idle = _loadings(a, model, rows, n, k, step_scale, load_scale)
    loadings |= {name: np.float32(1.0) for name in kernel.unfitted}
    if "searched" in kernel.assumed:
        loadings["serial"] = 1.0 - loadings["compute"]
    elif "serial" not in kernel.assumed:
        loadings.pop("serial", None)
    parts = [loadings[part] for part in ("compute", "memory") if part in kernel.assumed]
    if parts:
        loadings["sparse24 default"] = sum(parts)
    if "quantised" in kernel.unfitted:  # narrow weights are read at the rate of wide weights
        loadings["quantised"] = 1.0 - 0.5 * (loadings["memory"] - loadings["l2"])
    if "generic" in kernel.unfitted:  # all GPUs achieve a similar share of the DRAM bandwidth
        loadings["generic"] = 1.0 - (loadings["memory"] - loadings["l2"])
    time = a.total_us * factor
    bottlenecks = _bottleneck(a, model, k)
    if kernel.dense is not None:  # narrow weights save time of memory, not of arithmetic
        dense = estimate(kernel.dense, given, precision)
        least = dense.time * dense.loadings["compute"]
        time, bottlenecks = (
            np.maximum(time, least),
            np.where(least > time, dense.bottleneck, bottlenecks),
        )
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
        edge=(1.0 - loadings["memory"]) * _edge(m, n) if model.machine.persistent else None,
        outside=octaves_outside(coordinates, kernel.section),
        measured=(
            None
            if kernel.shapes is None or copies is not None
            else kernel.shapes.at(*(given[x] for x in "mnk"))
        ),
        unit_s=1e-6,
    )
    if not steps:
        return out
    waves = a.tiles * a.split * (1.0 / machine.sm_count)
    if quantises(machine):
        waves = wide_waves(m, n, machine)
    details = _details(kernel, a, factor, *(given[x] for x in "mnk"))
    return replace(out, details=details, waves=waves * np.ones(len(m)))


EDGE_TILE = 64.0
"""Smallest side of the tiles that large products use: error grows where the last one is nearly
empty, as with 513 or 193 tokens, and not where it is half full, as with 161 or 225."""


def _edge(m: Array, n: Array) -> Array:
    """Return the square of the empty share of the last tile, of rows or of columns."""
    tiles = [x * (1.0 / EDGE_TILE) for x in (m, n)]
    empty = [np.where(t > 1.0, np.ceil(t) - t, 0.0) for t in tiles]
    return np.square(np.maximum(*empty))


def _loadings(
    a: Analytical, model: ReadyModel, m: Array, n: Array, k: Array, step_scale: Any, load_scale: Any
) -> tuple[dict[str, Any], Any]:
    """Return the loadings of the error factors, and the share of the time in which SMs of the last
    wave idle. The parts are the fixed time, arithmetic (with shares of step latency, L2's feed and
    idle SMs) and memory (with a share of L2)."""
    c = a.compute3
    launch = model.t0_us / a.total_us
    memory = cube(a.memory_us)
    work = (1.0 - launch) / (c + memory)
    compute = c * work
    memory = memory * work
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
        # idle SMs with each of TILES, and with the chosen tile
        many = [
            np.ceil(m * (1.0 / tile_m)) * np.ceil(n * (1.0 / tile_n)) for tile_m, tile_n in TILES
        ]
        waves = np.array([*many, a.tiles]) * (1.0 / model.machine.sm_count)
        *idles, idle = compute * np.where(waves > 1.0, np.log(np.ceil(waves) / waves), 0.0)
        loadings |= zip(_IDLE, idles)
    if np.ndim(step_scale):
        # small effects are relatively less certain
        loadings["alignment"] = np.sqrt(np.log(step_scale))
    return loadings, idle


def _bottleneck(a: Analytical, model: ReadyModel, k: Array) -> CodeArray:
    """Return the largest part of each shape; the main loop may wait for a step's latency or for
    L2's feed."""
    waits = np.where(model.step_us > 1.5 * model.flop_us, _LATENCY, _COMPUTE).astype(np.int8)
    out: CodeArray = waits[a.tile, 0]
    if not model.machine.persistent:
        feed = model.feed_us[a.tile, 0] * a.tiles * k * (1.0 / model.step_elements)
        out[cube(feed) > 0.5 * a.compute3] = _L2
    if model.machine.serial:
        out[2.0 * a.serial3 > a.compute3] = _LATENCY
    out[cube(a.memory_us) > a.compute3] = _MEMORY
    out[a.total_us < 2.0 * model.t0_us] = _LAUNCH
    return out


def _unused(blocks: Array, m: Array, n: Array, model: ReadyModel) -> tuple[Any, Any]:
    """Return the factors on the arithmetic from padding beyond whole tiles, and from idle SMs."""
    machine = model.machine
    if machine.striped:
        return 1.0, 1.0
    factors: tuple[Any, Any] = 1.0, 1.0 if machine.persistent else np.ceil(blocks) / blocks
    if quantises(machine):
        factors = quantisation(m, n, model)
    return factors[0], np.where(blocks > 1.0, factors[1], 1.0 / blocks)


def _details(
    kernel: GemmKernel, a: Analytical, factor: Any, m: Array, n: Array, k: Array
) -> dict[str, Array]:
    """Return choices of the model, and times of the steps between the roofline and the kernel,
    s."""
    model = kernel.model
    machine = kernel.model.machine
    one = np.ones(len(m))
    tile_m = model.tile_m[a.tile, 0] * one
    tile_n = model.tile_n[a.tile, 0] * one
    split = a.split * one
    fixed_s = model.t0_us * 1e-6 * one
    halvings = alignment_halvings(n, k, machine.element_bytes)
    weight_s = machine.weight_bytes * n * k / machine.bandwidth_bytes_per_s
    memory = weight_s + machine.element_bytes * m * (n + k) / machine.bandwidth_bytes_per_s
    tiles = np.ceil(m / tile_m) * np.ceil(n / tile_n)
    padding, idle = _unused(tiles * split / machine.sm_count, m, n, model)
    padded = padding * (2.0 * tiles * tile_m * tile_n * k / machine.peak_flop_per_s)
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
        "alignment": np.maximum(
            slower, memory + weight_s * ((1.0 + kernel.align_load * halvings) - 1.0)
        ),
    }


def alignment_halvings(n: Array, k: Array, element_bytes: float) -> Array:
    """Return log2 of 16 bytes over the alignment of rows of n or k elements, at least 0. Formats of
    8 bits and fewer have no kernels for other alignments: 1 for all of these."""
    kind = np.int32 if n.dtype == np.float32 else np.int64
    low = n.astype(kind) | k.astype(kind)
    whole = aligned_elements(element_bytes)
    out = np.zeros(n.shape, dtype=n.dtype)
    if np.count_nonzero(low & (whole - 1)):
        size = whole
        while size > 1:
            out += (low & (size - 1)) != 0
            size = size // 2 if element_bytes >= 2.0 else 1
    return out


def aligned_elements(element_bytes: float) -> int:
    """Return the elements in 16 bytes, a power of two; kernels are fastest for multiples of
    this."""
    return int(2 ** round(math.log2(16 / element_bytes)))


class Gemm(Operator):
    code = int(Kind.GEMM)
    name = "gemm"
    sizes = ("m", "n", "k")
    constants = _CONSTANTS
    titles = ("GEMMs",)
    errors = _ERRORS
    weighted = True

    def flops(self, w: Rows) -> Any:
        return 2.0 * w.m * w.n * w.k

    def bytes(self, w: Rows) -> Any:
        return self.weight_bytes(w) + DTYPE_BYTES[w.dtype] * w.m.astype(np.float64) * (w.k + w.n)

    def weight_bytes(self, w: Rows) -> Any:
        stored: Array = DTYPE_BYTES[w.weight_dtype]
        if np.count_nonzero(w.kernel):
            pairs = w.kernel == Kernel.SPARSE24
            scattered = w.kernel == Kernel.UNSTRUCTURED
            # 2:4 stores a 2-bit index per kept value; scattered zeros need at least one bit per
            # position
            index = np.where(pairs, 0.25 * w.density, 0.125)
            # with few zeros, dense storage takes fewer bytes than an index
            kept = np.where(
                pairs | scattered, np.minimum(stored, w.density * stored + index), stored
            )
            stored = np.where(w.kernel == Kernel.SPMV, spmv_bytes(w.density, stored), kept)
        return w.n.astype(np.float64) * w.k * stored

    def parameter_bytes(self, w: Rows) -> Any:
        element = DTYPE_BYTES[w.weight_dtype]
        if not np.count_nonzero(w.kernel):
            return w.params * element
        sparse = (w.kernel == Kernel.SPARSE24) | (w.kernel == Kernel.UNSTRUCTURED)
        # rows that run less or more than once per layer share weights
        values = np.maximum(w.n * w.k * w.density, 1.0)
        beyond = w.params * w.repeats - values
        bias = np.where((beyond > 0) & (beyond <= w.n), beyond, 0.0) / w.repeats
        whole = np.where(w.kernel == Kernel.SPARSE24, self.weight_bytes(w), w.n * w.k * element)
        return np.where(
            sparse, (w.params - bias) * whole / values + bias * element, w.params * element
        )

    def effects(self, w: Rows, hw: Device, formats: Formats) -> Estimates:
        """Padding to tiles, idle SMs and alignment."""
        return self.estimates(w, hw, formats, steps=True)

    def estimates(self, w: Rows, hw: Device, formats: Formats, steps: bool = False) -> Estimates:
        options = Options(
            formats.dtype, formats.second, w.kernel, density=w.density, searched=formats.searched
        )
        given = {name: getattr(w, name).astype(np.float64) for name in "mnk"}
        if np.count_nonzero(w.kernel):
            given["n"] = _stored(given["n"], w.kernel, options)
        if np.count_nonzero(w.block):
            given["block"] = w.block
        return _estimates(w.kernel, given, hw, options, steps)
