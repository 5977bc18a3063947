"""Describe the request that a workload was lowered from, and the pruning steps that were applied to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Applied:
    """One pruning step of a workload."""

    family: str
    sparsity: float  # requested: a scalar, or the mean over projections or layers
    realised: float  # after rounding


@dataclass(frozen=True)
class Meta:
    """Request that a workload was lowered from, and its pruning steps."""

    model: str = ""
    phase: str = "decode"  # one of simulator.codes.PHASES
    batch: int = 1  # sequences; in serve, requests in flight
    seq: int = 1  # prompt tokens per sequence; in decode, cached positions
    new_tokens: int = 0  # new tokens per request of generate or serve
    cached: int = 0  # prompt tokens per sequence in the prefix cache
    budget: int = 0  # tokens of prompts in one step; 0: unlimited
    dtype: str = "bf16"
    layers: int = 0  # decoder layers of the dense model
    hidden: int = 0
    devices: int = 1
    parallel: str = "none"  # none, tensor or pipeline
    link: str = ""  # connection of the devices; "": the usual one of the hardware
    engine: str = ""  # name or path; "": bare kernels
    applied: tuple[Applied, ...] = ()
    config: Any = field(default=None, compare=False, repr=False)  # ModelConfig of the model


NO_REQUEST = Meta()
"""Of a workload that was made from rows or columns."""
