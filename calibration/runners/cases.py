"""The cases of a comparison or of upper bounds, their predicted speedups, and the runners that time
them.

A runner times a dense and a pruned model in alternating passes: disturbances affect both, so the
ratio is stable.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from calibration.devices.protocol import CaptureFailed, Device, Sampler, Unsupported
from calibration.fit.base_profile import base_profile
from calibration.measure.power import (
    BUSY,
    TURN_S,
    has_counter,
    launches,
    mean_power,
)
from calibration.measure.run import FAILED, SKIPPED, UNSUPPORTED
from calibration.measure.timing import OK, median_interval
from calibration.records.timing_table import Row
from calibration.runners.runs import DATASHEET, PROFILE, check_folder
from simulator.codes import PHASES
from simulator.errors import InputError
from simulator.hardware.library import list_hardware, load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.save import save_hardware
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.prediction.batch import batch_with
from simulator.prediction.prunings import Pruning, prunings_of
from simulator.prediction.requests import requests_of
from simulator.prediction.result import Result
from simulator.prediction.table import speedup
from simulator.pruning import FamilyStep, Pruner
from simulator.pruning._steps import in_order
from simulator.pruning.described.description import Description
from simulator.request import SETTINGS, Name, Request
from simulator.units import percent
from simulator.workload import Workload

SPARSITIES = (0.25, 0.5)  # default fractions of families


@dataclass(frozen=True)
class CaseRow:
    model: str
    device: str
    hardware: str
    prune: str
    family: str
    sparsity: float
    realised_sparsity: float
    phase: str
    batch: int
    seq: int
    dtype: str

    @property
    def simple(self) -> bool:
        return self.prune == f"{self.family} {self.sparsity:.9g}"

    @property
    def pruning(self) -> str:
        return f"{self.family} {percent(self.sparsity)}" if self.simple else self.prune


@dataclass(frozen=True)
class Case:
    """A dense and a pruned workload of a model in one setting."""

    pruning: Pruning
    # steps of families in their order, with the kernels of the device
    steps: tuple[FamilyStep, ...]
    dense: Workload
    pruned: Workload

    @classmethod
    def of(
        cls, dense: Workload, pruning: Pruning, kernels: Mapping[str, str] = MappingProxyType({})
    ) -> Case:
        steps, pruner = list[FamilyStep](), Pruner(dense, False)
        for step in in_order(pruning.steps, pruner.target.layers):
            try:
                for one in step.by_family(pruner.target, dense.meta):
                    steps.append(_with_kernel(one, kernels.get(one.family.name, "")))
                    pruner.add(steps[-1])
                pruned = pruner.workload()
            except InputError as error:
                raise InputError(
                    f"{step}: {error}" if len(pruning.steps) > 1 else str(error)
                ) from None
        _check_heads(pruned)
        return cls(pruning, tuple(steps), dense, pruned)

    @classmethod
    def of_model(cls, request: Request, pruning: Pruning) -> Case:
        """Return the case of an existing pruned model."""
        dense = lower(request)
        ours = dense.meta.config
        theirs = pruning.model
        for name in ("vocab", "head_dim") if ours is not None and theirs is not None else ():
            if getattr(theirs, name) != getattr(ours, name):
                expected = (
                    f"expected {getattr(ours, name)}, as the dense model has, got"
                    f" {getattr(theirs, name)}"
                )
                raise InputError(f"{pruning.title}: {name}: {expected}")
        pruned = pruning.apply(dense, request)
        _check_heads(pruned)
        return cls(pruning, (), dense, pruned)

    @property
    def family(self) -> str:
        return self.pruning.family

    @property
    def sparsity(self) -> float:
        return self.pruning.requested(self.pruned)

    @property
    def phase(self) -> str:
        return self.dense.meta.phase

    @property
    def batch(self) -> int:
        return self.dense.meta.batch

    @property
    def seq(self) -> int:
        return self.dense.meta.seq

    @property
    def prune(self) -> str:
        """The steps as text, or the name of an existing model. Names of models and of methods of
        files have a digest, because the files can change."""
        model = self.pruning.model
        if model is not None:
            return f"{model.name} ({_digest((model.hidden, model.layers))})"
        texts = (
            f"{replace(step, name=method.name)} ({_digest(method.description)})"
            if (method := step.described)
            else str(step)
            for step in self.pruning.steps
        )
        return " + ".join(texts)

    @property
    def identity(self) -> Row:
        names = ("prune", "family", "sparsity", "phase", "batch", "seq")
        return {"model": self.dense.meta.model, **{name: getattr(self, name) for name in names}}

    def run_in(self, engine: str) -> Case:
        """Return the case with the launches of an engine, which must fuse the same operators."""
        dense, pruned = (
            w.replace(meta=replace(w.meta, engine=engine)) for w in (self.dense, self.pruned)
        )
        return replace(self, dense=dense, pruned=pruned)

    def columns(self, hw: HardwareProfile, s: Result) -> Row:
        return {
            **self.identity,
            "realised_sparsity": (
                1.0 - math.prod(1.0 - step.realised for step in self.pruned.meta.applied)
            ),
            "hardware": hw.name,
            "flop_bound": s.flop_bound,
            "byte_bound": s.byte_bound,
            "roofline_bound": s.roofline_bound,
            "predicted": s.speedup,
            "predicted_lower": s.lower,
            "predicted_upper": s.upper,
        }


def description_of(step: FamilyStep) -> Description | None:
    """Return the description of what a method of a file changes per token; None for a family."""
    return getattr(step.family.function, "description", None)


def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:8]


def cases_of(
    model: str | Model,
    settings: Mapping[str, Any],
    kernels: Mapping[str, str] = MappingProxyType({}),
    phases: Sequence[str] = PHASES[:2],
) -> tuple[list[Case], list[str]]:
    """Return every combination as a case, and a line for each that cannot run.

    The settings are those of :func:`simulator.table`, but texts of ``--prune``, existing pruned
    models and families may come together. ``kernels`` are those of the device by family, ``phases``
    those that can run.
    """
    config = load_model(model) if isinstance(model, str) else model
    names = ("family", "sparsity", "prune", "pruned")
    given = {name: settings[name] for name in names if settings.get(name)}
    if "family" in given or not given.keys() & {"prune", "pruned"}:
        given.setdefault("sparsity", SPARSITIES)
    # texts and families in their order, then existing models
    prunings = sorted(prunings_of([config], **given), key=lambda one: one.model is not None)
    requests = requests_of(
        [config], {name: value for name, value in settings.items() if name in SETTINGS}
    )
    notes = dict[str, None]()
    cases = dict[tuple[object, ...], Case]()
    for request, pruning in itertools.product(requests, prunings):
        Name(tuple(phases)).check("phase", request.phase)
        try:
            if lacks := pruning.lacking(config):
                raise InputError(lacks)
            case = (
                Case.of_model(request, pruning)
                if pruning.model
                else Case.of(lower(request), pruning, kernels)
            )
            cases.setdefault((case.prune, case.phase, case.batch, case.seq), case)
        except InputError as error:
            notes[f"excluded: {pruning.prune or pruning.title} in {request.phase}: {error}"] = None
    if not cases:
        raise InputError("; ".join(notes).replace("excluded: ", "") or "nothing to compare")
    return list(cases.values()), list(notes)


def _with_kernel(step: FamilyStep, kernel: str) -> FamilyStep:
    stated = step.options.get("kernel", kernel)
    if not kernel:
        return step
    if stated != kernel:
        raise InputError(
            f"option kernel: this device runs {step.family.name} with {kernel!r}, got {stated!r}"
        )
    return replace(step, options={**step.options, "kernel": kernel})


def _check_heads(w: Workload) -> None:
    uneven = w.is_attention & (w.heads % np.maximum(w.kv_heads, 1) > 0)
    if uneven.any():
        heads = int(w.heads[uneven][0])
        groups = int(w.kv_heads[uneven][0])
        expected = f"expected a multiple of {groups}, such as {max(heads // groups, 1) * groups}"
        raise InputError(f"{heads} query heads on {groups} KV heads cannot run here; {expected}")


def counted(w: Workload, *names: str) -> Counter[tuple[int, ...]]:
    """Return how often each combination of values of some columns occurs."""
    out = Counter[tuple[int, ...]]()
    for count, *values in zip(w.count.tolist(), *(getattr(w, name).tolist() for name in names)):
        out[tuple(values)] += round(count)
    return out


def fewer_layers(config: Model, layers: int | None) -> Model:
    if layers is None:
        return config
    many = len(config.layers)
    if not 1 <= layers <= many:
        raise InputError(f"--layers: expected 1 to {many} for {config.name}, got {layers}")
    return config.with_layers(config.layers[:layers])


def predicted_speedup(case: Case, hw: HardwareProfile) -> Result:
    """Return the predicted speedup of a case; time and speedup are NaN if the device cannot run
    it."""
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


def profile_of(
    folder: str | Path, device: Device, dtype: str, hardware: str = ""
) -> HardwareProfile:
    """Return the named profile, else the folder's, else the shipped one, else measured facts with
    default constants."""
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


LONGEST_S = 30.0  # longest time of the pairs of one case
WINDOW_S = 4e-3
UNTIMED = 3  # a compiled pass is compiled, then recorded as a CUDA graph, then replayed
PRECISION = 0.005  # half-width of the 95 % interval of the median ratio
# pairs that show scatter; pairs that suffice if their ratio is precise; most pairs
LEAST = 3
ENOUGH = 8
MOST = 200
ENERGY_S = 2 * LEAST * TURN_S  # time that the energies of two models take

T = TypeVar("T")


def alternate(
    dense: Sampler, pruned: Sampler, limit_s: float, device: Device, untimed: int = UNTIMED
) -> Row:
    """Return the raw times of a record by :func:`in_turns`, after untimed passes that compile
    kernels and warm caches; "loops": passes per sample. A device with an energy counter adds the
    energy of a pass, if that takes at most half of the time."""
    samplers = (dense, pruned)
    counted = has_counter(device) and 0.5 * limit_s >= ENERGY_S
    for _ in range(untimed):
        for sample in samplers:
            sample(1)
    once = [sample(1) for sample in samplers]
    loops = max(1, math.ceil(WINDOW_S / max(min(once), 1e-7)))
    for sample in samplers if loops > 1 else ():
        sample(loops)
    rest_s = limit_s - ENERGY_S * counted
    found = in_turns(lambda i: [samplers[i](loops)], list, rest_s, time.perf_counter)
    dense_s, pruned_s = ([one for (one,) in samples] for samples in found)
    energies = energies_in_turns(samplers, dense_s + pruned_s, device) if counted else {}
    return {"loops": loops, "dense_s": dense_s, "pruned_s": pruned_s, **energies}


def energies_in_turns(samplers: Sequence[Sampler], times: Sequence[float], device: Device) -> Row:
    """Return the energy of a pass of the dense and of the pruned model in each of some turns, J;
    nothing if the passes do not fill their windows."""
    loops = launches(median(times))
    turns = [[mean_power(device, one, loops) for one in samplers] for _ in range(LEAST)]
    dense_j, pruned_j = (
        [one.watts * one.seconds for one in model if one and one.busy >= BUSY]
        for model in zip(*turns)
    )
    whole = len(dense_j) == len(pruned_j) == LEAST
    return {"dense_j": dense_j, "pruned_j": pruned_j} if whole else {}


def in_turns(
    sample: Callable[[int], T],
    seconds: Callable[[T], Sequence[float]],
    limit_s: float,
    clock: Callable[[], float],
    most: int = MOST,
) -> tuple[list[T], list[T]]:
    """Return samples of the models 0 and 1 in turns, until their ratio is precise or the time is
    over."""
    found: tuple[list[T], list[T]] = ([], [])
    start = clock()
    for turn in range(1, most + 1):
        for i in (0, 1) if turn % 2 else (1, 0):
            found[i].append(sample(i))
        spent = clock() - start
        if spent >= limit_s and turn >= LEAST:
            break
        if turn >= ENOUGH:
            ratios = [a / b for x, y in zip(*found) for a, b in zip(seconds(x), seconds(y))]
            middle, low, high = median_interval(ratios)
            if high - low <= 2.0 * PRECISION * middle:
                break
    return found


def repeated(sample: Callable[[], float], limit_s: float) -> tuple[float, float]:
    """Return the median of a few samples after an untimed one, and its relative half-width."""
    start = time.perf_counter()
    sample()
    found = list[float]()
    while len(found) < LEAST or (len(found) < ENOUGH and time.perf_counter() - start < limit_s):
        found.append(sample())
    return median(found), 0.5 * (max(found) - min(found)) / median(found)


def looped(step: Callable[[], Any], synchronize: Callable[[], Any]) -> Sampler:
    def sample(loops: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(loops):
            step()
        synchronize()
        return (time.perf_counter() - start) / loops

    return sample


@dataclass(frozen=True)
class ModelRun:
    """A dense model, and how this model and its pruned versions run."""

    config: Model
    dtype: str = "bf16"
    engine: str = "reference"  # a key of :data:`calibration.runners.compare.ENGINES`
    # the model's config.json, for engines of a library
    content: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable  # interpreter that has vLLM
    seed: int = 0  # determines the weights


@dataclass(frozen=True)
class Observation:
    """A pass of a dense model."""

    seconds: float  # median without the profiler
    half: float  # relative half-width of its 95 % interval, or of its extremes
    kernels: Mapping[str, float]  # time of each kernel by its name, s, with the profiler
    version: str  # the engine's


class Runner:
    def __init__(self, device: Device, model: ModelRun) -> None:
        self.device = device
        self.model = model
        self.interrupted: Callable[[], bool] = lambda: False  # whether the user requested an end

    # duration of the last start of a model; 0 where none takes long
    start_s = 0.0

    @property
    def least_s(self) -> float:
        """Shortest budget that times a case, s; 0 if unknown."""
        return 0.0

    def starts(self, case: Case) -> bool:
        """Return whether a model must start to time a case."""
        return True

    @property
    def apart(self) -> tuple[str, ...]:
        """Phases whose models have processes of their own; their cases come last."""
        return ()

    def check(self, case: Case) -> None:
        """Raise InputError if this runner cannot run the pruned model of a case; all cases are
        checked first."""

    def prepare(self, case: Case) -> None:
        """Make the dense model, which all cases share; ``case`` is any of them."""

    def record(self, case: Case, seconds: float) -> Row:
        """Return status, reason and raw times of a case; CaptureFailed: this process can time
        nothing any more; Interrupted: the user requested an end during a long wait."""
        raise NotImplementedError

    def begin(self, case: Case) -> None:
        """Start the dense model, which :meth:`observe` runs."""

    def wait_ready(self) -> None:
        """Wait until the models that start are ready."""

    def observe(self, case: Case, seconds: float) -> Observation:
        """Run the dense model of a case for some seconds, and take its pass apart with the engine's
        own profiler."""
        raise Unsupported(f"{self.model.engine} has no profiler to take its passes apart")

    def close(self) -> None: ...


class PairRunner(Runner):
    def timed(self, case: Case, end: float) -> Row:
        """Time a case until ``end`` on the device's clock; return the fields of the record."""
        raise NotImplementedError

    def record(self, case: Case, seconds: float) -> Row:
        try:
            return {"status": OK, "reason": "", **self.timed(case, self.device.clock() + seconds)}
        except CaptureFailed:
            raise
        except (Unsupported, InputError) as error:
            return {"status": UNSUPPORTED, "reason": str(error)}
        # a kernel may raise any exception; one family must not end the comparison
        except Exception as error:
            # imports torch, which recorded runs do not need
            from calibration.devices.operators import is_out_of_memory

            status = SKIPPED if is_out_of_memory(error) else FAILED
            return {"status": status, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}

    def limit_s(self, end: float) -> float:
        """Return the time limit of the pairs of a case that ends at ``end``; first passes get the
        rest."""
        return min(max(0.6 * (end - self.device.clock()), 0.0), LONGEST_S)
