"""Calibration of attention: constants, residual lattice and intervals from measured times.

Use :func:`columns_of` on records, then :func:`fit_attention`. One call fits one phase of one kernel path: constants
belong to a stack (the same shape differs by 9-34 % between stacks), so tables of several must not be mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit import solver
from calibration.fit.conformal import accuracy_of, outer_bands
from calibration.fit.residual import Stiffness, fit_lattice
from calibration.fit.solver import ConstantsFit, FittedPart, Minimum, Table
from simulator.hardware.constants import DECODE_CONSTANTS, PREFILL_CONSTANTS, Constant
from simulator.hardware.profile import Provenance, Section
from simulator.kernels.attention import REGIMES, regime_of
from simulator.kernels.attention_core import Calls, Parts, decode_core, decode_work, prefill_core, prefill_work
from simulator.kernels.gemm_core import Machine
from simulator.kernels.lattice import Lattice, decode_place, prefill_place
from simulator.workload import DTYPE_BYTES, DTYPES

F = NDArray[np.float64]

REGISTRY: Mapping[str, Mapping[str, Constant]] = {"prefill": PREFILL_CONSTANTS, "decode": DECODE_CONSTANTS}
"""Constants of a phase."""

STRUCTURE: Mapping[str, tuple[str, ...]] = {
    "prefill": ("packs", "pads", "sparse_block"),
    "decode": ("rows", "units_per_sm", "split_keys", "long_keys"),
}
"""Constants that choose the form of the model rather than scale it: never fitted, taken from the registry."""

MINIMUM_ROWS = 20
FEW_ROWS = 100  # below these the lattice stays only if rows left out are predicted better with it
INFORMING_ROWS = 8  # rows a constant must move, to be fitted at all
FOLDS = 5

LONE: Mapping[str, tuple[str, ...]] = {
    "prefill": ("exp_per_s", "sequence_s", "e_io", "l2_gain", "l2_share"),
    "decode": ("wide_s", "l2_gain", "l2_share", "merge_s"),
}
"""Constants that rows of a single head configuration cannot tell from the others; they keep their start, that of the
architecture."""

STIFFNESS = Stiffness(0.02, (0.03, 0.05, 0.05), 0.02)
"""Of the lattice, along (group, units, length); chosen on seeds 10 and 11 of the protocol (A100 and H100, both phases,
400 and all rows)."""

_SEARCH: Mapping[str, Any] = {"ftol": 1e-6, "xtol": 1e-6}

SHAPE: tuple[str, ...] = ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim")
"""Columns that make a shape."""


@dataclass(frozen=True)
class Columns(Table):
    """Measured attention calls.

    ``seconds`` is the time of each; ``element_bytes`` that of an element, keys and values included; ``warm`` 1 where a
    call was repeated on one cache, as the published tables do, 0 where caches were rotated past L2, as this program
    does.
    """

    batch: F
    q_len: F
    kv_len: F
    heads: F
    kv_heads: F
    head_dim: F
    seconds: F
    element_bytes: F | float = 2.0
    warm: F | float = 1.0


def columns_of(records: Any) -> Columns:
    """Columns of attention records (an object with columns of these names, seconds in s)."""
    names = (*SHAPE, "seconds")
    bytes_ = np.array([DTYPE_BYTES[code] for code in range(len(DTYPES))], dtype=np.float64)
    columns = {name: np.asarray(getattr(records, name), dtype=np.float64) for name in names}
    warm = 1.0 - np.asarray(records.cold, dtype=np.float64)
    return Columns(**columns, element_bytes=bytes_[np.asarray(records.dtype)], warm=warm)


def work_of(phase: str, c: Columns, values: Mapping[str, float]) -> Any:
    """Geometry of a phase for columns; it depends on the structural constants alone."""
    size: Any = {"element_bytes": c.element_bytes, "cache_bytes": c.element_bytes}
    calls = Calls(c.batch, c.q_len, c.kv_len, c.heads, c.kv_heads, c.head_dim, **size, warm=c.warm)
    return decode_work(calls) if phase == "decode" else prefill_work(calls, {"pads": 1.0, **values})


def core_of(phase: str, work: Any, device: Machine, values: Mapping[str, float]) -> Parts:
    """Core time as it was measured; the operands of a prefill may be warm in L2, since a benchmark repeats its call."""
    return (prefill_core if phase == "prefill" else decode_core)(work, device, values)


def residual_coordinates(phase: str, c: Columns) -> tuple[NDArray[np.floating[Any]], ...]:
    """Where each row lies in the residual lattice."""
    if phase == "prefill":
        return prefill_place(c.q_len, c.batch, c.heads, c.kv_heads)
    return decode_place(c.kv_len, c.batch * c.kv_heads, c.heads / c.kv_heads)


def usable(phase: str, c: Columns, device: Machine) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Rows a fit may use, and how many it may not by reason.

    A time may lie below bytes / bandwidth only while the bytes fit the L2; FLOP / peak it may not beat by more than 5 %
    (boost clocks).
    """
    work = work_of(phase, c, {"packs": 0.0})
    size = work.moved_bytes if phase == "prefill" else work.cache_bytes
    finite = [np.isfinite(getattr(c, f.name)) & np.ones(len(c), dtype=bool) for f in fields(c)]
    reasons = {
        "a value is not finite": ~np.all(finite, axis=0),
        "the time is not positive": ~(c.seconds > 0),
        "a chunk of one query, which takes the path of decode": (c.q_len < 2) & (phase == "prefill"),
        "heads are no multiple of KV heads": (c.heads % np.maximum(c.kv_heads, 1.0)) != 0,
        "a length or count is below 1": np.any([getattr(c, n) < 1 for n in SHAPE], axis=0),
        "faster than FLOP / peak": c.seconds * 1.05 < work.flops / device.peak_flop_per_s,
        "faster than bytes / bandwidth with more bytes than the L2 holds": (size > 1.5 * device.l2_bytes)
        & (c.seconds < size / device.bandwidth_bytes_per_s),
    }
    good = np.ones(len(c), dtype=bool)
    counts = {}
    for reason, bad in reasons.items():
        counts[reason] = int(np.count_nonzero(bad & good))
        good &= ~bad
    return good, {reason: n for reason, n in counts.items() if n}


def _misfit(phase: str, c: Columns, device: Machine, start: Mapping[str, float]) -> Callable[[Mapping[str, float]], F]:
    work, log_time = work_of(phase, c, start), np.log(c.seconds)
    return lambda values: np.asarray(np.log(core_of(phase, work, device, values).total_s) - log_time)


def fit_constants(
    phase: str, c: Columns, device: Machine, start: Mapping[str, float], fixed: Mapping[str, str]
) -> ConstantsFit:
    """Constants of a phase, but for those ``fixed`` for a reason.

    One that ends on its bound, or whose log standard error exceeds 1, is fixed (there; at its start) and named.
    """
    known, misfit = REGISTRY[phase], _misfit(phase, c, device, start)
    fixed = {**dict.fromkeys(STRUCTURE[phase], "structure"), **fixed}
    for name in known.keys() - fixed.keys():
        # a constant few rows know of would wander: what would its whole range change?
        low, high = (misfit({**start, name: end}) for end in (known[name].low, known[name].high))
        if np.count_nonzero(np.abs(high - low) > 0.02) < INFORMING_ROWS:
            fixed[name] = "not identified by these rows"

    def covariance(found: Minimum, values: Mapping[str, float]) -> tuple[F, float]:
        return solver.sandwich(found.rows, solver.slopes(misfit, values, found.names, 1e-3)), 0.0

    moot = {"l2_gain": ("l2_share", "without meaning where L2 gains nothing")}
    return solver.fit_logs(misfit, start, known, covariance, fixed=fixed, weak=1.0, moot=moot, max_nfev=60, **_SEARCH)


def fit_residual(phase: str, c: Columns, device: Machine, values: Mapping[str, float]) -> Lattice:
    """The lattice on what constants leave, on the smallest box of octaves that holds the rows."""
    place = residual_coordinates(phase, c)
    start = tuple(float(np.floor(np.min(x))) for x in place)
    shape = [int(np.ceil(np.max(x) - first - 1e-9)) + 1 for x, first in zip(place, start, strict=True)]
    misfit = _misfit(phase, c, device, values)(values)
    return fit_lattice(Lattice(start, (1.0, 1.0, 1.0), np.zeros(shape)), place, -misfit, STIFFNESS, rounds=4)


def predict(
    phase: str, c: Columns, device: Machine, values: Mapping[str, float], lattice: Lattice | None
) -> tuple[F, NDArray[np.intp]]:
    """Predicted time, as it was measured (warm or cold), and interval regime of each row."""
    parts = core_of(phase, work_of(phase, c, values), device, values)
    core = parts.total_s
    if lattice is not None:
        core = core * np.exp(lattice(residual_coordinates(phase, c)))
    return core, regime_of(parts.by_limit["launch"] / core)


def groups_of(c: Columns, kind: str, phase: str) -> NDArray[np.intp]:
    """Group number of each row: rows of a group are left out together. ``kind``: "heads" (heads, KV heads, features) or
    "lengths"."""
    length = c.q_len if phase == "prefill" else c.kv_len
    return solver.numbered(c.heads, c.kv_heads, c.head_dim) if kind == "heads" else solver.numbered(length)


def fit_attention(
    phase: str,
    columns: Columns,
    device: Machine,
    architecture: str,
    *,
    fold_by: Sequence[str] = ("heads", "lengths"),
    seed: int = 0,
    start: Mapping[str, float] | None = None,
    provenance: Provenance | None = None,
) -> FittedPart:
    """Fit one phase of attention.

    Parameters
    ----------
    phase : {"prefill", "decode"}
    columns : Columns
        Measured calls of one kernel path.
    device, architecture
        Datasheet facts, and where the search starts: the defaults of the registry.
    fold_by : sequence of {"heads", "lengths"}
        What a fold leaves out, for intervals and accuracy; the residuals of several are pooled. Each fold refits all.
    seed : int
        Of the folds.
    start : mapping of str to float, optional
        Starting values other than the defaults (a sibling's).
    provenance : Provenance, optional

    Raises
    ------
    ValueError
        With fewer than 20 usable rows.
    """
    good, dropped = usable(phase, columns, device)
    c = columns.take(good)
    if len(c) < MINIMUM_ROWS:
        refused = dropped or "none refused"
        raise ValueError(f"{phase} attention: expected at least {MINIMUM_ROWS} usable rows, got {len(c)} ({refused})")
    known = REGISTRY[phase]
    first = {n: k.default(architecture) for n, k in known.items()} | dict(start or {})
    keep = {}
    if groups_of(c, "heads", phase).max() == 0:
        keep = dict.fromkeys(LONE[phase], "rows of a single head configuration cannot tell it")
    if phase == "decode" and architecture != "cpu":
        keep["regroup"] = "the work of a CPU alone"
    constants = fit_constants(phase, c, device, first, keep)
    rng = np.random.default_rng(seed)
    unseen, plain, regimes = [], [], []
    for kind in fold_by:
        group = groups_of(c, kind, phase)
        if group.max() == 0:
            group = np.arange(len(c))  # nothing to leave out as a group: leave out rows
        for train, test in solver.folds(group, FOLDS, rng):
            # from the solution on: a refit moves little, but what it moves is part of the error of an unseen shape
            rest, left = c.take(train), c.take(test)
            values = dict(constants.values)
            if constants.std_errors:
                misfit = _misfit(phase, rest, device, values)
                values |= solver.minimise(misfit, values, known, constants.std_errors, max_nfev=6, **_SEARCH).values
            predicted, regime = predict(phase, left, device, values, fit_residual(phase, rest, device, values))
            unseen.append(np.log(predicted / left.seconds))
            plain.append(_misfit(phase, left, device, values)(values))
            regimes.append(regime)
    errors, core_errors = np.concatenate(unseen), np.concatenate(plain)
    arrays = fit_residual(phase, c, device, constants.values).arrays()
    if len(c) < FEW_ROWS and np.abs(core_errors).mean() < np.abs(errors).mean():
        errors, arrays = core_errors, {}
    core = np.expm1(_misfit(phase, c, device, constants.values)(constants.values))
    section = Section(
        constants.fitted(),
        arrays,
        tuple(outer_bands(errors, np.concatenate(regimes), REGIMES)),
        {**accuracy_of(errors), "core_mape": float(np.abs(core).mean())},
        provenance,
        "calibrated",
    )
    return FittedPart(section, constants, len(c), errors, dropped)
