"""The runner: budget, interruption, resumption, kills; and the probe that precedes a plan."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calibration.devices.protocol import Description, DeviceLost, Operator
from calibration.devices.replay import Faults, ReplayDevice
from calibration.measure.interrupt import Interrupt
from calibration.measure.plan import ANCHOR, Plan, Rates, base_plan, for_model
from calibration.measure.probe import default_protocol, default_visits, probe
from calibration.measure.run import Outcome, run
from calibration.measure.timing import Protocol
from calibration.records.store import Header, Store, read_store
from simulator.errors import InputError

RATES = Rates(1e14, 1.5e12, 3e-6)
SHAPES = [(m, n, 512) for m in (1, 16, 128, 1024) for n in (256, 1024, 4096, 8192, 16384, 2048, 3072, 5120, 6144, 7168)]
PROTOCOL = Protocol(time_limit_s=0.5)


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


ROOT = Path(__file__).resolve().parents[2]


# -- budget, interruption, resumption ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget_s", [20.0, 60.0, 200.0])
@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_budget_holds_though_estimates_are_wrong(budget_s: float, factor: float) -> None:
    protocol = Protocol(time_limit_s=0.5)
    plan = base_plan(RATES, budget_s=3 * budget_s, protocol=protocol)
    device = ReplayDevice(noise=0.05, setup_s=0.05 * factor)
    outcome = run(plan, device, lambda r: None, protocol=protocol, budget_s=budget_s)
    assert outcome.stopped == "budget"
    assert outcome.complete
    assert 0.9 * budget_s <= outcome.elapsed_s <= 1.1 * budget_s


def test_a_budget_of_zero_is_refused() -> None:
    with pytest.raises(InputError, match="budget"):
        _go(ReplayDevice(), budget_s=0.0)


def test_a_rerun_measures_what_is_missing_and_keeps_the_reference() -> None:
    _, first = _go(ReplayDevice(faults=Faults(lost_at=12)))
    slower = ReplayDevice(lambda op: 1.1 * ReplayDevice()._seconds(op))
    outcome, second = _go(slower, previous=first)
    assert outcome.counts.resumed == 11
    assert {r["key"] for r in _items(first)} | {r["key"] for r in _items(second)} == {
        i.operator.key for i in _plan().items
    }
    assert not {r["key"] for r in _items(first)} & {r["key"] for r in _items(second)}
    anchors = [r for r in second if r["purpose"] == ANCHOR]
    assert all(r["drift"] == pytest.approx(0.1) and r["drifted"] for r in anchors)  # against the first run's anchor
    assert anchors[0]["block"] == max(r["block"] for r in first) + 1


def test_a_finished_run_does_nothing_when_run_again() -> None:
    _, first = _go(ReplayDevice())
    outcome, second = _go(ReplayDevice(), previous=first)
    assert second == []
    assert outcome.counts.resumed == len(SHAPES)
    assert outcome.stopped == ""


def test_skipped_and_refused_shapes_are_not_tried_again() -> None:
    _, first = _go(ReplayDevice(faults=Faults(nan={2}, out_of_memory_bytes=1e7)))
    _, second = _go(ReplayDevice(), previous=first)
    assert _items(second) == []


def test_an_interruption_is_taken_between_samples() -> None:
    flag = Interrupt()
    kept: list[Mapping[str, Any]] = []

    def append(record: Mapping[str, Any]) -> None:
        kept.append(record)
        if len(kept) == 6:
            flag.set()

    outcome = run(_plan(), ReplayDevice(), append, protocol=PROTOCOL, interrupt=flag)
    assert outcome.stopped == "interrupted"
    assert not outcome.complete
    assert len(kept) == 6
    assert outcome.counts.left == len(SHAPES) - 5


def test_ctrl_c_ends_the_run_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    kept: list[Mapping[str, Any]] = []

    def append(record: Mapping[str, Any]) -> None:
        kept.append(record)
        if len(kept) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    outcome = run(_plan(), ReplayDevice(), append, protocol=PROTOCOL)
    assert outcome.stopped == "interrupted"
    assert len(kept) == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_the_program() -> None:
    def twice() -> None:
        with Interrupt():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        twice()


def test_outside_the_main_thread_no_handler_is_touched() -> None:
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(_go(ReplayDevice())[0]))
    thread.start()
    thread.join(30)
    assert outcomes[0].counts.ok == len(SHAPES)


def test_a_store_that_cannot_write_ends_the_run_and_the_error_says_so() -> None:
    kept: list[Mapping[str, Any]] = []

    def append(record: Mapping[str, Any]) -> None:
        if len(kept) == 5:
            raise InputError("records.jsonl: cannot be written: No space left on device")
        kept.append(record)

    with pytest.raises(InputError, match="No space left"):
        run(_plan(), ReplayDevice(), append, protocol=PROTOCOL)
    assert len(kept) == 5


def test_a_real_store_takes_the_records(tmp_path: Path) -> None:
    device = ReplayDevice(noise=0.002, faults=Faults(nan={2}))
    description = device.describe()
    header = Header(description.device, dict(description.stack), "bf16")
    with Store(tmp_path / "records.jsonl", header) as store:
        outcome = run(_plan(), device, store.append, previous=store.rows, protocol=PROTOCOL)
    rows = read_store(tmp_path / "records.jsonl").rows
    assert len(rows) == len(SHAPES) + outcome.counts.anchors
    with Store(tmp_path / "records.jsonl", header) as store:
        again = run(_plan(), device, store.append, previous=store.rows, protocol=PROTOCOL)
    assert again.counts.resumed == len(SHAPES)


_VICTIM = """
    import sys, time
    from calibration.devices.replay import ReplayDevice
    from calibration.measure.run import run
    from calibration.measure.plan import Rates, for_model
    from calibration.records.store import Header, Store
    from calibration.measure.timing import Protocol

    shapes = [(m, n, 512) for m in (1, 16, 128, 1024) for n in range(256, 2816, 256)]
    with Store(sys.argv[1], Header("planted", {}, "bf16")) as store:
        def append(record):
            store.append(record)
            print(record["key"], record["purpose"], flush=True)  # acknowledged
            time.sleep(0.002)
        run(for_model(shapes, Rates(1e14, 1e12)), ReplayDevice(), append, previous=store.rows, protocol=Protocol(time_limit_s=0.5))
    print("finished", flush=True)
"""


def test_killed_runs_lose_nothing_acknowledged_and_the_last_one_finishes(tmp_path: Path) -> None:
    path, acknowledged = tmp_path / "records.jsonl", []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(_VICTIM), str(path)]
    finished = False
    for turn in range(40):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        for count, line in enumerate(process.stdout):
            if line.strip() == "finished":
                finished = True
            else:
                acknowledged.append(line.split(" ")[:-1])
            if count == 3 + turn % 3 and turn < 6:
                process.kill()
                break
        process.stdout.close()
        process.wait(30)
        if finished:
            break
    assert finished
    rows = read_store(path).rows
    items = [r["key"] for r in rows if r["purpose"] != ANCHOR]
    assert len(items) == len(set(items)) == 40
    assert {" ".join(words) for words in acknowledged} <= {r["key"] for r in rows}


# -- what a plan needs to know ----------------------------------------------------------------------------------------------------


def test_the_probe_finds_planted_rates() -> None:
    device = ReplayDevice(lambda op: 4e-6 + max(op.flops / 2e14, op.bytes / 1e12), setup_s=0.01)
    rates = probe(device, "bf16")
    assert rates.flop_per_s == pytest.approx(2e14, rel=0.1)
    assert rates.bytes_per_s == pytest.approx(1e12, rel=0.1)
    assert rates.floor_s == pytest.approx(4e-6, rel=0.01)
    assert rates.memory_bytes == 80e9


def test_the_probe_tells_how_noisy_a_device_is_and_a_plan_counts_on_it() -> None:
    quiet, noisy = (probe(ReplayDevice(lambda op: 1e-3, noise=noise), "bf16") for noise in (0.0, 0.05))
    assert quiet.noise == 0.0
    assert 0.02 < noisy.noise < 0.12
    op, protocol = Operator("gemm", m=512, n=512, k=512), Protocol(time_limit_s=2.0)
    assert noisy.cost_s(op, protocol) > 1.5 * quiet.cost_s(op, protocol)


def test_the_probe_takes_what_fits_a_small_device() -> None:
    device = ReplayDevice(lambda op: 1e-5 + op.flops / 1e13, faults=Faults(out_of_memory_bytes=2e6))
    assert probe(device, "bf16").flop_per_s > 0


def test_the_probe_of_a_slow_format_is_short() -> None:
    device = ReplayDevice(lambda op: 1e-5 + op.flops / 1e9)
    assert probe(device, "bf16").flop_per_s == pytest.approx(1e9, rel=0.01)
    assert device.clock() < 3.0


def test_the_probe_names_a_format_the_device_lacks() -> None:
    with pytest.raises(ValueError, match="fp8"):
        probe(ReplayDevice(refused={"gemm": "no"}), "fp8")


def test_protocols_follow_device_and_budget() -> None:
    cpu, gpu = Description("cpu", "CPU"), Description("cuda:0", "GPU")
    for device in (cpu, gpu):  # visits share the time of an item
        longest = default_visits(device) * default_protocol(device, 6000.0).time_limit_s
        assert default_visits(device) * default_protocol(device, 60.0).time_limit_s < longest == 2.0
    with pytest.raises(InputError):
        default_protocol(cpu, math.nan)


def test_a_lost_device_is_lost_for_good() -> None:
    device = ReplayDevice(faults=Faults(lost_at=0))
    prepared = device.prepare(Operator("copy", n=8))
    with pytest.raises(DeviceLost):
        [prepared.sample(1) for _ in range(5)]
    with pytest.raises(DeviceLost, match="lost before"):
        device.prepare(Operator("copy", n=8))
