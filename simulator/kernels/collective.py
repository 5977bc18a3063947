"""Collectives between devices: alpha-beta over the profile's link. What to use: :func:`collective_time`.

An all-reduce takes the better of two algorithms, as inference engines do: one-shot (every device reads everything from
all others) for small payloads, reduce-scatter plus all-gather (two steps, 2 (n-1)/n of the payload on the wire) for
large ones.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.errors import InputError, unknown
from simulator.hardware.constants import COLLECTIVE_CONSTANTS
from simulator.kernels.intervals import BOUNDS, OpTime

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

KINDS: tuple[str, ...] = ("all_reduce", "send", "all_gather")

_LINK, _LAUNCH = BOUNDS.index("link"), BOUNDS.index("launch")


def collective_time(payload_bytes: Any, devices: Any, hw: HardwareProfile, *, kind: str = "all_reduce") -> OpTime:
    """Time of a collective of one of :data:`KINDS` among ``devices``, at least 1 (1: nothing happens, 0 s).

    The payload is what each device holds (all_reduce), what is sent (send), or what each holds in the end (all_gather).

    Raises
    ------
    InputError
        For an unknown kind, a device without a link, or more devices than the link connects.
    """
    if kind not in KINDS:
        raise unknown("collective", kind, KINDS)
    payload, count = (a.astype(np.float64) for a in np.broadcast_arrays(payload_bytes, devices))
    link = hw.link
    if link is None:
        if np.any(count > 1):
            raise InputError(f"{hw.name} has no link to other devices; expected 1 device, got {int(count.max())}")
        zero = np.zeros(payload.shape)
        return OpTime(zero, zero, zero, zero, np.full(payload.shape, _LINK, dtype=np.int8))
    if np.any(count > link.max_devices):
        raise InputError(f"{hw.name}: its {link.kind} connects {link.max_devices} devices, got {int(count.max())}")
    c = {name: constant.default(hw.architecture) for name, constant in COLLECTIVE_CONSTANTS.items()}
    others = np.maximum(count - 1.0, 0.0)
    share = others / np.maximum(count, 1.0)  # of the payload that a device must receive
    rate, hops = np.full(count.shape, c["e_link"] * link.bandwidth_bytes_per_s), np.ones(count.shape)
    if "nvlink" not in link.kind.lower():
        rate, hops = rate * (2.0 / np.maximum(count, 2.0)) ** c["pcie_sharing"], np.maximum(others, 1.0)
    step = max(c["step_s"], link.latency_s)
    # of each kind what is on the wire, and the time to move it
    wire = {"all_reduce": 2.0 * share * payload, "all_gather": share * payload, "send": payload}[kind]
    moved = wire / rate + step * {"all_reduce": 2.0 * hops, "all_gather": hops, "send": np.ones(count.shape)}[kind]
    if kind == "all_reduce":
        moved = np.minimum(others * payload / rate + step, moved)
    busy = count > 1
    seconds = np.where(busy, c["t0_s"] + moved, 0.0)
    roofline = np.where(busy, wire / link.bandwidth_bytes_per_s, 0.0)
    low, high = (math.exp(sign * math.log(c["spread"])) for sign in (-1, 1))
    bound = np.where(seconds > 2.0 * (c["t0_s"] + step), _LINK, _LAUNCH).astype(np.int8)
    return OpTime(seconds, np.maximum(seconds * low, roofline), seconds * high, roofline, bound)
