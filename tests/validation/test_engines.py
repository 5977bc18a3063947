"""Engines judged end to end: what was published of whole models, serving runs, the paper's figure, words and bars."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from calibration.measurements import published
from calibration.validation import engines, serving
from calibration.validation.acceptance import SERVING
from calibration.validation.paper import figure_2
from calibration.validation.published import MISS, Comparison, median_error
from simulator.cli import run
from simulator.engines.engine import load_engine
from simulator.models.library import load_model
from simulator.units import percent

Found = Mapping[str, Sequence[Comparison]]


@pytest.fixture(scope="module")
def found() -> Found:
    """All end-to-end comparisons, which take seconds."""
    return engines.end_to_end()


def judged(found: Found, kind: str, engine: str = "") -> list[Comparison]:
    return [c for c in found[kind] if c.split == "judge" and not c.own_code and engine in ("", c.engine)]


def test_every_row_that_is_not_left_out_is_compared_and_misses_have_their_reason(found: Found) -> None:
    for kind, name in (("dense", "dense"), ("speedup", "speedups")):
        rows = [r for r in published(name) if not r["left_out"]]
        assert len(found[kind]) == len(rows)
        assert all(c.source and 0 < c.lower <= c.predicted <= c.upper and c.measured > 0 for c in found[kind])
        assert all(c.reason for c in found[kind] if abs(c.error) > MISS)
    sources = {c.source: {d.split for d in found["dense"] if d.source == c.source} for c in found["dense"]}
    assert all(len(splits) == 1 for splits in sources.values()), "a source is fitted on or judged, not both"


def test_published_rows_are_predicted_as_well_as_the_page_says(found: Found) -> None:
    assert engines.summary(judged(found, "speedup")).median <= 0.05
    assert engines.summary(judged(found, "speedup")).half_width <= 0.12
    assert engines.summary(judged(found, "dense", "trtllm")).median <= 0.08
    assert abs(engines.summary(judged(found, "dense", "trtllm")).bias) <= 0.06
    assert abs(engines.summary(judged(found, "dense", "vllm")).bias) <= 0.06
    first = [c for c in found["dense"] if c.engine == "trtllm" and "batch 1," in c.where]
    assert np.median([abs(c.error) for c in first]) <= 0.05
    assert np.median([abs(c.error) for c in found["dense"] if c.engine == "compile"]) <= 0.05


def test_depth_in_eager_transformers_given_its_dense_time(found: Found) -> None:
    depth = [c for c in found["given"] if "Shortened" in c.what and "SLEB" in c.what]
    assert len(depth) == 6
    assert all(abs(c.error) <= 0.08 and c.inside for c in depth)
    width = [c for c in found["given"] if c.own_code]
    assert all(c.predicted == pytest.approx(1.0, abs=0.01) for c in width), "the host sets the pace at any width"
    batched = [c for c in found["given"] if c.gpu == "l4" and "batch 8" in c.where]
    assert len(batched) == 6
    assert all(abs(c.error) <= 0.03 for c in batched)
    assert all(c.inside for c in found["given"] if c.gpu == "l4")


def test_serving_runs_of_a_held_out_model(found: Found) -> None:
    held_out = serving.held_out_models()
    for engine in SERVING:
        mine = [x for x in held_out if x.engine == engine and not load_model(x.model).experts]
        assert 100 * np.median(np.abs(np.expm1(np.concatenate([x.log_ratio for x in mine])))) <= SERVING[engine]
        dense = [c for c in found["serve"] if c.engine == engine and "a22b" not in c.what]
        assert 0.85 <= np.mean([c.inside for c in dense]) <= 0.985


def test_engines_hold_what_the_serving_runs_give() -> None:
    for name in SERVING:
        groups = [g for key, g in serving.fitted().items() if key[0] == name]
        found, engine = serving.fit_hosts(name, groups), load_engine({"vllm": "vllm@v1"}.get(name, name))
        assert engine.each_pass.value == pytest.approx(found.each_pass_s, rel=0.03, abs=2e-5)
        assert engine.each_sequence.value == pytest.approx(found.each_sequence_s, rel=0.05, abs=1e-6)
        assert engine.prefill_wait.value == pytest.approx(found.prefill_wait, abs=0.02)


def test_a_planted_host_is_found() -> None:
    rng, c = np.random.default_rng(0), np.array([4.0, 8, 16, 32, 64, 128] * 8)
    o = rng.choice([128.0, 512.0, 1024.0], len(c))
    groups = []
    for offset in (0.9, 1.05, 1.1):
        step, prefill = 0.006 * offset + 2e-5 * c, np.full(len(c), 0.03 * offset)
        seq, ones = np.full(len(c), 1024.0), np.ones(len(c))
        plain = serving.Group(c, o, seq, step, c * prefill, prefill, ones, ones)
        noise = np.exp(rng.normal(0.0, 0.02, (2, len(c))))
        tpot, request = plain.tpot(7e-4, 4e-5, 0.2) * noise[0], plain.request(7e-4, 4e-5) * noise[1]
        times = step / offset, c * prefill / offset, prefill / offset
        groups.append(serving.Group(c, o, seq, *times, tpot, request))
    found = serving.fit_hosts("vllm", groups)
    assert found.each_pass_s == pytest.approx(7e-4, rel=0.35)
    assert found.each_sequence_s == pytest.approx(4e-5, rel=0.25)
    assert found.prefill_wait == pytest.approx(0.2, abs=0.1)


def test_the_papers_figure_is_split_as_measured() -> None:
    parts = figure_2()
    assert {p.phase for p in parts} == {"prefill", "decode"}
    assert all(abs(p.error) <= 0.2 for p in parts)
    for phase in ("prefill", "decode"):
        mine = [p for p in parts if p.phase == phase]
        assert sum(p.predicted_s for p in mine if p.part != "all") == pytest.approx(mine[-1].predicted_s, rel=1e-6)


def test_the_command_prints_draws_and_gives_json(
    found: Found, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engines, "end_to_end", lambda: found)
    figure = tmp_path / "engines.png"
    assert run(["validate", "--end-to-end", "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    assert all(title in out for title in ("times of dense models", "speedups of pruned models", "serving runs"))
    assert max(map(len, out.splitlines())) <= 120
    assert figure.stat().st_size > 10_000
    assert run(["validate", "--end-to-end", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert {line["engine"] for line in lines} == {"compile", "hf", "reference", "sglang", "trtllm", "vllm"}
    assert run(["validate", "h100", "--end-to-end"]) == 2
    assert run(["validate", "--figure", str(figure)]) == 2


@pytest.mark.quick
def test_the_page_states_what_the_engine_files_state() -> None:
    table = engines.loads_table()
    assert table in (Path(__file__).resolve().parents[2] / "docs" / "generated" / "engines.md").read_text()
    cells = [line.strip("|").split("|") for line in table.splitlines()]
    by_engine = {name.strip(): [row[i].strip() for row in cells[2:]] for i, name in enumerate(cells[0]) if i}
    assert by_engine["hf"][:3] == ["yes", f"{len(load_engine('hf').loads['heads'].model_types)} model types", "no"]
    assert by_engine["trtllm"][4] == "llama, nemotron-nas; multiples of 256"


def test_the_conclusion_has_errors_and_coverage_of_judged_rows_and_the_worst_group(found: Found) -> None:
    first, worst = engines.of_end_to_end(found)
    for kind in ("dense", "speedup"):
        rows = judged(found, kind)
        error, inside = median_error(rows), sum(c.inside for c in rows) / len(rows)
        assert f"median error {percent(error)}, {percent(inside)} of {len(rows)} in their interval" in first
    some = {kind: judged(found, kind) for kind in ("dense", "speedup")}
    line = max((s for s in engines.summaries(some) if s.rows > 1), key=lambda s: s.median)
    assert worst.startswith(
        f"Worst, of groups of several rows: {line.engine} on {line.gpu} with {percent(line.median)} "
    )
