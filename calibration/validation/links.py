"""Evaluation of collectives on a system that was held out: constants from other systems, no residual.

Use :func:`evaluate_link`. A GPU of :data:`TABLES` is predicted from the fitted sections of the GPUs with the same
generation of link, else from those with the same family. Published rows of another laboratory (:data:`PUBLISHED_LINKS`)
are predicted from the defaults, which none of them were used for; below :data:`LEAST_BYTES` the overhead
of a call, about 40 us, is more than a third of a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from calibration.measurements import list_measurements, load_measurements, published
from simulator.arrays import FloatArray
from simulator.cost.collective import collective
from simulator.errors import unknown
from simulator.hardware.constants import COLLECTIVE_CONSTANTS
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.sections import Fitted, Section
from simulator.uncertainty.operators import OperatorTimes, operator_time
from simulator.workload import ROLES

TABLES: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "a100_sxm": ("a100_sxm_80gb", ("h100_sxm", "h200_sxm", "b200_sxm")),
        "h100_sxm": ("h100_sxm", ("h200_sxm",)),
        "h200_sxm": ("h200_sxm", ("h100_sxm",)),
        "b200_sxm": ("b200_sxm", ("a100_sxm_80gb", "h100_sxm", "h200_sxm")),
        "l40s": ("l40s", ("rtx_pro_6000",)),
        "rtx_pro_6000": ("rtx_pro_6000", ("l40s",)),
    }
)
"""System with shipped tables -> its profile, and the profiles whose fits predict it."""

PUBLISHED_LINKS: tuple[str, ...] = ("a100_dgx", "a100_pairwise_nvlink")
"""Systems of published rows: NVSwitch, and A100 joined in pairs."""

LEAST_BYTES = 1.6e7


def evaluate_link(system: str) -> dict[str, float]:
    """Return rows, median error, bias and coverage (percent, of 90 % intervals) on one held-out system.

    >>> evaluate_link("a100_pairwise_nvlink")["median"] < 25
    True
    """
    if system not in (*TABLES, *PUBLISHED_LINKS):
        raise unknown("system", system, (*TABLES, *PUBLISHED_LINKS))
    pairs = list(_published(system) if system in PUBLISHED_LINKS else _tables(system))
    measured = np.concatenate([seconds for _, seconds in pairs])
    predicted, lower, upper = (np.concatenate([getattr(t, n) for t, _ in pairs]) for n in ("seconds", "lower", "upper"))
    error = 100.0 * (predicted / measured - 1.0)
    return {
        "rows": float(len(measured)),
        "median": float(np.median(np.abs(error))),
        "bias": float(np.median(error)),
        "coverage": 100.0 * float(np.mean((lower <= measured) & (measured <= upper))),
    }


def _published(system: str) -> Iterator[tuple[OperatorTimes, FloatArray]]:
    rows = [r for r in published("collectives") if r["system"] == system and float(r["bytes"]) >= LEAST_BYTES]
    hw = _bare(load_hardware(rows[0]["hardware"]).over(rows[0]["link"]))
    payload, devices, seconds = (np.array([float(r[name]) for r in rows]) for name in ("bytes", "devices", "seconds"))
    yield operator_time(collective(payload, devices, hw), hw), seconds


def _tables(system: str) -> Iterator[tuple[OperatorTimes, FloatArray]]:
    name, others = TABLES[system]
    hw = load_hardware(name)
    assert hw.link is not None
    joined = _bare(hw.over(hw.link.name))
    hw = joined.calibrated({("collective", "*"): Section(_mean(others))}, "held out")
    for stack in ("sglang", "trtllm", "vllm", "nccl"):
        table = f"{system}/collective/{stack}"
        if table not in list_measurements():
            continue
        records = load_measurements(table)
        for role in np.unique(records.role):
            if stack == "nccl" and ROLES[role] == "all_reduce":
                continue  # engines run their own
            r = records.select(records.role == role)
            e = collective(r.n.astype(np.float64), r.batch.astype(np.float64), hw, kind=ROLES[role])
            yield operator_time(e, hw), r.seconds.astype(np.float64)


def _bare(hw: HardwareProfile) -> HardwareProfile:
    """Return a device without anything fitted."""
    return replace(hw, sections={}, stacks={}, stack="", stacks_of="")


def _mean(names: Sequence[str]) -> Mapping[str, Fitted]:
    """Return the mean of the fitted constants of some profiles over all stacks, geometric where all are above 0."""
    found = [
        section
        for name in names
        for sections in load_hardware(name).stacks.values()
        if (section := sections.get(("collective", "*"))) is not None and section.status == "calibrated"
    ]
    out = {}
    for key in COLLECTIVE_CONSTANTS:
        values = np.array([section[key] for section in found])
        one = float(np.exp(np.log(values).mean()) if values.min() > 0 else values.mean())
        out[key] = Fitted(float(np.median(values)) if key in ("own_devices", "own_bytes") else one)
    return out
