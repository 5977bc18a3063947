"""Notes on existing models, on measured times and on limits of predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simulator.capacity import MOST_DEVICES, memory
from simulator.codes import DTYPES, ROLES, Kind, label_of
from simulator.display import with_and
from simulator.engines.engine import Engine, load_engine
from simulator.hardware.profile import SECTION_OF, HardwareProfile, link_choices
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.models.quantization import FORMATS, stated_text
from simulator.operators import BY_CODE, MOST_CODES, TITLES
from simulator.operators.base import octaves_outside, unfitted
from simulator.operators.gemm import GEMM_CONSTANTS
from simulator.passes import by_formats, section_of
from simulator.prediction.batch import batch_with
from simulator.prediction.compare import SMALL_SHARE, compare
from simulator.prediction.prunings import Pruning, difference_of
from simulator.prediction.requests import batch_name, by_key, computed_on, on, once
from simulator.prediction.result import Results
from simulator.request import SETTINGS, Request
from simulator.uncertainty.forward import operator_times
from simulator.uncertainty.intervals import Inferred, workload_time
from simulator.uncertainty.operators import OperatorTimes
from simulator.units import seconds
from simulator.workload import Workload


def difference_lines(dense: Model, pruned: Model) -> tuple[str, ...]:
    own = (dense.found,) if dense.found else ()
    if pruned == dense:
        return own
    lines, _, share = difference_of(dense, pruned)
    whole = (f"{100.0 * share:.1f} % of all parameters removed",) if len(lines) > 1 else ()
    return (
        *own,
        f"{pruned.name}: {'; '.join((*(lines or ('has the shapes of the dense model',)), *whole))}",
    )


def differences(models: Iterable[Model], prunings: Sequence[Pruning]) -> Iterator[str]:
    """Yield :func:`difference_lines` of every model and existing pruned model."""
    for pair in dict.fromkeys((model, p.model or model) for model in models for p in prunings):
        yield from difference_lines(*pair)


def overridden(request: Request, models: Iterable[Model | None]) -> Iterator[str]:
    """Yield a note on each model whose configuration states other number formats than the
    request, and one on a power limit."""
    yield from limit_notes(request.power_limit)
    asked = {name: value for name in FORMATS if (value := getattr(request, name))}
    for model in filter(None, dict.fromkeys(models)):
        if other := [name for name in asked if getattr(model, name) not in ("", asked[name])]:
            options = " ".join(f"{SETTINGS[name].flags[0]} {asked[name]}" for name in other)
            yield f"{model.name} states {stated_text(model)}, but {options} counts"


def limit_notes(limit: float | None) -> Iterator[str]:
    if limit is not None:
        least = "where the limit binds, times are uncertain by at least 15 %"
        yield f"under {limit:g} W: how clocks fall is assumed; {least}"


def computed_wide(
    request: Request, devices: Iterable[HardwareProfile], models: Iterable[Model | None]
) -> Iterator[str]:
    """Yield a note per device that runs fp8 without fp8 arithmetic."""
    known = [*filter(None, models)]
    for hw in devices:
        if (wide := computed_on(request, hw, known)) is not request:
            yield (
                f"{hw.label} has no fp8 arithmetic: {request.engine} computes in {wide.dtype}"
                " with fp8 weights"
            )


def inferred_by(dense: Workload, hw: HardwareProfile, request: Request) -> Inferred | None:
    """Infer device and host speed from the measured time of a request; None without a measured
    time."""
    if request.dense_s is None:
        return None
    return compare(batch_with(dense, [dense]), hw, request.level, request.dense_s)[1]


def inferred_line(inferred: Inferred, hardware: str, dense_s: float) -> str:
    predicted = (
        f"{hardware}: {seconds(dense_s)} measured, {seconds(inferred.predicted_s)} predicted"
    )
    if not inferred.consistent:
        apart = f"{inferred.deviation:.1f} standard deviations apart, so it is ignored"
        return (
            f"{predicted}: {apart}; check that it is for this model, GPU, engine, phase, batch and"
            " length"
        )
    host = f"x{inferred.host:.2f} of a typical host"
    if inferred.layer_s:
        host = f"{seconds(inferred.layer_s)} per layer, {host}"
    if inferred.host_bound:
        low, high = inferred.pass_share
        if high - low > SPLIT:
            per_pass = f"{100 * low:.0f} to {100 * high:.0f} % of the host time is per pass"
            host += f"; {per_pass}, which fewer layers do not reduce"
        return f"{predicted}: host-bound ({host})"
    also = f", the host {host}" if inferred.host_s else ""
    return f"{predicted}: kernels take x{inferred.device:.2f} of the prediction{also}"


BETTER, SHARE, OCTAVES = 1.03, 0.1, 1.0
"""Speedup over roofline bound, share of the time, and octaves outside the measured sizes from which
a note is given."""

# share of the time in collectives from which a note states the assumed connection
LINK_SHARE = 0.05
SPLIT = 0.05  # width of the interval of the share of host time per pass from which a note states it

_EXPERTS = {
    "grouped": "runs routed experts together",
    "touched": "loops over the routed experts that tokens use",
    "all": "loops over all routed experts",
}


def dense_notes(
    results: Results, request: Request, devices: Sequence[HardwareProfile]
) -> Iterator[str]:
    """Yield notes on the length, memory, shapes, profiles and measured time of a dense workload."""
    about, config = lower(request).meta, load_model(request.model)
    if (reached := about.seq + about.new_tokens) > config.max_positions:
        supported = f"{config.name} supports {config.max_positions} positions"
        yield f"{supported}, but {reached} were requested; timed as if supported"
    exceeds = ~results.columns["dense_fits"]
    too_large = dict(
        zip(*(results.columns[name][exceeds] for name in ("hardware", "dense_largest_batch")))
    )
    for hw in devices:
        dense = lower(*on([request], hw))
        if hw.label in too_large:
            where = (
                f"{config.name} at {about.phase}, {batch_name(about.phase)} {about.batch}, seq"
                f" {about.seq}"
            )
            needs = _too_large(dense, hw, too_large[hw.label])
            yield f"{where} on {hw.label} {needs}; its times are hypothetical"
        yield from filter(
            None,
            (
                assumed_link(hw, dense),
                beyond_measured(dense, hw),
                _host_note(dense, hw, request),
                fallback(hw, dense),
                related_kernels(hw, dense),
            ),
        )


def _host_note(dense: Workload, hw: HardwareProfile, request: Request) -> str:
    """Return what a measured time of the dense workload says; without one, a note on releases of
    its engine."""
    if request.dense_s is None:
        return other_releases(dense, hw, request)
    inferred = inferred_by(dense, hw, request)
    return inferred_line(inferred, hw.label, request.dense_s) if inferred else ""


def other_releases(dense: Workload, hw: HardwareProfile, request: Request) -> str:
    """Return a note on releases of an engine that is named without one, if their time of the dense
    workload is outside the interval; else ""."""
    engine = load_engine(request.engine)
    if not engine.generations or "@" in engine.name or engine.name in hw.engines:
        return ""
    usual = workload_time(dense, hw, request.level)
    outside = {}
    for generation in engine.generations[:-1]:
        named = replace(request, engine=f"{request.engine}@{generation.name}")
        time = workload_time(lower(*on([named], hw)), hw).total_s
        if not usual.total_lower_s <= time <= usual.total_upper_s:
            outside[generation.name] = f"{generation.title}: {seconds(time)}"
    if not outside:
        return ""
    return (
        f"{hw.label}: at {batch_name(dense.meta.phase)} {dense.meta.batch}, other releases are"
        f" outside the interval ({'; '.join(outside.values())}); name yours, such as --engine"
        f" {engine.name}@{[*outside][-1]}"
    )


def _too_large(dense: Workload, hw: HardwareProfile, largest: int) -> str:
    m, name = memory(dense, hw), batch_name(dense.meta.phase)
    way = (
        f"fits on {m.devices_needed} devices"
        if m.devices_needed
        else f"does not fit on {MOST_DEVICES} devices"
    )
    way += f"; the largest {name} that fits is {largest}" if largest else ""
    return (
        f"needs {m.total_bytes / 2**30:.1f} GiB, {m.capacity_bytes / 2**30:.1f} GiB available"
        f" ({way})"
    )


def above_bound(
    results: Results,
    prunings: Sequence[Pruning],
    request: Request,
    devices: Sequence[HardwareProfile],
) -> Iterator[str]:
    """Yield one note per device on the speedup that is farthest above its roofline bound."""
    above, label = (
        results.columns["speedup"] / results.columns["roofline_bound"],
        results.columns["hardware"],
    )
    for hw in devices:
        mine = np.flatnonzero((label == hw.label) & (above > BETTER))
        if len(mine):
            most = int(mine[above[mine].argmax()])
            r, pruning = results[most], prunings[results.pruning[most]]
            (one,) = on([request], hw)
            dense = lower(one)
            why = better_than_bound(
                dense, pruning.apply(dense, one), hw, r.speedup, r.roofline_bound
            )
            request_text = f"{r.phase}, batch {r.batch}, seq {r.seq}"
            yield f"{hw.label}, {request_text}: {r.pruning} ({r.speedup:.2f}x) is {why}"


def beyond_measured(w: Workload, hw: HardwareProfile) -> str:
    """Return a note if GEMMs with a notable share of the time lie far outside the fitted sizes, or
    ""."""
    served = load_engine(w.meta.engine).serving(hw)
    for rows, dtype, weight in by_formats(w, Kind.GEMM):
        sizes = np.log2([w.m[rows], w.n[rows], w.k[rows]]).T
        octaves = octaves_outside(sizes, served.section("gemm", label_of(dtype, weight)))
        if octaves is None or octaves.max(initial=0.0) <= OCTAVES:
            continue
        spent = _timed(w, hw)[0].seconds * w.count
        if spent[rows][octaves > OCTAVES].sum() >= SHARE * spent.sum():
            m, n, k = (f"{2.0**v:.0f}" for v in sizes[np.argmax(octaves)])
            far = f"{octaves.max():.1f} octaves outside the measured sizes ({m} x {n} x {k})"
            return f"{hw.label}: GEMMs up to {far}: extrapolated, with wider intervals"
    return ""


def fallback(hw: HardwareProfile, w: Workload) -> str:
    """Return a note on assumed kernels, or "": kernels of another stack than the engine's (unless
    the user selected the stack), an unused fit of another decode kernel, generic defaults of an
    architecture without any fit, and :func:`experts_assumed`."""
    engine, labels = load_engine(w.meta.engine), sections_of(w)
    assumed = experts_assumed(w)
    if "generic" in unfitted(
        hw.section("gemm", labels.get("gemm", w.meta.dtype)), GEMM_CONSTANTS, hw.architecture
    ):
        return (
            f"{hw.label}: generic defaults, because no GEMMs of its architecture"
            f" ({hw.architecture}) have their own"
        )
    if hw.pinned or not engine.stacks:
        return assumed
    texts = [
        *_other_stacks(engine, hw, labels),
        *_unused_decode(engine, hw, labels.get("attention_decode", "")),
    ]
    return "; ".join(filter(None, (f"{hw.label}: {'; '.join(texts)}" if texts else "", assumed)))


def related_kernels(hw: HardwareProfile, w: Workload) -> str:
    """Return a note on kernels of a workload that were fitted on another GPU, or ""."""
    served = load_engine(w.meta.engine).serving(hw)
    parts: dict[str, list[str]] = {}
    for part, label in sections_of(w).items():
        if part in TITLES and (origin := served.fitted_on(served.section(part, label))):
            parts.setdefault(origin, []).append(TITLES[part])
    fitted = " and ".join(f"{with_and(once(some))} fitted on {gpu}" for gpu, some in parts.items())
    return (
        f"{hw.label}: kernels of {fitted}, never measured on {hw.name}: intervals include how far"
        " GPUs of one architecture differ"
        if parts
        else ""
    )


def _other_stacks(engine: Engine, hw: HardwareProfile, labels: Mapping[str, str]) -> Iterator[str]:
    """Yield each stack other than the engine's whose kernels are used."""
    usual, served = engine.stacks[0], engine.serving(hw)
    stacks: dict[str, str] = {}
    for part, label in labels.items():
        if part in TITLES:
            stack = served.section(part, label).stack
            stacks[TITLES[part]] = usual if SECTION_OF.get((part, usual)) == stack else stack
    fitted = [stack for stack in stacks.values() if stack]
    for stack in dict.fromkeys(fitted):
        parts = [title for title, fitted_to in stacks.items() if fitted_to == stack]
        if stack != usual:
            some = "" if len(parts) == len(fitted) else f" for {with_and(parts)}"
            yield f"{usual} kernels are not calibrated{some}; {stack} kernels are used instead"


def _unused_decode(engine: Engine, hw: HardwareProfile, label: str) -> Iterator[str]:
    """Yield the stack whose fit of decode attention the engine does not use by default."""
    served = engine.serving(hw)
    fits = (fit for (part, _), fit in served.sections.items() if part == "attention_decode")
    unused = next(fits, None)
    if not label or unused is None:
        return
    if served.section("attention_decode", label).status == "default":
        yield (
            f"{unused.stack}'s decode attention is not the default of {engine.stacks[0]}; if it is"
            f" enabled, use {hw.name}@{unused.stack}"
        )


def assumed_link(hw: HardwareProfile, w: Workload) -> str:
    """Return a note on an assumed connection of the devices; "" if collectives take less than
    :data:`LINK_SHARE`."""
    if hw.link is None or w.meta.link or w.meta.devices == 1 or hw.own_link:
        return ""
    spent = _timed(w, hw)[0].seconds * w.count
    if spent[w.kind == Kind.COLLECTIVE].sum() < LINK_SHARE * spent.sum():
        return ""
    others = " or ".join(link_choices(hw.link, hw.bridge)[1:])
    # calibration/evidence/build_profiles.py, STAGED
    slower = hw.link.connection == "pcie" and w.meta.devices > 2
    return (
        f"{hw.label}: its devices are assumed to have {hw.link.text}"
        f"{'; a measured host without it was 4 (4 GPUs) to 16 times (8 GPUs) slower' * slower}"
        f"; for another link, use --link {others}"
    )


def experts_assumed(w: Workload) -> str:
    """Return how a workload's engine is assumed to run routed experts if its generations differ in
    that, or ""."""
    engine = load_engine(w.meta.engine)
    ways = {g.name: g.values.get("experts", engine.experts) for g in engine.generations}
    if len(set(ways.values())) < 2 or not (w.kind == Kind.EXPERTS).any():
        return ""
    name = engine.name.partition("@")[0]
    others = ", ".join(f"{name}@{other}" for other, way in ways.items() if way != engine.experts)
    return f"{engine.name} {_EXPERTS[engine.experts]} ({engine.title}); others: {others}"


def sections_of(w: Workload) -> dict[str, str]:
    """Return the operators of a profile that a workload needs, and the number format of each
    section."""
    kinds = w.kind.astype(np.int64) * 2 + (w.value_dim > 0)
    out = {}
    for row in sorted(np.unique(kinds, return_index=True)[1].tolist()):
        operator, formats = (
            BY_CODE[int(w.kind[row])],
            (DTYPES[w.dtype[row]], DTYPES[w.weight_dtype[row]]),
        )
        out[section_of(w, row)] = operator.label(*formats)
    return out


def better_than_bound(
    dense: Workload, pruned: Workload, hw: HardwareProfile, speedup: float, bound: float
) -> str:
    """Explain a speedup above its roofline bound; return "" for other speedups. One operator is
    closer to its roofline in the pruned than in the dense model, because kernels of the stack are
    slow at the dense shape; or else the removed work was farther from its roofline than the rest
    (such as the head)."""
    if speedup <= BETTER * bound:
        return ""
    share, lost = _roofline_shares(dense, pruned, hw)
    most = int(np.argmax(lost))
    better = f"better than its bound of {bound:.2f}x because"
    if lost[most] < 0.1 * (1.0 - bound / speedup):
        # no operator explains the gain
        return (
            f"{better} the removed work (launches, ...) is farther from its roofline than the rest"
        )
    kind, role = divmod(most, len(ROLES))
    row = np.flatnonzero((dense.kind == kind) & (dense.role == role))[0]
    label = BY_CODE[kind].label(DTYPES[dense.dtype[row]], DTYPES[dense.weight_dtype[row]])
    section = _timed(dense, hw)[1].section(section_of(dense, row), label)
    what = BY_CODE[kind].titles[0] if dense.is_attention[row] else ROLES[role]
    both = " and ".join(
        f"{100.0 * s[most]:.0f} % {name}" for s, name in zip(share, ("dense", "pruned"))
    )
    kernels = f"{section.stack}'s kernels" if section.stack else "its kernels"
    if kind == Kind.EXPERTS and section["idle_s"] > 0.0:
        return f"{better} {kernels} take {seconds(section['idle_s'])} per expert without tokens"
    return f"{better} {kernels} run {what} at {both} of the roofline"


def _roofline_shares(
    dense: Workload, pruned: Workload, hw: HardwareProfile
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return for each kind x role the share of its time that its roofline is (2, n), in the dense
    and the pruned workload, and the share of its time that the dense workload loses because its
    share is smaller."""
    times, roofs = np.stack([_by_role(w, hw) for w in (dense, pruned)], axis=1)
    both = np.minimum(times, roofs).min(axis=0) > 0.0
    share = np.divide(roofs, times, out=np.zeros_like(times), where=both)
    closer = np.divide(share[0], share[1], out=np.ones(len(both)), where=both)
    return share, times[0] / times[0].sum() * (1.0 - closer)


class UsesDefaults(Protocol):
    """A result or a frontier, some of whose operators may have default constants."""

    @property
    def hardware(self) -> str: ...
    @property
    def uncalibrated(self) -> str: ...
    @property
    def uncalibrated_share(self) -> float: ...


def uncalibrated_of(predictions: Iterable[UsesDefaults]) -> tuple[str, float]:
    """Return the operators with default constants in some results or frontiers, and their largest
    share of the time."""
    every = list(predictions)
    parts = {part for r in every for part in r.uncalibrated.split("+")}
    share = max((r.uncalibrated_share for r in every), default=0.0)
    return "+".join(part for part in TITLES if part in parts), share


def uncalibrated(predictions: Iterable[UsesDefaults], measured: bool = False) -> tuple[str, ...]:
    """Return one note on operators with default constants, for all devices on which their share of
    the time is at least :data:`SMALL_SHARE`; ``measured``: the user gave a dense time."""
    mine = by_key(
        (r for r in predictions if r.uncalibrated_share >= SMALL_SHARE), lambda r: r.hardware
    )
    of = {device: uncalibrated_of(some) for device, some in mine.items()}
    devices: dict[str, list[str]] = {}
    for device, (parts, _) in sorted(of.items(), key=lambda item: -item[1][1]):
        devices.setdefault(with_and([TITLES[part] for part in parts.split("+")]), []).append(device)
    what = [
        f"{names} on {with_and(some)}"
        f" ({'up to ' if len(some) > 1 else ''}{100.0 * of[some[0]][1]:.0f} % of the time)"
        for names, some in devices.items()
    ]
    action = (
        "run prunesim calibrate on the"
        f" device{'' if measured else ', or give a measured --dense-time'}"
    )
    return (
        (f"{', '.join(what)}: not calibrated; defaults with wide intervals are used; {action}",)
        if what
        else ()
    )


def _timed(w: Workload, hw: HardwareProfile) -> tuple[OperatorTimes, HardwareProfile]:
    """Return the time of one execution of each row, and the device with the kernels of the
    workload's engine."""
    engine = load_engine(w.meta.engine)
    hw = engine.serving(hw)
    return operator_times(w, hw, engine=engine), hw


def _by_role(w: Workload, hw: HardwareProfile) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return time and roofline of each kind x role of a workload, s, without overhead operators."""
    t, code = _timed(w, hw)[0], w.kind.astype(np.int64) * len(ROLES) + w.role
    size, kept = MOST_CODES * len(ROLES), np.where(w.overhead, 0.0, w.count)
    return np.bincount(code, t.seconds * kept, size), np.bincount(code, t.roofline_s * kept, size)
