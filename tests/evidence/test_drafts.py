"""Speculative decoding that was run: predictions hold on the records."""

from __future__ import annotations

import csv
from itertools import groupby
from typing import Any

import numpy as np
import pytest

import simulator
from calibration.evidence.recorded import FOLDERS

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.extras

CPU = FOLDERS["vllm"].parent


@pytest.fixture(scope="module")
def compared() -> list[dict[str, Any]]:
    """Measured speedups over plain decoding with predictions, at the tokens per round that were
    measured."""
    hw, out = simulator.load_hardware(CPU / "vllm" / "bf16.1.yaml"), []
    for row in csv.DictReader((CPU / "drafts.csv").read_text().splitlines()):
        how: dict[str, Any] = {name: int(row[name]) for name in ("batch", "seq", "drafted")} | {
            "engine": row["engine"]
        }
        (found,) = simulator.draft(
            row["model"], row["draft"], hw, dtype="bf16", acceptance=1.0, **how
        )
        tokens, step_s, round_s = (float(row[name]) for name in ("tokens", "step_s", "round_s"))
        ends = (found.speedup, found.speedup_lower, found.speedup_upper)
        values = [s * tokens / found.tokens / (tokens * step_s / round_s) for s in ends]
        out.append({**row, **dict(zip(("ratio", "lower", "upper"), values, strict=True))})
    return out


def test_predictions_hold_on_the_records(compared: list[dict[str, Any]]) -> None:
    assert len(compared) >= 40
    ratio, lower, upper = (
        np.array([row[name] for row in compared]) for name in ("ratio", "lower", "upper")
    )
    assert np.median(np.abs(ratio - 1.0)) < 0.05
    assert 0.85 <= np.mean((lower <= 1.0) & (upper >= 1.0)) <= 0.97
    assert np.median(np.sqrt(upper / lower)) < 1.14


def test_each_model_and_engine_alone_is_met(compared: list[dict[str, Any]]) -> None:
    def which(row: dict[str, Any]) -> tuple[str, str]:
        return row["engine"], row["model"]

    groups = {key: list(rows) for key, rows in groupby(sorted(compared, key=which), which)}
    assert len(groups) == 4
    for rows in groups.values():
        assert np.median([abs(row["ratio"] - 1.0) for row in rows]) < 0.08
