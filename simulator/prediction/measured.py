"""Turn the result file of a serving benchmark into the measured time of the dense model: :func:`measured`.

What a file must match, and which of its numbers is the time of a phase (:func:`pass_seconds`):

- **prefill**: the time of a batch with one output token (``vllm bench latency``, ``throughput``), or the mean time to
  the first token with one request in flight. With more, the time to the first token depends on how requests arrive.
- **decode**: the mean time per further token with one request in flight. With more, it includes the prompts of other
  requests; the median time between tokens does not while fewer than half of the steps have a prompt. ``seq`` is the
  mean number of cached positions, the prompt and half of the output.
- **generate**: the time of a batch; with one request in flight, the mean time of a request; where all requests of a
  run start together, the time of the run.
- **serve**: the mean time of a request in a closed loop: requests in flight per requests/s (Little's law).

``new_tokens`` decode steps are measured with ``new_tokens`` + 1 output tokens. Times over HTTP (``serve``, SGLang,
genai-perf, AIPerf) include the network, tokenisation and the client.
"""

from __future__ import annotations

import os
import re
from statistics import fmean, median
from typing import NamedTuple

from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.models.config import ModelConfig
from simulator.models.library import load_model, shipped_model
from simulator.prediction.benchmarks import BenchRun, read_benches
from simulator.request import Request

TOLERANCE = 0.02  # relative difference by which mean lengths of a file may differ from those requested
SLACK_TOKENS = 2.0  # prompt tokens by which a mean length may always differ: tokens that a tokeniser adds
IN_FLIGHT = (0.7, 1.05)
"""Share of the requests in flight that may be in flight on average: fewer are during ramp-up and ramp-down."""

_QUANTISED = re.compile(r"fp8|int8|int4|nvfp4|mxfp4|awq|gptq|w\d+a\d+", re.IGNORECASE)


class MeasuredDense(NamedTuple):
    """Measured time of the dense model, s, the result it is from, and what could not be checked."""

    seconds: float
    run: BenchRun
    notes: tuple[str, ...]


def measured(path: str | os.PathLike[str], request: Request) -> MeasuredDense:
    """Return the measured time of the dense model from the result file of a serving benchmark.

    Of several results in a file, the last one that matches the request is taken."""
    runs, wrong = read_benches(path), []
    for run in reversed(runs):
        try:
            return measured_of(run, request)
        except InputError as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    raise InputError(f"{os.fspath(path)}: expected a result of this request among {len(runs)}; {wrong[0]}")


def measured_of(run: BenchRun, request: Request) -> MeasuredDense:
    """Return the time of a pass that one result measured, after comparing its conditions with those of a request."""
    model = load_model(request.model)
    notes = [*_model_notes(run, model, request), *([run.note] if run.note else [])]
    if run.devices and run.devices != request.devices:
        raise InputError(f"{run.source}: devices: expected {request.devices}, got {run.devices}")
    weights = request.weight_dtype or model.weight_dtype or request.dtype
    for what, own, expected in (("dtype", run.dtype, request.dtype), ("weight dtype", run.weight_dtype, weights)):
        if own and own != expected:
            raise InputError(f"{run.source}: {what}: expected {expected}, got {own}")
    seconds = pass_seconds(run, request)
    if run.kind == "batch" and not run.concurrency:
        check = f"--batch-size {request.batch} --input-len {request.seq} --output-len {_output(request)}"
        notes.append(f"{run.source}: {run.tool} states neither batch nor lengths; check that it ran with {check}")
    return MeasuredDense(seconds, run, tuple(notes))


def pass_seconds(run: BenchRun, request: Request) -> float:
    """Return the time of the pass of a request that a result measured, s.

    The batch is the requests in flight in ``serve``. InputError: the result does not measure this phase, or at another
    batch or other lengths; what the file does not state is not checked."""
    phase, batch = request.phase, request.batch
    if run.kind == "batch":
        return _batch_seconds(run, request)
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
        raise InputError(f"{run.source}: concurrency: expected 1 for phase {phase}, got {batch}; use phase serve")
    if phase == "prefill":
        return _stated(run, "time to first token", run.ttft_s)
    return _stated(run, "time per output token", run.tpot_s)


def request_of(
    run: BenchRun, *, batch: int | None = None, seq: int | None = None, output: int | None = None
) -> tuple[str, int, int, int]:
    """Return phase, batch, seq and decode steps that a result measured.

    ``batch`` (requests in flight of serve), ``seq`` (prompt tokens) and ``output`` (output tokens) are what the user
    states: all three for ``vllm bench latency``, one length for ``throughput``, none where the file has them."""
    in_flight = run.concurrency or (0 if batch else round(run.mean_concurrency))
    stated = {"batch": batch, "seq": seq, "output": output}
    found = {"batch": in_flight, "seq": round(run.input_tokens), "output": round(run.output_tokens)}
    if run.total_tokens and (seq or output):
        rest = round(run.total_tokens) - (seq or output or 0)
        if rest < 1:
            more = f"expected more than {seq or output}"
            raise InputError(f"{run.source}: tokens per request: {more}, got {run.total_tokens:g}")
        found["output" if seq else "seq"] = rest
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


def _output(request: Request) -> int:
    """Return the output tokens of a request: that of the prefill and one per decode step."""
    return 1 if request.phase == "prefill" else request.new_tokens + 1


def _batch_seconds(run: BenchRun, request: Request) -> float:
    """Return the median time of a batch, which is a prefill if it has one output token."""
    if request.phase not in ("prefill", "generate"):
        raise InputError(f"{run.source}: phase: expected generate or prefill for {run.tool}, got {request.phase}")
    if run.concurrency and run.concurrency != request.batch:
        raise InputError(f"{run.source}: requests: expected {request.batch}, the batch, got {run.concurrency}")
    _check_lengths(run, request)
    return median(run.samples_s)


def _check_lengths(run: BenchRun, request: Request) -> None:
    seq, output = request.seq, _output(request)
    if run.total_tokens:
        _check_length(run, "tokens per request", run.total_tokens, seq + output, max(TOLERANCE * (output - 1), 0.5))
    around = max(TOLERANCE * seq, SLACK_TOKENS)
    if request.phase == "decode":
        middle = run.input_tokens + max(run.output_tokens - 2.0, 0.0) / 2.0
        _check_length(run, "cached positions (prompt and half of the output)", middle, seq, around)
        return
    if run.input_tokens:
        _check_length(run, "input_tokens", run.input_tokens, seq, around)
    of_one = (
        request.phase == "prefill" and run.kind == "serve"
    )  # the time to the first token depends on the prompt only
    if run.output_tokens and not of_one:
        _check_length(run, "output_tokens", run.output_tokens, output, max(TOLERANCE * output, 0.5))


def _check_length(run: BenchRun, what: str, own: float, expected: int, around: float) -> None:
    if abs(own - expected) > around:
        raise InputError(f"{run.source}: {what}: expected {expected}, got {own:g}")


def _check_in_flight(run: BenchRun, batch: int) -> None:
    if run.concurrency and run.concurrency != batch:
        hint = f"use --phase serve --concurrency {run.concurrency}"
        raise InputError(f"{run.source}: concurrency: expected {batch}, got {run.concurrency}; {hint}")
    mean = run.mean_concurrency
    if not (run.concurrency or mean):
        raise InputError(f"{run.source}: concurrency: expected to be stated in the file")
    low, high = (share * batch for share in IN_FLIGHT)
    if mean and not low <= mean <= high:
        raise InputError(f"{run.source}: requests in flight on average: expected {low:g} to {high:g}, got {mean:.3g}")


def _stated(run: BenchRun, what: str, seconds: float) -> float:
    if not seconds:
        raise InputError(f"{run.source}: {what}: expected in a file of {run.tool}, got none; run it with streaming")
    return seconds


def _model_notes(run: BenchRun, model: ModelConfig, request: Request) -> list[str]:
    """Return notes on what of model and engine cannot be checked; reject another model."""
    notes, engine = [], load_engine(request.engine).name.partition("@")[0]
    if run.engine and run.engine != engine:
        notes.append(f"{run.source}: {run.tool} ran {run.engine}, the prediction is for {engine}; check --engine")
    if not run.model:
        return notes
    known = shipped_model(run.model)
    if known is None:
        notes.append(f"{run.source}: model {run.model} is not known by name; check that it is {model.name}")
    elif _shapes(known) != _shapes(model):
        raise InputError(f"{run.source}: model: expected {model.name}, got {run.model}")
    plain = request.dtype in ("bf16", "fp16") and not (request.weight_dtype or model.weight_dtype or run.weight_dtype)
    if plain and _QUANTISED.search(run.model):
        formats = f"the prediction is for {request.dtype}; check --dtype and --weight-dtype"
        notes.append(f"{run.source}: model {run.model} is quantised by its name, {formats}")
    return notes


def _shapes(model: ModelConfig) -> tuple[object, ...]:
    return model.hidden, model.layers, model.heads, model.kv_heads, model.inner, model.vocab, model.experts
