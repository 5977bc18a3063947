"""Read reports of ``trtllm-bench``.

Writer: ``ReportUtility.get_statistics_dict`` in ``tensorrt_llm/bench/dataclasses/reporting.py`` of
https://github.com/NVIDIA/TensorRT-LLM, commit 0249976; names of number formats are those of ``QuantAlgo`` there.
"""

from __future__ import annotations

from collections.abc import Mapping

from simulator.errors import InputError
from simulator.prediction.benchmarks.run import BenchRun, Fields

_DTYPES: Mapping[str, str] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

_QUANTISED: Mapping[str, tuple[str, str]] = {
    "FP8": ("fp8", "fp8"),
    "FP8_BLOCK_SCALES": ("fp8", "fp8_block"),
    "NVFP4": ("nvfp4", "nvfp4"),
    "W4A16_AWQ": ("", "int4"),
    "W4A16_GPTQ": ("", "int4"),
    "W4A16": ("", "int4"),
    "W8A16": ("", "int8"),
    "W4A16_MXFP4": ("", "mxfp4"),
}
"""Formats of arithmetic ("": that of the activations) and of weights by ``quantization``."""


def report(fields: Fields) -> BenchRun:
    """Return a report of ``trtllm-bench latency`` or ``throughput --report_json FILE``, without HTTP.

    ``request_info.avg_num_concurrent_requests`` is the sum of the times of all requests per time of the run. It is
    close to ``--concurrency C`` for many requests in a closed loop; without ``--concurrency``, all requests start
    together, and it is far above what the engine serves. ``performance.avg_request_latency_ms`` is the mean time of a
    request: by Little's law, that mean concurrency per requests/s. ``streaming_metrics`` (latency, and ``--streaming``)
    have the mean times to the first token and per further token.
    """
    engine, world, requests = fields.part("engine"), fields.part("world_info"), fields.part("request_info")
    performance, streaming = fields.part("performance"), fields.part("streaming_metrics")
    if fields.has("decoding_stats"):
        raise InputError(f"{fields.place('decoding_stats')}: speculative decoding is unsupported")
    performance.value("avg_request_latency_ms")
    quantised, base = engine.text("quantization"), engine.text("dtype").removeprefix("torch.")
    dtype = weight_dtype = _DTYPES.get(base, "")
    note = ""
    if quantised in _QUANTISED:
        dtype, weight_dtype = _QUANTISED[quantised][0] or dtype, _QUANTISED[quantised][1]
    elif quantised:
        dtype = weight_dtype = ""
        note = f"{fields.source}: engine.quantization {quantised} is not checked; check --dtype and --weight-dtype"
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
        devices=world.count("world_size") if world.has("world_size") else 0,
        note=note,
    )
