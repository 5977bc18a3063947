"""Targets of a search: limits on quantities of the pruned model, and whether a plan meets them.

Use :class:`Targets` for what is requested, :meth:`Targets.limits` for the limits of one setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any

import numpy as np

from simulator.arrays import FloatArray
from simulator.errors import InputError
from simulator.plans.prices import PricedRequest
from simulator.prediction.scenario import dense_seconds
from simulator.units import parameters, ratio, seconds, size

MOST_VALUE = 1e18


@dataclass(frozen=True)
class Targets:
    """What a pruned model must reach, in every setting.

    Parameters
    ----------
    speedup : float, optional
        Least speedup over the dense model, above 1.
    latency_s : float, optional
        Longest time of a pass (of a request in serve), s.
    tokens_per_s : float, optional
        Fewest new tokens/s of all sequences; in prefill prompt tokens.
    ttft_s, tpot_s : float, optional
        Longest time to first token, and per further token, s.
    memory_bytes : float, optional
        Most memory on the fullest device, bytes.
    parameters : float, optional
        Most parameters.
    confidence : float
        Least probability of reaching each target on time, in [0.5, 1), from the prediction interval.

    Examples
    --------
    >>> Targets(speedup=1.5, memory_bytes=40 * 2**30).given
    {'speedup': 1.5, 'memory_bytes': 42949672960}
    """

    speedup: float | None = None
    latency_s: float | None = None
    tokens_per_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    memory_bytes: float | None = None
    parameters: float | None = None
    confidence: float = 0.5

    def __post_init__(self) -> None:
        if not self.given:
            raise InputError(
                "target: expected at least one of speedup, latency, tokens/s, TTFT, TPOT, memory, parameters"
            )
        for name, value in self.given.items():
            if not 0.0 < value < MOST_VALUE:
                raise InputError(f"target {NAMES[name]}: expected a positive number, got {value:g}")
        if self.speedup is not None and not 1.0 < self.speedup <= 1000.0:
            raise InputError(f"target speedup: expected a number above 1, such as 1.5, got {self.speedup:g}")
        if not 0.5 <= self.confidence < 1.0:
            raise InputError(f"confidence {self.confidence:g}: expected a probability from 0.5 to below 1, such as 0.9")

    @property
    def given(self) -> dict[str, float]:
        """Targets that are set, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "confidence"}
        return {name: value for name, value in found.items() if value is not None}

    def limits(self, at: PricedRequest, dense: Mapping[str, FloatArray]) -> list[Limit]:
        """Return the limits of a setting ``at``; ``dense`` are quantities whose first model is the dense one."""
        found = []
        for name, value in self.given.items():
            quantity, most = _QUANTITIES[name], value
            if name == "speedup":
                most = float(dense["pruned_s"][0]) / value
            elif name == "tokens_per_s":
                most = dense_seconds(value, at.phase, at.batch, at.seq, at.scenario.new_tokens)
            elif not np.isfinite(dense[quantity][0]):
                raise InputError(f"target {NAMES[name]}: {at.phase} has none; expected another --phase or target")
            found.append(Limit(name, value, at, quantity, most))
        return found


_QUANTITIES: Mapping[str, str] = {
    "speedup": "pruned_s",
    "latency_s": "pruned_s",
    "tokens_per_s": "pruned_s",
    "ttft_s": "ttft_s",
    "tpot_s": "tpot_s",
    "memory_bytes": "pruned_memory_bytes",
    "parameters": "parameters",
}
"""Target -> the quantity that it limits."""

NAMES: Mapping[str, str] = {
    "speedup": "speedup",
    "latency_s": "latency",
    "tokens_per_s": "tokens/s",
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "memory_bytes": "memory",
    "parameters": "parameters",
}
"""Target -> its name in messages."""

_ENDS: Mapping[str, tuple[str, str]] = {
    "pruned_s": ("pruned_lower", "pruned_upper"),
    "ttft_s": ("ttft_lower", "ttft_upper"),
    "tpot_s": ("tpot_lower", "tpot_upper"),
}


@dataclass(frozen=True)
class Limit:
    """A limit on a quantity of the pruned model in a setting."""

    target: str
    value: float  # of the target
    at: PricedRequest
    quantity: str
    most: float  # of the quantity

    def reached(self, found: Mapping[str, FloatArray], confidence: float) -> FloatArray:
        """Return the quantity (W,) of models at the end of their interval that has the requested probability."""
        value = np.asarray(found[self.quantity], dtype=np.float64)
        if confidence <= 0.5 or self.ends is None:
            return value
        sigmas = NormalDist().inv_cdf(confidence) / NormalDist().inv_cdf(0.5 + 0.5 * self.at.scenario.level)
        if self.target == "speedup":  # what dense and pruned models share cancels
            return np.asarray(value * (found["speedup"] / found["speedup_lower"]) ** sigmas)
        return np.asarray(value * (found[self.ends[1]] / value) ** sigmas)

    @property
    def ends(self) -> tuple[str, str] | None:
        """Names of the ends of the quantity's interval; None for one that is known exactly."""
        return _ENDS.get(self.quantity)

    def as_target(self, value: float) -> float:
        """Return the target that a value of the quantity reaches."""
        if self.target in ("speedup", "tokens_per_s"):
            return self.value * self.most / value
        return value

    def text(self, value: float) -> str:
        """Return a value of the target with its unit.

        >>> from simulator.hardware.library import load_hardware
        >>> from simulator.prediction.scenario import Scenario
        >>> limit = Limit("latency_s", 0.012, PricedRequest(Scenario(), load_hardware("h100")), "pruned_s", 0.012)
        >>> limit.text(0.012)
        '12.0 ms'
        """
        return target_text(self.target, value)


def target_text(name: str, value: float) -> str:
    """Return a value of a target with its unit."""
    texts: dict[str, Any] = {
        "speedup": lambda v: f"{ratio(v)}x",
        "tokens_per_s": lambda v: f"{v:,.4g} tokens/s",
        "memory_bytes": size,
        "parameters": parameters,
    }
    return str(texts.get(name, seconds)(value))
