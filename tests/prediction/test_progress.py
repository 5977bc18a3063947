"""Functions that may take long report their progress in the same way: done and total."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from simulator.prediction.advise import advise
from simulator.prediction.explain import explanations
from simulator.prediction.grid import Grid
from simulator.prediction.pareto import fronts
from simulator.prediction.quality import load_quality
from simulator.prediction.sweep import sweep_results
from simulator.prediction.table import table

pytestmark = pytest.mark.quick

MODEL, TWO, NARROW = "llama-3.2-1b", ["h100", "a100"], {"family": ["depth"]}
QUALITY = load_quality(None).of_model("llama-2-7b")
LONG: dict[str, Callable[..., Any]] = {
    "table": partial(table, [MODEL], TWO, ["depth"], [0.25], ["prefill", "decode"]),
    "explanations": partial(explanations, MODEL, TWO, "depth", 0.25, ["prefill", "decode"]),
    "sweep_results": partial(sweep_results, Grid((MODEL,), ("h100",), (0.5,), ("prefill", "decode"), (1,), (128,))),
    "advise": partial(advise, MODEL, TWO, 1.2, ["decode"], **NARROW),
    "fronts": partial(fronts, "llama-2-7b", TWO, QUALITY, QUALITY.axes()[0]),
}


@pytest.mark.parametrize("name", LONG)
def test_progress_rises_to_its_total(name: str) -> None:
    seen: list[tuple[int, int]] = []
    LONG[name](progress=lambda done, total: seen.append((done, total)))
    done, totals = zip(*seen)
    assert len(set(totals)) == 1
    assert list(done) == sorted(set(done))
    assert done[-1] == totals[0]
