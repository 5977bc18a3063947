"""Time to a plan: libraries of 80 layers with 16 variants on three GPUs, and of 96 with 64 on one."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

import simulator
from simulator.models.config import ModelConfig
from simulator.plans.library import Library
from simulator.plans.variants import joined, variant

Floor = Callable[..., None]


def library(model: ModelConfig, attention: list[str], mlp: list[str]) -> Library:
    """Random scores that rise as widths fall, and that are larger in the first and the last layers."""
    random, layers, scores = np.random.default_rng(0), [], []
    for layer, dense in enumerate(model.layout):
        parts = product(attention, mlp)
        layers.append(tuple(joined(variant("attention", a, dense), variant("mlp", m, dense)) for a, m in parts))
        ends = 1.0 + 4.0 * abs(layer / model.layers - 0.5) ** 2
        rise = (np.sort(random.random(len(own))) * random.random() for own in (attention, mlp))
        a, m = (values - values[0] for values in rise)
        scores.append(ends * np.add.outer(a, m).ravel())
    return Library(model, tuple(layers), {"kl_div": tuple(scores)})


@pytest.mark.parametrize(
    ("layers", "attention", "mlp", "hardware", "most_s"),
    [
        (80, ["dense", "none"], ["dense", *map(str, range(24576, 3072, -4096)), "none"], ["h100", "a100", "h200"], 5.0),
        (
            96,
            ["dense", "kv=4", "kv=2", "none"],
            ["dense", *map(str, range(26880, 1024, -1792)), "none"],
            ["h100"],
            30.0,
        ),
    ],
    ids=["80 layers, 3 GPUs", "96 layers, 64 variants"],
)
def test_a_search(
    benchmark: Any, layers: int, attention: list[str], mlp: list[str], hardware: list[str], most_s: float, floor: Floor
) -> None:
    """A search at 1.5x with its alternatives and frontier, and its memory."""
    base = simulator.load_model("llama-3.1-70b")
    model = replace(base, layers=layers, windows=(0,) * layers)
    own = library(model, attention, mlp)
    scenario = simulator.Scenario(devices=4)

    def whole() -> Any:
        return simulator.search(model, hardware, 1.5, own, batch=64, scenario=scenario)

    plan = benchmark.pedantic(whole, rounds=2, warmup_rounds=1)
    assert plan.gap <= 1e-3
    title = f"{layers} layers x {len(own.layers[0])} variants on {len(hardware)} GPUs"
    floor(f"seconds of a search, {title}", benchmark.stats["min"], most_s, False)
    tracemalloc.start()
    whole()
    floor(f"MB of a search, {title}", tracemalloc.get_traced_memory()[1] / 1e6, 500.0, False)
    tracemalloc.stop()
