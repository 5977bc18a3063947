"""Measured times as a table: one row per timing, and the sources of the rows. In a Parquet file,
constant columns become metadata, and integers have the smallest sufficient type: 36,000 GEMMs take
150 kB."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntFlag
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from calibration.devices.protocol import OPERATORS as KINDS
from calibration.devices.protocol import RECURRENT
from simulator.arrays import Array
from simulator.codes import DTYPES, ROLES
from simulator.columns import Table, column
from simulator.errors import InputError, unknown
from simulator.files.read import load_pyarrow, read_bounded, read_parquet

T = TypeVar("T", bound="Records")

_MLA = {
    name.replace("attention", "mla"): (*KINDS[name], "n")
    for name in ("attention_prefill", "attention_decode")
}
_IMPORTED = {"collective": ("n", "batch"), "experts": ("m", "n", "k", "experts"), **_MLA}
_IMPORTED["idle"] = ()
# Required dimensions of each operator. Collectives (the role is their kind), routed experts and
# latent attention (mla_: a prompt has separate keys and values, a decode has the latent as both)
# are imported, never measured here. A row ``idle`` has the power of the device that waits.
NEEDED: Mapping[str, tuple[str, ...]] = {**KINDS, **_IMPORTED}
_LAST = ("layer_eager", "experts", *_MLA, "grouped_gemm", *RECURRENT, "indexer", "idle")
# names of timed operators; the index is the code in the operator column and in files, so new names
# come last
OPERATORS = (*(name for name in NEEDED if name not in _LAST), *_LAST)
# how the launch counts in a time: excluded (kernel times of a profiler), as a gap in a graph, or as
# host time (eager)
LAUNCHES = ("unknown", "excluded", "graph", "eager")
PURPOSES = ("", "fit", "holdout", "exact", "drift_check")  # imports: unknown

Row = dict[str, Any]
"""Names and values of a line of a file."""


class Flag(IntFlag):
    NOISY = 1  # the interval of the median missed its target within the time limit
    THROTTLED = 2  # the device ran below its clocks, also when repeated
    DRIFT = 4  # the next drift check differed by more than its limit
    CONFLICT = 8  # several timings of this shape differ; the row has their median
    # a GPU timed at its power limit, at a clock below the highest of the run, or always throttled
    POWER_CAPPED = 16
    # a CPU's process waited for a CPU, which other processes used
    WAITED = 32


@dataclass(frozen=True)
class Source:
    device: str  # the hardware as it names itself
    # software with versions: framework, driver, CUDA, threads
    stack: Mapping[str, str] = field(default_factory=dict)
    kernel: str = ""  # the implementation, where the source names it
    method: str = ""  # how times were measured
    origin: str = ""  # file, package or run that the rows were read from
    digest: str = ""  # SHA-256 of the origin, hexadecimal
    licence: str = ""  # SPDX name of the licence of the data; empty for your own data
    date: str = ""  # ISO 8601
    run: str = ""  # name of the measuring run; equal shapes of one run are one measurement
    # path that the rows were read from, for messages; never stored
    file: str = field(default="", compare=False)

    @property
    def software(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self.stack.items())

    def as_dict(self) -> Row:
        own = {**vars(self), "stack": dict(self.stack), "file": ""}
        return {name: value for name, value in own.items() if value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Source:
        check_texts(data, "source: ")
        return cls(**{"device": "", **data})


def check_texts(data: Mapping[str, Any], place: str = "") -> None:
    """Check that values are text, except ``stack``, a mapping of text, and ``extra``, a mapping of
    any values."""
    for name, value in data.items():
        expected: Any = Mapping if name in ("stack", "extra") else str
        if not isinstance(value, expected):
            right = "text" if expected is str else "names and values"
            raise InputError(f"{place}{name}: expected {right}, got {value!r:.60}")
        if name == "stack":
            check_texts(value, f"{place}stack.")


@dataclass(frozen=True, eq=False, repr=False)
class Records(Table):
    operator: Array = column(np.int8, 0)
    # index into ROLES; -1 where the operator has no role, and for all products of experts together
    role: Array = column(np.int16, -1)
    dtype: Array = column(np.int8, DTYPES.index("bf16"))  # activations and arithmetic
    # weights, or the K/V cache; dtype by default
    weight_dtype: Array = column(np.int8, DTYPES.index("bf16"))
    m: Array = column(np.int64, 0)  # GEMM, elementwise, experts: tokens
    # GEMM: output features; elementwise: features; copy, collective: bytes; experts, mla: width of
    # an expert, a value
    n: Array = column(np.int64, 0)
    # GEMM: input features; experts: hidden size; indexer: selected positions
    k: Array = column(np.int64, 0)
    rank: Array = column(np.int64, 0)  # low_rank: width between the factors
    rows: Array = column(np.int64, 0)  # gather_gemm: tokens computed
    batch: Array = column(np.int64, 0)  # attention: sequences; collective: devices
    q_len: Array = column(np.int64, 0)  # attention: query positions per sequence
    # attention: key positions per sequence; the last q_len are the queries
    kv_len: Array = column(np.int64, 0)
    heads: Array = column(np.int64, 0)
    kv_heads: Array = column(np.int64, 0)
    head_dim: Array = column(np.int64, 0)
    window: Array = column(np.int64, 0)  # attention: sliding window, 0 for none
    block: Array = column(np.int64, 0)  # attention_block_sparse: edge of a block
    density: Array = column(np.float64, 1.0)  # computed share of the work
    read_bytes: Array = column(np.float64, 0.0)  # elementwise, copy
    write_bytes: Array = column(np.float64, 0.0)
    cold: Array = column(np.bool_, True)  # weights come from memory, not from a cache
    # distinct weights rotated; 0: none stays in the cache (unknown, if not cold)
    copies: Array = column(np.int32, 0)
    experts: Array = column(np.int64, 0)  # experts on the device
    active: Array = column(np.float64, 0.0)  # experts on the device that a token uses, on average
    # experts: exponent of the power law of their tokens; 0: uniform; negative: minus the largest
    # relative deviation from the mean
    skew: Array = column(np.float64, 0.0)
    # gather_gemm, grouped_gemm: one kernel, not a gather, a GEMM and a scatter
    fused: Array = column(np.bool_, False)
    # s, median of the samples (the mean, if the source has no median)
    seconds: Array = column(np.float64, np.nan)
    # relative half-width of the median's 95 % interval; NaN: unknown
    spread: Array = column(np.float64, np.nan)
    sample_count: Array = column(np.int32, 0)  # number of raw samples; 0: unknown
    # W, mean power of the device while the operator repeats; 0: not measured
    watts: Array = column(np.float64, 0.0)
    launch: Array = column(np.int8, 0)  # index into LAUNCHES
    flags: Array = column(np.int32, 0)  # Flag bits
    purpose: Array = column(np.int8, 0)  # index into PURPOSES
    source: Array = column(np.int32, 0)  # index into sources
    line: Array = column(np.int32, 0)  # line of the file, for messages; 0: unknown; never stored
    sources: tuple[Source, ...] = ()

    TITLE = "records "
    CODES = MappingProxyType(
        {"operator": OPERATORS, "role": ROLES, "dtype": DTYPES, "weight_dtype": DTYPES}
        | {"launch": LAUNCHES, "purpose": PURPOSES}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sources", tuple(self.sources))
        if len(self) and not (self.source.min() >= 0 and self.source.max() < len(self.sources)):
            known, most = len(self.sources), self.source.max()
            raise ValueError(
                f"records column source: expected indices into {known} sources, got up to {most}"
            )

    @classmethod
    def coerced(cls, name: str, values: Any) -> Array:
        given = super().coerced(name, values)
        if given.dtype.kind not in "biuf":
            raise ValueError(f"records column {name}: expected numbers, got {given.dtype}")
        kind = cls.SCHEMA[name][0]
        if issubclass(kind, np.integer) and given.size:
            most = len(cls.CODES[name]) - 1 if name in cls.CODES else int(np.iinfo(kind).max)
            least = -1 if name == "role" else 0 if name in cls.CODES else int(np.iinfo(kind).min)
            low, high = given.min(), given.max()
            if not (least <= low and high <= most):  # NaN is refused too
                right = f"expected whole numbers from {least} to {most}"
                raise ValueError(f"records column {name}: {right}, got {low} to {high}")
        return given

    @classmethod
    def from_columns(cls: type[T], *sources: Any, size: int | None = None, **columns: Any) -> T:
        if "dtype" in columns:
            columns.setdefault("weight_dtype", columns["dtype"])
        return super().from_columns(*sources, size=size, **columns)

    @classmethod
    def concat(cls: type[T], parts: Iterable[T], **others: Any) -> T:
        sources: list[Source] = []
        recoded = [cls.from_columns([])]  # without parts, the result is an empty table
        for part in parts:
            for source in part.sources:
                if source not in sources:
                    sources.append(source)
                elif source.file != sources[at := sources.index(source)].file:
                    sources[at] = replace(source, file="")
            codes = np.array([sources.index(source) for source in part.sources], dtype=np.int32)
            recoded.append(part.replace(source=codes[part.source]))
        return super().concat(recoded, **{"sources": tuple(sources), **others})

    select = Table.take

    def tidy(self) -> Records:
        used, source = np.unique(self.source, return_inverse=True)
        return self.replace(source=source.reshape(-1), sources=tuple(self.sources[i] for i in used))

    def is_operator(self, *names: str) -> Array:
        return np.isin(self.operator, self.coerced("operator", names))

    @property
    def timed(self) -> Array:
        return np.asarray(np.isfinite(self.seconds) & (self.seconds > 0))

    def place(self, row: int) -> str:
        """Return ``file:line`` of a row as far as it is known, then its shape."""
        operator, line = OPERATORS[self.operator[row]], int(self.line[row])
        file = self.sources[self.source[row]].file
        sizes = (
            f"{name}={getattr(self, name)[row]}" for name in NEEDED[operator] if name in COUNTS
        )
        shape = " ".join((operator, str(self.labels()[row]), *sizes))
        return f"{file}{f':{line}' if line else ''}: {shape}" if file else shape

    def labels(self) -> Array:
        """Return each row's number format as profiles name it; ``int8_wo`` has int8 weights
        only."""
        names = np.array(DTYPES, dtype=object)
        mixed, suffix = (
            self.dtype != self.weight_dtype,
            np.where(names == "fp8_block", "", "_wo").astype(object),
        )
        return np.asarray(np.where(mixed, (names + suffix)[self.weight_dtype], names[self.dtype]))

    def of_dtype(self, label: str) -> Records:
        labels = self.labels()
        if label not in labels:
            raise unknown("dtype", label, np.unique(labels).tolist())
        return self.select(labels == label)

    def groups(self, *names: str) -> Array:
        """Return the number of each row's group: equal where these columns are equal (default:
        :data:`SHAPE`)."""
        table = np.stack(
            [getattr(self, name).astype(np.float64) for name in names or SHAPE], axis=1
        )
        if not len(table):
            return np.zeros(0, dtype=np.int64)
        _, inverse = np.unique(table, axis=0, return_inverse=True)
        return np.asarray(inverse, dtype=np.int64).reshape(-1)

    def digest(self) -> str:
        sha = hashlib.sha256(
            json.dumps([s.as_dict() for s in self.sources], sort_keys=True).encode()
        )
        for name in self.SCHEMA:
            if name != "line" and (name not in LATER or getattr(self, name).any()):
                sha.update(name.encode() + np.ascontiguousarray(getattr(self, name)).tobytes())
        return sha.hexdigest()


# columns that files and digests omit if they are all zero, because older tables must keep their
# digests
LATER = ("experts", "active", "skew", "fused", "watts")

# columns that are equal in two timings of one shape
SHAPE = tuple(Records.SCHEMA)[: list(Records.SCHEMA).index("seconds")]

# columns of SHAPE that are dimensions: whole numbers
COUNTS = tuple(name for name in SHAPE if Records.SCHEMA[name][0] is np.int64)

SCHEMA_VERSION = 1
_KEY = b"prunesim.records"
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def write_records(
    records: Records, *, extra: Mapping[str, Any] | None = None, single: bool = False
) -> bytes:
    """Return a table as the bytes of a Parquet file. ``extra`` is JSON-ready metadata; ``single``
    stores times as float32, whose rounding is below the noise of clocks."""
    pa, pq = load_pyarrow()
    constant: Row = {}
    arrays: dict[str, Any] = {}
    for name in records.SCHEMA:
        values = getattr(records, name)
        if name == "line" or (name in LATER and not values.any()):
            continue
        if (
            len(values)
            and name != "seconds"
            and (np.all(values == values[0]) or np.all(values != values))
        ):
            constant[name] = None if values[0] != values[0] else values[0].item()
        else:
            narrow = np.float32 if single and name == "seconds" else _narrow(values)
            arrays[name] = pa.array(values.astype(narrow))
    sources = [s.as_dict() for s in records.sources]
    head = {
        "schema": SCHEMA_VERSION,
        "constant": constant,
        "sources": sources,
        "extra": dict(extra or {}),
    }
    table = pa.table(arrays).replace_schema_metadata({_KEY: json.dumps(head).encode()})
    floats = [name for name in arrays if pa.types.is_floating(arrays[name].type)]
    how: Row = {
        "row_group_size": 1 << 20,
        "compression": "zstd",
        "compression_level": 19,
    }
    how |= {"write_statistics": False, "use_byte_stream_split": floats or False}
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, use_dictionary=[name for name in arrays if name not in floats], **how
    )
    return buffer.getvalue()


def read_records(path: str | Path | bytes) -> Records:
    label, content = ("table", path) if isinstance(path, bytes) else (str(path), read_bounded(path))
    records = records_of_parquet(read_parquet(content, label), label)
    if records is None:
        raise InputError(f"{label}: not a table of records by prunesim")
    return records


def records_of_parquet(table: Any, label: str) -> Records | None:
    """Return the records of a pyarrow table, None for a table by another program."""
    if _KEY not in (table.schema.metadata or {}):
        return None
    try:
        head = json.loads(table.schema.metadata[_KEY])
        if head["schema"] != SCHEMA_VERSION:
            raise InputError(f"expected schema {SCHEMA_VERSION}, got {head['schema']!r:.40}")
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
        columns |= {
            name: np.nan if value is None else value for name, value in head["constant"].items()
        }
        return Records.from_columns(
            [Source.from_dict(s) for s in head["sources"]], size=table.num_rows, **columns
        )
    except (*_DAMAGE, load_pyarrow()[0].ArrowException) as error:
        raise InputError(
            f"{label}: damaged table of records: {(str(error).splitlines() or ['?'])[0]}"
        ) from error


def _narrow(values: Array) -> type:
    if values.dtype.kind not in "iu":
        return values.dtype.type
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    kinds = (np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64)
    return next(kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
