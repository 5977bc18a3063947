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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import FloatArray, IndexArray
from simulator.codes import ROLES, Kind
from simulator.errors import InputError, unknown
from simulator.operators.base import (
    AIC,
    BOTTLENECKS,
    Calls,
    Constant,
    Device,
    ErrorSize,
    Estimate,
    FittedValues,
    Formats,
    Link,
    Operator,
    ResidualGrid,
    Rows,
    joined,
)

# sources of the defaults of constants
_NCCL = (
    f"NCCL and engine all-reduce tables of {AIC} (a100_sxm, h100_sxm, h200_sxm, b200_sxm, l40s, "
    "rtx_pro_6000_server; 2, 4 and 8 devices)"
)
_HOST_MEMORY = (
    "NVIDIA/nccl issue 1639, https://github.com/NVIDIA/nccl/issues/1639 (RTX 5090 over PCIe 5 on"
    " two Xeon 8480+: 35 GB/s with 4 devices, 28 GB/s with 8)"
)
_PEERS = (
    "vLLM's all-reduce needs peer access,"
    " vllm/distributed/device_communicators/custom_all_reduce.py"
)

COLLECTIVE_CONSTANTS: Mapping[str, Constant] = MappingProxyType(
    {
        "t0_s": joined(
            "s",
            1e-7,
            1e-4,
            _NCCL,
            "start of a library's collective in a CUDA graph",
            pcie=4.0e-6,
            nvlink3=8.6e-6,
            nvlink4=4.5e-6,
            nvlink5=7.4e-6,
            other=5.5e-6,
        ),
        "hop_s": joined(
            "s",
            0.0,
            1e-4,
            _NCCL,
            "one of its synchronising steps; without a fit, the latency of the link",
            pcie=1.4e-6,
            other=9e-7,
        ),
        "e_link": joined(
            "1",
            0.01,
            1.0,
            f"{_NCCL}; pcie3 and pcie4: the L40S; pcie_host: {_HOST_MEMORY}",
            "share of the link's bandwidth in one direction of a large payload",
            pcie=0.57,
            pcie3=0.65,
            pcie4=0.65,
            pcie_host=0.5,
            nvlink3=0.75,
            nvlink4=0.78,
            nvlink5=0.74,
            other=0.77,
        ),
        "sharing": joined(
            "1",
            0.0,
            3.0,
            f"{_NCCL}; three hosts with PCIe have 0, 0.33 and 1.95",
            "power of 2 / devices by which bandwidth drops, as devices share it",
            pcie=0.5,
            other=0.0,
        ),
        "pipe_s": joined(
            "s",
            1e-8,
            1e-3,
            _NCCL,
            "times the transfer time, the square of the time to fill the pipeline",
            pcie=5.5e-6,
            nvlink3=3.2e-5,
            nvlink4=1.27e-5,
            nvlink5=2.1e-5,
            other=1.5e-5,
        ),
        "own_devices": joined(
            "1",
            0.0,
            1e5,
            f"{_NCCL}: two over PCIe, all over NVLink; pcie_host: {_PEERS}",
            "devices up to which the engine has its own all-reduce; 0: it has none",
            pcie=2.0,
            pcie_host=0.0,
            other=8.0,
        ),
        "own_bytes": joined(
            "B",
            0.0,
            1e12,
            _NCCL,
            "largest payload of the engine's all-reduce",
            pcie=6.7e7,
            nvlink3=8.39e6,
            other=1.68e7,
        ),
        "own_t0_s": joined(
            "s",
            1e-7,
            1e-4,
            _NCCL,
            "start of the engine's all-reduce",
            pcie=5.5e-6,
            nvlink3=4.6e-6,
            nvlink4=3e-6,
            nvlink5=5.1e-6,
            other=3.5e-6,
        ),
        "own_hop_s": joined(
            "s",
            0.0,
            1e-5,
            _NCCL,
            "further start time per device",
            pcie=0.0,
            nvlink3=1.25e-7,
            nvlink4=9.2e-8,
            nvlink5=1.06e-7,
            other=1.2e-7,
        ),
        "own_e": joined(
            "1",
            0.01,
            1.0,
            _NCCL,
            "share of the link's bandwidth that its reads achieve",
            pcie=0.59,
            nvlink3=0.56,
            nvlink4=0.65,
            nvlink5=0.5,
            other=0.65,
        ),
        "own_step_s": joined(
            "s",
            1e-8,
            1e-4,
            _NCCL,
            "its second synchronising step, if it needs two",
            pcie=6e-6,
            nvlink3=9e-6,
            nvlink4=5.8e-6,
            nvlink5=9.1e-6,
            other=6e-6,
        ),
    }
)
"""Constants with defaults by kind of link (:attr:`~simulator.operators.base.Link.defaults`),
instead of the architecture."""

COLLECTIVES: tuple[str, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
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

    def parts(self, c: Mapping[str, float]) -> tuple[FloatArray, FloatArray, FloatArray]:
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
        self, c: Mapping[str, float], wire: FloatArray, rate: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return the parts of the time of the engine's own all-reduce, in one shot or in two."""
        others = self.devices - 1.0
        one_shot, two_shot = others * self.payload / rate, wire / rate
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

    def estimate(self, c: Mapping[str, Any]) -> Estimate:
        """Return the cost. Over PCIe, hosts differ in bandwidth ("pcie"), devices may share one
        uplink ("topology"), and the connection may differ from the usual one unless the user named
        it ("unstated")."""
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
            loadings["topology"] = np.log2(0.5 * self.ports) * loadings["pcie"]
            loadings["unstated"] = float(not self.link.stated) * (1.0 - 0.5 * loadings["link"])
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


def least_wire(code: NDArray[Any], devices: FloatArray, link: Link) -> FloatArray:
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


def _either(first: NDArray[Any], one: Estimate, other: Estimate) -> Estimate:
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
    link, most = hw.link, int(count.max(initial=1.0))
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
    far = _over(link.beyond, hw.beyond(), payload, count, COLLECTIVES.index(kind))
    return _either(count <= link.max_devices, near, far)


def _over(link: Link, hw: Device, payload: FloatArray, count: FloatArray, code: int) -> Estimate:
    section, constants, residual = _ready(hw)
    link = replace(link, stated=link.stated or hw.own_link)
    e = Messages(
        np.full(payload.shape, code), payload, np.maximum(count, 2.0), link, count > 1
    ).estimate(constants)
    if section.status == "default" and link.connection in UNFITTED:
        e = replace(e, loadings={**e.loadings, "default": np.asarray(count > 1, dtype=np.float64)})
    return e.with_residual(None if residual is None else residual(e.position), section)


class Collective(Operator):
    """Exchanges between the devices that share a model; ``batch`` is their number, ``read_bytes``
    the payload."""

    code, name, sizes = int(Kind.COLLECTIVE), "collective", ("batch",)
    constants = MappingProxyType({"collective": COLLECTIVE_CONSTANTS})
    errors = MappingProxyType(
        {
            "collective": ErrorSize(
                0.10,
                0.08,
                factors={
                    "launch": 0.24,
                    "link": 0.08,
                    "step": 0.33,
                    "pcie": 0.4,
                    "topology": 0.6,
                    "unstated": 0.35,
                    "default": 0.3,
                },
            )
        }
    )

    def bytes(self, w: Rows) -> Any:
        return w.read_bytes + w.write_bytes

    def estimates(self, w: Rows, hw: Device, formats: Formats) -> Iterator[tuple[Any, Estimate]]:
        over = hw.over(w.table.meta.link)
        for role in np.unique(w.role).tolist():
            rows = np.flatnonzero(w.role == role)
            yield rows, collective(w.read_bytes[rows], w.batch[rows], over, kind=ROLES[role])
