"""Kernels on a stream: from the time of each operator to the time of a forward pass in an engine.

Use :func:`forward_passes` for a stack of workloads; intervals are :mod:`simulator.uncertainty.intervals`'s. The engine
is that of the workloads (``Meta.engine``): whose kernels, how many launches, what its host takes
(:mod:`simulator.cost.host`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import instance
from simulator.arrays import FloatArray, IndexArray
from simulator.cost.attention import decode_attention_time, prefill_attention_time
from simulator.cost.collective import KINDS, collective_time
from simulator.cost.elementwise import elementwise_time
from simulator.cost.experts import experts_time
from simulator.cost.gemm import gemm_time
from simulator.cost.host import Host, launches
from simulator.engines.engine import Engine, load_engine, sparse24_engines
from simulator.errors import InputError
from simulator.hardware.formats import label_of
from simulator.hardware.profile import HardwareProfile
from simulator.uncertainty.error_model import (
    BOTTLENECKS,
    ERROR_FACTORS,
    FACTOR_INDEX,
    OperatorTimes,
    Uncertainty,
    posterior_of,
)
from simulator.uncertainty.forward import PassUncertainty
from simulator.workload import DTYPE_BYTES, DTYPES, ROLES, Kernel, Kind, Workload, dtype_code
from simulator.workload_batch import WorkloadBatch, sums

_ATTENTION = "batch kv_len heads kv_heads head_dim value_dim window density"
_MODELS: Mapping[int, tuple[Callable[..., OperatorTimes], str, str, Mapping[str, bool]]] = MappingProxyType(
    {
        int(Kind.GEMM): (gemm_time, "weight_dtype", "m n k kernel density block", {"uncertainty": True}),
        int(Kind.PREFILL_ATTENTION): (prefill_attention_time, "kv_dtype", f"{_ATTENTION} q_len block", {}),
        int(Kind.DECODE_ATTENTION): (decode_attention_time, "kv_dtype", f"{_ATTENTION} latent", {}),
        int(Kind.EXPERTS): (experts_time, "weight_dtype", "m n k experts active skew", {}),
    }
)
"""Kinds whose rows have two number formats: the cost model, its name of the second format, the columns it takes, and
options."""

SECTIONS: Mapping[int, str] = MappingProxyType(
    {
        int(Kind.GEMM): "gemm",
        int(Kind.PREFILL_ATTENTION): "attention_prefill",
        int(Kind.DECODE_ATTENTION): "attention_decode",
        int(Kind.ELEMENTWISE): "elementwise",
        int(Kind.EXPERTS): "experts",
    }
)
"""Parts of a profile by kind of operator; latent attention has its own, see :func:`section_of`."""

TIMES = tuple(f.name for f in fields(OperatorTimes) if f.name != "uncertainty")

_HOST, _LAUNCH, _COMPUTE = (BOTTLENECKS.index(name) for name in ("host", "launch", "compute"))
_CACHE_WRITE = ROLES.index("cache_write")


def by_formats(w: Workload, kind: int) -> Iterator[tuple[IndexArray, str, str]]:
    """Rows of a kind by pair of number formats (one in nearly every workload), those of latent attention apart."""
    rows = np.flatnonzero(w.kind == kind)
    codes = (w.dtype[rows].astype(np.int64) * len(DTYPES) + w.weight_dtype[rows]) * 2 + (w.value_dim[rows] > 0)
    for code in sorted(set(codes.tolist())):
        yield rows[codes == code], DTYPES[code // 2 // len(DTYPES)], DTYPES[code // 2 % len(DTYPES)]


def section_of(w: Workload, row: int) -> str:
    """The part of a profile that times a row, "" for one that has none of its own."""
    kind = int(w.kind[row])
    if w.value_dim[row] > 0:
        return "mla_prefill" if kind == Kind.PREFILL_ATTENTION else "mla_decode"
    return SECTIONS.get(kind, "")


def operator_times(w: Workload, hw: HardwareProfile, level: float = 0.9, engine: Engine | None = None) -> OperatorTimes:
    """Time of one execution of every row, whatever the mix of operators, with intervals at a level and their doubt; of
    an engine whose GEMMs are not all those of the table, with what it does otherwise."""
    seconds, lower, upper, roofline = np.zeros((4, len(w)))
    uncertainty = {"shared": np.zeros((len(w), len(ERROR_FACTORS))), "local": np.zeros(len(w)), "own": np.zeros(len(w))}
    uncertainty["place"] = np.zeros((len(w), 3))
    out = OperatorTimes(seconds, lower, upper, roofline, np.zeros(len(w), dtype=np.int8))

    def put(rows: IndexArray, time: OperatorTimes) -> None:
        for name in TIMES:
            getattr(out, name)[rows] = getattr(time, name)
        for name, column in time.uncertainty.columns().items() if time.uncertainty else ():
            uncertainty[name][rows] = column

    for kind, (model, second, names, more) in _MODELS.items():
        for rows, dtype, other in by_formats(w, kind):
            columns = {name: getattr(w, name)[rows] for name in names.split()}
            put(rows, model(**columns, hw=hw, dtype=dtype, level=level, **{second: other}, **more))
    for rows, dtype, _ in by_formats(w, int(Kind.ELEMENTWISE)):
        size = w.read_bytes[rows], w.write_bytes[rows]
        put(rows, elementwise_time(*size, hw, role=w.role[rows], added=w.overhead[rows], dtype=dtype, level=level))
    if engine is not None and engine is not load_engine(""):
        _own_gemms(out, w, hw, engine)
    collective = w.kind == int(Kind.COLLECTIVE)
    for role in KINDS if collective.any() else ():
        rows = np.flatnonzero(collective & w.is_role(role))
        put(rows, collective_time(w.read_bytes[rows], w.batch[rows], hw, kind=role, level=level))
    return replace(out, uncertainty=Uncertainty.from_columns(uncertainty, 0))


def _own_gemms(out: OperatorTimes, w: Workload, hw: HardwareProfile, engine: Engine) -> None:
    """What an engine's GEMMs do otherwise than those of the table, in place: clocks fall under load; activations that
    are quantised on the way save a share of what a GEMM of narrow ones starts later than one of 16 bits; one token may
    have a kernel of its own."""
    loaded = hw.section("runtime", "*")["sustained"]
    for rows, dtype, weight in by_formats(w, int(Kind.GEMM)):
        before, late = out.seconds[rows], 0.0
        if DTYPE_BYTES[dtype_code(dtype)] < 2.0:
            late = hw.section("gemm", label_of(dtype, weight))["t0"] - hw.section("gemm", "bf16")["t0"]
        after = before * np.where(out.bound[rows] == _COMPUTE, loaded, 1.0)
        after *= np.where(w.m[rows] == 1, engine.one_token.value, 1.0)
        after = np.maximum(
            after - max(engine.quantize_fused.value * late, 0.0), np.minimum(out.roofline_s[rows], before)
        )
        for times in (out.seconds, out.lower, out.upper):
            times[rows] *= after / before


@dataclass(frozen=True)
class ForwardPass:
    """Forward passes of a stack of workloads on a device in an engine; seconds.

    Rows and groups are counted with all their executions, and with all kernels of an operator that is not fused.
    """

    workloads: WorkloadBatch
    hw: HardwareProfile  # as the engine uses it
    engine: Engine
    each: OperatorTimes  # one execution of the main kernel of each of the stack's different shapes
    streams: FloatArray  # times each row's kernels stream its data
    row_s: FloatArray  # on the device
    group_s: FloatArray  # workload x group: sums of the rows and of the gaps
    group_gap_s: FloatArray  # workload x group: between the kernels, idle or the host's
    host: Host

    @property
    def gap_s(self) -> FloatArray:
        """Of each workload: between its kernels."""
        return np.asarray(self.group_gap_s.sum(axis=1))

    @cached_property
    def time(self) -> OperatorTimes:
        """One execution of each row; the roofline is that of a fused kernel."""
        of_row = {name: getattr(self.each, name)[self.workloads.shapes[1]] for name in TIMES}
        return OperatorTimes(**of_row | {name: of_row[name] * self.streams for name in ("seconds", "lower", "upper")})

    @cached_property
    def device_s(self) -> FloatArray:
        """Of each workload: its kernels, gaps included."""
        return np.asarray(self.group_s.sum(axis=1))

    def at(self, z: float) -> tuple[FloatArray, FloatArray]:
        """Time of each workload on a host ``z`` standard deviations slower than usual, and the part of it (0 to 1) that
        follows the device."""
        total, shown = (part.sum(axis=1) for part in self._phases(z))
        return total, shown / np.maximum(total, 1e-300)

    def _phases(self, z: float) -> tuple[FloatArray, FloatArray]:
        return self.host.total(self.group_s, self.workloads.groups.segment, z)

    @cached_property
    def phase_s(self) -> FloatArray:
        """(W, 2) time of each workload by phase, prefill and decode."""
        return self._phases(0.0)[0]

    @cached_property
    def total_s(self) -> FloatArray:
        """Time of each workload."""
        return np.asarray(self.phase_s.sum(axis=1))

    @cached_property
    def host_s(self) -> FloatArray:
        """What the host takes of each workload: to launch and to schedule, hidden or not."""
        h = self.host
        return np.asarray(h.launch.sum(axis=1) + h.each_pass.sum(axis=1) + h.each_sequence.sum(axis=1))

    @cached_property
    def device_share(self) -> FloatArray:
        """Part of each workload's time that follows the device."""
        return self.at(0.0)[1]

    @cached_property
    def ideal_s(self) -> FloatArray:
        """Datasheet roofline of each row if its kernel used every zero; of a collective, its link's."""
        workloads, w, hw = self.workloads, self.workloads.rows, self.hw
        # of a format that the device does not compute in, the bytes alone count
        rates = np.array([hw.peak_flop_per_s(name) if name in hw.rates else np.inf for name in DTYPES])
        out: FloatArray = np.maximum(
            workloads.flops * (1.0 / rates)[w.dtype], workloads.bytes * (1.0 / hw.bandwidth_bytes_per_s)
        )
        link = w.read_bytes * w.count / (hw.link.bandwidth_bytes_per_s if hw.link else np.inf)
        return np.where(w.kind == Kind.COLLECTIVE, link, out)

    @cached_property
    def uncertainty(self) -> PassUncertainty:
        """What the device's times are unsure of."""
        workloads, groups, which, d = (
            self.workloads,
            self.workloads.groups,
            self.workloads.shapes[1],
            self.each.uncertainty,
        )
        assert d is not None
        device = np.maximum(self.device_s, 1e-300)
        share = self.row_s / device[workloads.owner]
        shared = np.zeros((len(workloads), len(ERROR_FACTORS)))
        for column in np.flatnonzero(d.shared.any(axis=1)):
            shared[:, column] = workloads.total(share * d.shared[column][which])
        shared[:, FACTOR_INDEX["machine launch"]] += ERROR_FACTORS["machine launch"] * self.gap_s / device
        local = groups.sums(share * d.local[which])
        composed, gaps = self._composed
        own, whole = (groups.sums(share * np.sqrt(v[which] + composed)) + gaps for v in (d.own, d.variance))
        posterior = posterior_of(self.hw)
        noise = 1.0 if posterior is None else np.sqrt(posterior.noise[groups.kind])
        time = np.maximum(groups.sums(share), 1e-300)
        place = np.stack([groups.sums(share * axis[which]) / time for axis in d.place.T], axis=-1)
        return PassUncertainty(shared, local * noise, own * noise, whole, place, groups.kind, posterior)

    @property
    def _composed(self) -> tuple[FloatArray, FloatArray]:
        """Variance of the log of each row's time, where several kernels put an operator together and none was timed;
        and (W, G) what the gaps between those add to a group's deviation, in shares of a pass."""
        w, groups, sd = self.workloads.rows, self.workloads.groups, self.engine.composed_log_sd.value
        composed = w.overhead | (w.is_attention & (w.kernel == Kernel.BLOCK_SPARSE))
        part = groups.sums(self.row_s * composed) / np.maximum(groups.sums(self.row_s), 1e-300)
        return composed * sd**2, sd * part * self.group_gap_s / np.maximum(self.device_s, 1e-300)[:, None]

    @property
    def share(self) -> FloatArray:
        """Of each row in the device's time of its workload."""
        return self.row_s / self.device_s[self.workloads.owner]

    @cached_property
    def host_bound(self) -> NDArray[np.bool_]:
        """The host, not the device, sets the pace of each workload."""
        return np.asarray(self.device_share < 0.5)

    @cached_property
    def bottleneck(self) -> tuple[NDArray[np.int8], FloatArray]:
        """What holds most of the time of each workload, an index into ``BOTTLENECKS``, and the share it holds."""
        bound = self.workloads.owner * len(BOTTLENECKS) + self.each.bound[self.workloads.shapes[1]]
        held = sums(bound, self.row_s, (len(self.workloads), len(BOTTLENECKS)))
        held[:, _LAUNCH] += self.gap_s
        held *= (self.device_share / np.maximum(held.sum(axis=1), 1e-300))[:, None]
        held[:, _HOST] += 1.0 - self.device_share
        return held.argmax(axis=1).astype(np.int8), held.max(axis=1)


def forward_passes(workloads: WorkloadBatch, hw: HardwareProfile, level: float = 0.9) -> ForwardPass:
    """Passes of a stack in the engine of its workloads; every different operator is timed once. ``level`` is of the
    intervals. InputError for operators that the device or the engine cannot run."""
    instance("hw", hw, HardwareProfile, "load_hardware")
    engine = load_engine(workloads.rows.meta.engine)
    if reason := refusal(workloads):
        raise InputError(reason)
    hw = hw.serving(engine.stacks)
    (shapes, which), groups = workloads.shapes, workloads.groups
    each = operator_times(shapes, hw, level, engine)
    kernels = engine.kernels[groups.role]
    # keys and values are written by a kernel each, other unfused elementwise kernels stream all the data each
    all_of_it = (groups.kind == Kind.ELEMENTWISE) & (groups.role != _CACHE_WRITE)
    streams = np.where(all_of_it, kernels, np.minimum(kernels, 1.0))[groups.of_row]
    row_s = each.seconds[which] * workloads.rows.count * streams
    gap = _gaps(workloads, engine, hw)
    host = Host.of(workloads, engine, hw)
    return ForwardPass(workloads, hw, engine, each, streams, row_s, groups.sums(row_s) + gap, gap, host)


def _gaps(workloads: WorkloadBatch, engine: Engine, hw: HardwareProfile) -> FloatArray:
    """(W, G) time between the kernels of each group, s: idle inside a graph. A CPU is its own host: it waits after
    every kernel, and launches those that an operator has beside its main one."""
    groups, runtime, launched = workloads.groups, hw.section("runtime", "*"), launches(workloads, engine)
    if hw.architecture != "cpu":
        graph = np.array([engine.in_graph(name) for name in ("prefill", "decode")])[groups.segment // 3]
        return np.where(graph, launched * (runtime["graph_gap_s"] + engine.gap.value), 0.0)
    beside = np.where(groups.kind == Kind.ELEMENTWISE, 0.0, np.maximum(launched - groups.count, 0.0))
    return np.asarray(launched * runtime["graph_gap_s"] + beside * runtime["host_op_s"])


def refusal(workloads: WorkloadBatch) -> str:
    """Why an engine has no kernels for some of its workloads, else ""."""
    w, engine = workloads.rows, load_engine(workloads.rows.meta.engine)
    gemm = (w.kind == Kind.GEMM) & bool(w.meta.engine)
    for code in np.unique(w.dtype[gemm & (w.kernel == Kernel.SPARSE24)]).tolist():
        if DTYPES[code] not in engine.sparse24:
            have = ", ".join(name for name in sparse24_engines() if DTYPES[code] in load_engine(name).sparse24)
            formats = f"{DTYPES[code]} " if engine.sparse24 else ""
            return f"{engine.name} has no {formats}2:4 kernels; these engines have: {have or 'none'}"
    narrow = gemm & (DTYPE_BYTES[w.dtype] >= 2.0) & (DTYPE_BYTES[w.weight_dtype] < 2.0)
    for code in np.unique(w.weight_dtype[narrow]).tolist():
        if DTYPES[code] not in engine.weight_only:
            have = ", ".join(engine.weight_only) or "none"
            hint = "; dtype fp8 computes in them" if DTYPES[code] in ("fp8_block", "nvfp4") else ""
            return f"{engine.name} has no kernels for {DTYPES[code]} weights alone; it has: {have}{hint}"
    return ""
