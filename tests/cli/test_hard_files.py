"""Files that no reader may choke on, whatever their name, size or kind: refused in seconds, one
line, little memory."""

from __future__ import annotations

import functools
import io
import json
import os
import resource
import sys
import threading
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tables import rows_of

from calibration.records.importers import import_table
from simulator.errors import InputError
from simulator.files import csv as csv_table
from simulator.files import read as readfile
from simulator.files.csv import read_csv

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
from guard import check_line, guarded, in_time, profile_with

MOST_MEMORY = 400_000_000
"""More memory than this may not be taken to refuse a file."""

PROFILE = "gemm 64 64 64 --hardware {}"
READERS = {
    "profile": PROFILE,
    "check": "hardware check {}",
    "config": "models show {}",
    "grid": "sweep {} -o rows",
    "table": "fit {} --hardware h100 -o out.yaml",
    "judged": "validate h100 {}",
    "quality": "pareto llama-2-7b --hardware h100 --quality {}",
    "speedups": "pareto llama-2-7b --hardware h100 --measured {}",
}
"""A command for everything that is read."""


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in an empty folder, and may touch nothing outside it."""
    # reads the fonts of the machine when it is first imported
    pytest.importorskip("matplotlib.font_manager")
    monkeypatch.chdir(tmp_path)
    with guarded(tmp_path, (Path("/dev/zero"), Path("/proc"))):
        yield


def refused(command: str, file: str, cli: Any) -> str:
    """The one line of a command that refuses a file; it may neither hang nor take much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with in_time():
        line: str = cli.refused(
            [word.replace("{}", os.path.abspath(file)) for word in command.split()], lists=True
        )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    check_line(line, Path(file).name.split("\x1b[31m")[-1])
    assert grown * 1024 < MOST_MEMORY, grown
    return line


KINDS = {
    "missing": lambda path: None,
    "folder": Path.mkdir,
    "pipe that nobody writes to": os.mkfifo,
    "link to itself": lambda path: path.symlink_to(path),
    "link to a device without an end": lambda path: path.symlink_to("/dev/zero"),
    "link to a file that fails when read": lambda path: path.symlink_to("/proc/self/mem"),
    "gigabytes": lambda path: (path.touch(), os.truncate(path, 3 << 30)),
    "deep nesting": lambda path: path.write_bytes(b"[" * 300_000),
    "one long line": lambda path: path.write_bytes(b"x" * 900_000),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_to_read_is_refused(reader: str, kind: str, cli: Any) -> None:
    KINDS[kind](Path("given.csv"))
    line = refused(READERS[reader], "given.csv", cli)
    if kind == "folder":  # it may be read for the file in it, which is then missing
        assert "folder" in line or "records.jsonl" in line, line
    assert {p.name for p in Path().iterdir()} <= {"given.csv", "figures"}


@pytest.mark.parametrize(
    ("command", "option", "metavar"),
    rows_of("""
speedup llama-2-7b --hardware h100 --family depth --phase decode | --csv      | FILE
speedup llama-2-7b --hardware h100                               | --prune    | TEXT
search llama-2-7b --hardware h100 --target 1.2                   | --scores   | FILE
validate h100                                                    | --markdown | FILE
"""),
)
def test_a_variable_that_is_not_set_is_no_value(
    command: str, option: str, metavar: str, cli: Any
) -> None:
    _, err = cli(f"{command} {option}=", 2)
    assert err == f"prunesim: {option}: expected {metavar}, got an empty value\n"
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("reader", READERS)
def test_names_that_no_terminal_should_see(reader: str, cli: Any) -> None:
    Path("a\n\x1b[31mgiven.csv").write_bytes(b"\0")
    refused(READERS[reader], "a\n\x1b[31mgiven.csv", cli)


_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TINY = {"model_type": "llama", "vocab_size": 50, **_SIZES}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 10**400),
        ("num_hidden_layers", 10**9),
        ("vocab_size", 1e308),
        ("num_attention_heads", 10**18),
    ],
)
def test_sizes_that_no_machine_holds_are_refused(key: str, value: float, cli: Any) -> None:
    Path("config.json").write_text(json.dumps({**TINY, key: value}))
    assert key in refused("models show {}", "config.json", cli)


def test_a_name_that_is_a_path_leads_nowhere(cli: Any) -> None:
    name = "../../../../tmp/outside\n\x1b[31m/../.."
    Path("config.json").write_text(json.dumps({**TINY, "_name_or_path": name}))
    for line in (
        (
            "speedup config.json --hardware h100 --family depth --sparsity 0.5 --csv s.csv --figure"
            " s.svg"
        ),
        (
            "explain config.json --hardware h100 --family width --sparsity 0.5 --figure e.svg"
            " --roofline r.svg"
        ),
        "figures config.json --hardware h100 --only speedup --format svg -o figures",
    ):
        assert "\x1b" not in "".join(cli(line))
    assert sorted(os.listdir()) == ["config.json", "e.svg", "figures", "r.svg", "s.csv", "s.svg"]


def test_a_character_that_the_font_lacks_draws_no_warning(cli: Any) -> None:
    Path("config.json").write_text(json.dumps({**TINY, "_name_or_path": "\u65e5\u672c"}))
    with warnings.catch_warnings(record=True) as heard:
        cli("speedup config.json --hardware h100 --family width --sparsity 0.5 --figure s.pdf")
    assert [str(one.message) for one in heard] == []


@pytest.mark.parametrize(
    "name",
    [
        "../../x.npz",
        "/etc/passwd",
        "a/b.npz",
        "..",
        "",
        "~/x.npz",
        "x.npz/../y.npz",
        "x\\0.npz",
        "c:x.npz",
        "x.yaml",
    ],
)
def test_arrays_lie_beside_their_profile(name: str, cli: Any) -> None:
    Path("p.yaml").write_text(profile_with(b"", f'"{name}"'), encoding="utf-8")
    assert ".arrays.file" in refused(PROFILE, "p.yaml", cli)


@functools.cache
def zeros(size: int) -> bytes:
    """An archive of an array of so many bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:  # noqa: SIM117
        with archive.open("elementwise.bf16.values.npy", "w", force_zip64=True) as entry:
            for _ in range(size >> 24):
                entry.write(bytes(1 << 24))
    return packed.getvalue()


@pytest.mark.parametrize("lies", [False, True])
def test_arrays_that_unpack_to_gigabytes(lies: bool, cli: Any) -> None:
    size = 1 << 30
    raw = zeros(size)
    if lies:  # the directory of the archive says that the entry is small
        raw = raw.replace(size.to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    Path("a.npz").write_bytes(raw)
    Path("p.yaml").write_text(profile_with(raw), encoding="utf-8")
    assert ".arrays" in refused(PROFILE, "p.yaml", cli)


def bomb(kind: str) -> dict[str, Any]:
    """Columns that take kilobytes in a Parquet file, and gigabytes when it is read without a look
    at it."""
    pa = pytest.importorskip("pyarrow")
    if kind == "rows":
        return {"m": pa.repeat(pa.scalar(7, pa.int64()), 20_000_001)}
    if kind == "texts":
        return {
            "m": pa.DictionaryArray.from_arrays(
                pa.array(np.zeros(1_000_000, np.int32)), pa.array(["x" * 3000])
            )
        }
    if kind == "list":
        ends = pa.array([0, 30_000_000], pa.int32())
        return {"m": pa.ListArray.from_arrays(ends, pa.repeat(pa.scalar(7), 30_000_000))}
    return {f"c{i}": pa.repeat(pa.scalar(7, pa.int8()), 30_000) for i in range(1000)}


@pytest.mark.parametrize("kind", ["rows", "texts", "list", "columns"])
def test_parquet_that_unpacks_to_gigabytes(kind: str, cli: Any) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(bomb(kind)), "t.parquet", compression="zstd", store_schema=False)
    assert Path("t.parquet").stat().st_size < 3_000_000
    refused(READERS["table"], "t.parquet", cli)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_texts_of_each_type_are_measured_before_they_are_decoded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa, pq, file = (
        pytest.importorskip("pyarrow"),
        pytest.importorskip("pyarrow.parquet"),
        io.BytesIO(),
    )
    if not hasattr(pa, kind):
        pytest.skip(f"pyarrow before 16 writes no {kind}")
    pq.write_table(pa.table({"a": pa.array(["x" * 100] * 100, getattr(pa, kind)())}), file)
    assert readfile.read_parquet(file.getvalue(), "t").column("a")[99].as_py() == "x" * 100
    monkeypatch.setattr(readfile, "MOST_TABLE_BYTES", 9_999)
    with pytest.raises(InputError, match="t: expected texts of at most"):
        readfile.read_parquet(file.getvalue(), "t")


def test_csv_larger_than_can_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="expected at most 1000"):
        read_csv(",".join(f"c{i}" for i in range(2000)) + "\n", "t.csv")
    monkeypatch.setattr(csv_table, "MOST_CELLS", 40)
    with pytest.raises(InputError, match=r"^t\.csv:13: expected at most 40 cells"):
        read_csv("a\n" + "1\n" * 50, "t.csv")
    monkeypatch.setattr(csv_table, "MOST_BYTES", 40)
    with pytest.raises(InputError, match=r"^t\.csv: expected at most"):
        read_csv(b"a\n" + b"1\n" * 50, "t.csv")


def test_lines_are_those_of_the_file_and_columns_without_a_name_are_passed_over(
    tmp_path: Path,
) -> None:
    table = read_csv('\n a , b\n\n"1\n2", 3\n , \n4,5', "t.csv")
    assert (table.header, table.rows, table.lines) == (
        ("a", "b"),
        [["1 2", "3"], ["4", "5"]],
        [5, 7],
    )
    with pytest.raises(InputError, match=r"^t\.csv:5: expected 2 cells"):
        read_csv('a,b\n"1\n\n2",3\n4\n', "t.csv")
    (tmp_path / "t.csv").write_text("m,n,k,latency_us,,\n8,64,64,5,x,y\n")
    assert len(import_table(tmp_path / "t.csv").records) == 1


def test_a_pipe_with_a_writer_is_read(tmp_path: Path) -> None:
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


def test_a_file_is_read_up_to_the_bound_with_the_memory_of_its_size(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"x" * 11)
    with pytest.raises(InputError, match="larger than 1e-05 MB"):
        readfile.read_bounded(tmp_path / "t", 10)
    assert readfile.read_bounded(tmp_path / "t", 11) == b"x" * 11
    tracemalloc.start()
    assert readfile.read_bounded(tmp_path / "t", 2_000_000_000) == b"x" * 11
    assert tracemalloc.get_traced_memory()[1] < 1e6  # not the memory of the bound
    tracemalloc.stop()
