"""Requests of a server: when they arrive, and how many tokens they have."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from simulator.arguments import Range, number, wrong
from simulator.arrays import FloatArray, IndexArray
from simulator.errors import InputError, unknown
from simulator.files.csv import MOST_BYTES, read_csv
from simulator.files.read import read_bounded
from simulator.request import MAX_TOKENS
from simulator.units import parse_number

MOST_REQUESTS = 1_000_000
"""Most requests of a run: they take about 500 MB and 20 s."""

_TOKENS = Range(1.0, float(MAX_TOKENS), f"a whole number of tokens from 1 to {MAX_TOKENS}", True)
_MEAN = Range(1.0, float(MAX_TOKENS), "a mean number of tokens from 1 up")
_LOG_SD = Range(0.0, 3.0, "a standard deviation of logs from 0 to 3")
_COUNT = Range(1.0, float(MOST_REQUESTS), f"a whole number from 1 to {MOST_REQUESTS:,}", True)
_RATE = Range(1e-6, 1e6, "a positive number of requests per second")
_SEED = Range(0.0, 2.0**32, "a whole number from 0 up", True)
_COLUMNS = {
    "arrival": Range(0.0, 1e9, "a time in seconds from 0 up"),
    "prompt": _TOKENS,
    "output": _TOKENS,
}
"""Columns of a trace."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts or outputs: fixed (``log_sd`` 0), or log-normal, truncated to ``least`` and
    ``most`` tokens, with a mean after truncation."""

    mean: float
    log_sd: float = 0.0
    least: int = 1
    most: int = MAX_TOKENS

    def __post_init__(self) -> None:
        number("mean length", self.mean, _MEAN)
        number("deviation of lengths", self.log_sd, _LOG_SD)
        if not self.least <= self.mean <= self.most:
            raise InputError(
                f"mean length: expected {self.least:,} to {self.most:,} tokens, got {self.mean:g}"
            )

    def at(self, share: FloatArray) -> IndexArray:
        """Return the lengths below which shares of all lengths lie."""
        if not self.log_sd or self.least == self.most:
            return np.full(len(share), round(self.mean))
        ends = np.log([self.least - 0.5, self.most + 0.5])
        low, high = (ends - self._centre) / self.log_sd
        below, inside = ndtr(low), ndtr(high) - ndtr(low)
        logs = self._centre + self.log_sd * ndtri(below + share * inside)
        return np.asarray(np.clip(np.rint(np.exp(logs)), self.least, self.most).astype(np.intp))

    @cached_property
    def _centre(self) -> float:
        """Log of the median before truncation at which the truncated mean is right."""
        ends = np.log([self.least - 0.5, self.most + 0.5])

        def excess(centre: float) -> float:
            low, high = (ends - centre) / self.log_sd
            inside = ndtr(high) - ndtr(low)
            above = ndtr(high - self.log_sd) - ndtr(low - self.log_sd)
            mean = np.exp(centre + self.log_sd**2 / 2) * above / max(inside, 1e-300)
            return float(mean) - self.mean

        low, high = ends[0] - 5.0 * self.log_sd, ends[1] + 5.0 * self.log_sd
        if excess(low) > 0.0 or excess(high) < 0.0:
            raise InputError(
                f"mean length: expected {self.mean + excess(low):.0f} to"
                f" {self.mean + excess(high):.0f} with this deviation, got {self.mean:g}"
            )
        return float(brentq(excess, low, high))


@dataclass(frozen=True)
class Requests:
    """Requests in the order of their arrival."""

    arrival: FloatArray  # s; ignored with a concurrency
    prompt: IndexArray  # tokens
    output: IndexArray  # tokens
    prefix: int = 0  # first tokens that all prompts share
    concurrency: int | None = None  # a client sends its next request when the last one ends

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def rate(self) -> float:
        """Mean number of arrivals per second; infinite if all arrive at once."""
        last = float(self.arrival[-1])
        return len(self) / last if last > 0.0 else math.inf

    def at_rate(self, rate: float) -> Requests:
        """Return the requests as they arrive at another rate: in proportion, or as drawn times if
        they arrive at once."""
        arrival = self.arrival if self.arrival[-1] > 0.0 else drawn_times(len(self))
        times = arrival * (len(self) / float(arrival[-1]) / rate)
        return replace(self, arrival=times, concurrency=None)

    @property
    def at_once(self) -> Requests:
        return replace(self, arrival=np.zeros(len(self)), concurrency=None)

    def of_replica(self, index: int, replicas: int) -> Requests:
        """Return the requests that a router gives to one of equal replicas in turn."""
        some = slice(index, None, replicas)
        clients = self.concurrency
        return replace(
            self,
            arrival=self.arrival[some],
            prompt=self.prompt[some],
            output=self.output[some],
            concurrency=None if clients is None else max(len(range(index, clients, replicas)), 1),
        )


def drawn_times(requests: int, seed: int = 0) -> FloatArray:
    """Return times of a Poisson process of one request per second."""
    waits = np.random.default_rng([seed, 0]).exponential(size=requests)
    return np.cumsum(waits)


@dataclass(frozen=True)
class Traffic:
    """Requests to draw: they arrive at a ``rate`` per second (Poisson), or a client sends its next
    one when the last one ends (``concurrency``), or all arrive at once."""

    prompt: Lengths
    output: Lengths
    requests: int = 1000
    rate: float | None = None
    concurrency: int | None = None
    prefix: int = 0
    # most tokens of prompt and output together; longer requests are drawn again
    most_total: int = MAX_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("requests", _COUNT), ("seed", _SEED), ("concurrency", _COUNT)):
            value = getattr(self, name)
            if name != "concurrency" or value is not None:
                object.__setattr__(self, name, int(number(name, value, kind)))  # 20.0 becomes 20
        if self.rate is not None:
            number("rate", self.rate, _RATE)
        if self.rate is not None and self.concurrency is not None:
            raise InputError("rate and concurrency: expected one of them")
        if self.prompt.mean + self.output.mean > self.most_total:
            raise InputError(
                f"most tokens of a request: expected at least the mean of"
                f" {self.prompt.mean + self.output.mean:g}, got {self.most_total}"
            )

    def draw(self) -> Requests:
        """Return the requests. Another rate scales the same times between arrivals."""
        lengths = np.random.default_rng([self.seed, 1])
        times = drawn_times(self.requests, self.seed)
        arrival = times / self.rate if self.rate else 0.0 * times
        share = lengths.random((2, self.requests))
        while True:
            prompt, output = self.prompt.at(share[0]), self.output.at(share[1])
            long = np.flatnonzero(prompt + output > self.most_total)
            if not len(long):
                return Requests(arrival, prompt, output, self.prefix, self.concurrency)
            share[:, long] = lengths.random((2, len(long)))


def read_trace(path: str | Path, most_tokens: int = MAX_TOKENS, prefix: int = 0) -> Requests:
    """Return the requests of a CSV file with the columns ``arrival`` (s), ``prompt`` and ``output``
    (tokens), by rising arrival. InputError names the first bad row; ``most_tokens`` is the length
    of the model."""
    table = read_csv(read_bounded(path, MOST_BYTES), str(path), tuple(_COLUMNS))
    if unknown_columns := [name for name in table.header if name not in _COLUMNS]:
        raise unknown(f"{path}: column", unknown_columns[0], _COLUMNS)
    if len(table.rows) > MOST_REQUESTS:
        raise InputError(
            f"{path}:{table.lines[MOST_REQUESTS]}: expected at most {MOST_REQUESTS:,} requests;"
            " split the file"
        )
    last = 0.0

    def row(cells: dict[str, str]) -> list[float]:
        nonlocal last
        arrival, prompt, output = (_cell(name, cells[name]) for name in _COLUMNS)
        if arrival < last:
            raise InputError(
                f"arrival: expected at least {last:g} s, the time of the row before, got"
                f" {arrival:g}"
            )
        if prompt + output > most_tokens:
            raise InputError(
                f"prompt and output: expected at most the model's {most_tokens:,} tokens, got"
                f" {prompt + output:,.0f}"
            )
        last = arrival
        return [arrival, prompt, output]

    arrival, prompt, output = np.array(table.each(row)).T
    return Requests(arrival - arrival[0], prompt.astype(np.intp), output.astype(np.intp), prefix)


def _cell(name: str, text: str) -> float:
    try:
        value = parse_number(text)
    except InputError:
        raise wrong(name, _COLUMNS[name], text) from None
    return number(name, value, _COLUMNS[name])
