"""Files of ``vllm bench``: keys of two releases, planted times, wrong files, records, predictions,
the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.vllm import FILE

from calibration.runners.cases import Case
from calibration.runners.compare import bench_record, name_of, rows_of
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.models.lower import lower
from simulator.prediction.benchmarks import BenchRun, read_bench, request_of
from simulator.prediction.prunings import Pruning

pytestmark = pytest.mark.quick

LATENCY = {
    "avg_latency": 0.5,
    "latencies": [0.52, 0.48, 0.5],
    "percentiles": {"10": 0.484, "50": 0.5, "99": 0.5196},
}
MANY, REQUESTS, TOKENS, OUTPUT = 4, 24, 512, 65


def _serve(each_s: float = 2.0, **changes: Any) -> dict[str, Any]:
    """Return a detailed result of a closed loop: the first and last requests are slower, as in a
    ramp."""
    times = [
        each_s * (3.0 if i < MANY or i >= REQUESTS - MANY else 1.0 + 0.01 * (i // MANY))
        for i in range(REQUESTS)
    ]
    duration = sum(times) / MANY
    found: dict[str, Any] = {
        "backend": "vllm",
        "model_id": "dense",
        "num_prompts": REQUESTS,
        "max_concurrency": MANY,
    }
    found |= {
        "duration": duration,
        "completed": REQUESTS,
        "request_throughput": REQUESTS / duration,
    }
    found |= {"total_input_tokens": REQUESTS * TOKENS, "total_output_tokens": REQUESTS * OUTPUT}
    found |= {
        "request_rate": "inf",
        "mean_ttft_ms": 500.0,
        "p99_ttft_ms": 1500.0,
        "std_ttft_ms": 100.0,
    }
    found["ttfts"] = [0.25 * t for t in times]
    found["itls"] = [[0.75 * t / (OUTPUT - 1)] * (OUTPUT - 1) for t in times]
    return {key: value for key, value in {**found, **changes}.items() if value != "absent"}


def _file(tmp_path: Path, content: Any, name: str = "run.json") -> Path:
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def _case(
    phase: str,
    batch: int = MANY,
    seq: int = TOKENS,
    steps: int = OUTPUT - 1,
    text: str = "depth 0.5",
) -> Case:
    dense = lower("llama-3.2-1b", phase=phase, batch=batch, seq=seq, new_tokens=max(steps, 1))
    return Case.of(dense, Pruning.read(text))


def test_a_file_that_vllm_wrote() -> None:
    """The file is of vLLM 0.32.0 (CPU): 8 layers, batch 2, --input-len 64 --output-len 17, two
    shared cores."""
    run = read_bench(FILE.with_name("vllm_bench_latency.json"))
    assert (run.kind, run.model, len(run.samples_s)) == ("batch", "bdense", 8)
    assert float(np.median(run.samples_s)) == pytest.approx(run.percentiles_s["50"])


def test_requests_between_the_ramps_are_samples(tmp_path: Path) -> None:
    run = read_bench(_file(tmp_path, _serve()))
    assert (run.kind, run.concurrency, run.input_tokens, run.output_tokens) == (
        "serve",
        MANY,
        TOKENS,
        OUTPUT,
    )
    assert run.samples_s == pytest.approx([2.02, 2.04, 2.06, 2.08])
    assert (run.model, run.note) == ("dense", "")
    assert run.percentiles_s == {"mean_ttft": 0.5, "p99_ttft": 1.5}
    times = [t + sum(gaps) for t, gaps in zip(_serve()["ttfts"], _serve()["itls"])]
    newer = read_bench(
        _file(tmp_path, _serve(latencies=times, ttfts="absent", itls="absent", failed=0))
    )
    assert newer.samples_s == pytest.approx(run.samples_s)


def test_what_the_user_states_and_what_the_file_states(tmp_path: Path) -> None:
    latency, serve = (
        read_bench(_file(tmp_path, LATENCY)),
        read_bench(_file(tmp_path, _serve(), "serve.json")),
    )
    assert request_of(latency, batch=8, seq=1024, output=129) == ("generate", 8, 1024, 128)
    assert request_of(latency, batch=8, seq=1024, output=1) == ("prefill", 8, 1024, 0)
    assert (
        request_of(serve)
        == request_of(serve, batch=4, seq=512)
        == ("serve", MANY, TOKENS, OUTPUT - 1)
    )
    with pytest.raises(
        InputError, match="seq: expected to be stated, as the file does not have it"
    ):
        request_of(latency, batch=8, output=1)
    with pytest.raises(InputError, match="batch: expected 4, as in the file, got 8"):
        request_of(serve, batch=8)
    with pytest.raises(
        InputError, match="total_output_tokens: expected at least 2 per request, got 1"
    ):
        request_of(replace(serve, output_tokens=1.0))


def test_records_give_speedups_beside_predictions(tmp_path: Path) -> None:
    hw = load_hardware("h100")
    dense = read_bench(_file(tmp_path, _serve()))
    pruned = read_bench(_file(tmp_path, _serve(1.0), "pruned.json"))
    case = _case("serve")
    record = bench_record(case, dense, pruned)
    assert (record["status"], record["runtime"], record["reason"]) == ("ok", "vllm bench serve", "")
    assert record["settings"]["pruned"]["file"] == "pruned.json"
    json.dumps(record, allow_nan=False)
    (row,) = rows_of([case], [{**record, "key": name_of(case, "bf16")}], hw, device="H100")
    assert row.measured == pytest.approx(2.0)
    assert row.dense_s == pytest.approx(2.04)
    assert row.predicted_lower < row.predicted < row.predicted_upper

    one = BenchRun("a.json", "batch", (1.0, 1.1, 1.2), tool="vllm bench latency")
    record = bench_record(_case("generate"), one, replace(one, samples_s=(0.5, 0.5)))
    assert (record["dense_s"], record["pruned_s"]) == ([1.0, 1.1], [0.5, 0.5])


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    serve = read_bench(_file(tmp_path, _serve()))
    latency = BenchRun("b.json", "batch", (1.0,), tool="vllm bench latency")
    with pytest.raises(
        InputError,
        match=(
            r"b\.json: tool: expected vllm bench serve, as in .*run\.json, got vllm bench latency"
        ),
    ):
        bench_record(_case("serve"), serve, latency)
    with pytest.raises(InputError, match=r"concurrency: expected 4, as in .*, got 8"):
        bench_record(_case("serve"), serve, replace(serve, concurrency=8))
    with pytest.raises(InputError, match="input_tokens: expected 512, got 600"):
        bench_record(_case("serve"), serve, replace(serve, input_tokens=600.0))
    with pytest.raises(InputError, match="phase: expected serve for vllm bench serve, got decode"):
        bench_record(_case("decode"), serve, serve)
    with pytest.raises(
        InputError, match="phase: expected prefill or generate for vllm bench latency, got serve"
    ):
        bench_record(_case("serve"), latency, latency)


def _latency(folder: Path, name: str, seconds: float) -> str:
    file = folder / name
    samples = [seconds * x for x in (1.0, 1.02, 0.98, 1.01)]
    file.write_text(
        json.dumps({"avg_latency": seconds, "latencies": samples, "percentiles": {"50": seconds}})
    )
    return str(file)


def _command(folder: Path, pruned_s: float) -> str:
    files = (
        f"--bench {_latency(folder, 'dense.json', 1.2)} --bench"
        f" {_latency(folder, 'pruned.json', pruned_s)}"
    )
    how = "--engine vllm --hardware h100 --batch 8 --seq 1024 --new-tokens 128"
    return f"compare llama-3.1-8b {how} -o {folder / 'r'} {files}"


def test_two_files_give_a_measured_speedup_next_to_the_prediction(tmp_path: Path, cli: Any) -> None:
    command = f"{_command(tmp_path, 0.96)} --prune 'depth 0.25'"
    (row,) = cli.json(command)
    assert (row["phase"], row["batch"], row["seq"], row["prune"]) == (
        "generate",
        8,
        1024,
        "depth 0.25",
    )
    assert row["measured"] == pytest.approx(1.25)
    assert row["dense_s"] / row["pruned_s"] == pytest.approx(row["measured"])
    assert 1.1 < row["predicted"] < 1.4
    assert (tmp_path / "r" / "comparison.vllm.csv").is_file()
    assert not list((tmp_path / "r").glob("*.jsonl"))
    assert cli.json(f"{command} --phase prefill")[0]["phase"] == "prefill"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            "--prune 'depth 0.25' --prune 'width 0.25'",
            "--bench: expected 3 files, of the dense model",
        ),
        ("--prune 'depth 0.25' --batch 1,8", "--bench: expected one --batch and one --seq"),
        ("--prune 'depth 0.25' --engine hf", "--bench: expected --engine vllm"),
        ("--prune 'semi_structured 0.25'", "expected 0.5"),
    ],
)
def test_refusals(tmp_path: Path, cli: Any, more: str, reason: str) -> None:
    assert reason in cli.refused(f"{_command(tmp_path, 1.0)} {more}")
    assert not (tmp_path / "r").exists()
