"""The store of measured records: nothing acknowledged is lost or doubled, nothing is read that was
not written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tables import tables_of

from calibration.devices.protocol import OPERATORS as KINDS
from calibration.devices.protocol import Operator
from calibration.records.store import (
    Header,
    Store,
    encode_line,
    parse,
    read_store,
    records_of,
    shape_of,
    untimed,
)
from calibration.records.timing_table import (
    OPERATORS,
    Flag,
    Records,
    Source,
    read_records,
    write_records,
)
from simulator.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
STACK = {"torch": "2.9", "driver": "580.65"}
HEADER = Header("NVIDIA A100", STACK, "bf16", run="r1", started="2026-01-01T00:00:00+00:00")


def refused(says: str, call: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(InputError, match=says):
        call(*arguments, **options)


def row(number: int, **more: object) -> dict[str, object]:
    operator = {"kind": "gemm", "dtype": "bf16", "m": number + 1, "n": 64, "k": 32, "cold": True}
    timing = {"median_s": 1e-6 * (number + 1), "status": "ok", "purpose": "fit"}
    return {"key": f"gemm m={number}", "operator": operator, **timing, **more}


def written(path: Path, count: int = 3, header: Header = HEADER) -> list[dict[str, object]]:
    with Store(path, header) as store:
        for number in range(count):
            store.append(row(number))
        return list(store.rows)


def keys(path: Path) -> list[str]:
    return [r["key"] for r in read_store(path).rows]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


@pytest.mark.quick
def test_what_is_written_is_read_and_a_run_is_resumed(path: Path) -> None:
    rows = written(path)
    assert read_store(path).rows == tuple(rows)
    assert all(r["run"] == "r1" and r["time"] for r in rows)
    with Store(path, Header(HEADER.device, HEADER.stack, run="another")) as store:
        assert store.rows == tuple(rows)
        more = {"text": '\u00fc\n,"crc":"00000000"}', "crc2": [1.5, None]}
        store.append(row(3, **more))
    content = read_store(path)
    assert content.rows[:3] == tuple(rows)
    assert {**content.rows[3], **more} == content.rows[3]
    assert [r["run"] for r in content.rows] == ["r1"] * 4  # a resumed run goes on under its name
    assert (content.header, content.dropped) == (HEADER, 0)


def test_another_device_driver_or_dtype_is_refused(path: Path) -> None:
    written(path)
    before = path.read_bytes()
    for other, word in (
        (Header("NVIDIA H100", STACK), "device 'NVIDIA A100', not of 'NVIDIA H100'"),
        (
            Header(HEADER.device, {"torch": "2.9", "driver": "590.1"}),
            "driver '580.65', not of '590.1'",
        ),
        (Header(HEADER.device, {"torch": "2.9"}), "driver '580.65', not of 'none'"),
        (Header(HEADER.device, STACK, "fp16"), "dtype 'bf16', not of 'fp16'"),
    ):
        refused(word, Store, path, other)
        assert path.read_bytes() == before
    Store(path, HEADER).close()  # and the lock was given back


def test_a_record_that_is_not_json_is_refused(path: Path) -> None:
    with Store(path, HEADER) as store, pytest.raises(ValueError, match="JSON"):
        store.append({"median_s": float("nan")})
    assert read_store(path).rows == ()


def test_a_last_record_cut_at_any_byte_is_dropped_or_whole(path: Path) -> None:
    rows = written(path)
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        content = read_store(path)
        complete = cut == len(whole) - 1  # only the newline is missing
        assert content.rows == tuple(rows[: 3 if complete else 2])
        assert content.dropped == (0 if complete or cut == start else 1)
        with Store(path, HEADER) as store:
            store.append(row(7))
        assert keys(path) == [r["key"] for r in content.rows] + ["gemm m=7"]
        assert read_store(path).dropped == 0


def test_a_header_cut_at_any_byte_is_written_anew(path: Path) -> None:
    Store(path, HEADER).close()
    whole = path.read_bytes()
    for cut in range(len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused("holds no records", read_store, path)
        assert len(written(path, 1)) == len(keys(path)) == 1


def test_no_flipped_byte_makes_a_wrong_record(path: Path) -> None:
    rows = written(path, 2)
    whole = bytearray(path.read_bytes())
    outcomes = {"refused": 0, "dropped": 0}
    for place in range(len(whole)):
        whole[place] ^= 1 << (place % 7)
        try:
            content = parse(bytes(whole), "file")
            assert content.rows == tuple(rows[: len(content.rows)])
            assert len(content.rows) == 2 - content.dropped
            outcomes["dropped"] += 1
        except InputError:
            outcomes["refused"] += 1
        whole[place] ^= 1 << (place % 7)
    last = len(whole) - bytes(whole).rindex(b"\n", 0, -1) - 1
    # the last line alone may be lost; a damaged newline at its very end is refused like all before
    # it
    assert outcomes == {"refused": len(whole) - last + 1, "dropped": last - 1}


@pytest.mark.parametrize(("order", "says"), tables_of("records/mistakes.yaml")["orders"])
def test_lines_that_are_not_those_that_were_written_are_refused_with_their_place(
    order: list[int], says: str, path: Path
) -> None:
    written(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[at] for at in order))
    for opened in (read_store, lambda file: Store(file, HEADER)):
        refused(f"^{path}{says}", opened, path)


@pytest.mark.quick
@pytest.mark.parametrize(("wrong", "says"), tables_of("records/mistakes.yaml")["records"])
def test_records_that_a_run_cannot_resume_from_are_refused(
    wrong: dict[str, Any], says: str, path: Path
) -> None:
    with Store(path, HEADER) as store:
        store.append({**row(0), "version": "1", **wrong})
    refused(f":2: {says}", read_store, path)


def test_other_files_and_folders_are_refused_and_left_alone(path: Path) -> None:
    for content, reason in (
        (b"m,n,k\n1,2,3\n", "not a store"),
        (b"hello", "not a store"),
        (
            encode_line({"prunesim": "records", "schema": 1}),
            "expected schema 2, got 1; .*: measure again",
        ),
        (encode_line({"prunesim": "records", "schema": 2}), "header lacks device"),
    ):
        path.write_bytes(content)
        for opened in (read_store, lambda file: Store(file, HEADER)):
            refused(reason, opened, path)
        assert path.read_bytes() == content
    refused("cannot be read: No such file", read_store, path.with_name("none.jsonl"))
    refused("does not exist", Store, path.parent / "none" / "records.jsonl", HEADER)
    refused("is a folder", Store, path.parent, HEADER)


def test_a_second_writer_stops_at_once(path: Path) -> None:
    with Store(path, HEADER) as store:
        store.append(row(0))
        before = path.read_bytes()
        code = (
            f"from calibration.records.store import *; Store({str(path)!r}, Header('NVIDIA A100'))"
        )
        command = [sys.executable, "-c", code]
        second = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=10
        )
        assert "InputError" in second.stderr
        assert "another process is writing to this file" in second.stderr
        refused("another process", Store, path, HEADER)
        assert path.read_bytes() == before
        assert len(read_store(path).rows) == 1  # reading is always possible
        store.append(row(1))
    assert len(read_store(path).rows) == 2


PWRITE = os.pwrite


def full(fd: int, data: bytes | int = b"", offset: int = 0) -> int:
    """A write to a disk that has room for half of it; a sync, or a truncation to a size, that
    fails."""
    if isinstance(data, bytes):
        PWRITE(fd, data[: len(data) // 2], offset)
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("truncate_fails", [False, True])
@pytest.mark.parametrize("where", ["pwrite", "fsync"])
def test_a_full_disk_loses_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, where: str, truncate_fails: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, where, full)
        with pytest.raises(OSError, match="No space left"):
            Store(path, HEADER)
    rows = written(path)
    whole = path.read_bytes()
    with Store(path, HEADER) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, where, full)
            if truncate_fails:
                patch.setattr(os, "ftruncate", full)
            with pytest.raises(OSError, match="No space left on device; earlier records are safe"):
                store.append(row(3))
        if not truncate_fails:
            assert path.read_bytes() == whole
        elif where == "pwrite":
            assert read_store(path).rows == tuple(rows)
        store.append(row(4))  # space again: the same store goes on
    assert keys(path) == [f"gemm m={i}" for i in (0, 1, 2, 4)]


def test_flags_purposes_and_spread_of_measured_rows() -> None:
    interval = {"lower_s": 1e-6, "upper_s": 3e-6, "samples_s": [1.0] * 9}
    rows = [
        row(0, purpose="drift_check", block=1, drifted=False),
        row(1, block=1, status="noisy", **interval, method="events around a graph of 20 launches"),
        row(2, block=1, status="throttled", purpose="holdout"),
        row(0, purpose="drift_check", block=2, drifted=True),
        row(3, block=2, method="perf_counter_ns around a loop"),
        row(0, purpose="drift_check", block=3, drifted=False),
        row(4, block=3),
        {
            "key": "gemm",
            "operator": {"kind": "gemm"},
            "status": "skipped",
            "reason": "out of memory: 9 GB",
        },
    ]
    records = records_of(rows, HEADER)
    drift = Flag.DRIFT
    assert records.flags.tolist() == [
        0,
        Flag.NOISY | drift,
        Flag.THROTTLED | drift,
        drift,
        drift,
        0,
        0,
    ]
    assert records.purpose.tolist() == [4, 1, 2, 4, 1, 4, 1]
    assert records.spread[1] == pytest.approx(0.5)
    assert np.isnan(records.spread[0])
    assert records.sample_count.tolist()[:2] == [0, 9]
    assert records.launch.tolist()[:5] == [0, 2, 0, 0, 3]
    assert records.seconds.tolist() == pytest.approx([r["median_s"] for r in rows[:-1]])
    assert untimed(rows) == {"skipped: out of memory: 9 GB": 1}


@pytest.mark.quick
def test_every_operator_a_device_offers_becomes_a_record() -> None:
    shape = {"m": 8, "n": 64, "k": 32, "rank": 16, "rows": 4, "batch": 2, "q_len": 1, "kv_len": 16}
    shape |= {"heads": 4, "kv_heads": 2, "head_dim": 64}
    for kind in KINDS:
        role = {"elementwise": "activation", "grouped_gemm": "up"}.get(kind, "")
        operator = Operator(kind, **shape, block=8, window=4, role=role)
        records = records_of([{"operator": vars(operator), "median_s": 1e-6}], HEADER)
        assert OPERATORS[int(records.operator[0])] == kind
        assert int(records.kv_len[0]) == 16
        if kind in ("elementwise", "copy"):
            assert float(records.read_bytes[0] + records.write_bytes[0]) == operator.bytes
    assert shape_of({"kind": "launch_eager", "role": "gemm"})["n"] == 64


def test_codes_of_operators_that_files_hold_stay_what_they_are() -> None:
    assert OPERATORS[:3] == ("gemm", "gemm_2to4", "low_rank")
    names = ("collective", "layer_eager", "experts", "mla_prefill", "mla_decode", "grouped_gemm")
    assert [OPERATORS.index(name) for name in names] == [11, 12, 13, 14, 15, 16]


def table() -> Records:
    sources = [Source("A", {"torch": "2"}, kernel="x"), Source("B", run="r")]
    names = {"operator": ["gemm", "gemm", "elementwise"], "dtype": ["bf16", "fp8", "bf16"]}
    names["weight_dtype"] = ["int8", "fp8", "bf16"]
    sizes = {
        "m": [1, 300, 70_000],
        "n": 8,
        "k": [4, 4, 0],
        "role": [0, 0, 17],
        "cold": [True, False, True],
    }
    times = {
        "seconds": [1e-6, 2e-6, 1 / 3],
        "spread": [np.nan, 0.01, 0.02],
        "source": [0, 0, 1],
        "flags": [0, 1, 0],
    }
    return Records.from_columns(sources, **names, **sizes, **times)


@pytest.mark.quick
def test_records_survive_parquet() -> None:
    records = table()
    assert records.labels().tolist() == ["int8_wo", "fp8", "bf16"]
    pytest.importorskip("pyarrow")
    content = write_records(records)
    assert read_records(content).digest() == records.digest()
    assert write_records(read_records(content)) == content
    single = read_records(write_records(records, single=True))
    assert single.seconds == pytest.approx(records.seconds, rel=1e-7)
    assert len(read_records(write_records(records.select(records.m < 0)))) == 0


@pytest.mark.quick
@pytest.mark.parametrize("order", [(1.0, 1.1, 1.5), (1.5, 1.1, 1.0), (1.1, 1.0, 1.5)])
def test_a_time_is_known_within_the_distance_of_its_two_fastest_visits(
    order: tuple[float, ...],
) -> None:
    one = row(0)
    rows = [
        {**one, "visit": i, "median_s": s, "lower_s": 0.99 * s, "upper_s": 1.01 * s}
        for i, s in enumerate(order)
    ]
    found = records_of(rows, HEADER)
    assert (found.seconds[0], found.spread[0]) == pytest.approx((1.0, 0.1))
    assert records_of(rows[:1], HEADER).spread[0] == pytest.approx(0.01)
