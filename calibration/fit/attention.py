"""Calibration of attention: constants, residual and section scale from measured times of one phase of one stack.

The time of one shape differs by 13 to 82 % between two stacks. Each kernel of a stack (head width, window, format of
the cache) has separate factors on the constants and a separate residual.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit import solver
from calibration.fit.errors import accuracy_of, section_scale
from calibration.fit.residual import Regularisation
from calibration.fit.section import FOLDS, Fit
from calibration.fit.solver import ConstantsFit, FittedPart, Minimum
from calibration.records.screening import LATENT
from simulator.arrays import FloatArray, IndexArray
from simulator.codes import DTYPE_BYTES, DTYPES
from simulator.hardware.sections import Section
from simulator.operators import CONSTANTS
from simulator.operators.attention import AttentionCalls, Geometry, decode_core, decode_work, prefill_work
from simulator.operators.base import Constant, Machine
from simulator.operators.residual_grid import ResidualGrid
from simulator.uncertainty.factors import Uncertainty, same_stack_scales, uncertainty_of

# operators of records and sections that are fitted here
OPERATORS: tuple[str, ...] = ("attention_prefill", "attention_decode", "mla_prefill", "mla_decode")

# constants by phase that choose the form of the model rather than scale it: never fitted, taken from the registry
_STRUCTURE = {
    "prefill": ("packs", "pads", "sparse_block"),
    "decode": ("rows", "units_per_sm", "split_keys", "tile_rows"),
}

_FORMS = itertools.product((16.0, 64.0, 128.0), (0.5, 1.0, 2.0), (128.0, 1e6))
# structures to compare: kernels of latent attention differ in heads per unit, units per SM, and whether they split a
# cache (errors of the analytical model alone on the A100: 27 % with the registry's, 4 % with the best)
FORMS: Mapping[str, Sequence[Mapping[str, float]]] = {
    "mla_decode": [dict(zip(("rows", "units_per_sm", "split_keys"), form, strict=True)) for form in _FORMS]
}

# rows of the tiles of plain decode to compare where products show: on a device with little compute for its bandwidth
TILE_ROWS: Sequence[Mapping[str, float]] = tuple({"tile_rows": rows} for rows in (16.0, 64.0, 128.0))
SEEN = 0.25  # least share of the products in the smallest tiles, over the time of reading the cache, of the median row

# Structure of latent decode on Hopper for rows of one number of heads, which do not show it: FlashMLA's tiles of 64
# heads (docs/20250422-new-kernel-deep-dive.md). Tables of the H100 and H200 with several numbers are not fitted
# better with such tiles: there the products of fewer heads hide.
LONE_LATENT: Mapping[str, float] = {"tile_rows": 64.0, "rows": 64.0}

MINIMUM_ROWS = 20
FEW_ROWS = 100  # below these the residual stays only if held-out rows are predicted better with it
INFORMING_ROWS = 8  # rows that a constant must move to be fitted at all
SIMPLER = 0.9  # of the error with a term of the sequences: below it the form without is taken

# constants by phase that rows of a single head configuration do not identify; they keep the architecture's value
_LONE = {
    "prefill": ("exp_per_s", "sequence_s", "e_io", "l2_gain", "l2_share"),
    "decode": ("wide_s", "l2_gain", "l2_share", "merge_s"),
}

_SEARCH: Mapping[str, Any] = {"ftol": 1e-6, "xtol": 1e-6}

SHAPE: tuple[str, ...] = ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim")  # columns of a shape


@dataclass(frozen=True)
class AttentionFit(Fit):
    """Measured attention calls of one phase on one device."""

    calls: AttentionCalls
    faster: float = 1.0  # highest arithmetic rate over the device's: a narrow cache may be computed in its format

    # along (group, units, length); chosen on seeds 10 and 11 of the protocol (A100 and H100, both phases, 400 and all
    # rows)
    REGULARISATION = Regularisation(0.02, (0.03, 0.05, 0.05), 0.02)
    ROUNDS = 4

    @property
    def registry(self) -> Mapping[str, Constant]:
        return CONSTANTS[self.calls.operator]

    @property
    def defaults(self) -> dict[str, float]:
        return {name: constant.default("*") for name, constant in self.registry.items()}

    @property
    def decodes(self) -> bool:
        return self.calls.phase == "decode"

    @property
    def shows_tiles(self) -> bool:
        """Whether the products of padded tiles are large enough to change the times of decode."""
        machine, work = self.calls.machine, decode_work(self.calls.geometry)
        if not self.decodes or self.calls.latent or machine.packs:
            return False
        least = decode_core(work, machine, {**self.defaults, **TILE_ROWS[0]}).by_bottleneck
        return bool(np.median(least["compute"] / least["memory"]) >= SEEN)

    @property
    def length(self) -> FloatArray:
        """Query positions of prefill, cached ones of decode."""
        return self.calls.geometry.kv_len if self.decodes else self.calls.geometry.q_len

    def groups(self, by: str = "") -> IndexArray:
        """Return the group of each row, held out together: by "heads" (heads, KV heads, features) or "lengths"."""
        g = self.calls.geometry
        return solver.numbered(*((self.length,) if by == "lengths" else (g.heads, g.kv_heads, g.head_dim)))

    @property
    def kinds(self) -> FloatArray:
        """Properties that distinguish kernels (n, 3), as in :class:`simulator.operators.attention.Kernels`."""
        g = self.calls.geometry
        narrow = np.asarray(g.cache_bytes) < np.asarray(g.element_bytes)
        columns = np.log2(g.head_dim), np.asarray(g.window) > 0, narrow
        return np.stack(np.broadcast_arrays(*columns), axis=1).astype(np.float64)

    def screened(self) -> tuple[AttentionFit, dict[str, int]]:
        """Return the usable rows, and the number of excluded rows by reason. A time below bytes / bandwidth is valid if
        the bytes fit the L2; FLOP / peak has a tolerance of 5 % for boost clocks."""
        g, machine = self.calls.geometry, self.calls.machine
        if self.decodes:
            read = decode_work(g)
            size, flops = read.cache_bytes, read.flops
        else:
            computed = prefill_work(g, {"pads": 1.0, "packs": 0.0})
            size, flops = computed.moved_bytes, computed.flops
        shape = [getattr(g, name) for name in SHAPE]
        columns = np.broadcast_arrays(*shape, self.seconds, g.element_bytes, g.cache_bytes, g.window, g.warm)
        beyond_l2 = (size > 1.5 * machine.l2_bytes) & (self.seconds < size / machine.bandwidth_bytes_per_s)
        reasons = {
            "a value is not finite": ~np.all(np.isfinite([np.asarray(c, dtype=np.float64) for c in columns]), axis=0),
            "the time is not positive": ~(self.seconds > 0),
            "a chunk of one query, which decode kernels compute": (g.q_len < 2) & (not self.decodes),
            "heads are not a multiple of KV heads": (g.heads % np.maximum(g.kv_heads, 1.0)) != 0,
            "a length or count is below 1": np.any([column < 1 for column in shape], axis=0),
            "faster than FLOP / peak": self.seconds * 1.05 * self.faster < flops / machine.peak_flop_per_s,
            "faster than bytes / bandwidth with more bytes than the L2 holds": beyond_l2,
        }
        good, counts = np.ones(len(self), dtype=bool), {}
        for reason, bad in reasons.items():
            if count := int(np.count_nonzero(bad & good)):
                counts[reason] = count
            good &= ~bad
        return self.take(good), counts

    def constants(
        self, start: Mapping[str, float] | None = None, fixed: Mapping[str, str] | None = None
    ) -> ConstantsFit:
        """Return the constants, except those ``fixed`` for a reason."""
        assert start is not None
        known, fixed = self.registry, {**dict.fromkeys(_STRUCTURE[self.calls.phase], "structure"), **(fixed or {})}
        for name in [name for name in known if name not in fixed]:
            # fix a constant whose whole range changes the times of only a few rows
            low, high = (self.log_residual({**start, name: end}) for end in (known[name].low, known[name].high))
            if np.count_nonzero(np.abs(high - low) > 0.02) < INFORMING_ROWS:
                fixed[name] = "not identified by these rows"

        def covariance(found: Minimum, values: Mapping[str, float]) -> tuple[FloatArray, float]:
            return solver.sandwich(found.rows, solver.slopes(self.log_residual, values, found.names, 1e-3)), 0.0

        search = {**_SEARCH, "weak": 1.0, "max_nfev": 60, "moot": solver.NO_GAIN}
        return solver.fit_logs(self.log_residual, start, known, covariance, fixed=fixed, **search)

    def blank(self) -> ResidualGrid:
        """Return a blank grid over the smallest box of octaves that contains the rows."""
        position = self.calls.estimate(self.defaults).position
        start = tuple(float(np.floor(np.min(x))) for x in position)
        shape = [int(np.ceil(np.max(x) - first - 1e-9)) + 1 for x, first in zip(position, start, strict=True)]
        return ResidualGrid(start, (1.0, 1.0, 1.0), np.zeros(shape))

    def predict(self, values: Mapping[str, float], grid: ResidualGrid | None) -> FloatArray:
        e = self.calls.estimate(values)
        return np.asarray(e.time if grid is None else e.time * np.exp(grid(e.position)))


def calls_of(records: Any, operator: str, machine: Machine) -> AttentionFit:
    """Return the fit of attention records (an object with columns of these names, seconds in s)."""
    columns = {name: np.asarray(getattr(records, name), dtype=np.float64) for name in SHAPE}
    bytes_ = np.array([DTYPE_BYTES[code] for code in range(len(DTYPES))], dtype=np.float64)
    latent = operator in LATENT
    geometry = Geometry(
        **columns,
        element_bytes=bytes_[records.dtype],
        cache_bytes=bytes_[records.weight_dtype],
        window=records.window.astype(np.float64),
        warm=1.0 - records.cold.astype(np.float64),
        value_dim=records.n.astype(np.float64) if latent else None,
        latent=operator == "mla_decode",  # the one phase whose queries absorbed the weights
    )
    calls = AttentionCalls(operator.split("_")[1], latent, geometry, machine, machine.peak_flop_per_s)
    return AttentionFit(calls, np.asarray(records.seconds, dtype=np.float64), 2.0 if latent else 1.0)


def fit_attention(
    calls: AttentionFit,
    architecture: str,
    *,
    fold_by: Sequence[str] = ("heads", "lengths"),
    seed: int = 0,
    start: Mapping[str, float] | None = None,
) -> FittedPart:
    """Fit one phase of attention to calls of one stack, each kernel separately; ValueError if none has 20 rows.

    The search begins at ``start`` (the constants of a related GPU), else at the architecture's defaults. A fold, by
    ``seed``, holds out groups by each size of ``fold_by`` and refits everything; the errors of all folds are pooled.
    """
    c, dropped = calls.screened()
    kinds, kind, count = np.unique(c.kinds, axis=0, return_inverse=True, return_counts=True)
    kind = kind.reshape(-1)
    if count.max(initial=0) < MINIMUM_ROWS <= len(c):  # together they are enough for one kernel
        most = count.argmax()
        kinds, kind, count = kinds[most : most + 1], np.zeros_like(kind), np.array([len(c)])
    kinds, count, seen = kinds[count >= MINIMUM_ROWS], count[count >= MINIMUM_ROWS], kinds
    if not len(kinds):
        few = f"expected at least {MINIMUM_ROWS} usable rows, got {len(c)} ({dropped or 'none excluded'})"
        raise ValueError(f"{c.calls.operator}: {few}")
    if lost := len(c) - int(count.sum()):
        dropped |= {f"fewer than {MINIMUM_ROWS} rows of their head width, window and cache": lost}
    known = c.registry
    first = {n: k.default(architecture) for n, k in known.items()} | dict(start or {})
    keep = {}
    if c.decodes and architecture != "cpu":
        keep["regroup"] = "applies to CPUs only"
    if c.calls.operator in FORMS:
        keep["wide_s"] = "only rows of 128 heads identify it, and units have the same effect"
    # first the kernel whose constants the section lists: no window, no narrow cache, most rows
    kinds = kinds[np.lexsort((np.abs(kinds[:, 0] - 7.0), -count, kinds[:, 2], kinds[:, 1]))]
    rng, fits = np.random.default_rng(seed), list[_KernelFit]()
    for selected in kinds:
        rows = c.take(kind == np.flatnonzero((seen == selected).all(axis=1))[0])
        starts = [first, *(fit.constants.values for fit in fits[:1])]
        fits.append(_fit_kernel(rows, starts, keep, fold_by, rng))
    common = fits[0].constants
    constants = np.array([[fit.constants.values[name] for name in known] for fit in fits])
    factors = np.log(np.maximum(constants, 1e-12) / np.maximum(constants[0], 1e-12)).round(6)
    arrays = _joined([fit.grid for fit in fits])
    if kinds.tolist() != [[7.0, 0.0, 0.0]]:  # else the section has the one kernel it would have without these arrays
        arrays |= {"kinds": kinds, "factors": factors}
    errors = np.concatenate([fit.held_out for fit in fits])
    inside = np.concatenate([fit.log_residual for fit in fits])
    scale = section_scale(errors, Uncertainty.joined([fit.uncertainty for fit in fits]))
    accuracy = {**accuracy_of(np.expm1(errors)), "core_mape": float(np.abs(np.expm1(inside)).mean())}
    section = Section(common.fitted(), arrays, scale, accuracy, status="calibrated")
    return FittedPart(section, common, int(count.sum()), errors, dropped)


@dataclass(frozen=True)
class _KernelFit:
    constants: ConstantsFit
    grid: ResidualGrid | None
    held_out: FloatArray  # log predicted over measured of each row by a fit without it, by each size in turn
    log_residual: FloatArray  # log analytical over measured time of each row
    uncertainty: Uncertainty  # of the rows, in the order of ``held_out``


def fit_form(
    c: AttentionFit, starts: Sequence[Mapping[str, float]], keep: Mapping[str, str]
) -> tuple[ConstantsFit, ResidualGrid]:
    """Return constants and residual of the calls of one kernel, from the best of the starts; ``keep`` fixes constants.
    A term per sequence is dropped if the error stays about the same: it would only fit noise."""
    if c.groups("heads").max() == 0:
        keep = {**keep, **dict.fromkeys(_LONE[c.calls.phase], "rows of a single head configuration do not identify it")}
    if c.calls.operator == "mla_decode" and c.groups("heads").max() == 0 and c.calls.machine.persistent:
        keep = {**keep, "unit_bytes_per_s": "products of a single number of heads have the same effect"}
        starts = [{**start, **LONE_LATENT} for start in starts]
    elif c.calls.operator in FORMS:
        starts = [_best_form(c, starts, keep, FORMS[c.calls.operator])]
    if c.shows_tiles:
        starts = [_best_form(c, starts, keep, TILE_ROWS)]
    low, why = c.registry["sequence_s"].low, "time follows the work units alone"
    forms: list[tuple[float, ConstantsFit, ResidualGrid]] = []
    for simple in (False, True) if len(c) >= FEW_ROWS else (False,):
        for start in starts:
            first = {**start, "sequence_s": low} if simple else start
            constants = c.constants(first, {**keep, "sequence_s": why} if simple else keep)
            grid = c.residual(constants.values)
            error = np.abs(np.log(c.predict(constants.values, grid) / c.seconds)).mean()
            forms.append((float(error) / (SIMPLER if simple else 1.0), constants, grid))
    return min(forms, key=lambda form: form[0])[1:]


def _best_form(
    c: AttentionFit,
    starts: Sequence[Mapping[str, float]],
    keep: Mapping[str, str],
    forms: Sequence[Mapping[str, float]],
) -> Mapping[str, float]:
    """Return the fitted constants with the smallest error without residual, among starts with each structure."""
    found = [c.constants({**start, **form}, keep).values for start in starts for form in forms]
    return min(found, key=lambda values: float(np.abs(c.log_residual(values)).mean()))


def _fit_kernel(
    c: AttentionFit, starts: Sequence[Mapping[str, float]], keep: Mapping[str, str], fold_by: Sequence[str], rng: Any
) -> _KernelFit:
    """Fit one kernel; return it with its errors on held-out rows."""
    constants, grid = fit_form(c, starts, keep)
    errors_of, plain, order = [], [], []
    for kind in fold_by:
        group = c.groups(kind)
        if group.max() == 0:
            group = np.arange(len(c))  # a single group: hold out rows
        for train, test in solver.folds(group, FOLDS, rng):
            # start at the solution: a refit changes little, but its change is part of the error of a held-out shape
            rest, left, values = c.take(train), c.take(test), dict(constants.values)
            if constants.std_errors:
                free = {name: c.registry[name] for name in constants.std_errors}
                values |= solver.minimise(rest.log_residual, values, free, max_nfev=6, **_SEARCH).values
            errors_of.append(np.log(left.predict(values, rest.residual(values)) / left.seconds))
            plain.append(left.log_residual(values))
            order.append(test)
    errors, core_errors, rows = (np.concatenate(parts) for parts in (errors_of, plain, order))
    log_residual = c.log_residual(constants.values)
    e = c.take(rows).calls.estimate(constants.values)
    uncertainty = uncertainty_of(e, same_stack_scales(e.operator))
    if len(c) < FEW_ROWS and np.abs(core_errors).mean() < np.abs(errors).mean():
        return _KernelFit(constants, None, core_errors, log_residual, uncertainty)
    return _KernelFit(constants, grid, errors, log_residual, uncertainty)


def _joined(grids: Sequence[ResidualGrid | None]) -> dict[str, NDArray[Any]]:
    """Return the arrays of the residuals of several kernels, joined along the first axis of one box of octaves."""
    given = [grid for grid in grids if grid is not None]
    if not given:
        return {}
    low = np.min([grid.start for grid in given], axis=0)
    high = np.max([np.add(grid.start, grid.values.shape) for grid in given], axis=0)
    size = tuple((high - low).astype(int))
    out = []
    for grid in grids:
        values, start = (np.zeros((1, 1, 1)), low) if grid is None else (grid.values, grid.start)
        before = np.subtract(start, low).astype(int)
        after = np.subtract(size, before + values.shape)
        out.append(np.pad(values, list(zip(before, after, strict=True)), mode="edge"))
    whole = np.concatenate(out).round(3)
    return ResidualGrid(tuple(low.tolist()), (1.0,) * 3, whole).arrays()
