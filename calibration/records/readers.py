"""Read published tables: convert a file's columns to a :class:`Draft`, whose rows ``importers`` checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from calibration.records.screening import Screen
from calibration.records.timing_table import LAUNCHES, OPERATORS, Records, Source
from simulator.arrays import Array, FloatArray
from simulator.codes import DTYPE_BYTES, DTYPES, ROLES
from simulator.errors import InputError, one_line, unknown
from simulator.operators.experts import PARTS

RawColumns = Mapping[str, Array]

TIME_UNITS = {"seconds": 1.0, "latency_s": 1.0, "latency_ms": 1e-3, "latency_us": 1e-6, "latency_ns": 1e-9}
_ATTENTION_SHAPE = ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim")


@dataclass(frozen=True)
class Draft:
    """Rows of a file before they are checked."""

    columns: RawColumns  # columns of ``Records`` over all rows: float64, or names
    sources: tuple[Source, ...]
    screen: Screen  # the rows, with those that the reader refused
    rotated: bool = False  # whether GEMMs rotated a few copies of their weights; the number is inferred
    still: bool = False  # whether operands were not random numbers, which saves power and makes arithmetic too fast
    notes: tuple[str, ...] = ()


def draft_of_records(records: Records, notes: tuple[str, ...] = ()) -> Draft:
    columns = {name: getattr(records, name) for name in records.SCHEMA}
    columns["operator"] = np.array(OPERATORS, dtype=object)[records.operator]
    return Draft(columns, records.sources, Screen(len(records)), notes=notes)


AICONFIGURATOR_METHOD = "aiconfigurator collector: CUDA graph replay, weights rotated over at most 6 copies"
# fmt: off
_AIC_DTYPES: Mapping[str, tuple[str, str]] = {  # activations, weights; sq is SmoothQuant
    "bfloat16": ("bf16", "bf16"), "float16": ("fp16", "fp16"), "half": ("fp16", "fp16"), "fp8": ("fp8", "fp8"),
    "fp8_block": ("fp8", "fp8_block"), "nvfp4": ("nvfp4", "nvfp4"), "int8": ("int8", "int8"),
    "sq": ("int8", "int8"), "int8_wo": ("bf16", "int8"), "int4_wo": ("bf16", "int4"), "w4a16_mxfp4": ("bf16", "mxfp4"),
}
_AIC_SHARED = ("framework", "version", "device", "op_name", "kernel_source", "latency")
_AIC_GEMM = ("gemm_dtype", "m", "n", "k")
_AIC_SIZES = {"batch_size": "batch", "num_heads": "heads", "num_key_value_heads": "kv_heads", "head_dim": "head_dim"}
_AIC_ATTENTION = (
    "batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "attn_dtype", "kv_cache_dtype", "step",
)
_AIC_COLLECTIVE = ("num_gpus", "message_size")
_AIC_COLLECTIVES = {name: name.replace("alltoall", "all_to_all") for name in (
    "all_reduce", "all_gather", "alltoall", "reduce_scatter",
)}
_AIC_OPERATORS: Mapping[str, str] = {
    "gemm": "gemm", "context_attention": "attention_prefill", "generation_attention": "attention_decode",
    **dict.fromkeys(_AIC_COLLECTIVES, "collective"), "moe": "experts",
    "mla_context": "mla_prefill", "mla_generation": "mla_decode",
}
_AIC_MLA = ("batch_size", "isl", "num_heads", "mla_dtype", "kv_cache_dtype", "step")
# features of a key and a value in DeepSeek-V2 and V3; in a decode, the latent with the rotated part, and the latent
_AIC_LATENT = {"mla_prefill": (192.0, 128.0), "mla_decode": (576.0, 512.0)}
# fmt: on
# device, framework and version of a collection, its formats whose times are those of TensorRT's profiler of layers, and
# the time that it adds: the smallest int8 products (sq) take 7.2 to 8.2 us, in bf16 2.6 to 3.3 us
_AIC_PROFILED_BY = ("NVIDIA A100-SXM4-80GB", "TRTLLM", "1.0.0")
_AIC_PROFILED, _AIC_PROFILER_S = ("int8_wo", "int4_wo"), 4.7e-6
# the collector of vLLM times these formats on one weight (collector/vllm/collect_gemm.py: outside_loop_count)
_AIC_ONE_WEIGHT = ("fp8_block", "nvfp4")


def read_aiconfigurator(table: RawColumns, path: Path, digest: str) -> Draft:
    """Read a ``*_perf.parquet`` table of aiconfigurator-core: GEMM, attention, collectives or experts; times in ms.

    A context row has ``isl`` new positions over ``step`` cached ones, a generation row one over ``step``. SGLang's
    collector passes keys of one head to its MLA kernels. A collective's ``message_size`` counts elements per device:
    before an all-reduce, reduce-scatter or all-to-all; after an all-gather.
    """
    _need(table, _AIC_SHARED, path)
    operator = _texts(table["op_name"])
    for name in np.unique(operator):
        if name not in _AIC_OPERATORS:
            raise unknown(f"{path}: op_name", str(name), _AIC_OPERATORS)
    kind = _AIC_OPERATORS[operator[0]] if len(operator) else "gemm"  # a file holds one kind
    gemm, collective, experts, mla = kind == "gemm", kind == "collective", kind == "experts", kind in _AIC_LATENT
    shapes = {"gemm": _AIC_GEMM, "collective": _AIC_COLLECTIVE, "experts": _AIC_EXPERTS}
    _need(table, shapes.get(kind, _AIC_MLA if mla else _AIC_ATTENTION), path)
    size = len(table["latency"])
    screen = Screen(size)
    kernel = _texts(table["kernel_source"])
    columns: dict[str, Array] = {
        "operator": _mapped(operator, _AIC_OPERATORS),
        "seconds": _number(table["latency"]) * 1e-3,
        "launch": np.where(np.char.endswith(kernel, "_eager"), "eager", "graph").astype(object),
    }
    if gemm:
        columns |= {name: _number(table[name]) for name in ("m", "n", "k")}
        formats = (table["gemm_dtype"],) * 2
        one = (np.char.upper(_texts(table["framework"])) == "VLLM") & np.isin(_texts(formats[0]), _AIC_ONE_WEIGHT)
        columns["copies"] = np.where(one, 1.0, 6.0)
    elif collective:
        of = "allreduce_dtype" if "allreduce_dtype" in table else "nccl_dtype"
        _need(table, (of,), path)
        roles = {theirs: float(ROLES.index(ours)) for theirs, ours in _AIC_COLLECTIVES.items()}
        columns |= {"batch": _number(table["num_gpus"]), "role": np.array([roles[name] for name in operator])}
        columns |= {"copies": np.ones(size), "cold": np.zeros(size, np.bool_)}  # every replay sends the same buffer
        formats = (table[of],) * 2
    elif experts:
        columns |= _experts(table, kernel, screen)
        formats = (table["moe_dtype"],) * 2
    else:
        step, isl = _number(table["step"]), _number(table["isl"])
        columns |= {ours: _number(table[theirs]) for theirs, ours in _AIC_SIZES.items() if theirs in table}
        if mla:
            one = (kind == "mla_decode") | (np.char.upper(_texts(table["framework"])) == "SGLANG")
            columns["kv_heads"] = np.where(one, 1.0, columns["heads"])
            columns["head_dim"], columns["n"] = (np.full(size, width) for width in _AIC_LATENT[kind])
            absorbed = one & (kind == "mla_prefill") & (kernel != "trtllm_mla")
            screen.refuse(absorbed, "a prompt on the path of a decode, which SGLang does not use")
        columns |= {"q_len": isl, "kv_len": isl + step, "window": _number(table.get("window_size", np.zeros(size)))}
        # every replay reads the same cache again
        columns |= {"copies": np.ones(size), "cold": np.zeros(size, np.bool_)}
        formats = (table["mla_dtype" if mla else "attn_dtype"], table["kv_cache_dtype"])
    for name, column in zip(("dtype", "weight_dtype"), formats, strict=True):
        text = _texts(column)
        for other in np.unique(text[~np.isin(text, [*_AIC_DTYPES])]):
            screen.refuse(text == other, f"number format {other} is not modelled")
        of_weights = (gemm or experts) and name == "weight_dtype"
        columns[name] = _mapped(text, {aic: pair[of_weights] for aic, pair in _AIC_DTYPES.items()})
    if collective:
        element = np.array([DTYPE_BYTES[DTYPES.index(name)] for name in columns["dtype"]])
        columns["n"] = _number(table["message_size"]) * element
    # NCCL's version is listed under the engine that contains it
    framework = np.where(kernel == "NCCL", "NCCL", _texts(table["framework"]))
    keys = np.stack([_texts(table["device"]), framework, _texts(table["version"]), kernel], axis=1)

    if gemm:
        profiled = (keys[:, :3] == _AIC_PROFILED_BY).all(axis=1) & np.isin(_texts(formats[0]), _AIC_PROFILED)
        columns["seconds"] = columns["seconds"] - np.where(profiled, _AIC_PROFILER_S, 0.0)
        _without_conversion(screen, columns)
    if "beam_width" in table:
        screen.refuse(_number(table["beam_width"]) != 1, "beam search")
    kinds, columns["source"] = _unique_rows(keys)
    origin = "/".join(path.parts[-5:])  # names the collection: system/operator/backend/version/file
    same = {"method": AICONFIGURATOR_METHOD, "origin": origin, "digest": digest, "licence": "Apache-2.0"}
    sources = tuple(Source(device, {name: version}, kernel_, **same) for device, name, version, kernel_ in kinds)
    still = gemm and bool((np.char.upper(keys[:, 1]) == "VLLM").any())
    return Draft(columns, sources, screen, rotated=gemm, still=still)


_AIC_EXPERTS = (
    *("moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"),
    "distribution",
)

# (width, experts per token) of models whose experts have no gate (Nemotron-H). TensorRT-LLM's tables mark them
# (``nongated``); other tables do not, and their times would need 1.5 times the memory's bandwidth
_NO_GATE = ((5120, 22), (2688, 22), (1856, 6))
SLOW = 2.0  # largest plausible factor between a time and the times of the same experts at other widths or loads
MANY = 0.3  # share of slow times above which a whole configuration counts as an untuned kernel


def _experts(table: Mapping[str, Array], kernel: Array, screen: Screen) -> dict[str, Array]:
    """Return columns of experts, timed together on one device with the movement of tokens, without the router;
    ``moe_tp_size`` divides the width of every expert, ``moe_ep_size`` their number."""
    names = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    m, k, inner, active, experts, tensor, parallel = (np.asarray(table[name], dtype=np.float64) for name in names)
    law = np.asarray(table["distribution"]).astype(str)
    known, which = np.unique(law, return_inverse=True)
    power = [0.0 if v == "balanced" else _float(v.removeprefix("power_law_")) for v in known]
    skew = np.array(power)[which.reshape(-1)]
    screen.refuse(np.isnan(skew), "tokens distributed by another rule")
    screen.refuse(parallel != 1, "experts shared among devices: most tokens use no expert of this device")
    plain = np.isin(inner * 1000 + active, [width * 1000 + top for width, top in _NO_GATE])
    screen.refuse(plain | (np.char.find(kernel, "nongated") >= 0), "experts without a gate")
    columns = {"m": m, "n": inner / np.maximum(tensor, 1.0), "k": k, "experts": experts, "active": active, "skew": skew}
    texts = table["moe_dtype"], kernel
    kinds = [np.unique(np.asarray(c).astype(str), return_inverse=True)[1].reshape(-1) for c in texts]
    shape = np.stack([k, experts, active, *kinds], axis=1)
    rows = np.flatnonzero(screen.kept & (columns["n"] % 16 == 0))
    times = np.asarray(table["latency"], dtype=np.float64)
    slow = np.zeros(len(m), dtype=np.bool_)
    slow[rows] = too_slow(shape[rows], m[rows], columns["n"][rows], skew[rows], times[rows])
    screen.refuse(slow, f"over {SLOW:g} times the time of the same experts at other widths or loads: untuned kernel")
    return columns | {"copies": np.ones(len(m)), "cold": np.zeros(len(m), np.bool_)}


def too_slow(shape: Array, m: Array, n: Array, skew: Array, seconds: Array) -> Array:
    """Return a mask of implausibly slow rows, with all rows of a configuration that has many slow rows: a wider expert
    takes at least as long; a narrower one at least its share of that time, or half, since its weights may fit in L2."""
    if not len(m):
        return np.zeros(0, dtype=np.bool_)
    group = np.unique(np.column_stack([shape, m]), axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(group, kind="stable")
    position = np.arange(len(m)) - np.searchsorted(group[order], group[order])
    at = group[order], position
    size = (group.max() + 1, position.max() + 1)
    width, time = np.ones(size), np.full(size, np.inf)
    width[at] = n[order]
    time[at] = seconds[order]
    wider = width[:, :, None] / width[:, None, :]
    least = (time[:, None, :] * np.where(wider > 1.0, 2.0 * wider, 1.0)).min(axis=2)
    slow = np.zeros(len(m), dtype=np.bool_)
    slow[order] = time[at] > SLOW * least[at]
    whole = np.unique(np.column_stack([shape, n, skew]), axis=0, return_inverse=True)[1].reshape(-1)
    share = np.bincount(whole, weights=slow) / np.bincount(whole)
    return np.asarray(slow | (share > MANY)[whole])


# the collectors of aiconfigurator-core time a layer as an engine runs it: below 16 bits, kernels convert the 16-bit
# activations first (collector/*/collect_gemm.py). Engines fuse this conversion or not, so a profile needs the product
# alone. Products of few outputs in 16 bits and in the narrow format differ by the conversion, by m and k
NARROW = 256  # output features up to which a product takes less time than the conversion of its activations
FEW, SHORT = 16, 1024  # tokens and input features up to which the time of a conversion is that of its launches
MOST = 0.65  # share of a row's time above which the conversion leaves too little of the product


def conversion_s(m: Array, n: Array, k: Array, seconds: FloatArray, wide: Array, share: float) -> FloatArray:
    """Return the time of the conversion in each row that is not ``wide`` (16 bits), s; NaN where no row determines it.

    Without conversion, a narrow product takes a ``share`` of the time of the product in 16 bits, after the same launch.
    The additional time of few tokens at large k is the main loop of one tile, not the conversion.
    """
    out = np.full(len(seconds), np.nan)
    sizes = np.stack([m, n, k], axis=1).astype(np.float64)
    few = n <= NARROW
    both, at, other = np.intersect1d(_keys(sizes[few & ~wide]), _keys(sizes[few & wide]), return_indices=True)
    if not len(both):
        return out
    launch = seconds[wide].min()
    pair = sizes[few & ~wide][at]
    added = seconds[few & ~wide][at] - launch - share * (seconds[few & wide][other] - launch)
    places, group = np.unique(pair[:, [0, 2]], axis=0, return_inverse=True)
    by_place = _medians(added, group.reshape(-1), len(places))
    tokens, inputs = places.T
    start = (tokens <= FEW) & (inputs <= SHORT)
    if not start.any():
        return out
    widths, of_width = np.unique(inputs, return_inverse=True)
    first = _medians(by_place[tokens <= FEW], of_width[tokens <= FEW], len(widths))
    found = np.median(by_place[start]) + np.maximum(by_place - first[of_width], 0.0)
    known = _keys(places)
    rows = np.flatnonzero(~wide)
    wanted = _keys(sizes[rows][:, [0, 2]])
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    out[rows] = np.where(known[place] == wanted, found[place], np.nan)
    return out


def _keys(columns: FloatArray) -> Array:
    """Return a sortable key per row of whole numbers below 2^21."""
    return np.asarray(columns.astype(np.int64) @ (2**21) ** np.arange(columns.shape[1])[::-1])


def _medians(values: FloatArray, group: Array, count: int) -> FloatArray:
    return np.asarray(ndimage.labeled_comprehension(values, group, np.arange(count), np.median, np.float64, np.nan))


def _without_conversion(screen: Screen, columns: dict[str, Array]) -> None:
    """Subtract the conversion of activations from the times of narrow products, where the table tells it."""
    m, n, k, seconds = (columns[name] for name in ("m", "n", "k", "seconds"))
    valid = np.isfinite(m) & np.isfinite(n) & np.isfinite(k) & (seconds > 0) & (np.minimum(m, np.minimum(n, k)) >= 1)
    bytes_ = np.array([DTYPE_BYTES[DTYPES.index(name)] for name in columns["dtype"]])
    weights = columns["weight_dtype"].astype(str)
    wide = valid & (bytes_ == 2.0) & (weights == columns["dtype"].astype(str))
    converted = np.zeros(len(seconds))
    for name in np.unique(weights[bytes_ < 2.0]):
        of_format = (bytes_ < 2.0) & (weights == name)
        rows = np.flatnonzero(wide | (of_format & valid))
        share = float(bytes_[of_format][0]) / 2.0
        converted[of_format] = np.nan
        converted[rows] = conversion_s(m[rows], n[rows], k[rows], seconds[rows], wide[rows], share)
        converted[wide] = 0.0
    screen.refuse(valid & np.isnan(converted), "the time includes a conversion of activations that no narrow row tells")
    most = valid & (converted > MOST * seconds)
    screen.refuse(most, f"over {100 * MOST:.0f} % of the time is the conversion of activations")
    columns["seconds"] = seconds - np.where(valid & ~most, np.nan_to_num(converted), 0.0)


def _mapped(text: Array, names: Mapping[str, str]) -> Array:
    """Return each text's name in this program, or ``bf16``; rows of other names are refused."""
    values, inverse = np.unique(text, return_inverse=True)
    return np.array([names.get(str(v), "bf16") for v in values], dtype=object)[inverse.reshape(-1)]


MEASURED = ("gpu", "dtype", "op", "latency_us", "source", "note")  # columns that identify such a table

# model of the element-wise rows: hidden size, width of the MLP, width of k and v
_HIDDEN, _INNER, _GROUPS = 4096.0, 14336.0, 1024.0
# fmt: off
_ELEMENTWISE: Mapping[str, tuple[str, float, float]] = {  # op -> role, features read and written per token
    "act_fn": ("activation", 2.0 * _INNER, _INNER),
    "embedding": ("embedding", _HIDDEN, _HIDDEN),
    "layernorm": ("attention_norm", 2.0 * _HIDDEN, 2.0 * _HIDDEN),  # vLLM adds the residual in the same kernel
    "final_layernorm": ("final_norm", 2.0 * _HIDDEN, 2.0 * _HIDDEN),
    "rotary_emb": ("rotary", _HIDDEN + _GROUPS, _HIDDEN + _GROUPS),
}
_KERNELS: Mapping[str, tuple[str, str]] = {  # op -> operator, role
    "qkv_proj": ("gemm", "qkv"), "down_proj": ("gemm", "down"), "lm_head": ("gemm", "lm_head"),
    "attn_prefill_causal": ("attention_prefill", ""), "attn_decode": ("attention_decode", ""),
    **{op: ("elementwise", role) for op, (role, *_) in _ELEMENTWISE.items()},
}
_UNREAD = {"attn_prefill_noncausal": "attention without a causal mask is not modelled"}
# fmt: on


def read_measured(table: RawColumns, path: Path, digest: str) -> Draft:
    """Read a table of measured GEMMs, attention and element-wise operators of the RTX 4090, each row with a source."""
    op = table["op"].astype(str)
    size = len(op)
    screen = Screen(size)
    columns: dict[str, Array] = {"seconds": _number(table["latency_us"]) * 1e-6}
    columns |= {name: _number(table[name]) for name in ("m", "n", "k", *_ATTENTION_SHAPE) if name in table}
    columns.setdefault("m", np.full(size, np.nan))
    operator, role = np.full(size, "gemm", dtype=object), np.full(size, -1.0)
    reads, writes = np.zeros(size), np.zeros(size)
    for name in np.unique(op).tolist():
        rows = op == name
        if name not in _KERNELS:
            screen.refuse(rows, f"{name}: {_UNREAD.get(name, 'unknown operator')}")
            continue
        kind, of_role = _KERNELS[name]
        operator[rows] = kind
        if of_role:
            role[rows] = ROLES.index(of_role)
        if kind == "elementwise":
            reads[rows], writes[rows] = (columns["m"][rows] * 2.0 * width for width in _ELEMENTWISE[name][1:])
    columns |= {"operator": operator, "role": role, "read_bytes": reads, "write_bytes": writes}
    kernel_time = np.array(["kernel time" in note for note in table["note"]])
    columns["launch"] = np.where(kernel_time, "excluded", "unknown").astype(object)
    # kernel times are from a running model, whose weights and cache come from memory; others are loops over one shape
    columns["cold"] = kernel_time & np.isin(operator, ("gemm", "attention_decode"))
    columns["dtype"] = columns["weight_dtype"] = _chosen(screen, "dtype", table["dtype"], DTYPES, "bf16")
    keys = np.stack([table[name] for name in ("gpu", "source", "note")], axis=1).astype(str)
    kinds, columns["source"] = _unique_rows(keys)
    sources = tuple(Source(device=g, method=n, origin=s, digest=digest) for g, s, n in kinds)
    return Draft(columns, sources, screen)


_NAMES = {"operator": OPERATORS, "dtype": DTYPES, "weight_dtype": DTYPES, "launch": LAUNCHES}
_SPELT = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32", "float8": "fp8"}


def read_csv(table: RawColumns, path: Path, digest: str, column_map: Mapping[str, str], device: str = "") -> Draft:
    """Read a CSV whose columns are named as in ``Records`` or by the map; the name of the time contains its unit."""
    known = [name for name in Records.SCHEMA if name not in ("seconds", "source", "flags", "line")] + list(TIME_UNITS)
    for name, theirs in column_map.items():
        if name not in known:
            raise unknown(f"{path}: column map: column", name, known)
        if theirs not in table:
            raise unknown(f"{path}: column", theirs, table)
    taken = {**{name: name for name in known if name in table and name not in column_map}, **column_map}
    times = [name for name in taken if name in TIME_UNITS]
    has = f"the file has {', '.join(table)}"
    if len(times) != 1:
        found = f"found {', '.join(times)}" if times else has
        names = ", ".join(TIME_UNITS)
        raise InputError(f"{path}: expected one column of times, named or mapped to one of {names}; {found}")
    left = sorted(set(table) - set(taken.values()))
    size = len(next(iter(table.values())))
    screen = Screen(size)
    columns: dict[str, Array] = {"seconds": _number(table[taken.pop(times[0])]) * TIME_UNITS[times[0]]}
    for name, theirs in taken.items():
        text = table[theirs]
        if name == "weight_dtype" and "dtype" in taken:
            text = np.where(text == "", table[taken["dtype"]], text)
        if name == "role":
            columns[name] = np.array([-1.0 if v == "" else ROLES.index(v) if v in ROLES else np.nan for v in text])
            screen.refuse(np.isnan(columns[name]), "role is unknown")
            columns[name] = np.nan_to_num(columns[name], nan=-1.0)
        elif name in _NAMES:
            spelt = np.array([_SPELT.get(str(v).lower(), str(v).lower()) for v in text], dtype=object)
            columns[name] = _chosen(screen, name, spelt, _NAMES[name], _NAMES[name][0])
            if not np.isin(spelt.astype(str), _NAMES[name]).any():
                raise unknown(f"{path}: {name}", str(spelt[0]), _NAMES[name])
        else:
            columns[name] = _number(text)
    columns.setdefault("operator", np.full(size, "attention_prefill" if "q_len" in columns else "gemm", dtype=object))
    missing = [name for name in _ATTENTION_SHAPE if name not in columns]
    if missing and any(str(o).startswith("attention") for o in set(columns["operator"])):
        raise InputError(f"{path}: attention needs the columns {', '.join(missing)}; {has}")
    missing = [name for name in ("m", "n", "k") if name not in columns]
    if missing and "gemm" in columns["operator"]:
        raise InputError(f"{path}: column {missing[0]} is missing; {has} (name them with a column map)")
    columns.setdefault("dtype", np.full(size, "bf16", dtype=object))
    columns.setdefault("weight_dtype", columns["dtype"])
    columns["cold"] = columns["cold"] != 0 if "cold" in columns else np.ones(size, np.bool_)
    for name in ("density", "sample_count", "read_bytes", "write_bytes"):
        if name in columns:
            columns[name] = np.where(np.isfinite(columns[name]), columns[name], Records.SCHEMA[name][1])
    source = Source(device=device, origin=path.name, digest=digest)
    notes = (f"columns not used: {', '.join(left)}",) if left else ()
    return Draft(columns, (source,), screen, notes=notes)


def _texts(column: Array) -> Array:
    return np.array([one_line(str(value), 200) for value in column.tolist()], dtype=object).astype(str)


def _number(column: Array) -> Array:
    """Return a column as float64, NaN for other values."""
    if column.dtype.kind in "iufb":
        return column.astype(np.float64)
    return np.array([_float(value) for value in column.tolist()], dtype=np.float64)


def _float(value: Any) -> float:
    try:
        return float(value) if "_" not in str(value) else np.nan
    except (TypeError, ValueError):
        return np.nan


def _chosen(screen: Screen, name: str, text: Array, choices: Sequence[str], otherwise: str) -> Array:
    """Return a column of names; refuse the rows of unknown names and replace them, since every row needs a value."""
    bad = ~np.isin(text.astype(str), choices)
    for value in np.unique(text[bad].astype(str)):
        screen.refuse(text == value, f"{name} {str(value)!r} is unknown")
    return np.asarray(np.where(bad, otherwise, text))


def _need(table: RawColumns, names: Sequence[str], path: Path) -> None:
    if missing := [name for name in names if name not in table]:
        raise InputError(f"{path}: column {', '.join(missing)} missing; the file has {', '.join(table)}")


def _unique_rows(keys: Array) -> tuple[list[tuple[str, ...]], Array]:
    """Return the distinct rows of a text table in order of appearance, and each row's index among them."""
    rows = [tuple(row) for row in keys.tolist()]
    index = {row: i for i, row in enumerate(dict.fromkeys(rows))}
    return list(index), np.array([index[row] for row in rows], dtype=np.int64)


GROUPED_SHAPE = (
    *("num_experts", "num_local_experts", "topk", "hidden_size", "intermediate_size", "tokens_per_expert"),
    *("up_proj_us", "down_proj_us"),
)
AROUND_MEAN = -0.3  # skew of the rule that distributes tokens (simulator.operators.experts.dealt_load)
FEWEST = 4  # experts from which the number of tokens is known within 9 %, the standard deviation of what was drawn


def read_grouped(table: Mapping[str, Array]) -> tuple[dict[str, Array], Screen]:
    """Read InferSim's products of gate and up, then of down, of a layer's experts, timed alone by DeepGEMM.

    Its scripts (``kernel_benchmark/deepgemm_grouped_gemm_*.py`` of alibaba/InferSim) draw the tokens of each expert
    from 0.7 to 1.3 times their mean. Times are those of a profiler, without launches, with L2 overwritten before each.
    """
    every, experts, top, k, n, tokens, up, down = (np.asarray(table[name], dtype=np.float64) for name in GROUPED_SHAPE)
    once = {"m": np.rint(tokens * every / top), "n": n, "k": k, "experts": experts, "active": top * experts / every}
    columns = {name: np.tile(column, 2) for name, column in once.items()}
    size = 2 * len(n)
    columns |= {
        "operator": np.full(size, "experts", dtype=object),
        "role": np.repeat([float(ROLES.index(name)) for name in PARTS[1:]], len(n)),
        "dtype": np.full(size, "fp8", dtype=object),
        "weight_dtype": np.full(size, "fp8_block", dtype=object),
        "skew": np.full(size, AROUND_MEAN),
        "seconds": 1e-6 * np.concatenate([up, down]),
        "cold": np.ones(size, np.bool_),
        "launch": np.full(size, "excluded", dtype=object),
    }
    screen = Screen(size)
    screen.refuse(columns["experts"] < FEWEST, f"under {FEWEST} experts: their number of tokens was drawn")
    return columns, screen
