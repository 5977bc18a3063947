"""Readers on inputs near a valid one use them or refuse them in one printable line, within seconds,
and touch no other file.

A reader is fuzzed through the command that reads its file. Hypothesis draws the edits: 25 inputs
per reader by default, 10,000 with ``--hypothesis-profile=thorough`` (or
``HYPOTHESIS_PROFILE=thorough``).
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import math
import re
import resource
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest
from guard import ROOT, check_line, guarded, in_time
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, stored_as, tensors_of

from calibration.records.store import Header, encode_line
from calibration.records.timing_table import Records, Source, write_records
from simulator.cli import run
from simulator.models.architectures import ARCHITECTURES, NESTED
from simulator.models.checkpoint import BITS
from simulator.models.library import load_model

EXAMPLES = settings().max_examples if settings().max_examples > 100 else 25
MOST_MEMORY_KB = 1_000_000
KINDS = ("float16", "string", "binary", "bool", "int8")

PROFILE = (ROOT / "tests/bad_profiles/good.yaml").read_text(encoding="utf-8")
ENGINE = (ROOT / "simulator/engines/hf.yaml").read_text(encoding="utf-8")
GRID = """\
models: [llama-3.2-1b, llama-3.1-8b]
hardware: [h100_sxm, l40s]
sparsities: {from: 0.1, to: 0.3, step: 0.2}
phases: [prefill, decode]
seqs: [64]
batches: {from: 1, to: 4, times: 2}
families: [depth, {width: {align: 64}}]
dtypes: [bf16, {dtype: bf16, weight_dtype: int4, kv_dtype: fp8}]
engines: [vllm, hf]
devices: [2]
link: pcie4x8-host
"""
PLAN = (
    "prune: kv_cache 0.25\nlayers:\n  0-3: width mlp=0.3 attention=0.25\n  8: depth unit=attention"
    " + low_rank 0.3\n"
)
PRUNE = (
    "width mlp=0.3 attention=0.25 align=64 layers=0-7 + depth 25% + low_rank 0.4 layers=8,9 +"
    " kv_cache .5"
)
SCORES = "layer,attention,mlp,kl_div\n" + "".join(
    f"{layer},dense,dense,0\n{layer},kv=4,4096,.2\n{layer},none,2048,.4\n"
    for layer in ("0-7", "8-14", "15")
)
QUALITY = """\
method,family,model,sparsity,metric,higher_is_better,dense,pruned,relative_loss,protocol,source,options,note
SLEB,depth,llama-2-7b,0.1,ppl,false,7.26,9.34,,C4,a paper,unit=layer,
Slice,width_cross,llama-2-7b,0.25,ppl,false,7.26,10,,C4,a paper,residual_projections=true,
"""
SPEEDUPS = """\
family,sparsity,speedup,speedup_lower,speedup_upper,model,hardware,phase,batch,seq
depth,0.1,1.1,1.05,1.15,llama-2-7b,h100_sxm,decode,1,2048
width_cross,0.25,1.2,,,llama-2-7b,h100_sxm,decode,1,2048
"""
METHOD = """\
method: mine
what: tokens skip layers
arxiv: "2606.09080"
sparsities: [0.25, 0.5]
phases: [prefill, decode]
layers: "1:-1"
per_layer: s * (0.5 + layer / layers)
prune:
  - {width: {mlp: s, attention: 0.25}, layers: "4:-2"}
dynamic:
  qkv: {n: 1 - s, kernel: gather, layers: "1-3"}
  attention: {keys: 1 - s}
adds:
  - gemm: {m: tokens, n: "min(32, heads / devices)", k: hidden, role: router, place: before mlp}
  - elementwise: {read: tokens * 32 * bytes, write: 0, role: sort, place: before attention}
"""
TRACE = "arrival,prompt,output\n" + "".join(f"{0.3 * i},{100 + 50 * i},{1 + i}\n" for i in range(9))
CLAIMS = """\
model,hardware,engine,pruning,phase,batch,seq,speedup
llama-3.2-1b,h100,hf,width 0.5,decode,1,128,1.4
llama-3.2-1b,h100,vllm,depth 0.25,prefill,8,512,1.3
"""
GEMMS = "m,n,k,time_us,dtype,operator,role\n" + "".join(
    f"{m},4096,4096,{20 + m / 10},bf16,gemm,qkv\n" for m in (1, 64, 300, 1024)
)
ATTENTION = "batch,q_len,kv_len,heads,kv_heads,head_dim,latency_us,operator\n" + "".join(
    f"{b},1,{kv},32,8,128,{50 + b * kv / 100},attention_decode\n"
    for b in (1, 8)
    for kv in (128, 1024, 4096)
)
HARNESS = {
    "results": {
        "arc_easy": {"alias": "a", "acc,none": 0.6, "acc_stderr,none": 0.01},
        "piqa": {"acc,none": 0.7},
    },
    **{
        "group_subtasks": {"arc_easy": [], "piqa": []},
        "higher_is_better": {"arc_easy": {"acc": True}},
    },
    **{
        "n-shot": {"arc_easy": 0, "piqa": 0},
        "versions": {"arc_easy": 1.0, "piqa": 1.0},
        "model_name": "x/Llama-2-7b",
    },
    "config": {"model": "hf", "model_args": "pretrained=meta-llama/Llama-2-7b", "limit": None},
}
FILES = ROOT / "tests/prediction/benchmarks"
_REQUESTS = """\
vllm_latency.json --phase generate --batch 8 --seq 1024
vllm_serve.json --phase serve --concurrency 16 --seq 1024
sglang.jsonl --phase serve --concurrency 1 --seq 1024 --engine sglang
trtllm_latency.json --phase prefill --seq 1024 --engine trtllm
genai_perf.json --phase prefill --seq 550
aiperf.json --phase serve --concurrency 16 --seq 1024
"""
LISTED = "results,family,sparsity\ndense.json,dense,0\nresults.json,width,0.3\n"
BENCHES = dict(line.split(" ", 1) for line in _REQUESTS.splitlines())
"""Results of a benchmark of each tool, and the options of the request that it measured."""
RESULTS = {name: json.loads(re.split("\n(?={)", (FILES / name).read_text())[0]) for name in BENCHES}
GEMM = {"kind": "gemm", "n": 4096, "k": 4096, "dtype": "bf16", "cold": True}
TIMING = {
    "median_s": 2e-5,
    "lower_s": 1.9e-5,
    "upper_s": 2.2e-5,
    "samples_s": [2e-5, 2.1e-5],
    "block": 0,
}
TIMING |= {
    "type": "measurement",
    "purpose": "fit",
    "status": "ok",
    "method": "cuda graph",
    "drifted": False,
}
RUN = [
    Header(
        "NVIDIA H100",
        {"torch": "2.9"},
        "bf16",
        "r",
        "2026-01-01T00:00:00+00:00",
        {"opened": "cuda"},
    ).as_dict(),
    *({**TIMING, "operator": {**GEMM, "m": m}, "key": f"gemm {m}"} for m in (1, 64, 4096)),
    {"key": "big", "operator": {"kind": "gemm"}, "status": "skipped", "reason": "out of memory"},
]
CONFIGS = [
    json.loads(file.read_text()) for file in sorted((ROOT / "simulator/models").glob("*.json"))
]
BLOCKS = [
    {"attention": {"num_key_value_heads": 4}, "ffn": {"intermediate_size": 512}},
    {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
    {
        "attention": {"no_op": True, "num_key_value_heads": None},
        "ffn": {"ffn_mult": 2.0, "moe": None},
    },
]
SMALL = {
    **{
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "vocab_size": 40,
    },
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
}
LAYERED = {**SMALL, "block_configs": BLOCKS}
_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
_GROUP = {"targets": ["Linear"], "weights": _WEIGHTS, "input_activations": _WEIGHTS}
_CACHE = {"num_bits": 8, "type": "float"}
MODELOPT = {
    "quantization": {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["*q_proj"],
    }
}
QUANTISED = [
    {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": _GROUP},
        "kv_cache_scheme": _CACHE,
    },
    {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["layers.0.mlp"]},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
    {"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": [["mlp.up_proj"]]},
    {"quant_method": "modelopt", **MODELOPT},
]
OVERRIDES = {"0": {"intermediate_size": 256}, "02": {"skip": ["mlp"], "num_key_value_heads": 2}}
CONFIGS.append({**SMALL, "per_layer_config": OVERRIDES})
_BUILT = (ROOT / "tests/models/transformers_models.json.gz").read_bytes()
TYPES = {
    one["content"]["model_type"]: one["content"]
    for one in json.loads(gzip.decompress(_BUILT))
    if one.get("content", {}).get("model_type") in {*ARCHITECTURES, *NESTED}
}
"""A configuration of every type of decoder that a table reads."""


_TENSORS = tensors_of(load_model(SMALL))
CHECKPOINTS = [
    {name: {"dtype": t.dtype, "shape": list(t.shape)} for name, t in tensors.items()}
    for tensors in (_TENSORS, *(stored_as(layout, _TENSORS) for layout in LAYOUTS))
]


def safetensors(tensors: dict[str, Any]) -> bytes:
    """Return a checkpoint of zeros; tensors that no edit has spoilt get their offsets."""
    content, end = dict(tensors), 0
    for name, tensor in tensors.items():
        with contextlib.suppress(TypeError, KeyError, ValueError, OverflowError):
            size = min(int(math.prod(tensor["shape"])) * BITS[tensor["dtype"]] // 8, 1 << 40)
            content[name], end = {**tensor, "data_offsets": [end, end + size]}, end + size
    header = json.dumps(content).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * min(max(end, 0), 1 << 23)


SIZES = {"m": [1 << i for i in range(8)], "n": 4096, "k": 64, "seconds": np.linspace(1e-5, 1e-4, 8)}
RECORDS = Records.from_columns(
    [Source("NVIDIA H100", {"torch": "2.9"})], **SIZES, purpose=["fit", "holdout"] * 4
)
TABLES = [
    pq.read_table(io.BytesIO(write_records(RECORDS))),
    csv.read_csv(io.BytesIO(GEMMS.replace("time_us", "latency_us").encode())),
]

VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    3,
    16,
    1 << 31,
    1 << 63,
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e-9,
    1e308,
    4096.0,
    float("nan"),
    [],
    {},
    float("inf"),
    [[]],
    {"": 0},
    [1, "a", None],
    [0] * 50,
    "",
    " ",
    "bf16",
    "depth",
    "a\nb",
    "a\x00b",
    "\ud800",
    "\x1b[31mred",
    "\u202eabc",
    "\u0663",
    "\u00b2",
    "9" * 400,
    "x" * 3000,
    "../../etc/passwd",
    "/etc/passwd",
]
WORDS = [
    *re.split(
        r"\s+",
        """0 -1 1 2 64 0.5 25% -0.0 1e-320 1e18 1e400 nan .inf 0x10 010 1_0 5. 1/2 1:30 true null ~
[] {a:1} &a *a !!str !!python/object/apply:os.system | > << @x - -- + , = % mlp=0.3 heads=20% heds=1 layers=3-1 depth
layers=0-99999999 {from:1,to:1e9,times:1.0000001} align=0 inner=9 kernel=ideal pcie bridge 3.35TB bf16""",
    ),
    "",
    " ",
    "\x00",
    "\x1b[31m",
    "\u0663",
    "\u2028",
    "9" * 400,
    "x" * 3000,
    "'",
    '"',
    "[" * 300,
    "\n---\n",
]
BYTES = [
    b"\xff",
    b"\x00",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\r",
    b'"',
    b"[" * 100_000,
    b"%YAML 1.1\n",
]


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Return every container of a tree with each of its keys."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [place for key in keys for place in ((tree, key), *places(tree[key]))]


@st.composite
def trees(draw: Any, root: Any) -> Any:
    """Draw a JSON value near this one: keys and items dropped, replaced, renamed, doubled, swapped
    or nested."""
    tree = copy.deepcopy(root)
    for _ in range(draw(st.integers(0, 3))):
        edit = draw(st.sampled_from(("value", "value", "drop", "rename", "copy", "nest")))
        if not (at := places(tree)):
            break
        owner, key = at[draw(st.integers(0, len(at) - 1))]
        if edit == "drop":
            del owner[key]
        elif edit == "rename" and isinstance(owner, dict):
            owner[draw(st.sampled_from(["", "x", "constructor", "\ud800", *owner]))] = owner[key]
        elif edit == "copy":
            other, name = at[draw(st.integers(0, len(at) - 1))]
            with contextlib.suppress(KeyError, IndexError):
                owner[key] = copy.deepcopy(other[name])
        elif edit == "nest":
            owner[key] = json.loads("[" * 200 + "]" * 200)
        else:
            owner[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    return tree


@st.composite
def texts(draw: Any, text: str) -> str:
    """Draw a text near this one: words and lines dropped, replaced or doubled."""
    for _ in range(draw(st.integers(1, 3))):
        parts = re.split(draw(st.sampled_from((r"([\s,:=+{}\[\]\"-]+)", "(\n)"))), text)
        at, other = draw(st.integers(0, len(parts) - 1)), draw(st.integers(0, len(parts) - 1))
        new = draw(
            st.sampled_from([[], [parts[at]] * 2, [parts[other]], [draw(st.sampled_from(WORDS))]])
        )
        text = "".join((*parts[:at], *new, *parts[at + 1 :]))
    return text


@st.composite
def spoilt(draw: Any, strategy: st.SearchStrategy[Any]) -> bytes:
    """Draw the bytes of a text, of a JSON value, or bytes; one in four is cut short or has odd
    bytes inserted."""
    made = draw(strategy)
    text = made if isinstance(made, (str, bytes)) else json.dumps(made)
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if draw(st.integers(0, 3)) == 3:
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.sampled_from([b"", *(odd + raw[at:] for odd in BYTES)]))
    return raw


def lines(rows: Any) -> bytes:
    """Return records as lines with right checksums, where an edit left any."""
    out = b""
    for number, row in enumerate(rows, 1):
        try:
            out += encode_line({"line": number, **row} if number > 1 else row)
        except (TypeError, ValueError):  # no mapping, or NaN
            out += json.dumps(row).encode() + b"\n"
    return out


@st.composite
def parquet(draw: Any) -> bytes:
    """Draw a Parquet file: a column dropped, doubled, or of another type, or metadata edited."""
    table, out = draw(st.sampled_from(TABLES)), io.BytesIO()
    columns, metadata = list(zip(table.column_names, table.columns)), table.schema.metadata or {}
    at, kind = (
        draw(st.integers(0, len(columns) - 1)),
        draw(st.sampled_from(("same", "drop", "twice", "list", *KINDS))),
    )
    name, column = columns[at]
    if kind == "same":
        metadata = {
            key: json.dumps(draw(trees(json.loads(text)))) for key, text in metadata.items()
        }
    elif kind in KINDS:
        with contextlib.suppress(pa.ArrowException):
            columns[at] = (name, column.cast(kind))
    else:
        columns[at : at + 1] = {"drop": [], "twice": columns[at : at + 1] * 2}.get(
            kind, [(name, [[1]] * len(column))]
        )
    pq.write_table(
        pa.table([c for _, c in columns], names=[n for n, _ in columns], metadata=metadata), out
    )
    return out.getvalue()


ON = "--hardware h100 --json"
READERS: dict[str, tuple[Any, str]] = {
    "gpu.yaml": (PROFILE, "gemm 64 64 64 --hardware {}"),
    "engine.yaml": (
        ENGINE,
        f"speedup llama-3.2-1b {ON} --phase decode --family depth --engine {{}}",
    ),
    "grid.yaml": (GRID, "sweep {} --max 2000 --jobs 1 -o DIR/rows"),
    "plan.yaml": (PLAN, f"speedup llama-3.2-1b {ON} --phase decode --prune {{}}"),
    "prune.txt": (PRUNE, f"speedup llama-3.2-1b {ON} --phase decode --prune TEXT"),
    "link.txt": (
        "pcie4x8-host",
        f"speedup llama-3.2-1b {ON} --family depth --devices 2 --link TEXT",
    ),
    "config.json": (st.sampled_from(CONFIGS).flatmap(trees), "models show {}"),
    "types.json": (st.sampled_from([*TYPES.values()]).flatmap(trees), "models show {}"),
    "method.yaml": (METHOD, f"speedup llama-3.2-1b {ON} --method {{}} --sparsity 0.5"),
    "trace.csv": (TRACE, f"serve llama-3.2-1b {ON} --trace {{}}"),
    "claims.csv": (CLAIMS, "claims {} --json"),
    "layered.json": (LAYERED, f"speedup {{}} {ON} --family depth --sparsity 0.5"),
    "quantised.json": (
        st.sampled_from([{**SMALL, "quantization_config": one} for one in QUANTISED]).flatmap(
            trees
        ),
        f"speedup {{}} {ON} --family depth --sparsity 0.5",
    ),
    "hf_quant_config.json": (MODELOPT, f"speedup DIR {ON} --family depth --sparsity 0.5"),
    "model.safetensors": (
        st.sampled_from(CHECKPOINTS).flatmap(trees).map(safetensors),
        "models show DIR",
    ),
    "model.safetensors.index.json": (
        {"weight_map": dict.fromkeys(CHECKPOINTS[0], "a")},
        "models show DIR",
    ),
    "run.jsonl": (trees(RUN).map(lines), "validate h100 {} --json"),
    "records.parquet": (parquet(), "validate h100 {} --json"),
    "table.csv": (ATTENTION, "validate h100 {} --json"),
    "mapped.csv": (GEMMS, "validate h100 {} --map latency_us=time_us --json"),
    **{
        name: (bench, f"speedup llama-3.1-8b {ON} --family depth {BENCHES[name]} --dense-from {{}}")
        for name, bench in RESULTS.items()
    },
    "scores.csv": (SCORES, f"search llama-3.2-1b {ON} --target 1.05 --scores {{}}"),
    "quality.csv": (QUALITY, f"pareto llama-2-7b {ON} --quality {{}}"),
    "results.json": (HARNESS, f"pareto llama-2-7b {ON} --quality DIR/listed.csv"),
    "speedups.csv": (SPEEDUPS, f"pareto llama-2-7b {ON} --phase decode --measured {{}}"),
}
"""File of each reader: a valid document or how to draw one, and the command that reads it ({}:
path, TEXT: content)."""
CONFIG = {"config.json": json.dumps(SMALL)}
BESIDE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("model.safetensors", "hf_quant_config.json"), CONFIG),
    "model.safetensors.index.json": {**CONFIG, "a": safetensors(CHECKPOINTS[0])},
    "results.json": {"dense.json": json.dumps(HARNESS), "listed.csv": LISTED},
}
"""Files that lie next to one."""


def answer(file: str, raw: bytes) -> int:
    """Return the status of a command on a file with this content; assert that the contract
    holds."""
    command, out, err = READERS[file][1], io.StringIO(), io.StringIO()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as name, guarded(Path(name)):
        folder = Path(name)
        for other, content in BESIDE.get(file, {}).items():
            (folder / other).write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
        (folder / file).write_bytes(raw)
        said = {"{}": f"{folder / file}", "TEXT": raw.decode("utf-8", "replace"), "DIR": name}
        words = [said.get(word, word.replace("DIR/", f"{name}/")) for word in command.split()]
        with in_time(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run(words)
    problems = [
        line for line in err.getvalue().splitlines() if not line.startswith(("note: ", "status: "))
    ]
    assert status in ((0, 1, 2) if words[0] == "validate" else (0, 2)), problems
    for line in problems:
        check_line(line)
    assert len(problems) == (status == 2), problems
    if status == 0 and "--json" in words:
        json.loads(out.getvalue(), parse_constant=pytest.fail)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY_KB
    return status


@pytest.mark.parametrize("file", READERS)
def test_inputs_near_a_valid_one(file: str) -> None:
    seen, document = Counter[bool](), READERS[file][0]
    drawn, near = (
        isinstance(document, st.SearchStrategy),
        texts if isinstance(document, str) else trees,
    )
    if not drawn:
        assert (
            answer(
                file,
                document.encode() if isinstance(document, str) else json.dumps(document).encode(),
            )
            == 0
        )

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(spoilt(document if drawn else near(document)))
    @example(b"")
    @example(b"\xff\xfe")
    @example(b"[" * 100_000)
    def attack(raw: bytes) -> None:
        seen[answer(file, raw) == 2] += 1

    attack()
    assert not drawn or seen[False] > 0  # some edits are harmless
    assert seen[True] > 3, seen


@pytest.mark.parametrize(
    ("file", "raw"),
    [
        (
            "model.safetensors",
            safetensors(
                {
                    name: {**tensor, "shape": [2, 1]} if name.endswith("qzeros") else tensor
                    for name, tensor in next(
                        held
                        for held in CHECKPOINTS
                        if any(name.endswith("qzeros") for name in held)
                        and not any(name.endswith("g_idx") for name in held)
                    ).items()
                }
            ),
        ),
        ("gpu.yaml", PROFILE.replace("value: 132", "value: \u0661").encode()),
        *(
            ("types.json", json.dumps({**TYPES[kind], "layer_types": odd}).encode())
            for kind, odd in (("qwen4_exp_text", [[0]]), ("dory", 5))
        ),
        ("quality.csv", QUALITY.replace("7.26", "1e-320").encode()),
        ("speedups.csv", SPEEDUPS.replace("1.1", f'"{"x" * 200_000}"').encode()),
        *(
            ("run.jsonl", lines([{**RUN[0], **odd}]))
            for odd in ({"stack": []}, {"dtype": "fp7"}, {"extra": 1})
        ),
        *(
            ("run.jsonl", lines([RUN[0], {**RUN[1], "median_s": odd}]))
            for odd in ("x", 10**400, [1], 0.0)
        ),
        *(
            ("table.csv", ATTENTION.replace("1,1,128", f"{odd},1,128").encode())
            for odd in ("1e18", "nan", "x")
        ),
    ],
)
def test_inputs_that_once_ended_in_a_traceback(file: str, raw: bytes) -> None:
    answer(file, raw)


def test_the_guard_hears_what_is_touched_outside(tmp_path: Path) -> None:
    for touch in ((tmp_path / "b").touch, (tmp_path / "b").unlink, Path("/etc/passwd").read_bytes):
        with pytest.raises(AssertionError, match=r"open|os\.remove"), guarded(tmp_path / "a"):
            touch()
