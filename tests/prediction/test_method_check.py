"""``prunesim methods check``: the numbers are those of the prediction, and each mistake of a method
has its warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tables import tables_of

import simulator
from simulator.cli import render
from simulator.prediction.method_check import MethodCheck, OperatorCheck, check_method

PREFILL: dict[str, Any] = {"phase": "prefill", "seq": 1024}


def method(**content: Any) -> simulator.Method:
    return simulator.Method.of({"method": "mine", **content})


def operators(found: MethodCheck) -> dict[str, OperatorCheck]:
    return {one.operator: one for one in found.phases[0].operators}


ROUTER = {"gemm": {"m": "tokens", "n": 1, "k": "hidden", "role": "router", "place": "before mlp"}}


def test_changes_add_up_to_the_prediction() -> None:
    """Differences of FLOPs, bytes and times are those of the workloads and of the prediction."""
    both = {"mlp": {"m": "1 - s", "kernel": "gather"}, "attention": {"keys": "1 - s"}}
    mine = method(dynamic=both, adds=[ROUTER])
    (phase,) = check_method(mine, "llama-3.1-8b", "h100", 0.5, **PREFILL).phases
    dense = simulator.lower("llama-3.1-8b", **PREFILL)
    pruned = mine.prune(dense, 0.5)
    for name in ("flops", "bytes"):
        total = float(getattr(pruned, name).sum() - getattr(dense, name).sum())
        assert sum(getattr(one, name) for one in phase.operators) == pytest.approx(total)
    seconds = sum(one.seconds for one in phase.operators)
    assert seconds == pytest.approx(phase.result.pruned_s - phase.result.dense_s, rel=1e-6)
    assert set(phase.unchanged) == {"qkv", "o", "head"}


def test_shapes_are_means_over_the_layers_that_change() -> None:
    mine = method(dynamic={"mlp": {"m": "1 - s", "layers": "1::2"}})
    found = operators(check_method(mine, sparsity=0.25, phase="prefill", seq=1024))
    assert (found["gate_up"].layers, found["gate_up"].m) == (16, (1024, 768))
    assert found["down"].k == (14336, 14336)
    # one token: its mean is a probability
    token = operators(check_method(mine, sparsity=0.25, phase="decode"))
    assert token["down"].m == pytest.approx((1, 0.75))
    experts = method(dynamic={"experts": {"top_k": 4}})
    routed = operators(check_method(experts, "qwen3-30b-a3b", **PREFILL))["experts"]
    assert routed.m == pytest.approx((8 * 1024, 4 * 1024))


def test_added_products_of_one_role_are_apart() -> None:
    products = ({"m": "tokens", "n": 64, "k": "hidden"}, {"m": "tokens", "n": 1, "k": 64})
    place = {"role": "router", "place": "before mlp"}
    adds = [{"gemm": {**product, **place}} for product in products]
    mine = method(dynamic={"mlp": {"m": "1 - s", "kernel": "gather"}}, adds=adds)
    (phase,) = check_method(mine, sparsity=0.5, **PREFILL).phases
    routers = [one for one in phase.operators if one.operator == "added router"]
    assert [(one.m[1], one.n[1], one.k[1]) for one in routers] == [(1024, 64, 4096), (1024, 1, 64)]


def test_a_removed_layer_and_a_low_rank_pair() -> None:
    gone = operators(check_method("shortgpt", sparsity=0.25, **PREFILL))["qkv"]
    assert (gone.layers, gone.m, gone.kernels) == (8, (1024, 0), {})
    pair = operators(check_method("svd-llm", **PREFILL))
    assert pair["qkv (first factor)"].m[1] == 1024
    assert pair["down (first factor)"].n[1] == pair["down"].k[1] == 2560
    assert pair["down"].flops + pair["down (first factor)"].flops < 0


@pytest.mark.parametrize(
    ("dynamic", "kernel", "evidence"),
    tables_of("prediction/cases.yaml")["kernels"],
)
def test_each_kernel_states_its_evidence(
    dynamic: dict[str, Any], kernel: str, evidence: str
) -> None:
    of_trtllm = {**PREFILL, "engine": "trtllm"}
    found = operators(check_method(method(dynamic=dynamic), **of_trtllm))["gate_up"]
    assert found.kernels[kernel].startswith(evidence)


WARNINGS = tables_of("prediction/cases.yaml")["warnings"]


@pytest.mark.parametrize("text", WARNINGS)
def test_a_mistake_has_its_warning(text: str) -> None:
    phase = "decode" if text.startswith("decode") else "prefill"
    found = check_method(method(**WARNINGS[text]), sparsity=0.5, phase=phase)
    assert text in " ".join(found.warnings)


def test_published_methods_have_no_mistake() -> None:
    """Where a published method has a warning, its added work or its decode is the reason."""
    for name, published in simulator.METHODS.items():
        if "experts" not in published.family and "semi_structured" not in published.family:
            for line in check_method(name, seq=8192).warnings:
                assert "added work takes" in line or "nothing changes" in line, (name, line)


@pytest.mark.parametrize("available", [80, 120])
@pytest.mark.parametrize("name", ["deja-vu", "svd-llm", "shortgpt", "snapkv", "fastv", "skipgpt"])
def test_a_check_fits_the_width(
    name: str, available: int, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "width", lambda: available)
    shown = cli.out(f"methods check {name} --phase prefill,decode --tp 2")
    assert max(map(len, shown.splitlines())) <= available


def test_a_check_as_json(cli: Any) -> None:
    found = cli.json("methods check skipgpt --sparsity 0.25 --phase prefill --seq 1024")
    assert (found["method"], found["sparsity"]) == ("skipgpt", 0.25)
    of_python = operators(check_method("skipgpt", sparsity=0.25, **PREFILL))["o"]
    (row,) = (one for one in found["phases"][0]["operators"] if one["operator"] == "o")
    assert (row["m"], row["flops"]) == ([1024, of_python.m[1]], of_python.flops)


def test_each_problem_of_a_file_is_one_line(tmp_path: Path, cli: Any) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: x\nfoo: 1\ndynamic:\n  qkv: {keys: 2}\n")
    _, problems = cli(f"methods check {path}", 2)
    assert [line.split(": ")[1:3] for line in problems.splitlines()] == [
        [f"{path}:2:1", "foo"],
        [f"{path}:4:15", "dynamic.qkv.keys"],
    ]
    assert "did you mean deja-vu" in cli.refused("methods check dejavu")
    assert "did you mean dynamic_depth" in cli.refused("methods new --like dynamic-dept")


def test_a_printed_file_is_a_method_that_can_be_shown(tmp_path: Path, cli: Any) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(cli.out("methods new --like low_rank"))
    assert "my-low-rank" in cli.out(f"methods {path}")
    assert cli.out(f"methods show {path}") == cli.out(f"methods {path}")
    assert "no problem" not in cli.out(f"methods check {path} --phase prefill")
