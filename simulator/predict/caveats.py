"""What a prediction stands on and a reader should know: :func:`beyond_measured`, :func:`better_than_bound`,
:func:`fallback`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.cost.base import octaves_outside
from simulator.cost.forward import SECTIONS, by_formats, section_of
from simulator.engines.engine import load_engine
from simulator.hardware.formats import label_of
from simulator.hardware.profile import unfitted
from simulator.uncertainty.forward import operator_times
from simulator.uncertainty.operators import OperatorTimes
from simulator.units import seconds
from simulator.workload import DTYPES, ROLES, Kind, Workload

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.uncertainty.intervals import Inferred

BETTER, SHARE, OCTAVES = 1.03, 0.1, 1.0
"""Speedup over its roofline bound, share of the time, and octaves outside the measured sizes that are worth a word."""

# fmt: off
PARTS: Mapping[str, str] = MappingProxyType({
    "gemm": "GEMMs", "experts": "experts",
    "attention_prefill": "prefill attention", "attention_decode": "decode attention",
    "mla_prefill": "latent prefill attention", "mla_decode": "latent decode attention",
    "elementwise": "elementwise operators",
})
# fmt: on
"""Operators of a profile, and what people call them."""

_ATTENTION = (Kind.PREFILL_ATTENTION, Kind.DECODE_ATTENTION)


def beyond_measured(w: Workload, hw: HardwareProfile) -> str:
    """A note where GEMMs that take a share of the time lie far outside the sizes the profile was fitted on, else "".

    >>> from simulator import load_hardware, load_model, lower
    >>> beyond_measured(lower(load_model("llama-3.1-8b"), phase="prefill"), load_hardware("h100"))
    ''
    """
    times, hw = _times(w, hw)
    spent = times.seconds * w.count
    for rows, dtype, weight in by_formats(w, int(Kind.GEMM)):
        found = hw.section("gemm", label_of(dtype, weight)).arrays.get("measured")
        if found is None:
            continue
        sizes = np.log2([w.m[rows], w.n[rows], w.k[rows]]).T
        octaves = octaves_outside(sizes, *np.asarray(found, dtype=np.float64))
        if spent[rows][octaves > OCTAVES].sum() >= SHARE * spent.sum():
            m, n, k = (f"{2.0**v:.0f}" for v in sizes[np.argmax(octaves)])
            far = f"{octaves.max():.1f} octaves outside the sizes that were measured ({m} x {n} x {k})"
            return f"{hw.label}: GEMMs up to {far}: extrapolated, with a wider interval"
    return ""


def fallback(hw: HardwareProfile, w: Workload) -> str:
    """Whose kernels stand in where a profile has none of the stack that a workload's engine runs, else "".

    Nor had any GPU of its architecture any, where that is so; that a GPU alone is not calibrated is told elsewhere.
    A stack asked for by name is none that stands in.

    >>> from simulator import load_hardware, load_model, lower
    >>> w = lower(load_model("llama-3.1-8b"), phase="decode", dtype="fp16", engine="sglang")
    >>> fallback(load_hardware("h100"), w)
    ''
    >>> fallback(load_hardware("rtx_4090"), w)
    "rtx_4090: sglang's kernels are not calibrated there (those of vllm stand in)"
    >>> fallback(load_hardware("t4"), w)
    't4: no GPU of its architecture (turing) was ever fitted: generic defaults'
    """
    engine, dtype = load_engine(w.meta.engine), w.meta.dtype
    if "generic" in unfitted("gemm", hw.section("gemm", dtype), hw.architecture):
        return f"{hw.label}: no GPU of its architecture ({hw.architecture}) was ever fitted: generic defaults"
    if hw.pinned or not engine.stacks:
        return ""
    own, served = engine.stacks[0], hw.serving(engine.stacks)
    stacks = {PARTS[part]: served.section(part, label).stack for part, label in sections_of(w).items() if part in PARTS}
    fitted = [stack for stack in stacks.values() if stack]
    out = []
    for stack in dict.fromkeys(fitted):
        parts = [name for name, found in stacks.items() if found == stack]
        if stack != own:
            some = "" if len(parts) == len(fitted) else f" for {' and '.join(parts)}"
            out.append(f"{own}'s kernels are not calibrated there{some} (those of {stack} stand in)")
    return f"{hw.label}: {'; '.join(out)}" if out else ""


def sections_of(w: Workload) -> dict[str, str]:
    """Parts of a profile that a workload needs, and the number format of the section of each."""
    kinds = w.kind.astype(np.int64) * 2 + (w.value_dim > 0)
    first = (int(row) for row in np.unique(kinds, return_index=True)[1])
    found = {row: (DTYPES[w.dtype[row]], DTYPES[w.weight_dtype[row]]) for row in sorted(first)}
    weights = (int(Kind.GEMM), int(Kind.EXPERTS))
    return {section_of(w, r): label_of(*both) if w.kind[r] in weights else both[0] for r, both in found.items()}


def better_than_bound(dense: Workload, pruned: Workload, hw: HardwareProfile, speedup: float, bound: float) -> str:
    """Why a speedup lies above its roofline bound, which operator runs nearer to its roofline pruned than dense; ""
    where it does not lie above it.

    Such a gain is a step of one stack's kernels at the dense shape, not what pruning takes away. Where no operator
    gains, what is taken away ran farther from its roofline than what stays (the head, for one).
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
    if lost[most] < 0.1 * (1.0 - bound / speedup) * time_d.sum():  # no operator is to blame
        return f"{better} what goes (launches, host time, small operators) is farther from a roofline than what stays"
    kind, role = divmod(most, len(ROLES))
    row = np.flatnonzero((dense.kind == kind) & (dense.role == role))[0]
    part = section_of(dense, row) or "elementwise"
    section = _times(dense, hw)[1].section(part, DTYPES[dense.dtype[row]])
    what = PARTS[SECTIONS[kind]] if kind in _ATTENTION else ROLES[role]
    at = " and ".join(f"{100.0 * s[most]:.0f} % {name}" for s, name in zip(share, ("dense", "pruned")))
    kernels = f"{section.stack}'s kernels" if section.stack else "its kernels"
    return f"{better} {kernels} run {what} at {at} of the roofline"


def inferred_line(inferred: Inferred, hardware: str, dense_s: float) -> str:
    """What a measured time of the dense model says of a machine, in one line."""
    predicted = f"{seconds(dense_s)} measured, {seconds(inferred.predicted_s)} predicted"
    if not inferred.consistent:
        uncertainty = f"{inferred.deviation:.1f} standard deviations apart, and nothing is moved by it"
        return f"{hardware}: {predicted}: {uncertainty}; is it of this model, GPU, engine, phase, batch and length?"
    host = f"x{inferred.host:.2f} of the usual"
    if inferred.layer_s:
        host = f"{seconds(inferred.layer_s)} a layer, {host}"
    if inferred.host_bound:
        return f"{hardware}: {predicted}: the host sets the pace ({host})"
    beside = f", the host {host}" if inferred.host_s else ""
    return f"{hardware}: {predicted}: kernels take x{inferred.device:.2f} of that{beside}"


def _times(w: Workload, hw: HardwareProfile) -> tuple[OperatorTimes, HardwareProfile]:
    """Time of one execution of each row, and the device as the workload's engine runs it."""
    engine = load_engine(w.meta.engine)
    hw = hw.serving(engine.stacks)
    return operator_times(w, hw, engine=engine)[0], hw


def _by_role(w: Workload, hw: HardwareProfile) -> tuple[NDArray[Any], NDArray[Any]]:
    """Time and roofline of each kind x role of a workload, s; what pruning adds is left out."""
    t, code = _times(w, hw)[0], w.kind.astype(np.int64) * len(ROLES) + w.role
    size, kept = len(Kind) * len(ROLES), np.where(w.overhead, 0.0, w.count)
    return np.bincount(code, t.seconds * kept, size), np.bincount(code, t.roofline_s * kept, size)
