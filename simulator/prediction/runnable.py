"""Answer "Will it run?" for a pruned model in a stock engine: can the engine load it, are its widths aligned, can the
devices divide it, and has the engine kernels for it: :func:`runnable` for a pruning, :func:`will_run` for workloads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.codes import DTYPES, Kernel, Kind
from simulator.display import Displayed, with_and
from simulator.engines.engine import Engine, load_engine
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.models.parallel import indivisible
from simulator.operators.base import ELEMENT_BYTES
from simulator.operators.gemm import aligned_elements, gemm_kernel
from simulator.passes import by_formats, refusal
from simulator.prediction.loading import blocks, loading
from simulator.prediction.prunings import Pruning
from simulator.prediction.result import Results
from simulator.prediction.scenario import Scenario
from simulator.prediction.speedup import speedup
from simulator.pruning import FAMILIES
from simulator.pruning._aligned import FIXED, aligned_up, widths
from simulator.pruning._rows import layer_count
from simulator.units import ratio
from simulator.workload import Workload, WorkloadBatch

DEGREES: tuple[int, ...] = (1, 2, 4, 8, 16)
"""Numbers of devices for which :attr:`Runnable.tensor_parallel` is evaluated."""

GAIN = 1.005
"""Smallest ratio that a sentence calls faster."""

ZEROS = "dense kernels compute its scattered zeros, so they save no time"
"""Why kernels do not use a pruning although they run it."""

_DIVIDED = {"tensor": ("MLP width", "query width", "expert width"), "expert": ("MLP width", "query width")}
"""Widths that devices share."""


@dataclass(frozen=True, repr=False, kw_only=True)
class Runnable(Displayed):
    """Whether a stock engine runs a pruned model, and at which width it would be faster."""

    engine: str
    devices: int
    works: bool | None  # whether the engine runs the model, at whatever speed; None if its file does not state it
    loadable: bool | None  # whether it loads the checkpoint without changes to its code
    load_reason: str  # how it loads the checkpoint, or why not
    aligned: bool  # whether every width is a multiple of what fast kernels need, on each device
    unaligned_dimension: str  # the one with the most weights, such as "MLP width"; "" if all are aligned
    unaligned_width: int  # of the whole model; 0 if all are aligned
    aligned_width: int  # the nearest larger aligned width
    aligned_gain: float | None  # time over the time with all widths aligned; None without a device, or if all widths
    aligned_gain_lower: float | None  # are multiples of 16 bytes (the gain of other multiples is not modelled)
    aligned_gain_upper: float | None
    divisible: bool  # whether the devices can divide the model equally
    divisible_reason: str
    tensor_parallel: tuple[int, ...]  # numbers of DEGREES among which tensor parallel can divide the model
    kernels: bool  # whether the engine has kernels that use the pruning; unstructured zeros have none
    kernels_reason: str

    def _title(self) -> str:
        return self.sentence

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and :attr:`sentence` as ``runs``."""
        return super().to_dict() | {"runs": self.sentence}

    @property
    def sentence(self) -> str:
        """The answer in plain words: yes or no, then why."""
        stops = [f"stock {self.engine} does not load {self.load_reason}"] if self.loadable is False else []
        stops += [f"it has {self.divisible_reason}"] if not self.divisible else []
        slow = [] if self.aligned else [self.alignment]
        if not self.kernels:
            (slow if self.kernels_reason == ZEROS else stops).append(self.kernels_reason)
        if stops:
            return ". ".join([f"No: {'; '.join(stops)}", *(text[0].upper() + text[1:] for text in slow)]) + "."
        if self.loadable is None:
            return f"Not known: {self.load_reason}."
        if slow:
            return f"Yes, but {'; '.join(slow)}."
        return f"Yes: stock {self.engine} loads it {self.load_reason}."

    @property
    def clause(self) -> str:
        """The answer as the last clause of a sentence about the model; "" if it is not known."""
        return "" if self.works is None else f"; stock {self.engine} {'runs' if self.works else 'does not run'} it"

    @property
    def alignment(self) -> str:
        """What is unaligned, and what the nearest aligned width gains; "" if all is aligned."""
        if self.aligned:
            return ""
        over = f" over {self.devices} devices" if self.devices > 1 else ""
        unit = f"{self.unaligned_dimension} {self.unaligned_width:,}{over} is not aligned"
        if self.aligned_gain is None:
            return f"{unit}; the nearest aligned width is {self.aligned_width:,}"
        ends = f"{ratio(self.aligned_gain_lower or 0.0)}-{ratio(self.aligned_gain_upper or 0.0)}"
        faster = f"{ratio(self.aligned_gain)}x faster ({ends})" if self.aligned_gain >= GAIN else "no faster"
        return f"{unit}; {self.aligned_width:,} is {faster}"


def runnable(scenario: Scenario, pruning: Pruning, hw: HardwareProfile | None = None) -> Runnable:
    """Return whether the stock engine of a scenario runs a pruning of its model; the gain of an aligned width is
    predicted on ``hw``.

    Loading and divisibility are those of the whole model; alignment and kernels those of its share on each device. A
    model that the devices cannot divide is judged on one device.
    """
    alone = replace(scenario, devices=1)
    whole = pruning.apply(alone.workloads[0], alone)
    # a pruned model gets a new config.json; an existing model keeps its own
    config = pruning.model or replace(load_model(scenario.model), mismatch="")
    if scenario.devices == 1:
        return will_run(whole, hw, config=config)
    reason = _indivisible(whole, scenario.devices, scenario.parallel)
    try:
        share = pruning.apply(scenario.workloads[0], scenario)
        reason += "; the prediction rounds per device" if reason else ""
    except InputError:
        if not reason:
            raise
        share = whole
    return will_run(whole, hw, config=config, share=share, divisible_reason=reason)


def runnables(
    found: Results, scenario: Scenario, engines: Sequence[str], hardware: Sequence[HardwareProfile] = ()
) -> list[Runnable]:
    """Return the answer for each result of a model; with ``hardware``, the gain of an aligned width too."""
    paths, profiles = {load_engine(e).name: e for e in engines}, {hw.label: hw for hw in hardware}
    known: dict[tuple[str, int, int, str], Runnable] = {}
    out = []
    for r, index in zip(found, found.pruning.tolist()):
        pruning = found.prunings[index]
        one = replace(scenario, engine=paths[r.engine], phase=r.phase, shapes=((r.batch, r.seq),))
        hw = profiles.get(r.hardware)
        # within its budget a pruning removes nothing
        key = (r.engine, index, r.seq if pruning.budgeted else 0, hw.architecture if hw else "")
        if key not in known:
            known[key] = runnable(one, pruning, hw)
        answer = known[key]
        out.append(answer if answer.aligned or hw is None else runnable(one, pruning, hw))
    return out


def will_run(
    pruned: Workload,
    hw: HardwareProfile | None = None,
    *,
    config: ModelConfig | None = None,
    share: Workload | None = None,
    divisible_reason: str = "",
) -> Runnable:
    """Return whether the stock engine of a workload on one device runs its model.

    ``config`` is the configuration of an existing checkpoint (default: that of the dense model), ``share`` the share of
    each of several devices, ``divisible_reason`` why they cannot divide the model.
    """
    if pruned.meta.devices > 1 and pruned.meta.parallel != "pipeline":
        raise InputError(f"pruned: expected a model on one device, got a share of {pruned.meta.devices} devices")
    own, parts = pruned if share is None else share, blocks(pruned)
    engine = load_engine(own.meta.engine)
    loadable, load_reason = loading(pruned, engine, config or pruned.meta.config)
    missing = _kernels(own, engine, hw)
    if loadable and not layer_count(pruned):
        loadable, load_reason = False, "a decoder without layers"
    elif loadable and (how := [engine.dynamic[family].how for family in _dynamic(own) if family in engine.dynamic]):
        load_reason = f"with {'; '.join(how)}"
    zeros = ZEROS if (own.kernel == Kernel.UNSTRUCTURED).any() else ""
    sixteen, unit = _units(own, engine)
    odd = {name: width for name, width in widths(own).items() if (width % unit > 0).any()}
    modelled = {name for name, width in odd.items() if (width % sixteen > 0).any()} - {*FIXED}
    dimension, width, multiple = _worst(own, odd, unit)
    gain = None
    if modelled and not missing and hw is not None:
        gain = speedup(own, aligned_up(own, unit), hw)
    times = own.meta.devices if dimension in _DIVIDED.get(own.meta.parallel, ()) else 1
    return Runnable(
        engine=engine.name,
        devices=own.meta.devices,
        works=False if divisible_reason or missing else loadable,
        loadable=loadable,
        load_reason=load_reason,
        aligned=not odd,
        unaligned_dimension=dimension,
        unaligned_width=width * times,
        aligned_width=-(-width // multiple) * multiple * times,
        aligned_gain=None if gain is None else gain.speedup,
        aligned_gain_lower=None if gain is None else gain.lower,
        aligned_gain_upper=None if gain is None else gain.upper,
        divisible=not divisible_reason,
        divisible_reason=divisible_reason,
        tensor_parallel=tuple(n for n in DEGREES if not any(indivisible(block, n, "tensor") for block in parts)),
        kernels=not (missing or zeros),
        kernels_reason=missing or zeros,
    )


def _indivisible(whole: Workload, devices: int, parallel: str) -> str:
    """Return why devices cannot divide a model, or ""."""
    if parallel == "pipeline":
        layers = layer_count(whole)
        return f"{layers} layers; a pipeline of {devices} devices needs {devices}" if layers < devices else ""
    return next(filter(None, (indivisible(block, devices, parallel) for block in blocks(whole))), "")


def _units(w: Workload, engine: Engine) -> tuple[Array, Array]:
    """Return the elements in 16 bytes of each row, and the number of which the engine's kernels need a multiple."""
    sixteen = np.array([aligned_elements(ELEMENT_BYTES[name]) for name in DTYPES])[w.dtype]
    own = np.array([engine.widths[name].multiple if name in engine.widths else 1 for name in DTYPES])
    own_kernels = np.where(w.weight_dtype == w.dtype, 1, own[w.weight_dtype])  # formats of weights alone
    return sixteen, np.lcm(sixteen, own_kernels)


def _worst(w: Workload, odd: dict[str, Array], unit: Array) -> tuple[str, int, int]:
    """Return the unaligned dimension with the most weights, its width and the number it should be a multiple of."""
    weights, best = w.n * w.k * w.count, ("", 0, 1)
    most = 0.0
    for name, width in odd.items():
        rows = width % unit > 0
        if (total := float(weights[rows].sum())) > most:
            row = np.flatnonzero(rows)[np.argmax(weights[rows])]
            best, most = (name, int(width[row]), int(unit[row])), total
    return best


def _dynamic(w: Workload) -> list[str]:
    """Return the dynamic families of a pruned workload that remove work."""
    found = [family for step in w.meta.applied if step.realised > 0 for family in step.family.split("+")]
    return [family for family in dict.fromkeys(found) if family in FAMILIES and FAMILIES[family].dynamic]


def _kernels(w: Workload, engine: Engine, hw: HardwareProfile | None) -> str:
    """Return which kernels an engine or a device lacks for a workload, or ""."""
    for family in _dynamic(w) if w.meta.engine else ():
        if family not in engine.dynamic:
            return f"stock {engine.name} has no kernels for {family}"
        own = engine.dynamic[family]
        if hw is not None and own.on and hw.architecture not in own.on:
            return f"stock {engine.name} has kernels for {family} only on {with_and(own.on)} ({own.how})"
    if (w.kernel == Kernel.SPMV).any():
        return f"stock {engine.name} has no kernels that skip scattered zeros (spmv)"
    if reason := refusal(WorkloadBatch.of([w]), hw.architecture if hw else ""):
        return reason
    for name, width in engine.widths.items():
        rows = (w.weight_dtype == DTYPES.index(name)) & width.required
        if (odd := [found[rows] % width.multiple for found in widths(w).values()]) and any(x.any() for x in odd):
            return f"{engine.name} needs multiples of {width.multiple} per device for {name} weights"
    if hw is None:
        return ""
    try:
        for rows, dtype, weight in by_formats(w, Kind.GEMM):
            for kernel in np.unique(w.kernel[rows]).tolist():
                gemm_kernel(hw, dtype, weight, Kernel(kernel))
    except InputError as error:
        return str(error)
    return ""
