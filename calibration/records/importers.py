"""Import published tables as records: convert the columns of each format; refuse invalid rows,
counted by reason."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from calibration.records import screening
from calibration.records.screening import Refusals, Screen
from calibration.records.store import MARK, content_records, parse, untimed
from calibration.records.timing_table import (
    COUNTS,
    LAUNCHES,
    NEEDED,
    OPERATORS,
    Records,
    Source,
    records_of_parquet,
)
from simulator.arrays import Array, FloatArray
from simulator.codes import DTYPE_BYTES, DTYPES, ROLES
from simulator.errors import InputError, one_line, unknown
from simulator.files import csv
from simulator.files.read import parquet_columns, read_bounded, read_parquet
from simulator.hardware.profile import HardwareProfile
from simulator.operators.experts import POWER

TIME_UNITS = {
    "seconds": 1.0,
    "latency_s": 1.0,
    "latency_ms": 1e-3,
    "latency_us": 1e-6,
    "latency_ns": 1e-9,
}
_NAMES: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
_ATTENTION_SHAPE = ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim")


class RawColumns(dict[str, Array]):
    """Columns of a file by name; a column that the file lacks is an InputError."""

    def __init__(self, columns: Mapping[str, Array], path: Path) -> None:
        super().__init__(columns)
        self.path = path

    def __missing__(self, name: str) -> Array:
        raise InputError(f"{self.path}: column {name} missing; the file has {', '.join(self)}")


@dataclass(frozen=True)
class Draft:
    columns: Mapping[str, Array]  # columns of ``Records`` over all rows: float64, or names
    sources: tuple[Source, ...]
    screen: Screen  # the rows, with those that the reader refused
    # whether GEMMs rotated a few copies of their weights; the number is inferred
    rotated: bool = False
    # whether operands were not random numbers, which saves power and makes arithmetic too fast
    still: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImportResult:
    records: Records
    refusals: Refusals
    notes: tuple[str, ...] = ()


def import_table(
    path: str | Path,
    *,
    content: bytes | None = None,
    hw: HardwareProfile | None = None,
    column_map: Mapping[str, str] | None = None,
    device: str = "",
    screened: bool = True,
) -> ImportResult:
    """Read a table of aiconfigurator-core (Parquet), a CSV file, or a table or store of this
    program; ``content`` is a file's content in an archive. Rows faster than the datasheet of ``hw``
    allows are refused, if ``screened``. For a CSV, ``column_map`` maps names here to names in the
    file (``{"m": "M", "latency_us": "time"}``), and ``device`` is the measured device. InputError
    without a usable row."""
    raw = read_bounded(path) if content is None else content
    # rows with NaN or infinity are refused later
    with np.errstate(invalid="ignore", over="ignore"):
        draft = _read(raw, Path(path), column_map, device)
    return finish(draft, label=str(path), hw=hw, screened=screened)


def _read(content: bytes, path: Path, column_map: Mapping[str, str] | None, device: str) -> Draft:
    digest = hashlib.sha256(content).hexdigest()
    if content.startswith(MARK):
        stored = parse(content, str(path))
        if stored is None:
            raise InputError(f"{path}: holds no records")
        lost = ("the last line was incomplete and was dropped",) if stored.dropped else ()
        left = tuple(
            f"{count} operators without a time: {reason}"
            for reason, count in untimed(stored.rows).items()
        )
        return _draft_of_records(content_records(stored), lost + left)
    if content[:4] == b"PAR1":
        parquet = read_parquet(content, str(path))
        records = records_of_parquet(parquet, str(path))
        if records is not None:
            return _draft_of_records(records)
        return read_aiconfigurator(RawColumns(parquet_columns(parquet, str(path)), path), digest)
    if path.suffix.lower() == ".parquet":
        raise InputError(f"{path}: not a Parquet file")
    cells = csv.read_csv(content, str(path))
    table = RawColumns(
        {name: np.array(cells.column(name), dtype=object) for name in cells.header if name}, path
    )
    draft = read_csv(table, digest, column_map or {}, device)
    return replace(draft, columns={**draft.columns, "line": np.array(cells.lines)})


def _draft_of_records(records: Records, notes: tuple[str, ...] = ()) -> Draft:
    columns = {name: getattr(records, name) for name in records.SCHEMA}
    columns["operator"] = np.array(OPERATORS, dtype=object)[records.operator]
    return Draft(columns, records.sources, Screen(len(records)), notes=notes)


def finish(
    draft: Draft, *, label: str, hw: HardwareProfile | None, screened: bool = True
) -> ImportResult:
    screen, notes = draft.screen, list(draft.notes)
    records = _records_of(draft, label)
    if hw is not None and draft.rotated:  # the size of the weights gives the number of copies
        copies = screening.rotated_copies(np.maximum(screening.work(records)[1], 1.0), hw.l2_bytes)
        several = records.is_operator("gemm") & (records.copies > 1)
        records = records.replace(copies=np.where(several, copies, records.copies))
    if draft.still:
        records = _without_compute_bound(records, screen, hw, label)
    if hw is None:
        notes.append("no hardware given; times were not checked against a roofline")
    elif screened:
        compute, memory = screening.too_fast(records, hw)
        screen.refuse_kept(compute, "faster than the arithmetic peak at the highest clock")
        screen.refuse_kept(memory[~compute], "faster than memory, L2 or link allow")
        records = records.select(~(compute | memory))
    if not len(records):
        reasons = "; ".join(screening.refusal_lines(screen.refusals)) or "the file has no rows"
        raise InputError(f"{label}: no usable row: {reasons}")
    records, joined, conflicts = screening.join_repeats(records)
    if joined:
        flagged = f"{conflicts} shapes differ by over 10 %, flagged CONFLICT"
        notes.append(f"{joined} rows repeat a shape, replaced by their median; {flagged}")
    return ImportResult(records.tidy(), screen.refusals, tuple(notes))


def _records_of(draft: Draft, label: str) -> Records:
    """Return the rows of a draft with a valid time and shape."""
    columns = {name: np.asarray(values) for name, values in draft.columns.items()}
    _check_numbers(draft.screen, columns)
    kept = {name: values[draft.screen.kept] for name, values in columns.items()}
    for name in (*COUNTS, "copies"):
        if name in kept:
            kept[name] = kept[name].astype(np.float64).astype(np.int64)
    sources = [replace(source, file=label) for source in draft.sources]
    return Records.from_columns(sources, size=int(draft.screen.kept.sum()), **kept)


def _without_compute_bound(
    records: Records, screen: Screen, hw: HardwareProfile | None, label: str
) -> Records:
    if hw is None:
        why = "its operands were not random numbers, which saves power and raises clocks"
        raise InputError(f"{label}: {why}; name the hardware, to exclude compute-bound rows")
    unreliable = screening.compute_bound(records, hw)
    screen.refuse_kept(unreliable, "compute-bound, on operands that were not random numbers")
    return records.select(~unreliable)


def _check_numbers(screen: Screen, columns: dict[str, Array]) -> None:
    """Refuse rows with an invalid time or shape; correct columns (float64, or names) where that is
    possible."""
    operator = np.broadcast_to(columns.get("operator", np.array("gemm")), screen.kept.shape)
    with np.errstate(invalid="ignore"):
        seconds = columns["seconds"]
        screen.refuse(np.isnan(seconds), "time is missing or not a number")
        screen.refuse(np.isinf(seconds), "time is infinite")
        screen.refuse(seconds == 0, "time is zero")
        screen.refuse(seconds < 0, "time is negative")
        for name in (*COUNTS, "copies"):
            if name not in columns:
                continue
            needed = np.isin(operator, [kind for kind, names in NEEDED.items() if name in names])
            screen.refuse(np.isnan(columns[name]) & needed, f"{name} is missing or not a number")
            # NaN in other rows: the operator does not have this dimension
            values = columns[name] = np.where(np.isnan(columns[name]), 0.0, columns[name])
            screen.refuse(
                (values != np.floor(values)) | np.isinf(values), f"{name} is not a whole number"
            )
            screen.refuse(needed & (values < 1), f"{name} is below 1")
            most = 2**31 - 1 if name == "copies" else 2**40
            screen.refuse((values < 0) | (values > most), f"{name} is out of range")
        for name in ("read_bytes", "write_bytes"):
            if name in columns:
                screen.refuse(
                    ~((columns[name] >= 0) & (columns[name] < 2.0**60)), f"{name} is out of range"
                )
        for name, most in (("sample_count", 2**31 - 1), ("flags", 2**15)):
            if name in columns:  # rows with unknown values are kept
                columns[name] = np.nan_to_num(
                    np.clip(columns[name].astype(np.float64), 0, most), nan=0.0
                )
        if "spread" in columns:
            columns["spread"] = np.where(columns["spread"] >= 0, columns["spread"], np.nan)
        if "active" in columns:
            held = np.broadcast_to(columns.get("experts", np.array(0.0)), seconds.shape)
            wrong = ~(
                (columns["active"] > 0)
                & (columns["active"] <= held)
                & (columns["skew"] >= POWER.low)
            )
            screen.refuse(
                wrong & (operator == "experts"), "active experts are not among the device's experts"
            )
        if "density" in columns:
            screen.refuse(
                ~((columns["density"] > 0) & (columns["density"] <= 1)), "density is not in (0, 1]"
            )
    if {"heads", "kv_heads", "q_len", "kv_len"} <= columns.keys():
        attention = np.char.startswith(operator.astype(str), "attention") & screen.kept
        heads, groups = (np.where(attention, columns[name], 1.0) for name in ("heads", "kv_heads"))
        screen.refuse(heads % groups != 0, "heads is not a multiple of kv_heads")
        screen.refuse(attention & (columns["q_len"] > columns["kv_len"]), "q_len exceeds kv_len")


# --- tables of aiconfigurator-core

AICONFIGURATOR_METHOD = (
    "aiconfigurator collector: CUDA graph replay, weights rotated over at most 6 copies"
)
_AIC: Mapping[str, Any] = _NAMES["aiconfigurator"]
# device, framework and version of a collection, its formats whose times are those of TensorRT's
# profiler of layers, and the time that it adds: the smallest int8 products (sq) take 7.2 to 8.2 us,
# in bf16 2.6 to 3.3 us
_AIC_PROFILED_BY = ("NVIDIA A100-SXM4-80GB", "TRTLLM", "1.0.0")
_AIC_PROFILED, _AIC_PROFILER_S = ("int8_wo", "int4_wo"), 4.7e-6
# the collector of vLLM times these formats on one weight (collector/vllm/collect_gemm.py:
# outside_loop_count)
_AIC_ONE_WEIGHT = ("fp8_block", "nvfp4")


def read_aiconfigurator(table: RawColumns, digest: str) -> Draft:
    """Read a ``*_perf.parquet`` table: GEMM, attention, collectives or experts; times in ms."""
    operator = _texts(table["op_name"])
    for name in np.unique(operator):
        if name not in _AIC["operators"]:
            raise unknown(f"{table.path}: op_name", str(name), _AIC["operators"])
    kind = _AIC["operators"][operator[0]] if len(operator) else "gemm"  # a file holds one kind
    framework, kernel = _texts(table["framework"]), _texts(table["kernel_source"])
    screen, in_vllm = Screen(len(operator)), np.char.upper(framework) == "VLLM"
    # NCCL's version is listed under the engine that contains it
    stack = np.where(kernel == "NCCL", "NCCL", framework)
    keys = np.stack([_texts(table["device"]), stack, _texts(table["version"]), kernel], axis=1)
    columns: dict[str, Array] = {
        "operator": _mapped(operator, _AIC["operators"]),
        "seconds": numbers(table["latency"]) * 1e-3,
        "launch": np.where(np.char.endswith(kernel, "_eager"), "eager", "graph").astype(object),
    }
    if kind == "gemm":
        columns |= {name: numbers(table[name]) for name in ("m", "n", "k")}
        columns |= _formats(screen, _texts(table["gemm_dtype"]))
        _correct_gemms(screen, columns, _texts(table["gemm_dtype"]), keys, in_vllm)
    else:  # every replay uses the same operands again
        columns |= {"copies": np.ones(len(operator)), "cold": np.zeros(len(operator), np.bool_)}
    if kind == "collective":
        columns |= _collectives(table, operator, screen)
    elif kind == "experts":
        formats = _texts(table["moe_dtype"])
        columns |= _experts(table, kernel, screen) | _formats(screen, formats)
    elif kind != "gemm":
        columns |= _attention(table, kind, framework, kernel, screen)
    if "beam_width" in table:
        screen.refuse(numbers(table["beam_width"]) != 1, "beam search")
    kinds, columns["source"] = unique_rows(keys)
    still = kind == "gemm" and bool(in_vllm.any())
    sources = _aic_sources(kinds, table.path, digest)
    return Draft(columns, sources, screen, rotated=kind == "gemm", still=still)


def _aic_sources(kinds: Iterable[Sequence[str]], path: Path, digest: str) -> tuple[Source, ...]:
    same = {
        "method": AICONFIGURATOR_METHOD,
        # names the collection: system/operator/backend/version/file
        "origin": "/".join(path.parts[-5:]),
        "digest": digest,
        "licence": "Apache-2.0",
    }
    return tuple(
        Source(device, {name: version}, kernel, **same) for device, name, version, kernel in kinds
    )


def _formats(screen: Screen, text: Array, cache: Array | None = None) -> dict[str, Array]:
    """Return the columns of number formats: of arithmetic, and of weights or the cache."""
    texts = {"dtype": text, "weight_dtype": text if cache is None else cache}
    known: Mapping[str, tuple[str, str]] = _AIC["formats"]
    for theirs in texts.values():
        for other in np.unique(theirs[~np.isin(theirs, [*known])]):
            screen.refuse(theirs == other, f"number format {other} is not modelled")
    of_weights = int(cache is None)
    return {
        "dtype": _mapped(text, {name: pair[0] for name, pair in known.items()}),
        "weight_dtype": _mapped(
            texts["weight_dtype"], {name: pair[of_weights] for name, pair in known.items()}
        ),
    }


def _correct_gemms(
    screen: Screen, columns: dict[str, Array], formats: Array, keys: Array, in_vllm: Array
) -> None:
    """Add the number of copies, and take the profiler's time and that of conversions from the
    times. ``keys`` (rows, 4): device, framework, version, kernel."""
    columns["copies"] = np.where(in_vllm & np.isin(formats, _AIC_ONE_WEIGHT), 1.0, 6.0)
    profiled = (keys[:, :3] == _AIC_PROFILED_BY).all(axis=1) & np.isin(formats, _AIC_PROFILED)
    columns["seconds"] = columns["seconds"] - np.where(profiled, _AIC_PROFILER_S, 0.0)
    _without_conversion(screen, columns)


def _collectives(table: RawColumns, operator: Array, screen: Screen) -> dict[str, Array]:
    """A collective's ``message_size`` counts the elements of a device: before an all-reduce,
    reduce-scatter or all-to-all, after an all-gather."""
    text = _texts(table["allreduce_dtype" if "allreduce_dtype" in table else "nccl_dtype"])
    formats = _formats(screen, text)
    element_bytes = np.array([DTYPE_BYTES[DTYPES.index(name)] for name in formats["dtype"]])
    roles = [float(ROLES.index(_AIC["collectives"][name])) for name in operator]
    return {
        **{**formats, "weight_dtype": formats["dtype"]},
        "batch": numbers(table["num_gpus"]),
        "n": numbers(table["message_size"]) * element_bytes,
        "role": np.array(roles),
    }


def _attention(
    table: RawColumns, kind: str, framework: Array, kernel: Array, screen: Screen
) -> dict[str, Array]:
    """A context row has ``isl`` new positions over ``step`` cached ones, a generation row has one
    new position over ``step``. SGLang's collector passes keys of one head to its MLA kernels."""
    latent = kind in _AIC["latent"]
    sizes = ("batch_size", "num_heads") if latent else _AIC["sizes"]
    columns = {_AIC["sizes"][name]: numbers(table[name]) for name in sizes}
    columns["q_len"] = numbers(table["isl"])
    columns["kv_len"] = columns["q_len"] + numbers(table["step"])
    columns["window"] = numbers(table.get("window_size", np.zeros(len(kernel))))
    if latent:
        one_head = (kind == "mla_decode") | (np.char.upper(framework) == "SGLANG")
        columns["kv_heads"] = np.where(one_head, 1.0, columns["heads"])
        columns["head_dim"], columns["n"] = (
            np.full(len(kernel), width) for width in _AIC["latent"][kind]
        )
        absorbed = one_head & (kind == "mla_prefill") & (kernel != "trtllm_mla")
        screen.refuse(absorbed, "a prompt on the path of a decode, which SGLang does not use")
    formats = _texts(table["mla_dtype" if latent else "attn_dtype"])
    return columns | _formats(screen, formats, cache=_texts(table["kv_cache_dtype"]))


# largest plausible factor between a time and the times of the same experts at other widths or loads
SLOW = 2.0
MANY = 0.3  # share of slow times above which a whole configuration counts as an untuned kernel
_EXPERTS_OF_MODEL = ("k", "experts", "active")


def _experts(table: RawColumns, kernel: Array, screen: Screen) -> dict[str, Array]:
    """Return columns of experts, timed together on one device with the movement of tokens, without
    the router. Rows that are implausibly slow are refused, with all rows of a configuration that
    has many of them: a wider expert takes at least as long, a narrower one at least its share of
    that time, or half of it, since its weights may fit in L2."""
    columns = {ours: numbers(table[theirs]) for ours, theirs in _AIC["experts"].items()}
    columns["n"] = columns["n"] / np.maximum(numbers(table["moe_tp_size"]), 1.0)
    columns["skew"] = _skews(table["distribution"])
    screen.refuse(np.isnan(columns["skew"]), "tokens distributed by another rule")
    screen.refuse(
        numbers(table["moe_ep_size"]) != 1,
        "experts shared among devices: most tokens use no expert of this device",
    )
    models = numbers(table["inter_size"]) * 1000 + columns["active"]
    plain = np.isin(models, [width * 1000 + top for width, top in _AIC["no_gate"]])
    screen.refuse(plain | (np.char.find(kernel, "nongated") >= 0), "experts without a gate")
    kinds = list(zip(_texts(table["moe_dtype"]), kernel, *(columns[x] for x in _EXPERTS_OF_MODEL)))
    screen.refuse(
        _untuned(columns, numbers(table["latency"]), kinds, screen.kept),
        f"over {SLOW:g} times the time of the same experts at other widths or loads: untuned"
        " kernel",
    )
    return columns


def _skews(distribution: Array) -> Array:
    """Return the exponent of each row's power law; NaN for another rule."""
    known, which = np.unique(np.asarray(distribution).astype(str), return_inverse=True)
    power = [0.0 if v == "balanced" else _float(v.removeprefix("power_law_")) for v in known]
    return np.asarray(np.array(power)[which.reshape(-1)])


def _untuned(
    columns: Mapping[str, Array], seconds: Array, configurations: Sequence[Any], kept: Array
) -> Array:
    """Return which rows are slow for their width or load, with every row of a configuration that
    has many of them."""
    n, slow = columns["n"], np.zeros(len(seconds), dtype=np.bool_)
    rows = np.flatnonzero(kept & (n % 16 == 0))
    for group in _grouped(rows, configurations, columns["m"]):
        wider = n[group][:, None] / n[group]
        least = seconds[group] * np.where(wider > 1.0, 2.0 * wider, 1.0)
        slow[group] = seconds[group] > SLOW * least.min(axis=1)
    for group in _grouped(rows, configurations, n, columns["skew"]):
        slow[group] |= slow[group].mean() > MANY
    return slow


def _grouped(rows: Array, *keys: Any) -> list[Array]:
    groups = defaultdict(list)
    for row in rows.tolist():
        groups[tuple(key[row] for key in keys)].append(row)
    return [np.array(group) for group in groups.values()]


# The collectors of aiconfigurator-core time a layer as an engine runs it: below 16 bits, kernels
# convert the 16-bit activations first (collector/*/collect_gemm.py). Engines fuse this conversion
# or not, so a profile needs the product alone. Products of few outputs in 16 bits and in the narrow
# format differ by the conversion, by m and k. output features up to which a product takes less time
# than the conversion of its activations
NARROW = 256
# tokens and input features up to which the time of a conversion is that of its launches
FEW, SHORT = 16, 1024
MOST = 0.65  # share of a row's time above which the conversion leaves too little of the product


def conversion_s(
    m: Array, n: Array, k: Array, seconds: FloatArray, wide: Array, share: float
) -> FloatArray:
    """Return the time of the conversion in each row that is not ``wide`` (16 bits), s; NaN where no
    row determines it. Without conversion, a narrow product takes a ``share`` of the time of the
    product in 16 bits, after the same launch. The additional time of few tokens at large k is the
    main loop of one tile, not the conversion."""
    out = np.full(len(seconds), np.nan)
    medians = _added_medians(m, n, k, seconds, wide, share)
    of_few = defaultdict(list)  # medians of few tokens by input features
    for (tokens, inputs), time in medians.items():
        if tokens <= FEW:
            of_few[inputs].append(time)
    launches = [time for inputs, times in of_few.items() for time in times if inputs <= SHORT]
    if not launches:
        return out
    loop = {inputs: np.median(times) for inputs, times in of_few.items()}
    for row in np.flatnonzero(~wide):
        place = m[row], k[row]
        if place[1] in loop and place in medians:
            out[row] = np.median(launches) + max(medians[place] - loop[place[1]], 0.0)
    return out


def _added_medians(
    m: Array, n: Array, k: Array, seconds: FloatArray, wide: Array, share: float
) -> dict[tuple[float, float], float]:
    """Return the time, s, that products of few outputs take in addition to a ``share`` of the time
    in 16 bits, by tokens and input features."""
    few, shapes = n <= NARROW, list(zip(m.tolist(), n.tolist(), k.tolist()))
    in_16_bits = {shapes[row]: seconds[row] for row in np.flatnonzero(few & wide)}
    launch = seconds[wide].min(initial=np.inf)
    added = defaultdict(list)
    for row in np.flatnonzero(few & ~wide):
        if (wide_s := in_16_bits.get(shapes[row])) is not None:
            product_s = launch + share * (wide_s - launch)
            added[m[row], k[row]].append(seconds[row] - product_s)
    return {place: float(np.median(times)) for place, times in added.items()}


def _without_conversion(screen: Screen, columns: dict[str, Array]) -> None:
    m, n, k, seconds = (columns[name] for name in ("m", "n", "k", "seconds"))
    valid = (
        np.isfinite(m)
        & np.isfinite(n)
        & np.isfinite(k)
        & (seconds > 0)
        & (np.minimum(m, np.minimum(n, k)) >= 1)
    )
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
    screen.refuse(
        valid & np.isnan(converted),
        "the time includes a conversion of activations that no narrow row tells",
    )
    most = valid & (converted > MOST * seconds)
    screen.refuse(most, f"over {100 * MOST:.0f} % of the time is the conversion of activations")
    columns["seconds"] = seconds - np.where(valid & ~most, np.nan_to_num(converted), 0.0)


# --- other CSV files

_CHOICES = {"operator": OPERATORS, "dtype": DTYPES, "weight_dtype": DTYPES, "launch": LAUNCHES}


def read_csv(
    table: RawColumns, digest: str, column_map: Mapping[str, str], device: str = ""
) -> Draft:
    """Read a CSV whose columns are named as in ``Records`` or by the map; the name of the time
    contains its unit."""
    taken, time = _columns_of_csv(table, column_map)
    left = sorted(set(table) - {time, *taken.values()})
    unit = next(unit for unit in TIME_UNITS if time in (unit, column_map.get(unit)))
    columns: dict[str, Array] = {"seconds": numbers(table[time]) * TIME_UNITS[unit]}
    screen = Screen(len(columns["seconds"]))
    for name, theirs in taken.items():
        text = table[theirs]
        if name == "weight_dtype" and "dtype" in taken:
            text = np.where(text == "", table[taken["dtype"]], text)
        columns[name] = _values(table.path, screen, name, text)
    usual = "attention_prefill" if "q_len" in columns else "gemm"
    columns.setdefault("operator", np.full(len(columns["seconds"]), usual, dtype=object))
    _check_needed(table, columns)
    if "cold" in columns:
        columns["cold"] = columns["cold"] != 0
    for name in ("density", "sample_count", "read_bytes", "write_bytes"):
        if name in columns:
            columns[name] = np.where(
                np.isfinite(columns[name]), columns[name], Records.SCHEMA[name][1]
            )
    source = Source(device=device, origin=table.path.name, digest=digest)
    notes = (f"columns not used: {', '.join(left)}",) if left else ()
    return Draft(columns, (source,), screen, notes=notes)


def _columns_of_csv(table: RawColumns, column_map: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Return the column of the file by name here, and the column of times."""
    known = [
        name for name in Records.SCHEMA if name not in ("seconds", "source", "flags", "line")
    ] + list(TIME_UNITS)
    for name, theirs in column_map.items():
        if name not in known:
            raise unknown(f"{table.path}: column map: column", name, known)
        if theirs not in table:
            raise unknown(f"{table.path}: column", theirs, table)
    taken = {name: name for name in known if name in table and name not in column_map}
    taken |= column_map
    times = [name for name in taken if name in TIME_UNITS]
    if len(times) != 1:
        got = f"found {', '.join(times)}" if times else f"the file has {', '.join(table)}"
        names = ", ".join(TIME_UNITS)
        raise InputError(
            f"{table.path}: expected one column of times, named or mapped to one of {names}; {got}"
        )
    return taken, taken.pop(times[0])


def _values(path: Path, screen: Screen, name: str, text: Array) -> Array:
    """Return a column of a CSV: names of this program, codes of roles, or numbers."""
    if name == "role":
        roles = chosen(screen, name, text, ("", *ROLES), "")
        return np.array([ROLES.index(role) if role else -1.0 for role in roles])
    if name not in _CHOICES:
        return numbers(text)
    spelt = np.array(
        [_NAMES["spelt"].get(str(v).lower(), str(v).lower()) for v in text], dtype=object
    )
    if not np.isin(spelt.astype(str), _CHOICES[name]).any():
        raise unknown(f"{path}: {name}", str(spelt[0]), _CHOICES[name])
    return chosen(screen, name, spelt, _CHOICES[name], _CHOICES[name][0])


def _check_needed(table: RawColumns, columns: Mapping[str, Array]) -> None:
    operators = {str(operator) for operator in columns["operator"]}
    for kind, needed in (("attention", _ATTENTION_SHAPE), ("gemm", ("m", "n", "k"))):
        missing = [name for name in needed if name not in columns]
        if missing and any(operator.startswith(kind) for operator in operators):
            has = f"the file has {', '.join(table)} (name them with a column map)"
            raise InputError(f"{table.path}: {kind} needs the columns {', '.join(missing)}; {has}")


def _mapped(text: Array, names: Mapping[str, str]) -> Array:
    """Return names of this program; ``bf16`` for rows of other names, which are refused."""
    return np.array([names.get(value, "bf16") for value in text.tolist()], dtype=object)


def _texts(column: Array) -> Array:
    return np.array([one_line(str(value), 200) for value in column.tolist()], dtype=object).astype(
        str
    )


def numbers(column: Array) -> Array:
    if column.dtype.kind in "iufb":
        return column.astype(np.float64)
    return np.array([_float(value) for value in column.tolist()], dtype=np.float64)


def _float(value: Any) -> float:
    try:
        return float(value) if "_" not in str(value) else np.nan
    except (TypeError, ValueError):
        return np.nan


def chosen(screen: Screen, name: str, text: Array, choices: Sequence[str], otherwise: str) -> Array:
    bad = ~np.isin(text.astype(str), choices)
    for value in np.unique(text[bad].astype(str)):
        screen.refuse(text == value, f"{name} {str(value)!r} is unknown")
    return np.asarray(np.where(bad, otherwise, text))


def unique_rows(keys: Array) -> tuple[list[tuple[str, ...]], Array]:
    rows = [tuple(row) for row in keys.tolist()]
    index = {row: i for i, row in enumerate(dict.fromkeys(rows))}
    return list(index), np.array([index[row] for row in rows], dtype=np.int64)
