"""Conclusions on executed speedups."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from calibration.runners.agreement import conclusions

pytestmark = pytest.mark.quick


def test_a_comparison_states_whether_predictions_hold_and_its_worst_case() -> None:
    def row(family: str, measured: float, predicted: float) -> Any:
        ends = {"predicted_lower": 0.9 * predicted, "predicted_upper": 1.1 * predicted}
        about = {"model": "m", "hardware": "planted", "device": "planted GPU", "sparsity": 0.5, "phase": "decode"}
        error = predicted / measured - 1.0
        return Mock(
            family=family,
            pruning=f"{family} at 50 %",
            measured=measured,
            predicted=predicted,
            roofline_bound=2.0,
            error=error,
            **ends,
            **about,
        )

    first, worst = conclusions([row("depth", 1.5, 1.52), row("width", 1.3, 1.4)])
    assert first.startswith("The predictions of planted for m hold on planted GPU: median error 4.5 % (datasheet roof")
    assert worst == "Worst: width at 50 % in decode, measured 1.30x, predicted 1.40x (1.26-1.54)."
    assert "do not hold" in conclusions([row("depth", 1.0, 1.9), row("width", 1.0, 2.1)])[0]
