"""Readers of published tables: a file's content to a :class:`Draft`, whose rows are checked by ``importers``.

Each reader knows one format: what its columns mean, their units, how times were taken, and which collections are not to be trusted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.records.parquet import read_arrow
from calibration.records.records import COLUMNS, LAUNCHES, OPERATORS, SHAPE, Records, Source
from calibration.records.screening import Screen
from simulator.errors import InputError, one_line, unknown
from simulator.files import csv as csv_table
from simulator.workload import DTYPES, ROLES

Array = NDArray[Any]

TIME_UNITS: Mapping[str, float] = {
    "seconds": 1.0,
    "latency_s": 1.0,
    "latency_ms": 1e-3,
    "latency_us": 1e-6,
    "latency_ns": 1e-9,
}
"""Names a column of times may have, and what one of it is in seconds."""

_TEXT = ("operator", "role", "dtype", "weight_dtype", "launch")


@dataclass(frozen=True)
class Draft:
    """A file's rows before they are checked.

    Attributes
    ----------
    columns : mapping of str to array
        Columns of :data:`~calibration.records.records.COLUMNS` over all rows: float64, or names.
    sources : tuple of Source
    screen : Screen
        The rows, with those the reader refused already.
    rotated : bool
        Whether the table's GEMMs went round a few copies of their weights, the number to be inferred.
    notes : tuple of str
    """

    columns: Mapping[str, Array]
    sources: tuple[Source, ...]
    screen: Screen
    rotated: bool = False
    notes: tuple[str, ...] = ()


# -- aiconfigurator -----------------------------------------------------------------------------------------------------------

AICONFIGURATOR_METHOD = "aiconfigurator collector: CUDA graph replay, weights rotated over at most 6 copies"
_AIC_DTYPES: Mapping[str, tuple[str, str]] = {
    "bfloat16": ("bf16", "bf16"),
    "float16": ("fp16", "fp16"),
    "fp8": ("fp8", "fp8"),
    "sq": ("int8", "int8"),  # SmoothQuant: int8 activations and weights
    "int8_wo": ("bf16", "int8"),
    "int4_wo": ("bf16", "int4"),
}
_AIC_SHARED = ("framework", "version", "device", "op_name", "kernel_source", "latency")
_AIC_GEMM = ("gemm_dtype", "m", "n", "k")
_AIC_ATTENTION = (
    "batch_size",
    "isl",
    "num_heads",
    "num_key_value_heads",
    "head_dim",
    "attn_dtype",
    "kv_cache_dtype",
    "step",
)
_AIC_OPERATORS: Mapping[str, str] = {
    "gemm": "gemm",
    "context_attention": "attention_prefill",
    "generation_attention": "attention_decode",
}
_AIC_REFUSED: Mapping[str, str] = {
    "VLLM": "its GEMM weights were not initialised, and multiplying zeros saves power and raises clocks (up to 967 TFLOP/s on an H100)"
}
# collections with decode times that the device's memory cannot have delivered: (device, framework, version) -> bytes/s, L2 bytes
_AIC_DECODE_ABOVE_PEAK: Mapping[tuple[str, str, str], tuple[float, float]] = {
    ("NVIDIA A100-SXM4-80GB", "TRTLLM", "1.0.0"): (2.039e12, 40 * 2**20)  # NVIDIA A100 80GB datasheet
}


def read_aiconfigurator(content: bytes, path: Path) -> Draft:
    """A ``*_perf.parquet`` table of the package aiconfigurator-core: GEMM, context attention or generation attention.

    Times are milliseconds there. A context row has ``isl`` new positions over ``step`` cached ones; a generation row one new position
    over ``step``. Block-scaled and 4-bit float formats have no counterpart here and are refused.
    """
    table = read_arrow(content, str(path))
    _need(table, _AIC_SHARED, path)
    names, operator_of = np.unique(_texts(table["op_name"]), return_inverse=True)
    for name in names:
        if name not in _AIC_OPERATORS:
            raise unknown(f"{path}: op_name", str(name), _AIC_OPERATORS)
    _need(table, _AIC_GEMM if "gemm" in names else _AIC_ATTENTION, path)
    for framework in np.unique(_texts(table["framework"])):
        if framework.upper() in _AIC_REFUSED:
            raise InputError(
                f"{path}: collections of {framework} are refused: {_AIC_REFUSED[framework.upper()]}; take trtllm or sglang"
            )
    size = len(table["latency"])
    screen = Screen(size)
    columns: dict[str, Array] = {
        "operator": np.array([_AIC_OPERATORS[n] for n in names], dtype=object)[operator_of.reshape(-1)]
    }
    columns["seconds"] = _number(table["latency"]) * 1e-3
    if "gemm" in names:
        columns["dtype"], columns["weight_dtype"] = _aic_dtypes(screen, table["gemm_dtype"], None)
        columns |= {name: _number(table[name]) for name in ("m", "n", "k")}
        columns["copies"] = np.full(size, 6.0)
    else:
        columns["dtype"], columns["weight_dtype"] = _aic_dtypes(screen, table["attn_dtype"], table["kv_cache_dtype"])
        step, isl = _number(table["step"]), _number(table["isl"])
        columns |= {"batch": _number(table["batch_size"]), "q_len": isl, "kv_len": isl + step}
        columns |= {"heads": _number(table["num_heads"]), "kv_heads": _number(table["num_key_value_heads"])}
        columns |= {"head_dim": _number(table["head_dim"])}
        columns["window"] = _number(table.get("window_size", np.zeros(size)))
        columns |= {
            "copies": np.ones(size),
            "cold": np.zeros(size, np.bool_),
        }  # the same cache is read again in every replay
        screen.refuse(_number(table.get("beam_width", np.ones(size))) != 1, "beam search")
    columns["launch"] = np.full(size, "graph", dtype=object)
    keys = np.stack([_texts(table[c]) for c in ("device", "framework", "version", "kernel_source")], axis=1)
    kinds, columns["source"] = _unique_rows(keys)
    digest = hashlib.sha256(content).hexdigest()
    shared = {"method": AICONFIGURATOR_METHOD, "origin": _tail(path), "digest": digest, "licence": "Apache-2.0"}
    sources = tuple(Source(d, {f: v}, k, **shared) for d, f, v, k in kinds)
    _refuse_above_peak(screen, columns, sources)
    return Draft(columns, sources, screen, rotated="gemm" in names)


def _aic_dtypes(screen: Screen, first: Array, second: Array | None) -> tuple[Array, Array]:
    """Names of the two number formats, unknown ones refused."""
    known = np.array([*_AIC_DTYPES], dtype=str)
    out = []
    for place, column in enumerate((first, first if second is None else second)):
        text = _texts(column)
        for name in np.unique(text[~np.isin(text, known)]):
            screen.refuse(text == name, f"number format {name} is not modelled")
        mapped = {name: pair[place if second is None else 0] for name, pair in _AIC_DTYPES.items()}
        values, inverse = np.unique(text, return_inverse=True)
        out.append(np.array([mapped.get(str(v), "bf16") for v in values], dtype=object)[inverse.reshape(-1)])
    return out[0], out[1]


def _refuse_above_peak(screen: Screen, columns: Mapping[str, Array], sources: Sequence[Source]) -> None:
    """Refuse decode rows of collections known to exceed the memory's bandwidth, where the cache does not fit into the L2."""
    for index, source in enumerate(sources):
        (framework, version), *_ = source.stack.items()
        limit = _AIC_DECODE_ABOVE_PEAK.get((source.device, framework, version))
        if limit is None or "kv_len" not in columns:
            continue
        bandwidth, l2 = limit
        decode = (columns["operator"] == "attention_decode") & (columns["source"] == index)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            cache = 2 * 2 * columns["batch"] * columns["kv_heads"] * columns["kv_len"] * columns["head_dim"]
            fast = cache / columns["seconds"] > bandwidth
        screen.refuse(
            decode & (cache > l2) & fast,
            f"decode faster than the memory's {bandwidth / 1e12:g} TB/s, known of this collection",
        )


# -- CSV ----------------------------------------------------------------------------------------------------------------------

_MEASURED_COLUMNS = ("gpu", "dtype", "op", "latency_us", "source", "note")
_LLAMA_8B_INNER, _LLAMA_8B_GROUPS = (
    14336,
    1024,
)  # of the model the element-wise rows name: width of its MLP, of its k and v
_GEMM_ROLES: Mapping[str, str] = {"qkv_proj": "qkv", "down_proj": "down", "lm_head": "lm_head"}
_ATTENTION_OPS: Mapping[str, str] = {"attn_prefill_causal": "attention_prefill", "attn_decode": "attention_decode"}


def is_measured(content: bytes) -> bool:
    """Whether a CSV has the columns of the measured tables handed to this project.

    >>> is_measured(b"gpu,dtype,op,m,n,k,latency_us,source,note\\n")
    True
    """
    header = content.split(b"\n", 1)[0].decode("utf-8", "replace").strip().split(",")
    return set(_MEASURED_COLUMNS) <= set(header)


def read_measured(content: bytes, path: Path) -> Draft:
    """A table of measured operators: GEMMs, attention, element-wise operators and 2:4 GEMMs, each row with its own source.

    Rows of operators that are no single kernel of this program (two chained GEMMs, attention without a mask) are refused by name. What is
    to be compared only within one experiment (the column ``group``) becomes the source's ``run``.
    """
    table = _csv_columns(content, path)
    _need(table, _MEASURED_COLUMNS, path)
    size = len(table["op"])
    screen = Screen(size)
    op = table["op"]
    blank = np.full(size, "", dtype=object)
    columns: dict[str, Array] = {"seconds": _number(table["latency_us"]) * 1e-6}
    for name in ("m", "n", "k", "batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim"):
        if name in table:
            columns[name] = _number(table[name])
    columns.setdefault("m", np.full(size, np.nan))
    operator, launch = blank.copy(), np.full(size, "unknown", dtype=object)
    role, reads, writes = np.full(size, -1.0), np.zeros(size), np.zeros(size)
    for name in np.unique(op.astype(str)):
        rows = op == name
        kind, of_role, width = _operator_of(str(name))
        operator[rows] = kind or "gemm"
        if kind is None:
            screen.refuse(rows, f"{name}: {of_role}")
        elif of_role:
            role[rows] = ROLES.index(of_role)
        if kind == "elementwise":
            reads[rows], writes[rows] = (columns["m"][rows] * 2.0 * w for w in width)
    columns |= {"operator": operator, "role": role, "read_bytes": reads, "write_bytes": writes}
    kernel_time = np.array(["kernel time" in note for note in table["note"]])
    launch[kernel_time] = "excluded"
    # profiled inside a running model: weights come from memory, activations from the kernel before; elsewhere a benchmark loops one shape
    columns |= {"launch": launch, "cold": kernel_time & (operator == "gemm")}
    columns["dtype"] = _first_dtype(screen, table["dtype"])
    columns["weight_dtype"] = columns["dtype"]
    if "group" in table:  # batch is 1 or the number of chained products there, no dimension of ours
        columns.pop("batch", None)
    keys = np.stack([table.get(c, blank) for c in ("gpu", "source", "note", "group", "op")], axis=1).astype(str)
    if "group" not in table:
        keys[:, 4] = ""  # there the operator's name says nothing of the kernel
    kinds, columns["source"] = _unique_rows(keys)
    digest = hashlib.sha256(content).hexdigest()
    sources = tuple(Source(device=g, kernel=k, method=n, origin=s, digest=digest, run=r) for g, s, n, r, k in kinds)
    return Draft(columns, sources, screen, notes=_dtype_notes(table["dtype"], columns["dtype"]))


def _operator_of(op: str) -> tuple[str | None, str, tuple[float, float]]:
    """Operator, role and (read, written) features a token of a row's ``op``; a None operator is refused for the reason in second place."""
    hidden = 4096.0
    element: Mapping[str, tuple[str, tuple[float, float]]] = {
        "act_fn": ("activation", (2.0 * _LLAMA_8B_INNER, float(_LLAMA_8B_INNER))),
        "embedding": ("embedding", (hidden, hidden)),
        "layernorm": ("attention_norm", (2 * hidden, 2 * hidden)),  # vLLM adds the residual in the same kernel
        "final_layernorm": ("final_norm", (2 * hidden, 2 * hidden)),
        "rotary_emb": ("rotary", (hidden + _LLAMA_8B_GROUPS, hidden + _LLAMA_8B_GROUPS)),
    }
    none = (0.0, 0.0)
    if op in element:
        return "elementwise", element[op][0], element[op][1]
    if op in _GEMM_ROLES:
        return "gemm", _GEMM_ROLES[op], none
    if op in _ATTENTION_OPS:
        return _ATTENTION_OPS[op], "", none
    if op == "attn_prefill_noncausal":
        return None, "attention without a causal mask is not modelled", none
    if op.startswith("ffn_"):
        return None, "two chained GEMMs with what lies between them, not one", none
    if op.startswith("dense"):
        return "gemm", "", none
    if op.startswith("sparse24"):
        return "gemm_2to4", "", none
    return None, "is no operator this program knows", none


def read_csv(content: bytes, path: Path, column_map: Mapping[str, str], device: str = "") -> Draft:
    """A CSV with a header, whose columns are named as in :data:`~calibration.records.records.COLUMNS`, or by the map.

    The time is one of the columns of :data:`TIME_UNITS`, so that its unit is never guessed. Columns that neither bear a known name nor are
    mapped are left out, and named in a note.
    """
    table = _csv_columns(content, path)
    known = [name for name in COLUMNS if name not in ("seconds", "source", "flags")] + list(TIME_UNITS)
    for name, theirs in column_map.items():
        if name not in known:
            raise unknown(f"{path}: column map: column", name, known)
        if theirs not in table:
            raise unknown(f"{path}: column", theirs, table)
    taken = {**{name: name for name in known if name in table and name not in column_map}, **column_map}
    times = [name for name in taken if name in TIME_UNITS]
    if len(times) != 1:
        found = f"found {', '.join(times)}" if times else f"the file has {', '.join(table)}"
        raise InputError(
            f"{path}: expected one column of times, named or mapped to one of {', '.join(TIME_UNITS)}; {found}"
        )
    size = len(next(iter(table.values())))
    screen = Screen(size)
    columns: dict[str, Array] = {"seconds": _number(table[taken.pop(times[0])]) * TIME_UNITS[times[0]]}
    for name, theirs in taken.items():
        text = table[theirs]
        if name == "weight_dtype" and "dtype" in taken:
            text = np.where(text == "", table[taken["dtype"]], text)
        columns[name] = _names(screen, name, text, path) if name in _TEXT else _number(text)
    columns.setdefault("operator", np.full(size, "attention_prefill" if "q_len" in columns else "gemm", dtype=object))
    missing = [c for c in ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim") if c not in columns]
    if any(str(o).startswith("attention") for o in np.unique(columns["operator"].astype(str))) and missing:
        raise InputError(f"{path}: attention needs the columns {', '.join(missing)}; the file has {', '.join(table)}")
    missing = [c for c in ("m", "n", "k") if c not in columns]
    if "gemm" in columns["operator"] and missing:
        raise InputError(
            f"{path}: column {missing[0]} is missing; the file has {', '.join(table)} (name them with a column map)"
        )
    columns.setdefault("dtype", np.full(size, "bf16", dtype=object))
    columns.setdefault("weight_dtype", columns["dtype"])
    columns["cold"] = columns["cold"] != 0 if "cold" in columns else np.ones(size, np.bool_)
    for name in ("density", "sample_count", "read_bytes", "write_bytes"):
        if name in columns:
            columns[name] = np.where(np.isfinite(columns[name]), columns[name], SHAPE.get(name, (float, 0.0))[1])
    source = Source(device=device, origin=path.name, digest=hashlib.sha256(content).hexdigest())
    left = sorted(set(table) - set(taken.values()) - {column_map.get(times[0], times[0])})
    notes = (f"columns not used: {', '.join(left)}",) if left else ()
    return Draft(columns, (source,), screen, notes=notes)


def draft_of_records(records: Records, notes: tuple[str, ...] = ()) -> Draft:
    """A table of this program's own, to be checked again."""
    columns = {name: getattr(records, name) for name in COLUMNS}
    columns["operator"] = np.array(OPERATORS, dtype=object)[records.operator]
    return Draft(columns, records.sources, Screen(len(records)), notes=notes)


# -- helpers ------------------------------------------------------------------------------------------------------------------


def _csv_columns(content: bytes, path: Path) -> dict[str, Array]:
    """The columns of a CSV as text; those without a name are left out."""
    table = csv_table.read_csv(content, str(path))
    return {name: np.array(table.column(name), dtype=object) for name in table.header if name}


def _texts(column: Array) -> Array:
    """A column as text on one line, whatever it held."""
    return np.array([one_line(str(value), 200) for value in column.tolist()], dtype=object).astype(str)


def _number(column: Array) -> Array:
    """A column as float64; what is no number becomes NaN, to be refused by row."""
    if column.dtype.kind in "iufb":
        return column.astype(np.float64)

    def one(value: Any) -> float:
        try:
            return float(value) if "_" not in str(value) else np.nan
        except (TypeError, ValueError):
            return np.nan

    return np.array([one(value) for value in column.tolist()], dtype=np.float64)


def _names(screen: Screen, name: str, column: Array, path: Path) -> Array:
    """A column of names, lower case, common spellings understood, unknown ones refused by row."""
    if name == "role":
        blank = column == ""
        codes = np.full(len(column), -1.0)
        codes[~blank] = [ROLES.index(v) if v in ROLES else np.nan for v in column[~blank]]
        screen.refuse(np.isnan(codes), "role is unknown")
        return np.where(np.isnan(codes), -1.0, codes)
    choices = {"operator": OPERATORS, "launch": LAUNCHES}.get(name, DTYPES)
    spelt = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32", "float8": "fp8"}
    text = np.array([spelt.get(str(v).lower(), str(v).lower()) for v in column], dtype=object)
    bad = ~np.isin(text.astype(str), choices)
    for value in np.unique(text[bad].astype(str)):
        screen.refuse(text == value, f"{name} {str(value)!r} is unknown")
    if bad.all():
        raise unknown(f"{path}: {name}", str(text[0]), choices)
    return np.asarray(np.where(bad, choices[0], text))


def _first_dtype(screen: Screen, column: Array) -> Array:
    """The first number format a text names (``fp16/bf16 (presumed)`` -> ``fp16``)."""
    text = np.array([str(v).replace("/", " ").split(" ")[0] for v in column], dtype=object)
    bad = ~np.isin(text.astype(str), DTYPES)
    for value in np.unique(text[bad].astype(str)):
        screen.refuse(text == value, f"dtype {str(value)!r} is unknown")
    return np.asarray(np.where(bad, "bf16", text))


def _dtype_notes(said: Array, taken: Array) -> tuple[str, ...]:
    """A note where a source does not state its number format plainly."""
    vague = int((said != taken).sum())
    return (f"{vague} rows do not state their number format plainly; the first one named was taken",) if vague else ()


def _need(table: Mapping[str, Array], names: Sequence[str], path: Path) -> None:
    """Refuse a file without these columns."""
    if missing := [name for name in names if name not in table]:
        raise InputError(f"{path}: column {', '.join(missing)} missing; the file has {', '.join(table)}")


def _unique_rows(keys: Array) -> tuple[list[tuple[str, ...]], Array]:
    """Distinct rows of a text table in order of first appearance, and the index of each row among them."""
    joined = np.array(["\x1f".join(row) for row in keys.tolist()], dtype=object).astype(str)
    _, first, inverse = np.unique(joined, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return [tuple(keys[i].tolist()) for i in np.sort(first)], rank[inverse.reshape(-1)]


def _tail(path: Path) -> str:
    """The end of a path that names the collection: system/operator/backend/version/file."""
    return "/".join(path.parts[-5:])
