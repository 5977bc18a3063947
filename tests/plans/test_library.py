"""Libraries: formats, values, the metric, and one line for wrong content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tables import tables_of

from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.plans.library import EXAMPLES, combined, metric_of, read_library
from simulator.plans.search import search

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
    # row numbers without a name
    pandas = read(tmp_path, ",layer,mlp,kl_div\n0,all,dense,0\n1,all,none,0.5\n")
    assert list(pandas.values) == ["kl_div"]


def test_shipped_scores_of_another_model_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"^scores: expected those of llama-3\.1-8b, got those of smollm2-135m$"
    ):
        read_library("smollm2-135m", load_model("llama-3.1-8b"))


def test_a_layer_and_its_score_mean_its_removal_and_other_layers_stay_dense(tmp_path: Path) -> None:
    library = read(tmp_path, "layer,score\n10-19,0.5\n21,0.125\n")
    assert [library.texts(i) for i in (9, 10)] == [
        [("dense", "dense")],
        [("dense", "dense"), ("none", "none")],
    ]
    assert [library.values["score"][i].tolist() for i in (9, 21)] == [[0.0], [0.0, 0.125]]
    assert "a row is the removal of its layer" in library.notes[0]
    assert "layers 0-9, 20, 22-29 have no row; they stay dense" in library.notes[2]
    plan = search("smollm2-135m", "h100", 1.1, library, phase="prefill")
    removed = [row.layer for row in plan.layers if row.mlp == "none"]
    assert 21 in removed
    assert set(removed) <= {*range(10, 20), 21}
    with pytest.raises(
        InputError,
        match="accuracy: layer 0 has no value for attention dense, mlp dense; if it is 0",
    ):
        metric_of(read(tmp_path, "layer,accuracy\nall,0.5\n"), "")


def test_a_distance_needs_no_row_of_the_dense_layer(tmp_path: Path) -> None:
    library = read(tmp_path, "layer,mlp,kl_div\nall,768,0.5\n")
    assert library.values["kl_div"][0].tolist() == [0.0, 0.5]
    assert "taken as 0" in library.notes[0]
    with pytest.raises(InputError, match="has no value for attention dense, mlp dense"):
        metric_of(read(tmp_path, "layer,mlp,perplexity\nall,768,30\n"), "perplexity")


@pytest.mark.parametrize(("text", "message"), tables_of("plans/mistakes.yaml")["rows"])
def test_bad_rows_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "metric", "message"),
    [
        (
            "kl_div,lm_loss",
            "",
            "metric: expected one of kl_div, lm_loss, got none; choose it with --metric",
        ),
        ("kl_div", "kl", "metric 'kl' is unknown; did you mean kl_div?"),
        (
            "num_params,kl_div",
            "num_params",
            "metric num_params: expected a score such as kl_div, got a time, size or",
        ),
        (
            "runtime_ms,memory_mib",
            "",
            "expected a column of scores such as kl_div, got only times, sizes or counts: runtime_ms,",
        ),
        ("protocol", "", "expected a column of scores such as kl_div, got none"),
    ],
)
def test_a_metric_that_is_none_or_one_of_several_is_named(
    tmp_path: Path, columns: str, metric: str, message: str
) -> None:
    values = ",".join("0" for _ in columns.split(","))
    library = read(tmp_path, f"layer,mlp,{columns}\nall,dense,{values}\nall,768,{values}\n")
    with pytest.raises(InputError) as error:
        metric_of(library, metric)
    assert str(error.value).startswith(f"{tmp_path / 'scores.csv'}: {message}")


@pytest.mark.parametrize(
    "other",
    [
        *(
            "num_params",
            "active_params",
            "parameters",
            "memory_mib",
            "kv_cache_memory_mib",
            "weights_bytes",
            "count",
        ),
        *(
            "runtime_ms",
            "attention_runtime_ms",
            "time_ms",
            "latency",
            "decode_s",
            "attn_us",
            "seconds",
            "FLOPs",
        ),
    ],
)
def test_times_sizes_memory_and_counts_are_no_metrics(tmp_path: Path, other: str) -> None:
    """In version 0.3 the parameters of Puzzle's library were its metric, and the plan was a model
    without a layer."""
    for score in (
        "kl_div",
        "mmlu_high_school_us_history acc",
        "bits_per_byte",
        "mean acc of 5 tasks",
    ):
        library = read(tmp_path, f"layer,mlp,{other},{score}\nall,dense,7,0\nall,768,3,0.5\n")
        name, column = metric_of(library, "")
        assert (name, column[0].tolist()) == (score, [0.0, 0.5])


def test_more_variants_of_a_layer_than_a_search_takes_are_refused(tmp_path: Path) -> None:
    rows = [f"0,{a},{m}" for a in ("dense", "kv=1", "none") for m in range(1, 1400)]
    with pytest.raises(InputError, match="layer 0: expected at most 4096 variants"):
        read(tmp_path, "\n".join(["layer,attention,mlp", *rows]))


def test_results_of_the_harness_are_losses(tmp_path: Path) -> None:
    for name, value in (("dense", 0.6), ("cut", 0.5)):
        content = {
            "model_name": name,
            "results": {"arc_easy": {"acc,none": value}},
            "n-shot": {"arc_easy": 0},
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    library = read(tmp_path, "layer,mlp,results\nall,dense,dense.json\nall,768,cut.json\n")
    (name,) = [name for name in library.values if "arc_easy" in name]
    rise = library.values[name][0]
    assert rise[1] - rise[0] == pytest.approx(0.1)


def test_single_replacements_are_combined_and_their_scores_added(tmp_path: Path) -> None:
    library = combined(read(tmp_path, ROWS))
    assert library.texts(0) == [
        ("dense", "dense"),
        ("none", "dense"),
        ("dense", "768"),
        ("none", "768"),
    ]
    assert library.values["kl_div"][0].tolist() == [0.0, 0.5, 0.25, 0.75]
    with_both = combined(read(tmp_path, ROWS + "all,none,none,9\n"))
    assert len(with_both.layers[0]) == 4  # rows with both changed stay as they are


def test_the_shipped_library_has_a_score_of_each_variant_of_each_layer() -> None:
    library = read_library("smollm2-135m", MODEL)
    assert set(library.values) == {"kl_div", "perplexity"}
    for layer in range(30):
        texts = library.texts(layer)
        assert len(texts) == 11
        assert {("dense", "dense"), ("kv=1", "dense"), ("none", "dense"), ("dense", "none")} < set(
            texts
        )
        kl, perplexity = (metric_of(library, name)[1][layer] for name in ("kl_div", "perplexity"))
        assert kl[0] == pytest.approx(0.0, abs=1e-6)
        assert kl[1:].min() > 1e-4
        assert perplexity.min() > 1.0
    text = (EXAMPLES / "smollm2-135m.md").read_text(encoding="utf-8")
    protocol = (EXAMPLES / "smollm2-135m.csv").read_text(encoding="utf-8").splitlines()[1]
    assert protocol.split("(")[-1].rstrip(")") in text  # the digest of the weights
