"""Notes on the limits of a prediction, one line each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simulator.codes import DTYPES, ROLES, Kind, label_of
from simulator.display import with_and
from simulator.engines.engine import load_engine
from simulator.hardware.link import choices
from simulator.operators import BY_CODE, MOST_CODES, TITLES
from simulator.operators.base import octaves_outside, unfitted
from simulator.operators.gemm import GEMM_CONSTANTS
from simulator.passes import by_formats, section_of
from simulator.prediction.batch import batch_with
from simulator.prediction.compare import SMALL_SHARE, compare
from simulator.uncertainty.forward import operator_times
from simulator.uncertainty.operators import OperatorTimes
from simulator.units import seconds
from simulator.workload import Workload

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.prediction.scenario import Scenario
    from simulator.uncertainty.intervals import Inferred

BETTER, SHARE, OCTAVES = 1.03, 0.1, 1.0
"""Speedup over roofline bound, share of the time, and octaves outside the measured sizes from which a note is given."""

LINK_SHARE = 0.05
"""Share of the time in collectives from which a note states the assumed connection."""

_EXPERTS = {
    "grouped": "runs routed experts together",
    "touched": "loops over the routed experts that tokens use",
    "all": "loops over all routed experts",
}

SPLIT = 0.05
"""Width of the interval of the host time per pass, as a share of the host time, from which a note states it."""


def beyond_measured(w: Workload, hw: HardwareProfile) -> str:
    """Return a note if GEMMs with a notable share of the time lie far outside the fitted sizes, or ""."""
    engine = load_engine(w.meta.engine)
    served = hw.serving(engine.stacks)
    for rows, dtype, weight in by_formats(w, Kind.GEMM):
        found = served.section("gemm", label_of(dtype, weight)).arrays.get("measured")
        if found is None:
            continue
        sizes = np.log2([w.m[rows], w.n[rows], w.k[rows]]).T
        octaves = octaves_outside(sizes, *np.asarray(found, dtype=np.float64))
        if octaves.max() <= OCTAVES:
            continue
        spent = operator_times(w, served, engine=engine)[0].seconds * w.count
        if spent[rows][octaves > OCTAVES].sum() >= SHARE * spent.sum():
            m, n, k = (f"{2.0**v:.0f}" for v in sizes[np.argmax(octaves)])
            far = f"{octaves.max():.1f} octaves outside the measured sizes ({m} x {n} x {k})"
            return f"{hw.label}: GEMMs up to {far}: extrapolated, with wider intervals"
    return ""


def fallback(hw: HardwareProfile, w: Workload) -> str:
    """Return a note on the kernels used if a profile has none of the stacks of a workload's engine, or the engine's
    generations run routed experts differently, or "".

    A stack requested by name is never a fallback. If no GPU of the architecture was fitted, the note states this. A
    fit of decode attention that is unused, as the engine has another kernel, is named.
    """
    engine, dtype = load_engine(w.meta.engine), w.meta.dtype
    assumed = experts_assumed(w)
    if "generic" in unfitted(hw.section("gemm", dtype), GEMM_CONSTANTS, hw.architecture):
        return f"{hw.label}: no GPU of its architecture ({hw.architecture}) was ever fitted: generic defaults"
    if hw.pinned or not engine.stacks:
        return assumed
    own, served = engine.stacks[0], hw.serving(engine.stacks)
    stacks = {
        TITLES[part]: served.section(part, label).stack for part, label in sections_of(w).items() if part in TITLES
    }
    fitted = [stack for stack in stacks.values() if stack]
    out = []
    for stack in dict.fromkeys(fitted):
        parts = [name for name, found in stacks.items() if found == stack]
        if stack != own:
            some = "" if len(parts) == len(fitted) else f" for {with_and(parts)}"
            out.append(f"{own} kernels are not calibrated{some}; {stack} kernels are used instead")
    label = sections_of(w).get("attention_decode")
    unused = next((section for (part, _), section in served.sections.items() if part == "attention_decode"), None)
    if label and unused is not None and served.section("attention_decode", label).status == "default":
        name = f"{hw.name}@{unused.stack}"
        out.append(f"{unused.stack}'s decode attention is not the default of {own}; if it is enabled, use {name}")
    return "; ".join(filter(None, (f"{hw.label}: {'; '.join(out)}" if out else "", assumed)))


def assumed_link(hw: HardwareProfile, w: Workload) -> str:
    """Return a note on the connection of the devices if it was assumed and collectives take over :data:`LINK_SHARE` of
    the time, or "".
    """
    if hw.link is None or w.meta.link or w.meta.devices == 1 or hw.own_link:
        return ""
    engine = load_engine(w.meta.engine)
    spent = operator_times(w, hw.serving(engine.stacks), engine=engine)[0].seconds * w.count
    if spent[w.kind == Kind.COLLECTIVE].sum() < LINK_SHARE * spent.sum():
        return ""
    others = " or ".join(choices(hw.link, hw.bridge)[1:])
    return f"{hw.label}: its devices are assumed to have {hw.link.text}; for another link, use --link {others}"


def experts_assumed(w: Workload) -> str:
    """Return how a workload's engine is assumed to run routed experts if its generations differ in that, or ""."""
    engine = load_engine(w.meta.engine)
    ways = {g.name: g.values.get("experts", engine.experts) for g in engine.generations}
    if len(set(ways.values())) < 2 or not (w.kind == Kind.EXPERTS).any():
        return ""
    name = engine.name.partition("@")[0]
    others = ", ".join(f"{name}@{other}" for other, way in ways.items() if way != engine.experts)
    return f"{engine.name} {_EXPERTS[engine.experts]} ({engine.title}); others: {others}"


def sections_of(w: Workload) -> dict[str, str]:
    """Return the operators of a profile that a workload needs, and the number format of each section."""
    kinds = w.kind.astype(np.int64) * 2 + (w.value_dim > 0)
    first = (int(row) for row in np.unique(kinds, return_index=True)[1])
    found = {row: (DTYPES[w.dtype[row]], DTYPES[w.weight_dtype[row]]) for row in sorted(first)}
    return {section_of(w, row): BY_CODE[int(w.kind[row])].label(*formats) for row, formats in found.items()}


def better_than_bound(dense: Workload, pruned: Workload, hw: HardwareProfile, speedup: float, bound: float) -> str:
    """Explain a speedup above its roofline bound by the operator that is closer to its roofline pruned than dense;
    return "" for other speedups.

    Such a gain is due to a step of one stack's kernels at the dense shape, not to the removed work. If no operator
    gains, the removed work was farther from its roofline than the rest (such as the head).
    """
    if speedup <= BETTER * bound:
        return ""
    (time_d, roof_d), (time_p, roof_p) = (_by_role(w, hw) for w in (dense, pruned))
    both = (time_d > 0) & (time_p > 0) & (roof_d > 0) & (roof_p > 0)
    share = [
        np.divide(roof, time, out=np.zeros(len(time)), where=both)
        for time, roof in ((time_d, roof_d), (time_p, roof_p))
    ]
    lost = np.where(both, time_d * (1.0 - np.divide(share[0], share[1], out=np.ones(len(both)), where=both)), 0.0)
    most = int(np.argmax(lost))
    better = f"better than its bound of {bound:.2f}x because"
    if lost[most] < 0.1 * (1.0 - bound / speedup) * time_d.sum():  # no operator explains the gain
        return f"{better} the removed work (launches, ...) is farther from its roofline than the rest"
    kind, role = divmod(most, len(ROLES))
    row = np.flatnonzero((dense.kind == kind) & (dense.role == role))[0]
    part = section_of(dense, row)
    section = _times(dense, hw)[1].section(part, DTYPES[dense.dtype[row]])
    attention = BY_CODE[kind] if dense.is_attention[row] else None
    what = attention.titles[0] if attention else ROLES[role]
    at = " and ".join(f"{100.0 * s[most]:.0f} % {name}" for s, name in zip(share, ("dense", "pruned")))
    kernels = f"{section.stack}'s kernels" if section.stack else "its kernels"
    return f"{better} {kernels} run {what} at {at} of the roofline"


def inferred_by(dense: Workload, hw: HardwareProfile, scenario: Scenario) -> Inferred | None:
    """Infer device and host speed from the measured time of a scenario; None without a measured time."""
    if scenario.dense_s is None:
        return None
    return compare(batch_with(dense, [dense]), hw, scenario.level, scenario.dense_s)[1]


def inferred_line(inferred: Inferred, hardware: str, dense_s: float) -> str:
    """Return a line on the host and kernels inferred from a measured time of the dense model."""
    predicted = f"{seconds(dense_s)} measured, {seconds(inferred.predicted_s)} predicted"
    if not inferred.consistent:
        apart = f"{inferred.deviation:.1f} standard deviations apart, so it is ignored"
        return (
            f"{hardware}: {predicted}: {apart}; check that it is for this model, GPU, engine, phase, batch and length"
        )
    host = f"x{inferred.host:.2f} of a typical host"
    if inferred.layer_s:
        host = f"{seconds(inferred.layer_s)} per layer, {host}"
    if inferred.host_bound:
        low, high = inferred.pass_share
        if high - low > SPLIT:
            per_pass = f"{100 * low:.0f} to {100 * high:.0f} % of the host time is per pass"
            host += f"; {per_pass}, which fewer layers do not reduce"
        return f"{hardware}: {predicted}: host-bound ({host})"
    also = f", the host {host}" if inferred.host_s else ""
    return f"{hardware}: {predicted}: kernels take x{inferred.device:.2f} of the prediction{also}"


class HasShare(Protocol):
    """A prediction on a device that names its operators with default constants and their share of the time."""

    @property
    def hardware(self) -> str: ...
    @property
    def uncalibrated(self) -> str: ...
    @property
    def uncalibrated_share(self) -> float: ...


def uncalibrated_of(found: Iterable[HasShare]) -> tuple[str, float]:
    """Return the operators with default constants of some predictions together, and the largest share of the time."""
    parts: dict[str, None] = {}
    share = 0.0
    for r in found:
        parts |= dict.fromkeys(filter(None, r.uncalibrated.split("+")))
        share = max(share, r.uncalibrated_share)
    return "+".join(part for part in TITLES if part in parts), share


def uncalibrated(found: Iterable[HasShare], measured: bool = False) -> tuple[str, ...]:
    """Return one note on the operators with default constants and their share of the time, for all devices where it is
    at least :data:`~simulator.prediction.compare.SMALL_SHARE`, if any; ``measured`` if a dense time was given.
    """
    mine: dict[str, list[HasShare]] = {}
    for r in found:
        if r.uncalibrated_share >= SMALL_SHARE:
            mine.setdefault(r.hardware, []).append(r)
    of = {device: uncalibrated_of(some) for device, some in mine.items()}
    share = {device: largest for device, (_, largest) in of.items()}
    devices: dict[str, list[str]] = {}
    for device in sorted(of, key=lambda name: -share[name]):
        devices.setdefault(with_and([TITLES[part] for part in of[device][0].split("+")]), []).append(device)
    what = [
        f"{names} on {with_and(some)} ({'up to ' if len(some) > 1 else ''}{100.0 * share[some[0]]:.0f} % of the time)"
        for names, some in devices.items()
    ]
    action = f"run prunesim calibrate on the GPU{'' if measured else ', or give a measured --dense-time'}"
    return (f"{', '.join(what)}: not calibrated; defaults with wide intervals are used; {action}",) if what else ()


def _times(w: Workload, hw: HardwareProfile) -> tuple[OperatorTimes, HardwareProfile]:
    """Return the time of one execution of each row, and the device with the kernels of the workload's engine."""
    engine = load_engine(w.meta.engine)
    hw = hw.serving(engine.stacks)
    return operator_times(w, hw, engine=engine)[0], hw


def _by_role(w: Workload, hw: HardwareProfile) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return time and roofline of each kind x role of a workload, s, without overhead operators."""
    t, code = _times(w, hw)[0], w.kind.astype(np.int64) * len(ROLES) + w.role
    size, kept = MOST_CODES * len(ROLES), np.where(w.overhead, 0.0, w.count)
    return np.bincount(code, t.seconds * kept, size), np.bincount(code, t.roofline_s * kept, size)
