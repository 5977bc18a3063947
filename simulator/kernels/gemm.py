"""GEMM cost: arrays of shapes and a profile in, times with intervals out.

Use :func:`gemm_time` for times, :func:`gemm_ladder` for the same time built up effect by effect. The analytic form is in
:mod:`simulator.kernels.gemm_core`; a
fitted profile multiplies it by a smooth residual (:mod:`simulator.kernels.lattice`), and no time beats the datasheet at the device's highest clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.hardware.constants import GEMM_CONSTANTS as CONSTANTS
from simulator.kernels.exact import overlay
from simulator.kernels.gemm_core import CoreTime, core_time
from simulator.kernels.gemm_plan import (
    BLOCK_SPARSE,
    DENSE,
    ELEMENT_BYTES,
    PRECISION,
    SPARSE24,
    UNSTRUCTURED,
    Plan,
    aligned,
    alignment_halvings,
    gemm_plan,
)
from simulator.kernels.optime import BOUNDS, OpTime

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

__all__ = [
    "BOUNDS",
    "CONSTANTS",
    "ELEMENT_BYTES",
    "PRECISION",
    "GemmTime",
    "Plan",
    "alignment_halvings",
    "gemm_ladder",
    "gemm_plan",
    "gemm_time",
    "with_section",
]

F = NDArray[np.floating[Any]]

MOST_FEATURES = 2.0**31

CHUNK = 4096
"""Shapes timed at once: few enough for the second-level cache, many enough to hide the cost of calls."""

_COMPUTE, _MEMORY, _L2, _LATENCY, _LAUNCH = (
    BOUNDS.index(name) for name in ("compute", "memory", "l2", "latency", "launch")
)


def _no_values() -> F:
    return np.zeros(0)


@dataclass(frozen=True)
class GemmTime(OpTime):
    """Times of GEMMs; the fields of :class:`OpTime`, and with ``detail`` what the model chose (else empty arrays).

    Attributes
    ----------
    measured : bool array
        The time was measured at this very shape and kept with the profile, not predicted; its interval is that of the measurement.
    tile_m, tile_n : float64 array
        Output tile of a block.
    split_k : float64 array
        Blocks that share one tile's k.
    waves : float64 array
        Output tiles (times split_k) over SMs.
    compute_s, memory_s, fixed_s : float64 array, s
        Main loop, memory system and fixed time of the analytic form, before the residual.
    residual : float64 array
        Factor of the fitted residual.
    """

    measured: NDArray[np.bool_] = field(default_factory=_no_values)  # type: ignore[arg-type]
    tile_m: F = field(default_factory=_no_values)
    tile_n: F = field(default_factory=_no_values)
    split_k: F = field(default_factory=_no_values)
    waves: F = field(default_factory=_no_values)
    compute_s: F = field(default_factory=_no_values)
    memory_s: F = field(default_factory=_no_values)
    fixed_s: F = field(default_factory=_no_values)
    residual: F = field(default_factory=_no_values)


@dataclass(frozen=True)
class _Timed:
    """A chunk's results, microseconds."""

    us: F
    lower_us: F
    upper_us: F
    roofline_us: F
    bound: NDArray[np.int8]
    parts: CoreTime
    residual: F | float


def _timed(m: F, n: F, k: F, plan: Plan, copies: F | float | None, level: float) -> _Timed:
    core, machine = plan.core, plan.core.machine
    byte_us, flop_us = 1e6 / machine.bandwidth_bytes_per_s, 1e6 / plan.flop_rate
    flop = n * k
    moved = flop * (machine.weight_bytes * byte_us)
    flop *= m
    flop *= 2.0 * flop_us
    acts = n + k
    acts *= m
    acts *= machine.element_bytes * byte_us
    moved += acts
    roofline = np.maximum(flop, moved)
    rows = np.ceil(m * (1.0 / plan.pad_m)) * plan.pad_m if plan.pad_m > 1.0 else m
    step_scale, load_scale = aligned(n, k, plan)
    parts = core_time(rows, n, k, core, copies, step_scale, load_scale)
    residual: F | float = 1.0
    us = parts.total_us
    if plan.residual is not None:
        residual = plan.residual.at(rows, n, k, parts, core)
        np.exp(residual, out=residual)
        us = us * residual
    flop *= 1.0 / machine.headroom
    floor = np.maximum(flop, parts.dram_bytes * byte_us)
    floor *= 1.0 + 5e-7  # single precision must not round below the physics
    us = np.maximum(us, floor)
    low, high = plan.bands.factors(rows, parts, core, level, plan.widen)
    if np.ndim(step_scale):  # no table has unaligned shapes: the penalty is known to half of itself either way
        doubt = np.sqrt(step_scale)
        low, high = low / doubt, high * doubt
    low *= us
    np.maximum(low, floor, out=low)
    high *= us
    return _Timed(us, low, high, roofline, _bound(parts, plan, k), parts, residual)


def _bound(parts: CoreTime, plan: Plan, k: F) -> NDArray[np.int8]:
    """What holds each shape: the largest part; a main loop may wait for its step's latency or for L2's feed rather than compute."""
    core = plan.core
    memory3 = parts.memory_us * parts.memory_us
    memory3 *= parts.memory_us
    bound = plan.kinds.take(parts.tile)
    if core.has_feed:
        feed = core.feed_us[:, 0].take(parts.tile)
        feed *= parts.tiles
        feed *= k
        feed *= 1.0 / core.step_elements
        cubed = feed * feed
        cubed *= feed
        np.copyto(bound, _L2, where=cubed > 0.5 * parts.compute3)
    np.copyto(bound, _MEMORY, where=memory3 > parts.compute3)
    np.copyto(bound, _LAUNCH, where=parts.total_us < 2.0 * core.t0_us)
    return bound


def _columns(*values: Any) -> list[F]:
    arrays: list[F] = [np.asarray(v, dtype=np.float64) for v in values]
    if len({a.shape for a in arrays}) > 1:
        arrays = [np.ascontiguousarray(a) for a in np.broadcast_arrays(*arrays)]
    return arrays


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
    cold: bool = True,
    copies: Any = None,
    level: float = 0.9,
    detail: bool = False,
) -> GemmTime:
    """Time of y[m, n] = x[m, k] w[k, n]; arrays broadcast.

    Parameters
    ----------
    m, n, k : int or array
        Tokens, output features, input features; at least 1.
    hw : HardwareProfile
    dtype : str
        Of activations and arithmetic.
    weight_dtype : str, optional
        How weights are stored; narrower than ``dtype``: a weight-only quantised kernel.
    kernel : int or array
        0 dense, 1 2:4 sparse, 2 zeros without structure (timed as dense), 3 rows skipped in blocks (m counts the rows computed).
    density : float or array
        Share of weights that are not zero; no kernel here gains by it beyond its format, so that it only documents the operand.
    cold : bool
        Weights come from DRAM, as in a decoder; False: they are as warm as L2 allows.
    copies : int or array, optional
        Weights used in turn, as benchmarks rotate them: how warm they are follows from their footprint. Overrides ``cold``.
    level : float
        Of the interval, in (0, 1).
    detail : bool
        Fill the detail fields too.

    Returns
    -------
    GemmTime
        Arrays of the broadcast shape.

    Raises
    ------
    InputError
        For a dtype the device lacks, a dimension below 1, or a level outside (0, 1).

    Examples
    --------
    >>> from simulator.hardware.library import load_hardware
    >>> t = gemm_time([1, 2048], 4096, 4096, load_hardware("a100"))
    >>> t.limits.tolist(), bool((t.lower < t.seconds).all())
    (['memory', 'compute'], True)
    """
    if not 0.0 < level < 1.0:
        raise InputError(f"level {level:g} is outside (0, 1)")
    m, n, k = _columns(m, n, k)
    codes = np.asarray(kernel)
    shape = (
        m.shape
        if codes.ndim == 0 and np.ndim(copies) == 0
        else np.broadcast_shapes(m.shape, codes.shape, np.shape(copies))
    )
    if m.shape != shape:
        m, n, k = (np.broadcast_to(a, shape) for a in (m, n, k))
    m, n, k = (np.ascontiguousarray(a).reshape(-1) for a in (m, n, k))
    if len(m) and not (m.min() >= 1.0 and n.min() >= 1.0 and k.min() >= 1.0):  # also refuses NaN
        raise InputError("m, n and k must be at least 1")
    if len(m) and not (n.max() < MOST_FEATURES and k.max() < MOST_FEATURES):  # their alignment is looked at in 32 bits
        raise InputError(f"n and k must be below 2**31, got {max(n.max(), k.max()):g}")
    used: Any = None if cold and copies is None else 1.0 if copies is None else copies
    if np.ndim(used):
        used = np.broadcast_to(np.asarray(used, dtype=np.float64), shape).reshape(-1)
    kinds = (np.broadcast_to(codes, shape) if codes.ndim and codes.shape != shape else codes).reshape(-1)
    if len(kinds) and (kinds == kinds[0]).all():
        out = _run(m, n, k, gemm_plan(hw, dtype, weight_dtype, _family(int(kinds[0]))), used, level, detail)
    else:
        out = _empty(len(m), detail)
        for code in np.unique(kinds):
            rows = np.flatnonzero(kinds == code)
            part = _run(
                m[rows],
                n[rows],
                k[rows],
                gemm_plan(hw, dtype, weight_dtype, _family(int(code))),
                used[rows] if np.ndim(used) else used,
                level,
                detail,
            )
            for name, values in part.items():
                out[name][rows] = values
    return GemmTime(**{name: values.reshape(shape) for name, values in out.items()})


def _family(code: int) -> int:
    if code not in (DENSE, SPARSE24, UNSTRUCTURED, BLOCK_SPARSE):
        raise InputError(
            f"kernel code {code} is unknown; expected 0 dense, 1 2:4 sparse, 2 unstructured, 3 block-sparse rows"
        )
    return DENSE if code == UNSTRUCTURED else code


_PLAIN = [*(f.name for f in fields(OpTime)), "measured"]
_TYPES: Mapping[str, Any] = {"bound": np.int8, "measured": np.bool_}
_DETAIL = [f.name for f in fields(GemmTime) if f.name not in _PLAIN]


def _empty(size: int, detail: bool) -> dict[str, Any]:
    names = _PLAIN + (_DETAIL if detail else [])
    return {name: np.zeros(size, dtype=_TYPES.get(name, np.float64)) for name in names}


def _run(m: F, n: F, k: F, plan: Plan, copies: Any, level: float, detail: bool) -> dict[str, Any]:
    """Chunks of shapes through the model, so that their intermediate arrays stay in the cache."""
    size = len(m)
    if size <= CHUNK:
        return _fields(m, n, k, plan, copies, level, detail)
    out = _empty(size, detail)
    for start in range(0, size, CHUNK):
        part = slice(start, start + CHUNK)
        for name, values in _fields(
            m[part], n[part], k[part], plan, copies[part] if np.ndim(copies) else copies, level, detail
        ).items():
            out[name][part] = values
    return out


def _fields(m: F, n: F, k: F, plan: Plan, copies: Any, level: float, detail: bool) -> dict[str, Any]:
    core, shapes = plan.core, (m, n, k)
    m, n, k = (a.astype(PRECISION) for a in (m, n, k))
    t = _timed(m, n, k, plan, copies.astype(PRECISION) if np.ndim(copies) else copies, level)
    parts = t.parts
    out: dict[str, Any] = {"seconds": t.us, "lower": t.lower_us, "upper": t.upper_us, "roofline_s": t.roofline_us}
    if detail:
        out |= {"compute_s": parts.compute_us, "memory_s": parts.memory_us, "fixed_s": np.full(len(m), core.t0_us)}
    out = {name: np.multiply(values, 1e-6, dtype=np.float64) for name, values in out.items()}
    out["bound"] = t.bound
    overlay(out, plan.exact if copies is None else None, *shapes, level)
    if detail:
        out |= {
            "tile_m": core.tile_m[:, 0].take(parts.tile).astype(np.float64),
            "tile_n": core.tile_n[:, 0].take(parts.tile).astype(np.float64),
            "split_k": parts.split.astype(np.float64),
            "waves": parts.tiles.astype(np.float64) * parts.split / core.machine.sm_count,
            "residual": np.ones(len(m)) * t.residual,
        }
    return out


def gemm_ladder(
    m: Any,
    n: Any,
    k: Any,
    hw: HardwareProfile,
    *,
    dtype: str = "bf16",
    weight_dtype: str | None = None,
    kernel: Any = DENSE,
    density: Any = 1.0,
    cold: bool = True,
    copies: Any = None,
    level: float = 0.9,
    detail: bool = False,
) -> Mapping[str, F]:
    """The time of GEMMs built up effect by effect, s.

    Parameters are those of :func:`gemm_time`.

    Returns
    -------
    mapping of str to float64 array
        "roofline": max(FLOP / peak, bytes / bandwidth); "tile": with the chosen tile's padding; "wave": and idle SMs of the last wave;
        "alignment":
        and n or k off 16 bytes; "kernel": all but the fixed time; "launch": equals ``gemm_time(...).seconds``.

    Examples
    --------
    >>> from simulator.hardware.library import load_hardware
    >>> list(gemm_ladder(64, 4096, 4096, load_hardware("a100")))
    ['roofline', 'tile', 'wave', 'alignment', 'kernel', 'launch']
    """
    t = gemm_time(
        m,
        n,
        k,
        hw,
        dtype=dtype,
        weight_dtype=weight_dtype,
        kernel=kernel,
        density=density,
        cold=cold,
        copies=copies,
        level=level,
        detail=True,
    )
    m, n, k = _columns(m, n, k)
    m, n, k, codes = np.broadcast_arrays(m, n, k, np.asarray(kernel))
    plans = {int(c): gemm_plan(hw, dtype, weight_dtype, _family(int(c))) for c in np.unique(codes)}
    rate, weight, step, load = (np.zeros(codes.shape) for _ in range(4))
    for code, plan in plans.items():
        rows = codes == code
        halvings = alignment_halvings(n[rows], k[rows], plan.core.machine.element_bytes)
        rate[rows], weight[rows] = plan.flop_rate, plan.core.machine.weight_bytes
        step[rows], load[rows] = 1.0 + plan.align_step * halvings, 1.0 + plan.align_load * halvings
    machine = next(iter(plans.values())).core.machine
    weight_s = weight * n * k / machine.bandwidth_bytes_per_s
    memory = weight_s + machine.element_bytes * m * (n + k) / machine.bandwidth_bytes_per_s
    tiles = np.ceil(m / t.tile_m) * np.ceil(n / t.tile_n)
    padded = 2.0 * tiles * t.tile_m * t.tile_n * k / rate
    blocks = tiles * t.split_k / machine.sm_count
    idle = np.where(blocks > 1.0, 1.0 if machine.persistent else np.ceil(blocks) / blocks, 1.0 / blocks)
    fixed = np.minimum(t.fixed_s * t.residual, t.seconds)
    return {
        "roofline": t.roofline_s,
        "tile": np.maximum(padded, memory),
        "wave": np.maximum(padded * idle, memory),
        "alignment": np.maximum(padded * idle * step, memory + weight_s * (load - 1.0)),
        "kernel": t.seconds - fixed,
        "launch": t.seconds,
    }


def with_section(hw: HardwareProfile, dtype: str, section: Any) -> HardwareProfile:
    """A profile whose GEMM section of a dtype is another."""
    return replace(hw, sections={**hw.sections, ("gemm", dtype): section})
