"""The runner: budget, interruption, resumption, kills; and the probe that precedes a plan."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes.device import Faults, FaultyDevice
from planted import MANY, PROTOCOL, RATES, SHAPES, go, items, plan_of

from calibration.devices.replay import ReplayDevice, roofline_timings
from calibration.measure.plan import DRIFT_CHECK, base_plan, probe
from calibration.measure.run import run
from calibration.records.store import parse, read_store

ALL = len(SHAPES)


@pytest.mark.parametrize(("budget_s", "factor"), [(20.0, 1.0), (120.0, 0.3), (120.0, 4.0)])
def test_the_budget_holds_though_estimates_are_wrong(budget_s: float, factor: float) -> None:
    plan = replace(base_plan(RATES, budget_s=3 * budget_s, protocol=PROTOCOL), budget_s=budget_s)
    outcome, _ = go(ReplayDevice(noise=0.05, setup_s=0.05 * factor), plan)
    assert (outcome.stopped, outcome.complete) == ("budget", True)
    assert 0.9 * budget_s <= outcome.elapsed_s <= 1.1 * budget_s


def test_a_rerun_measures_what_is_missing_and_keeps_the_reference() -> None:
    _, first = go(FaultyDevice(faults=Faults(lost_at=12)))
    slower = ReplayDevice(lambda op: 1.1 * roofline_timings()(op))
    outcome, second = go(slower, previous=first)
    assert outcome.counts.resumed == 12  # with the operator that lost the device
    keys = [r["key"] for r in items(first) + items(second)]
    assert sorted(keys) == sorted(item.operator.key for item in plan_of().items)
    checks = [r for r in second if r["purpose"] == DRIFT_CHECK]
    # against the first run's check
    assert all(r["drift"] == pytest.approx(0.1) and r["drifted"] for r in checks)
    assert checks[0]["block"] == max(r["block"] for r in first) + 1


@pytest.mark.parametrize("faults", [Faults(), Faults(nan={2}, out_of_memory_bytes=1e7)])
def test_a_finished_run_does_nothing_when_run_again(faults: Faults) -> None:
    _, first = go(FaultyDevice(faults=faults))
    # skipped and refused shapes are not tried again
    outcome, second = go(ReplayDevice(), previous=first)
    assert second == []
    assert (outcome.counts.resumed, outcome.stopped) == (ALL, "")


class Keeping(list[Mapping[str, Any]]):
    """A store in memory that does something when it holds so many records."""

    def __init__(self, many: int, then: Callable[[], Any]) -> None:
        self.many, self.then = many, then

    def __call__(self, record: Mapping[str, Any]) -> None:
        self.append(record)
        if len(self) == self.many:
            self.then()


def test_ctrl_c_ends_the_run_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    kept = Keeping(4, lambda: os.kill(os.getpid(), signal.SIGINT))
    outcome = run(plan_of(), ReplayDevice(), kept, protocol=PROTOCOL)
    assert outcome.stopped == "interrupted"
    assert len(kept) == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_a_store_that_cannot_write_ends_the_run_and_the_error_says_so() -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "cannot be written: No space left on device", "records.jsonl")

    kept = Keeping(6, full)
    with pytest.raises(OSError, match="No space left"):
        run(plan_of(), ReplayDevice(), kept, protocol=PROTOCOL)
    assert len(kept) == 6


VICTIM = """
import sys, time
from planted import MANY, PROTOCOL, plan_of
from calibration.devices.replay import ReplayDevice
from calibration.measure.run import run
from calibration.records.store import Header, Store

def append(record):
    store.append(record)
    print(record["key"], flush=True)  # acknowledged
    time.sleep(0.002)

with Store(sys.argv[1], Header("planted")) as store:
    run(plan_of(MANY), ReplayDevice(noise=0.01), append, previous=store.rows, protocol=PROTOCOL)
"""


def test_killed_runs_lose_nothing_acknowledged_and_the_last_one_finishes(tmp_path: Path) -> None:
    path, acknowledged, rng = tmp_path / "records.jsonl", set[str](), random.Random(7)
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here, *here.parents[:2])))}
    for last in [False] * 8 + [True]:
        command = [sys.executable, "-c", VICTIM, str(path)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment
        ) as victim:
            said = [victim.stdout.readline() for _ in range(rng.randrange(6))]
            if not last:
                time.sleep(rng.random() * 0.004)
                victim.kill()
            said += victim.stdout.readlines()  # acknowledged before it died, still in the pipe
        acknowledged |= {line.strip() for line in said}
        content = parse(path.read_bytes() if path.exists() else b"", "file")
        rows = content.rows if content else ()  # none: killed before its header was on the disk
        assert acknowledged <= {r["key"] for r in rows}
        assert len({r["key"] for r in items(list(rows))}) == len(items(list(rows)))
        assert all(r["samples_s"] for r in rows)
    assert (victim.returncode, read_store(path).dropped) == (0, 0)
    assert {r["key"] for r in items(list(rows))} == {
        item.operator.key for item in plan_of(MANY).items
    }


def test_the_probe_finds_planted_rates() -> None:
    device = ReplayDevice(lambda op: 4e-6 + max(op.flops / 2e14, op.bytes / 1e12), setup_s=0.01)
    rates = probe(device, "bf16")
    assert rates.flop_per_s == pytest.approx(2e14, rel=0.1)
    assert rates.bytes_per_s == pytest.approx(1e12, rel=0.1)
    assert rates.floor_s == pytest.approx(4e-6, rel=0.01)
    assert rates.memory_bytes == 80e9


def test_the_probe_takes_what_fits_a_small_device_and_little_time_of_a_slow_one() -> None:
    small = FaultyDevice(lambda op: 1e-5 + op.flops / 1e13, faults=Faults(out_of_memory_bytes=2e6))
    assert probe(small, "bf16").flop_per_s > 0
    slow = ReplayDevice(lambda op: 1e-5 + op.flops / 1e9)
    assert probe(slow, "bf16").flop_per_s == pytest.approx(1e9, rel=0.01)
    assert slow.clock() < 3.0
    with pytest.raises(ValueError, match="fp8"):
        probe(ReplayDevice(refused={"gemm": "no"}), "fp8")
