"""State from which batch or length a pruning pays, which is with its whole interval above :data:`GAIN`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.display import with_and
from simulator.prediction.scenario import batch_name, device_text
from simulator.units import ratio

if TYPE_CHECKING:
    from simulator.prediction.result import Result

AXES: tuple[str, ...] = ("batch", "seq")
"""Fields over which break-even is stated; of two that vary, the first."""

GAIN = 1.005
"""Speedup that is shown as more than 1.00."""

FEW = 6
"""Values that a sentence lists at most."""


@dataclass(frozen=True)
class BreakEven:
    """A pruning on one device, engine and phase, over batches or lengths."""

    axis: str  # "batch" or "seq"
    results: tuple[Result, ...]  # ascending; of values at which the model fits into the memory, if any
    too_large: tuple[int, ...] = ()  # values at which it does not fit

    @property
    def values(self) -> tuple[int, ...]:
        """Values of the axis."""
        return tuple(getattr(r, self.axis) for r in self.results)

    @property
    def pays(self) -> tuple[bool, ...]:
        """Whether the pruning pays at each value."""
        return tuple(r.speedup_lower >= GAIN for r in self.results)

    @property
    def where(self) -> str:
        """Device, engine, phase and the other field as part of a sentence."""
        r = self.results[0]
        other = f"seq {r.seq}" if self.axis == "batch" else f"{batch_name(r.phase)} {r.batch}"
        return f"{device_text(r)} in {r.engine} ({r.phase}, {other})"

    @property
    def verdict(self) -> str:
        """The values at which the pruning pays, as the predicate of a sentence."""
        name = batch_name(self.results[0].phase) if self.axis == "batch" else "seq"
        values, pays, found = self.values, self.pays, self.results
        first, last = found[0], found[-1]
        ends = f"{values[0]:,} to {values[-1]:,}"
        if all(pays):
            text = f"pays at every {name} from {ends}"
            return f"{text} ({_speedup(first)}, at {values[0]:,}; {_speedup(last)}, at {values[-1]:,})"
        if not any(pays):
            best = max(found, key=lambda r: r.speedup)
            sure = "is slower" if all(r.speedup_upper < 1.0 for r in found) else "has no certain gain"
            return f"{sure} at any {name} from {ends}; best {_speedup(best)} at {getattr(best, self.axis):,}"
        start = pays.index(True)
        if all(pays[start:]):
            return f"pays from {name} {values[start]:,} ({_speedup(found[start])}); not below"
        stop = len(pays) - 1 - pays[::-1].index(True)
        if all(pays[: stop + 1]):
            return f"pays up to {name} {values[stop]:,} ({_speedup(found[stop])}); not above"
        if sum(pays) == 1:
            return f"pays only at {name} {values[start]:,} ({_speedup(found[start])})"
        at = [f"{v:,}" for v, paid in zip(values, pays) if paid]
        shown = with_and(at) if len(at) <= FEW else f"{len(at)} of {len(values)} values from {ends}"
        best = max((r for r, paid in zip(found, pays) if paid), key=lambda r: r.speedup)
        return f"pays at {name} {shown} (best {_speedup(best)} at {getattr(best, self.axis):,}); not at the others"

    @property
    def sentence(self) -> str:
        """Pruning, place and verdict.

        >>> from simulator import table
        >>> found = table("llama-3.1-8b", "h100", prune="depth 0.25", phase="decode", batch=[1, 8, 64])
        >>> break_even(list(found))[0].sentence[:75]
        'depth at 25 % on h100_sxm in vllm (decode, seq 2048) pays at every batch fr'
        """
        return f"{self.results[0].pruning} on {self.where} {self.verdict}{self._beyond}."

    @property
    def _beyond(self) -> str:
        """The values that do not fit, as the end of a sentence."""
        if not self.too_large:
            return ""
        name = batch_name(self.results[0].phase) if self.axis == "batch" else "seq"
        many = len(self.too_large) > 1
        values = f"{self.too_large[0]:,} and more" if many else f"{self.too_large[0]:,}"
        return f"; {name} {values} {'do' if many else 'does'} not fit into the memory"


def axis_of(results: Sequence[Result]) -> str:
    """Return the field over which break-even is stated, or "" if neither batch nor length varies."""
    return next((axis for axis in AXES if len({getattr(r, axis) for r in results}) > 1), "")


def break_even(results: Sequence[Result]) -> list[BreakEven]:
    """Return the break-even of each pruning, model, device, engine and phase over the batches, or over the lengths."""
    axis = axis_of(results)
    if not axis:
        return []
    groups: dict[tuple[object, ...], list[Result]] = {}
    for r in results:
        other = r.seq if axis == "batch" else r.batch
        groups.setdefault((r.model, r.pruning, r.engine, r.phase, r.hardware, other), []).append(r)
    out = []
    for some in groups.values():
        ascending = sorted(some, key=lambda r: getattr(r, axis))
        fit = [r for r in ascending if r.pruned_fits is not False] or ascending
        out.append(BreakEven(axis, tuple(fit), tuple(getattr(r, axis) for r in ascending if r not in fit)))
    return out


def _speedup(r: Result) -> str:
    return f"{ratio(r.speedup)}x, {ratio(r.speedup_lower)}-{ratio(r.speedup_upper)}"
