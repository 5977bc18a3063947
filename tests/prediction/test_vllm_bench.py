"""Files of ``vllm bench``: keys of two releases, planted times, wrong files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.vllm import FILE

from simulator.errors import InputError
from simulator.prediction.benchmarks import BenchRun, pass_seconds, read_benches, request_of
from simulator.request import Request

pytestmark = pytest.mark.quick

LATENCY = {
    "avg_latency": 0.5,
    "latencies": [0.52, 0.48, 0.5],
    "percentiles": {"10": 0.484, "50": 0.5, "99": 0.5196},
}
MANY, REQUESTS, TOKENS, OUTPUT = 4, 24, 512, 65


def read_one(path: Path) -> BenchRun:
    (run,) = read_benches(path)
    return run


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


def test_a_file_that_vllm_wrote() -> None:
    """The file is of vLLM 0.32.0 (CPU): 8 layers, batch 2, --input-len 64 --output-len 17, two
    shared cores."""
    run = read_one(FILE.with_name("vllm_bench_latency.json"))
    assert (run.kind, run.model, len(run.samples_s)) == ("batch", "bdense", 8)
    assert float(np.median(run.samples_s)) == pytest.approx(run.percentiles_s["50"])


def test_requests_between_the_ramps_are_samples(tmp_path: Path) -> None:
    run = read_one(_file(tmp_path, _serve()))
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
    newer = read_one(
        _file(tmp_path, _serve(latencies=times, ttfts="absent", itls="absent", failed=0))
    )
    assert newer.samples_s == pytest.approx(run.samples_s)


def test_what_the_user_states_and_what_the_file_states(tmp_path: Path) -> None:
    latency, serve = (
        read_one(_file(tmp_path, LATENCY)),
        read_one(_file(tmp_path, _serve(), "serve.json")),
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


def test_a_request_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    serve = read_one(_file(tmp_path, _serve()))
    asked = Request(phase="serve", batch=MANY, seq=TOKENS, new_tokens=OUTPUT - 1)
    assert pass_seconds(serve, asked) == pytest.approx(2.05)
    with pytest.raises(InputError, match="input_tokens: expected 512, got 600"):
        pass_seconds(replace(serve, input_tokens=600.0), asked)
