"""Conclusions of ``prunesim advise``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from simulator.display import few
from simulator.prediction.advise import Advice, Advised, Target
from simulator.prediction.explain_sentences import needs_text
from simulator.prediction.requests import by_key, setting
from simulator.prediction.result import HasResult
from simulator.prediction.runnable import runs_text
from simulator.prediction.speedup_sentences import too_large
from simulator.prediction.wording import (
    NAMED,
    probability_text,
    pruning_text,
    speedup_text,
)
from simulator.units import seconds

T = TypeVar("T", bound=HasResult)


def settings_of(predictions: Sequence[T]) -> Mapping[str, list[T]]:
    return by_key(predictions, lambda prediction: setting(prediction.result))


def of_advice(advised: Advised, target: Target) -> list[str]:
    """Return which models do not fit; the least pruning that reaches a target with its probability,
    or the closest pruning; and the settings in which the dense model reaches it. For several
    settings, the least and the most pruning are named."""
    groups = settings_of(advised.advice)
    best = {where: group[0] for where, group in groups.items()}
    reached = {where: advice for where, advice in best.items() if advice.reached}
    out = too_large([advice.result for advice in best.values()])
    if reached and len(best) == 1:
        ((where, group),) = groups.items()
        out += _least(group, where, target)
    elif reached:
        out.append(_range(reached, target))
    if len(reached) < len(best):
        out.append(_missed(best, target))
    if advised.dense:
        out.append(f"The dense model reaches {target.text} on {few(advised.dense, NAMED)}.")
    return out


def of_budgets(advice: Sequence[Advice]) -> list[str]:
    """Return what the dynamic families need to reach the target."""
    return [needs_text(a.budget, a.budget.needs[0], a.result) for a in advice if a.budget]


def _least(group: Sequence[Advice], where: str, target: Target) -> Iterator[str]:
    """Yield the least pruning of a setting, and the least that the stock engine runs if it is
    another."""
    least, engine = group[0], group[0].result.engine
    start = f"The least pruning of {least.result.model} that reaches {target.text} on {where} is"
    predicted = f"{_predicted(least)}{runs_text(engine, least.runs)}"
    yield f"{start} {pruning_text(least.result)}; predicted {predicted}."
    stock = next((advice for advice in group if advice.reached and advice.runs), least)
    if stock is not least:
        name = pruning_text(stock.result)
        yield f"The least that stock {engine} runs is {name}; predicted {_predicted(stock)}."


def _range(reached: Mapping[str, Advice], target: Target) -> str:
    """Return the least and the most pruning over the settings."""
    low, high = (
        pick(reached, key=lambda where: reached[where].result.realised_sparsity)
        for pick in (min, max)
    )
    ends = [
        f"{pruning_text(reached[where].result)} on {where}" for where in dict.fromkeys((low, high))
    ]
    return f"The least pruning that reaches {target.text} is {' to '.join(ends)}."


def _missed(best: Mapping[str, Advice], target: Target) -> str:
    """Return the closest pruning of the settings in which none reaches the target."""
    missed = {where: advice for where, advice in best.items() if not advice.reached}
    where = max(missed, key=lambda where: missed[where].result.speedup)
    closest = missed[where]
    start, place = f"No pruning of {closest.result.model} reaches {target.text} on {where}", ""
    if len(best) > 1:
        start = f"No family reaches {target.text} on {len(missed)} of {len(best)} settings"
        place = f" on {where}"
    return f"{start}; the closest is {pruning_text(closest.result)}{place}: {_predicted(closest)}."


def _predicted(a: Advice) -> str:
    return (
        f"{speedup_text(a.result)}, {seconds(a.result.pruned_s)}, probability"
        f" {probability_text(a.probability)}"
    )
