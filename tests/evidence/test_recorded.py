"""Recorded runs of vLLM and Transformers: predictions hold on them, and the pages have their
tables."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from calibration.evidence.recorded import (
    FOLDERS,
    KNOWN,
    RecordedRow,
    overview,
    recorded_rows,
    scores,
    tables,
)

pytestmark = pytest.mark.extras


@pytest.fixture(scope="module")
def in_vllm() -> list[RecordedRow]:
    return recorded_rows("vllm")


@pytest.fixture(scope="module")
def hybrids() -> list[RecordedRow]:
    return recorded_rows("hybrids")


@pytest.fixture(scope="module")
def rows() -> list[RecordedRow]:
    return recorded_rows("transformers")


def test_predictions_hold_in_the_format_that_the_machine_computes_in(
    rows: list[RecordedRow],
) -> None:
    found = scores([r for r in rows if r.compared.dtype == "fp32" and r.threads == "1"])
    assert found["median"] < 0.035
    assert found["spearman"] > 0.97
    assert 0.85 < found["inside"] < 0.95
    assert found["half_width"] < 0.12
    other = scores(
        [r for r in rows if r.compared.model == "qwen2.5-0.5b" and r.compared.dtype == "fp32"]
    )
    assert other["median"] < 0.04
    assert other["inside"] > 0.85


def test_speedups_in_vllm_meet_their_targets(in_vllm: list[RecordedRow]) -> None:
    rows = [r for r in in_vllm if r.engine == "vllm"]
    plain, given, calibrated = (scores(rows, known) for known in KNOWN)
    for found in (plain, given, calibrated):
        assert found["median"] < 0.05
        assert 0.85 < found["inside"] < 0.97
        assert found["half_width"] < 0.14
        assert found["spearman"] > 0.95
    assert given["median"] < plain["median"] + 0.002
    assert calibrated["median"] < 0.8 * plain["median"]
    assert calibrated["half_width"] < plain["half_width"]
    assert calibrated["dense_time"] < 0.5 * plain["dense_time"]


def test_speedups_of_hybrids_meet_their_targets(hybrids: list[RecordedRow]) -> None:
    assert len(hybrids) >= 40
    found = scores(hybrids)
    assert found["median"] < 0.03
    assert found["inside"] > 0.85
    assert found["half_width"] < 0.10
    assert found["spearman"] > 0.9


@pytest.mark.parametrize("page", list(FOLDERS))
def test_the_pages_have_the_tables_of_the_records(
    page: str,
    rows: list[RecordedRow],
    hybrids: list[RecordedRow],
    in_vllm: list[RecordedRow],
) -> None:
    text = (FOLDERS[page].parents[1] / "generated" / f"{page}.md").read_text()
    for one in tables({"transformers": rows, "hybrids": hybrids, "vllm": in_vllm}[page]):
        assert one in text


@pytest.mark.slow
def test_the_readme_counts_what_its_picture_shows() -> None:
    readme = (FOLDERS["vllm"].parents[2] / "README.md").read_text()
    titles = [ax.get_title().partition("\n") for ax in overview().axes]
    assert len(titles) == 3
    for what, _, error in titles:
        assert what in readme
        assert 0 < float(error.split()[2]) < 8
