"""Read result files of serving benchmarks, and turn a result into the measured time of the dense
model.

:func:`read_benches` reads the results of a file. Every tool counts the token of the prefill as
output: o output tokens are a prefill and o - 1 decode steps. Each reader names the file that writes
its format.

:func:`measured` returns the time of a pass. What a file must match, and which of its numbers is the
time of a phase (:func:`pass_seconds`):

- **prefill**: the time of a batch with one output token (``vllm bench latency``, ``throughput``),
  or the mean time to the first token with one request in flight. With more, the time to the first
  token depends on how requests arrive.
- **decode**: the mean time per further token with one request in flight. With more, it includes the
  prompts of other requests; the median time between tokens does not while fewer than half of the
  steps have a prompt. ``seq`` is the mean number of cached positions, the prompt and half of the
  output.
- **generate**: the time of a batch; with one request in flight, the mean time of a request; where
  all requests of a run start together, the time of the run.
- **serve**: the mean time of a request in a closed loop: requests in flight per requests/s
  (Little's law).

``new_tokens`` decode steps are measured with ``new_tokens`` + 1 output tokens. Times over HTTP
(``serve``, SGLang, genai-perf, AIPerf) include the network, tokenisation and the client.

Requests that arrive at a rate, or all at once, have no time of a pass, because the batch varies
from step to step: :attr:`BenchRun.arriving` has these requests.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import AMOUNT, MOST, SECONDS, Range, number, shown, whole
from simulator.arrays import array
from simulator.engines.engine import load_engine
from simulator.errors import InputError, one_line
from simulator.files.read import parse_json, read_bounded
from simulator.models.library import load_model, shipped_model
from simulator.models.lower import number_formats
from simulator.models.model import Model
from simulator.models.quantization import QUANT_ALGOS
from simulator.request import MAX_TOKENS, Request
from simulator.serving.arrivals import Requests

TOOLS = (
    "vllm bench latency, throughput or serve, SGLang bench_serving, trtllm-bench, genai-perf or"
    " AIPerf"
)
MAX_FILE_BYTES = 200_000_000  # detailed results of 10,000 requests have some 50 MB
# with so many requests per request in flight, ramp-up and ramp-down hardly change the mean time
ENOUGH_ROUNDS = 10
_TIMES = Range(1e-12, 1e9, "positive times in seconds, at most 1e9")
_LENGTHS = Range(1.0, float(MAX_TOKENS), f"whole numbers from 1 to {MAX_TOKENS}", True)
_RATE = Range(1e-6, 1e6, "a positive number of requests per second")
_UNITS: Mapping[str, float] = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0}
_VLLM_SERVERS: Mapping[str, str] = {"vllm": "vllm", "sglang": "sglang", "tensorrt-llm": "trtllm"}
"""Engine by backend of ``vllm bench serve``; the other backends (openai) fit any server."""
_TRTLLM_DTYPES: Mapping[str, str] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_JOULES = Range(1e-12, 1e15, "a positive energy in J")
_ENERGY = re.compile(r"energ|joule|watt", re.IGNORECASE)
_ZEUS = (
    "steady_state_energy",
    "steady_state_energy_per_token",
    "energy_per_generation",
    "request_energies",
)
"""Energies of ML.ENERGY's results, J; those per request are not measured separately."""
_POWERS = ("nvidia_power_usage", "gpu_power_usage", "amd_power")
"""Metrics of AIPerf that are the power of a GPU, under their names in all releases."""
Floats = NDArray[np.float64]


class GpuPower(NamedTuple):
    """Mean power of GPUs, W, and the output tokens per second of the same window."""

    watts: float
    tokens_per_s: float
    gpus: int


@dataclass(frozen=True)
class BenchRun:
    """One result of a serving benchmark; numbers that the file does not state are 0, texts ""."""

    source: str  # path of the file, with the line if it has several results
    # "batch": requests that start together; "serve": requests that arrive, or a closed loop, in
    # which a request starts when another finishes
    kind: str
    # times of a whole batch (batch), or mean times of a request (serve)
    samples_s: tuple[float, ...]
    tool: str = ""  # command that wrote the file
    model: str = ""
    concurrency: int = 0  # sequences in the batch, or requests in flight
    mean_concurrency: float = 0.0  # mean time of a request x requests per second (Little's law)
    requests: int = 0  # in the whole run
    input_tokens: float = 0.0  # mean of a request, as the next two
    output_tokens: float = 0.0
    # prompt and output together, if the file does not state them separately
    total_tokens: float = 0.0
    duration_s: float = 0.0  # duration of the whole run
    # mean time of a request, to its first token, and per output token after the first
    request_s: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    step_s: float = 0.0  # median time between tokens
    engine: str = ""
    gpu: str = ""
    dtype: str = ""
    weight_dtype: str = ""
    kv_dtype: str = ""
    devices: int = 0  # GPUs that share the model
    # as in the file: "50" (a batch), "p99_ttft"
    percentiles_s: Mapping[str, float] = field(default_factory=dict)
    power: GpuPower | None = None
    note: str = ""  # limits of the samples
    arriving: Requests | None = None  # at a rate, or all at once; None: a closed loop, or a batch


@dataclass(frozen=True)
class Fields:
    """One JSON object of a file; errors name the file and the key.

    >>> run = Fields("run.json", {"performance": {"total_latency_ms": 250.0}})
    >>> run.part("performance").time("total_latency_ms")
    0.25
    """

    source: str
    data: Mapping[str, Any]
    path: str = ""

    def place(self, key: str) -> str:
        return f"{self.source}: {self.path}{key}"

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def value(self, key: str) -> Any:
        if not self.has(key):
            got = "null" if key in self.data else "no such key"
            raise InputError(f"{self.place(key)}: expected a value, got {got}")
        return self.data[key]

    def part(self, key: str) -> Fields:
        """Return an object; an empty one if it is absent."""
        value = self.data.get(key)
        if not isinstance(value, Mapping | None):
            raise InputError(f"{self.place(key)}: expected an object, got {shown(value)}")
        return Fields(self.source, value or {}, f"{self.path}{key}.")

    def rows(self, key: str) -> list[Fields]:
        values = self.data.get(key, [])
        if not isinstance(values, list) or not all(isinstance(one, Mapping) for one in values):
            raise InputError(f"{self.place(key)}: expected a list of objects, got {shown(values)}")
        return [Fields(self.source, one, f"{self.path}{key}[{i}].") for i, one in enumerate(values)]

    def count(self, key: str, least: int = 1, default: int | None = None) -> int:
        """Return a whole number; one without a fraction, as 64.0, counts too. With a ``default``
        the key may be absent."""
        if default is not None and not self.has(key):
            return default
        value = self.value(key)
        count = (
            whole(int(value)) if isinstance(value, float) and value.is_integer() else whole(value)
        )
        if count is None or not least <= count <= MOST:
            raise InputError(
                f"{self.place(key)}: expected a whole number from {least} up, got {shown(value)}"
            )
        return count

    def amount(self, key: str, right: Range = AMOUNT) -> float:
        return number(self.place(key), self.value(key), right)

    def seconds(self, key: str) -> float:
        return self.amount(key, SECONDS)

    def time(self, key: str) -> float:
        """Return a time in s of a key in ms; 0 if it is absent."""
        return self.amount(key) / 1e3 if self.has(key) else 0.0

    def average(self, key: str) -> float:
        """Return the average of a metric of genai-perf or AIPerf; 0 if it is absent."""
        return self.part(key).amount("avg") if self.has(key) else 0.0

    def average_s(self, key: str, part: str = "avg") -> float:
        """Return the average or a percentile (``p99``) of a time of genai-perf or AIPerf, s; 0 if
        it is absent."""
        if not self.part(key).has(part):
            return 0.0
        if (unit := self.part(key).text("unit")) not in _UNITS:
            raise InputError(
                f"{self.place(key)}.unit: expected one of {', '.join(_UNITS)}, got {unit or 'none'}"
            )
        return self.part(key).amount(part) * _UNITS[unit]

    def text(self, key: str) -> str:
        """Return a text; "" if it is absent."""
        value = self.data.get(key) or ""
        if not isinstance(value, str):
            raise InputError(f"{self.place(key)}: expected text, got {shown(value)}")
        return one_line(value, 200)

    def times(self, key: str) -> Floats:
        return self.numbers(key, _TIMES)

    def numbers(self, key: str, right: Range, count: int = 0) -> Floats:
        """Return a list of numbers, of which ``count`` are expected."""
        values = array(self.place(key), self.value(key), right)
        if values.ndim != 1 or not len(values) or count not in (0, len(values)):
            many = f"{count} of" if count else "a list of"
            raise InputError(
                f"{self.place(key)}: expected {many} {right.expected}, got {shown(self.data[key])}"
            )
        return values


def request_times(fields: Fields) -> Floats:
    """Return the time of each request in the order of their starts; none if the file does not have
    them."""
    if "latencies" in fields.data:
        return fields.times("latencies")
    if "ttfts" not in fields.data or "itls" not in fields.data:
        return np.zeros(0)
    first, gaps = fields.times("ttfts"), fields.data["itls"]
    if not isinstance(gaps, list) or len(gaps) != len(first):
        raise InputError(
            f"{fields.place('itls')}: expected {len(first)} lists, as ttfts, got {shown(gaps)}"
        )
    later: Floats = np.array(
        [array(fields.place("itls"), gap, AMOUNT).sum() if gap else 0.0 for gap in gaps]
    )
    return first + later


def check_closed_loop(fields: Fields) -> None:
    """Reject a request rate: requests of a closed loop start when others finish."""
    rate = fields.data.get("request_rate")
    if rate not in (None, "inf", float("inf")):
        closed = "expected inf, requests that start when others finish"
        raise InputError(f"{fields.place('request_rate')}: {closed}, got {shown(rate)}")


def _arriving(fields: Fields, run: BenchRun) -> BenchRun:
    """Return a result with the requests that arrive, if it is not a closed loop. Their times are
    those of the file, else a Poisson process; their lengths those of the file, else the means."""
    rate, count = fields.data.get("request_rate"), run.requests
    if fields.has("max_concurrency"):
        check_closed_loop(fields)
        return run
    prompt, output = (
        fields.numbers(key, _LENGTHS, count) if fields.has(key) else np.full(count, mean)
        for key, mean in (("input_lens", run.input_tokens), ("output_lens", run.output_tokens))
    )
    requests = _requests(np.zeros(count), prompt, output)
    if rate in (None, "inf", math.inf):
        return replace(run, arriving=requests)
    if fields.has("start_times"):
        start = fields.numbers("start_times", AMOUNT, count)
        return replace(run, arriving=_requests(start, prompt, output))
    for key, default in (("burstiness", 1.0), ("ramp_up_strategy", None)):
        if fields.data.get(key, default) != default:
            raise InputError(f"{fields.place(key)}: expected a Poisson process, or --save-detailed")
    note = f"{fields.source}: times of arrival are drawn; --save-detailed states those of the run"
    return replace(run, arriving=requests.at_rate(fields.amount("request_rate", _RATE)), note=note)


def _requests(start: Floats, prompt: Floats, output: Floats) -> Requests:
    """Return requests in the order of their starts."""
    order = np.argsort(start, kind="stable")
    prompt, output = (np.maximum(np.rint(one[order]), 1.0) for one in (prompt, output))
    return Requests(start[order] - start.min(), prompt.astype(np.intp), output.astype(np.intp))


def check_failed(fields: Fields, failed: int, key: str = "failed") -> None:
    """Reject failed requests: the others were served with fewer in flight."""
    if failed:
        raise InputError(f"{fields.place(key)}: expected 0 requests, got {failed}")


def vllm_latency(fields: Fields) -> BenchRun:
    """Return a result of ``vllm bench latency --output-json FILE``: times of ``LLM.generate`` for
    one batch, whose size and lengths the file does not state (github.com/vllm-project/vllm,
    vllm/benchmarks/latency.py, 00cae07)."""
    percentiles = fields.part("percentiles").data
    return BenchRun(
        fields.source,
        "batch",
        tuple(fields.times("latencies").tolist()),
        tool="vllm bench latency",
        model=fields.text("model_id"),
        engine="vllm",
        percentiles_s={
            p: number(fields.place(f"percentiles.{p}"), s, AMOUNT) for p, s in percentiles.items()
        },
    )


def vllm_throughput(fields: Fields) -> BenchRun:
    """Return a result of ``vllm bench throughput --output-json FILE``
    (vllm/benchmarks/throughput.py, 1a91bc2). All requests are submitted together: ``elapsed_time``
    is the time of one batch, if the engine holds them all (``--max-num-seqs``). The file does not
    state the backend (``--backend vllm`` or ``hf``)."""
    requests, seconds = fields.count("num_requests"), fields.seconds("elapsed_time")
    return BenchRun(
        fields.source,
        "batch",
        (seconds,),
        tool="vllm bench throughput",
        concurrency=requests,
        requests=requests,
        total_tokens=fields.amount("total_num_tokens") / requests,
        duration_s=seconds,
    )


def _over_http(fields: Fields, failed: int, key: str, speculative: str, option: str) -> BenchRun:
    """Return what vLLM and SGLang write alike. Of a closed loop with the times of all requests
    (``option``), samples are means over as many requests in a row as are in flight, without ramp-up
    and ramp-down. Else the only sample follows from the duration. The median time between chunks is
    that of a step only if each chunk has one token, else the step is 0."""
    check_failed(fields, failed, key)
    if fields.has(speculative):
        raise InputError(f"{fields.place(speculative)}: speculative decoding is unsupported")
    many, completed, duration = (
        fields.count("max_concurrency", default=0),
        fields.count("completed"),
        fields.seconds("duration"),
    )
    times, enough, note = request_times(fields), ENOUGH_ROUNDS * many, ""
    if many and (blocks := len(times) // many - 2) >= 1:
        samples = times[many : many * (blocks + 1)].reshape(-1, many).mean(axis=1)
    else:
        samples = np.array([many * duration / completed])
        short = (
            f"{fields.source}: one sample, with ramp-up and ramp-down; use {option} and"
            f" --num-prompts {enough}"
        )
        note = "" if completed >= enough else short
    tpot, between = fields.time("mean_tpot_ms"), fields.time("mean_itl_ms")
    one_token = tpot > 0.0 and abs(between / tpot - 1.0) <= 0.1
    names = (key for key in fields.data if key.endswith("_ms") and not key.startswith("std_"))
    run = BenchRun(
        fields.source,
        "serve",
        tuple(samples.tolist()),
        concurrency=many,
        requests=completed,
        input_tokens=fields.amount("total_input_tokens") / completed,
        output_tokens=fields.amount("total_output_tokens") / completed,
        duration_s=duration,
        ttft_s=fields.time("mean_ttft_ms"),
        tpot_s=tpot,
        step_s=fields.time("median_itl_ms") if one_token else 0.0,
        percentiles_s={key.removesuffix("_ms"): fields.time(key) for key in names},
        note=note,
    )
    return _arriving(fields, run)


def _of_zeus(fields: Fields, run: BenchRun) -> BenchRun:
    """Add the power that ML.ENERGY measured with Zeus in the steady state, else in the whole run
    (github.com/ml-energy/benchmark, mlenergy/llm/benchmark.py, d6450a3; energies in J:
    github.com/ml-energy/zeus, zeus/monitor/energy.py, 00161b2)."""
    for key in fields.data:
        if _ENERGY.search(key) and key not in _ZEUS and fields.has(key):
            known = f"expected one of {', '.join(_ZEUS)}, whose unit is known"
            raise InputError(f"{fields.place(key)}: {known}, got {key}")
    steady = fields.has("steady_state_energy_per_token")
    window = fields.part(f"{'steady_state' if steady else 'entire_benchmark'}_measurement")
    gpus = window.part("gpu_energy")
    if not gpus.data:
        return run
    joules, seconds = sum(gpus.amount(gpu) for gpu in gpus.data), window.seconds("time")
    tokens = run.requests * run.output_tokens
    if steady:
        tokens = joules / fields.amount("steady_state_energy_per_token", _JOULES)
    power = GpuPower(joules / seconds, tokens / seconds, len(gpus.data))
    return replace(run, power=power, devices=power.gpus)


def vllm_serve(fields: Fields) -> BenchRun:
    """Return a result of ``vllm bench serve --save-result`` over HTTP, with ``--max-concurrency C``
    a closed loop, else requests that arrive (vllm/benchmarks/serve.py, def9ce8; keys were compared
    for releases 0.11.0 and 0.33.0). The mean time of a request of a closed loop is C x ``duration``
    / ``completed`` (Little's law). ``mean_tpot_ms`` is the rest of a request per further token,
    ``median_itl_ms`` the median time between chunks of all streams. ``--percentile-metrics`` omits
    ``mean_e2el_ms``, the time of a request, by default."""
    missing = "failed" not in fields.data
    failed = (
        fields.count("num_prompts") - fields.count("completed")
        if missing
        else fields.count("failed", 0)
    )
    run = _over_http(fields, failed, "failed", "spec_decode_num_drafts", "--save-detailed")
    asked = fields.count("num_prompts", default=run.requests)
    short = (
        f"{fields.source}: num_prompts: {asked}, but {run.requests} completed and 0 failed; check"
        " the dataset"
    )
    whole = (
        run.ttft_s + run.tpot_s * max(run.output_tokens - 1.0, 0.0)
        if run.ttft_s and run.tpot_s
        else 0.0
    )
    request = fields.time("mean_e2el_ms") or whole
    return replace(
        _of_zeus(fields, run),
        tool="vllm bench serve",
        model=fields.text("model_id"),
        mean_concurrency=request * run.requests / run.duration_s,
        request_s=request,
        engine=_VLLM_SERVERS.get(fields.text("backend"), ""),
        note=short if run.requests < asked else run.note,
    )


def sglang_serve(fields: Fields) -> BenchRun:
    """Return a result of ``python -m sglang.bench_serving`` over HTTP
    (github.com/sgl-project/sglang, python/sglang/benchmark/serving.py, 00f9ec4). Keys are as in
    ``vllm bench serve``, from which the script is derived; ``concurrency`` is the mean number of
    requests in flight. ``--output-details`` adds the time and the error of each request."""
    errors, backend, server = (
        fields.data.get("errors"),
        fields.text("backend"),
        fields.part("server_info"),
    )
    failed = sum(map(bool, errors)) if isinstance(errors, list) else 0
    run = _over_http(fields, failed, "errors", "accept_length", "--output-details")
    note = run.note
    if fields.data.get("dataset_name") == "random" and fields.data.get(
        "random_range_ratio"
    ) not in (None, 1, 1.0):
        ratio = (
            f"lengths of requests vary (random_range_ratio {fields.amount('random_range_ratio'):g})"
        )
        note = note or f"{fields.source}: {ratio}; use --random-range-ratio 1"
    return replace(
        run,
        tool="SGLang bench_serving",
        model=server.text("model_path"),
        mean_concurrency=fields.amount("concurrency") if fields.has("concurrency") else 0.0,
        request_s=fields.time("mean_e2e_latency_ms"),
        engine=(
            "sglang"
            if backend.startswith("sglang")
            else {"vllm": "vllm", "trt": "trtllm"}.get(backend, "")
        ),
        devices=server.count("tp_size", default=0),
        note=note,
    )


def trtllm_report(fields: Fields) -> BenchRun:
    """Return a report of ``trtllm-bench latency`` or ``throughput --report_json FILE``, without
    HTTP (github.com/NVIDIA/TensorRT-LLM, tensorrt_llm/bench/dataclasses/reporting.py, 0249976).
    ``avg_num_concurrent_requests`` is the sum of the times of all requests per time of the run:
    close to ``--concurrency C`` in a long closed loop. Without ``--concurrency`` all requests start
    together, and it is far above the number that the engine serves at once."""
    engine, world, requests = (
        fields.part("engine"),
        fields.part("world_info"),
        fields.part("request_info"),
    )
    performance, streaming = fields.part("performance"), fields.part("streaming_metrics")
    if fields.has("decoding_stats"):
        raise InputError(f"{fields.place('decoding_stats')}: speculative decoding is unsupported")
    performance.value("avg_request_latency_ms")
    quantised, base = engine.text("quantization"), engine.text("dtype").removeprefix("torch.")
    dtype = weight_dtype = _TRTLLM_DTYPES.get(base, "")
    note = ""
    if quantised in QUANT_ALGOS:
        weight_dtype, arithmetic = QUANT_ALGOS[quantised]
        dtype = arithmetic or dtype
    elif quantised:
        dtype = weight_dtype = ""
        note = (
            f"{fields.source}: engine.quantization {quantised} is not checked; check --dtype and"
            " --weight-dtype"
        )
    return BenchRun(
        fields.source,
        "serve",
        (performance.seconds("avg_request_latency_ms") / 1e3,),
        tool="trtllm-bench",
        model=engine.text("model"),
        mean_concurrency=requests.amount("avg_num_concurrent_requests"),
        requests=requests.count("num_requests"),
        input_tokens=requests.amount("avg_input_length"),
        output_tokens=requests.amount("avg_output_length"),
        duration_s=performance.seconds("total_latency_ms") / 1e3,
        request_s=performance.time("avg_request_latency_ms"),
        ttft_s=streaming.time("avg_ttft_ms"),
        tpot_s=streaming.time("avg_tpot_ms"),
        engine="trtllm",
        gpu=fields.part("machine").text("name"),
        dtype=dtype,
        weight_dtype=weight_dtype,
        kv_dtype="fp8" if engine.text("kv_cache_dtype") == "FP8" else "",
        devices=world.count("world_size", default=0),
        note=note,
    )


def genai_perf(fields: Fields) -> BenchRun:
    """Return an export of ``genai-perf profile`` or ``aiperf profile`` with ``--concurrency C`` or
    ``--request-rate R``, over HTTP (github.com/triton-inference-server/perf_analyzer,
    json_exporter.py, 4cc7650 and 0f5cc07; github.com/ai-dynamo/aiperf, metrics_json_exporter.py,
    047d59d). The mean time of a request of a closed loop is C per ``request_throughput`` (Little's
    law). ``inter_token_latency`` is the rest of a request per further token, a TPOT."""
    tool = (
        "AIPerf"
        if "aiperf_version" in fields.data or "was_cancelled" in fields.data
        else "genai-perf"
    )
    arguments = fields.part("input_config")
    if fields.data.get("was_cancelled"):
        raise InputError(f"{fields.place('was_cancelled')}: expected false, got true")
    errors = fields.data.get("error_summary") or []
    failed = (
        sum(one.count("count", default=1) for one in fields.rows("error_summary")) if errors else 0
    )
    check_failed(fields, failed or int(fields.average("error_request_count")), "error_summary")
    requests, request = round(fields.average("request_count")), fields.average_s("request_latency")
    rate = fields.part("request_throughput").seconds("avg")  # positive
    many, sent, regular = _load(arguments)
    enough = ENOUGH_ROUNDS * many
    few = (
        f"{fields.source}: {requests} requests include ramp-up and ramp-down; use --request-count"
        f" {enough}"
    )
    run = BenchRun(
        fields.source,
        "serve",
        (many / rate if many else request,),
        tool=tool,
        model=_model(arguments),
        concurrency=many,
        mean_concurrency=request * rate,
        requests=requests,
        input_tokens=fields.average("input_sequence_length"),
        output_tokens=fields.average("output_sequence_length"),
        duration_s=fields.average_s("benchmark_duration") or requests / rate,
        request_s=request,
        ttft_s=fields.average_s("time_to_first_token"),
        tpot_s=fields.average_s("inter_token_latency"),
        percentiles_s={
            f"{name}_{time}": fields.average_s(key, part)
            for time, key in (("ttft", "time_to_first_token"), ("tpot", "inter_token_latency"))
            for name, part in (("median", "p50"), ("p99", "p99"))
        },
        note=few if 0 < requests < enough else "",
    )
    power = _of_telemetry(fields.part("telemetry_data"), rate * run.output_tokens)
    run = replace(run, power=power)
    if not sent:
        return run
    for key in ("request_count", "input_sequence_length", "output_sequence_length"):
        fields.value(key)
    start = np.arange(requests) / sent * regular
    lengths = (np.full(requests, mean) for mean in (run.input_tokens, run.output_tokens))
    arriving = _requests(start, *lengths)
    return replace(run, arriving=arriving if regular else arriving.at_rate(sent))


def _of_telemetry(telemetry: Fields, tokens_per_s: float) -> GpuPower | None:
    """Return the power of all GPUs that AIPerf read during a run (github.com/ai-dynamo/aiperf,
    docs/tutorials/gpu-telemetry.md, 013e460)."""
    watts, endpoints = list[float](), telemetry.part("endpoints")
    for gpus in (endpoints.part(name).part("gpus") for name in endpoints.data):
        for metrics in (gpus.part(name).part("metrics") for name in gpus.data):
            for power in (metrics.part(key) for key in _POWERS if metrics.has(key)):
                if power.text("unit") != "W":
                    raise InputError(
                        f"{power.place('unit')}: expected W, got {power.text('unit') or 'none'}"
                    )
                watts.append(power.amount("avg"))
    return GpuPower(sum(watts), tokens_per_s, len(watts)) if watts else None


def _load(arguments: Fields) -> tuple[int, float, bool]:
    """Return the requests in flight, the requests sent per second, and whether they are sent at
    equal times, not as a Poisson process: of the phase (AIPerf from 0.8) or the stimulus
    (genai-perf). InputError for any other load."""
    counted = (p for p in arguments.rows("phases") if not p.data.get("exclude_from_results"))
    phases = [p for p in counted if "warmup" not in (p.data.get("name"), p.data.get("kind"))]
    if phases:
        types, phase = [phase.text("type") for phase in phases], phases[0]
        if types in (["poisson"], ["constant"]) and not phase.has("concurrency"):
            return 0, phase.amount("rate", _RATE), types == ["constant"]
        if types != ["concurrency"]:
            place = arguments.place("phases")
            raise InputError(
                f"{place}: expected one phase of type concurrency, or poisson or constant without"
                f" a concurrency, got {', '.join(types)}"
            )
        # the default of a phase
        return phase.count("concurrency", default=1), 0.0, False
    stimulus = arguments.part("perf_analyzer").part("stimulus")
    if set(stimulus.data) == {"request_rate"}:
        # perf_analyzer's --request-distribution is constant by default
        return 0, stimulus.amount("request_rate", _RATE), True
    if set(stimulus.data) != {"concurrency"}:
        got = ", ".join(map(str, stimulus.data)) or "none"
        place = arguments.place("perf_analyzer.stimulus")
        raise InputError(f"{place}: expected concurrency or request_rate, got {got}")
    return stimulus.count("concurrency"), 0.0, False


def _model(given: Fields) -> str:
    listed: Any = given.data.get("model_names")
    if given.has("models"):
        listed = [one.text("name") for one in given.part("models").rows("items")]
    first = listed[0] if isinstance(listed, list) and listed else listed or ""
    if not isinstance(first, str):
        raise InputError(f"{given.place('model_names')}: expected names, got {shown(listed)}")
    return one_line(first, 200)


def read_benches(path: str | os.PathLike[str]) -> list[BenchRun]:
    """Read all results in a file: one, or one per line (SGLang, ``--append-result`` of vLLM);
    InputError names file and key if it is another file."""
    source = os.fspath(path)
    try:
        text = read_bounded(source, MAX_FILE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{source}: is not UTF-8 text; expected a JSON file of {TOOLS}") from None
    try:
        objects = {source: parse_json(text, source)}
    except json.JSONDecodeError as error:
        lines = {
            f"{source}:{line_number}": line
            for line_number, line in enumerate(text.splitlines(), start=1)
            if line.strip()
        }
        if error.msg != "Extra data" or len(lines) < 2:
            raise InputError(
                f"{source}:{error.lineno}:{error.colno}: is not JSON ({error.msg})"
            ) from None
        objects = {}
        for place, line in lines.items():
            try:
                objects[place] = parse_json(line, place)
            except json.JSONDecodeError as wrong:
                raise InputError(f"{place}:{wrong.colno}: is not JSON ({wrong.msg})") from None
    return [_read(place, data) for place, data in objects.items()]


def _read(source: str, data: Any) -> BenchRun:
    if not isinstance(data, dict):
        raise InputError(f"{source}: expected a JSON object of {TOOLS}, got {shown(data)}")
    for keys, reader in _READERS.items():
        if data.keys() >= set(keys):
            return reader(Fields(source, data))
    raise InputError(
        f"{source}: expected a result of {TOOLS}, got {', '.join(sorted(data)[:8]) or 'no key'}"
    )


# keys that only one tool writes -> its reader; the first that fits is taken
_READERS: Mapping[tuple[str, ...], Callable[[Fields], BenchRun]] = {
    ("avg_latency",): vllm_latency,
    ("elapsed_time", "num_requests"): vllm_throughput,
    ("performance", "request_info"): trtllm_report,
    ("input_config",): genai_perf,
    ("median_e2e_latency_ms",): sglang_serve,
    ("request_throughput",): vllm_serve,
}


# relative difference by which mean lengths of a file may differ from those requested
TOLERANCE = 0.02
# prompt tokens by which a mean length may always differ: tokens that a tokeniser adds
SLACK_TOKENS = 2.0
IN_FLIGHT = (0.7, 1.05)
"""Share of the requests in flight that may be in flight on average: fewer are during ramp-up and
ramp-down."""

_QUANTISED = re.compile(r"fp8|int8|int4|nvfp4|mxfp4|awq|gptq|w\d+a\d+", re.IGNORECASE)


class MeasuredDense(NamedTuple):
    """Measured time of the dense model, s, the result it is from, and what could not be checked."""

    seconds: float
    run: BenchRun
    notes: tuple[str, ...]


def measured(path: str | os.PathLike[str], request: Request) -> MeasuredDense:
    """Return the measured time of the dense model from a file: from its last result that matches
    the request."""
    runs, wrong = read_benches(path), []
    for run in reversed(runs):
        try:
            return measured_of(run, request)
        except InputError as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    raise InputError(
        f"{os.fspath(path)}: expected a result of this request among {len(runs)}; {wrong[0]}"
    )


def measured_of(run: BenchRun, request: Request) -> MeasuredDense:
    """Return the time of a pass that one result measured, after comparing its conditions with those
    of a request."""
    notes = checked(run, request)
    return MeasuredDense(pass_seconds(run, request), run, notes)


def checked(run: BenchRun, request: Request) -> tuple[str, ...]:
    """Compare the model, devices and number formats of a result with those of a request; return
    notes on what cannot be compared."""
    model = load_model(request.model)
    notes = [*_model_notes(run, model, request), *([run.note] if run.note else [])]
    if run.devices and run.devices != request.devices:
        raise InputError(f"{run.source}: devices: expected {request.devices}, got {run.devices}")
    formats = number_formats(request, model)
    for what, stated, expected in (
        ("dtype", run.dtype, formats.dtype),
        ("weight dtype", run.weight_dtype, formats.weight_dtype),
    ):
        if stated and stated != expected:
            raise InputError(f"{run.source}: {what}: expected {expected}, got {stated}")
    if run.kind == "batch" and not run.concurrency:
        check = (
            f"--batch-size {request.batch} --input-len {request.seq} --output-len"
            f" {_output(request)}"
        )
        notes.append(
            f"{run.source}: {run.tool} states neither batch nor lengths; check that it ran with"
            f" {check}"
        )
    return tuple(notes)


def pass_seconds(run: BenchRun, request: Request) -> float:
    """Return the time of the pass of a request that a result measured, s; InputError if the result
    has another phase, batch (in ``serve`` the requests in flight) or lengths. What the file does
    not state is not checked."""
    _check_loop(run)
    phase, batch = request.phase, request.batch
    if run.kind == "batch":
        if phase not in ("prefill", "generate"):
            raise InputError(
                f"{run.source}: phase: expected generate or prefill for {run.tool}, got {phase}"
            )
        if run.concurrency and run.concurrency != batch:
            raise InputError(
                f"{run.source}: requests: expected {batch}, the batch, got {run.concurrency}"
            )
        _check_lengths(run, request)
        return median(run.samples_s)
    together = phase == "generate" and run.requests == batch > 1
    _check_in_flight(run, batch)
    _check_lengths(run, request)
    if phase == "serve":
        if run.requests and run.requests < 2 * batch:
            expected = f"expected at least {2 * batch}, twice those in flight"
            raise InputError(f"{run.source}: requests: {expected}, got {run.requests}")
        return fmean(run.samples_s)
    if phase == "generate" and (together or batch == 1):
        return run.duration_s if together else run.request_s or fmean(run.samples_s)
    if phase == "decode" and batch > 1 and 2 * batch < run.output_tokens:
        return _stated(run, "median time between tokens, one token per chunk", run.step_s)
    if batch > 1:
        raise InputError(
            f"{run.source}: concurrency: expected 1 for phase {phase}, got {batch}; use phase serve"
        )
    if phase == "prefill":
        return _stated(run, "time to first token", run.ttft_s)
    return _stated(run, "time per output token", run.tpot_s)


def request_of(
    run: BenchRun, *, batch: int | None = None, seq: int | None = None, output: int | None = None
) -> tuple[str, int, int, int]:
    """Return phase, batch, seq and decode steps that a result measured. ``batch`` (requests in
    flight of serve), ``seq`` (prompt tokens) and ``output`` (output tokens) are what the user
    states: all three for ``vllm bench latency``, one length for ``throughput``, none where the file
    has them."""
    _check_loop(run)
    in_flight = run.concurrency or (0 if batch else round(run.mean_concurrency))
    stated = {"batch": batch, "seq": seq, "output": output}
    measured = {
        "batch": in_flight,
        "seq": round(run.input_tokens),
        "output": round(run.output_tokens),
    }
    if run.total_tokens and (seq or output):
        rest = round(run.total_tokens) - (seq or output or 0)
        if rest < 1:
            more = f"expected more than {seq or output}"
            raise InputError(f"{run.source}: tokens per request: {more}, got {run.total_tokens:g}")
        measured["output" if seq else "seq"] = rest
    out = []
    for name, value in stated.items():
        in_file = measured[name]
        if value is None and not in_file:
            raise InputError(
                f"{run.source}: {name}: expected to be stated, as the file does not have it"
            )
        if value is not None and in_file and value != in_file:
            raise InputError(
                f"{run.source}: {name}: expected {in_file}, as in the file, got {value}"
            )
        out.append(in_file or int(value or 0))
    phase = "serve" if run.kind == "serve" else "generate" if out[2] > 1 else "prefill"
    if phase == "serve" and out[2] < 2:
        raise InputError(
            f"{run.source}: total_output_tokens: expected at least 2 per request, got {out[2]}"
        )
    return phase, out[0], out[1], out[2] - 1


def _check_loop(run: BenchRun) -> None:
    if run.arriving is not None:
        raise InputError(
            f"{run.source}: request_rate: expected inf with --max-concurrency, as steps of requests"
            " that arrive have many batches; use prunesim validate FOLDER for this file"
        )


def _output(request: Request) -> int:
    """Return the output tokens of a request: that of the prefill and one per decode step."""
    return 1 if request.phase == "prefill" else request.new_tokens + 1


def _check_lengths(run: BenchRun, request: Request) -> None:
    seq, output = request.seq, _output(request)
    if run.total_tokens:
        _check_length(
            run,
            "tokens per request",
            run.total_tokens,
            seq + output,
            max(TOLERANCE * (output - 1), 0.5),
        )
    around = max(TOLERANCE * seq, SLACK_TOKENS)
    if request.phase == "decode":
        middle = run.input_tokens + max(run.output_tokens - 2.0, 0.0) / 2.0
        _check_length(run, "cached positions (prompt and half of the output)", middle, seq, around)
        return
    if run.input_tokens:
        _check_length(
            run,
            "input_tokens",
            run.input_tokens,
            seq,
            around,
            f"; use --seq {run.input_tokens:.0f}",
        )
    # the time to the first token depends on the prompt only
    if run.output_tokens and not (request.phase == "prefill" and run.kind == "serve"):
        hint = (
            f"; use --new-tokens {run.output_tokens - 1:.0f}" if request.phase != "prefill" else ""
        )
        _check_length(
            run, "output_tokens", run.output_tokens, output, max(TOLERANCE * output, 0.5), hint
        )


def _check_length(
    run: BenchRun, what: str, length: float, expected: int, around: float, hint: str = ""
) -> None:
    if abs(length - expected) > around:
        raise InputError(f"{run.source}: {what}: expected {expected}, got {length:g}{hint}")


def _check_in_flight(run: BenchRun, batch: int) -> None:
    if run.concurrency and run.concurrency != batch:
        hint = f"use --phase serve --concurrency {run.concurrency}"
        raise InputError(
            f"{run.source}: concurrency: expected {batch}, got {run.concurrency}; {hint}"
        )
    mean = run.mean_concurrency
    if not (run.concurrency or mean):
        raise InputError(f"{run.source}: concurrency: expected to be stated in the file")
    low, high = (share * batch for share in IN_FLIGHT)
    if mean and not low <= mean <= high:
        raise InputError(
            f"{run.source}: requests in flight on average: expected {low:g} to {high:g}, got"
            f" {mean:.3g}"
        )


def _stated(run: BenchRun, what: str, seconds: float) -> float:
    if not seconds:
        raise InputError(
            f"{run.source}: {what}: expected in a file of {run.tool}, got none; run it with"
            " streaming"
        )
    return seconds


def _model_notes(run: BenchRun, model: Model, request: Request) -> list[str]:
    notes, engine = [], load_engine(request.engine).name.partition("@")[0]
    if run.engine and run.engine != engine:
        notes.append(
            f"{run.source}: {run.tool} ran {run.engine}, the prediction is for {engine}; check"
            " --engine"
        )
    if not run.model:
        return notes
    known = shipped_model(run.model)
    if known is None:
        notes.append(
            f"{run.source}: model {run.model} is not known by name; check that it is {model.name}"
        )
    elif _shapes(known) != _shapes(model):
        raise InputError(f"{run.source}: model: expected {model.name}, got {run.model}")
    formats = number_formats(request, model)
    wide = formats.weight_dtype in ("bf16", "fp16") and not run.weight_dtype
    if wide and _QUANTISED.search(run.model):
        check = f"the prediction is for {formats.dtype}; check --dtype and --weight-dtype"
        notes.append(f"{run.source}: model {run.model} is quantised by its name, {check}")
    return notes


def _shapes(model: Model) -> tuple[object, ...]:
    return (
        model.hidden,
        model.layers,
        model.heads,
        model.kv_heads,
        model.inner,
        model.vocab,
        model.experts,
    )
