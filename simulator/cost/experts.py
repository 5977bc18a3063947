"""Routed experts (MoE): the gate_up and down products of a layer's experts on one device, with activation, permutation
and weighted sum, without the router.

Each expert's tokens fill tiles of a few heights, the last one of an expert in part; the height that takes least time is
chosen. The weights of every expert that some token uses cross memory at the same time. Activations are moved before,
between and after, and a handful of kernels start. Use :func:`experts`.

Symbols
-------
m, n, k : tokens, width of an expert, hidden size
experts, active : experts on the device, and experts that a token uses on average
skew : unevenness of the load; in a benchmark the power of its law
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from simulator.arguments import AMOUNT, COUNT, array, instance, text, together
from simulator.arrays import FloatArray
from simulator.cost.base import Calls, Estimate, Machine, element_bytes, from_l2, largest_part
from simulator.cost.residual_grid import ResidualGrid
from simulator.hardware.constants import EXPERTS_CONSTANTS
from simulator.hardware.formats import label_of
from simulator.hardware.profile import HardwareProfile, Section, unfitted
from simulator.routing import experts_chance
from simulator.workload import Kind

TILES = (16.0, 64.0, 128.0)
"""Rows of the tiles that a kernel may choose."""
ALIGNED = 16.0
"""Widths of an expert that are no multiple of it are slow."""
QUANTILES = 32
"""Experts by load that represent all of a benchmark's."""

SCALED = ("fp8_block", "nvfp4", "mxfp4")
"""Formats with a scale for every block of weights: here stacks differ most, by a factor of two on the B200 (DeepGEMM
and CUTLASS against Triton and FlashInfer)."""
OCTAVES = (0.4, 0.6, 0.6)
"""Octaves of error coordinates per octave of tokens per expert, of width, of experts: errors of held-out models
correlate by 0.73 over one octave of tokens and 0.59 over two, 0.68 and 0.52 over octaves of width (medians of 38
tables)."""


@dataclass(frozen=True)
class Load:
    """How tokens are distributed over the experts of a device."""

    touched: FloatArray  # experts that some token uses
    tiles: tuple[FloatArray, ...]  # tiles of each height of TILES that their tokens fill, all experts together


def drawn_load(m: FloatArray, experts: FloatArray, active: FloatArray, skew: Any) -> Load:
    """Return the load of tokens that choose independently, as in a model: an expert's number of tokens is near a
    Poisson number."""
    chance = experts_chance(experts, active, skew)
    some, mean = 1.0 - (1.0 - chance) ** m, m * chance
    # a spread wider than a tile leaves the last one half empty; one tile holds what is far below it
    tiles = (
        np.maximum(some, mean / rows + (0.5 - 0.5 / rows) * -np.expm1(-2.0 / rows * mean)).mean(axis=0)
        for rows in TILES
    )
    return Load(experts * some.mean(axis=0), tuple(experts * t for t in tiles))


def dealt_load(m: FloatArray, experts: FloatArray, active: FloatArray, power: Any) -> Load:
    """Return the load of tokens that aiconfigurator's collectors distribute: in turn (``power`` 0), or by a rounded
    power law from 1 to 0.8 m (from 0.01 to 2 where tokens are not more than experts); tokens left over by rounding go
    to experts without any."""
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
class Layers(Calls):
    """Expert layers of one device."""

    machine: Machine
    m: FloatArray
    n: FloatArray
    k: FloatArray
    experts: FloatArray
    active: FloatArray
    skew: FloatArray
    dealt: bool = True  # as a benchmark: tokens distributed by rule, weights warm
    unfitted: tuple[str, ...] = ()  # error factors of what no fit has seen

    @cached_property
    def load(self) -> Load:
        """How tokens are distributed over the experts."""
        load = dealt_load if self.dealt else drawn_load
        return load(self.m, self.experts, self.active, self.skew)

    @property
    def operator(self) -> str:
        return "experts"

    def estimate(self, c: Mapping[str, Any]) -> Estimate:
        """Return the cost; weights come out of L2 where they fit if the calls are a benchmark's."""
        m, n, k, experts, active, machine = self.m, self.n, self.k, self.experts, self.active, self.machine
        load = self.load
        slower = (1.0 + c["narrow"] / n) * np.where(n % ALIGNED, 1.0 + c["align"], 1.0)
        row_s = 6.0 * n * k / (c["e_tc"] * machine.peak_flop_per_s)
        padded = [tiles * (rows + c["tile_rows"]) for tiles, rows in zip(load.tiles, TILES, strict=True)]
        computed = [tiles * rows for tiles, rows in zip(load.tiles, TILES, strict=True)]
        chosen, rows = np.argmin(padded, axis=0), m * active
        weights = 3.0 * n * k * load.touched * machine.weight_bytes
        memory = weights / (c["e_d"] * machine.bandwidth_bytes_per_s)
        if self.dealt:
            memory = memory * from_l2(weights, machine, c)
        # 16-bit: tokens permuted, products written and read, results read and added up; the layer's input and output
        moved = 2.0 * (rows * (3.0 * k + 3.0 * n) + 2.0 * m * k)
        launch = c["t0_s"] + c["expert_s"] * experts + c["depth_s"] * (n + k)
        padding = np.log(np.maximum(np.choose(chosen, computed) / rows, 1.0))
        io = moved / (c["e_io"] * machine.bandwidth_bytes_per_s)
        compute, memory = np.min(padded, axis=0) * row_s * slower, memory * slower
        return self._estimate(load, launch, io, compute, memory, padding)

    def _estimate(
        self,
        load: Load,
        launch: FloatArray,
        io: FloatArray,
        compute: FloatArray,
        memory: FloatArray,
        padding: FloatArray,
    ) -> Estimate:
        """Return the cost from its parts, s: arithmetic and weights overlap in part, the rest adds up."""
        m, n, k, machine = self.m, self.n, self.k, self.machine
        work = np.hypot(compute, memory)
        total = np.asarray(launch + io + work)
        rest = 1.0 / (np.maximum(work, 1e-30) * total)
        computing = compute**2 * rest
        loadings: dict[str, Any] = {"launch": launch / total, "compute": computing, "memory": memory**2 * rest}
        loadings |= {"io": io / total, "padding": computing * np.minimum(padding, 1.0)}
        loadings |= dict.fromkeys(self.unfitted, 1.0)
        if (self.skew > 0.0).any():
            loadings["skew"] = np.minimum(self.skew, 1.0)
        if (n % ALIGNED).any():
            loadings["alignment"] = np.where(n % ALIGNED, loadings["compute"] + loadings["memory"], 0.0)
        compute_s = 6.0 * m * self.active * n * k / machine.peak_flop_per_s
        bytes_ = 3.0 * n * k * load.touched * machine.weight_bytes + 2.0 * m * k * machine.element_bytes
        bytes_s = bytes_ / machine.bandwidth_bytes_per_s
        position = np.log2(m * self.active / self.experts), np.log2(n), np.log2(self.experts)
        octaves = [scale * np.ravel(x) for scale, x in zip(OCTAVES, position, strict=True)]
        parts = {"compute": compute, "memory": np.maximum(memory, io), "launch": launch}
        return Estimate(
            operator="experts",
            kind=int(Kind.EXPERTS),
            time=total,
            floor=np.maximum(compute_s / machine.headroom, 0.0 if self.dealt else bytes_s),
            roofline=np.maximum(compute_s, bytes_s),
            bottleneck=largest_part(parts, total.shape),
            loadings=loadings,
            coordinates=np.stack(octaves, axis=1),
            position=position,
        )


@dataclass(frozen=True)
class _Ready:
    """What a profile says about two number formats."""

    machine: Machine
    section: Section
    constants: Mapping[str, float]
    residual: ResidualGrid | None
    unfitted: tuple[str, ...]


@lru_cache(maxsize=128)
def _ready(hw: HardwareProfile, dtype: str, weight: str) -> _Ready:
    element_bytes(weight)
    label, factors = label_of(dtype, weight), tuple[str, ...]()
    machine, section = Machine.of(hw, label), hw.section("experts", label)
    if section.status == "default" and weight != dtype:  # kernels of the dense format that read narrower weights
        section, factors = hw.section("experts", dtype), ("quantised",)
    factors = (*factors, *(["scaled"] if weight in SCALED else []), *unfitted("experts", section, hw.architecture))
    constants = {name: section[name] for name in EXPERTS_CONSTANTS}
    return _Ready(machine, section, constants, ResidualGrid.from_arrays(section.arrays), factors)


def experts(
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
    dealt: bool = False,
) -> Estimate:
    """Return the cost of the gated experts of one layer on one device: m tokens, ``experts`` of width n over hidden
    size k, of which a token uses ``active`` on average (no whole number where devices share the experts).

    The floor is FLOP / peak at the highest clock, and the bytes of the experts that some token is expected to use over
    the bandwidth. ``skew`` is that of their load (:func:`simulator.routing.experts_chance`; 0: uniform). ``dealt``
    times a benchmark: tokens are distributed by rule (``skew`` is then the power of its law), weights are warm.
    """
    instance("hw", hw, HardwareProfile, "load_hardware")
    m, n, k, experts, active, skew = together(
        m=array("m", m, COUNT),
        n=array("n", n, COUNT),
        k=array("k", k, COUNT),
        experts=array("experts", experts, COUNT),
        active=array("active", active, AMOUNT),
        skew=array("skew", skew, AMOUNT),
    )
    r = _ready(hw, text("dtype", dtype), text("weight_dtype", weight_dtype or dtype))
    e = Layers(r.machine, m, n, k, experts, active, skew, dealt, r.unfitted).estimate(r.constants)
    return e.with_residual(None if r.residual is None else r.residual(e.position), r.section)
