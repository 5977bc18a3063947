"""A calibration run in a folder: plan, measure, fit, validate on held-out shapes.

The folder holds ``datasheet.yaml`` (the base profile), ``records.jsonl``, ``profile.yaml`` with its
arrays, and ``report.md`` with figures. :func:`measure_into` writes the first two files and resumes
an earlier call; :func:`fit_run` writes the others. :func:`target_operators` selects the operators
to measure for a model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from calibration.devices.protocol import Device, Operator
from calibration.devices.telemetry import THROTTLING, UNKNOWN
from calibration.fit.base_profile import base_profile, raised, thread_notes
from calibration.fit.profile import ProfileFit, fit_profile, provenance_of
from calibration.measure.plan import (
    FIT,
    Item,
    MeasurementPlan,
    Rates,
    in_order,
    next_rows,
    probe,
    refilled_plan,
    wave_gemms,
)
from calibration.measure.power import idle_power
from calibration.measure.run import (
    SUSTAINED,
    SUSTAINED_PROTOCOL,
    Interrupt,
    Outcome,
    run,
    sustained,
)
from calibration.measure.timing import Protocol, default_protocol, default_visits
from calibration.records.screening import one_method, without_exact
from calibration.records.store import Content, Header, Store, content_records, parse, read_store
from calibration.records.timing_table import PURPOSES, Records
from calibration.validation.validate import Report, disturbed_share, validate
from simulator.arguments import AMOUNT, SIZE, number
from simulator.codes import DTYPES, Kernel, Kind
from simulator.errors import InputError
from simulator.files.write import refuse_links
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import Fitted, HardwareProfile
from simulator.hardware.save import save_hardware
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.prediction.requests import requests_of
from simulator.pruning import prune
from simulator.uncertainty import factors
from simulator.uncertainty.forward import forward_passes
from simulator.units import percent
from simulator.workload import Workload, WorkloadBatch

RECORDS = "records.jsonl"
DATASHEET = "datasheet.yaml"
PROFILE = "profile.yaml"
REPORT = "report.md"

UNFINISHED = "its calibration did not end"
TURNS = 0.1  # largest share of the time for GEMMs at the ends of waves
MOST_HEADER_BYTES = 1_000_000  # longest header that is read
MOST_ROWS = 400  # ordered operators of a model; more would hardly narrow the intervals
# Purpose of records -> file and subject of their report
REPORTS = {
    "holdout": (REPORT, "shapes held out before the fit"),
    "exact": ("exact_shapes.md", "the model on shapes that were measured exactly"),
}

# dense workloads, each followed by its pruned workloads
TargetModels = Sequence[Sequence[Workload]]
# from rates, protocol and seed of a run
Planner = Callable[[Rates, Protocol, int], tuple[MeasurementPlan, Protocol]]


@dataclass(frozen=True)
class RunOptions:
    budget_s: float
    dtype: str = "bf16"
    hardware: str = ""  # profile with the datasheet; "": found by the device's name, or measured
    seed: int = 0


@dataclass(frozen=True)
class MeasuredRun:
    plan: MeasurementPlan
    outcome: Outcome
    records: Records


BUSY_LOAD = 0.1  # load of an idle GPU from which another process is likely
MOST_USED = 0.1  # share of the memory of an idle GPU that is in use
OPERAND_SHARE = 0.9  # share of the free memory that a device reports as its limit


def warnings_of(device: Device) -> list[str]:
    """Return what may spoil a measurement on a GPU, before it begins."""
    description, now = device.describe(), device.snapshot()
    gpu = description.gpu
    if gpu is None:
        return []
    found = []
    if now.throttle == UNKNOWN and not gpu.mig:
        remedy = "pip install nvidia-ml-py"
        found.append(f"clocks, power and throttling of this GPU cannot be read; {remedy}")
    elif reasons := THROTTLING & {*now.throttle}:
        found.append(f"the GPU is throttled ({', '.join(sorted(reasons))}): it needs cooling")
    used = 1.0 - description.memory_bytes / OPERAND_SHARE / gpu.memory_bytes
    if used > MOST_USED:
        found.append(f"other processes hold {percent(used)} of the GPU's memory; end them")
    if isinstance(now.load, float) and now.load > BUSY_LOAD:
        found.append(f"other processes load the GPU ({percent(now.load)}); end them")
    limit = description.stack.get("power_limit_w", UNKNOWN)
    default = gpu.power_limit_w
    known = limit.replace(".", "").isdecimal() and isinstance(default, float)
    if known and float(limit) < 0.99 * float(default):
        lower = f"the power limit, {limit} W, is below the default, {float(default):.0f} W"
        found.append(f"{lower}; times of other machines will be shorter")
    return found


def check_folder(folder: str | Path) -> Path:
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; expected the folder of a run")
    if not path.parent.is_dir():
        raise InputError(f"{path}: folder {path.parent} does not exist")
    refuse_links(path)
    return path


def begin(
    folder: str | Path,
    device: Device,
    dtype: str,
    budget_s: float,
    name: str = RECORDS,
    software: Mapping[str, str] = MappingProxyType({}),
    **extra: Any,
) -> tuple[Path, Header]:
    """Return the file of a run's records and its header, with versions of ``software`` beside those
    of the device."""
    file = check_folder(folder) / name
    if not (isinstance(budget_s, int | float) and budget_s > 0):
        raise InputError(f"budget: expected a time above zero, got {budget_s!r}")
    if dtype not in device.dtypes():
        known = ", ".join(device.dtypes())
        raise InputError(
            f"--dtype {dtype}: not supported by device {device.name}; supported: {known}"
        )
    description = device.describe()
    stack = {**description.stack, **software}
    header = Header(description.device, stack, dtype, extra={"opened": device.name, **extra})
    if not is_new(file):
        read_store(file).header.refuse_other(header, str(file))
    return file, header


def is_new(file: Path) -> bool:
    """Return whether a store has no header, or a part of one, which a kill left."""
    if not file.is_file():  # a folder or a pipe is refused when it is opened
        return not file.exists()
    with file.open("rb") as stream:
        return parse(stream.readline(MOST_HEADER_BYTES), str(file)) is None


def measure_plan(
    file: Path,
    header: Header,
    device: Device,
    options: RunOptions,
    planned: Planner,
    progress: Callable[[int, int], None] | None = None,
    interrupt: Interrupt | None = None,
) -> MeasuredRun:
    protocol = default_protocol(device.describe(), options.budget_s)
    if is_new(file):
        file.parent.mkdir(exist_ok=True)
        rates = probe(device, options.dtype, protocol)
        probed = {"rates": asdict(rates), "seed": options.seed, "budget_s": options.budget_s}
        header = replace(header, extra={**header.extra, **probed})
    with Store(file, header) as store:
        extra = {"seed": options.seed, **store.header.extra}
        try:
            seed = int(number("seed", extra["seed"], SIZE))
            # above zero, as the plan divides by them
            kept = {
                name: max(number(name, value, AMOUNT), 1e-9)
                for name, value in extra.get("rates", {}).items()
            }
            rates = Rates(**kept) if kept else probe(device, options.dtype, protocol)
        except (InputError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file}:1: rates and seed: {error}; restore the file from a copy"
            ) from None
        plan, protocol = planned(rates, protocol, seed)
        outcome = run(
            plan,
            device,
            store.append,
            previous=store.rows,
            protocol=protocol,
            progress=progress,
            interrupt=interrupt,
        )
        known = any(row.get("type") == SUSTAINED for row in store.rows)
        if (
            outcome.complete
            and device.describe().gpu
            and not known
            and (row := sustained(device, options.dtype))
        ):
            store.append(row)
    return MeasuredRun(plan, outcome, content_records(read_store(file)))


def measure_into(
    folder: str | Path,
    device: Device,
    options: RunOptions,
    *,
    targets: TargetModels = (),
    run_models: Sequence[Workload] = (),
    draft: bool = False,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> MeasuredRun:
    """Plan and measure, into a new folder or the folder of an earlier run of the same device.

    The GEMMs of ``targets`` are measured exactly and first, in the order of how much they narrow
    the speedups. Then come the GEMMs of ``run_models`` at the ends of waves. With ``draft``, a
    profile of the shipped fit, or of the datasheet, exists from the beginning. ``progress`` gets
    seconds: passed, and in total.
    """
    description = device.describe()
    memory_bytes = description.memory_bytes
    file, header = begin(folder, device, options.dtype, options.budget_s, memory_bytes=memory_bytes)
    note(f"{description.device}; {description.software}; {options.dtype}")
    datasheet = file.with_name(DATASHEET)
    for line in warnings_of(device):
        note(f"warning: {line}")

    def planned(rates: Rates, protocol: Protocol, seed: int) -> tuple[MeasurementPlan, Protocol]:
        hw = load_hardware(datasheet)
        wanted = target_operators(targets, hw) if targets else []
        turns = _turns_of(run_models, hw, options.dtype)
        plan = _plan(wanted, turns, rates, device, options, protocol=protocol, seed=seed)
        counts = ", ".join(f"{count} {name}" for name, count in plan.counts().items())
        note(f"{len(plan.items) - plan.spare} operators planned, more if time is left: {counts}")
        return plan, protocol

    with Interrupt() as interrupt:
        if is_new(file):  # before anything runs
            header = replace(header, extra={**header.extra, **idle_power(device)})
        if is_new(file) or not datasheet.exists():
            base = replace(base_profile(device, options.dtype, options.hardware), path=None)
            for line in thread_notes(base, description.device):
                note(line)
            datasheet.parent.mkdir(exist_ok=True)
            save_hardware(base, datasheet)
            if draft:
                save_hardware(replace(base, verdict=UNFINISHED), file.with_name(PROFILE))
        return measure_plan(file, header, device, options, planned, progress, interrupt)


def _plan(
    wanted: Sequence[Operator],
    turns: Sequence[Operator],
    rates: Rates,
    device: Device,
    options: RunOptions,
    **how: Any,
) -> MeasurementPlan:
    """Plan the wanted operators, then a base plan with the ``turns`` of waves in the time that is
    left, then spare operators."""
    visits = default_visits(device.describe())
    budget_s = options.budget_s / visits
    plan = in_order(wanted, rates, **how) if wanted else None
    first = plan.items if plan else ()
    left = budget_s - sum(item.cost_s for item in first)
    if plan is None or left > 0.1 * budget_s:
        mixed = _within(turns, {item.operator.key for item in first}, TURNS * left, rates, **how)
        plan = refilled_plan(
            first,
            mixed,
            left - sum(item.cost_s for item in mixed),
            rates=rates,
            dtype=options.dtype,
            refuses=device.refuses,
            **how,
        )
    return replace(plan, budget_s=options.budget_s, visits=visits)


def _within(
    turns: Sequence[Operator], taken: Collection[str], most_s: float, rates: Rates, **how: Any
) -> list[Item]:
    """Return the operators that are not taken as items of a fit, as many as a time allows."""
    new = [op for op in turns if op.key not in taken]
    items = in_order(new, rates, **how).items if new else ()
    ends_s = np.cumsum([item.cost_s for item in items])
    return [replace(item, purpose=FIT) for item, end_s in zip(items, ends_s) if end_s <= most_s]


def _turns_of(models: Sequence[Workload], hw: HardwareProfile, dtype: str) -> list[Operator]:
    """Return the GEMMs of models at the ends of waves; none for a CPU, which has no waves."""
    if hw.architecture == "cpu":
        return []
    gemms = [op for w in models for op in _operators(w)]
    return wave_gemms([(op.n, op.k) for op in gemms], hw.sm_count, dtype)


def keep_apart(records: Records) -> Records:
    """Hold out fit rows with an (n, k) of held-out rows, which a folder of two plans may
    contain."""
    purpose = np.array(records.purpose)
    held = PURPOSES.index("holdout")
    fit = PURPOSES.index("fit")
    gemm = records.is_operator("gemm")
    key = records.n * 2.0**24 + records.k
    mixed = gemm & (purpose == fit) & np.isin(key, key[gemm & (purpose == held)])
    purpose[mixed] = held
    return records.replace(purpose=purpose)


@dataclass(frozen=True)
class Calibrated:
    fit: ProfileFit
    held_out: Report | None  # on held-out shapes
    exact: Report | None  # on shapes that were measured exactly
    disturbed: float  # share of disturbed times


def fit_run(
    folder: str | Path, *, progress: Callable[[int, int], None] | None = None
) -> Calibrated:
    """Fit the records of a run folder, validate on held-out rows, write profile and report."""
    from calibration.validation.validate import write_markdown

    path = Path(folder)
    content = read_store(path / RECORDS)
    records = keep_apart(content_records(content))
    base = _with_sustained(raised(load_hardware(path / DATASHEET), records), content, records)
    fit = _fitted(base, records, progress)
    profile = replace(fit.profile, title=base.title)
    save_hardware(profile, path / PROFILE)
    model = without_exact(profile)
    records = one_method(records)[0]  # the notes are those of the fit
    title = f"Calibration of {content.header.device}, {content.header.dtype}"
    reports: dict[str, Report | None] = {}
    for purpose, (name, subject) in REPORTS.items():
        rows = records.select(
            (records.purpose == PURPOSES.index(purpose)) & np.isfinite(records.seconds)
        )
        try:
            reports[purpose] = validate(model, rows) if len(rows) else None
        except InputError:
            reports[purpose] = None
        if report := reports[purpose]:
            write_markdown(report, path / name, title=f"{title}: {subject}")
    return Calibrated(fit, reports["holdout"], reports["exact"], disturbed_share(records))


def _fitted(
    base: HardwareProfile, records: Records, progress: Callable[[int, int], None] | None
) -> ProfileFit:
    """Fit records with the shipped fit of this GPU as prior. If they are too few, its sections are
    the profile."""
    shipped = base.architecture != "cpu" and any(kind == "gemm" for kind, _ in base.sections)
    try:
        return fit_profile(base, records, prior=base if shipped else None, progress=progress)
    except InputError as error:
        if not shipped:
            raise
        return ProfileFit(base, (), (str(error),))


def _with_sustained(base: HardwareProfile, content: Content, records: Records) -> HardwareProfile:
    ratios = [float(row["ratio"]) for row in content.rows if row.get("type") == SUSTAINED]
    if not ratios:
        return base
    runtime = base.section("runtime", "*")
    about = replace(provenance_of(records), protocol=SUSTAINED_PROTOCOL, rows=len(ratios))
    runtime = replace(
        runtime,
        constants={**runtime.constants, "sustained": Fitted(ratios[-1])},
        provenance=runtime.provenance or about,
        status="calibrated",
    )
    return replace(base, sections={**base.sections, ("runtime", "*"): runtime})


def target_workloads(
    model: str, families: Sequence[str], sparsities: Sequence[float], settings: Mapping[str, Any]
) -> TargetModels:
    out = []
    for request in requests_of([load_model(model)], settings):
        dense = lower(request)
        out.append(
            [
                dense,
                *(prune(dense, family, sparsity) for family in families for sparsity in sparsities),
            ]
        )
    return out


def target_operators(targets: TargetModels, hw: HardwareProfile) -> list[Operator]:
    """Return the dense GEMMs of workloads, each once, best first."""
    batch = WorkloadBatch.of([w for workloads in targets for w in workloads])
    lengths = np.array([len(workloads) for workloads in targets])
    dense = np.repeat(np.cumsum(lengths) - lengths, lengths)
    p = forward_passes(batch, hw)
    shapes = batch.shapes[0]
    places = _operators(shapes)
    chosen = np.array(list(places.values()), dtype=np.intp)
    rows = factors.in_order(p.errors, len(shapes)).take(chosen)
    kind = shapes.kind[chosen]
    kind = kind.astype(np.intp)
    covariance = p.uncertainty.covariance(rows.wide(), rows.correlated, rows.coordinates, kind)
    order = next_rows(rows, kind, covariance[dense] - covariance, MOST_ROWS)
    operators = list(places)
    return [operators[i] for i in dict.fromkeys((*order, *range(len(operators))))]


def _operators(w: Workload) -> dict[Operator, int]:
    """Return the dense GEMMs of a workload in one number format, each with its first row."""
    plain = (w.kind == Kind.GEMM) & (w.kernel == Kernel.DENSE) & (w.dtype == w.weight_dtype)
    plain &= (w.window == 0) & (w.block == 0)
    places: dict[Operator, int] = {}
    for row in np.flatnonzero(plain).tolist():
        m, n, k = max(round(float(w.m[row])), 1), int(w.n[row]), int(w.k[row])
        places.setdefault(Operator("gemm", DTYPES[int(w.dtype[row])], m=m, n=n, k=k), row)
    return places
