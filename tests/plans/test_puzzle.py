"""Puzzletron's validations are read as its program writes them; other content is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shaped import Layer, cut, layer

from simulator.errors import InputError
from simulator.models.library import from_hf_config, load_model
from simulator.plans import library
from simulator.plans.library import Entry, read_library, read_validations

pytestmark = pytest.mark.quick

SIZES = {
    "hidden_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
MODEL = from_hf_config(
    {"model_type": "llama", "vocab_size": 100, "intermediate_size": 2048, **SIZES}
)
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 512}
ROUTED = from_hf_config({"model_type": "mixtral", "vocab_size": 100, **EXPERTS, **SIZES})
DENSE = MODEL.usual


def plain(entries: list[Entry]) -> list[tuple[int, Layer, dict[str, float]]]:
    return [(e.layer, e.variant, dict(e.values)) for e in entries]


def smaller(kv_heads: int = 4, inner: int = 2048) -> Layer:
    """The dense layer with other sizes; 0 removes a sublayer."""
    return layer(8 if kv_heads else 0, kv_heads, inner, head_dim=96)


def config(groups: int | str = 4, inner: int | str = 2048) -> dict[str, Any]:
    """Return a layer as ModelOpt writes it: with all keys."""
    attention, mlp = (
        {"no_op": size == "none", "replace_with_linear": size == "linear", "sparsify": None}
        for size in (groups, inner)
    )
    attention |= {
        "num_key_value_heads": {"none": None, "linear": 4}.get(str(groups), groups),
        "llama4": None,
    }
    mlp |= {"moe": None, "intermediate_size": {"none": None, "linear": 2048}.get(str(inner), inner)}
    return {"attention": attention, "ffn": mlp, "parallel_blocks": None}


def validation(layer: int, child: dict[str, Any], kl: float) -> dict[str, Any]:
    one = {
        "parent_layer_indices": [layer],
        "child_block_configs": [child],
        "weight_paths": ["/own"],
    }
    scores = {
        "kl_div": {"avg": kl, "per_sample": [kl, kl]},
        "token_accuracy_top_1": {"avg": 0.5, "per_sample": [0.5]},
    }
    return {
        **scores,
        "i_solution": 3,
        "puzzle_solution": {"single_sequence_replacement": one},
        "args": {"seed": 1},
    }


def folder(path: Path, **changed: Any) -> Path:
    path.mkdir(exist_ok=True)
    single = validation(1, config(), 0.75)
    single["puzzle_solution"] = {
        "single_block_replacement": {"block_idx": 1, "block_config": config(4, "none")}
    }
    files = {
        "solution_0.json": validation(0, config(2, 1024), 0.5),
        "solution_1.json": validation(1, config("none", "linear"), 0.25),
        "solution_2.json": single,
        "teacher.json": {
            "token_accuracy_top_1": {"avg": 0.75},
            "lm_loss": {"avg": 2.0},
            "args": {},
        },
        "other.json": [],
    }
    for name, content in (files | changed).items():
        (path / name).write_text(json.dumps(content))
    return path


def test_a_folder_of_validations_has_the_scores_of_the_teacher_too(tmp_path: Path) -> None:
    own, teacher = {"one_minus_token_accuracy_top_1": 0.5}, {"kl_div": 0.0, "lm_loss": 2.0}
    path = folder(tmp_path / "validation")
    assert plain(read_validations(path, MODEL)) == [
        (0, smaller(2, 1024), {"kl_div": 0.5, **own}),
        (1, layer(linear=("mlp",)), {"kl_div": 0.25, **own}),
        (1, smaller(inner=0), {"kl_div": 0.75, **own}),
        (0, DENSE, {"one_minus_token_accuracy_top_1": 0.25, **teacher}),
        (1, DENSE, {"one_minus_token_accuracy_top_1": 0.25, **teacher}),
    ]
    assert [own.tolist() for own in read_library(path, MODEL).values["kl_div"]] == [
        [0.0, 0.5],
        [0.0, 0.25, 0.75],
    ]
    # a dense layer that was validated as the others keeps its score
    (path / "solution_3.json").write_text(json.dumps(validation(0, config(), 0.125)))
    dense = [e for e in read_validations(path, MODEL) if e.variant == DENSE]
    assert [(e.layer, e.values["kl_div"]) for e in dense] == [(0, 0.125), (1, 0.0)]


def test_keys_of_decilm_and_experts_are_read(tmp_path: Path) -> None:
    deci = {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 1.0}}
    found = read_validations(
        folder(tmp_path / "deci", **{"solution_0.json": validation(0, deci, 0.5)}), MODEL
    )
    assert found[0].variant == smaller(2, 512)
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "expert_intermediate_dim": 512}
    file = tmp_path / "solution_0.json"
    file.write_text(json.dumps(validation(0, config() | {"ffn": {"moe": moe}}, 0.5)))
    assert read_validations(tmp_path, ROUTED)[0].variant == cut(ROUTED.usual, "mlp", experts=4)
    file.write_text(
        json.dumps(validation(0, config() | {"ffn": {"moe": moe | {"num_local_experts": 9}}}, 0.5))
    )
    with pytest.raises(
        InputError, match=r"child_block_configs\[0\]: experts: expected at most 8, got 9"
    ):
        read_validations(tmp_path, ROUTED)


def test_folders_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path / "own")
    with pytest.raises(
        InputError, match=r"has no files \*solution\*.json; expected the folder single_sequence"
    ):
        read_validations(tmp_path, MODEL)
    for name, value, reason in (
        ("MOST_FOLDER_BYTES", 1000, "expected files of at most 1e-06 GB together"),
        ("MOST_FILES", 2, "expected a folder of at most 2 validations"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(library, name, value)
            with pytest.raises(InputError, match=reason):
                read_validations(path, MODEL)


def _one(**change: Any) -> Callable[[Any], Any]:
    return lambda v: v["puzzle_solution"]["single_sequence_replacement"].update(change)


def _child(**change: Any) -> Callable[[Any], Any]:
    return _one(child_block_configs=[config() | change])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v.pop("puzzle_solution"), "puzzle_solution: missing; expected an object"),
        (
            lambda v: v["kl_div"].update(avg=float("nan")),
            "kl_div.avg: expected a finite number, got",
        ),
        (
            _one(parent_layer_indices=[2]),
            r"parent_layer_indices\[0\]: expected an integer from 0 to 1, got 2",
        ),
        (
            _one(parent_layer_indices=[0, 1]),
            r"parent_layer_indices: expected a list of one layer, got \[0, 1\]",
        ),
        (_one(child_block_configs=[3]), "child_block_configs: expected a list of 1 objects"),
        (_child(ffn={}), r"child_block_configs\[0\].ffn.ffn_mult: missing"),
        (_child(ffn={"intermediate_size": 4096}), r"\[0\]: inner: expected at most 2048, got 4096"),
        (
            _child(attention={"num_key_value_heads": 3}),
            "attention.num_key_value_heads: expected a divisor of num_attention_heads 8",
        ),
    ],
)
def test_wrong_validations_are_named(
    tmp_path: Path, change: Callable[[Any], Any], reason: str
) -> None:
    content = validation(0, config(2, 1024), 0.5)
    change(content)
    path = folder(tmp_path / "own", **{"solution_0.json": content})
    with pytest.raises(InputError, match=f"solution_0.json: .*{reason}") as error:
        read_validations(path, MODEL)
    assert "\n" not in str(error.value)


def test_models_that_the_formats_cannot_state_are_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "own")
    for name in ("deepseek-v2-lite", "qwen3-next-80b-a3b"):
        with pytest.raises(
            InputError, match=f"expected a model with key/value heads in all layers, got {name}"
        ):
            read_validations(path, load_model(name))
