"""Kernels on a stream: from the time of each operator to the time of a forward pass.

Use :func:`cost` for one workload, :func:`cost_batch` for many on the same device (one vectorised pass). Under a CUDA
graph the kernels follow one another with a small gap. In eager mode the host launches every kernel itself: while
kernels are shorter than the time the host takes to launch them, the stream is host-bound, and only fewer launches, not
smaller kernels, make a model faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.kernels.attention import decode_attention_time, prefill_attention_time
from simulator.kernels.collective import KINDS, collective_time
from simulator.kernels.elementwise import elementwise_time
from simulator.kernels.gemm import gemm_time
from simulator.kernels.intervals import OpTime
from simulator.workload import DTYPES, ROLES, RUNTIMES, Kind, Part, Workload

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

F = NDArray[np.float64]
Rows = NDArray[np.intp]

# what an unfused PyTorch decoder launches where an inference engine runs one kernel, counted from the operations of a
# Llama layer; norms: residual sum, cast, square, mean, reciprocal root, two products, cast; rotary: two rotations of
# negate + concatenate, four products, two sums; attention: repeat of the KV heads, scaled dot product, transpose
EAGER_KERNELS: Mapping[str, int] = MappingProxyType(
    dict.fromkeys(("attention_norm", "mlp_norm", "post_norm"), 7)
    | {"final_norm": 6, "qk_norm": 12, "rotary": 10, "attention": 3, "activation": 2, "cache_write": 2}
    | {"sort": 3, "select": 4, "mask": 3}
)
"""Kernels an eager framework launches for one row of this role; 1 where it is not listed."""

_KERNELS = np.array([EAGER_KERNELS.get(role, 1) for role in ROLES], dtype=np.float64)
_SEGMENT = np.zeros(len(Part), dtype=np.int64)
_SEGMENT[[Part.ATTENTION, Part.MLP]] = 1
_SEGMENT[Part.HEAD] = 2

_ATTENTION = "batch kv_len heads kv_heads head_dim window density"
_MODELS: Mapping[int, tuple[Callable[..., OpTime], str, str]] = MappingProxyType(
    {
        int(Kind.GEMM): (gemm_time, "weight_dtype", "m n k kernel density"),
        int(Kind.PREFILL_ATTENTION): (prefill_attention_time, "kv_dtype", f"{_ATTENTION} q_len block"),
        int(Kind.DECODE_ATTENTION): (decode_attention_time, "kv_dtype", _ATTENTION),
    }
)
"""Kinds whose rows have two number formats: the cost model, its name of the second format, and the columns it takes."""


@dataclass(frozen=True)
class Cost(OpTime):
    """Times of a workload on a device, s: of each row's execution (eager: all kernels it stands for), and in all."""

    total_s: float
    device_s: float  # the rows times their counts
    gap_s: float  # idle between the kernels of a graph
    host_s: float  # to launch everything; 0 under a CUDA graph
    host_bound: bool  # the host, not the device, sets the pace


@dataclass(frozen=True)
class StreamTime:
    """What :class:`Cost` says in all, of many passes: arrays (passes,), s."""

    total_s: F
    device_s: F
    gap_s: F
    host_s: F

    @property
    def host_bound(self) -> NDArray[np.bool_]:
        """The host sets the pace."""
        return np.asarray(self.host_s > self.device_s)


# -- operators -----------------------------------------------------------------------------------------------


def by_formats(w: Workload, kind: int) -> Iterator[tuple[Rows, str, str]]:
    """Rows of a kind by pair of number formats (one in nearly every workload)."""
    rows = np.flatnonzero(w.kind == kind)
    codes = w.dtype[rows].astype(np.int64) * len(DTYPES) + w.weight_dtype[rows]
    for code in sorted(set(codes.tolist())):
        yield rows[codes == code], DTYPES[code // len(DTYPES)], DTYPES[code % len(DTYPES)]


def operator_times(w: Workload, hw: HardwareProfile, level: float = 0.9) -> OpTime:
    """Time of one execution of every row, whatever the mix of operators, with intervals at a level."""
    seconds, lower, upper, roofline = np.zeros((4, len(w)))
    out = OpTime(seconds, lower, upper, roofline, np.zeros(len(w), dtype=np.int8))

    def put(rows: Rows, time: OpTime) -> None:
        for f in fields(OpTime):
            getattr(out, f.name)[rows] = getattr(time, f.name)

    for kind, (model, second, names) in _MODELS.items():
        for rows, dtype, other in by_formats(w, kind):
            columns = {name: getattr(w, name)[rows] for name in names.split()}
            put(rows, model(**columns, hw=hw, dtype=dtype, level=level, **{second: other}))
    for rows, dtype, _ in by_formats(w, int(Kind.ELEMENTWISE)):
        put(rows, elementwise_time(w.read_bytes[rows], w.write_bytes[rows], hw, role=w.role[rows], dtype=dtype))
    collective = w.kind == int(Kind.COLLECTIVE)
    for role in KINDS if collective.any() else ():
        rows = np.flatnonzero(collective & w.is_role(role))
        put(rows, collective_time(w.read_bytes[rows], w.batch[rows], hw, kind=role))
    return out


def ideal_roofline(w: Workload, hw: HardwareProfile) -> F:
    """Datasheet roofline of an execution of every row, s, if its kernel used every zero; of a collective, its
    link's."""
    count = np.where(w.count > 0, w.count, 1.0)
    compute = w.flops / count / peaks(hw)[w.dtype]
    memory = w.bytes / count / hw.bandwidth_bytes_per_s
    link = w.read_bytes / (hw.link.bandwidth_bytes_per_s if hw.link else np.inf)
    return np.where(w.kind == Kind.COLLECTIVE, link, np.maximum(compute, memory))


def peaks(hw: HardwareProfile) -> F:
    """Datasheet rate by dtype code, FLOP/s; infinite for formats the device does not compute in."""
    return np.array([hw.peak_flop_per_s(name) if name in hw.rates else np.inf for name in DTYPES])


def host_kernels(w: Workload) -> F:
    """Kernels an eager framework launches for one execution of each row."""
    return eager_kernels(w.kind, w.role)[0]


def eager_kernels(kind: NDArray[Any], role: NDArray[Any]) -> tuple[F, F]:
    """Kernels an eager framework launches for one execution of an operator, and times it streams the operator's data.

    An unfused elementwise operator streams them once a kernel; GEMMs and attention have one main kernel.
    """
    kernels = _KERNELS[role]
    return kernels, np.where(kind == Kind.ELEMENTWISE, kernels, 1.0)


# -- passes --------------------------------------------------------------------------------------------------


def cost(w: Workload, hw: HardwareProfile, runtime: str = "cuda_graph", level: float = 0.9) -> Cost:
    """Cost of one workload on one device; see :func:`cost_batch`."""
    return cost_batch([w], hw, runtime, level)[0]


def cost_batch(
    workloads: Sequence[Workload], hw: HardwareProfile, runtime: str = "cuda_graph", level: float = 0.9
) -> list[Cost]:
    """Costs of many workloads on one device, in one vectorised pass over all their rows; ``level`` is of the intervals.

    Raises
    ------
    InputError
        For an unknown runtime, or a number format the device does not compute in.
    """
    check_runtime(runtime)
    joined = Workload.concat(workloads)
    time = operator_times(joined, hw, level)
    kernels, passes = eager_kernels(joined.kind, joined.role)
    if runtime != "eager":
        passes = np.ones(len(joined))
    columns = time.seconds * passes, time.lower * passes, time.upper * passes, time.roofline_s, time.bound
    host_s = kernels * hw.section("runtime", "*")["host_op_s"]
    out, start = [], 0
    for w in workloads:
        rows = slice(start, start + len(w))
        start += len(w)
        seconds, lower, upper, roofline, bound = (column[rows] for column in columns)
        count, device = w.count[None], np.array([seconds @ w.count])
        times = seconds * count, host_s[rows] * count
        stream = stream_time(runtime, hw, *times, segment_of(w), count.sum(axis=1), device)
        pass_s = {f.name: float(getattr(stream, f.name)[0]) for f in fields(stream)}
        out.append(Cost(seconds, lower, upper, roofline, bound, **pass_s, host_bound=bool(stream.host_bound[0])))
    return out


def check_runtime(runtime: str) -> None:
    """Refuse an unknown runtime."""
    if runtime not in RUNTIMES:
        raise InputError(f"runtime {runtime!r} is unknown; expected {' or '.join(RUNTIMES)}")


def segment_of(w: Workload) -> NDArray[np.int64]:
    """Place of each row on the stream: phase x 3 + 0 before the layers, 1 in them, 2 after them."""
    out: NDArray[np.int64] = w.phase.astype(np.int64) * 3 + _SEGMENT[w.part]
    return out


def stream_time(
    runtime: str, hw: HardwareProfile, seconds: F, host: F, segment: NDArray[Any], launches: F, device: F
) -> StreamTime:
    """Times of passes from ``seconds`` on the device, ``host`` and ``segment`` of groups of operators
    (:func:`eager_total`).

    ``launches`` counts the executions of a pass, ``device`` adds up its seconds.
    """
    none = np.zeros(len(device))
    if runtime == "eager":
        total, host_total = eager_total(seconds, host, segment)
        return StreamTime(total, device, none, host_total)
    gap = hw.section("runtime", "*")["graph_gap_s"] * launches
    return StreamTime(device + gap, device, gap, none)


def eager_total(seconds: F, host: F, segment: NDArray[Any]) -> tuple[F, F]:
    """Time of passes in eager mode, and the host's share: the longest way along the host to a kernel, then the device.

    ``seconds`` and ``host`` (passes, groups) are of groups of operators, ``segment`` (groups,) of :func:`segment_of`.
    Within a phase the stream is: what precedes the layers, the layers (a mix too even to matter), what follows them.
    The device can start a segment only when the host has launched it, and ends no earlier than the last launch.

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
