"""Energy of predictions: laws of power, conversions by hand, and the energy of simulated steps."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import tables_of

import simulator
from simulator import Energy, InputError, Request, Result, Tariff, load_hardware, serve
from simulator.power import PARTS, Power
from simulator.prediction.energy import PassEnergy
from simulator.prediction.energy_sentences import of_energy
from simulator.prediction.explain import explanations
from simulator.prediction.limits import NO_LIMITS
from simulator.prediction.load import Load, LoadPoint, Simulation
from simulator.prediction.prunings import Pruning
from simulator.uncertainty.forward import forward_passes
from simulator.workload import WorkloadBatch

pytestmark = pytest.mark.quick
H100 = load_hardware("h100")
IDLE_W = float(Power.of(H100).watts[0])
MODEL = "llama-3.1-8b"


def predicted(prune: str = "depth 0.25", **asked: Any) -> Result:
    return simulator.predict(MODEL, prune, H100, **asked)


@settings(max_examples=25, deadline=None)
@given(
    phase=st.sampled_from(["prefill", "decode", "generate", "serve"]),
    batch=st.sampled_from([1, 8, 64, 256]),
    prune=st.sampled_from(["depth 0.25", "width mlp=0.5", "low_rank 0.5", "unstructured 0.5"]),
    engine=st.sampled_from(["vllm", "hf"]),
    limit=st.sampled_from([None, 300.0, 500.0]),
    devices=st.sampled_from([1, 4]),
)
def test_power_lies_between_idle_and_the_limit(
    phase: str, batch: int, prune: str, engine: str, limit: float | None, devices: int
) -> None:
    asked = {"phase": phase, "batch": batch, "engine": engine, "devices": devices}
    r = predicted(prune, **asked, power_limit=limit, seq=512)
    most = 1.0000001 * (limit or H100.power_w)
    for watts in (r.dense_watts, r.pruned_watts):
        assert IDLE_W <= watts <= most
    for name in ("dense", "pruned"):
        joules, lower, upper, slow = (
            getattr(r, f"{name}_{end}")
            for end in ("joules", "joules_lower", "joules_upper", "upper")
        )
        assert 0.0 < lower <= joules <= upper <= most * devices * slow
    assert r.energy_saved_lower <= r.energy_saved <= r.energy_saved_upper < 1.0


@pytest.mark.parametrize("phase", ["prefill", "decode", "generate", "serve"])
def test_no_pruning_saves_exactly_nothing(phase: str) -> None:
    r = predicted("width 0.0", phase=phase, batch=8)
    found = Energy.of(r, Tariff(pue=1.5, host_watts=100.0))
    assert (found.energy_saved, found.energy_saved_lower, found.energy_saved_upper) == (0, 0, 0)
    assert found.dense_joules_per_token == found.pruned_joules_per_token


def test_dense_and_pruned_share_errors() -> None:
    r = predicted(batch=8)
    of_one = np.log(r.pruned_joules_upper / r.pruned_joules_lower)
    of_ratio = np.log((1.0 - r.energy_saved_lower) / (1.0 - r.energy_saved_upper))
    assert 0.0 < of_ratio < 0.6 * of_one


@pytest.mark.parametrize(
    ("phase", "tokens"), [("prefill", 4 * 512), ("decode", 4), ("generate", 4 * 32), ("serve", 128)]
)
def test_conversions_by_hand(phase: str, tokens: int) -> None:
    r = predicted(phase=phase, batch=4, seq=512, new_tokens=32, devices=2)
    found = r.energy
    assert found.dense_joules_per_token == pytest.approx(r.dense_joules / tokens)
    if phase == "decode":
        assert found.dense_joules_per_request is None
    else:
        assert found.dense_joules_per_request == pytest.approx(r.dense_joules / 4)
    assert found.dense_tokens_per_joule == pytest.approx(tokens / r.dense_joules)
    assert found.dense_cost_per_million_tokens is None
    priced = Energy.of(r, Tariff(electricity=0.15, carbon=400.0, pue=1.3, host_watts=100.0))
    joules = 1.3 * (r.pruned_joules + 100.0 * 2 * r.pruned_s) / tokens
    assert priced.pruned_joules_per_token == pytest.approx(joules)
    kwh = joules * 1e6 / 3.6e6
    assert priced.pruned_kwh_per_million_tokens == pytest.approx(kwh)
    assert priced.pruned_cost_per_million_tokens == pytest.approx(0.15 * kwh)
    assert priced.pruned_carbon_g_per_million_tokens == pytest.approx(400.0 * kwh)
    saved = 1.0 - priced.pruned_joules_per_token / priced.dense_joules_per_token
    assert priced.energy_saved == pytest.approx(saved)
    assert priced.energy_saved_lower < saved < priced.energy_saved_upper


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"electricity": -0.1}, "electricity: expected the price of a kWh"),
        ({"carbon": float("nan")}, "carbon: expected g of CO2"),
        ({"pue": 0.9}, "pue: expected a factor from 1"),
        ({"pue": None}, "pue: expected a factor from 1"),
        ({"host_watts": "100"}, "host_watts: expected W of the host"),
    ],
)
def test_prices_out_of_range_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tariff(**wrong)


def test_limits_by_hand() -> None:
    """Full load keeps the power limit, and waiting for the host draws little more than idle."""
    full = predicted(phase="prefill", batch=8)
    assert 0.8 * H100.power_w < full.dense_watts <= H100.power_w
    # the share of time that GEMMs of 14 GiB of weights take at the datasheet bandwidth
    one = predicted(batch=1)
    by_bytes = 14.96e9 / H100.bandwidth_bytes_per_s / one.dense_s
    assert one.dense_watts == pytest.approx(
        np.dot(Power.of(H100).watts[:3], [1.0, 0.9, by_bytes]), rel=0.05
    )
    waiting = predicted("width 0.5", batch=1, engine="hf")
    assert waiting.speedup == pytest.approx(1.0, abs=0.02)
    assert waiting.energy_saved > 0.15
    assert waiting.pruned_watts < 1.8 * IDLE_W


def test_a_power_limit_costs_time_and_saves_energy() -> None:
    free, capped = (predicted(phase="prefill", power_limit=limit) for limit in (None, 450.0))
    assert capped.dense_watts == pytest.approx(450.0, rel=1e-3)
    assert 1.0 < capped.dense_s / free.dense_s < 700.0 / 450.0
    assert capped.dense_joules < free.dense_joules
    width = np.log(capped.dense_upper / capped.dense_lower)
    assert width > 2.0 * np.log(1.15)
    loose = predicted(power_limit=690.0)  # a decode of one sequence does not reach it
    assert loose.dense_s == predicted().dense_s
    with pytest.raises(InputError, match=r"power_limit: expected .* to 700 W for h100_sxm"):
        predicted(power_limit=701.0)


CAUSES = tables_of("prediction/cases.yaml")["causes of energy"]


@pytest.mark.parametrize(("asked", "text"), CAUSES)
def test_the_sentence_names_the_cause(asked: dict[str, Any], text: str) -> None:
    (sentence,) = of_energy([predicted(**asked)], Tariff())
    assert re.search(text, sentence), sentence


def test_parts_of_a_pass_sum_to_its_energy() -> None:
    (e,) = explanations(MODEL, [H100], prune="width mlp=0.3", devices=2)
    assert list(e.energy_parts) == list(PARTS)
    dense, pruned = np.array(list(e.energy_parts.values())).sum(axis=0)
    assert dense == pytest.approx(e.result.dense_joules)
    assert pruned == pytest.approx(e.result.pruned_joules)


def simulation(load: Load, prune: str = "") -> Simulation:
    request = Request(model=simulator.load_model(MODEL), phase="serve", seq=512, new_tokens=64)
    prunings = [Pruning.read(prune)] if prune else []
    return Simulation.of(load, NO_LIMITS, request, H100, prunings)


@pytest.mark.parametrize("load", [Load(rate=5.0, requests=60), Load(requests=80, concurrency=32)])
def test_steps_have_the_energy_of_the_passes_that_they_run(load: Load) -> None:
    """Decode steps and prompts alone are predicted directly, as single passes."""
    run = simulation(load)
    times, power = run.tables.at(0), run.tables.power
    (steps,) = run.run(times, 1).steps
    assert times.each(steps) == pytest.approx(steps.seconds)
    work = run.tables.work(power.watts).at(0).each(steps)
    work = np.minimum(work, (power.limit - power.watts[0]) * np.array(steps.seconds))
    alone = [i for i in range(len(work)) if not (steps.tokens[i] and steps.sequences[i])]
    joules, direct = 0.0, 0.0
    for i in alone[:: len(alone) // 30 or 1]:
        context, tokens = round(steps.about[i][0]), steps.tokens[i]
        asked = replace(
            run.request, phase="decode", batch=steps.sequences[i] or 1, seq=context or 1
        )
        if tokens:
            asked = replace(asked, phase="prefill", batch=max(tokens // 512, 1), seq=512)
        p = forward_passes(WorkloadBatch.of([simulator.lower(asked)]), H100)
        direct += float(PassEnergy.of(p, p.total_s).total()[0])
        joules += work[i] + power.watts[0] * steps.seconds[i]
    assert joules == pytest.approx(direct, rel=0.02)


def loads(**more: Any) -> tuple[LoadPoint, ...]:
    asked: dict[str, Any] = {"seq": 512, "new_tokens": 64, "requests": 100, "tariff": Tariff()}
    return serve(MODEL, H100, **{**asked, **more}).loads[0].points


def test_energy_of_requests_that_arrive() -> None:
    slow, slower = loads(rate=0.2, prune="depth 0.25")
    watts, joules = slow.numbers["watts"], slow.numbers["joules_per_token"]
    assert IDLE_W < watts.value < 1.5 * IDLE_W
    assert joules.value == pytest.approx(watts.value / slow.numbers["tokens_per_s"].value)
    # idle power between requests is saved by no pruning
    saved = slower.numbers["energy_saved"]
    assert 0.0 < saved.lower < saved.value < saved.upper < 0.1
    (busy,) = loads(requests=200)
    assert 2.0 * IDLE_W < busy.numbers["watts"].value <= busy.numbers["watts"].upper <= H100.power_w
    assert busy.numbers["joules_per_token"].value < 0.2 * joules.value
    two, priced = (
        loads(rate=0.2, replicas=replicas, tariff=Tariff(electricity=0.15))[0]
        for replicas in (2, 1)
    )
    more = two.numbers["joules_per_token"].value - joules.value
    assert more == pytest.approx(IDLE_W / slow.numbers["tokens_per_s"].value, rel=0.05)
    kwh = joules.value / 3.6
    assert priced.numbers["electricity"].value == pytest.approx(0.15 * kwh)
    (_, same) = loads(rate=2.0, family="width", sparsity=0.0)
    assert same.numbers["energy_saved"] == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


def test_energy_of_a_steady_state_is_that_of_the_pass() -> None:
    r = predicted(phase="serve", batch=64)
    found = serve(MODEL, H100, concurrency=64, prune="depth 0.25", tariff=Tariff(carbon=400.0))
    dense, pruned, _, most = found.points
    assert pruned.watts == pytest.approx(r.pruned_watts)
    assert dense.joules_per_token == pytest.approx(r.energy.dense_joules_per_token)
    assert pruned.joules_per_token_upper == pytest.approx(r.energy.pruned_joules_per_token_upper)
    assert pruned.energy_saved == pytest.approx(r.energy_saved)
    assert pruned.carbon_g == pytest.approx(400.0 * pruned.joules_per_token / 3.6)
    # at equal memory, the share is that per token, of different numbers of requests
    at_memory = found.points[2].joules_per_token
    assert most.energy_saved == pytest.approx(1.0 - most.joules_per_token / at_memory)
