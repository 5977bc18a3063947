"""Conclusions of ``prunesim speedup``, and the batches or lengths at which a pruning pays."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from simulator.display import few, with_and
from simulator.prediction.requests import batch_name, by_key, device_text, setting
from simulator.prediction.result import Result, Results
from simulator.prediction.runnable import Runnable, runs_clause, unaligned
from simulator.prediction.tariff import Tariff, energy_fields
from simulator.prediction.wording import (
    GAIN,
    MOST_SENTENCES,
    NAMED,
    gain_text,
    if_fitted,
    realised_name,
    speedup_text,
)
from simulator.units import ratio

MOST_BREAK_EVEN = 8
"""Most sentences on break-even; of more prunings only the fastest is stated."""


def too_large(results: Sequence[Result]) -> list[str]:
    """Return which models exceed the memory in which setting; none if all fit."""
    large = [r for r in results if not (r.dense_fits and r.pruned_fits)]
    groups = by_key(large, setting)
    if len(groups) > MOST_SENTENCES:
        several = f"{len(groups)} of {len(by_key(results, setting))} settings"
        return [f"In {several}, a model does not fit into the memory; its times are hypothetical."]
    out = []
    for where, some in groups.items():
        needs = {r.model: r.dense_memory_bytes for r in some if not r.dense_fits}
        needs |= {r.pruning: r.pruned_memory_bytes for r in some if not r.pruned_fits}
        names = [f"{name} ({need / 2**30:.1f} GiB)" for name, need in needs.items()]
        room = f"{some[0].capacity_bytes / 2**30:.1f} GiB on {where}"
        out.append(f"Does not fit into {room}: {few(names, NAMED)}; hypothetical times.")
    return out


def answer_of(
    results: Sequence[Result], runs: Sequence[Runnable] = (), more: Sequence[str] = ()
) -> list[str]:
    """Return the answer of every medium: over a few batches or lengths the break-even of each
    pruning, else :func:`of_speedups`. ``runs`` state whether the stock engine runs each result;
    ``more`` are further clauses."""
    even, answers = break_even(results), dict(zip(results, runs))
    if 0 < len(even) <= MOST_BREAK_EVEN:
        # the longest: a budget of tokens may keep all of the first
        last = [answers.get(b.results[-1]) for b in even]
        stops = [runs_clause(answer) if answer and answer.works is False else "" for answer in last]
        return [f"{b.sentence[:-1]}{stop}." for b, stop in zip(even, stops)]
    ends = map(_runs, runs)
    clauses = ["".join(parts) for parts in itertools.zip_longest(ends, more, fillvalue="")]
    return of_speedups(results, clauses)


def records(
    results: Results, runs: Sequence[Runnable], tariff: Tariff | None
) -> list[dict[str, Any]]:
    """Return the rows of ``--json`` and ``--csv``: each result, whether the stock engine runs it,
    its energy if a tariff is given, and its answer."""
    return [
        {
            **r.to_dict(),
            **answer.to_dict(),
            **energy_fields(r, tariff),
            "answer": " ".join(answer_of([r], [answer])),
        }
        for r, answer in zip(results, runs)
    ]


def _runs(answer: Runnable) -> str:
    slow = f", but {unaligned(answer)}" if answer.works and not answer.aligned else ""
    return f"{runs_clause(answer)}{slow}"


def of_speedups(results: Sequence[Result], clauses: Sequence[str] = ()) -> list[str]:
    """Return which models do not fit, and how much faster each pruning is. Few results get a
    sentence each. For many, sentences name the fastest of each setting, or of all settings, and the
    number of gains and losses. Each result's clause ends its sentence."""
    return [*too_large(results), *_speedups(results, clauses), *_in_formats(results)]


def _speedups(results: Sequence[Result], clauses: Sequence[str]) -> list[str]:
    ends = dict(zip(results, clauses))
    if len(results) <= MOST_SENTENCES:
        gains = [gain_text(r.model, r.speedup, r.speedup_lower, r.speedup_upper) for r in results]
        places = [
            f"{setting(r)}, {r.bottleneck}-bound{formats_clause(r)}{ends.get(r, '')}"
            for r in results
        ]
        return [
            f"{realised_name(r)} {gain}{if_fitted(r)} on {place}."
            for r, gain, place in zip(results, gains, places)
        ]
    several = len({r.model for r in results}) > 1
    groups = by_key(results, lambda r: f"{setting(r)} of {r.model}" if several else setting(r))
    if len(groups) <= MOST_SENTENCES:
        return [_fastest(some, ends, f"On {where}") for where, some in groups.items()]
    best = max(results, key=lambda r: r.speedup)
    return [_fastest(results, ends, f"Of {len(groups)} settings", f" on {setting(best)}")]


def _fastest(
    some: Sequence[Result], ends: Mapping[Result, str], start: str, where: str = ""
) -> str:
    best = max([r for r in some if not if_fitted(r)] or some, key=lambda r: r.speedup)
    gains, losses = sum(r.speedup_lower > 1 for r in some), sum(r.speedup_upper < 1 for r in some)
    counts = f"{gains} of {len(some)} are faster with their whole interval" + (
        f", {losses} slower" if losses else ""
    )
    return (
        f"{start}, the fastest is {realised_name(best)}{where}: {speedup_text(best)}"
        f"{formats_clause(best)}{ends.get(best, '')}; {counts}."
    )


def _in_formats(results: Sequence[Result]) -> list[str]:
    """Return how much faster prunings in other number formats are than the dense model in the same
    formats, in one setting."""
    dense = {r.formats: r.pruned_s for r in results if r.family == "none" and r.in_formats}
    gains = [
        f"{r.pruning} {ratio(dense[r.formats] / r.pruned_s)}x"
        for r in results
        if r.formats in dense and r.family != "none"
    ]
    if not gains or len(by_key(results, setting)) > 1:
        return []
    return [f"Over the dense model in the same formats: {few(gains, NAMED)}."]


def formats_clause(r: Result) -> str:
    """Return the number formats of an existing pruned model as the end of a sentence, if they
    differ from those of the dense model."""
    return f"; {r.formats}" if r.formats and r.pruned else ""


@dataclass(frozen=True)
class BreakEven:
    """The batches or lengths at which a pruning pays: the whole interval of its speedup is above
    :data:`GAIN`."""

    axis: str  # "batch" or "seq"
    results: tuple[Result, ...]  # ascending; only those that fit into the memory, unless none does
    too_large: tuple[int, ...] = ()  # values of the excluded results

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(getattr(r, self.axis) for r in self.results)

    @property
    def pays(self) -> tuple[bool, ...]:
        return tuple(r.speedup_lower >= GAIN for r in self.results)

    @property
    def where(self) -> str:
        r = self.results[0]
        other = f"seq {r.seq}" if self.axis == "batch" else f"{batch_name(r.phase)} {r.batch}"
        return f"{device_text(r)} in {r.engine} ({r.phase}, {other})"

    @property
    def verdict(self) -> str:
        values, pays, results = self.values, self.pays, self.results
        ends = f"{values[0]:,} to {values[-1]:,}"
        best = max(
            (r for r in results if r.speedup_lower >= GAIN), key=lambda r: r.speedup, default=None
        )
        if best is None:
            best = max(results, key=lambda r: r.speedup)
            slower = all(r.speedup_upper < 1.0 for r in results)
            sure = "is slower" if slower else "has no certain gain"
            where = (
                f"any {self._name} from {ends}"
                if len(values) > 1
                else f"{self._name} {values[0]:,}"
            )
            return f"{sure} at {where}; best {self._with_value(best)}"
        start, stop = pays.index(True), len(pays) - 1 - pays[::-1].index(True)
        if all(pays):
            if len(values) == 1:
                return f"pays at {self._name} {values[0]:,} ({_bare(results[0])})"
            return (
                f"pays at every {self._name} from {ends} ({self._with_value(results[0], ', at')};"
                f" {self._with_value(results[-1], ', at')})"
            )
        if all(pays[start:]):
            return (
                f"pays from {self._name} {values[start]:,} ({_bare(results[start])}); not at"
                f" {values[start - 1]:,}"
            )
        if all(pays[: stop + 1]):
            return (
                f"pays up to {self._name} {values[stop]:,} ({_bare(results[stop])}); not at"
                f" {values[stop + 1]:,}"
            )
        paying = [f"{value:,}" for value, paid in zip(values, pays) if paid]
        shown = (
            with_and(paying)
            if len(paying) <= NAMED
            else f"{len(paying)} of {len(values)} values from {ends}"
        )
        return f"pays at {self._name} {shown} (best {self._with_value(best)}); not at the others"

    @property
    def sentence(self) -> str:
        first = self.results[0]
        text = f"{realised_name(first)} on {self.where} {self.verdict}{formats_clause(first)}."
        return "; ".join([*self._beyond(), text])

    def _beyond(self) -> Iterator[str]:
        """Yield what does not fit into the memory."""
        if not self.results[0].pruned_fits:
            yield f"No {self._name} fits into the memory, so times are hypothetical"
            return
        if self.too_large:
            many = len(self.too_large) > 1
            values = f"{self.too_large[0]:,} and more do" if many else f"{self.too_large[0]:,} does"
            yield f"{self._name.capitalize()} {values} not fit into the memory"
        if dense := [getattr(r, self.axis) for r in self.results if not r.dense_fits]:
            start = f"{self.results[0].model} itself does not fit from {self._name} {dense[0]:,} on"
            yield f"{start}, where its times are hypothetical"

    @property
    def _name(self) -> str:
        return batch_name(self.results[0].phase) if self.axis == "batch" else "seq"

    def _with_value(self, r: Result, link: str = " at") -> str:
        return f"{_bare(r)}{link} {getattr(r, self.axis):,}"


def _bare(r: Result) -> str:
    return f"{ratio(r.speedup)}x, {ratio(r.speedup_lower)}-{ratio(r.speedup_upper)}"


def break_even(results: Sequence[Result]) -> list[BreakEven]:
    """Return the break-even of each pruning, model, device, engine and phase over the batches, or
    over the lengths; none if neither varies."""
    axis = next(
        (axis for axis in ("batch", "seq") if len({getattr(r, axis) for r in results}) > 1), ""
    )
    names = (
        "model",
        "pruning",
        "engine",
        "phase",
        "hardware",
        "seq" if axis == "batch" else "batch",
    )
    out = []
    for some in by_key(results if axis else (), attrgetter(*names)).values():
        ascending = sorted(some, key=lambda r: getattr(r, axis))
        fit = [r for r in ascending if r.pruned_fits] or ascending
        out.append(
            BreakEven(axis, tuple(fit), tuple(getattr(r, axis) for r in ascending if r not in fit))
        )
    return out
