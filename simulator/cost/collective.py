"""Collectives between devices: alpha-beta over the profile's link. What to use: :func:`collective_time`.

The library's algorithm (NCCL's ring) takes a start, a hop for each synchronising step, the wire's time, and a ramp: a
payload cut into chunks fills and drains a pipeline, at best in twice the root of step times wire. Engines have an
all-reduce of their own for small payloads, one-shot (every device reads everything from all others) or two-shot
(reduce-scatter, then all-gather), where devices see each other's memory; the fastest wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import AMOUNT, COUNT, array, instance, together
from simulator.arrays import FloatArray
from simulator.cost.residual_grid import ResidualGrid
from simulator.errors import InputError, unknown
from simulator.hardware.constants import COLLECTIVE_CONSTANTS
from simulator.hardware.profile import SAME_STACK, HardwareProfile
from simulator.uncertainty.error_model import (
    BOTTLENECKS,
    OperatorTimes,
    Posterior,
    Spread,
    Uncertainty,
    level_scale,
    posterior_of,
    with_intervals,
)
from simulator.workload import Kind

KINDS: tuple[str, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
"""Roles of collectives; the index is the code of a kind, also in the lattice of a profile."""

_LINK, _LAUNCH = BOTTLENECKS.index("link"), BOTTLENECKS.index("launch")

LOCAL, OWN = 0.10, 0.08
"""Log standard deviations of errors that neighbouring sizes share, and of one size's own."""
APART = 8.0
"""Octaves between two kinds, so that their local errors are their own."""


@dataclass(frozen=True)
class CollectiveTime:
    """Parts of a collective's time, s: what it takes empty, the bytes on the wire, and steps that wait in between."""

    launch: FloatArray
    link: FloatArray
    step: FloatArray

    @property
    def total(self) -> FloatArray:
        return self.launch + self.link + self.step


def collective_core(
    code: NDArray[np.intp], payload: FloatArray, devices: FloatArray, bandwidth: float, c: Mapping[str, float]
) -> CollectiveTime:
    """Time of collectives without residual, s, from constants by name; ``devices`` at least 2, ``bandwidth`` of the
    link in one direction, B/s."""
    others = devices - 1.0
    share = others / devices  # of the payload that a device must receive
    one = np.ones_like(others)
    wire = np.choose(code, [2.0 * share, share, share, share, one]) * payload
    hops = np.choose(code, [2.0 * others, others, others, 1.0 + np.log2(devices), one])
    # devices behind one switch of PCIe share its uplink
    rate = bandwidth * (2.0 / devices) ** c["sharing"]
    moved = wire / (c["e_link"] * rate)
    launch, step = c["t0_s"] + c["hop_s"] * hops, np.sqrt(c["pipe_s"] * moved)
    near = c["own_e"] * rate
    own_launch = c["own_t0_s"] + c["own_hop_s"] * others
    one_shot, two_shot = others * payload / near, wire / near
    once = one_shot < two_shot + c["own_step_s"]
    own_moved, own_step = np.where(once, one_shot, two_shot), np.where(once, 0.0, c["own_step_s"])
    own = (code == 0) & (devices <= c["own_devices"]) & (payload <= c["own_bytes"])
    own &= own_launch + own_moved + own_step < launch + moved + step
    chosen = ((own_launch, launch), (own_moved, moved), (own_step, step))
    return CollectiveTime(*(np.where(own, mine, library) for mine, library in chosen))


def collective_place(
    code: NDArray[np.intp], payload: FloatArray, devices: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Coordinates of collectives in their lattice: kind, log2 devices, log2 bytes."""
    return code.astype(np.float64), np.log2(devices), np.log2(np.maximum(payload, 1.0))


def least_wire(code: int, devices: FloatArray, kind: str) -> FloatArray:
    """Payloads that must pass a device's link at least; from its fourth generation on NVLink's switch can add up, so
    that an all-reduce sends and receives each payload once."""
    share = 1.0 - 1.0 / devices
    if code:
        return np.ones_like(share) if KINDS[code] == "send" else share
    adds = kind.lower().startswith("nvlink") and not kind.lower().startswith(("nvlink1", "nvlink2", "nvlink3"))
    return np.ones_like(share) if adds else 2.0 * share


@dataclass(frozen=True)
class _Ready:
    """What a profile says."""

    constants: Mapping[str, float]
    residual: ResidualGrid | None
    spread: Spread  # factors on the prior of its errors
    posterior: Posterior | None


@lru_cache(maxsize=128)
def _ready(hw: HardwareProfile) -> _Ready:
    section = hw.section("collective", "*")
    constants = {name: section[name] for name in COLLECTIVE_CONSTANTS}
    if hw.link is not None and section.constants["hop_s"].status == "default":
        constants["hop_s"] = hw.link.latency_s
    return _Ready(constants, ResidualGrid.from_arrays(section.arrays), hw.error_scales(section), posterior_of(hw))


def collective_time(
    payload_bytes: Any, devices: Any, hw: HardwareProfile, *, kind: str = "all_reduce", level: float = 0.9
) -> OperatorTimes:
    """Time of a collective of one of :data:`KINDS` among ``devices``, at least 1 (1: nothing happens, 0 s).

    The payload is what each device holds before (all_reduce, reduce_scatter, all_to_all), what is sent (send), or what
    each holds in the end (all_gather). The roofline is what must pass a device's link, over its datasheet bandwidth.

    Raises
    ------
    InputError
        For an unknown kind, a device without a link, or more devices than the link connects.
    """
    if kind not in KINDS:
        raise unknown("collective", kind, KINDS)
    code = KINDS.index(kind)
    instance("hw", hw, HardwareProfile, "load_hardware")
    level_scale(level)
    given = {
        "payload_bytes": array("payload_bytes", payload_bytes, AMOUNT),
        "devices": array("devices", devices, COUNT),
    }
    payload, count = together(**given)
    link, busy, kinds = hw.link, count > 1, np.full(payload.shape, code)
    if link is None:
        if np.any(busy):
            raise InputError(f"{hw.name} has no link to other devices; expected 1 device, got {int(count.max())}")
        zero = np.zeros(payload.shape)
        sure = Uncertainty.of(
            "collective", {}, spread=(1.0, 1.0), local=0.0, own=0.0, place=np.zeros((payload.size, 3))
        )
        return OperatorTimes(zero, zero, zero, zero, np.full(payload.shape, _LINK, dtype=np.int8), uncertainty=sure)
    if np.any(count > link.max_devices):
        raise InputError(f"{hw.name}: its {link.kind} connects {link.max_devices} devices, got {int(count.max())}")
    r, count = _ready(hw), np.maximum(count, 2.0)
    parts = collective_core(kinds, payload, count, link.bandwidth_bytes_per_s, r.constants)
    place = collective_place(kinds, payload, count)
    seconds = parts.total if r.residual is None else parts.total * np.exp(r.residual(place))
    roofline = np.where(busy, least_wire(code, count, link.kind) * payload / link.bandwidth_bytes_per_s, 0.0)
    uncertainty = uncertainty_of(parts, place, link.family, r.spread, busy)
    ends = with_intervals(np.where(busy, seconds, 0.0), roofline, uncertainty, level, r.posterior)
    bound = np.where(parts.link > 0.5 * parts.total, _LINK, _LAUNCH).astype(np.int8)
    return OperatorTimes(*ends, roofline, bound, uncertainty=uncertainty)


def uncertainty_of(
    parts: CollectiveTime,
    place: tuple[FloatArray, FloatArray, FloatArray],
    family: str,
    spread: Spread = (SAME_STACK, 1.0),
    busy: Any = True,
) -> Uncertainty:
    """What times are unsure of, at places of :func:`collective_place`: launch, link, step; where the link is PCIe also
    whether devices reach each other's memory, and the octaves by which they may share one uplink ("topology")."""
    kind, devices, size = place
    total = parts.total
    shares = {"launch": parts.launch / total, "link": parts.link / total, "step": parts.step / total}
    if family == "pcie":
        shares["pcie"] = shares["link"] + 0.5 * shares["step"]
        shares["topology"] = (devices - 1.0) * shares["pcie"]
    shares = {name: np.where(busy, share, 0.0) for name, share in shares.items()}
    octaves = np.stack([size.ravel(), 2.0 * devices.ravel(), APART * kind.ravel()], axis=1)
    sure: Any = {"local": LOCAL * np.where(busy, 1.0, 0.0), "own": OWN**2 * np.where(busy, 1.0, 0.0)}
    return Uncertainty.of("collective", shares, spread=spread, **sure, place=octaves, kind=int(Kind.COLLECTIVE))
