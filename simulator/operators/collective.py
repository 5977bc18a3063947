"""Collectives between devices: alpha-beta over the link that joins them.

The time of the library's algorithm (NCCL's ring) has four parts: a start, a hop for each
synchronising step, the transfer, and a ramp, because a payload in chunks fills and drains a
pipeline. The ramp is at best twice the root of step time times transfer time. Within one host,
NCCL's tree is a chain with as many steps (NCCL, src/graph/tuning.cc), so it is not modelled. Where
devices see each other's memory, engines have their own all-reduce for small payloads: one-shot
(each device reads the payloads of all others) or two-shot (reduce-scatter, then all-gather). The
fastest is used. A ring over NVLink bridges crosses PCIe once per pair and direction, at the rate of
PCIe.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from simulator.arrays import Array, FloatArray, IndexArray
from simulator.codes import ROLES, Kind
from simulator.errors import InputError, unknown
from simulator.operators.base import (
    BOTTLENECKS,
    Calls,
    Device,
    Estimate,
    Estimates,
    FittedValues,
    Formats,
    Link,
    Operator,
    ResidualGrid,
    Rows,
    RowValues,
    Values,
    read_constants,
)

_CONSTANTS, _ERRORS = read_constants("collective")
COLLECTIVE_CONSTANTS = _CONSTANTS["collective"]
"""Constants with defaults by kind of link (:attr:`~simulator.operators.base.Link.defaults`),
instead of the architecture."""

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
"""Roles of collectives; the index is the code, also in the residual grid of a profile."""

UNFITTED = ("xgmi", "pcie-host")
"""Connections without a fitted table."""

APART = 8.0
"""Octaves between two collectives: far enough for uncorrelated errors."""

_LINK, _LAUNCH = map(BOTTLENECKS.index, ("link", "launch"))


@dataclass(frozen=True)
class Messages(Calls):
    """Collectives over one link: index into :data:`COLLECTIVES`, payload (bytes), devices (at least
    2)."""

    operator = "collective"
    code: IndexArray
    payload: FloatArray
    devices: FloatArray
    link: Link
    active: Any = True  # False for a single device

    def parts(self, c: Values) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return the parts of the time, s: launch, transfer and ramp."""
        others = self.devices - 1.0
        share = others / self.devices  # share of the payload that a device must receive
        one = np.ones_like(others)
        wire = np.choose(self.code, [2.0 * share, share, share, share, one]) * self.payload
        hops = np.choose(
            self.code, [2.0 * others, others, others, 1.0 + np.log2(self.devices), one]
        )
        # devices behind one PCIe switch share its uplink
        rate = self.bandwidth_bytes_per_s / (0.5 * self.ports) ** c["sharing"]
        moved = wire / (c["e_link"] * rate)
        library = c["t0_s"] + c["hop_s"] * hops, moved, np.sqrt(c["pipe_s"] * moved)
        engine = self._engine_parts(c, wire, c["own_e"] * rate)
        chosen = (
            (self.code == 0) & (self.devices <= c["own_devices"]) & (self.payload <= c["own_bytes"])
        )
        chosen &= engine[0] + engine[1] + engine[2] < library[0] + library[1] + library[2]
        launch, moved, step = (np.where(chosen, *pair) for pair in zip(engine, library))
        return launch, moved, step

    def _engine_parts(
        self, c: Values, wire: FloatArray, rate: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return the parts of the time of the engine's own all-reduce, in one shot or in two."""
        others = self.devices - 1.0
        one_shot = others * self.payload / rate
        two_shot = wire / rate
        once = one_shot < two_shot + c["own_step_s"]
        return (
            c["own_t0_s"] + c["own_hop_s"] * others,
            np.where(once, one_shot, two_shot),
            np.where(once, 0.0, c["own_step_s"]),
        )

    @property
    def ports(self) -> FloatArray:
        """Ports of the link in a ring, at least 2."""
        return np.maximum(self.devices / self.link.group, 2.0)

    @property
    def bandwidth_bytes_per_s(self) -> Any:
        """Bandwidth of a device in one direction; in a mesh, that of its links to the other
        devices."""
        full = self.link.bandwidth_bytes_per_s
        if self.link.connection != "xgmi":
            return full
        return full * (self.devices - 1.0) / (self.link.max_devices - 1.0)

    def estimate(self, c: RowValues) -> Estimate:
        """Return the cost. Over PCIe, hosts differ in bandwidth ("pcie") and in how it falls with
        the devices ("topology"), far more if every message passes the host's memory
        ("staged")."""
        launch, link, step = self.parts(c)
        total = launch + link + step
        loadings = {"launch": launch / total, "link": link / total, "step": step / total}
        position = (
            self.code.astype(np.float64),
            np.log2(self.devices),
            np.log2(np.maximum(self.payload, 1.0)),
        )
        kind, devices, size = position
        if self.link.family == "pcie":
            loadings["pcie"] = loadings["link"] + 0.5 * loadings["step"]
            doublings = np.log2(0.5 * self.ports)
            loadings["topology"] = doublings * loadings["pcie"]
            if self.link.connection == "pcie-host":
                loadings["staged"] = (0.5 + doublings) * loadings["pcie"]
        roofline = (
            least_wire(self.code, self.devices, self.link)
            * self.payload
            / self.bandwidth_bytes_per_s
        )
        roofline = np.where(self.active, roofline, 0.0)
        return Estimate(
            operator="collective",
            kind=int(Kind.COLLECTIVE),
            time=np.where(self.active, total, 0.0),
            floor=roofline,
            roofline=roofline,
            bottleneck=np.where(link > 0.5 * total, _LINK, _LAUNCH).astype(np.int8),
            loadings={
                name: np.where(self.active, loading, 0.0) for name, loading in loadings.items()
            },
            coordinates=np.stack(
                [size.ravel(), 2.0 * devices.ravel(), APART * kind.ravel()], axis=1
            ),
            position=position,
            active=np.where(self.active, 1.0, 0.0),
        )


def least_wire(code: Array, devices: FloatArray, link: Link) -> FloatArray:
    """Return the least number of payloads over a device's link. Switches of NVLink 4 and later
    compute sums, so an all-reduce sends and receives each payload once."""
    share = 1.0 - 1.0 / devices
    adds = link.connection == "nvswitch" and not link.kind.lower().startswith(
        ("nvlink1", "nvlink2", "nvlink3")
    )
    reduce = np.ones_like(share) if adds else 2.0 * share
    return np.where(code == 0, reduce, np.where(code == COLLECTIVES.index("send"), 1.0, share))


@lru_cache(maxsize=128)
def _ready(hw: Device) -> tuple[FittedValues, dict[str, float], ResidualGrid | None]:
    section = hw.section("collective", "*")
    constants = {name: section[name] for name in COLLECTIVE_CONSTANTS}
    if hw.link is not None and section.constants["hop_s"].status == "default":
        constants["hop_s"] = hw.link.latency_s
    return section, constants, ResidualGrid.from_arrays(section.arrays)


def _either(first: Array, one: Estimate, other: Estimate) -> Estimate:
    """Return estimate ``one`` where ``first`` is true, else the other."""
    names = dict.fromkeys((*one.loadings, *other.loadings))
    parts = {
        n: (getattr(one, n), getattr(other, n)) for n in ("time", "floor", "roofline", "bottleneck")
    }
    chosen = {name: np.where(first, *both) for name, both in parts.items()}
    loadings = {
        name: np.where(first, one.loadings.get(name, 0.0), other.loadings.get(name, 0.0))
        for name in names
    }
    return replace(one, **chosen, loadings=loadings)


def collective(
    payload_bytes: Any, devices: Any, hw: Device, *, kind: str = "all_reduce"
) -> Estimate:
    """Return the cost of a collective of :data:`COLLECTIVES` among ``devices`` (1: 0 s).

    The payload is the input of each device (all_reduce, reduce_scatter, all_to_all), the output of
    each device (all_gather), or the message (send). The roofline is the least traffic over the
    link's datasheet bandwidth. InputError for a device without a link, or more devices than the
    link connects."""
    if kind not in COLLECTIVES:
        raise unknown("collective", kind, COLLECTIVES)
    arrays = np.broadcast_arrays(payload_bytes, devices)
    payload, count = (np.asarray(a, dtype=np.float64) for a in arrays)
    link = hw.link
    most = int(count.max(initial=1.0))
    if link is None:
        if most > 1:
            raise InputError(
                f"{hw.name} has no link to other devices; expected 1 device, got {most}"
            )
        link = Link("none", 1.0, 0.0, 1)  # unused: one device sends nothing
    elif most > link.most_devices:
        raise InputError(
            f"{hw.name}: its {link.kind} connects {link.most_devices} devices, got {most}"
        )
    near = _over(link, hw, payload, count, COLLECTIVES.index(kind))
    if link.beyond is None or most <= link.max_devices:
        return near
    far = _over(link.beyond, hw.beyond, payload, count, COLLECTIVES.index(kind))
    return _either(count <= link.max_devices, near, far)


def _over(link: Link, hw: Device, payload: FloatArray, count: FloatArray, code: int) -> Estimate:
    """Return the cost over one link. Unless the user named the link or measured over it, the
    devices may be connected in another way ("unstated")."""
    section, constants, residual = _ready(hw)
    several = np.asarray(count > 1, dtype=np.float64)
    e = Messages(
        np.full(payload.shape, code), payload, np.maximum(count, 2.0), link, count > 1
    ).estimate(constants)
    loadings = dict(e.loadings)
    if section.status == "default" and link.connection in UNFITTED:
        loadings["default"] = several
    if link.family == "pcie" and not (link.stated or hw.own_link):
        # other paths over PCIe have similar rates of large payloads, NVLink bridges do not
        loadings["unstated"] = several - (0.0 if hw.bridge else 0.8 * e.loadings["link"])
    return replace(e, loadings=loadings).on_grid(residual, section)


class Collective(Operator):
    """Exchanges between the devices that share a model; ``batch`` is their number, ``read_bytes``
    the payload."""

    code = int(Kind.COLLECTIVE)
    name = "collective"
    sizes = ("batch",)
    constants = _CONSTANTS
    errors = _ERRORS

    def estimates(self, w: Rows, hw: Device, formats: Formats) -> Estimates:
        over = hw.over(w.table.meta.link)
        for role in np.unique(w.role).tolist():
            rows = np.flatnonzero(w.role == role)
            yield rows, collective(w.read_bytes[rows], w.batch[rows], over, kind=ROLES[role])
