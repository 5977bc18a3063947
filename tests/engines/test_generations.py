"""Generations: a version or a name selects one, results name it, and its host decides the
prediction."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simulator
from simulator.engines.engine import check_engine, list_engines, load_engine, numbers, reached
from simulator.errors import InputError
from simulator.figures.style import engine_title
from simulator.prediction.requests import requests_of

pytestmark = pytest.mark.quick

FILE = """\
schema_version: 1
name: mine
title: "An engine"
stacks: [vllm]
sources:
  bench: "a benchmark, https://example.org/bench"
launches: {mlp_norm: 7, rotary: 2}
host:
  pass: {value: 1 ms, log_sd: 0.3, source: bench}
  sequence: {value: 20 us, log_sd: 0.2, source: bench}
generations:
  - {name: first, since: "0", title: "Before 0.8", source: bench}
  - name: second
    since: "0.8"
    title: "From 0.8"
    source: bench
    launches: {mlp_norm: 1}
    host:
      pass: {value: 0.1 ms, log_sd: 0.9, source: bench}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    ("text", "generation"),
    [
        ("vllm", "async"),
        ("vllm@0.6", "v0"),
        ("vllm@0.7.3", "v0"),
        ("vllm@0.8", "v1"),
        ("vllm@0.13.0+cu129", "v1"),
        ("vllm@0.14.0rc1", "async"),
        ("vllm@1.0.0rc3", "async"),
        ("vllm@v1", "v1"),
        ("sglang@0.5.6.post2", "overlap"),
        ("hf@4.53", "touched"),
        ("hf@5.0.0", "grouped"),
    ],
)
def test_a_version_or_a_name_selects_a_generation(text: str, generation: str) -> None:
    engine = load_engine(text)
    assert engine.generation == generation
    assert engine.title == next(g.title for g in engine.generations if g.name == generation)
    assert engine is load_engine(text)
    name, at, version = text.lower().partition("@")
    assert engine.name == load_engine(name).name + at + version


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "vllm@next",
            (
                "engine 'vllm@next': expected a version such as 0.14, or a generation: v0 (from 0),"
                " v1 (from"
            ),
        ),
        ("vllm@v2", "engine 'vllm@v2': expected a version"),
        ("vllm@999", "engine 'vllm@999': expected a version"),
        ("vllm@0.0", "engine 'vllm@0.0': expected a version"),
        ("vllm@0.1.", "engine 'vllm@0.1.': expected a version"),
        ("compile@1.0", "engine 'compile@1.0': compile has no generations; expected compile"),
        ("vlm@0.19", "engine 'vlm' is unknown; did you mean vllm"),
        ("vllm@", "engine 'vllm@' is unknown; did you mean vllm"),
        ("@0.19", "engine '@0.19' is unknown"),
    ],
)
def test_what_selects_no_generation_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load_engine(text)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [n for n in list_engines() if load_engine(n).generations])
def test_every_shipped_generation_has_a_source_and_rises(name: str) -> None:
    engine = load_engine(name)
    assert engine.generation == engine.generations[-1].name
    for before, after in pairwise(engine.generations):
        since = numbers(after.since)
        assert reached(since, before.since)
    for generation in engine.generations:
        one = load_engine(f"{name}@{generation.name}")
        assert generation.source in one.sources
        for value in (one.gap, one.each_pass, one.each_sequence):
            assert (value.source in one.sources) == (value.log_sd > 0.0) == (value.value > 0.0)


def test_a_generation_overrides_what_it_names_and_nothing_else(mine: Path) -> None:
    assert check_engine(str(mine)) == []
    newest, first = load_engine(str(mine)), load_engine(f"{mine}@0.7")
    assert (newest.name, newest.title, first.name, first.title) == (
        "mine",
        "From 0.8",
        "mine@0.7",
        "Before 0.8",
    )
    named = load_engine(f"{mine}@second")
    assert (named.each_pass.value, named.each_pass.log_sd, first.each_pass.value) == (
        1e-4,
        0.9,
        1e-3,
    )
    assert newest.each_sequence == first.each_sequence
    assert (dict(newest.launches), dict(first.launches)) == (
        {"mlp_norm": 1, "rotary": 2},
        {"mlp_norm": 7, "rotary": 2},
    )
    assert load_engine(f"{mine}@second").launches == newest.launches


def test_a_name_without_a_release_means_some_recent_release(mine: Path) -> None:
    """The host may be that of the generation before: ten times as slow in this file."""
    bare, named = load_engine(str(mine)), load_engine(f"{mine}@second")
    assert bare.each_pass.value == named.each_pass.value
    apart = np.log(10.0) / 2.0
    assert bare.each_pass.log_sd == pytest.approx(np.hypot(named.each_pass.log_sd, apart))
    settings = {"phase": "decode", "batch": 128}
    some, newest, before = (
        simulator.predict("qwen2.5-7b", "depth 0.25", "h100", engine=engine, **settings)
        for engine in ("vllm", "vllm@0.20", "vllm@0.11")
    )
    assert some.dense_s == newest.dense_s
    assert some.dense_lower <= newest.dense_lower
    assert newest.dense_upper < some.dense_upper
    assert some.dense_lower < before.dense_s < some.dense_upper
    assert newest.upper - newest.lower < some.upper - some.lower


def test_a_note_names_releases_outside_the_interval() -> None:
    def notes(engine: str) -> list[str]:
        found = simulator.table(
            ["qwen2.5-7b"], ["h100"], prune=["depth 0.25"], phase="decode", batch=128, engine=engine
        )
        return [note for note in found.notes if "other releases" in note]

    (note,) = notes("vllm")
    assert note.startswith("h100_sxm: at batch 128, other releases are outside the interval (vLLM")
    assert note.endswith("name yours, such as --engine vllm@v0")
    assert not notes("vllm@0.20") + notes("sglang@0.5.10")


@pytest.mark.parametrize(
    ("old", "new", "place", "reason"),
    [
        (
            'since: "0.8"',
            'since: "next"',
            "14:12: generations.1.since",
            "expected a version in quotes",
        ),
        ('since: "0.8"', "since: 0.8", "14:12: generations.1.since", "put it in quotes"),
        (
            'since: "0.8"',
            'since: "0"',
            "13:5: generations.1",
            "expected a later version than the one before",
        ),
        (
            "name: second",
            "name: first",
            "12:3: generations",
            "expected generations with different names",
        ),
        (
            "    source: bench\n",
            "    source: guess\n",
            "16:13: generations.1.source",
            "is not listed under sources",
        ),
    ],
)
def test_what_is_wrong_with_a_generation_is_said_with_its_place(
    mine: Path, old: str, new: str, place: str, reason: str
) -> None:
    assert FILE.count(old) == 1
    mine.write_text(FILE.replace(old, new))
    line, *_ = check_engine(str(mine))
    assert line.startswith(f"{mine}:{place}: "), line
    assert reason in line


def test_results_name_the_version_and_two_versions_are_two_rows(cli: Any) -> None:
    asked = ["vllm@0.6", "vllm@0.19", "VLLM@0.19", "vllm"]
    found = requests_of(["llama-3.2-1b"], {"engine": asked})
    assert [load_engine(one.engine).name for one in found] == ["vllm@0.6", "vllm@0.19", "vllm"]
    line = (
        "llama-3.2-1b --hardware h100 --family depth --sparsity 0.25 --phase decode --batch"
        " 8 --seq 512"
    )
    table = cli.out(f"speedup {line} --engine {','.join(asked)} --csv -")
    header, *rows = (row.split(",") for row in table.splitlines())
    assert [row[header.index("engine")] for row in rows] == ["vllm@0.6", "vllm@0.19", "vllm"]
    times = [float(row[header.index("dense_s")]) for row in rows]
    assert times[0] > times[1] == times[2]
    assert (engine_title("vllm@0.19"), engine_title("vllm@v1")) == ("vLLM 0.19", "vLLM v1")
    assert "vllm@0.19" in cli.out(f"explain {line} --engine vllm@0.6,vllm@0.19")
    shown = cli.out("engines show vllm@0.9")
    for part in (
        "vllm@v0, from 0:",
        "vllm@v1, from 0.8:",
        "(these values)",
        "vllm@async, from 0.14:",
        "440 us",
    ):
        assert part in shown


@pytest.mark.parametrize("phase", ["decode", "serve"])
@pytest.mark.parametrize("key", ["pass", "sequence"])
def test_the_spread_of_hosts_is_in_the_interval_of_a_speedup(
    tmp_path: Path, phase: str, key: str
) -> None:
    def width(sd: float) -> float:
        path = tmp_path / f"{sd}.yaml"
        text = (
            FILE.partition("generations:")[0]
            .replace("log_sd: 0.3", "log_sd: 0.01")
            .replace("0.2,", "0.01,")
        )
        value = {"pass": ("value: 1 ms, log_sd: 0.01", f"value: 1 ms, log_sd: {sd}")}.get(
            key, ("value: 20 us, log_sd: 0.01", f"value: 200 us, log_sd: {sd}")
        )
        path.write_text(text.replace(*value))
        options: dict[str, Any] = {"phase": phase, "batch": 16, "seq": 512, "engine": str(path)}
        dense = simulator.lower(
            "llama-3.2-1b",
            new_tokens=64 if phase == "serve" else 0,
            **options,
        )
        s = simulator.speedup(dense, simulator.prune(dense, "depth", 0.5), "h100")
        return float(np.log(s.upper / s.lower))

    assert width(1.0) > 1.5 * width(0.02)


@pytest.mark.parametrize(("removed", "least"), [(0.2, 0.0), (0.45, 0.1), (0.6, 0.15), (0.8, 0.29)])
def test_a_measured_time_leaves_its_split_between_pass_and_layers_open(
    removed: float, least: float
) -> None:
    model, hw = simulator.load_model("llama-2-7b"), simulator.load_hardware("h100")
    dense = simulator.lower(model, phase="decode", batch=1, seq=128, engine="hf")
    depth, width = (simulator.prune(dense, family, removed) for family in ("depth", "width"))
    given = simulator.speedup(dense, depth, hw, dense_s=18.6e-3)
    assert given.lower <= (1.0 - least) * given.speedup
    narrow = simulator.speedup(dense, width, hw, dense_s=18.6e-3)
    assert narrow.lower > 0.96 * narrow.speedup  # as many layers: the split does not matter
    assert given.dense_upper / given.dense_lower < 1.05
