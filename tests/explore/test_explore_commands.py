"""The command lines that the page shows give the page's numbers."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_explore_state import TINY

from simulator.cli import run
from simulator.explore.answer import answer, winners
from simulator.explore.commands import commands
from simulator.explore.dropped import token
from simulator.explore.markup import commands_html
from simulator.explore.state import State

CASES = {
    "default": State(),
    "several GPUs, eager": State(
        gpus=("a100_sxm_80gb", "rtx_4090"), phase="decode", batch=4, runtime="eager", families=("depth", "width")
    ),
    "generate": State(phase="generate", new_tokens=7, families=("depth", "low_rank"), dtype="fp16", at=0.35),
    "one family": State(families=("width",), sparsities=(0.123456789, 0.3), at=0.3),
    "a GPU without the number format": State(gpus=("cpu", "rtx_4090"), families=("depth", "width")),
    "dropped": State(model=token(json.dumps(TINY), "my model.json"), families=("depth", "width")),
}


@pytest.fixture(params=list(CASES))
def state(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model.json").write_text(json.dumps(TINY))
    return CASES[request.param]


def printed(line: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What a command line, pasted into a shell with --json behind it, prints."""
    program, *arguments = shlex.split(line)
    assert program == "prunesim"
    assert run([*arguments, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_the_first_command_gives_the_table(state: State, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(state)
    rows = printed(commands(state, found)[0].line, capsys)
    assert [(r["hardware"], r["family"], r["sparsity"]) for r in rows] == [
        (r.hardware, r.family, r.sparsity) for r in found.table
    ]
    for row, r in zip(rows, found.table, strict=True):
        for key in (
            "speedup",
            "speedup_lower",
            "speedup_upper",
            "dense_s",
            "pruned_s",
            "flop_bound",
            "byte_bound",
            "roofline_bound",
        ):
            assert row[key] == getattr(r, key), key


def test_the_second_command_gives_the_waterfall(state: State, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(state)
    rows = printed(commands(state, found)[1].line, capsys)
    for row, e in zip(rows, found.details, strict=True):
        assert row["hardware"] == e.record.hardware
        assert [(s["name"], s["factor"]) for s in row["waterfall"]] == [(s.name, s.factor) for s in e.steps]


def test_the_third_command_gives_the_map(state: State, capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(commands(state, answer(state))[2].line, capsys)
    best: dict[tuple[Any, ...], float] = {}
    for r in rows:
        key = (r["hardware"], r["batch"], r["seq"])
        best[key] = max(best.get(key, 0.0), r["speedup"])
    cells = winners(state)
    assert len(cells.batch) == len(best)
    for i in range(len(cells.batch)):
        assert cells.speedup[i] == pytest.approx(best[cells.gpu[i], int(cells.batch[i]), int(cells.seq[i])], rel=1e-9)


def test_the_last_command_writes_the_page(state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly", reason="the extra explore is not installed")
    program, *arguments = shlex.split(commands(state, answer(state))[-1].line)
    assert program == "prunesim"
    assert run(arguments) == 0
    text = (tmp_path / "report.html").read_text()
    start = text.index('id="figures">') + len('id="figures">')
    figures = json.loads(text[start : text.index("</script>", start)])
    from simulator.explore.chart import PAGE, PHONE
    from simulator.explore.charts import charts

    same = state if not state.model.startswith("dropped:") else replace(state, model="./my model.json")
    for name, most in (("page", PAGE), ("phone", PHONE)):
        assert figures[name]["speedup"] == json.loads(json.dumps(charts(same, most)["speedup"]))
    assert capsys.readouterr().out.strip() == "report.html"


def test_what_is_refused_has_no_commands() -> None:
    state = State(gpus=("a100_sxm_80gb",), dtype="fp8")
    assert commands(state, answer(state)) == ()
    assert "Copy" not in commands_html(())


def test_commands_are_quoted_and_escaped() -> None:
    state = CASES["dropped"]
    lines = commands(state, answer(state))
    assert "'./my model.json'" in lines[0].line
    assert "<script>" not in commands_html(lines)
    assert "&#x27;./my model.json&#x27;" in commands_html(lines)
