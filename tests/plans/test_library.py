"""Libraries: formats, values, and one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.plans.library import check_values, combined, generated_library, groups_of, read_library

pytestmark = pytest.mark.quick

MODEL = load_model("smollm2-135m")  # 30 layers, 9 heads on 3, an MLP of 1536
ROWS = "layer,attention,mlp,kl_div\nall,dense,dense,0\nall,none,dense,0.5\n0-3,dense,768,0.25\n4-29,dense,512,0.125\n"


def read(tmp_path: Path, text: str, name: str = "scores.csv"):
    file = tmp_path / name
    file.write_text(text)
    return read_library(file, MODEL)


def test_rows_of_a_csv_are_variants_with_their_values(tmp_path: Path) -> None:
    library = read(tmp_path, ROWS)
    assert library.texts(0) == [("dense", "dense"), ("none", "dense"), ("dense", "768")]
    assert library.values["kl_div"][29].tolist() == [0.0, 0.5, 0.125]


def test_columns_of_puzzle_name_sizes(tmp_path: Path) -> None:
    rows = "".join(f"{i},3,1536,0\n{i},0,768,0.5\n" for i in range(30))
    library = read(tmp_path, "layer,kv_heads,ffn_intermediate_size,kl_div\n" + rows)
    assert library.texts(7) == [("dense", "dense"), ("none", "768")]


def test_a_distance_needs_no_row_of_the_dense_layer(tmp_path: Path) -> None:
    library = read(tmp_path, "layer,mlp,kl_div\nall,768,0.5\n")
    assert library.values["kl_div"][0].tolist() == [0.0, 0.5]
    assert "taken as 0" in library.notes[0]
    with pytest.raises(InputError, match="has no value for attention dense, mlp dense"):
        check_values(read(tmp_path, "layer,mlp,perplexity\nall,768,30\n"), "perplexity")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer,mlp,kl_div\n0,768,0.1\n", "layers 1-29 have none"),
        ("layer,mlp,kl_div\nall,768,0.1\n5,768,0.2\n", "layer 5 has attention dense, mlp 768 twice"),
        ("layer,mlp,kl_div\nall,768,nan\n", "scores.csv:2: kl_div: expected a finite number"),
        ("layer,mlp,kl_div\nall,768,much\n", "kl_div: expected a number, got 'much'"),
        ("layer,mlp,kl_div\n30,768,1\n", "expected numbers from 0 to 29, got 30"),
        ("layer,mlp,kl_div\n3-1,768,1\n", "a range such as 0-7"),
        ("layer,mlp,kl_div\n0,4096,1\n", "expected a width up to 1536"),
        ("layer,kl_div\n0,1\n", "a column attention or mlp"),
        ("layer,attention,kv_heads,kl_div\n0,dense,3,1\n", "state the same"),
        ("mlp,kl_div\n768,1\n", "column layer is missing"),
    ],
)
def test_bad_rows_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value)


def test_choices_are_all_combinations(tmp_path: Path) -> None:
    text = "attention: [dense, none]\nmlp: [dense, 768, none]\nlayers:\n  0-1,29: {mlp: [dense]}\n"
    library = read(tmp_path, text, "choices.yaml")
    assert [len(own) for own in library.layers] == [2, 2, *[6] * 27, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heads: [dense]\n", "heads: .*unknown"),
        ("mlp: 768\n", "mlp: expected a list of variants"),
        ("mlp: [dense, 9999]\n", "mlp.1: .*expected a width up to 1536"),
        ("layers:\n  0-1: {mlp: [768]}\n  1: {mlp: [512]}\n", "layer 1 is listed twice"),
        ("layers:\n  99: {mlp: [768]}\n", "expected numbers from 0 to 29"),
        ("- 1\n", "expected the keys"),
    ],
)
def test_bad_choices_name_their_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, text, "choices.yaml")
    assert "choices.yaml:" in str(error.value)
    assert "\n" not in str(error.value)


def test_results_of_the_harness_are_losses(tmp_path: Path) -> None:
    for name, value in (("dense", 0.6), ("cut", 0.5)):
        content = {"model_name": name, "results": {"arc_easy": {"acc,none": value}}, "n-shot": {"arc_easy": 0}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    library = read(tmp_path, "layer,mlp,results\nall,dense,dense.json\nall,768,cut.json\n")
    (name,) = [name for name in library.values if "arc_easy" in name]
    rise = library.values[name][0]
    assert rise[1] - rise[0] == pytest.approx(0.1)


def test_single_replacements_are_combined_and_their_scores_added(tmp_path: Path) -> None:
    library = combined(read(tmp_path, ROWS))
    assert library.texts(0) == [("dense", "dense"), ("none", "dense"), ("dense", "768"), ("none", "768")]
    assert library.values["kl_div"][0].tolist() == [0.0, 0.5, 0.25, 0.75]
    with_both = combined(read(tmp_path, ROWS + "all,none,none,9\n"))
    assert len(with_both.layers[0]) == 4  # rows with both changed stay as they are


def test_generated_variants_have_no_values() -> None:
    library = generated_library(MODEL)
    assert not library.values
    assert all(own[0] == block for own, block in zip(library.layers, MODEL.layout))
    with pytest.raises(InputError, match="has no scores"):
        check_values(library, "kl_div")


@pytest.mark.parametrize(("text", "message"), [("0-3,2-5", "layer 2 is in two groups"), ("0", "1 to 30 layers")])
def test_groups_that_overlap_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        groups_of(text, 30)


def test_groups_cover_every_layer_once() -> None:
    for given in (None, 4, "2-5,9-10"):
        assert np.concatenate([list(group) for group in groups_of(given, 30)]).tolist() == list(range(30))
