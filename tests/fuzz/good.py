"""Good inputs of every format that is read, small: the fuzz tests change them, a little each time."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet
from layouts import LAYOUTS, stored_as, tensors_of

from calibration.records.parquet import write_records
from calibration.records.store import Header
from calibration.records.timing_table import Records, Source
from simulator.models.headers import BITS
from simulator.models.library import load_model

ROOT = Path(__file__).resolve().parents[2]

CSV = "m,n,k,latency_us,dtype,operator,launch,role,window,sample_count\n" + "".join(
    f"{m},4096,4096,{5 + m / 10},bf16,gemm,graph,qkv,0,20\n" for m in (1, 16, 64, 256, 300, 512, 1024, 2048)
)
ATTENTION = "batch,q_len,kv_len,heads,kv_heads,head_dim,latency_us,operator\n" + "".join(
    f"{b},1,{kv},32,8,128,{50 + b * kv / 100},attention_decode\n" for b in (1, 8) for kv in (128, 1024, 4096)
)
MEASURED = "gpu,dtype,op,m,n,k,latency_us,source,note,group\n" + "".join(
    f"RTX4090,bf16,{op},{m},4096,14336,{150 + m},somewhere,kernel time,g\n"
    for op in ("down_proj", "act_fn", "sparse24")
    for m in (1, 64, 512)
)
AIC_GEMM = "framework,version,device,kernel_source,op_name,gemm_dtype,m,n,k,latency\n" + "".join(
    f"TRTLLM,1.0.0,NVIDIA A100-SXM4-80GB,k,gemm,{dtype},{1 << i},4096,4096,{0.05 * (i + 1)}\n"
    for i, dtype in enumerate(["bfloat16"] * 10 + ["fp8", "int4_wo"])
)
AIC_ATTENTION = (
    "framework,version,device,kernel_source,op_name,batch_size,isl,num_heads,num_key_value_heads,head_dim,"
    "attn_dtype,kv_cache_dtype,step,latency\n"
) + "".join(
    f"TRTLLM,1.0.0,NVIDIA A100-SXM4-80GB,k,generation_attention,{b},1,32,8,128,bfloat16,bfloat16,{16 << i},{0.05 + i}\n"
    for i in range(6)
    for b in (1, 8)
)
TABLES = (CSV, ATTENTION, MEASURED)
PRUNINGS: tuple[str, ...] = (
    "width mlp=0.3 attention=0.25 + depth 0.25",
    "width heads=0.2 align=64",
    "low_rank 0.4 layers=8-15 + kv_cache 50%",
    "depth layers=3,5-7 + width mlp=0.5 layers=0-2",
    "semi_structured + width mlp=0.1",
    "slicegpt 0.25",
)
PLAN = """\
prune: kv_cache 0.25
layers:
  0-3: width mlp=0.3 attention=0.25
  4,6: width mlp=0.5
  8: "depth"
  10: depth unit=attention + low_rank 0.3
"""
SCORES = "layer,attention,mlp,kl_div,lm_loss\n" + "".join(
    f"{layer},{attention},{mlp},{0.2 * i:g},{2 + 0.1 * i:g}\n"
    for layer in ("0-7", "8-14", "15")
    for i, (attention, mlp) in enumerate([("dense", "dense"), ("kv=4", "4096"), ("none", "2048"), ("linear", "none")])
)
CHOICES = """\
attention: [dense, kv=4, none]
mlp: [dense, 4096, linear, none]
layers:
  0-1,15: {mlp: [dense]}
  3: {attention: [dense, heads=16 kv=4]}
"""
QUALITY = """\
method,family,model,sparsity,metric,higher_is_better,dense,pruned,relative_loss,protocol,source,options,note
SLEB,depth,llama-2-7b,0.1,ppl,false,7.26,9.34,,C4,a paper,unit=layer,
SLEB,depth,llama-2-7b,0.2,ppl,false,7.26,12,,C4,a paper,unit=layer,
Slice,width_cross,llama-2-7b,0.25,ppl,false,7.26,10,,C4,a paper,residual_projections=true,
2:4,semi_structured,llama-2-7b,0.5,ppl,false,7.26,10.5,,C4,a paper,,note
"""
BENCHES: tuple[Any, ...] = tuple(
    json.loads(file.read_text(encoding="utf-8").splitlines()[0] if file.suffix == ".jsonl" else file.read_text())
    for file in sorted((ROOT / "tests" / "prediction" / "benchmarks").iterdir())
)
HARNESS = {
    "results": {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.6, "acc_stderr,none": 0.01, "acc_norm,none": 0.55},
        "wikitext": {"word_perplexity,none": 9.5, "word_perplexity_stderr,none": "N/A"},
        "gsm8k": {"exact_match,strict-match": 0.2, "exact_match,flexible-extract": 0.25},
        "piqa": {"acc,none": 0.7},
    },
    "group_subtasks": {"arc_easy": [], "wikitext": [], "gsm8k": [], "piqa": []},
    "versions": {"arc_easy": 1.0, "wikitext": 2.0, "gsm8k": 3.0, "piqa": 1.0},
    "n-shot": {"arc_easy": 0, "wikitext": 0, "gsm8k": 5, "piqa": 0},
    "higher_is_better": {"arc_easy": {"acc": True, "acc_norm": True}, "wikitext": {"word_perplexity": False}},
    "config": {"model": "hf", "model_args": "pretrained=meta-llama/Llama-2-7b", "limit": None},
    "model_name": "meta-llama/Llama-2-7b",
}
"""Results of lm-evaluation-harness."""
SPEEDUPS = """\
family,sparsity,speedup,speedup_lower,speedup_upper,model,hardware,phase,batch,seq
depth,0.1,1.1,1.05,1.15,llama-2-7b,h100_sxm,prefill,1,2048
width_cross,0.25,1.2,,,llama-2-7b,h100_sxm,prefill,1,2048
"""
GEMMS = """\
m,n,k,seconds,copies,dtype,predicted_s,more
1,4096,4096,1.01e-5,1,bf16,1e-5,x
64,4096,4096,1.64e-5,1,bf16,1e-5,x
512,4096,4096,6.12e-5,1,bf16,1e-5,x
"""


@lru_cache
def arrow(text: str) -> Any:
    """A CSV as a pyarrow table."""
    return pyarrow.csv.read_csv(io.BytesIO(text.encode()))


@lru_cache
def tables() -> tuple[Any, ...]:
    """Parquet tables that an import reads: two of aiconfigurator, one of records."""
    sources = [Source("NVIDIA A100", {"torch": "2.9"}, run=run) for run in "rs"]
    columns = {"m": [1 << i for i in range(12)], "n": 4096, "k": 64, "seconds": np.linspace(1e-5, 1e-4, 12)}
    columns |= {"spread": 0.01, "source": [0, 1] * 6, "purpose": ["fit", "holdout"] * 6}
    records = Records.from_columns(sources, **columns)
    return arrow(AIC_GEMM), arrow(AIC_ATTENTION), pyarrow.parquet.read_table(io.BytesIO(write_records(records)))


_MEASUREMENT = """{
"run": "run1", "time": "2026-01-01T00:00:01+00:00", "type": "measurement", "key": "gemm bf16 %d", "purpose": "fit",
"block": %d, "operator": {"kind": "gemm", "m": %d, "n": 4096, "k": 4096, "dtype": "bf16", "cold": true},
"median_s": 1e-5, "lower_s": 0.9e-5, "upper_s": 1.2e-5, "samples_s": [1e-5, 1.1e-5],
"status": "ok", "method": "cuda graph", "drifted": false}"""
_OTHERS = """[
{"key": "copy", "operator": {"kind": "copy", "n": 4096}, "median_s": 1e-6, "purpose": "drift_check", "drifted": true},
{"key": "elementwise", "operator": {"kind": "elementwise", "m": 64, "n": 4096, "role": "residual"}, "median_s": 1e-6},
{"key": "gemm big", "operator": {"kind": "gemm"}, "status": "skipped", "reason": "out of memory"}]"""


_HEADER = Header(
    *("NVIDIA A100", {"torch": "2.9", "driver": "580"}, "bf16", "run1", "2026-01-01T00:00:00+00:00"),
    {"opened": "cuda", "rates": {"a": 1.0}},
)
_TIMINGS = [json.loads(_MEASUREMENT % (m, i, m)) for i, m in enumerate((1, 64, 300, 4096))]
RUN = (_HEADER.as_dict(), *({"line": i, **row} for i, row in enumerate((*_TIMINGS, *json.loads(_OTHERS)), 2)))
"""Rows of a run: a header, timings, what is none."""


def crc_line(row: Any) -> bytes:
    """A line with a checksum that is right, whatever the line holds; bytes are taken as they are."""
    body = row if isinstance(row, bytes) else json.dumps(row, separators=(",", ":")).encode()
    return body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body) if body.endswith(b"}") and len(body) > 2 else body + b"\n"


SMALL = (ROOT / "tests/bad_profiles/good.yaml").read_text(encoding="utf-8")
OPERATORS = ("gemm", "attention_prefill", "attention_decode", "elementwise", "local_update")

_FACTS, _FITTED = (
    (ROOT / f"hardware_profiles/rtx_4090{stack}.yaml").read_text(encoding="utf-8").replace("rtx_4090", "mine")
    for stack in ("", ".vllm")
)
STACK = re.sub(r"\n      arrays:\n(?: {8}.*\n)+", "\n", _FITTED)
"""A shipped stack file without its arrays, so that the file stands alone, under another name; :data:`FACTS` its
datasheet."""
FACTS = re.sub("aliases: .*", "aliases: []", _FACTS)
WITH_ARRAYS, _DIGEST = _FITTED, re.findall('sha256: "(.*)"', _FITTED)[0]
with np.load(ROOT / f"hardware_profiles/rtx_4090.vllm.{_DIGEST[:12]}.npz") as _file:
    STACK_ARRAYS = {name: _file[name] for name in _file.files}
"""The stack file as it ships, and the arrays that it names."""
SHIPPED = FACTS + STACK[STACK.index("calibrated:") :]

ARRAYS: dict[str, Any] = {
    "gemm.bf16.start": np.array([1.0, 1.0, 1.0]),
    "gemm.bf16.step": np.array([1.0, 2.0, 1.0]),
    "gemm.bf16.values": np.linspace(-0.1, 0.1, 8).reshape(2, 2, 2).astype("f4"),
    "gemm.bf16.measured": np.array([[0.0, 6.0, 6.0], [12.0, 14.0, 14.0]]),
    "gemm.bf16.exact_m": np.array([1, 17]),
    "gemm.bf16.exact_n": np.array([4096, 8810]),
    "gemm.bf16.exact_k": np.array([4096, 64]),
    "gemm.bf16.exact_s": np.array([1e-4, 2e-5]),
    "gemm.bf16.exact_log_half": np.array([0.02, 0.1]),
    "attention_prefill.bf16.start": np.zeros(3),
    "attention_prefill.bf16.step": np.ones(3),
    "attention_prefill.bf16.values": np.zeros((3, 2, 2)),
    "attention_decode.bf16.start": np.zeros(3),
    "attention_decode.bf16.step": np.ones(3),
    "attention_decode.bf16.values": np.zeros((3, 2, 1)),
    "elementwise.bf16.start": np.array(14.0),
    "elementwise.bf16.values": np.zeros((8, 5)),
    **{f"local_update.{name}": np.full(2, 0.1) for name in ("independent", "correlated", "log_ratio")},
    "local_update.kind": np.array([0, 1]),
    "local_update.coordinates": np.ones((2, 3)),
    "local_update.systematic": np.ones((2, 2)),
}
"""Small arrays of every operator that has some, and exact shapes."""


def arrays_of(operator: str) -> dict[str, Any]:
    """Those of one operator."""
    return {name: array for name, array in ARRAYS.items() if name.startswith(f"{operator}.")}


def profile_with(raw: bytes, file: str = "arrays.npz", operators: Iterable[str] = OPERATORS) -> str:
    """Text of a profile that names these bytes as the arrays of some operators."""
    provenance = SMALL[SMALL.index("      provenance:") : SMALL.index("      constants:")]
    text = SMALL[: SMALL.index("calibrated:")] + "calibrated:\n"
    for operator in sorted(operators, key="local_update".__eq__):
        names = ", ".join(name.rpartition(".")[2] for name in arrays_of(operator))
        start = (
            "      factors: [machine launch, gemm launch]\n" if operator == "local_update" else "      constants: {}\n"
        )
        section = f"{provenance}{start}      arrays:\n        file: {file}\n"
        section += f'        sha256: "{hashlib.sha256(raw).hexdigest()}"\n        names: [{names}]\n'
        if operator == "local_update":
            text = (
                text.removesuffix("calibrated:\n")
                + "local_update:\n"
                + re.sub("^    ", "", section, flags=re.MULTILINE)
            )
        else:
            text += f"  {operator}:\n    bf16:\n{section}"
    return text


_SHIPPED = [json.loads(file.read_text()) for file in sorted((ROOT / "simulator/models").glob("*.json"))]
_PUBLIC = [{key: value for key, value in config.items() if not key.startswith("_")} for config in _SHIPPED]
_NESTED = {"model_type": "gemma3", "text_config": _PUBLIC[[c["model_type"] for c in _PUBLIC].index("gemma3_text")]}
CONFIGS = [
    *{config["model_type"]: {**config, "_name_or_path": "org/some-model"} for config in (*_PUBLIC, _NESTED)}.values()
]
"""One configuration of each architecture."""

_LAYERS = [
    {"attention": {"num_key_value_heads": 4}, "ffn": {"intermediate_size": 512}},
    {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
    {"attention": {"no_op": True, "num_key_value_heads": None}, "ffn": {"ffn_mult": 2.0, "moe": None}},
    {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
]
LAYERED = {
    **{"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 40},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "block_configs": _LAYERS},
}
"""A configuration whose layers differ."""

_REPLACEMENTS = [
    {"parent_layer_indices": [i], "child_block_configs": [block], "weight_paths": ["a.safetensors"]}
    for i, block in enumerate(_LAYERS)
]
_METRICS = {"metrics": {"kl_div": 0.5, "token_accuracy_top_1": 0.5}, "stats": {"runtime_ms": 1.5, "memory_mib": 2.0}}
LIBRARIES: tuple[Any, ...] = (
    {
        f"layer_{i}": {
            "own": {**_METRICS, "stats": {"num_kv_heads": 2, "ffn_intermediate_size": 256, "runtime_ms": 1.0}}
        }
        for i in range(4)
    },
    _REPLACEMENTS,
    [{"block_idx": i, "attention_config": block["attention"], "ffn_config": None} for i, block in enumerate(_LAYERS)]
    + [{"block_idx": i, "block_config": _LAYERS[0]} for i in range(4)],
    {
        f"replacement_{i}": {**_METRICS, "parent_layer_indices": [i], "block_config": block}
        for i, block in enumerate(_LAYERS)
    },
)
"""Libraries of Puzzle and of Puzzletron for :data:`LAYERED` without its ``block_configs``."""

_AVERAGES = {"kl_div": {"avg": 0.5, "per_sample": [0.4, 0.6]}, "token_accuracy_top_1": {"avg": 0.5}, "args": {"a": 1}}
VALIDATIONS: tuple[Any, ...] = tuple(
    {"puzzle_solution": solution, **_AVERAGES}
    for i, replacement in enumerate(_REPLACEMENTS)
    for solution in (
        {"single_sequence_replacement": replacement},
        {"single_block_replacement": {"block_idx": i, "block_config": _LAYERS[i]}},
    )
)
_OTHER = {"attention": {"num_key_value_heads": 2}, "ffn": {"intermediate_size": 128}}
_OTHERS = [{"single_block_replacement": {"block_idx": i, "block_config": _OTHER}} for i in range(4)]
TEACHER = {"kl_div": {"avg": 0.0}, "token_accuracy_top_1": {"avg": 0.75}, "args": {"a": 1}}
FOLDER: dict[str, Any] = {
    "teacher.json": TEACHER,
    **{f"solution_{i + 1}.json": {"puzzle_solution": other, **_AVERAGES} for i, other in enumerate(_OTHERS)},
}
"""Puzzletron's validations of single replacements in that model; files that may lie next to one, and its teacher's."""

GRID = """\
models: [llama-3.2-1b, llama-3.1-8b]
hardware: [h100_sxm, a100]
sparsities: {from: 0.1, to: 0.5, step: 0.2}
phases: [prefill, decode]
batches: [1, 8]
seqs: {from: 64, to: 256, times: 2}
families:
  - depth
  - width: {align: 64}
  - token: {}
dtypes:
  - bf16
  - {dtype: bf16, weight_dtype: int4, kv_dtype: fp8}
engines: [vllm, hf]
devices: [1]
parallel: tensor
new_tokens: 16
ideal: false
level: 0.9
"""

TEXTS_GRID = """\
models: llama-3.2-1b
hardware: [l40s, a6000]
prune: ["width mlp=0.3 attention=0.25 + depth 0.25", depth 0.5, kv_cache budget=128]
methods: [slicegpt, shortgpt]
sparsities: [0.25]
phases: [serve, prefill]
batches: {from: 1, to: 4, times: 2}
seqs: 256
devices: [1, 2]
link: pcie4x8-host
cached_prefix: 64
token_budget: 2048
new_tokens: 8
"""
GRIDS = (GRID, TEXTS_GRID)

ENGINE = (ROOT / "simulator/engines/hf.yaml").read_text()

LINES = """\
speedup llama-3.2-1b --hardware h100 --family depth --engine hf,vllm --phase serve --concurrency 8 --new-tokens 16
speedup llama-3.2-1b --hardware h100 --family depth --sparsity 0.25 --phase decode --dense-time 3ms --json
speedup llama-3.2-1b --hardware h100 --family depth,width --sparsity 0.1,0.25 --phase decode --batch 1 --json
speedup llama-3.2-1b --hardware a100 --family width --sparsity 0.3 --ideal --phase prefill --option align=64
explain llama-3.2-1b --hardware h100 --family width --sparsity mlp=0.2 --option inner=8100 --phase prefill
explain llama-3.2-1b --hardware h100 --family low_rank --sparsity 0.3 --option align=64 --phase decode
gemm 16,32 4096 11008 --hardware h100 --dtype bf16 --json
advise llama-3.2-1b --hardware h100 --phase decode --target 1.5 --json
advise llama-3.2-1b --hardware h100 --phase decode --latency 2ms --confidence 0.9 --family depth,width
models show llama-3.2-1b
hardware show h100
pareto llama-2-7b --hardware h100 --metric zero-shot --phase decode"""
ADDRESS = (
    "model=llama-3.1-8b&gpu=h100_sxm,a100&family=depth,width&sparsity=0.25,0.5&phase=decode&batch=8&seq=512&new=16"
    "&engine=vllm&dtype=bf16&detail=width&at=0.5&over=seq&prune=width%20mlp%3D0.3%20heads%3D0.2;depth%20layers%3D0,5"
    "&pin=phase%3Ddecode%26prune%3Ddepth%25200.25%26batch%3D8"
)


_WIDTHS = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 40}
SMALL_CONFIGS = (
    {"model_type": "llama", "intermediate_size": 64, "tie_word_embeddings": True, **_WIDTHS},
    {"model_type": "opt", "ffn_dim": 64, "max_position_embeddings": 62, **_WIDTHS},
)
"""Configurations of :data:`CHECKPOINTS`."""


def _checkpoint(content: dict[str, Any], layout: str = "") -> dict[str, Any]:
    tensors = tensors_of(load_model(content))
    tensors = stored_as(layout, tensors) if layout else tensors
    return {name: (t.dtype, list(t.shape)) for name, t in tensors.items()}


CHECKPOINTS = (*map(_checkpoint, SMALL_CONFIGS), *(_checkpoint(SMALL_CONFIGS[0], how) for how in LAYOUTS))
"""Tensors by name, each a dtype and a shape."""

INDEX = {"weight_map": {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(CHECKPOINTS[0])}}
"""The index of the first of them, in two files."""


def with_digest(raw: bytes, file: str) -> str:
    """Text of the stack file that names these bytes as its arrays."""
    named = re.sub("file: .*.npz", f"file: {file}", WITH_ARRAYS)
    return named.replace(_DIGEST, hashlib.sha256(raw).hexdigest())


def shard(tensors: Mapping[str, Any]) -> bytes:
    """A safetensors file of some tensors, each a dtype and a shape, filled with zeros."""
    content, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(content).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * end


SHARDED = {f"{file}.safetensors": shard(dict([*CHECKPOINTS[0].items()][i::2])) for i, file in enumerate("ab")} | {
    "config.json": json.dumps(SMALL_CONFIGS[0]).encode()
}
"""The folder of that index, but for itself."""

_FILES = [{"name": "a/config.json", "text": json.dumps(SMALL_CONFIGS[0]), "room": 0}]
_FILES += [
    {"name": f"a/{file}", "text": content[8 : 8 + int.from_bytes(content[:8], "little")].decode(), "room": 1 << 20}
    for file, content in SHARDED.items()
    if file != "config.json"
]
_ASKED = {"search": f"?{ADDRESS}", "narrow": False}
QUESTIONS = tuple(
    {
        "output": f"{target}.data",
        "outputs": {"id": target, "property": "data"},
        "inputs": [{"id": source, "property": "data", "value": value}],
        "changedPropIds": [f"{source}.data"],
    }
    for source, target, value in (
        *[("dropped", "accepted", {"into": "model", "files": _FILES, "at": 1})] * 9,
        ("csv-asked", "csv", _ASKED),
    )
)
"""What the page asks its server: mostly to take a file."""
