"""Inputs near good tables, records of a run and the like, and what must hold of what was read from them; see ``targets``."""

from __future__ import annotations

import io
import json
import random
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from mutate import csv_text, edit_bytes, json_text, json_tree, parquet_bytes

import simulator
from simulator.hardware import library as hardware

# -- tables of measurements -------------------------------------------------------------------------------------------------------

_CSV = "m,n,k,latency_us,dtype,operator,launch,role,window,sample_count\n" + "".join(
    f"{m},4096,4096,{5 + m / 10},bf16,gemm,graph,qkv,0,20\n" for m in (1, 16, 64, 256, 300, 512, 1024, 2048)
)
_ATTENTION = "batch,q_len,kv_len,heads,kv_heads,head_dim,latency_us,operator\n" + "".join(
    f"{b},1,{kv},32,8,128,{50 + b * kv / 100},attention_decode\n" for b in (1, 8) for kv in (128, 1024, 4096)
)
_MEASURED = "gpu,dtype,op,m,n,k,latency_us,source,note,group\n" + "".join(
    f"RTX4090,bf16,{op},{m},4096,14336,{150 + m},somewhere,kernel time,g\n"
    for op in ("down_proj", "act_fn", "sparse24")
    for m in (1, 64, 512)
)


def read_import(path: Path) -> None:
    from calibration.records.importers import import_table
    from calibration.records.parquet import read_records, write_records

    hw = hardware.load_hardware("h100_sxm") if path.stat().st_size % 2 else None
    records = import_table(path, hw=hw, dtype="all").records
    assert len(records)
    assert (np.isfinite(records.seconds) & (records.seconds > 0)).all()
    assert all(str(label) for label in records.labels())
    if len(records) < 200 and path.stat().st_size % 4 == 0:
        again = read_records(write_records(records))
        assert again.digest() == records.digest()


def make_csv(rng: random.Random) -> bytes:
    return csv_text(rng.choice((_CSV, _ATTENTION, _MEASURED)), rng)


@lru_cache
def _tables() -> tuple[Any, ...]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from calibration.records.parquet import write_records
    from calibration.records.table import Records, Source

    size = 12
    shared = {"framework": "TRTLLM", "version": "1.0.0", "device": "NVIDIA A100-SXM4-80GB", "kernel_source": "k"}
    m = [1 << i for i in range(size)]
    gemm = {
        "op_name": "gemm",
        "gemm_dtype": ["bfloat16"] * 10 + ["fp8", "int4_wo"],
        "m": m,
        "n": [4096] * size,
        "k": [4096] * size,
    }
    attention = {
        "op_name": "generation_attention",
        "batch_size": [1, 8] * 6,
        "isl": [1] * size,
        "num_heads": [32] * size,
        "num_key_value_heads": [8] * size,
        "head_dim": [128] * size,
        "attn_dtype": ["bfloat16"] * size,
        "kv_cache_dtype": ["bfloat16"] * size,
        "step": [1 << i for i in range(4, 4 + size)],
    }
    tables = []
    for columns in (gemm, attention):
        full = {**shared, **columns, "latency": [0.05 * (i + 1) for i in range(size)]}
        tables.append(pa.table({k: [v] * size if isinstance(v, str) else v for k, v in full.items()}))
    sources = [Source("NVIDIA A100", {"torch": "2.9"}, run="r"), Source("NVIDIA A100", {"torch": "2.9"}, run="s")]
    records = Records.from_columns(
        sources,
        m=m,
        n=4096,
        k=64,
        seconds=np.linspace(1e-5, 1e-4, size),
        spread=0.01,
        source=[0, 1] * 6,
        purpose=["fit", "holdout"] * 6,
    )
    tables.append(pq.read_table(io.BytesIO(write_records(records))))
    return tuple(tables)


def make_parquet(rng: random.Random) -> bytes:
    return parquet_bytes(rng.choice(_tables()), rng)


# -- records of a run -------------------------------------------------------------------------------------------------------------


@lru_cache
def _lines() -> tuple[dict[str, Any], ...]:
    from calibration.records.store import Header

    header = Header(
        "NVIDIA A100",
        {"torch": "2.9", "driver": "580"},
        "bf16",
        "run1",
        "2026-01-01T00:00:00+00:00",
        {"opened": "cuda", "rates": {"a": 1.0}},
    )
    rows: list[dict[str, Any]] = [header.as_dict()]
    for i, m in enumerate((1, 64, 300, 4096)):
        rows.append(
            {
                "run": "run1",
                "time": "2026-01-01T00:00:01+00:00",
                "type": "measurement",
                "key": f"gemm bf16 {m}",
                "purpose": "fit",
                "block": i,
                "operator": {"kind": "gemm", "m": m, "n": 4096, "k": 4096, "dtype": "bf16", "cold": True},
                "median_s": 1e-5 * (i + 1),
                "lower_s": 0.9e-5,
                "upper_s": 1.2e-5,
                "samples_s": [1e-5, 1.1e-5],
                "status": "ok",
                "method": "cuda graph",
                "drifted": False,
            }
        )
    rows.append(
        {
            "key": "copy",
            "operator": {"kind": "copy", "n": 4096},
            "median_s": 1e-6,
            "purpose": "anchor",
            "block": 2,
            "drifted": True,
        }
    )
    rows.append(
        {
            "key": "elementwise",
            "operator": {"kind": "elementwise", "m": 64, "n": 4096, "role": "residual"},
            "median_s": 1e-6,
        }
    )
    rows.append({"key": "gemm big", "operator": {"kind": "gemm"}, "status": "skipped", "reason": "out of memory"})
    return tuple(rows)


def crc_line(row: Any) -> bytes:
    """A line with a checksum that is right, whatever the line holds."""
    body = json.dumps(row, separators=(",", ":")).encode()
    return body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body) if body.endswith(b"}") and len(body) > 2 else body + b"\n"


def make_jsonl(rng: random.Random) -> bytes:
    rows: list[Any] = list(_lines())
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(rows))
        rows[at] = json_tree(rows[at], rng, 2)
    raw = b"".join(map(crc_line, rows))
    return edit_bytes(raw, rng) if rng.random() < 0.2 else raw


def read_jsonl(path: Path) -> None:
    from calibration.records.lines import content_records, untimed
    from calibration.records.store import merge, read_store

    content = read_store(path)
    untimed(content.rows)
    content_records(content)
    if path.stat().st_size % 4 == 0:
        merge([path], path.with_name("merged.jsonl"))
        read_import(path)


def make_results(rng: random.Random) -> bytes:
    rows: list[Any] = [{"plan": 1}, {"method": "depth", "fraction": 0.25, "realised": 0.25, "losses": [1.0, 2.0]}]
    rows[1] = json_tree(rows[1], rng, 2)
    raw = b"".join(map(crc_line, rows))
    return edit_bytes(raw, rng) if rng.random() < 0.2 else raw


def read_results(path: Path) -> None:
    from calibration.execute.quality_results import Results

    with Results(path, {"plan": 1}) as results:
        for method, fraction in results.points:
            assert np.isfinite(results.losses(method, fraction)).all()
            assert 0.0 <= results.realised(method, fraction) <= 1.0


# -- tables of quality and of speedups --------------------------------------------------------------------------------------------

QUALITY = (
    "method,family,model,sparsity,metric,higher_is_better,dense,pruned,relative_loss,protocol,source,options,note\n"
    "SLEB,depth,llama-2-7b,0.1,ppl,false,7.26,9.34,,C4,a paper,unit=layer,\n"
    "SLEB,depth,llama-2-7b,0.2,ppl,false,7.26,12,,C4,a paper,unit=layer,\n"
    "Slice,width_cross,llama-2-7b,0.25,ppl,false,7.26,10,,C4,a paper,residual_projections=true,\n"
    "2:4,semi_structured,llama-2-7b,0.5,ppl,false,7.26,10.5,,C4,a paper,,note\n"
)
SPEEDUPS = (
    "family,sparsity,speedup,speedup_lower,speedup_upper,model,hardware,phase,batch,seq\n"
    "depth,0.1,1.1,1.05,1.15,llama-2-7b,h100_sxm,prefill,1,2048\n"
    "width_cross,0.25,1.2,,,llama-2-7b,h100_sxm,prefill,1,2048\n"
)


def read_quality_table(path: Path) -> None:
    from simulator.predict.pareto import fronts
    from simulator.predict.quality import choose_axis, load_quality, read_quality, table_text

    table = load_quality(path)
    assert read_quality(table_text(table.rows)).models == table.models
    for row in table.rows:
        assert np.isfinite(row.relative_loss)
    rows = table.of_model("llama-2-7b")
    found, _ = fronts(
        simulator.load_model("llama-3.2-1b"), ["h100_sxm"], rows, choose_axis(rows), ["decode"], [1], [64]
    )
    assert all(np.isfinite((p.loss, p.speedup)).all() for f in found for p in f.points)


def read_speedups(path: Path) -> None:
    from simulator.predict.pareto import read_measured

    for row in read_measured(path):
        assert 0.0 < row.lower <= row.speedup <= row.upper < float("inf")
        row.fits(0.25, {"family": "depth", "batch": 1})


# -- measured GEMMs of a figure ---------------------------------------------------------------------------------------------------

_GEMMS = "m,n,k,seconds,copies,dtype,predicted_s,more\n" + "".join(
    f"{m},4096,4096,{1e-5 + m * 1e-7},1,bf16,1e-5,x\n" for m in (1, 64, 512)
)


def make_gemms(rng: random.Random) -> bytes:
    if rng.random() < 0.6:
        return csv_text(_GEMMS.replace(",predicted_s", ",other") if rng.random() < 0.5 else _GEMMS, rng)
    import pyarrow as pa

    table = pa.table(
        {"m": [1, 64, 512], "n": [4096] * 3, "k": [4096] * 3, "seconds": [1e-5, 2e-5, 3e-5], "dtype": ["bf16"] * 3}
    )
    return parquet_bytes(table, rng)


def read_gemms(path: Path) -> None:
    from simulator.figures.measured import read_measured_gemms

    table = read_measured_gemms(path)
    predicted = table.predict(hardware.load_hardware("h100_sxm"))
    for values in (table.seconds, predicted):
        assert len(values) == len(table)
        assert np.isfinite(values).all(), values
        assert (values > 0).all(), values


# -- a sweep's folder -------------------------------------------------------------------------------------------------------------


def make_manifest(rng: random.Random) -> bytes:
    return json_text({"digest": "d", "parts": 2, "version": "1", "grid": {"models": ["a"]}}, rng)


def read_manifest(path: Path) -> None:
    from simulator.predict.store import Store

    path.replace(path.parent / "t.parquet.parts" / "manifest.json")
    with Store(path.parent / "t.parquet", "d", 2).opened({}) as there:
        assert there == set()


@lru_cache
def _part() -> Any:
    import pyarrow as pa

    notes = {b"prunesim.notes": b'{"left out": [1, 0.5]}'}
    return pa.table({"family": ["depth", "width"], "speedup": [1.5, 2.0]}).replace_schema_metadata(notes)


def make_part(rng: random.Random) -> bytes:
    return parquet_bytes(_part(), rng)


def read_part(path: Path) -> None:
    import pyarrow.parquet as pq

    from simulator.predict.store import Store

    store = Store(path.with_name("u.parquet"), "d", 2)
    store.folder.mkdir(exist_ok=True)
    store.target.unlink(missing_ok=True)
    pq.write_table(_part(), store.part(0))
    path.replace(store.part(1))
    rows, notes = store.assemble()
    assert all(f"{x:g}" for at in notes.values() for x in at)
    assert pq.read_metadata(store.target).num_rows == rows
    assert not list(path.parent.glob("*.tmp"))
