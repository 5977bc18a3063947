"""What a prediction stands on and a reader should know: :func:`beyond_measured`, :func:`better_than_bound`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.hardware.profile import label_of
from simulator.kernels.spread import beyond
from simulator.kernels.stream import by_formats, operator_times
from simulator.workload import DTYPES, ROLES, Kind, Workload

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

BETTER, SHARE, OCTAVES = 1.03, 0.1, 1.0
"""Speedup over its roofline bound, share of the time, and octaves outside the measured sizes that are worth a word."""

_SECTIONS = {Kind.GEMM: "gemm", Kind.PREFILL_ATTENTION: "attention_prefill", Kind.DECODE_ATTENTION: "attention_decode"}
_NAMES = {Kind.PREFILL_ATTENTION: "prefill attention", Kind.DECODE_ATTENTION: "decode attention"}


def beyond_measured(w: Workload, hw: HardwareProfile) -> str:
    """A note where GEMMs that take a share of the time lie far outside the sizes the profile was fitted on, else "".

    >>> from simulator import load_hardware, load_model, lower
    >>> beyond_measured(lower(load_model("llama-3.1-8b"), phase="prefill"), load_hardware("h100"))
    ''
    """
    seconds = operator_times(w, hw).seconds * w.count
    for rows, dtype, weight in by_formats(w, int(Kind.GEMM)):
        found = hw.section("gemm", label_of(dtype, weight)).arrays.get("measured")
        if found is None:
            continue
        sizes = np.log2([w.m[rows], w.n[rows], w.k[rows]]).T
        octaves = beyond(sizes, *np.asarray(found, dtype=np.float64))
        if seconds[rows][octaves > OCTAVES].sum() >= SHARE * seconds.sum():
            m, n, k = (f"{2.0**v:.0f}" for v in sizes[np.argmax(octaves)])
            far = f"{octaves.max():.1f} octaves outside the sizes that were measured ({m} x {n} x {k})"
            return f"{hw.label}: GEMMs up to {far}: extrapolated, with a wider interval"
    return ""


def better_than_bound(dense: Workload, pruned: Workload, hw: HardwareProfile, speedup: float, bound: float) -> str:
    """Why a speedup lies above its roofline bound, which operator runs nearer to its roofline pruned than dense; ""
    where it does not lie above it.

    Such a gain is a step of one stack's kernels at the dense shape, not what pruning takes away.
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
    kind, role = divmod(int(np.argmax(lost)), len(ROLES))
    row = np.flatnonzero((dense.kind == kind) & (dense.role == role))[0]
    section = hw.section(_SECTIONS.get(Kind(kind), "elementwise"), DTYPES[dense.dtype[row]])
    what = _NAMES.get(Kind(kind), ROLES[role])
    at = " and ".join(
        f"{100.0 * s[kind * len(ROLES) + role]:.0f} % {name}" for s, name in zip(share, ("dense", "pruned"))
    )
    kernels = f"{section.stack}'s kernels" if section.stack else "its kernels"
    return f"better than its bound of {bound:.2f}x because {kernels} run {what} at {at} of the roofline"


def _by_role(w: Workload, hw: HardwareProfile) -> tuple[NDArray[Any], NDArray[Any]]:
    """Time and roofline of each kind x role of a workload, s; what pruning adds is left out."""
    t, code = operator_times(w, hw), w.kind.astype(np.int64) * len(ROLES) + w.role
    size, kept = len(Kind) * len(ROLES), np.where(w.overhead, 0.0, w.count)
    return np.bincount(code, t.seconds * kept, size), np.bincount(code, t.roofline_s * kept, size)
