"""Read results of SGLang's ``bench_serving``.

Writer: ``python/sglang/benchmark/serving.py`` of https://github.com/sgl-project/sglang, commit 00f9ec4 (before:
``python/sglang/bench_serving.py``). It appends one line of JSON per run to ``--output-file``.
"""

from __future__ import annotations

from simulator.errors import InputError
from simulator.prediction.benchmarks.run import (
    BenchRun,
    Fields,
    check_closed_loop,
    check_failed,
    loop_samples,
    loop_times,
)


def bench_serving(fields: Fields) -> BenchRun:
    """Return a result of ``python -m sglang.bench_serving --max-concurrency C``, a closed loop over HTTP.

    By Little's law, the mean time of a request is C x ``duration`` / ``completed``; ``concurrency`` is the mean number
    in flight. ``mean_ttft_ms``, ``mean_tpot_ms`` and ``median_itl_ms`` are as in ``vllm bench serve``, from which the
    script is derived. ``total_input_tokens`` counts prompts of the data set. With ``--output-details``, samples exclude
    ramp-up and ramp-down, and errors of requests are known. ``server_info`` states the model and its GPUs.
    """
    check_closed_loop(fields)
    many, completed, duration = fields.count("max_concurrency"), fields.count("completed"), fields.seconds("duration")
    errors = fields.data.get("errors")
    check_failed(fields, sum(map(bool, errors)) if isinstance(errors, list) else 0, "errors")
    if fields.has("accept_length"):
        raise InputError(f"{fields.place('accept_length')}: speculative decoding is unsupported")
    ttft, tpot, step = loop_times(fields)
    samples, note = loop_samples(fields, many, completed, duration, "--output-details")
    if fields.data.get("dataset_name") == "random" and fields.data.get("random_range_ratio") not in (None, 1, 1.0):
        ratio = f"lengths of requests vary (random_range_ratio {fields.amount('random_range_ratio'):g})"
        note = note or f"{fields.source}: {ratio}; use --random-range-ratio 1"
    backend, server = fields.text("backend"), fields.part("server_info")
    engine = "sglang" if backend.startswith("sglang") else {"vllm": "vllm", "trt": "trtllm"}.get(backend, "")
    return BenchRun(
        fields.source,
        "serve",
        tuple(samples.tolist()),
        tool="SGLang bench_serving",
        model=server.text("model_path"),
        concurrency=many,
        mean_concurrency=fields.amount("concurrency") if fields.has("concurrency") else 0.0,
        requests=completed,
        input_tokens=fields.amount("total_input_tokens") / completed,
        output_tokens=fields.amount("total_output_tokens") / completed,
        duration_s=duration,
        request_s=fields.time("mean_e2e_latency_ms"),
        ttft_s=ttft,
        tpot_s=tpot,
        step_s=step,
        engine=engine,
        devices=server.count("tp_size") if server.has("tp_size") else 0,
        note=note,
    )
