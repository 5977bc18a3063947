"""The figure of a plan: a bar or a mark per sublayer, plans where they are, and no two texts on top
of each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from printing import check_print
from shaped import cut, layer

from simulator.figures.plan import kept, plan_figure
from simulator.plans.search import Plan, search
from simulator.plans.solve import Targets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL, LAYERS = "llama-3.2-1b", 16
VARIANTS = {
    **{
        ("dense", "dense"): 0.0,
        ("kv=4", "dense"): 0.05,
        ("none", "dense"): 0.3,
        ("linear", "dense"): 0.15,
    },
    **{("dense", "4096"): 0.08, ("dense", "linear"): 0.3, ("dense", "none"): 0.5},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep layers matter less."""
    lines, path = ["layer,attention,mlp,kl"], tmp_path_factory.mktemp("plan") / "scores.csv"
    for number in range(LAYERS):
        for (attention, mlp), score in VARIANTS.items():
            lines.append(f"{number},{attention},{mlp},{score * (1.5 - number / LAYERS):.6g}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def plan(library: Path) -> Plan:
    return search(MODEL, "h100", 1.55, library, phase="prefill", batch=4)


def panel(figure: Figure, name: str) -> Any:
    return next(ax for ax in figure.axes if ax.get_label() == name)


def legend(figure: Figure) -> list[str]:
    return [
        t.get_text().replace("\n", " ") for t in panel(figure, "legend").get_legend().get_texts()
    ]


@pytest.mark.parametrize("sublayer", ["attention", "mlp"])
def test_each_sublayer_has_the_bar_or_the_mark_of_its_variant(plan: Plan, sublayer: str) -> None:
    texts = {row.layer: getattr(row, sublayer) for row in plan.layers}
    assert len(set(texts.values())) > 1
    ax, looks = (
        panel(plan_figure(plan), sublayer),
        {"dense": "unchanged", "none": "removed", "linear": "linear"},
    )
    found = {
        c.get_label(): {round(b.get_x() + 0.4): b.get_height() for b in c.patches}
        for c in ax.containers
    }
    (marks,) = (line for line in ax.lines if line.get_label() == "removed")
    found["removed"] = dict.fromkeys(map(int, marks.get_xdata()), 0.0)
    assert list(found.pop("dense")) == list(range(LAYERS))
    for name, layers in found.items():
        assert sorted(layers) == [
            i for i, text in texts.items() if looks.get(text, "smaller") == name
        ]
    assert set(found["smaller"].values()) <= {0.5}


def test_the_chosen_plan_and_the_frontier_are_where_they_are(plan: Plan) -> None:
    figure = plan_figure(plan)
    ax, losses = panel(figure, "frontier"), panel(figure, "loss")
    assert [bar.get_height() for bar in losses.containers[0]] == pytest.approx(
        [row.score for row in plan.layers]
    )
    assert [t.get_text() for t in losses.texts] == ["kl of each layer"]
    lines = {line.get_label().replace("\n", " "): line for line in ax.lines}
    (chosen,) = (point for point in plan.frontier if point.chosen)
    name = (
        f"chosen plan, {chosen.speedup:.2f}×"
        f" ({chosen.speedup_lower:.2f}–{chosen.speedup_upper:.2f})"
    )
    assert lines[name].get_xydata().tolist() == [[chosen.score, chosen.speedup]]
    assert np.allclose(lines["target: speedup 1.55x"].get_ydata(), 1.55)
    shown = next(
        line for label, line in lines.items() if label.startswith("plans of least loss")
    ).get_xydata()
    assert len(shown) + sum(p.score > shown[:, 0].max() for p in plan.frontier) == len(
        plan.frontier
    )


def test_targets_of_other_settings_and_of_memory_have_no_line(library: Path) -> None:
    targets = Targets(speedup=1.3, latency_s=0.02, memory_bytes=20e9, confidence=0.8)
    figure = plan_figure(
        search(MODEL, ["h100", "a100"], targets, library, phase="prefill", batch=4)
    )
    check_print(figure)
    assert (
        panel(figure, "frontier").get_title()
        == "H100 SXM, vLLM, prefill, batch 4, seq 2048\n(first of 2 settings)"
    )
    names = [name.split(" (")[0] for name in legend(figure) if name.startswith("target")]
    assert names == ["target: speedup 1.30x", "target: latency 20.0 ms"]


def test_other_plans_are_printed_without_clashes(plan: Plan) -> None:
    check_print(plan_figure(plan))
    steep = tuple(
        replace(row, score=5000.0 if row.layer == 3 else row.score) for row in plan.layers
    )
    far = tuple(
        replace(p, score=p.score if p.chosen or not p.score else 1e3 * p.score)
        for p in plan.frontier
    )
    figure = plan_figure(replace(plan, layers=steep, frontier=far))
    check_print(figure)
    assert panel(figure, "loss").get_yscale() == "symlog"
    assert any("more, up to a loss of" in name for name in legend(figure))
    # better than the dense model
    none = tuple(replace(p, score=-0.4) if p.chosen else p for p in plan.frontier)
    check_print(plan_figure(replace(plan, frontier=none)))


@pytest.mark.quick
def test_shares_of_experts_and_heads() -> None:
    dense = layer(32, 8, experts={"experts": 8, "active": 2.0, "inner": 14336})
    assert kept("mlp", cut(dense, "mlp", experts=4, inner=7168), dense) == 0.25
    assert kept("attention", cut(dense, "attention", heads=8, kv_heads=8), dense) == 0.25
    assert kept("mlp", layer(inner=512), layer(inner=2048)) == 0.25
