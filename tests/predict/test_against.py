"""Pruned models against each other: intervals of the ratios of their speedups."""

from __future__ import annotations

import numpy as np
import pytest

import simulator
from simulator.predict.compare import Pairs, against, compare
from simulator.workload_batch import WorkloadBatch

FAMILIES = ("depth", "width", "dynamic_depth", "low_rank")


def stack_of(engine: str, *pruned: tuple[str, float]) -> WorkloadBatch:
    """A dense decode and its pruned versions."""
    dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="decode", batch=1, seq=1024, engine=engine)
    return WorkloadBatch.of([dense, *(simulator.prune(dense, family, sparsity=s) for family, s in pruned)])


@pytest.mark.parametrize("engine", ["reference", "vllm", "hf"])
def test_against_the_dense_model_is_the_speedup_and_turned_round_the_interval_is(engine: str) -> None:
    workloads, hw = stack_of(engine, *((family, 0.25) for family in FAMILIES)), simulator.load_hardware("a100")
    c, _ = compare(Pairs(workloads, np.zeros(len(workloads), dtype=np.intp)), hw)
    others = [np.full(len(workloads), i) for i in range(len(workloads))]
    log, below, above = against(workloads, hw, others)
    np.testing.assert_allclose(log[0], np.log(c.speedup), atol=1e-12)
    np.testing.assert_allclose(log[0] - below[0], np.log(c.lower), atol=1e-12)
    np.testing.assert_allclose(log[0] + above[0], np.log(c.upper), atol=1e-12)
    np.testing.assert_allclose(log, -log.T, atol=1e-12)
    np.testing.assert_allclose(below, above.T, atol=1e-9)
    np.testing.assert_allclose(np.diag(below), 0.0, atol=1e-9)


def test_what_two_pruned_models_have_in_common_cancels() -> None:
    """Under a scheduler that no pruning touches both speedups are unsure together."""
    workloads, hw = stack_of("vllm", ("depth", 0.5), ("width", 0.5)), simulator.load_hardware("h100")
    _, below, above = against(workloads, hw, [np.zeros(3, dtype=np.intp), np.array([0, 1, 1])])
    assert max(below[1, 2], above[1, 2]) < 0.7 * np.hypot(below[0, 1], above[0, 2])
