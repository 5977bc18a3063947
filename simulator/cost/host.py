"""The host: the time of an engine's scheduler and of kernel launches, in parallel with the device or before it.

Under a CUDA graph a pass waits for the scheduler, then its kernels follow one another. In eager mode the host launches
every kernel while the device works on earlier ones. A pass is host-bound while kernels are shorter than their launches:
only fewer launches, not smaller kernels, make a model faster then.

One number ``z`` describes the speed of a host, in standard deviations of the logs: 0 is the typical (median) host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import FloatArray
from simulator.engines.engine import Engine
from simulator.routing import experts_touched
from simulator.workload import ROLES, Kind, Phase
from simulator.workload_batch import WorkloadBatch, sums

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

_NORM = ROLES.index("attention_norm")
PHASES = (int(Phase.PREFILL), int(Phase.DECODE))


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
        begins = np.flatnonzero(rows.is_role("embedding"))
        owner, phase, count = workloads.owner[begins], rows.phase[begins], rows.count[begins]
        steps = sums(owner * len(PHASES) + phase, count, none.shape)
        sequences = sums(owner * len(PHASES) + phase, count * rows.m[begins], none.shape)
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
        )

    def __bool__(self) -> bool:
        return bool(self.launch.any() or self.each_pass.any() or self.each_sequence.any())

    def total(self, device: FloatArray, segment: NDArray[Any], z: float) -> tuple[FloatArray, FloatArray]:
        """Return the time of the passes by phase (W, 2) on a host of speed ``z``, and how much of it follows the
        device.

        ``device`` (W, G) is of groups of operators of segments (G,), see ``segment_of``.
        """
        launch = self.launch * np.exp(self.launch_log_sd * z)
        scheduled = self.each_pass * np.exp(self.pass_log_sd * z)
        added = self.each_sequence * np.exp(self.sequence_log_sd * z)
        spent = np.stack([device[:, segment // 3 == p].sum(axis=1) for p in PHASES], axis=1)
        total, shown = spent + scheduled, spent.copy()
        for p in PHASES:
            if launch[:, segment // 3 == p].any():  # no graph launches them
                total[:, p], shown[:, p] = _beside(device, launch, segment, p, scheduled[:, p])
        return total + added, shown


def launches(workloads: WorkloadBatch, engine: Engine) -> FloatArray:
    """Return the kernels of each workload and group: those of an operator per execution, those of looped experts per
    expert that some token uses."""
    groups, w = workloads.groups, workloads.rows
    times, routed = groups.count, w.kind == Kind.EXPERTS
    if engine.experts == "looped" and routed.any():
        used = np.ones(len(w))
        used[routed] = experts_touched(*(column[routed] for column in (w.m, w.experts, w.active, w.skew)))
        times = groups.sums(w.count * used)
    return np.asarray(times * engine.kernels[groups.role])


def _beside(
    device: FloatArray, launch: FloatArray, segment: NDArray[Any], phase: int, after: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the time of one phase, and the device's part of it: the longest path along the host to a kernel, then the
    device.

    Within a phase the stream is: what precedes the layers, the layers (a mix too even to matter), what follows them.
    The device can start a segment only when the host has launched it, and ends no earlier than the host, which works
    ``after`` the last launch.
    """
    parts = [segment == 3 * phase + part for part in range(3)]
    left = device[:, segment // 3 == phase].sum(axis=1)
    launched, longest, shown = np.zeros(len(device)), left.copy(), left.copy()
    for part in parts:
        way = launched + left
        shown, longest = np.where(way > longest, left, shown), np.maximum(longest, way)
        launched = launched + launch[:, part].sum(axis=1)
        left = left - device[:, part].sum(axis=1)
    launched = launched + after
    return np.maximum(longest, launched), np.where(launched > longest, 0.0, shown)
