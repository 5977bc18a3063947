"""Powers of ML.ENERGY's servers, held out by model, keep the bars of their page."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.evidence.power import Servers, compare_power, servers
from calibration.validation.scoring import score_of
from simulator.hardware.library import load_hardware
from simulator.power import PARTS


@pytest.mark.parametrize(("gpu", "bar"), [("h100_sxm", 0.10), ("b200_sxm", 0.15)])
def test_powers_of_models_that_no_fit_saw_keep_their_bar(gpu: str, bar: float) -> None:
    found = score_of(compare_power(servers()[gpu]))
    assert found["median"] <= bar
    assert 0.85 <= found["coverage"] <= 0.95


def test_shipped_constants_are_those_of_the_published_runs() -> None:
    runs: Servers
    for name, runs in servers().items():
        fitted, shipped = runs.fit()[0], load_hardware(f"{name}@vllm").section("power", "*")
        values = [[section[part] for part in PARTS] for section in (fitted, shipped)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_shipped_accuracy_is_that_of_held_out_models() -> None:
    runs = servers()["h100_sxm"]
    error = np.array([c.error for c in compare_power(runs)])
    shipped = load_hardware("h100@vllm").section("power", "*").accuracy
    assert np.abs(error).mean() == pytest.approx(shipped["mape"], rel=0.01)
