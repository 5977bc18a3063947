"""The figure of a plan: a bar or a mark per sublayer, plans where they are, and no two texts on top of each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from test_figures import check_print

from simulator.cli import run
from simulator.figures.plan import kept, plan_figure
from simulator.models.block import Block
from simulator.plans.search import Plan, search
from simulator.plans.solve import Targets
from simulator.plans.variants import joined, variant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL, LAYERS = "llama-3.2-1b", 16
VARIANTS = {
    ("dense", "dense"): 0.0,
    ("kv=4", "dense"): 0.05,
    ("none", "dense"): 0.3,
    ("linear", "dense"): 0.15,
    ("dense", "4096"): 0.08,
    ("dense", "linear"): 0.3,
    ("dense", "none"): 0.5,
}


def write(path: Path, first: float = 1.0) -> Path:
    """Write a library: deep layers matter less, except that scores of the first layer are ``first`` times larger; it
    also has times that rank as no device does."""
    lines = ["layer,attention,mlp,kl,runtime_ms"]
    for layer in range(LAYERS):
        scale = (1.5 - layer / LAYERS) * (1.0 if layer else first)
        for i, ((attention, mlp), score) in enumerate(VARIANTS.items()):
            lines.append(f"{layer},{attention},{mlp},{score * scale:.6g},{2.0 - 0.1 * i:.6g}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plan") / "scores.csv")


@pytest.fixture(scope="module")
def plan(library: Path) -> Plan:
    return search(MODEL, "h100", 1.6, library, phase="prefill", batch=4)


@pytest.fixture(scope="module")
def figure(plan: Plan) -> Figure:
    return plan_figure(plan)


def panel(figure: Figure, name: str) -> Any:
    return next(ax for ax in figure.axes if ax.get_label() == name)


def drawn(ax: Any) -> dict[str, dict[int, float]]:
    """Heights of bars by layer, by the label of their container; marks have height 0."""
    found = {
        c.get_label(): {round(b.get_x() + 0.5 * b.get_width()): b.get_height() for b in c.patches}
        for c in ax.containers
    }
    (marks,) = (line for line in ax.lines if line.get_label() == "removed")
    return found | {"removed": dict.fromkeys(map(int, marks.get_xdata()), 0.0)}


@pytest.mark.parametrize("sublayer", ["attention", "mlp"])
def test_each_sublayer_has_the_bar_or_the_mark_of_its_variant(plan: Plan, figure: Figure, sublayer: str) -> None:
    texts = {row.layer: getattr(row, sublayer) for row in plan.layers}
    assert len(set(texts.values())) > 1
    found, looks = drawn(panel(figure, sublayer)), {"dense": "unchanged", "none": "removed", "linear": "linear"}
    assert list(found.pop("dense")) == list(range(LAYERS))
    for name, layers in found.items():
        assert sorted(layers) == [i for i, text in texts.items() if looks.get(text, "smaller") == name]
    shares = {"kv=4": 0.5, "4096": 0.5}
    assert found["smaller"] == {i: pytest.approx(shares[t]) for i, t in texts.items() if t in shares}


def test_every_kind_of_variant_has_a_look_of_its_own(plan: Plan) -> None:
    dense = plan.dense.usual
    attention, mlp = ["dense", "kv=4", "heads=8 kv=8", "linear", "none"], ["none", "dense", "2048", "linear", "dense"]
    blocks = [joined(variant("attention", a, dense), variant("mlp", m, dense)) for a, m in zip(attention, mlp)]
    layers = [replace(plan.layers[i], attention=a, mlp=m) for i, (a, m) in enumerate(zip(attention, mlp))]
    blocks += [dense] * (LAYERS - len(blocks))
    layers += [replace(row, attention="dense", mlp="dense") for row in plan.layers[len(layers) :]]
    figure = plan_figure(replace(plan, layers=tuple(layers), pruned=replace(plan.pruned, blocks=tuple(blocks))))
    found = drawn(panel(figure, "attention"))
    assert (found["smaller"], list(found["linear"]), list(found["removed"])) == ({1: 0.5, 2: 0.25}, [3], [4])
    found = drawn(panel(figure, "mlp"))
    assert (found["smaller"], list(found["linear"]), list(found["removed"])) == ({2: 0.25}, [3], [0])
    (hatched,) = next(c for c in panel(figure, "mlp").containers if c.get_label() == "linear")
    assert hatched.get_hatch()


def test_losses_of_layers_are_bars_on_an_axis_that_names_the_metric(plan: Plan, figure: Figure) -> None:
    ax = panel(figure, "loss")
    (bars,) = ax.containers
    assert [bar.get_height() for bar in bars] == pytest.approx([row.score for row in plan.layers])
    assert [t.get_text() for t in ax.texts] == ["kl of each layer"]


def test_the_chosen_plan_and_those_of_other_rules_are_where_they_are(plan: Plan, figure: Figure) -> None:
    ax = panel(figure, "frontier")
    lines = {line.get_label(): line for line in ax.lines}
    (chosen,) = (point for point in plan.frontier if point.chosen)
    assert lines["chosen plan"].get_xydata().tolist() == [[chosen.score, chosen.speedup]]
    frontier = sorted((point.speedup, point.score) for point in plan.frontier)
    assert lines["frontier"].get_xydata().tolist() == [[score, speedup] for speedup, score in frontier]
    others = [a for a in plan.alternatives if a.point.score != chosen.score]
    names = {"same": "as many", "targets": "until targets are met"}
    assert {a.chosen_by for a in others} == {"parameters", "FLOPs", "library times"}
    looks = set()
    for a in others:
        line = lines[f"by {a.chosen_by}, {names[a.budget]}"]
        assert line.get_xydata().tolist() == [[a.point.score, a.point.speedup]]
        assert (line.get_markerfacecolor() == "white") == (a.budget == "same")
        looks.add((line.get_marker(), line.get_markerfacecolor() == "white"))
    assert len(looks) == len(others)  # apart in grey print too
    interval = f"({chosen.speedup_lower:.2f}–{chosen.speedup_upper:.2f})"
    texts = [t.get_text() for t in ax.texts]
    assert "target 1.60×" in texts
    assert any(interval in text for text in texts)
    assert any(np.allclose(line.get_ydata(), 1.6) for line in ax.lines)


def test_targets_of_other_settings_and_of_memory_have_no_line(library: Path) -> None:
    targets = Targets(speedup=1.3, latency_s=0.02, memory_bytes=20e9, confidence=0.8)
    found = search(MODEL, ["h100", "a100"], targets, library, phase="prefill", batch=4)
    figure = plan_figure(found)
    check_print(figure)
    ax = panel(figure, "frontier")
    assert ax.get_title().startswith("H100 SXM, vLLM")
    assert ax.get_title().endswith("(first of 2 settings)")
    texts = [t.get_text() for t in ax.texts]
    assert "target 1.30×" in texts
    assert "latency 20.0 ms" in texts
    dashed = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    first = found.results[0]
    assert sorted(dashed) == pytest.approx(sorted([1.3, first.dense_s / 0.02]), rel=1e-6)
    legend = [t.get_text() for t in panel(figure, "legend").get_legend().get_texts()]
    assert "target (probability 80 %)" in legend


def test_a_plan_of_whole_layers_needs_no_scores_and_names_the_rules_that_choose_it_too() -> None:
    plan = search("llama-2-7b", "h100", 1.3, batch=8)
    figure = plan_figure(plan)
    check_print(figure)
    removed = [row.layer for row in plan.layers if row.attention == "none"]
    assert all(sorted(drawn(panel(figure, name))["removed"]) == removed for name in ("attention", "mlp"))
    first = panel(figure, "legend").get_legend().get_texts()[0].get_text()
    assert first.replace("\n", " ") == "chosen plan, also by parameters; by FLOPs"


def test_losses_over_many_decades_bend_the_axes(plan: Plan) -> None:
    points = [replace(a, point=replace(a.point, score=900.0)) for a in plan.alternatives]
    layers = tuple(replace(row, score=500.0 if row.layer == 3 else row.score) for row in plan.layers)
    figure = plan_figure(replace(plan, alternatives=tuple(points), layers=layers))
    check_print(figure)
    ax = panel(figure, "frontier")
    assert ax.get_xscale() == panel(figure, "loss").get_yscale() == "symlog"
    assert "then logarithmic" in ax.get_xlabel().replace("\n", " ")
    assert "then logarithmic" in panel(figure, "loss").texts[0].get_text()
    linear = plan_figure(plan)
    assert panel(linear, "frontier").get_xscale() == panel(linear, "loss").get_yscale() == "linear"


def test_plans_far_from_the_chosen_one_are_counted_not_drawn(tmp_path: Path) -> None:
    plan = search(MODEL, "h100", 1.2, write(tmp_path / "x.csv", first=1e4), phase="prefill", batch=4)
    figure = plan_figure(plan)
    check_print(figure)
    (right,) = panel(figure, "frontier").get_xlim()[1:]
    outside = [point for point in plan.frontier if point.score > right]
    names = [t.get_text().replace("\n", " ") for t in panel(figure, "legend").get_legend().get_texts()]
    assert outside
    assert any(f"({len(outside)} more, up to a loss of" in name for name in names)


@pytest.mark.parametrize("score", [0.0, -0.4])
def test_plans_without_a_loss_are_drawn(plan: Plan, score: float) -> None:
    """A plan may cost nothing, or measure better than the dense model."""
    points = tuple(replace(point, score=score) if point.chosen else point for point in plan.frontier)
    layers = tuple(replace(row, score=score / LAYERS) for row in plan.layers)
    check_print(plan_figure(replace(plan, frontier=points, layers=layers, alternatives=())))


def test_many_layers_are_drawn_apart(plan: Plan) -> None:
    many = 126
    dense = replace(plan.dense, layers=many, blocks=(plan.dense.usual,) * many, windows=(0,) * many)
    pruned = replace(dense, blocks=tuple(plan.pruned.layout[i % LAYERS] for i in range(many)))
    layers = tuple(replace(plan.layers[i % LAYERS], layer=i) for i in range(many))
    figure = plan_figure(replace(plan, dense=dense, pruned=pruned, layers=layers))
    check_print(figure)
    ax = panel(figure, "attention")
    (marks,) = (line for line in ax.lines if line.get_label() == "removed")
    pixels = np.diff(ax.transData.transform([(0, 0), (1, 0)])[:, 0])[0]
    assert marks.get_markersize() * figure.dpi / 72 < pixels


def test_the_chosen_plan_is_in_the_frontier_where_its_hull_has_it_too() -> None:
    plan = search("llama-2-7b", "h100", Targets(memory_bytes=10 * 2**30))
    assert sum(point.chosen for point in plan.frontier) == 1
    figure = plan_figure(plan)
    check_print(figure)
    assert "target" not in [t.get_text() for t in panel(figure, "legend").get_legend().get_texts()]


@pytest.mark.quick
def test_shares_of_experts_and_heads() -> None:
    dense = Block(32, 8, 0, 8, 2.0, 14336)
    assert kept("mlp", replace(dense, experts=4), dense) == 0.5
    assert kept("mlp", replace(dense, experts=4, expert_inner=7168), dense) == 0.25
    assert kept("attention", replace(dense, heads=8, kv_heads=8), dense) == 0.25


def test_the_command_writes_the_figure(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.png"
    arguments = ["search", MODEL, "--hardware", "h100", "--scores", str(library), "--target", "1.6"]
    assert run([*arguments, "--phase", "prefill", "--batch", "4", "--figure", str(path)]) == 0
    assert "The plan changes" in capsys.readouterr().out
    with Image.open(path) as picture:
        assert picture.width == 2100
