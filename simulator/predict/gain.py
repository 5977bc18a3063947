"""A speedup for a prompt and for a notebook: of :class:`simulator.Speedup`, and of a record of a table."""

from __future__ import annotations

from typing import Any

from simulator.display import bars_html, facts_html
from simulator.units import percent, ratio, seconds, seconds_between


def gain(s: Any, lower: float, upper: float) -> str:
    """A speedup and its interval, the times, what was pruned and what limits, in one line."""
    sure = f"{ratio(s.speedup)}x ({ratio(lower)}-{ratio(upper)})"
    times = f"{seconds(s.dense_s)} to {seconds(s.pruned_s)}"
    return f"{sure}, {times}: {s.family} {percent(s.sparsity)}, {s.bottleneck}-bound"


def gain_html(s: Any, lower: float, upper: float) -> str:
    """The two times, what a served model feels, and how the bounds lead from the promise to the prediction, as bars."""
    facts = {
        "dense": seconds_between(s.dense_s, s.dense_lower, s.dense_upper),
        "pruned": seconds_between(s.pruned_s, s.pruned_lower, s.pruned_upper),
        "tokens/s": f"{s.dense_tokens_per_s:,.4g} to {s.tokens_per_s:,.4g}" if s.tokens_per_s else None,
        "sparsity": f"{percent(s.sparsity)} asked for, {percent(s.realised_sparsity)} realised",
        "bottleneck": f"{s.bottleneck}, {percent(s.bottleneck_share)} of the pruned time",
        "interval": percent(s.level) + ("" if s.calibrated else ", not calibrated for everything this needs"),
    }
    steps = {
        "promised": 1.0 / (1.0 - s.sparsity),
        "rounding": 1.0 / max(1.0 - s.realised_sparsity, 1e-9),  # all layers may be gone
        "parts not pruned": s.flop_bound,
        "memory-bound operators": s.roofline_bound,
        "kernels and host": s.speedup,
    }
    return facts_html(facts) + bars_html(list(steps.items()), (lower, upper))
