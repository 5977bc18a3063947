"""The removed share of each part: requested, realised, and sizes before and after."""

from __future__ import annotations

import pytest
from tables import tables_of

from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.prediction.prunings import removed_parts, sizes
from simulator.prediction.table import table
from simulator.prediction.wording import parts_line, pruning_text
from simulator.pruning import prune
from simulator.pruning._steps import read_steps

LLAMA = "llama-3.1-8b"


@pytest.mark.quick
@pytest.mark.parametrize("phase", ["prefill", "decode", "generate"])
@pytest.mark.parametrize(
    ("text", "parts"),
    tables_of("prediction/cases.yaml")["parts"],
)
def test_parts(phase: str, text: str, parts: str) -> None:
    dense = lower(LLAMA, phase=phase, seq=128, new_tokens=4 if phase == "generate" else 0)
    before, after = (sizes(w.meta.config) for w in (dense, prune(dense, text)))
    assert removed_parts(read_steps(text), before, after) == parts


@pytest.mark.quick
def test_sizes_are_those_of_the_whole_model_on_several_devices() -> None:
    one, four = (sizes(prune(lower(LLAMA, devices=n), "width 0.5").meta.config) for n in (1, 4))
    assert one == four
    assert one["KV heads"] == 4
    experts = sizes(load_model("mixtral-8x7b"))
    assert (experts["experts"], experts["expert width"], experts["MLP layers"]) == (8, 14336, 32)


@pytest.mark.quick
def test_shares_of_several_prunings_name_what_they_are_of() -> None:
    texts = [
        "width 0.3",
        "width mlp=0.3 heads=0.2",
        "depth 0.26",
        "depth 0.25",
        "depth layers=20-27",
    ]
    both = "27.3 % requested, 27 % realised over all parts"
    assert {
        pruning_text(r): parts_line(r).removeprefix(r.parts)
        for r in table(LLAMA, "h100", prune=texts)
    } == {
        "width at 30 % (29 % realised)": "; 29 % realised over all parts",
        f"width mlp=0.3 heads=0.2 ({both})": f"; {both}",
        "depth at 26 % (25 % realised)": "",
        "depth at 25 %": "",
        "depth layers=20-27 (25 % over all parts)": "",
    }


def test_results_have_them() -> None:
    found = table(LLAMA, "h100", ["depth", "width"], [0.0, 0.25], prune=[])
    assert [r.parts for r in found][::2] == ["", ""]
    assert found[1].parts == "layers 25 % (32 to 24)"
    assert [r.prune for r in found] == ["depth 0", "depth 0.25", "width 0", "width 0.25"]
