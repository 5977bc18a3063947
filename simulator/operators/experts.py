"""Routed experts (MoE): the experts of a layer on one device, without the router.

Two grouped products (gate and up; down) take most of the time. The tokens of an expert fill tiles,
the last one in part; the fastest tile height is chosen. The time of a tile is its arithmetic plus
the load of the expert's weights into an SM. At the same time, the weights of all experts in use
cross memory. The other kernels sort, permute, activate and sum: they move activations. Here m, n
and k are tokens, the width of an expert and the hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from simulator.arguments import Range
from simulator.arrays import Array, BoolArray, FloatArray
from simulator.codes import DTYPE_BYTES, Kind, label_of
from simulator.operators.base import (
    Calls,
    Device,
    Estimate,
    Estimates,
    FittedValues,
    Formats,
    Machine,
    Operator,
    ResidualGrid,
    Rows,
    RowValues,
    Values,
    element_bytes,
    from_l2,
    largest_part,
    read_constants,
    unfitted,
)

_CONSTANTS, _ERRORS = read_constants("experts")
EXPERTS_CONSTANTS = _CONSTANTS["experts"]

EXPERT_RANGE = 200.0
"""Load of the busiest over the least busy expert at a skew of 1, as in tables with a power law of
exponent 1.01."""
EXPERT_SKEW = 0.84
"""Skew of a model that serves mixed requests.

Decode steps of Qwen3-30B-A3B with 1 to 128 sequences use 8, 14.5, 24.8, 40.7, 59.7, 78.1, 94.0 and
104.7 of its 128 experts (AndrewDeng1/vllm-inco, README, 3d): within 5 % at 0.84. On prose, code and
math, the entropy of the loads corresponds to 0.8, on code to 0.95 to 1 (gpu-container handbook,
"Routing De-risk", mcp-tool-shop-org.github.io/gpu-container/handbook/derisk)."""
EXPERT_QUANTILES = 16
"""Number of load quantiles that represent all experts of a model."""


def experts_chance(experts: Any, active: Any, skew: Any = 0.0) -> Array:
    """Return the probability (quantiles, ...) that a token uses an expert, from the least busy to
    the busiest expert. A token uses ``active`` experts on average, each at most once. The log of
    the load is linear in the rank; the busiest expert has :data:`EXPERT_RANGE` to the power
    ``skew`` times the load of the least busy."""
    share, skew = np.broadcast_arrays(
        np.minimum(np.divide(active, experts), 1.0), np.asarray(skew, dtype=np.float64)
    )
    if not skew.any():
        return np.asarray(share[None])
    rank = (np.arange(EXPERT_QUANTILES) + 0.5) / EXPERT_QUANTILES - 0.5
    chance = EXPERT_RANGE ** (rank.reshape(-1, *[1] * share.ndim) * skew)
    for _ in range(16):  # other experts take the probability above 1
        chance = np.minimum(chance * (share / chance.mean(axis=0)), 1.0)
    return np.asarray(chance)


def experts_touched(m: Any, experts: Any, active: Any, skew: Any = 0.0) -> Array:
    """Return the expected number of ``experts`` that at least one of ``m`` independent tokens uses;
    ``active`` and ``skew`` are those of :func:`experts_chance`."""
    m, experts, active, skew = np.broadcast_arrays(
        np.asarray(m, dtype=np.float64), experts, active, skew
    )
    idle = (1.0 - experts_chance(experts, active, skew)) ** m
    return np.asarray(experts * (1.0 - idle.mean(axis=0)))


TILES = (16.0, 64.0, 128.0)
"""Rows of the tiles that a kernel may choose."""
TILE_COLUMNS = 128.0
"""Columns of a tile."""
PARTS = ("layer", "gate_up", "down")
"""Parts that a time includes: all kernels of the layer except the router's, or one of the two
grouped products."""
ALIGNED = 16.0
"""Experts are slow if their width is not a multiple of this."""
QUANTILES = 32
"""Number of load quantiles that represent all experts of a benchmark."""

SCALED = ("fp8_block", "nvfp4", "mxfp4")
"""Formats with a scale per block of weights. Stacks differ most in these: by a factor of two on the
B200 (DeepGEMM and CUTLASS against Triton and FlashInfer)."""
OCTAVES = (0.4, 0.6, 0.6)
"""Octaves of error coordinates per octave of tokens per expert, of width and of experts. Errors of
held-out models correlate by 0.73 over one octave of tokens and 0.59 over two, by 0.68 and 0.52 over
octaves of width (medians of 38 tables)."""

POWER = Range(-1.0, 1e30, "finite numbers from -1 up")
"""Rules by which benchmarks distribute tokens, see :func:`dealt_load`."""
_NORMAL = NormalDist()


class Load(NamedTuple):
    """Distribution of tokens over the experts of a device."""

    touched: FloatArray  # experts that some token uses
    tiles: tuple[FloatArray, ...]  # tiles of each height of TILES, all experts together
    rows: FloatArray  # tokens of all experts together


def drawn_load(
    m: FloatArray, experts: FloatArray, active: FloatArray, skew: Any, devices: Any = 1.0
) -> Load:
    """Return the load of tokens that choose independently, as in a model: the tokens of an expert
    nearly follow a Poisson distribution. If ``devices`` share the experts, it is the load of the
    device with the highest load."""
    chance = experts_chance(experts, active, skew)
    some = 1.0 - (1.0 - chance) ** m
    mean = m * chance
    # the last of several tiles is half empty on average; small loads fit one tile
    tiles = (
        np.maximum(some, mean / rows + (0.5 - 0.5 / rows) * -np.expm1(-2.0 / rows * mean)).mean(
            axis=0
        )
        for rows in TILES
    )
    load = Load(experts * some.mean(axis=0), tuple(experts * t for t in tiles), m * active)
    return (
        _highest(load, chance, m, experts, active, devices)
        if np.any(np.greater(devices, 1.0))
        else load
    )


def _highest(
    load: Load,
    chance: FloatArray,
    m: FloatArray,
    experts: FloatArray,
    active: FloatArray,
    devices: Any,
) -> Load:
    """Return the highest load of ``devices`` from the mean ``load``. Experts in use and tokens are
    nearly normal over devices, and the highest of d normal numbers is near the quantile (d - 3/8) /
    (d + 1/4) (G. Blom, "Statistical estimates and transformed beta-variables", 1958)."""
    known, which = np.unique(devices, return_inverse=True)
    quantiles = np.array([_NORMAL.inv_cdf((d - 0.375) / (d + 0.25)) for d in known])
    deviations = quantiles[which].reshape(np.shape(devices)) * np.sqrt(
        experts * (1.0 - 1.0 / np.asarray(devices))
    )
    some = load.touched / experts
    mean = m * chance
    most = np.minimum(active * devices, experts)
    touched = np.minimum(
        load.touched + deviations * np.sqrt(some * (1.0 - some)), np.minimum(experts, m * most)
    )
    spread = np.sqrt((mean * (1.0 - chance)).mean(axis=0) + mean.var(axis=0))
    rows = np.minimum(load.rows + deviations * spread, m * most)
    more = rows / np.maximum(load.rows, 1e-30)
    return Load(
        touched, tuple(touched + (tiles - load.touched) * more for tiles in load.tiles), rows
    )


def dealt_load(m: FloatArray, experts: FloatArray, active: FloatArray, power: Any) -> Load:
    """Return the load of tokens that benchmarks distribute. aiconfigurator deals tokens in turn
    (``power`` 0), or by a rounded power law from 1 to 0.8 m (from 0.01 to 2 if there are at most as
    many choices as experts); experts without tokens take the rest. DeepGEMM draws each number
    uniformly around the mean, rounded down; minus ``power`` is the largest relative distance from
    the mean."""
    choices = m * active
    power = np.broadcast_to(np.asarray(power, dtype=np.float64), m.shape)
    even = choices / experts
    counts = _dealt_counts(m, even, choices <= experts, power) if power.any() else even[None]
    tiles = (np.where(counts < 1.0, counts, np.ceil(counts / rows)).mean(axis=0) for rows in TILES)
    touched = experts * np.minimum(counts, 1.0).mean(axis=0)
    return Load(touched, tuple(experts * t for t in tiles), choices)


def _dealt_counts(m: FloatArray, even: FloatArray, few: BoolArray, power: FloatArray) -> FloatArray:
    """Return tokens per expert at quantiles of the experts: ``even`` is their mean, and ``few``
    marks at most as many choices as experts."""
    rank = (np.arange(QUANTILES)[:, None] + 0.5) / QUANTILES
    share = np.floor(even * (1.0 - power * (2.0 * rank - 1.0)) + 1e-9)
    low = np.where(few, 0.01, 1.0)
    high = np.where(few, 2.0, np.maximum(0.8 * m, 1.0001))
    inverse = 1.0 - np.where(power > 0, power, 1.01)
    load = (low**inverse + rank * (high**inverse - low**inverse)) ** (1.0 / inverse)
    counts = np.minimum(np.rint(load * (even / load.mean(axis=0))), m)
    idle = (counts < 1.0).mean(axis=0)
    over = np.clip(even - counts.mean(axis=0), 0.0, idle) / np.maximum(idle, 1e-9)
    dealt = np.where(counts < 1.0, over, counts)
    return np.select([power > 0, power < 0], [dealt, share], even)


@dataclass(frozen=True)
class Layers(Calls):
    """Expert layers of one device, or single grouped products."""

    operator = "experts"
    machine: Machine
    m: FloatArray
    n: FloatArray
    k: FloatArray
    experts: FloatArray
    active: FloatArray
    skew: FloatArray
    dealt: bool = True  # tokens are distributed by rule, as in a benchmark
    warm: Any = True  # weights are in L2 if they fit, as in a benchmark that repeats one layer
    part: Any = 0  # index into PARTS
    devices: Any = 1.0  # devices that share the experts, unless tokens are dealt
    unfitted: tuple[str, ...] = ()  # error factors of kernels without a fit
    gated: Any = 1.0  # 1: an expert has a gate projection beside up and down; 0: it has none

    @cached_property
    def load(self) -> Load:
        sizes = self.m, self.experts, self.active, self.skew
        return dealt_load(*sizes) if self.dealt else drawn_load(*sizes, self.devices)

    @cached_property
    def products(self) -> tuple[Any, Any]:
        """Whether times include the product of gate and up, and that of down."""
        return np.not_equal(self.part, PARTS.index("down")), np.not_equal(
            self.part, PARTS.index("gate_up")
        )

    @cached_property
    def whole(self) -> Any:
        """Whether times are those of whole layers."""
        return np.equal(self.part, PARTS.index("layer"))

    @cached_property
    def position(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Coordinates of the residual: log2 of tokens per expert in use, of the width, and of
        experts in use. Experts without tokens change no time."""
        load = self.load
        touched = np.maximum(load.touched, 1e-30)
        return (
            np.log2(np.maximum(load.rows / touched, 1e-30)),
            np.log2(self.n),
            np.log2(touched),
        )

    @cached_property
    def elements(self) -> FloatArray:
        """Weights of an expert in the timed products."""
        up, down = self.products
        return np.asarray(((1.0 + self.gated) * up + down) * self.n * self.k)

    def estimate(self, c: RowValues) -> Estimate:
        m = self.m
        n = self.n
        k = self.k
        machine = self.machine
        load = self.load
        (up, down), whole = self.products, self.whole
        slower = (1.0 + c["narrow"] / n) * np.where(n % ALIGNED, 1.0 + c["align"], 1.0)
        # time per weight of a tile of each height: arithmetic of its rows, and the load into an SM
        row_s = 2.0 / (c["e_tc"] * machine.peak_flop_per_s)
        loading_s = machine.weight_bytes / (c["b_sm"] * machine.sm_count)
        tile_s = [np.maximum(rows, c["least_rows"]) * row_s + loading_s for rows in TILES]
        if machine.striped:  # blocks of 8 or 16 rows
            few = np.clip(load.rows / np.maximum(load.touched, 1e-30), 8.0, TILES[0])
            tile_s[0] = few * row_s + loading_s
        every = np.stack([tiles * s for tiles, s in zip(load.tiles, tile_s, strict=True)])
        chosen = np.argmin(every, axis=0)
        # the last tile of an SM runs alone through the whole depth of the product
        last_s = np.choose(chosen, tile_s)
        alone = c["tail"] * TILE_COLUMNS * machine.sm_count * last_s * (up * k + down * n)
        compute = (every.min(axis=0) * self.elements + alone) * slower
        weights = self.elements * load.touched * machine.weight_bytes
        memory = weights / (c["e_d"] * machine.bandwidth_bytes_per_s) * slower
        if np.any(self.warm):
            whole_bytes = (2.0 + self.gated) * n * k * load.touched * machine.weight_bytes
            held = from_l2(whole_bytes, machine, c)
            memory = memory * np.where(self.warm, held, 1.0)
        # 16-bit: permuted tokens, products of gate and up, their activation, and sums of the
        # results
        inner = (2.0 + self.gated) * n
        moved = 2.0 * whole * (load.rows * (2.0 * k + inner) + 2.0 * m * k)
        io = moved / (c["e_io"] * machine.bandwidth_bytes_per_s)
        idle = self.experts - load.touched
        layer_s = c["t0_s"] + c["expert_s"] * load.touched + c["idle_s"] * idle
        launch = whole * layer_s + (up + 1.0 * down) * c["product_s"]
        computed = np.choose(
            chosen, [tiles * rows for tiles, rows in zip(load.tiles, TILES, strict=True)]
        )
        padding = np.log(np.maximum(computed / np.maximum(load.rows, 1e-30), 1.0))
        return self._estimate(launch, io, compute, memory, padding)

    def _estimate(
        self,
        launch: FloatArray,
        io: FloatArray,
        compute: FloatArray,
        memory: FloatArray,
        padding: FloatArray,
    ) -> Estimate:
        """Return the cost from its parts, s: arithmetic and weights overlap in part, the others are
        added."""
        m = self.m
        n = self.n
        k = self.k
        machine = self.machine
        load = self.load
        work = np.hypot(compute, memory)
        total = np.asarray(launch + io + work)
        rest = 1.0 / (np.maximum(work, 1e-30) * total)
        computing = compute**2 * rest
        loadings: dict[str, Any] = {
            "launch": launch / total,
            "compute": computing,
            "memory": memory**2 * rest,
        }
        loadings |= {"io": io / total, "padding": computing * np.minimum(padding, 1.0)}
        loadings |= dict.fromkeys(self.unfitted, 1.0)
        if (self.skew > 0.0).any():
            loadings["skew"] = np.clip(self.skew, 0.0, 1.0)
        if np.any(np.greater(self.devices, 1.0)):
            more = load.rows / np.maximum(m * self.active, 1e-30)
            loadings["balance"] = work / total * np.log(np.maximum(more, 1.0))
        if (n % ALIGNED).any():
            loadings["alignment"] = np.where(
                n % ALIGNED, loadings["compute"] + loadings["memory"], 0.0
            )
        compute_s = 2.0 * self.elements * load.rows / machine.peak_flop_per_s
        streams = 2.0 * m * k * machine.element_bytes * self.whole
        bytes_s = (
            self.elements * load.touched * machine.weight_bytes + streams
        ) / machine.bandwidth_bytes_per_s
        octaves = [scale * np.ravel(x) for scale, x in zip(OCTAVES, self.position, strict=True)]
        parts = {"compute": compute, "memory": np.maximum(memory, io), "launch": launch}
        return Estimate(
            operator="experts",
            kind=int(Kind.EXPERTS),
            time=total,
            floor=np.maximum(compute_s / machine.headroom, np.where(self.warm, 0.0, bytes_s)),
            roofline=np.maximum(compute_s, bytes_s),
            bottleneck=largest_part(parts, total.shape),
            loadings=loadings,
            coordinates=np.stack(octaves, axis=1),
            position=self.position,
        )


WEIGHT_ONLY: Values = {"b_sm": 1.39e11, "expert_s": 9.4e-9}
"""Constants of kernels that dequantise weights in registers (Marlin) on GPUs without a fit: int4
experts of SGLang on an A100 (aiconfigurator-core 0.12.0)."""


class _Ready(NamedTuple):
    machine: Machine
    section: FittedValues
    constants: Values
    residual: ResidualGrid | None
    unfitted: tuple[str, ...]


@lru_cache(maxsize=128)
def _ready(hw: Device, dtype: str, weight: str) -> _Ready:
    element_bytes(weight)
    label = label_of(dtype, weight)
    factors = tuple[str, ...]()
    machine = Machine.of(hw, label)
    section = hw.section("experts", label)
    if section.status == "default" and weight != dtype:  # use fitted kernels of the dense format
        section = hw.section("experts", dtype)
        factors = () if section.status == "default" else ("quantised",)
    # defaults are the middle of all stacks
    scaled = weight in SCALED and section.status != "default"
    factors = (
        *factors,
        *(["scaled"] if scaled else []),
        *unfitted(section, EXPERTS_CONSTANTS, hw.architecture),
    )
    constants = {name: section[name] for name in EXPERTS_CONSTANTS}
    if machine.weight_bytes < machine.element_bytes and section.status == "default":
        constants |= WEIGHT_ONLY
        machine = replace(machine, striped=True)
    return _Ready(machine, section, constants, ResidualGrid.from_arrays(section.arrays), factors)


class ExpertSizes(NamedTuple):
    """Sizes of the experts of a layer on one device, which broadcast."""

    m: Any  # tokens
    n: Any  # width of an expert
    k: Any  # hidden size
    experts: Any  # experts of the device
    active: Any  # experts per token on average; fractional if devices share the experts
    # imbalance of loads (:func:`experts_chance`; 0: uniform), or the power of :func:`dealt_load`
    skew: Any = 0.0
    # devices that share the experts; the time is that of the device with the highest load
    devices: Any = 1
    gated: Any = True  # whether experts have a gate projection beside up and down


def experts(
    sizes: ExpertSizes,
    hw: Device,
    dtype: str = "bf16",
    weight_dtype: str | None = None,
    dealt: bool = False,
    warm: bool = False,
    part: str = "layer",
) -> Estimate:
    """Return the cost of the experts of one layer on one device. For benchmarks, tokens are
    ``dealt`` by rule, weights are ``warm`` if one layer repeats without overwriting L2, and
    ``part`` is one of :data:`PARTS`."""
    given = (np.asarray(a, dtype=np.float64) for a in np.broadcast_arrays(*sizes))
    m, n, k, number, active, skew, devices, gated = given
    r = _ready(hw, dtype, weight_dtype or dtype)
    timed = PARTS.index(part)
    layers = Layers(
        r.machine, m, n, k, number, active, skew, dealt, warm, timed, devices, r.unfitted, gated
    )
    return layers.estimate(r.constants).on_grid(r.residual, r.section)


class Experts(Operator):
    """Routed experts of a layer on one device; ``batch`` devices share them (0: one)."""

    code = int(Kind.EXPERTS)
    name = "experts"
    sizes = ("m", "n", "k", "experts")
    constants = _CONSTANTS
    titles = ("experts",)
    # stacks differ by 5 to 40 % in the median, two versions of SGLang and of vLLM on Hopper by 2 to
    # 7 %
    errors = _ERRORS
    weighted = True

    def flops(self, w: Rows) -> Any:
        """6NK per token and expert in use; 4NK without a gate projection."""
        return (4.0 + 2.0 * w.gated) * w.m * w.n * w.k * w.active

    def executed_flops(self, w: Rows) -> Any:
        """FLOPs of whole tiles: a Hopper tensor core multiplies at least 64 rows."""
        m, experts, active = (np.asarray(c, np.float64) for c in (w.m, w.experts, w.active))
        tiles = drawn_load(m, experts, active, w.skew).tiles[1]
        rows = np.maximum(tiles * TILES[1], m * active)
        return (4.0 + 2.0 * w.gated) * rows * w.n * w.k

    def bytes(self, w: Rows) -> Any:
        """Weights in use, input and output."""
        return self.weight_bytes(w) + 2.0 * DTYPE_BYTES[w.dtype] * w.m * w.k

    def weight_bytes(self, w: Rows) -> Any:
        """Weights of experts in use."""
        return (
            (2.0 + w.gated)
            * w.n
            * w.k
            * DTYPE_BYTES[w.weight_dtype]
            * experts_touched(w.m, w.experts, w.active, w.skew)
        )

    def inner_elements(self, w: Rows) -> Any:
        """Gathered tokens, their gate and up."""
        return w.m * w.active * (w.k + (1.0 + w.gated) * w.n)

    def estimates(self, w: Rows, hw: Device, formats: Formats) -> Estimates:
        devices = np.maximum(w.batch, 1)
        sizes = ExpertSizes(w.m, w.n, w.k, w.experts, w.active, w.skew, devices, w.gated)
        yield slice(None), experts(sizes, hw, formats.dtype, formats.second)

    def fixed(self, w: Rows, hw: Device, formats: Formats) -> FloatArray:
        c = _ready(hw, formats.dtype, formats.second).constants
        touched = experts_touched(w.m, w.experts, w.active, w.skew)
        each = c["expert_s"] * touched + c["idle_s"] * (w.experts - touched)
        return np.asarray(c["t0_s"] + each + 2.0 * c["product_s"])
