"""Recorded runs of Transformers: predictions hold on them, and the page has their tables."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from calibration.runners import recorded
from calibration.runners.recorded import RecordedRow, overview, recorded_rows, scores, tables


@pytest.fixture(scope="module")
def rows() -> list[RecordedRow]:
    return recorded_rows()


def test_at_least_120_speedups_of_two_models_two_engines_and_two_formats(rows: list[RecordedRow]) -> None:
    assert len(rows) >= 120
    assert {r.compared.model for r in rows} == {"smollm2-135m", "qwen2.5-0.5b"}
    assert {r.engine for r in rows} == {"hf", "compile"}
    assert {r.compared.dtype for r in rows} == {"fp32", "bf16"}
    assert {r.compared.phase for r in rows} == {"prefill", "decode"}
    assert {r.compared.batch for r in rows} == {1, 8}


def test_predictions_hold_in_the_format_that_the_machine_computes_in(rows: list[RecordedRow]) -> None:
    found = scores([r for r in rows if r.compared.dtype == "fp32" and r.threads == "1"])
    assert found["median"] < 0.045
    assert found["spearman"] > 0.95
    assert found["inside"] > 0.75
    other = scores([r for r in rows if r.compared.model == "qwen2.5-0.5b" and r.compared.dtype == "fp32"])
    assert other["median"] < 0.04
    assert other["inside"] > 0.85


def test_the_page_has_the_tables_of_the_records(rows: list[RecordedRow]) -> None:
    page = (recorded.FOLDER.parents[1] / "generated" / "transformers.md").read_text()
    for text in tables(rows):
        assert text in page


@pytest.mark.slow
def test_the_readme_counts_what_its_picture_shows() -> None:
    readme = (recorded.FOLDER.parents[2] / "README.md").read_text()
    titles = [ax.get_title().partition("\n") for ax in overview().axes]
    assert len(titles) == 3
    for what, _, error in titles:
        assert what in readme
        assert 0 < float(error.split()[2]) < 8
