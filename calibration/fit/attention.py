"""Calibration of one phase of attention of one stack. Each kernel (head width, window, format of
the cache) has separate constants and a separate residual."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibration.fit import solver
from calibration.fit.residual import Regularisation
from calibration.fit.section import FOLDS, Fit, accuracy_of, blank_grid, floats, section_scale
from calibration.fit.solver import ConstantsFit, FittedPart, Minimum
from calibration.records.screening import LATENT
from simulator.arrays import Array, FloatArray, IndexArray
from simulator.codes import DTYPE_BYTES, DTYPES
from simulator.hardware.profile import Section
from simulator.operators.attention import (
    AttentionCalls,
    Geometry,
    decode_core,
    decode_work,
    prefill_work,
)
from simulator.operators.base import Machine, ResidualGrid, Values
from simulator.uncertainty.factors import Uncertainty, same_stack_scales, uncertainty_of

# operators of records and sections that are fitted here
OPERATORS = ("attention_prefill", "attention_decode", "mla_prefill", "mla_decode")

# constants by phase that choose the form of the model rather than scale it: never fitted, taken
# from the registry
_STRUCTURE = {
    "prefill": ("packs", "pads", "sparse_block"),
    "decode": ("rows", "units_per_sm", "split_keys", "tile_rows"),
}

_FORMS = itertools.product((16.0, 64.0, 128.0), (0.5, 1.0, 2.0), (128.0, 1e6))
# Structures to compare: kernels of latent attention differ in heads per unit, in units per SM, and
# in whether they split a cache. On the A100 the analytical model errs by 27 % with the registry's
# structure, by 4 % with the best.
FORMS: Mapping[str, Sequence[Values]] = {
    "mla_decode": [
        dict(zip(("rows", "units_per_sm", "split_keys"), form, strict=True)) for form in _FORMS
    ]
}

# Rows per tile of plain decode to compare on devices with little compute for their bandwidth: there
# products of padded rows change the time. They count as visible if, in the median row and with the
# smallest tiles, they take at least SEEN of the time of reading the cache.
TILE_ROWS: Sequence[Values] = tuple({"tile_rows": rows} for rows in (16.0, 64.0, 128.0))
SEEN = 0.25

# Latent decode on Hopper where all rows have one number of heads, which do not identify the
# structure: FlashMLA has tiles of 64 heads (docs/20250422-new-kernel-deep-dive.md).
LONE_LATENT: Values = {"tile_rows": 64.0, "rows": 64.0}

# with fewer rows the residual is kept only if it improves the prediction of held-out rows
FEW_ROWS = 100
INFORMING_ROWS = 8  # a constant that changes the times of fewer rows is not fitted
# the form with a term per sequence is kept if its error is below this share of the error without
SIMPLER = 0.9

# constants by phase that rows of a single head configuration do not identify; they keep the
# architecture's value
_LONE = {
    "prefill": ("exp_per_s", "sequence_s", "e_io", "l2_gain", "l2_share"),
    "decode": ("wide_s", "l2_gain", "l2_share", "merge_s"),
}

_SEARCH: Mapping[str, Any] = {"ftol": 1e-6, "xtol": 1e-6}

# columns of a shape
SHAPE = ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim")


@dataclass(frozen=True)
class AttentionFit(Fit):
    calls: AttentionCalls

    # along (group, units, length); chosen on seeds 10 and 11 (A100 and H100, both phases, 400 and
    # all rows)
    REGULARISATION = Regularisation(0.02, (0.03, 0.05, 0.05), 0.02)
    ROUNDS = 4

    @property
    def decodes(self) -> bool:
        return self.calls.phase == "decode"

    @property
    def shows_tiles(self) -> bool:
        """Whether the products of padded tiles are large enough to change the times of decode."""
        machine, work = self.calls.machine, decode_work(self.calls.geometry)
        if not self.decodes or self.calls.latent or machine.packs:
            return False
        least = decode_core(work, machine, {**self.defaults("*"), **TILE_ROWS[0]}).by_bottleneck
        return bool(np.median(least["compute"] / least["memory"]) >= SEEN)

    def groups(self, by: str = "") -> IndexArray:
        """Return the group of each row by "lengths" (of the cache in decode, else of the queries)
        or "heads"."""
        g = self.calls.geometry
        if by == "lengths":
            return solver.numbered(g.kv_len if self.decodes else g.q_len)
        return solver.numbered(g.heads, g.kv_heads, g.head_dim)

    @property
    def kinds(self) -> FloatArray:
        """Properties that distinguish kernels, (rows, 3), as in
        :class:`simulator.operators.attention.Kernels`."""
        g = self.calls.geometry
        narrow = np.asarray(g.cache_bytes) < np.asarray(g.element_bytes)
        columns = np.log2(g.head_dim), np.asarray(g.window) > 0, narrow
        return np.stack(np.broadcast_arrays(*columns), axis=1).astype(np.float64)

    def usable(self) -> AttentionFit:
        """Return the rows that are not faster than the device can be. A time below bytes /
        bandwidth is valid if the bytes fit the L2. FLOP / peak has a tolerance of 5 % for boost
        clocks, and of 2x for a latent cache, which may be computed in its narrower format. Decode
        kernels compute a chunk of one query."""
        g, machine, seconds = self.calls.geometry, self.calls.machine, self.seconds
        if self.decodes:
            read = decode_work(g)
            size, flops = read.cache_bytes, read.flops
        else:
            computed = prefill_work(g, {"pads": 1.0, "packs": 0.0})
            size, flops = computed.moved_bytes, computed.flops
        faster = 2.0 if self.calls.latent else 1.0
        too_fast = seconds * 1.05 * faster < flops / machine.peak_flop_per_s
        too_fast |= (size > 1.5 * machine.l2_bytes) & (
            seconds < size / machine.bandwidth_bytes_per_s
        )
        return self.take(~(too_fast | ((g.q_len < 2) & (not self.decodes))))

    def constants(
        self, start: Values | None = None, fixed: Mapping[str, str] | None = None
    ) -> ConstantsFit:
        """Return the constants; ``fixed`` maps constants that keep the values of ``start`` to the
        reason."""
        start, known = start or self.defaults("*"), self.registry
        fixed = {**dict.fromkeys(_STRUCTURE[self.calls.phase], "structure"), **(fixed or {})}
        for name in [name for name in known if name not in fixed]:
            low, high = (
                self.log_residual({**start, name: end})
                for end in (known[name].low, known[name].high)
            )
            if np.count_nonzero(np.abs(high - low) > 0.02) < INFORMING_ROWS:
                fixed[name] = "not identified by these rows"

        def covariance(found: Minimum, values: Values) -> tuple[FloatArray, float]:
            return solver.sandwich(
                found.rows, solver.slopes(self.log_residual, values, found.names, 1e-3)
            ), 0.0

        search = {**_SEARCH, "weak": 1.0, "max_nfev": 60, "moot": solver.NO_GAIN, "fixed": fixed}
        return solver.fit_logs(self.log_residual, start, known, covariance, **search)

    def blank(self) -> ResidualGrid:
        position = self.calls.estimate(self.defaults("*")).position
        return blank_grid(position, (1.0, 1.0, 1.0))


def calls_of(records: Any, operator: str, machine: Machine) -> AttentionFit:
    """Return the fit of attention records (an object with columns of these names, seconds in s)."""
    sizes: dict[str, Any] = dict(zip(SHAPE, floats(records, *SHAPE), strict=True))
    bytes_ = np.array([DTYPE_BYTES[code] for code in range(len(DTYPES))], dtype=np.float64)
    latent = operator in LATENT
    geometry = Geometry(
        **sizes,
        element_bytes=bytes_[records.dtype],
        cache_bytes=bytes_[records.weight_dtype],
        window=records.window.astype(np.float64),
        warm=1.0 - records.cold.astype(np.float64),
        value_dim=records.n.astype(np.float64) if latent else None,
        latent=operator == "mla_decode",  # in prefill the queries do not absorb the weights
    )
    calls = AttentionCalls(
        operator.split("_")[1], latent, geometry, machine, machine.peak_flop_per_s
    )
    return AttentionFit(calls, np.asarray(records.seconds, dtype=np.float64))


def fit_attention(
    calls: AttentionFit,
    architecture: str,
    *,
    fold_by: Sequence[str] = ("heads", "lengths"),
    seed: int = 0,
    start: Values | None = None,
) -> FittedPart:
    """Fit one phase of attention to calls of one stack, each kernel separately; ValueError if none
    has 20 rows. The search begins at ``start`` (the constants of a related GPU), else at the
    architecture's defaults. Folds, chosen by ``seed``, hold out groups by each size of ``fold_by``
    and fit the rest again; the errors of all folds are pooled."""
    c, rng, fits = calls.usable(), np.random.default_rng(seed), list[_KernelFit]()
    first = c.defaults(architecture) | dict(start or {})
    keep = {}
    if c.decodes and architecture != "cpu":
        keep["regroup"] = "applies to CPUs only"
    if c.calls.operator in FORMS:
        keep["wide_s"] = "only rows of 128 heads identify it, and units have the same effect"
    kernels = _kernels(c, len(calls))
    for _, rows in kernels:
        starts = [first, *(fit.constants.values for fit in fits[:1])]
        fits.append(_fit_kernel(c.take(rows), starts, keep, fold_by, rng))
    section = _section(fits, [kind for kind, _ in kernels])
    return FittedPart(section, fits[0].constants, sum(len(rows) for _, rows in kernels))


def _kernels(c: AttentionFit, measured: int) -> list[tuple[FloatArray, IndexArray]]:
    """Return the kind and the rows of each kernel that has enough rows. A section lists the
    constants of the first: no window, no narrow cache, most rows."""
    kinds, kind, count = np.unique(c.kinds, axis=0, return_inverse=True, return_counts=True)
    kind = kind.reshape(-1)
    if count.max(initial=0) < c.FEWEST <= len(c):  # all rows together are enough for one kernel
        most = count.argmax()
        kinds, kind, count = kinds[most : most + 1], np.zeros_like(kind), np.array([len(c)])
    enough = np.flatnonzero(count >= c.FEWEST)
    if not len(enough):
        few = f"expected at least {c.FEWEST} usable rows, got {len(c)} of {measured}"
        raise ValueError(f"{c.calls.operator}: {few}")
    width, window, narrow = kinds[enough].T
    enough = enough[np.lexsort((np.abs(width - 7.0), -count[enough], narrow, window))]
    return [(kinds[i], np.flatnonzero(kind == i)) for i in enough]


def _section(fits: Sequence[_KernelFit], kinds: Sequence[FloatArray]) -> Section:
    values = [fit.constants.values for fit in fits]
    constants = np.array([[one[name] for name in values[0]] for one in values])
    factors = np.log(np.maximum(constants, 1e-12) / np.maximum(constants[0], 1e-12)).round(6)
    arrays = _joined([fit.grid for fit in fits])
    # a section without these arrays has this kernel
    if [kind.tolist() for kind in kinds] != [[7.0, 0.0, 0.0]]:
        arrays |= {"kinds": np.array(kinds), "factors": factors}
    errors = np.concatenate([fit.held_out for fit in fits])
    inside = np.concatenate([fit.log_residual for fit in fits])
    scale = section_scale(errors, Uncertainty.joined([fit.uncertainty for fit in fits]))
    accuracy = accuracy_of(np.expm1(errors))
    accuracy["core_mape"] = float(np.abs(np.expm1(inside)).mean())
    return Section(fits[0].constants.fitted(), arrays, scale, accuracy, status="calibrated")


@dataclass(frozen=True)
class _KernelFit:
    constants: ConstantsFit
    grid: ResidualGrid | None
    # log predicted over measured of each row by a fit without it, by each size in turn
    held_out: FloatArray
    log_residual: FloatArray  # log analytical over measured time of each row
    uncertainty: Uncertainty  # errors of the rows, in the order of ``held_out``


def _fit_form(
    c: AttentionFit, starts: Sequence[Values], keep: Mapping[str, str]
) -> tuple[ConstantsFit, ResidualGrid]:
    """Return constants and residual of one kernel, from the best of the starts. The term per
    sequence is dropped if the error stays about the same: it would only fit noise."""
    if c.groups("heads").max() == 0:
        keep = {
            **keep,
            **dict.fromkeys(
                _LONE[c.calls.phase], "rows of a single head configuration do not identify it"
            ),
        }
    if (
        c.calls.operator == "mla_decode"
        and c.groups("heads").max() == 0
        and c.calls.machine.persistent
    ):
        keep = {
            **keep,
            "unit_bytes_per_s": "products of a single number of heads have the same effect",
        }
        starts = [{**start, **LONE_LATENT} for start in starts]
    elif c.calls.operator in FORMS:
        starts = [_best_form(c, starts, keep, FORMS[c.calls.operator])]
    if c.shows_tiles:
        starts = [_best_form(c, starts, keep, TILE_ROWS)]
    tried = [(start, keep, 1.0) for start in starts]
    if len(c) >= FEW_ROWS:
        simple = {**keep, "sequence_s": "time follows the work units alone"}
        tried += [
            ({**start, "sequence_s": c.registry["sequence_s"].low}, simple, SIMPLER)
            for start in starts
        ]
    forms: list[tuple[float, ConstantsFit, ResidualGrid]] = []
    for start, fixed, share in tried:
        constants = c.constants(start, fixed)
        grid = c.residual(constants.values)
        error = np.abs(c.log_error(constants.values, grid)).mean()
        forms.append((float(error) / share, constants, grid))
    return min(forms, key=lambda form: form[0])[1:]


def _best_form(
    c: AttentionFit,
    starts: Sequence[Values],
    keep: Mapping[str, str],
    forms: Sequence[Values],
) -> Values:
    """Return the fitted constants with the smallest error of the analytical model, among starts
    with each structure."""
    found = [c.constants({**start, **form}, keep).values for start in starts for form in forms]
    return min(found, key=lambda values: float(np.abs(c.log_residual(values)).mean()))


def _fit_kernel(
    c: AttentionFit,
    starts: Sequence[Values],
    keep: Mapping[str, str],
    fold_by: Sequence[str],
    rng: Any,
) -> _KernelFit:
    constants, grid = _fit_form(c, starts, keep)
    parts = [
        _errors(c, train, test, constants)
        for by in fold_by
        for train, test in solver.folds(_groups(c, by), FOLDS, rng)
    ]
    errors, core_errors, rows = (np.concatenate(values) for values in zip(*parts))
    log_residual = c.log_residual(constants.values)
    e = c.take(rows).calls.estimate(constants.values)
    uncertainty = uncertainty_of(e, same_stack_scales(e.operator))
    if len(c) < FEW_ROWS and np.abs(core_errors).mean() < np.abs(errors).mean():
        return _KernelFit(constants, None, core_errors, log_residual, uncertainty)
    return _KernelFit(constants, grid, errors, log_residual, uncertainty)


def _groups(c: AttentionFit, by: str) -> IndexArray:
    group = c.groups(by)
    return np.arange(len(c)) if group.max() == 0 else group  # a single group: hold out rows


def _errors(
    c: AttentionFit, train: IndexArray, test: IndexArray, constants: ConstantsFit
) -> tuple[FloatArray, FloatArray, IndexArray]:
    """Return the log errors of held-out rows with and without the residual, and their numbers. The
    search starts at the solution: it moves little, but this is part of the error of a held-out
    shape."""
    rest, left, values = c.take(train), c.take(test), dict(constants.values)
    if constants.std_errors:
        free = {name: c.registry[name] for name in constants.std_errors}
        values |= solver.minimise(rest.log_residual, values, free, max_nfev=6, **_SEARCH).values
    return left.log_error(values, rest.residual(values)), left.log_residual(values), test


def _joined(grids: Sequence[ResidualGrid | None]) -> dict[str, Array]:
    """Return the residuals of several kernels as one grid: one box of octaves per kernel, along the
    first axis."""
    given = [grid for grid in grids if grid is not None]
    if not given:
        return {}
    low = np.min([grid.start for grid in given], axis=0)
    high = np.max([np.add(grid.start, grid.values.shape) for grid in given], axis=0)
    out = []
    for grid in grids:
        values, start = (np.zeros((1, 1, 1)), low) if grid is None else (grid.values, grid.start)
        before = np.subtract(start, low)
        after = high - low - before - values.shape
        out.append(np.pad(values, np.stack([before, after], axis=1).astype(int), mode="edge"))
    whole = np.concatenate(out).round(3)
    return ResidualGrid(tuple(low.tolist()), (1.0,) * 3, whole).arrays()
