"""Measured times as a table: one row a timing, columns of equal length, and the sources the rows came from.

Make a table with :meth:`Records.from_columns` (arrays) or :meth:`Records.from_rows` (mappings), cut and join it with
:meth:`Records.select` and :meth:`Records.concat`. What holds for many rows alike (device, software, method) is a
:class:`Source`, kept once; the ``source`` column says which. ``parquet`` and ``store`` read and write files, ``lines``
says what the lines of a store mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import IntFlag
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from calibration.devices.protocol import OPERATORS as KINDS
from simulator.arrays import Array
from simulator.columns import Table, column
from simulator.errors import InputError, unknown
from simulator.workload import DTYPES, ROLES

T = TypeVar("T", bound="Records")

SCHEMA_VERSION = 1

_MLA = {name.replace("attention", "mla"): (*KINDS[name], "n") for name in ("attention_prefill", "attention_decode")}
_NOT_ASKED = {"collective": ("n", "batch"), "experts": ("m", "n", "k", "experts"), **_MLA}
NEEDED: Mapping[str, tuple[str, ...]] = {**KINDS, **_NOT_ASKED}
"""Dimensions that each operator must have. No device is asked for a collective (its kind is its role), for the experts
of a layer, or for latent attention (``mla_``: of a prompt with keys and values of their own, of a decode with the
latent as both): such rows are read."""
_LAST = ("layer_eager", "experts", *_MLA, "grouped_gemm")
OPERATORS: tuple[str, ...] = (*(name for name in NEEDED if name not in _LAST), *_LAST)
"""Names of what can be timed; the index is the code in the ``operator`` column, also in files: new ones come last."""
# what a time says of the launch: kernel time of a profiler, gap inside a replayed graph, host time
LAUNCHES: tuple[str, ...] = ("unknown", "excluded", "graph", "eager")
PURPOSES: tuple[str, ...] = ("", "fit", "holdout", "exact", "anchor")  # why a row was measured; imports do not say


class Flag(IntFlag):
    """What is wrong with a row that was kept."""

    NOISY = 1  # the interval of the median missed its target within the time limit
    THROTTLED = 2  # the device ran below its clocks, also when repeated
    DRIFT = 4  # the anchor shape had moved by more than its limit
    CONFLICT = 8  # several timings of this shape disagree; the row holds their median


@dataclass(frozen=True)
class Source:
    """Where rows come from: everything that is the same for many of them."""

    device: str  # the hardware as it names itself
    stack: Mapping[str, str] = field(default_factory=dict)  # software with versions: framework, driver, CUDA, threads
    kernel: str = ""  # the implementation, where the source names it
    method: str = ""  # how times were taken
    origin: str = ""  # file, package or run the rows were read from
    digest: str = ""  # SHA-256 of it, hexadecimal
    licence: str = ""  # SPDX name of the licence of the data; empty for one's own
    date: str = ""  # ISO 8601
    run: str = ""  # name of the measuring run; equal shapes of one run are one measurement

    @property
    def software(self) -> str:
        """The stack on one line: ``torch 2.9, CUDA 13.0``."""
        return ", ".join(f"{name} {version}" for name, version in self.stack.items())

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping of the fields that say something."""
        return {name: value for name, value in {**vars(self), "stack": dict(self.stack)}.items() if value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Source:
        """The inverse of :meth:`as_dict`; unknown names are refused."""
        names = {f.name for f in fields(cls)}
        if extra := sorted(set(data) - names):
            raise InputError(f"source has unknown fields {extra}; expected some of {sorted(names)}")
        for name, value in data.items():
            texts = value.values() if name == "stack" and isinstance(value, Mapping) else [value]
            if not all(isinstance(text, str) for text in texts) or (name == "stack" and isinstance(value, str)):
                right = "names and versions" if name == "stack" else "text"
                raise InputError(f"source: {name}: expected {right}, got {value!r:.60}")
        return cls(**{"device": "", **data})


@dataclass(frozen=True, eq=False, repr=False)
class Records(Table):
    """Timings as equal-length columns. Up to ``copies`` they say what was timed, then what came of it.

    >>> r = Records.from_columns([Source("A100")], m=[1, 2], n=8, k=4, seconds=[1e-6, 2e-6])
    >>> len(r), r.select(r.m > 1).seconds.tolist(), r.labels().tolist()
    (2, [2e-06], ['bf16', 'bf16'])
    """

    # fmt: off
    operator: Array = column(np.int8, 0)
    role: Array = column(np.int16, -1)  # index into workload.ROLES; -1 where the operator has none
    dtype: Array = column(np.int8, DTYPES.index("bf16"))  # activations and arithmetic
    weight_dtype: Array = column(np.int8, DTYPES.index("bf16"))  # weights, or the K/V cache; as dtype if not given
    m: Array = column(np.int64, 0)  # GEMM, elementwise, experts: tokens
    # GEMM: output features; elementwise: features; copy, collective: bytes; experts: width of one; mla: of a value
    n: Array = column(np.int64, 0)
    k: Array = column(np.int64, 0)  # GEMM: input features; experts: hidden size
    rank: Array = column(np.int64, 0)  # low_rank: width between the factors
    rows: Array = column(np.int64, 0)  # gather_gemm: tokens computed
    batch: Array = column(np.int64, 0)  # attention: sequences; collective: devices
    q_len: Array = column(np.int64, 0)  # attention: query positions a sequence
    kv_len: Array = column(np.int64, 0)  # attention: key positions a sequence, the last q_len of them the queries' own
    heads: Array = column(np.int64, 0)
    kv_heads: Array = column(np.int64, 0)
    head_dim: Array = column(np.int64, 0)
    window: Array = column(np.int64, 0)  # attention: sliding window, 0 for none
    block: Array = column(np.int64, 0)  # attention_block_sparse: edge of a block
    density: Array = column(np.float64, 1.0)  # share of the work that is computed
    read_bytes: Array = column(np.float64, 0.0)  # elementwise, copy
    write_bytes: Array = column(np.float64, 0.0)
    cold: Array = column(np.bool_, True)  # weights meant to come from memory, not from a cache
    copies: Array = column(np.int32, 0)  # distinct weights rotated; 0: none stays in the cache (not said, if not cold)
    experts: Array = column(np.int64, 0)  # experts: those a device holds
    active: Array = column(np.float64, 0.0)  # experts: of those, used by a token on average
    skew: Array = column(np.float64, 0.0)  # experts: power of the law their tokens are dealt out by; 0: in turn
    fused: Array = column(np.bool_, False)  # gather_gemm, grouped_gemm: one kernel, not a gather, a GEMM and a scatter
    seconds: Array = column(np.float64, np.nan)  # s, median of the samples (mean where the source gives only that)
    spread: Array = column(np.float64, np.nan)  # half width of the median's 95 % interval over it; NaN unknown
    sample_count: Array = column(np.int32, 0)  # raw samples behind the median; 0 unknown
    launch: Array = column(np.int8, 0)  # index into LAUNCHES
    flags: Array = column(np.int32, 0)  # Flag bits
    purpose: Array = column(np.int8, 0)  # index into PURPOSES
    source: Array = column(np.int32, 0)  # index into sources
    sources: tuple[Source, ...] = ()
    # fmt: on

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
            raise ValueError(f"records column source: expected indices into {known} sources, got up to {most}")

    @classmethod
    def coerced(cls, name: str, values: Any) -> Array:
        """Codes of names; numbers refused where the cast to the column's type would turn them into something else."""
        given = super().coerced(name, values)
        if given.dtype.kind not in "biuf":
            raise ValueError(f"records column {name}: expected numbers, got {given.dtype}")
        kind = cls.SCHEMA[name][0]
        if issubclass(kind, np.integer) and given.size:
            most = len(cls.CODES[name]) - 1 if name in cls.CODES else int(np.iinfo(kind).max)
            least = -1 if name == "role" else 0 if name in cls.CODES else int(np.iinfo(kind).min)
            low, high = given.min(), given.max()
            if not (least <= low and high <= most):  # not a number fails it too
                right = f"expected whole numbers from {least} to {most}"
                raise ValueError(f"records column {name}: {right}, got {low} to {high}")
        return given

    @classmethod
    def from_columns(cls: type[T], *sources: Any, size: int | None = None, **columns: Any) -> T:
        """Columns to a table: scalars broadcast, missing ones take their default, codes may be given as names."""
        if "dtype" in columns:
            columns.setdefault("weight_dtype", columns["dtype"])
        return super().from_columns(*sources, size=size, **columns)

    @classmethod
    def from_rows(cls: type[T], rows: Iterable[Mapping[str, Any]], *sources: Any) -> T:
        """Mappings to a table; names that are no column are refused."""
        full = ({"weight_dtype": row["dtype"], **row} if "dtype" in row else row for row in rows)
        return super().from_rows(full, *sources)

    @classmethod
    def concat(cls: type[T], parts: Iterable[T], **others: Any) -> T:
        """Rows of several tables one after the other; equal sources are kept once."""
        sources: list[Source] = []
        recoded = [cls.from_columns([])]  # so that no tables give an empty one
        for part in parts:
            for source in part.sources:
                if source not in sources:
                    sources.append(source)
            codes = np.array([sources.index(source) for source in part.sources], dtype=np.int32)
            recoded.append(part.replace(source=codes[part.source]))
        return super().concat(recoded, **{"sources": tuple(sources), **others})

    select = Table.take

    def tidy(self) -> Records:
        """The same rows without the sources that none of them came from."""
        used, source = np.unique(self.source, return_inverse=True)
        return self.replace(source=source.reshape(-1), sources=tuple(self.sources[i] for i in used))

    def is_operator(self, *names: str) -> Array:
        """Mask of the rows of these operators."""
        return np.isin(self.operator, self.coerced("operator", names))

    @property
    def timed(self) -> Array:
        """Mask of the rows with a time that can be one."""
        return np.asarray(np.isfinite(self.seconds) & (self.seconds > 0))

    def labels(self) -> Array:
        """Number format of each row as profiles name it: ``int8_wo`` has int8 weights alone."""
        names = np.array(DTYPES, dtype=object)
        mixed, suffix = self.dtype != self.weight_dtype, np.where(names == "fp8_block", "", "_wo").astype(object)
        return np.asarray(np.where(mixed, (names + suffix)[self.weight_dtype], names[self.dtype]))

    def of_dtype(self, label: str) -> Records:
        """Rows of one number format, by the names of :meth:`labels`."""
        labels = self.labels()
        if label not in labels:
            raise unknown("dtype", label, np.unique(labels).tolist())
        return self.select(labels == label)

    def groups(self, *names: str) -> Array:
        """Number of each row's group, equal where these columns are (what was timed, if none is named)."""
        table = np.stack([getattr(self, name).astype(np.float64) for name in names or SHAPE], axis=1)
        if not len(table):
            return np.zeros(0, dtype=np.int64)
        _, inverse = np.unique(table, axis=0, return_inverse=True)
        return np.asarray(inverse, dtype=np.int64).reshape(-1)

    def digest(self) -> str:
        """SHA-256 over the columns and sources: equal tables, equal digests."""
        sha = hashlib.sha256(json.dumps([s.as_dict() for s in self.sources], sort_keys=True).encode())
        for name in self.SCHEMA:
            if name not in LATER or getattr(self, name).any():
                sha.update(name.encode() + np.ascontiguousarray(getattr(self, name)).tobytes())
        return sha.hexdigest()


LATER = ("experts", "active", "skew", "fused")
"""Columns that a table where they say nothing is written, and has its digest, without: as before there were any."""

SHAPE: tuple[str, ...] = tuple(Records.SCHEMA)[: list(Records.SCHEMA).index("seconds")]
"""Columns that say what was timed and how: equal where two rows are timings of one thing."""

COUNTS: tuple[str, ...] = tuple(name for name in SHAPE if Records.SCHEMA[name][0] is np.int64)
"""Those of them that are dimensions: whole numbers."""
