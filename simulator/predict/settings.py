"""How a model is run, and the checks of what a person may ask for: phases, batches, lengths, number formats,
devices."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from simulator.errors import InputError, unknown
from simulator.hardware.library import load_hardware
from simulator.models.lower import lower
from simulator.models.parallel import PARALLEL as PARALLEL
from simulator.pruning import check_fraction as check_fraction
from simulator.workload import DTYPES, PHASES, RUNTIMES

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig
    from simulator.workload import Workload

T = TypeVar("T")

MAX_TOKENS = 2**31 - 1
"""Tokens of a pass (batch x sequence) that the cost models are meant for: row indices of real kernels are 32-bit."""


@dataclass(frozen=True)
class Setting:
    """How a model is run: what :func:`simulator.lower` and the runtime need, besides phase, batch and length."""

    new_tokens: int = 128
    runtime: str = "cuda_graph"
    dtype: str = "bf16"
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    devices: int = 1
    parallel: str = "tensor"
    fuse_qkv: bool = False
    fuse_gate_up: bool = False
    level: float = 0.9

    def __post_init__(self) -> None:
        one_of("runtime", self.runtime, RUNTIMES)
        one_of("parallel", self.parallel, PARALLEL)
        for name, dtype in (("dtype", self.dtype), ("weight dtype", self.weight_dtype), ("kv dtype", self.kv_dtype)):
            if dtype is not None:
                one_of(name, dtype, DTYPES)
        whole_number("new tokens", self.new_tokens, 1_000_000)
        whole_number("devices", self.devices, 100_000)
        if not 0.0 < self.level < 1.0:
            raise InputError(f"level {self.level!r}: expected a number between 0 and 1, such as 0.9")

    def lower(self, model: ModelConfig, phase: str, batch: int, seq: int) -> Workload:
        """The dense workload of a model in this setting."""
        options = {**vars(self), "new_tokens": self.new_tokens if phase == "generate" else 0}
        del options["runtime"], options["level"]
        return lower(model, phase=phase, batch=batch, seq=seq, **options)


def once(values: Iterable[T]) -> tuple[T, ...]:
    """Values without repeats, in order."""
    return tuple(dict.fromkeys(values))


def one_of(kind: str, name: str, choices: Sequence[str]) -> str:
    if name not in choices:
        raise unknown(kind, name, choices)
    return name


def whole_number(name: str, value: int, largest: int = MAX_TOKENS) -> int:
    """A whole number from 1 up."""
    if not 1 <= value <= largest:
        raise InputError(f"{name} {value}: expected a whole number from 1 to {largest}")
    return int(value)


def profiles(hardware: Iterable[str | HardwareProfile]) -> list[HardwareProfile]:
    """Loaded devices, one named twice once."""
    found = [load_hardware(h) if isinstance(h, str) else h for h in hardware]
    return list({hw.label: hw for hw in found}.values())


def requests_of(phase: Iterable[str], batch: Iterable[int], seq: Iterable[int]) -> list[tuple[str, int, int]]:
    """Every phase, batch and length together, each checked and none twice."""
    return [
        (one_of("phase", p, PHASES), whole_number("batch", b), whole_number("seq", s))
        for p, b, s in itertools.product(once(phase), once(batch), once(seq))
    ]
