"""Constants of 2:4 kernels, fitted with the dense section as it is.

Use :func:`fit_sparse` on measured rows, :func:`fit_sparse_step` on published ratios of 2:4 to dense times: absolute
times of different benchmarks do not compare, ratios within one do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from calibration.fit.core import weight_copies
from calibration.fit.solver import FittedPart, Minimum, fit_logs, gauss_newton
from calibration.measurements import published
from calibration.records.table import Records
from simulator.hardware.constants import GEMM_CONSTANTS as CONSTANTS
from simulator.hardware.profile import Fitted, HardwareProfile, Section
from simulator.kernels.gemm import DENSE, SPARSE24, gemm_time, with_section

F = NDArray[np.float64]

ENOUGH_RATIOS = 5
"""Published ratios one constant needs."""


def _with_constants(section: Section, constants: Mapping[str, Fitted], **accuracy: float) -> Section:
    return replace(section, constants={**section.constants, **constants}, accuracy={**section.accuracy, **accuracy})


def fit_sparse(r: Records, hw: HardwareProfile, dtype: str) -> FittedPart:
    """Constants of 2:4 kernels from their rows, all of one number format: the section of ``dtype`` with them, and
    "mape_2to4" and "median_2to4" of these rows in its accuracy."""
    section = hw.section("gemm", dtype)
    start = {name: section[name] for name in ("sparse_step", "sparse_load", "sparse_time")}

    def misfit(values: Mapping[str, float]) -> F:
        trial = with_section(hw, dtype, _with_constants(section, {n: Fitted(v) for n, v in values.items()}))
        times = gemm_time(r.m, r.n, r.k, trial, dtype=dtype, kernel=SPARSE24, copies=weight_copies(r))
        return np.asarray(np.log(times.seconds / r.seconds))

    def covariance(found: Minimum, _: Mapping[str, float]) -> tuple[F, float]:
        spread = float(np.sqrt(np.mean(np.minimum(found.rows**2, 0.15**2))))
        return gauss_newton(found.slopes, spread), spread

    ranges = {name: CONSTANTS[name] for name in start}
    found = fit_logs(misfit, start, ranges, covariance, weak=0.5, diff_step=[1e-3], max_nfev=40)
    size = np.abs(np.expm1(misfit(found.values)))
    scores = {"mape_2to4": float(size.mean()), "median_2to4": float(np.median(size))}
    return FittedPart(_with_constants(section, found.fitted(), **scores), found, len(r))


def fit_sparse_step(hw: HardwareProfile, dtype: str) -> Section:
    """The GEMM section of a format with ``sparse_step`` fitted to published ratios; unchanged with fewer than
    :data:`ENOUGH_RATIOS` of this device (those of an unnamed one are left out).

    Ten rows of an A100 and ten of an H100-class device are known, so one constant is fitted, by least absolute log
    error (bf16 stands for fp16 too, as they run at one rate); "median_2to4" in its accuracy is the median log error of
    rows left out one at a time.
    """
    section = hw.sections["gemm", dtype]
    dtypes = ("fp16", "bf16") if dtype in ("fp16", "bf16") else (dtype,)
    rows = [r for r in published("gemm_ratios") if r["what"] == "2:4" and r["gpu"] != "not stated"]
    rows = [r for r in rows if r["hardware"] == hw.name and r["dtype"] in dtypes]
    if len(rows) < ENOUGH_RATIOS:
        return section
    m, n, k, before, after = (np.array([float(r[c]) for r in rows]) for c in ("m", "n", "k", "dense_us", "pruned_us"))
    ratio = before / after
    constant = CONSTANTS["sparse_step"]
    steps = np.round(np.arange(max(constant.low, 0.3), constant.high + 1e-9, 0.01), 2)
    dense = gemm_time(m, n, k, hw, dtype=dtype, kernel=DENSE, cold=False).seconds
    error = np.empty((len(steps), len(ratio)))
    for i, step in enumerate(steps):  # one constant, so that a scan is safer than a search
        trial = with_section(hw, dtype, _with_constants(section, {"sparse_step": Fitted(float(step))}))
        sparse = gemm_time(m, n, k, trial, dtype=dtype, kernel=SPARSE24, density=0.5, cold=False).seconds
        error[i] = np.abs(np.log(dense / sparse / ratio))
    total = error.sum(axis=1)
    without = [error[(total - error[:, i]).argmin(), i] for i in range(len(ratio))]
    draws = np.random.default_rng(0).integers(0, len(ratio), (200, len(ratio)))
    spread = np.std([steps[error[:, drawn].sum(axis=1).argmin()] for drawn in draws])
    found = Fitted(float(steps[total.argmin()]), float(spread), "fitted")
    return _with_constants(section, {"sparse_step": found}, median_2to4=float(np.median(without)))
