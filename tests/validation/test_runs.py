"""``prunesim validate FOLDER``: the user's own result files, each predicted under its own
conditions.

The files are those of ``tests/prediction/test_measured.py``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simulator
from calibration.validation.runs import evaluate

FILES = Path(__file__).parent.parent / "prediction" / "benchmarks"
VLLM = Path(__file__).parents[2] / "docs" / "cpu" / "vllm"
H100 = {"hardware": "h100", "batch": 8, "seq": 1024, "new_tokens": 128}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The results of every tool, one of them in an inner folder, and two files without results."""
    found = tmp_path / "runs"
    shutil.copytree(FILES, found)
    (found / "inner").mkdir()
    (found / "vllm_serve.json").rename(found / "inner" / "vllm_serve.json")
    (found / "other.json").write_text('{"results": []}')
    (found / "notes.txt").write_text("not read")
    return found


def test_each_file_is_predicted_under_its_own_conditions(folder: Path) -> None:
    found = {r.source: r for r in evaluate(folder, {**H100, "model": "llama-3.1-8b"})}
    requests = {
        name: (r.phase, r.batch, r.seq, r.new_tokens) for name, r in found.items() if r.compared
    }
    assert requests == {
        "inner/vllm_serve.json": ("serve", 16, 1024, 128),
        "sglang.jsonl:1": ("serve", 1, 1024, 128),
        "sglang.jsonl:2": ("serve", 4, 1024, 128),
        "sglang.jsonl:3": ("serve", 16, 1024, 128),
        "trtllm_latency.json": ("serve", 1, 1024, 127),
        "trtllm_throughput.json": ("serve", 8, 1024, 127),
        "vllm_latency.json": ("generate", 8, 1024, 128),
        "vllm_serve_detailed.json": ("serve", 2, 64, 4),
    }
    reasons = {name: r.reason for name, r in found.items() if not r.compared}
    assert reasons.keys() == {
        "aiperf.json",
        "genai_perf.json",
        "other.json",
        "vllm_throughput.json",
    }
    assert (
        reasons["aiperf.json"]
        == "engine: expected --engine, as the file does not state a known one"
    )
    assert reasons["other.json"].startswith(
        "expected a result of vllm bench latency, throughput or serve"
    )
    assert reasons["vllm_throughput.json"] == "tokens per request: expected more than 1024, got 576"
    engines = {
        name.partition("_")[0].partition(".")[0]: r.compared.engine
        for name, r in found.items()
        if r.compared
    }
    assert engines == {"inner/vllm": "vllm", "sglang": "sglang", "trtllm": "trtllm", "vllm": "vllm"}


def test_a_prediction_is_that_of_the_request_with_formats_and_gpu_of_the_file(folder: Path) -> None:
    stated = {r.source: r for r in evaluate(folder, {})}  # trtllm-bench states GPU and formats
    compared = stated["trtllm_throughput.json"].compared
    assert compared is not None
    assert compared.gpu == "h100_sxm"
    formats = {"dtype": "fp8", "weight_dtype": "fp8", "kv_dtype": "fp8", "engine": "trtllm"}
    w = simulator.lower("llama-3.1-8b", phase="serve", batch=8, seq=1024, new_tokens=127, **formats)
    s = simulator.speedup(w, w, "h100")
    assert (compared.predicted, compared.lower, compared.upper) == (
        s.dense_s,
        s.dense_lower,
        s.dense_upper,
    )
    assert compared.measured == pytest.approx(0.70)
    assert stated["inner/vllm_serve.json"].reason.startswith("hardware: expected --hardware")


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    monkeypatch.chdir(folder.parent)
    line = "validate runs --hardware h100 --batch 8 --seq 1024 --new-tokens 128"
    out, err = cli(line)
    assert out.startswith(
        "Predicted times of 7 runs in runs (vllm on h100_sxm, sglang on h100_sxm, trtllm on h100_sx"
    )
    assert "results were skipped." in out
    assert "sglang.jsonl:3" in out
    assert "note: aiperf.json, genai_perf.json: skipped: engine: expected --engine" in err
    rows = cli.json(line)
    assert len(rows) == 12
    assert {bool(row["reason"]) == (row["predicted_s"] is None) for row in rows} == {True}


def test_requests_that_arrive_at_a_rate_are_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    """Runs of vLLM on a CPU, whose front end is faster than that of the engine's file."""
    lines = (VLLM / "rates.json").read_text().splitlines()
    dense = [line for line in lines if '"dense"' in line and '"max_concurrency": null' in line]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "dense.json").write_text("\n".join(dense))
    monkeypatch.chdir(tmp_path)
    words = f"validate runs --model smollm2-135m --hardware {VLLM / 'rates.yaml'}"
    rows = cli.json(words)
    names = ["run", "ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99"]
    assert [(row["source"], row["time"]) for row in rows] == [
        (f"dense.json:{line}", name) for line in range(1, len(dense) + 1) for name in names
    ]
    assert {(row["phase"], row["batch"], row["seq"], row["new_tokens"]) for row in rows} == {
        ("serve", 200, 128, 33)
    }
    assert sum(row["inside"] for row in rows) >= 0.9 * len(rows)
    assert np.median([abs(row["error"]) for row in rows]) < 0.1
    out, err = cli(words)
    assert out.startswith(f"Predicted times of {len(dense)} runs in runs (vllm on cpu): median")
    assert "the server is assumed to have default options" in err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("validate runs h100", "runs: is a folder of result files; expected no TABLE"),
        ("validate runs --markdown x.md", "expected no TABLE, --map or --markdown"),
        ("validate empty", "empty: expected 1 to 10,000 files .json or .jsonl, got 0"),
        (
            "validate runs/inner",
            "expected a result that can be predicted; vllm_serve.json: skipped: hard",
        ),
        ("validate runs --batch 8,16", "--batch: expected one value, got 2"),
        ("validate --seq 8", "expected a FOLDER of result files, got none"),
    ],
)
def test_refusals(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cli: Any, words: str, reason: str
) -> None:
    (folder.parent / "empty").mkdir()
    monkeypatch.chdir(folder.parent)
    assert reason in cli.refused(words)
