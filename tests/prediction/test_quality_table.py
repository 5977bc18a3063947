"""Quality tables: shipped tables are consistent, a user's wrong table is refused in one line, and
results of EleutherAI's lm-evaluation-harness become a table."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tables import tables_of

from simulator.errors import InputError
from simulator.files.csv import read_csv
from simulator.models.library import list_models
from simulator.prediction.quality import (
    COLUMNS,
    QualityRow,
    choose_axis,
    list_quality,
    load_quality,
    read_quality,
    table_text,
)

pytestmark = pytest.mark.quick

ROW = {
    "method": "SLEB",
    "family": "depth",
    "model": "llama-2-7b",
    "sparsity": "0.1",
    "metric": "ppl",
    "higher_is_better": "false",
    "dense": "7.26",
    "pruned": "9.34",
    "protocol": "C4",
    "source": "a paper",
}


def text(*rows: dict[str, str], leave_out: str = "") -> str:
    names = [c for c in ROW if c != leave_out] + [
        c for c in (rows[0] if rows else {}) if c not in ROW
    ]
    return (
        "\n".join(
            [",".join(names), *(",".join((ROW | row).get(c, "") for c in names) for row in rows)]
        )
        + "\n"
    )


@pytest.mark.parametrize("name", list_quality())
def test_shipped_tables_are_consistent(name: str) -> None:
    # the reader refuses dense values that differ on an axis, and repeated rows
    table = load_quality(name)
    assert len(table) > 0
    for row in table.rows:
        assert row.source
        assert row.protocol
        assert row.relative_loss > -0.05, "pruning that does much good is a transcription error"
    # a method seldom gets better as more is removed; where a table says so it is known
    series: dict[object, list[QualityRow]] = defaultdict(list)
    for row in table.rows:
        series[row.method, row.family, row.model, row.axis].append(row)
    uneven = sum(
        b.relative_loss < a.relative_loss
        for rows in series.values()
        for a, b in itertools.pairwise(sorted(rows, key=lambda r: r.sparsity))
        if b.sparsity > a.sparsity
    )
    assert uneven <= 2


def test_published_rows_name_their_source_and_known_models() -> None:
    table = load_quality("published")
    assert all("arXiv" in r.source or "repo" in r.source for r in table.rows)
    known = set(table.models) & set(list_models())
    assert known >= {"llama-2-7b", "llama-2-13b", "llama-7b", "llama-3.1-8b", "opt-13b"}


def test_published_values_spot_checked() -> None:
    rows = load_quality("published").of_model("LLaMA-2-7B").rows  # names without regard to case
    (sleb,) = [r for r in rows if r.method == "SLEB" and r.sparsity == 0.2 and r.higher_is_better]
    assert (sleb.family, sleb.dense, sleb.pruned) == ("depth", 69.0, 56.8)
    assert sleb.relative_loss == pytest.approx(0.1768, abs=1e-4)
    (sliced,) = [
        r for r in rows if r.source == "SliceGPT (arXiv 2401.15024) Table 1" and r.sparsity == 0.25
    ]
    assert (sliced.family, sliced.dense, sliced.pruned) == ("width_cross", 5.47, 7.24)
    assert dict(sliced.options) == {"residual_projections": True}


def test_losses_of_the_taxonomy_paper(shared_data: Path) -> None:
    """Every accuracy gap quoted with a sparsity is a loss of the table; perplexities without a
    dense value are not."""
    source = read_csv(
        (shared_data / "paper_tables.csv").read_bytes().split(b"\n", 1)[1],
        "paper",
        ("what", "family"),
    )
    quoted = [
        cells for cells in source.each(dict) if cells["accuracy_gap_percent"] and cells["sparsity"]
    ]
    table, seven = load_quality("taxonomy-paper").of_model("llama-3.1-8b"), []
    first = table.on_axis(choose_axis(table, "mean accuracy"))
    for cells in quoted:
        what, gap = (
            (cells["method"], float(cells["sparsity"])),
            float(cells["accuracy_gap_percent"]),
        )
        if cells["quality_metric"] == "accuracy_7_tasks":
            seven.append((*what, float(cells["quality"])))
            continue
        (own,) = (r for r in first.rows if (r.method, r.sparsity) == what)
        assert own.family == cells["family"]
        assert own.relative_loss == pytest.approx(gap / 100.0, abs=1e-9)
    (other,) = (r for r in table.rows if r.axis != first.rows[0].axis)
    assert [(other.method, other.sparsity, other.pruned)] == seven
    assert len(table) == len(quoted)
    assert all("as quoted in a public reading note" in r.source for r in table.rows)


def test_round_trip() -> None:
    rows = load_quality("published").rows
    assert read_quality(table_text(rows)).rows == rows
    assert table_text(rows).splitlines()[0] == ",".join(COLUMNS)


def test_further_columns_and_blank_lines_are_ignored() -> None:
    table = read_quality(text({"speed": "3"}, {"sparsity": "0.2", "pruned": "12"}) + "\n\n")
    assert [r.relative_loss for r in table.rows] == pytest.approx([9.34 / 7.26 - 1, 12 / 7.26 - 1])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty"),
        (text(), "no rows"),
        (text(ROW, leave_out="metric"), ":1: column metric is missing"),
        *((text(*rows), why) for rows, why in tables_of("prediction/mistakes.yaml")["tables"]),
    ],
)
def test_bad_tables(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_quality(path)
    message = str(error.value)
    assert expected in message
    assert message.startswith(str(path))
    assert "\n" not in message


def test_names_of_tables(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean published"):
        load_quality("publish")
    with pytest.raises(InputError, match="did you mean"):
        load_quality("published").of_model("llama-2-7")
    with pytest.raises(InputError, match="no such file"):
        load_quality(tmp_path / "none.csv")
    path = tmp_path / "bytes.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load_quality(path)


def test_choose_axis() -> None:
    table = load_quality("published").of_model("llama-2-7b")
    assert choose_axis(table, "mmlu").metric == "MMLU accuracy (%)"
    # an exact name precedes longer names
    assert choose_axis(table, "WikiText2 perplexity").metric == "WikiText2 perplexity"
    with pytest.raises(InputError, match="no rows with metric 'bleu'"):
        choose_axis(table, "bleu")
    with pytest.raises(InputError, match="mixed metrics or protocols; choose one"):
        choose_axis(table, strict=True)


LISTED = "results,family,sparsity,method,options\n"
DENSE = {"arc_easy": 0.8, "piqa": 0.75, "mmlu": 0.6}


def results(acc: dict[str, float], perplexity: float, **change: Any) -> dict[str, Any]:
    """Results as lm-evaluation-harness 0.4 writes them: a group with its parts, standard errors,
    NaN."""
    found: dict[str, dict[str, Any]] = {
        task: {"alias": task, "acc,none": value, "acc_stderr,none": 0.01}
        for task, value in acc.items()
    }
    found["mmlu_anatomy"] = {"alias": " - anatomy", "acc,none": 0.5, "acc_stderr,none": 0.04}
    found["wikitext"] = {
        "word_perplexity,none": perplexity,
        "word_perplexity_stderr,none": "N/A",
        "bits_per_byte,none": float("nan"),
    }
    found["gsm8k"] = {
        "exact_match,strict-match": 0.3,
        "exact_match,flexible-extract": 0.35,
        "sample_len": 1319,
    }
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
    """Return a list of results: a dense file, a folder of ``--output_path`` with an older run, and
    a file of another method."""
    write(tmp_path, "dense.json", results(DENSE, 6.0))
    pruned = {"arc_easy": 0.72, "piqa": 0.75, "mmlu": 0.48}
    write(tmp_path, "out/llama__pruned/results_2026-02-02T10-00-00.1.json", results(pruned, 8.0))
    write(tmp_path, "out/llama__pruned/results_2026-01-01T10-00-00.1.json", results(DENSE, 99.0))
    write(
        tmp_path,
        "depth.json",
        results({"arc_easy": 0.4, "piqa": 0.5, "mmlu": 0.25}, 30.0, model_name="d"),
    )
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
        *(
            "gsm8k exact_match (strict-match)",
            "gsm8k exact_match (flexible-extract)",
            "mean acc of 3 tasks",
        ),
    }
    perplexity = rows["width", "wikitext word_perplexity"]  # from the newer of two files
    assert (perplexity.dense, perplexity.pruned, perplexity.higher_is_better) == (6.0, 8.0, False)
    assert perplexity.relative_loss == pytest.approx(1 / 3)
    assert perplexity.protocol == "lm-evaluation-harness, 0-shot, task version 1.0"
    assert (perplexity.method, perplexity.sparsity) == ("LLM-Pruner", 0.3)
    accuracy = rows["depth", "arc_easy acc"]
    assert (accuracy.model, accuracy.method, accuracy.options) == (
        "llama-2-7b",
        "depth",
        (("unit", "layer"),),
    )
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
    assert losses == {
        "piqa acc": 0.25,
        "boolq acc": 0.25,
        "wikitext perplexity": 0.2,
        "mean acc of 2 tasks": 0.25,
    }
    # no mean of the same tasks
    write(tmp_path, "b.json", {"results": {"piqa": {"acc": 0.6}, "copa": {"acc": 0.5}}})
    assert {metric for _, metric in by_metric(tmp_path / "q.csv")} == {"piqa acc"}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        *tables_of("prediction/mistakes.yaml")["results"],
        (f"{'x' * 300},dense,,,\n", "cannot be read: File name too long"),
    ],
)
def test_bad_lists_of_results(rows: str, expected: str, listed: Path) -> None:
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
