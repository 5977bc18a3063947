"""The measured time of the dense model from result files of serving benchmarks, and files that do
not match.

The files in ``tests/prediction/benchmarks`` have the keys, in their order, that the writers of
these tools write, and planted times of Llama-3.1-8B on an H100:

- ``vllm_latency.json``, ``vllm_throughput.json``, ``vllm_serve.json``,
  ``vllm_serve_detailed.json``: vLLM, ``vllm/benchmarks/latency.py`` (commit 00cae07),
  ``throughput.py`` (1a91bc2), ``serve.py`` (def9ce8; 0.33.0).
- ``sglang.jsonl``: SGLang, ``python/sglang/benchmark/serving.py`` (commit 00f9ec4); three runs, one
  per line.
- ``trtllm_latency.json``, ``trtllm_throughput.json``: TensorRT-LLM,
  ``tensorrt_llm/bench/dataclasses/reporting.py`` (commit 0249976), percentiles of
  ``statistics.py``.
- ``genai_perf.json``: perf_analyzer, ``genai-perf/genai_perf/export_data/json_exporter.py`` (commit
  4cc7650) with the sections of ``config/input/base_config.py`` (0f5cc07); ``metrics/statistics.py``
  writes "requests/sec" as the unit of all that is not a time.
- ``aiperf.json``: AIPerf, ``src/aiperf/exporters/metrics_json_exporter.py`` (commit 047d59d, schema
  1.3).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tables import rows_of, tables_of

from simulator.errors import InputError
from simulator.prediction.benchmarks import measured, read_benches
from simulator.request import Request

pytestmark = pytest.mark.quick

FILES = Path(__file__).with_name("benchmarks")
MODEL = "llama-3.1-8b"


def _request(phase: str, batch: int, seq: int, new_tokens: int = 128, **more: Any) -> Request:
    return Request(
        **{
            "model": MODEL,
            "phase": phase,
            "batch": batch,
            "seq": seq,
            "new_tokens": new_tokens,
            **more,
        }
    )


def _asked(text: str) -> Request:
    """Return the request of a text: phase, batch, length, new tokens, and further settings."""
    phase, *words = text.split()
    settings = dict(word.split("=") for word in words if "=" in word)
    return _request(phase, *(int(word) for word in words if "=" not in word), **settings)


def _load(name: str) -> Any:
    text = (FILES / name).read_text(encoding="utf-8")
    return json.loads(text.splitlines()[-1] if name.endswith(".jsonl") else text)


TIMES = """
vllm_latency.json        | generate 8 1024                   | 1.208383
vllm_latency.json        | prefill 8 1024                    | 1.208383
vllm_throughput.json     | generate 32 512 63                | 0.97
vllm_serve.json          | serve 16 1024                     | 1.53
vllm_serve_detailed.json | serve 2 64 4                      | 0.0605
sglang.jsonl             | serve 16 1024 engine=sglang       | 1.4443
aiperf.json              | serve 16 1024                     | 1.5431472081218274
genai_perf.json          | serve 1 550 127                   | 0.9597989949748743
genai_perf.json          | serve 1 550 128                   | 0.9597989949748743
trtllm_latency.json      | prefill 1 1024 engine=trtllm      | 0.021
trtllm_latency.json      | generate 1 1024 127 engine=trtllm | 0.86
genai_perf.json          | prefill 1 550                     | 0.026
genai_perf.json          | decode 1 613                      | 0.007314960629921259
genai_perf.json          | generate 1 550 127                | 0.955
vllm_serve.json          | decode 16 1088                    | 0.0101055
sglang.jsonl             | decode 16 1088 engine=sglang      | 0.0096390625
"""
"""Files, what is asked, and its seconds: the median time of a batch; by Little's law the requests in
flight per requests/s, where one token of 129 is within the tolerance; of one request in flight its
prompt, its steps and both; and the median time between tokens, which is a step without prompts."""


@pytest.mark.parametrize(("name", "request_", "seconds"), rows_of(TIMES))
def test_the_time_of_each_phase(name: str, request_: str, seconds: str) -> None:
    found = measured(FILES / name, _asked(request_)).seconds
    assert found == pytest.approx(float(seconds), rel=1e-9)


def test_of_several_runs_in_a_file_the_one_of_the_request_is_taken() -> None:
    runs = read_benches(FILES / "sglang.jsonl")
    assert [(r.concurrency, r.source.rsplit(":", 1)[1]) for r in runs] == [
        (1, "1"),
        (4, "2"),
        (16, "3"),
    ]
    found = measured(FILES / "sglang.jsonl", _request("serve", 4, 1024, engine="sglang"))
    assert found.run.concurrency == 4
    assert found.notes == ()
    assert measured(
        FILES / "sglang.jsonl", _request("prefill", 1, 1024, engine="sglang")
    ).seconds == pytest.approx(0.024)
    with pytest.raises(
        InputError,
        match=r"expected a result of this request among 3; .*: concurrency: expected 8, got",
    ):
        measured(FILES / "sglang.jsonl", _request("serve", 8, 1024, engine="sglang"))


def test_requests_that_start_together_are_a_batch(tmp_path: Path) -> None:
    data = _load("trtllm_throughput.json")
    data["request_info"] |= {"num_requests": 8, "avg_num_concurrent_requests": 7.9}
    data["performance"] |= {"total_latency_ms": 712.0}
    file = tmp_path / "together.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    request = {"engine": "trtllm", "dtype": "fp8"}
    assert measured(file, _request("generate", 8, 1024, 127, **request)).seconds == pytest.approx(
        0.712
    )
    with pytest.raises(
        InputError, match="requests: expected at least 16, twice those in flight, got 8"
    ):
        measured(file, _request("serve", 8, 1024, 127, **request))


VLLM = _request("serve", 16, 1024)


MISMATCHES = """
vllm_serve.json        | serve 16 1024                            | {"model_id": "Qwen/Qwen3-8B"} | model: expected llama-3.1-8b, got Qwen/Qwen3-8B
vllm_serve.json        | serve 16 2048                            | {} | input_tokens: expected 2048, got 1024
vllm_serve.json        | serve 16 1024 256                        | {} | expected 257, got 129; use --new-tokens 128
vllm_serve.json        | serve 8 1024                             | {} | concurrency: expected 8, got 16
vllm_serve.json        | decode 16 1024                           | {} | half of the output): expected 1024, got 1087.5
vllm_serve.json        | decode 16 1088                           | {"mean_itl_ms": 40.0} | median time between tokens
vllm_serve.json        | serve 16 1024                            | {"request_rate": 4.0} | request_rate: expected inf
vllm_serve.json        | serve 16 1024                            | {"failed": 2} | failed: expected 0 requests, got 2
vllm_serve.json        | serve 16 1024                            | {"max_concurrency": null} | request_rate: expected inf with --max-concurrency
vllm_serve.json        | serve 16 1024                            | {"max_concurrency": null, "request_rate": 5} | as steps of requests that arrive have many batches
vllm_serve.json        | serve 16 1024                            | {"max_concurrency": null, "request_rate": 5, "burstiness": 0.5} | burstiness: expected a Poisson process
vllm_serve.json        | serve 16 1024                            | {"max_concurrency": null, "request_rate": -1} | request_rate: expected a positive number of requests
vllm_serve.json        | serve 16 1024                            | {"max_concurrency": null, "input_lens": [5, 6]} | input_lens: expected 160 of whole numbers
vllm_serve.json        | serve 16 1024                            | {"spec_decode_num_drafts": 4} | speculative decoding is unsupported
vllm_serve.json        | serve 16 1024                            | {"mean_tpot_ms": 2.0} | in flight on average: expected 11.2 to 16.8, got 4.7
vllm_latency.json      | decode 8 1024                            | {} | phase: expected generate or prefill for vllm bench
vllm_throughput.json   | generate 32 512                          | {} | tokens per request: expected 641, got 576
vllm_throughput.json   | generate 8 512 63                        | {} | requests: expected 8, the batch, got 32
sglang.jsonl           | serve 16 1024                            | {"errors": ["", "timeout"]} | errors: expected 0 requests, got 1
sglang.jsonl           | serve 16 1024                            | {"server_info": {"tp_size": 4}} | devices: expected 1, got 4
trtllm_throughput.json | serve 8 1024 127 engine=trtllm dtype=fp8 | {"decoding_stats": {"mode": "Eagle"}} | speculative decoding
trtllm_throughput.json | serve 16 1024                            | {} | dtype: expected bf16, got fp8
aiperf.json            | serve 16 1024                            | {"was_cancelled": true} | was_cancelled: expected false, got true
aiperf.json            | serve 16 1024                            | {"request_latency": {"unit": "min", "avg": 0.03}} | latency.unit: expected one of ns, us
genai_perf.json        | serve 1 550 127                          | {"inter_token_latency": {"avg": 8.0}} | latency.unit: expected one of ns, us
aiperf.json            | serve 16 1024                            | {"error_summary": [{"count": 3}]} | error_summary: expected 0 requests, got 3
aiperf.json            | serve 16 1024                            | {"input_config": {"phases": [{"name": "a", "type": "gamma"}]}} | got gamma
aiperf.json            | serve 16 1024                            | {"input_config": {"loadgen": {"concurrency": 5}}} | stimulus: expected concurrency or request_rate, got none
genai_perf.json        | serve 1 550 127                          | {"input_config": {"perf_analyzer": {"stimulus": {"request_rate": 2.0}}}} | request_count: expected a value, got no such key
genai_perf.json        | serve 1 550 127                          | {"input_config": {"perf_analyzer": {"stimulus": {"session": 2.0}}}} | stimulus: expected concurrency or request_rate, got session
genai_perf.json        | prefill 1 550                            | {"time_to_first_token": null} | time to first token: expected
"""
"""Files, what is asked, changes of the file, and what does not match."""


@pytest.mark.parametrize(("name", "request_", "changes", "reason"), rows_of(MISMATCHES))
def test_what_does_not_match_is_refused(
    tmp_path: Path, name: str, request_: str, changes: str, reason: str
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**_load(name), **json.loads(changes)}), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        measured(file, _asked(request_))
    assert str(caught.value).startswith(f"{file}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *tables_of("prediction/mistakes.yaml")["benchmarks"],
        (f'{{"avg_latency": {"9" * 5000}}}', "is not read (Exceeds the limit"),
        (
            f'{{"no": 1}}\n{{"avg_latency": {"9" * 5000}}}',
            "run.json:2: is not read (Exceeds the limit",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        measured(file, VLLM)
    assert str(caught.value).startswith(str(file))
    assert reason in str(caught.value)


FEW = {"num_prompts": 48, "completed": 48, "duration": 4.6}
FEW |= {"total_input_tokens": 48 * 1024, "total_output_tokens": 48 * 129}


@pytest.mark.parametrize(
    ("changes", "asked", "notes"),
    [
        ({}, VLLM, []),
        ({"model_id": "meta-llama/Meta-Llama-3.1-8B"}, VLLM, []),
        (
            {"model_id": "/models/llama-70b"},
            VLLM,
            ["model /models/llama-70b is not known by name; check that it is"],
        ),
        (
            {"model_id": "nvidia/Llama-3.1-8B-FP8"},
            VLLM,
            ["is quantised by its name, the prediction is for bf16"],
        ),
        ({"model_id": "nvidia/Llama-3.1-8B-FP8"}, _request("serve", 16, 1024, dtype="fp8"), []),
        (
            {"backend": "sglang"},
            VLLM,
            ["vllm bench serve ran sglang, the prediction is for vllm; check --engine"],
        ),
        (
            {"num_prompts": 500},
            VLLM,
            ["num_prompts: 500, but 160 completed and 0 failed; check the dataset"],
        ),
        (
            FEW,
            VLLM,
            ["one sample, with ramp-up and ramp-down; use --save-detailed and --num-prompts 160"],
        ),
    ],
)
def test_what_cannot_be_checked_is_a_note(
    tmp_path: Path, changes: dict[str, Any], asked: Request, notes: list[str]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**_load("vllm_serve.json"), **changes}), encoding="utf-8")
    found = measured(file, asked).notes
    assert len(found) == len(notes)
    assert all(f"{file}: " in one and text in one for one, text in zip(found, notes))


def test_the_unit_of_a_time_counts(tmp_path: Path) -> None:
    data, file = _load("genai_perf.json"), tmp_path / "run.json"
    latency = {**data["request_latency"], "unit": "ns", "avg": 1e6 * data["request_latency"]["avg"]}
    file.write_text(json.dumps({**data, "request_latency": latency}), encoding="utf-8")
    found = measured(file, _request("generate", 1, 550, 127)).seconds
    assert found == pytest.approx(data["request_latency"]["avg"] / 1e3)


def test_a_file_instead_of_a_time_on_the_command_line(cli: Any) -> None:
    line = f"speedup {MODEL} --hardware h100 --prune 'depth 0.25' --json"
    line += " --phase serve --concurrency 16 --seq 1024 --new-tokens 128"
    seconds = 16 / _load("vllm_serve.json")["request_throughput"]
    given, err = cli(f"{line} --dense-from {FILES / 'vllm_serve.json'}")
    by_time, notes = cli(f"{line} --dense-time {1e3 * seconds!r}ms")
    assert err == notes, "nothing of the file remains unchecked"
    (before,), (after,), (same,) = (json.loads(text) for text in (cli.out(line), given, by_time))
    assert after["dense_s"] == pytest.approx(same["dense_s"], rel=1e-9)
    assert after["dense_s"] == pytest.approx(seconds, rel=0.02)
    width = [math.log(r["dense_upper"] / r["dense_lower"]) for r in (before, after)]
    assert width[1] < 0.2 * width[0]


RATE = {"max_concurrency": None, "request_rate": 5.0}
POISSON = {"name": "profiling", "type": "poisson", "rate": 8.0, "requests": 160}
STIMULUS = {"stimulus": {"request_rate": 2.0}}


def _arriving(tmp_path: Path, name: str, changes: dict[str, Any]) -> Any:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**_load(name), **changes}), encoding="utf-8")
    return read_benches(file)[0]


def test_requests_that_arrive_are_those_of_the_file(tmp_path: Path) -> None:
    listed = {"start_times": [7.5, 7.0, 9.0, 8.0] * 40, "input_lens": [5, 6, 7, 8] * 40}
    run = _arriving(tmp_path, "vllm_serve.json", {**RATE, **listed})
    sent = run.arriving
    assert sent.arrival.tolist() == [0.0] * 40 + [0.5] * 40 + [1.0] * 40 + [2.0] * 40
    assert (sent.prompt[0], sent.prompt[40], sent.output[0]) == (6, 5, 129)
    assert (run.percentiles_s["median_ttft"], run.percentiles_s["p99_ttft"]) == (0.199, 0.212)
    assert run.note == ""


def test_times_of_arrival_that_a_file_lacks_are_drawn(tmp_path: Path) -> None:
    run = _arriving(tmp_path, "vllm_serve.json", RATE)
    assert run.arriving.arrival[-1] == pytest.approx(160 / 5)
    assert "times of arrival are drawn; --save-detailed" in run.note
    at_once = _arriving(tmp_path, "vllm_serve.json", {"max_concurrency": None})
    assert set(at_once.arriving.arrival) == {0.0}
    assert at_once.note == ""


@pytest.mark.parametrize(
    ("name", "changes", "last", "equal"),
    [
        ("aiperf.json", {"input_config": {"phases": [POISSON]}}, 20.0, False),
        ("aiperf.json", {"input_config": {"phases": [{**POISSON, "type": "constant"}]}}, 20.0, 1),
        (
            "genai_perf.json",
            {"input_config": {"perf_analyzer": STIMULUS}, "request_count": {"avg": 20}},
            10.0,
            True,
        ),
    ],
)
def test_rates_of_genai_perf_and_aiperf(
    tmp_path: Path, name: str, changes: dict[str, Any], last: float, equal: bool
) -> None:
    run = _arriving(tmp_path, name, changes)
    waits = np.diff(run.arriving.arrival)
    assert (waits.std() < 1e-9) == equal
    assert run.arriving.arrival[-1] == pytest.approx(last - equal * waits[0])
    assert 0.0 < run.percentiles_s["median_tpot"] < run.percentiles_s["p99_tpot"]
