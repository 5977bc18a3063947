"""Hold what one result of a serving benchmark states: :class:`BenchRun`, read by :class:`Fields`.

The readers of each tool are in the modules next to this one; :mod:`simulator.prediction.measured` turns a result into
the time of a pass. Every tool counts the token of the prefill as output: o output tokens are a prefill and o - 1 decode
steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import AMOUNT, MOST, SECONDS, Range, array, number, shown, whole
from simulator.errors import InputError, one_line

ENOUGH_ROUNDS = 10
"""Requests per request in flight from which ramp-up and ramp-down hardly change the mean time of a request."""

_TIMES = Range(1e-12, 1e9, "positive times in seconds, at most 1e9")
_UNITS: Mapping[str, float] = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0}

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BenchRun:
    """One result of a serving benchmark; numbers that the file does not state are 0, texts "".

    Parameters
    ----------
    source : str
        Path of the file, with the line if it has several results.
    kind : {"batch", "serve"}
        A batch of requests that start together, or a closed loop: a request starts when another one finishes.
    samples_s : tuple of float
        Times of a whole batch (batch), or mean times of a request (serve), s.
    tool : str
        Command that wrote the file.
    model : str
        Model as the file names it.
    concurrency : int
        Sequences in the batch, or requests in flight.
    mean_concurrency : float
        Requests in flight on average: mean time of a request x requests per second (Little's law).
    requests : int
        Requests of the whole run.
    input_tokens, output_tokens : float
        Mean prompt and output tokens of a request.
    total_tokens : float
        Mean prompt and output tokens of a request together, if the file does not state them separately.
    duration_s : float
        Time of the whole run.
    request_s, ttft_s, tpot_s : float
        Mean time of a request, to its first token, and per output token after the first.
    step_s : float
        Median time between tokens.
    engine, gpu, dtype, weight_dtype, kv_dtype : str
        Engine, GPU and number formats.
    devices : int
        GPUs that share the model.
    percentiles_s : mapping
        Times by percentile or name, as the file has them, s: "50" (a batch), "p99_ttft", "median_tpot".
    note : str
        Limits of the samples.
    """

    source: str
    kind: str
    samples_s: tuple[float, ...]
    tool: str = ""
    model: str = ""
    concurrency: int = 0
    mean_concurrency: float = 0.0
    requests: int = 0
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    total_tokens: float = 0.0
    duration_s: float = 0.0
    request_s: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    step_s: float = 0.0
    engine: str = ""
    gpu: str = ""
    dtype: str = ""
    weight_dtype: str = ""
    kv_dtype: str = ""
    devices: int = 0
    percentiles_s: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Fields:
    """One JSON object of a file; errors name the file and the key.

    >>> Fields("run.json", {"performance": {"total_latency_ms": 250.0}}).part("performance").time("total_latency_ms")
    0.25
    """

    source: str
    data: Mapping[str, Any]
    path: str = ""

    def place(self, key: str) -> str:
        """Return file and key, as errors begin."""
        return f"{self.source}: {self.path}{key}"

    def has(self, key: str) -> bool:
        """Return whether a key has a value other than null."""
        return self.data.get(key) is not None

    def value(self, key: str) -> Any:
        """Return a value that must be present."""
        if not self.has(key):
            got = "null" if key in self.data else "no such key"
            raise InputError(f"{self.place(key)}: expected a value, got {got}")
        return self.data[key]

    def part(self, key: str) -> Fields:
        """Return an object; an empty one if it is absent."""
        found = self.data.get(key)
        if not isinstance(found, Mapping | None):
            raise InputError(f"{self.place(key)}: expected an object, got {shown(found)}")
        return Fields(self.source, found or {}, f"{self.path}{key}.")

    def rows(self, key: str) -> list[Fields]:
        """Return a list of objects; an empty one if it is absent."""
        found = self.data.get(key, [])
        if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
            raise InputError(f"{self.place(key)}: expected a list of objects, got {shown(found)}")
        return [Fields(self.source, one, f"{self.path}{key}[{i}].") for i, one in enumerate(found)]

    def count(self, key: str, least: int = 1) -> int:
        """Return a whole number; one without a fraction, as 64.0, counts too."""
        given = self.value(key)
        found = whole(int(given)) if isinstance(given, float) and given.is_integer() else whole(given)
        if found is None or not least <= found <= MOST:
            raise InputError(f"{self.place(key)}: expected a whole number from {least} up, got {shown(given)}")
        return found

    def amount(self, key: str, right: Range = AMOUNT) -> float:
        """Return a number from 0 up."""
        return number(self.place(key), self.value(key), right)

    def seconds(self, key: str) -> float:
        """Return a positive time in seconds."""
        return self.amount(key, SECONDS)

    def time(self, key: str) -> float:
        """Return a time in s of a key in ms; 0 if it is absent."""
        return self.amount(key) / 1e3 if self.has(key) else 0.0

    def average(self, key: str) -> float:
        """Return the average of a metric of genai-perf or AIPerf, a time in s; 0 if it is absent."""
        if not self.has(key):
            return 0.0
        metric = self.part(key)
        unit = metric.data.get("unit")
        return metric.amount("avg") * (_UNITS.get(unit, 1.0) if isinstance(unit, str) else 1.0)

    def text(self, key: str) -> str:
        """Return a text; "" if it is absent."""
        found = self.data.get(key) or ""
        if not isinstance(found, str):
            raise InputError(f"{self.place(key)}: expected text, got {shown(found)}")
        return one_line(found, 200)

    def times(self, key: str) -> Floats:
        """Return a list of positive times."""
        found = array(self.place(key), self.value(key), _TIMES)
        if found.ndim != 1 or not len(found):
            raise InputError(f"{self.place(key)}: expected a list of times, got {shown(self.data[key])}")
        return found


def request_times(fields: Fields) -> Floats:
    """Return the time of each request in the order of their starts; none if the file does not have them."""
    if "latencies" in fields.data:
        return fields.times("latencies")
    if "ttfts" not in fields.data or "itls" not in fields.data:
        return np.zeros(0)
    first, gaps = fields.times("ttfts"), fields.data["itls"]
    if not isinstance(gaps, list) or len(gaps) != len(first):
        raise InputError(f"{fields.place('itls')}: expected {len(first)} lists, as ttfts, got {shown(gaps)}")
    later: Floats = np.array([array(fields.place("itls"), gap, AMOUNT).sum() if gap else 0.0 for gap in gaps])
    return first + later


def loop_samples(fields: Fields, many: int, requests: int, duration_s: float, hint: str) -> tuple[Floats, str]:
    """Return mean times of a request in a closed loop, and a note on their limits.

    With the times of all requests, samples are means over ``many`` requests in a row, without the first and last
    ``many`` (ramp-up and ramp-down). Else the only sample is ``many`` x duration / requests. ``hint`` is the option
    that writes the times of all requests.
    """
    times = request_times(fields)
    blocks = len(times) // many - 2
    if blocks >= 1:
        return times[many : many * (blocks + 1)].reshape(-1, many).mean(axis=1), ""
    enough = ENOUGH_ROUNDS * many
    note = f"{fields.source}: one sample, with ramp-up and ramp-down; use {hint} and --num-prompts {enough}"
    return np.array([many * duration_s / requests]), "" if requests >= enough else note


def loop_times(fields: Fields) -> tuple[float, float, float]:
    """Return mean times to the first token and per further token, and the time of a decode step, s, of a result of
    ``vllm bench serve`` or SGLang.

    The median time between chunks of the streams is that of a step only if each chunk has one token: the mean time
    between chunks is then the mean time per token. Else the step is 0.
    """
    tpot, between = fields.time("mean_tpot_ms"), fields.time("mean_itl_ms")
    one_token = tpot > 0.0 and abs(between / tpot - 1.0) <= 0.1
    return fields.time("mean_ttft_ms"), tpot, fields.time("median_itl_ms") if one_token else 0.0


def check_closed_loop(fields: Fields) -> None:
    """Reject a request rate: requests of a closed loop start when others finish."""
    rate = fields.data.get("request_rate")
    if rate not in (None, "inf", float("inf")):
        closed = "expected inf, requests that start when others finish"
        raise InputError(f"{fields.place('request_rate')}: {closed}, got {shown(rate)}")


def check_failed(fields: Fields, failed: int, key: str = "failed") -> None:
    """Reject failed requests: the others were served with fewer in flight."""
    if failed:
        raise InputError(f"{fields.place(key)}: expected 0 requests, got {failed}")
