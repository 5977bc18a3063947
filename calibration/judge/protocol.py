"""How accuracy is judged, once for everybody (DESIGN section 10): splits by (n, k), errors on unseen pairs, speedups of neighbours,
coverage, baselines.

Use :func:`evaluate_table` for one table, seed and size of training set; :func:`average` over seeds; :func:`leave_one_out` for tables
of a few projections;
:func:`transfer` for another stack of the same device. Everything returns plain mappings of numbers; printing is the command line's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from calibration.fit.conformal import neighbours
from calibration.fit.core import Shapes, machine_of
from calibration.fit.gemm import anchor_gemm, fit_gemm
from calibration.fit.solver import FittedPart
from calibration.judge.baselines import BASELINES
from simulator.hardware.parts import Section
from simulator.hardware.profile import HardwareProfile
from simulator.kernels.gemm import GemmTime, gemm_time, with_section
from simulator.kernels.gemm_core import CoreTime

F = NDArray[np.float64]

SEEDS = (0, 1, 2)
SIZES: tuple[int | None, ...] = (100, 400, 4000, None)
TEST_SHARE = 0.3
M_RANGES: tuple[tuple[str, float, float], ...] = (("m<=16", 0, 16), ("m<=256", 16, 256), ("m>256", 256, np.inf))
LLM_WIDTHS: tuple[tuple[int, int], ...] = (
    (4096, 4096),
    (6144, 4096),
    (1024, 4096),
    (14336, 4096),
    (28672, 4096),
    (4096, 14336),
    (8192, 8192),
    (10240, 8192),
    (28672, 8192),
    (8192, 28672),
)
"""(n, k) of the projections of 7B to 70B Llama-like models, the larger ones rounded to what the tables measured."""


@dataclass(frozen=True)
class Result:
    """Scores of one method on one split.

    Attributes
    ----------
    method : str
    seed : int
    rows : int
        Training rows; 0 for methods without any.
    scores : mapping of str to float
        Percent, but for ``spearman`` and counts.
    """

    method: str
    seed: int
    rows: int
    scores: Mapping[str, float]


def split(data: Shapes, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows to train on and to test on: 30 % of the (n, k) pairs are kept unseen."""
    groups = data.groups
    count = int(groups.max()) + 1
    order = np.random.default_rng(seed).permutation(count)
    unseen = np.zeros(count, dtype=bool)
    unseen[order[: round(TEST_SHARE * count)]] = True
    return np.flatnonzero(~unseen[groups]), np.flatnonzero(unseen[groups])


def draw(rows: NDArray[np.intp], size: int | None, seed: int) -> NDArray[np.intp]:
    """``size`` of the rows at random, all for None."""
    return (
        rows
        if size is None or size >= len(rows)
        else np.sort(np.random.default_rng(seed + 100).choice(rows, size, replace=False))
    )


def errors(predicted: F, data: Shapes) -> dict[str, float]:
    """MAPE, median, 95th percentile and signed mean of the relative error, percent; MAPE by range of m."""
    error = 100.0 * (predicted / data.seconds - 1.0)
    size = np.abs(error)
    out = {"mape": size.mean(), "median": np.median(size), "p95": np.quantile(size, 0.95), "bias": error.mean()}
    for name, low, high in M_RANGES:
        rows = (data.m > low) & (data.m <= high)
        if rows.any():
            out[f"mape {name}"] = size[rows].mean()
    return {name: float(v) for name, v in out.items()}


def speedups(predicted: F, data: Shapes, pairs: NDArray[np.intp] | None = None) -> dict[str, float]:
    """Error of the speedup larger over smaller, for pairs that differ in one of m, n, k by a ratio in [0.25, 1): median, p95
    (percent), Spearman, count."""
    pairs = neighbours(data) if pairs is None else pairs
    if not len(pairs):
        return {"speedup pairs": 0.0}
    small, large = pairs[:, 0], pairs[:, 1]
    said, real = predicted[large] / predicted[small], data.seconds[large] / data.seconds[small]
    error = 100.0 * np.abs(said / real - 1.0)
    return {
        "speedup median": float(np.median(error)),
        "speedup p95": float(np.quantile(error, 0.95)),
        "speedup spearman": float(spearmanr(said, real)[0]),
        "speedup pairs": float(len(pairs)),
    }


def step_share(predicted: F, data: Shapes, fit_parts: CoreTime) -> dict[str, float]:
    """Of the worst twentieth of speedup pairs, the percentage whose two shapes the model gives different tiles or split-K; and that
    share among all pairs."""
    pairs = neighbours(data)
    small, large = pairs[:, 0], pairs[:, 1]
    error = np.abs(np.log(predicted[large] / predicted[small] * data.seconds[small] / data.seconds[large]))
    other = (fit_parts.tile[small] != fit_parts.tile[large]) | (fit_parts.split[small] != fit_parts.split[large])
    worst = error >= np.quantile(error, 0.95)
    return {"kernel steps in p95": float(100 * other[worst].mean()), "kernel steps in all": float(100 * other.mean())}


def coverage(time: GemmTime, data: Shapes) -> dict[str, float]:
    """Percentage of measured times within their interval and its mean width in percent of the prediction, all and by range of m;
    lowest regime."""
    inside = (data.seconds >= time.lower) & (data.seconds <= time.upper)
    width = 100.0 * (time.upper - time.lower) / time.seconds
    out = {"coverage": 100.0 * inside.mean(), "width": width.mean()}
    for name, low, high in M_RANGES:
        rows = (data.m > low) & (data.m <= high)
        if rows.any():
            out[f"coverage {name}"], out[f"width {name}"] = 100.0 * inside[rows].mean(), width[rows].mean()
    out["lowest coverage"] = min(v for name, v in out.items() if name.startswith("coverage"))
    return {name: float(v) for name, v in out.items()}


def llm_pairs(data: Shapes, near: float = 0.26) -> NDArray[np.intp]:
    """Pairs shaped like pruning: (n, k) within ``near`` octaves of a projection of an LLM and half or a quarter of its n or k, or
    three quarters or half of m."""
    logs = np.log2(np.stack([data.n, data.k], axis=1))
    close = np.zeros(len(data), dtype=bool)
    for n, k in LLM_WIDTHS:
        close |= np.abs(logs - np.log2([n, k])).max(axis=1) <= near
    pairs = neighbours(data)
    small, large = pairs[:, 0], pairs[:, 1]
    keep = np.zeros(len(pairs), dtype=bool)
    for column, ratios in ((data.n, (0.5, 0.25)), (data.k, (0.5, 0.25)), (data.m, (0.75, 0.5))):
        ratio = column[small] / column[large]
        keep |= np.isin(ratio, ratios)
    return pairs[keep & close[large]]


def predict(section: Section, data: Shapes, hw: HardwareProfile, dtype: str) -> GemmTime:
    """Times of measured shapes under their own protocol (warm or cold weights)."""
    copies = None if np.isinf(data.copies).all() else data.copies
    return gemm_time(data.m, data.n, data.k, with_section(hw, dtype, section), dtype=dtype, copies=copies)


def judge(section: Section, data: Shapes, hw: HardwareProfile, dtype: str) -> dict[str, float]:
    """All scores of a section on shapes it did not see."""
    time = predict(section, data, hw, dtype)
    scores = {**errors(time.seconds, data), **speedups(time.seconds, data), **coverage(time, data)}
    pairs = llm_pairs(data)
    if len(pairs):
        for name, low, high in (("", 0.0, np.inf), *M_RANGES):
            rows = pairs[(data.m[pairs[:, 1]] > low) & (data.m[pairs[:, 1]] <= high)]
            if len(rows):
                found = speedups(time.seconds, data, rows)
                scores |= {f"llm {key[8:]} {name}".strip(): v for key, v in found.items() if key != "speedup spearman"}
    return scores


def evaluate_table(
    data: Shapes,
    hw: HardwareProfile,
    *,
    dtype: str = "bf16",
    size: int | None = 400,
    seed: int = 0,
    prior: Section | None = None,
    fit: Callable[..., FittedPart] = fit_gemm,
) -> Result:
    """Fit on ``size`` rows of the training pairs and judge on every row of the others.

    Parameters
    ----------
    data : Shapes
    hw : HardwareProfile
    dtype : str
    size : int, optional
        Training rows; None: all.
    seed : int
    prior : Section, optional
        Of a sibling or another stack.
    fit : callable
        As :func:`calibration.fit.gemm.fit_gemm`.

    Returns
    -------
    Result
    """
    train, test = split(data, seed)
    own = data.take(draw(train, size, seed))
    found = fit(own.m, own.n, own.k, own.seconds, hw, dtype=dtype, copies=own.copies, prior=prior, seed=seed)
    return Result(
        "prunesim" if prior is None else "prunesim + prior",
        seed,
        len(own),
        judge(found.section, data.take(test), hw, dtype),
    )


def evaluate_baselines(
    data: Shapes,
    hw: HardwareProfile,
    *,
    dtype: str = "bf16",
    size: int | None = 400,
    seed: int = 0,
    names: Sequence[str] = tuple(BASELINES),
) -> list[Result]:
    """The baselines on the same rows."""
    machine = machine_of(hw, dtype)
    train, test = split(data, seed)
    own, unseen = data.take(draw(train, size, seed)), data.take(test)
    out = []
    for name in names:
        predicted = BASELINES[name](own, machine, unseen)
        out.append(Result(name, seed, len(own), {**errors(predicted, unseen), **speedups(predicted, unseen)}))
    return out


def transfer(
    section: Section,
    data: Shapes,
    hw: HardwareProfile,
    *,
    dtype: str = "bf16",
    sizes: Sequence[int] = (20, 100, 400),
    seed: int = 0,
) -> list[Result]:
    """A section on another stack's table: as shipped, and re-anchored on some shapes; judged on unseen (n, k) pairs."""
    train, test = split(data, seed)
    unseen = data.take(test)
    out = [Result("as shipped", seed, 0, judge(section, unseen, hw, dtype))]
    for size in sizes:
        own = data.take(draw(train, size, seed))
        moved = anchor_gemm(section, own.m, own.n, own.k, own.seconds, hw, dtype=dtype, copies=own.copies)
        out.append(Result("re-anchored", seed, len(own), judge(moved.section, unseen, hw, dtype)))
    return out


def leave_one_out(
    data: Shapes, labels: NDArray[Any], hw: HardwareProfile, *, dtype: str = "bf16", prior: Section | None = None
) -> list[Result]:
    """For a table of a few projections: fit on all but one, judge on it. ``method`` names the one left out; the last result, "all",
    pools their rows."""
    out = []
    times: list[GemmTime] = []
    tests: list[Shapes] = []
    for i, label in enumerate(np.unique(labels)):
        train, test = data.take(labels != label), data.take(labels == label)
        found = fit_gemm(train.m, train.n, train.k, train.seconds, hw, dtype=dtype, copies=train.copies, prior=prior)
        out.append(Result(str(label), i, len(train), judge(found.section, test, hw, dtype)))
        times.append(predict(found.section, test, hw, dtype))
        tests.append(test)
    pooled = Shapes(
        *(np.concatenate([getattr(t, name) for t in tests]) for name in ("m", "n", "k", "seconds", "copies"))
    )
    time = GemmTime(
        *(
            np.concatenate([getattr(t, name) for t in times])
            for name in ("seconds", "lower", "upper", "roofline_s", "bound")
        )
    )
    own = np.concatenate([np.full(len(t), i) for i, t in enumerate(tests)])
    pairs = neighbours(pooled)
    pairs = pairs[own[pairs[:, 0]] == own[pairs[:, 1]]]
    scores = {**errors(time.seconds, pooled), **speedups(time.seconds, pooled, pairs), **coverage(time, pooled)}
    return [*out, Result("all", len(out), len(data), scores)]


def average(results: Sequence[Result]) -> dict[str, float]:
    """Mean of every score over results (seeds)."""
    names = [name for name in results[0].scores if all(name in r.scores for r in results)]
    return {name: float(np.mean([r.scores[name] for r in results])) for name in names}
