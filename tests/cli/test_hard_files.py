"""Files that no reader may choke on, whatever their name, size or kind: refused in seconds, in one line, in little memory."""

from __future__ import annotations

import io
import json
import os
import resource
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.testing  # some versions start lscpu when they are imported, before the guard listens
import pytest

import simulator
from calibration.cli import run
from calibration.records.importers import import_table
from simulator.errors import InputError
from simulator.files import csv as csv_table
from simulator.files import read as readfile
from simulator.files.csv import read_csv

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
from guard import LIMIT_S, Guard, check_line
from targets import profile_with

MOST_MEMORY = 400_000_000
"""More memory than this may not be taken to refuse a file."""

READERS: dict[str, tuple[str, ...]] = {
    "profile": ("gemm", "64", "64", "64", "--hardware", "{}"),
    "check": ("hardware", "check", "{}"),
    "config": ("models", "show", "{}"),
    "grid": ("sweep", "{}", "-o", "out.parquet"),
    "table": ("import", "{}", "-o", "out.parquet"),
    "records": ("fit", "{}", "--hardware", "h100", "-o", "out.yaml"),
    "judged": ("validate", "h100", "{}"),
    "merged": ("measure", "--merge", "{}", "-o", "out.jsonl"),
    "quality": ("pareto", "llama-2-7b", "--hardware", "h100", "--quality", "{}"),
    "speedups": ("pareto", "llama-2-7b", "--hardware", "h100", "--measured", "{}"),
    "gemms": ("figures", "--only", "scatter", "--hardware", "h100", "--measured", "h100={}", "-o", "figures"),
}
"""A command for everything that is read."""


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in an empty folder, and may touch nothing outside it."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("matplotlib.font_manager")  # reads the fonts of the machine when it is first imported
    monkeypatch.chdir(tmp_path)
    with Guard(tmp_path, (Path("/dev/zero"), Path("/proc"))):
        yield


def refused(words: tuple[str, ...], file: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that refuses a file, within the time and the memory."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    status = run([word.replace("{}", file) for word in words])
    took, grown = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    out, err = capsys.readouterr()
    lines = [
        line for line in (err or out).splitlines() if not line.startswith("note: ")
    ]  # a check lists its findings as output
    assert (status, len(lines)) == (2, 1), (words, status, err, out)
    check_line(lines[0], Path(file).name)
    assert took < LIMIT_S
    assert grown * 1024 < MOST_MEMORY, grown
    return lines[0]


def make(kind: str, path: Path) -> str:
    """A file, or what is none; returns its path."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe that nobody writes to":
        os.mkfifo(path)
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "link to a device without an end":
        path.symlink_to("/dev/zero")
    elif kind == "gigabytes":
        with path.open("wb") as file:
            file.truncate(3 << 30)
    elif kind == "file that fails when read":
        return "/proc/self/mem"
    elif kind == "missing":
        pass
    elif kind == "name with a line end and an escape":
        path = path.with_name("a\n\x1b[31m" + path.name)
        path.write_bytes(b"\0")
        return f"./{path.name}"
    elif kind == "deep nesting":
        path.write_bytes(b"[" * 300_000)
    elif kind == "one long line":
        path.write_bytes(b"x" * 900_000)
    return str(path)


KINDS = (
    *("folder", "pipe that nobody writes to", "link to itself", "link to a device without an end", "gigabytes"),
    *("file that fails when read", "missing", "deep nesting", "one long line"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_to_read_is_refused(
    reader: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make(kind, tmp_path / "given.csv")
    line = refused(READERS[reader], file, capsys)
    if kind == "folder":  # it may be read for the file in it, which is then missing
        assert "folder" in line or "records.jsonl" in line, line
    assert {p.name for p in tmp_path.iterdir()} <= {"given.csv", "figures"}


@pytest.mark.parametrize("reader", READERS)
def test_names_that_no_terminal_should_see(reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line_end = make("name with a line end and an escape", tmp_path / "given.csv")
    status = run([word.replace("{}", line_end) for word in READERS[reader]])
    out, err = capsys.readouterr()
    lines = [line for line in (err or out).splitlines() if not line.startswith("note: ")]
    assert (status, len(lines)) == (2, 1), (out, err)
    check_line(lines[0], "given.csv")


# -- configurations ---------------------------------------------------------------------------------------------------------------

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 1e308}, "vocab_size"),
        ({"num_attention_heads": 10**18}, "num_attention_heads"),
    ],
)
def test_sizes_that_no_machine_holds_are_refused(
    change: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.json").write_text(json.dumps({**TINY, **change}))
    assert says in refused(("models", "show", "{}"), "config.json", capsys)


def test_a_name_that_is_a_path_leads_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "../../../../tmp/outside\n\x1b[31m/../.."
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "_name_or_path": name}))
    model = ("config.json", "--hardware", "h100")
    commands = (
        ("speedup", *model, "--family", "depth", "--sparsity", "0.5", "--csv", "s.csv", "--figure", "s.svg"),
        ("explain", *model, "--family", "width", "--sparsity", "0.5", "--figure", "e.svg", "--roofline", "r.svg"),
        (
            *("figures", "--model", "config.json", "--hardware", "h100", "--only", "speedup", "--format", "svg"),
            *("-o", "figures"),
        ),
    )
    for words in commands:
        assert run(list(words)) == 0, (words, capsys.readouterr())
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "e.svg", "figures", "r.svg", "s.csv", "s.svg"]


# -- a profile's arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../../x.npz", "/etc/passwd", "a/b.npz", "..", "", "~/x.npz", "x.npz/../y.npz", "x\\0.npz", "c:x.npz", "x.yaml"],
)
def test_arrays_lie_beside_their_profile(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.yaml").write_text(profile_with(b"", f'"{name}"', ["elementwise"]), encoding="utf-8")
    line = refused(("gemm", "64", "64", "64", "--hardware", "{}"), str(tmp_path / "p.yaml"), capsys)
    assert ".arrays.file" in line


@pytest.mark.parametrize("lies", [False, True])
def test_arrays_that_unpack_to_gigabytes(lies: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, size = "elementwise.bf16.values.npy", 1 << 30
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(name, "w", force_zip64=True) as entry,
    ):
        for _ in range(size >> 24):
            entry.write(bytes(1 << 24))
    raw = packed.getvalue()
    if lies:  # the directory of the archive says that the entry is small
        raw = raw.replace(size.to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    (tmp_path / "a.npz").write_bytes(raw)
    (tmp_path / "p.yaml").write_text(profile_with(raw, "a.npz", ["elementwise"]), encoding="utf-8")
    assert ".arrays" in refused(("gemm", "64", "64", "64", "--hardware", "{}"), str(tmp_path / "p.yaml"), capsys)


# -- tables -----------------------------------------------------------------------------------------------------------------------


def bomb(kind: str, path: Path) -> str:
    """A Parquet file of kilobytes that takes gigabytes when it is read without a look at it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "rows":
        table = pa.table({"m": pa.repeat(pa.scalar(7, pa.int64()), 20_000_001)})
    elif kind == "texts":
        table = pa.table(
            {"m": pa.DictionaryArray.from_arrays(pa.array(np.zeros(1_000_000, np.int32)), pa.array(["x" * 3000]))}
        )
    elif kind == "list":
        table = pa.table(
            {"m": pa.ListArray.from_arrays(pa.array([0, 30_000_000], pa.int32()), pa.repeat(pa.scalar(7), 30_000_000))}
        )
    else:
        table = pa.table({f"c{i}": pa.repeat(pa.scalar(7, pa.int8()), 30_000) for i in range(1000)})
    pq.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 3_000_000
    return str(path)


@pytest.mark.parametrize("kind", ["rows", "texts", "list", "columns"])
@pytest.mark.parametrize("reader", ["table", "gemms"])
def test_parquet_that_unpacks_to_gigabytes(
    reader: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bomb(kind, tmp_path / "t.parquet")
    refused(READERS[reader], file, capsys)


def test_csv_larger_than_can_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="expected at most 1000"):
        read_csv(",".join(f"c{i}" for i in range(2000)) + "\n", "t.csv")
    monkeypatch.setattr(csv_table, "MOST_CELLS", 40)
    with pytest.raises(InputError, match=r"^t\.csv:13: holds more than 40 cells"):
        read_csv("a\n" + "1\n" * 50, "t.csv")
    monkeypatch.setattr(csv_table, "MOST_BYTES", 40)
    with pytest.raises(InputError, match=r"^t\.csv: is larger than"):
        read_csv(b"a\n" + b"1\n" * 50, "t.csv")


def test_lines_are_those_of_the_file() -> None:
    table = read_csv('\n a , b\n\n"1\n2", 3\n , \n4,5', "t.csv")
    assert (table.header, table.rows, table.lines) == (("a", "b"), [["1 2", "3"], ["4", "5"]], [5, 7])
    with pytest.raises(InputError, match=r"^t\.csv:5: expected 2 cells"):
        read_csv('a,b\n"1\n\n2",3\n4\n', "t.csv")


def test_columns_without_a_name_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("m,n,k,latency_us,,\n8,64,64,5,x,y\n")
    assert len(import_table(tmp_path / "t.csv").records) == 1


def test_a_pipe_with_a_writer_is_read(tmp_path: Path) -> None:
    import threading

    os.mkfifo(tmp_path / "p")

    def write() -> None:
        with open(tmp_path / "p", "wb") as file:
            for part in (b"m,n,k,latency_us\n", b"8,64,64,5\n"):
                time.sleep(0.05)
                file.write(part)
                file.flush()

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.02)  # it waits for a reader
    assert len(import_table(tmp_path / "p").records) == 1
    writer.join()


def test_a_file_that_grows_is_read_up_to_the_bound(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"x" * 11)
    with pytest.raises(InputError, match="larger than 1e-05 MB"):
        readfile.read_bounded(tmp_path / "t", 10)
    assert readfile.read_bounded(tmp_path / "t", 11) == b"x" * 11


def test_a_small_weight_of_too_many_features_is_refused() -> None:
    with pytest.raises(InputError, match="below 2"):
        simulator.gemm_time(1, 2**31, 8, simulator.load_hardware("h100"))
