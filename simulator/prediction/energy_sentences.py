"""Conclusions, notes and columns about the energy that prunings save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from simulator.hardware.profile import HardwareProfile
from simulator.prediction.energy import EQUAL
from simulator.prediction.requests import setting
from simulator.prediction.result import Result
from simulator.prediction.tariff import ENDS, Energy, Tariff
from simulator.prediction.wording import MOST_SENTENCES, number_text

_FALLS = {
    "active": "the time of its kernels falls",
    "memory": "its moved bytes fall",
    "compute": "its arithmetic falls",
}
_WAITS = {
    "host": "it also waits for the host",
    "launch": "kernels also wait for their launches",
    "link": "devices also wait for each other",
}


def of_energy(results: Sequence[Result], tariff: Tariff) -> list[str]:
    """Return how much energy each pruning saves, against its time; of many, the one that saves
    most."""
    if len(results) <= MOST_SENTENCES:
        return [_sentence(r, tariff) for r in results]
    best = max(results, key=lambda r: r.energy_saved)
    return [f"Most energy of {len(results)}: {_sentence(best, tariff)}"]


def _sentence(r: Result, tariff: Tariff) -> str:
    energy = Energy.of(r, tariff)
    dense, pruned = energy.dense_joules_per_token, energy.pruned_joules_per_token
    saved, lower, upper = ends_of(energy, "energy_saved")
    joules = f"{dense:.3g} to {pruned:.3g} J per token"
    if saved < 0.0:
        more = saved_text(-saved, -upper, -lower)
        return f"{r.pruning} takes {more} more energy on {setting(r)}: {joules}."
    apart = saved - (1.0 - 1.0 / r.speedup)
    against = "as much as" if abs(apart) < EQUAL else "more than" if apart > 0.0 else "less than"
    share = saved_text(saved, lower, upper)
    return (
        f"{r.pruning} saves {share} of the energy on {setting(r)}, {against} of the time, because"
        f" {_reason(r, against)}: {joules}."
    )


def _reason(r: Result, against: str) -> str:
    if r.energy_reason == "limit":
        which = "both models" if against == "as much as" else "only one of the models"
        return f"the power limit binds for {which}"
    if r.energy_reason not in _FALLS or against == "as much as":
        return f"the power hardly changes ({r.dense_watts:.0f} to {r.pruned_watts:.0f} W)"
    waits = f", in which {_WAITS[r.bottleneck]}" if r.bottleneck in _WAITS else ""
    return f"{_FALLS[r.energy_reason]} {against} its time{waits}"


def token_name(r: Result) -> str:
    """Return the token that the energy of a prediction is divided by."""
    return "prompt token" if r.phase == "prefill" else "new token"


def saved_text(value: float, lower: float, upper: float) -> str:
    """Return a share that is saved with its interval; it is negative where energy is lost."""
    to = "-" if lower >= 0.0 else " to "
    value, lower, upper = (round(100.0 * share) for share in (value, lower, upper))
    return f"{value} % ({lower}{to}{upper})"


def energy_notes(tariff: Tariff | None, devices: Sequence[HardwareProfile]) -> Iterator[str]:
    """Yield what the energy excludes, and the devices whose power was not fitted."""
    if tariff is None:
        return
    if tariff.excluded:
        yield f"energy is that of the devices: it excludes {tariff.excluded}"
    for hw in devices:
        if hw.section("power", "*").status != "calibrated":
            assumed = f"shares of {hw.power_w:.0f} W with wide intervals are used"
            yield f"{hw.label}: the power was not fitted; {assumed}"


_COLUMNS = {
    "W per GPU": "watts",
    "cost/M tokens": "cost_per_million_tokens",
    "g CO2/M tokens": "carbon_g_per_million_tokens",
    "J per request": "joules_per_request",
}
"""Titles of columns with a number of both models, without intervals."""


def energy_table(results: Sequence[Result], tariff: Tariff) -> dict[str, list[str]]:
    """Return the columns of a table by title, a row per result, without columns that no result
    has."""
    energies = [Energy.of(r, tariff) for r in results]
    columns = {
        f"J per token\n{model}": [
            number_text(*ends_of(one, f"{model}_joules_per_token")) for one in energies
        ]
        for model in ("dense", "pruned")
    }
    columns["energy saved"] = [saved_text(*ends_of(one, "energy_saved")) for one in energies]
    for title, name in _COLUMNS.items():
        pairs = [
            [getattr(one, f"{model}_{name}") for model in ("dense", "pruned")] for one in energies
        ]
        if not any(None in pair for pair in pairs):
            columns[title] = [" to ".join(number_text(v, v, v) for v in pair) for pair in pairs]
    return columns


def ends_of(found: Any, name: str) -> tuple[float, float, float]:
    """Return a number of a prediction with the ends of its interval."""
    value, lower, upper = (getattr(found, f"{name}{end}") for end in ENDS)
    return value, lower, upper
