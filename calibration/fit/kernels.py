"""Fit constants of kernels that skip work (2:4, gathered tokens, blocks of keys), with the dense section unchanged.
Published ratios of 2:4 to dense times are comparable within one benchmark; times of different benchmarks are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from calibration.fit.predict import SECTIONS, predict
from calibration.fit.solver import FittedPart, Minimum, fit_logs, gauss_newton
from calibration.measurements import published
from calibration.records.timing_table import OPERATORS, Records
from simulator.arrays import FloatArray
from simulator.hardware.profile import HardwareProfile, with_section
from simulator.hardware.sections import Fitted, Section
from simulator.operators import CONSTANTS
from simulator.uncertainty.operators import GemmOptions, gemm_time

ENOUGH_RATIOS = 5  # published ratios that one constant needs

# Kind of rows -> its name in an accuracy, the constants of its kernel, and the rows that its fit needs. A gathered GEMM
# counts if it is one kernel: a gather, a GEMM and a scatter have no constants of this kind.
KINDS: Mapping[str, tuple[str, tuple[str, ...], int]] = {
    "gemm_2to4": ("2to4", ("sparse_step", "sparse_load", "sparse_time"), 12),
    "gather_gemm": ("gathered", ("block_step",), 6),
    "attention_block_sparse": ("blocks", ("sparse_block",), 6),
}
# values of sparse_step and sparse_load that fit_sparse24 tries; compressed weights do not arrive faster than dense ones
STEPS: tuple[float, ...] = tuple(np.round(np.arange(0.3, 1.205, 0.01), 2).tolist())
LOADS: tuple[float, ...] = tuple(np.round(np.arange(0.5, 1.01, 0.05), 2).tolist())
FEW_TOKENS = 64  # up to this number of tokens reading weights takes most of the time, so ratios show sparse_load
EDGE = 64.0  # keys per block; the search uses the cost of such blocks, since sparse_block may be 0 and has no log then


def _with_constants(section: Section, constants: Mapping[str, Fitted], **accuracy: float) -> Section:
    return replace(section, constants={**section.constants, **constants}, accuracy={**section.accuracy, **accuracy})


def fit_skipping(r: Records, hw: HardwareProfile, dtype: str) -> FittedPart:
    """Return the dense section with the constants of a kernel fitted to rows of one kind (:data:`KINDS`)."""
    kind = OPERATORS[int(r.operator[0])]
    operator, (name, constants, _) = SECTIONS[kind], KINDS[kind]
    section = hw.section(operator, dtype)
    if section.status == "default":
        raise ValueError(f"{name}: {len(r)} rows need a fit of dense {operator}, which is missing")

    def log_residual(searched: Mapping[str, float]) -> FloatArray:
        trial = _with_constants(section, {n: Fitted(v) for n, v in _known(searched).items()})
        profile = replace(hw, sections={**hw.sections, (operator, dtype): trial})
        return np.asarray(np.log(predict(r, profile).time.seconds / r.seconds))

    def covariance(found: Minimum, _: Mapping[str, float]) -> tuple[FloatArray, float]:
        informative = np.abs(found.slopes).max(axis=1) > 0.02  # other rows do not depend on the constants
        freedom = np.count_nonzero(informative) - len(found.names)
        if freedom < 1:
            return np.full((len(found.names),) * 2, np.inf), np.inf
        residual_sd = float(np.sqrt(np.sum(np.minimum(found.rows**2, 0.15**2)[informative]) / freedom))
        return gauss_newton(found.slopes, residual_sd), residual_sd

    start = _searched({n: section[n] for n in constants})
    ends = ({n: getattr(CONSTANTS[operator][n], end) for n in constants} for end in ("low", "high"))
    low, high = map(_searched, ends)
    ranges = {n: SimpleNamespace(low=low[n], high=high[n]) for n in constants}
    found = fit_logs(log_residual, start, ranges, covariance, weak=0.5, step=1e-3, max_nfev=40)
    size = np.abs(np.expm1(log_residual(found.values)))
    errors = {n: EDGE * error if n == "sparse_block" else error for n, error in found.std_errors.items()}
    found = replace(found, values=_known(found.values), std_errors=errors)
    scores = {f"mape_{name}": float(size.mean()), f"median_{name}": float(np.median(size))}
    return FittedPart(_with_constants(section, found.fitted(), **scores), found, len(r))


def _searched(constants: Mapping[str, float]) -> dict[str, float]:
    """Return the constants of the search: ``sparse_block`` as the relative cost of blocks of :data:`EDGE` keys."""
    return {n: 1.0 + value / EDGE if n == "sparse_block" else value for n, value in constants.items()}


def _known(searched: Mapping[str, float]) -> dict[str, float]:
    return {n: EDGE * (value - 1.0) if n == "sparse_block" else value for n, value in searched.items()}


def fit_sparse24(hw: HardwareProfile, dtype: str) -> Section:
    """Return the GEMM section of a format with ``sparse_step`` fitted to published ratios by least absolute log error,
    also ``sparse_load`` if some ratios have few tokens; unchanged with fewer than :data:`ENOUGH_RATIOS` of this device.
    bf16 and fp16 count as one format, since they run at one rate. "median_2to4" in the accuracy is the median log error
    of rows held out one at a time."""
    section = hw.sections["gemm", dtype]
    dtypes = ("fp16", "bf16") if dtype in ("fp16", "bf16") else (dtype,)
    rows = [r for r in published("gemm_ratios") if r["what"] == "2:4" and r["gpu"] != "not stated"]
    rows = [r for r in rows if r["hardware"] == hw.name and r["dtype"] in dtypes]
    if len(rows) < ENOUGH_RATIOS:
        return section
    m, n, k, before, after = (np.array([float(r[c]) for r in rows]) for c in ("m", "n", "k", "dense_us", "pruned_us"))
    ratio = before / after
    dense = gemm_time(m, n, k, hw, dtype=dtype, kernel="dense", options=GemmOptions(copies=1)).seconds
    tried: list[dict[str, float]] = [{"sparse_step": step} for step in STEPS]
    if m.min() <= FEW_TOKENS:
        tried = [{**values, "sparse_load": load} for values in tried for load in LOADS]
    error = np.empty((len(tried), len(ratio)))
    for i, values in enumerate(tried):  # for so few constants, a scan is safer than a search
        trial = with_section(hw, dtype, _with_constants(section, {c: Fitted(v) for c, v in values.items()}))
        sparse = gemm_time(m, n, k, trial, dtype=dtype, kernel="sparse24", options=GemmOptions(copies=1)).seconds
        error[i] = np.abs(np.log(dense / sparse / ratio))
    total = error.sum(axis=1)
    without = [error[(total - error[:, i]).argmin(), i] for i in range(len(ratio))]
    draws = np.random.default_rng(0).integers(0, len(ratio), (200, len(ratio)))
    drawn = [tried[error[:, rows].sum(axis=1).argmin()] for rows in draws]
    found = {
        name: Fitted(value, float(np.std([values[name] for values in drawn])) or None)  # None: on its bound
        for name, value in tried[total.argmin()].items()
    }
    return _with_constants(section, found, median_2to4=float(np.median(without)))
