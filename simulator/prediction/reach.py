"""Evaluate whether given prunings reach a target, with their probability, and by how much they miss it.

Use :func:`reach`; :func:`simulator.prediction.advise.advise` with texts of ``--prune`` returns its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from simulator.prediction.configurations import Target
from simulator.prediction.operating import check_probability, probability_of
from simulator.prediction.result import HasResult, Result
from simulator.prediction.scenario import Scenario, setting
from simulator.prediction.table import table
from simulator.units import percent, ratio

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig


@dataclass(frozen=True, repr=False)
class Reach(HasResult):
    """A given pruning on one device and request, against the target."""

    result: Result
    target: float  # speedup that the target requires there
    probability: float  # of reaching the target, from the speedup's interval
    reached: bool  # with at least the required probability
    margin: float  # speedup / target - 1; below 0 the target is missed by this share

    @property
    def verdict(self) -> str:
        """Whether the target is reached, or by how much the speedup misses it."""
        if self.reached:
            return "reached"
        return f"missed by {percent(-self.margin)}" if self.margin < 0.0 else "too uncertain"

    def _title(self) -> str:
        r = self.result
        return f"{r.model} on {r.request}: {r.pruning}, {ratio(r.speedup)}x of {ratio(self.target)}x: {self.verdict}"


def reach(
    model: str | ModelConfig,
    hardware: Sequence[str | HardwareProfile],
    target: Target,
    prune: Sequence[str],
    phase: Sequence[str] = ("prefill",),
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    *,
    engine: Sequence[str] = (),
    scenario: Scenario | None = None,
    probability: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[tuple[Reach, ...], tuple[str, ...]]:
    """Return what texts of ``--prune`` reach on every device and request, the best of each first, and notes; arguments
    are those of :func:`simulator.prediction.advise.advise`.

    >>> (one,), _ = reach("llama-3.1-8b", ["h100"], Target(1.5), ["depth 0.25"], ["decode"])
    >>> one.reached, one.verdict, one.probability < 0.01
    (False, 'missed by 15.2 %', True)
    """
    check_probability(probability)
    found = table(
        model,
        hardware,
        phase=phase,
        batch=batch,
        seq=seq,
        prune=prune,
        engine=engine,
        scenario=scenario,
        progress=progress,
    )
    out = []
    for r in found:
        one = replace(scenario or Scenario(), phase=r.phase, shapes=((r.batch, r.seq),))
        needed = target.over(r.dense_s, one)
        chance = probability_of(needed, r.speedup, r.speedup_lower, r.speedup_upper, r.level)
        out.append(Reach(r, needed, chance, chance >= probability, r.speedup / needed - 1.0))
    order = list(dict.fromkeys(setting(one.result) for one in out))
    return tuple(sorted(out, key=lambda one: (order.index(setting(one.result)), -one.margin))), found.notes
