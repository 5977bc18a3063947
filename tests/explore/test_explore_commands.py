"""The command lines that the page shows give the page's numbers."""

from __future__ import annotations

import json
import shlex
import signal
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from layouts import save, tensors_of
from test_explore_state import OWN, TINY

from simulator.cli import run
from simulator.engines import engine
from simulator.explore.address import strict_query
from simulator.explore.charts import charts
from simulator.explore.commands import commands
from simulator.explore.dropped import profile_token, token
from simulator.explore.layout import PAGE, PHONE
from simulator.explore.markup import commands_html
from simulator.explore.predictions import curves, predictions, winners
from simulator.explore.state import EXISTING, State
from simulator.hardware.library import profiles_folder
from simulator.models.huggingface import from_hf_config

TWO = ("depth", "width")
SMALL = replace(from_hf_config(TINY), inner=704)
PRUNED = token(json.dumps(TINY | {"_name_or_path": "me/small"}), "cut/config.json", tensors_of(SMALL))
CASES = {
    "default": State(),
    "several GPUs": State(
        gpus=("a100_sxm_80gb", "rtx_4090"), phase="decode", batch=4, engine="hf", families=TWO, versus="vllm"
    ),
    "generate": State(phase="generate", new_tokens=7, families=("depth", "low_rank"), dtype="fp16", at=0.35),
    "a measured time": State(phase="decode", batch=8, families=TWO, dense_ms=11.7, versus="compile"),
    "a measured time of nobody knows which GPU": State(gpus=("h100_sxm", "rtx_4090"), families=TWO, dense_ms=77.0),
    "serve": State(phase="serve", batch=16, new_tokens=9, families=TWO, engine="sglang"),
    "one family": State(families=("width",), sparsities=(0.123456789, 0.3), at=0.3),
    "a GPU without the number format": State(gpus=("cpu", "rtx_4090"), families=TWO),
    "dropped": State(model=token(json.dumps(TINY), "my model.json"), families=TWO),
    "weights and devices": State(families=TWO, phase="decode", weights="int4", devices=2),
    "weights that fp8 computes in": State(families=TWO, phase="decode", weights="fp8_block"),
    "a pruned model": State(
        model=token(json.dumps(TINY), "my model.json"), pruned=PRUNED, families=TWO, detail=EXISTING, versus="hf"
    ),
    "texts": State(
        families=("depth",), detail="width mlp=0.3 heads=0.2", prune=("shortgpt 0.25", "depth layers=0,5"), over="seq"
    ),
    "a pinned setting": State(
        families=("depth",), phase="decode", prune=("depth 0.5",), over="seq", pin=State(families=("depth",), batch=2)
    ),
    "a profile of one's own": State(gpus=(profile_token(OWN, "my own.yaml"), "rtx_4090"), families=TWO),
}
# fmt: off
SHOWN = (
    "hardware", "family", "sparsity", "speedup", "speedup_lower", "speedup_upper", "dense_s", "pruned_s", "flop_bound",
    "byte_bound", "roofline_bound",
)
# fmt: on


NEAR = ("speedup", "speedup_lower", "speedup_upper", "dense_s", "pruned_s", "realised_sparsity")


def _place(found: Any) -> tuple[Any, ...]:
    """Where a prediction stands: in a row that was printed, or on the page."""
    row = found if isinstance(found, dict) else found.result.to_dict()
    return tuple(row[name] for name in ("hardware", "batch", "seq", "pruned", "prune", "family"))


def shell(line: str, *more: str) -> None:
    program, *arguments = shlex.split(line)
    assert program == "prunesim"
    assert run([*arguments, *more]) == 0


@pytest.fixture(params=CASES.values(), ids=CASES)
def state(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model.json").write_text(json.dumps(TINY))
    (tmp_path / "my own.yaml").write_text(OWN)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text(json.dumps(TINY | {"_name_or_path": "me/small"}))
    save(tmp_path / "cut" / "model.safetensors", tensors_of(SMALL))
    found: State = request.param
    return found


def test_the_commands_give_what_the_page_shows(state: State, capsys: pytest.CaptureFixture[str]) -> None:
    found = predictions(state)
    printed: dict[str, list[dict[str, Any]]] = {}
    for command in commands(state, found)[:-1]:
        shell(command.line, "--json")
        printed[command.gives] = json.loads(capsys.readouterr().out)
    for row, r in zip(printed["curves and table"], found.table, strict=True):
        assert {key: row[key] for key in SHOWN} == {key: getattr(r, key) for key in SHOWN}
    for gives, results in (("pruned model", found.existing), ("prunings", found.prunings)):
        for row, r in zip(printed.get(gives, ()), results, strict=True):
            assert {key: row[key] for key in SHOWN} == {key: getattr(r, key) for key in SHOWN}
    rows = [row for name, some in printed.items() if " over " in name for row in some]
    for c, row in zip(sorted(curves(state, state.over).candidates, key=_place), sorted(rows, key=_place), strict=True):
        assert [row[name] for name in NEAR] == pytest.approx([getattr(c.result, name) for name in NEAR], rel=1e-9)
    if state.pin is not None:
        pinned = [e.result for e in predictions(state.pin).details]
        assert [row["speedup"] for row in printed["A, pinned"]] == [r.speedup for r in pinned]
    if "throughput" in printed:
        served = [c.result.tpot_s for c in curves(state, "batch").candidates if c.key == state.explained]
        assert sorted(row["tpot_s"] for row in printed["throughput"]) == pytest.approx(sorted(served))
    for gives, drawn in (("waterfall and roofline", found.details), (f"waterfall in {state.versus}", found.versus)):
        for row, e in zip(printed.get(gives, ()), drawn, strict=True):
            assert (row["hardware"], row["engine"]) == (e.result.hardware, e.result.engine)
            assert [(s["name"], s["factor"]) for s in row["waterfall"]] == [(s.name, s.factor) for s in e.steps]
    best: dict[tuple[Any, ...], float] = {}
    for r in printed["map"]:
        key = (r["hardware"], r["batch"], r["seq"])
        best[key] = max(best.get(key, 0.0), r["speedup"])
    cells = {(c.best.hardware, c.best.batch, c.best.seq): c.best.speedup for c in winners(state)[0]}
    assert cells == pytest.approx(best, rel=1e-9)


@pytest.mark.skipif(find_spec("plotly") is None, reason="the extra explore is not installed")
def test_the_last_command_writes_the_page(state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell(commands(state, predictions(state))[-1].line)
    assert capsys.readouterr().out.strip() == "report.html"
    embedded = (tmp_path / "report.html").read_text().partition('id="figures">')[2].partition("</script>")[0]
    typed = {"dropped:": "./my model.json"}
    same = replace(state, model=typed.get(state.model[:8], state.model))
    if state.pruned:
        same = replace(same, pruned="./cut")
    same = replace(same, gpus=tuple("./my own.yaml" if gpu.startswith("dropped:") else gpu for gpu in state.gpus))
    for name, most in (("page", PAGE), ("phone", PHONE)):
        assert json.loads(embedded)[name]["speedup"] == json.loads(json.dumps(charts(same, most)["speedup"]))


@pytest.mark.skipif(find_spec("plotly") is None, reason="the extra explore is not installed")
def test_a_report_takes_engines_by_alias_and_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = Path(engine.__file__).with_name("hf.yaml").read_text()
    Path("mine.yaml").write_text(shipped.replace("name: hf", "name: mine"))
    few = "prunesim report llama-3.2-1b --family depth --detail depth --phase serve --concurrency 16 -o r.html"
    shell(f"{few} --engine transformers --versus ./mine.yaml --dense-time 900ms")
    said = Path("r.html").read_text()
    assert "serve, concurrency 16, seq 2048 + 128 new, bf16, hf" in said
    assert "<i>--engine</i> <i>hf</i>" in said
    assert "address ?" not in said  # the page opens no files
    assert "H100 SXM, mine" in said
    assert "<i>--dense-time</i> <i>900ms</i>" in said


@pytest.mark.skipif(find_spec("plotly") is None, reason="the extra explore is not installed")
def test_a_report_takes_the_dense_time_of_a_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dense.json").write_text('{"avg_latency": 1.25, "latencies": [1.25], "percentiles": {}}')
    few = "report llama-3.1-8b --family depth --detail depth --batch 8 --seq 1024 --dense-from dense.json -o r.html"
    assert run([*few.split(), "--phase", "generate"]) == 0
    assert "--batch-size 8 --input-len 1024 --output-len 129" in capsys.readouterr().err
    assert "<i>--dense-time</i> <i>1250ms</i>" in Path("r.html").read_text()
    for more, says in (
        ("--phase decode", "phase: expected generate or prefill for vllm bench latency, got decode"),
        ("--phase generate --dense-time 1s", "--dense-from: expected one GPU in --hardware, and no --dense-time"),
    ):
        assert run([*few.split(), *more.split()]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.skipif(find_spec("plotly") is None, reason="the extra explore is not installed")
def test_a_report_is_of_the_profile_in_the_file_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = (profiles_folder() / "h100_sxm.yaml").read_text()
    Path("h100_sxm.yaml").write_text(shipped.replace("3.35 TB/s", "335 GB/s"))
    state = State(model="llama-3.2-1b", phase="decode", families=("depth",), detail="depth")
    times = [predictions(replace(state, gpus=gpu)).table[0].dense_s for gpu in (("h100_sxm",), ("h100_sxm.yaml",))]
    assert times[1] > 4 * times[0]
    shell(
        "prunesim report llama-3.2-1b --phase decode --family depth --detail depth --hardware h100_sxm.yaml -o r.html"
    )
    said = Path("r.html").read_text()
    assert f"<b>h100_sxm</b> dense {1e3 * times[1]:.1f} ms" in said
    assert "<i>--hardware</i> <i>h100_sxm.yaml</i>" in said
    assert "<dt>Page</dt><dd>none" in said  # the page would show the shipped one
    for command in ("speedup llama-3.2-1b", "gemm 1 64 64", "report llama-3.2-1b -o two.html"):
        assert run([*command.split(), "--hardware", "h100,h100_sxm.yaml"]) == 2
        assert "two profiles are called h100_sxm" in capsys.readouterr().err


def test_what_a_report_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for options, says in (
        ("--engine vlm", "engine 'vlm' is unknown"),
        ("--concurrency 4", "expected with --phase serve"),
        ("--dense-time 18", "the unit is missing"),
        ("--dense-time 0ms", "expected a positive number of milliseconds"),
    ):
        assert run(["report", "llama-3.2-1b", "-o", "r.html", *options.split()]) == 2
        assert says in capsys.readouterr().err


def test_commands_are_quoted_and_escaped() -> None:
    state = CASES["dropped"]
    lines = commands(state, predictions(state))
    assert "'./my model.json'" in lines[0].line
    assert "&#x27;./my model.json&#x27;" in commands_html(lines)


def test_explore_begins_with_prunings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    app = pytest.importorskip("simulator.explore.app", reason="needs dash")
    served = SimpleNamespace(port=1, serve_forever=lambda: None, server_close=lambda: None)
    monkeypatch.setattr(app, "server", lambda port, paths: served)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        line = ["explore", "--no-browser", "--json", "--prune", "depth 0.25", "--prune", "width mlp=0.3 layers=0,4-9"]
        assert run(line) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    state = strict_query(urlsplit(json.loads(capsys.readouterr().out)["url"]).query)
    assert state.prune == ("depth 0.25", "width mlp=0.3 layers=0,4-9")
    for text, reason in {"plan.yaml": "the page opens no files", "width mpl=0.3": "column 7: part or option"}.items():
        assert run(["explore", "--no-browser", "--prune", text]) == 2
        assert reason in capsys.readouterr().err
