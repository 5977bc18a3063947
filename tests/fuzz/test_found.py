"""What the fuzz tests found, each as its smallest case: refused in one line where it was a traceback, an absurd time or a lost file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from guard import refusal
from near_tables import crc_line
from targets import good_arrays, profile_with, times

import simulator
from calibration.cli import run
from calibration.execute.quality_results import Results
from calibration.records.importers import import_table
from calibration.records.lines import content_records
from calibration.records.store import Header, merge, read_store
from calibration.records.table import Records, Source
from simulator.errors import InputError
from simulator.figures.measured import read_measured_gemms
from simulator.hardware.arrays import pack_arrays
from simulator.hardware.checks import MOST_LOG, check_arrays
from simulator.hardware.library import load_hardware, save_hardware
from simulator.predict.pareto import read_measured
from simulator.predict.quality import load_quality
from simulator.predict.store import NOTES_KEY, Store

HEADER = Header("A100", {"torch": "2.9"}, "bf16", "r", "2026-01-01", {})
GEMM = {"kind": "gemm", "m": 8, "n": 64, "k": 64, "dtype": "bf16"}
TINY = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 10,
}


def refused(says: str, call: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert says in str(caught.value)
    assert str(caught.value).isprintable()


# -- messages and names -----------------------------------------------------------------------------------------------------------


def test_a_message_is_one_printable_line_whatever_it_quotes() -> None:
    message = str(InputError("file: got a\nb\x1b[31m\u202e\ud800" + "x" * 9000))
    assert message.isprintable()
    assert message.startswith("file: got a b\\x1b[31m\\u202e")
    assert len(message) <= 4000


def test_a_command_that_nobody_has_is_named_in_one_short_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["9" * 9000]) == 2
    assert len(capsys.readouterr().err.rstrip("\n")) <= 4000


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\ud800", "x" * 3000, "..", "org/..", "a\u202eb", "\u00a0"])
def test_a_models_name_is_short_printable_and_no_path(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "_name_or_path": name}))
    found = simulator.load_model(tmp_path).name
    assert found.isprintable()
    assert 0 < len(found) <= 80
    assert not set("/\\") & set(found) or "\\x1b" in found or "\\u" in found
    assert found not in (".", "..")


def test_the_home_of_nobody() -> None:
    refused("home", simulator.load_model, "~nobody-of-that-name/config.json")


def test_digits_are_ascii(tmp_path: Path) -> None:
    good = Path(__file__).parents[1] / "bad_profiles/good.yaml"
    text = good.read_text(encoding="utf-8").replace("value: 132", "value: \u0661\u0663\u0662")
    (tmp_path / "p.yaml").write_text(text[: text.index("calibrated:")], encoding="utf-8")
    refused("datasheet.sm_count.value: expected a whole number", load_hardware, tmp_path / "p.yaml")


# -- tables -----------------------------------------------------------------------------------------------------------------------

QUALITY = "method,family,model,sparsity,metric,higher_is_better,dense,pruned,protocol,source,options\n"


@pytest.mark.parametrize("value", ["\u00b2", "--5", "9" * 30])
def test_options_of_a_quality_table_that_look_like_numbers(value: str, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(f"{QUALITY}m,width,x,0.1,ppl,false,5,6,p,s,align={value}\n", encoding="utf-8")
    assert dict(load_quality(tmp_path / "q.csv").rows[0].options) == {"align": value}  # text: the family refuses it


def test_a_loss_without_bounds(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(f"{QUALITY}m,depth,x,0.1,ppl,false,1e-320,6,p,s,\n")
    refused("q.csv:2: dense: 1e-320 is too small", load_quality, tmp_path / "q.csv")


@pytest.mark.parametrize("cell", ['"' + "x" * 200_000 + '"', '"open'])
def test_speedups_that_are_no_csv(cell: str, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(f"family,sparsity,speedup\ndepth,0.1,{cell}\n")
    refused("s.csv:2: is not CSV", read_measured, tmp_path / "s.csv")


def test_measured_tables_without_a_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("gpu,dtype,op,latency_us,source,note\nRTX4090,bf16,act_fn,5,s,n\n")
    refused("m is missing or not a number", import_table, tmp_path / "t.csv")


@pytest.mark.parametrize(("heads", "copies"), [("inf", "1"), ("32", "1e12"), ("nan", "nan")])
def test_counts_that_no_column_can_hold(heads: str, copies: str, tmp_path: Path) -> None:
    row = f"1,1,128,{heads},8,128,50,attention_decode,{copies},1e18"
    (tmp_path / "t.csv").write_text(
        f"batch,q_len,kv_len,heads,kv_heads,head_dim,latency_us,operator,copies,sample_count\n{row}\n"
    )
    refused("no usable row", import_table, tmp_path / "t.csv")


@pytest.mark.parametrize(
    "column", [{"dtype": 99}, {"operator": -1}, {"role": -2}, {"m": 1e30}, {"m": np.nan}, {"m": np.array(1j)}]
)
def test_records_refuse_what_a_cast_would_change(column: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="records column"):
        Records.from_columns([Source("x")], **{"m": [1], "n": 1, "k": 1, "seconds": 1.0, **column})


# -- Parquet ----------------------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, names: list[str], columns: list[Any], metadata: bytes = b"") -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table(columns, names=names)
    pq.write_table(table.replace_schema_metadata({b"prunesim.records": metadata}) if metadata else table, path)
    return path


@pytest.mark.parametrize(
    "metadata", [b"[]", b"1", b"{}", b"[" * 100_000, b'{"schema": 1, "constant": [], "sources": [1], "extra": {}}']
)
def test_metadata_of_records_that_are_none(metadata: bytes, tmp_path: Path) -> None:
    refused("t.parquet: ", import_table, write_parquet(tmp_path / "t.parquet", ["m"], [[1]], metadata))


@pytest.mark.parametrize(
    "source",
    [{"device": 1}, {"device": "x", "stack": []}, {"device": "x", "stack": {"a": 1}}, {"device": "x", "other": "y"}],
)
def test_sources_of_records_that_are_none(source: dict[str, Any], tmp_path: Path) -> None:
    head = json.dumps(
        {"schema": 1, "constant": {"n": 4, "k": 4, "source": 0}, "sources": [source], "extra": {}}
    ).encode()
    refused(
        "is a damaged table", import_table, write_parquet(tmp_path / "t.parquet", ["m", "seconds"], [[1], [1.0]], head)
    )


@pytest.mark.parametrize("odd", [[[1, 2]], [b"\xff"], [{"a": 1}], [None]])
@pytest.mark.parametrize("name", ["op_name", "framework", "device", "gemm_dtype", "m", "latency"])
def test_columns_of_odd_types(name: str, odd: list[Any], tmp_path: Path) -> None:
    columns: dict[str, Any] = {n: ["x"] for n in ("framework", "version", "device", "kernel_source")} | {
        "op_name": ["gemm"]
    }
    columns |= {"gemm_dtype": ["bfloat16"], "m": [1], "n": [4096], "k": [4096], "latency": [0.05]}
    columns[name] = odd
    path = write_parquet(tmp_path / "t.parquet", list(columns), list(columns.values()))
    message, found = refusal(lambda: import_table(path), "t.parquet")
    assert message or len(found.records) == 1


def test_a_column_that_appears_twice(tmp_path: Path) -> None:
    refused("column 'm' appears twice", import_table, write_parquet(tmp_path / "t.parquet", ["m", "m"], [[1], [1]]))


def test_columns_without_a_name_that_appear_twice(tmp_path: Path) -> None:
    refused("column '' appears twice", import_table, write_parquet(tmp_path / "t.parquet", ["", ""], [[1], [1]]))
    refused("column 'm' appears twice", import_table, write_parquet(tmp_path / "u.parquet", ["m", "m"], [[1], [[1]]]))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("0.5,64,64,1e-5", "column m, row 1: expected a number from 1"),
        ("8,1e12,64,1e-5", "column n, row 1"),
        ("8,64,nan,1e-5", "column k, row 1"),
        ("8,64,64,1e300", "column seconds, row 1: expected a time"),
    ],
)
def test_measured_gemms_that_no_prediction_fits(row: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "g.csv").write_text(f"m,n,k,seconds\n{row}\n")
    refused(f"g.csv: {says}", read_measured_gemms, tmp_path / "g.csv")


def test_measured_gemms_with_formats_that_are_no_text(tmp_path: Path) -> None:
    columns: list[Any] = [[1, 2], [64, 64], [64, 64], [1e-5, 1e-5], [b"\xff", None]]
    path = write_parquet(tmp_path / "g.parquet", ["m", "n", "k", "seconds", "dtype"], columns)
    refused("g.parquet: no row of bf16", read_measured_gemms, path)


@pytest.mark.parametrize(
    ("columns", "notes"),
    [
        ({"family": ["depth"], "x": [1.0]}, "{}"),
        ({"family": ["depth"], "speedup": ["1"]}, "{}"),
        (None, "[]"),
        (None, '{"a": 1}'),
        (None, '{"a": ["x"]}'),
        (None, f'{{"a": [{10**400}]}}'),
        (None, "[" * 100_000),
        (None, "\xff"),
    ],
)
def test_parts_of_a_sweep_that_are_damaged(columns: dict[str, Any] | None, notes: str, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    store, good = Store(tmp_path / "s.parquet", "d", 2), {"family": ["depth"], "speedup": [1.5]}
    store.folder.mkdir()
    for index, found in enumerate((good, columns or good)):
        said = {NOTES_KEY: notes.encode("latin-1") if index else b"{}"}
        pq.write_table(pa.table(found).replace_schema_metadata(said), store.part(index))
    refused("part-000001.parquet: is damaged", store.assemble)
    assert {p.name for p in tmp_path.iterdir()} == {"s.parquet.parts"}


# -- records of a run -------------------------------------------------------------------------------------------------------------


def store(path: Path, *rows: Any, header: dict[str, Any] | None = None) -> Path:
    path.write_bytes(b"".join(map(crc_line, (header or HEADER.as_dict(), *rows))))
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"stack": []},
        {"stack": {"a": 1}},
        {"extra": 1},
        {"device": None},
        {"dtype": ["bf16"]},
        {"dtype": "fp7"},
        {"run": 3},
        {"schema": [1] * 99},
    ],
)
def test_headers_of_a_store_that_are_none(change: dict[str, Any], tmp_path: Path) -> None:
    refused("r.jsonl:1: ", read_store, store(tmp_path / "r.jsonl", header={**HEADER.as_dict(), **change}))


@pytest.mark.parametrize(
    "row",
    [
        {"operator": GEMM, "median_s": 0.0, "lower_s": 1, "upper_s": 2},
        {"operator": GEMM, "median_s": "soon"},
        {"operator": GEMM, "median_s": 10**400},
        {"operator": GEMM, "median_s": [1]},
        {"operator": {}, "median_s": 1.0},
        {"operator": {**GEMM, "m": 1.5}, "median_s": 1.0},
        {"operator": {**GEMM, "m": "8"}, "median_s": 1.0},
        {"operator": {**GEMM, "m": -8}, "median_s": 1.0},
        {"operator": {**GEMM, "m": 1 << 63}, "median_s": 1.0},
        {"operator": {**GEMM, "dtype": 3}, "median_s": 1.0},
        {"operator": {**GEMM, "kind": "gem"}, "median_s": 1.0},
        {"operator": {**GEMM, "density": 0}, "median_s": 1.0},
        {"operator": GEMM, "median_s": 1.0, "samples_s": 5},
        {"operator": GEMM, "median_s": 1.0, "lower_s": "a", "upper_s": 1},
        {"operator": {"kind": "copy"}, "median_s": 1.0},
    ],
)
def test_records_that_are_no_timing(row: dict[str, Any], tmp_path: Path) -> None:
    content = read_store(store(tmp_path / "r.jsonl", row))
    refused("r.jsonl: record 1: is no timing", content_records, content)


def test_a_block_that_is_no_number_is_none(tmp_path: Path) -> None:
    rows = [{"operator": GEMM, "median_s": 1.0, "block": "x", "drifted": True}]
    assert len(content_records(read_store(store(tmp_path / "r.jsonl", *rows)))) == 1


@pytest.mark.parametrize("body", [b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"a":NaN}'])
def test_lines_with_a_right_checksum_that_are_no_json(body: bytes, tmp_path: Path) -> None:
    import zlib

    line = body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)
    path = store(tmp_path / "r.jsonl")
    path.write_bytes(path.read_bytes() + line + crc_line({"key": "x"}))
    refused("r.jsonl:2: damaged record", read_store, path)


def test_merging_what_no_store_would_write(tmp_path: Path) -> None:
    raw = b'{"key":"x","a":1e999}'
    path = store(tmp_path / "r.jsonl")
    import zlib

    path.write_bytes(path.read_bytes() + raw[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(raw))
    refused("cannot be merged", merge, [path], tmp_path / "o.jsonl")
    assert not (tmp_path / "o.jsonl").exists()
    two = store(tmp_path / "s.jsonl", {"key": "x", "run": "\ud800"}, {"key": "y", "run": "b"})
    assert len(merge([two], tmp_path / "o.jsonl").rows) == 2


@pytest.mark.parametrize(
    "change",
    [{"method": None}, {"fraction": "x"}, {"realised": 2.0}, {"losses": []}, {"losses": [10**400]}, {"losses": 1.0}],
)
def test_points_of_a_quality_run_that_are_none(change: dict[str, Any], tmp_path: Path) -> None:
    point = {"method": "depth", "fraction": 0.25, "realised": 0.25, "losses": [1.0], **change}
    path = tmp_path / "q.partial.jsonl"
    path.write_bytes(crc_line({"plan": 1}) + crc_line(point))
    before = path.read_bytes()
    refused("no measured point", Results, path, {"plan": 1})
    assert path.read_bytes() == before


# -- arrays of a profile ----------------------------------------------------------------------------------------------------------


def test_the_good_arrays_are_good(tmp_path: Path) -> None:
    raw = pack_arrays(good_arrays())
    (tmp_path / "a.npz").write_bytes(raw)
    (tmp_path / "p.yaml").write_text(profile_with(raw, "a.npz"), encoding="utf-8")
    hw = load_hardware(tmp_path / "p.yaml")
    times(hw)
    save_hardware(hw, tmp_path / "q.yaml")  # its constants are an empty mapping, which was written as nothing
    assert load_hardware(tmp_path / "q.yaml").sections.keys() == hw.sections.keys()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("gemm.bf16.grids", None, "array grids is missing"),
        ("gemm.bf16.measured_m", None, "measured_m is missing"),
        ("gemm.bf16.terms", np.array([[0, 1, 99], [11, -1, -1]]), "array terms"),
        ("gemm.bf16.terms", np.array([[-1, -1, -1], [11, -1, -1]]), "array terms"),
        ("gemm.bf16.grids", np.zeros((2, 3, 3)), "array grids"),
        ("gemm.bf16.values", np.zeros(7), "array values"),
        ("gemm.bf16.values", np.full(8, 900.0), "array values"),
        ("gemm.bf16.measured_m", np.zeros(0), "array measured_m"),
        ("gemm.bf16.measured_m", np.array([0.0, 5.0]), "array measured_m"),
        ("gemm.bf16.exact_s", np.array([1.0]), "exact shapes"),
        ("gemm.bf16.exact_log_half", np.array([0.0, 1e300]), "exact_log_half"),
        ("gemm.bf16.exact_n", None, "exact_n is missing"),
        ("attention_prefill.bf16.step", np.zeros(3), "array step"),
        ("attention_prefill.bf16.values", np.zeros((2, 2)), "array values"),
        ("attention_decode.bf16.start", np.zeros(2), "array start"),
        ("attention_decode.bf16.values", np.zeros((0, 2, 2)), "array values"),
        ("elementwise.bf16.values", np.zeros((3, 4)), "array values"),
        ("elementwise.bf16.start", np.zeros(2), "array start"),
        ("elementwise.bf16.start", None, "array start is missing"),
    ],
)
def test_arrays_that_a_cost_model_could_not_use(name: str, value: Any, says: str, tmp_path: Path) -> None:
    operator, dtype, short = name.split(".")
    own = {n.split(".")[2]: a for n, a in good_arrays().items() if n.startswith(f"{operator}.")}
    own = {n: a for n, a in own.items() if n != short} | ({} if value is None else {short: value})
    with pytest.raises(ValueError, match=says) as caught:
        check_arrays(operator, own)
    assert "\n" not in str(caught.value)
    raw = pack_arrays({**good_arrays(), **({} if value is None else {name: value})})
    (tmp_path / "a.npz").write_bytes(raw)
    (tmp_path / "p.yaml").write_text(profile_with(raw, "a.npz"), encoding="utf-8")
    if value is not None:
        refused(f"calibrated.{operator}.bf16.arrays.file: ", load_hardware, tmp_path / "p.yaml")
    hw = load_hardware("a100")
    section = replace(hw.section(operator, dtype), arrays=MappingProxyType(own))
    refused(says.split()[-1], save_hardware, replace(hw, sections={(operator, dtype): section}), tmp_path / "out.yaml")
    assert not (tmp_path / "out.yaml").exists()


def test_shipped_arrays_pass() -> None:
    for name in simulator.list_hardware():
        for (operator, _), section in load_hardware(name).sections.items():
            check_arrays(operator, section.arrays)
            for short in set(section.arrays) & {"values"}:
                assert float(np.abs(section.arrays[short]).max()) < 0.5 * MOST_LOG


def test_a_broken_zip_says_so(tmp_path: Path) -> None:
    raw = pack_arrays(good_arrays())
    cut = raw[100:]
    (tmp_path / "a.npz").write_bytes(cut)
    text = profile_with(raw, "a.npz").replace(hashlib.sha256(raw).hexdigest(), hashlib.sha256(cut).hexdigest())
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    refused("is no readable .npz", load_hardware, tmp_path / "p.yaml")
