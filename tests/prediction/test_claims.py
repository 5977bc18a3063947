"""Judged claims: the probability follows the interval, a claim of other conditions names them, and
files are refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from program import cli
from tables import tables_of

import simulator
from simulator import InputError
from simulator.prediction.claims import Judgement

__all__ = ["cli"]
pytestmark = pytest.mark.quick

ASKED: dict[str, Any] = {"engine": "hf", "seq": 512}
HEADER = "model,hardware,engine,pruning,phase,batch,speedup"


def judged(claimed: float, **asked: Any) -> Judgement:
    found: Judgement = simulator.judge_claim(
        claimed, "llama-3.1-8b", "width 0.5", "a100", **(ASKED | asked)
    )
    return found


@settings(max_examples=10, deadline=None)
@given(phase=st.sampled_from(["prefill", "decode"]), batch=st.sampled_from([1, 64]))
def test_the_probability_is_one_at_the_prediction_a_tenth_at_the_ends_and_falls_away(
    phase: str, batch: int
) -> None:
    r = judged(1.0, phase=phase, batch=batch, engine="vllm").result
    # shares of the half-width on each side
    shares = (-3.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 3.0)
    ends = [math.log((r.upper if x > 0 else r.lower) / r.speedup) * abs(x) for x in shares]
    found = [
        judged(r.speedup * math.exp(log), phase=phase, batch=batch, engine="vllm").probability
        for log in ends
    ]
    assert found[4] == 1.0
    assert [found[2], found[6]] == pytest.approx([0.1, 0.1], abs=1e-6)
    assert found[:5] == sorted(found[:5])
    assert found[4:] == sorted(found[4:], reverse=True)


@pytest.mark.parametrize(
    ("stated", "true", "kind"),
    tables_of("prediction/cases.yaml")["claims"],
)
def test_a_claim_of_another_condition_is_unlikely_and_names_it(
    stated: dict[str, Any], true: dict[str, Any], kind: str
) -> None:
    """The speedup of each cause is that of the prediction under its condition."""
    asked = ASKED | stated
    r = simulator.predict("llama-3.1-8b", "width 0.5", "a100", **(asked | true))
    found = judged(r.speedup, **stated)
    assert found.unlikely
    assert r.speedup in [cause.speedup for cause in found.causes if cause.kind == kind]
    assert kind in [cause.kind for cause in found.each_kind[:3]]


def test_a_bound_is_broken_only_above_it_and_above_the_interval() -> None:
    r = judged(1.0, engine="vllm").result
    highest = max(r.roofline_bound, r.upper)
    assert not judged(0.99 * highest, engine="vllm").breaks_bound
    assert judged(1.01 * highest, engine="vllm").breaks_bound
    assert f"breaks the roofline bound of {r.roofline_bound:.2f}x" in judged(9.0).sentence
    assert judged(9.0).sentence.endswith("likeliest explanation: none of the named conditions.")


def test_conditions_that_no_request_can_state_are_omitted() -> None:
    """A prefill of as many positions is too long for a pass, and no memory holds their cache."""
    assert judged(1.5, engine="vllm", batch=8, seq=1_000_000_000).each_kind == ()


def test_a_claim_is_known_to_half_a_unit_of_its_last_digit() -> None:
    r = judged(1.0, engine="vllm").result
    printed = round(r.speedup, 1)
    assert printed != r.speedup
    assert judged(printed, engine="vllm").probability == 1.0


def test_a_file_gives_the_judgements_of_its_rows(cli: Any, tmp_path: Path) -> None:
    file, row = tmp_path / "claims.csv", "llama-3.1-8b,a100,hf,width 0.5,decode,1"
    file.write_text(f"{HEADER},seq\n{row},2.1x,512\n{row},1.0,\n")
    first, second = json.loads(cli.out(f"claims {file} --json"))
    assert first == judged(2.1).to_dict()
    assert second == judged(1.0, seq=2048).to_dict()
    out = cli.out(f"claims {file}")
    assert out.startswith("1 of 2 claims are unlikely; 1 break their bound.\n")
    assert f"explanation: {judged(2.1).explanation}." in " ".join(out.split())
    (answer,) = json.loads(
        cli.out(
            "speedup llama-3.1-8b --hardware a100 --engine hf --prune 'width 0.5' --seq 512"
            " --claim 2.1x --json"
        )
    )
    assert answer.items() >= first.items()


@pytest.mark.parametrize(
    ("header", "row", "says"),
    [
        (f"{HEADER},note", "{},2,x", "column 'note' is unknown"),
        (HEADER.replace("batch", "engines"), "{},2", "column batch is missing"),
        (f"{HEADER},seq", "{},2,5x", "claims.csv:2: seq: expected a whole number"),
        (HEADER, "{},-2", "claims.csv:2: claimed speedup: expected a ratio"),
        (f"{HEADER},dtype", "{},2,bf17", "claims.csv:2: dtype 'bf17' is unknown"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    header: str, row: str, says: str, cli: Any, tmp_path: Path
) -> None:
    file = tmp_path / "claims.csv"
    file.write_text(f"{header}\n{row.format('llama-3.1-8b,a100,hf,width 0.5,decode,1')}\n")
    assert says in cli.refused(f"claims {file}")


def test_a_claim_is_about_one_prediction(cli: Any) -> None:
    asked = "speedup llama-3.1-8b --hardware h100,a100 --prune 'depth 0.25' --claim"
    assert "--claim: expected one pruning" in cli.refused(f"{asked} 2.1")
    assert "--claim 'fast': expected a ratio such as 1.5x" in cli.refused(f"{asked} fast")
    with pytest.raises(InputError, match="claimed speedup: expected a ratio"):
        judged(0.0)
