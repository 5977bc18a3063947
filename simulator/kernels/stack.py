"""Many workloads as one table: rows one after the other, and which workload each belongs to.

Use :meth:`Stack.of` and the functions here to count or sum over hundreds of workloads in a few passes; :mod:`simulator.predict.compare` times them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.workload import DTYPE_BYTES, ROLES, Kernel, Kind, Part, Workload

F = NDArray[np.float64]
Rows = NDArray[np.intp]

_QKV, _WIDE = (
    tuple(ROLES.index(name) for name in names) for names in (("q", "k", "v", "qkv"), ("gate", "up", "gate_up"))
)
_O, _DOWN, _HEAD = (ROLES.index(name) for name in ("o", "down", "lm_head"))


@dataclass(frozen=True)
class Stack:
    """Workloads one after the other.

    Attributes
    ----------
    rows : Workload
        All their rows; its meta is that of the first.
    lengths : intp array, at least 1 each
        Rows of each workload.
    sequences : intp array, optional
        Sequences each workload serves, which all have a cache although a dynamic method may skip some in a step.

    Examples
    --------
    >>> one = Workload.from_rows([{"role": "q", "m": 2, "n": 8, "k": 4}, {"role": "k", "m": 2, "n": 4, "k": 4}])
    >>> Stack.of([one, one.take(np.array([0]))]).total(np.array([1.0, 2.0, 5.0])).tolist()
    [3.0, 5.0]
    """

    rows: Workload
    lengths: Rows
    sequences: Rows | None = None

    def __post_init__(self) -> None:
        if not len(self.lengths) or int(self.lengths.min()) < 1 or int(self.lengths.sum()) != len(self.rows):
            raise ValueError(
                f"lengths: expected at least one workload, each of at least 1 row, {len(self.rows)} together"
            )

    @classmethod
    def of(cls, workloads: Sequence[Workload]) -> Stack:
        """The stack of some workloads."""
        sequences = np.array([w.meta.batch for w in workloads], dtype=np.intp)
        return cls(Workload.concat(workloads), np.array([len(w) for w in workloads], dtype=np.intp), sequences)

    @classmethod
    def join(cls, stacks: Sequence[Stack]) -> Stack:
        """One stack of several."""
        if len(stacks) == 1:
            return stacks[0]
        known = [s.sequences for s in stacks if s.sequences is not None]
        sequences = np.concatenate(known) if len(known) == len(stacks) else None
        return cls(Workload.concat([s.rows for s in stacks]), np.concatenate([s.lengths for s in stacks]), sequences)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> Rows:
        """First row of each workload."""
        return np.asarray(np.cumsum(self.lengths) - self.lengths)

    @cached_property
    def owner(self) -> Rows:
        """Workload of each row."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def total(self, column: F) -> F:
        """Sum of a column of the rows, by workload."""
        out: F = np.add.reduceat(np.asarray(column, dtype=np.float64), self.starts)
        return out

    def largest(self, column: Any) -> Any:
        """Maximum of a column of the rows, by workload."""
        return np.maximum.reduceat(column, self.starts)


# -- memory -----------------------------------------------------------------------------------------------------------------------


def weights_bytes(stack: Stack) -> F:
    """Bytes of the parameters of each workload on the device that holds most; see :mod:`simulator.memory`."""
    w = stack.rows
    element = DTYPE_BYTES[w.weight_dtype]
    gemm = w.kind == Kind.GEMM
    positions = np.where(gemm & (w.kernel == Kernel.UNSTRUCTURED), np.maximum(w.params, w.n * w.k * 1.0), w.params)
    each = positions * element
    compressed = gemm & (w.kernel == Kernel.SPARSE24)
    if compressed.any():
        # by the value kept, so that rows which run only sometimes, and own more than one weight for it, keep all of them
        values = np.maximum(w.n * w.k * w.density, 1.0)
        beyond = w.params - values
        bias = np.where((beyond > 0) & (beyond <= w.n), beyond, 0.0)
        each = np.where(compressed, (w.params - bias) * w.weight_bytes_each / values + bias * element, each)
    stored = np.where(w.params > 0, each * w.count, 0.0)
    if w.meta.parallel != "pipeline":
        return stack.total(stored)
    inside, head = w.layers > 0, (w.part == Part.HEAD) & (w.layers <= 0)
    tied = np.where(gemm & head & (w.params == 0), w.weight_bytes_each, 0.0)  # the last stage has its own copy
    first = stack.total(np.where(~inside & ~head, stored, 0.0))
    last = stack.total(np.where(head, stored, 0.0)) + np.maximum(stack.largest(tied), 0.0)
    out: F = stack.total(np.where(inside, stored, 0.0)) * stage_share(stack) + np.maximum(first, last)
    return out


def cache_bytes(stack: Stack) -> F:
    """Bytes of keys and values at the longest length each layer reaches, of each workload, on the device that holds most."""
    w = stack.rows
    at = np.flatnonzero((w.kind == Kind.PREFILL_ATTENTION) | (w.kind == Kind.DECODE_ATTENTION))
    if not len(at):
        return np.zeros(len(stack))
    kv, window = w.kv_len[at], w.window[at]
    seen = np.where(window > 0, np.minimum(kv, window), kv)
    batch = w.batch[at] if stack.sequences is None else np.maximum(w.batch[at], stack.sequences[stack.owner[at]])
    each = 2.0 * batch * w.kv_heads[at] * w.head_dim[at] * seen * DTYPE_BYTES[w.weight_dtype[at]]
    start, size = np.maximum(w.layer[at], 0).astype(np.int64), np.maximum(w.layers[at], 1).astype(np.int64)
    span = int((start + size).max()) + 1
    run = (stack.owner[at] * span + start) * span + size
    run, group = np.unique(
        run, return_inverse=True
    )  # decodes of a generate have one row a length, of which the longest counts
    most = np.zeros(len(run))
    np.maximum.at(most, group.reshape(-1), each)
    size = run % span
    layer = (
        np.repeat(run // span, size) + np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
    )  # owner * span + layer
    layers = np.zeros(len(stack) * span)
    np.maximum.at(layers, layer, np.repeat(most, size))
    out: F = layers.reshape(len(stack), span).sum(axis=1)
    return out * stage_share(stack) if w.meta.parallel == "pipeline" else out


def activation_bytes(stack: Stack) -> F:
    """Peak bytes of activations in one forward pass of each workload; for rows of several widths, the widest."""
    w, size = stack.rows, len(stack)
    gemm = w.kind == Kind.GEMM
    element = np.maximum(stack.largest(np.where(gemm, 2.0, DTYPE_BYTES[w.dtype])), 2.0)
    tokens = w.m.astype(np.float64)
    cell = stack.owner * len(ROLES) + w.role

    def widest(width: Any, stage: int) -> F:
        """The largest tensor of every workload and role, those inside a low-rank pair left out."""
        usable = np.flatnonzero(gemm & (w.stage != stage))
        most = np.zeros(size * len(ROLES))
        np.maximum.at(most, cell[usable], tokens[usable] * width[usable])
        return most.reshape(size, len(ROLES))

    outer, inner = widest(w.n, 1), widest(w.k, 2)
    table = np.maximum(
        stack.largest(np.where(w.is_role("embedding"), tokens * w.n, 0.0)), 0.0
    )  # all tokens, where a layer computes some
    stream = np.maximum(table, inner[:, _QKV + _WIDE].max(axis=1))
    attention = outer[:, _QKV].sum(axis=1) + inner[:, _O]
    mlp = outer[:, _WIDE].sum(axis=1) + inner[:, _DOWN]
    gathered = np.maximum(stack.largest(np.where(w.is_role("all_gather"), w.read_bytes, 0.0)), 0.0)
    out: F = (2.0 * stream + np.maximum(np.maximum(attention, mlp), outer[:, _HEAD])) * element + gathered
    return out


def stage_share(stack: Stack) -> F:
    """Share of the layers on the fullest stage of a pipeline, of each workload; 1 without one."""
    w = stack.rows
    layers = np.maximum(stack.largest(np.where(w.layers > 0, w.layer + w.layers, 0)), 0).astype(np.float64)
    share: F = np.where(layers > 0, np.ceil(layers / w.meta.devices) / np.maximum(layers, 1.0), 1.0)
    return share
