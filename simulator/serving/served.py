"""Times of requests that a server has run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from simulator.arrays import BoolArray, FloatArray
from simulator.serving.arrivals import Requests

QUANTILES = (0.5, 0.9, 0.99)
_GROWTH = 0.01
"""Share of the requests by which a queue that drains may grow in the second half of arrivals."""


@dataclass
class Steps:
    """Steps of a replica in order; equal decode steps that follow each other are one entry."""

    start: list[float] = field(default_factory=list)  # s
    seconds: list[float] = field(default_factory=list)  # time of one step
    count: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)  # sequences that decode
    tokens: list[int] = field(default_factory=list)  # tokens of prompts
    # mean positions of decoding sequences, and to which prompt tokens attend; prompts that end
    about: list[tuple[float, float, int]] = field(default_factory=list)

    def add(
        self,
        start: float,
        seconds: float,
        count: int,
        sequences: int,
        tokens: int,
        about: tuple[float, float, int],
    ) -> None:
        self.start.append(start)
        self.seconds.append(seconds)
        self.count.append(count)
        self.sequences.append(sequences)
        self.tokens.append(tokens)
        self.about.append(about)


@dataclass(frozen=True)
class Served:
    """Requests with the times of their arrival, start, first token and end, s."""

    requests: Requests
    arrival: FloatArray
    start: FloatArray
    first: FloatArray
    end: FloatArray
    preemptions: int
    steps: tuple[Steps, ...]  # steps of each replica

    @classmethod
    def joined(cls, parts: Sequence[Served]) -> Served:
        """Return the requests of several replicas as those of one server."""
        if len(parts) == 1:
            return parts[0]
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("arrival", "start", "first", "end")
        }
        prompt, output = (
            np.concatenate([getattr(part.requests, name) for part in parts])
            for name in ("prompt", "output")
        )
        clients = [part.requests.concurrency or 0 for part in parts]
        return cls(
            requests=replace(
                parts[0].requests,
                arrival=columns["arrival"],
                prompt=prompt,
                output=output,
                concurrency=sum(clients) or None,
            ),
            preemptions=sum(part.preemptions for part in parts),
            steps=tuple(steps for part in parts for steps in part.steps),
            **columns,
        )

    @cached_property
    def ttft(self) -> FloatArray:
        """Time to the first token of each request, s."""
        return self.first - self.arrival

    @cached_property
    def tpot(self) -> FloatArray:
        """Time per further token of each request, s; NaN for a single token."""
        further = self.requests.output - 1
        return np.where(further > 0, (self.end - self.first) / np.maximum(further, 1), np.nan)

    @cached_property
    def latency(self) -> FloatArray:
        """Time of each request, s."""
        return self.end - self.arrival

    @property
    def duration(self) -> float:
        """Time from the first arrival to the last token, s."""
        return float(self.end.max() - self.arrival.min())

    @property
    def requests_per_s(self) -> float:
        return len(self.end) / self.duration

    @property
    def tokens_per_s(self) -> float:
        """Output tokens/s of the whole run, its end included."""
        return float(self.requests.output.sum()) / self.duration

    def within(self, ttft_s: float | None, tpot_s: float | None) -> BoolArray:
        """Return which requests keep limits; a single token has no time per further token."""
        kept = np.ones(len(self.end), dtype=bool)
        if ttft_s is not None:
            kept &= self.ttft <= ttft_s
        if tpot_s is not None:
            kept &= ~(self.tpot > tpot_s)
        return kept

    @property
    def drains(self) -> bool:
        """Whether the queue stops growing: in the second half of the arrivals it does not grow by
        more than chance explains."""
        size = len(self.end)
        waiting = [
            int((self.arrival <= time).sum() - (self.start <= time).sum())
            for time in np.quantile(self.arrival, [0.5, 1.0])
        ]
        return waiting[1] - waiting[0] <= _GROWTH * size + 1.5 * math.sqrt(size)


def weighted_quantile(values: FloatArray, weights: FloatArray, share: float) -> float:
    """Return the value below which a share of the weights lies."""
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, share * total[-1])])
