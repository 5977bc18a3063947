"""Figures of a paper: what they show is what the simulator predicts, and they print without clashes, the same every
time.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from matplotlib.text import Text
from test_figures import check_print

import simulator
from simulator.cli import run
from simulator.cli.drawing import draw_rooflines, draw_waterfalls
from simulator.errors import InputError
from simulator.figures.crossover import crossover_figure
from simulator.figures.efficiency import efficiency_figure, number
from simulator.figures.kept import SKIPPED_PAIRS, kept_axes
from simulator.figures.measured import MeasuredGemms, from_columns, read_measured_gemms
from simulator.figures.panels import across, device, speedups_of, steps_of
from simulator.figures.paper import BATCHES, FIGURES, LENGTHS, MAP_SPARSITY, MEASURED, OPERATORS, draw
from simulator.figures.pareto import REMOVED, pareto_figure
from simulator.figures.save import save_figure
from simulator.figures.scatter import MOST_DOTS, RATIO, Cloud, agreement, scatter_figure
from simulator.figures.style import style_of
from simulator.figures.subject import NothingToDraw, Paper, paper
from simulator.figures.taxonomy import taxonomy_figure
from simulator.figures.titles import device_title, engine_title
from simulator.figures.waterfall import Steps, folded, waterfall_figure
from simulator.hardware.library import load_hardware
from simulator.prediction.explain import explanations
from simulator.prediction.scenario import Scenario
from simulator.pruning import general_families, prune
from simulator.uncertainty.operators import gemm_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from simulator.figures.paper import Drawn
    from simulator.hardware.profile import HardwareProfile

GPUS = ("a100_sxm_80gb", "h100_sxm", "rtx_4090")
FOUR = ["vllm", "hf", "compile", "sglang"]
TINY = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 4}


def measured(hw: HardwareProfile, rows: int, noise: float = 0.03) -> MeasuredGemms:
    """Times around the predicted ones, among them the fused projection of Llama-3.1-8B at every sixteenth M."""
    rng = np.random.default_rng(5)
    m = np.concatenate([np.arange(16, 2049, 16), rng.integers(1, 8193, rows)])
    n, k = (np.concatenate([np.full(128, first), 64 * rng.integers(1, 257, rows)]) for first in (6144, 4096))
    seconds = gemm_time(m, n, k, hw).seconds * np.exp(noise * rng.standard_normal(len(m)))
    return MeasuredGemms("planted", m.astype(float), n.astype(float), k.astype(float), seconds)


@pytest.fixture(scope="module")
def about() -> Paper:
    whole = paper("llama-3.1-8b", GPUS)
    return replace(
        whole,
        measured={
            hw.name: measured(hw, rows) for hw, rows in zip(whole.devices, (2 * MOST_DOTS, 4000, 100), strict=True)
        },
    )


@pytest.fixture(scope="module")
def one() -> Paper:
    whole = paper("opt-13b", ["rtx_4090"], scenario=Scenario(engine="reference"), seq=512)  # with 2:4
    return replace(whole, measured={hw.name: measured(hw, 300) for hw in whole.devices})


@pytest.fixture(scope="module")
def drawn(about: Paper, one: Paper) -> dict[str, Drawn]:
    out = {name: draw(name, about) for name in FIGURES if name != "crossover"}  # of 5,000 predictions a device
    return out | {f"{name}, one device": draw(name, one) for name in FIGURES}


NAMES = [name for name in (*FIGURES, *(f"{name}, one device" for name in FIGURES)) if name != "crossover"]


# -- print -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_figures_print_without_clashes(name: str, drawn: dict[str, Drawn]) -> None:
    check_print(drawn[name].figure)
    sizes = [
        a.get_fontsize() for a in drawn[name].figure.findobj(lambda a: hasattr(a, "get_fontsize") and a.get_text())
    ]
    assert min(sizes) >= 6


def test_a_map_of_three_devices_prints_without_clashes() -> None:
    grid = list(itertools.product(["prefill", "decode"], GPUS, BATCHES, LENGTHS))
    rows, columns, batch, seq = (list(column) for column in zip(*grid, strict=True))
    winner = [("depth", "width_cross", "")[i % 3] for i in range(len(grid))]
    sure = np.arange(len(grid)) % 2 == 0
    check_print(crossover_figure(rows, columns, batch, seq, winner, np.full(len(grid), 1.97), sure, ~sure))


CELLS: dict[str, Any] = {"row": ["decode"] * 3, "column": ["h100"] * 3, "batch": [1, 8, 64]}


@pytest.mark.parametrize(
    "make",
    [
        lambda one: draw("taxonomy", one).figure,
        lambda one: draw("staircase", one).figure,
        lambda one: draw("scatter", one).figure,
        lambda _: efficiency_figure(**CELLS, family=["depth"] * 3, efficiency=[0.9, -0.4, np.nan]),
        lambda _: crossover_figure(
            **(CELLS | {"seq": [512] * 3, "winner": ["depth", "", "token"], "speedup": [2.0, 1, 1.5]}),
            certain=[1, 0, 0],
            fits=[1, 1, 0],
        ),
    ],
    ids=["taxonomy", "staircase", "scatter", "efficiency", "crossover"],
)
def test_the_same_paper_gives_the_same_bytes(make: Callable[[Paper], Figure], one: Paper, tmp_path: Path) -> None:
    figures = make(one), make(one)
    for i, figure in enumerate(figures):  # other formats: test_figures.py
        save_figure(figure, tmp_path / f"{i}.pdf")
    assert (tmp_path / "0.pdf").read_bytes() == (tmp_path / "1.pdf").read_bytes()
    assert b"/Type3" not in (tmp_path / "0.pdf").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_captions_say_what_was_drawn(name: str, drawn: dict[str, Drawn], about: Paper) -> None:
    d = drawn[name]
    assert d.caption.endswith(".")
    assert "\n" not in d.caption
    assert not re.search(r"\{|\}|nan|None", d.caption)
    model = "Llama-2-7b" if "pareto" in name and d.notes else "Llama-3.1-8B" if "one device" not in name else "opt-13b"
    assert "GEMMs" in d.caption or model in d.caption
    engine = "PyTorch, CUDA graph" if "one device" in name else "vLLM"
    assert ("single" if name.split(",")[0] in MEASURED else "any" if "taxonomy" in name else engine) in d.caption


def test_what_an_engine_refuses_is_left_out_or_shown_in_another_and_the_caption_says_so(
    drawn: dict[str, Drawn],
) -> None:
    for name in ("speedup", "efficiency"):
        assert drawn[name].caption.endswith("2:4 is excluded: vLLM has no kernels for it."), name
    assert "2:4" not in drawn["pareto"].caption  # no method of it has quality on the axis that was drawn
    assert drawn["waterfall"].caption.endswith("2:4 is shown in torch.compile: vLLM has no kernels for it.")
    titles = [ax.get_title().replace(",\n", ", ") for ax in drawn["waterfall"].figure.axes]
    assert [t.split("\n")[0] for t in titles] == [
        f"{device_title(g)}, {e}" for e in ("vLLM", "torch.compile", "vLLM") for g in GPUS
    ]
    assert not any("2:4 is" in drawn[f"{name}, one device"].caption for name in FIGURES)  # reference has it


@pytest.mark.parametrize("engine", ["hf", "trtllm"])  # vllm and reference are those of the papers above
def test_figures_print_in_other_engines(engine: str) -> None:
    whole = paper("llama-3.1-8b", ["h100_sxm"], scenario=Scenario(engine=engine))
    for name in ("roofline", "speedup", "waterfall"):
        d = draw(name, whole)
        check_print(d.figure)
        named = [t.get_text().replace("\n", " ") for t in d.figure.findobj(Text)]
        assert any(f"H100 SXM, {engine_title(engine)}" in text for text in named)
        assert f", {engine_title(engine)}," in d.caption


@pytest.mark.parametrize(
    ("hardware", "engines", "rows", "columns"),
    [
        (["h100_sxm"], ["vllm", "hf"], ["decode, batch 1"], ["H100 SXM, vLLM", "H100 SXM, Transformers (eager)"]),
        (["h100_sxm"], FOUR, ["decode, batch 1, H100 SXM"], list(map(engine_title, FOUR))),
        (
            ["h100_sxm", "l40s"],
            ["vllm", "hf"],
            ["decode, batch 1, vLLM", "decode, batch 1, Transformers (eager)"],
            ["H100 SXM", "L40S"],
        ),
    ],
)
def test_each_engine_has_a_panel_that_names_it(
    hardware: list[str], engines: list[str], rows: list[str], columns: list[str]
) -> None:
    records = simulator.table(
        ["llama-3.1-8b"], hardware, ["depth", "width"], [0.25, 0.5], ["decode"], engine=engines
    ).rows
    figure = speedups_of(records)
    check_print(figure)
    across = len(columns)
    assert [ax.get_title().replace("\n", " ") for ax in figure.axes[:across]] == columns
    last = figure.axes[across - 1 :: across]
    assert [ax.texts[0].get_text().replace("\n", " ") for ax in last] == rows
    values = {round(float(y), 9) for ax in figure.axes for line in ax.lines for y in np.atleast_1d(line.get_ydata())}
    assert {round(r.speedup, 9) for r in records} <= values


def test_explanations_in_two_engines_stand_side_by_side(tmp_path: Path) -> None:
    found = explanations("llama-3.1-8b", ["h100_sxm"], "width", 0.3, ["prefill", "decode"], engine=["hf", "vllm"])
    figure = waterfall_figure([steps_of(e, device(e.result)) for e in found], columns=across(1, 2))
    check_print(figure)
    assert [ax.get_title() for ax in figure.axes] == ["H100 SXM, Transformers (eager)", "H100 SXM, vLLM"] * 2
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()][-3:] == [
        "kernel efficiency",
        "other (8 steps)",
        "predicted",
    ]
    draw_waterfalls(found[:2], str(tmp_path / "steps.png"))
    draw_rooflines(found[:2], str(tmp_path / "roof.png"))
    assert {p.name for p in tmp_path.iterdir()} == {"steps.png", "roof.png"}


# -- what is shown -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", general_families())
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_kept_axes_multiply_to_the_flops_that_are_left(family: str, phase: str) -> None:
    dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase=phase, batch=4, seq=1024, engine="")
    pruned = prune(dense, family, 0.5)
    for roles in OPERATORS.values():
        before, after = (float(w.flops[w.is_role(*roles) & ~w.overhead].sum()) for w in (dense, pruned))
        kept = kept_axes(dense, pruned, roles, SKIPPED_PAIRS.get(family, "N"))
        assert float(np.prod(kept)) == pytest.approx(after / before, rel=1e-12)
        assert min(kept) > 0
        assert max(kept) <= 1.0 + 1e-12


def test_the_taxonomy_is_that_of_the_reference_paper(about: Paper) -> None:
    dense = simulator.lower(about.model, phase="prefill", batch=1, seq=2048, engine="")

    def changed(family: str, *roles: str) -> str:
        kept = kept_axes(dense, prune(dense, family, 0.5), roles, SKIPPED_PAIRS.get(family, "N"))
        return "".join(axis for axis, share in zip("MNK", kept, strict=True) if share < 0.6)

    expected = {
        "q": "depth M, width N, width_cross K, semi_structured K, dynamic_depth M, dynamic_width N",
        "down": "depth M, width K, width_cross N, low_rank K, dynamic_width K, token M, unstructured K",
        "attention": "depth M, width K, sparse_attention N, dynamic_depth M, dynamic_width K, low_rank -",
        "lm_head": "depth -, width_cross K, semi_structured -",
    }
    for role, pairs in expected.items():
        for pair in pairs.split(", "):
            family, axes = pair.split(" ")
            assert (changed(family, role) or "-") == axes, (role, family)


def test_a_bar_of_the_taxonomy_is_as_long_as_the_share_that_is_kept() -> None:
    (ax,) = taxonomy_figure(
        ["depth", "width"], ["static M", "static N"], ["q"], [[[0.25, 1, 1]], [[1, 0.8, 0.4]]], ["", "router"]
    ).axes
    boxes = [p.get_path().get_extents(p.get_patch_transform()) for p in ax.patches]
    widths = [box.width for box in boxes if box.height < 0.1]
    assert [b / a for a, b in zip(widths[::2], widths[1::2], strict=True)] == pytest.approx([0.25, 0.8, 0.4])
    assert {t.get_text() for t in ax.texts} >= {"25", "80", "40", "nothing", "router"}


def test_the_map_names_the_fastest_family() -> None:
    where = [MAP_SPARSITY], ["decode"], [8], [4096]
    table = simulator.table(["llama-3.2-1b"], ["rtx_4090"], ["all"], *where)
    best = max(table, key=lambda r: r.speedup)
    _, ax = draw("crossover", paper("llama-3.2-1b", ["rtx_4090"])).figure.axes
    x, y = BATCHES.index(8), LENGTHS.index(4096)
    (text,) = (t.get_text() for t in ax.texts if t.get_position()[0] == x and round(t.get_position()[1] + 0.2) == y)
    assert text == f"{best.speedup:.2f}"
    (line,) = (line for line in ax.lines if (x, y + 0.22) in [tuple(point) for point in line.get_xydata()])
    assert (line.get_marker(), line.get_color()) == (style_of(best.family).marker, style_of(best.family).color)


def test_where_no_family_gains_the_map_has_no_marker() -> None:
    ax = crossover_figure(
        ["decode"] * 2, ["gpu"] * 2, [1, 2], [64, 64], ["", "depth"], [0.9, 1.2], [True] * 2, [True] * 2
    ).axes[0]
    assert [t.get_text() for t in ax.texts if t.get_text() != "decode"] == ["1.20"]
    assert len(ax.lines) == 1


def test_cells_beyond_the_memory_are_blank_and_the_legend_says_so() -> None:
    cells = ["decode"] * 3, ["gpu"] * 3, [1, 2, 4], [64] * 3, ["depth", "depth", "width"], [1.9, 1.8, 1.7]
    figure = crossover_figure(*cells, [True, False, True], [True, True, False])
    ax, legend = figure.axes[0], [t.get_text() for t in figure.legends[0].get_texts()]
    assert [t.get_text() for t in ax.texts if t.get_text() != "decode"] == ["1.90", "1.80"]
    assert [len(c.get_paths()) for c in ax.collections] == [2]
    assert legend == ["Depth", "pale: winner uncertain", "blank: dense model exceeds memory"]
    certain, uncertain = (color[3] for color in ax.collections[0].get_facecolor())
    assert certain > 2 * uncertain
    alone = crossover_figure(*cells, [True] * 3, [True] * 3)
    assert [t.get_text() for t in alone.legends[0].get_texts()] == ["Depth", "Width"]


def test_efficiencies_are_those_of_the_predictions(about: Paper, drawn: dict[str, Drawn]) -> None:
    (r,) = simulator.table(
        [about.model], ["a100_sxm_80gb"], ["depth"], [MAP_SPARSITY], ["prefill"], [BATCHES[0]], [about.seq]
    )
    ax = drawn["efficiency"].figure.axes[0]
    assert next(t.get_text() for t in ax.texts if t.get_position() == (0, 0)) == number(r.efficiency)
    assert efficiency_figure(["a"], ["b"], ["depth"], [1], [float("nan")]).axes[0].texts[0].get_text() == "–"


def test_a_staircase_shows_the_prediction_and_the_measured_points(about: Paper, drawn: dict[str, Drawn]) -> None:
    ax = drawn["staircase"].figure.axes[2]
    lines = {(line.get_linestyle(), line.get_marker()): line for line in ax.lines}
    _, highest = (line.get_ydata() for line in ax.lines if line.get_linestyle() == "--")
    hw = load_hardware("rtx_4090")
    assert highest[-1] == pytest.approx(2e6 * 512 * 6144 * 4096 / (hw.peak_flop_per_s("bf16") * hw.clock_headroom))
    a100 = drawn["staircase"].figure.axes[0]  # whose datasheet is at its highest clock
    assert sum(line.get_linestyle() == "--" for line in a100.lines) == 1
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() < ax.get_ylim()[1]  # the interval is not cut
    x, y = (np.asarray(v) for v in lines["-", "None"].get_data())
    np.testing.assert_allclose(y, 1e6 * gemm_time(x, 6144, 4096, load_hardware("rtx_4090")).seconds)
    assert (np.diff(y) > 0.02 * y[:-1]).sum() >= 3  # steps
    seen = about.measured["rtx_4090"]
    x, y = (np.asarray(v) for v in lines["None", "o"].get_data())
    chosen = seen.of_weight(6144, 4096) & (seen.m <= 512)
    np.testing.assert_array_equal(x, seen.m[chosen])
    np.testing.assert_allclose(y, 1e6 * seen.seconds[chosen])


def test_predictions_beside_measurements_assume_the_same_rotation_of_weights() -> None:
    hw = load_hardware("a100")
    table = from_columns({"m": [8], "n": [4096], "k": [2048], "seconds": [1e-5], "copies": [1]}, "mine")
    assert table.predict(hw)[0] == gemm_time(8, 4096, 2048, hw, copies=1).seconds
    assert table.predict(hw)[0] != gemm_time(8, 4096, 2048, hw).seconds
    held = from_columns({"m": [8], "n": [512], "k": [512], "seconds": [1e-5], "predicted_s": [9e-6]}, "mine")
    assert held.predict(hw).tolist() == [9e-6]


def test_many_points_become_a_density_and_none_is_lost() -> None:
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(np.log(3e-6), np.log(1e-2), 5000))
    y = x * np.exp(0.3 * rng.standard_normal(5000))
    first, second = scatter_figure([Cloud("gpu", x, y)]).axes
    beyond = {line.get_marker(): len(line.get_xdata()) for line in second.lines if line.get_marker() in ("^", "v")}
    assert beyond == {"^": (y / x > RATIO).sum(), "v": (x / y > RATIO).sum()}
    for ax, drawn in ((first, 5000), (second, 5000 - sum(beyond.values()))):
        (mesh,) = ax.collections
        assert float(mesh.get_array().sum()) == drawn
    a = agreement(x, y)
    assert f"5,000 GEMMs\nmean error {100 * a.mean:.1f} %" in first.texts[0].get_text()
    assert a.p95 > a.mean > a.median > 0.1


def test_ratios_out_of_range_are_arrows_with_their_number_and_the_farthest() -> None:
    y = 1e-3 * np.array([1.0, 1.59, 1.9, 2.5, 0.2])
    _, ratios = scatter_figure([Cloud("hf", np.full(5, 1e-3), y)]).axes
    lines = {line.get_marker(): line for line in ratios.lines}
    np.testing.assert_allclose(lines["o"].get_ydata(), [1.0, 1.59])
    assert lines["^"].get_ydata().tolist() == [RATIO] * 2
    assert lines["v"].get_ydata().tolist() == [1 / RATIO]
    assert [t.get_text() for t in ratios.texts] == ["2 above, to 2.5", "1 below, to 0.2"]


def test_a_familys_only_method_is_named_in_the_legend_and_several_beside_their_points() -> None:
    panel = ["prefill"] * 3, ["h100"] * 3, ["depth", "width", "width"], ["SLEB", "FLAP", "LLM-Pruner"]
    figure = pareto_figure(
        *panel, [0.25] * 3, [0.1, 0.2, 0.5], [1.1, 1.3, 1.6], [1, 1.2, 1.5], [1.2, 1.4, 1.7], axis="ppl"
    )
    assert [t.get_text() for t in figure.legends[0].texts][:2] == ["Depth (SLEB)", "Width"]
    texts = {t.get_text() for t in figure.axes[0].texts}
    assert texts == {"25", "FLAP 25", "LLM-Pruner 25", "prefill"}


def test_points_of_a_frontier_carry_what_was_removed_and_a_bent_axis_says_where() -> None:
    panel = ["prefill"] * 3, ["h100"] * 3, ["depth", "depth", "width"], ["SLEB", "SLEB", "FLAP"]
    ends = [1.1, 1.3, 1.2], [1.0, 1.2, 1.1], [1.2, 1.4, 1.3]
    losses = [0.1, 0.2, 0.5], [0.1, 4.0, 2.0]
    straight, bent = (pareto_figure(*panel, [0.125, 0.5, 0.25], loss, *ends, axis="ppl") for loss in losses)
    for figure in (straight, bent):
        check_print(figure)
        assert {"12.5", "50"} <= {t.get_text() for t in figure.axes[0].texts}
        assert REMOVED in [t.get_text() for t in figure.legends[0].texts]
    titles = [figure.legends[0].get_title().get_text() for figure in (straight, bent)]
    assert titles == ["quality loss (%): ppl", "quality loss (%): ppl (linear to 10 %, then logarithmic)"]
    assert bent.axes[0].get_xscale() == "symlog"
    (line,) = (x for x in bent.axes[0].lines if list(x.get_xdata()) == [10.0, 10.0])
    assert line.get_linestyle() == ":" or line.is_dashed()


def test_panels_of_a_roofline_share_axes_and_tell_the_models_apart(drawn: dict[str, Drawn]) -> None:
    figure = drawn["roofline"].figure
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.axes}) == 1
    assert [t.get_text() for t in figure.legends[0].texts] == ["dense", "pruned", "datasheet", "highest clock"]
    for ax in figure.axes:
        marks = {line.get_marker(): line.get_color() for line in ax.lines if line.get_marker() != "None"}
        assert set(marks) == {"o", "s"}
        assert len(set(marks.values())) == 2
        named = ", ".join(t.get_text().replace("\n", ", ") for t in ax.texts)
        assert all(re.search(rf"\b{name}\b", named) for name in ("qkv", "o", "gate up", "down"))


def test_steps_within_a_percent_are_folded_and_the_product_is_exact() -> None:
    names, factors = ["a", "b", "c", "d", "e"], [1.002, 0.8, 0.993, 1.0, 1.009]
    two = [Steps("x", names, factors, 1.5, 1.0, 1.3, names), Steps("y", names, [1.0, 1.0, 0.98, 1.0, 1.0], 1.5, 1, 1.6)]
    (alone,) = folded(two[:1])
    assert (alone.names, alone.notes[-1]) == (["b", "other (4 steps)"], "a ×1.002; c ×0.993; d ×1.000; e ×1.009")
    assert alone.factors[-1] == pytest.approx(1.002 * 0.993 * 1.009, rel=1e-15)
    for before, after in zip(two, folded(two), strict=True):
        assert after.names == ["b", "c", "other (3 steps)"], "a step stays if it matters in one panel"
        assert after.reached[-1] == pytest.approx(before.reached[-1], rel=1e-15)
        assert after.nominal == before.nominal
    assert folded([Steps("x", ["a", "b"], [1.0, 0.8], 1.5, 1.0, 1.3)])[0].names == ["a", "b"], (
        "one step alone keeps its name"
    )
    rows = waterfall_figure([replace(two[0], title="1"), replace(two[1], title="2")], columns=1)
    steps = [[t.get_text() for t in ax.get_yticklabels()][1:-1] for ax in rows.axes]
    assert steps == [["b", "other (4 steps)"], ["c", "other (4 steps)"]]


def test_a_scatter_says_what_its_points_are_and_has_two_ticks_or_more() -> None:
    first, _ = scatter_figure([Cloud("hf", [3e-3, 8e-3, 20e-3], [3e-3, 9e-3, 18e-3])]).axes
    assert first.texts[0].get_text().startswith("3 GEMMs\n")
    assert len(first.get_xticks()) >= 2


# -- the command -------------------------------------------------------------------------------------------------------


FIGURES_OF = ["figures", "llama-3.1-8b"]


@pytest.fixture
def prunesim(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line without the measured GEMMs that ship."""
    monkeypatch.setattr("calibration.cli.figures.shipped_gemms", lambda hw, dtype: None)
    return run


def test_one_command_writes_figures_and_captions(
    prunesim: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "gemms.csv"
    table.write_text(
        "m,n,k,latency_us,dtype,note\n1,6144,4096,54.9,bf16,\n512,6144,4096,165,bf16,x\n512,6144,4096,80,fp8,\n"
    )
    out = tmp_path / "new" / "out"
    chosen = "taxonomy,scatter"
    assert (
        prunesim([*FIGURES_OF, "-o", str(out), "--hardware", "4090", "--only", chosen, "--measured", f"4090={table}"])
        == 0
    )
    assert {p.name for p in out.iterdir()} == {f"{n}{s}" for n in chosen.split(",") for s in (".pdf", ".png")} | {
        "captions.md"
    }
    captions = (out / "captions.md").read_text()
    assert re.findall(r"^## (.+)$", captions, re.MULTILINE) == ["taxonomy", "scatter"]
    assert f"`prunesim figures llama-3.1-8b -o DIR --only scatter --hardware 4090 --measured 4090={table}`" in captions
    assert "`prunesim figures llama-3.1-8b -o DIR --only taxonomy --hardware 4090`" in captions
    assert "gemms.csv" in captions
    printed = capsys.readouterr()
    assert str(out / "captions.md") in printed.out


def test_what_lacks_data_is_left_out_with_a_note(
    prunesim: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: FIGURES[name] for name in ("taxonomy", "scatter")}
    monkeypatch.setattr("simulator.figures.paper.FIGURES", few)
    assert prunesim([*FIGURES_OF, "-o", str(tmp_path), "--format", "png"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"taxonomy.png", "captions.md"}
    assert "no measured GEMMs" in capsys.readouterr().err


def test_measurements_that_ship_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = {"h100_sxm": measured(load_hardware("h100_sxm"), 50)}
    monkeypatch.setattr("calibration.cli.figures.shipped_gemms", lambda hw, dtype: shipped.get(hw.name))
    assert run([*FIGURES_OF, "-o", str(tmp_path), "--only", "scatter", "--format", "png"]) == 0
    assert "H100 SXM: planted" in (tmp_path / "captions.md").read_text()
    assert "A100" not in (tmp_path / "captions.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "taxonmy"], "figure 'taxonmy'"),
        (["--only", "scatter"], "no measured GEMMs of a100_sxm_80gb, h100_sxm, rtx_4090"),
        (["--format", "jpg"], "format 'jpg'"),
        (["--seq", "0"], "seq 0"),
        (["--measured", "4090"], "expected DEVICE=FILE"),
        (["--measured", "4090=missing.csv"], "missing.csv: cannot be read"),
        (["--measured", "l40s=missing.csv"], "l40s is not among --hardware"),
        (["--hardware", "h100", "--measured", "h100=setup.cfg", "--measured", "h100_sxm=setup.cfg"], "setup.cfg"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    prunesim: Any, arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prunesim([*FIGURES_OF, "-o", str(tmp_path / "out"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_the_model_is_positional_as_in_every_command(
    prunesim: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text(json.dumps(TINY))
    one = ["--only", "taxonomy", "--format", "svg"]
    for model in (str(tmp_path / "own"), str(tmp_path / "own" / "config.json")):
        assert prunesim(["figures", model, "-o", str(tmp_path / "out"), *one]) == 0
        assert (
            f"`prunesim figures {model} -o DIR --only taxonomy --format svg`"
            in (tmp_path / "out" / "captions.md").read_text()
        )
    assert prunesim(["figures", "nosuch", "-o", str(tmp_path / "out"), *one]) == 2
    assert "nosuch" in capsys.readouterr().err
    assert prunesim(["figures", "-o", str(tmp_path / "out"), *one]) == 2, "no model has a default"


def test_the_output_may_not_be_a_file(prunesim: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert prunesim([*FIGURES_OF, "-o", str(tmp_path / "file"), "--only", "taxonomy"]) == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"m,n\n1,2\n", "column k is missing"),
        (b"m,n,k\n1,2,3\n", "column seconds is missing"),
        (b"m,n,k,seconds\n1,2,3,fast\n", "column seconds: expected numbers"),
        (b"m,n,k,seconds\n1,2,3,1e-5\n0,2,3,1e-5\n", "column m, row 2: expected a number from 1"),
        (b"m,n,k,seconds\n1,2,3,nan\n", "column seconds, row 1"),
        (b"m,n,k,seconds,dtype\n1,2,3,1e-5,fp8\n", "no row of bf16"),
        (b"m,n,k,seconds\n1,2\n", ":2: expected 4 cells"),
        (b"PAR1\x00\x00", "cannot be read as Parquet"),
        (b"\xff\xfe\x00\x01", "is not CSV"),
    ],
)
def test_a_bad_table_of_measurements_is_refused_with_the_reason(content: bytes, says: str, tmp_path: Path) -> None:
    if content.startswith(b"PAR1"):
        pytest.importorskip("pyarrow")
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        read_measured_gemms(path)
    assert "\n" not in str(caught.value)


def test_parquet_and_codes_of_formats_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {
            "m": [1, 2, 3],
            "n": [8] * 3,
            "k": [8] * 3,
            "seconds": [1e-6] * 3,
            "dtype": [3, 4, 3],
            "weight_dtype": [3, 4, 5],
        }
    )
    parquet.write_table(table, tmp_path / "t.parquet")
    assert read_measured_gemms(tmp_path / "t.parquet").m.tolist() == [1.0]
    assert read_measured_gemms(tmp_path / "t.parquet", "fp8").m.tolist() == [2.0]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: efficiency_figure(["a"], ["b"], ["depth"], [1, 2], [0.5]), "columns of one length"),
        (lambda: crossover_figure([], [], [], [], [], [], [], []), "columns of one length"),
        (lambda: draw("taxnomy", paper("llama-3.1-8b", ["h100"])), "figure 'taxnomy'"),
        (lambda: paper("llama-3.1-8b", []), "expected at least one"),
    ],
)
def test_bad_arrays_are_one_line(call: Any, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_missing_table_is_told_from_bad_input() -> None:
    with pytest.raises(NothingToDraw, match="--measured"):
        draw("scatter", paper("llama-3.1-8b", ["h100"]))
