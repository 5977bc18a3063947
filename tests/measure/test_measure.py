"""The runner against a replayed device: every fault is flagged, counted, survived or refused, and
nothing is lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from fakes.device import Faults, FaultyDevice
from planted import SHAPES, go, items, plan_of

from calibration.devices.protocol import Operator
from calibration.devices.replay import ReplayDevice, roofline_timings
from calibration.devices.telemetry import UNKNOWN
from calibration.measure.plan import DRIFT_CHECK
from calibration.records.store import Header, records_of
from calibration.records.timing_table import PURPOSES, Flag

pytestmark = pytest.mark.quick

ALL = len(SHAPES)


def _truth(record: Mapping[str, Any]) -> float:
    return roofline_timings()(Operator.from_record(record["operator"]))


def _worst(kept: list[dict[str, Any]]) -> tuple[int, float]:
    records = records_of(kept, Header("planted"))
    rows = records.select(records.purpose != PURPOSES.index(DRIFT_CHECK))
    shapes = zip(rows.m.tolist(), rows.n.tolist(), rows.k.tolist(), strict=True)
    exact = [roofline_timings()(Operator("gemm", m=m, n=n, k=k)) for m, n, k in shapes]
    return len(rows), max(rows.seconds / exact - 1.0)


def test_the_fastest_of_several_visits_is_what_a_shared_machine_can_do() -> None:
    once, rows = go(FaultyDevice(faults=Faults(shared=True)), plan_of(budget_s=60.0))
    assert _worst(rows)[1] > 0.3
    outcome, kept = go(FaultyDevice(faults=Faults(shared=True)), plan_of(budget_s=60.0, visits=5))
    number, worst = _worst(kept)
    assert number == outcome.counts.timed == once.counts.timed == ALL
    assert worst < 0.02
    assert outcome.counts.revisited == 4 * ALL
    orders = {tuple(r["key"] for r in items(kept) if r["visit"] == visit) for visit in range(5)}
    assert [len(order) for order in orders] == [ALL] * 5


def test_visits_share_the_budget_and_a_rerun_makes_those_that_are_missing() -> None:
    first, kept = go(ReplayDevice(setup_s=0.05), plan_of(visits=3, budget_s=7.0))
    assert first.elapsed_s < 7.5
    assert 0 < first.counts.left < ALL
    assert first.counts.timed + first.counts.left == ALL
    assert first.counts.revisited > first.counts.timed
    again, more = go(ReplayDevice(setup_s=0.05), plan_of(visits=3, budget_s=60.0), previous=kept)
    assert again.counts.resumed == first.counts.timed
    visits = [(r["key"], r["visit"]) for r in items(kept + more)]
    assert len(visits) == len(set(visits)) == 3 * ALL


def test_a_quiet_device_is_measured_in_full() -> None:
    outcome, kept = go(ReplayDevice(noise=0.003))
    assert (outcome.stopped, outcome.complete, outcome.problems) == ("", True, ())
    assert outcome.counts.ok == ALL == len(items(kept))
    for record in items(kept):
        assert record["median_s"] == pytest.approx(_truth(record), rel=0.01)
        assert record["lower_s"] <= record["median_s"] <= record["upper_s"]
        assert record["before"]["clock_hz"] == 1.98e9
        assert (record["type"], record["status"]) == ("measurement", "ok")
        assert Operator.from_record(record["operator"]).key == record["key"]
        assert record["samples_s"]


def test_throttled_measurements_are_counted_and_repeated() -> None:
    outcome, kept = go(FaultyDevice(faults=Faults(throttle={3, 4, 9})))
    c = outcome.counts
    assert (c.repeated, c.throttled, c.ok) == (3, 0, ALL)
    assert c.throttled_samples > 0
    repeated = [r for r in items(kept) if r["attempts"] > 1]
    assert sorted(r["attempts"] for r in repeated) == [2, 3]
    for record in repeated:  # the slow samples are not in what is kept
        assert record["median_s"] == pytest.approx(_truth(record))
        assert record["throttled_samples"] > 0


def test_throttling_that_does_not_end_is_flagged_and_the_run_goes_on() -> None:
    outcome, kept = go(FaultyDevice(faults=Faults(throttle=range(5, 8))))
    assert (outcome.counts.throttled, outcome.counts.timed) == (1, ALL)
    (record,) = [r for r in kept if r["status"] == "throttled"]
    assert record["attempts"] == 3
    assert "hw_thermal_slowdown" in record["reason"]
    assert any("throttled" in problem for problem in outcome.problems)


@pytest.mark.parametrize(
    ("faults", "status", "count", "reason"),
    [
        (Faults(noisy={2, 7}), "noisy", 2, "median known to"),
        (Faults(nan={2, 6}), "refused", 2, "nan"),
        (Faults(out_of_memory_bytes=18e6), "skipped", 5, "out of memory"),
    ],
)
def test_faults_are_flagged_with_their_reason(
    faults: Faults, status: str, count: int, reason: str
) -> None:
    outcome, kept = go(FaultyDevice(noise=0.001, faults=faults))
    flagged = [r for r in items(kept) if r["status"] == status]
    assert getattr(outcome.counts, status) == len(flagged) == count
    assert outcome.counts.ok == ALL - count
    assert all(reason in r["reason"] and ("median_s" in r) == (status == "noisy") for r in flagged)


@pytest.mark.parametrize(("drift_per_s", "drifted"), [(0.02, 2), (1e-4, 0)])
def test_clock_drift_above_the_limit_is_flagged_by_the_drift_check(
    drift_per_s: float, drifted: int
) -> None:
    outcome, kept = go(FaultyDevice(faults=Faults(drift_per_s=drift_per_s)))
    first, *later = [r["drift"] for r in kept if r["purpose"] == DRIFT_CHECK]
    assert first == 0.0 < min(later)
    assert (max(later) > 0.02) == (drifted > 0)
    assert outcome.counts.drifted == drifted
    assert any("drift checks differ" in problem for problem in outcome.problems) == (drifted > 0)


def test_a_missing_nvml_is_unknown_and_not_fine() -> None:
    outcome, kept = go(FaultyDevice(faults=Faults(nvml=False, throttle={3})))
    assert all(set(r["before"].values()) == {UNKNOWN} for r in kept)
    # throttled or not, nobody can tell
    assert (outcome.counts.ok, outcome.counts.repeated) == (ALL, 0)


def test_a_lost_device_stops_the_run_with_the_reason_and_keeps_the_rest() -> None:
    outcome, kept = go(FaultyDevice(faults=Faults(lost_at=8)))
    assert outcome.stopped == "device lost: planted: the device has fallen off the bus"
    assert not outcome.complete
    # a later run does not begin with it
    assert [r["status"] for r in items(kept)] == ["ok"] * 7 + ["failed"]
    assert kept[-1]["reason"] == "device lost: planted: the device has fallen off the bus"
    assert (outcome.counts.failed, outcome.counts.left) == (1, ALL - 8)
    outcome, kept = go(FaultyDevice(faults=Faults(lost_at=0)))  # at the first drift check
    assert outcome.stopped.startswith("device lost: ")
    assert kept == []


def test_a_power_cap_that_lowers_the_clock_of_some_operators_is_flagged() -> None:
    outcome, kept = go(FaultyDevice(faults=Faults(capped={3, 7})))
    # a repeat would have the same clock
    assert (outcome.counts.ok, outcome.counts.repeated) == (ALL, 0)
    (line,) = outcome.problems
    assert line.startswith(
        f"2 of {ALL} timed operators ran at the power limit, at a clock over 3% below the highest"
    )
    records = records_of(kept, Header("planted"))
    assert int((records.flags & Flag.POWER_CAPPED > 0).sum()) == 2
    for slow in ((), range(1000)):  # a clock that does not change is that of the device under load
        outcome, kept = go(FaultyDevice(faults=Faults(capped=slow)))
        assert outcome.problems == ()
        assert not records_of(kept, Header("planted")).flags.any()


def test_a_kernel_that_raises_costs_one_shape_and_five_in_a_row_the_run() -> None:
    outcome, kept = go(FaultyDevice(faults=Faults(raises=range(5, 7))))
    assert (outcome.counts.failed, outcome.stopped) == (2, "")
    reasons = {r["reason"] for r in kept if r["status"] == "failed"}
    assert reasons == {"RuntimeError: mat1 and mat2 shapes cannot be multiplied"}
    outcome, _ = go(FaultyDevice(faults=Faults(raises=range(5, 1000))))
    assert outcome.counts.failed == 5
    assert "5 operators in a row failed" in outcome.stopped


def test_a_shape_disturbed_by_other_processes_is_repeated_once_unless_all_are() -> None:
    outcome, kept = go(FaultyDevice(noise=0.002, faults=Faults(waits={5: 0.5})))
    assert (outcome.counts.repeated, outcome.counts.ok) == (1, ALL)
    assert max(r["waited"] for r in kept) <= 0.05
    outcome, kept = go(FaultyDevice(noise=0.002, faults=Faults(wait=0.12)))
    assert outcome.counts.repeated <= 2
    assert outcome.counts.noisy == ALL
    assert all("other processes took" in r["reason"] for r in items(kept))
