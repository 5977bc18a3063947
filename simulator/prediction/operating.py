"""Define a service: its operating points and limits (:class:`Service`, :class:`OperatingPoint`, :class:`Limits`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from simulator.arguments import SECONDS, Range, number
from simulator.display import Displayed
from simulator.errors import InputError
from simulator.prediction.runnable import Runnable
from simulator.prediction.scenario import device_text
from simulator.units import ratio, seconds

EQUAL, MEMORY, LIMITS, CURVE = "equal concurrency", "equal memory", "within limits", "curve"
"""Kinds of operating points: three comparisons of models, and the concurrencies of a curve."""

PRICE = Range(1e-9, 1e9, "a positive price per GPU-hour, such as 2.5")


def probability_of(target: float, speedup: float, lower: float, upper: float, level: float = 0.9) -> float:
    """Return the probability that a speedup is at least a target. On either side of the prediction its log is normal,
    with the standard deviation that follows from that end of the interval.

    >>> [round(probability_of(t, 1.5, 1.2, 1.8), 3) for t in (1.2, 1.5, 1.8, 2.5)]
    [0.95, 0.5, 0.05, 0.0]
    """
    left = math.log(speedup / target)
    deviation = math.log(speedup / lower if left > 0.0 else upper / speedup) / NormalDist().inv_cdf(0.5 + 0.5 * level)
    return NormalDist().cdf(left / deviation) if deviation > 0.0 else float(left >= 0.0)


def check_probability(probability: float) -> None:
    """Raise InputError for a required probability outside (0, 1)."""
    if not 0.0 < probability < 1.0:
        raise InputError(f"confidence {probability:g}: expected a number between 0 and 1, such as 0.9")


@dataclass(frozen=True)
class Limits:
    """Most time to the first token and per output token, s, and the probability with which both must hold.

    >>> Limits(0.5, None, 0.9).text
    '500 ms to the first token'
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    probability: float = 0.5

    def __post_init__(self) -> None:
        check_probability(self.probability)
        for name, limit in self.named.items():
            number(name, limit, SECONDS)

    @property
    def named(self) -> Mapping[str, float]:
        """The limits that are set, by name."""
        both = {"ttft": self.ttft_s, "tpot": self.tpot_s}
        return {name: limit for name, limit in both.items() if limit is not None}

    @property
    def text(self) -> str:
        """The limits in words."""
        words = {"ttft": "to the first token", "tpot": "per output token"}
        return " and ".join(f"{seconds(limit)} {words[name]}" for name, limit in self.named.items())


@dataclass(frozen=True, repr=False, kw_only=True)
class OperatingPoint(Displayed):
    """One model in a service at one number of requests in flight.

    Its fields are the keys of ``--json`` and the columns of ``--csv``. Numbers that do not exist are NaN (in
    ``to_dict`` None): times and rates where no request fits or limits do not hold even for one.

    Parameters
    ----------
    point : str
        "equal concurrency", "equal memory", "within limits", or "curve".
    model, hardware, engine : str
        Names.
    devices : int
        Number of devices that share the model.
    seq, cached_prefix, new_tokens : int
        Tokens of a prompt, those of them in the prefix cache, and tokens that each request decodes.
    pruning, prune, family : str
        The pruning in words and as a text of ``--prune``, and its families joined by "+"; "" for the dense model.
    concurrency : int
        Requests in flight; 0 if none fits or keeps the limits.
    fits : bool
        Whether the memory and the engine hold so many.
    request_s, request_lower, request_upper : float
        Time of a request, s, with the ends of its interval.
    ttft_s, ttft_lower, ttft_upper : float
        Time to the first token, s.
    tpot_s, tpot_lower, tpot_upper : float
        Time per further token, s.
    tokens_per_s, tokens_per_s_lower, tokens_per_s_upper : float
        New tokens/s per device.
    ratio, ratio_lower, ratio_upper : float
        Tokens/s over those of the dense model at its operating point of this kind.
    probability : float
        With which the limits hold; NaN without limits.
    unmet, excess : str, float
        The limit that fails for a single request, "ttft" or "tpot", and the predicted time over the limit.
    cost_output, cost_all, cost_prompt, cost_new : float
        Cost of a million tokens in the currency of the price: of output that pays for the whole request, of prompt and
        output alike, and of prompt and new tokens by their shares of the device time. NaN without a price.
    largest_concurrency : int
        Most requests in flight of this model.
    limited_by : str
        What sets it: "memory", or "engine".
    weights_bytes, cache_bytes : float
        Bytes of the weights, and of the cache of one request, on the fullest device.
    level : float
        Level of the intervals, in (0, 1).
    """

    point: str
    model: str
    hardware: str
    engine: str
    devices: int
    seq: int
    cached_prefix: int
    new_tokens: int
    pruning: str
    prune: str
    family: str
    concurrency: int
    fits: bool
    request_s: float
    request_lower: float
    request_upper: float
    ttft_s: float
    ttft_lower: float
    ttft_upper: float
    tpot_s: float
    tpot_lower: float
    tpot_upper: float
    tokens_per_s: float
    tokens_per_s_lower: float
    tokens_per_s_upper: float
    ratio: float = math.nan
    ratio_lower: float = math.nan
    ratio_upper: float = math.nan
    probability: float
    unmet: str
    excess: float
    cost_output: float = math.nan
    cost_all: float = math.nan
    cost_prompt: float = math.nan
    cost_new: float = math.nan
    largest_concurrency: int
    limited_by: str
    weights_bytes: float
    cache_bytes: float
    level: float

    @property
    def name(self) -> str:
        """The pruning in words, or "dense"."""
        return self.pruning or "dense"

    @property
    def setting(self) -> str:
        """Devices, engine and request as part of a sentence."""
        cached = f", {self.cached_prefix} of them cached," if self.cached_prefix else ""
        return f"{device_text(self)} in {self.engine} (seq {self.seq}{cached} + {self.new_tokens} new)"

    def _title(self) -> str:
        rate = f"{self.tokens_per_s:,.4g} tokens/s per GPU" if self.concurrency else "nothing"
        times = "" if math.isnan(self.ratio) else f", {ratio(self.ratio)}x of dense"
        return f"{self.model} {self.name} on {self.setting}, {self.point}: {rate} at {self.concurrency}{times}"


@dataclass(frozen=True, repr=False)
class Service(Displayed):
    """The operating points of the dense and the pruned models on one device in one engine.

    Parameters
    ----------
    points : tuple of OperatingPoint
        By kind (:attr:`kinds`), each kind by model, the dense one first.
    curve : tuple of OperatingPoint
        Each model at concurrencies from 1 to the largest that fits.
    limits : Limits
        The limits of latency.
    runs : tuple of Runnable
        Whether the stock engine runs each pruned model.
    """

    points: tuple[OperatingPoint, ...]
    curve: tuple[OperatingPoint, ...]
    limits: Limits
    runs: tuple[Runnable, ...]

    @property
    def kinds(self) -> dict[str, list[OperatingPoint]]:
        """Points by kind, the dense model first."""
        out: dict[str, list[OperatingPoint]] = {}
        for point in self.points:
            out.setdefault(point.point, []).append(point)
        return out

    def _title(self) -> str:
        first = self.points[0]
        return f"{first.model} on {first.setting}: {len(self.points)} operating points"
