"""Simulated schedules next to published runs of servers: as accurate as the page states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from calibration.evidence import schedules
from calibration.evidence.measurements import published
from calibration.evidence.pages import DOCS
from calibration.evidence.schedules import QUANTITIES, at_once, cases, steady

BARS = {"tokens_per_s": 0.20, "ttft_s": 0.25, "tpot_s": 0.20}  # median errors per engine
STEADY_BAR = 0.12


@pytest.fixture(scope="module")
def errors() -> dict[tuple[str, str, str], list[float]]:
    """Errors of every case by engine, GPU and quantity; they take 20 s."""
    out: dict[tuple[str, str, str], list[float]] = {}
    for case in cases([row for row in published("at_once") if not row["left_out"]]):
        predicted = schedules._at_once(at_once(case[0]).run())
        for name, value in predicted.items():
            measured = np.median([float(row[name]) for row in case])
            key = (case[0]["engine"], case[0]["hardware"], name)
            out.setdefault(key, []).append(value / measured - 1.0)
    return out


def median(values: Sequence[float]) -> float:
    return float(np.median(np.abs(values)))


def test_equal_commands_are_one_case_and_excluded_runs_have_a_reason() -> None:
    rows = published("at_once")
    assert len(rows) == 109
    assert len(cases([row for row in rows if not row["left_out"]])) == 67
    reasons = [row["left_out"].split(" (")[0] for row in rows if row["left_out"]]
    assert sorted(map(reasons.count, set(reasons))) == [1, 12, 24]


def test_requests_that_are_sent_at_once_meet_the_bars_on_an_a100(
    errors: dict[tuple[str, str, str], list[float]],
) -> None:
    for (engine, gpu, name), values in errors.items():
        if gpu.startswith("a100"):
            assert median(values) <= BARS[name], (engine, name)


def test_the_page_states_these_errors(errors: dict[tuple[str, str, str], list[float]]) -> None:
    page = (DOCS / "serving.md").read_text("utf-8")
    for engine in ("vllm", "sglang", "trtllm"):
        cells = re.search(rf"^\| {engine} \|(.*)$", page, re.MULTILINE)
        assert cells
        stated = cells.group(1).split("|")[1:7:2]
        for name, text in zip(QUANTITIES, stated, strict=True):
            values = [
                x for (e, _, n), some in errors.items() if (e, n) == (engine, name) for x in some
            ]
            assert float(text.rstrip("% ")) == pytest.approx(100 * median(values), abs=0.15)


def test_servers_whose_queue_is_never_empty_meet_the_bar_on_an_h100() -> None:
    rows = [r for r in published("steady") if r["hardware"] == "h100_sxm" and not r["parallel"]]
    assert len(rows) == 68
    predicted = [schedules._steady(steady(row).run())["between_tokens_s"] for row in rows]
    measured = np.array([float(row["between_tokens_s"]) for row in rows])
    assert median(predicted / measured - 1.0) <= STEADY_BAR
    # without the sampler of top-p, large batches of a small model are half as long
    row = max(
        (row for row in rows if row["model"] == "llama-3.1-8b"), key=lambda r: float(r["batch"])
    )
    scenario = steady(row)
    greedy = replace(scenario, server=replace(scenario.server, sampler=None))
    without = schedules._steady(greedy.run())["between_tokens_s"]
    assert without < 0.7 * float(row["between_tokens_s"])
