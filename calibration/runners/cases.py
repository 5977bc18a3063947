"""Cases of :mod:`calibration.runners.compare` and :mod:`calibration.runners.upper_bound`, their predicted speedups, and
the profile of the device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from calibration.devices.protocol import Device
from calibration.fit.base_profile import base_profile
from calibration.runners.runs import DATASHEET, PROFILE, check_folder
from simulator.errors import InputError
from simulator.hardware.library import list_hardware, load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.save import save_hardware
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.predict.batch import batch_with
from simulator.predict.prunings import families as family_names
from simulator.predict.result import Result
from simulator.predict.scenario import Scenario, check_fraction, once, one_of, whole_number
from simulator.predict.speedup import speedup
from simulator.pruning import prune
from simulator.workload import PHASES, Workload


@dataclass(frozen=True)
class CaseRow:
    """First columns of the tables of both commands, in their order."""

    model: str
    device: str
    hardware: str
    family: str
    sparsity: float
    realised_sparsity: float
    phase: str
    batch: int
    seq: int
    dtype: str


@dataclass(frozen=True)
class Case:
    """A dense and a pruned workload of a model in one setting."""

    family: str
    sparsity: float
    phase: str
    batch: int
    seq: int
    dense: Workload
    pruned: Workload

    @property
    def identity(self) -> dict[str, Any]:
        """The model, and the fields that identify the case among others of the model."""
        names = ("family", "sparsity", "phase", "batch", "seq")
        return {"model": self.dense.meta.model, **{name: getattr(self, name) for name in names}}

    def run_in(self, engine: str) -> Case:
        """Return the case with the launches of an engine that fuses the same operators."""
        dense, pruned = (w.replace(meta=replace(w.meta, engine=engine)) for w in (self.dense, self.pruned))
        return replace(self, dense=dense, pruned=pruned)

    def columns(self, hw: HardwareProfile, s: Result) -> dict[str, Any]:
        """Return the columns of the case and its prediction that both tables contain."""
        return {
            **self.identity,
            "realised_sparsity": self.pruned.meta.applied[-1].realised,
            "hardware": hw.name,
            "flop_bound": s.flop_bound,
            "byte_bound": s.byte_bound,
            "roofline_bound": s.roofline_bound,
            "predicted": s.speedup,
            "predicted_lower": s.lower,
            "predicted_upper": s.upper,
        }


def settings_of(
    model: str | ModelConfig,
    *,
    phases: Sequence[str] = ("prefill", "decode"),
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    families: Sequence[str] = ("all",),
    sparsities: Sequence[float] = (0.25, 0.5),
    scenario: Scenario | None = None,
    options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> tuple[list[Case], list[str]]:
    """Return every combination as a case, and a line for each that a family does not support.

    ``options`` are by family. InputError: unknown name, value out of range, or no case.

    >>> families = ["depth", "semi_structured"]
    >>> cases, notes = settings_of("smollm2-135m", phases=["decode"], families=families, sparsities=[0.25])
    >>> [(c.family, c.sparsity) for c in cases], len(notes)
    ([('depth', 0.25)], 1)
    """
    config = load_model(model) if isinstance(model, str) else model
    template, notes, cases = scenario or Scenario(), dict[str, None](), list[Case]()
    passes = itertools.product(
        once(one_of("phase", p, PHASES[:2]) for p in phases),
        once(whole_number("batch", b) for b in batch),
        once(whole_number("seq", s) for s in seq),
    )
    for phase, b, s in passes:
        (dense,) = replace(template, model=config, phase=phase, shapes=((b, s),)).workloads
        for family, fraction in itertools.product(family_names(families), once(check_fraction(f) for f in sparsities)):
            try:
                pruned = prune(dense, family, fraction, **options.get(family, {}))
                cases.append(Case(family, fraction, phase, b, s, dense, pruned))
            except InputError as error:
                notes[f"excluded: {family} at {fraction:g} in {phase}: {error}"] = None
    if not cases:
        raise InputError(next(iter(notes)).removeprefix("excluded: ") if notes else "nothing to compare")
    return cases, list(notes)


def fewer_layers(config: ModelConfig, layers: int | None) -> ModelConfig:
    """Return the first ``layers`` layers of a model, for little memory or time; the whole model if ``layers`` is None.

    >>> fewer_layers(load_model("llama-3.1-8b"), 4).layers
    4
    """
    if layers is None:
        return config
    if not 1 <= layers <= config.layers:
        raise InputError(f"--layers: expected 1 to {config.layers} for {config.name}, got {layers}")
    return replace(config, layers=layers, windows=config.windows[:layers], blocks=config.blocks[:layers])


def predicted_speedup(case: Case, hw: HardwareProfile) -> Result:
    """Return the predicted speedup of a case; NaN times and speedup if the device cannot run it."""
    try:
        return speedup(case.dense, case.pruned, hw)
    except InputError:
        batch = batch_with(case.dense, [case.pruned])
        return replace(
            speedup(case.dense, case.dense, hw),
            flop_bound=float(batch.flop_bound[1]),
            byte_bound=float(batch.byte_bound[1]),
            roofline_bound=math.nan,
            pruned_s=math.nan,
            speedup=math.nan,
            speedup_lower=math.nan,
            speedup_upper=math.nan,
        )


def profile_of(folder: str | Path, device: Device, dtype: str, hardware: str = "") -> HardwareProfile:
    """Return the profile for predictions of a device: the named one, else the folder's, else the shipped one.

    For other devices, the facts are measured and kept in the folder; constants are defaults, so predictions are
    uncalibrated.
    """
    path = check_folder(folder)
    kept = next((path / name for name in (PROFILE, DATASHEET) if (path / name).is_file()), None)
    if hardware or kept:
        profile = load_hardware(hardware or kept or "")
        profile.rate(dtype)  # raises for an unsupported number format
        return profile
    if device.name == "cpu" and "cpu" in list_hardware():
        return base_profile(device, dtype, "cpu")
    profile = replace(base_profile(device, dtype), path=None)
    path.mkdir(exist_ok=True)
    save_hardware(profile, path / DATASHEET)
    return profile
