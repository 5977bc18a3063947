"""Texts of predictions that the sentences of several commands share."""

from __future__ import annotations

from typing import Any, Protocol

from simulator.prediction.result import Result
from simulator.units import percent, ratio

NAMED = 4  # most settings or models that a sentence names; for more it states their number
MOST_SENTENCES = 3  # predictions, settings, frontiers or explanations with a sentence of their own
ROUNDED = 0.01  # difference of requested and realised sparsity from which a headline states both
GAIN = 1.005  # speedup that is shown as more than 1.00


class HasSpeedup(Protocol):
    @property
    def speedup(self) -> float: ...
    @property
    def speedup_lower(self) -> float: ...
    @property
    def speedup_upper(self) -> float: ...


def interval_text(value: float, low: float, high: float) -> str:
    return f"{ratio(value)}x ({ratio(low)}-{ratio(high)})"


def number_text(value: float, lower: float, upper: float) -> str:
    """Return a positive number with its interval, if it has one."""
    middle, low, high = (f"{x:.3g}" if x < 100.0 else f"{x:,.0f}" for x in (value, lower, upper))
    return middle if low == high else f"{middle} ({low}-{high})"


def speedup_text(r: HasSpeedup) -> str:
    return f"{interval_text(r.speedup, r.speedup_lower, r.speedup_upper)}{if_fitted(r)}"


def if_fitted(r: Any) -> str:
    """Return the condition of a speedup of models that do not both fit into the memory, or ""."""
    fits = getattr(r, "dense_fits", True) and getattr(r, "pruned_fits", True)
    return "" if fits else " if it fitted"


def shares(r: Result) -> str:
    """Return the share of all parts that is removed, requested and realised; "" if the pruning's
    name has it."""
    requested, realised = percent(r.sparsity), percent(r.realised_sparsity)
    if r.pruned:
        return f"{requested} of all parameters removed"
    if r.family == "none":
        return ""
    if requested in r.pruning:
        return "" if realised == requested else f"{realised} realised"
    if not r.parts and realised == requested:
        return f"{requested} removed"
    both = requested if realised == requested else f"{requested} requested, {realised} realised"
    return f"{both} over all parts" if r.parts else both


def pruning_text(r: Result) -> str:
    text = shares(r)
    return f"{r.pruning} ({text})" if text else r.pruning


def realised_name(r: Result) -> str:
    """Return the pruning with the realised share if rounding changes it notably."""
    apart = abs(r.realised_sparsity - r.sparsity) >= ROUNDED and not (r.pruned or r.parts == "")
    return f"{r.pruning} ({percent(r.realised_sparsity)} realised)" if apart else r.pruning


def parts_line(r: Result) -> str:
    """Return the removed share of each part, and of all parts together if this differs."""
    text, one = shares(r), "; " not in r.parts and percent(r.sparsity) in r.parts
    return (
        r.parts
        if one or not text
        else f"{r.parts}; {text.removesuffix(' over all parts')} over all parts"
    )


def probability_text(probability: float) -> str:
    return (
        "> 99 %"
        if probability > 0.99
        else "< 1 %"
        if probability < 0.01
        else f"{100.0 * probability:.0f} %"
    )


def gain_text(model: str, value: float, low: float, high: float) -> str:
    """Return whether a pruning makes a model faster, as the predicate of a sentence."""
    text = interval_text(value, low, high)
    if high < 1.0:
        return f"makes {model} slower: {text}"
    if ratio(low) == ratio(high) == "1.00":
        return f"gives {model} no gain: {text}"
    return (
        f"gives {model} no certain gain: {text}"
        if low <= 1.0
        else f"makes {model} {text.replace(' ', ' faster ')}"
    )
