"""Kernels on a stream: from the time of each operator to the time of a forward pass.

Use :func:`passes` for a stack of workloads, under several runtimes at once; :func:`cost` reads it for one workload.
Under a CUDA graph the kernels follow one another with a small gap. In eager mode the host launches every kernel itself:
while kernels are shorter than the time the host takes to launch them, the stream is host-bound, and only fewer
launches, not smaller kernels, make a model faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.kernels.attention import decode_attention_time, prefill_attention_time
from simulator.kernels.collective import KINDS, collective_time
from simulator.kernels.elementwise import elementwise_time
from simulator.kernels.gemm import gemm_time
from simulator.kernels.spread import BOUNDS, COLUMNS, INDEX, Doubt, OpTime, PassDoubt, posterior_of
from simulator.kernels.stack import F, Rows, Stack, sums
from simulator.workload import DTYPES, RUNTIMES, Kind, Workload

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

_ATTENTION = "batch kv_len heads kv_heads head_dim window density"
_MODELS: Mapping[int, tuple[Callable[..., OpTime], str, str, Mapping[str, bool]]] = MappingProxyType(
    {
        int(Kind.GEMM): (gemm_time, "weight_dtype", "m n k kernel density", {"doubt": True}),
        int(Kind.PREFILL_ATTENTION): (prefill_attention_time, "kv_dtype", f"{_ATTENTION} q_len block", {}),
        int(Kind.DECODE_ATTENTION): (decode_attention_time, "kv_dtype", _ATTENTION, {}),
    }
)
"""Kinds whose rows have two number formats: the cost model, its name of the second format, the columns it takes, and
options."""

TIMES = tuple(f.name for f in fields(OpTime) if f.name != "doubt")

_HOST, _LAUNCH = BOUNDS.index("host"), BOUNDS.index("launch")


def by_formats(w: Workload, kind: int) -> Iterator[tuple[Rows, str, str]]:
    """Rows of a kind by pair of number formats (one in nearly every workload)."""
    rows = np.flatnonzero(w.kind == kind)
    codes = w.dtype[rows].astype(np.int64) * len(DTYPES) + w.weight_dtype[rows]
    for code in sorted(set(codes.tolist())):
        yield rows[codes == code], DTYPES[code // len(DTYPES)], DTYPES[code % len(DTYPES)]


def operator_times(w: Workload, hw: HardwareProfile, level: float = 0.9) -> OpTime:
    """Time of one execution of every row, whatever the mix of operators, with intervals at a level and their doubt."""
    seconds, lower, upper, roofline = np.zeros((4, len(w)))
    doubt = {"shared": np.zeros((len(w), len(COLUMNS))), "local": np.zeros(len(w)), "own": np.zeros(len(w))}
    doubt["place"] = np.zeros((len(w), 3))
    out = OpTime(seconds, lower, upper, roofline, np.zeros(len(w), dtype=np.int8))

    def put(rows: Rows, time: OpTime) -> None:
        for name in TIMES:
            getattr(out, name)[rows] = getattr(time, name)
        for name, column in time.doubt.columns().items() if time.doubt else ():
            doubt[name][rows] = column

    for kind, (model, second, names, more) in _MODELS.items():
        for rows, dtype, other in by_formats(w, kind):
            columns = {name: getattr(w, name)[rows] for name in names.split()}
            put(rows, model(**columns, hw=hw, dtype=dtype, level=level, **{second: other}, **more))
    for rows, dtype, _ in by_formats(w, int(Kind.ELEMENTWISE)):
        size = w.read_bytes[rows], w.write_bytes[rows]
        put(rows, elementwise_time(*size, hw, role=w.role[rows], dtype=dtype, level=level))
    collective = w.kind == int(Kind.COLLECTIVE)
    for role in KINDS if collective.any() else ():
        rows = np.flatnonzero(collective & w.is_role(role))
        put(rows, collective_time(w.read_bytes[rows], w.batch[rows], hw, kind=role, level=level))
    return replace(out, doubt=Doubt.from_columns(doubt, 0))


@dataclass(frozen=True)
class Pass:
    """Forward passes of a stack of workloads on a device under one runtime; seconds.

    Rows and groups are counted with all their executions; in eager mode also with all kernels they stand for.
    """

    stack: Stack
    hw: HardwareProfile
    each: OpTime  # one execution of the main kernel of each of the stack's different shapes
    streams: F  # times each row's kernels stream its data
    row_s: F  # on the device
    group_s: F  # workload x group, sums of the rows
    total_s: F  # of each workload, as the following
    device_s: F  # its rows
    gap_s: F  # idle between the kernels of a graph
    host_s: F  # to launch everything; 0 under a CUDA graph

    @cached_property
    def time(self) -> OpTime:
        """One execution of each row; the roofline is that of a fused kernel."""
        of_row = {name: getattr(self.each, name)[self.stack.shapes[1]] for name in TIMES}
        return OpTime(**of_row | {name: of_row[name] * self.streams for name in ("seconds", "lower", "upper")})

    @cached_property
    def ideal_s(self) -> F:
        """Datasheet roofline of each row if its kernel used every zero; of a collective, its link's."""
        stack, w, hw = self.stack, self.stack.rows, self.hw
        # of a format that the device does not compute in, the bytes alone count
        rates = np.array([hw.peak_flop_per_s(name) if name in hw.rates else np.inf for name in DTYPES])
        out: F = np.maximum(stack.flops * (1.0 / rates)[w.dtype], stack.bytes * (1.0 / hw.bandwidth_bytes_per_s))
        link = w.read_bytes * w.count / (hw.link.bandwidth_bytes_per_s if hw.link else np.inf)
        return np.where(w.kind == Kind.COLLECTIVE, link, out)

    @cached_property
    def doubt(self) -> PassDoubt:
        """What the total times are unsure of: the device or the host, whichever sets the pace, is in it with all its
        time, the other with what shows of it."""
        stack, groups, which, d = self.stack, self.stack.groups, self.stack.shapes[1], self.each.doubt
        assert d is not None
        host, total = self.host_bound, np.maximum(self.total_s, 1e-300)
        shown = self.total_s - np.where(host, self.host_s, self.device_s)
        device = np.where(host, shown, self.device_s) / total
        share = (device / np.maximum(self.device_s, 1e-300))[stack.owner] * self.row_s
        shared = np.zeros((len(stack), len(COLUMNS)))
        for column in np.flatnonzero(d.shared.any(axis=1)):
            shared[:, column] = stack.total(share * d.shared[column][which])
        other = np.where(host, self.host_s, shown) / total
        launched = "host" if self.host_s.any() else "machine launch"
        shared[:, INDEX[launched]] += COLUMNS[launched] * other
        local, own, whole = (groups.sums(share * v[which]) for v in (d.local, np.sqrt(d.own), np.sqrt(d.variance)))
        posterior = posterior_of(self.hw)
        noise = 1.0 if posterior is None else np.sqrt(posterior.noise[groups.kind])
        time = np.maximum(groups.sums(share), 1e-300)
        place = np.stack([groups.sums(share * axis[which]) / time for axis in d.place.T], axis=-1)
        return PassDoubt(shared, local * noise, own * noise, whole, place, groups.kind, posterior)

    @property
    def share(self) -> F:
        """Of each row in the device's time of its workload."""
        return self.row_s / self.device_s[self.stack.owner]

    @property
    def host_bound(self) -> NDArray[np.bool_]:
        """The host, not the device, sets the pace of each workload."""
        return np.asarray(self.host_s > self.device_s)

    @cached_property
    def limit(self) -> tuple[NDArray[np.int8], F]:
        """What holds most of the time of each workload, an index into ``BOUNDS``, and the share it holds."""
        bound = self.stack.owner * len(BOUNDS) + self.each.bound[self.stack.shapes[1]]
        held = sums(bound, self.row_s, (len(self.stack), len(BOUNDS)))
        held[:, _LAUNCH] += self.gap_s
        limit = np.where(self.host_bound, _HOST, held.argmax(axis=1)).astype(np.int8)
        return limit, np.where(self.host_bound, 1.0, held.max(axis=1) / held.sum(axis=1))


def passes(
    stack: Stack, hw: HardwareProfile, runtimes: tuple[str, ...] = ("cuda_graph",), level: float = 0.9
) -> tuple[Pass, ...]:
    """Passes of a stack under each runtime; every different operator is timed once. ``level`` is of the intervals.

    Raises
    ------
    InputError
        For an unknown runtime, or operators the device cannot run.
    """
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise InputError(f"runtime {runtime!r} is unknown; expected {' or '.join(RUNTIMES)}")
    (shapes, which), groups, constants = stack.shapes, stack.groups, hw.section("runtime", "*")
    each = operator_times(shapes, hw, level)
    row_s = each.seconds[which] * stack.rows.count
    group_s, host_op_s = groups.sums(row_s), constants["host_op_s"]
    if (posterior := posterior_of(hw)) is not None:
        host_op_s *= float(np.exp(posterior.columns[0][INDEX["host"]]))
    out = []
    for runtime in runtimes:
        streams = groups.streams if runtime == "eager" else np.ones(len(groups.streams))
        spent, by_row = group_s * streams, streams[groups.of_row]
        device = spent.sum(axis=1)
        if runtime == "eager":
            gap, launch = np.zeros(len(stack)), groups.count * groups.kernels * host_op_s
            total, host = eager_total(spent, launch, groups.segment)
        else:
            gap, host = constants["graph_gap_s"] * groups.count.sum(axis=1), np.zeros(len(stack))
            total = device + gap
        tables = by_row, row_s * by_row, spent
        out.append(Pass(stack, hw, each, *tables, total, device, gap, host))
    return tuple(out)


def eager_total(seconds: F, host: F, segment: NDArray[Any]) -> tuple[F, F]:
    """Time of passes in eager mode, and the host's share: the longest way along the host to a kernel, then the device.

    ``seconds`` and ``host`` (passes, groups) are of groups of operators, ``segment`` (groups,) of ``segment_of``.
    Within a phase the stream is: what precedes the layers, the layers (a mix too even to matter), what follows them.
    The device can start a segment only when the host has launched it, and ends no earlier than the last launch.
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


@dataclass(frozen=True)
class Cost(OpTime):
    """Times of a workload on a device, s: of each row's execution (eager: all kernels it stands for), and in all."""

    total_s: float
    total_lower_s: float  # interval of that time
    total_upper_s: float
    device_s: float  # the rows times their counts
    gap_s: float  # idle between the kernels of a graph
    host_s: float  # to launch everything; 0 under a CUDA graph
    host_bound: bool  # the host, not the device, sets the pace


def cost(w: Workload, hw: HardwareProfile, runtime: str = "cuda_graph", level: float = 0.9) -> Cost:
    """Cost of one workload on one device (:func:`passes`); InputError for what the device cannot run."""
    (p,) = passes(Stack.of([w]), hw, (runtime,), level)
    in_all = {name: getattr(p, name)[0].item() for name in ("total_s", "device_s", "gap_s", "host_s", "host_bound")}
    half = p.doubt.half(p.doubt.variance(), level)[0].item()
    ends = {"total_lower_s": in_all["total_s"] * np.exp(-half), "total_upper_s": in_all["total_s"] * np.exp(half)}
    return Cost(**{name: getattr(p.time, name) for name in TIMES}, **in_all, **ends)
