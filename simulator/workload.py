"""Define a workload, the operators of one forward pass as a frozen table of columns, and batches of
workloads.

A row is one operator shape. Its ``count`` is the number of executions: identical layers share a
row, and counts of dynamic methods can be fractional.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import AMOUNT, SHARE, SIZE, Range
from simulator.arrays import Array, BoolArray, FloatArray, IndexArray, array, truths
from simulator.codes import DTYPES, ROLES, Kernel, Kind, Part, Phase, dtype_code, role_code
from simulator.columns import Table, column
from simulator.errors import InputError
from simulator.operators import BY_CODE, MOST_CODES
from simulator.operators.attention import attention_pairs, entry_pairs
from simulator.operators.base import Formats, Operator, Rows
from simulator.request import NO_REQUEST, Lowered
from simulator.units import percent, size


@lru_cache(maxsize=512)
def _role_table(names: tuple[str, ...]) -> Array:
    """Return whether each role is one of the names; a lookup is faster than a search in short
    tables."""
    table = np.zeros(len(ROLES), dtype=bool)
    table[role_code(*names)] = True
    return table


_ENUMS: Mapping[str, type[IntEnum]] = MappingProxyType(
    {"part": Part, "phase": Phase, "kernel": Kernel}
)
_KINDS = tuple(BY_CODE[code].name if code in BY_CODE else "" for code in range(MOST_CODES))
_IS_ATTENTION = np.array([name in ("prefill_attention", "decode_attention") for name in _KINDS])
_CACHED = np.array([code in BY_CODE and BY_CODE[code].cached for code in range(MOST_CODES)])
_RANGES = {
    "layer": Range(-1.0, 2.0**31 - 1.0, "whole numbers from -1 up", whole=True),
    "density": SHARE,
}


@dataclass(frozen=True, eq=False, repr=False)
class Workload(Table):
    """Operators of a pass as equal-length columns, one row per operator shape.

    :func:`simulator.lower` makes a workload, ``Workload.from_rows`` and ``Workload.from_columns``
    make one of rows or columns. Columns of roles, number formats and other names accept names or
    codes.

    Parameters
    ----------
    kind, role, part, phase : array of int, shape (rows,)
        Codes of the operator (:data:`simulator.operators.OPERATORS`), its role
        (:data:`simulator.codes.ROLES`), part of the decoder and phase.
    layer, layers : array of int, shape (rows,)
        First layer of the row, -1 outside the layers, and number of consecutive layers, 0 outside
        the layers.
    count : array of float, shape (rows,)
        Executions in the pass, over all layers of the row; the expected number for dynamic methods.
    m, n, k : array of int, shape (rows,)
        GEMM: tokens, output features and input features. Experts: tokens, inner width of one
        expert, hidden size. Delta net: tokens of all sequences, features of all values. Attention
        and indexer: ``k`` cached entries that are selected per query (0: all), and ``n`` positions
        per entry of a compressed cache, seen in addition to a window (0: no such cache).
        Elementwise: ``k`` is the known time of a kernel in ns (0: its time follows from its bytes).
    experts, active, skew : array, shape (rows,)
        Routed experts of the device, experts per token on average, and imbalance
        (:func:`simulator.operators.experts.experts_chance`).
    gated : array of bool, shape (rows,)
        Experts: whether an expert has three products (gate, up and down); else it has two.
    stage : array of int, shape (rows,)
        GEMM: 0 for a whole weight, 1 and 2 for the first and second factor of a low-rank pair.
        Attention: attentions before it in its layer.
    batch, q_len, kv_len : array of int, shape (rows,)
        Attention: sequences, query positions and key positions per sequence; queries have the last
        ``q_len`` positions. Delta net: ``batch`` sequences. Collective: ``batch`` devices. Experts:
        ``batch`` devices that share them, or 0. Copied cache: ``kv_len`` positions.
    heads, kv_heads, head_dim, value_dim : array of int, shape (rows,)
        Attention: query heads, key/value heads, features of a query or key head, and features of a
        value head (0: as of a key head). Delta net: value heads, key heads, features of a key head
        and of a value head.
    latent : array of int, shape (rows,)
        Attention: elements per position in the cache of latent attention; else 0. Indexer: elements
        per position in its cache.
    window : array of int, shape (rows,)
        Attention: sliding window in positions, 0 for none. Delta net: positions of its convolution.
    block : array of int, shape (rows,)
        Edge of skipped blocks, or features of skipped groups; 0 without blocks.
    density : array of float, shape (rows,)
        Share of the multiply-adds that are neither zero nor skipped.
    kernel : array of int, shape (rows,)
        Code of the kernel (:class:`simulator.codes.Kernel`).
    dtype, weight_dtype : array of int, shape (rows,)
        Codes (:data:`simulator.codes.DTYPES`) of activations and arithmetic, and of the second
        operand: weights, the K/V cache, or the state of a delta net.
    read_bytes, write_bytes : array of float, shape (rows,)
        Elementwise: bytes read and written per execution. Collective: ``read_bytes`` is the
        payload.
    params : array of float, shape (rows,)
        Parameters of the row, 0 if tied or shared with another row.
    overhead : array of bool, shape (rows,)
        Whether the row exists only because of pruning.
    meta : Lowered
        Request and pruning steps.

    Raises
    ------
    InputError
        If columns have unequal lengths or values out of range.

    Examples
    --------
    >>> import simulator
    >>> w = simulator.Workload.from_rows([{"role": "q", "m": 2, "n": 8, "k": 4, "count": 3}])
    >>> float(w.flops.sum())
    384.0
    """

    kind: Array = column(np.int8, Kind.GEMM)
    role: Array = column(np.int16, 0)
    part: Array = column(np.int8, Part.ATTENTION)
    phase: Array = column(np.int8, Phase.PREFILL)
    layer: Array = column(np.int32, -1)
    layers: Array = column(np.int32, 0)
    count: Array = column(np.float64, 1.0)
    m: Array = column(np.int64, 0)
    n: Array = column(np.int64, 0)
    k: Array = column(np.int64, 0)
    experts: Array = column(np.int64, 0)
    active: Array = column(np.float64, 0.0)
    skew: Array = column(np.float64, 0.0)
    gated: Array = column(np.bool_, True)
    stage: Array = column(np.int8, 0)
    batch: Array = column(np.int64, 0)
    q_len: Array = column(np.int64, 0)
    kv_len: Array = column(np.int64, 0)
    heads: Array = column(np.int64, 0)
    kv_heads: Array = column(np.int64, 0)
    head_dim: Array = column(np.int64, 0)
    value_dim: Array = column(np.int64, 0)
    latent: Array = column(np.int64, 0)
    window: Array = column(np.int64, 0)
    block: Array = column(np.int64, 0)
    density: Array = column(np.float64, 1.0)
    kernel: Array = column(np.int8, Kernel.DENSE)
    dtype: Array = column(np.int8, dtype_code("bf16"))
    weight_dtype: Array = column(np.int8, dtype_code("bf16"))
    read_bytes: Array = column(np.float64, 0.0)
    write_bytes: Array = column(np.float64, 0.0)
    params: Array = column(np.float64, 0.0)
    overhead: Array = column(np.bool_, False)
    meta: Lowered = NO_REQUEST

    CODES = MappingProxyType({"role": ROLES, "dtype": DTYPES, "weight_dtype": DTYPES})

    @classmethod
    def coerced(cls, name: str, values: Any) -> Array:
        """Return ``values`` of the column ``name``; raise InputError for values outside its
        range."""
        given, kind = super().coerced(name, values), cls.SCHEMA[name][0]
        if kind is np.bool_:
            return truths(f"column {name}", given)
        if name in _ENUMS or name in cls.CODES:
            most = len(_ENUMS.get(name, cls.CODES.get(name, ()))) - 1
            return array(
                f"column {name}",
                given,
                Range(0.0, most, f"whole numbers from 0 to {most}", whole=True),
            )
        if name == "kind":
            code = array("column kind", given, SIZE)
            if not np.isin(code, list(BY_CODE)).all():
                known = ", ".join(
                    f"{c} ({operator.name})" for c, operator in sorted(BY_CODE.items())
                )
                raise InputError(f"column kind: expected codes of operators, {known}; got another")
            return code
        right = _RANGES.get(name, SIZE if issubclass(kind, np.integer) else AMOUNT)
        return array(f"column {name}", given, right)

    def _title(self) -> str:
        about, applied = (
            self.meta,
            "".join(f", {a.family} {percent(a.sparsity)}" for a in self.meta.applied),
        )
        request = (
            f"{about.model} {about.phase}, batch {about.batch}, seq {about.seq},"
            f" {about.dtype}{applied}"
        )
        return (
            f"{request}: {len(self)} rows, {self.flops.sum():.3g} FLOP,"
            f" {size(float(self.bytes.sum()))}"
        )

    def _columns(self) -> Mapping[str, Any]:
        """Return columns with names instead of codes, and FLOPs and bytes."""
        held = {
            name: np.array([one.name.lower() for one in of])[getattr(self, name)]
            for name, of in _ENUMS.items()
        }
        return {
            **super()._columns(),
            "kind": np.array(_KINDS)[self.kind],
            **held,
            "flops": self.flops,
            "bytes": self.bytes,
        }

    def is_role(self, *names: str) -> Array:
        """Return a mask of the rows with one of the roles ``names``, of :data:`ROLES`."""
        mask: Array = _role_table(names)[self.role]
        return mask

    @property
    def is_attention(self) -> Array:
        """Mask of prefill and decode attention."""
        mask: Array = _IS_ATTENTION[self.kind]
        return mask

    @property
    def attends(self) -> Array:
        """Mask of operators over all cached positions: attention and indexers."""
        return np.asarray(self.is_attention | (self.kind == Kind.INDEXER))

    @property
    def is_cached(self) -> Array:
        """Mask of operators that keep keys, values or states of each sequence, except those that
        read the cache of an earlier layer."""
        mask: Array = _CACHED[self.kind] & ~self.is_role("shared_attention")
        return mask

    def operators(self) -> Iterator[tuple[Operator, Rows, Formats]]:
        """Yield the rows of each operator and pair of number formats, those of latent attention
        separately."""
        shape = MOST_CODES, len(DTYPES), len(DTYPES), 2
        columns = self.kind, self.dtype, self.weight_dtype, np.minimum(self.value_dim, 1)
        codes = np.ravel_multi_index(columns, shape)
        for code in np.bincount(codes).nonzero()[0].tolist():
            kind, dtype, second, _ = np.unravel_index(code, shape)
            rows = Rows(self, (codes == code).nonzero()[0])
            yield BY_CODE[int(kind)], rows, Formats(DTYPES[dtype], DTYPES[second])

    def each(self, value: Callable[[Operator, Rows], Any]) -> Array:
        """Return ``value`` of each row, for one execution; it is called once per operator and pair
        of formats."""
        out = np.zeros(len(self))
        for operator, rows, _ in self.operators():
            out[rows.at] = value(operator, rows)
        return out

    @property
    def pairs(self) -> Array:
        """Query-key pairs per sequence and head of attention rows, causal, windowed and selected; 0
        for other rows."""
        near = attention_pairs(self.q_len, self.kv_len, self.limit)
        compressed = self._compressed
        if not compressed.any():
            return near
        ratio = np.maximum(self.n, 1).astype(np.float64)
        return near + compressed * entry_pairs(self.q_len, self.kv_len, ratio, self.k)

    @property
    def keys_seen(self) -> Array:
        """Keys that at least one query of an attention row sees; queries select different keys."""
        near = np.where(
            self.window > 0, np.minimum(self.kv_len, self.q_len + self.window - 1), self.kv_len
        )
        if not (selects := self.is_attention & (self.k + self.n > 0)).any():
            return near
        most = np.where(self.k > 0, self.q_len * self.k, self.kv_len)
        entries = np.minimum(self.kv_len // np.maximum(self.n, 1), most)
        seen = np.where(self._compressed, near + entries, np.minimum(near, most))
        return np.where(selects, seen, near)

    @property
    def limit(self) -> Array:
        """Most positions that a query of an attention row sees, by its window or selection; 0:
        all. Entries of a compressed cache are further ones."""
        selected = np.where(self.is_attention & (self.n == 0), self.k, 0)
        least = np.minimum(self.window, selected)
        return np.where(least > 0, least, self.window + selected)

    @property
    def _compressed(self) -> BoolArray:
        """Mask of attention rows with a compressed cache."""
        return self.is_attention & (self.n > 0)

    @property
    def value_features(self) -> Array:
        """Features of a value head of an attention row."""
        return np.where(self.value_dim > 0, self.value_dim, self.head_dim)

    @property
    def weight_bytes_each(self) -> Array:
        """Bytes of weights that one execution reads, compressed if the kernel stores no zeros;
        experts in use only."""
        return self.each(lambda operator, rows: operator.weight_bytes(rows))

    @property
    def flops(self) -> Array:
        """FLOPs of all executions of each row."""
        out: Array = (
            self.each(lambda operator, rows: operator.flops(rows)) * self.density * self.count
        )
        return out

    @property
    def bytes(self) -> Array:
        """Minimum bytes of all executions of each row: operands are read once, results are written
        once."""
        out: Array = self.each(lambda operator, rows: operator.bytes(rows)) * self.count
        return out

    @property
    def repeats(self) -> Array:
        """Executions of each row per layer, at least 1; they share the parameters of the row."""
        each = np.divide(self.count, self.layers, out=np.ones(len(self)), where=self.layers > 0)
        return np.maximum(each, 1.0)

    @property
    def parameters(self) -> float:
        """Parameters of the model that the rows describe."""
        return float((self.params * self.count).sum())

    def expand(self) -> Workload:
        """Return the workload with one row per layer; equal layers share the count of their row."""
        times = np.maximum(self.layers, 1).astype(np.int64)
        index = np.repeat(np.arange(len(self)), times)
        offset = np.arange(len(index)) - np.repeat(np.cumsum(times) - times, times)
        out = self.take(index)
        layer = np.where(out.layers > 0, out.layer + offset, -1)
        share = 1.0 / times[index]
        return out.replace(count=out.count * share, layer=layer, layers=np.minimum(out.layers, 1))


_SIZES = (
    *("m", "n", "k", "batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim", "value_dim"),
    *("latent", "window", "block", "experts", "density", "active", "skew"),
    *("read_bytes", "write_bytes"),
)
"""Columns of 64 bits that determine the time of an operator."""

FEW_ROWS = 200
"""Number of rows below which a search for equal operators takes longer than timing them twice."""

_SEGMENT = np.zeros(len(Part), dtype=np.int64)
_SEGMENT[[Part.ATTENTION, Part.MLP]] = 1
_SEGMENT[Part.HEAD] = 2


def segment_of(w: Workload) -> NDArray[np.int64]:
    """Return the segment of each row: phase x 3 + 0 before the layers, 1 in the layers, 2 after the
    layers."""
    return w.phase.astype(np.int64) * 3 + _SEGMENT[w.part]


@dataclass(frozen=True)
class Groups:
    """Groups of rows with the same segment, kind and role, which share errors and launches."""

    cell: IndexArray  # workload x group of each row
    segment: IndexArray  # per group, see :func:`segment_of`
    kind: IndexArray  # per group
    role: IndexArray  # per group
    count: FloatArray  # executions, workload x group

    @property
    def of_row(self) -> IndexArray:
        return self.cell % len(self.segment)

    def sums(self, column: FloatArray) -> FloatArray:
        """Return sums of a column of the rows, workload x group."""
        return sums(self.cell, column, self.count.shape)


def sums(cell: IndexArray, column: FloatArray, shape: tuple[int, int]) -> FloatArray:
    """Return sums of a column by cell of a table of a shape."""
    out = np.bincount(cell, weights=column, minlength=shape[0] * shape[1])
    return np.asarray(out, dtype=np.float64).reshape(shape)


def model_array(models: Sequence[Any]) -> Array:
    out = np.empty(len(models), dtype=object)
    out[:] = models
    return out


@dataclass(frozen=True)
class WorkloadBatch:
    """Concatenated workloads, dense and pruned, with one phase, formats and engine."""

    rows: Workload  # all workloads one after the other; meta is that of the first workload
    lengths: IndexArray  # rows of each workload, at least 1
    # sequences of each workload with a cache, those that a dynamic method skips included
    sequences: IndexArray
    dense: IndexArray  # index of the dense workload of each workload
    pruning: IndexArray  # index into the requested prunings; -1: dense
    sparsity: FloatArray  # requested
    realised: FloatArray  # after rounding
    # Model of each workload, None for workloads of rows (an array of objects)
    models: Array

    def __post_init__(self) -> None:
        if (
            not len(self.lengths)
            or int(self.lengths.min()) < 1
            or int(self.lengths.sum()) != len(self.rows)
        ):
            expected = f"at least one workload, each of at least 1 row, {len(self.rows)} together"
            raise ValueError(f"lengths: expected {expected}")

    @classmethod
    def of(cls, workloads: Sequence[Workload], **columns: Any) -> WorkloadBatch:
        """Return a batch of workloads, dense unless ``columns`` state otherwise."""
        every = np.arange(len(workloads))
        columns = {
            "dense": every,
            "pruning": 0 * every - 1,
            "sparsity": 0.0 * every,
            "realised": 0.0 * every,
        } | columns
        lengths = np.array([len(w) for w in workloads], dtype=np.intp)
        sequences = np.array([w.meta.batch for w in workloads], dtype=np.intp)
        columns["models"] = model_array([w.meta.config for w in workloads])
        return cls(Workload.concat(workloads), lengths, sequences, **columns)

    @classmethod
    def join(cls, batches: Sequence[WorkloadBatch]) -> WorkloadBatch:
        if len(batches) == 1:
            return batches[0]
        columns = (f.name for f in fields(cls)[1:])
        joined = {name: np.concatenate([getattr(b, name) for b in batches]) for name in columns}
        return cls(Workload.concat([b.rows for b in batches]), **joined)

    def take(self, index: IndexArray) -> WorkloadBatch:
        """Return the workloads ``index``; these include their dense workloads."""
        place = np.full(len(self), -1)
        place[index] = np.arange(len(index))
        rows = np.concatenate([self.rows_of(i) for i in index])
        columns = {f.name: getattr(self, f.name)[index] for f in fields(self)[1:]}
        columns["dense"] = place[columns["dense"]]
        return WorkloadBatch(self.rows.take(rows), **columns)

    def rows_of(self, index: int) -> IndexArray:
        return int(self.starts[index]) + np.arange(int(self.lengths[index]))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> IndexArray:
        """First row of each workload."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def owner(self) -> IndexArray:
        """Workload of each row."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def total(self, column: FloatArray) -> FloatArray:
        """Return the sum of a column of the rows, by workload."""
        return np.add.reduceat(np.asarray(column, dtype=np.float64), self.starts)

    def largest(self, column: Any) -> Any:
        """Return the maximum of a column of the rows, by workload."""
        return np.maximum.reduceat(column, self.starts)

    @cached_property
    def flops(self) -> FloatArray:
        return self.rows.flops

    @cached_property
    def bytes(self) -> FloatArray:
        return self.rows.bytes

    def bound(self, column: FloatArray) -> FloatArray:
        """Return the ratio of sums of a column, dense over pruned, by workload, without overhead
        operators."""
        totals = self.total(np.where(self.rows.overhead, 0.0, column))
        return totals[self.dense] / totals

    @cached_property
    def flop_bound(self) -> FloatArray:
        return self.bound(self.flops)

    @cached_property
    def byte_bound(self) -> FloatArray:
        return self.bound(self.bytes)

    @cached_property
    def groups(self) -> Groups:
        w = self.rows
        code = (segment_of(w) * MOST_CODES + w.kind) * len(ROLES) + w.role
        occurs = np.bincount(code) > 0
        used = np.flatnonzero(occurs)
        cell = self.owner * len(used) + (np.cumsum(occurs) - 1)[code]
        place, role = np.divmod(used, len(ROLES))
        segment, kind = np.divmod(place, MOST_CODES)
        return Groups(cell, segment, kind, role, sums(cell, w.count, (len(self), len(used))))

    @cached_property
    def shapes(self) -> tuple[Workload, IndexArray]:
        """Operators with different times, and the operator of each row; a table of few rows stays
        as it is."""
        w, every = self.rows, np.arange(len(self.rows))
        if len(w) < FEW_ROWS:
            return w, every
        small = np.ravel_multi_index(
            (w.kind, np.where(w.kind == Kind.GEMM, 0, w.role), w.kernel, w.dtype, w.weight_dtype),
            (MOST_CODES, len(ROLES), len(Kernel), len(DTYPES), len(DTYPES)),
        )
        columns = [small, *(getattr(w, name) for name in _SIZES)]
        key = np.zeros(len(w), dtype=np.uint64)
        for values in columns:  # a mixing hash; equal hashes are checked below
            key ^= np.ascontiguousarray(values).view(np.uint64)
            key *= np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        _, first, which = np.unique(key, return_index=True, return_inverse=True)
        which = which.reshape(-1)
        # two operators have one hash
        if any((values[first][which] != values).any() for values in columns):
            return w, every
        return w.take(first), which

    @cached_property
    def distinct(self) -> tuple[tuple[Operator, Rows, Formats], ...]:
        """Operators with different times (:meth:`Workload.operators`)."""
        return tuple(self.shapes[0].operators())
