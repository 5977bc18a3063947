"""A forward pass: from the times of operators to the time of a workload in the engine of its
request.

The host schedules and launches kernels, before the device or in parallel with it. Under a CUDA
graph, a pass waits for the scheduler, then its kernels run in sequence. In eager mode, the host
launches every kernel while the device runs earlier kernels; only fewer launches, not smaller
kernels, make a host-bound model faster.

Two numbers describe how slow a host is, in standard deviations of logs: ``passes`` for its time per
pass and around a request, and ``work`` for its time per launch and per sequence. 0 is the typical
(median) host, positive numbers are slower. Over hosts, they are correlated but not equal. A
measured time of a whole pass determines their sum, not the two numbers.

W are workloads, G groups of rows with the same phase, place in the pass, kind and role.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import COUNT
from simulator.arrays import FloatArray, IndexArray, array
from simulator.codes import (
    DTYPE_BYTES,
    DTYPES,
    ELEMENTWISE,
    EXPERTS,
    GEMM,
    ROLES,
    Kernel,
    Kind,
    Phase,
)
from simulator.engines.engine import Engine, HostTime, load_engine, selected, sparse24_engines
from simulator.hardware.profile import EngineTimes, HardwareProfile
from simulator.operators import BY_CODE, OPERATORS
from simulator.operators.base import BOTTLENECKS, Estimate, Formats, Operator, Rows
from simulator.operators.experts import experts_touched
from simulator.workload import Workload, WorkloadBatch, sums

_COMPUTE = BOTTLENECKS.index("compute")
_SPARSE24 = int(Kernel.SPARSE24)
_CACHE_WRITE = ROLES.index("cache_write")
_NORM = ROLES.index("attention_norm")
_PROMPTS = int(Kind.PREFILL_ATTENTION)
_RECURRENT = (int(Kind.DELTA_NET), int(Kind.STATE_SPACE), int(Kind.SHORT_CONV))


@dataclass(frozen=True)
class Host:
    """Time of the typical host for W workloads by phase, s, and how far hosts differ."""

    # (W, G) to launch a group's kernels, in parallel with the device; 0 in a graph
    launch: FloatArray
    launch_log_sd: float
    layer: FloatArray  # (W,) to launch one layer
    each_pass: FloatArray  # (W, 2) before the device starts
    pass_log_sd: float
    each_sequence: FloatArray  # (W, 2) for the sequences of a pass
    sequence_log_sd: float
    server: FloatArray  # (W, 2) around the passes of a request; 0 outside serve
    server_log_sd: float
    correlation: float = 1.0  # between ``passes`` and ``work``; 1: one unknown

    @classmethod
    def of(
        cls,
        workloads: WorkloadBatch,
        engine: Engine,
        hw: HardwareProfile,
        launched: FloatArray,
        launch_s: float,
        launch_log_sd: float,
    ) -> Host:
        """Return the host of a pass with ``launched`` kernels (:func:`launches`), each of
        ``launch_s``; other times are those of the engine. A CPU is its own host: it launches within
        its kernels' times and gaps."""
        groups, cpu = workloads.groups, hw.architecture == "cpu"
        if cpu:
            launched = np.zeros(groups.count.shape)
        waits = np.array([not engine.in_graph(name) for name in ("prefill", "decode")])
        launch = launched * (waits[groups.segment // 3] * launch_s)
        of_phase = groups.segment[:, None] // 3 == np.arange(2)
        in_phase = groups.count @ (of_phase & (groups.role == _NORM)[:, None])
        layers = in_phase.sum(axis=1)
        steps, sequences = _steps(workloads, cpu)
        server = np.zeros_like(steps)
        if workloads.rows.meta.phase == "serve" and not cpu:
            # vLLM on two cores: 5 to 8 ms (docs/vllm.md)
            server[:, Phase.PREFILL] = engine.each_request.value
        return cls(
            launch=launch,
            launch_log_sd=launch_log_sd,
            layer=launch[:, groups.segment % 3 == 1].sum(axis=1) / np.maximum(layers, 1.0),
            each_pass=steps * engine.each_pass.on(hw.is_workstation)
            + in_phase * engine.each_layer.value,
            pass_log_sd=engine.each_pass.log_sd,
            each_sequence=sequences * engine.each_sequence.on(hw.is_workstation),
            sequence_log_sd=engine.each_sequence.log_sd,
            server=server,
            server_log_sd=engine.each_request.log_sd,
            correlation=engine.host_correlation.value,
        )

    def __bool__(self) -> bool:
        return self.unknowns > 0

    @cached_property
    def unknowns(self) -> int:
        """Number of independent speeds of the host: 0 without host time, 1 with one kind of host
        time."""
        parts = self.each_pass, self.server, self.launch, self.each_sequence
        each_pass, server, launched, sequences = map(np.count_nonzero, parts)
        passes, work = each_pass + server, launched + sequences
        return 2 if passes and work and self.correlation < 1.0 else int(bool(passes or work))

    @property
    def widest_log_sd(self) -> float:
        """Largest standard deviation of the logs of the host's times; 1 without host time."""
        sds = self.pass_log_sd, self.server_log_sd, self.launch_log_sd, self.sequence_log_sd
        parts = self.each_pass, self.server, self.launch, self.each_sequence
        return max((sd for sd, part in zip(sds, parts) if part.any() and sd > 0.0), default=1.0)

    def speeds(self, first: Any, second: Any) -> tuple[FloatArray, FloatArray]:
        """Return ``work`` and ``passes`` from two independent standard normals; ``first`` is
        ``passes``, and ``second`` the part of ``work`` that does not depend on it."""
        first = np.asarray(first, dtype=np.float64)
        if self.unknowns < 2:
            return first, first
        return (
            self.correlation * first + np.sqrt(1.0 - self.correlation**2) * np.asarray(second),
            first,
        )

    def take(self, rows: Any) -> Host:
        names = ("launch", "layer", "each_pass", "each_sequence", "server")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def spent(self, work: Any = 0.0, passes: Any = 0.0) -> tuple[FloatArray, FloatArray]:
        """Return the host's time (..., W), hidden time included: per pass and request, and for
        launches and sequences."""
        work, passes = (np.asarray(z, dtype=np.float64)[..., None] for z in (work, passes))
        launches = self.launch.sum(axis=1) * np.exp(self.launch_log_sd * work)
        sequences = self.each_sequence.sum(axis=1) * np.exp(self.sequence_log_sd * work)
        scheduled = self.each_pass.sum(axis=1) * np.exp(self.pass_log_sd * passes)
        return (
            scheduled + self.server.sum(axis=1) * np.exp(self.server_log_sd * passes),
            launches + sequences,
        )

    def total(
        self, device: FloatArray, segment: NDArray[Any], work: Any = 0.0, passes: Any = 0.0
    ) -> tuple[FloatArray, FloatArray]:
        """Return the time of the passes by phase (..., W, 2) on hosts of some speeds (...), and the
        time that follows the device. ``device`` (W, G) is the time of groups in segments (G,), see
        ``segment_of``."""
        work, passes = (np.asarray(z, dtype=np.float64)[..., None, None] for z in (work, passes))
        in_segment = (segment[:, None] == np.arange(6)).astype(np.float64)
        busy = (device @ in_segment).reshape(-1, 2, 3)
        spent, scheduled = busy.sum(axis=-1), self.each_pass * np.exp(self.pass_log_sd * passes)
        seconds, follows = spent + scheduled, spent + 0.0 * scheduled
        if np.count_nonzero(self.launch):
            launch = (self.launch @ in_segment).reshape(-1, 2, 3)
            launched = launch * np.exp(self.launch_log_sd * work)[..., None]
            eager = launch.any(axis=(0, 2))  # phases without a graph
            seconds, follows = (
                np.where(eager, beside, graph)
                for beside, graph in zip(
                    _beside(spent, busy, launched, scheduled), (seconds, follows)
                )
            )
        seconds = seconds + self.each_sequence * np.exp(self.sequence_log_sd * work)
        seconds = seconds + self.server * np.exp(self.server_log_sd * passes)
        return seconds, np.broadcast_to(follows, seconds.shape)


def _steps(workloads: WorkloadBatch, cpu: bool) -> tuple[FloatArray, FloatArray]:
    """Return the passes that the host schedules (W, 2) by phase, and the sequences of these
    passes."""
    rows, shape = workloads.rows, (len(workloads), 2)
    begins = rows.is_role("embedding").nonzero()[0]
    cell = workloads.owner[begins] * len(Phase) + rows.phase[begins]
    count = rows.count[begins]
    steps = sums(cell, count, shape)
    if rows.meta.phase == "serve":  # prompts are computed in the steps of others
        steps[:, Phase.PREFILL] = 0.0
    # on a CPU this is the sampler, which sees each checked position; else the scheduler
    each = rows.m[begins] / np.where(cpu, 1, np.maximum(rows.q_len[begins], 1))
    sequences = sums(cell, count * each, shape)
    sequences[:, Phase.PREFILL] = 0.0
    return steps, sequences


def launches(workloads: WorkloadBatch, engine: Engine) -> FloatArray:
    """Return the number of kernels of each workload and group. An engine may launch the kernels of
    routed experts once, per expert in use, or per expert."""
    groups, w = workloads.groups, workloads.rows
    times = groups.count
    if engine.experts != "grouped" and (routed := w.kind == EXPERTS).any():
        looped = np.ones(len(w))
        touched = experts_touched(
            *(column[routed] for column in (w.m, w.experts, w.active, w.skew))
        )
        looped[routed] = touched if engine.experts == "touched" else w.experts[routed]
        times = groups.sums(w.count * looped)
    return times * engine.kernels[groups.role]


def _beside(
    left: FloatArray, device: FloatArray, launch: FloatArray, after: FloatArray
) -> tuple[Any, Any]:
    """Return the time of one phase, and the device's part of it: the longest path, first along the
    host to a launch, then along the device. The last axis of ``device`` and ``launch`` are the
    three segments of a phase: before the layers, in the layers, after the layers. The device starts
    a segment after its launch and ends no earlier than the host, which works ``after`` the last
    launch. ``left`` is the time of all segments on the device."""
    launched: Any = 0.0
    longest, shown = left, left
    for part in range(3):
        way = launched + left
        shown, longest = np.where(way > longest, left, shown), np.maximum(longest, way)
        launched, left = launched + launch[..., part], left - device[..., part]
    launched = launched + after
    return np.maximum(longest, launched), np.where(launched > longest, 0.0, shown)


def by_formats(w: Workload, kind: int) -> Iterator[tuple[IndexArray, str, str]]:
    """Yield the rows of a kind by pair of number formats."""
    return (
        (rows.at, f.dtype, f.second) for operator, rows, f in w.operators() if operator.code == kind
    )


def section_of(w: Workload, row: int) -> str:
    """Return the section of a profile that times a row."""
    return BY_CODE[int(w.kind[row])].section(Rows(w, [row]))


def estimates(
    w: Workload, operators: Iterable[tuple[Operator, Rows, Formats]], hw: HardwareProfile
) -> Iterator[tuple[IndexArray, Estimate]]:
    """Yield rows of a workload's ``operators`` and the cost of one execution of each row."""
    engine = load_engine(w.meta.engine)
    for operator, rows, formats in operators:
        for name in operator.sizes:
            if np.count_nonzero(getattr(rows, name) < 1):
                array(name, getattr(rows, name), COUNT)  # raises
        sparse24 = engine.sparse24_kernels(formats.dtype, formats.second, hw.architecture)
        searched = sparse24 is None or sparse24.searched
        for some, e in operator.estimates(rows, hw, formats._replace(searched=searched)):
            if e.kind == _PROMPTS and (slower := sink_factor(w, engine, hw)) > 1.0:
                whole = w.window[rows.at[some]] == 0
                loadings = {**e.loadings, "sinks": whole.astype(np.float64)}
                e = replace(e, time=np.where(whole, slower, 1.0) * e.time, loadings=loadings)
            yield rows.at[some], e


def sink_factor(w: Workload, engine: Engine, hw: HardwareProfile) -> float:
    """Return the factor on attention of prompts to all positions if the model has sinks, which the
    engine's fastest kernel lacks on the device."""
    kernel, model = engine.sink_attention, w.meta.config
    if kernel is None or hw.architecture not in kernel.on or model is None:
        return 1.0
    sublayers = (sublayer for layer in model.layers for sublayer in layer.sublayers)
    return kernel.value if any(getattr(s, "sinks", False) for s in sublayers) else 1.0


def measured_engine(engine: Engine, hw: HardwareProfile) -> tuple[Engine, EngineTimes | None]:
    """Return an engine with the host times that were measured on a device, and all its measured
    times; None if this release was not measured there."""
    name = engine.name.partition("@")[0]  # a name with a version selects a generation
    times = hw.engines.get(name)
    if times is None:
        return engine, None
    if (
        engine.generations
        and selected(name, engine.generations, times.version).name != engine.generation
    ):
        return engine, None
    names = ("each_pass", "each_layer", "each_sequence")
    host: dict[str, Any] = {
        part: HostTime(getattr(times, part), times.host_log_sd, "") for part in names
    }
    return replace(engine, **host), times


def tokens_of(w: Workload) -> FloatArray:
    """Return the tokens that each row of a workload computes."""
    return np.asarray(
        np.where(w.is_attention, w.batch * np.maximum(w.q_len, 1), w.m), dtype=np.float64
    )


def engine_factors(
    w: Workload,
    hw: HardwareProfile,
    engine: Engine,
    seconds: FloatArray,
    roofline_s: FloatArray,
    codes: NDArray[Any],
) -> FloatArray:
    """Return the factor on each row's time by which an engine's kernels differ from measured
    kernels. If the engine was measured on this machine, its factors apply; else clocks fall under
    load, and GEMMs of one token may have a separate kernel. ``codes`` are bottlenecks."""
    out = np.ones(len(w))
    if (times := measured_engine(engine, hw)[1]) is not None:
        tokens = tokens_of(w)
        for operator in OPERATORS:
            if operator.name in times.operators:
                rows = w.kind == operator.code
                out[rows] = times.factor(operator.name, tokens[rows])
        least = np.minimum(roofline_s / np.maximum(seconds, 1e-300), 1.0)
        # their data may be in a cache
        return np.where(w.kind == ELEMENTWISE, out, np.maximum(out, least))
    loaded, one_token = hw.section("runtime", "*")["sustained"], engine.one_token.value
    if loaded == one_token == 1.0:
        return out
    rows = w.kind == GEMM
    before = seconds[rows]
    after = before * np.where(codes[rows] == _COMPUTE, loaded, 1.0)
    after *= np.where(w.m[rows] == 1, one_token, 1.0)
    out[rows] = np.maximum(after, np.minimum(roofline_s[rows], before)) / before
    return out


def streams(workloads: WorkloadBatch, engine: Engine, hw: HardwareProfile) -> FloatArray:
    """Return how many kernels stream the data of each row. Cache writes stream keys and values
    once; each kernel of another unfused elementwise operator streams all the data. On a CPU,
    calibration times the same composites of torch that eager engines run, so one stream has all
    their kernels."""
    groups = workloads.groups
    kernels = engine.kernels[groups.role]
    every = (
        (groups.kind == ELEMENTWISE) & (groups.role != _CACHE_WRITE) & (hw.architecture != "cpu")
    )
    return np.where(every, kernels, np.minimum(kernels, 1.0))[groups.of_row]


def gaps(
    workloads: WorkloadBatch, engine: Engine, hw: HardwareProfile, launched: FloatArray
) -> FloatArray:
    """Return the time (W, G) between the ``launched`` kernels of each group, s: idle time in a
    graph. A CPU is its own host: it waits after every kernel, and launches the further kernels of
    an operator, which the times of recurrences and convolutions include."""
    groups, runtime = workloads.groups, hw.section("runtime", "*")
    if hw.architecture != "cpu":
        graph = np.array([engine.in_graph(name) for name in ("prefill", "decode")])[
            groups.segment // 3
        ]
        return launched * (graph * (runtime["graph_gap_s"] + engine.gap.value))
    launched = np.where(np.isin(groups.kind, _RECURRENT), groups.count, launched)
    beside = np.maximum(launched - groups.count, 0.0)
    return launched * runtime["graph_gap_s"] + beside * runtime["host_op_s"]


def refusal(workloads: WorkloadBatch, architecture: str = "") -> str:
    """Return why an engine cannot run some workloads on an architecture ("": on any), or ""."""
    w, engine = workloads.rows, load_engine(workloads.rows.meta.engine)
    gemm = (w.kind == GEMM) & bool(w.meta.engine)
    sparse24 = gemm & (w.kernel == _SPARSE24)
    for codes in sorted(
        set(zip(w.dtype[sparse24].tolist(), w.weight_dtype[sparse24].tolist(), strict=True))
    ):
        dtype, weight = (DTYPES[code] for code in codes)
        if engine.sparse24_kernels(dtype, weight, architecture) is None:
            have = ", ".join(sparse24_engines(dtype, weight, architecture))
            formats = f"{weight} " if engine.sparse24 or DTYPE_BYTES[codes[1]] < 2.0 else ""
            place = f" on {architecture}" if engine.sparse24_kernels(dtype, weight) else ""
            return (
                f"{engine.name} has no {formats}2:4 kernels{place}; these engines have:"
                f" {have or 'none'}"
            )
    narrow = gemm & (DTYPE_BYTES[w.dtype] >= 2.0) & (DTYPE_BYTES[w.weight_dtype] < 2.0)
    for code in sorted(set(w.weight_dtype[narrow].tolist())):
        if DTYPES[code] not in engine.weight_only:
            have = ", ".join(engine.weight_only) or "none"
            hint = (
                "; --dtype fp8 computes in them" if DTYPES[code] in ("fp8_block", "nvfp4") else ""
            )
            hint += ", and --weight-dtype fp8 runs alone" * (DTYPES[code] == "fp8_block")
            return (
                f"{engine.name} has no kernels for {DTYPES[code]} weights alone; it has:"
                f" {have}{hint}"
            )
    return ""
