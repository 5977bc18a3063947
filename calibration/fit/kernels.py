"""Constants of kernels that differ from the dense GEMM (2:4 weights, narrower weights), fitted with the dense section as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from calibration.records.records import Records
from simulator.hardware.constants import GEMM_CONSTANTS as CONSTANTS
from simulator.hardware.parts import Fitted, Section
from simulator.hardware.profile import HardwareProfile
from simulator.kernels.gemm import SPARSE24, gemm_time, with_section
from simulator.workload import DTYPES

F = NDArray[np.float64]


def weight_copies(records: Records) -> F:
    """Weights used in turn, as the GEMM model counts them: infinitely many where the benchmark kept them cold."""
    return np.where(records.copies > 0, records.copies, np.where(records.cold, np.inf, 1.0)).astype(np.float64)


def fit_extra(
    records: Records, hw: HardwareProfile, dtype: str, names: Sequence[str]
) -> tuple[Section, dict[str, str]]:
    """Constants of a kernel that differs from the dense one, the dense section as it is.

    Parameters
    ----------
    records : Records
        Rows of that kernel, all of one arithmetic format.
    hw : HardwareProfile
    dtype : str
    names : sequence of str
        Constants to fit; those that the model does not have are passed over.

    Returns
    -------
    section : Section
        That of ``dtype`` with those constants, their standard errors, and "mape_..." of these rows in its accuracy.
    fixed : dict of str to str
        Those of the names that could not be known, and why.
    """
    section = hw.section("gemm", dtype)
    names = [name for name in names if name in CONSTANTS]
    low, high = (np.log([max(getattr(CONSTANTS[n], side), 1e-9) for n in names]) for side in ("low", "high"))
    start = np.clip(np.log([max(section[n], 1e-9) for n in names]), low + 1e-3, high - 1e-3)
    kernel = SPARSE24 if records.is_operator("gemm_2to4").all() else 0
    formats = [(code, records.select(records.weight_dtype == code)) for code in np.unique(records.weight_dtype)]

    def with_values(x: F) -> Section:
        new = {name: Fitted(float(np.exp(v)), None, "fitted") for name, v in zip(names, x, strict=True)}
        return replace(section, constants=MappingProxyType({**section.constants, **new}))

    def log_ratio(x: F) -> F:
        trial = with_section(hw, dtype, with_values(x))
        out = []
        for code, rows in formats:
            weight = DTYPES[int(code)]
            t = gemm_time(
                rows.m,
                rows.n,
                rows.k,
                trial,
                dtype=dtype,
                weight_dtype=weight,
                kernel=kernel,
                copies=weight_copies(rows),
            )
            out.append(np.log(t.seconds / rows.seconds))
        return np.concatenate(out)

    found = least_squares(
        log_ratio, start, bounds=(low, high), loss="soft_l1", f_scale=0.05, diff_step=[1e-3], max_nfev=40
    )
    spread = float(np.sqrt(np.mean(np.minimum(log_ratio(found.x) ** 2, 0.15**2))))
    slopes: F = np.asarray(found.jac)
    errors = np.sqrt(np.diag(np.linalg.pinv(slopes.T @ slopes))) * spread
    new = dict(with_values(found.x).constants)
    fixed = {}
    for name, x, error, lo, hi in zip(names, found.x, errors, low, high, strict=True):
        if min(x - lo, hi - x) < 1e-2 or error > 0.5:
            fixed[name] = "on its bound" if error <= 0.5 else "not identified by these rows"
            new[name] = Fitted(section[name], None, "fixed")
        else:
            new[name] = Fitted(new[name].value, float(error * new[name].value), "fitted")
    error = np.abs(np.expm1(log_ratio(found.x)))
    what = "2to4" if kernel else "narrow_weights"
    accuracy = {**section.accuracy, f"mape_{what}": float(error.mean()), f"median_{what}": float(np.median(error))}
    return replace(section, constants=MappingProxyType(new), accuracy=MappingProxyType(accuracy)), fixed
