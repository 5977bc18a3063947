"""Simulated schedules against recorded runs of ``vllm serve`` on a CPU (docs/vllm.md)."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulator import Request, load_hardware, load_model, lower, prune
from simulator.engines.engine import FrontEnd
from simulator.serving.arrivals import Lengths, Traffic
from simulator.serving.schedule import simulate
from simulator.serving.served import Served
from simulator.serving.server import Server
from simulator.serving.steps import step_tables

pytestmark = pytest.mark.quick
FOLDER = Path(__file__).parents[2] / "docs" / "cpu" / "vllm"
RUNS: list[dict[str, Any]] = json.loads((FOLDER / "server.json").read_text())
FRONT = FrontEnd(0.0065, 0.0, 0.0, "")  # this server adds 5 to 8 ms


@lru_cache
def model_of(name: str) -> Any:
    dense = load_model("smollm2-135m")
    if name == "dense":
        return dense
    return prune(lower(dense, phase="decode", engine="vllm"), "width", {"mlp": 0.5}).meta.config


def simulated(recorded: dict[str, Any]) -> Served:
    hw, count = load_hardware(str(FOLDER / "bf16.1.yaml")), recorded["completed"]
    prompt, output = (recorded[f"total_{name}_tokens"] // count for name in ("input", "output"))
    options = f"--max-num-batched-tokens {recorded['max_num_batched_tokens']} --block-size 128"
    server = replace(Server.of("vllm", hw, options), front=FRONT)
    traffic = Traffic(
        prompt=Lengths(prompt),
        output=Lengths(output),
        requests=count,
        concurrency=recorded["max_concurrency"],
        prefix=recorded["shared_prefix"],
    )
    request = Request(model=model_of(recorded["model"]), engine="vllm")
    times = step_tables(request, hw, server, prompt + output, count).at()
    return simulate(traffic.draw(), times, server)


def numbers(served: Served) -> dict[str, float]:
    return {
        "output_throughput": served.tokens_per_s,
        "median_ttft_ms": 1e3 * float(np.median(served.ttft)),
        "p99_ttft_ms": 1e3 * float(np.quantile(served.ttft, 0.99)),
        "median_tpot_ms": 1e3 * float(np.median(served.tpot)),
    }


def test_times_of_recorded_runs_and_their_ratios() -> None:
    errors, ratios, dense = defaultdict(list), defaultdict(list), {}
    for run in sorted(RUNS, key=lambda run: run["model"]):  # the dense model first
        case = tuple(run[name] for name in ("max_num_batched_tokens", "max_concurrency"))
        case += (run["shared_prefix"], run["total_input_tokens"])
        for name, value in numbers(simulated(run)).items():
            error = np.log(value / run[name])
            errors[name].append(abs(error))
            if run["model"] == "dense":
                dense[case, name] = error
            else:
                ratios[name].append(abs(error - dense[case, name]))
    of_times, of_ratios = (
        {name: round(float(np.median(values)), 3) for name, values in found.items()}
        for found in (errors, ratios)
    )
    print(of_times, of_ratios)
    assert (len(errors["p99_ttft_ms"]), len(ratios["p99_ttft_ms"])) == (20, 8)
    assert max(of_times.values()) < 0.07
    assert max(of_ratios.values()) < 0.07


def test_each_first_token_of_four_clients_waits_for_the_steps_that_it_waited_for() -> None:
    """A budget of 160 tokens has room for a prompt of 128 and a part of the next one."""
    (recorded,) = (
        run
        for run in RUNS
        if (run["model"], run["max_num_batched_tokens"], run["max_concurrency"])
        == ("dense", 160, 4)
    )
    steady = slice(4, None)  # the first four requests are sent by a client that starts
    found = simulated(recorded).ttft[steady]
    assert found == pytest.approx(np.array(recorded["ttfts"])[steady], rel=0.1)
