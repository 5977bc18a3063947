"""What the times of GEMMs are unsure of: columns of the error model from shares of the analytic time. Use
:func:`uncertainty_of`."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.cost.gemm_model import Core, CoreTime, cube
from simulator.hardware.profile import SAME_STACK
from simulator.uncertainty.error_model import BEYOND_PER_OCTAVE, Spread, Uncertainty, octaves_outside
from simulator.workload import Kind

LOCAL, NOISE, LAUNCH_NOISE, IDLE_NOISE = 0.045, 0.065, 0.08, 0.12
"""Log standard deviations: of the local error, and of a shape's own: at least, times the share of the launch, times
that of waiting for the last wave."""

WAVES: tuple[tuple[int, int], ...] = ((128, 256), (128, 128), (64, 128))
"""Tiles of which stacks may choose any: how full the last wave is depends on it."""


def uncertainty_of(
    core: Core,
    m: Array,
    n: Array,
    k: Array,
    parts: CoreTime,
    step_scale: Any = 1.0,
    load_scale: Any = 1.0,
    spread: Spread = (SAME_STACK, 1.0),
    unknown: tuple[str, ...] = (),
    measured: tuple[Array, Array] | None = None,
) -> Uncertainty:
    """What the times of shapes are unsure of, from shares of the analytic time: fixed; arithmetic, as part of which the
    latency of a step, L2's feed and the idle SMs of the last wave of the tiles a stack may choose; memory, as part of
    which L2. ``spread``, ``unknown`` and ``measured`` are those of :class:`~simulator.cost.gemm.GemmKernel`."""
    c = parts.compute3
    launch = core.t0_us / parts.total_us
    memory = cube(parts.memory_us)
    work = (1.0 - launch) / (c + memory)
    compute, memory = c * work, memory * work
    dram_us = 1e6 / (core.machine.bandwidth_bytes_per_s * core.constants["e_d"])
    dram = parts.dram_bytes + (load_scale - 1.0) * (n * k * core.machine.weight_bytes)
    hit = memory * np.clip(1.0 - dram * dram_us / parts.memory_us, 0.0, 1.0)
    shares: dict[str, Any] = {"launch": launch, "compute": compute, "memory": memory, "l2": hit}
    idle: Array | float = 0.0
    if not core.machine.packs:
        waits = (1.0 - (core.flop_us / core.step_us) ** 4)[:, 0][parts.tile]
        latency = compute * waits
        if not core.machine.persistent:
            feed = core.feed_us[:, 0][parts.tile] * parts.tiles * np.ceil(k * (1.0 / core.step_elements))
            feed = np.minimum(cube(feed) / c, 1.0)
            shares["feed"] = compute * feed
            latency = latency * (1.0 - feed)
        shares["latency"] = latency
        for tile_m, tile_n in WAVES:
            waves = np.ceil(m * (1.0 / tile_m)) * np.ceil(n * (1.0 / tile_n)) * (1.0 / core.machine.sm_count)
            shares[f"idle {tile_m}x{tile_n}"] = compute * _idle(waves)
        idle = compute * _idle(parts.tiles * (1.0 / core.machine.sm_count))
    if np.ndim(step_scale):
        shares["alignment"] = np.sqrt(np.log(step_scale))  # known to a factor, the smaller it is the worse
    shares |= {name: np.float32(1.0) for name in unknown}
    if "generic" in unknown:  # every GPU draws much the same share of its DRAM's bandwidth
        shares["generic"] = 1.0 - (memory - hit)
    place = np.log2(np.stack([m, n, k], axis=1))
    own = NOISE**2 + (LAUNCH_NOISE * launch) ** 2 + (IDLE_NOISE * idle) ** 2
    if measured is not None:
        own = own + (BEYOND_PER_OCTAVE * octaves_outside(place, *measured)) ** 2
    return Uncertainty.of("gemm", shares, spread=spread, local=LOCAL, own=own, place=place, kind=int(Kind.GEMM))


def _idle(waves: Array) -> Array:
    """Log of whole waves over waves, where there is more than one."""
    return np.asarray(np.where(waves > 1.0, np.log(np.ceil(waves) / waves), 0.0))
