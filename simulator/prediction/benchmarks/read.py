"""Read result files of serving benchmarks: :func:`read_bench` for one result, :func:`read_benches` for several."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from simulator.arguments import shown
from simulator.errors import InputError
from simulator.files.json import parse_json
from simulator.files.read import read_bounded
from simulator.prediction.benchmarks.genai_perf import profile_export
from simulator.prediction.benchmarks.run import BenchRun, Fields
from simulator.prediction.benchmarks.sglang import bench_serving
from simulator.prediction.benchmarks.trtllm import report
from simulator.prediction.benchmarks.vllm import latency, serve, throughput

MAX_FILE_BYTES = 200_000_000
"""Largest result file; detailed results of 10,000 requests have some 50 MB."""

TOOLS = "vllm bench latency, throughput or serve, SGLang bench_serving, trtllm-bench, genai-perf or AIPerf"


def read_bench(path: str | os.PathLike[str]) -> BenchRun:
    """Read a file with one result of a serving benchmark.

    Parameters
    ----------
    path : str or path-like
        JSON file of ``vllm bench latency``, ``throughput`` or ``serve``, ``trtllm-bench``, genai-perf or AIPerf, or
        JSON lines of SGLang's ``bench_serving``.

    Returns
    -------
    BenchRun
        Its samples, and what it states about requests.

    Raises
    ------
    InputError
        If the file is not such a result, has several, or is not of a closed loop; the message names file and key.
    """
    found = read_benches(path)
    if len(found) > 1:
        why = "is not JSON (several results, as of --append-result; expected one)"
        raise InputError(f"{found[1].source}:1: {why}")
    return found[0]


def read_benches(path: str | os.PathLike[str]) -> list[BenchRun]:
    """Read all results in a file: one, or one per line (SGLang, ``--append-result`` of vLLM). Raises as
    :func:`read_bench`; the source of each of several results has its line."""
    source = os.fspath(path)
    try:
        text = read_bounded(source, MAX_FILE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{source}: is not UTF-8 text; expected a JSON file of {TOOLS}") from None
    try:
        objects = {source: _parsed(source, text)}
    except json.JSONDecodeError as error:
        lines = {f"{source}:{at}": line for at, line in enumerate(text.splitlines(), start=1) if line.strip()}
        if error.msg != "Extra data" or len(lines) < 2:
            raise InputError(f"{source}:{error.lineno}:{error.colno}: is not JSON ({error.msg})") from None
        objects = {}
        for place, line in lines.items():
            try:
                objects[place] = _parsed(place, line)
            except json.JSONDecodeError as wrong:
                raise InputError(f"{place}:{wrong.colno}: is not JSON ({wrong.msg})") from None
    return [_read(place, data) for place, data in objects.items()]


def _parsed(place: str, text: str) -> Any:
    try:
        return parse_json(text, place)
    except RecursionError:
        raise InputError(f"{place}: is not JSON (too many levels); expected a file of {TOOLS}") from None


def _read(source: str, data: Any) -> BenchRun:
    if not isinstance(data, dict):
        raise InputError(f"{source}: expected a JSON object of {TOOLS}, got {shown(data)}")
    reader = _reader(data)
    if reader is None:
        raise InputError(f"{source}: expected a result of {TOOLS}, got {', '.join(sorted(data)[:8]) or 'no key'}")
    return reader(Fields(source, data))


def _reader(data: Mapping[str, Any]) -> Callable[[Fields], BenchRun] | None:
    """Return the reader of a result, found by keys that only its tool writes."""
    if "avg_latency" in data:
        return latency
    if "elapsed_time" in data and "num_requests" in data:
        return throughput
    if "performance" in data and "request_info" in data:
        return report
    if "input_config" in data:
        return profile_export
    if "median_e2e_latency_ms" in data:
        return bench_serving
    return serve if "request_throughput" in data else None
