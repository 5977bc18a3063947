"""Sweeps: rows equal single predictions on every executor, and no interruption loses a part."""

from __future__ import annotations

import errno
import itertools
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tables import tables_of

import simulator
from simulator.errors import InputError
from simulator.files.write import write_whole
from simulator.hardware.library import load_hardware
from simulator.hardware.save import save_hardware
from simulator.models.library import load_model
from simulator.prediction.prunings import Pruning
from simulator.prediction.sweep import Formats, Grid, Summary, read_grid, sweep_results, write_sweep
from simulator.request import Request

parquet = pytest.importorskip("pyarrow.parquet", reason="tables need pyarrow")


ONE = Grid(("llama-3.2-1b",), ("h100_sxm",), (0.5,), ("decode",), (1,), (64,))
"""One point, every family."""

SMALL = replace(
    ONE,
    hardware=("h100_sxm", "a100_sxm_80gb"),
    sparsities=(0.1, 0.5),
    phases=("prefill", "decode"),
    batches=(1, 48),
    seqs=(64, 2048),
    engines=("reference", "hf"),
)

MIXED = replace(
    ONE,
    phases=("generate",),
    batches=(2,),
    seqs=(100,),
    dtypes=(Formats("bf16", "int4", "fp8"),),
    devices=(1, 2),
    families=tuple(Pruning.of(name) for name in ("depth", "token", "kv_cache", "dynamic_depth")),
    request=Request(new_tokens=6),
)


@pytest.mark.parametrize("grid", [SMALL, MIXED], ids=["small", "mixed"])
def test_a_sweep_equals_tables_of_one_request_each(grid: Grid) -> None:
    found = sweep_results(grid)
    columns = dict(found.columns)
    keys = ("model", "hardware", "family", "sparsity", "phase", "batch", "seq", "engine", "devices")
    left = {key: i for i, key in enumerate(zip(*(columns[name].tolist() for name in keys)))}
    assert len(left) == len(columns["speedup"])
    families, axes = (
        [p.family for p in grid.families],
        {"phase": grid.phases, "batch": grid.batches, "seq": grid.seqs},
    )
    for engine, devices in itertools.product(grid.engines, grid.devices):
        where = {**axes, **vars(grid.dtypes[0]), "engine": engine, "devices": devices}
        asked = {**where, "new_tokens": grid.request.new_tokens}
        table = simulator.table(grid.models, grid.hardware, families, grid.sparsities, **asked)
        assert found.notes == tuple(n for n in table.notes if "excluded" in n)
        for record in table:
            i = left.pop(tuple(getattr(record, name) for name in keys))
            for name, value in asdict(record).items():
                wanted = np.nan if value is None else value
                if isinstance(wanted, float):
                    wanted = pytest.approx(wanted, rel=1e-9, abs=1e-12, nan_ok=True)
                assert columns[name][i] == wanted, name
    assert not left


def test_pieces_cover_the_grid_once_and_are_bounded() -> None:
    grid = replace(
        ONE,
        models=("llama-3.2-1b", "llama-3.1-8b"),
        sparsities=tuple(i / 1000 for i in range(1, 900)),
        phases=("prefill", "generate"),
        batches=tuple(range(1, 9)),
        seqs=tuple(range(64, 70)),
    )
    found = list(grid.pieces())
    sizes = [len(requests) * len(prunings) for requests, prunings, _ in found]
    assert sum(sizes) == grid.size
    assert max(sizes) <= 40_000
    some = found[:5]
    points = {(one, p) for requests, prunings, _ in some for one in requests for p in prunings}
    assert len(points) == sum(sizes[:5])


WAYS = (1, 2)
"""Numbers of processes."""


def content(done: Summary) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(done.folder).iterdir()}


PARTS = replace(ONE, sparsities=(0.25,), engines=("reference", "hf"), phases=("prefill", "decode"))
"""A grid of four parts."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The parts of PARTS."""
    return content(write_sweep(PARTS, tmp_path_factory.mktemp("sweep") / "rows"))


@pytest.mark.parametrize("jobs", WAYS)
def test_a_sweep_that_is_interrupted_goes_on_to_equal_rows(
    jobs: int, clean: dict[str, bytes], tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sweep(PARTS, tmp_path / "rows", progress=stop, jobs=jobs)
    assert not active_children()
    assert len(list((tmp_path / "rows").iterdir())) == 1
    done = write_sweep(
        PARTS, tmp_path / "rows", progress=lambda *step: steps.append(step), jobs=jobs
    )
    assert (done.parts, done.resumed_parts, steps[-1]) == (4, 1, (PARTS.size, PARTS.size))
    assert [n for n, _ in steps] == sorted({n for n, _ in steps})
    assert content(done) == clean
    frame, wanted = simulator.sweep(PARTS, tmp_path / "rows"), simulator.sweep(PARTS)
    assert len(frame) == len(wanted) == done.rows > 0
    assert frame["engine"].tolist() == wanted["engine"].tolist()
    assert np.array_equal(frame["speedup"], wanted["speedup"])
    assert frame.attrs["notes"] == wanted.attrs["notes"] == list(done.notes) != []
    assert write_sweep(PARTS, tmp_path / "rows").resumed_parts == 4


KILLED = """
import os, signal, sys
from simulator.prediction.sweep import write_sweep

if __name__ == "__main__":
    def stop(done, of):
        print("ready", flush=True)
        sys.stdin.read()
    write_sweep("grid.yaml", "rows", progress=stop, jobs=int(sys.argv[1]))
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
@pytest.mark.parametrize("jobs", WAYS)
def test_kill_9_leaves_no_worker_and_loses_no_part(jobs: int, tmp_path: Path) -> None:
    """After the first part; at any moment: tests/cli/test_kills.py."""
    psutil = pytest.importorskip("psutil")
    (tmp_path / "run.py").write_text(KILLED)
    (tmp_path / "grid.yaml").write_text(
        "models: llama-3.2-1b\nhardware: h100\nsparsities: 0.5\nphases: [prefill, decode]\nbatches:"
        " 1\nseqs: 64\nengines: [reference, hf]\n"
    )
    words = [sys.executable, "run.py", str(jobs)]
    environment = {**os.environ, "PYTHONPATH": str(Path(simulator.__file__).parents[1])}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        words, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, **pipes
    ) as process:
        assert process.stdout.readline() == "ready\n"
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len(children) >= jobs - 1
    _, alive = psutil.wait_procs(children, timeout=20)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)
    done = write_sweep(tmp_path / "grid.yaml", tmp_path / "rows", jobs=jobs)
    assert (done.parts, done.resumed_parts) == (4, 1)


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
def test_lost_workers_are_one_line_and_lose_no_part(
    clean: dict[str, bytes], tmp_path: Path
) -> None:
    def kill(done: int, of: int) -> None:
        os.kill(active_children()[0].pid or 0, signal.SIGKILL)

    with pytest.raises(
        OSError, match=r"finished parts are kept: run the same command again$"
    ) as error:
        write_sweep(PARTS, tmp_path / "rows", progress=kill, jobs=2)
    assert not isinstance(error.value, InputError)
    there = len(list((tmp_path / "rows").iterdir()))
    assert 0 < there < 4
    done = write_sweep(PARTS, tmp_path / "rows")
    assert (done.resumed_parts, content(done)) == (there, clean)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_full_disk_loses_no_part(
    jobs: int, clean: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a full disk is simulated here; tests/cli/test_hard_runs.py reaches a limit of
    the system."""
    left = iter(range(2))

    def write(path: Path, given: bytes) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_whole(path, given)

    with monkeypatch.context() as patch:
        patch.setattr("simulator.prediction.sweep.write_whole", write)
        with pytest.raises(OSError, match="No space left"):
            write_sweep(PARTS, tmp_path / "rows", jobs=jobs)
    assert not active_children()
    done = write_sweep(PARTS, tmp_path / "rows")
    assert (done.resumed_parts, content(done)) == (2, clean)


@pytest.mark.parametrize("change", ["grid", "index", "bytes"])
def test_parts_of_another_grid_or_index_and_damaged_parts_are_computed_again(
    change: str, clean: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "rows"
    write_sweep(replace(PARTS, devices=(1, 2)) if change == "grid" else PARTS, out)
    first = out / "part-00000000.parquet"
    if change == "index":
        (out / "part-00000003.parquet").write_bytes(first.read_bytes())
    elif change == "bytes":
        first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    (out / ".part-00000001.parquet.abc.tmp").write_bytes(b"left by a kill")
    done = write_sweep(PARTS, out)
    assert (done.resumed_parts, content(done)) == (0 if change == "grid" else 3, clean)
    assert done.notes[0].endswith(
        f"version or profile were replaced: {8 if change == 'grid' else 1}"
    )


def test_other_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "old.parquet").write_bytes(b"PAR1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("notes")
    for name, says in {
        "old.parquet": "old.parquet: is a file; expected a folder: name another or remove it",
        "mine": "mine: holds notes.txt, which is not a part of a sweep; name another folder",
        "rows.csv": "rows.csv: expected the name of a folder",
        "missing/rows": "does not exist",
    }.items():
        with pytest.raises(InputError, match=re.escape(says)):
            write_sweep(ONE, tmp_path / name)
    assert {path.name for path in tmp_path.rglob("*")} == {"old.parquet", "mine", "notes.txt"}


def test_a_second_sweep_into_a_folder_waits_for_the_first(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        second: list[Future[Summary]] = []
        write_sweep(
            PARTS,
            tmp_path,
            progress=lambda *_: second.append(pool.submit(write_sweep, PARTS, tmp_path)),
        )
        assert [done.result().resumed_parts for done in second] == [4] * 4


def test_a_part_that_changes_during_the_sweep_is_an_error(tmp_path: Path) -> None:
    def spoil(done: int, of: int) -> None:
        (tmp_path / "rows" / "part-00000000.parquet").write_bytes(b"")

    with pytest.raises(OSError, match=r"part-00000000\.parquet: changed while the sweep ran"):
        write_sweep(PARTS, tmp_path / "rows", progress=spoil)
    assert write_sweep(PARTS, tmp_path / "rows").resumed_parts == 3


def test_loaded_profiles_and_models_reach_the_workers(tmp_path: Path) -> None:
    own = replace(
        PARTS, hardware=(load_hardware("h100_sxm"),), models=(load_model("llama-3.2-1b"),)
    )
    written, wanted = simulator.sweep(own, tmp_path / "rows", jobs=2), simulator.sweep(PARTS)
    assert np.array_equal(written["pruned_s"], wanted["pruned_s"])


def test_the_digest_follows_the_profile(tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    save_hardware(load_hardware("h100_sxm"), profile)
    grid = replace(ONE, hardware=(str(profile),))
    first = grid.digest()
    assert first == grid.digest()
    profile.write_text(profile.read_text() + "\n# changed\n")
    assert grid.digest() != first


GOOD = tables_of("prediction/cases.yaml")["grid"]


def grid_text(axes: dict[str, str]) -> str:
    return "".join(f"{name}: {value}\n" for name, value in axes.items())


def test_a_grid_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(grid_text(GOOD))
    grid = read_grid(tmp_path / "g.yaml")
    assert grid.hardware == ("h100_sxm",)
    assert grid.families == (Pruning.of("depth"), Pruning.of("width", options={"align": 64}))
    assert grid.sparsities == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert grid.batches == (1, 2, 4, 8)
    assert grid.dtypes == (Formats("bf16"), Formats("bf16", "int4"))
    assert (grid.request.level, grid.request.ideal, grid.devices, grid.engines) == (
        0.8,
        True,
        (1, 2),
        ("hf",),
    )
    assert grid.size == 2 * 2 * 5 * 4 * 2 * 2


def test_published_methods_are_an_axis_beside_families_or_in_their_place(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(grid_text(GOOD | {"methods": "[shortgpt, mod]"}))
    assert [f.method for f in read_grid(tmp_path / "g.yaml").families] == [
        "",
        "",
        "shortgpt",
        "mod",
    ]
    grid = replace(
        ONE,
        families=(),
        methods=("shortgpt", "llm-pruner", "sheared-llama"),
        sparsities=(0.25, 0.9),
    )
    found = sweep_results(grid)
    assert [(r.method, r.family, r.sparsity) for r in found if r.method != "sheared-llama"] == [
        ("shortgpt", "depth", 0.25),
        ("shortgpt", "depth", 0.9),
        ("llm-pruner", "width", 0.25),
    ]
    assert any("layers / (layers - 6) 1.44: expected a fraction" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "value", "message"), tables_of("prediction/mistakes.yaml")["grids"]
)
def test_bad_grids_are_refused_with_their_place(
    tmp_path: Path, name: str, value: str, message: str
) -> None:
    refuse_grid(tmp_path, grid_text({**GOOD, name: value}), message)


def test_grids_without_an_axis_are_refused(tmp_path: Path) -> None:
    text = grid_text({name: value for name, value in GOOD.items() if name != "seqs"})
    refuse_grid(tmp_path, text, r"seqs: is missing")
    refuse_grid(
        tmp_path, text + "seq: 1\n", r":12:1: seq: unknown key; did you mean seqs\? \(and 1 more\)"
    )
    refuse_grid(tmp_path, "- 1", r"expected a mapping")
    refuse_grid(tmp_path, "", r"is empty")


def refuse_grid(folder: Path, text: str, message: str) -> None:
    path = folder / "g.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        write_sweep(path, folder / "rows")
    assert str(error.value).startswith(f"{path}:")
    assert "\n" not in str(error.value)
    assert not (folder / "rows").exists()


def test_grids_too_large_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"704 configurations, more than 100 \(--max\)"):
        write_sweep(SMALL, tmp_path / "rows", most=100)
    assert not (tmp_path / "rows").exists()


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
    assert (
        found.columns["prune"].tolist()
        == ["width mlp=0.3 heads=0.25", "kv_cache budget=64", str(plan)] * 2
    )
    before = grid.digest()
    plan.write_text("layers:\n  0-7: width mlp=0.25\n")
    assert read_grid(tmp_path / "grid.yaml").digest() != before  # the content of a plan counts
    frame = simulator.sweep(tmp_path / "grid.yaml", tmp_path / "rows")
    again = simulator.sweep(read_grid(tmp_path / "grid.yaml"))
    assert frame["speedup"].tolist() == pytest.approx(again["speedup"].tolist())
    assert frame.attrs["notes"] == []
    for text, message in {
        "prune: width mpl=0.3": (
            "prune: pruning 'width mpl=0.3', column 7: part or option of width 'mpl' is unknown"
        ),
        "": "sparsities: is missing",
    }.items():
        (tmp_path / "bad.yaml").write_text(
            f"models: llama-3.2-1b\nhardware: h100\nphases: decode\nbatches: 1\nseqs: 128\n{text}\n"
        )
        with pytest.raises(InputError, match=re.escape(message)):
            read_grid(tmp_path / "bad.yaml")


def test_a_grid_may_be_a_mapping() -> None:
    axes = {
        "models": ["llama-3.1-8b"],
        "hardware": ["h100"],
        "prune": ["depth 0.25"],
        "phases": ["decode"],
        "batches": [1, 8],
        "seqs": [2048],
    }
    frame = simulator.sweep(axes)
    assert frame["batch"].tolist() == [1, 8]
    with pytest.raises(InputError, match="batchs"):
        simulator.sweep({**axes, "batchs": [1]})
    with pytest.raises(InputError, match="grid: expected a mapping of texts"):
        simulator.sweep({"models": {1, 2}} | {(1, 2): 3})
