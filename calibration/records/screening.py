"""Which imported rows can be trusted: reasons counted, physics checked, repeated shapes joined.

Nothing is dropped in silence: a :class:`Screen` remembers for each row of a file why it was refused, and :class:`Refusals` is the count.
:func:`least_seconds` is what no device can beat, caches included; :func:`join_repeats` takes the median of repeated shapes and flags those
that disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from calibration.records.records import COLUMNS, Flag, Records
from simulator.errors import InputError
from simulator.workload import DTYPE_BYTES, DTYPES, attention_pairs

Array = NDArray[Any]

DISAGREE = 1.10  # largest over smallest time of one shape above which its rows are said to disagree
ROUNDING = 1.02  # datasheet rates are printed to three digits and clocks to the megahertz
L2_BYTES_PER_CLOCK = 64.0
"""Bytes an SM can at most take from L2 in a clock (an A100 delivers 5120 to 108 SMs: NVIDIA, "A100 Tensor Core GPU Architecture")."""


@dataclass(frozen=True)
class Refusals(Mapping[str, int]):
    """How many rows were refused for which reason, and the first of them.

    Attributes
    ----------
    counts : mapping of str to int
        Reason to number of rows.
    first : mapping of str to tuple of int
        Reason to the numbers of the first rows (1 is the first row of data).

    Examples
    --------
    >>> print(*Refusals({"time is zero": 2}, {"time is zero": (3, 9)}).lines())
    2 rows: time is zero (rows 3, 9)
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    first: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __getitem__(self, reason: str) -> int:
        return self.counts[reason]

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> int:
        """Rows refused for any reason."""
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """One line of text a reason."""
        out = []
        for reason, count in self.counts.items():
            rows = ", ".join(str(r) for r in self.first.get(reason, ()))
            more = ", ..." if count > len(self.first.get(reason, ())) else ""
            out.append(f"{count} row{'s' * (count > 1)}: {reason} (row{'s' * (count > 1)} {rows}{more})")
        return out


class Screen:
    """Rows of a file under inspection; a row is refused once, for the first reason found.

    Examples
    --------
    >>> screen = Screen(3)
    >>> screen.refuse(np.array([True, False, False]), "m is negative")
    >>> screen.kept.tolist(), dict(screen.refusals())
    ([False, True, True], {'m is negative': 1})
    """

    def __init__(self, size: int) -> None:
        self.kept: Array = np.ones(size, dtype=np.bool_)
        self._rows: dict[str, Array] = {}

    def refuse(self, bad: Array, reason: str) -> None:
        """Refuse the rows of a mask over all rows, except those refused before."""
        bad = np.broadcast_to(bad, self.kept.shape) & self.kept
        if bad.any():
            self.kept = self.kept & ~bad
            self._rows[reason] = np.concatenate(
                [self._rows.get(reason, np.zeros(0, np.int64)), np.flatnonzero(bad) + 1]
            )

    def refuse_kept(self, bad: Array, reason: str) -> None:
        """Refuse by a mask over the rows still kept."""
        full = np.zeros_like(self.kept)
        full[np.flatnonzero(self.kept)[bad]] = True
        self.refuse(full, reason)

    def refusals(self, first: int = 3) -> Refusals:
        """The count so far."""
        return Refusals(
            {r: len(n) for r, n in self._rows.items()},
            {r: tuple(np.sort(n)[:first].tolist()) for r, n in self._rows.items()},
        )


class _Rate(Protocol):
    @property
    def flop_per_s(self) -> float: ...
    @property
    def sparse_factor(self) -> float: ...


class DeviceFacts(Protocol):
    """What the checks need of a ``simulator.HardwareProfile``."""

    @property
    def sm_count(self) -> int: ...
    @property
    def max_clock_hz(self) -> float: ...
    @property
    def clock_headroom(self) -> float: ...
    @property
    def bandwidth_bytes_per_s(self) -> float: ...
    @property
    def l2_bytes(self) -> float: ...
    def rate(self, dtype: str) -> _Rate: ...


def rotated_copies(weight_bytes: Array, l2_bytes: float, most: int = 6) -> Array:
    """Distinct weights the aiconfigurator collector rotates: enough to fill the L2 once, at most six.

    Parameters
    ----------
    weight_bytes : array, bytes
        Size of one weight matrix, above 0.
    l2_bytes : float, bytes
        L2 of the device.
    most : int
        Upper limit.

    Returns
    -------
    int32 array

    Examples
    --------
    >>> rotated_copies(np.array([1e6, 20e6, 200e6]), 50e6).tolist()
    [6, 3, 1]
    """
    return np.clip(np.ceil(l2_bytes / np.asarray(weight_bytes, dtype=np.float64)), 1, most).astype(np.int32)


def work(records: Records) -> tuple[Array, Array, Array]:
    """FLOPs, weight (or cache) bytes and activation bytes of one execution of each row.

    Returns
    -------
    flops, weight_bytes, other_bytes : float64 arrays
        Causal attention counts what lies under its mask and window; 2:4 counts the half that is computed.
    """
    act, weight = DTYPE_BYTES[records.dtype], DTYPE_BYTES[records.weight_dtype]
    m, n, k, rank = (getattr(records, c).astype(np.float64) for c in ("m", "n", "k", "rank"))
    rows = np.where(records.is_operator("gather_gemm"), records.rows, m)
    sparse, thin = records.is_operator("gemm_2to4"), records.is_operator("low_rank")
    gemm = records.is_operator("gemm", "gemm_2to4", "gather_gemm")
    attention = records.is_operator("attention_prefill", "attention_decode", "attention_block_sparse")
    pairs = attention_pairs(records.q_len, records.kv_len, records.window) * records.density
    heads = records.batch * records.heads * records.head_dim.astype(np.float64)
    kept = np.where(sparse, 0.5, 1.0)
    flops = np.select(
        [gemm, thin, attention], [2 * rows * n * k * kept, 2 * m * rank * (n + k), 4 * heads * pairs], 0.0
    )
    seen = (
        np.where(records.window > 0, np.minimum(records.kv_len, records.q_len + records.window - 1), records.kv_len)
        * records.density
    )
    cache = 2 * records.batch * records.kv_heads * records.head_dim * seen * weight
    weights = np.select([gemm, thin, attention], [n * k * weight * kept, rank * (n + k) * weight, cache], 0.0)
    moved = records.read_bytes + records.write_bytes
    others = np.select([gemm | thin, attention], [rows * (n + k) * act, 2 * heads * records.q_len * act], moved)
    return flops, weights, others


def least_seconds(records: Records, hw: DeviceFacts) -> tuple[Array, Array]:
    """Times no run can beat: FLOPs at the highest clock, and bytes with everything in L2 that can have been there.

    Of the bytes one execution touches, at most the size of the L2 can have been in it before; of ``c`` rotated weights together at most
    as much, hence ``L2/c`` each. The rest comes at the memory's datasheet bandwidth, and all of it through the L2.

    Parameters
    ----------
    records : Records
    hw : HardwareProfile
        Datasheet of the device they were measured on.

    Returns
    -------
    compute_s, memory_s : float64 arrays, s
        Zero where the device lists no rate for the row's number format.
    """
    flops, weights, others = work(records)
    peak = np.full(len(DTYPES), np.inf)
    sparse_peak = peak.copy()
    for code in np.unique(records.dtype).tolist():
        try:
            rate = hw.rate(DTYPES[code])
        except InputError:
            continue
        peak[code] = rate.flop_per_s * hw.clock_headroom
        sparse_peak[code] = peak[code] * max(rate.sparse_factor / 2, 0.5)  # per FLOP computed, half of the dense count
    compute = flops / np.where(records.is_operator("gemm_2to4"), sparse_peak[records.dtype], peak[records.dtype])
    l2 = float(hw.l2_bytes)
    share = np.where(records.copies > 0, l2 / np.maximum(records.copies, 1), np.where(records.cold, 0.0, l2))
    memory = np.maximum(np.maximum(weights + others - l2, weights - share), 0.0) / hw.bandwidth_bytes_per_s
    feed = (weights + others) / (L2_BYTES_PER_CLOCK * hw.sm_count * hw.max_clock_hz)
    return compute, np.maximum(memory, feed)


def too_fast(records: Records, hw: DeviceFacts) -> tuple[Array, Array]:
    """Masks of the rows that beat the compute limit and the memory limit of :func:`least_seconds` by more than rounding explains."""
    compute, memory = least_seconds(records, hw)
    return records.seconds * ROUNDING < compute, records.seconds * ROUNDING < memory


def join_repeats(records: Records) -> tuple[Records, int, int]:
    """One row for each shape and source: the median of its times, flagged where they disagree by more than 10 %.

    Returns
    -------
    records : Records
        In the order of first appearance.
    joined : int
        Rows that went into another.
    conflicts : int
        Shapes whose times disagree.

    Examples
    --------
    >>> from calibration.records.records import Source
    >>> r, joined, conflicts = join_repeats(Records.from_columns([Source("x")], m=[1, 2, 1], n=8, k=8, seconds=[1.0, 5.0, 2.0]))
    >>> r.seconds.tolist(), joined, conflicts, r.flags.tolist()
    ([1.5, 5.0], 1, 1, [8, 0])
    """
    if not len(records):
        return records, 0, 0
    names = [
        name for name in COLUMNS if name not in ("seconds", "spread", "sample_count", "flags", "launch", "purpose")
    ]
    group = records.groups(*names)
    _, first, counts = np.unique(group, return_index=True, return_counts=True)
    if len(first) == len(records):
        return records, 0, 0
    order = np.lexsort((records.seconds, group))
    times = records.seconds[order]
    start = np.cumsum(counts) - counts
    median = 0.5 * (times[start + (counts - 1) // 2] + times[start + counts // 2])
    conflict = times[start + counts - 1] > DISAGREE * times[start]
    flags = np.bitwise_or.reduceat(records.flags[order], start) | np.where(conflict, int(Flag.CONFLICT), 0)
    place = np.argsort(first)
    kept = records.select(first[place]).replace(seconds=median[place], flags=flags[place])
    return kept, len(records) - len(kept), int(conflict.sum())
