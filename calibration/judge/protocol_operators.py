"""How accurate attention and elementwise times are on shapes the fit never saw: the protocol, for one table and seed.

Of the groups of rows 70 % by seed are for the fit (``rows`` of their rows; 0 for all), every row of the rest is scored,
in percent: errors, speedups, and what share of the times the 90 % interval holds. Report seeds 0, 1, 2; structure and
smoothing were chosen on seeds from 10 on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibration.fit.attention import MeasuredCalls, fit_attention
from calibration.fit.conformal import pairs_along
from calibration.fit.elementwise import Moves, fit_elementwise
from calibration.fit.solver import numbered
from calibration.judge import scores
from simulator.hardware.constants import CLASSES
from simulator.kernels.attention import REGIMES
from simulator.kernels.lattice import Lattice

F = NDArray[np.float64]

QUESTIONS: tuple[str, ...] = ("heads", "lengths")
"""What an attention fit has not seen: pairs of heads and KV heads, or query lengths of prefill, cache lengths of
decode."""

TABLES: tuple[tuple[str, str, str], ...] = (
    ("prefill", "a100_sxm_80gb", "a100_sxm/attention_prefill/trtllm"),
    ("prefill", "h100_sxm", "h100_sxm/attention_prefill/sglang"),
    ("decode", "a100_sxm_80gb", "a100_sxm/attention_decode/sglang"),
    ("decode", "h100_sxm", "h100_sxm/attention_decode/sglang"),
)
"""Phase, profile and attention table of the accuracy bars: one collection and kernel path each."""


def parted(group: NDArray[np.intp], rows: int, seed: int) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Rows for the fit, and which rows are scored."""
    rng = np.random.default_rng(seed)
    test = rng.permutation(group.max() + 1)[group] >= round(0.7 * (group.max() + 1))
    train = np.flatnonzero(~test)
    return rng.choice(train, min(rows, len(train)), replace=False) if rows else train, test


def comparable(c: MeasuredCalls, question: str) -> NDArray[np.intp]:
    """Pairs (smaller, larger) of rows that differ in one thing only, by a ratio in [0.25, 1): KV groups with their
    query heads ("heads"), or the length ("lengths")."""
    if question == "heads":
        return pairs_along(c.kv_heads, [c.batch, c.q_len, c.kv_len, c.heads / c.kv_heads, c.head_dim])
    return pairs_along(c.length, [c.batch, c.heads, c.kv_heads, c.head_dim])


def score_attention(calls: MeasuredCalls, architecture: str, question: str, rows: int, seed: int) -> dict[str, float]:
    """Scores of one fit; "roofline" is the MAPE of the datasheet's, "width" the geometric full one of the interval."""
    c = calls.usable()[0]
    train, test = parted(c.groups(question), rows, seed)
    fit = fit_attention(c.take(train), architecture, fold_by=(question,), seed=seed)
    unseen = c.take(test)
    predicted, regime = unseen.predict(fit.constants.values, Lattice.from_arrays(fit.section.arrays))
    low, high = (np.array([getattr(i, side) for i in fit.section.intervals])[regime] for side in ("low", "high"))
    inside = (unseen.seconds >= predicted * low) & (unseen.seconds <= predicted * high)
    ratios = scores.speedups(predicted, unseen.seconds, comparable(unseen, question))
    held = {f"coverage {name}": inside[regime == i].mean() for i, name in enumerate(REGIMES) if (regime == i).any()}
    found = {
        **scores.errors(predicted, unseen.seconds),
        "roofline": scores.errors(roofline(unseen), unseen.seconds)["mape"],
        "speedup median": ratios.get("median", float("nan")),
        "speedup p95": ratios.get("p95", float("nan")),
        "coverage": inside.mean(),
        "width": 2.0 * (np.exp(np.mean(0.5 * np.log(high / low))) - 1.0),
        **held,
        "lowest coverage": min(held.values()),
    }
    return {name: 100.0 * float(value) for name, value in found.items()}


def roofline(c: MeasuredCalls) -> F:
    """Datasheet roofline of measured rows, s."""
    work = c.work({"packs": 0.0})
    moved_s = work.moved_bytes / c.device.bandwidth_bytes_per_s
    return np.asarray(np.maximum(work.flops / c.device.peak_flop_per_s, moved_s))


def score_elementwise(moves: Moves, rows: int, seed: int) -> dict[str, float]:
    """Scores of one fit on sizes never seen."""
    train, test = parted(numbered(moves.bytes_), rows, seed)
    section, unseen = fit_elementwise(moves.take(train), seed=seed).section, moves.take(test)
    predicted = unseen.predict(section)
    known = {CLASSES.index(i.regime): (i.low, i.high) for i in section.intervals}
    low, high = np.array([known.get(int(k), (0.5, 2.0)) for k in unseen.code]).T
    error = np.abs(predicted / unseen.seconds - 1.0)
    found = {
        "mape": error.mean(),
        "mape over 10us": error[unseen.seconds > 1e-5].mean(),
        "p95": np.quantile(error, 0.95),
        "coverage": np.mean((unseen.seconds >= predicted * low) & (unseen.seconds <= predicted * high)),
    }
    return {name: 100.0 * float(value) for name, value in found.items()}
