"""Conclusions of ``prunesim explain``."""

from __future__ import annotations

from collections.abc import Sequence

from simulator.display import with_and
from simulator.engines.engine import load_engine
from simulator.prediction.explain import Explanation
from simulator.prediction.requests import setting
from simulator.prediction.wording import (
    MOST_SENTENCES,
    pruning_text,
    speedup_text,
)
from simulator.pruning import FAMILIES
from simulator.units import ratio, seconds

# a conclusion names the steps of a waterfall with factors below this value or above its inverse
NOTABLE = 0.985


def conclusion(e: Explanation) -> str:
    """Return a sentence on nominal and predicted speedup, bottleneck and largest losses, and advice
    for a host-bound model."""
    r, losses = (
        e.result,
        sorted((s for s in e.steps[1:] if s.factor < NOTABLE), key=lambda s: s.factor),
    )
    gains = [s for s in e.steps[1:] if s.factor > 1 / NOTABLE and s.name != "rounding"]
    nominal = f"{pruning_text(r)} of {r.model}: nominal {e.steps[0].speedup:.2f}x"
    parts = [f"{nominal}, predicted {speedup_text(r)} on {setting(r)}, {r.bottleneck}-bound"]
    if losses:
        parts.append("losses: " + with_and([f"{s.name} (x{s.factor:.2f})" for s in losses[:3]]))
    elif r.speedup > 1:
        parts.append(f"no single step loses more than {100 * (1 - NOTABLE):.1f} %")
    if gains:
        parts.append("gains: " + with_and([f"{s.name} (x{s.factor:.2f})" for s in gains[:2]]))
    if e.reason:
        parts.append(e.reason)
    if r.speedup_upper < 1:
        parts.append("the pruned model is slower")
    elif ratio(r.speedup_lower) == ratio(r.speedup_upper) == "1.00":
        parts.append("the pruned model is as fast as the dense one")
    elif r.speedup_lower <= 1 and r.sparsity > 0:
        parts.append("the interval includes 1.00x, so a gain is uncertain")
    return f"{'; '.join(parts)}.{_host_bound(e)}"


def conclusions(explained: Sequence[Explanation]) -> list[str]:
    """Return the :func:`conclusion` of each explanation; for many explanations, the range of
    speedups."""
    if len(explained) <= MOST_SENTENCES:
        return [conclusion(e) for e in explained]
    ends = [pick(explained, key=lambda e: e.result.speedup).result for pick in (min, max)]
    first, settings = explained[0].result, len({setting(e.result) for e in explained})
    several = f" and {len(explained) // settings - 1} more" if len(explained) > settings else ""
    both = " to ".join(f"{speedup_text(r)} on {setting(r)}" for r in ends)
    return [f"{first.pruning}{several} of {first.model}, {settings} settings: predicted {both}."]


def _host_bound(e: Explanation) -> str:
    if not e.layer_s:
        return ""
    engine = load_engine(e.dense.meta.engine)
    text = (
        f"{engine.title}: the host needs {seconds(e.layer_s)} per layer; while the device needs"
        " less, narrower "
    )
    text += "layers give no speedup: use fewer layers or a CUDA graph"
    narrower = any(
        name in FAMILIES and FAMILIES[name].narrows for name in e.result.family.split("+")
    )
    if narrower and engine.own_code.source:
        text += (
            f" (custom modelling code has cost up to another x{engine.own_code.value:g} in"
            " published results)"
        )
    return f" {text}."
