"""Figures and texts of the page: every number is the simulator's, and what they look like can be told apart."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import simulator
from simulator.explore import markup
from simulator.explore.answer import answer, winners
from simulator.explore.chart import INK, PAGE, PAPER, PHONE, SOFT, WIDE, Frame
from simulator.explore.chart_waterfall import levels
from simulator.explore.charts import charts, map_chart, texts
from simulator.explore.state import State
from simulator.figures.panels import steps_of
from simulator.figures.paper import BATCHES, LENGTHS
from simulator.figures.style import LOOKS, label
from simulator.hardware.library import load_hardware
from simulator.predict.gemms import gemm_points
from simulator.pruning import FAMILIES

DECODE = State(
    gpus=("a100_sxm_80gb", "h100_sxm"),
    families=("depth", "width", "semi_structured"),
    phase="decode",
    batch=8,
    detail="depth",
)
STATES = {
    "default": State(),
    "decode": DECODE,
    "generate": replace(DECODE, phase="generate", new_tokens=16, runtime="eager", detail="dynamic_width", at=0.3),
    "every family": State(
        families=tuple(FAMILIES), gpus=("rtx_4090",), dtype="fp16", batch=3, seq=777, detail="token", at=0.45
    ),
}


@pytest.fixture(params=list(STATES))
def state(request: pytest.FixtureRequest) -> State:
    return STATES[request.param]


def named(chart: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Traces of a chart by name, one a panel."""
    return [t for t in chart["data"] if t.get("name") == name and t["x"] != [None]]


# -- numbers ------------------------------------------------------------------------------------------------------------------------


def test_curves_are_the_predictions(state: State) -> None:
    """One prediction at a time, through the public functions, against what is drawn."""
    chart = charts(state, WIDE)["speedup"]
    for panel, gpu in enumerate(state.gpus):
        hw = simulator.load_hardware(gpu)
        new = state.new_tokens if state.phase == "generate" else 0
        dense = simulator.lower(
            simulator.load_model(state.model),
            phase=state.phase,
            batch=state.batch,
            seq=state.seq,
            new_tokens=new,
            dtype=state.dtype,
        )
        for family in state.drawn:
            curve = named(chart, label(family))[panel]
            for removed, drawn in zip(curve["x"], curve["y"], strict=True):
                pruned = simulator.prune(dense, family, sparsity=removed / 100)
                assert drawn == pytest.approx(
                    simulator.speedup(dense, pruned, hw, runtime=state.runtime).speedup, rel=1e-12
                )


def test_bands_and_bounds_are_those_of_the_records(state: State) -> None:
    chart = charts(state, WIDE)["speedup"]
    records = answer(state).table.records
    for panel, gpu in enumerate(state.gpus):
        own = sorted((r for r in records if r.hardware == gpu and r.family == state.detail), key=lambda r: r.sparsity)
        for key, title in (
            ("flop_bound", "FLOP bound"),
            ("byte_bound", "byte bound"),
            ("roofline_bound", "roofline bound"),
        ):
            assert named(chart, f"{title} ({label(state.detail)})")[panel]["y"] == [getattr(r, key) for r in own]
        axis = "x" if panel == 0 else f"x{panel + 1}"
        bands = [
            t
            for t in chart["data"]
            if t.get("fill") == "toself" and t["xaxis"] == axis and t["legendgroup"] == state.detail
        ]
        assert [t["y"] for t in bands] == [[r.speedup_upper for r in own] + [r.speedup_lower for r in reversed(own)]]


def test_waterfalls_multiply_to_the_prediction(state: State) -> None:
    found = answer(state)
    assert len(found.details) == len(state.gpus)
    chart = charts(state, WIDE)["waterfall"]
    bars = [t for t in chart["data"] if t["type"] == "bar"]
    for e, bar in zip(found.details, bars, strict=True):
        assert levels(steps_of(e, ""))[-1] == pytest.approx(e.record.speedup, rel=1e-9)
        assert bar["base"][-1] + bar["x"][-1] == pytest.approx(e.record.speedup, rel=1e-9)
        assert bar["base"][0] + bar["x"][0] == pytest.approx(1 / (1 - e.record.sparsity), rel=1e-9)
        (same,) = [
            r for r in found.table if (r.hardware, r.family, r.sparsity) == (e.record.hardware, state.detail, state.at)
        ]
        assert same.speedup == pytest.approx(e.record.speedup, rel=1e-12)


def test_points_of_the_roofline_are_the_gemms(state: State) -> None:
    chart = charts(state, WIDE)["roofline"]
    for panel, e in enumerate(answer(state).details):
        for name, workload in (("dense", e.dense), ("pruned", e.pruned)):
            points = gemm_points(workload.take(workload.layer >= 0), e.hardware, state.runtime)
            drawn = named(chart, name)[panel]
            expected = set(zip(points.intensity.tolist(), (points.achieved_flop_per_s / 1e12).tolist(), strict=True))
            assert set(zip(drawn["x"], drawn["y"], strict=True)) <= expected
        roof = named(chart, "datasheet roofline")[panel]
        assert max(roof["y"]) * 1e12 <= e.hardware.peak_flop_per_s(state.dtype) * (1 + 1e-12)


def test_points_that_share_a_marker_are_close(state: State) -> None:
    """A GEMM that is not drawn has its place taken by one within a percent."""
    chart = charts(state, WIDE)["roofline"]
    for panel, e in enumerate(answer(state).details):
        for name, workload in (("dense", e.dense), ("pruned", e.pruned)):
            points = gemm_points(workload.take(workload.layer >= 0), e.hardware, state.runtime)
            drawn = np.log(np.array([named(chart, name)[panel][k] for k in "xy"]))
            for x, y in zip(np.log(points.intensity), np.log(points.achieved_flop_per_s / 1e12), strict=True):
                assert np.abs(drawn - np.array([[x], [y]])).max(axis=0).min() < math.log(1.011)


def test_the_map_is_what_scenarios_say(state: State) -> None:
    small = replace(state, families=state.families[:3])
    cells = winners(small)
    assert len(cells.batch) == len(small.gpus) * len(BATCHES) * len(LENGTHS)
    chosen = np.random.default_rng(3).choice(len(cells.batch), 12, replace=False)
    for i in chosen:
        table = simulator.table(
            [small.load()],
            [str(cells.gpu[i])],
            small.drawn,
            [small.at],
            [small.phase],
            [int(cells.batch[i])],
            [int(cells.seq[i])],
            setting=small.setting,
        )
        best = max(table, key=lambda r: r.speedup)
        others = [r.speedup_upper for r in table if r.family != best.family]
        assert cells.winner[i] == (best.family if best.speedup > 1 else "")
        assert cells.speedup[i] == pytest.approx(best.speedup, rel=1e-9)
        assert (cells.lower[i], cells.upper[i]) == pytest.approx((best.speedup_lower, best.speedup_upper), rel=1e-9)
        assert bool(cells.sure[i]) == (best.speedup_lower > max([1.0, *others]))
        assert bool(cells.fits[i]) == best.dense_fits
    drawn = [t for t in map_chart(small, WIDE)["data"] if t["type"] == "scatter" and t["mode"] == "markers+text"]
    said = sorted(text for t in drawn for text in t["text"])
    assert said == sorted(f"{v:.2f}" for v in cells.speedup)


def test_the_table_and_its_csv_are_the_records(state: State) -> None:
    found = answer(state)
    html = markup.table_html(found, state.detail, state.at)
    assert html.count("<tr") == 1 + len(found.table)
    assert html.count('class="detail"') == len(state.gpus)
    rows = list(csv.DictReader(io.StringIO(markup.table_csv(found.table.records))))
    for row, r in zip(rows, found.table, strict=True):
        assert float(row["speedup [1]"]) == r.speedup
        assert float(row["pruned_s [s]"]) == r.pruned_s
        assert float(row["dense_memory_bytes [B]"]) == r.dense_memory_bytes
        assert row["limit"] == r.limit
    numbers = {name for name, value in rows[0].items() if re.fullmatch(r"[-+0-9.e]+", value)}
    assert all("[" in name for name in numbers), "a number without a unit"


# -- what cannot be shown -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_predicted_is_a_line(tmp_path: Any) -> None:
    for bad in (
        State(families=("semi_structured",), detail="semi_structured", at=0.3),
        State(gpus=("a100_sxm_80gb",), dtype="fp8"),
    ):
        found = answer(bad)
        assert found.refused
        assert not found.table.records
        for chart in (*charts(bad, WIDE).values(), map_chart(bad, WIDE)):
            assert chart["data"] == []
            assert len(chart["layout"]["annotations"]) == 2
        assert "<table" not in texts(bad)["table"]


def test_a_gpu_that_cannot_run_the_family_in_detail_leaves_the_others() -> None:
    """fp8 2:4 and the like: the other GPUs keep their panels, and a note says why."""
    mixed = State(gpus=("h100_sxm", "cpu"), detail="semi_structured", at=0.5, families=("depth",), dtype="fp32")
    found = answer(mixed)
    able = [e.record.hardware for e in found.details]
    assert set(able) < {"h100_sxm", "cpu"} or found.refused
    if not found.refused:
        assert any("semi_structured" in note for note in found.notes)


def test_notes_say_what_the_command_line_says() -> None:
    large = State(model="llama-2-70b", gpus=("rtx_4090",), families=("depth",))
    found = answer(large)
    assert any("its times are hypothetical" in note for note in found.notes)
    facts = markup.facts_html(found)
    assert "does not fit" in facts
    assert "calibrated" in facts
    assert markup.notes_html(found).count("<li>") == len(found.notes)


def test_calibration_is_stated_as_the_records_have_it() -> None:
    for gpu in simulator.list_hardware():
        for phase in ("prefill", "decode"):
            for dtype in ("bf16", "fp16", "fp32"):
                if dtype not in load_hardware(gpu).rates:
                    continue
                found = answer(State(gpus=(gpu,), families=("depth",), detail="depth", phase=phase, dtype=dtype))
                assert all(r.calibrated == (not markup.uncalibrated_parts(gpu, phase, dtype)) for r in found.table)


def test_names_are_escaped() -> None:
    import json

    from test_explore_state import TINY

    from simulator.explore.dropped import token

    hostile = State(model=token(json.dumps({**TINY, "_name_or_path": "<img src=x onerror=alert(1)>"}), "<b>.json"))
    for html in texts(hostile).values():
        assert "<img" not in html
        assert "<b>.json" not in html


# -- looks --------------------------------------------------------------------------------------------------------------------------


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_has_contrast_aa() -> None:
    from pathlib import Path

    import simulator.explore

    css = (Path(simulator.explore.__file__).parent / "assets" / "explore.css").read_text()
    colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", css))
    assert len(colors) >= 7
    grounds = (colors["ground"], colors["paper"], "#e8f1f8")
    for name in ("ink", "soft", "accent", "good", "bad"):
        assert min(contrast(colors[name], g) for g in grounds) >= 4.5, name
    assert contrast("#ffffff", colors["accent"]) >= 4.5
    assert contrast("#d3dae3", colors["ink"]) >= 4.5
    assert contrast(colors["bad"], "#fdf0e9") >= 4.5
    for color in (INK, SOFT):
        assert contrast(color, PAPER) >= 4.5


def test_families_differ_without_colour() -> None:
    chart = charts(STATES["every family"], WIDE)["speedup"]
    curves = [named(chart, label(family))[0] for family in LOOKS]
    shapes = {(t["marker"]["symbol"], t["marker"]["color"] == PAPER, t["line"]["dash"]) for t in curves}
    assert len(shapes) == len(LOOKS)


@pytest.mark.parametrize("most", [WIDE, PAGE, PHONE])
@pytest.mark.parametrize("panels", range(1, 8))
def test_panels_do_not_overlap(most: int, panels: int) -> None:
    frame = Frame.of([str(i) for i in range(panels)], most, 200)
    boxes = [frame.domain(i) for i in range(panels)]
    for i, ((x0, x1), (y0, y1)) in enumerate(boxes):
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1
        assert (y1 - y0) * frame.area == pytest.approx(200)
        for (u0, u1), (v0, v1) in boxes[:i]:
            assert x0 >= u1 or u0 >= x1 or y0 >= v1 or v0 >= y1
    assert frame.columns <= most
