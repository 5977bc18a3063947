"""Calibration of elementwise operators: floor, bandwidth share, L2 gain by class, and the L2 share, from measured times.

Use :func:`fit_elementwise` with bytes, class and seconds of each row; :func:`layer_bytes` gives the bytes of the operators a layerwise
profile lists. A class without rows keeps its default and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from simulator.hardware.constants import CLASSES
from simulator.hardware.constants import ELEMENTWISE_CONSTANTS as CONSTANTS
from simulator.hardware.profile import Fitted, Interval, Provenance, Section
from simulator.kernels.elementwise import Residual, class_code, elementwise_core

F = NDArray[np.float64]

ROBUST = 0.05
SPREAD = 0.7
"""Log spread of a class's constants round those of all classes."""
ENOUGH = 20
"""Rows a class needs for an interval of its own."""
SMOOTH = 0.1
"""Weight of the squared second differences of the residual over its nodes, chosen on seeds 10-19 of :func:`score`."""

OPERATORS: Mapping[str, str] = {
    "layernorm": "norm",
    "final_layernorm": "final_norm",
    "rotary_emb": "rotary",
    "act_fn": "activation",
    "embedding": "embedding",
}
"""Class of each operator name of a layerwise profile (vLLM)."""


def layer_bytes(operator: str, tokens: F, hidden: int, inner: int, kv_width: int, element_bytes: float = 2.0) -> F:
    """Bytes an operator of a decoder layer reads and writes.

    Parameters
    ----------
    operator : str
        A key of :data:`OPERATORS`. Norms are fused with the residual sum: two tensors read, two written. Rotary works in place.
    tokens : float64 array
    hidden, inner, kv_width : int
        Widths of the residual stream (also of the queries), of the MLP, and of keys.
    element_bytes : float, bytes

    Returns
    -------
    float64 array, bytes

    Examples
    --------
    >>> float(layer_bytes("act_fn", np.array(2.0), 4096, 14336, 1024))
    172032.0
    """
    width = {
        "layernorm": 4 * hidden,
        "final_layernorm": 4 * hidden,
        "rotary_emb": 2 * (hidden + kv_width),
        "act_fn": 3 * inner,
        "embedding": 2 * hidden,
    }[operator]
    return np.asarray(tokens * width * element_bytes)


@dataclass(frozen=True)
class ElementwiseFit:
    """What a section of a profile holds, and what a report needs; see :class:`calibration.fit.attention.AttentionFit`."""

    constants: Mapping[str, Fitted]
    arrays: Mapping[str, NDArray[Any]]
    intervals: tuple[Interval, ...]
    accuracy: Mapping[str, float]
    fixed: Mapping[str, str]
    rows: int

    @property
    def values(self) -> dict[str, float]:
        """Values of the constants by name."""
        return {name: constant.value for name, constant in self.constants.items()}

    def section(self, provenance: Provenance | None = None) -> Section:
        """The ``elementwise`` section of a profile."""
        return Section(self.constants, self.arrays, self.intervals, self.accuracy, provenance, "calibrated")


def _common(
    bytes_: F, code: NDArray[np.intp], log_time: F, l2_bytes: float, bandwidth: float, values: Mapping[str, float]
) -> dict[str, float]:
    """Values with the floors, bandwidth shares, L2 gains and L2 share of all classes each scaled by one factor that fits best."""

    def scaled(x: F) -> dict[str, float]:
        factor = dict(zip(("t0", "e", "l2", "l2_share"), np.exp(x).tolist(), strict=True))
        moved = {
            name: v * factor[name if name == "l2_share" else name.split("_")[0]]
            for name, v in values.items()
            if name != "spread"
        }
        return {name: float(np.clip(v, CONSTANTS[name].low, CONSTANTS[name].high)) for name, v in moved.items()}

    def misfit(x: F) -> F:
        core = elementwise_core(bytes_, code, l2_bytes, bandwidth, {**values, **scaled(x)})
        return np.concatenate([np.log(core) - log_time, ROBUST * x])

    return scaled(least_squares(misfit, np.zeros(4), bounds=(-4.0, 4.0), loss="soft_l1", f_scale=ROBUST).x)


def _constants(
    bytes_: F, code: NDArray[np.intp], seconds: F, l2_bytes: float, bandwidth: float, architecture: str
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    values = {name: constant.default(architecture) for name, constant in CONSTANTS.items()}
    present = [name for i, name in enumerate(CLASSES) if np.any(code == i)]
    fixed = {
        name: "no rows of its class"
        for name in CONSTANTS
        if not any(name in (f"t0_{p}_s", f"e_{p}", f"l2_{p}") for p in present)
    }
    fixed.pop("l2_share")
    fixed["spread"] = "replaced by the intervals"
    log_time = np.log(seconds)

    values |= _common(bytes_, code, log_time, l2_bytes, bandwidth, values)
    start = dict(values)

    def residual(x: F, free: list[str]) -> F:
        trial = {**values, **dict(zip(free, np.exp(x).tolist(), strict=True))}
        misfit = np.log(elementwise_core(bytes_, code, l2_bytes, bandwidth, trial)) - log_time
        # what the classes have in common is a prior worth one row: a class of three rows must not run away
        return np.concatenate([misfit, ROBUST / SPREAD * (x - np.log([start[name] for name in free]))])

    while True:
        free = [name for name in CONSTANTS if name not in fixed]
        low, high = (np.log([getattr(CONSTANTS[n], side) for n in free]) for side in ("low", "high"))
        first = np.clip(np.log([values[n] for n in free]), low + 1e-3, high - 1e-3)
        found = least_squares(
            residual, first, bounds=(low, high), loss="soft_l1", f_scale=ROBUST, args=(free,), max_nfev=100
        )
        values.update(zip(free, np.exp(found.x).tolist(), strict=True))
        stuck = {
            n: side
            for n, v, lo, hi in zip(free, found.x, low, high, strict=True)
            for side in ("lower", "upper")
            if abs(v - (lo if side == "lower" else hi)) < 0.01
        }
        if not stuck:
            break
        for name, side in stuck.items():
            values[name] = CONSTANTS[name].low if side == "lower" else CONSTANTS[name].high
            fixed[name] = f"on its {side} bound"
    jac = np.stack(
        [(residual(found.x + 1e-4 * e, free) - residual(found.x - 1e-4 * e, free)) / 2e-4 for e in np.eye(len(free))],
        axis=1,
    )
    scale = float(np.sum(np.minimum(found.fun**2, (3 * ROBUST) ** 2)) / max(len(seconds) - len(free), 1))
    sigma = np.sqrt(np.maximum(np.diag(np.linalg.pinv(jac.T @ jac)) * scale, 0.0))
    return values, dict(zip(free, sigma.tolist(), strict=True)), fixed


def _residual(bytes_: F, code: NDArray[np.intp], log_ratio: F) -> Residual:
    """Residual over log2 bytes by class, nodes an octave apart: penalised least squares, second differences small."""
    place = np.log2(bytes_)
    start = float(np.floor(place.min()))
    size = int(np.ceil(place.max() - start)) + 1
    values = np.zeros((len(CLASSES), size))
    difference = np.diff(np.eye(size), 2, axis=0) if size > 2 else np.zeros((0, size))
    penalty = SMOOTH * difference.T @ difference + 0.1 * np.eye(size)
    for i in range(len(CLASSES)):
        mine = code == i
        if not mine.any():
            continue
        x = place[mine] - start
        low = np.minimum(x.astype(np.intp), max(size - 2, 0))
        matrix = np.zeros((len(x), size))
        rows = np.arange(len(x))
        matrix[rows, low] += 1.0 - (x - low)
        matrix[rows, np.minimum(low + 1, size - 1)] += x - low
        weight = np.ones(len(x))
        for _ in range(3):
            values[i] = np.linalg.solve(
                (matrix * weight[:, None]).T @ matrix + penalty, (matrix * weight[:, None]).T @ log_ratio[mine]
            )
            weight = 1.0 / np.sqrt(1.0 + ((log_ratio[mine] - matrix @ values[i]) / ROBUST) ** 2)
    return Residual(start, values)


def fit_elementwise(
    bytes_: F,
    operator_class: Any,
    seconds: F,
    l2_bytes: float,
    bandwidth_bytes_per_s: float,
    architecture: str,
    *,
    folds: int = 5,
    seed: int = 0,
    level: float = 0.9,
) -> ElementwiseFit:
    """Fit the elementwise section of one device.

    Parameters
    ----------
    bytes_, seconds : float64 arrays, bytes and s
        Bytes read and written, and time, of each row.
    operator_class : int array or array of str
        Index into :data:`simulator.kernels.elementwise.CLASSES`, or names of classes or roles.
    l2_bytes, bandwidth_bytes_per_s : float
        Of the datasheet.
    architecture : str
        For defaults.
    folds, seed, level
        Of the split-conformal intervals, one a class; a fold leaves out sizes, not rows.

    Returns
    -------
    ElementwiseFit

    Raises
    ------
    ValueError
        With fewer than 20 usable rows (finite, positive, and not twice as fast as L2 could be).
    """
    code = np.asarray(operator_class)
    code = class_code(code) if code.dtype.kind in "US" else code.astype(np.intp)
    good = (
        np.isfinite(seconds)
        & (seconds > 0)
        & np.isfinite(bytes_)
        & (bytes_ > 0)
        & (seconds > bytes_ / (20.0 * bandwidth_bytes_per_s))
    )
    bytes_, code, seconds = bytes_[good], code[good], seconds[good]
    if len(seconds) < 20:
        raise ValueError(f"elementwise: expected at least 20 usable rows, got {len(seconds)} of {len(good)}")

    def both(rows: NDArray[np.bool_]) -> tuple[dict[str, float], dict[str, float], dict[str, str], Residual]:
        values, errors, fixed = _constants(
            bytes_[rows], code[rows], seconds[rows], l2_bytes, bandwidth_bytes_per_s, architecture
        )
        core = elementwise_core(bytes_[rows], code[rows], l2_bytes, bandwidth_bytes_per_s, values)
        return values, errors, fixed, _residual(bytes_[rows], code[rows], np.log(seconds[rows] / core))

    values, errors, fixed, residual = both(np.ones(len(seconds), dtype=bool))
    size = np.unique(bytes_, return_inverse=True)[1].reshape(-1)
    fold = np.random.default_rng(seed).permutation(size.max() + 1)[size] % folds
    log_ratio = np.zeros(len(seconds))
    for f in range(folds):
        out = fold == f
        v, _, _, part = both(~out)
        core = elementwise_core(bytes_[out], code[out], l2_bytes, bandwidth_bytes_per_s, v)
        log_ratio[out] = np.log(seconds[out] / core) - part(bytes_[out], code[out])
    intervals = []
    tail = 0.5 * (1.0 - level)
    for i, name in enumerate(CLASSES):
        rows = int((code == i).sum())
        if not rows:
            continue
        mine = (
            log_ratio[code == i] if rows >= ENOUGH else log_ratio
        )  # too few of its own: as wide as all classes together
        low = np.quantile(mine, max(tail - tail / len(mine), 0.0), method="lower")
        high = np.quantile(mine, min(1.0 - tail + (1.0 - tail) / len(mine), 1.0), method="higher")
        intervals.append(Interval(name, float(np.exp(low)), float(np.exp(high)), level, rows))
    error = np.abs(np.expm1(-log_ratio))
    long = seconds > 1e-5
    accuracy = {"mape": float(error.mean()), "median": float(np.median(error)), "p95": float(np.quantile(error, 0.95))}
    if long.any():
        accuracy["mape_over_10us"] = float(error[long].mean())
    constants = {
        n: Fitted(
            v,
            v * errors[n] if n in errors else None,
            "fitted" if n in errors else "default" if "no rows" in fixed[n] else "fixed",
        )
        for n, v in values.items()
    }
    return ElementwiseFit(constants, residual.arrays(), tuple(intervals), accuracy, fixed, len(seconds))


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
    """Accuracy on sizes never seen: 70 % of the sizes by seed are for the fit (``rows`` of their rows; 0 for all), the rest is scored."""
    rng = np.random.default_rng(seed)
    size = np.unique(bytes_, return_inverse=True)[1].reshape(-1)
    test = rng.permutation(size.max() + 1)[size] >= round(0.7 * (size.max() + 1))
    train = np.flatnonzero(~test)
    if rows:
        train = rng.choice(train, min(rows, len(train)), replace=False)
    fit = fit_elementwise(bytes_[train], code[train], seconds[train], l2_bytes, bandwidth, architecture, seed=seed)
    residual = Residual.from_arrays(fit.arrays)
    predicted = elementwise_core(bytes_[test], code[test], l2_bytes, bandwidth, fit.values)
    if residual is not None:
        predicted = predicted * np.exp(residual(bytes_[test], code[test]))
    error = np.abs(predicted / seconds[test] - 1.0)
    bands = {CLASSES.index(i.regime): (i.low, i.high) for i in fit.intervals}
    low, high = (np.array([bands.get(int(k), (0.5, 2.0))[side] for k in code[test]]) for side in (0, 1))
    inside = (seconds[test] >= predicted * low) & (seconds[test] <= predicted * high)
    long = seconds[test] > 1e-5
    return {
        "mape": float(error.mean()),
        "mape_over_10us": float(error[long].mean()),
        "p95": float(np.quantile(error, 0.95)),
        "coverage": float(inside.mean()),
    }
