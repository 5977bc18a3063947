"""The removed share of each part: requested, realised, and sizes before and after."""

from __future__ import annotations

import pytest

from simulator.models.lower import lower
from simulator.prediction.prunings import removed_parts, sizes
from simulator.prediction.table import table
from simulator.pruning import prune
from simulator.pruning._steps import read_steps
from simulator.workload import WorkloadBatch

LLAMA = "llama-3.1-8b"


@pytest.mark.quick
@pytest.mark.parametrize("phase", ["prefill", "decode", "generate"])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "width heads=0.2 mlp=0.25",
            "heads 20 % requested, 18.8 % realised (32 to 26); inner width 25 % (14,336 to 10,752)",
        ),
        (
            "width attention=0.2",
            "KV heads 20 % requested, 25 % realised (8 to 6, heads 32 to 24), as a KV head goes with its query heads: "
            "heads=0.2 removes query heads alone",
        ),
        ("width kv=0.5", "KV heads 50 % (8 to 4)"),
        ("width hidden=0.5", "hidden size 50 % (4,096 to 2,048)"),
        ("depth 0.1", "layers 10 % requested, 9.4 % realised (32 to 29)"),
        ("depth 0.01", "layers 1 % requested, 0 % realised (still 32)"),
        ("depth layers=20-27", "layers 25 % (32 to 24)"),
        ("depth mlp=0.25", "MLP layers 25 % (32 to 24)"),
        ("depth attention=0.25", "attention layers 25 % (32 to 24)"),
        ("width mlp=0.5 layers=0-15", "inner width 25 % (14,336 to 10,752)"),
        ("dynamic_width 0.5", ""),
        ("kv_cache 0.5", ""),
    ],
)
def test_parts(phase: str, text: str, parts: str) -> None:
    dense = lower(LLAMA, phase=phase, seq=128, new_tokens=4 if phase == "generate" else 0)
    before, after = sizes(WorkloadBatch.of([dense, prune(dense, text)]))
    assert removed_parts(read_steps(text), before, after) == parts


@pytest.mark.quick
def test_sizes_are_those_of_the_whole_model_on_several_devices() -> None:
    (one,), (four,) = (sizes(WorkloadBatch.of([lower(LLAMA, devices=n)])) for n in (1, 4))
    assert one == four
    (experts,) = sizes(WorkloadBatch.of([lower("mixtral-8x7b")]))
    assert (experts["experts"], experts["expert width"], experts["MLP layers"]) == (8, 14336, 32)


def test_results_have_them() -> None:
    found = table(LLAMA, "h100", ["depth", "width"], [0.0, 0.25], prune=[])
    assert [r.parts for r in found][::2] == ["", ""]
    assert found[1].parts == "layers 25 % (32 to 24)"
    assert [r.prune for r in found] == ["depth 0", "depth 0.25", "width 0", "width 0.25"]
    assert [r.pruning for r in found][1::2] == ["depth at 25 %", "width at 25 %"]
