"""How a model is run, and the checks of what a person may ask for: phases, batches, lengths, number formats,
devices."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from simulator.arguments import LEVEL, SECONDS, instance, number, shown, whole
from simulator.engines import DEFAULT_ENGINE
from simulator.engines.engine import load_engine
from simulator.errors import InputError, unknown
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.lower import SKEW, lower, stream_of
from simulator.models.parallel import PARALLEL as PARALLEL
from simulator.pruning import check_fraction as check_fraction
from simulator.routing import EXPERT_SKEW
from simulator.workload import DTYPES, PHASES

if TYPE_CHECKING:
    from simulator.models.config import ModelConfig
    from simulator.workload import Workload

T = TypeVar("T")

MAX_TOKENS = 2**31 - 1
"""Tokens of a pass (batch x sequence) that the cost models are meant for: row indices of real kernels are 32-bit."""


@dataclass(frozen=True)
class Setting:
    """How a model is run: what :func:`simulator.lower` needs, besides phase, batch and length, and what is known."""

    new_tokens: int = 128
    engine: str = DEFAULT_ENGINE
    dtype: str = "bf16"
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    devices: int = 1
    parallel: str = "tensor"
    skew: float = EXPERT_SKEW
    level: float = 0.9
    dense_s: float | None = None  # measured time of the dense model's pass

    def __post_init__(self) -> None:
        load_engine(self.engine)
        one_of("parallel", self.parallel, PARALLEL)
        for name, dtype in (("dtype", self.dtype), ("weight dtype", self.weight_dtype), ("kv dtype", self.kv_dtype)):
            if dtype is not None:
                one_of(name, dtype, DTYPES)
        whole_number("new tokens", self.new_tokens, 1_000_000)
        whole_number("devices", self.devices, 100_000)
        number("level", self.level, LEVEL)
        number("skew", self.skew, SKEW)
        if self.dense_s is not None:
            number("dense time", self.dense_s, SECONDS)

    @property
    def engine_name(self) -> str:
        """Name of the engine, also where it is a file."""
        return load_engine(self.engine).name

    @property
    def cache_dtype(self) -> str:
        """Format of the cache: where none is asked for, the residual stream's."""
        return self.kv_dtype or stream_of(self.dtype)

    def lower(self, model: ModelConfig, phase: str, batch: int, seq: int) -> Workload:
        """The dense workload of a model in this setting."""
        options = {**vars(self), "new_tokens": self.new_tokens if phase in ("generate", "serve") else 0}
        del options["level"], options["dense_s"]
        return lower(model, phase=phase, batch=batch, seq=seq, **options)


def dense_seconds(tokens_per_s: float | None, phase: str, batch: int, seq: int, new_tokens: int) -> float:
    """Time of a pass whose throughput is known, s: new tokens of all sequences a second, in prefill prompt tokens.

    >>> dense_seconds(50.0, "decode", 1, 2048, 128), dense_seconds(50.0, "generate", 2, 12, 100)
    (0.02, 4.0)
    """
    if tokens_per_s is None or not 0.0 < tokens_per_s < 1e12:
        raise InputError(f"tokens a second {tokens_per_s}: expected a positive number")
    return batch * {"prefill": seq, "decode": 1}.get(phase, new_tokens) / tokens_per_s


def batch_name(phase: str) -> str:
    """What the number of sequences is called in a phase."""
    return "concurrency" if phase == "serve" else "batch"


def once(values: Iterable[T]) -> tuple[T, ...]:
    """Values without repeats, in order."""
    return tuple(dict.fromkeys(values))


def one_of(kind: str, name: str, choices: Sequence[str]) -> str:
    if not isinstance(name, str) or name not in choices:
        raise unknown(kind, name, choices)
    return name


def whole_number(name: str, value: int, largest: int = MAX_TOKENS) -> int:
    """A whole number from 1 up."""
    found = whole(value)
    if found is None or not 1 <= found <= largest:
        raise InputError(f"{name} {shown(value)}: expected a whole number from 1 to {largest}")
    return found


def profiles(hardware: Iterable[str | HardwareProfile]) -> list[HardwareProfile]:
    """Loaded devices, one named twice once. Two that bear one name are refused: a row says its device by name alone."""
    found: dict[str, HardwareProfile] = {}
    for hw in (load_hardware(h) if isinstance(h, str) else h for h in hardware):
        instance("hardware", hw, HardwareProfile, "load_hardware")
        if (other := found.setdefault(hw.label, hw)) is not hw:
            both = " and ".join(str(h.path or "a profile that no file holds") for h in (other, hw))
            raise InputError(f"hardware: {both}: two profiles are called {hw.label}; give one of them another name")
    return list(found.values())


def settings_of(setting: Setting | None, engines: Iterable[str]) -> list[Setting]:
    """A setting in each of some engines, one named twice once; in its own where there are none."""
    setting = Setting() if setting is None else instance("setting", setting, Setting, "simulator.predict.settings")
    found = {load_engine(name).path: name for name in engines}
    return [replace(setting, engine=name) for name in found.values() or (setting.engine,)]


def one_measured(setting: Setting, axes: Mapping[str, Sequence[Any]], requests: Sequence[Any]) -> None:
    """Refuse a measured time for more than one setting."""
    if setting.dense_s is None:
        return
    for name, values in {**axes, "phase, batch and seq": requests}.items():
        if len(values) > 1 and name not in ("family", "sparsity", "phase"):
            raise InputError(f"dense time: is of one setting; expected one {name}, got {len(values)}")


def requests_of(phase: Iterable[str], batch: Iterable[int], seq: Iterable[int]) -> list[tuple[str, int, int]]:
    """Every phase, batch and length together, each checked and none twice."""
    phases = once(one_of("phase", p, PHASES) for p in phase)
    batches, seqs = (once(whole_number(name, n) for n in axis) for name, axis in (("batch", batch), ("seq", seq)))
    return list(itertools.product(phases, batches, seqs))
