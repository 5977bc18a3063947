"""Sweeps: the table equals one-by-one predictions, bad grids are refused, and nothing harms a table."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grids import GRID

import simulator
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.save import save_hardware
from simulator.prediction.grid import Formats, Grid, read_grid
from simulator.prediction.labels import plain
from simulator.prediction.prunings import Pruning
from simulator.prediction.result import COLUMNS, Result
from simulator.prediction.store import DIGEST_KEY, TableStore
from simulator.prediction.sweep import digest, pieces, sweep, sweep_results
from simulator.prediction.where import parse_filter
from simulator.prediction.workers import windowed

parquet = pytest.importorskip("pyarrow.parquet", reason="tables need pyarrow")

ONE = Grid(("llama-3.2-1b",), ("h100_sxm",), (0.5,), ("decode",), (1,), (64,))
"""One point, every family."""

SMALL = replace(
    ONE, hardware=("h100_sxm", "a100_sxm_80gb"), sparsities=(0.1, 0.5), phases=("prefill", "decode"), batches=(1, 48),
    seqs=(64, 2048), engines=("reference", "hf"),
)  # fmt: skip

MIXED = replace(
    ONE, phases=("generate",), batches=(2,), seqs=(100,), dtypes=(Formats("bf16", "int4", "fp8"),), devices=(1, 2),
    new_tokens=6, families=tuple(Pruning.of(name) for name in ("depth", "token", "kv_cache", "dynamic_depth")),
)  # fmt: skip


@pytest.mark.parametrize("grid", [SMALL, MIXED], ids=["small", "mixed"])
def test_a_sweep_equals_tables_of_one_request_each(grid: Grid) -> None:
    found = sweep_results(grid)
    columns = {name: plain(column) for name, column in found.columns.items()}
    keys = ("model", "hardware", "family", "sparsity", "phase", "batch", "seq", "engine", "devices")
    left = {key: i for i, key in enumerate(zip(*(columns[name].tolist() for name in keys)))}
    assert len(left) == len(columns["speedup"])
    axes = ([p.family for p in grid.families], grid.sparsities, grid.phases, grid.batches, grid.seqs)
    for engine, devices in itertools.product(grid.engines, grid.devices):
        setting = grid.scenario("", grid.dtypes[0], engine, devices, "prefill", ())
        table = simulator.table(grid.models, grid.hardware, *axes, scenario=setting)
        assert found.notes == tuple(n for n in table.notes if "excluded" in n)
        for record in table:
            i = left.pop(tuple(getattr(record, name) for name in keys))
            for name, value in asdict(record).items():
                wanted = np.nan if value is None else value
                if isinstance(wanted, float):
                    wanted = pytest.approx(wanted, rel=1e-9, abs=1e-12, nan_ok=True)
                assert columns[name][i] == wanted, name
    assert not left


def test_options_are_a_column_and_change_the_result() -> None:
    families = (Pruning.of("width"), Pruning.of("width", options={"align": 512}))
    columns = sweep_results(replace(ONE, families=families, sparsities=(0.3,), phases=("prefill",))).columns
    assert list(columns) == list(COLUMNS) == [f.name for f in fields(Result)]
    assert plain(columns["options"]).tolist() == ["", "align=512"]
    assert columns["realised_sparsity"][0] > columns["realised_sparsity"][1]


def test_devices_that_cannot_run_a_format_are_left_out_with_a_note() -> None:
    families, formats = (Pruning.of("depth"),), (Formats("fp8"),)
    grid = replace(ONE, hardware=("a100_sxm_80gb", "h100_sxm"), families=families, dtypes=formats)
    found = sweep_results(grid)
    (note,) = found.notes
    assert [r.hardware for r in found] == ["h100_sxm"]
    assert "a100_sxm_80gb has no fp8" in note


def test_pieces_cover_the_grid_once_and_are_bounded() -> None:
    grid = replace(
        ONE, models=("llama-3.2-1b", "llama-3.1-8b"), sparsities=tuple(i / 1000 for i in range(1, 900)),
        phases=("prefill", "generate"), batches=tuple(range(1, 41)), seqs=tuple(range(64, 114)),
    )  # fmt: skip
    found = list(pieces(grid))
    sizes = [len(one.shapes) * len(prunings) for one, prunings in found]
    assert sum(sizes) == grid.size
    assert max(sizes) <= 40_000
    some = found[:40]
    points = {(one.model, one.phase, shape, p) for one, prunings in some for shape in one.shapes for p in prunings}
    assert len(points) == sum(sizes[:40])


def test_processes_and_filter_give_the_same_table(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    one = sweep(SMALL, tmp_path / "one.parquet", progress=lambda done, of: steps.append((done, of)))
    assert steps[-1] == (SMALL.size, SMALL.size)
    rows = parquet.read_table(one.target).to_pylist()
    assert one.rows == len(rows) == SMALL.size * 21 // 22  # 2:4 only at 0.5
    assert sweep(SMALL, tmp_path / "two.parquet", jobs=2).target.read_bytes() == one.target.read_bytes()
    few = sweep(SMALL, tmp_path / "few.parquet", where="speedup > 1.3 and batch == 1 and family in ['depth', 'width']")
    wanted = [r for r in rows if r["speedup"] > 1.3 and r["batch"] == 1 and r["family"] in ("depth", "width")]
    assert parquet.read_table(few.target).to_pylist() == wanted != []
    assert not list(tmp_path.glob("*.parts"))


def test_a_finished_sweep_is_not_done_again_and_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    first, again = sweep(SMALL, out), sweep(SMALL, out)
    assert (again.rows, again.resumed) == (first.rows, again.partitions)
    with pytest.raises(InputError, match="exists and is the table of another sweep"):
        sweep(SMALL, out, where="batch == 1")
    out.write_text("notes")
    with pytest.raises(InputError, match="exists and is not the table of a sweep"):
        sweep(SMALL, out)
    assert out.read_text() == "notes"


@pytest.mark.parametrize("manifest", ['{"digest": "other", "parts": 1}', "{half"])
def test_parts_of_another_grid_are_refused(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "t.parquet.parts").mkdir()
    (tmp_path / "t.parquet.parts" / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match="parts of another sweep"):
        sweep(SMALL, tmp_path / "t.parquet")


def test_two_sweeps_into_one_file_are_told_apart(tmp_path: Path) -> None:
    def second(done: int, of: int) -> None:
        sweep(SMALL, tmp_path / "t.parquet")

    with pytest.raises(InputError, match="another sweep is writing it"):
        sweep(SMALL, tmp_path / "t.parquet", progress=second)


def test_a_lock_that_its_owner_removed_excludes_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that waits while another one ends: the lock it opened is gone, so it takes a new one."""
    fcntl = pytest.importorskip("fcntl")
    lock, left = fcntl.flock, [1]

    def ending(file: Any, how: int) -> None:
        lock(file, how)
        if left.pop() if left else 0:  # the other sweep removes its folder
            shutil.rmtree(tmp_path / "t.parquet.parts")

    store = TableStore(tmp_path / "t.parquet", "d", 1)
    monkeypatch.setattr(fcntl, "flock", ending)
    with store.opened({}):
        assert (store.folder / "lock").exists()
        with pytest.raises(InputError, match="another sweep is writing it"), store.opened({}):
            pass


def test_a_file_that_another_sweep_wrote_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    sweep(SMALL, out)
    for other, says in (("other", "exists and is the table of another sweep"), (None, "has just written it")):
        store = TableStore(out, other or parquet.read_schema(out).metadata[DIGEST_KEY].decode(), 1)
        with pytest.raises(InputError, match=says), store.opened({}):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


KILLED = """
import os, signal, sys
from simulator.prediction.result import COLUMNS, Result, plain
from simulator.prediction.sweep import sweep

if __name__ == "__main__":
    def stop(done, of):
        if done >= int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
    sweep(sys.argv[1], sys.argv[2], jobs=int(sys.argv[4]), progress=stop)
"""


def command(folder: Path, script: str, *arguments: object, grid: str = GRID) -> list[str]:
    """That runs a script with a grid's file and a table's."""
    (folder / "grid.yaml").write_text(grid)
    (folder / "run.py").write_text(script)
    files = (folder / name for name in ("run.py", "grid.yaml", "t.parquet"))
    return [sys.executable, *map(str, (*files, *arguments))]


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
def test_kill_9_loses_no_part_and_the_rerun_finishes(tmp_path: Path) -> None:
    """Between two parts; at any moment and with workers: tests/cli/test_kills.py."""
    killed = subprocess.run(command(tmp_path, KILLED, 1, 1), timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    there = list((tmp_path / "t.parquet.parts").glob("part-*.parquet"))
    out, seen = tmp_path / "t.parquet", []
    assert not out.exists()
    done = sweep(tmp_path / "grid.yaml", out, progress=lambda n, _: seen.append(n))
    assert done.resumed == len(there) > 0
    assert seen[0] > 0
    clean = sweep(tmp_path / "grid.yaml", tmp_path / "clean.parquet")
    assert clean.target.read_bytes() == out.read_bytes()
    assert done.notes == clean.notes


@pytest.mark.skipif(os.name != "posix", reason="POSIX processes")
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    wait = "print('ready', flush=True); import time; time.sleep(60)"
    script = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", wait)
    with subprocess.Popen(command(tmp_path, script, 1, 2), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)


def test_the_digest_follows_grid_filter_and_profile(tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    save_hardware(load_hardware("h100_sxm"), profile)
    grid = replace(ONE, hardware=(str(profile),))
    first = digest(grid)
    assert first == digest(grid) != digest(grid, "batch == 1")
    profile.write_text(profile.read_text() + "\n# changed\n")
    assert digest(grid) != first


def test_windowed_never_has_more_under_way_than_asked() -> None:
    under_way: list[Future[bytes]] = []

    def submit(index: int) -> Future[bytes]:
        under_way.append(Future())
        future = under_way[-1]
        assert len(under_way) <= 3
        while len(under_way) >= 3 or (under_way and index >= 8):
            under_way.pop(0).set_result(bytes([index]))
        return future

    assert sorted(index for index, _ in windowed(submit, range(10), 3)) == list(range(10))


GOOD = {
    "models": "[llama-3.1-8b, qwen3-8b]",
    "hardware": "h100",
    "families": "[depth, {width: {align: 64}}]",
    "sparsities": "{from: 0.1, to: 0.5, step: 0.1}",
    "phases": "[prefill]",
    "batches": "{from: 1, to: 8, times: 2}",
    "seqs": "[128]",
    "dtypes": "[bf16, {dtype: bf16, weight_dtype: int4}]",
    "engines": "[hf]",
    "devices": "[1, 2]",
    "level": "0.8",
    "ideal": "true",
}


def grid_text(axes: dict[str, str]) -> str:
    return "".join(f"{name}: {value}\n" for name, value in axes.items())


def test_a_grid_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(grid_text(GOOD))
    grid = read_grid(tmp_path / "g.yaml")
    assert grid.hardware == ("h100_sxm",)
    assert grid.families == (Pruning.of("depth"), Pruning.of("width", options={"align": 64}))
    assert grid.sparsities == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert grid.batches == (1, 2, 4, 8)
    assert grid.dtypes == (Formats(), Formats("bf16", "int4"))
    assert (grid.level, grid.ideal, grid.devices, grid.engines) == (0.8, True, (1, 2), ("hf",))
    assert grid.size == 2 * 2 * 5 * 4 * 2 * 2


def test_published_methods_are_an_axis_beside_families_or_in_their_place(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(grid_text(GOOD | {"methods": "[shortgpt, mod]"}))
    assert [f.method for f in read_grid(tmp_path / "g.yaml").families] == ["", "", "shortgpt", "mod"]
    grid = replace(ONE, families=(), methods=("shortgpt", "llm-pruner", "sheared-llama"), sparsities=(0.25, 0.9))
    found = sweep_results(grid, "method != 'sheared-llama'")
    assert [(r.method, r.family, r.sparsity) for r in found] == [
        ("shortgpt", "depth", 0.25), ("shortgpt", "depth", 0.9), ("llm-pruner", "width", 0.25),
    ]  # fmt: skip
    assert any("prunes 10 of 16 layers" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batches", "[]", r":6:10: batches: is an empty list"),
        ("methods", "[shortgtp]", r"methods\.0: .*did you mean shortgpt"),
        ("batchs", "[1]", r":13:1: batchs: unknown key; did you mean batches\?"),
        ("models", "[llama-3.1-9b]", r"models\.0: .*llama-3\.1-8b"),
        ("hardware", "[h101]", r":2:12: hardware\.0: .*h100"),
        ("families", "[widht]", r"families\.0: .*did you mean width"),
        ("families", "[{width: {algin: 1}}]", r"algin: unknown option; did you mean align"),
        ("families", "[{width: {align: 0}}]", r"0\.width: option align: expected a whole number"),
        ("sparsities", "[25]", r":4:14: sparsities\.0: sparsity 25: expected a fraction.*write 0\.25"),
        ("batches", "[two]", r"batches\.0: expected a whole number, got two"),
        ("batches", "[0]", r"batches\.0: expected a whole number from 1"),
        ("batches", "{from: 8, to: 1, times: 2}", r"batches\.to: expected at least the start"),
        ("batches", "{from: 1, to: 8, times: 2, step: 1}", r"batches: expected either step or times"),
        ("seqs", "{from: 1, to: 1000000, step: 1}", r"seqs\.step: makes more than 100000 values"),
        ("phases", "[prefil]", r"phases\.0: .*did you mean prefill"),
        ("ideal", "yes", r"ideal: expected true or false"),
        ("engines", "[vlm]", r":9:11: engines\.0: .*did you mean vllm"),
        ("seqs", "[2000000000]", r"seqs: batch 8 x seq 2000000000: expected at most"),
        ("cached_prefix", "100000", r":13:16: cached_prefix: expected whole tokens below the \d+ of the prompt"),
    ],
)
def test_bad_grids_are_refused_with_their_place(tmp_path: Path, name: str, value: str, message: str) -> None:
    refuse_grid(tmp_path, grid_text({**GOOD, name: value}), message)


def test_grids_without_an_axis_are_refused(tmp_path: Path) -> None:
    text = grid_text({name: value for name, value in GOOD.items() if name != "seqs"})
    refuse_grid(tmp_path, text, r"seqs: is missing")
    refuse_grid(tmp_path, text + "seq: 1\n", r":12:1: seq: unknown key; did you mean seqs\? \(and 1 more\)")
    refuse_grid(tmp_path, "- 1", r"expected a mapping")
    refuse_grid(tmp_path, "", r"is empty")


def refuse_grid(folder: Path, text: str, message: str) -> None:
    path = folder / "g.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        sweep(path, folder / "t.parquet")
    assert str(error.value).startswith(f"{path}:")
    assert "\n" not in str(error.value)
    assert not list(folder.glob("t.parquet*"))


def test_grids_too_large_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"704 configurations, more than 100 \(--max\)"):
        sweep(SMALL, tmp_path / "t.parquet", most=100)
    monkeypatch.setattr("simulator.prediction.store.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"t.parquet: expected 84.5 kB of free disk while it is written, got 1 kB;"):
        sweep(SMALL, tmp_path / "t.parquet")
    assert not (tmp_path / "t.parquet").exists()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("speed > 1", "did you mean speedup"),
        ("speedup >", "cannot be read"),
        ("speedup > 1" + "0" * 400, "cannot be read"),
        ("speedup", "expected a condition"),
        ("not speedup", "is a number, expected a condition"),
        ("speedup > 'fast'", "is a text, expected a number"),
        ("family > 'a'", "unsupported comparison"),
        ("batch in []", "unsupported comparison"),
        ("__import__('os').system('true')", "is not allowed"),
        ("speedup.real > 1", "is not allowed"),
        ("[x for x in (1,)]", "is not allowed"),
        ("(lambda: 1)() > 0", "is not allowed"),
        ("speedup ** 99 > 1", "is not allowed"),
        ("(" * 300 + "speedup" + ")" * 300 + " > 1", "--where"),
        ("x" * 3000, "at most 2000 characters"),
    ],
)
def test_bad_filters_are_refused(where: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        sweep(SMALL, "t.parquet", where=where)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_filters_mean_what_python_would_say() -> None:
    table = {
        "speedup": np.array([0.9, 1.2, 1.5, np.nan]),
        "batch": np.array([1, 8, 8, 64]),
        "family": np.array(["depth", "width", "depth", "token"], dtype=object),
        "calibrated": np.array([True, False, True, False]),
    }
    kinds = {"speedup": float, "batch": int, "family": str, "calibrated": bool}
    for text in (
        "1 < speedup < 1.4", "batch in (8, 64) and not calibrated", "family == 'depth' or batch * 2 >= 128",
        "family not in ['depth']", "calibrated", "calibrated == false", "-batch < -4 and speedup / batch > 0.16",
        "not (speedup > 1)", "true", "batch - 1 + 1 == 8",
    ):  # fmt: skip
        rows = [{n: c[i] for n, c in table.items()} for i in range(4)]
        wanted = [bool(eval(text, {}, {"true": True, "false": False, **row})) for row in rows]
        assert parse_filter(text, kinds)(table.__getitem__, 4).tolist() == wanted, text


def test_a_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r'"tables" \(pyarrow is not installed\): .* pip install -e "\.\[tables\]"'):
        sweep(ONE, tmp_path / "t.parquet")
    assert not list(tmp_path.iterdir())


def test_texts_of_prunings_need_no_sparsities(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("layers:\n  0-7: width mlp=0.5\n")
    (tmp_path / "grid.yaml").write_text(
        "models: llama-3.2-1b\nhardware: h100\nphases: decode\nbatches: [1, 8]\nseqs: 128\n"
        f"prune: [width mlp=0.3 heads=0.25, kv_cache budget=64, {plan}]\n"
    )
    grid = read_grid(tmp_path / "grid.yaml")
    assert (grid.size, grid.families, grid.sparsities) == (6, (), ())
    found = sweep_results(grid)
    assert plain(found.columns["prune"]).tolist() == ["width mlp=0.3 heads=0.25", "kv_cache budget=64", str(plan)] * 2
    before = digest(grid)
    plan.write_text("layers:\n  0-7: width mlp=0.25\n")
    assert digest(read_grid(tmp_path / "grid.yaml")) != before  # the content of a plan counts
    frame = simulator.sweep(tmp_path / "grid.yaml", tmp_path / "rows.parquet")
    again = simulator.sweep(read_grid(tmp_path / "grid.yaml"))
    assert frame["speedup"].tolist() == pytest.approx(again["speedup"].tolist())
    assert frame.attrs["notes"] == []
    for text, message in {
        "prune: width mpl=0.3": "prune: pruning 'width mpl=0.3', column 7: part or option of width 'mpl' is unknown",
        "": "sparsities: is missing",
    }.items():
        (tmp_path / "bad.yaml").write_text(
            f"models: llama-3.2-1b\nhardware: h100\nphases: decode\nbatches: 1\nseqs: 128\n{text}\n"
        )
        with pytest.raises(InputError, match=re.escape(message)):
            read_grid(tmp_path / "bad.yaml")


def stopped(folder: Path, grid: Grid) -> Path:
    """The folder of the parts of a sweep into ``folder/t.parquet`` that was stopped after its first part."""

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(grid, folder / "t.parquet", progress=stop)
    return folder / "t.parquet.parts"


PARTS = replace(ONE, engines=("reference", "hf"), phases=("prefill", "decode"))
"""A grid of four parts."""


@pytest.mark.parametrize("change", ["another grid", "another index", "half of its rows", "half of its bytes"])
def test_a_part_of_another_grid_or_index_or_without_all_rows_is_computed_again(tmp_path: Path, change: str) -> None:
    clean = sweep(PARTS, tmp_path / "clean.parquet")
    assert clean.partitions == 4
    (first,) = stopped(tmp_path, PARTS).glob("part-*")
    if change == "another grid":
        (tmp_path / "other").mkdir()
        (other,) = stopped(tmp_path / "other", replace(PARTS, sparsities=(0.25,))).glob("part-*")
        first.write_bytes(other.read_bytes())
    elif change == "another index":
        (first.parent / "part-000002.parquet").write_bytes(first.read_bytes())
    elif change == "half of its rows":
        whole = parquet.read_table(first)
        parquet.write_table(whole.slice(0, len(whole) // 2), first)
    else:
        first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    done = sweep(PARTS, tmp_path / "t.parquet")
    assert done.resumed == (change == "another index")
    assert done.target.read_bytes() == clean.target.read_bytes()


def test_a_part_that_changes_while_others_are_computed_is_rejected(tmp_path: Path) -> None:
    def halve(done: int, of: int) -> None:
        (first,) = (tmp_path / "t.parquet.parts").glob("part-000000*")
        whole = parquet.read_table(first)
        parquet.write_table(whole.slice(0, 1), first)

    with pytest.raises(InputError, match=r"part-000000\.parquet: is damaged \(it is not part 0 of this grid with all"):
        sweep(PARTS, tmp_path / "t.parquet", progress=halve)
    assert not (tmp_path / "t.parquet").exists()
    assert sweep(PARTS, tmp_path / "t.parquet").resumed == 3
