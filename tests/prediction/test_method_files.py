"""A method file stands wherever a pruning stands, and is shown by its name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from program import ROOT, run_python
from tables import tables_of

import simulator
from simulator.errors import InputError
from simulator.figures.pareto import fronts_of
from simulator.figures.speedup import services_of, speedups_of
from simulator.figures.style import STYLES
from simulator.prediction.pareto import fronts
from simulator.prediction.quality import load_quality
from simulator.prediction.sweep import Grid, read_grid, write_sweep
from simulator.workload import Workload

SKIP = "method: my-skip\ndynamic:\n  all: {m: 1 - s, kernel: gather}\n"
NARROW = "method: my-narrow\nprune:\n  - width: {mlp: s}\n    layers: '1:-1'\n"
ASKED: dict[str, Any] = {"models": "llama-3.1-8b", "hardware": "h100", "phase": "prefill"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two method files."""
    (tmp_path / "skip.yaml").write_text(SKIP)
    (tmp_path / "narrow.yaml").write_text(NARROW)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_texts_name_the_method_and_the_column_reproduces_it(cli: Any) -> None:
    line = "speedup llama-3.1-8b --hardware h100 --prune 'skip.yaml 0.3 + depth 0.25'"
    out = cli.out(f"{line} --prune 'narrow.yaml s=0.3'")
    assert out.startswith("my-skip 0.3 + depth 0.25 makes llama-3.1-8b ")
    assert "my-narrow at 30 % (22.6 % realised) makes " in " ".join(out.split())
    assert ".yaml" not in out
    (row,) = cli.json(line)
    assert (row["family"], row["method"]) == ("my-skip+depth", "my-skip 0.3 + depth 0.25")
    again = simulator.predict("llama-3.1-8b", row["prune"], "h100")
    assert again.speedup == row["speedup"]
    explained = cli.out(line.replace("speedup", "explain"))
    assert explained.startswith("my-skip 0.3 + depth 0.25 (47.5 % removed) of llama-3.1-8b")
    drafted = cli.out("draft llama-3.1-8b --hardware h100 --prune 'narrow.yaml 0.3'")
    assert drafted.startswith("llama-3.1-8b pruned by my-narrow 0.3 as a draft")
    assert cli.out("report llama-3.1-8b --hardware h100 --method skip.yaml,flap -o r.html")
    assert "my-skip at 25 %" in Path("r.html").read_text("utf-8")


@pytest.mark.parametrize(("line", "message"), tables_of("prediction/mistakes.yaml")["places"])
def test_other_places_refuse_it_in_one_line(cli: Any, line: str, message: str) -> None:
    Path("plan.yaml").write_text("prune: depth 0.25\n")
    Path("layered.yaml").write_text("layers:\n  4-6: skip.yaml 0.3\n")
    Path("same.yaml").write_text(SKIP.replace("gather", "dense"))
    assert message in cli.refused(f"{line.replace('M', 'llama-3.1-8b')} --hardware h100")


GRID = """\
models: llama-3.1-8b
hardware: h100
sparsities: [0.25, 0.5]
phases: decode
batches: [1, 8]
seqs: 2048
methods: [skip.yaml, flap]
prune: [narrow.yaml 0.3, skip.yaml 0.3 + depth 0.25]
"""


def test_a_grid_names_files_next_to_it_and_a_changed_file_is_computed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "grid.yaml").write_text(GRID)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    found = simulator.sweep("../grid.yaml", "out", jobs=2)
    assert set(found["method"]) == {"my-skip", "flap", "my-narrow", "my-skip 0.3 + depth 0.25"}
    assert set(found["prune"]) >= {"../skip.yaml 0.5", "../skip.yaml 0.3 + depth 0.25"}
    assert found["speedup"].tolist() == simulator.sweep("../grid.yaml")["speedup"].tolist()
    assert write_sweep("../grid.yaml", "out").resumed_parts > 0
    (folder / "skip.yaml").write_text(SKIP.replace("1 - s", "1 - s / 2"))
    assert write_sweep("../grid.yaml", "out").resumed_parts == 0
    (folder / "wrong.yaml").write_text(GRID.replace("[skip.yaml, flap]", "[gone.yaml]"))
    with pytest.raises(InputError, match=r"wrong.yaml:7:11: methods.0: .*gone.yaml"):
        read_grid("../wrong.yaml")


def halved(w: Workload, s: float) -> Workload:
    return w.replace(count=w.count * (1.0 - s / 2.0 * (w.layer >= 0)))


def test_methods_are_arguments_next_to_texts(folder: Path) -> None:
    skip = simulator.Method.read("skip.yaml")
    once = simulator.Method.of({"method": "once", "dynamic": {"attention": {"keys": "0.5"}}})
    halves = simulator.Method.of_function("halves", halved)
    found = simulator.table(**ASKED, method=[skip, "skip.yaml", halves], sparsity=0.5)
    assert [r.method for r in found] == ["my-skip", "my-skip", "halves"]
    assert found[0].speedup == found[1].speedup
    both = simulator.table(**ASKED, prune=["depth 0.25", once])
    assert [r.pruning for r in both] == ["depth at 25 %", "once"]
    served = simulator.serve("llama-3.1-8b", "h100", method=skip, sparsity=0.5)
    assert {point.name for point in served.points} == {"dense", "my-skip at 50 %"}
    axes: dict[str, Any] = {"models": ("llama-3.1-8b",), "hardware": ("h100",)}
    axes |= {"phases": ("prefill",), "batches": (1, 2), "seqs": (2048,)}
    swept = simulator.sweep(Grid(**axes, sparsities=(0.5,), methods=(skip,)), "out", jobs=2)
    assert swept["speedup"][0] == found[0].speedup
    grid = Grid(**axes, sparsities=(0.5,), methods=(halves,))
    assert len(simulator.sweep(grid)) == 2
    with pytest.raises(InputError, match="halves: expected a method of a file or a mapping"):
        simulator.sweep(grid, "other")


@pytest.mark.parametrize("keyword", ["method", "prune"])
def test_a_mapping_is_no_method(keyword: str) -> None:
    content = {"method": "once", "dynamic": {"attention": {"keys": "0.5"}}}
    for given in (content, [content]):
        with pytest.raises(InputError, match="expected a "):
            simulator.table(**ASKED, **{keyword: given})
    with pytest.raises(InputError, match=r"expected a fraction, such as my-skip 0\.5"):
        simulator.table(**ASKED, prune=simulator.Method.read("skip.yaml"))


QUALITY = """\
method,family,model,sparsity,metric,higher_is_better,dense,pruned,protocol,source
mine,skip.yaml,llama-3.1-8b,0.5,acc,true,0.7,0.68,p,s
FLAP,flap,llama-3.1-8b,0.3,acc,true,0.7,0.66,p,s
d,depth,llama-3.1-8b,0.25,acc,true,0.7,0.60,p,s
"""


def test_a_quality_table_names_files_and_methods(folder: Path, cli: Any) -> None:
    (folder / "deeper").mkdir()
    (folder / "deeper/q.csv").write_text(QUALITY.replace("skip.yaml", "../skip.yaml"))
    quality = load_quality("deeper/q.csv")
    found, _ = fronts("llama-3.1-8b", ["h100"], quality, quality.axes()[0])
    assert [(p.method, p.family) for p in found[0].points] == [
        ("mine", "my-skip"),
        ("FLAP", "width"),
        ("d", "depth"),
    ]
    legend = fronts_of(found).legends[0]
    marks = dict(zip((t.get_text() for t in legend.texts), legend.legend_handles))
    mine = marks["my-skip (mine)"]
    assert (mine.get_color(), mine.get_marker()) not in {(s.color, s.marker) for s in looks()}
    Path("q.csv").write_text(QUALITY)
    line = "speedup llama-3.1-8b --hardware h100 --prune 'skip.yaml 0.5' --csv m.csv"
    cli(line)
    Path("q.csv").write_text(QUALITY.replace("mine", "my-skip"))
    (front,) = cli.json("pareto llama-3.1-8b --hardware h100 --quality q.csv --measured m.csv")
    assert [p["measured"] for p in front["points"]] == [True, False, False]
    Path("q.csv").write_text(QUALITY.replace("skip.yaml", "gone.yaml"))
    refused = cli.refused("pareto llama-3.1-8b --hardware h100 --quality q.csv")
    assert refused.startswith("prunesim: q.csv:2: gone.yaml:1:1: ")


def looks() -> list[Any]:
    return list(STYLES.values())


def test_figures_draw_methods_unlike_families() -> None:
    prune = ["skip.yaml 0.3", "flap 0.3", "width 0.3"]
    found = simulator.table(**ASKED, prune=prune, batch=[1, 4])
    lines = [line for line in speedups_of(found).legends[0].legend_handles if line.get_label()]
    drawn = {line.get_label(): (line.get_color(), line.get_marker()) for line in lines[:3]}
    families = {(style.color, style.marker) for style in looks()}
    assert [drawn[f"{name}, 30 %"] in families for name in ("my-skip", "FLAP")] == [False, False]
    assert drawn["Width, 30 %"] == (STYLES["width"].color, STYLES["width"].marker)
    served = simulator.serve("llama-3.1-8b", "h100", prune=prune)
    lines = services_of(served.services).axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) >= 4


def test_a_known_time_needs_no_calibration() -> None:
    adds = [{"time": {"seconds": "10ms", "role": "select", "place": "before mlp"}}]
    timed = simulator.Method.of({"method": "timed", "adds": adds})
    (found,) = simulator.table(**ASKED, prune=timed)
    assert found.uncalibrated_share < 0.2
    assert found.pruned_s > 0.3


EXAMPLE = ROOT / "docs" / "examples" / "prunesim-example-family"


def test_a_package_adds_a_family(folder: Path) -> None:
    copy, target = folder / "package", folder / "installed"
    shutil.copytree(EXAMPLE, copy)
    options = f"--no-deps --no-build-isolation --no-index -q --target {target}"
    assert run_python(["-m", "pip", "install", *options.split(), str(copy)])[0] == 0

    def asked(prune: str) -> tuple[int, bytes, list[str]]:
        where = {"PYTHONPATH": f"{ROOT}{os.pathsep}{target}"}
        words = "-m simulator.cli speedup llama-3.1-8b --hardware h100 --seq 32768 --prune"
        return run_python([*words.split(), prune], environment=where)

    status, out, _ = asked("sink window=1020")
    assert (status, out[:44]) == (0, b"sink window=1020 makes llama-3.1-8b 1.22x fa")
    (points,) = target.glob("*.dist-info/entry_points.txt")
    for place, reason in (
        ("prunesim_sink:sink", "expected a simulator.Family named sink, got <function"),
        ("prunesim_sunk:FAMILY", "ModuleNotFoundError"),
        ("prunesim_sink:NONE", "AttributeError"),
    ):
        points.write_text(f"[prunesim.families]\nsink = {place}\n")
        status, out, err = asked("sink window=1020")
        assert (status, out, len(err)) == (2, b"", 1)
        assert err[0].startswith(f"prunesim: entry point {place}: {reason}")
        assert asked("depth 0.25")[0] == asked(f"{folder / 'skip.yaml'} s=0.5")[0] == 0
