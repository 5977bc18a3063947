"""How one table is evaluated: splits by groups of shapes, errors on held-out rows, speedups of neighbouring shapes,
coverage of intervals, baselines.

Use :func:`evaluate_table` for one :class:`MeasuredRows` table, seed and size of training set; :func:`leave_one_out` for
tables of a few projections; :mod:`calibration.validation.stacks` for a held-out software stack. Scores are mappings, in
percent except Spearman and counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit.attention import SHAPE, AttentionFit, fit_attention
from calibration.fit.elementwise import ElementwiseFit
from calibration.fit.errors import LEVEL, neighbours, pairs_along
from calibration.fit.experts import PART_ROLES
from calibration.fit.gemm import GemmFit, fit_gemm
from calibration.fit.predict import Predicted, joined, predict
from calibration.fit.section import Fit, fit_section
from calibration.records.timing_table import Records, Source
from calibration.validation import scores
from calibration.validation.baselines import BASELINES
from simulator.arrays import FloatArray, IndexArray
from simulator.cost.attention import AttentionCalls
from simulator.cost.base import Machine
from simulator.cost.elementwise import elementwise
from simulator.cost.experts import Layers
from simulator.cost.gemm import Products
from simulator.hardware.constants import CLASSES
from simulator.hardware.formats import formats_of
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.sections import Section
from simulator.uncertainty.forward import ratio_half
from simulator.uncertainty.operators import OperatorTimes, operator_time
from simulator.uncertainty.posterior import posterior_of

Row = dict[str, Any]

SEEDS = (0, 1, 2)
SIZES: tuple[int | None, ...] = (400, None)
GROUPINGS: tuple[str, ...] = ("heads", "lengths")
"""Sizes by which attention rows are held out: heads and KV heads, or query lengths (prefill) and cache lengths
(decode)."""
TEST_SHARE = 0.3
COLD_L2 = 4.0
"""Rotated weights count as cold from this multiple of the L2; of smaller ones, some stay in it."""
LLM_WIDTHS: tuple[tuple[int, int], ...] = (
    (4096, 4096), (6144, 4096), (1024, 4096), (14336, 4096), (28672, 4096), (4096, 14336),
    (8192, 8192), (10240, 8192), (28672, 8192), (8192, 28672),
)  # fmt: skip
"""(n, k) of the projections of 7B to 70B Llama-like models, the larger ones rounded to measured shapes."""


@dataclass(frozen=True)
class MeasuredRows:
    """Rows of one operator in one table, their number format, and the profile with the datasheet of their device."""

    data: Fit
    hw: HardwareProfile
    dtype: str = "bf16"

    @property
    def operator(self) -> str:
        """Section of a profile that predicts the rows."""
        return self.data.calls.operator

    def groups(self, by: str = "") -> IndexArray:
        """Return the group of each row; a split keeps groups whole: (n, k) of GEMMs, models of experts, "heads" or
        "lengths" of attention."""
        return self.data.groups(by)

    def pairs(self, by: str = "") -> IndexArray:
        """Return pairs (smaller, larger) that differ in one size, by a ratio in [0.25, 1): for GEMMs any size, for
        experts their width or number, for attention the KV groups with their query heads ("heads") or the length."""
        c = self.data.calls
        if isinstance(c, Products):
            return neighbours((c.m, c.n, c.k))
        if isinstance(c, Layers):
            same = [c.m, c.k, c.active, c.skew, c.part]
            return np.concatenate([pairs_along(c.n, [*same, c.experts]), pairs_along(c.experts, [*same, c.n])])
        assert isinstance(c, AttentionCalls)
        g = c.geometry
        if by == "lengths":
            length = g.kv_len if c.phase == "decode" else g.q_len
            return pairs_along(length, [g.batch, g.heads, g.kv_heads, g.head_dim])
        if c.latent:
            return pairs_along(g.heads, [g.batch, g.q_len, g.kv_len])
        return pairs_along(g.kv_heads, [g.batch, g.q_len, g.kv_len, g.heads / g.kv_heads, g.head_dim])

    def take(self, rows: NDArray[Any]) -> MeasuredRows:
        """Return rows by mask or index."""
        return replace(self, data=self.data.take(rows))

    def train_test(self, size: int | None, seed: int, by: str = "") -> tuple[MeasuredRows, MeasuredRows]:
        """Return ``size`` rows of the training groups (None: all), and every row of the test groups."""
        train, test = split(self.groups(by), seed)
        return self.take(draw(train, size, seed)), self.take(test)

    def records(self) -> Records:
        """Return the rows as records."""
        c, columns = self.data.calls, dict[str, Any]()
        dtype, weight = formats_of(self.dtype, self.hw.rates)
        if isinstance(c, Products):
            cold = np.isinf(c.copies)
            columns = {"m": c.m, "n": c.n, "k": c.k, "cold": cold, "copies": np.where(cold, 0.0, c.copies)}
            columns["weight_dtype"] = weight
        elif isinstance(c, Layers):
            columns = {name: getattr(c, name) for name in ("m", "n", "k", "experts", "active", "skew")}
            columns |= {"weight_dtype": weight, "cold": ~c.warm, "copies": c.warm, "role": PART_ROLES[c.part]}
        elif isinstance(c, AttentionCalls):
            g = c.geometry
            columns = {name: getattr(g, name) for name in SHAPE}
            columns |= {"cold": np.broadcast_to(g.warm, len(self.data)) == 0.0}
            columns["n"] = 0.0 if g.value_dim is None else g.value_dim
        columns |= {"operator": self.operator, "dtype": dtype, "seconds": self.data.seconds}
        return Records.from_columns([Source("")], **columns)

    def fit(self, *, seed: int = 0, prior: Section | None = None, fold_by: Sequence[str] = GROUPINGS) -> Section:
        """Return the section fitted to all rows; ``prior`` applies to GEMMs, ``fold_by`` to attention."""
        if isinstance(self.data, GemmFit):
            return fit_gemm(self.data, self.hw, dtype=self.dtype, seed=seed, prior=prior).section
        if isinstance(self.data, AttentionFit):
            return fit_attention(self.data, self.hw.architecture, seed=seed, fold_by=fold_by).section
        return fit_section(self.data, seed=seed).section

    def profile(self, section: Section, same_stack: bool = True) -> HardwareProfile:
        """Return the device with one section, for use on the stack of the fit or (``same_stack`` false) another."""
        return replace(self.hw.calibrated({(self.operator, self.dtype): section}), same_stack=same_stack)

    def predicted(self, hw: HardwareProfile) -> Predicted:
        """Return the rows' times by a profile, with errors, under the rows' protocol (warm or cold weights)."""
        return predict(self.records(), hw)

    def times(self, hw: HardwareProfile) -> OperatorTimes:
        """Return the times of :meth:`predicted`."""
        return self.predicted(hw).time


def row(method: str, seed: int, trained_on: int, scores: Mapping[str, float], table: str = "", rows: int = 0) -> Row:
    """Return the scores of one method on one split of a table, with the number of training rows (0: none) and the
    requested number ``rows`` (0: all)."""
    return {"table": table, "method": method, "rows": rows, "trained_on": trained_on, "seed": seed, **scores}


def split(groups: IndexArray, seed: int) -> tuple[IndexArray, IndexArray]:
    """Return rows to train on and rows to test on: 30 % of the groups are held out."""
    count = int(groups.max()) + 1
    order = np.random.default_rng(seed).permutation(count)
    unseen = np.isin(groups, order[: round(TEST_SHARE * count)])
    return np.flatnonzero(~unseen), np.flatnonzero(unseen)


def draw(rows: IndexArray, size: int | None, seed: int) -> IndexArray:
    """Return ``size`` of the rows at random, all for None."""
    if size is None or size >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed + 100).choice(rows, size, replace=False))


def errors(predicted: FloatArray, data: Fit) -> dict[str, float]:
    """Return :func:`calibration.validation.scores.errors` in percent; for GEMMs also the MAPE by range of m."""
    out = scores.errors(predicted, data.seconds, 100.0)
    for key, rows in _ranges(data):
        out[f"mape {key}"] = scores.errors(predicted[rows], data.seconds[rows], 100.0)["mape"]
    return out


def _ranges(data: Fit) -> list[tuple[str, NDArray[np.bool_]]]:
    """Return key and rows of each range of m of GEMMs; none of other operators."""
    if not isinstance(data.calls, Products):
        return []
    return [(key, rows) for _, key, rows in scores.m_ranges(data.calls.m)]


def speedups(predicted: FloatArray, data: Fit, pairs: IndexArray) -> dict[str, float]:
    """Return the error of the speedup, larger over smaller, of pairs: median, p95, Spearman, count."""
    values = scores.speedups(predicted, data.seconds, pairs, 100.0)
    names = [name for name in ("median", "p95", "spearman", "pairs") if name in values]
    return {f"speedup {name}": float(values[name]) for name in names}


def covered(time: OperatorTimes, seconds: FloatArray) -> NDArray[np.bool_]:
    """Return a mask of the measured times that lie in their interval."""
    return np.asarray((seconds >= time.lower) & (seconds <= time.upper))


def coverage(time: OperatorTimes, data: Fit) -> dict[str, float]:
    """Return the coverage of measured times and the median half-width of their intervals, in percent; for GEMMs also by
    range of m, with the lowest range."""
    inside, width = covered(time, data.seconds), 100.0 * (time.upper / time.seconds - 1.0)
    out = {"coverage": 100.0 * inside.mean(), "width": np.median(width)}
    for key, rows in _ranges(data):
        out[f"coverage {key}"], out[f"width {key}"] = 100.0 * inside[rows].mean(), np.median(width[rows])
    out["lowest coverage"] = min(v for name, v in out.items() if name.startswith("coverage"))
    return {name: float(v) for name, v in out.items()}


def ratio_coverage(
    predicted: Predicted, hw: HardwareProfile, seconds: FloatArray, pairs: IndexArray
) -> dict[str, float]:
    """Return the coverage of measured ratios of pairs and the median half-width of their intervals, in percent."""
    if not len(pairs) or predicted.uncertainty is None:
        return {}
    smaller, larger = (predicted.uncertainty.take(side) for side in pairs.T)
    half = ratio_half(smaller, larger, LEVEL, posterior_of(hw))
    error = np.log(seconds / predicted.time.seconds)
    inside = np.abs(error[pairs[:, 0]] - error[pairs[:, 1]]) <= half
    width = 100.0 * np.expm1(np.median(half))
    return {"ratio coverage": 100.0 * float(inside.mean()), "ratio width": float(width)}


def llm_pairs(data: Products, octaves: float = 0.26) -> IndexArray:
    """Return pairs shaped like pruning.

    The larger (n, k) lies within ``octaves`` of a projection of an LLM; the smaller has half or a quarter of its n or
    k, or three quarters or half of its m.
    """
    logs = np.log2(np.stack([data.n, data.k], axis=1))
    distance = np.abs(logs[:, None, :] - np.log2(LLM_WIDTHS)).max(axis=2).min(axis=1)
    pairs = neighbours((data.m, data.n, data.k))
    small, large = pairs.T
    cuts = (data.m, (0.75, 0.5)), (data.n, (0.5, 0.25)), (data.k, (0.5, 0.25))
    pruned = np.any([np.isin(size[small] / size[large], ratios) for size, ratios in cuts], axis=0)
    return np.asarray(pairs[(distance <= octaves)[large] & pruned])


def evaluate(section: Section, table: MeasuredRows, by: str = "") -> dict[str, float]:
    """Return all scores of a section on held-out shapes of its stack."""
    hw, data, pairs = table.profile(section), table.data, table.pairs(by)
    predicted = table.predicted(hw)
    seconds = predicted.time.seconds
    out = {**errors(seconds, data), **speedups(seconds, data, pairs), **coverage(predicted.time, data)}
    if isinstance(data.calls, Layers):
        return out | ratio_coverage(predicted, hw, data.seconds, pairs)
    if not isinstance(data.calls, Products):
        return out
    pairs = llm_pairs(data.calls)
    groups = [("", np.ones(len(pairs), dtype=bool))] if len(pairs) else []
    groups += [(key, rows) for _, key, rows in scores.m_ranges(data.calls.m[pairs[:, 1]])]
    for key, rows in groups:
        ratios = speedups(seconds, data, pairs[rows])
        del ratios["speedup spearman"]
        out |= {f"llm {name.removeprefix('speedup ')} {key}".strip(): value for name, value in ratios.items()}
    return out | cold_scores(section, table)


def cold_scores(section: Section, table: MeasuredRows) -> dict[str, float]:
    """Return bias and coverage of the cold prediction, as in a decoder, for rows with few tokens whose rotated weights
    take at least :data:`COLD_L2` times the L2."""
    calls, machine = table.data.calls, Machine.of(table.hw, table.dtype)
    assert isinstance(calls, Products)
    footprint = machine.weight_bytes * calls.n * calls.k * calls.copies
    rows = (calls.m <= 16.0) & (footprint >= COLD_L2 * machine.l2_bytes)
    if not rows.any():
        return {}
    cold = table.take(rows)
    calls = replace(calls.take(rows), copies=np.full(int(rows.sum()), np.inf))
    cold = replace(cold, data=replace(cold.data, calls=calls))
    time, seconds = cold.times(cold.profile(section)), cold.data.seconds
    bias = scores.errors(time.seconds, seconds, 100.0)["bias"]
    return {"cold bias": bias, "cold coverage": 100.0 * float(covered(time, seconds).mean())}


def evaluate_table(
    table: MeasuredRows,
    size: int | None,
    seed: int,
    by: str = "",
    *,
    prior: Section | None = None,
    fold_by: Sequence[str] = GROUPINGS,
) -> Row:
    """Fit to ``size`` rows (None: all) of the training groups and evaluate on every row of the test groups; ``prior``
    and ``fold_by`` as in :meth:`MeasuredRows.fit`."""
    train, test = table.train_test(size, seed, by)
    method = "prunesim" if prior is None else "prunesim + prior"
    section = train.fit(seed=seed, prior=prior, fold_by=fold_by)
    return row(method, seed, len(train.data), evaluate(section, test, by))


def evaluate_baselines(table: MeasuredRows, size: int | None, seed: int) -> list[Row]:
    """Return the scores of the baselines on the same rows."""
    train, test = (part.data for part in table.train_test(size, seed))
    assert isinstance(train, GemmFit)
    assert isinstance(test, GemmFit)
    pairs, out = replace(table, data=test).pairs(), []
    for name, baseline in BASELINES.items():
        predicted = baseline(train, Machine.of(table.hw, table.dtype), test)
        out.append(row(name, seed, len(train), {**errors(predicted, test), **speedups(predicted, test, pairs)}))
    return out


def score_elementwise(moves: ElementwiseFit, hw: HardwareProfile, rows: int, seed: int) -> dict[str, float]:
    """Return the scores of a fit to ``rows`` (0: all) elementwise operators on held-out sizes."""
    train, test = split(moves.groups(), seed)
    section = fit_section(moves.take(draw(train, rows or None, seed)), seed=seed).section
    unseen = moves.take(test)
    role, own = np.array(CLASSES)[unseen.calls.code], hw.calibrated({("elementwise", "bf16"): section})
    time = operator_time(elementwise(unseen.calls.bytes_, 0.0, own, role=role), own)
    long = unseen.seconds > 1e-5
    scored = {**errors(time.seconds, unseen), **coverage(time, unseen)}
    return {**scored, "mape over 10us": scores.errors(time.seconds[long], unseen.seconds[long], 100.0)["mape"]}


def leave_one_out(table: MeasuredRows, labels: NDArray[Any], prior: Section | None = None) -> list[Row]:
    """Fit to all projections of a table except one and evaluate on it, for each projection in turn.

    ``method`` is the label of the held-out projection; the last result, "all", pools the rows of all.
    """
    out, times, tests = [], [], []
    for i, label in enumerate(np.unique(labels)):
        test = table.take(labels == label)
        section = table.take(labels != label).fit(prior=prior)
        out.append(row(str(label), i, len(labels) - len(test.data), evaluate(section, test)))
        times.append(test.times(test.profile(section)))
        tests.append(np.flatnonzero(labels == label))
    pooled, time = table.data.take(np.concatenate(tests)), joined(times)
    fold = np.repeat(np.arange(len(tests)), [len(rows) for rows in tests])
    pairs = replace(table, data=pooled).pairs()
    pairs = pairs[fold[pairs[:, 0]] == fold[pairs[:, 1]]]
    overall = {**errors(time.seconds, pooled), **speedups(time.seconds, pooled, pairs), **coverage(time, pooled)}
    return [*out, row("all", len(out), len(labels), overall)]
