"""Concatenate many workloads in one table, and compute their sums.

Use :meth:`WorkloadBatch.of` to count, sum or time hundreds of workloads in a few passes;
:mod:`simulator.capacity` computes their memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import FloatArray, IndexArray
from simulator.workload import DTYPES, ROLES, Kind, Part, Workload

if TYPE_CHECKING:
    pass


FEW_ROWS = 200
"""Number of rows below which a search for equal operators costs more than timing them twice."""

_SEGMENT = np.zeros(len(Part), dtype=np.int64)
_SEGMENT[[Part.ATTENTION, Part.MLP]] = 1
_SEGMENT[Part.HEAD] = 2


def segment_of(w: Workload) -> NDArray[np.int64]:
    """Return the segment of each row: phase x 3 + 0 before the layers, 1 in the layers, 2 after the layers."""
    return np.asarray(w.phase.astype(np.int64) * 3 + _SEGMENT[w.part])


@dataclass(frozen=True)
class Groups:
    """Groups of rows of each workload with the same segment, kind and role, which share errors and launches."""

    cell: IndexArray  # of each row: workload x group
    segment: IndexArray  # (:func:`segment_of`) of each group, as the next two
    kind: IndexArray
    role: IndexArray
    count: FloatArray  # workload x group: executions

    @property
    def of_row(self) -> IndexArray:
        """Group of each row."""
        return self.cell % len(self.segment)

    def sums(self, column: FloatArray) -> FloatArray:
        """Return the sums of a column of the rows, workload x group."""
        return sums(self.cell, column, self.count.shape)


def sums(cell: IndexArray, column: FloatArray, shape: tuple[int, int]) -> FloatArray:
    """Return the sums of a column by cell of a table."""
    out = np.bincount(cell, weights=column, minlength=shape[0] * shape[1])
    return np.asarray(out, dtype=np.float64).reshape(shape)


@dataclass(frozen=True)
class WorkloadBatch:
    """Concatenated workloads, dense and pruned, with one phase, formats and engine.

    >>> one = Workload.from_rows([{"role": "q", "m": 2, "n": 8, "k": 4}, {"role": "k", "m": 2, "n": 4, "k": 4}])
    >>> WorkloadBatch.of([one, one.take(np.array([0]))]).total(np.array([1.0, 2.0, 5.0])).tolist()
    [3.0, 5.0]
    """

    rows: Workload  # rows of all workloads; its meta is that of the first workload
    lengths: IndexArray  # rows of each workload, at least 1
    sequences: IndexArray  # of each workload, all with a cache; a dynamic method may skip some in a step
    dense: IndexArray  # index of the dense workload of each; a dense workload has itself
    pruning: IndexArray  # index into the requested prunings; -1: dense
    sparsity: FloatArray  # requested
    realised: FloatArray  # after rounding

    def __post_init__(self) -> None:
        if not len(self.lengths) or int(self.lengths.min()) < 1 or int(self.lengths.sum()) != len(self.rows):
            expected = f"at least one workload, each of at least 1 row, {len(self.rows)} together"
            raise ValueError(f"lengths: expected {expected}")

    @classmethod
    def of(cls, workloads: Sequence[Workload]) -> WorkloadBatch:
        """Return a batch of workloads, all as dense ones."""
        many = len(workloads)
        return cls(
            rows=Workload.concat(workloads),
            lengths=np.array([len(w) for w in workloads], dtype=np.intp),
            sequences=np.array([w.meta.batch for w in workloads], dtype=np.intp),
            dense=np.arange(many),
            pruning=np.full(many, -1),
            sparsity=np.zeros(many),
            realised=np.zeros(many),
        )

    @classmethod
    def join(cls, batches: Sequence[WorkloadBatch]) -> WorkloadBatch:
        """Concatenate batches."""
        if len(batches) == 1:
            return batches[0]
        return cls(
            rows=Workload.concat([b.rows for b in batches]),
            lengths=np.concatenate([b.lengths for b in batches]),
            sequences=np.concatenate([b.sequences for b in batches]),
            dense=np.concatenate([b.dense for b in batches]),
            pruning=np.concatenate([b.pruning for b in batches]),
            sparsity=np.concatenate([b.sparsity for b in batches]),
            realised=np.concatenate([b.realised for b in batches]),
        )

    def take(self, index: IndexArray) -> WorkloadBatch:
        """Return the workloads ``index``, which includes their dense workloads."""
        lengths, place = self.lengths[index], np.full(len(self), -1)
        place[index] = np.arange(len(index))
        first = np.repeat(self.starts[index] - (np.cumsum(lengths) - lengths), lengths)
        return WorkloadBatch(
            rows=self.rows.take(first + np.arange(int(lengths.sum()))),
            lengths=lengths,
            sequences=self.sequences[index],
            dense=place[self.dense[index]],
            pruning=self.pruning[index],
            sparsity=self.sparsity[index],
            realised=self.realised[index],
        )

    def rows_of(self, index: int) -> IndexArray:
        """Return the indices of the rows of one workload."""
        return int(self.starts[index]) + np.arange(int(self.lengths[index]))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> IndexArray:
        """First row of each workload."""
        return np.asarray(np.cumsum(self.lengths) - self.lengths)

    @cached_property
    def owner(self) -> IndexArray:
        """Workload of each row."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def total(self, column: FloatArray) -> FloatArray:
        """Return the sum of a column of the rows, by workload."""
        return np.asarray(np.add.reduceat(np.asarray(column, dtype=np.float64), self.starts))

    def largest(self, column: Any) -> Any:
        """Return the maximum of a column of the rows, by workload."""
        return np.maximum.reduceat(column, self.starts)

    @cached_property
    def flops(self) -> FloatArray:
        """FLOPs of all executions of each row."""
        return self.rows.flops

    @cached_property
    def bytes(self) -> FloatArray:
        """Minimum bytes of all executions of each row."""
        return self.rows.bytes

    def bound(self, column: FloatArray) -> FloatArray:
        """Return the ratio of sums of a column, dense to pruned, by workload, without overhead operators."""
        totals = self.total(np.where(self.rows.overhead, 0.0, column))
        return np.asarray(totals[self.dense] / totals)

    @cached_property
    def flop_bound(self) -> FloatArray:
        """Ratio of FLOPs, dense to pruned, of each workload."""
        return self.bound(self.flops)

    @cached_property
    def byte_bound(self) -> FloatArray:
        """Ratio of bytes, dense to pruned, of each workload."""
        return self.bound(self.bytes)

    @cached_property
    def kinds(self) -> tuple[tuple[int, NDArray[np.bool_]], ...]:
        """First row of each kind of operator (latent attention is separate), and the workloads that have the kind
        themselves or in their dense workload."""
        code, out = self.rows.kind.astype(np.int64) * 2 + (self.rows.value_dim > 0), []
        for kind in np.flatnonzero(np.bincount(code)).tolist():
            rows = np.flatnonzero(code == kind)
            has = np.bincount(self.owner[rows], minlength=len(self)) > 0
            out.append((int(rows[0]), has | has[self.dense]))
        return tuple(out)

    @cached_property
    def groups(self) -> Groups:
        """Groups of the rows."""
        w = self.rows
        code = (segment_of(w) * len(Kind) + w.kind) * len(ROLES) + w.role
        occurs = np.bincount(code) > 0
        used = np.flatnonzero(occurs)
        cell = self.owner * len(used) + (np.cumsum(occurs) - 1)[code]
        place, role = np.divmod(used, len(ROLES))
        segment, kind = np.divmod(place, len(Kind))
        return Groups(cell, segment, kind, role, sums(cell, w.count, (len(self), len(used))))

    @cached_property
    def shapes(self) -> tuple[Workload, IndexArray]:
        """Operators with different times, and the operator of each row; a table of few rows is returned unchanged."""
        w, every = self.rows, np.arange(len(self.rows))
        if len(w) < FEW_ROWS:
            return w, every
        small = w.kind.astype(np.int64)
        role = np.where(w.kind == Kind.GEMM, 0, w.role)
        for column, many in ((role, len(ROLES)), (w.kernel, 8), (w.dtype, len(DTYPES)), (w.weight_dtype, len(DTYPES))):
            small = small * many + column
        columns = [small, w.m, w.n, w.k, w.batch, w.q_len, w.kv_len, w.heads, w.kv_heads, w.head_dim, w.window, w.block]
        columns += [w.experts, w.value_dim, w.latent]
        columns += [c.view(np.int64) for c in (w.density, w.active, w.skew, w.read_bytes, w.write_bytes)]
        key = np.zeros(len(w), dtype=np.uint64)
        for column in columns:  # a mixing hash; equal hashes are checked below
            key ^= np.ascontiguousarray(column).view(np.uint64)
            key *= np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        _, first, which = np.unique(key, return_index=True, return_inverse=True)
        which = which.reshape(-1)
        if any((column[first][which] != column).any() for column in columns):  # two operators have one hash
            return w, every
        return w.take(first), which
