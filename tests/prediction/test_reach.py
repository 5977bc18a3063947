"""What given prunings reach: verdicts, probabilities, margins and sentences of every setting."""

from __future__ import annotations

import re
from typing import Any

import pytest

from simulator.errors import InputError
from simulator.prediction.advise import advise
from simulator.prediction.conclusions import of_advice
from simulator.prediction.configurations import Target
from simulator.prediction.operating import probability_of
from simulator.prediction.reach import Reach
from simulator.prediction.scenario import Scenario
from simulator.prediction.table import table

MODEL = "llama-3.2-1b"
TEXTS = ["depth 0.25", "width mlp=0.3 heads=0.25", "depth 0.5 + width 0.25"]


def _given(target: float | Target, **options: Any) -> tuple[Reach, ...]:
    return advise(MODEL, ["h100"], target, ["decode"], **{"prune": TEXTS, **options}).given


def test_speedups_are_those_of_a_table_and_margins_those_of_the_target() -> None:
    results = {r.prune: r for r in table(MODEL, "h100", prune=TEXTS, phase="decode")}
    given = _given(1.3)
    assert [one.margin for one in given] == sorted((one.margin for one in given), reverse=True)
    assert {one.result.prune for one in given} == set(TEXTS)
    for one in given:
        r = results[one.result.prune]
        assert one.result == r
        assert one.margin == pytest.approx(r.speedup / 1.3 - 1.0)
        assert one.probability == probability_of(1.3, r.speedup, r.speedup_lower, r.speedup_upper)
        assert one.reached == (r.speedup >= 1.3) == (one.verdict == "reached")
    assert {one.reached for one in given} == {True, False}


def test_a_time_is_a_speedup_over_the_dense_time_of_each_setting() -> None:
    found = advise(MODEL, ["h100", "a100"], Target(latency_s=1e-3), ["decode"], [1, 8], prune=["depth 0.5"]).given
    assert len(found) == 4
    for one in found:
        assert one.target == pytest.approx(one.result.dense_s / 1e-3)
        assert one.reached == (one.result.pruned_s <= 1e-3)


def test_tokens_per_s_hold_for_the_phase_and_its_new_tokens() -> None:
    scenario = Scenario(new_tokens=16)
    target = Target(tokens_per_s=700.0)
    (one,) = advise(MODEL, ["h100"], target, ["generate"], [2], [64], prune=["depth 0.5"], scenario=scenario).given
    assert one.result.tokens_per_s is not None
    assert one.margin == pytest.approx(one.result.tokens_per_s / 700.0 - 1.0)


def test_the_required_probability_decides() -> None:
    (near,) = _given(1.0001 * _given(1.3, prune=["depth 0.25"])[0].result.speedup, prune=["depth 0.25"])
    target = near.target
    assert not near.reached
    assert near.verdict.startswith("missed by ")
    (loose,) = _given(target, prune=["depth 0.25"], probability=0.2)
    assert loose.reached
    assert loose.verdict == "reached"
    (strict,) = _given(0.999 * target, prune=["depth 0.25"], probability=0.9)
    assert not strict.reached
    assert strict.verdict == "too uncertain"
    with pytest.raises(InputError, match="confidence 1: expected a number between 0 and 1"):
        _given(1.3, probability=1.0)


def test_texts_and_families_exclude_each_other_and_bad_texts_have_a_place() -> None:
    with pytest.raises(InputError, match="give no family with it"):
        _given(1.3, family=["depth"])
    with pytest.raises(InputError, match=r"column 7: part or option of width 'mpl' is unknown; did you mean mlp\?"):
        _given(1.3, prune=["width mpl=0.3"])
    found = advise(MODEL, ["h100"], 1.3, ["decode"], prune=["semi_structured", "depth 0.5"])
    assert [one.result.prune for one in found.given] == ["depth 0.5"]
    assert any("2:4" in note for note in found.notes)
    with pytest.raises(InputError, match="2:4"):
        _given(1.3, prune=["semi_structured"])


def test_sentences_state_what_is_reached_and_what_is_missed() -> None:
    def first(target: float, **options: Any) -> str:
        how = {"prune": TEXTS, **options}
        return " ".join(of_advice(advise(MODEL, ["h100"], target, ["decode"], **how), Target(target)))

    assert first(9.0).startswith(f"None of 3 prunings of {MODEL} reach 9.00x on h100_sxm in vllm (decode, batch 1, ")
    assert " The closest is depth 0.5 + width 0.25: " in first(9.0)
    assert first(1.3).startswith(f"1 of 3 prunings of {MODEL} reaches 1.30x on")
    assert first(1.01, prune=TEXTS[:1]).startswith(f"depth at 25 % reaches 1.01x for {MODEL} on h100_sxm in vllm (")
    missed = first(2.0, prune=TEXTS[:1])
    assert missed.startswith(f"depth at 25 % does not reach 2.00x for {MODEL} on ")
    assert " % short, probability < 1 %." in missed
    several = first(1.3, batch=[1, 8])
    assert several.count(f" reaches 1.30x for {MODEL} on ") == 1
    assert several.count(f" does not reach 1.30x for {MODEL} on any of 2 settings; best: ") == 2
    assert several.count("; worst: ") == 3
    alone = first(1.3, prune=["semi_structured", "depth 0.5"], engine=["vllm", "hf"])
    assert re.search(f"semi_structured at 50 % (reaches|does not reach) 1.30x for {MODEL} on h100_sxm in hf ", alone)
    certain = first(1.3, probability=0.999, prune=["depth 0.25", "depth 0.5"])
    assert certain.startswith(("1 of 2 prunings", "None of 2 prunings"))
