"""Kernels on a stream: from the time of each operator to the time of a forward pass.

Use :func:`cost` for one workload, :func:`cost_batch` for many on the same device (one vectorised pass). Under a CUDA graph the kernels
follow one another with a small gap. In eager mode the host launches every kernel itself: while kernels are shorter than the time
the host takes to launch them, the stream is host-bound, and only fewer launches, not smaller kernels, make a model faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.kernels.attention import decode_attention_time, prefill_attention_time
from simulator.kernels.collective import collective_time
from simulator.kernels.elementwise import elementwise_time
from simulator.kernels.gemm import gemm_time
from simulator.kernels.optime import OpTime
from simulator.workload import DTYPES, ROLES, RUNTIMES, Kind, Part, Workload

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

F = NDArray[np.float64]


EAGER_KERNELS: Mapping[str, int] = MappingProxyType(
    {
        # what an unfused PyTorch decoder launches where an inference engine runs one kernel, counted from the operations of a Llama layer;
        # norms: residual sum, cast, square, mean, reciprocal root, two products, cast
        "attention_norm": 7,
        "mlp_norm": 7,
        "post_norm": 7,
        "final_norm": 6,
        "qk_norm": 12,
        "rotary": 10,  # two rotations of negate + concatenate, four products, two sums
        "attention": 3,  # repeat of the KV heads, scaled dot product, transpose
        "activation": 2,
        "cache_write": 2,
        "sort": 3,
        "select": 4,
        "mask": 3,
    }
)
"""Kernels an eager framework launches for one row of this role; 1 where it is not listed."""

_GEMM, _PREFILL, _DECODE, _ELEMENTWISE, _COLLECTIVE = (
    int(kind) for kind in (Kind.GEMM, Kind.PREFILL_ATTENTION, Kind.DECODE_ATTENTION, Kind.ELEMENTWISE, Kind.COLLECTIVE)
)
_SEGMENT = np.zeros(len(Part), dtype=np.int64)
_SEGMENT[[Part.ATTENTION, Part.MLP]] = 1
_SEGMENT[Part.HEAD] = 2
_KERNELS = np.array([EAGER_KERNELS.get(role, 1) for role in ROLES], dtype=np.float64)


@dataclass(frozen=True)
class Cost:
    """Times of one workload on one device.

    Attributes
    ----------
    seconds, lower, upper, roofline_s : float64 arrays, s
        Per row, one execution (for eager: all kernels the row stands for).
    bound : int8 array
        Index into :data:`simulator.kernels.optime.BOUNDS`, per row.
    total_s : float
        The whole pass.
    device_s : float
        Time the device computes: the rows times their counts.
    gap_s : float
        Idle time between kernels of a graph.
    host_s : float
        Time the host needs to launch everything (0 under a CUDA graph).
    host_bound : bool
        The host, not the device, sets the pace.
    """

    seconds: F
    lower: F
    upper: F
    roofline_s: F
    bound: NDArray[Any]
    total_s: float
    device_s: float
    gap_s: float
    host_s: float
    host_bound: bool


def operator_times(w: Workload, hw: HardwareProfile, level: float = 0.9) -> OpTime:
    """Time of one execution of every row.

    Parameters
    ----------
    w : Workload
        Any mix of operators.
    hw : HardwareProfile
        The device.
    level : float, 0 < level < 1
        Level of the intervals.

    Returns
    -------
    OpTime
        Arrays of the length of the workload.
    """
    size = len(w)
    out = {name: np.zeros(size) for name in ("seconds", "lower", "upper", "roofline_s")}
    bound = np.zeros(size, dtype=np.int8)

    def put(rows: NDArray[np.intp], time: OpTime) -> None:
        for name, column in out.items():
            column[rows] = getattr(time, name)
        bound[rows] = time.bound

    def groups(mask: NDArray[np.bool_]) -> list[tuple[NDArray[np.intp], str, str]]:
        """Rows of a kind by pair of number formats (one group in nearly every workload)."""
        rows = np.flatnonzero(mask)
        if not len(rows):
            return []
        code = w.dtype[rows].astype(np.int64) * len(DTYPES) + w.weight_dtype[rows]
        found = (
            [(int(code[0]), rows)] if (code == code[0]).all() else [(int(c), rows[code == c]) for c in np.unique(code)]
        )
        return [(r, DTYPES[c // len(DTYPES)], DTYPES[c % len(DTYPES)]) for c, r in found]

    for rows, dtype, weight in groups(w.kind == _GEMM):
        put(
            rows,
            gemm_time(
                w.m[rows],
                w.n[rows],
                w.k[rows],
                hw,
                dtype=dtype,
                weight_dtype=weight,
                kernel=w.kernel[rows],
                density=w.density[rows],
                level=level,
            ),
        )
    for rows, dtype, cache in groups(w.kind == _PREFILL):
        put(
            rows,
            prefill_attention_time(
                w.batch[rows],
                w.q_len[rows],
                w.kv_len[rows],
                w.heads[rows],
                w.kv_heads[rows],
                w.head_dim[rows],
                hw,
                window=w.window[rows],
                density=w.density[rows],
                block=w.block[rows],
                dtype=dtype,
                kv_dtype=cache,
                level=level,
            ),
        )
    for rows, dtype, cache in groups(w.kind == _DECODE):
        put(
            rows,
            decode_attention_time(
                w.batch[rows],
                w.kv_len[rows],
                w.heads[rows],
                w.kv_heads[rows],
                w.head_dim[rows],
                hw,
                window=w.window[rows],
                density=w.density[rows],
                dtype=dtype,
                kv_dtype=cache,
                level=level,
            ),
        )
    for rows, dtype, _ in groups(w.kind == _ELEMENTWISE):
        put(rows, elementwise_time(w.read_bytes[rows], w.write_bytes[rows], hw, role=w.role[rows], dtype=dtype))
    collective = w.kind == _COLLECTIVE
    for role in ("all_reduce", "send", "all_gather") if collective.any() else ():
        rows = np.flatnonzero(collective & w.is_role(role))
        if len(rows):
            put(rows, collective_time(w.read_bytes[rows], w.batch[rows], hw, kind=role))
    return OpTime(**out, bound=bound)


def ideal_roofline(w: Workload, hw: HardwareProfile) -> F:
    """Datasheet roofline of every row, one execution, if its kernel used every zero: max(FLOP / peak, bytes / bandwidth), s.

    Collectives take payload / link bandwidth.
    """
    count = np.where(w.count > 0, w.count, 1.0)
    peak = np.array(
        [hw.peak_flop_per_s(DTYPES[code]) if DTYPES[code] in hw.rates else np.inf for code in range(len(DTYPES))]
    )
    compute = w.flops / count / peak[w.dtype]
    memory = w.bytes / count / hw.bandwidth_bytes_per_s
    link = w.read_bytes / (hw.link.bandwidth_bytes_per_s if hw.link else np.inf)
    return np.where(w.kind == Kind.COLLECTIVE, link, np.maximum(compute, memory))


def host_kernels(w: Workload) -> F:
    """Kernels an eager framework launches for one execution of each row."""
    return _KERNELS[w.role]


def cost_batch(
    workloads: Sequence[Workload], hw: HardwareProfile, runtime: str = "cuda_graph", level: float = 0.9
) -> list[Cost]:
    """Cost of many workloads on one device, in one vectorised pass over all their rows.

    Parameters
    ----------
    workloads : sequence of Workload
    hw : HardwareProfile
    runtime : {"cuda_graph", "eager"}
    level : float
        Level of the operators' intervals.

    Returns
    -------
    list of Cost

    Raises
    ------
    InputError
        For an unknown runtime, or a number format the device does not compute in.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"runtime {runtime!r} is unknown; expected {' or '.join(RUNTIMES)}")
    joined = Workload.concat(workloads)
    time = operator_times(joined, hw, level)
    section = hw.section("runtime", "*")
    gap_s, host_op_s = section["graph_gap_s"], section["host_op_s"]
    seconds, lower, upper = time.seconds, time.lower, time.upper
    kernels = np.ones(len(joined))
    if runtime == "eager":
        # an unfused elementwise operator streams its data once a kernel; GEMMs and attention have one main kernel
        kernels = host_kernels(joined)
        passes = np.where(joined.kind == Kind.ELEMENTWISE, kernels, 1.0)
        seconds, lower, upper = seconds * passes, lower * passes, upper * passes
    edges = np.cumsum([0] + [len(w) for w in workloads])
    out = []
    for i, w in enumerate(workloads):
        rows = slice(edges[i], edges[i + 1])
        device = float(seconds[rows] @ w.count)
        if runtime == "eager":
            totals, hosts = eager_total(
                (seconds[rows] * w.count)[None], (kernels[rows] * host_op_s * w.count)[None], segment_of(w)
            )
            total, host, gap = float(totals[0]), float(hosts[0]), 0.0
        else:
            gap, host = gap_s * float(w.count.sum()), 0.0
            total = device + gap
        out.append(
            Cost(
                seconds[rows],
                lower[rows],
                upper[rows],
                time.roofline_s[rows],
                time.bound[rows],
                total_s=total,
                device_s=device,
                gap_s=gap,
                host_s=host,
                host_bound=host > device,
            )
        )
    return out


def cost(w: Workload, hw: HardwareProfile, runtime: str = "cuda_graph", level: float = 0.9) -> Cost:
    """Cost of one workload on one device; see :func:`cost_batch`."""
    return cost_batch([w], hw, runtime, level)[0]


def segment_of(w: Workload) -> NDArray[np.int64]:
    """Place of each row on the stream: phase x 3 + 0 before the layers, 1 in them, 2 after them."""
    out: NDArray[np.int64] = w.phase.astype(np.int64) * 3 + _SEGMENT[w.part]
    return out


def eager_total(seconds: F, host: F, segment: NDArray[Any]) -> tuple[F, F]:
    """Time of passes in eager mode, and the host's share: the longest way along the host up to a kernel and the device after it.

    Within a phase the stream is: what precedes the layers, the layers (a mix too even to matter), what follows them. The device can
    start a segment only when the host has launched it, and ends no earlier than the last launch.

    Parameters
    ----------
    seconds, host : float64 arrays (passes, groups), s
        Time on the device and on the host of each group of operators.
    segment : int array (groups,)
        From :func:`segment_of`.

    Returns
    -------
    total, host : float64 arrays (passes,), s

    Examples
    --------
    >>> total, host = eager_total(np.array([[1.0, 5.0, 3.0]]), np.array([[2.0, 9.0, 1.0]]), np.array([0, 1, 2]))
    >>> float(total[0]), float(host[0])
    (14.0, 12.0)
    """
    total, host_total = np.zeros(len(seconds)), np.zeros(len(seconds))
    for phase in (0, 1):
        launched, longest = np.zeros(len(seconds)), np.zeros(len(seconds))
        device = [seconds[:, segment == 3 * phase + part].sum(axis=1) for part in range(3)]
        after = device[0] + device[1] + device[2]
        for part in range(3):
            longest = np.maximum(longest, launched + after)
            launched = launched + host[:, segment == 3 * phase + part].sum(axis=1)
            after = after - device[part]
        total += np.maximum(longest, launched)
        host_total += launched
    return total, host_total
