"""Tasks as people typed them: input that was refused, hints that led nowhere, answers that
misled."""

from __future__ import annotations

from typing import Any

import pytest
from tables import rows_of

import simulator
from simulator.errors import InputError

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("inside")]


@pytest.mark.parametrize(
    "line",
    [
        "speedup llama-2-7b --prune 'depth 0.25'",
        "explain llama-2-7b --prune 'depth 0.25'",
        "serve llama-2-7b --prune 'depth 0.25'",
        "advise llama-2-7b --family depth --target 1.2x",
        "costs llama-2-7b",
        "search smollm2-135m --scores smollm2-135m --metric kl_div --target 1.2x",
        "report llama-2-7b --prune 'depth 0.25' -o report.html",
    ],
)
def test_one_bad_engine_of_several_is_excluded_with_a_note(line: str, cli: Any) -> None:
    out, err = cli(f"{line} --hardware h100 --engine vllm,hf --weight-dtype fp8")
    assert out
    assert "note: hf is excluded: hf has no kernels for fp8 weights alone" in err
    assert "hf has no kernels" in cli.refused(
        f"{line} --hardware h100 --engine hf --weight-dtype fp8"
    )


def test_an_engine_without_kernels_of_a_pruning_is_excluded_and_an_unknown_one_is_not(
    cli: Any,
) -> None:
    line = "speedup llama-2-7b --hardware h100 --prune 2:4 --engine"
    out, err = cli(f"{line} vllm,trtllm")
    assert "on h100_sxm in trtllm" in out
    assert "vllm is excluded: vllm has no 2:4 kernels" in err
    assert "vllm has no 2:4 kernels" in cli.refused(f"{line} vllm,sglang")
    assert "engine 'vlm' is unknown" in cli.refused(f"{line} vlm,trtllm")


HINTS = """
@ --hardware foo100                                  | prunesim hardware new foo100 writes a profile to fill in
@ --hardware h100 --prune 'mlp=0.3 heads=0.2'        | before the part mlp, such as width mlp=0.3 heads=0.2
@ --hardware h100 --prune 'heads 0.3'                | expected a family before the part heads, such as width heads=0.25
advise llama-3.1-8b --hardware h100 --confidence abc | --confidence: expected a number, got 'abc'.
models show llama-3.1-8b --batch=x                   | --batch: expected a whole number, got 'x'.
@ --prune 'depth 0.25'                               | Missing option '--hardware'
@ --hardware --prune 'depth 0.25'                    | --hardware: its value is missing; expected LIST
"""


@pytest.mark.parametrize(("line", "hint"), rows_of(HINTS))
def test_hints(line: str, hint: str, cli: Any) -> None:
    error = cli.refused(line.replace("@", "speedup llama-3.1-8b"))
    assert hint in error
    assert "Input should be" not in error


def test_a_list_given_to_predict_names_table() -> None:
    for settings in ({"batch": [1, 16]}, {"engine": ["vllm", "hf"]}):
        with pytest.raises(
            InputError, match=r"expected one value, got 2; simulator\.table takes lists"
        ):
            simulator.predict("llama-3.1-8b", "depth 0.25", "h100", **settings)


def test_a_newer_model_of_equal_shapes_is_an_alias() -> None:
    assert simulator.load_model("llama-3.3-70b") == simulator.load_model(
        "meta-llama/Llama-3.3-70B-Instruct"
    )


def test_a_note_names_a_device_once(cli: Any) -> None:
    _, err = cli(
        "speedup llama-3.1-8b --hardware a100 --phase prefill --batch 1,64 --prune 'token 0.25'"
    )
    assert (
        "a100_sxm_80gb, prefill, batch 1, seq 2048 and prefill, batch 64, seq 2048: token at 25"
        " % (1." in err
    )


def test_answers_state_what_is_certain(cli: Any) -> None:
    line = "llama-3.1-8b --hardware h100"
    # zeros that a dense kernel multiplies change nothing, which is no uncertain gain
    assert "gives llama-3.1-8b no gain: 1.00x" in cli.out(
        f"speedup {line} --family unstructured --sparsity 0.5"
    )
    assert "as fast as the dense one" in cli.out(
        f"explain {line} --family unstructured --sparsity 0.5"
    )
    # the other batch does not fit into the memory
    two = "--batch 1,64 --seq 32k --prune"
    assert "pays at batch 1 (1." in cli.out(f"speedup {line} {two} 'width kv=0.5'")
    assert "has no certain gain at batch 1;" in " ".join(
        cli.out(f"speedup {line} {two} 'unstructured 0.5'").split()
    )
    # 2:4 has one sparsity, so none need be given
    assert "vllm has no 2:4 kernels" in cli.refused(f"speedup {line} --family 2:4")
    # fewer active experts leave all experts, which is not 0 % of what was asked
    fewer = cli.out("speedup qwen3-30b-a3b --hardware h100 --prune 'experts 0.25 fewer=active'")
    assert "0 % realised" not in fewer
