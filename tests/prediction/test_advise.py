"""The advised sparsity reaches the target and less does not."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

import simulator
from simulator.errors import InputError
from simulator.prediction.advise import (
    BOTH,
    COARSE,
    FINE,
    LARGEST_SPARSITY,
    Advised,
    Target,
    advise,
)
from simulator.prediction.service import probability_of
from simulator.pruning import general_families

MODEL, HARDWARE = "llama-3.1-8b", "a100_sxm_80gb"


def predicted(
    family: str, sparsity: float, phase: str, engine: str = "reference"
) -> tuple[float, float]:
    """Speedup and its lower end, from a prediction of its own."""
    text = f"depth {sparsity} + width {sparsity}" if family == BOTH else f"{family} {sparsity}"
    r = simulator.predict(MODEL, text, HARDWARE, phase=phase, engine=engine)
    return r.speedup, r.lower


def own_sparsity(family: str, sparsity: float) -> float:
    """The sparsity of each family, from that of all together."""
    return round(1.0 - (1.0 - sparsity) ** 0.5, 6) if family == BOTH else sparsity


@pytest.fixture(scope="module", params=["prefill", "decode"])
def found(request: pytest.FixtureRequest) -> Advised:
    return advise(MODEL, [HARDWARE], 1.4, phase=request.param, engine=["reference"])


def test_every_family_is_advised_once_and_the_least_comes_first(found: Advised) -> None:
    assert sorted(a.result.family for a in found.advice) == sorted([*general_families(), BOTH])
    reached = [a.result.realised_sparsity for a in found.advice if a.reached]
    assert 0 < len(reached) < len(found.advice)
    assert reached == sorted(reached)
    assert [a.reached for a in found.advice] == sorted(
        (a.reached for a in found.advice), reverse=True
    )


def test_the_least_sparsity_reaches_the_target_and_less_does_not(found: Advised) -> None:
    for a in found.advice:
        family, phase = a.result.family, a.result.phase
        sparsity = own_sparsity(family, a.result.sparsity)
        there, lower = predicted(family, sparsity, phase)
        assert (there, lower) == pytest.approx((a.result.speedup, a.result.lower), rel=1e-9)
        assert a.probability == pytest.approx(probability_of(1.4, there, lower, a.result.upper))
        assert a.reached == (there >= 1.4) == (a.probability >= 0.5)
        if a.reached and family != "semi_structured":  # 2:4 has no smaller sparsity
            for less in np.arange(sparsity - COARSE, sparsity - FINE / 2, 3 * FINE):
                assert predicted(family, round(float(less), 6), phase)[0] < 1.4, (family, less)
        else:
            for other in (0.1, 0.5, LARGEST_SPARSITY):
                try:
                    assert predicted(family, other, phase)[0] <= a.result.speedup + 1e-9
                except InputError:
                    assert family == "semi_structured"


@pytest.mark.parametrize("probability", [0.3, 0.95])
def test_the_required_probability_is_kept(probability: float) -> None:
    asked: dict[str, Any] = {"family": ["width", "low_rank"], "engine": ["vllm"]}
    usual = {a.result.family: a for a in advise(MODEL, [HARDWARE], 1.4, **asked).advice}
    for a in advise(MODEL, [HARDWARE], 1.4, **asked, probability=probability).advice:
        assert a.reached
        assert a.probability >= probability - 1e-9
        assert (a.result.sparsity > usual[a.result.family].result.sparsity) == (probability > 0.5)
    with pytest.raises(InputError, match="confidence 1: expected a number between 0 and 1"):
        advise(MODEL, [HARDWARE], 1.4, probability=1.0)


def test_the_probability_is_that_of_the_interval() -> None:
    for level in (0.5, 0.9, 0.99):
        z = NormalDist().inv_cdf(0.5 + level / 2)
        # log deviations .1 below and .2 above
        lower, upper = 1.5 * np.exp(-0.1 * z), 1.5 * np.exp(0.2 * z)
        draws = np.random.default_rng(7).normal(size=200_000)
        truth = 1.5 * np.exp(np.where(draws < 0, 0.1, 0.2) * draws)
        for target in (1.2, 1.4, 1.5, 1.7, 2.2):
            probability = probability_of(target, 1.5, float(lower), float(upper), level)
            assert probability == pytest.approx(float((truth >= target).mean()), abs=4e-3)
    assert [probability_of(t, 1.5, 1.5, 1.5) for t in (1.4, 1.5, 1.6)] == [1.0, 1.0, 0.0]


def test_a_time_and_a_throughput_are_targets() -> None:
    latency = advise("llama-3.2-3b", ["a100", "l4"], Target(latency_s=15e-3), ["depth"], batch=4)
    tokens = advise(
        "llama-3.2-3b", ["a100", "l4"], Target(tokens_per_s=4 / 15e-3), ["depth"], batch=4
    )
    (of_time,), (of_rate,) = latency.advice, tokens.advice
    assert of_time.result == of_rate.result
    assert of_time.target == pytest.approx(of_time.result.dense_s / 15e-3)
    assert of_time.result.hardware == "l4"
    assert of_time.result.pruned_s <= 15e-3
    assert latency.dense == ("a100_sxm_80gb in vllm (decode, batch 4, seq 2048)",)
    rate, request = (
        Target(tokens_per_s=400.0),
        {"phase": "generate", "batch": 2, "seq": 64, "new_tokens": 16},
    )
    (a,) = advise("llama-3.2-1b", ["l4"], rate, ["depth"], **request).advice
    assert a.result.tokens_per_s / 400.0 == pytest.approx(a.result.speedup / a.target)


@pytest.mark.parametrize("target", [1.0, 0.5, float("nan"), float("inf"), -2.0, 1e9])
def test_bad_targets_are_refused(target: float) -> None:
    with pytest.raises(InputError, match="expected a speedup above 1"):
        advise(MODEL, [HARDWARE], target)
