"""Read results of ``vllm bench latency``, ``throughput`` and ``serve``.

Writers: ``vllm/benchmarks/latency.py`` (commit 00cae07), ``throughput.py`` (1a91bc2) and ``serve.py`` (def9ce8) of
https://github.com/vllm-project/vllm; keys were compared for releases 0.11.0 and 0.33.0.
"""

from __future__ import annotations

from collections.abc import Mapping

from simulator.arguments import AMOUNT, number
from simulator.errors import InputError
from simulator.prediction.benchmarks.run import (
    BenchRun,
    Fields,
    check_closed_loop,
    check_failed,
    loop_samples,
    loop_times,
)

_SERVERS: Mapping[str, str] = {"vllm": "vllm", "sglang": "sglang", "tensorrt-llm": "trtllm"}
"""Engine by backend of ``vllm bench serve``; the other backends (openai) fit any server."""


def latency(fields: Fields) -> BenchRun:
    """Return a result of ``vllm bench latency --output-json FILE``.

    ``latencies`` are times of ``LLM.generate`` for one batch of ``--batch-size`` prompts of ``--input-len`` tokens,
    with ``--output-len`` output tokens each: generate, or prefill with one output token. The file states none of these.
    """
    percentiles = fields.part("percentiles").data
    return BenchRun(
        fields.source,
        "batch",
        tuple(fields.times("latencies").tolist()),
        tool="vllm bench latency",
        model=fields.text("model_id"),
        engine="vllm",
        percentiles_s={p: number(fields.place(f"percentiles.{p}"), s, AMOUNT) for p, s in percentiles.items()},
    )


def throughput(fields: Fields) -> BenchRun:
    """Return a result of ``vllm bench throughput --output-json FILE``.

    ``elapsed_time`` is the time of all ``num_requests`` requests, which are submitted together: that of one batch, if
    the engine holds them all (``--max-num-seqs``). The file states the tokens of prompts and outputs together, but not
    the backend (``--backend vllm`` or ``hf``).
    """
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


def serve(fields: Fields) -> BenchRun:
    """Return a result of ``vllm bench serve --save-result --max-concurrency C``, a closed loop over HTTP.

    By Little's law, the mean time of a request is C x ``duration`` / ``completed``. ``mean_ttft_ms`` ends with the
    first token at the client, ``mean_tpot_ms`` is the rest of a request per further token, ``median_itl_ms`` the median
    time between chunks of all streams. The first and further tokens make up the time of a request (``mean_e2el_ms``,
    which ``--percentile-metrics`` omits by default). With ``--save-detailed``, samples exclude ramp-up and ramp-down.
    """
    check_closed_loop(fields)
    many, completed = fields.count("max_concurrency"), fields.count("completed")
    failed = fields.count("failed", 0) if "failed" in fields.data else fields.count("num_prompts") - completed
    check_failed(fields, failed)
    if fields.has("spec_decode_num_drafts"):
        raise InputError(f"{fields.place('spec_decode_num_drafts')}: speculative decoding is unsupported")
    duration = fields.seconds("duration")
    ttft, tpot, step = loop_times(fields)
    samples, note = loop_samples(fields, many, completed, duration, "--save-detailed")
    output = fields.amount("total_output_tokens") / completed
    request = fields.time("mean_e2el_ms") or (ttft + tpot * max(output - 1.0, 0.0) if ttft and tpot else 0.0)
    return BenchRun(
        fields.source,
        "serve",
        tuple(samples.tolist()),
        tool="vllm bench serve",
        model=fields.text("model_id"),
        concurrency=many,
        mean_concurrency=request * completed / duration,
        requests=completed,
        input_tokens=fields.amount("total_input_tokens") / completed,
        output_tokens=output,
        duration_s=duration,
        request_s=request,
        ttft_s=ttft,
        tpot_s=tpot,
        step_s=step,
        engine=_SERVERS.get(fields.text("backend"), ""),
        percentiles_s={
            key.removesuffix("_ms"): fields.time(key)
            for key in fields.data
            if key.endswith("_ms") and not key.startswith("std_")
        },
        note=note,
    )
