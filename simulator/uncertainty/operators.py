"""Predicted times of operators with prediction intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import flag, instance
from simulator.arrays import Array, FloatArray
from simulator.display import Displayed, as_plain
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.operators import gemm
from simulator.operators.base import BOTTLENECKS, Estimate
from simulator.operators.gemm import Options
from simulator.uncertainty.factors import (
    COVERAGE_FACTOR,
    Uncertainty,
    error_scales,
    level_scale,
    uncertainty_of,
)
from simulator.units import seconds, seconds_between


@dataclass(frozen=True, repr=False)
class OperatorTimes(Displayed):
    """Times of operators, arrays of one shape, s. ``bottleneck`` holds codes, indices into
    :data:`simulator.operators.base.BOTTLENECKS`; ``bottlenecks`` their names."""

    seconds: FloatArray  # predicted kernel time, launch overhead inside a CUDA graph included
    lower: FloatArray  # prediction interval at the requested level
    upper: FloatArray
    roofline_s: FloatArray  # max(FLOP / datasheet peak, bytes / datasheet bandwidth)
    bottleneck: Array  # int8
    # choices of the cost model
    details: Mapping[str, Array] = field(default_factory=dict, kw_only=True, repr=False)

    @property
    def bottlenecks(self) -> NDArray[np.str_]:
        """Names of the bottlenecks."""
        out: NDArray[np.str_] = np.array(BOTTLENECKS)[self.bottleneck]
        return out

    def _title(self) -> str:
        times = self.seconds
        many = np.size(self.seconds)
        if many != 1:
            ends = (
                f", {seconds(float(times.min()))} to {seconds(float(times.max()))}" if many else ""
            )
            return f"{' x '.join(map(str, times.shape))} times{ends}"
        one = seconds_between(times.item(), self.lower.item(), self.upper.item())
        return f"{one}, {self.bottlenecks.item()}-bound"

    def _columns(self) -> Mapping[str, Any]:
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        columns = named | {"bottleneck": self.bottlenecks} | dict(self.details)
        return {
            name: np.ravel(values)
            for name, values in columns.items()
            if np.shape(values) == self.seconds.shape
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the arrays as lists, s, bottlenecks by their names."""
        return super().to_dict() | dict(as_plain({"bottleneck": self.bottlenecks, **self.details}))


TIMES = ("seconds", "lower", "upper", "roofline_s", "bottleneck")
"""Arrays of :class:`OperatorTimes`."""


def predicted(
    e: Estimate, hw: HardwareProfile, level: float = 0.9
) -> tuple[OperatorTimes, Uncertainty]:
    """Return times with prediction intervals, at least the floor, from an estimate, and the errors
    of the times."""
    scale = level_scale(level)
    time = np.maximum(e.time, e.floor)
    uncertainty = uncertainty_of(e, error_scales(e, hw))
    width = np.exp(COVERAGE_FACTOR * scale * np.sqrt(uncertainty.variance))
    width = width.astype(time.dtype).reshape(time.shape)
    times = OperatorTimes(
        _in_seconds(e, time),
        _in_seconds(e, np.maximum(time / width, e.floor)),
        _in_seconds(e, time * width),
        _in_seconds(e, e.roofline),
        e.bottleneck,
        details=e.details,
    )
    if e.measured is not None:
        rows = e.measured.rows
        known = e.measured.seconds
        width = np.exp(e.measured.log_half * scale)
        times.seconds[rows], times.lower[rows] = known, known / width
        times.upper[rows] = known * width
    return times, uncertainty


def most_likely(e: Estimate, hw: HardwareProfile) -> tuple[FloatArray, Uncertainty]:
    """Return the times of :func:`predicted` without intervals, s, and their errors."""
    seconds = _in_seconds(e, np.maximum(e.time, e.floor))
    if e.measured is not None:
        seconds[e.measured.rows] = e.measured.seconds
    return seconds, uncertainty_of(e, error_scales(e, hw))


def _in_seconds(e: Estimate, values: Array) -> FloatArray:
    return values if e.unit_s == 1.0 else e.unit_s * values.astype(np.float64)


def empty_times(size: int) -> dict[str, Any]:
    """Return :data:`TIMES` of ``size`` operators, zeros."""
    return {
        name: np.zeros(size, dtype=np.int8 if name == "bottleneck" else np.float64)
        for name in TIMES
    }


def operator_time(e: Estimate, hw: HardwareProfile, level: float = 0.9) -> OperatorTimes:
    return predicted(e, hw, level)[0]


def gemm_predicted(
    m: Any,
    n: Any,
    k: Any,
    hw: HardwareProfile,
    options: Options,
    level: float = 0.9,
    *,
    detail: bool = False,
) -> tuple[OperatorTimes, list[tuple[Any, Uncertainty]]]:
    """Return times of GEMMs, and the errors of chunks of flat rows, which fit the processor's
    cache."""
    shape, chunks = gemm.estimates(m, n, k, hw, options, steps=detail)
    size = int(np.prod(shape))
    columns = empty_times(size)
    details: dict[str, Array] = {}
    errors = []
    for rows, e in chunks:
        times, uncertainty = predicted(e, hw, level)
        errors.append((rows, uncertainty))
        for name in TIMES:
            columns[name][rows] = getattr(times, name)
        of_chunk = gemm_steps_of(times) if detail else dict(times.details)
        of_chunk["measured"] = (
            np.zeros(len(times.seconds), dtype=bool) if e.measured is None else e.measured.rows
        )
        for name, values in of_chunk.items():
            details.setdefault(name, np.zeros(size, dtype=values.dtype))[rows] = values
    shaped: dict[str, Any] = {name: values.reshape(shape) for name, values in columns.items()}
    return OperatorTimes(
        **shaped, details={name: v.reshape(shape) for name, v in details.items()}
    ), errors


@dataclass(frozen=True)
class GemmOptions:
    """Rarely used options of :func:`simulator.gemm_time`.

    Parameters
    ----------
    level : float
        Level of the prediction interval, in (0, 1).
    copies : int or array, optional
        Weights that a benchmark uses in turn: their footprint decides how warm they are. 1: one
        weight, as warm as L2 allows. Default: weights come from DRAM, as in a decoder.
    density : float or array
        Share of weights that are not zero, in [0, 1]; only the kernel ``spmv`` gains by it beyond
        its format.
    block : int or array
        Features of the groups that are skipped; 0: wide groups.
    detail : bool
        Whether to fill ``details``: the chosen tile (``tile_m``, ``tile_n``), ``split_k``,
        ``waves``, the analytical parts ``compute_s``, ``memory_s`` and ``fixed_s``, the factor
        ``residual``, and the steps of the waterfall.

    Examples
    --------
    >>> from simulator import GemmOptions, gemm_time
    >>> gemm_time(8, 4096, 4096, "a100", options=GemmOptions(detail=True)).details["tile_m"].item()
    64.0
    """

    level: float = 0.9
    copies: Any = None
    density: Any = 1.0
    block: Any = 0
    detail: bool = False


def gemm_time(
    m: Any,
    n: Any,
    k: Any,
    hw: str | HardwareProfile,
    *,
    dtype: str = "bf16",
    weight_dtype: str | None = None,
    kernel: Any = "dense",
    options: GemmOptions = GemmOptions(),
) -> OperatorTimes:
    """Return the time of y[m, n] = x[m, k] w[k, n]; arrays broadcast.

    Parameters
    ----------
    m, n, k : int or array
        Tokens, output features, input features; at least 1.
    hw : str or HardwareProfile
        The device: a name, or a profile.
    dtype, weight_dtype : str
        Number format of activations and arithmetic, and of stored weights (default: the same). A
        narrower weight format means a weight-only quantised kernel.
    kernel : str or array
        ``dense``, ``sparse24`` (2:4), ``unstructured`` (scattered zeros, timed as dense),
        ``block_sparse`` (tiles of tokens are skipped), ``groups_n`` or ``groups_k`` (groups of
        outputs or of inputs are skipped; m, n, k count what is computed), ``spmv`` (scattered zeros
        are stored away; m of 1 only).
    options : GemmOptions
        Level of the interval, warm weights, density, blocks, details.

    Returns
    -------
    OperatorTimes
        ``seconds``, ``lower``, ``upper``, ``roofline_s``, s, and ``bottleneck``, arrays of the
        broadcast shape; ``details["measured"]`` marks shapes that the profile has measured.

    Raises
    ------
    InputError
        For a number format that the device lacks, sizes that are no whole numbers from 1 up, an
        unknown kernel, or a level outside (0, 1).

    Examples
    --------
    >>> from simulator import gemm_time
    >>> t = gemm_time([1, 2048], 4096, 4096, "a100")
    >>> t.bottlenecks.tolist(), bool((t.lower < t.seconds).all())
    (['memory', 'compute'], True)
    """
    instance("options", options, GemmOptions, "simulator.GemmOptions")
    how = Options(dtype, weight_dtype, kernel, options.copies, options.density, options.block)
    return gemm_predicted(
        m, n, k, load_hardware(hw), how, options.level, detail=flag("detail", options.detail)
    )[0]


def gemm_steps_of(times: OperatorTimes) -> dict[str, Array]:
    """Return the details of times of GEMMs, with all of :data:`STEPS`."""
    details = times.details
    fixed = np.minimum(details["fixed_s"] * details["residual"], times.seconds)
    return {
        **details,
        "roofline": times.roofline_s,
        "kernel": times.seconds - fixed,
        "launch": times.seconds,
    }


STEPS = ("roofline", "tile", "wave", "alignment", "kernel", "launch")
"""Steps of a GEMM's time, cumulative: max(FLOP / peak, bytes / bandwidth), padding of the chosen
tile, idle SMs of the last wave, n or k off 16 bytes, everything except the fixed time, the whole
time."""
