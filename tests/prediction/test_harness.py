"""Results of EleutherAI's lm-evaluation-harness as a quality table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simulator.errors import InputError
from simulator.prediction.quality import QualityRow, choose_axis, load_quality

LISTED = "results,family,sparsity,method,options\n"
DENSE = {"arc_easy": 0.8, "piqa": 0.75, "mmlu": 0.6}


def results(acc: dict[str, float], perplexity: float, **change: Any) -> dict[str, Any]:
    """What lm-evaluation-harness 0.4 writes: a group with its parts, standard errors, a value that is no number."""
    found: dict[str, dict[str, Any]] = {
        task: {"alias": task, "acc,none": value, "acc_stderr,none": 0.01} for task, value in acc.items()
    }
    found["mmlu_anatomy"] = {"alias": " - anatomy", "acc,none": 0.5, "acc_stderr,none": 0.04}
    found["wikitext"] = {
        "word_perplexity,none": perplexity,
        "word_perplexity_stderr,none": "N/A",
        "bits_per_byte,none": float("nan"),
    }
    found["gsm8k"] = {"exact_match,strict-match": 0.3, "exact_match,flexible-extract": 0.35, "sample_len": 1319}
    better = {task: {"acc": True} for task in acc} | {"wikitext": {"word_perplexity": False}}
    content = {
        "results": found,
        "groups": {"mmlu": {"acc,none": 0.6}},
        "group_subtasks": {"mmlu": ["mmlu_anatomy"], "arc_easy": [], "piqa": [], "wikitext": []},
        "versions": dict.fromkeys(found, 1.0),
        "n-shot": dict.fromkeys(found, 0),
        "higher_is_better": better,
        "config": {"model": "hf", "limit": None},
        "model_name": "meta-llama/Llama-2-7B",
    }
    return content | change


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A dense file, a folder as ``--output_path`` leaves it with an older run, and a file of another method."""
    write(tmp_path, "dense.json", results(DENSE, 6.0))
    pruned = {"arc_easy": 0.72, "piqa": 0.75, "mmlu": 0.48}
    write(tmp_path, "out/llama__pruned/results_2026-02-02T10-00-00.1.json", results(pruned, 8.0))
    write(tmp_path, "out/llama__pruned/results_2026-01-01T10-00-00.1.json", results(DENSE, 99.0))
    write(tmp_path, "depth.json", results({"arc_easy": 0.4, "piqa": 0.5, "mmlu": 0.25}, 30.0, model_name="d"))
    path = tmp_path / "evals.csv"
    rows = "dense.json,dense,,,\nout,width,0.3,LLM-Pruner,\ndepth.json,depth,0.25,,unit=layer\n"
    path.write_text(LISTED + rows, encoding="utf-8")
    return path


def by_metric(path: Path) -> dict[tuple[str, str], QualityRow]:
    return {(row.family, row.metric): row for row in load_quality(path).rows}


def test_every_shared_metric_becomes_a_row(listed: Path) -> None:
    rows = by_metric(listed)
    metrics = {metric for family, metric in rows if family == "width"}
    assert metrics == {
        *("arc_easy acc", "piqa acc", "mmlu acc", "mmlu_anatomy acc", "wikitext word_perplexity"),
        *("gsm8k exact_match (strict-match)", "gsm8k exact_match (flexible-extract)", "mean acc of 3 tasks"),
    }
    perplexity = rows["width", "wikitext word_perplexity"]  # of the newer of two files
    assert (perplexity.dense, perplexity.pruned, perplexity.higher_is_better) == (6.0, 8.0, False)
    assert perplexity.relative_loss == pytest.approx(1 / 3)
    assert perplexity.protocol == "lm-evaluation-harness, 0-shot, task version 1.0"
    assert (perplexity.method, perplexity.sparsity) == ("LLM-Pruner", 0.3)
    accuracy = rows["depth", "arc_easy acc"]
    assert (accuracy.model, accuracy.method, accuracy.options) == ("llama-2-7b", "depth", (("unit", "layer"),))
    assert accuracy.relative_loss == pytest.approx(0.5)
    assert accuracy.source == "lm-evaluation-harness: d"


def test_the_mean_accuracy_counts_a_group_once_and_is_the_usual_metric(listed: Path) -> None:
    table = load_quality(listed)
    axis = choose_axis(table, strict=True)
    assert axis.metric == "mean acc of 3 tasks"
    assert axis.protocol == "lm-evaluation-harness: arc_easy, mmlu, piqa"
    (width, depth) = table.on_axis(axis).rows
    assert (width.dense, width.pruned) == pytest.approx((2.15 / 3, 1.95 / 3))
    assert depth.pruned == pytest.approx(1.15 / 3)
    assert choose_axis(table, "word_perplexity").metric == "wikitext word_perplexity"


def test_results_of_older_versions_without_filters_and_directions(tmp_path: Path) -> None:
    for name, acc, perplexity in (("a", 0.8, 5.0), ("b", 0.6, 6.0)):
        found = {
            "piqa": {"acc": acc, "acc_stderr": 0.01},
            "boolq": {"acc": acc},
            "wikitext": {"perplexity": perplexity},
        }
        write(tmp_path, f"{name}.json", {"results": found})
    (tmp_path / "q.csv").write_text("results,family,sparsity\na.json,dense,0\nb.json,width,0.5\n")
    rows = by_metric(tmp_path / "q.csv")
    losses = {metric: round(row.relative_loss, 9) for (_, metric), row in rows.items()}
    assert losses == {"piqa acc": 0.25, "boolq acc": 0.25, "wikitext perplexity": 0.2, "mean acc of 2 tasks": 0.25}
    write(tmp_path, "b.json", {"results": {"piqa": {"acc": 0.6}, "copa": {"acc": 0.5}}})  # no mean of the same tasks
    assert {metric for _, metric in by_metric(tmp_path / "q.csv")} == {"piqa acc"}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("out,width,0.3,,\n", "expected one row of family dense, got 0"),
        ("dense.json,dense,,,\n", "expected a row for a pruned model"),
        ("dense.json,dense,,,\nnone.json,width,0.3,,\n", "none.json: cannot be read"),
        ("dense.json,dense,,,\nempty,width,0.3,,\n", "'empty': expected metrics of one model, got 0 of []"),
        ("dense.json,dense,,,\nmixed,width,0.3,,\n", "of one model, got 7 of ['x', 'y']"),
        ("dense.json,dense,,,\nother.json,width,0.3,,\n", "shares no metric with the dense model"),
        ("dense.json,dense,,,\nshots.json,width,0.3,,\n", "measured differently: dense: lm-evaluation-harness, 0-shot"),
        ("dense.json,dense,,,\nlimited.json,width,0.3,,\n", "limited to 10.0 samples"),
        ("dense.json,dense,,,\nlist.json,width,0.3,,\n", "metrics of one model, got 0"),
        ("dense.json,dense,,,\nbroken.json,width,0.3,,\n", "broken.json:1:2: is not JSON"),
        ("dense.json,dense,,,\nout,width,30,,\n", "evals.csv:3: sparsity: expected a fraction in [0, 1), got 30"),
    ],
)
def test_bad_lists(rows: str, expected: str, listed: Path) -> None:
    folder = listed.parent
    (folder / "empty").mkdir()
    for name in "xy":
        write(folder, f"mixed/{name}/results_{name}.json", results(DENSE, 6.0, model_name=name))
    write(folder, "other.json", {"results": {"task": {"f1,none": 0.5}}})
    write(folder, "shots.json", results(DENSE, 6.0, **{"n-shot": {"arc_easy": 5}}))
    write(folder, "limited.json", results(DENSE, 6.0, config={"limit": 10.0}))
    (folder / "list.json").write_text("[1]")
    (folder / "broken.json").write_text("{")
    listed.write_text(LISTED + rows, encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_quality(listed)
    assert expected in str(error.value)
    assert str(error.value).startswith(str(listed))
