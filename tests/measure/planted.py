"""A plan of forty GEMMs and its run on a replayed device, for the tests of the runner."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np

from calibration.devices.protocol import Operator
from calibration.devices.replay import ReplayDevice
from calibration.measure.plan import DRIFT_CHECK, MeasurementPlan, Rates, in_order
from calibration.measure.run import Outcome, run
from calibration.measure.timing import Protocol

RATES = Rates(1e14, 1.5e12, 3e-6)
SHAPES = [
    (m, n, 512)
    for m in (1, 16, 128, 1024)
    for n in (256, 1024, 4096, 8192, 16384, 2048, 3072, 5120, 6144, 7168)
]
MANY = [(m, 256, 512) for m in range(1, 201)]
PROTOCOL = Protocol(time_limit_s=0.5)


def plan_of(shapes: list[tuple[int, int, int]] = SHAPES, **changes: Any) -> MeasurementPlan:
    """A plan of these shapes, some of its fields changed."""
    gemms = [
        Operator("gemm", m=m, n=n, k=k)
        for m, n, k in np.random.default_rng(0).permutation(shapes).tolist()
    ]
    return replace(in_order(gemms, RATES, protocol=PROTOCOL), **changes)


def go(
    device: ReplayDevice, plan: MeasurementPlan | None = None, **options: Any
) -> tuple[Outcome, list[dict[str, Any]]]:
    """How a run of a plan ended, and the records it kept, as they would be read from a file."""
    kept: list[dict[str, Any]] = []
    keep = lambda record: kept.append(json.loads(json.dumps(record, allow_nan=False)))  # noqa: E731
    return run(plan or plan_of(), device, keep, protocol=PROTOCOL, **options), kept


def items(kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records except drift checks."""
    return [record for record in kept if record["purpose"] != DRIFT_CHECK]
