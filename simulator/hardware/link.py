"""Connections between devices: what joins them, and the names by which a user selects another one.

A profile states the usual connection of its GPU. :func:`named` returns another one for ``--link``.

=========== =========================================================================================================
name        connection
=========== =========================================================================================================
nvswitch    NVLink between all devices (SXM modules)
xgmi        Infinity Fabric, one link to each other device
bridge      NVLink bridges that join devices in pairs; more than two devices communicate over PCIe
pcie        PCIe with peer access: a device reads and writes the memory of another
pcie-host   PCIe without peer access: all data pass through host memory
=========== =========================================================================================================

PCIe names may have a generation and lanes: pcie3, pcie4x8, pcie5-host. The default is the GPU's own, with 16 lanes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from simulator.errors import InputError, unknown
from simulator.names import CONNECTIONS, PCIE
from simulator.operators.base import Link

LANE_BYTES_PER_S: Mapping[int, float] = MappingProxyType({3: 1e9, 4: 2e9, 5: 4e9, 6: 8e9})
"""Rate of a PCIe lane in one direction by generation, B/s, as datasheets round it."""

GENERATIONS: Mapping[str, int] = MappingProxyType({"volta": 3, "turing": 3, "ampere": 4, "ada": 4})
"""PCIe generation of GPUs by architecture; 5 for all others."""

PEER_LATENCY_S, HOST_LATENCY_S = 1.6e-6, 3e-6
"""Time of one message step over PCIe, s: with peer access that of an L40S (NCCL table of aiconfigurator-core 0.12.0);
without it, 42 us of a small all-reduce on eight RTX 4090 over its 14 ring steps
(https://github.com/NVIDIA/nccl/issues/1530)."""


def named(name: str, link: Link | None, bridge: Link | None, architecture: str, device: str) -> Link:
    """Return a connection of a GPU by its name; InputError for NVLink that the GPU does not have."""
    if link is not None and name in (link.connection, link.name):
        return replace(link, stated=True)
    if bridge is not None and name == "bridge":
        return replace(joined(bridge, link, architecture), stated=True)
    if found := PCIE.fullmatch(name):
        return replace(_pcie(found, link, architecture), stated=True)
    if name not in CONNECTIONS:
        raise unknown("link", name, CONNECTIONS)
    known = ", ".join(choices(link, bridge))
    raise InputError(f"link {name}: {device} has no such connection; expected one of {known}")


def choices(link: Link | None, bridge: Link | None) -> tuple[str, ...]:
    """Return the names of connections that :func:`named` accepts for a GPU, the usual one first."""
    found = [*([link.connection] if link else []), *(["bridge"] if bridge else []), "pcie", "pcie-host"]
    return tuple(dict.fromkeys(found))


def joined(bridge: Link, link: Link | None, architecture: str) -> Link:
    """Return bridges between pairs, with the PCIe link of the GPU beyond."""
    pcie = link if link and link.family == "pcie" else _pcie(PCIE.fullmatch("pcie"), link, architecture)
    return replace(bridge, connection="bridge", max_devices=2, beyond=replace(pcie, group=2))


def _pcie(name: re.Match[str] | None, link: Link | None, architecture: str) -> Link:
    parts = name.groupdict() if name else {}
    generation = int(parts.get("generation") or 0)
    own = link if link and link.family == "pcie" else None
    if not generation:
        generation = int(own.kind[-1]) if own and own.kind[-1].isdigit() else GENERATIONS.get(architecture, 5)
    lanes, host = int(parts.get("lanes") or 16), bool(parts.get("host"))
    return Link(
        f"pcie{generation}",
        lanes * LANE_BYTES_PER_S[generation],
        HOST_LATENCY_S if host else PEER_LATENCY_S,
        link.most_devices if link else 8,
        "pcie-host" if host else "pcie",
    )
