"""Calibration of attention: constants, residual lattice and spread from measured times.

Use :func:`calls_of` on records, then :func:`fit_attention`. One call fits one phase of one stack: constants belong to a
stack (the same shape differs by 13 to 82 % between two), so tables of several must not be mixed. What is a kernel of
its own within it (head width, window, format of the cache) has factors on the constants and a lattice of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit import solver
from calibration.fit.errors import accuracy_of, spread_of
from calibration.fit.residual import Stiffness, fit_lattice
from calibration.fit.solver import ConstantsFit, FittedPart, Minimum, Table
from calibration.records.screening import LATENT
from simulator.arrays import FloatArray
from simulator.cost.attention import uncertainty_of
from simulator.cost.attention_model import Calls, Parts, decode_core, decode_work, prefill_core, prefill_work
from simulator.cost.gemm_model import Machine
from simulator.cost.residual_grid import ResidualGrid, decode_place, prefill_place
from simulator.hardware.constants import CONSTANTS, Constant
from simulator.hardware.profile import Provenance, Section
from simulator.uncertainty.error_model import Uncertainty
from simulator.workload import DTYPE_BYTES, DTYPES

PHASES: Mapping[str, str] = {
    "attention_prefill": "prefill",
    "attention_decode": "decode",
    "mla_prefill": "mla_prefill",
    "mla_decode": "mla_decode",
}
"""Operators of records and sections, and what they are called here."""

REGISTRY: Mapping[str, Mapping[str, Constant]] = {phase: CONSTANTS[name] for name, phase in PHASES.items()}
"""Constants of a phase."""

STRUCTURE: Mapping[str, tuple[str, ...]] = {
    "prefill": ("packs", "pads", "sparse_block"),
    "decode": ("rows", "units_per_sm", "split_keys", "long_keys"),
}
STRUCTURE = {**STRUCTURE, "mla_prefill": STRUCTURE["prefill"], "mla_decode": STRUCTURE["decode"]}
"""Constants that choose the form of the model rather than scale it: never fitted, taken from the registry."""

_FORMS = itertools.product((16.0, 64.0, 128.0), (0.5, 1.0, 2.0), (128.0, 1e6))
FORMS: Mapping[str, Sequence[Mapping[str, float]]] = {
    "mla_decode": [dict(zip(("rows", "units_per_sm", "split_keys"), form, strict=True)) for form in _FORMS]
}
"""Structures that are tried: kernels of latent attention differ in heads a unit, units an SM, and whether they split a
cache at all (errors of the core alone on the A100: 27 % with the registry's, 4 % with the best)."""

MINIMUM_ROWS = 20
FEW_ROWS = 100  # below these the lattice stays only if rows left out are predicted better with it
INFORMING_ROWS = 8  # rows a constant must move, to be fitted at all
FOLDS = 5
SIMPLER = 0.9  # of the error with a term of the sequences: below it the form without is taken

LONE: Mapping[str, tuple[str, ...]] = {
    "prefill": ("exp_per_s", "sequence_s", "e_io", "l2_gain", "l2_share"),
    "decode": ("wide_s", "l2_gain", "l2_share", "merge_s"),
}
LONE = {**LONE, "mla_prefill": LONE["prefill"], "mla_decode": LONE["decode"]}
"""Constants that rows of a single head configuration cannot tell from the others; they keep their start, that of the
architecture."""

STIFFNESS = Stiffness(0.02, (0.03, 0.05, 0.05), 0.02)
"""Of the lattice, along (group, units, length); chosen on seeds 10 and 11 of the protocol (A100 and H100, both phases,
400 and all rows)."""

_SEARCH: Mapping[str, Any] = {"ftol": 1e-6, "xtol": 1e-6}

SHAPE: tuple[str, ...] = ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim")
"""Columns that make a shape."""


@dataclass(frozen=True)
class MeasuredCalls(Table):
    """Measured attention calls of one phase (of :data:`REGISTRY`) on one device."""

    phase: str
    device: Machine
    batch: FloatArray
    q_len: FloatArray
    kv_len: FloatArray
    heads: FloatArray
    kv_heads: FloatArray
    head_dim: FloatArray
    seconds: FloatArray
    element_bytes: FloatArray | float = 2.0  # of queries and outputs
    cache_bytes: FloatArray | float = 0.0  # of keys and values; 0: as of queries
    window: FloatArray | float = 0.0  # positions, 0 for none
    warm: FloatArray | float = (
        1.0  # 1: repeated on one cache, as in the published tables; 0: caches rotated past L2, as here
    )
    value_dim: FloatArray | float = 0.0  # features of a value, 0: as of a key
    faster: float = 1.0  # fastest arithmetic over the device's: a narrow cache may be computed in its own format

    @property
    def decodes(self) -> bool:
        """Whether each call has one query a sequence."""
        return self.phase.endswith("decode")

    @property
    def latent(self) -> bool:
        """Whether values are stored as part of the keys: in the one phase that takes weights into the queries."""
        return self.phase == "mla_decode"

    @property
    def length(self) -> FloatArray:
        """Query positions of prefill, cached ones of decode."""
        return self.kv_len if self.decodes else self.q_len

    def groups(self, kind: str) -> NDArray[np.intp]:
        """Group number of each row, left out together: of "heads" (heads, KV heads, features) or "lengths"."""
        columns = (self.heads, self.kv_heads, self.head_dim) if kind == "heads" else (self.length,)
        return solver.numbered(*columns)

    @property
    def kinds(self) -> FloatArray:
        """(n, 3) what makes a kernel of its own, as :class:`simulator.cost.attention.Variants` has it."""
        narrow = (np.asarray(self.cache_bytes) > 0) & (self.cache_bytes < np.asarray(self.element_bytes))
        columns = np.log2(self.head_dim), np.asarray(self.window) > 0, narrow
        return np.stack(np.broadcast_arrays(*columns), axis=1).astype(np.float64)

    def work(self, values: Mapping[str, float]) -> Any:
        """Geometry of the calls; it depends on the structural constants alone."""
        others = "element_bytes", "window", "warm", "value_dim", "latent"
        columns = {name: getattr(self, name) for name in (*SHAPE, *others)}
        cache = np.where(np.asarray(self.cache_bytes) > 0, self.cache_bytes, self.element_bytes)
        calls = Calls(**columns, cache_bytes=cache)
        return decode_work(calls) if self.decodes else prefill_work(calls, {"pads": 1.0, **values})

    def core(self, work: Any, values: Mapping[str, float]) -> Parts:
        """Core time as it was measured; operands of a prefill may be warm in L2, since a benchmark repeats its call."""
        return (decode_core if self.decodes else prefill_core)(work, self.device, values)

    def log_residual(self, start: Mapping[str, float]) -> Callable[[Mapping[str, float]], FloatArray]:
        """Log of core over measured time, as a function of constants that share the structure of ``start``."""
        work, log_time = self.work(start), np.log(self.seconds)
        return lambda values: np.asarray(np.log(self.core(work, values).total_s) - log_time)

    def places(self) -> tuple[NDArray[np.floating[Any]], ...]:
        """Where each row lies in the residual lattice."""
        if not self.decodes:
            sharing = self.heads if self.phase == "mla_prefill" else self.kv_heads
            return prefill_place(self.q_len, self.batch, self.heads, sharing)
        seen = np.where(np.asarray(self.window) > 0, np.minimum(self.kv_len, self.window), self.kv_len)
        return decode_place(seen, self.batch * self.kv_heads, self.heads / self.kv_heads)

    def usable(self) -> tuple[MeasuredCalls, dict[str, int]]:
        """The rows a fit may use, and how many it may not by reason.

        A time may lie below bytes / bandwidth only while the bytes fit the L2; FLOP / peak it may not beat by more than
        5 % (boost clocks).
        """
        work, device = self.work({"packs": 0.0}), self.device
        size = work.cache_bytes if self.decodes else work.moved_bytes
        names = *SHAPE, "seconds", "element_bytes", "cache_bytes", "window", "warm"
        columns = (getattr(self, name) for name in names)
        beyond_l2 = (size > 1.5 * device.l2_bytes) & (self.seconds < size / device.bandwidth_bytes_per_s)
        reasons = {
            "a value is not finite": ~np.all(np.isfinite(np.broadcast_arrays(*columns)), axis=0),
            "the time is not positive": ~(self.seconds > 0),
            "a chunk of one query, which takes the path of decode": (self.q_len < 2) & (not self.decodes),
            "heads are no multiple of KV heads": (self.heads % np.maximum(self.kv_heads, 1.0)) != 0,
            "a length or count is below 1": np.any([getattr(self, n) < 1 for n in SHAPE], axis=0),
            "faster than FLOP / peak": self.seconds * 1.05 * self.faster < work.flops / device.peak_flop_per_s,
            "faster than bytes / bandwidth with more bytes than the L2 holds": beyond_l2,
        }
        good = np.ones(len(self), dtype=bool)
        counts = {}
        for reason, bad in reasons.items():
            if count := int(np.count_nonzero(bad & good)):
                counts[reason] = count
            good &= ~bad
        return self.take(good), counts

    def constants(self, start: Mapping[str, float], fixed: Mapping[str, str]) -> ConstantsFit:
        """Constants of the phase, but for those ``fixed`` for a reason.

        One that ends on its bound, or whose log standard error exceeds 1, is fixed (there; at its start) and named.
        """
        known, log_residual = REGISTRY[self.phase], self.log_residual(start)
        fixed = {**dict.fromkeys(STRUCTURE[self.phase], "structure"), **fixed}
        for name in known.keys() - fixed.keys():
            # a constant few rows know of would wander: what would its whole range change?
            low, high = (log_residual({**start, name: end}) for end in (known[name].low, known[name].high))
            if np.count_nonzero(np.abs(high - low) > 0.02) < INFORMING_ROWS:
                fixed[name] = "not identified by these rows"

        def covariance(found: Minimum, values: Mapping[str, float]) -> tuple[FloatArray, float]:
            return solver.sandwich(found.rows, solver.slopes(log_residual, values, found.names, 1e-3)), 0.0

        search: Any = {"moot": {"l2_gain": ("l2_share", "without meaning where L2 gains nothing")}, **_SEARCH}
        return solver.fit_logs(log_residual, start, known, covariance, fixed=fixed, weak=1.0, max_nfev=60, **search)

    def residual(self, values: Mapping[str, float]) -> ResidualGrid:
        """The lattice on what constants leave, on the smallest box of octaves that holds the rows."""
        places = self.places()
        start = tuple(float(np.floor(np.min(x))) for x in places)
        shape = [int(np.ceil(np.max(x) - first - 1e-9)) + 1 for x, first in zip(places, start, strict=True)]
        blank = ResidualGrid(start, (1.0, 1.0, 1.0), np.zeros(shape))
        return fit_lattice(blank, places, -self.log_residual(values)(values), STIFFNESS, rounds=4)

    def predict(self, values: Mapping[str, float], residual_grid: ResidualGrid | None) -> FloatArray:
        """Predicted time, as it was measured (warm or cold), of each row."""
        core = self.core(self.work(values), values).total_s
        return core if residual_grid is None else np.asarray(core * np.exp(residual_grid(self.places())))


def calls_of(records: Any, phase: str, device: Machine) -> MeasuredCalls:
    """Attention records (an object with columns of these names, seconds in s) as a fit takes them."""
    columns: Any = {name: np.asarray(getattr(records, name), dtype=np.float64) for name in (*SHAPE, "seconds")}
    bytes_ = np.array([DTYPE_BYTES[code] for code in range(len(DTYPES))], dtype=np.float64)
    columns |= {"element_bytes": bytes_[records.dtype], "cache_bytes": bytes_[records.weight_dtype]}
    columns |= {"window": records.window.astype(np.float64), "warm": 1.0 - records.cold.astype(np.float64)}
    if phase in LATENT:
        columns |= {"value_dim": records.n.astype(np.float64), "faster": 2.0}
    return MeasuredCalls(phase, device, **columns)


def fit_attention(
    calls: MeasuredCalls,
    architecture: str,
    *,
    fold_by: Sequence[str] = ("heads", "lengths"),
    seed: int = 0,
    start: Mapping[str, float] | None = None,
    provenance: Provenance | None = None,
) -> FittedPart:
    """Fit one phase of attention on calls of one stack, each of its kernels
    (:class:`~simulator.cost.attention.Variants`) by itself.

    The search begins at ``start`` (a sibling's constants), else at the architecture's defaults. Of ``fold_by`` a fold
    leaves out groups, for spread and accuracy; the residuals of several kinds are pooled. Each fold, by ``seed``,
    refits all. A kernel needs 20 rows; ValueError where none has.
    """
    c, dropped = calls.usable()
    kinds, kind, count = np.unique(c.kinds, axis=0, return_inverse=True, return_counts=True)
    kinds, kind, count, seen = kinds[count >= MINIMUM_ROWS], kind.reshape(-1), count[count >= MINIMUM_ROWS], kinds
    if not len(kinds):
        few = f"expected at least {MINIMUM_ROWS} usable rows, got {len(c)} ({dropped or 'none refused'})"
        raise ValueError(f"{c.phase} attention: {few}")
    if lost := len(c) - int(count.sum()):
        dropped |= {f"fewer than {MINIMUM_ROWS} rows of their head width, window and cache": lost}
    known = REGISTRY[c.phase]
    first = {n: k.default(architecture) for n, k in known.items()} | dict(start or {})
    keep = {}
    if c.decodes and architecture != "cpu":
        keep["regroup"] = "the work of a CPU alone"
    if c.phase in FORMS:
        keep["wide_s"] = "rows of 128 heads alone know it, and units say as much"
    # the first kernel, whose constants the section shows: no window, no narrow cache, most rows
    kinds = kinds[np.lexsort((np.abs(kinds[:, 0] - 7.0), -count, kinds[:, 2], kinds[:, 1]))]
    rng, fits = np.random.default_rng(seed), list[_Kernel]()
    for wanted in kinds:
        rows = c.take(kind == np.flatnonzero((seen == wanted).all(axis=1))[0])
        starts = [first, *(fit.constants.values for fit in fits[:1])]
        fits.append(_fit_kernel(rows, starts, keep, fold_by, rng))
    common = fits[0].constants
    constants = np.array([[fit.constants.values[name] for name in known] for fit in fits])
    factors = np.log(np.maximum(constants, 1e-12) / np.maximum(constants[0], 1e-12)).round(6)
    arrays = _joined([fit.residual_grid for fit in fits])
    if kinds.tolist() != [[7.0, 0.0, 0.0]]:  # else as in a section without kernels
        arrays |= {"kinds": kinds, "factors": factors}
    errors = np.concatenate([fit.unseen for fit in fits])
    inside = np.concatenate([fit.log_residual for fit in fits])
    spread = spread_of(errors, _together([fit.uncertainty for fit in fits]))
    accuracy = {**accuracy_of(np.expm1(errors)), "core_mape": float(np.abs(np.expm1(inside)).mean())}
    parts = common.fitted(), arrays, spread, accuracy, provenance
    return FittedPart(Section(*parts, status="calibrated"), common, int(count.sum()), errors, dropped)


@dataclass(frozen=True)
class _Kernel:
    """The fit of one kernel."""

    constants: ConstantsFit
    residual_grid: ResidualGrid | None
    unseen: FloatArray  # log predicted over measured of each row by a fit without it, by kind of folds in turn
    log_residual: FloatArray  # log core over measured of each row
    uncertainty: Uncertainty  # of the rows, in the order of ``unseen``


def fit_form(
    c: MeasuredCalls, starts: Sequence[Mapping[str, float]], keep: Mapping[str, str]
) -> tuple[ConstantsFit, ResidualGrid]:
    """Constants, but for those ``keep`` fixes, and lattice of the calls of one kernel: the best search of the starts.

    Where time follows the work units alone, a term of the sequences would only be led astray: it goes if that pays.
    """
    if c.groups("heads").max() == 0:
        keep = {**keep, **dict.fromkeys(LONE[c.phase], "rows of a single head configuration cannot tell it")}
    if c.phase in FORMS:
        starts = [_best_form(c, starts, keep)]
    low, why = REGISTRY[c.phase]["sequence_s"].low, "time follows the work units alone"
    forms: list[tuple[float, ConstantsFit, ResidualGrid]] = []
    for simple in (False, True) if len(c) >= FEW_ROWS else (False,):
        for start in starts:
            first = {**start, "sequence_s": low} if simple else start
            constants = c.constants(first, {**keep, "sequence_s": why} if simple else keep)
            residual_grid = c.residual(constants.values)
            error = np.abs(np.log(c.predict(constants.values, residual_grid) / c.seconds)).mean()
            forms.append((float(error) / (SIMPLER if simple else 1.0), constants, residual_grid))
    return min(forms, key=lambda form: form[0])[1:]


def _best_form(c: MeasuredCalls, starts: Sequence[Mapping[str, float]], keep: Mapping[str, str]) -> Mapping[str, float]:
    """The start, of some with each structure, whose constants, once fitted, err least without a lattice."""
    found = [c.constants({**start, **form}, keep).values for start in starts for form in FORMS[c.phase]]
    return min(found, key=lambda values: float(np.abs(c.log_residual(values)(values)).mean()))


def _fit_kernel(
    c: MeasuredCalls, starts: Sequence[Mapping[str, float]], keep: Mapping[str, str], fold_by: Sequence[str], rng: Any
) -> _Kernel:
    """The fit of one kernel and its errors on unseen rows."""
    constants, residual_grid = fit_form(c, starts, keep)
    unseen, plain, order = [], [], []
    for kind in fold_by:
        group = c.groups(kind)
        if group.max() == 0:
            group = np.arange(len(c))  # nothing to leave out as a group: leave out rows
        for train, test in solver.folds(group, FOLDS, rng):
            # from the solution on: a refit moves little, but what it moves is part of the error of an unseen shape
            rest, left, values = c.take(train), c.take(test), dict(constants.values)
            if constants.std_errors:
                search = REGISTRY[c.phase], constants.std_errors
                values |= solver.minimise(rest.log_residual(values), values, *search, max_nfev=6, **_SEARCH).values
            unseen.append(np.log(left.predict(values, rest.residual(values)) / left.seconds))
            plain.append(left.log_residual(values)(values))
            order.append(test)
    errors, core_errors, rows = (np.concatenate(parts) for parts in (unseen, plain, order))
    log_residual = c.log_residual(constants.values)(constants.values)
    work = c.take(rows).work(constants.values)
    uncertainty = uncertainty_of(c.phase, work.calls, c.core(work, constants.values))
    if len(c) < FEW_ROWS and np.abs(core_errors).mean() < np.abs(errors).mean():
        return _Kernel(constants, None, core_errors, log_residual, uncertainty)
    return _Kernel(constants, residual_grid, errors, log_residual, uncertainty)


def _joined(lattices: Sequence[ResidualGrid | None]) -> dict[str, NDArray[Any]]:
    """Arrays of the lattices of several kernels, on one box of octaves, one after the other along the first axis; a
    thousandth is ample."""
    given = [residual_grid for residual_grid in lattices if residual_grid is not None]
    if not given:
        return {}
    low = np.min([residual_grid.start for residual_grid in given], axis=0)
    high = np.max([np.add(residual_grid.start, residual_grid.values.shape) for residual_grid in given], axis=0)
    size = tuple((high - low).astype(int))
    out = []
    for residual_grid in lattices:
        values, start = (
            (np.zeros((1, 1, 1)), low) if residual_grid is None else (residual_grid.values, residual_grid.start)
        )
        before = np.subtract(start, low).astype(int)
        after = np.subtract(size, before + values.shape)
        out.append(np.pad(values, list(zip(before, after, strict=True)), mode="edge"))
    whole = np.concatenate(out).round(3)
    return ResidualGrid(tuple(low.tolist()), (1.0,) * 3, whole).arrays()


def _together(uncertainties: Sequence[Uncertainty]) -> Uncertainty:
    """The doubts of several sets of rows as one."""
    shared = np.concatenate([d.shared for d in uncertainties], axis=1)
    local, own, place = (
        np.concatenate([getattr(d, name) for d in uncertainties]) for name in ("local", "own", "place")
    )
    return replace(uncertainties[0], shared=shared, local=local, own=own, place=place)
