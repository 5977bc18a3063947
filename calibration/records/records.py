"""Measured times as a table: one row a timing, columns of equal length, and the sources the rows came from.

Use :meth:`Records.from_columns` (arrays) or :meth:`Records.from_rows` (mappings) to make a table, :meth:`Records.select` and
:meth:`Records.concat` to cut and join, :meth:`Records.shapes` to compare rows by what was timed. ``recordfile`` reads and writes them as
Parquet, ``store`` as JSON lines. What holds for many rows alike (device,
software, method) is a :class:`Source`, kept once; the ``source`` column says which.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntFlag
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError, unknown
from simulator.workload import DTYPES, ROLES

Array = NDArray[Any]

SCHEMA_VERSION = 1

OPERATORS: tuple[str, ...] = (
    "gemm",
    "gemm_2to4",
    "low_rank",
    "gather_gemm",
    "attention_prefill",
    "attention_decode",
    "attention_block_sparse",
    "elementwise",
    "copy",
    "launch_eager",
    "launch_graph",
)
"""Names of what can be timed; the index is the code in the ``operator`` column."""

LAUNCHES: tuple[str, ...] = ("unknown", "excluded", "graph", "eager")
"""What a time says of the launch: ``excluded`` (kernel time of a profiler), ``graph`` (gap inside a replayed graph), ``eager`` (host)."""


PURPOSES: tuple[str, ...] = ("", "fit", "holdout", "exact", "anchor")
"""Why a row was measured; imported rows do not say."""


class Flag(IntFlag):
    """What is wrong with a row that was kept."""

    NOISY = 1  # the interval of the median missed its target within the time limit
    THROTTLED = 2  # the device ran below its clocks, also when repeated
    DRIFT = 4  # the anchor shape had moved by more than its limit
    CONFLICT = 8  # several timings of this shape disagree; the row holds their median


# name -> (type, value of a row that does not say); the shape columns come first, the timing after them
SHAPE: Mapping[str, tuple[type, Any]] = MappingProxyType(
    {
        "operator": (np.int8, 0),
        "role": (np.int16, -1),  # index into workload.ROLES; -1 where the operator has none
        "dtype": (np.int8, DTYPES.index("bf16")),  # activations and arithmetic
        "weight_dtype": (np.int8, DTYPES.index("bf16")),  # second operand: weights, or the K/V cache
        "m": (np.int64, 0),  # GEMM, elementwise: tokens
        "n": (np.int64, 0),  # GEMM: output features; elementwise: features; copy: bytes
        "k": (np.int64, 0),  # GEMM: input features
        "rank": (np.int64, 0),  # low_rank: width between the factors
        "rows": (np.int64, 0),  # gather_gemm: tokens computed
        "batch": (np.int64, 0),  # attention: sequences
        "q_len": (np.int64, 0),  # attention: query positions a sequence
        "kv_len": (np.int64, 0),  # attention: key positions a sequence, the last q_len of them the queries' own
        "heads": (np.int64, 0),
        "kv_heads": (np.int64, 0),
        "head_dim": (np.int64, 0),
        "window": (np.int64, 0),  # attention: sliding window, 0 for none
        "block": (np.int64, 0),  # attention_block_sparse: edge of a block
        "density": (np.float64, 1.0),  # share of the work that is computed
        "read_bytes": (np.float64, 0.0),  # elementwise, copy
        "write_bytes": (np.float64, 0.0),
        "cold": (np.bool_, True),  # weights meant to come from memory, not from a cache
        "copies": (
            np.int32,
            0,
        ),  # distinct weights rotated; 0: enough that none is left in the cache (or not said, when not cold)
    }
)
TIMING: Mapping[str, tuple[type, Any]] = MappingProxyType(
    {
        "seconds": (np.float64, np.nan),  # s, median of the samples (mean where the source gives only that)
        "spread": (np.float64, np.nan),  # half width of the 95 % interval of the median over the median; NaN unknown
        "sample_count": (np.int32, 0),  # raw samples behind the median; 0 unknown
        "launch": (np.int8, 0),  # index into LAUNCHES
        "flags": (np.int32, 0),  # Flag bits
        "purpose": (np.int8, 0),  # index into PURPOSES
        "source": (np.int32, 0),  # index into Records.sources
    }
)
COLUMNS: Mapping[str, tuple[type, Any]] = MappingProxyType({**SHAPE, **TIMING})

_CODES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "operator": OPERATORS,
        "role": ROLES,
        "dtype": DTYPES,
        "weight_dtype": DTYPES,
        "launch": LAUNCHES,
        "purpose": PURPOSES,
    }
)


@dataclass(frozen=True)
class Source:
    """Where rows come from: everything that is the same for many of them.

    Attributes
    ----------
    device : str
        The hardware as it names itself.
    stack : mapping of str to str
        Software with versions: framework, driver, CUDA, threads.
    kernel : str
        The implementation, where the source names it.
    method : str
        How times were taken.
    origin : str
        File, package or run the rows were read from.
    digest : str
        SHA-256 of it, hexadecimal.
    licence : str
        SPDX name of the licence of the data; empty for one's own.
    date : str
        ISO 8601.
    run : str
        Name of the measuring run; equal shapes of one run are one measurement.

    Examples
    --------
    >>> Source("A100", {"torch": "2.9", "CUDA": "13.0"}).software
    'torch 2.9, CUDA 13.0'
    """

    device: str
    stack: Mapping[str, str] = field(default_factory=dict)
    kernel: str = ""
    method: str = ""
    origin: str = ""
    digest: str = ""
    licence: str = ""
    date: str = ""
    run: str = ""

    @property
    def software(self) -> str:
        """The stack on one line."""
        return ", ".join(f"{name} {version}" for name, version in self.stack.items())

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping of the fields that say something."""
        known = {**{f.name: getattr(self, f.name) for f in fields(self)}, "stack": dict(self.stack)}
        return {name: value for name, value in known.items() if value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Source:
        """The inverse of :meth:`as_dict`; unknown names are refused."""
        names = {f.name for f in fields(cls)}
        if extra := sorted(set(data) - names):
            raise InputError(f"source has unknown fields {extra}; expected some of {sorted(names)}")
        for name, value in data.items():
            if (
                name == "stack"
                and isinstance(value, Mapping)
                and all(isinstance(version, str) for version in value.values())
            ):
                continue
            if name == "stack" or not isinstance(value, str):
                right = "names and versions" if name == "stack" else "text"
                raise InputError(f"source: {name}: expected {right}, got {value!r:.60}")
        return cls(**{"device": "", **data})


@dataclass(frozen=True)
class Records:
    """Timings as equal-length columns; see :data:`SHAPE` and :data:`TIMING` for their meaning, type and default.

    Examples
    --------
    >>> r = Records.from_columns([Source("A100")], m=[1, 2], n=8, k=4, seconds=[1e-6, 2e-6])
    >>> len(r), r.select(r.m > 1).seconds.tolist(), r.labels().tolist()
    (2, [2e-06], ['bf16', 'bf16'])
    """

    operator: Array
    role: Array
    dtype: Array
    weight_dtype: Array
    m: Array
    n: Array
    k: Array
    rank: Array
    rows: Array
    batch: Array
    q_len: Array
    kv_len: Array
    heads: Array
    kv_heads: Array
    head_dim: Array
    window: Array
    block: Array
    density: Array
    read_bytes: Array
    write_bytes: Array
    cold: Array
    copies: Array
    seconds: Array
    spread: Array
    sample_count: Array
    launch: Array
    flags: Array
    purpose: Array
    source: Array
    sources: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        size = len(self.operator)
        for name, (kind, _) in COLUMNS.items():
            column: Array = np.asarray(getattr(self, name), dtype=kind)
            if column.shape != (size,):
                raise ValueError(f"records column {name}: expected shape ({size},), got {column.shape}")
            column = column.view()
            column.flags.writeable = False
            object.__setattr__(self, name, column)
        if size and not (self.source.min() >= 0 and self.source.max() < len(self.sources)):
            raise ValueError(
                f"records column source: expected indices into {len(self.sources)} sources, got up to {self.source.max()}"
            )

    def __len__(self) -> int:
        return len(self.operator)

    # -- making -------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_columns(cls, sources: Sequence[Source], size: int | None = None, **columns: Any) -> Records:
        """Columns to a table: scalars broadcast, missing ones take their default, codes may be given as names."""
        if extra := sorted(columns.keys() - COLUMNS.keys()):
            raise ValueError(f"unknown columns {extra}; expected some of {sorted(COLUMNS)}")
        if size is None:
            size = max((np.size(value) for value in columns.values()), default=0)
        full: dict[str, Array] = {}
        for name, (kind, default) in COLUMNS.items():
            value = np.asarray(columns.get(name, columns.get("dtype", default) if name == "weight_dtype" else default))
            if value.dtype.kind in "UOT":
                value = encode(name, value)
            _check_range(name, value, kind)
            full[name] = np.array(np.broadcast_to(value.astype(kind), (size,)))
        return cls(**full, sources=tuple(sources))

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], sources: Sequence[Source]) -> Records:
        """Mappings (as the store keeps them) to a table; names that are no column are refused."""
        rows = list(rows)
        columns = {}
        for name in {name for row in rows for name in row}:
            if name not in COLUMNS:
                raise ValueError(f"unknown column {name!r}; expected some of {sorted(COLUMNS)}")
            missing = COLUMNS[name][1]
            values = [row.get(name, row.get("dtype", missing) if name == "weight_dtype" else missing) for row in rows]
            columns[name] = [_code(name, v) if isinstance(v, str) else v for v in values]
        return cls.from_columns(sources, size=len(rows), **columns)

    @staticmethod
    def concat(parts: Iterable[Records]) -> Records:
        """Rows of several tables one after the other; equal sources are kept once."""
        parts = list(parts)
        sources: list[Source] = []
        columns: dict[str, list[Array]] = {name: [] for name in COLUMNS}
        for part in parts:
            code = np.zeros(max(len(part.sources), 1), dtype=np.int32)
            for index, source in enumerate(part.sources):
                if source not in sources:
                    sources.append(source)
                code[index] = sources.index(source)
            for name in COLUMNS:
                columns[name].append(code[part.source] if name == "source" else getattr(part, name))
        joined = {name: np.concatenate(c) if c else np.zeros(0, COLUMNS[name][0]) for name, c in columns.items()}
        return Records(**joined, sources=tuple(sources))

    def select(self, index: Array) -> Records:
        """Rows chosen by a mask or an index array."""
        return Records(**{name: getattr(self, name)[index] for name in COLUMNS}, sources=self.sources)

    def replace(self, **columns: Any) -> Records:
        """A copy with some columns (scalars broadcast), or the sources, replaced."""
        sources = columns.pop("sources", self.sources)
        new: dict[str, Any] = {
            name: np.broadcast_to(np.asarray(v, COLUMNS[name][0]), (len(self),)) for name, v in columns.items()
        }
        return replace(self, **new, sources=tuple(sources))

    def tidy(self) -> Records:
        """The same rows without the sources that none of them came from."""
        used, source = np.unique(self.source, return_inverse=True)
        return self.replace(source=source.reshape(-1), sources=[self.sources[i] for i in used])

    # -- looking ------------------------------------------------------------------------------------------------------------

    def is_operator(self, *names: str) -> Array:
        """Mask of the rows of these operators."""
        return np.isin(self.operator, [_code("operator", name) for name in names])

    def labels(self) -> Array:
        """Number format of each row as profiles name it: ``bf16``, or ``int8_wo`` for int8 weights under 16-bit activations."""
        names = np.array(DTYPES, dtype=object)
        mixed = self.dtype != self.weight_dtype
        return np.asarray(np.where(mixed, names[self.weight_dtype] + "_wo", names[self.dtype]))

    def of_dtype(self, label: str) -> Records:
        """Rows of one number format, by the names of :meth:`labels`."""
        labels = self.labels()
        if label not in labels:
            raise unknown("dtype", label, np.unique(labels).tolist())
        return self.select(labels == label)

    def shapes(self) -> Array:
        """What was timed, one row a record: float64 (rows, columns of :data:`SHAPE`), equal where the operator and protocol are equal."""
        return np.stack([getattr(self, name).astype(np.float64) for name in SHAPE], axis=1)

    def groups(self, *names: str) -> Array:
        """Number of the group each row belongs to: equal numbers, equal values of these columns (all of :data:`SHAPE` if none is named)."""
        table = np.stack([getattr(self, name).astype(np.float64) for name in names or SHAPE], axis=1)
        if not len(table):
            return np.zeros(0, dtype=np.int64)
        _, inverse = np.unique(table, axis=0, return_inverse=True)
        return np.asarray(inverse, dtype=np.int64).reshape(-1)

    @property
    def clean(self) -> Array:
        """Mask of the rows without a flag and with a time that can be one."""
        return np.asarray((self.flags == 0) & np.isfinite(self.seconds) & (self.seconds > 0))

    def rows_as_dicts(self) -> list[dict[str, Any]]:
        """JSON-ready mappings, defaults left out, codes as names: the inverse of :meth:`from_rows`."""
        out: list[dict[str, Any]] = [{} for _ in range(len(self))]
        for name, (_, default) in COLUMNS.items():
            if name == "source":
                continue
            for row, value in zip(out, getattr(self, name).tolist()):
                if name == "seconds" or not (value == default or value != value):
                    row[name] = _CODES[name][value] if name in _CODES else value
        for row in out:  # a weight format equal to the default may still differ from this row's dtype
            row["dtype"] = row.get("dtype", DTYPES[COLUMNS["dtype"][1]])
            weight = row.pop("weight_dtype", DTYPES[COLUMNS["weight_dtype"][1]])
            if weight != row["dtype"]:
                row["weight_dtype"] = weight
        return out

    def digest(self) -> str:
        """SHA-256 over the columns and sources: equal tables, equal digests."""
        sha = hashlib.sha256(json.dumps([s.as_dict() for s in self.sources], sort_keys=True).encode())
        for name in COLUMNS:
            sha.update(name.encode() + np.ascontiguousarray(getattr(self, name)).tobytes())
        return sha.hexdigest()


assert [f.name for f in fields(Records)][:-1] == list(COLUMNS)  # one list of columns, two places that must agree


def _check_range(name: str, value: Array, kind: type) -> None:
    """Refuse what a cast to the column's type would turn into something else."""
    if value.dtype.kind not in "biuf":
        raise ValueError(f"records column {name}: expected numbers, got {value.dtype}")
    if issubclass(kind, np.integer) and value.size:
        codes = len(_CODES[name]) - 1 if name in _CODES else int(np.iinfo(kind).max)
        low = -1 if name == "role" else 0 if name in _CODES else int(np.iinfo(kind).min)
        if not (low <= value.min() and value.max() <= codes):  # not a number fails it too
            raise ValueError(
                f"records column {name}: expected whole numbers from {low} to {codes}, got {value.min()} to {value.max()}"
            )


def encode(name: str, values: Array) -> Array:
    """Codes of a column given as names.

    >>> encode("dtype", np.array(["bf16", "fp8"])).tolist()
    [3, 4]
    """
    names, inverse = np.unique(np.asarray(values, dtype=object).astype(str), return_inverse=True)
    return np.array([_code(name, str(n)) for n in names], dtype=np.int64)[inverse].reshape(np.shape(values))


def _code(name: str, value: str) -> int:
    """Code of one name in one column."""
    if name not in _CODES:
        raise InputError(f"column {name}: expected a number, got {value!r}")
    if value not in _CODES[name]:
        raise unknown(name, value, _CODES[name])
    return _CODES[name].index(value)
