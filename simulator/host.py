"""The host: the time of an engine's scheduler and of kernel launches, in parallel with the device or before it.

Under a CUDA graph a pass waits for the scheduler, then its kernels follow one another. In eager mode the host launches
every kernel while the device works on earlier ones; only fewer launches, not smaller kernels, make a host-bound model
faster.

Two numbers describe the speed of a host, in standard deviations of the logs: ``passes`` of its time per pass, ``work``
of its time per launch and per sequence; 0 is the typical (median) host. Over hosts they are correlated, not equal: a
measured time of a whole pass determines their sum, not how it divides between the pass and the layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import FloatArray
from simulator.codes import EXPERTS, ROLES, Phase
from simulator.engines.engine import Engine
from simulator.operators.experts import experts_touched
from simulator.workload import WorkloadBatch, sums

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

_NORM = ROLES.index("attention_norm")


@dataclass(frozen=True)
class Host:
    """Host time of each of W workloads by phase, s, of the typical host, and how far hosts differ."""

    launch: FloatArray  # (W, G) to launch a group's kernels, in parallel with the device; 0 where a graph does
    launch_log_sd: float
    layer: FloatArray  # (W,) to launch one layer
    each_pass: FloatArray  # (W, 2) before the device can start
    pass_log_sd: float
    each_sequence: FloatArray  # (W, 2)
    sequence_log_sd: float
    correlation: float = 1.0  # of ``passes`` and ``work``; 1: one unknown

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
        """Return the host of a pass; ``launched`` are its :func:`launches`, ``launch_s`` is its time per launch, the
        rest is the engine's. A device that is its own host (a CPU) has none next to it."""
        groups, rows = workloads.groups, workloads.rows
        none = np.zeros((len(workloads), 2))
        if hw.architecture == "cpu":
            return cls(np.zeros(groups.count.shape), 0.0, none[:, 0], none, 0.0, none, 0.0)
        waits = np.array([not engine.in_graph(name) for name in ("prefill", "decode")])
        launch = launched * (waits[groups.segment // 3] * launch_s)
        begins = rows.is_role("embedding").nonzero()[0]
        owner, phase, count = workloads.owner[begins], rows.phase[begins], rows.count[begins]
        steps = sums(owner * len(Phase) + phase, count, none.shape)
        sequences = sums(owner * len(Phase) + phase, count * rows.m[begins], none.shape)
        sequences[:, Phase.PREFILL] = 0.0
        if rows.meta.phase == "serve":  # prompts are computed in the steps of others
            steps[:, Phase.PREFILL] = 0.0
        layers = groups.count[:, groups.role == _NORM].sum(axis=1)
        return cls(
            launch=launch,
            launch_log_sd=launch_log_sd,
            layer=launch[:, groups.segment % 3 == 1].sum(axis=1) / np.maximum(layers, 1.0),
            each_pass=steps * engine.each_pass.value,
            pass_log_sd=engine.each_pass.log_sd,
            each_sequence=sequences * engine.each_sequence.value,
            sequence_log_sd=engine.each_sequence.log_sd,
            correlation=engine.host_correlation.value,
        )

    def __bool__(self) -> bool:
        return self.unknowns > 0

    @cached_property
    def unknowns(self) -> int:
        """Number of independent speeds of the host: 0 without host time, 1 if only one kind of time is spent."""
        passes, launched, work = map(np.count_nonzero, (self.each_pass, self.launch, self.each_sequence))
        work += launched
        return 2 if passes and work and self.correlation < 1.0 else int(bool(passes or work))

    def speeds(self, first: Any, second: Any) -> tuple[FloatArray, FloatArray]:
        """Return the speeds ``work`` and ``passes`` for two independent standard normals: the speed of passes, and what
        the speed of the other host time does not share with it."""
        first = np.asarray(first, dtype=np.float64)
        if self.unknowns < 2:
            return first, first
        return self.correlation * first + np.sqrt(1.0 - self.correlation**2) * np.asarray(second), first

    def take(self, rows: Any) -> Host:
        """Return the host of some workloads."""
        names = ("launch", "layer", "each_pass", "each_sequence")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def spent(self, work: Any = 0.0, passes: Any = 0.0) -> tuple[FloatArray, FloatArray]:
        """Return the host's time (..., W), hidden or not: per pass, and for launches and sequences."""
        work, passes = (np.asarray(z, dtype=np.float64)[..., None] for z in (work, passes))
        launches = self.launch.sum(axis=1) * np.exp(self.launch_log_sd * work)
        sequences = self.each_sequence.sum(axis=1) * np.exp(self.sequence_log_sd * work)
        return self.each_pass.sum(axis=1) * np.exp(self.pass_log_sd * passes), launches + sequences

    def total(
        self, device: FloatArray, segment: NDArray[Any], work: Any = 0.0, passes: Any = 0.0
    ) -> tuple[FloatArray, FloatArray]:
        """Return the time of the passes by phase (..., W, 2) on hosts of some speeds (...), and how much of it follows
        the device. ``device`` (W, G) is of groups of operators of segments (G,), see ``segment_of``."""
        work, passes = (np.asarray(z, dtype=np.float64)[..., None, None] for z in (work, passes))
        in_segment = (segment[:, None] == np.arange(6)).astype(np.float64)
        busy = (device @ in_segment).reshape(-1, 2, 3)
        spent, scheduled = busy.sum(axis=-1), self.each_pass * np.exp(self.pass_log_sd * passes)
        seconds, follows = spent + scheduled, spent + 0.0 * scheduled
        if np.count_nonzero(self.launch):
            launch = (self.launch @ in_segment).reshape(-1, 2, 3)
            launched = launch * np.exp(self.launch_log_sd * work)[..., None]
            eager = launch.any(axis=(0, 2))  # phases that no graph launches
            seconds, follows = (
                np.where(eager, beside, graph)
                for beside, graph in zip(_beside(spent, busy, launched, scheduled), (seconds, follows))
            )
        seconds = seconds + self.each_sequence * np.exp(self.sequence_log_sd * work)
        return seconds, np.broadcast_to(follows, seconds.shape)


def launches(workloads: WorkloadBatch, engine: Engine) -> FloatArray:
    """Return the kernels of each workload and group: those of an operator per execution; if the engine computes routed
    experts one by one, those of an expert per expert that some token uses, or per expert."""
    groups, w = workloads.groups, workloads.rows
    times = groups.count
    if engine.experts != "grouped" and (routed := w.kind == EXPERTS).any():
        looped = np.ones(len(w))
        touched = experts_touched(*(column[routed] for column in (w.m, w.experts, w.active, w.skew)))
        looped[routed] = touched if engine.experts == "touched" else w.experts[routed]
        times = groups.sums(w.count * looped)
    return np.asarray(times * engine.kernels[groups.role])


def _beside(left: FloatArray, device: FloatArray, launch: FloatArray, after: FloatArray) -> tuple[Any, Any]:
    """Return the time of one phase, and the device's part of it: the longest path along the host to a kernel, then the
    device. Within a phase the stream is: what precedes the layers, the layers (a mix too even to matter), what follows
    them: the last axis of ``device`` and ``launch``. The device can start a segment only when the host has launched it,
    and ends no earlier than the host, which works ``after`` the last launch. ``left`` is the time of all three on the
    device."""
    launched: Any = 0.0
    longest, shown = left, left
    for part in range(3):
        way = launched + left
        shown, longest = np.where(way > longest, left, shown), np.maximum(longest, way)
        launched, left = launched + launch[..., part], left - device[..., part]
    launched = launched + after
    return np.maximum(longest, launched), np.where(launched > longest, 0.0, shown)
