"""Records and a datasheet to a calibrated profile: each operator and number format the records hold goes to its own fit.

Use :func:`fit_profile`. What the records have no rows for keeps the section of the base profile, or none, and is named in the notes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit.kernels import fit_extra, weight_copies
from calibration.records.exact import with_exact
from calibration.records.records import OPERATORS, PURPOSES, Flag, Records
from simulator.errors import InputError
from simulator.hardware.parts import Fitted, Provenance, Section
from simulator.hardware.profile import HardwareProfile
from simulator.workload import DTYPES

F = NDArray[np.float64]

FEWEST_GEMMS, FEWEST_TO_ANCHOR, FEWEST_ATTENTION, FEWEST_ELEMENTWISE, FEWEST_EXTRA = 20, 10, 20, 20, 12
"""Rows an operator needs: for a fit, to re-anchor, and for the constants of a kernel that lean on the dense fit."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FittedPart:
    """One section that was fitted.

    Attributes
    ----------
    operator, dtype : str
        Key of the section.
    rows : int
        Rows it was fitted on.
    section : Section
    fixed : mapping of str to str
        Constants that were free and could not be known, and why.
    correlations : mapping of (str, str) to float
        Of the logarithms of the fitted constants.
    """

    operator: str
    dtype: str
    rows: int
    section: Section
    fixed: Mapping[str, str] = field(default_factory=dict)
    correlations: Mapping[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True)
class ProfileFit:
    """A calibrated profile, its fitted parts and what else is worth knowing."""

    profile: HardwareProfile
    parts: tuple[FittedPart, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Task:
    """One fit to be made."""

    operator: str
    dtype: str
    rows: Records
    run: Callable[[_Task, HardwareProfile], FittedPart]


@dataclass(frozen=True)
class _Options:
    prior: HardwareProfile | None
    anchor: bool
    date: str
    seed: int


def fit_profile(
    base: HardwareProfile,
    records: Records,
    *,
    dtype: str | None = None,
    prior: HardwareProfile | None = None,
    anchor: bool = False,
    date: str = "",
    seed: int = 0,
    progress: Progress | None = None,
) -> ProfileFit:
    """Fit everything that records allow.

    Parameters
    ----------
    base : HardwareProfile
        Datasheet facts of the device; sections that the records say nothing of are kept.
    records : Records
        Rows marked ``holdout``, ``exact`` or ``anchor`` are kept from the fit; ``exact`` ones stay with the GEMM section as they are.
    dtype : str, optional
        Number format to fit; all by default.
    prior : HardwareProfile, optional
        A sibling device or another stack: its sections lend a small sample what it cannot know.
    anchor : bool
        Refit only the few constants of the base's (or prior's) GEMM section that differ between software stacks.
    date : str
        ISO 8601, for the provenance; by default the newest the records name.
    seed : int
    progress : callable, optional
        Called with (fits done, fits in all).

    Returns
    -------
    ProfileFit

    Raises
    ------
    InputError
        When nothing can be fitted; the reasons are in the message.
    """
    notes: list[str] = []
    usable = _usable(records, notes)
    if dtype is not None:
        usable = usable.select(np.char.startswith(_formats(usable), dtype))
    options = _Options(prior, anchor, date, seed)
    tasks = _tasks(base, usable, options, notes)
    if not tasks:
        raise InputError(f"nothing to fit: {'; '.join(notes) or 'the records hold no operator that has a fit'}")
    sections = dict(base.sections)
    parts: list[FittedPart] = []
    for done, task in enumerate(tasks):
        try:
            part = task.run(task, replace(base, sections=MappingProxyType(sections)))
        except InputError:
            raise
        except ValueError as error:  # too few usable rows: the other operators may still have enough
            notes.append(f"{task.operator} {task.dtype}: {error}")
        else:
            sections[task.operator, task.dtype] = part.section
            parts.append(part)
        if progress is not None:
            progress(done + 1, len(tasks))
    if not parts:
        raise InputError(f"nothing could be fitted: {'; '.join(notes)}")
    final: dict[tuple[str, str], FittedPart] = {}
    for p in parts:  # what other kernels added to a section belongs to the fit it leans on
        known = final.setdefault((p.operator, p.dtype), p)
        final[p.operator, p.dtype] = replace(known, fixed={**known.fixed, **p.fixed})
    profile = with_exact(replace(base, sections=MappingProxyType(sections), path=None), records)
    return ProfileFit(
        profile, tuple(replace(p, section=profile.sections[key]) for key, p in final.items()), tuple(notes)
    )


def _formats(records: Records) -> NDArray[np.str_]:
    """Arithmetic format of each row; an empty table has none."""
    return np.array(DTYPES)[records.dtype] if len(records) else np.zeros(0, dtype=np.str_)


def _usable(records: Records, notes: list[str]) -> Records:
    """Rows for the fit: no throttled ones, none kept apart on purpose. What is flagged otherwise is named."""
    apart = np.isin(records.purpose, [PURPOSES.index(name) for name in ("holdout", "exact", "anchor")])
    throttled = (records.flags & int(Flag.THROTTLED)) != 0
    timed = np.isfinite(records.seconds) & (records.seconds > 0)
    for count, text in (
        (int((apart & ~throttled).sum()), "rows were kept from the fit on purpose (held out, exact shapes, anchors)"),
        (int(throttled.sum()), "rows were measured under throttling and are left out"),
        (int((~timed).sum()), "rows have a time that cannot be one and are left out"),
    ):
        if count:
            notes.append(f"{count} {text}")
    kept = records.select(~apart & ~throttled & timed)
    for flag in (Flag.NOISY, Flag.DRIFT, Flag.CONFLICT):
        if count := int(((kept.flags & int(flag)) != 0).sum()):
            notes.append(f"{count} of {len(kept)} rows are flagged {flag.name}; they are in the fit")
    return kept


def _tasks(base: HardwareProfile, records: Records, options: _Options, notes: list[str]) -> list[_Task]:
    """The fits that the rows allow, dense GEMMs first because others lean on them."""
    labels = records.labels().astype(str) if len(records) else np.zeros(0, dtype=np.str_)
    formats = _formats(records)
    out: list[_Task] = []

    def add(
        operator: str,
        dtype: str,
        rows: Records,
        fewest: int,
        run: Callable[[_Task, HardwareProfile], FittedPart],
        what: str,
    ) -> None:
        if dtype not in base.rates and dtype != "*":
            notes.append(f"{what}: {len(rows)} rows left out, {base.name} has no {dtype} arithmetic")
        elif len(rows) < fewest:
            notes.append(f"{what}: {len(rows)} rows are too few, a fit needs {fewest}")
        else:
            out.append(_Task(operator, dtype, rows, run))

    gemm = records.is_operator("gemm")
    for label in np.unique(labels[gemm & (records.dtype == records.weight_dtype)]):
        rows = records.select(gemm & (labels == label))
        fewest = FEWEST_TO_ANCHOR if options.anchor else FEWEST_GEMMS
        add("gemm", str(label), rows, fewest, lambda t, hw: _fit_gemm(t, hw, options), f"gemm {label}")
    for dtype in np.unique(formats[gemm & (records.dtype != records.weight_dtype)]):
        rows = records.select(gemm & (records.dtype != records.weight_dtype) & (formats == dtype))
        names = ["quant_step", "quant_load", "quant_time"]
        add("gemm", str(dtype), rows, FEWEST_EXTRA, _extra(names), f"gemm with narrower weights, {dtype}")
    sparse = records.is_operator("gemm_2to4")
    for dtype in np.unique(formats[sparse]):
        rows = records.select(sparse & (formats == dtype))
        names = ["sparse_step", "sparse_load", "sparse_time"]
        add("gemm", str(dtype), rows, FEWEST_EXTRA, _extra(names), f"2:4 gemm {dtype}")
    for operator in ("attention_prefill", "attention_decode"):
        # a window has no fit of its own, a narrower cache neither: the model widens its interval for them
        mine = records.is_operator(operator) & (records.window == 0) & (records.dtype == records.weight_dtype)
        for dtype in np.unique(formats[mine]):
            rows = records.select(mine & (formats == dtype))
            add(
                operator,
                str(dtype),
                rows,
                FEWEST_ATTENTION,
                lambda t, hw: _fit_attention(t, hw, options),
                f"{operator} {dtype}",
            )
    moved = records.is_operator("elementwise", "copy")
    for dtype in np.unique(formats[moved & records.is_operator("elementwise")]):
        rows = records.select(moved & (formats == dtype))
        add(
            "elementwise",
            str(dtype),
            rows,
            FEWEST_ELEMENTWISE,
            lambda t, hw: _fit_elementwise(t, hw, options),
            f"elementwise {dtype}",
        )
    launches = records.is_operator("launch_eager", "launch_graph")
    if launches.any():
        add("runtime", "*", records.select(launches), 1, lambda t, hw: _fit_runtime(t, hw, options), "launches")
    known = {
        "gemm",
        "gemm_2to4",
        "attention_prefill",
        "attention_decode",
        "elementwise",
        "copy",
        "launch_eager",
        "launch_graph",
    }
    for name in [n for n in OPERATORS if n not in known]:
        if count := int(records.is_operator(name).sum()):
            notes.append(
                f"{name}: {count} rows have no fit of their own; validation compares them with the sum of their parts"
            )
    return out


def provenance_of(records: Records, date: str = "") -> Provenance:
    """What a section says of the rows it was fitted on."""

    def joined(values: Iterable[str]) -> str:
        once = list(dict.fromkeys(v for v in values if v))
        return " and ".join(once[:3]) + (f" and {len(once) - 3} more" if len(once) > 3 else "") or "unknown"

    used = [records.sources[i] for i in np.unique(records.source)]
    software = joined(f"{s.software}{f' ({s.kernel})' if s.kernel else ''}" for s in used)
    return Provenance(
        source=joined(
            f"{s.origin}{f' [{s.licence}]' if s.licence else ''}" if s.origin else f"measured here, run {s.run}"
            for s in used
        ),
        digest=records.tidy().digest(),
        date=date or max((s.date for s in used), default="") or "unknown",
        software=software,
        device=joined(s.device for s in used),
        protocol=joined(s.method for s in used),
        rows=len(records),
    )


def fractions(accuracy: Mapping[str, float]) -> dict[str, float]:
    """Percent, as the GEMM fit reports, to the fractions that profiles hold."""
    return {name: value / 100.0 for name, value in accuracy.items()}


# -- one fit each -----------------------------------------------------------------------------------------------------------------


def _prior_section(options: _Options, operator: str, dtype: str) -> Section | None:
    if options.prior is None or dtype not in options.prior.rates:
        return None
    section = options.prior.section(operator, dtype)
    return None if section.status == "default" else section


def _fit_gemm(task: _Task, hw: HardwareProfile, options: _Options) -> FittedPart:
    from calibration.fit.gemm import anchor_gemm, fit_gemm

    r = task.rows
    known: dict[str, Any] = {
        "dtype": task.dtype,
        "copies": weight_copies(r),
        "provenance": provenance_of(r, options.date),
    }
    prior = _prior_section(options, "gemm", task.dtype)
    if options.anchor:
        section = prior or hw.section("gemm", task.dtype)
        if section.status == "default":
            raise InputError(
                f"--anchor: {hw.name} has no calibrated gemm {task.dtype} section to move; name one that has by --prior"
            )
        fit = anchor_gemm(section, r.m, r.n, r.k, r.seconds, hw, **known)
        if section.provenance is not None:
            origin = f"{section.provenance.borrowed_from or section.provenance.software}, re-anchored"
            fit = replace(
                fit, section=replace(fit.section, provenance=replace(known["provenance"], borrowed_from=origin))
            )
    else:
        fit = fit_gemm(r.m, r.n, r.k, r.seconds, hw, prior=prior, seed=options.seed, **known)
    names = list(fit.constants.std_errors)
    pairs = {
        (a, b): float(fit.constants.correlation[i, j])
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j
    }
    section = replace(fit.section, accuracy=MappingProxyType(fractions(fit.section.accuracy)))
    return FittedPart("gemm", task.dtype, len(r), section, fit.constants.fixed, pairs)


def _extra(names: Sequence[str]) -> Callable[[_Task, HardwareProfile], FittedPart]:
    """The fit of constants of other kernels (2:4, narrower weights) that multiply those of the dense one."""

    def run(task: _Task, hw: HardwareProfile) -> FittedPart:
        section, fixed = fit_extra(task.rows, hw, task.dtype, names)
        return FittedPart("gemm", task.dtype, len(task.rows), section, fixed)

    return run


def _fit_attention(task: _Task, hw: HardwareProfile, options: _Options) -> FittedPart:
    from calibration.fit.attention import fit_attention
    from calibration.fit.attention_columns import columns_of, device_of

    phase = task.operator.removeprefix("attention_")
    prior = _prior_section(options, task.operator, task.dtype)
    start = None if prior is None else {name: c.value for name, c in prior.constants.items()}
    fit = fit_attention(
        phase, columns_of(task.rows), device_of(hw, task.dtype), hw.architecture, start=start, seed=options.seed
    )
    section = fit.section(provenance_of(task.rows, options.date))
    return FittedPart(task.operator, task.dtype, fit.rows, section, fit.fixed, fit.correlations)


def _fit_elementwise(task: _Task, hw: HardwareProfile, options: _Options) -> FittedPart:
    from calibration.fit.elementwise import fit_elementwise
    from simulator.hardware.constants import CLASSES
    from simulator.kernels.elementwise import class_code

    r = task.rows
    # copies are measured cold, activations are warm: only where L2 holds neither do they tell the same
    r = r.select(~r.is_operator("copy") | (r.read_bytes + r.write_bytes > hw.l2_bytes))
    code = np.where(r.role >= 0, class_code(np.maximum(r.role, 0)), CLASSES.index("copy"))
    fit = fit_elementwise(
        r.read_bytes + r.write_bytes,
        code,
        r.seconds,
        hw.l2_bytes,
        hw.bandwidth_bytes_per_s,
        hw.architecture,
        seed=options.seed,
    )
    return FittedPart("elementwise", task.dtype, fit.rows, fit.section(provenance_of(r, options.date)), fit.fixed)


def _fit_runtime(task: _Task, hw: HardwareProfile, options: _Options) -> FittedPart:
    """Host time of an eager launch: the median over launches of a kernel too small to take time itself."""
    base = hw.section("runtime", "*")
    constants = dict(base.constants)
    r = task.rows
    eager = r.is_operator("launch_eager")
    small = eager & (r.m == 0)  # the others launch a tiny GEMM
    chosen = r.seconds[small if small.any() else eager]
    if len(chosen):
        value = float(np.median(chosen))
        constants["host_op_s"] = Fitted(value, float(np.std(chosen)) if len(chosen) > 1 else None, "fitted")
        if hw.architecture == "cpu":  # nothing computes while the framework takes the views that every operator needs
            constants["graph_gap_s"] = Fitted(value, None, "borrowed")
    section = Section(MappingProxyType(constants), provenance=provenance_of(r, options.date), status="calibrated")
    return FittedPart("runtime", "*", len(r), section)
