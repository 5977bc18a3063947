"""Routed experts (MoE): the gate_up and down products of the experts of a layer that one device holds, activation,
permutation and weighted sum with them, the router not. What to use: :func:`experts_time`.

Each expert's tokens fill tiles of a few heights, the last one of an expert in part; the height that takes least is
chosen. Beside them the weights of every expert that some token uses cross memory. Activations are moved before, between
and after, and a handful of kernels start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from simulator.arguments import AMOUNT, COUNT, array, instance, text, together
from simulator.arrays import FloatArray
from simulator.cost.attention_model import from_l2
from simulator.cost.gemm_model import ELEMENT_BYTES, Machine
from simulator.cost.residual_grid import ResidualGrid
from simulator.errors import InputError
from simulator.hardware.constants import EXPERTS_CONSTANTS
from simulator.hardware.formats import label_of
from simulator.hardware.profile import ENGINE_STACK, SAME_STACK, HardwareProfile, unfitted
from simulator.routing import experts_chance
from simulator.uncertainty.error_model import (
    BOTTLENECKS,
    OperatorTimes,
    Posterior,
    Spread,
    Uncertainty,
    posterior_of,
    with_intervals,
)
from simulator.workload import Kind

KIND = int(Kind.EXPERTS)
"""Local errors of experts are alike among themselves."""

TILES = (16.0, 64.0, 128.0)
"""Rows of the tiles that a kernel may choose."""
ALIGNED = 16.0
"""Widths of an expert that are no multiple of it are slow."""
QUANTILES = 32
"""Experts by load that stand for all of a benchmark's."""

SHARED: Mapping[float, float] = {SAME_STACK: 0.15, ENGINE_STACK: 0.5}
"""Factor on what stacks differ by where the user's stack was fitted, and where it is of another version: stacks differ
by 5 to 40 % in the median, two versions of SGLang and of vLLM on Hopper by 2 to 7 %."""
SCALED = ("fp8_block", "nvfp4", "mxfp4")
"""Formats with a scale for every block of weights: here stacks differ most, by a factor of two on the B200 (DeepGEMM
and CUTLASS against Triton and FlashInfer)."""
LOCAL, OWN = 0.085, (0.035, 0.03)
"""Log standard deviation of errors that neighbouring shapes share; of one shape's own, and what a share of the products
of 1 adds to it."""
NEAR = (0.4, 0.6, 0.6)
"""Octaves that an octave of tokens an expert, of width, of experts counts for: errors of models left out correlate by
0.73 over one octave of tokens and 0.59 over two, 0.68 and 0.52 over those of width (medians of 38 tables)."""


@dataclass(frozen=True)
class Load:
    """How tokens fall on the experts of a device."""

    touched: FloatArray  # experts that some token uses
    tiles: tuple[FloatArray, ...]  # tiles of each height of TILES that their tokens fill, all experts together


def drawn_load(m: FloatArray, experts: FloatArray, active: FloatArray, skew: Any) -> Load:
    """Tokens choose apart from one another, as in a model: an expert's number of them is near a Poisson one."""
    chance = experts_chance(experts, active, skew)
    some, mean = 1.0 - (1.0 - chance) ** m, m * chance
    # a spread wider than a tile leaves the last one half empty; one tile holds what is far below it
    tiles = (
        np.maximum(some, mean / rows + (0.5 - 0.5 / rows) * -np.expm1(-2.0 / rows * mean)).mean(axis=0)
        for rows in TILES
    )
    return Load(experts * some.mean(axis=0), tuple(experts * t for t in tiles))


def dealt_load(m: FloatArray, experts: FloatArray, active: FloatArray, power: Any) -> Load:
    """Tokens dealt out as aiconfigurator's collectors do: in turn (``power`` 0), or each expert as many, rounded, as a
    power law says that runs from 1 to 0.8 m (from 0.01 to 2 where there are no more tokens than experts); what rounding
    leaves over goes to those without any."""
    choices, power = m * active, np.broadcast_to(np.asarray(power, dtype=np.float64), m.shape)
    even, few = choices / experts, choices <= experts
    if power.any():
        rank = (np.arange(QUANTILES)[:, None] + 0.5) / QUANTILES
        low, high = np.where(few, 0.01, 1.0), np.where(few, 2.0, np.maximum(0.8 * m, 1.0001))
        inverse = 1.0 - np.where(power > 0, power, 1.01)
        load = (low**inverse + rank * (high**inverse - low**inverse)) ** (1.0 / inverse)
        counts = np.minimum(np.rint(load * (even / load.mean(axis=0))), m)
        idle = (counts < 1.0).mean(axis=0)
        over = np.clip(even - counts.mean(axis=0), 0.0, idle) / np.maximum(idle, 1e-9)
        counts = np.where(power > 0, np.where(counts < 1.0, over, counts), even)
    else:
        counts = even[None]
    tiles = (np.where(counts < 1.0, counts, np.ceil(counts / rows)).mean(axis=0) for rows in TILES)
    return Load(experts * np.minimum(counts, 1.0).mean(axis=0), tuple(experts * t for t in tiles))


@dataclass(frozen=True)
class Parts:
    """Parts of the time of experts without residual, s; arithmetic and weights overlap in part."""

    launch: FloatArray
    io: FloatArray
    compute: FloatArray
    memory: FloatArray
    padding: FloatArray  # log of rows computed over tokens

    @property
    def total(self) -> FloatArray:
        return np.asarray(self.launch + self.io + np.hypot(self.compute, self.memory))

    @property
    def shares(self) -> dict[str, FloatArray]:
        """Derivative of log time by the log of each part: what errors of the parts do to it."""
        work, total = np.hypot(self.compute, self.memory), self.total
        rest = 1.0 / (np.maximum(work, 1e-30) * total)
        compute = self.compute**2 * rest
        shares = {"launch": self.launch / total, "compute": compute, "memory": self.memory**2 * rest}
        return shares | {"io": self.io / total, "padding": compute * np.minimum(self.padding, 1.0)}


def experts_core(
    load: Load,
    m: FloatArray,
    n: FloatArray,
    k: FloatArray,
    experts: FloatArray,
    active: FloatArray,
    machine: Machine,
    c: Mapping[str, float],
    warm: bool = False,
) -> Parts:
    """Parts of the time from constants by name; ``warm``: weights come out of L2 where they fit, as in a benchmark that
    repeats one layer."""
    dear = (1.0 + c["narrow"] / n) * np.where(n % ALIGNED, 1.0 + c["align"], 1.0)
    a_row = 6.0 * n * k / (c["e_tc"] * machine.peak_flop_per_s)
    padded = [tiles * (rows + c["tile_rows"]) for tiles, rows in zip(load.tiles, TILES, strict=True)]
    computed = [tiles * rows for tiles, rows in zip(load.tiles, TILES, strict=True)]
    chosen, rows = np.argmin(padded, axis=0), m * active
    weights = 3.0 * n * k * load.touched * machine.weight_bytes
    memory = weights / (c["e_d"] * machine.bandwidth_bytes_per_s)
    if warm:
        memory = memory * from_l2(weights, machine, c)
    # 16-bit: tokens permuted, products written and read, results read and added up; the layer's input and output
    moved = 2.0 * (rows * (3.0 * k + 3.0 * n) + 2.0 * m * k)
    launch = c["t0_s"] + c["expert_s"] * experts + c["depth_s"] * (n + k)
    padding = np.log(np.maximum(np.choose(chosen, computed) / rows, 1.0))
    io = moved / (c["e_io"] * machine.bandwidth_bytes_per_s)
    return Parts(launch, io, np.min(padded, axis=0) * a_row * dear, memory * dear, padding)


def experts_place(
    m: FloatArray, n: FloatArray, experts: FloatArray, active: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Coordinates in the lattice: log2 of tokens an expert, of its width, of the experts held."""
    return np.log2(m * active / experts), np.log2(n), np.log2(experts)


@dataclass(frozen=True)
class _Ready:
    """What a profile says of two formats."""

    machine: Machine
    constants: Mapping[str, float]
    residual: ResidualGrid | None
    spread: Spread  # factors on the prior of its errors
    unknown: tuple[str, ...]  # columns of errors that all times have in full: of the format, of what no fit has seen
    posterior: Posterior | None


@lru_cache(maxsize=128)
def _ready(hw: HardwareProfile, dtype: str, weight: str) -> _Ready:
    if weight not in ELEMENT_BYTES:
        raise InputError(f"dtype {weight!r} is unknown; expected one of {', '.join(ELEMENT_BYTES)}")
    label = label_of(dtype, weight)
    machine, section, unknown = Machine.of(hw, label), hw.section("experts", label), tuple[str, ...]()
    if section.status == "default" and weight != dtype:  # kernels of the dense format, read narrower weights
        section, unknown = hw.section("experts", dtype), ("quantised",)
    unknown = (*unknown, *(["scaled"] if weight in SCALED else []), *unfitted("experts", section, hw.architecture))
    constants = {name: section[name] for name in EXPERTS_CONSTANTS}
    residual = ResidualGrid.from_arrays(section.arrays)
    shared, own = hw.error_scales(section)
    return _Ready(machine, constants, residual, (SHARED.get(shared, shared), own), unknown, posterior_of(hw))


def experts_time(
    m: Any,
    n: Any,
    k: Any,
    experts: Any,
    active: Any,
    hw: HardwareProfile,
    *,
    skew: Any = 0.0,
    dtype: str = "bf16",
    weight_dtype: str | None = None,
    level: float = 0.9,
    dealt: bool = False,
) -> OperatorTimes:
    """Time of the gated experts of one layer on one device: m tokens, ``experts`` of width n over hidden size k, of
    which a token uses ``active`` on average (not a whole number where devices share the experts).

    Never below FLOP / peak at the highest clock, nor below the bytes of the experts that some token is expected to use
    / bandwidth. ``skew`` is that of their load (:func:`simulator.workload.experts_chance`; 0: all alike). ``dealt``
    times what a benchmark does: tokens dealt out by rule (``skew`` is then the power of its law), weights warm.

    >>> from simulator.hardware.library import load_hardware
    >>> t = experts_time([8, 8192], 768, 2048, 128, 8, load_hardware("h100@vllm"))
    >>> t.bottlenecks.tolist()
    ['memory', 'compute']
    """
    instance("hw", hw, HardwareProfile, "load_hardware")
    counts = {"m": m, "n": n, "k": k, "experts": experts}
    given = {name: array(name, value, COUNT) for name, value in counts.items()}
    m, n, k, experts, active, skew = together(
        **given, active=array("active", active, AMOUNT), skew=array("skew", skew, AMOUNT)
    )
    r = _ready(hw, text("dtype", dtype), text("weight_dtype", weight_dtype or dtype))
    load = (dealt_load if dealt else drawn_load)(m, experts, active, skew)
    parts = experts_core(load, m, n, k, experts, active, r.machine, r.constants, warm=dealt)
    place = experts_place(m, n, experts, active)
    seconds = parts.total if r.residual is None else parts.total * np.exp(r.residual(place))
    compute_s = 6.0 * m * active * n * k / r.machine.peak_flop_per_s
    moved = 3.0 * n * k * load.touched * r.machine.weight_bytes + 2.0 * m * k * r.machine.element_bytes
    bytes_s = moved / r.machine.bandwidth_bytes_per_s
    floor = np.maximum(compute_s / r.machine.headroom, 0.0 if dealt else bytes_s)
    uncertainty = uncertainty_of(parts, place, n, skew, spread=r.spread, unknown=r.unknown)
    ends = with_intervals(seconds, floor, uncertainty, level, r.posterior)
    bottlenecks = {"compute": parts.compute, "memory": np.maximum(parts.memory, parts.io), "launch": parts.launch}
    largest = np.argmax(list(bottlenecks.values()), axis=0)
    bound = np.array([BOTTLENECKS.index(name) for name in bottlenecks], dtype=np.int8)[largest]
    return OperatorTimes(*ends, np.maximum(compute_s, bytes_s), bound, uncertainty=uncertainty)


def uncertainty_of(
    parts: Parts,
    place: tuple[FloatArray, FloatArray, FloatArray],
    n: FloatArray,
    skew: FloatArray,
    *,
    spread: Spread = (SHARED[SAME_STACK], 1.0),
    unknown: tuple[str, ...] = (),
) -> Uncertainty:
    """What times are unsure of, from the shares of their parts."""
    shares: dict[str, Any] = {**parts.shares, **dict.fromkeys(unknown, 1.0)}
    if (skew > 0.0).any():
        shares["skew"] = np.minimum(skew, 1.0)
    if (n % ALIGNED).any():
        shares["alignment"] = np.where(n % ALIGNED, shares["compute"] + shares["memory"], 0.0)
    own = OWN[0] ** 2 + (OWN[1] * shares["compute"]) ** 2
    octaves = np.stack([near * np.ravel(x) for near, x in zip(NEAR, place, strict=True)], axis=1)
    return Uncertainty.of("experts", shares, spread=spread, local=LOCAL, own=own, place=octaves, kind=KIND)
