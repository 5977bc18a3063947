"""Fit a calibrated profile to records and a datasheet, one section per operator and number format.
Times of a busy machine can lead a fit to values that no device has: :func:`within_ranges` sets them
to the ranges of a profile.

Published ratios of 2:4 to dense times are comparable within one benchmark; times of different
benchmarks are not. A fit of a kernel that skips work does not change the dense section.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.devices.protocol import HOST_KINDS, LAYER_LAUNCHES, RECURRENT
from calibration.fit.attention import OPERATORS as ATTENTION
from calibration.fit.attention import calls_of, fit_attention
from calibration.fit.gemm import FIT_ROWS, PRIOR_ROWS, fit_gemm, misaligned, products_of
from calibration.fit.operators import (
    CollectiveFit,
    ElementwiseFit,
    ExpertsFit,
    IndexerFit,
    index_sizes,
    layers_of,
)
from calibration.fit.power import FEWEST, fit_measured_power
from calibration.fit.predict import SECTIONS, UNTIMED, predict
from calibration.fit.recurrent import RecurrentFit, recurrent_fit
from calibration.fit.section import Fit, fit_section
from calibration.fit.solver import ConstantsFit, FittedPart, Minimum, fit_logs, gauss_newton
from calibration.measurements import published
from calibration.records.screening import one_method, with_exact
from calibration.records.timing_table import LAUNCHES, OPERATORS, PURPOSES, Flag, Records
from simulator.arrays import BoolArray, FloatArray
from simulator.codes import DTYPE_BYTES, DTYPES, ROLES, labels, role_code
from simulator.display import few
from simulator.errors import InputError
from simulator.hardware.arrays import clipped
from simulator.hardware.profile import (
    LIMITS,
    Fitted,
    HardwareProfile,
    Provenance,
    Section,
    with_section,
)
from simulator.operators import CONSTANTS
from simulator.operators.base import Constant, Machine, Values
from simulator.operators.collective import COLLECTIVES, Messages
from simulator.operators.elementwise import CLASSES, Moves, class_code
from simulator.operators.indexer import IndexerCalls
from simulator.uncertainty.operators import GemmOptions, gemm_time

_BLOCKS = "attention_block_sparse"

# rows that a fit includes although they have a flag -> what the user can do
REMEDIES: Mapping[Flag, str] = {
    Flag.NOISY: "measure longer, on an idle machine",
    Flag.DRIFT: "measure on an idle machine with steady clocks",
    Flag.CONFLICT: "measure these shapes again",
    Flag.WAITED: "measure on an idle machine",
    Flag.POWER_CAPPED: "raise the power limit or cool the GPU, or accept that times depend on it",
}
_APART: Mapping[str, str] = {
    "holdout": "held out",
    "exact": "exact shapes",
    "drift_check": "drift checks",
}

ENOUGH_RATIOS = 5  # published ratios that one constant needs

# Kernel of rows -> its name in an accuracy, its constants, and the rows that its fit needs. A
# gathered GEMM counts if it is one kernel: a gather, a GEMM and a scatter have no constants of this
# kind.
SKIPPING: Mapping[str, tuple[str, tuple[str, ...], int]] = {
    "gemm_2to4": ("2to4", ("sparse_step", "sparse_load", "sparse_time"), 12),
    "gather_gemm": ("gathered", ("block_step",), 6),
    "attention_block_sparse": ("blocks", ("sparse_block",), 6),
    "misaligned": ("misaligned", ("align_step",), 6),
    "misaligned in 8 bits": ("misaligned", ("align_step_8bit",), 6),
}
# values of sparse_step and sparse_load that fit_sparse24 tries; compressed weights do not arrive
# faster than dense ones
STEPS = tuple(np.round(np.arange(0.3, 1.205, 0.01), 2).tolist())
LOADS = tuple(np.round(np.arange(0.5, 1.01, 0.05), 2).tolist())
# up to this number of tokens reading weights takes most of the time, so ratios show sparse_load
FEW_TOKENS = 64
# keys per block; the search uses the cost of such blocks, since sparse_block may be 0 and has no
# log then
EDGE = 64.0


Task = tuple[str, str, Records]  # operator, number format and rows of a fit


@dataclass(frozen=True)
class ProfileFit:
    profile: HardwareProfile
    parts: tuple[FittedPart, ...]
    notes: tuple[str, ...] = ()


def fit_profile(
    base: HardwareProfile,
    records: Records,
    *,
    dtype: str | None = None,
    prior: HardwareProfile | None = None,
    date: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> ProfileFit:
    """Fit all operators and number formats of the records; InputError, with the reasons, when
    nothing can be fitted. ``base`` has the datasheet facts; its sections without records are kept.
    ``exact`` rows are stored with the GEMM section. ``prior``, a related GPU or another stack,
    supports a small sample. ``date`` (ISO 8601) is the date of the provenance, by default the
    newest in the records. ``progress`` is called with (fits done, number of fits). If torch
    measured all rows, the stack of the sections is torch: engines with other kernels have wider
    intervals."""
    records, methods = one_method(records)
    usable, excluded = usable_rows(records, tuple(_APART))
    notes = [*methods, *_flag_notes(usable)]
    if dtype is not None:
        usable = usable.select(np.char.startswith(np.array(DTYPES)[usable.dtype], dtype))
    tasks = _tasks(base, usable, prior, notes)
    if not tasks:
        why = notes + excluded or ["the records hold no operator that has a fit"]
        raise InputError(f"nothing to fit: {'; '.join(why)}")
    stack, profile, parts = _stack_of(usable), base, dict[tuple[str, str], FittedPart]()
    for done, task in enumerate(tasks, start=1):
        try:
            part = _fit(*task, profile, prior)
        except InputError:
            raise
        # too few usable rows: the other operators may still have enough
        except ValueError as error:
            notes.append(f"{task[0]} {task[1]}: {error}")
        else:
            # a section begins with dense rows; those of kernels that skip work follow
            section = replace(
                part.section,
                stack=(
                    profile.sections[task[:2]].stack
                    if task[:2] in parts
                    else stack and _stack_of(task[2])
                ),
                provenance=part.section.provenance or provenance_of(task[2], date),
            )
            profile = replace(profile, sections={**profile.sections, task[:2]: section})
            parts[task[:2]] = _reported(task, part, parts.get(task[:2]))
        if progress is not None:
            progress(done, len(tasks))
    if not parts:
        raise InputError(f"nothing could be fitted: {'; '.join(notes + excluded)}")
    profile = with_exact(replace(base, path=None).calibrated(profile.sections, stack), records)
    profile, outside = within_ranges(profile)
    parts = {key: replace(part, section=profile.sections[key]) for key, part in parts.items()}
    return ProfileFit(profile, tuple(parts.values()), (*notes, *outside, *excluded))


def _stack_of(records: Records) -> str:
    """Return the stack of rows that torch measured: torch, or that of an engine's library."""
    sources = [records.sources[i] for i in np.unique(records.source)]
    kernels = {source.kernel for source in sources}
    own = sources and all("torch" in source.stack for source in sources)
    return (kernels.pop() if len(kernels) == 1 else "") or "torch" if own else ""


def _flag_notes(records: Records) -> list[str]:
    counts = {flag: int(((records.flags & int(flag)) != 0).sum()) for flag in REMEDIES}
    return [
        f"{counts[flag]} of {len(records)} rows are flagged {flag.name}; the fit includes them;"
        f" {remedy}"
        for flag, remedy in REMEDIES.items()
        if counts[flag]
    ]


def _reported(task: Task, part: FittedPart, earlier: FittedPart | None) -> FittedPart:
    """Return a section's part: its dense fit, with the fixed constants of all its kernels."""
    first = earlier or replace(part, operator=task[0], dtype=task[1])
    fixed = {n: why for n, why in first.fixed.items() if n not in part.constants.std_errors}
    return replace(first, constants=replace(first.constants, fixed={**fixed, **part.fixed}))


def within_ranges(profile: HardwareProfile) -> tuple[HardwareProfile, list[str]]:
    """Return a profile whose fitted sections can be read again, and a note per section that had to
    change. Values outside their range are set to its end, values that are not finite to the
    architecture's default."""
    sections, notes = dict(profile.sections), []
    for (operator, dtype), section in profile.sections.items():
        sections[operator, dtype], outside = _section_within(
            operator, section, profile.architecture
        )
        if outside:
            fact = f"{few(outside)} outside the range of any device"
            advice = "set to its end; measure again on an idle machine"
            notes.append(f"{operator} {dtype}: {fact}; {advice}".replace(" *", ""))
    if all(sections[key] is section for key, section in profile.sections.items()):
        return profile, notes
    kept = MappingProxyType(sections)
    return replace(profile, sections=kept, stacks=MappingProxyType({"": kept})), notes


def _section_within(
    operator: str, section: Section, architecture: str
) -> tuple[Section, list[str]]:
    """Return a section within its ranges (the same object if it is), and the constants that were
    not."""
    constants = {
        name: _constant_within(CONSTANTS[operator][name], fitted, architecture)
        for name, fitted in section.constants.items()
    }
    outside = [
        f"{name} {fitted.value:.3g}"
        for name, fitted in section.constants.items()
        # else only rounded to the end of its range
        if not math.isclose(constants[name].value, fitted.value, rel_tol=1e-9)
    ]
    scale = section.section_scale
    changed: dict[str, Any] = {
        "constants": constants,
        "section_scale": LIMITS["section_scale"][1]
        if math.isnan(scale)
        else _clip(scale, *LIMITS["section_scale"]),
        "accuracy": {
            n: _clip(v, *LIMITS["accuracy"])
            for n, v in section.accuracy.items()
            if not math.isnan(v)
        },
    }
    arrays = clipped(section.arrays)
    if arrays is section.arrays and all(getattr(section, n) == v for n, v in changed.items()):
        return section, outside
    return replace(section, arrays=arrays, **changed), outside


def _constant_within(known: Constant, fitted: Fitted, architecture: str) -> Fitted:
    kept = fitted
    if not math.isfinite(fitted.value):
        kept = Fitted(known.default(architecture), None, "default")
    elif not known.low <= fitted.value <= known.high:
        kept = Fitted(_clip(fitted.value, known.low, known.high), None, "fixed")
    if kept.std_error is not None and not 0.0 <= kept.std_error <= LIMITS["std_error"][1]:
        kept = replace(kept, std_error=None)
    return kept


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def usable_rows(records: Records, apart: Sequence[str]) -> tuple[Records, list[str]]:
    """Return the rows with a valid time, without throttling and the purposes ``apart``, and a note
    per reason."""
    bad = {
        UNTIMED: ~records.timed,
        "measured under throttling": (records.flags & int(Flag.THROTTLED)) != 0,
    }
    bad |= {_APART[name]: records.purpose == PURPOSES.index(name) for name in apart}
    excluded = [
        f"{int(rows.sum())} rows excluded: {reason}" for reason, rows in bad.items() if rows.any()
    ]
    return records.select(~np.any(list(bad.values()), axis=0)), excluded


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows that one kind of fit may use, and the number that it needs."""

    operator: str
    title: str  # title of the rows of one format, in notes
    mask: BoolArray
    formats: NDArray[np.str_]
    fewest: int


def _tasks(
    base: HardwareProfile, records: Records, prior: HardwareProfile | None, notes: list[str]
) -> list[Task]:
    """Return the fits with enough rows, dense GEMMs first: other fits need them."""
    out: list[Task] = []
    for kind in _kinds(base, records):
        for dtype in map(str, np.unique(kind.formats[kind.mask])):
            rows = records.select(kind.mask & (kind.formats == dtype))
            many = f"{kind.title.format(dtype)}: {len(rows)} rows"
            supported = kind.operator == "gemm" and _prior_section(prior, "gemm", dtype) is not None
            fewest = min(PRIOR_ROWS, kind.fewest) if supported else kind.fewest
            if dtype not in (*labels(base.rates), "*"):
                notes.append(f"{many} excluded: {base.name} has no {dtype} arithmetic")
            elif len(rows) < fewest:
                notes.append(f"{many} are too few; a fit needs {fewest}; measure longer")
            else:
                out.append((kind.operator, dtype, rows))
    for name in ("low_rank", "gather_gemm", "grouped_gemm"):
        if count := int((records.is_operator(name) & ~_gathered(records)).sum()):
            judged = "validation compares them with the sum of their parts"
            notes.append(f"{name}: {count} rows have no separate fit; {judged}")
    return out


def _kinds(base: HardwareProfile, records: Records) -> list[_Rows]:
    is_, same = records.is_operator, records.dtype == records.weight_dtype
    formats, gemms = np.array(DTYPES)[records.dtype], records.labels().astype(str)
    every, skipping = np.full(len(records), "*"), {n: rows for n, (*_, rows) in SKIPPING.items()}
    # copies are measured cold, activations are warm: they agree only where L2 holds neither
    copies = is_("copy") & (records.read_bytes + records.write_bytes > base.l2_bytes)
    moved = (is_("elementwise") | copies) & np.isin(formats, formats[is_("elementwise")])
    odd = misaligned(records, base)
    blocks = is_(_BLOCKS) & same, formats, skipping[_BLOCKS]
    pairs = is_("gemm_2to4") & same, formats, skipping["gemm_2to4"]
    return [
        _Rows("gemm", "gemm {}", is_("gemm") & ~odd, gemms, FIT_ROWS),
        _Rows("gemm", "2:4 gemm {}", *pairs),
        _Rows("gemm", "misaligned gemm {}", odd & same, formats, skipping["misaligned"]),
        _Rows("gemm", "gathered gemm {}", _gathered(records), formats, skipping["gather_gemm"]),
        *(_Rows(name, f"{name} {{}}", is_(name), formats, Fit.FEWEST) for name in ATTENTION),
        _Rows("attention_prefill", "block-sparse attention {}", *blocks),
        _Rows("elementwise", "elementwise {}", moved, formats, Fit.FEWEST),
        _Rows("runtime", "launches", is_("launch_graph", *HOST_KINDS), every, 1),
        _Rows("collective", "collectives", _messages(records), every, Fit.FEWEST),
        _Rows("experts", "experts {}", is_("experts"), gemms, ExpertsFit.FEWEST),
        _Rows("indexer", "indexers {}", is_("indexer"), formats, Fit.FEWEST),
        _Rows("power", "power", records.watts > 0.0, every, FEWEST),
        *(
            _Rows(name, f"{name} {{}}", is_(name), formats, RecurrentFit.FEWEST)
            for name in RECURRENT
        ),
    ]


def _gathered(records: Records) -> BoolArray:
    fused = records.fused & (records.dtype == records.weight_dtype)
    return np.asarray(records.is_operator("gather_gemm") & fused)


def _messages(records: Records) -> BoolArray:
    messages = records.is_operator("collective") & (records.launch != LAUNCHES.index("eager"))
    reduces = messages & (records.role == role_code("all_reduce")[0])
    kernels = np.array([source.kernel for source in records.sources], dtype=str)
    library = (kernels == "NCCL")[records.source]
    # an engine's all-reduce replaces the library's
    if (reduces & ~library).any():
        messages &= ~(reduces & library)
    return np.asarray(messages)


def provenance_of(records: Records, date: str = "") -> Provenance:

    def joined(values: Iterable[str]) -> str:
        once = list(dict.fromkeys(v for v in values if v))
        return (
            " and ".join(once[:3]) + (f" and {len(once) - 3} more" if len(once) > 3 else "")
            or "unknown"
        )

    used = [records.sources[i] for i in np.unique(records.source)]
    origins = [(s, f" [{s.licence}]" if s.licence else "") for s in used]
    return Provenance(
        source=joined(
            f"{s.origin}{licence}" if s.origin else f"measured here, run {s.run}"
            for s, licence in origins
        ),
        digest=records.tidy().digest(),
        date=date or max((s.date for s in used), default="") or "unknown",
        software=joined(f"{s.software}{f' ({s.kernel})' if s.kernel else ''}" for s in used),
        device=joined(s.device for s in used),
        protocol=joined(s.method for s in used),
        rows=len(records),
    )


def _fit(
    operator: str, dtype: str, r: Records, hw: HardwareProfile, prior: HardwareProfile | None
) -> FittedPart:
    if operator == "power":
        return fit_measured_power(r, hw)
    if (kernel := _kernel(r, hw)) in SKIPPING:
        return fit_kernel(kernel, r, hw, dtype)
    if operator == "runtime":
        return _fit_runtime(r, hw)
    if operator == "elementwise":
        code = np.where(r.role >= 0, class_code(np.maximum(r.role, 0)), CLASSES.index("copy"))
        moves = Moves(
            r.read_bytes + r.write_bytes,
            code,
            hw.l2_bytes,
            hw.bandwidth_bytes_per_s,
            hw.architecture,
        )
        return fit_section(ElementwiseFit(moves, r.seconds))
    if operator == "collective":
        if hw.link is None:
            raise ValueError(f"{hw.name} has no link to other devices")
        code = np.array([COLLECTIVES.index(ROLES[role]) for role in r.role])
        messages = Messages(code, r.n.astype(np.float64), r.batch.astype(np.float64), hw.link)
        return fit_section(CollectiveFit(messages, r.seconds))
    machine = Machine.of(hw, dtype)
    if operator == "experts":
        return fit_section(layers_of(r, machine, hw.architecture))
    if operator == "indexer":
        calls = IndexerCalls(index_sizes(r, machine.element_bytes), machine)
        return fit_section(IndexerFit(calls, r.seconds, hw.architecture))
    if operator in RECURRENT:
        return fit_section(recurrent_fit(operator, r, machine, hw.architecture))
    inherited = _prior_section(prior, operator, dtype)
    if operator == "gemm":
        return _fit_gemm(r, hw, dtype, inherited)
    start = (
        None if inherited is None else {name: c.value for name, c in inherited.constants.items()}
    )
    return fit_attention(calls_of(r, operator, machine), hw.architecture, start=start)


def _kernel(r: Records, hw: HardwareProfile) -> str:
    """Return the kernel of rows: their operator, or that of misaligned products."""
    if not misaligned(r, hw).any():
        return OPERATORS[int(r.operator[0])]
    return "misaligned" if DTYPE_BYTES[r.dtype[0]] >= 2.0 else "misaligned in 8 bits"


def _prior_section(prior: HardwareProfile | None, operator: str, dtype: str) -> Section | None:
    if prior is None or dtype not in labels(prior.rates):
        return None
    section = prior.section(operator, dtype)
    return None if section.status == "default" else section


def _fit_gemm(r: Records, hw: HardwareProfile, dtype: str, prior: Section | None) -> FittedPart:
    """Fit with the prior, or without it if the errors of held-out folds are then smaller: a GPU may
    run other kernels than those of the prior."""
    data = products_of(r, Machine.of(hw, dtype))
    if prior is None or len(data) < FIT_ROWS:
        return fit_gemm(data, hw, dtype=dtype, prior=prior)
    fits = [fit_gemm(data, hw, dtype=dtype, prior=one) for one in (prior, None)]
    return min(fits, key=lambda part: part.section.accuracy["mape"])


def _fit_runtime(r: Records, hw: HardwareProfile) -> FittedPart:
    """Fit the host time of an eager launch: the median over launches of a decoder layer. Without a
    timed layer, it is the median over launches of a kernel that is too small to take time
    itself."""
    constants = dict(hw.section("runtime", "*").constants)
    bare = r.is_operator("launch_eager")
    small = bare & (r.m == 0)  # the others launch a tiny GEMM
    bare_s = r.seconds[small if small.any() else bare]
    layer_s = r.seconds[r.is_operator("layer_eager")] / LAYER_LAUNCHES
    if len(chosen := layer_s if len(layer_s) else bare_s):
        error = float(np.std(chosen)) if len(chosen) > 1 else None
        constants["host_op_s"] = Fitted(float(np.median(chosen)), error, "fitted")
    if len(bare_s) and hw.architecture == "cpu":
        # a CPU computes nothing while the framework creates the views of an operator
        constants["graph_gap_s"] = Fitted(float(np.median(bare_s)), None, "inherited")
    return FittedPart(Section(constants, status="calibrated"), ConstantsFit({}, {}, {}), len(r))


def _with_constants(
    section: Section, constants: Mapping[str, Fitted], **accuracy: float
) -> Section:
    return replace(
        section,
        constants={**section.constants, **constants},
        accuracy={**section.accuracy, **accuracy},
    )


def fit_kernel(kernel: str, r: Records, hw: HardwareProfile, dtype: str) -> FittedPart:
    """Return the dense section with the constants of a kernel fitted to its rows
    (:data:`SKIPPING`)."""
    operator, (name, constants, _) = SECTIONS[OPERATORS[int(r.operator[0])]], SKIPPING[kernel]
    section = hw.section(operator, dtype)
    if section.status == "default":
        raise ValueError(f"{name}: {len(r)} rows need a fit of dense {operator}, which is missing")

    def log_residual(searched: Values) -> FloatArray:
        trial = _with_constants(section, {n: Fitted(v) for n, v in _known(searched).items()})
        profile = replace(hw, sections={**hw.sections, (operator, dtype): trial})
        return np.asarray(np.log(predict(r, profile).time.seconds / r.seconds))

    start, ranges = _search_of(section, operator, constants)
    fit = fit_logs(
        log_residual, start, ranges, _covariance_of_skipping, weak=0.5, step=1e-3, max_nfev=40
    )
    size = np.abs(np.expm1(log_residual(fit.values)))
    errors = dict(fit.std_errors)
    if "sparse_block" in errors:
        errors["sparse_block"] *= EDGE
    fit = replace(fit, values=_known(fit.values), std_errors=errors)
    section = _with_constants(
        section,
        fit.fitted(),
        **{f"mape_{name}": float(size.mean()), f"median_{name}": float(np.median(size))},
    )
    return FittedPart(section, fit, len(r))


def _search_of(
    section: Section, operator: str, constants: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the start of the search and the range of each constant."""
    low, high = (
        _searched({n: getattr(CONSTANTS[operator][n], end) for n in constants})
        for end in ("low", "high")
    )
    ranges = {n: SimpleNamespace(low=low[n], high=high[n]) for n in constants}
    return _searched({n: section[n] for n in constants}), ranges


def _covariance_of_skipping(minimum: Minimum, _: Values) -> tuple[FloatArray, float]:
    # other rows do not depend on the constants
    informative = np.abs(minimum.slopes).max(axis=1) > 0.02
    freedom = np.count_nonzero(informative) - len(minimum.names)
    if freedom < 1:
        return np.full((len(minimum.names),) * 2, np.inf), np.inf
    squares = np.minimum(minimum.rows**2, 0.15**2)[informative]
    residual_sd = float(np.sqrt(np.sum(squares) / freedom))
    return gauss_newton(minimum.slopes, residual_sd), residual_sd


def _searched(constants: Values) -> dict[str, float]:
    """Return the constants of the search: ``sparse_block`` as the relative cost of blocks of
    :data:`EDGE` keys."""
    return {
        n: 1.0 + value / EDGE if n == "sparse_block" else value for n, value in constants.items()
    }


def _known(searched: Values) -> dict[str, float]:
    return {
        n: EDGE * (value - 1.0) if n == "sparse_block" else value for n, value in searched.items()
    }


def fit_sparse24(hw: HardwareProfile, dtype: str) -> Section:
    """Return the GEMM section of a format with ``sparse_step`` fitted to published ratios by least
    absolute log error, also ``sparse_load`` if some ratios have few tokens; unchanged with fewer
    than :data:`ENOUGH_RATIOS` of this device. bf16 and fp16 count as one format, since they run at
    one rate. "median_2to4" in the accuracy is the median log error of rows held out one at a
    time."""
    section = hw.sections["gemm", dtype]
    m, n, k, ratio = _ratios(hw.name, ("fp16", "bf16") if dtype in ("fp16", "bf16") else (dtype,))
    if len(ratio) < ENOUGH_RATIOS:
        return section
    time = partial(gemm_time, m, n, k, dtype=dtype, options=GemmOptions(copies=1))
    dense_s = time(hw, kernel="dense").seconds
    tried = _trials(with_load=m.min() <= FEW_TOKENS)
    errors = []
    for values in tried:  # for so few constants, a scan is safer than a search
        constants = {name: Fitted(value) for name, value in values.items()}
        pruned = time(
            with_section(hw, dtype, _with_constants(section, constants)), kernel="sparse24"
        )
        errors.append(np.log(dense_s / pruned.seconds / ratio))
    return _best_ratios(section, tried, np.abs(errors))


def _ratios(hardware: str, dtypes: Sequence[str]) -> FloatArray:
    """Return m, n, k and the dense over the 2:4 time of the published rows of a device."""
    rows = [
        [float(r[name]) for name in ("m", "n", "k", "dense_us", "pruned_us")]
        for r in published("gemm_ratios")
        if r["what"] == "2:4" and r["gpu"] != "not stated"
        if r["hardware"] == hardware and r["dtype"] in dtypes
    ]
    m, n, k, dense_us, pruned_us = np.array(rows).reshape(-1, 5).T
    return np.stack([m, n, k, dense_us / pruned_us])


def _trials(with_load: bool) -> list[dict[str, float]]:
    if not with_load:
        return [{"sparse_step": step} for step in STEPS]
    return [{"sparse_step": step, "sparse_load": load} for step in STEPS for load in LOADS]


def _best_ratios(section: Section, tried: Sequence[Values], error: FloatArray) -> Section:
    """Return a section with the best of the tried constants; ``error`` (tried, rows) are log
    errors."""
    total, count = error.sum(axis=1), error.shape[1]
    without = [error[(total - error[:, i]).argmin(), i] for i in range(count)]
    draws = np.random.default_rng(0).integers(0, count, (200, count))
    drawn = [tried[error[:, rows].sum(axis=1).argmin()] for rows in draws]
    best = {
        # None: on its bound
        name: Fitted(value, float(np.std([values[name] for values in drawn])) or None)
        for name, value in tried[total.argmin()].items()
    }
    return _with_constants(section, best, median_2to4=float(np.median(without)))
