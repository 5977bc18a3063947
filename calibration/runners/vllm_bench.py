"""Read result files of ``vllm bench`` and compare a dense with a pruned model: no vLLM is needed.

Use :func:`read_bench` for a file, :func:`bench_case_of` for the request that it measured, and :func:`bench_record` for
the record of a pair of files, in the format of :mod:`calibration.runners.compare`. Supported files:

- ``vllm bench latency --output-json FILE``: the times of a whole batch. The file states neither batch nor lengths.
- ``vllm bench serve --save-result --max-concurrency C``: a closed loop of C requests in flight. With
  ``--save-detailed``, samples are means over C requests in a row, without the first and last C; else the file has only
  one sample, which includes ramp-up and ramp-down.

By Little's law, the mean time of a request equals C divided by the requests per second, which is the predicted time of
``serve``. ``vllm bench`` counts the token of the prefill as output: ``--output-len`` o has o - 1 decode steps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.measure.timing import OK
from calibration.runners.cases import Case
from simulator.arguments import AMOUNT, SECONDS, Range, array, number, shown, whole
from simulator.errors import InputError, one_line
from simulator.files.read import read_bounded

MAX_FILE_BYTES = 200_000_000
"""Largest result file; detailed results of 10,000 requests have some 50 MB."""

TOLERANCE = 0.02
"""Relative difference by which mean lengths of a file may differ from those of a case."""

_POSITIVE = Range(1e-12, 1e9, "positive times in seconds, at most 1e9")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BenchRun:
    """One result file of ``vllm bench``.

    Parameters
    ----------
    source : str
        Path of the file.
    kind : {"latency", "serve"}
        Command that wrote the file.
    samples_s : tuple of float
        Raw samples: times of a whole batch (latency) or of one request in the steady state (serve), s.
    model : str
        Model as the file names it, "" if it does not.
    concurrency : int
        Requests in flight, 0 if the file does not state it.
    input_tokens, output_tokens : float
        Mean prompt and new tokens of a request, 0 if the file does not state them.
    percentiles_s : mapping
        Times by percentile or name, as the file has them, s: "50" (latency), "p99_ttft", "median_tpot" (serve).
    note : str
        What limits the samples, else "".
    """

    source: str
    kind: str
    samples_s: tuple[float, ...]
    model: str = ""
    concurrency: int = 0
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    percentiles_s: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def read_bench(path: str | os.PathLike[str]) -> BenchRun:
    """Read a result file of ``vllm bench latency`` or ``vllm bench serve``.

    Parameters
    ----------
    path : str or path-like
        File.

    Returns
    -------
    BenchRun
        Its samples, and what it states about requests.

    Raises
    ------
    InputError
        If the file is not such a result, or not of a closed loop; the message names file and key.
    """
    source = os.fspath(path)
    try:
        text = read_bounded(source, MAX_FILE_BYTES).decode("utf-8-sig")
        data = json.loads(text)
    except UnicodeDecodeError:
        raise InputError(f"{source}: is not UTF-8 text; expected a JSON file of vllm bench") from None
    except RecursionError:
        raise InputError(f"{source}: is not JSON (too many levels); expected a file of vllm bench") from None
    except json.JSONDecodeError as error:
        why = error.msg
        if why == "Extra data":
            why = "several results, as of --append-result; expected one"
        raise InputError(f"{source}:{error.lineno}:{error.colno}: is not JSON ({why})") from None
    if not isinstance(data, dict):
        raise InputError(f"{source}: expected a JSON object of vllm bench, got {shown(data)}")
    if "avg_latency" in data:
        return _latency(source, data)
    if "request_throughput" in data:
        return _serve(source, data)
    expected = "avg_latency (vllm bench latency) or request_throughput (vllm bench serve)"
    raise InputError(f"{source}: expected the key {expected}, got {', '.join(sorted(data)[:8]) or 'no key'}")


def _latency(source: str, data: Mapping[str, Any]) -> BenchRun:
    percentiles = data.get("percentiles", {})
    if not isinstance(percentiles, Mapping):
        raise InputError(f"{source}: percentiles: expected an object, got {shown(percentiles)}")
    return BenchRun(
        source,
        "latency",
        tuple(_times(source, "latencies", _value(source, data, "latencies")).tolist()),
        model=_name(source, data, "model_id"),
        percentiles_s={p: number(f"{source}: percentiles.{p}", s, AMOUNT) for p, s in percentiles.items()},
    )


def _serve(source: str, data: Mapping[str, Any]) -> BenchRun:
    if data.get("request_rate", "inf") != "inf":
        closed = "expected inf, requests that start when others finish"
        raise InputError(f"{source}: request_rate: {closed}, got {shown(data['request_rate'])}")
    many, completed = (_count(source, data, key) for key in ("max_concurrency", "completed"))
    failed = _count(source, data, "failed", 0) if "failed" in data else _count(source, data, "num_prompts") - completed
    if failed:
        raise InputError(f"{source}: failed: expected 0 requests, got {failed}")
    duration = number(f"{source}: duration", _value(source, data, "duration"), SECONDS)
    tokens = {
        key: number(f"{source}: {key}", _value(source, data, key), AMOUNT) / completed
        for key in ("total_input_tokens", "total_output_tokens")
    }
    requests = _request_times(source, data)
    whole_blocks = len(requests) // many - 2  # the first and last ones ramp up and down
    if whole_blocks >= 1:
        samples, note = requests[many : many * (whole_blocks + 1)].reshape(-1, many).mean(axis=1), ""
    else:
        samples = np.array([many * duration / completed])
        note = f"{source}: one sample, with ramp-up and ramp-down; use --save-detailed and --num-prompts {10 * many}"
    times = {
        key.removesuffix("_ms"): number(f"{source}: {key}", value, AMOUNT) / 1e3
        for key, value in data.items()
        if key.endswith("_ms") and not key.startswith("std_")
    }
    return BenchRun(
        source,
        "serve",
        tuple(samples.tolist()),
        model=_name(source, data, "model_id"),
        concurrency=many,
        input_tokens=tokens["total_input_tokens"],
        output_tokens=tokens["total_output_tokens"],
        percentiles_s=times,
        note=note,
    )


def _request_times(source: str, data: Mapping[str, Any]) -> Floats:
    """Return the time of each request, in the order of their starts; none if the file does not have them."""
    if "latencies" in data:
        return _times(source, "latencies", data["latencies"])
    if "ttfts" not in data or "itls" not in data:
        return np.zeros(0)
    first, gaps = _times(source, "ttfts", data["ttfts"]), data["itls"]
    if not isinstance(gaps, list) or len(gaps) != len(first):
        raise InputError(f"{source}: itls: expected {len(first)} lists, as ttfts, got {shown(gaps)}")
    later: Floats = np.array([array(f"{source}: itls", gap, AMOUNT).sum() if gap else 0.0 for gap in gaps])
    return first + later


def bench_case_of(
    run: BenchRun, *, batch: int | None = None, seq: int | None = None, output: int | None = None
) -> tuple[str, int, int, int]:
    """Return phase, batch, seq and decode steps that a file measured.

    ``batch`` (requests in flight of serve), ``seq`` (prompt tokens) and ``output`` (new tokens, ``--output-len``) are
    what the user states: all three for a file of ``latency``; a file of ``serve`` states them itself.

    >>> bench_case_of(BenchRun("run.json", "latency", (0.5,)), batch=8, seq=1024, output=1)
    ('prefill', 8, 1024, 0)
    >>> bench_case_of(BenchRun("run.json", "serve", (0.5,), concurrency=8, input_tokens=512.0, output_tokens=65.0))
    ('serve', 8, 512, 64)
    """
    stated = {"batch": batch, "seq": seq, "output": output}
    found = {"batch": run.concurrency, "seq": round(run.input_tokens), "output": round(run.output_tokens)}
    out = []
    for name, value in stated.items():
        own = found[name]
        if value is None and not own:
            raise InputError(f"{run.source}: {name}: expected to be stated, as the file does not have it")
        if value is not None and own and value != own:
            raise InputError(f"{run.source}: {name}: expected {own}, as in the file, got {value}")
        out.append(own or int(value or 0))
    phase = "serve" if run.kind == "serve" else "generate" if out[2] > 1 else "prefill"
    if phase == "serve" and out[2] < 2:
        raise InputError(f"{run.source}: total_output_tokens: expected at least 2 per request, got {out[2]}")
    return phase, out[0], out[1], out[2] - 1


def bench_record(case: Case, dense: BenchRun, pruned: BenchRun) -> dict[str, Any]:
    """Return the record of a case from the files of its dense and its pruned model.

    Samples of two files are not pairs in time: slow changes of the machine between the runs affect the ratio. The
    longer series loses its last samples. InputError: the files differ in what they measured, or from the case.
    """
    for what in ("kind", "concurrency"):
        a, b = getattr(dense, what), getattr(pruned, what)
        if a != b:
            raise InputError(f"{pruned.source}: {what}: expected {a}, as in {dense.source}, got {b}")
    kinds = ("serve",) if dense.kind == "serve" else ("prefill", "generate")
    if case.phase not in kinds:
        raise InputError(f"{dense.source}: phase: expected {' or '.join(kinds)} for {dense.kind}, got {case.phase}")
    for run in (dense, pruned):
        expected = {"concurrency": case.batch, "input_tokens": case.seq}
        expected["output_tokens"] = case.dense.meta.new_tokens + 1
        for what, value in expected.items():
            own = getattr(run, what)
            if own and abs(own / value - 1.0) > TOLERANCE:
                raise InputError(f"{run.source}: {what}: expected {value}, as in the case, got {own:g}")
    count = min(len(dense.samples_s), len(pruned.samples_s))
    return {
        "status": OK,
        "reason": "; ".join(dict.fromkeys(run.note for run in (dense, pruned) if run.note)),
        "runtime": f"vllm bench {dense.kind}",
        "loops": 1,
        "dense_s": list(dense.samples_s[:count]),
        "pruned_s": list(pruned.samples_s[:count]),
        "settings": {"dense": _described(dense), "pruned": _described(pruned)},
    }


def _described(run: BenchRun) -> dict[str, Any]:
    return {"file": os.path.basename(run.source), "model": run.model, "percentiles_s": dict(run.percentiles_s)}


def _value(source: str, data: Mapping[str, Any], key: str) -> Any:
    if data.get(key) is None:
        raise InputError(f"{source}: {key}: expected a value, got {'null' if key in data else 'no such key'}")
    return data[key]


def _count(source: str, data: Mapping[str, Any], key: str, least: int = 1) -> int:
    found = whole(_value(source, data, key))
    if found is None or found < least:
        raise InputError(f"{source}: {key}: expected a whole number from {least} up, got {shown(data[key])}")
    return found


def _times(source: str, key: str, value: Any) -> Floats:
    found = array(f"{source}: {key}", value, _POSITIVE)
    if found.ndim != 1 or not len(found):
        raise InputError(f"{source}: {key}: expected a list of times, got {shown(value)}")
    return found


def _name(source: str, data: Mapping[str, Any], key: str) -> str:
    found = data.get(key) or ""
    if not isinstance(found, str):
        raise InputError(f"{source}: {key}: expected text, got {shown(found)}")
    return one_line(found, 200)
