"""The runner against a replayed device: every fault is flagged, counted, survived or refused, and nothing acknowledged is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calibration.devices.protocol import Operator
from calibration.devices.replay import Faults, ReplayDevice
from calibration.devices.telemetry import UNKNOWN, Snapshot
from calibration.measure.plan import ANCHOR, Plan, Rates, for_model
from calibration.measure.run import STATUSES, Outcome, Progress, run
from calibration.measure.timing import Protocol
from calibration.records.recorded import records_of
from calibration.records.records import PURPOSES
from calibration.records.store import Header

RATES = Rates(1e14, 1.5e12, 3e-6)
SHAPES = [(m, n, 512) for m in (1, 16, 128, 1024) for n in (256, 1024, 4096, 8192, 16384, 2048, 3072, 5120, 6144, 7168)]
PROTOCOL = Protocol(time_limit_s=0.5)
ROOT = Path(__file__).resolve().parents[2]


def _plan(shapes: list[tuple[int, int, int]] = SHAPES, **changes: Any) -> Plan:
    return replace(for_model(shapes, RATES, protocol=PROTOCOL), **changes)


def _go(device: ReplayDevice, plan: Plan | None = None, **options: Any) -> tuple[Outcome, list[dict[str, Any]]]:
    kept: list[dict[str, Any]] = []
    outcome = run(
        plan or _plan(),
        device,
        lambda r: kept.append(json.loads(json.dumps(r, allow_nan=False))),
        protocol=PROTOCOL,
        **options,
    )
    return outcome, kept


def _items(kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in kept if r["purpose"] != ANCHOR]


# -- several visits ---------------------------------------------------------------------------------------------------------------


class _Shared(ReplayDevice):
    """A machine that others slow down by 40 % for 0.4 simulated seconds in every one."""

    def play(self, operator: Operator, number: int, sample: int, loops: int) -> float:
        slow = 1.4 if self.clock() % 1.0 > 0.6 else 1.0
        return slow * super().play(operator, number, sample, loops)


def _worst(kept: list[dict[str, Any]]) -> tuple[int, float]:
    records = records_of(kept, Header("planted"))
    truth, rows = ReplayDevice(), records.select(records.purpose != PURPOSES.index(ANCHOR))
    exact = [
        truth._seconds(Operator("gemm", m=int(m), n=int(n), k=int(k)))
        for m, n, k in zip(rows.m, rows.n, rows.k, strict=True)
    ]
    return len(rows), max(float(t) / e - 1.0 for t, e in zip(rows.seconds, exact, strict=True))


def test_the_fastest_of_several_visits_is_what_a_shared_machine_can_do() -> None:
    once, rows = _go(_Shared(), _plan(budget_s=60.0))
    assert _worst(rows)[1] > 0.3
    outcome, kept = _go(_Shared(), _plan(budget_s=60.0, visits=5))
    number, worst = _worst(kept)
    assert number == len(SHAPES)
    assert worst < 0.02
    assert outcome.counts.timed == once.counts.timed == len(SHAPES)
    assert outcome.counts.revisited == 4 * len(SHAPES)
    assert {r["visit"] for r in _items(kept)} == set(range(5))
    orders = [[r["key"] for r in _items(kept) if r["visit"] == v] for v in range(5)]
    assert len({tuple(o) for o in orders}) == 5


def test_visits_share_the_budget_and_a_rerun_makes_those_that_are_missing() -> None:
    plan = _plan(visits=3)
    first, kept = _go(ReplayDevice(setup_s=0.05), plan, budget_s=7.0)
    assert first.elapsed_s < 7.5
    assert 0 < first.counts.left < len(SHAPES)
    assert first.counts.timed + first.counts.left == len(SHAPES)
    assert first.counts.revisited > first.counts.timed
    again, more = _go(ReplayDevice(setup_s=0.05), plan, previous=kept, budget_s=60.0)
    assert again.counts.resumed == first.counts.timed
    visits = [(r["key"], r["visit"]) for r in _items(kept + more)]
    assert len(visits) == len(set(visits)) == 3 * len(SHAPES)


def test_what_has_no_time_at_first_is_not_visited_again() -> None:
    outcome, kept = _go(ReplayDevice(faults=Faults(out_of_memory_bytes=5e6)), _plan(visits=2))
    assert outcome.counts.skipped > 0
    assert len(_items(kept)) == outcome.counts.skipped + 2 * outcome.counts.ok


# -- a healthy device -------------------------------------------------------------------------------------------------------------


def test_a_quiet_device_is_measured_in_full() -> None:
    device = ReplayDevice(noise=0.003)
    outcome, kept = _go(device)
    assert outcome.stopped == ""
    assert outcome.complete
    assert outcome.counts.ok == len(SHAPES) == len(_items(kept))
    assert outcome.problems == ()
    truth = ReplayDevice()
    for record in _items(kept):
        exact = truth._seconds(Operator.from_record(record["operator"]))
        assert record["median_s"] == pytest.approx(exact, rel=0.01)
        assert record["lower_s"] <= record["median_s"] <= record["upper_s"]
        assert record["before"]["clock_hz"] == 1.98e9


def test_records_name_the_operator_and_how_it_was_timed() -> None:
    _, kept = _go(ReplayDevice(), _plan([(8, 64, 64)]))
    (record,) = _items(kept)
    assert record["type"] == "measurement"
    assert Operator.from_record(record["operator"]).key == record["key"]
    assert record["status"] in STATUSES
    assert record["method"] == "replayed"
    assert record["samples_s"]


def test_anchors_come_first_every_twentieth_and_last() -> None:
    _, kept = _go(ReplayDevice())
    places = [i for i, record in enumerate(kept) if record["purpose"] == ANCHOR]
    assert places == [0, 21, 42]
    assert [kept[i]["block"] for i in places] == [1, 2, 3]
    assert {record["block"] for record in kept[1:21]} == {1}


def test_progress_is_told_after_every_item() -> None:
    seen: list[Progress] = []
    _go(ReplayDevice(), progress=seen.append)
    assert [p.done for p in seen] == list(range(1, len(SHAPES) + 1))
    assert all(p.total == len(SHAPES) for p in seen)
    assert seen[-1].remaining_s == 0.0
    assert seen[0].remaining_s > seen[-5].remaining_s > 0.0


# -- faults of the device ---------------------------------------------------------------------------------------------------------


def test_throttled_measurements_are_counted_and_repeated() -> None:
    device = ReplayDevice(faults=Faults(throttle={3, 4, 9}))
    outcome, kept = _go(device)
    assert outcome.counts.repeated == 3
    assert outcome.counts.throttled_samples > 0
    assert outcome.counts.throttled == 0
    assert outcome.counts.ok == len(SHAPES)
    repeated = [r for r in _items(kept) if r["attempts"] > 1]
    assert sorted(r["attempts"] for r in repeated) == [2, 3]
    truth = ReplayDevice()
    for record in repeated:  # the slow samples are not in what is kept
        assert record["median_s"] == pytest.approx(truth._seconds(Operator.from_record(record["operator"])))
        assert record["throttled_samples"] > 0


def test_throttling_that_does_not_end_is_flagged_and_the_run_goes_on() -> None:
    outcome, kept = _go(ReplayDevice(faults=Faults(throttle=range(5, 8))))
    assert outcome.counts.throttled == 1
    (record,) = [r for r in kept if r["status"] == "throttled"]
    assert record["attempts"] == 3
    assert "hw_thermal_slowdown" in record["reason"]
    assert any("throttled" in problem for problem in outcome.problems)
    assert outcome.counts.timed == len(SHAPES)


def test_noise_is_flagged() -> None:
    outcome, kept = _go(ReplayDevice(noise=0.001, faults=Faults(noisy={2, 7}, noise=0.5)))
    assert outcome.counts.noisy == 2
    noisy = [r for r in _items(kept) if r["status"] == "noisy"]
    assert all("interval of the median" in r["reason"] for r in noisy)


def test_clock_drift_is_flagged_by_the_anchor() -> None:
    device = ReplayDevice(faults=Faults(drift_per_s=0.02))
    outcome, kept = _go(device)
    drifts = [r["drift"] for r in kept if r["purpose"] == ANCHOR]
    assert drifts[0] == 0.0
    assert drifts[1] > 0.02
    assert outcome.counts.drifted == 2
    assert any("drifted by" in problem for problem in outcome.problems)


def test_drift_below_the_limit_is_not_flagged() -> None:
    outcome, kept = _go(ReplayDevice(faults=Faults(drift_per_s=1e-4)))
    assert outcome.counts.drifted == 0
    assert 0 < max(r["drift"] for r in kept if r["purpose"] == ANCHOR) < 0.02


def test_a_time_that_is_not_a_number_is_refused_and_counted() -> None:
    outcome, kept = _go(ReplayDevice(faults=Faults(nan={2, 6})))
    assert outcome.counts.refused == 2
    refused = [r for r in kept if r["status"] == "refused"]
    assert all("median_s" not in r and "nan" in r["reason"] for r in refused)
    assert outcome.counts.ok == len(SHAPES) - 2


def test_out_of_memory_is_skipped_and_counted() -> None:
    limit = sorted(Operator("gemm", m=m, n=n, k=k).footprint_bytes for m, n, k in SHAPES)[-6]
    outcome, kept = _go(ReplayDevice(faults=Faults(out_of_memory_bytes=limit)))
    assert outcome.counts.skipped == 5
    assert outcome.counts.ok == len(SHAPES) - 5
    assert all("out of memory" in r["reason"] for r in kept if r["status"] == "skipped")


def test_a_missing_nvml_is_unknown_and_not_fine() -> None:
    outcome, kept = _go(ReplayDevice(faults=Faults(nvml=False, throttle={3})))
    assert outcome.counts.ok == len(SHAPES)
    assert all(set(r["before"].values()) == {UNKNOWN} for r in kept)
    assert outcome.counts.repeated == 0  # throttled or not, nobody can tell


def test_a_lost_device_stops_the_run_with_the_reason_and_keeps_the_rest() -> None:
    outcome, kept = _go(ReplayDevice(faults=Faults(lost_at=8)))
    assert outcome.stopped.startswith("device lost: ")
    assert "fallen off the bus" in outcome.stopped
    assert not outcome.complete
    assert len(_items(kept)) == 7
    assert all(r["status"] == "ok" for r in kept)
    assert outcome.counts.left == len(SHAPES) - 7


def test_a_device_lost_at_the_first_anchor_keeps_nothing_and_says_so() -> None:
    outcome, kept = _go(ReplayDevice(faults=Faults(lost_at=0)))
    assert outcome.stopped.startswith("device lost: ")
    assert kept == []


def test_what_a_device_lacks_is_named() -> None:
    device = ReplayDevice(refused={"gemm_2to4": "gemm_2to4 needs sparse tensor cores"})
    ops = [Operator("gemm_2to4", m=16, n=64, k=64), Operator("gemm", m=16, n=64, k=64)]
    outcome, kept = _go(device, for_model(ops, RATES))
    assert outcome.counts.unsupported == 1
    assert [r["reason"] for r in kept if r["status"] == "unsupported"] == ["gemm_2to4 needs sparse tensor cores"]


class Breaking(ReplayDevice):
    """A device whose kernels raise for some shapes."""

    def __init__(self, broken: range) -> None:
        super().__init__()
        self.broken = broken

    def prepare(self, operator: Operator) -> Any:
        prepared = super().prepare(operator)
        if len(self.prepared) - 1 in self.broken:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nlong trace")
        return prepared


def test_a_kernel_that_raises_costs_one_shape() -> None:
    outcome, kept = _go(Breaking(range(5, 7)))
    assert outcome.counts.failed == 2
    assert outcome.stopped == ""
    assert {r["reason"] for r in kept if r["status"] == "failed"} == {
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied"
    }


def test_a_device_on_which_everything_fails_is_given_up() -> None:
    outcome, _ = _go(Breaking(range(5, 1000)))
    assert outcome.counts.failed == 5
    assert "5 operators in a row failed" in outcome.stopped


class Shared(ReplayDevice):
    """A device on which other processes take a share of the time, more of it during some preparations."""

    def __init__(self, usual: float, unusual: Mapping[int, float]) -> None:
        super().__init__(noise=0.002)
        self.usual, self.unusual, self.total, self.last = usual, unusual, 0.0, 0.0

    def snapshot(self) -> Snapshot:
        share = self.unusual.get(len(self.prepared) - 1, self.usual)
        self.total += share * (self.clock() - self.last)
        self.last = self.clock()
        return Snapshot(throttle=(), waited_s=self.total)


def test_a_shape_disturbed_by_other_processes_is_repeated_once() -> None:
    outcome, kept = _go(Shared(0.0, {5: 0.5}))
    assert outcome.counts.repeated == 1
    assert outcome.counts.ok == len(SHAPES)
    assert max(r["waited"] for r in kept) <= 0.05


def test_on_a_machine_that_is_always_shared_nothing_is_repeated_for_ever() -> None:
    outcome, kept = _go(Shared(0.12, {}))
    assert outcome.counts.repeated <= 2
    assert outcome.counts.noisy == len(SHAPES)
    assert all("other processes took" in r["reason"] for r in _items(kept))
