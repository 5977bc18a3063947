"""Intervals of the time to first token and per output token of a service, on published serving runs of dense models."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.evidence.published import serving_workload
from calibration.measurements import published
from simulator.models.library import load_model
from simulator.prediction.service import NO_LIMITS, ServePasses
from simulator.uncertainty.forward import forward_passes
from simulator.workload import WorkloadBatch

SOME = 90
"""Runs of each engine that are predicted, drawn by chance."""


@pytest.mark.parametrize("engine", ["vllm", "trtllm", "sglang"])
def test_more_than_eight_in_ten_published_first_tokens_lie_in_their_interval(engine: str) -> None:
    rows = [row for row in published("serving") if row["engine"] == engine and not row["left_out"]]
    rows = [row for row in rows if not load_model(row["model"]).experts]  # whose kernels are less certain
    inside = []
    for i in np.random.default_rng(0).choice(len(rows), SOME, replace=False).tolist():
        run = serving_workload(rows[i])
        if run is None:
            continue
        batch = WorkloadBatch.of([run[0]])
        waits = ServePasses(batch, forward_passes(batch, run[1]), 0.9, NO_LIMITS).waits
        ends = {name: (float(low[0]), float(high[0])) for name, (_, low, high) in waits.items()}
        inside.append([low <= float(rows[i][f"{name}_s"]) <= high for name, (low, high) in ends.items()])
    assert len(inside) > SOME / 2
    assert (np.mean(inside, axis=0) > (0.8, 0.85)).all()
