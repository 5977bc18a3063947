"""Rows of one operator: splits that keep groups whole, fits and updates, and their scores on held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from calibration.evidence.scoring import ScoredRows, score
from calibration.evidence.validate import SIMPLE_FLOOR_S, SIMPLE_SHARE
from calibration.fit.attention import SHAPE, AttentionFit, fit_attention
from calibration.fit.errors import LEVEL, neighbours, pairs_along
from calibration.fit.experts import PART_ROLES
from calibration.fit.gemm import GemmFit, fit_gemm
from calibration.fit.local_update import update_profile
from calibration.fit.predict import predict
from calibration.fit.section import Fit, fit_section
from calibration.fit.solver import HUBER
from calibration.records.timing_table import Records, Source
from simulator.arrays import FloatArray, IndexArray
from simulator.codes import formats_of
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.sections import Section
from simulator.operators.attention import AttentionCalls
from simulator.operators.base import Machine
from simulator.operators.experts import Layers
from simulator.operators.gemm import Products
from simulator.uncertainty.forward import ratio_half
from simulator.uncertainty.posterior import posterior_of

Row = dict[str, Any]

GROUPINGS: tuple[str, ...] = ("heads", "lengths")
"""What is held out of attention: heads and KV heads, or query lengths (prefill) and cache lengths (decode)."""
TEST_SHARE = 0.3
COLD_L2 = 4.0  # rotated weights count as cold from this multiple of the L2: some smaller weights stay in it
MOST_ROWS, MOST_PAIRS = 3000, 4000  # held-out rows, and pairs of them, of an update; of more, a random sample


@dataclass(frozen=True)
class MeasuredRows:
    """Rows of one operator in one table, their number format, and the profile with the datasheet of their device."""

    data: Fit
    hw: HardwareProfile
    dtype: str = "bf16"

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
        """Hold out 30 % of the groups (of (n, k) of GEMMs, of models of experts, of "heads" or "lengths" of attention);
        return ``size`` rows of the others at random (None: all), and every row of the groups held out."""
        groups = self.data.groups(by)
        count = int(groups.max()) + 1
        order = np.random.default_rng(seed).permutation(count)
        unseen = np.isin(groups, order[: round(TEST_SHARE * count)])
        train = np.flatnonzero(~unseen)
        if size is not None and size < len(train):
            train = np.sort(np.random.default_rng(seed + 100).choice(train, size, replace=False))
        return self.take(train), self.take(np.flatnonzero(unseen))

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
        columns |= {"operator": c.operator, "dtype": dtype, "seconds": self.data.seconds}
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
        return replace(self.hw.calibrated({(self.data.calls.operator, self.dtype): section}), same_stack=same_stack)

    def timed(self, seconds: FloatArray, pairs: IndexArray) -> ScoredRows:
        """Return the rows next to predicted times without intervals."""
        c = self.data.calls
        return ScoredRows(self.data.seconds, seconds, m=c.m if isinstance(c, Products) else None, pairs=pairs)

    def predictions(self, hw: HardwareProfile, pairs: IndexArray, ratios: bool = False) -> ScoredRows:
        """Return the rows next to times by a profile, under the rows' protocol (warm or cold weights); ``ratios``: with
        intervals of the ratios of pairs."""
        found, half = predict(self.records(), hw), None
        if ratios and len(pairs) and found.uncertainty is not None:
            smaller, larger = (found.uncertainty.take(side) for side in pairs.T)
            half = ratio_half(smaller, larger, LEVEL, posterior_of(hw))
        time = found.time
        return replace(self.timed(time.seconds, pairs), lower=time.lower, upper=time.upper, half_width=half)


def row(method: str, seed: int, trained_on: int, scores: Mapping[str, float], rows: int = 0, **names: str) -> Row:
    """Return the scores of one method on one split of a table, with the number of training rows (0: none) and the
    requested number ``rows`` (0: all)."""
    return {"method": method, "rows": rows, "trained_on": trained_on, "seed": seed, **names, **scores}


def evaluate(section: Section, table: MeasuredRows, by: str = "") -> dict[str, float]:
    """Return the scores of a section on rows of its stack; of GEMMs also bias and coverage of the cold prediction, as
    in a decoder, for rows with few tokens whose rotated weights take :data:`COLD_L2` times the L2 or more."""
    hw, calls = table.profile(section), table.data.calls
    out = score(table.predictions(hw, table.pairs(by), isinstance(calls, Layers)))
    if isinstance(calls, Products):
        machine = Machine.of(table.hw, table.dtype)
        footprint = machine.weight_bytes * calls.n * calls.k * calls.copies
        rows = (calls.m <= 16.0) & (footprint >= COLD_L2 * machine.l2_bytes)
        if rows.any():
            data = table.take(rows).data
            cold = replace(data, calls=replace(calls.take(rows), copies=np.full(len(data), np.inf)))
            found = score(replace(table, data=cold).predictions(hw, np.zeros((0, 2), dtype=np.intp)))
            out |= {"cold bias": found["bias"], "cold coverage": found["coverage"]}
    return out


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
    section = train.fit(seed=seed, prior=prior, fold_by=fold_by)
    return row("prunesim + prior" if prior else "prunesim", seed, len(train.data), evaluate(section, test, by))


def evaluate_baselines(table: MeasuredRows, size: int | None, seed: int) -> list[Row]:
    """Return the scores of rooflines without a fit, and with two efficiencies, on the same rows of GEMMs. Simulators in
    the style of GenZ use two efficiencies; here they are fitted by robust least squares in log time."""
    train, test = table.train_test(size, seed)
    machine = Machine.of(table.hw, table.dtype)

    def parts(data: Fit) -> tuple[FloatArray, FloatArray]:
        c = data.calls
        assert isinstance(c, Products)
        moved = machine.weight_bytes * c.n * c.k + machine.element_bytes * c.m * (c.n + c.k)
        return 2.0 * c.m * c.n * c.k / machine.peak_flop_per_s, moved / machine.bandwidth_bytes_per_s

    def log_residual(logs: FloatArray) -> FloatArray:
        compute, moved = parts(train.data) / np.exp(logs)[:, None]
        return np.asarray(np.log(np.maximum(compute, moved)) - np.log(train.data.seconds))

    a, b = np.exp(least_squares(log_residual, np.log([0.5, 0.5]), loss="soft_l1", f_scale=HUBER).x)
    (compute, moved), pairs = parts(test.data), test.pairs()
    baselines = {
        "datasheet roofline": np.maximum(compute, moved),
        "max(flop, bytes/0.8) + 3 us": np.maximum(compute, moved / SIMPLE_SHARE) + SIMPLE_FLOOR_S,
        "two efficiencies (GenZ-style)": np.maximum(compute / a, moved / b),
    }
    return [row(name, seed, len(train.data), score(test.timed(s, pairs))) for name, s in baselines.items()]


def evaluate_updates(
    hw: HardwareProfile, tables: Mapping[str, MeasuredRows], sizes: Sequence[int], seed: int
) -> list[Row]:
    """Evaluate a profile on the test groups of the first table: as shipped, and updated with some of the training rows
    of each table. The method of a row is the name of the table that updated the profile."""
    rng, unseen = np.random.default_rng(seed + 50), next(iter(tables.values())).train_test(None, seed)[1]
    test = unseen.take(np.sort(rng.permutation(len(unseen.data))[:MOST_ROWS]))
    pairs = test.pairs()
    pairs = pairs[np.sort(rng.permutation(len(pairs))[:MOST_PAIRS])]
    out = [row("as shipped", seed, 0, score(test.predictions(hw, pairs, ratios=True)))]
    for size, (name, source) in ((size, item) for size in sizes for item in tables.items()):
        records = source.train_test(size, seed)[0].records()
        try:
            updated = update_profile(hw, records).profile
        except InputError:  # the defaults are off by more than an update accepts
            continue
        out.append(row(name, seed, size, score(test.predictions(updated, pairs, ratios=True)), rows=size))
    return out
