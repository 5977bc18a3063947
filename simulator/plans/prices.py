"""Prices of variants: what a pass loses without a sublayer, and gains with a variant of it, in an engine on a device.

Use :func:`quantities` for whole models, :func:`prices` for the variants of a library next to a base plan. A price is
the difference of two whole passes, so it contains launches, gaps and host time as far as they are not hidden. Prices of
all layers with equal shapes are equal, so a few passes price a library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from simulator.arrays import FloatArray
from simulator.models.block import Block
from simulator.models.config import ModelConfig
from simulator.plans.library import Library
from simulator.plans.variants import SUBLAYERS, joined, part_of, without
from simulator.prediction.batch import batch_with
from simulator.prediction.compare import compare, memory_columns
from simulator.prediction.scenario import Scenario, device_text, setting
from simulator.workload import Workload

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

PlanBlocks = Sequence[Block]
"""A block per layer: a plan."""


@dataclass(frozen=True)
class PricedRequest:
    """A device with a scenario of one request."""

    scenario: Scenario
    hw: HardwareProfile

    @property
    def hardware(self) -> str:
        """Name of the device."""
        return self.hw.label

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.scenario.devices

    @property
    def engine(self) -> str:
        """Name of the engine."""
        return self.scenario.engine_name

    @property
    def phase(self) -> str:
        """Phase of inference."""
        return self.scenario.phase

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.scenario.shapes[0][0]

    @property
    def seq(self) -> int:
        """Tokens, or cached positions."""
        return self.scenario.shapes[0][1]

    def __str__(self) -> str:
        return setting(self)

    @property
    def device(self) -> str:
        """The device with its number."""
        return device_text(self)

    def lower(self, model: ModelConfig) -> Workload:
        """Return the workload of a model."""
        return replace(self.scenario, model=model).workloads[0]


def planned(model: ModelConfig, blocks: PlanBlocks, windows: Sequence[int] | None = None) -> ModelConfig:
    """Return the model with other layers.

    >>> from simulator.models.library import load_model
    >>> model = load_model("llama-3.1-8b")
    >>> planned(model, [*model.layout[:31], without("mlp", model.usual)]).parameters < model.parameters
    True
    """
    own = model.windows if windows is None else tuple(windows)
    return replace(model, blocks=tuple(blocks), layers=len(blocks), windows=own)


def quantities(models: Sequence[ModelConfig], at: PricedRequest) -> dict[str, FloatArray]:
    """Return what is predicted of models (W,) in a setting, by name; the first is the dense model.

    The names are those of :class:`simulator.Result`, of the pruned model, and ``parameters`` and ``flops``.
    """
    workloads = [at.lower(model) for model in models]
    batch = batch_with(workloads[0], workloads[1:])
    columns, _ = compare(batch, at.hw, at.scenario.level, at.scenario.dense_s)
    every = np.arange(len(models))
    memory = memory_columns(batch, every, [at.hw], np.zeros(len(models), dtype=np.intp))
    own = {name: np.asarray(column) for name, column in {**columns, **memory}.items()}
    own["parameters"] = np.array([float(model.parameters) for model in models])
    own["flops"] = batch.total(batch.flops)
    return own


def grouped(model: ModelConfig, blocks: PlanBlocks) -> ModelConfig:
    """Return a model with the same layers, equal ones next to each other: the same cost, from fewer rows."""
    order = sorted(range(len(blocks)), key=lambda i: (model.windows[i], repr(blocks[i])))
    return planned(model, [blocks[i] for i in order], [model.windows[i] for i in order])


@dataclass(frozen=True)
class Probes:
    """Models whose differences are the prices of a library next to a base plan.

    ``models`` begin with the dense model and the base. ``at`` has the indices of the models with a variant of a
    sublayer, and without it, by class of layers, sublayer and variant.
    """

    library: Library
    models: tuple[ModelConfig, ...]
    at: Mapping[tuple[int, str, Block], tuple[int, int]]
    classes: tuple[int, ...]  # of each layer

    @classmethod
    def of(cls, library: Library, base: PlanBlocks) -> Probes:
        """Return the probes of all variants."""
        model = library.model
        models, at = [model, grouped(model, base)], dict[tuple[int, str, Block], tuple[int, int]]()
        keys = list(zip(model.layout, model.windows))
        known = {key: i for i, key in reversed(list(enumerate(keys)))}  # first layer with a key
        for layer, key in enumerate(keys):
            first = known[key]

            def probe(block: Block, first: int = first) -> int:
                models.append(grouped(model, [*base[:first], block, *base[first + 1 :]]))
                return len(models) - 1

            for name in SUBLAYERS:
                for part in dict.fromkeys(part_of(name, block) for block in library.layers[layer]):
                    if (first, name, part) in at:
                        continue
                    none = part_of(name, without(name, part))
                    if (first, name, none) not in at:
                        gone = probe(without(name, base[first]))
                        at[first, name, none] = gone, gone
                    if part != none:
                        other = base[first]
                        block = joined(part, other) if name == "attention" else joined(other, part)
                        at[first, name, part] = probe(block), at[first, name, none][1]
        return cls(library, tuple(models), at, tuple(known[key] for key in keys))

    def part(self, name: str, layer: int, values: FloatArray) -> FloatArray:
        """Return the prices of one sublayer of the variants of a layer, from the values of all models."""
        places = [self.at[self.classes[layer], name, part_of(name, block)] for block in self.library.layers[layer]]
        there, gone = np.array(places, dtype=np.intp).T
        return np.asarray(values[there] - values[gone])

    def prices(self, values: FloatArray) -> tuple[FloatArray, ...]:
        """Return the prices of the variants of each layer."""
        found: dict[tuple[int, tuple[Block, ...]], FloatArray] = {}
        for layer, own in enumerate(self.library.layers):
            if (key := (self.classes[layer], own)) not in found:
                found[key] = sum(self.part(name, layer, values) for name in SUBLAYERS) + np.zeros(len(own))
        return tuple(found[self.classes[layer], own] for layer, own in enumerate(self.library.layers))
