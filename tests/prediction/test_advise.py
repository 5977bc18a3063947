"""The inverse: what is advised reaches the target, a little less does not, and widths named are where time steps
down."""

from __future__ import annotations

import json

import numpy as np
import pytest

from simulator.cli import run
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.prediction.advise import COARSE, FINE, LARGEST_SPARSITY, Advised, advise
from simulator.prediction.scenario import Scenario
from simulator.prediction.speedup import speedup
from simulator.pruning import general_families, prune

MODEL, HARDWARE = "llama-3.1-8b", "a100_sxm_80gb"


def predicted(family: str, sparsity: float, phase: str, engine: str = "reference") -> tuple[float, float]:
    """Speedup and its lower end, by the way of one prediction at a time."""
    dense = lower(load_model(MODEL), phase=phase, batch=1, seq=2048, engine=engine)
    s = speedup(dense, prune(dense, family, sparsity), load_hardware(HARDWARE))
    return s.speedup, s.lower


@pytest.fixture(scope="module", params=["prefill", "decode"])
def found(request: pytest.FixtureRequest) -> Advised:
    return advise(MODEL, [HARDWARE], 1.4, [request.param], engine=["reference"])


def test_every_family_is_advised_once(found: Advised) -> None:
    assert sorted(a.result.family for a in found.advice) == sorted(general_families())
    assert any(a.reached for a in found.advice)
    assert any(not a.reached for a in found.advice)


def test_the_least_sparsity_reaches_the_target_and_less_does_not(found: Advised) -> None:
    for a in found.advice:
        there, _ = predicted(a.result.family, a.result.sparsity, a.result.phase)
        assert there == pytest.approx(a.result.speedup, rel=1e-9)
        assert a.reached == (there >= 1.4)
        if a.reached:
            for less in np.arange(a.result.sparsity - COARSE, a.result.sparsity - FINE / 2, FINE):
                assert predicted(a.result.family, round(float(less), 6), a.result.phase)[0] < 1.4, (
                    a.result.family,
                    less,
                )


def test_what_is_not_reachable_names_the_largest_speedup(found: Advised) -> None:
    for a in found.advice:
        if not a.reached:
            assert a.result.speedup < 1.4
            assert a.steps == ()
            for sparsity in (0.1, 0.5, LARGEST_SPARSITY):
                try:
                    assert predicted(a.result.family, sparsity, a.result.phase)[0] <= a.result.speedup + 1e-9
                except InputError:
                    assert a.result.family == "semi_structured"


def test_for_sure_means_the_whole_interval(found: Advised) -> None:
    sure = [(a, a.sure_sparsity) for a in found.advice if a.sure_sparsity is not None]
    assert sure
    for a, sparsity in sure:
        assert sparsity >= a.result.sparsity
        assert predicted(a.result.family, sparsity, a.result.phase)[1] >= 1.4


def test_advice_is_ordered_by_what_it_takes(found: Advised) -> None:
    reached = [a.result.sparsity for a in found.advice if a.reached]
    assert reached == sorted(reached)
    assert [a.reached for a in found.advice] == sorted((a.reached for a in found.advice), reverse=True)


def test_steps_are_widths_at_which_time_falls() -> None:
    found = advise(MODEL, [HARDWARE], 1.5, ["prefill"], family=["width_cross", "width", "low_rank", "depth"])
    steps = {a.result.family: a.steps for a in found.advice}
    assert steps["depth"] == ()
    assert steps["width_cross"]
    hw, dense = load_hardware(HARDWARE), lower(load_model(MODEL), phase="prefill", batch=1, seq=2048)
    for family in ("width_cross", "low_rank"):
        for step in steps[family]:
            assert step.width % 16 == 0
            here = speedup(dense, prune(dense, family, step.fraction), hw)
            assert here.speedup == pytest.approx(step.result.speedup, rel=1e-9)
            assert step.reached == (here.speedup >= 1.5)
            share = 4096 if family == "width_cross" else 4096 * 14336 / (4096 + 14336)
            wider = speedup(dense, prune(dense, family, step.fraction - 16 / share), hw)
            assert step.saved == pytest.approx(1.0 - here.pruned_s / wider.pruned_s, rel=1e-6)
            assert step.saved > 0
    for a in found.advice:
        if a.result.family == "width":
            for step in a.steps:
                here = speedup(dense, prune(dense, "width", {"attention": a.result.sparsity, "mlp": step.fraction}), hw)
                assert here.pruned_s == pytest.approx(step.result.pruned_s, rel=1e-9)
                inner = prune(dense, "width", {"attention": a.result.sparsity, "mlp": step.fraction})
                assert int(inner.k[inner.is_role("down")][0]) == step.width


def test_alternatives_are_timed_and_pairs_take_less_than_either_alone(found: Advised) -> None:
    alone = {a.result.family: a.result.sparsity for a in found.advice if a.reached}
    assert found.alternatives
    for o in found.alternatives:
        assert o.reached == (o.result.speedup >= 1.4)
        assert o.result.speedup_lower < o.result.speedup < o.result.speedup_upper
        if not o.what.startswith("no pruning"):
            first, at = o.what.split(" and ")[0].split()
            assert o.reached
            assert float(at) < alone.get(first, 1.0)


def test_int4_weights_are_set_beside_pruning_in_decode() -> None:
    found = advise(MODEL, [HARDWARE], 1.4, ["decode"], family=["depth"])
    (int4,) = [o for o in found.alternatives if o.what == "no pruning, weights in int4"]
    (int8,) = [o for o in found.alternatives if o.what == "no pruning, weights in int8"]
    assert int4.result.speedup > int8.result.speedup > 1.0


def test_setting_and_engine_are_respected() -> None:
    (a,) = advise(MODEL, [HARDWARE], 1.4, ["decode"], family=["depth"], scenario=Scenario(engine="hf")).advice
    assert a.result.engine == "hf"
    assert predicted("depth", a.result.sparsity, "decode", "hf")[0] == pytest.approx(a.result.speedup, rel=1e-9)


@pytest.mark.parametrize("target", [1.0, 0.5, float("nan"), float("inf"), -2.0, 1e9])
def test_bad_targets_are_refused(target: float) -> None:
    with pytest.raises(InputError, match="expected a speedup above 1"):
        advise(MODEL, [HARDWARE], target)


@pytest.mark.parametrize(
    ("hardware", "phase", "family", "message"),
    [
        ([HARDWARE], "prefill", "widht", "did you mean width"),
        ([HARDWARE], "prefil", "all", "did you mean prefill"),
        ([], "prefill", "all", "hardware: expected at least one"),
    ],
)
def test_bad_requests_are_refused(hardware: list[str], phase: str, family: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        advise(MODEL, hardware, 1.5, [phase], family=[family])


def test_the_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["advise", MODEL, "--hardware", HARDWARE, "--target", "1.5", "--family", "width,unstructured"]
    assert run([*words, "--verbose"]) == 0
    text = capsys.readouterr().out
    assert "not reachable (at most 1.00 at" in text
    assert "no pruning, weights in int8" in text
    assert run([*words, "--json"]) == 0
    records = [r for r in json.loads(capsys.readouterr().out) if "configuration" not in r]
    assert [(r["family"], r["reached"]) for r in records] == [("width", True), ("unstructured", False)]
    assert records[0]["speedup"] >= 1.5
