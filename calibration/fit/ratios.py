"""The efficiency of 2:4 kernels, from published ratios of their time to that of the dense GEMM of the same shape.

Absolute times of different benchmarks do not compare, ratios within one do. Ten rows of an A100 and ten of an H100-class device
are known, so one constant is fitted, by least absolute log error, and its accuracy is that of rows left out one at a time.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from calibration.measurements import published
from simulator.hardware.constants import GEMM_CONSTANTS as CONSTANTS
from simulator.hardware.parts import Fitted, Section
from simulator.hardware.profile import HardwareProfile
from simulator.kernels.gemm import DENSE, SPARSE24, gemm_time, with_section

F = NDArray[np.float64]

ENOUGH = 5
"""Rows one constant needs."""


def published_ratios(hardware: str, dtypes: tuple[str, ...]) -> tuple[F, F, F, F]:
    """m, n, k and dense over 2:4 time of the published rows of a device and its formats; those of an unnamed device are left out."""
    rows = [
        r
        for r in published("gemm_ratios")
        if r["what"] == "2:4" and r["hardware"] == hardware and r["dtype"] in dtypes and r["gpu"] != "not stated"
    ]
    m, n, k = (np.array([float(r[c]) for r in rows]) for c in ("m", "n", "k"))
    return m, n, k, np.array([float(r["dense_us"]) / float(r["pruned_us"]) for r in rows])


def fit_sparse_step(hw: HardwareProfile, dtype: str) -> Section:
    """The GEMM section of a format with ``sparse_step`` fitted to published ratios; unchanged with fewer than :data:`ENOUGH` rows.

    Parameters
    ----------
    hw : HardwareProfile
        With its fitted sections.
    dtype : str
        bf16 stands for fp16 too, as they run at one rate.

    Returns
    -------
    Section
        Its accuracy has the median log error of rows left out, "median_2to4".
    """
    section = hw.sections["gemm", dtype]
    m, n, k, ratio = published_ratios(hw.name, ("fp16", "bf16") if dtype in ("fp16", "bf16") else (dtype,))
    if len(ratio) < ENOUGH:
        return section
    constant = CONSTANTS["sparse_step"]
    steps = np.round(np.arange(max(constant.low, 0.3), constant.high + 1e-9, 0.01), 2)
    dense = gemm_time(m, n, k, hw, dtype=dtype, kernel=DENSE, cold=False).seconds
    error = np.empty((len(steps), len(ratio)))
    for i, step in enumerate(steps):  # one constant, so that a scan is safer than a search
        trial = with_section(hw, dtype, _with_step(section, float(step), None))
        error[i] = np.abs(
            np.log(
                dense / gemm_time(m, n, k, trial, dtype=dtype, kernel=SPARSE24, density=0.5, cold=False).seconds / ratio
            )
        )
    total = error.sum(axis=1)
    without = np.array([error[(total - error[:, i]).argmin(), i] for i in range(len(ratio))])
    draws = np.random.default_rng(0).integers(0, len(ratio), (200, len(ratio)))
    spread = np.std([steps[error[:, rows].sum(axis=1).argmin()] for rows in draws])
    found = _with_step(section, float(steps[total.argmin()]), float(spread))
    return replace(found, accuracy=MappingProxyType({**section.accuracy, "median_2to4": float(np.median(without))}))


def _with_step(section: Section, value: float, error: float | None) -> Section:
    return replace(
        section, constants=MappingProxyType({**section.constants, "sparse_step": Fitted(value, error, "fitted")})
    )
