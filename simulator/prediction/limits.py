"""Limits of the times of requests in a service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simulator.arguments import SECONDS, number
from simulator.errors import InputError
from simulator.units import seconds


def check_probability(probability: float) -> None:
    if not 0.0 < probability < 1.0:
        raise InputError(
            f"confidence {probability:g}: expected a number between 0 and 1, such as 0.9"
        )


@dataclass(frozen=True)
class Limits:
    ttft_s: float | None = None
    tpot_s: float | None = None
    probability: float = 0.5

    def __post_init__(self) -> None:
        check_probability(self.probability)
        for name, limit in self.named.items():
            number(name, limit, SECONDS)

    @property
    def named(self) -> Mapping[str, float]:
        both = {"ttft": self.ttft_s, "tpot": self.tpot_s}
        return {name: limit for name, limit in both.items() if limit is not None}

    @property
    def text(self) -> str:
        words = {"ttft": "to the first token", "tpot": "per output token"}
        return " and ".join(f"{seconds(limit)} {words[name]}" for name, limit in self.named.items())


NO_LIMITS = Limits()
