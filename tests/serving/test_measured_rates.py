"""Simulated schedules against runs of ``vllm serve`` at a rate and with clients, of a dense and two
pruned models (docs/serving.md)."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulator import Request, load_hardware, load_model
from simulator.engines.engine import FrontEnd
from simulator.prediction.limits import NO_LIMITS
from simulator.prediction.load import Interval, Load, SimulatedModel, Simulation
from simulator.prediction.prunings import Pruning
from simulator.serving.arrivals import Lengths, Requests, Traffic

pytestmark = pytest.mark.quick
FOLDER = Path(__file__).parents[2] / "docs" / "cpu" / "vllm"
RUNS: list[dict[str, Any]] = [
    json.loads(line) for line in (FOLDER / "rates.json").read_text().splitlines()
]
FRONT = FrontEnd(0.0065, 0.0, 0.0, "")  # as in test_recorded_servers.py
MODELS = {"dense": "", "depth": "depth 0.3", "mlp": "width mlp=0.5"}
NUMBERS = {
    "tokens_per_s": ("output_throughput", 1.0),
    "ttft_p50": ("median_ttft_ms", 1e3),
    "ttft_p99": ("p99_ttft_ms", 1e3),
    "tpot_p50": ("median_tpot_ms", 1e3),
    "tpot_p99": ("p99_tpot_ms", 1e3),
    "request_p50": ("median_e2el_ms", 1e3),
    "request_p99": ("p99_e2el_ms", 1e3),
}
"""Numbers of a simulation: their names and their units in a result."""


def requests_of(run: dict[str, Any]) -> Requests:
    """The requests of a run: as they arrived, or those of its clients."""
    count, clients = run["completed"], run["max_concurrency"]
    drawn = Traffic(Lengths(128), Lengths(33), count, concurrency=clients).draw()
    return drawn if clients else replace(drawn, arrival=np.sort(run["start_times"]))


@lru_cache
def simulation() -> Simulation:
    """The server of the three models, for at most 256 requests."""
    request = Request(model=load_model("smollm2-135m"), phase="serve", engine="vllm")
    made = Simulation.of(
        Load(options="--max-num-batched-tokens 2048 --block-size 128"),
        NO_LIMITS,
        request,
        load_hardware(str(FOLDER / "rates.yaml")),
        [Pruning.read(text) for text in MODELS.values() if text],
        Traffic(Lengths(128), Lengths(33), 256).draw(),
    )
    return replace(made, server=replace(made.server, front=FRONT))


@lru_cache
def predicted() -> list[dict[str, list[float]]]:
    """The numbers of each run at typical errors and at their ends."""
    models = list(MODELS)
    return [
        SimulatedModel(
            replace(simulation(), requests=requests_of(run)), models.index(run["model_id"])
        ).numbers
        for run in RUNS
    ]


def case_of(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["max_concurrency"], run["share_of_capacity"], run["seed"]


def test_rates_of_a_dense_and_two_pruned_models() -> None:
    errors, ratios, inside = defaultdict(list), defaultdict(list), defaultdict(list)
    dense: dict[Any, Any] = {}
    for run, numbers in zip(RUNS, predicted()):  # the dense model first
        for name, (key, unit) in NUMBERS.items():
            values, measured = np.array(numbers[name]), run[key] / unit
            errors[name].append(abs(np.log(values[0] / measured)))
            _, low, high = Interval.of(values)
            inside[name].append(low <= measured <= high)
            if run["model_id"] == "dense":
                dense[case_of(run), name] = values, measured
                continue
            of_dense, of_measured = dense[case_of(run), name]
            value, low, high = Interval.of(values / of_dense)
            ratio = measured / of_measured
            ratios[name].append(abs(np.log(value / ratio)))
            inside[f"ratio {name}"].append(low <= ratio <= high)
    of_times, of_ratios = (
        {name: round(float(np.median(found)), 3) for name, found in every.items()}
        for every in (errors, ratios)
    )
    print(
        of_times, of_ratios, {name: f"{sum(found)}/{len(found)}" for name, found in inside.items()}
    )
    assert (len(RUNS), len(ratios["ttft_p50"])) == (24, 16)
    # the first of several prompts that clients send together starts alone, not with the others
    assert 0.15 < of_times.pop("tpot_p99") < 0.25
    assert max(of_times.values()) < 0.15
    assert of_ratios["tokens_per_s"] < 0.05
    assert max(of_ratios.values()) < 0.1  # the speed of the machine drifts by a tenth
    found = [one for name in of_times for one in inside[name]]
    assert np.mean(found) > 0.85
