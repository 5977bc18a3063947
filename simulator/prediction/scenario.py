"""Define scenarios: a model in an engine, a phase with batches and lengths, number formats and devices.

Use :class:`Scenario` for one, :func:`scenarios` for every combination of some axes. Phases, batches, lengths and
devices are checked here.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from simulator.arguments import LEVEL, SECONDS, OneOrMore, instance, listed, number, shown, whole
from simulator.codes import DTYPES, PHASES
from simulator.engines import DEFAULT_ENGINE
from simulator.engines.engine import Engine, load_engine
from simulator.errors import InputError, unknown
from simulator.hardware.library import load_hardware
from simulator.hardware.link import check as check_link
from simulator.hardware.profile import HardwareProfile
from simulator.models.config import PARALLEL as PARALLEL
from simulator.models.library import load_model
from simulator.models.lower import SKEW, lower
from simulator.operators.experts import EXPERT_SKEW
from simulator.pruning import check_fraction as check_fraction

if TYPE_CHECKING:
    from simulator.models.config import ModelConfig
    from simulator.workload import Workload

T = TypeVar("T")
MAX_TOKENS = 2**31 - 1  # largest batch x sequence of a pass: row indices of kernels have 32 bits


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One model in one engine and phase at some batches and lengths.

    Functions with axes (:func:`simulator.table`) take a scenario as a template: the axes replace its model, engine,
    phase and shapes.

    Parameters
    ----------
    model : str or ModelConfig
        Name, path or shapes of the model; "" in a template.
    phase : str
        Of prefill, decode, generate and serve.
    shapes : tuple of (int, int)
        Batch, and tokens (prefill) or cached positions (decode).
    new_tokens : int
        Tokens that generate and serve decode.
    cached_prefix : float
        Tokens of each prompt that the prefix cache holds, or a share of the prompt below 1.
    token_budget : int, optional
        Most tokens of a step (:func:`simulator.lower`). Default: the engine's on the GPU.
    engine : str
        Name or path of the engine, with a version or generation if needed (``vllm@0.19``, ``vllm@v1``).
    dtype : str
        Number format of activations and arithmetic.
    weight_dtype, kv_dtype : str, optional
        Number formats of weights (default: of the checkpoint, else ``dtype``) and of the K/V cache (default: ``dtype``,
        or bf16 below 16 bits).
    devices : int
        Number of devices.
    parallel : str
        How the model is divided among devices: tensor, pipeline or expert.
    link : str, optional
        What joins the devices: nvswitch, xgmi, bridge, pcie or pcie-host, also with a generation and lanes (pcie4x8).
        Default: the usual connection of the hardware.
    skew : float
        Load of routed experts: 0 is uniform; 1 gives the busiest expert 200 times the load of the least busy.
    ideal : bool
        Exclude the work that pruning adds.
    level : float
        Level of the intervals, in (0, 1).
    dense_s : float, optional
        Measured time of the dense model's pass, s.

    Examples
    --------
    >>> scenario = Scenario(model="llama-3.1-8b", phase="decode", shapes=((1, 2048), (8, 2048)))
    >>> [w.meta.batch for w in scenario.workloads]
    [1, 8]
    """

    model: str | ModelConfig = ""
    phase: str = "decode"
    shapes: tuple[tuple[int, int], ...] = ((1, 2048),)
    new_tokens: int = 128
    cached_prefix: float = 0.0
    token_budget: int | None = None
    engine: str = DEFAULT_ENGINE
    dtype: str = "bf16"
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    devices: int = 1
    parallel: str = "tensor"
    link: str | None = None
    skew: float = EXPERT_SKEW
    ideal: bool = False
    level: float = 0.9
    dense_s: float | None = None

    def __post_init__(self) -> None:
        load_engine(self.engine)
        one_of("parallel", self.parallel, PARALLEL)
        if self.link is not None:
            check_link(self.link)
        for name, dtype in (("dtype", self.dtype), ("weight dtype", self.weight_dtype), ("kv dtype", self.kv_dtype)):
            if dtype is not None:
                one_of(name, dtype, DTYPES)
        whole_number("new tokens", self.new_tokens, 1_000_000)
        whole_number("devices", self.devices, 100_000)
        if self.token_budget is not None:
            whole_number("token budget", self.token_budget)
        number("level", self.level, LEVEL)
        number("skew", self.skew, SKEW)
        if self.dense_s is not None:
            number("dense time", self.dense_s, SECONDS)

    @property
    def engine_name(self) -> str:
        """Name of the engine, also of one loaded from a path, with the version if one was given (vllm@0.19)."""
        return load_engine(self.engine).name

    @cached_property
    def workloads(self) -> tuple[Workload, ...]:
        """Dense workloads of the model, one per shape."""
        return tuple(
            lower(
                load_model(self.model),
                phase=self.phase,
                batch=batch,
                seq=seq,
                new_tokens=self.new_tokens if self.phase in ("generate", "serve") else 0,
                dtype=self.dtype,
                weight_dtype=self.weight_dtype,
                kv_dtype=self.kv_dtype,
                engine=self.engine,
                devices=self.devices,
                parallel=self.parallel,
                link=self.link,
                skew=self.skew,
                token_budget=self.token_budget,
                cached_prefix=self.cached_prefix,
            )
            for batch, seq in self.shapes
        )

    def on(self, hw: HardwareProfile) -> Scenario:
        """Return the scenario with the token budget of its engine on the GPU ``hw``."""
        limit = load_engine(self.engine).limit(hw.memory_bytes, hw.name)
        if self.token_budget is not None or limit is None or self.phase == "decode":
            return self
        if self.phase != "serve" and max(batch * seq for batch, seq in self.shapes) <= limit.tokens:
            return self  # one pass with any budget
        return replace(self, token_budget=limit.tokens)


def scenarios(
    template: Scenario | None,
    models: OneOrMore[str | ModelConfig],
    engine: OneOrMore[str],
    phase: OneOrMore[str],
    batch: OneOrMore[int],
    seq: OneOrMore[int],
) -> list[Scenario]:
    """Return every combination of models, engines (none: the template's), phases, batches and lengths, in this order;
    values are checked and used once."""
    template = (
        Scenario() if template is None else instance("scenario", template, Scenario, "simulator.prediction.scenario")
    )
    models, engines = models_of(models), engines_of(engine) or (template.engine,)
    phases = once(one_of("phase", p, PHASES) for p in listed("phase", phase))
    batches, lengths = (
        once(whole_number(name, n) for n in listed(name, values)) for name, values in (("batch", batch), ("seq", seq))
    )
    axes: tuple[tuple[str, Sequence[object]], ...] = (
        ("model", models),
        ("phase", phases),
        ("batch", batches),
        ("seq", lengths),
    )
    for name, values in axes:
        if not values:
            raise InputError(f"{name}: expected at least one")
    for b, s in itertools.product(batches, lengths):
        if b * s > MAX_TOKENS and set(phases) != {"decode"}:
            raise InputError(f"batch {b} x seq {s}: expected at most {MAX_TOKENS} tokens in a pass")
    return [
        replace(template, model=m, engine=e, phase=p, shapes=((b, s),))
        for m, e, p, b, s in itertools.product(models, engines, phases, batches, lengths)
    ]


def by_budget(
    scenario: Scenario, hardware: Iterable[HardwareProfile]
) -> list[tuple[Scenario, tuple[HardwareProfile, ...]]]:
    """Return a scenario for each token budget of its engine on some devices, with the devices of that budget."""
    groups: dict[int | None, tuple[Scenario, list[HardwareProfile]]] = {}
    for hw in hardware:
        one = scenario.on(hw)
        groups.setdefault(one.token_budget, (one, []))[1].append(hw)
    return [(one, tuple(devices)) for one, devices in groups.values()]


def check_measured(found: Sequence[Scenario], hardware: Sequence[HardwareProfile]) -> None:
    """Reject a measured time for more than one model, device, engine and request."""
    if not found or found[0].dense_s is None:
        return
    axes: dict[str, set[object]] = {
        "model": {s.model for s in found},
        "hardware": {hw.label for hw in hardware},
        "engine": {s.engine for s in found},
        "phase": {s.phase for s in found},
        "batch": {batch for s in found for batch, _ in s.shapes},
        "seq": {seq for s in found for _, seq in s.shapes},
    }
    for name, values in axes.items():
        if len(values) > 1:
            raise InputError(f"dense time: belongs to one scenario; expected one {name}, got {len(values)}")


def dense_seconds(tokens_per_s: float | None, phase: str, batch: int, seq: int, new_tokens: int) -> float:
    """Return the time of a pass in s from its throughput: new tokens/s of all sequences, in prefill prompt tokens/s."""
    if tokens_per_s is None or not 0.0 < tokens_per_s < 1e12:
        raise InputError(f"tokens per second {tokens_per_s}: expected a positive number")
    return batch * {"prefill": seq, "decode": 1}.get(phase, new_tokens) / tokens_per_s


def batch_name(phase: str) -> str:
    """Return the name of the number of sequences in a phase."""
    return "concurrency" if phase == "serve" else "batch"


def setting(r: Any) -> str:
    """Return devices, engine and request of a prediction as part of a sentence."""
    return f"{device_text(r)} in {r.engine} ({r.phase}, {batch_name(r.phase)} {r.batch}, seq {r.seq})"


def device_text(r: Any) -> str:
    """Return the device with its number, if the prediction is of several."""
    return f"{r.devices} x {r.hardware}" if r.devices > 1 else r.hardware


def once(values: Iterable[T]) -> tuple[T, ...]:
    """Return values without repeats, in order."""
    return tuple(dict.fromkeys(values))


def one_of(kind: str, name: str, choices: Sequence[str]) -> str:
    """Return a name, which must be one of the choices."""
    if not isinstance(name, str) or name not in choices:
        raise unknown(kind, name, choices)
    return name


def whole_number(name: str, value: int, largest: int = MAX_TOKENS) -> int:
    """Return a whole number from 1 up."""
    found = whole(value)
    if found is None or not 1 <= found <= largest:
        raise InputError(f"{name} {shown(value)}: expected a whole number from 1 to {largest}")
    return found


def models_of(models: OneOrMore[str | ModelConfig], kind: str = "model") -> list[ModelConfig]:
    """Load models, each once; raise InputError for two of one name, which results cannot distinguish."""
    return distinct(((source, load_model(source)) for source in listed(kind, models)), kind)


def distinct(loaded: Iterable[tuple[object, ModelConfig]], kind: str) -> list[ModelConfig]:
    """Return models as :func:`models_of`, from pairs of a source and its model."""
    found: dict[str, tuple[ModelConfig, object]] = {}
    for source, model in loaded:
        other, first = found.setdefault(model.name, (model, source))
        if other != model:
            raise _ambiguous(kind, "models", first, source, model.name)
    return [model for model, _ in found.values()]


def engines_of(engines: OneOrMore[str]) -> tuple[str, ...]:
    """Return names or paths of engines, each engine once; raise InputError for two of one name, which results cannot
    distinguish."""
    found: dict[str, tuple[Engine, str]] = {}
    for source in listed("engine", engines):
        engine = load_engine(source)
        other, first = found.setdefault(engine.name, (engine, source))
        if replace(other, path=engine.path) != engine:  # one file may be given by two paths
            raise _ambiguous("engine", "engines", first, source, engine.name)
    return tuple(source for _, source in found.values())


def _ambiguous(kind: str, several: str, first: object, second: object, name: str) -> InputError:
    """Return the error for two inputs of one name, with their paths."""
    one, other = (str(x) if isinstance(x, str | os.PathLike) else "an object without a path" for x in (first, second))
    return InputError(f"{kind}: {one} and {other}: two {several} are called {name}; rename one of them")


def profiles(hardware: OneOrMore[str | HardwareProfile]) -> list[HardwareProfile]:
    """Load devices, each once; raise InputError for none, and for two of one name, which results cannot distinguish."""
    found: dict[str, HardwareProfile] = {}
    for hw in (load_hardware(h) if isinstance(h, str) else h for h in listed("hardware", hardware)):
        instance("hardware", hw, HardwareProfile, "load_hardware")
        if (other := found.setdefault(hw.label, hw)) is not hw:
            both = " and ".join(str(h.path or "a profile without a file") for h in (other, hw))
            raise InputError(f"hardware: {both}: two profiles are called {hw.label}; rename one of them")
    if not found:
        raise InputError("hardware: expected at least one")
    return list(found.values())
