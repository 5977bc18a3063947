"""The figure of a service: its curves are the service's points, named and told apart without colour."""

from __future__ import annotations

import numpy as np
import pytest

from simulator import Scenario, serve
from simulator.errors import InputError
from simulator.figures.panels import throughput_of
from simulator.figures.throughput import throughput_figure

pytestmark = pytest.mark.quick
PRUNE = ["width 0.25", "depth 0.25", "depth 0.5", "kv_cache 0.5"]


@pytest.fixture(scope="module")
def services() -> tuple:
    scenario = Scenario(new_tokens=256)
    found = serve("llama-3.1-8b", "h100", prune=PRUNE, engine=["vllm", "sglang"], tpot_s=0.02, scenario=scenario)
    return found.services


def test_curves_are_the_points_of_the_service(services: tuple) -> None:
    panel = throughput_of(services[0], "title")
    assert [c.name for c in panel.curves] == ["dense", *(p.pruning for p in services[0].points[1:5])]
    for curve, full, kept in zip(panel.curves, services[0].kinds["equal memory"], services[0].kinds["within limits"]):
        assert (curve.largest, curve.ms[0, -1]) == (full.concurrency, pytest.approx(1e3 * full.tpot_s))
        assert curve.tokens_per_s[:, -1] == pytest.approx(
            [full.tokens_per_s, full.tokens_per_s_lower, full.tokens_per_s_upper]
        )
        assert curve.within == (kept.tpot_s, kept.tokens_per_s)
        assert (np.diff(curve.ms[0]) > 0).all()


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(InputError, match="throughput: expected one curve or more"):
        throughput_figure([])
