"""Figures and texts of the page: every number is the simulator's, and what they look like can be told apart."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import defaultdict
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import stored_as, tensors_of
from test_explore_state import OWN

import simulator
from simulator.explore import layout, markup
from simulator.explore.charts import charts, roofline_chart
from simulator.explore.commands import commands
from simulator.explore.curve_charts import BOUNDS, X_TITLE
from simulator.explore.dropped import profile_token, token
from simulator.explore.layout import INK, PAGE, PAPER, PHONE, SOFT, WIDE, PanelGrid
from simulator.explore.map_chart import map_chart
from simulator.explore.page import page_html
from simulator.explore.predictions import curves, predictions, services, winners
from simulator.explore.state import AXES, EXISTING, State
from simulator.figures.paper import BATCHES, LENGTHS
from simulator.figures.style import STYLES, label
from simulator.prediction.explain import explanations
from simulator.prediction.gemms import gemm_points
from simulator.prediction.service import sentences
from simulator.pruning import general_families
from simulator.units import percent, ratio, seconds

pytest.importorskip("plotly", reason="the extra explore is not installed")

TWO, THREE = ("a100_sxm_80gb", "h100_sxm"), ("depth", "width", "low_rank")
DECODE = State(gpus=TWO, families=THREE, phase="decode", batch=8, detail="depth")
STATES = {
    "default": State(),
    "decode": DECODE,
    "generate": replace(DECODE, phase="generate", new_tokens=16, engine="hf", detail="dynamic_width", at=0.3),
    "serve": replace(DECODE, phase="serve", new_tokens=32, batch=16, engine="sglang", versus="hf"),
    "texts": replace(DECODE, families=("depth",), prune=("width mlp=0.3 heads=0.2", "shortgpt 0.25"), over="seq"),
    "a text in detail": State(phase="serve", families=("depth",), detail="depth 0.25 + width mlp=0.2"),
    "every family": State(
        families=tuple(general_families()),
        gpus=("rtx_4090",),
        engine="reference",
        dtype="fp16",
        batch=3,
        seq=777,
        detail="token",
        at=0.45,
    ),
}


@pytest.fixture(params=list(STATES))
def state(request: pytest.FixtureRequest) -> State:
    return STATES[request.param]


def named(chart: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Traces of a chart by name, one a panel."""
    return [t for t in chart["data"] if t.get("name") == name and t["x"] != [None]]


def test_curves_bands_and_bounds_are_the_predictions(state: State) -> None:
    chart, dense = charts(state, WIDE)["speedup"], workload(state)
    for panel, gpu in enumerate(state.gpus):
        hw = simulator.load_hardware(gpu)
        for family in state.drawn:
            curve = named(chart, label(family))[panel]
            for removed, drawn in zip(curve["x"], curve["y"], strict=True):
                pruned = simulator.prune(dense, family, sparsity=removed / 100)
                expected = simulator.speedup(dense, pruned, hw).speedup
                assert drawn == pytest.approx(expected, rel=1e-12)
    bands = [t["y"] for t in chart["data"] if t.get("fill") == "toself" and t["legendgroup"] == state.detail]
    for panel, gpu in enumerate(state.gpus if state.detail in state.drawn else ()):
        own = [r for r in predictions(state).table if (r.hardware, r.family) == (gpu, state.detail)]
        own.sort(key=lambda r: r.sparsity)
        for bound, title, _ in BOUNDS:
            drawn = named(chart, f"{title} ({label(state.detail)})")[panel]
            assert drawn["y"] == [getattr(r, bound) for r in own]
        assert bands[panel] == [r.speedup_upper for r in own] + [r.speedup_lower for r in reversed(own)]


def workload(state: State) -> Any:
    """The dense workload of a state."""
    new = state.new_tokens if state.phase in ("generate", "serve") else 0
    case: dict[str, Any] = {name: getattr(state, name) for name in ("phase", "batch", "seq", "dtype", "engine")}
    return simulator.lower(simulator.load_model(state.model), **case, new_tokens=new)


def test_texts_are_points_over_sparsity_and_curves_over_batch_or_length(state: State) -> None:
    drawn, field = charts(state, WIDE), "seq" if state.over == "seq" else "batch"
    for panel, gpu in enumerate(state.gpus):
        hw = simulator.load_hardware(gpu)
        for text in state.texts:
            (point,) = [named(drawn["speedup"], text)[panel]]
            dense = workload(state)
            s = simulator.speedup(dense, simulator.prune(dense, text), hw)
            assert point["y"] == [pytest.approx(s.speedup, rel=1e-12)]
            assert point["x"] == [pytest.approx(100 * s.sparsity)]
        families = [name for name in state.drawn if name != "semi_structured" or state.at == 0.5]
        for key in (*families, *state.texts):
            curve = named(drawn["over"], label(key) if key in families else key)[panel]
            assert tuple(curve["x"]) == AXES[state.over]
            dense = workload(replace(state, **{field: curve["x"][3]}))
            s = simulator.speedup(dense, simulator.prune(dense, key, state.at if key in families else None), hw)
            assert curve["y"][3] == pytest.approx(s.speedup, rel=1e-9)
            band = [t for t in drawn["over"]["data"] if t.get("fill") == "toself" and t["legendgroup"] == key]
            assert len(band) == len(state.gpus) or key != state.explained, "the pruning in detail has its interval"
    assert drawn["over"]["layout"]["xaxis"]["title"]["text"] in markup.texts(state)["h-over"]


def test_throughput_over_latency_is_of_batches_that_fit() -> None:
    state = State(
        gpus=("a100_sxm_80gb", "l4"), phase="decode", families=("depth",), detail="depth", seq=8192, devices=2
    )
    chart, found = charts(state, WIDE)["latency"], curves(state, "batch").candidates
    for panel, gpu in enumerate(("a100_sxm_80gb", "l4")):
        own = [c.result for c in found if c.result.hardware == gpu]
        dense, pruned = named(chart, "dense")[panel], named(chart, label("depth"))[panel]
        assert dense["x"] == pytest.approx([1e3 * r.dense_s for r in own if r.dense_fits])
        assert pruned["x"] == pytest.approx([1e3 * r.pruned_s for r in own if r.pruned_fits])
        assert pruned["y"] == pytest.approx([r.batch / r.pruned_s / 2 for r in own if r.pruned_fits])
        assert len(dense["x"]) < len(own), "of these batches the largest does not fit"
    assert "generates no tokens" in json.dumps(charts(State(), WIDE)["latency"])
    large = State(model="llama-2-70b", gpus=("l4",), phase="decode", families=("depth",), detail="depth", at=0.1)
    assert "no batch fits" in json.dumps(charts(large, WIDE)["latency"])


@pytest.mark.parametrize("detail", ["depth", "width mlp=0.5"])
def test_throughput_of_a_serve_is_that_of_its_services(detail: str) -> None:
    state = State(
        gpus=("a100_sxm_80gb", "h100_sxm"), phase="serve", batch=20, families=("depth",), detail=detail, at=0.25,
        tpot_ms=25.0, price=2.0,
    )  # fmt: skip
    chart, found = charts(state, WIDE)["latency"], services(state).found
    name = "depth at 25 %" if detail == "depth" else detail
    which: Any = {"family": detail, "sparsity": 0.25} if detail == "depth" else {"prune": detail}
    for panel, service in enumerate(found):
        assert service == simulator.serve(
            state.load(), state.gpus[panel], concurrency=20, tpot_s=0.025, price=2.0,
            scenario=state.scenario, **which,
        ).services[0]  # fmt: skip
        for title in ("dense", name):
            drawn = named(chart, title)[panel]
            points = [p for p in service.curve if p.name == title]
            assert drawn["x"] == pytest.approx([1e3 * p.tpot_s for p in points])
            assert drawn["y"] == pytest.approx([p.tokens_per_s for p in points])
            assert drawn["text"][-1] == f"  {points[-1].largest_concurrency}"
            assert drawn["marker"]["size"].count(12) == 1, "the state's concurrency"
    rings = [t for t in chart["data"] if t["mode"] == "markers"]
    kept = [p for service in found for p in service.kinds["within limits"]]
    assert [t["y"][0] for t in rings] == pytest.approx([p.tokens_per_s for p in kept], rel=0.05)
    assert [shape["x0"] for shape in chart["layout"]["shapes"]] == [25.0, 25.0]
    said = markup.texts(state)["about-latency"]
    for service in found:
        assert all(escape(line) in said for line in sentences(service))
    assert "a100_sxm_80gb: " in said
    assert "a million output tokens cost" in said
    assert "a ring around the most within the limits" in said


def test_a_serve_that_does_not_fit_is_a_line() -> None:
    large = State(model="llama-2-70b", gpus=("l4",), phase="serve", families=("depth",), detail="depth", at=0.1)
    assert "no model fits" in services(large).problem
    (note,) = charts(large, WIDE)["latency"]["layout"]["annotations"]
    assert "no model fits" in note["text"].replace("<br>", " ")
    assert "limits" not in markup.texts(large)["about-latency"]


def test_limits_are_fields_of_a_serve() -> None:
    made = page_html(State(tpot_ms=30.0, price=2.5), defaultdict(str), defaultdict(str))
    assert re.search(r'id="tpot"[^>]* value="30"', made)
    assert re.search(r'id="ttft"[^>]* value=""', made)
    assert re.search(r'id="price"[^>]* value="2.5"', made)


def test_two_settings_stand_side_by_side() -> None:
    a = State(phase="serve", batch=16, engine="hf", families=("depth",))
    b = replace(a, engine="vllm", gpus=TWO, detail="depth 0.25 + width mlp=0.2", pin=a)
    said = markup.texts(b)["pinned"]
    rows = dict(re.findall(r'<tr(?: class="detail")?><th scope="row">(.*?)</th>(.*?)</tr>', said))
    shown = {name: re.findall("<td>(.*?)</td>", cells) for name, cells in rows.items()}
    assert shown["GPU"] == ["h100_sxm", *TWO]
    assert shown["engine"] == ["hf", "vllm", "vllm"]
    assert shown["pruning"] == ["width at 50 %", b.detail, b.detail]
    results = [e.result for state in (a, b) for e in predictions(state).details]
    assert shown["speedup"] == [
        f"{ratio(r.speedup)} ({ratio(r.speedup_lower)} to {ratio(r.speedup_upper)})" for r in results
    ]
    assert shown["tokens/s per GPU"][0] == f"{results[0].dense_tokens_per_s:,.0f} → {results[0].tokens_per_s:,.0f}"
    assert 'class="detail"><th scope="row">engine' in said
    assert 'class="detail"><th scope="row">model' not in said
    assert predictions(b) == predictions(replace(b, pin=None))
    refused = replace(b, pin=State(gpus=("a100_sxm_80gb",), dtype="fp8"))
    assert "a100_sxm_80gb has no fp8 arithmetic" in markup.texts(refused)["pinned"]
    assert markup.texts(a)["pinned"] == ""


def test_a_text_that_the_model_does_not_take_is_a_note() -> None:
    state = State(families=("depth",), detail="depth", prune=("experts 0.25",))
    found = predictions(state)
    assert found.prunings == ()
    assert found.table
    assert any("experts" in note for note in found.notes)
    assert {c.key for c in curves(state, "batch").candidates} == {"depth"}


def test_points_stand_at_the_sparsity_asked_for_and_tell_the_realised_one() -> None:
    state = State(families=("depth",), detail="depth", sparsities=(0.3,), at=0.1)
    chart = charts(state, WIDE)["speedup"]
    assert chart["layout"]["xaxis"]["title"]["text"] == X_TITLE == "requested sparsity (%)"
    (curve,) = named(chart, "Depth")
    for x, text, r in zip(curve["x"], curve["text"], predictions(state).table, strict=True):
        assert x == 100 * r.sparsity
        assert r.sparsity != r.realised_sparsity
        assert f"{percent(r.sparsity)} requested, {percent(r.realised_sparsity)} realised" in text


@pytest.mark.parametrize("weights", ["fp8", "int8", "int4", "fp8_block", "nvfp4", "mxfp4"])
def test_formats_of_weights_are_drawn_not_a_blank(weights: str) -> None:
    state = State(families=("depth",), detail="depth", phase="decode", weights=weights)
    found = predictions(state)
    stored = "bf16" if weights == "mxfp4" else weights  # a format of routed experts alone
    assert {r.weight_dtype for r in found.table} == {stored}
    assert named(charts(state, WIDE)["speedup"], "Depth")[0]["y"] == [r.speedup for r in found.table]
    assert map_chart(state, WIDE)["data"]
    assert (f"weights {stored}" in markup.texts(state)["title"]) == (stored != "bf16")
    assert any("computed in fp8" in note for note in found.notes) == (weights in ("fp8_block", "nvfp4"))


def test_a_gpu_without_a_format_says_that_weights_alone_may_have_it() -> None:
    assert predictions(State(gpus=("a100_sxm_80gb",), dtype="fp8")).problem.endswith("; weights alone may be in fp8")


def test_a_model_is_spread_over_devices() -> None:
    state = State(model="llama-3.1-70b", families=("depth",), detail="depth", phase="decode", devices=4)
    found, said = predictions(state), markup.texts(state)
    assert {r.devices for r in found.table} == {4}
    assert "4 devices (tensor)" in said["title"]
    assert "calibrated" in said["facts"]
    assert {c.best.devices for c in winners(state)[0]} == {4}
    assert "--devices 4" in commands(state, found)[0].line


def test_a_pruned_model_that_exists_stands_beside_the_families() -> None:
    dense = simulator.load_model("llama-3.1-8b")
    real = replace(dense, layers=28, windows=dense.windows[:28], inner=11264)
    config = Path(simulator.models.library.__file__).with_name("llama-3.1-8b.json").read_text()
    config = json.dumps(json.loads(config) | {"num_hidden_layers": 28, "_name_or_path": "me/<i>"})
    state = replace(DECODE, pruned=token(config, "cut/config.json", tensors_of(real)), detail=EXISTING)
    found, chart = predictions(state), charts(state, WIDE)
    case: dict[str, Any] = {name: getattr(state, name) for name in ("phase", "batch", "seq", "dtype", "engine")}
    for panel, gpu in enumerate(state.gpus):
        hw = simulator.load_hardware(gpu)
        s = simulator.speedup(simulator.lower(dense, **case), simulator.lower(real, **case), hw).speedup
        star, bound = (named(chart["speedup"], name)[panel] for name in ("&lt;i&gt;", "FLOP bound (pruned model)"))
        assert (star["x"], star["y"]) == ([pytest.approx(24.03, abs=0.01)], [pytest.approx(s, rel=1e-12)])
        assert bound["y"] == [found.existing[panel].flop_bound]
        assert found.details[panel].result.speedup == pytest.approx(s, rel=1e-12)
    assert any("an MLP of 11,264 of 14,336" in note for note in found.notes)
    rows = markup.table_html(found, state.explained, state.at)
    assert rows.count('class="detail"') == len(state.gpus)
    assert f'<th scope="row">&lt;i&gt;</th><td>{percent(found.existing[0].sparsity)}' in rows
    assert len(markup.table_csv(found.results).splitlines()) == 1 + len(found.table) + len(state.gpus)
    assert "<i>" not in "".join(markup.texts(state)[name] for name in ("title", "facts", "notes", "about-roofline"))
    packed = token(config, "cut/config.json", stored_as("fp8_block", tensors_of(real)))
    refused = predictions(replace(state, pruned=packed))
    assert (refused.existing, refused.details) == ((), ())
    assert any(note.startswith("<i>: ") and "fp8 computes in them" in note for note in refused.notes)
    assert "fp8" in charts(replace(state, pruned=packed), WIDE)["waterfall"]["layout"]["annotations"][0]["text"]
    assert State(detail=EXISTING).explained == "depth", "none was dropped"


def test_a_profile_of_ones_own_is_predicted_with() -> None:
    state = State(gpus=(profile_token(OWN, "own.yaml"),), families=("depth",), detail="depth", phase="decode")
    found, same = predictions(state), predictions(replace(state, gpus=("rtx_3090",)))
    assert {r.hardware for r in found.table} == {"h100_sxm"}
    assert [r.speedup for r in found.table] == [r.speedup for r in same.table]
    assert [ratio(c.best.speedup) for c in winners(state)[0]] == [
        ratio(c.best.speedup) for c in winners(replace(state, gpus=("rtx_3090",)))[0]
    ]
    assert "--hardware ./own.yaml" in commands(state, found)[0].line


def test_a_profile_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    state = State(gpus=(str(path),), families=("depth",), detail="depth", phase="decode")
    slow = predictions(state).table[0].dense_s
    path.write_text(OWN.replace("936 GB/s", "1936 GB/s"))
    assert predictions(state).table[0].dense_s < 0.7 * slow


def test_waterfalls_multiply_to_the_prediction(state: State) -> None:
    found = predictions(state)
    assert len(found.details) == len(state.gpus)
    bars = [t for t in charts(state, WIDE)["waterfall"]["data"] if t["type"] == "bar"]
    drawn = [e for gpu in state.gpus for e in (*found.details, *found.versus) if e.result.hardware == gpu]
    for e, bar in zip(drawn, bars, strict=True):
        r, ends = e.result, [base + length for base, length in zip(bar["base"], bar["x"], strict=True)]
        assert (ends[0], ends[-1]) == pytest.approx((1 / (1 - r.sparsity), r.speedup), rel=1e-9)
        assert {round(b, 9) for b in bar["base"][1:-2]} <= {round(end, 9) for end in ends}, "each begins at an end"
        same = [s for s in found.table if (s.hardware, s.family, s.sparsity) == (r.hardware, state.detail, state.at)]
        same += [s for s in found.prunings if (s.hardware, s.prune) == (r.hardware, state.detail)]
        assert r.engine == state.versus or [s.speedup for s in same] == [pytest.approx(r.speedup, rel=1e-12)]


def test_points_of_the_roofline_are_the_gemms(state: State) -> None:
    """A GEMM that is not drawn has its place taken by one within a percent."""
    chart = charts(state, WIDE)["roofline"]
    for panel, e in enumerate(predictions(state).details):
        for name, workload in (("dense", e.dense), ("pruned", e.pruned)):
            points = gemm_points(workload.take(workload.layer >= 0), e.hardware)
            gemms = list(zip(points.intensity.tolist(), (points.achieved_flop_per_s / 1e12).tolist(), strict=True))
            drawn = list(zip(named(chart, name)[panel]["x"], named(chart, name)[panel]["y"], strict=True))
            assert set(drawn) <= set(gemms)
            for gemm in gemms:
                assert min(np.abs(np.log(gemm) - np.log(point)).max() for point in drawn) < math.log(1.011)
        roof = named(chart, "datasheet roofline")[panel]
        assert max(roof["y"]) * 1e12 <= e.hardware.peak_flop_per_s(state.dtype) * (1 + 1e-12)


def test_no_gemm_lies_above_the_roof_of_the_highest_clock() -> None:
    details = explanations("llama-3.1-8b", ["a100", "rtx_4090", "h100"], "width", 0.25, ["prefill"])
    chart = roofline_chart(details, WIDE)
    lines = named(chart, "at the highest clock")
    for line, e in zip(lines, details[1:], strict=True):  # the A100's datasheet is at its highest clock
        highest = e.hardware.peak_flop_per_s("bf16") * e.hardware.clock_headroom / 1e12
        assert max(line["y"]) == pytest.approx(highest)
    peak = details[1].hardware.peak_flop_per_s("bf16") / 1e12
    assert peak < max(named(chart, "dense")[1]["y"]) < max(lines[0]["y"])
    assert [line["showlegend"] for line in lines] == [True, False]


def test_the_map_is_what_tables_say(state: State) -> None:
    small = replace(state, families=state.families[:3])
    cells, _ = winners(small)
    assert len(cells) == len(small.gpus) * len(BATCHES) * len(LENGTHS)
    for i in np.random.default_rng(3).choice(len(cells), 12, replace=False):
        r, case = cells[i].best, ([small.at], [small.phase], [cells[i].best.batch], [cells[i].best.seq])
        table = simulator.table([small.load()], [r.hardware], small.drawn, *case, scenario=small.scenario)
        best = max(table, key=lambda r: r.speedup)
        assert cells[i].winner == (best.family if best.speedup > 1 else "")
        numbers = [(c.speedup, c.speedup_lower, c.speedup_upper) for c in (r, best)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-9)
        assert best.speedup_lower > 1.0 or not cells[i].certain
        assert r.dense_fits == best.dense_fits
    said = [text for t in map_chart(small, WIDE)["data"] if t.get("mode") == "markers+text" for text in t["text"]]
    assert sorted(said) == sorted(f"{c.best.speedup:.2f}" for c in cells if c.best.dense_fits)


def test_the_table_and_its_csv_are_the_records(state: State) -> None:
    found = predictions(state)
    html = markup.table_html(found, state.detail, state.at)
    assert html.count("<tr") == 1 + len(found.results) == 1 + len(found.table) + len(state.gpus) * len(state.texts)
    assert html.count('class="detail"') == len(state.gpus)
    rows = list(csv.DictReader(io.StringIO(markup.table_csv(found.table))))
    for row, r in zip(rows, found.table, strict=True):
        for name in ("speedup [1]", "pruned_s [s]", "dense_memory_bytes [B]"):
            assert float(row[name]) == getattr(r, name.partition(" ")[0])
        assert row["bottleneck"] == r.bottleneck
    numbers = {name for name, value in rows[0].items() if re.fullmatch(r"[-+0-9.e]+", value)}
    assert all("[" in name for name in numbers), "a number without a unit"


def test_what_cannot_be_predicted_is_a_line() -> None:
    half = State(families=("semi_structured",), detail="semi_structured", at=0.3)
    for bad in (half, State(gpus=("a100_sxm_80gb",), dtype="fp8")):
        found = predictions(bad)
        assert found.problem
        assert not found.table
        assert commands(bad, found) == ()
        for chart in (*charts(bad, WIDE).values(), map_chart(bad, WIDE)):
            (note,) = chart["layout"]["annotations"]
            assert chart["data"] == []
            assert note["text"].replace("<br>", " ")[:40] in found.problem
        said = markup.texts(bad)
        assert "<table" not in said["table"]
        assert "Copy" not in said["commands"]


def test_notes_say_what_the_command_line_says() -> None:
    large = State(model="llama-2-70b", gpus=("rtx_4090",), families=("depth",))
    found, said = predictions(large), markup.texts(large)
    assert any("its times are hypothetical" in note for note in found.notes)
    assert "does not fit" in said["facts"]
    assert "calibrated" in said["facts"]
    assert said["notes"].count("<li>") == len(found.notes)
    found = predictions(State(gpus=("h100_sxm", "cpu"), detail="semi_structured", families=("depth",), dtype="fp32"))
    assert {e.result.hardware for e in found.details} < {"h100_sxm", "cpu"} or found.problem
    assert found.problem or any("semi_structured" in note for note in found.notes)


@pytest.mark.parametrize("gpu", simulator.list_hardware())
def test_calibration_is_stated_as_the_records_have_it(gpu: str) -> None:
    for phase in ("prefill", "decode"):
        for dtype in {"bf16", "fp16", "fp32"} & set(simulator.load_hardware(gpu).rates):
            found = predictions(State(gpus=(gpu,), families=("depth",), detail="depth", phase=phase, dtype=dtype))
            states = [r.calibrated for r in found.table]
            assert ("calibrated except" in markup.facts_html(found, State(gpus=(gpu,)))) == (not states[0]), phase


def test_what_is_served_and_whose_kernels_run_is_told() -> None:
    serve = State(gpus=("h100_sxm", "rtx_4090"), phase="serve", batch=16, engine="sglang")
    said, found = markup.texts(serve), predictions(serve)
    r, pruned = found.table[0], found.details[0].result
    assert "concurrency 16" in said["title"]
    assert f"TTFT {seconds(r.dense_ttft_s)} → {seconds(pruned.ttft_s)}, TPOT" in said["facts"]
    assert f"{r.dense_tokens_per_s:,.0f} → {pruned.tokens_per_s:,.0f}" in said["facts"]
    assert f"largest concurrency {r.dense_largest_batch} → {pruned.pruned_largest_batch}" in said["facts"]
    assert "SGLang from 0.4 (overlap scheduler), CUDA graphs." in said["facts"]
    assert said["notes"].count("rtx_4090: sglang kernels are not calibrated") == 1
    assert "TTFT" not in markup.texts(State(phase="decode"))["facts"], "a decode step is the time itself"
    assert "concurrency" in json.dumps(map_chart(serve, WIDE)["layout"])


def test_a_measured_time_is_the_dense_time_of_one_gpu() -> None:
    one = State(phase="decode", batch=8, engine="hf", dense_ms=20.0)
    found, plain = predictions(one), predictions(replace(one, dense_ms=None))
    assert found.table[0].dense_s == pytest.approx(0.02, rel=0.02)
    assert found.notes[0].startswith("h100_sxm: 20.0 ms measured, 23.3 ms predicted: ")
    assert "not used here" in markup.texts(one)["about-crossover"]
    assert winners(one) == winners(replace(one, dense_ms=None))
    two = replace(one, gpus=TWO)
    assert predictions(two).notes[0] == "measured dense time: not used: it applies to one GPU, but 2 are selected"
    assert predictions(two).table[1].dense_s == plain.table[0].dense_s
    far = predictions(replace(one, dense_ms=2000.0))
    assert "so it is ignored; check" in far.notes[0]


def test_a_second_engine_stands_beside_without_the_measured_time() -> None:
    both = State(phase="decode", engine="hf", versus="vllm", dense_ms=20.0)
    found = predictions(both)
    assert found.versus[0].result == predictions(State(phase="decode")).details[0].result
    titles = [a["text"] for a in charts(both, WIDE)["waterfall"]["layout"]["annotations"]]
    assert titles == ["<b>H100 SXM, Transformers (eager)</b>", "<b>H100 SXM, vLLM</b>"]
    refused = State(engine="reference", versus="vllm", detail="semi_structured")
    assert predictions(refused).versus == ()
    assert any("vllm has no 2:4 kernels" in note for note in predictions(refused).notes)
    assert predictions(State(versus="vllm")).versus == (), "the same engine"


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_text_has_contrast_aa() -> None:
    css = Path(layout.__file__).with_name("assets").joinpath("explore.css").read_text()
    colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", css))
    assert len(colors) >= 7
    grounds = (colors["ground"], colors["paper"], "#e8f1f8")
    pairs = [(colors[name], ground) for name in ("ink", "soft", "accent", "good", "bad") for ground in grounds]
    pairs += [("#ffffff", colors["accent"]), ("#d3dae3", colors["ink"]), (colors["bad"], "#fdf0e9")]
    for one, other in (*pairs, (INK, PAPER), (SOFT, PAPER)):
        light, dark = sorted((luminance(one), luminance(other)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (one, other)


def test_families_differ_without_colour() -> None:
    chart = charts(STATES["every family"], WIDE)["speedup"]
    curves = [named(chart, label(family))[0] for family in general_families()]
    shapes = {(t["marker"]["symbol"], t["marker"]["color"] == PAPER, t["line"]["dash"]) for t in curves}
    assert len(shapes) == len(general_families())


@pytest.mark.parametrize("most", [WIDE, PAGE, PHONE])
@pytest.mark.parametrize("panels", range(1, 8))
def test_panels_do_not_overlap(most: int, panels: int) -> None:
    drawn = PanelGrid([str(i) for i in range(panels)], most, 200)
    layout = drawn.chart([], [{}] * panels, [{}] * panels)["layout"]
    assert layout["height"] == 24 + drawn.area + 78
    boxes = [[layout[f"{axis}axis{i or ''}"]["domain"] for axis in "xy"] for i in (0, *range(2, panels + 1))]
    for i, ((x0, x1), (y0, y1)) in enumerate(boxes):
        assert -1e-9 <= x0 < x1 <= 1 + 1e-9
        assert (y1 - y0) * drawn.area == pytest.approx(200)
        for (u0, u1), (v0, v1) in boxes[:i]:
            assert x0 >= u1 or u0 >= x1 or y0 >= v1 or v0 >= y1
    assert len({x for (x, _), _ in boxes}) <= most


def test_a_model_with_experts_is_drawn_with_them() -> None:
    state = State(
        model="qwen3-30b-a3b", gpus=("h100_sxm",), families=("depth", "experts"), detail="experts", phase="decode"
    )
    chart = charts(state, WIDE)["speedup"]
    (curve,) = named(chart, label("experts"))[:1]
    assert (curve["marker"]["symbol"], curve["line"]["dash"]) == ("star", "dashdot")


def test_every_family_has_a_sign_on_the_page() -> None:
    made = page_html(State(), defaultdict(str, markup.texts(State())), defaultdict(str))
    assert [name for name in STYLES if f"</span>{label(name)}" not in made] == []
