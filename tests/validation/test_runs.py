"""``prunesim validate FOLDER``: the user's own result files, each predicted under its own
conditions.

The files are those of ``tests/prediction/test_measured.py``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simulator
from calibration.validation.runs import RunResult, evaluate, of_runs

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


STEADY = {"steady_state_energy": 52_000.0, "steady_state_energy_per_token": 0.4}
ZEUS = {
    **STEADY,
    "steady_state_measurement": {"time": 100.0, "gpu_energy": {"0": 52_000.0}, "cpu_energy": None},
    "entire_benchmark_measurement": {"time": 120.0, "gpu_energy": {"0": 60_000.0}},
    "steady_state_prefill_energy": None,
}
"""Keys of ML.ENERGY: 520 W at 1,300 tokens per second."""
TELEMETRY = {"nvidia_power_usage": {"avg": 260.0, "unit": "W"}, "nvidia_sm_clock": {"avg": 1980.0}}


def _energies(tmp_path: Path, content: dict[str, Any], **given: Any) -> list[RunResult]:
    (tmp_path / "run.json").write_text(json.dumps(content))
    return evaluate(tmp_path, {"hardware": "h100", "engine": "vllm", **given})


def _content(name: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads((FILES / name).read_text()), **changes}


def test_energies_of_files_are_compared_at_the_measured_throughput(tmp_path: Path) -> None:
    time, energy = _energies(tmp_path, _content("vllm_serve.json", **ZEUS))
    assert (time.time, energy.time, energy.batch) == ("", "energy", 16)
    assert energy.compared is not None
    assert energy.compared.measured == pytest.approx(0.4)
    # 16 sequences draw between the idle power and the limit
    watts = energy.compared.predicted * 1300.0
    assert 250.0 < watts < 700.0
    assert energy.compared.lower < energy.compared.predicted < energy.compared.upper
    row = energy.as_row()
    assert row["measured_j_per_token"] == pytest.approx(0.4)
    assert "measured_s" not in row
    sentences = of_runs([time, energy], "runs")
    assert "energies per token of 1 run" in sentences[1]
    whole = {key: value for key, value in ZEUS.items() if not key.startswith("steady")}
    _, energy = _energies(tmp_path, _content("vllm_serve.json", **whole))
    assert energy.compared is not None
    assert energy.compared.measured == pytest.approx(60_000.0 / 20_640)


def test_requests_sent_at_once_need_the_batch_of_the_steady_state(tmp_path: Path) -> None:
    content = _content("vllm_serve.json", max_concurrency=None, **ZEUS)
    without = _energies(tmp_path, content)
    assert "energy" not in {one.time for one in without}
    assert any("energy is not compared: expected --batch" in note for note in without[0].notes)
    energies = [one for one in _energies(tmp_path, content, batch=16) if one.time == "energy"]
    assert len(energies) == 1


def test_the_telemetry_of_aiperf_is_the_power_of_all_its_gpus(tmp_path: Path) -> None:
    def telemetry(gpus: int, **power: Any) -> dict[str, Any]:
        metrics = {**TELEMETRY, "nvidia_power_usage": {**TELEMETRY["nvidia_power_usage"], **power}}
        return {
            "endpoints": {"node": {"gpus": {f"gpu_{i}": {"metrics": metrics} for i in range(gpus)}}}
        }

    _, energy = _energies(tmp_path, _content("aiperf.json", telemetry_data=telemetry(1)))
    assert energy.compared is not None
    assert energy.compared.measured == pytest.approx(260.0 / 1337.526, rel=1e-4)
    (time,) = _energies(tmp_path, _content("aiperf.json", telemetry_data=telemetry(2)))
    assert any("expected --devices 2" in note for note in time.notes)
    (wrong,) = _energies(tmp_path, _content("aiperf.json", telemetry_data=telemetry(1, unit="mW")))
    assert wrong.reason.endswith("nvidia_power_usage.unit: expected W, got mW")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"total_energy": 5.0}, "total_energy: expected one of steady_state_energy, "),
        ({**ZEUS, "steady_state_prefill_energy": 1.0}, "steady_state_prefill_energy: expected one"),
        ({**ZEUS, "steady_state_energy_per_token": 0.0}, "expected a positive energy in J, got 0"),
    ],
)
def test_energies_that_are_not_understood_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    (found,) = _energies(tmp_path, _content("vllm_serve.json", **changes))
    assert found.compared is None
    assert reason in found.reason
