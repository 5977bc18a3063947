"""How accuracy is judged, once for everybody (DESIGN section 10): splits by (n, k), errors on unseen pairs, speedups of
neighbours, coverage, baselines.

Use :func:`evaluate_table` for one :class:`Measured` table, seed and size of training set; :func:`leave_one_out` for
tables of a few projections; :func:`transfer` for another stack of the same device. Scores are plain mappings, in
percent but for Spearman and counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit.core import Shapes
from calibration.fit.gemm import anchor_gemm, fit_gemm
from calibration.judge import scores
from calibration.judge.baselines import BASELINES
from calibration.judge.validate import joined
from simulator.hardware.profile import HardwareProfile, Section
from simulator.kernels.gemm import gemm_time, with_section
from simulator.kernels.gemm_core import Machine
from simulator.kernels.intervals import OpTime

F = NDArray[np.float64]
Rows = NDArray[np.intp]

SEEDS = (0, 1, 2)
SIZES: tuple[int | None, ...] = (100, 400, 4000, None)
TEST_SHARE = 0.3
LLM_WIDTHS: tuple[tuple[int, int], ...] = (
    (4096, 4096), (6144, 4096), (1024, 4096), (14336, 4096), (28672, 4096), (4096, 14336),
    (8192, 8192), (10240, 8192), (28672, 8192), (8192, 28672),
)  # fmt: skip
"""(n, k) of the projections of 7B to 70B Llama-like models, the larger ones rounded to what the tables measured."""


@dataclass(frozen=True)
class Measured:
    """GEMMs of one table, the profile whose datasheet belongs to them, and their number format."""

    data: Shapes
    hw: HardwareProfile
    dtype: str = "bf16"

    def take(self, rows: Any) -> Measured:
        """Rows by mask or index."""
        return replace(self, data=self.data.take(rows))

    def drawn(self, size: int | None, seed: int) -> tuple[Measured, Measured]:
        """``size`` rows of the training pairs (None: all) for a fit to see, and every row of the unseen pairs."""
        train, test = split(self.data, seed)
        return self.take(draw(train, size, seed)), self.take(test)

    def fit(self, **known: Any) -> Section:
        """The section :func:`fit_gemm` makes of all rows."""
        d = self.data
        return fit_gemm(d.m, d.n, d.k, d.seconds, self.hw, dtype=self.dtype, copies=d.copies, **known).section

    def times(self, section: Section) -> OpTime:
        """Times a section gives the rows under their own protocol (warm or cold weights)."""
        d, copies = self.data, None if np.isinf(self.data.copies).all() else self.data.copies
        return gemm_time(d.m, d.n, d.k, with_section(self.hw, self.dtype, section), dtype=self.dtype, copies=copies)


@dataclass(frozen=True)
class Result:
    """Scores of one method on one split; ``rows`` it was trained on, 0 for methods without any."""

    method: str
    seed: int
    rows: int
    scores: Mapping[str, float]


def split(data: Shapes, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and to test on: 30 % of the (n, k) pairs are kept unseen."""
    groups = data.groups
    count = int(groups.max()) + 1
    order = np.random.default_rng(seed).permutation(count)
    unseen = np.zeros(count, dtype=bool)
    unseen[order[: round(TEST_SHARE * count)]] = True
    return np.flatnonzero(~unseen[groups]), np.flatnonzero(unseen[groups])


def draw(rows: Rows, size: int | None, seed: int) -> Rows:
    """``size`` of the rows at random, all for None."""
    if size is None or size >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed + 100).choice(rows, size, replace=False))


def errors(predicted: F, data: Shapes) -> dict[str, float]:
    """:func:`calibration.judge.scores.errors` in percent, and the MAPE by range of m."""
    found = scores.errors(predicted, data.seconds, 100.0)
    for _, key, rows in scores.m_ranges(data.m):
        found[f"mape {key}"] = scores.errors(predicted[rows], data.seconds[rows], 100.0)["mape"]
    return found


def neighbours(data: Shapes) -> Rows:
    """Pairs (smaller, larger) of rows that differ in one of m, n, k by a ratio in [0.25, 1)."""
    return scores.pairs({"m": data.m, "n": data.n, "k": data.k}, limit=None)


def speedups(predicted: F, data: Shapes, pairs: Rows | None = None) -> dict[str, float]:
    """Error of the speedup larger over smaller of neighbours: median, p95, Spearman, count."""
    found = scores.speedups(predicted, data.seconds, neighbours(data) if pairs is None else pairs, 100.0)
    names = [name for name in ("median", "p95", "spearman", "pairs") if name in found]
    return {f"speedup {name}": float(found[name]) for name in names}


def coverage(time: OpTime, data: Shapes) -> dict[str, float]:
    """Percentage of measured times within their interval and its mean full width in percent of the prediction, all and
    by range of m; lowest range."""
    inside = (data.seconds >= time.lower) & (data.seconds <= time.upper)
    width = 100.0 * (time.upper - time.lower) / time.seconds
    out = {"coverage": 100.0 * inside.mean(), "width": width.mean()}
    for _, key, rows in scores.m_ranges(data.m):
        out[f"coverage {key}"], out[f"width {key}"] = 100.0 * inside[rows].mean(), width[rows].mean()
    out["lowest coverage"] = min(v for name, v in out.items() if name.startswith("coverage"))
    return {name: float(v) for name, v in out.items()}


def llm_pairs(data: Shapes, near: float = 0.26) -> Rows:
    """Pairs shaped like pruning: (n, k) within ``near`` octaves of a projection of an LLM and half or a quarter of its
    n or k, or three quarters or half of m."""
    logs = np.log2(np.stack([data.n, data.k], axis=1))
    far = np.abs(logs[:, None, :] - np.log2(LLM_WIDTHS)).max(axis=2).min(axis=1)
    pairs = neighbours(data)
    small, large = pairs[:, 0], pairs[:, 1]
    keep = (far <= near)[large]
    keep &= (
        np.isin(data.m[small] / data.m[large], (0.75, 0.5))
        | np.isin(data.n[small] / data.n[large], (0.5, 0.25))
        | np.isin(data.k[small] / data.k[large], (0.5, 0.25))
    )
    return np.stack([small[keep], large[keep]], axis=1)


def judge(section: Section, table: Measured) -> dict[str, float]:
    """All scores of a section on shapes it did not see."""
    time, data = table.times(section), table.data
    out = {**errors(time.seconds, data), **speedups(time.seconds, data), **coverage(time, data)}
    pairs = llm_pairs(data)
    groups = [("", np.ones(len(pairs), dtype=bool))] if len(pairs) else []
    groups += [(key, rows) for _, key, rows in scores.m_ranges(data.m[pairs[:, 1]])]
    for key, rows in groups:
        found = speedups(time.seconds, data, pairs[rows])
        del found["speedup spearman"]
        out |= {f"llm {name.removeprefix('speedup ')} {key}".strip(): value for name, value in found.items()}
    return out


def evaluate_table(table: Measured, size: int | None, seed: int, prior: Section | None = None) -> Result:
    """Fit on ``size`` rows (None: all) of the training pairs and judge on every row of the others.

    ``prior`` is the section of a sibling or another stack.
    """
    own, unseen = table.drawn(size, seed)
    method = "prunesim" if prior is None else "prunesim + prior"
    return Result(method, seed, len(own.data), judge(own.fit(prior=prior, seed=seed), unseen))


def evaluate_baselines(table: Measured, size: int | None, seed: int) -> list[Result]:
    """The baselines on the same rows."""
    own, unseen = (part.data for part in table.drawn(size, seed))
    out = []
    for name, baseline in BASELINES.items():
        predicted = baseline(own, Machine.of(table.hw, table.dtype), unseen)
        out.append(Result(name, seed, len(own), {**errors(predicted, unseen), **speedups(predicted, unseen)}))
    return out


def transfer(section: Section, table: Measured, seed: int, sizes: Sequence[int] = (20, 100, 400)) -> list[Result]:
    """A section on another stack's table: as shipped, and re-anchored on some shapes; judged on unseen (n, k) pairs."""
    out = [Result("as shipped", seed, 0, judge(section, table.drawn(None, seed)[1]))]
    for size in sizes:
        own, unseen = table.drawn(size, seed)
        d, dtype = own.data, own.dtype
        moved = anchor_gemm(section, d.m, d.n, d.k, d.seconds, own.hw, dtype=dtype, copies=d.copies).section
        out.append(Result("re-anchored", seed, len(d), judge(moved, unseen)))
    return out


def leave_one_out(table: Measured, labels: NDArray[Any], prior: Section | None = None) -> list[Result]:
    """For a table of a few projections: fit on all but one, judge on it. ``method`` names the one left out; the last
    result, "all", pools their rows."""
    out, times, tests = [], [], []
    for i, label in enumerate(np.unique(labels)):
        test = table.take(labels == label)
        section = table.take(labels != label).fit(prior=prior)
        out.append(Result(str(label), i, len(labels) - len(test.data), judge(section, test)))
        times.append(test.times(section))
        tests.append(np.flatnonzero(labels == label))
    pooled, time = table.data.take(np.concatenate(tests)), joined(times)
    own = np.repeat(np.arange(len(tests)), [len(rows) for rows in tests])
    pairs = neighbours(pooled)
    pairs = pairs[own[pairs[:, 0]] == own[pairs[:, 1]]]
    overall = {**errors(time.seconds, pooled), **speedups(time.seconds, pooled, pairs), **coverage(time, pooled)}
    return [*out, Result("all", len(out), len(labels), overall)]
