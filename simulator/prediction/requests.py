"""Make requests from settings (:func:`requests_of`), and group them by token budget
(:func:`by_budget`)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from simulator.arguments import OneOrMore, listed
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.model import Model
from simulator.request import SETTINGS, Request, known

T = TypeVar("T")
K = TypeVar("K")


def requests_of(models: Sequence[str | Model], settings: Mapping[str, Any]) -> list[Request]:
    """Return the request of every combination of models and of the settings that are lists, in the
    order of the fields of :class:`simulator.Request`; each value is used once."""
    known(settings)
    axes = {
        name: once(setting.check(value) for value in listed(name, settings[name]))
        for name, setting in SETTINGS.items()
        if not isinstance(given := settings.get(name), str | os.PathLike)
        and hasattr(given, "__iter__")
    }
    if "engine" in axes:
        axes["engine"] = engines_of(axes["engine"])
    axes = {"model": tuple(models), **axes}
    for name, values in axes.items():
        if not values:
            raise InputError(f"{name}: expected at least one")
    single = {name: value for name, value in settings.items() if name not in axes}
    load_engine(single.get("engine", Request.engine))
    requests = [
        Request(**single, **dict(zip(axes, values))) for values in itertools.product(*axes.values())
    ]
    for request in requests:
        _check_budget(request)
    for name, (expected, has_effect) in _EFFECTS.items():
        given = [r for r in requests if getattr(r, name) != SETTINGS[name].default]
        if given and not any(map(has_effect, given)):
            raise InputError(
                f"{name}: expected {expected}, as it has no effect otherwise, got"
                f" {getattr(given[0], name)}"
            )
    return requests


def _is_routed(request: Request) -> bool:
    return load_model(request.model).routed is not None


_EFFECTS: Mapping[str, tuple[str, Callable[[Request], bool]]] = {
    "cached_prefix": ("phase prefill, generate or serve", lambda r: r.phase != "decode"),
    "skew": ("a model with routed experts", _is_routed),
    "parallel": (
        "several devices (expert: and a model with routed experts)",
        lambda r: r.devices > 1 and (r.parallel != "expert" or _is_routed(r)),
    ),
}
"""Setting -> what it needs, and whether it changes a request."""


def _check_budget(request: Request) -> None:
    """Refuse a token budget that the engine does not have in this phase, or that its decode steps
    exceed."""
    budget, engine = request.token_budget, load_engine(request.engine)
    schedule = engine.schedule
    if budget is None:
        return
    if request.phase == "decode":
        raise InputError("token_budget: expected in prefill, generate or serve, got phase decode")
    if schedule is None and request.phase == "serve":
        raise InputError(f"token_budget: expected an engine with a scheduler, got {engine.name}")
    if schedule is None or request.phase == "prefill":
        return
    if schedule.decodes_count and request.batch > budget:
        raise InputError(
            f"token_budget: expected at least the {request.batch:,} tokens of a decode step, got"
            f" {budget:,}"
        )
    if request.phase == "serve" and not schedule.chunked and request.seq > budget:
        raise InputError(
            f"token_budget: expected at least the prompt of {request.seq:,} tokens, as"
            f" {engine.name} computes no chunks, got {budget:,}"
        )


def on(
    requests: Sequence[Request], hw: HardwareProfile, models: Iterable[Model] = ()
) -> list[Request]:
    """Return requests that differ only in shape, of the dense and further ``models``, with the
    arithmetic and the token budget of their engine on a GPU."""
    requests = [computed_on(r, hw, models) for r in requests]
    first = requests[0]
    limit = load_engine(first.engine).limit(hw.memory_bytes, hw.name)
    if first.token_budget is not None or limit is None or first.phase == "decode":
        return list(requests)
    if first.phase != "serve" and max(r.batch * r.seq for r in requests) <= limit.tokens:
        return list(requests)  # one pass with any budget
    return [replace(r, token_budget=limit.tokens) for r in requests]


def computed_on(request: Request, hw: HardwareProfile, models: Iterable[Model] = ()) -> Request:
    """Return a request with the formats in which its engine runs fp8, of the dense or of further
    ``models``, on a GPU without fp8 arithmetic: 16 bits with narrow weights. Other requests, and
    those of engines without such kernels, stay as they are."""
    every = (load_model(request.model), *models)
    asked = request.dtype or next((m.dtype for m in every if m.dtype == "fp8"), "")
    wide = next((name for name in ("bf16", "fp16") if name in hw.rates), "")
    alone = "fp8" in load_engine(request.engine).weight_only
    if asked != "fp8" or "fp8" in hw.rates or not (wide and alone):
        return request
    weight = request.weight_dtype
    if request.dtype and not weight:  # else as each checkpoint states
        weight = every[0].weight_dtype or "fp8"
    return replace(request, dtype=wide, weight_dtype=weight)


def by_budget(
    requests: Sequence[Request],
    hardware: Iterable[HardwareProfile],
    models: Iterable[Model] = (),
) -> list[tuple[list[Request], tuple[HardwareProfile, ...]]]:
    """Return requests that differ only in shape for each arithmetic and token budget of their
    engine on some devices, with these devices."""
    groups = dict[Request, tuple[list[Request], list[HardwareProfile]]]()
    for hw in hardware:
        same = on(requests, hw, models)
        groups.setdefault(same[0], (same, []))[1].append(hw)
    return [(same, tuple(devices)) for same, devices in groups.values()]


def check_measured(requests: Sequence[Request], hardware: Sequence[HardwareProfile]) -> None:
    """Reject a measured time for more than one model, device, engine and request."""
    if not requests or requests[0].dense_s is None:
        return
    for name in ("model", "hardware", "engine", "phase", "batch", "seq"):
        values = (
            {hw.label for hw in hardware}
            if name == "hardware"
            else {getattr(one, name) for one in requests}
        )
        if len(values) > 1:
            raise InputError(
                f"dense time: belongs to one request; expected one {name}, got {len(values)}"
            )


def dense_seconds(tokens_per_s: float | None, request: Request) -> float:
    """Return the time of a pass in s from its throughput: new tokens/s of all sequences, in prefill
    prompt tokens/s."""
    if tokens_per_s is None or not 0.0 < tokens_per_s < 1e12:
        raise InputError(f"tokens per second {tokens_per_s}: expected a positive number")
    each = {"prefill": request.seq, "decode": 1}.get(request.phase, request.new_tokens)
    return request.batch * each / tokens_per_s


def batch_name(phase: str) -> str:
    return "concurrency" if phase == "serve" else "batch"


class Predicted(Protocol):
    """A prediction of a request on some devices."""

    @property
    def hardware(self) -> str: ...
    @property
    def devices(self) -> int: ...
    @property
    def engine(self) -> str: ...
    @property
    def phase(self) -> str: ...
    @property
    def batch(self) -> int: ...
    @property
    def seq(self) -> int: ...


def setting(r: Predicted) -> str:
    """Return devices, engine and request of a prediction as part of a sentence."""
    return (
        f"{device_text(r)} in {r.engine} ({r.phase}, {batch_name(r.phase)} {r.batch}, seq {r.seq})"
    )


def device_text(r: Any) -> str:
    """Return the device with its number, if the prediction is of several, and its power limit."""
    return f"{r.devices} x {kind_text(r)}" if r.devices > 1 else kind_text(r)


def kind_text(r: Any) -> str:
    """Return the device with its power limit."""
    limit = getattr(r, "power_limit", None)
    return r.hardware if limit is None else f"{r.hardware} under {limit:g} W (assumed)"


def once(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))


def by_key(values: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return values by key, in order."""
    out: dict[K, list[T]] = {}
    for value in values:
        out.setdefault(key(value), []).append(value)
    return out


def models_of(models: OneOrMore[str | Model]) -> list[Model]:
    """Load models, each once; raise InputError for two of one name, which results cannot
    distinguish."""
    return distinct(((source, load_model(source)) for source in listed("model", models)), "model")


def distinct(loaded: Iterable[tuple[object, Model]], kind: str) -> list[Model]:
    """Return models as :func:`models_of`, from pairs of a source and its model."""
    named = ((source, model.name, model) for source, model in loaded)
    return [model for model, _ in _by_name(named, kind, "models").values()]


def engines_of(engines: OneOrMore[str]) -> tuple[str, ...]:
    """Return names or paths of engines, each engine once; raise InputError for two of one name,
    which results cannot distinguish."""
    loaded = [(source, load_engine(source)) for source in listed("engine", engines)]
    # one file may be given by two paths
    named = ((source, engine.name, replace(engine, path=None)) for source, engine in loaded)
    return tuple(str(source) for _, source in _by_name(named, "engine", "engines").values())


def profiles(hardware: OneOrMore[str | HardwareProfile]) -> list[HardwareProfile]:
    """Load devices, each once; raise InputError for none, and for two of one name, which results
    cannot distinguish."""
    loaded = [load_hardware(h) for h in listed("hardware", hardware)]
    named = ((str(hw.path or "a profile without a file"), hw.label, hw) for hw in loaded)
    by_label = _by_name(named, "hardware", "profiles")
    if not by_label:
        raise InputError("hardware: expected at least one")
    return [hw for hw, _ in by_label.values()]


def _by_name(
    named: Iterable[tuple[object, str, T]], kind: str, several: str
) -> dict[str, tuple[T, object]]:
    """Return values with their sources by name; raise InputError for two different ones of one
    name."""
    out: dict[str, tuple[T, object]] = {}
    for source, name, value in named:
        other, first = out.setdefault(name, (value, source))
        if other is not value and other != value:
            both = " and ".join(
                str(x) if isinstance(x, str | os.PathLike) else "an object without a path"
                for x in (first, source)
            )
            raise InputError(f"{kind}: {both}: two {several} are called {name}; rename one of them")
    return out
