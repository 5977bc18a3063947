"""Libraries of Puzzle and Puzzletron are read as their programs write them; other content is named in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.plans.entries import Entry
from simulator.plans.puzzletron import read_folder, read_json, read_weight_paths

from simulator.errors import InputError
from simulator.models.block import Block
from simulator.models.huggingface import from_hf_config
from simulator.models.library import load_model
from simulator.plans import puzzletron
from simulator.plans.library import read_library

MODEL = from_hf_config(
    {
        **{"model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 2},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 100},
    }
)
ROUTED = from_hf_config(
    {
        **{"model_type": "mixtral", "hidden_size": 768, "intermediate_size": 512, "num_hidden_layers": 2},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 100},
        **{"num_local_experts": 8, "num_experts_per_tok": 2},
    }
)
DENSE = MODEL.usual


def config(groups: int | str = 4, inner: int | str = 2048) -> dict[str, Any]:
    """Return a layer as ModelOpt writes it: with all keys."""
    common = {"sparsify": None, "weights_precision": "bf16"}
    attention, mlp = (
        {"no_op": size == "none", "replace_with_linear": size == "linear", **common} for size in (groups, inner)
    )
    attention |= {"num_key_value_heads": {"none": None, "linear": 4}.get(str(groups), groups)}
    mlp |= {"moe": None, "intermediate_size": {"none": None, "linear": 2048}.get(str(inner), inner)}
    return {"attention": attention | {"llama4": None, "mamba": None}, "ffn": mlp, "parallel_blocks": None}


def replacement(layer: int = 0, groups: int | str = 4, inner: int | str = 2048) -> dict[str, Any]:
    paths = [f"/ckpts/own/block_{layer}_ffn.safetensors"]
    return {"parent_layer_indices": [layer], "child_block_configs": [config(groups, inner)], "weight_paths": paths}


def read(content: Any, model: Any = MODEL) -> list[Entry]:
    return list(read_json(json.dumps(content).encode(), "own.json", model))


def plain(entries: list[Entry]) -> list[tuple[int, Block, dict[str, float]]]:
    return [(e.layer, e.block, dict(e.values)) for e in entries]


# -- Puzzle ------------------------------------------------------------------------------------------------------------


def variant(groups: int, inner: int, ms: float, kl: float) -> dict[str, Any]:
    stats = {"num_kv_heads": groups, "ffn_intermediate_size": inner, "memory_mib": 10.0, "runtime_ms": ms}
    own = {"num_params": 1000, "attention_runtime_ms": 1.0, "ffn_runtime_ms": ms - 1.0}
    return {"stats": stats | own, "metrics": {"kl_div": kl, "lm_loss": 2 + kl}}


PUZZLE = {
    f"layer_{layer}": {
        "attention = 4 kv heads (parent * 100%)\t&&\tffn = intermediate size 2e3 (parent * 100%)": variant(
            4, 2048, 3.0, 0.0
        ),
        "attention = 1 kv heads (parent * 25%)\t&&\tffn = no_op (parent * 0%)": variant(1, 0, 1.0, 0.25),
        "attention = no_op (parent * 0%)\t&&\tffn = intermediate size 1e3 (parent * 50%)": variant(0, 1024, 1.5, 0.5),
    }
    for layer in range(2)
}


@pytest.mark.quick
def test_the_library_of_puzzle_has_shapes_scores_and_times(tmp_path: Path) -> None:
    found = read(PUZZLE)
    costs = {"memory_mib": 10.0, "num_params": 1000.0}
    assert plain(found[3:]) == [
        (1, DENSE, {"runtime_ms": 3.0, "kl_div": 0.0, "lm_loss": 2.0, **costs}),
        (1, replace(DENSE, kv_heads=1, inner=0), {"runtime_ms": 1.0, "kl_div": 0.25, "lm_loss": 2.25, **costs}),
        (1, Block(0, 0, 1024), {"runtime_ms": 1.5, "kl_div": 0.5, "lm_loss": 2.5, **costs}),
    ]
    assert found[0].place.startswith("own.json: layer_0.attention = 4 kv heads (parent * 100%) && ffn")
    file = tmp_path / "block_library.json"
    file.write_text(json.dumps(PUZZLE))
    library = read_library(file, MODEL)
    assert [own.tolist() for own in library.values["kl_div"]] == [[0.0, 0.25, 0.5]] * 2
    assert library.layers[0] == library.layers[1] == tuple(e.block for e in found[:3])


def test_the_published_library_has_one_variant_per_row(shared_data: Path) -> None:
    """Its table states the same layers, so the library made of its rows is read as the table is."""
    table = shared_data / "puzzle_blocks.csv"
    if not table.is_file():
        pytest.skip("puzzle_blocks.csv is not available")
    header, *lines = table.read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","))) for line in lines if not line.startswith("#")]
    if not {"layer", "kv_heads", "ffn_intermediate_size", "kl_div"} <= rows[0].keys():
        pytest.skip("puzzle_blocks.csv has other columns")
    content: dict[str, dict[str, Any]] = {}
    for row in rows:
        sizes = {"num_kv_heads": int(row["kv_heads"]), "ffn_intermediate_size": int(row["ffn_intermediate_size"])}
        own = {"stats": sizes, "metrics": {"kl_div": float(row["kl_div"])}}
        content.setdefault(f"layer_{row['layer']}", {})[f"variant {len(content)} {sizes}"] = own
    found = read(content, load_model("llama-3.1-70b"))
    assert len(found) == len(rows)
    assert sum(e.values["kl_div"] for e in found) == pytest.approx(sum(float(r["kl_div"]) for r in rows))


# -- Puzzletron's lists ------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_a_replacement_library_has_shapes_and_files(tmp_path: Path) -> None:
    rows = [replacement(0), replacement(0, 2, 1000), replacement(1, "none"), replacement(1, "linear", "linear")]
    expected = [
        (0, DENSE, {}),
        (0, replace(DENSE, kv_heads=2, inner=1000), {}),
        (1, Block(0, 0, 2048), {}),
        (1, Block(0, 0, 0, linear=("attention", "mlp")), {}),
    ]
    assert plain(read(rows)) == expected
    assert plain(read([{"layer_replacement": row} for row in rows])) == expected
    assert plain(read([{"single_sequence_replacement": row, "chosen_replacements": []} for row in rows])) == expected
    file = tmp_path / "replacement_library.json"
    file.write_text(json.dumps(rows))
    assert read_weight_paths(file, MODEL)[0, DENSE] == ("/ckpts/own/block_0_ffn.safetensors",)
    assert len(read_library(file, MODEL).layers[1]) == 3  # the dense layer is added


@pytest.mark.quick
def test_keys_of_decilm_are_read_in_libraries() -> None:
    row = replacement() | {"child_block_configs": [{"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 1.0}}]}
    assert plain(read([row])) == [(0, replace(DENSE, kv_heads=2, inner=512), {})]


@pytest.mark.quick
def test_experts_are_read() -> None:
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "expert_intermediate_dim": 512}
    row = replacement()
    row["child_block_configs"][0]["ffn"] |= {"moe": moe | {"shared_expert_intermediate_dim": 8192}}
    assert plain(read([row], ROUTED)) == [(0, replace(ROUTED.usual, experts=4), {})]
    row["child_block_configs"][0]["ffn"]["moe"]["num_local_experts"] = 9
    with pytest.raises(
        InputError, match=r"child_block_configs\[0\]: expected at most the dense layer's experts 8, got 9"
    ):
        read([row], ROUTED)


@pytest.mark.quick
def test_subblocks_are_combined_as_puzzletron_does() -> None:
    none = {"block_config": None, "attention_config": None, "ffn_config": None}
    whole, thin = config(), config(2, "none")

    def row(layer: int, **given: Any) -> dict[str, Any]:
        return {**none, "block_idx": layer, "attention_checkpoint_dir": float("nan"), **given}

    rows = [
        row(0, block_config=whole, attention_config=whole["attention"], ffn_config=whole["ffn"]),
        row(0, attention_config=whole["attention"]),
        row(0, ffn_config=whole["ffn"]),
        row(0, attention_config=thin["attention"], block_config=float("nan")),
        row(0, ffn_config=thin["ffn"]),
        row(1, attention_config=thin["attention"], ffn_config=thin["ffn"]),
    ]
    content = json.dumps(rows).encode()  # with NaN, as pandas leaves it
    assert plain(list(read_json(content, "own.json", MODEL))) == [
        (0, DENSE, {}),
        (0, replace(DENSE, inner=0), {}),
        (0, replace(DENSE, kv_heads=2), {}),
        (0, replace(DENSE, kv_heads=2, inner=0), {}),
        (1, replace(DENSE, kv_heads=2, inner=0), {}),
    ]
    with pytest.raises(InputError, match=r"^own.json: \[6\]: layer 0 has the ffn twice, first at own.json: \[4\]"):
        read([*rows, rows[4]])


# -- Puzzletron's scores -----------------------------------------------------------------------------------------------


def gathered() -> dict[str, Any]:
    def row(layer: int, groups: int | str, inner: int | str, kl: float, ms: float | None) -> dict[str, Any]:
        metrics = {"kl_div": kl, "one_minus_kl_div": 1 - kl, "token_accuracy_top_1": 0.75}
        stats = {"runtime_ms": ms, "memory_mib": 4.0, "attention_runtime_ms": ms, "has_moe": 0, "num_kv_heads": 4}
        return {
            **{"block_config": config(groups, inner), "parent_layer_indices": [layer], "metrics": metrics},
            **{"layer_replacement": replacement(layer, groups, inner), "is_teacher": False, "stats": stats},
        }

    rows = [row(0, 2, 1024, 0.5, 1.0), row(1, "none", 2048, 0.25, None), row(0, 4, 2048, 0.0, 2.0)]
    teacher = row(1, 4, 2048, 0.0, 2.0) | {"block_idx": 1, "is_teacher": True}
    return {f"replacement_{i}": own for i, own in enumerate([*rows, teacher])}


@pytest.mark.quick
def test_gathered_metrics_are_scores_of_which_lower_ones_are_better() -> None:
    accuracy = {"one_minus_token_accuracy_top_1": 0.25, "memory_mib": 4.0}
    assert plain(read(gathered())) == [
        (0, replace(DENSE, kv_heads=2, inner=1024), {"kl_div": 0.5, "runtime_ms": 1.0, **accuracy}),
        (1, Block(0, 0, 2048), {"kl_div": 0.25, **accuracy}),
        (0, DENSE, {"kl_div": 0.0, "runtime_ms": 2.0, **accuracy}),
        (1, DENSE, {"kl_div": 0.0, "runtime_ms": 2.0, **accuracy}),
    ]


def validation(layer: int, groups: int | str, inner: int | str, kl: float) -> dict[str, Any]:
    own = {"avg": kl, "per_sample": [kl, kl]}
    solution = {"single_sequence_replacement": replacement(layer, groups, inner), "chosen_replacements": []}
    accuracy = {"token_accuracy_top_1": {"avg": 0.5, "per_sample": [0.5]}}
    return {"kl_div": own, **accuracy, "i_solution": 3, "puzzle_solution": solution, "args": {"seed": 1}}


def folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    single = validation(1, 4, "none", 0.75)
    single["puzzle_solution"] = {"single_block_replacement": {"block_idx": 1, "block_config": config(4, "none")}}
    files = {
        "solution_0.json": validation(0, 2, 1024, 0.5),
        "solution_1.json": validation(1, "none", 2048, 0.25),
        "solution_2.json": single,
        "teacher.json": {"token_accuracy_top_1": {"avg": 0.75}, "lm_loss": {"avg": 2.0}, "args": {}},
        "other.json": [],
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path


@pytest.mark.quick
def test_a_folder_of_validations_has_the_scores_of_the_teacher_too(tmp_path: Path) -> None:
    own, teacher = {"one_minus_token_accuracy_top_1": 0.5}, {"kl_div": 0.0, "lm_loss": 2.0}
    path = folder(tmp_path / "validation")
    assert plain(list(read_folder(path, MODEL))) == [
        (0, replace(DENSE, kv_heads=2, inner=1024), {"kl_div": 0.5, **own}),
        (1, Block(0, 0, 2048), {"kl_div": 0.25, **own}),
        (1, replace(DENSE, inner=0), {"kl_div": 0.75, **own}),
        (0, DENSE, {"one_minus_token_accuracy_top_1": 0.25, **teacher}),
        (1, DENSE, {"one_minus_token_accuracy_top_1": 0.25, **teacher}),
    ]
    assert [own.tolist() for own in read_library(path, MODEL).values["kl_div"]] == [[0.0, 0.5], [0.0, 0.25, 0.75]]
    # a dense layer that was validated as the others keeps its score
    (path / "solution_3.json").write_text(json.dumps(validation(0, 4, 2048, 0.125)))
    dense = [e for e in read_folder(path, MODEL) if e.block == DENSE]
    assert [(e.layer, e.values["kl_div"]) for e in dense] == [(0, 0.125), (1, 0.0)]
    assert plain(read(validation(0, 2, 1024, 0.5)))[0][0] == 0  # one file


@pytest.mark.quick
def test_folders_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path / "own")
    with pytest.raises(InputError, match=r"has no files \*solution\*.json; expected the folder single_sequence"):
        read_folder(tmp_path, MODEL)
    for name, value, reason in (
        ("MOST_FOLDER_BYTES", 1000, "expected files of at most 1e-06 GB together"),
        ("MOST_BYTES", 300, r"solution_0.json: is larger than 0.0003 MB"),
        ("MOST_FILES", 2, "expected a folder of at most 2 validations"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(puzzletron, name, value)
            with pytest.raises(InputError, match=reason):
                read_folder(path, MODEL)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v.pop("puzzle_solution"), r"solution_0.json: puzzle_solution: missing; expected an object"),
        (lambda v: v["kl_div"].update(avg=float("nan")), r"solution_0.json: kl_div.avg: expected a finite number, got"),
        (lambda v: v["kl_div"].update(avg="1"), r"solution_0.json: kl_div.avg: expected a finite number, got '1'"),
        (
            lambda v: v["puzzle_solution"].pop("single_sequence_replacement"),
            r"solution_0.json: puzzle_solution.single_sequence_replacement: missing; expected an object",
        ),
    ],
)
def test_wrong_validations_are_named(tmp_path: Path, change: Callable[[Any], Any], reason: str) -> None:
    path, content = folder(tmp_path / "own"), validation(0, 2, 1024, 0.5)
    change(content)
    (path / "solution_0.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=reason):
        read_folder(path, MODEL)


# -- other content -----------------------------------------------------------------------------------------------------


def _changed(**change: Any) -> list[Any]:
    return [replacement(), replacement(1) | change]


def _child(sublayer: str, **change: Any) -> list[Any]:
    child = config()
    child[sublayer] |= change
    return _changed(child_block_configs=[child])


def _puzzle(**change: Any) -> dict[str, Any]:
    own = variant(4, 2048, 1.0, 0.0)
    return {"layer_0": {"own": {part: own[part] | change.get(part, {}) for part in own}}}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (7, "own.json: expected an object, got 7"),
        ([7], r"own.json: \[0\]: expected an object, got 7"),
        ([{"rows": 1}], r"own.json: \[0\]: expected child_block_configs or block_idx, got \['rows'\]"),
        ({"layers": {}}, "own.json: layers: expected layer_0, layer_1, ..., or an object with metrics"),
        (
            _changed(parent_layer_indices=[2]),
            r"own.json: \[1\].parent_layer_indices\[0\]: expected an integer from 0 to 1",
        ),
        (_changed(parent_layer_indices=[True]), r"own.json: \[1\].parent_layer_indices\[0\]: expected an integer"),
        (
            _changed(parent_layer_indices=[0, 1]),
            r"own.json: \[1\].*: expected one layer, got 2; replacements of several",
        ),
        (_changed(parent_layer_indices=[]), r"own.json: \[1\].parent_layer_indices: expected one layer, got 0"),
        (_changed(parent_layer_indices=None), r"own.json: \[1\].parent_layer_indices: missing; expected a list"),
        (
            _changed(parent_layer_indices=3),
            r"own.json: \[1\].parent_layer_indices: expected a list of one layer, got 3",
        ),
        (_changed(child_block_configs=[]), r"own.json: \[1\].child_block_configs: expected a list of one layer"),
        (_changed(child_block_configs=None), r"own.json: \[1\].child_block_configs: missing; expected a list"),
        (_changed(child_block_configs=[3]), r"own.json: \[1\].child_block_configs\[0\]: expected an object, got 3"),
        (_changed(weight_paths=[3]), r"own.json: \[1\].weight_paths: expected a list of paths, got \[3\]"),
        (_child("ffn", intermediate_size=None), r"own.json: \[1\].child_block_configs\[0\].ffn.ffn_mult: missing"),
        (_child("ffn", intermediate_size=4096), r"\[1\].*\[0\]: expected at most the dense layer's MLP width 2048"),
        (_child("ffn", no_op="no"), r"own.json: \[1\].child_block_configs\[0\].ffn.no_op: expected true or false"),
        (_child("attention", num_key_value_heads=8), r"expected at most the dense layer's key/value heads 4, got 8"),
        (_child("attention", num_key_value_heads=3), r"attention.num_key_value_heads: expected a divisor of 8 query"),
        ([{"block_idx": 0}], r"own.json: \[0\]: expected attention_config, ffn_config or block_config"),
        ([{"block_idx": 2, "ffn_config": {}}], r"own.json: \[0\].block_idx: expected an integer from 0 to 1, got 2"),
        ({"layer_2": {"own": {}}}, "own.json: layer_2: expected layer_0 to layer_1"),
        ({"layer_0": {"own": {}}}, "own.json: layer_0.own.stats: missing; expected an object"),
        (_puzzle(stats={"num_kv_heads": 3}), "own.json: layer_0.own.stats.num_kv_heads: expected a divisor of 8 query"),
        (
            _puzzle(stats={"num_kv_heads": 5}),
            "own.json: layer_0.own.stats.num_kv_heads: expected an integer from 0 to 4",
        ),
        (
            _puzzle(stats={"ffn_intermediate_size": 2049}),
            "stats.ffn_intermediate_size: expected an integer from 0 to 2048",
        ),
        (
            _puzzle(stats={"runtime_ms": "1"}),
            "own.json: layer_0.own.stats.runtime_ms: expected a finite number, got '1'",
        ),
        (
            _puzzle(metrics={"kl_div": float("inf")}),
            "own.json: layer_0.own.metrics.kl_div: expected a finite number, got",
        ),
        (
            _puzzle(metrics={"kl_div": float("nan")}),
            "own.json: layer_0.own.metrics.kl_div: expected a finite number, got",
        ),
        (_puzzle(metrics={"kl_div": None}), "own.json: layer_0.own.metrics.kl_div: expected a finite number, got None"),
        (_puzzle(metrics={"kl_div": 10**4000}), "own.json: layer_0.own.metrics.kl_div: expected a finite number, got"),
        ({"replacement_0": {"metrics": {}}}, "own.json: replacement_0.block_idx: missing; expected an integer from 0"),
        ({"replacement_0": {"metrics": {}, "block_idx": 1}}, "own.json: replacement_0.block_config: missing"),
    ],
)
def test_other_content_is_named(content: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as error:
        read(content)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_variant_twice_and_hostile_files_are_rejected(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    for content, reason in (
        (
            json.dumps([*_changed(), replacement(0)]),
            r"own.json: \[2\]: layer 0 has attention dense, mlp dense twice, first",
        ),
        ('{"layer_0": {}, "layer_0": {}}', "own.json: key 'layer_0': expected once in an object"),
        ("[" * 100_000, "own.json: is not read: too many levels"),
        ("[" * 19_000_000, "own.json: expected at most 300,000 objects and lists"),
        ("[" * 50_000_000, "own.json: is larger than 20 MB"),
        (
            json.dumps([replacement(0)]),
            "own.json: expected variants of all 2 layers of llama, got 1; layers 1 have none",
        ),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=reason) as error:
            read_library(file, MODEL)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", range(850, 1000, 6))
def test_values_of_many_levels_are_rejected_in_one_line(depth: int) -> None:
    """Python reads a few more levels than it can show."""
    objects, lists = '{"a":' * depth + "1" + "}" * depth, "[" * depth + "]" * depth
    for text in (
        lists,
        f'[{{"child_block_configs": [], "parent_layer_indices": [{lists}]}}]',
        f'[{{"child_block_configs": {objects}, "parent_layer_indices": [1]}}]',
        f'{{"layer_0": {{"own": {{"stats": {{"num_kv_heads": {objects}}}}}}}}}',
        f'[{{"a": 1, "a": 2, "b": {lists}}}]',
    ):
        with pytest.raises(InputError, match=r"^own.json: ") as error:
            read_json(text.encode(), "own.json", MODEL)
        assert "\n" not in str(error.value)


@pytest.mark.quick
def test_models_that_the_formats_cannot_state_are_named() -> None:
    for name in ("deepseek-v2-lite", "qwen3-next-80b-a3b"):
        with pytest.raises(
            InputError, match=f"own.json: expected a model with key/value heads in all layers, got {name}"
        ):
            read([], load_model(name))
    with pytest.raises(InputError, match=r"own.json: layer_0: expected a layer with an MLP, but layer 0 of"):
        read({"layer_0": {}}, ROUTED)


KEYS = st.sampled_from(
    [
        *("layer_0", "own", "stats", "metrics", "num_kv_heads", "ffn_intermediate_size", "block_idx", "block_config"),
        *("parent_layer_indices", "child_block_configs", "attention", "ffn", "no_op", "moe", "num_key_value_heads"),
        *("intermediate_size", "layer_replacement", "puzzle_solution", "single_sequence_replacement", "avg"),
    ]
)
LEAVES = st.none() | st.booleans() | st.integers(-3, 5000) | st.floats() | st.text(max_size=3)
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=4), max_leaves=20)
PLACES = ([replacement(), replacement(1)], PUZZLE, gathered(), validation(0, 2, 1024, 0.5))


def _at(content: Any, data: st.DataObject) -> Any:
    """Return content with one value replaced, or one key removed."""
    if not isinstance(content, list | dict) or not content or data.draw(st.integers(0, 3)) == 0:
        return data.draw(VALUES)
    if isinstance(content, list):
        at = data.draw(st.integers(0, len(content) - 1))
        return [*content[:at], _at(content[at], data), *content[at + 1 :]]
    key = data.draw(st.sampled_from(sorted(content)))
    if data.draw(st.integers(0, 9)) == 0:
        return {name: value for name, value in content.items() if name != key}
    return content | {key: _at(content[key], data)}


@settings(max_examples=300, deadline=None)
@given(data=st.data(), whole=st.booleans())
def test_any_content_is_read_or_rejected_in_one_line(data: st.DataObject, whole: bool) -> None:
    content = data.draw(VALUES) if whole else _at(data.draw(st.sampled_from(PLACES)), data)
    found, wrong = [], "own.json: "
    try:
        found = read(content)
    except InputError as error:
        wrong = str(error)
    assert wrong.startswith("own.json: ")
    assert "\n" not in wrong
    for entry in found:
        assert 0 <= entry.layer < 2
        assert entry.block.kv_heads <= 4
        assert entry.block.inner <= 2048
        assert all(abs(value) < 1e300 for value in entry.values.values())
