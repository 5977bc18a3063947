"""A calibration run in a folder: plan, measure, fit, judge on shapes held out before. What ``prunesim measure`` and
``calibrate`` do.

A folder holds ``datasheet.yaml`` (the base profile), ``records.jsonl``, ``profile.yaml`` with its arrays, and
``report.md`` with figures. :func:`measure_into` fills the first two and goes on where an earlier call ended;
:func:`fit_run` makes the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from calibration.devices.protocol import Device
from calibration.fit.base_profile import base_profile, raised
from calibration.fit.profile import ProfileFit, fit_profile
from calibration.judge.validate import Report, validate
from calibration.measure.plan import Plan, Rates, base_plan, check_budget, for_model
from calibration.measure.probe import default_protocol, default_visits, probe
from calibration.measure.run import Outcome, Progress, run
from calibration.records.exact import without_exact
from calibration.records.lines import content_records
from calibration.records.store import Header, Store, read_store
from calibration.records.table import PURPOSES, Records
from simulator.errors import InputError
from simulator.hardware.library import load_hardware, save_hardware
from simulator.hardware.profile import HardwareProfile

RECORDS, DATASHEET, PROFILE, REPORT = "records.jsonl", "datasheet.yaml", "profile.yaml", "report.md"

QUICK_SHARES: Mapping[str, float] = {"gemm": 1.0}
"""What a quick run spends its time on: re-anchoring moves the GEMM section alone."""

Shape = tuple[int, int, int]


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


def measure_into(
    folder: str | Path,
    device: Device,
    *,
    budget_s: float,
    dtype: str = "bf16",
    hardware: str = "",
    shapes: Sequence[Shape] = (),
    quick: bool = False,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Plan and measure, into a new folder or one that an earlier run of the same device began.

    Parameters
    ----------
    device : Device
        Open, and left open.
    hardware : str
        Profile with the datasheet; found by the device's name, or measured, if left out.
    shapes : sequence of (m, n, k)
        GEMMs to measure exactly, first of all; the rest of the budget goes to the fit.
    quick : bool
        GEMMs only.
    progress : callable, optional
        See :func:`calibration.measure.run.run`.
    say : callable
        Told what the machine is and what is planned.

    Raises
    ------
    InputError
        Before anything is measured: a budget of zero, a number format the device lacks, or a folder of another device
        or software.
    """
    path = check_folder(folder)
    check_budget(budget_s)
    description = device.describe()
    if dtype not in device.dtypes():
        raise InputError(f"--dtype {dtype}: device {device.name} has none; it has {', '.join(device.dtypes())}")
    file = path / RECORDS
    new = not file.exists() or not file.stat().st_size
    extra = {"opened": device.name, "memory_bytes": description.memory_bytes}
    header = Header(description.device, dict(description.stack), dtype, extra=extra)
    if not new:
        read_store(file).header.refuse_other(header, str(file))
    say(f"{description.device}; {description.software}; {dtype}")
    protocol = default_protocol(description, budget_s)
    if new or not (path / DATASHEET).exists():
        base = base_profile(device, dtype, hardware)
        path.mkdir(exist_ok=True)
        save_hardware(replace(base, path=None), path / DATASHEET)
    if new:
        rates = probe(device, dtype, protocol)
        header = replace(header, extra={**extra, "rates": asdict(rates), "seed": seed, "budget_s": budget_s})
    with Store(file, header) as store:
        kept = store.header.extra.get("rates")
        rates = Rates(**kept) if isinstance(kept, Mapping) else probe(device, dtype, protocol)
        plan = _plan(rates, device, dtype, budget_s, shapes, quick, int(store.header.extra.get("seed", seed)))
        counts = ", ".join(f"{count} {name}" for name, count in plan.counts().items())
        say(f"{len(plan.items)} operators planned: {counts}")
        outcome = run(
            plan, device, store.append, previous=store.rows, protocol=protocol, budget_s=budget_s, progress=progress
        )
    return Measured(plan, outcome, content_records(read_store(file)))


def _plan(
    rates: Rates, device: Device, dtype: str, budget_s: float, shapes: Sequence[Shape], quick: bool, seed: int
) -> Plan:
    """Exact shapes first, and what time they leave spread over the rest; every visit gets its share of the budget."""
    description = device.describe()
    protocol, visits = default_protocol(description, budget_s), default_visits(description)
    left = each_s = budget_s / visits
    exact = None
    if shapes:
        exact = for_model(shapes, rates, dtype=dtype, protocol=protocol, seed=seed)
        left -= exact.estimated_s
        if left <= 0.1 * each_s:
            return replace(exact, budget_s=budget_s, visits=visits)
    options: dict[str, Any] = {"shares": QUICK_SHARES} if quick else {}
    options |= {"protocol": protocol, "refuses": device.refuses, "seed": seed}
    base = base_plan(rates, budget_s=left, dtype=dtype, **options)
    return replace(exact.joined(base) if exact else base, budget_s=budget_s, visits=visits)


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
    """A fitted run: the profile, and its reports on shapes held out and on exact ones (None where there are none)."""

    fit: ProfileFit
    held_out: Report | None
    exact: Report | None


def fit_run(
    folder: str | Path, *, anchor: bool = False, progress: Callable[[int, int], None] | None = None
) -> Calibrated:
    """Fit the records of a run folder, judge the fit on what was held out, and write profile and report into it.

    ``anchor``: move the calibrated GEMM section of the datasheet's profile instead of fitting a new one. ``progress``
    is called with (fits done, fits in all). InputError: the folder holds no records, or too few for any fit.
    """
    from calibration.judge.report import write_markdown

    path = Path(folder)
    content = read_store(path / RECORDS)
    records = keep_apart(content_records(content))
    base = raised(load_hardware(path / DATASHEET), records)
    fit = fit_profile(base, records, anchor=anchor, progress=progress)
    profile = replace(fit.profile, title=base.title)
    save_hardware(profile, path / PROFILE)
    model = without_exact(profile)
    held = _judged(model, records, "holdout")
    exact = _judged(model, records, "exact")
    title = f"Calibration of {content.header.device}, {content.header.dtype}"
    if held is not None:
        write_markdown(held, path / REPORT, title=f"{title}: shapes held out before the fit")
    if exact is not None:
        write_markdown(
            exact, path / "exact_shapes.md", title=f"{title}: the model on shapes that were measured exactly"
        )
    return Calibrated(fit, held, exact)


def _judged(profile: HardwareProfile, records: Records, purpose: str) -> Report | None:
    rows = records.select((records.purpose == PURPOSES.index(purpose)) & np.isfinite(records.seconds))
    if not len(rows):
        return None
    try:
        return validate(profile, rows)
    except InputError:
        return None


def model_shapes(
    model: str,
    *,
    phases: Sequence[str] = ("prefill", "decode"),
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    dtype: str = "bf16",
    families: Sequence[str] = ("depth", "width", "width_cross", "low_rank"),
    sparsities: Sequence[float] = (0.25, 0.5),
) -> tuple[Shape, ...]:
    """Every dense GEMM (m, n, k) of a model (a name, or a config.json) in all combinations of settings, dense and
    pruned, once.

    Families that leave no GEMM shape of their own need not be named.
    """
    from simulator.models.library import load_model
    from simulator.predict.settings import Setting
    from simulator.pruning import prune
    from simulator.workload import Kernel, Kind

    config, setting = load_model(model), Setting(dtype=dtype)
    found: dict[Shape, None] = {}
    for phase, b, s in product(phases, batch, seq):
        dense = setting.lower(config, phase, b, s)
        for w in (dense, *(prune(dense, family, sparsity) for family in families for sparsity in sparsities)):
            rows = (w.kind == Kind.GEMM) & (w.kernel == Kernel.DENSE)
            for m, n, k in zip(w.m[rows], w.n[rows], w.k[rows], strict=True):
                found.setdefault((max(round(float(m)), 1), int(n), int(k)))
    return tuple(found)
