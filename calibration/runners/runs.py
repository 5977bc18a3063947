"""A calibration run in a folder: plan, measure, fit, judge on shapes held out before. What ``prunesim measure`` and
``calibrate`` do.

A folder holds ``datasheet.yaml`` (the base profile), ``records.jsonl``, ``profile.yaml`` with its arrays, and
``report.md`` with figures. :func:`measure_into` fills the first two and goes on where an earlier call ended;
:func:`fit_run` makes the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.devices.protocol import Device
from calibration.fit.base_profile import base_profile, raised
from calibration.fit.local_update import Updated, update_profile
from calibration.fit.profile import ProfileFit, fit_profile
from calibration.measure.plan import Plan, Rates, base_plan, check_budget, in_order
from calibration.measure.probe import default_protocol, default_visits, probe
from calibration.measure.run import Outcome, run
from calibration.measure.shapes import host_operators
from calibration.measure.timing import Protocol
from calibration.records.exact import without_exact
from calibration.records.lines import content_records
from calibration.records.store import Header, Store, read_store
from calibration.records.table import PURPOSES, Records
from calibration.runners.targets import Asked, asked_operators
from calibration.validation.validate import Report, validate
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.save import save_hardware

RECORDS, DATASHEET, PROFILE, REPORT = "records.jsonl", "datasheet.yaml", "profile.yaml", "report.md"

QUICK_SHARES: Mapping[str, float] = {
    "gemm": 0.6, "attention_prefill": 0.15, "attention_decode": 0.15, "elementwise": 0.1,
}  # fmt: skip
"""What a quick run spends its time on: what re-anchoring can use."""

HOST_BUDGET_S = 20.0
"""Longest time for the few operators that time the host."""

JUDGED = {
    "holdout": (REPORT, "shapes held out before the fit"),
    "exact": ("exact_shapes.md", "the model on shapes that were measured exactly"),
}
"""Purpose of records -> the file of their report, and what they are."""


@dataclass(frozen=True)
class Measured:
    """What a measuring run left: the plan, how it ended, and the records in the folder."""

    plan: Plan
    outcome: Outcome
    records: Records


def check_folder(folder: str | Path) -> Path:
    """A run folder that can be made or gone on with; InputError when it is a file, or its parent does not exist."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; expected the folder of a run")
    if not path.parent.is_dir():
        raise InputError(f"{path}: folder {path.parent} does not exist")
    return path


def begin(
    folder: str | Path, device: Device, dtype: str, budget_s: float, name: str = RECORDS, **extra: Any
) -> tuple[Path, Header]:
    """Where a run keeps its records, and what they are of.

    Refused (InputError): a budget of zero, a number format the device lacks, a folder of another device or software.
    """
    file = check_folder(folder) / name
    check_budget(budget_s)
    if dtype not in device.dtypes():
        raise InputError(f"--dtype {dtype}: device {device.name} has none; it has {', '.join(device.dtypes())}")
    description = device.describe()
    header = Header(description.device, dict(description.stack), dtype, extra={"opened": device.name, **extra})
    if not is_new(file):
        read_store(file).header.refuse_other(header, str(file))
    return file, header


def is_new(file: Path) -> bool:
    """Whether a file of records is still to be begun."""
    return not file.exists() or not file.stat().st_size


def measure_plan(
    file: Path,
    header: Header,
    device: Device,
    planned: Callable[[Rates, Protocol, int], tuple[Plan, Protocol]],
    *,
    budget_s: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Run a plan into a file, made from the device's rates (probed where the file is new), its protocol and the seed
    that the run began with."""
    protocol = default_protocol(device.describe(), budget_s)
    if is_new(file):
        file.parent.mkdir(exist_ok=True)
        probed = {"rates": asdict(probe(device, header.dtype, protocol)), "seed": seed, "budget_s": budget_s}
        header = replace(header, extra={**header.extra, **probed})
    with Store(file, header) as store:
        kept = store.header.extra.get("rates")
        rates = Rates(**kept) if isinstance(kept, Mapping) else probe(device, header.dtype, protocol)
        plan, protocol = planned(rates, protocol, int(store.header.extra.get("seed", seed)))
        outcome = run(plan, device, store.append, previous=store.rows, protocol=protocol, progress=progress)
    return Measured(plan, outcome, content_records(read_store(file)))


def measure_into(
    folder: str | Path,
    device: Device,
    *,
    budget_s: float,
    dtype: str = "bf16",
    hardware: str = "",
    asked: Asked = (),
    quick: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Plan and measure, into a new folder or one that an earlier run of the same device began; see :func:`begin`.

    Parameters
    ----------
    device : Device
        Open, and left open.
    hardware : str
        Profile with the datasheet; found by the device's name, or measured, if left out.
    asked : sequence of sequences of Workload
        Dense and pruned models whose GEMMs are measured exactly, first of all and those first that narrow the speedups
        most (``quick``: all their operators); the rest of the budget goes to the fit.
    quick : bool
        Measure for an anchor rather than for a fit.
    progress : callable, optional
        Called with the seconds that have passed and those expected in all.
    say : callable
        Told what the machine is and what is planned.
    """
    description = device.describe()
    file, header = begin(folder, device, dtype, budget_s, memory_bytes=description.memory_bytes)
    say(f"{description.device}; {description.software}; {dtype}")
    datasheet = file.with_name(DATASHEET)
    if is_new(file) or not datasheet.exists():
        base = base_profile(device, dtype, hardware)
        datasheet.parent.mkdir(exist_ok=True)
        save_hardware(replace(base, path=None), datasheet)

    def planned(rates: Rates, protocol: Protocol, seed: int) -> tuple[Plan, Protocol]:
        """Exact shapes first, and what time they leave spread over the rest; every visit has its share."""
        visits = default_visits(description)
        left, plan = budget_s / visits, None
        if asked:
            wanted = asked_operators(asked, load_hardware(datasheet), every=quick)
            plan = in_order(wanted, rates, protocol=protocol, seed=seed)
            left -= plan.estimated_s
        if plan is None or left > 0.1 * budget_s / visits:
            options: dict[str, Any] = {"shares": QUICK_SHARES, "kernels_apart": False} if quick else {}
            options |= {"protocol": protocol, "refuses": device.refuses, "seed": seed}
            base = base_plan(rates, budget_s=left, dtype=dtype, **options)
            first = plan.items if plan else ()
            known = {item.operator.key for item in first}
            plan = replace(base, items=(*first, *(item for item in base.items if item.operator.key not in known)))
        plan = replace(plan, budget_s=budget_s, visits=visits)
        counts = ", ".join(f"{count} {name}" for name, count in plan.counts().items())
        say(f"{len(plan.items)} operators planned: {counts}")
        return plan, protocol

    return measure_plan(file, header, device, planned, budget_s=budget_s, seed=seed, progress=progress)


def measure_host(
    folder: str | Path,
    device: Device,
    *,
    budget_s: float = HOST_BUDGET_S,
    dtype: str = "bf16",
    hardware: str = "",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measure what tells the host time of this machine, in seconds; otherwise as :func:`measure_into`.

    ``hardware`` is the profile that is to have it, of this device or, on a machine without a GPU, of any.
    """
    budget_s = min(check_budget(budget_s), HOST_BUDGET_S)
    description = device.describe()
    file, header = begin(folder, device, dtype, budget_s, memory_bytes=description.memory_bytes)
    say(f"{description.device}; {description.software}; {dtype}")
    datasheet = file.with_name(DATASHEET)
    if hardware or not datasheet.exists():
        base = load_hardware(hardware) if hardware else base_profile(device, dtype)
        if dtype not in base.rates:
            raise InputError(f"--dtype {dtype}: {base.name} has none; it has {', '.join(base.rates)}")
        datasheet.parent.mkdir(exist_ok=True)
        save_hardware(replace(base, path=None), datasheet)

    def planned(rates: Rates, protocol: Protocol, seed: int) -> tuple[Plan, Protocol]:
        """The longest layer is repeated to see drift."""
        plan = in_order(host_operators(dtype), rates, protocol=protocol, budget_s=budget_s, seed=seed)
        return replace(plan, anchor=plan.items[-1].operator, visits=default_visits(description)), protocol

    return measure_plan(file, header, device, planned, budget_s=budget_s, seed=seed, progress=progress)


def keep_apart(records: Records) -> Records:
    """Records whose fit rows share no (n, k) with those held out, as a folder measured under two plans may have."""
    purpose = np.array(records.purpose)
    held, fit = PURPOSES.index("holdout"), PURPOSES.index("fit")
    gemm = records.is_operator("gemm")
    key = records.n * 2.0**24 + records.k
    mixed = gemm & (purpose == fit) & np.isin(key, key[gemm & (purpose == held)])
    purpose[mixed] = held
    return records.replace(purpose=purpose)


@dataclass(frozen=True)
class Calibrated:
    """A fitted or anchored run: the profile, and its reports on shapes held out and on exact ones (None: no rows)."""

    fit: ProfileFit | Updated
    held_out: Report | None
    exact: Report | None


def fit_run(
    folder: str | Path, *, anchor: bool = False, progress: Callable[[int, int], None] | None = None
) -> Calibrated:
    """Fit the records of a run folder, judge the fit on what was held out, and write profile and report into it.

    ``anchor``: move the datasheet's profile as a whole instead of fitting a new one. ``progress`` is called with (fits
    done, fits in all). InputError: the folder holds no records, or too few for any fit.
    """
    from calibration.validation.report import write_markdown

    path = Path(folder)
    content = read_store(path / RECORDS)
    records = keep_apart(content_records(content))
    base = raised(load_hardware(path / DATASHEET), records)
    fit: ProfileFit | Updated
    fit = update_profile(base, records) if anchor else fit_profile(base, records, progress=progress)
    profile = replace(fit.profile, title=base.title)
    save_hardware(profile, path / PROFILE)
    model = without_exact(profile)
    title, reports = f"Calibration of {content.header.device}, {content.header.dtype}", {}
    for purpose, (name, what) in JUDGED.items():
        rows = records.select((records.purpose == PURPOSES.index(purpose)) & np.isfinite(records.seconds))
        try:
            reports[purpose] = validate(model, rows) if len(rows) else None
        except InputError:
            reports[purpose] = None
        if report := reports[purpose]:
            write_markdown(report, path / name, title=f"{title}: {what}")
    return Calibrated(fit, reports["holdout"], reports["exact"])
