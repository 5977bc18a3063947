"""Speculative decoding that was run: predictions hold on the records, and acceptance is planted as
stated."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import numpy as np
import pytest

import simulator
from calibration.evidence.recorded import FOLDERS

torch = pytest.importorskip("torch")

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


@pytest.mark.skipif(find_spec("transformers") is None, reason="Transformers is not installed")
def test_acceptance_is_planted() -> None:
    from calibration.evidence.drafts import ACCEPTANCES, hf_sample, next_tokens, planted
    from calibration.runners.cases import ModelRun
    from simulator.models.write import content_of

    for which, acceptance in enumerate(ACCEPTANCES):
        right = (next_tokens(3000, True) == next_tokens(3000, False))[which::3]
        assert float(right.float().mean()) == pytest.approx(acceptance, abs=0.04)
    shapes = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 300,
        "head_dim": 16,
    }
    content = {
        **content_of("llama-3.1-8b"),
        **shapes,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    run = ModelRun(simulator.load_model(content), "fp32", "hf", content)
    target, draft = planted(run, ""), planted(run, "depth 0.5")
    times, tokens = hf_sample(target, 1, 2, draft, 3)
    assert tokens == 4.0
    assert min(times) > 0.0
    assert hf_sample(target, 1, 2)[1] == 1.0
    assert 1.0 <= hf_sample(target, 1, 0, draft, 3)[1] < 4.0
