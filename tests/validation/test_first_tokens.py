"""Intervals of the time to first token and per output token of a service, on published serving runs."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.measurements import published
from calibration.validation.published import serving_workload
from simulator.prediction.concurrency import NO_LIMITS, ServePasses
from simulator.uncertainty.forward import forward_passes
from simulator.workload_batch import WorkloadBatch

EVERY = 8
"""One in so many runs is predicted."""

LEAST = {"vllm": (0.85, 0.9), "trtllm": (0.8, 0.85), "sglang": (0.7, 0.85)}
"""Least share of first tokens and of further tokens in their 90 % interval."""


@pytest.mark.parametrize("engine", LEAST)
def test_most_published_times_lie_in_their_interval(engine: str) -> None:
    inside = []
    for row in [row for row in published("serving") if row["engine"] == engine and not row["left_out"]][::EVERY]:
        run = serving_workload(row)
        if run is None:
            continue
        batch = WorkloadBatch.of([run[0]])
        waits = ServePasses(batch, forward_passes(batch, run[1]), 0.9, NO_LIMITS).waits
        ends = {name: (float(low[0]), float(high[0])) for name, (_, low, high) in waits.items()}
        inside.append([low <= float(row[f"{name}_s"]) <= high for name, (low, high) in ends.items()])
    assert len(inside) > 15
    assert (np.mean(inside, axis=0) >= LEAST[engine]).all()
