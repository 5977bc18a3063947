"""Published tables: what is taken, what is refused and counted, what stops an import."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tables import tables_of

from calibration.evidence.measurements.wheel import datasheet
from calibration.records.importers import ImportResult, import_table
from calibration.records.screening import L2_BYTES_PER_CLOCK, least_seconds, refusal_lines, too_fast
from calibration.records.store import Header, Store
from calibration.records.timing_table import (
    LAUNCHES,
    OPERATORS,
    Flag,
    Records,
    Source,
    write_records,
)
from simulator.codes import DTYPES, ROLES
from simulator.errors import InputError

pytestmark = pytest.mark.quick

H100 = datasheet("h100_sxm")
A100 = datasheet("a100_sxm_80gb")


def refused(says: str, call: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(InputError, match=says):
        call(*arguments, **options)


def counts(result: ImportResult) -> dict[str, int]:
    return {reason: len(rows) for reason, rows in result.refusals.items()}


def csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def gemms(path: Path, lines: list[str], header: str = "m,n,k,latency_us") -> Path:
    """A CSV of good rows and then the given ones."""
    good = [f"{16 * (i + 1)},4096,4096,{30 + i}" for i in range(30)]
    return csv(path, "\n".join([header, *good, *lines]) + "\n")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


def test_the_time_column_names_its_unit(path: Path) -> None:
    scales = {
        "seconds": 1.0,
        "latency_s": 1.0,
        "latency_ms": 1e3,
        "latency_us": 1e6,
        "latency_ns": 1e9,
    }
    for name, scale in scales.items():
        csv(path, f"M;x,N,K,time\n8,64,64,{3e-5 * scale!r}\n")
        result = import_table(path, column_map={"m": "M;x", "n": "N", "k": "K", name: "time"})
        assert result.records.seconds[0] == pytest.approx(3e-5)


@pytest.mark.parametrize(("line", "reason"), tables_of("records/mistakes.yaml")["rows"])
def test_bad_rows_are_counted_under_their_reason(path: Path, line: str, reason: str) -> None:
    result = import_table(gemms(path, [line, "16,4096,4096,30", line]), hw=H100)
    assert counts(result) == {reason: 2}
    assert refusal_lines(result.refusals) == [f"2 rows: {reason} (rows 31, 33)"]
    assert len(result.records) == 30  # the good row repeats the first shape


def test_a_table_with_nothing_usable_says_why(path: Path) -> None:
    csv(path, "m,n,k,latency_us\n1,64,64,0\n2,64,64,-1\n3,64,64,0\n")
    reasons = (
        r"no usable row: 2 rows: time is zero \(rows 1, 3\); 1 row: time is negative \(row 2\)"
    )
    refused(reasons, import_table, path)


@pytest.mark.parametrize(("text", "columns", "reason"), tables_of("records/mistakes.yaml")["files"])
def test_files_that_cannot_be_understood_are_refused(
    path: Path, text: str, columns: Mapping[str, str] | None, reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        import_table(csv(path, text), column_map=columns)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    for name, content, reason in (
        ("x.csv", b"\x93NUMPY\xff\xfe", r"is not CSV: not UTF-8 text \(byte 0\)"),
        ("x.parquet", b"PAR1 and then nothing", "cannot be read as Parquet"),
        ("x.parquet", b"m,n,k\n", "not a Parquet file"),
    ):
        refused(reason, import_table, tmp_path / name, content=content)
    refused("cannot be read: No such file", import_table, tmp_path / "none.csv")


def test_repeated_shapes_give_their_median_and_disagreement_is_flagged(path: Path) -> None:
    lines = ["16,4096,4096,32.5", "32,4096,4096,34", "32,4096,4096,35"]
    result = import_table(gemms(path, lines), hw=H100)
    assert (len(result.records), result.refusals) == (30, {})
    assert result.records.sources[0].origin == "table.csv"
    assert result.records.seconds[:3] == pytest.approx([31.25e-6, 34e-6, 32e-6])
    assert result.records.flags.tolist()[:3] == [0, Flag.CONFLICT, 0]
    note = (
        "3 rows repeat a shape, replaced by their median; 1 shapes differ by over 10 %, flagged"
        " CONFLICT"
    )
    assert result.notes == (note,)


def test_rows_keep_the_place_that_they_were_read_from_and_files_and_digests_do_not(
    tmp_path: Path,
) -> None:
    table, run = tmp_path / "t.csv", tmp_path / "records.jsonl"
    table.write_text("m,n,k,seconds\n\n1,64,64,1\n2,64,64,-1\n3,64,64,1\n")
    csv = import_table(table).records
    assert [csv.place(i) for i in range(2)] == [
        f"{table}:{line}: gemm bf16 m={m} n=64 k=64" for line, m in ((3, 1), (5, 3))
    ]
    with Store(run, Header("H100", {"driver": "1"})) as store:
        for m in (1, 2):
            store.append({"operator": {"kind": "gemm", "m": m, "n": 8, "k": 8}, "median_s": 1.0})
    assert import_table(run).records.place(1) == f"{run}:3: gemm bf16 m=2 n=8 k=8"
    both = Records.concat([csv, csv.replace(sources=(replace(csv.sources[0], file="other.csv"),))])
    # two files have it: none is named
    assert (len(both.sources), both.place(0)) == (1, "gemm bf16 m=1 n=64 k=64")
    moved = csv.replace(line=0, sources=(replace(csv.sources[0], file=""),))
    assert moved.digest() == csv.digest()
    assert write_records(moved) == write_records(csv)


def test_a_file_may_mix_number_formats(path: Path) -> None:
    formats = ("bfloat16,bf16", "fp8,fp8", "bf16,int8")
    rows = [f"{m},4096,4096,{names},40" for m in range(1, 31) for names in formats]
    csv(path, "\n".join(["m,n,k,dtype,weight_dtype,latency_us", *rows]))
    assert set(import_table(path, hw=H100).records.labels()) == {"bf16", "fp8", "int8_wo"}


def test_a_missing_datasheet_is_noted(path: Path) -> None:
    csv(path, "m,n,k,latency_us,comment\n" + "".join(f"{m},64,64,5,x\n" for m in range(1, 11)))
    notes = import_table(path).notes
    assert any("not checked against a roofline" in note for note in notes)
    assert "columns not used: comment" in notes


def test_attention_and_other_operators_from_csv(path: Path) -> None:
    header = "operator,batch,q_len,kv_len,heads,kv_heads,head_dim,m,n,k,role,latency_us\n"
    rows = [
        "attention_decode,4,1,1000,32,8,128,,,,,30",
        "attention_decode,4,1,1000,32,7,128,,,,,30",
        "attention_prefill,1,20,10,32,8,128,,,,,30",
        "elementwise,,,,,,,128,4096,,activation,30",
        "gemm,,,,,,,128,4096,4096,q,30",
        "conv,,,,,,,1,1,1,q,30",
        "gemm,,,,,,,128,4096,,q,30",
    ]
    result = import_table(csv(path, header + "\n".join(rows)))
    assert [OPERATORS[o] for o in result.records.operator] == [
        "attention_decode",
        "elementwise",
        "gemm",
    ]
    assert [int(r) for r in result.records.role] == [
        -1,
        ROLES.index("activation"),
        ROLES.index("q"),
    ]
    heads = ["heads is not a multiple of kv_heads", "q_len exceeds kv_len"]
    reasons = ["operator 'conv' is unknown", "k is missing or not a number", *heads]
    assert counts(result) == dict.fromkeys(reasons, 1)


def test_a_store_and_a_table_of_records_are_read_too(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "records.jsonl"
    with Store(path, Header("H100", {"driver": "1"})) as store:
        for m in range(1, 31):
            operator = {"kind": "gemm", "m": m, "n": 4096, "k": 4096, "dtype": "bf16"}
            store.append(
                {"operator": operator, "median_s": 1e-9 if m == 30 else 3e-5, "status": "ok"}
            )
        store.append({"operator": {"kind": "gemm"}, "status": "skipped", "reason": "out of memory"})
    path.write_bytes(path.read_bytes() + b'{"half a')
    result = import_table(path, hw=H100)
    assert counts(result) == {"faster than the arithmetic peak at the highest clock": 1}
    cut = "the last line was incomplete and was dropped"
    assert result.notes == (cut, "1 operators without a time: skipped: out of memory")
    (tmp_path / "records.parquet").write_bytes(write_records(result.records))
    again = import_table(tmp_path / "records.parquet", hw=H100)
    assert again.records.digest() == result.records.digest()
    (tmp_path / "records.parquet").write_bytes(write_records(result.records.replace(m=0)))
    refused("no usable row: 29 rows: m is below 1", import_table, tmp_path / "records.parquet")


def cell(text: str) -> int | float | str:
    """Return a value of a table as its number, if it is one."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def aic(
    path: Path, table: str, framework: str = "TRTLLM", op: str = "gemm", kernel: str = "k"
) -> Path:
    """Write a table as the package has them, with the columns and rows of a text."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    header, *rows = (line.split() for line in table.strip().splitlines())
    columns: dict[str, Any] = {
        name: [cell(text) for text in column]
        for name, column in zip(header, zip(*rows, strict=True), strict=True)
    }
    shared = {"framework": framework, "version": "1.0.0", "op_name": op, "kernel_source": kernel}
    shared["device"] = "NVIDIA A100-SXM4-80GB"
    columns |= {name: [value] * len(rows) for name, value in shared.items()}
    pq.write_table(pa.table(columns), path)
    return path


def test_aiconfigurator_gemms(tmp_path: Path) -> None:
    table = """
    gemm_dtype  m     n      k  latency
    bfloat16    1  4096   4096     0.05
    int8_wo     1  4096   4096     0.03
    int4_wo     1  4096   4096     0.02
    sq          1  4096   4096     0.03
    mxfp6       1  4096   4096     0.03
    bfloat16    1  4096   4096      0.0
    bfloat16    1  4096  65536      0.7
    fp8_block   1  4096   4096     0.03
    nvfp4       1  4096   4096     0.02
    """
    path = aic(tmp_path / "gemm_perf.parquet", table)
    result = import_table(path, hw=A100)
    unknown = "the time includes a conversion of activations that no narrow row tells"
    assert counts(result) == {
        "number format mxfp6 is not modelled": 1,
        unknown: 3,
        "time is zero": 1,
    }
    assert result.records.labels().tolist() == ["bf16", "int8_wo", "int4_wo", "bf16"]
    # weights alone without the 4.7 us of a profiler
    assert result.records.seconds == pytest.approx(np.array([0.05, 0.0253, 0.0153, 0.7]) / 1e3)
    assert result.records.copies.tolist() == [2, 3, 5, 1]  # ceil(40 MiB / weight bytes), at most 6
    assert {LAUNCHES[c] for c in result.records.launch} == {"graph"}
    (source,) = result.records.sources
    assert (source.device, source.software, source.kernel) == (
        "NVIDIA A100-SXM4-80GB",
        "TRTLLM 1.0.0",
        "k",
    )
    assert source.licence == "Apache-2.0"
    assert source.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_products_of_no_random_numbers_are_taken_where_memory_bounds_them(tmp_path: Path) -> None:
    # the A100 computes 156 multiply-adds in the time of a weight of 2 bytes
    table = """
    gemm_dtype     m     n     k  latency
    bfloat16       1  8192  8192      0.1
    bfloat16      64  8192  8192      0.1
    bfloat16    4096  8192  8192      2.0
    """
    path = aic(tmp_path / "t.parquet", table, "vLLM")
    result = import_table(path, hw=A100)
    assert counts(result) == {"compute-bound, on operands that were not random numbers": 1}
    assert result.records.m.tolist() == [1, 64]
    refused("were not random numbers, .* name the hardware", import_table, path)


def test_aiconfigurator_latent_attention(tmp_path: Path) -> None:
    table = """
    batch_size  isl  num_heads  step  tp_size  mla_dtype  kv_cache_dtype  latency
             2    1         16  1023        8  bfloat16   bfloat16            0.5
             2    1        128  1023        1  bfloat16   fp8                 0.5
    """
    path = aic(tmp_path / "t.parquet", table, "SGLang", "mla_generation")
    decode = import_table(path, hw=A100).records
    assert decode.is_operator("mla_decode").all()
    # heads of this device, one latent
    assert (decode.heads.tolist(), decode.kv_heads.tolist()) == ([16, 128], [1, 1])
    assert (decode.head_dim.tolist(), decode.n.tolist()) == ([576] * 2, [512] * 2)
    assert (decode.kv_len.tolist(), decode.labels().tolist()) == ([1024] * 2, ["bf16", "fp8_wo"])
    prompt = """
    batch_size  isl  num_heads  step  tp_size  mla_dtype  kv_cache_dtype  latency
             2  512         16     0        8  bfloat16   bfloat16            0.5
             2  512        128     0        1  bfloat16   fp8                 0.5
    """
    path = aic(tmp_path / "u.parquet", prompt, "TRTLLM", "mla_context")
    records = import_table(path, hw=A100).records
    assert (records.kv_heads.tolist(), records.head_dim.tolist()) == ([16, 128], [192] * 2)
    assert records.n.tolist() == [128] * 2
    # kernel "k": not that of prompts
    path = aic(tmp_path / "v.parquet", prompt, "SGLang", "mla_context")
    refused("2 rows: a prompt on the path of a decode", import_table, path, hw=A100)


def test_latent_attention_is_held_against_physics() -> None:
    shape = {
        "operator": "mla_decode",
        "batch": 64,
        "q_len": 1,
        "kv_len": 8192,
        "heads": 128,
        "kv_heads": 1,
    }
    shape |= {"head_dim": 576, "n": 512, "copies": 1, "cold": False, "seconds": 1e-3}
    r = Records.from_columns([Source("H100")], **shape, weight_dtype=["bf16", "fp8"])
    compute, memory = least_seconds(r, H100)
    flop, peaks = (
        2.0 * 1088 * 64 * 128 * 8192,
        [H100.peak_flop_per_s(dtype) for dtype in ("bf16", "fp8")],
    )
    # in the cache's format
    assert compute == pytest.approx([flop / peak / H100.clock_headroom for peak in peaks])
    # the cache, queries and outputs, but for the L2
    moved = 64 * 8192 * 576 * 2 + 64 * 128 * 1088 * 2 - H100.l2_bytes
    assert memory[0] == pytest.approx(moved / H100.bandwidth_bytes_per_s)


def test_aiconfigurator_collectives(tmp_path: Path) -> None:
    table = """
    nccl_dtype  num_gpus  message_size  latency
    half               2           256     0.01
    int8               8           512     0.02
    half               8     268435456      0.9
    """
    path = aic(tmp_path / "t.parquet", table, op="alltoall")
    result = import_table(path, hw=A100)
    records = result.records
    # 512 MiB, of which 7/8 leave the device, in 0.9 ms: 522 GB/s on links of 300
    assert counts(result) == {"faster than memory, L2 or link allow": 1}
    assert records.is_operator("collective").all()
    assert [ROLES[code] for code in records.role] == ["all_to_all"] * 2
    assert (records.n.tolist(), records.batch.tolist()) == ([512, 512], [2, 8])  # bytes, devices
    assert [DTYPES[code] for code in records.dtype] == ["fp16", "int8"]
    table = "allreduce_dtype num_gpus message_size latency\nbfloat16 4 128 0.005"
    path = aic(tmp_path / "u.parquet", table, "vLLM", "all_reduce", "vLLM_custom_eager")
    own = import_table(path).records
    assert (LAUNCHES[own.launch[0]], int(own.n[0])) == ("eager", 256)


def test_aiconfigurator_tables_that_lack_something_are_refused(tmp_path: Path) -> None:
    path, time = tmp_path / "t.parquet", "latency\n0.01"
    gemm = "gemm_dtype m n latency\nbfloat16 1 64 0.01"
    refused("column k missing; the file has", import_table, aic(path, gemm))
    refused("op_name 'mamba' is unknown", import_table, aic(path, time, op="mamba"))
    refused("column moe_dtype missing", import_table, aic(path, time, op="moe"))


EXPERTS = """
moe_dtype    num_tokens  hidden_size  topk  inter_size  num_experts  moe_tp_size  moe_ep_size  latency  distribution
bfloat16              1         2048     8         768          128            1            1     0.08  balanced
bfloat16             64         2048     8         768          128            2            1      1.3  power_law_1.2
w4a16_mxfp4          64         2048     8         768          128            1            1      0.7  balanced
fp8                  64         2048     8         768          128            1            8      0.5  balanced
bfloat16             64         2048     8         768          128            1            1      0.4  uniform
w4afp8               64         2048     8         768          128            1            1      0.5  balanced
bfloat16             64         2048     6        1856          128            1            1      2.0  balanced
"""


def test_aiconfigurator_experts(tmp_path: Path) -> None:
    """Width divided by tensor parallelism, ``power_law_`` by its power; what is no one device's, or
    has no gate, is refused and counted."""
    path = tmp_path / "t.parquet"
    result = import_table(aic(path, EXPERTS, "VLLM", "moe"), hw=A100)
    r = result.records
    assert (r.m.tolist(), r.n.tolist(), r.skew.tolist()) == (
        [1, 64, 64],
        [768, 384, 768],
        [0.0, 1.2, 0.0],
    )
    assert (r.experts.tolist(), r.active.tolist(), r.cold.any()) == ([128] * 3, [8.0] * 3, False)
    assert r.labels().tolist() == ["bf16", "bf16", "mxfp4_wo"]
    assert [name.split(":")[0] for name in result.refusals] == [
        "tokens distributed by another rule",
        "experts shared among devices",
        "experts without a gate",
        "number format w4afp8 is not modelled",
    ]
    # 75 MB in 10 us
    again = import_table(aic(path, EXPERTS.replace("0.08", "0.01"), "VLLM", "moe"), hw=A100)
    assert counts(again)["faster than memory, L2 or link allow"] == 1
    aic(path, re.sub(r"\b\d\.\d+  ", "x  ", EXPERTS), "VLLM", "moe")
    refused("time is missing or not a number", import_table, path, hw=A100)


def test_aiconfigurator_attention(tmp_path: Path) -> None:
    table = """
    batch_size  isl  num_heads  num_key_value_heads  head_dim  step  beam_width  attn_dtype  kv_cache_dtype  window_size  latency
             1    1         32                    8       128  1023           1  bfloat16    bfloat16                  0     0.02
             1    1         32                    8       128  1023           1  bfloat16    bfloat16                128     0.02
             1    1         32                    8       128  1023           4  bfloat16    bfloat16                  0     0.02
             1    1         32                    8       128  1023           1  bfloat16    fp8                       0     0.02
    """
    path = aic(tmp_path / "t.parquet", table, "SGLang", "generation_attention")
    result = import_table(path, hw=A100)
    records = result.records
    assert counts(result) == {"beam search": 1}
    assert (records.kv_len.tolist(), records.q_len.tolist()) == ([1024] * 3, [1] * 3)
    assert records.window.tolist() == [0, 128, 0]
    assert records.labels().tolist() == ["bf16", "bf16", "fp8_wo"]
    assert (records.cold.any(), records.copies.tolist()) == (False, [1, 1, 1])
    table = """
    batch_size  isl  num_heads  num_key_value_heads  head_dim  step  beam_width  attn_dtype  kv_cache_dtype  latency
             1  512         32                    8       128   100           1  bfloat16    bfloat16            0.5
    """
    path = aic(tmp_path / "u.parquet", table, "SGLang", "context_attention")
    context = import_table(path, hw=A100).records
    assert (context.q_len.tolist(), context.kv_len.tolist()) == ([512], [612])
    assert context.is_operator("attention_prefill").all()


def one(**columns: Any) -> Records:
    return Records.from_columns([Source("x")], size=1, **{"seconds": 1.0, **columns})


def test_what_no_run_can_beat() -> None:
    compute = least_seconds(one(m=4096, n=4096, k=4096), H100)[0]
    assert compute[0] == pytest.approx(2 * 4096**3 / (989.4e12 * 1.98 / 1.83), rel=1e-3)
    cold = least_seconds(one(m=1, n=16384, k=16384), H100)[1][0]
    assert cold == pytest.approx(2 * 16384**2 / 3.35e12, rel=1e-3)
    # 32 MiB stay in the L2
    warm = least_seconds(one(m=1, n=4096, k=4096, copies=1, cold=False), H100)[1][0]
    assert warm == pytest.approx(
        (2 * 4096**2 + 2 * 8192) / (L2_BYTES_PER_CLOCK * 132 * 1.98e9), rel=1e-3
    )
    # at most one stays in the L2
    rotated = least_seconds(one(m=1, n=4096, k=4096, copies=2), H100)[1][0]
    assert rotated == pytest.approx((2 * 4096**2 - 25 * 2**20) / 3.35e12, rel=1e-3)
    sparse = least_seconds(one(m=4096, n=4096, k=4096, operator=np.array(["gemm_2to4"])), H100)[0][
        0
    ]
    assert sparse == pytest.approx(compute[0] / 2)
    # no rate, no check
    assert least_seconds(one(m=64, n=64, k=64, dtype=np.array(["int4"])), H100)[0][0] == 0
    shape = {"batch": 2, "q_len": 1024, "kv_len": 1024, "heads": 8, "kv_heads": 2, "head_dim": 128}
    prefill = least_seconds(one(operator=np.array(["attention_prefill"]), **shape), H100)[0][0]
    assert prefill * 989.4e12 * 1.98 / 1.83 == pytest.approx(
        4 * 2 * 8 * 128 * 1024 * 1025 / 2, rel=1e-3
    )


def test_a_time_on_the_limit_passes_and_one_well_below_does_not() -> None:
    for shape in ({"m": 8192, "n": 8192, "k": 8192}, {"m": 1, "n": 16384, "k": 16384}):
        bottleneck = float(np.maximum(*least_seconds(one(**shape), H100))[0])
        assert not np.any(too_fast(one(**shape, seconds=bottleneck), H100))
        assert np.any(too_fast(one(**shape, seconds=bottleneck * 0.95), H100))
