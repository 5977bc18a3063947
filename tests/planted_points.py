"""Points and quality rows as tests plant them."""

from __future__ import annotations

from typing import Any

from simulator.prediction.pareto import Point
from simulator.prediction.quality import QualityRow

WHERE = ("m", "h", "prefill", 1, 1, "vllm")
QUALITY = ("ppl", "p", 1.0)
UNJUDGED = (False, False, False, "", "compute", True, "s")


def point(family: str, loss: float, speedup: float, spread: float = 1.0) -> Point:
    """A point with an interval of a factor ``spread`` to both sides, not judged."""
    interval = (speedup, speedup / spread, speedup * spread)
    return Point(
        *WHERE, family, family, 0.25, 0.25, *QUALITY, 1.0 + loss, loss, *interval, *UNJUDGED
    )


def row(family: str, sparsity: float, pruned: float, **change: Any) -> QualityRow:
    """A row of one metric and protocol, dense value 6."""
    rest = {
        "metric": "ppl",
        "higher_is_better": False,
        "dense": 6.0,
        "protocol": "mine",
        "source": "me",
    }
    named = {
        "method": f"my {family}",
        "family": family,
        "model": "llama-3.1-8b",
        "sparsity": sparsity,
        "pruned": pruned,
    }
    return QualityRow(**{**rest, **named, **change})
