"""The figure of a service: its curves are the service's points, named and told apart without colour."""

from __future__ import annotations

import numpy as np
import pytest
from test_figures import check_print

from simulator import Scenario, serve
from simulator.errors import InputError
from simulator.figures.panels import services_of, throughput_of
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


def test_every_curve_has_its_name_beside_its_end_and_marks_of_its_own(services: tuple) -> None:
    figure = services_of(services)
    check_print(figure)
    assert [ax.get_title() for ax in figure.axes] == ["H100 SXM, vLLM", "H100 SXM, SGLang"]
    for ax, service in zip(figure.axes, services):
        names = [t for t in ax.texts if "(" in t.get_text()]
        assert sorted(t.get_text() for t in names) == sorted(
            f"{p.name} ({p.concurrency:,})" for p in service.kinds["equal memory"]
        )
        lines = [line for line in ax.lines if len(line.get_xdata()) > 2]
        looks = {(line.get_marker(), line.get_linestyle(), line.get_markerfacecolor()) for line in lines}
        assert len(looks) == len(lines) == len(names)
        assert any(t.get_text() == "limit 20 ms" for t in ax.texts)
    assert services_of(services[:1]).axes[0].get_title() == "Llama-3.1-8B, H100 SXM, vLLM"


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(InputError, match="throughput: expected one curve or more"):
        throughput_figure([])
