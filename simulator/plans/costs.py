"""Costs of the variants of a library, with intervals: :func:`costs`.

The cost of a variant of a sublayer is the difference of two passes of the model: with the variant,
and without the sublayer. It has kernels, gaps, and host time that is not hidden. The costs of the
dense layers and of the part outside the layers add up to the dense pass; those of other plans to
first order (:mod:`simulator.plans.solve` corrects them). :class:`Probes` has the passes: layers
with equal shapes cost the same, so a few passes price a library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from simulator.arguments import OneOrMore
from simulator.arrays import Array, FloatArray, IndexArray
from simulator.capacity import cache_bytes, weights_bytes
from simulator.codes import Part
from simulator.display import Displayed
from simulator.engines.engine import load_engine
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.models.model import Layer, Model, pruned_from
from simulator.plans.library import Library, generated_library, read_library
from simulator.plans.variants import SUBLAYERS, joined, part_of, text_of
from simulator.prediction.batch import batch_with
from simulator.prediction.compare import compare
from simulator.prediction.requests import check_measured, on, profiles, requests_of, setting
from simulator.request import Request
from simulator.serving.steady import memory_columns
from simulator.uncertainty.factors import COVERAGE_FACTOR, level_scale
from simulator.uncertainty.forward import PredictedPass, forward_passes
from simulator.uncertainty.intervals import intervals
from simulator.workload import Workload, WorkloadBatch

COLUMNS: tuple[str, ...] = (
    # layer -1: outside the layers
    "hardware",
    "engine",
    "phase",
    "batch",
    "seq",
    "layer",
    "sublayer",
    "variant",
    "seconds",
    "lower",
    "upper",
    "prefill_s",
    "decode_s",
    "parameters",
    "weights_bytes",
    "cache_bytes",
)


@dataclass(frozen=True)
class PricedRequest:
    request: Request
    hw: HardwareProfile

    hardware = property(lambda self: self.hw.label)
    devices = property(lambda self: self.request.devices)
    engine = property(lambda self: load_engine(self.request.engine).name)
    phase = property(lambda self: self.request.phase)
    batch = property(lambda self: self.request.batch)
    seq = property(lambda self: self.request.seq)

    def __str__(self) -> str:
        return setting(self)

    def lower(self, model: Model, dense: Model) -> Workload:
        """Return the workload of a model that was pruned from a dense one."""
        return lower(replace(self.request, model=pruned_from(dense, model)))


def priced(
    model: Model, hardware: Sequence[HardwareProfile], settings: Mapping[str, Any]
) -> list[PricedRequest]:
    requests = requests_of([model], settings)
    check_measured(requests, hardware)
    return [PricedRequest(on([one], hw)[0], hw) for one in requests for hw in hardware]


def planned(model: Model, layers: Sequence[Layer]) -> Model:
    """Return the model with other layers; a layer without sublayers stays."""
    return replace(model, layers=tuple(layers))


def quantities(models: Sequence[Model], at: PricedRequest) -> dict[str, FloatArray]:
    """Return predictions of models (W,) in a setting by the names of :class:`simulator.Result`,
    with ``parameters`` and ``flops``; the first is the dense model."""
    workloads = [at.lower(model, models[0]) for model in models]
    batch = batch_with(workloads[0], workloads[1:])
    columns, _ = compare(batch, at.hw, at.request.level, at.request.dense_s)
    every = np.arange(len(models))
    memory = memory_columns(batch, every, [at.hw], np.zeros(len(models), dtype=np.intp))
    own = {name: np.asarray(column) for name, column in {**columns, **memory}.items()}
    own["parameters"] = np.array([float(model.parameters) for model in models])
    own["flops"] = batch.total(batch.flops)
    return own


def grouped(model: Model, layers: Sequence[Layer]) -> Model:
    """Return a model with equal layers next to each other, which costs the same and has fewer
    rows."""
    first: dict[Layer, int] = {}
    for layer in layers:
        first.setdefault(layer.windowless, len(first))
    order = sorted(layers, key=lambda layer: (first[layer.windowless], layer.window))
    return planned(model, order)


@dataclass(frozen=True)
class Probes:
    """Models whose differences are the prices of a library next to a base plan."""

    library: Library
    models: tuple[Model, ...]  # the dense model, the base, then the others
    # (class, sublayer, variant): models with, without
    at: Mapping[tuple[int, str, Layer], tuple[int, int]]
    classes: tuple[int, ...]  # for each layer: the first layer that equals it

    @classmethod
    def of(cls, library: Library, base: Sequence[Layer]) -> Probes:
        model = library.model
        models, at = [model, grouped(model, base)], dict[tuple[int, str, Layer], tuple[int, int]]()
        keys = list(model.layers)
        known = {key: i for i, key in reversed(list(enumerate(keys)))}  # first layer with a key
        for layer, key in enumerate(keys):
            first = known[key]

            def probe(changed: Layer, first: int = first) -> int:
                models.append(grouped(model, [*base[:first], changed, *base[first + 1 :]]))
                return len(models) - 1

            for name in SUBLAYERS:
                for part in dict.fromkeys(part_of(name, block) for block in library.layers[layer]):
                    if (first, name, part) in at:
                        continue
                    none = part_of(name, part.without(name))
                    if (first, name, none) not in at:
                        gone = probe(base[first].without(name))
                        at[first, name, none] = gone, gone
                    if part != none:
                        pair = (part, base[first])
                        changed = joined(*(pair if name == "attention" else pair[::-1]))
                        at[first, name, part] = probe(changed), at[first, name, none][1]
        return cls(library, tuple(models), at, tuple(known[key] for key in keys))

    @property
    def keys(self) -> list[tuple[int, str, Layer]]:
        """Layer, sublayer and variant of each cost."""
        return [
            (layer, name, part)
            for layer, own in enumerate(self.library.layers)
            for name in SUBLAYERS
            for part in dict.fromkeys(part_of(name, block) for block in own)
        ]

    def prices(self, values: FloatArray) -> tuple[FloatArray, ...]:
        found: dict[tuple[int, tuple[Layer, ...]], FloatArray] = {}
        for first, own in zip(self.classes, self.library.layers):
            if (first, own) not in found:
                total = np.zeros(len(own))
                for name in SUBLAYERS:
                    there, gone = np.array(
                        [self.at[first, name, part_of(name, block)] for block in own]
                    ).T
                    total = total + (values[there] - values[gone])
                found[first, own] = total
        return tuple(found[first, own] for first, own in zip(self.classes, self.library.layers))


@dataclass(frozen=True, repr=False, eq=False)
class Costs(Displayed):
    """Costs of variants, one row per setting, layer, sublayer and variant.

    The last row of a setting is outside layers.

    Parameters
    ----------
    columns : mapping of str to array
        Columns by name (:data:`COLUMNS`): times in s, of a pass (of a request in serve), memory in
        bytes on the fullest device.
    settings : tuple of PricedRequest
        Devices and requests, in the order of the rows.
    model : Model
        The dense model.
    level : float
        Level of the intervals.

    Examples
    --------
    >>> found = costs("llama-3.1-8b", "h100")
    >>> len(found.settings), found.rows[0]["sublayer"], found.rows[-1]["layer"]
    (1, 'attention', -1)
    """

    columns: Mapping[str, Array]
    settings: tuple[PricedRequest, ...]
    model: Model = field(repr=False)
    level: float = 0.9

    def __len__(self) -> int:
        return len(self.columns["layer"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows as dictionaries."""
        lists = [self.columns[name].tolist() for name in COLUMNS]
        return [dict(zip(COLUMNS, row)) for row in zip(*lists)]

    def to_dict(self) -> dict[str, Any]:
        """Return ``costs`` as dictionaries, the model and the level of the intervals."""
        return {"model": self.model.name, "level": self.level, "costs": self.rows}

    def _title(self) -> str:
        return f"{len(self):,} costs of {self.model.name} in {len(self.settings)} settings"

    def _columns(self) -> Mapping[str, Any]:
        return self.columns


def costs(
    model: str | Model,
    hardware: OneOrMore[str | HardwareProfile],
    choices: str | Path | Library | None = None,
    **settings: Any,
) -> Costs:
    """Return the cost of every variant of every layer, for every device and request.

    Parameters
    ----------
    model : str or Model
        The dense model.
    hardware : one or more
        Devices, as in :func:`simulator.table`.
    choices : str, Path or Library, optional
        Variants (:func:`simulator.plans.library.read_library`). Default: the usual ones
        (:func:`simulator.plans.library.generated_library`).
    **settings
        Fields of :class:`simulator.Request`, each one value or a list. The phase ``generate`` gives
        the time of prompt and new tokens apart.

    Returns
    -------
    Costs
        One row per setting, layer, sublayer and variant.

    Raises
    ------
    InputError
        For variants that do not fit the model or that the devices cannot share.

    Examples
    --------
    >>> found = costs("llama-3.1-8b", "h100", batch=8)
    >>> sorted(set(found.columns["variant"][found.columns["sublayer"] == "attention"].tolist()))
    ['dense', 'kv=1', 'kv=2', 'kv=4', 'none']
    """
    dense, devices = load_model(model), profiles(hardware)
    at = priced(dense, devices, settings)
    library = generated_library(dense, at[0].devices) if choices is None else choices
    library = library if isinstance(library, Library) else read_library(library, dense)
    probes = Probes.of(library, dense.layers)
    keys = probes.keys
    parts = [_costs(one, probes, keys) for one in at]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    return Costs(columns, tuple(at), dense, at[0].request.level)


def _costs(
    at: PricedRequest, probes: Probes, keys: list[tuple[int, str, Layer]]
) -> dict[str, Array]:
    model, layout = probes.library.model, probes.library.model.layers
    batch = WorkloadBatch.of([at.lower(one, model) for one in probes.models])
    p = forward_passes(batch, at.hw, at.request.level)
    values = {
        "seconds": p.total_s,
        "prefill_s": p.phase_s[:, 0],
        "decode_s": p.phase_s[:, 1],
        "parameters": np.array([float(one.parameters) for one in probes.models]),
        "weights_bytes": weights_bytes(batch),
        "cache_bytes": cache_bytes(batch),
    }
    places = [(probes.classes[layer], name, part) for layer, name, part in keys]
    kinds = list(dict.fromkeys(places))
    there, gone = np.array([probes.at[kind] for kind in kinds], dtype=np.intp).T
    found = {name: column[there] - column[gone] for name, column in values.items()}
    found["lower"], found["upper"] = _intervals(p, at, model, kinds, there, gone)
    number = {kind: i for i, kind in enumerate(kinds)}
    of_row = np.array([number[place] for place in places], dtype=np.intp)
    dense = np.array([part == part_of(name, layout[layer]) for layer, name, part in keys])
    columns: dict[str, Array] = {}
    for name, column in values.items():
        each = found[name][of_row]
        columns[name] = np.append(each, column[0] - each[dense].sum())
    share = columns["seconds"][-1] / p.total_s[0]
    for name, end in zip(("lower", "upper"), intervals(p, at.request.level)):
        columns[name] = np.append(found[name][of_row], end[0] * share)
    return columns | _names(at, layout, keys)


def _names(
    at: PricedRequest, layout: Sequence[Layer], keys: Sequence[tuple[int, str, Layer]]
) -> dict[str, Array]:
    """Return the columns that state the setting, layer, sublayer and variant of each cost."""
    texts = [text_of(name, part, part_of(name, layout[layer])) for layer, name, part in keys]
    columns: dict[str, Array] = {
        "layer": np.array([*(layer for layer, _, _ in keys), -1]),
        "sublayer": np.array([*(name for _, name, _ in keys), "outside"], dtype=object),
        "variant": np.array([*texts, "dense"], dtype=object),
    }
    for name in ("hardware", "engine", "phase"):
        columns[name] = np.array([getattr(at, name)] * (len(keys) + 1), dtype=object)
    return columns | {name: np.full(len(keys) + 1, getattr(at, name)) for name in ("batch", "seq")}


def _intervals(
    p: PredictedPass,
    at: PricedRequest,
    model: Model,
    kinds: Sequence[tuple[int, str, Layer]],
    there: IndexArray,
    gone: IndexArray,
) -> tuple[FloatArray, FloatArray]:
    """Return the ends of the intervals of differences of passes, by first layer, sublayer and
    variant. Errors of the device are those of the sublayer's own operators, as the others cancel in
    the difference. The host differs at the ends of its speeds. Both are combined as a root of sum
    of squares."""
    level, half = at.request.level, np.zeros(len(kinds))
    own = [_operators(at, model, *kind) for kind in kinds]
    if some := [i for i, w in enumerate(own) if len(w)]:
        alone = forward_passes(WorkloadBatch.of([own[i] for i in some]), at.hw, level).uncertainty
        half[some] = alone.half(
            alone.variance() + p.engine.log_sd.value**2 + p.engine.apart_log_sd.value**2, level
        )
    far = COVERAGE_FACTOR * level_scale(level)
    total, share = p.at(*p.host.speeds([0.0, -far, far, 0.0, 0.0], [0.0, 0.0, 0.0, -far, far]))
    difference = total[:, there] - total[:, gone]
    device = np.clip(
        total[0, there] * share[0, there] - total[0, gone] * share[0, gone], 0.0, difference[0]
    )
    ends = []
    for side in (-1.0, 1.0):
        change = np.maximum(side * (difference - difference[0]), 0.0)
        host = change[1:3].max(axis=0) ** 2 + change[3:].max(axis=0) ** 2
        ends.append(difference[0] + side * np.sqrt((device * np.expm1(side * half)) ** 2 + host))
    return np.maximum(ends[0], 0.0), ends[1]


def _operators(at: PricedRequest, model: Model, layer: int, sublayer: str, part: Layer) -> Workload:
    if at.request.parallel == "pipeline":  # a stage computes a layer as one device does
        at = replace(at, request=replace(at.request, devices=1, link=None))
    w = at.lower(planned(model, [part]), model)
    return w.take((w.layer >= 0) & (w.part == Part[sublayer.upper()]))
