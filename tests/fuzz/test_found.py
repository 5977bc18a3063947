"""What the fuzz tests found, each as its smallest case: refused in one line where it was a traceback or a lost file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from good import ARRAYS, SMALL, SMALL_CONFIGS, arrays_of, crc_line, profile_with
from guard import refusal
from targets import times

import simulator
from calibration.devices.replay import open_named
from calibration.records.importers import import_table
from calibration.records.store import Header, read_store
from calibration.records.stored_timings import content_records
from calibration.records.timing_table import Records, Source
from simulator.cli import run
from simulator.errors import InputError
from simulator.figures.measured import read_measured_gemms
from simulator.hardware.arrays import check_arrays, pack_arrays
from simulator.hardware.library import load_hardware
from simulator.hardware.save import save_hardware
from simulator.prediction.pareto import read_measured
from simulator.prediction.quality import load_quality

pytestmark = pytest.mark.quick

DEEP = b"[" * 100_000
HEADER = Header("A100", {"torch": "2.9"}, "bf16", "r", "2026-01-01", {}).as_dict()
GEMM = {"kind": "gemm", "m": 8, "n": 64, "k": 64, "dtype": "bf16"}
TIMING = {"operator": GEMM, "median_s": 1.0}
QUALITY = "method,family,model,sparsity,metric,higher_is_better,dense,pruned,protocol,source,options\n"
SPEEDUPS = "family,sparsity,speedup\ndepth,0.1,"
COUNTS = "batch,q_len,kv_len,kv_heads,head_dim,latency_us,operator,sample_count,heads,copies\n" + (
    "1,1,128,8,128,50,attention_decode,1e18,"
)


def refused(says: str, call: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert says in str(caught.value)
    assert str(caught.value).isprintable()


def write_parquet(path: Path, names: list[str], columns: list[Any], metadata: dict[bytes, bytes] | None = None) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns, names=names).replace_schema_metadata(metadata), path)
    return path


def jsonl(path: Path, *rows: Any) -> Path:
    numbered = ({"line": i, **row} if i > 1 and isinstance(row, dict) else row for i, row in enumerate(rows, 1))
    path.write_bytes(b"".join(map(crc_line, numbered)))
    return path


def test_a_message_is_one_printable_line_whatever_it_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    message = str(InputError("file: got a\nb\x1b[31m\u202e\ud800" + "x" * 9000))
    assert message.isprintable()
    assert message.startswith("file: got a b\\x1b[31m\\u202e")
    assert len(message) <= 4000
    refused("home", simulator.load_model, "~nobody-of-that-name/config.json")
    assert run(["9" * 9000]) == 2  # a command that nobody has
    assert len(capsys.readouterr().err.rstrip("\n")) <= 4000


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\ud800", "x" * 3000, "..", "org/..", "a\u202eb", "\u00a0"])
def test_a_models_name_is_short_printable_and_no_path(name: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "llama", "vocab_size": 10, **sizes, "_name_or_path": name}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = simulator.load_model(tmp_path).name
    assert found.isprintable()
    assert 0 < len(found) <= 80
    assert not set("/\\") & set(found) or "\\x1b" in found or "\\u" in found
    assert found not in (".", "..")


READERS: dict[str, Callable[[Path], Any]] = {
    **{"q.csv": load_quality, "s.csv": read_measured, "t.csv": import_table, "g.csv": read_measured_gemms},
    **{"p.yaml": load_hardware, "store.jsonl": read_store},
    "timings.jsonl": lambda path: content_records(read_store(path)),
    "replay.jsonl": lambda path: open_named(str(path)),
}


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("p.yaml", SMALL.replace("value: 132", "value: \u0661"), "datasheet.sm_count.value: expected a whole number"),
        ("q.csv", f"{QUALITY}m,depth,x,0.1,ppl,false,1e-320,6,p,s,\n", "q.csv:2: dense: 1e-320 is too small"),
        ("s.csv", f'{SPEEDUPS}"{"x" * 200_000}"\n', "s.csv:2: is not CSV"),
        ("s.csv", f'{SPEEDUPS}"open\n', "s.csv:2: is not CSV"),
        ("t.csv", "gpu,dtype,op,latency_us,source,note\nRTX4090,bf16,act_fn,5,s,n\n", "m is missing or not a number"),
        *(("t.csv", f"{COUNTS}{counts}\n", "no usable row") for counts in ("inf,1", "32,1e12", "nan,nan")),
        ("g.csv", "m,n,k,seconds\n0.5,64,64,1e-5", "g.csv: column m, row 1: expected a number from 1"),
        ("g.csv", "m,n,k,seconds\n8,1e12,64,1e-5", "g.csv: column n, row 1"),
        ("g.csv", "m,n,k,seconds\n8,64,nan,1e-5", "g.csv: column k, row 1"),
        ("g.csv", "m,n,k,seconds\n8,64,64,1e300", "g.csv: column seconds, row 1: expected a time"),
        *(
            ("store.jsonl", crc_line({**HEADER, **change}), "store.jsonl:1: ")
            for change in (
                *({"stack": []}, {"stack": {"a": 1}}, {"extra": 1}, {"device": None}, {"dtype": ["bf16"]}),
                *({"dtype": "fp7"}, {"run": 3}, {"schema": [1] * 99}),
            )
        ),
        *(
            ("replay.jsonl", "{}\n" + json.dumps({**TIMING, **change}), "replay.jsonl:2: ")
            for change in (
                *({"operator": operator} for operator in ("gemm", [1], {"kind": []}, {"shape": 1})),
                *({"median_s": median} for median in ("soon", [1], {"a": 1}, -1.0, float("inf"), 10**400)),
            )
        ),
        *(  # a right checksum, and no JSON
            ("store.jsonl", b"".join(map(crc_line, (HEADER, body, {"key": "x"}))), "store.jsonl:2: damaged record")
            for body in (b'{"a":' + DEEP + b"]" * 100_000 + b"}", b'{"a":NaN}')
        ),
        *(
            ("timings.jsonl", crc_line(HEADER) + crc_line({"line": 2, **TIMING, **change}), "record 1: not a timing")
            for change in (
                *({"operator": {}}, {"operator": {"kind": "copy"}}, {"samples_s": 5}, {"lower_s": "a", "upper_s": 1}),
                *({"median_s": value} for value in ("soon", 10**400, [1])),
                {"median_s": 0.0, "lower_s": 1, "upper_s": 2},
                *({"operator": {**GEMM, "m": m}} for m in (1.5, "8", -8, 1 << 63)),
                *({"operator": {**GEMM, **odd}} for odd in ({"dtype": 3}, {"kind": "gem"}, {"density": 0})),
            )
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_files_that_are_refused(file: str, content: str | bytes, says: str, tmp_path: Path) -> None:
    raw = content.encode() if isinstance(content, str) else content
    (tmp_path / file).write_bytes(raw)
    refused(says, READERS[file], tmp_path / file)
    assert (tmp_path / file).read_bytes() == raw


SCHEMA = b'{"schema": 1, "extra": {}, "constant": %s, "sources": [%s]}'
ODD_SOURCES = (
    b'"device": 1',
    b'"device": "x", "stack": []',
    b'"device": "x", "stack": {"a": 1}',
    b'"device": "x", "y": 1',
)
METADATA = [b"[]", b"1", b"{}", DEEP, SCHEMA % (b"[]", b"1")]
METADATA += [SCHEMA % (b'{"n": 4, "k": 4, "source": 0}', b"{%s}" % source) for source in ODD_SOURCES]


@pytest.mark.parametrize("metadata", METADATA, ids=range(9))
def test_metadata_of_records_that_are_none(metadata: bytes, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", ["m", "seconds"], [[1], [1.0]], {b"prunesim.records": metadata})
    refused("damaged table" if b'"device"' in metadata else "t.parquet: ", import_table, path)


@pytest.mark.parametrize("odd", [[[1, 2]], [b"\xff"], [{"a": 1}], [None]])
@pytest.mark.parametrize("name", ["op_name", "framework", "device", "gemm_dtype", "m", "latency"])
def test_columns_of_odd_types(name: str, odd: list[Any], tmp_path: Path) -> None:
    columns: dict[str, Any] = {n: ["x"] for n in ("framework", "version", "device", "kernel_source")}
    columns |= {"op_name": ["gemm"], "gemm_dtype": ["bfloat16"], "m": [1], "n": [4096], "k": [4096], "latency": [0.05]}
    columns[name] = odd
    path = write_parquet(tmp_path / "t.parquet", list(columns), list(columns.values()))
    message, found = refusal(lambda: import_table(path), "t.parquet")
    assert message or len(found.records) == 1


@pytest.mark.parametrize(("name", "second"), [("m", [1]), ("", [1]), ("m", [[1]])])
def test_a_column_that_appears_twice(name: str, second: list[Any], tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", [name, name], [[1], second])
    refused(f"column '{name}' appears twice", import_table, path)


def test_measured_gemms_with_formats_that_are_no_text(tmp_path: Path) -> None:
    columns: list[Any] = [[1, 2], [64, 64], [64, 64], [1e-5, 1e-5], [b"\xff", None]]
    path = write_parquet(tmp_path / "g.parquet", ["m", "n", "k", "seconds", "dtype"], columns)
    refused("g.parquet: no row of bf16", read_measured_gemms, path)


@pytest.mark.parametrize("value", ["\u00b2", "--5", "9" * 30])
def test_options_of_a_quality_table_that_look_like_numbers(value: str, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(f"{QUALITY}m,width,x,0.1,ppl,false,5,6,p,s,align={value}\n", encoding="utf-8")
    assert dict(load_quality(tmp_path / "q.csv").rows[0].options) == {"align": value}  # text: the family refuses it


@pytest.mark.parametrize(
    "column", [{"dtype": 99}, {"operator": -1}, {"role": -2}, {"m": 1e30}, {"m": np.nan}, {"m": np.array(1j)}]
)
def test_records_refuse_what_a_cast_would_change(column: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="records column"):
        Records.from_columns([Source("x")], **{"m": [1], "n": 1, "k": 1, "seconds": 1.0, **column})


def test_an_index_that_names_a_file_no_system_would_take(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL_CONFIGS[0]))
    index = tmp_path / "model.safetensors.index.json"
    for name in ("x" * 3000, "\ud800"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refused("is missing (1 of 1 are missing)", simulator.load_model, tmp_path)


def test_a_block_that_is_no_number_is_none(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "r.jsonl", HEADER, {**TIMING, "block": "x", "drifted": True})
    assert len(content_records(read_store(path))) == 1


def profile_of(arrays: Any, folder: Path, cut: int = 0) -> Path:
    """A profile beside these arrays; the first bytes of their file may be cut off."""
    raw = pack_arrays(arrays)[cut:]
    (folder / "a.npz").write_bytes(raw)
    (folder / "p.yaml").write_text(profile_with(raw, "a.npz"), encoding="utf-8")
    return folder / "p.yaml"


def test_the_good_arrays_are_good_and_a_broken_zip_says_so(tmp_path: Path) -> None:
    hw = load_hardware(profile_of(ARRAYS, tmp_path))
    times(hw)
    save_hardware(hw, tmp_path / "q.yaml")  # its constants are an empty mapping, which was written as nothing
    assert load_hardware(tmp_path / "q.yaml").sections.keys() == hw.sections.keys()
    refused("is not a readable .npz", load_hardware, profile_of(ARRAYS, tmp_path, cut=100))


# fmt: off
ODD_ARRAYS = [
    ("gemm", "start", None, "needs array start"),
    ("gemm", "step", np.zeros(3), "array step"),
    ("gemm", "measured", np.zeros(6), "array measured: expected the shape"),
    ("gemm", "measured", np.full((2, 3), 1e300), "array measured: expected values"),
    ("gemm", "values", np.zeros(7), "array values"),
    ("gemm", "values", np.full((2, 2, 2), 900.0), "array values"),
    ("gemm", "exact_s", np.array([1.0]), "exact shapes"),
    ("gemm", "exact_log_half", np.array([0.0, 1e300]), "exact_log_half"),
    ("gemm", "exact_n", None, "exact_n is missing"),
    ("attention_prefill", "step", np.zeros(3), "array step"),
    ("attention_prefill", "values", np.zeros((2, 2)), "array values"),
    ("attention_decode", "start", np.zeros(2), "array start"),
    ("attention_decode", "values", np.zeros((0, 2, 2)), "array values"),
    ("elementwise", "values", np.zeros((3, 4, 2)), "array values"),
    ("elementwise", "start", np.zeros(2), "array start"),
    ("elementwise", "start", None, "array values needs array start"),
]
# fmt: on


@pytest.mark.parametrize(("operator", "name", "value", "says"), ODD_ARRAYS)
def test_arrays_that_a_cost_model_could_not_use(
    operator: str, name: str, value: Any, says: str, tmp_path: Path
) -> None:
    own = {n.split(".")[2]: array for n, array in arrays_of(operator).items()}
    own.pop(name, None)
    if value is not None:
        own[name] = value
        profile = profile_of({**ARRAYS, f"{operator}.bf16.{name}": value}, tmp_path)
        refused(f"calibrated.{operator}.bf16.arrays.file: ", load_hardware, profile)
    with pytest.raises(ValueError, match=says) as caught:
        check_arrays(operator, own)
    assert "\n" not in str(caught.value)
    hw = load_hardware("a100")
    section = replace(hw.section(operator, "bf16"), arrays=MappingProxyType(own))
    odd = replace(hw, sections={(operator, "bf16"): section})
    refused(says.split()[-1], save_hardware, odd, tmp_path / "out.yaml")
    assert not (tmp_path / "out.yaml").exists()


@pytest.mark.parametrize("operator", ["attention_decode", "mla_prefill", "experts", "collective"])
@pytest.mark.parametrize(("name", "value"), [("values", np.zeros((60, 1))), ("start", np.zeros(1)), ("step", None)])
def test_lattices_of_three_coordinates_of_whatever_operator(operator: str, name: str, value: Any) -> None:
    good = {"values": np.zeros((3, 4, 5)), "start": np.zeros(3), "step": np.ones(3)}
    check_arrays(operator, good)
    own = {key: array for key, array in {**good, name: value}.items() if array is not None}
    with pytest.raises(ValueError, match=f"array {name}"):
        check_arrays(operator, own)
