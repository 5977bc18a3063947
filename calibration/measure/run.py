"""Run a measurement plan on a device, with one record per operator.

A measurement is repeated if the device throttles or other processes use the CPU. A lost device, a
failed graph capture or an interrupt ends the run with a reason, and all earlier records are kept. A
resumed run does not repeat the operator that lost the device (recorded as failed) or whose capture
failed (unsupported).

A record is a JSON-ready mapping:

- ``type``: ``"measurement"``
- ``key``: the operator as text; equal operators have equal keys
- ``operator``: the operator's fields
- ``purpose``: ``fit``, ``holdout``, ``exact`` or ``drift_check``
- ``status``: ``ok``, ``noisy``, ``throttled`` (also when repeated); without a time ``skipped`` (out
  of memory), ``unsupported``, ``refused`` (invalid time), ``failed`` (the kernel raised an
  exception)
- ``reason``: why it is not ``ok``
- ``median_s``, ``lower_s``, ``upper_s``: median and its 95 % interval, null where samples are too
  few for an interval
- ``samples_s``, ``warmup_s``: raw, untrimmed times; ``loops``
- ``method``: how launches were timed and kept cold
- ``before``, ``after``: telemetry; a GPU's is read under load, ``after`` during the samples
- ``steady``: throttle reasons of a device that always throttles, whose times count
- ``visit``: round of the plan, from 0; the fastest counts (``calibration.records.store``)
- ``spent_s``: time of the whole measurement, with its preparation
- ``attempts``: number of measurements; ``throttled_samples`` were discarded because of throttling
- ``waited``: share of the time in which this process waited for a CPU, where the system counts it
- ``block``: number of the last drift check before this record
- ``watts``: mean power while the operator repeats (:mod:`calibration.measure.power`), of some
  operators of the fit
- ``drift``: drift checks: change from the first; ``drifted`` if it exceeds the limit and intervals
  are disjoint
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from calibration.devices.protocol import (
    NOT_CAPTURABLE,
    CaptureFailed,
    Device,
    DeviceLost,
    Operator,
    OutOfMemory,
    Prepared,
    Sampler,
    Unsupported,
)
from calibration.devices.telemetry import UNKNOWN, Snapshot, throttled, waited
from calibration.measure.plan import (
    DRIFT_CHECK,
    DRIFT_CHECK_EVERY,
    FIT,
    Item,
    MeasurementPlan,
)
from calibration.measure.power import BUSY, launches, mean_power
from calibration.measure.timing import NOISY, OK, InvalidTiming, Protocol, Timing, measure
from calibration.records.store import (
    CLOCK_LIMIT,
    DRIFT_LIMIT,
    STATUSES,
    WAIT_LIMIT,
    power_capped,
)
from calibration.records.timing_table import Row

_, _, THROTTLED, SKIPPED, UNSUPPORTED, REFUSED, FAILED = STATUSES

MAX_ATTEMPTS = 3
# throttled operators in a row after which throttling is the device's steady state: a rest of
# seconds does not cool it
ALWAYS_THROTTLED = 3
_FAILURES_IN_A_ROW = 5
POWER_SHARE = 0.1  # largest share of a run that measures power
# a GPU reaches its power limit in about a second
SUSTAINED, SUSTAINED_S, SUSTAINED_SIZE = "sustained", 3.0, 8192
SUSTAINED_PROTOCOL = f"time of a GEMM of {SUSTAINED_SIZE}^3 under load, over that of a measurement"
CAPTURE_FAILED, LOST = "capture failed", "device lost"


class Interrupted(Exception):
    """The user requested an end; raised between two samples, never inside a write."""


class Interrupt:
    """Turn the first Ctrl-C into a flag that is read between samples; a second Ctrl-C ends the
    program as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._old: Any = None

    def watched(self, sample: Sampler) -> Sampler:
        def watched(loops: int) -> float:
            if self.requested:
                raise Interrupted
            return sample(loops)

        return watched

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.signal(signal.SIGINT, self._old)
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._old = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)


@dataclass
class Counts:
    """Number of operators per status; ``drifted`` counts drift checks, ``repeated`` and
    ``revisited`` measurements."""

    ok: int = 0
    noisy: int = 0
    throttled: int = 0
    skipped: int = 0
    unsupported: int = 0
    refused: int = 0
    failed: int = 0
    repeated: int = 0
    revisited: int = 0
    throttled_samples: int = 0
    drift_checks: int = 0
    drifted: int = 0
    resumed: int = 0  # measured in an earlier run
    left: int = 0  # not measured, because the time was up or the run stopped

    @property
    def timed(self) -> int:
        return self.ok + self.noisy + self.throttled

    def add(self, status: str, number: int = 1) -> None:
        setattr(self, status, getattr(self, status) + number)


@dataclass(frozen=True)
class Outcome:
    counts: Counts
    elapsed_s: float  # on the device's clock
    # reason of an early end: "budget", "interrupted", "device lost: ..." or "capture failed: ...",
    # or ""
    stopped: str
    problems: tuple[str, ...]  # one line per operator without a time, and one for drift

    @property
    def complete(self) -> bool:
        return self.stopped in ("", "budget")

    @property
    def needs_new_process(self) -> bool:
        """Return whether this process can measure nothing more, but a new process may: errors of
        CUDA stay with it."""
        return self.stopped.startswith((CAPTURE_FAILED, LOST))


@dataclass
class _Run:
    device: Device
    append: Callable[[Mapping[str, Any]], Any]
    protocol: Protocol
    interrupt: Interrupt
    counts: Counts = field(default_factory=Counts)
    problems: list[str] = field(default_factory=list)
    # median, lower, upper of the first drift check
    reference: tuple[float, float, float] | None = None
    block: int = 0
    threads: int = 1
    waits: list[float] = field(default_factory=lambda: [WAIT_LIMIT])  # shares of waiting so far
    drifts: list[float] = field(default_factory=list)
    # during the samples of each timed operator
    telemetry: list[Mapping[str, Any]] = field(default_factory=list)
    lost: DeviceLost | None = None  # ends the run after the record of its operator
    # shortest time per operator, and its status
    fastest: dict[str, tuple[float, str]] = field(default_factory=dict)
    timed: set[str] = field(default_factory=set)  # operators with a time
    throttled: int = 0  # throttled operators in a row
    start: float = 0.0
    power_s: float = 0.0  # spent on power so far

    def record(self, item: Item, protocol: Protocol) -> Row:
        """Measure one operator and return its record; DeviceLost goes to ``lost``. Only Interrupted
        is raised."""
        op = item.operator
        record = {"type": "measurement", "key": op.key, "operator": dict(vars(op))}
        record |= {"purpose": item.purpose, "status": OK, "reason": ""}
        try:
            self._measure(item, protocol, record)
        except Interrupted:
            raise
        except CaptureFailed as error:
            self.lost = error
            record |= {"status": UNSUPPORTED, "reason": str(error)}
        except DeviceLost as error:
            self.lost = error
            record |= {"status": FAILED, "reason": f"{LOST}: {error}"}
        except OutOfMemory as error:
            record |= {"status": SKIPPED, "reason": f"out of memory: {error}"}
        except Unsupported as error:
            record |= {"status": UNSUPPORTED, "reason": str(error)}
        except InvalidTiming as error:
            record |= {"status": REFUSED, "reason": str(error)}
        # a kernel may raise any exception; one shape must not end a run of hours
        except Exception as error:
            record |= {
                "status": FAILED,
                "reason": f"{type(error).__name__}: {error}".splitlines()[0],
            }
        return record

    def _measure(self, item: Item, protocol: Protocol, record: Row) -> None:
        if reason := self.device.refuses(item.operator):
            raise Unsupported(reason)
        discarded = 0
        best: Row = {}  # the attempt that other processes disturbed least
        least = 0.0  # share of waiting in the best attempt
        for attempt in range(1, MAX_ATTEMPTS + 1):
            prepared = None  # frees the operands of the last attempt before new operands are made
            prepared = self.device.prepare(item.operator)
            before = self.device.snapshot()
            timing = measure(self.interrupt.watched(prepared.sample), protocol, self.device.clock)
            after = self.device.snapshot()
            reasons = throttled(before, after)
            fields = _timing_fields(timing, before, after, prepared.method)
            fields["waited"] = waited(before, after, timing.elapsed_s, self.threads)
            if reasons not in ((), UNKNOWN) and self.throttled >= ALWAYS_THROTTLED:
                fields["steady"], reasons = list(reasons), ()
            # an unknown share is no reason to repeat
            share = 0.0 if fields["waited"] == UNKNOWN else fields["waited"]
            if reasons in ((), UNKNOWN):
                if not best or share < least:
                    best, least = fields, share
                record |= best | {"attempts": attempt, "throttled_samples": discarded}
                record |= self._power(item, prepared, timing.median_s)
                self.waits.append(share)
                if share <= WAIT_LIMIT:
                    return
                # on a machine that is always shared, a repeat does not help: repeat once if the
                # share is unusual
                if attempt > 1 or share < 2.0 * statistics.median(self.waits):
                    break
                pause = 0.0
            else:
                discarded += len(timing.samples_s)
                self.counts.throttled_samples += len(timing.samples_s)
                record |= (best or fields) | {"attempts": attempt, "throttled_samples": discarded}
                pause = min(5.0, float(2 ** (attempt - 1)))
            if attempt < MAX_ATTEMPTS:
                self.counts.repeated += 1
                self.device.rest(pause)
        if not best:
            record |= {"status": THROTTLED, "reason": f"throttled: {', '.join(reasons)}"}
        else:
            shared = f"other processes took {least:.0%} of the CPU time"
            record |= {"status": NOISY, "reason": "; ".join(filter(None, (best["reason"], shared)))}

    def _power(self, item: Item, prepared: Prepared, median_s: float) -> Row:
        """Return the power of an operator, if it is due: on a short budget, few are."""
        start = self.device.clock()
        due = self.power_s <= POWER_SHARE * (start - self.start)
        # single launches have flushes and waits between them
        fits = item.purpose == FIT and "single launches" not in prepared.method
        if not (due and fits):
            return {}
        sample = self.interrupt.watched(prepared.sample)
        found = mean_power(self.device, sample, launches(median_s))
        self.power_s += self.device.clock() - start
        return {} if found is None or found.busy < BUSY else {"watts": found.watts}

    def keep(self, item: Item, protocol: Protocol, visit: int) -> str:
        begin = self.device.clock()
        record = self.record(item, protocol) | {"visit": visit, "block": self.block}
        record["spent_s"] = self.device.clock() - begin
        self.append(record)
        slow = record["status"] == THROTTLED or "steady" in record
        self.throttled = self.throttled + 1 if slow else 0
        if "after" in record:
            self.telemetry.append(record["after"])
        key, status = str(record["key"]), str(record["status"])
        now = float(record.get("median_s", math.inf)), status
        if status in (OK, NOISY, THROTTLED):
            self.timed.add(key)
        if visit == 0:
            self.counts.left -= 1
            self.counts.add(status)
            self.fastest[key] = now
            if status not in (OK, NOISY):
                self.problems.append(f"{key}: {status}: {record['reason']}")
            return status
        self.counts.revisited += 1
        before = self.fastest.get(key)
        if before is not None and now < before:
            self.counts.add(before[1], -1)
            self.counts.add(status)
            self.fastest[key] = now
        return status

    def check_drift(self, op: Operator) -> None:
        begin = self.device.clock()
        record = self.record(Item(op, DRIFT_CHECK), self.protocol)
        record["spent_s"] = self.device.clock() - begin
        if self.lost is not None:
            raise self.lost
        self.block += 1
        self.counts.drift_checks += 1
        record["block"] = self.block
        if "median_s" in record:
            now = _interval(record)
            self.reference = self.reference or now
            change = now[0] / self.reference[0] - 1.0
            apart = now[1] > self.reference[2] or now[2] < self.reference[1]
            record |= {"drift": change, "drifted": abs(change) > DRIFT_LIMIT and apart}
            if record["drifted"]:
                self.counts.drifted += 1
                self.drifts.append(change)
        self.append(record)


@dataclass
class _Budget:
    """Time of a run on the device's clock, and how the plan's estimates compare with it."""

    plan: MeasurementPlan
    device: Device
    limit_s: float  # longest time of one operator
    waiting_s: float  # estimated time of the items that have not been visited
    start: float
    earlier_s: float = 0.0  # time of earlier runs, which counts for spare items
    spare: frozenset[str] = frozenset()  # keys of the spare items
    spent_s: float = 0.0
    expected_s: float = 0.0

    @property
    def elapsed_s(self) -> float:
        return self.device.clock() - self.start

    def allows(self, item: Item, visit: int) -> bool:
        """Return whether an item is expected to end in the share of its visit. Estimates are rough
        at first and accurate after about 20 items, so estimates and measured times are combined."""
        before_s = self.earlier_s if item.operator.key in self.spare else 0.0
        pace = (self.spent_s + 5.0 * self.limit_s) / (self.expected_s + 5.0 * self.limit_s)
        share = self.plan.budget_s * (visit + 1) / self.plan.visits
        return before_s + self.elapsed_s + pace * max(item.cost_s, 1e-3) <= share

    def item_limit_s(self) -> float:
        return min(self.limit_s, max(self.plan.budget_s - self.elapsed_s, 0.05))

    def add(self, item: Item, spent_s: float) -> None:
        self.spent_s += spent_s
        self.expected_s += max(item.cost_s, 1e-3)

    def progress(self) -> tuple[int, int]:
        """Return the seconds that have passed, and the expected total."""
        now = self.elapsed_s
        left_s = max(self.waiting_s, 0.0) * (self.spent_s / self.expected_s)
        left_s = min(left_s, max(self.plan.budget_s - now, 0.0))
        return round(now), max(round(now + left_s), 1)


def run(
    plan: MeasurementPlan,
    device: Device,
    append: Callable[[Mapping[str, Any]], Any],
    *,
    previous: Iterable[Mapping[str, Any]] = (),
    protocol: Protocol | None = None,
    progress: Callable[[int, int], None] | None = None,
    interrupt: Interrupt | None = None,
) -> Outcome:
    """Measure the items of a plan; an item is omitted if it is not expected to end within the
    plan's budget, for which the time of earlier runs counts if the item is a spare one. ``append``
    stores one record before it returns (``Store.append``). ``previous`` are records of earlier runs
    in the same store: their operators are not measured again, and their first drift check stays the
    reference. ``progress`` is called after every visit with the seconds that have passed and the
    expected total. ``interrupt`` is that of the caller, if there is one."""
    protocol, earlier = protocol or Protocol(), list(previous)
    todo = _todo(plan, earlier)
    waiting_s = sum(item.cost_s for items in todo for item in items)
    budget = _Budget(
        plan,
        device,
        protocol.time_limit_s,
        waiting_s,
        device.clock(),
        sum(float(r.get("spent_s", 0.0)) for r in earlier),
        frozenset(item.operator.key for item in plan.items[len(plan.items) - plan.spare :]),
    )
    threads = device.describe().stack.get("threads", "1")
    with nullcontext(interrupt) if interrupt else Interrupt() as flag:
        state = _Run(
            device, append, protocol, flag, threads=int(threads) if threads.isdecimal() else 1
        )
        state.start = budget.start
        state.counts.resumed, state.counts.left = len(plan.items) - len(todo[0]), len(todo[0])
        state.reference, state.block = _first_check(earlier)
        state.timed = {str(r.get("key")) for r in earlier if r.get("median_s") is not None}
        try:
            stopped = _visit(todo, budget, state, progress)
        except Interrupted:
            stopped = "interrupted"
        except CaptureFailed as error:
            stopped = f"{CAPTURE_FAILED}: {error}"
        except DeviceLost as error:
            stopped = f"{LOST}: {error}"
    state.counts.left = max(state.counts.left - plan.spare, 0)
    problems = (*_steady_notes(state), *state.problems, *_drift_notes(state), *_power_notes(state))
    return Outcome(state.counts, budget.elapsed_s, stopped, problems)


def _todo(plan: MeasurementPlan, earlier: Sequence[Mapping[str, Any]]) -> list[list[Item]]:
    """Return the items of each visit that have no record. Kinds of operators that no graph could
    hold are not attempted again, because each attempt may cost a process."""
    measured = [r for r in earlier if "key" in r and "operator" in r]
    done = {(str(r["key"]), r.get("visit", 0)) for r in measured if r.get("purpose") != DRIFT_CHECK}
    failed = {_form(r["operator"]) for r in measured if NOT_CAPTURABLE in r.get("reason", "")}
    failed -= {_form(r["operator"]) for r in measured if r.get("median_s") is not None}
    return [
        [
            item
            for item in plan.order(visit)
            if (item.operator.key, visit) not in done and _form(vars(item.operator)) not in failed
        ]
        for visit in range(plan.visits)
    ]


def _form(operator: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(operator.get(name)) for name in ("kind", "dtype", "library"))


def _visit(
    todo: Sequence[Sequence[Item]],
    budget: _Budget,
    state: _Run,
    progress: Callable[[int, int], None] | None,
) -> str:
    """Measure the items of every visit with drift checks between them; return "budget" if items
    were omitted, else ""."""
    stopped, since_check, failures, check = "", 0, 0, budget.plan.drift_check
    if any(todo):
        state.check_drift(check)
    for visit, item in ((visit, item) for visit, items in enumerate(todo) for item in items):
        if state.interrupt.requested:
            raise Interrupted
        budget.waiting_s -= item.cost_s
        if visit and item.operator.key not in state.timed:
            # an operator without a time in the first visit has none in later visits
            continue
        if not budget.allows(item, visit):
            stopped = "budget"
            continue  # a cheaper operator may still fit
        begin = state.device.clock()
        protocol = replace(state.protocol, time_limit_s=budget.item_limit_s())
        status = state.keep(item, protocol, visit)
        budget.add(item, state.device.clock() - begin)
        if state.lost is not None:
            raise state.lost
        failures = failures + 1 if status == FAILED else 0
        if failures >= _FAILURES_IN_A_ROW:
            raise DeviceLost(
                f"{failures} operators in a row failed; the last: {state.problems[-1]}"
            )
        since_check += 1
        if since_check >= DRIFT_CHECK_EVERY:
            state.check_drift(check)
            since_check = 0
        if progress is not None:
            progress(*budget.progress())
    if since_check:
        state.check_drift(check)
    return stopped


def _steady_notes(state: _Run) -> list[str]:
    if state.throttled < ALWAYS_THROTTLED:
        return []
    return [
        "the device throttles all the time: its times are those of a hot device and are flagged"
    ]


def _drift_notes(state: _Run) -> list[str]:
    if not state.drifts:
        return []
    low, high = min(state.drifts), max(state.drifts)
    change = f"{low:+.1%}" if low == high else f"{low:+.1%} to {high:+.1%}"
    checks = f"{state.counts.drifted} of {state.counts.drift_checks} drift checks"
    return [f"{checks} differ from the first by {change}"]


def _power_notes(state: _Run) -> list[str]:
    if not (capped := sum(power_capped(state.telemetry))):
        return []
    slowed = f"{capped} of {len(state.telemetry)} timed operators ran at the power limit"
    return [
        f"{slowed}, at a clock over {CLOCK_LIMIT:.0%} below the highest; their rows are flagged"
    ]


def sustained(device: Device, dtype: str) -> Row | None:
    """Return a record with the time of a compute-bound GEMM under load over its time in a
    measurement, because clocks fall at the power limit; None if it cannot run, or at an
    interrupt."""
    with Interrupt() as flag:
        try:
            prepared = device.prepare(
                Operator("gemm", dtype, m=SUSTAINED_SIZE, n=SUSTAINED_SIZE, k=SUSTAINED_SIZE)
            )
            start, series = device.clock(), list[tuple[float, float]]()
            while not flag.requested and device.clock() - start < SUSTAINED_S:
                series.append((device.clock() - start, prepared.sample(1)))
        except (OutOfMemory, Unsupported, DeviceLost, RuntimeError):
            return None
    early, late = (
        [s for elapsed_s, s in series if low <= elapsed_s <= high]
        for low, high in ((0.0, 0.25), (2.0, SUSTAINED_S))
    )
    if not early or not late:
        return None
    ratio = min(max(statistics.median(late) / statistics.median(early), 1.0), 2.0)
    return {
        "type": SUSTAINED,
        "purpose": SUSTAINED,
        "ratio": ratio,
        "samples_s": [s for _, s in series],
    }


def _first_check(
    records: Iterable[Mapping[str, Any]],
) -> tuple[tuple[float, float, float] | None, int]:
    reference, block = None, 0
    for record in records:
        if record.get("purpose") == DRIFT_CHECK:
            block = max(block, record.get("block", 0))
            if reference is None and record.get("median_s") and record.get("lower_s") is not None:
                reference = _interval(record)
    return reference, block


def _interval(record: Mapping[str, Any]) -> tuple[float, float, float]:
    upper = record.get("upper_s")
    return (
        float(record["median_s"]),
        float(record["lower_s"]),
        math.inf if upper is None else float(upper),
    )


def _timing_fields(timing: Timing, before: Snapshot, after: Snapshot, method: str) -> Row:
    return {
        **vars(timing),
        "samples_s": list(timing.samples_s),
        "warmup_s": list(timing.warmup_s),
        "upper_s": None if math.isinf(timing.upper_s) else timing.upper_s,
        "method": method,
        "before": before.as_record(),
        "after": after.as_record(),
    }
