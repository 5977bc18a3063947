"""Quality tables: the shipped ones are consistent, and a user's bad one is refused in one line."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path

import pytest

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
    names = [c for c in ROW if c != leave_out] + [c for c in (rows[0] if rows else {}) if c not in ROW]
    return "\n".join([",".join(names), *(",".join((ROW | row).get(c, "") for c in names) for row in rows)]) + "\n"


@pytest.mark.parametrize("name", list_quality())
def test_shipped_tables_are_consistent(name: str) -> None:
    table = load_quality(name)  # the reader refuses dense values that differ on an axis, and repeated rows
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
    assert {"llama-2-7b", "llama-2-13b", "llama-7b", "llama-3.1-8b", "opt-13b"} <= set(table.models) & set(
        list_models()
    )


def test_published_values_spot_checked() -> None:
    rows = load_quality("published").of_model("LLaMA-2-7B").rows  # names without regard to case
    (sleb,) = [r for r in rows if r.method == "SLEB" and r.sparsity == 0.2 and r.higher_is_better]
    assert (sleb.family, sleb.dense, sleb.pruned) == ("depth", 69.0, 56.8)
    assert sleb.relative_loss == pytest.approx(0.1768, abs=1e-4)
    (sliced,) = [r for r in rows if r.source == "SliceGPT (arXiv 2401.15024) Table 1" and r.sparsity == 0.25]
    assert (sliced.family, sliced.dense, sliced.pruned, dict(sliced.options)) == (
        "width_cross",
        5.47,
        7.24,
        {"residual_projections": True},
    )


def test_losses_of_the_taxonomy_paper(shared_data: Path) -> None:
    """Every accuracy gap quoted with a sparsity is a loss of the table; perplexities without a dense value are not."""
    source = read_csv((shared_data / "paper_tables.csv").read_bytes().split(b"\n", 1)[1], "paper", ("what", "family"))
    quoted = [cells for cells in source.each(dict) if cells["accuracy_gap_percent"] and cells["sparsity"]]
    table, seven = load_quality("taxonomy-paper").of_model("llama-3.1-8b"), []
    first = table.on_axis(choose_axis(table, "mean accuracy"))
    for cells in quoted:
        what, gap = (cells["method"], float(cells["sparsity"])), float(cells["accuracy_gap_percent"])
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
        (text({"sparsity": "1.2"}), ":2: sparsity: expected a fraction in [0, 1), got 1.2"),
        (text({"sparsity": "nan"}), ":2: sparsity: expected a finite number"),
        (text({"dense": "0"}), ":2: dense"),
        (text({"family": "dept"}), "did you mean depth"),
        (text({"source": ""}), ":2: source: is empty"),
        (text({"higher_is_better": "maybe"}), ":2: higher_is_better"),
        (text({"relative_loss": "0.5"}), ":2: relative_loss: expected 0.2865"),
        (text({"options": "unit=layer;speed=3"}), ":2: options"),
        (text({}, {"sparsity": "0.2", "dense": "5"}), ":3: dense: mixed metric or protocol: 5 here, 7.26 in line 2"),
        (text({}, {"pruned": "9.5"}), ":3: is a second value for SLEB at sparsity 0.1 (line 2)"),
        (text({}).replace("9.34", "9.34,1"), ":2: expected 10 cells"),
        (text({}).replace("SLEB", '"SLEB'), "is not CSV"),
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
    assert (
        choose_axis(table, "WikiText2 perplexity").metric == "WikiText2 perplexity"
    )  # the exact name goes before longer ones
    with pytest.raises(InputError, match="no rows with metric 'bleu'"):
        choose_axis(table, "bleu")
    with pytest.raises(InputError, match="mixed metrics or protocols; choose one"):
        choose_axis(table, strict=True)
