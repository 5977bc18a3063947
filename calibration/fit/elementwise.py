"""Calibration of elementwise operators: floor, bandwidth share, L2 gain by class, and the L2 share, from measured
times.

Use :func:`fit_elementwise` with bytes, class and seconds of each row. A class without rows keeps its default and says
so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit import solver
from calibration.fit.conformal import accuracy_of, outer_bands
from calibration.fit.residual import Stiffness, fit_lattice
from calibration.fit.solver import ConstantsFit, FittedPart, Minimum, Table
from simulator.hardware.constants import CLASSES
from simulator.hardware.constants import ELEMENTWISE_CONSTANTS as CONSTANTS
from simulator.hardware.profile import Provenance, Section
from simulator.kernels.elementwise import class_code, class_lattice, class_place, elementwise_core
from simulator.kernels.lattice import Lattice

F = NDArray[np.float64]

SPREAD = 0.7
"""Log spread of a class's constants round those of all classes."""
STIFFNESS = Stiffness(0.0, (0.0, 0.1), 0.1)
"""Of the residual along (class, log2 bytes): nothing joins two classes; chosen on seeds 10-19 of :func:`score`."""
FOLDS = 5
FACTORS = ("t0", "e", "l2", "l2_share")
"""Kinds of constants, by the beginning of their names."""


@dataclass(frozen=True)
class _Rows(Table):
    """Measured operators of one device, and its datasheet."""

    bytes_: F
    code: NDArray[np.intp]
    seconds: F
    l2_bytes: float
    bandwidth: float

    def misfit(self, values: Mapping[str, float]) -> F:
        """Log of core over measured time."""
        core, *_ = elementwise_core(self.bytes_, self.code, self.l2_bytes, self.bandwidth, values)
        return np.asarray(np.log(core) - np.log(self.seconds))

    def constants(self, architecture: str) -> ConstantsFit:
        default = {name: constant.default(architecture) for name, constant in CONSTANTS.items()}

        def scaled(factor: Mapping[str, float]) -> dict[str, float]:
            """The constants of all classes, each kind times one factor."""
            moved = {}
            for name in CONSTANTS.keys() - {"spread"}:
                kind = name if name in FACTORS else name.split("_")[0]
                moved[name] = float(np.clip(default[name] * factor[kind], CONSTANTS[name].low, CONSTANTS[name].high))
            return moved

        one = dict.fromkeys(FACTORS, 1.0)
        wide = dict.fromkeys(FACTORS, SimpleNamespace(low=np.exp(-4.0), high=np.exp(4.0)))
        common = solver.minimise(lambda x: self.misfit({**default, **scaled(x)}), one, wide, FACTORS, prior=1.0).values
        start = {**default, **scaled(common)}

        def covariance(found: Minimum, values: Mapping[str, float]) -> tuple[F, float]:
            raw = solver.slopes(self.misfit, values, found.names, 1e-4)
            every = np.concatenate([raw, solver.HUBER / SPREAD * np.eye(len(found.names))])
            freedom = max(len(self) - len(found.names), 1)
            spread = float(np.sqrt(np.sum(np.minimum(found.rows**2, (3 * solver.HUBER) ** 2)) / freedom))
            return solver.gauss_newton(every, spread), spread

        known = [name for i, name in enumerate(CLASSES) if np.any(self.code == i)]
        own = {f"{kind}_{name}" for name in known for kind in ("t0", "e", "l2")}
        fixed = {n: solver.ABSENT for n in CONSTANTS if n.removesuffix("_s") not in {*own, "l2_share"}}
        fixed["spread"] = "replaced by the intervals"
        # what the classes have in common is a prior worth one row: a class of three rows must not run away
        search: dict[str, Any] = {"prior": SPREAD, "center": start, "max_nfev": 100}
        return solver.fit_logs(self.misfit, start, CONSTANTS, covariance, fixed=fixed, **search)

    def residual(self, values: Mapping[str, float]) -> Lattice:
        """Residual over log2 bytes by class, nodes an octave apart."""
        place = class_place(self.bytes_, self.code)
        first, last = float(np.floor(place[1].min())), float(np.ceil(place[1].max()))
        blank = np.zeros((len(CLASSES) + 1, int(last - first) + 1))  # one class more: see class_lattice
        return fit_lattice(Lattice((0.0, first), (1.0, 1.0), blank), place, -self.misfit(values), STIFFNESS, rounds=3)


def fit_elementwise(
    bytes_: F,
    operator_class: Any,
    seconds: F,
    l2_bytes: float,
    bandwidth_bytes_per_s: float,
    architecture: str,
    *,
    seed: int = 0,
    provenance: Provenance | None = None,
) -> FittedPart:
    """Fit the elementwise section of one device.

    Parameters
    ----------
    bytes_, operator_class, seconds : arrays
        Of each row: bytes read and written; index into :data:`CLASSES` or name of a class or role; time.
    l2_bytes, bandwidth_bytes_per_s, architecture
        Of the datasheet.
    seed : int
        Of the folds, which leave out sizes, not rows.
    provenance : Provenance, optional

    Raises
    ------
    ValueError
        With fewer than 20 usable rows (finite, positive, and not twice as fast as L2 could be).
    """
    code = np.asarray(operator_class)
    code = class_code(code) if code.dtype.kind in "US" else code.astype(np.intp)
    known = np.isfinite(seconds) & (seconds > 0) & np.isfinite(bytes_) & (bytes_ > 0)
    good = known & (seconds > bytes_ / (20.0 * bandwidth_bytes_per_s))
    r = _Rows(bytes_, code, seconds, l2_bytes, bandwidth_bytes_per_s).take(good)
    if len(r) < 20:
        raise ValueError(f"elementwise: expected at least 20 usable rows, got {len(r)} of {len(good)}")
    constants = r.constants(architecture)
    errors = np.zeros(len(r))
    for train, test in solver.folds(solver.numbered(r.bytes_), FOLDS, np.random.default_rng(seed)):
        rest, left = r.take(train), r.take(test)
        values = rest.constants(architecture).values
        errors[test] = left.misfit(values) + rest.residual(values)(class_place(left.bytes_, left.code))
    accuracy = accuracy_of(errors)
    del accuracy["bias"]
    long = r.seconds > 1e-5
    if long.any():
        accuracy["mape_over_10us"] = float(np.abs(np.expm1(errors[long])).mean())
    residual = r.residual(constants.values)
    section = Section(
        constants.fitted(),
        {"start": np.array(residual.start[1]), "values": residual.values[:-1]},
        tuple(i for i in outer_bands(errors, r.code, CLASSES) if i.rows),
        accuracy,
        provenance,
        "calibrated",
    )
    return FittedPart(section, constants, len(r), errors)


def score(
    bytes_: F,
    code: NDArray[np.intp],
    seconds: F,
    l2_bytes: float,
    bandwidth: float,
    architecture: str,
    rows: int,
    seed: int,
) -> Mapping[str, float]:
    """Accuracy on sizes never seen: 70 % of the sizes by seed are for the fit (``rows`` of their rows; 0 for all), the
    rest is scored."""
    rng = np.random.default_rng(seed)
    size = solver.numbered(bytes_)
    test = rng.permutation(size.max() + 1)[size] >= round(0.7 * (size.max() + 1))
    train = np.flatnonzero(~test)
    if rows:
        train = rng.choice(train, min(rows, len(train)), replace=False)
    section = fit_elementwise(
        bytes_[train], code[train], seconds[train], l2_bytes, bandwidth, architecture, seed=seed
    ).section
    values = {name: constant.value for name, constant in section.constants.items()}
    residual, place = class_lattice(section.arrays), class_place(bytes_[test], code[test])
    assert residual is not None
    core, *_ = elementwise_core(bytes_[test], code[test], l2_bytes, bandwidth, values)
    predicted = core * np.exp(residual(place))
    known = {CLASSES.index(i.regime): (i.low, i.high) for i in section.intervals}
    low, high = np.array([known.get(int(k), (0.5, 2.0)) for k in code[test]]).T
    error = np.abs(predicted / seconds[test] - 1.0)
    return {
        "mape": float(error.mean()),
        "mape_over_10us": float(error[seconds[test] > 1e-5].mean()),
        "p95": float(np.quantile(error, 0.95)),
        "coverage": float(np.mean((seconds[test] >= predicted * low) & (seconds[test] <= predicted * high))),
    }
