"""A device with planted times of known noise, to try a calibration without hardware.

It runs in simulated time: a sample of L launches of t seconds advances its clock by L t, so a plan
of ten minutes runs in milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np

from calibration.devices.protocol import RECURRENT, Description, Gpu, Operator, Unsupported
from calibration.devices.telemetry import UNKNOWN, Reading, Snapshot
from simulator.errors import InputError

Seconds = Callable[[Operator], float]
MISALIGNED = 1.5  # factor on planted times of products that are not aligned

# SMs, highest clock and L2 of an H100 (NVIDIA, "H100 Tensor Core GPU Architecture", 2022): times of
# a device of one SM would have no waves
_GPU = Gpu(132, (9, 0), 80e9, max_clock_hz=1.98e9)
_PLANTED = Description("replay", "planted device", {"replay": "1"}, 80e9, 50e6, _GPU)


def roofline_timings(
    flop_per_s: float = 100e12, bytes_per_s: float = 1.5e12, floor_s: float = 3e-6
) -> Seconds:
    """Return the times of a simple device: a floor per launch, plus the 3-norm of arithmetic and
    memory time."""

    def seconds(op: Operator) -> float:
        return floor_s * op.launches + float(
            np.cbrt((op.flops / flop_per_s) ** 3 + (op.bytes / bytes_per_s) ** 3)
        )

    return seconds


def gpu_timings(plain: Seconds) -> Seconds:
    """Add to a simple device what the kernels of GPUs have: two launches of a pair of products, and
    slower arithmetic where rows are not multiples of 16 bytes."""

    def seconds(op: Operator) -> float:
        if op.kind == "low_rank":
            shapes = ((op.rank, op.k), (op.n, op.rank))
            return sum(seconds(Operator("gemm", op.dtype, m=op.m, n=n, k=k)) for n, k in shapes)
        odd = op.kind == "gemm" and (op.n * op.element_bytes % 16 or op.k * op.element_bytes % 16)
        return plain(op) * (MISALIGNED if odd else 1.0)

    return seconds


@dataclass
class _ReplayPrepared:
    device: ReplayDevice
    operator: Operator
    method: str = "replayed, one kernel"  # each planted time is that of one kernel

    def sample(self, loops: int) -> float:
        return self.device.play(self.operator, loops)


@dataclass(eq=False)
class ReplayDevice:
    timings: Seconds = field(default_factory=roofline_timings)
    _: KW_ONLY
    # relative standard deviation of a sample (log-normal, so times stay positive)
    noise: float = 0.0
    seed: int = 0
    description: Description = _PLANTED
    setup_s: float = 0.05  # simulated time of a preparation
    # unsupported kinds of operators, with reasons
    refused: Mapping[str, str] = field(default_factory=dict)
    formats: tuple[str, ...] = ("bf16", "fp16", "fp32")
    prepared: list[Operator] = field(default_factory=list)
    _now: float = 0.0

    def __post_init__(self) -> None:
        self.name = self.description.name
        self._rng = np.random.default_rng(self.seed)

    def describe(self) -> Description:
        return self.description

    def dtypes(self) -> tuple[str, ...]:
        return self.formats

    def refuses(self, operator: Operator) -> str:
        if operator.library:
            return "a planted device has no engine"
        return self.refused.get(operator.kind, "")

    def prepare(self, operator: Operator) -> _ReplayPrepared:
        self.prepared.append(operator)
        if reason := self.refuses(operator):
            raise Unsupported(reason)
        self._now += self.setup_s
        return _ReplayPrepared(self, operator)

    def play(self, operator: Operator, loops: int) -> float:
        value = self.timings(operator) * (
            math.exp(self.noise * self._rng.standard_normal()) if self.noise else 1.0
        )
        self._now += value * loops
        return value

    def snapshot(self) -> Snapshot:
        return Snapshot(1.98e9, 2.6e9, UNKNOWN, 61.0, 0.0, ())

    def energy_j(self) -> Reading:
        return UNKNOWN

    def clock(self) -> float:
        return self._now

    def rest(self, seconds: float) -> None:
        self._now += seconds

    def close(self) -> None:
        """Do nothing: there is nothing to free."""


def open_named(rest: str, **options: Any) -> ReplayDevice:
    if rest != "planted":
        raise InputError(
            f"device: expected replay:planted, got 'replay:{rest}'; to fit recorded times, use"
            " prunesim fit"
        )
    # their constants are not fitted, and those of GPUs have nothing to do with planted times; the
    # kernels of recurrences and indexers are those of other packages, as on a GPU
    without = "a planted device has no such kernel"
    kinds = ("gemm_2to4", "grouped_gemm", "indexer", *RECURRENT)
    timings = gpu_timings(roofline_timings())
    refused = dict.fromkeys(kinds, without)
    return ReplayDevice(timings, refused=refused, **options)
