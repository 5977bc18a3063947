"""Conclusions of ``prunesim explain``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from simulator.display import with_and
from simulator.engines.engine import load_engine
from simulator.prediction.budget import KernelBudget, Need, Ranges, Reached
from simulator.prediction.by_operator import by_operator
from simulator.prediction.explain import Explanation
from simulator.prediction.requests import batch_name, setting
from simulator.prediction.result import Result
from simulator.prediction.speedup_sentences import too_large
from simulator.prediction.wording import (
    MOST_SENTENCES,
    pruning_text,
    speedup_text,
)
from simulator.pruning import FAMILIES
from simulator.units import percent, ratio, seconds, seconds_between

# a conclusion names the steps of a waterfall with factors below this value or above its inverse
NOTABLE = 0.985
WAVES = 0.03  # log of a speedup from which a conclusion names the waves


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
    return f"{'; '.join(parts)}.{_waves(e)}{_host_bound(e)}"


def conclusions(explained: Sequence[Explanation]) -> list[str]:
    """Return which models do not fit, then the :func:`conclusion` and the kernel budget of each
    explanation; for many explanations, the range of speedups."""
    large = too_large([e.result for e in explained])
    if len(explained) <= MOST_SENTENCES:
        texts = [text for e in explained for text in (conclusion(e), budget_text(e)) if text]
        return large + texts
    ends = [pick(explained, key=lambda e: e.result.speedup).result for pick in (min, max)]
    first, settings = explained[0].result, len({setting(e.result) for e in explained})
    several = f" and {len(explained) // settings - 1} more" if len(explained) > settings else ""
    both = " to ".join(f"{speedup_text(r)} on {setting(r)}" for r in ends)
    name = f"{first.pruning}{several} of {first.model}"
    return [*large, f"{name}, {settings} settings: predicted {both}."]


def _waves(e: Explanation) -> str:
    """Return the operator that fills the SMs differently in dense and pruned, if that changes the
    speedup by more than a few percent."""
    found = [one for one in by_operator(e) if one.cause.startswith("fills")]
    effect = {
        one: math.log(one.dense_s / one.pruned_s / one.bound) * one.pruned_s / e.result.pruned_s
        for one in found
    }
    most = max(found, key=lambda one: abs(effect[one]), default=None)
    if most is None or abs(effect[most]) < WAVES or e.hardware.architecture == "cpu":
        return ""
    factor = ratio(math.exp(effect[most]))
    sms = f"Waves of thread blocks on {e.hardware.sm_count} SMs"
    return f" {sms} explain x{factor}: {most.name} {most.cause}."


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


def budget_text(e: Explanation) -> str:
    """Return the needs of the added work and of the kernels for the target, and the settings that
    reach it; "" without a kernel budget."""
    if (b := e.budget) is None:
        return ""
    need, phase = b.needs[-1], e.result.phase
    found = with_and([_reached(r, phase) for r in b.reached if r.target == need.target])
    return (
        f"{needs_text(b, need, e.result)} With the other settings unchanged, it"
        f" {_aim(need)} {found}."
    )


def needs_text(b: KernelBudget, need: Need, r: Result) -> str:
    """Return the time that the added work of a pruning may take to reach a target, and the rate
    that its kernels need."""
    subject = f"{r.pruning} {_aim(need)} in {r.phase} if its"
    sentences = []
    if b.added_s > 0.0:
        sentences.append(_added_work(b, need, r))
    if need.efficiency < math.inf:
        high = need.efficiency_upper
        low = ratio(need.efficiency_lower)
        ends = f"{low}-{ratio(high)}" if high < math.inf else f"from {low}; none for certain"
        reach = "Its kernels must reach" if sentences else f"{subject} kernels reach"
        rate = f"{ratio(need.efficiency)} of the dense kernels' useful rate ({ends})"
        sentences.append(f"{reach} {rate}; {ratio(b.efficiency)} is predicted.")
    elif b.efficiency > 0.0:
        name = "its kernels" if sentences else f"the kernels of {r.pruning}"
        sentences.append(f"No rate of {name} suffices: the rest of the pass takes too long.")
    return " ".join(sentences)


def _aim(need: Need) -> str:
    return "pays" if need.target == 1.0 else f"reaches {ratio(need.target)}x"


def _added_work(b: KernelBudget, need: Need, r: Result) -> str:
    """Return the time that the added kernels may take, and the time of gaps or launches that no
    faster kernel saves."""
    units = ["layer"] * (b.layers > 1)
    if b.phase != r.phase or b.passes != 1.0:
        units.append(f"{b.phase} pass")
    per = f" per {with_and(units)}" if units else ""
    launches = f", besides {seconds(b.launch_s)} of launches" if b.launch_s else ""
    predicted = f"is predicted{launches}."
    if not need.allowed_s:
        goal = "pay" if need.target == 1.0 else f"reach {ratio(need.target)}x"
        start = f"No time of its added work lets {r.pruning} {goal} in {r.phase}"
        return f"{start}; {seconds(b.added_s)}{per} {predicted}"
    allowed = seconds_between(need.allowed_s, need.allowed_lower, need.allowed_upper)
    start = f"{r.pruning} {_aim(need)} in {r.phase} if its added work takes less than"
    return f"{start} {allowed}{per}; {seconds(b.added_s)} {predicted}"


def _reached(r: Reached, phase: str) -> str:
    name, unit = {
        "batch": (batch_name(phase), "concurrent requests" if phase == "serve" else "sequences"),
        "seq": ("length", "tokens"),
        "sparsity": ("sparsity", "sparsity"),
    }[r.setting]
    text = f"{_ranges(r, r.predicted)} {unit}"
    if r.predicted in ((), ((r.first, r.last),)):
        last = _value(r, r.last)
        ends = f"up to the model's limit ({last})" if r.setting == "seq" else f"up to {last}"
        ends = ends if r.fits else f"that fits (up to {last})"
        text = f"at {'any' if r.predicted else 'no'} {name} {ends}"
    if r.certain == r.predicted:
        return text
    return f"{text} ({f'certainly {_ranges(r, r.certain)}' if r.certain else 'nowhere certainly'})"


def _value(r: Reached, value: float) -> str:
    return percent(value) if r.setting == "sparsity" else f"{value:,}"


def _ranges(r: Reached, ranges: Ranges) -> str:
    """Return the values of ranges, such as "from 512"."""
    texts = []
    for a, b in ranges:
        first, last = _value(r, a), _value(r, b)
        until = f"up to {last}" if a == r.first else f"from {first} to {last}"
        texts.append(f"at {first}" if a == b else f"from {first}" if b == r.last else until)
    return with_and(texts)
