"""Run a plan on a device, one record an operator, whatever the device does.

:func:`run` takes a plan, a device and a function that keeps a record; it decides what happens when memory runs out (the
shape is skipped and counted), when a time is not a number (refused and counted), when the device throttles or other
processes hold the CPU (repeated and counted), when it is lost or interrupted (stop, with the reason; everything before
is kept), and when time is up. Given the records of an earlier run it goes on where that one ended.

A record is a JSON-ready mapping:

===================  ===================================================================================================
``type``             ``"measurement"``
``key``              the operator as text; equal operators, equal keys
``operator``         the operator's fields
``purpose``          ``fit``, ``holdout``, ``exact`` or ``anchor``
``status``           ``ok``, ``noisy``, ``throttled`` (also when repeated), or without a time ``skipped`` (out of
                     memory), ``unsupported``, ``refused`` (a time that cannot be one), ``failed`` (the kernel raised)
``reason``           why it is not ``ok``
``median_s`` ...     ``lower_s``, ``upper_s`` (95 % interval of the median; null where samples are too few for one),
                     ``samples_s`` and ``warmup_s`` (raw, untrimmed), ``loops``
``method``           how launches were timed and kept cold
``before, after``    telemetry
``visit``            round of the plan it is of, from 0; of several the fastest counts (``calibration.records.lines``)
``attempts``         times it was measured, ``throttled_samples`` of which were discarded for throttling
``waited``           share of the time in which this process waited for a CPU, where that is counted
``block``            number of the last anchor before it
``drift``            anchors: change against the first; ``drifted`` where it exceeds the limit, and intervals are apart
===================  ===================================================================================================
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from calibration.devices.protocol import Device, DeviceLost, Operator, OutOfMemory, Unsupported
from calibration.devices.telemetry import UNKNOWN, Snapshot, throttled, waited
from calibration.measure.interrupt import Interrupt, Interrupted
from calibration.measure.plan import ANCHOR, ANCHOR_EVERY, Item, Plan, check_budget
from calibration.measure.probe import default_protocol
from calibration.measure.timing import NOISY, OK, InvalidTiming, Protocol, Timing, measure
from calibration.records.lines import DRIFT_LIMIT

SKIPPED, UNSUPPORTED, REFUSED, FAILED, THROTTLED = "skipped", "unsupported", "refused", "failed", "throttled"

# share of the time a process may wait for a CPU before its timings say more about other processes than the device
WAIT_LIMIT = 0.05
MAX_ATTEMPTS = 3
_FAILURES_IN_A_ROW = 5

Append = Callable[[Mapping[str, Any]], Any]


@dataclass
class Counts:
    """How often what happened to operators; ``drifted`` counts anchors, ``repeated`` and ``revisited`` measurements."""

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
    anchors: int = 0
    drifted: int = 0
    resumed: int = 0  # already there from an earlier run
    left: int = 0  # not measured: time was up, or the run stopped

    @property
    def timed(self) -> int:
        """Operators that have a time."""
        return self.ok + self.noisy + self.throttled

    def add(self, status: str, number: int = 1) -> None:
        """Count operators of a status, with -1 one less."""
        setattr(self, status, getattr(self, status) + number)


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    counts: Counts
    elapsed_s: float  # on the device's clock
    stopped: str  # why it ended early: "budget", "interrupted" or "device lost: ..."; "" when the plan is done
    problems: tuple[str, ...]  # one line for each operator without a time, and one for the anchors that drifted

    @property
    def complete(self) -> bool:
        """Whether the run may be called a success: the plan is done or its time used up."""
        return self.stopped in ("", "budget")


@dataclass
class _Run:
    """The state of one run. Mutable on purpose, and never leaves :func:`run`."""

    device: Device
    append: Append
    protocol: Protocol
    interrupt: Interrupt
    counts: Counts = field(default_factory=Counts)
    problems: list[str] = field(default_factory=list)
    reference: tuple[float, float, float] | None = None  # median, lower, upper of the first anchor
    block: int = 0
    threads: int = 1
    waits: list[float] = field(default_factory=lambda: [WAIT_LIMIT])  # shares waited so far
    drifts: list[float] = field(default_factory=list)
    fastest: dict[str, tuple[float, str]] = field(default_factory=dict)  # time and status of each operator counted

    def record(self, item: Item, protocol: Protocol) -> dict[str, Any]:
        """Measure one operator and say what came of it. Lets only a lost device and an interruption through."""
        op = item.operator
        record = {"type": "measurement", "key": op.key, "operator": dict(vars(op))}
        record |= {"purpose": item.purpose, "status": OK, "reason": ""}
        try:
            self._measure(op, protocol, record)
        except (Interrupted, DeviceLost):
            raise
        except OutOfMemory as error:
            record |= {"status": SKIPPED, "reason": f"out of memory: {error}"}
        except Unsupported as error:
            record |= {"status": UNSUPPORTED, "reason": str(error)}
        except InvalidTiming as error:
            record |= {"status": REFUSED, "reason": str(error)}
        except Exception as error:  # a kernel may raise anything; one shape must not end a run of hours
            record |= {"status": FAILED, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
        return record

    def _measure(self, op: Operator, protocol: Protocol, record: dict[str, Any]) -> None:
        if reason := self.device.refuses(op):
            raise Unsupported(reason)
        bad, least = 0, 0.0
        best: dict[str, Any] = {}  # the attempt under which other processes took least
        for attempt in range(1, MAX_ATTEMPTS + 1):
            prepared = None  # operands of the last attempt must go before new ones come
            prepared = self.device.prepare(op)
            before = self.device.snapshot()
            timing = measure(self.interrupt.watched(prepared.sample), protocol, self.device.clock)
            after = self.device.snapshot()
            reasons = throttled(before, after)
            said = waited(before, after, timing.elapsed_s, self.threads)
            share = 0.0 if isinstance(said, str) else said  # what cannot be seen cannot be a reason to repeat
            fields = _timing_fields(timing, before, after, prepared.method) | {"waited": said}
            if reasons in ((), UNKNOWN):
                if not best or share < least:
                    best, least = fields, share
                record |= best | {"attempts": attempt, "throttled_samples": bad}
                self.waits.append(share)
                if share <= WAIT_LIMIT:
                    return
                # on a machine that is always shared repeating gains nothing: only what is unusual for this run is
                # repeated, and once
                if attempt > 1 or share < 2.0 * statistics.median(self.waits):
                    break
                pause = 0.0
            else:
                bad += len(timing.samples_s)
                self.counts.throttled_samples += len(timing.samples_s)
                record |= (best or fields) | {"attempts": attempt, "throttled_samples": bad}
                pause = min(5.0, float(2 ** (attempt - 1)))
            if attempt < MAX_ATTEMPTS:
                self.counts.repeated += 1
                self.device.rest(pause)
        if not best:
            record |= {"status": THROTTLED, "reason": f"throttled: {', '.join(reasons)}"}
        else:
            taken = f"other processes took {least:.0%} of the CPU time"
            record |= {"status": NOISY, "reason": "; ".join(filter(None, (best["reason"], taken)))}

    def keep(self, item: Item, protocol: Protocol, visit: int) -> str:
        """Measure, count and append one visit of an item of the plan; returns its status."""
        record = self.record(item, protocol) | {"visit": visit, "block": self.block}
        self.append(record)
        key, status = str(record["key"]), str(record["status"])
        now = float(record.get("median_s", math.inf)), status
        if visit == 0:
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

    def anchor(self, op: Operator) -> None:
        """Measure the anchor and compare it with the first one of the run."""
        record = self.record(Item(op, ANCHOR), self.protocol)
        self.block += 1
        self.counts.anchors += 1
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


def run(
    plan: Plan,
    device: Device,
    append: Append,
    *,
    previous: Iterable[Mapping[str, Any]] = (),
    protocol: Protocol | None = None,
    budget_s: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    interrupt: Interrupt | None = None,
) -> Outcome:
    """Measure the items of a plan, by default under :func:`default_protocol` within the plan's budget.

    ``append`` keeps one record for good before it returns (``Store.append``); what it raises ends the run. ``previous``
    are the records of earlier runs into the same store: their operators are not measured again, their first anchor
    stays the reference. Items that are not expected to end within ``budget_s`` are left; the cost estimates learn from
    what items really took. ``progress`` is called after every visit of an item with the seconds that have passed and
    those expected in all, as items differ too much in cost to be counted; ``interrupt`` is for callers that stop a run
    from another thread.

    >>> from calibration.devices.replay import ReplayDevice
    >>> from calibration.measure.plan import Rates, in_order
    >>> device, kept, gemms = ReplayDevice(), [], [Operator("gemm", m=m, n=64, k=64) for m in (1, 8)]
    >>> outcome = run(in_order(gemms, Rates(1e14, 1e12)), device, kept.append)
    >>> outcome.counts.ok, outcome.stopped, [r["purpose"] for r in kept]
    (2, '', ['anchor', 'exact', 'exact', 'anchor'])
    """
    budget = check_budget(plan.budget_s if budget_s is None else budget_s)
    earlier = list(previous)
    done = {(str(r["key"]), int(r.get("visit", 0))) for r in earlier if r.get("purpose") != ANCHOR and "key" in r}
    timed = {str(r["key"]) for r in earlier if r.get("median_s") is not None}
    todo = [[i for i in plan.order(visit) if (i.operator.key, visit) not in done] for visit in range(plan.visits)]
    waiting_s = sum(item.cost_s for items in todo for item in items)
    start = device.clock()
    description = device.describe()
    protocol = protocol or default_protocol(description, min(budget, 600.0))
    stopped, since_anchor, failures = "", 0, 0
    spent_s = expected_s = 0.0
    with interrupt or Interrupt() as flag:
        threads = description.stack.get("threads", "1")
        state = _Run(device, append, protocol, flag, threads=int(threads) if threads.isdecimal() else 1)
        counts = state.counts
        counts.resumed = len(plan.items) - len(todo[0])
        state.reference, state.block = _first_anchor(earlier)
        counts.left = len(todo[0])
        try:
            if any(todo):
                state.anchor(plan.anchor)
            for visit, item in ((visit, item) for visit, items in enumerate(todo) for item in items):
                if flag.asked:
                    raise Interrupted
                waiting_s -= item.cost_s
                if visit and item.operator.key not in timed:
                    continue  # what had no time at first has none now
                elapsed = device.clock() - start
                # estimates are rough at first and exact after some twenty items: blend the two
                pace = (spent_s + 5.0 * protocol.time_limit_s) / (expected_s + 5.0 * protocol.time_limit_s)
                expected = max(item.cost_s, 1e-3)
                if elapsed + pace * expected > budget * (visit + 1) / plan.visits:
                    stopped = "budget"
                    continue  # a cheaper one may still fit
                begin = device.clock()
                limit_s = min(protocol.time_limit_s, max(budget - elapsed, 0.05))
                status = state.keep(item, replace(protocol, time_limit_s=limit_s), visit)
                spent_s, expected_s = spent_s + device.clock() - begin, expected_s + expected
                if visit == 0:
                    counts.left -= 1
                if status in (OK, NOISY, THROTTLED):
                    timed.add(item.operator.key)
                failures = failures + 1 if status == FAILED else 0
                if failures >= _FAILURES_IN_A_ROW:
                    raise DeviceLost(f"{failures} operators in a row failed; the last: {state.problems[-1]}")
                since_anchor += 1
                if since_anchor >= ANCHOR_EVERY:
                    state.anchor(plan.anchor)
                    since_anchor = 0
                if progress is not None:
                    now = device.clock() - start
                    left_s = min(max(waiting_s, 0.0) * (spent_s / expected_s), max(budget - now, 0.0))
                    progress(round(now), max(round(now + left_s), 1))
            if since_anchor:
                state.anchor(plan.anchor)
        except Interrupted:
            stopped = "interrupted"
        except DeviceLost as error:
            stopped = f"device lost: {error}"
    if state.drifts:
        low, high = min(state.drifts), max(state.drifts)
        change = f"{low:+.1%}" if low == high else f"{low:+.1%} to {high:+.1%}"
        state.problems.append(f"{counts.drifted} of {counts.anchors} anchors drifted by {change} against the first")
    return Outcome(counts, device.clock() - start, stopped, tuple(state.problems))


def _first_anchor(records: Iterable[Mapping[str, Any]]) -> tuple[tuple[float, float, float] | None, int]:
    """The reference and the number of the last anchor among earlier records."""
    reference, block = None, 0
    for record in records:
        if record.get("purpose") == ANCHOR:
            block = max(block, int(record.get("block", 0)))
            if reference is None and "median_s" in record:
                reference = _interval(record)
    return reference, block


def _interval(record: Mapping[str, Any]) -> tuple[float, float, float]:
    """Median and interval of a record."""
    upper = record["upper_s"]
    return float(record["median_s"]), float(record["lower_s"]), math.inf if upper is None else float(upper)


def _timing_fields(timing: Timing, before: Snapshot, after: Snapshot, method: str) -> dict[str, Any]:
    """What a timing adds to a record."""
    names = ("status", "reason", "median_s", "lower_s", "upper_s", "samples_s", "warmup_s", "loops", "elapsed_s")
    said: dict[str, Any] = {name: getattr(timing, name) for name in names}
    said |= {"samples_s": list(timing.samples_s), "warmup_s": list(timing.warmup_s)}
    said["upper_s"] = None if math.isinf(timing.upper_s) else timing.upper_s
    return said | {"method": method, "before": before.as_record(), "after": after.as_record()}
